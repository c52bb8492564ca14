"""The compiled loops of the ``numba`` backend that its ops and its training step are made of.

Matrices are panels and products are made of tiles: see :mod:`fastrnn.backends.cpu_vector`, whose
functions do the arithmetic. The loops around them are here.

**Memory.** Arrays are named by address where a tile reads them, strides in elements. A row is a
time step and a sequence, ``t B + b``. ``like`` is a scalar of the arrays' type, ``size`` its bytes.

**Caches.** What is read again soon stays in the first-level cache: the columns of weights that
several rows meet (``DEPTH`` panels' width of rows), and the rows that both sides of a sum over
examples share (``SPAN``). What is read again for every panel stays in the second-level cache.

**Threads.** Every function with ``tid, nt, sync`` is run by ``nt`` threads together: each does its
share, and barriers separate the phases. The order of every sum is the same for any number of
threads. No BLAS is called.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_emitter import L2_BYTES, MR, VECTOR_BYTES, jit
from fastrnn.backends.cpu_threads import barrier
from fastrnn.backends.cpu_vector import (
    address,
    ask,
    column_sums,
    dtanh,
    exp_rows,
    pack_strip,
    put,
    row_tops,
    scale_rows,
    squares,
    tanh,
    tile_columns,
    tile_rows,
)

DEPTH = 8
"""Panels of the inner dimension of a product that are taken at a time."""

SPAN = 144
"""Rows of a sum over examples that are taken at a time."""

LONG = 1152
"""Rows of such a sum that are added up before they join the rest: it keeps rounding small."""


# --- Shares ------------------------------------------------------------------------------------


@jit
def share(n, tid, nt):
    """The part of ``range(n)`` of thread ``tid``: start and stop."""
    return n * tid // nt, n * (tid + 1) // nt


@jit
def panels(n, size):
    """How many panels ``n`` columns need."""
    W = 2 * VECTOR_BYTES // size
    return (n + W - 1) // W


@jit
def tiles(m):
    """How many tiles ``m`` rows need; tile i starts at row ``m i // tiles``."""
    return (m + MR - 1) // MR


@jit
def share_rows(m, tid, nt):
    """A thread's part of m rows, in whole tiles: the order of a row's sum depends on its tile."""
    first, last = share(tiles(m), tid, nt)
    return m * first // tiles(m), m * last // tiles(m)


@jit
def by_columns(B, H, size, nt):
    """Whether the threads of a recurrence share the columns, and meet after every time step.

    Otherwise they share the sequences: where that is fair, and each thread's second-level cache
    holds all of W_hh.
    """
    groups = tiles(B)
    fair = groups % nt == 0 or groups >= 4 * nt
    return nt > 1 and (not fair or H * H * size > 768 * 1024)


@jit
def recurrent_share(B, H, size, tid, nt):
    """A thread's groups and panels of a recurrence."""
    if by_columns(B, H, size, nt):
        p0, p1 = share(panels(H, size), tid, nt)
        return 0, tiles(B), p0, p1
    g0, g1 = share(tiles(B), tid, nt)
    return g0, g1, 0, panels(H, size)


# --- Packing -----------------------------------------------------------------------------------


