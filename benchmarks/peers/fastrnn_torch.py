"""fastrnn as a torch user has it: ``fastrnn.torch.RNN`` in the place of ``nn.RNN``.

What runs around it is ``torch_rnn.py``'s, to the identity matrix that stands for ``weight_ih``. The
step takes ``fastrnn.torch.CharRNN`` with its own loss and clipping. The variant is ``cuda`` for a
GPU, else empty.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_rnn
from torch import nn

import fastrnn
import fastrnn.torch


def versions() -> dict[str, str]:
    return {"fastrnn": fastrnn.__version__, **torch_rnn.versions()}


class Step(torch_rnn.Step):
    clip = staticmethod(fastrnn.torch.clip_grad_norm_)
    loss_of = staticmethod(fastrnn.torch.cross_entropy)

    def build(self, words: list[str], p: dict[str, torch.Tensor]) -> nn.Module:
        model = fastrnn.torch.CharRNN(*p["W_xh"].shape)
        state = {
            "rnn.weight_ih_l0": p["W_xh"].T,
            "rnn.weight_hh_l0": p["W_hh"].T,
            "rnn.bias_ih_l0": p["b_h"],
            "rnn.bias_hh_l0": torch.zeros_like(p["b_h"]),
            "linear.weight": p["W_hq"].T,
            "linear.bias": p["b_q"],
        }
        model.load_state_dict(state)
        return model

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        logits, last = self.model(x, h[None])
        return logits, last[0]


class Recurrence(torch_rnn.Recurrence):
    layer = fastrnn.torch.RNN


class RecurrenceBPTT(torch_rnn.RecurrenceBPTT):
    layer = fastrnn.torch.RNN


WORKLOADS = {"step": Step, "recurrence": Recurrence, "recurrence+bptt": RecurrenceBPTT}
