"""The ops of the model for JAX, with gradients, eagerly or under ``jit``; fast on a CPU.

    z = gather(W_xh, tokens, b_h)
    h = recurrence(z, W_hh, h0)
    logits = project(h, W_hq, b_q)
    loss = cross_entropy(logits, targets)

Each is a ``jax.custom_vjp`` whose two directions run the CPU backend's op on XLA's own buffers:
nothing is copied, and the result is the same to the bit in every run. ``FASTRNN_BACKEND`` chooses
the backend as for :mod:`fastrnn.ops`. Which platform a program is for is known when JAX lowers it:
for a GPU or a TPU it gets the same ops in plain JAX, ``lax.scan`` among them, with the products of
their dtype and not of TF32, and a UserWarning, one in a process, says so.

Arguments are JAX or NumPy arrays; as everywhere in JAX, a NumPy array of float64 is taken as
float32 unless ``jax_enable_x64`` is set. Shapes and dtypes are checked when a function is called or
traced: TypeError for what is not an array or not of the right dtype (float32 and float64 are
taken, never mixed), ValueError for a wrong shape. A token out of range is a ValueError where the
tokens are known at that time; under a transformation they are not, and JAX raises the ValueError
inside its own ``jax.errors.JaxRuntimeError`` when the result is awaited. In plain JAX nothing can
be raised then: what such a token has a part in is NaN.

``grad``, ``value_and_grad``, ``vjp``, ``checkpoint``, ``scan`` and donated buffers work as for any
function of JAX's. Apart from that:

- ``vmap`` runs the op once for each element, one after the other. To run many sequences at once,
  put them into the batch axis ``B``.
- ``shard_map`` needs ``check_vma=False`` for gradients.
- There are first derivatives in reverse mode. A second derivative raises NotImplementedError,
  ``jvp`` TypeError.
- A program with these ops that was compiled for a CPU is neither kept in JAX's persistent cache nor
  exportable, and Ctrl-C while one of them runs is a ``JaxRuntimeError`` that names
  KeyboardInterrupt.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrnn.ops import _check_shape, _cpu_backend, _readable

try:
    import jax
    import jax.extend.core
    import jax.interpreters.batching
    import jax.interpreters.mlir
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
    """The ``op`` in the compiled program, with results as in ``out``: a call of the CPU backend's
    where the program is for a CPU, else plain JAX.
    """
    _wait_at_exit()
    callback = buffer_callback(_CALLBACKS[op], out, vmap_method="sequential")
    plain = functools.partial(_PLAIN[op], out)

    def elsewhere(first: Array, *rest: Array) -> Any:
        return plain(_in_plain_jax.bind(first), *rest)

    call = jax.custom_jvp(
        lambda *args: jax.lax.platform_dependent(*args, cpu=callback, default=elsewhere)
    )
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


def _view(buffer: Any) -> Any:
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


# --- Plain JAX, for other platforms than a CPU -------------------------------------------------

_matmul = functools.partial(jnp.matmul, precision="highest")
_einsum = functools.partial(jnp.einsum, precision="highest")


def _plain_gather(_: Any, W_xh: Array, tokens: Array, b_h: Array) -> Array:
    rows = _rows(tokens, len(W_xh))
    return W_xh.at[rows].get(mode="fill", fill_value=jnp.nan) + b_h


def _plain_gather_backward(out: Any, dz: Array, tokens: Array) -> tuple[Array, Array]:
    zero = jnp.zeros(out[0].shape, dz.dtype)
    rows = _rows(tokens, len(zero))
    dz = jnp.where((rows < len(zero))[..., None], dz, jnp.nan)
    return zero.at[rows].add(dz, mode="drop"), dz.sum((0, 1))


def _plain_recurrence(_: Any, z: Array, W_hh: Array, h0: Array) -> Array:
    def cell(h: Array, z_t: Array) -> tuple[Array, Array]:
        h = jnp.tanh(z_t + _matmul(h, W_hh))
        return h, h

    return jax.lax.scan(cell, h0, z)[1]


def _plain_recurrence_backward(_: Any, dh: Array, h: Array, W_hh: Array, h0: Array) -> Any:
    def cell(back: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        dh_t, h_t = step
        dz_t = (dh_t + back) * (1 - h_t * h_t)
        return _matmul(dz_t, W_hh.T), dz_t

    dh0, dz = jax.lax.scan(cell, jnp.zeros_like(h0), (dh, h), reverse=True)
    before = jnp.concatenate([h0[None], h[:-1]])
    return dz, _einsum("tbi,tbj->ij", before, dz), dh0


def _plain_project(_: Any, h: Array, W_hq: Array, b_q: Array) -> Array:
    return _matmul(h, W_hq) + b_q


def _plain_project_backward(_: Any, dlogits: Array, h: Array, W_hq: Array) -> Any:
    dW_hq = _einsum("tbi,tbj->ij", h, dlogits)
    return _matmul(dlogits, W_hq.T), dW_hq, dlogits.sum((0, 1))


def _plain_cross_entropy(_: Any, logits: Array, targets: Array) -> tuple[Array, Array]:
    V, n = logits.shape[2], targets.size
    target = _rows(targets, V)[..., None]
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, target, axis=2, mode="fill", fill_value=jnp.nan)
    dlogits = jnp.exp(log_p) - (jnp.arange(V) == target)
    return -picked.mean(), jnp.where(target < V, dlogits, jnp.nan) / n


def _rows(tokens: Array, V: int) -> Array:
    """Tokens with ``V``, which no row has, in the place of those out of range."""
    return jnp.where((tokens >= 0) & (tokens < V), tokens, V)


_PLAIN: dict[str, Callable[..., Any]] = {
    "gather": _plain_gather,
    "gather_backward": _plain_gather_backward,
    "recurrence": _plain_recurrence,
    "recurrence_backward": _plain_recurrence_backward,
    "project": _plain_project,
    "project_backward": _plain_project_backward,
    "cross_entropy": _plain_cross_entropy,
}


def _lower_in_plain_jax(context: Any, operand: Any) -> list[Any]:
    _warn_of_plain_jax()
    return [operand]


@functools.cache
def _warn_of_plain_jax() -> None:
    warnings.warn(
        "fastrnn.jax has kernels for the CPU only: this program is for another device and runs its "
        "ops in plain JAX, with jax.lax.scan. fastrnn.ops and fastrnn.torch have kernels for CUDA",
        stacklevel=2,
    )


# The identity. It is lowered only with a branch that is taken: the place from which to warn.
_in_plain_jax = jax.extend.core.Primitive("fastrnn_in_plain_jax")
_in_plain_jax.def_abstract_eval(lambda operand: operand)
jax.interpreters.batching.defvectorized(_in_plain_jax)
jax.interpreters.mlir.register_lowering(_in_plain_jax, _lower_in_plain_jax)


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
