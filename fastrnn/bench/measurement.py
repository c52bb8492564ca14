"""One workload at one size: check the contenders, then time them in turns."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrnn.bench.contenders import MODE_LABELS, Contender
from fastrnn.bench.problems import (
    CHECK_CHARACTERS,
    MAX_ERROR,
    Arrays,
    make_problem,
    relative_error,
)
from fastrnn.bench.results import Row
from fastrnn.bench.summary import first_of_ours, summarise
from fastrnn.bench.worker import Worker, WorkerError, WorkerTimeoutError
from fastrnn.bench.workloads import SIZES

CONTINUATION = 50
"""Characters a timed call generates at the least: the length of the tutorial's continuations."""
SETTLE_SECONDS = 0.15
"""Idle threads spin after a worker's turn: OpenBLAS's for up to 0.1 s, OpenMP's for some 5 ms."""
GPU_SETTLE_SECONDS = 0.02
"""The same where all contenders compute on a GPU: the host's threads have nothing to do there."""


class Measurement(NamedTuple):
    """Rows of the contenders, the machine's rates (empty for workloads other than ``step``), and
    the libraries' versions and thread pools by contender.
    """

    rows: list[Row]
    rates: dict[str, float]
    software: dict[str, dict[str, Any]]


def measure(
    contenders: Sequence[Contender],
    workload: str,
    size: str,
    *,
    rounds: int = 5,
    turn_seconds: float = 0.25,
    threads: int | None = None,
    limit: float | None = None,
    parallel: int = 1,
    progress: Callable[[str], None] = lambda message: None,
) -> Measurement:
    """Check and time ``contenders`` on one workload and size, interleaved.

    ``limit`` and ``parallel`` are those of :func:`~fastrnn.bench.run.run_bench`.
    """
    dims = SIZES[size]
    problem, expected = make_problem(workload, dims)
    contenders = [c for c in contenders if workload in c.workloads]
    rows = {c.name: _row(c, workload, size) for c in contenders}
    on_gpu = all(c.device == "cuda" for c in contenders)
    settle = GPU_SETTLE_SECONDS if on_gpu else SETTLE_SECONDS
    rates: dict[str, float] = {}
    software: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "problem.npz"
        np.savez(path, **problem)  # type: ignore[arg-type]
        started: dict[str, Worker] = {}

        def start(c: Contender) -> None:
            row = rows[c.name]
            progress(f"{workload} {size}: starting {row.label}")
            with _failing(row):
                worker = Worker(c, workload, path, threads=threads, limit=limit)
                started[c.name] = worker
                if "missing" in worker.report:
                    row.status, row.reason = "missing", worker.report["missing"]
                elif "unbuilt" in worker.report:
                    row.status = "failed" if c.ours else "missing"
                    row.reason = f"cannot be built: {worker.report['unbuilt']}"
                else:
                    _check(worker, row, workload, expected, Path(folder))

        try:
            if parallel == 1:
                for c in contenders:
                    start(c)
            else:
                with ThreadPoolExecutor(parallel) as pool:
                    list(pool.map(start, contenders))
        finally:
            for worker in started.values():
                stack.callback(worker.close)
            for worker in started.values():  # they are dismissed together before one is awaited
                stack.callback(worker.dismiss)
        for c in contenders:
            if c.name in started and "versions" in (report := started[c.name].report):
                software[c.name] = {key: report[key] for key in ("versions", "pools")}
        workers = {c.name: started[c.name] for c in contenders if rows[c.name].status == "ok"}
        shares: dict[str, tuple[int, int]] = {}
        for name, worker in list(workers.items()):
            with _failing(rows[name]):
                once = min(worker.ask(do="time", units=1, repeats=3)["seconds"])
                least = CONTINUATION if workload.startswith("generate") else 1
                units = max(least, round(2e-3 / once))
                if units > 1:  # what a call does once is now in the time of many units
                    once = min(worker.ask(do="time", units=units, repeats=3)["seconds"])
                shares[name] = (units, max(3, min(500, int(turn_seconds / (units * once)))))
        for i in range(rounds):
            names = [n for n in workers if n in shares and rows[n].status == "ok"]
            for name in names[i % max(1, len(names)) :] + names[: i % max(1, len(names))]:
                progress(f"{workload} {size}: round {i + 1} of {rounds}, {rows[name].label}")
                time.sleep(settle)
                with _failing(rows[name]):
                    units, repeats = shares[name]
                    answer = workers[name].ask(do="time", units=units, repeats=repeats)
                    rows[name].rounds.append(statistics.median(answer["seconds"]))
                    if rows[name].device == "cpu":  # a GPU's memory is not the process's
                        rows[name].extra_bytes = answer["extra_bytes"]
                    idle = rows[name].idle_cpu or 0.0
                    rows[name].idle_cpu = max(idle, answer["idle_cpu"])
            on_cpu = [r for r in rows.values() if r.device == "cpu"]
            if workload == "step" and (ours := first_of_ours(on_cpu)) is not None:
                with _failing(ours):
                    time.sleep(SETTLE_SECONDS)
                    for key, rate in workers[ours.name].ask(do="machine").items():
                        rates[key] = max(rate, rates.get(key, 0.0))
    summarise(list(rows.values()), dims, rates)
    return Measurement(list(rows.values()), rates, software)


def _row(c: Contender, workload: str, size: str) -> Row:
    """A contender's row, still without times."""
    mode = c.mode_of(workload)
    label = f"{c.label}{MODE_LABELS[mode]}"
    return Row(workload, size, c.name, label, c.ours, c.device, mode, c.precision)


@contextlib.contextmanager
def _failing(row: Row) -> Iterator[None]:
    """A worker that ends costs its own row, nobody else's."""
    try:
        yield
    except WorkerTimeoutError as error:
        row.status, row.reason, row.rounds = "stopped", str(error), []
    except WorkerError as error:
        row.status, row.reason, row.rounds = "failed", str(error), []


def _check(
    worker: Worker, row: Row, workload: str, expected: Sequence[Arrays], folder: Path
) -> None:
    """Compare a contender's results with the oracle's; fill in its start report."""
    report = worker.report
    row.start_seconds = report["build_seconds"] + report["first_seconds"]
    results = folder / f"{row.name}.npz"
    units = CHECK_CHARACTERS if workload.startswith("generate") else 1
    worker.ask(do="check", units=units, times=len(expected), path=str(results))
    with np.load(results) as stored:
        row.error = relative_error(stored, expected)
    limit = MAX_ERROR[worker.contender.precision]
    if not row.error <= limit:
        row.status = "wrong"
        row.reason = f"relative error {row.error:.2g} against the oracle, allowed {limit:g}"
