"""Greedy and sampled generation: 50 characters at a time, for one and for 64 sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import Timed
from benchmarks.peers.fastrnn_backend import Generate
from fastrnn.backend import Backend, Dims, open_backend
from fastrnn.bench import CHECK_CHARACTERS, SIZES, make_problem
from fastrnn.decoding import Decoding
from fastrnn.reference import PARAM_NAMES

TIMED_SIZES = {name: SIZES[name] for name in ("headline", "H1024")}
CHARACTERS = 50
pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=5, disable_gc=True)


@pytest.mark.parametrize("sequences", [1, 64])
def test_generate(backend: Backend, dims: Dims, timed: Timed, sequences: int) -> None:
    problem, (want,) = make_problem(f"generate{sequences}", dims)
    generate = Generate(problem, backend.name)
    generate.run(CHECK_CHARACTERS)
    np.testing.assert_array_equal(generate.result()["tokens"], want["tokens"])
    timed(
        f"generate, {sequences} sequences",
        "generate",
        dataclasses.replace(dims, B=sequences),
        generate.run,
        CHARACTERS,
        tokens=CHARACTERS * sequences,
        units=CHARACTERS,
    )


def test_generate_sampled(backend: Backend, dims: Dims, timed: Timed) -> None:
    """Temperature, top-k and top-p together; the same seed gives the numpy backend's tokens."""
    problem, _ = make_problem("generate", dims)
    decoding = Decoding(temperature=0.8, top_k=40, top_p=0.95, seed=7)
    lengths = np.full(1, problem["prefix"].shape[1], np.int32)

    def produce(device: Backend, n: int) -> Any:
        params = {name: device.put(problem[name]) for name in PARAM_NAMES}
        return lambda: device.generate(params, problem["prefix"], lengths, n, decoding)[0]

    want = produce(open_backend("numpy"), CHECK_CHARACTERS)()
    np.testing.assert_array_equal(produce(backend, CHECK_CHARACTERS)(), want)
    timed(
        "generate, sampled",
        "generate",
        dataclasses.replace(dims, B=1),
        produce(backend, CHARACTERS),
        tokens=CHARACTERS,
        units=CHARACTERS,
    )
