"""What the launchers' plans are chosen by, measured: residency, recurrences, products, branches.

    python -m benchmarks.gpu.tuner RESULT.json > tuned.json

turns what :func:`tune` found, by itself or anywhere inside a larger record, into a table for
``FASTRNN_TUNED`` (see :mod:`fastrnn.cuda.tuned`). Every plan that is timed is first held to a
float64 product or recurrence: a wrong one gets no time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.backend import Dims
from fastrnn.backends.cupy_cuda import LD_STEP, CupyBackend
from fastrnn.bench import HEADLINE, format_seconds, markdown_table, relative_error, zipf_tokens
from fastrnn.bench.problems import MAX_ERROR
from fastrnn.cuda import gemm, project, recurrence
from fastrnn.cuda.cupy_device import source_digest
from fastrnn.cuda.device import Array, Device, Scratch, ceil_div
from fastrnn.cuda.tuned import RECURRENCES, tile_fields
from fastrnn.reference import init_params

Row = dict[str, Any]
Save = Callable[[dict[str, Any]], None]
Clock = Callable[[Callable[[], Any]], float]

PRODUCTS = ("project", "dh", "dW_hq", "dW_hh")
SECTIONS = ("residency", "gap", "recurrence", "step", "product")
"""In the order in which they are measured; ``only`` takes these and :data:`PRODUCTS`."""

MARGIN = 1.03
"""A plan goes into the table where the model's choice takes more than so many times as long."""
CLOCKS_PER_SECOND = 1.98e9
"""The boost clock of an H100 or H200 (SXM), which turns a model's clocks into seconds."""
BATCHES = 8
"""Batches of the training step's corpus."""
CHECKED_STEPS = 5
"""Time steps of a recurrence that are held to float64: the host takes longest for these."""
EXPECTED_CLUSTERS = {256: "60–66", 512: "15"}
"""Resident clusters by hidden size on an H100 of 132 multiprocessors."""
EXPECTED_GAP = 2e-6
FAST_PROJECT, SLOW_BACKWARD = 7e-6, 0.30e-6
"""Seconds of the product that gives the logits, and of a time step backward, that verdicts ask."""

