"""Every CUDA C kernel through the compilers that users have, without a GPU: what it takes, and what
it became.

    python -m tests.compile_gate [--toolchain VERSION … | --all] [FILE …]
    python -m tests.compile_gate --fetch FOLDER

compiles what the launchers can launch with NVRTC, prints registers, stack, spills and shared memory
of each kernel, and fails (exit status 1) for a source that is refused and for what would be slow or
impossible on a GPU: a spill, a stack frame, more registers or shared memory than the launch needs,
a missing instruction. Without options it takes the NVRTC that is installed. ``--all`` takes every
toolchain of :data:`TOOLCHAINS`; those that are not installed lie in the folder that the environment
variable ``FASTRNN_NVRTC`` names, to which ``--fetch`` downloads them with pip.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrnn.cuda import launchable as launchable
from fastrnn.cuda.device import KERNELS, Kernel
from tests import nvrtc
from tests.emulated_device import SHARED_BYTES

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten. As CuPy, the gate compiles for ``sm_90``, not ``sm_90a``."""

REGISTERS = 65536
"""32-bit registers of a multiprocessor, on all of them."""

FOLDER = "FASTRNN_NVRTC"
"""The environment variable that names the folder of fetched toolchains."""


@dataclass(frozen=True)
class Toolchain:
    """An NVRTC that users have.

    Attributes:
        version: of its wheel; ``"installed"`` for the one that CUDA's Python packages find here.
        package: the wheel's name; empty for the installed one.
        capabilities: for which it compiles the kernels here.
        judged: whether what a kernel takes can be a fault. Otherwise only a refusal is one, and the
            rest is reported.
    """

    version: str
    package: str = ""
    capabilities: tuple[int, ...] = ARCHITECTURES
    judged: bool = True


INSTALLED = Toolchain("installed")
TOOLCHAINS = (
    # The oldest and the newest that the extra cuda12x admits.
    Toolchain("12.4.127", "nvidia-cuda-nvrtc-cu12", (90,), judged=False),
    Toolchain("12.9.86", "nvidia-cuda-nvrtc-cu12", (90,), judged=False),
    # The oldest that cuda13x admits, and the newest: `pip install` finds it.
    Toolchain("13.0.88", "nvidia-cuda-nvrtc"),
    INSTALLED,
)


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel; bytes, and registers a thread."""

    registers: int
    stack: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture.

    Attributes:
        resources: what it takes; None where the source is refused.
        faults: what is wrong with it.
        notes: what would be wrong with it, did the toolchain count.
    """

    kernel: Kernel
    capability: int
    toolchain: Toolchain
    resources: Resources | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        constants = " ".join(f"{k}={v}" for k, v in self.kernel.defines)
        return f"{self.kernel.file}: {self.kernel.name} {constants}".strip()

    def lines(self, what: Sequence[str]) -> list[str]:
        """``what``, with the toolchain, architecture and kernel that it is about."""
        start = f"NVRTC {self.toolchain.version}, sm_{self.capability}, {self.label}"
        return [f"{start}: {text}" for text in what]


# --- What there is -----------------------------------------------------------------------------


@functools.cache
def path_of(toolchain: Toolchain) -> str:
    """The path of a toolchain's ``libnvrtc.so``.

    Raises:
        RuntimeError: it is not here; the message names it, and what helps.
    """
    if not toolchain.package:
        try:
            return nvrtc.installed()
        except Exception as error:  # what loading it raises depends on CUDA's packages
            reason = " ".join(str(error).split())
            raise RuntimeError(f"needs NVRTC: pip install 'fastrnn[gate]' ({reason})") from error
    folder = os.environ.get(FOLDER)
    found = nvrtc.unpacked(Path(folder), toolchain.version) if folder else None
    if found is None:
        where = f"not in {folder}" if folder else f"{FOLDER} names no folder"
        raise RuntimeError(
            f"needs NVRTC {toolchain.version} ({where}): "
            f"python -m tests.compile_gate --fetch {folder or 'FOLDER'}"
        )
    return found


