"""The CPU backend as torch's guest: as many threads as torch uses, and the very same ones.

Threads of an OpenMP library spin for milliseconds after each parallel region, in wait for the next.
Between two operators of torch, a second set of threads would find the cores taken and run at half
its speed. So the compiled ops of the ``numba`` backend run as parallel regions of torch's library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrnn.backends import cpu_ops as ops
from fastrnn.backends.cpu_openmp import ON_OPENMP
from fastrnn.backends.cpu_threads import Team
from fastrnn.backends.numba_cpu import NumbaBackend

_WORTH_THREADS = 1e6
"""Operations from which a parallel region pays, its threads being awake, if they never meet."""


class TorchNumbaBackend(NumbaBackend):
    """The numba backend on ``threads`` threads of torch."""

    def __init__(self, threads: int) -> None:
        openmp = openmp_entries()
        super().__init__(Team(threads) if openmp is None else OpenMPTeam(threads, openmp))

    def _run(self, operations: float, function: Any, *arguments: Any) -> None:
        if function in (ops.recurrence, ops.recurrence_backward):
            super()._run(operations, function, *arguments)  # its threads meet at every time step
            return
        threads = self._team.size if operations >= _WORTH_THREADS else 1
        self._team.run(function, *arguments, threads=threads)


class OpenMPTeam(Team):
    """A team on the threads that an OpenMP library lends to whoever calls.

    Callers on several Python threads get a set of OpenMP threads each, so there is no lock.
    """

    def __init__(self, size: int, openmp: NDArray[np.int64]) -> None:
        super().__init__(size)
        self._openmp = openmp

    def run(self, function: Callable[..., Any], *arguments: Any, threads: int) -> None:
        if threads == 1 or function not in ON_OPENMP:
            super().run(function, *arguments, threads=threads)
        else:
            sync = np.zeros_like(self._sync)  # where nobody waits for the next job, as :func:`end`
            ON_OPENMP[function](self._openmp, threads, sync, arguments)


@functools.cache
def openmp_entries() -> NDArray[np.int64] | None:
    """Addresses of what :data:`fastrnn.backends.cpu_openmp.ON_OPENMP` calls in torch's library.

    None where torch has threads of another kind.
    """
    if "OpenMP" not in torch.__config__.parallel_info().partition("ATen parallel backend:")[2]:
        return None
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if not (folder / name).exists():
            continue
        # A symbol is looked for in this library and then in those that it was linked with.
        library = ctypes.CDLL(str(folder / name))
        try:
            entries = [library.GOMP_parallel, library.omp_get_thread_num]
            entries.append(library.omp_get_num_threads)
        except AttributeError:
            return None
        return np.array([ctypes.cast(e, ctypes.c_void_p).value for e in entries], np.int64)
    return None
