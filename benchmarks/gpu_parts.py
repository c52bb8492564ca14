"""The parts of ``python -m benchmarks.gpu`` that are written in Python, and their tables.

    python -m benchmarks.gpu_parts PART RESULT.json [--emulate]

A part measures, writes its JSON after every measurement, and so loses nothing when it is stopped.
Times are the device's: a call is captured as a graph many times over, and events stand before and
after the replay. With ``--emulate`` a host clock stands around one call in the emulator.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.op_cases import OPS, OpCase
from fastrnn.backend import (
    GPU_BACKENDS,
    Backend,
    BackendUnavailableError,
    Dims,
    available_backends,
    open_backend,
)
from fastrnn.bench import (
    HEADLINE,
    SIZES,
    BenchResult,
    format_seconds,
    make_problem,
    markdown_table,
    run_bench,
    work,
)
from fastrnn.decoding import Decoding
from fastrnn.reference import PARAM_NAMES

LARGE: dict[str, Dims] = {
    "gather": Dims(T=2048, B=32, H=1024, V=50_000),
    "gather_backward": Dims(T=2048, B=32, H=1024, V=50_000),
    "cross_entropy": Dims(T=256, B=32, H=1024, V=50_000),
    "project": Dims(T=128, B=32, H=1024, V=50_000),
    "project_backward": Dims(T=128, B=32, H=1024, V=50_000),
    "clip_by_global_norm": Dims(T=1, B=1, H=1024, V=48_300),
    "sgd": Dims(T=1, B=1, H=1024, V=48_300),
}
"""Sizes that do not fit in a cache; 100 million parameters for the last two."""

RECURRENCES = ("B1", "B256", "H64", "H512", "H1024", "T512")
COPY_BYTES = 1 << 30
TOY = Dims(T=3, B=2, H=16, V=31)

Save = Callable[[dict[str, Any]], None]


# --- Clocks ------------------------------------------------------------------------------------


def seconds(backend: Backend, call: Callable[[], Any], least: float = 2e-3) -> float:
    """Device time of one call: the median over seven replays of a graph of many."""
    if _emulated(backend):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    call()
    backend.sync()
    once = _replay(backend, call, 1)
    once()
    repeats = int(min(512, max(1, least / max(once(), 1e-7))))
    many = _replay(backend, call, repeats)
    many()
    return statistics.median(many() for _ in range(7)) / repeats


def _replay(backend: Backend, call: Callable[[], Any], repeats: int) -> Callable[[], float]:
    """Replay ``repeats`` calls; seconds between two events around them."""

    def submit() -> None:
        for _ in range(repeats):
            call()

    if backend.name == "cupy":
        cupy = sys.modules["cupy"]
        graph = backend.device.capture(submit)  # type: ignore[attr-defined]

        def run() -> float:
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            _keep_busy(cupy.cuda.get_current_stream().ptr)
            begin.record()
            graph.launch()
            end.record()
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3

        return run
    from fastrnn.backends.numba_cuda import Graph as NumbaGraph
    from fastrnn.backends.numba_cuda import maintained_cuda

    cuda = maintained_cuda()
    stream = backend.stream  # type: ignore[attr-defined]
    recorded = NumbaGraph(stream)
    with cuda.defer_cleanup(), recorded.capture():
        submit()

    def run_numba() -> float:
        begin, end = cuda.event(), cuda.event()
        _keep_busy(int(stream))
        begin.record(stream)
        recorded.launch()
        end.record(stream)
        end.synchronize()
        return float(cuda.event_elapsed_time(begin, end)) * 1e-3

    return run_numba


SPIN = """
extern "C" __global__ void spin(long long clocks) {
    const long long begin = clock64();
    while (clock64() - begin < clocks) {}
}
"""
SPIN_CLOCKS = 200_000
"""About a tenth of a millisecond: longer than the host takes to launch a graph."""


@functools.cache
def _spin() -> Any:
    return sys.modules["cupy"].RawKernel(SPIN, "spin")


def _keep_busy(stream: int) -> None:
    """Give the device something to do while the host submits what is timed.

    On an idle device the first event is over before the host has launched the graph, and the time
    that the launch takes would be in the figure. (Without CuPy it is.)
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        with cupy.cuda.ExternalStream(stream):
            _spin()((1,), (1,), (np.int64(SPIN_CLOCKS),))


