"""fastrnn.jax against ``lax.scan``, finite differences and the reference; JAX's transforms."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrnn import ops, reference
from fastrnn.backend import CPU_BACKENDS
from tests.conftest import Inputs
from tests.tolerances import RELATIVE_RMS, assert_close, relative_rms

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy
frj = pytest.importorskip("fastrnn.jax")

NAMES = ("W_xh", "b_h", "W_hh", "h0", "W_hq", "b_q")
FAILED = (jax.errors.JaxRuntimeError, ValueError)
"""What JAX raises when a program fails."""


CLOSE = {"eps": 1e-5, "atol": 1e-7, "rtol": 1e-7}
"""Central differences in float64: the truncation is of order eps², rounding of 1e-16 / eps."""


@contextlib.contextmanager
def x64(on: bool = True) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[Any]:
    """float32 as JAX is without options, float64 with 64-bit types enabled."""
    with x64(request.param == "float64"):
        yield np.dtype(request.param)


class Plain:
    """The ops as one writes them in JAX."""

    @staticmethod
    def gather(W_xh: Any, tokens: Any, b_h: Any) -> Any:
        return W_xh[tokens] + b_h

    @staticmethod
    def recurrence(z: Any, W_hh: Any, h0: Any) -> Any:
        def cell(h: Any, z_t: Any) -> Any:
            h = jnp.tanh(z_t + h @ W_hh)
            return h, h

        return jax.lax.scan(cell, h0, z)[1]

    @staticmethod
    def project(h: Any, W_hq: Any, b_q: Any) -> Any:
        return h @ W_hq + b_q

    @staticmethod
    def cross_entropy(logits: Any, targets: Any) -> Any:
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()


def model(lib: Any, p: dict[str, Any], x: Any, y: Any) -> tuple[Any, Any]:
    """Loss and hidden states of the whole model, written with the ops of ``lib``."""
    h = lib.recurrence(lib.gather(p["W_xh"], x, p["b_h"]), p["W_hh"], p["h0"])
    return lib.cross_entropy(lib.project(h, p["W_hq"], p["b_q"]), y), h


def problem(make: Inputs) -> tuple[dict[str, Any], Any, Any]:
    p = make.params() | {"h0": make.array(make.B, make.H, scale=0.5)}
    return p, make.tokens(make.T, make.B), make.tokens(make.T, make.B)


def op_cases(make: Inputs) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...], Any]]:
    """For each op: the arguments to differentiate, the tokens, a cotangent of the result."""
    T, B, H, V = make.T, make.B, make.H, make.V
    p, x, y = problem(make)
    z, h, dh = (make.array(T, B, H) for _ in range(3))
    logits, dlogits = make.array(T, B, V, scale=3.0), make.array(T, B, V)
    return {
        "gather": ((p["W_xh"], p["b_h"]), (x,), dh),
        "recurrence": ((z, p["W_hh"], p["h0"]), (), dh),
        "project": ((h, p["W_hq"], p["b_q"]), (), dlogits),
        "cross_entropy": ((logits,), (y,), make.array() * make.dtype.type(2)),
    }


def of_floats(lib: Any, op: str, tokens: tuple[Any, ...]) -> Callable[..., Any]:
    """The op as a function of the arguments that can be differentiated."""
    function = getattr(lib, op)
    if op == "gather":
        return lambda W_xh, b_h: function(W_xh, *tokens, b_h)
    return lambda *args: function(*args, *tokens)


def run_op(lib: Any, op: str, case: Any, wrap: Any = lambda f: f) -> list[Any]:
    """The result of an op and every gradient, as NumPy arrays."""
    args, tokens, cotangent = case

    def both(args: Any, cotangent: Any) -> Any:
        result, backward = jax.vjp(of_floats(lib, op, tokens), *args)
        return result, *backward(cotangent)

    got = wrap(both)(tuple(map(jnp.asarray, args)), jnp.asarray(cotangent))
    return [np.asarray(a) for a in got]


@functools.cache
def wanted(dims: tuple[int, int, int, int], dtype: Any, op: str) -> list[Any]:
    """What :func:`run_op` should return, by ``lax.scan`` in float64."""
    args, tokens, cotangent = op_cases(Inputs(*dims, dtype))[op]
    with x64():
        up = tuple(np.asarray(a, np.float64) for a in args)
        return run_op(Plain, op, (up, tokens, np.asarray(cotangent, np.float64)), jax.jit)


def check_op(op: str, got: list[Any], want: list[Any]) -> None:
    assert_close(op, got[0], want[0], "result")
    for i, (g, w) in enumerate(zip(got[1:], want[1:], strict=True)):
        row = "cross_entropy" if op == "cross_entropy" else f"{op}_backward"
        assert_close(row, g, w, f"gradient {i}")


# --- Values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("op", ["gather", "recurrence", "project", "cross_entropy"])
@pytest.mark.parametrize(
    "dims", [(1, 1, 1, 2), (7, 1, 16, 31), (5, 3, 37, 41), (3, 17, 130, 257)], ids=str
)
def test_results_and_every_gradient_are_those_of_scan(
    op: str, dims: tuple[int, int, int, int], dtype: Any
) -> None:
    case = op_cases(Inputs(*dims, dtype))[op]
    eager = run_op(frj, op, case)
    assert all(a.dtype == dtype for a in eager)
    check_op(op, eager, wanted(dims, dtype, op))
    for a, b in zip(eager, run_op(frj, op, case, jax.jit), strict=True):
        np.testing.assert_array_equal(a, b, err_msg="other bits under jit")


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_the_environment_chooses_the_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_BACKEND", name)
    make = Inputs(5, 3, 37, 41, np.float32)
    for op, case in op_cases(make).items():
        got = run_op(frj, op, case)
        check_op(op, got, wanted((5, 3, 37, 41), np.dtype(np.float32), op))
        np.testing.assert_array_equal(got[0], call_ops(op, case))


def call_ops(op: str, case: Any) -> Any:
    result = of_floats(ops, op, case[1])(*case[0])
    return result[0] if op == "cross_entropy" else result


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(2, 50), st.booleans())
def test_odd_shapes_against_the_reference(T: int, B: int, H: int, V: int, double: bool) -> None:
    make = Inputs(T, B, H, V, np.float64 if double else np.float32)
    p, x, y = problem(make)
    up = {name: a.astype(np.float64) for name, a in p.items()}
    h0 = up.pop("h0")
    hs, logits = reference.forward(x, h0, up)
    want, dh0 = reference.backward(x, y, h0, hs, logits, up)
    with x64(double):
        (loss, h), grads = jax.value_and_grad(functools.partial(model, frj), has_aux=True)(p, x, y)
        assert_close("cross_entropy", loss, np.float64(reference.cross_entropy(logits, y)))
    assert_close("recurrence", h, hs)
    limit = RELATIVE_RMS["step"][make.dtype.name]
    for name, w in {**want, "h0": dh0}.items():
        assert relative_rms(grads[name], w) <= limit, name


@pytest.mark.parametrize("op", ["gather", "recurrence", "project", "cross_entropy"])
def test_gradients_against_finite_differences(op: str) -> None:
    from jax.test_util import check_grads

    args, tokens, _ = op_cases(Inputs(4, 3, 5, 7, np.float64))[op]
    with x64():
        f = of_floats(frj, op, tokens)
        check_grads(f, args, order=1, modes=["rev"], **CLOSE)
        check_grads(jax.jit(f), args, order=1, modes=["rev"], **CLOSE)


def dz_without_tanh(saved: Any, dh: Any) -> Any:
    _, dW_hh, dh0 = frj._recurrence_backward(saved, dh)
    return dh, dW_hh, dh0


def dW_hh_transposed(saved: Any, dh: Any) -> Any:
    dz, dW_hh, dh0 = frj._recurrence_backward(saved, dh)
    return dz, dW_hh.T, dh0


@pytest.mark.parametrize("wrong", [dz_without_tanh, dW_hh_transposed])
def test_wrong_gradients_are_noticed(wrong: Any) -> None:
    from jax.test_util import check_grads

    class Wrong:
        recurrence = staticmethod(frj._differentiable(frj._recurrence_forward, wrong))

    dims = (4, 3, 5, 7)
    case = op_cases(Inputs(*dims, np.float64))["recurrence"]
    with x64():
        got, want = run_op(Wrong, "recurrence", case), wanted(dims, case[2].dtype, "recurrence")
        with pytest.raises(AssertionError, match="gradient"):
            check_op("recurrence", got, want)
        with pytest.raises(AssertionError):
            check_grads(Wrong.recurrence, case[0], order=1, modes=["rev"], **CLOSE)


def test_only_what_is_asked_for_is_differentiated(dtype: Any) -> None:
    """The gather's result may be dropped from the program, its gradient may not."""
    make = Inputs(4, 3, 5, 7, dtype)
    p, x, y = problem(make)
    rest = {name: p[name] for name in NAMES if name != "b_h"}

    def loss(b_h: Any) -> Any:
        return model(frj, rest | {"b_h": b_h}, x, y)[0]

    _, every = jax.value_and_grad(functools.partial(model, frj), has_aux=True)(p, x, y)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(p["b_h"]), every["b_h"])
    dW_xh = jax.jit(jax.grad(lambda W: frj.gather(W, x, p["b_h"]).sum()))(p["W_xh"])
    count = np.bincount(x.ravel(), minlength=7)
    np.testing.assert_array_equal(dW_xh, np.repeat(count[:, None], 5, axis=1))


