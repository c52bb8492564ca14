"""Memory that ends at a page nobody may touch: reading or writing past an array is a fault."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

PAGE = mmap.PAGESIZE
ALIGNMENT = 16  # a float4; what lies between an array's end and the next multiple is not guarded
POISON = np.uint32(0x7FFFFFFF)  # a NaN as float32

_starts: list[int] = []
_ends: dict[int, int] = {}


def _allocate(size: int) -> tuple[Any, int]:
    """``size`` poisoned bytes before a guard page: the owning ctypes array and its address."""
    padded = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
    pages = -(-padded // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, pages + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"no {size} bytes of guarded memory")
    for guard in (base, base + PAGE + pages):
        _libc.mprotect(guard, PAGE, 0)
    address = base + PAGE + pages - padded
    memory = (ctypes.c_ubyte * padded).from_address(address)
    bisect.insort(_starts, address)
    _ends[address] = address + padded
    weakref.finalize(memory, _free, base, pages + 2 * PAGE, address)
    return memory, address


def _free(base: int, size: int, address: int) -> None:
    del _starts[bisect.bisect_left(_starts, address)]
    del _ends[address]
    _libc.munmap(base, size)


def is_guarded(address: int) -> bool:
    """Does the address lie in an array of :func:`guarded_empty`?"""
    index = bisect.bisect_right(_starts, address) - 1
    return index >= 0 and address < _ends[_starts[index]]


def guarded_empty(shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Like ``numpy.empty``, full of NaN and with a guard page behind it."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    memory, _ = _allocate(count * kind.itemsize)
    np.frombuffer(memory, np.uint32)[:] = POISON
    return np.frombuffer(memory, kind, count).reshape(shape)


class Allocations:
    """The memory under some arrays, every stretch once, so that views of one array stay that."""

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        self.spans: list[tuple[int, int]] = []
        for low, high in sorted(_span(a) for a in arrays):
            if self.spans and low < self.spans[-1][1]:
                self.spans[-1] = self.spans[-1][0], max(high, self.spans[-1][1])
            elif (low, high) not in self.spans[-1:]:
                self.spans.append((low, high))

    def place(self, array: NDArray[Any]) -> tuple[int, int]:
        """The number of the stretch that holds an array, and the array's offset in it."""
        low, _ = _span(array)
        number = bisect.bisect_right(self.spans, low, key=lambda span: span[0]) - 1
        return number, _address(array) - self.spans[number][0]

    def bytes(self, number: int) -> NDArray[np.uint8]:
        """A stretch as bytes; writing them writes the arrays."""
        low, high = self.spans[number]
        memory: Any = (ctypes.c_ubyte * (high - low)).from_address(low)
        return np.frombuffer(memory, np.uint8)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _span(array: NDArray[Any]) -> tuple[int, int]:
    """First byte and end of the allocation of which an array is a view."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    low = high = _address(owner)
    if owner.size:
        for extent, stride in zip(owner.shape, owner.strides, strict=True):
            low += min(0, (extent - 1) * stride)
            high += max(0, (extent - 1) * stride)
        high += owner.itemsize
    return low, high


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A guarded copy of an array."""
    copy = guarded_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
