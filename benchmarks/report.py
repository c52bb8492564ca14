"""Tables and pictures from stored results; nothing is measured here.

    python -m benchmarks.report [FOLDER …] [--readme README.md]

A folder holds what ``python -m benchmarks`` wrote on one machine: ``peers.json`` (a
:class:`fastrnn.bench.BenchResult`), ``suite.json`` (pytest-benchmark), ``history.jsonl``. The
report and its pictures are written beside them. ``--readme`` replaces what stands between the lines
``<!-- bench:begin -->`` and ``<!-- bench:end -->`` of a file by the headline table and picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gate
from fastrnn.bench import (
    HEADLINE,
    SETTLE_SECONDS,
    UNITS,
    BenchResult,
    format_seconds,
    markdown_table,
    paired_ratio,
)

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLOURS = {"numba": "#1b7f79", "numpy": "#d08c2e", "cupy": "#5b4b9a", "numba-cuda": "#a83f5b"}
MARKERS = {"numba": "o", "numpy": "s", "cupy": "^", "numba-cuda": "D"}


# --- Reading ---------------------------------------------------------------------------------


def read_suite(path: Path) -> list[dict[str, Any]]:
    """The benchmarks of a pytest-benchmark file, each with its figures.

    Raises:
        ValueError: the file is something else.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "benchmarks" not in data:
        raise ValueError(f"{path} is not a pytest-benchmark file: it has no 'benchmarks'")
    return list(data["benchmarks"])


def append_history(path: Path, result: BenchResult) -> None:
    """Add one line: date, commit, and the medians of the run in seconds."""
    medians = {
        f"{r.workload}|{r.size}|{r.name}": float(f"{r.seconds:.4g}")
        for r in result.rows
        if r.seconds is not None
    }
    entry = {"date": result.date, "commit": result.commit, "seconds": medians}
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history, oldest first; empty where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# --- Text ------------------------------------------------------------------------------------


