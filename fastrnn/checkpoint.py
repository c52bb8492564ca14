"""Checkpoints: one safetensors file, written so that it is always either the old or the new one.

The tensors are plain (any safetensors reader opens them); everything else is one JSON object in
the file's metadata under the key ``fastrnn``.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as _serialise

FORMAT = 1
"""Version of the layout; a reader refuses a newer one."""

_KEY = "fastrnn"


class CheckpointError(ValueError):
    """A file that is not a checkpoint this version can read."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    The bytes go to a temporary file in the same directory, reach the disk, and take the name in
    one rename; then the directory reaches the disk. On any error the temporary file is removed.
    A symbolic link stays one: what it leads to is replaced. The file keeps its permissions.

    Raises:
        OSError: it cannot be written, or is a device, a pipe or a directory.
    """
    path, temporary = writable_target(path)
    try:
        with temporary.open("xb") as file:
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def writable_target(path: str | Path) -> tuple[Path, Path]:
    """The file that ``path`` leads to, and a name beside it for what is to replace it.

    Raises:
        OSError: it is there and is not a regular file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "directory" if target.is_dir() else "device or pipe"
        raise OSError(f"cannot write {path}: it is a {kind}, not a file")
    return target, target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON-able header as one checkpoint, atomically."""
    # safetensors writes the memory of a non-contiguous array as it lies: make each one C-ordered.
    arrays = {name: np.array(array, order="C") for name, array in tensors.items()}
    text = json.dumps({"format": FORMAT, **header})
    write_atomically(path, _serialise(arrays, metadata={_KEY: text}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a checkpoint; return its tensors and its header.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a safetensors file, not one of ours, damaged, or of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.is_dir():
        raise CheckpointError(f"a checkpoint is a file, {path} is a directory")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise CheckpointError(f"{path} is a safetensors file, but not a fastrnn checkpoint")
            header = json.loads(metadata[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise CheckpointError(f"{path} has no format number in its header")
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {header['format']}, this version reads up to {FORMAT}; "
            "install a newer fastrnn"
        )
    return tensors, header
