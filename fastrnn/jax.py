"""The ops of the model for JAX on a CPU, with gradients, eagerly or under ``jit``.

    z = gather(W_xh, tokens, b_h)
    h = recurrence(z, W_hh, h0)
    logits = project(h, W_hq, b_q)
    loss = cross_entropy(logits, targets)

Each is a ``jax.custom_vjp`` whose two directions run the CPU backend's op on XLA's own buffers:
nothing is copied, and the result is the same to the bit in every run. ``FASTRNN_BACKEND`` chooses
the backend as for :mod:`fastrnn.ops`.

Arguments are JAX or NumPy arrays; as everywhere in JAX, a NumPy array of float64 is taken as
float32 unless ``jax_enable_x64`` is set. Shapes and dtypes are checked when a function is called or
traced: TypeError for what is not an array or not of the right dtype (float32 and float64 are
taken, never mixed), ValueError for a wrong shape. A token out of range is a ValueError where the
tokens are known at that time; under a transformation they are not, and JAX raises the ValueError
inside its own ``jax.errors.JaxRuntimeError`` when the result is awaited.

``grad``, ``value_and_grad``, ``vjp``, ``checkpoint``, ``scan`` and donated buffers work as for any
function of JAX's. Apart from that:

- ``vmap`` runs the op once for each element, one after the other. To run many sequences at once,
  put them into the batch axis ``B``.
- ``shard_map`` needs ``check_vma=False`` for gradients.
- There are first derivatives in reverse mode. A second derivative raises NotImplementedError,
  ``jvp`` TypeError.
- On a GPU the program fails with a ``JaxRuntimeError`` that says so: compute under
  ``jax.default_device(jax.devices("cpu")[0])`` there.
- A compiled program with these ops is neither kept in JAX's persistent cache nor exportable, and
  Ctrl-C while one of them runs is a ``JaxRuntimeError`` that names KeyboardInterrupt.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrnn.ops import _check_shape, _cpu_backend, _readable

try:
    import jax
    import jax.numpy as jnp
    from jax.experimental.buffer_callback import buffer_callback
except ImportError as _error:
    raise ImportError(
        f'fastrnn.jax needs JAX 0.6.1 or later: pip install "fastrnn[jax]" ({_error})'
    ) from _error

Array = Any
"""A ``jax.Array``, traced or not; a NumPy array where one is taken."""


def gather(W_xh: Array, tokens: Array, b_h: Array) -> Array:
    """Rows of ``W_xh`` by token, plus the bias; its gradient is a deterministic scatter-add.

    Args:
        W_xh: ``[V, H]``. tokens: int32 or int64 ``[T, B]``, each in ``[0, V)``. b_h: ``[H]``.

    Returns:
        z ``[T, B, H]``, differentiable in ``W_xh`` and ``b_h``.
    """
    W_xh = _first("W_xh", W_xh, (None, None))
    V, H = W_xh.shape
    tokens = _tokens("tokens", tokens, V, (None, None))
    return _gather(W_xh, tokens, _array("b_h", b_h, (H,), W_xh.dtype))


def recurrence(z: Array, W_hh: Array, h0: Array) -> Array:
    """The fused tanh-matmul recurrence ``h_t = tanh(z_t + h_{t-1} W_hh)`` (Elman 1990).

    Args:
        z: ``[T, B, H]``. W_hh: ``[H, H]``. h0: ``[B, H]``.

    Returns:
        h ``[T, B, H]``, differentiable in all three by back-propagation through time.
    """
    z = _first("z", z, (None, None, None))
    _, B, H = z.shape
    W_hh = _array("W_hh", W_hh, (H, H), z.dtype)
    return _recurrence(z, W_hh, _array("h0", h0, (B, H), z.dtype))


def project(h: Array, W_hq: Array, b_q: Array) -> Array:
    """The output layer ``h W_hq + b_q``.

    Args:
        h: ``[T, B, H]``. W_hq: ``[H, V]``. b_q: ``[V]``.

    Returns:
        logits ``[T, B, V]``, differentiable in all three.
    """
    h = _first("h", h, (None, None, None))
    W_hq = _array("W_hq", W_hq, (h.shape[2], None), h.dtype)
    return _project(h, W_hq, _array("b_q", b_q, W_hq.shape[1:], h.dtype))


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean cross entropy from logits, in nats; one pass computes the loss and its gradient.

    Args:
        logits: ``[T, B, V]``. targets: int32 or int64 ``[T, B]``, each in ``[0, V)``.

    Returns:
        loss, shape ``()``, differentiable in ``logits``.
    """
    logits = _first("logits", logits, (None, None, None))
    T, B, V = logits.shape
    return _cross_entropy(logits, _tokens("targets", targets, V, (T, B)))


# --- The two directions of each op -----------------------------------------------------------


def _gather_forward(W_xh: Array, tokens: Array, b_h: Array) -> tuple[Array, Any]:
    z = _call("gather", _like(W_xh, *tokens.shape, len(b_h)), W_xh, tokens, b_h)
    return z, (W_xh, tokens)  # of W_xh only the shape is used, so the program does not keep it


def _gather_backward(saved: Any, dz: Array) -> tuple[Array, None, Array]:
    W_xh, tokens = saved
    outs = (_like(W_xh, *W_xh.shape), _like(dz, dz.shape[2]))
    dW_xh, db_h = _call("gather_backward", outs, dz, tokens)
    return dW_xh, None, db_h


def _recurrence_forward(z: Array, W_hh: Array, h0: Array) -> tuple[Array, Any]:
    h = _call("recurrence", _like(z, *z.shape), z, W_hh, h0)
    return h, (h, W_hh, h0)


