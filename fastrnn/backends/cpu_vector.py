"""Vector code of the ``numba`` backend: LLVM functions that compiled Python can call.

**Panels.** A matrix ``[rows, N]`` is kept as panels of ``W`` columns, two vector registers: element
``(r, j)`` lies at ``[j // W, r, j % W]``. Everything a tile reads is then contiguous, for a product
with the weights (rows of ``h``) and for the gradient of the weights (columns of ``h``) alike. The
last panel is padded, so no loop over columns has a remainder.

**Tiles.** ``MR`` rows by ``W`` columns of a product stay in registers over the whole inner
dimension: one load of the weights feeds ``MR`` multiply-adds (Goto, van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008).

The functions at the end take ``like``, a scalar whose type chooses float or double, and name memory
by address, strides in elements. numba's cache looks only at the file of a function, so :func:`jit`
marks what it compiles with the contents of all files that take part.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import hashlib
import inspect
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
from numba.extending import intrinsic

import fastrnn.decoding

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
    compiled.enable_caching()
    file = getattr(compiled._cache, "_cache_file", None)
    if file is not None and hasattr(file, "_source_stamp"):
        file._source_stamp = _STAMP
    else:  # A numba whose cache cannot be told apart: rather compile anew than run stale code.
        compiled._cache.disable()
    return compiled


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


CACHE_LINE = 64

AHEAD = 16
"""Steps of the inner dimension by which a tile asks for its memory before it reads it."""


def panel_width(dtype: Any) -> int:
    """``W``: the columns of a panel."""
    return 2 * VECTOR_BYTES // int(np.dtype(dtype).itemsize)


# --- Writing LLVM functions --------------------------------------------------------------------

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_DOUBLE = ir.DoubleType()


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


class _Emitter:
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
            "t": _I32.as_pointer(),
            "l": _I64.as_pointer(),
            "d": _DOUBLE.as_pointer(),
            "i": _I64,
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
        one = self.b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.shuffle(one, undefined, [0] * self.L)

    def shuffle(self, x: Any, y: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def reduce(self, vector: Any, step: Callable[[Any, Any], Any]) -> Any:
        """Halve the vector with ``step`` until one element is left."""
        half = self.L // 2
        while half:
            lanes = [(i + half) % self.L for i in range(self.L)]
            vector = step(vector, self.shuffle(vector, vector, lanes))
            half //= 2
        return self.b.extract_element(vector, ir.Constant(_I32, 0))

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
        bits = 64 if x.type.element == _DOUBLE else 32
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
            pointer = self.b.gep(pointer, [_int(offset) if isinstance(offset, int) else offset])
        return pointer

    def given(self, pointer: Any) -> Any:
        """Whether the pointer is not null."""
        return self.b.icmp_unsigned("!=", self.b.ptrtoint(pointer, _I64), _int(0))

    def load(self, pointer: Any, mask: Any = None, other: Any = None) -> Any:
        """A vector; where ``mask`` is given, ``other`` (zeros) in the lanes that it leaves out."""
        vector = self.b.bitcast(pointer, self.vec.as_pointer())
        if mask is None:
            return self.b.load(vector, align=self.bits // 8)
        return self.intrinsic(
            f"llvm.masked.load.{self.suffix}.p0",
            self.vec,
            [vector, ir.Constant(_I32, self.bits // 8), mask, other or self.splat(0.0)],
        )

    def store(self, value: Any, pointer: Any, mask: Any = None) -> None:
        vector = self.b.bitcast(pointer, self.vec.as_pointer())
        if mask is None:
            self.b.store(value, vector, align=self.bits // 8)
            return
        self.intrinsic(
            f"llvm.masked.store.{self.suffix}.p0",
            ir.VoidType(),
            [value, vector, ir.Constant(_I32, self.bits // 8), mask],
        )

    def prefetch(self, pointer: Any) -> None:
        """Ask for a cache line, into the first level."""
        pointer = self.b.bitcast(pointer, ir.IntType(8).as_pointer())
        hints = [ir.Constant(_I32, value) for value in (0, 3, 1)]
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])

    def lanes_below(self, n: Any) -> Any:
        """The mask of lanes with index < n."""
        iota = ir.Constant(ir.VectorType(_I64, self.L), list(range(self.L)))
        return self.b.icmp_signed("<", iota, self.broadcast(n))

    def masks(self, n: Any) -> list[Any]:
        """The masks of the first n columns of a panel's row."""
        return [self.lanes_below(self.b.sub(n, _int(j * self.L))) for j in range(2)]

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
        i = self.b.phi(_I64)
        i.add_incoming(start, before)
        self.b.cbranch(self.b.icmp_signed("<", i, stop), inside, after)
        self.b.position_at_end(inside)
        body(i)
        i.add_incoming(self.b.add(i, _int(step)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    def panels(self, n: Any, body: Callable[[Any, list[Any]], None]) -> None:
        """``body(p, masks)`` for the panels of n columns: without masks, and last a partial one."""
        shift = self.W.bit_length() - 1
        whole = self.b.ashr(n, _int(shift))
        self.loop(_int(0), whole, 1, lambda p: body(p, [None, None]))
        left = self.b.and_(n, _int(self.W - 1))
        with self.b.if_then(self.b.icmp_signed(">", left, _int(0))):
            body(whole, self.masks(left))

    # functions

    def exp_parts(self, x: Any) -> tuple[Any, Any]:
        """``2ⁿ`` and ``expm1(r)`` with ``x = n ln 2 + r``, ``|r| <= ln 2 / 2``; x must be in range.

        Cody and Waite's reduction and the Taylor polynomial up to less than half an ulp.
        """
        if self.bits == 32:
            magic, shift, one, degree = 1.5 * 2**23, 23, 0x3F800000, 7
            high, low = 0.693359375, -2.12194440e-4
        else:
            magic, shift, one, degree = 1.5 * 2**52, 52, 0x3FF0000000000000, 14
            high, low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
        b = self.b
        # Adding 1.5·2^mantissa rounds to an integer and leaves it in the low bits of the sum. The
        # fence keeps LLVM, which numba allows to reassociate, from taking it off again unrounded.
        shifted = self.fma(x, self.splat(1 / math.log(2)), self.splat(magic))
        shifted = self.intrinsic(f"llvm.arithmetic.fence.{self.suffix}", self.vec, [shifted])
        n = b.fsub(shifted, self.splat(magic))
        r = self.fma(n, self.splat(-high), x)
        r = self.fma(n, self.splat(-low), r)
        bits = b.shl(b.bitcast(shifted, self.ints), self.splat_int(shift))
        scale = b.bitcast(b.add(bits, self.splat_int(one)), self.vec)
        p = self.splat(1 / math.factorial(degree))
        for k in range(degree - 1, 1, -1):
            p = self.fma(p, r, self.splat(1 / math.factorial(k)))
        return scale, self.fma(b.fmul(r, r), p, r)

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


_Emit = Callable[[ir.Module, Any], Any]


def _once(name: str, arguments: str) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Write a function into a module where it is not there yet.

    The decorated function receives an emitter, its LLVM arguments, and whatever chose the variant.
    """

    def decorate(write: Callable[..., None]) -> Callable[..., Any]:
        def emit(module: ir.Module, real: Any, *variant: Any) -> Any:
            parts = (name, *variant, "f32" if isinstance(real, ir.FloatType) else "f64")
            full = ".".join(("fastrnn", *map(str, parts)))
            known = module.globals.get(full)
            if known is None:
                e = _Emitter(module, real, full, arguments)
                write(e, e.function.args, *variant)
                e.b.ret_void()
                known = e.function
            return known

        return emit

    return decorate


# --- Products ----------------------------------------------------------------------------------


@_once("tile", "piippip")
def _emit_tile(e: _Emitter, arguments: Any, transposed: bool, rows: int) -> None:
    """``OUT [rows, W] = INIT + A [rows, K] · B [K, W]`` in registers.

    Arguments: A, elements between A's panels, K, B, INIT or null, elements between its rows (0: the
    same row for all), OUT. Where ``transposed``, A is one panel ``[K, W]`` read by columns:
    ``A[m, k]`` lies at ``k W + m``.
    """
    A, a_panel, K, B, init, init_row, out = arguments
    W = e.W
    # A tile of few rows has too few accumulators to hide the latency of a multiply-add.
    chains = max(1, 8 // (2 * rows))
    acc = [
        [[e.variable(e.splat(0.0)) for _ in range(2)] for _ in range(rows)] for _ in range(chains)
    ]
    with e.b.if_then(e.given(init)):
        for m in range(rows):
            for j in range(2):
                start = e.at(init, e.b.mul(init_row, _int(m)), j * e.L)
                e.b.store(e.load(start), acc[0][m][j])

    def multiply_add(a: Any, b: Any, k: int) -> None:
        weights = [e.load(e.at(b, k * W + j * e.L)) for j in range(2)]
        for m in range(rows):
            x = e.broadcast(e.b.load(e.at(a, k * W + m if transposed else m * W + k)))
            for j in range(2):
                slot = acc[k % chains][m][j]
                e.b.store(e.fma(x, weights[j], e.b.load(slot)), slot)

    def look_ahead(a: Any, b: Any, k: Any, count: int) -> None:
        """Ask for what the tile reads AHEAD steps later, and for the same rows of the next tile."""
        rows_on = e.b.mul(k, _int(W))
        line = CACHE_LINE * 8 // e.bits
        for u in range(AHEAD, AHEAD + count):
            for j in range(0, W, line):
                e.prefetch(e.at(b, rows_on, u * W + j))
            if transposed:
                e.prefetch(e.at(a, rows_on, u * W))
        if not transposed:
            for j in range(0, rows * count, line):
                e.prefetch(e.at(a, e.b.mul(k, _int(rows)), rows * W + j))

    def run(a: Any, b: Any, n: Any) -> None:
        def steps(count: int) -> Callable[[Any], None]:
            def body(k: Any) -> None:
                rows_on = e.b.mul(k, _int(W))
                if count > 1:
                    look_ahead(a, b, k, count)
                for u in range(count):
                    multiply_add(e.at(a, rows_on if transposed else k), e.at(b, rows_on), u)

            return body

        whole = e.b.and_(n, _int(-4))
        e.loop(_int(0), whole, 4, steps(4))
        e.loop(whole, n, 1, steps(1))

    if transposed:
        run(A, B, K)
    else:
        panel = e.variable(A)

        def panels(k: Any) -> None:
            a, left = e.b.load(panel), e.b.sub(K, k)
            run(a, e.at(B, e.b.mul(k, _int(W))), e.smaller(left, _int(W)))
            e.b.store(e.at(a, a_panel), panel)

        e.loop(_int(0), K, W, panels)
    for m in range(rows):
        for j in range(2):
            total = e.b.load(acc[0][m][j])
            for chain in acc[1:]:
                total = e.b.fadd(total, e.b.load(chain[m][j]))
            e.store(total, e.at(out, m * W + j * e.L))


@_once("tiles", "ipiippip")
def _emit_tiles(e: _Emitter, arguments: Any, transposed: bool) -> None:
    """The tile of as many rows as the first argument says, 1 to MR."""
    done = e.function.append_basic_block("done")
    choice = e.b.switch(arguments[0], done)
    for rows in range(1, MR + 1):
        block = e.function.append_basic_block(f"rows_{rows}")
        choice.add_case(_int(rows), block)
        e.b.position_at_end(block)
        e.b.call(_emit_tile(e.module, e.real, transposed, rows), arguments[1:])
        e.b.branch(done)
    e.b.position_at_end(done)


# --- What follows a product --------------------------------------------------------------------


def _row_numbers(e: _Emitter, rows: Any) -> Callable[[Any], Any]:
    """Which row is the i-th: ``rows[i]``, or i where rows is null."""
    given = e.given(rows)

    def number(i: Any) -> Any:
        chosen = e.variable(i)
        with e.b.if_then(given):
            e.b.store(e.b.sext(e.b.load(e.at(rows, i)), _I64), chosen)
        return e.b.load(chosen)

    return number


@_once("tanh", "iippitpipi")
def _emit_tanh(e: _Emitter, arguments: Any) -> None:
    """``C = tanh(P + Z)`` for m rows and n columns; where D is given, D = C as well.

    Row i of Z is the one that TOKENS[i] names, where given. Arguments: m, n, P ``[m, W]``, Z,
    elements between its rows, TOKENS, C, elements between its rows, D, elements between its rows.
    """
    m, n, P, Z, z_row, tokens, C, c_row, D, d_row = arguments
    masks, copied, number = e.masks(n), e.given(D), _row_numbers(e, tokens)

    def row(i: Any) -> None:
        z = e.at(Z, e.b.mul(number(i), z_row))
        values = []
        for j, mask in enumerate(masks):
            product = e.load(e.at(P, e.b.mul(i, _int(e.W)), j * e.L))
            values.append(e.tanh(e.b.fadd(product, e.load(e.at(z, j * e.L), mask))))
            e.store(values[j], e.at(C, e.b.mul(i, c_row), j * e.L), mask)
        with e.b.if_then(copied):
            for j, mask in enumerate(masks):
                e.store(values[j], e.at(D, e.b.mul(i, d_row), j * e.L), mask)

    e.loop(_int(0), m, 1, row)


@_once("dtanh", "iippipipipi")
def _emit_dtanh(e: _Emitter, arguments: Any) -> None:
    """``C = (P + G) (1 - Y²)`` for m rows and n columns; where D is given, D = C as well.

    Arguments: m, n, P ``[m, W]``, then pointer and elements between rows of G, Y, C and D.
    """
    m, n, P, G, g_row, Y, y_row, C, c_row, D, d_row = arguments
    masks, copied = e.masks(n), e.given(D)

    def row(i: Any) -> None:
        values = []
        for j, mask in enumerate(masks):

            def of(base: Any, stride: Any, j: int = j, mask: Any = mask) -> Any:
                return e.load(e.at(base, e.b.mul(i, stride), j * e.L), mask)

            product = e.load(e.at(P, e.b.mul(i, _int(e.W)), j * e.L))
            y = of(Y, y_row)
            slope = e.fma(e.b.fneg(y), y, e.splat(1.0))
            values.append(e.b.fmul(e.b.fadd(product, of(G, g_row)), slope))
            e.store(values[j], e.at(C, e.b.mul(i, c_row), j * e.L), mask)
        with e.b.if_then(copied):
            for j, mask in enumerate(masks):
                e.store(values[j], e.at(D, e.b.mul(i, d_row), j * e.L), mask)

    e.loop(_int(0), m, 1, row)


class _Squares:
    """A sum of squares in double, one for each vector of a panel's row."""

    def __init__(self, e: _Emitter) -> None:
        self.e, self.wide = e, ir.VectorType(_DOUBLE, e.L)
        self.sums = [e.variable(ir.Constant(self.wide, [0.0] * e.L)) for _ in range(2)]

    def add(self, j: int, value: Any) -> None:
        b = self.e.b
        if self.e.bits == 32:
            value = b.fpext(value, self.wide)
        b.store(self.e.fma(value, value, b.load(self.sums[j])), self.sums[j])

    def value(self) -> Any:
        b = self.e.b
        return self.e.reduce(b.fadd(*(b.load(s) for s in self.sums)), b.fadd)


@_once("put", "iippiid")
def _emit_put(e: _Emitter, arguments: Any) -> None:
    """``C = P``, or ``C += P``, for m rows and n columns; the sum of C's squares in double.

    Arguments: m, n, P ``[m, W]``, C, elements between its rows, whether to add, SQUARES or null.
    """
    m, n, P, C, c_row, adds, squares = arguments
    masks, total = e.masks(n), _Squares(e)

    def rows(adding: bool) -> None:
        def row(i: Any) -> None:
            for j, mask in enumerate(masks):
                value = e.load(e.at(P, e.b.mul(i, _int(e.W)), j * e.L))
                to = e.at(C, e.b.mul(i, c_row), j * e.L)
                if adding:
                    value = e.b.fadd(value, e.load(to, mask))
                e.store(value, to, mask)
                total.add(j, e.b.select(mask, value, e.splat(0.0)))

        e.loop(_int(0), m, 1, row)

    # Two loops: to load from C, though nothing, would wait for stores 4 KiB before.
    with e.b.if_else(e.b.icmp_signed("!=", adds, _int(0))) as (add, replace):
        with add:
            rows(True)
        with replace:
            rows(False)
    with e.b.if_then(e.given(squares)):
        e.b.store(total.value(), squares)


# --- Softmax -----------------------------------------------------------------------------------


@_once("row_tops", "iipiip")
def _emit_row_tops(e: _Emitter, arguments: Any) -> None:
    """The largest of n columns, for m rows; NaN counts for nothing.

    Arguments: m, n, X, elements between X's panels, between its rows, TOPS ``[m]``.
    """
    m, n, X, x_panel, x_row, tops = arguments
    lowest = e.splat(-math.inf)
    top = [e.variable(lowest) for _ in range(2)]

    def row(i: Any) -> None:
        x = e.at(X, e.b.mul(i, x_row))
        for slot in top:
            e.b.store(lowest, slot)

        def panel(p: Any, masks: list[Any]) -> None:
            for j, mask in enumerate(masks):
                value = e.load(e.at(x, e.b.mul(p, x_panel), j * e.L), mask, lowest)
                e.b.store(e.larger(value, e.b.load(top[j])), top[j])

        e.panels(n, panel)
        highest = e.reduce(e.larger(*(e.b.load(t) for t in top)), e.larger)
        e.b.store(highest, e.at(tops, i))

    e.loop(_int(0), m, 1, row)


@_once("exp_rows", "iipiipiipp")
def _emit_exp_rows(e: _Emitter, arguments: Any) -> None:
    """``D = exp(X - top)`` and its sum over n columns, for m rows.

    Arguments: m, n, X, elements between X's panels, between its rows, D, the same of D,
    TOPS ``[m]``, SUMS ``[m]``.
    """
    m, n, X, x_panel, x_row, D, d_panel, d_row, tops, sums = arguments
    zero = e.splat(0.0)
    total = [e.variable(zero) for _ in range(2)]

    def row(i: Any) -> None:
        x, d = e.at(X, e.b.mul(i, x_row)), e.at(D, e.b.mul(i, d_row))
        top = e.broadcast(e.b.load(e.at(tops, i)))
        for slot in total:
            e.b.store(zero, slot)

        def panel(p: Any, masks: list[Any]) -> None:
            for j, mask in enumerate(masks):
                value = e.load(e.at(x, e.b.mul(p, x_panel), j * e.L), mask)
                value = e.exp(e.b.fsub(value, top))
                e.store(value, e.at(d, e.b.mul(p, d_panel), j * e.L), mask)
                if mask is not None:
                    value = e.b.select(mask, value, zero)
                e.b.store(e.b.fadd(e.b.load(total[j]), value), total[j])

        e.panels(n, panel)
        mass = e.reduce(e.b.fadd(*(e.b.load(t) for t in total)), e.b.fadd)
        e.b.store(mass, e.at(sums, i))

    e.loop(_int(0), m, 1, row)


@_once("scale_rows", "iipiip")
def _emit_scale_rows(e: _Emitter, arguments: Any) -> None:
    """Multiply row i of m by FACTORS[i], n columns.

    Arguments: m, n, D, elements between D's panels, between its rows, FACTORS.
    """
    m, n, D, d_panel, d_row, factors = arguments

    def row(i: Any) -> None:
        d = e.at(D, e.b.mul(i, d_row))
        factor = e.broadcast(e.b.load(e.at(factors, i)))

        def panel(p: Any, masks: list[Any]) -> None:
            for j, mask in enumerate(masks):
                to = e.at(d, e.b.mul(p, d_panel), j * e.L)
                e.store(e.b.fmul(e.load(to, mask), factor), to, mask)

        e.panels(n, panel)

    e.loop(_int(0), m, 1, row)


# --- Moving and adding -------------------------------------------------------------------------


@_once("pack", "iipipp")
def _emit_pack(e: _Emitter, arguments: Any) -> None:
    """A strip of m <= L rows and n <= W columns into a panel, and transposed into another.

    Arguments: m, n, S, elements between its rows, OUT (rows of W elements) or null, TURNED or null:
    row j of it receives column j of the strip. What the strip lacks is filled with zeros.
    """
    m, n, S, s_row, out, turned = arguments
    plain, turns = e.given(out), e.given(turned)
    inside = e.masks(n)
    for j in range(2):
        rows = []
        for i in range(e.L):
            here = e.all_lanes(e.b.icmp_signed("<", _int(i), m))
            mask = e.b.and_(here, inside[j])
            rows.append(e.load(e.at(S, e.b.mul(s_row, _int(i)), j * e.L), mask))
        with e.b.if_then(plain):
            for i, row in enumerate(rows):
                here = e.all_lanes(e.b.icmp_signed("<", _int(i), m))
                e.store(row, e.at(out, i * e.W + j * e.L), here)
        with e.b.if_then(turns):
            # Exchange one bit of the row's number with one of the lane's, bit by bit.
            step = 1
            while step < e.L:
                for i in range(e.L):
                    if i & step == 0:
                        x, y = rows[i], rows[i + step]
                        first = [k if k & step == 0 else e.L + k - step for k in range(e.L)]
                        second = [k + step if k & step == 0 else e.L + k for k in range(e.L)]
                        rows[i], rows[i + step] = e.shuffle(x, y, first), e.shuffle(x, y, second)
                step *= 2
            for i, row in enumerate(rows):
                here = e.all_lanes(e.b.icmp_signed("<", _int(j * e.L + i), n))
                e.store(row, e.at(turned, (j * e.L + i) * e.W), here)


@_once("scatter", "iitpipi")
def _emit_scatter(e: _Emitter, arguments: Any) -> None:
    """``D[TOKENS[i]] += S[i]`` for m rows in order, n <= W columns.

    Arguments: m, n, TOKENS, S, elements between its rows, D, elements between its rows.
    """
    m, n, tokens, S, s_row, D, d_row = arguments
    masks = e.masks(n)

    def row(i: Any) -> None:
        to = e.at(D, e.b.mul(e.b.sext(e.b.load(e.at(tokens, i)), _I64), d_row))
        for j, mask in enumerate(masks):
            value = e.load(e.at(S, e.b.mul(i, s_row), j * e.L), mask)
            e.store(e.b.fadd(e.load(e.at(to, j * e.L), mask), value), e.at(to, j * e.L), mask)

    e.loop(_int(0), m, 1, row)


@_once("column_sums", "iipip")
def _emit_column_sums(e: _Emitter, arguments: Any) -> None:
    """The sums over m rows of n <= W columns.

    Arguments: m, n, S, elements between its rows, OUT.
    """
    m, n, S, s_row, out = arguments
    chains, masks = 4, e.masks(n)
    sums = [[e.variable(e.splat(0.0)) for _ in range(2)] for _ in range(chains)]

    def rows(count: int) -> Callable[[Any], None]:
        def body(i: Any) -> None:
            for c in range(count):
                at = e.at(S, e.b.mul(e.b.add(i, _int(c)), s_row))
                for j, slot in enumerate(sums[c]):
                    value = e.load(e.at(at, j * e.L), masks[j])
                    e.b.store(e.b.fadd(e.b.load(slot), value), slot)

        return body

    whole = e.b.and_(m, _int(-chains))
    e.loop(_int(0), whole, chains, rows(chains))
    e.loop(whole, m, 1, rows(1))
    for j, mask in enumerate(masks):
        parts = [e.b.load(sums[c][j]) for c in range(chains)]
        total = e.b.fadd(e.b.fadd(parts[0], parts[1]), e.b.fadd(parts[2], parts[3]))
        e.store(total, e.at(out, j * e.L), mask)


@_once("update", "iitpipiss")
def _emit_update(e: _Emitter, arguments: Any) -> None:
    """``G *= scale``, ``P -= lr G`` for m rows of n columns.

    Arguments: m, n, ROWS (which ones) or null, P, elements between its rows, G, the same of G,
    scale, lr.
    """
    m, n, rows, P, p_row, G, g_row, scale, lr = arguments
    scale, step, number = e.broadcast(scale), e.broadcast(e.b.fneg(lr)), _row_numbers(e, rows)

    def row(i: Any) -> None:
        k = number(i)
        p, g = e.at(P, e.b.mul(k, p_row)), e.at(G, e.b.mul(k, g_row))

        def panel(q: Any, masks: list[Any]) -> None:
            at = e.b.mul(q, _int(e.W))
            for j, mask in enumerate(masks):
                scaled = e.b.fmul(e.load(e.at(g, at, j * e.L), mask), scale)
                e.store(scaled, e.at(g, at, j * e.L), mask)
                moved = e.fma(step, scaled, e.load(e.at(p, at, j * e.L), mask))
                e.store(moved, e.at(p, at, j * e.L), mask)

        e.panels(n, panel)

    e.loop(_int(0), m, 1, row)


@_once("squares", "iitpid")
def _emit_squares(e: _Emitter, arguments: Any) -> None:
    """The sum of squares, in double, of m rows of n columns.

    Arguments: m, n, ROWS (which ones) or null, G, elements between its rows, OUT.
    """
    m, n, rows, G, g_row, out = arguments
    total, number = _Squares(e), _row_numbers(e, rows)

    def row(i: Any) -> None:
        g = e.at(G, e.b.mul(number(i), g_row))

        def panel(q: Any, masks: list[Any]) -> None:
            for j, mask in enumerate(masks):
                total.add(j, e.load(e.at(g, e.b.mul(q, _int(e.W)), j * e.L), mask))

        e.panels(n, panel)

    e.loop(_int(0), m, 1, row)
    e.b.store(total.value(), out)


@_once("arg_max", "ipilp")
def _emit_arg_max(e: _Emitter, arguments: Any) -> None:
    """The largest of n columns of a row and the lowest index that holds it; NaN counts not.

    Arguments: n, X, elements between X's panels, INDEX, VALUE.
    """
    n, X, x_panel, index_at, value_at = arguments
    lowest = e.splat(-math.inf)
    best = [e.variable(lowest) for _ in range(2)]
    where = [e.variable(e.splat_int(0)) for _ in range(2)]
    lanes = [ir.Constant(e.ints, [j * e.L + lane for lane in range(e.L)]) for j in range(2)]

    def panel(p: Any, masks: list[Any]) -> None:
        column = e.b.mul(p, _int(e.W))
        if e.bits == 32:
            column = e.b.trunc(column, _I32)
        for j, mask in enumerate(masks):
            value = e.load(e.at(X, e.b.mul(p, x_panel), j * e.L), mask, lowest)
            known = e.b.load(best[j])
            more = e.b.fcmp_ordered(">", value, known)
            e.b.store(e.b.select(more, value, known), best[j])
            index = e.b.add(e.broadcast(column), lanes[j])
            e.b.store(e.b.select(more, index, e.b.load(where[j])), where[j])

    e.panels(n, panel)
    values, indices = [e.b.load(s) for s in best], [e.b.load(s) for s in where]
    top = e.reduce(e.larger(*values), e.larger)
    e.b.store(top, value_at)
    # Of the lanes that hold the largest value, the one with the lowest index.
    tops, most = e.broadcast(top), e.splat_int(2 ** (e.bits - 1) - 1)

    def lower(x: Any, y: Any) -> Any:
        return e.b.select(e.b.icmp_unsigned("<", x, y), x, y)

    candidates = [
        e.b.select(e.b.fcmp_ordered("==", v, tops), i, most)
        for v, i in zip(values, indices, strict=True)
    ]
    index = e.reduce(lower(*candidates), lower)
    if e.bits == 32:
        index = e.b.sext(index, _I64)
    e.b.store(index, index_at)


# --- The functions that compiled Python calls --------------------------------------------------


def _callable(emit: Callable[..., Any], arguments: str, *variant: Any) -> Any:
    """``f(like, *arguments)``; pointers are given as integers."""

    def call(typing_context: Any, like: Any, *given: Any) -> Any:
        kinds = [like if letter == "s" else types.intp for letter in arguments]
        signature = types.void(like, *kinds)

        def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
            function = emit(builder.module, context.get_value_type(like), *variant)
            wanted = function.function_type.args
            builder.call(
                function,
                [
                    builder.inttoptr(value, kind) if isinstance(kind, ir.PointerType) else value
                    for value, kind in zip(values[1:], wanted, strict=True)
                ],
            )
            return context.get_dummy_value()

        return signature, generate

    names = ["typing_context", "like", *(f"{letter}{i}" for i, letter in enumerate(arguments))]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, positional) for name in names]
    )
    return intrinsic(call)


