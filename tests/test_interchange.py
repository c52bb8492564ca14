"""Parameters from and to torch's names and the tutorial's five arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrnn import interchange, reference

V, H = 11, 5


@pytest.fixture(params=["float32", "float64"])
def params(request: pytest.FixtureRequest) -> dict[str, Any]:
    params = reference.init_params(V, H, seed=3, dtype=request.param)
    rng = np.random.default_rng(4)
    params["b_h"] = rng.standard_normal(H).astype(request.param)
    params["b_q"] = rng.standard_normal(V).astype(request.param)
    return params


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == list(reference.PARAM_NAMES)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, strict=True, err_msg=name)
        assert got[name].flags.c_contiguous


@pytest.mark.parametrize("output", ["linear.", "decoder.", "fc.", "out.", "net.head."])
@pytest.mark.parametrize("rnn", ["rnn.", "encoder.", "", "net.rnn."])
def test_round_trip_finds_any_prefix(params: dict[str, Any], rnn: str, output: str) -> None:
    state = interchange.to_torch_names(params, rnn, output)
    assert {name: a.shape for name, a in state.items()} == {
        f"{rnn}weight_ih_l0": (H, V),
        f"{rnn}weight_hh_l0": (H, H),
        f"{rnn}bias_ih_l0": (H,),
        f"{rnn}bias_hh_l0": (H,),
        f"{output}weight": (V, H),
        f"{output}bias": (V,),
    }
    assert_same(interchange.from_torch_names(state), params)
    assert_same(interchange.from_torch_names(state, rnn, output), params)


def test_results_are_copies(params: dict[str, Any]) -> None:
    state = interchange.to_torch_names(params)
    back = interchange.from_torch_names(state)
    for array in (*state.values(), *back.values()):
        array[...] = 7
    assert not any((array == 7).all() for array in params.values())
    assert (state["rnn.bias_ih_l0"] == 7).all()


def test_both_biases_are_added_and_may_be_missing(params: dict[str, Any]) -> None:
    state = interchange.to_torch_names(params)
    state["rnn.bias_hh_l0"] += 1
    got = interchange.from_torch_names(state)["b_h"]
    np.testing.assert_array_equal(got, params["b_h"] + 1)
    for name in ("rnn.bias_ih_l0", "rnn.bias_hh_l0", "linear.bias"):
        del state[name]
    bare = interchange.from_torch_names(state)
    assert not bare["b_h"].any()
    assert not bare["b_q"].any()


def test_an_rnn_cell_is_taken_too(params: dict[str, Any]) -> None:
    state = interchange.to_torch_names(params)
    cell = {name.replace("_l0", ""): array for name, array in state.items()}
    assert_same(interchange.from_torch_names(cell), params)


def test_a_second_matrix_of_the_same_shape_needs_a_name(params: dict[str, Any]) -> None:
    state = interchange.to_torch_names(params)
    state["embedding.weight"] = state["linear.weight"] + 1
    with pytest.raises(ValueError, match=r"exactly one output layer.*embedding.*name it with"):
        interchange.from_torch_names(state)
    assert_same(interchange.from_torch_names(state, output="linear."), params)


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: array for name, array in state.items() if name not in names}


def test_state_dicts_that_cannot_be_taken_over(params: dict[str, Any]) -> None:
    state = interchange.to_torch_names(params)
    W_hh = state["rnn.weight_hh_l0"]
    with pytest.raises(ValueError, match=r"one layer and one direction, got also rnn.weight_ih_l1"):
        interchange.from_torch_names({**state, "rnn.weight_ih_l1": W_hh})
    with pytest.raises(ValueError, match=r"one direction, got also rnn.weight_ih_l0_reverse"):
        interchange.from_torch_names({**state, "rnn.weight_ih_l0_reverse": W_hh})
    gates = {
        "rnn.weight_hh_l0": np.tile(W_hh, (4, 1)),
        "rnn.weight_ih_l0": np.tile(state["rnn.weight_ih_l0"], (4, 1)),
    }
    with pytest.raises(ValueError, match=r"\[H, H\], got \(20, 5\) \(four gates: an LSTM\?\)"):
        interchange.from_torch_names({**state, **gates})
    with pytest.raises(ValueError, match="exactly once, got nothing"):
        interchange.from_torch_names({})
    with pytest.raises(ValueError, match=r"at prefix 'encoder.' exactly once"):
        interchange.from_torch_names(state, rnn="encoder.")
    with pytest.raises(ValueError, match=r"expected rnn.weight_hh_l0, got only"):
        interchange.from_torch_names(without(state, "rnn.weight_hh_l0"))
    with pytest.raises(ValueError, match="exactly one output layer"):
        interchange.from_torch_names(without(state, "linear.weight"))
    with pytest.raises(ValueError, match=r"linear.weight must have shape \(11, 5\), got \(5, 5\)"):
        interchange.from_torch_names({**state, "linear.weight": W_hh}, output="linear.")
    with pytest.raises(ValueError, match=r"rnn.bias_ih_l0 must have shape \(5,\), got \(4,\)"):
        interchange.from_torch_names({**state, "rnn.bias_ih_l0": W_hh[0, :4]})
    with pytest.raises(TypeError, match="W_xh must be float32 or float64, got float16"):
        interchange.from_torch_names({k: v.astype(np.float16) for k, v in state.items()})


def test_parameters_that_do_not_fit(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected the arrays W_xh, .*, got W_xh"):
        interchange.to_torch_names({"W_xh": params["W_xh"]})
    with pytest.raises(ValueError, match=r"W_hq must have shape \(5, 11\), got \(11, 5\)"):
        interchange.to_torch_names({**params, "W_hq": params["W_hq"].T})
    other = np.float32 if params["b_q"].dtype == np.float64 else np.float64
    with pytest.raises(TypeError, match=r"b_q must be float.. like W_xh, got float"):
        interchange.to_torch_names({**params, "b_q": params["b_q"].astype(other)})


def test_modules_of_torch(params: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dtype = getattr(torch, params["W_xh"].dtype.name)
    net = torch.nn.ModuleDict({"rnn": torch.nn.RNN(V, H), "decoder": torch.nn.Linear(H, V)})
    net = net.to(dtype)
    state = interchange.to_torch_names(params, "rnn.", "decoder.")
    net.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    assert_same(interchange.from_torch_names(net.state_dict()), params)
    assert_same(interchange.from_torch_names(dict(net.named_parameters())), params)

    tokens = np.random.default_rng(5).integers(0, V, (4, 3))
    h0 = np.zeros((3, H), params["W_xh"].dtype)
    hs, logits = reference.forward(tokens, h0, params)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(tokens), V).to(dtype)
    outputs, _ = net["rnn"](one_hot)
    np.testing.assert_allclose(outputs.detach().numpy(), hs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(net["decoder"](outputs).detach().numpy(), logits, rtol=0, atol=2e-6)
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch.bfloat16"):
        interchange.from_torch_names(net.to(torch.bfloat16).state_dict())


def test_tutorial_arrays_round_trip(params: dict[str, Any], tmp_path: Path) -> None:
    interchange.save_tutorial(tmp_path / "five.npz", params)
    assert_same(interchange.load_tutorial(tmp_path / "five.npz"), params)
    assert [p.name for p in tmp_path.iterdir()] == ["five.npz"]
    np.savez(tmp_path / "ordered.npz", *params.values())
    assert_same(interchange.load_tutorial(tmp_path / "ordered.npz"), params)


def test_files_that_are_not_the_tutorials(params: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        interchange.load_tutorial(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("W_xh")
    np.save(tmp_path / "single.npy", params["W_xh"])
    np.savez(tmp_path / "pickled.npz", W_xh=np.array([{}], dtype=object))
    whole = tmp_path / "whole.npz"
    interchange.save_tutorial(whole, params)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-40])
    for name in ("text.npz", "single.npy", "pickled.npz", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name} is not an .npz file of plain arrays"):
            interchange.load_tutorial(tmp_path / name)
    np.savez(tmp_path / "four.npz", *list(params.values())[:4])
    with pytest.raises(ValueError, match=r"four.npz: expected the arrays W_xh, .* got arr_0"):
        interchange.load_tutorial(tmp_path / "four.npz")
