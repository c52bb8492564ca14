"""Vector code of the ``numba`` backend: LLVM functions that compiled Python can call.

**Panels.** A matrix ``[rows, N]`` is kept as panels of ``W`` columns, two vector registers: element
``(r, j)`` lies at ``[j // W, r, j % W]``. Everything a tile reads is then contiguous, for a product
with the weights (rows of ``h``) and for the gradient of the weights (columns of ``h``) alike. The
last panel is padded, so no loop over columns has a remainder.

**Tiles.** ``MR`` rows by ``W`` columns of a product stay in registers over the whole inner
dimension: one load of the weights feeds ``MR`` multiply-adds (Goto, van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008).

The functions at the end take ``like``, a scalar whose type chooses float or double, and name memory
by address, strides in elements.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastrnn.backends.cpu_emitter import DOUBLE, I32, I64, MR, Emitter, integer, jit, once

CACHE_LINE = 64

AHEAD = 16
"""Steps of the inner dimension by which a tile asks for its memory before it reads it."""


# --- Products ----------------------------------------------------------------------------------


@once("tile", "piippip")
def _emit_tile(e: Emitter, arguments: Any, transposed: bool, rows: int) -> None:
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
                start = e.at(init, e.b.mul(init_row, integer(m)), j * e.L)
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
        rows_on = e.b.mul(k, integer(W))
        line = CACHE_LINE * 8 // e.bits
        for u in range(AHEAD, AHEAD + count):
            for j in range(0, W, line):
                e.prefetch(e.at(b, rows_on, u * W + j))
            if transposed:
                e.prefetch(e.at(a, rows_on, u * W))
        if not transposed:
            for j in range(0, rows * count, line):
                e.prefetch(e.at(a, e.b.mul(k, integer(rows)), rows * W + j))

    def run(a: Any, b: Any, n: Any) -> None:
        def steps(count: int) -> Callable[[Any], None]:
            def body(k: Any) -> None:
                rows_on = e.b.mul(k, integer(W))
                if count > 1:
                    look_ahead(a, b, k, count)
                for u in range(count):
                    multiply_add(e.at(a, rows_on if transposed else k), e.at(b, rows_on), u)

            return body

        whole = e.b.and_(n, integer(-4))
        e.loop(integer(0), whole, 4, steps(4))
        e.loop(whole, n, 1, steps(1))

    if transposed:
        run(A, B, K)
    else:
        panel = e.variable(A)

        def panels(k: Any) -> None:
            a, left = e.b.load(panel), e.b.sub(K, k)
            run(a, e.at(B, e.b.mul(k, integer(W))), e.smaller(left, integer(W)))
            e.b.store(e.at(a, a_panel), panel)

        e.loop(integer(0), K, W, panels)
    for m in range(rows):
        for j in range(2):
            total = e.b.load(acc[0][m][j])
            for chain in acc[1:]:
                total = e.b.fadd(total, e.b.load(chain[m][j]))
            e.store(total, e.at(out, m * W + j * e.L))


@once("tiles", "ipiippip")
def _emit_tiles(e: Emitter, arguments: Any, transposed: bool) -> None:
    """The tile of as many rows as the first argument says, 1 to MR."""
    done = e.function.append_basic_block("done")
    choice = e.b.switch(arguments[0], done)
    for rows in range(1, MR + 1):
        block = e.function.append_basic_block(f"rows_{rows}")
        choice.add_case(integer(rows), block)
        e.b.position_at_end(block)
        e.b.call(_emit_tile(e.module, e.real, transposed, rows), arguments[1:])
        e.b.branch(done)
    e.b.position_at_end(done)


# --- What follows a product --------------------------------------------------------------------


def _row_numbers(e: Emitter, rows: Any) -> Callable[[Any], Any]:
    """Which row is the i-th: ``rows[i]``, or i where rows is null."""
    given = e.given(rows)

    def number(i: Any) -> Any:
        chosen = e.variable(i)
        with e.b.if_then(given):
            e.b.store(e.b.sext(e.b.load(e.at(rows, i)), I64), chosen)
        return e.b.load(chosen)

    return number


@once("ask", "ipit")
def _emit_ask(e: Emitter, arguments: Any) -> None:
    """Ask for m rows of a panel's width, before they are read; TOKENS as in ``_emit_tanh``.

    Arguments: m, Z, elements between its rows, TOKENS.
    """
    m, Z, z_row, tokens = arguments
    number = _row_numbers(e, tokens)

    def row(i: Any) -> None:
        z = e.at(Z, e.b.mul(number(i), z_row))
        for j in range(0, e.W, CACHE_LINE * 8 // e.bits):
            e.prefetch(e.at(z, j))

    e.loop(integer(0), m, 1, row)


@once("tanh", "iippitpipi")
def _emit_tanh(e: Emitter, arguments: Any) -> None:
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
            product = e.load(e.at(P, e.b.mul(i, integer(e.W)), j * e.L))
            values.append(e.tanh(e.b.fadd(product, e.load(e.at(z, j * e.L), mask))))
            e.store(values[j], e.at(C, e.b.mul(i, c_row), j * e.L), mask)
        with e.b.if_then(copied):
            for j, mask in enumerate(masks):
                e.store(values[j], e.at(D, e.b.mul(i, d_row), j * e.L), mask)

    e.loop(integer(0), m, 1, row)


@once("dtanh", "iippipipipi")
def _emit_dtanh(e: Emitter, arguments: Any) -> None:
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

            product = e.load(e.at(P, e.b.mul(i, integer(e.W)), j * e.L))
            y = of(Y, y_row)
            slope = e.fma(e.b.fneg(y), y, e.splat(1.0))
            values.append(e.b.fmul(e.b.fadd(product, of(G, g_row)), slope))
            e.store(values[j], e.at(C, e.b.mul(i, c_row), j * e.L), mask)
        with e.b.if_then(copied):
            for j, mask in enumerate(masks):
                e.store(values[j], e.at(D, e.b.mul(i, d_row), j * e.L), mask)

    e.loop(integer(0), m, 1, row)


class _Squares:
    """A sum of squares in double, one for each vector of a panel's row."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.wide = e, ir.VectorType(DOUBLE, e.L)
        self.sums = [e.variable(ir.Constant(self.wide, [0.0] * e.L)) for _ in range(2)]

    def add(self, j: int, value: Any) -> None:
        b = self.e.b
        if self.e.bits == 32:
            value = b.fpext(value, self.wide)
        b.store(self.e.fma(value, value, b.load(self.sums[j])), self.sums[j])

    def value(self) -> Any:
        b = self.e.b
        return self.e.reduce(b.fadd(*(b.load(s) for s in self.sums)), b.fadd)