_tile_rows = _callable(_emit_tiles, "ipiippip", False)
_tile_columns = _callable(_emit_tiles, "ipiippip", True)
_tanh = _callable(_emit_tanh, "iippitpipi")
_dtanh = _callable(_emit_dtanh, "iippipipipi")
_put = _callable(_emit_put, "iippiid")
_row_tops = _callable(_emit_row_tops, "iipiip")
_exp_rows = _callable(_emit_exp_rows, "iipiipiipp")
_scale_rows = _callable(_emit_scale_rows, "iipiip")
_pack = _callable(_emit_pack, "iipipp")
_scatter = _callable(_emit_scatter, "iitpipi")
_column_sums = _callable(_emit_column_sums, "iipip")
_update = _callable(_emit_update, "iitpipiss")
_squares = _callable(_emit_squares, "iitpid")
_arg_max = _callable(_emit_arg_max, "ipilp")


# One copy of the vector code each, whoever calls it.


@jit
def tile_rows(like, rows, A, a_panel, K, B, init, init_row, out):
    _tile_rows(like, rows, A, a_panel, K, B, init, init_row, out)


@jit
def tile_columns(like, rows, A, K, B, init, init_row, out):
    _tile_columns(like, rows, A, 0, K, B, init, init_row, out)


@jit
def tanh(like, m, n, P, Z, z_row, tokens, C, c_row, D, d_row):
    _tanh(like, m, n, P, Z, z_row, tokens, C, c_row, D, d_row)


