"""Launchers under a sanitizer, and scratch memory for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrnn.cuda.device import KERNELS, Array, Device, Kernel, Scratch
from tests.cuda_support import require_emulator
from tests.emulated_device import EmulatedDevice
from tests.emulator import run_sanitized
from tests.emulator.build import Sanitizer


class SanitizedDevice(EmulatedDevice):
    """Runs every launch in a process of its own under a sanitizer, which raises what it finds.

    Pointers inside of objects that are passed by value mean nothing there.
    """

    def __init__(self, kind: Sanitizer, capability: int = 90, **options: Any) -> None:
        super().__init__(capability, **options)
        self.kind: Sanitizer = kind

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        run_sanitized(
            self.kind,
            self.sources.get(kernel.file, KERNELS / f"{kernel.file}.cu"),
            kernel.name,
            grid,
            kernel.threads,
            args,
            shared_bytes=kernel.shared_bytes,
            order=self.order,
            defines=dict(kernel.defines),
        )


def sanitized(kind: Sanitizer, capability: int = 90, **options: Any) -> SanitizedDevice:
    """A :class:`SanitizedDevice`, or the test is skipped with the reason."""
    require_emulator()
    return SanitizedDevice(kind, capability, **options)


def scratch_of(device: Device) -> Scratch:
    """Fresh memory for every request; in the emulator it is full of NaN."""

    def scratch(name: str, size: int, dtype: Any) -> Array:
        return device.empty((size,), dtype)

    return scratch
