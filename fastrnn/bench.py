"""How fast this machine runs fastrnn, and how fast it runs the peers that are installed on it.

Every contender, our backends and the peers alike, runs in a process of its own (see
``benchmarks/peers``), so that no library's thread pool sits in another's way and memory and
compilation are measured one by one. The coordinator here

    makes one problem -> starts the workers one after another -> checks each against the oracle
    -> lets them take turns, in another order every round, while all others sleep on a pipe

and compares medians round by round: a ratio is the median over rounds of (peer / ours), so a
machine that slows down for a while slows down both. A contender whose result is wrong gets no time;
one that is not installed is reported as missing, with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrnn import reference
from fastrnn.backend import BACKENDS, Dims, available_backends

Arrays = dict[str, NDArray[Any]]

_HERE = Path(__file__).parent
_PEER_FOLDERS = (_HERE / "peers", _HERE.parent / "benchmarks" / "peers")
PEER_FOLDER = next((d for d in _PEER_FOLDERS if d.is_dir()), _PEER_FOLDERS[0])

SCHEMA = 1
HEADLINE = Dims(T=35, B=32, H=256, V=1027)
SIZES: dict[str, Dims] = {
    "headline": HEADLINE,
    "B1": dataclasses.replace(HEADLINE, B=1),
    "B256": dataclasses.replace(HEADLINE, B=256),
    "T512": dataclasses.replace(HEADLINE, T=512),
    "H64": dataclasses.replace(HEADLINE, H=64),
    "H512": dataclasses.replace(HEADLINE, H=512),
    "H1024": dataclasses.replace(HEADLINE, H=1024),
    "tiny": Dims(T=5, B=4, H=16, V=31),
}
WORKLOADS = ("step", "recurrence", "recurrence+bptt", "cross_entropy", "generate", "generate64")
UNITS = {
    "step": "training step",
    "recurrence": "forward pass",
    "recurrence+bptt": "forward and backward pass",
    "cross_entropy": "loss and gradient",
    "generate": "character",
    "generate64": "character of each of 64 sequences",
}

MAX_ERROR = {"float32": 1e-4, "TF32": 2e-2}
"""Relative error against the float64 oracle above which a contender gets no time. Losses of three
steps and gradients through T steps of float32 stay below 1e-5; TF32 keeps 11 bits of a product."""

CHECK_STEPS = 3
CHECK_CHARACTERS = 12

CONTINUATION = 50
"""Characters a timed call generates at the least: the length of the tutorial's continuations."""
SETTLE_SECONDS = 0.15
"""Idle threads spin after a worker's turn: OpenBLAS's for up to 0.1 s, OpenMP's for some 5 ms."""


