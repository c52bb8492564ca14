"""Medians, ratios to our baseline and floors, from the times of the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastrnn.backend import BACKENDS, Dims
from fastrnn.bench.results import Row
from fastrnn.bench.roofline import work


def first_of_ours(rows: Any, mode: str = "") -> Row | None:
    """The baseline: our fastest kind of backend that ran, GPU before CPU.

    One that runs in ``mode`` goes before the others of its backend, and a graph before eager calls.
    """
    ours = {r.name: r for r in rows if r.ours and r.status == "ok"}

    def order(row: Row) -> tuple[int, bool, bool]:
        backend = row.name.removesuffix("-graph")
        place = BACKENDS.index(backend) if backend in BACKENDS else len(BACKENDS)
        return place, row.mode != mode, row.mode != "graph"

    return min(ours.values(), key=order, default=None)


def summarise(rows: Sequence[Row], dims: Dims, rates: Mapping[str, float]) -> None:
    """Medians, ratios to our baseline on the same device and in the same mode, floors."""
    for device in {r.device for r in rows}:
        group = [r for r in rows if r.device == device and r.rounds]
        for r in group:
            base = first_of_ours(group, r.mode)
            r.seconds, r.low, r.high = statistics.median(r.rounds), min(r.rounds), max(r.rounds)
            if r.workload == "step" and device == "cpu" and rates:
                r.floor = work("step", dims).flop / rates["flops"]
            if base is not None:
                r.ratio, r.ratio_low, r.ratio_high = paired_ratio(r.rounds, base.rounds)


def paired_ratio(rounds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the round-by-round ratios ``rounds / base``."""
    ratios = [a / b for a, b in zip(rounds, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
