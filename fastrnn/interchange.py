"""Parameters from and to other programs: torch's names and layouts, the tutorial's five arrays.

Everything here is NumPy in, NumPy out; torch is not imported. With V characters and H hidden units:

    fastrnn          torch.nn.RNN(V, H) on one-hot characters, then torch.nn.Linear(H, V)
    W_xh [V, H]      rnn.weight_ih_l0 [H, V], transposed
    W_hh [H, H]      rnn.weight_hh_l0 [H, H], transposed
    b_h  [H]         rnn.bias_ih_l0 + rnn.bias_hh_l0
    W_hq [H, V]      linear.weight [V, H], transposed
    b_q  [V]         linear.bias
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.checkpoint import write_atomically
from fastrnn.reference import PARAM_NAMES, Params


def to_torch_names(
    params: Mapping[str, NDArray[Any]], rnn: str = "rnn.", output: str = "linear."
) -> Params:
    """A state dict, as NumPy arrays, for a module that holds an ``nn.RNN`` and an ``nn.Linear``.

    Args:
        params: W_xh ``[V, H]``, W_hh ``[H, H]``, b_h ``[H]``, W_hq ``[H, V]``, b_q ``[V]``.
        rnn, output: what the module calls the two, each with its dot.

    Returns:
        Fresh arrays in C order by torch's names. The whole bias is in ``bias_ih_l0``;
        ``bias_hh_l0`` is zero. ``{k: torch.from_numpy(v) for k, v in ...}`` can be loaded.

    Raises:
        ValueError: a name missing or unknown, or shapes that do not fit each other.
        TypeError: not float32 or float64, or several dtypes.
    """
    p = _checked(params)
    return {
        rnn + "weight_ih_l0": p["W_xh"].T.copy(),
        rnn + "weight_hh_l0": p["W_hh"].T.copy(),
        rnn + "bias_ih_l0": p["b_h"].copy(),
        rnn + "bias_hh_l0": np.zeros_like(p["b_h"]),
        output + "weight": p["W_hq"].T.copy(),
        output + "bias": p["b_q"].copy(),
    }


def from_torch_names(
    state_dict: Mapping[str, Any], rnn: str | None = None, output: str | None = None
) -> Params:
    """The parameters in the state dict of an ``nn.RNN`` (or ``nn.RNNCell``) and an ``nn.Linear``.

    The RNN has one tanh layer, in one direction, that reads one-hot characters. (A state dict does
    not say which nonlinearity its RNN has: one trained with relu is not refused, and is wrong.)

    Args:
        state_dict: NumPy arrays or torch tensors on any device. Biases may be missing: then zero.
        rnn, output: the prefixes of the two, such as ``"rnn."`` and ``"decoder."``. None finds
            them: the only ``weight_ih``, and the only other weight of shape ``[V, H]``.

    Returns:
        Fresh arrays in C order by the names in the module's table.

    Raises:
        ValueError: nothing or several things that could be the RNN or the output layer, more than
            one layer or direction, an LSTM or a GRU, or shapes that do not fit.
        TypeError: not float32 or float64, or several dtypes.
    """
    rnn, suffix = _find_rnn(state_dict, rnn)
    W_ih = _host(state_dict, f"{rnn}weight_ih{suffix}")
    W_hh = _host(state_dict, f"{rnn}weight_hh{suffix}")
    if W_ih.ndim != 2 or W_hh.ndim != 2 or len(W_ih) != len(W_hh):
        raise ValueError(
            f"{rnn}weight_ih{suffix} must be [H, V] and {rnn}weight_hh{suffix} [H, H], "
            f"got {W_ih.shape} and {W_hh.shape}"
        )
    H, V = W_hh.shape[1], W_ih.shape[1]
    if len(W_hh) != H:
        gates = {3: " (three gates: a GRU?)", 4: " (four gates: an LSTM?)"}
        kind = gates.get(len(W_hh) // H, "")
        raise ValueError(
            f"{rnn}weight_hh{suffix} must be [H, H], got {W_hh.shape}{kind}: "
            "only a vanilla RNN can be taken over"
        )
    bias = np.zeros(H, W_hh.dtype)
    for name in (f"{rnn}bias_ih{suffix}", f"{rnn}bias_hh{suffix}"):
        if name in state_dict:
            bias = bias + _shaped(name, _host(state_dict, name), (H,))

    if output is None:
        output = _find_output(state_dict, rnn, (V, H))
    W_out = _shaped(f"{output}weight", _host(state_dict, f"{output}weight"), (V, H))
    b_q = np.zeros(V, W_out.dtype)
    if f"{output}bias" in state_dict:
        b_q = _host(state_dict, f"{output}bias")
    return _checked(
        {
            "W_xh": W_ih.T.copy(),
            "W_hh": W_hh.T.copy(),
            "b_h": bias,
            "W_hq": W_out.T.copy(),
            "b_q": b_q.copy(),
        }
    )


def save_tutorial(path: str | Path, params: Mapping[str, NDArray[Any]]) -> None:
    """Write the tutorial's five arrays, by name, to an ``.npz`` file, atomically.

    Raises:
        ValueError, TypeError: as :func:`to_torch_names`.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **_checked(params))  # type: ignore[arg-type]  # stubs see allow_pickle here
    write_atomically(path, buffer.getvalue())


