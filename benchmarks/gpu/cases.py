"""The rows of a run on a GPU: an op of a backend at a size, each with a verdict of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.op_cases import OPS
from fastrnn.backend import Dims
from fastrnn.bench import HEADLINE, SIZES


class Key(NamedTuple):
    """What a row is found by."""

    kind: str
    backend: str
    op: str
    size: str

    def __str__(self) -> str:
        return " ".join(self)


@dataclass(frozen=True)
class Case:
    """One row before it is run.

    Attributes:
        kind: ``smoke`` (right or wrong), ``ops`` and ``large`` (and how fast), ``step`` (steps,
            epochs, characters), ``torch`` (``fastrnn.torch`` and ``fastrnn.ops``).
        backend, op: by name. size: a name in these tables. dims: its sizes.
        toy: whether a stand-in runs it: few repetitions, no long runs.
    """

    kind: str
    backend: str
    op: str
    size: str
    dims: Dims
    toy: bool = False

    @property
    def key(self) -> Key:
        return Key(self.kind, self.backend, self.op, self.size)


class SizeClass(NamedTuple):
    """Sizes at which kernels take one of their ways.

    ``dims`` for a device, ``toy`` for a stand-in that takes the same way; ``ops``: that the class
    tells apart, None for all.
    """

    dims: Dims
    toy: Dims | None
    ops: tuple[str, ...] | None = None


STEP, GREEDY, SAMPLED = "step", "generate", "generate sampled"
SMOKE_OPS = (*OPS, STEP, GREEDY, SAMPLED)
_ROWS = ("gather_backward", "project", "project_backward", STEP)
_SOFTMAX = ("cross_entropy", STEP)

CUPY_CLASSES: dict[str, SizeClass] = {
    "smallest": SizeClass(Dims(1, 1, 1, 2), Dims(1, 1, 1, 2)),
    "odd": SizeClass(Dims(5, 3, 37, 41), Dims(2, 2, 37, 41)),
    "H100": SizeClass(Dims(4, 5, 100, 31), Dims(2, 2, 100, 31)),
    "a cluster of 4 a row": SizeClass(Dims(3, 4, 256, 130), Dims(2, 1, 256, 33)),
    "headline": SizeClass(HEADLINE, None),
    "more rows than clusters": SizeClass(Dims(2, 140, 200, 65), Dims(1, 3, 140, 17)),
    "a cluster of 8 a row": SizeClass(Dims(2, 3, 300, 65), Dims(2, 1, 300, 17)),
    "a product a time step": SizeClass(Dims(3, 4, 520, 65), Dims(2, 2, 520, 9)),
    "softmax, a block a row": SizeClass(Dims(2, 3, 8, 9000), Dims(1, 2, 2, 9000), _SOFTMAX),
    "softmax, clusters of 4": SizeClass(Dims(2, 3, 8, 20_000), Dims(1, 2, 2, 20_000), _SOFTMAX),
    "softmax, clusters of 8": SizeClass(Dims(2, 3, 8, 40_000), Dims(1, 2, 2, 40_000), _SOFTMAX),
    "softmax in two passes": SizeClass(Dims(2, 3, 8, 60_000), Dims(1, 2, 2, 60_000), _SOFTMAX),
    "long sort, wide tiles": SizeClass(Dims(130, 32, 64, 4100), Dims(65, 65, 3, 300), _ROWS),
}
"""Of the CUDA C kernels: in registers, in shared memory, in clusters, long and wide. The class with
the dearest oracle is the last."""

NUMBA_CLASSES: dict[str, SizeClass] = {
    "smallest": SizeClass(Dims(1, 1, 1, 2), Dims(1, 1, 1, 2)),
    "odd": SizeClass(Dims(5, 3, 37, 41), Dims(2, 2, 7, 11)),
    "H100": SizeClass(Dims(4, 5, 100, 31), Dims(2, 2, 13, 5)),
    "aligned": SizeClass(Dims(3, 4, 256, 130), Dims(2, 1, 16, 19)),
    "headline": SizeClass(HEADLINE, None),
    "a product a time step": SizeClass(Dims(2, 3, 300, 65), Dims(2, 2, 19, 6)),
    "long rows": SizeClass(Dims(2, 3, 8, 20_000), Dims(1, 2, 2, 70), _SOFTMAX),
    "many rows": SizeClass(Dims(130, 32, 64, 4100), Dims(20, 3, 2, 30), _ROWS),
}
"""Of the Numba CUDA kernels, whose simulator has smaller blocks: see ``tests``."""

CLASSES = {"cupy": CUPY_CLASSES, "numba-cuda": NUMBA_CLASSES}

TOY = Dims(T=3, B=2, H=16, V=31)

MEMCHECK = ("smallest", "odd", "H100", "a cluster of 4 a row", "a cluster of 8 a row", "sanitized")
RACECHECK = ("a cluster of 4 a row", "a cluster of 8 a row", "more rows than clusters")
SANITIZED = SizeClass(Dims(4, 8, 256, 1100), None)
"""Under a sanitizer a kernel is a hundred times slower: the headline's ways at fewer rows."""

