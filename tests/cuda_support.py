"""What the tests of the CUDA C kernels share: the emulated devices, twins, and when to skip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastrnn.cuda.device import KERNELS
from tests.emulated_device import EmulatedDevice
from tests.emulator import emulator_unavailable
from tests.emulator.module import Order

ORDERS: Sequence[Order] = ("forward", "reverse", "eager", 1, 2)
"""Orders of threads that a right kernel does not notice."""


def require_emulator() -> None:
    """Skip the test where the emulator cannot run; fail where the environment demands it."""
    reason = emulator_unavailable()
    if reason is None:
        return
    if os.environ.get("FASTRNN_REQUIRE_EMULATOR"):
        pytest.fail(f"FASTRNN_REQUIRE_EMULATOR is set, but {reason}")
    pytest.skip(reason)


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
