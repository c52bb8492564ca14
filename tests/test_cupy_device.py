"""The CuPy device without a GPU: what keeps it from opening, and how it submits, on a fake CuPy."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import fastrnn.cuda.cupy_device as cupy_device
from fastrnn.backend import BackendUnavailableError, DeviceMemoryError
from fastrnn.cuda import launchable
from fastrnn.cuda.device import KERNELS, Kernel


class FakeError(RuntimeError):
    """Stands for CUDARuntimeError."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class FakeOutOfMemoryError(MemoryError):
    """Stands for the error of CuPy's pool."""

    def __init__(self, size: int) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")
        self._size = size


class FakeStream:
    """Records, in the log that all streams share, what is submitted and what waits for what."""

    current: FakeStream
    made = 0

    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name = log, name
        self.outer: list[FakeStream] = []

    def __enter__(self) -> FakeStream:
        self.outer.append(FakeStream.current)
        FakeStream.current = self
        return self

    def __exit__(self, *error: object) -> None:
        FakeStream.current = self.outer.pop()

    def synchronize(self) -> None:
        self.log.append(("wait for", self.name))

    def wait_event(self, event: Any) -> None:
        self.log.append((self.name, "after", event.stream))

    def begin_capture(self, mode: Any) -> None:
        self.log.append(("capture on", self.name))

    def end_capture(self) -> Any:
        self.log.append(("captured", self.name))
        return SimpleNamespace(launch=lambda stream: self.log.append(("replay on", stream.name)))


class FakeEvent:
    def __init__(self, disable_timing: bool) -> None:
        assert disable_timing

    def record(self, stream: FakeStream) -> None:
        self.stream = stream.name


class FakeFunction:
    """A compiled kernel; it refuses what a driver would refuse."""

    def __init__(self, log: list[tuple[Any, ...]], name: str, options: tuple[str, ...]) -> None:
        self.log, self.name, self.options = log, name, options
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int) -> None:
        assert isinstance(grid, tuple)
        assert isinstance(block, tuple)
        assert all(isinstance(a, np.generic | np.ndarray) for a in args)
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.log.append((FakeStream.current.name, self.name, grid, block))


class FakeCupy(ModuleType):
    """As much of CuPy as the device uses."""

    def __init__(self, **failures: Callable[[], Any]) -> None:
        super().__init__("cupy")
        self.log: list[tuple[Any, ...]] = []
        self.modules: list[SimpleNamespace] = []
        self.current = threading.local()
        FakeStream.current = FakeStream(self.log, "caller")
        FakeStream.made = 0

        def new_stream(non_blocking: bool) -> FakeStream:
            assert non_blocking
            FakeStream.made += 1
            return FakeStream(self.log, f"side {FakeStream.made}")

        runtime = SimpleNamespace(
            CUDARuntimeError=FakeError,
            getDeviceProperties=lambda device: {"name": b"NVIDIA H100 80GB HBM3"},
            getDeviceCount=failures.get("count", lambda: 1),
            driverGetVersion=failures.get("driver", lambda: 13000),
            runtimeGetVersion=lambda: 13000,
            streamCaptureModeRelaxed=1,
            getDevice=lambda: getattr(self.current, "device", 0),
            setDevice=lambda number: setattr(self.current, "device", number),
            memGetInfo=lambda: (3 << 20, 80 << 30),
        )

        class FakeDevice(contextlib.ExitStack):
            """A device; as a context, the current one of its thread."""

            attributes: ClassVar = {
                "MultiProcessorCount": 132,
                "MaxSharedMemoryPerBlockOptin": 232448,
            }
            compute_capability = failures.get("capability", lambda: "90")()

            def __init__(self, number: int | None = None) -> None:
                super().__init__()
                self.id = runtime.getDevice() if number is None else number

            def __enter__(self) -> Any:
                self.callback(runtime.setDevice, runtime.getDevice())
                runtime.setDevice(self.id)
                return super().__enter__()

        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=FakeDevice,
            Stream=new_stream,
            Event=FakeEvent,
            get_current_stream=lambda: FakeStream.current,
            driver=SimpleNamespace(CUDADriverError=FakeError),
            memory=SimpleNamespace(OutOfMemoryError=FakeOutOfMemoryError),
        )
        self.empty = failures.get("empty", np.empty)
        self.asarray = failures.get("empty", np.asarray)
        self.compiled: list[tuple[str, int]] = []
        self.compiling: Callable[[str], None] = lambda name: None
        self.zeros = failures.get("zeros", lambda *args: np.zeros(1))

        def raw_module(code: str, options: tuple[str, ...], backend: str) -> SimpleNamespace:
            assert backend == "nvrtc"
            made: dict[str, FakeFunction] = {}

            def get_function(name: str) -> FakeFunction:
                if not made:  # as CuPy does: with the first function
                    self.compiled.append((" ".join(options[3:]), runtime.getDevice()))
                    self.compiling(self.compiled[-1][0])
                return made.setdefault(name, FakeFunction(self.log, name, options))

            module = SimpleNamespace(code=code, options=options, get_function=get_function)
            self.modules.append(module)
            return module

        self.RawModule = raw_module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCupy]:
    def put_in_place(nvrtc: Any = None, **failures: Callable[[], Any]) -> FakeCupy:
        fake = FakeCupy(**failures)
        compiler = ModuleType("nvrtc")
        compiler.getVersion = nvrtc or (lambda: (13, 0))  # type: ignore[attr-defined]
        known = failures.get("archs", lambda: [75, 80, 90])
        compiler.getSupportedArchs = known  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cupy", fake)
        monkeypatch.setitem(sys.modules, "cupy_backends", ModuleType("cupy_backends"))
        for name in ("cuda", "cuda.libs"):
            full = f"cupy_backends.{name}"
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", compiler)
        return fake

    return put_in_place


