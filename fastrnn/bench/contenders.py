"""Who takes part: our backends, and the peers with their variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastrnn.backend import BACKENDS, GPU_BACKENDS, available_backends
from fastrnn.bench.workloads import WORKLOADS


@dataclass(frozen=True)
class Contender:
    """One row of the table: a peer file and its variant.

    Attributes:
        name: short and unique. label: what the table prints. module: a file in the peers' folder.
        variant: which of its variants. workloads: what it can run. device: "cpu" or "cuda".
        ours: fastrnn, not a peer. slow_start: compiles for longer than half a minute.
        precision: that of its products, a row of :data:`~fastrnn.bench.problems.MAX_ERROR`.
        mode: how it gives a GPU its work, one of :data:`~fastrnn.bench.workloads.MODES`.
        env: additional environment of its process.
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
    mode: str = "eager"
    env: Mapping[str, str] = field(default_factory=dict)

    def mode_of(self, workload: str) -> str:
        """The mode in which it runs a workload; empty on a CPU."""
        if self.device == "cpu":
            return ""
        if self.module == "fastrnn_backend" and workload == "step":
            return "graph"  # run_steps captures by itself
        return self.mode


MODE_LABELS = {"": "", "eager": ", eager", "graph": ", CUDA graph", "jit": ""}
"""What a label says of the mode: the labels of compiled contenders name their compiler."""

_ALL = ("step", "recurrence", "recurrence+bptt", "generate", "generate64")
_RNN = ("step", "recurrence", "recurrence+bptt")
_OP = ("recurrence", "recurrence+bptt")
GRAPHED = (*_OP, "cross_entropy")
"""Workloads in which a GPU backend's ops take part as a captured graph too. Its training steps are
replays of graphs in any case."""

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
    Contender(
        "cudnn-graph",
        "torch nn.RNN (cuDNN), gather",
        "torch_rnn",
        "gather-cuda-graph",
        _RNN,
        "cuda",
        mode="graph",
    ),
    Contender("cudnn", "torch nn.RNN (cuDNN), gather", "torch_rnn", "gather-cuda", _RNN, "cuda"),
    Contender(
        "cudnn-graph-tf32",
        "torch nn.RNN (cuDNN, TF32), gather",
        "torch_rnn",
        "gather-cuda-tf32-graph",
        _RNN,
        "cuda",
        precision="TF32",
        mode="graph",
    ),
    Contender(
        "cudnn-tf32",
        "torch nn.RNN (cuDNN, TF32), gather",
        "torch_rnn",
        "gather-cuda-tf32",
        _RNN,
        "cuda",
        precision="TF32",
    ),
    Contender("jax-scan-cuda", "JAX scan + jit", "jax_scan", "cuda", _ALL, "cuda", mode="jit"),
    Contender(
        "jax-cross-entropy-cuda",
        "JAX log_softmax + jit",
        "jax_scan",
        "cuda",
        ("cross_entropy",),
        "cuda",
        mode="jit",
    ),
    *(
        Contender(
            f"triton{name}",
            f"Triton, one launch ({words})",
            "triton_rnn",
            variant,
            _OP,
            "cuda",
            precision="TF32" if "tf32" in variant else "float32",
            mode="graph" if "graph" in variant else "eager",
        )
        for name, words, variant in (
            ("-graph", "IEEE", "ieee-cuda-graph"),
            ("", "IEEE", "ieee-cuda"),
            ("-graph-tf32", "TF32", "tf32-cuda-graph"),
            ("-tf32", "TF32", "tf32-cuda"),
        )
    ),
    Contender(
        "torch-loop-graph",
        "torch, gather + loop",
        "torch_loop",
        "eager-cuda-graph",
        ("generate", "generate64"),
        "cuda",
        mode="graph",
    ),
    Contender(
        "torch-loop-cuda",
        "torch, gather + loop",
        "torch_loop",
        "eager-cuda",
        ("generate", "generate64"),
        "cuda",
    ),
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
        "torch-cross-entropy-graph",
        "torch cross_entropy",
        "torch_cross_entropy",
        "torch-cuda-graph",
        ("cross_entropy",),
        "cuda",
        mode="graph",
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
        "torch-compile-cuda",
        "torch.compile, gather + loop",
        "torch_loop",
        "compile-cuda",
        _RNN,
        "cuda",
        slow_start=True,
        mode="jit",
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

_CUDNN = ("cudnn-graph", "cudnn", "cudnn-graph-tf32")
_TRITON = ("triton-graph", "triton-graph-tf32")
GPU_PEERS: dict[str, tuple[str, ...]] = {
    "step": (*_CUDNN, "jax-scan-cuda", "fastrnn-torch-cuda"),
    "recurrence": (*_CUDNN, "jax-scan-cuda", *_TRITON, "fastrnn-torch-cuda"),
    "recurrence+bptt": (*_CUDNN, "jax-scan-cuda", *_TRITON, "fastrnn-torch-cuda"),
    "cross_entropy": (
        "torch-cross-entropy-graph",
        "torch-cross-entropy-cuda",
        "jax-cross-entropy-cuda",
    ),
    "generate": ("jax-scan-cuda", "torch-loop-graph", "torch-loop-cuda"),
}
"""For a short run on a GPU: the peers of a workload that start within a quarter of a minute."""
GPU_SLOW_PEERS: dict[str, tuple[str, ...]] = {
    "step": ("torch-compile-cuda",),
    "recurrence": ("flashrnn-elman", "torch-compile-cuda"),
    "recurrence+bptt": ("flashrnn-elman", "torch-compile-cuda"),
    "cross_entropy": ("liger-cross-entropy",),
}
"""Those that are seldom installed or compile for long, where time is left."""


def graph_contender(name: str) -> Contender:
    """One of our GPU backends whose ops run as captured graphs."""
    return Contender(
        name=f"{name}-graph",
        label=f"fastrnn {name}",
        module="fastrnn_backend",
        variant=f"{name}-graph",
        workloads=GRAPHED,
        device="cuda",
        ours=True,
        mode="graph",
    )


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


def choose_contenders(
    peers: str | Sequence[str] = "installed", backends: Sequence[str] | None = None
) -> list[Contender]:
    """Our backends and the peers to run beside them.

    Args:
        peers: ``"installed"`` (all that can start within half a minute), ``"all"`` (those that
            compile for longer too), ``"none"``, or names from :data:`PEERS`.
        backends: names of our own; None takes all that can run here. Those of a GPU run their ops
            as captured graphs too.

    Raises:
        ValueError: a name that does not exist.
    """
    if backends is None:
        backends = [name for name, reason in available_backends().items() if reason is None]
    for name in backends:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    chosen = []
    for name in backends:
        chosen += [graph_contender(name)] if name in GPU_BACKENDS else []
        chosen.append(backend_contender(name))
    devices = {c.device for c in chosen}
    known = {p.name: p for p in PEERS}
    if isinstance(peers, str):
        if peers not in ("installed", "all", "none"):
            raise ValueError(f"peers must be 'installed', 'all' or 'none', got {peers!r}")
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
