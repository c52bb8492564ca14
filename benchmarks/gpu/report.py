"""``gpu.md``: what was right, how fast it was, and what had been predicted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from benchmarks.gpu import cases, tuner
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.tasks import bench_of
from fastrnn.bench import BenchResult, format_seconds, markdown_table

Row = dict[str, Any]
Record = dict[str, Any]

PREDICTED: dict[tuple[str, str, str], float] = {
    ("ops", "recurrence", "headline"): 13.5e-6,
    ("ops", "recurrence_backward", "headline"): 19e-6,
    ("ops", "recurrence", "H512"): 48e-6,
    ("ops", "recurrence", "H1024"): 200e-6,
    ("ops", "node: recurrence", "headline"): 13.5e-6,
    ("ops", "node: project", "headline"): 10.3e-6,
    ("ops", "node: cross entropy", "headline"): 2.5e-6,
    ("ops", "node: dh", "headline"): 10.7e-6,
    ("ops", "node: BPTT", "headline"): 10.8e-6,
    ("ops", "node: dW_hq", "headline"): 13.6e-6,
    ("ops", "node: dW_hh", "headline"): 6.9e-6,
    ("ops", "node: clip and sgd", "headline"): 3.7e-6,
    ("step", cases.STEP, "headline"): 73e-6,
    ("step", cases.EPOCH, "headline"): 8 * 73e-6,
    ("step", cases.LONG_RUN, "headline"): 20_000 * 73e-6,
    ("step", "character", "headline"): 0.6e-6,
    ("step", "character sampled", "headline"): 1.1e-6,
}
"""Seconds predicted for an H100 from the machine code of the kernels, by kind, op and size. Between
two nodes of a graph lie 1.2 to 1.4 µs, which a measured node contains and a predicted one does
not."""

SHORT = 100
"""Letters of a reason in what is printed; gpu.md has all."""

MEMORY_BOUND = ("gather", "gather_backward", "cross_entropy", "clip_by_global_norm", "sgd")


# --- What the parts found ----------------------------------------------------------------------


def rows_of(record: Record, kind: str | None = None, backend: str | None = None) -> list[Row]:
    """All rows, in the order of the parts. Those of the sanitizers are a smoke test's once more,
    and are left out."""
    return [
        row
        for part in PARTS
        if part.prefix is None
        for row in record["parts"].get(part.name, {}).get("result", {}).get("rows", [])
        if kind in (None, row["kind"]) and backend in (None, row["backend"])
    ]


def benches(record: Record) -> dict[str, BenchResult]:
    """What the parts against peers measured, by part."""
    return {
        name: bench_of(outcome["result"])
        for name, outcome in record["parts"].items()
        if "bench" in outcome.get("result", {})
    }


def verdict(result: dict[str, Any]) -> tuple[str, str]:
    """The status of a task that has ended, and the reason, by what it found."""
    if "plans" in result:
        failed = [row for row in result["plans"]["rows"] if "failed" in row]
        if failed:
            return "failed", f"{len(failed)} rows, {failed[0]['section']}: {failed[0]['failed']}"
    refused = [module for module in result.get("modules", []) if module["error"]]
    if refused:
        return "failed", f"{len(refused)} refused, {refused[0]['module']}: {refused[0]['error']}"
    if "bench" not in result:
        return "ok", ""
    rows = bench_of(result).rows
    told = [f"{r.label}: {r.status}: {r.reason}" for r in rows if r.status not in ("ok", "missing")]
    if any(row.ours and row.status != "ok" for row in rows):
        return "failed", "; ".join(told) or "a contender of ours is missing"
    peers = [row for row in rows if not row.ours]
    if peers and all(row.status == "missing" for row in peers):
        return "absent", f"no peer could be had: {peers[0].label}: {peers[0].reason}"
    return "ok", "; ".join(told)


def copy_rate(record: Record) -> float | None:
    """Bytes read and written a second by a copy in device memory."""
    found = record["parts"].get("device-cupy", {}).get("result", {})
    rate = found.get("copy_bytes_per_second")
    return None if rate is None else float(rate)


# --- Tables ------------------------------------------------------------------------------------


def markdown(record: Record) -> str:
    """The whole report."""
    gpus = [f"{gpu['name']}, driver {gpu['driver']}" for gpu in record["machine"]["gpus"]]
    place = "stand-ins for a GPU: the times mean nothing" if record["emulated"] else "; ".join(gpus)
    lines = ["# fastrnn on a GPU", "", f"{place or 'no GPU found'}. {_commits(record)}", ""]
    lines += summary(record)
    for part in PARTS:
        outcome = record["parts"].get(part.name)
        if outcome is not None and "result" in outcome:
            lines += ["", f"## {part.title}", "", *_table(part, outcome["result"], record)]
    if not record["emulated"]:
        lines += ["", "## Goals", "", *goals(record)]
    return "\n".join(lines) + "\n"


def short(record: Record, names: Sequence[str]) -> list[str]:
    """What is printed at the end of a run: the parts, what is not right, the goals."""
    lines = summary(record, names, SHORT)
    bad = [row for row in rows_of(record) if row["status"] in ("wrong", "crashed")]
    lines += [""] * bool(bad) + [shorten(_complaint(row), 2 * SHORT) for row in bad[:20]]
    lines += [f"- and {len(bad) - 20} more"] * (len(bad) > 20)
    return lines if record["emulated"] else [*lines, "", *goals(record)]


def _commits(record: Record) -> str:
    of_parts = [o.get("commit", "") for o in record["parts"].values()]
    commits = list(dict.fromkeys(filter(None, of_parts)))
    state = " with changes" if record["commit"].get("dirty") else ""
    named = ", ".join(commits) or record["commit"].get("id", "")[:10] or "unknown"
    word = "Commit" if len(commits) < 2 else "Commits"
    return f"{word} {named}{state}, {record['date']}."


def summary(
    record: Record, names: Sequence[str] | None = None, most: int | None = None
) -> list[str]:
    """A line a part: what became of it, in ``most`` letters if given."""
    cells = [("part", "stage", "outcome", "seconds", "")]
    for part in PARTS:
        outcome = record["parts"].get(part.name)
        if outcome is None or (names is not None and part.name not in names):
            continue
        seconds = f"{outcome['seconds']:.0f}" if "seconds" in outcome else "–"
        reason = " ".join(outcome.get("reason", "").replace("|", "/").split())
        reason = reason if most is None else shorten(reason, most)
        cells.append((part.title, str(part.stage), outcome["status"], seconds, reason))
    return markdown_table(cells)


def _complaint(row: Row) -> str:
    reason = " ".join(row["reason"].split())
    return f"- {row['backend']}: {row['op']}, {row['size']}: {row['status']}: {reason}"


def _table(part: Part, result: dict[str, Any], record: Record) -> list[str]:
    if "rows" in result:
        return _row_tables(result["rows"], copy_rate(record))
    if "bench" in result:
        bench = bench_of(result)
        return [
            line for which in bench.tables() for line in [*bench.markdown(*which).split("\n"), ""]
        ]
    if "plans" in result:
        return tuner.lines(result["plans"])
    if part.profiler:
        return ["```", *result["text"].splitlines(), "```"]
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return ["```json", *text.splitlines(), "```"]


def _row_tables(rows: list[Row], copy: float | None) -> list[str]:
    lines: list[str] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        table = _verdicts(mine) if kind in ("smoke", "torch") else _times(mine, copy)
        lines += [""] * bool(lines) + table
    told = [_complaint(row) for row in rows if row["status"] in ("wrong", "crashed")]
    skipped = Counter(" ".join(row["reason"].split()) for row in rows if row["status"] == "skipped")
    told += [f"- {count} skipped: {reason}" for reason, count in skipped.items()]
    return lines + [""] * bool(told) + told


def _verdicts(rows: list[Row]) -> list[str]:
    """A line an op, a column a size: the largest error, or the verdict."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    found = {(row["op"], row["size"]): row for row in rows}
    ops = dict.fromkeys(row["op"] for row in rows)
    cells = [(op, *(_verdict(found.get((op, size))) for size in sizes)) for op in ops]
    return markdown_table([("error against float64", *sizes), *cells])


