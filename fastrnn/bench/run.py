"""A whole run: every workload at every size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from fastrnn.backend import BACKENDS
from fastrnn.bench.contenders import choose_contenders
from fastrnn.bench.first_call import measure_first_call
from fastrnn.bench.measurement import measure
from fastrnn.bench.provenance import commit, machine
from fastrnn.bench.results import BenchResult
from fastrnn.bench.workloads import SIZES, WORKLOADS


def run_bench(
    workloads: Sequence[str] = ("step", "generate"),
    sizes: Sequence[str] = ("headline",),
    *,
    peers: str | Sequence[str] = "installed",
    backends: Sequence[str] | None = None,
    rounds: int = 5,
    turn_seconds: float = 0.25,
    threads: int | None = None,
    limit: float | None = None,
    parallel: int = 1,
    first_call: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Measure fastrnn and its peers on this machine.

    Args:
        workloads: some of :data:`WORKLOADS`. sizes: some of :data:`SIZES`.
        peers, backends: see :func:`choose_contenders`.
        rounds: every contender's turns. turn_seconds: the length of a turn, about.
        threads: threads of each contender, each on a core of its own; None leaves it to the
            libraries and the environment.
        limit: seconds that a contender may take in all; one that needs more is stopped and the
            others go on. None gives each answer five minutes.
        parallel: contenders that start, compile and are checked at the same time. They are timed in
            turns all the same.
        first_call: measure the JIT's first call too, with an empty and with a filled cache.
        progress: called with a line whenever something starts.

    Raises:
        ValueError: a name that does not exist, fewer than one round or start at a time, or a limit
            that is not positive.
    """
    for names, known, what in ((workloads, WORKLOADS, "workload"), (sizes, tuple(SIZES), "size")):
        for name in names:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if parallel < 1:
        raise ValueError(f"parallel must be at least 1, got {parallel}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be a positive number of seconds, got {limit}")
    start = time.monotonic()
    contenders = choose_contenders(peers, backends)
    result = BenchResult(
        machine=machine(),
        commit=commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=[],
        dims={s: {k: getattr(SIZES[s], k) for k in "TBHV"} for s in sizes},
    )
    for workload in workloads:
        for size in sizes:
            measured = measure(
                contenders,
                workload,
                size,
                rounds=rounds,
                turn_seconds=turn_seconds,
                threads=threads,
                limit=limit,
                parallel=parallel,
                progress=progress,
            )
            result.rows += measured.rows
            result.software |= measured.software
            for key, rate in measured.rates.items():
                result.rates[key] = max(rate, result.rates.get(key, 0.0))
    if first_call:
        for contender in contenders:
            if contender.variant in BACKENDS and contender.variant != "numpy":
                progress(f"first call of {contender.label}, with an empty JIT cache")
                result.first_call[contender.name] = measure_first_call(contender.variant)
    result.seconds = time.monotonic() - start
    return result
