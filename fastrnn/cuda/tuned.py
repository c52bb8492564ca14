"""Plans that were measured to be fastest; the launchers look here before they ask their models.

A plan decides in which order sums are taken, hence the last bits of a result. So nothing is
measured while a program runs: a table is a file. ``tuned.json`` beside this module is read unless
the environment variable ``FASTRNN_TUNED`` names another file, or is empty: then none is.
``python -m benchmarks.gpu.tuner`` writes one from what a run measured::

    {"products": [{"device": "NVIDIA H100 80GB HBM3", "multiprocessors": 132,
                   "kernels": "0123456789abcdef", "M": 1120, "N": 1027, "K": 256,
                   "dtype": "float32", "trans_a": false, "trans_b": false,
                   "tile": {"m": 64, "n": 64, "k": 32, …}, "grid": 396}],
     "recurrences": [{"device": …, "multiprocessors": …, "kernels": …,
                      "op": "recurrence_backward", "B": 64, "H": 256, "plan": "cluster"}]}

``multiprocessors`` is for how many a product is planned, ``kernels`` the digest of the CUDA C
sources. An entry of another device, digest, shape or tile is passed over; other fields are notes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrnn.cuda.cupy_device import source_digest

if TYPE_CHECKING:
    from fastrnn.cuda.gemm import Tile

VARIABLE = "FASTRNN_TUNED"
SHIPPED = Path(__file__).with_name("tuned.json")

PLANS = ("block", "cluster")
RECURRENCES = ("recurrence", "recurrence_backward")

_WHERE = {"device": str, "multiprocessors": int, "kernels": str}
FIELDS: dict[str, dict[str, type]] = {
    "products": {
        **_WHERE, "M": int, "N": int, "K": int, "dtype": str, "trans_a": bool, "trans_b": bool,
        "tile": dict, "grid": int,
    },
    "recurrences": {**_WHERE, "op": str, "B": int, "H": int, "plan": str},
}  # fmt: skip
"""What an entry of each list must have; the last ones, which are not part of its key, are the plan:
``tile`` and ``grid``, or ``plan``."""

_PLAN_FIELDS = ("tile", "grid", "plan")


@dataclass(frozen=True)
class Table:
    """The entries that were measured with the present kernels.

    Attributes:
        products: (device, multiprocessors, M, N, K, dtype's name, trans_a, trans_b) to the fields
            of a tile and the number of blocks, which together tell the plans of a product apart.
        recurrences: (device, multiprocessors, op, B, H) to one of :data:`PLANS`.
    """

    products: Mapping[tuple[Any, ...], tuple[dict[str, Any], int]] = field(default_factory=dict)
    recurrences: Mapping[tuple[Any, ...], str] = field(default_factory=dict)

    def product(
        self, device: str, multiprocessors: int, M: int, N: int, K: int, dtype: Any,
        trans_a: bool, trans_b: bool,
    ) -> tuple[dict[str, Any], int] | None:  # fmt: skip
        """The fields of the tile (see :func:`tile_fields`) and the blocks; None: not measured."""
        name = np.dtype(dtype).name
        return self.products.get((device, multiprocessors, M, N, K, name, trans_a, trans_b))

    def recurrence(self, device: str, multiprocessors: int, op: str, B: int, H: int) -> str | None:
        """One of :data:`PLANS`; None: not measured."""
        return self.recurrences.get((device, multiprocessors, op, B, H))


def tile_fields(tile: Tile) -> dict[str, Any]:
    """A tile as JSON has it: what is not set is left out, tuples are lists."""
    fields = {name: value for name, value in asdict(tile).items() if value is not None}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


@functools.cache
def table() -> Table:
    """The table in force, read once.

    Raises:
        ValueError: the file cannot be read or is not such a table.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return read(SHIPPED)
    return read(Path(named)) if named else Table()


def read(path: Path) -> Table:
    """The table in a file, without the entries of other kernels.

    Raises:
        ValueError: the file cannot be read or is not such a table; the message names the path,
            what was expected, and what is there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table of measured plans ({VARIABLE}) in JSON: {error}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) for name in FIELDS
    ):
        raise ValueError(
            f"{path}: expected a table of measured plans ({VARIABLE}), a JSON object with the "
            f"lists {' and '.join(FIELDS)}, got {_short(content)}"
        )
    kernels = source_digest() if any(content[name] for name in FIELDS) else ""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {name: {} for name in FIELDS}
    for name, fields in FIELDS.items():
        for number, entry in enumerate(content[name]):
            _check(f"{path}: {name}[{number}]", entry, fields)
            if entry["kernels"] != kernels:
                continue
            parts = (f for f in fields if f not in (*_PLAN_FIELDS, "kernels"))
            key = tuple(entry[f] for f in parts)
            if key in found[name]:
                raise ValueError(f"{path}: {name}[{number}]: a second entry for {key}")
            found[name][key] = entry
    return Table(
        {key: (entry["tile"], entry["grid"]) for key, entry in found["products"].items()},
        {key: entry["plan"] for key, entry in found["recurrences"].items()},
    )


def _check(where: str, entry: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {_short(entry)}")
    for name, kind in fields.items():
        if type(entry.get(name)) is not kind:
            got = _short(entry[name]) if name in entry else "nothing"
            raise ValueError(f"{where}: expected {name} of type {kind.__name__}, got {got}")
    for name, allowed in (("plan", PLANS), ("op", RECURRENCES)):
        if name in fields and entry[name] not in allowed:
            raise ValueError(
                f"{where}: expected {name} to be {' or '.join(allowed)}, got {entry[name]!r}"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
