"""The operators of ``fastrnn.torch``: registration, gradients to second order, checks, devices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrnn.backend import BackendUnavailableError, open_backend
from tests.conftest import MISSING
from tests.tolerances import assert_close, relative_rms

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import library  # noqa: E402

import fastrnn.torch  # noqa: E402
from fastrnn.torch import functional  # noqa: E402

F = torch.nn.functional
T, B, H, V = 3, 2, 4, 5


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float64, grad: bool = True) -> Any:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=rng, dtype=dtype).requires_grad_(grad)


def ids(*shape: int, dtype: Any = torch.int64) -> Any:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gather": lambda: (normal(V, H), ids(T, B), normal(H)),
    "gather_backward": lambda: (normal(T, B, H), ids(T, B), V),
    "recurrence": lambda: (normal(T, B, H), normal(H, H), normal(B, H)),
    "recurrence_backward": lambda: (
        normal(T, B, H),
        normal(T, B, H, seed=1),
        normal(H, H).t(),
        normal(B, H),
        True,
    ),
    "layer": lambda: (normal(T, B, 3), normal(3, H), normal(H), normal(H, H), normal(B, H)),
    "cross_entropy": lambda: (normal(6, V), ids(6)),
    "clip_by_global_norm": lambda: ([normal(3, 2, grad=False), normal(4, grad=False)], 0.5),
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_registration_passes_torchs_own_check(op: str) -> None:
    """Schema, autograd registration, fake against real, and AOT dispatch with dynamic shapes."""
    checked = library.opcheck(getattr(functional, f"_{op}").custom_op, ARGUMENTS[op]())
    assert set(checked.values()) == {"SUCCESS"}
    assert len(checked) >= 4


@pytest.mark.parametrize("op", [op for op in ARGUMENTS if op != "clip_by_global_norm"])
def test_gradients_of_first_and_second_order(op: str) -> None:
    arguments = ARGUMENTS[op]()
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]

    def call(*tensors: Any) -> Any:
        given = iter(tensors)
        return getattr(functional, f"_{op}")(
            *(next(given) if any(a is x for x in leaves) else a for a in arguments)
        )

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_second_order_without_the_weights_gradient() -> None:
    z, W_hh, h0 = ARGUMENTS["recurrence"]()
    W_hh = W_hh.detach()
    for T_ in (1, 3):
        leaves = (z[:T_], h0)
        assert torch.autograd.gradgradcheck(
            lambda z, h: fastrnn.torch.recurrence(z, W_hh, h), leaves
        )


def test_third_order() -> None:
    z, W_hh, h0 = ARGUMENTS["recurrence"]()

    def plain(z: Any, W: Any, h: Any) -> Any:
        states = []
        for z_t in z:
            h = torch.tanh(z_t + h @ W)
            states.append(h)
        return torch.stack(states)

    found = []
    for function in (fastrnn.torch.recurrence, plain):
        value = function(z, W_hh, h0).square().sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, [z, W_hh, h0], create_graph=True)
            value = sum(g.sin().sum() for g in gradients)
        found.append(value.item())
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["C order", "Fortran order"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 33), (9, 3, 130), (4, 40, 64)], ids=str)
def test_recurrence_against_plain_torch(shape: Any, turned: bool, dtype: Any) -> None:
    T, B, H = shape
    W_hh = normal(H, H, grad=False) * H**-0.5
    leaves = [normal(T, B, H), W_hh.t() if turned else W_hh, normal(B, H, seed=3)]
    leaves = [a.detach().requires_grad_() for a in leaves]
    z, W, h = leaves
    states = []
    for z_t in z:
        h = torch.tanh(z_t + h @ W)
        states.append(h)
    want = torch.stack(states)
    weights = normal(T, B, H, seed=4, grad=False)
    gradients = torch.autograd.grad(want, leaves, weights)
    ours = [a.detach().to(dtype).requires_grad_() for a in leaves]
    got = fastrnn.torch.recurrence(*ours)
    assert_close("recurrence", got.detach(), want.detach())
    found = torch.autograd.grad(got, ours, weights.to(dtype))
    for name, a, b in zip(("dz", "dW_hh", "dh0"), found, gradients, strict=True):
        assert_close("recurrence_backward", a, b, name)
    assert found[1].stride() == ours[1].stride()  # so that .grad takes it without a copy


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_gather_is_an_embedding(T: int, B: int, H: int, wide: bool) -> None:
    W, b = normal(V, H), normal(H)
    tokens = ids(T, B, dtype=torch.int64 if wide else torch.int32)
    got = fastrnn.torch.gather(W, tokens, b)
    want = F.embedding(tokens, W) + b
    torch.testing.assert_close(got, want)
    weights = normal(T, B, H, seed=2, grad=False)
    for a, e in zip(
        torch.autograd.grad(got, [W, b], weights),
        torch.autograd.grad(want, [W, b], weights),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()], ids=str)
def test_cross_entropy_is_torchs(shape: tuple[int, ...]) -> None:
    logits, targets = normal(*shape, V), ids(*shape)
    loss = fastrnn.torch.cross_entropy(logits, targets)
    want = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))
    assert loss.shape == ()
    torch.testing.assert_close(loss, want)
    (got,), (expected,) = (torch.autograd.grad(3 * x, logits) for x in (loss, want))
    torch.testing.assert_close(got, expected)


def test_empty_batches_of_every_op() -> None:
    z = fastrnn.torch.gather(normal(V, H), ids(T, 0), normal(H))
    h = fastrnn.torch.recurrence(z, normal(H, H), normal(0, H))
    assert h.shape == (T, 0, H)
    leaves = [normal(V, H), normal(H), normal(H, H), normal(0, H)]
    z = fastrnn.torch.gather(leaves[0], ids(T, 0), leaves[1])
    h = fastrnn.torch.recurrence(z, *leaves[2:])
    first = torch.autograd.grad(h.sum(), leaves, create_graph=True)
    assert [g.abs().sum().item() for g in first] == [0.0] * 4
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves, allow_unused=True)
    assert all(g is None or not g.any() for g in second)


# --- clip_grad_norm_ --------------------------------------------------------------------------


def parameters(*shapes: tuple[int, ...], dtype: Any = torch.float32, scale: float = 1.0) -> Any:
    made = []
    for i, shape in enumerate(shapes):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = scale * normal(*shape, seed=i, dtype=dtype, grad=False)
        made.append(p)
    return made


def global_norm(params: Any) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["short", "long"])
def test_clip_has_no_epsilon(dtype: Any, norm_type: float, scale: float) -> None:
    params = parameters((300, 200), (7,), (3, 5), dtype=dtype, scale=scale)
    params.append(torch.nn.Parameter(torch.zeros(3)))  # without a gradient
    before = [p.grad.clone() for p in params[:3]]
    flat = torch.cat([g.double().flatten() for g in before])
    want = torch.linalg.vector_norm(flat, norm_type).item()
    max_norm = 40.0
    norm = fastrnn.torch.clip_grad_norm_(iter(params), max_norm, norm_type)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert norm.shape == ()
    assert norm.item() == pytest.approx(want, rel=limit)
    factor = min(1.0, max_norm / want)
    for p, g in zip(params, before, strict=False):
        assert relative_rms(p.grad.double(), g.double() * factor) <= limit
    if factor == 1.0:
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=False))


def test_clip_lands_on_the_threshold_where_torch_falls_short() -> None:
    ours, theirs = (parameters((5, 4), dtype=torch.float64, scale=1e-6) for _ in range(2))
    fastrnn.torch.clip_grad_norm_(ours, 1e-7)
    torch.nn.utils.clip_grad_norm_(theirs, 1e-7)
    assert global_norm(ours) == pytest.approx(1e-7, rel=1e-12)
    assert global_norm(theirs) < 0.9e-7  # the wrong twin: an epsilon of 1e-6


def test_clip_takes_any_memory_layout() -> None:
    layouts: dict[Any, Callable[[Any], Any]] = {
        (4, 1): lambda g: g,
        (1, 6): lambda g: g.t().contiguous().t(),
        (8, 2): lambda g: torch.stack([g, g], -1)[..., 0],
    }
    for stride, layout in layouts.items():
        params = parameters((6, 4))
        params[0].grad = layout(params[0].grad)
        assert params[0].grad.stride() == stride
        before, norm = params[0].grad.clone(), global_norm(params)
        got = fastrnn.torch.clip_grad_norm_(params[0], 0.5)
        assert got.item() == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(params[0].grad, before * (0.5 / norm))


def test_clip_of_mixed_dtypes_goes_through_torch() -> None:
    params = parameters((4, 3)) + parameters((5,), dtype=torch.float64)
    norm = global_norm(params)
    fastrnn.torch.clip_grad_norm_(params, 0.5)
    assert norm > 0.5
    assert global_norm(params) == pytest.approx(0.5, rel=1e-6)


def test_clip_edges() -> None:
    assert fastrnn.torch.clip_grad_norm_([], 1.0).item() == 0.0
    assert fastrnn.torch.clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
    zero = parameters((3,), scale=0.0)
    assert fastrnn.torch.clip_grad_norm_(zero, 1.0).item() == 0.0
    assert not zero[0].grad.any()
    for norm_type in (2.0, 1.0):
        (p,) = parameters((3,))
        p.grad[1] = math.nan
        before = p.grad.clone()
        assert math.isnan(fastrnn.torch.clip_grad_norm_(p, 0.1, norm_type).item())
        torch.testing.assert_close(p.grad, before, equal_nan=True)
        with pytest.raises(RuntimeError, match=r"norm of order .* is nan"):
            fastrnn.torch.clip_grad_norm_(p, 0.1, norm_type, error_if_nonfinite=True)
        (p,) = parameters((3,))
        fastrnn.torch.clip_grad_norm_(p, 0.0, norm_type, foreach=False)
        assert not p.grad.any()


def test_clip_tells_autograd_that_it_wrote() -> None:
    (p,) = parameters((3,))
    version = p.grad._version
    fastrnn.torch.clip_grad_norm_(p, 0.1)
    assert p.grad._version > version


# --- Checks -----------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    z, W_hh, h0 = ARGUMENTS["recurrence"]()
    recurrence = fastrnn.torch.recurrence
    with pytest.raises(ValueError, match=r"W_hh must have shape \(4, 4\), got \(4, 3\)"):
        recurrence(z, W_hh[:, :3], h0)
    with pytest.raises(ValueError, match=r"z must have shape \(n, n, n\), got \(3, 2\)"):
        recurrence(z[..., 0], W_hh, h0)
    with pytest.raises(ValueError, match=r"h0 must have shape \(2, 4\), got \(4,\)"):
        recurrence(z, W_hh, h0[0])
    with pytest.raises(TypeError, match=r"W_hh must be torch.float64 like z, got torch.float32"):
        recurrence(z, W_hh.float(), h0)
    for dtype in (torch.bfloat16, torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=rf"z must be float32 or float64, got {dtype}"):
            recurrence(z.to(dtype), W_hh.to(dtype), h0.to(dtype))
    with pytest.raises(TypeError, match=r"W_hh must be on cpu like z, got one on meta"):
        recurrence(z, W_hh.to("meta"), h0)
    W_xh, tokens, b_h = ARGUMENTS["gather"]()
    gather = fastrnn.torch.gather
    with pytest.raises(TypeError, match=r"tokens must be int32 or int64, got torch.int16"):
        gather(W_xh, tokens.short(), b_h)
    with pytest.raises(ValueError, match=r"tokens must have shape \(n, n\), got \(3,\)"):
        gather(W_xh, tokens[:, 0], b_h)
    with pytest.raises(ValueError, match=r"b_h must have shape \(4,\), got \(3,\)"):
        gather(W_xh, tokens, b_h[:3])
    for bad in (-1, V, 2**32 + 1):
        tokens[1, 1] = bad
        with pytest.raises(ValueError, match=rf"tokens must be in \[0, V\) with V = 5, got {bad}"):
            gather(W_xh, tokens, b_h)
        with pytest.raises(ValueError, match=rf"targets must be in \[0, V\) .*got {bad}"):
            fastrnn.torch.cross_entropy(normal(T, B, V), tokens)
    with pytest.raises(ValueError, match=r"got logits \(3, 2, 5\) and targets \(3,\)"):
        fastrnn.torch.cross_entropy(normal(T, B, V), ids(T))
    with pytest.raises(ValueError, match=r"at least one class, got shape \(2, 0\)"):
        fastrnn.torch.cross_entropy(torch.zeros(2, 0), ids(2))
    with pytest.raises(ValueError, match="at least one row"):
        fastrnn.torch.cross_entropy(normal(0, V), ids(0))


def test_gradients_that_do_not_fit_are_refused() -> None:
    """What reaches these ops was checked before, unless somebody calls them, or swaps a tensor."""
    dh, h, W_hh, h0, need = ARGUMENTS["recurrence_backward"]()
    backward = torch.ops.fastrnn.recurrence_backward
    with pytest.raises(TypeError, match=r"W_hh must be torch.float64 like z, got torch.float32"):
        backward(dh, h, W_hh.float(), h0, need)
    with pytest.raises(TypeError, match=r"dh must be torch.float64 like h, got torch.float32"):
        backward(dh.float(), h, W_hh, h0, need)
    with pytest.raises(ValueError, match=r"dh must have shape \(3, 2, 4\), got \(2, 2, 4\)"):
        backward(dh[1:], h, W_hh, h0, need)
    dz, tokens, _ = ARGUMENTS["gather_backward"]()
    with pytest.raises(ValueError, match=r"tokens must have shape \(3, 2\), got \(2, 2\)"):
        torch.ops.fastrnn.gather_backward(dz, tokens[1:], V)
    with pytest.raises(ValueError, match=r"targets must have shape \(6,\), got \(5,\)"):
        torch.ops.fastrnn.cross_entropy(normal(6, V), ids(5))
    x, W_xh, bias, W_hh, h0 = ARGUMENTS["layer"]()
    layer = functional.layer
    with pytest.raises(ValueError, match=r"W_xh must have shape \(3, n\), got \(2, 4\)"):
        layer(x, W_xh[1:], bias, W_hh, h0)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        layer(x, W_xh, bias[1:], W_hh, h0)
    with pytest.raises(ValueError, match=r"hx must have shape \(2, 4\), got \(1, 4\)"):
        layer(x, W_xh, None, W_hh, h0[1:])


def test_weights_that_change_their_dtype_before_backward() -> None:
    z, W_hh, h0 = ARGUMENTS["recurrence"]()
    h = fastrnn.torch.recurrence(z, W_hh, h0)
    W_hh.data = W_hh.data.float()
    with pytest.raises(TypeError, match=r"W_hh must be torch.float64"):
        h.sum().backward()


def test_autocast_gives_the_ops_float32() -> None:
    half = [a.detach().bfloat16() for a in ARGUMENTS["recurrence"]()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = fastrnn.torch.recurrence(*half)
        loss = fastrnn.torch.cross_entropy(half[0], ids(T, B).clamp(max=3))
        z = fastrnn.torch.gather(half[1], ids(T, B).clamp(max=3), half[1][0])
    assert h.dtype == loss.dtype == z.dtype == torch.float32
    assert torch.equal(h, fastrnn.torch.recurrence(*(a.float() for a in half)))


# --- Backends and devices ---------------------------------------------------------------------


def test_the_environment_chooses_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "gather": fastrnn.torch.gather,
        "recurrence": fastrnn.torch.recurrence,
        "cross_entropy": fastrnn.torch.cross_entropy,
    }
    found: list[Any] = []
    for name in ("numba", "numpy"):
        monkeypatch.setenv("FASTRNN_BACKEND", name)
        assert functional._cpu_backend().name == name
        found.append([])
        for op, call in calls.items():
            arguments = ARGUMENTS[op]()
            leaves = [a for a in arguments if a.requires_grad]
            result = call(*arguments)
            found[-1] += [result, *torch.autograd.grad(result.square().sum(), leaves)]
        z, W_hh, h0 = ARGUMENTS["recurrence"]()
        result = fastrnn.torch.recurrence(z, W_hh.t().detach(), h0)
        found[-1] += torch.autograd.grad(result.sum(), [z, h0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class OnCuda(torch.Tensor):  # type: ignore[misc,name-defined]
    """A CPU tensor that says it is on a GPU, for machines that have none."""

    device = property(lambda self: torch.device("cuda", 0))


class FakeOps:
    """``fastrnn.ops`` as it would answer for CUDA tensors: results in C order, no gradients."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, op: str) -> Any:
        def call(*arguments: Any, out: Any = None) -> Any:
            flat = [x for a in arguments for x in (a if isinstance(a, list) else [a])]
            tensors = [a for a in flat if isinstance(a, torch.Tensor)]
            assert all(isinstance(a, OnCuda) and not a.requires_grad for a in tensors)
            self.calls.append(op)
            given = [plain(a) for a in arguments]
            if op == "clip_by_global_norm":
                given[0] = [plain(g) for g in arguments[0]]
            result = getattr(open_backend("numpy"), op)(*given)
            if out is not None:
                return out.copy_(torch.from_numpy(result).as_subclass(OnCuda))
            if isinstance(result, tuple):
                return tuple(torch.from_numpy(r).as_subclass(OnCuda) for r in result)
            return torch.from_numpy(result).as_subclass(OnCuda)

        def plain(a: Any) -> Any:
            if not isinstance(a, torch.Tensor):
                return a
            array = a.as_subclass(torch.Tensor).numpy()
            return array.astype(np.int32) if array.dtype == np.int64 else array

        return call


