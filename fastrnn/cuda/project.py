"""The model's matrix products: the output layer, ``dW_hh``, and the steps of a wide recurrence.

Every product is :func:`fastrnn.cuda.gemm.gemm`. Arrays are float32 or float64, all of one dtype;
states are ``[T, B, H]`` or ``[M, H]`` with ``M = T·B``. Logits and ``W_hq`` may lie in rows of
``ld`` elements: rows that begin at multiples of 16 bytes are read faster (see :func:`pad`).
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np

from fastrnn.cuda.device import Array, Device, Kernel, Scratch, ceil_div, real
from fastrnn.cuda.gemm import BIAS, TANH, TANH_BACKWARD, gemm

COLUMNS, SUM_THREADS, PAD_THREADS = 32, 1024, 256
"""Geometry of column_sum_kernel and pad_kernel, as in project.cu."""
FEW_ROWS = 2048
"""Up to so many rows one block sums a column in one go."""


class Share(TypedDict, total=False):
    """What a product gets of the device.

    counters: of :func:`fastrnn.cuda.gemm.new_counters`; products that may run at the same time
        must not share them. Without them they are taken from the scratch and cleared first.
    multiprocessors: for how many to plan, where others work on the rest; without it for all.
    """

    counters: Array
    multiprocessors: int


def column_sum_kernel(dtype: Any) -> Kernel:
    return Kernel("project", "column_sum_kernel", SUM_THREADS, (("REAL", real(dtype)),))


def pad_kernel(dtype: Any) -> Kernel:
    return Kernel("project", "pad_kernel", PAD_THREADS, (("REAL", real(dtype)),))


def variants() -> list[Kernel]:
    """Every kernel that is launched here itself; the products are gemm's."""
    return [k(dtype) for dtype in ("float32", "float64") for k in (column_sum_kernel, pad_kernel)]


