"""A GPU through CuPy, as the :class:`~fastrnn.cuda.device.Device` that the launchers work on.

Work goes to CuPy's current stream. Kernels are compiled by NVRTC when first launched, or in threads
before (:meth:`CupyDevice.compile_ahead`), and kept in CuPy's on-disk cache; a digest of
``kernels/`` is part of its key, because CuPy leaves included files out of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.backend import BackendUnavailableError, DeviceMemoryError
from fastrnn.cuda.device import KERNELS, Arch, Array, Device, Graph, Kernel

INSTALL = "pip install 'fastrnn[cuda13x]' (or cuda12x, by the driver's CUDA version)"
OUT_OF_MEMORY = 2
"""The status of CUDA's runtime and driver for an allocation that does not fit."""

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that the launchers distinguish."""


def load_cupy() -> Any:
    """CuPy with a device that works.

    Raises:
        BackendUnavailableError: CuPy is missing or broken, there is no driver or it is too old, no
            device, one that is too old, or no NVRTC; the message says which and what helps.
    """
    try:
        cupy = importlib.import_module("cupy")
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    except Exception as error:  # CuPy raises what its broken libraries raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BackendUnavailableError(f"backend 'cupy' needs CuPy: {reason}; {INSTALL}") from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(_no_device(runtime, error)) from error
    if count == 0:
        raise BackendUnavailableError("backend 'cupy' needs an NVIDIA GPU: no CUDA device found")
    device = cupy.cuda.Device()
    capability = int(device.compute_capability)
    if capability < min(CAPABILITIES):
        raise BackendUnavailableError(
            f"backend 'cupy' needs a GPU of compute capability {min(CAPABILITIES) / 10} or more, "
            f"device {device.id} has {capability / 10}"
        )
    try:
        version = ".".join(map(str, nvrtc.getVersion()))
    except Exception as error:  # an ImportError, OSError or RuntimeError, by CuPy's version
        raise BackendUnavailableError(
            "backend 'cupy' compiles its kernels with NVRTC, which CuPy does not find: "
            f"{' '.join(str(error).split())}; {INSTALL}"
        ) from error
    known = [int(arch) for arch in nvrtc.getSupportedArchs()]
    if capability < min(known):
        raise BackendUnavailableError(
            f"backend 'cupy': NVRTC {version} compiles for compute capability "
            f"{min(known) / 10} and later, device {device.id} has {capability / 10}; "
            "install an older CUDA toolkit: pip install 'fastrnn[cuda12x]'"
        )
    try:
        cupy.zeros(1, np.float32)
        cupy.cuda.get_current_stream().synchronize()
    except (runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError) as error:
        raise BackendUnavailableError(
            f"backend 'cupy': device {device.id} does not work: {' '.join(str(error).split())}"
        ) from error
    return cupy


def _no_device(runtime: Any, error: Exception) -> str:
    """Why CUDA finds no device: no driver at all, one that is too old, or something else."""
    reason = " ".join(str(error).split())
    try:
        driver = int(runtime.driverGetVersion())
    except runtime.CUDARuntimeError:
        driver = 0
    if driver == 0:
        return f"backend 'cupy' needs an NVIDIA GPU and its driver: no driver found ({reason})"
    built = int(runtime.runtimeGetVersion())
    if driver < built:
        return (
            f"backend 'cupy': the driver knows CUDA {_version(driver)}, CuPy is built for "
            f"{_version(built)} ({reason}); update the driver, or {INSTALL}"
        )
    return f"backend 'cupy' needs an NVIDIA GPU: no usable device ({reason})"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def source_digest() -> str:
    """A fingerprint of all CUDA C sources."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class MemoryErrors:
    """A context that turns out-of-memory errors into :class:`DeviceMemoryError`.

    CuPy's pool has given back what it held unused, and has tried again, before it raises.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is None:
            return
        cuda = self._cupy.cuda
        # CuPy's own error has the bytes wanted; CUDA's (of a module, a graph) has a status, and so
        # has NVRTC's, whose numbers are others.
        of_cuda = isinstance(error, (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError))
        if not isinstance(error, cuda.memory.OutOfMemoryError) and not (
            of_cuda and error.status == OUT_OF_MEMORY  # type: ignore[attr-defined]
        ):
            return
        free = total = None
        with contextlib.suppress(Exception):  # the first error is the one to report
            free, total = map(int, cuda.runtime.memGetInfo())
        raise DeviceMemoryError(getattr(error, "_size", None), free, total) from error


class _ForeignStream:
    """A stream of another library, by the protocol that CuPy takes it by."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def foreign_stream(cupy: Any, handle: int, device: int) -> Any:
    """A CuPy stream for the ``cudaStream_t`` of another library, which keeps it alive.

    Args:
        device: the number of the stream's device; it must be current while the stream is used.
    """
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_ForeignStream(handle))
    return cupy.cuda.ExternalStream(handle, device)  # CuPy 13


