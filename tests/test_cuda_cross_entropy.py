"""``cross_entropy`` in CUDA C, in the emulator, against NumPy in float64."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastrnn.backends.numpy_ import NumpyBackend
from fastrnn.cuda import cross_entropy as launch
from fastrnn.cuda.device import KERNELS, Device, Kernel
from tests import compile_gate
from tests.cuda_sanitized import sanitized
from tests.cuda_support import ORDERS, emulated, twin
from tests.emulated_device import EmulatedDevice
from tests.emulator import EmulatorError, SanitizerError
from tests.emulator.build import Sanitizer
from tests.tolerances import RELATIVE_RMS, assert_close

CASES = [
    # dtype, compute capability, V, ld: every kernel, its longest and its shortest row or near them
    ("float32", 90, 2, 4),
    ("float32", 90, 65, 128),
    ("float32", 90, 2, 2),
    ("float32", 75, 127, 127),
    ("float32", 90, 511, 512),
    ("float32", 80, 129, 129),
    ("float32", 75, 1027, 1028),
    ("float32", 75, 1027, 1027),
    ("float32", 90, 1027, 1056),
    ("float32", 90, 1027, 1027),
    ("float32", 90, 1535, 1536),
    ("float32", 90, 3000, 3000),
    ("float32", 75, 7167, 7167),
    ("float32", 75, 1537, 1540),
    ("float32", 89, 7167, 7167),
    ("float32", 100, 7166, 7168),
    ("float32", 75, 7169, 7172),
    ("float32", 75, 10_239, 10_239),
    ("float32", 86, 7169, 7172),
    ("float32", 90, 10_239, 10_239),
    ("float32", 90, 10_241, 10_244),
    ("float32", 90, 28_671, 28_671),
    ("float32", 90, 57_341, 57_344),
    ("float32", 120, 50_257, 50_257),
    ("float32", 75, 10_241, 10_244),
    ("float32", 80, 20_481, 20_481),
    ("float32", 90, 57_345, 57_345),
    ("float64", 90, 7, 7),
    ("float64", 90, 512, 512),
    ("float64", 75, 1027, 1028),
    ("float64", 90, 4097, 4097),
]


class Rows:
    """Logits with padding that is no data, targets, and what should become of them."""

    def __init__(self, rows: int, V: int, ld: int, dtype: Any, scale: float = 3.0) -> None:
        rng = np.random.default_rng([rows, V, ld])
        self.V = V
        self.logits = np.full((rows, ld), np.nan, dtype)
        self.logits[:, :V] = rng.standard_normal((rows, V)) * scale
        self.targets = rng.integers(0, V, (3, rows)).astype(np.int32)
        self.targets[1, :2] = 0, V - 1

    def oracle(self, step: int) -> tuple[Any, NDArray[Any]]:
        """Losses and dlogits without padding, in float64."""
        x = self.logits[:, : self.V].astype(np.float64)
        index = np.arange(len(x)), self.targets[step][: len(x)]
        with np.errstate(invalid="ignore", divide="ignore"):
            shifted = x - x.max(axis=1, keepdims=True)
            p = np.exp(shifted)
            total = p.sum(axis=1)
            losses = np.log(total) - shifted[index]
            p /= total[:, None]
            p[index] -= 1
            return losses, p / len(x)


class Result:
    def __init__(self, device: Device, rows: Rows, step: int, inplace: bool = True) -> None:
        n, ld = rows.logits.shape
        dtype = rows.logits.dtype
        logits = device.put(rows.logits)
        dlogits = logits if inplace else device.put(np.full((n, ld), np.nan, dtype))
        losses, loss = device.empty((n,), dtype), device.empty((), dtype)
        counter = device.put(np.zeros(1, np.uint32))
        cursor, targets = device.put(np.array([step], np.int32)), device.put(rows.targets)
        for _ in range(1 if inplace else 2):  # the counter must serve again
            loss[...] = np.nan
            launch.cross_entropy(
                device, logits, targets, rows.V, losses, dlogits, loss, counter, cursor
            )
        assert counter[0] == 0
        self.losses, self.loss, self.dlogits = map(device.get, (losses, loss, dlogits))


def check(rows: Rows, got: Result, step: int) -> None:
    losses, dlogits = rows.oracle(step)
    assert_close("cross_entropy", got.losses, losses, "losses")
    assert_close("cross_entropy", got.loss, losses.mean(), "loss")
    np.testing.assert_array_equal(got.dlogits[:, rows.V :], 0, err_msg="padding")
    # Where softmax saturates at the target the exact gradient is zero: compare absolutely then.
    limit = RELATIVE_RMS["cross_entropy"][got.dlogits.dtype.name]
    error = np.abs(got.dlogits[:, : rows.V].astype(np.float64) - dlogits).max() * len(dlogits)
    assert error <= max(limit, limit * np.abs(dlogits).max() * len(dlogits))


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize(("dtype", "capability", "V", "ld"), CASES)
def test_cross_entropy(dtype: str, capability: int, V: int, ld: int, inplace: bool) -> None:
    rows = Rows(7 if V > 5000 else 19, V, ld, dtype)  # more than a wave
    device = emulated(capability, multiprocessors=1)
    got = Result(device, rows, 1, inplace)
    check(rows, got, 1)
    if not inplace:  # no worse than twice the error of the NumPy backend in the same dtype
        _, want = rows.oracle(1)
        logits = np.ascontiguousarray(rows.logits[None, :, :V])
        _, plain = NumpyBackend().cross_entropy(logits, rows.targets[1][None])
        error, allowed = (np.linalg.norm(d - want) for d in (got.dlogits[:, :V], plain[0]))
        assert error <= 2 * allowed


def test_the_cases_above_launch_every_kernel() -> None:
    launched: set[Kernel] = set()
    for dtype, capability, _, ld in CASES:
        device = emulated(capability)
        wide = ld % 4 == 0
        launched.add(launch.choose(device, np.dtype(dtype), ld, wide)[1])
    assert launched == set(launch.variants())


@pytest.mark.parametrize("scale", [1e4, 1e30], ids=["1e4", "1e30"])
@pytest.mark.parametrize(
    ("capability", "V", "ld"),
    [(90, 100, 100), (90, 1027, 1028), (90, 10_500, 10_500), (75, 10_500, 10_500)],
)
def test_huge_logits(capability: int, V: int, ld: int, scale: float) -> None:
    rows = Rows(5, V, ld, np.float32, scale)
    check(rows, Result(emulated(capability), rows, 0), 0)


@pytest.mark.parametrize(
    ("capability", "V", "ld"),
    [(90, 100, 104), (90, 1027, 1028), (90, 10_500, 10_500), (75, 10_500, 10_500)],
)
def test_values_that_are_not_finite(capability: int, V: int, ld: int) -> None:
    """NaN, +inf or nothing but -inf makes a row of NaN, -inf a weight of zero; as in torch."""
    rows = Rows(8, V, ld, np.float32)
    columns = rows.logits[:, :V]
    columns[0, V // 2] = np.nan
    columns[1, V - 1] = np.inf
    columns[2, :] = -np.inf
    columns[3, :-1] = -np.inf  # the last alone has all the weight
    rows.targets[0, 3] = V - 1
    columns[4, rows.targets[0, 4]] = -np.inf
    columns[5, : V // 2] = -np.inf
    rows.targets[0, 5] = V - 1
    columns[6, :] = np.nan
    got = Result(emulated(capability), rows, 0)
    losses, want = rows.oracle(0)
    np.testing.assert_allclose(got.losses, losses, rtol=1e-5, atol=1e-6)
    assert losses[4] == np.inf
    np.testing.assert_allclose(got.dlogits[:, :V], want, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(got.dlogits[:, V:], 0)
    assert np.isnan(got.loss)


def test_the_mean_may_be_left_to_another_kernel() -> None:
    rows, device = Rows(9, 50, 52, np.float32), emulated()
    losses, logits = device.empty((9,), np.float32), device.put(rows.logits)
    launch.cross_entropy(device, logits, device.put(rows.targets[0]), 50, losses, logits)
    assert_close("cross_entropy", losses, rows.oracle(0)[0])


@pytest.mark.parametrize(("V", "multiprocessors"), [(10_300, 3), (28_700, 8)])
def test_clusters_that_take_different_numbers_of_rows(V: int, multiprocessors: int) -> None:
    rows = Rows(7, V, V, np.float32)
    shape, _ = launch.choose(emulated(), np.dtype(np.float32), V, wide=False)
    clusters = multiprocessors * shape.blocks // shape.cluster
    assert shape.cluster > 1
    assert 1 < clusters < 7
    assert 7 % clusters
    want = Result(emulated(multiprocessors=1), rows, 0)  # one cluster
    check(rows, want, 0)
    for order in ORDERS:
        got = Result(emulated(multiprocessors=multiprocessors, order=order), rows, 0)
        np.testing.assert_array_equal(got.losses, want.losses)
        np.testing.assert_array_equal(got.dlogits, want.dlogits)


@pytest.mark.parametrize(
    ("capability", "V", "ld"),
    [(90, 30, 32), (90, 1027, 1027), (90, 10_300, 10_300), (75, 10_300, 10_300)],
)
def test_the_same_bits_in_any_order_of_threads(capability: int, V: int, ld: int) -> None:
    rows = Rows(21 if V < 5000 else 5, V, ld, np.float32)
    results = [
        Result(emulated(capability, multiprocessors=m, order=order), rows, 0)
        for m in (1, 7)
        for order in ORDERS
    ]
    for got in results[1:]:
        for name in ("losses", "loss", "dlogits"):
            np.testing.assert_array_equal(getattr(got, name), getattr(results[0], name))


# --- wrong twins, and sanitizers -------------------------------------------------------------

ARM = "        if (threadIdx.x == 0) mbarrier_arrive_expect(&arrived[half], sizeof(parts[0]));\n"
WAIT = "        mbarrier_wait(&arrived[half], n >> 1 & 1);   // the parts of the row are there\n"

WRONG = {
    # fault: (passage, what stands in its place, compute capability, V, ld)
    "no barrier before the row's parts are merged": (
        "        __syncthreads();   // the parts of the row are there\n",
        "",
        (90, 1027, 1028),
    ),
    "a row used before it has come": ("        cp_async_wait<0>();\n", "", (90, 7000, 7000)),
    "the next row fetched from the wrong place": (
        "in + static_cast<size_t>(step) * ld, left",
        "in + ld, left",
        (90, 7000, 7000),
    ),
    "two rows share their parts": ("row += step, ++n", "row += step", (90, 1027, 1028)),
    "nobody waits for the row's parts": (WAIT, "", (90, 10_300, 10_300)),
    "the phase before waited for": ("n >> 1 & 1)", "~n >> 1 & 1)", (90, 10_300, 10_300)),
    "the phase waited for changes with every row": ("n >> 1 & 1)", "n & 1)", (90, 10_300, 10_300)),
    "a phase that is not armed": (ARM, "", (90, 10_300, 10_300)),
    "a phase that ends before its last part": (
        "sizeof(parts[0]));",
        "sizeof(parts[0]) - sizeof(Part));",
        (90, 10_300, 10_300),
    ),
    "a phase that waits for more than all parts": (
        "sizeof(parts[0]));",
        "sizeof(parts[0]) + sizeof(Part));",
        (90, 28_700, 28_700),
    ),
    "a part pushed into the other half": (
        "remote_part + half",
        "remote_part + (half ^ 1)",
        (90, 10_300, 10_300),
    ),
    "a part counted for the other half": (
        "remote_arrived + half",
        "remote_arrived + (half ^ 1)",
        (90, 28_700, 28_700),
    ),
    "blocks write each other's parts": ("rank * ROW_WARPS + warp", "warp", (90, 10_300, 10_300)),
    "a block is told only its own part": (
        "if (lane < CLUSTER)",
        "if (lane == rank)",
        (90, 10_300, 10_300),
    ),
    "exponentials relative to the warp's maximum left so": (
        "rescale(own, maximum) * inverse_rows / sum",
        "inverse_rows / sum",
        (90, 1027, 1028),
    ),
    "a running sum without rescaling": (
        "sum *= rescale(before, maximum);",
        "",
        (75, 10_300, 10_300),
    ),
    "threads merged without rescaling": (
        "warp_sum(sum * rescale(own, maximum))",
        "warp_sum(sum)",
        (75, 10_300, 10_300),
    ),
    "padding read as data": (
        "if (u * STRIDE + i >= left) x[u][i] = -INFINITE_REAL;",
        ";",
        (90, 1027, 1028),
    ),
    "padding not zeroed": (
        "if (u * STRIDE + i >= left) x[u][i] = REAL(0);",
        ";",
        (90, 1024, 1032),
    ),
    "no maximum subtracted": (
        "maximum = warp_max(largest(x, -INFINITE_REAL))",
        "maximum = REAL(0)",
        (90, 100, 100),
    ),
    "the target not subtracted": (
        "if (u * STRIDE + i == hit) x[u][i] -= inverse_rows;",
        ";",
        (90, 100, 100),
    ),
}


def rejects(device: EmulatedDevice, V: int, ld: int) -> bool:
    rows = Rows(33 if V < 5000 else 9, V, ld, np.float32, scale=200.0)
    try:
        check(rows, Result(device, rows, 0, inplace=False), 0)
    except (AssertionError, EmulatorError):
        return True
    return False


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_rejected(fault: str, tmp_path: Path) -> None:
    right, wrong, (capability, V, ld) = WRONG[fault]
    sources = twin("cross_entropy", right, wrong, tmp_path)
    assert any(
        rejects(emulated(capability, multiprocessors=1, order=order, sources=sources), V, ld)
        for order in ORDERS
    ), f"{fault}: no check noticed"


def edited(folder: Path, *changes: tuple[str, str]) -> dict[str, Path]:
    """``sources`` in which each passage, which occurs once by then, gives way to another."""
    text = (KERNELS / "cross_entropy.cu").read_text(encoding="utf-8")
    for right, wrong in changes:
        assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times"
        text = text.replace(right, wrong)
    path = folder / "cross_entropy.cu"
    path.write_text(text, encoding="utf-8")
    return {"cross_entropy": path}


# A block of a cluster, or a warp of it, that others may overtake.
BEGIN = "    if (threadIdx.x == 0) {\n        mbarrier_init(&arrived[0], 1);\n"
MEET = "        __syncwarp();   // every lane has read the row before\n"
LAG = "for (int i = 0; i < 99; ++i) spin_pause();\n"
LAGS = {
    "begins late": (BEGIN, f"    if (rank == 1) {LAG}{BEGIN}"),
    "pushes late": (MEET, f"        if (rank == 1 && warp == 2) {LAG}{MEET}"),
    "reads late": (WAIT, f"{WAIT}        if (rank == 1 && warp == 2) {LAG}"),
}
ONE_HALF = ("const int half = n & 1;", "const int half = 0;"), ("n >> 1 & 1)", "n & 1)")
OVERTAKING = {
    # fault: (who lags, what is wrong)
    "parts pushed before all mbarriers count": ("begins late", [("    cluster_wait();\n", "")]),
    "one half for all rows": ("reads late", [*ONE_HALF]),
    "a block leaves before its last row is complete": (
        "pushes late",
        [("        mbarrier_wait(", "        if (row + step < rows) mbarrier_wait(")],
    ),
}


@pytest.mark.parametrize("V", [10_300, 28_700])
@pytest.mark.parametrize("lag", LAGS)
def test_a_cluster_waits_for_who_lags(lag: str, V: int, tmp_path: Path) -> None:
    rows = Rows(5, V, V, np.float32)
    want = Result(emulated(multiprocessors=1), rows, 0)
    check(rows, want, 0)
    sources = edited(tmp_path, LAGS[lag])
    for order in ORDERS:
        got = Result(emulated(multiprocessors=1, order=order, sources=sources), rows, 0)
        np.testing.assert_array_equal(got.losses, want.losses)
        np.testing.assert_array_equal(got.dlogits, want.dlogits)


@pytest.mark.parametrize("fault", OVERTAKING)
def test_a_cluster_that_does_not_wait_is_rejected(fault: str, tmp_path: Path) -> None:
    lag, changes = OVERTAKING[fault]
    sources = edited(tmp_path, LAGS[lag], *changes)
    assert any(
        rejects(emulated(multiprocessors=1, order=order, sources=sources), 10_300, 10_300)
        for order in ORDERS
    ), f"{fault}: no check noticed"


def wrong_last_block(wrong: str, folder: Path) -> dict[str, Path]:
    """``sources`` in which a block finds out otherwise whether it is the last."""
    right = "(counter, gridDim.x - 1) == gridDim.x - 1"
    text = (KERNELS / "vector.cuh").read_text(encoding="utf-8")
    assert text.count(right) == 1
    (folder / "vector.cuh").write_text(text.replace(right, wrong), encoding="utf-8")
    shutil.copy(KERNELS / "cross_entropy.cu", folder)
    return {"cross_entropy": folder / "cross_entropy.cu"}


def test_a_counter_that_is_not_reset_is_rejected(tmp_path: Path) -> None:
    sources = wrong_last_block("(counter, ~0u) == gridDim.x - 1", tmp_path)
    assert rejects(emulated(multiprocessors=1, sources=sources), 1027, 1028)


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize(
    ("capability", "V", "ld"),
    [
        (90, 30, 32),
        (90, 1027, 1028),
        (90, 10_290, 10_292),
        (90, 28_700, 28_700),
        (75, 10_290, 10_290),
    ],
)
def test_under_a_sanitizer(kind: Sanitizer, capability: int, V: int, ld: int) -> None:
    rows = Rows(13 if V < 1000 else 4, V, ld, np.float32)
    device = sanitized(kind, capability, multiprocessors=1)
    check(rows, Result(device, rows, 0), 0)


def test_the_race_checker_sees_rows_that_share_their_parts(tmp_path: Path) -> None:
    right, wrong, _ = WRONG["two rows share their parts"]
    sources = twin("cross_entropy", right, wrong, tmp_path)
    rows = Rows(25, 1027, 1028, np.float32)
    with pytest.raises(SanitizerError, match="data race"):
        Result(sanitized("thread", multiprocessors=1, sources=sources), rows, 0)


@pytest.mark.parametrize(
    "changes",
    [pytest.param([*ONE_HALF], id="one half"), pytest.param([(MEET, "")], id="lanes apart")],
)
def test_the_race_checker_sees_parts_overwritten_while_they_are_read(
    changes: list[tuple[str, str]], tmp_path: Path
) -> None:
    sources = edited(tmp_path, *changes)
    rows = Rows(4, 10_290, 10_292, np.float32)
    with pytest.raises(SanitizerError, match="data race"):
        Result(sanitized("thread", multiprocessors=1, sources=sources), rows, 0)


def test_the_race_checker_sees_a_block_that_does_not_wait_for_the_others(tmp_path: Path) -> None:
    rows = Rows(13, 30, 32, np.float32)
    sources = wrong_last_block("(counter, gridDim.x - 1) < gridDim.x", tmp_path)  # always
    device = sanitized("thread", multiprocessors=1, sources=sources)
    with pytest.raises(SanitizerError, match="data race"):
        Result(device, rows, 0)


# --- the machine code ------------------------------------------------------------------------


def opcodes_of(sass: str) -> list[str]:
    """The opcode of every instruction, without its predicate."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", sass)


