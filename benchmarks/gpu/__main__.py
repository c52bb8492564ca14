"""What a machine with a GPU can say, in three stages of under three minutes each.

    python -m benchmarks.gpu [--stage 1|2|3] [--only PART …] [--backend NAME …]
                             [--out FOLDER] [--minutes M]
    python -m benchmarks.gpu --merge FOLDER … [--out FOLDER] [--readme README.md]

Without --stage all three run in a row. Every part runs in processes of its own with a time limit:
what fails, crashes or hangs is recorded and the rest goes on. After every row gpu.json is written
anew, after every part gpu.md and gpu.log, in FOLDER (default: benchmarks/results/MACHINE), beside
what is there of earlier runs. --only takes names of parts, ops and sizes. --merge joins the
folders of runs made apart. Nothing is installed or fetched; a plain checkout is enough, whose
commit FASTRNN_COMMIT names where there is no .git. --emulate puts an emulator and a simulator in
the GPU's place, at toy sizes: that tries the run, its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import record, report
from benchmarks.gpu.cases import Case
from benchmarks.gpu.parts import PARTS, ROW_LIMIT, STAGE_SECONDS, Part, Selection
from benchmarks.gpu.supervisor import CaseRun, environment, last_line, run_command, trim
from benchmarks.gpu.tasks import findings, tool
from benchmarks.gpu.worker import MARK, write_cases
from benchmarks.report import RESULTS
from fastrnn.bench import commit, machine, machine_slug

STAND_INS = "tests.gpu_stand_ins:open_stand_in"
STAND_IN_PATIENCE = 10.0
TEST_LIMIT = 20
"""Seconds that a test on the device may take."""
LOG_BYTES = 1 << 20
"""Of the log that are kept of a part: its beginning and its end."""


@dataclass
class Run:
    """One invocation: what it has found so far, and where that is kept."""

    out: Path
    stand_in: str | None = None
    row_limit: float = ROW_LIMIT
    before: record.Record | None = None
    found: record.Record = field(default_factory=dict)
    told: str = ""  # why nothing could be written last

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.before = record.load(self.out)
        self.found = {
            "machine": machine(),
            "commit": commit(),
            "date": _now(),
            "emulated": self.stand_in is not None,
            "parts": {},
        }
        # A folder that cannot be written or joined is noticed before anything runs.
        record.save(record.join(self.before, self.found), self.out)

    @property
    def patience(self) -> float:
        """By how much the limits of stages and parts are wider: a stand-in is slow."""
        return 1.0 if self.stand_in is None else STAND_IN_PATIENCE

    def save(self, markdown: bool = True) -> record.Record:
        joined = record.join(self.before, self.found)
        try:
            record.save(joined, self.out)
            if markdown:
                (self.out / record.MARKDOWN).write_text(_drawn(joined), encoding="utf-8")
        except OSError as error:  # what is measured is printed at the end, and may be kept later
            if str(error) != self.told:
                self.told = str(error)
                print(f"{self.out}: {error}", file=sys.stderr, flush=True)
        return joined

    def run(self, parts: Sequence[tuple[Part, list[Case]]], minutes: float | None) -> None:
        """Run the parts, stage by stage."""
        end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        for stage in sorted({part.stage for part, _ in parts}):
            seconds = STAGE_SECONDS[stage] * self.patience
            limit = time.monotonic() + (seconds if minutes is None else 60 * minutes)
            for part, cases in parts:
                if part.stage == stage:
                    self.part(part, cases, min(limit, end))

    def part(self, part: Part, cases: list[Case], end: float) -> None:
        """Run one part within the time that is left."""
        begin, left = time.monotonic(), end - time.monotonic()
        outcome: dict[str, Any] = {"stage": part.stage, "date": _now(), "commit": _commit_id()}
        self.found["parts"][part.name] = outcome
        reason = part.absent(self.stand_in is not None)
        if reason is not None:
            outcome |= {"status": "absent", "reason": reason}
        elif left < part.seconds.least:
            reason = f"{max(0.0, left):.0f} s were left, it needs {part.seconds.least:.0f}"
            outcome |= {"status": "skipped", "reason": reason}
        else:
            print(f"{part.title} …", file=sys.stderr, flush=True)
            outcome["status"] = "stopped"  # until it has ended
            try:
                with (self.out / record.LOG).open("ab", buffering=0) as log:
                    with contextlib.suppress(OSError):  # a full disk
                        log.write(f"\n===== {part.name}: {part.title}, {_now()}\n".encode())
                    at = log.tell()
                    limit = min(part.seconds.limit * self.patience, left)
                    if part.cases:
                        self._cases(part, cases, outcome, log, limit)
                    else:
                        self._process(part, outcome, log, limit)
                    if outcome["status"] == "failed" and "reason" not in outcome:
                        outcome["reason"] = last_line(log, at)
                    trim(log, at, LOG_BYTES)
            except SystemExit:
                outcome["reason"] = "the run was ended"
                raise
            except Exception as error:  # the other parts go on
                traceback.print_exc()
                outcome |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            finally:
                outcome["seconds"] = round(time.monotonic() - begin, 1)
        self.save()

    def _cases(
        self, part: Part, cases: list[Case], outcome: dict[str, Any], log: IO[bytes], limit: float
    ) -> None:
        rows: list[dict[str, Any]] = []
        outcome["result"] = {"rows": rows}

        def on_row(row: dict[str, Any]) -> None:
            rows.append(row | {"commit": outcome["commit"], "date": _now()})
            if row["status"] in ("wrong", "crashed"):
                print(f"  {row['op']}, {row['size']}: {row['status']}: {row['reason']}",
                      file=sys.stderr, flush=True)  # fmt: skip
            self.save(markdown=False)

        at = log.tell()
        run = CaseRun(
            cases, log, deadline=time.monotonic() + limit,
            row_limit=min(self.row_limit, part.row_limit * self.patience),
            stand_in=self.stand_in, prefix=part.prefix() if part.prefix else (), pool=part.pool,
            env=self._env(part), on_row=on_row,
        )  # fmt: skip
        try:
            run.run()
        finally:
            if part.prefix:
                _blame(rows, findings(_text_since(log, at), MARK))
        outcome["status"], reason = record.judge(rows)
        if reason:
            outcome["reason"] = reason

    def _process(self, part: Part, outcome: dict[str, Any], log: IO[bytes], limit: float) -> None:
        """A task, the tests, or a profiler: one process, and the file that it leaves."""
        result = self.out / f"{part.name}.tmp"
        result.unlink(missing_ok=True)
        work = result.with_suffix(".work.tmp")
        at = log.tell()
        try:
            code, why = run_command(
                _command(part, result, work, self.stand_in), log, limit,
                environment(**self._env(part)),
            )  # fmt: skip
        finally:  # what it had found counts however the run ends
            with contextlib.suppress(OSError, ValueError, ET.ParseError):
                outcome["result"] = (
                    _tests(result, _text_since(log, at))
                    if part.tests
                    else json.loads(result.read_text())
                )
            for leftover in (*self.out.glob(f"{part.name}*.tmp"), result.with_suffix(".partial")):
                leftover.unlink(missing_ok=True)
        if part.profiler:
            outcome["result"] = {"text": _text_since(log, at)[-6000:]}
        if code is None:
            failed = outcome.get("result", {}).get("failed", ())
            why += f"; {len(failed)} tests had failed" if failed else ""
            outcome |= {"status": "failed" if failed else "stopped", "reason": why}
        elif code == 0:
            outcome["status"], reason = report.verdict(outcome.get("result", {}))
            outcome |= {"reason": reason} if reason else {}
        else:
            reason = f"exit status {code}: {last_line(log, at)}"
            outcome |= {"status": "failed", "reason": reason}

    def _env(self, part: Part) -> dict[str, str]:
        env = dict(part.env)
        if self.stand_in is None:
            env["FASTRNN_REQUIRE_GPU"] = part.backend or "1"
        elif part.backend == "numba-cuda":
            env["NUMBA_ENABLE_CUDASIM"] = "1"
        return env


def _drawn(joined: record.Record) -> str:
    """The report, or why there is none: figures are not lost for a table's sake."""
    try:
        return report.markdown(joined)
    except Exception:
        text = f"```\n{traceback.format_exc()}```\n"
        print(text, file=sys.stderr)
        return text


