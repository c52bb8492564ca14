"""The CUDA C engine's training step in the emulator: graphs, branches, buffers, rates."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn.backend import DeviceMemoryError, Dims, Workspace
from fastrnn.backends import cupy_cuda
from fastrnn.backends.cupy_cuda import GRAPH_STEPS, CupyBackend
from fastrnn.decoding import Decoding
from tests.conftest import Inputs
from tests.cuda_support import emulated, require_emulator
from tests.emulated_device import EmulatedDevice
from tests.test_step import check_steps, setting
from tests.tolerances import assert_close


@pytest.fixture
def backend() -> CupyBackend:
    return CupyBackend(emulated(multiprocessors=132))


def workspace(backend: CupyBackend, steps: int) -> tuple[Workspace, Any]:
    """A small workspace and the offsets of so many steps; the same in every call."""
    inputs = Inputs(2, 2, 8, 11, np.float32)
    params, tokens, starts = setting(inputs, steps)
    dims = Dims(inputs.T, inputs.B, inputs.H, inputs.V, inputs.dtype)
    return backend.workspace(dims, tokens, params), starts


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "H", "kernel"),
    [
        (90, 132, 256, "recurrence_gathered_cluster_kernel"),
        (90, 132, 300, "recurrence_gathered_cluster_kernel"),
        (90, 4, 256, "recurrence_gathered_kernel"),
        (80, 108, 200, "recurrence_gathered_kernel"),
        (75, 40, 256, "recurrence_gathered_kernel"),
        (90, 132, 520, "gemm_kernel"),
    ],
)
def test_steps_follow_the_oracle_whatever_recurrence_is_chosen(
    capability: int, multiprocessors: int, H: int, kernel: str
) -> None:
    device = emulated(capability, multiprocessors=multiprocessors, late_branches=True)
    check_steps(CupyBackend(device), Inputs(2, 3, H, 21, np.float32), 3, True, fused=True)
    assert kernel in {k.name for k in device.launched}


def test_runs_of_any_length_are_replays_of_two_graphs(
    backend: CupyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 2 * GRAPH_STEPS + 4
    once, starts = workspace(backend, n)
    backend.run_steps(once, starts, 0.5, 0.7, True)
    many, _ = workspace(backend, n)
    captures: list[int] = []
    capture = type(backend.device).capture

    def counted(device: Any, submit: Any) -> Any:
        captures.append(1)
        return capture(device, submit)

    monkeypatch.setattr(type(backend.device), "capture", counted)
    for first, last in ((0, 1), (1, 3), (3, 3 + GRAPH_STEPS), (3 + GRAPH_STEPS, n)):
        backend.run_steps(many, starts[first:last], 0.5, 0.7, True)
    # A run that is longer than those before it needs larger buffers, and its graphs anew.
    assert len(captures) <= 4
    for name in ("flat_params", "h0", "totals"):
        got, want = (backend.get(getattr(ws, name)) for ws in (many, once))
        np.testing.assert_array_equal(got, want)


def test_long_runs_are_cut_into_pieces_that_fit_the_batch_buffers(
    backend: CupyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, starts = workspace(backend, 7)
    backend.run_steps(whole, starts, 0.5, 0.7, False)
    monkeypatch.setattr(cupy_cuda, "BATCH_BYTES", 3 * 4 * (4 * 4 + 12 + 2))
    cut, _ = workspace(backend, 7)
    backend.run_steps(cut, starts, 0.5, 0.7, False)
    assert cut.extra["run"].capacity == 3
    np.testing.assert_array_equal(backend.get(cut.flat_params), backend.get(whole.flat_params))


def test_a_replayed_step_reads_the_rates_that_are_due(backend: CupyBackend) -> None:
    ws, starts = workspace(backend, 3)
    for lr, row in zip((0.5, 0.5, 0.0), starts, strict=True):
        before = backend.get(ws.flat_params)
        backend.run_steps(ws, row[None], lr, 0.7, False)
        changed = not np.array_equal(before, backend.get(ws.flat_params))
        assert changed == (lr > 0), "the graph must not keep the rate it was captured with"


def test_scratch_of_a_captured_step_never_moves(backend: CupyBackend) -> None:
    ws, starts = workspace(backend, 3)
    backend.run_steps(ws, starts[:1], 0.5, 0.7, False)
    held = ws.extra["held"]
    before = {name: id(buffer) for name, buffer in held._buffers.items()}
    backend.run_steps(ws, starts[1:], 0.5, 0.7, False)
    assert {name: id(buffer) for name, buffer in held._buffers.items()} == before
    name = next(iter(before))
    with pytest.raises(AssertionError, match="grew"):
        held(name, held._buffers[name].size + 1, np.float32)


def test_two_workspaces_do_not_share_counters_or_scratch(backend: CupyBackend) -> None:
    first, starts = workspace(backend, 4)
    second, _ = workspace(backend, 4)
    for row in starts:
        backend.run_steps(first, row[None], 0.5, 0.7, True)
        backend.run_steps(second, row[None], 0.5, 0.7, True)
    np.testing.assert_array_equal(backend.get(first.flat_params), backend.get(second.flat_params))
    for ws in (first, second):
        for share in ("main", "beside"):
            assert not backend.get(ws.extra[share]["counters"]).any()


def test_a_model_trains_saves_resumes_and_generates(backend: CupyBackend, tmp_path: Any) -> None:
    corpus = fastrnn.corpus_from_text("海风吹乱了你的头发 我们说好不分开 " * 8)
    losses = {}
    for name, device in (("cupy", backend), ("numpy", "numpy")):
        model = fastrnn.CharRNN(corpus.vocab, 12, device, seed=1)
        options: dict[str, Any] = {"batch_size": 3, "num_steps": 5, "lr": 20.0}
        trainer = fastrnn.Trainer(model, corpus, **options, val_fraction=0.2)
        trainer.fit(2)
        losses[name] = [s.loss for s in trainer.history]
        assert_close("trajectory", np.float32(losses[name][1]), losses["cupy"][1], name)
        if name == "cupy":
            trainer.save(tmp_path / "t.safetensors")
            trainer.fit(1)
            again = fastrnn.Trainer.resume(tmp_path / "t.safetensors", corpus, device)
            again.fit(1)
            for key, array in trainer.model.params.items():
                np.testing.assert_array_equal(array, again.model.params[key])
            text = model.generate(["海风", "我"], 4, temperature=0.8, seed=5)
            on_cpu = fastrnn.CharRNN(corpus.vocab, 12, "numpy", params=model.params)
            assert text == on_cpu.generate(["海风", "我"], 4, temperature=0.8, seed=5)


# --- Memory that runs out ----------------------------------------------------------------------


class SmallDevice(EmulatedDevice):
    """An emulated GPU with ``limit`` bytes of memory, of which ``used`` are taken."""

    def __init__(self, limit: int) -> None:
        super().__init__(multiprocessors=132)
        self.limit, self.used = limit, 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self.used + wanted > self.limit:
            raise DeviceMemoryError(wanted, self.limit - self.used, self.limit)
        array = super().empty(shape, dtype)
        self.used += wanted
        weakref.finalize(array, self._freed, wanted)
        return array

    def _freed(self, size: int) -> None:
        self.used -= size


@pytest.fixture
def small() -> CupyBackend:
    """A backend on a device with little memory: room for small workspaces only."""
    require_emulator()
    return CupyBackend(SmallDevice(512 << 10))


def test_a_workspace_that_does_not_fit_names_its_sizes_and_leaves_nothing(
    small: CupyBackend,
) -> None:
    inputs = Inputs(40, 64, 32, 200, np.float32)
    params, tokens, starts = setting(inputs, 2)
    dims = Dims(inputs.T, inputs.B, inputs.H, inputs.V)
    with pytest.raises(MemoryError) as caught:
        small.workspace(dims, tokens, params)
    assert isinstance(caught.value, DeviceMemoryError)
    assert caught.value.wanted is not None
    assert str(caught.value).startswith(
        "out of memory on the device: T=40, B=64, H=32, V=200 in float32 need "
    )
    assert " of 512.0 KiB are free; a smaller batch_size or num_steps needs less" in str(
        caught.value
    )
    del caught
    assert small.device.used == 0  # type: ignore[attr-defined]
    ws = small.workspace(Dims(2, 2, inputs.H, inputs.V), tokens, params)
    small.run_steps(ws, starts[:, :2], 0.5, 0.7, True)
    assert small.get(ws.totals)[2] == 2


@pytest.mark.parametrize("method", ["step", "run_steps", "evaluate"])
def test_steps_that_do_not_fit_can_be_run_once_there_is_room(
    small: CupyBackend, method: str
) -> None:
    ws, starts = workspace(small, 3)
    device: Any = small.device
    before = small.get(ws.flat_params)
    given = small.put(starts[0]) if method == "step" else starts
    arguments = (True,) if method == "evaluate" else (0.5, 0.7, True)
    device.limit = device.used
    with pytest.raises(DeviceMemoryError, match="T=2, B=2, H=8, V=11 in float32 need"):
        getattr(small, method)(ws, given, *arguments)
    np.testing.assert_array_equal(small.get(ws.flat_params), before)
    device.limit = 1 << 20
    getattr(small, method)(ws, given, *arguments)
    again, _ = workspace(small, 3)
    getattr(small, method)(again, given, *arguments)
    for name in ("flat_params", "h0", "totals"):
        got, want = (small.get(getattr(w, name)) for w in (ws, again))
        np.testing.assert_array_equal(got, want)


def test_generation_that_does_not_fit_names_its_sizes(small: CupyBackend) -> None:
    inputs = Inputs(2, 2, 8, 11, np.float32)
    params = {name: small.put(array) for name, array in inputs.params().items()}
    prefix = inputs.tokens(40, 3)
    arguments = prefix, np.full(40, 3, np.int32), 4000, Decoding()
    with pytest.raises(DeviceMemoryError, match=r"S=40, H=8, V=11 in float32 need .* sequences"):
        small.generate(params, *arguments)
    tokens, _ = small.generate(params, prefix[:2], np.full(2, 3, np.int32), 5, Decoding())
    assert tokens.shape == (2, 5)


def test_a_trainer_that_does_not_fit_names_its_sizes(small: CupyBackend) -> None:
    corpus = fastrnn.corpus_from_text("海风吹乱了你的头发 我们说好不分开 " * 40)
    model = fastrnn.CharRNN(corpus.vocab, 16, small)
    V = len(corpus.vocab)
    device: Any = small.device
    before = device.used
    trainer = fastrnn.Trainer(model, corpus, batch_size=2, num_steps=3)
    needed = device.used - before
    model.arrays = {name: small.put(array) for name, array in model.params.items()}
    del trainer
    assert device.used == before
    for limit in range(before, before + needed, 512):
        device.limit = limit
        with pytest.raises(DeviceMemoryError, match=f"T=3, B=2, H=16, V={V} in float32 need"):
            fastrnn.Trainer(model, corpus, batch_size=2, num_steps=3)
    device.limit = 1 << 20
    trainer = fastrnn.Trainer(model, corpus, batch_size=2, num_steps=3)
    assert trainer.run_epoch().loss > 0
