"""The ops of the model as stateless functions on arrays.

    z = gather(W_xh, tokens, b_h)             dW_xh, db_h = gather_backward(dz, tokens, V)
    h = recurrence(z, W_hh, h0)               dz, dW_hh, dh0 = recurrence_backward(dh, h, W_hh, h0)
    logits = project(h, W_hq, b_q)            dh, dW_hq, db_q = project_backward(dlogits, h, W_hq)
    loss, dlogits = cross_entropy(logits, targets)
    norm = clip_by_global_norm(grads, max_norm)          sgd(params, grads, lr)

The first array decides where the work is done and what comes back; the others must be of its kind:

    NumPy                          the CPU backend (numba, or numpy; ``FASTRNN_BACKEND`` chooses)
    torch, on the CPU or CUDA      the CPU or CUDA backend, on memory shared with the tensors
    CuPy                           the CUDA backend
    anything with ``__dlpack__``   by its device; results through its library's ``from_dlpack``,
                                   and as NumPy or CuPy arrays where it has none

On a GPU the work goes to the caller's current stream (torch's for tensors, CuPy's otherwise), and
the host waits for it only to check token ids. Inputs may be read-only. One that is not in C order
is copied once; no other input is copied. ``out``, and what is changed in place, must be writable
and in C order, and may overlap an input only where the function says so. Functions may be called
from several threads at once.

Every argument is checked here, once for all backends: TypeError for a wrong kind of array or
dtype (float32 and float64 are taken, never mixed), ValueError for a wrong shape or a token out of
range; both say what was expected and what came. What does not fit a GPU's memory raises
:class:`fastrnn.DeviceMemoryError`, which names the sizes. Nothing is recorded for automatic
differentiation: torch tensors that would need it are refused; :mod:`fastrnn.torch` and
:mod:`fastrnn.jax` have ops with gradients.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn.backend import (
    GPU_BACKENDS,
    Array,
    Backend,
    BackendUnavailableError,
    memory_of,
    open_backend,
)
from fastrnn.checks import positive_int


def gather(W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
    """Rows of ``W_xh`` by token, plus the bias: what ``onehot(tokens) W_xh + b_h`` is.

    Args:
        W_xh: ``[V, H]``. tokens: int32 or int64 ``[T, B]``, each in ``[0, V)``. b_h: ``[H]``.
        out: ``[T, B, H]``, optional.

    Returns:
        z ``[T, B, H]``.
    """
    call = _Call("W_xh", W_xh)
    W_xh = call.array("W_xh", W_xh, (None, None))
    V, H = W_xh.shape
    call.sizes = {"H": H, "V": V}
    tokens = call.tokens("tokens", tokens, V)
    call.sizes = {"T": tokens.shape[0], "B": tokens.shape[1], "H": H, "V": V}
    b_h = call.array("b_h", b_h, (H,))
    return call.run("gather", W_xh, tokens, b_h, out=call.out("out", out, (*tokens.shape, H)))


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
    call = _Call("dz", dz)
    dz = call.array("dz", dz, (None, None, None))
    V, (T, B, H) = positive_int("V", V), dz.shape
    call.sizes = {"T": T, "B": B, "H": H, "V": V}
    tokens = call.tokens("tokens", tokens, V, (T, B))
    outs = call.outs(out, dW_xh=(V, H), db_h=(H,))
    dW_xh, db_h = call.run("gather_backward", dz, tokens, V, out=outs)
    return dW_xh, db_h


def recurrence(z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
    """The fused tanh-matmul recurrence ``h_t = tanh(z_t + h_{t-1} W_hh)`` (Elman 1990).

    Args:
        z: ``[T, B, H]``. W_hh: ``[H, H]``. h0: ``[B, H]``.
        out: ``[T, B, H]``, optional; may be ``z``.

    Returns:
        h ``[T, B, H]``.
    """
    call = _Call("z", z)
    z = call.array("z", z, (None, None, None))
    T, B, H = z.shape
    call.sizes = {"T": T, "B": B, "H": H}
    W_hh, h0 = call.array("W_hh", W_hh, (H, H)), call.array("h0", h0, (B, H))
    return call.run("recurrence", z, W_hh, h0, out=call.out("out", out, (T, B, H)), inplace=z)


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
    call = _Call("dh", dh)
    dh = call.array("dh", dh, (None, None, None))
    T, B, H = dh.shape
    call.sizes = {"T": T, "B": B, "H": H}
    h, W_hh = call.array("h", h, (T, B, H)), call.array("W_hh", W_hh, (H, H))
    h0 = call.array("h0", h0, (B, H))
    outs = call.outs(out, dz=(T, B, H), dW_hh=(H, H), dh0=(B, H))
    dz, dW_hh, dh0 = call.run("recurrence_backward", dh, h, W_hh, h0, out=outs, inplace=dh)
    return dz, dW_hh, dh0


def project(h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
    """The output layer ``h W_hq + b_q``.

    Args:
        h: ``[T, B, H]``. W_hq: ``[H, V]``. b_q: ``[V]``. out: ``[T, B, V]``, optional.

    Returns:
        logits ``[T, B, V]``.
    """
    call = _Call("h", h)
    h = call.array("h", h, (None, None, None))
    T, B, H = h.shape
    W_hq = call.array("W_hq", W_hq, (H, None))
    V = W_hq.shape[1]
    call.sizes = {"T": T, "B": B, "H": H, "V": V}
    b_q = call.array("b_q", b_q, (V,))
    return call.run("project", h, W_hq, b_q, out=call.out("out", out, (T, B, V)))


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
    call = _Call("dlogits", dlogits)
    dlogits = call.array("dlogits", dlogits, (None, None, None))
    T, B, V = dlogits.shape
    h = call.array("h", h, (T, B, None))
    H = h.shape[2]
    call.sizes = {"T": T, "B": B, "H": H, "V": V}
    W_hq = call.array("W_hq", W_hq, (H, V))
    outs = call.outs(out, dh=(T, B, H), dW_hq=(H, V), db_q=(V,))
    dh, dW_hq, db_q = call.run("project_backward", dlogits, h, W_hq, out=outs)
    return dh, dW_hq, db_q


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
    call = _Call("logits", logits)
    logits = call.array("logits", logits, (None, None, None))
    T, B, V = logits.shape
    call.sizes = {"T": T, "B": B, "V": V}
    targets = call.tokens("targets", targets, V, (T, B))
    outs = call.outs(out, loss=(), dlogits=(T, B, V))
    loss, dlogits = call.run("cross_entropy", logits, targets, out=outs, inplace=logits)
    return loss, dlogits


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
    call = _Call("grads[0]", grads[0])
    views = call.written("grads", grads)
    return call.run("clip_by_global_norm", views, float(max_norm))


def sgd(params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
    """``p -= lr * g`` in place for each pair of ``params`` and ``grads``."""
    params, grads = list(params), list(grads)
    if len(params) != len(grads):
        raise ValueError(f"expected as many grads as params, {len(params)}, got {len(grads)}")
    if not params:
        return
    call = _Call("params[0]", params[0])
    params = call.written("params", params)
    grads = [
        call.array(f"grads[{i}]", g, p.shape)
        for i, (p, g) in enumerate(zip(params, grads, strict=True))
    ]
    call.run("sgd", params, grads, float(lr))


# --- Kinds of arrays -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """A kind of array: how to see it as a NumPy or CuPy array, and how to give such a one back.

    Attributes:
        name: what messages call it. key: equal for arrays that may meet in one call.
        on_gpu: whether its memory is a CUDA device's.
        view: the array as a NumPy or CuPy array on the same memory.
        wrap: the inverse, for results.
        written: tell the array's library that it was written to.
        scope: a context in which work goes to the caller's current device and stream.
    """

    name: str
    key: Any
    on_gpu: bool
    view: Callable[[Any], Array]
    wrap: Callable[[Array], Any]
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    written: Callable[[Any], None] = lambda a: None


_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # device types of dlpack.h

_NUMPY = _Kind("a NumPy array", "numpy", False, np.asarray, lambda a: a)


def _kind_of(name: str, array: Any) -> _Kind:
    if isinstance(array, np.ndarray):
        return _NUMPY
    torch = sys.modules.get("torch")  # an array's library has been imported by its owner
    if torch is not None and isinstance(array, torch.Tensor):
        return _torch_kind(name, array, torch)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        device = array.device
        return _Kind(
            f"a CuPy array on device {device.id}",
            ("cupy", device.id),
            True,
            lambda a: a,
            lambda a: a,
            lambda: device,
        )
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _dlpack_kind(name, array)
    raise TypeError(
        f"{name} must be a NumPy, CuPy or torch array or have __dlpack__, "
        f"got {type(array).__name__}"
    )


def _torch_kind(name: str, tensor: Any, torch: Any) -> _Kind:
    device = tensor.device
    label = f"a torch tensor on {device}"
    key = ("torch", str(device))
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, and fastrnn.ops records no gradients: use the functions of "
            "fastrnn.torch, or detach() or torch.no_grad()"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")

    def written(t: Any) -> None:
        if not t.is_inference():  # those have no version that autograd could check
            torch.autograd.graph.increment_version(t)

    if device.type == "cpu":
        return _Kind(
            label,
            key,
            False,
            lambda t: t.detach().numpy(),
            torch.from_numpy,
            written=written,
        )
    if device.type == "cuda":
        cupy = _cupy()
        from fastrnn.cuda.cupy_device import foreign_stream

        @contextlib.contextmanager
        def scope() -> Any:
            stream = torch.cuda.current_stream(device)
            with (
                cupy.cuda.Device(device.index),
                foreign_stream(cupy, stream.cuda_stream, device.index),
            ):
                yield

        return _Kind(
            label,
            key,
            True,
            lambda t: cupy.from_dlpack(t.detach()),
            torch.from_dlpack,
            scope,
            written,
        )
    raise TypeError(f"{name} must be a torch tensor on a CPU or CUDA device, got one on {device}")


def _dlpack_kind(name: str, array: Any) -> _Kind:
    try:
        device_type, device_id = array.__dlpack_device__()
    except Exception as error:
        # A library's tracers and lazy arrays fail here, each in a way of its own.
        raise TypeError(
            f"{name} must have memory of its own, got {type(array).__name__}: {error}"
        ) from error
    library = type(array).__module__.partition(".")[0]
    namespace = (
        array.__array_namespace__()
        if hasattr(array, "__array_namespace__")
        else sys.modules.get(library)
    )
    wrap = getattr(namespace, "from_dlpack", None) or (lambda a: a)
    label = f"a {type(array).__name__}"
    if device_type in (_CPU, _CUDA_HOST):
        return _Kind(label, (library, "cpu"), False, np.from_dlpack, wrap)
    if device_type in (_CUDA, _CUDA_MANAGED):
        cupy = _cupy()
        return _Kind(
            label,
            (library, "cuda", device_id),
            True,
            cupy.from_dlpack,
            wrap,
            lambda: cupy.cuda.Device(device_id),
        )
    raise TypeError(
        f"{name} must lie on a CPU or CUDA device, got DLPack device type {int(device_type)}"
    )


def _cupy() -> Any:
    open_backend("cupy")  # raises with the reason and the remedy where CuPy cannot work
    import cupy

    return cupy


@functools.cache
def _cpu_backend(override: str) -> Backend:
    if override and override != "auto" and override not in GPU_BACKENDS:
        return open_backend(override)
    try:
        return open_backend("numba")
    except BackendUnavailableError:
        return open_backend("numpy")


# --- Checks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Out:
    """An array to be written: the caller's own object, and the view the backend writes to."""

    given: Any
    view: Array


