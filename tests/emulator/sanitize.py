"""Runs a kernel in a process of its own under AddressSanitizer or ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulator.build import Defines, Sanitizer, kernel_library, name_lines, runner_program
from tests.emulator.memory import Allocations
from tests.emulator.module import (
    ORDERS,
    SHUFFLED,
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

    arrays = Allocations(c.value for c in checked if c.is_array)
    stretches = [arrays.bytes(number) for number in range(len(arrays.spans))]
    written = {arrays.place(c.value)[0] for c in checked if c.writable}
    arguments = b""
    for argument in checked:
        number, raw = -1, bytes(8)
        if argument.is_array:
            number, offset = arrays.place(argument.value)
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
        struct.pack("<I", len(stretches)),
        *(struct.pack("<Q", stretch.size) + stretch.tobytes() for stretch in stretches),
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
        if done.returncode == 3 and "Sanitizer" not in done.stderr:
            raise EmulatorError(name_lines(done.stderr.removeprefix("EMULATOR: ").strip()))
        if done.returncode:
            raise SanitizerError(f"kernel {kernel}, {kind} sanitizer:\n{done.stderr.strip()}")
        result = np.frombuffer(result_file.read_bytes(), np.uint8)
    position = 0
    for number, stretch in enumerate(stretches):
        if number in written:
            stretch[:] = result[position : position + stretch.size]
        position += stretch.size
    return done.stdout
