"""``fastrnn.torch`` among the contenders: checked like the others, with gates of its own."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gate
from fastrnn import bench
from fastrnn.bench import BenchResult, Row
from fastrnn.bench.summary import summarise

pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize("workload", ["step", "recurrence+bptt"])
def test_the_contender_agrees_with_the_oracle(workload: str) -> None:
    (contender,) = (p for p in bench.PEERS if p.name == gate.OUR_TORCH)
    assert contender.ours
    (row,) = bench.measure([contender], workload, "tiny", rounds=1, turn_seconds=0.01).rows
    assert row.status == "ok", row.reason
    assert row.ratio == 1.0


def test_the_backends_stay_the_baseline() -> None:
    rows = [
        Row("step", "headline", name, name, True, "cpu", rounds=[seconds])
        for name, seconds in ((gate.OUR_TORCH, 0.5), ("numpy", 2.0), ("numba", 1.0))
    ]
    summarise(rows, bench.HEADLINE, {})
    assert [r.ratio for r in rows] == [0.5, 2.0, 1.0]


def test_gates_of_its_own() -> None:
    own = [g for g in gate.GATES if g.ours == gate.OUR_TORCH]
    headline = gate.Gate("recurrence+bptt", "headline", "torch-rnn-gather", 1.5, gate.OUR_TORCH)
    assert headline in own

    def row(name: str, *rounds: float) -> Row:
        given: dict[str, Any] = {"rounds": list(rounds), "seconds": rounds[0]}
        return Row("recurrence+bptt", "headline", name, name, False, "cpu", **given)

    rows = [
        row(gate.OUR_TORCH, 1.0, 2.0),
        row("numba", 9.0, 9.0),
        row("torch-rnn-gather", 1.8, 3.6),
    ]
    result = BenchResult({}, {}, "", rows, {})
    met, missed = gate.judge(
        result, [headline, gate.Gate("recurrence+bptt", "headline", "torch-rnn-gather", 1.5)]
    )
    assert (met.met(), missed.met()) == (True, False)
    text = gate.table([met, missed])
    assert "torch-rnn-gather by fastrnn-torch" in text
    assert text.count("by ") == 1
