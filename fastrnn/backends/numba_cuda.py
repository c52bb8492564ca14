"""The ``numba-cuda`` backend: GPU kernels written in Python, compiled by numba-cuda.

For those who read and change kernels without leaving Python, for machines with numba-cuda and no
CuPy, and as an independent implementation beside the CUDA C one. The kernels are in
:mod:`fastrnn.backends.numba_cuda_kernels`; this module opens the device, keeps the memory and
launches.

Streams: an op runs on the stream that its first array is bound to, and is ordered after nothing
else: the arrays of one call are expected on one stream. Arrays made here are bound to the backend's
own stream; a CuPy array brings CuPy's current stream, a torch tensor torch's. Nothing in an op or a
step waits for the device. ``run_steps`` submits captured CUDA graphs.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrnn.backend import (
    Array,
    Backend,
    BackendUnavailableError,
    DeviceMemoryError,
    HostArray,
    Workspace,
)
from fastrnn.decoding import Decoding

GRAPH_STEPS = 8
"""Steps in a captured graph; what is left over is replayed one by one."""
PLANNED_STEPS = 4096
"""Steps whose offsets have room on the device from the start."""

OUT_OF_MEMORY = 2
"""The status of CUDA's driver for an allocation that does not fit."""

INSTALL = "pip install 'fastrnn[cuda13x]' (or cuda12x, by the driver's CUDA version)"
LIBNVVM = "pip install 'numba-cuda[cu13]' (or cu12), or set CUDA_HOME to a toolkit"

_log = logging.getLogger(__name__)


def maintained_cuda() -> Any:
    """``numba.cuda`` of the maintained numba-cuda package: imported here and nowhere else.

    Raises:
        BackendUnavailableError: numba-cuda is missing, or numba's own deprecated ``cuda`` module
            answers in its place; the message says which.
    """
    # Its .pth file does this where it is installed; not where it is only on PYTHONPATH.
    with suppress(ImportError):
        importlib.import_module("_numba_cuda_redirector")
    try:
        cuda = importlib.import_module("numba.cuda")
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'numba-cuda' needs the numba-cuda package: {error}; {INSTALL}"
        ) from error
    if "numba_cuda" not in (cuda.__file__ or ""):
        raise BackendUnavailableError(
            "backend 'numba-cuda' needs the maintained numba-cuda package, but numba's built-in "
            f"module answers ({cuda.__file__}); {INSTALL}"
        )
    if not hasattr(np, "row_stack") and hasattr(cuda, "__path__"):
        _import_without_row_stack()
    return cuda


def _import_without_row_stack() -> None:
    """Import the part of numba-cuda that names ``np.row_stack``, which NumPy 2.5 removed.

    Left to itself it is imported by the first compilation. It is given the name for that long only:
    nobody else's NumPy changes.
    """
    vars(np)["row_stack"] = np.vstack
    try:
        importlib.import_module("numba.cuda.np.arrayobj")
    finally:
        del vars(np)["row_stack"]


def load_cuda() -> Any:
    """:func:`maintained_cuda` with a device or the simulator.

    Where neither ``CUDA_HOME`` nor ``CUDA_PATH`` is set, libraries that are in no package are
    looked for in the toolkit of the ``nvcc`` on ``PATH``.

    Raises:
        BackendUnavailableError: there is no such package, no device works, libNVVM or libdevice is
            missing, or libNVVM and nvJitLink do not fit; the message says which.
    """
    cuda = maintained_cuda()
    if cuda.config.ENABLE_CUDASIM:
        return cuda
    available = False
    with _opening():
        if not cuda.cuda_error():  # there is a driver library
            with toolkit_of_nvcc():
                available = cuda.is_available()
                if available:
                    _check_compiler(cuda)
        reason = cuda.cuda_error()
    if not available and not reason:  # the driver works
        raise BackendUnavailableError(f"backend 'numba-cuda' does not find libNVVM; {LIBNVVM}")
    if not available:
        raise BackendUnavailableError(
            f"backend 'numba-cuda' needs an NVIDIA GPU and its driver: {_line(reason)}"
        )
    return cuda


@contextmanager
def toolkit_of_nvcc() -> Iterator[None]:
    """``CUDA_HOME`` for as long as libraries are looked for: the toolkit of ``nvcc``.

    Packages and the system's loader come first; a variable that is set is left alone.
    """
    toolkit = None
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        toolkit = nvcc_toolkit()
    if toolkit is None:
        yield
        return
    # The finder of libraries remembers what it read from the environment first.
    with suppress(ImportError, AttributeError):
        importlib.import_module("cuda.pathfinder").get_cuda_path_or_home.cache_clear()
    os.environ["CUDA_HOME"] = str(toolkit)
    try:
        yield
    finally:
        del os.environ["CUDA_HOME"]


