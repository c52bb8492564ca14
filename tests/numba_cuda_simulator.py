"""Repairs of Numba's CUDA simulator, for tests: shared arrays without a race, barriers that sleep.

The simulator runs a CUDA thread as a Python thread. Its own shared arrays are looked up and made
with nothing to keep two threads of a block from doing so at once, and each then works on an array
of its own; its scheduler polls the threads of a block, and takes most of the time that a test has.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from numba.cuda import types
from numba.cuda.np import numpy_support
from numba.cuda.simulator import kernel, kernelapi

from fastrnn.backends.numba_cuda_kernels import Geometry

# Small enough for Python threads; every path of the real sizes is taken: rows of W_hh in registers,
# in shared memory and in neither, several slices, tiles and splits, states too wide for one block.
TOY = Geometry(
    lanes=4, slices=4, max_hidden=16, resident_bytes=48, shared_bytes=700, tile_m=8, tile_n=8,
    tile_k=4, micro_m=4, micro_n=2, threads=8, columns=4, partial_blocks=3,
)  # fmt: skip

_allocating = threading.Lock()


def poisoned(shape: Any, dtype: Any) -> Any:
    """An array full of NaN, or of the largest integer."""
    dtype = np.dtype(dtype)
    return np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max, dtype)


def shared_array(self: Any, shape: Any, dtype: Any, alignment: None = None) -> Any:
    """``cuda.shared.array``: one poisoned array a block and source line."""
    frame = sys._getframe(1)
    line = frame.f_code.co_filename, frame.f_lineno
    if isinstance(dtype, types.Type):
        dtype = numpy_support.as_dtype(dtype)
    with _allocating:
        if line not in self._allocations:
            self._allocations[line] = poisoned(shape, dtype)
        return self._allocations[line]


class BlockFailed(Exception):  # noqa: N818
    """Ends a thread because another of its block has failed."""


class Barrier:
    """The barrier of a block: releases its threads when all that have not left have come."""

    def __init__(self, threads: int) -> None:
        self.lock = threading.Lock()
        self.live, self.aborted = threads, False
        self.waiting: list[threading.Lock] = []

    def wait(self) -> None:
        with self.lock:
            gate = threading.Lock()
            gate.acquire()
            self.waiting.append(gate)
            self._release_if_complete()
        gate.acquire()
        if self.aborted:
            raise BlockFailed

    def leave(self, failed: bool) -> None:
        with self.lock:
            self.live -= 1
            self.aborted |= failed
            self._release_if_complete()

    def _release_if_complete(self) -> None:
        if self.aborted or len(self.waiting) == self.live:
            for gate in self.waiting:
                gate.release()
            self.waiting = []


def run_block(self: Any, grid_point: Any, *args: Any) -> None:
    """``BlockManager.run``: all threads of one block to their end; the first exception of one."""
    points = list(np.ndindex(*self._block_dim))
    self.barrier = Barrier(len(points))

    def target() -> None:
        failed = True
        try:
            with suppress(BlockFailed):
                self._f(*args)
            failed = False
        finally:
            self.barrier.leave(failed)

    block = [kernel.BlockThread(target, self, grid_point, p, self._debug) for p in points]
    for thread in block:
        thread.start()
    for thread in block:
        thread.join()
    for thread in block:
        if thread.exception:
            raise thread.exception[0].with_traceback(thread.exception[1])


@contextmanager
def repaired_simulator() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernelapi.FakeCUDAShared, "array", shared_array)
        patch.setattr(kernel.BlockManager, "run", run_block)
        patch.setattr(kernel.BlockThread, "syncthreads", lambda self: self._manager.barrier.wait())
        yield
