"""Real CuPy without a GPU: its bindings of the CUDA runtime and driver, replaced by this module.

    python -m tests.stub_cuda ARGUMENT …     runs pytest in such a process

CuPy links NVIDIA's runtime statically, and that runtime refuses a driver that is not NVIDIA's: a
stub ``libcuda`` below it is not enough. What CuPy calls are the C functions that its two binding
modules export to the rest of it (``__pyx_capi__``); :func:`install` puts functions of a
:class:`StubCuda` in their places before anything imports them. All else is CuPy: arrays, the memory
pool, pinned buffers, streams, events, graphs, NVRTC, how arguments become pointers.

Device memory is host memory, so copies are real. A launch checks the sizes of its arguments with
the kernel's own cubin and then runs in the emulator, or joins the graph that is being captured.
Streams run what they get at once, in the order of the calls; a graph runs its work in turn in two
orders that its edges allow, side streams as late and as early as can be. What a device would refuse
or regret is kept in :attr:`StubCuda.faults`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

MULTIPROCESSORS = 132
ATTRIBUTES = {16: MULTIPROCESSORS, 75: 9, 76: 0, 97: 227 * 1024}
"""Of ``cudaDeviceAttr``: an H100's multiprocessors, compute capability, shared memory of a block
with the opt-in. All others are 1."""
VERSION = 13000
MEMORY = 80 << 30
HOST_TO_DEVICE, DEVICE_TO_HOST, BY_ADDRESS = 1, 2, 4
MAX_DYNAMIC_SHARED_BYTES = 8
"""Of ``CUfunction_attribute``."""
DEFAULT_SHARED_BYTES = 48 * 1024


# --- What the kernels take, by their cubins ----------------------------------------------------


def parameter_sizes(cubin: bytes) -> dict[str, list[int]]:
    """Bytes of each parameter of each kernel of a cubin.

    They stand in the ELF sections ``.nv.info.<kernel>``: records of a format byte, an attribute
    byte and 16 bits of value or size; attribute 0x17 describes a parameter: its index, its ordinal,
    its offset, and a word whose upper 14 bits are its size.
    """
    assert cubin[:5] == b"\x7fELF\x02", "not a 64-bit ELF file"
    table, entry, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    entry, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<II4Q", cubin, table + i * entry) for i in range(count)]
    text = headers[names][4]
    sizes: dict[str, list[int]] = {}
    for name_offset, _, _, _, offset, size in headers:
        begin = text + name_offset
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if name.startswith(".nv.info."):
            sizes[name.removeprefix(".nv.info.")] = _parameters(cubin[offset : offset + size])
    return sizes


def _parameters(info: bytes) -> list[int]:
    found, at = {}, 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # `value` bytes follow
            if attribute == 0x17:
                _, ordinal, _, word = struct.unpack_from("<IHHI", info, at)
                found[ordinal] = word >> 18
            at += value
    return [found[i] for i in range(len(found))]


# --- The device --------------------------------------------------------------------------------


@dataclass
class Capture:
    """What a stream, and those that wait for its events, record.

    Attributes:
        origin: the stream that began it.
        queues: by stream, its work, and as (stream, length) where it waits for another's first
            ``length`` entries.
        memory: addresses and sizes of what the work reads and writes.
    """

    origin: int
    queues: dict[int, list[Callable[[], Any] | tuple[int, int]]] = field(default_factory=dict)
    memory: set[tuple[int, int]] = field(default_factory=set)

    def order(self, streams: Iterable[int]) -> list[Callable[[], Any]]:
        """The work of these streams, one stream after the other but for what they wait for."""
        done, work = dict.fromkeys(self.queues, 0), []

        def run(stream: int, length: int) -> None:
            while done[stream] < length:
                entry = self.queues[stream][done[stream]]
                done[stream] += 1
                if isinstance(entry, tuple):
                    run(*entry)
                else:
                    work.append(entry)

        for stream in streams:
            run(stream, len(self.queues[stream]))
        return work


@dataclass
class CapturedGraph:
    """Work in two orders that its edges allow: other streams' as late, and as early as can be."""

    orders: tuple[list[Callable[[], Any]], list[Callable[[], Any]]]
    memory: set[tuple[int, int]]
    launches: int = 0


@dataclass
class Function:
    """A loaded kernel: its parameters' sizes, and the dynamic shared memory it may be given."""

    name: str
    sizes: list[int]
    shared_bytes: int = DEFAULT_SHARED_BYTES


