"""The ``numba`` backend as an engine: its threads, memory, caches, weights in either order."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

import fastrnn
from fastrnn.backend import Backend, Dims
from fastrnn.backends import (
    cpu_emitter,
    cpu_generate,
    cpu_step,
    cpu_threads,
    cpu_vector,
    numba_cpu,
)
from fastrnn.backends.cpu_generate import BINS, _choose
from fastrnn.backends.cpu_threads import Team, thread_count
from fastrnn.backends.numba_cpu import NumbaBackend
from fastrnn.decoding import Decoding, choose
from tests.conftest import Inputs
from tests.tolerances import assert_close

HOST: dict[str, bool] = dict(llvm.get_host_cpu_features())

# Sequences and columns that threads can share evenly and cannot; weights in part and whole panels.
SHAPES = [(5, 3, 20, 37), (4, 33, 96, 70), (3, 32, 256, 131), (2, 1, 65, 40)]


@pytest.fixture(autouse=True)
def always_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy shapes too are shared among the threads."""
    monkeypatch.setattr(numba_cpu, "_WORTH_THREADS", 0.0)


def engine(threads: int, team: type[Team] = Team) -> NumbaBackend:
    return NumbaBackend(team(threads))


def train(backend: NumbaBackend, inputs: Inputs, steps: int = 3) -> list[Any]:
    tokens = inputs.tokens(inputs.T * 4 + 50)
    starts = (np.arange(steps * inputs.B).reshape(steps, -1) * 7 % 40).astype(np.int32)
    dims = Dims(inputs.T, inputs.B, inputs.H, inputs.V, inputs.dtype)
    ws = backend.workspace(dims, tokens, inputs.params())
    backend.run_steps(ws, starts, 0.5, 0.7, True)
    return [a.copy() for a in (ws.flat_params, ws.flat_grads, ws.h0, ws.totals)]


def continued(backend: Backend, inputs: Inputs, sequences: int, decoding: Decoding) -> Any:
    prefix = inputs.tokens(3 * sequences).reshape(sequences, 3)
    lengths = np.arange(sequences, dtype=np.int32) % 3 + 1
    params = {name: 4 * p for name, p in inputs.params().items()}
    return backend.generate(params, prefix, lengths, 12, decoding)


def all_equal(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


# --- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: Any, dtype: Any) -> None:
    T, B, H, V = shape
    alone = train(engine(1), Inputs(T, B, H, V, dtype))
    for threads in (2, 3, 5):
        all_equal(train(engine(threads), Inputs(T, B, H, V, dtype)), alone)


@pytest.mark.parametrize("rows", [1, 3, 7, 150])
def test_products_of_few_rows_have_the_same_bits_for_any_number_of_threads(rows: int) -> None:
    inputs = Inputs(rows, 1, 33, 40, np.float32)
    h, dlogits, p = inputs.array(rows, 1, 33), inputs.array(rows, 1, 40), inputs.params()

    def products(backend: NumbaBackend) -> list[Any]:
        logits = backend.project(h, p["W_hq"], p["b_q"])
        return [logits, *backend.project_backward(dlogits, h, p["W_hq"])]

    alone = products(engine(1))
    for threads in (2, 3, 5):
        all_equal(products(engine(threads)), alone)


@pytest.mark.parametrize("often", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("V", [1, 7, 39, 40, 300])
def test_gradients_of_rows_have_the_same_bits_for_any_number_of_threads(
    V: int, often: float
) -> None:
    """Rows, or columns where there are few, are shared; one token may come more often than all."""
    T, B, H = 401, 3, 70
    generator = np.random.default_rng(1)
    dz = generator.standard_normal((T, B, H)).astype(np.float32)
    tokens = generator.integers(0, V, (T, B)).astype(np.int32)
    tokens[generator.random((T, B)) < often] = V // 2
    want = np.zeros((V, H))
    np.add.at(want, tokens.ravel(), dz.reshape(-1, H).astype(np.float64))
    alone = engine(1).gather_backward(dz, tokens, V)
    assert_close("gather_backward", alone[0], want, "dW_xh")
    assert_close("gather_backward", alone[1], want.sum(axis=0), "db_h")
    for threads in (2, 3, 5):
        out = np.full((V, H), np.nan, np.float32), np.full(H, np.nan, np.float32)
        all_equal(engine(threads).gather_backward(dz, tokens, V, out), alone)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(0.9, 9, 0.8, seed=3)], ids=str)
