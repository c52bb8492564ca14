"""The CUDA C engine: launchers of the kernels in ``kernels/*.cu``, one module an op.

A launcher computes a kernel's geometry and submits it to a :class:`~fastrnn.cuda.device.Device`: a
GPU through CuPy, or, in the tests, an emulator of one. The ``cupy`` backend composes the launchers.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastrnn.cuda.device import Kernel


def launchable(capability: int | None = None) -> list[Kernel]:
    """Every kernel of the launchers' ``variants()``.

    Args:
        capability: compute capability times ten; only what a launcher may choose for it. None: all.
    """
    kernels: dict[Kernel, None] = {}
    for module in pkgutil.iter_modules(__path__):
        found = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(found, "variants"):
            kernels |= dict.fromkeys(found.variants())
    return [k for k in kernels if capability is None or k.runs_on(capability)]
