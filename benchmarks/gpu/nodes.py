"""The kernels of the captured training step of the CUDA C engine, as cases of their own.

They are launched as :meth:`fastrnn.backends.cupy_cuda.CupyBackend` launches them in a step: logits
and W_hq in rows of ``ld`` values, batches by a cursor, scratch that stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.op_cases import (
    Inputs,
    OpCase,
    Result,
    bptt,
    hidden_states,
    softmax_loss,
    wide,
)
from fastrnn.backend import Dims
from fastrnn.backends.cupy_cuda import LD_STEP, CupyBackend
from fastrnn.bench import Work, work
from fastrnn.cuda import clip_sgd, cross_entropy, gather, gemm, project, recurrence
from fastrnn.cuda.device import ceil_div


@dataclass
class _Setting:
    """Host and device arrays of one step; the device's outputs are poisoned."""

    backend: CupyBackend
    dims: Dims

    def __post_init__(self) -> None:
        d, self.inputs = self.dims, Inputs(self.backend, self.dims)
        self.rows, self.ld = d.T * d.B, ceil_div(d.V, LD_STEP) * LD_STEP
        self.device, self.held = self.backend.device, dict[str, Any]()
        self.counters = gemm.new_counters(self.device)

    def scratch(self, name: str, size: int, dtype: Any) -> Any:
        """Buffers that stay where they are: captured work refers to them."""
        if name not in self.held:
            self.held[name] = self.device.empty((size,), dtype)
        return self.held[name][:size]

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        return self.inputs.normal(*shape, scale=scale)

    def padded(self, host: Any) -> Any:
        """On the device, rows of ``ld`` values; NaN behind them, which nothing may read."""
        filled = np.full((len(host), self.ld), np.nan, np.float32)
        filled[:, : host.shape[1]] = host
        return self.backend.put(filled)


def _product(M: int, N: int, K: int) -> Work:
    return Work(2.0 * M * N * K, 4.0 * (M * N + M * K + N * K))


def _pad(s: _Setting) -> OpCase:
    H, V, ld = s.dims.H, s.dims.V, s.ld
    W, out = s.normal(H, V), s.inputs.empty(H, ld)
    W_hq = s.backend.put(W)

    def results() -> list[Result]:
        got, want = s.backend.get(out), np.zeros((H, ld), np.float32)
        want[:, :V] = W
        return [Result("W_hq", got, want, want)]

    return OpCase(
        "pad W_hq", "gather", Work(0.0, 4.0 * H * (V + ld)),
        lambda: project.pad(s.device, W_hq, H, V, ld, out), results,
    )  # fmt: skip


def _recurrent(s: _Setting) -> tuple[Any, ...]:
    d = s.dims
    return (
        s.normal(d.V, d.H, scale=0.5), s.normal(d.H, scale=0.1),
        s.normal(d.H, d.H, scale=d.H**-0.5), s.normal(d.B, d.H, scale=0.5), s.inputs.tokens(),
    )  # fmt: skip


def _states(weights: Sequence[Any], x: Any) -> Any:
    W_xh, b_h, W_hh, h0 = weights
    return hidden_states(W_xh[x] + b_h, W_hh, h0)


def _recurrence(s: _Setting) -> OpCase:
    hosts = _recurrent(s)
    W_xh, b_h, W_hh, h0, x = s.inputs.put(*hosts)
    h, cursor = s.inputs.empty(s.dims.T, s.dims.B, s.dims.H), s.backend.put(np.zeros(1, np.int32))

    def results() -> list[Result]:
        want = _states([wide(a) for a in hosts[:4]], hosts[4])
        return [Result("h", s.backend.get(h), want, _states(hosts[:4], hosts[4]))]

    return OpCase(
        "recurrence", "recurrence", work("recurrence", s.dims),
        lambda: recurrence.recurrence_gathered(s.device, x, cursor, W_xh, b_h, W_hh, h0, h),
        results,
    )  # fmt: skip


