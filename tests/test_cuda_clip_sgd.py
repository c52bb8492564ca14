"""Clipping by the global norm and the step in CUDA C, in the emulator, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastrnn.backends.numpy_ import NumpyBackend
from fastrnn.cuda import clip_sgd as launch
from fastrnn.cuda.device import Device
from tests.cuda_sanitized import scratch_of
from tests.cuda_support import ORDERS, emulated, require_emulator, twin
from tests.emulated_device import EmulatedDevice
from tests.emulator import EmulatorError, SanitizerError, run_sanitized
from tests.emulator.build import Sanitizer
from tests.tolerances import assert_close

SIZES = {
    "one value": [1],
    "a chunk": [4096],
    "odd": [5, 4097, 1, 12_289],
    "many arrays": [(7 * i) % 23 + 1 for i in range(130)],
    "an empty one": [3, 0, 8],
}


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest) -> list[int]:
    return SIZES[request.param]


def draw(sizes: Sequence[int], dtype: Any, seed: int = 0, scale: float = 1.0) -> list[Any]:
    rng = np.random.default_rng([seed, *sizes[:9]])
    return [(rng.standard_normal(n) * scale).astype(dtype) for n in sizes]


def put(device: Device, arrays: Sequence[NDArray[Any]], offset: int = 0) -> list[Any]:
    """Device arrays that start ``offset`` values behind a multiple of 16 bytes."""
    placed = []
    for array in arrays:
        flat = device.empty((array.size + offset,), array.dtype)[offset:]
        flat[:] = array
        placed.append(flat)
    return placed


def clip(
    device: Device, grads: Sequence[NDArray[Any]], max_norm: float, offset: int = 0
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """The norm, and what became of the gradients."""
    placed, norm = put(device, grads, offset), device.empty((), grads[0].dtype)
    launch.clip_by_global_norm(device, placed, max_norm, norm, scratch_of(device))
    return device.get(norm), [device.get(g) for g in placed]


def length(grads: Sequence[NDArray[Any]]) -> Any:
    return np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads))


def check_clip(device: Device, grads: Sequence[NDArray[Any]], factor: float) -> None:
    want = length(grads)
    norm, got = clip(device, grads, float(want * factor))
    assert_close("clip_by_global_norm", norm, want, "norm")
    for g, before in zip(got, grads, strict=True):
        if factor > 1:
            np.testing.assert_array_equal(g, before)
        else:
            assert_close("clip_by_global_norm", g, before.astype(np.float64) * factor)


# --- clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["clips", "leaves alone"])
def test_clip_by_global_norm(sizes: list[int], dtype: Any, factor: float) -> None:
    check_clip(emulated(multiprocessors=1), draw(sizes, dtype), factor)


def test_many_values_in_larger_chunks() -> None:
    grads = draw([(1 << 22) + 4321, 70_000], np.float32)
    check_clip(emulated(), grads, 0.5)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_same_bits_on_every_device(offset: int, dtype: Any) -> None:
    grads = draw([30_000, 9, 5000], dtype)
    results = [
        clip(emulated(capability, multiprocessors=m, order=order), grads, 1.0, offset)
        for capability, m in ((75, 1), (90, 132))
        for order in ORDERS
    ]
    for norm, scaled in results[1:]:
        assert norm == results[0][0]
        for a, b in zip(scaled, results[0][1], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [1e25, 1e-25], ids=["overflow", "underflow"])
def test_squares_beyond_the_range_of_float32(scale: float) -> None:
    grads = draw([5000, 33], np.float32, scale=scale)
    check_clip(emulated(), [*grads, np.zeros(5000, np.float32)], 0.5)
    check_clip(emulated(), [np.array([3 * scale, 4 * scale], np.float32)], 0.5)


def test_no_gradient_at_all() -> None:
    norm, (g,) = clip(emulated(), [np.zeros(5000, np.float32)], 1.0)
    assert norm == 0
    np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite(bad: float, dtype: Any) -> None:
    """As in the CPU backends: NaN leaves the gradients alone, infinity scales them by zero."""
    grads = draw([4096, 100], dtype)
    grads[0][77] = bad
    norm, got = clip(emulated(), grads, 1.0)
    want = [g.copy() for g in grads]
    with np.errstate(invalid="ignore", over="ignore"):
        want_norm = NumpyBackend().clip_by_global_norm(want, 1.0)
    np.testing.assert_array_equal(norm, want_norm)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


# --- the step --------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
def test_sgd(sizes: list[int], dtype: Any, offset: int) -> None:
    device = emulated(multiprocessors=1)
    params, grads = draw(sizes, dtype), draw(sizes, dtype, seed=1)
    rates = device.put(np.array([0.37, np.nan]))
    for lr in (0.37, rates):
        placed = put(device, params, offset)
        launch.sgd(device, placed, put(device, grads), lr)
        got, p, g = map(np.concatenate, (placed, params, grads))
        assert_close("sgd", got, p.astype(np.float64) - 0.37 * g.astype(np.float64))


class Step:
    """One clipped step of 600 rows' losses, on two arrays; what it left."""

    def __init__(self, device: EmulatedDevice, grads: Sequence[NDArray[Any]], max_norm: float):
        dtype = grads[0].dtype
        self.before = draw([g.size for g in grads], dtype, seed=2)
        self.losses = draw([600], dtype, seed=3)[0]
        params, placed = put(device, self.before), put(device, grads)
        rates = device.put(np.array([0.5, max_norm]))
        norm, loss = device.empty((), dtype), device.empty((), dtype)
        totals = device.put(np.array([10.0, 20.0, 30.0, 40.0]))
        cursor = device.put(np.array([7], np.int32))
        launch.clip_sgd(
            device,
            params,
            placed,
            rates,
            norm,
            scratch_of(device),
            losses=device.put(self.losses),
            loss=loss,
            totals=totals,
            cursor=cursor,
        )
        for g, given in zip(placed, grads, strict=True):
            np.testing.assert_array_equal(g, given, err_msg="gradients keep their values")
        self.params = [device.get(p) for p in params]
        self.norm, self.loss = device.get(norm), device.get(loss)
        self.totals, self.cursor = device.get(totals), int(device.get(cursor)[0])


