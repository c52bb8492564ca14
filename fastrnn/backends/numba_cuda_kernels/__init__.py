"""The kernels of the ``numba-cuda`` backend, in Python: a file an op, :func:`all_kernels` here.

A factory ``x_kernel(dtype, geometry, ...)`` makes each :class:`Kernel`: the Python function, its
signature, and the block it runs in. What the factory is given is a constant to the compiler, so
loops over it unroll and small local arrays become registers.

What holds for all of them:

* Arrays come flat, in C order; the index comments name the tensor (``z[t, b, j]``).
* Block-local indices are ``uint32``: a signed index costs a test for Python's negative ones at
  each access, 64-bit registers, and the vector loads of shared memory.
* Sums have a fixed order: no float atomics, no shuffles, no grid-wide barriers. The same source
  therefore runs in Numba's simulator, where a CUDA thread is a Python thread.
"""

from __future__ import annotations

from typing import Any

from fastrnn.backends.numba_cuda_kernels.clip_sgd import (
    norm_kernel,
    record_kernel,
    scale_kernel,
    set_rates_kernel,
    sgd_kernel,
    sum_squares_kernel,
    update_kernel,
)
from fastrnn.backends.numba_cuda_kernels.common import (
    SIMULATED,
    Geometry,
    Kernel,
    copy_kernel,
)
from fastrnn.backends.numba_cuda_kernels.cross_entropy import (
    cross_entropy_kernel,
    mean_kernel,
)
from fastrnn.backends.numba_cuda_kernels.gather import (
    column_sum_kernel,
    gather_backward_kernel,
    gather_kernel,
    rank_kernel,
    window_kernel,
)
from fastrnn.backends.numba_cuda_kernels.gemm import (
    gemm_kernel,
    sum_splits_kernel,
)
from fastrnn.backends.numba_cuda_kernels.generate import (
    generate_kernel,
)
from fastrnn.backends.numba_cuda_kernels.recurrence import (
    pad_kernel,
    recurrence_backward_kernel,
    recurrence_kernel,
    tanh_step_backward_kernel,
    tanh_step_kernel,
)

__all__ = [
    "SIMULATED",
    "Geometry",
    "Kernel",
    "all_kernels",
    "column_sum_kernel",
    "copy_kernel",
    "cross_entropy_kernel",
    "gather_backward_kernel",
    "gather_kernel",
    "gemm_kernel",
    "generate_kernel",
    "mean_kernel",
    "norm_kernel",
    "pad_kernel",
    "rank_kernel",
    "record_kernel",
    "recurrence_backward_kernel",
    "recurrence_kernel",
    "scale_kernel",
    "set_rates_kernel",
    "sgd_kernel",
    "sum_splits_kernel",
    "sum_squares_kernel",
    "tanh_step_backward_kernel",
    "tanh_step_kernel",
    "update_kernel",
    "window_kernel",
]


def all_kernels(dtype: Any, geometry: Geometry) -> list[Kernel]:
    """Every kernel the backend can launch for ``dtype``: what a compile check goes through."""
    widths = []
    outputs = 1
    while outputs * geometry.lanes <= geometry.max_hidden:
        widths.append(outputs)
        outputs *= 2
    flags = (False, True)
    return [
        window_kernel(geometry),
        gather_kernel(dtype, geometry),
        rank_kernel(geometry),
        gather_backward_kernel(dtype, geometry),
        column_sum_kernel(dtype, geometry),
        *(pad_kernel(dtype, geometry, transposed) for transposed in flags),
        *(recurrence_kernel(dtype, geometry, w, gathers) for w in widths for gathers in flags),
        *(recurrence_backward_kernel(dtype, geometry, width) for width in widths),
        tanh_step_kernel(dtype, geometry),
        tanh_step_backward_kernel(dtype, geometry),
        gemm_kernel(dtype, geometry, False, False),
        gemm_kernel(dtype, geometry, False, True),
        gemm_kernel(dtype, geometry, True, False),
        sum_splits_kernel(dtype, geometry),
        cross_entropy_kernel(dtype, geometry),
        mean_kernel(dtype, geometry),
        set_rates_kernel(geometry),
        sum_squares_kernel(dtype, geometry),
        norm_kernel(dtype, geometry),
        scale_kernel(dtype, geometry),
        sgd_kernel(dtype, geometry),
        record_kernel(dtype, geometry),
        update_kernel(dtype, geometry),
        copy_kernel(dtype, geometry),
        generate_kernel(dtype, geometry),
    ]