def fails(text: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        raise FakeError(text)

    return call


def exhausted(size: int) -> Any:
    raise FakeOutOfMemoryError(size)


# --- What keeps it from opening ----------------------------------------------------------------

INSUFFICIENT = fails("cudaErrorInsufficientDriver: CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        pytest.param(
            {"count": INSUFFICIENT, "driver": lambda: 0},
            r"needs an NVIDIA GPU and its driver: no driver found",
            id="no driver",
        ),
        pytest.param(
            {"count": INSUFFICIENT, "driver": lambda: 12020},
            r"the driver knows CUDA 12\.2, CuPy is built for 13\.0 .* update the driver",
            id="driver too old",
        ),
        pytest.param(
            {"count": fails("cudaErrorDevicesUnavailable: busy")},
            r"no usable device \(cudaErrorDevicesUnavailable",
            id="device busy",
        ),
        pytest.param({"count": lambda: 0}, "no CUDA device found", id="no device"),
        pytest.param(
            {"capability": lambda: "61"},
            r"compute capability 7\.5 or more, device 0 has 6\.1",
            id="GPU too old",
        ),
        pytest.param(
            {"nvrtc": fails("libnvrtc.so.13: cannot open shared object file")},
            r"NVRTC, which CuPy does not find: libnvrtc.* pip install",
            id="no NVRTC",
        ),
        pytest.param(
            {"archs": lambda: [80, 90], "capability": lambda: "75"},
            r"compiles for compute capability 8\.0 and later, device 0 has 7\.5",
            id="NVRTC too new",
        ),
        pytest.param(
            {"zeros": lambda *args: exhausted(100)},
            r"device 0 does not work: Out of memory",
            id="no memory",
        ),
    ],
)
def test_what_is_missing_is_named(
    install: Callable[..., FakeCupy], failures: dict[str, Any], message: str
) -> None:
    install(**failures)
    with pytest.raises(BackendUnavailableError, match=message) as caught:
        cupy_device.CupyDevice()
    assert str(caught.value).startswith("backend 'cupy'")


def test_a_missing_cupy_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailableError, match=r"needs CuPy: .*pip install 'fastrnn"):
        cupy_device.CupyDevice()


# --- How it submits ----------------------------------------------------------------------------

PLAIN = Kernel("common_test", "plain_kernel", 128)
WIDE = Kernel("common_test", "wide_kernel", 512, (("N", 3),), shared_bytes=200 * 1024)


