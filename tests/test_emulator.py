"""The emulator itself: it computes what a GPU would, and refuses what a GPU must not be given."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.emulator import (
    BuildError,
    Emulator,
    EmulatorError,
    Module,
    Order,
    SanitizerError,
    Statistics,
    build,
    guarded,
    guarded_empty,
    require_emulator,
    run_sanitized,
)
from tests.emulator.build import Sanitizer

KERNELS = Path(__file__).parent / "emulator" / "kernels"
ORDERS: tuple[Order, ...] = ("forward", "reverse", "eager", 1, 2)
FULL = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def emulator_runs_here() -> None:
    require_emulator()


def module(stem: str) -> Module:
    return Emulator().module(KERNELS / f"{stem}.cu")


@functools.cache
def here(stem: str, label: str) -> str:
    """``file:line`` of the line that is marked ``// HERE label``."""
    lines = (KERNELS / f"{stem}.cu").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"// HERE {label}")]
    return f"{stem}.cu:{number}"


def launch(stem: str, kernel: str, *args: Any, **options: Any) -> Statistics:
    return module(stem).launch(kernel, *args, **options)


def refused(stem: str, kernel: str, *args: Any, **options: Any) -> str:
    """The message of a launch that must fail."""
    with pytest.raises(EmulatorError) as caught:
        launch(stem, kernel, *args, **options)
    text = str(caught.value)
    assert text.startswith(f"kernel {kernel}: "), text
    return text


def sanitized(kind: Sanitizer, stem: str, *args: Any, **options: Any) -> str:
    """What a launch printed that a sanitizer must not complain about."""
    return run_sanitized(kind, KERNELS / f"{stem}.cu", *args, **options)


def report(kind: Sanitizer, stem: str, *args: Any, **options: Any) -> str:
    """The report of a sanitizer that must complain."""
    with pytest.raises(SanitizerError) as caught:
        sanitized(kind, stem, *args, **options)
    return str(caught.value)


def i32(value: int) -> np.int32:
    return np.int32(value)


# ------------------------------------------------------------------------------- block barriers


@pytest.mark.parametrize("order", ORDERS)
def test_barrier(order: Order) -> None:
    out = np.zeros((5, 64), np.int32)
    launch("sync", "broadcast_kernel", 1, 64, [out, i32(5)], order=order)
    np.testing.assert_array_equal(out, np.repeat(np.arange(5), 64).reshape(5, 64))


def broadcast_is_right(order: Order) -> bool:
    """Does the kernel that lacks a barrier compute the right numbers in this order?"""
    out = np.zeros((2, 64), np.int32)
    args = [out, i32(2)]
    launch("sync", "broadcast_without_second_barrier", 1, 64, args, order=order)
    return bool((out == np.arange(2)[:, None]).all())


def test_missing_barrier_shows_in_some_order() -> None:
    """One order alone would hide the race: going forward, the writer wakes last."""
    assert broadcast_is_right("forward")
    assert not broadcast_is_right("reverse")
    assert not all(broadcast_is_right(seed) for seed in range(4))


@pytest.mark.parametrize(
    ("right", "wrong", "label", "out"),
    [
        ("broadcast_kernel", "broadcast_without_second_barrier", "broadcast", (5, 64)),
        ("exchange_kernel", "exchange_without_syncwarp", "exchange", (32,)),
        ("exchange_kernel", "exchange_by_shuffle", "meeting", (32,)),
    ],
)
def test_missing_barrier_is_a_race(
    right: str, wrong: str, label: str, out: tuple[int, ...]
) -> None:
    result = np.zeros(out, np.int32)
    args: list[Any] = [result, i32(5)] if len(out) == 2 else [result]
    threads = out[-1]
    sanitized("thread", "sync", right, 1, threads, args)
    text = report("thread", "sync", wrong, 1, threads, args)
    assert "data race" in text
    assert here("sync", label) in text


@pytest.mark.parametrize("define", [{}, {"MISSING_BARRIER": 1}])
def test_sum_over_blocks(define: dict[str, int]) -> None:
    x = np.arange(1000, dtype=np.float32) / 256
    out = np.zeros(1, np.float32)
    summed = Emulator().module(KERNELS / "basics.cu", define)
    summed.launch("sum_of_squares", 3, 256, [x, out, i32(1000)])
    # without the barrier thread 0 adds up what other warps have yet to write
    assert np.isnan(out[0]) if define else abs(out[0] / float(x @ x) - 1) < 1e-6


def test_orders_differ_and_repeat() -> None:
    def run(order: Order) -> list[int]:
        places, place = np.full(64, -1, np.int32), np.zeros(1, np.int32)
        launch("sync", "order_of_threads", 1, 64, [places, place], order=order)
        assert sorted(places) == list(range(64))
        return [int(v) for v in places]

    assert run("forward") == list(range(64))
    assert run("reverse") == list(range(63, -1, -1))
    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in range(5)} | {tuple(run("forward"))}) == 6


