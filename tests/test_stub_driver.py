"""Real numba-cuda on a driver that pretends an H100: ``tests/numba_cuda_on_stub.py``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stub_driver

ROOT = Path(__file__).parent.parent
# Where the gate is required, what is missing fails the tests that need it.
REQUIRED = bool(os.environ.get("FASTRNN_REQUIRE_GATE"))

needs_driver = pytest.mark.skipif(
    not REQUIRED and stub_driver.unavailable() is not None, reason=str(stub_driver.unavailable())
)
needs_package = pytest.mark.skipif(
    not REQUIRED and importlib.util.find_spec("numba_cuda") is None,
    reason="needs numba-cuda: pip install 'numba-cuda[cu13]'",
)


@needs_driver
@needs_package
def test_numba_cuda_asks_nothing_wrong_of_the_driver(tmp_path: Path) -> None:
    """In a process that finds the stub in place of a driver."""
    options = ("-q", "-rA", "--tb=short", "-p", "no:cacheprovider", "--noconftest", "-n", "0")
    log = tmp_path / "driver.json"
    env = stub_driver.environment(log=log)
    for name in ("NUMBA_ENABLE_CUDASIM", "FASTRNN_REQUIRE_GPU"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/numba_cuda_on_stub.py", *options],
        cwd=ROOT,
        env={**env, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    tail = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, tail
    for expected in (
        "test_an_op_alone_and_captured",
        "test_epochs_of_many_lengths",
        "test_generation",
        "test_nothing_is_left_of_fifty_captures",
        "test_a_leak_is_found",
    ):
        assert f"::{expected}" in done.stdout, f"{expected} did not run: {tail}"
    assert "skipped" not in done.stdout.splitlines()[-1]
    assert stub_driver.read_report(log).violations == []
