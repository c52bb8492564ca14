"""The logic of the benchmarks: checks before times, missing peers, ratios, the gate, the report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import compare, gate, report
from benchmarks.peers import worker
from fastrnn import bench
from fastrnn.backends.cupy_cuda import CupyBackend
from fastrnn.bench import BenchResult, Contender, Row, provenance
from fastrnn.bench.paths import PACKAGE
from fastrnn.bench.summary import summarise
from fastrnn.bench.worker import environment
from tests.emulated_device import EmulatedDevice
from tests.emulator.require import require_emulator

PNG = b"\x89PNG\r\n"


def row(name: str, rounds: list[float], **more: Any) -> Row:
    settings: dict[str, Any] = {
        "workload": "step",
        "size": "headline",
        "ours": False,
        "device": "cpu",
    } | more
    return Row(name=name, label=f"the {name}", rounds=rounds, **settings)


@pytest.fixture
def result() -> BenchResult:
    """A small result: ours, two peers, one that is missing."""
    rows = [
        row("numba", [0.010, 0.012, 0.011], ours=True),
        row("jax-scan", [0.015, 0.024, 0.011]),
        row("tf-eager", [0.1, 0.12, 0.11]),
        row("torch-compile", [], status="missing", reason="No module named 'torch'"),
    ]
    rates = {"flops": 2.2e11, "bandwidth": 3e10}
    summarise(rows, bench.HEADLINE, rates)
    for workload, size in (("recurrence+bptt", "headline"), ("recurrence+bptt", "B1")):
        pair = [
            row("numba", [1e-3, 1e-3], ours=True, workload=workload, size=size),
            row("jax-scan", [2e-3, 2e-3], workload=workload, size=size),
        ]
        summarise(pair, bench.SIZES[size], {})
        rows += pair
    return BenchResult(
        machine={
            "cpu": "Some CPU @ 2.6 GHz",
            "cores": 2,
            "memory_gib": 16.0,
            "gpus": [],
            "system": "Linux x86_64",
            "python": "3.11.7",
            "numpy": "2.0.0",
            "blas": ["openblas 0.3.30 (SkylakeX, 2 threads)"],
            "thread_environment": {},
            "load": 0.1,
        },
        commit={"id": "0123456789abcdef", "time": "2026-01-02T03:04:05+00:00", "dirty": False},
        date="2026-01-02 03:04 UTC",
        rows=rows,
        dims={s: {k: getattr(bench.SIZES[s], k) for k in "TBHV"} for s in ("headline", "B1")},
        rates=rates,
        first_call={"numba": {"cold": 9.0, "warm": 0.5}},
    )


def suite() -> list[dict[str, Any]]:
    """Benchmarks as the suite's JSON holds them: two ops at the headline size and four sweeps."""

    def benchmark(group: str, op: str, dims: Any, seconds: float, **more: Any) -> dict[str, Any]:
        needed = bench.work(op, dims)
        info = {
            "backend": "numba",
            "op": op,
            "dims": {k: getattr(dims, k) for k in "TBHV"},
            "flop": needed.flop,
            "bytes": needed.bytes,
            "gflops": needed.flop / seconds / 1e9,
            "rates": {"flops": 2e11, "bandwidth": 3e10},
            "percent_of_floor": 42.0,
            **more,
        }
        stats = {"median": seconds, "min": seconds, "max": seconds}
        return {"group": group, "name": f"test_{group}", "extra_info": info, "stats": stats}

    found = [
        benchmark("project", "project", bench.HEADLINE, 3e-3),
        benchmark("gather", "gather", bench.HEADLINE, 1e-4),
    ]
    for letter in "TBHV":
        for factor in (1, 2):
            value = getattr(bench.HEADLINE, letter) * factor
            dims = dataclasses.replace(bench.HEADLINE, **{letter: value})
            found.append(
                benchmark(f"scaling in {letter}", "step", dims, 1e-2 * factor, sweep=letter)
            )
    return found


# --- Work and errors -------------------------------------------------------------------------


def test_a_headline_step_has_the_documented_work() -> None:
    assert bench.work("step", bench.HEADLINE).flop == pytest.approx(2.21e9, rel=2e-3)
    products = ("recurrence", "recurrence_backward", "project", "project_backward")
    parts = sum(bench.work(op, bench.HEADLINE).flop for op in products)
    assert bench.work("step", bench.HEADLINE).flop == parts