@jit
def dtanh(like, m, n, P, G, g_row, Y, y_row, C, c_row, D, d_row):
    _dtanh(like, m, n, P, G, g_row, Y, y_row, C, c_row, D, d_row)


@jit
def put(like, m, n, P, C, c_row, adds, squares):
    _put(like, m, n, P, C, c_row, adds, squares)


@jit
def row_tops(like, m, n, X, x_panel, x_row, tops):
    _row_tops(like, m, n, X, x_panel, x_row, tops)


@jit
def exp_rows(like, m, n, X, x_panel, x_row, D, d_panel, d_row, tops, sums):
    _exp_rows(like, m, n, X, x_panel, x_row, D, d_panel, d_row, tops, sums)


@jit
def scale_rows(like, m, n, D, d_panel, d_row, factors):
    _scale_rows(like, m, n, D, d_panel, d_row, factors)


@jit
def pack_strip(like, m, n, S, s_row, out, turned):
    _pack(like, m, n, S, s_row, out, turned)


@jit
def scatter(like, m, n, tokens, S, s_row, D, d_row):
    _scatter(like, m, n, tokens, S, s_row, D, d_row)


@jit
def column_sums(like, m, n, S, s_row, out):
    _column_sums(like, m, n, S, s_row, out)


@jit
def update(like, m, n, rows, P, p_row, G, g_row, scale, lr):
    _update(like, m, n, rows, P, p_row, G, g_row, scale, lr)


@jit
def squares(like, m, n, rows, G, g_row, out):
    _squares(like, m, n, rows, G, g_row, out)


@jit
def arg_max(like, n, X, x_panel, index, value):
    _arg_max(like, n, X, x_panel, index, value)


@intrinsic
def address(typing_context, array):
    """The address of an array's first element."""
    signature = types.intp(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(made.data, _I64)

    return signature, generate
