"""What the tests of the CUDA C kernels share: the emulated devices, twins, and when to skip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrnn.cuda.device import KERNELS
from tests.emulated_device import EmulatedDevice
from tests.emulator.module import Order
from tests.emulator.require import require_emulator

__all__ = ["ORDERS", "emulated", "require_emulator", "twin"]

ORDERS: Sequence[Order] = ("forward", "reverse", "eager", 1, 2)
"""Orders of threads that a right kernel does not notice."""


def emulated(capability: int = 90, **options: Any) -> EmulatedDevice:
    """An :class:`EmulatedDevice`, or the test is skipped with the reason."""
    require_emulator()
    return EmulatedDevice(capability, **options)


def twin(file: str, right: str, wrong: str, folder: Path) -> dict[str, Path]:
    """``sources`` for an :class:`EmulatedDevice` in which one passage of a kernel file differs.

    Args:
        file: stem of the kernel file. right: the passage, which occurs exactly once.
        wrong: what stands in its place. folder: where to write the file.
    """
    text = (KERNELS / f"{file}.cu").read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times in {file}.cu"
    path = folder / f"{file}.cu"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    return {file: path}
