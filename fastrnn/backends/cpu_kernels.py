"""The compiled code of the ``numba`` backend: recurrence, loss, training step, single ops.

Matrices are panels and products are made of tiles: see :mod:`fastrnn.backends.cpu_vector`, whose
functions do the arithmetic. The loops around them are here.

**Memory.** Arrays are named by address where a tile reads them, strides in elements. A row is a
time step and a sequence, ``t B + b``. ``like`` is a scalar of the arrays' type, ``size`` its bytes.

**Caches.** What is read again soon stays in the first-level cache: the columns of weights that
several rows meet (``DEPTH`` rows of a panel), and the rows that both sides of a sum over examples
share (``SPAN``). The logits of a block of rows stay in the second-level cache from the product that
makes them through the loss to the product that uses their gradient.

**Threads.** Every function with ``tid, nt, sync`` is run by ``nt`` threads together: each does its
share, and barriers separate the phases. The order of every sum is the same for any number of
threads. No BLAS is called.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_threads import barrier, begin
from fastrnn.backends.cpu_vector import (
    MR,
    VECTOR_BYTES,
    address,
    column_sums,
    dtanh,
    exp_rows,
    jit,
    pack_strip,
    put,
    row_tops,
    scale_rows,
    scatter,
    squares,
    tanh,
    tile_columns,
    tile_rows,
    update,
)

DEPTH = 8
"""Panels of the inner dimension of a product that are taken at a time."""

SPAN = 144
"""Rows of a sum over examples that are taken at a time."""

LONG = 1152
"""Rows of such a sum that are added up before they join the rest: it keeps rounding small."""

BLOCK_BYTES = 640 * 1024
"""Logits that are taken through the loss at a time, where that is between 48 and 144 rows."""


CHUNK = 16384
"""Elements a partial sum of squares covers."""


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
                out = S + (p * s_panel + base + new * step) * W * size
                tile_rows(
                    like, rows, S + (base + old * step) * W * size, s_panel * W, H,
                    packed + p * H * W * size, init, 0, out,
                )  # fmt: skip
                z, names, copy = Z + p * W * size, 0, 0
                if tokens != 0:
                    names = tokens + r * 4
                else:
                    z += r * z_row * size
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
                out = S + (p * s_panel + base + (t - first) * step) * W * size
                tile_rows(
                    like, rows, S + (base + (t + 1 - first) * step) * W * size, s_panel * W, K,
                    packed + p * H * W * size, 0, 0, tile,
                )  # fmt: skip
                copy = 0
                if D != 0:
                    copy = D + (r * row + p * W) * size
                dtanh(
                    like, rows, min(W, H - p * W), tile, G + (p * g_panel + r * row) * size, row,
                    Y + (p * y_panel + y * row) * size, row, out, W, copy, row,
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
def multiply_rows(like, size, r0, r1, K, N, A, a_panel, packed, bias, C, tile):
    """``C = A · packed + bias`` for rows r0 … r1, ``C [R, N]`` in rows."""
    W = 2 * VECTOR_BYTES // size
    count = tiles(r1 - r0)
    for p in range(panels(N, size)):
        init = 0
        if bias != 0:
            init = bias + p * W * size
        for j in range(count):
            r = r0 + (r1 - r0) * j // count
            rows = r0 + (r1 - r0) * (j + 1) // count - r
            tile_rows(
                like, rows, A + r * W * size, a_panel, K, packed + p * K * W * size, init, 0, tile
            )
            put(like, rows, min(W, N - p * W), tile, C + (r * N + p * W) * size, N, 0, 0)


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
    a_panels, groups = panels(M, size), 1
    if slot >= 0:
        groups = tiles(B)
    # A thread has rows of C, and takes them panel by panel of E.
    e_panels = panels(N, size)
    units = a_panels * e_panels
    first, last = share(units, tid, nt)
    q0 = first // e_panels
    width = max(1, (last + e_panels - 1) // e_panels - q0)
    for i in range(e_panels * width):
        p, q = i // width, q0 + i % width
        unit = q * e_panels + p
        n, height = min(W, N - p * W), min(W, M - q * W)
        if q == q0 and sums != 0 and p % nt == tid:
            here = sums + p * W * size
            column_sums(like, T * B, n, E + p * e_panel * size, W, here)
            if partial != 0:
                squares(like, 1, n, 0, here, n, partial + (units + p) * 8)
        if not first <= unit < last:
            continue
        to = C + (q * W * N + p * W) * size
        held, more = 0, 1 if adds else 0
        for g in range(groups):
            b = B * g // groups
            R, later = T * (B * (g + 1) // groups - b), 0
            if slot >= 0:
                later = b + slot * (B * (g + 1) // groups - b)
            spans = (R + SPAN - 1) // SPAN
            for s in range(spans):
                r, rows = b * T + R * s // spans, R * (s + 1) // spans - R * s // spans
                for m in range(0, height, MR):
                    here = block + m * W * size
                    tile_columns(
                        like, min(MR, height - m),
                        A + (q * a_panel + (r + later) * W + m) * size, rows,
                        E + (p * e_panel + r * W) * size, here if held else 0, W, here,
                    )  # fmt: skip
                held += rows
                end = g == groups - 1 and s == spans - 1
                if end or held + SPAN > LONG:
                    final = 0
                    if end and partial != 0:
                        final = partial + unit * 8
                    put(like, height, n, block, to, N, more, final)
                    held, more = 0, 1


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


# --- A training run ----------------------------------------------------------------------------


@jit
def _characters(x, mark, seen, rows):
    """The distinct tokens of a batch into ``rows``, in the order of their first use; how many.

    seen ``[V]`` has no entry equal to ``mark`` yet.
    """
    count = 0
    for r in range(len(x)):
        v = x[r]
        if seen[v] != mark:
            seen[v] = mark
            rows[count] = v
            count += 1
    return count


@jit
def run_steps(
    tid, nt, sync, tokens, starts, T, train, carry, lr, max_norm, W_xh, W_hh, b_h, W_hq, b_q,
    dW_xh, dW_hh, db_h, dW_hq, db_q, x, y, h0, h, dz, logits, packed_hh, packed_hh_t, packed_hq,
    packed_hq_t, bias_h, bias_q, h_rows, rows, scratch, losses, partial, seen, used, counts, loss,
    norm, totals
):  # fmt: skip
    """``len(starts)`` training steps, or the same without gradients and update.

    h, dz, logits: panels of ``h_rows`` (h) and ``rows`` rows; h has B rows more, for h0. scratch:
    ``[nt, …]``, of each thread. used, counts: the characters of the last batch and of this one,
    taking turns, and the number of steps so far: only their rows of dW_xh are not zero. Without
    ``train`` the sum of the losses is added to ``totals[0]`` and nothing else changes but ``h0``
    with ``carry``.
    """
    if not begin(tid, nt, sync):
        return
    size, like = W_xh.itemsize, W_xh.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    B, (V, H) = starts.shape[1], W_xh.shape
    R = T * B
    H_panels, V_panels = panels(H, size), panels(V, size)
    hp0, hp1 = share(H_panels, tid, nt)
    vp0, vp1 = share(V_panels, tid, nt)
    # The hidden units and characters of a thread: its rows of W_hh and W_hq.
    j0, j1 = min(H, hp0 * W), min(H, hp1 * W)
    v0, v1 = min(V, vp0 * W), min(V, vp1 * W)
    h_panel, panel = h_rows * W, rows * W
    h_at, dz_at, logits_at = address(h), address(dz), address(logits)
    tile, stats = address(scratch[tid]), scratch[tid, max(W, MR) * W :]
    # Where the sums of squares of each gradient's blocks lie.
    of_hh = V_panels * (H_panels + 1)
    of_xh = of_hh + H_panels * (H_panels + 1)
    squares_at = address(partial)
    # A thread's tiles of the examples: those of its sequences, or a share of all.
    groups = tiles(B)
    g0, g1, _, _ = recurrent_share(B, H, size, tid, nt)
    shared = by_columns(B, H, size, nt)
    i0, i1, total_tiles = 0, 0, 0
    for g in range(groups):
        if g == g0:
            i0 = total_tiles
        total_tiles += tiles(T * (B * (g + 1) // groups - B * g // groups))
        if g == g1 - 1:
            i1 = total_tiles
    if shared:
        i0, i1 = share(total_tiles, tid, nt)
    block = max(48, min(SPAN, BLOCK_BYTES // (V * size))) // MR
    for step in range(len(starts)):
        mark = counts[2] + 1
        old = mark & 1
        # Weights into panels; the batch; the first state.
        if step == 0 or train:
            turned_hh, turned_hq = 0, 0
            if train:
                turned_hh, turned_hq = address(packed_hh_t), address(packed_hq_t)
            pack(
                like, size, j0, j1, H, address(W_hh), H, address(packed_hh), H, turned_hh,
                0, H_panels,
            )  # fmt: skip
            pack(
                like, size, j0, j1, V, address(W_hq), V, address(packed_hq), H, turned_hq,
                0, V_panels,
            )  # fmt: skip
            pad(b_h, bias_h, hp0, hp1)
            pad(b_q, bias_q, vp0, vp1)
        t0, t1 = share(T, tid, nt)
        for g in range(groups):
            b = B * g // groups
            height = B * (g + 1) // groups - b
            pack(
                like, size, 0, height, H, address(h0) + b * H * size, H,
                h_at + b * (T + 1) * W * size, h_rows, 0, hp0, hp1,
            )  # fmt: skip
            for t in range(t0, t1):
                for i in range(height):
                    at = starts[step, b + i] + t
                    x[b * T + t * height + i] = tokens[at]
                    y[b * T + t * height + i] = tokens[at + 1]
        barrier(tid, nt, sync)
        if tid == 0 and train:
            counts[2] = mark
            counts[1 - old] = _characters(x, mark, seen, used[1 - old])
        forward(
            like, size, T, B, H, address(packed_hh), address(bias_h), h_at, h_rows, T + 1, True,
            address(W_xh), H, address(x), 0, 0, tid, nt, sync,
        )  # fmt: skip
        # Logits, loss, dlogits and dh of a block of rows while they are in the cache.
        before = 0
        for g in range(groups):
            b = B * g // groups
            height = B * (g + 1) // groups - b
            # Rows of this group in dz and logits; in h they come after those of h0.
            r, R_g = b * T, T * height
            count = tiles(R_g)
            c0, c1 = max(i0 - before, 0), min(i1 - before, count)
            before += count
            blocks = (max(0, c1 - c0) + block - 1) // block
            h_g = h_at + (r + b + height) * W * size
            logits_g, dz_g = logits_at + r * W * size, dz_at + r * W * size
            for i in range(blocks):
                a0, a1 = c0 + (c1 - c0) * i // blocks, c0 + (c1 - c0) * (i + 1) // blocks
                multiply(
                    like, size, R_g, a0, a1, H, V, h_g, h_panel, address(packed_hq),
                    address(bias_q), logits_g, panel,
                )  # fmt: skip
                softmax(
                    logits, panel, W, logits, panel, W, y, V, r + R_g * a0 // count,
                    r + R_g * a1 // count, train, losses, stats,
                )  # fmt: skip
                if train:
                    multiply(
                        like, size, R_g, a0, a1, V, H, logits_g, panel, address(packed_hq_t), 0,
                        dz_g, panel,
                    )  # fmt: skip
        if train:
            if shared:
                barrier(tid, nt, sync)
            backward(
                like, size, 0, T, False, T, B, H, address(packed_hh_t), dz_at, h_at, dz_at, True,
                panel, h_panel, rows, W, 0, tile, tid, nt, sync,
            )  # fmt: skip
        barrier(tid, nt, sync)
        if tid == 0:
            total = 0.0
            for r in range(R):
                total += losses[r]
            loss[0] = total / R
            if not train:
                totals[0] += loss[0]
        if train:
            outer(
                like, size, T, B, 1, H, V, h_at, h_panel, logits_at, panel, address(dW_hq), False,
                address(db_q), squares_at, tile, tid, nt,
            )  # fmt: skip
            outer(
                like, size, T, B, 0, H, H, h_at, h_panel, dz_at, panel, address(dW_hh), False,
                address(db_h), squares_at + of_hh * 8, tile, tid, nt,
            )  # fmt: skip
            # The rows of W_xh: only those of the batch's characters have a gradient.
            names = address(used[1 - old])
            for i in range(counts[old]):
                dW_xh[used[old, i], j0:j1] = 0
            count = counts[1 - old]
            for p in range(hp0, hp1):
                n, at = min(W, H - p * W), address(dW_xh) + p * W * size
                scatter(like, R, n, address(x), dz_at + p * panel * size, W, at, H)
                squares(like, count, n, names, at, H, squares_at + (of_xh + p) * 8)
            barrier(tid, nt, sync)
            total = 0.0
            for i in range(len(partial)):
                total += partial[i]
            rounded = W_xh.dtype.type(np.sqrt(total))
            factor = W_xh.dtype.type(1)
            if np.float64(rounded) > max_norm:
                factor = W_xh.dtype.type(max_norm / np.float64(rounded))
            rate = W_xh.dtype.type(lr)
            at, n = j0 * size, j1 - j0
            p_at, g_at = address(W_xh) + at, address(dW_xh) + at
            update(like, count, n, names, p_at, H, g_at, H, factor, rate)
            p_at, g_at = address(b_h) + at, address(db_h) + at
            update(like, 1, n, 0, p_at, n, g_at, n, factor, rate)
            p_at, g_at = address(W_hh) + at * H, address(dW_hh) + at * H
            update(like, 1, n * H, 0, p_at, n, g_at, n, factor, rate)
            p_at, g_at = address(W_hq) + at * V, address(dW_hq) + at * V
            update(like, 1, n * V, 0, p_at, n, g_at, n, factor, rate)
            at, n = v0 * size, v1 - v0
            p_at, g_at = address(b_q) + at, address(db_q) + at
            update(like, 1, n, 0, p_at, n, g_at, n, factor, rate)
            if tid == 0:
                norm[0] = rounded
                totals[0] += loss[0]
                totals[1] += rounded
                totals[2] += 1.0
                if not (np.isfinite(loss[0]) and np.isfinite(rounded)):
                    totals[3] += 1.0
        if carry:
            for g in range(groups):
                b = B * g // groups
                height = B * (g + 1) // groups - b
                for i in range(height):
                    at = (b * (T + 1) + T * height + i) * W
                    for j in range(j0, j1):
                        h0[b + i, j] = h[j // W * h_panel + at + j % W]
    barrier(tid, nt, sync)


# --- Single ops --------------------------------------------------------------------------------
# Here matrices are plain rows: z, h, dh, dz ``[R, H]``, logits, dlogits ``[R, V]``.


@jit
def window(tokens, starts, x, y):
    for t in range(len(x)):
        for b in range(len(starts)):
            x[t, b] = tokens[starts[b] + t]
            y[t, b] = tokens[starts[b] + t + 1]


@jit
def gather(tid, nt, sync, W_xh, tokens, b_h, z):
    if not begin(tid, nt, sync):
        return
    first, last = share(len(tokens), tid, nt)
    for r in range(first, last):
        x = tokens[r]
        for j in range(len(b_h)):
            z[r, j] = W_xh[x, j] + b_h[j]
    barrier(tid, nt, sync)


@jit
def gather_backward(tid, nt, sync, dz, tokens, dW_xh, db_h):
    """Each thread owns some columns and adds rows in the order of time. dz ``[R, H]``."""
    if not begin(tid, nt, sync):
        return
    size, like = dz.itemsize, dz.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    R, H = dz.shape
    p0, p1 = share(panels(H, size), tid, nt)
    for v in range(len(dW_xh)):
        for j in range(p0 * W, min(H, p1 * W)):
            dW_xh[v, j] = 0
    for p in range(p0, p1):
        n, at = min(W, H - p * W), p * W * size
        scatter(like, R, n, address(tokens), address(dz) + at, H, address(dW_xh) + at, H)
        column_sums(like, R, n, address(dz) + at, H, address(db_h) + at)
    barrier(tid, nt, sync)


@jit
def recurrence(tid, nt, sync, B, z, W_hh, h0, h, packed, states):
    """states: panels of 2 B rows."""
    if not begin(tid, nt, sync):
        return
    size, like = W_hh.itemsize, W_hh.dtype.type(0)
    R, H = z.shape
    p0, p1 = share(panels(H, size), tid, nt)
    pack_square(like, size, W_hh, address(packed), 0, p0, p1)
    pack(like, size, 0, B, H, address(h0), H, address(states), 2 * B, 0, p0, p1)
    barrier(tid, nt, sync)
    forward(
        like, size, R // B, B, H, address(packed), 0, address(states), 2 * B, 2, False, address(z),
        H, 0, address(h), H, tid, nt, sync,
    )  # fmt: skip
    barrier(tid, nt, sync)


@jit
def recurrence_backward(
    tid, nt, sync, B, dh, h, W_hh, h0, dz, dW_hh, dh0, packed, span, h_panels, dz_panels, scratch
):  # fmt: skip
    """``span`` time steps at a time; dW_hh only if it has elements.

    h_panels, dz_panels: panels of ``(span + 1) B`` rows: the states before those time steps, and
    their dz, after which lies the dz of the time step that follows.
    """
    if not begin(tid, nt, sync):
        return
    size, like = W_hh.itemsize, W_hh.dtype.type(0)
    R, H = h.shape
    T, W = R // B, 2 * VECTOR_BYTES // size
    rows = (span + 1) * B
    p0, p1 = share(panels(H, size), tid, nt)
    tile = address(scratch[tid])
    pack_square(like, size, W_hh, 0, address(packed), p0, p1)
    h_at, dz_at = address(h_panels), address(dz_panels)
    barrier(tid, nt, sync)
    last = T
    while last > 0:
        first = max(0, last - span)
        n = (last - first) * B
        if last < T:
            # The dz of time step last, to where this span looks for it.
            for p in range(p0, p1):
                for i in range(B * W):
                    dz_panels[(p * rows + n) * W + i] = dz_panels[p * rows * W + i]
            barrier(tid, nt, sync)
        backward(
            like, size, first, last, last < T, T, B, H, address(packed), address(dh), address(h),
            dz_at, False, W, W, rows, H, address(dz), tile, tid, nt, sync,
        )  # fmt: skip
        if dW_hh.size > 0:
            r, to = first * B, h_at
            if first == 0:
                pack(like, size, 0, B, H, address(h0), H, h_at, rows, 0, p0, p1)
                r, to = B, h_at + B * W * size
            pack(
                like, size, 0, last * B - r, H, address(h) + (r - B) * H * size, H, to, rows, 0, p0,
                p1,
            )  # fmt: skip
            barrier(tid, nt, sync)
            outer(
                like, size, 1, n, -1, H, H, h_at, rows * W, dz_at, rows * W, address(dW_hh),
                last < T, 0, 0, tile, tid, nt,
            )  # fmt: skip
        last = first
        barrier(tid, nt, sync)
    first, last = share(tiles(B), tid, nt)
    first, last = B * first // tiles(B), B * last // tiles(B)
    if first < last:
        multiply_rows(
            like, size, first, last, H, H, dz_at, rows * W, address(packed), 0, address(dh0), tile
        )
    barrier(tid, nt, sync)


@jit
def project(tid, nt, sync, h, W_hq, b_q, logits, h_panels, packed, bias, scratch):
    if not begin(tid, nt, sync):
        return
    size, like = W_hq.itemsize, W_hq.dtype.type(0)
    R, (H, V) = len(h), W_hq.shape
    p0, p1 = share(panels(V, size), tid, nt)
    pack(like, size, 0, H, V, address(W_hq), V, address(packed), H, 0, p0, p1)
    pad(b_q, bias, p0, p1)
    p0, p1 = share(panels(H, size), tid, nt)
    pack(like, size, 0, R, H, address(h), H, address(h_panels), R, 0, p0, p1)
    barrier(tid, nt, sync)
    _by_blocks(
        like, size, R, H, V, address(h_panels), address(packed), address(bias), address(logits),
        address(scratch[tid]), tid, nt,
    )  # fmt: skip
    barrier(tid, nt, sync)


@jit
def _by_blocks(like, size, R, K, N, A, packed, bias, C, tile, tid, nt):
    """:func:`multiply_rows` for a thread's share of R rows, blocks of them at a time."""
    W = 2 * VECTOR_BYTES // size
    first, last = share(tiles(R), tid, nt)
    blocks = (last - first + 17) // 18
    for i in range(blocks):
        j0, j1 = first + (last - first) * i // blocks, first + (last - first) * (i + 1) // blocks
        multiply_rows(
            like, size, R * j0 // tiles(R), R * j1 // tiles(R), K, N, A, R * W, packed, bias, C,
            tile,
        )  # fmt: skip


