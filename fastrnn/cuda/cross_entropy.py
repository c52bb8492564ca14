"""Launches ``kernels/cross_entropy.cu``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn.cuda.device import Array, Device, Kernel, aligned, ceil_div, real


@dataclass(frozen=True)
class _Shape:
    """How a row of logits is divided among threads.

    Attributes:
        row_threads: that share a row in a block. threads: of a block. values: of a row a thread.
        blocks: a multiprocessor. cluster: blocks that share a row. prefetch: whether the next row
            waits in shared memory. long: whether a row may have more columns than its threads hold.
        capabilities: first and last that use it.
    """

    row_threads: int
    threads: int
    values: int
    blocks: int
    cluster: int = 1
    prefetch: bool = False
    long: bool = False
    capabilities: tuple[int, int] = (75, 120)

    @property
    def columns(self) -> int:
        """Of the longest row."""
        return 2**31 - 1 if self.long else self.row_threads * self.values * self.cluster

    def runs_on(self, capability: int) -> bool:
        first, last = self.capabilities
        return first <= capability and (capability <= last or last == CAPABILITIES[-1])

    def kernel(self, dtype: Any, width: int) -> Kernel:
        first, last = self.capabilities
        return Kernel(
            "cross_entropy",
            "cross_entropy_long_kernel" if self.long else "cross_entropy_kernel",
            self.threads,
            (
                ("REAL", real(dtype)),
                ("WIDTH", width),
                ("THREADS", self.threads),
                ("ROW_THREADS", self.row_threads),
                ("VALUES", self.values),
                ("BLOCKS", self.blocks),
                ("CLUSTER", self.cluster),
                ("LONG_ROWS", int(self.long)),
                ("PREFETCH", int(self.prefetch)),
            ),
            shared_bytes=4 * self.row_threads * self.values if self.prefetch else 0,
            cluster=self.cluster,
            blocks=self.blocks,
            min_capability=first,
            without=tuple(c for c in CAPABILITIES if c > last),
            opcodes=self._opcodes(width),
        )

    def _opcodes(self, width: int) -> tuple[str, ...]:
        load = "LDGSTS\\.E" if self.prefetch else "LDG\\.E"
        exchange = ("STAS", "SYNCS") if self.cluster > 1 else ()
        if width > 1:
            return f"{load}[.\\w]*\\.128", "STG\\.E[.\\w]*\\.128", *exchange
        return (load, *exchange) if self.prefetch else ()


# Ascending by columns; a row goes to the first that holds it. Registers bound values x blocks; a
# multiprocessor of compute capability 7.5 has room for 1,024 threads, later ones for 1,536 or more,
# and copy to shared memory asynchronously.
_FLOAT = (
    _Shape(32, 256, 4, 4),
    _Shape(32, 256, 16, 4),
    _Shape(128, 128, 12, 8, capabilities=(75, 75)),
    _Shape(128, 128, 12, 10, capabilities=(80, 120)),
    _Shape(256, 256, 28, 3, capabilities=(75, 75)),
    _Shape(256, 256, 28, 3, prefetch=True, capabilities=(80, 120)),
    _Shape(512, 512, 20, 2, capabilities=(75, 75)),
    _Shape(512, 512, 20, 2, prefetch=True, capabilities=(80, 120)),
    _Shape(256, 256, 28, 3, cluster=4, prefetch=True, capabilities=(90, 120)),
    _Shape(256, 256, 28, 3, cluster=8, prefetch=True, capabilities=(90, 120)),
)
_WIDE = (*_FLOAT, _Shape(512, 512, 16, 2, long=True))
_NARROW = (*_FLOAT, _Shape(512, 512, 12, 2, long=True))
_DOUBLE = (
    _Shape(32, 256, 4, 4),
    _Shape(32, 256, 16, 2),
    _Shape(256, 256, 16, 2),
    _Shape(512, 512, 4, 1, long=True),
)
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def cross_entropy(
    device: Device,
    logits: Array,
    targets: Array,
    V: int,
    losses: Array,
    dlogits: Array,
    loss: Array | None = None,
    counter: Array | None = None,
    cursor: Array | None = None,
) -> None:
    """The cross entropy of every row of logits, its gradient, and the mean if wanted.

    Args:
        logits: ``[T, B, ld]``, rows of ``V`` values and ``ld - V`` that are never read as such.
        targets: int32 ``[T, B]``. V: vocabulary size.
        losses: ``[T*B]``, out.
        dlogits: ``[T, B, ld]``, out: ``(softmax(logits) - onehot(targets)) / (T*B)``, and zeros
            behind ``V``. May be ``logits``.
        loss: shape ``()``, out: the mean of ``losses``. None: another kernel takes it from them.
        counter: uint32 ``[1]``, needed with ``loss``: zero, and zero again afterwards.
        cursor: int32 ``[1]``; with it ``targets`` is ``[n, T, B]``, of which row ``cursor[0]`` is
            due.
    """
    ld = logits.shape[-1]
    rows, dtype = logits.size // ld, logits.dtype
    wide = ld * dtype.itemsize % 16 == 0 and aligned(logits, 16) and aligned(dlogits, 16)
    shape, kernel = choose(device, dtype, ld, wide)
    blocks = ceil_div(rows * shape.cluster, shape.threads // shape.row_threads)
    wave = device.arch.multiprocessors * shape.blocks // shape.cluster * shape.cluster
    device.launch(
        kernel,
        min(blocks, max(wave, shape.cluster)),
        (
            *(logits, targets, cursor, dlogits, losses, loss, counter),
            *map(np.int32, (rows, V, ld)),
            dtype.type(1 / rows),
        ),
    )


def choose(device: Device, dtype: Any, ld: int, wide: bool) -> tuple[_Shape, Kernel]:
    """The shape for rows of ``ld`` values, and its kernel."""
    capability = device.arch.capability
    shapes = _shapes(dtype, wide)
    shape = next(s for s in shapes if ld <= s.columns and s.runs_on(capability))
    return shape, shape.kernel(dtype, _width(dtype, wide))


def variants() -> list[Kernel]:
    """Every kernel that may be launched."""
    return [
        shape.kernel(dtype, _width(dtype, wide))
        for dtype, wide in ((np.float32, True), (np.float32, False), (np.float64, False))
        for shape in _shapes(dtype, wide)
    ]


def _shapes(dtype: Any, wide: bool) -> tuple[_Shape, ...]:
    if np.dtype(dtype) == np.float64:
        return _DOUBLE
    return _WIDE if wide else _NARROW


def _width(dtype: Any, wide: bool) -> int:
    """Values of one access; float64 takes one at a time, which fills a warp's line as well."""
    return 4 if wide and np.dtype(dtype) == np.float32 else 1