def test_second_derivatives_and_forward_mode_say_what_to_do() -> None:
    make = Inputs(4, 3, 5, 7, np.float32)
    for op, (args, tokens, _) in op_cases(make).items():
        f = of_floats(frj, op, tokens)

        def total(a: Any, f: Any = f, rest: Any = args[1:]) -> Any:
            return (f(a, *rest) ** 2).sum()

        def slope(a: Any, total: Any = total) -> Any:
            return (jax.grad(total)(a) ** 2).sum()

        first = jnp.asarray(args[0])
        for second in (jax.grad(slope), jax.jit(jax.grad(slope)), jax.hessian(total)):
            with pytest.raises(NotImplementedError, match=r"first derivatives.*lax\.scan"):
                second(first)
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(total, (first,), (first,))


# --- Training --------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(p: Any, h0: Any, x: Any, y: Any, lr: Any, max_norm: Any) -> Any:
    def loss(p: Any) -> Any:
        value, h = model(frj, p | {"h0": h0}, x, y)
        return value, h[-1]

    (value, h), g = jax.value_and_grad(loss, has_aux=True)(p)
    norm = jnp.sqrt(sum(jnp.vdot(a, a) for a in jax.tree.leaves(g)))
    scale = lr * jnp.minimum(1.0, max_norm / norm)
    return jax.tree.map(lambda a, b: a - scale * b, p, g), h, value, norm


