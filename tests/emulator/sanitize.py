"""Runs a kernel in a process of its own under AddressSanitizer or ThreadSanitizer."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.build import Defines, Sanitizer, kernel_library, name_lines, runner_program
from tests.emulator.module import (
    ORDERS,
    SHUFFLED,
    Checked,
    Dimensions,
    Emulator,
    EmulatorError,
    Geometry,
    Order,
    check_arguments,
)

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    # The runtime is not instrumented: what it copies is the emulator's own business.
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=0:ignore_noninstrumented_modules=1:report_bugs=1",
}


class SanitizerError(EmulatorError):
    """A sanitizer complained; the text is its report."""


class _Arrays:
    """Whole allocations, so that two views of one array stay two views of one array."""

    def __init__(self) -> None:
        self.owners: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        self.written: set[int] = set()

    def place(self, argument: Checked) -> tuple[int, int]:
        """The number of an array's allocation and the array's offset in it."""
        array = argument.value
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        low, high = np.lib.array_utils.byte_bounds(owner)
        if low not in self.owners:
            raw = np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8)
            self.owners[low] = len(self.owners), raw
        if argument.writable:
            self.written.add(low)
        return self.owners[low][0], array.__array_interface__["data"][0] - low


def run_sanitized(
    kind: Sanitizer,
    source: str | Path,
    kernel: str,
    grid: Dimensions,
    block: Dimensions,
    args: Sequence[Any],
    shared_bytes: int = 0,
    cluster: int | None = None,
    cooperative: bool = False,
    order: Order = "forward",
    *,
    defines: Defines | None = None,
    spin_limit: int = 20_000,
    timeout: float = 120.0,
) -> str:
    """Run a kernel as :meth:`Module.launch` does; raise :class:`SanitizerError` with the report.

    "address" finds accesses outside of global arrays and of shared memory, and misaligned ones.
    "thread" finds two threads that touch the same bytes, one of them writing, with no barrier or
    release and acquire between them; all blocks run at once, at most 8,000 threads. Returns what
    the kernel printed.
    """
    path = Path(source).resolve()
    plain = Emulator().module(path, defines)
    entry = plain.entry(kernel)
    checked = check_arguments(kernel, entry, args)
    library = kernel_library(path, defines or {}, kind)
    geometry = Geometry.of(kernel, entry, library.static_bytes, grid, block, shared_bytes, cluster)
    if kind == "thread" and np.prod(geometry.grid) * np.prod(geometry.block) > 8000:
        raise ValueError("ThreadSanitizer follows at most 8,000 threads: launch fewer")

    arrays = _Arrays()
    arguments = b""
    for argument in checked:
        number, raw = -1, bytes(8)
        if argument.is_array:
            number, offset = arrays.place(argument)
            raw = struct.pack("<Q", offset)
        elif argument.value is not None:
            value = argument.value
            raw = value if isinstance(value, bytes) else value.tobytes()
        arguments += struct.pack("<iQ", number, len(raw)) + raw
    code, seed = (ORDERS[order], 0) if isinstance(order, str) else (SHUFFLED, int(order))
    name = kernel.encode()
    job = [
        struct.pack("<Q", len(name)) + name,
        struct.pack("<6I", *geometry.grid, *geometry.block),
        struct.pack("<3I", geometry.shared_bytes, library.static_bytes, geometry.cluster),
        struct.pack("<4I", cooperative, code, seed, spin_limit),
        struct.pack("<I", len(library.variables)),
        *(struct.pack("<QQ", v.offset, v.size) for v in library.variables),
        struct.pack("<I", len(arrays.owners)),
        *(struct.pack("<Q", raw.size) + raw.tobytes() for _, raw in arrays.owners.values()),
        struct.pack("<I", len(checked)),
        arguments,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file = Path(scratch) / "job", Path(scratch) / "result"
        job_file.write_bytes(b"".join(job))
        command = [str(runner_program(kind)), str(library.path), str(job_file), str(result_file)]
        if kind == "thread" and shutil.which("setarch"):
            # ThreadSanitizer maps fixed addresses; randomised ones may lie in its way.
            probe = subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False)
            if probe.returncode == 0:
                command = ["setarch", "-R", *command]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, **OPTIONS},
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EmulatorError(f"kernel {kernel}: no end after {timeout} s") from None
        if done.returncode == 3:
            raise EmulatorError(name_lines(done.stderr.removeprefix("EMULATOR: ").strip()))
        if done.returncode:
            raise SanitizerError(f"kernel {kernel}, {kind} sanitizer:\n{done.stderr.strip()}")
        raw_result = np.frombuffer(result_file.read_bytes(), np.uint8)
    position = 0
    for low, (_, raw) in arrays.owners.items():
        if low in arrays.written:
            raw[:] = raw_result[position : position + raw.size]
        position += raw.size
    return done.stdout
