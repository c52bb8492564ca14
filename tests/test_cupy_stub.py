"""The ``cupy`` backend on the CuPy that users install, without a GPU: :mod:`tests.stub_cuda`."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import cache_directory
from tests.emulator.require import require_emulator
from tests.stub_cuda import parameter_sizes

ROOT = Path(__file__).parent.parent
INSTALLED = importlib.util.find_spec("cupy") is not None or bool(
    os.environ.get("FASTRNN_REQUIRE_GATE")
)
needs_cupy = pytest.mark.skipif(not INSTALLED, reason="needs CuPy: pip install 'fastrnn[cuda13x]'")


def run(*arguments: str) -> None:
    """Run pytest in a process whose CuPy is on the stub."""
    require_emulator()
    # Compiled kernels are kept as those of the emulator are.
    env = {**os.environ, "CUPY_CACHE_DIR": str(cache_directory() / "cupy")}
    env.pop("FASTRNN_BACKEND", None)
    command = [sys.executable, "-m", "tests.stub_cuda", "-q", "-n", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout, done.stdout[-2000:]


@needs_cupy
def test_every_op_runs_through_cupy() -> None:
    run("tests/test_ops.py", "-k", "cupy and not sm_ and (odd or window or record) and not large")


@needs_cupy
def test_steps_epochs_generation_and_what_can_go_wrong_run_through_cupy() -> None:
    run("tests/cupy_stub_cases.py")


def test_parameter_sizes_are_read_from_a_cubin() -> None:
    record = struct.pack("<BBHIHHI", 4, 0x17, 12, 0, 1, 8, 4 << 18)
    first = struct.pack("<BBHIHHI", 4, 0x17, 12, 0, 0, 0, 8 << 18)
    info = struct.pack("<BBH", 3, 0x19, 12) + record + first
    names = b"\0.shstrtab\0.nv.info.a_kernel\0"
    header = 64
    sections = [
        struct.pack("<II4Q24x", 0, 0, 0, 0, 0, 0),
        struct.pack("<II4Q24x", 1, 3, 0, 0, header, len(names)),
        struct.pack("<II4Q24x", 11, 0x70000000, 0, 0, header + len(names), len(info)),
    ]
    start = header + len(names) + len(info)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf = identity + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, start, 0, 64, 0, 0, 64, 3, 1)
    assert parameter_sizes(elf + names + info + b"".join(sections)) == {"a_kernel": [8, 4]}
