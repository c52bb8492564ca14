"""Triton: the recurrence as one writes it today, one launch for all time steps and a block of rows.

A program keeps h of its block of batch rows in registers and walks through time. ``tl.dot`` takes
16 rows and columns at the least, so a block has 16 rows, and H is padded to a power of two.

- Up to H = 128, W_hh is loaded once, before the loop.
- Beyond that it does not fit: at H = 256 Triton asks for 272 KiB of shared memory where sm_90 has
  227. Each time step then loads W_hh anew in slabs of rows, which come from the L2 cache, and h
  too, which its own program has written just before. Slab and warps are chosen by trial, as
  ``triton.autotune`` would.

Backward, dz of all time steps is made by one launch, dW_hh by ``torch.matmul`` afterwards. The
variant is ``ieee`` or ``tf32``, the precision of ``tl.dot``, then ``cuda`` for a GPU (without it
Triton's interpreter runs, with TRITON_INTERPRET=1) and ``graph`` for a CUDA graph.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch_rnn import device_of, runner, wait
from torch_rnn import versions as torch_versions


def versions() -> dict[str, str]:
    return {**torch_versions(), "triton": triton.__version__}


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    state, w, at, rows, W, H, stride_k, stride_n, inside_rows,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``state @ w``; streamed, of the state in memory at ``at`` and W with the strides given."""
    if BLOCK_K == BLOCK_H:
        product = tl.dot(state, w, input_precision=PRECISION)
    else:
        columns = tl.arange(0, BLOCK_H)
        product = tl.zeros_like(state)
        for first in range(0, H, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            part = tl.load(
                at + rows[:, None] * H + k[None, :],
                mask=inside_rows[:, None] & (k[None, :] < H),
                other=0.0,
            )
            slab = tl.load(
                W + k[:, None] * stride_k + columns[None, :] * stride_n,
                mask=(k[:, None] < H) & (columns[None, :] < H),
                other=0.0,
            )
            product = tl.dot(part, slab, product, input_precision=PRECISION)
    return product


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    z, W, h0, h, T, B, H,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_H)
    inside = (rows[:, None] < B) & (columns[None, :] < H)
    place = rows[:, None] * H + columns[None, :]
    w = 0.0
    if BLOCK_K == BLOCK_H:
        square = (columns[:, None] < H) & (columns[None, :] < H)
        w = tl.load(W + columns[:, None] * H + columns[None, :], mask=square, other=0.0)
    state = tl.load(h0 + place, mask=inside, other=0.0)
    at = h0
    for t in range(T):
        x = tl.load(z + t * B * H + place, mask=inside, other=0.0)
        x += multiply(state, w, at, rows, W, H, H, 1, rows < B, BLOCK_H, BLOCK_K, PRECISION)
        state = tanh(x)
        at = h + t * B * H
        tl.store(at + place, state, mask=inside)
        if BLOCK_K != BLOCK_H:
            tl.debug_barrier()  # other threads of the program read it


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    dh, h, W, dz, dh0, T, B, H,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_H)
    inside = (rows[:, None] < B) & (columns[None, :] < H)
    place = rows[:, None] * H + columns[None, :]
    w = 0.0
    if BLOCK_K == BLOCK_H:  # W transposed
        square = (columns[:, None] < H) & (columns[None, :] < H)
        w = tl.load(W + columns[None, :] * H + columns[:, None], mask=square, other=0.0)
    back = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    for s in range(T):
        t = T - 1 - s
        state = tl.load(h + t * B * H + place, mask=inside, other=0.0)
        gradient = back + tl.load(dh + t * B * H + place, mask=inside, other=0.0)
        gradient *= 1.0 - state * state
        at = dz + t * B * H
        tl.store(at + place, gradient, mask=inside)
        if BLOCK_K != BLOCK_H:
            tl.debug_barrier()
        back = multiply(gradient, w, at, rows, W, H, 1, H, rows < B, BLOCK_H, BLOCK_K, PRECISION)
    tl.store(dh0 + place, back, mask=inside)


BLOCK_B = 16
RESIDENT = 128
"""The largest padded H at which W_hh is loaded once."""
CONFIGURATIONS = ((32, 8), (32, 16), (64, 16), (16, 16))
"""Rows of W_hh in a slab, and warps, beyond that."""


class Recurrence:
    names: tuple[str, ...] = ("z", "W_hh", "h0")

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        words = variant.split("-")
        self.precision = "tf32" if "tf32" in words else "ieee"
        self.device = device_of(words)
        self.a = {n: torch.tensor(problem[n], device=self.device) for n in self.names}
        self.T, self.B, self.H = self.a["z"].shape
        self.block_h = max(16, triton.next_power_of_2(self.H))
        self.slab, self.warps = self.fastest()
        self.calls = runner(self.once, words)

    def launch(self, kernel: Any, *arrays: torch.Tensor) -> None:
        kernel[(triton.cdiv(self.B, BLOCK_B),)](
            *arrays,
            self.T,
            self.B,
            self.H,
            BLOCK_B=BLOCK_B,
            BLOCK_H=self.block_h,
            BLOCK_K=self.slab,
            PRECISION=self.precision,
            num_warps=self.warps,
        )

    def fastest(self) -> tuple[int, int]:
        """The slab and the warps to launch with; those that do not fit are left out."""
        if self.block_h <= RESIDENT:
            return self.block_h, 8 if self.block_h >= 64 else 4
        found: dict[tuple[int, int], float] = {}
        errors = []
        for self.slab, self.warps in CONFIGURATIONS:
            try:
                self.once()
            except triton.OutOfResources as error:
                errors.append(error)
                continue
            wait(self.device)
            begin = time.perf_counter()
            for _ in range(5):
                self.once()
            wait(self.device)
            found[self.slab, self.warps] = time.perf_counter() - begin
        if not found:
            raise errors[-1]
        return min(found, key=lambda choice: found[choice])

    def once(self) -> Any:
        h = torch.empty_like(self.a["z"])
        self.launch(forward, self.a["z"], self.a["W_hh"], self.a["h0"], h)
        return h

    def run(self, n: int) -> None:
        self.out = self.calls(n)
        wait(self.device)

    def result(self) -> dict[str, Any]:
        return {"h": self.out.cpu().numpy()}


class RecurrenceBPTT(Recurrence):
    names = ("z", "W_hh", "h0", "dh")

    def once(self) -> Any:
        h = super().once()
        dz, dh0 = torch.empty_like(h), torch.empty_like(self.a["h0"])
        self.launch(backward, self.a["dh"], h, self.a["W_hh"], dz, dh0)
        before = torch.cat([self.a["h0"][None], h[:-1]])
        return dz, torch.matmul(before.flatten(0, 1).T, dz.flatten(0, 1)), dh0

    def result(self) -> dict[str, Any]:
        names = ("dz", "dW_hh", "dh0")
        return {n: a.cpu().numpy() for n, a in zip(names, self.out, strict=True)}


WORKLOADS = {"recurrence": Recurrence, "recurrence+bptt": RecurrenceBPTT}
