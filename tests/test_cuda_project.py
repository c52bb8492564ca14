"""The matrix products of the CUDA C engine, in the emulator: results, accuracy, order, edges."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastrnn.backend import open_backend
from fastrnn.cuda import project as ops
from fastrnn.cuda.device import KERNELS, Array, Device, Kernel
from fastrnn.cuda.gemm import (
    BIAS,
    DOUBLE_TILES,
    FLOAT_TILES,
    PLAIN,
    TANH,
    TANH_BACKWARD,
    TENSOR_TILES,
    Plan,
    Tile,
    counters_needed,
    gemm,
    new_counters,
    plan,
    plans,
    variants,
)
from tests.conftest import Inputs
from tests.cuda_support import ORDERS, emulated, twin
from tests.emulated_device import EmulatedDevice
from tests.emulator import EmulatorError, SanitizerError, run_sanitized
from tests.emulator.build import Sanitizer
from tests.tolerances import assert_close, relative_rms

LAYOUTS = {"NN": (False, False), "NT": (False, True), "TN": (True, False)}
LARGE, MIDDLE, SMALL = TENSOR_TILES
SPLIT = 4
"""Multiprocessors of the emulated devices: enough to split tiles among blocks."""


def scratch_of(device: Device) -> Callable[[str, int, Any], Array]:
    return lambda name, size, dtype: device.empty((size,), dtype)


@dataclass
class Product:
    """``op(A) op(B)`` of random matrices, and its device arrays in rows padded to ``multiple``."""

    M: int
    N: int
    K: int
    layout: str = "NN"
    dtype: str = "float32"
    multiple: int = 1
    lead: int = 0
    positive: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.M, self.N, self.K])
        draw = rng.random if self.positive else rng.standard_normal
        self.a = draw((self.M, self.K)).astype(self.dtype)
        self.b = draw((self.K, self.N)).astype(self.dtype)
        self.want = self.a.astype(np.float64) @ self.b.astype(np.float64)

    @property
    def trans(self) -> tuple[bool, bool]:
        return LAYOUTS[self.layout]

    def ld(self, columns: int) -> int:
        return -(-columns // self.multiple) * self.multiple

    def place(self, device: Device, matrix: NDArray[Any]) -> Array:
        """On the device, with rows padded by what ``empty`` holds: NaN."""
        rows, columns = matrix.shape
        placed = device.empty((rows, self.ld(columns)), self.dtype)
        placed[:, :columns] = matrix
        return placed

    def run(
        self, device: Device, chosen: Plan | None = None, counters: Array | None = None
    ) -> NDArray[Any]:
        """The product as the device computes it; asserts that the padding of C is untouched."""
        trans_a, trans_b = self.trans
        a = self.a.T if trans_a else self.a
        A, head = self.place(device, a[self.lead :]), None
        if self.lead:
            head = self.place(device, a[: self.lead])
        B = self.place(device, self.b.T if trans_b else self.b)
        C = device.empty((self.M, self.ld(self.N)), self.dtype)
        gemm(
            device, A, B, C, self.M, self.N, self.K,
            lda=A.shape[1], ldb=B.shape[1], ldc=C.shape[1], trans_a=trans_a, trans_b=trans_b,
            head=head, lead=self.lead, scratch=scratch_of(device), counters=counters,
            chosen=chosen,
        )  # fmt: skip
        got = device.get(C)
        assert np.isnan(got[:, self.N :]).all(), "the product wrote between the rows of C"
        return got[:, : self.N]

    def plans(self, tile: Tile, multiprocessors: int = SPLIT) -> list[Plan]:
        size = np.dtype(self.dtype).itemsize
        return list(plans(tile, self.M, self.N, self.K, size, multiprocessors))

    def shared(self, tile: Tile) -> Plan:
        """A plan in which at least three blocks have parts of one tile."""
        return next(p for p in self.plans(tile) if p.whole == 0 and 3 * p.tiles <= p.grid)


def plain(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float32]:
    """The product by float32 fused multiply-adds in the order of k."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        exact = np.outer(a[:, k].astype(np.float64), b[k].astype(np.float64))
        total = (total + exact).astype(np.float32)
    return total