@pytest.mark.parametrize("sequences", [1, 2, 7, 40])
def test_any_number_of_threads_generates_the_same(sequences: int, decoding: Decoding) -> None:
    def inputs() -> Inputs:
        return Inputs(3, 2, 48, 101, np.float32)

    alone = continued(engine(1), inputs(), sequences, decoding)
    for threads in (2, 3):
        all_equal(continued(engine(threads), inputs(), sequences, decoding), alone)


LOGITS: dict[str, Callable[[np.random.Generator], Any]] = {
    "normal": lambda rng: rng.normal(size=300) * 4,
    "ties": lambda rng: rng.integers(-3, 3, 300),
    "all equal": lambda rng: np.zeros(64),
    "far apart": lambda rng: rng.normal(size=300) * 1e4,
    "one far below": lambda rng: np.r_[rng.normal(size=99) * 1e-3, -1e30],
    "close": lambda rng: 7 + rng.normal(size=300) * 1e-9,
    "not all possible": lambda rng: np.where(rng.random(300) < 0.9, -np.inf, rng.normal(size=300)),
    "one": lambda rng: np.ones(1),
}


@pytest.mark.parametrize("temperature", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("kind", LOGITS)
def test_tokens_are_chosen_without_sorting_all_as_by_definition(
    kind: str, temperature: float
) -> None:
    rng = np.random.default_rng(5)
    for top_k, top_p in ((0, 1.0), (1, 1.0), (7, 1.0), (60, 1.0), (0, 0.3), (0, 0.95), (12, 0.8)):
        for u in (1e-7, 0.1, 0.63, 1 - 2.0**-24):
            logits = LOGITS[kind](rng).astype(np.float32)
            V = len(logits)
            scores = (logits.astype(np.float64) - np.float64(logits.max())) / temperature
            scratch = np.full(V + 2, np.nan), np.full((3, V), -1), np.full(BINS, np.nan)
            got = _choose(V, scores, *scratch, top_k, top_p, u)
            want = choose(logits, Decoding(temperature=temperature, top_k=top_k, top_p=top_p), u)
            assert got == want, (top_k, top_p, u)


def test_a_token_is_chosen_from_logits_that_are_not_numbers() -> None:
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.5), (3, 0.5)):
        scratch = np.empty(7), np.empty((3, 5), np.int64), np.empty(BINS)
        assert 0 <= _choose(5, np.full(5, np.nan), *scratch, top_k, top_p, 0.5) < 5


class LateTeam(Team):
    """Its other threads come late; how far the generation is by then."""

    def _serve(self, tid: int, inbox: Any, sync: Any) -> None:
        def get() -> Any:
            job = inbox.get()
            time.sleep(0.05)
            self.found = int(job[1][-1][0].max())  # the last argument of generate: claims
            return job

        super()._serve(tid, SimpleNamespace(get=get), sync)  # type: ignore[arg-type]


def test_generation_does_not_wait_for_a_late_thread() -> None:
    inputs = Inputs(3, 2, 48, 101, np.float32)
    want = continued(engine(1), inputs, 1, Decoding())
    inputs, backend = Inputs(3, 2, 48, 101, np.float32), engine(2, LateTeam)
    all_equal(continued(backend, inputs, 1, Decoding()), want)
    # A state for each of 3 + 12 - 1 characters, and 12 times logits: all done.
    assert backend._team.found == 14 + 12  # type: ignore[attr-defined]


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = int(numba.config.NUMBA_NUM_THREADS)
    for value, want in {"1": 1, "1,2": 1, "1000": cores, "many": cores, "": cores}.items():
        monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert thread_count() == want, value
    code = "import fastrnn; print(fastrnn.open_backend('numba').describe()['threads'])"
    env = {**os.environ, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "7"}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert shown.stdout.split() == [b"1"]


