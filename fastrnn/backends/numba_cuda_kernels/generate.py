"""Generation: whole continuations in one launch."""

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
    U64,
    UNROLL,
    Geometry,
    Kernel,
    block_sum,
    cuda,
    device,
    real_of,
    types,
    u32,
    u64,
    vector_of,
)
from fastrnn.decoding import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

MASK, HALF, TOP = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)
M0, M1 = np.uint64(PHILOX_M0), np.uint64(PHILOX_M1)
W0, W1 = np.uint64(PHILOX_W0), np.uint64(PHILOX_W1)


@device
def uniform(position: Any, sequence: Any, key0: Any, key1: Any) -> Any:
    """:func:`fastrnn.decoding.uniform`: Philox4x32-10, its words in uint64."""
    c0, c1, c2, c3 = position & MASK, sequence & MASK, np.uint64(0), np.uint64(0)
    k0, k1 = key0, key1
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return np.float64(c0 >> TOP) * 2.0**-24


@device
def beats(x: Any, i: Any, y: Any, j: Any) -> Any:
    """Does ``x`` at index ``i`` come before ``y`` at ``j``? Larger first, ties to the lower index;
    NaN before all numbers, as in ``numpy.argmax``."""
    if x != x:
        return y == y or i < j
    return x > y or (x == y and i < j)


@functools.cache
def generate_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """Whole continuations by :func:`fastrnn.decoding.choose`, one block a sequence, one launch.

    Scratch a sequence: ``state``, ``fresh`` ``[H]``, ``logits`` ``[V]``, ``weights``, ``before``
    ``[V]`` float64. A thread owns an output of each dot product and reads its column of the
    matrix, sixteen rows on their way at once. The matrices come from the L2 cache each step, and
    that is the floor at one sequence: one multiprocessor reads H² + H V words a token at 64 bytes a
    clock, 1.3 MB or 12 µs at H = 256, V = 1,027 on an H200; other sequences run beside it.
    The rank that top-k and top-p ask for is counted: V² comparisons a token, little at V = 1,000.
    """
    THREADS, real = geometry.threads, real_of(dtype)
    zero = np.dtype(dtype).type(0)

    @device
    def dot(x: Any, at: Any, W: Any, j: Any, rows: Any, width: Any) -> Any:
        w = cuda.local.array(UNROLL, dtype=real)
        total = zero
        whole = rows - rows % UNROLL
        for k in range(0, whole, UNROLL):
            for u in range(UNROLL):
                w[u] = W[u64((k + u) * width + j)]
            for u in range(UNROLL):
                total += x[at + k + u] * w[u]
        for k in range(whole, rows):
            total += x[at + k] * W[k * width + j]
        return total

    def generate(
        W_xh: Any, W_hh: Any, b_h: Any, W_hq: Any, b_q: Any, prefix: Any, lengths: Any,
        state: Any, fresh: Any, logits: Any, weights: Any, before: Any, tokens: Any,
        P: Any, count: Any, temperature: Any, top_k: Any, top_p: Any,
        key0: Any, key1: Any, sequence: Any, position: Any,
    ) -> None:  # fmt: skip
        sums = cuda.shared.array(THREADS, dtype=types.float64)
        best = cuda.shared.array(THREADS, dtype=real)
        where = cuda.shared.array(THREADS, dtype=types.int32)
        tid = u32(cuda.threadIdx.x)
        s = cuda.blockIdx.x
        H, V = b_h.shape[0], b_q.shape[0]
        hidden, vocabulary = s * H, s * V
        length = lengths[s]
        for n in range(length + count - 1):
            token = prefix[s * P + n] if n < length else tokens[s * count + n - length]
            for j in range(tid, H, THREADS):
                z = W_xh[token * H + j] + b_h[j] + dot(state, hidden, W_hh, j, H, H)
                fresh[hidden + j] = math.tanh(z)
            cuda.syncthreads()
            for j in range(tid, H, THREADS):
                state[hidden + j] = fresh[hidden + j]
            cuda.syncthreads()
            if n < length - 1:
                continue
            for j in range(tid, V, THREADS):
                logits[vocabulary + j] = b_q[j] + dot(state, hidden, W_hq, j, H, V)
            cuda.syncthreads()

            # The arg-max, on every thread.
            found = min(tid, V - 1)
            for j in range(tid, V, THREADS):
                if beats(logits[vocabulary + j], j, logits[vocabulary + found], found):
                    found = j
            best[tid] = logits[vocabulary + found]
            where[tid] = found
            cuda.syncthreads()
            half = THREADS >> 1
            while half > 0:
                if tid < half and beats(best[tid + half], where[tid + half], best[tid], where[tid]):
                    best[tid] = best[tid + half]
                    where[tid] = where[tid + half]
                cuda.syncthreads()
                half >>= 1
            chosen = where[0]

            if temperature > 0.0:
                high = np.float64(logits[vocabulary + chosen])
                for j in range(tid, V, THREADS):
                    weights[vocabulary + j] = math.exp(
                        (np.float64(logits[vocabulary + j]) - high) / temperature
                    )
                cuda.syncthreads()
                if (top_k > 0 and top_k < V) or top_p < 1.0:
                    # Who comes before token j, and how heavy are they? -1: cut off by top-k.
                    mass = 0.0
                    for j in range(tid, V, THREADS):
                        ranked, heavier = 0, 0.0
                        own = logits[vocabulary + j]
                        for i in range(V):
                            if beats(logits[vocabulary + i], i, own, j):
                                ranked += 1
                                heavier += weights[vocabulary + i]
                        if top_k > 0 and ranked >= top_k:
                            heavier = -1.0
                        else:
                            mass += weights[vocabulary + j]
                        before[vocabulary + j] = heavier
                    mass = block_sum(sums, tid, mass)
                    for j in range(tid, V, THREADS):
                        heavier = before[vocabulary + j]
                        if heavier < 0.0 or (top_p < 1.0 and not heavier < top_p * mass):
                            weights[vocabulary + j] = 0.0
                    cuda.syncthreads()

                # Invert the cumulative distribution: a thread adds up a run of tokens, then the
                # first thread finds the run and the token in it.
                run = (V + THREADS - 1) // THREADS
                mass = 0.0
                for j in range(tid * run, min(V, (tid + 1) * run)):
                    mass += weights[vocabulary + j]
                sums[tid] = mass
                cuda.syncthreads()
                if tid == 0:
                    total = 0.0
                    for i in range(THREADS):
                        total += sums[i]
                    u = uniform(position + np.uint64(n - (length - 1)),
                                sequence + np.uint64(s), key0, key1)  # fmt: skip
                    goal = u * total
                    mass, i = 0.0, 0
                    while i < THREADS - 1 and mass + sums[i] <= goal:
                        mass += sums[i]
                        i += 1
                    for j in range(i * run, V):
                        if weights[vocabulary + j] > 0.0:
                            chosen = j
                            mass += weights[vocabulary + j]
                            if mass > goal:
                                break
            if tid == 0:
                tokens[s * count + n - (length - 1)] = chosen
            cuda.syncthreads()

    vector = vector_of(real)
    signature = (
        vector, vector, vector, vector, vector, INTS, INTS,
        vector, vector, vector, DOUBLES, DOUBLES, INTS,
        I32, I32, F64, I32, F64, U64, U64, U64, U64,
    )  # fmt: skip
    return Kernel("generate", generate, signature, THREADS)