CASES = [
    # id, capability, tile, layout, dtype, padded
    pytest.param(90, LARGE, "NN", "float32", False, id="tensor-large-NN"),
    pytest.param(90, LARGE, "TN", "float32", True, id="tensor-large-TN"),
    pytest.param(90, MIDDLE, "NN", "float32", True, id="tensor-middle-NN"),
    pytest.param(90, MIDDLE, "NT", "float32", False, id="tensor-middle-NT"),
    pytest.param(80, MIDDLE, "TN", "float32", False, id="tensor-middle-TN"),
    pytest.param(100, SMALL, "NN", "float32", False, id="tensor-small-NN"),
    pytest.param(90, SMALL, "NT", "float32", True, id="tensor-small-NT"),
    pytest.param(89, FLOAT_TILES[0], "NN", "float32", True, id="float-large-NN"),
    pytest.param(86, FLOAT_TILES[0], "TN", "float32", False, id="float-large-TN"),
    pytest.param(75, FLOAT_TILES[1], "NT", "float32", True, id="float-NT"),
    pytest.param(120, FLOAT_TILES[1], "TN", "float32", True, id="float-TN"),
    pytest.param(90, DOUBLE_TILES[0], "NN", "float64", False, id="double-NN"),
    pytest.param(75, DOUBLE_TILES[0], "NT", "float64", True, id="double-NT"),
    pytest.param(80, DOUBLE_TILES[0], "TN", "float64", True, id="double-TN"),
]


@pytest.mark.parametrize(("capability", "tile", "layout", "dtype", "padded"), CASES)
def test_every_plan_gives_the_product(
    capability: int, tile: Tile, layout: str, dtype: str, padded: bool
) -> None:
    """Whole tiles and shared ones, edges in all three dimensions, every stage used twice."""
    device = emulated(capability, multiprocessors=SPLIT)
    M, N, K = tile.m // 2 + 7, tile.n + 3, 2 * tile.stages * tile.k + 5
    product = Product(M, N, K, layout, dtype, multiple=4 if padded else 1)
    kinds = {p.whole: p for p in reversed(product.plans(tile))}
    assert len(kinds) > 1, "only whole tiles"
    reference = plain(product.a, product.b) if dtype == "float32" else None
    for chosen in kinds.values():
        got = product.run(device, chosen)
        assert_close("project", got, product.want, f"{chosen}")
        if reference is not None:
            limit = 2 * relative_rms(reference, product.want)
            assert relative_rms(got, product.want) <= limit, chosen
    # Rows that are turned on their way to shared memory are copied element by element.
    turned = layout == "NT" and tile.warps is None
    vectors = {dict(k.defines)["VECTOR"] for k in device.launched}
    assert vectors == {16 // np.dtype(dtype).itemsize if padded and not turned else 1}


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1027, 3), (65, 1, 64), (2, 3, 200), (32, 64, 32)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_shapes(shape: tuple[int, int, int], layout: str) -> None:
    product = Product(*shape, layout)
    for capability in (90, 75) if layout == "NN" else (90,):
        assert_close("project", product.run(emulated(capability)), product.want, f"{shape}")


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True], ids=["mixed", "positive"])
@pytest.mark.parametrize("K", [32, 256, 1027, 1120, 4096])
def test_tensor_cores_are_as_accurate_as_float32(K: int, positive: bool) -> None:
    """At most twice the error of float32 fused multiply-adds, and no bias that grows with K."""
    product = Product(32, 64, K, positive=positive)
    got = product.run(emulated(90), product.plans(SMALL)[0])
    error = relative_rms(got, product.want)
    assert error <= 2 * relative_rms(plain(product.a, product.b), product.want)
    if positive:
        assert abs(np.mean(got / product.want - 1)) < 2**-23


