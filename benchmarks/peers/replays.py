"""``n`` units of work as calls from Python, or as replays of graphs that hold one or many units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MANY = 16
"""Units in the larger of two graphs. A unit may take less time than the launch of its graph: with
many of them in each the host is no longer what is timed, for ours and for peers alike."""


def by_calls(call: Callable[[], Any]) -> Callable[[int], Any]:
    """A function that makes ``n`` calls, ``n >= 1``, and returns what the last one returned."""

    def run(n: int) -> Any:
        for _ in range(n):
            out = call()
        return out

    return run


def by_replays(record: Callable[[int], Callable[[], Any]]) -> Callable[[int], Any]:
    """The same by replays.

    Args:
        record: makes the graph of so many units; what it returns replays that graph and returns
            the results of the last unit in it.
    """
    many, one = record(MANY), record(1)

    def run(n: int) -> Any:
        for _ in range(n // MANY):
            out = many()
        for _ in range(n % MANY):
            out = one()
        return out

    return run