# --- Contenders ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One row of the table: a peer file and its variant.

    Attributes:
        name: short and unique. label: what the table prints. module: a file in the peers' folder.
        variant: which of its variants. workloads: what it can run. device: "cpu" or "cuda".
        ours: fastrnn, not a peer. slow_start: compiles for longer than half a minute.
        precision: a row of :data:`MAX_ERROR`. env: additional environment of its process.
    """

    name: str
    label: str
    module: str
    variant: str
    workloads: tuple[str, ...]
    device: str = "cpu"
    ours: bool = False
    slow_start: bool = False
    precision: str = "float32"
    env: Mapping[str, str] = field(default_factory=dict)


_ALL = ("step", "recurrence", "recurrence+bptt", "generate", "generate64")
_RNN = ("step", "recurrence", "recurrence+bptt")
_OP = ("recurrence", "recurrence+bptt")

PEERS = (
    Contender("fastrnn-torch", "fastrnn.torch.RNN", "fastrnn_torch", "", _RNN, ours=True),
    Contender(
        "fastrnn-torch-cuda",
        "fastrnn.torch.RNN",
        "fastrnn_torch",
        "cuda",
        _RNN,
        "cuda",
        ours=True,
    ),
    Contender(
        "numpy-reference",
        "NumPy, step by step",
        "numpy_reference",
        "",
        ("step", "generate", "generate64"),
    ),
    Contender("jax-scan", "JAX scan + jit", "jax_scan", "cpu", _ALL),
    Contender(
        "fastrnn-jax",
        "fastrnn.jax under jit",
        "fastrnn_jax",
        "cpu",
        (*_RNN, "cross_entropy"),
        ours=True,
    ),
    Contender(
        "torch-compile",
        "torch.compile, gather + loop",
        "torch_loop",
        "compile",
        _RNN,
        slow_start=True,
    ),
    Contender("torch-loop", "torch, gather + loop", "torch_loop", "eager", _ALL),
    Contender("torch-rnn-gather", "torch nn.RNN, gather", "torch_rnn", "gather", _RNN),
    Contender("torch-rnn-onehot", "torch nn.RNN, one-hot", "torch_rnn", "onehot", ("step",)),
    Contender(
        "torch-cross-entropy",
        "torch cross_entropy",
        "torch_cross_entropy",
        "torch",
        ("cross_entropy",),
    ),
    Contender(
        "tf-function", "TensorFlow, tf.function", "tensorflow_tutorial", "function", ("step",)
    ),
    Contender(
        "tf-eager",
        "TensorFlow, the tutorial (eager)",
        "tensorflow_tutorial",
        "eager",
        ("step", "generate"),
    ),
    Contender("cudnn", "torch nn.RNN (cuDNN), gather", "torch_rnn", "gather-cuda", _RNN, "cuda"),
    Contender(
        "cudnn-graph",
        "torch nn.RNN (cuDNN), gather, CUDA graph",
        "torch_rnn",
        "gather-cuda-graph",
        ("step",),
        "cuda",
    ),
    Contender(
        "torch-compile-cuda",
        "torch.compile, gather + loop",
        "torch_loop",
        "compile-cuda",
        _RNN,
        "cuda",
        slow_start=True,
    ),
    Contender("jax-scan-cuda", "JAX scan + jit", "jax_scan", "cuda", _ALL, "cuda"),
    Contender(
        "flashrnn-elman",
        "FlashRNN elman (TF32)",
        "flashrnn_elman",
        "cuda_fused",
        _OP,
        "cuda",
        slow_start=True,
        precision="TF32",
    ),
    Contender(
        "torch-cross-entropy-cuda",
        "torch cross_entropy",
        "torch_cross_entropy",
        "torch-cuda",
        ("cross_entropy",),
        "cuda",
    ),
    Contender(
        "liger-cross-entropy",
        "Liger cross entropy",
        "torch_cross_entropy",
        "liger-cuda",
        ("cross_entropy",),
        "cuda",
    ),
)

GPU_BACKENDS = ("cupy", "numba-cuda")


def backend_contender(name: str, label: str | None = None, **env: str) -> Contender:
    """One of our backends as a contender; ``env`` goes to its process."""
    return Contender(
        name=label or name,
        label=f"fastrnn {label or name}",
        module="fastrnn_backend",
        variant=name,
        workloads=WORKLOADS,
        device="cuda" if name in GPU_BACKENDS else "cpu",
        ours=True,
        env=env,
    )


# --- Work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What an op cannot avoid: floating-point operations, and bytes read and written once."""

    flop: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def floor_seconds(self, flops: float, bandwidth: float) -> float:
        """The roofline's lower bound (Williams, Waterman, Patterson 2009) at these rates."""
        return max(self.flop / flops, self.bytes / bandwidth)


def work(op: str, dims: Dims) -> Work:
    """The work of an op, of ``step``, or of ``generate`` (one character of B sequences).

    Products count two operations a term; tanh, exp and the other pointwise work count nothing.
    For ``step`` the bytes are those of the parameters and gradients alone: a fused step may keep
    everything that its ops exchange in cache.
    """
    T, B, H, V, size = dims.T, dims.B, dims.H, dims.V, dims.dtype.itemsize
    n, params = T * B, sum(int(np.prod(s)) for s in dims.param_shapes.values())
    hidden, logits = n * H * size, n * V * size
    table: dict[str, tuple[float, float]] = {
        "gather": (n * H, 2 * hidden + 4 * n),
        "gather_backward": (2 * n * H, hidden + V * H * size + 4 * n),
        "recurrence": (2 * n * H * H, 2 * hidden + H * H * size),
        "recurrence_backward": (4 * n * H * H, 3 * hidden + 2 * H * H * size),
        "project": (2 * n * H * V, hidden + logits + H * V * size),
        "project_backward": (4 * n * H * V, 2 * hidden + logits + 2 * H * V * size),
        "cross_entropy": (4 * n * V, 2 * logits + 4 * n),
        "clip_by_global_norm": (3 * params, 3 * params * size),
        "sgd": (2 * params, 3 * params * size),
        "step": (6 * n * H * (H + V), 5 * params * size),
        "generate": (2 * B * H * (H + V), (H * H + H * V + B * H) * size),
    }
    flop, traffic = table[op]
    return Work(float(flop), float(traffic))


