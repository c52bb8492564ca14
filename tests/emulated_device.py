"""The emulator in the place of a GPU, behind the seam that the CUDA launchers use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.cuda.device import KERNELS, Arch, Array, Device, Graph, Kernel
from tests.emulator import Emulator, guarded_empty
from tests.emulator.module import Order

SHARED_BYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a block may ask for, by compute capability."""


class EmulatedGraph(Graph):
    """Recorded closures. What they refer to must not move, as with a CUDA graph."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = work

    def launch(self) -> None:
        for run in self.work:
            run()


class EmulatedDevice(Device):
    """Runs every launch at once, on NumPy arrays that end at guard pages and start full of NaN.

    Args:
        capability, multiprocessors: of the GPU that is played.
        order: of the threads, see :meth:`tests.emulator.Module.launch`.
        late_branches: run a branch's work when it is joined instead of when it is submitted. A
            result that depends on this lacks a dependency.
        sources: other files in the place of ``kernels/<file>.cu``, by file.
    """

    def __init__(
        self,
        capability: int = 90,
        multiprocessors: int = 4,
        order: Order = "forward",
        late_branches: bool = False,
        sources: dict[str, Any] | None = None,
    ) -> None:
        self.arch = Arch(capability, multiprocessors, SHARED_BYTES[capability] * 1024, "emulator")
        self.order = order
        self.late_branches = late_branches
        self.sources = sources or {}
        self.launched: list[Kernel] = []
        self._emulator = Emulator()
        self._recording: list[Callable[[], None]] | None = None
        self._branches: dict[str, list[Callable[[], None]]] = {}
        self._inside: str | None = None

    # --- memory ---

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return guarded_empty(shape, dtype)

    def put(self, host: NDArray[Any], out: Array | None = None) -> Array:
        source = np.array(host, order="C")
        target = self.empty(source.shape, source.dtype) if out is None else out
        self.copy(source.reshape(target.shape), target)
        return target

    def copy(self, source: Array, out: Array) -> None:
        self._submit(lambda: np.copyto(out, source.reshape(out.shape)))

    def fill_zero(self, array: Array) -> None:
        self._submit(lambda: array.fill(0))

    def get(self, array: Array) -> NDArray[Any]:
        assert self._recording is None, "the host reads while a graph is captured"
        assert not self._branches, "the host reads while a branch is open"
        return np.array(array)

    def sync(self) -> None:
        assert self._recording is None, "the host waits while a graph is captured"

    def describe(self) -> dict[str, Any]:
        return {"device": "emulator", "compute capability": f"{self.arch.capability / 10}"}

    # --- work ---

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        capability, limit = self.arch.capability, self.arch.shared_bytes
        assert kernel.runs_on(capability), f"{kernel.name} cannot run on sm_{capability}"
        assert kernel.cluster == 1 or capability >= 90, f"{kernel.name}: no clusters before sm_90"
        source = self.sources.get(kernel.file, KERNELS / f"{kernel.file}.cu")
        module = self._emulator.module(source, dict(kernel.defines))
        entry = module.entry(kernel.name)
        assert entry.max_threads == kernel.threads, f"{kernel.name}: __launch_bounds__ differ"
        assert (entry.cluster or 1) == kernel.cluster, f"{kernel.name}: __cluster_dims__ differ"
        used = kernel.shared_bytes + module.static_shared_bytes
        assert used <= limit, f"{kernel.name}: {used} bytes of shared memory, {limit} are allowed"
        blocks = (grid,) if isinstance(grid, int) else grid
        assert all(n <= (2**31 - 1 if i == 0 else 65535) for i, n in enumerate(blocks)), grid
        self.launched.append(kernel)
        arguments = list(args)
        self._submit(
            lambda: module.launch(
                kernel.name,
                grid,
                kernel.threads,
                arguments,
                shared_bytes=kernel.shared_bytes,
                order=self.order,
                flush_denormals=True,
            )
        )

    def active_clusters(self, kernel: Kernel) -> int:
        if self.arch.capability < 90 or not kernel.runs_on(self.arch.capability):
            return 0
        return self.arch.multiprocessors // kernel.cluster

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        assert self._inside is None, "branches do not nest"
        self._branches.setdefault(name, [])
        self._inside = name
        try:
            yield
        finally:
            self._inside = None

    def join(self, name: str) -> None:
        for run in self._branches.pop(name):
            self._submit(run)

    def abandon(self) -> None:
        self._branches.clear()

    def capture(self, submit: Callable[[], None]) -> Graph:
        assert self._recording is None, "captures do not nest"
        work: list[Callable[[], None]] = []
        self._recording = work
        try:
            submit()
        finally:
            self._recording = None
        assert not self._branches, f"branches not joined: {', '.join(self._branches)}"
        return EmulatedGraph(work)

    def _submit(self, run: Callable[[], Any]) -> None:
        if self._inside is not None and self.late_branches:
            self._branches[self._inside].append(run)
        elif self._recording is not None:
            self._recording.append(run)
        else:
            run()
