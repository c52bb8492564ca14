"""What a backend's first call costs: with an empty JIT cache, and with a filled one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from fastrnn.bench.contenders import backend_contender
from fastrnn.bench.problems import make_problem
from fastrnn.bench.worker import Worker
from fastrnn.bench.workloads import SIZES


def measure_first_call(backend: str = "numba", size: str = "headline") -> dict[str, float]:
    """Seconds of opening a backend and its first training step in a fresh process.

    Returns:
        ``cold``, with an empty JIT cache, and ``warm``, with the cache that run left behind.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **make_problem("step", SIZES[size])[0])  # type: ignore[arg-type]
        contender = backend_contender(backend, NUMBA_CACHE_DIR=str(Path(folder) / "cache"))
        for key in ("cold", "warm"):
            worker = Worker(contender, "step", path)
            try:
                if "missing" in worker.report:
                    return {}
                found[key] = worker.report["build_seconds"] + worker.report["first_seconds"]
            finally:
                worker.close()
    return found
