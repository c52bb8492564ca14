"""Generation of the ``numba`` backend: the compiled loop over characters, and the choice of one."""
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_emitter import VECTOR_BYTES, jit
from fastrnn.backends.cpu_kernels import pack, pad, panels, share, tiles
from fastrnn.backends.cpu_threads import barrier, begin, end, finish, finished, take
from fastrnn.backends.cpu_vector import address, arg_max, exp_rows, tanh, tile_rows
from fastrnn.decoding import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

BINS = 512
"""Of scores, to find the largest ones without sorting all."""


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
def _weigh(n, scores, weights):
    """``weights = exp(scores)`` for n scores <= 0, and their sum; weights has room for two more."""
    weights[n] = 0.0
    W = 2 * VECTOR_BYTES // 8
    x, out = address(scores), address(weights)
    exp_rows(weights[n], 1, n, x, W, 0, out, W, 0, out + n * 8, out + (n + 1) * 8)
    return weights[n + 1]


@jit
def _keep_leading(n, tokens, scores, weights, goal, bins, bin_of, edge):
    """Keep of n tokens, in ascending order, those with the largest scores; how many.

    As many as it takes for their weights, or where weights is empty their number, to come to
    ``goal``; ties go to the lowest token. Only the bin where that happens is sorted.
    """
    lowest = 0.0
    for i in range(n):
        lowest = min(lowest, scores[tokens[i]])
    last = len(bins) - 1
    # The last bin takes all from 64 below the largest: their weights are as good as nothing.
    scale = last / max(min(-lowest, 64.0), 1e-300)
    bins[:] = 0.0
    for i in range(n):
        v = tokens[i]
        depth = -scores[v] * scale
        b = int(depth) if depth < last else last  # NaN: last
        bin_of[i] = b
        bins[b] += weights[v] if len(weights) > 0 else 1.0
    there, b = 0.0, 0
    while b < last and there + bins[b] < goal:
        there += bins[b]
        b += 1
    m = 0
    for i in range(n):
        if bin_of[i] == b:
            edge[m] = i
            m += 1
    keys = np.empty(m)
    for i in range(m):
        keys[i] = -scores[tokens[edge[i]]]
    for i in np.argsort(keys, kind="mergesort"):  # stable: ties to the lowest token
        if there >= goal:
            break
        there += weights[tokens[edge[i]]] if len(weights) > 0 else 1.0
        bin_of[edge[i]] = -1
    kept = 0
    for i in range(n):
        if bin_of[i] < b:
            tokens[kept] = tokens[i]
            kept += 1
    return kept


@jit
def _choose(V, scores, weights, tokens, bins, top_k, top_p, u):
    """:func:`fastrnn.decoding.choose` for a temperature above zero.

    scores: float64, ``(logit - max) / temperature``. weights ``[V + 2]``, tokens ``[3, V]``, bins:
    scratch.
    """
    kept, candidates = V, tokens[0]
    narrowed = 0 < top_k < V or top_p < 1.0
    if narrowed:
        for v in range(V):
            candidates[v] = v
        if 0 < top_k < V:
            kept = _keep_leading(
                V, candidates, scores, weights[:0], float(top_k), bins, tokens[1], tokens[2]
            )
        if top_p < 1.0:
            _weigh(V, scores, weights)
            total = 0.0
            for i in range(kept):
                total += weights[candidates[i]]
            kept = _keep_leading(
                kept, candidates, scores, weights, top_p * total, bins, tokens[1], tokens[2]
            )
        for i in range(kept):
            weights[i] = scores[candidates[i]]
        total = _weigh(kept, weights, weights)
    else:
        total = _weigh(V, scores, weights)
    threshold, mass, last = u * total, 0.0, 0
    for i in range(kept):
        mass += weights[i]
        if weights[i] > 0.0:
            last = i
            if mass > threshold:
                break
    return candidates[last] if narrowed else last


