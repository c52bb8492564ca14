"""How the ``numba`` backend gets compiled code: Python by numba, vector code written as LLVM.

:func:`jit` compiles Python. :class:`Emitter` writes one LLVM function on whole vector registers,
with what such functions share: masks, loops, ``exp``, ``tanh``. numba's cache looks only at the
file of a function, so :func:`jit` marks what it compiles with the contents of all files that take
part.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types

import fastrnn.decoding
from fastrnn.backend import BackendUnavailableError

if numba.config.DISABLE_JIT:
    raise BackendUnavailableError("backend 'numba' is compiled code: unset NUMBA_DISABLE_JIT")

# --- Compilation -------------------------------------------------------------------------------


def _stamp() -> str:
    """A digest of everything that compiled code is made from."""
    sources = sorted(Path(__file__).parent.glob("cpu_*.py"))
    digest = hashlib.sha256()
    for source in (*sources, Path(str(fastrnn.decoding.__file__))):
        digest.update(source.read_bytes())
    return digest.hexdigest()


_STAMP = _stamp()


def jit(function: Callable[..., Any]) -> Any:
    """Compile without the GIL, with IEEE division, never assuming that NaN is absent."""
    compiled = numba.njit(
        nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"}
    )(function)
    # Without this, numba compiles a function anew for a caller that gives it a written-out 0 or 1.
    template = compiled.get_call_template
    compiled.get_call_template = lambda arguments, names: template(
        tuple(map(types.unliteral, arguments)), names
    )
    try:
        compiled.enable_caching()
    except RuntimeError:  # No folder is writable: compile anew in every process.
        return compiled
    file = getattr(compiled._cache, "_cache_file", None)
    if file is not None and hasattr(file, "_source_stamp"):
        file._source_stamp = _STAMP
        _name_what_is_kept(file)
    else:  # A numba whose cache cannot be told apart: rather compile anew than run stale code.
        compiled._cache.disable()
    return compiled


def _name_what_is_kept(file: Any) -> None:
    """Let a cache file say what it holds, and take it for nothing else.

    numba numbers the files of a function's variants and writes the index first: a process that
    starts beside another one can find a number whose file still holds another variant, or older
    code, and would run it.
    """
    save, load = file.save, file.load

    def name(key: Any) -> tuple[str, ...]:
        return "fastrnn", _STAMP, numba.__version__, repr(key)

    def save_named(key: Any, data: Any) -> None:
        save(key, (name(key), data))

    def load_named(key: Any) -> Any:
        try:
            label, data = load(key)
        except Exception:  # nothing is there, or what another version of numba wrote
            return None
        return data if label == name(key) else None

    file.save, file.load = save_named, load_named


# --- The machine -------------------------------------------------------------------------------


def _features() -> set[str]:
    """What compiled code may use: as numba's settings say, or else all that this CPU has."""
    given = numba.config.CPU_FEATURES
    if given is None and numba.config.CPU_NAME in (None, "host"):
        return {name for name, there in llvm.get_host_cpu_features().items() if there}
    return {name[1:] for name in (given or "").split(",") if name.startswith("+")}


_FEATURES = _features()
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX512 = _X86 and "avx512f" in _FEATURES
_AVX = _X86 and "avx2" in _FEATURES
_FMA = not _X86 or "fma" in _FEATURES

VECTOR_BYTES = 64 if _AVX512 else 32 if _AVX else 16
"""Bytes in a vector register."""

MR = 8 if _AVX512 or not _X86 else 6
"""Rows of a tile: ``2 MR`` accumulators, two vectors of weights and one of inputs fit registers."""


def _l2_bytes() -> int:
    """The size of the first core's second-level cache where Linux tells it, else 1 MiB."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


L2_BYTES = _l2_bytes()
"""What loops keep in a core's second-level cache depends on it; their results do not."""


def panel_width(dtype: Any) -> int:
    """``W``: the columns of a panel."""
    return 2 * VECTOR_BYTES // int(np.dtype(dtype).itemsize)


# --- Writing LLVM functions --------------------------------------------------------------------

