"""NVRTC of any version, through its library file and no bindings.

Several versions do not share a process: :func:`compile_source` is what a process of its own runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path


class CompileError(RuntimeError):
    """NVRTC refuses a source; the message is its log."""


class Nvrtc:
    """One NVRTC.

    Args:
        library: the path of ``libnvrtc.so``; its builtins lie beside it.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, library: str) -> None:
        # NVRTC looks for its builtins by name alone: loaded before, they are found from any folder.
        for builtins in sorted(Path(library).parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(library)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @property
    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source: bytes, name: str, options: Sequence[str]) -> tuple[str, bytes]:
        """The log and the cubin.

        Raises:
            CompileError: the source is refused.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source, name.encode(), 0, None, None
        )
        try:
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), encoded)
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise CompileError(log or self._library.nvrtcGetErrorString(status).decode())
            return log, self._bytes(program, "CUBIN")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *args: object) -> None:
        status = getattr(self._library, function)(*args)
        if status:
            message = self._library.nvrtcGetErrorString(status).decode()
            raise RuntimeError(f"{function}: {message}")


@functools.cache
def loaded(library: str) -> Nvrtc:
    return Nvrtc(library)


def compile_source(
    library: str, source: bytes, name: str, options: tuple[str, ...]
) -> tuple[str, bytes]:
    """:meth:`Nvrtc.compile` by the NVRTC of this path."""
    return loaded(library).compile(source, name, options)


def installed() -> str:
    """The path of the NVRTC that CUDA's Python packages find.

    Raises:
        ImportError, RuntimeError: there is none.
    """
    pathfinder = importlib.import_module("cuda.pathfinder")
    return str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)


def unpacked(folder: Path, version: str) -> str | None:
    """The path of the NVRTC of this version in a folder that :func:`fetch` filled, or None."""
    found = sorted((folder / version).glob("libnvrtc.so.*"))
    return str(found[0]) if found else None


def fetch(folder: Path, package: str, version: str) -> None:
    """Download a version's wheel with pip and unpack its libraries to ``folder/version``."""
    partial = folder / f"{version}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "-d", str(partial), f"{package}=={version}"], check=True)
    (wheel,) = partial.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = Path(member).name
            if name.startswith(("libnvrtc.so.", "libnvrtc-builtins.so.")):
                (partial / name).write_bytes(archive.read(member))
    wheel.unlink()
    partial.rename(folder / version)
