"""The tutorial in TensorFlow: one-hot vectors, a Python loop over time, a gradient tape.

Variants: ``eager``, as the tutorial runs it, and ``function``, the same step under
``tf.function``. One repair: the loss is taken from logits, or its value could not be compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

NAMES = ("W_xh", "W_hh", "b_h", "W_hq", "b_q")


def versions() -> dict[str, str]:
    return {"tensorflow": tf.__version__}


def rnn(inputs: Any, h: Any, params: list[Any]) -> tuple[Any, Any]:
    """``inputs`` is one-hot [T, B, V]; logits [T·B, V] and the last state."""
    W_xh, W_hh, b_h, W_hq, b_q = params
    outputs = []
    for X in inputs:
        h = tf.tanh(tf.matmul(X, W_xh) + tf.matmul(h, W_hh) + b_h)
        outputs.append(tf.matmul(h, W_hq) + b_q)
    return tf.concat(outputs, axis=0), h


class Step:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.params = [tf.Variable(problem[name]) for name in NAMES]
        self.V, self.T = len(problem["W_xh"]), problem["X"].shape[1]
        self.X = [tf.constant(x) for x in problem["X"]]
        self.Y = [tf.constant(y.ravel()) for y in problem["Y"]]
        self.h, self.done = tf.constant(problem["h0"]), 0
        self.lr, self.max_norm = float(problem["lr"]), float(problem["max_norm"])
        self.loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.step = tf.function(self.train) if variant == "function" else self.train
        self.loss: Any = None

    def train(self, x: Any, y: Any, h: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            inputs = tf.unstack(tf.one_hot(x, self.V), self.T)
            logits, h = rnn(inputs, h, self.params)
            loss = self.loss_of(y, logits)
        grads = tape.gradient(loss, self.params)
        # W_xh is used through a one-hot matmul: every gradient is dense
        norm = tf.sqrt(tf.add_n([tf.reduce_sum(g**2) for g in grads]))
        scale = tf.minimum(1.0, self.max_norm / norm)
        for p, g in zip(self.params, grads):  # noqa: B905
            p.assign_sub(self.lr * scale * g)
        return loss, h

    def run(self, n: int) -> None:
        for _ in range(n):
            i = self.done % len(self.X)
            self.loss, self.h = self.step(self.X[i], self.Y[i], self.h)
            self.done += 1
        self.loss.numpy()

    def result(self) -> dict[str, Any]:
        return {"loss": self.loss.numpy()}


class Generate:
    """Character by character in eager mode, each arg-max read by the host, as the tutorial does."""

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.params = [tf.constant(problem[name]) for name in NAMES]
        self.V, self.H = problem["W_xh"].shape
        self.prefix = problem["prefix"]

    def run(self, n: int) -> None:
        h = tf.zeros((len(self.prefix), self.H))
        tokens = [self.prefix[:, i] for i in range(self.prefix.shape[1])]
        for i in range(len(tokens) + n - 1):
            logits, h = rnn([tf.one_hot(tokens[i], self.V)], h, self.params)
            if i >= self.prefix.shape[1] - 1:
                tokens.append(tf.argmax(logits, axis=1, output_type=tf.int32).numpy())
        self.tokens = np.stack(tokens[self.prefix.shape[1] :], axis=1)

    def result(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


WORKLOADS = {"step": Step, "generate": Generate}