def nvcc_toolkit() -> Path | None:
    """The folder of the CUDA toolkit whose ``nvcc`` is on ``PATH``: it holds ``nvvm/libdevice``.

    None where there is no ``nvcc`` or no such folder around it.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    roots = [Path(nvcc).resolve().parent.parent]
    if not (roots[0] / "nvvm" / "libdevice").is_dir():  # a script that calls it: ask for its TOP
        with suppress(OSError, subprocess.TimeoutExpired):
            command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            roots += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)]
    return next((r.resolve() for r in roots if (r / "nvvm" / "libdevice").is_dir()), None)


EMPTY_KERNEL = """
target triple = "nvptx64-nvidia-cuda"
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-\
f32:32:32-f64:64:64-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
define void @empty() {{ ret void }}
!nvvm.annotations = !{{!0}}
!nvvmir.version = !{{!1}}
!0 = !{{void ()* @empty, !"kernel", i32 1}}
!1 = !{{i32 {}, i32 {}, i32 {}, i32 {}}}
"""
"""To be completed by the version of libNVVM's representation: four numbers."""


def _check_compiler(cuda: Any) -> None:
    """See that what compiles and links is there and fits; where from is settled for good.

    Raises:
        BackendUnavailableError: libdevice is missing, or libNVVM and nvJitLink do not fit.
    """
    if cuda.cuda_paths.get_cuda_paths()["libdevice"].info is None:
        raise BackendUnavailableError(
            f"backend 'numba-cuda' does not find libdevice.10.bc; {LIBNVVM}"
        )
    _link_an_empty_kernel()


def _link_an_empty_kernel() -> None:
    """See that nvJitLink reads what libNVVM writes: of two CUDA releases, only an older libNVVM.

    Raises:
        BackendUnavailableError: it does not; the message names both, with their releases.
    """
    try:
        nvvm = importlib.import_module("cuda.bindings.nvvm")
        linker = importlib.import_module("cuda.bindings.nvjitlink")
        load = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib
        linked_by = load("nvJitLink").abs_path
    except (ImportError, RuntimeError):
        return  # the driver links
    code = EMPTY_KERNEL.format(*nvvm.ir_version()).encode()
    program = nvvm.create_program()
    try:
        nvvm.add_module_to_program(program, code, len(code), "empty")
        nvvm.compile_program(program, 1, ["-arch=compute_80"])  # which all releases know
        ptx = bytearray(nvvm.get_compiled_result_size(program))
        nvvm.get_compiled_result(program, ptx)
    finally:
        nvvm.destroy_program(program)
    code = bytes(ptx).rstrip(b"\0")
    handle = linker.create(1, ["-arch=sm_80"])
    try:
        linker.add_data(handle, linker.InputType.PTX, code, len(code), "empty")
        linker.complete(handle)
    except linker.nvJitLinkError as error:
        written = f"libNVVM {_first(rb'release ([0-9.]+)', code)} ({load('nvvm').abs_path})"
        release = ".".join(str(part) for part in linker.version())
        raise BackendUnavailableError(
            f"backend 'numba-cuda': {written} writes PTX "
            f"{_first(rb'^.version (.+)', code)}, which nvJitLink {release} ({linked_by}) does not "
            f"link: {_line(error)}; both must be of one CUDA release: "
            "pip install 'numba-cuda[cu13]' (or cu12) brings such a pair"
        ) from error
    finally:
        linker.destroy(handle)


@contextmanager
def _opening() -> Iterator[None]:
    """Turn what numba raises while a device opens into :class:`BackendUnavailableError`."""
    try:
        yield
    except BackendUnavailableError:
        raise
    except Exception as error:  # an ImportError, RuntimeError or CudaAPIError, by what fails
        raise BackendUnavailableError(
            f"backend 'numba-cuda': no device opens: {type(error).__name__}: {_line(error)}; "
            f"where libNVVM is missing: {LIBNVVM}"
        ) from error


def _first(pattern: bytes, text: bytes) -> str:
    """The first group of the first match."""
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].decode() if found else "?"


def _line(message: Any) -> str:
    return " ".join(str(message).split())


class Graph:
    """Work captured once and launched again and again: one call of the driver instead of dozens.

    Everything it reads that changes (start offsets, rates) is in device memory. numba-cuda
    has no graphs of its own, so this calls the driver through ``cuda.bindings``.
    """

    def __init__(self, stream: Any, driver: Any = None) -> None:
        self._executable: Any = None
        self._driver = driver or importlib.import_module("cuda.bindings.driver")
        self._handle = int(stream)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what is submitted to the stream inside the block; nothing runs."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._handle, mode)
        try:
            yield
        except BaseException:
            self._driver.cuStreamEndCapture(self._handle)  # leave the stream usable
            raise
        graph = self._call("cuStreamEndCapture", self._handle)
        self._executable = self._call("cuGraphInstantiate", graph, 0)
        self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Submit what was recorded to the stream."""
        self._call("cuGraphLaunch", self._executable, self._handle)

    def close(self) -> None:
        """Free the graph; a launched one finishes first."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._call("cuGraphExecDestroy", executable)

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():
            with suppress(RuntimeError):  # after a sticky error every call of the driver fails
                self.close()

    def _call(self, name: str, *args: Any) -> Any:
        status, *results = getattr(self._driver, name)(*args)
        if int(status) != 0:
            raise RuntimeError(f"{name} failed: {status}")
        return results[0] if results else None


