"""Compiling kernels of the ``numba-cuda`` backend without a GPU: PTX, linking, resources."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and what the linker says it takes, in bytes and registers a thread."""

    name: str
    ptx: str
    registers: int
    stack: int
    spills: int
    shared: int


@contextmanager
def pretended_device(arch: int) -> Iterator[None]:
    """Numba asks the current device for its architecture, and binds what it compiled to it."""
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    codegen = importlib.import_module("numba.cuda.codegen")
    device = SimpleNamespace(compute_capability=divmod(arch, 10))
    context = SimpleNamespace(device=device)
    with (
        mock.patch.object(dispatcher, "get_current_device", return_value=device),
        mock.patch.object(codegen.devices, "get_context", return_value=context),
        mock.patch.object(dispatcher._Kernel, "bind"),
    ):
        yield


@functools.cache
def library(kernel: Any) -> Any:
    """What numba makes of a kernel, by the very dispatcher that the backend launches; the same for
    every architecture until it becomes PTX."""
    (overload,) = replace(kernel).dispatcher.overloads.values()  # of a copy
    return overload._codelibrary


def compile_kernel(kernel: Any, arch: int) -> Compiled:
    """Compile as the backend does on a device of this architecture, and link for it."""
    with pretended_device(arch):
        ptx = library(kernel).get_asm_str()
    target = re.search(r"^\.target sm_(\w+)", ptx, re.MULTILINE)
    assert target, "no target in the PTX"
    assert target[1].rstrip("af") == str(arch)
    log = link(ptx, target[1])
    used = re.search(r"used (\d+) registers.*?, (\d+) stack", log)
    assert used, f"no resources in the linker's log: {log}"
    spills = re.findall(r"(\d+) bytes spill", log)
    assert spills, f"no spills in the linker's log: {log}"
    shared = re.search(r"(\d+) bytes smem", log)
    return Compiled(
        name=kernel.name,
        ptx=ptx,
        registers=int(used[1]),
        stack=int(used[2]),
        spills=sum(map(int, spills)),
        shared=int(shared[1]) if shared else 0,
    )


def link(ptx: str, arch: str) -> str:
    """Link ``ptx`` into a cubin by nvJitLink; its verbose log."""
    linker = importlib.import_module("cuda.bindings.nvjitlink")
    options = [f"-arch=sm_{arch}", "-O3", "-verbose", "-Xptxas=-v"]
    handle = linker.create(len(options), options)
    try:
        code = ptx.encode()
        linker.add_data(handle, linker.InputType.PTX, code, len(code), "kernel")
        linker.complete(handle)
        assert linker.get_linked_cubin_size(handle) > 0
        log = bytearray(linker.get_info_log_size(handle))
        linker.get_info_log(handle, log)
        return log.decode().strip("\0")
    finally:
        linker.destroy(handle)