def check_step(device: EmulatedDevice, dtype: Any, factor: float) -> None:
    grads = draw([9000, 333], dtype)
    want = float(length(grads))
    step = Step(device, grads, want * factor)
    assert_close("clip_by_global_norm", step.norm, np.float64(want), "norm")
    assert_close("cross_entropy", step.loss, step.losses.astype(np.float64).mean(), "loss")
    for p, before, g in zip(step.params, step.before, grads, strict=True):
        exact = before.astype(np.float64) - 0.5 * min(1.0, factor) * g.astype(np.float64)
        assert_close("sgd", p, exact, "params")
    added = step.totals - np.array([10.0, 20.0, 30.0, 40.0])
    want_added = np.array([float(step.loss), float(step.norm), 1.0, 0.0])
    np.testing.assert_allclose(added, want_added, rtol=1e-6, atol=1e-14)
    assert step.cursor == 8


@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["clips", "leaves alone"])
def test_clip_sgd(dtype: Any, factor: float) -> None:
    device = emulated(multiprocessors=1)
    check_step(device, dtype, factor)
    assert len(device.launched) == 2


@pytest.mark.parametrize("order", ORDERS)
def test_clip_sgd_in_any_order_of_threads(order: Any) -> None:
    grads = draw([9000, 333], np.float32)
    first = Step(emulated(), grads, 1.0)
    again = Step(emulated(multiprocessors=132, order=order), grads, 1.0)
    for a, b in zip([*first.params, first.totals], [*again.params, again.totals], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_counted(bad: float) -> None:
    grads = draw([9000, 333], np.float32)
    grads[1][5] = bad
    with np.errstate(invalid="ignore"):
        step = Step(emulated(), grads, 1.0)
    np.testing.assert_array_equal(step.norm, np.float32(bad))
    np.testing.assert_array_equal(step.totals[2:], (31.0, 41.0))
    assert np.isnan(step.params[1][5])
    if np.isinf(bad):  # all else is scaled by zero
        np.testing.assert_array_equal(step.params[0], step.before[0])


def test_record(dtype: Any) -> None:
    device = emulated()
    totals = device.put(np.zeros(4))
    cursor = device.put(np.zeros(1, np.int32))
    for loss, norm in [(1.5, 2.0), (np.nan, 1.0), (0.5, np.inf)]:
        launch.record(
            device, device.put(np.array(loss, dtype)), device.put(np.array(norm, dtype)), totals
        )
    assert np.isnan(totals[0])
    assert totals[2:].tolist() == [3, 2]
    one = device.put(np.array(1, dtype))
    launch.record(device, one, one, totals, cursor)
    assert cursor[0] == 1


# --- wrong twins, and sanitizers -------------------------------------------------------------

WRONG = {
    "the squared norm": ("static_cast<REAL>(sqrt(sum))", "static_cast<REAL>(sum)"),
    "no barrier before the norm is read": (
        "norm = static_cast<REAL>(sqrt(sum));\n    __syncthreads();",
        "norm = static_cast<REAL>(sqrt(sum));",
    ),
    "the last chunk dropped": ("c < chunks; c += step", "c < chunks - 1; c += step"),
    "the end of an array dropped": (
        "offset_of(u) + i < left ? p[offset_of(u) + i] : REAL(0)",
        "REAL(0)",
    ),
    "an array's end not stored": ("if (offset_of(u) + i < left) p[", "if (false) p["),
    "an array's end overrun": ("if (offset_of(u) + i < left) p[", "p["),
    "a step in the wrong direction": ("p[u][i] -= rate", "p[u][i] += rate"),
    "clipping forgotten": ("rate * (factor * g[u][i])", "rate * g[u][i]"),
    "clipping upwards": ("norm > limit ?", "norm < limit ?"),
    "NaN scales": ("norm > limit ?", "!(norm <= limit) ?"),
    "squares overflow": ("sum <= REAL(1e38)", "true"),
    "squares vanish": ("sum >= REAL(1e-28)", "true"),
    "the losses not averaged": ("static_cast<REAL>(sum / rows)", "static_cast<REAL>(sum)"),
    "the cursor left behind": ("if (cursor) cursor[0] += 1;", ""),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_rejected(fault: str, tmp_path: Path) -> None:
    sources = twin("clip_sgd", *WRONG[fault], tmp_path)
    rejected = 0
    for order in ("forward", "reverse", "eager"):
        device = emulated(multiprocessors=1, order=order, sources=sources)
        try:
            check_clip(device, draw([5, 4097, 8191], np.float32), 0.5)
            for factor in (0.5, 2.0):
                check_step(device, np.float32, factor)
            for scale in (1e25, 1e-25):
                check_clip(device, draw([5000], np.float32, scale=scale), 0.5)
            _, (g,) = clip(device, [np.array([np.nan, 1.0], np.float32)], 1.0)
            np.testing.assert_array_equal(g, np.array([np.nan, 1.0], np.float32))
        except (AssertionError, EmulatorError):
            rejected += 1
    assert rejected, f"{fault}: no check noticed"


# A sanitizer runs in a process of its own, where addresses in a table mean nothing: these kernels
# take one array as a pointer and call the real ones.
ON_POINTERS = """
#include "clip_sgd.cu"
__device__ Arrays table(float* data, int size) {
    Arrays a{};
    a.data[0] = data, a.size[0] = size, a.first[1] = ceil_div(size, CHUNK), a.count = 1;
    return a;
}
extern "C" __global__ void __launch_bounds__(256)
squares_on_pointers(float* g, int size, double* partials, const float* losses, int rows,
                    float* loss) {
    squares_kernel(table(g, size), 1, partials, 0, losses, rows, loss);
}
extern "C" __global__ void __launch_bounds__(256)
scale_on_pointers(float* g, int size, const double* partials, int parts, float* norm) {
    scale_kernel(table(g, size), partials, parts, nullptr, 0.5, norm);
}
extern "C" __global__ void __launch_bounds__(256)
sgd_on_pointers(float* p, float* g, int size, const double* partials, int parts,
                const double* rates, float* norm, const float* loss, double* totals, int* cursor) {
    sgd_kernel(table(p, size), table(g, size), partials, parts, rates, 0.0, norm, loss, totals,
               cursor);
}
"""


def sanitized_step(kind: Sanitizer, source: Path) -> None:
    """All three kernels on one array of 9,000 values, in blocks that own one and two chunks."""
    size, rows = np.int32(9000), np.int32(300)
    p, g = draw([9000], np.float32)[0], draw([9000], np.float32, seed=1)[0]
    exact = p - 0.5 * g.astype(np.float64) / length([g])
    losses, loss, norm = draw([300], np.float32, seed=2)[0], np.zeros(1, "f"), np.zeros(1, "f")
    partials, rates, totals = np.full(3, np.nan), np.array([0.5, 1.0]), np.zeros(4)
    cursor = np.zeros(1, np.int32)

    def run(kernel: str, grid: int, *args: Any) -> None:
        options: dict[str, str | int] = {"REAL": "float", "WIDTH": 4}
        run_sanitized(kind, source, kernel, grid, 256, args, defines=options)

    run("squares_on_pointers", 3, g, size, partials, losses, rows, loss)
    parts = np.int32(3)
    run("sgd_on_pointers", 2, p, g, size, partials, parts, rates, norm, loss, totals, cursor)
    assert_close("sgd", p, exact)
    assert totals[2] == cursor[0] == 1
    run("scale_on_pointers", 2, g, size, partials, parts, norm)
    assert_close("clip_by_global_norm", np.float32(length([g])), np.float64(0.5))


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_under_a_sanitizer(kind: Sanitizer, tmp_path: Path) -> None:
    require_emulator()
    (tmp_path / "on_pointers.cu").write_text(ON_POINTERS, encoding="utf-8")
    sanitized_step(kind, tmp_path / "on_pointers.cu")


def test_the_race_checker_sees_a_missing_barrier(tmp_path: Path) -> None:
    require_emulator()
    twin("clip_sgd", *WRONG["no barrier before the norm is read"], tmp_path)
    (tmp_path / "on_pointers.cu").write_text(ON_POINTERS, encoding="utf-8")
    with pytest.raises(SanitizerError, match="data race"):
        sanitized_step("thread", tmp_path / "on_pointers.cu")
