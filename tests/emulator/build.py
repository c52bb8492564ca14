"""Compiles kernels and the emulator's runtime with g++, once for each content of their sources."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"

Sanitizer = Literal["address", "thread"]
Defines = Mapping[str, str | int]

# Version 4: addr2line names the wrong file for the first function of a version 5 line table.
BASE_FLAGS = ("-std=c++20", "-O2", "-gdwarf-4", "-fPIC", "-march=native", "-fno-math-errno")
# A tail call would hide the kernel's line from the messages.
KERNEL_FLAGS = (*BASE_FLAGS, "-fno-optimize-sibling-calls")
WARNING_FLAGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-sign-compare")
SANITIZER_FLAGS: dict[Sanitizer | None, tuple[str, ...]] = {
    None: (),
    # AddressSanitizer leaves thread-local variables alone, which is what __shared__ arrays are
    # here: indices into arrays of known size are checked by the bounds sanitizer instead.
    "address": (
        "-fsanitize=address,bounds-strict,alignment",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ),
    "thread": ("-fsanitize=thread", "-Wno-tsan"),
}


class BuildError(RuntimeError):
    """g++ rejected a source; the text is its output."""


def compiler() -> str:
    """The C++ compiler: $CXX or g++."""
    return os.environ.get("CXX", "g++")


@functools.cache
def emulator_unavailable() -> str | None:
    """Why the emulator cannot run here, or None where it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator needs x86-64 Linux, not {platform.machine()} {sys.platform}"
    for tool in (compiler(), "readelf"):
        if shutil.which(tool) is None:
            return f"the emulator needs {tool} (a Debian or Ubuntu package: g++)"
    version = _output([compiler(), "-dumpfullversion", "-dumpversion"]).split(".")[0]
    if not version.isdigit() or int(version) < 11:
        return f"the emulator needs g++ 11 or later, not {version}"
    return None


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cache_directory() -> Path:
    """Where compiled modules are kept; ``FASTRNN_EMULATOR_CACHE`` overrides it."""
    default = Path(tempfile.gettempdir()) / f"fastrnn-emulator-{os.getuid()}"
    directory = Path(os.environ.get("FASTRNN_EMULATOR_CACHE", default))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@functools.cache
def _machine() -> str:
    """Compiler and processor: -march=native code must not travel in the cache."""
    version = _output([compiler(), "--version"]).splitlines()[0]
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return f"{version}\n{flags}"


def _digest(files: Iterable[Path], *texts: str) -> str:
    digest = hashlib.sha256(_machine().encode())
    for path in sorted(set(files)):
        digest.update(f"\0{path}\0".encode())
        digest.update(path.read_bytes())
    for text in texts:
        digest.update(f"\0{text}".encode())
    return digest.hexdigest()[:20]


def _headers() -> list[Path]:
    return [*HERE.glob("*.h"), *HERE.glob("include/*.h")]