def _command(part: Part, result: Path, work: Path, stand_in: str | None) -> list[str]:
    """The command of a part that has no cases."""
    python = [sys.executable, "-m"]
    if part.tests:
        if stand_in:
            return [*python, "pytest", "-q", "-p", "no:cacheprovider", "-n", "0",
                    f"--junitxml={result}", "tests/test_step.py", "-k",
                    "sm_90 and smallest and carried and not late"]  # fmt: skip
        # A test that hangs ends its process, which xdist replaces; -v names each as it ends.
        return [*python, "pytest", "-v", "-p", "no:cacheprovider", "-n", "6",
                f"--timeout={TEST_LIMIT}", "--timeout-method=thread", f"--junitxml={result}",
                *part.tests, "-k", part.keyword]  # fmt: skip
    if part.profiler:
        case = next(
            case
            for other in PARTS
            if other.name == "ops-cupy" and other.cases
            for case in other.cases(False)
            if case.op == "project"
        )
        write_cases(work, [case], events=result)
        return [str(tool(part.profiler)), "--target-processes", "all", "--clock-control", "none",
                "--kernel-name", "regex:gemm", "--launch-count", "2", "--section", "SpeedOfLight",
                "--section", "Occupancy", "--section", "WarpStateStats", "--section",
                "SchedulerStats", *python, "benchmarks.gpu.worker", str(work)]  # fmt: skip
    work.write_text(
        json.dumps(
            {
                "task": part.task, "backend": part.backend, "result": str(result),
                "stand_in": stand_in,
            }
        )
    )  # fmt: skip
    return [*python, "benchmarks.gpu.worker", str(work)]


