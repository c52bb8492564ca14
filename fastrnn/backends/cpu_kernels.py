"""The compiled code of the ``numba`` backend: matrix tiles, recurrence, loss, step, generation.

**Panels.** A matrix whose rows are the T·B examples is kept as panels of ``W`` columns (two vector
registers): element ``(r, j)`` lies at ``[j // W, r, j % W]``. Everything a tile reads is then
contiguous, for the product with the weights (rows of ``h``) and for the gradient of the weights
(columns of ``h``) alike. Weights are packed into panels once a step. The last panel is padded with
zeros, so no loop has a remainder.

**Tiles.** ``MR`` rows by ``W`` columns of a product stay in registers over the whole inner
dimension: one load of the weights feeds ``MR`` multiply-adds (Goto, van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008). Tiles, tanh and softmax are written as LLVM vector
instructions; the loops around them are Python compiled by numba.

**Threads.** Every function with ``tid, nt, sync`` is run by ``nt`` threads together: each does its
share, and :func:`_barrier` separates the phases. No BLAS is called.

All compiled functions are in this one file: numba's cache looks at the file of a function only.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastrnn.decoding import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

_jit = numba.njit(
    # No GIL, IEEE division, and no assumption that NaN is absent.
    cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"},
)  # fmt: skip


# --- Vector code -----------------------------------------------------------------------------

_FEATURES = llvm.get_host_cpu_features()
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX512 = _X86 and bool(_FEATURES.get("avx512f"))
_AVX = _X86 and bool(_FEATURES.get("avx2"))

VECTOR_BYTES = 64 if _AVX512 else 32 if _AVX else 16
"""Bytes in a vector register."""

MR = 8 if _AVX512 or not _X86 else 6
"""Rows of a tile: ``2 MR`` accumulators, two vectors of weights and one of inputs fit registers."""

CHUNK = 16384
"""Elements a partial sum of squares covers, whatever the number of threads."""


def panel_width(dtype: Any) -> int:
    """``W``: the columns of a panel."""
    return 2 * VECTOR_BYTES // int(np.dtype(dtype).itemsize)


def num_chunks(size: int) -> int:
    """Partial sums of squares for ``size`` elements."""
    return -(-size // CHUNK)


_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


class _Emitter:
    """Writes one LLVM function on vectors of ``real`` (float or double)."""

    def __init__(self, module: ir.Module, real: Any, name: str, argument_types: list[Any]) -> None:
        self.module, self.real = module, real
        self.bits = 32 if isinstance(real, ir.FloatType) else 64
        self.L = VECTOR_BYTES * 8 // self.bits
        self.vec = ir.VectorType(real, self.L)
        self.mask = ir.VectorType(_I1, self.L)
        self.ints = ir.VectorType(ir.IntType(self.bits), self.L)
        self.pointer = real.as_pointer()
        self.function = ir.Function(
            module, ir.FunctionType(ir.VoidType(), argument_types), self.mangle(name)
        )
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        if _AVX512:
            # Or LLVM halves the vectors on CPUs that it tunes for 256 bits.
            set.add(self.function.attributes, '"min-legal-vector-width"="512"')
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    def mangle(self, name: str) -> str:
        return f"fastrnn.{name}.f{self.bits}"

    # values

    def splat(self, value: float) -> ir.Constant:
        return ir.Constant(self.vec, [value] * self.L)

    def splat_int(self, value: int) -> ir.Constant:
        return ir.Constant(self.ints, [value] * self.L)

    def broadcast(self, scalar: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.L), ir.Undefined)
        one = self.b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        lanes = ir.Constant(ir.VectorType(_I32, self.L), [0] * self.L)
        return self.b.shuffle_vector(one, undefined, lanes)

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
        return self.intrinsic(f"llvm.fma.{self.suffix}", self.vec, [x, y, z])

    # memory

    def at(self, pointer: Any, *offsets: Any) -> Any:
        for offset in offsets:
            pointer = self.b.gep(pointer, [_int(offset) if isinstance(offset, int) else offset])
        return pointer

    def load(self, pointer: Any) -> Any:
        return self.b.load(self.b.bitcast(pointer, self.vec.as_pointer()), align=self.bits // 8)

    def store(self, value: Any, pointer: Any) -> None:
        self.b.store(value, self.b.bitcast(pointer, self.vec.as_pointer()), align=self.bits // 8)

    def lanes_below(self, n: Any) -> Any:
        """The mask of lanes with index < n."""
        iota = ir.Constant(ir.VectorType(_I64, self.L), list(range(self.L)))
        return self.b.icmp_signed("<", iota, self.broadcast(n))

    def masked_load(self, pointer: Any, mask: Any, other: Any) -> Any:
        vector = self.b.bitcast(pointer, self.vec.as_pointer())
        return self.intrinsic(
            f"llvm.masked.load.{self.suffix}.p0",
            self.vec,
            [vector, ir.Constant(_I32, self.bits // 8), mask, other],
        )

    def masked_store(self, value: Any, pointer: Any, mask: Any) -> None:
        vector = self.b.bitcast(pointer, self.vec.as_pointer())
        self.intrinsic(
            f"llvm.masked.store.{self.suffix}.p0",
            ir.VoidType(),
            [value, vector, ir.Constant(_I32, self.bits // 8), mask],
        )

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

    # functions

    def exp_parts(self, x: Any) -> tuple[Any, Any]:
        """``2ⁿ`` and ``expm1(r)`` with ``x = n ln 2 + r``, ``|r| <= ln 2 / 2``; x must be in range.

        Cody and Waite's reduction and the Taylor polynomial up to less than half an ulp.
        """
        if self.bits == 32:
            magic, shift, one, degree = 1.5 * 2**23, 23, 0x3F800000, 8
            high, low = 0.693359375, -2.12194440e-4
        else:
            magic, shift, one, degree = 1.5 * 2**52, 52, 0x3FF0000000000000, 14
            high, low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
        b = self.b
        # Adding 1.5·2^mantissa rounds to an integer and leaves it in the low bits of the sum.
        shifted = self.fma(x, self.splat(1 / math.log(2)), self.splat(magic))
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
        quotient = b.fdiv(m, b.fadd(m, self.splat(2.0)))
        return b.bitcast(b.or_(b.bitcast(quotient, self.ints), signs), self.vec)


def _emit_tile(module: ir.Module, real: Any, rows: int, transposed: bool) -> Any:
    """``OUT [rows, W] = A [rows, K] · B [K, W]`` in registers.

    Arguments: A, elements between A's panels, K, B, OUT. Where ``transposed``, A is one panel
    ``[K, W]`` read by columns: ``A[m, k]`` lies at ``k W + m``.
    """
    name = f"tile_{'columns' if transposed else 'rows'}_{rows}"
    bits = 32 if isinstance(real, ir.FloatType) else 64
    known = module.globals.get(f"fastrnn.{name}.f{bits}")
    if known is not None:
        return known
    pointer = real.as_pointer()
    e = _Emitter(module, real, name, [pointer, _I64, _I64, pointer, pointer])
    A, a_panel, K, B, out = e.function.args
    W = 2 * e.L
    # A tile of few rows has too few accumulators to hide the latency of a multiply-add.
    chains = max(1, 8 // (2 * rows))
    acc = [
        [[e.variable(e.splat(0.0)) for _ in range(2)] for _ in range(rows)] for _ in range(chains)
    ]

    def multiply_add(a: Any, b: Any, k: int) -> None:
        weights = [e.load(e.at(b, k * W + j * e.L)) for j in range(2)]
        for m in range(rows):
            x = e.broadcast(e.b.load(e.at(a, k * W + m if transposed else m * W + k)))
            for j in range(2):
                slot = acc[k % chains][m][j]
                e.b.store(e.fma(x, weights[j], e.b.load(slot)), slot)

    def run(a: Any, b: Any, n: Any) -> None:
        def steps(count: int) -> Callable[[Any], None]:
            def body(k: Any) -> None:
                rows_on = e.b.mul(k, _int(W))
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
            n = e.b.select(e.b.icmp_signed("<", left, _int(W)), left, _int(W))
            run(a, e.at(B, e.b.mul(k, _int(W))), n)
            e.b.store(e.at(a, a_panel), panel)

        e.loop(_int(0), K, W, panels)
    for m in range(rows):
        for j in range(2):
            total = e.b.load(acc[0][m][j])
            for chain in acc[1:]:
                total = e.b.fadd(total, e.b.load(chain[m][j]))
            e.store(total, e.at(out, m * W + j * e.L))
    e.b.ret_void()
    return e.function


def _emit_finish(module: ir.Module, real: Any, kind: str) -> Any:
    """Turn the products of a tile ``P [m, W]`` into results, for the first ``n`` columns.

    store: ``C = P``. add: ``C = Z + P``. tanh: ``C = tanh(Z + P)``.
    dtanh: ``C = (Z + P) (1 - H²)``. Where D is not null, D = C as well.
    Arguments: m, n, P, then pointer and elements between rows of Z, H, C and D.
    """
    bits = 32 if isinstance(real, ir.FloatType) else 64
    known = module.globals.get(f"fastrnn.finish_{kind}.f{bits}")
    if known is not None:
        return known
    p = real.as_pointer()
    e = _Emitter(module, real, f"finish_{kind}", [_I64, _I64, p, *[p, _I64] * 4])
    m, n, P, Z, z_row, H, h_row, C, c_row, D, d_row = e.function.args
    copied = e.b.icmp_unsigned("!=", e.b.ptrtoint(D, _I64), _int(0))
    masks = [e.lanes_below(e.b.sub(n, _int(j * e.L))) for j in range(2)]

    def row(i: Any) -> None:
        for j, mask in enumerate(masks):

            def of(base: Any, stride: Any, i: Any = i, j: int = j) -> Any:
                return e.at(base, e.b.mul(i, stride), j * e.L)

            value = e.load(of(P, _int(2 * e.L)))
            zero = e.splat(0.0)
            if kind != "store":
                value = e.b.fadd(value, e.masked_load(of(Z, z_row), mask, zero))
            if kind == "tanh":
                value = e.tanh(value)
            if kind == "dtanh":
                h = e.masked_load(of(H, h_row), mask, zero)
                value = e.b.fmul(value, e.fma(e.b.fsub(zero, h), h, e.splat(1.0)))
            e.masked_store(value, of(C, c_row), mask)
            with e.b.if_then(copied):
                e.masked_store(value, of(D, d_row), mask)

    e.loop(_int(0), m, 1, row)
    e.b.ret_void()
    return e.function


def _emit_softmax(module: ir.Module, real: Any) -> Any:
    """One row of V logits X into ``D = exp(X - max)``, its sum and the max.

    Arguments: V, X, elements between X's panels, D, elements between D's panels, STATS (max, sum).
    """
    bits = 32 if isinstance(real, ir.FloatType) else 64
    known = module.globals.get(f"fastrnn.softmax.f{bits}")
    if known is not None:
        return known
    p = real.as_pointer()
    e = _Emitter(module, real, "softmax", [_I64, p, _I64, p, _I64, p])
    V, X, x_panel, D, d_panel, stats = e.function.args
    W = 2 * e.L
    lowest = e.splat(-math.inf)
    tops = [e.variable(lowest) for _ in range(2)]
    sums = [e.variable(e.splat(0.0)) for _ in range(2)]
    x_at, d_at = e.variable(X), e.variable(D)

    def find_top(v: Any) -> None:
        x = e.b.load(x_at)
        for j, top in enumerate(tops):
            mask = e.lanes_below(e.b.sub(V, e.b.add(v, _int(j * e.L))))
            value, known_top = e.masked_load(e.at(x, j * e.L), mask, lowest), e.b.load(top)
            larger = e.b.fcmp_ordered(">", value, known_top)
            e.b.store(e.b.select(larger, value, known_top), top)
        e.b.store(e.at(x, x_panel), x_at)

    def reduce(vector: Any, step: Callable[[Any, Any], Any]) -> Any:
        result = e.b.extract_element(vector, ir.Constant(_I32, 0))
        for lane in range(1, e.L):
            result = step(result, e.b.extract_element(vector, ir.Constant(_I32, lane)))
        return result

    def greater(a: Any, b: Any) -> Any:
        return e.b.select(e.b.fcmp_ordered(">", a, b), a, b)

    e.loop(_int(0), V, W, find_top)
    top = reduce(greater(*(e.b.load(t) for t in tops)), greater)
    tops_everywhere = e.broadcast(top)
    e.b.store(X, x_at)

    def exponentiate(v: Any) -> None:
        x, d = e.b.load(x_at), e.b.load(d_at)
        for j, total in enumerate(sums):
            mask = e.lanes_below(e.b.sub(V, e.b.add(v, _int(j * e.L))))
            value = e.masked_load(e.at(x, j * e.L), mask, lowest)
            value = e.exp(e.b.fsub(value, tops_everywhere))
            e.masked_store(value, e.at(d, j * e.L), mask)
            value = e.b.select(mask, value, e.splat(0.0))
            e.b.store(e.b.fadd(e.b.load(total), value), total)
        e.b.store(e.at(x, x_panel), x_at)
        e.b.store(e.at(d, d_panel), d_at)

    e.loop(_int(0), V, W, exponentiate)
    total = reduce(e.b.fadd(*(e.b.load(s) for s in sums)), e.b.fadd)
    e.b.store(top, stats)
    e.b.store(total, e.at(stats, 1))
    e.b.ret_void()
    return e.function


# --- The vector code as functions that compiled Python can call --------------------------------
# ``like`` is a scalar whose type chooses float or double; memory is named by address.


def _tile_function(transposed: bool) -> Any:
    def tile(typing_context, like, rows, A, a_panel, K, B, out):
        signature = types.void(like, *[types.intp] * 6)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            real = context.get_value_type(like)
            _, rows, A, a_panel, K, B, out = arguments
            A, B, out = (builder.inttoptr(a, real.as_pointer()) for a in (A, B, out))
            done = builder.append_basic_block("done")
            choice = builder.switch(rows, done)
            for count in range(1, MR + 1):
                block = builder.append_basic_block(f"rows_{count}")
                choice.add_case(_int(count), block)
                builder.position_at_end(block)
                function = _emit_tile(builder.module, real, count, transposed)
                builder.call(function, [A, a_panel, K, B, out])
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return signature, generate

    return tile


_tile_rows_code = intrinsic(_tile_function(transposed=False))
_tile_columns_code = intrinsic(_tile_function(transposed=True))


def _finish_function(kind: str) -> Any:
    def finish(typing_context, like, m, n, P, Z, z_row, H, h_row, C, c_row, D, d_row):
        signature = types.void(like, *[types.intp] * 11)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            real = context.get_value_type(like)
            function = _emit_finish(builder.module, real, kind)
            builder.call(
                function,
                [
                    builder.inttoptr(value, kind_wanted)
                    if isinstance(kind_wanted, ir.PointerType)
                    else value
                    for value, kind_wanted in zip(
                        arguments[1:], function.function_type.args, strict=True
                    )
                ],
            )
            return context.get_dummy_value()

        return signature, generate

    return finish


_finish_store_code = intrinsic(_finish_function("store"))
_finish_add_code = intrinsic(_finish_function("add"))
_finish_tanh_code = intrinsic(_finish_function("tanh"))
_finish_dtanh_code = intrinsic(_finish_function("dtanh"))


@intrinsic
def _softmax_code(typing_context, like, V, X, x_panel, D, d_panel, stats):
    signature = types.void(like, *[types.intp] * 6)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        real = context.get_value_type(like)
        _, V, X, x_panel, D, d_panel, stats = arguments
        X, D, stats = (builder.inttoptr(a, real.as_pointer()) for a in (X, D, stats))
        function = _emit_softmax(builder.module, real)
        builder.call(function, [V, X, x_panel, D, d_panel, stats])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _address(typing_context, array):
    """The address of an array's first element."""
    signature = types.intp(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(made.data, _I64)

    return signature, generate


@intrinsic
def _atomic_add(typing_context, address, value):
    """Add to the integer at ``address``; return what it was."""
    signature = types.int64(types.intp, types.int64)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return signature, generate


@intrinsic
def _atomic_load(typing_context, address):
    signature = types.int64(types.intp)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return signature, generate


@intrinsic
def _atomic_store(typing_context, address, value):
    signature = types.void(types.intp, types.int64)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return signature, generate


_sched_yield = types.ExternalFunction("sched_yield", types.intc())


# --- Threads -----------------------------------------------------------------------------------


@_jit
def _barrier(nt, sync):
    """Wait until all ``nt`` threads are here. ``sync``: how many are, and how often all were.

    Spins, since a phase lasts microseconds to milliseconds, but gives its core away to a thread
    that was put off it.
    """
    if nt == 1:
        return
    count, rounds = _address(sync), _address(sync) + 128
    seen = _atomic_load(rounds)
    if _atomic_add(count, 1) == nt - 1:
        _atomic_store(count, 0)
        _atomic_store(rounds, seen + 1)
        return
    spins = 0
    while _atomic_load(rounds) == seen:
        spins += 1
        if spins > 2000:
            _sched_yield()


@_jit
def _share(n, tid, nt):
    """The part of ``range(n)`` of thread ``tid``: start and stop."""
    return n * tid // nt, n * (tid + 1) // nt


@_jit
def _split(H, B, itemsize, tid, nt):
    """A thread's rows and panels of a recurrence, and whether threads share rows.

    Threads own rows where there are enough and each one's second-level cache holds all of W_hh;
    otherwise they own columns, and meet after every time step.
    """
    panels = _panels(H, itemsize)
    by_columns = nt > 1 and (4 * nt > B or H * H * itemsize > 768 * 1024)
    if by_columns:
        p0, p1 = _share(panels, tid, nt)
        return 0, B, p0, p1, by_columns
    b0, b1 = _share(B, tid, nt)
    return b0, b1, 0, panels, by_columns


# --- Tiles -------------------------------------------------------------------------------------


@_jit
def _panels(n, itemsize):
    """How many panels ``n`` columns need."""
    W = 2 * VECTOR_BYTES // itemsize
    return (n + W - 1) // W


@_jit
def _height(left):
    """The rows of the next tile, so that all tiles of ``left`` rows are about equally high."""
    tiles = (left + MR - 1) // MR
    return (left + tiles - 1) // tiles


# One copy of the vector code each, whoever calls it.


@_jit
def _tile_rows(like, rows, A, a_panel, K, B, out):
    _tile_rows_code(like, rows, A, a_panel, K, B, out)


@_jit
def _tile_columns(like, rows, A, K, B, out):
    _tile_columns_code(like, rows, A, 0, K, B, out)


@_jit
def _store(like, m, n, P, C, c_row):
    _finish_store_code(like, m, n, P, 0, 0, 0, 0, C, c_row, 0, 0)


@_jit
def _add(like, m, n, P, Z, z_row, C, c_row):
    _finish_add_code(like, m, n, P, Z, z_row, 0, 0, C, c_row, 0, 0)


@_jit
def _tanh(like, m, n, P, Z, z_row, C, c_row, D, d_row):
    _finish_tanh_code(like, m, n, P, Z, z_row, 0, 0, C, c_row, D, d_row)


@_jit
def _dtanh(like, m, n, P, Z, z_row, H, h_row, C, c_row, D, d_row):
    _finish_dtanh_code(like, m, n, P, Z, z_row, H, h_row, C, c_row, D, d_row)


@_jit
def _softmax(like, V, X, x_panel, D, d_panel, stats):
    _softmax_code(like, V, X, x_panel, D, d_panel, stats)


# --- Packing -----------------------------------------------------------------------------------


@_jit
def _pack(source, rows, stride, out, p0, p1):
    """Rows of ``source [n, N]`` into panels p0 … p1 of ``out``, ``stride`` rows a panel."""
    W = 2 * VECTOR_BYTES // source.itemsize
    N = source.shape[1]
    for p in range(p0, p1):
        width = min(W, N - p * W)
        for r in range(rows):
            to = (p * stride + r) * W
            for j in range(width):
                out[to + j] = source[r, p * W + j]
            for j in range(width, W):
                out[to + j] = 0


@_jit
def _pack_transposed(source, out, p0, p1):
    """Panels p0 … p1 of ``sourceᵀ``, source ``[N, K]``: K rows a panel."""
    W = 2 * VECTOR_BYTES // source.itemsize
    N, K = source.shape
    block = 16
    for p in range(p0, p1):
        width = min(W, N - p * W)
        for k0 in range(0, K, block):
            k1 = min(K, k0 + block)
            for j in range(width):
                for k in range(k0, k1):
                    out[(p * K + k) * W + j] = source[p * W + j, k]
            for j in range(width, W):
                for k in range(k0, k1):
                    out[(p * K + k) * W + j] = 0


# --- Parts of a step ---------------------------------------------------------------------------


@_jit
def _gather_panels(W_xh, tokens, b_h, B, b0, b1, stride, out):
    """``z[t, b] = W_xh[x] + b_h`` for rows b0 … b1 of every time step, into panels."""
    W = 2 * VECTOR_BYTES // W_xh.itemsize
    H = W_xh.shape[1]
    panels = (H + W - 1) // W
    for t in range(len(tokens) // B):
        for r in range(t * B + b0, t * B + b1):
            x = tokens[r]
            for p in range(panels):
                to, width = (p * stride + r) * W, min(W, H - p * W)
                for j in range(width):
                    out[to + j] = W_xh[x, p * W + j] + b_h[p * W + j]
                for j in range(width, W):
                    out[to + j] = 0


@_jit
def _forward(
    like, size, T, B, H, packed, h0, Z, z_panel, z_row, C, c_panel, c_row, states, tile, tid, nt,
    sync
):  # fmt: skip
    """``h_t = tanh(z_t + h_{t-1} W_hh)``. All arrays by address, strides in elements.

    packed: W_hh in panels. h0: panels of B rows. Z, C: rows t·B + b. states: two panelled states of
    B rows where C is not itself panelled, else 0. tile: this thread's scratch.
    """
    W = 2 * VECTOR_BYTES // size
    b0, b1, p0, p1, shared = _split(H, B, size, tid, nt)
    state = _panels(H, size) * B * W * size
    for t in range(T):
        previous, a_panel, into = h0, B * W, 0
        if states != 0:
            into = states + (t % 2) * state
            if t > 0:
                previous = states + ((t + 1) % 2) * state
        elif t > 0:
            previous, a_panel = C + (t - 1) * B * c_row * size, c_panel
        for p in range(p0, p1):
            n = W if states == 0 else min(W, H - p * W)
            b = b0
            while b < b1:
                rows = _height(b1 - b)
                r = t * B + b
                _tile_rows(
                    like, rows, previous + b * W * size, a_panel, H, packed + p * H * W * size, tile
                )
                copy = 0
                if states != 0:
                    copy = into + (p * B + b) * W * size
                _tanh(
                    like,
                    rows,
                    n,
                    tile,
                    Z + (p * z_panel + r * z_row) * size,
                    z_row,
                    C + (p * c_panel + r * c_row) * size,
                    c_row,
                    copy,
                    W,
                )
                b += rows
        if shared:
            _barrier(nt, sync)


@_jit
def _backward(
    like, size, T, B, H, packed, G, g_panel, g_row, Y, y_panel, y_row, C, c_panel, c_row, states,
    dh0, tile, tid, nt, sync
):  # fmt: skip
    """``dz_t = (dh_t + dz_{t+1} W_hhᵀ)(1 - h_t²)`` from the last time step to the first.

    packed: W_hhᵀ in panels. G: dh, Y: h, C: dz, each with rows t·B + b; states as in _forward.
    dh0: ``[B, H]`` for ``dz_0 W_hhᵀ``, or 0.
    """
    W = 2 * VECTOR_BYTES // size
    b0, b1, p0, p1, shared = _split(H, B, size, tid, nt)
    state = _panels(H, size) * B * W * size
    for step in range(T + 1):
        t = T - 1 - step
        if t < 0 and dh0 == 0:
            break
        later, a_panel, into = C + (t + 1) * B * c_row * size, c_panel, 0
        if states != 0:
            into, later = states + (t % 2) * state, states + ((t + 1) % 2) * state
            a_panel = B * W
        K = 0 if step == 0 else H
        for p in range(p0, p1):
            n = W if states == 0 else min(W, H - p * W)
            b = b0
            while b < b1:
                rows = _height(b1 - b)
                r = t * B + b
                _tile_rows(
                    like, rows, later + b * W * size, a_panel, K, packed + p * H * W * size, tile
                )
                if t < 0:
                    _store(like, rows, min(W, H - p * W), tile, dh0 + (b * H + p * W) * size, H)
                else:
                    copy = 0
                    if states != 0:
                        copy = into + (p * B + b) * W * size
                    _dtanh(
                        like,
                        rows,
                        n,
                        tile,
                        G + (p * g_panel + r * g_row) * size,
                        g_row,
                        Y + (p * y_panel + r * y_row) * size,
                        y_row,
                        C + (p * c_panel + r * c_row) * size,
                        c_row,
                        copy,
                        W,
                    )
                b += rows
        if shared:
            _barrier(nt, sync)


@_jit
def _outer(like, size, R, M, N, A, a_panel, B, b_panel, C, accumulate, tile, tid, nt):
    """``C [M, N] (+)= Σ_r A[r, :]ᵀ B[r, :]`` over R rows of two panelled matrices.

    Long sums are taken in blocks of 1,024 rows, which costs nothing and keeps their rounding small.
    """
    W = 2 * VECTOR_BYTES // size
    a_panels, b_panels = _panels(M, size), _panels(N, size)
    first, last = _share(a_panels * b_panels, tid, nt)
    for unit in range(first, last):
        p, q = unit // a_panels, unit % a_panels
        n, height = min(W, N - p * W), min(W, M - q * W)
        r = 0
        while r < R:
            count = min(1024, R - r)
            m = 0
            while m < height:
                rows = _height(height - m)
                _tile_columns(
                    like,
                    rows,
                    A + (q * a_panel + r * W + m) * size,
                    count,
                    B + (p * b_panel + r * W) * size,
                    tile,
                )
                to = C + ((q * W + m) * N + p * W) * size
                if accumulate or r > 0:
                    _add(like, rows, n, tile, to, N, to, N)
                else:
                    _store(like, rows, n, tile, to, N)
                m += rows
            r += count


@_jit
def _column_sums(source, R, stride, p0, p1, out):
    """``out[j] = Σ_r`` of a panelled matrix, for the columns of panels p0 … p1."""
    W = 2 * VECTOR_BYTES // source.itemsize
    sums = np.empty(W, source.dtype)
    for p in range(p0, p1):
        sums[:] = 0
        for r in range(R):
            at = (p * stride + r) * W
            for j in range(W):
                sums[j] += source[at + j]
        for j in range(min(W, len(out) - p * W)):
            out[p * W + j] = sums[j]


@_jit
def _scatter_panels(source, tokens, stride, p0, p1, dW_xh):
    """``dW_xh[x_r] += dz_r`` for the columns of panels p0 … p1, rows in the order of time."""
    W = 2 * VECTOR_BYTES // source.itemsize
    V, H = dW_xh.shape
    for p in range(p0, p1):
        width = min(W, H - p * W)
        for v in range(V):
            for j in range(width):
                dW_xh[v, p * W + j] = 0
        for r in range(len(tokens)):
            v, at = tokens[r], (p * stride + r) * W
            for j in range(width):
                dW_xh[v, p * W + j] += source[at + j]


@_jit
def _project_rows(
    like, size, r0, r1, K, N, A, a_panel, packed, bias, C, c_panel, c_row, padded, tile
):  # fmt: skip
    """Rows r0 … r1 of ``C = A · packed + bias``; no bias where its address is 0."""
    W = 2 * VECTOR_BYTES // size
    for p in range(_panels(N, size)):
        n = W if padded else min(W, N - p * W)
        r = r0
        while r < r1:
            rows = _height(r1 - r)
            _tile_rows(like, rows, A + r * W * size, a_panel, K, packed + p * K * W * size, tile)
            to = C + (p * c_panel + r * c_row) * size
            if bias == 0:
                _store(like, rows, n, tile, to, c_row)
            else:
                _add(like, rows, n, tile, bias + p * W * size, 0, to, c_row)
            r += rows


@_jit
def _softmax_rows(
    X, x_panel, x_row, D, d_panel, d_row, targets, V, r0, r1, backward, losses, stats
):  # fmt: skip
    """Losses of rows r0 … r1 and, where ``backward``, their dlogits in D, else D is scratch."""
    size = X.itemsize
    W = 2 * VECTOR_BYTES // size
    like = X.dtype.type(0)
    n = len(targets)
    for r in range(r0, r1):
        v = targets[r]
        at_target = np.float64(X[(v // W) * x_panel + r * x_row + v % W])
        _softmax(
            like,
            V,
            _address(X) + r * x_row * size,
            x_panel,
            _address(D) + r * d_row * size,
            d_panel,
            _address(stats),
        )
        top, mass = np.float64(stats[0]), np.float64(stats[1])
        losses[r] = np.log(mass) - (at_target - top)
        if backward:
            scale = D.dtype.type(1.0 / (n * mass))
            for p in range((V + W - 1) // W):
                at = p * d_panel + r * d_row
                width = min(W, V - p * W)
                for j in range(width):
                    D[at + j] *= scale
            D[(v // W) * d_panel + r * d_row + v % W] -= D.dtype.type(1.0 / n)


@_jit
def _sum_of_squares(g, partial, tid, nt):
    """Sums of squares of chunks whose size does not depend on the number of threads."""
    first, last = _share(len(partial), tid, nt)
    for c in range(first, last):
        total = 0.0
        for i in range(c * CHUNK, min(len(g), (c + 1) * CHUNK)):
            x = np.float64(g[i])
            total += x * x
        partial[c] = total


@_jit
def _clip_and_update(p, g, scale, clipped, lr, tid, nt):
    """``g *= scale`` where clipped, ``p -= lr g``."""
    first, last = _share(len(p), tid, nt)
    if clipped:
        for i in range(first, last):
            scaled = g[i] * scale
            g[i] = scaled
            p[i] -= lr * scaled
    else:
        for i in range(first, last):
            p[i] -= lr * g[i]


# --- A training run ----------------------------------------------------------------------------


@_jit
def run_steps(
    tid, nt, sync, tokens, starts, T, train, carry, lr, max_norm, params, W_xh, W_hh, b_h, W_hq,
    b_q, grads, dW_xh, dW_hh, db_h, dW_hq, db_q, x, y, h0, h, dz, logits, stride, packed_hh,
    packed_hh_t, packed_hq, packed_hq_t, bias, h0_panels, tiles, losses, partial, loss, norm,
    totals
):  # fmt: skip
    """``len(starts)`` training steps, or the same without gradients and update.

    h, dz, logits: panels with ``stride`` rows. tiles: ``[nt, …]`` scratch of each thread.
    Without ``train`` the sum of the losses is added to ``totals[0]`` and nothing else changes but
    ``h0`` with ``carry``.
    """
    size = params.itemsize
    like = params.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    B, (V, H) = starts.shape[1], W_xh.shape
    R = T * B
    H_panels, V_panels = _panels(H, size), _panels(V, size)
    hp0, hp1 = _share(H_panels, tid, nt)
    vp0, vp1 = _share(V_panels, tid, nt)
    panel = stride * W
    tile, stats = _address(tiles[tid]), tiles[tid, MR * W :]
    for i in range(len(starts)):
        # Weights into panels; the batch; z.
        if i == 0 or train:
            _pack(W_hh, H, H, packed_hh, hp0, hp1)
            _pack(W_hq, H, H, packed_hq, vp0, vp1)
            if train:
                _pack_transposed(W_hh, packed_hh_t, hp0, hp1)
                _pack_transposed(W_hq, packed_hq_t, hp0, hp1)
            for v in range(vp0 * W, min(V, vp1 * W)):
                bias[v] = b_q[v]
        _pack(h0, B, B, h0_panels, hp0, hp1)
        b0, b1 = _share(B, tid, nt)
        for t in range(T):
            for b in range(b0, b1):
                x[t * B + b] = tokens[starts[i, b] + t]
                y[t * B + b] = tokens[starts[i, b] + t + 1]
        _gather_panels(W_xh, x, b_h, B, b0, b1, stride, h)
        _barrier(nt, sync)
        h_at, dz_at, logits_at = _address(h), _address(dz), _address(logits)
        _forward(
            like, size, T, B, H, _address(packed_hh), _address(h0_panels),
            h_at, panel, W, h_at, panel, W, 0, tile, tid, nt, sync,
        )  # fmt: skip
        _barrier(nt, sync)
        # Logits, loss, dlogits and dh of a block of rows while they are in the cache.
        r0, r1 = _share(R, tid, nt)
        r = r0
        while r < r1:
            end = min(r1, r + 6 * MR)
            _project_rows(
                like, size, r, end, H, V, h_at, panel, _address(packed_hq), _address(bias),
                logits_at, panel, W, True, tile,
            )  # fmt: skip
            _softmax_rows(logits, panel, W, logits, panel, W, y, V, r, end, train, losses, stats)
            if train:
                _project_rows(
                    like, size, r, end, V, H, logits_at, panel, _address(packed_hq_t), 0,
                    dz_at, panel, W, True, tile,
                )  # fmt: skip
            r = end
        _barrier(nt, sync)
        if tid == 0:
            total = 0.0
            for r in range(R):
                total += losses[r]
            loss[0] = total / R
            if not train:
                totals[0] += loss[0]
        if train:
            _backward(
                like, size, T, B, H, _address(packed_hh_t), dz_at, panel, W, h_at, panel, W,
                dz_at, panel, W, 0, 0, tile, tid, nt, sync,
            )  # fmt: skip
            _barrier(nt, sync)
            _outer(
                like, size, R, H, V, h_at, panel, logits_at, panel, _address(dW_hq), False,
                tile, tid, nt,
            )  # fmt: skip
            _column_sums(logits, R, stride, vp0, vp1, db_q)
            _outer(
                like, size, B, H, H, _address(h0_panels), B * W, dz_at, panel,
                _address(dW_hh), False, tile, tid, nt,
            )  # fmt: skip
            _outer(
                like, size, R - B, H, H, h_at, panel, dz_at + B * W * size, panel,
                _address(dW_hh), True, tile, tid, nt,
            )  # fmt: skip
            _column_sums(dz, R, stride, hp0, hp1, db_h)
            _scatter_panels(dz, x, stride, hp0, hp1, dW_xh)
            _barrier(nt, sync)
            _sum_of_squares(grads, partial, tid, nt)
            _barrier(nt, sync)
            total = 0.0
            for c in range(len(partial)):
                total += partial[c]
            rounded = params.dtype.type(np.sqrt(total))
            clipped = np.float64(rounded) > max_norm
            scale = params.dtype.type(1)
            if clipped:
                scale = params.dtype.type(max_norm / np.float64(rounded))
            _clip_and_update(params, grads, scale, clipped, params.dtype.type(lr), tid, nt)
            if tid == 0:
                norm[0] = rounded
                totals[0] += loss[0]
                totals[1] += rounded
                totals[2] += 1.0
                if not (np.isfinite(loss[0]) and np.isfinite(rounded)):
                    totals[3] += 1.0
        if carry:
            for p in range(hp0, hp1):
                width = min(W, H - p * W)
                for b in range(B):
                    at = (p * stride + R - B + b) * W
                    for j in range(width):
                        h0[b, p * W + j] = h[at + j]
        _barrier(nt, sync)


# --- Single ops --------------------------------------------------------------------------------


@_jit
def window(tokens, starts, x, y):
    for t in range(len(x)):
        for b in range(len(starts)):
            x[t, b] = tokens[starts[b] + t]
            y[t, b] = tokens[starts[b] + t + 1]


@_jit
def gather(tid, nt, sync, W_xh, tokens, b_h, z):
    """z ``[R, H]`` of tokens ``[R]``."""
    first, last = _share(len(tokens), tid, nt)
    for r in range(first, last):
        x = tokens[r]
        for j in range(len(b_h)):
            z[r, j] = W_xh[x, j] + b_h[j]
    _barrier(nt, sync)


@_jit
def gather_backward(tid, nt, sync, dz, tokens, dW_xh, db_h):
    """Each thread owns some columns and adds rows in the order of time."""
    first, last = _share(len(db_h), tid, nt)
    for v in range(len(dW_xh)):
        dW_xh[v, first:last] = 0
    db_h[first:last] = 0
    for r in range(len(tokens)):
        v = tokens[r]
        for j in range(first, last):
            dW_xh[v, j] += dz[r, j]
        for j in range(first, last):
            db_h[j] += dz[r, j]
    _barrier(nt, sync)


@_jit
def recurrence(tid, nt, sync, B, z, W_hh, h0, h, packed, h0_panels, states, tiles):
    """z, h ``[R, H]``."""
    size = W_hh.itemsize
    H = len(W_hh)
    W = 2 * VECTOR_BYTES // size
    p0, p1 = _share(_panels(H, size), tid, nt)
    _pack(W_hh, H, H, packed, p0, p1)
    _pack(h0, B, B, h0_panels, p0, p1)
    _barrier(nt, sync)
    _forward(
        W_hh.dtype.type(0), size, len(z) // B, B, H, _address(packed), _address(h0_panels),
        _address(z), W, H, _address(h), W, H, _address(states), _address(tiles[tid]),
        tid, nt, sync,
    )  # fmt: skip
    _barrier(nt, sync)


@_jit
def recurrence_backward(
    tid, nt, sync, B, dh, h, W_hh, h0, dz, dW_hh, dh0, packed, h_panels, dz_panels, states,
    tiles
):  # fmt: skip
    """dh, h, dz ``[R, H]``; h_panels: h0 and then h, for the sum of dW_hh, if that has elements."""
    size = W_hh.itemsize
    like = W_hh.dtype.type(0)
    R, H = h.shape
    W = 2 * VECTOR_BYTES // size
    p0, p1 = _share(_panels(H, size), tid, nt)
    _pack_transposed(W_hh, packed, p0, p1)
    _barrier(nt, sync)
    _backward(
        like, size, R // B, B, H, _address(packed), _address(dh), W, H, _address(h), W, H,
        _address(dz), W, H, _address(states), _address(dh0), _address(tiles[tid]), tid, nt, sync,
    )  # fmt: skip
    _barrier(nt, sync)
    if dW_hh.size == 0:
        return
    _pack(h0, B, R, h_panels, p0, p1)
    _pack(h, R - B, R, h_panels[B * W :], p0, p1)
    _pack(dz, R, R, dz_panels, p0, p1)
    _barrier(nt, sync)
    _outer(
        like, size, R, H, H, _address(h_panels), R * W, _address(dz_panels), R * W,
        _address(dW_hh), False, _address(tiles[tid]), tid, nt,
    )  # fmt: skip
    _barrier(nt, sync)


@_jit
def project(tid, nt, sync, h, W_hq, b_q, logits, h_panels, packed, bias, tiles):
    """h ``[R, H]``, logits ``[R, V]``."""
    size = W_hq.itemsize
    R, (H, V) = len(h), W_hq.shape
    W = 2 * VECTOR_BYTES // size
    p0, p1 = _share(_panels(V, size), tid, nt)
    _pack(W_hq, H, H, packed, p0, p1)
    for v in range(p0 * W, min(V, p1 * W)):
        bias[v] = b_q[v]
    p0, p1 = _share(_panels(H, size), tid, nt)
    _pack(h, R, R, h_panels, p0, p1)
    _barrier(nt, sync)
    r, last = _share(R, tid, nt)
    while r < last:
        end = min(last, r + 6 * MR)
        _project_rows(
            W_hq.dtype.type(0), size, r, end, H, V, _address(h_panels), R * W, _address(packed),
            _address(bias), _address(logits), W, V, False, _address(tiles[tid]),
        )  # fmt: skip
        r = end
    _barrier(nt, sync)


@_jit
def project_backward(
    tid, nt, sync, dlogits, h, W_hq, dh, dW_hq, db_q, h_panels, panels, packed, tiles
):  # fmt: skip
    """dlogits ``[R, V]``, h, dh ``[R, H]``; panels: those of dlogits."""
    size = W_hq.itemsize
    like = W_hq.dtype.type(0)
    R, (H, V) = len(h), W_hq.shape
    W = 2 * VECTOR_BYTES // size
    p0, p1 = _share(_panels(H, size), tid, nt)
    _pack_transposed(W_hq, packed, p0, p1)
    _pack(h, R, R, h_panels, p0, p1)
    p0, p1 = _share(_panels(V, size), tid, nt)
    _pack(dlogits, R, R, panels, p0, p1)
    _column_sums(panels, R, R, p0, p1, db_q)
    _barrier(nt, sync)
    r, last = _share(R, tid, nt)
    while r < last:
        end = min(last, r + 6 * MR)
        _project_rows(
            like, size, r, end, V, H, _address(panels), R * W, _address(packed), 0, _address(dh),
            W, H, False, _address(tiles[tid]),
        )  # fmt: skip
        r = end
    _outer(
        like, size, R, H, V, _address(h_panels), R * W, _address(panels), R * W,
        _address(dW_hq), False, _address(tiles[tid]), tid, nt,
    )  # fmt: skip
    _barrier(nt, sync)


@_jit
def cross_entropy(tid, nt, sync, logits, targets, V, dlogits, losses, tiles):
    """logits, dlogits flat ``[R V]``; the losses of the rows."""
    W = 2 * VECTOR_BYTES // logits.itemsize
    first, last = _share(len(targets), tid, nt)
    _softmax_rows(logits, W, V, dlogits, W, V, targets, V, first, last, True, losses, tiles[tid])
    _barrier(nt, sync)


@_jit
def sum_of_squares(tid, nt, sync, g, partial):
    """g flat; partial: one sum a chunk."""
    _sum_of_squares(g, partial, tid, nt)
    _barrier(nt, sync)


@_jit
def scale(tid, nt, sync, g, factor):
    first, last = _share(len(g), tid, nt)
    for i in range(first, last):
        g[i] *= factor
    _barrier(nt, sync)


@_jit
def sgd(tid, nt, sync, p, g, lr):
    _clip_and_update(p, g, lr, False, lr, tid, nt)
    _barrier(nt, sync)


# --- Generation --------------------------------------------------------------------------------


@_jit
def uniform(seed, sequence, position):
    """:func:`fastrnn.decoding.uniform`; seed: uint64."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = seed & mask, seed >> half
    c0, c1 = np.uint64(position) & mask, np.uint64(sequence) & mask
    c2, c3 = np.uint64(0), np.uint64(0)
    for _ in range(PHILOX_ROUNDS):
        p0 = np.uint64(PHILOX_M0) * c0
        p1 = np.uint64(PHILOX_M1) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(PHILOX_W0)) & mask
        k1 = (k1 + np.uint64(PHILOX_W1)) & mask
    return np.float64(c0 >> np.uint64(8)) * 2.0**-24


@_jit
def _choose(logits, temperature, top_k, top_p, u, weights):
    """:func:`fastrnn.decoding.choose` for a temperature above zero; weights: float64 scratch."""
    V = len(logits)
    top = np.float64(logits[0])
    for v in range(V):
        top = max(top, np.float64(logits[v]))
    for v in range(V):
        weights[v] = np.exp((np.float64(logits[v]) - top) / temperature)
    if 0 < top_k < V or top_p < 1.0:
        order = np.argsort(-logits, kind="mergesort")  # stable: ties to the lowest index
        kept = V
        if 0 < top_k < V:
            kept = top_k
        if top_p < 1.0:
            total = 0.0
            for i in range(kept):
                total += weights[order[i]]
            enough, mass = top_p * total, 0.0
            for i in range(kept):
                mass += weights[order[i]]
                if mass >= enough:
                    kept = i + 1
                    break
        for i in range(kept, V):
            weights[order[i]] = 0.0
    total = 0.0
    for v in range(V):
        total += weights[v]
    threshold, mass, last = u * total, 0.0, 0
    for v in range(V):
        mass += weights[v]
        if weights[v] > 0.0:
            last = v
            if mass > threshold:
                return v
    return last


@_jit
def generate(
    tid, nt, sync, W_xh, W_hh, b_h, W_hq, b_q, prefix, lengths, h, temperature, top_k, top_p,
    seed, sequence, position, tokens, packed_hh, packed_hq, bias, z, states, logits, row,
    weights, best, where, tiles
):  # fmt: skip
    """Continue S sequences; h ``[S, H]`` is the state before and after.

    z, states ``[2]``, logits: panels of S rows. With few sequences the threads share the columns
    of each, otherwise each thread has its own sequences and they never meet.
    """
    size = W_hh.itemsize
    like = W_hh.dtype.type(0)
    W = 2 * VECTOR_BYTES // size
    V, H = W_xh.shape
    S, P = prefix.shape
    N = tokens.shape[1]
    H_panels, V_panels = _panels(H, size), _panels(V, size)
    hp0, hp1 = _share(H_panels, tid, nt)
    vp0, vp1 = _share(V_panels, tid, nt)
    _pack(W_hh, H, H, packed_hh, hp0, hp1)
    _pack(W_hq, H, H, packed_hq, vp0, vp1)
    for v in range(vp0 * W, min(V, vp1 * W)):
        bias[v] = b_q[v]
    _pack(h, S, S, states[0], hp0, hp1)
    _barrier(nt, sync)
    shared = nt > 1 and 4 * nt > S
    s0, s1 = 0, S
    if not shared:
        s0, s1 = _share(S, tid, nt)
        hp0, hp1, vp0, vp1 = 0, H_panels, 0, V_panels
    tile = _address(tiles[tid])
    now = 0
    for i in range(P + N - 1):
        # Feed the prefix, then what was chosen last.
        old, new = _address(states[now]), _address(states[1 - now])
        for p in range(hp0, hp1):
            width = min(W, H - p * W)
            for s in range(s0, s1):
                token = prefix[s, i] if i < P else tokens[s, i - P]
                for j in range(width):
                    z[(p * S + s) * W + j] = W_xh[token, p * W + j] + b_h[p * W + j]
            s = s0
            while s < s1:
                rows = _height(s1 - s)
                at = (p * S + s) * W * size
                _tile_rows(
                    like, rows, old + s * W * size, S * W, H,
                    _address(packed_hh) + p * H * W * size, tile,
                )  # fmt: skip
                _tanh(like, rows, W, tile, _address(z) + at, W, new + at, W, 0, 0)
                s += rows
            if i < P:
                for s in range(s0, s1):
                    if i >= lengths[s]:
                        for j in range(W):
                            k = (p * S + s) * W + j
                            states[1 - now, k] = states[now, k]
        now = 1 - now
        if shared:
            _barrier(nt, sync)
        if i < P - 1:
            continue
        # Logits, and the next token from them.
        step = i - (P - 1)
        for p in range(vp0, vp1):
            s = s0
            while s < s1:
                rows = _height(s1 - s)
                _tile_rows(
                    like, rows, _address(states[now]) + s * W * size, S * W, H,
                    _address(packed_hq) + p * H * W * size, tile,
                )  # fmt: skip
                _add(
                    like, rows, W, tile, _address(bias) + p * W * size, 0,
                    _address(logits) + (p * S + s) * W * size, W,
                )  # fmt: skip
                s += rows
        if temperature == 0.0:
            for s in range(s0, s1):
                top, chosen = like, -1
                for p in range(vp0, vp1):
                    at = (p * S + s) * W
                    highest = logits[at]
                    for j in range(1, min(W, V - p * W)):
                        highest = max(highest, logits[at + j])
                    if chosen < 0 or highest > top:
                        top = highest
                        for j in range(min(W, V - p * W)):
                            if logits[at + j] == highest:
                                chosen = p * W + j
                                break
                best[tid, s], where[tid, s] = top, chosen
            if shared:
                _barrier(nt, sync)
            for s in range(s0, s1):
                chosen, top = where[tid, s], best[tid, s]
                if shared:
                    chosen, top = where[0, s], best[0, s]
                    for other in range(1, nt):
                        if where[other, s] >= 0 and (chosen < 0 or best[other, s] > top):
                            chosen, top = where[other, s], best[other, s]
                tokens[s, step] = max(chosen, 0)
            # Nobody overwrites best before all have read it: the state's barrier lies between.
        else:
            if shared:
                _barrier(nt, sync)
            first, last = s0, s1
            if shared:
                first, last = _share(S, tid, nt)
            for s in range(first, last):
                for v in range(V):
                    row[tid, v] = logits[((v // W) * S + s) * W + v % W]
                u = uniform(seed, sequence + s, position + step)
                tokens[s, step] = _choose(row[tid], temperature, top_k, top_p, u, weights[tid])
            if shared:
                _barrier(nt, sync)
    for p in range(hp0, hp1):
        for s in range(s0, s1):
            for j in range(min(W, H - p * W)):
                h[s, p * W + j] = states[now, (p * S + s) * W + j]
    _barrier(nt, sync)
