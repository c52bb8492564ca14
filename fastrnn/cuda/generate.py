"""Launches the generation kernels: ``kernels/generate.cu`` and ``kernels/generate_cluster.cu``.

The cluster kernel holds all weights on chip. It takes float32 models of up to 256 units whose
output layer fits (2,624 columns at 256 units and 227 KiB of shared memory a block, 2,176 where
tokens are sampled), where a cluster of eight blocks can run. Everything else goes to the general
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastrnn.cuda.device import Array, Device, Kernel, Scratch, ceil_div, real
from fastrnn.decoding import Decoding

THREADS = 512
CHOICE_BYTES = 4592
"""Shared memory in which a group of threads chooses a token: ``Choice`` in ``choose.cuh``."""

ROWS = 8
"""Sequences of a block, or of a cluster, at most: its weights are read once for all of them. Half
as many float64 ones: the partial sums of a block must fit 64 KiB."""
SPARE = 4
"""A block a sequence while that takes no more than one in ``SPARE`` of the multiprocessors: so few
do not yet share L2's bandwidth, which then costs what a block of ``ROWS`` sequences would."""
TILE = 64
"""Columns of a warp of the general kernel."""
GENERAL_STATIC_BYTES = 1024
"""More than the ``__shared__`` variables of the general kernel take."""

CLUSTER = 8
CLUSTER_HIDDEN = (64, 128, 256)
CLUSTER_TILES = CLUSTER * THREADS // 32
"""Tiles of W_hq that a cluster keeps in registers, one a warp."""

LAUNCH_SECONDS = 0.5
"""Estimated time of a launch, at most: a GPU that drives a display stops kernels after seconds."""
LAUNCH_STEPS = 65536
L2_BYTES_PER_SECOND = 1e11
"""What one multiprocessor reads from L2: 64 bytes a cycle."""


class Sizes(NamedTuple):
    """S sequences, prefixes up to P, N tokens to produce each; H, V as everywhere."""

    S: int
    P: int
    N: int
    H: int
    V: int


def _up(size: int, step: int) -> int:
    return ceil_div(size, step) * step


# --- The general kernel ---


def _rows(dtype: np.dtype[Any]) -> int:
    return ROWS * 4 // dtype.itemsize


