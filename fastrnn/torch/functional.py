"""The ops as torch operators, with shapes for the compiler, gradients, and gradients of those.

    fastrnn::gather             fastrnn::recurrence             fastrnn::cross_entropy
    fastrnn::gather_backward    fastrnn::recurrence_backward    fastrnn::clip_by_global_norm_
                                fastrnn::layer

Each is registered with torch's ``custom_op``: what is called on real tensors, a fake for
meta and fake tensors, a formula for autograd, a rule for ``vmap``. T time steps, B batch, H hidden
units, V vocabulary, as everywhere in the project.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from fastrnn import ops
from fastrnn.backend import Backend, BackendUnavailableError, open_backend

# --- For the user ----------------------------------------------------------------------------


def gather(W_xh: Tensor, tokens: Tensor, b_h: Tensor) -> Tensor:
    """Rows of ``W_xh`` by token, plus the bias: what ``onehot(tokens) W_xh + b_h`` is.

    The gradient of ``W_xh`` is dense, a scatter-add that is the same to the bit in every run.

    Args:
        W_xh: ``[V, H]``, float32 or float64. tokens: int32 or int64 ``[T, B]``, in ``[0, V)``.
        b_h: ``[H]``.

    Returns:
        z ``[T, B, H]``.

    Raises:
        TypeError: a dtype or device that does not fit. ValueError: a shape, or a token out of range
            (the check makes the host wait for a GPU).
    """
    W_xh, b_h = _as_without_autocast(W_xh, b_h)
    return _gather(W_xh, tokens, b_h)


def recurrence(z: Tensor, W_hh: Tensor, h0: Tensor) -> Tensor:
    """The fused tanh-matmul recurrence ``h_t = tanh(z_t + h_{t-1} W_hh)`` (Elman 1990).

    Args:
        z: ``[T, B, H]``, float32 or float64. W_hh: ``[H, H]``; for a weight of ``torch.nn.RNN`` it
            is ``weight_hh.t()``, which is not copied. h0: ``[B, H]``.

    Returns:
        h ``[T, B, H]``.

    Raises:
        TypeError: a dtype or device that does not fit. ValueError: a shape.
    """
    z, W_hh, h0 = _as_without_autocast(z, W_hh, h0)
    return _recurrence(z, W_hh, h0)


def layer(x: Tensor, W_xh: Tensor, bias: Tensor | None, W_hh: Tensor, h0: Tensor) -> Tensor:
    """One layer of an RNN: ``h_t = tanh(x_t W_xh + bias + h_{t-1} W_hh)``.

    Args:
        x: ``[T, B, I]``. W_xh: ``[I, H]``. bias: ``[H]`` or None. W_hh: ``[H, H]``. h0: ``[B, H]``.

    Returns:
        h ``[T, B, H]``.
    """
    return _layer(x, W_xh, bias, W_hh, h0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy from logits in nats; loss and gradient are made in one pass.

    As ``torch.nn.functional.cross_entropy`` on ``logits.flatten(0, -2), targets.flatten()``, with
    no weights, no smoothing and no ignored targets.

    Args:
        logits: ``[..., V]``, float32 or float64. targets: int32 or int64 ``[...]``, in ``[0, V)``.

    Returns:
        The loss, shape ``()``.

    Raises:
        TypeError: a dtype or device that does not fit. ValueError: a shape, no targets at all, or a
            target out of range (the check makes the host wait for a GPU).
    """
    (logits,) = _as_without_autocast(logits)
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without its last axis, "
            f"got logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        )
    rows = logits.reshape(targets.numel(), logits.shape[-1])
    loss, _ = _cross_entropy(rows, targets.reshape(-1))
    return loss