def _bptt(s: _Setting) -> OpCase:
    T, B, H = s.dims.T, s.dims.B, s.dims.H
    hosts = _recurrent(s)
    states, d, (W, first) = _states(hosts[:4], hosts[4]), s.normal(T, B, H), hosts[2:4]
    h, dh, W_hh = s.inputs.put(states, d, W)
    dz, dh0 = s.inputs.empty(T, B, H), s.inputs.empty(B, H)

    def results() -> list[Result]:
        want = bptt(*(wide(a) for a in (d, states, W, first)))
        plain = bptt(d, states, W, first)
        return [
            Result(name, s.backend.get(got), want[name], plain[name])
            for name, got in (("dz", dz), ("dh0", dh0))
        ]

    return OpCase(
        "BPTT", "recurrence_backward", work("recurrence", s.dims),
        lambda: recurrence.recurrence_backward(s.device, dh, h, W_hh, dz, dh0), results,
    )  # fmt: skip


def _project(s: _Setting) -> OpCase:
    rows, H, V = s.rows, s.dims.H, s.dims.V
    a, W, b = s.normal(rows, H), s.normal(H, V), s.normal(V)
    (h, b_q), W_hq, logits = s.inputs.put(a, b), s.padded(W), s.inputs.empty(rows, s.ld)

    def results() -> list[Result]:
        got = s.backend.get(logits)[:, :V]
        return [Result("logits", got, wide(a) @ wide(W) + b, a @ W + b)]

    return OpCase(
        "project", "project", _product(rows, V, H),
        lambda: project.project(
            s.device, h, W_hq, b_q, logits, ld_W=s.ld, ld_logits=s.ld,
            scratch=s.scratch, counters=s.counters,
        ),
        results,
    )  # fmt: skip


def _dh(s: _Setting) -> OpCase:
    rows, H, V = s.rows, s.dims.H, s.dims.V
    d, W = s.normal(rows, V), s.normal(H, V)
    dlogits, W_hq, dh = s.padded(d), s.padded(W), s.inputs.empty(rows, H)

    def results() -> list[Result]:
        return [Result("dh", s.backend.get(dh), wide(d) @ wide(W).T, d @ W.T)]

    return OpCase(
        "dh", "project_backward", _product(rows, H, V),
        lambda: project.project_backward_h(
            s.device, dlogits, W_hq, dh, V, ld_W=s.ld, ld_logits=s.ld,
            scratch=s.scratch, counters=s.counters,
        ),
        results,
    )  # fmt: skip


def _dW_hq(s: _Setting) -> OpCase:
    rows, H, V = s.rows, s.dims.H, s.dims.V
    a, d = s.normal(rows, H), s.normal(rows, V)
    (h,), dlogits, dW = s.inputs.put(a), s.padded(d), s.inputs.empty(H, V)

    def results() -> list[Result]:
        return [Result("dW_hq", s.backend.get(dW), wide(a).T @ wide(d), a.T @ d)]

    return OpCase(
        "dW_hq", "project_backward", _product(H, V, rows),
        lambda: project.project_backward_W(
            s.device, h, dlogits, dW, ld_logits=s.ld, scratch=s.scratch, counters=s.counters
        ),
        results,
    )  # fmt: skip


def _dW_hh(s: _Setting) -> OpCase:
    T, B, H = s.dims.T, s.dims.B, s.dims.H
    a, d = s.normal(T + 1, B, H), s.normal(T, B, H)
    (states, dz), dW = s.inputs.put(a, d), s.inputs.empty(H, H)

    def results() -> list[Result]:
        left, right = a[:-1].reshape(-1, H), d.reshape(-1, H)
        want = wide(left).T @ wide(right)
        return [Result("dW_hh", s.backend.get(dW), want, left.T @ right)]

    return OpCase(
        "dW_hh", "recurrence_backward", _product(H, H, T * B),
        lambda: project.recurrent_gradient(
            s.device, states[0], states[1:], dz, dW, scratch=s.scratch, counters=s.counters
        ),
        results,
    )  # fmt: skip