def wall(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall-clock seconds of a call that ends with the device idle."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _emulated(backend: Backend) -> bool:
    return type(getattr(backend, "device", None)).__name__ == "EmulatedDevice"


def backends(emulate: bool) -> list[Backend]:
    """The GPU backends that work here, or the CUDA C one in the emulator."""
    if emulate:
        from fastrnn.backends.cupy_cuda import CupyBackend
        from tests.emulated_device import EmulatedDevice

        return [CupyBackend(EmulatedDevice())]
    return [open_backend(name) for name in GPU_BACKENDS if available_backends()[name] is None]


def _fresh_memory() -> None:
    """Give cached blocks back: the next case may need all memory."""
    if "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


# --- Parts -------------------------------------------------------------------------------------


def device(save: Save, emulate: bool) -> dict[str, Any]:
    """What is there, and how fast it copies."""
    found: dict[str, Any] = {"backends": {}, "copy_bytes_per_second": None}
    if not emulate:
        found["missing"] = {k: v for k, v in available_backends().items() if v is not None}
    for backend in backends(emulate):
        found["backends"][backend.name] = (
            {"device": "emulator"} if _emulated(backend) else backend.describe()
        )
    save(found)
    found["copy_bytes_per_second"] = copy_rate(emulate)
    return found


def copy_rate(emulate: bool) -> float | None:
    """Bytes read and written a second by a copy in device memory."""
    backend = next((b for b in backends(emulate) if b.name == "cupy"), None)
    if backend is None:
        return None
    size = 1 << 12 if emulate else COPY_BYTES // 4
    source, target = backend.empty((size,), np.float32), backend.empty((size,), np.float32)
    copier = backend.device  # type: ignore[attr-defined]
    return 8 * size / seconds(backend, lambda: copier.copy(source, target))


SMOKE_SIZES = (
    Dims(1, 1, 1, 2),
    Dims(5, 3, 37, 41),
    Dims(3, 4, 256, 130),
    Dims(2, 3, 300, 65),  # the recurrence in clusters of 8
    HEADLINE,
    Dims(4, 5, 100, 31),
    Dims(2, 140, 200, 65),  # more rows than clusters that are resident
    Dims(3, 4, 520, 65),  # a product a time step
    Dims(130, 32, 64, 4100),  # the long sort of tokens, the largest tile of a product
    Dims(2, 3, 8, 9000),  # softmax of a row by a block, by clusters of 4 and of 8, in two passes
    Dims(2, 3, 8, 20_000),
    Dims(2, 3, 8, 40_000),
    Dims(2, 3, 8, 60_000),
)
"""Every op on each of its ways: in registers, in shared memory, in clusters, long and wide."""


def smoke(save: Save, emulate: bool) -> dict[str, Any]:
    """Every op, two training steps and some characters at odd sizes, each held to the oracle."""
    done: dict[str, Any] = {}
    for backend in backends(emulate):
        for dims in SMOKE_SIZES[: 2 if emulate else None]:
            label = f"{backend.name} T={dims.T} B={dims.B} H={dims.H} V={dims.V}"
            for make in OPS.values():
                make(backend, dims).check()
            problem, expected = make_problem("step", dims)
            step = _step(backend, problem, dims)
            for want in expected[:2]:
                step(1)
                loss = float(backend.get(step.ws.loss))
                assert abs(loss - float(want["loss"])) < 1e-3, f"{label}: loss {loss}"
            tokens = _generate(backend, dims, Decoding(temperature=0.9, top_k=5, seed=3))(4)
            assert tokens.shape == (1, 4)
            assert ((tokens >= 0) & (tokens < dims.V)).all()
            done[label] = "right"
            save(done)
    return done


def _step(backend: Backend, problem: Any, dims: Dims) -> Any:
    """A callable that runs ``n`` training steps and waits."""
    params = {name: problem[name] for name in PARAM_NAMES}
    ws = backend.workspace(dims, problem["tokens"], params)
    state = {"done": 0}

    def run(n: int) -> None:
        rows = np.arange(state["done"], state["done"] + n) % len(problem["starts"])
        lr, max_norm = float(problem["lr"]), float(problem["max_norm"])
        backend.run_steps(ws, problem["starts"][rows], lr, max_norm, True)
        backend.sync()
        state["done"] += n

    run.ws = ws  # type: ignore[attr-defined]
    return run


def _generate(
    backend: Backend, dims: Dims, decoding: Decoding, sequences: int = 1
) -> Callable[[int], Any]:
    problem, _ = make_problem(f"generate{sequences}", dims)
    params = {name: backend.put(problem[name]) for name in PARAM_NAMES}
    lengths = np.full(sequences, problem["prefix"].shape[1], np.int32)
    return lambda n: backend.generate(params, problem["prefix"], lengths, n, decoding)[0]


def ops(save: Save, emulate: bool) -> dict[str, Any]:
    """Every op at the headline size and at one that fits no cache."""
    found: dict[str, Any] = {"copy_bytes_per_second": copy_rate(emulate), "rows": []}
    plan = [(op, "headline", HEADLINE) for op in OPS]
    plan += [
        (op, size, SIZES[size])
        for size in RECURRENCES
        for op in ("recurrence", "recurrence_backward")
    ]
    plan += [(op, "large", dims) for op, dims in LARGE.items()]
    if emulate:
        plan = [(op, "toy", TOY) for op in OPS]
    for op, size, dims in plan:
        for backend in backends(emulate):
            row = _op_row(backend, op, size, dims)
            found["rows"].append(row)
            save(found)
            if "failed" in row:
                backend.sync()  # raises where the context is lost: nothing more can be measured
            _fresh_memory()
    return found


def _op_row(backend: Backend, op: str, size: str, dims: Dims) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": op,
        "size": size,
        "backend": backend.name,
        "dims": {k: getattr(dims, k) for k in "TBHV"},
    }
    try:
        case = OPS[op](backend, dims)
        results = case.check()
        row["errors"] = {
            r.name: [r.error, r.plain_error] for r in results if np.isfinite(r.plain_error)
        }
        row["seconds"] = _seconds_of(backend, case)
        row |= asdict(case.work)
    except Exception as error:  # one op that fails must not take the others' figures along
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    return row