@torch.no_grad()  # type: ignore[untyped-decorator]
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of ``parameters`` in place by ``min(1, max_norm / norm)``.

    As ``torch.nn.utils.clip_grad_norm_``, which adds 1e-6 to the norm; here a gradient longer than
    ``max_norm`` has that very length afterwards (Pascanu et al. 2013). The host never reads the
    norm, but for ``error_if_nonfinite``. Gradients whose norm is NaN are left as they are.

    Args:
        parameters: tensors, or one, those without a gradient are passed over.
        max_norm: the longest norm allowed. norm_type: of the p-norm; ``float("inf")`` for the
            largest element. foreach: taken and ignored, for the signature's sake.
        error_if_nonfinite: raise if the norm is NaN or infinite.

    Returns:
        The norm of all gradients as one vector before scaling, shape ``()``; 0 without gradients.

    Raises:
        RuntimeError: as ``error_if_nonfinite`` says; nothing has been scaled then.
    """
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in tensors if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    max_norm, norm_type = float(max_norm), float(norm_type)
    if norm_type == 2.0 and max_norm > 0 and not error_if_nonfinite and _clippable(grads):
        return _clip_by_global_norm(grads, max_norm)
    device = grads[0].device
    norms = [torch.linalg.vector_norm(g, norm_type).to(device) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {norm.item()}, and "
            "error_if_nonfinite=True does not allow to clip by it"
        )
    factor = max_norm / norm
    factor = torch.where(factor < 1, factor, 1.0)
    for g in grads:
        g.mul_(factor.to(g.device))
    return norm


# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCAST = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)
)


def autocasting(tensor: Tensor) -> bool:
    """Whether ``torch.autocast`` is in force for the tensor's device."""
    kind = tensor.device.type
    return kind in _AUTOCAST and bool(torch.is_autocast_enabled(kind))


