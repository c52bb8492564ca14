"""The tuner, with the emulator in the GPU's place, and the launchers' use of what it measures."""

from __future__ import annotations

import copy
import json
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import tuner
from benchmarks.gpu.tuner import PRODUCTS, SECTIONS, lines, table, tune, verdicts
from fastrnn.backends.cupy_cuda import CupyBackend
from fastrnn.cuda import gemm, recurrence, tuned
from fastrnn.cuda.cupy_device import source_digest
from fastrnn.cuda.device import Kernel
from tests.cuda_support import emulated, require_emulator
from tests.emulated_device import EmulatedDevice
from tests.tolerances import assert_close

Row = dict[str, Any]


def host_clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def tune_on(device: EmulatedDevice, *only: str) -> list[Row]:
    """The rows of a run at toy sizes."""
    rows: list[Row] = tune(lambda _: None, CupyBackend(device), host_clock, True, only)["rows"]
    return rows


# --- measuring -----------------------------------------------------------------------------------


def test_every_section_is_measured_and_saved_row_by_row() -> None:
    saved: list[Row] = []
    backend = CupyBackend(emulated(90))
    result = tune(lambda r: saved.append(copy.deepcopy(r)), backend, host_clock, toy=True)
    rows = result["rows"]
    assert [len(r["rows"]) for r in saved] == list(range(1, len(rows) + 1))
    assert saved[-1] == json.loads(json.dumps(result)), "plain JSON"
    assert {r["section"] for r in rows} == set(SECTIONS)
    assert not [r for r in rows if "failed" in r]
    for r in rows:
        where = (r["device"], r["multiprocessors"], r["capability"], r["kernels"])
        assert where == ("emulator", 4, 90, source_digest())
        assert r["dtype"] == "float32"
    by = {s: [r for r in rows if r["section"] == s] for s in SECTIONS}
    assert [(r["what"], r["H"], r["clusters"]) for r in by["residency"]] == [
        ("recurrence", 256, 1), ("recurrence", 512, 0),
        ("recurrence_backward", 256, 1), ("recurrence_backward", 512, 0),
    ]  # fmt: skip
    seen = {(r["what"], r["plan"], r["H"], r["B"]) for r in by["recurrence"]}
    assert seen == {
        (op, plan, H, B)
        for op in ("recurrence", "recurrence_backward")
        for plan, H, B in (
            ("block", 130, 1), ("cluster", 130, 1), ("block", 130, 2), ("cluster", 130, 2),
            ("cluster", 260, 1),
        )
    }  # fmt: skip
    for r in by["recurrence"]:
        assert r["step"] == (r["seconds"][1] - r["seconds"][0]) / (r["T"][1] - r["T"][0])
        assert r["rest"] + r["T"][0] * r["step"] == pytest.approx(r["seconds"][0])
    assert [r["what"] for r in by["step"]] == ["beside", "in sequence"]
    for name, trans in zip(
        PRODUCTS, ((False, False), (False, True), (True, False), (True, False)), strict=True
    ):
        plans = [r for r in by["product"] if r["what"] == name]
        assert {(r["trans_a"], r["trans_b"]) for r in plans} == {trans}
        assert {r["tile"]["m"] for r in plans} == {t.m for t in gemm.TENSOR_TILES}
        assert [r["chosen"] for r in plans] == [True] + [False] * (len(plans) - 1)
        assert all(r["seconds"] > 0 for r in plans)
        assert all(r["predicted"] > 0 for r in plans)
    text = "\n".join(lines(result))
    for heading in ("Clusters", "A node", "Recurrence", "The captured", "Plans", "What follows"):
        assert f"### {heading}" in text


class Broken(EmulatedDevice):
    """Refuses the products of the largest tile, or spoils them."""

    spoil = False

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        large = kernel.file == "gemm" and dict(kernel.defines)["TILE_M"] == 128
        if large and not self.spoil:
            raise RuntimeError("too many resources requested for launch")
        super().launch(kernel, grid, args)
        if large:
            args[3][0, 0] += 1