_KEY = ("device", "multiprocessors", "capability", "kernels")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        dims: of the products and the training step.
        steps: the two values of T between which a recurrence's slope is taken.
        both: (H, B) at which a block and a cluster a row compete.
        clusters: (H, B) that only clusters can do.
        plans: products: so many a tile, the best by the model.
        launches: training steps in a turn. turns: their number.
    """

    dims: Dims
    steps: tuple[int, int]
    both: tuple[tuple[int, int], ...]
    clusters: tuple[tuple[int, int], ...]
    plans: int
    launches: int
    turns: int


FULL = Sizes(
    HEADLINE, (35, 350), ((256, 32), (256, 64), (256, 128)), ((512, 8), (512, 32)), 6, 400, 5
)
TOY = Sizes(Dims(T=3, B=20, H=40, V=70), (2, 4), ((130, 1), (130, 2)), ((260, 1),), 2, 2, 1)


def tune(
    save: Save,
    backend: CupyBackend,
    clock: Clock,
    toy: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure what :data:`SECTIONS` lists.

    Args:
        save: called with the result so far after every row.
        clock: device seconds of one call, which it may run any number of times.
        toy: sizes for the emulator.
        only: sections or products; none: all.

    Returns:
        ``rows``, each with its section, the device, its multiprocessors and capability, the digest
        of the kernels, shape and dtype, and either what was measured or ``failed``, the error;
        ``seconds``, how long it took.

    Raises:
        ValueError: ``only`` has another word.
        Exception: what the device raises when it is lost after a row that failed.
    """
    known = (*SECTIONS, *PRODUCTS)
    if unknown := [word for word in only if word not in known]:
        raise ValueError(f"only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    tuner = _Tuner(save, backend, clock, TOY if toy else FULL, tuple(only) or SECTIONS)
    for section in SECTIONS:
        getattr(tuner, section)()
    return tuner.result


class _Tuner:
    """One run: where rows go, and what measures them."""

    def __init__(
        self, save: Save, backend: CupyBackend, clock: Clock, sizes: Sizes, only: tuple[str, ...]
    ) -> None:
        self.save, self.backend, self.clock = save, backend, clock
        self.sizes, self.only = sizes, only
        self.device = backend.device
        arch = self.device.arch
        where = (arch.name, arch.multiprocessors, arch.capability, source_digest())
        self.key = dict(zip(_KEY, where, strict=True))
        self.rng = np.random.default_rng(0)
        self.begin = time.perf_counter()
        self.result: dict[str, Any] = {"rows": []}

    def normal(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def row(self, section: str, about: Row, measure: Callable[[], Row]) -> bool:
        """Keep what was measured, or why it was not; whether it was."""
        row = {"section": section, **self.key, **about}
        try:
            row |= measure()
        except Exception as error:  # one plan that fails must not take the others' times along
            row["failed"] = f"{type(error).__name__}: {error}"[:500]
        self.result["rows"].append(row)
        self.result["seconds"] = round(time.perf_counter() - self.begin, 2)
        self.save(self.result)
        if "failed" in row:
            self.device.abandon()
            self.device.sync()  # raises where the context is lost: nothing more can be measured
        return "failed" not in row

    # --- sections ---

    def residency(self) -> None:
        if "residency" not in self.only:
            return
        for op, (H, blocks) in itertools.product(RECURRENCES, recurrence.CLUSTERS.items()):

            def measure(op: str = op, H: int = H) -> Row:
                return {"clusters": recurrence.resident_clusters(self.device, op, H)}

            about = {"what": op, "H": H, "cluster": blocks, "dtype": "float32"}
            self.row("residency", about, measure)

    def gap(self) -> None:
        """A kernel of one block that copies 128 bytes: what a node of a graph costs at least."""
        if "gap" not in self.only:
            return
        source, out = self.device.put(self.normal(1, 32)), self.device.empty((1, 32), np.float32)

        def pad() -> None:
            project.pad(self.device, source, 1, 32, 32, out)

        about = {"what": "node", "rows": 1, "columns": 32, "dtype": "float32"}
        self.row("gap", about, lambda: {"seconds": self.clock(pad)})

    def recurrence(self) -> None:
        if "recurrence" not in self.only:
            return
        hopper = self.device.arch.capability >= 90
        for H, B in self.sizes.both:
            self._recurrences(H, B, (True, False) if hopper else (False,))
        for H, B in self.sizes.clusters if hopper else ():
            self._recurrences(H, B, (True,))

    def _recurrences(self, H: int, B: int, plans: Sequence[bool]) -> None:
        """Forward and backward at one size, over two numbers of time steps."""
        device, steps = self.device, self.sizes.steps

        @functools.cache
        def case() -> _Recurrence:
            return _Recurrence(self, H, B)

        # Residency and the model's choice ask for compiled kernels, which may fail as well.
        def measure(op: str, clustered: bool) -> Row:
            row: Row = {
                "chosen": clustered == recurrence.by_cluster(device, op, B, H, measured=False)
            }
            if clustered and (resident := recurrence.resident_clusters(device, op, H)):
                row |= {"resident": resident, "waves": ceil_div(B, resident)}
            case().check(op, clustered)
            times = [self.clock(case().call(op, T, clustered)) for T in steps]
            step = (times[1] - times[0]) / (steps[1] - steps[0])
            return row | {"seconds": times, "step": step, "rest": times[0] - steps[0] * step}

        for op, clustered in itertools.product(RECURRENCES, plans):
            plan = "cluster" if clustered else "block"
            about = {"what": op, "plan": plan, "H": H, "B": B, "T": list(steps), "dtype": "float32"}
            self.row("recurrence", about, functools.partial(measure, op, clustered))

    def step(self) -> None:
        """The captured training step, and the same with its branches one after another."""
        if "step" not in self.only:
            return
        dims, n = self.sizes.dims, self.sizes.launches
        # Batches of an epoch, again and again: what becomes of the model does not matter.
        length = BATCHES * dims.T + 1
        tokens = zipf_tokens(self.rng, dims.B * length, dims.V)
        first = np.arange(n)[:, None] % BATCHES * dims.T + np.arange(dims.B) * length
        starts, params = first.astype(np.int32), init_params(dims.V, dims.H, 0)
        about = {**{name: getattr(dims, name) for name in "TBHV"}, "dtype": "float32"}
        for what, branches in (
            ("beside", contextlib.nullcontext()),
            ("in sequence", in_sequence(self.device)),
        ):

            def measure(branches: contextlib.AbstractContextManager[None] = branches) -> Row:
                workspace = self.backend.workspace(dims, tokens, params)

                def run() -> float:
                    begin = time.perf_counter()
                    self.backend.run_steps(workspace, starts, lr=1.0, max_norm=0.01, carry=True)
                    self.device.sync()
                    return (time.perf_counter() - begin) / n

                with branches:
                    run()  # captures
                    return {"seconds": statistics.median(run() for _ in range(self.sizes.turns))}

            self.row("step", {"what": what, **about}, measure)

    def product(self) -> None:
        wanted = PRODUCTS if "product" in self.only else [p for p in PRODUCTS if p in self.only]
        if not wanted:
            return
        arch = self.device.arch
        for product in _products(self, wanted):
            model = gemm.plan(*product.shape, np.float32, arch.capability, arch.multiprocessors)
            counters = gemm.new_counters(self.device)
            for plan in _plausible(model, product.shape, self.device, self.sizes.plans):
                about = {**product.about(plan), "chosen": plan == model}
                submit = functools.partial(product.submit, plan, counters)
                if not self.row("product", about, functools.partial(self._time, product, submit)):
                    self.device.fill_zero(counters)

    def _time(self, product: _Product, submit: Callable[[], None]) -> Row:
        product.check(submit)
        return {"seconds": self.clock(submit)}


def _plausible(
    model: gemm.Plan, shape: tuple[int, int, int], device: Device, most: int
) -> list[gemm.Plan]:
    """The model's choice first, then the best few of every tile."""
    arch, found = device.arch, [model]
    for tile in gemm.tiles(arch.capability, np.float32):
        ways = sorted(gemm.plans(tile, *shape, 4, arch.multiprocessors), key=lambda p: p.clocks)
        found += [plan for plan in ways[:most] if plan != model]
    return found


@contextlib.contextmanager
def in_sequence(device: Device) -> Iterator[None]:
    """What is submitted to the device's branches goes to the main line instead."""
    vars(device).update(branch=lambda name: contextlib.nullcontext(), join=lambda name: None)
    try:
        yield
    finally:
        del vars(device)["branch"], vars(device)["join"]


def _hold(what: str, got: NDArray[Any], want: NDArray[np.float64]) -> None:
    error = relative_error({what: got[None]}, [{what: want}])
    if not error <= MAX_ERROR["float32"]:
        raise ValueError(f"{what} is wrong: relative error {error:.1e}")


class _Recurrence:
    """The two passes at one H and B: operands, calls, and what the float64 recurrence gives."""

    def __init__(self, tuner: _Tuner, H: int, B: int) -> None:
        self.device, self.steps = tuner.device, tuner.sizes.steps
        few, many = self.steps
        self.checked = min(few, CHECKED_STEPS)
        self.host = {
            "z": tuner.normal(few, B, H, scale=0.5),
            "W_hh": tuner.normal(H, H, scale=H**-0.5),
            "h0": tuner.normal(B, H, scale=0.5),
            "dh": tuner.normal(few, B, H),
        }
        self.host["h"] = np.tanh(self.host["z"])
        # The many time steps are the few ones again and again.
        self.arrays = {
            name: self.device.put(np.resize(array, (many, B, H)) if array.ndim == 3 else array)
            for name, array in self.host.items()
        }
        self.out = self.device.empty((many, B, H), np.float32)
        self.dh0 = self.device.empty((B, H), np.float32)
        self.wanted = self.want()

    def call(self, op: str, T: int, clustered: bool) -> Callable[[], None]:
        a = self.arrays
        if op == "recurrence":
            return lambda: recurrence.recurrence(
                self.device, a["z"][:T], a["W_hh"], a["h0"], self.out[:T], clustered=clustered
            )
        return lambda: recurrence.recurrence_backward(
            self.device, a["dh"][:T], a["h"][:T], a["W_hh"], self.out[:T], self.dh0,
            clustered=clustered,
        )  # fmt: skip

    def check(self, op: str, clustered: bool) -> None:
        """Hold the first time steps to float64."""
        T = self.checked
        self.device.fill_zero(self.out)
        self.call(op, T, clustered)()
        _hold(op, self.device.get(self.out[:T]), self.wanted[op])

    def want(self) -> dict[str, NDArray[np.float64]]:
        """What the first time steps give alone, by op."""
        names = ("z", "W_hh", "h0", "dh", "h")
        z, W, state, dh, given = (self.host[name].astype(np.float64) for name in names)
        T = self.checked
        h, dz = np.empty((T, *state.shape)), np.empty((T, *state.shape))
        back = np.zeros_like(state)
        for t in range(T):
            state = h[t] = np.tanh(z[t] + state @ W)
        for t in reversed(range(T)):
            dz[t] = (dh[t] + back) * (1 - given[t] ** 2)
            back = dz[t] @ W.T
        return {"recurrence": h, "recurrence_backward": dz}


@dataclass(frozen=True)
class _Product:
    """One of the training step's products.

    Attributes:
        shape: M, N, K.
        submit: given a plan and the counters. out: where the result is, in rows of ``ldc``.
        want: the result in float64.
    """

    name: str
    shape: tuple[int, int, int]
    trans_a: bool
    trans_b: bool
    device: Device
    submit: Callable[[gemm.Plan, Array], None]
    out: Array
    want: NDArray[np.float64]

    def about(self, plan: gemm.Plan) -> Row:
        M, N, K = self.shape
        return {
            "what": self.name, "M": M, "N": N, "K": K, "dtype": "float32",
            "trans_a": self.trans_a, "trans_b": self.trans_b,
            "tile": tile_fields(plan.tile), "grid": plan.grid, "whole": plan.whole,
            "quota": plan.quota, "extra": plan.extra, "predicted": plan.clocks / CLOCKS_PER_SECOND,
        }  # fmt: skip

    def check(self, submit: Callable[[], None]) -> None:
        """Hold what ``submit`` gives to float64."""
        self.device.fill_zero(self.out)
        submit()
        _hold(self.name, self.device.get(self.out)[:, : self.shape[1]], self.want)


def _products(tuner: _Tuner, wanted: Iterable[str]) -> Iterator[_Product]:
    """The products as the captured step submits them: the same leading dimensions and epilogues."""
    device, dims = tuner.device, tuner.sizes.dims
    (B, H, V), rows, ld = (
        (dims.B, dims.H, dims.V),
        dims.T * dims.B,
        ceil_div(dims.V, LD_STEP) * LD_STEP,
    )
    host = {
        "h": tuner.normal(rows, H),
        "h0": tuner.normal(B, H),
        "dz": tuner.normal(rows, H),
        "logits": tuner.normal(rows, ld),
        "W_hq": tuner.normal(H, ld),
        "b_q": tuner.normal(V),
    }
    on = {name: device.put(array) for name, array in host.items()}
    wide = {name: array.astype(np.float64) for name, array in host.items()}
    h, logits, W_hq = wide["h"], wide["logits"][:, :V], wide["W_hq"][:, :V]
    before = np.concatenate([wide["h0"], h[:-B]])
    bias = {"epilogue": gemm.BIAS, "x": on["b_q"]}
    head = {"head": on["h0"], "lead": B}
    # A, B, M, N, K, ldc, trans_a, trans_b, the rest, what it gives
    specifications: dict[str, tuple[Any, ...]] = {
        "project": (
            "h", "W_hq", rows, V, H, ld, False, False, bias, lambda: h @ W_hq + wide["b_q"]
        ),
        "dh": ("logits", "W_hq", rows, H, V, H, False, True, {}, lambda: logits @ W_hq.T),
        "dW_hq": ("h", "logits", H, V, rows, V, True, False, {}, lambda: h.T @ logits),
        "dW_hh": ("h", "dz", H, H, rows, H, True, False, head, lambda: before.T @ wide["dz"]),
    }  # fmt: skip
    scratch = _scratch(device)
    for name in wanted:
        a, b, M, N, K, ldc, trans_a, trans_b, rest, want = specifications[name]
        C = device.empty((M, ldc), np.float32)

        def submit(
            plan: gemm.Plan, counters: Array, a: str = a, b: str = b, C: Array = C,
            shape: tuple[int, int, int] = (M, N, K), ta: bool = trans_a, tb: bool = trans_b,
            rest: Mapping[str, Any] = rest,
        ) -> None:  # fmt: skip
            gemm.gemm(
                device, on[a], on[b], C, *shape,
                lda=on[a].shape[1], ldb=on[b].shape[1], ldc=C.shape[1], trans_a=ta, trans_b=tb,
                scratch=scratch, counters=counters, chosen=plan, **rest,
            )  # fmt: skip

        yield _Product(name, (M, N, K), trans_a, trans_b, device, submit, C, want())


def _scratch(device: Device) -> Scratch:
    """Buffers that grow, and otherwise stay: nothing is allocated while a call is captured."""
    held: dict[str, Array] = {}

    def get(name: str, size: int, dtype: Any) -> Array:
        if name not in held or held[name].size < size:
            held[name] = device.empty((size,), dtype)
        return held[name][:size]

    return get


# --- The report ----------------------------------------------------------------------------------


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result as Markdown: a table a section, the failures, and what the figures decide."""
    rows = result["rows"]
    found: list[str] = []
    for section, title, table in (
        ("residency", "Clusters that are resident at once", _residency_table),
        ("gap", "A node of a graph", _gap_table),
        ("recurrence", "Recurrence, a block or a cluster a row", _recurrence_table),
        ("step", "The captured training step", _step_table),
        ("product", "Plans of the products", _product_table),
    ):
        if cells := table([r for r in _good(rows) if r["section"] == section]):
            found += [f"### {title}", "", *markdown_table(cells), ""]
    failed = [
        f"- {r['section']} {r['what']}{_detail(r)}: {r['failed']}" for r in rows if "failed" in r
    ]
    if failed:
        found += ["### Failed", "", *failed, ""]
    found += ["### What follows", "", *(f"- {line}" for line in verdicts(result))]
    if rows:
        where = rows[0]
        found += [
            "",
            f"{where['device']}, {where['multiprocessors']} multiprocessors, kernels "
            f"{where['kernels']}; {result.get('seconds', 0):.0f} s.",
        ]
    return found


def _good(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "failed" not in row]


def _detail(row: Row) -> str:
    if row["section"] == "product":
        return f" {_name(row)}"
    if row["section"] == "recurrence":
        return f" by {row['plan']} H={row['H']} B={row['B']}"
    return f" H={row['H']}" if "H" in row else ""


def _name(row: Row) -> str:
    """A plan of a product in few words."""
    tile = row["tile"]
    dealt = f", {row['quota']} units each" if row["quota"] else ""
    return f"{tile['m']}x{tile['n']}x{tile['k']} on {row['grid']} blocks{dealt}"


Cells = list[tuple[str, ...]]


def _residency_table(rows: list[Row]) -> Cells:
    cells: Cells = [("kernel", "H", "blocks a cluster", "clusters", "expected on an H100")]
    for r in rows:
        expected = EXPECTED_CLUSTERS[r["H"]]
        cells.append((r["what"], str(r["H"]), str(r["cluster"]), str(r["clusters"]), expected))
    return cells if rows else []


def _gap_table(rows: list[Row]) -> Cells:
    cells: Cells = [("", "time", "expected")]
    cells += [
        ("a kernel of one block, and the edge", _time(r["seconds"]), _time(EXPECTED_GAP))
        for r in rows
    ]
    return cells if rows else []


def _recurrence_table(rows: list[Row]) -> Cells:
    cells: Cells = [("op", "H", "B", "plan", "waves", "a step", "the rest", "whole", "")]
    for r in rows:
        whole = ", ".join(f"T={T}: {_time(s)}" for T, s in zip(r["T"], r["seconds"], strict=True))
        cells.append(
            (
                r["what"], str(r["H"]), str(r["B"]), r["plan"], str(r.get("waves", "–")),
                f"{r['step'] * 1e6:.3f} µs", f"{r['rest'] * 1e6:.2f} µs", whole, _mark(r),
            )
        )  # fmt: skip
    return cells if rows else []


def _step_table(rows: list[Row]) -> Cells:
    titles = {"beside": "as it is", "in sequence": "nothing beside anything"}
    cells: Cells = [("branches", "time"), *((titles[r["what"]], _time(r["seconds"])) for r in rows)]
    return cells if rows else []


def _product_table(rows: list[Row]) -> Cells:
    cells: Cells = [("product", "M x N x K", "plan", "time", "model", "by model", "")]
    for _, plans in _groups(rows):
        for r in plans:
            shape = f"{r['M']} x {r['N']} x {r['K']}"
            ratio = f"{r['seconds'] / r['predicted']:.2f}"
            cells.append(
                (
                    r["what"], shape, _name(r), _time(r["seconds"]), _time(r["predicted"]), ratio,
                    _mark(r),
                )
            )  # fmt: skip
    return cells if rows else []


def _time(seconds: float) -> str:
    return format_seconds(seconds) if seconds > 0 else "–"


def _mark(row: Row) -> str:
    return "chosen" if row["chosen"] else ""


_SAME = (*_KEY, "what", "M", "N", "K", "B", "H", "dtype", "trans_a", "trans_b")


def _groups(rows: Iterable[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Rows of one product or recurrence on one device, fastest first; and what they share."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in _SAME), []).append(row)
    for key, group in found.items():
        shared = {n: v for n, v in zip(_SAME, key, strict=True) if v is not None}
        yield shared, sorted(group, key=_seconds)


def _seconds(row: Row) -> float:
    """Of a call; of a recurrence, at the fewer time steps."""
    seconds = row["seconds"]
    return float(seconds[0] if isinstance(seconds, list) else seconds)


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """What the figures decide, each line with the figure that it rests on."""
    rows = _good(result["rows"])

    def of(section: str, **wanted: Any) -> list[Row]:
        chosen = (r for r in rows if r["section"] == section)
        return [r for r in chosen if all(r.get(k) == v for k, v in wanted.items())]

    found = []
    for H, expected in EXPECTED_CLUSTERS.items():
        if counts := sorted({r["clusters"] for r in of("residency", H=H)}):
            count = "/".join(map(str, counts))
            found.append(f"H={H}: {count} clusters resident, {expected} expected on an H100.")
    found += [
        f"A node of a graph costs {_time(r['seconds'])}, {_time(EXPECTED_GAP)} expected."
        for r in of("gap")
    ]
    if logits := sorted(of("product", what="project"), key=_seconds):
        best, limit = logits[0], _time(FAST_PROJECT)
        figure = f"project takes {_time(best['seconds'])} ({_name(best)})"
        found.append(
            f"{figure}, at most {limit}: HMMA issues nearer every 4 cycles, and products of fp16 "
            "pairs gain less than expected."
            if best["seconds"] <= FAST_PROJECT
            else f"{figure}, more than {limit}: products of fp16 pairs gain what was expected."
        )
    for r in of("recurrence", what="recurrence_backward", plan="cluster", H=256, B=32):
        limit = f"{SLOW_BACKWARD * 1e6:.2f}"
        figure = f"A step backward takes {r['step'] * 1e6:.3f} µs (H=256, B=32)"
        found.append(
            f"{figure}, more than {limit}: DSMEM takes more than 250 cycles. Products that trail "
            "and lead the recurrence come before taking scalar work out of its step."
            if r["step"] > SLOW_BACKWARD
            else f"{figure}, at most {limit}: DSMEM takes no more than 250 cycles. Scalar work out "
            "of the step pays."
        )
    for shared, plans in _groups(of("recurrence")):
        by = {r["plan"]: r for r in plans}
        if len(by) == 2:
            found.append(_block_or_cluster(shared, by))
    for shared, plans in _groups(of("product")):
        model = next((r for r in plans if r["chosen"]), None)
        if model is not None:
            best, times = plans[0], (_time(plans[0]["seconds"]), _time(model["seconds"]))
            found.append(
                f"{shared['what']}: {_name(best)} takes {times[0]}, the model's {_name(model)} "
                f"{times[1]}: take the first."
                if _faster(best, model)
                else f"{shared['what']}: the model's {_name(model)} takes {times[1]}, the best "
                f"plan {times[0]}: keep it."
            )
    steps = {r["what"]: r["seconds"] for r in of("step")}
    if len(steps) == 2:
        gain = steps["in sequence"] - steps["beside"]
        found.append(
            f"The step takes {_time(steps['beside'])}, {_time(steps['in sequence'])} with its "
            "branches in sequence: "
            + (f"they gain {_time(gain)}." if gain > 0 else "they gain nothing.")
        )
    return found


def _block_or_cluster(shared: Row, by: Mapping[str, Row]) -> str:
    block, cluster = by["block"], by["cluster"]
    label = f"{shared['what']} H={shared['H']} B={shared['B']}"
    figures = (
        f"block {block['step'] * 1e6:.3f} µs a step, cluster {cluster['step'] * 1e6:.3f} in "
        f"{cluster['waves']} waves; whole {_time(_seconds(block))} and {_time(_seconds(cluster))}"
    )
    chosen, other = (block, cluster) if block["chosen"] else (cluster, block)
    if _faster(other, chosen):
        return f"{label}: {figures}: switch to the {other['plan']} plan."
    return f"{label}: {figures}: keep the {chosen['plan']} plan."


def _faster(row: Row, chosen: Row) -> bool:
    """Whether a plan beats the chosen one by the margin, at every number of time steps."""
    pair = [
        r["seconds"] if isinstance(r["seconds"], list) else [r["seconds"]] for r in (row, chosen)
    ]
    return all(MARGIN * a < b for a, b in zip(*pair, strict=True))


# --- The table -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> dict[str, list[Row]]:
    """A table for :mod:`fastrnn.cuda.tuned`: the plans that beat the model's by :data:`MARGIN`."""
    rows = _good(result["rows"])
    found: dict[str, list[Row]] = {"products": [], "recurrences": []}
    for section, name in (("product", "products"), ("recurrence", "recurrences")):
        for shared, plans in _groups(r for r in rows if r["section"] == section):
            model = next((r for r in plans if r["chosen"]), None)
            if model is None or not _faster(plans[0], model):
                continue
            entry = {k: v for k, v in shared.items() if k not in ("what", "capability")}
            if name == "products":
                entry |= {k: plans[0][k] for k in ("tile", "grid")}
                entry |= {"note": shared["what"]}
            else:
                entry |= {"op": shared["what"], "plan": plans[0]["plan"]}
            entry |= {"seconds": _seconds(plans[0]), "model's": _seconds(model)}
            found[name].append(entry)
    return found


def _rows(record: Any) -> Iterator[Row]:
    """Every row of :func:`tune` in a record, however deep."""
    if isinstance(record, dict):
        if {"section", *_KEY} <= record.keys():
            yield record
            return
        record = list(record.values())
    if isinstance(record, list):
        for part in record:
            yield from _rows(part)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tuner", description=__doc__)
    parser.add_argument("result", type=Path, help="what a run measured, in JSON")
    options = parser.parse_args(arguments)
    rows = list(_rows(json.loads(options.result.read_text(encoding="utf-8"))))
    if not rows:
        print(f"{options.result}: expected rows of the tuner, found none", file=sys.stderr)
        return 2
    found = table({"rows": rows})
    lists = (
        f' "{name}": [{",".join(chr(10) + "  " + json.dumps(entry) for entry in entries)}]'
        for name, entries in found.items()
    )
    print("{\n" + ",\n".join(lists) + "\n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
