"""The tolerances of all comparisons, by op and dtype: one table, a reason a row.

An error is the relative RMS ``‖got - want‖ / ‖want‖`` against the oracle in float64 (or in the
array's own dtype where a row says so). Float32 has 6e-8 relative precision a rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RELATIVE_RMS: dict[str, dict[str, float]] = {
    # one addition
    "gather": {"float32": 1e-7, "float64": 1e-15},
    # a sum of up to T·B terms in another order
    "gather_backward": {"float32": 1e-6, "float64": 1e-14},
    # H-long dot products through T steps of tanh; a rational tanh has 2.5e-7 of its own
    "recurrence": {"float32": 2e-6, "float64": 1e-13},
    # as the forward pass, and the sum over T·B of dW_hh
    "recurrence_backward": {"float32": 4e-6, "float64": 1e-13},
    # H-long dot products
    "project": {"float32": 1e-6, "float64": 1e-14},
    # V- and T·B-long dot products
    "project_backward": {"float32": 2e-6, "float64": 1e-14},
    # exp and a V-long sum; cancellation of p - 1 at the target
    "cross_entropy": {"float32": 2e-6, "float64": 1e-13},
    # a sum of squares and one product
    "clip_by_global_norm": {"float32": 1e-6, "float64": 1e-14},
    # a fused multiply-add where the oracle rounds twice
    "sgd": {"float32": 2e-7, "float64": 1e-15},
    # parameters after one whole step: all of the above
    "step": {"float32": 2e-5, "float64": 1e-12},
    # losses along 10 steps: rounding differences grow from step to step
    "trajectory": {"float32": 1e-4, "float64": 1e-10},
}


def relative_rms(got: Any, want: Any) -> float:
    """``‖got - want‖ / ‖want‖`` in float64; the plain norm of the difference where want is zero."""
    g, w = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert g.shape == w.shape, f"shape {g.shape}, expected {w.shape}"
    scale = float(np.linalg.norm(w.ravel()))
    error = float(np.linalg.norm((g - w).ravel()))
    return error / scale if scale > 0 else error


def assert_close(op: str, got: Any, want: Any, what: str = "") -> None:
    """Assert that ``got`` agrees with ``want`` within the table's row; NaN never passes."""
    limit = RELATIVE_RMS[op][np.asarray(got).dtype.name]
    error = relative_rms(got, want)
    assert error <= limit, f"{op} {what}: relative RMS error {error:.3g} > {limit:.3g}"
