"""Generation in CUDA C, in the emulator: the tokens of ``fastrnn/decoding.py``'s definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastrnn.cuda import generate as launch
from fastrnn.cuda.device import KERNELS, Device, Kernel
from fastrnn.decoding import Decoding, choose, uniform
from tests import generation
from tests.cuda_sanitized import sanitized, scratch_of
from tests.cuda_support import ORDERS, emulated
from tests.emulated_device import EmulatedDevice
from tests.emulator import EmulatorError, SanitizerError
from tests.emulator.module import Order
from tests.generation import GREEDY, Continuation, check

DECODINGS = {
    "greedy": GREEDY,
    "temperature": Decoding(temperature=1.0, seed=2**63 + 5),
    "top-k": Decoding(temperature=0.8, top_k=5, seed=1),
    "top-p": Decoding(temperature=1.3, top_p=0.7, seed=2),
    "both": Decoding(temperature=1.1, top_k=9, top_p=0.9, seed=3),
}
BOTH = DECODINGS["both"]

# --- engines ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A device on which the launcher chooses a certain kernel.

    Attributes:
        rows: sequences of a block or cluster where there are three or more.
        shared_bytes: what a block may have; None: what the GPU gives.
    """

    kernel: str
    capability: int
    multiprocessors: int
    shared_bytes: int | None = None

    def device(self, order: Order = "forward", **options: Any) -> EmulatedDevice:
        made = emulated(
            self.capability, multiprocessors=self.multiprocessors, order=order, **options
        )
        if self.shared_bytes is not None:
            made.arch = replace(made.arch, shared_bytes=self.shared_bytes)
        return made


