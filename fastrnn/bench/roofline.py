"""What an op has to do at the least, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastrnn.backend import Dims


@dataclass(frozen=True)
class Work:
    """What an op cannot avoid: floating-point operations, and bytes read and written once."""

    flop: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def floor_seconds(self, flops: float, bandwidth: float) -> float:
        """The roofline's lower bound (Williams, Waterman, Patterson 2009) at these rates."""
        return max(self.flop / flops, self.bytes / bandwidth)


def work(op: str, dims: Dims) -> Work:
    """The work of an op, of ``step``, or of ``generate`` (one character of B sequences).

    Products count two operations a term; tanh, exp and the other pointwise work count nothing.
    For ``step`` the bytes are those of the parameters and gradients alone: a fused step may keep
    everything that its ops exchange in cache.
    """
    T, B, H, V, size = dims.T, dims.B, dims.H, dims.V, dims.dtype.itemsize
    n, params = T * B, sum(int(np.prod(s)) for s in dims.param_shapes.values())
    hidden, logits = n * H * size, n * V * size
    table: dict[str, tuple[float, float]] = {
        "gather": (n * H, 2 * hidden + 4 * n),
        "gather_backward": (2 * n * H, hidden + V * H * size + 4 * n),
        "recurrence": (2 * n * H * H, 2 * hidden + H * H * size),
        "recurrence_backward": (4 * n * H * H, 3 * hidden + 2 * H * H * size),
        "project": (2 * n * H * V, hidden + logits + H * V * size),
        "project_backward": (4 * n * H * V, 2 * hidden + logits + 2 * H * V * size),
        "cross_entropy": (4 * n * V, 2 * logits + 4 * n),
        "clip_by_global_norm": (3 * params, 3 * params * size),
        "sgd": (2 * params, 3 * params * size),
        "step": (6 * n * H * (H + V), 5 * params * size),
        "generate": (2 * B * H * (H + V), (H * H + H * V + B * H) * size),
    }
    flop, traffic = table[op]
    return Work(float(flop), float(traffic))
