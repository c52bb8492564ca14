"""Launches ``kernels/clip_sgd.cu``: the global norm, clipping, the step, its record.

Lists of arrays travel in the parameters of a kernel, 64 at a time, so that many small arrays are
not many launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.cuda.device import Array, Device, Kernel, Scratch, address, ceil_div, real

THREADS, BLOCKS, SGD_BLOCKS, CHUNK_BYTES, MAX_ARRAYS = 256, 3, 2, 16384, 64

ARRAYS = np.dtype(
    [
        ("data", np.uint64, MAX_ARRAYS),
        ("size", np.int64, MAX_ARRAYS),
        ("first", np.int32, MAX_ARRAYS + 1),
        ("count", np.int32),
    ],
    align=True,
)
"""``struct Arrays`` of the kernels, passed by value as an array of shape ``()``."""


def clip_sgd(
    device: Device,
    params: Sequence[Array],
    grads: Sequence[Array],
    rates: Array,
    norm: Array,
    scratch: Scratch,
    *,
    losses: Array | None = None,
    loss: Array | None = None,
    totals: Array | None = None,
    cursor: Array | None = None,
) -> None:
    """Clip by the global norm, step, and record the step, in two launches.

    ``grads`` keep their values; the clipping is in the step, ``p -= lr * (scale * g)``.

    Args:
        params, grads: arrays in pairs; in a training step one flat buffer each.
        rates: float64 ``[2]``: the learning rate and the largest norm.
        norm: shape ``()``, out: before clipping.
        losses: ``[T*B]``; their mean goes to ``loss``, shape ``()``, if given.
        totals: float64 ``[4]``: ``loss``, norm, 1 and whether one is not finite are added to it.
        cursor: int32 ``[1]``, with ``totals``: one is added to it.
    """
    partials = _squares(device, grads, scratch, losses, loss)
    _sgd(device, params, grads, rates, partials, (norm, loss, totals, cursor))


def clip_by_global_norm(
    device: Device, grads: Sequence[Array], max_norm: float | Array, norm: Array, scratch: Scratch
) -> None:
    """Scale ``grads`` in place by ``min(1, max_norm / norm)``; a NaN norm leaves them alone.

    Args:
        max_norm: a number, or float64 ``[2]`` on the device, whose second value is meant.
        norm: shape ``()``, out: before clipping.
    """
    partials = _squares(device, grads, scratch)
    rates, limit = _rate(max_norm)
    for table in _tables([grads]):
        device.launch(
            _kernel("scale_kernel", norm.dtype),
            _grid(device, table.chunks),
            (*table.arrays, partials, np.int32(partials.size), rates, limit, norm),
        )


def sgd(device: Device, params: Sequence[Array], grads: Sequence[Array], lr: float | Array) -> None:
    """``p -= lr * g`` in place.

    Args:
        lr: a number, or float64 ``[2]`` on the device, whose first value is meant.
    """
    _sgd(device, params, grads, lr)


def record(
    device: Device, loss: Array, norm: Array, totals: Array, cursor: Array | None = None
) -> None:
    """Add one step to ``totals`` and to ``cursor``; see :func:`clip_sgd`."""
    kernel = Kernel("clip_sgd", "record_kernel", 32, _defines(norm.dtype))
    device.launch(kernel, 1, (loss, norm, totals, cursor))


def variants() -> list[Kernel]:
    """Every kernel that may be launched."""
    return [
        kernel
        for dtype in (np.float32, np.float64)
        for kernel in (
            _kernel("squares_kernel", dtype),
            _kernel("scale_kernel", dtype),
            _kernel("sgd_kernel", dtype, SGD_BLOCKS),
            Kernel("clip_sgd", "record_kernel", 32, _defines(dtype)),
        )
    ]


def _squares(
    device: Device,
    grads: Sequence[Array],
    scratch: Scratch,
    losses: Array | None = None,
    loss: Array | None = None,
) -> Array:
    """Sums of squares, float64, which together are the square of the norm."""
    turns = 1 if sum(array.size for array in grads) <= 1 << 22 else 8
    tables = list(_tables([grads], turns))
    partials = scratch("clip_sgd partials", sum(t.chunks for t in tables), np.float64)
    rows = np.int32(0 if losses is None else losses.size)
    done = 0
    for table in tables:
        device.launch(
            _kernel("squares_kernel", grads[0].dtype),
            _grid(device, table.chunks) + (losses is not None),
            (*table.arrays, np.int32(turns), partials, np.int32(done), losses, rows, loss),
        )
        losses = None  # taken
        done += table.chunks
    return partials


def _sgd(
    device: Device,
    params: Sequence[Array],
    grads: Sequence[Array],
    lr: float | Array,
    partials: Array | None = None,
    outputs: tuple[Array | None, ...] = (None, None, None, None),
) -> None:
    """The step, clipped where there are sums of squares; the last launch writes the outputs."""
    rates, rate = _rate(lr)
    parts = np.int32(0 if partials is None else partials.size)
    tables = list(_tables([params, grads]))
    for table in tables:
        device.launch(
            _kernel("sgd_kernel", params[0].dtype, SGD_BLOCKS),
            _grid(device, table.chunks, SGD_BLOCKS),
            (
                *(*table.arrays, partials, parts, rates, rate),
                *(outputs if table is tables[-1] else (None,) * len(outputs)),
            ),
        )


@dataclass(frozen=True)
class _Table:
    """At most MAX_ARRAYS arrays of each list, as the kernels take them, and their chunks."""

    arrays: tuple[NDArray[Any], ...]
    chunks: int


def _tables(lists: Sequence[Sequence[Array]], turns: int = 1) -> Iterator[_Table]:
    """The lists, whose arrays have the same sizes, in tables of one launch each.

    ``turns`` by 16 KB are a chunk. How a sum of squares is cut into chunks depends on the sizes of
    the arrays alone, because the bits of the norm do: few values in many chunks for latency, many
    values in larger ones, so that there are few sums to add up.
    """
    chunk = turns * CHUNK_BYTES // int(lists[0][0].dtype.itemsize)
    for begin in range(0, len(lists[0]), MAX_ARRAYS):
        parts = [arrays[begin : begin + MAX_ARRAYS] for arrays in lists]
        sizes = [array.size for array in parts[0]]
        first = np.cumsum([0, *(ceil_div(size, chunk) for size in sizes)])
        tables = []
        for part in parts:
            table = np.zeros((), ARRAYS)
            table["data"][: len(part)] = [address(array) for array in part]
            table["size"][: len(part)] = sizes
            table["first"][: len(first)] = first
            table["count"] = len(part)
            tables.append(table)
        yield _Table(tuple(tables), int(first[-1]))


def _grid(device: Device, chunks: int, blocks: int = BLOCKS) -> int:
    """One wave at most."""
    return max(1, min(chunks, device.arch.multiprocessors * blocks))


def _rate(value: float | Array) -> tuple[Array | None, np.float64]:
    """A rate as the kernels take it: on the device, or a number."""
    if isinstance(value, (int, float)):
        return None, np.float64(value)
    return value, np.float64(0)


def _kernel(name: str, dtype: Any, blocks: int = BLOCKS) -> Kernel:
    return Kernel("clip_sgd", name, THREADS, _defines(dtype), blocks=blocks)


def _defines(dtype: Any) -> tuple[tuple[str, int | str], ...]:
    return ("REAL", real(dtype)), ("WIDTH", 16 // np.dtype(dtype).itemsize)
