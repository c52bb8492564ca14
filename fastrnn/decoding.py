"""How the next token is chosen from logits: greedy, temperature, top-k, top-p.

The random numbers come from Philox4x32-10, a counter-based generator (Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). A uniform is a pure function of
``(seed, sequence, position)``, so every backend draws the same one without sharing any state, and
a continuation resumed in the middle continues with the same numbers.

:func:`choose` is the definition; the compiled backends implement the same rule.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.checks import whole

PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85
PHILOX_ROUNDS = 10
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Decoding:
    """How to choose the next token.

    Attributes:
        temperature: logits are divided by it; 0, or less than any normal number, means greedy
            (arg-max, ties to the lowest index).
        top_k: keep only the ``top_k`` largest logits (ties: the lowest indices); 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities, after ``top_k``
            and temperature, add up to at least ``top_p`` (nucleus sampling, Holtzman et al.,
            "The curious case of neural text degeneration", 2020); 1.0 keeps all.
        seed: key of the generator, ``0 <= seed < 2**64``.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature!r}")
        for name in ("top_k", "seed"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        object.__setattr__(self, "top_k", min(self.top_k, 2**31 - 1))  # compiled code counts in 32
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if self.temperature < sys.float_info.min:  # its reciprocal is infinite
            object.__setattr__(self, "temperature", 0.0)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds of Philox4x32 on one 128-bit counter; four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0 = PHILOX_M0 * c0
        p1 = PHILOX_M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + PHILOX_W0) & _MASK
        k1 = (k1 + PHILOX_W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, sequence: int, position: int) -> float:
    """The uniform in [0, 1) of one produced token: the top 24 bits of word 0, exact in float32.

    Key: the two halves of ``seed``. Counter: ``(position, sequence, 0, 0)``.
    """
    key = (seed & _MASK, seed >> 32)
    word = philox4x32((position & _MASK, sequence & _MASK, 0, 0), key)[0]
    return (word >> 8) * 2.0**-24


def choose(logits: NDArray[Any], decoding: Decoding, u: float) -> int:
    """Choose a token from ``logits`` ``[V]`` and the uniform ``u``.

    Greedy: the arg-max. Otherwise the inverse of the cumulative distribution over the kept tokens
    in index order: the first token whose cumulative weight exceeds ``u`` times the total. Weights
    are ``exp((logit - max) / temperature)`` in float64.
    """
    if decoding.temperature == 0.0:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64)
    weights = np.exp((scores - scores.max()) / decoding.temperature)
    if 0 < decoding.top_k < len(weights) or decoding.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")  # descending, ties to the lowest index
        if 0 < decoding.top_k < len(order):
            order = order[: decoding.top_k]
        if decoding.top_p < 1.0:
            mass = np.cumsum(weights[order])
            order = order[: int(np.searchsorted(mass, decoding.top_p * mass[-1])) + 1]
        kept = np.zeros_like(weights)
        kept[order] = weights[order]
        weights = kept
    mass = np.cumsum(weights)
    chosen = int(np.searchsorted(mass, u * mass[-1], side="right"))
    return min(chosen, int(np.flatnonzero(weights)[-1]))