def test_deadlock_names_the_lines() -> None:
    text = refused("sync", "deadlock", 1, 32, [np.zeros(32, np.float32)])
    assert "deadlock: no thread can run" in text
    for threads, what, label in [
        ("0-15", r"__syncthreads\(\)", "barrier"),
        ("16-31", r"__shfl_xor_sync", "shuffle"),
    ]:
        assert re.search(rf"threads {threads} wait at {what} at {here('sync', label)}", text), text


def test_divergent_barrier() -> None:
    text = refused("sync", "divergent", 1, 64, [np.zeros(64, np.int32)])
    assert "divergent __syncthreads()" in text
    assert here("sync", "one") in text
    assert here("sync", "other") in text


@pytest.mark.parametrize("leave", [0, 5, 40])
def test_votes_of_those_who_stay(leave: int) -> None:
    out = np.full(3, -1, np.int32)
    launch("sync", "votes", 1, 64, [out, i32(leave)])
    assert list(out) == [sum(t % 3 == 0 for t in range(leave, 64)), 1, 1]


# ------------------------------------------------------------------------------- named barriers


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers(order: Order) -> None:
    x = np.arange(7 * 32, dtype=np.int32).reshape(7, 32)
    out = np.zeros(32, np.int32)
    launch("sync", "named_barriers", 1, 64, [x, out, i32(7)], order=order)
    np.testing.assert_array_equal(out, x.sum(0))


def test_named_barriers_order_memory() -> None:
    x, out = np.ones((7, 32), np.int32), np.zeros(32, np.int32)
    sanitized("thread", "sync", "named_barriers", 1, 64, [x, out, i32(7)])
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("number", "threads", "words"),
    [(16, 64, "there are 16"), (1, 33, "not a multiple of 32"), (1, 96, "within the block")],
)
def test_named_barrier_misuse(number: int, threads: int, words: str) -> None:
    assert words in refused("sync", "named_barrier_misused", 1, 64, [i32(number), i32(threads)])


def test_named_barrier_counts() -> None:
    assert "96 threads here and 64 elsewhere" in refused(
        "sync", "named_barrier_counts_differ", 1, 96, []
    )
    assert "named barrier 1" in refused(
        "sync", "named_barrier_misused", 1, 96, [i32(1), i32(64)], order="forward"
    )


# ------------------------------------------------------------------------------- warps


@pytest.mark.parametrize("first", [0, 5, 31])
@pytest.mark.parametrize("order", ORDERS)
def test_collectives(first: int, order: Order) -> None:
    x = np.random.default_rng(3).integers(0, 4, 32).astype(np.int32)
    out = np.full((17, 32), -99, np.int32)
    launch("sync", "collectives", 1, 32, [x, out, i32(first)], order=order)
    lanes = range(first, 32)
    values = [int(v) for v in x]

    def source(lane: int, other: int, same_group: bool) -> int:
        """A lane outside of its group keeps its own value; one that is absent hands out poison."""
        if not same_group:
            return values[lane]
        return values[other] if other >= first else 0x7FFFFFFF

    def bits(chosen: Sequence[bool]) -> int:
        return sum(1 << lane for lane, yes in zip(lanes, chosen, strict=True) if yes)

    votes = bits([values[i] % 2 == 1 for i in lanes])
    everyone = bits([True] * len(lanes))
    for i in lanes:
        total = sum(values[j] for j in lanes)
        xor = functools.reduce(lambda a, b: a ^ b, (values[j] for j in lanes))
        want = [
            values[31 - i % (32 - first)],
            source(i, i - 3, i % 8 >= 3),
            source(i, i + 2, i + 2 < 32),
            source(i, i ^ 1, True),
            votes,
            1,
            int(all(values[j] == values[31] for j in lanes)),
            bits([values[j] == values[i] for j in lanes]),
            everyone,
            1,
            everyone if len(lanes) == 1 else 0,
            int(len(lanes) == 1),
            total,
            min(values[j] for j in lanes),
            max(values[j] for j in lanes),
            xor,
        ]
        assert [int(v) & FULL for v in out[:16, i]] == [v & FULL for v in want], i
        assert int(out[16, i]) >> i & 1  # itself at least; who else is active depends on the order


def test_warp_reductions() -> None:
    x = np.random.default_rng(4).standard_normal(32).astype(np.float32)
    out = np.zeros((2, 32), np.float32)
    launch("sync", "warp_reductions", 1, 32, [x, out])
    total = x.copy()
    for offset in (16, 8, 4, 2, 1):  # the same tree, so the same bits in every lane
        total = total + total[np.arange(32) ^ offset]
    np.testing.assert_array_equal(out[0], total)
    np.testing.assert_array_equal(out[1], x.max())