# (expm1(r) - r) / r² for |r| <= ln 2 / 2, lowest power first: minimax polynomials (Remez), which
# leave a relative error of exp of 4.5e-9 and 1.4e-17, a thirteenth and an eighth of half an ulp.
_EXP_FLOAT: tuple[float, ...] = (
    0.4999999403953552, 0.1666651964187622, 0.04166839271783829, 0.008368773385882378,
    0.001381450449116528,
)  # fmt: skip
_EXP_DOUBLE: tuple[float, ...] = (
    0.5000000000000008, 0.16666666666666635, 0.04166666666655642, 0.008333333333300356,
    0.0013888888937630762, 0.00019841269986009305, 2.48014983339093e-05, 2.755713171834359e-06,
    2.762869861735922e-07, 2.5147567295848877e-08,
)  # fmt: skip

I32, I64 = ir.IntType(32), ir.IntType(64)
DOUBLE = ir.DoubleType()


def integer(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class Emitter:
    """Writes one LLVM function on vectors of ``real`` (float or double).

    ``arguments`` has a letter an argument: i integer, s real, and pointers: p to reals, t to int32,
    l to int64, d to double.
    """

    def __init__(self, module: ir.Module, real: Any, name: str, arguments: str) -> None:
        self.module, self.real = module, real
        self.bits = 32 if isinstance(real, ir.FloatType) else 64
        self.L = VECTOR_BYTES * 8 // self.bits
        self.W = 2 * self.L
        self.vec = ir.VectorType(real, self.L)
        self.ints = ir.VectorType(ir.IntType(self.bits), self.L)
        kinds = {
            "p": real.as_pointer(),
            "t": I32.as_pointer(),
            "l": I64.as_pointer(),
            "d": DOUBLE.as_pointer(),
            "i": I64,
            "s": real,
        }
        self.function = ir.Function(
            module, ir.FunctionType(ir.VoidType(), [kinds[a] for a in arguments]), name
        )
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        if _AVX512:
            # Or LLVM halves the vectors on CPUs that it tunes for 256 bits.
            set.add(self.function.attributes, '"min-legal-vector-width"="512"')
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    # values

    def splat(self, value: float) -> ir.Constant:
        return ir.Constant(self.vec, [value] * self.L)

    def splat_int(self, value: int) -> ir.Constant:
        return ir.Constant(self.ints, [value] * self.L)

    def broadcast(self, scalar: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.L), ir.Undefined)
        one = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.shuffle(one, undefined, [0] * self.L)

    def shuffle(self, x: Any, y: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def reduce(self, vector: Any, step: Callable[[Any, Any], Any]) -> Any:
        """Halve the vector with ``step`` until one element is left."""
        half = self.L // 2
        while half:
            lanes = [(i + half) % self.L for i in range(self.L)]
            vector = step(vector, self.shuffle(vector, vector, lanes))
            half //= 2
        return self.b.extract_element(vector, ir.Constant(I32, 0))

    def intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """Call the LLVM intrinsic ``name``, given with its suffix."""
        declared = self.module.globals.get(name)
        if declared is None:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            declared = ir.Function(self.module, kind, name)
        return self.b.call(declared, arguments)

    @property
    def suffix(self) -> str:
        return f"v{self.L}f{self.bits}"

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """``x y + z``, of reals or of doubles; in one rounding where that is one instruction."""
        bits = 64 if x.type.element == DOUBLE else 32
        name = f"llvm.{'fma' if _FMA else 'fmuladd'}.v{self.L}f{bits}"
        return self.intrinsic(name, x.type, [x, y, z])

    def larger(self, x: Any, y: Any) -> Any:
        """x where it is larger than y, else y."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def smaller(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    # memory

    def at(self, pointer: Any, *offsets: Any) -> Any:
        for offset in offsets:
            pointer = self.b.gep(pointer, [integer(offset) if isinstance(offset, int) else offset])
        return pointer

    def given(self, pointer: Any) -> Any:
        """Whether the pointer is not null."""
        return self.b.icmp_unsigned("!=", self.b.ptrtoint(pointer, I64), integer(0))

    def load(self, pointer: Any, mask: Any = None, other: Any = None) -> Any:
        """A vector; where ``mask`` is given, ``other`` (zeros) in the lanes that it leaves out."""
        vector = self.b.bitcast(pointer, self.vec.as_pointer())
        align = self.bits // 8
        if mask is None:
            return self.b.load(vector, align=align)
        name = f"llvm.masked.load.{self.suffix}.p0"
        part = [vector, ir.Constant(I32, align), mask, other or self.splat(0.0)]
        if _AVX or _AVX512:
            return self.intrinsic(name, self.vec, part)
        with self.b.if_else(self.every(mask)) as (whole, some):
            with whole:
                all_there, here = self.b.load(vector, align=align), self.b.block
            with some:
                some_there, there = self.intrinsic(name, self.vec, part), self.b.block
        loaded = self.b.phi(self.vec)
        loaded.add_incoming(all_there, here)
        loaded.add_incoming(some_there, there)
        return loaded

    def store(self, value: Any, pointer: Any, mask: Any = None) -> None:
        vector = self.b.bitcast(pointer, self.vec.as_pointer())
        align = self.bits // 8
        name = f"llvm.masked.store.{self.suffix}.p0"
        part = [value, vector, ir.Constant(I32, align), mask]
        if mask is None:
            self.b.store(value, vector, align=align)
        elif _AVX512:
            self.intrinsic(name, ir.VoidType(), part)
        else:  # Elsewhere a masked store costs a dozen plain ones (AMD), or goes lane by lane.
            with self.b.if_else(self.every(mask)) as (whole, some):
                with whole:
                    self.b.store(value, vector, align=align)
                with some:
                    self.intrinsic(name, ir.VoidType(), part)

    def prefetch(self, pointer: Any) -> None:
        """Ask for a cache line, into the first level."""
        pointer = self.b.bitcast(pointer, ir.IntType(8).as_pointer())
        hints = [ir.Constant(I32, value) for value in (0, 3, 1)]
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])

    def lanes_below(self, n: Any) -> Any:
        """The mask of lanes with index < n."""
        iota = ir.Constant(ir.VectorType(I64, self.L), list(range(self.L)))
        return self.b.icmp_signed("<", iota, self.broadcast(n))

    def masks(self, n: Any) -> list[Any]:
        """The masks of the first n columns of a panel's row."""
        return [self.lanes_below(self.b.sub(n, integer(j * self.L))) for j in range(2)]

    def every(self, mask: Any) -> Any:
        """Whether the mask has all lanes."""
        lanes = ir.IntType(self.L)
        return self.b.icmp_unsigned("==", self.b.bitcast(mask, lanes), ir.Constant(lanes, -1))

    def all_lanes(self, condition: Any) -> Any:
        """The mask of all lanes or of none."""
        return self.broadcast(condition)

    def variable(self, start: Any) -> Any:
        """A local variable; LLVM turns it into a register."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(start.type)
        self.b.store(start, slot)
        return slot

    def loop(self, start: Any, stop: Any, step: int, body: Callable[[Any], None]) -> None:
        before = self.b.block
        head, inside, after = (
            self.function.append_basic_block(name) for name in ("head", "body", "after")
        )
        self.b.branch(head)
        self.b.position_at_end(head)
        i = self.b.phi(I64)
        i.add_incoming(start, before)
        self.b.cbranch(self.b.icmp_signed("<", i, stop), inside, after)
        self.b.position_at_end(inside)
        body(i)
        i.add_incoming(self.b.add(i, integer(step)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    def panels(self, n: Any, body: Callable[[Any, list[Any]], None]) -> None:
        """``body(p, masks)`` for the panels of n columns: without masks, and last a partial one."""
        shift = self.W.bit_length() - 1
        whole = self.b.ashr(n, integer(shift))
        self.loop(integer(0), whole, 1, lambda p: body(p, [None, None]))
        left = self.b.and_(n, integer(self.W - 1))
        with self.b.if_then(self.b.icmp_signed(">", left, integer(0))):
            body(whole, self.masks(left))

    # functions

    def exp_parts(self, x: Any) -> tuple[Any, Any]:
        """``2ⁿ`` and ``expm1(r)`` with ``x = n ln 2 + r``, ``|r| <= ln 2 / 2``; x must be in range.

        Cody and Waite's reduction, and ``expm1(r) = r + r² p(r)``.
        """
        if self.bits == 32:
            shift, bias, p_of = 23, 127, _EXP_FLOAT
            high, low = 0.693359375, -2.12194440e-4
        else:
            shift, bias, p_of = 52, 1023, _EXP_DOUBLE
            high, low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
        b = self.b
        # Adding 1.5·2^mantissa rounds to an integer and leaves it, here as the exponent of 2ⁿ, in
        # the low bits of the sum. The fence keeps LLVM, which numba allows to reassociate, from
        # taking it off again unrounded.
        magic = self.splat(1.5 * 2**shift + bias)
        shifted = self.fma(x, self.splat(1 / math.log(2)), magic)
        shifted = self.intrinsic(f"llvm.arithmetic.fence.{self.suffix}", self.vec, [shifted])
        n = b.fsub(shifted, magic)
        r = self.fma(n, self.splat(-high), x)
        r = self.fma(n, self.splat(-low), r)
        bits = b.shl(b.bitcast(shifted, self.ints), self.splat_int(shift))
        # In pairs of terms: half as many multiply-adds wait for one another.
        square, p = b.fmul(r, r), None
        for k in range((len(p_of) - 1) // 2 * 2, -1, -2):
            pair = self.splat(p_of[k])
            if k + 1 < len(p_of):
                pair = self.fma(self.splat(p_of[k + 1]), r, pair)
            p = pair if p is None else self.fma(p, square, pair)
        return b.bitcast(bits, self.vec), self.fma(square, p, r)

    def exp(self, x: Any) -> Any:
        """``exp(x)`` for ``x <= 0``, zero where it would be denormal; NaN stays NaN."""
        scale, m = self.exp_parts(x)
        tiny = self.b.fcmp_ordered("<", x, self.splat(-87.0 if self.bits == 32 else -708.0))
        return self.b.select(tiny, self.splat(0.0), self.fma(scale, m, scale))

    def tanh(self, x: Any) -> Any:
        """``tanh(x) = m / (m + 2)`` with ``m = expm1(2|x|)``, and the sign of x; NaN stays NaN."""
        b = self.b
        sign = self.splat_int(1 << (self.bits - 1))
        signs = b.and_(b.bitcast(x, self.ints), sign)
        magnitude = b.bitcast(b.xor(b.bitcast(x, self.ints), signs), self.vec)
        limit = self.splat(10.0 if self.bits == 32 else 20.0)  # tanh rounds to 1 from there on
        large = b.fcmp_ordered(">", magnitude, limit)
        magnitude = b.select(large, limit, magnitude)
        scale, m = self.exp_parts(b.fadd(magnitude, magnitude))
        m = self.fma(scale, m, b.fsub(scale, self.splat(1.0)))
        quotient = self.divide(m, b.fadd(m, self.splat(2.0)))
        return b.bitcast(b.or_(b.bitcast(quotient, self.ints), signs), self.vec)

    def divide(self, x: Any, y: Any) -> Any:
        """``x / y`` within an ulp or two, for y of moderate size."""
        if not (_AVX512 and self.bits == 32):
            return self.b.fdiv(x, y)
        # Two multiply-adds instead of the 16 cycles of a division: an estimate of 14 bits of 1/y,
        # and one step of Newton's iteration.
        every = ir.Constant(ir.IntType(16), -1)
        name = "llvm.x86.avx512.rcp14.ps.512"
        estimate = self.intrinsic(name, self.vec, [y, self.splat(0.0), every])
        left = self.fma(self.b.fneg(y), estimate, self.splat(1.0))
        return self.b.fmul(x, self.fma(estimate, left, estimate))


def once(name: str, arguments: str) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Write a function into a module where it is not there yet.

    The decorated function receives an emitter, its LLVM arguments, and whatever chose the variant.
    """

    def decorate(write: Callable[..., None]) -> Callable[..., Any]:
        def emit(module: ir.Module, real: Any, *variant: Any) -> Any:
            parts = (name, *variant, "f32" if isinstance(real, ir.FloatType) else "f64")
            full = ".".join(("fastrnn", *map(str, parts)))
            known = module.globals.get(full)
            if known is None:
                e = Emitter(module, real, full, arguments)
                write(e, e.function.args, *variant)
                e.b.ret_void()
                known = e.function
            return known

        return emit

    return decorate
