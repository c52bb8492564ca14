"""What a torch user calls, on the device, against ``nn.RNN`` in float64 on the CPU.

A case returns the relative RMS error of every output and gradient. On ``"cpu"``, in a stand-in for
a GPU, the same calls run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn.torch
from benchmarks.op_cases import bptt, hidden_states, softmax_loss
from fastrnn import ops, reference
from fastrnn.backend import Dims
from tests.tolerances import relative_rms

LIMIT = 1e-5
"""Outputs and gradients through T steps of float32: those of cuDNN lie between 1e-7 and 2e-6."""

Errors = dict[str, float]


def error(got: Any, want: Any) -> float:
    return relative_rms(got.detach().cpu().double().numpy(), want.detach().cpu().double().numpy())


def _compare(ours: nn.Module, theirs: nn.Module, run: Callable[..., Any], *inputs: Any) -> Errors:
    """Run both on the same inputs and back-propagate the same gradient; theirs in float64."""
    results = []
    for model, dtype, device in (
        (ours, torch.float32, next(ours.parameters()).device),
        (theirs, torch.float64, "cpu"),
    ):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        outputs = run(model, *leaves)
        torch.manual_seed(1)
        weight = torch.randn(outputs[0].shape).to(device, dtype)
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(
            (outputs[0] * weight).sum() + outputs[1].square().sum(),
            [*leaves, *parameters.values()],
        )
        names = [f"d{i}" for i in range(len(leaves))] + [f"d{name}" for name in parameters]
        results.append(dict(zip(["output", "h_n", *names], [*outputs, *grads], strict=True)))
    return {name: error(got, results[1][name]) for name, got in results[0].items()}


def _rnns(dims: Dims, device: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = nn.RNN(48, dims.H, **options)
    ours = fastrnn.torch.RNN(48, dims.H, **options, device=device)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs.double()


def _states(dims: Dims, count: int) -> torch.Tensor:
    return 0.5 * torch.randn(count, dims.B, dims.H)


def rnn(dims: Dims, device: str) -> Errors:
    ours, theirs = _rnns(dims, device)
    x = torch.randn(dims.T, dims.B, 48)
    return _compare(ours, theirs, lambda model, x, h: model(x, h), x, _states(dims, 1))


def stacked(dims: Dims, device: str) -> Errors:
    ours, theirs = _rnns(dims, device, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(dims.B, dims.T, 48)
    return _compare(ours, theirs, lambda model, x, h: model(x, h), x, _states(dims, 4))


def packed(dims: Dims, device: str) -> Errors:
    ours, theirs = _rnns(dims, device)
    lengths = torch.linspace(dims.T, 1, dims.B).long().clamp(min=1)

    def run(model: Any, x: Any, h: Any) -> Any:
        output, last = model(pack_padded_sequence(x, lengths), h)
        return output.data, last

    return _compare(ours, theirs, run, torch.randn(dims.T, dims.B, 48), _states(dims, 1))


def compiled(dims: Dims, device: str) -> Errors:
    """Forward and backward under ``torch.compile(fullgraph=True)``."""
    ours, theirs = _rnns(dims, device)
    forward = torch.compile(
        lambda x, h: ours(x, h), fullgraph=True, backend="eager" if device == "cpu" else "inductor"
    )

    def run(model: Any, x: Any, h: Any) -> Any:
        return forward(x, h) if model is ours else model(x, h)

    x = torch.randn(dims.T, dims.B, 48)
    return _compare(ours, theirs, run, x, _states(dims, 1))


def char_rnn_step(dims: Dims, device: str) -> Errors:
    """Loss, gradients, clipping and one step of SGD of ``fastrnn.torch.CharRNN``."""
    torch.manual_seed(0)
    ours = fastrnn.torch.CharRNN(dims.V, dims.H)
    rnn, linear = nn.RNN(dims.V, dims.H), nn.Linear(dims.H, dims.V)
    rnn.load_state_dict({k[4:]: v for k, v in ours.state_dict().items() if k.startswith("rnn.")})
    linear.load_state_dict(copy.deepcopy(ours.linear.state_dict()))
    ours, rnn, linear = ours.to(device), rnn.double(), linear.double()
    tokens = torch.randint(dims.V, (dims.T + 1, dims.B))
    x, y = tokens[:-1], tokens[1:]
    logits, _ = ours(x.to(device))
    loss = fastrnn.torch.cross_entropy(logits, y.to(device))
    loss.backward()
    norm = fastrnn.torch.clip_grad_norm_(ours.parameters(), 0.01)
    hidden, _ = rnn(functional.one_hot(x, dims.V).double())
    want = functional.cross_entropy(linear(hidden).flatten(0, 1), y.flatten())
    want.backward()
    rnn.bias_hh_l0.grad = None  # CharRNN does not train it
    theirs = [*rnn.parameters(), *linear.parameters()]
    # nn.utils.clip_grad_norm_ divides by the norm and 1e-6 more.
    grads = [p.grad for p in theirs if p.grad is not None]
    length = torch.cat([g.flatten() for g in grads]).norm()
    for g in grads:
        g.mul_(min(1.0, 0.01 / length.item()))
    found = {"loss": error(loss, want), "norm": error(norm, length)}
    named = {f"rnn.{n}": p for n, p in rnn.named_parameters()}
    named |= {f"linear.{n}": p for n, p in linear.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            found[f"d{name}"] = error(parameter.grad, named[name].grad)
    return found


def _op_problem(dims: Dims) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    T, B, H, V = dims.T, dims.B, dims.H, dims.V

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {
        "tokens": rng.integers(0, V, (T, B)).astype(np.int32),
        "W_xh": normal(V, H, scale=0.5), "b_h": normal(H, scale=0.1), "h0": normal(B, H, scale=0.5),
        "W_hh": normal(H, H, scale=H**-0.5), "dh": normal(T, B, H), "logits": normal(T, B, V),
    }  # fmt: skip


def _ops(dims: Dims, to_device: Callable[[Any], Any], to_host: Callable[[Any], Any]) -> Errors:
    """The public ops in the order of a step, against float64."""
    p = _op_problem(dims)
    d = {name: to_device(array) for name, array in p.items()}
    w = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in p.items()}
    z = ops.gather(d["W_xh"], d["tokens"], d["b_h"])
    h = ops.recurrence(z, d["W_hh"], d["h0"])
    dz, dW_hh, dh0 = ops.recurrence_backward(d["dh"], h, d["W_hh"], d["h0"])
    dW_xh, db_h = ops.gather_backward(dz, d["tokens"], dims.V)
    loss, dlogits = ops.cross_entropy(d["logits"], d["tokens"])
    grads = [dW_xh, dW_hh, db_h]
    norm = ops.clip_by_global_norm(grads, 0.01)

    states = hidden_states(w["W_xh"][w["tokens"]] + w["b_h"], w["W_hh"], w["h0"])
    want = {"h": states, **bptt(w["dh"], states, w["W_hh"], w["h0"])}
    want |= {"dW_xh": np.zeros_like(w["W_xh"]), "db_h": want["dz"].sum(axis=(0, 1))}
    np.add.at(want["dW_xh"], w["tokens"], want["dz"])
    clipped = {name: want[name] for name in ("dW_xh", "dW_hh", "db_h")}
    want["norm"] = np.float64(reference.clip_by_global_norm(clipped, 0.01))
    losses, dlogits_want = softmax_loss(
        w["logits"].reshape(-1, dims.V), w["tokens"].ravel(), dims.T * dims.B
    )
    want |= {"loss": losses.mean(), "dlogits": dlogits_want.reshape(w["logits"].shape)}
    got = {
        "h": h, "dz": dz, "dW_hh": dW_hh, "dh0": dh0, "dW_xh": dW_xh, "db_h": db_h, "loss": loss,
        "dlogits": dlogits, "norm": norm,
    }  # fmt: skip
    return {name: relative_rms(to_host(array), want[name]) for name, array in got.items()}


def ops_on_device_arrays(dims: Dims, device: str) -> Errors:
    """``fastrnn.ops`` on CuPy arrays, on a stream of the caller's."""
    if device == "cpu":
        return _ops(dims, np.array, np.asarray)
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        found = _ops(dims, cupy.asarray, cupy.asnumpy)
    stream.synchronize()
    return found


def ops_on_tensors(dims: Dims, device: str) -> Errors:
    """``fastrnn.ops`` on torch tensors, on a stream of the caller's."""
    stream: Any = contextlib.nullcontext()
    if device != "cpu":
        stream = torch.cuda.stream(torch.cuda.Stream())
    with stream:
        return _ops(
            dims,
            lambda a: torch.as_tensor(a).to(device),
            lambda t: torch.as_tensor(t).cpu().numpy(),
        )


CASES: dict[str, Callable[[Dims, str], Errors]] = {
    "RNN": rnn,
    "RNN stacked": stacked,
    "RNN packed": packed,
    "RNN compiled": compiled,
    "CharRNN step": char_rnn_step,
    "ops on device arrays": ops_on_device_arrays,
    "ops on tensors": ops_on_tensors,
}