def test_wrong_shuffle_masks() -> None:
    out = np.zeros(32, np.int32)
    text = refused("sync", "shuffle_leaves_out_caller", 1, 32, [out])
    assert "mask 0x7fffffff, which leaves out the calling lane 31" in text
    text = refused("sync", "shuffle_masks_differ", 1, 32, [out])
    assert "deadlock" in text
    assert here("sync", "masks") in text
    assert "meets" in refused("sync", "shuffle_meets_ballot", 1, 32, [out])
    absent = np.zeros(16, np.float32)
    launch("sync", "shuffle_from_absent_lane", 1, 32, [absent])
    assert np.isnan(absent).all()


# ------------------------------------------------------------------------------- atomics


@pytest.mark.parametrize("order", ["forward", 5])
def test_atomics(order: Order) -> None:
    blocks, threads = 9, 128
    n = blocks * threads
    i = np.array([0, 0, 0, 0, 0, 0, 0], np.int32)
    u = np.array([0, 0, 0, 0, FULL, 0, 0], np.uint32)
    wide = np.array([0, 1 << 50], np.uint64)
    f, d = np.zeros(1, np.float32), np.zeros(1, np.float64)
    launch("sync", "atomics", blocks, threads, [i, u, wide, f, d], order=order)
    k = np.arange(n)
    xor = int(np.bitwise_xor.reduce(1 << k % 31))
    assert list(i) == [k.sum(), -k.sum(), -(n - 1), n - 1, xor, 2 * n, n - 1]
    down = functools.reduce(lambda v, _: 9 if v == 0 or v > 9 else v - 1, range(n), 0)
    assert list(u) == [n, n % 10, down, FULL, 0, 0x80000000 + n - 1, n]
    assert list(wide) == [n << 40, (1 << 40) - n + 1]
    assert (f[0], d[0]) == (n, n / 2)


# ------------------------------------------------------------------------------- wrong addresses


@pytest.mark.parametrize("kernel", ["read", "write"])
def test_global_out_of_bounds(kernel: str) -> None:
    x = np.zeros(64, np.float32)
    args = [x, np.zeros(1, np.float32)] if kernel == "read" else [x]
    launch("access", f"{kernel}_global", 1, 1, [*args, i32(63)])
    text = refused("access", f"{kernel}_global", 1, 1, [*args, i32(64)])
    assert "invalid memory access" in text
    assert f"block (0,0,0) thread (0,0,0): {text.split(': ')[2]}" in text
    assert here("access", kernel) in text
    for at in (64, -1):  # the guard page lies behind, the sanitizer on both sides
        text = report("address", "access", f"{kernel}_global", 1, 1, [*args, i32(at)])
        assert "heap-buffer-overflow" in text
        assert here("access", kernel) in text


def test_failed_launch_changes_nothing() -> None:
    x = np.zeros(4, np.float32)
    refused("access", "write_global", 2, 1, [x, i32(4)])
    assert not x.any()


@pytest.mark.parametrize("guard", [True, False])
def test_views_share_their_memory(guard: bool) -> None:
    flat = np.arange(8, dtype=np.float32)
    launch("access", "read_global", 1, 1, [flat[2:], flat[5:], i32(4)], guard=guard)
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 6, 6, 7])
    memory = bytearray(32)
    part, whole = np.frombuffer(memory, np.float32, 4), np.frombuffer(memory, np.float32)
    whole[7] = 7
    launch("access", "read_global", 1, 1, [whole, part, i32(7)], guard=guard)
    assert whole[0] == 7


def test_guarded_memory_is_used_in_place() -> None:
    x, out = guarded(np.ones(3, np.float32)), guarded_empty(2)
    assert np.isnan(out).all()
    launch("access", "read_global", 1, 1, [x, out, i32(2)])
    assert out[0] == 1
    assert np.isnan(out[1])
    assert "invalid memory access" in refused("access", "read_global", 1, 1, [x, out, i32(4)])


@pytest.mark.parametrize(("memory", "threads"), [("dynamic", 32), ("static", 8)])
def test_shared_out_of_bounds(memory: str, threads: int) -> None:
    out = np.zeros(threads, np.float32)
    shared = 4 * threads if memory == "dynamic" else 0
    text = report("address", "access", f"read_{memory}", 1, threads, [out, i32(threads)], shared)
    assert ("heap-buffer-overflow" if memory == "dynamic" else "out of bounds") in text
    assert here("access", memory) in text
    sanitized("address", "access", f"read_{memory}", 1, threads, [out, i32(threads - 1)], shared)
    # far outside, a plain launch notices as well
    text = refused("access", f"read_{memory}", 1, threads, [out, i32(1024)], shared)
    assert f"bytes of {memory} shared memory" in text
    assert here("access", memory) in text


def test_shared_memory_is_poisoned() -> None:
    out, wide = np.zeros(128, np.float32), np.zeros(64)
    number = np.zeros(64, np.int32)
    args = [out, wide, number]
    for _ in range(2):  # fresh for every block, also in memory that was used before
        launch("access", "read_uninitialised", 2, 64, args, 256)
        assert np.isnan(out).all()
        assert np.isnan(wide).all()
        assert (number == 0x7FFFFFFF).all()