@dataclass(frozen=True)
class Announced:
    """A launch as the launcher wrote it; what CuPy makes of it is held to it."""

    args: tuple[Any, ...]
    run: Callable[[list[Any]], None]


class StubCuda:
    """The runtime and driver that CuPy sees: one method a function, by the name in its bindings.

    Attributes:
        faults: what a device would refuse or regret.
        counts: calls, by name.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.counts: dict[str, int] = {}
        self._next = 0x1000
        self._local = threading.local()
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, Capture | None] = {0: None}
        self._events: dict[int, tuple[Capture, int, int] | None] = {}
        self._graphs: dict[int, CapturedGraph] = {}
        self._executables: dict[int, CapturedGraph] = {}
        self._modules: dict[int, dict[str, list[int]]] = {}
        self._functions: dict[int, Function] = {}

    def alive(self) -> dict[str, int]:
        """Handles and allocations that were not given back."""
        return {
            "streams": len(self._streams) - 1,
            "events": len(self._events),
            "graphs": len(self._graphs) + len(self._executables),
            "modules": len(self._modules),
            "allocations": len(self._memory),
        }

    def capturing(self) -> bool:
        """Whether any stream is being captured."""
        return any(self._streams.values())

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def _handle(self) -> int:
        self._next += 0x100
        return self._next

    def _forbidden(self, what: str) -> None:
        if self.capturing():
            self.fault(f"{what} during a capture")

    def _in_context(self, what: str) -> None:
        if not getattr(self._local, "context", False):
            self.fault(f"{what} on a thread without a context")

    def announce(self, args: Sequence[Any], run: Callable[[list[Any]], None]) -> None:
        """Say what the next launch of this thread is to be given, and what it then does.

        Args:
            args: CuPy arrays, None and NumPy scalars.
            run: called with the arguments as the kernel finds them: NumPy arrays on the stub's
                memory for pointers.
        """
        self._local.announced = Announced(tuple(args), run)

    # --- versions and devices ---

    def driverGetVersion(self) -> int:
        return VERSION

    def runtimeGetVersion(self) -> int:
        return VERSION

    def _getCUDAMajorVersion(self) -> int:
        return VERSION // 1000

    def getDeviceCount(self) -> int:
        return 1

    def getDevice(self) -> int:
        return 0

    def setDevice(self, device: int) -> None:
        if device != 0:
            self.fault(f"setDevice({device})")
        self._local.context = True

    def _ensure_context(self) -> None:
        self._local.context = True

    def deviceGetAttribute(self, attribute: int, device: int) -> int:
        return ATTRIBUTES.get(attribute, 1)

    def deviceGetLimit(self, limit: int) -> int:
        return 0

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        return {"name": b"stub H100", "totalGlobalMem": MEMORY}

    def deviceSynchronize(self) -> None:
        self._forbidden("deviceSynchronize")

    # --- memory ---

    def malloc(self, size: int) -> int:
        self._forbidden("malloc")
        return self._allocate(self._memory, size)

    def free(self, pointer: int) -> None:
        self._forbidden("free")
        if self._memory.pop(pointer, None) is None and pointer:
            self.fault(f"free of {pointer:#x}, which is not allocated")

    def hostAlloc(self, size: int, flags: int) -> int:
        self._forbidden("hostAlloc")
        return self._allocate(self._pinned, size)

    def freeHost(self, pointer: int) -> None:
        self._forbidden("freeHost")
        del self._pinned[pointer]

    def _allocate(self, where: dict[int, NDArray[np.uint8]], size: int) -> int:
        self._local.context = True
        # As unaligned as cudaMalloc's addresses may be, and full of NaN.
        room = np.full(size + 512, 0xFF, np.uint8)
        pointer = -(-room.ctypes.data // 256) * 256
        where[pointer] = room[pointer - room.ctypes.data :][:size]
        return pointer

    def memGetInfo(self) -> tuple[int, int]:
        return MEMORY - sum(room.size for room in self._memory.values()), MEMORY

    def pointerGetMemoryType(self, pointer: int) -> int:
        inside = any(p <= pointer < p + room.size for p, room in self._pinned.items())
        return 1 if inside else 0

    def pointerGetAttributes(self, pointer: int) -> Any:
        """What CuPy 13 asks for the type."""
        runtime = importlib.import_module("cupy_backends.cuda.api.runtime")
        return runtime.PointerAttributes(0, pointer, pointer, self.pointerGetMemoryType(pointer))

    def _bytes_at(self, pointer: int, size: int) -> NDArray[np.uint8] | None:
        """Device memory from an address on; None where it is not allocated."""
        for begin, room in self._memory.items():
            if begin <= pointer and pointer + size <= begin + room.size:
                return room[pointer - begin : pointer - begin + size]
        return None

    def _allocated(self, pointer: int, size: int) -> bool:
        found = self._bytes_at(pointer, size) is not None
        if not found:
            self.fault(f"{size} bytes at {pointer:#x} are not allocated")
        return found

    def memcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        # CuPy names no direction where both are on a device.
        if kind != BY_ADDRESS and self._streams[stream] is not None:
            self.fault("a copy to or from the host during a capture")
        memory = []
        if kind != DEVICE_TO_HOST:
            memory.append((target, size))
        if kind != HOST_TO_DEVICE:
            memory.append((source, size))
        self._submit(stream, lambda: void(ctypes.memmove(target, source, size)), memory)

    def memsetAsync(self, pointer: int, value: int, size: int, stream: int) -> None:
        memory = [(pointer, size)]
        self._submit(stream, lambda: void(ctypes.memset(pointer, value, size)), memory)

    # --- streams, events, graphs ---

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:
        handle = self._handle()
        self._streams[handle] = None
        return handle

    def streamCreateWithFlags(self, flags: int) -> int:
        """What CuPy 13 calls."""
        return self.streamCreateWithPriority(flags, 0)

    def streamDestroy(self, stream: int) -> None:
        del self._streams[stream]

    def streamSynchronize(self, stream: int) -> None:
        self._forbidden("streamSynchronize")

    def streamBeginCapture(self, stream: int) -> None:
        if stream == 0 or self._streams[stream] is not None:
            self.fault(f"streamBeginCapture on stream {stream:#x}")
        self._streams[stream] = Capture(stream, {stream: []})

    def streamEndCapture(self, stream: int) -> int:
        capture = self._streams[stream]
        if capture is None or capture.origin != stream:
            self.fault(f"streamEndCapture on stream {stream:#x}, which began none")
            return 0
        for other in capture.queues:
            self._streams[other] = None
        late = capture.order([stream])
        early = capture.order([*(s for s in capture.queues if s != stream), stream])
        if len(late) < len(early):
            self.fault("a capture ends with a stream that was not joined")
        handle = self._handle()
        self._graphs[handle] = CapturedGraph((late, early), capture.memory)
        return handle

    def streamIsCapturing(self, stream: int) -> int:
        return int(self._streams[stream] is not None)

    def eventCreateWithFlags(self, flags: int) -> int:
        handle = self._handle()
        self._events[handle] = None
        return handle

    def eventDestroy(self, event: int) -> None:
        del self._events[event]

    def eventQuery(self, event: int) -> int:
        self._forbidden("eventQuery")
        return 0

    def eventSynchronize(self, event: int) -> None:
        self._forbidden("eventSynchronize")

    def eventElapsedTime(self, begin: int, end: int) -> float:
        """Milliseconds, which mean nothing here."""
        return 1.0 if {begin, end} <= self._events.keys() else 0.0

    def eventRecord(self, event: int, stream: int) -> None:
        capture = self._streams[stream]
        self._events[event] = (
            None if capture is None else (capture, stream, len(capture.queues[stream]))
        )

    def streamWaitEvent(self, stream: int, event: int) -> None:
        recorded, own = self._events[event], self._streams[stream]
        if recorded is None:
            if own is not None:
                self.fault("a capture waits for an event from outside")
            return
        capture, other, length = recorded
        if own is not None and own is not capture:
            self.fault("two captures wait for each other")
        self._streams[stream] = capture
        capture.queues.setdefault(stream, []).append((other, length))

    def graphInstantiate(self, graph: int) -> int:
        self._forbidden("graphInstantiate")
        handle = self._handle()
        self._executables[handle] = self._graphs[graph]
        return handle

    def graphLaunch(self, executable: int, stream: int) -> None:
        graph = self._executables[executable]
        work = graph.orders[graph.launches % 2]
        graph.launches += 1
        # The memory may have been freed since it was captured.
        self._submit(stream, lambda: [run() for run in work], graph.memory)

    def graphDestroy(self, graph: int) -> None:
        del self._graphs[graph]

    def graphExecDestroy(self, executable: int) -> None:
        del self._executables[executable]

    def _submit(
        self, stream: int, run: Callable[[], Any], memory: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Run it now, or when the graph does, on memory given as (address, bytes)."""
        if not all(self._allocated(*part) for part in memory):
            return  # it would write to memory of the test's own
        capture = self._streams[stream]
        if capture is None:
            run()
            return
        capture.queues[stream].append(run)
        capture.memory.update(memory)

    # --- modules and launches ---

    def moduleLoadData(self, cubin: bytes) -> int:
        self._forbidden("moduleLoadData")
        self._in_context("moduleLoadData")
        handle = self._handle()
        self._modules[handle] = parameter_sizes(cubin)
        return handle

    def moduleUnload(self, module: int) -> None:
        self._forbidden("moduleUnload")
        del self._modules[module]

    def moduleGetFunction(self, module: int, name: str) -> int:
        self._in_context("moduleGetFunction")
        sizes = self._modules[module].get(name)
        if sizes is None:
            self.fault(f"no kernel {name}")
            return 0
        # A module gives one handle for a name, with one set of attributes.
        handle = module * 0x10000 + list(self._modules[module]).index(name)
        self._functions.setdefault(handle, Function(name, sizes))
        return handle

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self._in_context("funcSetAttribute")
        known = self._functions[function]
        if attribute == MAX_DYNAMIC_SHARED_BYTES:
            known.shared_bytes = value
        if value > ATTRIBUTES[97]:
            self.fault(f"{known.name}: {value} bytes of shared memory, {ATTRIBUTES[97]} are there")

    def launchKernel(
        self, function: int, x: int, y: int, z: int, threads: int, by: int, bz: int,
        shared_bytes: int, stream: int, pointers: int, extra: int,
    ) -> None:  # fmt: skip
        self._in_context("launchKernel")
        known, announced = self._functions[function], getattr(self._local, "announced", None)
        self._local.announced = None
        if shared_bytes > known.shared_bytes:
            self.fault(f"{known.name}: {shared_bytes} bytes of shared memory were not allowed")
        if announced is None:
            self.fault(f"{known.name} was launched by something else than the device")
            return
        wanted = [8 if _is_pointer(a) else a.nbytes for a in announced.args]
        if wanted != known.sizes:
            self.fault(f"{known.name} takes {known.sizes} bytes, not {wanted}")
            return
        table = (ctypes.c_void_p * len(wanted)).from_address(pointers)
        received = [
            self._received(known.name, given, ctypes.string_at(at, size))
            for given, at, size in zip(announced.args, table, wanted, strict=True)
        ]
        arrays = [a for a in announced.args if a is not None and _is_pointer(a)]
        memory = [(a.data.ptr, a.nbytes) for a in arrays]
        self._submit(stream, lambda: announced.run(received), memory)

    def _received(self, name: str, given: Any, raw: bytes) -> Any:
        """An argument as the kernel finds it."""
        if not _is_pointer(given):
            value = np.frombuffer(raw, given.dtype)[0]
            if value.tobytes() != given.tobytes():
                self.fault(f"{name}: an argument arrives as {value!r}, not {given!r}")
            return np.array(value) if isinstance(given, np.ndarray) else value
        (pointer,) = struct.unpack("<Q", raw)
        if pointer != (0 if given is None else given.data.ptr):
            self.fault(f"{name}: a pointer arrives as {pointer:#x}")
        if given is None:
            return None
        found = self._bytes_at(pointer, given.nbytes)
        return None if found is None else found.view(given.dtype).reshape(given.shape)


