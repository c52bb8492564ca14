"""The threads of the ``numba`` backend: a fixed team that runs one compiled function at a time.

numba's own thread layers abort the process when two Python threads enter them (workqueue) or when
a child of ``fork`` does (GNU OpenMP). A team here serialises its callers with a lock, and a forked
child starts a team of its own. The members are Python threads inside compiled code without the
GIL; between jobs they sleep.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def thread_count() -> int:
    """Threads to use: NUMBA_NUM_THREADS, else OMP_NUM_THREADS, else the cores of this process."""
    available = int(numba.config.NUMBA_NUM_THREADS)
    if not os.environ.get("NUMBA_NUM_THREADS"):
        wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if wanted.isdigit() and int(wanted) > 0:
            return min(available, int(wanted))
    return available


class _Job:
    """One call of ``function(tid, size, sync, *arguments)`` on every member."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Team:
    """``size`` threads. Thread 0 is the leader: it hands a job to the others and takes part."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._alone = np.zeros(32, np.int64)
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Forget threads and locks: there are none yet, or they stayed in the parent process."""
        self._lock = threading.Lock()
        self._sync = np.zeros(32, np.int64)
        self._inboxes: list[queue.SimpleQueue[_Job]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, threads: int) -> None:
        """Run ``function(tid, nt, sync, *arguments)`` on ``threads`` threads: 1, or all of them.

        The function ends with a barrier. One thread means the caller's own.
        """
        if threads == 1 or self.size == 1:
            function(0, 1, self._alone, *arguments)
            return
        with self._lock:
            if not self._inboxes:
                self._start()
            job = _Job(function, arguments)
            try:
                self._inboxes[0].put(job)
                job.done.acquire()
            except BaseException:
                # Ctrl-C: the threads still write to the caller's arrays. Wait for them.
                self._drain()
                raise
        if job.error is not None:
            raise job.error

    def _start(self) -> None:
        self._inboxes = [queue.SimpleQueue() for _ in range(self.size)]
        for tid in range(self.size):
            threading.Thread(
                target=self._serve, args=(tid, self._inboxes), name=f"fastrnn-{tid}", daemon=True
            ).start()

    def _drain(self) -> None:
        """Return when all jobs handed to the leader are done, whatever interrupts the wait."""
        while True:
            try:
                fence = _Job(_nothing, ())
                self._inboxes[0].put(fence)
                fence.done.acquire()
                return
            except BaseException:
                continue

    def _serve(self, tid: int, inboxes: list[queue.SimpleQueue[_Job]]) -> None:
        sync = self._sync
        while True:
            job = inboxes[tid].get()
            if tid == 0 and job.function is not _nothing:
                for inbox in inboxes[1:]:
                    inbox.put(job)
            try:
                job.function(tid, self.size, sync, *job.arguments)
            except (
                BaseException
            ) as error:  # of compilation, so every member's: handed to the caller
                job.error = error
            if tid == 0:
                job.done.release()


def _nothing(*_: Any) -> None:
    pass