def test_misaligned() -> None:
    x, out = np.arange(16, dtype=np.float32), np.zeros((1, 4), np.float32)
    launch("access", "read_float4", 1, 1, [x, out, i32(4)])
    np.testing.assert_array_equal(out, [[4, 5, 6, 7]])
    text = refused("access", "read_float4", 1, 1, [x, out, i32(3)])
    assert "misaligned" in text
    assert here("access", "float4") in text
    text = report("address", "access", "read_float4", 1, 1, [x, out, i32(3)])
    assert "misaligned address" in text
    assert here("access", "float4") in text


def test_failures_of_a_thread() -> None:
    x = np.array([1, 2, 9, 3], np.int32)
    text = refused("access", "asserts", 1, 4, [x])
    assert "thread (2,0,0): assertion failed: x[threadIdx.x] < 7" in text
    assert here("access", "assert") in text
    text = refused("access", "endless", 1, 1, [np.zeros(1, np.int32)], timeout=0.2)
    assert "time-out: the thread ran for 0.2 s" in text
    assert here("access", "endless") in text
    out = np.zeros(1, np.int32)
    launch("access", "recurse", 1, 1, [out, i32(20)])
    text = refused("access", "recurse", 1, 1, [out, i32(10_000)])
    assert "(stack overflow)" in text
    assert here("access", "frame") in text


def test_output_and_denormals() -> None:
    printed = sanitized("address", "access", "prints", 1, 2, [i32(5)])
    assert printed == "thread 0 of 5\nthread 1 of 5\n"
    small = np.full(1, np.float32(2.0**-126))
    for flush, want in [(False, 2.0**-127), (True, 0.0)]:
        out = np.ones(1, np.float32)
        launch("access", "halve", 1, 1, [small, out], flush_denormals=flush)
        assert out[0] == want


# ------------------------------------------------------------------------------- copies


def tiles(kernel: str, order: Order) -> bool:
    """Does this kernel copy five tiles right?"""
    x = np.arange(5 * 128, dtype=np.float32)
    out = np.zeros_like(x)
    launch("access", kernel, 1, 32, [x, out, i32(5)], 2 * 128 * 4, order=order)
    return bool((x == out).all())


def test_cp_async() -> None:
    assert all(tiles("tiles_kernel", order) for order in ORDERS)
    x, out = np.ones(5 * 128, np.float32), np.zeros(5 * 128, np.float32)
    args = [x, out, i32(5)]
    sanitized("thread", "access", "tiles_kernel", 1, 32, args, 1024)
    sanitized("address", "access", "tiles_kernel", 1, 32, args, 1024)


def test_cp_async_read_before_the_wait() -> None:
    assert not any(tiles("tiles_without_wait", order) for order in ORDERS)


@pytest.mark.parametrize("missing", ["show", "drain"])
def test_cp_async_without_barrier(missing: str) -> None:
    kernel = f"tiles_without_{missing}"
    assert not all(tiles(kernel, order) for order in ORDERS)
    x, out = np.ones(5 * 128, np.float32), np.zeros(5 * 128, np.float32)
    text = report("thread", "access", kernel, 1, 32, [x, out, i32(5)], 1024)
    assert "data race" in text
    assert here("access", "tiles") in text


def test_cp_async_misuse() -> None:
    x, out = np.ones(64, np.float32), np.zeros(4, np.float32)
    launch("access", "copy_part", 1, 1, [x, out, i32(8)], 16)
    assert list(out) == [1, 1, 0, 0]
    for kernel, args, words, label in [
        ("copy_misaligned", [x], "misaligned address", "misaligned"),
        ("copy_to_global", [x, out], "outside the block's shared memory", "destination"),
        ("copy_async_out_of_bounds", [x, out, i32(64)], "invalid memory access", "copy"),
    ]:
        text = refused("access", kernel, 1, 1, args, 64)
        assert words in text
        assert here("access", label) in text
    args = [x, out, i32(64)]
    with pytest.raises(EmulatorError, match="reads out of bounds") as caught:
        sanitized("address", "access", "copy_async_out_of_bounds", 1, 1, args, 64)
    assert here("access", "copy") in str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
def test_bulk_copy(order: Order) -> None:
    x, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    launch("access", "bulk_kernel", 1, 64, [x, out, i32(400)], 400, order=order)
    np.testing.assert_array_equal(out, x)


def test_bulk_copy_misuse() -> None:
    x, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)

    def misuse(kernel: str, size: int, shared: int = 400) -> str:
        return refused("access", kernel, 1, 64, [x, out, i32(size)], shared)

    assert "mbarrier used before its initialisation" in misuse("bulk_without_init", 400)
    assert "arrives in a block that has exited" in misuse("bulk_without_expect", 400)
    assert "multiples of 16" in misuse("bulk_kernel", 396)
    text = misuse("bulk_kernel", 416, 416)
    assert "invalid memory access" in text
    assert here("access", "bulk") in text
    assert "data and mbarrier must lie in one block" in misuse("bulk_kernel", 400, 384)
    assert "arrives in a block that has exited" in misuse("bulk_without_wait", 400)
    args = [x, out, i32(400)]
    sanitized("thread", "access", "bulk_kernel", 1, 64, args, 400)
    text = report("thread", "access", "bulk_without_wait", 1, 64, args, 400)
    assert here("access", "bulk") in text