@pytest.mark.parametrize("spoil", [False, True])
def test_a_plan_that_fails_or_is_wrong_costs_only_its_row(spoil: bool) -> None:
    require_emulator()
    device = Broken()
    device.spoil = spoil
    rows = tune_on(device, "project", "dW_hh")
    failed = [r for r in rows if "failed" in r]
    reason = "project is wrong: relative error" if spoil else "RuntimeError: too many resources"
    assert reason in failed[0]["failed"]
    assert {(r["what"], r["tile"]["m"]) for r in failed} == {("project", 128), ("dW_hh", 128)}
    assert {r["tile"]["m"] for r in rows if "seconds" in r} == {32, 64}
    text = "\n".join(lines({"rows": rows}))
    assert "- product project 128x128x16 on 1 blocks: " in text


def test_nothing_more_is_measured_on_a_device_that_is_lost() -> None:
    class Lost(Broken):
        def sync(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    require_emulator()
    saved: list[int] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(
            lambda r: saved.append(sum("failed" in row for row in r["rows"])),
            CupyBackend(Lost()), host_clock, True, ("project",),
        )  # fmt: skip
    assert saved[-1] == 1


def test_a_kernel_that_does_not_compile_costs_only_its_rows() -> None:
    class Uncompiled(EmulatedDevice):
        def active_clusters(self, kernel: Kernel) -> int:
            raise RuntimeError("recurrence_cluster.cu(7): error")

    require_emulator()
    rows = tune_on(Uncompiled(), "residency", "gap", "recurrence")
    assert {r["section"] for r in rows if "failed" in r} == {"residency", "recurrence"}
    assert {r["section"] for r in rows if "failed" not in r} == {"gap"}
    text = "\n".join(lines({"rows": rows}))
    assert "- recurrence recurrence_backward by cluster H=130 B=1: RuntimeError: rec" in text
    assert "- residency recurrence H=512: RuntimeError: rec" in text


def test_only_some_are_measured() -> None:
    rows = tune_on(emulated(90), "residency", "dh")
    assert {r["what"] for r in rows} == {"recurrence", "recurrence_backward", "dh"}
    with pytest.raises(ValueError, match=r"only: expected some of residency, .*, got residence"):
        tune_on(emulated(90), "residence")


def test_a_gpu_without_clusters_has_rows_of_blocks() -> None:
    rows = tune_on(emulated(80), "residency", "recurrence")
    assert {r["plan"] for r in rows if r["section"] == "recurrence"} == {"block"}
    assert {r["clusters"] for r in rows if r["section"] == "residency"} == {0}
    assert not [r for r in rows if "failed" in r]
    assert all(r["chosen"] for r in rows if r["section"] == "recurrence")


def test_the_step_is_timed_with_and_without_branches() -> None:
    class Counting(EmulatedDevice):
        entered = 0

        def branch(self, name: str) -> Any:
            self.entered += 1
            return super().branch(name)

    require_emulator()
    device, entered = Counting(), []
    tune(lambda _: entered.append(device.entered), CupyBackend(device), host_clock, True, ("step",))
    assert entered[0] > 0
    assert entered[1] == entered[0]
    with device.branch("again"):
        pass
    assert device.entered == entered[0] + 1, "branches are as they were"


def test_what_the_headline_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred captures and a dozen modules: with what each costs on a GPU, half a minute."""

    class Silent(EmulatedDevice):
        def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
            assert kernel.runs_on(self.arch.capability)
            self.launched.append(kernel)

    require_emulator()
    device, clocks = Silent(90, 132), [0]

    def clock(call: Callable[[], Any]) -> float:
        clocks[0] += 1
        call()
        return 1e-5

    monkeypatch.setattr(tuner, "_hold", lambda *arguments: None)
    only = [section for section in SECTIONS if section != "step"]
    result = tune(lambda _: None, CupyBackend(device), clock, False, only)
    rows = result["rows"]
    assert not [r for r in rows if "failed" in r]
    plans = [r for r in rows if r["section"] == "product"]
    assert len(plans) == len({(r["what"], str(r["tile"]), r["grid"]) for r in plans})
    chosen = {r["what"]: r for r in plans if r["chosen"]}
    assert chosen.keys() == set(PRODUCTS)
    assert chosen["project"]["grid"] == 306
    assert clocks[0] <= 110
    assert len({(k.file, k.defines) for k in device.launched}) <= 13


# --- what follows from the figures ---------------------------------------------------------------

KEY: Row = {
    "device": "NVIDIA H100 80GB HBM3", "multiprocessors": 132, "capability": 90,
    "kernels": "0123456789abcdef", "dtype": "float32",
}  # fmt: skip


def product_row(tile: gemm.Tile, seconds: float, chosen: bool = False, **other: Any) -> Row:
    return {
        "section": "product", **KEY, "what": "project", "M": 1120, "N": 1027, "K": 256,
        "trans_a": False, "trans_b": False, "tile": tuned.tile_fields(tile), "grid": 306,
        "whole": 306, "quota": 0, "extra": 0, "predicted": 1e-5, "chosen": chosen,
        "seconds": seconds, **other,
    }  # fmt: skip


def recurrence_row(plan: str, short: float, long: float, chosen: bool, **other: Any) -> Row:
    step = (long - short) / 315
    return {
        "section": "recurrence", **KEY, "what": "recurrence_backward", "plan": plan, "H": 256,
        "B": 32, "T": [35, 350], "seconds": [short, long], "step": step,
        "rest": short - 35 * step, "chosen": chosen, "waves": 1, **other,
    }  # fmt: skip


LARGE, MIDDLE, SMALL = gemm.TENSOR_TILES


def said(rows: list[Row], about: str) -> str:
    found = [line for line in verdicts({"rows": rows}) if line.startswith(about)]
    assert len(found) == 1, found
    return found[0]


def test_the_rules() -> None:
    slow, fast = product_row(MIDDLE, 10.3e-6, True), product_row(SMALL, 6.9e-6)
    assert "10.3 µs (64x64x32 on 306 blocks), more than 7.00 µs" in said([slow], "project takes")
    assert "gain what was expected" in said([slow], "project takes")
    assert "6.90 µs (32x64x32 on 306 blocks), at most 7.00 µs" in said(
        [slow, fast], "project takes"
    )
    assert "gain less" in said([slow, fast], "project takes")
    assert said([slow], "project: ").endswith("keep it.")
    assert said([slow, fast], "project: ").endswith("take the first.")
    assert said([slow, {**fast, "failed": "wrong"}], "project: ").endswith("keep it.")

    quick = recurrence_row("cluster", 10e-6, 10e-6 + 315 * 0.25e-6, True)
    slack = recurrence_row("cluster", 12e-6, 12e-6 + 315 * 0.31e-6, True)
    assert "0.250 µs (H=256, B=32), at most 0.30" in said([quick], "A step backward")
    assert "0.310 µs (H=256, B=32), more than 0.30" in said([slack], "A step backward")
    assert "DSMEM takes more than 250 cycles" in said([slack], "A step backward")

    block = recurrence_row("block", 9e-6, 80e-6, False)
    assert said([slack, block], "recurrence_backward H=256").endswith("switch to the block plan.")
    assert said([quick, {**block, "seconds": [9e-6, 90e-6]}], "recurrence_backward H=256").endswith(
        "keep the cluster plan."
    )

    node = {"section": "gap", **KEY, "what": "node", "seconds": 1.4e-6}
    assert said([node], "A node") == "A node of a graph costs 1.40 µs, 2.00 µs expected."
    resident = {"section": "residency", **KEY, "what": "recurrence", "H": 512, "clusters": 14}
    assert said([resident], "H=512") == "H=512: 14 clusters resident, 15 expected on an H100."
    steps = [
        {"section": "step", **KEY, "what": "beside", "seconds": 73e-6},
        {"section": "step", **KEY, "what": "in sequence", "seconds": 85e-6},
    ]
    assert "they gain 12.0 µs" in said(steps, "The step takes 73.0 µs, 85.0 µs with")
    assert verdicts({"rows": []}) == []


def test_the_table_has_what_beats_the_model_by_more_than_the_margin() -> None:
    model = product_row(MIDDLE, 10e-6, True)
    beside: Row = {"what": "dW_hq", "M": 256, "N": 1027, "K": 1120, "trans_a": True}
    rows = [
        model, product_row(SMALL, 9.8e-6), product_row(LARGE, 9.75e-6),
        product_row(MIDDLE, 13e-6, True, **beside), product_row(SMALL, 9e-6, grid=264, **beside),
        product_row(LARGE, 1e-6, failed="wrong", **beside),
        recurrence_row("block", 9e-6, 80e-6, False), recurrence_row("cluster", 10e-6, 90e-6, True),
        # Faster over few steps only.
        recurrence_row("block", 9e-6, 90e-6, False, B=64),
        recurrence_row("cluster", 10e-6, 80e-6, True, B=64),
        # Nothing to compare with.
        product_row(SMALL, 1e-6, what="dh", trans_b=True),
    ]  # fmt: skip
    found = table({"rows": rows})
    (entry,), (recurrent,) = found["products"], found["recurrences"]
    where = {k: KEY[k] for k in ("device", "multiprocessors", "kernels")}
    assert where.items() <= entry.items()
    assert (entry["M"], entry["N"], entry["K"]) == (256, 1027, 1120)
    assert (entry["trans_a"], entry["trans_b"], entry["dtype"]) == (True, False, "float32")
    assert (entry["tile"], entry["grid"]) == (tuned.tile_fields(SMALL), 264)
    assert where.items() <= recurrent.items()
    assert [recurrent[k] for k in ("op", "H", "B", "plan")] == [
        "recurrence_backward", 256, 32, "block",
    ]  # fmt: skip
    # Just beyond the margin.
    entries = table({"rows": [model, product_row(SMALL, 10e-6 / 1.031)]})["products"]
    assert [e["tile"]["m"] for e in entries] == [32]


def test_the_command_finds_rows_anywhere_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here: Row = {"kernels": source_digest()}
    rows = [product_row(MIDDLE, 10e-6, True, **here), product_row(SMALL, 8e-6, **here)]
    result, printed = tmp_path / "gpu.json", tmp_path / "tuned.json"
    result.write_text(json.dumps({"parts": [{"tuner": {"result": {"rows": rows}}}]}))
    assert tuner.main([str(result)]) == 0
    printed.write_text(capsys.readouterr().out)
    read = tuned.read(printed).product(
        KEY["device"], 132, 1120, 1027, 256, np.float32, False, False
    )
    assert read == (tuned.tile_fields(SMALL), 306)
    result.write_text("{}")
    assert tuner.main([str(result)]) == 2
    assert "expected rows of the tuner, found none" in capsys.readouterr().err


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


def test_the_shipped_table_changes_the_plans_that_it_measured_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    forget()
    shipped = tuned.table()
    for dtype in ("float32", "float64"):
        for capability, count, name in (
            (90, 132, "NVIDIA H100 80GB HBM3"), (90, 132, "NVIDIA H200"), (75, 40, "Tesla T4"),
        ):  # fmt: skip
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
                    measured = shipped.product(name, count, *shape, dtype, trans_a, trans_b)
                    if measured is None:
                        assert got == expected
                    else:
                        assert (tuned.tile_fields(got.tile), got.grid) == measured


def test_the_shipped_table_is_of_a_device() -> None:
    content = json.loads(tuned.SHIPPED.read_text(encoding="utf-8"))
    assert {entry["device"] for entry in content["products"]} <= {"NVIDIA H100 80GB HBM3"}
    tuned.read(tuned.SHIPPED)


def test_the_shipped_table_is_installed() -> None:
    root = Path(__file__).resolve().parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert tuned.SHIPPED.name in settings["tool"]["setuptools"]["package-data"]["fastrnn.cuda"]
