"""Matrix products, whole or in parts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastrnn.backends.numba_cuda_kernels.common import (
    ALIGN,
    I32,
    Geometry,
    Kernel,
    cuda,
    device,
    real_of,
    repeated,
    types,
    u32,
    u64,
    vector_of,
)


@functools.cache
def gemm_kernel(dtype: Any, geometry: Geometry, trans_a: bool, trans_b: bool) -> Kernel:
    """``C[s] = op(A) op(B) (+ bias)`` over the ``s``-th part of K; ``op`` transposes where told.

    ``A`` is ``[M, K]`` or, transposed, ``[K, M]``; ``B`` is ``[K, N]`` or ``[N, K]``. ``lead`` rows
    of a transposed A come from ``head`` (hidden states one step back: h0, then h). A block owns
    a tile of C and one part of K; tiles of A and B pass through two shared buffers, the next on
    its way in registers while this one is multiplied; a thread owns ``micro_m x micro_n`` outputs.
    Places in a matrix are uint64: T·B times V may exceed 2³².
    """
    TM, TN, TK = geometry.tile_m, geometry.tile_n, geometry.tile_k
    MM, MN, THREADS = geometry.micro_m, geometry.micro_n, geometry.gemm_threads
    PER_ROW = TN // MN
    LOADS_A, LOADS_B = TM * TK // THREADS, TN * TK // THREADS
    # The block reads a tile row by row of memory: `across` neighbours, then `down` by DOWN rows.
    ACROSS_A, ACROSS_B = TM if trans_a else TK, TK if trans_b else TN
    DOWN_A, DOWN_B = THREADS // ACROSS_A, THREADS // ACROSS_B
    # Four words of padding spread the transposing stores over the banks and keep rows aligned.
    WIDE_A, WIDE_B = TM + (0 if trans_a else 4), TN + (4 if trans_b else 0)
    STORE_ACROSS_A, STORE_DOWN_A = (1, WIDE_A) if trans_a else (WIDE_A, 1)
    STORE_ACROSS_B, STORE_DOWN_B = (WIDE_B, 1) if trans_b else (1, WIDE_B)
    BUFFER_A, BUFFER_B = TK * WIDE_A, TK * WIDE_B
    SIZE_A, SIZE_B, SIZE_C = 2 * BUFFER_A, 2 * BUFFER_B, MM * MN
    zero, real = np.dtype(dtype).type(0), real_of(dtype)

    @device
    def outer(
        k: Any, tile_a: Any, row_a: Any, tile_b: Any, row_b: Any, a: Any, b: Any, acc: Any
    ) -> None:
        for i in range(MM):
            a[i] = tile_a[row_a + (k * WIDE_A + i)]
        for j in range(MN):
            b[j] = tile_b[row_b + (k * WIDE_B + j)]
        for i in range(MM):
            for j in range(MN):
                acc[i * MN + j] += a[i] * b[j]

    multiply = repeated(outer, TK)

    def gemm(
        A: Any, head: Any, B: Any, bias: Any, C: Any,
        M: Any, N: Any, K: Any, part: Any, lead: Any, has_bias: Any,
    ) -> None:  # fmt: skip
        tile_a = cuda.shared.array(SIZE_A, dtype=real, alignment=ALIGN)
        tile_b = cuda.shared.array(SIZE_B, dtype=real, alignment=ALIGN)
        next_a = cuda.local.array(LOADS_A, dtype=real)
        next_b = cuda.local.array(LOADS_B, dtype=real)
        a = cuda.local.array(MM, dtype=real)
        b = cuda.local.array(MN, dtype=real)
        acc = cuda.local.array(SIZE_C, dtype=real)
        tid = u32(cuda.threadIdx.x)
        tile_column, tile_row = u32(tid % PER_ROW * MN), u32(tid // PER_ROW * MM)
        across_a, down_a = u32(tid % ACROSS_A), u32(tid // ACROSS_A)
        across_b, down_b = u32(tid % ACROSS_B), u32(tid // ACROSS_B)
        store_a = u32(across_a * STORE_ACROSS_A + down_a * STORE_DOWN_A)
        store_b = u32(across_b * STORE_ACROSS_B + down_b * STORE_DOWN_B)
        m0, n0 = u32(cuda.blockIdx.y * TM), u32(cuda.blockIdx.x * TN)
        split = u32(cuda.blockIdx.z)
        begin = u32(split * part)
        rows, columns = u32(M - m0), u32(N - n0)
        left = u32(min(u32(part), u32(K - begin)))  # of K, still to be loaded
        ahead = u32(lead - min(u32(lead), begin))  # of these, rows of `head`
        # Where the thread's first element is, how far on its next, and the next tile's first.
        if trans_a:
            from_a = u64(begin + down_a) * u64(M) + u64(m0 + across_a)
            step_a, turn_a = u64(DOWN_A) * u64(M), u64(TK) * u64(M)
        else:
            from_a = u64(m0 + down_a) * u64(K) + u64(begin + across_a)
            step_a, turn_a = u64(DOWN_A) * u64(K), u64(TK)
        if trans_b:
            from_b = u64(n0 + down_b) * u64(K) + u64(begin + across_b)
            step_b, turn_b = u64(DOWN_B) * u64(K), u64(TK)
        else:
            from_b = u64(begin + down_b) * u64(N) + u64(n0 + across_b)
            step_b, turn_b = u64(DOWN_B) * u64(N), u64(TK) * u64(N)
        behind = u64(lead) * u64(M)
        for i in range(SIZE_C):
            acc[i] = zero
        buffer = u32(0)
        ready = False
        # One turn more than there are tiles: the first only loads, the last only multiplies.
        while True:
            loading = left > 0
            if loading:
                at_a, at_b = from_a, from_b
                deep_a, wide_a = (left, rows) if trans_a else (rows, left)
                deep_b, wide_b = (columns, left) if trans_b else (left, columns)
                for i in range(LOADS_A):
                    down = u32(down_a + i * DOWN_A)
                    next_a[i] = zero
                    if across_a < wide_a and down < deep_a:
                        if not trans_a:
                            next_a[i] = A[at_a]
                        elif down < ahead:
                            next_a[i] = head[at_a]
                        else:
                            next_a[i] = A[at_a - behind]
                    at_a += step_a
                for i in range(LOADS_B):
                    next_b[i] = zero
                    if across_b < wide_b and u32(down_b + i * DOWN_B) < deep_b:
                        next_b[i] = B[at_b]
                    at_b += step_b
                from_a += turn_a
                from_b += turn_b
                left = u32(left - min(left, u32(TK)))
                ahead = u32(ahead - min(ahead, u32(TK)))
            if ready:
                row_a, row_b = (
                    u32(buffer * BUFFER_A + tile_row),
                    u32(buffer * BUFFER_B + tile_column),
                )
                multiply(0, tile_a, row_a, tile_b, row_b, a, b, acc)
                buffer = u32(1 - buffer)
            if not loading:
                break
            ready = True
            to_a, to_b = u32(buffer * BUFFER_A + store_a), u32(buffer * BUFFER_B + store_b)
            for i in range(LOADS_A):
                tile_a[to_a + i * (DOWN_A * STORE_DOWN_A)] = next_a[i]
            for i in range(LOADS_B):
                tile_b[to_b + i * (DOWN_B * STORE_DOWN_B)] = next_b[i]
            cuda.syncthreads()
        for j in range(MN):
            b[j] = zero
            if has_bias != 0 and split == 0 and u32(tile_column + j) < columns:
                b[j] = bias[u32(n0 + tile_column + j)]
        to = (u64(split) * u64(M) + u64(m0 + tile_row)) * u64(N) + u64(n0 + tile_column)
        for i in range(MM):
            if u32(tile_row + i) < rows:
                for j in range(MN):
                    if u32(tile_column + j) < columns:
                        C[to + u64(j)] = acc[i * MN + j] + b[j]
            to += u64(N)

    vector = vector_of(real)
    signature = (vector, vector, vector, vector, vector, I32, I32, I32, I32, I32, I32)
    name = f"gemm_{'t' if trans_a else 'n'}{'t' if trans_b else 'n'}"
    return Kernel(name, gemm, signature, THREADS, blocks=4 if real == types.float32 else 3)


@functools.cache
def sum_splits_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``out = Σ_s partial[s]``, in order of ``s``: ends a matrix product split along K."""
    zero = np.dtype(dtype).type(0)

    def sum_splits(partial: Any, out: Any, splits: Any) -> None:
        i = cuda.grid(1)
        if i < out.shape[0]:
            total = zero
            for s in range(splits):
                total += partial[s * out.shape[0] + i]
            out[i] = total

    vector = vector_of(real_of(dtype))
    return Kernel("sum_splits", sum_splits, (vector, vector, I32), geometry.threads)
