"""fastrnn.jax: fastrnn's ops in a JAX program under one ``jit``; the rest as in ``jax_scan.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax_scan

import fastrnn
from fastrnn.jax import cross_entropy, gather, project, recurrence


def versions() -> dict[str, str]:
    return {"fastrnn": fastrnn.__version__, **jax_scan.versions()}


def loss_of(params: dict[str, Any], x: Any, y: Any, h0: Any) -> Any:
    h = recurrence(gather(params["W_xh"], x, params["b_h"]), params["W_hh"], h0)
    return cross_entropy(project(h, params["W_hq"], params["b_q"]), y), h[-1]


class Step(jax_scan.Step):
    train = staticmethod(jax_scan.train_on(loss_of))


class Recurrence(jax_scan.Recurrence):
    def build(self) -> Any:
        return jax.jit(recurrence)


class RecurrenceBPTT(jax_scan.RecurrenceBPTT):
    def build(self) -> Any:
        return jax.jit(lambda z, W_hh, h0, dh: jax.vjp(recurrence, z, W_hh, h0)[1](dh))


class CrossEntropy(jax_scan.CrossEntropy):
    def build(self) -> Any:
        return jax.jit(jax.value_and_grad(cross_entropy))


WORKLOADS = {
    "step": Step,
    "recurrence": Recurrence,
    "recurrence+bptt": RecurrenceBPTT,
    "cross_entropy": CrossEntropy,
}
