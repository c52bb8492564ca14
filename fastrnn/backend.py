"""The seam between the trainer and the devices.

A :class:`Backend` is an opened device: it makes arrays, runs the ops of the model on them, and
composes the ops into a training step. Every op has one name everywhere: the method here, the
function in :mod:`fastrnn.ops`, the ``.cu`` file, the test, the benchmark group.

The data's path through one training step, every array preallocated in a :class:`Workspace`:

    tokens, starts -- window --> x, y -- gather, recurrence --> h -- project --> logits
    logits, y -- cross_entropy --> loss, dlogits -- project_backward --> dh
    dh -- recurrence_backward --> dz -- gather_backward --> grads -- clip, sgd --> params

Nothing in a step is read by the host. A backend makes the step faster by overriding
:meth:`Backend.step` (and :meth:`Backend.run_steps`, to submit many steps at once); the tests hold
the override to the composition below, and the composition to the oracle.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fastrnn.decoding import Decoding
from fastrnn.reference import PARAM_NAMES

Array = Any
"""An array of the backend's own kind: ``numpy.ndarray``, ``cupy.ndarray``, a numba device array."""

HostArray = NDArray[Any]

ALIGNMENT = 64
"""Bytes. Every parameter starts on such a boundary of the flat parameter and gradient buffers."""


class BackendUnavailableError(ImportError):
    """A backend was named that cannot run here; the message holds the reason and a remedy."""


class DeviceMemoryError(MemoryError):
    """An allocation did not fit the memory of the device; the message says what was wanted.

    What was being built is dropped: the same call with smaller sizes works.

    Args:
        wanted: bytes of the allocation; None where the device does not say.
        free: bytes of the device that are free; None where unknown.
        total: bytes of the device; None where unknown.

    Attributes:
        sizes: what was worked on, by the letters of the docstrings: T, B, H, V.
        dtype: of the arrays; None where unknown.
        advice: what needs less memory, or an empty string.
    """

    def __init__(
        self, wanted: int | None = None, free: int | None = None, total: int | None = None
    ) -> None:
        super().__init__(wanted, free, total)
        self.wanted, self.free, self.total = wanted, free, total
        self.sizes: dict[str, int] = {}
        self.dtype: np.dtype[Any] | None = None
        self.advice = ""

    def __str__(self) -> str:
        amount = "more" if self.wanted is None else f"{_bytes(self.wanted)} more"
        text = f"{amount} is needed"
        if self.sizes:
            work = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
            kind = "" if self.dtype is None else f" in {self.dtype}"
            text = f"{work}{kind} need {amount}"
        if self.free is not None and self.total is not None:
            text += f", {_bytes(self.free)} of {_bytes(self.total)} are free"
        return "; ".join(filter(None, [f"out of memory on the device: {text}", self.advice]))

    def describe(self, sizes: Mapping[str, int], dtype: Any = None, advice: str = "") -> None:
        """Add what was worked on; what was said nearer to the allocation stays."""
        self.sizes = self.sizes or dict(sizes)
        if self.dtype is None and dtype is not None:
            self.dtype = np.dtype(dtype)
        self.advice = self.advice or advice


