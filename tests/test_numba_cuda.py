"""The ``numba-cuda`` backend without a GPU: simulated, compiled for every architecture, refused.

With a GPU, the tests of ops and steps run on the device like those of every other backend.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import site
import subprocess
import sys
import venv
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fastrnn.backend import BackendUnavailableError
from fastrnn.backends.numba_cuda import Graph, NumbaCudaBackend, load_cuda, nvcc_toolkit
from tests import stub_driver
from tests.numba_cuda_gate import Compiled, compile_kernel

ROOT = Path(__file__).parent.parent
# Where the gate is required, a missing package fails the tests that need it.
INSTALLED = importlib.util.find_spec("numba_cuda") is not None or bool(
    os.environ.get("FASTRNN_REQUIRE_GATE")
)
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

needs_package = pytest.mark.skipif(
    not INSTALLED, reason="needs numba-cuda: pip install 'numba-cuda[cu13]'"
)
needs_compiler = pytest.mark.skipif(
    not INSTALLED or SIMULATED,
    reason="needs numba-cuda with its compiler and linker: pip install 'numba-cuda[cu13]'",
)

needs_stub_driver = pytest.mark.skipif(
    not os.environ.get("FASTRNN_REQUIRE_GATE")
    and (not INSTALLED or SIMULATED or stub_driver.unavailable() is not None),
    reason="needs numba-cuda with its compiler and linker, and gcc: pip install 'numba-cuda[cu13]'",
)

ARCHITECTURES = [
    pytest.param(arch, dtype, id=f"sm_{arch}-{dtype}")
    for arch, dtype in [
        (80, "float32"),
        (90, "float32"),
        (100, "float32"),
        (120, "float32"),
        (90, "float64"),
    ]
]


def kernels() -> Any:
    return importlib.import_module("fastrnn.backends.numba_cuda_kernels")


# --- in the simulator ------------------------------------------------------------------------


OPTIONS = ("-q", "-rA", "--tb=short", "-p", "no:cacheprovider")


@needs_package
def test_ops_steps_and_generation_in_the_simulator() -> None:
    """``tests/numba_cuda_simulated.py``, in a process where the simulator is numba's CUDA."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "tests/numba_cuda_simulated.py", *OPTIONS],
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    tail = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, tail
    for expected in (
        "test_three_steps_follow_the_oracle",
        "test_generates_the_tokens_of_the_numpy_backend",
        "test_wrong_twins_are_rejected",
    ):
        assert f"::{expected}" in done.stdout, f"{expected} did not run: {tail}"
    assert "skipped" not in done.stdout.splitlines()[-1]


# --- compiled for devices --------------------------------------------------------------------

# Where a kernel may touch double precision at float32: sums, totals, rates, probabilities.
MAY_USE_DOUBLES = {
    "mean", "sum_squares", "norm", "set_rates", "sgd", "record", "update", "generate",
}  # fmt: skip

# Bytes of shared memory that a kernel may have without asking; numba cannot ask for more.
STATIC_SHARED = 48 * 1024
REGISTERS = 64 * 1024


def check(compiled: Compiled, threads: int, dtype: str) -> None:
    """What every kernel must keep to, whatever it computes."""
    name, ptx = compiled.name, compiled.ptx
    assert compiled.spills == 0, f"{name} spills {compiled.spills} bytes"
    assert compiled.stack == 0, f"{name} has a stack of {compiled.stack} bytes"
    assert compiled.registers * threads <= REGISTERS, f"{name}: {compiled.registers} registers"
    assert compiled.shared <= STATIC_SHARED, f"{name}: {compiled.shared} bytes of shared memory"
    atomics = re.search(r"\b(atom|red)\.(global|shared)", ptx)
    assert not atomics, f"{name} uses atomics: not the same bits every time"
    if dtype == "float32" and name not in MAY_USE_DOUBLES:
        doubles = re.search(r"\.f64", ptx)
        assert not doubles, f"{name} computes in double precision"


