"""Runs the CUDA C kernels of this project on a CPU, for tests.

``Emulator().module("kernels/recurrence.cu").launch("kernel", grid, block, args)`` compiles the file
as it stands with g++ and runs it with one fiber for each CUDA thread; ``run_sanitized`` does the
same in a process of its own under AddressSanitizer or ThreadSanitizer.
"""

from tests.emulator.build import BuildError, emulator_unavailable
from tests.emulator.memory import guarded, guarded_empty
from tests.emulator.module import Emulator, EmulatorError, Module, Order, Statistics
from tests.emulator.require import require_emulator
from tests.emulator.sanitize import SanitizerError, run_sanitized

__all__ = [
    "BuildError",
    "Emulator",
    "EmulatorError",
    "Module",
    "Order",
    "SanitizerError",
    "Statistics",
    "emulator_unavailable",
    "guarded",
    "guarded_empty",
    "require_emulator",
    "run_sanitized",
]