def load_tutorial(path: str | Path) -> Params:
    """Read the tutorial's five arrays from an ``.npz`` file.

    They are found by name (W_xh, W_hh, b_h, W_hq, b_q) or, where the file was written by
    ``np.savez(path, *params)``, by their order arr_0 … arr_4, which is the tutorial's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ``.npz`` file, arrays missing, or shapes that do not fit.
        TypeError: not float32 or float64, or several dtypes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
    if set(arrays) == {f"arr_{i}" for i in range(len(PARAM_NAMES))}:
        arrays = {name: arrays[f"arr_{i}"] for i, name in enumerate(PARAM_NAMES)}
    try:
        return _checked(arrays)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


# --- Finding and checking --------------------------------------------------------------------


def _find_rnn(state_dict: Mapping[str, Any], prefix: str | None) -> tuple[str, str]:
    """The prefix of the RNN, and ``_l0`` (``nn.RNN``) or nothing (``nn.RNNCell``)."""
    found = []
    for name in state_dict:
        head, mark, tail = name.rpartition("weight_ih")
        if mark and (prefix is None or head == prefix):
            found.append((head, tail))
    several = [name for name in found if name[1] not in ("", "_l0")]
    if several:
        raise ValueError(
            "expected an RNN of one layer and one direction, got also "
            + ", ".join(f"{head}weight_ih{tail}" for head, tail in several)
        )
    if len(found) != 1:
        where = "an RNN" if prefix is None else f"an RNN at prefix {prefix!r}"
        got = ", ".join(f"{h}weight_ih{t}" for h, t in found) or ", ".join(state_dict) or "nothing"
        raise ValueError(f"expected the weights of {where} exactly once, got {got}")
    return found[0]


def _find_output(state_dict: Mapping[str, Any], rnn: str, shape: tuple[int, int]) -> str:
    """The prefix of the only weight of ``shape`` that is not the RNN's own."""
    matrices = {
        name.removesuffix("weight"): tuple(array.shape)
        for name, array in state_dict.items()
        if name.rpartition(".")[2] == "weight" and len(array.shape) == 2
    }
    found = [prefix for prefix, has in matrices.items() if has == shape]
    if len(found) == 1:
        return found[0]
    got = ", ".join(f"{prefix}weight {has}" for prefix, has in matrices.items()) or "none"
    raise ValueError(
        f"expected exactly one output layer, a weight of shape [V, H] = {shape} beside the RNN at "
        f"{rnn!r}, got {got}; name it with output=..."
    )


def _host(state_dict: Mapping[str, Any], name: str) -> NDArray[Any]:
    """An entry as a NumPy array; torch tensors are detached and brought to the host."""
    try:
        value = state_dict[name]
    except KeyError:
        raise ValueError(f"expected {name}, got only {', '.join(state_dict)}") from None
    if hasattr(value, "detach"):
        if "bfloat16" in str(value.dtype):
            raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _shaped(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def _checked(params: Mapping[str, Any]) -> Params:
    """The five parameters as C-ordered arrays of one dtype whose shapes fit each other."""
    if set(params) != set(PARAM_NAMES):
        raise ValueError(
            f"expected the arrays {', '.join(PARAM_NAMES)}, got {', '.join(params) or 'none'}"
        )
    arrays = {name: np.ascontiguousarray(params[name]) for name in PARAM_NAMES}
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name} must be float32 or float64, got {array.dtype}")
        if array.dtype != arrays["W_xh"].dtype:
            dtype = arrays["W_xh"].dtype
            raise TypeError(f"{name} must be {dtype} like W_xh, got {array.dtype}")
    if arrays["W_xh"].ndim != 2:
        raise ValueError(f"W_xh must have shape [V, H], got {arrays['W_xh'].shape}")
    V, H = arrays["W_xh"].shape
    shapes = {"W_hh": (H, H), "b_h": (H,), "W_hq": (H, V), "b_q": (V,)}
    for name, shape in shapes.items():
        _shaped(name, arrays[name], shape)
    return arrays
