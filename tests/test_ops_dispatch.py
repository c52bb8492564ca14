"""Dispatch of ``fastrnn.ops`` by the kind of array: same values, same kind out, no copies."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn import ops
from fastrnn.backend import BackendUnavailableError, open_backend
from fastrnn.backends.numpy_ import NumpyBackend
from tests.conftest import Inputs

T, B, H, V = 5, 3, 7, 11


class Wrapped:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device


class Kind:
    """How a test makes arrays of one kind and reads them."""

    def __init__(self, make: Callable[[Any], Any], cls: type, result: type | None = None) -> None:
        self.make, self.cls, self.result = make, cls, result or cls

    @staticmethod
    def host(array: Any) -> Any:
        return np.asarray(array)


def torch_kind() -> Kind:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return Kind(lambda a: torch.from_numpy(a.copy()), torch.Tensor)


def jax_kind() -> Kind:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    return Kind(jax.numpy.asarray, jax.Array)


def numpy_kind() -> Kind:
    return Kind(np.array, np.ndarray)


def dlpack_kind() -> Kind:
    return Kind(lambda a: Wrapped(a.copy()), Wrapped, np.ndarray)


KINDS = {"numpy": numpy_kind, "torch": torch_kind, "jax": jax_kind, "dlpack": dlpack_kind}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]()


@pytest.fixture(params=["torch", "numpy"])
def mutable(request: pytest.FixtureRequest) -> Kind:
    """The kinds of array that ops can write to."""
    return KINDS[request.param]()


@pytest.fixture
def arrays() -> dict[str, Any]:
    make = Inputs(T, B, H, V, np.float32)
    return {
        **make.params(),
        "z": make.array(T, B, H),
        "h": np.tanh(make.array(T, B, H)),
        "dh": make.array(T, B, H),
        "h0": make.array(B, H),
        "dlogits": make.array(T, B, V),
        "tokens": make.tokens(T, B),
    }


CALLS: dict[str, tuple[Any, ...]] = {
    "gather": ("W_xh", "tokens", "b_h"),
    "gather_backward": ("dh", "tokens", V),
    "recurrence": ("z", "W_hh", "h0"),
    "recurrence_backward": ("dh", "h", "W_hh", "h0"),
    "project": ("h", "W_hq", "b_q"),
    "project_backward": ("dlogits", "h", "W_hq"),
    "cross_entropy": ("dlogits", "tokens"),
}


def call(op: str, arrays: dict[str, Any], make: Callable[[Any], Any], out: Any = None) -> Any:
    args = [make(arrays[a]) if isinstance(a, str) else a for a in CALLS[op]]
    result = getattr(ops, op)(*args, out=out)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", CALLS)
def test_every_kind_gives_the_same_bits_and_its_own_kind(
    op: str, kind: Kind, arrays: dict[str, Any]
) -> None:
    want = call(op, arrays, np.array)
    got = call(op, arrays, kind.make)
    for g, w in zip(got, want, strict=True):
        assert isinstance(g, kind.result)
        np.testing.assert_array_equal(kind.host(g), w, strict=True)


@pytest.mark.parametrize("op", CALLS)
def test_out_is_written_and_returned(op: str, mutable: Kind, arrays: dict[str, Any]) -> None:
    want = call(op, arrays, np.array)
    out: Any = tuple(mutable.make(np.full_like(w, np.nan)) for w in want)
    got = call(op, arrays, mutable.make, out=out if len(out) > 1 else out[0])
    for g, o, w in zip(got, out, want, strict=True):
        assert g is o
        np.testing.assert_array_equal(mutable.host(g), w)


@pytest.mark.parametrize("op", CALLS)
def test_strided_read_only_and_unaligned_inputs(op: str, arrays: dict[str, Any]) -> None:
    def strided(a: Any) -> Any:
        wide = np.zeros((*a.shape, 2), a.dtype)
        wide[..., 1] = a
        return wide[..., 1]

    def read_only(a: Any) -> Any:
        a = a.copy()
        a.flags.writeable = False
        return a

    def unaligned(a: Any) -> Any:
        raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
        view = raw.view(a.dtype).reshape(a.shape)
        view[...] = a
        assert not view.flags.aligned
        return view

    want = call(op, arrays, np.array)
    for make in (strided, read_only, unaligned, np.asfortranarray):
        for g, w in zip(call(op, arrays, make), want, strict=True):
            np.testing.assert_array_equal(g, w, err_msg=make.__name__)


def test_read_only_inputs_are_neither_copied_nor_written(
    arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Spy(NumpyBackend):
        def recurrence(self, z: Any, W_hh: Any, h0: Any, out: Any = None) -> Any:
            seen.extend((z, W_hh, h0))
            return super().recurrence(z, W_hh, h0, out)

    monkeypatch.setattr(ops, "_cpu_backend", lambda override: Spy())
    given = [arrays[name] for name in CALLS["recurrence"]]
    for array in given:
        array.flags.writeable = False
    copies = [array.copy() for array in given]
    ops.recurrence(*given)
    for array, view, copy in zip(given, seen, copies, strict=True):
        assert np.shares_memory(array, view)
        np.testing.assert_array_equal(array, copy)
        assert not array.flags.writeable


def test_in_place_ops(mutable: Kind, arrays: dict[str, Any]) -> None:
    names = ("W_hh", "b_h")
    want = [arrays[n].copy() for n in names]
    want_norm = ops.clip_by_global_norm(want, 0.5)
    grads = [mutable.make(arrays[n]) for n in names]
    norm = ops.clip_by_global_norm(grads, 0.5)
    assert isinstance(norm, mutable.cls)
    np.testing.assert_array_equal(mutable.host(norm), want_norm, strict=True)
    params = [mutable.make(arrays[n]) for n in names]
    ops.sgd(params, grads, 0.1)
    for p, g, w, n in zip(params, grads, want, names, strict=True):
        np.testing.assert_array_equal(mutable.host(g), w)
        np.testing.assert_array_equal(mutable.host(p), arrays[n] - np.float32(0.1) * w)


def test_immutable_arrays_are_not_written(arrays: dict[str, Any]) -> None:
    kind = jax_kind()
    grads = [kind.make(arrays["W_hh"])]
    with pytest.raises(ValueError, match=r"grads\[0\] must be C-contiguous and writable"):
        ops.clip_by_global_norm(grads, 0.1)
    with pytest.raises(ValueError, match="out must be C-contiguous and writable"):
        call("recurrence", arrays, kind.make, out=kind.make(arrays["z"]))


def test_out_may_be_the_input_the_docstring_names(arrays: dict[str, Any]) -> None:
    want = call("recurrence", arrays, np.array)[0]
    z = arrays["z"]
    assert ops.recurrence(z, arrays["W_hh"], arrays["h0"], out=z) is z
    np.testing.assert_array_equal(z, want)


def test_out_on_memory_that_is_still_needed(arrays: dict[str, Any]) -> None:
    buffer = np.zeros((T + 1, B, H), np.float32)
    z, h, W_hh, h0 = (arrays[n] for n in ("z", "h", "W_hh", "h0"))
    logits, dW = arrays["dlogits"], np.zeros((H, H), np.float32)
    with pytest.raises(ValueError, match="out overlaps an input or another output"):
        ops.recurrence(buffer[1:], W_hh, h0, out=buffer[:-1])
    with pytest.raises(ValueError, match="out overlaps an input or another output"):
        ops.recurrence(z[:1], W_hh, buffer[0], out=buffer[:1])
    with pytest.raises(ValueError, match="out overlaps an input or another output"):
        ops.recurrence_backward(buffer[1:], h, W_hh, h0, (buffer[1:], dW, buffer[2]))
    with pytest.raises(ValueError, match="out overlaps an input or another output"):
        ops.cross_entropy(logits, arrays["tokens"], (logits[0, 0, :1].reshape(()), logits))
    # dz may lie on dh, but not on an h that is the same array: dW_hh is made of it
    with pytest.raises(ValueError, match="out overlaps an input or another output"):
        ops.recurrence_backward(h, h, W_hh, h0, (h, dW, np.zeros_like(h0)))


def test_autograd_learns_that_a_tensor_was_written(arrays: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    z, W_hh, h0 = (torch.from_numpy(arrays[n]) for n in CALLS["recurrence"])
    writers: dict[str, Callable[[Any], Any]] = {
        "sgd": lambda t: ops.sgd([t], [t.clone()], 0.5),
        "clip_by_global_norm": lambda t: ops.clip_by_global_norm([t], 0.01),
        "recurrence": lambda t: ops.recurrence(z, W_hh, h0, out=t),
    }
    for name, write in writers.items():
        leaf = torch.ones_like(z, requires_grad=True)
        loss = (leaf * leaf).sum()
        with torch.no_grad():
            write(leaf)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with torch.inference_mode():
            tensor = torch.ones_like(z)
            write(tensor)
        assert not torch.equal(tensor, torch.ones_like(z)), name


def test_kinds_do_not_mix(arrays: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    z, W_hh, h0 = (torch.from_numpy(arrays[n]) for n in CALLS["recurrence"])
    with pytest.raises(TypeError, match="W_hh must be a torch tensor on cpu like the first, got a"):
        ops.recurrence(z, arrays["W_hh"], h0)
    with pytest.raises(TypeError, match="out must be a torch tensor on cpu"):
        ops.recurrence(z, W_hh, h0, out=arrays["z"])
    with pytest.raises(TypeError, match="h0 must be a NumPy array like the first, got a torch ten"):
        ops.recurrence(arrays["z"], arrays["W_hh"], h0)


def test_torch_tensors_that_cannot_be_taken(arrays: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    z, W_hh, h0 = (torch.from_numpy(arrays[n]) for n in CALLS["recurrence"])
    with pytest.raises(TypeError, match=r"z must be .* of torch.bfloat16"):
        ops.recurrence(z.bfloat16(), W_hh, h0)
    with pytest.raises(TypeError, match="z must be float32 or float64, got float16"):
        ops.recurrence(z.half(), W_hh, h0)
    with pytest.raises(TypeError, match="CPU or CUDA device, got one on meta"):
        ops.recurrence(z.to("meta"), W_hh, h0)
    with pytest.raises(TypeError, match=r"dense tensor, got layout torch.sparse_coo"):
        ops.recurrence(z, W_hh.to_sparse(), h0)
    W_hh.requires_grad_()
    with pytest.raises(
        ValueError, match=r"W_hh requires grad, and fastrnn.ops records no gradients"
    ):
        ops.recurrence(z, W_hh, h0)
    with torch.no_grad():
        np.testing.assert_array_equal(
            ops.recurrence(z, W_hh, h0), call("recurrence", arrays, np.array)[0]
        )


def test_torch_tensors_share_their_memory(arrays: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    z = torch.from_numpy(arrays["z"])
    h = ops.recurrence(z, torch.from_numpy(arrays["W_hh"]), torch.from_numpy(arrays["h0"]), out=z)
    assert h is z
    np.testing.assert_array_equal(arrays["z"], h.numpy())
    tokens = torch.from_numpy(arrays["tokens"]).long()
    W_xh, b_h = torch.from_numpy(arrays["W_xh"]), torch.from_numpy(arrays["b_h"])
    np.testing.assert_array_equal(
        ops.gather(W_xh, tokens, b_h), call("gather", arrays, np.array)[0]
    )


def test_tracers_are_refused(arrays: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    with pytest.raises(TypeError, match=r"z must .*Tracer"):
        jax.jit(ops.recurrence)(arrays["z"], arrays["W_hh"], arrays["h0"])


def test_objects_that_are_not_arrays(arrays: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"z must be a NumPy, CuPy or torch array.*got list"):
        ops.recurrence([[1.0]], arrays["W_hh"], arrays["h0"])
    with pytest.raises(TypeError, match="V must be an int, got float"):
        ops.gather_backward(arrays["dh"], arrays["tokens"], 11.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"out must be \(loss, dlogits\), got ndarray"):
        ops.cross_entropy(arrays["dlogits"], arrays["tokens"], arrays["dlogits"])
    with pytest.raises(TypeError, match="out loss must be an array, got None"):
        ops.cross_entropy(arrays["dlogits"], arrays["tokens"], (None, arrays["dlogits"]))
    with pytest.raises(TypeError, match="z must be float32 or float64, got >f4"):
        ops.recurrence(arrays["z"].astype(">f4"), arrays["W_hh"], arrays["h0"])


def test_the_environment_chooses_the_cpu_backend(
    arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_BACKEND", "abacus")
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        ops.recurrence(arrays["z"], arrays["W_hh"], arrays["h0"])
    for name in ("", "auto", "cupy", " numpy "):  # the arrays are not on a GPU
        monkeypatch.setenv("FASTRNN_BACKEND", name)
        ops.recurrence(arrays["z"], arrays["W_hh"], arrays["h0"])


def test_many_threads_at_once(arrays: dict[str, Any]) -> None:
    want = call("recurrence_backward", arrays, np.array)
    wrong: list[str] = []

    def work() -> None:
        try:
            for _ in range(50):
                got = call("recurrence_backward", arrays, np.array)
                if not all(np.array_equal(g, w) for g, w in zip(got, want, strict=True)):
                    wrong.append("other bits")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- CuPy, where there is none: NumPy under CuPy's name shows which branch was taken -----------


class FakeCupyArray:
    """A NumPy array behind the part of ``cupy.ndarray`` that dispatch and checks rely on."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.device = FakeDevice(0)
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)

    def copy(self, order: Any) -> FakeCupyArray:
        return FakeCupyArray(self.array.copy(order))

    def astype(self, dtype: Any, **options: Any) -> FakeCupyArray:
        return FakeCupyArray(self.array.astype(dtype, **options))