def _verdict(row: Row | None) -> str:
    if row is None:
        return ""
    worst = worst_error(row)
    if row["status"] == "right":
        return "right" if worst is None else f"{worst:.1e}"
    return row["status"] if worst is None else f"{row['status']} {worst:.1e}"


def worst_error(row: Row) -> float | None:
    """The largest relative RMS error of a row's results."""
    errors = [error[0] for error in row.get("errors", {}).values() if error[0] is not None]
    return max(errors, default=None)


def error_ratio(row: Row) -> float | None:
    """The largest error as a multiple of plain float32's on the same inputs."""
    found = row.get("errors", {}).values()
    ratios = [ours / plain for ours, plain in found if ours is not None and plain]
    return max(ratios, default=None)


def _times(rows: list[Row], copy: float | None) -> list[str]:
    cells = [("op", "size", "time", "predicted", "of the copy rate", "TFLOP/s", "error by plain's")]
    for row in rows:
        if "seconds" not in row:
            cells.append((row["op"], row["size"], row["status"], "", "", "", ""))
            continue
        seconds, worst = row["seconds"], error_ratio(row)
        predicted = prediction(row)
        share = f"{100 * row['bytes'] / seconds / copy:.0f}%" if copy and row.get("bytes") else "–"
        rate = f"{row['flop'] / seconds / 1e12:.2f}" if row.get("flop") and seconds > 0 else "–"
        cells.append(
            (
                row["op"], row["size"], format_seconds(seconds) if seconds > 0 else "–",
                "–" if predicted is None else format_seconds(predicted), share, rate,
                "–" if worst is None else f"{worst:.2f}",
            )
        )  # fmt: skip
    return markdown_table(cells)


