"""One case an op: its inputs on the device, the call, and what the oracle makes of the same inputs.

The pytest-benchmark suite and the run on a GPU time the same cases. Results are compared with
float64, and with the error that plain float32 NumPy makes; of large results, a sample is compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn import reference
from fastrnn.backend import Backend, Dims
from fastrnn.bench import Work, make_problem, work, zipf_tokens
from tests.tolerances import RELATIVE_RMS, relative_rms

SAMPLE = 64
"""Rows of a result that are compared where it has more than MOST values."""
MOST = 1 << 24


@dataclass(frozen=True)
class Result:
    """One output of an op: as it came, as float64 has it, and as plain float32 has it."""

    name: str
    got: Any
    want: Any
    plain: Any

    @property
    def error(self) -> float:
        """Relative RMS against float64."""
        return relative_rms(self.got, self.want)

    @property
    def plain_error(self) -> float:
        """The same of plain float32."""
        return relative_rms(self.plain, self.want)


@dataclass(frozen=True)
class OpCase:
    """An op at one size.

    Attributes:
        op: its name. tolerance: its row in ``tests/tolerances.py``. work: what it cannot avoid.
        submit: runs it once, without waiting. results: of the last run, with the oracle's.
        restore: puts back what a run changes, or None. again: where there is a ``restore``, submits
            the ``i``-th of many runs in a row, each of which has work to do.
        tokens: that one run handles.
    """

    op: str
    tolerance: str
    work: Work
    submit: Callable[[], Any]
    results: Callable[[], list[Result]]
    restore: Callable[[], None] | None = None
    again: Callable[[int], Any] | None = None
    tokens: int = 0

    def run(self) -> list[Result]:
        """Run once; the results."""
        self.submit()
        return self.results()

    def faults(self, results: Iterable[Result]) -> list[str]:
        """Which results are beyond the tolerance, and by how much."""
        limits = RELATIVE_RMS[self.tolerance]
        return [
            f"{r.name}: error {r.error:.3g} > {limit:.3g}"
            for r in results
            for limit in [limits[np.asarray(r.got).dtype.name]]
            if not r.error <= limit  # NaN is beyond any
        ]

    def check(self) -> list[Result]:
        """Run once and hold every result to the tolerance; return the results."""
        results = self.run()
        faults = self.faults(results)
        assert not faults, f"{self.op} {'; '.join(faults)}"
        return results


class Inputs:
    """Seeded deviates, of which millions repeat, and outputs full of NaN."""

    def __init__(self, backend: Backend, dims: Dims) -> None:
        self.backend, self.dims = backend, dims
        self.rng = np.random.default_rng([dims.T, dims.B, dims.H, dims.V])

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        count = int(np.prod(shape))
        deviates = self.rng.standard_normal(min(count, (1 << 22) + 1), dtype=np.float32)
        return np.resize(deviates * np.float32(scale), shape)

    def tokens(self) -> Any:
        d = self.dims
        return zipf_tokens(self.rng, d.T * d.B, d.V).reshape(d.T, d.B)

    def put(self, *hosts: Any) -> list[Any]:
        return [self.backend.put(host) for host in hosts]

    def empty(self, *shape: int) -> Any:
        """An output: what a kernel leaves out is NaN, not what an earlier run has left there."""
        return self.backend.put(np.full(shape, np.nan, np.float32))

    def rows(self, count: int, width: int) -> Any:
        """Which rows of a ``[count, width]`` result to compare: all, or a sample."""
        if count * width <= MOST:
            return np.arange(count)
        return np.sort(self.rng.choice(count, min(count, SAMPLE), replace=False))


def wide(array: Any) -> Any:
    """The same values in float64."""
    return np.asarray(array, np.float64)


def gather(backend: Backend, dims: Dims) -> OpCase:
    i = Inputs(backend, dims)
    T, B, H, V = dims.T, dims.B, dims.H, dims.V
    W, b, x = i.normal(V, H), i.normal(H), i.tokens()
    (W_xh, b_h, tokens), z = i.put(W, b, x), i.empty(T, B, H)

    def results() -> list[Result]:
        rows = i.rows(T * B, H)
        W_x = W[x.ravel()[rows]]
        return [Result("z", backend.get(z).reshape(-1, H)[rows], wide(W_x) + b, W_x + b)]

    return OpCase(
        "gather",
        "gather",
        work("gather", dims),
        lambda: backend.gather(W_xh, tokens, b_h, out=z),
        results,
    )


def gather_backward(backend: Backend, dims: Dims) -> OpCase:
    i = Inputs(backend, dims)
    T, B, H, V = dims.T, dims.B, dims.H, dims.V
    host, x = i.normal(T, B, H), i.tokens()
    (dz, tokens), out = i.put(host, x), (i.empty(V, H), i.empty(H))

    def results() -> list[Result]:
        dW, db = (backend.get(a) for a in out)
        flat, ids = host.reshape(-1, H), x.ravel()
        rows = np.arange(V)
        if dW.size > MOST:  # the most frequent tokens, and some others
            frequent = np.argsort(-np.bincount(ids, minlength=V))[:8]
            rows = np.union1d(frequent, i.rows(V, H))
        want, plain = np.zeros((len(rows), H)), np.zeros((len(rows), H), np.float32)
        for k, v in enumerate(rows):
            mine = flat[ids == v]
            want[k], plain[k] = mine.sum(axis=0, dtype=np.float64), mine.sum(axis=0)
        bias = flat.sum(axis=0, dtype=np.float64)
        return [
            Result("dW_xh", dW[rows], want, plain),
            Result("db_h", db, bias, flat.sum(axis=0)),
        ]

    return OpCase(
        "gather_backward",
        "gather_backward",
        work("gather_backward", dims),
        lambda: backend.gather_backward(dz, tokens, V, out=out),
        results,
    )


def hidden_states(z: Any, W_hh: Any, h0: Any) -> Any:
    """``h_t = tanh(z_t + h_{t-1} W_hh)``: ``[T, B, H]``, in the arrays' own dtype."""
    h = [h0]
    for z_t in z:
        h.append(np.tanh(z_t + h[-1] @ W_hh))
    return np.stack(h[1:])


