"""Kernels on one thread or on all, compiled once for both.

Numba compiles the body of a loop over ``prange`` by itself, with a wrapper that its threads call, and a
kernel anew without it for calls that stay on one thread. Here there is one such loop, which calls a function
by its address, and a kernel hands it what is to be done for each part of its work, or does that itself.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import cgutils, types

from fastmax import _process
from fastmax._jit import compiled_address, kernel
from fastmax._tracing import intrinsic, traced

_SIZE = ir.IntType(8 * np.intp().itemsize)
_PART = types.voidptr, types.intp  # what the function of a part takes: data, and the number of the part
_PARTS = types.intp, types.intp, types.intp  # what `_all_parts` takes


class Kernel:
    """A jitted function of a team, a number of parts for `each_part`, and further arguments.

    Other Python threads go on meanwhile. One call at a time has all threads; others do their parts in turn.
    """

    def __init__(self, function):
        self._kernel = kernel(function, nogil=True)

    def __call__(self, parts, *arguments):
        if parts > 1 and (lock := _process.all_threads).acquire(blocking=False):
            try:
                return self._kernel(_team(), parts, *arguments)
            finally:
                lock.release()
        return self._kernel(0, parts, *arguments)


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


@traced
def span_of(part, parts, count):
    """First and stop of what a part has of so many slices or tasks."""
    return count * part // parts, count * (part + 1) // parts


@intrinsic
def each_part(typingctx, function, team, parts, arguments):
    """Call ``function(part, parts, *arguments)`` for each part: all in turn, or by the team if that is not 0.

    It returns None. It allocates nothing, and so raises no error, which a thread could tell nobody. For
    kernels only: what they call is linked by name, and what is made here has a name for its kernel alone.
    """
    own = function.get_call_type(typingctx, (types.intp, types.intp, *arguments), {})

    def codegen(context, builder, sig, args):
        _, team, parts, values = args
        values = _uncounted(context, builder, arguments, values)
        values = [parts, *(builder.extract_value(values, i) for i in range(len(arguments)))]
        data = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
        builder.store(cgutils.pack_struct(builder, values), data)
        call = _function_of_part(context, builder.module, function, own, data.type)
        data = builder.bitcast(data, call.args[2].type)
        with builder.if_else(builder.icmp_unsigned("==", team, _SIZE(0))) as (alone, together):
            with alone, cgutils.for_range(builder, parts) as loop:
                context.call_conv.call_function(builder, call, types.none, _PART, [data, loop.index])
            with together:
                kind = context.call_conv.get_function_type(types.none, _PARTS)
                addresses = [builder.ptrtoint(pointer, _SIZE) for pointer in (call, data)]
                team = builder.inttoptr(team, kind.as_pointer())
                context.call_conv.call_function(builder, team, types.none, _PARTS, [*addresses, parts])
        return context.get_dummy_value()

    return types.none(function, types.intp, types.intp, arguments), codegen


def _uncounted(context, builder, kind, value):
    """The same value, whose arrays are not counted by reference: the caller keeps them.

    Else all threads would count in one place: 10**6 x 10 takes 1.3 to 1.5 times as long on two.
    """
    if isinstance(kind, types.BaseTuple):
        fields: Any = kind
        for i, field in enumerate(fields):
            own = _uncounted(context, builder, field, builder.extract_value(value, i))
            value = builder.insert_value(value, own, i)
    elif isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        value = array._getvalue()
    return value


def _function_of_part(context, module, function, signature, kind):
    """LLVM function that calls a jitted function for a part, with arguments from the data."""
    own = context.call_conv.get_function_type(types.none, _PART)
    call = ir.Function(module, own, module.get_unique_name("fastmax.part"))
    call.linkage = "internal"
    builder = ir.IRBuilder(call.append_basic_block("entry"))
    data, part = call.args[2:]
    parts, *values = cgutils.unpack_tuple(builder, builder.load(builder.bitcast(data, kind)))
    context.get_function(function, signature)(builder, [part, parts, *values])
    builder.ret(own.return_type(0))
    return call
