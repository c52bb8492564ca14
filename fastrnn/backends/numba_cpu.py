"""The ``numba`` backend: compiled code and threads of its own on ``numpy.ndarray``.

The ops are in :mod:`fastrnn.backends.cpu_ops`, the fused step in :mod:`fastrnn.backends.cpu_step`,
generation in :mod:`fastrnn.backends.cpu_generate`; this module allocates what they work on and
decides how many threads a call is worth.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np

from fastrnn.backend import Array, Backend, Dims, HostArray, Workspace
from fastrnn.backends import cpu_ops as ops
from fastrnn.backends.cpu_emitter import MR, VECTOR_BYTES, panel_width
from fastrnn.backends.cpu_generate import BINS, generate
from fastrnn.backends.cpu_kernels import SPAN
from fastrnn.backends.cpu_step import blocks_of_a_group, run_steps
from fastrnn.backends.cpu_threads import Team, claims, thread_count
from fastrnn.decoding import Decoding

_WORTH_THREADS = 8e6
"""Operations from which waking the other threads pays.

A multiply-add in registers counts two, one element moved through memory twenty.
"""

_KEPT_CALLS, _KEPT_BYTES = 4, 16 << 20
"""Calls whose work memory is kept for the next of their kind, and the bytes of each at the most."""

_LINE = 64
"""Bytes of a cache line: a load that crosses two costs twice."""


class NumbaBackend(Backend):
    """Backend on ``numpy.ndarray``: every op compiled for this machine's vector unit."""

    name = "numba"

    def __init__(self, team: Team | None = None) -> None:
        self._team = team or Team(thread_count())
        self._spare: dict[Any, list[Array]] = {}

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return _Memory(_bytes(shape, dtype)).take(shape, dtype)

    def put(self, host: HostArray, out: Array | None = None) -> Array:
        if out is None:
            out = self.empty(np.shape(host), host.dtype)
        out[...] = host
        return out

    def get(self, array: Array) -> HostArray:
        return np.array(array)

    def sync(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "numba": numba.__version__,
            "numpy": np.__version__,
            "llvm": ".".join(map(str, llvm.llvm_version_info)),
            "device": llvm.get_host_cpu_name() or platform.processor() or "CPU",
            "threads": self._team.size,
            "vector_bytes": VECTOR_BYTES,
        }

    # --- ops ---

    def window(self, tokens: Array, starts: Array, out: tuple[Array, Array]) -> None:
        ops.window(tokens, starts, *out)

    def gather(self, W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
        H = W_xh.shape[1]
        z = np.empty((*tokens.shape, H), W_xh.dtype) if out is None else out
        self._run(20 * z.size, ops.gather, W_xh, tokens.ravel(), b_h, z.reshape(-1, H))
        return z

    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        H = dz.shape[-1]
        dW_xh, db_h = out or (np.empty((V, H), dz.dtype), np.empty(H, dz.dtype))
        self._run(
            20 * (dz.size + dW_xh.size),
            ops.gather_backward,
            dz.reshape(-1, H),
            tokens.ravel(),
            dW_xh,
            db_h,
        )
        return dW_xh, db_h

    def recurrence(self, z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
        T, B, H = z.shape
        h = np.empty_like(z) if out is None else out
        with self._work((H, H), (2 * B, H), dtype=z.dtype) as work:
            self._run(
                2 * T * B * H * H,
                ops.recurrence,
                B,
                z.reshape(-1, H),
                W_hh,
                h0,
                h.reshape(-1, H),
                *work,
            )
        return h

    def recurrence_backward(
        self,
        dh: Array,
        h: Array,
        W_hh: Array,
        h0: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        """W_hh may be in Fortran order; without an array for dW_hh in ``out`` it is not made."""
        T, B, H = h.shape
        dz, dW_hh, dh0 = out or (np.empty_like(dh), np.empty((H, H), h.dtype), np.empty_like(h0))
        wanted = dW_hh is not None
        span = min(T, max(1, 2 * SPAN // B))
        rows = (span + 1) * B
        shapes = (H, H), (rows * wanted, H), (rows, H)
        with self._work(*shapes, dtype=h.dtype) as (packed, h_panels, dz_panels):
            self._run(
                (4 if wanted else 2) * T * B * H * H,
                ops.recurrence_backward,
                B,
                dh.reshape(-1, H),
                h.reshape(-1, H),
                W_hh,
                h0,
                dz.reshape(-1, H),
                dW_hh if wanted else np.empty((0, 0), h.dtype),
                dh0,
                packed,
                span,
                h_panels,
                dz_panels,
                self._scratch(h.dtype),
            )
        return dz, dW_hh, dh0

    def project(self, h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
        T, B, H = h.shape
        V = len(b_q)
        logits = np.empty((T, B, V), h.dtype) if out is None else out
        with self._work((T * B | 1, H), (H, V), (1, V), dtype=h.dtype) as work:
            self._run(
                2 * T * B * H * V,
                ops.project,
                h.reshape(-1, H),
                W_hq,
                b_q,
                logits.reshape(-1, V),
                *work,
                self._scratch(h.dtype),
            )
        return logits

    def project_backward(
        self,
        dlogits: Array,
        h: Array,
        W_hq: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        T, B, H = h.shape
        V = W_hq.shape[1]
        dh, dW_hq, db_q = out or (np.empty_like(h), np.empty_like(W_hq), np.empty(V, h.dtype))
        with self._work((T * B | 1, H), (T * B | 1, V), (V, H), dtype=h.dtype) as work:
            self._run(
                4 * T * B * H * V,
                ops.project_backward,
                dlogits.reshape(-1, V),
                h.reshape(-1, H),
                W_hq,
                dh.reshape(-1, H),
                dW_hq,
                db_q,
                *work,
                self._scratch(h.dtype),
            )
        return dh, dW_hq, db_q

    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        loss, dlogits = out or (np.empty((), logits.dtype), np.empty_like(logits))
        losses = np.empty(targets.size)
        self._run(
            20 * logits.size,
            ops.cross_entropy,
            logits.reshape(-1),
            targets.ravel(),
            logits.shape[-1],
            dlogits.reshape(-1),
            losses,
            self._scratch(logits.dtype),
        )
        loss[...] = losses.mean()
        return loss, dlogits

    def clip_by_global_norm(
        self, grads: Sequence[Array], max_norm: float, out: Array | None = None
    ) -> Array:
        norm = np.empty((), grads[0].dtype) if out is None else out
        total = 0.0
        for g in grads:
            partial = np.empty(-(-g.size // ops.CHUNK))
            self._run(20 * g.size, ops.sum_of_squares, g.reshape(-1), partial)
            total += float(partial.sum())
        norm[...] = np.sqrt(total)
        if norm > max_norm:
            for g in grads:
                factor = g.dtype.type(max_norm / float(norm))
                self._run(40 * g.size, ops.scale, g.reshape(-1), factor)
        return norm

    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        for p, g in zip(params, grads, strict=True):
            self._run(40 * p.size, ops.sgd, p.reshape(-1), g.reshape(-1), p.dtype.type(lr))

    def record(self, loss: Array, norm: Array, totals: Array) -> None:
        totals += (loss, norm, 1.0, not (np.isfinite(loss) and np.isfinite(norm)))

    def generate(
        self,
        params: Mapping[str, Array],
        prefix: HostArray,
        lengths: HostArray,
        num_tokens: int,
        decoding: Decoding,
        *,
        h0: HostArray | None = None,
        position: int = 0,
        sequence: int = 0,
    ) -> tuple[HostArray, HostArray]:
        W_xh, W_hh, W_hq = params["W_xh"], params["W_hh"], params["W_hq"]
        (V, H), S, dtype = W_xh.shape, len(prefix), W_xh.dtype
        h = np.zeros((S, H), dtype) if h0 is None else np.array(h0, dtype, order="C")
        tokens = np.empty((S, num_tokens), np.int32)
        threads = self._team.size
        shapes = (H, H), (H, V), (1, H), (1, V), (2 * S, H), (S, V)
        with self._work(*shapes, dtype=dtype) as work:
            self._run(
                2 * S * H * (H * (prefix.shape[1] + num_tokens) + V * num_tokens),
                generate,
                W_xh,
                W_hh,
                params["b_h"],
                W_hq,
                params["b_q"],
                np.ascontiguousarray(prefix, np.int32),
                np.ascontiguousarray(lengths, np.int32),
                h,
                float(decoding.temperature),
                int(decoding.top_k),
                float(decoding.top_p),
                np.uint64(decoding.seed),
                sequence,
                position,
                tokens,
                *work,
                np.empty((threads, V)),
                np.empty((threads, V + 2)),
                np.empty((threads, 3, V), np.int64),
                np.empty((threads, BINS)),
                np.empty((threads, S), np.int32),
                np.empty((threads, threads, S), dtype),
                np.empty((threads, threads, S), np.int64),
                claims(threads + 1, threads),
            )
        return tokens, h

    # --- the training step ---

    def workspace(
        self, dims: Dims, tokens: HostArray, params: Mapping[str, HostArray]
    ) -> Workspace:
        T, B, H, V, dtype = dims.T, dims.B, dims.H, dims.V, dims.dtype
        W = panel_width(dtype)
        # An odd number of rows: panels of 4 KiB multiples would fall on the same cache sets.
        rows, h_rows = T * B | 1, (T + 1) * B | 1
        shapes = {
            "h": (h_rows, H),
            "dz": (rows, H),
            "logits": (rows, V),
            "packed_hh": (H, H),
            "packed_hh_t": (H, H),
            "packed_hq": (H, V),
            "packed_hq_t": (V, H),
            "bias_h": (1, H),
            "bias_q": (1, V),
        }
        H_panels, V_panels = -(-H // W), -(-V // W)
        blocks = (V_panels + H_panels) * (H_panels + 1) + H_panels
        flat = 2 * _bytes((dims.flat_size,), dtype)
        memory = _Memory(flat + sum(_bytes(_panelled(s, dtype), dtype) for s in shapes.values()))

        flat_params, flat_grads = (memory.take((dims.flat_size,), dtype) for _ in range(2))
        for name, view in dims.views(flat_params).items():
            view[...] = params[name]
        own = {name: memory.take(_panelled(s, dtype), dtype) for name, s in shapes.items()}
        # The panels and the arrays of the single ops are never in use together: one memory.
        h, dz = (own[name][: T * B * H].reshape(T, B, H) for name in ("h", "dz"))
        return Workspace(
            dims=dims,
            tokens=self.put(tokens),
            flat_params=flat_params,
            flat_grads=flat_grads,
            params=dims.views(flat_params),
            grads=dims.views(flat_grads),
            x=np.empty((T, B), np.int32),
            y=np.empty((T, B), np.int32),
            h0=np.zeros((B, H), dtype),
            z=h,
            h=h,
            dh=dz,
            dz=dz,
            dh0=np.empty((B, H), dtype),
            logits=own["logits"][: T * B * V].reshape(T, B, V),
            loss=np.empty((), dtype),
            norm=np.empty((), dtype),
            totals=np.zeros(4),
            extra={
                **own,
                "h_rows": h_rows,
                "rows": rows,
                "scratch": self._scratch(dtype),
                "losses": np.empty(T * B),
                "partial": np.empty(blocks),
                "seen": np.zeros(V, np.int64),
                "used": np.zeros((2, min(V, T * B)), np.int32),
                "counts": np.zeros(4, np.int64),
                "blocks": claims(
                    -(-B // MR), blocks_of_a_group(T, B, V, dtype.itemsize, self._team.size)
                ),
                "parts": claims(2, 1 if self._team.size == 1 else 4 * self._team.size),
            },
        )

    def step(self, ws: Workspace, starts: Array, lr: float, max_norm: float, carry: bool) -> None:
        self.run_steps(ws, starts[None], lr, max_norm, carry)

    def run_steps(
        self, ws: Workspace, starts: HostArray, lr: float, max_norm: float, carry: bool
    ) -> None:
        self._run_steps(ws, starts, lr, max_norm, carry, True, ws.totals)

    def evaluate(self, ws: Workspace, starts: HostArray, carry: bool) -> float:
        total = np.zeros(1)
        self._run_steps(ws, starts, 0.0, 1.0, carry, False, total)
        return float(total[0]) / len(starts)

    def _run_steps(
        self,
        ws: Workspace,
        starts: HostArray,
        lr: float,
        max_norm: float,
        carry: bool,
        train: bool,
        totals: Array,
    ) -> None:
        p, g, own, dims = ws.params, ws.grads, ws.extra, ws.dims
        self._run(
            6 * len(starts) * dims.T * dims.B * dims.H * (dims.H + dims.V),
            run_steps,
            ws.tokens,
            np.ascontiguousarray(starts, np.int32),
            dims.T,
            train,
            bool(carry),
            float(lr),
            float(max_norm),
            *(p[name] for name in ("W_xh", "W_hh", "b_h", "W_hq", "b_q")),
            *(g[name] for name in ("W_xh", "W_hh", "b_h", "W_hq", "b_q")),
            ws.x.reshape(-1),
            ws.y.reshape(-1),
            ws.h0,
            *own.values(),
            ws.loss.reshape(1),
            ws.norm.reshape(1),
            totals,
        )

    # --- parts ---

    def _run(self, operations: float, function: Any, *arguments: Any) -> None:
        threads = self._team.size if operations >= _WORTH_THREADS else 1
        self._team.run(function, *arguments, threads=threads)

    @contextlib.contextmanager
    def _work(self, *shapes: tuple[int, int], dtype: Any) -> Iterator[list[Array]]:
        """Panelled matrices for the time of one call, whose padding is zero.

        The memory of a few calls is kept for calls of the same shapes: the system takes
        longer to hand out fresh pages than a short call to run.
        """
        key = (shapes, np.dtype(dtype))
        arrays = self._spare.pop(key, None)
        if arrays is None:
            memory = _Memory(sum(_bytes(_panelled(s, dtype), dtype) for s in shapes))
            arrays = [memory.take(_panelled(s, dtype), dtype) for s in shapes]
        yield arrays
        if sum(a.nbytes for a in arrays) <= _KEPT_BYTES:
            if len(self._spare) >= _KEPT_CALLS:
                self._spare.clear()
            self._spare[key] = arrays

    def _scratch(self, dtype: Any) -> Array:
        """Of each thread: SPAN rows of a panel, and three numbers a tile's row."""
        W = panel_width(dtype)
        columns = -(-(SPAN * W + 3 * MR) // W) * W
        return _Memory(_bytes((self._team.size, columns), dtype)).take(
            (self._team.size, columns), dtype
        )


# --- Memory ----------------------------------------------------------------------------------

_LINE = 64
_HUGE = 2 << 20


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array, up to whole cache lines."""
    return -(-math.prod(shape) * int(np.dtype(dtype).itemsize) // _LINE) * _LINE


def _panelled(shape: tuple[int, int], dtype: Any) -> tuple[int]:
    """The elements of a panelled matrix, as a shape."""
    W = panel_width(dtype)
    return (shape[0] * -(-shape[1] // W) * W,)


class _Memory:
    """Zeroed memory to take arrays from, each on a cache line of its own.

    A load that crosses two cache lines costs twice. From 2 MiB on the memory lies on huge pages
    where the system has them: the processor then finds an address without walking page tables.
    """

    def __init__(self, size: int) -> None:
        if size >= _HUGE and hasattr(mmap, "MAP_ANONYMOUS"):
            pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):
                    pages.madvise(mmap.MADV_HUGEPAGE)
            whole, step = np.frombuffer(pages, np.uint8), _HUGE
        else:
            whole, step = np.zeros(size + _LINE, np.uint8), _LINE
        start = -whole.ctypes.data % step
        self._left = whole[start : start + size]

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The next array."""
        size = _bytes(shape, dtype)
        taken, self._left = self._left[:size], self._left[size:]
        count = math.prod(shape)
        return taken.view(dtype)[:count].reshape(shape)
