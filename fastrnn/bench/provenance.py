"""Where figures come from: the machine and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastrnn.bench.paths import PACKAGE


def machine() -> dict[str, Any]:
    """What has to be known about this machine to read its figures; no host name."""
    import threadpoolctl

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": [
            f"{pool['internal_api']} {pool['version']} ({pool.get('architecture')}, "
            f"{pool['num_threads']} threads)"
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        ],
        "thread_environment": {name: os.environ[name] for name in threads if name in os.environ},
        "load": load,
    }


def machine_slug(info: Mapping[str, Any]) -> str:
    """A file name for a machine: CPU model, cores and GPU models."""
    words = [str(info["cpu"]), f"{info['cores']} cores"]
    words += sorted({str(gpu["name"]) for gpu in info["gpus"]})
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def cpu_model() -> str:
    """Name of the CPU and, in brackets, the widest vectors it has that we use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: *(.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "asimd": "NEON"}
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    simd = [label for flag, label in known.items() if flag in flags][:1]
    return " ".join([name, *(f"({label})" for label in simd)])


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[dict[str, str]]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in lines.stdout.strip().splitlines()]
    return [{"name": row[0], "driver": row[1]} for row in rows if len(row) == 2]


def commit() -> dict[str, Any]:
    """The commit of the checkout this package lies in.

    The id that ``FASTRNN_COMMIT`` names comes first: of a tree that was copied without its
    ``.git``, or into another repository. Empty for an installed package.
    """
    named = os.environ.get("FASTRNN_COMMIT", "").strip()
    if named:
        return {"id": named}

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PACKAGE.parent:
            return {}
        return {
            "id": git("rev-parse", "HEAD"),
            "time": git("show", "-s", "--format=%cI", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", str(PACKAGE))),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