@jit
def _state(like, size, H, W_xh, hh_at, bias_h, states_at, S, i, names, s0, s1, p0, p1):
    """Panels p0 … p1 of the state of sequences s0 … s1 after character ``names[s]``, their i-th.

    It goes from slot ``i % 2`` of the states to the other one.
    """
    W = 2 * VECTOR_BYTES // size
    count = tiles(s1 - s0)
    a, b = i % 2 * S, (i + 1) % 2 * S
    for p in range(p0, p1):
        for j in range(count):
            s = s0 + (s1 - s0) * j // count
            rows = s0 + (s1 - s0) * (j + 1) // count - s
            out = states_at + (p * 2 * S + b + s) * W * size
            tile_rows(
                like, rows, states_at + (a + s) * W * size, 2 * S * W, H,
                hh_at + p * H * W * size, address(bias_h) + p * W * size, 0, out,
            )  # fmt: skip
            tanh(
                like, rows, min(W, H - p * W), out, address(W_xh) + p * W * size, H,
                address(names) + s * 4, out, W, 0, 0,
            )  # fmt: skip


@jit
def _keep(states, W, S, i, lengths, s0, s1, p0, p1):
    """Take back the states of the sequences whose prefix is shorter than i + 1 characters."""
    a, b = i % 2 * S, (i + 1) % 2 * S
    for s in range(s0, s1):
        if i >= lengths[s]:
            for p in range(p0, p1):
                for k in range((p * 2 * S + s) * W, (p * 2 * S + s + 1) * W):
                    states[b * W + k] = states[a * W + k]


@jit
def _scores(like, size, H, V, hq_at, bias_q, states_at, logits, S, s0, s1, p0, p1, top, where):
    """Panels p0 … p1 of the logits of sequences s0 … s1, and the largest of each and its index."""
    W = 2 * VECTOR_BYTES // size
    count = tiles(s1 - s0)
    for p in range(p0, p1):
        for j in range(count):
            s = s0 + (s1 - s0) * j // count
            tile_rows(
                like, s0 + (s1 - s0) * (j + 1) // count - s, states_at + s * W * size, 2 * S * W, H,
                hq_at + p * H * W * size, address(bias_q) + p * W * size, 0,
                address(logits) + (p * S + s) * W * size,
            )  # fmt: skip
    for s in range(s0, s1):
        arg_max(
            like, max(0, min(V, p1 * W) - p0 * W), address(logits) + (p0 * S + s) * W * size, S * W,
            address(where) + s * 8, address(top) + s * size,
        )  # fmt: skip
        where[s] += p0 * W


@jit
def _best(s, parts, top):
    """Which part of the vocabulary has the first of the largest logits of sequence s."""
    best = 0
    for other in range(1, parts):
        if top[other, s] > top[best, s]:
            best = other
    return best


