"""The training step of the ``numba`` backend, all of it in one compiled function.

The logits of a block of rows stay in the second-level cache from the product that makes them
through the loss to the product that uses their gradient.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_emitter import MR, VECTOR_BYTES, jit
from fastrnn.backends.cpu_kernels import (
    SPAN,
    backward,
    by_columns,
    forward,
    multiply,
    outer,
    pack,
    pad,
    panels,
    recurrent_share,
    share,
    softmax,
    tiles,
)
from fastrnn.backends.cpu_threads import (
    barrier,
    begin,
    end,
    finish,
    finished,
    is_finished,
    shares,
    take,
)
from fastrnn.backends.cpu_vector import address, scatter, squares, update

BLOCK_BYTES = 320 * 1024
"""Logits that are taken through the loss at a time, where that is between 48 and 72 rows."""


def blocks_of_a_group(T: int, B: int, V: int, size: int, threads: int) -> int:
    """In how many blocks the examples of a group of sequences are taken through the loss."""
    groups = -(-B // MR)
    group_tiles = -(-T * -(-B // groups) // MR)
    block = max(48, min(72, BLOCK_BYTES // (V * size))) // MR
    # Some for each thread, where there are few.
    wanted = max(-(-group_tiles // block), -(-2 * threads // groups))
    return min(group_tiles, wanted)


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
def _blocks_of_a_thread(B, H, size, per_group, tid, nt):
    """The blocks of examples that a thread takes first: of its sequences, or its share of all."""
    if by_columns(B, H, size, nt):
        return share(tiles(B) * per_group, tid, nt)
    g0, g1, _, _ = recurrent_share(B, H, size, tid, nt)
    return g0 * per_group, g1 * per_group


@jit
def run_steps(
    tid, nt, sync, tokens, starts, T, train, carry, lr, max_norm, W_xh, W_hh, b_h, W_hq, b_q,
    dW_xh, dW_hh, db_h, dW_hq, db_q, x, y, h0, h, dz, logits, packed_hh, packed_hh_t, packed_hq,
    packed_hq_t, bias_h, bias_q, h_rows, rows, scratch, losses, partial, seen, used, counts, blocks,
    parts, loss, norm, totals
):  # fmt: skip
    """``len(starts)`` training steps, or the same without gradients and update.

    h, dz, logits: panels of ``h_rows`` (h) and ``rows`` rows; h has B rows more, for h0. scratch:
    ``[nt, …]``, of each thread. used, counts: the characters of the last batch and of this one,
    taking turns, and the number of steps so far: only their rows of dW_xh are not zero; last the
    number of steps with or without training. blocks, parts: claims of the blocks of each group,
    of the threads that have their states, and of the parts of dW_hh. Without ``train`` the sum of
    the losses is added to ``totals[0]`` and nothing else changes but ``h0`` with ``carry``.
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
    tile, stats = address(scratch[tid]), scratch[tid, SPAN * W :]
    # Where the sums of squares of each gradient's blocks lie.
    of_hh = V_panels * (H_panels + 1)
    of_xh = of_hh + H_panels * (H_panels + 1)
    squares_at = address(partial)
    groups = tiles(B)
    g0, g1, _, _ = recurrent_share(B, H, size, tid, nt)
    per_group = shares(blocks[0])
    for step in range(len(starts)):
        mark, phase = counts[2] + 1, counts[3] + 1
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
        if tid == 0:
            counts[3] = phase
            if train:
                counts[2] = mark
                counts[1 - old] = _characters(x, mark, seen, used[1 - old])
        forward(
            like, size, T, B, H, address(packed_hh), address(bias_h), h_at, h_rows, T + 1, True,
            address(W_xh), H, address(x), 0, 0, tid, nt, sync,
        )  # fmt: skip
        finish(tid, phase, parts[0])
        # Logits, loss, dlogits and dh of a block of rows while they are in the cache: first of the
        # own blocks, then of those that others have not come to.
        for turn in range(nt):
            other = (tid + turn) % nt
            if not is_finished(other, phase, parts[0]):
                continue
            first, last = _blocks_of_a_thread(B, H, size, per_group, other, nt)
            for k in range(first, last):
                g, i = k // per_group, k % per_group
                if not take(i, phase, blocks[g]):
                    continue
                b = B * g // groups
                height = B * (g + 1) // groups - b
                # Rows of this group in dz and logits; in h they come after those of h0.
                r, R_g = b * T, T * height
                count = tiles(R_g)
                a0, a1 = count * i // per_group, count * (i + 1) // per_group
                h_g = h_at + (r + b + height) * W * size
                logits_g, dz_g = logits_at + r * W * size, dz_at + r * W * size
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
                finish(i, phase, blocks[g])
        for g in range(g0, g1):
            finished(phase, per_group, blocks[g])
        if train:
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
            # The rows of W_xh: only those of the batch's characters have a gradient.
            names = address(used[1 - old])
            for i in range(counts[old]):
                dW_xh[used[old, i], j0:j1] = 0
            count = counts[1 - old]
            scatter(
                like, R, j1 - j0, address(x), dz_at + hp0 * panel * size, panel, W,
                address(dW_xh) + j0 * size, H,
            )  # fmt: skip
            for p in range(hp0, hp1):
                n, at = min(W, H - p * W), address(dW_xh) + p * W * size
                squares(like, count, n, names, at, H, squares_at + (of_xh + p) * 8)
            # Last what is in small parts, for whoever is there.
            units = shares(parts[1])
            for i in range(units):
                if take(i, mark, parts[1]):
                    outer(
                        like, size, T, B, 0, H, H, h_at, h_panel, dz_at, panel, address(dW_hh),
                        False, address(db_h), squares_at + of_hh * 8, tile, i, units,
                    )  # fmt: skip
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
    end(tid, nt, sync)
