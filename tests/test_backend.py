"""Opening backends: names, the environment, what cannot run; and the flat parameter layout."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn import backend as seam
from fastrnn.backend import ALIGNMENT, BACKENDS, BackendUnavailableError, Dims, open_backend


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
