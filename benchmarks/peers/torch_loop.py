"""PyTorch without ``nn.RNN``: a gather and a Python loop of ``tanh(z_t + h W_hh)``.

Variants as in ``torch_rnn.py``: ``eager`` or ``compile`` (the loop under ``torch.compile``), then
``cuda``, then ``graph``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch_rnn import NAMES, captured, device_of, versions, wait
from torch_rnn import Recurrence as RnnRecurrence
from torch_rnn import RecurrenceBPTT as RnnRecurrenceBPTT
from torch_rnn import Step as RnnStep


def recur(z: torch.Tensor, W_hh: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    hs = []
    for z_t in z.unbind():
        h = torch.tanh(torch.addmm(z_t, h, W_hh))
        hs.append(h)
    return torch.stack(hs)


class Model(nn.Module):
    """Logits [T, B, V] and the last state."""

    def __init__(self, p: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in p.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hs = recur(self.W_xh[x] + self.b_h, self.W_hh, h)
        return hs @ self.W_hq + self.b_q, hs[-1]


class Step(RnnStep):
    def build(self, words: list[str], p: dict[str, torch.Tensor]) -> Any:
        model = Model(p)
        return torch.compile(model) if "compile" in words else model


class Recurrence(RnnRecurrence):
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        super().__init__(problem, variant)
        self.function = torch.compile(recur) if "compile" in variant.split("-") else recur

    def forward(self) -> Any:
        return self.function(self.args["z"], self.args["W_hh"], self.args["h0"])


class RecurrenceBPTT(Recurrence, RnnRecurrenceBPTT):
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        super().__init__(problem, variant)
        self.args["W_hh"].requires_grad_()

    def leaves(self) -> list[torch.Tensor]:
        return [self.args[name] for name in ("z", "W_hh", "h0")]

    once = RnnRecurrenceBPTT.once

    def result(self) -> dict[str, Any]:
        names = ("dz", "dW_hh", "dh0")
        return {n: g.cpu().numpy() for n, g in zip(names, self.out, strict=True)}


class Generate:
    """Greedy decoding with a gather and two products a character; arg-max stays on the device.

    With ``graph`` a whole call of ``n`` characters is one graph, captured at the first call.
    """

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        words = variant.split("-")
        self.device, self.graphed = device_of(words), "graph" in words
        self.graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        self.p = {name: torch.tensor(problem[name], device=self.device) for name in NAMES}
        self.prefix = torch.tensor(problem["prefix"], dtype=torch.long, device=self.device)
        self.h0 = torch.zeros(len(self.prefix), len(problem["W_hh"]), device=self.device)

    def produce(self, n: int) -> torch.Tensor:
        p, h = self.p, self.h0
        for x in self.prefix.T:
            h = torch.tanh(torch.addmm(p["W_xh"][x] + p["b_h"], h, p["W_hh"]))
        tokens = []
        for _ in range(n):
            x = torch.addmm(p["b_q"], h, p["W_hq"]).argmax(dim=1)
            tokens.append(x)
            h = torch.tanh(torch.addmm(p["W_xh"][x] + p["b_h"], h, p["W_hh"]))
        return torch.stack(tokens, dim=1)

    @torch.inference_mode()
    def run(self, n: int) -> None:
        if not self.graphed:
            self.tokens = self.produce(n)
        else:
            if n not in self.graphs:
                found: list[Any] = [None]

                def call() -> None:
                    found[0] = self.produce(n)

                self.graphs[n] = captured(call), found[0]
            replay, self.tokens = self.graphs[n]
            replay()
        wait(self.device)

    def result(self) -> dict[str, Any]:
        return {"tokens": self.tokens.cpu().numpy().astype("int32")}


WORKLOADS = {
    "step": Step,
    "recurrence": Recurrence,
    "recurrence+bptt": RecurrenceBPTT,
    "generate": Generate,
}

__all__ = ["WORKLOADS", "versions"]
