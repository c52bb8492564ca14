"""Plain NumPy: the oracle itself, time step by time step, with a gather."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrnn import reference


def versions() -> dict[str, str]:
    return {"numpy": np.__version__}


class Step:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.params = {name: problem[name].copy() for name in reference.PARAM_NAMES}
        self.X, self.Y, self.h = problem["X"], problem["Y"], problem["h0"]
        self.lr, self.max_norm = float(problem["lr"]), float(problem["max_norm"])
        self.done, self.loss = 0, 0.0

    def run(self, n: int) -> None:
        for _ in range(n):
            i = self.done % len(self.X)
            self.loss, _, self.h = reference.train_step(
                self.X[i], self.Y[i], self.h, self.params, self.lr, self.max_norm
            )
            self.done += 1

    def result(self) -> dict[str, Any]:
        return {"loss": np.float64(self.loss)}


class Generate:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.params = {name: problem[name] for name in reference.PARAM_NAMES}
        self.prefix = problem["prefix"]

    def run(self, n: int) -> None:
        self.tokens = [reference.predict(row, n, self.params) for row in self.prefix]

    def result(self) -> dict[str, Any]:
        return {"tokens": np.stack(self.tokens)}


WORKLOADS = {"step": Step, "generate": Generate}
