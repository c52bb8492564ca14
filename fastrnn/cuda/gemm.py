"""Matrix products: which kernel of ``kernels/gemm.cu``, on how many blocks, and who does what.

``C = epilogue(op(A) op(B))`` in float32 accuracy: by 3xTF32 on the tensor cores of GPUs made for
it, elsewhere and in float64 by fused multiply-adds. A product is cut into tiles of ``C``; where
their number does not fill the device evenly, the depth of the tiles left over is dealt out in
equal shares, and the last block to finish its part of a tile adds up all parts in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn.cuda import tuned
from fastrnn.cuda.device import Arch, Array, Device, Kernel, Scratch, aligned, ceil_div, real

PLAIN, BIAS, TANH, TANH_BACKWARD = range(4)
"""Epilogues: ``acc``, ``acc + x[n]``, ``tanh(x + acc)``, ``(x + acc) (1 - y²)``; as in gemm.cu."""

VECTOR_BYTES = 16

# What the choice of a plan rests on, in clocks of a multiprocessor. Ratios matter, not the values.
MMA_CLOCKS = 6.5 / 4
"""For an m16n8k8 in TF32, of which a multiprocessor's tensor cores do four at a time: the 300
TFLOP/s that mma.sync reaches on the 132 multiprocessors of an H200."""
L2_BYTES = 25
"""Bytes a clock that L2 gives each multiprocessor when all ask."""
TILE_CLOCKS = 1500
"""To fill the pipeline at a tile's start, and to store the tile."""
SPLIT_CLOCKS, SPLIT_BYTES = 2000, 40
"""To hand over a part of a tile; bytes a clock at which one block adds up the parts."""


@dataclass(frozen=True)
class Tile:
    """How a block does a product.

    Attributes:
        m, n: the tile of C.
        k: the depth of the operands in shared memory.
        stages: tiles of operands there.
        blocks: that a multiprocessor holds.
        warps: for tensor cores, warps along m, n and k; each warp's part is 32 or 64 by 32.
        thread: for fused multiply-adds, outputs of a thread along m and n.
    """

    m: int
    n: int
    k: int
    stages: int
    blocks: int
    warps: tuple[int, int, int] | None = None
    thread: tuple[int, int] | None = None

    @property
    def threads(self) -> int:
        if self.warps:
            return 32 * self.warps[0] * self.warps[1] * self.warps[2]
        assert self.thread
        return self.m // self.thread[0] * self.n // self.thread[1]

    def unit_clocks(self, itemsize: int) -> float:
        """Of a multiprocessor with work enough, for one tile of operands."""
        if self.warps:
            compute = self.m // 16 * (self.n // 8) * (self.k // 8) * 3 * MMA_CLOCKS
        else:
            compute = self.m * self.n * self.k / 128 * (itemsize / 4)
        return max(compute, (self.m + self.n) * self.k * itemsize / L2_BYTES)

    def efficiency(self, resident: int) -> float:
        """The share of those clocks' work that so many blocks get done.

        What hides latencies are independent sums: 32 a thread and 10 warps are enough.
        """
        return min(0.95, 0.45 + 0.05 * resident * self.m * self.n / 1024)


TENSOR_TILES = (
    Tile(128, 128, 16, stages=4, blocks=1, warps=(2, 4, 1)),
    Tile(64, 64, 32, stages=3, blocks=3, warps=(2, 2, 1)),
    Tile(32, 64, 32, stages=4, blocks=3, warps=(1, 2, 2)),
)
FLOAT_TILES = (
    Tile(128, 128, 16, stages=3, blocks=2, thread=(8, 8)),
    Tile(64, 64, 16, stages=3, blocks=3, thread=(8, 4)),
)
DOUBLE_TILES = (Tile(64, 64, 16, stages=3, blocks=2, thread=(8, 4)),)

BLOCKS = max(tile.blocks for tile in (*TENSOR_TILES, *FLOAT_TILES, *DOUBLE_TILES))


@dataclass(frozen=True)
class Plan:
    """How a product is done.

    Attributes:
        tile: by which kernel.
        grid: blocks.
        tiles: of C.
        whole: tiles that one block does alone. The depth of the others, in units of one tile of
            operands, is dealt out: ``quota`` units to each block, one more to the first ``extra``.
        clocks: the estimate that it was chosen by.
    """

    tile: Tile
    grid: int
    tiles: int
    whole: int
    quota: int
    extra: int
    clocks: float


def has_tensor_cores(capability: int) -> bool:
    """Whether 3xTF32 beats fused multiply-adds.

    A third of the TF32 rate is more than the float32 rate on sm_80, sm_90 and sm_100; on the
    others it is less, or there is no TF32.
    """
    return capability in (80, 90) or 100 <= capability < 110


def tiles(capability: int, dtype: Any) -> tuple[Tile, ...]:
    """The tiles to choose from."""
    if np.dtype(dtype) == np.float64:
        return DOUBLE_TILES
    if has_tensor_cores(capability):
        return TENSOR_TILES
    # Before sm_80 a block has no room for the large tile's sums.
    return FLOAT_TILES if capability >= 80 else FLOAT_TILES[1:]