@dataclass
class _Plan:
    """What ``run_steps`` keeps with a workspace.

    Attributes:
        starts: int32, room for the offsets of many steps. cursor: int32 ``[1]``, the step due.
        graphs: by number of steps and ``carry``. warm: which ``carry`` has run uncaptured.
        held: scratch that a captured graph writes to and must not lose.
    """

    starts: Array
    cursor: Array
    graphs: dict[tuple[int, bool], Graph] = field(default_factory=dict)
    warm: set[bool] = field(default_factory=set)
    held: list[Array] = field(default_factory=list)


class NumbaCudaBackend(Backend):
    """Backend on numba-cuda device arrays; takes any array with ``__cuda_array_interface__``.

    Args:
        geometry: block and tile sizes; None for those meant for real devices.
        kernels: what holds the kernel factories; None for the package's own.
    """

    name = "numba-cuda"

    def __init__(self, geometry: Any = None, kernels: Any = None) -> None:
        self._cuda = load_cuda()
        self._kernels = kernels or importlib.import_module("fastrnn.backends.numba_cuda_kernels")
        self.geometry = geometry or self._kernels.Geometry()
        self.simulated = bool(self._kernels.SIMULATED)
        self._captures = not self.simulated
        self._multiprocessors = 4
        with _opening():
            self.stream = self._cuda.stream()
            # For work beside the critical path of a step; they begin and end on `stream`.
            self._sides = self._cuda.stream(), self._cuda.stream()
            if not self.simulated:
                self._multiprocessors = self._cuda.get_current_device().MULTIPROCESSOR_COUNT
        self._events: dict[str, Any] = {}
        self._launchers: dict[tuple[Any, Any, int], Any] = {}
        self._scratch_arrays: dict[tuple[int, str, str], Array] = {}
        self._constants: dict[str, Array] = {}

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._allocate(shape, dtype, self.stream)

    def put(self, host: HostArray, out: Array | None = None) -> Array:
        if out is None:
            host = np.array(host, order="C")
            out = self.empty(host.shape, host.dtype)
        target = self.wrap(out)
        stream = self._stream(target)
        if isinstance(host, np.ndarray):
            target.copy_to_device(host, stream=stream)
        else:
            source = self.wrap(host)
            kernel = self._kernels.copy_kernel(np.dtype(target.dtype), self.geometry)
            self._map(stream, kernel, target.size, _flat(source), _flat(target))
        return out

    def get(self, array: Array) -> HostArray:
        array = self.wrap(array)
        stream = self._stream(array)
        host: HostArray = array.copy_to_host(stream=stream)
        stream.synchronize()
        return host

    def sync(self) -> None:
        self.stream.synchronize()

    def describe(self) -> dict[str, Any]:
        version = importlib.import_module("numba_cuda").__version__
        about = {"backend": self.name, "numba-cuda": version, "numpy": np.__version__}
        if self.simulated:
            return {**about, "device": "Numba's CUDA simulator"}
        device = self._cuda.get_current_device()
        name = device.name
        return {
            **about,
            "device": name.decode() if isinstance(name, bytes) else str(name),
            "compute capability": ".".join(str(part) for part in device.compute_capability),
            "multiprocessors": self._multiprocessors,
            "runtime": ".".join(str(part) for part in self._cuda.runtime.get_version()),
        }

    def wrap(self, array: Array) -> Array:
        """``array`` as a numba device array, without a copy and without waiting for its stream.

        Raises:
            TypeError: it has no ``__cuda_array_interface__`` (is not on a GPU).
            ValueError: it is not in C order.
        """
        if getattr(array, "__cuda_ndarray__", False):
            wrapped = array
        elif hasattr(array, "__cuda_array_interface__"):
            wrapped = self._cuda.as_cuda_array(array, sync=False)
        else:
            raise TypeError(
                "expected an array on the GPU (with __cuda_array_interface__), "
                f"got {type(array).__module__}.{type(array).__name__}"
            )
        if not wrapped.is_c_contiguous():  # a compiled kernel would not notice
            raise ValueError(f"expected an array in C order, got strides {wrapped.strides}")
        if type(array).__module__.partition(".")[0] == "torch":
            # Torch does not name its stream in the interface.
            handle = sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
            wrapped = wrapped.bind(self._cuda.external_stream(handle))
        return wrapped

    # --- launching ---

    def _stream(self, array: Array) -> Any:
        """The stream that a wrapped array is bound to."""
        return array.stream or self.stream

    def _launch(self, stream: Any, kernel: Any, grid: Any, *args: Any) -> None:
        if "dispatcher" not in kernel.__dict__:
            message = f"numba-cuda: compiling {kernel.name} (first use in this process)"
            if sys.stderr.isatty():
                print(f"fastrnn: {message}", file=sys.stderr)
            _log.info(message)
        self._launcher(kernel.dispatcher, grid, kernel.threads, stream)(*args)

    def _launcher(self, dispatcher: Any, grid: Any, threads: int, stream: Any) -> Any:
        """``dispatcher[grid, threads, stream]``, kept."""
        if self.simulated:  # there it is the dispatcher itself, which remembers its last grid
            return dispatcher[grid, threads, stream]
        key = (dispatcher, grid, int(stream))
        if key not in self._launchers:
            with warnings.catch_warnings():
                # Numba advises against grids of few blocks; a row of the batch is a block by
                # design.
                warnings.filterwarnings("ignore", message="Grid size")
                self._launchers[key] = dispatcher[grid, threads, stream]
        return self._launchers[key]

    def _order(self, first: Any, then: Any, what: str) -> None:
        """What is submitted to ``then`` from now on waits for what ``first`` holds by now."""
        if self.simulated:
            return  # every launch has ended when it returns
        if what not in self._events:
            self._events[what] = self._cuda.event(timing=False)
        self._events[what].record(first)
        self._events[what].wait(then)

    def _map(self, stream: Any, kernel: Any, count: int, *args: Any) -> None:
        """Launch with a thread for each of ``count`` elements."""
        self._launch(stream, kernel, _ceil(count, kernel.threads), *args)

    def _scratch(self, stream: Any, name: str, size: int, dtype: Any) -> Array:
        """A flat buffer that the ops on ``stream`` share under ``name``; grows, never shrinks."""
        key = (id(stream) if self.simulated else int(stream), name, np.dtype(dtype).str)
        array = self._scratch_arrays.get(key)
        if array is None or array.size < size:
            array = self._allocate(size, dtype, stream)
            self._scratch_arrays[key] = array
        return array if array.size == size else array[:size]

    def _constant(self, name: str, value: float, dtype: Any) -> Array:
        """A device array of one element that is written only here."""
        key = f"{name} {np.dtype(dtype)}"
        if key not in self._constants:
            self._constants[key] = self.put(np.full(1, value, dtype))
            self.sync()
        return self._constants[key]

    # --- ops: gather ---

    def window(self, tokens: Array, starts: Array, out: tuple[Array, Array]) -> None:
        tokens, starts, x, y = (self.wrap(a) for a in (tokens, starts, *out))
        cursor = self._constant("zero", 0, np.int32)
        self._window(self._stream(x), tokens, starts, cursor, x, y)

    def _window(
        self, stream: Any, tokens: Array, starts: Array, cursor: Array, x: Array, y: Array
    ) -> None:
        kernel, B = self._kernels.window_kernel(self.geometry), x.shape[1]
        self._map(stream, kernel, x.size, tokens, _flat(starts), cursor, _flat(x), _flat(y), B)

    def gather(self, W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
        W_xh, tokens, b_h = (self.wrap(a) for a in (W_xh, tokens, b_h))
        stream = self._stream(W_xh)
        if out is None:
            out = self._result(stream, (*tokens.shape, W_xh.shape[1]), W_xh.dtype)
        self._gather(stream, W_xh, tokens, b_h, self.wrap(out))
        return out

    def _gather(self, stream: Any, W_xh: Array, tokens: Array, b_h: Array, z: Array) -> None:
        kernel = self._kernels.gather_kernel(np.dtype(W_xh.dtype), self.geometry)
        H, z = W_xh.shape[1], _flat(z)
        self._map(stream, kernel, z.size, _flat(W_xh), _flat(tokens), b_h, z, H)

    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        dz, tokens = self.wrap(dz), self.wrap(tokens)
        H, stream, dtype = dz.shape[2], self._stream(dz), np.dtype(dz.dtype)
        if out is None:
            out = (self._result(stream, (V, H), dtype), self._result(stream, (H,), dtype))
        dW_xh, db_h = (self.wrap(a) for a in out)
        self._sum_by_token(stream, dz, *self._rank(stream, tokens, V), dW_xh)
        self._column_sum(stream, dz, db_h)
        return out

    def _rank(self, stream: Any, tokens: Array, V: int) -> tuple[Array, Array]:
        """The rows of a batch in order of their tokens, and where each token's begin."""
        order = self._scratch(stream, "order", tokens.size, np.int32)
        bounds = self._scratch(stream, "bounds", V + 1, np.int32)
        kernel = self._kernels.rank_kernel(self.geometry)
        self._map(stream, kernel, tokens.size + V + 1, _flat(tokens), order, bounds)
        return order, bounds

    def _sum_by_token(
        self, stream: Any, dz: Array, order: Array, bounds: Array, dW_xh: Array
    ) -> None:
        kernel = self._kernels.gather_backward_kernel(np.dtype(dz.dtype), self.geometry)
        V, H = dW_xh.shape
        grid = (V, _ceil(H, self.geometry.columns))
        self._launch(stream, kernel, grid, _flat(dz), order, bounds, _flat(dW_xh), H)

    def _column_sum(self, stream: Any, x: Array, out: Array) -> None:
        kernel = self._kernels.column_sum_kernel(np.dtype(x.dtype), self.geometry)
        self._launch(stream, kernel, _ceil(out.size, self.geometry.columns), _flat(x), out)

    # --- ops: recurrence ---

    def _padded(self, stream: Any, W: Array, transposed: bool) -> Array:
        """W_hh or its transpose, padded for the one-block-a-row kernels."""
        H, P = W.shape[0], self.geometry.padded(W.shape[0])
        if P == H and not transposed:
            return _flat(W)
        out = self._scratch(stream, "transposed" if transposed else "padded", P * P, W.dtype)
        kernel = self._kernels.pad_kernel(np.dtype(W.dtype), self.geometry, transposed)
        self._map(stream, kernel, P * P, _flat(W), out, H, P)
        return out

    def recurrence(self, z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
        z, W_hh, h0 = (self.wrap(a) for a in (z, W_hh, h0))
        stream = self._stream(z)
        if out is None:
            out = self._result(stream, z.shape, z.dtype)
        self._recurrence(stream, z, W_hh, h0, self.wrap(out))
        return out

    def _recurrence(self, stream: Any, z: Array, W_hh: Array, h0: Array, h: Array) -> None:
        (_, B, H), dtype = h.shape, np.dtype(h.dtype)
        if self.geometry.fits(H):
            unread = self._constant("zero", 0, np.int32)
            self._one_block_a_row(stream, False, z, h0, unread, unread, unread, W_hh, h0, h)
            return
        kernel = self._kernels.tanh_step_kernel(dtype, self.geometry)
        steps = [_flat(h0), *_rows(h)]
        for t, z_t in enumerate(_rows(z)):
            partial, splits = self._partial_product(stream, steps[t], W_hh, B, H, H)
            self._map(stream, kernel, B * H, partial, z_t, steps[t + 1], splits)

    def _one_block_a_row(
        self, stream: Any, gathers: bool, z: Array, b_h: Array, tokens: Array, starts: Array,
        cursor: Array, W_hh: Array, h0: Array, h: Array,
    ) -> None:  # fmt: skip
        """The recurrence over a z that is there, or over the rows of z = W_xh by token."""
        (_, B, H), g = h.shape, self.geometry
        kernel = self._kernels.recurrence_kernel(np.dtype(h.dtype), g, g.outputs(H), gathers)
        W = self._padded(stream, W_hh, False)
        args = (_flat(z), _flat(b_h), tokens, _flat(starts), cursor, W, _flat(h0), _flat(h))
        self._launch(stream, kernel, B, *args, B, H)

    def recurrence_backward(
        self,
        dh: Array,
        h: Array,
        W_hh: Array,
        h0: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        dh, h, W_hh, h0 = (self.wrap(a) for a in (dh, h, W_hh, h0))
        (T, B, H), stream, dtype = h.shape, self._stream(dh), np.dtype(h.dtype)
        if out is None:
            out = (
                self._result(stream, (T, B, H), dtype),
                self._result(stream, (H, H), dtype),
                self._result(stream, (B, H), dtype),
            )
        dz, dW_hh, dh0 = (self.wrap(a) for a in out)
        self._bptt(stream, dh, h, W_hh, self._turned(stream, W_hh), dz, dh0)
        self._weight_gradient(stream, h, h0, dz, dW_hh)
        return out

    def _turned(self, stream: Any, W_hh: Array) -> Array | None:
        """W_hhᵀ as the one-block-a-row BPTT wants it; None where it does not run."""
        return self._padded(stream, W_hh, True) if self.geometry.fits(W_hh.shape[0]) else None

    def _bptt(
        self, stream: Any, dh: Array, h: Array, W_hh: Array, Wt: Array | None, dz: Array, dh0: Array
    ) -> None:
        (_, B, H), dtype, g = h.shape, np.dtype(h.dtype), self.geometry
        if Wt is not None:
            kernel = self._kernels.recurrence_backward_kernel(dtype, g, g.outputs(H))
            self._launch(stream, kernel, B, _flat(dh), _flat(h), Wt, _flat(dz), _flat(dh0), B, H)
            return
        kernel = self._kernels.tanh_step_backward_kernel(dtype, g)
        partial, splits = _flat(dh0), 0
        for dh_t, h_t, dz_t in reversed(list(zip(_rows(dh), _rows(h), _rows(dz), strict=True))):
            self._map(stream, kernel, B * H, partial, dh_t, h_t, dz_t, splits)
            partial, splits = self._partial_product(stream, dz_t, W_hh, B, H, H, trans_b=True)
        self._sum_splits(stream, partial, _flat(dh0), splits)

    def _weight_gradient(self, stream: Any, h: Array, h0: Array, dz: Array, dW_hh: Array) -> None:
        """Σ_t h_{t-1}ᵀ dz_t: one product over all T·B rows, of which the first B are h0."""
        T, B, H = h.shape
        self._gemm(stream, _flat(h), dz, _flat(dW_hh), H, H, T * B, trans_a=True, head=h0, lead=B)

    # --- ops: output layer ---

    def project(self, h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
        h, W_hq, b_q = (self.wrap(a) for a in (h, W_hq, b_q))
        (T, B, H), V, stream = h.shape, W_hq.shape[1], self._stream(h)
        if out is None:
            out = self._result(stream, (T, B, V), h.dtype)
        self._gemm(stream, h, W_hq, _flat(self.wrap(out)), T * B, V, H, bias=b_q)
        return out

    def project_backward(
        self,
        dlogits: Array,
        h: Array,
        W_hq: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        dlogits, h, W_hq = (self.wrap(a) for a in (dlogits, h, W_hq))
        (T, B, H), V, stream = h.shape, W_hq.shape[1], self._stream(dlogits)
        if out is None:
            out = (
                self._result(stream, (T, B, H), h.dtype),
                self._result(stream, (H, V), h.dtype),
                self._result(stream, (V,), h.dtype),
            )
        dh, dW_hq, db_q = (self.wrap(a) for a in out)
        self._gemm(stream, dlogits, W_hq, _flat(dh), T * B, H, V, trans_b=True)
        self._gemm(stream, h, dlogits, _flat(dW_hq), H, V, T * B, trans_a=True)
        self._column_sum(stream, dlogits, db_q)
        return out

    def _splits(self, M: int, N: int, K: int) -> tuple[int, int]:
        """Into how many parts to cut K, so that a small product fills the device; their length."""
        g = self.geometry
        tiles, depth = _ceil(M, g.tile_m) * _ceil(N, g.tile_n), _ceil(K, g.tile_k)
        # Up to three blocks a multiprocessor. At T·B = 1,120, H = 256, V = 1,027 the busiest of 132
        # then has 39 tiles of K for dh, 44 with two blocks; for dW_hq, where BPTT leaves 100 of
        # them, 56 instead of 72. Counted, not timed.
        wanted = max(1, min(3 * self._multiprocessors // tiles, depth // 4))
        part = _ceil(depth, wanted) * g.tile_k
        return _ceil(K, part), part

    def _launch_gemm(
        self, stream: Any, A: Array, B: Array, C: Array, M: int, N: int, K: int,
        trans_a: bool, trans_b: bool, bias: Array | None, head: Array | None, lead: int,
    ) -> None:  # fmt: skip
        splits, part = self._splits(M, N, K)
        g, A, B = self.geometry, _flat(A), _flat(B)
        kernel = self._kernels.gemm_kernel(np.dtype(A.dtype), g, trans_a, trans_b)
        self._launch(
            stream, kernel, (_ceil(N, g.tile_n), _ceil(M, g.tile_m), splits),
            A, A if head is None else _flat(head), B, B if bias is None else bias, C,
            M, N, K, part, lead, 0 if bias is None else 1,
        )  # fmt: skip

    def _partial_product(
        self, stream: Any, A: Array, B: Array, M: int, N: int, K: int, trans_b: bool = False
    ) -> tuple[Array, int]:
        """``A op(B)`` in parts that are still to be summed: flat ``[splits, M, N]``, splits."""
        splits, _ = self._splits(M, N, K)
        partial = self._scratch(stream, "partial product", splits * M * N, A.dtype)
        self._launch_gemm(stream, A, B, partial, M, N, K, False, trans_b, None, None, 0)
        return partial, splits

    def _gemm(
        self, stream: Any, A: Array, B: Array, out: Array, M: int, N: int, K: int, *,
        trans_a: bool = False, trans_b: bool = False, bias: Array | None = None,
        head: Array | None = None, lead: int = 0,
    ) -> None:  # fmt: skip
        """``out = op(A) op(B) + bias``, ``out`` flat ``[M, N]``."""
        splits, _ = self._splits(M, N, K)
        target = out
        if splits > 1:
            target = self._scratch(stream, "partial product", splits * M * N, A.dtype)
        self._launch_gemm(stream, A, B, target, M, N, K, trans_a, trans_b, bias, head, lead)
        if splits > 1:
            self._sum_splits(stream, target, out, splits)

    def _sum_splits(self, stream: Any, partial: Array, out: Array, splits: int) -> None:
        kernel = self._kernels.sum_splits_kernel(np.dtype(out.dtype), self.geometry)
        self._map(stream, kernel, out.size, partial, out, splits)

    # --- ops: loss and step ---

    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        logits, targets = self.wrap(logits), self.wrap(targets)
        stream, dtype = self._stream(logits), np.dtype(logits.dtype)
        if out is None:
            out = (self._result(stream, (), dtype), self._result(stream, logits.shape, dtype))
        loss, dlogits = (self.wrap(a) for a in out)
        self._mean(stream, self._cross_entropy(stream, logits, targets, dlogits), loss)
        return out

    def _cross_entropy(self, stream: Any, logits: Array, targets: Array, dlogits: Array) -> Array:
        """Writes the gradient; returns the losses of the rows."""
        dtype, targets, V = np.dtype(logits.dtype), _flat(targets), logits.shape[2]
        losses = self._scratch(stream, "losses", targets.size, dtype)
        kernel = self._kernels.cross_entropy_kernel(dtype, self.geometry)
        self._launch(
            stream, kernel, targets.size, _flat(logits), targets, losses, _flat(dlogits), V
        )
        return losses

    def _mean(self, stream: Any, losses: Array, loss: Array) -> None:
        kernel = self._kernels.mean_kernel(np.dtype(losses.dtype), self.geometry)
        self._launch(stream, kernel, 1, losses, _flat(loss))

    def _set_rates(self, stream: Any, lr: float, max_norm: float) -> Array:
        rates = self._scratch(stream, "rates", 2, np.float64)
        kernel = self._kernels.set_rates_kernel(self.geometry)
        self._launch(stream, kernel, 1, rates, float(lr), float(max_norm))
        return rates

    def _sum_squares(self, stream: Any, grads: Sequence[Array]) -> Array:
        """Sums of squares, in parts."""
        dtype, blocks = np.dtype(grads[0].dtype), self.geometry.partial_blocks
        partial = self._scratch(stream, "sums of squares", blocks * len(grads), np.float64)
        kernel = self._kernels.sum_squares_kernel(dtype, self.geometry)
        for i, g in enumerate(grads):
            self._launch(stream, kernel, blocks, _flat(g), partial, i * blocks)
        return partial

    def clip_by_global_norm(
        self, grads: Sequence[Array], max_norm: float, out: Array | None = None
    ) -> Array:
        grads = [self.wrap(g) for g in grads]
        stream, dtype = self._stream(grads[0]), np.dtype(grads[0].dtype)
        if out is None:
            out = self._result(stream, (), dtype)
        rates = self._set_rates(stream, 0.0, max_norm)
        partial, scale = self._sum_squares(stream, grads), self._scratch(stream, "scale", 1, dtype)
        norm = self._kernels.norm_kernel(dtype, self.geometry)
        self._launch(stream, norm, 1, partial, rates, _flat(self.wrap(out)), scale)
        kernel = self._kernels.scale_kernel(dtype, self.geometry)
        for g in grads:
            self._map(stream, kernel, g.size, _flat(g), scale)
        return out

    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        params, grads = [self.wrap(p) for p in params], [self.wrap(g) for g in grads]
        stream, dtype = self._stream(params[0]), np.dtype(params[0].dtype)
        rates, one = self._set_rates(stream, lr, 0.0), self._constant("one", 1, dtype)
        kernel = self._kernels.sgd_kernel(dtype, self.geometry)
        for p, g in zip(params, grads, strict=True):
            self._map(stream, kernel, p.size, _flat(p), _flat(g), rates, one)

    def record(self, loss: Array, norm: Array, totals: Array) -> None:
        loss, norm, totals = (self.wrap(a) for a in (loss, norm, totals))
        stream = self._stream(totals)
        unread = self._scratch(stream, "unread cursor", 1, np.int32)
        kernel = self._kernels.record_kernel(np.dtype(loss.dtype), self.geometry)
        self._launch(stream, kernel, 1, _flat(loss), _flat(norm), totals, unread)

    def _result(self, stream: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._allocate(shape, dtype, stream)

    def _allocate(self, shape: Any, dtype: Any, stream: Any) -> Array:
        """An uninitialised array. numba gives back what it holds unused before it fails."""
        try:
            return self._cuda.device_array(shape, dtype, stream=stream)
        except Exception as error:
            if int(getattr(error, "code", 0)) != OUT_OF_MEMORY:
                raise
            free = total = None
            with suppress(Exception):  # the first error is the one to report
                free, total = map(int, self._cuda.current_context().get_memory_info())
            wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise DeviceMemoryError(wanted, free, total) from error

    # --- the training step ---

    def step(self, ws: Workspace, starts: Array, lr: float, max_norm: float, carry: bool) -> None:
        rates = self._set_rates(self.stream, lr, max_norm)
        unread = self._scratch(self.stream, "unread cursor", 1, np.int32)
        self._submit(ws, starts, self._constant("zero", 0, np.int32), unread, rates, carry)

    def _submit(
        self, ws: Workspace, starts: Array, cursor: Array, moved: Array, rates: Array, carry: bool
    ) -> None:
        """One step on row ``cursor`` of ``starts``, in three streams that begin and end as one.

        ``main`` holds what the next kernel waits for. A recurrence leaves most multiprocessors
        idle: what can wait runs beside it. The blocks of a recurrence take whole multiprocessors,
        so beside BPTT a small kernel comes first and leaves it time to be placed.
        """
        p, g, (T, B, H, V) = ws.params, ws.grads, (ws.dims.T, ws.dims.B, ws.dims.H, ws.dims.V)
        main, (side, other) = self.stream, self._sides

        self._order(main, side, "begin")
        self._window(side, ws.tokens, starts, cursor, ws.x, ws.y)
        self._order(side, other, "x")
        if self.geometry.fits(H):
            inputs = p["W_xh"], p["b_h"], ws.tokens, starts, cursor
            self._one_block_a_row(main, True, *inputs, p["W_hh"], ws.h0, ws.h)
            self._order(side, main, "window")  # the loss reads y
        else:
            self._order(side, main, "window")
            self._gather(main, p["W_xh"], ws.x, p["b_h"], ws.z)
            self._recurrence(main, ws.z, p["W_hh"], ws.h0, ws.h)
        order, bounds = self._rank(other, ws.x, V)
        Wt = self._turned(other, p["W_hh"])

        self._gemm(main, ws.h, p["W_hq"], _flat(ws.logits), T * B, V, H, bias=p["b_q"])
        losses = self._cross_entropy(main, ws.logits, ws.y, ws.logits)
        self._gemm(main, ws.logits, p["W_hq"], _flat(ws.dh), T * B, H, V, trans_b=True)

        self._order(other, main, "Wt")
        self._order(main, side, "dh")
        self._order(main, other, "dlogits")
        self._bptt(main, ws.dh, ws.h, p["W_hh"], Wt, ws.dz, ws.dh0)
        self._column_sum(other, ws.logits, g["b_q"])
        self._mean(side, losses, ws.loss)
        self._gemm(side, ws.h, ws.logits, _flat(g["W_hq"]), H, V, T * B, trans_a=True)

        self._order(main, other, "dz")
        self._weight_gradient(main, ws.h, ws.h0, ws.dz, g["W_hh"])
        self._sum_by_token(other, ws.dz, order, bounds, g["W_xh"])
        self._column_sum(other, ws.dz, g["b_h"])
        self._order(side, main, "dW_hq")
        self._order(other, main, "dW_xh")
        self._update(ws, rates, moved, carry)

    def _update(self, ws: Workspace, rates: Array, moved: Array, carry: bool) -> None:
        """Norm, clipping, step, totals and the state to carry."""
        stream, dtype, h = self.stream, ws.dims.dtype, _flat(ws.h)
        partial = self._sum_squares(stream, [ws.flat_grads])
        kernel = self._kernels.update_kernel(dtype, self.geometry)
        blocks = min(_ceil(ws.flat_params.size, kernel.threads), 8 * self._multiprocessors)
        self._launch(
            stream, kernel, blocks, ws.flat_params, ws.flat_grads, partial, rates,
            _flat(ws.loss), _flat(ws.norm), ws.totals, moved,
            h[h.size - ws.h0.size :], _flat(ws.h0), ws.h0.size if carry else 0,
        )  # fmt: skip

    def run_steps(
        self, ws: Workspace, starts: HostArray, lr: float, max_norm: float, carry: bool
    ) -> None:
        """Run ``len(starts)`` steps; ``starts`` is int32 ``[n, B]`` on the host.

        The first step of a workspace is submitted kernel by kernel, which compiles them and makes
        their scratch; all later ones are replays of captured graphs.
        """
        starts = np.ascontiguousarray(starts, dtype=np.int32)
        if not len(starts):
            return
        plan = self._plan(ws, len(starts))
        self.put(starts.ravel(), out=plan.starts[: starts.size])
        self.put(np.zeros(1, np.int32), out=plan.cursor)
        rates = self._set_rates(self.stream, lr, max_norm)

        def submit(steps: int) -> None:
            for _ in range(steps):
                self._submit(ws, plan.starts, plan.cursor, plan.cursor, rates, carry)

        left = len(starts)
        if not self._captures:
            submit(left)
            return
        if carry not in plan.warm:
            submit(1)
            plan.warm.add(carry)
            left -= 1
        while left:
            steps = GRAPH_STEPS if left >= GRAPH_STEPS else 1
            if (steps, carry) not in plan.graphs:
                graph = Graph(self.stream)
                with self._cuda.defer_cleanup(), graph.capture():
                    submit(steps)
                plan.graphs[steps, carry] = graph
                plan.held.extend(self._scratch_arrays.values())
            plan.graphs[steps, carry].launch()
            left -= steps

    def _plan(self, ws: Workspace, steps: int) -> _Plan:
        """The plan of a workspace, with room for the offsets of ``steps`` steps."""
        plan: _Plan | None = ws.extra.get("numba-cuda plan")
        if plan is None or plan.starts.size < steps * ws.dims.B:
            # Graphs hold the address of the old offsets: they go with them.
            plan = ws.extra["numba-cuda plan"] = _Plan(
                starts=self.empty((max(2 * steps, PLANNED_STEPS) * ws.dims.B,), np.int32),
                cursor=self.empty((1,), np.int32),
                warm=plan.warm if plan else set(),
            )
        return plan

    # --- generation ---

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
        p = {name: self.wrap(array) for name, array in params.items()}
        dtype, (S, P), stream = np.dtype(p["W_hh"].dtype), prefix.shape, self.stream
        H, V = p["W_hq"].shape
        start = np.zeros((S, H), dtype) if h0 is None else np.array(h0, dtype)
        state, tokens = self.put(start), self.empty((S, num_tokens), np.int32)
        kernel = self._kernels.generate_kernel(dtype, self.geometry)
        words = [decoding.seed, decoding.seed >> 32, sequence, position]
        self._launch(
            stream, kernel, S,
            *(_flat(p[name]) for name in ("W_xh", "W_hh", "b_h", "W_hq", "b_q")),
            _flat(self.put(np.array(prefix, np.int32))), self.put(np.array(lengths, np.int32)),
            _flat(state), self._scratch(stream, "next state", S * H, dtype),
            self._scratch(stream, "token logits", S * V, dtype),
            self._scratch(stream, "weights", S * V, np.float64),
            self._scratch(stream, "mass before", S * V, np.float64),
            _flat(tokens), P, num_tokens,
            float(decoding.temperature), int(decoding.top_k), float(decoding.top_p),
            *(np.uint64(word & 0xFFFFFFFF) for word in words),
        )  # fmt: skip
        return self.get(tokens), self.get(state)


def _ceil(size: int, tile: int) -> int:
    return -(-size // tile)


def _flat(array: Array) -> Array:
    """A view of one dimension."""
    return array if array.ndim == 1 else array.reshape(array.size)


def _rows(array: Array) -> list[Array]:
    """Flat views of ``array[t]``."""
    flat, step = _flat(array), array.size // array.shape[0]
    return [flat[t * step : (t + 1) * step] for t in range(array.shape[0])]
