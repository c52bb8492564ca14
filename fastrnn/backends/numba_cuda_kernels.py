"""The kernels of the ``numba-cuda`` backend, in Python.

A factory ``x_kernel(dtype, geometry, ...)`` makes each :class:`Kernel`: the Python function, its
signature, and the block it runs in. What the factory is given is a constant to the compiler, so
loops over it unroll and small local arrays become registers.

What holds for all of them:

* Arrays come flat, in C order; the index comments name the tensor (``z[t, b, j]``).
* Block-local indices are ``uint32``: a signed index costs a test for Python's negative ones at
  each access, 64-bit registers, and the vector loads of shared memory.
* Sums have a fixed order: no float atomics, no shuffles, no grid-wide barriers. The same source
  therefore runs in Numba's simulator, where a CUDA thread is a Python thread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from fastrnn.backends.numba_cuda import maintained_cuda
from fastrnn.decoding import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

cuda = maintained_cuda()
types = cuda.types

SIMULATED = bool(cuda.config.ENABLE_CUDASIM)


@dataclass(frozen=True)
class Geometry:
    """Block and tile sizes. Tests shrink them; the defaults are meant for real devices.

    Attributes:
        lanes, slices: the recurrence's block is ``lanes x slices`` threads; a thread owns the
            outputs of its lane and one of ``slices`` parts of the dot products.
        max_hidden: hidden sizes up to this run in the one-block-a-row recurrence.
        resident_bytes: of W_hh and sums that a thread may hold in registers: 232 words leave 23 of
            the 255 that a thread can have.
        shared_bytes: of shared memory that a block may take without asking; the recurrence keeps
            more of W_hh in it.
        tile_m, tile_n, tile_k: the block tile of a matrix product, and ``micro_m x micro_n`` the
            outputs of a thread.
        threads: of all other kernels; a power of two.
        columns: threads along a row in the kernels that sum over rows; the other
            ``threads / columns`` share the rows.
        partial_blocks: blocks of the sum of squares.
    """

    lanes: int = 64
    slices: int = 4
    max_hidden: int = 256
    resident_bytes: int = 880
    shared_bytes: int = 48 * 1024
    tile_m: int = 64
    tile_n: int = 64
    tile_k: int = 16
    micro_m: int = 8
    micro_n: int = 4
    threads: int = 256
    columns: int = 32
    partial_blocks: int = 264

    @property
    def recurrence_threads(self) -> int:
        return self.lanes * self.slices

    @property
    def gemm_threads(self) -> int:
        return (self.tile_m // self.micro_m) * (self.tile_n // self.micro_n)

    def outputs(self, H: int) -> int:
        """Outputs a thread owns in the one-block-a-row recurrence: the least power of two."""
        outputs = 1
        while outputs * self.lanes < H:
            outputs *= 2
        return outputs

    def fits(self, H: int) -> bool:
        """Whether the recurrence over ``H`` units runs one block a row."""
        return self.max_hidden >= H

    def padded(self, H: int) -> int:
        """``H`` rounded up to what the one-block-a-row recurrence works on."""
        return self.outputs(H) * self.lanes


@dataclass(frozen=True)
class Kernel:
    """A kernel before compilation.

    Attributes:
        name: as in messages and tables. function: the Python source of the kernel.
        signature: numba argument types. threads: of a block. blocks: that a multiprocessor must
            have room for; with ``threads`` it bounds the registers.
    """

    name: str
    function: Callable[..., None]
    signature: tuple[Any, ...]
    threads: int
    blocks: int = 1

    @functools.cached_property
    def dispatcher(self) -> Any:
        """Compiled when first asked for. Never from numba's disk cache: its key is the source
        file of the kernel alone, not of what the kernel was built with or calls."""
        if SIMULATED:
            return cuda.jit(self.function)
        bounds = (self.threads, self.blocks)
        options: dict[str, Any] = {"lto": False, "launch_bounds": bounds}
        return cuda.jit(types.void(*self.signature), **options)(self.function)


def _real(dtype: Any) -> Any:
    return types.float64 if np.dtype(dtype) == np.float64 else types.float32


def _vector(element: Any) -> Any:
    return types.Array(element, 1, "C")


I32 = types.int32
F64 = types.float64
U64 = types.uint64
INTS = _vector(types.int32)
DOUBLES = _vector(types.float64)

# Vector loads need an alignment that numba does not assume; the simulator takes none.
ALIGN = None if SIMULATED else 16

Function = TypeVar("Function", bound=Callable[..., Any])


def device(function: Function) -> Function:
    """A function that kernels call; the compiler inlines it."""
    return function if SIMULATED else cast(Function, cuda.jit(device=True)(function))


@functools.cache
def repeated(step: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A device function that calls ``step(k, ...)``, ``step(k + 1, ...)``, … ``count`` times.

    The compiler unrolls only short loops, and an array whose indices it does not know is in memory,
    not in registers: this unrolls loops of any length.
    """
    if count <= 1:
        return step
    half = count // 2
    first, second = repeated(step, half), repeated(step, count - half)

    @device
    def both(k: Any, *args: Any) -> None:
        first(k, *args)
        second(k + half, *args)

    return both


