"""The oracle itself: finite differences, torch autograd, and the tutorial's one-hot form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastrnn import reference
from tests.conftest import Inputs

TEXT = "想要有直升机\n想要和你飞到宇宙去\r\n想要和你融化在一起"


def loss_of(inputs: dict[str, np.ndarray], X: np.ndarray, Y: np.ndarray) -> float:
    params = {name: inputs[name] for name in reference.PARAM_NAMES}
    return reference.cross_entropy(reference.forward(X, inputs["h0"], params)[1], Y)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 4, 5), (5, 3, 6, 7)])
def test_gradients_agree_with_finite_differences(shape: tuple[int, int, int, int]) -> None:
    make = Inputs(*shape, dtype=np.float64)
    params, h0 = make.params(), make.array(make.B, make.H, scale=0.3)
    X, Y = make.tokens(make.T, make.B), make.tokens(make.T, make.B)
    hs, logits = reference.forward(X, h0, params)
    grads, dh0 = reference.backward(X, Y, h0, hs, logits, params)
    arrays = {**params, "h0": h0}
    for name, analytic in {**grads, "h0": dh0}.items():
        numeric = np.empty_like(analytic)
        for i in np.ndindex(analytic.shape):
            kept, eps = arrays[name][i], 1e-5
            arrays[name][i] = kept + eps
            above = loss_of(arrays, X, Y)
            arrays[name][i] = kept - eps
            below = loss_of(arrays, X, Y)
            arrays[name][i] = kept
            numeric[i] = (above - below) / (2 * eps)
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-9, err_msg=name)


def test_gradients_agree_with_torch_autograd() -> None:
    torch = pytest.importorskip("torch", reason="torch is the second judge; not installed")
    make = Inputs(6, 4, 9, 11, dtype=np.float64)
    params, h0 = make.params(), make.array(4, 9, scale=0.3)
    X, Y = make.tokens(6, 4), make.tokens(6, 4)
    hs, logits = reference.forward(X, h0, params)
    grads, dh0 = reference.backward(X, Y, h0, hs, logits, params)

    leaf = {k: torch.tensor(v, requires_grad=True) for k, v in {**params, "h0": h0}.items()}
    h, outputs = leaf["h0"], []
    for x in torch.tensor(X, dtype=torch.long):
        h = torch.tanh(leaf["W_xh"][x] + h @ leaf["W_hh"] + leaf["b_h"])
        outputs.append(h @ leaf["W_hq"] + leaf["b_q"])
    out = torch.cat(outputs)
    loss = torch.nn.functional.cross_entropy(out, torch.tensor(Y, dtype=torch.long).reshape(-1))
    loss.backward()
    assert reference.cross_entropy(logits, Y) == pytest.approx(loss.item(), rel=1e-13)
    for name, grad in {**grads, "h0": dh0}.items():
        np.testing.assert_allclose(grad, leaf[name].grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gather_equals_the_one_hot_product_to_the_bit(dtype: type) -> None:
    make = Inputs(6, 5, 17, 23, dtype=dtype)
    params, h0, X = make.params(), make.array(5, 17), make.tokens(6, 5)
    for got, want in zip(
        reference.forward(X, h0, params),
        reference.forward(X, h0, params, use_one_hot=True),
        strict=True,
    ):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)


def test_load_text_sorts_the_vocabulary_and_flattens_newlines() -> None:
    text = reference.load_text(TEXT, max_chars=20)
    flat = "想要有直升机 想要和你飞到宇宙去  想要"
    assert text.idx_to_char == sorted(set(flat))
    assert "".join(text.idx_to_char[i] for i in text.tokens) == flat
    assert text.tokens.dtype == np.int32
    assert text.vocab_size == len(text.char_to_idx)


def test_consecutive_batches_continue_one_another() -> None:
    batches = list(reference.data_iter_consecutive(np.arange(30, dtype=np.int32), 2, 6))
    assert len(batches) == 2
    (x0, y0), (x1, _) = batches
    np.testing.assert_array_equal(x0.T, [[0, 1, 2, 3, 4, 5], [15, 16, 17, 18, 19, 20]])
    np.testing.assert_array_equal(y0, x0 + 1)
    np.testing.assert_array_equal(x1[0], x0[-1] + 1)


def test_random_batches_cover_distinct_examples() -> None:
    tokens = np.arange(30, dtype=np.int32)
    batches = list(reference.data_iter_random(tokens, 2, 6, np.random.default_rng(3)))
    assert len(batches) == 2  # (30 - 1) // 6 = 4 examples
    starts = np.concatenate([x[0] for x, _ in batches])
    assert sorted(starts) == [0, 6, 12, 18]
    for x, y in batches:
        np.testing.assert_array_equal(y, x + 1)


def test_clip_scales_only_above_the_threshold() -> None:
    grads = {"a": np.full(4, 3.0), "b": np.full((2, 2), 4.0)}
    assert reference.clip_by_global_norm(grads, 1.0) == pytest.approx(10.0)
    assert math.sqrt(sum(float((g**2).sum()) for g in grads.values())) == pytest.approx(1.0)
    before = {name: g.copy() for name, g in grads.items()}
    reference.clip_by_global_norm(grads, 1.5)
    for name, g in grads.items():
        np.testing.assert_array_equal(g, before[name])


def test_cross_entropy_is_stable_and_uniform_gives_log_v() -> None:
    logits = np.array([[[1e4, -1e4, 0.0]]])
    assert reference.cross_entropy(logits, np.array([[0]])) == 0.0
    assert reference.cross_entropy(logits, np.array([[1]])) == pytest.approx(2e4)
    assert reference.perplexity(
        reference.cross_entropy(np.zeros((2, 3, 7)), np.zeros((2, 3), int))
    ) == pytest.approx(7)
    assert reference.perplexity(1e5) == math.inf


@pytest.mark.parametrize("sampling", ["consecutive", "random"])
def test_training_learns_a_short_text_and_predicts_it(sampling: str) -> None:
    text = reference.load_text("不分开爱在西元前 " * 15)
    params = reference.init_params(text.vocab_size, 32, seed=1)
    perplexities = list(
        reference.train(
            text.tokens, params, epochs=60, batch_size=4, num_steps=8, sampling=sampling, lr=50.0
        )
    )
    assert perplexities[0] > 3
    assert perplexities[-1] < 1.3
    prefix = np.array([text.char_to_idx[c] for c in "不分开"], dtype=np.int32)
    predicted = reference.predict(prefix, 8, params)
    assert "".join(text.idx_to_char[i] for i in predicted) == "爱在西元前 不分"