def prediction(row: Row) -> float | None:
    """Seconds that were predicted for a row of the CUDA C engine on an H100."""
    if row["backend"] != "cupy":
        return None
    return PREDICTED.get((row["kind"], row["op"], row["size"]))


# --- README --------------------------------------------------------------------------------------

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
README_WORKLOADS = {
    "step": ("captured training step", "cupy"),
    "recurrence": ("recurrence, forward", "cupy-graph"),
    "recurrence+bptt": ("recurrence, forward and BPTT", "cupy-graph"),
    "cross_entropy": ("cross entropy and its gradient", "cupy-graph"),
}


def readme_block(record: Record, folder: str) -> str:
    """Ours beside the fastest peer that is captured or compiled too, in float32; where and when.

    Args:
        folder: of the record, as README names it.
    """
    cells = [("at V=1027, H=256, B=32, T=35, float32", "ours", "fastest peer", "× ours")]
    for workload, (label, name) in README_WORKLOADS.items():
        for bench in benches(record).values():
            ours = bench.find(workload, "headline", name)
            peer = bench.best_peer(workload, "headline", "graph")
            if ours is None or peer is None or not ours.seconds or not peer.seconds:
                continue
            theirs = f"{peer.label}: {format_seconds(peer.seconds)}"
            ratio = f"{peer.seconds / ours.seconds:.1f}"
            cells.append((label, format_seconds(ours.seconds), theirs, ratio))
    rows = {
        (row["kind"], row["op"]): row
        for row in rows_of(record, backend="cupy")
        if row["size"] == "headline"
    }
    for op in (cases.STEP, cases.LONG_RUN, "character"):
        row = rows.get(("step", op), {})
        if "seconds" in row:
            found = prediction(row)
            text = "–" if found is None else f"predicted: {format_seconds(found)}"
            cells.append((f"{op}, many in a row", format_seconds(row["seconds"]), text, ""))
    smoke = [row for row in rows_of(record) if row["kind"] == "smoke"]
    right = sum(row["status"] == "right" for row in smoke)
    gpus = "; ".join(f"{g['name']}, driver {g['driver']}" for g in record["machine"]["gpus"])
    return "\n".join(
        [
            BEGIN, *markdown_table(cells), "",
            f"{gpus}. {_commits(record)} {right} of {len(smoke)} checks of an op at a size were "
            f"right, against float64. [All of it]({folder}/gpu.md).", END,
        ]
    )  # fmt: skip