@jit
def pack(like, size, r0, r1, N, S, s_row, out, out_rows, turned, p0, p1):
    """Rows r0 … r1 of ``S [rows, N]`` into panels p0 … p1, and ``Sᵀ`` into those of turned.

    out: panels of ``out_rows`` rows. turned: panels of N rows. Both are addresses, 0 where not
    wanted; with turned, r0 is a multiple of a vector.
    """
    L = VECTOR_BYTES // size
    W = 2 * L
    for p in range(p0, p1):
        for i in range(r0, r1, L):
            to, across = 0, 0
            if out != 0:
                to = out + (p * out_rows + i) * W * size
            if turned != 0:
                across = turned + ((i // W * N + p * W) * W + i % W) * size
            pack_strip(
                like, min(L, r1 - i), min(W, N - p * W), S + (i * s_row + p * W) * size, s_row,
                to, across,
            )  # fmt: skip


@jit
def pack_square(like, size, S, out, turned, p0, p1):
    """:func:`pack` for a square array of either memory order."""
    if S.strides[1] != size:
        out, turned = turned, out
    N = len(S)
    pack(like, size, 0, N, N, address(S), N, out, N, turned, p0, p1)


@jit
def pad(source, out, p0, p1):
    """A vector into panels p0 … p1 of one row, zeros behind its end."""
    W = 2 * VECTOR_BYTES // source.itemsize
    for j in range(p0 * W, p1 * W):
        out[j] = source[j] if j < len(source) else 0


# --- Recurrence --------------------------------------------------------------------------------


@jit
def forward(
    like, size, T, B, H, packed, bias, S, s_panel, slots, grouped, Z, z_row, tokens, D, d_row, tid,
    nt, sync
):  # fmt: skip
    """``h_t = tanh(z_t + bias + h_{t-1} W_hh)``.

    packed: W_hh in panels. bias: a panelled row, or 0. S: ``slots`` states in panels; h_{t-1} lies
    at slot ``t % slots``, so slot 0 starts with h0. grouped: whether S and tokens go by groups.
    Z: rows ``z_t``, or one for each token where tokens (int32) is not 0. D: h as rows, or 0.
    """
    W = 2 * VECTOR_BYTES // size
    g0, g1, p0, p1 = recurrent_share(B, H, size, tid, nt)
    groups = tiles(B)
    for t in range(T):
        old, new = t % slots, (t + 1) % slots
        for p in range(p0, p1):
            init = 0
            if bias != 0:
                init = bias + p * W * size
            for g in range(g0, g1):
                b = B * g // groups
                rows = B * (g + 1) // groups - b
                base, step, r = b, B, t * B + b
                if grouped:
                    base, step, r = b * slots, rows, b * T + t * rows
                z, names, copy = Z + p * W * size, 0, 0
                if tokens != 0:
                    names = tokens + r * 4
                else:
                    z += r * z_row * size
                # What follows the product comes from far; it arrives meanwhile.
                ask(like, rows, z, z_row, names)
                out = S + (p * s_panel + base + new * step) * W * size
                tile_rows(
                    like, rows, S + (base + old * step) * W * size, s_panel * W, H,
                    packed + p * H * W * size, init, 0, out,
                )  # fmt: skip
                if D != 0:
                    copy = D + (r * d_row + p * W) * size
                tanh(like, rows, min(W, H - p * W), out, z, z_row, names, out, W, copy, d_row)
        if by_columns(B, H, size, nt):
            barrier(tid, nt, sync)


@jit
def backward(
    like, size, first, last, known, T, B, H, packed, G, Y, S, grouped, g_panel, y_panel, s_panel,
    row, D, tile, tid, nt, sync
):  # fmt: skip
    """``dz_t = (dh_t + dz_{t+1} W_hhᵀ)(1 - h_t²)`` for t from last - 1 down to first.

    packed: W_hhᵀ in panels. G: dh. Y: h. S: dz in panels, from dz_first on; G may be the same.
    grouped: all of them are panels and go by groups, and Y starts with h0; else G and Y are rows.
    row: elements between the rows of G, Y and D. known: whether dz_last is there, else it is zero.
    D: dz as rows, or 0. tile: scratch.
    """
    W = 2 * VECTOR_BYTES // size
    g0, g1, p0, p1 = recurrent_share(B, H, size, tid, nt)
    groups = tiles(B)
    for t in range(last - 1, first - 1, -1):
        K = H if known or t < last - 1 else 0
        for p in range(p0, p1):
            for g in range(g0, g1):
                b = B * g // groups
                rows = B * (g + 1) // groups - b
                base, step, r = b, B, t * B + b
                y = r
                if grouped:
                    base, step, r = b * T, rows, b * T + t * rows
                    y = r + b + rows
                dh, h = G + (p * g_panel + r * row) * size, Y + (p * y_panel + y * row) * size
                ask(like, rows, dh, row, 0)
                ask(like, rows, h, row, 0)
                out = S + (p * s_panel + base + (t - first) * step) * W * size
                tile_rows(
                    like, rows, S + (base + (t + 1 - first) * step) * W * size, s_panel * W, K,
                    packed + p * H * W * size, 0, 0, tile,
                )  # fmt: skip
                copy = 0
                if D != 0:
                    copy = D + (r * row + p * W) * size
                dtanh(
                    like, rows, min(W, H - p * W), tile, dh, row, h, row, out, W, copy, row,
                )  # fmt: skip
        if by_columns(B, H, size, nt):
            barrier(tid, nt, sync)


# --- Products ----------------------------------------------------------------------------------


@jit
def multiply(like, size, R, i0, i1, K, N, A, a_panel, packed, bias, C, c_panel):
    """``C = A · packed + bias`` in panels, for tiles i0 … i1 of R rows. bias: panelled, or 0."""
    W = 2 * VECTOR_BYTES // size
    depth, count = panels(K, size), tiles(R)
    parts = (depth + DEPTH - 1) // DEPTH
    for part in range(parts):
        k = depth * part // parts * W
        left = min(K, depth * (part + 1) // parts * W) - k
        for p in range(panels(N, size)):
            end = R * i0 // count
            for i in range(i0, i1):
                r, end = end, R * (i + 1) // count
                out = C + (p * c_panel + r * W) * size
                init, init_row = out, W
                if part == 0:
                    init, init_row = 0, 0
                    if bias != 0:
                        init = bias + p * W * size
                tile_rows(
                    like, end - r, A + (k // W * a_panel + r * W) * size, a_panel,
                    left, packed + (p * K + k) * W * size, init, init_row, out,
                )  # fmt: skip


@jit
def multiply_rows(like, size, r0, r1, K, N, A, a_panel, packed, bias, C, block):
    """``C = A · packed + bias`` for rows r0 … r1, C in rows. block: scratch of SPAN rows."""
    W = 2 * VECTOR_BYTES // size
    # As many rows of A at a time as stay in the second-level cache.
    most = max(48, min(SPAN, L2_BYTES // 2 // (K * size)))
    blocks = (r1 - r0 + most - 1) // most
    for i in range(blocks):
        r = r0 + (r1 - r0) * i // blocks
        rows = r0 + (r1 - r0) * (i + 1) // blocks - r
        for p in range(panels(N, size)):
            n, here = min(W, N - p * W), 0
            if bias != 0:
                here = bias + p * W * size
            multiply(
                like, size, rows, 0, tiles(rows), K, n, A + r * W * size, a_panel,
                packed + p * K * W * size, here, block, 0,
            )  # fmt: skip
            put(like, rows, n, block, C + (r * N + p * W) * size, N, 0, 0)


@jit
def outer(
    like, size, T, B, slot, M, N, A, a_panel, E, e_panel, C, adds, sums, partial, block, tid, nt
):  # fmt: skip
    """``C [M, N] (+)= Σ_r A[r, :]ᵀ E[r, :]`` over T·B rows of two panelled matrices.

    slot: -1, or both go by groups, and A has a time step more than E, of which slot 0 is the first
    and 1 the second to take part. sums: ``Σ_r E[r, :]``, or 0. partial: double, the sums of squares
    of C's blocks and then of the panels of sums, or 0. block: scratch.
    """
    W = 2 * VECTOR_BYTES // size
    e_panels, units = panels(N, size), panels(M, size) * panels(N, size)
    groups, tallest = 1, B
    if slot >= 0:
        groups = tiles(B)
        tallest = (B + groups - 1) // groups
    # Spans of rows, as many in each group; chunks of them, after each of which C is added up.
    spans = (T * tallest + SPAN - 1) // SPAN
    chunks = (T * B + LONG - 1) // LONG
    # A thread has rows of C: some panels of A.
    first, last = share(units, tid, nt)
    q0, q1 = first // e_panels, (last + e_panels - 1) // e_panels
    # As many of them at a time as stay in the second-level cache over a chunk.
    wide = max(1, L2_BYTES // 2 // (T * B // chunks * W * size))
    blocks = max(1, (q1 - q0 + wide - 1) // wide)
    for c in range(chunks):
        i0, i1 = groups * spans * c // chunks, groups * spans * (c + 1) // chunks
        for k in range(blocks):
            a0, a1 = q0 + (q1 - q0) * k // blocks, q0 + (q1 - q0) * (k + 1) // blocks
            for p in range(e_panels):
                n = min(W, N - p * W)
                if sums != 0 and c == 0 and k == 0 and p % nt == tid:
                    here = sums + p * W * size
                    column_sums(like, T * B, n, E + p * e_panel * size, W, here)
                    if partial != 0:
                        squares(like, 1, n, 0, here, n, partial + (units + p) * 8)
                for q in range(a0, a1):
                    unit = q * e_panels + p
                    if not first <= unit < last:
                        continue
                    height = min(W, M - q * W)
                    steps = tiles(height)
                    for i in range(i0, i1):
                        g, s = i // spans, i % spans
                        b = B * g // groups
                        step = B * (g + 1) // groups - b
                        r = b * T + T * step * s // spans
                        rows = b * T + T * step * (s + 1) // spans - r
                        later = 0
                        if slot >= 0:
                            later = b + slot * step
                        for j in range(steps):
                            m = height * j // steps
                            here = block + m * W * size
                            tile_columns(
                                like, height * (j + 1) // steps - m,
                                A + (q * a_panel + (r + later) * W + m) * size, rows,
                                E + (p * e_panel + r * W) * size, here if i > i0 else 0, W, here,
                            )  # fmt: skip
                    final = 0
                    if c == chunks - 1 and partial != 0:
                        final = partial + unit * 8
                    to = C + (q * W * N + p * W) * size
                    put(like, height, n, block, to, N, 1 if adds or c > 0 else 0, final)


# --- Loss --------------------------------------------------------------------------------------


@jit
def softmax(X, x_panel, x_row, D, d_panel, d_row, targets, V, r0, r1, backward, losses, stats):
    """Losses of rows r0 … r1 and, where ``backward``, their dlogits in D, else D is scratch.

    stats: scratch ``[3, MR]``.
    """
    size = X.itemsize
    like = X.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    n = len(targets)
    tops, masses, factors = stats[:MR], stats[MR : 2 * MR], stats[2 * MR : 3 * MR]
    for r in range(r0, r1, MR):
        m = min(MR, r1 - r)
        x, d = address(X) + r * x_row * size, address(D) + r * d_row * size
        row_tops(like, m, V, x, x_panel, x_row, address(tops))
        for i in range(m):
            v = targets[r + i]
            at_target = X[v // W * x_panel + (r + i) * x_row + v % W]
            losses[r + i] = np.float64(tops[i]) - np.float64(at_target)
        exp_rows(like, m, V, x, x_panel, x_row, d, d_panel, d_row, address(tops), address(masses))
        for i in range(m):
            mass = np.float64(masses[i])
            losses[r + i] += np.log(mass)
            factors[i] = 1.0 / (n * mass)
        if backward:
            scale_rows(like, m, V, d, d_panel, d_row, address(factors))
            for i in range(m):
                v = targets[r + i]
                D[v // W * d_panel + (r + i) * d_row + v % W] -= D.dtype.type(1.0 / n)
