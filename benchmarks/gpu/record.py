"""``gpu.json``: what was run, where, at which commit; joining it with what was run before.

    machine, commit, date, emulated     of the last run
    parts.NAME.status                   ok, failed, stopped, skipped or absent
    parts.NAME.reason, .seconds, .stage, .commit, .date
    parts.NAME.result                   of a task; of cases: {"rows": [...]}

A row has kind, backend, op, size, dims, commit, date and status ("right", "wrong", "crashed",
"skipped"), and where there are any errors, seconds, FLOP, bytes and the reason. Errors that are not
finite are null.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.worker import key_of

Record = dict[str, Any]
JSON, MARKDOWN, LOG = "gpu.json", "gpu.md", "gpu.log"
VERDICTS = ("right", "wrong", "crashed")


def load(folder: Path) -> Record | None:
    """The record in a folder, if there is one.

    Raises:
        ValueError: what lies there is something else.
    """
    path = folder / JSON
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = record["parts"]
        for key in ("emulated", "date", "commit"):
            record[key]
        [(gpu["name"], gpu["driver"]) for gpu in record["machine"]["gpus"]]
        for name, outcome in parts.items():
            if not isinstance(outcome["status"], str):
                raise TypeError(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a record of `python -m benchmarks.gpu`: {error!r}"
        ) from error
    return dict(record)


def save(record: Record, folder: Path) -> None:
    """Write the record so that an interruption, or a full disk, leaves the old one or the new one.

    A number that is not finite is null: JSON has none.
    """
    text = json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False)
    partial = folder / f"{JSON}.tmp"
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / JSON)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, to the end of the block or of the process.

    Raises:
        ValueError: another run writes there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"{folder}: another run writes there") from error
    finally:
        os.close(handle)


def join(old: Record | None, new: Record) -> Record:
    """Both; of what both have, the new one, unless it did not come to a verdict.

    Raises:
        ValueError: one is of an emulator and the other of a device, or their GPUs differ.
    """
    if old is None:
        return new
    for what, values in (
        ("stand-in or device", [r["emulated"] for r in (old, new)]),
        ("GPUs", [sorted(g["name"] for g in r["machine"]["gpus"]) for r in (old, new)]),
    ):
        if values[0] != values[1]:
            raise ValueError(f"records of different {what} cannot be joined: {values}")
    # They may be given in another order than they were made; each part has a date of its own.
    old, new = _in_order(old, new)
    parts = dict(old["parts"])
    for name, outcome in new["parts"].items():
        parts[name] = _join_outcomes(*_in_order(parts[name], outcome)) if name in parts else outcome
    return {**old, **new, "parts": parts}


def _in_order(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Both by their dates: records, outcomes of a part, or rows."""
    return sorted((first, second), key=lambda one: str(one.get("date", "")))


def _join_outcomes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if "result" not in old:
        return old if new["status"] in ("absent", "skipped") else new
    if "result" not in new:
        return old if new["status"] in ("absent", "skipped") else {**new, "result": old["result"]}
    if "rows" not in new["result"] or "rows" not in old["result"]:
        return new
    rows = {key_of(row): row for row in old["result"]["rows"]}
    for row in new["result"]["rows"]:
        key = key_of(row)
        if row["status"] in VERDICTS or key not in rows:
            before = rows.pop(key, row)
            rows[key] = _in_order(before, row)[1] if before["status"] in VERDICTS else row
    joined = {**new, "result": {**old["result"], **new["result"], "rows": list(rows.values())}}
    joined["status"], reason = judge(rows.values())
    joined.pop("reason", None)
    return joined | ({"reason": reason} if reason else {})


def judge(rows: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """The status of a part by its rows, and which of them are to blame."""
    rows = list(rows)
    bad = [row for row in rows if row["status"] in ("wrong", "crashed")]
    if bad:
        named = ", ".join(f"{row['op']} {row['size']} ({row['status']})" for row in bad[:6])
        return "failed", f"{len(bad)} of {len(rows)}: {named}{', …' if len(bad) > 6 else ''}"
    left = [row for row in rows if row["status"] == "skipped"]
    if left:
        return "stopped", f"{len(left)} of {len(rows)} not run: {left[0]['reason']}"
    return "ok", ""