def machine_line(result: BenchResult) -> str:
    """Machine, software, commit and date in one paragraph."""
    m = result.machine
    gpus = [f"{g['name']} (driver {g['driver']})" for g in m["gpus"]]
    parts = [f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB", *gpus, m["system"]]
    parts += [f"Python {m['python']}", f"NumPy {m['numpy']}", *m["blas"]]
    parts += [f"{k}={v}" for k, v in m["thread_environment"].items()]
    versions = {k: v for s in result.software.values() for k, v in s["versions"].items()}
    parts += [f"{k} {v}" for k, v in sorted(versions.items()) if k not in ("python", "numpy")]
    state = result.commit.get("id", "installed package")[:10]
    state += " with changes" if result.commit.get("dirty") else ""
    return f"{'; '.join(parts)}. Commit {state}, {result.date}, load {m['load']:.1f}."


def suite_table(benchmarks: Sequence[dict[str, Any]]) -> list[str]:
    """One line a benchmark: median, rate, share of the floor, tokens/s."""
    cells = [("benchmark", "median", "GFLOP/s", "of the floor", "tokens/s")]
    for b in sorted(benchmarks, key=lambda b: (b["group"] or "", b["name"])):
        info = b["extra_info"]
        floor = info.get("percent_of_floor")
        tokens = info.get("tokens_per_second")
        cells.append(
            (
                b["name"].removeprefix("test_"),
                format_seconds(b["stats"]["median"]),
                f"{info['gflops']:.1f}",
                "–" if floor is None else f"{floor:.0f}%",
                "–" if tokens is None else f"{tokens:,.0f}",
            )
        )
    return markdown_table(cells)


def headline_table(result: BenchResult, workload: str = "step") -> list[str]:
    """The README's table: who, how long, how many times ours."""
    cells = [(f"one {'training ' * (workload == 'step')}{workload}", "median", "× ours")]
    for r in result.select(workload, "headline"):
        if r.seconds is not None:
            ratio = "–" if r.ratio is None else f"{r.ratio:.2f}"
            name = f"**{r.label}**" if r.ours else r.label
            cells.append((name, format_seconds(r.seconds), ratio))
    return markdown_table(cells)


def fastest_peer_table(result: BenchResult) -> list[str]:
    """The other workloads: our fastest, the fastest peer, and its time by ours."""
    cells = [("one …", "size", "ours", "fastest peer", "× ours")]
    for workload, size in result.tables():
        timed = [
            (r.seconds, r)
            for r in result.select(workload, size)
            if r.seconds is not None and r.precision == "float32"
        ]
        ours = [pair for pair in timed if pair[1].ours]
        peers = [pair for pair in timed if not pair[1].ours]
        if workload == "step" or not ours or not peers:
            continue
        (seconds, best), (theirs, peer) = (min(some, key=lambda p: p[0]) for some in (ours, peers))
        cells.append(
            (
                UNITS[workload],
                size if size == "headline" else f"{size[0]}={size[1:]}",
                format_seconds(seconds),
                f"{peer.label}: {format_seconds(theirs)}",
                f"{paired_ratio(peer.rounds, best.rounds)[0]:.2f}",
            )
        )
    return markdown_table(cells) if len(cells) > 1 else []


def readme_block(result: BenchResult, picture: str) -> str:
    """Table, picture, machine and date of the headline step."""
    missing = [r for r in result.select("step", "headline") if r.seconds is None]
    d = HEADLINE
    lines = [
        *headline_table(result),
        "",
        f"![Time of one training step]({picture})",
        "",
        *fastest_peer_table(result),
        "",
        f"V={d.V}, H={d.H}, B={d.B}, T={d.T}, float32. {machine_line(result)} "
        "Each contender in its own process, taking turns; medians over rounds; every loss was "
        "checked against the float64 oracle first.",
    ]
    lines += [f"{r.label}: {r.status} ({r.reason})." for r in missing]
    return "\n".join(lines)


def other_machine(result: BenchResult, link: str) -> str:
    """A line on the headline step of another machine: ours, and every peer's time by ours."""
    ours = result.find("step", "headline", "numba")
    if ours is None or ours.seconds is None:
        return ""
    peers = [
        f"{r.label} {paired_ratio(r.rounds, ours.rounds)[0]:.1f}"
        for r in result.select("step", "headline")
        if not r.ours and r.seconds is not None
    ]
    return (
        f"On [{result.machine['cpu']}, {result.machine['cores']} cores]({link}) the step takes "
        f"{format_seconds(ours.seconds)}; × ours: {'; '.join(peers)}."
    )


def update_readme(path: Path, block: str) -> None:
    """Replace what stands between the two marker lines.

    Raises:
        ValueError: the file does not have both markers, in order.
    """
    text = path.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{path} needs a line {BEGIN} and, after it, a line {END}")
    path.write_text(f"{text[: begin + len(BEGIN)]}\n{block}\n{text[end:]}")


def rates_line(rates: Mapping[str, float]) -> str:
    """The machine's SGEMM rate and bandwidth; what the BLAS reaches by itself, if that is less."""
    best, as_found = rates["flops"] / 1e9, rates.get("flops_as_found", rates["flops"]) / 1e9
    by_itself = ""
    if as_found < 0.95 * best:
        by_itself = f" ({as_found:.0f} with the kernels that OpenBLAS takes here by itself)"
    bandwidth = rates["bandwidth"] / 1e9
    return (
        f"Best SGEMM on the step's shapes {best:.0f} GFLOP/s{by_itself}, copy {bandwidth:.0f} GB/s."
    )


def report(result: BenchResult | None, suite: Sequence[dict[str, Any]], pictures: set[str]) -> str:
    """The whole report in Markdown."""
    parts = ["# Benchmarks"]
    if result is not None:
        parts.append(machine_line(result))
    for name, title in (
        ("step.png", "One training step"),
        ("recurrence.png", "The recurrence alone, by size"),
    ):
        if name in pictures:
            parts.append(f"![{title}]({name})")
    if result is not None:
        parts.append("## Against peers")
        parts.append(
            "Every contender runs in its own process; they take turns, in another order each "
            "round. *By ours* is the median over rounds of its time by ours, with the extremes; "
            "*rounds* the fastest and slowest round; *memory* what it resides in above its "
            "imports; *start* includes compilation."
        )
        parts += [result.markdown(*which) for which in result.tables()]
        if result.rates:
            parts.append(rates_line(result.rates))
        parts += [
            f"First call of {name}: {c['cold']:.1f} s with an empty JIT cache, {c['warm']:.2f} s "
            "with a filled one."
            for name, c in result.first_call.items()
            if c
        ]
        spinning = {
            r.label for r in result.rows if r.idle_cpu is not None and r.idle_cpu > SETTLE_SECONDS
        }
        if spinning:
            parts.append(
                f"Busy for more than the {SETTLE_SECONDS:g} s pause after a turn of theirs, and so "
                f"into the next one's: {', '.join(sorted(spinning))}."
            )
        parts += ["## Gate", gate.table(gate.judge(result))]
    if suite:
        parts.append("## Ops, steps, generation")
        parts.append(
            "The floor is the larger of FLOP by the best SGEMM rate and bytes by the copy "
            "bandwidth at that working-set size, both measured in the same run."
        )
        parts += [f"![{name}]({name}.png)" for name in ("roofline",) if "roofline.png" in pictures]
        parts.append("\n".join(suite_table(suite)))
    if "scaling.png" in pictures:
        parts += ["## Scaling", "![How a step's time grows with T, B, H and V](scaling.png)"]
    if "history.png" in pictures:
        parts += ["## History", "![Step time by commit](history.png)"]
    return "\n\n".join(parts) + "\n"


# --- Pictures --------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_recurrence(path: Path, result: BenchResult, ours: str = "numba") -> bool:
    """Forward and backward pass of every contender by ours, a column a size."""
    sizes = [s for w, s in result.tables() if w == "recurrence+bptt"]
    if len(sizes) < 2:
        return False
    figure = _figure(8, 4)
    axes = figure.subplots()
    names = dict.fromkeys(r.name for s in sizes for r in result.select("recurrence+bptt", s))
    markers = iter("osD^vPX*<>" * 2)
    for name in names:
        marker = next(markers)
        points = [(i, result.find("recurrence+bptt", s, name)) for i, s in enumerate(sizes)]
        drawn = [(i, r) for i, r in points if r is not None and r.ratio is not None]
        if not drawn:
            continue
        own = drawn[0][1].ours
        axes.plot(
            [i for i, _ in drawn],
            [r.ratio for _, r in drawn],
            marker,
            label=drawn[0][1].label,
            color=COLOURS.get(name) if own else None,
            markersize=7,
        )
    axes.axhline(1.0, color="#444", lw=0.8)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [t for t in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    labels = []
    for s in sizes:
        d = result.dims[s]
        labels.append(f"{s}\nH={d['H']} B={d['B']}\nT={d['T']}")
    axes.set_xticks(range(len(sizes)), labels, fontsize=8)
    axes.set_ylabel(f"time by fastrnn {ours}'s")
    axes.set_title("Recurrence, forward and backward: above 1× is slower than ours", fontsize=10)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes.grid(axis="y", color="#ddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def _label_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names in a column right of the points, in their order, each with a line to its point."""
    column = 2.2 * max((x for x, _ in points.values()), default=0.0)
    last = math.inf
    for op, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        last = min(y, last / 1.45)
        axes.annotate(
            op,
            (x, y),
            xytext=(column, last),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#aaa", "lw": 0.7, "relpos": (0, 0.5)},
        )


def plot_roofline(path: Path, suite: Sequence[dict[str, Any]]) -> bool:
    """Rate over arithmetic intensity of the headline ops, under the two roofs of this machine."""
    h = {k: getattr(HEADLINE, k) for k in "TBHV"}
    ops = [
        b for b in suite if b["group"] == b["extra_info"].get("op") and b["extra_info"]["dims"] == h
    ]
    rates = next((b["extra_info"]["rates"] for b in ops if "rates" in b["extra_info"]), None)
    if rates is None:
        return False
    figure = _figure(8, 5)
    axes = figure.subplots()
    points = {
        (b["extra_info"]["backend"], b["group"]): (
            b["extra_info"]["flop"] / b["extra_info"]["bytes"],
            b["extra_info"]["gflops"],
        )
        for b in ops
        if "rates" in b["extra_info"]  # the roofs are the CPU's
    }
    low, high = min(x for x, _ in points.values()) / 3, max(x for x, _ in points.values()) * 20
    peak, bandwidth = rates["flops"] / 1e9, rates["bandwidth"] / 1e9
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="#444", lw=1.2)
    axes.text(ridge, peak * 1.1, f"SGEMM {peak:.0f} GFLOP/s", fontsize=8)
    knee = ridge / 1.6
    slope = f"copy from memory {bandwidth:.0f} GB/s  "
    axes.text(knee, knee * bandwidth, slope, ha="right", va="bottom", fontsize=8)
    backends = list(dict.fromkeys(backend for backend, _ in points))
    for backend in backends:
        mine = [point for (owner, _), point in points.items() if owner == backend]
        axes.plot(
            *zip(*mine, strict=True),
            MARKERS.get(backend, "o"),
            color=COLOURS.get(backend),
            label=f"fastrnn {backend}",
        )
    named = {op: point for (owner, op), point in points.items() if owner == backends[0]}
    for group in (
        {op: point for op, point in named.items() if point[0] < ridge},
        {op: point for op, point in named.items() if point[0] >= ridge},
    ):
        _label_points(axes, group)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOP by byte that the op has to move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(
        f"Roofline at V={h['V']}, H={h['H']}, B={h['B']}, T={h['T']} "
        "(above the slope: the arrays were in cache)",
        fontsize=10,
        loc="left",
    )
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def plot_scaling(path: Path, suite: Sequence[dict[str, Any]]) -> bool:
    """A step's time over each of T, B, H and V, with the slope of proportional growth."""
    points = [b for b in suite if "sweep" in b["extra_info"]]
    if not points:
        return False
    figure = _figure(9, 6)
    for axes, letter in zip(figure.subplots(2, 2).flat, "TBHV", strict=True):
        mine = [b for b in points if b["extra_info"]["sweep"] == letter]
        for backend in dict.fromkeys(b["extra_info"]["backend"] for b in mine):
            line = sorted(
                (b["extra_info"]["dims"][letter], b["stats"]["median"] * 1e3)
                for b in mine
                if b["extra_info"]["backend"] == backend
            )
            axes.plot(
                *zip(*line, strict=True),
                marker=MARKERS.get(backend, "o"),
                color=COLOURS.get(backend),
                label=f"fastrnn {backend}",
                lw=1.3,
            )
        fastest = min(
            (b for b in mine if b["extra_info"]["dims"][letter] == getattr(HEADLINE, letter)),
            key=lambda b: b["stats"]["median"],
        )
        values = sorted({b["extra_info"]["dims"][letter] for b in mine})
        base, at = getattr(HEADLINE, letter), fastest["stats"]["median"] * 1e3
        axes.plot(
            values,
            [at * v / base for v in values],
            "--",
            color="#888",
            lw=1,
            label=f"proportional to {letter}",
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(values, [str(v) for v in values])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [m * 10.0**e for e in range(-2, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_xlabel(letter)
        axes.set_ylabel("step, ms")
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    d = HEADLINE
    figure.suptitle(
        f"One training step around V={d.V}, H={d.H}, B={d.B}, T={d.T}, one size varied", fontsize=10
    )
    figure.savefig(path, dpi=150)
    return True


def plot_history(path: Path, history: Sequence[dict[str, Any]], workload: str = "step") -> bool:
    """The headline medians of our backends over the stored runs."""
    if len(history) < 2:
        return False
    figure = _figure(8, 3.6)
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        key = f"{workload}|headline|{name}"
        line = [(i, e["seconds"][key] * 1e3) for i, e in enumerate(history) if key in e["seconds"]]
        if line:
            axes.plot(
                *zip(*line, strict=True), MARKERS[name] + "-", color=colour, label=f"fastrnn {name}"
            )
    labels = [
        f"{e['commit'].get('id', 'package')[:7]}{'+' * bool(e['commit'].get('dirty'))}\n"
        f"{e['date'][5:16]}"
        for e in history
    ]
    every = math.ceil(len(labels) / 10)
    axes.set_xticks(range(0, len(labels), every), labels[::every], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"headline {workload}, ms")
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    return True


# --- All of it -------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """Write ``report.md`` and its pictures from what ``folder`` holds; return the report's path.

    Raises:
        FileNotFoundError: the folder holds no result.
    """
    peers, suite_path = folder / "peers.json", folder / "suite.json"
    result = BenchResult.from_json(peers.read_text()) if peers.exists() else None
    suite = read_suite(suite_path) if suite_path.exists() else []
    if result is None and not suite:
        raise FileNotFoundError(f"{folder} holds neither peers.json nor suite.json")
    pictures: set[str] = set()
    if result is not None:
        if any(r.seconds is not None for r in result.select("step", "headline")):
            result.plot(folder / "step.png")
            pictures.add("step.png")
        if plot_recurrence(folder / "recurrence.png", result):
            pictures.add("recurrence.png")
    if plot_roofline(folder / "roofline.png", suite):
        pictures.add("roofline.png")
    if plot_scaling(folder / "scaling.png", suite):
        pictures.add("scaling.png")
    if plot_history(folder / "history.png", read_history(folder / "history.jsonl")):
        pictures.add("history.png")
    target = folder / "report.md"
    target.write_text(report(result, suite, pictures))
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*", help="default: all of benchmarks/results")
    parser.add_argument(
        "--readme",
        type=Path,
        help="file to put the first folder's table into, and a line on each other one",
    )
    options = parser.parse_args(arguments)
    folders = options.folders or sorted(p.parent for p in RESULTS.glob("*/peers.json"))
    if not folders:
        parser.error(f"no results in {RESULTS}: run `python -m benchmarks` first")
    for folder in folders:
        print(write(folder))
    if options.readme:
        first, *others = (BenchResult.from_json((f / "peers.json").read_text()) for f in folders)

        def link(folder: Path, name: str) -> str:
            return os.path.relpath(folder.resolve() / name, options.readme.resolve().parent)

        block = readme_block(first, link(folders[0], "step.png"))
        for folder, other in zip(folders[1:], others, strict=True):
            block += "\n\n" + other_machine(other, link(folder, "report.md"))
        update_readme(options.readme, block)
        print(options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