FROM_ZERO = "mma_tf32_from_zero(d[i], low_a[i], high_b);"
LOW_ORDER_TWINS = {
    "plain TF32": (
        "low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high & 0xffffe000u));",
        "low = 0u;",
    ),
    "low part of A lost": (FROM_ZERO, "for (int r = 0; r < 4; ++r) d[i][r] = 0.0f;"),
}


@pytest.mark.parametrize("name", LOW_ORDER_TWINS)
def test_a_lost_low_order_term_is_noticed(name: str, tmp_path: Path) -> None:
    right, wrong = LOW_ORDER_TWINS[name]
    product = Product(32, 64, 256)
    device = emulated(90, sources=twin("gemm", right, wrong, tmp_path))
    error = relative_rms(product.run(device, product.plans(SMALL)[0]), product.want)
    assert error > 2 * relative_rms(plain(product.a, product.b), product.want)


def test_accumulating_in_tensor_cores_is_noticed(tmp_path: Path) -> None:
    """They truncate: sums of like sign drift toward zero by up to half a unit a step of k."""
    sources = twin("gemm", "acc.c[i][j][r] += d[i][r];", "acc.c[i][j][r] = d[i][r];", tmp_path)
    text = sources["gemm"].read_text(encoding="utf-8")
    assert text.count(FROM_ZERO) == 1
    loads = "for (int r = 0; r < 4; ++r) d[i][r] = acc.c[i][j][r];"
    onward = FROM_ZERO.replace("mma_tf32_from_zero", "mma_tf32")
    sources["gemm"].write_text(text.replace(FROM_ZERO, f"{{ {loads} {onward} }}"), encoding="utf-8")
    product = Product(32, 64, 4096, positive=True)
    got = product.run(emulated(90, sources=sources), product.plans(SMALL)[0])
    limit = 2 * relative_rms(plain(product.a, product.b), product.want)
    assert relative_rms(got, product.want) > limit


def test_nan_and_infinity_stay_where_they_belong() -> None:
    for capability in (90, 89):
        product = Product(40, 70, 33)
        product.a[3, 5], product.b[7, 66] = np.nan, np.inf
        got = product.run(emulated(capability))
        bad = np.zeros((40, 70), bool)
        bad[3], bad[:, 66] = True, True
        np.testing.assert_array_equal(~np.isfinite(got), bad)


def test_large_and_small_magnitudes() -> None:
    for scale in (1e18, 1e-12):
        product = Product(33, 65, 50)
        product.a = (product.a * np.float32(scale)).astype(np.float32)
        product.b = (product.b * np.float32(scale)).astype(np.float32)
        product.want = product.a.astype(np.float64) @ product.b.astype(np.float64)
        assert_close("project", product.run(emulated(90)), product.want, f"{scale}")


# --- the same bits, whoever comes first --------------------------------------------------------


def backward_blocks(folder: Path) -> dict[str, Path]:
    """The kernel file with blocks started in the opposite order, each with the same part."""
    text = (KERNELS / "gemm.cu").read_text(encoding="utf-8")
    assert "blockIdx.x" in text
    path = folder / "gemm.cu"
    path.write_text(text.replace("blockIdx.x", "(gridDim.x - 1 - blockIdx.x)"), encoding="utf-8")
    return {"gemm": path}


ORDER_PRODUCTS = [
    pytest.param(90, SMALL, Product(35, 67, 162, "NT", multiple=4), id="tensor-small-NT"),
    pytest.param(90, MIDDLE, Product(70, 64, 165, "TN", lead=37), id="tensor-middle-TN"),
    pytest.param(89, FLOAT_TILES[1], Product(70, 67, 165, "TN", lead=37), id="float-TN"),
    pytest.param(90, DOUBLE_TILES[0], Product(70, 67, 90, dtype="float64"), id="double-NN"),
]