def test_training_follows_the_reference(dtype: Any) -> None:
    """Ten steps under one jit with donated parameters and state."""
    make = Inputs(6, 4, 20, 31, dtype)
    p, tokens = make.params(), make.tokens(4 * 61)
    want = {name: a.astype(np.float64) for name, a in p.items()}
    got, h = jax.tree.map(jnp.array, p), jnp.zeros((4, 20), dtype)
    state, steps = np.zeros((4, 20)), 0
    for x, y in reference.data_iter_consecutive(tokens, 4, 6):
        old = (got, h)
        got, h, loss, norm = train_step(got, h, x, y, 0.5, 0.7)
        assert all(a.is_deleted() for a in jax.tree.leaves(old))
        want_loss, want_norm, state = reference.train_step(x, y, state, want, 0.5, 0.7)
        assert_close("trajectory", loss, np.float64(want_loss), f"loss {steps}")
        assert_close("trajectory", norm, np.float64(want_norm), f"norm {steps}")
        steps += 1
    assert steps == 10
    for name, w in want.items():
        limit = RELATIVE_RMS["step"][dtype.name] * steps
        assert relative_rms(got[name], w) <= limit, name


EXAMPLE = """
import jax, numpy as np
from fastrnn.jax import cross_entropy, gather, project, recurrence
from fastrnn.reference import init_params

def loss(p, x, y, h0):  # tokens x, y [T, B]; state h0 [B, H]
    h = recurrence(gather(p["W_xh"], x, p["b_h"]), p["W_hh"], h0)
    return cross_entropy(project(h, p["W_hq"], p["b_q"]), y), h[-1]

step = jax.jit(jax.value_and_grad(loss, has_aux=True))
x = np.random.default_rng(0).integers(0, 1027, (36, 32))
(value, h), grads = step(init_params(1027, 256), x[:-1], x[1:], np.zeros((32, 256), "f4"))
"""


