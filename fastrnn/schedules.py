"""Learning-rate schedules: the rate of each epoch as a function of its number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastrnn.checks import positive_int, whole

LR_SCHEDULES = ("constant", "linear", "cosine", "step")


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of epoch ``e`` (from 0) of ``epochs``.

    With ``d = (e - hold) / (epochs - hold)``, 0 during the first ``hold`` epochs:
    constant: ``lr``. linear: ``lr (1 - d)``. cosine: ``lr (1 + cos(π d)) / 2`` (Loshchilov, Hutter,
    "SGDR", 2017, without restarts). step: ``lr gamma**((e - hold) // step_size)``.

    Linear and cosine would reach zero at epoch ``epochs``: the last one still moves.

    Attributes:
        kind: one of :data:`LR_SCHEDULES`. lr: the rate of epoch 0, > 0.
        epochs: length of the run; needed by linear and cosine, and by step without a step_size.
        hold: epochs at the full rate before it falls, >= 0 and < ``epochs``.
        step_size: epochs between two drops of ``step``; None: a third of ``epochs``.
        gamma: factor of each drop, in (0, 1].
    """

    kind: str = "constant"
    lr: float = 100.0
    epochs: int | None = None
    hold: int = 0
    step_size: int | None = None
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in LR_SCHEDULES:
            raise ValueError(
                f"unknown lr_schedule {self.kind!r}: expected one of {', '.join(LR_SCHEDULES)}"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be finite and > 0, got {self.lr!r}")
        object.__setattr__(self, "lr", float(self.lr))
        object.__setattr__(self, "gamma", float(self.gamma))
        for name in ("epochs", "step_size"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, positive_int(name, value))
        object.__setattr__(self, "hold", whole("hold", self.hold))
        if not 0 <= self.hold < (self.epochs or math.inf):
            raise ValueError(
                f"hold must be at least 0 and less than epochs={self.epochs}, got {self.hold!r}"
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma!r}")
        needs_length = self.kind in ("linear", "cosine") or (
            self.kind == "step" and self.step_size is None
        )
        if needs_length and self.epochs is None:
            raise ValueError(
                f"lr_schedule={self.kind!r} needs the length of the run: pass epochs=…"
            )

    def __call__(self, epoch: int) -> float:
        """The learning rate of epoch number ``epoch``; past the end, that of the last epoch."""
        if self.kind == "constant":
            return self.lr
        if self.epochs is not None:
            epoch = min(epoch, self.epochs - 1)
        falling = max(0, epoch - self.hold)
        if self.kind == "step":
            step_size = self.step_size or max(1, (self.epochs or 1) // 3)
            return self.lr * float(self.gamma ** (falling // step_size))
        assert self.epochs is not None
        done = falling / (self.epochs - self.hold)
        if self.kind == "linear":
            return self.lr * (1 - done)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


def default_hold(epochs: int) -> int:
    """Epochs at the full rate in ``fastrnn train``: 150, or 60 % of a shorter run.

    A run of clipped steps of constant length first has to travel, then to settle: a rate that falls
    from the start does not get far enough in 250 epochs, one that never falls collapses after some
    450 of them.
    """
    return min(150, epochs * 3 // 5)