@once("put", "iippiid")
def _emit_put(e: Emitter, arguments: Any) -> None:
    """``C = P``, or ``C += P``, for m rows and n columns; the sum of C's squares in double.

    Arguments: m, n, P ``[m, W]``, C, elements between its rows, whether to add, SQUARES or null.
    """
    m, n, P, C, c_row, adds, squares = arguments
    masks, total = e.masks(n), _Squares(e)

    def rows(adding: bool) -> None:
        def row(i: Any) -> None:
            for j, mask in enumerate(masks):
                value = e.load(e.at(P, e.b.mul(i, integer(e.W)), j * e.L))
                to = e.at(C, e.b.mul(i, c_row), j * e.L)
                if adding:
                    value = e.b.fadd(value, e.load(to, mask))
                e.store(value, to, mask)
                total.add(j, e.b.select(mask, value, e.splat(0.0)))

        e.loop(integer(0), m, 1, row)

    # Two loops: to load from C, though nothing, would wait for stores 4 KiB before.
    with e.b.if_else(e.b.icmp_signed("!=", adds, integer(0))) as (add, replace):
        with add:
            rows(True)
        with replace:
            rows(False)
    with e.b.if_then(e.given(squares)):
        e.b.store(total.value(), squares)


# --- Softmax -----------------------------------------------------------------------------------


@once("row_tops", "iipiip")
def _emit_row_tops(e: Emitter, arguments: Any) -> None:
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

    e.loop(integer(0), m, 1, row)


@once("exp_rows", "iipiipiipp")
def _emit_exp_rows(e: Emitter, arguments: Any) -> None:
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

    e.loop(integer(0), m, 1, row)


@once("scale_rows", "iipiip")
def _emit_scale_rows(e: Emitter, arguments: Any) -> None:
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

    e.loop(integer(0), m, 1, row)


# --- Moving and adding -------------------------------------------------------------------------


@once("pack", "iipipp")
def _emit_pack(e: Emitter, arguments: Any) -> None:
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
            here = e.all_lanes(e.b.icmp_signed("<", integer(i), m))
            mask = e.b.and_(here, inside[j])
            rows.append(e.load(e.at(S, e.b.mul(s_row, integer(i)), j * e.L), mask))
        with e.b.if_then(plain):
            for i, row in enumerate(rows):
                here = e.all_lanes(e.b.icmp_signed("<", integer(i), m))
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
                here = e.all_lanes(e.b.icmp_signed("<", integer(j * e.L + i), n))
                e.store(row, e.at(turned, (j * e.L + i) * e.W), here)


@once("scatter", "iitpiipi")
def _emit_scatter(e: Emitter, arguments: Any) -> None:
    """``D[TOKENS[i]] += S[i]`` for m rows in order, n columns.

    Arguments: m, n, TOKENS, S, elements between its panels, between its rows, D, elements between
    its rows.
    """
    m, n, tokens, S, s_panel, s_row, D, d_row = arguments

    def row(i: Any) -> None:
        to = e.at(D, e.b.mul(e.b.sext(e.b.load(e.at(tokens, i)), I64), d_row))
        s = e.at(S, e.b.mul(i, s_row))

        def panel(p: Any, masks: list[Any]) -> None:
            column = e.b.mul(p, integer(e.W))
            for j, mask in enumerate(masks):
                value = e.load(e.at(s, e.b.mul(p, s_panel), j * e.L), mask)
                at = e.at(to, column, j * e.L)
                e.store(e.b.fadd(e.load(at, mask), value), at, mask)

        e.panels(n, panel)

    e.loop(integer(0), m, 1, row)