class _Call:
    """One call of an op: the kind and dtype that its first array sets, and the checks of all.

    Attributes:
        sizes: those known by now, by their letters, for a :class:`fastrnn.DeviceMemoryError`.
    """

    def __init__(self, name: str, first: Any) -> None:
        self.kind = _kind_of(name, first)
        view = self._view(name, first)
        if view.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name} must be float32 or float64, got {view.dtype}")
        self.dtype = view.dtype
        self.sizes: dict[str, int] = {}
        self._to_write: list[Any] = []
        if self.kind.on_gpu:
            self.backend = open_backend("cupy")
        else:
            self.backend = _cpu_backend(os.environ.get("FASTRNN_BACKEND", "").strip())

    def _scope(self) -> contextlib.AbstractContextManager[Any]:
        """Work inside goes to the caller's device and stream; what does not fit there is named."""
        return self._gpu_scope() if self.kind.on_gpu else self.kind.scope()

    @contextlib.contextmanager
    def _gpu_scope(self) -> Iterator[None]:
        from fastrnn.cuda.cupy_device import MemoryErrors

        cupy = sys.modules["cupy"]
        with self.kind.scope(), memory_of(self.sizes, self.dtype), MemoryErrors(cupy):
            yield

    def array(self, name: str, array: Any, shape: tuple[int | None, ...] | None) -> Array:
        """Check dtype and shape of an input (None is any size >= 1); return it in C order."""
        with self._scope():
            return _readable(self._checked(name, array, shape))

    def out(self, name: str, array: Any, shape: tuple[int, ...] | None) -> Any:
        """Check an array that will be written: it must be in C order and writable."""
        return None if array is None else self._written(name, array, shape)

    def written(self, name: str, arrays: Sequence[Any]) -> list[Array]:
        """Check a list of arrays of any shape that will all be written."""
        return [self._written(f"{name}[{i}]", a, None).view for i, a in enumerate(arrays)]

    def _written(self, name: str, array: Any, shape: tuple[int, ...] | None) -> _Out:
        view = self._checked(name, array, shape)
        # CuPy's arrays are always writable.
        if not view.flags.c_contiguous or not getattr(view.flags, "writeable", True):
            raise ValueError(f"{name} must be C-contiguous and writable: it is written in place")
        self._to_write.append(array)
        return _Out(array, view)

    def outs(self, out: Any, **shapes: tuple[int, ...]) -> Any:
        """Check a tuple of output arrays, named and shaped as in ``shapes``."""
        if out is None:
            return None
        if not isinstance(out, tuple | list):
            raise TypeError(f"out must be ({', '.join(shapes)}), got {type(out).__name__}")
        if len(out) != len(shapes):
            raise ValueError(f"out must be ({', '.join(shapes)}), got {len(out)} arrays")
        for array, name in zip(out, shapes, strict=True):
            if array is None:
                raise TypeError(f"out {name} must be an array, got None")
        return tuple(
            self.out(f"out {name}", array, shape)
            for array, (name, shape) in zip(out, shapes.items(), strict=True)
        )

    def tokens(
        self, name: str, tokens: Any, V: int, shape: tuple[int | None, ...] = (None, None)
    ) -> Array:
        """Check token ids against the vocabulary size; return them as int32 in C order."""
        view = self._view(name, tokens)
        if view.dtype not in (np.int32, np.int64):
            raise TypeError(f"{name} must be int32 or int64, got {view.dtype}")
        _check_shape(name, view, shape)
        with self._scope():
            low, high = int(view.min()), int(view.max())
            if low < 0 or high >= V:
                bad = low if low < 0 else high
                raise ValueError(f"{name} must be in [0, V) with V = {V}, got {bad}")
            return _readable(view.astype(np.int32, order="C", copy=False))

    def run(self, op: str, *args: Any, out: Any = None, inplace: Array | None = None) -> Any:
        """Call the backend's op on checked arguments; give its results back in the caller's kind.

        ``inplace`` is the input on whose memory an output of the same shape may lie.
        """
        outs = out if isinstance(out, tuple) else () if out is None else (out,)
        _check_overlap([o.view for o in outs], args, inplace)
        for array in self._to_write:
            self.kind.written(array)
        with self._scope():
            if not outs:
                result = getattr(self.backend, op)(*args)
                if isinstance(result, tuple):
                    return tuple(map(self.kind.wrap, result))
                return None if result is None else self.kind.wrap(result)
            views = tuple(o.view for o in outs)
            getattr(self.backend, op)(*args, out=views if isinstance(out, tuple) else views[0])
        given = tuple(o.given for o in outs)
        return given if isinstance(out, tuple) else given[0]

    def _view(self, name: str, array: Any) -> Array:
        kind = _kind_of(name, array)
        if kind.key != self.kind.key:
            raise TypeError(f"{name} must be {self.kind.name} like the first, got {kind.name}")
        try:
            with kind.scope():
                return kind.view(array)
        except (TypeError, RuntimeError, BufferError) as error:
            dtype = getattr(array, "dtype", "no dtype")
            raise TypeError(
                f"{name} must be an array of plain numbers in memory of its own, "
                f"got {type(array).__name__} of {dtype}: {error}"
            ) from error

    def _checked(self, name: str, array: Any, shape: tuple[int | None, ...] | None) -> Array:
        if array is None:
            raise TypeError(f"{name} must be an array, got None")
        view = self._view(name, array)
        if view.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype} like the other arrays, got {view.dtype}")
        if shape is not None:
            _check_shape(name, view, shape)
        return view


