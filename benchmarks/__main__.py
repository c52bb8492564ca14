"""The whole measurement of a machine: peers, suite, report.

    python -m benchmarks [--quick] [--only peers|suite|report] [--out FOLDER]

Writes ``peers.json``, ``suite.json``, a line of ``history.jsonl``, ``report.md`` and its pictures
to ``benchmarks/results/MACHINE`` (seven to fourteen minutes; ``--quick``: the headline step alone).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gate, report
from fastrnn.bench import PEERS, BenchResult, machine, machine_slug, run_bench

ROOT = Path(__file__).resolve().parent.parent

TABLES: tuple[tuple[tuple[str, ...], tuple[str, ...], int], ...] = (
    # workloads, sizes, rounds
    (("step",), ("headline",), 7),
    (("recurrence",), ("headline",), 5),
    (("recurrence+bptt",), ("headline",), 5),
    (("recurrence+bptt",), ("B1", "B256", "H64", "H512", "H1024", "T512"), 3),
    (("generate", "generate64", "cross_entropy"), ("headline",), 5),
)


def progress(message: str) -> None:
    print(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, end="", file=sys.stderr)
    print("" if sys.stderr.isatty() else "\n", end="", file=sys.stderr, flush=True)


def measure_peers(quick: bool) -> BenchResult:
    """All tables, merged into one result."""
    devices = {"cuda" if machine()["gpus"] else "cpu", "cpu"}
    total: BenchResult | None = None
    for workloads, sizes, rounds in TABLES[: 1 if quick else None]:
        peers = [p.name for p in PEERS if p.device in devices]
        result = run_bench(
            workloads,
            sizes,
            peers=peers,
            rounds=rounds,
            first_call=total is None,
            progress=progress,
        )
        if total is None:
            total = result
        else:
            total.merge(result)
    assert total is not None
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the headline step and its peers only")
    parser.add_argument("--only", choices=("peers", "suite", "report"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/MACHINE")
    options = parser.parse_args(arguments)
    out: Path = options.out or report.RESULTS / machine_slug(machine())
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if options.only in (None, "peers"):
        result = measure_peers(options.quick)
        (out / "peers.json").write_text(result.to_json())
        report.append_history(out / "history.jsonl", result)
        print(result.table())
        print("\n" + gate.table(gate.judge(result)))
    status = 0
    if options.only == "suite" or (options.only is None and not options.quick):
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-n", "0"]
        command += [
            "--benchmark-enable",
            "--benchmark-quiet",
            f"--benchmark-json={out / 'suite.json'}",
        ]
        command += ["--ignore=benchmarks/bench_peers.py", "--benchmark-only"]
        status = subprocess.run(command, cwd=ROOT).returncode
    report.write(out)
    print(f"\n{out}: {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
