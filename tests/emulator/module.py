"""Launches kernels of a compiled module on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.emulator.build import (
    Defines,
    Library,
    Sanitizer,
    kernel_library,
    name_lines,
    runtime_library,
)
from tests.emulator.memory import Allocations, guarded_empty, is_guarded

Order = Literal["forward", "reverse", "eager"] | int
Dimensions = int | tuple[int, ...]

ORDERS = {"forward": 0, "reverse": 1, "eager": 2}
SHUFFLED = 3

SHARED_LIMIT = 227 * 1024  # sm_90; a block of other architectures has less
MAX_THREADS = 1024
MAX_CLUSTER = 16


class EmulatorError(RuntimeError):
    """A kernel failed: a deadlock, a bad address, an assertion, a misused barrier."""


@dataclass(frozen=True)
class Statistics:
    """What one launch took."""

    seconds: float
    switches: int


class Parameter(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char),
        ("element", ctypes.c_char),
        ("constant", ctypes.c_bool),
        ("size", ctypes.c_uint),
    )


class KernelEntry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(Parameter)),
        ("parameter_count", ctypes.c_uint),
        ("max_threads", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
    )


class SharedVariableEntry(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_ulonglong), ("bytes", ctypes.c_ulonglong))


class LaunchEntry(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(KernelEntry)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_bytes", ctypes.c_uint),
        ("static_bytes", ctypes.c_uint),
        ("variables", ctypes.POINTER(SharedVariableEntry)),
        ("variable_count", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("cooperative", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
        ("workers", ctypes.c_uint),
        ("stack_bytes", ctypes.c_uint),
        ("spin_limit", ctypes.c_uint),
        ("timeout", ctypes.c_double),
        ("flush_denormals", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


class ResultEntry(ctypes.Structure):
    _fields_ = (
        ("error", ctypes.c_void_p),
        ("switches", ctypes.c_ulonglong),
        ("seconds", ctypes.c_double),
    )


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.emulator_launch.argtypes = [ctypes.POINTER(LaunchEntry), ctypes.POINTER(ResultEntry)]
    library.emulator_launch.restype = None
    library.emulator_free.argtypes = [ctypes.c_void_p]
    library.emulator_free.restype = None
    return library


def three(value: Dimensions, what: str) -> tuple[int, int, int]:
    """Grid or block dimensions, filled up with ones."""
    given = (value,) if isinstance(value, int | np.integer) else tuple(value)
    if not 1 <= len(given) <= 3 or any(int(v) < 1 for v in given):
        raise ValueError(f"{what} must be one to three positive numbers, not {value!r}")
    x, y, z = (*(int(v) for v in given), 1, 1)[:3]
    return x, y, z


@dataclass(frozen=True)
class Geometry:
    """A launch's checked dimensions."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    cluster: int

    @staticmethod
    def of(
        name: str,
        entry: KernelEntry,
        static_bytes: int,
        grid: Dimensions,
        block: Dimensions,
        shared_bytes: int,
        cluster: int | None,
    ) -> Geometry:
        """Refuse what a GPU's launch would refuse."""
        grid3, block3 = three(grid, "grid"), three(block, "block")
        threads = int(np.prod(block3))
        limit = entry.max_threads or MAX_THREADS
        if threads > limit:
            raise ValueError(f"{name}: a block of {threads} threads, at most {limit} are allowed")
        if entry.cluster and cluster not in (None, 1, entry.cluster):
            raise ValueError(
                f"{name}: cluster={cluster}, but __cluster_dims__ says {entry.cluster}"
            )
        if block3[2] > 64 or max(grid3[1:]) > 65_535:
            raise ValueError(f"{name}: at most 64 threads along z, and 65,535 blocks along y and z")
        size = entry.cluster or cluster or 1
        if not 1 <= size <= MAX_CLUSTER or grid3[0] % size:
            raise ValueError(f"{name}: clusters of {size} do not divide a grid of {grid3}")
        if shared_bytes < 0 or shared_bytes + static_bytes > SHARED_LIMIT:
            raise ValueError(
                f"{name}: {shared_bytes} + {static_bytes} bytes of shared memory, "
                f"a block has at most {SHARED_LIMIT}"
            )
        return Geometry(grid3, block3, int(shared_bytes), size)