@pytest.mark.parametrize("op", ARGUMENTS)
def test_cuda_tensors_go_through_fastrnn_ops(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensors(move: Any) -> Any:
        found = []
        for a in ARGUMENTS[op]():
            if isinstance(a, list):
                found.append([move(g.detach()) for g in a])
            else:
                found.append(move(a.detach()) if isinstance(a, torch.Tensor) else a)
        return found

    real = getattr(functional, {"clip_by_global_norm": "_clip_real"}.get(op, f"_{op}_real"))
    want = real(*tensors(lambda a: a))
    fake = FakeOps()
    monkeypatch.setattr(functional, "ops", fake)
    got = real(*tensors(lambda a: a.as_subclass(OnCuda)))
    assert fake.calls == [{"layer": "recurrence"}.get(op, op)]
    if isinstance(want, torch.Tensor):
        got, want = (got,), (want,)
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, OnCuda)
        assert a.stride() == b.stride()
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)


def test_cuda_tensors_without_cupy_say_what_is_missing() -> None:
    try:
        open_backend("cupy")
    except BackendUnavailableError as error:
        arguments = [a.detach().as_subclass(OnCuda) for a in ARGUMENTS["recurrence"]()]
        with pytest.raises(BackendUnavailableError, match=re.escape(str(error)[:40])):
            functional._recurrence_real(*arguments)
    else:
        pytest.skip("CuPy works here: tests on the GPU cover this")


