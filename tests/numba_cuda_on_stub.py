"""The ``numba-cuda`` backend on the stub driver: everything that it asks of a driver.

Run by ``tests/test_stub_driver.py`` in a process of its own, because the driver library is chosen
when a process starts. Kernels are compiled by the real compiler and linker, and do nothing when
launched: what is under test stands in ``tests/stub_driver/README.md``. Each check is shown to bite
by a planted fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda.core._utils.cuda_utils import CUDAError
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError

from benchmarks.gpu import clock
from benchmarks.op_cases import OPS
from fastrnn.backend import Backend, Dims, Workspace
from fastrnn.backends import numba_cuda_kernels as kernels
from fastrnn.backends.numba_cuda import GRAPH_STEPS, PLANNED_STEPS, Graph, NumbaCudaBackend
from fastrnn.decoding import Decoding
from tests.stub_driver import StubDriver

driver = StubDriver()
dispatcher = importlib.import_module("numba.cuda.dispatcher")

ODD = Dims(5, 3, 37, 41)
HEADLINE = Dims(35, 32, 256, 1027)
WIDE = Dims(3, 4, 300, 65)  # more units than one block holds
SMALLEST = Dims(1, 1, 1, 2)
SIZES = {"odd": ODD, "headline": HEADLINE, "wide-state": WIDE, "smallest": SMALLEST}


def argument_bytes(argument: Any) -> int:
    """How many bytes cuda.core makes of an argument of a launch."""
    if isinstance(argument, bool):
        return 1
    if isinstance(argument, int | float):
        return 8
    return argument.itemsize if isinstance(argument, np.generic) else ctypes.sizeof(argument)


def announced(launch: Callable[..., None]) -> Callable[..., None]:
    """The launch of cuda.core, with the sizes of its arguments told to the driver."""

    @functools.wraps(launch)
    def announce_and_launch(stream: Any, config: Any, kernel: Any, *args: Any) -> None:
        driver.announce([argument_bytes(argument) for argument in args])
        launch(stream, config, kernel, *args)

    return announce_and_launch


@pytest.fixture(autouse=True, scope="session")
def launches_are_announced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "launch", announced(dispatcher.launch))
        yield


@pytest.fixture(autouse=True)
def no_violation() -> Iterator[None]:
    """A test ends without one, unless it asked for those there were."""
    driver.forget()
    yield
    report = driver.report()
    assert report.violations == []
    assert report.unannounced_launches == 0


def settle() -> None:
    """Free what nobody holds but numba's own queues and its cache of configured launches."""
    dispatcher.CUDADispatcher.configure.cache_clear()
    gc.collect()
    context = cuda.current_context()
    context.deallocations.clear()
    context.memory_manager.deallocations.clear()


def violations(call: Callable[[], Any]) -> list[str]:
    """What a call does wrong; the error that the driver gives for it may come through."""
    with contextlib.suppress(RuntimeError, CudaAPIError, CUDAError):
        call()
    found = driver.report().violations
    driver.forget()
    return found


@pytest.fixture(scope="module")
def backend() -> NumbaCudaBackend:
    return NumbaCudaBackend()


def make_workspace(backend: Backend, dims: Dims) -> Workspace:
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s).astype(dims.dtype) for n, s in dims.param_shapes.items()}
    return backend.workspace(dims, rng.integers(0, dims.V, 200).astype(np.int32), params)


def starts(dims: Dims, steps: int) -> Any:
    return np.random.default_rng(1).integers(0, 200 - dims.T, (steps, dims.B)).astype(np.int32)


def train(backend: Backend, ws: Workspace, steps: int, carry: bool = True) -> None:
    backend.run_steps(ws, starts(ws.dims, steps), 0.5, 0.7, carry)


# --- everything that the backend does --------------------------------------------------------


def test_the_device_is_described(backend: NumbaCudaBackend) -> None:
    about = backend.describe()
    assert about["device"] == "NVIDIA H100 (stub driver)"
    assert about["compute capability"] == "9.0"
    assert about["multiprocessors"] == 132


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("op", OPS)
def test_an_op_alone_and_captured(op: str, dims: Dims, backend: NumbaCudaBackend) -> None:
    case = OPS[op](backend, dims)
    case.submit()
    graph = Graph(backend.stream)
    with cuda.defer_cleanup(), graph.capture():
        for _ in range(3):
            case.submit()
    graph.launch()
    backend.sync()
    graph.close()
    report = driver.report()
    assert report.captures == report.graph_launches == 1
    assert report.captured_launches > 0
    assert report.captured_launches % 3 == 0


