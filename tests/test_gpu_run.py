"""``python -m benchmarks.gpu``: its orchestration, with the emulator in the GPU's place."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import Part
from benchmarks.op_cases import OPS
from fastrnn.bench import BenchResult, Row
from tests.emulator.require import require_emulator


def part(name: str, code: str, **options: Any) -> Part:
    """A part that runs Python code; ``sys.argv[1]`` is where its result belongs."""
    settings = {"limit": 20.0, "least": 1.0, **options}
    return Part(
        name, name.title(), command=lambda result, _: [sys.executable, "-c", code, str(result)],
        **settings,
    )  # fmt: skip


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"found\": 7}');"


def test_a_part_that_fails_hangs_or_dies_costs_only_itself(tmp_path: Path) -> None:
    parts = [
        part("good", WRITES),
        part("bad", WRITES + "raise SystemExit('no such kernel')"),
        part("dead", WRITES + "import os; os.kill(os.getpid(), 11)"),
        part("stuck", WRITES + "import time; time.sleep(60)", limit=1.0),
        part("absent", "", absent=lambda: "no such tool"),
        part("last", WRITES),
    ]
    begin = time.monotonic()
    record = gpu.run(tmp_path, 1.0, parts)
    assert time.monotonic() - begin < 20
    status = {name: outcome["status"] for name, outcome in record["parts"].items()}
    assert status == {
        "good": "ok",
        "bad": "failed",
        "dead": "failed",
        "stuck": "stopped",
        "absent": "absent",
        "last": "ok",
    }
    assert "no such kernel" in record["parts"]["bad"]["reason"]
    assert record["parts"]["stuck"]["reason"] == "no end within 1 s"
    assert record["parts"]["absent"]["reason"] == "no such tool"
    # What a part had found before it ended badly is kept.
    assert {n for n, o in record["parts"].items() if o.get("result") == {"found": 7}} == {
        "good", "bad", "dead", "stuck", "last",
    }  # fmt: skip
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["parts"].keys() == record["parts"].keys()
    text = (tmp_path / "gpu.md").read_text()
    assert "no such kernel" in text
    assert "## Goals" in text


def test_children_of_a_stopped_part_end_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3);"
        f' open({str(tmp_path / "late")!r}, "w")\']); time.sleep(60)'
    )
    gpu.run(tmp_path, 1.0, [part("stuck", code, limit=1.0)])
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()


def test_parts_are_skipped_when_the_time_is_up(tmp_path: Path) -> None:
    parts = [part("slow", "import time; time.sleep(1)"), part("next", WRITES, least=30.0)]
    record = gpu.run(tmp_path, 5 / 60, parts)
    assert record["parts"]["slow"]["status"] == "ok"
    assert record["parts"]["next"]["status"] == "skipped"
    assert "it needs 30" in record["parts"]["next"]["reason"]


def test_without_a_gpu_nothing_is_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"gpus": []})
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU found" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_all_parts_run_on_the_emulator(tmp_path: Path) -> None:
    require_emulator()
    record = gpu.run(tmp_path, 9.5, emulate=True)
    outcomes = {name: outcome["status"] for name, outcome in record["parts"].items()}
    assert outcomes == {
        "device": "ok", "tests": "ok", "smoke": "ok", "memcheck": "absent",
        "racecheck": "absent", "ops": "ok", "step": "ok", "peers": "ok",
    }, record  # fmt: skip
    rows = record["parts"]["ops"]["result"]["rows"]
    assert {row["op"] for row in rows} == set(OPS)
    assert not [row for row in rows if "failed" in row]
    text = (tmp_path / "gpu.md").read_text()
    assert "the times mean nothing" in text
    assert "## Goals" not in text


def test_ops_end_where_the_context_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        name = "cupy"

        def sync(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_parts, "backends", lambda emulate: [Lost()])
    monkeypatch.setattr(gpu_parts, "copy_rate", lambda emulate: None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_parts.ops(saved.append, emulate=True)
    assert ["failed" in row for row in saved[-1]["rows"]] == [True]


def test_goals_are_judged_by_what_was_measured() -> None:
    def row(op: str, seconds: float) -> dict[str, Any]:
        return {
            "op": op, "size": "headline", "backend": "cupy", "seconds": seconds, "flop": 1.0,
            "bytes": 1.0, "errors": {"h": [3e-7, 1e-7]},
        }  # fmt: skip

    rows = [row("recurrence", 11e-6), row("recurrence_backward", 15e-6)]
    results = {"ops": {"rows": rows, "copy_bytes_per_second": 4e12}}
    lines = {line.split("|")[1].strip(): line for line in gpu_parts.goals(results)}
    assert "11 µs" in lines["recurrence forward"]
    assert "met" in lines["recurrence forward"]
    assert "missed" in lines["recurrence backward"]
    assert "3 ×" in lines["largest error by plain float32's"]
    assert "missed" in lines["largest error by plain float32's"]
    assert "not measured" in lines["training step"]
    assert "not measured" in lines["recurrence, cuDNN by ours, graphs"]

    # Graph against graph: ours from the ops, cuDNN's from the peers.
    names = {"cudnn": 200e-6, "cudnn-graph": 55e-6, "cupy": 50e-6}
    peers = BenchResult(
        machine={}, commit={}, date="", dims={},
        rows=[
            Row("recurrence", "headline", name, name, name == "cupy", "cuda", seconds=time)
            for name, time in names.items()
        ],
    )  # fmt: skip
    results["peers"] = {"bench": json.loads(peers.to_json())}
    lines = {line.split("|")[1].strip(): line for line in gpu_parts.goals(results)}
    assert "5 ×" in lines["recurrence, cuDNN by ours, graphs"]
