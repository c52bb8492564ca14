"""Whole training steps: fused == composed == oracle, along ten steps and at odd shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrnn import reference
from fastrnn.backend import CPU_BACKENDS, Backend, Dims, open_backend
from tests.conftest import ALL_BACKENDS, Inputs, open_any
from tests.tolerances import RELATIVE_RMS, assert_close, relative_rms


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn, the CUDA C engine in the emulator among them."""
    return open_any(request.param)


def oracle_steps(
    inputs: Inputs, params: Any, tokens: Any, starts: Any, lr: float, max_norm: float, carry: bool
) -> tuple[dict[str, Any], list[float], list[float]]:
    """Train with the reference in float64; return parameters, losses and norms."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    h, losses, norms = np.zeros((inputs.B, inputs.H)), [], []
    for row in starts:
        index = row[None, :] + np.arange(inputs.T)[:, None]
        loss, norm, h_next = reference.train_step(
            tokens[index], tokens[index + 1], h, params, lr, max_norm
        )
        h = h_next if carry else h
        losses.append(loss)
        norms.append(norm)
    return params, losses, norms


def setting(inputs: Inputs, steps: int) -> tuple[Any, Any, Any]:
    tokens = inputs.tokens(inputs.T * 4 + 50)
    starts = inputs.rng.integers(0, len(tokens) - inputs.T, (steps, inputs.B)).astype(np.int32)
    return inputs.params(), tokens, starts


def check_steps(backend: Backend, inputs: Inputs, steps: int, carry: bool, fused: bool) -> None:
    lr, max_norm = 0.5, 0.7
    params, tokens, starts = setting(inputs, steps)
    want, losses, norms = oracle_steps(inputs, params, tokens, starts, lr, max_norm, carry)
    dims = Dims(inputs.T, inputs.B, inputs.H, inputs.V, inputs.dtype)
    ws = backend.workspace(dims, tokens, params)
    for i, row in enumerate(starts):
        if fused:
            backend.run_steps(ws, row[None], lr, max_norm, carry)
        else:
            Backend.step(backend, ws, backend.put(row), lr, max_norm, carry)
        assert_close("trajectory", backend.get(ws.loss), np.float64(losses[i]), f"loss {i}")
        assert_close("trajectory", backend.get(ws.norm), np.float64(norms[i]), f"norm {i}")
    for name, p in want.items():
        got = backend.get(ws.params[name])
        limit = RELATIVE_RMS["step"][inputs.dtype.name] * steps
        assert relative_rms(got, p) <= limit, name
    totals = backend.get(ws.totals)
    assert totals[2:].tolist() == [steps, 0]
    assert totals[0] == pytest.approx(sum(losses), rel=1e-4)
    assert totals[1] == pytest.approx(sum(norms), rel=1e-4)


@pytest.mark.parametrize("carry", [True, False], ids=["carried", "zeroed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_ten_steps_follow_the_oracle(
    backend: Backend, inputs: Inputs, carry: bool, fused: bool
) -> None:
    check_steps(backend, inputs, 10, carry, fused)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@given(
    T=st.integers(1, 9),
    B=st.integers(1, 9),
    H=st.integers(1, 70),
    V=st.integers(2, 90),
    carry=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_any_shape_follows_the_oracle(
    name: str, T: int, B: int, H: int, V: int, carry: bool, dtype: Any
) -> None:
    check_steps(open_backend(name), Inputs(T, B, H, V, dtype), 3, carry, fused=True)


def test_the_same_steps_give_the_same_bits(backend: Backend, inputs: Inputs) -> None:
    params, tokens, starts = setting(inputs, 4)
    dims = Dims(inputs.T, inputs.B, inputs.H, inputs.V, inputs.dtype)
    runs = []
    for chunks in ([4], [1, 3]):
        ws = backend.workspace(dims, tokens, params)
        done = 0
        for n in chunks:
            backend.run_steps(ws, starts[done : done + n], 0.5, 0.7, True)
            done += n
        runs.append([backend.get(a) for a in (ws.flat_params, ws.h0, ws.totals)])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluate_is_the_loss_and_changes_no_parameter(backend: Backend, inputs: Inputs) -> None:
    params, tokens, starts = setting(inputs, 3)
    dims = Dims(inputs.T, inputs.B, inputs.H, inputs.V, inputs.dtype)
    _, losses, _ = oracle_steps(inputs, params, tokens, starts, 0.0, 1.0, True)
    ws = backend.workspace(dims, tokens, params)
    assert backend.evaluate(ws, starts, carry=True) == pytest.approx(np.mean(losses), rel=1e-5)
    for name, p in params.items():
        np.testing.assert_array_equal(backend.get(ws.params[name]), p)