def _text_since(log: IO[bytes], at: int) -> str:
    log.flush()
    with open(log.name, "rb") as reader:
        reader.seek(at)
        return reader.read().decode(errors="replace")


def _blame(rows: list[dict[str, Any]], found: dict[str, str]) -> None:
    """Mark the rows during which a sanitizer reported something."""
    for row in rows:
        label = " ".join(row[k] for k in ("kind", "backend", "op", "size"))
        if label in found:
            row |= {"status": "wrong", "reason": found.pop(label)}
    if found and rows:
        where, what = next(iter(found.items()))
        rows[0] |= {"status": "wrong", "reason": f"{where}: {what}"}


def _tests(path: Path, printed: str) -> dict[str, Any]:
    """Counts, and the names of the tests that failed.

    Args:
        path: the report of pytest, which it writes at its end. printed: the lines of its workers,
            by which it goes where that is missing.
    """
    if not path.exists():
        ended = re.findall(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.+?) *$", printed, re.MULTILINE)
        of = Counter(word for word, _ in ended)
        failed = [name for word, name in ended if word in ("FAILED", "ERROR")]
        return {
            "tests": len(ended), "failures": of["FAILED"], "errors": of["ERROR"],
            "skipped": of["SKIPPED"], "failed": failed,
        }  # fmt: skip
    suite = next(ET.parse(path).getroot().iter("testsuite"))
    failed = [
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "failed": failed}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _commit_id() -> str:
    return str(commit().get("id", ""))[:10]


def merge(folders: Sequence[Path], out: Path | None) -> Path:
    """Join the records of several folders, and their logs; the folder of the result.

    Raises:
        ValueError: a folder without a record, or records that do not belong together.
    """
    found, folders = [], list({folder.resolve(): folder for folder in folders}.values())
    for folder in folders:
        loaded = record.load(folder)
        if loaded is None:
            raise ValueError(f"{folder}: no {record.JSON} there")
        found.append(loaded)
    target = out or RESULTS / machine_slug(found[0]["machine"])
    joined = record.load(target) if target.exists() else None
    for one in found:
        joined = record.join(joined, one)
    assert joined is not None
    logs = [f / record.LOG for f in folders if f.resolve() != target.resolve()]
    target.mkdir(parents=True, exist_ok=True)
    with (target / record.LOG).open("a+b") as log:
        for path in filter(Path.exists, logs):
            log.seek(0)
            if (text := path.read_bytes()) not in log.read():  # not merged before
                log.write(text)
    record.save(joined, target)
    (target / record.MARKDOWN).write_text(_drawn(joined), encoding="utf-8")
    return target


