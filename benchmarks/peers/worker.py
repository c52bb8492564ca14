"""The process in which one contender runs: JSON lines on stdin, an answer to each on stdout.

``{"do": "check", "units": u, "times": k, "path": p}``  run(u) and result(), k times, to an .npz
``{"do": "time", "units": u, "repeats": r}``            seconds a unit of each of r run(u)
``{"do": "machine"}``                                   SGEMM rates and copy bandwidth

The first line is the start report: versions, thread pools, seconds of the first unit (compilation
included); or ``missing`` with the reason, where something is not installed or no device is found;
or ``unbuilt`` with the error, where importing, building or the first unit raised another one.
Standard output of the frameworks goes to stderr.

``worker.py sgemm n H V`` only prints :func:`sgemm_rate`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from typing import Any

import numpy as np


def resident(field: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def reset_peak() -> None:
    """Let ``VmHWM`` start again from the present size (proc(5), clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return


def thread_pools() -> list[str]:
    """BLAS and OpenMP libraries loaded here, with their threads; empty without threadpoolctl."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    return [
        f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads"
        for pool in threadpool_info()
    ]


def copy_bandwidth(nbytes: int, repeats: int = 5) -> float:
    """Best bandwidth of a copy that touches ``nbytes`` in all, in bytes/s, read and write counted.

    Small copies run in the caches, as the ops on small arrays do. One thread and one a core are
    both tried.
    """
    from concurrent.futures import ThreadPoolExecutor

    n = max(1 << 12, nbytes // 8)
    source, target = np.ones(n, np.float32), np.empty(n, np.float32)
    cores = os.cpu_count() or 1
    parts = [slice(n * i // cores, n * (i + 1) // cores) for i in range(cores)]

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])

    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            for run in (lambda: copy(slice(None)), lambda: list(pool.map(copy, parts))):
                start = time.perf_counter()
                run()
                best = max(best, 8.0 * n / (time.perf_counter() - start))
    return best


def sgemm_rate(n: int, H: int, V: int) -> float:
    """Best SGEMM rate (FLOP/s) on the products of a step with ``n`` tokens.

    The BLAS of NumPy and that of SciPy, where there is one, are both tried.
    """
    rng = np.random.default_rng(0)
    gemms: list[Any] = [lambda a, b, out: np.matmul(a, b, out=out)]
    try:
        from scipy.linalg.blas import sgemm

        # BLAS is column-major: the transposes are views, and c is overwritten in place
        gemms.append(lambda a, b, out: sgemm(1.0, b.T, a.T, c=out.T, overwrite_c=1))
    except ImportError:
        pass
    rate = 0.0
    for M, K, N in ((n, H, V), (n, V, H), (H, n, V)):
        a = rng.standard_normal((M, K), dtype=np.float32)
        b = rng.standard_normal((K, N), dtype=np.float32)
        out = np.empty((M, N), np.float32)
        for gemm in gemms:
            gemm(a, b, out)
            for _ in range(12):
                start = time.perf_counter()
                gemm(a, b, out)
                rate = max(rate, 2.0 * M * K * N / (time.perf_counter() - start))
    return rate


AVX512_CORETYPES = ("SkylakeX", "Cooperlake")
"""OpenBLAS's kernels for AVX-512: it takes those for AVX2 on CPUs younger than itself."""


def sgemm_rate_as(coretype: str, n: int, H: int, V: int) -> float:
    """:func:`sgemm_rate` in a process whose OpenBLAS is told its kernels; 0 where that fails."""
    done = subprocess.run(
        [sys.executable, __file__, "sgemm", str(n), str(H), str(V)],
        env=os.environ | {"OPENBLAS_CORETYPE": coretype},
        capture_output=True,
        text=True,
    )
    return float(done.stdout) if done.returncode == 0 else 0.0


def machine_rates(problem: dict[str, Any]) -> dict[str, float]:
    """SGEMM rates on the step's own shapes (FLOP/s) and copy bandwidth of memory (bytes/s).

    ``flops`` is the best rate that any kernels of the BLAS reach on this CPU, ``flops_as_found``
    that of those which it takes by itself.
    """
    from fastrnn.bench.provenance import cpu_model

    H, V = problem["W_hq"].shape
    n = problem["X"][0].size
    as_found = sgemm_rate(n, H, V)
    wider = [sgemm_rate_as(c, n, H, V) for c in AVX512_CORETYPES if "AVX-512" in cpu_model()]
    return {
        "flops": max([as_found, *wider]),
        "flops_as_found": as_found,
        "bandwidth": copy_bandwidth(1 << 28),
    }


def absence(error: Exception) -> dict[str, str]:
    """The start report of a contender that ended in ``error``; the traceback goes to the log."""
    if isinstance(error, ImportError):
        return {"missing": str(error)}
    traceback.print_exception(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {"unbuilt": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]}


def keep_to_cores(n: int) -> None:
    """Restrict this process to ``n`` of its cores: XLA and TensorFlow read no thread variable."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])


def main() -> None:
    if sys.argv[1] == "sgemm":
        print(sgemm_rate(*map(int, sys.argv[2:])))
        return
    module_name, variant, workload, problem_path = sys.argv[1:5]
    if "FASTRNN_BENCH_CORES" in os.environ:
        keep_to_cores(int(os.environ["FASTRNN_BENCH_CORES"]))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    with np.load(problem_path) as stored:
        problem = dict(stored)
    start = time.perf_counter()
    try:
        module = importlib.import_module(module_name)
        module.versions()
    except Exception as error:
        reply(absence(error))
        return
    imported = time.perf_counter()
    base = resident("VmRSS")
    try:
        contender = module.WORKLOADS[workload](problem, variant)
        built = time.perf_counter()
        contender.run(1)
    except Exception as error:
        reply(absence(error))
        return
    first = time.perf_counter()
    contender.run(1)
    reset_peak()
    versions = module.versions()  # with the settings that the contender has chosen
    second = time.perf_counter()
    reply(
        {
            "versions": {"python": sys.version.split()[0], "numpy": np.__version__, **versions},
            "pools": thread_pools(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "import_seconds": imported - start,
            "build_seconds": built - imported,
            "first_seconds": first - built,
            "second_seconds": second - first,
        }
    )
    used = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - used
        task = json.loads(line)
        if task["do"] == "check":
            contender = module.WORKLOADS[workload](problem, variant)
            results = []
            for _ in range(task["times"]):
                contender.run(task["units"])
                results.append({key: np.array(a) for key, a in contender.result().items()})
            stacked: Any = {key: np.stack([r[key] for r in results]) for key in results[0]}
            np.savez(task["path"], **stacked)
            reply({"checked": task["times"]})
        elif task["do"] == "machine":
            rates = machine_rates(problem)
            reset_peak()
            reply(rates)
        elif task["do"] == "time":
            units = task["units"]
            contender.run(units)  # caches and sleeping threads are nobody's fault
            seconds = []
            for _ in range(task["repeats"]):
                start = time.perf_counter()
                contender.run(units)
                seconds.append((time.perf_counter() - start) / units)
            peak = resident("VmHWM")
            extra = None if peak is None or base is None else peak - base
            reply({"seconds": seconds, "extra_bytes": extra, "idle_cpu": idle})
        used = time.process_time()


if __name__ == "__main__":
    main()