def _as_without_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half precision that autocast made, back in float32; anything else as it is."""
    if not autocasting(tensors[0]):
        return tensors
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in half else t for t in tensors)


def _clippable(grads: list[Tensor]) -> bool:
    """Whether the backends take these gradients: one kind, and each a dense block of memory."""
    first = grads[0]
    return (
        first.dtype in DTYPES
        and first.device.type in ("cpu", "cuda")
        and all(
            g.dtype == first.dtype
            and g.device == first.device
            and g.layout == torch.strided
            and _block(g).is_contiguous()
            for g in grads
        )
    )


def _block(grad: Tensor) -> Tensor:
    """The same memory in C order, for a matrix that may be the transpose of one in C order."""
    return grad.t() if grad.dim() == 2 and not grad.is_contiguous() else grad


# --- Backends --------------------------------------------------------------------------------


def _cpu_backend() -> Backend:
    """The backend for CPU tensors, on as many threads as torch has now."""
    return _open(os.environ.get("FASTRNN_BACKEND", ""), torch.get_num_threads())


@functools.cache
def _open(override: str, threads: int) -> Backend:
    if override == "numpy":
        return open_backend("numpy")
    try:
        open_backend("numba")
    except BackendUnavailableError:
        return open_backend("numpy")
    from fastrnn.torch.cpu import TorchNumbaBackend

    return TorchNumbaBackend(threads)


def _array(tensor: Tensor) -> Any:
    """A CPU tensor as a NumPy array in C order."""
    return tensor.detach().contiguous().numpy()


def _matrix(tensor: Tensor) -> Any:
    """A matrix on the CPU as a NumPy array, in C or in Fortran order."""
    tensor = tensor.detach()
    return tensor.numpy() if tensor.t().is_contiguous() else tensor.contiguous().numpy()


def _tokens(name: str, tokens: Tensor, V: int) -> Any:
    """Token ids on the CPU as an int32 array, all of them in range."""
    ids = _array(tokens)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= V:
        raise ValueError(f"{name} must be in [0, V) with V = {V}, got {low if low < 0 else high}")
    return ids.astype(np.int32, copy=False)


# --- Checks: on fake tensors too -------------------------------------------------------------

DTYPES = (torch.float32, torch.float64)


def _alike(first: Tensor, *others: Tensor) -> bool:
    """One of the two dtypes and one device for all."""
    dtype, device = first.dtype, first.device
    return dtype in DTYPES and all(t.dtype == dtype and t.device == device for t in others)


def _check_floats(**tensors: Tensor) -> None:
    """Raise unless all are alike."""
    (first_name, first), *others = tensors.items()
    if first.dtype not in DTYPES:
        raise TypeError(f"{first_name} must be float32 or float64, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} like {first_name}, got {tensor.dtype}")
    _check_device(first_name, first, **dict(others))


def _check_device(first_name: str, first: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise TypeError(
                f"{name} must be on {first.device} like {first_name}, got one on {tensor.device}"
            )


def _check_ids(name: str, ids: Tensor, beside: str, first: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    _check_device(beside, first, **{name: ids})


def _check_shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """None is any size."""
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("n" if want is None else str(want) for want in expected)
        wanted += "," * (len(expected) == 1)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def _check_gather(W_xh: Tensor, tokens: Tensor, b_h: Tensor) -> None:
    _check_floats(W_xh=W_xh, b_h=b_h)
    _check_ids("tokens", tokens, "W_xh", W_xh)
    _check_shape("W_xh", W_xh, None, None)
    _check_shape("tokens", tokens, None, None)
    _check_shape("b_h", b_h, W_xh.shape[1])


def _check_recurrence(z: Tensor, W_hh: Tensor, h0: Tensor) -> None:
    if z.dim() == 3 and _alike(z, W_hh, h0):
        _, B, H = z.shape
        if W_hh.shape == (H, H) and h0.shape == (B, H):
            return
    # Something is wrong: what?
    _check_floats(z=z, W_hh=W_hh, h0=h0)
    _check_shape("z", z, None, None, None)
    _, B, H = z.shape
    _check_shape("W_hh", W_hh, H, H)
    _check_shape("h0", h0, B, H)


def _check_recurrence_backward(dh: Tensor, h: Tensor, W_hh: Tensor, h0: Tensor) -> None:
    _check_recurrence(h, W_hh, h0)
    if not (_alike(h, dh) and dh.shape == h.shape):
        _check_floats(h=h, dh=dh)
        _check_shape("dh", dh, *h.shape)


def _check_gather_backward(dz: Tensor, tokens: Tensor) -> None:
    _check_floats(dz=dz)
    _check_ids("tokens", tokens, "dz", dz)
    _check_shape("dz", dz, None, None, None)
    _check_shape("tokens", tokens, *dz.shape[:2])


def _check_layer(x: Tensor, W_xh: Tensor, bias: Tensor | None, W_hh: Tensor, h0: Tensor) -> None:
    others = {} if bias is None else {"bias": bias}
    if x.dim() == 3 and W_xh.dim() == 2 and _alike(x, W_xh, W_hh, h0, *others.values()):
        (_, B, features), H = x.shape, W_xh.shape[1]
        fits = W_xh.shape == (features, H) and W_hh.shape == (H, H) and h0.shape == (B, H)
        if fits and (bias is None or bias.shape == (H,)):
            return
    # Something is wrong: what?
    _check_floats(x=x, W_xh=W_xh, W_hh=W_hh, hx=h0, **others)
    _check_shape("x", x, None, None, None)
    _check_shape("W_xh", W_xh, x.shape[2], None)
    H = W_xh.shape[1]
    _check_shape("W_hh", W_hh, H, H)
    _check_shape("hx", h0, x.shape[1], H)
    if bias is not None:
        _check_shape("bias", bias, H)


def _check_cross_entropy(logits: Tensor, targets: Tensor) -> None:
    _check_floats(logits=logits)
    _check_ids("targets", targets, "logits", logits)
    _check_shape("logits", logits, None, None)
    _check_shape("targets", targets, logits.shape[0])
    if len(logits) == 0:
        raise ValueError(f"logits must have at least one row, got shape {tuple(logits.shape)}")
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")


# --- gather ----------------------------------------------------------------------------------


def _gather_real(W_xh: Tensor, tokens: Tensor, b_h: Tensor) -> Tensor:
    _check_gather(W_xh, tokens, b_h)
    if tokens.numel() == 0:
        return _gather_fake(W_xh, tokens, b_h)
    if W_xh.device.type != "cpu":
        return ops.gather(W_xh.detach(), tokens, b_h.detach())
    ids = _tokens("tokens", tokens, W_xh.shape[0])
    return torch.from_numpy(_cpu_backend().gather(_array(W_xh), ids, _array(b_h)))


def _gather_fake(W_xh: Tensor, tokens: Tensor, b_h: Tensor) -> Tensor:
    _check_gather(W_xh, tokens, b_h)
    return W_xh.new_empty((*tokens.shape, W_xh.shape[1]))


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    W_xh, tokens, _ = inputs
    ctx.save_for_backward(tokens)
    ctx.V = W_xh.shape[0]


def _gather_formula(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = ctx.saved_tensors
    dW_xh, db_h = _gather_backward(dz, tokens, ctx.V)
    return dW_xh, None, db_h


def _gather_backward_real(dz: Tensor, tokens: Tensor, V: int) -> tuple[Tensor, Tensor]:
    _check_gather_backward(dz, tokens)
    if tokens.numel() == 0:
        return dz.new_zeros((V, dz.shape[2])), dz.new_zeros(dz.shape[2])
    if dz.device.type != "cpu":
        return ops.gather_backward(dz.detach(), tokens, V)
    ids = _tokens("tokens", tokens, V)
    dW_xh, db_h = _cpu_backend().gather_backward(_array(dz), ids, V)
    return torch.from_numpy(dW_xh), torch.from_numpy(db_h)


def _gather_backward_fake(dz: Tensor, tokens: Tensor, V: int) -> tuple[Tensor, Tensor]:
    _check_gather_backward(dz, tokens)
    return dz.new_empty((V, dz.shape[2])), dz.new_empty(dz.shape[2])


def _gather_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_backward_formula(ctx: Any, d_dW: Tensor, d_db: Tensor) -> tuple[Tensor | None, ...]:
    # Linear in dz, so its transpose is the gather again.
    return _gather(d_dW, ctx.saved_tensors[0], d_db), None, None


# --- recurrence ------------------------------------------------------------------------------


def _recurrence_real(z: Tensor, W_hh: Tensor, h0: Tensor) -> Tensor:
    _check_recurrence(z, W_hh, h0)
    if z.numel() == 0:
        return z.new_empty(z.shape)
    if z.device.type != "cpu":
        return ops.recurrence(z.detach(), W_hh.detach(), h0.detach())
    h = torch.empty_like(z, memory_format=torch.contiguous_format)
    _cpu_backend().recurrence(_array(z), _matrix(W_hh), _array(h0), out=h.numpy())
    return h


def _recurrence_fake(z: Tensor, W_hh: Tensor, h0: Tensor) -> Tensor:
    _check_recurrence(z, W_hh, h0)
    return z.new_empty(z.shape)


def _recurrence_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, W_hh, h0 = inputs
    ctx.save_for_backward(output, W_hh, h0)


def _recurrence_formula(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    h, W_hh, h0 = ctx.saved_tensors
    need_dW = ctx.needs_input_grad[1]
    dz, dW_hh, dh0 = _recurrence_backward(dh, h, W_hh, h0, need_dW)
    return dz, dW_hh if need_dW else None, dh0


def _recurrence_backward_real(
    dh: Tensor, h: Tensor, W_hh: Tensor, h0: Tensor, need_dW: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``dW_hh`` lies in memory as ``W_hh`` does; without ``need_dW`` it has no elements."""
    _check_recurrence_backward(dh, h, W_hh, h0)
    dW_hh = torch.empty_like(W_hh) if need_dW else W_hh.new_empty(0)
    if h.numel() == 0:
        return torch.zeros_like(dh), dW_hh.zero_(), torch.zeros_like(h0)
    if h.device.type != "cpu":
        arguments = (t.detach() for t in (dh, h, W_hh, h0))
        dz, dW, dh0 = ops.recurrence_backward(*arguments)
        return dz, dW_hh.copy_(dW) if need_dW else dW_hh, dh0
    backend, arrays = _cpu_backend(), (_array(dh), _array(h), _matrix(W_hh), _array(h0))
    if backend.name != "numba":
        dz, dW, dh0 = map(torch.from_numpy, backend.recurrence_backward(*arrays))
        return dz, dW_hh.copy_(dW) if need_dW else dW_hh, dh0
    dz, dh0 = torch.empty_like(dh, memory_format=torch.contiguous_format), h0.new_empty(h0.shape)
    backend.recurrence_backward(*arrays, out=(dz.numpy(), None, dh0.numpy()))
    if need_dW:
        # A plain product, which torch's BLAS does best, into the memory layout of W_hh.
        H = h.shape[2]
        before, after = h[:-1].reshape(-1, H), dz[1:].reshape(-1, H)
        torch.mm(before.t(), after, out=dW_hh)
        dW_hh.addmm_(h0.t(), dz[0])
    return dz, dW_hh, dh0


