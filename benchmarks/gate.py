"""The throughput gate: ratios to peers in the same run, never absolute times.

    python -m benchmarks.gate benchmarks/results/MACHINE/peers.json [--margin 0.1] [--strict]

A ratio is the median over rounds of (peer's time / ours). The exit status is 1 where one is missed;
what was not measured (a peer that is not installed) is listed and fails only with ``--strict``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrnn.bench import BenchResult, markdown_table, paired_ratio

OURS = "numba"
OUR_TORCH = "fastrnn-torch"
SIZES_OF_RECURRENCE = ("headline", "B1", "B256", "T512", "H64", "H512", "H1024")


@dataclass(frozen=True)
class Gate:
    """``peer`` needs at least ``at_least`` times as long as ours on a workload and size.

    The peer ``floor`` is the step's products at the best SGEMM rate of any BLAS and kernels seen:
    there ``at_least`` is the share of it that is reached. ``ours`` is which of our contenders.
    """

    workload: str
    size: str
    peer: str
    at_least: float
    ours: str = OURS


GATES = (
    Gate("step", "headline", "floor", 0.9),
    Gate("step", "headline", "numpy", 1.0),
    Gate("step", "headline", "jax-scan", 1.3),
    Gate("step", "headline", "torch-compile", 1.6),
    Gate("step", "headline", "torch-rnn-onehot", 2.0),
    Gate("step", "headline", "tf-eager", 9.0),
    Gate("recurrence", "headline", "torch-rnn-gather", 2.5),
    Gate("recurrence+bptt", "headline", "torch-rnn-gather", 2.0),
    *(
        Gate("recurrence+bptt", size, peer, 1.0)
        for size in SIZES_OF_RECURRENCE
        for peer in ("jax-scan", "torch-compile", "torch-loop", "torch-rnn-gather")
        if (size, peer) != ("headline", "torch-rnn-gather")
    ),
    *(
        Gate("recurrence+bptt", size, "torch-rnn-gather", 1.0, OUR_TORCH)
        for size in SIZES_OF_RECURRENCE
        if size != "headline"
    ),
    Gate("recurrence+bptt", "headline", "torch-rnn-gather", 1.5, OUR_TORCH),
    Gate("step", "headline", "torch-rnn-gather", 1.1, OUR_TORCH),
    Gate("generate", "headline", "torch-loop", 4.0),
    Gate("generate", "headline", "jax-scan", 2.0),
    Gate("generate64", "headline", "jax-scan", 2.0),
    Gate("generate64", "headline", "torch-loop", 2.0),
)


@dataclass(frozen=True)
class Verdict:
    """What became of a gate: ``measured`` is None where it could not be judged, see ``why``."""

    gate: Gate
    measured: float | None
    why: str = ""

    def met(self, margin: float = 0.0) -> bool:
        return self.measured is not None and self.measured >= self.gate.at_least * (1 - margin)


def judge(result: BenchResult, gates: Sequence[Gate] = GATES) -> list[Verdict]:
    """Hold a result against the gates."""
    return [_judge(result, gate) for gate in gates]


def _judge(result: BenchResult, gate: Gate) -> Verdict:
    mine = result.find(gate.workload, gate.size, gate.ours)
    if mine is None or mine.seconds is None:
        return Verdict(gate, None, f"{gate.ours}: " + (mine.reason if mine else "not measured"))
    if gate.peer == "floor":
        if mine.floor is None:
            return Verdict(gate, None, "no SGEMM rate was measured")
        return Verdict(gate, mine.floor / mine.seconds)
    peer = result.find(gate.workload, gate.size, gate.peer)
    if peer is None or peer.seconds is None:
        why = f"{peer.status}: {peer.reason}" if peer else "not measured"
        return Verdict(gate, None, f"{gate.peer}: {why}")
    return Verdict(gate, paired_ratio(peer.rounds, mine.rounds)[0])


def table(verdicts: Sequence[Verdict], margin: float = 0.0) -> str:
    """The verdicts in Markdown."""
    cells = [("gate", "required", "measured", "")]
    for v in verdicts:
        g = v.gate
        measured = "–" if v.measured is None else f"{v.measured:.2f}"
        word = v.why if v.measured is None else "met" if v.met(margin) else "**missed**"
        name = f"{g.workload}, {g.size}: {g.peer}" + f" by {g.ours}" * (g.ours != OURS)
        cells.append((name, f"≥ {g.at_least:g}", measured, word))
    return "\n".join(markdown_table(cells))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("results", type=Path, help="what `python -m benchmarks` wrote: peers.json")
    parser.add_argument("--margin", type=float, default=0.0, help="share allowed to be missing")
    parser.add_argument("--strict", action="store_true", help="fail for what was not measured too")
    options = parser.parse_args(arguments)
    verdicts = judge(BenchResult.from_json(options.results.read_text()))
    print(table(verdicts, options.margin))
    failed = [
        v for v in verdicts if (options.strict if v.measured is None else not v.met(options.margin))
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