@functools.cache
def kernel(tile: Tile, dtype: Any, trans_a: bool, trans_b: bool, vector: int) -> Kernel:
    """The kernel for a tile; ``vector`` elements are copied to shared memory at a time."""
    size = np.dtype(dtype).itemsize
    wide = VECTOR_BYTES // size
    # Rows in shared memory begin at multiples of 16 bytes, neighbouring ones in other banks. Where
    # a fragment takes four of them at once, as of tensor-core operands across k, they are a
    # quarter of the banks apart.
    ld_a, ld_b, ld_c = tile.m + wide, tile.n + wide, tile.n + wide
    rows_a, rows_b = tile.k, tile.k
    if tile.warps:
        ld_a = tile.m + 8 if trans_a else tile.k + wide
        ld_b = tile.k + wide if trans_b else tile.n + 8
        rows_a, rows_b = (tile.k if trans_a else tile.m), (tile.n if trans_b else tile.k)
        # Sums are stored as vectors of four columns, or of two where B lies along k.
        ld_c = tile.n + (8 if trans_b else 4)
    elif trans_b:
        vector = 1  # both operands are turned, element by element
    defines: dict[str, int | str] = {
        "REAL": real(dtype),
        "TENSOR_CORES": int(tile.warps is not None),
        "TRANS_A": int(trans_a),
        "TRANS_B": int(trans_b),
        "VECTOR": vector,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": tile.k,
        "STAGES": tile.stages,
        "LD_A": ld_a,
        "LD_B": ld_b,
        "LD_C": ld_c,
        "THREADS": tile.threads,
        "BLOCKS": tile.blocks,
    }
    if tile.warps:
        defines |= dict(zip(("WARPS_M", "WARPS_N", "WARPS_K"), tile.warps, strict=True))
    elif tile.thread:
        defines |= dict(zip(("THREAD_M", "THREAD_N"), tile.thread, strict=True))
    copies = tile.warps[2] if tile.warps else 1
    elements = max(tile.stages * (rows_a * ld_a + rows_b * ld_b), copies * tile.m * ld_c)
    opcodes: tuple[str, ...] = ("DFMA",) if size == 8 else ("FFMA",)
    if tile.warps:
        opcodes = ("HMMA", "LDGSTS")
    without: tuple[int, ...] = ()
    if size == 4:
        without = (86, 89, 120) if tile.warps else (80, 90, 100)
    return Kernel(
        "gemm",
        "gemm_kernel",
        tile.threads,
        tuple(defines.items()),
        shared_bytes=elements * size,
        blocks=tile.blocks,
        min_capability=75 if tile.m < 128 and not tile.warps else 80,
        without=without,
        opcodes=opcodes,
    )


