"""The process of a contender: starting it, asking it, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastrnn.bench.contenders import Contender
from fastrnn.bench.paths import PACKAGE, PEER_FOLDER


class WorkerError(RuntimeError):
    """A contender's process ended, or did not answer; the message holds the end of its log."""


class WorkerTimeoutError(WorkerError):
    """A contender took longer than it may, and was stopped."""


ANSWER_SECONDS = 300.0
"""What each answer may take where there is no limit for all of them together."""


class Worker:
    """The process of one contender. Starts at once; :attr:`report` is its start report.

    Args:
        limit: seconds for all of its answers together, the start report included; None gives
            each :data:`ANSWER_SECONDS`.
    """

    def __init__(
        self,
        contender: Contender,
        workload: str,
        problem: Path,
        *,
        threads: int | None = None,
        limit: float | None = None,
    ) -> None:
        self.contender, self.limit, self._used = contender, limit, 0.0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._buffer = b""
        name = "generate" if workload.startswith("generate") else workload
        command = [
            interpreter(contender),
            str(PEER_FOLDER / "worker.py"),
            contender.module,
            contender.variant,
            name,
            str(problem),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(contender, threads),
        )
        try:
            self.report = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a task, wait for its answer (see the peers' ``worker.py``)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failure("does not listen any more") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        begin = time.monotonic()
        allowed = ANSWER_SECONDS if self.limit is None else self.limit - self._used
        while b"\n" not in self._buffer:
            left = begin + allowed - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                what = f"gave no answer within {self.limit or ANSWER_SECONDS:g} s"
                raise WorkerTimeoutError(str(self._failure(what)))
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                # Its output is closed before it has said why.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)
                raise self._failure("ended")
            self._buffer += chunk
        self._used += time.monotonic() - begin
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> WorkerError:
        """The error for a worker that is of no more use; ends it and what it started."""
        for child in _descendants(self._process.pid):
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        self._process.kill()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
        return WorkerError(f"{what}: {' | '.join(tail) or 'no message'}")

    def dismiss(self) -> None:
        """Tell the process to end, without waiting for it."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def close(self) -> None:
        """End the process."""
        self.dismiss()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did: compilers, for the most part.

    Empty where there is no ``/proc``.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found, due = [], [pid]
    while due:
        below = children.get(due.pop(), [])
        found += below
        due += below
    return found


def interpreter(contender: Contender) -> str:
    """The Python of a contender: ``FASTRNN_BENCH_TF_PYTHON`` for TensorFlow, where it is set."""
    if contender.module == "tensorflow_tutorial":
        return os.environ.get("FASTRNN_BENCH_TF_PYTHON", "").strip() or sys.executable
    return sys.executable


def environment(contender: Contender, threads: int | None) -> dict[str, str]:
    """The environment of a contender's process."""
    env = dict(os.environ)
    if interpreter(contender) == sys.executable:  # another Python must not see our packages
        paths = [str(PACKAGE.parent), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    env["TF_CPP_MIN_LOG_LEVEL"] = env.get("TF_CPP_MIN_LOG_LEVEL", "2")
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if contender.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"], env["JAX_PLATFORMS"] = "", "cpu"
    if threads is not None:
        for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
            env[f"{name}_NUM_THREADS"] = str(threads)
        env["FASTRNN_BENCH_CORES"] = str(threads)
    return env | dict(contender.env)