ENGINES = {
    "block": Engine("generate_kernel", 80, 128),
    "rows": Engine("generate_kernel", 80, 2),
    "block, global memory": Engine("generate_kernel", 86, 128, 10_000),
    "rows, global memory": Engine("generate_kernel", 75, 2, 38_500),
    "cluster": Engine("generate_cluster_kernel", 90, 64),
    "cluster of rows": Engine("generate_cluster_kernel", 90, 8),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


@pytest.fixture(params=["block", "rows", "cluster", "cluster of rows"])
def resident(request: pytest.FixtureRequest) -> Engine:
    """The engines that keep everything on chip."""
    return ENGINES[request.param]


# --- calls -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call(Continuation):
    """A continuation that a device runs."""

    def run(self, device: Device) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """Tokens and state."""
        state = device.put(self.start)
        tokens = device.empty((len(self.prefix), self.num_tokens), np.int32)
        launch.generate(
            device,
            {name: device.put(p) for name, p in self.params.items()},
            device.put(self.prefix),
            device.put(self.lengths),
            tokens,
            state,
            self.num_tokens,
            self.decoding,
            self.position,
            self.sequence,
            scratch_of(device),
        )
        return device.get(tokens), device.get(state)


def draw(
    S: int, P: int, num_tokens: int, H: int, V: int, decoding: Decoding = GREEDY,
    dtype: Any = np.float32, seed: int = 0,
) -> Call:  # fmt: skip
    """A random model and prefixes of mixed lengths."""
    return Call(**vars(generation.draw(S, P, num_tokens, H, V, decoding, dtype, seed)))


# --- random models ---------------------------------------------------------------------------

SIZES = {
    # S, P, tokens, H, V
    "smallest": (1, 1, 4, 1, 2),
    "odd": (3, 4, 8, 33, 31),
    "many": (17, 3, 4, 64, 257),
    "wide": (3, 2, 3, 100, 257),
    "headline": (1, 2, 3, 256, 1027),
}


@pytest.mark.parametrize(
    ("size", "decoding"),
    [("odd", name) for name in DECODINGS]
    + [(size, name) for size in SIZES if size != "odd" for name in ("greedy", "both")],
)
def test_tokens_and_state(engine: Engine, size: str, decoding: str) -> None:
    device = engine.device()
    call = draw(*SIZES[size], DECODINGS[decoding])
    check(call, *call.run(device))
    assert [kernel.name for kernel in device.launched] == [engine.kernel]


@pytest.mark.parametrize("name", ["block", "rows", "block, global memory", "rows, global memory"])
def test_float64(name: str) -> None:
    for decoding in (GREEDY, BOTH):
        call = draw(5, 3, 6, 33, 41, decoding, np.float64)
        check(call, *call.run(ENGINES[name].device()))


@pytest.mark.parametrize("size", [(2, 2, 3, 300, 65), (1, 1, 2, 37, 20_000)], ids=["H", "V"])
def test_what_does_not_fit_a_cluster_goes_to_the_general_kernel(
    size: tuple[int, int, int, int, int],
) -> None:
    device = ENGINES["cluster"].device()
    call = draw(*size, decoding=BOTH)
    check(call, *call.run(device))
    assert device.launched[0].name == "generate_kernel"


def test_without_room_for_a_cluster_the_general_kernel_runs() -> None:
    device = emulated(90, multiprocessors=7)
    call = draw(2, 1, 2, 8, 9)
    check(call, *call.run(device))
    assert device.launched[0].name == "generate_kernel"


@pytest.mark.parametrize(
    ("V", "all_resident"), [(1027, True), (1700, False), (2624, False)], ids=["all", "most", "full"]
)
@pytest.mark.parametrize("decoding", ["greedy", "top-k"])
def test_output_layers_larger_than_the_registers(V: int, all_resident: bool, decoding: str) -> None:
    device = ENGINES["cluster of rows"].device()
    call = draw(2, 1, 3, 250, V, DECODINGS[decoding])
    fits = launch._cluster_plan(device, launch.Sizes(2, 1, 3, 250, V), decoding == "greedy")
    check(call, *call.run(device))
    assert device.launched[0].name == ("generate_cluster_kernel" if fits else "generate_kernel")
    if decoding == "greedy":
        assert fits is not None
        assert fits[1] == all_resident


def test_the_same_bits_in_every_order_of_threads(engine: Engine) -> None:
    for decoding in (GREEDY, BOTH):
        call = draw(3, 2, 4, 33, 31, decoding)
        tokens, state = call.run(engine.device())
        for order in ORDERS[1:4]:
            again, end = call.run(engine.device(order))
            np.testing.assert_array_equal(again, tokens, str(order))
            np.testing.assert_array_equal(end, state, str(order))


def test_every_kernel_is_among_the_variants(engine: Engine) -> None:
    def text(kernel: Kernel) -> Kernel:
        return replace(kernel, shared_bytes=0)

    known = {text(kernel) for kernel in launch.variants()}
    device = engine.device()
    for decoding in (GREEDY, BOTH):
        draw(3, 1, 2, 33, 31, decoding).run(device)
    assert {text(kernel) for kernel in device.launched} <= known


# --- going on --------------------------------------------------------------------------------


def test_a_continuation_goes_on_exactly(resident: Engine) -> None:
    call = draw(3, 3, 7, 24, 40, BOTH)
    whole, end = call.run(resident.device())
    first, middle = replace(call, num_tokens=3).run(resident.device())
    last, state = replace(
        call,
        prefix=first[:, -1:],
        lengths=np.ones(3, np.int32),
        num_tokens=4,
        h0=middle,
        position=3,
    ).run(resident.device())
    np.testing.assert_array_equal(np.hstack([first, last]), whole)
    np.testing.assert_array_equal(state, end)


def test_long_continuations_take_several_launches(
    resident: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw(3, 3, 6, 24, 40, BOTH)
    tokens, state = call.run(resident.device())
    monkeypatch.setattr(launch, "LAUNCH_STEPS", 2)
    device = resident.device()
    again, end = call.run(device)
    assert len(device.launched) == 5
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_array_equal(end, state)


def test_sequences_draw_from_streams_of_their_own(resident: Engine) -> None:
    hot = Decoding(temperature=2.0, seed=9)
    call = replace(draw(3, 1, 8, 24, 40, hot), prefix=np.zeros((3, 1), np.int32))
    together, _ = call.run(resident.device())
    assert len({tuple(row) for row in together}) == 3
    alone, _ = replace(call, prefix=call.prefix[:1], lengths=call.lengths[:1], sequence=2).run(
        resident.device()
    )
    np.testing.assert_array_equal(alone[0], together[2])


def test_counters_beyond_32_bits_wrap() -> None:
    device = ENGINES["rows"].device()
    hot = Decoding(temperature=2.0, seed=2**64 - 1)
    call = replace(draw(2, 1, 4, 8, 40, hot), position=2**32 - 2, sequence=2**32 - 1)
    check(call, *call.run(device))


# --- the choice from given logits --------------------------------------------------------------


def given(logits: NDArray[Any], S: int, num_tokens: int, decoding: Decoding) -> Call:
    """A model whose logits are these, to the bit, at every step."""
    V, dtype = len(logits), logits.dtype
    params = {
        "W_xh": np.zeros((V, 1), dtype),
        "W_hh": np.zeros((1, 1), dtype),
        "b_h": np.zeros(1, dtype),
        "W_hq": np.zeros((1, V), dtype),
        "b_q": logits,
    }
    return Call(params, np.zeros((S, 1), np.int32), np.ones(S, np.int32), num_tokens, decoding)


def definition(call: Call) -> NDArray[np.int32]:
    logits = call.params["b_q"]
    rows, columns = range(len(call.prefix)), range(call.num_tokens)
    return np.array(
        [[choose(logits, call.decoding, call.uniform(s, i)) for i in columns] for s in rows],
        np.int32,
    )


def rounded_logits(V: int) -> NDArray[np.float64]:
    """Logits on a grid: many of them equal."""
    return np.round(np.random.default_rng(V).normal(0, 2, V) * 4) / 4


LOGITS: dict[str, NDArray[Any]] = {
    "one": np.array([3.0]),
    "two zeros": np.array([-0.0, 0.0, -1.0]),
    "equal": np.full(65, -7.25),
    "grid": rounded_logits(41),
    "large grid": rounded_logits(1027),
    "far apart": np.linspace(-2000.0, 3000.0, 130),
    "close": 1.0 + np.arange(40)[::-1] * 2.0**-23,
    "some impossible": np.where(np.arange(70) % 3, rounded_logits(70), -np.inf),
    "large": np.array([3e38, -3e38, 2.9e38, 0.0]),
}
CHOICES = {
    **DECODINGS,
    "top-1": Decoding(temperature=1.0, top_k=1),
    "hot": Decoding(temperature=1e10, top_k=7, seed=4),
    "cold": Decoding(temperature=1e-3, top_p=0.5, seed=4),
    "almost all": Decoding(temperature=3.0, top_k=60, top_p=1 - 1e-9, seed=5),
    "half": Decoding(temperature=1.0, top_p=0.5, seed=6),
}


def check_choices(engine: Engine, logits: NDArray[Any], S: int, decoding: Decoding) -> None:
    call = given(logits, S, 4, decoding)
    tokens, _ = call.run(engine.device())
    np.testing.assert_array_equal(tokens, definition(call), str(decoding))


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", ["block", "rows"])
def test_choices_are_those_of_the_definition(name: str, logits: str) -> None:
    for decoding in CHOICES.values():
        check_choices(ENGINES[name], LOGITS[logits].astype(np.float32), 16, decoding)


@pytest.mark.parametrize("logits", ["one", "two zeros", "large grid"])
@pytest.mark.parametrize("name", ["cluster", "cluster of rows"])
def test_choices_of_clusters(name: str, logits: str) -> None:
    for decoding in ("greedy", "both", "half"):
        check_choices(ENGINES[name], LOGITS[logits].astype(np.float32), 3, CHOICES[decoding])


@pytest.mark.parametrize("logits", ["grid", "close", "far apart"])
@pytest.mark.parametrize("name", ["block", "rows"])
def test_choices_in_float64(name: str, logits: str) -> None:
    for decoding in CHOICES.values():
        check_choices(ENGINES[name], LOGITS[logits], 8, decoding)


@pytest.mark.parametrize("seed", [12121362, 16390493], ids=["0", "1 - 2**-24"])
def test_extreme_uniforms(resident: Engine, seed: int) -> None:
    assert uniform(seed, 0, 0) in (0.0, 1 - 2.0**-24)
    # The first token's weight is 1e-30, the last one's 0.
    logits = np.array([-69.0, 0.0, -1.0, 0.0, -1000.0], np.float32)
    for extra in ({}, {"top_k": 3}, {"top_p": 0.9}):
        call = given(logits, 1, 1, Decoding(temperature=1.0, seed=seed, **extra))
        tokens, _ = call.run(resident.device())
        np.testing.assert_array_equal(tokens, definition(call))


@pytest.mark.parametrize(
    ("logits", "want"),
    [
        (np.array([1.0, np.nan, 2.0, np.nan]), 1),
        (np.full(40, np.nan), 0),
        (np.array([0.0, np.inf, 1.0, np.inf]), 1),
        (np.full(5, -np.inf), 0),
    ],
    ids=["some NaN", "all NaN", "infinity", "minus infinity"],
)
def test_no_distribution_still_gives_a_token(
    resident: Engine, logits: NDArray[Any], want: int
) -> None:
    for decoding in (GREEDY, BOTH):
        call = given(logits.astype(np.float32), 3, 2, decoding)
        tokens, _ = call.run(resident.device())
        np.testing.assert_array_equal(tokens, want)


def test_a_state_of_nan_stays_one(resident: Engine) -> None:
    for decoding in (GREEDY, BOTH):
        call = draw(3, 2, 3, 33, 31, decoding)
        h0 = np.zeros((3, 33), np.float32)
        h0[1, 5] = np.nan
        tokens, state = replace(call, h0=h0).run(resident.device())
        assert tokens.min() >= 0
        assert tokens.max() < 31
        np.testing.assert_array_equal(np.isnan(state).all(axis=1), [False, True, False])
        clean, _ = call.run(resident.device())
        np.testing.assert_array_equal(tokens[[0, 2]], clean[[0, 2]])


# --- wrong twins -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Twin:
    """A passage of a kernel file, which occurs once, and what stands there instead."""

    file: str
    right: str
    wrong: str
    engine: str
    found: Callable[[Engine, dict[str, Path]], None] = field(repr=False)

    def sources(self, folder: Path) -> dict[str, Path]:
        """The engine's kernel file, beside the changed file."""
        text = (KERNELS / self.file).read_text(encoding="utf-8")
        assert text.count(self.right) == 1, f"{text.count(self.right)} times {self.right!r}"
        stem = ENGINES[self.engine].kernel.removesuffix("_kernel")
        main = folder / f"{stem}.cu"
        main.write_bytes((KERNELS / main.name).read_bytes())
        (folder / self.file).write_text(text.replace(self.right, self.wrong), encoding="utf-8")
        return {stem: main}


def random_models(engine: Engine, sources: dict[str, Path]) -> None:
    for order in ORDERS:
        for decoding in (GREEDY, BOTH):
            call = draw(3, 2, 4, 33, 31, decoding)
            check(call, *call.run(engine.device(order, sources=sources)))


def given_logits(engine: Engine, sources: dict[str, Path]) -> None:
    for logits in ("equal", "grid"):
        for decoding in (GREEDY, DECODINGS["top-k"], CHOICES["half"]):
            call = given(LOGITS[logits].astype(np.float32), 16, 4, decoding)
            tokens, _ = call.run(engine.device(sources=sources))
            np.testing.assert_array_equal(tokens, definition(call))


TWINS = {
    "nine rounds": Twin(
        "philox.cuh", "PHILOX_ROUNDS = 10", "PHILOX_ROUNDS = 9", "rows", random_models
    ),
    "ties to the highest index": Twin(
        "choose.cuh", "other_index < index", "other_index > index", "rows", given_logits
    ),
    "one token too many": Twin(
        "choose.cuh", "how.top_p : how.top_k;", "how.top_p : how.top_k + 1;", "block", given_logits
    ),
    "strict bound of top-p": Twin(
        "choose.cuh", ">= wanted) enough = middle", "> wanted) enough = middle", "block",
        given_logits,
    ),
    "no barrier before the sums": Twin(
        "generate.cu", "__syncthreads();   // logits and sums are whole", "//", "block",
        random_models,
    ),
    "the last state once more": Twin(
        "generate_cluster.cu", "h_old = at + 4 * now", "h_old = at + 4 * (1 - now)", "cluster",
        random_models,
    ),
    "no wait for the state": Twin(
        "generate_cluster.cu", "if (m > 0) mbarrier_wait(", "if (m < 0) mbarrier_wait(", "cluster",
        random_models,
    ),
    "no wait for the bests": Twin(
        "generate_cluster.cu",
        "            if (has_units) {\n                mbarrier_wait(&fixed.choice_full, phase);\n",
        "            if (has_units) {\n", "cluster", random_models,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_wrong_twins_are_found(name: str, tmp_path: Path) -> None:
    wrong = TWINS[name]
    with pytest.raises((AssertionError, EmulatorError)):
        wrong.found(ENGINES[wrong.engine], wrong.sources(tmp_path))


def test_a_right_twin_is_not_found(tmp_path: Path) -> None:
    for found in (random_models, given_logits):
        twin = Twin("philox.cuh", "ROUNDS = 10", "ROUNDS = 10", "block", found)
        found(ENGINES["block"], twin.sources(tmp_path))


# --- sanitizers ------------------------------------------------------------------------------


def toys(engine: str) -> Iterator[tuple[Engine, Call]]:
    """Small calls, one for each compiled kernel of an engine."""
    for decoding in (GREEDY, BOTH) if "cluster" in engine else (BOTH,):
        yield ENGINES[engine], draw(2, 1, 2, 9, 11, decoding)


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("name", ["rows", "block, global memory", "cluster of rows"])
def test_under_a_sanitizer(kind: Any, name: str) -> None:
    for engine, call in toys(name):
        device = sanitized(kind, engine.capability, multiprocessors=engine.multiprocessors)
        if engine.shared_bytes is not None:
            device.arch = replace(device.arch, shared_bytes=engine.shared_bytes)
        check(call, *call.run(device))


def test_a_missing_barrier_is_a_race(tmp_path: Path) -> None:
    wrong = Twin(
        "generate.cu", "__syncthreads();   // the state is whole", "//", "block", random_models
    )
    device = sanitized("thread", 80, multiprocessors=128, sources=wrong.sources(tmp_path))
    with pytest.raises(SanitizerError):
        draw(1, 2, 3, 9, 200, BOTH).run(device)
