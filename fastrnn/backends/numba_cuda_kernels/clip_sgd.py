"""Norm, clipping, the step, and what is recorded of it."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fastrnn.backends.numba_cuda_kernels.common import (
    DOUBLES,
    F64,
    I32,
    INTS,
    Geometry,
    Kernel,
    block_sum,
    cuda,
    device,
    real_of,
    types,
    u32,
    vector_of,
)


@functools.cache
def set_rates_kernel(geometry: Geometry) -> Kernel:
    """``rates = (lr, max_norm)``: on the device, so that a replayed step reads what is due."""

    def set_rates(rates: Any, lr: Any, max_norm: Any) -> None:
        if cuda.grid(1) == 0:
            rates[0] = lr
            rates[1] = max_norm

    return Kernel("set_rates", set_rates, (DOUBLES, F64, F64), geometry.threads)


@functools.cache
def sum_squares_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``partial[first + block] = Σ g²`` over the block's share of ``g``."""
    THREADS, zero = geometry.threads, np.dtype(dtype).type(0)

    def sum_squares(g: Any, partial: Any, first: Any) -> None:
        sums = cuda.shared.array(THREADS, dtype=types.float64)
        tid = u32(cuda.threadIdx.x)
        total = zero
        for i in range(cuda.grid(1), g.shape[0], cuda.gridsize(1)):
            total += g[i] * g[i]
        block_total = block_sum(sums, tid, total)
        if tid == 0:
            partial[first + cuda.blockIdx.x] = block_total

    vector = vector_of(real_of(dtype))
    return Kernel("sum_squares", sum_squares, (vector, DOUBLES, I32), THREADS)


@device
def global_norm(partial: Any, sums: Any, tid: Any, threads: Any) -> Any:
    """``sqrt(Σ partial)`` in every thread of a block, in fixed order; ``sums`` is scratch."""
    total = 0.0
    for i in range(tid, partial.shape[0], threads):
        total += partial[i]
    return math.sqrt(block_sum(sums, tid, total))


@functools.cache
def norm_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``norm = sqrt(Σ partial)``, ``scale = min(1, max_norm / norm)``; one block, fixed order."""
    THREADS = geometry.threads

    def norm(partial: Any, rates: Any, out: Any, scale: Any) -> None:
        sums = cuda.shared.array(THREADS, dtype=types.float64)
        tid = u32(cuda.threadIdx.x)
        total = global_norm(partial, sums, tid, THREADS)
        if tid == 0:
            out[0] = total
            scale[0] = rates[1] / total if total > rates[1] else 1.0

    vector = vector_of(real_of(dtype))
    return Kernel("norm", norm, (DOUBLES, DOUBLES, vector, vector), THREADS)


@functools.cache
def scale_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``g *= scale`` where the norm was too large; a thread an element."""
    one = np.dtype(dtype).type(1)

    def scale(g: Any, factor: Any) -> None:
        i = cuda.grid(1)
        if i < g.shape[0] and factor[0] != one:
            g[i] *= factor[0]

    vector = vector_of(real_of(dtype))
    return Kernel("scale", scale, (vector, vector), geometry.threads)


@functools.cache
def sgd_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``p -= lr (scale g)``: the step, with the clipping folded in; a thread an element."""
    as_real = np.dtype(dtype).type

    def sgd(p: Any, g: Any, rates: Any, factor: Any) -> None:
        i = cuda.grid(1)
        if i < p.shape[0]:
            p[i] -= as_real(rates[0]) * (factor[0] * g[i])

    vector = vector_of(real_of(dtype))
    return Kernel("sgd", sgd, (vector, vector, DOUBLES, vector), geometry.threads)


@device
def count_step(loss: Any, norm: Any, totals: Any, cursor: Any) -> None:
    """Add one step to ``totals``; move ``cursor`` to the next row of start offsets."""
    totals[0] += loss
    totals[1] += norm
    totals[2] += 1.0
    if not (math.isfinite(loss) and math.isfinite(norm)):
        totals[3] += 1.0
    cursor[0] += 1


@functools.cache
def record_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """:func:`count_step` by the first thread."""

    def record(loss: Any, norm: Any, totals: Any, cursor: Any) -> None:
        if cuda.grid(1) == 0:
            count_step(loss[0], norm[0], totals, cursor)

    vector = vector_of(real_of(dtype))
    return Kernel("record", record, (vector, vector, DOUBLES, INTS), geometry.threads)


@functools.cache
def update_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """All that ends a training step: ``norm``, ``sgd``, ``record``, and the state to carry.

    Every block adds up the partial sums of squares for itself, in the order of ``norm_kernel``:
    less than waiting for one block to do so. ``h0`` takes over ``carried`` elements of ``h``.
    """
    THREADS, as_real = geometry.threads, np.dtype(dtype).type

    def update(
        p: Any, g: Any, partial: Any, rates: Any, loss: Any, norm: Any, totals: Any, cursor: Any,
        h: Any, h0: Any, carried: Any,
    ) -> None:  # fmt: skip
        sums = cuda.shared.array(THREADS, dtype=types.float64)
        tid = u32(cuda.threadIdx.x)
        total = global_norm(partial, sums, tid, THREADS)
        factor = as_real(rates[1] / total if total > rates[1] else 1.0)
        lr = as_real(rates[0])
        first, step = cuda.grid(1), cuda.gridsize(1)
        for i in range(first, p.shape[0], step):
            p[i] -= lr * (factor * g[i])
        for i in range(first, carried, step):
            h0[i] = h[i]
        if first == 0:
            norm[0] = total
            count_step(loss[0], norm[0], totals, cursor)

    vector = vector_of(real_of(dtype))
    signature = (
        vector, vector, DOUBLES, DOUBLES, vector, vector, DOUBLES, INTS, vector, vector, I32,
    )  # fmt: skip
    return Kernel("update", update, signature, THREADS)
