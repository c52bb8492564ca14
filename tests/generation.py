"""A continuation, and whether produced tokens are those of the definition in ``decoding.py``.

Sums have another order than in NumPy, so a token may differ where the choice hangs by a rounding
error. :func:`check` follows the produced tokens in float64 and accepts another token than the
definition's only where a change of the logits by that error makes the definition choose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.decoding import Decoding, choose, uniform
from tests.tolerances import RELATIVE_RMS, relative_rms

GREEDY = Decoding()

ERROR = {"float32": 4e-6, "float64": 1e-13}
"""Of a logit, relative to the largest: H-long dot products after some steps of the recurrence."""


@dataclass(frozen=True)
class Continuation:
    """The arguments of ``generate``, on the host."""

    params: dict[str, NDArray[Any]]
    prefix: NDArray[np.int32]
    lengths: NDArray[np.int32]
    num_tokens: int
    decoding: Decoding = GREEDY
    h0: NDArray[Any] | None = None
    position: int = 0
    sequence: int = 0

    @property
    def start(self) -> NDArray[Any]:
        W_hh = self.params["W_hh"]
        shape = (len(self.prefix), len(W_hh))
        return np.zeros(shape, W_hh.dtype) if self.h0 is None else self.h0

    def uniform(self, s: int, i: int) -> float:
        return uniform(self.decoding.seed, self.sequence + s, self.position + i)


def draw(
    S: int, P: int, num_tokens: int, H: int, V: int, decoding: Decoding = GREEDY,
    dtype: Any = np.float32, seed: int = 0,
) -> Continuation:  # fmt: skip
    """A random model, its weights as large as a trained one's, and prefixes of mixed lengths."""
    rng = np.random.default_rng([seed, P, S, H, V])

    def normal(*shape: int, scale: float) -> NDArray[Any]:
        return (scale * rng.standard_normal(shape)).astype(dtype)

    params = {
        "W_xh": normal(V, H, scale=0.5),
        "W_hh": normal(H, H, scale=H**-0.5),
        "b_h": normal(H, scale=0.1),
        "W_hq": normal(H, V, scale=H**-0.5),
        "b_q": normal(V, scale=0.1),
    }
    lengths = rng.integers(1, P + 1, S).astype(np.int32)
    lengths[-1] = P
    prefix = rng.integers(0, V, (S, P)).astype(np.int32)
    return Continuation(params, prefix, lengths, num_tokens, decoding)


def near(logits: NDArray[np.float64], error: float, decoding: Decoding, u: float) -> set[int]:
    """What the definition chooses when its inputs change by the error."""
    rng = np.random.default_rng(0)
    close = set()
    for _ in range(200):
        noise = rng.uniform(-error, error, logits.shape)
        close.add(choose(logits + noise, decoding, u + rng.uniform(-error, error)))
    return close


def check(call: Continuation, tokens: NDArray[np.int32], state: NDArray[Any]) -> float:
    """Assert that tokens and state are those of the definition, near-ties aside, which are few.

    Returns:
        The relative RMS error of the states.
    """
    p = {name: array.astype(np.float64) for name, array in call.params.items()}
    V, ties = p["W_hq"].shape[1], 0
    assert tokens.min() >= 0, f"token {tokens.min()}"
    assert tokens.max() < V, f"token {tokens.max()}, the vocabulary has {V}"
    states = []
    for s, row in enumerate(tokens):
        h = call.start[s].astype(np.float64)
        for token in call.prefix[s, : call.lengths[s]]:
            h = np.tanh(p["W_xh"][token] + h @ p["W_hh"] + p["b_h"])
        for i, token in enumerate(row):
            logits = h @ p["W_hq"] + p["b_q"]
            u = call.uniform(s, i) if call.decoding.temperature else 0.0
            if token != choose(logits, call.decoding, u):
                error = ERROR[state.dtype.name] * np.abs(logits).max()
                close = near(logits, error, call.decoding, u)
                assert token in close, f"sequence {s}, token {i}: {token}, not one of {close}"
                ties += 1
            if i < len(row) - 1:
                h = np.tanh(p["W_xh"][token] + h @ p["W_hh"] + p["b_h"])
        states.append(h)
    assert ties <= tokens.size // 50, f"{ties} near-ties among {tokens.size} tokens"
    error = relative_rms(state, np.array(states))
    limit = RELATIVE_RMS["recurrence"][state.dtype.name]
    assert error <= limit, f"state: relative RMS error {error:.3g} > {limit:.3g}"
    return error