# ------------------------------------------------------------------------------- blocks together


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["forward", "eager", 3])
def test_cluster(size: int, order: Order) -> None:
    out = np.zeros(16, np.int32)
    launch("machine", "cluster_kernel", 16, 32, [out], cluster=size, order=order)
    for first in range(0, 16, size):
        want = sum(100 * rank + first + rank for rank in range(size))
        assert (out[first : first + size] == want).all()


def test_cluster_dims_of_the_kernel() -> None:
    out = np.zeros(4, np.int32)
    launch("machine", "cluster_of_two", 4, 32, [out])
    assert list(out) == [101, 101, 105, 105]
    with pytest.raises(ValueError, match="__cluster_dims__ says 2"):
        launch("machine", "cluster_of_two", 4, 32, [out], cluster=4)
    with pytest.raises(ValueError, match="do not divide a grid"):
        launch("machine", "cluster_of_two", 3, 32, [out])


def test_cluster_exit_while_others_use_its_memory() -> None:
    out = np.zeros(4, np.int32)
    text = refused("machine", "cluster_leaves_early", 4, 32, [out], cluster=4)
    assert "block of rank 1 has exited" in text or "block that has exited" in text
    word = np.zeros(1, np.float32)
    for order in ORDERS:
        text = refused("machine", "push_to_the_exited", 2, 32, [word], cluster=2, order=order)
        assert "exited" in text


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [2, 4])
def test_st_async(order: Order, size: int) -> None:
    rounds, threads = 7, 32
    out = np.zeros((4, threads), np.float32)
    shared = 2 * 16 * threads
    args = [out, i32(rounds)]
    launch("machine", "ring_kernel", 4, threads, args, shared, size, order=order)
    rank = (np.arange(4) - 1) % size
    each = 1000.0 * rank[:, None] + 10.0 * np.arange(threads) + (rounds - 1) / 2
    np.testing.assert_array_equal(out, 4 * rounds * each)


def test_st_async_misuse() -> None:
    args: list[Any] = [np.zeros((2, 32), np.float32), i32(7)]
    text = refused("machine", "ring_without_expect", 2, 32, args, 1024, 2)
    assert "poll in vain" in text
    assert here("machine", "full") in text
    # in a ring of two, what comes says that what went has been read; in one of four it does not
    args[0] = np.zeros((4, 32), np.float32)
    sanitized("thread", "machine", "ring_kernel", 4, 32, args, 1024, 4)
    text = report("thread", "machine", "ring_reuses_too_early", 4, 32, args, 1024, 4)
    assert "data race" in text
    assert here("machine", "ring") in text


def test_mbarrier_misuse() -> None:
    text = refused("machine", "mbarrier_uninitialised", 1, 1, [np.zeros(1, np.int32)])
    assert "before its initialisation" in text
    assert here("machine", "uninitialised") in text
    text = refused("machine", "mbarrier_counts_too_many", 1, 8, [])
    assert "poll in vain" in text
    assert here("machine", "arrivals") in text


@pytest.mark.parametrize("order", ORDERS)
def test_flags_need_blocks_that_run_together(order: Order) -> None:
    flag, value = np.zeros(1, np.uint32), np.zeros(1, np.int32)
    ticket = "ticket_kernel", 4, 32, [flag, value]
    launch("machine", *ticket, cooperative=True, order=order)
    assert (flag[0], value[0]) == (4, 10)
    flag[0] = 0
    text = refused("machine", *ticket, order=order, workers=1)
    assert "poll in vain" in text
    assert "the launch is not cooperative" in text
    assert here("machine", "flag") in text


def test_flag_without_release_is_a_race() -> None:
    flag, value = np.zeros(1, np.uint32), np.zeros(1, np.int32)
    size = 3, 32, [flag, value]
    sanitized("thread", "machine", "ticket_kernel", *size, cooperative=True)
    flag[0] = 0
    text = report("thread", "machine", "ticket_without_release", *size, cooperative=True)
    assert "data race" in text
    assert here("machine", "ticket") in text


@pytest.mark.parametrize("order", ORDERS)
def test_grid_barrier(order: Order) -> None:
    x = np.arange(6 * 32, dtype=np.float32)
    scratch, out = np.full_like(x, np.nan), np.zeros_like(x)
    args = [x, scratch, out]
    launch("machine", "grid_kernel", 6, 32, args, cooperative=True, order=order)
    np.testing.assert_array_equal(out, x[::-1] + 1)