def test_the_floor_is_the_slower_of_compute_and_memory() -> None:
    work = bench.Work(flop=100.0, bytes=10.0)
    assert work.floor_seconds(flops=10.0, bandwidth=100.0) == 10.0
    assert work.floor_seconds(flops=1000.0, bandwidth=1.0) == 10.0


def test_relative_error_rejects_what_is_not_the_oracles() -> None:
    want = [{"loss": np.asarray(2.0)}, {"loss": np.asarray(4.0)}]
    assert bench.relative_error({"loss": np.array([2.0, 4.0])}, want) == 0.0
    assert bench.relative_error({"loss": np.array([2.0, 4.4])}, want) == pytest.approx(0.1)
    assert bench.relative_error({"loss": np.array([np.nan, 4.0])}, want) == np.inf
    assert bench.relative_error({"loss": np.array([2.0, np.nan])}, want) == np.inf
    assert bench.relative_error({"loss": np.array([2.0])}, want) == np.inf
    tokens = [{"tokens": np.array([[1, 2]])}]
    assert bench.relative_error({"tokens": np.array([[[1, 2]]])}, tokens) == 0.0
    assert bench.relative_error({"tokens": np.array([[[1, 3]]])}, tokens) == np.inf


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234, "1.23 s"),
        (0.01234, "12.3 ms"),
        (0.9996e-3, "1000 µs"),
        (1.5e-7, "0.150 µs"),
        (2e-4, "200 µs"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert bench.format_seconds(seconds) == text


def test_zipf_tokens_are_tokens() -> None:
    tokens = bench.zipf_tokens(np.random.default_rng(0), 5000, 40)
    assert tokens.dtype == np.int32
    assert tokens.min() >= 0
    assert tokens.max() < 40
    counts = np.sort(np.bincount(tokens))
    assert counts[-1] > 5 * counts[0]


# --- Workers ---------------------------------------------------------------------------------

ODD_PEER = """
import os, sys
import numpy as np
import numpy_reference

def versions():
    return {}

class Step(numpy_reference.Step):
    def __init__(self, problem, variant):
        if variant == "unclipped":
            problem = {**problem, "max_norm": np.float32(1e9)}
        super().__init__(problem, variant)
        self.variant, self.calls = variant, 0

    def run(self, n):
        print("frameworks print what they like")
        self.calls += 1
        if self.variant == "dies" and self.calls == 3:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        super().run(n)

WORKLOADS = {"step": Step}
"""


@pytest.fixture
def peer(tmp_path: Path) -> Any:
    """Peers of a file of this test's own, by variant: "right", "unclipped", "dies"."""
    (tmp_path / "odd_peer.py").write_text(ODD_PEER)
    root = PACKAGE.parent

    def make(variant: str, module: str = "odd_peer") -> Contender:
        paths = f"{tmp_path}:{root}"
        env = {"PYTHONPATH": paths}
        return Contender(variant, variant, module, variant, ("step",), env=env)

    return make


def test_rows_of_right_wrong_dying_and_missing_contenders(peer: Any) -> None:
    contenders = [
        bench.backend_contender("numpy"),
        peer("right"),
        peer("unclipped"),
        peer("dies"),
        peer("absent", module="no_such_peer"),
    ]
    rows, rates, software = bench.measure(contenders, "step", "tiny", rounds=2, turn_seconds=0.002)
    by_name = {r.name: r for r in rows}
    assert [r.status for r in rows] == ["ok", "ok", "wrong", "failed", "missing"]
    assert by_name["numpy"].ratio == 1.0
    right = by_name["right"]
    assert right.seconds is not None
    assert right.seconds > 0
    assert right.error is not None
    assert right.error < 1e-5
    assert right.ratio is not None
    assert right.ratio_low is not None
    assert right.ratio_high is not None
    assert right.ratio_low <= right.ratio <= right.ratio_high
    for name in ("unclipped", "dies", "absent"):
        assert by_name[name].seconds is None
    assert "against the oracle" in by_name["unclipped"].reason
    assert "out of luck" in by_name["dies"].reason
    assert "no_such_peer" in by_name["absent"].reason
    assert rates["flops"] >= rates["flops_as_found"] > 0
    assert rates["bandwidth"] > 0
    assert software["numpy"]["versions"]["numpy"] == np.__version__


def test_the_sgemm_rate_is_that_of_the_best_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rates = {"SkylakeX": 7e11, "Cooperlake": 0.0}  # without bfloat16 there are no such kernels

    def as_told(coretype: str, n: int, H: int, V: int) -> float:
        asked.append(coretype)
        assert (n, H, V) == (12, 16, 27)
        return rates[coretype]

    monkeypatch.setattr(worker, "sgemm_rate_as", as_told)
    monkeypatch.setattr(worker, "sgemm_rate", lambda n, H, V: 3e11)
    monkeypatch.setattr(worker, "copy_bandwidth", lambda nbytes: 1e10)
    problem = {"X": np.zeros((1, 3, 4)), "W_hq": np.zeros((16, 27))}
    for cpu, best in (("Epyc (AVX-512)", 7e11), ("Epyc (AVX2)", 3e11)):
        monkeypatch.setattr(provenance, "cpu_model", lambda cpu=cpu: cpu)
        found = worker.machine_rates(problem)
        assert found == {"flops": best, "flops_as_found": 3e11, "bandwidth": 1e10}
    assert asked == list(rates)


def test_the_sgemm_rate_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.sgemm_rate_as("Haswell", 24, 16, 27) > 0
    monkeypatch.setattr(sys, "executable", "false")
    assert worker.sgemm_rate_as("Haswell", 24, 16, 27) == 0


def test_the_rates_are_told_with_what_the_blas_takes_by_itself() -> None:
    line = report.rates_line({"flops": 5e11, "flops_as_found": 2.5e11, "bandwidth": 4e10})
    assert "500 GFLOP/s (250 with the kernels that OpenBLAS takes here by itself)" in line
    same = "Best SGEMM on the step's shapes 500 GFLOP/s, copy 40 GB/s."
    assert report.rates_line({"flops": 5e11, "flops_as_found": 4.9e11, "bandwidth": 4e10}) == same
    assert report.rates_line({"flops": 5e11, "bandwidth": 4e10}) == same


def test_a_worker_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "problem.npz", X=np.zeros(1))
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    sleeper = Contender(
        "sleeper", "sleeper", "sleeper", "", ("step",), env={"PYTHONPATH": str(tmp_path)}
    )
    with pytest.raises(bench.WorkerError, match=r"no answer within 2 s"):
        bench.Worker(sleeper, "step", tmp_path / "problem.npz", limit=2)