def variants() -> list[Kernel]:
    """Every kernel that :func:`gemm` can launch."""
    found = [
        kernel(tile, dtype, trans_a, trans_b, vector)
        for dtype, choice in (
            ("float32", TENSOR_TILES),
            ("float32", FLOAT_TILES),
            ("float64", DOUBLE_TILES),
        )
        for tile in choice
        for trans_a, trans_b in ((False, False), (False, True), (True, False))
        for vector in (VECTOR_BYTES // np.dtype(dtype).itemsize, 1)
    ]
    return list(dict.fromkeys(found))


def plans(
    tile: Tile, M: int, N: int, K: int, itemsize: int, multiprocessors: int
) -> Iterator[Plan]:
    """The ways to do a product with this tile on so many multiprocessors."""
    count, depth = ceil_div(M, tile.m) * ceil_div(N, tile.n), max(1, ceil_div(K, tile.k))
    unit = tile.unit_clocks(itemsize)

    def clocks(resident: int, units: float) -> float:
        return resident * units * unit / tile.efficiency(min(resident, tile.blocks))

    # Every tile to a block of its own, as many to a multiprocessor as it takes.
    alone = ceil_div(count, multiprocessors)
    waves = ceil_div(alone, tile.blocks)
    yield Plan(tile, count, count, count, 0, 0, clocks(alone, depth) + waves * TILE_CLOCKS)
    # Or as many blocks as are resident at once, or as cut every tile into equal parts; what does
    # not make another round of whole tiles is dealt out.
    slots = tile.blocks * multiprocessors
    even = {count * parts for parts in range(2, depth + 1) if count * parts <= slots}
    for grid in sorted({multiprocessors * b for b in range(1, tile.blocks + 1)} | even):
        rounds, rest = divmod(count, grid)
        if rest == 0 or rest * depth < grid:
            continue
        quota, extra = divmod(rest * depth, grid)
        parts = ceil_div(depth, quota) + (1 if depth % quota or extra else 0)
        total = clocks(ceil_div(grid, multiprocessors), rounds * depth + quota + (extra > 0))
        total += TILE_CLOCKS * (rounds + 1) + SPLIT_CLOCKS
        total += parts * tile.m * tile.n * itemsize / SPLIT_BYTES
        yield Plan(tile, grid, count, rounds * grid, quota, extra, total)


@functools.lru_cache(maxsize=1024)
def plan(
    M: int,
    N: int,
    K: int,
    dtype: Any,
    capability: int,
    multiprocessors: int,
    *,
    device_name: str | None = None,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Plan:
    """The way of fewest estimated clocks, the first of equals; or the one that was measured.

    Args:
        device_name: whose entries of :mod:`fastrnn.cuda.tuned` come before the estimate; None: the
            estimate alone.
        trans_a, trans_b: by which the table tells products apart; the estimate is the same.
    """
    size = np.dtype(dtype).itemsize
    choice = tiles(capability, dtype)
    ways = [p for tile in choice for p in plans(tile, M, N, K, size, multiprocessors)]
    if device_name is not None:
        table = tuned.table()
        measured = table.product(device_name, multiprocessors, M, N, K, dtype, trans_a, trans_b)
        # A tile that is gone, or another geometry: the entry is of no use.
        found = (p for p in ways if measured == (tuned.tile_fields(p.tile), p.grid))
        if fastest := next(found, None):
            return fastest
    return min(ways, key=lambda p: p.clocks)


def counters_needed(arch: Arch) -> int:
    """Counters that any product on this device gets by with."""
    return BLOCKS * arch.multiprocessors


def new_counters(device: Device) -> Array:
    """Counters for the products of one branch: zero, and zero again after every product."""
    return device.put(np.zeros(counters_needed(device.arch), np.uint32))


def gemm(
    device: Device,
    A: Array,
    B: Array,
    C: Array,
    M: int,
    N: int,
    K: int,
    *,
    lda: int,
    ldb: int,
    ldc: int,
    trans_a: bool = False,
    trans_b: bool = False,
    epilogue: int = PLAIN,
    x: Array | None = None,
    y: Array | None = None,
    head: Array | None = None,
    lead: int = 0,
    scratch: Scratch,
    counters: Array | None = None,
    name: str = "gemm",
    multiprocessors: int | None = None,
    chosen: Plan | None = None,
) -> None:
    """``C = epilogue(op(A) op(B))``: ``op(A) [M, K]``, ``op(B) [K, N]``, ``C [M, N]``.

    Args:
        A, B, C: float32 or float64. In memory ``A`` is ``[M, K]``, or ``[K, M]`` where
            ``trans_a``; ``B`` is ``[K, N]``, or ``[N, K]`` where ``trans_b``; not both transposed.
        lda, ldb, ldc: elements from one row in memory to the next. Rows that begin at multiples of
            16 bytes are copied fastest. What lies between them is not read for its value.
        epilogue: :data:`PLAIN`, :data:`BIAS`, :data:`TANH` or :data:`TANH_BACKWARD`, with
        x, y: ``x [N]`` for ``BIAS``; otherwise laid out as ``C``, and each may be ``C``.
        head, lead: the first ``lead`` rows in memory of a transposed ``A``; ``A`` begins after
            them. Both have ``lda``.
        scratch: for the parts of tiles that several blocks share.
        counters: of :func:`new_counters`. Products that may run at the same time must not share
            them. None: taken from ``scratch`` and cleared before the launch.
        name: of the scratch buffers; products that may run at the same time must not share it.
        multiprocessors: for how many to plan; None: all of the device.
        chosen: a plan of :func:`plans`; None: the one of :func:`plan`, measured or expected to be
            fastest.
    """
    if trans_a and trans_b:
        raise ValueError("gemm: A and B cannot both be transposed")
    dtype = np.dtype(C.dtype)
    if chosen is None:
        count = min(multiprocessors or device.arch.multiprocessors, device.arch.multiprocessors)
        chosen = plan(
            M, N, K, dtype, device.arch.capability, count,
            device_name=device.arch.name, trans_a=trans_a, trans_b=trans_b,
        )  # fmt: skip
    operands = [(A, lda), (B, ldb)] if head is None else [(A, lda), (B, ldb), (head, lda)]
    vector = VECTOR_BYTES // dtype.itemsize if _vectors(operands, dtype.itemsize) else 1
    partial = None
    if chosen.whole < chosen.tiles:
        size = 2 * chosen.grid * chosen.tile.m * chosen.tile.n
        partial = scratch(f"{name} parts", size, dtype)
        if counters is None:
            counters = scratch(f"{name} counters", chosen.tiles - chosen.whole, np.uint32)
            device.fill_zero(counters)
    device.launch(
        kernel(chosen.tile, dtype, trans_a, trans_b, vector),
        chosen.grid,
        (
            A,
            head,
            B,
            C,
            x,
            y,
            partial,
            None if partial is None else counters,
            *map(np.int32, (M, N, K, lda, ldb, ldc, lead, epilogue)),
            np.int32(_vectors([(C, ldc)], dtype.itemsize)),
            *map(np.uint32, (chosen.tiles, chosen.whole, chosen.quota, chosen.extra)),
        ),
    )


def _vectors(arrays: list[tuple[Array, int]], itemsize: int) -> bool:
    """Whether every row of every array begins at a multiple of 16 bytes."""
    return all(
        ld * itemsize % VECTOR_BYTES == 0 and aligned(array, VECTOR_BYTES) for array, ld in arrays
    )
