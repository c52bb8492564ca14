"""FlashRNN's ``elman`` (Pöppel, Beck, Hochreiter 2024), one head; needs a GPU, nvcc and g++.

Its "float32" multiplies in TF32, so the coordinator allows it TF32's error and says so. The
variant is its backend, ``cuda_fused`` or ``cuda``.
"""

from __future__ import annotations

from typing import Any

import torch
from flashrnn import flashrnn
from torch_rnn import device_of, wait
from torch_rnn import versions as torch_versions


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**torch_versions(), "flashrnn": version("flashrnn")}


class Recurrence:
    """Layouts are FlashRNN's defaults: Wx [B,T,G,N,D], R [G,N,D,P], b [G,N,D], states [S,B,T,N,D],
    with G = N = S = 1 and D = P = H. They are made before the timer starts.
    """

    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        self.device, self.backend = device_of(["cuda"]), variant
        a = {n: torch.tensor(problem[n], device=self.device) for n in ("z", "W_hh", "h0", "dh")}
        self.Wx = a["z"].transpose(0, 1)[:, :, None, None, :].contiguous()
        self.R = a["W_hh"].T[None, None].contiguous()
        self.b = torch.zeros_like(a["h0"][0])[None, None]
        self.states = a["h0"][None, :, None, None, :].contiguous()
        self.dh = a["dh"].transpose(0, 1)[None, :, :, None, :].contiguous()

    def forward(self) -> Any:
        h, _ = flashrnn(
            self.Wx,
            self.R,
            self.b,
            states=self.states,
            function="elman",
            backend=self.backend,
            dtype="float32",
        )
        return h  # [1, B, T, 1, H]

    def once(self) -> None:
        with torch.no_grad():
            self.h = self.forward()

    def run(self, n: int) -> None:
        for _ in range(n):
            self.once()
        wait(self.device)

    def result(self) -> dict[str, Any]:
        return {"h": self.h[0, :, :, 0].transpose(0, 1).cpu().numpy()}


class RecurrenceBPTT(Recurrence):
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        super().__init__(problem, variant)
        for leaf in (self.Wx, self.R, self.states):
            leaf.requires_grad_()

    def once(self) -> None:
        leaves = (self.Wx, self.R, self.states)
        self.grads = torch.autograd.grad(self.forward(), leaves, self.dh)

    def result(self) -> dict[str, Any]:
        dz, dR, dh0 = (g.cpu().numpy() for g in self.grads)
        return {
            "dz": dz[:, :, 0, 0].swapaxes(0, 1),
            "dW_hh": dR[0, 0].T,
            "dh0": dh0[0, :, 0, 0],
        }


WORKLOADS = {"recurrence": Recurrence, "recurrence+bptt": RecurrenceBPTT}