def test_a_worker_keeps_to_its_cores(peer: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "problem.npz", **bench.make_problem("step", bench.SIZES["tiny"])[0])  # type: ignore[arg-type]
    worker = bench.Worker(peer("right"), "step", tmp_path / "problem.npz", threads=1)
    try:
        assert worker.report["cores"] == 1
    finally:
        worker.close()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown workload 'walk'"):
        bench.run_bench(["walk"])
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        bench.run_bench(["step"], ["huge"])
    with pytest.raises(ValueError, match="unknown peer 'theano'"):
        bench.choose_contenders(["theano"])
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        bench.choose_contenders("none", ["abacus"])
    with pytest.raises(ValueError, match="peers must be"):
        bench.choose_contenders("some")
    with pytest.raises(ValueError, match="rounds"):
        bench.run_bench(rounds=0)


def test_run_bench_measures_our_backend() -> None:
    result = bench.run_bench(
        ["step"], ["tiny"], peers="none", backends=["numpy"], rounds=1, turn_seconds=0.002
    )
    found = result.find("step", "tiny", "numpy")
    assert found is not None
    assert found.status == "ok", found.reason
    assert result.machine["cores"] >= 1
    assert "fastrnn numpy" in result.table()


def test_the_first_call_is_measured_once_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrnn.bench import run

    monkeypatch.setattr(run, "measure", lambda *args, **options: bench.Measurement([], {}, {}))
    monkeypatch.setattr(run, "measure_first_call", lambda backend: {"cold": 2.0, "warm": 1.0})
    result = bench.run_bench(
        ["step"], ["tiny"], peers=["jax-scan"], backends=["cupy", "numpy"], first_call=True
    )
    assert result.first_call == {"cupy": {"cold": 2.0, "warm": 1.0}}


def test_every_peer_has_its_file() -> None:
    names = [p.name for p in bench.PEERS]
    assert len(set(names)) == len(names)
    for p in bench.PEERS:
        assert (bench.PEER_FOLDER / f"{p.module}.py").is_file(), p.name
        assert set(p.workloads) <= set(bench.WORKLOADS), p.name


