"""Tests for ``python -m tests.stub_cuda``: the ``cupy`` backend on real CuPy and a stub of CUDA.

:mod:`tests.test_cupy_stub` runs them, with those of the ops and steps.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn import ops
from fastrnn.backend import DeviceMemoryError, open_backend
from fastrnn.backends.cupy_cuda import GRAPH_STEPS, CupyBackend
from fastrnn.cuda import cupy_device, gather, launchable
from fastrnn.cuda.device import Kernel
from fastrnn.decoding import Decoding
from tests.conftest import Inputs
from tests.stub_cuda import MULTIPROCESSORS, StubCuda
from tests.test_cupy_backend import workspace
from tests.test_step import check_steps
from tests.tolerances import assert_close

cupy = pytest.importorskip("cupy", reason="needs CuPy")


def device_of(backend: CupyBackend) -> cupy_device.CupyDevice:
    assert isinstance(backend.device, cupy_device.CupyDevice)
    return backend.device


@pytest.fixture
def backend() -> CupyBackend:
    """A backend on a device of its own; that of ``open_backend`` lives as long as the process."""
    return CupyBackend(cupy_device.CupyDevice())


# --- What the stub refuses ---------------------------------------------------------------------


def filled(backend: CupyBackend) -> Any:
    """Launches a kernel, so that its module is loaded; returns its arguments."""
    tokens, starts = backend.put(np.arange(9, dtype=np.int32)), backend.put(np.zeros(2, np.int32))
    out = backend.empty((3, 2), np.int32), backend.empty((3, 2), np.int32)
    backend.window(tokens, starts, out)
    return tokens, starts, out


def branched(backend: CupyBackend) -> None:
    arguments = filled(backend)

    def submit() -> None:
        with backend.device.branch("open"):
            backend.window(*arguments)

    backend.device.capture(submit)


def replayed_too_late(backend: CupyBackend) -> None:
    arrays = [backend.empty((1 << 20,), np.float32)]
    graph = backend.device.capture(lambda: backend.device.fill_zero(arrays[0]))
    arrays.clear()
    cupy.get_default_memory_pool().free_all_blocks()
    graph.launch()


WRONG: dict[str, tuple[str, Callable[[CupyBackend], Any]]] = {
    "allocation": (
        "(3,) float32 allocated during a capture",
        lambda b: b.device.capture(lambda: void(b.empty((3,), np.float32))),
    ),
    "synchronisation": (
        "streamSynchronize during a capture",
        lambda b: b.device.capture(b.sync),
    ),
    "freeing": (
        "free during a capture",
        lambda b: b.device.capture(lambda: cupy.cuda.runtime.free(cupy.cuda.runtime.malloc(8))),
    ),
    "replay after a free": ("4194304 bytes at", replayed_too_late),
    "open branch": ("a stream that was not joined", branched),
    "wrong sizes": (
        "window_kernel takes [8, 8, 8, 8, 4, 4, 4] bytes, not [8, 8, 8, 8, 8]",
        lambda b: b.device.launch(gather._window_kernel(), 1, [None, None, None, None, None]),
    ),
    "too much shared memory": (
        "window_kernel: 65536 bytes of shared memory were not allowed",
        lambda b: (
            device_of(b)
            ._function(gather._window_kernel())
            .kernel((1,), (128,), (), shared_mem=65536)
        ),
    ),
}


def void(_: Any) -> None:
    """Nothing, of anything."""


@pytest.mark.parametrize("what", WRONG)
def test_what_a_device_would_refuse_is_found(
    backend: CupyBackend, stub: StubCuda, what: str
) -> None:
    message, do = WRONG[what]
    do(backend)
    found, stub.faults[:] = list(stub.faults), []
    assert any(message in fault for fault in found), found


def test_a_capture_that_reads_is_refused_by_cupy_and_leaves_the_device_usable(
    backend: CupyBackend, stub: StubCuda
) -> None:
    array = backend.put(np.zeros(3, np.float32))
    with pytest.raises(RuntimeError, match="stream is capturing"):
        backend.device.capture(lambda: void(backend.get(array)))
    assert not stub.capturing()
    backend.device.capture(lambda: backend.device.fill_zero(array)).launch()
    assert not backend.get(array).any()


def test_a_module_that_is_loaded_during_a_capture_is_found(
    backend: CupyBackend, stub: StubCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = own_kernel(tmp_path, monkeypatch)
    backend.device.capture(lambda: device_of(backend)._function(kernel))
    found, stub.faults[:] = list(stub.faults), []
    assert "moduleLoadData during a capture" in found


NOTHING = 'extern "C" __global__ void nothing_kernel(int n) {}\n'


def own_kernel(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str = "nothing", code: str = NOTHING
) -> Kernel:
    """A kernel that no other test compiles."""
    monkeypatch.setattr(cupy_device, "KERNELS", folder)
    (folder / f"{file}.cu").write_text(f"// {folder}\n{code}")
    return Kernel(file, "nothing_kernel", 32)


# --- Steps, epochs, generation -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("H", "dtype"),
    [
        pytest.param(40, np.float32, id="a block a row"),
        pytest.param(200, np.float32, id="a cluster a row"),
        pytest.param(40, np.float64, id="a product a step"),
    ],
)
def test_captured_steps_follow_the_oracle(backend: CupyBackend, H: int, dtype: Any) -> None:
    for carry in (True, False):
        check_steps(backend, Inputs(3, 3, H, 21, dtype), GRAPH_STEPS + 2, carry, fused=True)


def test_graphs_streams_events_and_memory_are_given_back(stub: StubCuda) -> None:
    def run() -> None:
        backend = CupyBackend(cupy_device.CupyDevice())
        ws, starts = workspace(backend, 2 * GRAPH_STEPS + 3)
        for carry in (True, False):
            backend.run_steps(ws, starts, 0.5, 0.7, carry)
        backend.run_steps(ws, starts[:3], 0.5, 0.7, True)
        assert stub.alive()["graphs"] > 0

    def left() -> dict[str, int]:
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        return {k: n for k, n in stub.alive().items() if k != "modules"}

    run()  # what CuPy keeps for good: buffers on their way, its own streams
    before = left()
    for _ in range(2):
        run()
    assert left() == before


def test_a_model_trains_evaluates_and_generates_as_on_a_cpu(backend: CupyBackend) -> None:
    corpus = fastrnn.corpus_from_text("海风吹乱了你的头发 我们说好不分开 " * 8)
    losses, models = [], []
    for device in (backend, "numpy"):
        models.append(fastrnn.CharRNN(corpus.vocab, 12, device, seed=1))
        trainer = fastrnn.Trainer(models[-1], corpus, 3, 5, lr=20.0, val_fraction=0.2)
        trainer.fit(3)
        losses.append(np.array([stats.score for stats in trainer.history], np.float32))
    assert_close("trajectory", losses[0], losses[1])
    on_cpu = fastrnn.CharRNN(corpus.vocab, 12, "numpy", params=models[0].params)
    texts = [m.generate(["海风", "我"], 5, temperature=0.8, seed=5) for m in (models[0], on_cpu)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("H", "dtype", "decoding"),
    [
        (24, np.float32, Decoding()),
        (24, np.float32, Decoding(temperature=0.7, top_k=5, top_p=0.9, seed=3)),
        (24, np.float64, Decoding(temperature=0.7, top_k=5, seed=3)),
    ],
)
def test_generated_tokens_are_those_of_the_oracle(
    backend: CupyBackend, H: int, dtype: Any, decoding: Decoding
) -> None:
    inputs = Inputs(1, 1, H, 30, dtype)
    params, prefix, lengths = inputs.params(), inputs.tokens(3, 4), np.array([4, 1, 2], np.int32)
    tokens, state = backend.generate(
        {name: backend.put(a) for name, a in params.items()}, prefix, lengths, 6, decoding
    )
    want, end = open_backend("numpy").generate(params, prefix, lengths, 6, decoding)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(state, end, atol=1e-5)


# --- Compiling ahead, threads, streams, memory -------------------------------------------------


def test_modules_are_compiled_ahead_in_threads_and_then_launched_by_any(
    backend: CupyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [k for k in launchable(90) if k.file in ("gather", "cross_entropy")]
    rows = device_of(backend).compile_ahead(wanted, threads=3)
    assert len(rows) == len({(k.file, k.defines) for k in wanted}) > 3
    assert not [row for row in rows if row.error]
    wrong = own_kernel(tmp_path, monkeypatch, "wrong", "this is not C\n")
    (row,) = device_of(backend).compile_ahead([wrong])
    assert row.module == "wrong.cu"
    assert row.error is not None
    assert row.error.startswith("CompileException: ")
    assert "error: " in row.error
    # A thread that has touched no device yet: the module is loaded, its function is not.
    kernel = own_kernel(tmp_path, monkeypatch)
    second = Kernel(kernel.file, kernel.name, 32, shared_bytes=1024)
    device = device_of(backend)
    device.compile_ahead([kernel])
    thread = threading.Thread(target=device._function, args=(second,))
    thread.start()
    thread.join()


def test_resident_clusters_are_asked_of_the_driver(backend: CupyBackend) -> None:
    for kernel in launchable(90):
        if kernel.cluster > 1 and kernel.file == "recurrence_cluster":
            assert backend.device.active_clusters(kernel) == MULTIPROCESSORS // kernel.cluster


def test_streams_of_other_libraries_are_taken_without_a_warning(
    backend: CupyBackend, stub: StubCuda
) -> None:
    inputs = Inputs(4, 3, 8, 11, np.float32)
    arrays = inputs.array(4, 3, 8), inputs.array(8, 8), inputs.array(3, 8)
    handle = stub.streamCreateWithPriority(0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cupy.cuda.Device(0), cupy_device.foreign_stream(cupy, handle, 0):
            assert cupy.cuda.get_current_stream().ptr == handle
            h = ops.recurrence(*map(cupy.asarray, arrays))
    assert_close("recurrence", h.get(), ops.recurrence(*arrays))
    stub.streamDestroy(handle)  # the owner's affair, which CuPy has left to it


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Limits CuPy's pool to so many bytes more than are in use."""
    pool = cupy.get_default_memory_pool()

    def limit(room: int) -> None:
        gc.collect()
        pool.free_all_blocks()
        pool.set_limit(size=pool.used_bytes() + room)

    yield limit
    pool.set_limit(size=0)


def test_memory_that_runs_out_is_named_and_a_smaller_call_works(
    backend: CupyBackend, little_memory: Callable[[int], None]
) -> None:
    inputs = Inputs(8, 8, 32, 40, np.float32)
    h, W_hq, b_q = (cupy.asarray(inputs.array(*s)) for s in ((8, 8, 32), (32, 40), (40,)))
    little_memory(0)
    with pytest.raises(DeviceMemoryError, match=r"T=8, B=8, H=32, V=40 in float32 need 10\.0 KiB"):
        ops.project(h, W_hq, b_q)
    little_memory(1 << 20)
    corpus = fastrnn.corpus_from_text("海风吹乱了你的头发 我们说好不分开 " * 40)
    model = fastrnn.CharRNN(corpus.vocab, 16, backend)
    little_memory(64 << 10)
    with pytest.raises(DeviceMemoryError, match=r"T=35, B=16, H=16, V=\d+ .* are free; a smaller"):
        fastrnn.Trainer(model, corpus, batch_size=16)
    trainer = fastrnn.Trainer(model, corpus, batch_size=2, num_steps=3)
    little_memory(8 << 20)
    assert trainer.run_epoch().loss > 0
