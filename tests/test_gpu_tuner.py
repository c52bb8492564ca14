"""The launchers' use of plans that were measured."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrnn.cuda import gemm, recurrence, tuned
from fastrnn.cuda.cupy_device import source_digest
from fastrnn.cuda.device import Kernel
from tests.cuda_support import emulated, require_emulator
from tests.emulated_device import EmulatedDevice
from tests.tolerances import assert_close

Row = dict[str, Any]

LARGE, MIDDLE, SMALL = gemm.TENSOR_TILES

# --- the launchers and the table -----------------------------------------------------------------


def forget() -> None:
    tuned.table.cache_clear()
    gemm.plan.cache_clear()


Use = Callable[..., Path]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Put a table in force: its lists of entries, or the text of a file."""

    def put(text: str | None = None, **lists: list[Row]) -> Path:
        path = tmp_path / "table.json"
        content: dict[str, list[Row]] = {"products": [], "recurrences": [], **lists}
        path.write_text(json.dumps(content) if text is None else text)
        monkeypatch.setenv(tuned.VARIABLE, str(path))
        forget()
        return path

    yield put
    monkeypatch.undo()
    forget()


M, N, K = 60, 70, 40
HERE = {"device": "emulator", "multiprocessors": 4, "kernels": source_digest()}


def product_entry(plan: gemm.Plan, **other: Any) -> Row:
    return {
        **HERE, "M": M, "N": N, "K": K, "dtype": "float32", "trans_a": False, "trans_b": False,
        "tile": tuned.tile_fields(plan.tile), "grid": plan.grid, **other,
    }  # fmt: skip


def other_plan(multiprocessors: int = 4) -> gemm.Plan:
    """One that the model does not choose, in which blocks share tiles."""
    ways = gemm.plans(gemm.TENSOR_TILES[1], M, N, K, 4, multiprocessors)
    other = next(p for p in ways if p.whole < p.tiles)
    assert other != gemm.plan(M, N, K, np.float32, 90, multiprocessors)
    return other


class Recorder(EmulatedDevice):
    """Notes the grid of every launch."""

    def __init__(self, capability: int = 90, multiprocessors: int = 4) -> None:
        super().__init__(capability, multiprocessors)
        self.grids: list[tuple[str, Any]] = []

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        self.grids.append((kernel.name, grid))
        super().launch(kernel, grid, args)


def multiply(multiprocessors: int | None = None, turned: bool = False) -> tuple[Kernel, Any]:
    """A product in the emulator, held to float64: its kernel and the number of blocks."""
    require_emulator()
    device = Recorder()
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((M, K), (K, N)))
    C = device.empty((M, N), np.float32)
    gemm.gemm(
        device, device.put(a.T if turned else a), device.put(b), C, M, N, K,
        lda=M if turned else K, ldb=N, ldc=N, trans_a=turned,
        scratch=lambda name, size, dtype: device.empty((size,), dtype),
        multiprocessors=multiprocessors,
    )  # fmt: skip
    assert_close("project", device.get(C), a.astype(np.float64) @ b.astype(np.float64))
    return device.launched[0], device.grids[0][1]


def launched(plan: gemm.Plan, turned: bool = False) -> tuple[Kernel, int]:
    """What :func:`multiply` is to have launched."""
    return gemm.kernel(plan.tile, np.dtype("float32"), turned, False, 1), plan.grid


def model(multiprocessors: int = 4) -> gemm.Plan:
    return gemm.plan(M, N, K, np.float32, 90, multiprocessors)


def test_products_obey_the_table(use: Use) -> None:
    assert multiply() == launched(model())
    use(products=[product_entry(other_plan())])
    assert multiply() == launched(other_plan())
    assert multiply(turned=True) == launched(model(), turned=True), "another product"


