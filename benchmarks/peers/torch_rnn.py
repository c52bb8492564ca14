"""PyTorch: ``nn.RNN``, which is cuDNN's recurrence on a GPU.

The variant is words joined by ``-``: ``onehot`` (one-hot vectors into ``nn.RNN``) or ``gather``
(an embedding into ``nn.RNN``, whose own input product is then one with the identity: ``nn.RNN``
has no way round it), then ``cuda`` for a GPU, ``tf32`` for products in TF32 and ``graph`` for what
is replayed as a CUDA graph. Without ``tf32`` a peer computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from replays import by_calls, by_replays
from torch import nn
from torch.nn import functional

NAMES = ("W_xh", "W_hh", "b_h", "W_hq", "b_q")


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "allow_tf32": f"matmul {torch.backends.cuda.matmul.allow_tf32}, "
            f"cudnn {torch.backends.cudnn.allow_tf32}",
        }
    return found


def device_of(words: list[str]) -> torch.device:
    """The device that a variant's words name, with torch's settings for their precision."""
    if "cuda" not in words:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ImportError("torch finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = "tf32" in words
    torch.backends.cudnn.allow_tf32 = "tf32" in words
    return torch.device("cuda")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def captured(call: Callable[[], None], undo: Callable[[], None] = lambda: None) -> Any:
    """``call`` as a CUDA graph to replay; ``undo`` takes back what warming up has changed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    undo()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def runner(call: Callable[[], Any], words: list[str]) -> Callable[[int], Any]:
    """``n`` calls, from captured graphs where the variant's words say so; returns the last's
    results.
    """
    calls: Callable[[int], Any]
    if "graph" not in words:
        calls = by_calls(call)
        return calls

    def record(times: int) -> Callable[[], Any]:
        results: list[Any] = [None]

        def submit() -> None:
            for _ in range(times):
                results[0] = call()

        replay = captured(submit)
        out = results[0]  # the last unit's of the capture: a replay writes there

        def again() -> Any:
            replay()
            return out

        return again

    calls = by_replays(record)
    return calls


class Model(nn.Module):
    """Embedding or one-hot, ``nn.RNN``, output layer: logits [T, B, V] and the last state."""

    def __init__(self, p: dict[str, torch.Tensor], one_hot: bool) -> None:
        super().__init__()
        V, H = p["W_xh"].shape
        self.V, self.one_hot = V, one_hot
        self.rnn = nn.RNN(V if one_hot else H, H)
        self.rnn.weight_hh_l0 = nn.Parameter(p["W_hh"].T.contiguous())
        self.rnn.bias_hh_l0 = nn.Parameter(p["b_h"])
        self.rnn.bias_ih_l0 = fixed(torch.zeros(H))
        if one_hot:
            self.rnn.weight_ih_l0 = nn.Parameter(p["W_xh"].T.contiguous())
        else:
            self.W_xh = nn.Parameter(p["W_xh"])
            self.rnn.weight_ih_l0 = fixed(torch.eye(H))
        self.out = nn.Linear(H, V)
        self.out.weight = nn.Parameter(p["W_hq"].T.contiguous())
        self.out.bias = nn.Parameter(p["b_q"])

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (
            functional.one_hot(x, self.V).float()
            if self.one_hot
            else functional.embedding(x, self.W_xh)
        )
        hs, last = self.rnn(inputs, h[None])
        return self.out(hs), last[0]


class Step:
    """Forward, backward, ``clip_grad_norm_``, SGD; the state is carried."""

    clip = staticmethod(nn.utils.clip_grad_norm_)

    @staticmethod
    def loss_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        words = variant.split("-")
        self.device = device_of(words)
        self.model = self.build(words, {n: torch.tensor(problem[n]) for n in NAMES}).to(self.device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.max_norm = float(problem["max_norm"])
        self.sgd = torch.optim.SGD(self.params, lr=float(problem["lr"]), fused=True)
        self.X = torch.tensor(problem["X"], dtype=torch.long, device=self.device)
        self.Y = torch.tensor(problem["Y"], dtype=torch.long, device=self.device)
        self.h = torch.tensor(problem["h0"], device=self.device)
        self.done = 0
        self.train = self.graphed() if "graph" in words else self.step

    def build(self, words: list[str], p: dict[str, torch.Tensor]) -> nn.Module:
        return Model(p, "onehot" in words)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        return self.model(x, h)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        logits, h = self.forward(x, self.h)
        loss = self.loss_of(logits, y)
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()
        self.clip(self.params, self.max_norm)
        self.sgd.step()
        self.h, self.loss = h.detach(), loss.detach()

    def graphed(self) -> Any:
        """The same step captured once; the warm-up's changes are undone."""
        x, y, h = self.X[0].clone(), self.Y[0].clone(), self.h
        before = [p.detach().clone() for p in (*self.params, h)]

        def call() -> None:
            self.step(x, y)
            h.copy_(self.h)

        def undo() -> None:
            with torch.no_grad():
                for p, old in zip((*self.params, h), before, strict=True):
                    p.copy_(old)
            self.h = h

        replay = captured(call, undo)

        def train(x_new: torch.Tensor, y_new: torch.Tensor) -> None:
            x.copy_(x_new)
            y.copy_(y_new)
            replay()

        return train

    def run(self, n: int) -> None:
        for _ in range(n):
            i = self.done % len(self.X)
            self.train(self.X[i], self.Y[i])
            self.done += 1
        wait(self.device)

    def result(self) -> dict[str, Any]:
        return {"loss": self.loss.cpu().numpy()}


class Recurrence:
    """``nn.RNN`` on the gathered input z, without gradients: cuDNN's path for inference."""

    layer: Any = nn.RNN
    training = False

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        words = variant.split("-")
        self.device = device_of(words)
        H = len(problem["W_hh"])
        self.args = {
            name: torch.tensor(problem[name], device=self.device)
            for name in ("z", "W_hh", "h0", "dh")
        }
        self.rnn = self.layer(H, H, bias=False).to(self.device)
        self.rnn.train(self.training)
        self.rnn.weight_ih_l0 = fixed(torch.eye(H, device=self.device))
        self.rnn.weight_hh_l0 = nn.Parameter(self.args["W_hh"].T.contiguous())
        self.rnn.flatten_parameters()  # or cuDNN copies them together in every call
        for leaf in self.leaves():
            leaf.requires_grad_()
        self.calls = runner(self.once, words)

    def leaves(self) -> list[torch.Tensor]:
        """What is differentiated by."""
        return []

    def forward(self) -> Any:
        return self.rnn(self.args["z"], self.args["h0"][None])[0]

    def once(self) -> Any:
        with torch.no_grad():
            return self.forward()

    def run(self, n: int) -> None:
        self.out = self.calls(n)
        wait(self.device)

    def result(self) -> dict[str, Any]:
        return {"h": self.out.cpu().numpy()}


class RecurrenceBPTT(Recurrence):
    """With autograd's backward pass."""

    training = True

    def leaves(self) -> list[torch.Tensor]:
        return [self.args["z"], self.rnn.weight_hh_l0, self.args["h0"]]

    def once(self) -> Any:
        return torch.autograd.grad(self.forward(), self.leaves(), self.args["dh"])

    def result(self) -> dict[str, Any]:
        dz, dW, dh0 = (g.cpu().numpy() for g in self.out)
        return {"dz": dz, "dW_hh": dW.T, "dh0": dh0}


WORKLOADS = {"step": Step, "recurrence": Recurrence, "recurrence+bptt": RecurrenceBPTT}
