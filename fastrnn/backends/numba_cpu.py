"""The ``numba`` backend: the ops of the model compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np

from fastrnn.backend import Array
from fastrnn.backends.numpy_ import NumpyBackend

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    """Compile ``function``: no GIL, cached, IEEE division, and no assumption that NaN is absent."""
    compiled: _Function = numba.njit(
        cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"}
    )(function)
    return compiled


@_jit
def _cross_entropy(logits: Any, targets: Any, dlogits: Any) -> float:
    """Row by row in one pass while the row is in cache; returns the mean loss."""
    n, V = logits.shape
    total = 0.0
    for r in range(n):
        top = logits[r, 0]
        for v in range(V):
            top = max(top, logits[r, v])
        at_target = np.float64(logits[r, targets[r]] - top)
        mass = np.float64(0.0)
        for v in range(V):
            e = np.exp(logits[r, v] - top)
            dlogits[r, v] = e
            mass += e
        scale = logits.dtype.type(1.0 / (n * mass))
        for v in range(V):
            dlogits[r, v] *= scale
        dlogits[r, targets[r]] -= logits.dtype.type(1.0 / n)
        total += np.log(mass) - at_target
    return float(total / n)


@_jit
def _gather_backward(dz: Any, tokens: Any, dW_xh: Any, db_h: Any) -> None:
    """Rows are added in the order of time, so the sum is the same in every run."""
    dW_xh[:] = 0
    db_h[:] = 0
    for r in range(len(dz)):
        v = tokens[r]
        for j in range(dz.shape[1]):
            dW_xh[v, j] += dz[r, j]
            db_h[j] += dz[r, j]


@_jit
def _sgd(p: Any, g: Any, lr: Any) -> None:
    for i in range(len(p)):
        p[i] -= lr * g[i]


class NumbaBackend(NumpyBackend):
    """Backend on ``numpy.ndarray`` with compiled loops."""

    name = "numba"

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "numba": numba.__version__}

    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        H = dz.shape[-1]
        dW_xh, db_h = out or (np.empty((V, H), dz.dtype), np.empty(H, dz.dtype))
        _gather_backward(dz.reshape(-1, H), tokens.ravel(), dW_xh, db_h)
        return dW_xh, db_h

    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        loss, dlogits = out or (np.empty((), logits.dtype), np.empty_like(logits))
        V = logits.shape[-1]
        loss[...] = _cross_entropy(logits.reshape(-1, V), targets.ravel(), dlogits.reshape(-1, V))
        return loss, dlogits

    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        for p, g in zip(params, grads, strict=True):
            _sgd(p.reshape(-1), g.reshape(-1), p.dtype.type(lr))