i32, u32, u64 = np.int32, np.uint32, np.uint64
UNROLL = 16  # loads on their way at once, where few threads read much


@device
def block_sum(buffer: Any, tid: Any, value: Any) -> Any:
    """The sum of ``value`` over the block, in a fixed order, on every thread.

    ``buffer``: shared, one element a thread, their number a power of two. Ends on a barrier, so
    the buffer may be used again at once.
    """
    buffer[tid] = value
    cuda.syncthreads()
    half = cuda.blockDim.x >> 1
    while half > 0:
        if tid < half:
            buffer[tid] += buffer[tid + half]
        cuda.syncthreads()
        half >>= 1
    total = buffer[0]
    cuda.syncthreads()
    return total


# --- window, gather and its transpose --------------------------------------------------------


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

    vector = _vector(_real(dtype))
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
    """
    COLUMNS, ROWS = geometry.columns, geometry.threads // geometry.columns
    SIZE, zero, real = geometry.threads, np.dtype(dtype).type(0), _real(dtype)

    def gather_backward(dz: Any, order: Any, bounds: Any, dW_xh: Any, H: Any) -> None:
        sums = cuda.shared.array(SIZE, dtype=real)
        tid = u32(cuda.threadIdx.x)
        column, row = tid % COLUMNS, tid // COLUMNS
        v = cuda.blockIdx.x
        j = cuda.blockIdx.y * COLUMNS + column
        total = zero
        if j < H:
            for i in range(bounds[v] + row, bounds[v + 1], ROWS):
                total += dz[order[i] * H + j]
        sums[tid] = total
        cuda.syncthreads()
        if row == 0 and j < H:
            for i in range(1, ROWS):
                total += sums[u32(i) * COLUMNS + column]
            dW_xh[v * H + j] = total

    vector = _vector(real)
    return Kernel("gather_backward", gather_backward, (vector, INTS, INTS, vector, I32), SIZE)


@functools.cache
def column_sum_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``out[j] = Σ_n x[n, j]``: the bias gradients. A block owns ``columns`` columns, and a thread
    has sixteen rows on their way at once: few blocks, so latency is what it takes."""
    COLUMNS, ROWS = geometry.columns, geometry.threads // geometry.columns
    SIZE, zero, real = geometry.threads, np.dtype(dtype).type(0), _real(dtype)

    def column_sum(x: Any, out: Any) -> None:
        sums = cuda.shared.array(SIZE, dtype=real)
        ahead = cuda.local.array(UNROLL, dtype=real)
        tid = u32(cuda.threadIdx.x)
        column, row = tid % COLUMNS, tid // COLUMNS
        width = out.shape[0]
        j = cuda.blockIdx.x * COLUMNS + column
        total = zero
        if j < width:
            at, step = row * width + j, ROWS * width
            while at + (UNROLL - 1) * step < x.shape[0]:
                for u in range(UNROLL):
                    ahead[u] = x[at + u * step]
                for u in range(UNROLL):
                    total += ahead[u]
                at += UNROLL * step
            for i in range(at, x.shape[0], step):
                total += x[i]
        sums[tid] = total
        cuda.syncthreads()
        if row == 0 and j < width:
            for i in range(1, ROWS):
                total += sums[u32(i) * COLUMNS + column]
            out[j] = total

    vector = _vector(real)
    return Kernel("column_sum", column_sum, (vector, vector), SIZE)


# --- recurrence ------------------------------------------------------------------------------


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

    vector = _vector(_real(dtype))
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
    zero, real = np.dtype(dtype).type(0), _real(dtype)

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

    vector = _vector(real)
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
    zero, one, real = np.dtype(dtype).type(0), np.dtype(dtype).type(1), _real(dtype)

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

    vector = _vector(real)
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

    vector = _vector(_real(dtype))
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

    vector = _vector(_real(dtype))
    signature = (vector, vector, vector, vector, I32)
    return Kernel("tanh_step_backward", tanh_step_backward, signature, geometry.threads)


# --- matrix products -------------------------------------------------------------------------


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
    zero, real = np.dtype(dtype).type(0), _real(dtype)

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

    vector = _vector(real)
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

    vector = _vector(_real(dtype))
    return Kernel("sum_splits", sum_splits, (vector, vector, I32), geometry.threads)


# --- loss ------------------------------------------------------------------------------------