@jit
def project_backward(
    tid, nt, sync, dlogits, h, W_hq, dh, dW_hq, db_q, h_panels, dlogits_panels, packed, scratch
):  # fmt: skip
    if not begin(tid, nt, sync):
        return
    size, like = W_hq.itemsize, W_hq.dtype.type(0)
    R, (H, V) = len(h), W_hq.shape
    W = 2 * VECTOR_BYTES // size
    h_at, dlogits_at, tile = address(h_panels), address(dlogits_panels), address(scratch[tid])
    p0, p1 = share(panels(H, size), tid, nt)
    pack(like, size, 0, R, H, address(h), H, h_at, R, 0, p0, p1)
    p0, p1 = share(panels(V, size), tid, nt)
    pack(like, size, 0, H, V, address(W_hq), V, 0, H, address(packed), p0, p1)
    pack(like, size, 0, R, V, address(dlogits), V, dlogits_at, R, 0, p0, p1)
    barrier(tid, nt, sync)
    _by_blocks(like, size, R, V, H, dlogits_at, address(packed), 0, address(dh), tile, tid, nt)
    outer(
        like, size, 1, R, -1, H, V, h_at, R * W, dlogits_at, R * W, address(dW_hq), False,
        address(db_q), 0, tile, tid, nt,
    )  # fmt: skip
    barrier(tid, nt, sync)


