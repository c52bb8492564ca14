"""Cross entropy and its gradient on [T·B, V] logits: PyTorch's own and Liger's Triton kernel.

The variant is ``torch`` or ``liger``, then ``cuda`` for a GPU and ``graph`` for a CUDA graph. Liger
writes the gradient over the logits, so each of its calls gets a fresh copy of them, and the copy is
part of its time.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn import functional
from torch_rnn import device_of, runner, wait
from torch_rnn import versions as torch_versions


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = torch_versions()
    with contextlib.suppress(PackageNotFoundError):
        found["liger-kernel"] = version("liger-kernel")
    return found


class CrossEntropy:
    def __init__(self, problem: dict[str, Any], variant: str) -> None:
        words = variant.split("-")
        self.device = device_of(words)
        self.logits = torch.tensor(problem["logits"], device=self.device).flatten(0, 1)
        self.targets = torch.tensor(problem["targets"], dtype=torch.long, device=self.device)
        self.targets = self.targets.flatten()
        self.shape = problem["logits"].shape
        if "liger" in words:
            from liger_kernel.transformers import LigerCrossEntropyLoss

            self.function: Any = LigerCrossEntropyLoss()
        else:
            self.function = functional.cross_entropy
        self.overwrites = "liger" in words
        self.calls = runner(self.once, words)

    def once(self) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = self.logits.detach()
        if self.overwrites:
            leaf = leaf.clone()
        leaf.requires_grad_()
        loss = self.function(leaf, self.targets)
        (dlogits,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), dlogits

    def run(self, n: int) -> None:
        self.loss, self.dlogits = self.calls(n)
        wait(self.device)

    def result(self) -> dict[str, Any]:
        dlogits = self.dlogits.reshape(self.shape).cpu().numpy()
        return {"loss": self.loss.cpu().numpy(), "dlogits": dlogits}


WORKLOADS = {"cross_entropy": CrossEntropy}
