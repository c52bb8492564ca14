"""What is run, in which stage, in which order, within how many seconds.

The order is that of the evidence's worth: is the CUDA C engine right, how fast is it, how fast are
the peers, which plans should it choose; then sanitizers and the Numba CUDA engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Case
from benchmarks.gpu.tasks import tool

STAGE_SECONDS = {1: 165.0, 2: 175.0, 3: 150.0}
"""What a stage may take; ``--minutes`` replaces it."""
ROW_LIMIT = 45.0

Absent = Callable[[bool], str | None]
"""Why a part cannot run here, or None; given whether a stand-in takes the GPU's place."""


class Seconds(NamedTuple):
    """Of a part: on an H100 beside 16 cores (see README.md of the benchmarks); what must be left
    for it to begin; after which it is stopped."""

    estimate: float
    least: float
    limit: float


@dataclass(frozen=True)
class Part:
    """One part of the run: cases, a task, or a command.

    Attributes:
        name: what ``--only`` takes, in whole or up to the backend. title: its heading.
        stage: 1, 2 or 3. backend: the one it is about, or "".
        seconds: what it takes, at least and at most.
        row_limit: seconds after which a row of it counts as hung, so that several that hang leave
            time for the others; ``--row-limit`` is the most of all parts.
        cases: given whether they are for a stand-in. task: a name in :mod:`tasks`.
        tests: files of tests, and the expression of pytest's -k. profiler: a tool on PATH.
        prefix: before the interpreter that runs the cases. pool: whether CuPy keeps freed memory.
        absent: see :data:`Absent`. env: of its processes.
    """

    name: str
    title: str
    stage: int
    backend: str
    seconds: Seconds
    row_limit: float = ROW_LIMIT
    cases: Callable[[bool], list[Case]] | None = None
    task: str | None = None
    tests: Sequence[str] = ()
    keyword: str = ""
    profiler: str | None = None
    prefix: Callable[[], Sequence[str]] | None = None
    pool: bool = True
    absent: Absent = lambda stand_in: None
    env: dict[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """The name without the backend."""
        return self.name.removesuffix(f"-{self.backend}")


def _device_only(stand_in: bool) -> str | None:
    return "it needs a device" if stand_in else None


def _needs(*modules: str) -> Absent:
    def absent(stand_in: bool) -> str | None:
        missing = [module for module in modules if find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    return absent


def _needs_tool(name: str) -> Absent:
    def absent(stand_in: bool) -> str | None:
        if stand_in:
            return "it needs a device"
        return None if tool(name) else f"{name} is not installed (part of the CUDA toolkit)"

    return absent


def _sanitizer(name: str) -> Callable[[], Sequence[str]]:
    """The command before the interpreter. The exit status stays the worker's, which says whether
    the device's context was lost.

    Errors of CUDA's API are not reported: libraries ask for entry points that a driver lacks, which
    is no fault of a row, and what CUDA refuses raises in the row itself. Python may take long until
    it calls CUDA: there is no limit to that but the supervisor's.
    """
    return lambda: (
        str(tool("compute-sanitizer")), f"--tool={name}", "--print-limit=20",
        "--target-processes=all", "--report-api-errors=no", "--launch-timeout=0",
    )  # fmt: skip


def _numba_cuda(toy: bool) -> list[Case]:
    """Everything of the Numba CUDA engine in one process, which compiles its kernels once."""
    name = "numba-cuda"
    return [*cases.smoke(name, toy), *cases.step(name, toy), *cases.ops(name, toy)]


TESTS = (
    "tests/test_ops.py", "tests/test_step.py", "tests/test_decoding.py", "tests/test_trainer.py",
    "tests/test_torch_ops.py",
)  # fmt: skip
ON_THE_DEVICE = "(cupy and not sm_ and not without_cupy) or on_a_gpu"
"""Tests that work on the device, and none of those that put an emulator or a fake in its place."""

PARTS = (
    Part("probe", "Versions and tools", 1, "", Seconds(1, 2, 20), task="probe"),
    Part("device-cupy", "The device", 1, "cupy", Seconds(4, 5, 30), task="device"),
    Part("compile-cupy", "Compiling ahead", 1, "cupy", Seconds(7, 5, 40), task="compile",
         absent=_device_only),
    Part("smoke-cupy", "Right or wrong: CUDA C", 1, "cupy", Seconds(9, 10, 75),
         row_limit=15, cases=partial(cases.smoke, "cupy")),
    Part("ops-cupy", "Ops and kernels of the step: CUDA C", 1, "cupy", Seconds(8, 10, 60),
         row_limit=20,
         cases=partial(cases.ops, "cupy")),
    Part("step-cupy", "Steps, epochs, characters: CUDA C", 1, "cupy", Seconds(17, 10, 40),
         cases=partial(cases.step, "cupy")),
    Part("torch-cupy", "fastrnn.torch and fastrnn.ops", 1, "cupy", Seconds(26, 10, 45),
         cases=cases.torch,
         absent=_needs("torch")),
    Part("tests-cupy", "Tests on the device: CUDA C", 1, "cupy", Seconds(21, 20, 60), tests=TESTS,
         keyword=ON_THE_DEVICE,
         absent=_needs("pytest", "xdist", "pytest_timeout", "pytest_benchmark", "hypothesis")),

    Part("peers-step", "Against peers: the training step", 2, "cupy", Seconds(25, 20, 60),
         task="peers-step"),
    Part("peers-recurrence", "Against peers: the recurrence", 2, "cupy", Seconds(18, 20, 60),
         task="peers-recurrence"),
    Part("peers-generate", "Against peers: generation", 2, "cupy", Seconds(8, 15, 45),
         task="peers-generate"),
    Part("peers-bptt", "Against peers: forward and BPTT", 2, "cupy", Seconds(18, 20, 60),
         task="peers-recurrence+bptt"),
    Part("peers-cross-entropy", "Against peers: cross entropy", 2, "cupy", Seconds(9, 15, 45),
         task="peers-cross_entropy"),
    Part("tuner-cupy", "Plans", 2, "cupy", Seconds(5, 15, 50), task="tuner"),
    Part("large-cupy", "Ops that fit no cache: CUDA C", 2, "cupy", Seconds(16, 15, 60),
         cases=partial(cases.large, "cupy")),

    Part("memcheck-cupy", "compute-sanitizer memcheck", 3, "cupy", Seconds(4, 15, 60),
         cases=partial(cases.smoke, "cupy", sizes=cases.MEMCHECK), pool=False,
         prefix=_sanitizer("memcheck"), absent=_needs_tool("compute-sanitizer")),
    Part("racecheck-cupy", "compute-sanitizer racecheck", 3, "cupy", Seconds(40, 15, 45),
         cases=partial(cases.smoke, "cupy", sizes=cases.RACECHECK), pool=False,
         prefix=_sanitizer("racecheck"), absent=_needs_tool("compute-sanitizer")),
    Part("device-numba-cuda", "The device: Numba CUDA", 3, "numba-cuda", Seconds(2, 5, 30),
         task="device"),
    Part("engine-numba-cuda", "Right or wrong, ops and steps: Numba CUDA", 3, "numba-cuda",
         Seconds(78, 30, 100),
         cases=_numba_cuda),
    Part("profile-cupy", "Nsight Compute on project", 3, "cupy", Seconds(5, 20, 40),
         profiler="ncu",
         absent=_needs_tool("ncu")),
    Part("peers-compiled", "Against peers that compile for long", 3, "cupy", Seconds(18, 30, 60),
         task="slow-peers", absent=_device_only),
)  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """What of the parts is to be run.

    Attributes:
        stages: of 1, 2, 3. words: of ``--only``: parts, kinds of cases, ops, sizes.
        backends: of ``--backend``.
    """

    stages: Sequence[int] = (1, 2, 3)
    words: Sequence[str] = ()
    backends: Sequence[str] = ()
    stand_in: bool = False

    def __post_init__(self) -> None:
        unknown = [w for w in self.words if not any(w in known for known in self._vocabulary())]
        if unknown:
            parts, kinds, ops, sizes = self._vocabulary()
            raise ValueError(
                f"unknown {', '.join(map(repr, unknown))}: expected parts ({', '.join(parts)}), "
                f"kinds of rows ({', '.join(kinds)}), ops ({', '.join(ops)}) or sizes "
                f"({', '.join(sizes)})"
            )

    def _vocabulary(self) -> tuple[list[str], list[str], list[str], list[str]]:
        found = [case for part in PARTS if part.cases for case in part.cases(self.stand_in)]
        names = [name for part in PARTS for name in (part.name, part.short)]
        return (
            list(dict.fromkeys(names)),
            list(dict.fromkeys(case.kind for case in found)),
            list(dict.fromkeys(case.op for case in found)),
            list(dict.fromkeys(case.size for case in found)),
        )

    def parts(self) -> list[tuple[Part, list[Case]]]:
        """The parts that are to be run, and their cases."""
        names, kinds, ops, sizes = self._vocabulary()
        chosen = [
            part
            for part in PARTS
            if part.stage in self.stages and (not self.backends or part.backend in self.backends)
        ]
        by_part = {w for w in self.words if w in names}
        others = set(self.words) - by_part  # "step" is a part, a kind and an op: the part is meant
        by_kind, by_op, by_size = (others & set(known) for known in (kinds, ops, sizes))
        found = []
        for part in chosen:
            rows = part.cases(self.stand_in) if part.cases else []
            named = bool(by_part & {part.name, part.short})
            kinds_of = by_kind | (by_part & set(kinds))
            if (by_part or by_kind) and not named:
                rows = [case for case in rows if case.kind in kinds_of]
                if not rows or part.prefix:  # a sanitizer is asked for by its name
                    continue
            if by_op or by_size:
                rows = [
                    case
                    for case in rows
                    if (not by_op or case.op in by_op) and (not by_size or case.size in by_size)
                ]
                if not rows:
                    continue
            found.append((part, rows))
        return found
