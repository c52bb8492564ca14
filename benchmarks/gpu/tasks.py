"""What is no list of cases: the machine, compiling ahead, peers, the tuner. A process each."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.clock import seconds
from fastrnn.backend import Backend
from fastrnn.backends.numba_cuda import toolkit_of_nvcc
from fastrnn.bench import GPU_PEERS, GPU_SLOW_PEERS, BenchResult, run_bench

COPY_BYTES = 1 << 30
PEER_LIMIT, SLOW_PEER_LIMIT = 50.0, 50.0
"""Seconds that a contender may take, its start included."""
PACKAGES = (
    "numpy", "scipy", "numba", "llvmlite", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x",
    "cuda-core", "cuda-bindings", "cuda-pathfinder", "nvidia-cuda-nvrtc", "nvidia-nvjitlink",
    "nvidia-nvvm",
    "torch", "triton", "jax", "jax-cuda13-plugin", "flashrnn", "liger-kernel", "pytest",
)  # fmt: skip
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nvdisasm", "g++", "ninja")

Found = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a task is given.

    Attributes:
        save: stores what was found so far; a task that is stopped loses nothing of it.
        open: opens a backend by name. backend: the one that the task is about, if any.
        toy: whether a stand-in takes the place of a GPU.
    """

    save: Callable[[Found], None]
    open: Callable[[str], Backend]
    backend: str
    toy: bool


def tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit: on PATH, or in the toolkit's folder."""
    found = shutil.which(name)
    for folder in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        candidate = Path(folder) / "bin" / name
        if found is None and folder and candidate.exists():
            found = str(candidate)
    return found


def probe(task: Task) -> Found:
    """Versions and tools: what a surprise has to be explained by."""
    found: Found = {
        "packages": {},
        "tools": {name: tool(name) for name in TOOLS},
        "environment": {k: os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ},
    }
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    task.save(found)
    for key, command in (
        ("nvcc", ["nvcc", "--version"]),
        ("smi", ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,"
                 "memory.total,ecc.mode.current,compute_mode", "--format=csv,noheader"]),
    ):  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            found[key] = done.stdout.strip().splitlines()[-2:]
        except (OSError, subprocess.SubprocessError) as error:
            found[key] = f"{type(error).__name__}: {error}"
        task.save(found)
    with toolkit_of_nvcc():  # as the Numba CUDA engine looks for them
        for name in ("nvrtc", "nvjitlink", "nvvm"):
            found[f"{name} version"] = _library_version(name)
    return found


def _library_version(name: str) -> str:
    """The version of the library that ``cuda.bindings`` finds, or why it finds none."""
    try:
        module = importlib.import_module(f"cuda.bindings.{name}")
        if name == "nvrtc":
            return ".".join(map(str, module.nvrtcVersion()[1:]))
        return ".".join(map(str, module.version()))
    except Exception as error:  # the bindings raise what loading the library raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def device(task: Task) -> Found:
    """What the backend says of its device, and how fast that copies."""
    backend = task.open(task.backend)
    found: Found = {"about": backend.describe()}
    task.save(found)
    if task.backend == "cupy":
        size = 1 << 12 if task.toy else COPY_BYTES // 4
        source, target = backend.put(np.ones(size, np.float32)), backend.empty((size,), np.float32)
        copy = functools.partial(backend.device.copy, source, target)  # type: ignore[attr-defined]
        found["copy_bytes_per_second"] = 8 * size / seconds(backend, copy)
    return found


def compile_ahead(task: Task) -> Found:
    """Compile what the launchers can launch on this device, in threads, into CuPy's disk cache."""
    from fastrnn.cuda import launchable

    device = task.open(task.backend).device  # type: ignore[attr-defined]
    compiled = device.compile_ahead(launchable(device.arch.capability))
    return {"modules": [asdict(module) for module in compiled]}


def peers(task: Task, workload: str) -> Found:
    """Ours and its peers on one workload at the headline size, taking turns."""
    if task.toy:
        result = run_bench((workload,), ("tiny",), peers="none", backends=["numpy"], rounds=1)
    else:
        result = run_bench(
            (workload,), ("headline",), peers=GPU_PEERS[workload], backends=["cupy"], rounds=3,
            turn_seconds=0.15, limit=PEER_LIMIT, parallel=os.cpu_count() or 1,
        )  # fmt: skip
    return {"bench": json.loads(result.to_json())}


def slow_peers(task: Task) -> Found:
    """Peers that compile for long or are seldom there, by themselves."""
    total: BenchResult | None = None
    for workload, names in GPU_SLOW_PEERS.items():
        result = run_bench(
            (workload,), ("headline",), peers=names, backends=[], rounds=3, turn_seconds=0.15,
            limit=SLOW_PEER_LIMIT, parallel=os.cpu_count() or 1,
        )  # fmt: skip
        if total is None:
            total = result
        else:
            total.merge(result)
        task.save({"bench": json.loads(total.to_json())})
    assert total is not None
    return {"bench": json.loads(total.to_json())}


def tuner(task: Task) -> Found:
    """What the plans of the launchers are chosen by."""
    from benchmarks.gpu.tuner import tune

    backend = task.open("cupy")
    clock = functools.partial(seconds, backend)

    def save(found: Found) -> None:
        task.save({"plans": found})

    return {"plans": tune(save, backend, clock, toy=task.toy)}  # type: ignore[arg-type]


def bench_of(result: Found) -> BenchResult:
    """What :func:`peers` measured."""
    return BenchResult.from_json(json.dumps(result["bench"]))


TASKS: dict[str, Callable[[Task], Found]] = {
    "probe": probe,
    "device": device,
    "compile": compile_ahead,
    "tuner": tuner,
    **{f"peers-{w}": functools.partial(peers, workload=w) for w in GPU_PEERS},
    "slow-peers": slow_peers,
}


def findings(log: str, mark: str) -> dict[str, str]:
    """What a sanitizer reported, by the case that ran: the first line of each."""
    found: dict[str, str] = {}
    at = "before the first case"
    for line in log.splitlines():
        if line.startswith(mark):
            at = line.removeprefix(mark)
        text = line.removeprefix("=========").strip()
        if line.startswith("=========") and re.match(_FINDING, text):
            found.setdefault(at, text)
    return found


_FINDING = r"(Invalid|Error:|Race reported|Program hit|Uninitialized|Barrier error|Unused memory)"