def test_grid_barrier_misuse() -> None:
    x = np.zeros(2 * 32, np.float32)
    args = [x, x.copy(), x.copy()]
    assert "not cooperative" in refused("machine", "grid_kernel", 2, 32, args)
    sanitized("thread", "machine", "grid_kernel", 2, 32, args, cooperative=True)
    text = report("thread", "machine", "grid_without_barrier", 2, 32, args)
    assert here("machine", "grid") in text


def test_indices() -> None:
    out = np.zeros((2 * 3 * 2, 4 * 2 * 3), np.int32)
    launch("machine", "where", (2, 3, 2), (4, 2, 3), [out])
    want = 1000 * np.arange(out.shape[0])[:, None] + np.arange(out.shape[1])
    np.testing.assert_array_equal(out, want)


# ------------------------------------------------------------------------------- arguments


def good_arguments() -> list[Any]:
    options = np.array([(2.0, 3)], np.dtype([("scale", np.float32), ("shift", np.int32)]))
    return [
        np.ones(8, np.float32),
        np.zeros(8),
        np.arange(8, dtype=np.uint8),
        i32(5),
        np.float32(0.5),
        np.int64(1 << 40),
        np.bool_(True),
        options.tobytes(),
    ]


def test_arguments() -> None:
    args = good_arguments()
    launch("access", "arguments", 1, 8, args)
    np.testing.assert_array_equal(args[1], 0.5 + np.arange(8) + 5 + (1 << 40) + 1 + 6)


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        (0, np.ones(8), TypeError, "argument 0 must be an array of float32, not float64"),
        (0, [1.0] * 8, TypeError, "argument 0 must be an array or None, not list"),
        (0, np.ones(16, np.float32)[::2], ValueError, "argument 0 must be C-contiguous"),
        (2, np.arange(8, dtype=np.int8), TypeError, "argument 2 must be an array of uint8"),
        (3, 5, TypeError, "argument 3 must be a scalar numpy.int32, not int"),
        (3, np.int64(5), TypeError, "argument 3 must be a scalar numpy.int32, not int64"),
        (4, np.float64(5), TypeError, "argument 4 must be a scalar numpy.float32, not float64"),
        (6, i32(1), TypeError, "argument 6 must be a scalar numpy.bool"),
        (7, b"1234", TypeError, "argument 7 must be an object of 8 bytes, not 4"),
    ],
)
def test_wrong_argument(place: int, value: Any, error: type[Exception], words: str) -> None:
    args = good_arguments()
    args[place] = value
    with pytest.raises(error, match=re.escape(words)):
        launch("access", "arguments", 1, 8, args)
    with pytest.raises(error, match=re.escape(words)):
        sanitized("address", "access", "arguments", 1, 8, args)


def test_wrong_number_of_arguments_and_read_only_output() -> None:
    args = good_arguments()
    with pytest.raises(TypeError, match="takes 8 arguments, not 7"):
        launch("access", "arguments", 1, 8, args[:-1])
    args[1].flags.writeable = False
    with pytest.raises(ValueError, match="argument 1 is written, but the array is read-only"):
        launch("access", "arguments", 1, 8, args)


@pytest.mark.parametrize(
    ("grid", "block", "options", "words"),
    [
        (1, 65, {}, "a block of 65 threads, at most 64"),
        (1, (8, 0), {}, "block must be one to three positive numbers"),
        ((1, 70_000), 8, {}, "65,535 blocks along y and z"),
        (1, 8, {"shared_bytes": 227 * 1024}, "bytes of shared memory, a block has at most 232448"),
        (3, 8, {"cluster": 2}, "clusters of 2 do not divide a grid"),
        (32, 8, {"cluster": 32}, "clusters of 32 do not divide"),
    ],
)
def test_wrong_geometry(grid: Any, block: Any, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch("access", "arguments", grid, block, good_arguments(), **options)


def test_limits_without_launch_bounds() -> None:
    out = np.zeros(1024, np.int32)
    launch("machine", "where", 1, 1024, [out])
    with pytest.raises(ValueError, match="a block of 1025 threads, at most 1024"):
        launch("machine", "where", 1, 1025, [out])


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"machine\.cu has no kernel 'nothing', only cluster_kernel"):
        launch("machine", "nothing", 1, 1, [])
    with pytest.raises(FileNotFoundError, match="no kernel file"):
        Emulator().module(tmp_path / "missing.cu")
    wrong = tmp_path / "wrong.cu"
    wrong.write_text('extern "C" __global__ void f(float* x) { x[0] = nothing; }\n')
    with pytest.raises(BuildError, match=r"wrong\.cu:1:.*\n?.*nothing"):
        Emulator().module(wrong)
    wrong.write_text("__device__ void f(float* x) { x[0] = 1; }\n")
    with pytest.raises(BuildError, match='has no extern "C" __global__ function'):
        Emulator().module(wrong)
    with pytest.raises(ValueError, match="run_sanitized"):
        Emulator().module(KERNELS / "basics.cu", sanitize="thread")


