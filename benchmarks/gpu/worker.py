"""The process in which cases or a task run; it may crash or hang, and the supervisor notices.

    python -m benchmarks.gpu.worker WORK.json

``WORK.json`` holds the cases (or the name of a task), where events go, the function that opens a
stand-in for a GPU, and whether CuPy may keep freed memory. Events are JSON lines: what begins, and
each row when it is there. Standard output is the log; a line before each case says which it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.cases import Case, Key
from fastrnn.backend import Backend, Dims, open_backend

CONTEXT_LOST = 3
"""Exit status: the device's context is of no more use, and the rest needs another process."""
PR_SET_PDEATHSIG = 1
"""Of ``prctl``."""
MARK = ">>> "
"""Begins the line of the log that says which case runs."""


def encode(case: Case) -> dict[str, Any]:
    """A case as JSON has it."""
    d = case.dims
    return {**asdict(case), "dims": {"T": d.T, "B": d.B, "H": d.H, "V": d.V}}


def decode(data: dict[str, Any]) -> Case:
    """What :func:`encode` made."""
    return Case(**{**data, "dims": Dims(**data["dims"])})


def write_cases(
    path: Path, cases: Iterable[Case], events: Path, stand_in: str | None = None, pool: bool = True
) -> None:
    """Write the ``WORK.json`` of some cases."""
    work = {
        "cases": [encode(case) for case in cases],
        "events": str(events),
        "stand_in": stand_in,
        "pool": pool,
    }
    path.write_text(json.dumps(work), encoding="utf-8")


def opener(stand_in: str | None) -> Callable[[str], Backend]:
    """What opens a backend by name: ``fastrnn.open_backend``, or ``"module:function"``."""
    if stand_in is None:
        return open_backend
    module, _, name = stand_in.partition(":")
    found: Callable[[str], Backend] = getattr(importlib.import_module(module), name)
    return found


def run_case(backend: Backend, case: Case) -> dict[str, Any]:
    """Run one case: its row, whatever happens short of the end of the process."""
    from benchmarks.gpu.measure import measure

    row: dict[str, Any] = {**encode(case), "status": "right"}
    begin = time.perf_counter()
    try:
        row |= measure(backend, case)
        faults = row.pop("faults")
        if faults:
            row |= {"status": "wrong", "reason": "; ".join(faults)}
    except Exception as error:  # one row that fails must not take the others along
        traceback.print_exc()
        row |= {"status": "crashed", "reason": f"{type(error).__name__}: {error}"[:500]}
    row["took"] = round(time.perf_counter() - begin, 2)
    return row


def recovered(backend: Backend) -> bool:
    """Whether the device works again after an error; not after an illegal address."""
    try:
        if hasattr(backend, "device"):
            backend.device.abandon()  # what the work that failed has left open
        backend.sync()
    except Exception:
        traceback.print_exc()
        return False
    return True


def free_memory() -> None:
    """Give cached blocks back: the next case may need all memory."""
    gc.collect()
    if "cupy" in sys.modules:
        with contextlib.suppress(Exception):  # a context that is lost frees nothing
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def keep_no_memory() -> None:
    """Let CuPy allocate and free every array: in its pool a sanitizer sees no small overrun."""
    cupy = importlib.import_module("cupy")
    cupy.cuda.set_allocator(None)
    cupy.cuda.set_pinned_memory_allocator(None)


def run_cases(work: dict[str, Any], events: TextIO) -> int:
    def emit(**event: Any) -> None:
        events.write(json.dumps(event, default=float) + "\n")
        events.flush()

    opened = functools.cache(opener(work["stand_in"]))
    if not work["pool"]:
        keep_no_memory()
    for case in map(decode, work["cases"]):
        backend = opened(case.backend)  # what cannot be opened is the fault of no case
        with contextlib.suppress(OSError):  # the log's disk is full
            print(f"{MARK}{case.key}", flush=True)
        emit(begin=case.key)
        row = run_case(backend, case)
        lost = row["status"] == "crashed" and not recovered(backend)
        emit(row=row, lost=lost)
        if lost:
            return CONTEXT_LOST
        free_memory()
    return 0


def run_task(work: dict[str, Any]) -> int:
    from benchmarks.gpu.tasks import TASKS, Task

    result = Path(work["result"])

    def save(found: dict[str, Any]) -> None:
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(found, default=float))
        partial.replace(result)

    task = Task(save, opener(work["stand_in"]), work["backend"], work["stand_in"] is not None)
    save(TASKS[work["task"]](task))
    return 0


def end_with_parent() -> None:
    """Have Linux kill this process when the one that started it is killed."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    end_with_parent()
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # the supervisor asks where it hangs
    work = json.loads(Path(sys.argv[1]).read_text())
    if "task" in work:
        return run_task(work)
    with open(work["events"], "a", encoding="utf-8") as events:
        return run_cases(work, events)


def key_of(row: dict[str, Any]) -> Key:
    """What a row is found by."""
    return Key(row["kind"], row["backend"], row["op"], row["size"])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A context that was lost, or a kernel that hangs, can keep the interpreter from ending.
    os._exit(code) if code else sys.exit(0)
