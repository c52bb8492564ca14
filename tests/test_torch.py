"""``fastrnn.torch.RNN`` beside ``torch.nn.RNN``: results, gradients, and what else modules do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import relative_rms

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastrnn  # noqa: E402
import fastrnn.torch  # noqa: E402
from fastrnn import reference  # noqa: E402

nn = torch.nn
rnn_utils = torch.nn.utils.rnn

# Relative RMS. Both sides sum products of one dtype in another order, layer upon layer; where the
# reference is float64, float32 errs by itself as in tolerances.py, times the layers.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(got: Any, want: Any, what: str = "") -> None:
    assert got.shape == want.shape, what
    error = relative_rms(got.detach().numpy(), want.detach().numpy())
    assert error <= LIMITS[got.dtype], f"{what}: {error:.3g}"


def pair(ours: Any = None, **options: Any) -> tuple[Any, Any]:
    """``nn.RNN`` and ours with the same weights."""
    theirs = nn.RNN(**options)
    ours = (ours or fastrnn.torch.RNN)(**options)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    return theirs, ours


def results(module: Any, input: Any, hx: Any, seed: int = 0) -> dict[str, Any]:
    """Outputs and the gradient of everything, for a loss that weighs each element differently."""
    data = input.data if isinstance(input, rnn_utils.PackedSequence) else input
    leaf = data.detach().clone().requires_grad_()
    fed = input._replace(data=leaf) if isinstance(input, rnn_utils.PackedSequence) else leaf
    state = None if hx is None else hx.detach().clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    output, h_n = module(fed, state)
    flat = output.data if isinstance(output, rnn_utils.PackedSequence) else output
    weights = torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype).reshape(flat.shape)
    ends = torch.linspace(1, 2, h_n.numel(), dtype=h_n.dtype).reshape(h_n.shape)
    ((flat * weights).sum() + (h_n * ends).sum()).backward()
    found = {"output": flat, "h_n": h_n, "d input": leaf.grad}
    if state is not None:
        found["d hx"] = state.grad
    found |= {f"d {name}": p.grad for name, p in module.named_parameters()}
    return found


def compare(theirs: Any, ours: Any, input: Any, hx: Any = None) -> None:
    want, got = results(theirs, input, hx), results(ours, input, hx)
    assert list(got) == list(want)
    for name in want:
        assert_close(got[name], want[name], name)


# --- Same results -----------------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    layers = draw(st.integers(1, 3))
    return {
        "options": {
            "input_size": draw(st.integers(1, 5)),
            "hidden_size": draw(st.sampled_from([1, 2, 7, 33])),
            "num_layers": layers,
            "nonlinearity": draw(st.sampled_from(["tanh", "tanh", "relu"])),
            "bias": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
            "dropout": draw(st.sampled_from([0.0, 0.4])) if layers > 1 else 0.0,
            "bidirectional": draw(st.booleans()),
        },
        "T": draw(st.integers(1, 6)),
        "B": draw(st.integers(0, 4)),
        "state": draw(st.booleans()),
        "training": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def arrays(case: dict[str, Any], *leading: int) -> tuple[Any, Any]:
    """An input whose first axes are ``leading``, and a state or None."""
    options = case["options"]
    rng = torch.Generator().manual_seed(case["seed"])
    D = 2 if options["bidirectional"] else 1

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    input = normal(*leading, options["input_size"])
    batch = (case["B"],) if len(leading) == 2 else ()
    hx = normal(options["num_layers"] * D, *batch, options["hidden_size"])
    return input, hx if case["state"] else None


def modules(case: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(case["seed"])
    theirs, ours = pair(**case["options"], dtype=torch.float64)
    return theirs.train(case["training"]), ours.train(case["training"])


@given(cases())
def test_batches(case: dict[str, Any]) -> None:
    T, B = case["T"], case["B"]
    leading = (B, T) if case["options"]["batch_first"] else (T, B)
    compare(*modules(case), *arrays(case, *leading))


@given(cases())
def test_single_sequences(case: dict[str, Any]) -> None:
    compare(*modules(case), *arrays(case, case["T"]))


@given(cases(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_packed_sequences(case: dict[str, Any], lengths: list[int], sort: bool) -> None:
    first = case["options"]["batch_first"]
    lengths = sorted(lengths, reverse=True) if sort else lengths
    case["B"], T = len(lengths), max(lengths)
    padded, hx = arrays(case, *((case["B"], T) if first else (T, case["B"])))
    packed = rnn_utils.pack_padded_sequence(padded, lengths, first, enforce_sorted=sort)
    theirs, ours = modules(case)
    compare(theirs, ours, packed, hx)
    torch.manual_seed(0)
    output, _ = ours(packed, hx)
    torch.manual_seed(0)
    want, _ = theirs(packed, hx)
    assert torch.equal(output.batch_sizes, want.batch_sizes)
    got, expected = (rnn_utils.pad_packed_sequence(o, first)[0] for o in (output, want))
    assert_close(got, expected, "padded again")


@pytest.mark.parametrize("shape", [(35, 32, 64, 256), (3, 17, 5, 130), (2, 1, 300, 300)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_float32_is_near_torch_in_float64(shape: Any, options: dict[str, Any]) -> None:
    T, B, features, H = shape
    torch.manual_seed(1)
    theirs, ours = pair(input_size=features, hidden_size=H, **options)
    x = torch.randn(T, B, features)
    got = results(ours, x, None)
    want = results(theirs.double(), x.double(), None)
    for name in want:
        assert got[name].dtype == torch.float32
        assert_close(got[name], want[name], name)


class ForgetsTheState(fastrnn.torch.RNN):
    def _stack(self, input: Any, hx: Any, batch_sizes: Any) -> Any:
        return super()._stack(input, torch.zeros_like(hx), batch_sizes)


class NeverLooksBack(fastrnn.torch.RNN):
    def _stack(self, input: Any, hx: Any, batch_sizes: Any) -> Any:
        output, h_n = super()._stack(input, hx, batch_sizes)
        H = self.hidden_size
        return torch.cat([output[..., :H], output[..., H:].flip(0)], -1), h_n


class LosesABias(fastrnn.torch.RNN):
    def _layer(self, k: int, x: Any, W_xh: Any, bias: Any, W_hh: Any, h0: Any) -> Any:
        return super()._layer(k, x, W_xh, bias - self.bias_hh_l0, W_hh, h0)


class KeepsTheGradient(fastrnn.torch.RNN):
    def _stack(self, input: Any, hx: Any, batch_sizes: Any) -> Any:
        return super()._stack(input, hx.detach() + 0 * hx, batch_sizes)


@pytest.mark.parametrize(
    "wrong",
    [ForgetsTheState, NeverLooksBack, LosesABias, KeepsTheGradient],
    ids=lambda c: c.__name__,
)
def test_wrong_twins_are_found_out(wrong: Any) -> None:
    torch.manual_seed(0)
    theirs, ours = pair(wrong, input_size=3, hidden_size=4, bidirectional=True, dtype=torch.float64)
    x, hx = torch.randn(5, 2, 3).double(), torch.randn(2, 2, 4).double()
    with pytest.raises(AssertionError, match=r"output|d hx"):
        compare(theirs, ours, x, hx)


def test_inputs_that_are_not_contiguous() -> None:
    theirs, ours = pair(input_size=3, hidden_size=4)
    wide = torch.randn(6, 2, 10)
    for x in (wide[::2, :, 1:7:2], torch.randn(3, 2).t()[None].expand(5, 2, 3)):
        compare(theirs, ours, x, torch.randn(2, 4).expand(1, 2, 4))
    (ours(wide[..., :3])[0].sum()).backward()  # the gradient of a sum is an expanded scalar
    (theirs(wide[..., :3])[0].sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad)


def test_gradients_that_nobody_asks_for() -> None:
    theirs, ours = pair(input_size=3, hidden_size=4, num_layers=2)
    x = torch.randn(5, 2, 3, requires_grad=True)
    for frozen in (["weight_hh_l0"], ["weight_ih_l0", "bias_hh_l1"], list(ours.state_dict())):
        grads = []
        for module in (theirs, ours):
            for name, p in module.named_parameters():
                p.requires_grad_(name not in frozen)
            leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
            grads.append(torch.autograd.grad(module(x)[0].square().sum(), leaves))
        for a, b in zip(*grads, strict=True):
            assert_close(b, a)
    ours.requires_grad_(True)
    loss = ours(x.detach())[0].square().sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(ours.parameters())))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            output, h_n = ours(x)
        assert not output.requires_grad
        assert not h_n.requires_grad


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 4), (5, 4)], ids=str)
def test_outputs_may_be_changed_in_place(
    shape: Any, options: dict[str, Any], batch_first: bool
) -> None:
    theirs = torch.nn.RNN(4, 6, batch_first=batch_first, **options)
    ours = fastrnn.torch.RNN(4, 6, batch_first=batch_first, **options)
    ours.load_state_dict(theirs.state_dict())
    x, grads = torch.randn(*shape), []
    for rnn in (theirs, ours):
        inputs = x.clone().requires_grad_()
        output, h_n = rnn(inputs)
        output.mul_(2.0)
        output[0] = 0.0
        h_n.add_(1.0)
        (output.square().sum() + h_n.sum()).backward()
        grads.append([inputs.grad, *(p.grad for p in rnn.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)


def test_a_graph_can_be_kept_and_run_again() -> None:
    _, ours = pair(input_size=3, hidden_size=4)
    loss = ours(torch.randn(5, 2, 3))[0].square().sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(ours.parameters()))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_weights_changed_in_place_before_backward_are_noticed() -> None:
    _, ours = pair(input_size=3, hidden_size=4)
    loss = ours(torch.randn(5, 2, 3))[0].sum()
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Same parameters --------------------------------------------------------------------------


ALL: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize("options", [{}, ALL, {"bias": False}, {"dtype": torch.float64}], ids=str)
def test_parameters_and_state_dict(options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    theirs = nn.RNN(3, 4, **options)
    torch.manual_seed(7)
    ours = fastrnn.torch.RNN(3, 4, **options)
    for a, b in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])  # the same numbers from the same seed
        assert a[1].dtype == b[1].dtype
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1)
    assert theirs.load_state_dict(ours.state_dict()) == ([], [])
    assert torch.equal(theirs.weight_hh_l0, ours.weight_hh_l0)
    assert repr(ours) == repr(theirs)


def test_repr_names_what_is_not_the_default() -> None:
    assert repr(fastrnn.torch.RNN(3, 4, nonlinearity="relu", **ALL)) == (
        "RNN(3, 4, num_layers=2, bidirectional=True, nonlinearity='relu')"
    )


def test_positional_arguments_are_those_of_torch() -> None:
    arguments = (3, 4, 2, "relu", False, True, 0.25, True)
    theirs, ours = nn.RNN(*arguments), fastrnn.torch.RNN(*arguments)
    names = ("nonlinearity", "bias", "batch_first", "dropout", "bidirectional", "num_layers")
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    "options",
    [
        {"nonlinearity": "gelu"},
        {"proj_size": 2},
        {"num_layers": 0},
        {"hidden_size": 0},
        {"input_size": -1},
        {"hidden_size": 4.0},
        {"dropout": 1.5},
        {"dropout": True},
        {"bias": 1},
        {"batch_first": "yes"},
    ],
    ids=str,
)
def test_constructor_refuses_what_torch_refuses(options: dict[str, Any]) -> None:
    options = {"input_size": 3, "hidden_size": 4, **options}
    with pytest.raises((TypeError, ValueError)) as theirs:
        nn.RNN(**options)
    with pytest.raises(theirs.type):
        fastrnn.torch.RNN(**options)


def test_dropout_without_a_second_layer_warns_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        fastrnn.torch.RNN(3, 4, dropout=0.5)


BAD_CALLS: dict[str, Callable[[Any], Any]] = {
    "no steps": lambda m: m(torch.zeros(0, 2, 3)),
    "no steps, single": lambda m: m(torch.zeros(0, 3)),
    "1-D": lambda m: m(torch.zeros(3)),
    "4-D": lambda m: m(torch.zeros(2, 2, 2, 3)),
    "other input size": lambda m: m(torch.zeros(5, 2, 7)),
    "other dtype": lambda m: m(torch.zeros(5, 2, 3, dtype=torch.float64)),
    "integers": lambda m: m(torch.zeros(5, 2, 3, dtype=torch.long)),
    "2-D state": lambda m: m(torch.zeros(5, 2, 3), torch.zeros(1, 4)),
    "3-D state of one": lambda m: m(torch.zeros(5, 3), torch.zeros(1, 1, 4)),
    "other batch in the state": lambda m: m(torch.zeros(5, 2, 3), torch.zeros(1, 3, 4)),
    "other layers in the state": lambda m: m(torch.zeros(5, 2, 3), torch.zeros(2, 2, 4)),
    "packed state": lambda m: m(rnn_utils.pack_sequence([torch.zeros(2, 3)]), torch.zeros(1, 2, 4)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_that_torch_refuses(name: str) -> None:
    theirs, ours = pair(input_size=3, hidden_size=4)
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        BAD_CALLS[name](theirs)
    with pytest.raises(refusal.type) as ours_too:
        BAD_CALLS[name](ours)
    assert len(str(ours_too.value)) > 20


def test_a_state_of_another_dtype_is_refused() -> None:
    _, ours = pair(input_size=3, hidden_size=4)
    with pytest.raises(TypeError, match=r"hx must be torch.float32 like x, got torch.float64"):
        ours(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64))


def test_an_empty_batch() -> None:
    theirs, ours = pair(input_size=3, hidden_size=4, **ALL)
    compare(theirs, ours, torch.zeros(5, 0, 3), torch.zeros(4, 0, 4))
    assert ours(torch.zeros(5, 0, 3))[0].shape == (5, 0, 8)


# --- Dtypes and devices -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_other_dtypes_are_refused(dtype: Any, nonlinearity: str) -> None:
    ours = fastrnn.torch.RNN(3, 4, nonlinearity=nonlinearity).to(dtype)
    with pytest.raises(TypeError, match=r"float32 or float64, got weights of torch.*autocast"):
        ours(torch.zeros(5, 2, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_autocast_keeps_the_dtype_of_the_weights(dtype: Any, nonlinearity: str) -> None:
    """nn.RNN returns half precision here; ours computes and returns what the weights are."""
    _, ours = pair(input_size=3, hidden_size=4, nonlinearity=nonlinearity)
    x, hx = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    want, _ = ours(x, hx)
    rounded, _ = ours(x.to(dtype).float(), hx.to(dtype).float())
    with torch.autocast("cpu", dtype=dtype):
        same, h_n = ours(x, hx)
        cast, _ = ours(x.to(dtype), hx.to(dtype))
        packed, _ = ours(rnn_utils.pack_sequence([x[:, 0].to(dtype)]))
    assert torch.equal(same, want)
    assert torch.equal(cast, rounded)
    assert h_n.dtype == packed.data.dtype == torch.float32
    leaf = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        ours(leaf)[0].sum().backward()
    assert leaf.grad.dtype == dtype
    with torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match="does not match"):
        ours.double()(x)


def test_changing_the_dtype_half_way() -> None:
    theirs, ours = pair(input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3)
    loss = ours(x)[0].sum()
    ours.double()
    theirs.double()
    loss.backward()  # of the float32 graph, into parameters that are float64 by now
    compare(theirs, ours, x.double())
    compare(theirs.to(torch.float32), ours.to(torch.float32), x)
    compare(theirs.to("cpu"), ours.to("cpu"), x)


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    ours = fastrnn.torch.RNN(3, 4, **ALL, device="meta")
    output, h_n = ours(torch.empty(5, 2, 3, device="meta"))
    assert (output.device.type, output.shape, h_n.shape) == ("meta", (5, 2, 8), (4, 2, 4))
    output.sum().backward()
    assert ours.weight_hh_l1_reverse.grad.shape == (4, 4)
    real = ours.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.zeros(5, 2, 3))[0].isfinite().all()
    with FakeTensorMode():
        output, _ = fastrnn.torch.RNN(3, 4)(torch.empty(5, 2, 3))
        assert output.shape == (5, 2, 4)
        net = fastrnn.torch.CharRNN(7, 4)
        logits, _ = net(torch.zeros(5, 2, dtype=torch.long))
        loss = fastrnn.torch.cross_entropy(logits, torch.zeros(5, 2, dtype=torch.long))
        loss.backward()
        assert net.rnn.weight_ih_l0.grad.shape == (4, 7)


# --- What else modules do ---------------------------------------------------------------------


def test_copies_of_the_module() -> None:
    _, ours = pair(input_size=3, hidden_size=4, **ALL)
    x = torch.randn(5, 2, 3)
    want, _ = ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ]
    for twin in copies:
        assert torch.equal(twin(x)[0], want)
        assert type(twin) is fastrnn.torch.RNN
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
    assert not torch.equal(ours(x)[0], want)
    assert torch.equal(copies[0](x)[0], want)


def test_replicas_use_their_own_weights() -> None:
    """What ``torch.nn.parallel.replicate`` makes: shallow copies with plain tensors in place."""
    _, ours = pair(input_size=3, hidden_size=4)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, (2 * p).clone())
    x = torch.randn(5, 2, 3)
    output, _ = replica(x)
    output.sum().backward()
    assert ours.weight_hh_l0.grad is not None
    doubled = copy.deepcopy(ours)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    assert torch.equal(output, doubled(x)[0])


def test_hooks_and_parametrizations() -> None:
    theirs, ours = pair(input_size=3, hidden_size=4)
    seen: list[str] = []
    ours.register_forward_pre_hook(lambda *_: seen.append("before"))
    ours.register_forward_hook(lambda *_: seen.append("after"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours.weight_hh_l0.register_hook(lambda g: g * 0)
    ours.weight_ih_l0.register_post_accumulate_grad_hook(lambda p: seen.append("gradient"))
    x = torch.randn(5, 2, 3, requires_grad=True)
    ours(x)[0].sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "gradient"]
    assert not ours.weight_hh_l0.grad.any()
    for module in (theirs, ours):
        module.zero_grad()
        torch.nn.utils.parametrize.register_parametrization(
            module, "weight_hh_l0", nn.Sequential(nn.Tanh())
        )
    assert_close(ours(x)[0], theirs(x)[0])


def test_flatten_parameters_moves_nothing() -> None:
    _, ours = pair(input_size=3, hidden_size=4, **ALL)
    before = [p.data_ptr() for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert [p.data_ptr() for p in ours.parameters()] == before


def test_deterministic_algorithms_repeat_to_the_bit() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, ours = pair(input_size=40, hidden_size=130, **ALL)
            x = torch.randn(9, 17, 40)
            first, again = results(ours, x, None), results(ours, x, None)
            net = fastrnn.torch.CharRNN(50, 33)
            tokens = torch.randint(50, (9, 17))
            grads = []
            for _ in range(2):
                loss = fastrnn.torch.cross_entropy(net(tokens)[0], tokens)
                leaves = [p for p in net.parameters() if p.requires_grad]
                grads.append(torch.autograd.grad(loss, leaves))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_activation_checkpointing() -> None:
    _, ours = pair(input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    (want,) = torch.autograd.grad(ours(x)[0].square().sum(), x)
    output = torch.utils.checkpoint.checkpoint(lambda a: ours(a)[0], x, use_reentrant=False)
    (got,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(got, want)


# --- convert ----------------------------------------------------------------------------------


class Tagger(nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.layers = nn.ModuleList([nn.RNN(5, 6, bidirectional=True), nn.RNN(12, 6)])
        self.other = nn.GRU(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        h = self.embed(x)
        for layer in self.layers:
            h, _ = layer(h)
        return self.out(self.other(h)[0])


def test_convert_keeps_everything_but_the_code() -> None:
    model = Tagger()
    seen: list[Any] = []
    model.layers[0].register_forward_hook(lambda module, *_: seen.append(module))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(11, (7, 4))
    want = model(tokens)
    before = dict(model.named_parameters())
    assert fastrnn.torch.convert(model) is model
    assert [type(m) for m in model.layers] == [fastrnn.torch.RNN] * 2
    assert type(model.other) is nn.GRU
    assert_close(model(tokens), want)
    assert len(seen) == 2
    assert all(p is before[name] for name, p in model.named_parameters())
    model(tokens).sum().backward()
    old = model.layers[1].weight_hh_l0.detach().clone()
    optimizer.step()
    assert not torch.equal(model.layers[1].weight_hh_l0, old)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(tokens), model(tokens))


def test_convert_of_a_single_module_and_of_subclasses() -> None:
    class Special(nn.RNN):  # type: ignore[misc,name-defined]
        pass

    assert type(fastrnn.torch.convert(nn.RNN(3, 4, nonlinearity="relu"))) is fastrnn.torch.RNN
    assert type(fastrnn.torch.convert(Special(3, 4))) is Special


# --- CharRNN ----------------------------------------------------------------------------------


V, H = 13, 9


@pytest.fixture(params=["float32", "float64"])
def model(request: pytest.FixtureRequest) -> fastrnn.CharRNN:
    chars = [chr(ord("a") + i) for i in range(V)]
    params = reference.init_params(V, H, 3, request.param)
    rng = np.random.default_rng(4)
    params = {k: (v + rng.standard_normal(v.shape) / 5).astype(v.dtype) for k, v in params.items()}
    return fastrnn.CharRNN(chars, H, "numpy", request.param, params=params)


def char_rnn(model: fastrnn.CharRNN) -> Any:
    net = fastrnn.torch.CharRNN(V, H, dtype=getattr(torch, model.dtype.name))
    assert net.load_state_dict(model.to_torch()) == ([], [])
    return net


def test_char_rnn_is_the_model_of_the_reference(model: fastrnn.CharRNN) -> None:
    net = char_rnn(model)
    rng = np.random.default_rng(5)
    X, Y = rng.integers(0, V, (2, 6, 4))
    h0 = rng.standard_normal((4, H)).astype(model.dtype)
    hs, logits = reference.forward(X, h0, model.params)
    grads, dh0 = reference.backward(X, Y, h0, hs, logits, model.params)
    state = torch.from_numpy(h0)[None].requires_grad_()
    got, last = net(torch.from_numpy(X), state)
    loss = fastrnn.torch.cross_entropy(got, torch.from_numpy(Y))
    loss.backward()
    assert_close(got, torch.from_numpy(logits), "logits")
    assert_close(last, torch.from_numpy(hs[-1:]), "state")
    assert loss.item() == pytest.approx(reference.cross_entropy(logits, Y), rel=1e-6)
    want = {
        "rnn.weight_ih_l0": grads["W_xh"].T,
        "rnn.weight_hh_l0": grads["W_hh"].T,
        "rnn.bias_ih_l0": grads["b_h"],
        "linear.weight": grads["W_hq"].T,
        "linear.bias": grads["b_q"],
    }
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert set(found) == set(want)
    for name, gradient in want.items():
        assert_close(found[name], torch.from_numpy(gradient.copy()), name)
    assert_close(state.grad[0], torch.from_numpy(dh0), "h0")


def test_a_training_run_is_that_of_the_reference(model: fastrnn.CharRNN) -> None:
    net = char_rnn(model)
    params = [p for p in net.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(params, lr=1.0)
    wanted, p = [], {k: v.astype(np.float64) for k, v in model.params.items()}
    losses, h, state = [], np.zeros((4, H)), None
    rng = np.random.default_rng(6)
    for _ in range(10):
        X, Y = rng.integers(0, V, (2, 5, 4)).astype(np.int32)
        loss, _, h = reference.train_step(X, Y, h, p, 1.0, 0.1)
        wanted.append(loss)
        logits, state = net(torch.from_numpy(X), state)
        state = state.detach()
        torch_loss = fastrnn.torch.cross_entropy(logits, torch.from_numpy(Y))
        sgd.zero_grad()
        torch_loss.backward()
        fastrnn.torch.clip_grad_norm_(params, 0.1)
        sgd.step()
        losses.append(torch_loss.item())
    limit = 1e-5 if model.dtype == np.float32 else 1e-11
    np.testing.assert_allclose(losses, wanted, rtol=limit)


def test_char_rnn_goes_to_fastrnn_and_back(model: fastrnn.CharRNN) -> None:
    net = char_rnn(model)
    again = fastrnn.load_torch(net.state_dict(), model.vocab, "numpy")
    for name, array in model.params.items():
        np.testing.assert_array_equal(again.params[name], array)
    plain = nn.ModuleDict({"rnn": nn.RNN(V, H), "linear": nn.Linear(H, V)}).to(net.linear.weight)
    assert plain.load_state_dict(net.state_dict()) == ([], [])
    assert net.load_state_dict(plain.state_dict()) == ([], [])
    tokens = torch.randint(V, (5, 2))
    one_hot = nn.functional.one_hot(tokens, V).to(net.linear.weight.dtype)
    assert_close(net(tokens)[0], plain["linear"](plain["rnn"](one_hot)[0]))
    trained = nn.RNN(V, H).to(net.linear.weight)  # with a second bias of its own
    net.rnn.load_state_dict(trained.state_dict())
    assert_close(net.rnn(tokens)[0], trained(one_hot)[0])


def test_rows_stay_in_place_for_the_gather(model: fastrnn.CharRNN) -> None:
    net = char_rnn(model)
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.double()):
        assert twin.rnn.weight_ih_l0.t().is_contiguous()
    logits, _ = net(torch.randint(V, (5, 2)))
    logits.sum().backward()
    assert net.rnn.weight_ih_l0.grad.t().is_contiguous()
    tokens = torch.randint(V, (5, 2))
    want, _ = net(tokens)
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert not net.rnn.weight_ih_l0.t().is_contiguous()
    assert torch.equal(net(tokens)[0], want)


def test_char_rnn_starts_like_fastrnn() -> None:
    torch.manual_seed(0)
    net = fastrnn.torch.CharRNN(300, 200)
    for name, p in net.named_parameters():
        if p.dim() == 2:
            assert abs(p.std().item() - 0.01) < 2e-4, name
        else:
            assert not p.any(), name
    assert not net.rnn.bias_hh_l0.requires_grad


def test_char_rnn_refuses_what_it_cannot_read() -> None:
    net = fastrnn.torch.CharRNN(V, H)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, V\) with V = 13, got 13"):
        net(torch.full((5, 2), V))
    with pytest.raises(ValueError, match=r"got -1"):
        net(torch.full((5, 2), -1, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"tokens must be int32 or int64, got torch.float32"):
        net(torch.zeros(5, 2))
    for shape in ((5,), (0, 2), (5, 2, V)):
        with pytest.raises(ValueError, match=r"tokens must have shape \[T, B\]"):
            net(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        net(torch.zeros(5, 2, dtype=torch.long), torch.zeros(1, 3, H))
    with pytest.raises(TypeError, match="float32 or float64"):
        net.bfloat16()(torch.zeros(5, 2, dtype=torch.long))


# --- The example ------------------------------------------------------------------------------

EXAMPLE = """
import torch
import fastrnn.torch

rnn = fastrnn.torch.RNN(64, 256)  # was: torch.nn.RNN(64, 256)
head = torch.nn.Linear(256, 64)
optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()])

x, y, state = torch.randn(35, 32, 64), torch.randint(64, (35, 32)), None
for step in range(5):
    h, state = rnn(x, state)
    loss = fastrnn.torch.cross_entropy(head(h), y)
    optimizer.zero_grad()
    loss.backward()
    fastrnn.torch.clip_grad_norm_(rnn.parameters(), 1.0)
    optimizer.step()
    state = state.detach()
"""


def test_the_example_trains() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(EXAMPLE, "example", "exec"), names)
    first = names["loss"].item()
    with torch.no_grad():
        h, _ = names["rnn"](names["x"], names["state"])
        assert fastrnn.torch.cross_entropy(names["head"](h), names["y"]).item() < first


def test_the_public_names_have_docstrings() -> None:
    for name in fastrnn.torch.__all__:
        thing = getattr(fastrnn.torch, name)
        assert thing.__doc__, name
        assert "Args:" in thing.__doc__ or name == "convert", name