def _recurrence_backward_fake(
    dh: Tensor, h: Tensor, W_hh: Tensor, h0: Tensor, need_dW: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_recurrence_backward(dh, h, W_hh, h0)
    dW_hh = torch.empty_like(W_hh) if need_dW else W_hh.new_empty(0)
    return dh.new_empty(dh.shape), dW_hh, h0.new_empty(h0.shape)


def _recurrence_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dh, h, W_hh, h0, ctx.need_dW = inputs
    ctx.save_for_backward(dh, h, W_hh, h0, output[0])


def _recurrence_backward_formula(
    ctx: Any, d_dz: Tensor, d_dW: Tensor, d_dh0: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient of back-propagation through time: forward through time, in torch's own ops.

    ``a_t = dh_t + dz_{t+1} W_hhᵀ``, ``dz_t = a_t (1 - h_t²)``, ``dW_hh = Σ h_{t-1}ᵀ dz_t``.
    """
    dh, h, W_hh, h0, dz = ctx.saved_tensors
    if h.numel() == 0:
        return (*(torch.zeros_like(t) for t in (dh, h, W_hh, h0)), None)
    slope, previous = 1 - h * h, torch.cat([h0[None], h[:-1]])
    d_dz = d_dz + previous @ d_dW if ctx.need_dW else d_dz
    onward, d_a, total = [d_dh0], [], []
    for d_dz_t, slope_t in zip(d_dz.unbind(), slope.unbind(), strict=True):
        # dz_t goes into the results, and through W_hhᵀ into a_{t-1}, or into dh0.
        total.append(d_dz_t + onward[-1] @ W_hh)
        d_a.append(total[-1] * slope_t)
        onward.append(d_a[-1])
    a = torch.cat([dh[:-1] + dz[1:] @ W_hh.t(), dh[-1:]])
    d_h = -2 * h * a * torch.stack(total)
    d_h0 = torch.zeros_like(h0)
    if ctx.need_dW:
        to_previous = dz @ d_dW.t()
        d_h = d_h + torch.cat([to_previous[1:], torch.zeros_like(d_h[:1])])
        d_h0 = to_previous[0]
    H = h.shape[2]
    d_W = torch.stack(onward[:-1]).reshape(-1, H).t() @ dz.reshape(-1, H)
    return torch.stack(d_a), d_h, d_W, d_h0, None


# --- layer -----------------------------------------------------------------------------------


def _layer_real(x: Tensor, W_xh: Tensor, bias: Tensor | None, W_hh: Tensor, h0: Tensor) -> Tensor:
    _check_layer(x, W_xh, bias, W_hh, h0)
    T, B, features = x.shape
    rows = x.reshape(-1, features)
    z = torch.mm(rows, W_xh) if bias is None else torch.addmm(bias, rows, W_xh)
    h = z.detach().view(T, B, W_xh.shape[1])
    if h.numel() == 0:
        return h
    # In place: nobody else needs z.
    if h.device.type != "cpu":
        ops.recurrence(h, W_hh.detach(), h0.detach(), out=h)
    else:
        array = h.numpy()
        _cpu_backend().recurrence(array, _matrix(W_hh), _array(h0), out=array)
    return h


def _layer_fake(x: Tensor, W_xh: Tensor, bias: Tensor | None, W_hh: Tensor, h0: Tensor) -> Tensor:
    _check_layer(x, W_xh, bias, W_hh, h0)
    return x.new_empty((*x.shape[:2], W_xh.shape[1]))


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, W_xh, _, W_hh, h0 = inputs
    ctx.save_for_backward(x, W_xh, W_hh, h0, output)


def _layer_formula(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    x, W_xh, W_hh, h0, h = ctx.saved_tensors
    need_dx, need_dW_xh, need_db, need_dW, _ = ctx.needs_input_grad
    dz, dW_hh, dh0 = _recurrence_backward(dh, h, W_hh, h0, need_dW)
    rows = dz.reshape(-1, dz.shape[2])
    return (
        (rows @ W_xh.t()).view(x.shape) if need_dx else None,
        # The product whose transpose lies in memory as the weight of torch does.
        (rows.t() @ x.reshape(-1, x.shape[2])).t() if need_dW_xh else None,
        rows.sum(0) if need_db else None,
        dW_hh if need_dW else None,
        dh0,
    )


# --- cross_entropy ---------------------------------------------------------------------------


def _cross_entropy_real(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _check_cross_entropy(logits, targets)
    if logits.device.type != "cpu":
        loss, dlogits = ops.cross_entropy(logits.detach()[None], targets[None])
        return loss, dlogits[0]
    ids = _tokens("targets", targets, logits.shape[1])
    loss, dlogits = _cpu_backend().cross_entropy(_array(logits)[None], ids[None])
    return torch.from_numpy(loss), torch.from_numpy(dlogits[0])


def _cross_entropy_fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _check_cross_entropy(logits, targets)
    return logits.new_empty(()), logits.new_empty(logits.shape)


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _cross_entropy_formula(
    ctx: Any, d_loss: Tensor | None, d_dlogits: Tensor | None
) -> tuple[Tensor | None, None]:
    targets, dlogits = ctx.saved_tensors
    d_logits = None if d_loss is None else dlogits * d_loss
    if d_dlogits is not None:  # somebody differentiates the gradient
        n = len(dlogits)
        hit = torch.nn.functional.one_hot(targets.long(), dlogits.shape[1])
        p = dlogits * n + hit
        back = p * (d_dlogits - (p * d_dlogits).sum(-1, keepdim=True)) / n
        d_logits = back if d_logits is None else d_logits + back
    return d_logits, None


# --- clip_by_global_norm_ --------------------------------------------------------------------


def _clip_real(grads: list[Tensor], max_norm: float) -> Tensor:
    blocks = [_block(g).detach() for g in grads]
    if blocks[0].device.type != "cpu":
        return ops.clip_by_global_norm(blocks, max_norm)
    arrays = [b.numpy() for b in blocks]
    return torch.from_numpy(_cpu_backend().clip_by_global_norm(arrays, max_norm))


def _clip_fake(grads: list[Tensor], max_norm: float) -> Tensor:
    return grads[0].new_empty(())


# --- Registration ----------------------------------------------------------------------------


class _Op:
    """A registered operator, and the same as an ``autograd.Function``.

    The function serves ``torch.func.grad`` and its like, in which the autograd of custom operators
    does not take part, and plain tensors on the CPU, for which the dispatcher only costs time.
    """

    def __init__(
        self,
        schema: str,
        real: Any,
        fake: Any,
        setup: Any = None,
        formula: Any = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        name = schema.partition("(")[0]
        self.name = f"fastrnn::{name}"
        self.custom_op = library.custom_op(
            self.name, real, mutates_args=mutates, schema=schema.removeprefix(name)
        )
        self.custom_op.register_fake(fake)
        self.real = None
        if formula is None:
            return
        self.custom_op.register_autograd(formula, setup_context=setup)
        self.custom_op.register_vmap(self._one_by_one)
        self.real = real
        members = {
            "forward": lambda *arguments: self(*arguments),
            "setup_context": setup,
            "backward": formula,
            "vmap": self._one_by_one,
        }
        self.function = _function(name, members)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = real(*arguments)
            setup(ctx, arguments, output)
            return output

        self.plain_function = _function(name, {"forward": forward, "backward": formula})

    def __call__(self, *arguments: Any) -> Any:
        if self.real is None or torch.compiler.is_compiling():
            return self.custom_op(*arguments)
        if torch._C._are_functorch_transforms_active():
            return self.function.apply(*arguments)
        if forward_ad._current_level >= 0:
            duals = (forward_ad.unpack_dual(a) for a in arguments if isinstance(a, Tensor))
            if any(dual.tangent is not None for dual in duals):
                raise NotImplementedError(f"{self.name} has no derivative in forward mode")
        if not _all_plain(arguments):
            return self.custom_op(*arguments)
        recorded = (isinstance(a, Tensor) and a.requires_grad for a in arguments)
        if torch.is_grad_enabled() and any(recorded):
            return self.plain_function.apply(*arguments)
        return self.real(*arguments)

    def _one_by_one(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """The rule of ``vmap``: one call an element, the results stacked."""
        results = []
        for i in range(info.batch_size):
            chosen = (
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, in_dims, strict=True)
            )
            results.append(self(*chosen))
        if not isinstance(results[0], tuple):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)


def _function(name: str, members: dict[str, Any]) -> Any:
    static = {key: staticmethod(member) for key, member in members.items()}
    return type(name, (torch.autograd.Function,), static)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _all_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd has to see a call: tensors on the CPU, no mode, no tracer."""
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return False
    for a in arguments:
        if isinstance(a, Tensor) and not (type(a) in _PLAIN_TYPES and a.is_cpu):
            return False
    return True


_gather = _Op(
    "gather(Tensor W_xh, Tensor tokens, Tensor b_h) -> Tensor",
    _gather_real,
    _gather_fake,
    _gather_setup,
    _gather_formula,
)
_gather_backward = _Op(
    "gather_backward(Tensor dz, Tensor tokens, SymInt V) -> (Tensor, Tensor)",
    _gather_backward_real,
    _gather_backward_fake,
    _gather_backward_setup,
    _gather_backward_formula,
)
_recurrence = _Op(
    "recurrence(Tensor z, Tensor W_hh, Tensor h0) -> Tensor",
    _recurrence_real,
    _recurrence_fake,
    _recurrence_setup,
    _recurrence_formula,
)
_recurrence_backward = _Op(
    "recurrence_backward(Tensor dh, Tensor h, Tensor W_hh, Tensor h0, bool need_dW)"
    " -> (Tensor, Tensor, Tensor)",
    _recurrence_backward_real,
    _recurrence_backward_fake,
    _recurrence_backward_setup,
    _recurrence_backward_formula,
)
_layer = _Op(
    "layer(Tensor x, Tensor W_xh, Tensor? bias, Tensor W_hh, Tensor h0) -> Tensor",
    _layer_real,
    _layer_fake,
    _layer_setup,
    _layer_formula,
)
_cross_entropy = _Op(
    "cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    _cross_entropy_real,
    _cross_entropy_fake,
    _cross_entropy_setup,
    _cross_entropy_formula,
)
_clip_by_global_norm = _Op(
    "clip_by_global_norm_(Tensor(a!)[] grads, float max_norm) -> Tensor",
    _clip_real,
    _clip_fake,
    mutates=("grads",),
)
