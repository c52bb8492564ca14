"""README and the package's own docstring: their Python examples run, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[0])
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in re.findall(r"^(?:import|from) (torch|jax)", code, re.MULTILINE):
        pytest.importorskip(package, reason=f"this example needs {package}, which is optional")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


def test_there_are_examples_and_exactly_two_commands_to_start() -> None:
    assert BLOCKS
    start = TEXT[: TEXT.index("\n## ")]
    commands = re.findall(r"^```console\n(.*?)^```", start, re.MULTILINE | re.DOTALL)
    assert [c.strip() for c in commands] == [
        "python -m pip install . && fastrnn train",
        'python -m pip install ".[test]" && pytest',
    ]


def test_every_command_in_the_readme_exists() -> None:
    named = set(re.findall(r"^fastrnn (\w+)", TEXT, re.MULTILINE))
    assert {"train", "generate", "bench", "info"} <= named
    result = subprocess.run(
        [sys.executable, "-m", "fastrnn", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=README.parent,
    )
    for command in named:
        assert command in result.stdout


def test_local_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    for link in links:
        if "://" not in link:
            assert (README.parent / link).exists(), link