@dataclass(frozen=True)
class Checked:
    """An argument that fits its parameter."""

    parameter: Parameter
    value: Any

    @property
    def is_array(self) -> bool:
        return isinstance(self.value, np.ndarray)

    @property
    def writable(self) -> bool:
        return self.is_array and not self.parameter.constant


def check_arguments(name: str, entry: KernelEntry, args: Sequence[Any]) -> list[Checked]:
    """Compare arguments with the kernel's signature."""
    if len(args) != entry.parameter_count:
        raise TypeError(f"{name} takes {entry.parameter_count} arguments, not {len(args)}")
    return [
        Checked(entry.parameters[i], _fit(f"{name}: argument {i}", entry.parameters[i], arg))
        for i, arg in enumerate(args)
    ]


def _fit(where: str, parameter: Parameter, arg: Any) -> Any:
    element = parameter.element.decode()
    if parameter.kind == b"p":
        if arg is None:
            return None
        if not isinstance(arg, np.ndarray):
            raise TypeError(f"{where} must be an array or None, not {type(arg).__name__}")
        if element != "v" and arg.dtype != np.dtype(element):
            raise TypeError(f"{where} must be an array of {np.dtype(element)}, not {arg.dtype}")
        if not arg.flags.c_contiguous:
            raise ValueError(f"{where} must be C-contiguous")
        if not parameter.constant and not arg.flags.writeable:
            raise ValueError(f"{where} is written, but the array is read-only")
        return arg
    if parameter.kind == b"o":
        raw = bytes(arg)
        if len(raw) != parameter.size:
            raise TypeError(f"{where} must be an object of {parameter.size} bytes, not {len(raw)}")
        return raw
    if not isinstance(arg, np.generic) or arg.dtype != np.dtype(element):
        kind = getattr(arg, "dtype", type(arg).__name__)
        raise TypeError(f"{where} must be a scalar numpy.{np.dtype(element)}, not {kind}")
    return arg


class _Memory:
    """The arrays of one launch, each whole allocation copied once into guarded memory."""

    def __init__(self, arrays: Sequence[NDArray[Any]], guard: bool) -> None:
        self._guard = guard
        self._allocations = Allocations(a for a in arrays if not self._in_place(a))
        self._copies: dict[int, NDArray[Any]] = {}
        self._written: set[int] = set()

    def _in_place(self, array: NDArray[Any]) -> bool:
        return not self._guard or is_guarded(array.ctypes.data)

    def address(self, array: NDArray[Any], written: bool) -> int:
        if self._in_place(array):
            return array.ctypes.data
        number, offset = self._allocations.place(array)
        if number not in self._copies:
            original = self._allocations.bytes(number)
            self._copies[number] = guarded_empty(original.size, np.uint8)
            self._copies[number][:] = original
        if written:
            self._written.add(number)
        return self._copies[number].ctypes.data + offset

    def copy_back(self) -> None:
        for number in self._written:
            self._allocations.bytes(number)[:] = self._copies[number]


