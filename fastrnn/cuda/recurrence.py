"""Launchers of ``kernels/recurrence.cu`` and ``kernels/recurrence_cluster.cu``.

The fused recurrence: all time steps of a batch row in one kernel, with W_hh on chip from the first
to the last. Two plans, both true float32:

- a block a row, every GPU, H <= 256. Rows beyond what is resident at once are taken in turns by the
  same blocks, which load W_hh only once.
- a cluster of blocks a row (sm_90 and later), each with 64 columns of W_hh. For 128 < H <= 256,
  where a step is then shorter, if every row of the batch is resident at once, or as was measured
  (see :mod:`fastrnn.cuda.tuned`); for 256 < H <= 512, which one multiprocessor cannot hold, always.

Larger H and float64 are for the caller: a GEMM a step (see :func:`fits`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastrnn.cuda import tuned
from fastrnn.cuda.device import Array, Device, Kernel

OPS = ("recurrence", "recurrence_gathered", "recurrence_backward")

SIZES = {32: 16, 64: 8, 128: 2, 256: 1}
"""Hidden sizes that a block is compiled for, and the blocks that a multiprocessor has room for.

Other sizes are padded on chip."""

SHARED_UNITS = 6
"""Of W_hh at H = 256, so many 32nds are in shared memory; the rest is in registers."""

CLUSTERS = {256: 4, 512: 8}
"""Hidden sizes that a cluster is compiled for, and the blocks of a cluster."""

WAVES = 4
"""For H > 256: so many times the resident clusters are still faster than a GEMM a step."""


def fits(H: int, dtype: Any, device: Device | None = None, B: int = 1) -> bool:
    """Whether the launchers below take this hidden size: up to 256 in float32 on every device.

    Up to 512 where ``device`` is given, has clusters of 8 blocks, and ``B`` is moderate for it.
    """
    if np.dtype(dtype) != np.float32:
        return False
    if max(SIZES) >= H:
        return True
    if device is None or max(CLUSTERS) < H or device.arch.capability < 90:
        return False
    return WAVES * resident_clusters(device, OPS[0], H) >= B


def resident_clusters(device: Device, op: str, H: int) -> int:
    """Rows that ``op`` of :data:`OPS` works on at once by clusters; 0 without clusters."""
    return device.active_clusters(_cluster(op, H))


def variants() -> list[Kernel]:
    """Every kernel that can be launched from here."""
    block = [_block(op, size, 80) for op in OPS for size in SIZES]
    turing = [_block(op, 256, 75) for op in OPS]
    return block + turing + [_cluster(op, size) for op in OPS for size in CLUSTERS]


def recurrence(
    device: Device,
    z: Array,
    W_hh: Array,
    h0: Array,
    h: Array,
    *,
    clustered: bool | None = None,
) -> None:
    """``h_t = tanh(z_t + h_{t-1} W_hh)`` for all t.

    Args:
        z, h: float32 ``[T, B, H]``; may be one array.
        W_hh: ``[H, H]``.
        h0: ``[B, H]``; may be ``h[T-1]``.
        clustered: whether a cluster works on a row, or a block; None: the plan measured or expected
            to be faster.
    """
    T, B, H = h.shape
    _launch(device, "recurrence", T, B, H, [z, W_hh, h0, h], clustered)


def recurrence_gathered(
    device: Device,
    x: Array,
    cursor: Array | None,
    W_xh: Array,
    b_h: Array,
    W_hh: Array,
    h0: Array,
    h: Array,
) -> None:
    """:func:`recurrence` with ``z[t, b, :] = W_xh[x[t, b], :] + b_h``, which is nowhere stored.

    Args:
        x: int32, one or more batches of ``[T, B]`` tokens, one after the other.
        cursor: int32 ``[1]`` on the device, the number of the batch to take; None: the first.
        W_xh: float32 ``[V, H]``. b_h: ``[H]``.
        W_hh, h0, h: as in :func:`recurrence`.
    """
    T, B, H = h.shape
    _launch(device, "recurrence_gathered", T, B, H, [x, cursor, W_xh, b_h, W_hh, h0, h])


def recurrence_backward(
    device: Device,
    dh: Array,
    h: Array,
    W_hh: Array,
    dz: Array,
    dh0: Array,
    *,
    clustered: bool | None = None,
) -> None:
    """``dz_t = (dh_t + dz_{t+1} W_hhᵀ)(1 - h_t²)``, t from T-1 to 0; ``dh0 = dz_0 W_hhᵀ``.

    Args:
        dh, dz: float32 ``[T, B, H]``; may be one array.
        h: ``[T, B, H]``, what the forward pass gave.
        W_hh: ``[H, H]``.
        dh0: ``[B, H]``.
        clustered: as in :func:`recurrence`.
    """
    T, B, H = h.shape
    _launch(device, "recurrence_backward", T, B, H, [dh, h, W_hh, dz, dh0], clustered)


def _launch(
    device: Device,
    op: str,
    T: int,
    B: int,
    H: int,
    arrays: list[Array | None],
    clustered: bool | None = None,
) -> None:
    args = [*arrays, np.int32(T), np.int32(B), np.int32(H)]
    if clustered is None:
        clustered = by_cluster(device, op, B, H)
    if clustered:
        kernel = _cluster(op, H)
        device.launch(kernel, B * kernel.cluster, args)
        return
    kernel = _block(op, H, device.arch.capability)
    device.launch(kernel, min(B, kernel.blocks * device.arch.multiprocessors), args)


def by_cluster(device: Device, op: str, B: int, H: int, *, measured: bool = True) -> bool:
    """Whether a cluster works on a row, and not a block.

    Args:
        op: of :data:`OPS`.
        measured: whether an entry of :mod:`fastrnn.cuda.tuned` comes before the expectation, that
            clusters are faster where all rows are resident at once.
    """
    if H <= 128 or device.arch.capability < 90:
        return False
    if max(SIZES) < H:
        return True
    resident = resident_clusters(device, op, H)
    if measured and resident:
        arch, table = device.arch, tuned.table()
        # The gathered form differs in what a step begins with, not in what it takes.
        known = table.recurrence(
            arch.name, arch.multiprocessors, op.removesuffix("_gathered"), B, H
        )
        if known is not None:
            return known == "cluster"
    return resident >= B


@functools.cache
def _block(op: str, H: int, capability: int) -> Kernel:
    """A block a row."""
    size = min(s for s in SIZES if s >= H)
    units = SHARED_UNITS if size == 256 else 0
    resident = size * size // 32 * units * 4
    chunk = 16 * size * 4  # bytes of 16 rows of W_hh on their way in
    # Turing gives a block 64 KiB, and has no asynchronous copies that would use more.
    turing = size == 256 and capability < 80
    stages = 1 if turing else 2 if size < 128 else 3
    return Kernel(
        file="recurrence",
        name=f"{op}_kernel",
        threads=size,
        defines=(
            ("HIDDEN", size),
            ("SHARED_UNITS", units),
            ("STAGES", stages),
            ("BLOCKS", SIZES[size]),
        ),
        shared_bytes=resident + stages * chunk,
        blocks=SIZES[size],
        min_capability=75 if turing or size < 256 else 80,
        opcodes=("FFMA", "SHFL"),
    )


@functools.cache
def _cluster(op: str, H: int) -> Kernel:
    """A cluster a row, 64 columns a block, four of them for every ``size / 32`` threads."""
    size = min(s for s in CLUSTERS if s >= H)
    stages, blocks = 4, 512 // size
    return Kernel(
        file="recurrence_cluster",
        name=f"{op}_cluster_kernel",
        threads=size // 2,
        defines=(("HIDDEN", size), ("STAGES", stages), ("RESIDENT_BLOCKS", blocks)),
        shared_bytes=stages * (size // 8) * 64 * 4,
        cluster=CLUSTERS[size],
        blocks=blocks,
        min_capability=90,
        opcodes=("FFMA", "SHFL", "STAS"),
    )