# --- A GPU's contenders ----------------------------------------------------------------------


def test_every_contender_of_a_gpu_run_exists_and_runs_its_workload() -> None:
    known = {p.name: p for p in bench.PEERS}
    for peers in (bench.GPU_PEERS, bench.GPU_SLOW_PEERS):
        for workload, names in peers.items():
            for name in names:
                assert known[name].device == "cuda", name
                assert workload in known[name].workloads, name
    assert {p.mode_of("step") for p in bench.PEERS if p.device == "cpu"} == {""}
    assert {p.mode for p in bench.PEERS} <= set(bench.MODES)


def test_a_gpu_backend_takes_part_eagerly_and_as_a_graph() -> None:
    graph, eager = bench.choose_contenders("none", ["cupy"])
    assert (graph.name, eager.name) == ("cupy-graph", "cupy")
    assert graph.workloads == ("recurrence", "recurrence+bptt", "cross_entropy")
    assert (graph.mode_of("recurrence"), eager.mode_of("recurrence")) == ("graph", "eager")
    assert eager.mode_of("step") == "graph"
    assert [c.name for c in bench.choose_contenders("none", ["numba"])] == ["numba"]


def test_labels_name_the_mode_and_the_precision() -> None:
    names = ("cudnn-graph", "cudnn", "cudnn-graph-tf32", "jax-scan-cuda", "jax-scan")
    contenders = [c for c in bench.PEERS if c.name in names]
    contenders = [dataclasses.replace(c, module="no_such_peer") for c in contenders]
    contenders += bench.choose_contenders("none", ["cupy"])[1:]
    rows = {r.name: r for r in bench.measure(contenders, "step", "tiny", rounds=1).rows}
    assert rows["cudnn-graph"].label == "torch nn.RNN (cuDNN), gather, CUDA graph"
    assert rows["cudnn"].label == "torch nn.RNN (cuDNN), gather, eager"
    assert rows["cudnn-graph-tf32"].label == "torch nn.RNN (cuDNN, TF32), gather, CUDA graph"
    assert rows["jax-scan-cuda"].label == rows["jax-scan"].label == "JAX scan + jit"
    assert rows["cupy"].label == "fastrnn cupy, CUDA graph"
    assert (rows["cudnn-graph-tf32"].precision, rows["cudnn"].precision) == ("TF32", "float32")
    assert (rows["jax-scan-cuda"].mode, rows["jax-scan"].mode) == ("jit", "")


def gpu_rows() -> list[Row]:
    def on_gpu(name: str, mode: str, seconds: float, **more: Any) -> Row:
        return row(name, [seconds], device="cuda", mode=mode, **more)

    return [
        on_gpu("cupy", "eager", 4.0, ours=True),
        on_gpu("cupy-graph", "graph", 1.0, ours=True),
        on_gpu("numba-cuda-graph", "graph", 0.5, ours=True),
        on_gpu("cudnn", "eager", 12.0),
        on_gpu("cudnn-graph", "graph", 6.0),
        on_gpu("cudnn-graph-tf32", "graph", 2.0, precision="TF32"),
        on_gpu("jax-scan-cuda", "jit", 8.0),
        row("jax-scan", [0.1]),
    ]


def test_ratios_pair_graphs_with_graphs() -> None:
    rows = gpu_rows()
    summarise(rows, bench.HEADLINE, {})
    assert {r.name: r.ratio for r in rows} == {
        "cupy": 1.0,
        "cupy-graph": 1.0,
        "numba-cuda-graph": 0.5,
        "cudnn": 3.0,
        "cudnn-graph": 6.0,
        "cudnn-graph-tf32": 2.0,
        "jax-scan-cuda": 8.0,
        "jax-scan": None,
    }


def test_the_best_peer_of_a_mode() -> None:
    rows = gpu_rows()
    summarise(rows, bench.HEADLINE, {})
    result = BenchResult({}, {}, "", rows, {})

    def best(*which: str) -> str | None:
        found = result.best_peer("step", "headline", *which)
        return found.name if found else None

    assert best("graph") == best() == "cudnn-graph"
    assert best("eager") == "jax-scan-cuda"
    assert best("graph", "TF32") == "cudnn-graph-tf32"
    assert result.best_peer("generate", "headline") is None


