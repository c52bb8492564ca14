"""Runs cases and tasks in processes of their own, so that a crash or a hang costs one of them.

Cases run one after another in one process. The one during which it ends, or in which nothing has
happened for too long, is recorded as crashed, and the rest goes on in another process. An op that
has ended one is tried again after the others, and when it has ended two, not at further sizes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.cases import Case, Key
from benchmarks.gpu.worker import CONTEXT_LOST, encode, key_of, write_cases

ROOT = Path(__file__).resolve().parent.parent.parent
POLL = 0.05
START_LIMIT = 60.0
"""Seconds that a process may take until it begins its first case: imports, the device."""
EXIT_LIMIT = 15.0
"""Seconds that it may take to end after its last."""
END_LIMIT = 10.0
"""Seconds for which the end of a killed process is awaited: a driver that hangs keeps it."""
PRINTED_LIMIT = 16 << 20
"""Bytes that a process may print."""
_TALKATIVE = f"it printed more than {PRINTED_LIMIT >> 20} MiB"
TAIL = 1 << 18
"""Bytes of the log in which the last line is looked for."""
FATAL = 2
"""So many processes an op may end."""

Row = dict[str, Any]


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs from this checkout."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **more}


def _printed(log: IO[bytes]) -> int:
    return os.fstat(log.fileno()).st_size


def start(command: Sequence[str], log: IO[bytes], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that it can be ended with all that it starts."""
    return subprocess.Popen(
        list(command), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes], ask: bool = False) -> None:
    """End a process and everything it started; ``ask`` lets it say first where it was."""
    if ask and process.poll() is None and hasattr(signal, "SIGUSR1"):
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=END_LIMIT)


def run_command(
    command: Sequence[str], log: IO[bytes], limit: float, env: dict[str, str]
) -> tuple[int | None, str]:
    """Run to the end or the limit: the exit status (None: stopped), and why it was stopped."""
    at, deadline = log.tell(), time.monotonic() + limit
    process = start(command, log, env)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL), ""
            if time.monotonic() >= deadline:
                return None, f"no end within {limit:.0f} s"
            if _printed(log) - at > PRINTED_LIMIT:
                return None, _TALKATIVE
    finally:
        end(process, ask=process.poll() is None)


