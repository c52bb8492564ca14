"""The inputs of a workload, and what the float64 oracle makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn import reference
from fastrnn.backend import Dims
from fastrnn.bench.workloads import WORKLOADS

Arrays = dict[str, NDArray[Any]]

MAX_ERROR = {"float32": 1e-4, "TF32": 2e-2}
"""Relative error against the float64 oracle above which a contender gets no time. Losses of three
steps and gradients through T steps of float32 stay below 1e-5; TF32 keeps 11 bits of a product."""

CHECK_STEPS = 3
CHECK_CHARACTERS = 12


def zipf_tokens(rng: np.random.Generator, n: int, V: int) -> NDArray[np.int32]:
    """Tokens distributed like the characters of a text: the r-th most frequent as 1 / (r + 2.7)."""
    p = 1.0 / (np.arange(V) + 2.7)
    return rng.permutation(V)[rng.choice(V, size=n, p=p / p.sum())].astype(np.int32)


def make_problem(workload: str, dims: Dims, seed: int = 0) -> tuple[Arrays, list[Arrays]]:
    """The inputs of a workload, and what the float64 oracle makes of them.

    Returns:
        The problem, and the expected results of the check, one dict a call of ``result()``.
    """
    T, B, H, V = dims.T, dims.B, dims.H, dims.V
    rng = np.random.default_rng([seed, T, B, H, V])
    f32 = np.float32

    def normal(*shape: int, scale: float = 1.0) -> NDArray[Any]:
        return (rng.standard_normal(shape) * scale).astype(f32)

    problem: Arrays = dict(reference.init_params(V, H, seed))
    problem["h0"] = np.zeros((B, H), f32)
    if workload.startswith("generate"):
        # Larger weights than a fresh model's: its arg-max would hang on the last bit.
        S = int(workload.removeprefix("generate") or 1)
        problem |= {
            "W_xh": normal(V, H, scale=0.5),
            "W_hh": normal(H, H, scale=H**-0.5),
            "W_hq": normal(H, V, scale=H**-0.5),
            "b_q": normal(V, scale=0.1),
            "prefix": rng.integers(0, V, (S, 2)).astype(np.int32),
        }
        wide = _wide(problem)
        rows = [reference.predict(row, CHECK_CHARACTERS, wide) for row in problem["prefix"]]
        return problem, [{"tokens": np.stack(rows)}]
    batches = 8
    tokens = zipf_tokens(rng, B * (batches * T + 1), V)
    starts = np.arange(B) * (batches * T + 1) + np.arange(batches)[:, None] * T
    index = starts[:, None, :] + np.arange(T)[None, :, None]
    problem |= {
        "tokens": tokens,
        "starts": starts.astype(np.int32),
        "X": tokens[index],
        "Y": tokens[index + 1],
        "lr": np.asarray(100.0, f32),
        "max_norm": np.asarray(0.01, f32),
    }
    if workload == "step":
        wide, h = _wide(problem), np.zeros((B, H))
        losses = []
        for i in range(CHECK_STEPS):
            loss, _, h = reference.train_step(
                problem["X"][i], problem["Y"][i], h, wide, 100.0, float(problem["max_norm"])
            )
            losses.append({"loss": np.asarray(loss)})
        return problem, losses
    if workload == "cross_entropy":
        problem |= {"logits": normal(T, B, V), "targets": problem["Y"][0]}
        logits = problem["logits"].astype(np.float64)
        d = np.exp(reference.log_softmax(logits))
        np.add.at(d, (*np.indices((T, B)), problem["targets"]), -1.0)
        loss = reference.cross_entropy(logits, problem["targets"])
        return problem, [{"loss": np.asarray(loss), "dlogits": d / (T * B)}]
    if workload not in ("recurrence", "recurrence+bptt"):
        raise ValueError(f"unknown workload {workload!r}: expected one of {', '.join(WORKLOADS)}")
    problem |= {
        "z": normal(T, B, H, scale=0.5),
        "W_hh": normal(H, H, scale=H**-0.5),
        "h0": normal(B, H, scale=0.5),
        "dh": normal(T, B, H),
    }
    z, W, h0, dh = (problem[n].astype(np.float64) for n in ("z", "W_hh", "h0", "dh"))
    hs = [h0]
    for t in range(T):
        hs.append(np.tanh(z[t] + hs[-1] @ W))
    if workload == "recurrence":
        return problem, [{"h": np.stack(hs[1:])}]
    dz, dW, back = np.empty_like(dh), np.zeros_like(W), np.zeros_like(h0)
    for t in reversed(range(T)):
        dz[t] = (dh[t] + back) * (1 - hs[t + 1] ** 2)
        dW += hs[t].T @ dz[t]
        back = dz[t] @ W.T
    return problem, [{"dz": dz, "dW_hh": dW, "dh0": back}]


def _wide(problem: Arrays) -> reference.Params:
    return {name: problem[name].astype(np.float64) for name in reference.PARAM_NAMES}


def relative_error(results: Mapping[str, NDArray[Any]], expected: Sequence[Arrays]) -> float:
    """The largest relative RMS error of any result; infinite for tokens or shapes that differ."""
    worst = 0.0
    for name in expected[0]:
        want = np.stack([e[name] for e in expected])
        got = np.asarray(results[name])
        if got.shape != want.shape:
            return float("inf")
        if name == "tokens":
            error = 0.0 if np.array_equal(got, want) else float("inf")
        else:
            # by result, so that one small loss among large ones is not drowned
            flat_got, flat_want = got.reshape(len(want), -1), want.reshape(len(want), -1)
            difference = np.linalg.norm(flat_got.astype(np.float64) - flat_want, axis=1)
            error = float(np.max(difference / np.linalg.norm(flat_want, axis=1)))
        if not error <= worst:  # NaN is worse than anything
            worst = error
    return float("inf") if np.isnan(worst) else worst
