"""Lanes: a SIMD vector as a value in Numba code.

Arithmetic on lanes is written as arithmetic on a float is, and one source serves both: a contiguous slice
is read 16 float32 or 8 float64 lanes at a time, a strided one entry by entry as plain floats. LLVM lays
the lanes onto the registers that a processor has (one AVX-512, two AVX2 or four NEON registers). What
runs is what is written: no loop waits for the auto-vectoriser, no sum for leave to change its order.

The lane type of an array is fixed by its type: C-contiguous arrays give lanes, arrays of layout ``A`` give
floats.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import lower_builtin, models, register_model

# What it makes is called with other arguments than the function that it decorates.
intrinsic: Any = numba_intrinsic

# Registers of 64 bytes: on AVX2 and NEON, LLVM splits them, which unrolls the loops for free.
_COUNT = {types.float32: 16, types.float64: 8}
_SCALAR = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.boolean: ir.IntType(1),
}
_EXPONENT_SHIFT = {types.float32: 23, types.float64: 52}
_INDEX = ir.IntType(32)
_SIZE = ir.IntType(8 * np.intp().itemsize)


class Lanes(types.Type):
    """The Numba type of ``count`` values of type ``dtype`` in one vector."""

    def __init__(self, dtype, count):
        self.dtype = dtype
        self.count = count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm_type(fe_type))


def _llvm_type(lanes):
    if isinstance(lanes, Lanes):
        return ir.VectorType(_SCALAR[lanes.dtype], lanes.count)
    return _SCALAR[lanes]


def _dtype(lanes):
    return lanes.dtype if isinstance(lanes, Lanes) else lanes


def _lanes(dtype, count):
    return Lanes(dtype, count) if count > 1 else dtype


def _lanes_of(like):
    """The lane type of an array; a lane type or a float stands for itself."""
    if isinstance(like, types.Array):
        return _lanes(like.dtype, _COUNT[like.dtype] if like.layout == "C" else 1)
    return like


def _constant(llvm_type, value):
    if isinstance(llvm_type, ir.VectorType):
        return ir.Constant(llvm_type, [value] * llvm_type.count)
    return ir.Constant(llvm_type, value)


def _splat(builder, value, llvm_type):
    if not isinstance(llvm_type, ir.VectorType):
        return value
    undefined = ir.Constant(llvm_type, ir.Undefined)
    first = builder.insert_element(undefined, value, _INDEX(0))
    return builder.shuffle_vector(first, undefined, _constant(ir.VectorType(_INDEX, llvm_type.count), 0))


def _call(builder, name, return_type, arguments, fastmath=()):
    """Call an LLVM intrinsic that is overloaded on the type of its first argument."""
    overloaded = arguments[0].type
    element = getattr(overloaded, "element", overloaded)
    suffix = {"float": "f32", "double": "f64", "i1": "i1"}[str(element)]
    if isinstance(overloaded, ir.VectorType):
        suffix = f"v{overloaded.count}{suffix}"
    function_type = ir.FunctionType(return_type, [argument.type for argument in arguments])
    function = get_or_insert_function(builder.module, function_type, f"llvm.{name}.{suffix}")
    return builder.call(function, arguments, fastmath=fastmath)


def _pointer(context, builder, array_type, array, index, llvm_type):
    """Address of entry ``index`` of a 1-d array, as a pointer to ``llvm_type``."""
    struct = context.make_array(array_type)(context, builder, array)
    if array_type.layout == "C":
        address = builder.gep(struct.data, [index])
    else:
        stride = builder.extract_value(struct.strides, 0)
        raw = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
        address = builder.gep(raw, [builder.mul(index, stride)])
    return builder.bitcast(address, llvm_type.as_pointer())


# -- arithmetic and comparison, as operators ------------------------------------------------------


def _define_operator(function, emit, result):
    @infer_global(function)  # pyright: ignore[reportOptionalCall]
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if not kws and isinstance(args[0], Lanes) and all(arg == args[0] for arg in args):
                return signature(result(args[0]), *args)
            return None

    def lower(context, builder, sig, args):
        return emit(builder, *args)

    arity = 1 if function is operator.neg else 2
    lower_builtin(function, *(Lanes,) * arity)(lower)


for _function, _name in {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
    operator.neg: "fneg",
}.items():
    _define_operator(
        _function,
        lambda builder, *args, _name=_name: getattr(builder, _name)(*args),
        result=lambda lanes: lanes,
    )

# As in IEEE 754, a comparison with NaN is False.
for _function, _name in {operator.lt: "<", operator.gt: ">", operator.eq: "=="}.items():
    _define_operator(
        _function,
        lambda builder, a, b, _name=_name: builder.fcmp_ordered(_name, a, b),
        result=lambda lanes: Lanes(types.boolean, lanes.count),
    )


@intrinsic
def select(typingctx, condition, yes, no):
    """``yes`` where the condition holds, else ``no``."""

    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return yes(condition, yes, yes), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, rounded once."""

    def codegen(context, builder, sig, args):
        return _call(builder, "fma", args[0].type, args)

    return a(a, a, a), codegen