def test_headers_and_defines_are_part_of_the_cache_key(tmp_path: Path) -> None:
    source, header = tmp_path / "value.cu", tmp_path / "value.cuh"
    source.write_text(
        '#include "value.cuh"\nextern "C" __global__ void f(int* x) { x[0] = VALUE + ADD; }\n'
    )
    out = np.zeros(1, np.int32)
    for value, add in [(1, 1), (2, 1), (2, 5), (1, 1)]:
        header.write_text(f"#define VALUE {value}\n")
        Emulator().module(source, {"ADD": add}).launch("f", 1, 1, [out])
        assert out[0] == value + add


def test_kernels_are_found_in_any_dress() -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(32 * 4, 2) a(const float* x) { }
    extern "C" { } template <int n> __global__ void not_this(int* x) { }
    extern "C" __launch_bounds__(64) __cluster_dims__(4, 1, 1) __global__ void b() { }
    extern "C" void __global__ __cluster_dims__(2) c() { }
    """
    found = {k.name: (k.launch_bounds, k.cluster_dims) for k in build.scan_kernels(text)}
    assert found == {
        "a": ("( 32 * 4 , 2 )", "()"),
        "b": ("( 64 )", "( 4 , 1 , 1 )"),
        "c": ("()", "( 2 )"),
    }


def test_the_emulator_may_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.emulator.require.emulator_unavailable", lambda: "no compiler")
    monkeypatch.delenv("FASTRNN_REQUIRE_EMULATOR", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no compiler"):
        require_emulator()
    monkeypatch.setenv("FASTRNN_REQUIRE_EMULATOR", "1")
    with pytest.raises(pytest.fail.Exception, match="no compiler"):
        require_emulator()


# ------------------------------------------------------------------------------- numbers


def awkward_floats() -> NDArray[np.float32]:
    """Random bits, and every kind of tie, denormal, infinity and NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 4000, dtype=np.uint64).astype(np.uint32)
    ties = rng.integers(0, 1 << 16, 2000, dtype=np.uint64).astype(np.uint32) << np.uint32(16)
    ends = np.array([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x007FFFFF], np.uint32)
    all_bits = np.concatenate([bits, ties | 0x1000, ties | 0x8000, ends, ends | 0x80000000])
    return all_bits.astype(np.uint32).view(np.float32)


def rounded(x: NDArray[np.float32], digits: int, ties: Literal["even", "away"]) -> Any:
    """Rounding to ``digits`` binary digits with float32's exponents, by arithmetic in float64."""
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
        _, exponent = np.frexp(wide)
    quantum = np.exp2(np.maximum(exponent, -125).astype(np.float64) - digits)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = wide / quantum
        whole = (
            np.rint(scaled)
            if ties == "even"
            else np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
        )
        return (whole * quantum).astype(np.float32)


def test_conversions() -> None:
    x = awkward_floats()
    tf32, bf16 = np.zeros(x.size, np.uint32), np.zeros(x.size, np.uint32)
    launch("tensor", "convert", 1, 32, [x, tf32, bf16, i32(x.size)])
    nan, finite = np.isnan(x), np.isfinite(x)
    want = np.where(np.isinf(x), x, rounded(x, 11, "away"))
    np.testing.assert_array_equal(tf32[~nan], want[~nan].view(np.uint32))
    assert (tf32[nan] == 0x7FFFFFFF).all()
    want = np.where(np.isinf(x), x, rounded(x, 8, "even"))
    low, high = bf16 << np.uint32(16), bf16 & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(low[~nan], want[~nan].view(np.uint32))
    np.testing.assert_array_equal(high[~nan], (-want[~nan]).view(np.uint32))
    assert (low[nan] == 0x7FFF0000).all()
    # the checks can tell the two ways of rounding, and rounding from truncation
    other = np.where(np.isinf(x), x, rounded(x, 11, "even"))
    assert (tf32[finite] != other[finite].view(np.uint32)).any()
    assert (tf32[finite] != x[finite].view(np.uint32) & np.uint32(0xFFFFE000)).any()


def truncated(exact: Fraction) -> np.float32:
    """The float32 nearest to ``exact`` among those between it and zero."""
    if abs(exact) >= 2**128:
        return np.float32(np.inf if exact > 0 else -np.inf)
    with np.errstate(over="ignore"):
        near = np.float32(float(exact))
    if np.isinf(near) or abs(Fraction(float(near))) > abs(exact):
        near = np.nextafter(near, np.float32(0))
    return near


def exact_product(a: Any, b: Any, d: Any) -> list[list[Fraction]]:
    af = [[Fraction(float(v)) for v in row] for row in a]
    bf = [[Fraction(float(v)) for v in row] for row in b]
    return [
        [
            Fraction(float(d[i, j])) + sum(af[i][k] * bf[k][j] for k in range(len(bf)))
            for j in range(8)
        ]
        for i in range(16)
    ]