def _bytes(count: int) -> str:
    """A number of bytes for people: exact below a KiB, else to a tenth of the largest unit."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


@contextlib.contextmanager
def memory_of(sizes: Mapping[str, int], dtype: Any = None, advice: str = "") -> Iterator[None]:
    """Give a :class:`DeviceMemoryError` from inside the block these sizes."""
    try:
        yield
    except DeviceMemoryError as error:
        error.describe(sizes, dtype, advice)
        raise


@dataclass(frozen=True)
class Dims:
    """The sizes of a model and of its training batches.

    Attributes:
        T: time steps a batch. B: batch size. H: hidden size. V: vocabulary size.
        dtype: float32 or float64, of parameters, activations and gradients alike.
    """

    T: int
    B: int
    H: int
    V: int
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))

    @property
    def sizes(self) -> dict[str, int]:
        """T, B, H and V by their letters."""
        return {"T": self.T, "B": self.B, "H": self.H, "V": self.V}

    @property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        H, V = self.H, self.V
        return {"W_xh": (V, H), "W_hh": (H, H), "b_h": (H,), "W_hq": (H, V), "b_q": (V,)}

    @property
    def param_slices(self) -> dict[str, slice]:
        """Where each parameter lies in the flat buffer, in elements."""
        slices, offset = {}, 0
        step = ALIGNMENT // self.dtype.itemsize
        for name, shape in self.param_shapes.items():
            size = int(np.prod(shape))
            slices[name] = slice(offset, offset + size)
            offset += -(-size // step) * step
        return slices

    @property
    def flat_size(self) -> int:
        """Elements in the flat buffer. The gaps between parameters hold zeros, always."""
        step = ALIGNMENT // self.dtype.itemsize
        return int(-(-self.param_slices["b_q"].stop // step) * step)

    def views(self, flat: Array) -> dict[str, Array]:
        """The parameters in a flat buffer, by name: they share its memory."""
        slices = self.param_slices
        return {n: flat[slices[n]].reshape(shape) for n, shape in self.param_shapes.items()}


@dataclass
class Workspace:
    """All arrays of a training run. They never move, so a step can be captured as a graph.

    Attributes:
        dims: the sizes.
        tokens: the corpus, int32 ``[N]``.
        flat_params, flat_grads: flat buffers; ``params`` and ``grads`` are views into them by name.
        x, y: int32 ``[T, B]``, the batch and its targets.
        h0: ``[B, H]``, the carried hidden state.
        z, h, dh, dz: ``[T, B, H]``; ``z`` and ``h`` share memory, and so do ``dh`` and ``dz``.
        dh0: ``[B, H]``.
        logits: ``[T, B, V]``; holds dlogits after the loss was taken.
        loss, norm: shape ``()``: of the last step, the norm before clipping.
        totals: float64 ``[4]``: sum of losses, sum of norms, number of steps, number of steps whose
            loss or norm was not finite. The only thing that the host reads, once an epoch.
        extra: whatever else a backend wants to keep with these buffers (a captured graph, scratch).
    """

    dims: Dims
    tokens: Array
    flat_params: Array
    flat_grads: Array
    params: dict[str, Array]
    grads: dict[str, Array]
    x: Array
    y: Array
    h0: Array
    z: Array
    h: Array
    dh: Array
    dz: Array
    dh0: Array
    logits: Array
    loss: Array
    norm: Array
    totals: Array
    extra: dict[str, Any] = field(default_factory=dict)


Sizes = tuple[dict[str, int], Any, str]
"""The arguments of :meth:`DeviceMemoryError.describe`."""

SMALLER_BATCH = "a smaller batch_size or num_steps needs less"
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _names_sizes(sizes_of: Callable[..., Sizes]) -> Callable[[_Method], _Method]:
    """Let a :class:`DeviceMemoryError` of a method name what the method works on."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def named(self: Backend, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except DeviceMemoryError as error:
                error.describe(*sizes_of(*args, **kwargs))
                raise

        return cast(_Method, named)

    return decorate


def _of_dims(dims: Dims, *_: Any, **__: Any) -> Sizes:
    return dims.sizes, dims.dtype, SMALLER_BATCH


def _of_workspace(ws: Workspace, *_: Any, **__: Any) -> Sizes:
    return _of_dims(ws.dims)


def _of_generation(params: Mapping[str, Array], prefix: HostArray, *_: Any, **__: Any) -> Sizes:
    H, V = params["W_hq"].shape
    sizes = {"S": len(prefix), "H": H, "V": V}
    return sizes, params["W_hq"].dtype, "fewer sequences at once need less"


_WORK: dict[str, Callable[..., Sizes]] = {
    "workspace": _of_dims,
    "step": _of_workspace,
    "run_steps": _of_workspace,
    "evaluate": _of_workspace,
    "generate": _of_generation,
}
"""The methods of a backend that name their sizes, and where those are in the arguments."""