def test_results_without_modes_can_be_read() -> None:
    paths = sorted(Path("benchmarks/results").glob("*/peers.json"))
    assert paths
    for path in paths:
        stored = BenchResult.from_json(path.read_text())
        assert {r.mode for r in stored.rows} == {""}
        assert {r.precision for r in stored.rows} == {"float32"}


def test_ops_from_graphs_agree_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator records and replays; other inputs under the same graph give other results."""
    require_emulator()
    monkeypatch.syspath_prepend(str(bench.PEER_FOLDER))
    peer = importlib.import_module("fastrnn_backend")
    monkeypatch.setattr(peer.fastrnn, "open_backend", lambda name: CupyBackend(EmulatedDevice()))
    for workload in ("recurrence", "recurrence+bptt", "cross_entropy"):
        problem, expected = bench.make_problem(workload, bench.SIZES["tiny"])
        contender = peer.WORKLOADS[workload](problem, "cupy-graph")
        first = contender.names[0]
        contender.backend.put(np.zeros_like(problem[first]), out=contender.a[first])
        contender.run(17)
        contender.backend.put(problem[first], out=contender.a[first])
        contender.run(1)
        found = {k: np.asarray(a)[None] for k, a in contender.result().items()}
        assert bench.relative_error(found, expected) < 1e-5, workload


def test_numba_cuda_records_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrnn.backends import numba_cuda

    monkeypatch.syspath_prepend(str(bench.PEER_FOLDER))
    peer = importlib.import_module("fastrnn_backend")
    said: list[Any] = []

    @contextlib.contextmanager
    def block(name: str) -> Iterator[None]:
        said.append(f"{name} begins")
        yield
        said.append(f"{name} ends")

    class Graph:
        def __init__(self, stream: Any) -> None:
            said.append(stream)

        def capture(self) -> Any:
            return block("capture")

        def launch(self) -> None:
            said.append("launch")

    driver = SimpleNamespace(defer_cleanup=lambda: block("no frees"))
    monkeypatch.setattr(numba_cuda, "Graph", Graph)
    monkeypatch.setattr(numba_cuda, "maintained_cuda", lambda: driver)
    backend = SimpleNamespace(name="numba-cuda", stream="stream 9")
    replay = peer.record(backend, lambda: said.append("op"), 2)
    replay()
    assert said == [
        "stream 9", "no frees begins", "capture begins", "op", "op", "capture ends",
        "no frees ends", "launch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "workload", "variant"),
    [
        ("torch_rnn", "recurrence", "gather-graph"),
        ("torch_rnn", "recurrence+bptt", "gather-graph"),
        ("torch_cross_entropy", "cross_entropy", "torch-graph"),
        ("torch_loop", "generate", "eager-graph"),
    ],
)
def test_torch_reads_the_results_of_the_graph_it_replayed_last(
    module: str, workload: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures are pretended: what a capture ran is what its replays would leave behind."""
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.syspath_prepend(str(bench.PEER_FOLDER))
    replays: list[int] = []

    def captured(call: Any, undo: Any = None) -> Any:
        call()
        number = len(replays)
        replays.append(0)

        def replay() -> None:
            replays[number] += 1

        return replay

    for name in ("torch_rnn", "torch_loop"):
        monkeypatch.setattr(importlib.import_module(name), "captured", captured)
    problem, expected = bench.make_problem(workload, bench.SIZES["tiny"])
    peer = importlib.import_module(module).WORKLOADS[workload](problem, variant)
    n = bench.CHECK_CHARACTERS if workload == "generate" else 18
    for _ in range(2):
        peer.run(n)
    found = {k: np.asarray(a)[None] for k, a in peer.result().items()}
    assert bench.relative_error(found, expected) < 1e-5
    assert replays == ([2] if workload == "generate" else [2, 4])


@pytest.mark.parametrize("name", ["jax-cross-entropy-cuda", "torch-loop-cuda"])
def test_peers_of_a_gpu_alone_agree_with_the_oracle(name: str) -> None:
    """On the CPU, where they run as well."""
    (peer,) = (p for p in bench.PEERS if p.name == name)
    pytest.importorskip(peer.module.partition("_")[0], reason=f"{peer.module} has no framework")
    here = dataclasses.replace(
        peer, device="cpu", variant=peer.variant.replace("-cuda", "").replace("cuda", "cpu")
    )
    workload = peer.workloads[0]
    (row,) = bench.measure([here], workload, "tiny", rounds=1, turn_seconds=0.01).rows
    assert row.status == "ok", row.reason


