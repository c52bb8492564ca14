"""How the run on a GPU reads time, starts sanitizers and tests, and looks for libraries."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import clock, tasks
from benchmarks.gpu.parts import ON_THE_DEVICE, PARTS, TESTS
from benchmarks.gpu.supervisor import ROOT
from fastrnn.backend import open_backend
from fastrnn.backends import numba_cuda


def replay(launch: Callable[[], Any]) -> clock.Replay:
    """A replay whose device takes a millisecond."""
    made = object.__new__(clock.Replay)
    made._stream = contextlib.nullcontext()
    made._launch, made._record, made._wait = launch, lambda i: None, lambda: None
    made._elapsed = lambda: 1.0
    return made


def test_the_device_spins_for_longer_than_the_last_launch_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spins: list[int] = []
    monkeypatch.setattr(clock, "_spin", spins.append)
    monkeypatch.setattr(clock, "IDLE_SECONDS", float("inf"))
    slow = replay(lambda: time.sleep(3e-3))
    assert [slow.seconds() for _ in range(3)] == [1e-3] * 3
    assert spins[0] == clock.LAUNCH_NS
    assert min(spins[1:]) > 3_000_000
    spins.clear()
    quick = replay(lambda: None)
    quick.seconds()
    quick._launch_ns = 0
    quick.seconds()
    assert spins == [clock.LAUNCH_NS] * 2


def test_a_device_that_was_idle_spins_for_a_tenth_of_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spins: list[int] = []
    monkeypatch.setattr(clock, "_spin", spins.append)
    monkeypatch.setattr(clock, "IDLE_SECONDS", -1.0)
    replay(lambda: None).seconds()
    assert spins == [clock.WARM_NS]


def test_a_wall_clock_is_read_after_calls_that_warm_the_device() -> None:
    calls: list[float] = []
    begin = time.perf_counter()

    def call() -> None:
        calls.append(time.perf_counter() - begin)
        time.sleep(1e-3)

    assert clock.wall(call, repeats=3, warm=0.02) >= 1e-3
    assert calls[-3] >= 0.02
    calls.clear()
    clock.wall(call, repeats=3)
    assert len(calls) == 3


def test_a_sanitizer_ends_with_the_workers_exit_status_and_reports_kernels_alone() -> None:
    commands = {part.name: list(part.prefix()) for part in PARTS if part.prefix}
    assert set(commands) == {"memcheck-cupy", "racecheck-cupy"}
    for command in commands.values():
        assert not [word for word in command if word.startswith("--error-exitcode")]
        assert {"--report-api-errors=no", "--launch-timeout=0"} < set(command)


def test_the_tests_of_the_cuda_c_engine_are_those_that_work_on_the_device() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--collect-only", *TESTS]
    done = subprocess.run(
        [*command, "-k", ON_THE_DEVICE],
        cwd=ROOT, env={**os.environ, "FASTRNN_REQUIRE_GPU": "cupy"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert {line.partition("::")[0] for line in chosen} == set(TESTS)
    others = [line for line in chosen if "[cupy" not in line]
    assert others
    assert all("::test_on_a_gpu[" in line for line in others)
    assert not [line for line in chosen if "sm_" in line]


def test_the_probe_looks_for_libraries_where_the_numba_cuda_engine_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(numba_cuda, "nvcc_toolkit", lambda: Path("/toolkit"))
    monkeypatch.setattr(tasks, "_library_version", lambda name: os.environ["CUDA_HOME"])
    saved: list[tasks.Found] = []
    found = tasks.probe(tasks.Task(saved.append, open_backend, "", toy=True))
    assert [found[f"{name} version"] for name in ("nvrtc", "nvjitlink", "nvvm")] == ["/toolkit"] * 3
    assert "CUDA_HOME" not in os.environ
