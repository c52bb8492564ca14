"""JAX: ``lax.scan`` over time, the whole training step under one ``jit`` with donated buffers.

The variant is the platform, ``cpu`` or ``cuda``. Products are those of float32: on a GPU JAX would
make them in TF32 by itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

jax.config.update("jax_default_matmul_precision", "highest")

NAMES = ("W_xh", "W_hh", "b_h", "W_hq", "b_q")


def versions() -> dict[str, str]:
    precision = str(jax.config.jax_default_matmul_precision)
    return {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "matmul precision": precision}


def put(problem: dict[str, Any], variant: str, *names: str) -> list[Any]:
    try:
        device = jax.devices(variant)[0]
    except RuntimeError as error:
        raise ImportError(f"JAX has no {variant} device: {error}") from error
    return [jax.device_put(problem[name], device) for name in names]


def recur(z: Any, W_hh: Any, h0: Any) -> Any:
    def cell(h: Any, z_t: Any) -> Any:
        h = jnp.tanh(z_t + h @ W_hh)
        return h, h

    return lax.scan(cell, h0, z)[1]


def recur_backward(z: Any, W_hh: Any, h0: Any, dh: Any) -> Any:
    return jax.vjp(recur, z, W_hh, h0)[1](dh)


def cross_entropy(logits: Any, targets: Any) -> Any:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()


# One object for all contenders of a process: JAX compiles it once, for the check and the timing.
cross_entropy_and_gradient = jax.value_and_grad(cross_entropy)


def loss_of(params: dict[str, Any], x: Any, y: Any, h0: Any) -> Any:
    h = recur(params["W_xh"][x] + params["b_h"], params["W_hh"], h0)
    return cross_entropy(h @ params["W_hq"] + params["b_q"], y), h[-1]


def train_on(loss_of: Any) -> Any:
    """The training step on a loss that returns the last state beside it."""

    def train(params: Any, x: Any, y: Any, h0: Any, lr: Any, max_norm: Any) -> Any:
        (loss, h), grads = jax.value_and_grad(loss_of, has_aux=True)(params, x, y, h0)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        scale = lr * jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda p, g: p - scale * g, params, grads), loss, h

    return jax.jit(train, donate_argnums=(0, 3))


class Step:
    train = staticmethod(train_on(loss_of))

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.params = dict(zip(NAMES, put(problem, variant, *NAMES), strict=True))
        self.X, self.Y, self.h = put(problem, variant, "X", "Y", "h0")
        self.X, self.Y = list(self.X), list(self.Y)
        self.hyper = put(problem, variant, "lr", "max_norm")
        self.done, self.loss = 0, None

    def run(self, n: int) -> None:
        for _ in range(n):
            i = self.done % len(self.X)
            self.params, self.loss, self.h = self.train(
                self.params, self.X[i], self.Y[i], self.h, *self.hyper
            )
            self.done += 1
        jax.block_until_ready(self.params)

    def result(self) -> dict[str, Any]:
        return {"loss": self.loss}


class Recurrence:
    names: tuple[str, ...] = ("z", "W_hh", "h0")

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.args = put(problem, variant, *self.names)
        self.function = self.build()

    def build(self) -> Any:
        return jax.jit(recur)

    def run(self, n: int) -> None:
        for _ in range(n):
            self.out = self.function(*self.args)
        jax.block_until_ready(self.out)

    def result(self) -> dict[str, Any]:
        return {"h": self.out}


class RecurrenceBPTT(Recurrence):
    names = ("z", "W_hh", "h0", "dh")

    def build(self) -> Any:
        return jax.jit(recur_backward)

    def result(self) -> dict[str, Any]:
        return dict(zip(("dz", "dW_hh", "dh0"), self.out, strict=True))


class CrossEntropy(Recurrence):
    names = ("logits", "targets")

    def build(self) -> Any:
        return jax.jit(cross_entropy_and_gradient)

    def result(self) -> dict[str, Any]:
        return dict(zip(("loss", "dlogits"), self.out, strict=True))


@partial(jax.jit, static_argnums=2)
def greedy(params: Any, prefix: Any, n: int) -> Any:
    def feed(h: Any, x: Any) -> Any:
        return jnp.tanh(params["W_xh"][x] + h @ params["W_hh"] + params["b_h"])

    def produce(h: Any, _: Any) -> Any:
        token = jnp.argmax(h @ params["W_hq"] + params["b_q"], axis=-1).astype(jnp.int32)
        return feed(h, token), token

    h = jnp.zeros((prefix.shape[0], params["W_hh"].shape[0]), params["W_hh"].dtype)
    for x in prefix.T:
        h = feed(h, x)
    return lax.scan(produce, h, None, length=n)[1].T


class Generate:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.params = dict(zip(NAMES, put(problem, variant, *NAMES), strict=True))
        (self.prefix,) = put(problem, variant, "prefix")

    def run(self, n: int) -> None:
        self.tokens = jax.block_until_ready(greedy(self.params, self.prefix, n))

    def result(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


WORKLOADS = {
    "step": Step,
    "recurrence": Recurrence,
    "recurrence+bptt": RecurrenceBPTT,
    "cross_entropy": CrossEntropy,
    "generate": Generate,
}
