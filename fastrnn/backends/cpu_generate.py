"""Generation of the ``numba`` backend: the compiled loop over characters, and the choice of one."""
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import numpy as np

from fastrnn.backends.cpu_emitter import VECTOR_BYTES, jit
from fastrnn.backends.cpu_kernels import pack, pad, panels, share, tiles
from fastrnn.backends.cpu_threads import barrier, begin, finish, finished, take
from fastrnn.backends.cpu_vector import address, arg_max, exp_rows, tanh, tile_rows
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
def _choose(V, weights, top_k, top_p, u):
    """:func:`fastrnn.decoding.choose` for a temperature above zero.

    weights: float64, V scores ``(logit - max) / temperature``, and scratch for two more.
    """
    order = np.empty(0, np.int64)
    if 0 < top_k < V or top_p < 1.0:
        order = np.argsort(-weights[:V], kind="mergesort")  # stable: ties to the lowest index
    weights[V] = 0.0
    at, W = address(weights), 2 * VECTOR_BYTES // 8
    exp_rows(weights[V], 1, V, at, W, 0, at, W, 0, at + V * 8, at + (V + 1) * 8)
    total = weights[V + 1]
    if len(order) > 0:
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
    weights, fed, best, where, claims
):  # fmt: skip
    """Continue S sequences; h ``[S, H]`` is the state before and after.

    states: panels of 2 S rows; logits: panels of S rows. Of each thread: weights ``[nt, V + 2]``,
    fed ``[nt, S]``. Of each part of the vocabulary: best, where ``[nt, nt, S]``. claims: of each
    crew, and of the packing.

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
                largest, scores = np.float64(top[_best(s, parts, top), s]), weights[tid]
                for p in range(V_panels):
                    for j in range(min(W, V - p * W)):
                        score = np.float64(logits[(p * S + s) * W + j]) - largest
                        scores[p * W + j] = score / temperature
                u = uniform(seed, sequence + s, position + step)
                tokens[s, step] = _choose(V, scores, top_k, top_p, u)
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
    barrier(tid, nt, sync)