def test_replays_take_the_larger_graph_as_often_as_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(bench.PEER_FOLDER))
    replays = importlib.import_module("replays")
    done: list[int] = []

    def record(times: int) -> Any:
        def replay() -> str:
            done.append(times)
            return f"results of the graph of {times}"

        return replay

    run = replays.by_replays(record)
    assert run(2 * replays.MANY + 3) == "results of the graph of 1"
    assert done == [replays.MANY, replays.MANY, 1, 1, 1]
    assert run(replays.MANY) == f"results of the graph of {replays.MANY}"


# --- Limits, starts side by side, what cannot be built ----------------------------------------

SLOW_PEER = """
import os, subprocess, sys, time
import numpy_reference
from pathlib import Path

def versions():
    return {}

class Step(numpy_reference.Step):
    def __init__(self, problem, variant):
        super().__init__(problem, variant)
        here = Path(__file__).parent
        if variant == "hangs":
            child = [sys.executable, "-c", "import time; time.sleep(600)"]
            (here / "child").write_text(str(subprocess.Popen(child).pid))
            time.sleep(600)
        elif variant == "no compiler":
            raise RuntimeError("nvcc is not on PATH\\nand more")
        elif variant.startswith("meets"):  # goes on when both have come as far
            (here / variant).touch()
            while len(list(here.glob("meets*"))) < 2:
                time.sleep(0.01)

WORKLOADS = {"step": Step}
"""


@pytest.fixture
def slow_peer(tmp_path: Path) -> Any:
    """Peers by variant: "hangs", "no compiler", "meets 1" and "meets 2", or any that is quick."""
    (tmp_path / "slow_peer.py").write_text(SLOW_PEER)

    def make(variant: str, **more: Any) -> Contender:
        env = {"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
        return Contender(variant, variant, "slow_peer", variant, ("step",), env=env, **more)

    return make


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_contender_out_of_time_is_stopped_with_its_children(
    slow_peer: Any, tmp_path: Path
) -> None:
    contenders = [slow_peer("hangs"), slow_peer("quick")]
    rows = bench.measure(contenders, "step", "tiny", rounds=1, turn_seconds=0.002, limit=20).rows
    assert [r.status for r in rows] == ["stopped", "ok"]
    assert rows[0].reason.startswith("gave no answer within 20 s")
    assert rows[1].seconds is not None
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_the_limit_is_for_all_answers_of_a_contender(slow_peer: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "problem.npz", **bench.make_problem("step", bench.SIZES["tiny"])[0])  # type: ignore[arg-type]
    worker = bench.Worker(slow_peer("quick"), "step", tmp_path / "problem.npz", limit=40)
    try:
        worker.ask(do="time", units=1, repeats=1)
        worker._used += 40
        with pytest.raises(bench.WorkerTimeoutError, match="no answer within 40 s"):
            worker.ask(do="time", units=1, repeats=1)
    finally:
        worker.close()


def test_contenders_start_side_by_side_where_asked(slow_peer: Any) -> None:
    contenders = [slow_peer("meets 1"), slow_peer("meets 2")]
    rows = bench.measure(
        contenders, "step", "tiny", rounds=2, turn_seconds=0.002, limit=60, parallel=2
    ).rows
    assert [(r.name, r.status) for r in rows] == [("meets 1", "ok"), ("meets 2", "ok")]
    assert all(len(r.rounds) == 2 for r in rows)


def test_a_peer_that_cannot_be_built_is_missing_and_ours_has_failed(slow_peer: Any) -> None:
    peer = slow_peer("no compiler")
    ours = dataclasses.replace(peer, name="ours", ours=True)
    rows = bench.measure([peer, ours], "step", "tiny", rounds=1).rows
    assert [r.status for r in rows] == ["missing", "failed"]
    assert {r.reason for r in rows} == {"cannot be built: RuntimeError: nvcc is not on PATH"}


def test_limits_and_starts_are_checked() -> None:
    with pytest.raises(ValueError, match="parallel must be at least 1, got 0"):
        bench.run_bench(parallel=0)
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="limit must be a positive number of seconds"):
            bench.run_bench(limit=limit)


