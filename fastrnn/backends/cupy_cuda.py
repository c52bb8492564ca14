"""The ``cupy`` backend: the CUDA C kernels of ``kernels/``, and the training step as a CUDA graph.

An op goes to CuPy's current stream and leaves its result on the device. A training step is captured
once and replayed: what changes from step to step (the batch, the rates) is in device memory, and a
cursor that the last kernel of a step moves on says which batch is due. The path of a step, with
what runs beside it:

    x[cursor] -- gather, recurrence --> h -- project --> logits -- cross_entropy --> dlogits
                 beside: a copy of W_hq with aligned rows
    dlogits -- project_backward --> dh -- recurrence_backward --> dz -- dW_hh --> clip, sgd, record
                 beside: dW_hq, db_q                         beside: dW_xh, db_h; h_T to h_0

Batches are cut into windows, and their tokens sorted for ``dW_xh``, before the first step of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np

from fastrnn.backend import Array, Backend, Dims, HostArray, Workspace
from fastrnn.cuda import clip_sgd, cross_entropy, gather, gemm, generate, project, recurrence
from fastrnn.cuda.device import Device, Graph, Scratch, ceil_div
from fastrnn.cuda.project import Share
from fastrnn.decoding import Decoding

GRAPH_STEPS = 8
"""Training steps in a graph: the headline's epoch. What is left over runs as graphs of one step."""

BATCH_BYTES = 64 << 20
"""Memory for the windows and sorted tokens of a run; a longer run is cut into pieces."""

LD_STEP = 32
"""Rows of logits and of the copy of W_hq begin at multiples of so many elements: 128 bytes."""