def write_readme(readme: Path, folder: Path) -> None:
    """Draw the table of a README anew, from the record in ``folder``.

    Raises:
        ValueError: it has no place for it.
    """
    text, found = readme.read_text(encoding="utf-8"), record.load(folder)
    assert found is not None
    if report.BEGIN not in text or report.END not in text:
        raise ValueError(f"{readme}: expected {report.BEGIN} and {report.END}")
    head, tail = text.partition(report.BEGIN)[0], text.partition(report.END)[2]
    place = os.path.relpath(folder.resolve(), readme.resolve().parent)
    readme.write_text(head + report.readme_block(found, place) + tail, encoding="utf-8")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--stage", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[], metavar="PART",
                        help="parts, kinds of rows, ops, sizes")  # fmt: skip
    parser.add_argument("--backend", nargs="+", default=[], choices=("cupy", "numba-cuda"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/MACHINE")
    parser.add_argument(
        "--minutes", type=_positive, help="for all together; default: a stage's own"
    )
    parser.add_argument("--row-limit", type=_positive, default=ROW_LIMIT, metavar="SECONDS",
                        help="after which a row counts as hung (default: %(default)g)")  # fmt: skip
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", type=Path, help="whose table is drawn anew, with --merge")
    parser.add_argument("--list", action="store_true", help="what would run, and end")
    parser.add_argument("--emulate", nargs="?", const=STAND_INS, metavar="MODULE:FUNCTION",
                        help="what opens a stand-in for a GPU by a backend's name")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.merge:
            folder = merge(options.merge, options.out)
            if options.readme:
                write_readme(options.readme, folder)
            print(folder / record.MARKDOWN)
            return 0
        stand_in = options.emulate is not None
        selection = Selection(options.stage, options.only, options.backend, stand_in)
        chosen = selection.parts()
        if not chosen:
            raise ValueError("nothing to run: no part of those stages and backends has such rows")
        if options.list:
            for part, cases in chosen:
                rows = f", {len(cases)} rows" if part.cases else ""
                seconds = f"about {part.seconds.estimate:.0f} s"
                print(f"stage {part.stage}: {part.name}: {part.title}{rows}, {seconds}")
            return 0
        about = machine()
        if not about["gpus"] and not stand_in:
            print("no NVIDIA GPU found: nvidia-smi lists none; --emulate tries the run without one")
            return 2
        out = options.out or RESULTS / machine_slug(about)
        out.mkdir(parents=True, exist_ok=True)
        with record.alone(out):
            run = Run(out, options.emulate, options.row_limit)
            return _run_and_tell(run, chosen, options.minutes)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.gpu: {error}", file=sys.stderr)
        return 2


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _end_once(number: int, frame: Any) -> None:
    """Unwind, which ends the processes of a part; ``timeout`` sends its signal twice."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def _run_and_tell(run: Run, chosen: list[tuple[Part, list[Case]]], minutes: float | None) -> int:
    """Run the parts and print what became of them, also when a signal ends the run."""
    before = {each: signal.signal(each, _end_once) for each in ENDING}
    stopped = 0
    try:
        run.run(chosen, minutes)
    except SystemExit as stop:
        stopped = int(stop.code or 0)
    joined = run.save()
    names = [part.name for part, _ in chosen if part.name in joined["parts"]]
    print("\n".join(report.short(joined, names)))
    print(f"\n{run.out / record.MARKDOWN}")
    for each, handler in before.items() if not stopped else ():
        signal.signal(each, handler)
    ended = [joined["parts"][name]["status"] for name in names]
    return stopped or (0 if all(status in ("ok", "absent") for status in ended) else 1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
