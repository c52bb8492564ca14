"""Launches ``kernels/gather.cu`` and ``kernels/gather_backward.cu``.

A training run makes all its batches first (:func:`window`) and may sort them all first
(:func:`sort`); each step then reads row ``cursor[0]`` of what they made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn.cuda.device import Array, Device, Kernel, Scratch, aligned, ceil_div, real

WINDOW_THREADS, WINDOW_RUN = 128, 4
GATHER_THREADS, GATHER_BLOCKS = 256, 4
SORT_THREADS, SORT_ROWS, DIGIT_BITS, DIGITS = 256, 4096, 8, 256
BOUNDS_A_BLOCK = 2048
"""Bounds that a block of ``sort_kernel`` searches before another is worth its sort."""
MIN_TILE, MAX_TILES = 2048, 256
SCATTER_THREADS, SCATTER_BLOCKS, ZERO_TOKENS = 128, 5, 8
FOLD_THREADS, FOLD_BLOCKS, FOLD_COLUMNS = 512, 2, 32
FOLD_GROUPS = FOLD_THREADS // FOLD_COLUMNS


def window(device: Device, tokens: Array, starts: Array, x: Array, y: Array) -> None:
    """``x[n,t,b] = tokens[starts[n,b] + t]`` and ``y`` one to the right, for all steps at once.

    Args:
        tokens: int32 ``[N]``. starts: int32 ``[n, B]`` (or ``[B]``). x, y: int32 ``[n, T, B]`` (or
            ``[T, B]``), out.
    """
    B = starts.shape[-1]
    steps, T = starts.size // B, x.shape[-2]
    blocks = ceil_div(ceil_div(T, WINDOW_RUN) * B, WINDOW_THREADS)
    device.launch(
        _window_kernel(),
        steps * blocks,
        (tokens, starts, x, y, np.int32(T), np.int32(B), np.int32(blocks)),
    )


def gather(
    device: Device, W_xh: Array, x: Array, b_h: Array, z: Array, cursor: Array | None = None
) -> None:
    """``z[t,b,:] = W_xh[x[t,b],:] + b_h``.

    Args:
        W_xh: ``[V, H]``. x: int32 ``[T, B]``. b_h: ``[H]``. z: ``[T, B, H]``, out.
        cursor: int32 ``[1]``; with it ``x`` is ``[n, T, B]``, of which row ``cursor[0]`` is due.
    """
    H = W_xh.shape[1]
    rows = z.size // H
    wide = _wide(H, W_xh, b_h, z)
    columns = _Columns.of(H, W_xh.dtype, wide, GATHER_THREADS)
    wave = ceil_div(device.arch.multiprocessors * GATHER_BLOCKS, columns.tiles)
    device.launch(
        _gather_kernel(W_xh.dtype, wide),
        (min(ceil_div(rows, columns.groups), wave), columns.tiles),
        (W_xh, x, cursor, b_h, z, np.int32(rows), np.int32(H), np.int32(columns.log2)),
    )


def gather_backward(
    device: Device, dz: Array, x: Array, dW_xh: Array, db_h: Array, scratch: Scratch
) -> None:
    """``dW_xh[v,:] = Σ dz[t,b,:]`` over ``x[t,b] = v``, and ``db_h = Σ dz``; the same bits always.

    Args:
        dz: ``[T, B, H]``. x: int32 ``[T, B]``. dW_xh: ``[V, H]``, out. db_h: ``[H]``, out.
    """
    V, rows = dW_xh.shape[0], x.size
    order = scratch("gather_backward order", 2 * rows, np.int32)
    bounds = scratch("gather_backward bounds", V + 1, np.int32)
    sort(device, x.reshape(1, rows), V, order, bounds, scratch)
    scatter_add(device, dz, order, bounds, dW_xh, db_h, scratch)


def sort(
    device: Device,
    x: Array,
    V: int,
    order: Array,
    bounds: Array,
    scratch: Scratch,
    cursor: Array | None = None,
) -> None:
    """Sort the rows ``t*B + b`` of batches by their token, stably.

    Depends on the tokens only, so it can run beside a step, or for all steps before the first.

    Args:
        x: int32 ``[n, T*B]`` (or ``[n, T, B]``). V: vocabulary size.
        order: int32 ``[n, T*B, 2]``, out: (row, token), by token and then by row.
        bounds: int32 ``[n, V+1]``, out: token ``v`` is at ``order[bounds[v] : bounds[v+1]]``.
        cursor: int32 ``[1]``; with it only row ``cursor[0]`` of ``x`` is sorted, and ``order`` and
            ``bounds`` have one row.
    """
    steps = 1 if cursor is not None else x.shape[0]
    rows = x.size // x.shape[0]
    passes = max(1, ceil_div((V - 1).bit_length(), DIGIT_BITS))
    if rows <= SORT_ROWS:
        parts = ceil_div(V + 1, BOUNDS_A_BLOCK)
        device.launch(
            _sort_kernel("sort_kernel"),
            steps * parts,
            (x, cursor, order, bounds, np.int32(rows), *map(np.int32, (V, passes, parts))),
        )
        return
    tile = max(MIN_TILE, ceil_div(ceil_div(rows, MAX_TILES), SORT_THREADS) * SORT_THREADS)
    tiles = ceil_div(rows, tile)
    counts = scratch("sort counts", steps * tiles * DIGITS, np.int32)
    other = scratch("sort order", 2 * steps * rows, np.int32) if passes > 1 else order
    source = None
    for index in range(passes):
        target = order if (passes - index) % 2 else other  # the last pass ends in `order`
        sizes = tuple(map(np.int32, (rows, tile, tiles, index * DIGIT_BITS)))
        device.launch(
            _sort_kernel("sort_count_kernel"), steps * tiles, (x, cursor, source, counts, *sizes)
        )
        device.launch(
            _sort_kernel("sort_place_kernel"),
            steps * tiles,
            (x, cursor, source, target, counts, *sizes),
        )
        source = target
    blocks = ceil_div(V + 1, SORT_THREADS)
    device.launch(
        _sort_kernel("bounds_kernel"),
        steps * blocks,
        (order, bounds, np.int32(rows), np.int32(V), np.int32(blocks)),
    )


def scatter_add(
    device: Device,
    dz: Array,
    order: Array,
    bounds: Array,
    dW_xh: Array,
    db_h: Array,
    scratch: Scratch,
    cursor: Array | None = None,
) -> None:
    """The sums of :func:`gather_backward` from the result of :func:`sort`.

    Args:
        dz: ``[T, B, H]``. dW_xh: ``[V, H]``, out. db_h: ``[H]``, out.
        order, bounds: of one step; with ``cursor``, of n steps, of which ``cursor[0]`` is due.
    """
    V, H = dW_xh.shape
    rows, dtype = dz.size // H, dz.dtype
    log2_chunk = chunk_bits(rows)
    chunks = ceil_div(rows, 1 << log2_chunk)
    head, tail, total = (
        scratch(f"scatter_add {name}", chunks * H, dtype) for name in ("head", "tail", "total")
    )
    cut = scratch("scatter_add cut", chunks, np.int32)
    wide = _wide(H, dz, dW_xh, db_h, head, tail, total)

    columns = _Columns.of(H, dtype, wide, SCATTER_THREADS)
    chunk_blocks = ceil_div(chunks, columns.groups)
    zero_blocks = ceil_div(ceil_div(V, ZERO_TOKENS), columns.groups)
    sizes = (rows, V, H, log2_chunk, columns.log2, chunk_blocks)
    device.launch(
        _scatter_add_kernel(dtype, wide),
        (chunk_blocks + zero_blocks, columns.tiles),
        (dz, order, bounds, cursor, dW_xh, head, tail, total, cut, *map(np.int32, sizes)),
    )
    device.launch(
        _fold_kernel(dtype, wide),
        (1 + ceil_div(chunks, FOLD_GROUPS), ceil_div(H, FOLD_COLUMNS * _width(dtype, wide))),
        (
            *(head, tail, total, cut, bounds, cursor, dW_xh, db_h),
            *map(np.int32, (chunks, V, H, log2_chunk)),
        ),
    )


def chunk_bits(rows: int) -> int:
    """Log2 of the rows that one group of threads adds up.

    Eight are in flight at once, and that is a chunk where latency counts; where bandwidth does,
    more rows mean fewer partial sums. Depends on nothing else: the bits of the result do.
    """
    return 3 if rows <= 8192 else 6


def variants() -> list[Kernel]:
    """Every kernel that may be launched."""
    sorts = ("sort_kernel", "sort_count_kernel", "sort_place_kernel", "bounds_kernel")
    return [
        _window_kernel(),
        *map(_sort_kernel, sorts),
        *(
            kernel(dtype, wide)
            for kernel in (_gather_kernel, _scatter_add_kernel, _fold_kernel)
            for dtype in (np.float32, np.float64)
            for wide in (True, False)
        ),
    ]


@dataclass(frozen=True)
class _Columns:
    """How a block's threads divide a row of H values.

    Attributes:
        log2: of the threads side by side along a row. groups: rows that a block has in hand.
        tiles: blocks along a row.
    """

    log2: int
    groups: int
    tiles: int

    @staticmethod
    def of(H: int, dtype: Any, wide: bool, threads: int) -> _Columns:
        accesses = ceil_div(H, _width(dtype, wide))
        columns = min(threads, 1 << (accesses - 1).bit_length())
        return _Columns(columns.bit_length() - 1, threads // columns, ceil_div(accesses, columns))


def _wide(H: int, *arrays: Array) -> bool:
    """Can every row of H values of these arrays be read 16 bytes at a time?"""
    return H * arrays[0].dtype.itemsize % 16 == 0 and all(aligned(a, 16) for a in arrays)


def _width(dtype: Any, wide: bool) -> int:
    """Values of one access."""
    return 16 // np.dtype(dtype).itemsize if wide else 1


def _defines(dtype: Any, wide: bool) -> tuple[tuple[str, int | str], ...]:
    return ("REAL", real(dtype)), ("WIDTH", _width(dtype, wide))


def _vector_opcodes(wide: bool) -> tuple[str, ...]:
    return ("LDG\\.E[.\\w]*\\.128", "STG\\.E[.\\w]*\\.128") if wide else ()


def _window_kernel() -> Kernel:
    return Kernel("gather", "window_kernel", WINDOW_THREADS, _defines(np.float32, True))


def _gather_kernel(dtype: Any, wide: bool) -> Kernel:
    return Kernel(
        *("gather", "gather_kernel", GATHER_THREADS, _defines(dtype, wide)),
        blocks=GATHER_BLOCKS,
        opcodes=_vector_opcodes(wide),
    )


def _sort_kernel(name: str) -> Kernel:
    """Integers only: the module of the commonest floats serves."""
    return Kernel("gather_backward", name, SORT_THREADS, _defines(np.float32, True))


def _scatter_add_kernel(dtype: Any, wide: bool) -> Kernel:
    return Kernel(
        *("gather_backward", "scatter_add_kernel", SCATTER_THREADS, _defines(dtype, wide)),
        blocks=SCATTER_BLOCKS,
        opcodes=_vector_opcodes(wide),
    )


def _fold_kernel(dtype: Any, wide: bool) -> Kernel:
    return Kernel(
        *("gather_backward", "fold_kernel", FOLD_THREADS, _defines(dtype, wide)),
        blocks=FOLD_BLOCKS,
    )