def bptt(dh: Any, h: Any, W_hh: Any, h0: Any) -> dict[str, Any]:
    """``dz``, ``dW_hh`` and ``dh0`` from the gradient of the states, in the arrays' own dtype."""
    found = {"dz": np.empty_like(dh), "dW_hh": np.zeros_like(W_hh), "dh0": np.zeros_like(h0)}
    for t in reversed(range(len(dh))):
        dz = found["dz"][t] = (dh[t] + found["dh0"]) * (1 - h[t] ** 2)
        found["dW_hh"] += (h[t - 1] if t else h0).T @ dz
        found["dh0"] = dz @ W_hh.T
    return found


def softmax_loss(logits: Any, targets: Any, rows: int) -> tuple[Any, Any]:
    """Losses of some rows of logits, and their part of the gradient of the mean over ``rows``."""
    log_p, at = reference.log_softmax(logits), (np.arange(len(logits)), targets)
    gradient = np.exp(log_p)
    gradient[at] -= gradient.dtype.type(1)
    return -log_p[at], gradient / gradient.dtype.type(rows)


def recurrence(backend: Backend, dims: Dims) -> OpCase:
    problem, (want,) = make_problem("recurrence", dims)
    names = ("z", "W_hh", "h0")
    z, W_hh, h0 = (backend.put(problem[n]) for n in names)
    h = Inputs(backend, dims).empty(*z.shape)

    def results() -> list[Result]:
        plain = hidden_states(*(problem[n] for n in names))
        return [Result("h", backend.get(h), want["h"], plain)]

    return OpCase(
        "recurrence",
        "recurrence",
        work("recurrence", dims),
        lambda: backend.recurrence(z, W_hh, h0, out=h),
        results,
        tokens=dims.T * dims.B,
    )


def recurrence_backward(backend: Backend, dims: Dims) -> OpCase:
    problem, (want,) = make_problem("recurrence+bptt", dims)
    z, W_hh, h0, dh = (backend.put(problem[n]) for n in ("z", "W_hh", "h0", "dh"))
    h = backend.recurrence(z, W_hh, h0)
    out = tuple(Inputs(backend, dims).empty(*a.shape) for a in (dh, W_hh, h0))

    def results() -> list[Result]:
        W, first, d = problem["W_hh"], problem["h0"], problem["dh"]
        plain = bptt(d, hidden_states(problem["z"], W, first), W, first)
        return [
            Result(name, backend.get(got), want[name], plain[name])
            for name, got in zip(plain, out, strict=True)
        ]

    return OpCase(
        "recurrence_backward",
        "recurrence_backward",
        work("recurrence_backward", dims),
        lambda: backend.recurrence_backward(dh, h, W_hh, h0, out=out),
        results,
        tokens=dims.T * dims.B,
    )


def project(backend: Backend, dims: Dims) -> OpCase:
    i = Inputs(backend, dims)
    T, B, H, V = dims.T, dims.B, dims.H, dims.V
    h, W, b = i.normal(T, B, H), i.normal(H, V), i.normal(V)
    (h_, W_hq, b_q), logits = i.put(h, W, b), i.empty(T, B, V)

    def results() -> list[Result]:
        rows = i.rows(T * B, V)
        mine = h.reshape(-1, H)[rows]
        want, plain = wide(mine) @ wide(W) + b, mine @ W + b
        return [Result("logits", backend.get(logits).reshape(-1, V)[rows], want, plain)]

    return OpCase(
        "project",
        "project",
        work("project", dims),
        lambda: backend.project(h_, W_hq, b_q, out=logits),
        results,
    )