def _general_kernel(dtype: np.dtype[Any], rows: int, shared_bytes: int | None) -> Kernel:
    """``shared_bytes``: of states, logits and weights; None keeps them in global memory."""
    common = max(dtype.itemsize * THREADS // 32 * TILE * rows, CHOICE_BYTES * rows)
    return Kernel(
        "generate",
        "generate_kernel",
        THREADS,
        (
            ("REAL", real(dtype)),
            ("ROWS", rows),
            ("SHARED", int(shared_bytes is not None)),
            ("CHOICE_BYTES", CHOICE_BYTES),
        ),
        common + (shared_bytes or 0),
    )


def _general_bytes(sizes: Sizes, itemsize: int, rows: int, greedy: bool) -> int:
    """Shared memory of states, logits and weights."""
    weights = 0 if greedy else _up(8 * rows * sizes.V, 16)
    hidden = _up(sizes.H * rows, 4) + sizes.H * rows
    return weights + itemsize * (hidden + rows * sizes.V)


class _Plan(NamedTuple):
    """How a call is launched: the kernel, its grid, and what its steps take, roughly."""

    kernel: Kernel
    grid: int
    rows: int
    seconds: float


def _general_plan(device: Device, sizes: Sizes, dtype: np.dtype[Any], greedy: bool) -> _Plan:
    arch = device.arch
    few = max(1, arch.multiprocessors // SPARE)
    rows = _rows(dtype) if few < sizes.S else 1
    kernel = _general_kernel(dtype, rows, _general_bytes(sizes, dtype.itemsize, rows, greedy))
    if kernel.shared_bytes + GENERAL_STATIC_BYTES > arch.shared_bytes:
        kernel = _general_kernel(dtype, rows, None)
    groups = ceil_div(sizes.S, rows)
    grid = min(groups, arch.multiprocessors)
    step = dtype.itemsize * sizes.H * (sizes.H + sizes.V) / L2_BYTES_PER_SECOND
    return _Plan(kernel, grid, rows, step * ceil_div(groups, grid))


# --- The cluster kernel ---


def _cluster_kernel(hidden: int, greedy: bool, shared_bytes: int) -> Kernel:
    return Kernel(
        "generate_cluster",
        "generate_cluster_kernel",
        THREADS,
        (
            ("HIDDEN", hidden),
            ("SAMPLED", int(not greedy)),
            ("CHOICE_BYTES", CHOICE_BYTES),
            ("FIXED_BYTES", _cluster_fixed_bytes(hidden)),
        ),
        shared_bytes,
        cluster=CLUSTER,
        min_capability=90,
        opcodes=("STAS", "SYNCS"),
    )


class _Output(NamedTuple):
    """How W_hq lies on a cluster: tiles in registers, pairs of columns a block in shared memory."""

    tiles: int
    pairs: int


def _output(hidden: int, V: int) -> _Output:
    width = 2048 // hidden
    left = max(0, V - CLUSTER_TILES * width)
    return _Output(min(CLUSTER_TILES, ceil_div(V, width)), ceil_div(left, 2 * CLUSTER))


def _cluster_bytes(hidden: int, V: int, greedy: bool, resident: bool) -> int:
    """Shared memory of a block; ``resident``: with its columns of W_xh."""
    units, width = hidden // CLUSTER, 2048 // hidden
    tiles, pairs = _output(hidden, V)
    size = _cluster_fixed_bytes(hidden) + 4 * (pairs * 2 * hidden + _up(2 * pairs, 4))
    if resident:
        size += 4 * V * units
    if not greedy:
        size += 4 * units * hidden + 4 * (tiles * width + pairs * 2 * CLUSTER) + 8 * V
    return size


def _cluster_fixed_bytes(hidden: int) -> int:
    """What the cluster kernel keeps in shared memory whatever V: states, biases, best tokens."""
    units, width = hidden // CLUSTER, 2048 // hidden
    return 4 * (2 * ROWS * hidden + THREADS // 32 * width + units) + 8 * ROWS * CLUSTER_TILES + 128


def _cluster_plan(device: Device, sizes: Sizes, greedy: bool) -> tuple[_Plan, bool] | None:
    """The plan and whether W_xh is resident; None where the kernel cannot take the call."""
    hidden = next((size for size in CLUSTER_HIDDEN if size >= sizes.H), None)
    if hidden is None or device.arch.capability < 90:
        return None
    for resident in (True, False):
        size = _cluster_bytes(hidden, sizes.V, greedy, resident)
        if size > device.arch.shared_bytes:
            continue
        kernel = _cluster_kernel(hidden, greedy, size)
        clusters = device.active_clusters(kernel)
        if clusters > 0:
            rows = min(ROWS, ceil_div(sizes.S, clusters))
            grid = ceil_div(sizes.S, rows)
            seconds = (1e-6 + 5e-7 * rows) * ceil_div(grid, clusters)
            return _Plan(kernel, CLUSTER * grid, rows, seconds), resident
    return None


# --- The launcher ---


def generate(
    device: Device,
    params: Mapping[str, Array],
    prefix: Array,
    lengths: Array,
    tokens_out: Array,
    state: Array,
    num_tokens: int,
    decoding: Decoding,
    position: int,
    sequence: int,
    scratch: Scratch,
) -> None:
    """Continue sequences, see :meth:`fastrnn.backend.Backend.generate`.

    One launch, or several one after the other where one would take long. A cluster whose blocks
    lose each other traps after ten seconds: the next synchronisation raises.

    Args:
        params: the parameters by name.
        prefix, lengths: int32 ``[S, P]``, right-padded, and ``[S]``.
        tokens_out: int32 ``[S, num_tokens]``.
        state: ``[S, H]``, the state before the prefix, and after the call the state after all that
            was fed.
        position, sequence: where the generator's counter stands, and its number of row 0.
    """
    W_hh, (S, P) = params["W_hh"], prefix.shape
    H, V = params["W_hq"].shape
    sizes, dtype, greedy = (
        Sizes(S, P, num_tokens, H, V),
        np.dtype(W_hh.dtype),
        not decoding.temperature,
    )
    arrays = [params[name] for name in ("W_xh", "W_hh", "b_h", "W_hq", "b_q")]
    arrays += [prefix, lengths, tokens_out, state]
    clustered = _cluster_plan(device, sizes, greedy) if dtype == np.float32 else None
    if clustered is not None:
        plan, resident = clustered
        output = _output(int(dict(plan.kernel.defines)["HIDDEN"]), V)
        middle = [plan.rows, *output, int(resident)]
    else:
        plan, middle = _general_plan(device, sizes, dtype, greedy), []
        arrays += _general_scratch(plan, sizes, dtype, greedy, scratch)
    words = [decoding.seed, decoding.seed >> 32, sequence, position]
    end_args = [
        np.float64(0.0 if greedy else 1.0 / decoding.temperature),
        np.float64(decoding.top_p),
        np.int32(decoding.top_k if decoding.top_k < V else 0),
        *(np.uint32(word & 0xFFFFFFFF) for word in words),
    ]
    steps = max(1, min(LAUNCH_STEPS, int(LAUNCH_SECONDS / plan.seconds)))
    for begin in range(0, P + num_tokens, steps):
        end = min(begin + steps, P + num_tokens)
        numbers = [np.int32(n) for n in (*sizes[:1], H, V, P, num_tokens, begin, end, *middle)]
        device.launch(plan.kernel, plan.grid, [*arrays, *numbers, *end_args])


def _general_scratch(
    plan: _Plan, sizes: Sizes, dtype: np.dtype[Any], greedy: bool, scratch: Scratch
) -> list[Array]:
    """States, logits and weights of each block where they do not fit shared memory."""
    if dict(plan.kernel.defines)["SHARED"]:
        return [None, None, None]
    rows = plan.grid * plan.rows
    return [
        scratch("generate_states", 2 * rows * _up(sizes.H, 4), dtype),
        scratch("generate_logits", rows * sizes.V, dtype),
        None if greedy else scratch("generate_weights", rows * sizes.V, np.uint64),
    ]


def variants() -> list[Kernel]:
    """Every kernel that :func:`generate` can launch, with the shared memory of a common size."""
    kernels = []
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for rows in (1, _rows(dtype)):
            sizes = Sizes(rows, 1, 1, 256, 1027 if rows == 1 else 65)
            size = _general_bytes(sizes, dtype.itemsize, rows, greedy=True)
            kernels += [_general_kernel(dtype, rows, None), _general_kernel(dtype, rows, size)]
    for hidden in CLUSTER_HIDDEN:
        for greedy in (True, False):
            size = _cluster_bytes(hidden, 1027, greedy, resident=False)
            kernels.append(_cluster_kernel(hidden, greedy, size))
    return kernels