class CaseRun:
    """Runs ``cases`` in as many processes as it takes; :attr:`rows` has one row a case.

    Args:
        log: where the processes print.
        deadline: of ``time.monotonic()``, after which the rest is skipped.
        row_limit: seconds that a row may take.
        stand_in: ``"module:function"`` that opens a stand-in, or None for a GPU.
        prefix: command before the interpreter, such as a sanitizer's. pool: CuPy's, see the worker.
        env: more of it. on_row: called with every row as soon as it is there.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        log: IO[bytes],
        *,
        deadline: float,
        row_limit: float,
        stand_in: str | None = None,
        prefix: Sequence[str] = (),
        pool: bool = True,
        env: dict[str, str] | None = None,
        on_row: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.todo = {case.key: case for case in cases}
        self.rows: list[Row] = []
        self.log, self.deadline, self.row_limit = log, deadline, row_limit
        self.stand_in, self.prefix, self.pool = stand_in, prefix, pool
        self.env, self.on_row = environment(**(env or {})), on_row
        self.exits: list[int] = []
        self._fatal: Counter[tuple[str, str]] = Counter()
        self._heard, self._barren = False, 0  # of the last process; such ones in a row

    def run(self) -> list[Row]:
        while self.todo:
            if time.monotonic() >= self.deadline:
                self._skip(list(self.todo), "no time was left")
            else:
                self._one_process()
        return self.rows

    def _one_process(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            work, events = Path(folder) / "work.json", Path(folder) / "events"
            events.touch()
            write_cases(work, self.todo.values(), events, self.stand_in, self.pool)
            command = [*self.prefix, sys.executable, "-m", "benchmarks.gpu.worker", str(work)]
            at = self.log.tell()
            process = start(command, self.log, self.env)
            try:
                with events.open(encoding="utf-8") as stream:
                    begun, why = self._follow(process, stream, at)
            finally:
                end(process)
        code = process.returncode if process.returncode is not None else -signal.SIGKILL
        self.exits.append(code)
        self._barren = 0 if self._heard else self._barren + 1
        told = begun is None and code in (0, CONTEXT_LOST)
        if not self.todo or (told and self._heard):
            return
        reason = why or f"{_status(code)}: {last_line(self.log, at)}"
        if self._barren >= FATAL:
            self._skip(list(self.todo), f"no process got to its first case: {reason}")
        elif time.monotonic() >= self.deadline:
            self._skip([begun] if begun else [], reason)
        else:  # at a case, or before the next one
            case = self.todo[begun] if begun else next(iter(self.todo.values()))
            self._take(self._row(case, "crashed", reason), fatal=True)

    def _follow(
        self, process: subprocess.Popen[bytes], stream: IO[str], at: int
    ) -> tuple[Key | None, str]:
        """Take the rows of a process until it ends or must be ended: what it was at, and why."""
        begun: Key | None = None
        last, limit, buffer = time.monotonic(), max(START_LIMIT, self.row_limit), ""
        self._heard = False
        while True:
            ended = process.poll() is not None
            buffer += stream.read()
            while "\n" in buffer:
                line, _, buffer = buffer.partition("\n")
                event, last, self._heard = json.loads(line), time.monotonic(), True
                limit = self.row_limit
                if "begin" in event:
                    begun = Key(*event["begin"])
                else:
                    begun = None
                    self._take(event["row"], fatal=event["lost"])
            if ended:
                return begun, ""
            now = time.monotonic()
            if self.todo and now >= self.deadline:
                end(process, ask=True)
                return begun, "the time of its part was up"
            if _printed(self.log) - at > PRINTED_LIMIT:
                end(process)
                return begun, _TALKATIVE
            if not self.todo:
                limit = min(limit, EXIT_LIMIT)
            if now - last > limit:
                end(process, ask=True)
                return begun, f"hung: no end within {limit:.0f} s"
            time.sleep(POLL)

    def _take(self, row: Row, fatal: bool = False) -> None:
        self.rows.append(row)
        self.on_row(row)
        self.todo.pop(key_of(row), None)
        which = row["backend"], row["op"]
        self._fatal[which] += fatal
        if fatal:
            self.todo = dict(sorted(self.todo.items(), key=lambda one: self._fatal[one[0][1:3]]))
        if self._fatal[which] >= FATAL:
            rest = [key for key in self.todo if (key.backend, key.op) == which]
            self._skip(rest, f"{row['op']} has ended {FATAL} processes")

    def _skip(self, keys: Sequence[Key], reason: str) -> None:
        for key in keys:
            row = self._row(self.todo.pop(key), "skipped", reason)
            self.rows.append(row)
            self.on_row(row)

    @staticmethod
    def _row(case: Case, status: str, reason: str) -> Row:
        return {**encode(case), "status": status, "reason": reason}


def _status(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def last_line(log: IO[bytes], at: int) -> str:
    """The last line that was printed since ``at``."""
    log.flush()
    with open(log.name, "rb") as reader:
        reader.seek(max(at, _printed(log) - TAIL))
        lines = reader.read().decode(errors="replace").splitlines()
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    told = fatal or [line for line in lines if line.strip()]
    return told[-1].strip()[:300] if told else "no message"


def trim(log: IO[bytes], at: int, most: int) -> None:
    """Cut the middle out of what was printed since ``at``, where it is more than ``most`` bytes."""
    size = _printed(log)
    if size - at <= most:
        return
    with open(log.name, "rb") as reader:
        reader.seek(size - most // 2)
        tail = reader.read()
    os.ftruncate(log.fileno(), at + most // 2)
    log.write(f"\n===== {size - at - most} bytes left out\n".encode() + tail)
    log.flush()
