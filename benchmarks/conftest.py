"""Sizes, fixtures and what is recorded with each benchmark.

With ``--benchmark-enable`` the sizes are those of :data:`fastrnn.bench.SIZES`; without it every
benchmark runs once at toy sizes, as a test. Every benchmark asserts its result before it is timed.
Saved runs are split by machine, CPU and GPU model included.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.peers.worker import copy_bandwidth, machine_rates
from fastrnn.backend import Backend, Dims, available_backends, open_backend
from fastrnn.bench import HEADLINE, SETTLE_SECONDS, SIZES, machine, machine_slug, make_problem, work

AVAILABLE = available_backends()
BACKENDS = [name for name, reason in AVAILABLE.items() if reason is None]

TOY_SIZES = {"tiny": SIZES["tiny"], "odd": Dims(T=3, B=5, H=33, V=41)}
OP_SIZES = {name: SIZES[name] for name in ("headline", "B1", "H1024")}
STEP_SIZES = {name: SIZES[name] for name in SIZES if name != "tiny"}
SWEEPS = {
    "T": (8, 17, 35, 70, 140),
    "B": (1, 8, 32, 64, 128),
    "H": (64, 128, 256, 512),
    "V": (256, 512, 1027, 2048, 4096),
}
TOY_SWEEPS = {"T": (2, 5), "B": (1, 3), "H": (8, 17), "V": (5, 31)}


def pytest_configure(config: pytest.Config) -> None:
    if config.option.benchmark_enable and config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks are timed in one process: add -n 0")
    if config.option.benchmark_storage == "file://./.benchmarks":
        config.option.benchmark_storage += "/" + machine_slug(machine())


def pytest_report_header() -> list[str]:
    return [f"not on this machine: {reason}" for reason in AVAILABLE.values() if reason]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info.pop("node", None)
    machine_info["fastrnn"] = {k: v for k, v in machine().items() if k != "load"}
    machine_info["backends"] = {name: open_backend(name).describe() for name in BACKENDS}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    """Keep what the report reads: it is to be committed."""
    kept = ("min", "max", "median", "iqr", "rounds", "iterations")
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {key: benchmark["stats"][key] for key in kept}
        for key in ("options", "fullname", "params", "param"):
            benchmark.pop(key, None)
    output_json["machine_info"].get("cpu", {}).pop("flags", None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fixtures ``backend``, ``size`` (by the test's ``sizes`` marker) and ``sweep``."""
    timed = metafunc.config.getoption("benchmark_enable")
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", BACKENDS)
    if "size" in metafunc.fixturenames:
        module_sizes = getattr(metafunc.module, "TIMED_SIZES", OP_SIZES)
        metafunc.parametrize("size", list(module_sizes if timed else TOY_SIZES))
    if "sweep" in metafunc.fixturenames:
        points = [(k, v) for k, vs in (SWEEPS if timed else TOY_SWEEPS).items() for v in vs]
        metafunc.parametrize("sweep", points, ids=[f"{k}={v}" for k, v in points])


@pytest.fixture
def backend(backend_name: str) -> Backend:
    return open_backend(backend_name)


@pytest.fixture
def dims(size: str) -> Dims:
    return TOY_SIZES.get(size) or SIZES[size]


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest) -> dict[str, float] | None:
    """SGEMM rate and copy bandwidth of this process; None when nothing is timed."""
    if not request.config.getoption("benchmark_enable"):
        return None
    return machine_rates(make_problem("recurrence", HEADLINE)[0])


Timed = Callable[..., None]


@pytest.fixture
def timed(benchmark: Any, rates: dict[str, float] | None, backend: Backend) -> Timed:
    """Time a call in a group and record its figures: FLOP, bytes, % of the floor, tokens/s.

    ``units`` is how many times a call does the ``op``, ``tokens`` how many tokens it handles;
    ``setup`` runs before every round, outside the timer.
    """

    def run(
        group: str,
        op: str,
        dims: Dims,
        call: Callable[..., Any],
        *args: Any,
        tokens: int = 0,
        units: int = 1,
        setup: Callable[[], None] | None = None,
        **more: Any,
    ) -> None:
        benchmark.group = group
        needed = work(op, dims)
        info = benchmark.extra_info
        info |= {"backend": backend.name, "op": op, "dims": {k: getattr(dims, k) for k in "TBHV"}}
        info |= {"flop": needed.flop * units, "bytes": needed.bytes * units, **more}
        if rates is not None:
            time.sleep(SETTLE_SECONDS)  # the BLAS that checked the result spins on
        if setup is None:
            benchmark(call, *args)
        else:
            benchmark.pedantic(call, args=args, setup=setup, rounds=40, warmup_rounds=2)
        if benchmark.stats is None:  # not timed
            return
        seconds = benchmark.stats.stats.median
        info["gflops"] = info["flop"] / seconds / 1e9
        if tokens:
            info["tokens_per_second"] = tokens / seconds
        # The rates are this process's CPU's; a GPU's floor is not theirs.
        if rates is not None and backend.name in ("numba", "numpy"):
            bandwidth = _bandwidth(2 ** round(math.log2(needed.bytes)))
            floor = needed.floor_seconds(rates["flops"], bandwidth) * units
            info |= {"floor_seconds": floor, "percent_of_floor": 100 * floor / seconds}
            info["rates"] = rates

    return run


@functools.cache
def _bandwidth(nbytes: int) -> float:
    return copy_bandwidth(nbytes, repeats=20)
