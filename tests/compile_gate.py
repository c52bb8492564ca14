"""Every CUDA C kernel for every architecture, without a GPU: what it takes, and what it became.

    python -m tests.compile_gate [FILE …]

compiles what the launchers can launch with NVRTC, prints registers, stack, spills and shared memory
of each kernel, and fails (exit status 1) for what a GPU would refuse or regret: a spill, a stack
frame, more registers or shared memory than the launch needs, a missing instruction.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastrnn.cuda
from fastrnn.cuda.device import KERNELS, Kernel
from tests.emulated_device import SHARED_BYTES

ARCHITECTURES = {75: "75", 80: "80", 86: "86", 89: "89", 90: "90a", 100: "100", 120: "120"}
"""Compute capability (times ten) -> what follows ``sm_``. CuPy asks for 90, not 90a: no kernel uses
what the a adds, and all take the same registers."""

REGISTERS = 65536
"""32-bit registers of a multiprocessor, on all of them."""


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel; bytes, and registers a thread."""

    registers: int
    stack: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture: what it takes, and what is wrong with it."""

    kernel: Kernel
    capability: int
    resources: Resources
    faults: tuple[str, ...]

    @property
    def label(self) -> str:
        constants = " ".join(f"{k}={v}" for k, v in self.kernel.defines)
        return f"{self.kernel.file}: {self.kernel.name} {constants}".strip()


def gate_unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except Exception as error:  # the bindings raise what loading NVRTC raises
        return f"needs NVRTC: pip install 'fastrnn[gate]' ({error})"
    if disassembler() is None:
        return "needs nvdisasm: pip install 'fastrnn[gate]'"
    return None


@functools.cache
def disassembler() -> str | None:
    """The path of nvdisasm: on PATH, or in NVIDIA's wheel."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        nvidia = importlib.import_module("nvidia")
    except ImportError:
        return None
    for folder in nvidia.__path__:
        for path in Path(folder).glob("*/bin/nvdisasm"):
            if os.access(path, os.X_OK):
                return str(path)
    return None


def launchable() -> list[Kernel]:
    """Every kernel of the launchers' ``variants()``."""
    kernels: dict[Kernel, None] = {}
    for module in pkgutil.iter_modules(fastrnn.cuda.__path__):
        found = importlib.import_module(f"fastrnn.cuda.{module.name}")
        if hasattr(found, "variants"):
            kernels |= dict.fromkeys(found.variants())
    return list(kernels)


def compile_module(file: str, defines: tuple[tuple[str, Any], ...], capability: int) -> Any:
    """Compile ``kernels/<file>.cu`` as CuPy does: its log and its cubin.

    Raises:
        RuntimeError: NVRTC refuses the source; the message is its log.
    """
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    source = (KERNELS / f"{file}.cu").read_bytes()
    options = [
        "-std=c++17",
        "-ftz=true",
        f"-I{KERNELS}",
        f"-arch=sm_{ARCHITECTURES[capability]}",
        "--ptxas-options=-v",
        *(f"-D{name}={value}" for name, value in defines),
    ]
    encoded = [option.encode() for option in options]
    _, program = nvrtc.nvrtcCreateProgram(source, f"{file}.cu".encode(), 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").rstrip("\0 ")
        if int(status) != 0:
            raise RuntimeError(f"{file}.cu for sm_{ARCHITECTURES[capability]}: {text}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = b" " * size
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return text, cubin


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
    kernels: Iterable[Kernel], capabilities: Sequence[int] = tuple(ARCHITECTURES)
) -> list[Row]:
    """Compile kernels for every architecture that can run them."""
    modules: dict[tuple[str, tuple[tuple[str, Any], ...], int], list[Kernel]] = {}
    for kernel in kernels:
        for capability in capabilities:
            if kernel.runs_on(capability):
                modules.setdefault((kernel.file, kernel.defines, capability), []).append(kernel)

    def compiled(key: tuple[str, tuple[tuple[str, Any], ...], int]) -> list[Row]:
        log, cubin = compile_module(*key)
        resources = read_log(log)
        wanted = any(kernel.opcodes for kernel in modules[key])
        sass = disassemble(cubin) if wanted else {}
        return [
            Row(
                kernel,
                key[2],
                resources[kernel.name],
                tuple(faults(kernel, key[2], resources[kernel.name], sass.get(kernel.name, ""))),
            )
            for kernel in modules[key]
        ]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(compiled, modules) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """A line a kernel, a column an architecture: registers, and what is wrong."""
    capabilities = sorted({row.capability for row in rows})
    by_label: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, {})[row.capability] = row
    width = max(len(label) for label in by_label)
    head = " ".join(f"{'sm_' + ARCHITECTURES[c]:>7}" for c in capabilities)
    lines = [f"{'registers a thread':{width}} {head}  threads  shared"]
    for label, found in sorted(by_label.items()):
        kernel = next(iter(found.values())).kernel
        cells = [
            f"{found[c].resources.registers if c in found else '–':>6}"
            + ("!" if c in found and found[c].faults else " ")
            for c in capabilities
        ]
        shared = max(row.resources.shared for row in found.values()) + kernel.shared_bytes
        lines.append(f"{label:{width}} {' '.join(cells)}  {kernel.threads:>7} {shared:>7}")
    for row in rows:
        lines += [f"sm_{ARCHITECTURES[row.capability]} {row.label}: {f}" for f in row.faults]
    return "\n".join(lines)


def main() -> int:
    reason = gate_unavailable()
    if reason:
        print(f"the compile gate {reason}", file=sys.stderr)
        return 2
    files = set(sys.argv[1:])
    kernels = [k for k in launchable() if not files or k.file in files]
    rows = compile_all(kernels)
    print(table(rows))
    wrong = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} kernels compiled, {wrong} with faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
