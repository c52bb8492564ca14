"""Choosing tokens: the generator's published vectors, the rule, and generation on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastrnn import reference
from fastrnn.backend import Backend, open_backend
from fastrnn.decoding import Decoding, choose, philox4x32, uniform
from tests.conftest import Inputs

# kat_vectors of the Random123 distribution, philox4x32 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_known_answers(counter: Any, key: Any, want: Any) -> None:
    assert philox4x32(counter, key) == want


def test_uniforms_are_uniform_and_fit_float32() -> None:
    draws = np.array([uniform(5, s, p) for s in range(20) for p in range(200)])
    assert 0 <= draws.min() < draws.max() < 1
    assert np.all(draws == draws.astype(np.float32))
    assert len(np.unique(draws)) > 3990
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] - 400).max() < 100


LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


def shares(decoding: Decoding, logits: Any = LOGITS) -> Any:
    """The share of each token over an even grid of uniforms."""
    chosen = [choose(logits, decoding, (i + 0.5) / 1000) for i in range(1000)]
    return np.bincount(chosen, minlength=len(logits)) / 1000


def test_greedy_takes_the_first_of_equal_logits() -> None:
    assert choose(np.array([1.0, 5.0, 5.0]), Decoding(), 0.9) == 1


def test_temperature_one_is_the_softmax() -> None:
    np.testing.assert_allclose(shares(Decoding(temperature=1.0)), [0.1, 0.4, 0.2, 0.3], atol=1e-3)


def test_temperature_sharpens() -> None:
    want = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    np.testing.assert_allclose(shares(Decoding(temperature=0.5)), want / want.sum(), atol=1e-3)


def test_top_k_keeps_the_largest() -> None:
    got = shares(Decoding(temperature=1.0, top_k=2))
    np.testing.assert_allclose(got, [0, 4 / 7, 0, 3 / 7], atol=1e-3)
    equal = shares(Decoding(temperature=1.0, top_k=2), np.zeros(4))
    np.testing.assert_allclose(equal, [0.5, 0.5, 0, 0])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    got = shares(Decoding(temperature=1.0, top_p=0.6))
    np.testing.assert_allclose(got, [0, 4 / 7, 0, 3 / 7], atol=1e-3)
    only = shares(Decoding(temperature=1.0, top_p=0.01))
    np.testing.assert_array_equal(only, [0, 1, 0, 0])


def test_top_k_comes_before_top_p() -> None:
    got = shares(Decoding(temperature=1.0, top_k=3, top_p=0.75))
    np.testing.assert_allclose(got, [0, 4 / 7, 0, 3 / 7], atol=1e-3)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_extreme_uniforms_choose_a_kept_token(u: float) -> None:
    decoding = Decoding(temperature=1.0, top_k=2)
    assert choose(np.array([0.0, -1.0, 0.0, -2.0]), decoding, u) in (0, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"top_k": -1}, ValueError, "top_k must be >= 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Decoding(**arguments)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint64])
def test_seeds_may_be_numpys(kind: Any) -> None:
    decoding = Decoding(temperature=1.0, top_k=kind(3), seed=kind(5))
    assert decoding == Decoding(temperature=1.0, top_k=3, seed=5)
    assert uniform(decoding.seed, 1, 2) == uniform(5, 1, 2)
    assert Decoding(top_k=2**70).top_k == 2**31 - 1, "all, in what compiled code counts with"


def test_a_temperature_without_a_reciprocal_is_greedy() -> None:
    assert Decoding(temperature=5e-324) == Decoding(temperature=0.0)
    assert Decoding(temperature=1e-300).temperature == 1e-300


# --- Every backend ---

DECODINGS = [
    pytest.param(Decoding(), id="greedy"),
    pytest.param(Decoding(temperature=1.0, seed=2**63 + 5), id="temperature"),
    pytest.param(Decoding(temperature=0.8, top_k=5, seed=1), id="top-k"),
    pytest.param(Decoding(temperature=1.3, top_p=0.7, seed=2), id="top-p"),
    pytest.param(Decoding(temperature=1.1, top_k=9, top_p=0.9, seed=3), id="both"),
]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("shape", [(1, 2), (33, 41), (64, 300)], ids=str)
def test_backends_produce_the_same_tokens(
    backend: Backend, dtype: np.dtype[Any], decoding: Decoding, shape: tuple[int, int]
) -> None:
    make = Inputs(1, 1, *shape, dtype=dtype)
    params = make.params()
    prefix, lengths = make.tokens(5, 4), np.array([1, 4, 2, 3, 4], np.int32)
    device = {name: backend.put(p) for name, p in params.items()}
    got, _ = backend.generate(device, prefix, lengths, 12, decoding)
    want, _ = open_backend("numpy").generate(params, prefix, lengths, 12, decoding)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


def test_greedy_generation_is_that_of_the_oracle(backend: Backend, dtype: np.dtype[Any]) -> None:
    make = Inputs(1, 1, 37, 53, dtype=dtype)
    params, prefix = make.params(), make.tokens(3, 6)
    device = {name: backend.put(p) for name, p in params.items()}
    got, _ = backend.generate(device, prefix, np.full(3, 6, np.int32), 20, Decoding())
    for row, tokens in zip(got, prefix, strict=True):
        np.testing.assert_array_equal(row, reference.predict(tokens, 20, params))


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_continuation_goes_on_exactly(backend: Backend, decoding: Decoding) -> None:
    make = Inputs(1, 1, 24, 40, dtype=np.float32)
    device = {name: backend.put(p) for name, p in make.params().items()}
    prefix, lengths = make.tokens(2, 3), np.array([3, 2], np.int32)
    whole, state = backend.generate(device, prefix, lengths, 9, decoding)
    first, middle = backend.generate(device, prefix, lengths, 4, decoding)
    last, end = backend.generate(
        device, first[:, -1:], np.ones(2, np.int32), 5, decoding, h0=middle, position=4
    )
    np.testing.assert_array_equal(np.hstack([first, last]), whole)
    np.testing.assert_array_equal(end, state)


def test_sequences_draw_from_streams_of_their_own(backend: Backend) -> None:
    make = Inputs(1, 1, 24, 40, dtype=np.float32)
    device = {name: backend.put(p) for name, p in make.params().items()}
    prefix = np.zeros((3, 1), np.int32)
    how = Decoding(temperature=2.0, seed=9)
    together, _ = backend.generate(device, prefix, np.ones(3, np.int32), 15, how)
    assert len({tuple(row) for row in together}) == 3
    alone, _ = backend.generate(device, prefix[:1], np.ones(1, np.int32), 15, how, sequence=2)
    np.testing.assert_array_equal(alone[0], together[2])