class _Held:
    """Scratch that stays where it is, for captured work: a buffer for each name.

    Growing would leave a captured graph with a freed buffer, so a name keeps its first size, which
    the step that runs before the capture sets.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Array] = {}

    def __call__(self, name: str, size: int, dtype: Any) -> Array:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = self._device.empty((size,), dtype)
        assert buffer.size >= size, f"scratch {name!r} grew from {buffer.size} to {size}"
        return buffer[:size]

    def under(self, prefix: str) -> Scratch:
        """The same for work that runs beside other work: its names are its own."""
        return lambda name, size, dtype: self(f"{prefix}: {name}", size, dtype)


@dataclass
class _Run:
    """What a workspace keeps for :meth:`CupyBackend.run_steps`.

    Attributes:
        capacity: steps that the batch buffers hold.
        starts: int32 ``[capacity, B]``. x, y: int32 ``[capacity, T, B]``.
        order, bounds: int32 ``[capacity, T*B, 2]``, ``[capacity, V+1]``, of :func:`gather.sort`.
        rates: float64 ``[2]``: lr, max_norm. cursor: int32 ``[1]``: the step that is due.
        graphs: by number of steps and ``carry``. warm: which ``carry`` has run uncaptured.
    """

    capacity: int
    starts: Array
    x: Array
    y: Array
    order: Array
    bounds: Array
    rates: Array
    cursor: Array
    graphs: dict[tuple[int, bool], Graph] = field(default_factory=dict)
    warm: set[bool] = field(default_factory=set)


class CupyBackend(Backend):
    """Backend on ``cupy.ndarray``; see the module.

    Args:
        device: what the kernels run on; None opens the current CUDA device.

    Raises:
        BackendUnavailableError: there is no such device that works.
    """

    name = "cupy"

    def __init__(self, device: Device | None = None) -> None:
        if device is None:
            from fastrnn.cuda.cupy_device import CupyDevice

            device = CupyDevice()
        self.device = device

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.device.empty(shape, dtype)

    def put(self, host: HostArray, out: Array | None = None) -> Array:
        if out is not None and not isinstance(host, np.ndarray):
            self.device.copy(host, out)
            return out
        return self.device.put(host, out)

    def get(self, array: Array) -> HostArray:
        return self.device.get(array)

    def sync(self) -> None:
        self.device.sync()

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "numpy": np.__version__, **self.device.describe()}

    def _scratch(self, name: str, size: int, dtype: Any) -> Array:
        """Fresh memory for one op: freed in the order of the stream."""
        return self.device.empty((size,), dtype)

    # --- ops ---

    def window(self, tokens: Array, starts: Array, out: tuple[Array, Array]) -> None:
        gather.window(self.device, tokens, starts, *out)

    def gather(self, W_xh: Array, tokens: Array, b_h: Array, out: Array | None = None) -> Array:
        if out is None:
            out = self.empty((*tokens.shape, W_xh.shape[1]), W_xh.dtype)
        gather.gather(self.device, W_xh, tokens, b_h, out)
        return out

    def gather_backward(
        self, dz: Array, tokens: Array, V: int, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        H = dz.shape[2]
        if out is None:
            out = (self.empty((V, H), dz.dtype), self.empty((H,), dz.dtype))
        gather.gather_backward(self.device, dz, tokens, *out, self._scratch)
        return out

    def recurrence(self, z: Array, W_hh: Array, h0: Array, out: Array | None = None) -> Array:
        if out is None:
            out = self.empty(z.shape, z.dtype)
        self._recurrence(z, W_hh, h0, out, self._scratch)
        return out

    def _recurrence(
        self,
        z: Array,
        W_hh: Array,
        h0: Array,
        h: Array,
        scratch: Scratch,
        **share: Unpack[Share],
    ) -> None:
        if recurrence.fits(z.shape[2], z.dtype, self.device, z.shape[1]):
            recurrence.recurrence(self.device, z, W_hh, h0, h)
            return
        self._count(scratch, share)
        before = h0
        for z_t, h_t in zip(z, h, strict=True):
            project.tanh_step(self.device, before, W_hh, z_t, h_t, scratch=scratch, **share)
            before = h_t

    def _count(self, scratch: Scratch, share: Share) -> None:
        """Counters for one product after another, which each leaves at zero: cleared once."""
        if "counters" not in share:
            needed = gemm.counters_needed(self.device.arch)
            share["counters"] = scratch("recurrence counters", needed, np.uint32)
            self.device.fill_zero(share["counters"])

    def recurrence_backward(
        self,
        dh: Array,
        h: Array,
        W_hh: Array,
        h0: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        if out is None:
            out = (
                self.empty(dh.shape, dh.dtype),
                self.empty(W_hh.shape, dh.dtype),
                self.empty(h0.shape, dh.dtype),
            )
        dz, dW_hh, dh0 = out
        self._bptt(dh, h, W_hh, dz, dh0, self._scratch)
        project.recurrent_gradient(self.device, h0, h, dz, dW_hh, scratch=self._scratch)
        return out

    def _bptt(
        self,
        dh: Array,
        h: Array,
        W_hh: Array,
        dz: Array,
        dh0: Array,
        scratch: Scratch,
        **share: Unpack[Share],
    ) -> None:
        if recurrence.fits(h.shape[2], h.dtype, self.device, h.shape[1]):
            recurrence.recurrence_backward(self.device, dh, h, W_hh, dz, dh0)
            return
        self._count(scratch, share)
        after = None
        for t in reversed(range(len(h))):
            project.tanh_step_backward(
                self.device, after, W_hh, dh[t], h[t], dz[t], scratch=scratch, **share
            )
            after = dz[t]
        project.initial_state_gradient(self.device, dz[0], W_hh, dh0, scratch=scratch, **share)

    def project(self, h: Array, W_hq: Array, b_q: Array, out: Array | None = None) -> Array:
        if out is None:
            out = self.empty((*h.shape[:2], W_hq.shape[1]), h.dtype)
        project.project(self.device, h, W_hq, b_q, out, scratch=self._scratch)
        return out

    def project_backward(
        self,
        dlogits: Array,
        h: Array,
        W_hq: Array,
        out: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        if out is None:
            out = (
                self.empty(h.shape, h.dtype),
                self.empty(W_hq.shape, h.dtype),
                self.empty((W_hq.shape[1],), h.dtype),
            )
        project.project_backward(self.device, dlogits, h, W_hq, *out, scratch=self._scratch)
        return out

    def cross_entropy(
        self, logits: Array, targets: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        if out is None:
            out = (self.empty((), logits.dtype), self.empty(logits.shape, logits.dtype))
        loss, dlogits = out
        V, losses = logits.shape[2], self.empty((targets.size,), logits.dtype)
        counter = self.empty((1,), np.uint32)
        self.device.fill_zero(counter)
        cross_entropy.cross_entropy(self.device, logits, targets, V, losses, dlogits, loss, counter)
        return out

    def clip_by_global_norm(
        self, grads: Sequence[Array], max_norm: float, out: Array | None = None
    ) -> Array:
        if out is None:
            out = self.empty((), grads[0].dtype)
        clip_sgd.clip_by_global_norm(self.device, grads, float(max_norm), out, self._scratch)
        return out

    def sgd(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        clip_sgd.sgd(self.device, params, grads, float(lr))

    def record(self, loss: Array, norm: Array, totals: Array) -> None:
        clip_sgd.record(self.device, loss, norm, totals)

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
        W_hh, S = params["W_hh"], len(prefix)
        start = np.zeros((S, len(W_hh)), W_hh.dtype) if h0 is None else np.asarray(h0, W_hh.dtype)
        state = self.put(start)
        tokens = self.empty((S, num_tokens), np.int32)
        generate.generate(
            self.device,
            params,
            self.put(np.asarray(prefix, np.int32)),
            self.put(np.asarray(lengths, np.int32)),
            tokens,
            state,
            num_tokens,
            decoding,
            position,
            sequence,
            self._scratch,
        )
        return self.get(tokens), self.get(state)

    # --- the training step ---

    def activations(self, dims: Dims) -> dict[str, Any]:
        T, B, H, V, dtype = dims.T, dims.B, dims.H, dims.V, dims.dtype
        # h_0 lies before h_1: what the gradient of W_hh multiplies is then one matrix.
        states = self.put(np.zeros((T + 1, B, H), dtype))
        dz = self.empty((T, B, H), dtype)
        # Logits have aligned rows in a step; the single ops use the same memory without gaps.
        ld = ceil_div(V, LD_STEP) * LD_STEP
        padded = self.empty((T * B * ld,), dtype)
        return {
            "h0": states[0],
            "z": states[1:],
            "h": states[1:],
            "dh": dz,
            "dz": dz,
            "logits": padded[: T * B * V].reshape(T, B, V),
            "extra": {
                "logits": padded.reshape(T, B, ld),
                "W_hq": self.empty((H, ld), dtype),
                "losses": self.empty((T * B,), dtype),
                "counter": self.put(np.zeros(1, np.uint32)),
                # Products of different branches count apart.
                "main": Share(counters=gemm.new_counters(self.device)),
                "beside": Share(counters=gemm.new_counters(self.device)),
                "held": _Held(self.device),
                "run": None,
            },
        }

    def step(self, ws: Workspace, starts: Array, lr: float, max_norm: float, carry: bool) -> None:
        run = self._run(ws, 1)
        self._begin(ws, run, starts.reshape(1, -1), lr, max_norm)
        self._submit(ws, run, carry)

    def run_steps(
        self, ws: Workspace, starts: HostArray, lr: float, max_norm: float, carry: bool
    ) -> None:
        """Run ``len(starts)`` steps; ``starts`` is int32 ``[n, B]`` on the host.

        The first step of a workspace is submitted kernel by kernel, which compiles them and sets
        the sizes of their scratch; all later ones are replays of captured graphs.
        """
        starts = np.ascontiguousarray(starts, np.int32)
        if not len(starts):
            return
        run = self._run(ws, len(starts))
        for first in range(0, len(starts), run.capacity):
            piece = starts[first : first + run.capacity]
            on_device = run.starts[: len(piece)]
            self.put(piece, out=on_device)
            self._begin(ws, run, on_device, lr, max_norm)
            left = len(piece)
            if carry not in run.warm:
                self._submit(ws, run, carry)
                run.warm.add(carry)
                left -= 1
            while left:
                steps = GRAPH_STEPS if left >= GRAPH_STEPS else 1
                self._graph(ws, run, steps, carry).launch()
                left -= steps

    def _run(self, ws: Workspace, steps: int) -> _Run:
        """The batch buffers of a workspace, with room for ``steps`` where memory allows."""
        T, B, V = ws.dims.T, ws.dims.B, ws.dims.V
        run: _Run | None = ws.extra["run"]
        most = max(1, BATCH_BYTES // (4 * (4 * T * B + V + 1 + B)))
        if run is None or run.capacity < min(steps, most):
            capacity = min(most, max(steps, GRAPH_STEPS))
            empty = self.device.empty
            # Graphs hold the addresses of the old buffers: they go with them.
            run = ws.extra["run"] = _Run(
                capacity,
                starts=empty((capacity, B), np.int32),
                x=empty((capacity, T, B), np.int32),
                y=empty((capacity, T, B), np.int32),
                order=empty((capacity, T * B, 2), np.int32),
                bounds=empty((capacity, V + 1), np.int32),
                rates=empty((2,), np.float64),
                cursor=empty((1,), np.int32),
                warm=run.warm if run else set(),
            )
        return run

    def _begin(self, ws: Workspace, run: _Run, starts: Array, lr: float, max_norm: float) -> None:
        """Cut the batches of a run into windows, sort their tokens, set the rates."""
        n, V = len(starts), ws.dims.V
        self.device.abandon()
        gather.window(self.device, ws.tokens, starts, run.x[:n], run.y[:n])
        gather.sort(self.device, run.x[:n], V, run.order[:n], run.bounds[:n], self._scratch)
        self.put(np.array([lr, max_norm], np.float64), out=run.rates)
        self.device.fill_zero(run.cursor)

    def _graph(self, ws: Workspace, run: _Run, steps: int, carry: bool) -> Graph:
        """``steps`` steps as a graph, captured when first asked for."""
        if (steps, carry) not in run.graphs:

            def submit() -> None:
                for _ in range(steps):
                    self._submit(ws, run, carry)

            run.graphs[steps, carry] = self.device.capture(submit)
        return run.graphs[steps, carry]

    def evaluate(self, ws: Workspace, starts: HostArray, carry: bool) -> float:
        starts = np.ascontiguousarray(starts, np.int32)
        run = self._run(ws, len(starts))
        totals, no_norm = self.put(np.zeros(4)), self.put(np.zeros((), ws.dims.dtype))
        for first in range(0, len(starts), run.capacity):
            piece = self.put(starts[first : first + run.capacity])
            self._begin(ws, run, piece, 0.0, 1.0)
            for _ in range(len(piece)):
                self._forward(ws, run, ws.loss)
                clip_sgd.record(self.device, ws.loss, no_norm, totals, run.cursor)
                if carry:
                    self.device.copy(ws.h[-1], ws.h0)
        return float(self.get(totals)[0]) / len(starts)

    def _forward(self, ws: Workspace, run: _Run, loss: Array | None = None) -> None:
        """From the batch that is due to ``dlogits``, the losses of its rows, and their mean."""
        device, own, p = self.device, ws.extra, ws.params
        logits, W_hq = own["logits"], own["W_hq"]
        (H, V), ld = p["W_hq"].shape, logits.shape[2]
        with device.branch("weights"):
            project.pad(device, p["W_hq"], H, V, ld, W_hq)
        if recurrence.fits(H, ws.dims.dtype, device, ws.dims.B):
            recurrence.recurrence_gathered(
                device, run.x, run.cursor, p["W_xh"], p["b_h"], p["W_hh"], ws.h0, ws.h
            )
        else:
            gather.gather(device, p["W_xh"], run.x, p["b_h"], ws.z, run.cursor)
            self._recurrence(ws.z, p["W_hh"], ws.h0, ws.h, own["held"], **own["main"])
        device.join("weights")
        project.project(
            device, ws.h, W_hq, p["b_q"], logits, ld_W=ld, ld_logits=ld,
            scratch=own["held"], **own["main"],
        )  # fmt: skip
        cross_entropy.cross_entropy(
            device, logits, run.y, V, own["losses"], logits, loss, own["counter"], run.cursor
        )

    def _submit(self, ws: Workspace, run: _Run, carry: bool) -> None:
        """One training step on the batch that is due."""
        device, own, p, g = self.device, ws.extra, ws.params, ws.grads
        held: _Held = own["held"]
        logits, W_hq = own["logits"], own["W_hq"]
        V, ld = ws.dims.V, logits.shape[2]
        self._forward(ws, run)
        project.project_backward_h(
            device, logits, W_hq, ws.dh, V, ld_W=ld, ld_logits=ld, scratch=held, **own["main"]
        )
        # dW_hq fills what BPTT leaves of the device: it must not begin before dh is there, nor its
        # blocks be placed before those of BPTT.
        with device.branch("output"):
            project.column_sum(
                device, logits, g["b_q"], len(own["losses"]), V, ld=ld,
                scratch=held.under("output"),
            )  # fmt: skip
        self._bptt(ws.dh, ws.h, p["W_hh"], ws.dz, ws.dh0, held, **own["main"])
        with device.branch("output"):
            project.project_backward_W(
                device, ws.h, logits, g["W_hq"], ld_logits=ld,
                scratch=held.under("output"), **own["beside"],
            )  # fmt: skip
        with device.branch("rows"):
            gather.scatter_add(
                device, ws.dz, run.order, run.bounds, g["W_xh"], g["b_h"],
                held.under("rows"), run.cursor,
            )  # fmt: skip
        project.recurrent_gradient(
            device, ws.h0, ws.h, ws.dz, g["W_hh"], scratch=held, **own["main"]
        )
        if carry:
            with device.branch("state"):
                device.copy(ws.h[-1], ws.h0)
        device.join("output")
        device.join("rows")
        clip_sgd.clip_sgd(
            device, [ws.flat_params], [ws.flat_grads], run.rates, ws.norm, held,
            losses=own["losses"], loss=ws.loss, totals=ws.totals, cursor=run.cursor,
        )  # fmt: skip
        if carry:
            device.join("state")
