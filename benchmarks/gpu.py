"""Everything that a machine with a GPU can say, in one command and under ten minutes.

    python -m benchmarks.gpu [--out FOLDER] [--minutes 9.5] [--only PART …] [--emulate]

Parts run one after another, each in a process of its own with a time limit: what fails or hangs is
reported and the rest goes on. After every part ``gpu.json`` and ``gpu.md`` are written anew to
``benchmarks/results/MACHINE``. Nothing is installed and nothing is fetched; it works from a plain
checkout. ``--emulate`` puts the emulator in the GPU's place, at toy sizes: that tries the
orchestration, its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import gpu_parts
from benchmarks.report import RESULTS
from fastrnn.bench import commit, machine, machine_slug, markdown_table

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        name: what ``--only`` takes. title: its heading in the report.
        limit: seconds after which it is stopped. least: seconds below which it is not begun.
        command: the arguments after the interpreter's name, given where to write the part's JSON.
        absent: why it cannot run here, or None.
        emulated: whether it makes sense with the emulator in the GPU's place.
    """

    name: str
    title: str
    limit: float
    least: float
    command: Callable[[Path, bool], list[str]]
    absent: Callable[[], str | None] = lambda: None
    emulated: bool = True


def _module(name: str) -> Callable[[Path, bool], list[str]]:
    """A part written in Python, in :mod:`benchmarks.gpu_parts`."""

    def command(result: Path, emulate: bool) -> list[str]:
        arguments = [sys.executable, "-m", "benchmarks.gpu_parts", name, str(result)]
        return [*arguments, *(["--emulate"] if emulate else [])]

    return command


TESTS = (
    "tests/test_ops.py",
    "tests/test_step.py",
    "tests/test_ops_dispatch.py",
    "tests/test_trainer.py",
    "tests/test_decoding.py",
)


def _tests(result: Path, emulate: bool) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "--maxfail=10"]
    if emulate:
        return [*command, "tests/test_step.py", "-k", "sm_90 and smallest and carried"]
    return [
        *command,
        "-n",
        "6",
        *TESTS,
        "-k",
        "(cupy or numba-cuda or cuda) and not sm_",
    ]


def _sanitizer(tool: str) -> Callable[[Path, bool], list[str]]:
    def command(result: Path, emulate: bool) -> list[str]:
        return [
            str(sanitizer()),
            f"--tool={tool}",
            "--error-exitcode=9",
            "--print-limit=20",
            sys.executable,
            "-m",
            "benchmarks.gpu_parts",
            "smoke",
            str(result),
        ]

    return command


def sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    found = shutil.which("compute-sanitizer")
    for folder in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        candidate = Path(folder) / "bin" / "compute-sanitizer"
        if found is None and folder and candidate.exists():
            found = str(candidate)
    return found


def _no_sanitizer() -> str | None:
    return None if sanitizer() else "compute-sanitizer is not installed (part of the CUDA toolkit)"


PARTS = (
    Part("device", "The device", 60, 10, _module("device")),
    Part("tests", "Tests on the device", 200, 30, _tests),
    Part("smoke", "Every kernel once, at odd sizes", 120, 10, _module("smoke")),
    Part(
        "memcheck", "compute-sanitizer memcheck", 120, 30, _sanitizer("memcheck"),
        _no_sanitizer, emulated=False,
    ),
    Part(
        "racecheck", "compute-sanitizer racecheck", 120, 30, _sanitizer("racecheck"),
        _no_sanitizer, emulated=False,
    ),
    Part("ops", "Ops", 120, 20, _module("ops")),
    Part("step", "Training step, epochs, generation", 90, 20, _module("step")),
    Part("peers", "Against peers", 240, 40, _module("peers")),
)  # fmt: skip


# --- Running ---------------------------------------------------------------------------------


