"""The numba backend on torch's threads: the same results whoever lends how many of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastrnn.backend import open_backend
from tests.conftest import Inputs
from tests.tolerances import assert_close

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastrnn.torch  # noqa: E402
from fastrnn.backends.cpu_openmp import ON_OPENMP  # noqa: E402
from fastrnn.backends.cpu_threads import Team  # noqa: E402
from fastrnn.torch import cpu, functional  # noqa: E402

OPENMP = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not OPENMP, reason="this torch was not built with OpenMP")
def test_the_library_is_found() -> None:
    entries = cpu.openmp_entries()
    assert entries is not None
    assert entries.all()
    assert isinstance(cpu.TorchNumbaBackend(2)._team, cpu.OpenMPTeam)


class Spy(cpu.OpenMPTeam):
    """Counts the parallel regions, and makes every op one."""

    def __init__(self, size: int) -> None:
        entries = cpu.openmp_entries()
        assert entries is not None
        super().__init__(size, entries)
        self.regions: list[Any] = []

    def run(self, function: Any, *arguments: Any, threads: int) -> None:
        assert function in ON_OPENMP
        self.regions.append(function)
        super().run(function, *arguments, threads=self.size)


@pytest.mark.skipif(not OPENMP, reason="this torch was not built with OpenMP")
@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 3, 37, 41), (3, 17, 130, 257)], ids=str)
def test_every_op_on_openmp_threads(size: int, dtype: str, shape: Any) -> None:
    T, B, H, V = shape
    make = Inputs(T, B, H, V, dtype)
    p, tokens = make.params(), make.tokens(T, B)
    h0, dh, logits = make.array(B, H), make.array(T, B, H), make.array(T, B, V)
    backend, oracle = cpu.TorchNumbaBackend(size), open_backend("numpy")
    backend._team = spy = Spy(size)

    z = backend.gather(p["W_xh"], tokens, p["b_h"])
    assert_close("gather", z, oracle.gather(p["W_xh"], tokens, p["b_h"]))
    for a, b in zip(
        backend.gather_backward(dh, tokens, V), oracle.gather_backward(dh, tokens, V), strict=True
    ):
        assert_close("gather_backward", a, b)
    for W_hh in (p["W_hh"], np.asfortranarray(p["W_hh"])):
        h = backend.recurrence(z, W_hh, h0)
        assert_close("recurrence", h, oracle.recurrence(z, W_hh, h0))
        want = oracle.recurrence_backward(dh, h, W_hh, h0)
        for a, b in zip(backend.recurrence_backward(dh, h, W_hh, h0), want, strict=True):
            assert_close("recurrence_backward", a, b)
        dz, dh0 = np.full_like(dh, np.nan), np.full_like(h0, np.nan)
        backend.recurrence_backward(dh, h, W_hh, h0, out=(dz, None, dh0))
        assert_close("recurrence_backward", dz, want[0])
        assert_close("recurrence_backward", dh0, want[2])
    for a, b in zip(
        backend.cross_entropy(logits, tokens), oracle.cross_entropy(logits, tokens), strict=True
    ):
        assert_close("cross_entropy", a, b)
    grads, same = [p["W_xh"].copy(), p["b_h"].copy()], [p["W_xh"].copy(), p["b_h"].copy()]
    norm = backend.clip_by_global_norm(grads, 0.1)
    assert_close("clip_by_global_norm", norm, oracle.clip_by_global_norm(same, 0.1))
    for a, b in zip(grads, same, strict=True):
        assert_close("clip_by_global_norm", a, b)
    assert set(spy.regions) == set(ON_OPENMP)


LENT = """
import torch
torch.set_num_threads(4)
import fastrnn.torch
z, W, h0 = torch.randn(9, 16, 128), torch.randn(128, 128) / 12, torch.randn(16, 128)
h = h0
for t in range(9):
    h = torch.tanh(z[t] + h @ W)
assert torch.allclose(fastrnn.torch.recurrence(z, W, h0)[-1], h, atol=1e-5)
"""


@pytest.mark.skipif(not OPENMP, reason="this torch was not built with OpenMP")
def test_fewer_threads_than_asked_for_are_enough() -> None:
    """A library that lends one thread of four: a barrier that waits for four would never open."""
    env = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", LENT], env=env, check=True, timeout=120)


def test_torch_without_openmp(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    monkeypatch.setattr(cpu, "openmp_entries", lambda: None)
    threads(2)
    backend = cpu.TorchNumbaBackend(2)
    assert type(backend._team) is Team
    monkeypatch.setattr(functional, "_open", lambda override, size: backend)
    make = Inputs(9, 16, 128, 2, "float32")
    z, W_hh, h0 = make.array(9, 16, 128), make.params()["W_hh"], make.array(16, 128)
    h = fastrnn.torch.recurrence(*map(torch.from_numpy, (z, W_hh, h0)))
    assert_close("recurrence", h, open_backend("numpy").recurrence(z, W_hh, h0))


def test_the_number_of_threads_is_torchs(threads: Any) -> None:
    for n in (1, 2, 3):
        threads(n)
        backend = functional._cpu_backend()
        assert isinstance(backend, cpu.TorchNumbaBackend)
        assert backend.describe()["threads"] == n
        assert functional._cpu_backend() is backend


def test_many_callers_at_once(threads: Any) -> None:
    threads(2)
    torch.manual_seed(0)
    ours = fastrnn.torch.RNN(40, 128)
    x = torch.randn(12, 16, 40)

    def gradients() -> list[Any]:
        loss = ours(x)[0].square().sum()
        return list(torch.autograd.grad(loss, list(ours.parameters())))

    want, wrong = gradients(), []

    def work() -> None:
        try:
            for _ in range(8):
                for a, b in zip(gradients(), want, strict=True):
                    torch.testing.assert_close(a, b)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=100)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


DATA_LOADER = """
import multiprocessing
import torch
import fastrnn.torch

rnn = fastrnn.torch.RNN(64, 128)


class Encoded(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return rnn(torch.full((20, 16, 64), i / 4))[0]


if __name__ == "__main__":
    want = [Encoded()[i] for i in range(4)]  # torch's threads exist before the fork
    loader = torch.utils.data.DataLoader(
        Encoded(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for got, w in zip(loader, want, strict=True):
        torch.testing.assert_close(got, w)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_data_loader_are_forked(tmp_path: Any) -> None:
    script = tmp_path / "loader.py"
    script.write_text(DATA_LOADER)
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
