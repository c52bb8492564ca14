"""``window``, ``gather`` and its transpose in CUDA C, in the emulator, against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastrnn.cuda import gather as launch
from fastrnn.cuda.clip_sgd import record
from fastrnn.cuda.device import Device
from tests.conftest import Inputs
from tests.cuda_sanitized import sanitized, scratch_of
from tests.cuda_support import ORDERS, emulated, twin
from tests.emulated_device import EmulatedDevice
from tests.emulator import EmulatorError, SanitizerError
from tests.emulator.build import Sanitizer
from tests.emulator.module import Order
from tests.tolerances import assert_close, relative_rms

SHAPES = [
    # T, B, H, V
    pytest.param((1, 1, 1, 2), id="smallest"),
    pytest.param((1, 5, 33, 7), id="one-step"),
    pytest.param((7, 1, 16, 31), id="one-row"),
    pytest.param((5, 3, 37, 41), id="odd"),
    pytest.param((4, 8, 32, 64), id="aligned"),
    pytest.param((2, 4, 300, 65), id="wide-state"),
    pytest.param((3, 5, 1100, 9), id="several-tiles"),
]
TOKENS = ["random", "one distinct token", "all distinct tokens", "one hot, many rare"]


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=SHAPES)
def inputs(request: pytest.FixtureRequest, dtype: Any) -> Inputs:
    T, B, H, V = request.param
    return Inputs(T, B, H, V, dtype)


def unaligned(device: Device, host: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts one element behind a multiple of 16 bytes, as a slice may."""
    flat: NDArray[Any] = device.empty((host.size + 1,), host.dtype)[1:]
    flat[:] = host.ravel()
    return flat.reshape(host.shape)


def choose_tokens(inputs: Inputs, kind: str, rows: int, V: int) -> NDArray[np.int32]:
    tokens = inputs.rng.integers(0, V, rows)
    if kind == "one distinct token":
        tokens[:] = V - 1
    elif kind == "all distinct tokens":
        tokens = inputs.rng.permutation(max(V, rows))[:rows] % V
    elif kind == "one hot, many rare":
        tokens[inputs.rng.random(rows) < 0.6] = V // 2
    return tokens.astype(np.int32)


# --- window and gather -----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "T", "B"), [(1, 1, 1), (3, 35, 32), (2, 6, 5), (5, 4, 1), (4, 1, 9)])
def test_window(n: int, T: int, B: int) -> None:
    device = emulated()
    tokens = np.arange(1000, 1000 + T + 50, dtype=np.int32)
    starts = np.random.default_rng(0).integers(0, 50, (n, B)).astype(np.int32)
    starts[0, 0] = 49  # the last target is the corpus's last token
    x, y = device.empty((n, T, B), np.int32), device.empty((n, T, B), np.int32)
    launch.window(device, device.put(tokens), device.put(starts), x, y)
    want = 1000 + starts[:, None, :] + np.arange(T)[None, :, None]
    np.testing.assert_array_equal(x, want)
    np.testing.assert_array_equal(y, want + 1)