@pytest.mark.parametrize(("capability", "tile", "product"), ORDER_PRODUCTS)
def test_same_bits_in_every_order(
    capability: int, tile: Tile, product: Product, tmp_path: Path
) -> None:
    """Threads in any order and blocks in the opposite one: what they compute does not change."""
    chosen = min(product.plans(tile), key=lambda p: p.quota or 99)
    results = [
        product.run(emulated(capability, order=order, multiprocessors=SPLIT), chosen)
        for order in ORDERS
    ]
    turned = emulated(capability, multiprocessors=SPLIT, sources=backward_blocks(tmp_path))
    for got in [*results, product.run(turned, chosen)]:
        assert_close("project", got, product.want)
        assert got.tobytes() == results[0].tobytes()


def test_parts_in_order_of_arrival_are_noticed(tmp_path: Path) -> None:
    """A twin that begins with the last block's own part: its bits depend on which block that is."""
    right = "            const REAL* part = partial + deal.slot(block, tile_start) + e;"
    own = "blockIdx.x + block - first"
    wrong = right.replace(
        "deal.slot(block,", f"deal.slot({own} > last ? {own} - (last - first + 1) : {own},"
    )
    begin, rotated = "deal.slot(first, tile_start)", "deal.slot(blockIdx.x, tile_start)"
    product = Product(32, 64, 165)
    seen = set()
    for folder in ("forward", "backward"):
        (tmp_path / folder).mkdir()
        sources = twin("gemm", right, wrong, tmp_path / folder)
        text = sources["gemm"].read_text(encoding="utf-8")
        assert text.count(begin) == 1
        text = text.replace(begin, rotated)
        if folder == "backward":
            text = text.replace("blockIdx.x", "(gridDim.x - 1 - blockIdx.x)")
        sources["gemm"].write_text(text, encoding="utf-8")
        device = emulated(90, multiprocessors=SPLIT, sources=sources)
        for _ in range(5):  # blocks run on two threads: which comes last is likely, not certain
            got = product.run(device, product.shared(SMALL))
            assert_close("project", got, product.want)
            seen.add(got.tobytes())
    assert len(seen) > 1


def test_a_graph_is_replayed_with_counters_that_return_to_zero() -> None:
    device = emulated(90, multiprocessors=SPLIT)
    product = Product(35, 64, 165)
    counters = new_counters(device)
    A, B = device.put(product.a), device.put(product.b)
    C = device.empty((35, 64), "float32")
    kept: dict[str, Array] = {}

    def scratch(name: str, size: int, dtype: Any) -> Array:
        return kept.setdefault(name, device.empty((size,), dtype))

    def submit() -> None:
        gemm(
            device, A, B, C, 35, 64, 165, lda=165, ldb=64, ldc=64, scratch=scratch,
            counters=counters, chosen=product.plans(SMALL)[-1],
        )  # fmt: skip

    graph = device.capture(submit)
    results = []
    for _ in range(3):
        C[:] = np.nan
        graph.launch()
        results.append(device.get(C).tobytes())
        assert_close("project", C, product.want)
        assert not counters.any()
    assert len(set(results)) == 1


# --- wrong twins -------------------------------------------------------------------------------

LOOP_WAIT = """                cp_async_wait<STAGES - 2>();
                __syncthreads();   // the next stage has arrived; no thread will read this one again
"""
WRONG = {
    "a row of k dropped": ("r < rows ? valid : 0", "r + 1 < rows ? valid : 0"),
    "no wait for copies": (LOOP_WAIT, "                __syncthreads();\n"),
    "no barrier between stages": (LOOP_WAIT, "                cp_async_wait<STAGES - 2>();\n"),
    "tile read before it is complete": (
        "        __syncthreads();   // the tile is complete in shared memory\n",
        "",
    ),
    "counter not reset": ("(part.tile - whole), last - first)", "(part.tile - whole), ~0u)"),
}