def _compile(target: Path, arguments: list[str]) -> Path:
    """Run g++ into ``target``; parallel processes may do so at once, and one of them wins."""
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [compiler(), *arguments, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\n{done.stderr}")
        output.rename(target)
    return target


@functools.cache
def runtime_library() -> Path:
    """The scheduler as a shared library. It serves plain and sanitized processes alike."""
    source = HERE / "runtime.cpp"
    flags = ("-std=c++20", "-O2", "-g", "-fPIC", "-shared", "-Wall")
    digest = _digest([source, *_headers()], *flags)
    target = cache_directory() / f"libemulator-{digest}.so"
    return _compile(target, [*flags, str(source), "-lpthread", "-ldl"])


def runner_program(sanitize: Sanitizer) -> Path:
    """The program that runs one launch under a sanitizer."""
    source = HERE / "runner.cpp"
    runtime = runtime_library()
    flags = [*BASE_FLAGS[:3], *SANITIZER_FLAGS[sanitize]]
    digest = _digest([source, runtime, *_headers()], *flags)
    target = cache_directory() / f"runner-{sanitize}-{digest}"
    link = [str(runtime), f"-Wl,-rpath,{runtime.parent}", "-ldl", "-lpthread"]
    return _compile(target, [*flags, str(source), *link])


@dataclass(frozen=True)
class SharedVariable:
    """A ``__shared__`` variable: its place among the module's static shared memory."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Library:
    """A compiled kernel file."""

    path: Path
    variables: tuple[SharedVariable, ...]
    static_bytes: int


@dataclass(frozen=True)
class KernelText:
    """A kernel as the scan of the preprocessed source sees it."""

    name: str
    launch_bounds: str
    cluster_dims: str


_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\w+|\S')


def scan_kernels(preprocessed: str) -> list[KernelText]:
    """Find every ``extern "C" __global__ void name(`` with its bounds and cluster dimensions."""
    tokens = _TOKEN.findall(preprocessed)
    found: dict[str, KernelText] = {}
    for start, token in enumerate(tokens):
        if token != "__global__":
            continue
        window = tokens[max(0, start - 60) : start]
        # Back to the end of the previous declaration: templates have no launchable name.
        for index in range(len(window) - 1, -1, -1):
            if window[index] in (";", "}"):
                window = window[index + 1 :]
                break
        linkage = [i for i, t in enumerate(window) if t == "extern"]
        if not linkage or '"C"' not in window[linkage[-1] :]:
            continue
        attributes = {"__launch_bounds__": "()", "__cluster_dims__": "()"}
        position = start + 1
        # Attributes may stand on either side of `void`, and before __global__.
        for index in range(start - len(window), start):
            if tokens[index] in attributes:
                attributes[tokens[index]] = _parenthesised(tokens, index + 1)[0]
        while position + 1 < len(tokens):
            word = tokens[position]
            if tokens[position + 1] == "(":
                text, end = _parenthesised(tokens, position + 1)
                if word in attributes:
                    attributes[word] = text
                elif not word.startswith("__"):
                    found[word] = KernelText(
                        word, attributes["__launch_bounds__"], attributes["__cluster_dims__"]
                    )
                    break
                position = end
            else:
                position += 1
    return list(found.values())


def _parenthesised(tokens: list[str], start: int) -> tuple[str, int]:
    """The text from the parenthesis at ``start`` to its partner, and the place after it."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += (tokens[index] == "(") - (tokens[index] == ")")
        if depth == 0:
            return " ".join(tokens[start : index + 1]), index + 1
    raise BuildError("unbalanced parentheses after __global__")


def kernel_library(source: Path, defines: Defines, sanitize: Sanitizer | None = None) -> Library:
    """Compile one kernel file, or take it from the cache."""
    source = Path(source).resolve()
    if not source.is_file():
        raise FileNotFoundError(f"no kernel file {source}")
    folders = {source.parent, KERNELS}
    sources = [f for folder in folders for f in folder.glob("*.cu*") if f.suffix in (".cu", ".cuh")]
    options = [f"-D{name}={value}" for name, value in defines.items()]
    flags = [*KERNEL_FLAGS, *WARNING_FLAGS, *SANITIZER_FLAGS[sanitize]]
    runtime = runtime_library()
    digest = _digest([*sources, *_headers(), runtime], str(source), *flags, *options)
    target = cache_directory() / f"{source.stem}-{digest}.so"
    if not target.exists():
        folders_flags = [f"-I{source.parent}", f"-I{KERNELS}", f"-I{HERE}", f"-I{HERE / 'include'}"]
        common = [*flags, *options, *folders_flags, "-include", str(HERE / "cuda_on_cpu.h")]
        _compile_kernels(source, target, common, runtime)
    return _inspect(target)


def _compile_kernels(source: Path, target: Path, common: list[str], runtime: Path) -> None:
    scan = [compiler(), *common, "-DCUDA_ON_CPU_SCAN", "-E", "-P", "-x", "c++", str(source)]
    done = subprocess.run(scan, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(scan)}\n{done.stderr}")
    kernels = scan_kernels(done.stdout)
    if not kernels:
        raise BuildError(f'{source} has no extern "C" __global__ function')
    table = ",\n".join(
        f"  EMULATOR_KERNEL({k.name}, {k.launch_bounds}, {k.cluster_dims})" for k in kernels
    )
    text = (
        f'#include "{source}"\n#include "include/register.h"\n'
        f'extern "C" {{\nextern const emulator::Kernel emulator_kernels[];\n'
        f"const emulator::Kernel emulator_kernels[] = {{\n{table}\n}};\n"
        f"extern const unsigned emulator_kernel_count;\n"
        f"const unsigned emulator_kernel_count = {len(kernels)};\n}}\n"
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        registration = Path(scratch) / f"{source.stem}.cpp"
        registration.write_text(text)
        link = [str(runtime), f"-Wl,-rpath,{runtime.parent}"]
        _compile(target, [*common, "-shared", "-x", "c++", str(registration), "-x", "none", *link])


@functools.cache
def _inspect(library: Path) -> Library:
    """The thread-local segment of a compiled module: its static shared memory."""
    variables = []
    for line in _output(["readelf", "-sW", str(library)]).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[3] == "TLS" and fields[6] != "UND":
            # A size is printed in hexadecimal from 100,000 on.
            variables.append(SharedVariable(fields[7], int(fields[1], 16), int(fields[2], 0)))
    static_bytes = 0
    for line in _output(["readelf", "-lW", str(library)]).splitlines():
        fields = line.split()
        if fields[:1] == ["TLS"]:
            static_bytes = int(fields[5], 16)
    unique = {(v.offset, v.size): v for v in variables}
    return Library(library, tuple(unique[key] for key in sorted(unique)), static_bytes)


_CODE = re.compile(r"<([^<>\s]+)\+0x([0-9a-f]+)>")


def name_lines(text: str) -> str:
    """Replace every ``<file+0xoffset>`` of an emulator message by the source lines it came from."""
    if shutil.which("addr2line") is None:
        return text

    @functools.cache
    def lines(module: str, offset: str) -> str:
        command = ["addr2line", "-i", "-e", module, f"0x{offset}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        places: list[str] = []
        for place in done.stdout.splitlines():
            name, _, line = place.partition(" (")[0].rpartition(":")
            if name.startswith(str(HERE / "include")) or name in ("??", "") or "/c++/" in name:
                continue
            short = f"{Path(name).name}:{line}"
            if short not in places:
                places.append(short)
        if not places:
            return f"<{Path(module).name}+0x{offset}>"
        return "at " + ", called at ".join(places)

    return _CODE.sub(lambda match: lines(match[1], match[2]), text)