# --- Precision -------------------------------------------------------------------------------

PRECISIONS = """
import json
import jax, jax_scan, numpy as np
from fastrnn.bench import SIZES, make_problem

def text(function, *args):
    return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()

found = {}
for workload in ("step", "recurrence", "recurrence+bptt", "generate"):
    problem, _ = make_problem(workload, SIZES["tiny"])
    peer = jax_scan.WORKLOADS[workload](problem, "cpu")
    if workload == "step":
        args = peer.params, peer.X[0], peer.Y[0], peer.h, *peer.hyper
        found[workload] = text(peer.train, *args)
    elif workload == "generate":
        found[workload] = jax_scan.greedy.trace(peer.params, peer.prefix, 3).lower(
            lowering_platforms=("cuda",)
        ).as_text()
    else:
        found[workload] = text(peer.function, *peer.args)
print(json.dumps(found))
"""


def test_jax_multiplies_in_float32_on_a_gpu() -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    paths = [str(bench.PEER_FOLDER), str(PACKAGE.parent)]
    done = subprocess.run(
        [sys.executable, "-c", PRECISIONS],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for workload, text in json.loads(done.stdout).items():
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert products, workload
        for line in products:
            assert "precision = [HIGHEST, HIGHEST]" in line, f"{workload}: {line}"


def test_jax_leaves_memory_to_the_others() -> None:
    (contender,) = (p for p in bench.PEERS if p.name == "jax-scan-cuda")
    assert environment(contender, None)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_torch_allows_tf32_where_the_variant_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.syspath_prepend(str(bench.PEER_FOLDER))
    peer = importlib.import_module("torch_rnn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for p in bench.PEERS:
            if p.module not in ("torch_rnn", "torch_loop", "triton_rnn") or p.device == "cpu":
                continue
            allowed = p.precision == "TF32"
            peer.device_of(p.variant.split("-"))
            flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            assert flags == (allowed, allowed), p.name
            assert peer.versions()["allow_tf32"] == f"matmul {allowed}, cudnn {allowed}"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_torch_infers_without_gradients_and_trains_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.syspath_prepend(str(bench.PEER_FOLDER))
    peer = importlib.import_module("torch_rnn")
    problem, _ = bench.make_problem("recurrence+bptt", bench.SIZES["tiny"])
    assert not peer.Recurrence(problem, "gather").rnn.training
    assert peer.RecurrenceBPTT(problem, "gather").rnn.training


# --- Results ---------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round(result: BenchResult) -> None:
    jax = result.find("step", "headline", "jax-scan")
    assert jax is not None
    assert (jax.ratio, jax.ratio_low, jax.ratio_high) == (1.5, 1.0, 2.0)
    assert (jax.seconds, jax.low, jax.high) == (0.015, 0.011, 0.024)


def test_json_and_back(result: BenchResult) -> None:
    again = BenchResult.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert again.rows[3].reason == "No module named 'torch'"
    for text in ("{}", "[]", '{"schema": 99}'):
        with pytest.raises(ValueError, match="schema"):
            BenchResult.from_json(text)


def test_the_table_is_sorted_and_names_the_missing(result: BenchResult) -> None:
    lines = result.markdown("step", "headline").splitlines()
    body = [line for line in lines if line.startswith("| the ")]
    assert [line.split("|")[1].strip() for line in body] == [
        "the numba",
        "the jax-scan",
        "the tf-eager",
    ]
    assert "1.50 (1.00–2.00)" in body[1]
    assert "- the torch-compile: missing: No module named 'torch'" in lines
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_merging_results(result: BenchResult) -> None:
    other = BenchResult.from_json(result.to_json())
    other.rows = [row("numba", [1.0], ours=True, workload="generate")]
    other.rates = {"flops": 3e11, "bandwidth": 1e10}
    before = len(result.rows)
    result.merge(other)
    assert len(result.rows) == before + 1
    assert result.rates == {"flops": 3e11, "bandwidth": 3e10}


def test_a_plot_needs_times(result: BenchResult, tmp_path: Path) -> None:
    result.plot(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="no times"):
        result.plot(tmp_path / "none.png", "generate")


# --- Gate ------------------------------------------------------------------------------------


def test_the_gate_judges_ratios(result: BenchResult) -> None:
    gates = [
        gate.Gate("step", "headline", "jax-scan", 1.5),
        gate.Gate("step", "headline", "jax-scan", 1.6),
        gate.Gate("step", "headline", "torch-compile", 1.0),
        gate.Gate("step", "headline", "floor", 0.9),
        gate.Gate("step", "T512", "jax-scan", 1.0),
    ]
    met, missed, missing, floor, unmeasured = gate.judge(result, gates)
    assert (met.met(), missed.met(), missed.met(margin=0.1)) == (True, False, True)
    assert missing.measured is None
    assert "No module named 'torch'" in missing.why
    assert floor.measured == pytest.approx(2.2066e9 / 2.2e11 / 0.011, rel=1e-3)
    assert unmeasured.measured is None
    text = gate.table([met, missed, missing])
    assert "met" in text
    assert "**missed**" in text


def test_the_gates_exit_status(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(result.to_json())
    assert gate.main([str(path), "--margin", "0.2"]) == 0
    assert gate.main([str(path), "--strict"]) == 1
    slow = result.find("step", "headline", "numba")
    assert slow is not None
    slow.rounds = [10 * r for r in slow.rounds]
    path.write_text(result.to_json())
    assert gate.main([str(path)]) == 1


# --- Comparison with another commit ----------------------------------------------------------


def test_comparison_lines() -> None:
    old, new = row("numba@main", [1.0, 2.0, 1.0]), row("numba@this-tree", [2.0, 1.0, 2.0])
    for r in (old, new):
        r.seconds = sorted(r.rounds)[1]
    cells, slower = compare.line(old, new, allowed=1.1)
    assert slower
    assert cells[0] == "step, headline, numba"
    assert cells[3] == "0.50 (0.50–2.00)"
    assert not compare.line(new, old, allowed=1.1)[1]
    assert not compare.line(old, new, allowed=2.5)[1]
    gone = row("numba@main", [], status="failed", reason="no such backend")
    cells, slower = compare.line(gone, new, allowed=1.1)
    assert "no such backend" in cells[4]
    assert not slower
    assert compare.line(new, gone, allowed=1.1)[1]


# --- Report ----------------------------------------------------------------------------------


def test_the_report_of_a_folder(result: BenchResult, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither"):
        report.write(tmp_path)
    (tmp_path / "peers.json").write_text(result.to_json())
    (tmp_path / "suite.json").write_text(json.dumps({"benchmarks": suite()}))
    for _ in range(2):
        report.append_history(tmp_path / "history.jsonl", result)
    text = report.write(tmp_path).read_text()
    for name in ("step", "recurrence", "roofline", "scaling", "history"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG), name
        assert f"({name}.png)" in text
    assert "Some CPU @ 2.6 GHz, 2 cores" in text
    assert "9.0 s with an empty JIT cache" in text
    assert "| project " in text
    assert "42%" in text


def test_a_report_without_peers_or_without_a_suite(result: BenchResult, tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps({"benchmarks": suite()[:1]}))
    assert "Against peers" not in report.write(tmp_path).read_text()
    (tmp_path / "suite.json").unlink()
    (tmp_path / "peers.json").write_text(result.to_json())
    text = report.write(tmp_path).read_text()
    assert "Against peers" in text
    assert "roofline" not in text
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(ValueError, match="pytest-benchmark"):
        report.write(tmp_path)


def test_history_keeps_one_line_a_run(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert report.read_history(path) == []
    report.append_history(path, result)
    (entry,) = report.read_history(path)
    assert entry["seconds"]["step|headline|numba"] == 0.011
    assert "step|headline|torch-compile" not in entry["seconds"]


def test_the_readme_block(result: BenchResult, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    report.update_readme(readme, report.readme_block(result, "step.png"))
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith(f"{report.END}\nrest\n")
    assert "![Time of one training step](step.png)" in text
    assert "| the jax-scan " in text
    assert re.search(r"forward and backward pass +\| +B=1 .*the jax-scan: 2.00 ms \| +2.00 ", text)
    assert "2026-01-02" in text
    assert "the torch-compile: missing" in text
    other = report.other_machine(result, "there/report.md")
    assert re.match(r"On \[.*\]\(there/report.md\) the step takes 11\.0 ms; × ours: ", other)
    assert "jax-scan 1.5" in other
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench:begin"):
        report.update_readme(readme, "x")
