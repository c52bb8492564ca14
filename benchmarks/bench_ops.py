"""One benchmark group an op; each is held to the float64 oracle before it is timed."""

from __future__ import annotations

import pytest

from benchmarks.conftest import OP_SIZES, Timed
from benchmarks.op_cases import OPS
from fastrnn.backend import Backend, Dims

TIMED_SIZES = OP_SIZES
pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=5, disable_gc=True)


@pytest.mark.parametrize("op", OPS)
def test_op(op: str, backend: Backend, dims: Dims, timed: Timed) -> None:
    case = OPS[op](backend, dims)
    case.check()

    def run() -> None:
        case.submit()
        backend.sync()

    restore = case.restore if op == "clip_by_global_norm" else None
    timed(op, op, dims, run, tokens=case.tokens, setup=restore)
