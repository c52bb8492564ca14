"""How the cost of a training step grows with T, B, H and V, each varied alone."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.conftest import Timed
from benchmarks.peers.fastrnn_backend import Step
from fastrnn.backend import Backend, Dims
from fastrnn.bench import HEADLINE, SIZES, make_problem
from tests.tolerances import assert_close

pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=5, disable_gc=True)


def test_scaling(
    backend: Backend,
    sweep: tuple[str, int],
    timed: Timed,
    pytestconfig: pytest.Config,
) -> None:
    letter, value = sweep
    base = HEADLINE if pytestconfig.getoption("benchmark_enable") else SIZES["tiny"]
    dims = Dims(**{**dataclasses.asdict(base), letter: value})
    problem, expected = make_problem("step", dims)
    step = Step(problem, backend.name)
    step.run(1)
    assert_close("trajectory", step.result()["loss"], expected[0]["loss"], "first loss")
    timed(
        f"scaling in {letter}",
        "step",
        dims,
        step.run,
        1,
        tokens=dims.T * dims.B,
        sweep=letter,
    )