@intrinsic
def power_of_two(typingctx, exponent):
    """Power of two whose exponent field stands in the low bits of a float."""
    dtype = _dtype(exponent)

    def codegen(context, builder, sig, args):
        (exponent,) = args
        integer = ir.IntType(dtype.bitwidth)
        if isinstance(exponent.type, ir.VectorType):
            integer = ir.VectorType(integer, exponent.type.count)
        bits = builder.bitcast(exponent, integer)
        bits = builder.shl(bits, _constant(integer, _EXPONENT_SHIFT[dtype]))
        return builder.bitcast(bits, exponent.type)

    return exponent(exponent), codegen


@intrinsic
def polynomial(typingctx, x, coefficients):
    """Polynomial in ``x`` by Horner's rule; ``coefficients`` = (float32's, float64's), lowest first."""
    precision = {types.float32: 0, types.float64: 1}[_dtype(x)]

    def codegen(context, builder, sig, args):
        x, pairs = args
        own = builder.extract_value(pairs, precision)
        count = len(sig.args[1][precision])
        values = [_convert(builder, builder.extract_value(own, i), x.type) for i in range(count)]
        result = values[-1]
        for value in values[-2::-1]:
            result = _call(builder, "fma", x.type, [result, x, value])
        return result

    return x(x, coefficients), codegen


def _convert(builder, value, llvm_type):
    """Round a float64 to the element type and spread it over the lanes."""
    element = getattr(llvm_type, "element", llvm_type)
    if value.type != element:
        value = builder.fptrunc(value, element)
    return _splat(builder, value, llvm_type)


# -- from scalars to lanes and back ---------------------------------------------------------------


@intrinsic
def spread(typingctx, value, like):
    """``value`` in every lane, in the lane type of ``like``; lanes of that type are returned as they are."""
    lanes = _lanes_of(like)

    def codegen(context, builder, sig, args):
        if sig.args[0] == lanes:
            return args[0]
        scalar = context.cast(builder, args[0], sig.args[0], _dtype(lanes))
        return _splat(builder, scalar, _llvm_type(lanes))

    return lanes(value, like), codegen


@intrinsic
def constant(typingctx, values, like):
    """The one of the two constants (for float32, for float64) that belongs to the dtype of ``like``."""
    lanes = _lanes_of(like)
    precision = {types.float32: 0, types.float64: 1}[_dtype(lanes)]

    def codegen(context, builder, sig, args):
        return _convert(builder, builder.extract_value(args[0], precision), _llvm_type(lanes))

    return lanes(values, like), codegen


@intrinsic
def lane_count(typingctx, like):
    """Number of lanes that a load from ``like`` gives."""
    count = getattr(_lanes_of(like), "count", 1)

    def codegen(context, builder, sig, args):
        return ir.Constant(_SIZE, count)

    return types.intp(like), codegen


def _half(upper):
    @intrinsic
    def half(typingctx, lanes):
        if not isinstance(lanes, Lanes):
            return (
                lanes(lanes),
                lambda context, builder, sig, args: _constant(args[0].type, 0.0) if upper else args[0],
            )
        count = lanes.count // 2
        start = count if upper else 0

        def codegen(context, builder, sig, args):
            (vector,) = args
            if count == 1:
                return builder.extract_element(vector, _INDEX(start))
            picked = [_INDEX(i) for i in range(start, start + count)]
            undefined = ir.Constant(vector.type, ir.Undefined)
            mask = ir.Constant(ir.VectorType(_INDEX, count), picked)
            return builder.shuffle_vector(vector, undefined, mask)

        return _lanes(lanes.dtype, count)(lanes), codegen

    return half