def test_an_op_is_timed(backend: NumbaCudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """By events around the replay of a graph, which has to be warm and to leave nothing behind."""
    monkeypatch.setattr(clock, "_spin_kernel", lambda: None)  # CuPy does not open on this driver
    case = OPS["project"](backend, ODD)
    assert clock.seconds(backend, case.submit) > 0


def test_window_and_record(backend: NumbaCudaBackend) -> None:
    ws = make_workspace(backend, ODD)
    backend.window(ws.tokens, backend.put(starts(ODD, 1)[0]), out=(ws.x, ws.y))
    backend.record(ws.loss, ws.norm, ws.totals)
    assert driver.report().launches == 2


def test_copies_are_real(backend: NumbaCudaBackend) -> None:
    host = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(backend.get(backend.put(host)), host)
    np.testing.assert_array_equal(backend.get(backend.put(host)[1:3]), host[1:3])


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_a_step(dims: Dims, fused: bool, backend: NumbaCudaBackend) -> None:
    ws = make_workspace(backend, dims)
    step = backend.step if fused else functools.partial(Backend.step, backend)
    for carry in (True, False):
        step(ws, backend.put(starts(dims, 1)[0]), 0.5, 0.7, carry)
    backend.evaluate(ws, starts(dims, 2), carry=True)
    assert driver.report().captures == 0


def test_a_step_in_double_precision(backend: NumbaCudaBackend) -> None:
    dims = replace(ODD, dtype=np.dtype(np.float64))
    train(backend, make_workspace(backend, dims), 1 + GRAPH_STEPS)
    assert driver.report().graph_launches == 1


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
def test_epochs_of_many_lengths(dims: Dims, backend: NumbaCudaBackend) -> None:
    """One step uncaptured for each ``carry``; graphs of many steps and of one for all others."""
    ws = make_workspace(backend, dims)
    expected = 0
    for carry in (True, False):
        for n, lengths in enumerate((1, 20, GRAPH_STEPS, 9, 100, 0)):
            train(backend, ws, lengths, carry)
            left = lengths - (1 if n == 0 else 0)
            expected += left // GRAPH_STEPS + left % GRAPH_STEPS
    report = driver.report()
    assert report.captures == 4
    assert report.graph_launches == expected
    assert report.captured_launches % (GRAPH_STEPS + 1) == 0


def test_a_plan_that_grows(backend: NumbaCudaBackend) -> None:
    """The offsets of more steps than there is room for: new memory, hence new graphs."""
    ws = make_workspace(backend, ODD)
    train(backend, ws, 2 * GRAPH_STEPS + 1)
    train(backend, ws, PLANNED_STEPS + 1)
    settle()
    train(backend, ws, 2 * GRAPH_STEPS + 1)
    assert driver.report().captures == 3


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
def test_generation(dims: Dims, backend: NumbaCudaBackend) -> None:
    ws = make_workspace(backend, dims)
    sampled = Decoding(temperature=0.7, top_k=3, top_p=0.9, seed=2**40)
    for sequences in (1, 3):
        prefix = np.ones((sequences, 2), np.int32)
        lengths = np.array([2, 1, 1][:sequences], np.int32)
        for decoding in (Decoding(), sampled):
            tokens, h = backend.generate(ws.params, prefix, lengths, 4, decoding)
            assert tokens.shape == (sequences, 4)
            tokens, _ = backend.generate(
                ws.params, tokens[:, -1:], lengths * 0 + 1, 2, decoding, h0=h, position=4
            )
            assert tokens.shape == (sequences, 2)


def test_nothing_is_left_of_fifty_captures() -> None:
    """Streams, events, graphs and memory: as before, when backend and workspaces are gone."""
    settle()
    before = driver.report()
    backend = NumbaCudaBackend()
    for dims in (ODD, WIDE, SMALLEST) * 5:
        ws = make_workspace(backend, dims)
        for carry in (True, False):
            train(backend, ws, GRAPH_STEPS + 2, carry)
    assert driver.report().captures == 60
    train(backend, ws, PLANNED_STEPS + 1)
    del ws, backend
    settle()
    after = driver.report()
    kinds = ("streams", "events", "graphs", "graph executables", "device memory", "pinned memory")
    assert {k: after.live[k] for k in kinds} == {k: before.live[k] for k in kinds}
    assert after.device_bytes == before.device_bytes


def test_memory_that_is_full(backend: NumbaCudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's error, and the device goes on."""
    settle()
    full = driver.report().device_bytes + (1 << 20)
    monkeypatch.setenv("STUB_DRIVER_MEMORY", str(full))
    assert cuda.current_context().get_memory_info().free == 1 << 20
    with pytest.raises(CudaAPIError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        cuda.device_array((1 << 20) + 1, np.int8)
    assert int(caught.value.code) == 2
    assert backend.empty((1 << 20,), np.int8).size == 1 << 20


# --- planted faults --------------------------------------------------------------------------


class Faulty(NumbaCudaBackend):
    """Does something at each mean loss: inside of every step."""

    def __init__(self, fault: Callable[[NumbaCudaBackend], Any]) -> None:
        super().__init__()
        self.fault = fault

    def _mean(self, *args: Any) -> None:
        super()._mean(*args)
        self.fault(self)


def fresh_kernel(backend: NumbaCudaBackend) -> None:
    """Launch a kernel that was not compiled before."""
    kernel = replace(kernels.set_rates_kernel(backend.geometry))
    rates = backend._scratch(backend.stream, "rates", 2, np.float64)
    backend._launch(backend.stream, kernel, 1, rates, 1.0, 1.0)


def escape(backend: NumbaCudaBackend) -> None:
    """Launch on a stream that is not part of the step."""
    rates = backend._scratch(backend.stream, "rates", 2, np.float64)
    kernel = kernels.set_rates_kernel(backend.geometry)
    backend._launch(outside, kernel, 1, rates, 1.0, 1.0)


outside = cuda.stream()
event = cuda.event(timing=False)

IN_A_CAPTURE: list[tuple[str, Callable[[NumbaCudaBackend], Any]]] = [
    ("cuStreamSynchronize during a capture", lambda b: b.sync()),
    ("cuCtxSynchronize during a capture", lambda b: cuda.synchronize()),
    ("cuEventQuery during a capture", lambda b: event.query()),
    ("cuMemAlloc during a capture", lambda b: b.empty((4,), np.float32)),
    ("cuLibraryLoadData during a capture", fresh_kernel),
    ("cuLaunchKernelEx on a stream outside of the capture", escape),
]


@pytest.mark.parametrize(("complaint", "fault"), IN_A_CAPTURE, ids=[c for c, _ in IN_A_CAPTURE])
def test_a_fault_in_a_capture_is_found(complaint: str, fault: Any) -> None:
    backend = Faulty(lambda backend: None)
    ws = make_workspace(backend, ODD)
    train(backend, ws, 1)
    backend.fault = fault
    assert any(complaint in found for found in violations(lambda: train(backend, ws, 1)))


def test_a_capture_without_a_step_before_it_is_found() -> None:
    """The first step makes the scratch that the captured ones write to."""
    backend = NumbaCudaBackend()
    ws = make_workspace(backend, ODD)
    backend._plan(ws, 1).warm.add(True)
    found = violations(lambda: train(backend, ws, 1))
    assert "cuMemAlloc during a capture" in found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_memory_freed_in_a_capture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba frees what died in batches; ``defer_cleanup`` holds that back for the capture."""
    arrays: list[Any] = []
    backend = Faulty(lambda backend: arrays.clear())
    ws = make_workspace(backend, ODD)
    train(backend, ws, 1)
    arrays += [backend.empty((4,), np.float32) for _ in range(50)]
    train(backend, ws, 1)
    assert arrays == []
    assert driver.report().violations == []
    arrays += [backend.empty((4,), np.float32) for _ in range(50)]
    monkeypatch.setattr(backend._cuda, "defer_cleanup", contextlib.nullcontext)
    assert "cuMemFree during a capture" in violations(lambda: train(backend, ws, GRAPH_STEPS))


@pytest.mark.parametrize("dropped", ["dW_hq", "dW_xh"])
def test_a_stream_that_is_not_joined_is_found(dropped: str) -> None:
    class Unjoined(NumbaCudaBackend):
        def _order(self, first: Any, then: Any, what: str) -> None:
            if what != dropped:
                super()._order(first, then, what)

    backend = Unjoined()
    ws = make_workspace(backend, ODD)
    train(backend, ws, 1)
    (found,) = violations(lambda: train(backend, ws, 1))
    assert "a stream was not joined" in found


def test_a_graph_on_freed_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch that grows is another array; a captured step still writes to the old one."""

    def grow(hold: bool) -> list[str]:
        backend = NumbaCudaBackend()
        ws = make_workspace(backend, ODD)
        train(backend, ws, 2)
        if not hold:
            ws.extra["numba-cuda plan"].held.clear()
        train(backend, make_workspace(backend, HEADLINE), 1)
        settle()
        return violations(lambda: train(backend, ws, 1))

    assert grow(True) == []
    (found,) = grow(False)
    assert "the graph works on" in found
    assert "that were freed" in found


def wrong_arguments(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the integers of all launches as ``fault`` says."""
    prepare = dispatcher._Kernel._prepare_args

    def wrong(self: Any, kind: Any, value: Any, stream: Any, retr: Any, packed: list[Any]) -> None:
        begin = len(packed)
        prepare(self, kind, value, stream, retr, packed)
        if len(packed) == begin + 1:
            packed[begin:] = {
                "one too few": [],
                "one too many": [packed[-1], packed[-1]],
                "too wide": [ctypes.c_int64(1)],
            }[fault]

    monkeypatch.setattr(dispatcher._Kernel, "_prepare_args", wrong)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("one too few", "28 arguments, it takes 29"),
        ("one too many", "30 arguments, it takes 29"),
        ("too wide", "argument 28 has 8 bytes, it takes 4"),
    ],
)
def test_wrong_arguments_are_found(
    fault: str, complaint: str, backend: NumbaCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four arrays of seven words and an integer make 29 parameters of ``gather``."""
    case = OPS["gather"](backend, ODD)
    case.submit()
    wrong_arguments(fault, monkeypatch)
    (found,) = violations(case.submit)
    assert "gather" in found
    assert complaint in found


@pytest.mark.filterwarnings("ignore:Grid size")
@pytest.mark.parametrize(
    ("grid", "threads", "shared", "complaint"),
    [
        ((1, 65_536), 256, 0, r"grid \(1, 65536, 1\)"),
        (2**31, 256, 0, r"grid \(2147483648, 1, 1\)"),
        (1, 2048, 0, r"block \(2048, 1, 1\)"),
        (1, 512, 0, "512 threads a block, at most 256"),
        (1, 256, 48 * 1024 + 1, "49153 bytes of dynamic shared memory"),
    ],
)
def test_a_launch_past_the_limits_is_found(
    grid: Any, threads: int, shared: int, complaint: str, backend: NumbaCudaBackend
) -> None:
    kernel = kernels.copy_kernel(np.dtype(np.float32), backend.geometry)
    x, out = backend.empty((4,), np.float32), backend.empty((4,), np.float32)
    launch = kernel.dispatcher[grid, threads, backend.stream, shared]
    (found,) = violations(lambda: launch(x, out))
    assert re.search(rf"launch of \S*copy\S*: .*{complaint}", found)


def test_a_copy_past_an_array_is_found(backend: NumbaCudaBackend) -> None:
    array = backend.empty((1024,), np.float32)
    numba_driver = importlib.import_module("numba.cuda.cudadrv.driver").driver
    host = np.zeros(1025, np.float32)
    address = array.device_ctypes_pointer.value
    call = functools.partial(numba_driver.cuMemcpyHtoD, address, host.ctypes.data, host.nbytes)
    (found,) = violations(call)
    assert "outside of any allocation" in found


def forget_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "close", lambda self: None)


def forget_to_destroy(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Graph._call

    def but_not(self: Graph, name: str, *args: Any) -> Any:
        return None if name == "cuGraphDestroy" else call(self, name, *args)

    monkeypatch.setattr(Graph, "_call", but_not)


kept: list[Any] = []


def keep(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Hold on to what numba makes by this name."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        make = getattr(cuda, name)

        def made(*args: Any, **options: Any) -> Any:
            kept.append(make(*args, **options))
            return kept[-1]

        monkeypatch.setattr(cuda, name, made)

    return plant


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("graph executables", forget_to_close),
        ("graphs", forget_to_destroy),
        ("streams", keep("stream")),
        ("events", keep("event")),
        ("device memory", keep("device_array")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_leak_is_found(kind: str, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    def leaked() -> int:
        settle()
        before = driver.report().live[kind]
        backend = NumbaCudaBackend()
        ws = make_workspace(backend, ODD)
        train(backend, ws, 3)
        del ws, backend
        settle()
        return driver.report().live[kind] - before

    assert leaked() == 0
    plant(monkeypatch)
    assert leaked() > 0
    kept.clear()