def test_the_table_knows_for_how_many_multiprocessors_was_planned(use: Use) -> None:
    use(products=[product_entry(other_plan(3), multiprocessors=3)])
    assert multiply(multiprocessors=3) == launched(other_plan(3))
    assert multiply() == launched(model())


@pytest.mark.parametrize(
    "foreign",
    [
        {"device": "NVIDIA H100 80GB HBM3"},
        {"kernels": "0123456789abcdef"},
        {"multiprocessors": 132},
        {"dtype": "float64"},
        {"tile": {"m": 48, "n": 48, "k": 32, "stages": 3, "blocks": 3, "warps": [2, 2, 1]}},
        {"tile": {**tuned.tile_fields(MIDDLE), "stages": 9}},
        {"grid": 77},
    ],
    ids=lambda foreign: "-".join(foreign),
)
def test_an_entry_that_does_not_fit_is_passed_over(foreign: Row, use: Use) -> None:
    use(products=[product_entry(other_plan(), **foreign)])
    assert gemm.plan(M, N, K, np.float32, 90, 4, device_name="emulator") == model()
    use(products=[product_entry(other_plan())])
    assert gemm.plan(M, N, K, np.float32, 90, 4, device_name="emulator") == other_plan()


def recur(op: str, H: int = 130, B: int = 2) -> tuple[str, Any]:
    """A recurrence in the emulator, held to float64: its kernel's name and the blocks."""
    require_emulator()
    device = Recorder()
    rng = np.random.default_rng(2)
    W = (rng.standard_normal((H, H)) * H**-0.5).astype(np.float32)
    z, h0 = (rng.standard_normal(s).astype(np.float32) for s in ((3, B, H), (B, H)))
    out = device.empty((3, B, H), np.float32)
    want, wide = np.empty((3, B, H)), W.astype(np.float64)
    on_z, on_W, on_h0 = (device.put(a) for a in (z, W, h0))
    if op == "recurrence_backward":
        h, back = np.tanh(z), np.zeros((B, H))
        for t in (2, 1, 0):
            want[t] = (z[t] + back) * (1 - h[t].astype(np.float64) ** 2)
            back = want[t] @ wide.T
        dh0 = device.empty((B, H), np.float32)
        recurrence.recurrence_backward(device, on_z, device.put(h), on_W, out, dh0)
    else:
        state = h0.astype(np.float64)
        for t in range(3):
            state = want[t] = np.tanh(z[t] + state @ wide)
        if op == "recurrence":
            recurrence.recurrence(device, on_z, on_W, on_h0, out)
        else:
            x = device.put(np.arange(3 * B, dtype=np.int32).reshape(3, B))
            rows, bias = device.put(z.reshape(-1, H)), device.put(np.zeros(H, np.float32))
            recurrence.recurrence_gathered(device, x, None, rows, bias, on_W, on_h0, out)
    assert_close(op.removesuffix("_gathered"), device.get(out), want)
    return device.grids[-1]


def recurrence_entry(**other: Any) -> Row:
    return {**HERE, "op": "recurrence", "B": 2, "H": 130, "plan": "cluster", **other}


def test_recurrences_obey_the_table(use: Use) -> None:
    for op in recurrence.OPS:
        assert recur(op) == (f"{op}_kernel", 2)
    use(recurrences=[recurrence_entry()])
    for op in ("recurrence", "recurrence_gathered"):
        assert recur(op) == (f"{op}_cluster_kernel", 8)
    assert recur("recurrence_backward") == ("recurrence_backward_kernel", 2)
    assert recur("recurrence", B=1) == ("recurrence_cluster_kernel", 4), "by the model"
    use(recurrences=[recurrence_entry(B=1, plan="block", op="recurrence_backward")])
    assert recur("recurrence_backward", B=1) == ("recurrence_backward_kernel", 1)