def project_backward(backend: Backend, dims: Dims) -> OpCase:
    i = Inputs(backend, dims)
    T, B, H, V = dims.T, dims.B, dims.H, dims.V
    d, h, W = i.normal(T, B, V), i.normal(T, B, H), i.normal(H, V)
    (dlogits, h_, W_hq), out = i.put(d, h, W), (i.empty(T, B, H), i.empty(H, V), i.empty(V))

    def results() -> list[Result]:
        dh, dW, db = (backend.get(a) for a in out)
        flat, states = d.reshape(-1, V), h.reshape(-1, H)
        rows, units = i.rows(T * B, V), i.rows(H, T * B * V // H)
        sums = np.zeros(V)
        for first in range(0, len(flat), 4096):
            sums += flat[first : first + 4096].sum(axis=0, dtype=np.float64)
        columns = states[:, units].T
        dh_want, dh_plain = wide(flat[rows]) @ wide(W).T, flat[rows] @ W.T
        dW_plain = columns @ flat
        dW_want = np.zeros((len(units), V))
        for first in range(0, len(flat), 4096):
            part = slice(first, first + 4096)
            dW_want += wide(columns[:, part]) @ wide(flat[part])
        return [
            Result("dh", dh.reshape(-1, H)[rows], dh_want, dh_plain),
            Result("dW_hq", dW[units], dW_want, dW_plain),
            Result("db_q", db, sums, flat.sum(axis=0)),
        ]

    return OpCase(
        "project_backward",
        "project_backward",
        work("project_backward", dims),
        lambda: backend.project_backward(dlogits, h_, W_hq, out=out),
        results,
    )


def cross_entropy(backend: Backend, dims: Dims) -> OpCase:
    i = Inputs(backend, dims)
    T, B, V = dims.T, dims.B, dims.V
    host, y = i.normal(T, B, V), i.tokens()
    (logits, targets), out = i.put(host, y), (i.empty(), i.empty(T, B, V))

    softmax = functools.partial(softmax_loss, rows=T * B)

    def results() -> list[Result]:
        flat, ids = host.reshape(-1, V), y.ravel()
        rows = i.rows(T * B, V)
        got = backend.get(out[1]).reshape(-1, V)[rows]
        (_, want), (_, plain) = softmax(wide(flat[rows]), ids[rows]), softmax(flat[rows], ids[rows])
        losses = np.concatenate(
            [
                softmax(wide(flat[first : first + 512]), ids[first : first + 512])[0]
                for first in range(0, len(flat), 512)
            ]
        )
        loss32 = softmax(flat[rows], ids[rows])[0].mean() if len(rows) == len(flat) else np.nan
        loss = Result("loss", backend.get(out[0]), losses.mean(), np.float32(loss32))
        return [Result("dlogits", got, want, plain), loss]

    return OpCase(
        "cross_entropy",
        "cross_entropy",
        work("cross_entropy", dims),
        lambda: backend.cross_entropy(logits, targets, out=out),
        results,
        tokens=T * B,
    )


def clip_by_global_norm(backend: Backend, dims: Dims) -> OpCase:
    """Clipped gradients are not scaled again: they are put back, or clipped ever further."""
    i = Inputs(backend, dims)
    host = i.normal(dims.flat_size)
    (grads,), norm = i.put(host), i.empty()

    def results() -> list[Result]:
        scaled = {"g": wide(host)}
        want = reference.clip_by_global_norm(scaled, 0.01)
        plain = np.float32(np.sqrt(np.float32(np.vdot(host, host))))
        got = backend.get(grads)
        return [
            Result("norm", backend.get(norm), np.float64(want), plain),
            Result("grads", got, scaled["g"], host * np.float32(0.01 / plain)),
        ]

    def clip(i: int) -> None:
        """Each to nine tenths of the norm that the one before has left."""
        backend.clip_by_global_norm([grads], 0.01 * 0.9**i, out=norm)

    def restore() -> None:
        backend.put(host, out=grads)
        backend.sync()

    return OpCase(
        "clip_by_global_norm",
        "clip_by_global_norm",
        work("clip_by_global_norm", dims),
        lambda: clip(0),
        results,
        restore,
        clip,
    )


def sgd(backend: Backend, dims: Dims) -> OpCase:
    i = Inputs(backend, dims)
    p, g = i.normal(dims.flat_size), i.normal(dims.flat_size)
    params, grads = i.put(p, g)

    def results() -> list[Result]:
        want, plain = p - 1e-3 * wide(g), p - np.float32(1e-3) * g
        return [Result("params", backend.get(params), want, plain)]

    return OpCase(
        "sgd",
        "sgd",
        work("sgd", dims),
        lambda: backend.sgd([params], [grads], 1e-3),
        results,
    )


OPS: dict[str, Callable[[Backend, Dims], OpCase]] = {
    case.__name__: case
    for case in (
        gather,
        gather_backward,
        recurrence,
        recurrence_backward,
        project,
        project_backward,
        cross_entropy,
        clip_by_global_norm,
        sgd,
    )
}


def cases(backend: Backend, dims: Dims) -> Iterator[OpCase]:
    """Every op at one size, one after another: the arrays of one are freed before the next."""
    for make in OPS.values():
        yield make(backend, dims)
