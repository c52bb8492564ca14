"""Every op of every backend against the oracle in float64, at odd shapes, and its bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastrnn import ops, reference
from fastrnn.backend import Backend
from tests.conftest import ALL_BACKENDS, Inputs, open_any
from tests.tolerances import RELATIVE_RMS, assert_close


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn, the CUDA C engine in the emulator among them."""
    return open_any(request.param)


def up(array: Any) -> Any:
    """The same values in float64: what the oracle computes with."""
    return np.asarray(array, np.float64)


class OnBackend:
    """Calls the backend's ops with NumPy arrays in and out, every output poisoned with NaN."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.backend.put(np.full(shape, np.nan, dtype))

    def __call__(self, op: str, *args: Any, out: Any = None) -> Any:
        put = [self.backend.put(a) if isinstance(a, np.ndarray) else a for a in args]
        if isinstance(out, tuple):
            out = tuple(self.poisoned(o.shape, o.dtype) for o in out)
        elif out is not None:
            out = self.poisoned(out.shape, out.dtype)
        result = getattr(self.backend, op)(*put, out=out)
        if isinstance(result, tuple):
            return tuple(self.backend.get(r) for r in result)
        return self.backend.get(result)


@pytest.fixture
def run(backend: Backend) -> OnBackend:
    return OnBackend(backend)


def recurrence_oracle(z: Any, W_hh: Any, h0: Any) -> Any:
    h, out = up(h0), []
    for z_t in up(z):
        h = np.tanh(z_t + h @ up(W_hh))
        out.append(h)
    return np.stack(out)


def test_window(backend: Backend) -> None:
    tokens = np.arange(100, 200, dtype=np.int32)
    starts = np.array([0, 93, 17], dtype=np.int32)
    x, y = backend.empty((6, 3), np.int32), backend.empty((6, 3), np.int32)
    backend.window(backend.put(tokens), backend.put(starts), out=(x, y))
    want = 100 + starts[None, :] + np.arange(6)[:, None]
    np.testing.assert_array_equal(backend.get(x), want)
    np.testing.assert_array_equal(backend.get(y), want + 1)


def test_gather(run: OnBackend, inputs: Inputs) -> None:
    W_xh, b_h = inputs.array(inputs.V, inputs.H), inputs.array(inputs.H)
    tokens = inputs.tokens(inputs.T, inputs.B)
    want = up(W_xh)[tokens] + up(b_h)
    assert_close("gather", run("gather", W_xh, tokens, b_h, out=want.astype(W_xh.dtype)), want)
    assert_close("gather", run("gather", W_xh, tokens, b_h), want)


@pytest.mark.parametrize("ids", ["random", "one distinct token", "all distinct tokens"])
def test_gather_backward(run: OnBackend, inputs: Inputs, ids: str) -> None:
    T, B, H = inputs.T, inputs.B, inputs.H
    V = T * B if ids == "all distinct tokens" else inputs.V
    dz, tokens = inputs.array(T, B, H), inputs.tokens(T, B)
    if ids == "one distinct token":
        tokens[:] = V - 1
    elif ids == "all distinct tokens":
        tokens = inputs.rng.permutation(V).astype(np.int32).reshape(T, B)
    dW, db = np.zeros((V, H)), up(dz).sum(axis=(0, 1))
    np.add.at(dW, tokens, up(dz))
    out = (dW.astype(dz.dtype), db.astype(dz.dtype))
    first = run("gather_backward", dz, tokens, V, out=out)
    assert_close("gather_backward", first[0], dW, "dW_xh")
    assert_close("gather_backward", first[1], db, "db_h")
    again = run("gather_backward", dz, tokens, V)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b, err_msg="not the same bits in a second run")


def test_recurrence(run: OnBackend, inputs: Inputs) -> None:
    T, B, H = inputs.T, inputs.B, inputs.H
    z, h0 = inputs.array(T, B, H), inputs.array(B, H, scale=0.5)
    W_hh = inputs.array(H, H, scale=H**-0.5)
    want = recurrence_oracle(z, W_hh, h0)
    assert_close("recurrence", run("recurrence", z, W_hh, h0, out=z), want)
    assert_close("recurrence", run("recurrence", z, W_hh, h0), want)


def test_recurrence_in_place(backend: Backend, inputs: Inputs) -> None:
    T, B, H = inputs.T, inputs.B, inputs.H
    z, h0 = inputs.array(T, B, H), inputs.array(B, H)
    W_hh = inputs.array(H, H, scale=H**-0.5)
    buffer = backend.put(z)
    backend.recurrence(buffer, backend.put(W_hh), backend.put(h0), out=buffer)
    assert_close("recurrence", backend.get(buffer), recurrence_oracle(z, W_hh, h0))


def test_recurrence_backward(run: OnBackend, inputs: Inputs) -> None:
    T, B, H = inputs.T, inputs.B, inputs.H
    dh, h0 = inputs.array(T, B, H), inputs.array(B, H, scale=0.5)
    W_hh = inputs.array(H, H, scale=H**-0.5)
    h = recurrence_oracle(inputs.array(T, B, H), W_hh, h0).astype(inputs.dtype)
    dz, dW, carry = np.empty((T, B, H)), np.zeros((H, H)), np.zeros((B, H))
    for t in reversed(range(T)):
        dz[t] = (up(dh[t]) + carry) * (1 - up(h[t]) ** 2)
        dW += up(h[t - 1] if t else h0).T @ dz[t]
        carry = dz[t] @ up(W_hh).T
    want = {"dz": dz, "dW_hh": dW, "dh0": carry}
    outs = tuple(w.astype(inputs.dtype) for w in want.values())
    for out in (outs, None):
        got = run("recurrence_backward", dh, h, W_hh, h0, out=out)
        for (name, w), g in zip(want.items(), got, strict=True):
            assert_close("recurrence_backward", g, w, name)


def test_project(run: OnBackend, inputs: Inputs) -> None:
    T, B, H, V = inputs.T, inputs.B, inputs.H, inputs.V
    h, W_hq, b_q = inputs.array(T, B, H), inputs.array(H, V), inputs.array(V)
    want = up(h) @ up(W_hq) + up(b_q)
    assert_close("project", run("project", h, W_hq, b_q, out=want.astype(h.dtype)), want)
    assert_close("project", run("project", h, W_hq, b_q), want)


def test_project_backward(run: OnBackend, inputs: Inputs) -> None:
    T, B, H, V = inputs.T, inputs.B, inputs.H, inputs.V
    dlogits, h, W_hq = inputs.array(T, B, V), inputs.array(T, B, H), inputs.array(H, V)
    flat = up(dlogits).reshape(-1, V)
    want = {
        "dh": up(dlogits) @ up(W_hq).T,
        "dW_hq": up(h).reshape(-1, H).T @ flat,
        "db_q": flat.sum(axis=0),
    }
    outs = tuple(w.astype(inputs.dtype) for w in want.values())
    for out in (outs, None):
        got = run("project_backward", dlogits, h, W_hq, out=out)
        for (name, w), g in zip(want.items(), got, strict=True):
            assert_close("project_backward", g, w, name)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["usual", "huge"])
def test_cross_entropy(run: OnBackend, inputs: Inputs, scale: float) -> None:
    T, B, V = inputs.T, inputs.B, inputs.V
    logits = inputs.array(T, B, V, scale=scale)
    targets = inputs.tokens(T, B)
    loss = np.float64(reference.cross_entropy(up(logits), targets))
    dlogits = np.exp(reference.log_softmax(up(logits)))
    np.put_along_axis(
        dlogits,
        targets[..., None],
        np.take_along_axis(dlogits, targets[..., None], axis=-1) - 1,
        axis=-1,
    )
    dlogits /= T * B
    outs = (np.zeros((), inputs.dtype), logits)
    for out in (outs, None):
        got_loss, got_dlogits = run("cross_entropy", logits, targets, out=out)
        assert got_loss.shape == ()
        assert_close("cross_entropy", got_loss, loss, "loss")
        # Where softmax saturates at the target the exact gradient is zero: compare absolutely then.
        limit = RELATIVE_RMS["cross_entropy"][inputs.dtype.name]
        error = np.abs(up(got_dlogits) - dlogits).max() * T * B
        assert error <= max(limit, limit * np.abs(dlogits).max() * T * B)


@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["clips", "leaves alone"])
def test_clip_by_global_norm(backend: Backend, inputs: Inputs, factor: float) -> None:
    grads = [inputs.array(inputs.V, inputs.H), inputs.array(inputs.H)]
    norm = np.sqrt(sum((up(g) ** 2).sum() for g in grads))
    max_norm = float(norm * factor)
    arrays = [backend.put(g) for g in grads]
    got = backend.get(backend.clip_by_global_norm(arrays, max_norm))
    assert_close("clip_by_global_norm", got, norm, "norm")
    for array, g in zip(arrays, grads, strict=True):
        if factor > 1:
            np.testing.assert_array_equal(backend.get(array), g)
        else:
            assert_close("clip_by_global_norm", backend.get(array), up(g) * factor)


def test_sgd(backend: Backend, inputs: Inputs) -> None:
    params, grads = inputs.array(inputs.V, inputs.H), inputs.array(inputs.V, inputs.H)
    array = backend.put(params)
    backend.sgd([array], [backend.put(grads)], 0.37)
    assert_close("sgd", backend.get(array), up(params) - 0.37 * up(grads))


def test_record_counts_steps_and_what_is_not_finite(backend: Backend) -> None:
    totals = backend.put(np.zeros(4))
    for loss, norm in [(1.5, 2.0), (np.nan, 1.0), (0.5, np.inf)]:
        backend.record(
            backend.put(np.array(loss, np.float32)), backend.put(np.array(norm, np.float32)), totals
        )
    got = backend.get(totals)
    assert got[2] == 3
    assert got[3] == 2
    assert np.isnan(got[0])


# --- Bad input: checked once, in fastrnn.ops --------------------------------------------------


@pytest.fixture
def good() -> dict[str, Any]:
    make = Inputs(4, 3, 5, 7, np.float32)
    return {
        "z": make.array(4, 3, 5),
        "W_hh": make.array(5, 5),
        "h0": make.array(3, 5),
        "W_xh": make.array(7, 5),
        "b_h": make.array(5),
        "tokens": make.tokens(4, 3),
        "logits": make.array(4, 3, 7),
    }


def test_wrong_shape_names_what_was_expected_and_what_came(good: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"W_hh must have shape \(5, 5\), got \(5, 4\)"):
        ops.recurrence(good["z"], good["W_hh"][:, :4], good["h0"])
    with pytest.raises(ValueError, match=r"z must have shape \(n >= 1, n >= 1, n >= 1\), got \(0"):
        ops.recurrence(good["z"][:0], good["W_hh"], good["h0"])


def test_mixed_dtypes_raise(good: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="h0 must be float32 like the other arrays, got float64"):
        ops.recurrence(good["z"], good["W_hh"], good["h0"].astype(np.float64))
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        ops.recurrence(good["z"].astype(int), good["W_hh"], good["h0"])


@pytest.mark.parametrize("bad", [-1, 7])
def test_token_out_of_range(good: dict[str, Any], bad: int) -> None:
    good["tokens"][2, 1] = bad
    with pytest.raises(ValueError, match=rf"in \[0, V\) with V = 7, got {bad}"):
        ops.gather(good["W_xh"], good["tokens"], good["b_h"])
    with pytest.raises(ValueError, match=rf"got {bad}"):
        ops.cross_entropy(good["logits"], good["tokens"])
    with pytest.raises(ValueError, match=rf"got {bad}"):
        ops.gather_backward(good["z"], good["tokens"], 7)


def test_not_an_array(good: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"got list"):
        ops.recurrence(good["z"].tolist(), good["W_hh"], good["h0"])


def test_non_contiguous_and_read_only_inputs_are_taken(good: dict[str, Any]) -> None:
    want = ops.recurrence(good["z"], good["W_hh"], good["h0"])
    turned = np.ascontiguousarray(good["z"].transpose(2, 0, 1)).transpose(1, 2, 0)
    frozen = good["W_hh"].copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(ops.recurrence(turned, frozen, good["h0"]), want)


def test_out_must_be_writable_in_place(good: dict[str, Any]) -> None:
    out = np.empty((4, 3, 10), np.float32)[:, :, ::2]
    with pytest.raises(ValueError, match="out must be C-contiguous and writable"):
        ops.recurrence(good["z"], good["W_hh"], good["h0"], out=out)


def test_clip_and_sgd_arguments(good: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one array"):
        ops.clip_by_global_norm([], 1.0)
    with pytest.raises(ValueError, match="max_norm must be > 0, got 0"):
        ops.clip_by_global_norm([good["z"]], 0)
    with pytest.raises(ValueError, match="as many grads as params, 1, got 0"):
        ops.sgd([good["z"]], [], 0.1)
