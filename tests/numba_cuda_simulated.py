"""The ``numba-cuda`` backend in Numba's CUDA simulator: ops, steps and generation at toy shapes.

Run by ``tests/test_numba_cuda.py`` in a process of its own, because the simulator takes the place
of numba's CUDA module for good: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/numba_cuda_simulated.py``.
A CUDA thread is a Python thread here, so blocks and tiles are shrunk; the kernels are the same.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numba import cuda

from fastrnn import reference
from fastrnn.backend import Dims, open_backend
from fastrnn.backends import numba_cuda_kernels as kernels
from fastrnn.backends.numba_cuda import NumbaCudaBackend
from fastrnn.decoding import Decoding
from tests.conftest import Inputs
from tests.numba_cuda_simulator import TOY, poisoned, repaired_simulator
from tests.test_ops import (
    OnBackend,
    recurrence_oracle,
    run,
    test_clip_by_global_norm,
    test_cross_entropy,
    test_gather,
    test_gather_backward,
    test_project,
    test_project_backward,
    test_record_counts_steps_and_what_is_not_finite,
    test_recurrence,
    test_recurrence_backward,
    test_recurrence_in_place,
    test_sgd,
    test_window,
    up,
)
from tests.test_step import check_steps, setting
from tests.tolerances import assert_close, relative_rms

__all__ = [
    "run",
    "test_clip_by_global_norm",
    "test_cross_entropy",
    "test_gather",
    "test_gather_backward",
    "test_project",
    "test_project_backward",
    "test_record_counts_steps_and_what_is_not_finite",
    "test_recurrence",
    "test_recurrence_backward",
    "test_recurrence_in_place",
    "test_sgd",
    "test_window",
]

assert os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", "run under the simulator"


@pytest.fixture(autouse=True, scope="module")
def simulator() -> Iterator[None]:
    with repaired_simulator():
        yield


SHAPES = [
    # T, B, H, V
    pytest.param((1, 1, 1, 2, "float32"), id="smallest-float32"),
    pytest.param((3, 2, 7, 11, "float32"), id="odd-float32"),
    pytest.param((3, 2, 7, 11, "float64"), id="odd-float64"),
    pytest.param((2, 3, 13, 5, "float32"), id="padded-state-float32"),
    pytest.param((3, 1, 16, 19, "float32"), id="aligned-state-float32"),
    pytest.param((2, 2, 19, 6, "float32"), id="wide-state-float32"),
    pytest.param((2, 2, 19, 6, "float64"), id="wide-state-float64"),
]


@pytest.fixture(scope="module")
def backend() -> NumbaCudaBackend:
    return NumbaCudaBackend(TOY)


@pytest.fixture(params=SHAPES)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    T, B, H, V, dtype = request.param
    return Inputs(T, B, H, V, dtype)


# --- the simulator ---------------------------------------------------------------------------


def test_a_block_has_one_shared_array(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(shape: Any, dtype: Any) -> Any:
        time.sleep(0.01)  # other threads of the block come to ask meanwhile
        return poisoned(shape, dtype)

    def rotate(out: Any) -> None:
        word = cuda.shared.array(8, dtype=np.int32)
        i = cuda.threadIdx.x
        word[i] = i
        cuda.syncthreads()
        out[i] = word[(i + 1) % 8]

    out = np.zeros(8, np.int32)
    monkeypatch.setattr("tests.numba_cuda_simulator.poisoned", slowly)
    cuda.jit(rotate)[1, 8](out)
    assert out.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


def test_barriers_count_the_threads_that_are_left() -> None:
    def leave_early(out: Any) -> None:
        i = cuda.threadIdx.x
        if i >= 4:
            return
        word = cuda.shared.array(4, dtype=np.int32)
        for n in range(3):
            word[i] = n * i
            cuda.syncthreads()
            out[n, i] = word[(i + 1) % 4]
            cuda.syncthreads()

    out = np.zeros((3, 4), np.int32)
    cuda.jit(leave_early)[1, 8](out)
    np.testing.assert_array_equal(out, np.outer(range(3), [1, 2, 3, 0]))


def test_an_error_of_a_thread_ends_its_block() -> None:
    def fail(out: Any) -> None:
        if cuda.threadIdx.x == 3:
            out[99] = 1
        cuda.syncthreads()

    with pytest.raises(IndexError, match=r"tid=\[3, 0, 0\].*index 99 is out of bounds"):
        cuda.jit(fail)[1, 8](np.zeros(8, np.int32))


# --- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "carry", "fused"),
    [
        pytest.param((3, 2, 7, 11), True, True, id="carried-fused"),
        pytest.param((3, 2, 7, 11), False, False, id="zeroed-composed"),
        pytest.param((2, 2, 19, 6), True, True, id="wide-state-carried-fused"),
        pytest.param((2, 2, 19, 6), True, False, id="wide-state-carried-composed"),
    ],
)
def test_three_steps_follow_the_oracle(
    backend: NumbaCudaBackend, shape: tuple[int, int, int, int], carry: bool, fused: bool
) -> None:
    check_steps(backend, Inputs(*shape, np.float32), 3, carry, fused)


def test_steps_give_the_same_bits_however_they_are_submitted(backend: NumbaCudaBackend) -> None:
    inputs = Inputs(2, 2, 5, 4, np.float32)
    params, tokens, starts = setting(inputs, 3)
    runs = []
    for chunks in ([3], [1, 2], None):
        ws = backend.workspace(Dims(2, 2, 5, 4, inputs.dtype), tokens, params)
        if chunks is None:
            for row in starts:
                backend.step(ws, backend.put(row), 0.5, 0.7, True)
        else:
            done = 0
            for n in chunks:
                backend.run_steps(ws, starts[done : done + n], 0.5, 0.7, True)
                done += n
        runs.append([backend.get(a) for a in (ws.flat_params, ws.h0, ws.totals)])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


class Queued(NumbaCudaBackend):
    """Holds back what is submitted, and runs it in any order that streams and events allow.

    Args:
        order: "first" or "last" of the launches that may run, by when they were submitted, or a
            seed to draw them by. dropped: the name of an order between streams to forget.
    """

    def __init__(self, order: str | int = "first", dropped: str = "") -> None:
        super().__init__(TOY)
        self.order, self.dropped = order, dropped
        self.held: list[tuple[set[int], Callable[[], None]]] = []
        self.last: dict[int, set[int]] = {}  # by stream: what its next launch waits for
        self.holding = False
        self.made = 0  # scratch arrays, while it was holding

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.held, self.last, self.holding = [], {}, True
        self.made = -len(self._scratch_arrays)
        yield
        self.holding = False
        self.made += len(self._scratch_arrays)

    def get(self, array: Any) -> Any:
        assert not self.holding, "a step reads from the device"
        return super().get(array)

    def put(self, host: Any, out: Any = None) -> Any:
        assert not self.holding, "a step writes from the host"
        return super().put(host, out)

    def sync(self) -> None:
        assert not self.holding, "a step waits for the device"

    def launch(self) -> None:
        """Run what is held, each launch after those that it waits for."""
        random = np.random.default_rng(self.order if isinstance(self.order, int) else 0)
        done: set[int] = set()
        while len(done) < len(self.held):
            ready = [i for i, (waits, _) in enumerate(self.held) if i not in done and waits <= done]
            drawn = int(random.choice(ready))
            chosen = {"first": ready[0], "last": ready[-1]}.get(str(self.order), drawn)
            self.held[chosen][1]()
            done.add(chosen)

    def _launch(self, stream: Any, kernel: Any, grid: Any, *args: Any) -> None:
        run = functools.partial(super()._launch, stream, kernel, grid, *args)
        if not self.holding:
            run()
            return
        self.held.append((self.last.get(id(stream), set()), run))
        self.last[id(stream)] = {len(self.held) - 1}

    def _order(self, first: Any, then: Any, what: str) -> None:
        if what != self.dropped:
            self.last[id(then)] = self.last.get(id(then), set()) | self.last.get(id(first), set())

    def _scratch(self, *args: Any) -> Any:
        fresh = len(self._scratch_arrays)
        array = super()._scratch(*args)
        if len(self._scratch_arrays) > fresh:
            array[:] = np.nan if array.dtype.kind == "f" else 0
        return array


class TwoSteps:
    """Two steps that are submitted before either runs."""

    def __init__(self, H: int) -> None:
        inputs = Inputs(2, 2, H, 4, np.float32)
        self.dims = Dims(2, 2, H, 4, inputs.dtype)
        self.params, self.tokens, self.starts = setting(inputs, 2)

    def __call__(self, order: str | int, dropped: str = "") -> list[Any]:
        """What they leave behind, run in this order."""
        backend = Queued(order, dropped)
        ws = backend.workspace(self.dims, self.tokens, self.params)
        for array in (ws.h, ws.dz, ws.dh0, ws.logits, *ws.grads.values()):
            array.reshape(array.size)[:] = np.nan
        ws.x[:], ws.y[:] = 0, 0
        rows = backend.put(self.starts.ravel())
        cursor, rates = backend.put(np.zeros(1, np.int32)), backend.put(np.array([0.5, 0.7]))
        with backend.capture():
            for _ in self.starts:
                backend._submit(ws, rows, cursor, cursor, rates, True)
        backend.launch()
        return [backend.get(a) for a in (ws.flat_params, ws.h0, ws.totals)]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("H", [5, 17], ids=["one-block-a-row", "wide-state"])
def test_streams_may_run_in_any_order_they_are_allowed(H: int) -> None:
    run = TwoSteps(H)
    want = run("first")
    assert not any(np.isnan(array).any() for array in want)
    for order in ("last", 1):
        assert same(run(order), want), order


ORDERS = ("begin", "x", "window", "Wt", "dh", "dlogits", "dz", "dW_hq", "dW_xh")


@pytest.mark.parametrize(("dropped", "H"), [*((o, 5) for o in ORDERS), ("window", 17)])
def test_every_order_between_streams_is_needed(dropped: str, H: int) -> None:
    run = TwoSteps(H)
    want = run("first")
    assert not all(same(run(order, dropped), want) for order in ("last", 1, 2, 3, 4, 5))


class Replayed:
    """In place of a graph: what a :class:`Queued` backend held back while capturing.

    Attributes:
        launches: how often it ran. made: scratch arrays while capturing.
    """

    def __init__(self, backend: Queued) -> None:
        self.backend, self.launches, self.made = backend, 0, 0
        self.held: list[Any] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self.backend.capture():
            yield
        self.held, self.made = self.backend.held, self.backend.made

    def launch(self) -> None:
        self.backend.held = self.held
        self.backend.launch()
        self.launches += 1


def test_captured_steps_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and replay as on a device, with the launches held back in place of a graph."""
    two = TwoSteps(5)
    starts = np.concatenate([two.starts, two.starts[::-1]] * 2 + [two.starts[:1]] * 2)
    graphs: list[Replayed] = []
    results = []
    for captures in (False, True):
        backend = Queued("last")
        backend._captures = captures

        def graph(stream: Any, backend: Queued = backend) -> Replayed:
            graphs.append(Replayed(backend))
            return graphs[-1]

        monkeypatch.setattr("fastrnn.backends.numba_cuda.Graph", graph)
        monkeypatch.setattr("fastrnn.backends.numba_cuda.GRAPH_STEPS", 3)
        ws = backend.workspace(two.dims, two.tokens, two.params)
        backend.run_steps(ws, starts[:5], 0.5, 0.7, True)  # one uncaptured, three, one
        backend.run_steps(ws, starts[5:], 0.25, 0.3, True)  # the same graphs, at other rates
        results.append([backend.get(a) for a in (ws.flat_params, ws.h0, ws.totals)])
    assert [graph.launches for graph in graphs] == [2, 3]
    assert [graph.made for graph in graphs] == [0, 0]
    assert same(*results)