# --- Problems --------------------------------------------------------------------------------


def zipf_tokens(rng: np.random.Generator, n: int, V: int) -> NDArray[np.int32]:
    """Tokens distributed like the characters of a text: the r-th most frequent as 1 / (r + 2.7)."""
    p = 1.0 / (np.arange(V) + 2.7)
    return rng.permutation(V)[rng.choice(V, size=n, p=p / p.sum())].astype(np.int32)


def make_problem(workload: str, dims: Dims, seed: int = 0) -> tuple[Arrays, list[Arrays]]:
    """The inputs of a workload, and what the float64 oracle makes of them.

    Returns:
        The problem, and the expected results of the check, one dict a call of ``result()``.
    """
    T, B, H, V = dims.T, dims.B, dims.H, dims.V
    rng = np.random.default_rng([seed, T, B, H, V])
    f32 = np.float32

    def normal(*shape: int, scale: float = 1.0) -> NDArray[Any]:
        return (rng.standard_normal(shape) * scale).astype(f32)

    problem: Arrays = dict(reference.init_params(V, H, seed))
    problem["h0"] = np.zeros((B, H), f32)
    if workload.startswith("generate"):
        # Larger weights than a fresh model's: its arg-max would hang on the last bit.
        S = int(workload.removeprefix("generate") or 1)
        problem |= {
            "W_xh": normal(V, H, scale=0.5),
            "W_hh": normal(H, H, scale=H**-0.5),
            "W_hq": normal(H, V, scale=H**-0.5),
            "b_q": normal(V, scale=0.1),
            "prefix": rng.integers(0, V, (S, 2)).astype(np.int32),
        }
        wide = _wide(problem)
        rows = [reference.predict(row, CHECK_CHARACTERS, wide) for row in problem["prefix"]]
        return problem, [{"tokens": np.stack(rows)}]
    batches = 8
    tokens = zipf_tokens(rng, B * (batches * T + 1), V)
    starts = np.arange(B) * (batches * T + 1) + np.arange(batches)[:, None] * T
    index = starts[:, None, :] + np.arange(T)[None, :, None]
    problem |= {
        "tokens": tokens,
        "starts": starts.astype(np.int32),
        "X": tokens[index],
        "Y": tokens[index + 1],
        "lr": np.asarray(100.0, f32),
        "max_norm": np.asarray(0.01, f32),
    }
    if workload == "step":
        wide, h = _wide(problem), np.zeros((B, H))
        losses = []
        for i in range(CHECK_STEPS):
            loss, _, h = reference.train_step(
                problem["X"][i], problem["Y"][i], h, wide, 100.0, float(problem["max_norm"])
            )
            losses.append({"loss": np.asarray(loss)})
        return problem, losses
    if workload == "cross_entropy":
        problem |= {"logits": normal(T, B, V), "targets": problem["Y"][0]}
        logits = problem["logits"].astype(np.float64)
        d = np.exp(reference.log_softmax(logits))
        np.add.at(d, (*np.indices((T, B)), problem["targets"]), -1.0)
        loss = reference.cross_entropy(logits, problem["targets"])
        return problem, [{"loss": np.asarray(loss), "dlogits": d / (T * B)}]
    if workload not in ("recurrence", "recurrence+bptt"):
        raise ValueError(f"unknown workload {workload!r}: expected one of {', '.join(WORKLOADS)}")
    problem |= {
        "z": normal(T, B, H, scale=0.5),
        "W_hh": normal(H, H, scale=H**-0.5),
        "h0": normal(B, H, scale=0.5),
        "dh": normal(T, B, H),
    }
    z, W, h0, dh = (problem[n].astype(np.float64) for n in ("z", "W_hh", "h0", "dh"))
    hs = [h0]
    for t in range(T):
        hs.append(np.tanh(z[t] + hs[-1] @ W))
    if workload == "recurrence":
        return problem, [{"h": np.stack(hs[1:])}]
    dz, dW, back = np.empty_like(dh), np.zeros_like(W), np.zeros_like(h0)
    for t in reversed(range(T)):
        dz[t] = (dh[t] + back) * (1 - hs[t + 1] ** 2)
        dW += hs[t].T @ dz[t]
        back = dz[t] @ W.T
    return problem, [{"dz": dz, "dW_hh": dW, "dh0": back}]