def gate_unavailable(toolchain: Toolchain = INSTALLED) -> str | None:
    """Why nothing can be compiled here with this toolchain, or None."""
    try:
        path = path_of(toolchain)
        if not toolchain.package:
            nvrtc.loaded(path)
    except (RuntimeError, OSError) as error:
        return str(error)
    if disassembler() is None:
        return "needs nvdisasm: pip install 'fastrnn[gate]'"
    return None


@functools.cache
def disassembler() -> str | None:
    """The path of nvdisasm: in NVIDIA's wheel, as new as the installed NVRTC, or on PATH."""
    try:
        folders = list(importlib.import_module("nvidia").__path__)
    except ImportError:
        folders = []
    for folder in folders:
        for path in sorted(Path(folder).glob("*/bin/nvdisasm")):
            if os.access(path, os.X_OK):
                return str(path)
    return shutil.which("nvdisasm")


# --- Compiling ---------------------------------------------------------------------------------

Module = tuple[str, tuple[tuple[str, Any], ...], int]
"""What is compiled at once: a file, its constants, and a compute capability."""


def compilation(
    file: str, defines: tuple[tuple[str, Any], ...], capability: int
) -> tuple[bytes, str, tuple[str, ...]]:
    """Source, name and options, as CuPy has them."""
    options = (
        "-std=c++17",
        "-ftz=true",
        f"-I{KERNELS}",
        f"-arch=sm_{capability}",
        "--ptxas-options=-v",
        *(f"-D{name}={value}" for name, value in defines),
    )
    return (KERNELS / f"{file}.cu").read_bytes(), f"{file}.cu", options


def compile_module(file: str, defines: tuple[tuple[str, Any], ...], capability: int) -> Any:
    """Compile ``kernels/<file>.cu`` with the installed NVRTC: its log and its cubin.

    Raises:
        RuntimeError: NVRTC refuses the source; the message is its log.
    """
    try:
        return nvrtc.compile_source(path_of(INSTALLED), *compilation(file, defines, capability))
    except nvrtc.CompileError as error:
        raise RuntimeError(f"{file}.cu for sm_{capability}: {error}") from error


@functools.cache
def processes(library: str) -> ProcessPoolExecutor:
    """Processes that load this NVRTC and no other."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def read_log(log: str) -> dict[str, Resources]:
    """Resources by kernel name, from ptxas's verbose log."""
    parts = _ENTRY.split(log)
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
        assert stack, text
        assert used, text
        found[name] = Resources(
            registers=int(used[1]),
            stack=int(stack[1]),
            spills=int(stack[2]) + int(stack[3]),
            shared=int(shared[1]) if shared else 0,
        )
    return found


