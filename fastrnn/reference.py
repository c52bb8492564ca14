"""The language model in plain NumPy: the definition that every backend is tested against.

One function per function of the "RNN from scratch" tutorial this project rebuilds, written to be
read, not to be fast: the forward pass multiplies one-hot vectors by matrices just as the tutorial
does, and the backward pass is the chain rule, line by line. Everything runs in float32 or float64,
whatever the parameters are.

Notation, used in the whole project: ``T`` time steps, ``B`` batch size, ``H`` hidden size, ``V``
vocabulary size; hidden states are rows; arrays are in C order.

    Z_t = onehot(x_t) W_xh + H_{t-1} W_hh + b_h          H_t = tanh(Z_t)
    O_t = H_t W_hq + b_q                                 L = mean_{t,b} -log softmax(O_t)[y_t]

Where the tutorial is wrong this module is right, and says so at the function: the vocabulary is
sorted, cross entropy is taken from logits, and consecutive sampling carries the hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = dict[str, Array]

PARAM_NAMES = ("W_xh", "W_hh", "b_h", "W_hq", "b_q")


# --- Corpus ----------------------------------------------------------------------------------


class Text(NamedTuple):
    """What :func:`load_text` returns: tokens int32 ``[N]`` and the two vocabulary tables."""

    tokens: Array
    char_to_idx: dict[str, int]
    idx_to_char: list[str]
    vocab_size: int


def load_text(text: str, max_chars: int | None = 10_000) -> Text:
    """Turn a text into tokens.

    Newlines (``\\n`` and ``\\r``) become spaces and the first ``max_chars`` characters are kept.
    The vocabulary is sorted by code point; the tutorial used the order of a Python ``set``, which
    changes from one process to the next.
    """
    text = text.replace("\n", " ").replace("\r", " ")[:max_chars]
    idx_to_char = sorted(set(text))
    char_to_idx = {char: i for i, char in enumerate(idx_to_char)}
    tokens = np.array([char_to_idx[char] for char in text], dtype=np.int32)
    return Text(tokens, char_to_idx, idx_to_char, len(idx_to_char))


def data_iter_random(
    tokens: Array, batch_size: int, num_steps: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """Random sampling: yield ``(X, Y)``, each int32 ``[T, B]``, in an order drawn from ``rng``.

    Example ``j`` covers ``tokens[jT : jT+T]``, its targets lie one character to the right. Two
    batches are not adjacent in the text, so the hidden state starts from zero at every batch.
    """
    num_examples = (len(tokens) - 1) // num_steps
    order = rng.permutation(num_examples)
    for i in range(num_examples // batch_size):
        starts = order[i * batch_size : (i + 1) * batch_size] * num_steps
        X = np.stack([tokens[s : s + num_steps] for s in starts], axis=1)
        Y = np.stack([tokens[s + 1 : s + num_steps + 1] for s in starts], axis=1)
        yield X, Y


def data_iter_consecutive(
    tokens: Array, batch_size: int, num_steps: int
) -> Iterator[tuple[Array, Array]]:
    """Consecutive sampling: yield ``(X, Y)``, each int32 ``[T, B]``.

    The text is cut into ``B`` rows of equal length and read column by column, so row ``b`` of a
    batch continues row ``b`` of the batch before it, and the hidden state is carried over.
    """
    length = len(tokens) // batch_size
    rows = tokens[: batch_size * length].reshape(batch_size, length)
    for i in range((length - 1) // num_steps):
        X = rows[:, i * num_steps : (i + 1) * num_steps]
        Y = rows[:, i * num_steps + 1 : (i + 1) * num_steps + 1]
        yield X.T.copy(), Y.T.copy()


# --- Parameters and state --------------------------------------------------------------------


def one_hot(tokens: Array, vocab_size: int, dtype: Any = np.float32) -> Array:
    """One-hot vectors of ``tokens`` ``[...]``: ``[..., V]``."""
    return np.eye(vocab_size, dtype=dtype)[tokens]


def init_params(
    vocab_size: int, hidden_size: int, seed: int = 0, dtype: Any = np.float32
) -> Params:
    """Draw the weights from N(0, 0.01²); biases are zero.

    The normal deviates are drawn in float64 and rounded, so float32 and float64 models of one
    seed start from the same point.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return (rng.standard_normal(shape) * 0.01).astype(dtype)

    return {
        "W_xh": normal(vocab_size, hidden_size),
        "W_hh": normal(hidden_size, hidden_size),
        "b_h": np.zeros(hidden_size, dtype),
        "W_hq": normal(hidden_size, vocab_size),
        "b_q": np.zeros(vocab_size, dtype),
    }


def init_state(batch_size: int, hidden_size: int, dtype: Any = np.float32) -> Array:
    """The zero hidden state ``[B, H]``."""
    return np.zeros((batch_size, hidden_size), dtype)


# --- Forward ---------------------------------------------------------------------------------


def rnn_step_one_hot(x: Array, h: Array, params: Params) -> Array:
    """One time step as the tutorial writes it: ``x`` ``[B]``, ``h`` ``[B, H]``."""
    X = one_hot(x, len(params["W_xh"]), params["W_xh"].dtype)
    return np.asarray(np.tanh(X @ params["W_xh"] + h @ params["W_hh"] + params["b_h"]))


def rnn_step(x: Array, h: Array, params: Params) -> Array:
    """The same step with a gather: row ``x`` of ``W_xh`` is what the one-hot product selects."""
    return np.asarray(np.tanh(params["W_xh"][x] + h @ params["W_hh"] + params["b_h"]))


