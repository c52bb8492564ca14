"""The threads of the ``numba`` backend: a fixed team that runs one compiled function at a time.

numba's own thread layers abort the process when two Python threads enter them (workqueue) or when
a child of ``fork`` does (GNU OpenMP). A team here serialises its callers with a lock, and a forked
child starts a team of its own.

The caller takes part as thread 0. The others are Python threads; after a job they watch for the
next one for about a tenth of a millisecond, giving their core to whoever wants it, and then sleep.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastrnn.backends.cpu_emitter import jit
from fastrnn.backends.cpu_vector import address


def thread_count() -> int:
    """Threads to use: NUMBA_NUM_THREADS, else OMP_NUM_THREADS, else the cores of this process."""
    available = int(numba.config.NUMBA_NUM_THREADS)
    if not os.environ.get("NUMBA_NUM_THREADS"):
        wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if wanted.isdigit() and int(wanted) > 0:
            return min(available, int(wanted))
    return available


# --- Compiled code -----------------------------------------------------------------------------
# ``sync`` is int64, a line of 16 for each purpose, so that no two share a cache line: how many jobs
# thread 0 began; whether the job is off, and how long to wait for the next; and for each thread
# how many jobs it began, how many barriers it reached and, counted from 1, the processor that it
# began the last job on.

_BEGUN, _OFF, _LINGER, _THREADS, _LINE = 0, 16, 17, 32, 16
_LINUX = sys.platform == "linux"


def _sync(size: int) -> NDArray[np.int64]:
    sync = np.zeros(_THREADS + _LINE * (size + 1), np.int64)
    sync[_LINGER] = 200  # some tenth of a millisecond
    return sync


@intrinsic
def _read(typing_context, base, index):
    """``base[index]``, before whatever follows."""
    signature = types.int64(types.intp, types.int64)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(builder.gep(pointer, [arguments[1]]), "acquire", 8)

    return signature, generate


@intrinsic
def _write(typing_context, base, index, value):
    """``base[index] = value``, after whatever came before."""
    signature = types.void(types.intp, types.int64, types.int64)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[2], builder.gep(pointer, [arguments[1]]), "release", 8)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _replace(typing_context, base, index, old, new):
    """``base[index] = new`` if it is ``old``, in one; whether it was."""
    signature = types.boolean(types.intp, types.int64, types.int64, types.int64)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        pointer = builder.gep(pointer, [arguments[1]])
        pair = builder.cmpxchg(pointer, *arguments[2:], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return signature, generate


_sched_yield = types.ExternalFunction("sched_yield", types.intc())
_sched_getcpu = types.ExternalFunction("sched_getcpu", types.intc())
_AFFINITY = types.intc(types.intc, types.uintp, types.intp)
_sched_getaffinity = types.ExternalFunction("sched_getaffinity", _AFFINITY)
_sched_setaffinity = types.ExternalFunction("sched_setaffinity", _AFFINITY)


@jit
def _keep_apart(tid, nt, base):
    """Leave the processor that a thread before this one is on, if there is one for each.

    Linux may wake a thread on the processor of the one that wakes it and leave both there for tens
    of milliseconds, the next one idle: they take turns, and a job takes longer than on one thread.
    The thread is kept off those processors for the time of a system call, which moves it; then it
    may go anywhere again.
    """
    here = _sched_getcpu()
    crowded = False
    for other in range(tid):
        crowded |= _read(base, _THREADS + _LINE * other + 2) == here + 1
    if crowded:
        mine = np.zeros(128, np.uint8)  # a bit for each of 1024 processors; with more, it fails
        if _sched_getaffinity(0, len(mine), address(mine)) >= 0:
            there, others = 0, mine.copy()
            for cpu in range(8 * len(mine)):
                there += mine[cpu // 8] >> (cpu % 8) & 1
            for other in range(tid):
                cpu = _read(base, _THREADS + _LINE * other + 2) - 1
                if 0 <= cpu < 8 * len(mine):
                    others[cpu // 8] &= ~(1 << cpu % 8)
            # With no processor left the first call fails, and moves nothing.
            if there >= nt and _sched_setaffinity(0, len(mine), address(others)) == 0:
                _sched_setaffinity(0, len(mine), address(mine))
                here = _sched_getcpu()
    _write(base, _THREADS + _LINE * tid + 2, here + 1)


@jit
def begin(tid, nt, sync):
    """First in every function that a team runs: wait for thread 0. False: return at once."""
    if nt == 1:
        return True
    base = address(sync)
    if tid == 0:
        if _LINUX:
            _keep_apart(tid, nt, base)
        job = _read(base, _BEGUN) + 1
        _write(base, _BEGUN, job)
        spins = 0
        for other in range(1, nt):
            while _read(base, _THREADS + _LINE * other) < job and spins < 2000:
                spins += 1
        if spins == 2000:  # Somebody may be waiting for this very processor, to leave it.
            _sched_yield()
        return True
    mine = _THREADS + _LINE * tid
    job, spins = _read(base, mine) + 1, 0
    while _read(base, _BEGUN) < job:
        spins += 1
        if spins > 2000:
            if _read(base, _OFF) != 0:
                return False
            _sched_yield()
    _write(base, mine, job)
    if _LINUX:
        _keep_apart(tid, nt, base)
    return True


@jit
def _await(base, index, value):
    """Wait until ``base[index]`` has come to ``value``.

    Spins, since a phase lasts microseconds to milliseconds, but gives its core away to a thread
    that was put off it.
    """
    spins = 0
    while _read(base, index) < value:
        spins += 1
        if spins > 2000:
            _sched_yield()


@jit
def barrier(tid, nt, sync):
    """Wait until all ``nt`` threads are here."""
    if nt == 1:
        return
    base, first = address(sync), _THREADS + 1
    mine = _read(base, first + _LINE * tid) + 1
    _write(base, first + _LINE * tid, mine)
    for other in range(nt):
        _await(base, first + _LINE * other, mine)


@jit
def end(tid, nt, sync):
    """Last in every function that a team runs: a barrier.

    Threads other than the caller's wait a while for its next job, as long as they need no GIL.
    Who asks for the GIL while the caller has it sleeps, and may be woken late.
    """
    barrier(tid, nt, sync)
    base = address(sync)
    rounds = 0 if tid == 0 else _read(base, _LINGER)
    done = _read(base, _THREADS + _LINE * tid)
    for _ in range(rounds):
        for _ in range(64):
            if _read(base, _BEGUN) > done:
                return
        _sched_yield()


# A phase of microseconds must not wait for a thread that is off its core, or not awake yet: its
# share is free to whoever is there. ``claims`` is int64, zeros at first, two lines a share: the
# last phase, counted from 1, that somebody took it for, and the last one that it is done for.


def claims(rows: int, shares: int) -> NDArray[np.int64]:
    """``rows`` times the memory of :func:`take`, :func:`finish`, :func:`finished`."""
    return np.zeros((rows, 2 * _LINE * (shares + 1)), np.int64)


@jit
def shares(claims):
    """How many shares a row of claims has."""
    return len(claims) // (2 * _LINE) - 1


@jit
def take(share, phase, claims):
    """Whether the share of this phase is now the caller's; the phase before must be finished."""
    at = 2 * _LINE * share
    return _read(address(claims), at) < phase and _replace(address(claims), at, phase - 1, phase)


