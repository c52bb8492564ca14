"""The loss and its gradient."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fastrnn.backends.numba_cuda_kernels.common import (
    I32,
    INTS,
    Geometry,
    Kernel,
    block_sum,
    cuda,
    real_of,
    types,
    u32,
    vector_of,
)


@functools.cache
def cross_entropy_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``loss[n] = -log softmax(logits[n])[y]``, ``dlogits = (softmax - onehot) / N``.

    A block owns a row. One pass finds maximum and sum together (Milakov, Gimelshein, "Online
    normalizer calculation for softmax", 2018), a second writes; ``dlogits`` may be ``logits``.
    """
    THREADS, real = geometry.threads, real_of(dtype)
    zero, one, lowest = (np.dtype(dtype).type(x) for x in (0, 1, -math.inf))
    as_real = np.dtype(dtype).type

    def cross_entropy(logits: Any, targets: Any, losses: Any, dlogits: Any, V: Any) -> None:
        highs = cuda.shared.array(THREADS, dtype=real)
        sums = cuda.shared.array(THREADS, dtype=real)
        tid = u32(cuda.threadIdx.x)
        n = cuda.blockIdx.x
        target = targets[n]
        at_target = logits[n * V + target]
        high, total = lowest, zero
        for j in range(tid, V, THREADS):
            x = logits[n * V + j]
            if x > high:
                total = total * math.exp(high - x) + one
                high = x
            else:
                total += math.exp(x - high)
        highs[tid] = high
        cuda.syncthreads()
        half = THREADS >> 1
        while half > 0:
            if tid < half and highs[tid + half] > highs[tid]:
                highs[tid] = highs[tid + half]
            cuda.syncthreads()
            half >>= 1
        row_high = highs[0]
        if high != row_high:
            total *= math.exp(high - row_high)
        total = block_sum(sums, tid, total)
        share = one / as_real(targets.shape[0])
        scale = share / total
        for j in range(tid, V, THREADS):
            d = math.exp(logits[n * V + j] - row_high) * scale
            if j == target:
                d -= share
            dlogits[n * V + j] = d
        if tid == 0:
            losses[n] = math.log(total) - (at_target - row_high)

    vector = vector_of(real)
    return Kernel("cross_entropy", cross_entropy, (vector, INTS, vector, vector, I32), THREADS)


@functools.cache
def mean_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``out[0] = Σ x / N``, summed in float64 by one block."""
    THREADS = geometry.threads

    def mean(x: Any, out: Any) -> None:
        sums = cuda.shared.array(THREADS, dtype=types.float64)
        tid = u32(cuda.threadIdx.x)
        total = 0.0
        for i in range(tid, x.shape[0], THREADS):
            total += x[i]
        total = block_sum(sums, tid, total)
        if tid == 0:
            out[0] = total / x.shape[0]

    vector = vector_of(real_of(dtype))
    return Kernel("mean", mean, (vector, vector), THREADS)