# A float is its own lower half, and its upper half is 0.
lower_half = _half(upper=False)
upper_half = _half(upper=True)


@intrinsic
def max_lanes(typingctx, lanes):
    """Return the largest of all lanes, none of which may be NaN."""
    if not isinstance(lanes, Lanes):
        return lanes(lanes), lambda context, builder, sig, args: args[0]

    def codegen(context, builder, sig, args):
        element = args[0].type.element
        return _call(builder, "vector.reduce.fmax", element, args, fastmath=("nnan",))

    return lanes.dtype(lanes), codegen


# -- memory ---------------------------------------------------------------------------------------


@intrinsic
def as_contiguous(typingctx, array):
    """The same 1-d array under the type of a C-contiguous one, for a caller who knows that it is."""
    return array.copy(layout="C")(array), lambda context, builder, sig, args: args[0]


@intrinsic
def load(typingctx, array, index):
    """Entries ``index``, ``index + 1``, ... of a 1-d array, one for each lane."""
    lanes = _lanes_of(array)

    def codegen(context, builder, sig, args):
        llvm_type = _llvm_type(lanes)
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], llvm_type)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return lanes(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write the lanes to entries ``index``, ``index + 1``, ... of a 1-d array of the same layout."""

    def codegen(context, builder, sig, args):
        array, index, value = args
        pointer = _pointer(context, builder, sig.args[0], array, index, value.type)
        builder.store(value, pointer, align=sig.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


def _first_lanes(builder, count, llvm_type):
    """Mask of the lanes below ``count``."""
    indices = ir.VectorType(count.type, llvm_type.count)
    numbers = ir.Constant(indices, [count.type(i) for i in range(llvm_type.count)])
    return builder.icmp_unsigned("<", numbers, _splat(builder, count, indices))


@intrinsic
def load_first(typingctx, array, index, count, filler):
    """As `load`, but only the first ``count`` lanes; the others hold ``filler``."""
    lanes = _lanes_of(array)

    def codegen(context, builder, sig, args):
        array, index, count, filler = args
        llvm_type = _llvm_type(lanes)
        pointer = _pointer(context, builder, sig.args[0], array, index, llvm_type)
        if not isinstance(lanes, Lanes):
            return builder.load(pointer)
        mask = _first_lanes(builder, count, llvm_type)
        return _masked(builder, "load", llvm_type, [pointer, mask, filler], sig.args[0])

    return lanes(array, types.intp, types.intp, lanes), codegen


@intrinsic
def store_first(typingctx, array, index, count, value):
    """As `store`, but only the first ``count`` lanes."""

    def codegen(context, builder, sig, args):
        array, index, count, value = args
        pointer = _pointer(context, builder, sig.args[0], array, index, value.type)
        if isinstance(sig.args[3], Lanes):
            mask = _first_lanes(builder, count, value.type)
            _masked(builder, "store", ir.VoidType(), [value, pointer, mask], sig.args[0])
        else:
            builder.store(value, pointer)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, value), codegen


def _masked(builder, name, return_type, arguments, array_type):
    """Call llvm.masked.load(pointer, mask, filler) or llvm.masked.store(value, pointer, mask)."""
    at = next(i for i, argument in enumerate(arguments) if isinstance(argument.type, ir.PointerType))
    vector = return_type if name == "load" else arguments[0].type
    alignment = _INDEX(array_type.dtype.bitwidth // 8)
    arguments = [*arguments[: at + 1], alignment, *arguments[at + 1 :]]
    element = {"float": "f32", "double": "f64"}[str(vector.element)]
    function = get_or_insert_function(
        builder.module,
        ir.FunctionType(return_type, [argument.type for argument in arguments]),
        f"llvm.masked.{name}.v{vector.count}{element}.p0",
    )
    return builder.call(function, arguments)