def _seconds_of(backend: Backend, case: OpCase) -> float:
    if case.restore is None:
        return seconds(backend, case.submit)
    if _emulated(backend):
        case.restore()
        return seconds(backend, case.submit)
    # What it changes has to be put back: one call a replay, the best of a few.
    once = _replay(backend, case.submit, 1)
    times = []
    for _ in range(5):
        case.restore()
        times.append(once())
    return statistics.median(times)


def step(save: Save, emulate: bool) -> dict[str, Any]:
    """Training steps, the tutorial's whole training, generation."""
    found: dict[str, Any] = {"rows": []}
    sizes = {"toy": TOY} if emulate else {k: SIZES[k] for k in ("headline", "B256", "H512", "B1")}
    for backend in backends(emulate):
        for size, dims in sizes.items():
            problem, _ = make_problem("step", dims)
            run = _step(backend, problem, dims)
            n = 4 if emulate else 400
            run(n)
            row: dict[str, Any] = {"what": "training step", "size": size, "backend": backend.name}
            row["seconds"] = wall(functools.partial(run, n), 1 if emulate else 5) / n
            found["rows"].append(row | asdict(work("step", dims)))
            save(found)
            if size == "headline":
                whole = wall(functools.partial(run, 20_000), 3)
                row = {"what": "20,000 training steps", "size": size, "backend": backend.name}
                found["rows"].append({**row, "seconds": whole})
        dims = TOY if emulate else HEADLINE
        for sequences, decoding in (
            (1, Decoding()),
            (1, Decoding(temperature=0.8, top_k=40, top_p=0.95, seed=1)),
            (64, Decoding()),
        ):
            many = _generate(backend, dims, decoding, sequences)
            few, lot = (1, 3) if emulate else (200, 2200)
            many(few)
            # Two lengths: what a call costs however short it is drops out.
            times = [wall(functools.partial(many, n), 1 if emulate else 5) for n in (few, lot)]
            found["rows"].append(
                {
                    "what": "character" if sequences == 1 else f"character of {sequences} at once",
                    "size": "greedy" if decoding.temperature == 0 else "sampled",
                    "backend": backend.name,
                    "seconds": (times[1] - times[0]) / (lot - few),
                }
            )
            save(found)
    return found