def test_a_longer_run_keeps_its_graphs(
    backend: NumbaCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrnn.backends.numba_cuda.PLANNED_STEPS", 6)
    ws = backend.workspace(TwoSteps(5).dims, TwoSteps(5).tokens, TwoSteps(5).params)
    plan = backend._plan(ws, 1)
    plan.warm.add(True)
    assert backend._plan(ws, 6) is plan
    longer = backend._plan(ws, 7)
    assert longer is not plan
    assert longer.warm == {True}
    assert longer.starts.size == 14 * ws.dims.B


def test_rates_are_read_anew_in_each_run(backend: NumbaCudaBackend) -> None:
    inputs = Inputs(2, 2, 5, 4, np.float64)
    params, tokens, starts = setting(inputs, 2)
    ws = backend.workspace(Dims(2, 2, 5, 4, inputs.dtype), tokens, params)
    backend.run_steps(ws, starts[:1], 0.5, 0.7, False)
    after_one = backend.get(ws.flat_params)
    backend.run_steps(ws, starts[1:], 0.0, 0.7, False)
    np.testing.assert_array_equal(backend.get(ws.flat_params), after_one)


def test_evaluate_is_the_loss(backend: NumbaCudaBackend) -> None:
    inputs = Inputs(3, 2, 7, 11, np.float32)
    params, tokens, starts = setting(inputs, 2)
    ws = backend.workspace(Dims(3, 2, 7, 11, inputs.dtype), tokens, params)
    losses, h = [], np.zeros((2, 7))
    for row in starts:
        index = row[None, :] + np.arange(3)[:, None]
        hs, logits = reference.forward(tokens[index], h, {k: up(p) for k, p in params.items()})
        losses.append(reference.cross_entropy(logits, tokens[index + 1]))
        h = hs[-1]
    assert backend.evaluate(ws, starts, carry=True) == pytest.approx(np.mean(losses), rel=1e-5)


def test_sums_over_many_rows_stay_exact() -> None:
    """65,536 rows in the eight groups of a real block, all but a hundred of one token."""
    N, H, V = 65_536, 4, 3
    real = replace(TOY, threads=8 * TOY.columns)
    assert real.threads // real.columns == kernels.Geometry().threads // kernels.Geometry().columns
    backend, inputs = NumbaCudaBackend(real), Inputs(N, 1, H, V, np.float32)
    dz = inputs.array(N, 1, H)
    order = inputs.rng.permutation(N).astype(np.int32)
    bounds = np.array([0, N - 100, N - 7, N], np.int32)
    rows_of, order_of, bounds_of = (backend.put(a) for a in (dz, order, bounds))
    dW, db = backend.empty((V, H), np.float32), backend.empty((H,), np.float32)
    backend._sum_by_token(backend.stream, rows_of, order_of, bounds_of, dW)
    backend._column_sum(backend.stream, rows_of, db)
    rows = up(dz).reshape(N, H)
    want = [rows[order[first:end]].sum(axis=0) for first, end in itertools.pairwise(bounds)]
    for got, expected in ((dW, np.stack(want)), (db, rows.sum(axis=0))):
        assert_close("gather_backward", backend.get(got), expected)
        assert relative_rms(backend.get(got), expected) < 2e-7


def test_the_blocks_meant_for_real_devices() -> None:
    """512 threads and 64 x 64 tiles, once: nothing depends on the toy sizes."""
    backend, inputs = NumbaCudaBackend(), Inputs(2, 1, 33, 5, np.float32)
    on = OnBackend(backend)
    z, h0 = inputs.array(2, 1, 33), inputs.array(1, 33)
    W = inputs.array(33, 33, scale=0.2)
    assert_close("recurrence", on("recurrence", z, W, h0), recurrence_oracle(z, W, h0))
    h, W_hq, b_q = inputs.array(2, 1, 33), inputs.array(33, 5), inputs.array(5)
    assert_close("project", on("project", h, W_hq, b_q), up(h) @ up(W_hq) + up(b_q))


def test_the_first_use_of_a_kernel_is_announced(
    backend: NumbaCudaBackend, caplog: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = replace(kernels.copy_kernel(np.dtype(np.float32), TOY))  # not yet compiled
    x, out = backend.put(np.ones(4, np.float32)), backend.empty((4,), np.float32)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with caplog.at_level("INFO"):
        for _ in range(2):
            backend._map(backend.stream, kernel, 4, x, out)
    message = "numba-cuda: compiling copy (first use in this process)"
    assert caplog.messages == [message]
    assert capsys.readouterr().err == f"fastrnn: {message}\n"
    np.testing.assert_array_equal(backend.get(out), 1)


# --- generation ------------------------------------------------------------------------------

DECODINGS = [
    Decoding(),
    Decoding(temperature=1.0, seed=7),
    Decoding(temperature=0.7, top_k=3, seed=2**63 + 5),
    Decoding(temperature=1.3, top_p=0.6, seed=11),
    Decoding(temperature=2.0, top_k=5, top_p=0.8, seed=1),
]


def prompts(inputs: Inputs) -> tuple[Any, Any]:
    return inputs.tokens(3, 4), np.array([4, 1, 2], np.int32)


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_generates_the_tokens_of_the_numpy_backend(
    backend: NumbaCudaBackend, decoding: Decoding
) -> None:
    inputs = Inputs(1, 1, 19, 13, np.float32)
    params = inputs.params(scale=0.8)
    prefix, lengths = prompts(inputs)
    on_device = {name: backend.put(p) for name, p in params.items()}
    numpy_ = open_backend("numpy")
    want, state = numpy_.generate(params, prefix, lengths, 6, decoding, sequence=2, position=3)
    got, h = backend.generate(on_device, prefix, lengths, 6, decoding, sequence=2, position=3)
    np.testing.assert_array_equal(got, want)
    assert_close("recurrence", h, state)
    # And goes on exactly where it stopped.
    more = {"sequence": 2, "position": 9}
    ones = np.ones(3, np.int32)
    want, _ = numpy_.generate(params, want[:, -1:], ones, 3, decoding, h0=state, **more)
    got, _ = backend.generate(on_device, got[:, -1:], ones, 3, decoding, h0=h, **more)
    np.testing.assert_array_equal(got, want)


def check_ties_go_to_the_lowest_index(backend: NumbaCudaBackend) -> None:
    params = Inputs(1, 1, 3, 9, np.float32).params()
    params["W_hq"][:] = 0
    params["b_q"][:] = [0, 1, 5, 0, 5, 2, 5, 0, 0]
    on_device = {name: backend.put(p) for name, p in params.items()}
    one = np.ones((1, 1), np.int32)
    tokens, _ = backend.generate(on_device, one, one[0], 2, Decoding())
    assert tokens.tolist() == [[2, 2]]
    # top-k 1 keeps the first of the tied tokens and nothing else.
    sampled = Decoding(temperature=1.0, top_k=1, seed=3)
    tokens, _ = backend.generate(on_device, one, one[0], 2, sampled)
    assert tokens.tolist() == [[2, 2]]


def test_ties_go_to_the_lowest_index(backend: NumbaCudaBackend) -> None:
    check_ties_go_to_the_lowest_index(backend)


def test_logits_that_are_not_numbers_still_give_a_token(backend: NumbaCudaBackend) -> None:
    params = Inputs(1, 1, 3, 9, np.float32).params()
    params["b_q"][4] = np.nan
    on_device = {name: backend.put(p) for name, p in params.items()}
    one = np.ones((1, 1), np.int32)
    tokens, _ = backend.generate(on_device, one, one[0], 1, Decoding())
    assert tokens.tolist() == [[4]]  # as numpy.argmax
    tokens, _ = backend.generate(on_device, one, one[0], 1, Decoding(temperature=1.0))
    assert 0 <= tokens[0, 0] < 9


# --- arrays of others ------------------------------------------------------------------------


def test_an_array_on_the_host_is_refused_by_name(backend: NumbaCudaBackend) -> None:
    z = np.zeros((1, 1, 2), np.float32)
    with pytest.raises(TypeError, match=r"__cuda_array_interface__.*got numpy.ndarray"):
        backend.recurrence(z, z[0], z[0])


def test_a_transposed_array_is_refused(backend: NumbaCudaBackend) -> None:
    turned = cuda.to_device(np.zeros((3, 2), np.float32, order="F"))
    with pytest.raises(ValueError, match=r"C order, got strides \(4, 12\)"):
        backend.put(np.zeros((3, 2), np.float32), out=turned)


# --- wrong twins -----------------------------------------------------------------------------


def twin(right: str, wrong: str) -> types.SimpleNamespace:
    """The kernels with one line of one file changed."""
    files = [module for module in vars(kernels).values() if inspect.ismodule(module)]
    sources = [source for source in map(inspect.getsource, files) if right in source]
    assert len(sources) == 1, f"{len(sources)} files of the kernels contain {right!r}"
    module = types.ModuleType("fastrnn_wrong_twin")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(sources[0].replace(right, wrong), f"twin of {right!r}", "exec"), module.__dict__)
    changed = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    return types.SimpleNamespace(**{**vars(kernels), **changed})


def check_recurrence(backend: NumbaCudaBackend) -> None:
    for shape in ((3, 2, 16, 2), (2, 2, 19, 2)):
        inputs = Inputs(*shape, np.float32)
        T, B, H = shape[:3]
        z, h0 = inputs.array(T, B, H), inputs.array(B, H)
        W = inputs.array(H, H, scale=0.5)
        h = OnBackend(backend)("recurrence", z, W, h0)
        assert_close("recurrence", h, recurrence_oracle(z, W, h0))


def check_gather_backward(backend: NumbaCudaBackend) -> None:
    inputs = Inputs(5, 4, 6, 7, np.float32)
    test_gather_backward(OnBackend(backend), inputs, "random")


def check_cross_entropy(backend: NumbaCudaBackend) -> None:
    test_cross_entropy(OnBackend(backend), Inputs(2, 2, 1, 19, np.float32), 1.0)


def check_clip(backend: NumbaCudaBackend) -> None:
    test_clip_by_global_norm(backend, Inputs(1, 1, 6, 7, np.float32), 0.5)


def check_project(backend: NumbaCudaBackend) -> None:
    test_project(OnBackend(backend), Inputs(3, 3, 22, 9, np.float32))


def check_recurrence_backward(backend: NumbaCudaBackend) -> None:
    test_recurrence_backward(OnBackend(backend), Inputs(3, 2, 16, 2, np.float32))


def check_samples(backend: NumbaCudaBackend) -> None:
    for decoding in DECODINGS[1:]:
        test_generates_the_tokens_of_the_numpy_backend(backend, decoding)


BARRIER = "cuda.syncthreads()"

# (what is wrong, the right line, the wrong one, the check that must reject it)
TWINS: list[tuple[str, str, str, Callable[[NumbaCudaBackend], None]]] = [
    (
        "no barrier before the slices' sums are read",
        f"{BARRIER}\n            if tid < H:\n                total = ahead",
        "pass\n            if tid < H:\n                total = ahead",
        check_recurrence,
    ),
    (
        "no barrier before the next state is read",
        f"while row < end:\n            {BARRIER}",
        "while row < end:\n            pass",
        check_recurrence,
    ),
    (
        "rows outside the registers dropped",
        "for k in range(KEPT + STAGED, ROWS):",
        "for k in range(ROWS, ROWS):",
        check_recurrence,
    ),
    (
        "no barrier between dz and the product with it",
        f"{BARRIER}\n            multiply(state, acc, w, staged, Wt",
        "multiply(state, acc, w, staged, Wt",
        check_recurrence_backward,
    ),
    ("tanh' forgotten", "* (one - hidden * hidden)", "* one", check_recurrence_backward),
    (
        "h not shifted by a step in dW_hh",
        "A[at_a - behind]",
        "A[at_a]",
        check_recurrence_backward,
    ),
    (
        "last occurrence of a token dropped",
        "range(bounds[v] + row, bounds[v + 1], ROWS)",
        "range(bounds[v] + row, bounds[v + 1] - 1, ROWS)",
        check_gather_backward,
    ),
    ("rows not sorted by token", "order[count] = q", "order[q] = q", check_gather_backward),
    (
        "last row of K dropped",
        "min(u32(part), u32(K - begin))",
        "min(u32(part), u32(K - begin - 1))",
        check_project,
    ),
    ("one buffer for two tiles", "buffer = u32(1 - buffer)", "pass", check_project),
    (
        "sums not rescaled to the row's maximum",
        "total *= math.exp(high - row_high)",
        "pass",
        check_cross_entropy,
    ),
    (
        "clipped by the squared norm",
        "rates[1] / total if",
        "rates[1] / (total * total) if",
        check_clip,
    ),
    ("nine rounds of Philox", "range(PHILOX_ROUNDS)", "range(PHILOX_ROUNDS - 1)", check_samples),
    ("one token too many in top-k", "ranked >= top_k", "ranked > top_k", check_samples),
    (
        "ties to the highest index",
        "(x == y and i < j)",
        "(x == y and i > j)",
        check_ties_go_to_the_lowest_index,
    ),
]


@pytest.mark.parametrize(
    "check", dict.fromkeys(t[3] for t in TWINS), ids=lambda check: str(check.__name__)
)
def test_the_right_kernels_pass(check: Any, backend: NumbaCudaBackend) -> None:
    check(backend)


@pytest.mark.parametrize(
    ("right", "wrong", "check"), [t[1:] for t in TWINS], ids=[t[0] for t in TWINS]
)
def test_wrong_twins_are_rejected(right: str, wrong: str, check: Any) -> None:
    backend = NumbaCudaBackend(TOY, twin(right, wrong))
    with pytest.raises(AssertionError):
        check(backend)