def is_right(sources: dict[str, Path] | None) -> bool:
    """Whether two products in a row, in every order of threads, are right and have equal bits."""
    product = Product(35, 67, 165)
    seen = set()
    for order in ORDERS:
        device = emulated(90, multiprocessors=SPLIT, order=order, sources=sources)
        counters = new_counters(device)
        for chosen in (product.plans(SMALL)[-1], product.plans(SMALL)[0], product.plans(SMALL)[-1]):
            try:
                got = product.run(device, chosen, counters)
            except EmulatorError:
                return False
            if not relative_rms(got, product.want) <= 1e-6:
                return False
            seen.add((chosen, got.tobytes()))
    return len(seen) == 2


def test_the_right_kernel_passes_what_its_twins_must_not() -> None:
    assert is_right(None)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_are_noticed(name: str, tmp_path: Path) -> None:
    assert not is_right(twin("gemm", *WRONG[name], tmp_path))


class SanitizedDevice(EmulatedDevice):
    """Runs every launch under a sanitizer."""

    kind: Sanitizer = "address"

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        source = self.sources.get(kernel.file, KERNELS / f"{kernel.file}.cu")
        run_sanitized(
            self.kind, source, kernel.name, grid, kernel.threads, list(args),
            shared_bytes=kernel.shared_bytes, order=self.order, defines=dict(kernel.defines),
        )  # fmt: skip


def sanitized(kind: Sanitizer, sources: dict[str, Path] | None = None) -> SanitizedDevice:
    emulated()  # skips where there is no emulator
    device = SanitizedDevice(90, multiprocessors=2, order=3, sources=sources)
    device.kind = kind
    return device


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(kind: Sanitizer) -> None:
    product = Product(35, 67, 165, "TN", lead=39)
    chosen = product.plans(SMALL, 2)[-1]
    assert chosen.whole < chosen.tiles
    assert_close("project", product.run(sanitized(kind), chosen), product.want)


def test_thread_sanitizer_finds_a_part_counted_before_it_is_stored(tmp_path: Path) -> None:
    """Blocks would have to run in a particular rhythm for its bits to be wrong."""
    product = Product(32, 64, 165)
    sources = twin(
        "gemm",
        "            __syncthreads();\n            if (threadIdx.x == 0) arrived",
        "            if (threadIdx.x == 0) arrived",
        tmp_path,
    )
    with pytest.raises(SanitizerError, match="data race"):
        product.run(sanitized("thread", sources), product.plans(SMALL, 2)[-1])


# --- far apart -----------------------------------------------------------------------------------


class UnguardedDevice(EmulatedDevice):
    """Launches on the arrays themselves: they are too large to be copied."""

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        module = self._emulator.module(KERNELS / f"{kernel.file}.cu", dict(kernel.defines))
        module.launch(
            kernel.name, grid, kernel.threads, list(args), shared_bytes=kernel.shared_bytes,
            guard=False,
        )  # fmt: skip


@pytest.mark.parametrize("capability", [90, 89])
def test_offsets_beyond_32_bits(capability: int) -> None:
    """Rows 2^26 elements apart: the last of 66 begins 17 GB after the first, all but unused."""
    emulated()
    device = UnguardedDevice(capability)
    M, N, K, ld = 66, 66, 66, 1 << 26
    # mmap names MAP_NORESERVE, 0x4000 on x86-64 Linux, from Python 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    product = Product(M, N, K)

    def sparse(matrix: NDArray[Any]) -> NDArray[Any]:
        memory = mmap.mmap(-1, matrix.shape[0] * ld * 4, flags=flags)
        flat = np.frombuffer(memory, np.float32)
        flat.reshape(-1, ld)[:, : matrix.shape[1]] = matrix
        return flat

    for layout, (trans_a, trans_b) in LAYOUTS.items():
        A = sparse(product.a.T if trans_a else product.a)
        B = sparse(product.b.T if trans_b else product.b)
        C = sparse(np.zeros((M, N), np.float32))
        gemm(
            device, A, B, C, M, N, K, lda=ld, ldb=ld, ldc=ld, trans_a=trans_a, trans_b=trans_b,
            scratch=scratch_of(device),
        )  # fmt: skip
        assert_close("project", C.reshape(-1, ld)[:, :N], product.want, layout)


# --- the ops -------------------------------------------------------------------------------------

