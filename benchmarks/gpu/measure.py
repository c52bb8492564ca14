"""What is right, and how long it takes: one function a kind of case, each for one row.

A function returns what belongs into the row: ``errors`` by result (relative RMS against float64,
and that of plain float32 where it was computed), ``faults`` (what is beyond the tolerance),
``seconds``, FLOP and bytes. What it raises makes the row "crashed".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.gpu.cases import (
    EPOCH,
    GREEDY,
    LONG_RUN,
    SAMPLED,
    STEP,
    Case,
)
from benchmarks.gpu.clock import is_stand_in, seconds, seconds_restored, wall
from benchmarks.op_cases import OPS, OpCase
from fastrnn import reference
from fastrnn.backend import Backend, Dims
from fastrnn.bench import make_problem, work
from fastrnn.decoding import Decoding
from fastrnn.reference import PARAM_NAMES
from tests.generation import check, draw
from tests.tolerances import RELATIVE_RMS, relative_rms

SAMPLING = Decoding(temperature=0.9, top_k=5, top_p=0.95, seed=3)
QUICK = 10_000
WARM_SECONDS = 0.1
"""Of calls before a wall clock is read: the device's clocks are low after the host's own work."""
LONG_STEPS, TIMED_STEPS, CHARACTERS = 20_000, 400, (200, 2200)

Found = dict[str, Any]


def measure(backend: Backend, case: Case) -> Found:
    """Run one case."""
    return KINDS[case.kind](backend, case)


# --- Right or wrong ----------------------------------------------------------------------------


def smoke(backend: Backend, case: Case) -> Found:
    """An op, some training steps or a continuation, held to the oracle."""
    if case.op == STEP:
        # Where the oracle is quick, a graph of eight steps too.
        quick = case.dims.T * case.dims.B * case.dims.V < QUICK and not case.toy
        return _steps(backend, case.dims, (1, 8, 1) if quick else (1, 2))
    if case.op in (GREEDY, SAMPLED):
        decoding = Decoding() if case.op == GREEDY else SAMPLING
        return _continuations(backend, case.dims, decoding, 3 if case.toy else 12)
    return _verdict(_op(backend, case))[1]


def _op(backend: Backend, case: Case) -> OpCase:
    """The case of an op, or of a node of the step."""
    name = case.op.removeprefix("node: ")
    if name != case.op:
        from benchmarks.gpu.nodes import node

        return node(backend, name, case.dims)  # type: ignore[arg-type]
    return OPS[case.op](backend, case.dims)


def _verdict(op: OpCase) -> tuple[OpCase, Found]:
    """Run it once against float64."""
    results = op.run()
    errors = {
        r.name: [r.error, r.plain_error if np.isfinite(r.plain_error) else None] for r in results
    }
    return op, {"errors": errors, "faults": op.faults(results)}


def _steps(backend: Backend, dims: Dims, chunks: tuple[int, ...]) -> Found:
    """Losses, norms and parameters along training steps: one by one, then in graphs."""
    problem, _ = make_problem("step", dims)
    run = _Steps(backend, problem, dims)
    params: dict[str, Any] = {n: problem[n].astype(np.float64) for n in PARAM_NAMES}
    h, done = np.zeros((dims.B, dims.H)), 0
    errors: dict[str, list[float | None]] = {"loss": [0.0, None], "norm": [0.0, None]}
    for n in chunks:
        run(n)
        for _ in range(n):
            i = done % len(problem["X"])
            loss, norm, h = reference.train_step(
                problem["X"][i], problem["Y"][i], h, params, float(problem["lr"]),
                float(problem["max_norm"]),
            )  # fmt: skip
            done += 1
        for name, value in (("loss", loss), ("norm", norm)):
            error = relative_rms(backend.get(getattr(run.ws, name)), np.float64(value))
            errors[name] = [max(error, errors[name][0] or 0.0), None]
    for name, want in params.items():
        errors[name] = [relative_rms(backend.get(run.ws.params[name]), want), None]
    limits = dict.fromkeys(params, RELATIVE_RMS["step"]["float32"] * done)
    limits |= dict.fromkeys(("loss", "norm"), RELATIVE_RMS["trajectory"]["float32"])
    return {"errors": errors, "faults": _beyond(errors, limits), "steps": done}


def _beyond(errors: dict[str, list[float | None]], limits: dict[str, float]) -> list[str]:
    return [
        f"{name}: error {error[0]:.3g} > {limits[name]:.3g}"
        for name, error in errors.items()
        if error[0] is None or not error[0] <= limits[name]
    ]


def _continuations(backend: Backend, dims: Dims, decoding: Decoding, num_tokens: int) -> Found:
    """Tokens of three sequences, each held to the definition's choice, and their last states."""
    call = draw(3, 4, num_tokens, dims.H, dims.V, decoding)
    device = {name: backend.put(p) for name, p in call.params.items()}
    tokens, state = backend.generate(device, call.prefix, call.lengths, num_tokens, decoding)
    try:
        error = check(call, tokens, state)
    except AssertionError as wrong:
        return {"errors": {}, "faults": [str(wrong).splitlines()[0]]}
    return {"errors": {"state": [error, None]}, "faults": []}


