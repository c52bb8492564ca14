"""The recurrence and its way back: one block a row, or a kernel a time step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn.backends.numba_cuda_kernels.common import (
    ALIGN,
    I32,
    INTS,
    Geometry,
    Kernel,
    cuda,
    device,
    real_of,
    repeated,
    u32,
    u64,
    vector_of,
)


@dataclass(frozen=True)
class Resident:
    """Where a thread of the one-block-a-row recurrence has its rows of W, and how it uses them.

    Attributes:
        kept, staged: rows of a slice in registers and in shared memory; the others come from the
            L1 cache each step. (P = 256 in float32: 28 + 4 + 0.)
        words, shared: elements of the arrays that hold them.
        load: fills these arrays. multiply: a slice's part of ``state W``, into shared memory.
    """

    kept: int
    staged: int
    words: int
    shared: int
    load: Callable[..., Any]
    multiply: Callable[..., Any]


@functools.cache
def resident(dtype: Any, geometry: Geometry, outputs: int) -> Resident:
    """``W`` is padded to ``[P, P]``, ``P = outputs * lanes``. Thread (slice, lane) owns groups of
    four neighbouring outputs, a group every ``4 * lanes``, over its slice of ``P / slices`` rows:
    shared memory is then read and written four words at a time.
    """
    LANES, SLICES, OUT = geometry.lanes, geometry.slices, outputs
    P, ROWS = OUT * LANES, OUT * LANES // SLICES
    WIDE = min(4, OUT)
    GROUP, GROUPS = WIDE * LANES, OUT // WIDE
    item = int(np.dtype(dtype).itemsize)
    KEPT = max(1, min(ROWS, geometry.resident_bytes // (OUT * item) - 1))
    row_bytes = SLICES * P * item
    # Beside the staged rows: the state, the bias, and the partial sums.
    room = (geometry.shared_bytes - 2 * P * item - row_bytes) // row_bytes
    STAGED = max(0, min(ROWS - KEPT, room))
    zero = np.dtype(dtype).type(0)

    @device
    def keep(k: Any, w: Any, W: Any, first: Any) -> None:
        for g in range(GROUPS):
            for i in range(WIDE):
                w[k * OUT + g * WIDE + i] = W[first + (k * P + g * GROUP + i)]

    @device
    def stage(k: Any, staged: Any, to: Any, W: Any, first: Any) -> None:
        for g in range(GROUPS):
            for i in range(WIDE):
                n = g * GROUP + i
                staged[to + (k * SLICES * P + n)] = W[first + ((KEPT + k) * P + n)]

    @device
    def add_kept(k: Any, acc: Any, w: Any, state: Any, at: Any) -> None:
        s = state[at + k]
        for i in range(OUT):
            acc[i] += s * w[k * OUT + i]

    @device
    def add_staged(k: Any, acc: Any, staged: Any, to: Any, state: Any, at: Any) -> None:
        s = state[at + (KEPT + k)]
        for g in range(GROUPS):
            for i in range(WIDE):
                acc[g * WIDE + i] += s * staged[to + (k * SLICES * P + g * GROUP + i)]

    keep_all, add_all_kept = repeated(keep, KEPT), repeated(add_kept, KEPT)
    stage_all, add_all_staged = repeated(stage, STAGED), repeated(add_staged, STAGED)

    @device
    def load(w: Any, staged: Any, W: Any, slice_: Any, column: Any) -> None:
        first = u32(slice_ * (ROWS * P) + column)
        if STAGED > 0:
            stage_all(0, staged, u32(slice_ * P + column), W, first)
        keep_all(0, w, W, first)

    @device
    def multiply(
        state: Any, acc: Any, w: Any, staged: Any, W: Any, partial: Any, slice_: Any, column: Any
    ) -> None:
        at, first = u32(slice_ * ROWS), u32(slice_ * (ROWS * P) + column)
        to = u32(slice_ * P + column)
        for i in range(OUT):
            acc[i] = zero
        add_all_kept(0, acc, w, state, at)
        if STAGED > 0:
            add_all_staged(0, acc, staged, to, state, at)
        for k in range(KEPT + STAGED, ROWS):
            s = state[at + k]
            for g in range(GROUPS):
                for i in range(WIDE):
                    acc[g * WIDE + i] += s * W[first + (k * P + g * GROUP + i)]
        for g in range(GROUPS):
            for i in range(WIDE):
                partial[to + (g * GROUP + i)] = acc[g * WIDE + i]

    shared = max(1, STAGED * SLICES * P)
    return Resident(KEPT, STAGED, KEPT * OUT, shared, load, multiply)


@functools.cache
def pad_kernel(dtype: Any, geometry: Geometry, transposed: bool) -> Kernel:
    """``out[i, j] = W[i, j]`` or ``W[j, i]``, zero from H on; a thread an element of ``out``."""
    zero = np.dtype(dtype).type(0)

    def pad(W: Any, out: Any, H: Any, width: Any) -> None:
        n = cuda.grid(1)
        if n < out.shape[0]:
            i = n // width
            j = n - i * width
            if i < H and j < H:
                out[n] = W[j * H + i] if transposed else W[i * H + j]
            else:
                out[n] = zero

    vector = vector_of(real_of(dtype))
    name = "transpose" if transposed else "pad"
    return Kernel(name, pad, (vector, vector, I32, I32), geometry.threads)


@functools.cache
def recurrence_kernel(dtype: Any, geometry: Geometry, outputs: int, gathers: bool) -> Kernel:
    """``h_t = tanh(z_t + h_{t-1} W)``, all time steps; ``h`` may be ``z``.

    Where it ``gathers``, ``z`` is W_xh and ``z_t`` the row of the token that is due, plus ``b_h``:
    ``tokens[starts[cursor, b] + t]``, so that neither ``x`` nor ``z`` is written before.
    A block owns one row of the batch, so time steps need block barriers only, and W stays on the
    multiprocessor for the whole sequence (:func:`resident`). The slices' partial sums meet in
    shared memory, in a fixed order; z is loaded one step ahead, its token two.
    """
    LANES, SLICES, OUT = geometry.lanes, geometry.slices, outputs
    P, SIZE, WIDE = OUT * LANES, SLICES * OUT * LANES, min(4, outputs)
    own = resident(dtype, geometry, outputs)
    WORDS, SHARED, load, multiply = own.words, own.shared, own.load, own.multiply
    zero, real = np.dtype(dtype).type(0), real_of(dtype)

    def recurrence(
        z: Any, b_h: Any, tokens: Any, starts: Any, cursor: Any, W: Any, h0: Any, h: Any,
        B: Any, H: Any,
    ) -> None:  # fmt: skip
        state = cuda.shared.array(P, dtype=real, alignment=ALIGN)
        partial = cuda.shared.array(SIZE, dtype=real, alignment=ALIGN)
        staged = cuda.shared.array(SHARED, dtype=real, alignment=ALIGN)
        bias = cuda.shared.array(P if gathers else 1, dtype=real)
        w = cuda.local.array(WORDS, dtype=real)
        acc = cuda.local.array(OUT, dtype=real)
        tid = u32(cuda.threadIdx.x)
        column, slice_ = u32(tid % LANES * WIDE), u32(tid // LANES)
        load(w, staged, W, slice_, column)
        row, step = u64(cuda.blockIdx.x) * u64(H), u64(B) * u64(H)  # h[t, b, 0]
        end = u64(h.shape[0])
        ahead, token, at = zero, 0, 0
        if tid < P:
            state[tid] = h0[row + tid] if tid < H else zero
        if tid < H:
            if gathers:
                at = starts[cursor[0] * B + cuda.blockIdx.x]
                ahead = z[u64(tokens[at]) * u64(H) + tid]
                at += 1
                if row + step < end:
                    token = tokens[at]
                bias[tid] = b_h[tid]
            else:
                ahead = z[row + tid]
        while row < end:
            cuda.syncthreads()
            multiply(state, acc, w, staged, W, partial, slice_, column)
            cuda.syncthreads()
            if tid < H:
                total = ahead
                if row + step < end:
                    if gathers:
                        ahead = z[u64(token) * u64(H) + tid]
                        if row + step + step < end:
                            at += 1
                            token = tokens[at]
                    else:
                        ahead = z[row + step + tid]
                if gathers:
                    total += bias[tid]
                for i in range(SLICES):
                    total += partial[tid + i * P]
                total = math.tanh(total)
                state[tid] = total
                h[row + tid] = total
            row += step

    vector = vector_of(real)
    signature = (vector, vector, INTS, INTS, INTS, vector, vector, vector, I32, I32)
    name = f"{'gather_' if gathers else ''}recurrence_{P}"
    return Kernel(name, recurrence, signature, geometry.recurrence_threads)


@functools.cache
def recurrence_backward_kernel(dtype: Any, geometry: Geometry, outputs: int) -> Kernel:
    """``dz_t = (dh_t + dz_{t+1} Wᵀ) (1 - h_t²)``, ``dh0 = dz_0 Wᵀ``; ``dz`` may be ``dh``.

    ``recurrence`` backwards in time, with the padded transpose ``Wt`` in its place.
    """
    LANES, SLICES, OUT = geometry.lanes, geometry.slices, outputs
    P, SIZE, WIDE = OUT * LANES, SLICES * OUT * LANES, min(4, outputs)
    own = resident(dtype, geometry, outputs)
    WORDS, SHARED, load, multiply = own.words, own.shared, own.load, own.multiply
    zero, one, real = np.dtype(dtype).type(0), np.dtype(dtype).type(1), real_of(dtype)

    def recurrence_backward(dh: Any, h: Any, Wt: Any, dz: Any, dh0: Any, B: Any, H: Any) -> None:
        state = cuda.shared.array(P, dtype=real, alignment=ALIGN)
        partial = cuda.shared.array(SIZE, dtype=real, alignment=ALIGN)
        staged = cuda.shared.array(SHARED, dtype=real, alignment=ALIGN)
        w = cuda.local.array(WORDS, dtype=real)
        acc = cuda.local.array(OUT, dtype=real)
        tid = u32(cuda.threadIdx.x)
        column, slice_ = u32(tid % LANES * WIDE), u32(tid // LANES)
        load(w, staged, Wt, slice_, column)
        if tid < P:
            state[tid] = zero
        back = u64(B) * u64(H)
        # h[t, b, 0], t the last
        row = u64(h.shape[0]) - u64(cuda.gridDim.x - cuda.blockIdx.x) * u64(H)
        carry, outside, hidden = zero, zero, zero
        if tid < H:
            outside, hidden = dh[row + tid], h[row + tid]
        cuda.syncthreads()
        while True:
            last = row < back
            if tid < H:
                total = (outside + carry) * (one - hidden * hidden)
                state[tid] = total
                dz[row + tid] = total
                if not last:
                    outside, hidden = dh[row - back + tid], h[row - back + tid]
            cuda.syncthreads()
            multiply(state, acc, w, staged, Wt, partial, slice_, column)
            cuda.syncthreads()
            if tid < H:
                carry = zero
                for i in range(SLICES):
                    carry += partial[tid + i * P]
            if last:
                break
            row -= back
        if tid < H:
            dh0[cuda.blockIdx.x * H + tid] = carry

    vector = vector_of(real)
    signature = (vector, vector, vector, vector, vector, I32, I32)
    return Kernel(
        f"recurrence_backward_{P}", recurrence_backward, signature, geometry.recurrence_threads
    )


@functools.cache
def tanh_step_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``h = tanh(z + Σ_s partial[s])``: ends one time step of a wide recurrence."""

    def tanh_step(partial: Any, z: Any, h: Any, splits: Any) -> None:
        i = cuda.grid(1)
        if i < h.shape[0]:
            total = z[i]
            for s in range(splits):
                total += partial[s * h.shape[0] + i]
            h[i] = math.tanh(total)

    vector = vector_of(real_of(dtype))
    return Kernel("tanh_step", tanh_step, (vector, vector, vector, I32), geometry.threads)


@functools.cache
def tanh_step_backward_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``dz = (dh + Σ_s partial[s]) (1 - h²)``: begins one time step of a wide BPTT."""
    one = np.dtype(dtype).type(1)

    def tanh_step_backward(partial: Any, dh: Any, h: Any, dz: Any, splits: Any) -> None:
        i = cuda.grid(1)
        if i < h.shape[0]:
            total = dh[i]
            for s in range(splits):
                total += partial[s * h.shape[0] + i]
            dz[i] = total * (one - h[i] * h[i])

    vector = vector_of(real_of(dtype))
    signature = (vector, vector, vector, vector, I32)
    return Kernel("tanh_step_backward", tanh_step_backward, signature, geometry.threads)