def test_a_recurrence_that_has_one_plan_keeps_it(use: Use) -> None:
    use(recurrences=[recurrence_entry(H=260, B=1, plan="block"), recurrence_entry(H=64)])
    assert recurrence.by_cluster(emulated(90), "recurrence", 1, 260)
    assert not recurrence.by_cluster(emulated(90), "recurrence", 2, 64)
    use(recurrences=[recurrence_entry(multiprocessors=3)])
    assert not recurrence.by_cluster(emulated(90, multiprocessors=3), "recurrence", 2, 130)


def without(entry: Row, name: str) -> Row:
    return {k: v for k, v in entry.items() if k != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a table of measured plans (FASTRNN_TUNED) in JSON"),
        ("[]", "with the lists products and recurrences, got []"),
        ('{"products": []}', 'with the lists products and recurrences, got {"products": []}'),
        ({"products": [7]}, "products[0]: expected an object, got 7"),
        (
            {"products": [without(product_entry(model()), "grid")]},
            "products[0]: expected grid of type int, got nothing",
        ),
        (
            {"products": [product_entry(model(), trans_a=0)]},
            "products[0]: expected trans_a of type bool, got 0",
        ),
        (
            {"products": [product_entry(model(), M="60")]},
            'products[0]: expected M of type int, got "60"',
        ),
        (
            {"products": [product_entry(model()), product_entry(model())]},
            "products[1]: a second entry for ('emulator', 4, 60, 70, 40, 'float32', False, False)",
        ),
        (
            {"recurrences": [recurrence_entry(), recurrence_entry(B=3, plan="grid")]},
            "recurrences[1]: expected plan to be block or cluster, got 'grid'",
        ),
        (
            {"recurrences": [recurrence_entry(op="gather")]},
            "recurrences[0]: expected op to be recurrence or recurrence_backward, got 'gather'",
        ),
    ],
)
def test_a_broken_table_is_refused(content: Any, message: str, use: Use) -> None:
    path = use(content) if isinstance(content, str) else use(**content)
    with pytest.raises(ValueError, match=r"table\.json") as raised:
        gemm.plan(M, N, K, np.float32, 90, 4, device_name="emulator")
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


def test_a_missing_table_is_refused(use: Use) -> None:
    use().unlink()
    with pytest.raises(ValueError, match=r"expected a table of measured plans .*No such file"):
        recurrence.by_cluster(emulated(90), "recurrence", 2, 130)


def test_which_table_is_read(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped one, unless another is named; none where the name is empty."""
    monkeypatch.setattr(tuned, "SHIPPED", use(products=[product_entry(other_plan())]))
    monkeypatch.delenv(tuned.VARIABLE)
    forget()
    assert len(tuned.table().products) == 1
    monkeypatch.setenv(tuned.VARIABLE, "")
    forget()
    assert tuned.table() == tuned.Table()


def test_the_shipped_table_changes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    forget()
    assert tuned.table() == tuned.Table()
    for dtype in ("float32", "float64"):
        for capability, count, name in ((90, 132, "NVIDIA H100 80GB HBM3"), (75, 40, "Tesla T4")):
            for shape in ((1120, 1027, 256), (256, 256, 1120), (1, 7, 0), (4096, 50_000, 1024)):
                expected = gemm.plan(*shape, dtype, capability, count)
                by_model = min(
                    (
                        p
                        for tile in gemm.tiles(capability, dtype)
                        for p in gemm.plans(tile, *shape, np.dtype(dtype).itemsize, count)
                    ),
                    key=lambda p: p.clocks,
                )
                assert expected == by_model
                for trans_a, trans_b in ((False, False), (False, True), (True, False)):
                    got = gemm.plan(
                        *shape, dtype, capability, count,
                        device_name=name, trans_a=trans_a, trans_b=trans_b,
                    )  # fmt: skip
                    assert got == expected


def test_the_shipped_table_is_installed() -> None:
    root = Path(__file__).resolve().parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert tuned.SHIPPED.name in settings["tool"]["setuptools"]["package-data"]["fastrnn.cuda"]