def _recurrence_backward(saved: Any, dh: Array) -> Any:
    outs = tuple(_like(a, *a.shape) for a in saved)
    return _call("recurrence_backward", outs, dh, *saved)


def _project_forward(h: Array, W_hq: Array, b_q: Array) -> tuple[Array, Any]:
    logits = _call("project", _like(h, *h.shape[:2], len(b_q)), h, W_hq, b_q)
    return logits, (h, W_hq)


def _project_backward(saved: Any, dlogits: Array) -> Any:
    outs = (*(_like(a, *a.shape) for a in saved), _like(dlogits, dlogits.shape[2]))
    return _call("project_backward", outs, dlogits, *saved)


def _cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, Array]:
    loss, dlogits = _call(
        "cross_entropy", (_like(logits), _like(logits, *logits.shape)), logits, targets
    )
    return loss, dlogits


def _cross_entropy_backward(dlogits: Array, dloss: Array) -> tuple[Array, None]:
    return dloss * dlogits, None


def _differentiable(forward: Any, backward: Any) -> Any:
    """The op whose forward pass returns ``(result, saved)`` and whose gradient is ``backward``."""
    op = jax.custom_vjp(lambda *args: forward(*args)[0])
    op.defvjp(forward, backward)
    return jax.jit(op)  # for calls outside jit: they need no new trace then


_gather = _differentiable(_gather_forward, _gather_backward)
_recurrence = _differentiable(_recurrence_forward, _recurrence_backward)
_project = _differentiable(_project_forward, _project_backward)
_cross_entropy = _differentiable(_cross_entropy_forward, _cross_entropy_backward)


# --- From XLA to the backend -----------------------------------------------------------------


def _like(array: Array, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _call(op: str, out: Any, *operands: Array) -> Any:
    """A call of the backend's ``op`` in the compiled program, with results as in ``out``."""
    _wait_at_exit()
    call = jax.custom_jvp(buffer_callback(_CALLBACKS[op], out, vmap_method="sequential"))
    call.defjvp(_no_derivative)
    return call(*operands)


def _callback(op: str) -> Callable[..., None]:
    """What XLA calls, on buffers that are its own: nothing of JAX's may be called in here.

    Shapes and dtypes were checked when the program was traced.
    """

    def callback(_: Any, out: Any, *operands: Any) -> None:
        backend = _cpu_backend(os.environ.get("FASTRNN_BACKEND", ""))
        args: list[Any] = [_view(buffer) for buffer in operands]
        outs = tuple(map(_view, out)) if isinstance(out, tuple) else _view(out)
        if op == "gather":
            args[1] = _in_range("tokens", args[1], len(args[0]))
        elif op == "gather_backward":
            args[1:] = _in_range("tokens", args[1], len(outs[0])), len(outs[0])
        elif op == "cross_entropy":
            args[1] = _in_range("targets", args[1], args[0].shape[2])
        getattr(backend, op)(*args, out=outs)

    return callback


# One function an op for the life of the process: for another one JAX would compile anew.
_CALLBACKS = {
    op: _callback(op)
    for op in (
        "gather",
        "gather_backward",
        "recurrence",
        "recurrence_backward",
        "project",
        "project_backward",
        "cross_entropy",
    )
}

_CPU = 1  # a device type of dlpack.h


def _view(buffer: Any) -> Any:
    if buffer.__dlpack_device__()[0] != _CPU:
        raise RuntimeError(
            "fastrnn.jax computes on the CPU only: put the arrays there with "
            'jax.device_put(..., jax.devices("cpu")[0]), or use fastrnn.ops or fastrnn.torch'
        )
    return _readable(np.asarray(buffer))


def _in_range(name: str, tokens: Any, V: int) -> Any:
    """Check token ids against the vocabulary size; return them as int32."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= V:
        bad = low if low < 0 else high
        raise ValueError(f"{name} must be in [0, V) with V = {V}, got {bad}")
    return tokens.astype(np.int32, copy=False)


def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "fastrnn.jax has first derivatives in reverse mode only: for others write the recurrence "
        "with jax.lax.scan"
    )


@functools.cache
def _wait_at_exit() -> None:
    """At exit, let computations end while Python still runs: their callbacks need it."""

    def wait() -> None:
        with contextlib.suppress(RuntimeError):  # where JAX was told to use no CPU
            for array in jax.live_arrays("cpu"):
                with contextlib.suppress(Exception):  # of a computation that nobody asked about
                    array.block_until_ready()

    atexit.register(wait)


# --- Checks ----------------------------------------------------------------------------------


def _first(name: str, array: Any, shape: tuple[int | None, ...]) -> Array:
    """Check the array that sets the dtype of the others."""
    array = _as_jax(name, array)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {array.dtype}")
    _check_shape(name, array, shape)
    return array


def _array(name: str, array: Any, shape: tuple[int | None, ...], dtype: Any) -> Array:
    array = _as_jax(name, array)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the other arrays, got {array.dtype}")
    _check_shape(name, array, shape)
    return array


def _tokens(name: str, tokens: Any, V: int, shape: tuple[int | None, ...]) -> Array:
    array = _as_jax(name, tokens)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must be int32 or int64, got {array.dtype}")
    _check_shape(name, array, shape)
    if not isinstance(tokens, jax.core.Tracer):
        _in_range(name, np.asarray(tokens), V)
    return array


def _as_jax(name: str, array: Any) -> Array:
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(array).__name__}")
    return jnp.asarray(array)