def project(
    device: Device,
    h: Array,
    W_hq: Array,
    b_q: Array,
    logits: Array,
    *,
    ld_W: int | None = None,
    ld_logits: int | None = None,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``logits = h W_hq + b_q``: ``h [M, H]``, ``W_hq [H, V]``, ``b_q [V]``, ``logits [M, V]``."""
    H, V = h.shape[-1], b_q.shape[0]
    gemm(
        device, h, W_hq, logits, h.size // H, V, H,
        lda=H, ldb=ld_W or V, ldc=ld_logits or V, epilogue=BIAS, x=b_q,
        scratch=scratch, name="project", **share,
    )  # fmt: skip


def project_backward_h(
    device: Device,
    dlogits: Array,
    W_hq: Array,
    dh: Array,
    V: int,
    *,
    ld_W: int | None = None,
    ld_logits: int | None = None,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``dh = dlogits W_hqᵀ``: ``dlogits [M, V]``, ``W_hq [H, V]``, ``dh [M, H]``."""
    H = dh.shape[-1]
    gemm(
        device, dlogits, W_hq, dh, dh.size // H, H, V,
        lda=ld_logits or V, ldb=ld_W or V, ldc=H, trans_b=True,
        scratch=scratch, name="project_backward_h", **share,
    )  # fmt: skip


def project_backward_W(
    device: Device,
    h: Array,
    dlogits: Array,
    dW_hq: Array,
    *,
    ld_logits: int | None = None,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``dW_hq = hᵀ dlogits``: ``h [M, H]``, ``dlogits [M, V]``, ``dW_hq [H, V]``."""
    H, V = dW_hq.shape
    gemm(
        device, h, dlogits, dW_hq, H, V, h.size // H,
        lda=H, ldb=ld_logits or V, ldc=V, trans_a=True,
        scratch=scratch, name="project_backward_W", **share,
    )  # fmt: skip


def project_backward(
    device: Device,
    dlogits: Array,
    h: Array,
    W_hq: Array,
    dh: Array,
    dW_hq: Array,
    db_q: Array,
    *,
    ld_W: int | None = None,
    ld_logits: int | None = None,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``dh = dlogits W_hqᵀ``, ``dW_hq = hᵀ dlogits``, ``db_q [V]`` the column sums of dlogits."""
    V = db_q.shape[0]
    project_backward_h(
        device, dlogits, W_hq, dh, V, ld_W=ld_W, ld_logits=ld_logits, scratch=scratch, **share
    )
    project_backward_W(device, h, dlogits, dW_hq, ld_logits=ld_logits, scratch=scratch, **share)
    column_sum(device, dlogits, db_q, h.size // h.shape[-1], V, ld=ld_logits, scratch=scratch)


def recurrent_gradient(
    device: Device,
    h0: Array,
    h: Array,
    dz: Array,
    dW_hh: Array,
    *,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``dW_hh = Σ_t h_{t-1}ᵀ dz_t``: ``h0 [B, H]``, ``h`` and ``dz [T, B, H]``, ``dW_hh [H, H]``.

    One product over all T·B rows: those of ``h0``, then all but the last B of ``h``.
    """
    B, H = h0.shape
    gemm(
        device, h, dz, dW_hh, H, H, dz.size // H,
        lda=H, ldb=H, ldc=H, trans_a=True, head=h0, lead=B,
        scratch=scratch, name="recurrent_gradient", **share,
    )  # fmt: skip


def tanh_step(
    device: Device,
    h_before: Array,
    W_hh: Array,
    z_t: Array,
    h_t: Array,
    *,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``h_t = tanh(z_t + h_{t-1} W_hh)``: states ``[B, H]``, ``W_hh [H, H]``.

    ``z_t`` may be ``h_t``.
    """
    B, H = h_t.shape
    gemm(
        device, h_before, W_hh, h_t, B, H, H,
        lda=H, ldb=H, ldc=H, epilogue=TANH, x=z_t, scratch=scratch, name="tanh_step", **share,
    )  # fmt: skip


def tanh_step_backward(
    device: Device,
    dz_after: Array | None,
    W_hh: Array,
    dh_t: Array,
    h_t: Array,
    dz_t: Array,
    *,
    scratch: Scratch,
    **share: Unpack[Share],
) -> None:
    """``dz_t = (dh_t + dz_{t+1} W_hhᵀ) (1 - h_t²)``: all ``[B, H]``, ``W_hh [H, H]``.

    ``dz_after`` is ``dz_{t+1}``; None for the last step, which none follows. ``dh_t`` may be
    ``dz_t``.
    """
    B, H = h_t.shape
    gemm(
        device, dh_t if dz_after is None else dz_after, W_hh, dz_t,
        B, H, 0 if dz_after is None else H,
        lda=H, ldb=H, ldc=H, trans_b=True, epilogue=TANH_BACKWARD, x=dh_t, y=h_t,
        scratch=scratch, name="tanh_step_backward", **share,
    )  # fmt: skip


def initial_state_gradient(
    device: Device, dz_0: Array, W_hh: Array, dh0: Array, *, scratch: Scratch,
    **share: Unpack[Share],
) -> None:  # fmt: skip
    """``dh0 = dz_0 W_hhᵀ``: ``dz_0`` and ``dh0 [B, H]``, ``W_hh [H, H]``."""
    B, H = dh0.shape
    gemm(
        device, dz_0, W_hh, dh0, B, H, H, lda=H, ldb=H, ldc=H, trans_b=True,
        scratch=scratch, name="initial_state_gradient", **share,
    )  # fmt: skip


def column_sum(
    device: Device,
    x: Array,
    out: Array,
    rows: int,
    columns: int,
    *,
    ld: int | None = None,
    scratch: Scratch,
    name: str = "column_sum",
) -> None:
    """``out[v] = Σ_r x[r, v]``, the same bits in every run: ``x [rows, columns]``.

    Many rows of few columns are summed in parts, and then the parts.

    Args:
        ld: elements from one row of ``x`` to the next; None: ``columns``.
        name: of the scratch buffer; sums that may run at the same time must not share it.
    """
    dtype, ld = np.dtype(out.dtype), ld or columns
    across, device_wide = ceil_div(columns, COLUMNS), device.arch.multiprocessors
    parts = 1 if rows <= FEW_ROWS else max(1, min(device_wide // across, rows // FEW_ROWS))
    target = out if parts == 1 else scratch(f"{name} parts", parts * columns, dtype)
    kernel = column_sum_kernel(dtype)

    def submit(source: Array, target: Array, rows: int, ld: int, parts: int) -> None:
        each = ceil_div(rows, parts)
        sizes = map(np.int32, (rows, columns, ld, each))
        device.launch(kernel, (across, ceil_div(rows, each)), (source, target, *sizes))

    submit(x, target, rows, ld, parts)
    if parts > 1:
        submit(target, out, ceil_div(rows, ceil_div(rows, parts)), columns, 1)


def pad(device: Device, source: Array, rows: int, columns: int, ld: int, out: Array) -> None:
    """``out[r, :columns] = source[r, :]``, zeros up to ``ld``: rows at an aligned distance."""
    sizes = map(np.int32, (columns, ld))
    device.launch(pad_kernel(out.dtype), rows, (source, out, *sizes))
