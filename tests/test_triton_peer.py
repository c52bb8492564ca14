"""The Triton peer of the benchmarks, in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fastrnn import bench
from fastrnn.backend import Dims
from fastrnn.bench.paths import PACKAGE

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import json, sys
import triton_rnn
from fastrnn.backend import Dims
from fastrnn.bench import make_problem, relative_error

found = []
for workload, slab, *dims in json.loads(sys.argv[1]):
    problem, expected = make_problem(workload, Dims(*dims, 31))
    peer = triton_rnn.WORKLOADS[workload](problem, "ieee")
    peer.slab = slab or peer.slab
    peer.run(2)
    error = relative_error({k: a[None] for k, a in peer.result().items()}, expected)
    found.append([peer.slab, error])
print(json.dumps(found))
"""


def in_the_interpreter(cases: list[Any]) -> list[Any]:
    """A process of its own: Triton decides at import whether it interprets."""
    paths = [str(bench.PEER_FOLDER), str(PACKAGE.parent)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_both_kernels_agree_with_the_oracle_at_odd_sizes() -> None:
    """T, B and H of one, below, at and above what a block holds; W_hh resident and streamed."""
    cases = [
        (workload, slab, *dims)
        for workload in ("recurrence", "recurrence+bptt")
        for slab, dims in (
            (0, (1, 1, 1)),
            (0, (5, 3, 16)),
            (0, (4, 17, 37)),
            (16, (1, 1, 20)),
            (16, (4, 17, 37)),
            (32, (3, 33, 100)),
        )
    ]
    assert all(Dims(*case[2:], 31) for case in cases)
    for case, (slab, error) in zip(cases, in_the_interpreter(cases), strict=True):
        assert slab == (case[1] or max(16, 1 << (case[4] - 1).bit_length())), case
        assert error < 2e-6, case


COMPILE = """
import json
import triton_rnn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

found = []
slab, warps = triton_rnn.CONFIGURATIONS[0]
for kernel in (triton_rnn.forward, triton_rnn.backward):
    for precision in ("ieee", "tf32"):
        names = kernel.arg_names
        constants = {"BLOCK_B": 16, "BLOCK_H": 256, "BLOCK_K": slab, "PRECISION": precision}
        kinds = {name: "constexpr" if name in constants else "*fp32" for name in names}
        kinds |= {"T": "i32", "B": "i32", "H": "i32"}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        target = GPUTarget("cuda", 90, 32)
        done = compile(source, target=target, options={"num_warps": warps})
        found.append([precision, done.metadata.shared, "tf32" in done.asm["ptx"]])
print(json.dumps(found))
"""


def test_the_kernels_compile_for_sm_90_and_fit() -> None:
    """At H = 256, in the first configuration that is tried: shared memory, and what multiplies."""
    paths = [str(bench.PEER_FOLDER), str(PACKAGE.parent)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for precision, shared, has_tf32 in json.loads(done.stdout):
        assert shared <= 227 * 1024
        assert has_tf32 == (precision == "tf32")