@once("column_sums", "iipip")
def _emit_column_sums(e: Emitter, arguments: Any) -> None:
    """The sums over m rows of n <= W columns.

    Arguments: m, n, S, elements between its rows, OUT.
    """
    m, n, S, s_row, out = arguments
    chains, masks = 4, e.masks(n)
    sums = [[e.variable(e.splat(0.0)) for _ in range(2)] for _ in range(chains)]

    def rows(count: int) -> Callable[[Any], None]:
        def body(i: Any) -> None:
            for c in range(count):
                at = e.at(S, e.b.mul(e.b.add(i, integer(c)), s_row))
                for j, slot in enumerate(sums[c]):
                    value = e.load(e.at(at, j * e.L), masks[j])
                    e.b.store(e.b.fadd(e.b.load(slot), value), slot)

        return body

    whole = e.b.and_(m, integer(-chains))
    e.loop(integer(0), whole, chains, rows(chains))
    e.loop(whole, m, 1, rows(1))
    for j, mask in enumerate(masks):
        parts = [e.b.load(sums[c][j]) for c in range(chains)]
        total = e.b.fadd(e.b.fadd(parts[0], parts[1]), e.b.fadd(parts[2], parts[3]))
        e.store(total, e.at(out, j * e.L), mask)


@once("update", "iitpipiss")
def _emit_update(e: Emitter, arguments: Any) -> None:
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
            at = e.b.mul(q, integer(e.W))
            for j, mask in enumerate(masks):
                scaled = e.b.fmul(e.load(e.at(g, at, j * e.L), mask), scale)
                e.store(scaled, e.at(g, at, j * e.L), mask)
                moved = e.fma(step, scaled, e.load(e.at(p, at, j * e.L), mask))
                e.store(moved, e.at(p, at, j * e.L), mask)

        e.panels(n, panel)

    e.loop(integer(0), m, 1, row)


@once("squares", "iitpid")
def _emit_squares(e: Emitter, arguments: Any) -> None:
    """The sum of squares, in double, of m rows of n columns.

    Arguments: m, n, ROWS (which ones) or null, G, elements between its rows, OUT.
    """
    m, n, rows, G, g_row, out = arguments
    total, number = _Squares(e), _row_numbers(e, rows)

    def row(i: Any) -> None:
        g = e.at(G, e.b.mul(number(i), g_row))

        def panel(q: Any, masks: list[Any]) -> None:
            for j, mask in enumerate(masks):
                total.add(j, e.load(e.at(g, e.b.mul(q, integer(e.W)), j * e.L), mask))

        e.panels(n, panel)

    e.loop(integer(0), m, 1, row)
    e.b.store(total.value(), out)


@once("arg_max", "ipilp")
def _emit_arg_max(e: Emitter, arguments: Any) -> None:
    """The largest of n columns of a row and the lowest index that holds it; NaN counts not.

    Arguments: n, X, elements between X's panels, INDEX, VALUE.
    """
    n, X, x_panel, index_at, value_at = arguments
    lowest = e.splat(-math.inf)
    best = [e.variable(lowest) for _ in range(2)]
    where = [e.variable(e.splat_int(0)) for _ in range(2)]
    lanes = [ir.Constant(e.ints, [j * e.L + lane for lane in range(e.L)]) for j in range(2)]

    def panel(p: Any, masks: list[Any]) -> None:
        column = e.b.mul(p, integer(e.W))
        if e.bits == 32:
            column = e.b.trunc(column, I32)
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
        index = e.b.sext(index, I64)
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
_ask = _callable(_emit_ask, "ipit")
_tanh = _callable(_emit_tanh, "iippitpipi")
_dtanh = _callable(_emit_dtanh, "iippipipipi")
_put = _callable(_emit_put, "iippiid")
_row_tops = _callable(_emit_row_tops, "iipiip")
_exp_rows = _callable(_emit_exp_rows, "iipiipiipp")
_scale_rows = _callable(_emit_scale_rows, "iipiip")
_pack = _callable(_emit_pack, "iipipp")
_scatter = _callable(_emit_scatter, "iitpiipi")
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
def ask(like, m, Z, z_row, tokens):
    _ask(like, m, Z, z_row, tokens)


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
def scatter(like, m, n, tokens, S, s_panel, s_row, D, d_row):
    _scatter(like, m, n, tokens, S, s_panel, s_row, D, d_row)


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
        return builder.ptrtoint(made.data, I64)

    return signature, generate
