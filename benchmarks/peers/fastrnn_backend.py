"""fastrnn itself: any of its backends.

The variant is the backend's name; ``-graph`` after it replays the ops of a GPU backend from
captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastrnn
from fastrnn.backend import Backend, Dims
from fastrnn.decoding import Decoding
from fastrnn.reference import PARAM_NAMES


def versions() -> dict[str, str]:
    found = {"fastrnn": fastrnn.__version__}
    for name in ("numba", "scipy", "cupy", "numba_cuda"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            continue
    return found


class Step:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.backend = fastrnn.open_backend(variant)
        T, B = problem["X"].shape[1:]
        H, V = problem["W_hq"].shape
        dims = Dims(T, B, H, V, problem["W_hq"].dtype)
        params = {name: problem[name] for name in PARAM_NAMES}
        self.ws = self.backend.workspace(dims, problem["tokens"], params)
        self.starts, self.done = problem["starts"], 0
        self.lr, self.max_norm = float(problem["lr"]), float(problem["max_norm"])

    def run(self, n: int) -> None:
        rows = np.arange(self.done, self.done + n) % len(self.starts)
        self.backend.run_steps(self.ws, self.starts[rows], self.lr, self.max_norm, True)
        self.backend.sync()
        self.done += n

    def result(self) -> dict[str, Any]:
        return {"loss": self.backend.get(self.ws.loss)}


def record(backend: Backend, call: Callable[[], None], times: int) -> Callable[[], None]:
    """``times`` calls as one CUDA graph; what is returned replays it."""

    def submit() -> None:
        for _ in range(times):
            call()

    if backend.name == "cupy":
        graph: Any = backend.device.capture(submit)  # type: ignore[attr-defined]
    else:
        from fastrnn.backends.numba_cuda import Graph, maintained_cuda

        graph = Graph(backend.stream)  # type: ignore[attr-defined]
        with maintained_cuda().defer_cleanup(), graph.capture():
            submit()
    launch: Callable[[], None] = graph.launch
    return launch


class _Op:
    """An op on device arrays, with its outputs allocated once."""

    names: tuple[str, ...]

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        from replays import by_calls, by_replays  # beside this file, for a contender's process

        self.backend = fastrnn.open_backend(variant.removesuffix("-graph"))
        self.a = {name: self.backend.put(problem[name]) for name in self.names}
        self.build()
        self.calls = by_calls(self.once)
        if variant.endswith("-graph"):
            self.once()  # modules are loaded and scratch is allocated outside of the capture
            self.backend.sync()
            self.calls = by_replays(lambda times: record(self.backend, self.once, times))
        self.backend.sync()

    def build(self) -> None:
        raise NotImplementedError

    def once(self) -> None:
        raise NotImplementedError

    def run(self, n: int) -> None:
        self.calls(n)
        self.backend.sync()


class Recurrence(_Op):
    names: tuple[str, ...] = ("z", "W_hh", "h0")

    def build(self) -> None:
        self.h = self.backend.empty(self.a["z"].shape, self.a["z"].dtype)

    def once(self) -> None:
        self.backend.recurrence(self.a["z"], self.a["W_hh"], self.a["h0"], out=self.h)

    def result(self) -> dict[str, Any]:
        return {"h": self.backend.get(self.h)}


class RecurrenceBPTT(Recurrence):
    names = ("z", "W_hh", "h0", "dh")

    def build(self) -> None:
        super().build()
        like = (self.a["dh"], self.a["W_hh"], self.a["h0"])
        self.grads = tuple(self.backend.empty(a.shape, a.dtype) for a in like)

    def once(self) -> None:
        super().once()
        self.backend.recurrence_backward(
            self.a["dh"], self.h, self.a["W_hh"], self.a["h0"], out=self.grads
        )

    def result(self) -> dict[str, Any]:
        names = ("dz", "dW_hh", "dh0")
        return {n: self.backend.get(g) for n, g in zip(names, self.grads, strict=True)}


class CrossEntropy(_Op):
    names = ("logits", "targets")

    def build(self) -> None:
        logits = self.a["logits"]
        self.out = (
            self.backend.empty((), logits.dtype),
            self.backend.empty(logits.shape, logits.dtype),
        )

    def once(self) -> None:
        self.backend.cross_entropy(self.a["logits"], self.a["targets"], out=self.out)

    def result(self) -> dict[str, Any]:
        return {"loss": self.backend.get(self.out[0]), "dlogits": self.backend.get(self.out[1])}


class Generate:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.backend = fastrnn.open_backend(variant)
        self.params = {name: self.backend.put(problem[name]) for name in PARAM_NAMES}
        self.prefix = problem["prefix"]
        self.lengths = np.full(len(self.prefix), self.prefix.shape[1], np.int32)

    def run(self, n: int) -> None:
        self.tokens, _ = self.backend.generate(
            self.params, self.prefix, self.lengths, n, Decoding()
        )

    def result(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


WORKLOADS = {
    "step": Step,
    "recurrence": Recurrence,
    "recurrence+bptt": RecurrenceBPTT,
    "cross_entropy": CrossEntropy,
    "generate": Generate,
}