def peers(save: Save, emulate: bool) -> dict[str, Any]:
    """Ours and whatever else is installed, taking turns."""
    if emulate:
        result = run_bench(("step",), ("tiny",), peers="none", backends=["numpy"], rounds=1)
        return {"bench": json.loads(result.to_json())}
    ours = [b.name for b in backends(False)]
    names = [p.name for p in _gpu_peers()]
    total: BenchResult | None = None
    for workload in ("step", "recurrence", "recurrence+bptt", "cross_entropy", "generate"):
        result = run_bench(
            (workload,), ("headline",), peers=names, backends=ours, rounds=3, turn_seconds=0.15
        )
        if total is None:
            total = result
        else:
            total.merge(result)
        save({"bench": json.loads(total.to_json())})
    assert total is not None
    return {"bench": json.loads(total.to_json())}


def _gpu_peers() -> list[Any]:
    from fastrnn.bench import PEERS

    return [p for p in PEERS if p.device == "cuda"]


PARTS: dict[str, Callable[[Save, bool], dict[str, Any]]] = {
    part.__name__: part for part in (device, smoke, ops, step, peers)
}


# --- Tables ------------------------------------------------------------------------------------


def tables(part: str, result: dict[str, Any]) -> list[str]:
    """Lines of Markdown for one part's result."""
    if part == "ops":
        return _op_table(result)
    if part == "step":
        cells = [("what", "size", "backend", "time", "TFLOP/s")]
        for row in result["rows"]:
            rate = f"{row['flop'] / row['seconds'] / 1e12:.1f}" if "flop" in row else "–"
            time_ = format_seconds(row["seconds"]) if row["seconds"] > 0 else "–"
            cells.append((row["what"], row["size"], row["backend"], time_, rate))
        return markdown_table(cells)
    if part == "peers":
        bench = BenchResult.from_json(json.dumps(result["bench"]))
        return [
            line for which in bench.tables() for line in [*bench.markdown(*which).split("\n"), ""]
        ]
    return ["```json", *json.dumps(result, indent=1, ensure_ascii=False).splitlines(), "```"]


def _op_table(result: dict[str, Any]) -> list[str]:
    copy = result["copy_bytes_per_second"]
    cells = [("op", "size", "backend", "time", "of the copy rate", "TFLOP/s", "error by plain's")]
    failed = []
    for row in result["rows"]:
        if "failed" in row:
            failed.append(f"- {row['op']} {row['size']} {row['backend']}: {row['failed']}")
            continue
        share = f"{100 * row['bytes'] / row['seconds'] / copy:.0f}%" if copy else "–"
        rate = f"{row['flop'] / row['seconds'] / 1e12:.2f}"
        cells.append(
            (
                row["op"], row["size"], row["backend"], format_seconds(row["seconds"]), share,
                rate, _worst(row),
            )
        )  # fmt: skip
    lines = markdown_table(cells)
    if copy:
        lines += ["", f"Copy: {copy / 1e12:.2f} TB/s, read and written."]
    return [*lines, "", *failed] if failed else lines


def _worst(row: dict[str, Any]) -> str:
    """The largest error as a multiple of plain float32's."""
    ratios = [ours / plain for ours, plain in row["errors"].values() if plain > 0]
    return f"{max(ratios):.2f}" if ratios else "–"