class _Alias:
    """The memory of a read-only NumPy array under the name of a writable one."""

    def __init__(self, array: Array) -> None:
        self.array = array  # keeps the memory alive
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _readable(view: Array) -> Array:
    """An input as the backends take it: in C order and aligned, copied once where it is not.

    A read-only NumPy array is passed under a writable alias, which no op writes to: numba would
    compile every kernel anew for read-only arguments.
    """
    if not view.flags.c_contiguous or not getattr(view.flags, "aligned", True):
        return view.copy(order="C")
    if isinstance(view, np.ndarray) and not view.flags.writeable:
        return np.asarray(_Alias(view))
    return view


def _check_shape(name: str, array: Array, expected: tuple[int | None, ...]) -> None:
    """Check ``array.shape`` against ``expected``, where None is any size >= 1."""
    fits = len(array.shape) == len(expected) and all(
        have >= 1 if want is None else have == want
        for have, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("n >= 1" if want is None else str(want) for want in expected)
        wanted += "," * (len(expected) == 1)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(array.shape)}")


def _span(array: Array) -> tuple[int, int]:
    """The addresses that a contiguous NumPy or CuPy array covers."""
    start = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return start, start + array.nbytes


def _check_overlap(outs: Sequence[Array], args: Sequence[Any], inplace: Array | None) -> None:
    """Refuse outputs on the memory of each other or of an input, ``inplace`` apart."""
    if not outs:
        return
    spans = [_span(out) for out in outs]
    read = [_span(a) for a in args if hasattr(a, "shape")]
    if inplace is not None and (whole_of_it := _span(inplace)) in spans:
        read.remove(whole_of_it)  # once: given as another input too, it is still needed
    for i, (start, stop) in enumerate(spans):
        if any(start < b and a < stop for a, b in spans[:i] + read):
            raise ValueError("out overlaps an input or another output that is still needed")
