"""The ops of the model as stateless functions on arrays.

    z = gather(W_xh, tokens, b_h)             dW_xh, db_h = gather_backward(dz, tokens, V)
    h = recurrence(z, W_hh, h0)               dz, dW_hh, dh0 = recurrence_backward(dh, h, W_hh, h0)
    logits = project(h, W_hq, b_q)            dh, dW_hq, db_q = project_backward(dlogits, h, W_hq)
    loss, dlogits = cross_entropy(logits, targets)
    norm = clip_by_global_norm(grads, max_norm)          sgd(params, grads, lr)

The type of the arrays decides where the work is done: NumPy arrays on the CPU backend, and the
same kind of array comes back. Arrays that are not contiguous are copied once. Every argument is
checked here, once for all backends: TypeError for a wrong kind of array or dtype, ValueError for a
wrong shape or a token out of range; both say what was expected and what came.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrnn.backend import Array, Backend, BackendUnavailableError, open_backend

CPU_BACKENDS = ("numba", "numpy")


def gather(W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
    """Rows of ``W_xh`` by token, plus the bias: what ``onehot(tokens) W_xh + b_h`` is.

    Args:
        W_xh: ``[V, H]``. tokens: int32 or int64 ``[T, B]``, each in ``[0, V)``. b_h: ``[H]``.
        out: ``[T, B, H]``, optional.

    Returns:
        z ``[T, B, H]``.
    """
    backend, dtype = _backend_of("W_xh", W_xh), W_xh.dtype
    V, H = _shape("W_xh", W_xh, (None, None))
    T, B = _shape("tokens", tokens, (None, None))
    tokens = _tokens("tokens", tokens, V)
    W_xh, b_h = _array("W_xh", W_xh, dtype, (V, H)), _array("b_h", b_h, dtype, (H,))
    return backend.gather(W_xh, tokens, b_h, out=_out("out", out, dtype, (T, B, H)))


def gather_backward(
    dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """The transpose of :func:`gather`: a scatter-add that is the same to the bit in every run.

    Args:
        dz: ``[T, B, H]``. tokens: int32 or int64 ``[T, B]``. V: vocabulary size.
        out: ``(dW_xh [V, H], db_h [H])``, optional; overwritten, not added to.

    Returns:
        dW_xh ``[V, H]``, ``dW_xh[v] = Σ dz[t, b]`` over ``tokens[t, b] == v``, and db_h ``[H]``.
    """
    backend, dtype = _backend_of("dz", dz), dz.dtype
    T, B, H = _shape("dz", dz, (None, None, None))
    _shape("tokens", tokens, (T, B))
    tokens = _tokens("tokens", tokens, V)
    dz = _array("dz", dz, dtype, (T, B, H))
    return backend.gather_backward(
        dz, tokens, int(V), out=_outs(out, dtype, dW_xh=(V, H), db_h=(H,))
    )


def recurrence(z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
    """The fused tanh-matmul recurrence ``h_t = tanh(z_t + h_{t-1} W_hh)`` (Elman 1990).

    Args:
        z: ``[T, B, H]``. W_hh: ``[H, H]``. h0: ``[B, H]``.
        out: ``[T, B, H]``, optional; may be ``z``.

    Returns:
        h ``[T, B, H]``.
    """
    backend, dtype = _backend_of("z", z), z.dtype
    T, B, H = _shape("z", z, (None, None, None))
    z, W_hh = _array("z", z, dtype, (T, B, H)), _array("W_hh", W_hh, dtype, (H, H))
    h0 = _array("h0", h0, dtype, (B, H))
    return backend.recurrence(z, W_hh, h0, out=_out("out", out, dtype, (T, B, H)))


def recurrence_backward(
    dh: Array, h: Array, W_hh: Array, h0: Array, out: tuple[Array, Array, Array] | None = None
) -> tuple[Array, Array, Array]:
    """Back-propagation through time of :func:`recurrence` (Werbos 1990).

    Args:
        dh: ``[T, B, H]``, what reaches each ``h_t`` from outside the recurrence.
        h: ``[T, B, H]``, what :func:`recurrence` returned. W_hh: ``[H, H]``. h0: ``[B, H]``.
        out: ``(dz, dW_hh, dh0)``, optional; its ``dz`` may be ``dh``.

    Returns:
        dz ``[T, B, H]``, dW_hh ``[H, H]``, dh0 ``[B, H]``.
    """
    backend, dtype = _backend_of("dh", dh), dh.dtype
    T, B, H = _shape("dh", dh, (None, None, None))
    dh, h = _array("dh", dh, dtype, (T, B, H)), _array("h", h, dtype, (T, B, H))
    W_hh, h0 = _array("W_hh", W_hh, dtype, (H, H)), _array("h0", h0, dtype, (B, H))
    return backend.recurrence_backward(
        dh, h, W_hh, h0, out=_outs(out, dtype, dz=(T, B, H), dW_hh=(H, H), dh0=(B, H))
    )


def project(h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
    """The output layer ``h W_hq + b_q``.

    Args:
        h: ``[T, B, H]``. W_hq: ``[H, V]``. b_q: ``[V]``. out: ``[T, B, V]``, optional.

    Returns:
        logits ``[T, B, V]``.
    """
    backend, dtype = _backend_of("h", h), h.dtype
    T, B, H = _shape("h", h, (None, None, None))
    _, V = _shape("W_hq", W_hq, (H, None))
    h, W_hq = _array("h", h, dtype, (T, B, H)), _array("W_hq", W_hq, dtype, (H, V))
    b_q = _array("b_q", b_q, dtype, (V,))
    return backend.project(h, W_hq, b_q, out=_out("out", out, dtype, (T, B, V)))


def project_backward(
    dlogits: Array, h: Array, W_hq: Array, out: tuple[Array, Array, Array] | None = None
) -> tuple[Array, Array, Array]:
    """The gradients of :func:`project`.

    Args:
        dlogits: ``[T, B, V]``. h: ``[T, B, H]``. W_hq: ``[H, V]``.
        out: ``(dh, dW_hq, db_q)``, optional.

    Returns:
        dh ``[T, B, H]``, dW_hq ``[H, V]``, db_q ``[V]``.
    """
    backend, dtype = _backend_of("dlogits", dlogits), dlogits.dtype
    T, B, V = _shape("dlogits", dlogits, (None, None, None))
    _, _, H = _shape("h", h, (T, B, None))
    dlogits, h = _array("dlogits", dlogits, dtype, (T, B, V)), _array("h", h, dtype, (T, B, H))
    W_hq = _array("W_hq", W_hq, dtype, (H, V))
    return backend.project_backward(
        dlogits, h, W_hq, out=_outs(out, dtype, dh=(T, B, H), dW_hq=(H, V), db_q=(V,))
    )


def cross_entropy(
    logits: Array, targets: Array, out: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Mean cross entropy from logits, in nats, and its gradient, with a stable log-sum-exp.

    Args:
        logits: ``[T, B, V]``. targets: int32 or int64 ``[T, B]``, each in ``[0, V)``.
        out: ``(loss, dlogits)``, optional; its ``dlogits`` may be ``logits``.

    Returns:
        loss, shape ``()``, and dlogits ``(softmax(logits) - onehot(targets)) / (T B)``.
    """
    backend, dtype = _backend_of("logits", logits), logits.dtype
    T, B, V = _shape("logits", logits, (None, None, None))
    _shape("targets", targets, (T, B))
    targets = _tokens("targets", targets, V)
    logits = _array("logits", logits, dtype, (T, B, V))
    return backend.cross_entropy(logits, targets, out=_outs(out, dtype, loss=(), dlogits=(T, B, V)))


