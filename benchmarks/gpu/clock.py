"""Device time of a call: replays of a graph of many, between two events.

On an idle device the clocks are low, and the first event is over before the host has launched the
graph: so the device spins before every timed replay, for as long as that launch takes, and for
longer where the host was busy.
A stand-in has no device time: a host clock stands around one call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from fastrnn.backend import Backend

LEAST_SECONDS, MOST_CALLS, REPLAYS = 2e-3, 512, 7
IDLE_SECONDS, WARM_NS, LAUNCH_NS = 20e-3, 100_000_000, 100_000
"""A device that was idle for so long spins a tenth of a second; else for twice as long as the last
launch of the graph took the host, and this at the least."""

Call = Callable[[], Any]

SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
}
"""


def is_stand_in(backend: Backend) -> bool:
    """Whether something else than a GPU runs the backend."""
    device = getattr(backend, "device", None)
    return type(device).__name__ == "EmulatedDevice" or bool(getattr(backend, "simulated", False))


def seconds(backend: Backend, call: Call) -> float:
    """Device time of one ``call``: the median over replays of a graph of many."""
    if is_stand_in(backend):
        return _host_seconds(call)
    call()
    backend.sync()
    graph = Replay(backend, lambda _: call(), 1)
    graph.seconds()
    once = graph.seconds()
    repeats = int(min(MOST_CALLS, max(1, LEAST_SECONDS / max(once, 1e-7))))
    many = Replay(backend, lambda _: call(), repeats)
    many.seconds()
    return statistics.median(many.seconds() for _ in range(REPLAYS)) / repeats


def seconds_restored(
    backend: Backend, submit: Callable[[int], Any], restore: Call, repeats: int = 32
) -> float:
    """The same of calls that change what they work on.

    Args:
        submit: the ``i``-th of ``repeats`` calls in a row, each of which has work to do.
        restore: puts back what they changed, before each replay.
    """
    restore()
    if is_stand_in(backend):
        return _host_seconds(lambda: submit(0))
    graph = Replay(backend, submit, repeats)
    graph.seconds()
    times = []
    for _ in range(REPLAYS):
        restore()
        times.append(graph.seconds())
    return statistics.median(times) / repeats


def _host_seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def wall(call: Call, repeats: int = 5, warm: float = 0.0) -> float:
    """Median wall-clock seconds of a call that ends with the device idle.

    Args:
        warm: seconds of calls before those that are timed.
    """
    end = time.perf_counter() + warm
    while time.perf_counter() < end:
        call()
    return statistics.median(_host_seconds(call) for _ in range(repeats))


class Replay:
    """``repeats`` calls captured as a graph, to be replayed between two events.

    Args:
        submit: submits the ``i``-th call to the backend's stream. Everything it needs has been
            compiled and allocated by a call before.
    """

    def __init__(self, backend: Backend, submit: Callable[[int], Any], repeats: int) -> None:
        def record() -> None:
            for i in range(repeats):
                submit(i)

        if backend.name == "cupy":
            self._open_cupy(backend, record)
        else:
            self._open_numba(backend, record)

    _pool: Any = None
    _launch_ns: int = 0  # that the host needed for the last launch
    _stream: Any
    _launch: Callable[[], Any]
    _record: Callable[[int], Any]
    _wait: Callable[[], Any]
    _elapsed: Callable[[], Any]
    _ended: ClassVar[float] = 0.0  # the last replay of this process, of time.monotonic()

    def _open_cupy(self, backend: Backend, record: Call) -> None:
        cupy = importlib.import_module("cupy")
        # Blocks that the recorded work allocates are the graph's own: from the pool of all, they
        # would be given away again while it is replayed.
        self._pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(self._pool.malloc):
            graph = backend.device.capture(record)  # type: ignore[attr-defined]
        events = cupy.cuda.Event(), cupy.cuda.Event()
        self._stream = contextlib.nullcontext()
        self._launch = graph.launch
        self._record = lambda i: events[i].record()
        self._wait = events[1].synchronize
        self._elapsed = lambda: cupy.cuda.get_elapsed_time(*events)

    def _open_numba(self, backend: Backend, record: Call) -> None:
        from fastrnn.backends.numba_cuda import Graph, maintained_cuda

        cuda = maintained_cuda()
        stream = backend.stream  # type: ignore[attr-defined]
        graph = Graph(stream)
        with cuda.defer_cleanup(), graph.capture():
            record()
        events = cuda.event(), cuda.event()
        self._stream = _as_cupys(int(stream))
        self._launch = graph.launch
        self._record = lambda i: events[i].record(stream)
        self._wait = events[1].synchronize
        self._elapsed = lambda: cuda.event_elapsed_time(*events)

    def seconds(self) -> float:
        """Of one replay."""
        idle = time.monotonic() - Replay._ended > IDLE_SECONDS
        with self._stream:
            _spin(max(WARM_NS if idle else LAUNCH_NS, 2 * self._launch_ns))
        begin = time.perf_counter_ns()
        self._record(0)
        self._launch()
        self._launch_ns = time.perf_counter_ns() - begin
        self._record(1)
        self._wait()
        Replay._ended = time.monotonic()
        return float(self._elapsed()) * 1e-3


@functools.cache
def _spin_kernel() -> Any:
    """None without CuPy: then the launch of a graph is timed with it."""
    try:
        return importlib.import_module("cupy").RawKernel(SPIN, "spin")
    except ImportError:
        return None


def _spin(nanoseconds: int) -> None:
    """Keep CuPy's current stream busy for so long."""
    kernel = _spin_kernel()
    if kernel is not None:
        kernel((1,), (1,), (np.int64(nanoseconds),))


def _as_cupys(handle: int) -> Any:
    """A context in which another library's stream is CuPy's current one."""
    if _spin_kernel() is None:
        return contextlib.nullcontext()
    from fastrnn.cuda.cupy_device import foreign_stream

    cupy = importlib.import_module("cupy")
    return foreign_stream(cupy, handle, cupy.cuda.runtime.getDevice())
