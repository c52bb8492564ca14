"""A driver library that pretends one H100, for tests of GPU code where there is no GPU: README.md.

:func:`environment` gives the variables that make a process open it; in such a process
:class:`StubDriver` says what was asked of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.emulator.build import cache_directory

SOURCE = Path(__file__).with_name("driver.c")
FLAGS = (
    "-std=gnu11", "-shared", "-fPIC", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread",
    "-Wl,-soname,libcuda.so.1",
)  # fmt: skip


def compiler() -> str:
    """The C compiler: $CC or gcc."""
    return os.environ.get("CC", "gcc")


def unavailable() -> str | None:
    """Why the stub driver cannot be built here, or None where it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the stub driver needs x86-64 Linux, not {platform.machine()} {sys.platform}"
    if shutil.which(compiler()) is None:
        return f"the stub driver needs {compiler()} (a Debian or Ubuntu package: gcc)"
    return None


@functools.cache
def build() -> Path:
    """Compile the driver once for each content of its source; the folder of ``libcuda.so.1``."""
    key = SOURCE.read_bytes() + " ".join((compiler(), *FLAGS)).encode()
    folder = cache_directory() / f"stub-driver-{hashlib.sha256(key).hexdigest()[:16]}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            subprocess.run([compiler(), *FLAGS, "-o", str(fresh), str(SOURCE)], check=True)
            fresh.replace(library)
    return folder


def environment(
    *, memory: int | None = None, version: int | None = None, log: Path | None = None
) -> dict[str, str]:
    """The environment of a process that opens the stub driver.

    Args:
        memory: bytes of device memory; an H100's where None.
        version: of CUDA that the driver supports, as 13000 for 13.0.
        log: file that receives the report when the process ends.
    """
    paths = [str(build()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    env = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}
    for name, value in (("MEMORY", memory), ("VERSION", version), ("LOG", log)):
        if value is not None:
            env[f"STUB_DRIVER_{name}"] = str(value)
    return env


@dataclass(frozen=True)
class Report:
    """What a driver was asked for since it was last told to forget, and what is alive.

    Attributes:
        calls: number of calls by function. live: number of objects by kind.
        violations: what a device would refuse, or a capture must not hold, a line each.
        captures: that began. launches: of kernels, those in a capture included.
        captured_launches: of kernels in a capture. graph_launches: of executable graphs.
        unannounced_launches: of kernels, whose arguments nobody announced.
        device_bytes: allocated.
    """

    calls: dict[str, int]
    live: dict[str, int]
    violations: list[str]
    captures: int
    launches: int
    captured_launches: int
    graph_launches: int
    unannounced_launches: int
    device_bytes: int


def read_report(path: Path) -> Report:
    """The report in a file that a process left behind."""
    values = json.loads(path.read_text())
    return Report(**{name.replace(" ", "_"): value for name, value in values.items()})


class StubDriver:
    """The stub driver of this process.

    Raises:
        RuntimeError: another ``libcuda.so.1`` answers; the message says what to do.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        if not hasattr(self._library, "stub_report"):
            raise RuntimeError(
                "expected the stub driver, found another libcuda.so.1: start the process in "
                "tests.stub_driver.environment()"
            )

    def report(self) -> Report:
        """What happened so far."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            if self._library.stub_report(os.fsencode(path)):
                raise OSError(f"the stub driver cannot write {path}")
            return read_report(path)

    def forget(self) -> None:
        """Begin anew with calls, counts and violations; what is alive stays so."""
        self._library.stub_forget()

    def announce(self, sizes: Sequence[int]) -> None:
        """Tell the bytes of each argument of the next launch, as its caller packed them."""
        self._library.stub_announce_arguments(len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))