def _cross_entropy(s: _Setting) -> OpCase:
    T, B, V = s.dims.T, s.dims.B, s.dims.V
    host, y = s.normal(T * B, V), s.inputs.tokens()
    logits, targets = s.padded(host).reshape(T, B, s.ld), s.backend.put(y[None])
    dlogits, losses = s.inputs.empty(T, B, s.ld), s.inputs.empty(T * B)
    cursor = s.backend.put(np.zeros(1, np.int32))

    def results() -> list[Result]:
        got = s.backend.get(dlogits).reshape(T * B, s.ld), s.backend.get(losses)
        assert not got[0][:, V:].any(), "what lies behind the rows of dlogits is not zero"
        loss, d = softmax_loss(wide(host), y.ravel(), T * B)
        plain = softmax_loss(host, y.ravel(), T * B)
        return [
            Result("dlogits", got[0][:, :V], d, plain[1]),
            Result("loss", got[1], loss, plain[0]),
        ]

    return OpCase(
        "cross entropy", "cross_entropy", work("cross_entropy", s.dims),
        lambda: cross_entropy.cross_entropy(
            s.device, logits, targets, V, losses, dlogits, None, None, cursor
        ),
        results,
    )  # fmt: skip


def _dW_xh(s: _Setting) -> OpCase:
    T, B, H, V = s.dims.T, s.dims.B, s.dims.H, s.dims.V
    d, x = s.normal(T, B, H), s.inputs.tokens()
    dz, tokens = s.inputs.put(d, x[None])
    order = s.backend.empty((1, T * B, 2), np.int32)
    bounds = s.backend.empty((1, V + 1), np.int32)
    gather.sort(s.device, tokens, V, order, bounds, s.scratch)
    cursor = s.backend.put(np.zeros(1, np.int32))
    dW, db = s.inputs.empty(V, H), s.inputs.empty(H)

    def results() -> list[Result]:
        want = np.zeros((V, H))
        np.add.at(want, x, wide(d))
        plain = np.zeros((V, H), np.float32)
        np.add.at(plain, x, d)
        bias = d.reshape(-1, H)
        return [
            Result("dW_xh", s.backend.get(dW), want, plain),
            Result("db_h", s.backend.get(db), bias.sum(axis=0, dtype=np.float64), bias.sum(axis=0)),
        ]

    return OpCase(
        "dW_xh", "gather_backward", work("gather_backward", s.dims),
        lambda: gather.scatter_add(s.device, dz, order, bounds, dW, db, s.scratch, cursor),
        results,
    )  # fmt: skip


def _clip_sgd(s: _Setting) -> OpCase:
    n = s.dims.flat_size
    p, g, lr, max_norm = s.normal(n), s.normal(n), 1e-3, 0.01
    params, grads = s.inputs.put(p, g)
    rates, norm = s.backend.put(np.array([lr, max_norm])), s.inputs.empty()

    def results() -> list[Result]:
        length = float(np.sqrt(np.vdot(wide(g), wide(g))))
        plain = np.float32(np.sqrt(np.vdot(g, g)))
        step = np.float32(lr) * (np.float32(max_norm) / plain * g)
        return [
            Result("norm", s.backend.get(norm), np.float64(length), plain),
            Result("params", s.backend.get(params), p - lr * max_norm / length * wide(g), p - step),
        ]

    return OpCase(
        "clip and sgd", "clip_by_global_norm", Work(4.0 * n, 16.0 * n),
        lambda: clip_sgd.clip_sgd(s.device, [params], [grads], rates, norm, s.scratch), results,
    )  # fmt: skip


NODES: dict[str, Callable[[_Setting], OpCase]] = {
    "pad W_hq": _pad,
    "recurrence": _recurrence,
    "project": _project,
    "cross entropy": _cross_entropy,
    "dh": _dh,
    "BPTT": _bptt,
    "dW_hq": _dW_hq,
    "dW_hh": _dW_hh,
    "dW_xh": _dW_xh,
    "clip and sgd": _clip_sgd,
}


def node(backend: CupyBackend, name: str, dims: Dims) -> OpCase:
    """The case of one node of the step."""
    return NODES[name](_Setting(backend, dims))