class Backend(ABC):
    """An opened device. Methods trust their arguments: :mod:`fastrnn.ops` and the model check them.

    An op writes to ``out`` where given (a tuple for ops with several results) and returns it.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[type, ...]] = (np.float32, np.float64)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Where memory runs out in what a backend overrides, the error names the sizes."""
        super().__init_subclass__(**kwargs)
        for name in _WORK.keys() & cls.__dict__.keys():
            setattr(cls, name, _names_sizes(_WORK[name])(cls.__dict__[name]))

    # A device is neither copied nor stored: copies share it, another process opens its own.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return open_backend, (self.name,)

    # --- memory ---

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised array in C order on the device."""

    @abstractmethod
    def put(self, host: HostArray, out: Array | None = None) -> Array:
        """Copy a NumPy array to the device, into ``out`` where given."""

    @abstractmethod
    def get(self, array: Array) -> HostArray:
        """Copy an array to the host; waits for the work that produces it."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until all submitted work is done."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The device, its driver and libraries, thread counts: what a benchmark has to record."""

    # --- ops ---

    @abstractmethod
    def window(self, tokens: Array, starts: Array, out: tuple[Array, Array]) -> None:
        """``x[t, b] = tokens[starts[b] + t]``, ``y[t, b] = tokens[starts[b] + t + 1]``."""

    @abstractmethod
    def gather(self, W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
        """``z[t, b, :] = W_xh[tokens[t, b], :] + b_h``: ``[T, B, H]``."""

    @abstractmethod
    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        """``dW_xh [V, H]``, a scatter-add by token in a fixed order, and ``db_h [H]``."""

    @abstractmethod
    def recurrence(self, z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
        """``h_t = tanh(z_t + h_{t-1} W_hh)``: ``[T, B, H]``. ``out`` may be ``z``."""

    @abstractmethod
    def recurrence_backward(
        self,
        dh: Array,
        h: Array,
        W_hh: Array,
        h0: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        """Back-propagation through time: ``dz [T, B, H]``, ``dW_hh [H, H]``, ``dh0 [B, H]``.

        ``dh [T, B, H]`` is the gradient that reaches each ``h_t`` from outside the recurrence.
        The ``dz`` of ``out`` may be ``dh``.
        """

    @abstractmethod
    def project(self, h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
        """``logits = h W_hq + b_q``: ``[T, B, V]``."""

    @abstractmethod
    def project_backward(
        self,
        dlogits: Array,
        h: Array,
        W_hq: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        """``dh = dlogits W_hqᵀ [T, B, H]``, ``dW_hq = Σ_t h_tᵀ dlogits_t [H, V]``, ``db_q [V]``."""

    @abstractmethod
    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        """Mean cross entropy (shape ``()``) and its gradient.

        The ``dlogits`` of ``out`` may be ``logits``.
        """

    @abstractmethod
    def clip_by_global_norm(
        self, grads: Sequence[Array], max_norm: float, out: Array | None = None
    ) -> Array:
        """Scale ``grads`` by ``min(1, max_norm / norm)`` in place; the norm, shape ``()``."""

    @abstractmethod
    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        """``p -= lr * g`` in place."""

    @abstractmethod
    def record(self, loss: Array, norm: Array, totals: Array) -> None:
        """Add one step to ``totals`` (see :class:`Workspace`)."""

    @abstractmethod
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
        """Continue ``S`` sequences by ``num_tokens`` tokens each.

        Args:
            params: the parameters by name, on the device.
            prefix: int32 ``[S, P]``, right-padded; fed first. P >= 1.
            lengths: int32 ``[S]``, the tokens of each row that count, ``1 <= lengths <= P``.
            num_tokens: tokens to produce, >= 1.
            decoding: how to choose them.
            h0: ``[S, H]`` start state; zero where None.
            position: how many tokens were produced before: the generator's counter goes on there.
            sequence: the generator's number of row 0; row ``s`` draws from ``sequence + s``.

        Returns:
            tokens int32 ``[S, num_tokens]`` and the state ``[S, H]`` after all that was fed. The
            last token was chosen but not fed: ``generate(prefix=tokens[:, -1:], h0=state,
            position=position + num_tokens)`` goes on exactly.
        """

    # --- the training step ---

    @_names_sizes(_WORK["workspace"])
    def workspace(
        self, dims: Dims, tokens: HostArray, params: Mapping[str, HostArray]
    ) -> Workspace:
        """Allocate all buffers of a training run and fill in the corpus and the parameters."""
        host = np.zeros(dims.flat_size, dims.dtype)
        flat_grads = self.put(host)
        for name in PARAM_NAMES:
            host[dims.param_slices[name]] = params[name].ravel()
        flat_params = self.put(host)
        return Workspace(
            dims=dims,
            tokens=self.put(tokens),
            flat_params=flat_params,
            flat_grads=flat_grads,
            params=dims.views(flat_params),
            grads=dims.views(flat_grads),
            x=self.empty((dims.T, dims.B), np.int32),
            y=self.empty((dims.T, dims.B), np.int32),
            dh0=self.empty((dims.B, dims.H), dims.dtype),
            loss=self.empty((), dims.dtype),
            norm=self.empty((), dims.dtype),
            totals=self.put(np.zeros(4, np.float64)),
            **self.activations(dims),
        )

    def activations(self, dims: Dims) -> dict[str, Any]:
        """The arrays of a workspace whose layout is the backend's own affair.

        Returns:
            h0 (zero), z, h, dh, dz and logits, and whatever ``extra`` the backend keeps with them.
        """
        T, B, H, V, dtype = dims.T, dims.B, dims.H, dims.V, dims.dtype
        h, dz = self.empty((T, B, H), dtype), self.empty((T, B, H), dtype)
        h0, logits = self.put(np.zeros((B, H), dtype)), self.empty((T, B, V), dtype)
        return {"h0": h0, "z": h, "h": h, "dh": dz, "dz": dz, "logits": logits}

    @_names_sizes(_WORK["step"])
    def step(self, ws: Workspace, starts: Array, lr: float, max_norm: float, carry: bool) -> None:
        """One training step on the batch at ``starts`` (int32 ``[B]``, on the device).

        ``carry``: the hidden state after the step becomes ``ws.h0``; otherwise ``ws.h0`` stays.
        """
        p, g, dims = ws.params, ws.grads, ws.dims
        self.window(ws.tokens, starts, out=(ws.x, ws.y))
        self.gather(p["W_xh"], ws.x, p["b_h"], out=ws.z)
        self.recurrence(ws.z, p["W_hh"], ws.h0, out=ws.h)
        self.project(ws.h, p["W_hq"], p["b_q"], out=ws.logits)
        self.cross_entropy(ws.logits, ws.y, out=(ws.loss, ws.logits))
        self.project_backward(ws.logits, ws.h, p["W_hq"], out=(ws.dh, g["W_hq"], g["b_q"]))
        self.recurrence_backward(ws.dh, ws.h, p["W_hh"], ws.h0, out=(ws.dz, g["W_hh"], ws.dh0))
        self.gather_backward(ws.dz, ws.x, dims.V, out=(g["W_xh"], g["b_h"]))
        self.clip_by_global_norm([ws.flat_grads], max_norm, out=ws.norm)
        self.sgd([ws.flat_params], [ws.flat_grads], lr)
        self.record(ws.loss, ws.norm, ws.totals)
        if carry:
            self.put(ws.h[-1], out=ws.h0)

    @_names_sizes(_WORK["run_steps"])
    def run_steps(
        self, ws: Workspace, starts: HostArray, lr: float, max_norm: float, carry: bool
    ) -> None:
        """Run ``len(starts)`` steps; ``starts`` is int32 ``[n, B]`` on the host."""
        for row in self.put(np.ascontiguousarray(starts, dtype=np.int32)):
            self.step(ws, row, lr, max_norm, carry)

    @_names_sizes(_WORK["evaluate"])
    def evaluate(self, ws: Workspace, starts: HostArray, carry: bool) -> float:
        """Mean loss over the batches of ``starts`` (int32 ``[n, B]``) with no update.

        Overwrites the activations of ``ws`` and, with ``carry``, ``ws.h0``.
        """
        p, total = ws.params, 0.0
        for row in self.put(np.ascontiguousarray(starts, dtype=np.int32)):
            self.window(ws.tokens, row, out=(ws.x, ws.y))
            self.gather(p["W_xh"], ws.x, p["b_h"], out=ws.z)
            self.recurrence(ws.z, p["W_hh"], ws.h0, out=ws.h)
            self.project(ws.h, p["W_hq"], p["b_q"], out=ws.logits)
            self.cross_entropy(ws.logits, ws.y, out=(ws.loss, ws.logits))
            total += float(self.get(ws.loss))
            if carry:
                self.put(ws.h[-1], out=ws.h0)
        return total / len(starts)


# --- Opening a backend -----------------------------------------------------------------------

GPU_BACKENDS = ("cupy", "numba-cuda")
CPU_BACKENDS = ("numba", "numpy")
BACKENDS = (*GPU_BACKENDS, *CPU_BACKENDS)
"""Names in the order in which ``auto`` probes them."""

_CLASSES = {
    "cupy": ("fastrnn.backends.cupy_cuda", "CupyBackend"),
    "numba-cuda": ("fastrnn.backends.numba_cuda", "NumbaCudaBackend"),
    "numba": ("fastrnn.backends.numba_cpu", "NumbaBackend"),
    "numpy": ("fastrnn.backends.numpy_", "NumpyBackend"),
}

_opened: dict[str, Backend] = {}


def open_backend(name: str = "auto") -> Backend:
    """Open a backend by name; one instance a process.

    ``auto`` tries :data:`BACKENDS` in turn and takes the first that finds a working device; the
    environment variable ``FASTRNN_BACKEND`` replaces ``auto`` by a name.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailableError: the named backend cannot run here; the message says why.
    """
    if name == "auto":
        name = os.environ.get("FASTRNN_BACKEND", "").strip() or "auto"
    if name == "auto":
        for candidate in BACKENDS:
            try:
                return open_backend(candidate)
            except BackendUnavailableError:
                continue
        raise BackendUnavailableError("no backend can run here, not even numpy")
    if name not in _CLASSES:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown backend {name!r}: expected one of {known}")
    if name not in _opened:
        module_name, class_name = _CLASSES[name]
        try:
            backend_class = getattr(importlib.import_module(module_name), class_name)
        except BackendUnavailableError:
            raise
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend {name!r} cannot be imported: {error}"
            ) from error
        _opened[name] = backend_class()
    return _opened[name]


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can run here and the reason where it cannot."""
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        try:
            open_backend(name)
            reasons[name] = None
        except BackendUnavailableError as error:
            reasons[name] = str(error)
    return reasons
