"""This tree against another commit, taking turns on this machine.

    python -m benchmarks.compare REF [--backend numba …] [--workload step …] [--size headline …]

REF is checked out into a temporary git worktree; both trees' backends run as contenders of one
measurement, so a machine that slows down slows down both. The exit status is 1 where this tree is
slower than allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastrnn.backend import BACKENDS, available_backends
from fastrnn.bench import (
    SIZES,
    WORKLOADS,
    Row,
    backend_contender,
    format_seconds,
    markdown_table,
    measure,
    paired_ratio,
)

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A temporary worktree of ``ref``."""

    def git(*arguments: str) -> None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), ref)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def line(old: Row, new: Row, allowed: float) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether this tree is slower than allowed."""
    title = f"{new.workload}, {new.size}, {new.name.partition('@')[0]}"
    if old.seconds is None or new.seconds is None:
        why = "; ".join(f"{r.name}: {r.status}, {r.reason}" for r in (old, new) if not r.seconds)
        return (title, "–", "–", "–", why), new.seconds is None
    median, low, high = paired_ratio(old.rounds, new.rounds)
    slower = median < 1 / allowed
    word = "**slower**" if slower else ""
    times = (format_seconds(old.seconds), format_seconds(new.seconds))
    return (title, *times, f"{median:.2f} ({low:.2f}–{high:.2f})", word), slower


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("ref", help="commit, branch or tag to compare with")
    parser.add_argument("--backend", action="append", choices=BACKENDS, default=[])
    parser.add_argument("--workload", action="append", choices=WORKLOADS, default=[])
    parser.add_argument("--size", action="append", choices=list(SIZES), default=[])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--allowed", type=float, default=1.1, help="slow-down that still passes")
    options = parser.parse_args(arguments)
    names = options.backend or [n for n, reason in available_backends().items() if reason is None]
    cells: list[tuple[str, ...]] = [("", options.ref, "this tree", "speed-up", "")]
    failed = False
    with checkout(options.ref) as tree:
        for name in names:
            contenders = [
                backend_contender(name, f"{name}@{options.ref}", PYTHONPATH=str(tree)),
                backend_contender(name, f"{name}@this-tree"),
            ]
            for workload in options.workload or ("step", "recurrence+bptt", "generate"):
                for size in options.size or ("headline",):
                    old, new = measure(contenders, workload, size, rounds=options.rounds).rows
                    row, slower = line(old, new, options.allowed)
                    cells.append(row)
                    failed = failed or slower
    print("\n".join(markdown_table(cells)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