class FakeDevice(contextlib.AbstractContextManager[None]):
    """A CuPy device or stream; the work done inside it is counted on the class."""

    inside: list[tuple[Any, ...]]

    def __init__(self, *identity: Any) -> None:
        self.id, self.identity = identity[0], identity

    def __enter__(self) -> None:
        FakeDevice.inside.append(self.identity)

    def __exit__(self, *exc: object) -> None:
        FakeDevice.inside.pop()


class FakeCupyBackend(NumpyBackend):
    calls: list[tuple[str, list[tuple[Any, ...]]]]

    def __init__(self) -> None:
        self.calls = []

    def gather(self, W_xh: Any, tokens: Any, b_h: Any, out: Any = None) -> Any:
        self.calls.append(("gather", list(FakeDevice.inside)))
        host = super().gather(W_xh.array, tokens.array, b_h.array, out and out.array)
        return out or FakeCupyArray(host)


class PoolError(MemoryError):
    """What CuPy's pool raises for 5 MiB that it does not have."""

    _size = 5 << 20


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupyBackend:
    module: Any = types.ModuleType("cupy")
    module.ndarray = FakeCupyArray
    module.from_dlpack = lambda a: FakeCupyArray(a.array if isinstance(a, Wrapped) else a.numpy())
    module.cuda = types.SimpleNamespace(
        Device=FakeDevice,
        ExternalStream=FakeDevice,
        memory=types.SimpleNamespace(OutOfMemoryError=PoolError),
        runtime=types.SimpleNamespace(CUDARuntimeError=RuntimeError),
        driver=types.SimpleNamespace(CUDADriverError=RuntimeError),
        Stream=types.SimpleNamespace(
            from_external=lambda stream: FakeDevice(*stream.__cuda_stream__())
        ),
    )
    backend = FakeCupyBackend()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(
        ops, "open_backend", lambda name: backend if name == "cupy" else open_backend(name)
    )
    FakeDevice.inside = []
    return backend