class Module:
    """A compiled kernel file."""

    def __init__(self, source: Path, library: Library) -> None:
        self.source = source
        self.static_shared_bytes = library.static_bytes
        """The ``__shared__`` variables of all kernels of the file together."""
        _runtime()
        self._loaded = ctypes.CDLL(str(library.path))
        count = ctypes.c_uint.in_dll(self._loaded, "emulator_kernel_count").value
        table = (KernelEntry * count).in_dll(self._loaded, "emulator_kernels")
        self._kernels = {entry.name.decode(): entry for entry in table}
        self._variables = (SharedVariableEntry * len(library.variables))(
            *(SharedVariableEntry(v.offset, v.size) for v in library.variables)
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names that :meth:`launch` takes."""
        return tuple(self._kernels)

    def entry(self, kernel: str) -> KernelEntry:
        try:
            return self._kernels[kernel]
        except KeyError:
            names = ", ".join(self._kernels)
            raise KeyError(f"{self.source.name} has no kernel {kernel!r}, only {names}") from None

    def launch(
        self,
        kernel: str,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Any],
        shared_bytes: int = 0,
        cluster: int | None = None,
        cooperative: bool = False,
        order: Order = "forward",
        *,
        guard: bool = True,
        workers: int = 2,
        timeout: float = 60.0,
        spin_limit: int = 20_000,
        flush_denormals: bool = False,
        stack_bytes: int = 64 * 1024,
    ) -> Statistics:
        """Run a kernel to its end; arrays that it writes are changed in place.

        ``order`` is the order of threads: "forward", "reverse", "eager" (a warp runs as far ahead
        as the barriers let it) or the seed of a random order, new in every round. ``guard`` runs
        on copies of the arrays with guard pages around them. ``spin_limit`` is the number of
        rounds in which every thread polls that counts as a hang, and ``timeout`` the seconds.
        """
        entry = self.entry(kernel)
        checked = check_arguments(kernel, entry, args)
        geometry = Geometry.of(
            kernel, entry, self.static_shared_bytes, grid, block, shared_bytes, cluster
        )
        memory = _Memory([c.value for c in checked if c.is_array], guard)
        holders = [self._holder(c, memory) for c in checked]
        pointers = (ctypes.c_void_p * (len(holders) + 1))(*(ctypes.addressof(h) for h in holders))
        code, seed = (ORDERS[order], 0) if isinstance(order, str) else (SHUFFLED, int(order))
        launch = LaunchEntry(
            kernel=ctypes.pointer(entry),
            grid=geometry.grid,
            block=geometry.block,
            dynamic_bytes=geometry.shared_bytes,
            static_bytes=self.static_shared_bytes,
            variables=self._variables,
            variable_count=len(self._variables),
            cluster=geometry.cluster,
            cooperative=cooperative,
            order=code,
            seed=seed,
            workers=workers,
            stack_bytes=stack_bytes,
            spin_limit=spin_limit,
            timeout=timeout,
            flush_denormals=flush_denormals,
            arguments=pointers,
        )
        result = ResultEntry()
        _runtime().emulator_launch(ctypes.byref(launch), ctypes.byref(result))
        if result.error:
            text = ctypes.string_at(result.error).decode()
            _runtime().emulator_free(result.error)
            raise EmulatorError(name_lines(text))
        memory.copy_back()
        return Statistics(result.seconds, result.switches)

    @staticmethod
    def _holder(argument: Checked, memory: _Memory) -> Any:
        """The parameter's value in memory, as a kernel launch passes it."""
        if argument.parameter.kind == b"p":
            address = 0
            if argument.is_array:
                address = memory.address(argument.value, argument.writable)
            return ctypes.c_void_p(address)
        raw = argument.value if isinstance(argument.value, bytes) else argument.value.tobytes()
        # Objects may ask for 16-byte alignment.
        storage = ctypes.create_string_buffer(len(raw) + 16)
        shift = -ctypes.addressof(storage) % 16
        ctypes.memmove(ctypes.addressof(storage) + shift, raw, len(raw))
        view = (ctypes.c_char * len(raw)).from_buffer(storage, shift)
        return view


class Emulator:
    """Compiles kernel files, each once for its defines."""

    def module(
        self,
        source: str | Path,
        defines: Defines | None = None,
        sanitize: Sanitizer | None = None,
    ) -> Module:
        """The compiled file. Sanitized code runs only in :func:`tests.emulator.run_sanitized`."""
        if sanitize is not None:
            raise ValueError("sanitized kernels run in a process of their own: run_sanitized()")
        path = Path(source).resolve()
        return _module(path, kernel_library(path, defines or {}))


@functools.cache
def _module(path: Path, library: Library) -> Module:
    return Module(path, library)
