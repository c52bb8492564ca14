"""The ``numba`` backend: compiled code and threads of its own on ``numpy.ndarray``.

The ops and the fused step are in :mod:`fastrnn.backends.cpu_kernels`; this module allocates what
they work on and decides how many threads a call is worth.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np

from fastrnn.backend import Array, Backend, Dims, HostArray, Workspace
from fastrnn.backends import cpu_kernels as kernels
from fastrnn.backends.cpu_threads import Team, thread_count
from fastrnn.decoding import Decoding

_WORTH_THREADS = 8e6
"""Operations (a multiply-add counts two) from which waking the other threads pays."""

_LINE = 64
"""Bytes of a cache line: a load that crosses two costs twice."""


class NumbaBackend(Backend):
    """Backend on ``numpy.ndarray``: every op compiled for this machine's vector unit."""

    name = "numba"

    def __init__(self) -> None:
        self._team = Team(thread_count())

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def put(self, host: HostArray, out: Array | None = None) -> Array:
        if out is None:
            return np.array(host, order="C")
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
            "vector_bytes": kernels.VECTOR_BYTES,
        }

    # --- ops ---

    def window(self, tokens: Array, starts: Array, out: tuple[Array, Array]) -> None:
        kernels.window(tokens, starts, *out)

    def gather(self, W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
        H = W_xh.shape[1]
        z = np.empty((*tokens.shape, H), W_xh.dtype) if out is None else out
        self._run(20 * z.size, kernels.gather, W_xh, tokens.ravel(), b_h, z.reshape(-1, H))
        return z

    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        H = dz.shape[-1]
        dW_xh, db_h = out or (np.empty((V, H), dz.dtype), np.empty(H, dz.dtype))
        self._run(
            20 * (dz.size + dW_xh.size),
            kernels.gather_backward,
            dz.reshape(-1, H),
            tokens.ravel(),
            dW_xh,
            db_h,
        )
        return dW_xh, db_h

    def recurrence(self, z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
        T, B, H = z.shape
        h = np.empty_like(z) if out is None else out
        self._run(
            2 * T * B * H * H,
            kernels.recurrence,
            B,
            z.reshape(-1, H),
            W_hh,
            h0,
            h.reshape(-1, H),
            _panels(H, H, z.dtype),
            _panels(B, H, z.dtype),
            _panels(2 * B, H, z.dtype),
            self._tiles(z.dtype),
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
        self._run(
            (4 if wanted else 2) * T * B * H * H,
            kernels.recurrence_backward,
            B,
            dh.reshape(-1, H),
            h.reshape(-1, H),
            W_hh,
            h0,
            dz.reshape(-1, H),
            dW_hh if wanted else np.empty((0, 0), h.dtype),
            dh0,
            _panels(H, H, h.dtype),
            _panels(T * B * wanted, H, h.dtype),
            _panels(T * B * wanted, H, h.dtype),
            _panels(2 * B, H, h.dtype),
            self._tiles(h.dtype),
        )
        return dz, dW_hh, dh0

    def project(self, h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
        T, B, H = h.shape
        V = len(b_q)
        logits = np.empty((T, B, V), h.dtype) if out is None else out
        self._run(
            2 * T * B * H * V,
            kernels.project,
            h.reshape(-1, H),
            W_hq,
            b_q,
            logits.reshape(-1, V),
            _panels(T * B, H, h.dtype),
            _panels(H, V, h.dtype),
            _panels(1, V, h.dtype),
            self._tiles(h.dtype),
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
        self._run(
            4 * T * B * H * V,
            kernels.project_backward,
            dlogits.reshape(-1, V),
            h.reshape(-1, H),
            W_hq,
            dh.reshape(-1, H),
            dW_hq,
            db_q,
            _panels(T * B, H, h.dtype),
            _panels(T * B, V, h.dtype),
            _panels(V, H, h.dtype),
            self._tiles(h.dtype),
        )
        return dh, dW_hq, db_q

    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        loss, dlogits = out or (np.empty((), logits.dtype), np.empty_like(logits))
        losses = np.empty(targets.size)
        self._run(
            20 * logits.size,
            kernels.cross_entropy,
            logits.reshape(-1),
            targets.ravel(),
            logits.shape[-1],
            dlogits.reshape(-1),
            losses,
            self._tiles(logits.dtype),
        )
        loss[...] = losses.mean()
        return loss, dlogits

    def clip_by_global_norm(
        self, grads: Sequence[Array], max_norm: float, out: Array | None = None
    ) -> Array:
        norm = np.empty((), grads[0].dtype) if out is None else out
        total = 0.0
        for g in grads:
            partial = np.empty(kernels.num_chunks(g.size))
            self._run(4 * g.size, kernels.sum_of_squares, g.reshape(-1), partial)
            total += float(partial.sum())
        norm[...] = np.sqrt(total)
        if norm > max_norm:
            for g in grads:
                factor = g.dtype.type(max_norm / float(norm))
                self._run(4 * g.size, kernels.scale, g.reshape(-1), factor)
        return norm

    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        for p, g in zip(params, grads, strict=True):
            self._run(8 * p.size, kernels.sgd, p.reshape(-1), g.reshape(-1), p.dtype.type(lr))

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
        self._run(
            2 * S * H * (H * (prefix.shape[1] + num_tokens) + V * num_tokens),
            kernels.generate,
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
            _panels(H, H, dtype),
            _panels(H, V, dtype),
            _panels(1, V, dtype),
            _panels(S, H, dtype),
            _panels(2 * S, H, dtype).reshape(2, -1),
            _panels(S, V, dtype),
            np.empty((threads, V), dtype),
            np.empty((threads, V)),
            np.empty((threads, S), dtype),
            np.empty((threads, S), np.int64),
            self._tiles(dtype),
        )
        return tokens, h

    # --- the training step ---

    def workspace(
        self, dims: Dims, tokens: HostArray, params: Mapping[str, HostArray]
    ) -> Workspace:
        ws = super().workspace(dims, tokens, params)
        T, B, H, V, dtype = dims.T, dims.B, dims.H, dims.V, dims.dtype
        # An odd number of rows: panels of 4 KiB multiples would fall on the same cache sets.
        stride = T * B | 1
        panels = {
            "h": _panels(stride, H, dtype),
            "dz": _panels(stride, H, dtype),
            "logits": _panels(stride, V, dtype),
        }
        # The panels and the arrays of the single ops are never in use together: one memory.
        ws.z = ws.h = panels["h"][: T * B * H].reshape(T, B, H)
        ws.dh = ws.dz = panels["dz"][: T * B * H].reshape(T, B, H)
        ws.logits = panels["logits"][: T * B * V].reshape(T, B, V)
        ws.extra = {
            **panels,
            "stride": stride,
            "packed_hh": _panels(H, H, dtype),
            "packed_hh_t": _panels(H, H, dtype),
            "packed_hq": _panels(H, V, dtype),
            "packed_hq_t": _panels(V, H, dtype),
            "bias": _panels(1, V, dtype),
            "h0_panels": _panels(B, H, dtype),
            "tiles": self._tiles(dtype),
            "losses": np.empty(T * B),
            "partial": np.empty(kernels.num_chunks(dims.flat_size)),
        }
        return ws

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
            kernels.run_steps,
            ws.tokens,
            np.ascontiguousarray(starts, np.int32),
            dims.T,
            train,
            bool(carry),
            float(lr),
            float(max_norm),
            ws.flat_params,
            p["W_xh"],
            p["W_hh"],
            p["b_h"],
            p["W_hq"],
            p["b_q"],
            ws.flat_grads,
            g["W_xh"],
            g["W_hh"],
            g["b_h"],
            g["W_hq"],
            g["b_q"],
            ws.x.reshape(-1),
            ws.y.reshape(-1),
            ws.h0,
            own["h"],
            own["dz"],
            own["logits"],
            own["stride"],
            own["packed_hh"],
            own["packed_hh_t"],
            own["packed_hq"],
            own["packed_hq_t"],
            own["bias"],
            own["h0_panels"],
            own["tiles"],
            own["losses"],
            own["partial"],
            ws.loss.reshape(1),
            ws.norm.reshape(1),
            totals,
        )

    # --- parts ---

    def _run(self, operations: float, function: Any, *arguments: Any) -> None:
        threads = self._team.size if operations >= _WORTH_THREADS else 1
        self._team.run(function, *arguments, threads=threads)

    def _tiles(self, dtype: Any) -> Array:
        """Scratch of each thread: a tile, and a little for results of vector code."""
        W = kernels.panel_width(dtype)
        return np.empty((self._team.size, (kernels.MR + 1) * W), dtype)


def _panels(rows: int, columns: int, dtype: Any) -> Array:
    """Memory for a panelled matrix, on cache lines; zero, so that the padding is."""
    W = kernels.panel_width(dtype)
    size = rows * -(-columns // W) * W
    memory = np.zeros(size + _LINE // np.dtype(dtype).itemsize, dtype)
    first = -memory.__array_interface__["data"][0] % _LINE // memory.itemsize
    return memory[first : first + size]