SHAPES = [
    pytest.param((1, 1, 1, 2), id="smallest"),
    pytest.param((5, 3, 37, 41), id="odd"),
    pytest.param((4, 8, 32, 64), id="aligned"),
    pytest.param((3, 17, 130, 133), id="wide"),
]
KINDS = [(90, "float32"), (89, "float32"), (75, "float64")]


@dataclass
class Emulated:
    """A device and the dtype to test on it."""

    device: EmulatedDevice
    dtype: str


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Emulated:
    capability, dtype = request.param
    return Emulated(emulated(capability, multiprocessors=SPLIT), dtype)


@pytest.fixture(params=SHAPES)
def inputs(request: pytest.FixtureRequest, kind: Emulated) -> Inputs:
    T, B, H, V = request.param
    return Inputs(T, B, H, V, kind.dtype)


ORACLE = open_backend("numpy")


def exact(*arrays: NDArray[Any]) -> tuple[Any, ...]:
    return tuple(a.astype(np.float64) for a in arrays)


def rows(array: NDArray[Any], ld: int, device: Device) -> Array:
    """A device array of rows ``ld`` apart, NaN between them."""
    placed = device.empty((array.size // array.shape[-1], ld), array.dtype)
    placed[:, : array.shape[-1]] = array.reshape(len(placed), -1)
    return placed


@pytest.mark.parametrize("multiple", [1, 32])
def test_project_and_its_gradients(kind: Emulated, inputs: Inputs, multiple: int) -> None:
    device = kind.device
    T, B, H, V = inputs.T, inputs.B, inputs.H, inputs.V
    p = inputs.params()
    h, dlogits = np.tanh(inputs.array(T, B, H)), inputs.array(T, B, V, scale=0.1)
    ld = -(-V // multiple) * multiple
    padded: dict[str, Any] = {"ld_W": ld, "ld_logits": ld}
    scratch = scratch_of(device)
    W, made = device.empty((H, ld), inputs.dtype), device.put
    ops.pad(device, made(p["W_hq"]), H, V, ld, W)
    np.testing.assert_array_equal(W[:, :V], p["W_hq"])
    assert not W[:, V:].any()

    logits = device.empty((T * B, ld), inputs.dtype)
    ops.project(device, made(h), W, made(p["b_q"]), logits, scratch=scratch, **padded)
    want = ORACLE.project(*exact(h, p["W_hq"], p["b_q"]))
    assert_close("project", logits[:, :V].reshape(T, B, V), want)
    assert np.isnan(logits[:, V:]).all()

    dh, dW_hq = device.empty((T, B, H), inputs.dtype), device.empty((H, V), inputs.dtype)
    db_q = device.empty((V,), inputs.dtype)
    ops.project_backward(
        device, rows(dlogits, ld, device), made(h), W, dh, dW_hq, db_q, scratch=scratch, **padded
    )
    dlogits_, h_, W_ = exact(dlogits, h, p["W_hq"])
    wants = ORACLE.project_backward(dlogits_, h_, W_)
    for name, got, want in zip(("dh", "dW_hq", "db_q"), (dh, dW_hq, db_q), wants, strict=True):
        assert_close("project_backward", got, want, name)


def test_steps_of_a_wide_recurrence(kind: Emulated, inputs: Inputs) -> None:
    """A step at a time, z and h in one array, as dh and dz: the whole recurrence and its BPTT."""
    device = kind.device
    T, B, H = inputs.T, inputs.B, inputs.H
    W, h0 = inputs.params()["W_hh"], np.tanh(inputs.array(B, H))
    z, dh = inputs.array(T, B, H), inputs.array(T, B, H)
    how: dict[str, Any] = {"scratch": scratch_of(device), "counters": new_counters(device)}
    W_hh, start, h = device.put(W), device.put(h0), device.put(z)
    for t in range(T):
        ops.tanh_step(device, h[t - 1] if t else start, W_hh, h[t], h[t], **how)
    want = ORACLE.recurrence(*exact(z, W, h0))
    assert_close("recurrence", h, want)

    dz, dW_hh, dh0 = device.put(dh), device.empty((H, H), z.dtype), device.empty((B, H), z.dtype)
    for t in reversed(range(T)):
        after = dz[t + 1] if t + 1 < T else None
        ops.tanh_step_backward(device, after, W_hh, dz[t], h[t], dz[t], **how)
    ops.initial_state_gradient(device, dz[0], W_hh, dh0, **how)
    ops.recurrent_gradient(device, start, h, dz, dW_hh, **how)
    dh_, h_, W_, h0_ = exact(dh, device.get(h), W, h0)
    wants = ORACLE.recurrence_backward(dh_, h_, W_, h0_)
    for name, got, want in zip(("dz", "dW_hh", "dh0"), (dz, dW_hh, dh0), wants, strict=True):
        assert_close("recurrence_backward", got, want, name)


def test_arrays_that_start_anywhere() -> None:
    """A slice may begin at any element: it is copied element by element."""
    device = emulated(90)
    product = Product(20, 24, 32)

    def shifted(matrix: NDArray[Any]) -> Array:
        flat = device.empty((matrix.size + 1,), "float32")
        flat[1:] = matrix.ravel()
        return flat[1:].reshape(matrix.shape)

    C = shifted(np.zeros((20, 24), np.float32))
    A, B = shifted(product.a), shifted(product.b)
    for epilogue, x, y, want in (
        (PLAIN, None, None, product.want),
        (BIAS, shifted(product.b[:1]), None, product.want + product.b[0]),
        (TANH, C, None, np.tanh(product.want + product.want + product.b[0])),
        (TANH_BACKWARD, A, A, None),
    ):
        if want is None:  # x and y as wide as C
            x = y = shifted(product.a[:, :24])
            want = (product.a[:, :24] + product.want) * (1 - product.a[:, :24].astype("f8") ** 2)
        gemm(
            device, A, B, C, 20, 24, 32, lda=32, ldb=24, ldc=24, epilogue=epilogue, x=x, y=y,
            scratch=scratch_of(device),
        )  # fmt: skip
        assert_close("recurrence", C, want, f"epilogue {epilogue}")
    assert {dict(k.defines)["VECTOR"] for k in device.launched} == {1}


@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (33, 32), (4100, 37)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_column_sum(shape: tuple[int, int], dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    seen = set()
    for order in ORDERS[:3]:
        device = emulated(75, multiprocessors=SPLIT, order=order)
        out = device.empty((shape[1],), dtype)
        placed = rows(x, shape[1] + 3, device)
        ops.column_sum(device, placed, out, *shape, ld=shape[1] + 3, scratch=scratch_of(device))
        assert_close("gather_backward", out, x.astype(np.float64).sum(0))
        seen.add(out.tobytes())
    assert len(seen) == 1
    assert len(device.launched) == (2 if shape[0] > 4000 else 1), "parts of many rows"


def test_column_sum_without_its_barrier_is_noticed(tmp_path: Path) -> None:
    sources = twin("project", "    sums[warp][lane] = sum;\n    __syncthreads();\n",
                   "    sums[warp][lane] = sum;\n", tmp_path)  # fmt: skip
    x = np.ones((64, 32), np.float32)
    errors = []
    for order in ORDERS:
        device = emulated(75, order=order, sources=sources)
        out = device.empty((32,), "float32")
        ops.column_sum(device, device.put(x), out, 64, 32, scratch=scratch_of(device))
        errors.append(relative_rms(out, x.sum(0)))
    assert not max(errors, key=lambda e: (np.isnan(e), e)) <= 1e-6


# --- plans ---------------------------------------------------------------------------------------

sizes = st.integers(1, 70_000)


@given(sizes, sizes, st.integers(0, 70_000), st.sampled_from([1, 4, 84, 132, 148]))
def test_plans_deal_out_everything(M: int, N: int, K: int, multiprocessors: int) -> None:
    """Every unit once, no idle block, the bounds that the kernel's integers and scratch need."""
    for tile in (*TENSOR_TILES, *FLOAT_TILES, *DOUBLE_TILES):
        depth = max(1, -(-K // tile.k))
        for p in plans(tile, M, N, K, 4, multiprocessors):
            rest = p.tiles - p.whole
            assert p.tiles == -(-M // tile.m) * -(-N // tile.n)
            assert p.quota * p.grid + p.extra == rest * depth < 2**32
            assert 0 <= p.extra < p.grid < 2**31
            if rest:
                assert p.quota >= 1
                assert rest < p.grid <= tile.blocks * multiprocessors
                assert p.whole % p.grid == 0
            else:
                assert p.grid == p.whole


def deal(p: Plan, depth: int) -> Iterator[tuple[int, int]]:
    """The units of each block, as the kernel numbers them."""
    first = [block * p.quota + min(block, p.extra) for block in range(p.grid + 1)]
    assert first[-1] == (p.tiles - p.whole) * depth
    return pairwise(first)


def test_a_block_shares_at_most_two_tiles() -> None:
    """What the kernel's two places for each block's parts rest on."""
    for tile in TENSOR_TILES:
        for p in plans(tile, 1120, 1027, 256, 4, 132):
            depth = -(-256 // tile.k)
            for start, stop in deal(p, depth):
                tiles = range(start // depth, -(-stop // depth))
                shared = [t for t in tiles if not start <= t * depth <= (t + 1) * depth <= stop]
                assert len(shared) <= 2
                assert sum(start <= t * depth for t in shared) <= 1


def test_choice_of_tiles() -> None:
    """The headline products fill an H200; large ones take large tiles, narrow ones small."""
    for M, N, K in ((1120, 1027, 256), (1120, 256, 1027), (256, 1027, 1120)):
        chosen = plan(M, N, K, np.float32, 90, 132)
        assert chosen.tile == MIDDLE
        assert chosen.grid >= 132
    assert plan(65536, 50_000, 1024, np.float32, 90, 132).tile == LARGE
    assert plan(32, 1024, 1024, np.float32, 90, 132).tile == SMALL
    assert plan(1120, 1027, 256, np.float32, 75, 40).tile == FLOAT_TILES[1]
    assert plan(8192, 8192, 1024, np.float32, 89, 142).tile == FLOAT_TILES[0]
    assert plan(1120, 1027, 256, np.float64, 90, 132).tile in DOUBLE_TILES


def test_counters_suffice_for_every_plan() -> None:
    arch = emulated(90, multiprocessors=132).arch
    for tile in (*TENSOR_TILES, *FLOAT_TILES, *DOUBLE_TILES):
        for p in plans(tile, 1120, 1027, 256, 4, 132):
            assert p.tiles - p.whole <= counters_needed(arch)


def test_both_transposed_is_refused() -> None:
    device = emulated(90)
    A = device.empty((4, 4), "float32")
    with pytest.raises(ValueError, match="both be transposed"):
        gemm(
            device, A, A, A, 4, 4, 4, lda=4, ldb=4, ldc=4, trans_a=True, trans_b=True,
            scratch=scratch_of(device),
        )  # fmt: skip


class RecordingDevice(EmulatedDevice):
    """Notes what would be launched."""

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        assert kernel.runs_on(self.arch.capability)
        self.launched.append(kernel)


def test_what_is_launched_is_listed() -> None:
    """The compile gate sees every kernel: variants() lists it."""
    emulated()
    for capability in (75, 80, 86, 89, 90, 100, 120):
        for dtype in ("float32", "float64"):
            device = RecordingDevice(capability, multiprocessors=4)
            for layout in LAYOUTS:
                for shape in ((3, 5, 7), (70, 70, 70), (900, 900, 40)):
                    for multiple in (1, 4):
                        product = Product(*shape, layout, dtype, multiple)
                        product.run(device)
            assert set(device.launched) <= set(variants())
            assert len(set(device.launched)) > 3