@pytest.fixture
def fake(
    install: Callable[..., FakeCupy], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> FakeCupy:
    (tmp_path / "common_test.cu").write_text("// nothing\n")
    monkeypatch.setattr(cupy_device, "KERNELS", tmp_path)
    return install()


def test_modules_are_compiled_once_with_constants_and_a_digest_of_all_sources(
    fake: FakeCupy, tmp_path: Any
) -> None:
    device = cupy_device.CupyDevice()
    assert (device.arch.capability, device.arch.multiprocessors) == (90, 132)
    assert device.arch.name == "NVIDIA H100 80GB HBM3"
    for _ in range(2):
        device.launch(PLAIN, 3, [np.int32(1), None])
        device.launch(WIDE, (2, 5), [np.float32(1)])
    assert [m.code for m in fake.modules] == ["// nothing\n"] * 2
    options = fake.modules[1].options
    assert "-DN=3" in options
    assert f"-I{tmp_path}" in options
    digest = next(o for o in options if o.startswith("-DFASTRNN_SOURCES="))
    (tmp_path / "common.cuh").write_text("// a header")
    assert cupy_device.source_digest() not in digest, "an edited header must be a new cache key"
    assert (
        fake.log[1:]
        == [
            ("caller", "plain_kernel", (3,), (128,)),
            ("caller", "wide_kernel", (2, 5), (512,)),
        ]
        * 2
    )


def test_kernels_of_one_function_keep_the_largest_shared_memory(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    small = replace(WIDE, shared_bytes=60 * 1024)
    for kernel in (WIDE, small, WIDE):
        device.launch(kernel, 1, [])


def test_branches_start_after_what_was_submitted_and_are_joined(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    fake.log.clear()
    device.launch(PLAIN, 1, [])
    with device.branch("b"):
        device.launch(PLAIN, 2, [])
    device.launch(PLAIN, 3, [])
    with device.branch("b"):
        device.launch(PLAIN, 4, [])
    device.join("b")
    device.launch(PLAIN, 5, [])
    assert fake.log == [
        ("caller", "plain_kernel", (1,), (128,)),
        ("side 1", "after", "caller"),
        ("side 1", "plain_kernel", (2,), (128,)),
        ("caller", "plain_kernel", (3,), (128,)),
        ("side 1", "plain_kernel", (4,), (128,)),
        ("caller", "after", "side 1"),
        ("caller", "plain_kernel", (5,), (128,)),
    ]


def test_a_graph_is_recorded_on_a_stream_of_its_own_and_replayed_on_the_callers(
    fake: FakeCupy,
) -> None:
    device = cupy_device.CupyDevice()
    fake.log.clear()
    graph = device.capture(lambda: device.launch(PLAIN, 1, []))
    graph.launch()
    assert fake.log == [
        ("capture on", "side 1"),
        ("side 1", "plain_kernel", (1,), (128,)),
        ("captured", "side 1"),
        ("replay on", "caller"),
    ]


def test_a_failed_capture_is_ended_and_leaves_no_branch_open(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()

    def submit() -> None:
        with device.branch("b"):
            raise ValueError("in the middle")

    fake.log.clear()
    with pytest.raises(ValueError, match="in the middle"):
        device.capture(submit)
    assert fake.log[-1] == ("captured", "side 1")
    fake.log.clear()
    with device.branch("b"):
        pass
    assert fake.log == [("side 2", "after", "caller")]


def test_a_branch_left_open_by_a_failure_can_be_forgotten(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    with device.branch("b"):
        pass
    device.abandon()
    fake.log.clear()
    with device.branch("b"):
        pass
    assert fake.log == [("side 1", "after", "caller")]


def test_every_device_has_functions_and_limits_of_its_own(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    for number in (0, 1):
        fake.cuda.runtime.getDevice = lambda number=number: number
        for module in fake.modules:
            module.get_function(WIDE.name).max_dynamic_shared_size_bytes = 0
        device.launch(WIDE, 1, [])
        limit = fake.modules[0].get_function(WIDE.name).max_dynamic_shared_size_bytes
        assert limit == WIDE.shared_bytes


# --- Compiling ahead ---------------------------------------------------------------------------


def variant(number: int, name: str = "plain_kernel", **options: Any) -> Kernel:
    return Kernel("common_test", name, 128, (("N", number),), **options)


def test_modules_are_compiled_at_the_same_time(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    both = threading.Barrier(2, timeout=30)
    fake.compiling = lambda name: void(both.wait())
    rows = device.compile_ahead([variant(1), variant(1, "other_kernel"), variant(2)], threads=2)
    assert [(row.module, row.error) for row in rows] == [
        ("common_test.cu N=1", None),
        ("common_test.cu N=2", None),
    ]
    assert all(row.seconds >= 0 for row in rows)
    assert sorted(name for name, _ in fake.compiled) == ["-DN=1", "-DN=2"]
    fake.compiling = fails("compiled again")
    for kernel in (variant(1), variant(1, "other_kernel"), variant(2)):
        device.launch(kernel, 1, [])


def void(_: Any) -> None:
    """Nothing, of anything."""


def test_threads_that_launch_different_modules_do_not_wait_for_each_other(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    both = threading.Barrier(2, timeout=30)
    fake.compiling = lambda name: void(both.wait())
    failures: list[BaseException] = []

    def launch(number: int) -> None:
        try:
            device.launch(variant(number), 1, [])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=launch, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_module_is_compiled_once_however_many_threads_ask(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()
    begun, go_on = threading.Event(), threading.Event()

    def slow(name: str) -> None:
        begun.set()
        assert go_on.wait(30)

    fake.compiling = slow
    threads = [
        threading.Thread(target=device.launch, args=(variant(1, shared_bytes=size), 1, []))
        for size in (0, 1024, 2048, 4096)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join()
    assert fake.compiled == [("-DN=1", 0)]
    assert len(fake.log) == 1 + len(threads)


def test_a_module_that_fails_is_named_and_does_not_stop_the_others(fake: FakeCupy) -> None:
    device = cupy_device.CupyDevice()

    def one_is_wrong(name: str) -> None:
        if name == "-DN=2":
            raise RuntimeError("common_test.cu(3): error: expected a ';'")

    fake.compiling = one_is_wrong
    rows = device.compile_ahead(map(variant, (1, 2, 3)), threads=1)
    assert [row.module for row in rows if row.error is None] == [
        "common_test.cu N=1",
        "common_test.cu N=3",
    ]
    wrong = rows[1]
    assert wrong.module == "common_test.cu N=2"
    assert wrong.error == "RuntimeError: common_test.cu(3): error: expected a ';'"


def test_threads_compile_for_the_device_of_the_caller_and_only_what_runs_there(
    fake: FakeCupy,
) -> None:
    device = cupy_device.CupyDevice()
    with fake.cuda.Device(3):
        rows = device.compile_ahead([variant(1), variant(2, min_capability=100)])
    assert [row.module for row in rows] == ["common_test.cu N=1"]
    assert fake.compiled == [("-DN=1", 3)]


def test_what_can_be_launched_is_listed_by_capability() -> None:
    everything = launchable()
    assert len(everything) == len(set(everything))
    hopper, turing = launchable(90), launchable(75)
    assert {k for k in everything if k.runs_on(90)} == set(hopper)
    assert all(k.cluster == 1 for k in turing)
    assert any(k.cluster > 1 for k in hopper)
    files = {k.file for k in everything}
    assert {"recurrence", "gemm", "generate", "cross_entropy", "gather", "clip_sgd"} <= files


# --- Memory ------------------------------------------------------------------------------------


def test_memory_that_runs_out_says_how_much_was_wanted_and_is_free(
    install: Callable[..., FakeCupy],
) -> None:
    install(empty=lambda *args: exhausted(3 << 30))
    device = cupy_device.CupyDevice()
    for allocate, arguments in ((device.empty, ((3,), np.float32)), (device.put, (np.zeros(3),))):
        with pytest.raises(DeviceMemoryError) as caught:
            allocate(*arguments)
        assert caught.value.wanted == 3 << 30
        assert str(caught.value) == (
            "out of memory on the device: 3.0 GiB more is needed, 3.0 MiB of 80.0 GiB are free"
        )
        assert isinstance(caught.value.__cause__, FakeOutOfMemoryError)


def test_memory_that_runs_out_without_a_pool_says_so_too(install: Callable[..., FakeCupy]) -> None:
    def malloc(*args: Any) -> Any:
        raise FakeError("cudaErrorMemoryAllocation: out of memory", status=2)

    install(empty=malloc)
    device = cupy_device.CupyDevice()
    with pytest.raises(DeviceMemoryError, match=r"12\.0 KiB more is needed") as caught:
        device.empty((3, 1024), np.float32)
    assert caught.value.wanted == 12 << 10
    assert isinstance(caught.value.__cause__, FakeError)


def test_memory_of_the_host_is_another_matter(install: Callable[..., FakeCupy]) -> None:
    def no_host_memory(*args: Any) -> Any:
        raise MemoryError("Unable to allocate 3 TiB for an array")

    install(empty=no_host_memory)
    with pytest.raises(MemoryError, match="3 TiB") as caught:
        cupy_device.CupyDevice().put(np.zeros(3))
    assert not isinstance(caught.value, DeviceMemoryError)


def test_memory_of_a_module_or_a_graph_can_run_out_too(fake: FakeCupy) -> None:
    def full(name: str) -> None:
        raise FakeError("cudaErrorMemoryAllocation: out of memory", status=2)

    device = cupy_device.CupyDevice()
    fake.compiling = full
    fake.cuda.runtime.memGetInfo = fails("the device does not answer")
    with pytest.raises(DeviceMemoryError, match=r"^out of memory on the device: more is needed$"):
        device.launch(variant(1), 1, [])

    class NVRTCError(RuntimeError):
        status = 2  # NVRTC_ERROR_PROGRAM_CREATION_FAILURE

    def not_created(name: str) -> None:
        raise NVRTCError

    fake.compiling = not_created
    with pytest.raises(NVRTCError):
        device.launch(variant(2), 1, [])
    fake.compiling = fails("cudaErrorInvalidValue: another error")
    with pytest.raises(FakeError, match="another error"):
        device.launch(variant(2), 1, [])


def test_the_sources_are_found() -> None:
    assert (KERNELS / "common.cuh").exists()
    assert len(cupy_device.source_digest()) == 16