def row_loop(sass: str) -> str:
    """The loop over rows: the shortest that both fetches logits and stores dlogits."""
    loops = []
    for back in re.finditer(r"\bBRA[^;]*`\((\.L_x_\d+)\)", sass):
        begin = sass.find(f"\n{back[1]}:")
        loop = sass[begin : back.end()]
        if 0 <= begin < back.start() and "LDGSTS" in loop and "STG" in loop:
            loops.append(loop)
    assert loops, "no loop over rows"
    return min(loops, key=len)


def counts(opcodes: list[str]) -> dict[str, int]:
    """What waits for memory, and the two barriers of a cluster and a block."""
    names = ("MEMBAR.ALL.GPU", "CCTL.IVALL", "UCGABAR_ARV", "UCGABAR_WAIT", "BAR.SYNC")
    return {name: sum(opcode.startswith(name) for opcode in opcodes) for name in names}


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(k, id=f"WIDTH={dict(k.defines)['WIDTH']} CLUSTER={k.cluster}")
        for k in launch.variants()
        if k.cluster > 1
    ],
)
def test_a_row_of_a_cluster_waits_for_no_stores(kernel: Kernel, capability: int) -> None:
    reason = compile_gate.gate_unavailable()
    if reason and not os.environ.get("FASTRNN_REQUIRE_GATE"):
        pytest.skip(f"the compile gate {reason}")
    _, cubin = compile_gate.compile_module(kernel.file, kernel.defines, capability)
    sass = compile_gate.disassemble(cubin)[kernel.name]
    row = opcodes_of(row_loop(sass))
    assert counts(row) == dict.fromkeys(counts(row), 0)
    assert sum(opcode.startswith("STAS") for opcode in row) == 1
    assert any(opcode.startswith("SYNCS.ARRIVE") for opcode in row)
    assert any(opcode.startswith("SYNCS.PHASECHK") for opcode in row)
    # One barrier of the cluster at the beginning, and the grid's counter at the end with a block's
    # barriers: two around it, one for the sum.
    assert counts(opcodes_of(sass)) == {
        "MEMBAR.ALL.GPU": 2,
        "CCTL.IVALL": 2,
        "UCGABAR_ARV": 1,
        "UCGABAR_WAIT": 1,
        "BAR.SYNC": 3,
    }