@jit
def generate(
    tid, nt, sync, W_xh, W_hh, b_h, W_hq, b_q, prefix, lengths, h, temperature, top_k, top_p,
    seed, sequence, position, tokens, packed_hh, packed_hq, bias_h, bias_q, states, logits,
    scores, weights, chosen, bins, fed, best, where, claims
):  # fmt: skip
    """Continue S sequences; h ``[S, H]`` is the state before and after.

    states: panels of 2 S rows; logits: panels of S rows. Of each thread: scores ``[nt, V]``,
    weights ``[nt, V + 2]``, chosen ``[nt, 3, V]``, bins ``[nt, BINS]``, fed ``[nt, S]``. Of each
    part of the vocabulary: best, where ``[nt, nt, S]``. claims: of each crew, and of the packing.

    With few sequences all threads are one crew: each has a part of the columns, and none waits for
    a thread that is late. Otherwise a thread is a crew of its own, with a share of the sequences.
    """
    if not begin(tid, nt, sync):
        return
    size, like = W_hh.itemsize, W_hh.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    V, H = W_xh.shape
    S, P = prefix.shape
    N = tokens.shape[1]
    H_panels, V_panels = panels(H, size), panels(V, size)
    hh_at, hq_at, states_at = address(packed_hh), address(packed_hq), address(states)
    for k in range(nt):
        part = (tid + k) % nt
        if take(part, 1, claims[nt]):
            p0, p1 = share(H_panels, part, nt)
            pack(like, size, 0, H, H, address(W_hh), H, hh_at, H, 0, p0, p1)
            pack(like, size, 0, S, H, address(h), H, states_at, 2 * S, 0, p0, p1)
            pad(b_h, bias_h, p0, p1)
            p0, p1 = share(V_panels, part, nt)
            pack(like, size, 0, H, V, address(W_hq), V, hq_at, H, 0, p0, p1)
            pad(b_q, bias_q, p0, p1)
            finish(part, 1, claims[nt])
    finished(1, nt, claims[nt])
    crews = 1 if 4 * nt > S else nt
    crew, me, parts = tid % crews, tid // crews, nt // crews
    s0, s1 = share(S, crew, crews)
    top, at, phases, names = best[crew], where[crew], claims[crew], fed[tid]
    phase = 0
    for i in range(P + N - 1):
        new = states_at + (i + 1) % 2 * S * W * size
        step = i - (P - 1)
        # The state after one more character: of the prefix, or what was chosen last.
        phase += 1
        for k in range(parts):
            part = (me + k) % parts
            if not take(part, phase, phases):
                continue
            p0, p1 = share(H_panels, part, parts)
            for s in range(s0, s1):
                if i < P:
                    names[s] = prefix[s, i]
                else:
                    if temperature == 0.0:
                        tokens[s, step - 1] = at[_best(s, parts, top), s]
                    names[s] = tokens[s, step - 1]
            _state(like, size, H, W_xh, hh_at, bias_h, states_at, S, i, names, s0, s1, p0, p1)
            if i < P:
                _keep(states, W, S, i, lengths, s0, s1, p0, p1)
            finish(part, phase, phases)
        finished(phase, parts, phases)
        if step < 0:
            continue
        # The logits.
        phase += 1
        for k in range(parts):
            part = (me + k) % parts
            if not take(part, phase, phases):
                continue
            p0, p1 = share(V_panels, part, parts)
            _scores(
                like, size, H, V, hq_at, bias_q, new, logits, S, s0, s1, p0, p1, top[part], at[part]
            )
            finish(part, phase, phases)
        finished(phase, parts, phases)
        if temperature == 0.0:
            continue
        # A character drawn from them.
        phase += 1
        for k in range(parts):
            part = (me + k) % parts
            if not take(part, phase, phases):
                continue
            first, last = share(s1 - s0, part, parts)
            for s in range(s0 + first, s0 + last):
                largest, mine = np.float64(top[_best(s, parts, top), s]), scores[tid]
                for p in range(V_panels):
                    for j in range(min(W, V - p * W)):
                        score = np.float64(logits[(p * S + s) * W + j]) - largest
                        mine[p * W + j] = score / temperature
                u = uniform(seed, sequence + s, position + step)
                tokens[s, step] = _choose(
                    V, mine, weights[tid], chosen[tid], bins[tid], top_k, top_p, u
                )
            finish(part, phase, phases)
        finished(phase, parts, phases)
    barrier(tid, nt, sync)
    if temperature == 0.0 and me == 0:
        for s in range(s0, s1):
            tokens[s, N - 1] = at[_best(s, parts, top), s]
    p0, p1 = share(H_panels, tid, nt)
    last = (P + N - 1) % 2 * S
    for p in range(p0, p1):
        for s in range(S):
            for j in range(min(W, H - p * W)):
                h[s, p * W + j] = states[(p * 2 * S + last + s) * W + j]
    end(tid, nt, sync)
