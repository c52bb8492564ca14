"""Checks of plain numbers: NumPy's too are taken, and become Python's."""

from __future__ import annotations

from typing import Any

import numpy as np


def whole(name: str, value: Any) -> int:
    """An int, of any sign."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def count(name: str, value: Any) -> int:
    """An int that is at least 0."""
    if whole(name, value) < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return int(value)


def positive_int(name: str, value: Any) -> int:
    """An int that is at least 1."""
    if whole(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
