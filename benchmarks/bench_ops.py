"""One benchmark group an op; each is held to the float64 oracle before it is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import OP_SIZES, Case, Timed
from fastrnn import reference
from fastrnn.bench import make_problem, zipf_tokens
from tests.tolerances import assert_close

TIMED_SIZES = OP_SIZES
pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=5, disable_gc=True)


def check(op: str, case: Case, got: Any, want: Any) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(op, case.backend.get(g), w, f"result {i}")


def test_gather(case: Case, timed: Timed) -> None:
    d = case.dims
    W, b, x = case.normal(d.V, d.H), case.normal(d.H), zipf_tokens(case.rng, d.T * d.B, d.V)
    x = x.reshape(d.T, d.B)
    (W_xh, b_h, tokens), z = case.put(W, b, x), case.empty(d.T, d.B, d.H)
    run = case.synced(lambda: case.backend.gather(W_xh, tokens, b_h, out=z))
    run()
    check("gather", case, [z], [W[x].astype(np.float64) + b])
    timed("gather", "gather", d, run)


def test_gather_backward(case: Case, timed: Timed) -> None:
    d = case.dims
    host, x = case.normal(d.T, d.B, d.H), zipf_tokens(case.rng, d.T * d.B, d.V).reshape(d.T, d.B)
    (dz, tokens), out = case.put(host, x), (case.empty(d.V, d.H), case.empty(d.H))
    run = case.synced(lambda: case.backend.gather_backward(dz, tokens, d.V, out=out))
    run()
    want = np.zeros((d.V, d.H))
    np.add.at(want, x, host.astype(np.float64))
    check("gather_backward", case, out, [want, host.sum(axis=(0, 1), dtype=np.float64)])
    timed("gather_backward", "gather_backward", d, run)


def test_recurrence(case: Case, timed: Timed) -> None:
    d = case.dims
    problem, (want,) = make_problem("recurrence", d)
    z, W_hh, h0 = case.put(problem["z"], problem["W_hh"], problem["h0"])
    h = case.empty(d.T, d.B, d.H)
    run = case.synced(lambda: case.backend.recurrence(z, W_hh, h0, out=h))
    run()
    check("recurrence", case, [h], [want["h"]])
    timed("recurrence", "recurrence", d, run, tokens=d.T * d.B)


def test_recurrence_backward(case: Case, timed: Timed) -> None:
    d = case.dims
    problem, (want,) = make_problem("recurrence+bptt", d)
    z, W_hh, h0, dh = case.put(*(problem[n] for n in ("z", "W_hh", "h0", "dh")))
    h = case.backend.recurrence(z, W_hh, h0)
    out = (case.empty(d.T, d.B, d.H), case.empty(d.H, d.H), case.empty(d.B, d.H))
    run = case.synced(lambda: case.backend.recurrence_backward(dh, h, W_hh, h0, out=out))
    run()
    check("recurrence_backward", case, out, [want["dz"], want["dW_hh"], want["dh0"]])
    timed("recurrence_backward", "recurrence_backward", d, run, tokens=d.T * d.B)


def test_project(case: Case, timed: Timed) -> None:
    d = case.dims
    h, W, b = case.normal(d.T, d.B, d.H), case.normal(d.H, d.V), case.normal(d.V)
    (h_, W_hq, b_q), logits = case.put(h, W, b), case.empty(d.T, d.B, d.V)
    run = case.synced(lambda: case.backend.project(h_, W_hq, b_q, out=logits))
    run()
    check("project", case, [logits], [h.astype(np.float64) @ W + b])
    timed("project", "project", d, run)


def test_project_backward(case: Case, timed: Timed) -> None:
    d = case.dims
    dO, h, W = case.normal(d.T, d.B, d.V), case.normal(d.T, d.B, d.H), case.normal(d.H, d.V)
    dlogits, h_, W_hq = case.put(dO, h, W)
    out = (case.empty(d.T, d.B, d.H), case.empty(d.H, d.V), case.empty(d.V))
    run = case.synced(lambda: case.backend.project_backward(dlogits, h_, W_hq, out=out))
    run()
    wide = dO.astype(np.float64).reshape(-1, d.V)
    dh = (wide @ W.T).reshape(h.shape)
    check("project_backward", case, out, [dh, h.reshape(-1, d.H).T @ wide, wide.sum(axis=0)])
    timed("project_backward", "project_backward", d, run)


def test_cross_entropy(case: Case, timed: Timed) -> None:
    d = case.dims
    problem, (want,) = make_problem("cross_entropy", d)
    logits, targets = case.put(problem["logits"], problem["targets"])
    out = (case.empty(), case.empty(d.T, d.B, d.V))
    run = case.synced(lambda: case.backend.cross_entropy(logits, targets, out=out))
    run()
    check("cross_entropy", case, out, [want["loss"], want["dlogits"]])
    timed("cross_entropy", "cross_entropy", d, run, tokens=d.T * d.B)


def test_clip_by_global_norm(case: Case, timed: Timed) -> None:
    """The gradients are put back before every round: clipped ones would not be scaled again."""
    host = case.normal(case.dims.flat_size)
    (grads,), norm = case.put(host), case.empty()
    run = case.synced(lambda: case.backend.clip_by_global_norm([grads], 0.01, out=norm))
    run()
    want = {"g": host.astype(np.float64)}
    want_norm = np.asarray(reference.clip_by_global_norm(want, 0.01))
    check("clip_by_global_norm", case, [norm, grads], [want_norm, want["g"]])

    def restore() -> None:
        case.backend.put(host, out=grads)
        case.backend.sync()

    timed("clip_by_global_norm", "clip_by_global_norm", case.dims, run, setup=restore)


def test_sgd(case: Case, timed: Timed) -> None:
    p, g = case.normal(case.dims.flat_size), case.normal(case.dims.flat_size)
    params, grads = case.put(p, g)
    run = case.synced(lambda: case.backend.sgd([params], [grads], 1e-3))
    run()
    check("sgd", case, [params], [p - 1e-3 * g.astype(np.float64)])
    timed("sgd", "sgd", case.dims, run)
