"""Fixtures shared by all tests: the backends that can run here, and seeded inputs."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from fastrnn.backend import (
    CPU_BACKENDS,
    GPU_BACKENDS,
    Backend,
    BackendUnavailableError,
    open_backend,
)
from tests.emulator.require import require_emulator

# One thread a core is plenty for toy shapes, and examples must not depend on a machine's speed.
settings.register_profile("fastrnn", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fastrnn")


def required_backends(setting: str) -> list[str]:
    """What ``FASTRNN_REQUIRE_GPU`` asks for: nothing, backends by name, or with 1 all of a GPU.

    Raises:
        ValueError: it names something else.
    """
    names = list(GPU_BACKENDS) if setting == "1" else [n for n in setting.split(",") if n]
    for name in names:
        if name not in GPU_BACKENDS:
            raise ValueError(
                f"FASTRNN_REQUIRE_GPU must be 1 or some of {', '.join(GPU_BACKENDS)}, got {name!r}"
            )
    return names


# Tests of a required backend fail where it cannot run. Another that is broken does not take part.
REQUIRED = required_backends(os.environ.get("FASTRNN_REQUIRE_GPU", ""))
MISSING: dict[str, str] = {}
for _name in [] if REQUIRED else GPU_BACKENDS:
    try:
        open_backend(_name)
    except BackendUnavailableError as _error:
        MISSING[_name] = str(_error)
BACKENDS = [*CPU_BACKENDS, *(REQUIRED or [n for n in GPU_BACKENDS if n not in MISSING])]

EMULATED = {"cupy-sm_90": (90, False), "cupy-sm_90-late": (90, True), "cupy-sm_75": (75, False)}
"""The CUDA C engine in the emulator: compute capability, and whether branches run late."""

ALL_BACKENDS = [*BACKENDS, *EMULATED]


@functools.cache
def open_any(name: str) -> Backend:
    """A backend of :data:`ALL_BACKENDS`; skips the test where the emulator cannot run."""
    if name not in EMULATED:
        return open_backend(name)
    require_emulator()
    from fastrnn.backends.cupy_cuda import CupyBackend
    from tests.emulated_device import EmulatedDevice

    capability, late_branches = EMULATED[name]
    return CupyBackend(EmulatedDevice(capability, late_branches=late_branches))


def pytest_report_header() -> list[str]:
    """Say which backends are not tested on this machine, and why."""
    return [f"not on this machine: {reason}" for reason in MISSING.values()]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn. Those of a GPU take part where one works."""
    return open_backend(request.param)


class Inputs:
    """Seeded random arrays for one set of shapes; the same for every backend."""

    def __init__(self, T: int, B: int, H: int, V: int, dtype: Any, seed: int = 0) -> None:
        self.T, self.B, self.H, self.V, self.dtype = T, B, H, V, np.dtype(dtype)
        self.rng = np.random.default_rng([seed, T, B, H, V])

    def array(self, *shape: int, scale: float = 1.0) -> NDArray[Any]:
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def tokens(self, *shape: int) -> NDArray[np.int32]:
        return self.rng.integers(0, self.V, shape).astype(np.int32)

    def params(self, scale: float | None = None) -> dict[str, NDArray[Any]]:
        """Weights large enough that tanh and softmax leave their linear range."""
        H, V = self.H, self.V
        scale = scale or 1.0 / np.sqrt(H)
        return {
            "W_xh": self.array(V, H, scale=0.5),
            "W_hh": self.array(H, H, scale=scale),
            "b_h": self.array(H, scale=0.1),
            "W_hq": self.array(H, V, scale=scale),
            "b_q": self.array(V, scale=0.1),
        }


SHAPES = [
    # T, B, H, V
    pytest.param((1, 1, 1, 2), id="smallest"),
    pytest.param((1, 5, 33, 7), id="one-step"),
    pytest.param((7, 1, 16, 31), id="one-row"),
    pytest.param((5, 3, 37, 41), id="odd"),
    pytest.param((4, 8, 32, 64), id="aligned"),
    pytest.param((3, 17, 130, 257), id="odd-large"),
    pytest.param((2, 4, 300, 65), id="wide-state"),
]


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest, backend: Backend) -> np.dtype[Any]:
    """Every dtype that the backend supports."""
    chosen: np.dtype[Any] = np.dtype(request.param)
    if chosen.type not in backend.dtypes:
        pytest.skip(f"the {backend.name} backend has no {chosen} kernels")
    return chosen


@pytest.fixture(params=SHAPES)
def inputs(request: pytest.FixtureRequest, dtype: np.dtype[Any]) -> Inputs:
    T, B, H, V = request.param
    return Inputs(T, B, H, V, dtype)
