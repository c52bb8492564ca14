"""The single ops of the ``numba`` backend, on plain rows.

z, h, dh, dz ``[R, H]``, logits, dlogits ``[R, V]``; a row is a time step and a sequence,
``t B + b``.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_emitter import VECTOR_BYTES, jit
from fastrnn.backends.cpu_kernels import (
    LONG,
    backward,
    forward,
    multiply_rows,
    outer,
    pack,
    pack_square,
    pad,
    panels,
    share,
    share_rows,
    softmax,
)
from fastrnn.backends.cpu_threads import barrier, begin, end
from fastrnn.backends.cpu_vector import address, scale_rows, scatter, squares, update

CHUNK = 16384
"""Elements a partial sum of squares covers."""


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
    end(tid, nt, sync)


@jit
def _tokens_of_a_thread(tokens, V, tid, nt):
    """Which rows of dW_xh are a thread's: as many to clear and to add to as the others have."""
    counts = np.ones(V, np.int64)
    for r in range(len(tokens)):
        counts[tokens[r]] += 1
    total = V + len(tokens)
    before, first, last = 0, 0, 0
    for v in range(V):
        first += before * nt < total * tid
        last += before * nt < total * (tid + 1)
        before += counts[v]
    return first, last


@jit
def gather_backward(tid, nt, sync, dz, tokens, dW_xh, db_h):
    """Each thread owns some rows of dW_xh and adds to them in the order of time. dz ``[R, H]``.

    With few tokens it owns columns instead, which two threads then write side by side.
    """
    if not begin(tid, nt, sync):
        return
    size, like = dz.itemsize, dz.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    R, H = dz.shape
    V = len(dW_xh)
    p0, p1 = share(panels(H, size), tid, nt)
    h0, h1 = p0 * W, min(H, p1 * W)
    v0, v1, j0, j1 = 0, V, h0, h1
    if 8 * nt <= V:
        v0, v1 = _tokens_of_a_thread(tokens, V, tid, nt)
        j0, j1 = 0, H
    for v in range(v0, v1):
        dW_xh[v, j0:j1] = 0
    x, source, to = address(tokens), address(dz) + j0 * size, address(dW_xh) + j0 * size
    for r in range(R):
        if v0 <= tokens[r] < v1:
            scatter(like, 1, j1 - j0, x + r * 4, source + r * H * size, W, H, to, H)
    # All rows into one, its stride being 0: whole rows of dz come faster than columns of them.
    total = np.zeros(h1 - h0, dz.dtype)
    db_h[h0:h1] = 0
    source = address(dz) + h0 * size
    for r in range(0, R, LONG):
        total[:] = 0
        scatter(
            like, min(LONG, R - r), h1 - h0, x, source + r * H * size, W, H, address(total), 0
        )  # fmt: skip
        for j in range(h0, h1):
            db_h[j] += total[j - h0]
    end(tid, nt, sync)


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
    end(tid, nt, sync)


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
    r0, r1 = share_rows(B, tid, nt)
    multiply_rows(like, size, r0, r1, H, H, dz_at, rows * W, address(packed), 0, address(dh0), tile)
    end(tid, nt, sync)


@jit
def project(tid, nt, sync, h, W_hq, b_q, logits, h_panels, packed, bias, scratch):
    if not begin(tid, nt, sync):
        return
    size, like = W_hq.itemsize, W_hq.dtype.type(0)
    R, (H, V) = len(h), W_hq.shape
    p0, p1 = share(panels(V, size), tid, nt)
    pack(like, size, 0, H, V, address(W_hq), V, address(packed), H, 0, p0, p1)
    pad(b_q, bias, p0, p1)
    W, rows = 2 * VECTOR_BYTES // size, R | 1
    p0, p1 = share(panels(H, size), tid, nt)
    pack(like, size, 0, R, H, address(h), H, address(h_panels), rows, 0, p0, p1)
    barrier(tid, nt, sync)
    r0, r1 = share_rows(R, tid, nt)
    multiply_rows(
        like, size, r0, r1, H, V, address(h_panels), rows * W, address(packed), address(bias),
        address(logits), address(scratch[tid]),
    )  # fmt: skip
    end(tid, nt, sync)


@jit
def project_backward(
    tid, nt, sync, dlogits, h, W_hq, dh, dW_hq, db_q, h_panels, dlogits_panels, packed, scratch
):  # fmt: skip
    if not begin(tid, nt, sync):
        return
    size, like = W_hq.itemsize, W_hq.dtype.type(0)
    R, (H, V) = len(h), W_hq.shape
    W, rows = 2 * VECTOR_BYTES // size, R | 1
    h_at, dlogits_at, tile = address(h_panels), address(dlogits_panels), address(scratch[tid])
    p0, p1 = share(panels(H, size), tid, nt)
    pack(like, size, 0, R, H, address(h), H, h_at, rows, 0, p0, p1)
    p0, p1 = share(panels(V, size), tid, nt)
    pack(like, size, 0, H, V, address(W_hq), V, 0, H, address(packed), p0, p1)
    pack(like, size, 0, R, V, address(dlogits), V, dlogits_at, rows, 0, p0, p1)
    barrier(tid, nt, sync)
    r0, r1 = share_rows(R, tid, nt)
    multiply_rows(
        like, size, r0, r1, V, H, dlogits_at, rows * W, address(packed), 0, address(dh), tile
    )
    outer(
        like, size, 1, R, -1, H, V, h_at, rows * W, dlogits_at, rows * W, address(dW_hq), False,
        address(db_q), 0, tile, tid, nt,
    )  # fmt: skip
    end(tid, nt, sync)


@jit
def cross_entropy(tid, nt, sync, logits, targets, V, dlogits, losses, scratch):
    """logits, dlogits flat ``[R V]``; the losses of the rows."""
    if not begin(tid, nt, sync):
        return
    W = 2 * VECTOR_BYTES // logits.itemsize
    first, last = share(len(targets), tid, nt)
    softmax(logits, W, V, dlogits, W, V, targets, V, first, last, True, losses, scratch[tid])
    end(tid, nt, sync)


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
    end(tid, nt, sync)


@jit
def scale(tid, nt, sync, g, factor):
    if not begin(tid, nt, sync):
        return
    W = 2 * VECTOR_BYTES // g.itemsize
    first, last = share(len(g), tid, nt)
    factors = np.full(1, factor, g.dtype)
    at = address(g) + first * g.itemsize
    scale_rows(factor, 1, last - first, at, W, 0, address(factors))
    end(tid, nt, sync)


@jit
def sgd(tid, nt, sync, p, g, lr):
    if not begin(tid, nt, sync):
        return
    first, last = share(len(p), tid, nt)
    n, at = last - first, first * p.itemsize
    update(lr, 1, n, 0, address(p) + at, n, address(g) + at, n, p.dtype.type(1), lr)
    end(tid, nt, sync)
