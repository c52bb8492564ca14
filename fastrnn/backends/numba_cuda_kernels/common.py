"""What the kernels share: sizes, compilation, types, and functions that they call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from fastrnn.backends.numba_cuda import maintained_cuda

cuda = maintained_cuda()
types = cuda.types

SIMULATED = bool(cuda.config.ENABLE_CUDASIM)


@dataclass(frozen=True)
class Geometry:
    """Block and tile sizes. Tests shrink them; the defaults are meant for real devices.

    Attributes:
        lanes, slices: the recurrence's block is ``lanes x slices`` threads; a thread owns the
            outputs of its lane and one of ``slices`` parts of the dot products.
        max_hidden: hidden sizes up to this run in the one-block-a-row recurrence.
        resident_bytes: of W_hh and sums that a thread may hold in registers: 232 words leave 23 of
            the 255 that a thread can have.
        shared_bytes: of shared memory that a block may take without asking; the recurrence keeps
            more of W_hh in it.
        tile_m, tile_n, tile_k: the block tile of a matrix product, and ``micro_m x micro_n`` the
            outputs of a thread.
        threads: of all other kernels; a power of two.
        columns: threads along a row in the kernels that sum over rows; the other
            ``threads / columns`` share the rows.
        partial_blocks: blocks of the sum of squares.
    """

    lanes: int = 64
    slices: int = 4
    max_hidden: int = 256
    resident_bytes: int = 880
    shared_bytes: int = 48 * 1024
    tile_m: int = 64
    tile_n: int = 64
    tile_k: int = 16
    micro_m: int = 8
    micro_n: int = 4
    threads: int = 256
    columns: int = 32
    partial_blocks: int = 264

    @property
    def recurrence_threads(self) -> int:
        return self.lanes * self.slices

    @property
    def gemm_threads(self) -> int:
        return (self.tile_m // self.micro_m) * (self.tile_n // self.micro_n)

    def outputs(self, H: int) -> int:
        """Outputs a thread owns in the one-block-a-row recurrence: the least power of two."""
        outputs = 1
        while outputs * self.lanes < H:
            outputs *= 2
        return outputs

    def fits(self, H: int) -> bool:
        """Whether the recurrence over ``H`` units runs one block a row."""
        return self.max_hidden >= H

    def padded(self, H: int) -> int:
        """``H`` rounded up to what the one-block-a-row recurrence works on."""
        return self.outputs(H) * self.lanes


@dataclass(frozen=True)
class Kernel:
    """A kernel before compilation.

    Attributes:
        name: as in messages and tables. function: the Python source of the kernel.
        signature: numba argument types. threads: of a block. blocks: that a multiprocessor must
            have room for; with ``threads`` it bounds the registers.
    """

    name: str
    function: Callable[..., None]
    signature: tuple[Any, ...]
    threads: int
    blocks: int = 1

    @functools.cached_property
    def dispatcher(self) -> Any:
        """Compiled when first asked for. Never from numba's disk cache: its key is the source
        file of the kernel alone, not of what the kernel was built with or calls."""
        if SIMULATED:
            return cuda.jit(self.function)
        bounds = (self.threads, self.blocks)
        options: dict[str, Any] = {"lto": False, "launch_bounds": bounds}
        return cuda.jit(types.void(*self.signature), **options)(self.function)


def real_of(dtype: Any) -> Any:
    return types.float64 if np.dtype(dtype) == np.float64 else types.float32


def vector_of(element: Any) -> Any:
    return types.Array(element, 1, "C")


I32 = types.int32
F64 = types.float64
U64 = types.uint64
INTS = vector_of(types.int32)
DOUBLES = vector_of(types.float64)

# Vector loads need an alignment that numba does not assume; the simulator takes none.
ALIGN = None if SIMULATED else 16

Function = TypeVar("Function", bound=Callable[..., Any])


def device(function: Function) -> Function:
    """A function that kernels call; the compiler inlines it."""
    return function if SIMULATED else cast(Function, cuda.jit(device=True)(function))


@functools.cache
def repeated(step: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A device function that calls ``step(k, ...)``, ``step(k + 1, ...)``, … ``count`` times.

    The compiler unrolls only short loops, and an array whose indices it does not know is in memory,
    not in registers: this unrolls loops of any length.
    """
    if count <= 1:
        return step
    half = count // 2
    first, second = repeated(step, half), repeated(step, count - half)

    @device
    def both(k: Any, *args: Any) -> None:
        first(k, *args)
        second(k + half, *args)

    return both


i32, u32, u64 = np.int32, np.uint32, np.uint64
UNROLL = 16  # loads on their way at once, where few threads read much


class _InKernel:
    """``cuda`` of the kernel that runs: the simulator swaps it in the kernel's own file only."""

    def __init__(self) -> None:
        self._simulator = importlib.import_module("numba.cuda.simulator.kernel")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator._get_kernel_context(), name)


in_kernel = _InKernel() if SIMULATED else cuda


@device
def block_sum(buffer: Any, tid: Any, value: Any) -> Any:
    """The sum of ``value`` over the block, in a fixed order, on every thread.

    ``buffer``: shared, one element a thread, their number a power of two. Ends on a barrier, so
    the buffer may be used again at once.
    """
    buffer[tid] = value
    in_kernel.syncthreads()
    half = in_kernel.blockDim.x >> 1
    while half > 0:
        if tid < half:
            buffer[tid] += buffer[tid + half]
        in_kernel.syncthreads()
        half >>= 1
    total = buffer[0]
    in_kernel.syncthreads()
    return total


@functools.cache
def copy_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``out = x``; a thread an element."""

    def copy(x: Any, out: Any) -> None:
        i = cuda.grid(1)
        if i < out.shape[0]:
            out[i] = x[i]

    vector = vector_of(real_of(dtype))
    return Kernel("copy", copy, (vector, vector), geometry.threads)