def test_the_example_runs() -> None:
    names: dict[str, Any] = {}
    exec(compile(EXAMPLE, "example", "exec"), names)
    assert names["value"] == pytest.approx(np.log(1027), rel=1e-3)
    assert names["grads"]["W_xh"].shape == (1027, 256)


# --- Transforms ------------------------------------------------------------------------------


@pytest.fixture
def arrays() -> dict[str, Any]:
    make = Inputs(6, 3, 17, 11, np.float32)
    p, x, y = problem(make)
    return {k: jnp.asarray(v) for k, v in (p | {"x": x, "y": y, "z": make.array(6, 3, 17)}).items()}


def test_every_call_gives_the_same_bits() -> None:
    make = Inputs(35, 32, 64, 101, np.float32)
    p, x, y = problem(make)

    def both(p: Any) -> Any:
        return jax.value_and_grad(functools.partial(model, frj), has_aux=True)(p, x, y)

    first = jax.tree.leaves(both(p))
    compiled = jax.jit(both)
    for _ in range(5):
        for a, b in zip(first, jax.tree.leaves(compiled(p)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert compiled._cache_size() == 1


def test_a_donated_input_is_given_up(arrays: dict[str, Any]) -> None:
    want = np.asarray(frj.recurrence(arrays["z"], arrays["W_hh"], arrays["h0"]))
    donating = jax.jit(frj.recurrence, donate_argnums=(0,))
    for _ in range(3):
        z = jnp.array(arrays["z"])
        np.testing.assert_array_equal(donating(z, arrays["W_hh"], arrays["h0"]), want)
        assert z.is_deleted()


@pytest.mark.parametrize("op", ["gather", "recurrence", "project", "cross_entropy"])
def test_vmap_is_a_loop(op: str) -> None:
    """Over every argument alone and over all, results and gradients: the bits of single calls."""
    args, tokens, cotangent = op_cases(Inputs(6, 3, 17, 11, np.float32))[op]
    N = 3
    stacked = [jnp.stack([a * (n + 1) for n in range(N)]) for a in args]

    def both(*args: Any) -> Any:
        result, backward = jax.vjp(of_floats(frj, op, tokens), *args)
        return result, *backward(jnp.asarray(cotangent))

    single = jax.jit(both)
    for mapped in ([True] * len(args), *np.eye(len(args), dtype=bool)):
        in_axes = tuple(0 if m else None for m in mapped)
        given_ = [s if m else a for m, s, a in zip(mapped, stacked, args, strict=True)]
        over = jax.vmap(both, in_axes=in_axes)
        for got in (jax.jit(over)(*given_), over(*given_) if all(mapped) else ()):
            for n in range(N if got else 0):
                want = single(*(a[n] if m else a for a, m in zip(given_, mapped, strict=True)))
                for a, b in zip(got, want, strict=True):
                    np.testing.assert_array_equal(a[n], b, err_msg=f"vmap over {in_axes}")


def test_vmap_over_tokens(arrays: dict[str, Any]) -> None:
    tokens = jnp.stack([arrays["x"], arrays["y"]])
    got = jax.vmap(frj.gather, in_axes=(None, 0, None))(arrays["W_xh"], tokens, arrays["b_h"])
    for n in range(2):
        want = frj.gather(arrays["W_xh"], tokens[n], arrays["b_h"])
        np.testing.assert_array_equal(got[n], want)
    tokens = tokens.at[1, 0, 0].set(12)
    with pytest.raises(FAILED, match=r"tokens must be in \[0, V\).*got 12"):
        np.asarray(
            jax.vmap(frj.gather, in_axes=(None, 0, None))(arrays["W_xh"], tokens, arrays["b_h"])
        )


def test_scan_over_segments_is_one_long_recurrence(arrays: dict[str, Any]) -> None:
    """The op inside ``lax.scan``, and gradients through it, ``checkpoint`` included."""
    weights = jnp.linspace(-1.0, 1.0, 6 * 3 * 17).reshape(6, 3, 17)

    def segments(z: Any, W_hh: Any, h0: Any, wrap: Any) -> Any:
        def segment(h: Any, part: Any) -> Any:
            hs = frj.recurrence(part, W_hh, h)
            return hs[-1], hs

        hs = jax.lax.scan(wrap(segment), h0, z.reshape(3, 2, 3, 17))[1]
        return (hs.reshape(z.shape) * weights).sum()

    def whole(z: Any, W_hh: Any, h0: Any) -> Any:
        return (frj.recurrence(z, W_hh, h0) * weights).sum()

    args = (arrays["z"], arrays["W_hh"], arrays["h0"])
    want = jax.grad(whole, argnums=(0, 1, 2))(*args)
    for wrap in (lambda f: f, jax.checkpoint):
        f = functools.partial(segments, wrap=wrap)
        np.testing.assert_allclose(f(*args), whole(*args), rtol=1e-5)
        for transform in (lambda g: g, jax.jit):
            for g, w in zip(transform(jax.grad(f, argnums=(0, 1, 2)))(*args), want, strict=True):
                assert_close("recurrence_backward", g, w)


def test_checkpoint_recomputes_the_same_bits(arrays: dict[str, Any]) -> None:
    p = {name: arrays[name] for name in NAMES}

    def loss(p: Any) -> Any:
        return model(frj, p, arrays["x"], arrays["y"])[0]

    want = jax.value_and_grad(loss)(p)
    policies = (None, jax.checkpoint_policies.dots_saveable)
    for policy in policies:
        again = jax.checkpoint(loss, policy=policy)
        for wrap in (lambda f: f, jax.jit):
            got = wrap(jax.value_and_grad(again))(p)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(a, b)


def test_many_threads_and_independent_calls_in_one_program() -> None:
    """XLA runs independent calls on threads of its own, while others wait for their turn."""
    make = Inputs(12, 16, 96, 5, np.float32)
    z, W_hh, h0 = (jnp.asarray(a) for a in op_cases(make)["recurrence"][0])

    def several(z: Any, W_hh: Any, h0: Any) -> Any:
        parts = [frj.recurrence(z * i @ W_hh, W_hh, h0) @ W_hh for i in range(8)]
        return sum(parts), jax.grad(lambda W: frj.recurrence(z, W, h0).sum())(W_hh)

    f = jax.jit(several)
    want = [np.asarray(a) for a in f(z, W_hh, h0)]
    wrong: list[str] = []

    def work() -> None:
        try:
            for _ in range(10):
                got = f(z, W_hh, h0)
                if not all(np.array_equal(g, w) for g, w in zip(got, want, strict=True)):
                    wrong.append("other bits")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert wrong == []


def in_another_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


def test_shard_map_over_the_batch() -> None:
    """Two devices, half of the batch each; the gradient of the shared weights is their sum."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from fastrnn import jax as frj
rng = np.random.default_rng(0)
z, W, h0 = (rng.standard_normal(s).astype("f4") for s in ((5, 8, 16), (16, 16), (8, 16)))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("b",))
split = jax.shard_map(frj.recurrence, mesh=mesh, in_specs=(P(None, "b"), P(), P("b")),
                      out_specs=P(None, "b"), check_vma=False)
def grad(f):
    return jax.jit(jax.grad(lambda *args: (f(*args) ** 2).sum(), argnums=(0, 1, 2)))(z, W, h0)
np.testing.assert_array_equal(jax.jit(split)(z, W, h0), frj.recurrence(z, W, h0))
for got, want in zip(grad(split), grad(frj.recurrence)):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
print(jax.device_count())
"""
    result = in_another_process(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.stdout.strip() == "2", result.stderr


def test_leaving_python_waits_for_calls_in_flight() -> None:
    """An operand that is not ready makes the call asynchronous; its callback needs Python."""
    code = """
import jax, jax.numpy as jnp
from fastrnn import jax as frj
z, W, h0 = jnp.ones((200, 32, 256)), jnp.ones((256, 256)) * 0.01, jnp.ones((32, 256))
slow, f = jax.jit(lambda z: z @ W @ W @ W @ W), jax.jit(frj.recurrence)
f(slow(z), W, h0).block_until_ready()
last = f(f(slow(z), W, h0), W, h0)
print("leaving")
"""
    result = in_another_process(code)
    assert (result.returncode, result.stdout.strip()) == (0, "leaving"), result.stderr


# --- Other devices than a CPU ----------------------------------------------------------------


@pytest.mark.parametrize("op", ["gather", "recurrence", "project", "cross_entropy"])
@pytest.mark.parametrize("transform", ["plain", "grad", "vmap", "vmap of grad"])
@pytest.mark.filterwarnings("ignore:fastrnn.jax has kernels for the CPU only")
def test_a_program_for_a_gpu_holds_no_callback(op: str, transform: str) -> None:
    args, tokens, cotangent = op_cases(Inputs(6, 3, 17, 11, np.float32))[op]
    f = of_floats(frj, op, tokens)
    if "grad" in transform:
        of_op = f

        def f(*args: Any) -> Any:
            return jax.vjp(of_op, *args)[1](jnp.asarray(cotangent))

    if "vmap" in transform:
        f, args = jax.vmap(f), tuple(np.stack([a, a]) for a in args)
    for platform in ("cuda", "rocm", "tpu"):
        text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        assert "custom_call" not in text
        assert "callback" not in text
        if op == "recurrence":
            assert "stablehlo.while" in text
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert bool(products) == (op in ("recurrence", "project"))
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    on_cpu = jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    assert "callback" in on_cpu or (op, transform[-4:]) == ("cross_entropy", "grad")
    assert "stablehlo.while" not in on_cpu or "vmap" in transform


@pytest.fixture
def in_plain_jax(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs on a GPU, on the CPU."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args), raising=True
    )
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fastrnn.jax has kernels for the CPU only")
        yield
    jax.clear_caches()


@pytest.mark.parametrize("op", ["gather", "recurrence", "project", "cross_entropy"])
@pytest.mark.parametrize("dims", [(1, 1, 1, 2), (7, 1, 16, 31), (3, 17, 130, 257)], ids=str)
@pytest.mark.usefixtures("in_plain_jax")
def test_plain_jax_gives_the_same_results_and_gradients(
    op: str, dims: tuple[int, int, int, int], dtype: Any
) -> None:
    case = op_cases(Inputs(*dims, dtype))[op]
    for wrap in (lambda f: f, jax.jit):
        got = run_op(frj, op, case, wrap)
        assert all(a.dtype == dtype for a in got)
        check_op(op, got, wanted(dims, dtype, op))
    args, tokens, _ = case
    text = str(jax.make_jaxpr(of_floats(frj, op, tokens))(*args))
    assert "fastrnn_in_plain_jax" in text
    assert "buffer_callback" not in text


@pytest.mark.usefixtures("in_plain_jax")
def test_plain_jax_under_vmap(arrays: dict[str, Any]) -> None:
    tokens = jnp.stack([arrays["x"], arrays["y"]])

    def loss(z: Any, x: Any) -> Any:
        h = frj.recurrence(z + frj.gather(arrays["W_xh"], x, arrays["b_h"]), *recurrent)
        return frj.cross_entropy(frj.project(h, arrays["W_hq"], arrays["b_q"]), x)

    recurrent = arrays["W_hh"], arrays["h0"]
    zs = jnp.stack([arrays["z"], 2 * arrays["z"]])
    got = jax.vmap(jax.value_and_grad(loss))(zs, tokens)
    for n in range(2):
        want = jax.value_and_grad(loss)(zs[n], tokens[n])
        np.testing.assert_allclose(got[0][n], want[0], rtol=1e-6)
        assert_close("recurrence_backward", got[1][n], np.asarray(want[1], np.float64))


@pytest.mark.parametrize("bad", [-1, 11, 2**32 + 1])
@pytest.mark.usefixtures("in_plain_jax")
def test_a_traced_token_out_of_range_makes_nan_in_plain_jax(
    arrays: dict[str, Any], bad: int
) -> None:
    a = arrays
    with x64():
        tokens = a["x"].astype(np.int64).at[2, 1].set(bad)
        z, backward = jax.jit(lambda t: jax.vjp(lambda W: frj.gather(W, t, a["b_h"]), a["W_xh"]))(
            tokens
        )
        assert np.isnan(z[2, 1]).all()
        assert np.isfinite(np.delete(z.reshape(18, 17), 7, axis=0)).all()
        assert backward(jnp.ones_like(z))[0].shape == (11, 17)
        loss, dlogits = jax.jit(jax.value_and_grad(frj.cross_entropy))(
            jnp.zeros((6, 3, 11)), tokens
        )
        assert np.isnan(loss)
        assert np.isnan(dlogits[2, 1]).all()
        with pytest.raises(ValueError, match=rf"in \[0, V\) with V = 11, got {bad}"):
            frj.gather(a["W_xh"], tokens, a["b_h"])


def test_one_warning_in_a_process() -> None:
    code = """
import warnings
import jax, jax.numpy as jnp
from fastrnn import jax as frj
args = jnp.ones((5, 3, 7)), jnp.ones((7, 7)), jnp.ones((3, 7))

def lower(f, platform):
    jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lower(frj.recurrence, "cpu")
    frj.recurrence(*args).block_until_ready()
    print(len(caught))
    for f in (frj.recurrence, jax.grad(lambda *a: frj.recurrence(*a).sum(), argnums=(0, 1))):
        lower(f, "cuda")
        print(len(caught))
print(caught[0].category.__name__, caught[0].message)
"""
    result = in_another_process(code)
    assert result.returncode == 0, result.stderr
    zero, one, still_one, text = result.stdout.strip().splitlines()
    assert (zero, one, still_one) == ("0", "1", "1")
    assert text.startswith("UserWarning fastrnn.jax has kernels for the CPU only")


# --- Bad input -------------------------------------------------------------------------------


@pytest.fixture(params=["eager", "jit", "grad"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call an op in one of three ways; only arrays of floats are traced by ``grad``."""

    def run(op: str, *args: Any) -> Any:
        f = getattr(frj, op)
        if request.param == "jit":
            return jax.jit(f)(*args)
        if request.param == "grad":
            rest = args[1:]
            return jax.grad(lambda a: f(a, *rest).sum())(args[0])
        return f(*args)

    return run


def test_wrong_shapes_say_what_was_expected(
    arrays: dict[str, Any], call: Callable[..., Any]
) -> None:
    a = arrays
    with pytest.raises(ValueError, match=r"W_hh must have shape \(17, 17\), got \(17, 16\)"):
        call("recurrence", a["z"], a["W_hh"][:, :16], a["h0"])
    with pytest.raises(ValueError, match=r"h0 must have shape \(3, 17\), got \(17,\)"):
        call("recurrence", a["z"], a["W_hh"], a["h0"][0])
    with pytest.raises(ValueError, match=r"z must have shape \(n >= 1, n >= 1, n >= 1\), got \(0,"):
        call("recurrence", a["z"][:0], a["W_hh"], a["h0"])
    with pytest.raises(ValueError, match=r"b_h must have shape \(17,\), got \(16,\)"):
        call("gather", a["W_xh"], a["x"], a["b_h"][:16])
    with pytest.raises(ValueError, match=r"tokens must have shape .*got \(3,\)"):
        call("gather", a["W_xh"], a["x"][0], a["b_h"])
    with pytest.raises(ValueError, match=r"W_hq must have shape \(17, n >= 1\), got \(16, 11\)"):
        call("project", a["z"], a["W_hq"][:16], a["b_q"])
    with pytest.raises(ValueError, match=r"b_q must have shape \(11,\), got \(10,\)"):
        call("project", a["z"], a["W_hq"], a["b_q"][:10])
    with pytest.raises(ValueError, match=r"targets must have shape \(6, 3\), got \(5, 3\)"):
        call("cross_entropy", a["z"], a["y"][:5])


def test_wrong_dtypes_raise(arrays: dict[str, Any], call: Callable[..., Any]) -> None:
    a = arrays
    with pytest.raises(TypeError, match="z must be float32 or float64, got bfloat16"):
        call("recurrence", a["z"].astype(jnp.bfloat16), a["W_hh"], a["h0"])
    with pytest.raises(TypeError, match="tokens must be int32 or int64, got int16"):
        call("gather", a["W_xh"], a["x"].astype(jnp.int16), a["b_h"])
    with x64():
        with pytest.raises(TypeError, match=r"h0 must be float32 like the other.*got float64"):
            call("recurrence", a["z"], a["W_hh"], a["h0"].astype(np.float64))
        with pytest.raises(TypeError, match=r"W_hq must be float64 like the other.*got float32"):
            call("project", a["z"].astype(np.float64), a["W_hq"], a["b_q"])


def test_what_is_not_an_array_is_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="z must be a JAX or NumPy array, got list"):
        frj.recurrence(arrays["z"].tolist(), arrays["W_hh"], arrays["h0"])
    with pytest.raises(TypeError, match="b_q must be a JAX or NumPy array, got float"):
        frj.project(arrays["z"], arrays["W_hq"], 0.0)


def test_numpy_arrays_are_taken_as_jax_takes_them(arrays: dict[str, Any]) -> None:
    z, W_hh, h0 = (np.asarray(arrays[k], np.float64) for k in ("z", "W_hh", "h0"))
    h = frj.recurrence(z, W_hh, h0)
    assert isinstance(h, jax.Array)
    np.testing.assert_array_equal(h, frj.recurrence(arrays["z"], arrays["W_hh"], arrays["h0"]))
    assert h.dtype == np.float32
    with x64():
        assert frj.recurrence(z, W_hh, h0).dtype == np.float64


@pytest.mark.parametrize("bad", [-1, 11, 2**32 + 1])
def test_known_tokens_out_of_range_raise_at_once(arrays: dict[str, Any], bad: int) -> None:
    tokens = np.array(arrays["x"], np.int64)
    tokens[2, 1] = bad
    for enabled in (False, True):
        with x64(enabled), pytest.raises(ValueError, match=rf"in \[0, V\) with V = 11, got {bad}"):
            frj.gather(arrays["W_xh"], tokens, arrays["b_h"])
    logits = jnp.zeros((6, 3, 11))
    with pytest.raises(ValueError, match=rf"targets must be .* got {bad}"):
        frj.cross_entropy(logits, tokens)
    with pytest.raises(ValueError, match=rf"targets must be .* got {bad}"):
        jax.grad(frj.cross_entropy)(logits, tokens)


@pytest.mark.parametrize("bad", [-1, 11, 2**32 + 1])
def test_traced_tokens_out_of_range_raise_when_the_result_is_awaited(
    arrays: dict[str, Any], bad: int
) -> None:
    a = arrays
    with x64():
        tokens = a["x"].astype(np.int64).at[2, 1].set(bad)

        def backward_only(tokens: Any) -> Any:
            return jax.grad(lambda W: frj.gather(W, tokens, a["b_h"]).sum())(a["W_xh"])

        for f in (
            lambda t: jax.jit(frj.gather)(a["W_xh"], t, a["b_h"]),
            lambda t: jax.jit(frj.cross_entropy)(jnp.zeros((6, 3, 11)), t),
            jax.jit(backward_only),
        ):
            message = rf"(tokens|targets) must be in \[0, V\) with V = 11, got {bad}"
            with pytest.raises(FAILED, match=message):
                np.asarray(f(tokens))
            assert np.isfinite(f(a["x"])).all()


def test_without_jax_the_import_names_the_extra() -> None:
    code = "import sys; sys.modules['jax'] = None; import fastrnn.jax"
    result = in_another_process(code)
    assert result.returncode == 1
    assert 'ImportError: fastrnn.jax needs JAX 0.6.1 or later: pip install "fastrnn[jax]"' in (
        result.stderr
    )