# --- Goals -------------------------------------------------------------------------------------


def goals(record: Record) -> list[str]:
    """What was aimed at on an H100, and what was measured: a line each."""
    rows = {(r["kind"], r["backend"], r["op"], r["size"]): r for r in rows_of(record)}
    copy = copy_rate(record)

    def seconds(kind: str, op: str, size: str = "headline", backend: str = "cupy") -> float | None:
        return rows.get((kind, backend, op, size), {}).get("seconds")

    def share(op: str) -> float | None:
        row = rows.get(("large", "cupy", op, "large"), {})
        return 100 * row["bytes"] / row["seconds"] / copy if copy and "seconds" in row else None

    def micro(value: float | None) -> float | None:
        return None if value is None else value * 1e6

    def ratio(slow: float | None, fast: float | None) -> float | None:
        return slow / fast if slow and fast else None

    step, forward = seconds("step", cases.STEP), seconds("ops", "recurrence")
    peer = benches(record)
    worst = [
        error_ratio(row)
        for row in rows_of(record, backend="cupy")
        if row["kind"] in ("ops", "large")  # of a handful of values plain float32 may have none
    ]
    lines: list[tuple[str, str, float | None, float, bool]] = [
        # what, unit, measured, goal, whether less is better
        ("recurrence forward", "µs", micro(forward), 14, True),
        ("BPTT", "µs", micro(seconds("ops", "node: BPTT")), 11, True),
        ("recurrence, cuDNN by ours, graphs", "×",
         ratio(_peer(peer, "recurrence", "cudnn-graph"), forward), 3, False),
        ("captured training step", "µs", micro(step), 73, True),
        ("captured step, best peer's graph by ours", "×", ratio(_best_step(peer), step), 3, False),
        ("20,000 training steps", "s", seconds("step", cases.LONG_RUN), 1.6, True),
        *((f"{op}, large, of the copy rate", "%", share(op), 85, False) for op in MEMORY_BOUND),
        ("a character", "µs", micro(seconds("step", "character")), 1, True),
        ("largest error by plain float32's", "×", max(filter(None, worst), default=None), 2, True),
        ("numba-cuda training step by cupy's", "×",
         ratio(seconds("step", cases.STEP, backend="numba-cuda"), step), 2.5, True),
        ("numba-cuda recurrence by cupy's", "×",
         ratio(seconds("ops", "recurrence", backend="numba-cuda"), forward), 2, True),
    ]  # fmt: skip
    cells = [("goal", "aim", "measured", "")]
    for what, unit, measured, aim, less in lines:
        sign = "≤" if less else "≥"
        met = measured is not None and (measured <= aim if less else measured >= aim)
        word = "not measured" if measured is None else "met" if met else "missed"
        value = "–" if measured is None else f"{measured:.3g} {unit}"
        cells.append((what, f"{sign} {aim:g} {unit}", value, word))
    return markdown_table(cells)


def _peer(found: dict[str, BenchResult], workload: str, name: str) -> float | None:
    rows = (bench.find(workload, "headline", name) for bench in found.values())
    return next((row.seconds for row in rows if row is not None and row.seconds), None)


def _best_step(found: dict[str, BenchResult]) -> float | None:
    """The fastest captured or compiled step of a peer in true float32."""
    rows = (bench.best_peer("step", "headline", "graph") for bench in found.values())
    return min((row.seconds for row in rows if row is not None and row.seconds), default=None)