class _Steps:
    """Runs ``n`` training steps and waits."""

    def __init__(self, backend: Backend, problem: Any, dims: Dims) -> None:
        self.backend, self.problem, self.done = backend, problem, 0
        params = {name: problem[name] for name in PARAM_NAMES}
        self.ws = backend.workspace(dims, problem["tokens"], params)

    def __call__(self, n: int) -> None:
        starts = self.problem["starts"]
        rows = np.arange(self.done, self.done + n) % len(starts)
        lr, max_norm = float(self.problem["lr"]), float(self.problem["max_norm"])
        self.backend.run_steps(self.ws, starts[rows], lr, max_norm, True)
        self.backend.sync()
        self.done += n


# --- How fast ----------------------------------------------------------------------------------


def ops(backend: Backend, case: Case) -> Found:
    """An op against float64, then its device time."""
    op, found = _verdict(_op(backend, case))
    if found["faults"]:
        return found  # what is wrong gets no time
    if op.restore is not None and op.again is not None:
        found["seconds"] = seconds_restored(backend, op.again, op.restore)
    else:
        found["seconds"] = seconds(backend, op.submit)
    return found | asdict(op.work)


def step(backend: Backend, case: Case) -> Found:
    """Training steps, epochs and characters by the wall clock: what a user waits for."""
    if case.op not in (STEP, EPOCH, LONG_RUN):
        return _characters(backend, case)
    problem, _ = make_problem("step", case.dims)
    run = _Steps(backend, problem, case.dims)
    epoch = len(problem["starts"])
    n = {STEP: TIMED_STEPS, EPOCH: epoch, LONG_RUN: LONG_STEPS}[case.op]
    if case.toy:
        n = min(n, epoch)
    run(n)  # compiles, makes room for the batches, captures
    repeats = 1 if case.toy else {STEP: 5, EPOCH: 25, LONG_RUN: 2}[case.op]
    whole = wall(functools.partial(run, n), repeats, 0.0 if case.toy else WARM_SECONDS)
    found: Found = {"errors": {}, "faults": [], "steps": n}
    if not np.isfinite(backend.get(run.ws.loss)):
        found["faults"] = [f"the loss is {float(backend.get(run.ws.loss))}"]
    if case.op == STEP:
        return found | {"seconds": whole / n} | asdict(work("step", case.dims))
    return found | {"seconds": whole}


def _characters(backend: Backend, case: Case) -> Found:
    """Seconds a character, from two lengths: what a call costs however short it is drops out."""
    sequences = 64 if "64" in case.op else 1
    problem, _ = make_problem(f"generate{sequences}", case.dims)
    params = {name: backend.put(problem[name]) for name in PARAM_NAMES}
    lengths = np.full(sequences, problem["prefix"].shape[1], np.int32)
    decoding = SAMPLING if "sampled" in case.op else Decoding()
    few, many = (1, 3) if case.toy else CHARACTERS

    def call(n: int) -> None:
        backend.generate(params, problem["prefix"], lengths, n, decoding)

    call(few)
    repeats, warm = (1, 0.0) if case.toy else (5, WARM_SECONDS)
    times = [wall(functools.partial(call, n), repeats, warm) for n in (few, many)]
    return {
        "errors": {}, "faults": [], "seconds": (times[1] - times[0]) / (many - few),
        "call_seconds": times[0],
    }  # fmt: skip


def torch(backend: Backend, case: Case) -> Found:
    """``fastrnn.torch`` on CUDA tensors against ``nn.RNN``, and ``fastrnn.ops``."""
    from benchmarks.gpu import torch_cases

    errors = torch_cases.CASES[case.op](case.dims, "cpu" if is_stand_in(backend) else "cuda")
    faults = [
        f"{name}: error {error:.3g} > {torch_cases.LIMIT:.3g}"
        for name, error in errors.items()
        if not error <= torch_cases.LIMIT
    ]
    return {"errors": {name: [error, None] for name, error in errors.items()}, "faults": faults}


KINDS: dict[str, Callable[[Backend, Case], Found]] = {
    "smoke": smoke,
    "ops": ops,
    "large": ops,
    "step": step,
    "torch": torch,
}