def _wide(problem: Arrays) -> reference.Params:
    return {name: problem[name].astype(np.float64) for name in reference.PARAM_NAMES}


def relative_error(results: Mapping[str, NDArray[Any]], expected: Sequence[Arrays]) -> float:
    """The largest relative RMS error of any result; infinite for tokens or shapes that differ."""
    worst = 0.0
    for name in expected[0]:
        want = np.stack([e[name] for e in expected])
        got = np.asarray(results[name])
        if got.shape != want.shape:
            return float("inf")
        if name == "tokens":
            error = 0.0 if np.array_equal(got, want) else float("inf")
        else:
            # by result, so that one small loss among large ones is not drowned
            flat_got, flat_want = got.reshape(len(want), -1), want.reshape(len(want), -1)
            difference = np.linalg.norm(flat_got.astype(np.float64) - flat_want, axis=1)
            error = float(np.max(difference / np.linalg.norm(flat_want, axis=1)))
        if not error <= worst:  # NaN is worse than anything
            worst = error
    return float("inf") if np.isnan(worst) else worst


# --- Machine ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What has to be known about this machine to read its figures; no host name."""
    import threadpoolctl

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {
        "cpu": _cpu_model(),
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


def _cpu_model() -> str:
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
    """The commit of the checkout this package lies in; empty for an installed package."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(_HERE), *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != _HERE.parent:
            return {}
        return {
            "id": git("rev-parse", "HEAD"),
            "time": git("show", "-s", "--format=%cI", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", str(_HERE))),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


# --- Workers ---------------------------------------------------------------------------------


class WorkerError(RuntimeError):
    """A contender's process ended, or did not answer; the message holds the end of its log."""


class Worker:
    """The process of one contender. Starts at once; :attr:`report` is its start report."""

    def __init__(
        self,
        contender: Contender,
        workload: str,
        problem: Path,
        *,
        threads: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.contender, self.timeout = contender, timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._buffer = b""
        name = "generate" if workload.startswith("generate") else workload
        command = [
            interpreter(contender),
            str(PEER_FOLDER / "worker.py"),
            contender.module,
            contender.variant,
            name,
            str(problem),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(contender, threads),
        )
        try:
            self.report = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a task, wait for its answer (see ``worker.py``)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failure("does not listen any more") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + self.timeout
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise self._failure(f"gave no answer within {self.timeout:.0f} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                # Its output is closed before it has said why.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)
                raise self._failure("ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> WorkerError:
        """The error for a worker that is of no more use; ends it."""
        self._process.kill()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
        return WorkerError(f"{what}: {' | '.join(tail) or 'no message'}")

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def interpreter(contender: Contender) -> str:
    """The Python of a contender: ``FASTRNN_BENCH_TF_PYTHON`` for TensorFlow, where it is set."""
    if contender.module == "tensorflow_tutorial":
        return os.environ.get("FASTRNN_BENCH_TF_PYTHON", "").strip() or sys.executable
    return sys.executable


def _environment(contender: Contender, threads: int | None) -> dict[str, str]:
    env = dict(os.environ)
    if interpreter(contender) == sys.executable:  # another Python must not see our packages
        paths = [str(_HERE.parent), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    env["TF_CPP_MIN_LOG_LEVEL"] = env.get("TF_CPP_MIN_LOG_LEVEL", "2")
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if contender.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"], env["JAX_PLATFORMS"] = "", "cpu"
    if threads is not None:
        for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
            env[f"{name}_NUM_THREADS"] = str(threads)
        env["FASTRNN_BENCH_CORES"] = str(threads)
    return env | dict(contender.env)


# --- Measuring -------------------------------------------------------------------------------


@dataclass
class Row:
    """One contender on one workload and size.

    Attributes:
        status: "ok", "missing" (not installed, no device), "wrong" (differs from the oracle) or
            "failed" (its process ended); reason: why, where it is not "ok".
        seconds: a unit's time: the median over rounds of the rounds' medians. low, high: the
            fastest and the slowest round. rounds: every round's median.
        ratio: this contender's time by our baseline's, median over rounds; ratio_low, ratio_high.
        error: relative error against the float64 oracle.
        start_seconds: building the contender and its first unit, compilation included.
        extra_bytes: resident memory in the timed runs above that of the bare process.
        idle_cpu: most CPU seconds it used between two turns; spinning threads show here.
        floor: the roofline's lower bound of a unit in seconds, where it is known.
    """

    workload: str
    size: str
    name: str
    label: str
    ours: bool
    device: str
    status: str = "ok"
    reason: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: list[float] = field(default_factory=list)
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: float | None = None
    start_seconds: float | None = None
    extra_bytes: int | None = None
    idle_cpu: float | None = None
    floor: float | None = None


@dataclass
class BenchResult:
    """What :func:`run_bench` measured.

    Attributes:
        machine, commit, date: where, what, when (UTC). rows: one a contender, workload and size.
        dims: the sizes by name. rates: best SGEMM rate (FLOP/s) and copy bandwidth (bytes/s) seen
            in our own process. first_call: seconds of opening a backend and its first training
            step by backend, with an empty and with a filled JIT cache.
        software: versions and thread pools of each contender. seconds: how long it all took.
    """

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    rows: list[Row]
    dims: dict[str, dict[str, int]]
    rates: dict[str, float] = field(default_factory=dict)
    first_call: dict[str, dict[str, float]] = field(default_factory=dict)
    software: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def merge(self, other: BenchResult) -> None:
        """Take in the tables of another run on the same machine."""
        self.rows += other.rows
        self.dims |= other.dims
        self.first_call |= other.first_call
        self.software |= other.software
        self.seconds += other.seconds
        for key, rate in other.rates.items():
            self.rates[key] = max(rate, self.rates.get(key, 0.0))

    def find(self, workload: str, size: str, name: str) -> Row | None:
        """The row of one contender, if it was asked for."""
        rows = (r for r in self.rows if (r.workload, r.size, r.name) == (workload, size, name))
        return next(rows, None)

    def select(self, workload: str, size: str, device: str | None = None) -> list[Row]:
        """The rows of one table, fastest first, those without a time last."""
        rows = [
            r
            for r in self.rows
            if (r.workload, r.size) == (workload, size) and device in (None, r.device)
        ]
        return sorted(rows, key=lambda r: (r.seconds is None, r.seconds or 0.0))

    def tables(self) -> list[tuple[str, str]]:
        """The pairs (workload, size) that were measured, in order."""
        return list(dict.fromkeys((r.workload, r.size) for r in self.rows))

    def table(self) -> str:
        """All tables in Markdown, aligned to be read in a terminal as well."""
        parts = [f"{self.machine['cpu']}, {self.machine['cores']} cores, {self.date}"]
        parts += [self.markdown(*which) for which in self.tables()]
        return "\n\n".join(parts)

    def markdown(self, workload: str, size: str) -> str:
        """One table: time of a unit, ratio to ours, memory, start; then who is missing and why."""
        rows = self.select(workload, size)
        d = self.dims[size]
        head = (
            f"**{workload}** at V={d['V']}, H={d['H']}, B={d['B']}, T={d['T']}"
            if workload in ("step", "cross_entropy")
            else f"**{workload}** at H={d['H']}, V={d['V']}"
            if workload.startswith("generate")
            else f"**{workload}** at H={d['H']}, B={d['B']}, T={d['T']}"
        )
        header = (
            f"time of one {UNITS[workload]}",
            "median",
            "rounds",
            "by ours",
            "memory",
            "start",
        )
        cells = [header]
        for r in rows:
            if r.seconds is None or r.low is None or r.high is None:
                continue
            ratio = (
                "–" if r.ratio is None else f"{r.ratio:.2f} ({r.ratio_low:.2f}–{r.ratio_high:.2f})"
            )
            memory = "–" if r.extra_bytes is None else f"{r.extra_bytes / 1e6:.0f} MB"
            start = "–" if r.start_seconds is None else f"{r.start_seconds:.1f} s"
            spread = f"{format_seconds(r.low)} – {format_seconds(r.high)}"
            cells.append((r.label, format_seconds(r.seconds), spread, ratio, memory, start))
        lines = [head, "", *markdown_table(cells)]
        absent = [r for r in rows if r.seconds is None]
        lines += [""] * bool(absent)
        lines += [f"- {r.label}: {r.status}: {r.reason}" for r in absent]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The result as JSON text; :meth:`from_json` reads it back."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(_rounded(data), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise ValueError(f"expected a fastrnn bench result with schema {SCHEMA}")
        data["rows"] = [Row(**row) for row in data["rows"]]
        return cls(**data)

    def plot(self, path: str | Path, workload: str = "step", size: str = "headline") -> None:
        """Draw one table as a bar chart (PNG, SVG, …); needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install 'fastrnn[plot]'") from error
        rows = [r for r in self.select(workload, size) if r.seconds is not None]
        if not rows:
            raise ValueError(f"no times to plot for {workload!r} at {size!r}")
        scale, unit = _time_unit(max(r.seconds or 0.0 for r in rows))
        figure = Figure(figsize=(8, 1.3 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for i, r in enumerate(rows):
            assert r.seconds is not None
            assert r.low is not None
            assert r.high is not None
            bar = r.seconds * scale
            axes.barh(i, bar, color="#1b7f79" if r.ours else "#b8bfc6", height=0.7)
            low, high = (r.seconds - r.low) * scale, (r.high - r.seconds) * scale
            axes.errorbar(bar, i, xerr=[[low], [high]], color="#444", capsize=2, lw=1)
            times = "" if r.ratio is None or r.ratio == 1 else f"  ({r.ratio:.1f}×)"
            end = r.high * scale
            axes.text(end, i, f"  {format_seconds(r.seconds)}{times}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [r.label for r in rows], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.28 * max((r.high or 0.0) * scale for r in rows))
        axes.set_xlabel(f"time of one {UNITS[workload]} ({unit}), lower is better")
        d = self.dims[size]
        axes.set_title(
            f"V={d['V']}, H={d['H']}, B={d['B']}, T={d['T']}, float32\n"
            f"{self.machine['cpu']}, {self.machine['cores']} cores · {self.date[:10]}",
            fontsize=9,
            loc="left",
        )
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def format_seconds(seconds: float) -> str:
    """``0.01234`` -> ``12.3 ms``: three significant digits."""
    scale, unit = _time_unit(seconds)
    value = seconds * scale
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(max(value, 1e-9)))))}f} {unit}"


def _time_unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1.0:
            return scale, unit
    return 1e6, "µs"


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the header, the first column text."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = "|" + "|".join(
        "-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return [line(cells[0]), rule + "|", *(line(row) for row in cells[1:])]


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of these figures has."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


class Measurement(NamedTuple):
    """Rows of the contenders, the machine's rates (empty for workloads other than ``step``), and
    the libraries' versions and thread pools by contender.
    """

    rows: list[Row]
    rates: dict[str, float]
    software: dict[str, dict[str, Any]]


def measure(
    contenders: Sequence[Contender],
    workload: str,
    size: str,
    *,
    rounds: int = 5,
    turn_seconds: float = 0.25,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Measurement:
    """Check and time ``contenders`` on one workload and size, interleaved."""
    dims = SIZES[size]
    problem, expected = make_problem(workload, dims)
    rows = {
        c.name: Row(workload, size, c.name, c.label, c.ours, c.device)
        for c in contenders
        if workload in c.workloads
    }
    rates: dict[str, float] = {}
    software: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "problem.npz"
        np.savez(path, **problem)  # type: ignore[arg-type]
        workers: dict[str, Worker] = {}
        for c in contenders:
            if c.name not in rows:
                continue
            progress(f"{workload} {size}: starting {c.label}")
            row = rows[c.name]
            with _failing(row):
                worker = Worker(c, workload, path, threads=threads)
                stack.callback(worker.close)
                if "missing" in worker.report:
                    row.status, row.reason = "missing", worker.report["missing"]
                    continue
                software[c.name] = {key: worker.report[key] for key in ("versions", "pools")}
                _check(worker, row, workload, expected, Path(folder))
                if row.status == "ok":
                    workers[c.name] = worker
        shares: dict[str, tuple[int, int]] = {}
        for name, worker in list(workers.items()):
            with _failing(rows[name]):
                once = min(worker.ask(do="time", units=1, repeats=3)["seconds"])
                least = CONTINUATION if workload.startswith("generate") else 1
                units = max(least, round(2e-3 / once))
                if units > 1:  # what a call does once is now in the time of many units
                    once = min(worker.ask(do="time", units=units, repeats=3)["seconds"])
                shares[name] = (units, max(3, min(500, int(turn_seconds / (units * once)))))
        for i in range(rounds):
            names = [n for n in workers if n in shares and rows[n].status == "ok"]
            for name in names[i % max(1, len(names)) :] + names[: i % max(1, len(names))]:
                progress(f"{workload} {size}: round {i + 1} of {rounds}, {rows[name].label}")
                time.sleep(SETTLE_SECONDS)
                with _failing(rows[name]):
                    units, repeats = shares[name]
                    answer = workers[name].ask(do="time", units=units, repeats=repeats)
                    rows[name].rounds.append(statistics.median(answer["seconds"]))
                    if rows[name].device == "cpu":  # a GPU's memory is not the process's
                        rows[name].extra_bytes = answer["extra_bytes"]
                    idle = rows[name].idle_cpu or 0.0
                    rows[name].idle_cpu = max(idle, answer["idle_cpu"])
            on_cpu = [r for r in rows.values() if r.device == "cpu"]
            if workload == "step" and (ours := _first_of_ours(on_cpu)) is not None:
                with _failing(ours):
                    time.sleep(SETTLE_SECONDS)
                    for key, rate in workers[ours.name].ask(do="machine").items():
                        rates[key] = max(rate, rates.get(key, 0.0))
    _summarise(list(rows.values()), dims, rates)
    return Measurement(list(rows.values()), rates, software)


@contextlib.contextmanager
def _failing(row: Row) -> Iterator[None]:
    """A worker that ends costs its own row, nobody else's."""
    try:
        yield
    except WorkerError as error:
        row.status, row.reason, row.rounds = "failed", str(error), []


def _check(
    worker: Worker, row: Row, workload: str, expected: Sequence[Arrays], folder: Path
) -> None:
    """Compare a contender's results with the oracle's; fill in its start report."""
    report = worker.report
    row.start_seconds = report["build_seconds"] + report["first_seconds"]
    results = folder / f"{row.name}.npz"
    units = CHECK_CHARACTERS if workload.startswith("generate") else 1
    worker.ask(do="check", units=units, times=len(expected), path=str(results))
    with np.load(results) as stored:
        row.error = relative_error(stored, expected)
    limit = MAX_ERROR[worker.contender.precision]
    if not row.error <= limit:
        row.status = "wrong"
        row.reason = f"relative error {row.error:.2g} against the oracle, allowed {limit:g}"


def _first_of_ours(rows: Any) -> Row | None:
    """The baseline: our fastest kind of backend that ran, GPU before CPU."""
    ours = {r.name: r for r in rows if r.ours and r.status == "ok"}
    return next((ours[name] for name in (*BACKENDS, *ours) if name in ours), None)


def _summarise(rows: Sequence[Row], dims: Dims, rates: Mapping[str, float]) -> None:
    """Medians, ratios to our baseline on the same device, floors."""
    for device in {r.device for r in rows}:
        group = [r for r in rows if r.device == device]
        base = _first_of_ours(r for r in group if r.rounds)
        for r in group:
            if not r.rounds:
                continue
            r.seconds, r.low, r.high = statistics.median(r.rounds), min(r.rounds), max(r.rounds)
            if r.workload == "step" and device == "cpu" and rates:
                r.floor = work("step", dims).flop / rates["flops"]
            if base is not None:
                r.ratio, r.ratio_low, r.ratio_high = paired_ratio(r.rounds, base.rounds)


def paired_ratio(rounds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the round-by-round ratios ``rounds / base``."""
    ratios = [a / b for a, b in zip(rounds, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


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


# --- The public entry ------------------------------------------------------------------------


def choose_contenders(
    peers: str | Sequence[str] = "installed", backends: Sequence[str] | None = None
) -> list[Contender]:
    """Our backends and the peers to run beside them.

    Args:
        peers: ``"installed"`` (all that can start within half a minute), ``"all"`` (those that
            compile for longer too), ``"none"``, or names from :data:`PEERS`.
        backends: names of our own; None takes all that can run here.

    Raises:
        ValueError: a name that does not exist.
    """
    if backends is None:
        backends = [name for name, reason in available_backends().items() if reason is None]
    for name in backends:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    chosen = [backend_contender(name) for name in backends]
    devices = {c.device for c in chosen}
    known = {p.name: p for p in PEERS}
    if isinstance(peers, str):
        if peers not in ("installed", "all", "none"):
            raise ValueError(f"peers must be 'installed', 'all', 'none' or names, got {peers!r}")
        names = [
            p.name
            for p in PEERS
            if peers != "none" and p.device in devices and (peers == "all" or not p.slow_start)
        ]
    else:
        names = list(peers)
        for name in names:
            if name not in known:
                raise ValueError(f"unknown peer {name!r}: expected some of {', '.join(known)}")
    return chosen + [known[name] for name in names]


def run_bench(
    workloads: Sequence[str] = ("step", "generate"),
    sizes: Sequence[str] = ("headline",),
    *,
    peers: str | Sequence[str] = "installed",
    backends: Sequence[str] | None = None,
    rounds: int = 5,
    turn_seconds: float = 0.25,
    threads: int | None = None,
    first_call: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Measure fastrnn and its peers on this machine.

    Args:
        workloads: some of :data:`WORKLOADS`. sizes: some of :data:`SIZES`.
        peers, backends: see :func:`choose_contenders`.
        rounds: every contender's turns. turn_seconds: the length of a turn, about.
        threads: threads of each contender, each on a core of its own; None leaves it to the
            libraries and the environment.
        first_call: measure the JIT's first call too, with an empty and with a filled cache.
        progress: called with a line whenever something starts.

    Raises:
        ValueError: a name that does not exist, or fewer than one round.
    """
    for names, known, what in ((workloads, WORKLOADS, "workload"), (sizes, tuple(SIZES), "size")):
        for name in names:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    start = time.monotonic()
    contenders = choose_contenders(peers, backends)
    result = BenchResult(
        machine=machine(),
        commit=commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=[],
        dims={s: {k: getattr(SIZES[s], k) for k in "TBHV"} for s in sizes},
    )
    for workload in workloads:
        for size in sizes:
            measured = measure(
                contenders,
                workload,
                size,
                rounds=rounds,
                turn_seconds=turn_seconds,
                threads=threads,
                progress=progress,
            )
            result.rows += measured.rows
            result.software |= measured.software
            for key, rate in measured.rates.items():
                result.rates[key] = max(rate, result.rates.get(key, 0.0))
    if first_call:
        for contender in contenders:
            if contender.module == "fastrnn_backend" and contender.variant != "numpy":
                progress(f"first call of {contender.label}, with an empty JIT cache")
                result.first_call[contender.name] = measure_first_call(contender.variant)
    result.seconds = time.monotonic() - start
    return result
