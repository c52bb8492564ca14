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
        precision: a row of :data:`~fastrnn.bench.problems.MAX_ERROR`.
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
        _RNN,
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