def test_callers_on_many_python_threads_share_one_team() -> None:
    backend, inputs = engine(2), Inputs(*SHAPES[1], np.float32)
    want, got, before = train(backend, inputs), {}, threading.active_count()

    def work(i: int) -> None:
        got[i] = [train(backend, Inputs(*SHAPES[1], np.float32)) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    assert threading.active_count() <= before + len(workers)
    for worker in workers:
        worker.join()
    assert sorted(got) == [0, 1, 2, 3]
    for runs in got.values():
        for run in runs:
            all_equal(run, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, sys
import numpy as np
from tests import test_cpu_engine as t
from fastrnn.backends import numba_cpu
numba_cpu._WORTH_THREADS = 0.0
backend, inputs = t.engine(2), t.Inputs(*t.SHAPES[1], np.float32)
want = t.train(backend, inputs)
for _ in range(3):
    child = os.fork()
    if child == 0:
        t.all_equal(t.train(backend, t.Inputs(*t.SHAPES[1], np.float32)), want)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
t.all_equal(t.train(backend, t.Inputs(*t.SHAPES[1], np.float32)), want)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_interrupted_call_leaves_a_team_that_works() -> None:
    backend, inputs = engine(3), Inputs(*SHAPES[1], np.float32)
    want = train(backend, inputs)

    def interrupted(tid: int, *_: Any) -> None:
        if tid == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend._team.run(interrupted, threads=3)
    all_equal(train(backend, Inputs(*SHAPES[1], np.float32)), want)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are moved on Linux alone")
@pytest.mark.parametrize("size", [2, 3])
def test_a_thread_leaves_the_processor_of_another_if_there_is_one_for_each(size: int) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one processor")
    first, second = sorted(allowed)[:2]
    sync = cpu_threads._sync(size)
    processor = sync[cpu_threads._THREADS + 2 :: cpu_threads._LINE]
    processor[0] = first + 1
    after: list[set[int]] = []

    def work() -> None:
        os.sched_setaffinity(0, {first})
        os.sched_setaffinity(0, {first, second})
        cpu_threads._keep_apart(1, size, sync.ctypes.data)
        after.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert after == [{first, second}], "it may go anywhere again"
    assert processor[1] - 1 in ({second} if size == 2 else {first, second})


def test_idle_threads_sleep() -> None:
    backend = engine(2)
    train(backend, Inputs(*SHAPES[1], np.float32))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


# --- other processors ------------------------------------------------------------------------

LEAN = {
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"},
    "SSE2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAN)
def test_processors_with_less_compute_the_same(name: str) -> None:
    """Training steps and generation, compiled as for a CPU with shorter vectors."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("x86 instructions")
    if name == "AVX2" and not (HOST.get("avx2") and HOST.get("fma")):
        pytest.skip("this CPU has no AVX2")
    code = """
import sys
import numpy as np
from fastrnn.backends import cpu_emitter, numba_cpu
from fastrnn.backend import open_backend
from fastrnn.decoding import Decoding
from tests import test_cpu_engine as t
from tests.test_step import check_steps
assert cpu_emitter.VECTOR_BYTES == {"AVX2": 32, "SSE2": 16}[sys.argv[1]], cpu_emitter.VECTOR_BYTES
numba_cpu._WORTH_THREADS = 0.0
for dtype in (np.float32, np.float64):
    for shape in ((4, 9, 37, 70), (2, 3, 64, 33)):
        check_steps(t.engine(2), t.Inputs(*shape, dtype), 3, True, fused=True)
for sequences in (1, 9):
    got, want = (
        t.continued(b, t.Inputs(3, 2, 48, 101, np.float32), sequences, Decoding())
        for b in (t.engine(2), open_backend("numpy"))
    )
    np.testing.assert_array_equal(got[0], want[0])
"""
    subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, **LEAN[name]},
        check=True,
        timeout=300,
    )


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_training_needs_little_more_memory_than_the_model_and_its_activations() -> None:
    code = """
import resource
import numpy as np
from tests import test_cpu_engine as t
from fastrnn.backend import Dims

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def steps(dims, tokens, params):
    ws = backend.workspace(dims, tokens, params)
    backend.run_steps(ws, np.zeros((3, dims.B), np.int32), 1.0, 0.01, True)
    return ws

backend = t.engine(2)
small = t.Inputs(3, 4, 16, 30, np.float32)
kept = steps(Dims(3, 4, 16, 30), small.tokens(100), small.params())
dims = Dims(35, 32, 256, 1027)
model = t.Inputs(35, 32, 256, 1027, np.float32)
tokens, params = model.tokens(100), model.params()
before = resident()
ws = steps(dims, tokens, params)
activations = dims.T * dims.B * (2 * dims.H + dims.V)  # h, its gradient, logits
print((resident() - before) / (4 * (2 * dims.flat_size + activations)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert float(shown.stdout) < 1.3


@pytest.mark.slow
def test_ten_thousand_steps_do_not_grow_the_process() -> None:
    code = """
import resource
import numpy as np
from tests import test_cpu_engine as t
from fastrnn.backend import Dims
from fastrnn.decoding import Decoding
backend, inputs = t.engine(2), t.Inputs(3, 4, 16, 30, np.float32)
ws = backend.workspace(Dims(3, 4, 16, 30), inputs.tokens(100), inputs.params())
starts = np.arange(4, dtype=np.int32)[None]

def steps(n):
    for _ in range(n):
        backend.run_steps(ws, starts, 0.1, 0.01, True)
        backend.generate(ws.params, starts[:1, :2], np.full(1, 2, np.int32), 2, Decoding())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = steps(500)
print(steps(10_000) - before)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=300
    )
    assert int(shown.stdout) < 1 << 20


# --- caches of compiled code -----------------------------------------------------------------


def test_compiled_code_is_marked_with_everything_it_was_made_from() -> None:
    for function in (cpu_generate.generate, cpu_step.run_steps, cpu_vector.tile_rows):
        assert function._cache._cache_file._source_stamp == cpu_emitter._stamp()


def test_the_mark_changes_with_any_of_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    before = cpu_emitter._stamp()
    folder = os.path.dirname(cpu_emitter.__file__)
    for name in sorted(n for n in os.listdir(folder) if n.startswith("cpu_")):
        for other in (n for n in os.listdir(folder) if n.startswith("cpu_")):
            with open(os.path.join(folder, other), "rb") as file:
                text = file.read()
            (tmp_path / other).write_bytes(text + b"\n" * (other == name))
        monkeypatch.setattr(cpu_emitter, "__file__", str(tmp_path / "cpu_emitter.py"))
        assert cpu_emitter._stamp() != before, name
        monkeypatch.undo()


def test_code_of_another_variant_is_not_taken_from_the_cache(tmp_path: Any) -> None:
    """As where two processes fill the cache at once: an index that names the other's file."""
    (tmp_path / "halves.py").write_text(
        "from fastrnn.backends.cpu_emitter import jit\n\n\n@jit\ndef half(x):\n    return x / 2\n"
    )
    root = os.path.dirname(os.path.dirname(str(fastrnn.__file__)))
    env = {**os.environ, "PYTHONPATH": root, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    code = (
        "from halves import half\n"
        "print(half(3), half(5.0), len(half.stats.cache_hits), len(half.stats.cache_misses))\n"
    )

    def run() -> str:
        shown = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, cwd=tmp_path, env=env
        )
        return shown.stdout.decode().strip()

    assert run() == "1.5 2.5 0 2"
    assert run() == "1.5 2.5 2 0"
    first, second = (tmp_path / "cache").rglob("*.nbc")
    kept = first.read_bytes(), second.read_bytes()
    first.write_bytes(kept[1])
    second.write_bytes(kept[0])
    assert run() == "1.5 2.5 0 2"
    first.write_bytes(b"what another version wrote")
    assert run() == "1.5 2.5 1 1"


def test_without_a_place_for_the_cache_code_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", refuse)
    assert cpu_emitter.jit(lambda x: x + 1)(1) == 2


# --- weights in either order -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_in_fortran_order_and_no_gradient_of_them(shape: Any, dtype: Any) -> None:
    T, B, H, V = shape
    inputs, backend = Inputs(T, B, H, V, dtype), engine(2)
    z, dh = inputs.array(T, B, H), inputs.array(T, B, H)
    h0, W_hh = np.zeros((B, H), dtype), inputs.params()["W_hh"]
    h = backend.recurrence(z, W_hh, h0)
    turned = np.asfortranarray(W_hh)
    np.testing.assert_array_equal(backend.recurrence(z, turned, h0), h)
    want = backend.recurrence_backward(dh, h, W_hh, h0)
    all_equal(backend.recurrence_backward(dh, h, turned, h0), want)
    dz, dh0 = np.empty_like(z), np.empty_like(h0)
    backend.recurrence_backward(dh, h, turned, h0, out=(dz, None, dh0))
    all_equal((dz, dh0), (want[0], want[2]))
    backend.recurrence(z, turned, h0, out=z)
    np.testing.assert_array_equal(z, h)