def vector_loads(ptx: str) -> int:
    """Loads of sixteen bytes of shared memory."""
    return len(re.findall(r"ld\.shared\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx))


def fmas(ptx: str) -> int:
    """Multiply-adds in float32; from sm_100 on some come in pairs."""
    pairs = len(re.findall(r"fma\.rn(?:\.ftz)?\.f32x2", ptx))
    return pairs + len(re.findall(r"fma\.rn(?:\.ftz)?\.f32", ptx))


@needs_compiler
@pytest.mark.parametrize(("arch", "dtype"), ARCHITECTURES)
def test_every_kernel_compiles_and_links_without_spills(arch: int, dtype: str) -> None:
    module = kernels()
    table = {}
    for kernel in module.all_kernels(np.dtype(dtype), module.Geometry()):
        compiled = compile_kernel(kernel, arch)
        check(compiled, kernel.threads * kernel.blocks, dtype)
        table[kernel.name] = compiled
    if dtype == "float32":
        # From sm_100 on it is the assembler that puts the last loads together, after the PTX.
        together = arch < 100
        for name in ("recurrence_256", "gather_recurrence_256", "recurrence_backward_256"):
            # Of the 64 rows of a slice 54 are in registers and 10 in shared memory; the state, 64
            # words a thread, is read four at a time, and so are the shared rows, four words each.
            assert 4 * 54 < table[name].registers <= 255
            assert not together or vector_loads(table[name].ptx) == 64 // 4 + 10
            assert fmas(table[name].ptx) >= 256
        # What an addition lost is not optimised away.
        for name in ("column_sum", "gather_backward"):
            assert len(re.findall(r"sub\S*\.f32", table[name].ptx)) >= 3
        # Its loop compares 32-bit integers; what is left concerns loop bounds.
        assert len(re.findall(r"setp\.\w+\.[su]64", table["rank"].ptx)) < 10
        for name in ("gemm_nn", "gemm_nt", "gemm_tn"):
            # A tile of 16 places of K unrolled: 32 products and three loads of four words a place.
            assert table[name].registers <= 128  # room for four blocks
            assert not together or vector_loads(table[name].ptx) == 3 * 16
            assert fmas(table[name].ptx) == 32 * 16


@needs_compiler
def test_kernels_compile_where_numpy_has_no_row_stack() -> None:
    """NumPy 2.5 removed what numba-cuda 0.30 names; the name is lent, not given."""
    code = """
import numba.np.arrayobj  # it asks for NumPy's version, not for the name
import numpy as np
if vars(np).pop("row_stack", None):
    np.__all__.remove("row_stack")
from fastrnn.backends import numba_cuda_kernels as kernels
from tests.numba_cuda_gate import compile_kernel
kernel = kernels.copy_kernel(np.dtype("float32"), kernels.Geometry())
assert compile_kernel(kernel, 90).registers > 0
assert not hasattr(np, "row_stack")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def wrong(name: str) -> Any:
    """A kernel that the gate must reject."""
    module, cuda = kernels(), importlib.import_module("numba").cuda
    types, thread = cuda.types, np.uint32
    if name == "local memory":

        def kernel(x: Any, n: Any) -> None:
            w = cuda.local.array(64, dtype=types.float32)
            for i in range(n):
                w[i % 64] = x[i]
            x[0] = w[n % 64]

    elif name == "double precision":

        def kernel(x: Any, n: Any) -> None:
            x[thread(cuda.threadIdx.x)] *= 0.1

    elif name == "atomics":

        def kernel(x: Any, n: Any) -> None:
            cuda.atomic.add(x, 0, x[thread(cuda.threadIdx.x)])

    else:

        def kernel(x: Any, n: Any) -> None:
            tile = cuda.shared.array(20_000, dtype=types.float32)
            tile[thread(cuda.threadIdx.x)] = x[n]
            cuda.syncthreads()
            x[0] = tile[n]

    return module.Kernel(name, kernel, (types.Array(types.float32, 1, "C"), types.int32), 256)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("local memory", "stack"),
        ("double precision", "double precision"),
        ("atomics", "atomics"),
    ],
)
def test_the_gate_rejects(name: str, complaint: str) -> None:
    kernel = wrong(name)
    with pytest.raises(AssertionError, match=complaint):
        check(compile_kernel(kernel, 90), kernel.threads, "float32")


@needs_compiler
def test_the_gate_rejects_too_much_shared_memory() -> None:
    kernel = wrong("shared memory")
    linker = importlib.import_module("cuda.bindings.nvjitlink")
    # Some linkers refuse it, others leave it to the launch.
    with pytest.raises((linker.nvJitLinkError, AssertionError), match=r"ERROR|shared memory"):
        check(compile_kernel(kernel, 90), kernel.threads, "float32")


@needs_compiler
def test_more_of_W_in_registers_would_spill() -> None:
    """The share of W_hh that stays in registers is close to the largest that fits."""
    module = kernels()
    greedy = replace(module.Geometry(), resident_bytes=module.Geometry().resident_bytes + 128)
    kernel = module.recurrence_kernel(np.dtype(np.float32), greedy, 4, False)
    with pytest.raises(AssertionError, match="recurrence_256 spills"):
        check(compile_kernel(kernel, 90), kernel.threads, "float32")


# --- refused, with a reason ------------------------------------------------------------------


def pretended_cuda(file: str | None, available: bool, reason: str = "") -> ModuleType:
    module = ModuleType("numba.cuda")
    module.__file__ = file
    paths = {"libdevice": SimpleNamespace(info="/libdevice.10.bc")}
    module.__dict__.update(
        is_available=lambda: available,
        cuda_error=lambda: reason,
        config=SimpleNamespace(ENABLE_CUDASIM=0),
        cuda_paths=SimpleNamespace(get_cuda_paths=lambda: paths),
    )
    return module


def test_the_old_built_in_module_is_refused() -> None:
    cuda = pretended_cuda("/site-packages/numba/cuda/__init__.py", True)
    with (
        mock.patch.dict(sys.modules, {"numba.cuda": cuda}),
        pytest.raises(BackendUnavailableError, match=r"built-in module answers.*pip install"),
    ):
        load_cuda()
    with mock.patch.dict(sys.modules, {"numba.cuda": cuda}):
        for name in [n for n in sys.modules if n.startswith("fastrnn.backends.numba_cuda_kernels")]:
            del sys.modules[name]
        with pytest.raises(BackendUnavailableError, match="built-in module answers"):
            kernels()


def test_a_missing_driver_is_named() -> None:
    cuda = pretended_cuda(
        "/site-packages/numba_cuda/numba/cuda/__init__.py", False, "libcuda.so:\ncannot open"
    )
    with (
        mock.patch.dict(sys.modules, {"numba.cuda": cuda}),
        pytest.raises(BackendUnavailableError, match=r"driver: libcuda.so: cannot open"),
    ):
        NumbaCudaBackend()


class LibraryNotFoundError(RuntimeError):
    """In place of what the loader of cuda.bindings raises."""


def test_a_missing_libnvvm_is_named() -> None:
    """Numba raises or says no, by its version, and finds nothing wrong with the driver."""
    path = "/site-packages/numba_cuda/numba/cuda/__init__.py"
    silent, loud = pretended_cuda(path, False), pretended_cuda(path, False)

    def is_available() -> bool:
        raise LibraryNotFoundError("Failure finding\n'libnvvm.so'")

    loud.__dict__["is_available"] = is_available
    for cuda, what in (
        (silent, "does not find libNVVM"),
        (loud, "LibraryNotFoundError: Failure finding 'libnvvm.so'"),
    ):
        with (
            mock.patch.dict(sys.modules, {"numba.cuda": cuda}),
            pytest.raises(BackendUnavailableError, match=rf"{what}.*pip install.*CUDA_HOME"),
        ):
            NumbaCudaBackend()


def test_a_device_that_does_not_open_is_unavailable() -> None:
    def stream() -> Any:
        raise LibraryNotFoundError("[46] the device is busy")

    cuda = pretended_cuda("/site-packages/numba_cuda/numba/cuda/__init__.py", True)
    cuda.__dict__["stream"] = stream
    with (
        mock.patch.dict(sys.modules, {"numba.cuda": cuda}),
        pytest.raises(
            BackendUnavailableError, match=r"no device opens: .*\[46\] the device is busy"
        ),
    ):
        NumbaCudaBackend(geometry="any", kernels=SimpleNamespace(SIMULATED=False))


@needs_package
def test_the_package_is_found_where_no_pth_file_is_read() -> None:
    """As on ``PYTHONPATH`` after ``pip install --target``."""
    packages = {
        str(Path(spec.origin).parent.parent)
        for spec in map(
            importlib.util.find_spec, ("numba", "numba_cuda", "numpy", "cuda.pathfinder")
        )
        if spec and spec.origin
    }
    code = "from fastrnn.backends.numba_cuda import maintained_cuda as m; print(m().__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *packages])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "numba_cuda" in done.stdout, done.stdout + done.stderr


def test_a_missing_package_is_named() -> None:
    with (
        mock.patch.dict(sys.modules, {"numba.cuda": None}),
        pytest.raises(BackendUnavailableError, match=r"needs the numba-cuda package.*pip install"),
    ):
        load_cuda()


# --- arrays and streams of others ------------------------------------------------------------


def unopened() -> NumbaCudaBackend:
    """A backend without a device, for what does not launch."""
    backend = NumbaCudaBackend.__new__(NumbaCudaBackend)
    backend.stream = SimpleNamespace(name="own")
    return backend


class Wrapped(SimpleNamespace):
    strides = ()

    def is_c_contiguous(self) -> bool:
        return not self.strides

    def bind(self, stream: Any) -> Wrapped:
        return Wrapped(**{**vars(self), "stream": stream})


def test_a_foreign_array_is_wrapped_without_waiting_and_brings_its_stream() -> None:
    backend, calls = unopened(), []

    def as_cuda_array(array: Any, sync: bool) -> Any:
        calls.append((array, sync))
        return Wrapped(stream="the exporter's")

    backend._cuda = SimpleNamespace(as_cuda_array=as_cuda_array)
    array = SimpleNamespace(__cuda_array_interface__={"version": 3})
    wrapped = backend.wrap(array)
    assert calls == [(array, False)]
    assert backend._stream(wrapped) == "the exporter's"


def test_a_torch_tensor_brings_torchs_current_stream() -> None:
    class Tensor:
        __module__ = "torch"
        __cuda_array_interface__: dict[str, Any] = {"version": 2}  # noqa: RUF012
        device = "cuda:0"

    def current_stream(device: str) -> Any:
        assert device == "cuda:0"
        return SimpleNamespace(cuda_stream=1234)

    backend = unopened()
    backend._cuda = SimpleNamespace(
        as_cuda_array=lambda array, sync: Wrapped(stream=0),
        external_stream=lambda handle: f"stream {handle}",
    )
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=current_stream))
    with mock.patch.dict(sys.modules, {"torch": torch}):
        assert backend._stream(backend.wrap(Tensor())) == "stream 1234"


def test_an_array_made_here_is_not_wrapped_again() -> None:
    backend = unopened()
    own = Wrapped(__cuda_ndarray__=True, stream=0)
    assert backend.wrap(own) is own
    assert backend._stream(own) is backend.stream


@pytest.mark.parametrize("kind", [{"__cuda_ndarray__": True}, {"__cuda_array_interface__": {}}])
def test_an_array_in_another_order_is_refused(kind: dict[str, Any]) -> None:
    backend = unopened()
    backend._cuda = SimpleNamespace(as_cuda_array=lambda array, sync: array)
    with pytest.raises(ValueError, match=r"expected an array in C order, got strides \(4, 12\)"):
        backend.wrap(Wrapped(strides=(4, 12), **kind))


# --- launches --------------------------------------------------------------------------------


def test_a_launch_is_configured_once_for_a_stream_and_a_grid() -> None:
    class Dispatcher:
        configured: list[Any] = []  # noqa: RUF012

        def __getitem__(self, configuration: Any) -> Any:
            warnings.warn("Grid size 2 will likely result in under-utilization", stacklevel=1)
            self.configured.append(configuration)
            return list

    backend = unopened()
    backend.simulated, backend._launchers = False, {}
    kernel = SimpleNamespace(dispatcher=Dispatcher(), threads=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stream in (7, 7, 8):
            for grid in (2, (2, 3)):
                backend._launch(stream, kernel, grid)
    assert Dispatcher.configured == [(2, 64, 7), ((2, 3), 64, 7), (2, 64, 8), ((2, 3), 64, 8)]


def test_products_are_split_into_even_shares() -> None:
    """Tiles of K that the busiest of the multiprocessors has, at the headline size."""
    backend = unopened()
    backend.geometry = SimpleNamespace(tile_m=64, tile_n=64, tile_k=16)
    backend._multiprocessors = 132

    def busiest(multiprocessors: int, M: int, N: int, K: int) -> int:
        splits, part = backend._splits(M, N, K)
        blocks = -(-M // 64) * -(-N // 64) * splits
        return -(-blocks // multiprocessors) * part // 16

    assert busiest(132, 1120, 256, 1027) == 39  # dh
    assert busiest(100, 256, 1027, 1120) == 56  # dW_hq, beside the 32 blocks of BPTT


# --- the captured step -----------------------------------------------------------------------


class PretendedDriver:
    """Records calls; fails the one named."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")
    RESULTS = {"cuStreamEndCapture": ("graph",), "cuGraphInstantiate": ("executable",)}  # noqa: RUF012

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            return (700 if name == self.fails else 0, *self.RESULTS.get(name, ()))

        return call


def test_a_step_is_captured_once_and_launched_often() -> None:
    driver = PretendedDriver()
    graph = Graph(9, driver)
    with graph.capture():
        driver.calls.append(("kernels",))
    graph.launch()
    graph.launch()
    graph.close()
    graph.close()
    assert driver.calls == [
        ("cuStreamBeginCapture", 9, "thread local"),
        ("kernels",),
        ("cuStreamEndCapture", 9),
        ("cuGraphInstantiate", "graph", 0),
        ("cuGraphDestroy", "graph"),
        ("cuGraphLaunch", "executable", 9),
        ("cuGraphLaunch", "executable", 9),
        ("cuGraphExecDestroy", "executable"),
    ]


def test_a_failed_call_of_the_driver_is_an_error() -> None:
    driver = PretendedDriver(fails="cuGraphInstantiate")
    with (
        pytest.raises(RuntimeError, match="cuGraphInstantiate failed: 700"),
        Graph(9, driver).capture(),
    ):
        pass


def test_a_graph_that_is_dropped_raises_nothing() -> None:
    """Neither without the driver's bindings nor after an error that every later call reports."""
    with mock.patch.dict(sys.modules, {"cuda.bindings.driver": None}):
        half = Graph.__new__(Graph)
        with pytest.raises(ImportError):
            half.__init__(9)  # type: ignore[misc]
    half.__del__()
    driver = PretendedDriver(fails="cuGraphExecDestroy")
    graph = Graph(9, driver)
    with graph.capture():
        pass
    graph.__del__()
    assert driver.calls[-1] == ("cuGraphExecDestroy", "executable")


def test_an_error_while_capturing_leaves_the_stream_usable() -> None:
    driver = PretendedDriver()
    with pytest.raises(ZeroDivisionError), Graph(9, driver).capture():
        raise ZeroDivisionError
    assert driver.calls[-1] == ("cuStreamEndCapture", 9)


@needs_compiler
def test_the_driver_takes_every_call_of_a_graph() -> None:
    """Arguments of the right types get as far as the driver library, or its complaint."""
    driver = importlib.import_module("cuda.bindings.driver")
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    calls: list[tuple[Any, ...]] = [
        (driver.cuStreamBeginCapture, 0, mode),
        (driver.cuStreamEndCapture, 0),
        (driver.cuGraphInstantiate, driver.CUgraph(0), 0),
        (driver.cuGraphLaunch, driver.CUgraphExec(0), 0),
        (driver.cuGraphDestroy, driver.CUgraph(0)),
        (driver.cuGraphExecDestroy, driver.CUgraphExec(0)),
    ]
    for function, *args in calls:
        try:
            status, *_ = function(*args)
        except RuntimeError:
            continue  # no driver library on this machine
        assert int(status) != 0, f"{function.__name__} took a handle that is none"


# --- libNVVM in a toolkit --------------------------------------------------------------------


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(path: Path) -> Path:
    """A folder as a CUDA toolkit's, with an ``nvcc`` that does nothing."""
    executable(path / "bin" / "nvcc")
    (path / "nvvm" / "libdevice").mkdir(parents=True)
    (path / "nvvm" / "lib64").mkdir()
    return path


def test_a_toolkit_is_found_around_its_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly, through a link, through a script that calls it, and not at all."""
    home = toolkit(tmp_path / "cuda-99.1")
    folders = {name: tmp_path / name for name in ("link", "script", "other", "empty")}
    for folder in folders.values():
        folder.mkdir()
    (folders["link"] / "nvcc").symlink_to(home / "bin" / "nvcc")
    say = f"#!/bin/sh\necho '#$ _HERE_=/x' >&2\necho '#$ TOP={home}/bin/..' >&2\n"
    executable(folders["script"] / "nvcc", say)
    executable(folders["other"] / "nvcc", "#!/bin/sh\necho no such option >&2; exit 1\n")
    for path, expected in (
        (home / "bin", home),
        (folders["link"], home),
        (folders["script"], home),
        (folders["other"], None),
        (folders["empty"], None),
    ):
        monkeypatch.setenv("PATH", str(path))
        assert nvcc_toolkit() == expected, path


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment as this one, in which no package holds libNVVM."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    inside = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = folder / "lib" / inside / "site-packages"
    for packages in map(Path, site.getsitepackages()):
        mirror(packages, target)
    return folder / "bin" / "python"


def mirror(source: Path, target: Path) -> None:
    """Links to all that is in ``source``, but for libNVVM, libdevice and their package's record."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        if re.match(r"libnvvm|nvvm$|nvidia_nvvm-|nvidia_cuda_nvcc", entry.name):
            continue
        if entry.name in ("nvidia", "cu13", "lib", "cuda_nvcc") and entry.is_dir():
            mirror(entry, target / entry.name)
        elif not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


OPEN_AND_COMPILE = """
import os
from fastrnn.backend import open_backend
import numpy as np
backend = open_backend("numba-cuda")
ones = backend.put(np.ones(3, np.float32))
backend.put(ones, out=backend.empty((3,), np.float32))
from cuda import pathfinder
print(pathfinder.load_nvidia_dynamic_lib("nvvm").abs_path, os.environ.get("CUDA_HOME"))
"""


def open_on_stub(
    python: Path, path: Path, hidden: Path, code: str = OPEN_AND_COMPILE, **variables: str
) -> Any:
    """Run ``code`` on the stub driver, with ``path`` as PATH.

    A libNVVM or runtime of the system is not seen: the loader comes to a file in ``hidden`` first,
    which is no library.
    """
    for name in ("libnvvm.so.4", "libnvvm.so", "libcudart.so.13", "libcudart.so.12"):
        (hidden / name).write_text("no library")
    env = stub_driver.environment()
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PYTHONPATH"):
        env.pop(name, None)
    env["LD_LIBRARY_PATH"] += os.pathsep + str(hidden)
    env |= {"PATH": str(path), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [str(python), "-c", code], env=env, capture_output=True, text=True, check=False
    )


def packaged_libnvvm() -> Path:
    """The libNVVM that this environment has in a package."""
    (found,) = (
        path
        for packages in map(Path, site.getsitepackages())
        for path in (packages / "nvidia").rglob("libnvvm.so.4")
    )
    return found


def packaged_libdevice() -> Path:
    (found,) = (
        path
        for packages in map(Path, site.getsitepackages())
        for path in (packages / "nvidia").rglob("libdevice.10.bc")
    )
    return found


@needs_stub_driver
def test_libnvvm_of_the_toolkit_on_path_is_used(bare_python: Path, tmp_path: Path) -> None:
    home, hidden = toolkit(tmp_path / "cuda"), tmp_path / "hidden"
    hidden.mkdir()
    (home / "nvvm" / "lib64" / "libnvvm.so.4").symlink_to(packaged_libnvvm())
    (home / "nvvm" / "libdevice" / "libdevice.10.bc").symlink_to(packaged_libdevice())
    done = open_on_stub(bare_python, home / "bin", hidden)
    assert done.returncode == 0, done.stderr[-2000:]
    # The environment is left as it was.
    assert done.stdout.split() == [str(home / "nvvm" / "lib64" / "libnvvm.so.4"), "None"]


@needs_stub_driver
def test_a_toolkit_that_is_named_is_not_replaced(bare_python: Path, tmp_path: Path) -> None:
    home, hidden = toolkit(tmp_path / "cuda"), tmp_path / "hidden"
    hidden.mkdir()
    (home / "nvvm" / "lib64" / "libnvvm.so.4").symlink_to(packaged_libnvvm())
    done = open_on_stub(bare_python, home / "bin", hidden, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert re.search(r"BackendUnavailableError: .*libnvvm.*or set CUDA_HOME", done.stderr)


@needs_stub_driver
def test_a_missing_libdevice_is_named(bare_python: Path, tmp_path: Path) -> None:
    home, hidden = toolkit(tmp_path / "cuda"), tmp_path / "hidden"
    hidden.mkdir()
    (home / "nvvm" / "lib64" / "libnvvm.so.4").symlink_to(packaged_libnvvm())
    code = """
from pathlib import Path
import numba.cuda.cuda_paths
numba.cuda.cuda_paths.get_system_ctk = lambda *names: None  # of this machine, if there is one
numba.cuda.cuda_paths.get_cuda_home = lambda *names: None  # one whose file is not there
from fastrnn.backend import open_backend
open_backend("numba-cuda")
"""
    done = open_on_stub(bare_python, home / "bin", hidden, code)
    assert done.returncode != 0
    assert re.search(r"BackendUnavailableError: .*does not find libdevice.10.bc", done.stderr)


@needs_stub_driver
def test_no_libnvvm_anywhere_is_named(bare_python: Path, tmp_path: Path) -> None:
    done = open_on_stub(bare_python, tmp_path / "nothing", tmp_path)
    assert done.returncode != 0
    assert re.search(r"BackendUnavailableError: .*libnvvm.*or set CUDA_HOME", done.stderr)


LIBNVVM_TO_COME = """
#include <stddef.h>
#include <string.h>
static const char ptx[] = "// release 99.8, V99.8.1\\n.version 99.9\\n.target sm_80\\n"
    ".address_size 64\\n.visible .entry empty() { ret; }\\n";
int nvvmVersion(int *a, int *b) { *a = 2; *b = 0; return 0; }
int nvvmIRVersion(int *a, int *b, int *c, int *d) { *a = 2; *b = 0; *c = 3; *d = 2; return 0; }
int nvvmCreateProgram(void **program) { *program = (void *)ptx; return 0; }
int nvvmDestroyProgram(void **program) { *program = NULL; return 0; }
int nvvmAddModuleToProgram(void *p, const char *b, size_t n, const char *s) { return 0; }
int nvvmLazyAddModuleToProgram(void *p, const char *b, size_t n, const char *s) { return 0; }
int nvvmVerifyProgram(void *p, int n, const char **options) { return 0; }
int nvvmCompileProgram(void *p, int n, const char **options) { return 0; }
int nvvmGetCompiledResultSize(void *p, size_t *size) { *size = sizeof ptx; return 0; }
int nvvmGetCompiledResult(void *p, char *out) { memcpy(out, ptx, sizeof ptx); return 0; }
int nvvmGetProgramLogSize(void *p, size_t *size) { *size = 1; return 0; }
int nvvmGetProgramLog(void *p, char *out) { *out = 0; return 0; }
const char *nvvmGetErrorString(int status) { return "none"; }
"""


@needs_stub_driver
def test_a_libnvvm_too_new_for_nvjitlink_is_named(bare_python: Path, tmp_path: Path) -> None:
    """With both releases and where they are from: PTX 99.9 stands for one to come."""
    home, hidden = toolkit(tmp_path / "cuda"), tmp_path / "hidden"
    hidden.mkdir()
    source, library = tmp_path / "nvvm.c", home / "nvvm" / "lib64" / "libnvvm.so.4"
    source.write_text(LIBNVVM_TO_COME)
    build = [stub_driver.compiler(), "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(build, check=True)
    (home / "nvvm" / "libdevice" / "libdevice.10.bc").symlink_to(packaged_libdevice())
    done = open_on_stub(bare_python, home / "bin", hidden)
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert re.search(
        rf"BackendUnavailableError: .*libNVVM 99\.8 \({library}\) writes PTX 99\.9, which "
        r"nvJitLink \d+\.\d+ \(/.*libnvJitLink.so.*\) does not link: .*pip install",
        message,
    ), message
