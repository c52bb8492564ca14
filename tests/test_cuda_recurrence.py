"""The fused recurrence in CUDA C, in the emulator, against NumPy in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastrnn.cuda import recurrence as launch
from fastrnn.cuda.device import KERNELS, Array, Device
from tests.conftest import Inputs
from tests.cuda_sanitized import sanitized
from tests.cuda_support import ORDERS, emulated
from tests.emulated_device import EmulatedDevice
from tests.emulator import EmulatorError, SanitizerError
from tests.emulator.build import Sanitizer
from tests.tolerances import assert_close, relative_rms

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """Shapes, and a GPU on which the launchers take one plan or the other for them."""

    capability: int
    multiprocessors: int
    T: int
    B: int
    H: int

    def __str__(self) -> str:
        return f"sm_{self.capability}x{self.multiprocessors}-{self.T}-{self.B}-{self.H}"

    def device(self, **options: Any) -> EmulatedDevice:
        return emulated(self.capability, multiprocessors=self.multiprocessors, **options)


BLOCK = [
    # a block a row: on one multiprocessor the last rows wait for the first
    Case(75, 1, 1, 1, 1),
    Case(90, 1, 5, 19, 31),
    Case(120, 4, 4, 3, 32),
    Case(80, 1, 3, 11, 33),
    Case(86, 2, 6, 3, 64),
    Case(90, 4, 7, 1, 65),
    Case(75, 1, 2, 5, 128),
    Case(75, 1, 4, 3, 130),
    Case(89, 2, 5, 2, 256),
    Case(80, 1, 3, 2, 255),
    Case(90, 4, 4, 2, 201),
]
CLUSTER = [
    # a cluster a row
    Case(90, 132, 1, 1, 129),
    Case(90, 132, 2, 3, 200),
    Case(100, 8, 7, 2, 256),
    Case(90, 4, 6, 1, 255),
    Case(90, 8, 3, 2, 257),
    Case(120, 132, 5, 2, 511),
    Case(90, 132, 4, 1, 512),
]
SMALL = [Case(80, 1, 3, 18, 29), Case(80, 1, 3, 2, 256), Case(90, 8, 4, 2, 190)]
"""Of each kind of kernel one."""


def up(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.astype(np.float64)


# --- the three ops: inputs, oracle, launch ---------------------------------------------------


def make(case: Case, seed: int = 0) -> Arrays:
    T, B, H, V = case.T, case.B, case.H, 11
    inputs = Inputs(T, B, H, V, np.float32, seed)
    arrays = {
        "z": inputs.array(T, B, H),
        "h0": inputs.array(B, H, scale=0.5),
        "W_hh": inputs.array(H, H, scale=H**-0.5),
        "W_xh": inputs.array(V, H, scale=0.5),
        "b_h": inputs.array(H, scale=0.1),
        "x": inputs.tokens(3, T, B),
        "dh": inputs.array(T, B, H),
    }
    return arrays | {"h": forward(arrays, np.float64)["h"].astype(np.float32)}


def forward(given: Arrays, dtype: Any) -> Arrays:
    z, W_hh, state = (given[n].astype(dtype) for n in ("z", "W_hh", "h0"))
    h = np.empty_like(z)
    for t in range(len(z)):
        state = np.tanh(z[t] + state @ W_hh)
        h[t] = state
    return {"h": h}


def gathered(given: Arrays, dtype: Any) -> Arrays:
    z = given["W_xh"].astype(dtype)[given["x"][1]] + given["b_h"].astype(dtype)
    return forward(given | {"z": z}, dtype)


def backward(given: Arrays, dtype: Any) -> Arrays:
    dh, h, W_hh = (given[n].astype(dtype) for n in ("dh", "h", "W_hh"))
    dz, carry = np.empty_like(dh), np.zeros_like(dh[0])
    for t in reversed(range(len(dh))):
        dz[t] = (dh[t] + carry) * (1 - h[t] ** 2)
        carry = dz[t] @ W_hh.T
    return {"dz": dz, "dh0": carry}


Place = Callable[[Device, NDArray[Any]], Array]


def put(device: Device, host: NDArray[Any]) -> Array:
    return device.put(host)


def unaligned(device: Device, host: NDArray[Any]) -> Array:
    """A copy that starts one element behind a multiple of 16 bytes, as a slice may."""
    flat = device.empty((host.size + 1,), host.dtype)[1:]
    flat[:] = host.ravel()
    return flat.reshape(host.shape)


def run(
    op: str, device: Device, given: Arrays, inplace: bool = False, place: Place = put
) -> Arrays:
    """One launch; ``inplace``: z and h, dh and dz are one array."""
    array = {name: place(device, host) for name, host in given.items()}
    nan = np.full_like(given["h"], np.nan)
    if op == "recurrence_backward":
        dz = array["dh"] if inplace else place(device, nan)
        dh0 = device.empty(given["h0"].shape, np.float32)
        launch.recurrence_backward(device, array["dh"], array["h"], array["W_hh"], dz, dh0)
        return {"dz": dz, "dh0": dh0}
    h = array["z"] if inplace else place(device, nan)
    if op == "recurrence":
        launch.recurrence(device, array["z"], array["W_hh"], array["h0"], h)
    else:
        cursor = device.put(np.array([1], np.int32))
        x, W_xh, b_h, W_hh, h0 = (array[n] for n in ("x", "W_xh", "b_h", "W_hh", "h0"))
        launch.recurrence_gathered(device, x, cursor, W_xh, b_h, W_hh, h0, h)
    return {"h": h}


ORACLES = {"recurrence": forward, "recurrence_gathered": gathered, "recurrence_backward": backward}


def check(op: str, given: Arrays, got: Arrays) -> None:
    """Within the tolerance, and not worse than twice what NumPy in float32 gives."""
    want, plain = ORACLES[op](given, np.float64), ORACLES[op](given, np.float32)
    for name, w in want.items():
        assert_close(op.replace("_gathered", ""), got[name], w, name)
        assert relative_rms(got[name], w) <= 2 * relative_rms(plain[name], w) + 1e-7


@pytest.fixture(params=launch.OPS)
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("case", BLOCK + CLUSTER, ids=str)
def test_against_the_oracle(op: str, case: Case, inplace: bool) -> None:
    device, given = case.device(), make(case)
    check(op, given, run(op, device, given, inplace))
    (kernel,) = device.launched
    assert kernel.file == ("recurrence" if case in BLOCK else "recurrence_cluster")


def test_the_cases_above_launch_every_kernel() -> None:
    launched = set()
    for op in launch.OPS:
        for case in BLOCK + CLUSTER:
            device = case.device()
            run(op, device, make(case))
            launched |= set(device.launched)
    assert launched == set(launch.variants())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_arrays_may_start_at_any_element(op: str, case: Case) -> None:
    given = make(case)
    check(op, given, run(op, case.device(), given, place=unaligned))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_same_bits_in_any_order_of_threads(op: str, case: Case) -> None:
    given = make(case)
    first = run(op, case.device(), given)
    for order in (*ORDERS, "forward"):
        for name, got in run(op, case.device(order=order), given, inplace=True).items():
            np.testing.assert_array_equal(got, first[name], err_msg=f"{name} in order {order}")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_row_does_not_depend_on_the_others(op: str, case: Case) -> None:
    """Nor on which block takes it: the same bits alone and in a batch."""
    given = make(case)
    together = run(op, case.device(), given)
    alone = {
        name: np.ascontiguousarray(a[-1:] if name == "h0" else a[..., -1:] if name == "x" else a)
        for name, a in given.items()
    }
    for name in ("z", "h", "dh"):
        alone[name] = np.ascontiguousarray(given[name][:, -1:])
    for name, got in run(op, case.device(), alone).items():
        row = together[name][-1:] if name == "dh0" else together[name][:, -1:]
        np.testing.assert_array_equal(got, row, err_msg=name)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_tokens_of_the_first_batch_without_a_cursor(case: Case) -> None:
    given, device = make(case), case.device()
    names = ("x", "W_xh", "b_h", "W_hh", "h0")
    x, W_xh, b_h, W_hh, h0 = (device.put(given[n]) for n in names)
    h = device.empty(given["h"].shape, np.float32)
    launch.recurrence_gathered(device, x[0], None, W_xh, b_h, W_hh, h0, h)
    assert_close("recurrence", h, gathered(given | {"x": given["x"][[0, 0]]}, np.float64)["h"])


@pytest.mark.parametrize("V", [1, 10_000], ids=["one distinct token", "all distinct tokens"])
def test_few_and_many_tokens(V: int) -> None:
    case = SMALL[0]
    given = make(case)
    given["W_xh"] = Inputs(1, 1, case.H, V, np.float32).array(V, case.H)
    tokens = np.random.default_rng(0).permutation(V)[: case.T * case.B] if V > 1 else 0
    given["x"][1] = np.reshape(tokens, (case.T, case.B)) if V > 1 else 0
    given["x"][0] = given["x"][2] = V - 1
    check("recurrence_gathered", given, run("recurrence_gathered", case.device(), given))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_initial_state_may_be_the_last_step_of_h(case: Case) -> None:
    """Carried from batch to batch without a copy."""
    given, device = make(case), case.device()
    h = device.put(given["h"])
    given["h0"] = given["h"][-1]
    z, W_hh = device.put(given["z"]), device.put(given["W_hh"])
    launch.recurrence(device, z, W_hh, h[-1], h)
    check("recurrence", given, {"h": h})


# --- which plan ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "B", "H", "name", "blocks"),
    [
        (90, 132, 33, 256, "recurrence_cluster_kernel", 132),  # all rows are resident at once
        (90, 132, 34, 256, "recurrence_kernel", 34),
        (90, 132, 1000, 256, "recurrence_kernel", 132),
        (90, 132, 33, 128, "recurrence_kernel", 33),
        (90, 132, 1000, 128, "recurrence_kernel", 264),
        (89, 128, 2, 256, "recurrence_kernel", 2),
        (90, 132, 64, 300, "recurrence_cluster_kernel", 512),
    ],
)
def test_the_choice_of_a_plan(
    capability: int, multiprocessors: int, B: int, H: int, name: str, blocks: int
) -> None:
    submitted: list[tuple[str, Any]] = []

    class Recorder(EmulatedDevice):
        def launch(self, kernel: Any, grid: Any, args: Any) -> None:
            submitted.append((kernel.name, grid))

    h = np.broadcast_to(np.float32(0), (1, B, H))
    emulated(capability)  # skips where the emulator cannot run
    launch.recurrence(Recorder(capability, multiprocessors), h, h, h, h)
    assert submitted == [(name, blocks)]


def test_which_sizes_fit() -> None:
    assert launch.fits(1, np.float32)
    assert launch.fits(256, np.float32)
    assert not launch.fits(257, np.float32)
    assert not launch.fits(64, np.float64)
    hopper = emulated(90, multiprocessors=132)
    assert launch.fits(257, np.float32, hopper)
    assert launch.fits(512, np.float32, hopper, 64)
    assert not launch.fits(512, np.float32, hopper, 65)
    assert not launch.fits(513, np.float32, hopper)
    assert not launch.fits(257, np.float32, emulated(90, multiprocessors=7))
    assert not launch.fits(257, np.float32, emulated(89, multiprocessors=132))


# --- tanh, and values that are not finite ----------------------------------------------------


def altered(folder: Path, *changes: tuple[str, str]) -> dict[str, Path]:
    """``sources`` in which passages differ; each occurs once in one of the kernels' files."""
    files = ("recurrence.cuh", "recurrence.cu", "recurrence_cluster.cu")
    for file in files:
        shutil.copy(KERNELS / file, folder)
    for right, wrong in changes:
        texts = {file: (folder / file).read_text(encoding="utf-8") for file in files}
        holders = [file for file, text in texts.items() if text.count(right) == 1]
        assert sum(text.count(right) for text in texts.values()) == 1, right
        (folder / holders[0]).write_text(texts[holders[0]].replace(right, wrong), encoding="utf-8")
    return {Path(file).stem: folder / file for file in files[1:]}