Module = tuple[str, tuple[tuple[str, int | str], ...]]
"""What is compiled at once: a file of ``kernels/`` and its constants."""


def module_name(module: Module) -> str:
    """``recurrence.cu HIDDEN=256 STAGES=3``."""
    file, defines = module
    return " ".join([f"{file}.cu", *(f"{name}={value}" for name, value in defines)])


@dataclass(frozen=True)
class Compiled:
    """A module that :meth:`CupyDevice.compile_ahead` compiled, or took from CuPy's disk cache.

    Attributes:
        module: its file and constants, see :func:`module_name`.
        seconds: until its functions were loaded, other threads' work included.
        error: why it could not be, None where it could.
    """

    module: str
    seconds: float
    error: str | None = None


class CupyGraph(Graph):
    """An instantiated CUDA graph; launches go to the current stream."""

    def __init__(self, cupy: Any, graph: Any) -> None:
        self._cupy, self._graph = cupy, graph

    def launch(self) -> None:
        self._graph.launch(stream=self._cupy.cuda.get_current_stream())


class CupyDevice(Device):
    """The current CUDA device.

    Raises:
        BackendUnavailableError: it cannot be used; see :func:`load_cupy`.
    """

    def __init__(self) -> None:
        self._cupy = cupy = load_cupy()
        self._memory = MemoryErrors(cupy)
        attributes = cupy.cuda.Device().attributes
        found = int(cupy.cuda.Device().compute_capability)
        self.arch = Arch(
            # Choices are made, and were tested, by architecture: 8.7 is treated as 8.6.
            capability=max(c for c in CAPABILITIES if c <= found),
            multiprocessors=attributes["MultiProcessorCount"],
            shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
            name=cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        )
        self._options = (
            "-std=c++17",
            f"-I{KERNELS}",
            f"-DFASTRNN_SOURCES={source_digest()}",
        )
        self._modules: dict[Module, Any] = {}
        # By device as well: each has a function of its own, and limits set on it.
        self._functions: dict[tuple[int, Kernel], Any] = {}
        self._shared_limits: dict[Any, int] = {}
        self._clusters: dict[tuple[int, Kernel], int] = {}
        # A lock for each module: different ones are compiled at the same time.
        self._locks: dict[Module, threading.Lock] = {}
        # Streams and events belong to the thread that submits: two threads may run ops at once.
        self._local = threading.local()

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        try:
            with self._memory:
                return self._cupy.empty(shape, dtype)
        except DeviceMemoryError as error:
            if error.wanted is not None:
                raise
            # Without CuPy's pool it is CUDA that fails, and says no size.
            wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise DeviceMemoryError(wanted, error.free, error.total) from error.__cause__

    def put(self, host: NDArray[Any], out: Array | None = None) -> Array:
        cupy = self._cupy
        source = np.ascontiguousarray(host)
        if out is None:
            # A copy from pageable memory has left the host array when the call returns.
            with self._memory:
                return cupy.asarray(source).reshape(np.shape(host))
        out.set(source.reshape(out.shape).astype(out.dtype, copy=False))
        return out

    def copy(self, source: Array, out: Array) -> None:
        if out.nbytes:
            out.data.copy_from_device_async(
                source.data, out.nbytes, self._cupy.cuda.get_current_stream()
            )

    def fill_zero(self, array: Array) -> None:
        if array.nbytes:
            array.data.memset_async(0, array.nbytes, self._cupy.cuda.get_current_stream())

    def get(self, array: Array) -> NDArray[Any]:
        return np.asarray(self._cupy.asnumpy(array))

    def sync(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    # --- work ---

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        function = self._function(kernel)
        blocks = (grid,) if isinstance(grid, int) else grid
        pointers = tuple(np.uint64(0) if a is None else a for a in args)
        function(blocks, (kernel.threads,), pointers, shared_mem=kernel.shared_bytes)

    def _function(self, kernel: Kernel) -> Any:
        device = self._cupy.cuda.runtime.getDevice()
        return self._functions.get((device, kernel)) or self._compile(device, kernel)

    def _compile(self, device: int, kernel: Kernel) -> Any:
        module = kernel.file, kernel.defines
        # dict.setdefault is atomic: all threads that ask for a module get one lock.
        with self._locks.setdefault(module, threading.Lock()), self._memory:
            if (device, kernel) in self._functions:
                return self._functions[device, kernel]
            # The driver's calls below need the device's context on this thread.
            self._cupy.cuda.runtime.setDevice(device)
            if module not in self._modules:
                code = (KERNELS / f"{kernel.file}.cu").read_text(encoding="utf-8")
                defines = tuple(f"-D{name}={value}" for name, value in kernel.defines)
                self._modules[module] = self._cupy.RawModule(
                    code=code, options=(*self._options, *defines), backend="nvrtc"
                )
            function = self._modules[module].get_function(kernel.name)
            # The limit belongs to the function, which kernels of several sizes may share. With
            # its static shared memory it can need the opt-in below 48 KiB as well.
            known = (device, module, kernel.name)
            limit = max(kernel.shared_bytes, self._shared_limits.get(known, 0))
            if limit:
                function.max_dynamic_shared_size_bytes = limit
                self._shared_limits[known] = limit
            self._functions[device, kernel] = function
            return function

    def compile_ahead(
        self, kernels: Iterable[Kernel], threads: int | None = None
    ) -> list[Compiled]:
        """Compile and load the modules of ``kernels`` that run on this device, in threads.

        What was compiled lies in CuPy's on-disk cache for later processes as well. A module that
        cannot be compiled does not stop the others.

        Args:
            kernels: say :func:`fastrnn.cuda.launchable`; those that do not run here are left out.
            threads: at most so many modules at once; None: one for each processor.

        Returns:
            A row for each module, in the order in which ``kernels`` names them.
        """
        modules: dict[Module, list[Kernel]] = {}
        for kernel in kernels:
            if kernel.runs_on(self.arch.capability):
                modules.setdefault((kernel.file, kernel.defines), []).append(kernel)
        device = self._cupy.cuda.runtime.getDevice()

        def compiled(module: Module) -> Compiled:
            begin, error = time.perf_counter(), None
            try:
                # The current device is the thread's own.
                with self._cupy.cuda.Device(device):
                    for kernel in modules[module]:
                        self._compile(device, kernel)
            except Exception as failure:  # NVRTC's log, or what the driver says of the module
                error = f"{type(failure).__name__}: {failure}"
            return Compiled(module_name(module), time.perf_counter() - begin, error)

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(compiled, modules))

    def active_clusters(self, kernel: Kernel) -> int:
        key = (self._cupy.cuda.runtime.getDevice(), kernel)
        if key not in self._clusters:
            self._clusters[key] = self._ask_active_clusters(kernel)
        return self._clusters[key]

    def _ask_active_clusters(self, kernel: Kernel) -> int:
        if self.arch.capability < 90 or not kernel.runs_on(self.arch.capability):
            return 0
        function = self._function(kernel)
        self._cupy.cuda.runtime.setDevice(self._cupy.cuda.runtime.getDevice())  # makes its context
        try:
            driver = importlib.import_module("cuda.bindings.driver")
        except ImportError:
            # Without the bindings: as many as would fit if clusters could lie anywhere.
            return self.arch.multiprocessors // kernel.cluster
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = kernel.cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = kernel.shared_bytes
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = kernel.cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        config.attrs, config.numAttrs = [attribute], 1
        handle = driver.CUfunction(function.kernel.ptr)
        status, count = driver.cuOccupancyMaxActiveClusters(handle, config)
        return int(count) if int(status) == 0 else 0

    # --- branches and graphs ---

    @property
    def _branches(self) -> dict[str, Any]:
        if not hasattr(self._local, "branches"):
            self._local.branches = {}
        branches: dict[str, Any] = self._local.branches
        return branches

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        cuda = self._cupy.cuda
        main = cuda.get_current_stream()
        stream = self._branches.get(name)
        if stream is None:
            stream = self._side_stream(name)
            stream.wait_event(self._event(main))
            self._branches[name] = stream
        with stream:
            yield

    def join(self, name: str) -> None:
        stream = self._branches.pop(name)
        self._cupy.cuda.get_current_stream().wait_event(self._event(stream))

    def abandon(self) -> None:
        self._branches.clear()

    def capture(self, submit: Callable[[], None]) -> Graph:
        # The legacy default stream cannot be captured: record on a stream of our own.
        stream = self._side_stream("capture")
        with stream:
            stream.begin_capture(self._cupy.cuda.runtime.streamCaptureModeRelaxed)
            try:
                submit()
            except BaseException:
                self.abandon()
                with contextlib.suppress(Exception):
                    stream.end_capture()  # leaves the stream usable; the graph is void
                raise
            with self._memory:
                graph = stream.end_capture()
        return CupyGraph(self._cupy, graph)

    def _side_stream(self, name: str) -> Any:
        device = self._cupy.cuda.runtime.getDevice()
        streams = self._local.__dict__.setdefault("streams", {})
        if (device, name) not in streams:
            streams[device, name] = self._cupy.cuda.Stream(non_blocking=True)
        return streams[device, name]

    def _event(self, stream: Any) -> Any:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    # --- description ---

    def describe(self) -> dict[str, Any]:
        """The GPU, its driver and what compiled for it."""
        cupy, runtime = self._cupy, self._cupy.cuda.runtime
        device = cupy.cuda.Device()
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        properties = runtime.getDeviceProperties(device.id)
        return {
            "cupy": cupy.__version__,
            "device": properties["name"].decode(),
            "compute capability": f"{self.arch.capability / 10}",
            "multiprocessors": self.arch.multiprocessors,
            "memory GiB": round(properties["totalGlobalMem"] / 2**30, 1),
            "driver CUDA": _version(runtime.driverGetVersion()),
            "runtime CUDA": _version(runtime.runtimeGetVersion()),
            "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        }