@functools.cache
def cross_entropy_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``loss[n] = -log softmax(logits[n])[y]``, ``dlogits = (softmax - onehot) / N``.

    A block owns a row. One pass finds maximum and sum together (Milakov, Gimelshein, "Online
    normalizer calculation for softmax", 2018), a second writes; ``dlogits`` may be ``logits``.
    """
    THREADS, real = geometry.threads, _real(dtype)
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

    vector = _vector(real)
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

    vector = _vector(_real(dtype))
    return Kernel("mean", mean, (vector, vector), THREADS)


# --- clip and step ---------------------------------------------------------------------------


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

    vector = _vector(_real(dtype))
    return Kernel("sum_squares", sum_squares, (vector, DOUBLES, I32), THREADS)


@functools.cache
def norm_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``norm = sqrt(Σ partial)``, ``scale = min(1, max_norm / norm)``; one block, fixed order."""
    THREADS = geometry.threads

    def norm(partial: Any, rates: Any, out: Any, scale: Any) -> None:
        sums = cuda.shared.array(THREADS, dtype=types.float64)
        tid = u32(cuda.threadIdx.x)
        total = 0.0
        for i in range(tid, partial.shape[0], THREADS):
            total += partial[i]
        total = math.sqrt(block_sum(sums, tid, total))
        if tid == 0:
            out[0] = total
            scale[0] = rates[1] / total if total > rates[1] else 1.0

    vector = _vector(_real(dtype))
    return Kernel("norm", norm, (DOUBLES, DOUBLES, vector, vector), THREADS)


@functools.cache
def scale_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``g *= scale`` where the norm was too large; a thread an element."""
    one = np.dtype(dtype).type(1)

    def scale(g: Any, factor: Any) -> None:
        i = cuda.grid(1)
        if i < g.shape[0] and factor[0] != one:
            g[i] *= factor[0]

    vector = _vector(_real(dtype))
    return Kernel("scale", scale, (vector, vector), geometry.threads)


@functools.cache
def sgd_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``p -= lr (scale g)``: the step, with the clipping folded in; a thread an element."""
    as_real = np.dtype(dtype).type

    def sgd(p: Any, g: Any, rates: Any, factor: Any) -> None:
        i = cuda.grid(1)
        if i < p.shape[0]:
            p[i] -= as_real(rates[0]) * (factor[0] * g[i])

    vector = _vector(_real(dtype))
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

    vector = _vector(_real(dtype))
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
        total = 0.0
        for i in range(tid, partial.shape[0], THREADS):
            total += partial[i]
        total = math.sqrt(block_sum(sums, tid, total))
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

    vector = _vector(_real(dtype))
    signature = (
        vector, vector, DOUBLES, DOUBLES, vector, vector, DOUBLES, INTS, vector, vector, I32,
    )  # fmt: skip
    return Kernel("update", update, signature, THREADS)


@functools.cache
def copy_kernel(dtype: Any, geometry: Geometry) -> Kernel:
    """``out = x``; a thread an element."""

    def copy(x: Any, out: Any) -> None:
        i = cuda.grid(1)
        if i < out.shape[0]:
            out[i] = x[i]

    vector = _vector(_real(dtype))
    return Kernel("copy", copy, (vector, vector), geometry.threads)


# --- generation ------------------------------------------------------------------------------

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
    THREADS, real = geometry.threads, _real(dtype)
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

    vector = _vector(real)
    signature = (
        vector, vector, vector, vector, vector, INTS, INTS,
        vector, vector, vector, DOUBLES, DOUBLES, INTS,
        I32, I32, F64, I32, F64, U64, U64, U64, U64,
    )  # fmt: skip
    return Kernel("generate", generate, signature, THREADS)


# --- All of them -----------------------------------------------------------------------------


def all_kernels(dtype: Any, geometry: Geometry) -> list[Kernel]:
    """Every kernel the backend can launch for ``dtype``: what a compile check goes through."""
    widths = []
    outputs = 1
    while outputs * geometry.lanes <= geometry.max_hidden:
        widths.append(outputs)
        outputs *= 2
    flags = (False, True)
    return [
        window_kernel(geometry),
        gather_kernel(dtype, geometry),
        rank_kernel(geometry),
        gather_backward_kernel(dtype, geometry),
        column_sum_kernel(dtype, geometry),
        *(pad_kernel(dtype, geometry, transposed) for transposed in flags),
        *(recurrence_kernel(dtype, geometry, w, gathers) for w in widths for gathers in flags),
        *(recurrence_backward_kernel(dtype, geometry, width) for width in widths),
        tanh_step_kernel(dtype, geometry),
        tanh_step_backward_kernel(dtype, geometry),
        gemm_kernel(dtype, geometry, False, False),
        gemm_kernel(dtype, geometry, False, True),
        gemm_kernel(dtype, geometry, True, False),
        sum_splits_kernel(dtype, geometry),
        cross_entropy_kernel(dtype, geometry),
        mean_kernel(dtype, geometry),
        set_rates_kernel(geometry),
        sum_squares_kernel(dtype, geometry),
        norm_kernel(dtype, geometry),
        scale_kernel(dtype, geometry),
        sgd_kernel(dtype, geometry),
        record_kernel(dtype, geometry),
        update_kernel(dtype, geometry),
        copy_kernel(dtype, geometry),
        generate_kernel(dtype, geometry),
    ]