def tanh_of(x: NDArray[np.float32], sources: dict[str, Path] | None = None) -> NDArray[Any]:
    """What the kernels' tanh gives: a recurrence of one step without a past."""
    H = 32
    z = np.zeros((1, -(-x.size // H), H), np.float32)
    z.ravel()[: x.size] = x
    device = emulated(90, multiprocessors=1, sources=sources)
    h, W_hh, h0 = device.put(z), device.put(np.zeros((H, H))), np.zeros(z[0].shape)
    W_hh, h0 = W_hh.astype(np.float32), device.put(h0.astype(np.float32))
    launch.recurrence(device, h, W_hh, h0, h)
    result: NDArray[Any] = device.get(h).ravel()[: x.size]
    return result


def samples() -> NDArray[np.float32]:
    """Floats spread evenly over all exponents, and densely where tanh is computed another way."""
    bits = np.arange(0x0080_0000, 0x7F80_0000, 0x1_3579, dtype=np.uint32)
    everywhere = bits.view(np.float32)
    threshold = np.float32(0.7).view(np.uint32) + np.arange(-2000, 2000, dtype=np.int64)
    near = threshold.astype(np.uint32).view(np.float32)
    dense = np.linspace(0.3, 9.5, 20_000, dtype=np.float32)
    positive = np.concatenate([everywhere, near, dense])
    return np.concatenate([positive, -positive])


@pytest.mark.parametrize(("ex2", "rcp"), [(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_tanh(ex2: int, rcp: int, tmp_path: Path) -> None:
    """Relative error of 1.5e-7; 4e-7 if MUFU is always as wrong as it may be.

    The emulator's exponential and reciprocal are correctly rounded; those of a GPU have relative
    errors of up to 2^-22.5 and 2^-23, here all of them, upwards or downwards.
    """
    changes = []
    if ex2:
        right = "exp2_approx(fabsf(x) * 2.885390081777926815f)"
        changes.append((right, f"(1.0f + {ex2 * 2**-22.5:.9g}f) * {right}"))
    if rcp:
        right = "reciprocal_approx(e + 1.0f)"
        changes.append((right, f"(1.0f + {rcp * 2**-23:.9g}f) * {right}"))
    x = samples()
    got = tanh_of(x, altered(tmp_path, *changes) if changes else None)
    want = np.tanh(up(x))
    error = np.abs(got / want - 1).max()
    assert error <= (4e-7 if changes else 1.5e-7), f"{error:.3g}"
    assert np.abs(got).max() <= 1
    np.testing.assert_array_equal(got[: x.size // 2], -got[x.size // 2 :])


def test_tanh_of_what_is_no_ordinary_number() -> None:
    tiny = np.float32(2.0**-140)  # denormals count as zero
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, tiny, -tiny], np.float32)
    got = tanh_of(x)
    np.testing.assert_array_equal(got[:7], [0, 0, 1, -1, np.nan, 1, -1])
    np.testing.assert_allclose(got[7:], [0, 0], atol=2.0**-126)


@pytest.mark.parametrize("case", [Case(80, 1, 5, 3, 29), Case(90, 16, 5, 4, 190)], ids=str)
def test_values_that_are_not_finite(op: str, case: Case) -> None:
    """NaN and inf go where they go in NumPy, and no further: padding multiplies none by zero."""
    given = make(case)
    for name in ("z", "dh"):
        given[name][2, 0, 5] = np.nan
        given[name][2, 1, 3] = np.inf
    given["W_xh"][given["x"][1, 2, 0], 7] = np.nan
    with np.errstate(invalid="ignore"):
        want = ORACLES[op](given, np.float64)
    for name, got in run(op, case.device(), given).items():
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want[name]), err_msg=name)
        np.testing.assert_allclose(got, want[name], rtol=2e-5, atol=2e-5, err_msg=name)
        assert np.isnan(want[name]).any()
        assert not np.isnan(want[name][..., -1, :]).any() or op == "recurrence_gathered"


# --- wrong twins, and sanitizers -------------------------------------------------------------

ROWS, WIDE, PAIR = SMALL

WRONG = {
    # fault: (case, op, passages and what stands in their place)
    "no barrier between steps": (
        Case(80, 1, 3, 5, 64),
        "recurrence",
        [("            block_sync();   // v_i is there; and", "            // v_i is there; and")],
    ),
    "one state for two steps": (
        Case(80, 1, 3, 5, 64),
        "recurrence",
        [("float* to = chunks + HIDDEN;", "float* to = chunks;")],
    ),
    "the state of the step before last": (ROWS, "recurrence", [("            from = to;\n", "")]),
    "weights taken before they are there": (
        Case(90, 1, 2, 1, 64),
        "recurrence",
        [("            __syncthreads();       // chunk q is there, and", "            // and")],
    ),
    "a dropped slice of k": (
        WIDE,
        "recurrence",
        [("mask < SLICES; mask *= 2", "mask < SLICES / 2; mask *= 2"), ("half > 0;", "half > 1;")],
    ),
    "a dropped slice of k in a cluster": (
        PAIR,
        "recurrence",
        [("mask < SLICES; mask *= 2", "mask < SLICES / 2; mask *= 2")],
    ),
    "the shared weights of another k": (
        WIDE,
        "recurrence",
        [("resident[(resident_place(n) + i / 4) * THREADS]", "resident[i / 4 * THREADS]")],
    ),
    "the addend of the step before": (
        ROWS,
        "recurrence",
        [
            (
                "        if (i < loads) next = *z;\n",
                "        if (i && i < loads) next = z[-stride];\n",
            )
        ],
    ),
    "the cursor ignored": (ROWS, "recurrence_gathered", [("(cursor ? ", "(false ? ")]),
    "no bias": (PAIR, "recurrence_gathered", [("owns ? next + bias", "owns ? next")]),
    "tanh' forgotten": (ROWS, "recurrence_backward", [("return sum * slope;", "return sum;")]),
    "h of the step after in tanh'": (
        PAIR,
        "recurrence_backward",
        [("next_h = *h;", "next_h = h[stride];")],
    ),
    "W_hh not transposed": (
        PAIR,
        "recurrence_backward",
        [("TRANSPOSED = true", "TRANSPOSED = false")],
    ),
    "no wait for the others' part": (
        PAIR,
        "recurrence",
        [("            mbarrier_wait(&arrived[p], begin >> 1 & 1);", "            ")],
    ),
    "a single buffer in the cluster": (
        PAIR,
        "recurrence",
        [
            ("const float* place = &state[p][", "const float* place = &state[0]["),
            (
                "reinterpret_cast<const float4*>(state[p])",
                "reinterpret_cast<const float4*>(state[0])",
            ),
            ("if (keeps) state[p ^ 1][own] = v;", "if (keeps) state[0][own] = v;"),
        ],
    ),
    "no wait for the block's own part": (
        PAIR,
        "recurrence",
        [
            (
                "            __syncthreads();   // the block's own part",
                "            // the block's own part",
            )
        ],
    ),
    "no barrier of the cluster at the start": (
        PAIR,
        "recurrence_backward",
        [("    cluster_sync();   // every block", "    // every block")],
    ),
    "a push to blocks that may have left": (
        PAIR,
        "recurrence",
        [("sends && i < last", "sends")],
    ),
    "a block that leaves a step early": (
        PAIR,
        "recurrence",
        [("if (i > last) break;", "if (i > last - (rank == 1)) break;")],
    ),
    "a block of the cluster left out": (
        PAIR,
        "recurrence",
        [("slice < BLOCKS - 1", "slice < BLOCKS - 2")],
    ),
}


def rejects(op: str, case: Case, device: EmulatedDevice) -> bool:
    given = make(case)
    try:
        check(op, given, run(op, device, given, inplace=True))
    except (AssertionError, EmulatorError):
        return True
    return False


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_rejected(fault: str, tmp_path: Path) -> None:
    case, op, changes = WRONG[fault]
    sources = altered(tmp_path, *changes)
    assert any(
        rejects(op, case, case.device(order=order, sources=sources)) for order in (*ORDERS, 3, 4)
    ), f"{fault}: no check noticed"


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize(
    "case",
    [Case(80, 1, 3, 18, 29), Case(80, 2, 3, 3, 250), Case(90, 8, 4, 2, 190)],
    ids=str,
)
def test_under_a_sanitizer(op: str, kind: Sanitizer, case: Case) -> None:
    device = sanitized(kind, case.capability, multiprocessors=case.multiprocessors)
    given = make(case)
    check(op, given, run(op, device, given, inplace=True))


def test_the_race_checker_sees_a_missing_barrier(tmp_path: Path) -> None:
    case, op, changes = WRONG["no barrier between steps"]
    device = sanitized("thread", case.capability, sources=altered(tmp_path, *changes))
    with pytest.raises(SanitizerError, match="data race"):
        run(op, device, make(case))
