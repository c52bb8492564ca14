"""The ``numpy`` backend: each op vectorised in NumPy, in a few lines, into preallocated buffers.

This is what a careful NumPy programmer writes: gathers instead of one-hot products and one large
matmul where the time steps allow it. The literal oracle is :mod:`fastrnn.reference`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastrnn.backend import Array, Backend, HostArray
from fastrnn.decoding import Decoding, choose, uniform


class NumpyBackend(Backend):
    """Backend on ``numpy.ndarray``."""

    name = "numpy"

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def put(self, host: HostArray, out: Array | None = None) -> Array:
        if out is None:
            return np.array(host, order="C")
        out[...] = host
        return out

    def get(self, array: Array) -> HostArray:
        return np.array(array)

    def sync(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "numpy": np.__version__,
            "device": platform.processor() or "CPU",
        }

    # --- ops ---

    def window(self, tokens: Array, starts: Array, out: tuple[Array, Array]) -> None:
        x, y = out
        index = starts[None, :] + np.arange(len(x))[:, None]
        np.take(tokens, index, out=x)
        np.take(tokens, index + 1, out=y)

    def gather(self, W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
        z = np.take(W_xh, tokens, axis=0, out=out)
        z += b_h
        return z

    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        H = dz.shape[-1]
        dW_xh, db_h = out or (np.empty((V, H), dz.dtype), np.empty(H, dz.dtype))
        rows, ids = dz.reshape(-1, H), tokens.ravel()
        dW_xh[...] = 0
        order = np.argsort(ids, kind="stable")
        used, first = np.unique(ids[order], return_index=True)
        if len(used):
            dW_xh[used] = np.add.reduceat(rows[order], first, axis=0)
        rows.sum(axis=0, out=db_h)
        return dW_xh, db_h

    def recurrence(self, z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
        h = np.empty_like(z) if out is None else out
        previous, product = h0, np.empty_like(h0)
        for t in range(len(z)):
            np.matmul(previous, W_hh, out=product)
            np.add(z[t], product, out=h[t])
            np.tanh(h[t], out=h[t])
            previous = h[t]
        return h

    def recurrence_backward(
        self,
        dh: Array,
        h: Array,
        W_hh: Array,
        h0: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        T, _, H = h.shape
        dz, dW_hh, dh0 = out or (np.empty_like(dh), np.empty_like(W_hh), np.empty_like(h0))
        dh0[...] = 0
        for t in reversed(range(T)):
            dh0 += dh[t]
            np.multiply(h[t], h[t], out=dz[t])
            np.subtract(1, dz[t], out=dz[t])
            dz[t] *= dh0
            np.matmul(dz[t], W_hh.T, out=dh0)
        np.matmul(h0.T, dz[0], out=dW_hh)
        if T > 1:
            dW_hh += h[:-1].reshape(-1, H).T @ dz[1:].reshape(-1, H)
        return dz, dW_hh, dh0

    def project(self, h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
        T, B, H = h.shape
        logits = np.empty((T, B, W_hq.shape[1]), h.dtype) if out is None else out
        np.matmul(h.reshape(-1, H), W_hq, out=logits.reshape(T * B, -1))
        logits += b_q
        return logits

    def project_backward(
        self,
        dlogits: Array,
        h: Array,
        W_hq: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        H, V = W_hq.shape
        dh, dW_hq, db_q = out or (
            np.empty_like(h),
            np.empty_like(W_hq),
            np.empty(V, h.dtype),
        )
        flat = dlogits.reshape(-1, V)
        np.matmul(flat, W_hq.T, out=dh.reshape(-1, H))
        np.matmul(h.reshape(-1, H).T, flat, out=dW_hq)
        flat.sum(axis=0, out=db_q)
        return dh, dW_hq, db_q

    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        loss, dlogits = out or (np.empty((), logits.dtype), np.empty_like(logits))
        n, V = targets.size, logits.shape[-1]
        rows, ids = np.arange(n), targets.ravel()
        d = dlogits.reshape(n, V)
        np.subtract(logits.reshape(n, V), logits.reshape(n, V).max(axis=-1, keepdims=True), out=d)
        at_target = d[rows, ids].astype(np.float64)
        np.exp(d, out=d)
        total = d.sum(axis=-1)
        loss[...] = np.mean(np.log(total, dtype=np.float64) - at_target)
        d *= (1 / (n * total))[:, None]
        d[rows, ids] -= d.dtype.type(1 / n)
        return loss, dlogits

    def clip_by_global_norm(
        self, grads: Sequence[Array], max_norm: float, out: Array | None = None
    ) -> Array:
        norm = np.empty((), grads[0].dtype) if out is None else out
        # float32 sums of at most 2**16 squares, added up in float64: millions lose digits
        chunks = (g.ravel()[i : i + (1 << 16)] for g in grads for i in range(0, g.size, 1 << 16))
        norm[...] = np.sqrt(sum(float(np.vdot(c, c)) for c in chunks))
        if norm > max_norm:
            for g in grads:
                g *= g.dtype.type(max_norm / float(norm))
        return norm

    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        for p, g in zip(params, grads, strict=True):
            p -= p.dtype.type(lr) * g

    def record(self, loss: Array, norm: Array, totals: Array) -> None:
        totals += (loss, norm, 1.0, not (np.isfinite(loss) and np.isfinite(norm)))

    def generate(
        self,
        params: Mapping[str, Array],
        prefix: HostArray,
        lengths: HostArray,
        num_tokens: int,
        decoding: Decoding,
        *,
        h0: HostArray | None = None,
        position: int = 0,
        sequence: int = 0,
    ) -> tuple[HostArray, HostArray]:
        W_xh, W_hh, b_h = params["W_xh"], params["W_hh"], params["b_h"]
        W_hq, b_q = params["W_hq"], params["b_q"]
        S = len(prefix)
        h = np.zeros((S, len(W_hh)), W_hh.dtype) if h0 is None else np.array(h0)
        for t in range(prefix.shape[1]):
            stepped = np.tanh(W_xh[prefix[:, t]] + h @ W_hh + b_h)
            h = np.where((t < lengths)[:, None], stepped, h)
        tokens = np.empty((S, num_tokens), np.int32)
        for i in range(num_tokens):
            if i > 0:
                h = np.tanh(W_xh[tokens[:, i - 1]] + h @ W_hh + b_h)
            logits = h @ W_hq + b_q
            for s in range(S):
                u = 0.0
                if decoding.temperature > 0.0:
                    u = uniform(decoding.seed, sequence + s, position + i)
                tokens[s, i] = choose(logits[s], decoding, u)
        return tokens, h
