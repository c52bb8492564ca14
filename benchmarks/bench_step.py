"""Whole training steps and epochs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.conftest import STEP_SIZES, Timed
from benchmarks.peers.fastrnn_backend import Step
from fastrnn import CharRNN, Trainer, corpus_from_text, load_corpus, reference
from fastrnn.backend import Backend, Dims
from fastrnn.bench import make_problem
from tests.tolerances import assert_close

TIMED_SIZES = STEP_SIZES
pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=5, disable_gc=True)


def test_step(backend: Backend, dims: Dims, timed: Timed) -> None:
    """A step on the next of eight consecutive batches; the first three losses are the oracle's."""
    problem, expected = make_problem("step", dims)
    step = Step(problem, backend.name)
    for i, want in enumerate(expected):
        step.run(1)
        assert_close("trajectory", step.result()["loss"], want["loss"], f"loss {i}")
    timed("step", "step", dims, step.run, 1, tokens=dims.T * dims.B)


@pytest.mark.parametrize("sampling", ["consecutive", "random"])
def test_epoch(backend: Backend, timed: Timed, sampling: str, pytestconfig: pytest.Config) -> None:
    """``Trainer.run_epoch`` on the bundled corpus at the headline sizes, bookkeeping included."""
    if pytestconfig.getoption("benchmark_enable"):
        corpus, T, B, H = load_corpus(), 35, 32, 256
    else:
        corpus, T, B, H = corpus_from_text("来日方长" * 40, name="toy"), 5, 4, 16
    model = CharRNN(corpus.vocab, hidden_size=H, backend=backend, seed=0)
    params = model.params
    trainer = Trainer(model, corpus, batch_size=B, num_steps=T, sampling=sampling, seed=0)
    stats = trainer.run_epoch()
    if sampling == "consecutive":
        want = next(reference.train(corpus.tokens, params, epochs=1, batch_size=B, num_steps=T))
        assert_close("trajectory", np.float32(stats.loss), math.log(want), "loss of the epoch")
    assert math.isfinite(stats.perplexity)
    timed(
        f"epoch, {sampling}",
        "step",
        Dims(T, B, H, len(corpus.vocab)),
        trainer.run_epoch,
        tokens=stats.tokens,
        units=trainer.batches_per_epoch,
    )