def _is_pointer(argument: Any) -> bool:
    return not isinstance(argument, np.generic | np.ndarray)


def void(_: Any) -> None:
    """Nothing, of anything."""


# --- Into CuPy's bindings ----------------------------------------------------------------------

_TYPES: dict[str, Any] = {
    "struct __pyx_obj_13cupy_backends_4cuda_3api_7runtime_PointerAttributes *": ctypes.py_object,
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "intptr_t": ctypes.c_ssize_t,
    "uintmax_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "PyObject *": ctypes.py_object,
    "CUdevice": ctypes.c_int,
}
_SIGNATURE = re.compile(r"^(?P<result>[\w ]+?\*?) ?\((?P<arguments>.*)\)$")
_alive: list[Any] = []
"""C functions made here, which CuPy keeps no reference to."""


def install(stub: StubCuda) -> None:
    """Replace what CuPy's bindings export. Before ``import cupy``; the process stays so."""
    assert "cupy" not in sys.modules, "CuPy has been imported: its functions are bound"
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    for binding in ("runtime", "driver"):
        module = importlib.import_module(f"cupy_backends.cuda.api.{binding}")
        for name, capsule in list(module.__pyx_capi__.items()):
            signature = name_of(capsule)
            made = _c_function(stub, name, signature.decode())
            if made is None:
                continue
            function, called = made
            _alive.extend((function, signature))
            address = ctypes.cast(function, ctypes.c_void_p)
            module.__pyx_capi__[name] = new(address, signature, None)
            if hasattr(module, name):
                setattr(module, name, called)


