"""Stand-ins for a GPU with faults planted in their kernels, for the tests of the run on one.

``gather`` computes something else, ``sgd`` (and so every training step) traps,
``clip_by_global_norm`` never ends, and ``recurrence`` takes the process along.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastrnn.backend import Backend
from fastrnn.cuda.device import Kernel
from tests.cuda_support import twin
from tests.emulated_device import EmulatedDevice
from tests.gpu_stand_ins import open_stand_in


class Planted(EmulatedDevice):
    """An emulator whose kernel files are others, and one of whose kernels ends the process."""

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        if kernel.name == "recurrence_kernel":
            os.abort()
        super().launch(kernel, grid, args)


def _cupy() -> Backend:
    from fastrnn.backends.cupy_cuda import CupyBackend

    folder = Path(tempfile.mkdtemp())
    sources = twin("gather", "add(row[u], bias);", "add(row[u], bias); row[u][0] += 1;", folder)
    (folder / "trap").mkdir()
    sources |= twin(
        "clip_sgd",
        "p[u][i] -= rate * (factor * g[u][i]);",
        "if (p[u][i] == p[u][i]) __builtin_trap();",
        folder / "trap",
    )
    text = sources["clip_sgd"].read_text(encoding="utf-8")
    right = "g[u][i] *= factor;"
    assert text.count(right) == 1
    endless = f"{right}\n        for (volatile int n = 0; n == 0;) {{}}"
    sources["clip_sgd"].write_text(text.replace(right, endless), encoding="utf-8")
    return CupyBackend(Planted(sources=sources))


def _numba_cuda() -> Any:
    backend: Any = open_stand_in("numba-cuda")
    own = backend._kernels

    def wrong(W_xh: Any, tokens: Any, b_h: Any, z: Any, H: Any) -> None:
        z[0] = 1.0

    def trap(p: Any, *rest: Any) -> None:
        raise RuntimeError("a planted trap")

    def endless(g: Any, factor: Any) -> None:
        while True:
            pass

    def planted(factory: Any, function: Any) -> Any:
        return lambda *args: replace(factory(*args), function=function)

    backend._kernels = SimpleNamespace(
        **{
            **vars(own),
            "gather_kernel": planted(own.gather_kernel, wrong),
            "sgd_kernel": planted(own.sgd_kernel, trap),
            "scale_kernel": planted(own.scale_kernel, endless),
        }
    )
    return backend


def open_planted(name: str) -> Backend:
    """What :func:`tests.gpu_stand_ins.open_stand_in` opens, with the faults planted."""
    opened: Backend = {"cupy": _cupy, "numba-cuda": _numba_cuda}[name]()
    return opened