LARGE: dict[str, Dims] = {
    "gather": Dims(T=2048, B=32, H=1024, V=50_000),
    "gather_backward": Dims(T=2048, B=32, H=1024, V=50_000),
    "clip_by_global_norm": Dims(T=1, B=1, H=1024, V=48_300),
    "sgd": Dims(T=1, B=1, H=1024, V=48_300),
    "project": Dims(T=128, B=32, H=1024, V=50_000),
    "project_backward": Dims(T=128, B=32, H=1024, V=50_000),
    "cross_entropy": Dims(T=64, B=32, H=1024, V=50_000),
}
"""Sizes that fit no cache, 100 million parameters for clip and sgd; the dearest oracle last."""

RECURRENCE_SIZES = ("B1", "B256", "H64", "H512", "H1024", "T512")
NODES = (
    "node: pad W_hq", "node: recurrence", "node: project", "node: cross entropy", "node: dh",
    "node: BPTT", "node: dW_hq", "node: dW_hh", "node: dW_xh", "node: clip and sgd",
)  # fmt: skip
"""The kernels of the captured step of the CUDA C engine; see :mod:`benchmarks.gpu.nodes`."""

EPOCH, LONG_RUN = "epoch", "20,000 steps"
CHARACTERS = ("character", "character sampled", "character of 64 sequences")
TORCH_OPS = (
    "RNN", "RNN stacked", "RNN packed", "RNN compiled", "CharRNN step", "ops on device arrays",
    "ops on tensors",
)  # fmt: skip


def smoke(backend: str, toy: bool, sizes: Sequence[str] | None = None) -> list[Case]:
    """Every op at every size class of a backend, or at those named."""
    classes = {**CLASSES[backend], "sanitized": SANITIZED}
    chosen = sizes if sizes is not None else list(CLASSES[backend])
    return [
        Case("smoke", backend, op, size, _dims(classes[size], toy), toy)
        for size in chosen
        for op in SMOKE_OPS
        if classes[size].ops is None or op in classes[size].ops  # type: ignore[operator]
    ]


def _dims(size: SizeClass, toy: bool) -> Dims:
    return (size.toy or TOY) if toy else size.dims


def ops(backend: str, toy: bool) -> list[Case]:
    """Every op and node of the step at the headline size, recurrences at all sizes."""
    sizes = {"headline": TOY if toy else HEADLINE}
    found = [Case("ops", backend, op, "headline", sizes["headline"], toy) for op in OPS]
    if backend == "cupy":
        found += [Case("ops", backend, op, "headline", sizes["headline"], toy) for op in NODES]
    for size in RECURRENCE_SIZES if backend == "cupy" else ("H512",):
        for op in ("recurrence", "recurrence_backward"):
            found.append(Case("ops", backend, op, size, TOY if toy else SIZES[size], toy))
    return found


def large(backend: str, toy: bool) -> list[Case]:
    """The ops that move memory, at sizes that fit no cache."""
    return [
        Case("large", backend, op, "large", TOY if toy else dims, toy) for op, dims in LARGE.items()
    ]


def step(backend: str, toy: bool) -> list[Case]:
    """Captured training steps, the tutorial's whole training, generation."""
    sizes = ("headline", "B256", "H512", "B1") if backend == "cupy" else ("headline",)
    plan = [(STEP, "headline"), (EPOCH, "headline"), (LONG_RUN, "headline")]
    plan += [(op, "headline") for op in CHARACTERS]
    plan += [(STEP, size) for size in sizes if size != "headline"]
    return [Case("step", backend, op, size, TOY if toy else SIZES[size], toy) for op, size in plan]


def torch(toy: bool) -> list[Case]:
    """What users of torch call, against ``nn.RNN``; ``fastrnn.ops`` on the device's arrays."""
    dims = TOY if toy else HEADLINE
    return [Case("torch", "cupy", op, "headline", dims, toy) for op in TORCH_OPS]
