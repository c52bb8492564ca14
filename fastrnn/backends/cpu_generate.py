"""Generation of the ``numba`` backend: the compiled loop over characters, and the choice of one."""
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_kernels import pack, pad, panels, share, tiles
from fastrnn.backends.cpu_threads import barrier, begin
from fastrnn.backends.cpu_vector import VECTOR_BYTES, address, arg_max, jit, tanh, tile_rows
from fastrnn.decoding import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1


@jit
def uniform(seed, sequence, position):
    """:func:`fastrnn.decoding.uniform`; seed: uint64."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = seed & mask, seed >> half
    c0, c1 = np.uint64(position) & mask, np.uint64(sequence) & mask
    c2, c3 = np.uint64(0), np.uint64(0)
    for _ in range(PHILOX_ROUNDS):
        p0 = np.uint64(PHILOX_M0) * c0
        p1 = np.uint64(PHILOX_M1) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(PHILOX_W0)) & mask
        k1 = (k1 + np.uint64(PHILOX_W1)) & mask
    return np.float64(c0 >> np.uint64(8)) * 2.0**-24


@jit
def _choose(logits, temperature, top_k, top_p, u, weights):
    """:func:`fastrnn.decoding.choose` for a temperature above zero; weights: float64 scratch."""
    V = len(logits)
    top = np.float64(logits[0])
    for v in range(V):
        top = max(top, np.float64(logits[v]))
    for v in range(V):
        weights[v] = np.exp((np.float64(logits[v]) - top) / temperature)
    if 0 < top_k < V or top_p < 1.0:
        order = np.argsort(-logits, kind="mergesort")  # stable: ties to the lowest index
        kept = V
        if 0 < top_k < V:
            kept = top_k
        if top_p < 1.0:
            total = 0.0
            for i in range(kept):
                total += weights[order[i]]
            enough, mass = top_p * total, 0.0
            for i in range(kept):
                mass += weights[order[i]]
                if mass >= enough:
                    kept = i + 1
                    break
        for i in range(kept, V):
            weights[order[i]] = 0.0
    total = 0.0
    for v in range(V):
        total += weights[v]
    threshold, mass, last = u * total, 0.0, 0
    for v in range(V):
        mass += weights[v]
        if weights[v] > 0.0:
            last = v
            if mass > threshold:
                return v
    return last


@jit
def generate(
    tid, nt, sync, W_xh, W_hh, b_h, W_hq, b_q, prefix, lengths, h, temperature, top_k, top_p,
    seed, sequence, position, tokens, packed_hh, packed_hq, bias_h, bias_q, states, logits, row,
    weights, fed, best, where
):  # fmt: skip
    """Continue S sequences; h ``[S, H]`` is the state before and after.

    states: panels of 2 S rows; logits: panels of S rows. row, weights ``[nt, V]``, fed, best,
    where ``[nt, S]``: of each thread. With few sequences the threads share the columns of each,
    otherwise each thread has its own sequences and they never meet.
    """
    if not begin(tid, nt, sync):
        return
    size, like = W_hh.itemsize, W_hh.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    V, H = W_xh.shape
    S, P = prefix.shape
    N = tokens.shape[1]
    hp0, hp1 = share(panels(H, size), tid, nt)
    vp0, vp1 = share(panels(V, size), tid, nt)
    hh_at, hq_at, states_at = address(packed_hh), address(packed_hq), address(states)
    pack(like, size, H, H, address(W_hh), H, hh_at, H, 0, hp0, hp1)
    pack(like, size, H, V, address(W_hq), V, hq_at, H, 0, vp0, vp1)
    pad(b_h, bias_h, hp0, hp1)
    pad(b_q, bias_q, vp0, vp1)
    pack(like, size, S, H, address(h), H, states_at, 2 * S, 0, hp0, hp1)
    barrier(tid, nt, sync)
    shared = nt > 1 and 4 * nt > S
    s0, s1 = 0, S
    if not shared:
        s0, s1 = share(S, tid, nt)
        hp0, hp1, vp0, vp1 = 0, panels(H, size), 0, panels(V, size)
    width = max(0, min(V, vp1 * W) - vp0 * W)
    count = tiles(s1 - s0)
    names, mine = fed[tid], address(fed[tid])
    old, new = states_at, states_at + S * W * size
    for i in range(P + N - 1):
        # Feed the prefix, then what was chosen last.
        for s in range(s0, s1):
            names[s] = prefix[s, i] if i < P else tokens[s, i - P]
        for p in range(hp0, hp1):
            for j in range(count):
                s = s0 + (s1 - s0) * j // count
                rows = s0 + (s1 - s0) * (j + 1) // count - s
                out = new + (p * 2 * S + s) * W * size
                tile_rows(
                    like, rows, old + s * W * size, 2 * S * W, H, hh_at + p * H * W * size,
                    address(bias_h) + p * W * size, 0, out,
                )  # fmt: skip
                tanh(
                    like, rows, min(W, H - p * W), out, address(W_xh) + p * W * size, H,
                    mine + s * 4, out, W, 0, 0,
                )  # fmt: skip
            if i < P:
                a, b = (old - states_at) // size, (new - states_at) // size
                for s in range(s0, s1):
                    if i >= lengths[s]:
                        for k in range((p * 2 * S + s) * W, (p * 2 * S + s + 1) * W):
                            states[b + k] = states[a + k]
        old, new = new, old
        if shared:
            barrier(tid, nt, sync)
        if i < P - 1:
            continue
        # Logits, and the next token from them.
        step = i - (P - 1)
        for p in range(vp0, vp1):
            for j in range(count):
                s = s0 + (s1 - s0) * j // count
                tile_rows(
                    like, s0 + (s1 - s0) * (j + 1) // count - s, old + s * W * size, 2 * S * W, H,
                    hq_at + p * H * W * size, address(bias_q) + p * W * size, 0,
                    address(logits) + (p * S + s) * W * size,
                )  # fmt: skip
        if temperature == 0.0:
            for s in range(s0, s1):
                arg_max(
                    like, width, address(logits) + (vp0 * S + s) * W * size, S * W,
                    address(where) + (tid * S + s) * 8, address(best) + (tid * S + s) * size,
                )  # fmt: skip
                where[tid, s] += vp0 * W
            if shared:
                barrier(tid, nt, sync)
            for s in range(s0, s1):
                first = 0 if shared else tid
                chosen, top = where[first, s], best[first, s]
                if shared:
                    for other in range(1, nt):
                        if best[other, s] > top:
                            chosen, top = where[other, s], best[other, s]
                tokens[s, step] = chosen
            # Nobody overwrites best before all have read it: the state's barrier lies between.
        else:
            first, last = s0, s1
            if shared:
                barrier(tid, nt, sync)
                first, last = share(S, tid, nt)
            for s in range(first, last):
                for v in range(V):
                    row[tid, v] = logits[((v // W) * S + s) * W + v % W]
                u = uniform(seed, sequence + s, position + step)
                tokens[s, step] = _choose(row[tid], temperature, top_k, top_p, u, weights[tid])
            if shared:
                barrier(tid, nt, sync)
    at = (old - states_at) // size
    for p in range(hp0, hp1):
        for s in range(s0, s1):
            for j in range(min(W, H - p * W)):
                h[s, p * W + j] = states[at + (p * 2 * S + s) * W + j]
    barrier(tid, nt, sync)
