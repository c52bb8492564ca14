"""The CUDA C engine's training step in the emulator: graphs, branches, buffers, rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn.backend import Dims, Workspace
from fastrnn.backends import cupy_cuda
from fastrnn.backends.cupy_cuda import GRAPH_STEPS, CupyBackend
from tests.conftest import Inputs
from tests.cuda_support import emulated
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