@pytest.mark.parametrize("start", ["aligned", "unaligned"])
def test_gather(inputs: Inputs, start: str) -> None:
    device = emulated(multiprocessors=1)
    put = device.put if start == "aligned" else lambda host: unaligned(device, host)
    W_xh, b_h = inputs.array(inputs.V, inputs.H), inputs.array(inputs.H)
    x = inputs.tokens(3, inputs.T, inputs.B)
    z = put(np.full((inputs.T, inputs.B, inputs.H), np.nan, inputs.dtype))
    launch.gather(device, put(W_xh), device.put(x[1]), put(b_h), z)
    np.testing.assert_array_equal(z, W_xh[x[1]] + b_h)
    cursor = device.put(np.array([2], np.int32))
    launch.gather(device, put(W_xh), device.put(x), put(b_h), z, cursor)
    np.testing.assert_array_equal(z, W_xh[x[2]] + b_h)
    width = dict(device.launched[-1].defines)["WIDTH"]
    whole = inputs.H * inputs.dtype.itemsize % 16 == 0 and start == "aligned"
    assert width == (16 // inputs.dtype.itemsize if whole else 1)


@pytest.mark.parametrize("order", ORDERS)
def test_gather_of_more_rows_than_a_wave_holds(order: Order) -> None:
    device = emulated(multiprocessors=1, order=order)
    inputs = Inputs(40, 31, 8, 50, np.float32)
    W_xh, b_h, x = inputs.array(50, 8), inputs.array(8), inputs.tokens(40, 31)
    z = device.empty((40, 31, 8), np.float32)
    launch.gather(device, device.put(W_xh), device.put(x), device.put(b_h), z)
    np.testing.assert_array_equal(z, W_xh[x] + b_h)


def test_gather_keeps_nan() -> None:
    device = emulated()
    W_xh = np.ones((3, 4), np.float32)
    W_xh[1, 2] = np.nan
    z = device.empty((2, 1, 4), np.float32)
    x = np.array([[1], [2]], np.int32)
    launch.gather(device, device.put(W_xh), device.put(x), device.put(np.zeros(4, np.float32)), z)
    np.testing.assert_array_equal(np.isnan(z), np.isnan(W_xh[x]))


def test_a_captured_step_reads_the_row_that_is_due() -> None:
    device, inputs = emulated(), Inputs(4, 3, 8, 11, np.float32)
    x, W_xh, b_h = inputs.tokens(3, 4, 3), inputs.array(11, 8), inputs.array(8)
    weights, tokens, bias = map(device.put, (W_xh, x, b_h))
    z, one = device.empty((4, 3, 8), np.float32), device.put(np.ones((), np.float32))
    cursor, totals = device.put(np.zeros(1, np.int32)), device.put(np.zeros(4))

    def step() -> None:
        launch.gather(device, weights, tokens, bias, z, cursor)
        record(device, one, one, totals, cursor)

    graph = device.capture(step)
    for row in x:
        graph.launch()
        np.testing.assert_array_equal(z, W_xh[row] + b_h)


# --- sort ------------------------------------------------------------------------------------


def check_sort(device: EmulatedDevice, x: NDArray[np.int32], V: int, cursor: int | None) -> None:
    """``order`` and ``bounds`` of every row of ``x``, or of row ``cursor``, are NumPy's."""
    rows = x if cursor is None else x[cursor : cursor + 1]
    order = device.empty((*rows.shape, 2), np.int32)
    bounds = device.empty((len(rows), V + 1), np.int32)
    due = None if cursor is None else device.put(np.array([cursor], np.int32))
    launch.sort(device, device.put(x), V, order, bounds, scratch_of(device), due)
    for tokens, places, firsts in zip(rows, order, bounds, strict=True):
        want = np.argsort(tokens, kind="stable")
        np.testing.assert_array_equal(places[:, 0], want)
        np.testing.assert_array_equal(places[:, 1], tokens[want])
        np.testing.assert_array_equal(firsts, np.searchsorted(tokens[want], np.arange(V + 1)))


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize(
    ("rows", "V"),
    [(1, 1), (1, 2), (31, 5), (1120, 1027), (257, 70_000), (4096, 256), (4097, 256), (6001, 1027)],
)
def test_sort(rows: int, V: int, kind: str) -> None:
    inputs = Inputs(1, rows, 1, V, np.float32)
    x = np.stack([choose_tokens(inputs, kind, rows, V) for _ in range(2)])
    device = emulated()
    check_sort(device, x, V, None)
    check_sort(device, x, V, 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [700, 4500])
def test_sort_in_any_order_of_threads(rows: int, order: Order) -> None:
    inputs = Inputs(1, rows, 1, 70_000, np.float32)
    x = choose_tokens(inputs, "one hot, many rare", rows, 70_000)
    check_sort(emulated(order=order), x[None], 70_000, None)


# --- scatter-add -----------------------------------------------------------------------------


def transpose(
    device: Device, dz: NDArray[Any], x: NDArray[np.int32], V: int, put: Any = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """dW_xh and db_h, from outputs full of NaN."""
    put, H = put or device.put, dz.shape[-1]
    dW_xh, db_h = put(np.full((V, H), np.nan, dz.dtype)), put(np.full(H, np.nan, dz.dtype))
    launch.gather_backward(device, put(dz), device.put(x), dW_xh, db_h, scratch_of(device))
    return device.get(dW_xh), device.get(db_h)


def oracle(dz: NDArray[Any], x: NDArray[np.int32], V: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = dz.reshape(x.size, -1).astype(np.float64)
    dW_xh = np.zeros((V, rows.shape[1]))
    np.add.at(dW_xh, x.ravel(), rows)
    return dW_xh, rows.sum(axis=0)


def check_transpose(device: Device, dz: NDArray[Any], x: NDArray[np.int32], V: int) -> Any:
    got = transpose(device, dz, x, V)
    for name, g, want in zip(("dW_xh", "db_h"), got, oracle(dz, x, V), strict=True):
        assert_close("gather_backward", g, want, name)
    return got


@pytest.mark.parametrize("kind", TOKENS)
def test_gather_backward(inputs: Inputs, kind: str) -> None:
    dz = inputs.array(inputs.T, inputs.B, inputs.H)
    x = choose_tokens(inputs, kind, inputs.T * inputs.B, inputs.V).reshape(inputs.T, inputs.B)
    check_transpose(emulated(), dz, x, inputs.V)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize(("rows", "V"), [(1120, 1027), (8193, 300), (9000, 3)])
def test_many_rows(rows: int, V: int, kind: str, dtype: Any) -> None:
    """Runs within a chunk, over two, over many; both sizes of chunks; both sorts."""
    inputs = Inputs(rows, 1, 3, V, dtype)
    dz = inputs.array(rows, 1, 3)
    x = choose_tokens(inputs, kind, rows, V).reshape(rows, 1)
    got = check_transpose(emulated(), dz, x, V)
    if dtype is np.float32:  # the float32 that NumPy would give, and twice its error
        for g, want, axis in zip(
            got, oracle(dz, x, V), (x.ravel(), np.zeros(rows, int)), strict=True
        ):
            plain = np.zeros(np.atleast_2d(want).shape, dtype)
            np.add.at(plain, axis, dz.reshape(rows, 3))
            assert relative_rms(g, want) <= 2 * relative_rms(plain.reshape(want.shape), want)


@pytest.mark.parametrize("start", ["aligned", "unaligned"])
def test_the_same_bits_on_every_device(start: str) -> None:
    inputs = Inputs(30, 10, 36, 40, np.float32)
    dz, x = inputs.array(30, 10, 36), choose_tokens(inputs, "one hot, many rare", 300, 40)
    results = []
    for capability, multiprocessors in ((75, 1), (90, 132)):
        for order in ORDERS:
            device = emulated(capability, multiprocessors=multiprocessors, order=order)
            put = device.put if start == "aligned" else (lambda h, d=device: unaligned(d, h))
            results.append(transpose(device, dz, x.reshape(30, 10), 40, put))
    for dW_xh, db_h in results[1:]:
        np.testing.assert_array_equal(dW_xh, results[0][0])
        np.testing.assert_array_equal(db_h, results[0][1])


def test_a_row_of_a_run_sorted_in_advance() -> None:
    device, inputs = emulated(), Inputs(6, 7, 20, 30, np.float32)
    x, dz = inputs.tokens(3, 6, 7), inputs.array(6, 7, 20)
    order, bounds = device.empty((3, 42, 2), np.int32), device.empty((3, 31), np.int32)
    launch.sort(device, device.put(x), 30, order, bounds, scratch_of(device))
    for row in (2, 0):
        dW_xh, db_h = device.empty((30, 20), np.float32), device.empty((20,), np.float32)
        cursor = device.put(np.array([row], np.int32))
        launch.scatter_add(
            device, device.put(dz), order, bounds, dW_xh, db_h, scratch_of(device), cursor
        )
        for got, want in zip((dW_xh, db_h), transpose(device, dz, x[row], 30), strict=True):
            np.testing.assert_array_equal(got, want)


def test_nan_reaches_its_token_and_the_bias() -> None:
    inputs = Inputs(10, 4, 8, 12, np.float32)
    dz, x = inputs.array(10, 4, 8), inputs.tokens(10, 4)
    dz[3, 2, 5] = np.nan
    dW_xh, db_h = transpose(emulated(), dz, x, 12)
    np.testing.assert_array_equal(np.isnan(dW_xh), np.isnan(oracle(dz, x, 12)[0]))
    np.testing.assert_array_equal(np.isnan(db_h), np.arange(8) == 5)


# --- wrong twins, and sanitizers -------------------------------------------------------------

WRONG_TRANSPOSES = {
    "no barrier before the digits are counted": (
        "        __syncthreads();   // zeros, tokens and the last pass are there\n",
        "",
    ),
    "no barrier before the places are used": (
        "counts[w][tid] += start;\n        __syncthreads();   // places are there",
        "counts[w][tid] += start;",
    ),
    "ties in no order": ("put(i, place + rank)", "put(i, place + __popc(peers) - 1 - rank)"),
    "a lane reads the place after it was moved on": (
        "__syncwarp();   // every lane has read before the first of its digit moves the place on",
        "",
    ),
    "the last occurrence dropped": (
        "            if (i + u < end) {\n",
        "            if (i + u < end - 1) {\n",
    ),
    "a run cut by its chunk is not added up": (
        "goes_on = end < rows && after == v",
        "goes_on = false",
    ),
    "a run's start forgotten": (
        "opened = begin > 0 && before == v",
        "opened = false",
    ),
    "absent tokens left as they were": ("bound[i] == bound[i + 1]", "false"),
    "one partial sum too few": (
        "((bounds[v + 1] - 1) >> log2_chunk) - k + 1",
        "((bounds[v + 1] - 1) >> log2_chunk) - k",
    ),
    "no barrier before shared sums are added": (
        "part[group][lane][i] = sum[i];\n        }\n        __syncthreads();",
        "part[group][lane][i] = sum[i];\n        }",
    ),
}


@pytest.mark.parametrize("fault", WRONG_TRANSPOSES)
def test_a_wrong_transpose_is_rejected(fault: str, tmp_path: Path) -> None:
    sources = twin("gather_backward", *WRONG_TRANSPOSES[fault], tmp_path)
    inputs = Inputs(30, 10, 8, 320, np.float32)
    dz, x = inputs.array(30, 10, 8), choose_tokens(inputs, "one hot, many rare", 300, 320)
    rejected = 0
    for order in ORDERS:
        device = emulated(order=order, sources=sources)
        try:
            check_sort(device, x[None], 320, None)
            check_transpose(device, dz, x.reshape(30, 10), 320)
        except (AssertionError, EmulatorError):
            rejected += 1
    assert rejected, f"{fault}: no check noticed"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("from[r];", "from[r + 1];"), ("y[at] = v[r + 1]", "y[at] = v[r]")],
    ids=["one token late", "targets are the inputs"],
)
def test_a_wrong_window_is_rejected(right: str, wrong: str, tmp_path: Path) -> None:
    device = emulated(sources=twin("gather", right, wrong, tmp_path))
    x, y = device.empty((1, 6, 2), np.int32), device.empty((1, 6, 2), np.int32)
    tokens, starts = np.arange(20, dtype=np.int32), np.array([[0, 13]], np.int32)
    want = starts[:, None, :] + np.arange(6)[None, :, None]
    try:
        launch.window(device, device.put(tokens), device.put(starts), x, y)
    except EmulatorError:
        return  # it reads past the corpus
    assert (x != want).any() or (y != want + 1).any()


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_under_a_sanitizer(kind: Sanitizer) -> None:
    inputs = Inputs(5, 6, 20, 11, np.float32)
    device = sanitized(kind, multiprocessors=2)
    W_xh, b_h, x = inputs.array(11, 20), inputs.array(20), inputs.tokens(5, 6)
    z = device.empty((5, 6, 20), np.float32)
    launch.gather(device, device.put(W_xh), device.put(x), device.put(b_h), z)
    np.testing.assert_array_equal(z, W_xh[x] + b_h)
    check_transpose(device, inputs.array(5, 6, 20), x, 11)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_the_large_sort_under_a_sanitizer(kind: Sanitizer) -> None:
    inputs = Inputs(1, 4200, 1, 300, np.float32)
    x = choose_tokens(inputs, "random", 4200, 300)
    check_sort(sanitized(kind), x[None], 300, None)


def test_the_race_checker_sees_a_missing_barrier(tmp_path: Path) -> None:
    passage = WRONG_TRANSPOSES["no barrier before the places are used"]
    sources = twin("gather_backward", *passage, tmp_path)
    x = choose_tokens(Inputs(1, 300, 1, 40, np.float32), "random", 300, 40)
    with pytest.raises(SanitizerError, match="data race"):
        check_sort(sanitized("thread", sources=sources), x[None], 40, None)