@pytest.mark.skipif("cupy" in MISSING, reason=MISSING.get("cupy", ""))
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_on_a_gpu(options: dict[str, Any]) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    theirs = torch.nn.RNN(33, 64, **options)
    ours = fastrnn.torch.RNN(33, 64, **options, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    x = normal(9, 5, 33, dtype=torch.float32, grad=False)
    want = torch.autograd.grad(theirs(x)[0].square().sum(), list(theirs.parameters()))
    got = torch.autograd.grad(ours(x.cuda())[0].square().sum(), list(ours.parameters()))
    for a, b in zip(got, want, strict=True):
        assert relative_rms(a.cpu(), b) < 1e-5


def test_devices_that_nobody_computes_on() -> None:
    class OnMps(torch.Tensor):  # type: ignore[misc,name-defined]
        device = property(lambda self: torch.device("mps"))

    arguments = [a.detach().as_subclass(OnMps) for a in ARGUMENTS["recurrence"]()]
    with pytest.raises(TypeError, match="on a CPU or CUDA device, got one on mps"):
        functional._recurrence_real(*arguments)


# --- Compiler, export, torch.func -------------------------------------------------------------


def module() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return fastrnn.torch.RNN(3, H, 2, bidirectional=True, dtype=torch.float64), normal(5, B, 3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    ours, x = module()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    inputs = [x, normal(7, 3, 3)]  # the second has other sizes: they become symbols
    for input in inputs[: 1 if backend == "inductor" else 2]:
        leaves = [input, *ours.parameters()]
        output, h_n = ours(input)
        want = torch.autograd.grad(output.square().sum() + h_n.sum(), leaves)
        output, h_n = compiled(input)
        got = torch.autograd.grad(output.square().sum() + h_n.sum(), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_whole_training_step_compiles() -> None:
    torch._dynamo.reset()
    net = fastrnn.torch.CharRNN(V, H)
    tokens = ids(T, B)

    @torch.compile(fullgraph=True, backend="aot_eager")  # type: ignore[untyped-decorator]
    def loss_of(tokens: Any, state: Any) -> Any:
        logits, last = net(tokens, state)
        return fastrnn.torch.cross_entropy(logits, tokens), last

    loss, last = loss_of(tokens, torch.zeros(1, B, H))
    loss.backward()
    want, _ = net(tokens)
    torch.testing.assert_close(loss, F.cross_entropy(want.flatten(0, 1), tokens.flatten()))
    assert last.shape == (1, B, H)
    assert net.rnn.weight_ih_l0.grad.any()
    relu = fastrnn.torch.RNN(3, H, nonlinearity="relu")
    x = torch.randn(5, B, 3)
    output, _ = torch.compile(relu, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(output, relu(x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = torch.compile(net, fullgraph=True, backend="aot_eager")(tokens)
    assert output.dtype == torch.bfloat16  # of the linear layer; its input was float32


def test_the_short_way_past_the_dispatcher_gives_the_same() -> None:
    for op in ("gather", "recurrence", "layer", "cross_entropy"):
        arguments = ARGUMENTS[op]()
        leaves = [a for a in arguments if a.requires_grad]
        found = []
        for call in (getattr(functional, f"_{op}"), getattr(functional, f"_{op}").custom_op):
            results = call(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            found.append([*results, *torch.autograd.grad(results[0].square().sum(), leaves)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_see_the_operator_not_its_result() -> None:
    arguments = tuple(a.detach() for a in ARGUMENTS["recurrence"]())
    others = tuple(a + 1 for a in arguments)
    traced = torch.jit.trace(fastrnn.torch.recurrence, arguments)
    assert "fastrnn::recurrence" in str(traced.graph)
    graph = torch.fx.experimental.proxy_tensor.make_fx(fastrnn.torch.recurrence)(*arguments)
    assert "fastrnn.recurrence" in graph.code
    for function in (traced, graph):
        assert torch.equal(function(*others), fastrnn.torch.recurrence(*others))


def test_errors_come_out_of_the_compiler() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fastrnn.torch.recurrence, backend="aot_eager")
    z, W_hh, h0 = ARGUMENTS["recurrence"]()
    with pytest.raises(Exception, match=r"W_hh must have shape \(4, 4\), got \(4, 3\)"):
        compiled(z, W_hh[:, :3], h0)


def test_exports_with_dynamic_shapes() -> None:
    ours, x = module()
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        ours, (x.detach(),), dynamic_shapes={"input": {0: steps, 1: batch}}
    )
    names = {str(node.target) for node in exported.graph.nodes}
    assert "fastrnn.layer.default" in names
    other = normal(9, 3, 3, grad=False)
    torch.testing.assert_close(exported.module()(other)[0], ours(other)[0])


def test_torch_func() -> None:
    func = torch.func
    ours, x = module()
    x = x.detach()
    params = dict(ours.named_parameters())

    def loss(params: Any, x: Any) -> Any:
        return func.functional_call(ours, params, (x,))[0].sin().sum()

    want = torch.autograd.grad(loss(params, x), list(params.values()))
    for a, b in zip(func.grad(loss)(params, x).values(), want, strict=True):
        torch.testing.assert_close(a, b)
    many = torch.stack([x, 2 * x, -x])
    torch.testing.assert_close(
        func.vmap(lambda x: ours(x)[0])(many), torch.stack([ours(m)[0] for m in many])
    )
    each = func.vmap(func.grad(loss), (None, 0))(params, many)
    for i, m in enumerate(many):
        for name, g in func.grad(loss)(params, m).items():
            torch.testing.assert_close(each[name][i], g)
    z, W_hh, h0 = (a.detach() for a in ARGUMENTS["recurrence"]())

    def last(h0: Any) -> Any:
        return fastrnn.torch.recurrence(z, W_hh, h0)[-1].sin().sum()

    torch.testing.assert_close(
        func.jacrev(func.jacrev(last))(h0), torch.autograd.functional.hessian(last, h0)
    )
    logits, targets = normal(6, B, V, grad=False), ids(6, B)
    torch.testing.assert_close(
        func.vmap(func.grad(fastrnn.torch.cross_entropy))(logits, targets),
        torch.stack(
            [func.grad(F.cross_entropy)(a, t) for a, t in zip(logits, targets, strict=True)]
        ),
    )
    models = [fastrnn.torch.CharRNN(V, H) for _ in range(3)]
    stacked, buffers = func.stack_module_state(models)
    tokens = ids(T, B)
    output = func.vmap(lambda p, b: func.functional_call(models[0], (p, b), (tokens,))[0], (0, 0))(
        stacked, buffers
    )
    torch.testing.assert_close(output, torch.stack([m(tokens)[0] for m in models]))


def test_forward_mode_says_that_it_cannot() -> None:
    ours, x = module()
    x = x.detach()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: ours(x)[0], (x,), (x,))
    for trained in (True, False):
        ours.requires_grad_(trained)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(NotImplementedError, match="forward mode"):
                ours(dual)