def _c_function(stub: StubCuda, name: str, signature: str) -> tuple[Any, Callable[..., Any]] | None:
    """A C function of this signature that calls the stub; None: not one to replace."""
    found = _SIGNATURE.match(signature)
    if found is None or name in ("check_status", "get_build_version"):
        return None
    arguments = [a for a in found["arguments"].split(", ") if a not in ("", "void")]
    extra = [a for a in arguments if "__pyx_" in a]
    arguments = [a for a in arguments if "__pyx_" not in a]
    if not {found["result"], *arguments} <= _TYPES.keys():
        return None  # of textures and the like
    kinds = [_TYPES[a] for a in (found["result"], *arguments)]
    method = getattr(stub, name, None)

    def called(*args: Any) -> Any:
        stub.counts[name] = stub.counts.get(name, 0) + 1
        try:
            if method is None:
                raise NotImplementedError(f"the stub has no {name}")
            return method(*args[: len(arguments)])
        except Exception:  # CuPy would not learn of it
            stub.fault(traceback.format_exc())
            return None if found["result"] == "PyObject *" else 0

    hidden = [ctypes.c_void_p if "*" in a else ctypes.c_int for a in extra]
    return ctypes.CFUNCTYPE(*kinds, *hidden)(called), called


@contextmanager
def occupancy(stub: StubCuda) -> Iterator[None]:
    """Answer the one question that fastrnn asks the driver through ``cuda.bindings``."""
    try:
        driver: ModuleType = importlib.import_module("cuda.bindings.driver")
    except ImportError:  # fastrnn does without
        yield
        return
    real = driver.cuOccupancyMaxActiveClusters

    def answer(function: Any, config: Any) -> tuple[int, int]:
        (attribute,) = config.attrs
        size = attribute.value.clusterDim.x
        known = stub._functions[int(function)]
        if config.gridDimX % size or config.sharedMemBytes > known.shared_bytes:
            stub.fault(f"{known.name}: occupancy of an impossible launch")
        return 0, MULTIPROCESSORS // int(size)

    driver.cuOccupancyMaxActiveClusters = answer  # type: ignore[attr-defined]
    try:
        yield
    finally:
        driver.cuOccupancyMaxActiveClusters = real  # type: ignore[attr-defined]


