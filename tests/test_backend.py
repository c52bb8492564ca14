"""Opening backends: names, the environment, what cannot run; and the flat parameter layout."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn import backend as seam
from fastrnn.backend import (
    ALIGNMENT,
    BACKENDS,
    BackendUnavailableError,
    DeviceMemoryError,
    Dims,
    memory_of,
    open_backend,
)
from fastrnn.backends.numba_cuda import NumbaCudaBackend


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No opened backends and no override."""
    monkeypatch.setattr(seam, "_opened", {})
    monkeypatch.delenv("FASTRNN_BACKEND", raising=False)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of auto, cupy, numba-cuda, numba, numpy"):
        open_backend("torch")


@pytest.mark.usefixtures("fresh")
def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = fastrnn.available_backends()
    assert tuple(reasons) == BACKENDS
    working = [name for name, reason in reasons.items() if reason is None]
    assert {"numba", "numpy"} <= set(working)
    assert open_backend("auto").name == working[0]


@pytest.mark.usefixtures("fresh")
def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_BACKEND", "numpy")
    assert open_backend("auto").name == "numpy"
    assert open_backend("numba").name == "numba"
    monkeypatch.setenv("FASTRNN_BACKEND", "abacus")
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        open_backend()


@pytest.mark.usefixtures("fresh")
def test_a_named_backend_that_cannot_run_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seam._CLASSES, "numba", ("fastrnn.backends.no_such_module", "X"))
    with pytest.raises(BackendUnavailableError, match="backend 'numba' cannot be imported"):
        open_backend("numba")
    with pytest.raises(ImportError):
        fastrnn.CharRNN("ab", 2, "numba")
    reason = fastrnn.available_backends()["numba"]
    assert reason is not None
    assert "no_such_module" in reason
    assert fastrnn.available_backends()["numpy"] is None


def test_numba_without_its_compiler_says_so() -> None:
    code = (
        "import fastrnn\n"
        "print(fastrnn.available_backends()['numba'])\n"
        "print(fastrnn.open_backend().name)\n"
    )
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    env.pop("FASTRNN_BACKEND", None)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    reason, chosen = out.stdout.splitlines()
    assert reason == "backend 'numba' is compiled code: unset NUMBA_DISABLE_JIT"
    assert chosen != "numba"


@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_a_missing_gpu_is_named_with_a_remedy(name: str) -> None:
    reason = fastrnn.available_backends()[name]
    if reason is None:
        assert open_backend(name).name == name
    else:
        assert name in reason
        assert "pip install" in reason or "driver" in reason or "device" in reason


def test_import_is_light() -> None:
    """Importing the package loads no compiler and no GPU library."""
    heavy = "{'numba', 'cupy', 'torch', 'jax', 'matplotlib', 'scipy'}"
    code = f"import sys, fastrnn; print(sorted({heavy} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flat_layout_is_aligned_and_covers_every_parameter(dtype: Any) -> None:
    dims = Dims(3, 2, 5, 7, np.dtype(dtype))
    stops = 0
    for name, part in dims.param_slices.items():
        assert part.start % (ALIGNMENT // dims.dtype.itemsize) == 0
        assert part.start >= stops
        assert part.stop - part.start == np.prod(dims.param_shapes[name])
        stops = part.stop
    assert dims.flat_size >= stops


def test_memory_that_ran_out_is_described_from_the_inside_out() -> None:
    with (
        pytest.raises(MemoryError) as caught,
        memory_of({"T": 35, "B": 32, "H": 256, "V": 1027}, np.float64, "a smaller batch"),
        memory_of({"S": 3}, np.float32),
    ):
        raise fastrnn.DeviceMemoryError(1288490189, 858993459, 84933256806)
    text = "S=3 in float32 need 1.2 GiB more, 819.2 MiB of 79.1 GiB are free; a smaller batch"
    assert str(caught.value) == f"out of memory on the device: {text}"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.wanted) == (str(caught.value), 1288490189)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes_are_written_for_people(wanted: int, text: str) -> None:
    error = DeviceMemoryError(wanted)
    assert str(error) == f"out of memory on the device: {text} more is needed"


@pytest.mark.parametrize("status", [2, 700])
def test_numba_cuda_names_the_bytes_that_it_did_not_get(status: int) -> None:
    class CudaAPIError(Exception):
        code = status

    def device_array(shape: Any, dtype: Any, stream: Any) -> Any:
        raise CudaAPIError

    memory = types.SimpleNamespace(get_memory_info=lambda: (1 << 30, 80 << 30))
    backend = NumbaCudaBackend.__new__(NumbaCudaBackend)
    backend._cuda = types.SimpleNamespace(device_array=device_array, current_context=lambda: memory)
    backend.stream, backend.simulated, backend._scratch_arrays = 7, False, {}
    for allocate, arguments in (
        (backend.empty, ((3, 1 << 20), np.float64)),
        (backend._result, (7, (3, 1 << 20), np.float64)),
        (backend._scratch, (7, "name", 3 << 20, np.float64)),
    ):
        if status == 2:
            with pytest.raises(DeviceMemoryError, match=r"24\.0 MiB more .* 1\.0 GiB of 80\.0 GiB"):
                allocate(*arguments)
        else:  # an illegal address, say
            with pytest.raises(CudaAPIError):
                allocate(*arguments)
    assert not backend._scratch_arrays