@jit
def finish(share, phase, claims):
    _write(address(claims), 2 * _LINE * share + _LINE, phase)


@jit
def is_finished(share, phase, claims):
    """Whether the share of this phase is done."""
    return _read(address(claims), 2 * _LINE * share + _LINE) >= phase


@jit
def finished(phase, nt, claims):
    """Wait until all ``nt`` shares of the phase are done."""
    for share in range(nt):
        _await(address(claims), 2 * _LINE * share + _LINE, phase)


# --- The team ----------------------------------------------------------------------------------


class Team:
    """``size`` threads: the caller's and ``size - 1`` others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._alone = _sync(1)
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Forget threads and locks: there are none yet, or they stayed in the parent process."""
        self._lock = threading.Lock()
        self._sync = _sync(self.size)
        self._inboxes: list[queue.SimpleQueue[Any]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, threads: int) -> None:
        """Run ``function(tid, nt, sync, *arguments)`` on ``threads`` threads: 1, or all of them.

        The function starts with :func:`begin` and ends with :func:`end`.
        """
        if threads == 1 or self.size == 1:
            function(0, 1, self._alone, *arguments)
            return
        with self._lock:
            if not self._inboxes:
                self._start()
            sync, begun = self._sync, int(self._sync[_BEGUN])
            try:
                for inbox in self._inboxes:
                    inbox.put((function, arguments))
                function(0, self.size, sync, *arguments)
            except BaseException:
                # Ctrl-C. Compiled code raises nothing: either all of it ran, or none.
                if sync[_BEGUN] == begun:
                    sync[_OFF] = 1
                    for inbox in self._inboxes:
                        inbox.put(None)
                    self._sync, self._inboxes = _sync(self.size), []
                raise

    def _start(self) -> None:
        for tid in range(1, self.size):
            inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self._inboxes.append(inbox)
            threading.Thread(
                target=self._serve,
                args=(tid, inbox, self._sync),
                name=f"fastrnn-{tid}",
                daemon=True,
            ).start()

    def _serve(self, tid: int, inbox: queue.SimpleQueue[Any], sync: NDArray[np.int64]) -> None:
        while True:
            job = inbox.get()
            if job is None:
                return
            function, arguments = job
            job = None
            try:
                function(tid, self.size, sync, *arguments)
            except Exception:
                # What cannot be compiled or called fails for the caller too, who is told.
                continue
            finally:
                del function, arguments