def clip_by_global_norm(grads: Sequence[Array], max_norm: float) -> Array:
    """Scale ``grads`` in place by ``min(1, max_norm / norm)`` (Pascanu et al. 2013).

    Returns:
        The norm of all gradients together before scaling, shape ``()``; on a GPU it stays there.
    """
    grads = list(grads)
    if not grads:
        raise ValueError("grads must hold at least one array, got none")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    backend = _backend_of("grads[0]", grads[0])
    for i, g in enumerate(grads):
        _out(f"grads[{i}]", g, grads[0].dtype, None)
    return backend.clip_by_global_norm(grads, float(max_norm))


def sgd(params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
    """``p -= lr * g`` in place for each pair of ``params`` and ``grads``."""
    params, grads = list(params), list(grads)
    if len(params) != len(grads):
        raise ValueError(f"expected as many grads as params, {len(params)}, got {len(grads)}")
    if not params:
        return
    backend = _backend_of("params[0]", params[0])
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        _out(f"params[{i}]", p, params[0].dtype, None)
        grads[i] = _array(f"grads[{i}]", g, p.dtype, p.shape)
    backend.sgd(params, grads, float(lr))


# --- Dispatch and checks ---------------------------------------------------------------------


@functools.cache
def _cpu_backend(override: str) -> Backend:
    if override in CPU_BACKENDS:
        return open_backend(override)
    try:
        return open_backend("numba")
    except BackendUnavailableError:
        return open_backend("numpy")


def _backend_of(name: str, array: Array) -> Backend:
    """The backend that works on this kind of array."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {array.dtype}")
    return _cpu_backend(os.environ.get("FASTRNN_BACKEND", ""))


def _shape(name: str, array: Array, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """Check ``array.shape`` against ``expected``, where None is any size >= 1; return it."""
    shape = getattr(array, "shape", None)
    if shape is None:
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    fits = len(shape) == len(expected) and all(
        have >= 1 if want is None else have == want
        for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("n >= 1" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(shape)}")
    return tuple(shape)


def _array(name: str, array: Array, dtype: Any, shape: tuple[int, ...]) -> Array:
    """Check kind, dtype and shape of an input; return it contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the other arrays, got {array.dtype}")
    _shape(name, array, shape)
    return np.ascontiguousarray(array)


def _out(name: str, array: Array | None, dtype: Any, shape: tuple[int, ...] | None) -> Array | None:
    """Check an array that will be written: it must be contiguous and writable."""
    if array is None:
        return None
    _array(name, array, dtype, array.shape if shape is None else shape)
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(f"{name} must be C-contiguous and writable: it is written in place")
    return array


def _outs(out: tuple[Array, ...] | None, dtype: Any, **shapes: tuple[int, ...]) -> Any:
    """Check a tuple of output arrays, named and shaped as in ``shapes``."""
    if out is None:
        return None
    if len(out) != len(shapes):
        raise ValueError(f"out must be ({', '.join(shapes)}), got {len(out)} arrays")
    return tuple(
        _out(f"out {name}", array, dtype, shape)
        for array, (name, shape) in zip(out, shapes.items(), strict=True)
    )


def _tokens(name: str, tokens: Array, V: int) -> Array:
    """Check token ids against the vocabulary size; return them as contiguous int32."""
    if not isinstance(tokens, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(tokens).__name__}")
    if tokens.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tokens.dtype}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= V:
        bad = low if low < 0 else high
        raise ValueError(f"{name} must be in [0, V) with V = {V}, got {bad}")
    return np.ascontiguousarray(tokens, dtype=np.int32)