def test_cupy_arrays(fake_cupy: FakeCupyBackend, arrays: dict[str, Any]) -> None:
    want = call("gather", arrays, np.array)[0]
    z = call("gather", arrays, lambda a: FakeCupyArray(np.asfortranarray(a)))[0]
    assert isinstance(z, FakeCupyArray)
    np.testing.assert_array_equal(z.array, want)
    assert fake_cupy.calls == [("gather", [(0,)])]
    out = FakeCupyArray(np.zeros_like(want))
    assert call("gather", arrays, FakeCupyArray, out=out)[0] is out
    np.testing.assert_array_equal(out.array, want)
    W_xh, tokens = FakeCupyArray(arrays["W_xh"]), FakeCupyArray(arrays["tokens"])
    with pytest.raises(TypeError, match="b_h must be a CuPy array on device 0 like the first, got"):
        ops.gather(W_xh, tokens, arrays["b_h"])
    arrays["tokens"][0, 0] = V
    with pytest.raises(ValueError, match=r"tokens must be in \[0, V\)"):
        call("gather", arrays, FakeCupyArray)


def test_a_gpu_whose_memory_runs_out_is_an_error_that_names_the_sizes(
    fake_cupy: FakeCupyBackend, arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any, **options: Any) -> Any:
        raise PoolError

    (T, B), (V, H) = arrays["tokens"].shape, arrays["W_xh"].shape
    sizes = f"T={T}, B={B}, H={H}, V={V} in float32 need 5.0 MiB more"
    with monkeypatch.context() as patch:
        patch.setattr(FakeCupyBackend, "gather", exhausted)
        with pytest.raises(fastrnn.DeviceMemoryError, match=sizes) as caught:
            call("gather", arrays, FakeCupyArray)
    assert caught.value.wanted == 5 << 20
    assert isinstance(caught.value.__cause__, PoolError)
    with monkeypatch.context() as patch:  # the copy of an input that is not in C order
        patch.setattr(FakeCupyArray, "copy", exhausted)
        with pytest.raises(fastrnn.DeviceMemoryError, match=r"5\.0 MiB more"):
            call("gather", arrays, lambda a: FakeCupyArray(np.asfortranarray(a)))
    assert isinstance(call("gather", arrays, FakeCupyArray)[0], FakeCupyArray)