def forward(
    X: Array, h0: Array, params: Params, *, use_one_hot: bool = False
) -> tuple[Array, Array]:
    """Run the network over ``X`` ``[T, B]``.

    Returns hidden states ``[T, B, H]`` and logits ``[T, B, V]``.
    """
    step = rnn_step_one_hot if use_one_hot else rnn_step
    hs = []
    h = h0
    for x in X:
        h = step(x, h, params)
        hs.append(h)
    H = np.stack(hs)
    return H, H @ params["W_hq"] + params["b_q"]


def log_softmax(logits: Array) -> Array:
    """Stable log softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def cross_entropy(logits: Array, targets: Array) -> float:
    """Mean cross entropy in nats of ``logits`` ``[..., V]`` against ``targets`` ``[...]``.

    Taken from logits. (The tutorial handed raw scores to a loss that expects probabilities.)
    """
    log_p = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)
    return float(-log_p.mean(dtype=np.float64))


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 709.0 else math.inf


# --- Backward --------------------------------------------------------------------------------


def backward(
    X: Array, Y: Array, h0: Array, hs: Array, logits: Array, params: Params
) -> tuple[Params, Array]:
    """Back-propagation through time, truncated at the batch's first step.

    Takes what :func:`forward` took and returned, and the targets ``Y`` ``[T, B]``; returns the
    gradient of the mean cross entropy by parameter name, and that of ``h0`` ``[B, H]``.
    """
    T, B = X.shape
    W_hh, W_hq = params["W_hh"], params["W_hq"]
    grads = {name: np.zeros_like(p) for name, p in params.items()}

    dO = np.exp(log_softmax(logits))  # [T, B, V]
    np.put_along_axis(
        dO, Y[..., None], np.take_along_axis(dO, Y[..., None], axis=-1) - dO.dtype.type(1), axis=-1
    )
    dO /= T * B

    dh = np.zeros_like(h0)
    for t in reversed(range(T)):
        h_prev = hs[t - 1] if t > 0 else h0
        grads["W_hq"] += hs[t].T @ dO[t]
        grads["b_q"] += dO[t].sum(axis=0)
        dh = dO[t] @ W_hq.T + dh  # [B, H]
        dz = dh * (1 - hs[t] ** 2)  # tanh' = 1 - tanh²
        grads["W_hh"] += h_prev.T @ dz
        grads["b_h"] += dz.sum(axis=0)
        np.add.at(grads["W_xh"], X[t], dz)  # onehot(x)ᵀ dz: a scatter-add
        dh = dz @ W_hh.T
    return grads, dh


# --- Clip and step ---------------------------------------------------------------------------


def clip_by_global_norm(grads: Params, max_norm: float) -> float:
    """Scale all gradients in place by ``min(1, max_norm / norm)``; return the norm before that.

    Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks" (2013).
    """
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
    if norm > max_norm:
        for g in grads.values():
            g *= g.dtype.type(max_norm / norm)
    return norm


def sgd(params: Params, grads: Params, lr: float) -> None:
    """``p -= lr * g`` in place, for every parameter."""
    for name, p in params.items():
        p -= p.dtype.type(lr) * grads[name]


def train_step(
    X: Array, Y: Array, h0: Array, params: Params, lr: float, max_norm: float
) -> tuple[float, float, Array]:
    """One training step; return ``(loss, gradient norm, last hidden state)``."""
    hs, logits = forward(X, h0, params)
    grads, _ = backward(X, Y, h0, hs, logits, params)
    norm = clip_by_global_norm(grads, max_norm)
    sgd(params, grads, lr)
    return cross_entropy(logits, Y), norm, hs[-1]


# --- Prediction ------------------------------------------------------------------------------


def predict(prefix: Array, num_chars: int, params: Params) -> Array:
    """Continue ``prefix`` (int32, at least one token) greedily by ``num_chars`` tokens.

    The state starts from zero; ties go to the lowest index. Returns the new tokens only.
    """
    h = init_state(1, len(params["W_hh"]), params["W_hh"].dtype)
    for x in prefix:
        h = rnn_step(np.array([x]), h, params)
    produced: list[int] = []
    while len(produced) < num_chars:
        logits = h @ params["W_hq"] + params["b_q"]
        produced.append(int(logits.argmax()))
        h = rnn_step(np.array(produced[-1:]), h, params)
    return np.array(produced, dtype=np.int32)


# --- Training loop ---------------------------------------------------------------------------


def train(
    tokens: Array,
    params: Params,
    *,
    epochs: int,
    batch_size: int = 32,
    num_steps: int = 35,
    sampling: str = "consecutive",
    lr: float = 100.0,
    clip_norm: float = 0.01,
    rng: np.random.Generator | None = None,
) -> Iterator[float]:
    """Train ``params`` in place; yield the perplexity of each epoch.

    ``sampling`` is ``"consecutive"`` (state zeroed at every epoch and carried within it; the
    tutorial's text says so, its code forgot to) or ``"random"`` (state zeroed at every batch).
    """
    rng = rng or np.random.default_rng(0)
    H, dtype = len(params["W_hh"]), params["W_hh"].dtype
    for _ in range(epochs):
        if sampling == "consecutive":
            batches = data_iter_consecutive(tokens, batch_size, num_steps)
        else:
            batches = data_iter_random(tokens, batch_size, num_steps, rng)
        losses = []
        h = init_state(batch_size, H, dtype)
        for X, Y in batches:
            h0 = h if sampling == "consecutive" else init_state(batch_size, H, dtype)
            loss, _, h = train_step(X, Y, h0, params, lr, clip_norm)
            losses.append(loss)
        yield perplexity(sum(losses) / len(losses))
