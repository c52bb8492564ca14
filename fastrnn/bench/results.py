"""What was measured: its tables, its JSON, its plot."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrnn.bench.formatting import format_seconds, markdown_table, time_unit
from fastrnn.bench.workloads import MODES, UNITS

SCHEMA = 1


@dataclass
class Row:
    """One contender on one workload and size.

    Attributes:
        mode: how a GPU is given the work, a row of :data:`~fastrnn.bench.workloads.MODES`; empty
            on a CPU. precision: "float32" or "TF32", that of its products.
        status: "ok", "missing" (not installed, no device, cannot be built), "wrong" (differs from
            the oracle), "failed" (its process ended) or "stopped" (out of its time); reason: why,
            where it is not "ok".
        seconds: a unit's time: the median over rounds of the rounds' medians. low, high: the
            fastest and the slowest round. rounds: every round's median.
        ratio: this contender's time by our baseline's, median over rounds; ratio_low, ratio_high.
        error: relative error against the float64 oracle.
        start_seconds: building the contender and its first unit, compilation included.
        extra_bytes: resident memory in the timed runs above that of the bare process.
        idle_cpu: most CPU seconds it used between two turns; spinning threads show here.
        floor: the roofline's lower bound of a unit in seconds, where it is known.
    """

    workload: str
    size: str
    name: str
    label: str
    ours: bool
    device: str
    mode: str = ""
    precision: str = "float32"
    status: str = "ok"
    reason: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: list[float] = field(default_factory=list)
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: float | None = None
    start_seconds: float | None = None
    extra_bytes: int | None = None
    idle_cpu: float | None = None
    floor: float | None = None


@dataclass
class BenchResult:
    """What :func:`~fastrnn.bench.run.run_bench` measured.

    Attributes:
        machine, commit, date: where, what, when (UTC). rows: one a contender, workload and size.
        dims: the sizes by name. rates: SGEMM rate (FLOP/s), the best of any kernels and that of
            those which the BLAS takes by itself, and copy bandwidth (bytes/s). first_call: seconds
            of opening a backend and its first training step by backend, with an empty and with a
            filled JIT cache.
        software: versions and thread pools of each contender. seconds: how long it all took.
    """

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    rows: list[Row]
    dims: dict[str, dict[str, int]]
    rates: dict[str, float] = field(default_factory=dict)
    first_call: dict[str, dict[str, float]] = field(default_factory=dict)
    software: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def merge(self, other: BenchResult) -> None:
        """Take in the tables of another run on the same machine."""
        self.rows += other.rows
        self.dims |= other.dims
        self.first_call |= other.first_call
        self.software |= other.software
        self.seconds += other.seconds
        for key, rate in other.rates.items():
            self.rates[key] = max(rate, self.rates.get(key, 0.0))

    def find(self, workload: str, size: str, name: str) -> Row | None:
        """The row of one contender, if it was asked for."""
        rows = (r for r in self.rows if (r.workload, r.size, r.name) == (workload, size, name))
        return next(rows, None)

    def best_peer(
        self, workload: str, size: str, mode: str = "", precision: str = "float32"
    ) -> Row | None:
        """The fastest contender on a GPU that is not ours, or None where none has a time.

        Args:
            mode: "graph" or "eager" takes the peers of that mode and the compiled ones, "jit",
                which are one call from the host as well; empty takes all.
            precision: that of the products; TF32 is never compared with float32.
        """
        allowed = (mode, "jit") if mode else MODES
        found = (
            r
            for r in self.select(workload, size, "cuda")
            if not r.ours and r.mode in allowed and r.precision == precision
        )
        return next((r for r in found if r.seconds is not None), None)

    def select(self, workload: str, size: str, device: str | None = None) -> list[Row]:
        """The rows of one table, fastest first, those without a time last."""
        rows = [
            r
            for r in self.rows
            if (r.workload, r.size) == (workload, size) and device in (None, r.device)
        ]
        return sorted(rows, key=lambda r: (r.seconds is None, r.seconds or 0.0))

    def tables(self) -> list[tuple[str, str]]:
        """The pairs (workload, size) that were measured, in order."""
        return list(dict.fromkeys((r.workload, r.size) for r in self.rows))

    def table(self) -> str:
        """All tables in Markdown, aligned to be read in a terminal as well."""
        parts = [f"{self.machine['cpu']}, {self.machine['cores']} cores, {self.date}"]
        parts += [self.markdown(*which) for which in self.tables()]
        return "\n\n".join(parts)

    def markdown(self, workload: str, size: str) -> str:
        """One table: time of a unit, ratio to ours, memory, start; then who is missing and why."""
        rows = self.select(workload, size)
        d = self.dims[size]
        head = (
            f"**{workload}** at V={d['V']}, H={d['H']}, B={d['B']}, T={d['T']}"
            if workload in ("step", "cross_entropy")
            else f"**{workload}** at H={d['H']}, V={d['V']}"
            if workload.startswith("generate")
            else f"**{workload}** at H={d['H']}, B={d['B']}, T={d['T']}"
        )
        header = (
            f"time of one {UNITS[workload]}",
            "median",
            "rounds",
            "by ours",
            "memory",
            "start",
        )
        cells = [header]
        for r in rows:
            if r.seconds is None or r.low is None or r.high is None:
                continue
            ratio = (
                "–" if r.ratio is None else f"{r.ratio:.2f} ({r.ratio_low:.2f}–{r.ratio_high:.2f})"
            )
            memory = "–" if r.extra_bytes is None else f"{r.extra_bytes / 1e6:.0f} MB"
            start = "–" if r.start_seconds is None else f"{r.start_seconds:.1f} s"
            spread = f"{format_seconds(r.low)} – {format_seconds(r.high)}"
            cells.append((r.label, format_seconds(r.seconds), spread, ratio, memory, start))
        lines = [head]
        if len(cells) > 1:
            lines += ["", *markdown_table(cells)]
        absent = [r for r in rows if r.seconds is None]
        lines += [""] * bool(absent)
        lines += [f"- {r.label}: {r.status}: {r.reason}" for r in absent]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The result as JSON text; :meth:`from_json` reads it back."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(_rounded(data), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise ValueError(f"expected a fastrnn bench result with schema {SCHEMA}")
        data["rows"] = [Row(**row) for row in data["rows"]]
        return cls(**data)

    def plot(self, path: str | Path, workload: str = "step", size: str = "headline") -> None:
        """Draw one table as a bar chart (PNG, SVG, …); needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install 'fastrnn[plot]'") from error
        rows = [r for r in self.select(workload, size) if r.seconds is not None]
        if not rows:
            raise ValueError(f"no times to plot for {workload!r} at {size!r}")
        scale, unit = time_unit(max(r.seconds or 0.0 for r in rows))
        figure = Figure(figsize=(8, 1.3 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for i, r in enumerate(rows):
            assert r.seconds is not None
            assert r.low is not None
            assert r.high is not None
            bar = r.seconds * scale
            axes.barh(i, bar, color="#1b7f79" if r.ours else "#b8bfc6", height=0.7)
            low, high = (r.seconds - r.low) * scale, (r.high - r.seconds) * scale
            axes.errorbar(bar, i, xerr=[[low], [high]], color="#444", capsize=2, lw=1)
            times = "" if r.ratio is None or r.ratio == 1 else f"  ({r.ratio:.1f}×)"
            end = r.high * scale
            axes.text(end, i, f"  {format_seconds(r.seconds)}{times}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [r.label for r in rows], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.28 * max((r.high or 0.0) * scale for r in rows))
        axes.set_xlabel(f"time of one {UNITS[workload]} ({unit}), lower is better")
        d = self.dims[size]
        axes.set_title(
            f"V={d['V']}, H={d['H']}, B={d['B']}, T={d['T']}, float32\n"
            f"{self.machine['cpu']}, {self.machine['cores']} cores · {self.date[:10]}",
            fontsize=9,
            loc="left",
        )
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of these figures has."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