# --- The tests on it ---------------------------------------------------------------------------


def stubbed_device(stub: StubCuda) -> type[Any]:
    """:class:`fastrnn.cuda.cupy_device.CupyDevice`, its kernels run by the emulator."""
    from fastrnn.cuda.cupy_device import CupyDevice
    from fastrnn.cuda.device import KERNELS, Array, Kernel
    from tests.emulator import Emulator

    emulator = Emulator()

    class StubbedDevice(CupyDevice):
        def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
            module = emulator.module(KERNELS / f"{kernel.file}.cu", dict(kernel.defines))

            def run(received: list[Any]) -> None:
                module.launch(
                    *(kernel.name, grid, kernel.threads, received),
                    shared_bytes=kernel.shared_bytes,
                    guard=False,  # on the stub's memory: some arguments are tables of addresses
                    flush_denormals=True,
                )

            stub.announce(args, run)
            super().launch(kernel, grid, args)

        def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
            if stub.capturing():
                # The pool may have it without the driver, and would give it away again.
                stub.fault(f"{shape} {np.dtype(dtype)} allocated during a capture")
            return super().empty(shape, dtype)

    return StubbedDevice


class Plugin:
    """Fails a test for what the stub found wrong in it."""

    def __init__(self, stub: StubCuda) -> None:
        self._stub = stub

    @pytest.fixture
    def stub(self) -> StubCuda:
        return self._stub

    @pytest.fixture(autouse=True)
    def no_faults(self) -> Iterator[None]:
        self._stub.faults.clear()
        yield
        assert not self._stub.faults, "\n".join(self._stub.faults)


def main(arguments: list[str]) -> int:
    """Run pytest where ``open_backend("cupy")`` opens CuPy on the stub."""
    stub = StubCuda()
    install(stub)
    from fastrnn.cuda import cupy_device

    cupy_device.CupyDevice = stubbed_device(stub)  # type: ignore[misc]
    with occupancy(stub):
        return int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[Plugin(stub)]))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # CuPy gives back what it still holds after the functions above are gone.
    os._exit(status)
