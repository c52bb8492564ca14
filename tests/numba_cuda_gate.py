"""Compiling kernels of the ``numba-cuda`` backend without a GPU: PTX, linking, resources."""

from __future__ import annotations

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


def compile_kernel(kernel: Any, arch: int) -> Compiled:
    """Compile by the very dispatcher that the backend launches, and link for ``sm_arch``."""
    with pretended_device(arch):
        dispatcher = replace(kernel).dispatcher  # a copy: the kernel's own stays uncompiled
        (overload,) = dispatcher.overloads.values()
        ptx = overload.inspect_asm(divmod(arch, 10))
    log = link(ptx, arch)
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


def link(ptx: str, arch: int) -> str:
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
