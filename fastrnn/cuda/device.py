"""What the launchers need of a device: memory, launches, branches, graphs.

:class:`Device` is the narrow seam between the launch code of the CUDA C kernels and what runs them.
A GPU is reached through :mod:`fastrnn.cuda.cupy_device`; the tests put an emulator in its place, so
that geometry, arguments and order of the launches are the same in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array of the device's own kind: ``cupy.ndarray``, or ``numpy.ndarray`` in the emulator."""

Scratch = Callable[[str, int, Any], Array]
"""``scratch(name, size, dtype)``: a flat work buffer, its contents undefined. Where a step is
captured it is kept with the workspace under its name; elsewhere it is allocated for the call."""

_PACKAGE = Path(__file__).resolve().parent.parent
KERNELS = next(d for d in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels") if d.is_dir())
"""The folder of the CUDA C sources."""


@dataclass(frozen=True)
class Arch:
    """What a launcher chooses by.

    Attributes:
        capability: compute capability times ten: 75, 80, 86, 89, 90, 100, 120.
        multiprocessors: how many there are.
        shared_bytes: shared memory that a block may ask for (with the opt-in).
        name: the product's name, by which measured plans are found (see :mod:`.tuned`).
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    name: str


@dataclass(frozen=True)
class Kernel:
    """A kernel before compilation: the function ``name`` of ``kernels/<file>.cu``.

    Attributes:
        file, name: where it is.
        threads: of a block; what the kernel's ``__launch_bounds__`` says.
        defines: constants, passed as ``-DNAME=value``. Kernels of one file that share their defines
            share a module.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster, what the kernel's ``__cluster_dims__`` says; 1 for none.
        blocks: that a multiprocessor must have room for, as in ``__launch_bounds__``.
        min_capability: the first compute capability that can run it.
        without: compute capabilities from there on that cannot, or that never need it.
        opcodes: SASS mnemonics that its machine code must contain.
    """

    file: str
    name: str
    threads: int
    defines: tuple[tuple[str, int | str], ...] = ()
    shared_bytes: int = 0
    cluster: int = 1
    blocks: int = 1
    min_capability: int = 75
    without: tuple[int, ...] = ()
    opcodes: tuple[str, ...] = ()

    def runs_on(self, capability: int) -> bool:
        """Whether a launcher may choose it for this compute capability."""
        return capability >= self.min_capability and capability not in self.without


class Graph(ABC):
    """Submitted work, recorded once, to be submitted again with one call."""

    @abstractmethod
    def launch(self) -> None:
        """Submit the recorded work."""


class Device(ABC):
    """Memory and launches. Work is submitted in order; the host does not wait for it."""

    arch: Arch

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised array in C order, its start aligned to 256 bytes."""

    @abstractmethod
    def put(self, host: NDArray[Any], out: Array | None = None) -> Array:
        """Copy a host array to the device, into ``out`` where given."""

    @abstractmethod
    def copy(self, source: Array, out: Array) -> None:
        """Copy between two contiguous device arrays of one dtype and size."""

    @abstractmethod
    def fill_zero(self, array: Array) -> None:
        """Set all bytes of a contiguous array to zero."""

    @abstractmethod
    def get(self, array: Array) -> NDArray[Any]:
        """Copy an array to the host; waits for the work that produces it."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until all submitted work is done."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is, and what compiles and drives it: what a benchmark has to record."""

    @abstractmethod
    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], args: Sequence[Any]) -> None:
        """Submit ``grid`` blocks of ``kernel``.

        Args:
            grid: blocks along x, or along x, y, z; a multiple of ``kernel.cluster`` along x.
            args: device arrays in C order (None: a null pointer) and NumPy scalars of the very
                type that the parameter has.
        """

    @abstractmethod
    def active_clusters(self, kernel: Kernel) -> int:
        """Clusters of ``kernel`` that can be resident at once; 0 where it cannot run."""

    @abstractmethod
    def branch(self, name: str) -> AbstractContextManager[None]:
        """What is submitted inside runs beside what is submitted after it, until :meth:`join`.

        It starts after all that was submitted before. A branch may be entered again before it is
        joined: its work goes on in order. Branches do not nest.
        """

    @abstractmethod
    def join(self, name: str) -> None:
        """What is submitted from here on starts after the branch's work."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget the branches that were left open by work that failed."""

    @abstractmethod
    def capture(self, submit: Callable[[], None]) -> Graph:
        """Record what ``submit`` submits, without running it.

        Every kernel must have been launched once before, and every branch be joined at the end.
        """


def real(dtype: Any) -> str:
    """The C name of a floating-point dtype, for ``-DREAL=``."""
    return {"float32": "float", "float64": "double"}[np.dtype(dtype).name]


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def aligned(array: Array, count: int) -> bool:
    """Whether the start of the array is a multiple of ``count`` bytes."""
    return address(array) % count == 0


def address(array: Array) -> int:
    """Where a device array starts."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)
