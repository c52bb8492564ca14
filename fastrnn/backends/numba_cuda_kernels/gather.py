"""Windows of the corpus, the rows of W_xh by token, and the sums that go back to them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastrnn.backends.numba_cuda_kernels.common import (
    I32,
    INTS,
    UNROLL,
    Geometry,
    Kernel,
    cuda,
    i32,
    real_of,
    types,
    u32,
    vector_of,
)


@functools.cache
def window_kernel(geometry: Geometry) -> Kernel:
    """``x[t, b] = tokens[starts[cursor, b] + t]``, ``y`` one to the right; a thread an element.

    ``starts`` holds one row of B offsets a step; ``cursor[0]`` says which is due, so a replayed
    step reads the next row without the host telling it.
    """

    def window(tokens: Any, starts: Any, cursor: Any, x: Any, y: Any, B: Any) -> None:
        i = cuda.grid(1)
        if i < x.shape[0]:
            t = i // B
            b = i - t * B
            at = starts[cursor[0] * B + b] + t
            x[i] = tokens[at]
            y[i] = tokens[at + 1]

    return Kernel("window", window, (INTS, INTS, INTS, INTS, INTS, I32), geometry.threads)


@functools.cache
def gather_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``z[n, j] = W_xh[tokens[n], j] + b_h[j]``; a thread an element."""

    def gather(W_xh: Any, tokens: Any, b_h: Any, z: Any, H: Any) -> None:
        i = cuda.grid(1)
        if i < z.shape[0]:
            n = i // H
            j = i - n * H
            z[i] = W_xh[tokens[n] * H + j] + b_h[j]

    vector = vector_of(real_of(dtype))
    return Kernel("gather", gather, (vector, INTS, vector, vector, I32), geometry.threads)


@functools.cache
def rank_kernel(geometry: Geometry) -> Kernel:
    """Sort the tokens of a batch by counting, stably: where does each row go, and each id start?

    Query ``q < N`` counts the tokens before token ``q`` in sorted order: ``order[count] = q``.
    Query ``N + v`` counts the ids below ``v``: ``bounds[v]``, for ``v`` in ``0 .. V``.
    A block owns ``threads`` queries and reads the tokens through shared memory. N (N + V)
    comparisons, no atomics: microseconds at T·B of a thousand, and still below the cost of the
    matrix products at a hundred thousand.
    """
    THREADS = geometry.threads

    def rank(tokens: Any, order: Any, bounds: Any) -> None:
        staged = cuda.shared.array(THREADS, dtype=types.int32)
        tid = u32(cuda.threadIdx.x)
        N = i32(tokens.shape[0])
        q = i32(cuda.blockIdx.x * THREADS + cuda.threadIdx.x)
        own = i32(q - N)  # an id where q >= N, else the id of token q
        last = i32(0)  # tokens before this one win a tie
        if q < N:
            own = tokens[q]
            last = q
        count = i32(0)
        for first in range(0, N, THREADS):
            if first + tid < N:
                staged[tid] = tokens[first + tid]
            cuda.syncthreads()
            earlier = i32(last - first)
            for i in range(min(i32(THREADS), i32(N - first))):
                other = staged[u32(i)]
                if other < own or (other == own and i32(i) < earlier):
                    count = i32(count + 1)
            cuda.syncthreads()
        if q < N:
            order[count] = q
        elif own < bounds.shape[0]:
            bounds[own] = count

    return Kernel("rank", rank, (INTS, INTS, INTS), geometry.threads)


@functools.cache
def gather_backward_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``dW_xh[v, j] = Σ dz[n, j]`` over the rows ``n`` whose token is ``v``, from ``rank``'s order.

    A block owns one ``v`` and ``columns`` columns; its rows of threads share the occurrences, and
    the first row of threads adds up what they found. Writes zeros where ``v`` does not occur.
    A thread sums with what each addition lost (Kahan): in 65,536 occurrences it has 8,192, whose
    plain sum is off by more than 1e-6. Three subtractions beside a load, no blocks or bytes more.
    """
    COLUMNS, ROWS = geometry.columns, geometry.threads // geometry.columns
    SIZE, zero, real = geometry.threads, np.dtype(dtype).type(0), real_of(dtype)

    def gather_backward(dz: Any, order: Any, bounds: Any, dW_xh: Any, H: Any) -> None:
        sums = cuda.shared.array(SIZE, dtype=real)
        tid = u32(cuda.threadIdx.x)
        column, row = tid % COLUMNS, tid // COLUMNS
        v = cuda.blockIdx.x
        j = cuda.blockIdx.y * COLUMNS + column
        total, lost = zero, zero
        if j < H:
            for i in range(bounds[v] + row, bounds[v + 1], ROWS):
                term = dz[order[i] * H + j] - lost
                longer = total + term
                lost = (longer - total) - term
                total = longer
        sums[tid] = total
        cuda.syncthreads()
        if row == 0 and j < H:
            for i in range(1, ROWS):
                total += sums[u32(i) * COLUMNS + column]
            dW_xh[v * H + j] = total

    vector = vector_of(real)
    return Kernel("gather_backward", gather_backward, (vector, INTS, INTS, vector, I32), SIZE)


@functools.cache
def column_sum_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``out[j] = Σ_n x[n, j]``: the bias gradients. A block owns ``columns`` columns, and a thread
    has sixteen rows on their way at once: few blocks, so latency is what it takes.

    A thread adds a sum of sixteen to its total together with what the last addition lost (Kahan):
    the error does not grow with the rows, of which it has 8,192 at T·B = 65,536. Three additions
    more for sixteen, no blocks or bytes.
    """
    COLUMNS, ROWS = geometry.columns, geometry.threads // geometry.columns
    SIZE, zero, real = geometry.threads, np.dtype(dtype).type(0), real_of(dtype)

    def column_sum(x: Any, out: Any) -> None:
        sums = cuda.shared.array(SIZE, dtype=real)
        ahead = cuda.local.array(UNROLL, dtype=real)
        tid = u32(cuda.threadIdx.x)
        column, row = tid % COLUMNS, tid // COLUMNS
        width = out.shape[0]
        j = cuda.blockIdx.x * COLUMNS + column
        total, lost = zero, zero
        if j < width:
            at, step = row * width + j, ROWS * width
            while at + (UNROLL - 1) * step < x.shape[0]:
                for u in range(UNROLL):
                    ahead[u] = x[at + u * step]
                term = -lost
                for u in range(UNROLL):
                    term += ahead[u]
                longer = total + term
                lost = (longer - total) - term
                total = longer
                at += UNROLL * step
            for i in range(at, x.shape[0], step):
                total += x[i]
        sums[tid] = total
        cuda.syncthreads()
        if row == 0 and j < width:
            for i in range(1, ROWS):
                total += sums[u32(i) * COLUMNS + column]
            out[j] = total

    vector = vector_of(real)
    return Kernel("column_sum", column_sum, (vector, vector), SIZE)