def disassemble(cubin: bytes) -> dict[str, str]:
    """SASS by kernel name."""
    tool = disassembler()
    assert tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    parts = re.split(r"\.section\s+\.text\.(\w+)", done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def faults(kernel: Kernel, capability: int, resources: Resources, sass: str) -> Iterator[str]:
    """What is wrong with a compiled kernel."""
    if resources.spills:
        yield f"{resources.spills} bytes spilled"
    if resources.stack:
        yield f"{resources.stack} bytes of stack"
    # Registers come in eights a thread, and a multiprocessor must hold `blocks` blocks.
    limit = min(255, REGISTERS // (kernel.threads * kernel.blocks) // 8 * 8)
    if resources.registers > limit:
        yield f"{resources.registers} registers, {limit} allow {kernel.blocks} blocks"
    shared = resources.shared + kernel.shared_bytes
    if shared > SHARED_BYTES[capability] * 1024:
        yield f"{shared} bytes of shared memory, {SHARED_BYTES[capability]} KiB are there"
    missing = [opcode for opcode in kernel.opcodes if not re.search(rf"\b{opcode}\b", sass)]
    if missing:
        yield f"no {', '.join(missing)}"


def compile_all(
    kernels: Iterable[Kernel],
    capabilities: Sequence[int] | None = None,
    toolchain: Toolchain = INSTALLED,
) -> list[Row]:
    """Compile kernels for every architecture that can run them.

    Args:
        kernels: those of one file that share their constants are compiled together.
        capabilities: None for all that the toolchain compiles for.
        toolchain: by which compiler.
    """
    modules: dict[Module, list[Kernel]] = {}
    for kernel in kernels:
        for capability in toolchain.capabilities if capabilities is None else capabilities:
            if kernel.runs_on(capability):
                modules.setdefault((kernel.file, kernel.defines, capability), []).append(kernel)

    def judge(module: Module, compiled: Future[tuple[str, bytes]]) -> list[Row]:
        capability = module[2]
        try:
            log, cubin = compiled.result()
        except nvrtc.CompileError as error:
            refused = f"{module[0]}.cu is refused: {error}"
            return [Row(k, capability, toolchain, None, (refused,)) for k in modules[module]]
        resources = read_log(log)
        wanted = any(kernel.opcodes for kernel in modules[module])
        sass = disassemble(cubin) if wanted else {}
        rows = []
        for kernel in modules[module]:
            found = resources[kernel.name]
            wrong = tuple(faults(kernel, capability, found, sass.get(kernel.name, "")))
            judged, told = (wrong, ()) if toolchain.judged else ((), wrong)
            rows.append(Row(kernel, capability, toolchain, found, judged, told))
        return rows

    path = path_of(toolchain)
    submit = processes(path).submit
    compiled = [submit(nvrtc.compile_source, path, *compilation(*module)) for module in modules]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(judge, modules, compiled) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """A line a kernel, a column an architecture: registers, and what is wrong."""
    capabilities = sorted({row.capability for row in rows})
    by_label: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, {})[row.capability] = row
    width = max(len(label) for label in by_label)
    head = " ".join(f"{'sm_' + str(c):>7}" for c in capabilities)
    lines = [f"{'registers a thread':{width}} {head}  threads  shared"]

    def cell(row: Row | None) -> str:
        if row is None:
            return "     – "
        mark = "!" if row.faults else "*" if row.notes else " "
        return f"{row.resources.registers if row.resources else '–':>6}{mark}"

    for label, found in sorted(by_label.items()):
        kernel = next(iter(found.values())).kernel
        cells = " ".join(cell(found.get(c)) for c in capabilities)
        shared = max((row.resources.shared for row in found.values() if row.resources), default=0)
        shared += kernel.shared_bytes
        lines.append(f"{label:{width}} {cells}  {kernel.threads:>7} {shared:>7}")
    for row in rows:
        lines += row.lines([*row.faults, *(f"{note} (only reported)" for note in row.notes)])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compile_gate")
    known = {toolchain.version: toolchain for toolchain in TOOLCHAINS}
    parser.add_argument("files", metavar="FILE", nargs="*", help="of kernels/, without .cu")
    parser.add_argument("--toolchain", choices=known, action="append", help="may be repeated")
    parser.add_argument("--all", action="store_true", help="with every toolchain")
    parser.add_argument("--fetch", metavar="FOLDER", type=Path, help="download the toolchains")
    options = parser.parse_args(arguments)
    if options.fetch:
        for toolchain in TOOLCHAINS:
            if toolchain.package and not nvrtc.unpacked(options.fetch, toolchain.version):
                nvrtc.fetch(options.fetch, toolchain.package, toolchain.version)
        return 0
    kernels = [k for k in launchable() if not options.files or k.file in options.files]
    unknown = set(options.files) - {k.file for k in kernels}
    if unknown:
        parser.error(f"no kernel is launched from {', '.join(sorted(unknown))}")
    if options.all:
        chosen = list(TOOLCHAINS)
    else:
        chosen = [known[version] for version in options.toolchain or [INSTALLED.version]]
    missing = [reason for reason in map(gate_unavailable, chosen) if reason]
    if missing:
        print(*(f"the compile gate {reason}" for reason in missing), sep="\n", file=sys.stderr)
        return 2
    wrong = 0
    for toolchain in chosen:
        start = time.perf_counter()
        rows = compile_all(kernels, toolchain=toolchain)
        faulty = sum(bool(row.faults) for row in rows)
        if rows:
            print(table(rows))
        print(
            f"NVRTC {toolchain.version}: {len(rows)} kernels compiled, {faulty} with faults, "
            f"{time.perf_counter() - start:.0f} s"
        )
        wrong += faulty
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