def goals(results: dict[str, dict[str, Any]]) -> list[str]:
    """What was aimed at on an H200, and what was measured: a line each."""
    rows = results.get("ops", {}).get("rows", [])
    copy = results.get("ops", {}).get("copy_bytes_per_second")
    steps = results.get("step", {}).get("rows", [])

    def op(name: str, size: str, backend: str = "cupy") -> dict[str, Any] | None:
        key = (name, size, backend)
        found = (r for r in rows if (r["op"], r["size"], r["backend"]) == key and "seconds" in r)
        return next(found, None)

    def timed(what: str, size: str, backend: str = "cupy") -> float | None:
        key = (what, size, backend)
        found = (r for r in steps if (r["what"], r["size"], r["backend"]) == key)
        return next((r["seconds"] for r in found), None)

    def micro(row: dict[str, Any] | None) -> float | None:
        return None if row is None else row["seconds"] * 1e6

    def share(row: dict[str, Any] | None) -> float | None:
        return None if row is None or not copy else row["bytes"] / row["seconds"] / copy * 100

    def ratio(slow: float | None, fast: float | None) -> float | None:
        return slow / fast if slow and fast else None

    headline = timed("training step", "headline")
    twenty = timed("20,000 training steps", "headline")
    greedy = timed("character", "greedy")
    worst = [
        max(ours / plain for ours, plain in r["errors"].values() if plain > 0)
        for r in rows
        if r["backend"] == "cupy" and any(plain > 0 for _, plain in r.get("errors", {}).values())
    ]
    bench = results.get("peers", {}).get("bench")
    peer = BenchResult.from_json(json.dumps(bench)) if bench else None
    step_ratio, cudnn = _by_peers(peer)
    forward = op("recurrence", "headline")
    cudnn_ratio = ratio(cudnn, None if forward is None else forward["seconds"])
    lines: list[tuple[str, str, float | None, float, bool]] = [
        # what, unit, measured, goal, whether less is better
        ("recurrence forward", "µs", micro(forward), 12, True),
        ("recurrence backward", "µs", micro(op("recurrence_backward", "headline")), 14, True),
        ("recurrence, cuDNN by ours, graphs", "×", cudnn_ratio, 3, False),
        ("training step", "µs", headline and headline * 1e6, 45, True),
        ("20,000 training steps", "s", twenty, 1, True),
        ("training step, best peer by ours", "×", step_ratio, 3, False),
        *(
            (f"{name}, large, of the copy rate", "%", share(op(name, "large")), 85, False)
            for name in ("gather", "gather_backward", "cross_entropy", "clip_by_global_norm", "sgd")
        ),
        ("a character", "µs", greedy and greedy * 1e6, 1, True),
        ("largest error by plain float32's", "×", max(worst, default=None), 2, True),
        (
            "numba-cuda training step by cupy's", "×",
            ratio(timed("training step", "headline", "numba-cuda"), headline), 2.5, True,
        ),
        (
            "numba-cuda recurrence by cupy's", "×",
            ratio(micro(op("recurrence", "headline", "numba-cuda")), micro(forward)), 2, True,
        ),
    ]  # fmt: skip
    cells = [("goal", "aim", "measured", "")]
    for what, unit, measured, aim, less in lines:
        sign = "≤" if less else "≥"
        met = measured is not None and (measured <= aim if less else measured >= aim)
        word = "not measured" if measured is None else "met" if met else "missed"
        value = "–" if measured is None else f"{measured:.3g} {unit}"
        cells.append((what, f"{sign} {aim:g} {unit}", value, word))
    return markdown_table(cells)


def _by_peers(result: BenchResult | None) -> tuple[float | None, float | None]:
    """The best peer's step by ours, and the seconds of cuDNN's forward recurrence in a graph."""
    if result is None:
        return None, None
    others = [
        r.seconds for r in result.select("step", "headline") if not r.ours and r.seconds is not None
    ]
    ours = result.find("step", "headline", "cupy")
    best = min(others) / ours.seconds if others and ours and ours.seconds else None
    cudnn = result.find("recurrence", "headline", "cudnn-graph")
    return best, cudnn.seconds if cudnn else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("result", type=Path)
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args(arguments)

    def save(result: dict[str, Any]) -> None:
        temporary = options.result.with_suffix(".part")
        temporary.write_text(json.dumps(result, default=float))
        temporary.replace(options.result)

    if not options.emulate and not backends(False):
        raise BackendUnavailableError("no GPU backend works here")
    save(PARTS[options.part](save, options.emulate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
