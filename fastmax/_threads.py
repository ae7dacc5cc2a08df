"""Kernels on one thread or on all, compiled once for both.

Numba compiles the body of a loop over ``prange`` by itself, with a wrapper that its threads call, and a
kernel anew without it for calls that stay on one thread. Here there is one such loop, which calls a function
by its address, and a kernel hands it what is to be done by each of its threads, or does that itself.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import cgutils, types

from fastmax import _process
from fastmax._jit import compiled_address, kernel
from fastmax._lanes import LINE_BYTES
from fastmax._tracing import intrinsic

_SIZE = ir.IntType(8 * np.intp().itemsize)
_PART = types.voidptr, types.intp  # what the function of a part takes: data, and the number of the part
_PARTS = types.intp, types.intp, types.intp  # what `_all_parts` takes

# Entries from which all threads take no longer than one, on two cores: rows, columns, one slice (see
# figures/scaling_cpu.csv).
PARALLEL_ROWS = 2**14
PARALLEL_COLUMNS = 2**16
PARALLEL_SLICE = 2**17


class Kernel:
    """A jitted function of a team, a number of parts for `each_task`, and more arguments.

    Other Python threads go on meanwhile. One call at a time has all threads; others keep to their own.
    """

    def __init__(self, function):
        self._kernel = kernel(function, nogil=True)

    def __call__(self, parts, *arguments):
        # An interrupt between acquiring the lock and ``try`` would leave it locked; ``with`` has no between.
        if parts > 1 and not (lock := _process.all_threads).locked():
            with lock:
                return self._kernel(_team(), parts, *arguments)
        return self._kernel(0, 1, *arguments)


def parts_for(size, enough):
    """Number of parts for an array of some size: one for each thread if it has enough entries."""
    return 1 if size < enough else _process.usable_threads()


@functools.cache
def _team():
    """What does the parts of any kernel: the address of `_all_parts`."""
    return compiled_address(_all_parts, _PARTS)


@functools.partial(kernel, parallel=True)
def _all_parts(function, data, parts):
    for part in prange(parts):
        _call(function, data, part)


@intrinsic
def _call(typingctx, function, data, part):
    """Call the function at an address, of data at another, for a part."""

    def codegen(context, builder, sig, args):
        function, data, part = args
        kind = context.call_conv.get_function_type(types.none, _PART)
        data = builder.inttoptr(data, kind.args[2])
        function = builder.inttoptr(function, kind.as_pointer())
        context.call_conv.call_function(builder, function, types.none, _PART, [data, part])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), codegen


# Pieces that each thread's share of some tasks is cut into.
_PIECES = 8
# Integers from one counter of pieces to the next: a line of the cache.
_COUNTER = LINE_BYTES // np.intp().itemsize


# These allocate nothing, and so raise no error, which a thread could tell nobody. They are for kernels only:
# what those call is linked by name, and what is made here has a name for one kernel alone.


@intrinsic
def each_task(typingctx, function, team, parts, count, arguments, shares=None):
    """Call ``function(task, part, *arguments)`` for each of so many tasks.

    By one part, or by a team if that is not 0, where each of so many parts goes on to other tasks when it is
    done with some. Each has a share of its own, in pieces, and takes pieces of others when that is done: with
    equal shares the slowest core, which may be a small one or one that others use, had all wait, and on two
    cores of which one was shared 1024 x 64 float32 took as long as on one. Where the number of ``shares`` is
    given it is 1 or that of the parts; of one share all take the next task in turn, so that neighbours are
    worked on together.
    """
    own = function.get_call_type(typingctx, (types.intp, types.intp, *arguments), {})

    def span(builder, call, first, stop, part, values):
        with cgutils.for_range(builder, stop, start=first) as loop:
            call(builder, [loop.index, part, *values])

    return _by_parts(function, own, span, arguments, shares)


@intrinsic
def each_span(typingctx, function, team, parts, count, arguments):
    """As `each_task`, for many tasks at a time: call ``function(first, stop, part, *arguments)``."""
    own = function.get_call_type(typingctx, (types.intp, types.intp, types.intp, *arguments), {})

    def span(builder, call, first, stop, part, values):
        call(builder, [first, stop, part, *values])

    return _by_parts(function, own, span, arguments, None)


def _by_parts(function, own, span, arguments, shares):
    """Signature and code of a call for all tasks; ``span`` builds what is to be done for some of them."""

    def codegen(context, builder, sig, args):
        team, parts, count, values, *given = args[1:]
        shares = given[0] if given else parts
        values = _shared(context, builder, arguments, values)
        values = [builder.extract_value(values, i) for i in range(len(arguments))]
        is_alone = builder.icmp_unsigned("==", team, _SIZE(0))
        in_turn = builder.icmp_unsigned("==", shares, _SIZE(1))
        pieces = builder.select(in_turn, count, _SIZE(_PIECES))
        shares, pieces = (builder.select(is_alone, _SIZE(1), number) for number in (shares, pieces))
        counters = _counters(builder, shares)
        values = [count, shares, pieces, counters, *values]
        data = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
        builder.store(cgutils.pack_struct(builder, values), data)
        task = functools.partial(span, call=context.get_function(function, own))
        call = _function_of_part(context, builder.module, task, data.type)
        data = builder.bitcast(data, call.args[2].type)
        with builder.if_else(is_alone) as (alone, together):
            with alone:
                context.call_conv.call_function(builder, call, types.none, _PART, [data, _SIZE(0)])
            with together:
                kind = context.call_conv.get_function_type(types.none, _PARTS)
                addresses = [builder.ptrtoint(pointer, _SIZE) for pointer in (call, data)]
                team = builder.inttoptr(team, kind.as_pointer())
                context.call_conv.call_function(builder, team, types.none, _PARTS, [*addresses, parts])
        return context.get_dummy_value()

    kinds = [types.intp, types.intp, types.intp, arguments] + ([] if shares is None else [types.intp])
    return types.none(function, *kinds), codegen


def _counters(builder, count):
    """Counters at 0."""
    counters = builder.alloca(_SIZE, builder.mul(count, _SIZE(_COUNTER)))
    with cgutils.for_range(builder, count) as loop:
        builder.store(_SIZE(0), builder.gep(counters, [builder.mul(loop.index, _SIZE(_COUNTER))]))
    return counters


def _shared(context, builder, kind, value):
    """The same value as threads share it: no array is counted by reference, as the caller keeps them.

    Else all threads would count in one place, and 10**6 x 10 takes 1.3 to 1.5 times as long on two.
    """
    if isinstance(kind, types.BaseTuple):
        fields: Any = kind
        for i, field in enumerate(fields):
            own = _shared(context, builder, field, builder.extract_value(value, i))
            value = builder.insert_value(value, own, i)
    elif isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        value = array._getvalue()
    return value


def _function_of_part(context, module, span, kind):
    """LLVM function that a thread calls for a part: with the data of `_by_parts` it claims what is left.

    A piece is claimed by counting up the counter of a share.
    """
    own = context.call_conv.get_function_type(types.none, _PART)
    call = ir.Function(module, own, module.get_unique_name("fastmax.part"))
    call.linkage = "internal"
    builder = ir.IRBuilder(call.append_basic_block("entry"))
    data, part = call.args[2:]
    count, shares, pieces, counters, *values = cgutils.unpack_tuple(
        builder, builder.load(builder.bitcast(data, kind))
    )
    all_pieces = builder.mul(shares, pieces)
    with cgutils.for_range(builder, shares) as loop:
        share = builder.urem(builder.add(part, loop.index), shares)
        counter = builder.gep(counters, [builder.mul(share, _SIZE(_COUNTER))])
        claim, work, end = (builder.append_basic_block(name) for name in ("claim", "work", "end"))
        builder.branch(claim)
        builder.position_at_end(claim)
        claimed = builder.atomic_rmw("add", counter, _SIZE(1), "monotonic")
        builder.cbranch(builder.icmp_signed("<", claimed, pieces), work, end)
        builder.position_at_end(work)
        piece = builder.add(builder.mul(share, pieces), claimed)
        first, stop = (
            builder.sdiv(builder.mul(count, builder.add(piece, _SIZE(i))), all_pieces) for i in range(2)
        )
        with builder.if_then(builder.icmp_signed("<", first, stop)):
            span(builder, first=first, stop=stop, part=part, values=values)
        builder.branch(claim)
        builder.position_at_end(end)
    builder.ret(own.return_type(0))
    return call