def test_cuda_arrays_through_dlpack(fake_cupy: FakeCupyBackend, arrays: dict[str, Any]) -> None:
    class OnGpu(Wrapped):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

    z = call("gather", arrays, OnGpu)[0]
    assert isinstance(z, FakeCupyArray)
    np.testing.assert_array_equal(z.array, call("gather", arrays, np.array)[0])
    assert fake_cupy.calls == [("gather", [(1,)])]


@pytest.mark.parametrize(
    ("cupy", "stream"), [pytest.param(14, (0, 0xABC)), pytest.param(13, (0xABC, 1))]
)
def test_cuda_tensors_use_the_current_stream_of_torch(
    cupy: int,
    stream: tuple[int, int],
    fake_cupy: FakeCupyBackend,
    arrays: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cupy == 13:  # which has no streams by protocol
        del sys.modules["cupy"].cuda.Stream.from_external
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class OnCuda(torch.Tensor):  # type: ignore[misc,name-defined]
        device = property(lambda self: torch.device("cuda", 1))

    streams: list[Any] = []

    def current_stream(device: Any) -> Any:
        streams.append(device)
        return types.SimpleNamespace(cuda_stream=0xABC)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    z = call("gather", arrays, lambda a: torch.from_numpy(a.copy()).as_subclass(OnCuda))[0]
    assert type(z) is torch.Tensor
    np.testing.assert_array_equal(z.numpy(), call("gather", arrays, np.array)[0])
    assert fake_cupy.calls == [("gather", [(1,), stream])]
    assert set(streams) == {torch.device("cuda", 1)}


def test_a_gpu_array_without_cupy_says_why(arrays: dict[str, Any]) -> None:
    class OnGpu(Wrapped):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    try:
        open_backend("cupy")
    except BackendUnavailableError as error:
        with pytest.raises(BackendUnavailableError, match=re.escape(str(error)[:40])):
            call("recurrence", arrays, OnGpu)
    else:
        pytest.skip("CuPy works here")


def test_devices_that_are_neither_cpu_nor_cuda(arrays: dict[str, Any]) -> None:
    class Elsewhere(Wrapped):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 10, 0

    with pytest.raises(TypeError, match="z must lie on a CPU or CUDA device, got DLPack device t"):
        call("recurrence", arrays, Elsewhere)


def test_a_missing_gradient_is_named() -> None:
    p, g = np.ones(3, np.float32), np.ones(3, np.float32)
    with pytest.raises(TypeError, match=r"grads\[1\] must be an array, got None"):
        ops.clip_by_global_norm([g, None], 1.0)
    with pytest.raises(TypeError, match=r"grads\[1\] must be an array, got None"):
        ops.sgd([p, p.copy()], [g, None], 0.1)
    with pytest.raises(TypeError, match=r"params\[1\] must be an array, got None"):
        ops.sgd([p, None], [g, g.copy()], 0.1)
