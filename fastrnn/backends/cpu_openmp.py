"""The ops of :mod:`fastrnn.backends.cpu_ops` on the threads of an OpenMP library.

A library whose threads spin between its own calls leaves no core to a second set of threads: beside
it, work is done on its threads, as parallel regions of its own.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastrnn.backends.cpu_emitter import jit
from fastrnn.backends.cpu_ops import (
    cross_entropy,
    gather,
    gather_backward,
    recurrence,
    recurrence_backward,
    scale,
    sum_of_squares,
)

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def _fork(typing_context, function, openmp, nt, sync, arguments):
    """Call ``function(tid, n, sync, *arguments)`` on the n threads of an OpenMP parallel region.

    openmp: addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, which the
    libraries of GCC, LLVM and Intel all have. nt: threads to ask for; ``n <= nt`` are lent.
    """
    kinds = (types.intp, types.intp, sync, *arguments.types)
    typing_context.resolve_function_type(function, kinds, {})

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        called = function.get_call_type(context.typing_context, kinds, {})
        compiled = function.dispatcher.get_compile_result(called)
        context.add_linking_libs(context.get_function(function, called).libs)
        callee = context.declare_function(builder.module, compiled.fndesc)
        bytes_at, count = ir.IntType(8).as_pointer(), ir.FunctionType(_I32, []).as_pointer()

        # What the threads read lies in this function's frame, which outlives the region.
        addresses = context.make_array(openmp)(context, builder, values[1]).data
        fork, thread_num, num_threads = (
            builder.load(builder.gep(addresses, [ir.Constant(_I64, i)])) for i in range(3)
        )
        fields = [thread_num, num_threads, values[3], values[4]]
        record = ir.LiteralStructType([value.type for value in fields])
        frame = cgutils.alloca_once(builder, record)
        for i, value in enumerate(fields):
            builder.store(value, cgutils.gep_inbounds(builder, frame, 0, i))

        name = builder.module.get_unique_name("fastrnn.region")
        region = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [bytes_at]), name)
        region.linkage = "internal"
        b = ir.IRBuilder(region.append_basic_block("entry"))
        fields = cgutils.unpack_tuple(b, b.load(b.bitcast(region.args[0], record.as_pointer())))
        tid, n = (b.sext(b.call(b.inttoptr(f, count), []), _I64) for f in fields[:2])
        passed = [tid, n, fields[2], *cgutils.unpack_tuple(b, fields[3])]
        context.call_conv.call_function(b, callee, types.none, kinds, passed)
        b.ret_void()

        kind = ir.FunctionType(ir.VoidType(), [region.type, bytes_at, _I32, _I32]).as_pointer()
        threads = builder.trunc(values[2], _I32)
        frame = builder.bitcast(frame, bytes_at)
        builder.call(builder.inttoptr(fork, kind), [region, frame, threads, ir.Constant(_I32, 0)])
        return context.get_dummy_value()

    return types.void(function, openmp, nt, sync, arguments), generate


@jit
def _fork_gather(openmp, nt, sync, arguments):
    _fork(gather, openmp, nt, sync, arguments)


@jit
def _fork_gather_backward(openmp, nt, sync, arguments):
    _fork(gather_backward, openmp, nt, sync, arguments)


@jit
def _fork_recurrence(openmp, nt, sync, arguments):
    _fork(recurrence, openmp, nt, sync, arguments)


@jit
def _fork_recurrence_backward(openmp, nt, sync, arguments):
    _fork(recurrence_backward, openmp, nt, sync, arguments)


@jit
def _fork_cross_entropy(openmp, nt, sync, arguments):
    _fork(cross_entropy, openmp, nt, sync, arguments)


@jit
def _fork_sum_of_squares(openmp, nt, sync, arguments):
    _fork(sum_of_squares, openmp, nt, sync, arguments)


@jit
def _fork_scale(openmp, nt, sync, arguments):
    _fork(scale, openmp, nt, sync, arguments)


ON_OPENMP = {
    gather: _fork_gather,
    gather_backward: _fork_gather_backward,
    recurrence: _fork_recurrence,
    recurrence_backward: _fork_recurrence_backward,
    cross_entropy: _fork_cross_entropy,
    sum_of_squares: _fork_sum_of_squares,
    scale: _fork_scale,
}
"""The ops that can run there: called with ``openmp, nt, sync`` and their arguments as a tuple."""
