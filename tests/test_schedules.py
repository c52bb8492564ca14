"""Learning-rate schedules: their values, their ends, their bad input."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from fastrnn.schedules import LRSchedule, default_hold


def test_constant_needs_no_length() -> None:
    schedule = LRSchedule("constant", 3.0)
    assert [schedule(e) for e in (0, 10, 10_000)] == [3.0, 3.0, 3.0]


def test_linear_falls_in_equal_steps_and_stays_above_zero() -> None:
    schedule = LRSchedule("linear", 8.0, epochs=4)
    assert [schedule(e) for e in range(6)] == [8.0, 6.0, 4.0, 2.0, 2.0, 2.0]


def test_hold_shifts_the_fall() -> None:
    schedule = LRSchedule("linear", 8.0, epochs=6, hold=2)
    assert [schedule(e) for e in range(6)] == [8.0, 8.0, 8.0, 6.0, 4.0, 2.0]


def test_cosine() -> None:
    schedule = LRSchedule("cosine", 2.0, epochs=4)
    want = [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert [schedule(e) for e in range(4)] == pytest.approx(want)


def test_step() -> None:
    schedule = LRSchedule("step", 1.0, step_size=2, gamma=0.5)
    assert [schedule(e) for e in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    thirds = LRSchedule("step", 1.0, epochs=9)
    assert [thirds(e) for e in (0, 2, 3, 8)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "exp"}, "unknown lr_schedule 'exp': expected one of constant, linear"),
        ({"lr": 0.0}, "lr must be finite and > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be finite and > 0, got nan"),
        ({"kind": "linear"}, "needs the length of the run"),
        ({"kind": "step"}, "needs the length of the run"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"hold": -1}, "hold must be at least 0"),
        ({"kind": "linear", "epochs": 5, "hold": 5}, "less than epochs=5, got 5"),
        ({"step_size": 0}, "step_size must be at least 1, got 0"),
        ({"gamma": 1.5}, r"gamma must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRSchedule(**arguments)  # type: ignore[arg-type]


def test_numpys_numbers_become_pythons_and_fractions_are_refused() -> None:
    values = {
        "lr": np.float32(2.0), "epochs": np.int64(9), "hold": np.int32(1),
        "step_size": np.int64(3), "gamma": np.float64(0.5),
    }  # fmt: skip
    schedule = LRSchedule("step", **values)  # type: ignore[arg-type]
    assert json.loads(json.dumps(dataclasses.asdict(schedule))) == {
        "kind": "step", "lr": 2.0, "epochs": 9, "hold": 1, "step_size": 3, "gamma": 0.5
    }  # fmt: skip
    for name in ("epochs", "hold", "step_size"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got float"):
            LRSchedule(**{name: 2.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(("epochs", "hold"), [(1, 0), (10, 6), (250, 150), (2500, 150)])
def test_default_hold(epochs: int, hold: int) -> None:
    assert default_hold(epochs) == hold
    LRSchedule("linear", 100.0, epochs, hold)