def run_part(part: Part, emulate: bool, limit: float) -> dict[str, Any]:
    """Run one part; its outcome: status, seconds, result, and the end of what it printed."""
    reason = part.absent()
    if reason is None and emulate and not part.emulated:
        reason = "it needs a real device"
    if reason is not None:
        return {"status": "absent", "reason": reason}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        log = Path(folder) / "log"
        command = part.command(result, emulate)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        if not emulate:
            env["FASTRNN_REQUIRE_GPU"] = "1"
        begin = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        text = log.read_text(errors="replace")
        outcome: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
        if code is None:
            outcome |= {"status": "stopped", "reason": f"no end within {limit:.0f} s"}
        elif code != 0:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
            outcome |= {"status": "failed", "reason": f"exit status {code}: {last.strip()[:300]}"}
        else:
            outcome["status"] = "ok"
        if result.exists():
            # A part writes after every measurement: what a stopped one had found is kept.
            outcome["result"] = json.loads(result.read_text())
        outcome["tail"] = text[-4000:]
        return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and everything it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    process.wait()


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def run(
    out: Path, minutes: float, parts: Sequence[Part] = PARTS, emulate: bool = False
) -> dict[str, Any]:
    """Run ``parts`` within ``minutes``; write ``gpu.json`` and ``gpu.md`` after each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    record: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "emulated": emulate,
        "parts": {},
    }
    for part in parts:
        left = end - time.monotonic()
        if left < part.least:
            outcome: dict[str, Any] = {
                "status": "skipped",
                "reason": f"{max(0.0, left):.0f} s were left, it needs {part.least:.0f}",
            }
        else:
            print(f"{part.title} …", file=sys.stderr, flush=True)
            outcome = run_part(part, emulate, min(part.limit, left))
        record["parts"][part.name] = outcome
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "gpu.md").write_text(report(record, parts))
    return record


# --- Reporting -------------------------------------------------------------------------------


def summary(record: dict[str, Any], parts: Sequence[Part] = PARTS) -> list[str]:
    """A line a part: what became of it."""
    cells = [("part", "outcome", "seconds", "")]
    for part in parts:
        outcome = record["parts"].get(part.name)
        if outcome is None:
            continue
        seconds = f"{outcome['seconds']:.0f}" if "seconds" in outcome else "–"
        cells.append((part.title, outcome["status"], seconds, outcome.get("reason", "")))
    return markdown_table(cells)


def report(record: dict[str, Any], parts: Sequence[Part] = PARTS) -> str:
    """The whole report in Markdown."""
    gpus = [f"{g['name']}, driver {g['driver']}" for g in record["machine"]["gpus"]]
    state = record["commit"].get("id", "installed package")[:10]
    state += " with changes" if record["commit"].get("dirty") else ""
    place = "emulator: the times mean nothing" if record["emulated"] else "; ".join(gpus)
    lines = [
        "# fastrnn on a GPU",
        "",
        f"{place or 'no GPU found'}. Commit {state}, {record['date']}.",
        "",
        *summary(record, parts),
    ]
    for part in parts:
        outcome = record["parts"].get(part.name, {})
        if "result" in outcome:
            lines += ["", f"## {part.title}", "", *gpu_parts.tables(part.name, outcome["result"])]
        elif part.name == "tests" and outcome.get("tail"):
            lines += ["", f"## {part.title}", "", "```", *outcome["tail"].splitlines()[-5:], "```"]
        if outcome.get("status") == "failed" and part.name != "tests":
            lines += ["", "```", *outcome["tail"].splitlines()[-15:], "```"]
    if not record["emulated"]:
        lines += ["", "## Goals", "", *gpu_parts.goals(_results(record))]
    return "\n".join(lines) + "\n"


def _results(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the parts found, by part."""
    return {name: o["result"] for name, o in record["parts"].items() if "result" in o}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/MACHINE")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], metavar="PART")
    parser.add_argument("--emulate", action="store_true", help="try the orchestration, no GPU")
    options = parser.parse_args(arguments)
    about = machine()
    if not about["gpus"] and not options.emulate:
        print("no NVIDIA GPU found: nvidia-smi lists none; --emulate tries the run without one")
        return 2
    out: Path = options.out or RESULTS / machine_slug(about)
    parts = [p for p in PARTS if not options.only or p.name in options.only]
    record = run(out, options.minutes, parts, options.emulate)
    print("\n".join(summary(record, parts)))
    if not options.emulate:
        print("\n" + "\n".join(gpu_parts.goals(_results(record))))
    print(f"\n{out / 'gpu.md'}")
    return 0 if all(o["status"] in ("ok", "absent") for o in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