@jit
def cross_entropy(tid, nt, sync, logits, targets, V, dlogits, losses, scratch):
    """logits, dlogits flat ``[R V]``; the losses of the rows."""
    if not begin(tid, nt, sync):
        return
    W = 2 * VECTOR_BYTES // logits.itemsize
    first, last = share(len(targets), tid, nt)
    softmax(logits, W, V, dlogits, W, V, targets, V, first, last, True, losses, scratch[tid])
    barrier(tid, nt, sync)


@jit
def sum_of_squares(tid, nt, sync, g, partial):
    """g flat; partial: one sum a chunk of ``CHUNK`` elements, whatever the number of threads."""
    if not begin(tid, nt, sync):
        return
    like = g.dtype.type(0)
    first, last = share(len(partial), tid, nt)
    for c in range(first, last):
        n = min(CHUNK, len(g) - c * CHUNK)
        squares(like, 1, n, 0, address(g) + c * CHUNK * g.itemsize, n, address(partial) + c * 8)
    barrier(tid, nt, sync)


@jit
def scale(tid, nt, sync, g, factor):
    if not begin(tid, nt, sync):
        return
    W = 2 * VECTOR_BYTES // g.itemsize
    first, last = share(len(g), tid, nt)
    factors = np.full(1, factor, g.dtype)
    at = address(g) + first * g.itemsize
    scale_rows(factor, 1, last - first, at, W, 0, address(factors))
    barrier(tid, nt, sync)


@jit
def sgd(tid, nt, sync, p, g, lr):
    if not begin(tid, nt, sync):
        return
    first, last = share(len(p), tid, nt)
    n, at = last - first, first * p.itemsize
    update(lr, 1, n, 0, address(p) + at, n, address(g) + at, n, p.dtype.type(1), lr)
    barrier(tid, nt, sync)