@pytest.mark.parametrize(
    ("kernel", "depth", "digits", "ties"),
    [
        ("multiply_tf32", 8, 11, "away"),
        ("multiply_tf32_k4", 4, 11, "away"),
        ("multiply_tf32_by_matrices", 8, 11, "away"),
        ("multiply_bf16", 16, 8, "even"),
        ("multiply_bf16_by_matrices", 16, 8, "even"),
    ],
)
@pytest.mark.parametrize("spread", [0, 20])
def test_tensor_core_products(
    kernel: str, depth: int, digits: int, ties: Literal["even", "away"], spread: int
) -> None:
    """Exact products, one sum, truncated: bit for bit, also where exponents lie far apart."""
    rng = np.random.default_rng(depth + spread)

    def matrix(*shape: int) -> NDArray[np.float32]:
        scale = np.exp2(rng.integers(-spread, spread + 1, shape))
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    a, b, d = matrix(16, depth), matrix(depth, 8), matrix(16, 8)
    got = d.copy()
    launch("tensor", kernel, 1, 32, [a, b, got])
    exact = exact_product(rounded(a, digits, ties), rounded(b, digits, ties), d)
    want = np.array([[truncated(v) for v in row] for row in exact])
    np.testing.assert_array_equal(got, want)
    nearest = np.array([[float(v) for v in row] for row in exact]).astype(np.float32)
    assert (got != nearest).any()
    assert (np.abs(got) <= np.abs(nearest)).all()


@pytest.mark.parametrize(
    ("start", "a", "b", "want"),
    [
        (1.0, [2.0**-60], [1.0], 1.0),
        (1.0, [2.0**-60], [-1.0], 1.0 - 2.0**-24),  # the bits beyond double decide
        (-1.0, [2.0**-60], [1.0], -1.0 + 2.0**-24),
        (1.0, [2.0**-60, 2.0**-60], [1.0, -1.0], 1.0),
        (0.0, [2.0**60, 2.0**-60, 2.0**60], [1.0, 1.0, -1.0], 2.0**-60),  # cancellation
        (2.0**127, [2.0**127], [1.0], np.inf),
        (-(2.0**127), [2.0**127], [-1.0], -np.inf),
        (2.0**127, [2.0**64, 2.0**-60], [2.0**63, -1.0], np.finfo(np.float32).max),
        (0.0, [2.0**-75], [2.0**-74], 2.0**-149),
        (0.0, [2.0**-75], [2.0**-75], 0.0),
        (np.inf, [-np.inf], [1.0], np.nan),
    ],
)
def test_tensor_core_edges(start: float, a: list[float], b: list[float], want: float) -> None:
    fa, fb = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    fa[:, : len(a)], fb[: len(b)] = a, np.array(b)[:, None]
    d = np.full((16, 8), start, np.float32)
    if not np.isinf(start):
        fb[len(b) :] = 0
    launch("tensor", "multiply_tf32", 1, 32, [fa, fb, d])
    np.testing.assert_array_equal(d, np.full((16, 8), want, np.float32))


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_tensor_cores_under_the_sanitizers(kind: Sanitizer) -> None:
    a, b = np.ones((16, 16), np.float32), np.ones((16, 8), np.float32)
    out = np.zeros((16, 8), np.float32)
    sanitized(kind, "tensor", "multiply_bf16_by_matrices", 1, 32, [a, b, out])
    assert (out == 16).all()


def test_moves_of_matrices() -> None:
    x = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((4, 4, 8, 8), np.uint16)
    launch("tensor", "move_matrices", 1, 32, [x, out])
    turned = x.transpose(0, 2, 1)
    np.testing.assert_array_equal(out, [x, turned, turned, turned])
    sanitized("thread", "tensor", "move_matrices", 1, 32, [x, out])


def test_tensor_core_misuse() -> None:
    out = np.zeros(32, np.uint32)
    launch("tensor", "load_one_matrix", 1, 32, [out, i32(0)], 128)
    np.testing.assert_array_equal(out, [(2 * i + 1) << 16 | 2 * i for i in range(32)])
    for shift, words in [(4, "not aligned to 16 bytes"), (8, "outside the block's shared memory")]:
        text = refused("tensor", "load_one_matrix", 1, 32, [out, i32(shift)], 128)
        assert f"ldmatrix of a row {words}" in text or f"ldmatrix of a row that is {words}" in text
        assert here("tensor", "row") in text
    text = refused("tensor", "multiply_by_part_of_a_warp", 1, 32, [np.zeros(16, np.float32)])
    assert "mma.m16n8k8.tf32 by lanes 0x0000ffff: all 32 must take part" in text
    assert here("tensor", "part") in text


# ------------------------------------------------------------------------------- speed


def test_switches_are_cheap() -> None:
    """A launch of 32 blocks of 512 threads and 100 barriers takes tens of milliseconds."""
    out = np.zeros(32, np.int32)
    basics = module("basics")
    best = min(
        (basics.launch("barriers", 32, 512, [out, i32(100)]) for _ in range(3)),
        key=lambda s: s.seconds,
    )
    assert best.switches >= 32 * 512 * 100
    assert best.seconds < 2.0  # 25 ms on two idle cores; the margin is for busy ones
