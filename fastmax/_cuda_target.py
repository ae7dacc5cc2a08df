"""What the CUDA kernels are made of: lanes, memory, exchange between threads; and how they are compiled.

Every import of numba-cuda is here. Kernels and the mathematics are plain Python over a few primitives, which
are called by name: `rebuilt` makes a copy of a function, and of all that it calls, in which these names stand
for CUDA's primitives. So `_math` is written once, and a simulator needs nothing but primitives of its own.

A float is a `Lanes` of count 1 here. Sums and products are the instructions that are rounded by themselves
(``add.rn``, ``mul.rn``): the compiler may contract all others to ``fma``, and then nothing is left of
error-free transformations.
"""

import contextlib
import importlib
import math
import operator
import re
import types as python_types
from typing import Any

from llvmlite import ir

from fastmax._math import LAW_WORDS, WITHOUT_TABLE
from fastmax._tracing import Jitted, Language, is_traced, kind_of

# Imported by name, for numba-cuda is found by a hook, of which a type checker knows nothing.
try:
    cuda: Any = importlib.import_module("numba.cuda")
    types: Any = importlib.import_module("numba.cuda.types")
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    extending: Any = importlib.import_module("numba.cuda.extending")
    templates: Any = importlib.import_module("numba.cuda.typing.templates")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "arrays on a GPU need numba-cuda: pip install 'fastmax[cuda13]', or 'fastmax[cuda12]', by the driver",
        name=error.name,
    ) from error
overload = extending.overload
models, register_model = extending.models, extending.register_model
_language = Language(templates, extending)
intrinsic, traced = _language.intrinsic, _language.traced

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_SCALAR = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: _I1}
_SUFFIX = {types.float32: "f", types.float64: "d"}
_EXPONENT_SHIFT = {types.float32: 23, types.float64: 52}
_GLOBAL, _SHARED = 1, 3  # address spaces

# How entries are stored: int16 stands for float16, uint16 for bfloat16, as in `_lanes`.
STORAGE = {
    "float16": types.int16,
    "bfloat16": types.uint16,
    "float32": types.float32,
    "float64": types.float64,
}


class Lanes(types.Type):
    """The type of ``count`` values of type ``dtype``."""

    def __init__(self, dtype, count):
        self.dtype = dtype
        self.count = count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm_type(fe_type))


class Slots(types.Type):
    """The type of an array in shared memory for values of one type, or for tuples of them."""

    def __init__(self, value):
        self.value = value
        super().__init__(name=f"Slots({value})")


@register_model(Slots)
class _SlotsModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.PointerType(_SCALAR[_fields(fe_type.value)[0].dtype], _SHARED))


class Tile(types.Type):
    """The type of an array in shared memory for entries as they are stored, whose size the launch gives."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Tile({dtype})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.PointerType(ir.IntType(fe_type.dtype.bitwidth), _SHARED))


def _llvm_type(lanes):
    return ir.VectorType(_SCALAR[lanes.dtype], lanes.count)


def _fields(value):
    """Types in a tuple of lanes; a value that is no tuple counts as one field."""
    return tuple(value) if isinstance(value, types.BaseTuple) else (value,)


def _each(builder, result, emit, *arguments):
    """Vector of what ``emit`` makes of each lane of the arguments."""
    vector = ir.Constant(result, ir.Undefined)
    for i in range(result.count):
        value = emit(*(builder.extract_element(argument, _I32(i)) for argument in arguments))
        vector = builder.insert_element(vector, value, _I32(i))
    return vector


def _only(builder, vector):
    """The value of a vector of one lane."""
    return builder.extract_element(vector, _I32(0))


def _call(builder, name, result, *arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


def _rounded(builder, name, *arguments):
    """Call an arithmetic instruction that is rounded to nearest and never contracted."""
    suffix = "f" if isinstance(arguments[0].type, ir.FloatType) else "d"
    return _call(builder, f"llvm.nvvm.{name}.rn.{suffix}", arguments[0].type, *arguments)


def _negated(builder, value):
    """-value; the LLVM of libNVVM knows no fneg."""
    return builder.fsub(ir.Constant(value.type, -0.0), value)


def _asm(builder, result, code, constraints, *arguments, effect=False):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.asm(function_type, code, constraints, arguments, effect)


# -- arithmetic and comparison, as operators ------------------------------------------------------


def _define_operator(function, emit, result):
    @templates.infer_global(function)
    class _Template(templates.AbstractTemplate):
        def generic(self, args, kws):
            if not kws and isinstance(args[0], Lanes) and all(arg == args[0] for arg in args):
                return templates.signature(result(args[0]), *args)
            return None

    def lower(context, builder, sig, args):
        value = _each(
            builder,
            ir.VectorType(_SCALAR[getattr(sig.return_type, "dtype", types.boolean)], args[0].type.count),
            lambda *lanes: emit(builder, *lanes),
            *args,
        )
        return value if isinstance(sig.return_type, Lanes) else _only(builder, value)

    arity = 1 if function in (operator.neg, abs) else 2
    extending.lower_builtin(function, *(Lanes,) * arity)(lower)


for _function, _emit in {
    operator.add: lambda builder, a, b: _rounded(builder, "add", a, b),
    operator.sub: lambda builder, a, b: _rounded(builder, "add", a, _negated(builder, b)),
    operator.mul: lambda builder, a, b: _rounded(builder, "mul", a, b),
    operator.truediv: lambda builder, a, b: _rounded(builder, "div", a, b),
    operator.neg: lambda builder, a: _negated(builder, a),
    abs: lambda builder, a: _call(
        builder, "llvm.nvvm.fabs.f" if isinstance(a.type, ir.FloatType) else "llvm.nvvm.fabs.d", a.type, a
    ),
}.items():
    _define_operator(_function, _emit, result=lambda lanes: lanes)

# As in IEEE 754, a comparison with NaN is False. That of single lanes is a condition for an ``if``.
for _function, _name in {
    operator.lt: "<",
    operator.gt: ">",
    operator.le: "<=",
    operator.eq: "==",
}.items():
    _define_operator(
        _function,
        lambda builder, a, b, _name=_name: builder.fcmp_ordered(_name, a, b),
        result=lambda lanes: types.boolean if lanes.count == 1 else Lanes(types.boolean, lanes.count),
    )


@intrinsic
def _is_nan(typingctx, x):
    def codegen(context, builder, sig, args):
        value = _only(builder, args[0])
        return builder.fcmp_unordered("uno", value, value)

    return types.boolean(x), codegen


@overload(math.isnan)
def _isnan(x):
    return (lambda x: _is_nan(x)) if isinstance(x, Lanes) else None


@intrinsic
def select(typingctx, condition, yes, no):
    """``yes`` where the condition holds, else ``no``."""

    def codegen(context, builder, sig, args):
        condition, yes, no = args
        if isinstance(condition.type, ir.VectorType):
            return _each(builder, yes.type, builder.select, condition, yes, no)
        return builder.select(condition, yes, no)

    return yes(condition, yes, yes), codegen


@intrinsic
def larger(typingctx, x, y):
    """The larger of two, or the one that is not NaN: one instruction for float32."""

    def codegen(context, builder, sig, args):
        suffix = _SUFFIX[x.dtype]
        return _each(
            builder,
            args[0].type,
            lambda *pair: _call(builder, f"llvm.nvvm.fmax.{suffix}", pair[0].type, *pair),
            *args,
        )

    return x(x, x), codegen


MAXIMUM_WITH_NAN_FROM = (8, 0)  # compute capability


@intrinsic
def at_least(typingctx, x, lowest):
    """The larger of two, NaN if x is: one instruction for float32."""

    def emit(builder, x, lowest):
        if isinstance(x.type, ir.DoubleType):
            return builder.select(builder.fcmp_ordered(">", lowest, x), lowest, x)
        return _asm(builder, x.type, "max.NaN.f32 $0, $1, $2;", "=f,f,f", x, lowest)

    def codegen(context, builder, sig, args):
        return _each(builder, args[0].type, lambda *pair: emit(builder, *pair), *args)

    return x(x, x), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, rounded once."""

    def codegen(context, builder, sig, args):
        if isinstance(args[0].type, ir.VectorType):
            return _each(builder, args[0].type, lambda *lanes: _rounded(builder, "fma", *lanes), *args)
        return _rounded(builder, "fma", *args)

    return a(a, a, a), codegen


@intrinsic
def power_of_two(typingctx, exponent):
    """Power of two whose exponent field stands in the low bits of a float."""

    def codegen(context, builder, sig, args):
        integer = ir.IntType(exponent.dtype.bitwidth)
        shift = integer(_EXPONENT_SHIFT[exponent.dtype])

        def emit(value):
            return builder.bitcast(builder.shl(builder.bitcast(value, integer), shift), value.type)

        return _each(builder, args[0].type, emit, args[0])

    return exponent(exponent), codegen


def _constant(builder, value, llvm_type):
    """A float64 known to the compiler, rounded to the type of the lanes of a vector, in each of them."""
    if value.type != llvm_type.element:
        value = builder.fptrunc(value, llvm_type.element)
    return _each(builder, llvm_type, lambda: value)


@intrinsic
def polynomial(typingctx, x, coefficients):
    """Polynomial in ``x`` by Horner's rule; ``coefficients`` = (float32's, float64's), lowest first."""
    precision = {types.float32: 0, types.float64: 1}[x.dtype]

    def codegen(context, builder, sig, args):
        x, pairs = args
        own = builder.extract_value(pairs, precision)
        count = len(sig.args[1][precision])
        values = [_constant(builder, builder.extract_value(own, i), x.type) for i in range(count)]
        result = values[-1]
        for value in values[-2::-1]:
            result = _each(builder, x.type, lambda *lanes: _rounded(builder, "fma", *lanes), result, x, value)
        return result

    return x(x, coefficients), codegen


@intrinsic
def exp2(typingctx, x):
    """2**x within 2 ulp for float32, by one instruction; 0 where that is subnormal."""

    def codegen(context, builder, sig, args):
        return _each(
            builder,
            args[0].type,
            lambda value: _call(builder, "llvm.nvvm.ex2.approx.ftz.f", value.type, value),
            args[0],
        )

    return x(x), codegen


@intrinsic
def first_inverse(typingctx, x):
    """1 / x, of float32 within an ulp, for normal numbers far from the ends of the exponent range."""

    def emit(builder, value):
        if isinstance(value.type, ir.DoubleType):
            return _rounded(builder, "div", ir.Constant(value.type, 1.0), value)
        return _asm(builder, value.type, "rcp.approx.ftz.f32 $0, $1;", "=f,f", value)

    def codegen(context, builder, sig, args):
        return _each(builder, args[0].type, lambda value: emit(builder, value), args[0])

    return x(x), codegen


@intrinsic
def log1p(typingctx, x):
    """log(1 + x) of a single lane."""
    name = {types.float32: "__nv_log1pf", types.float64: "__nv_log1p"}[x.dtype]

    def codegen(context, builder, sig, args):
        return _each(builder, args[0].type, lambda value: _call(builder, name, value.type, value), args[0])

    return x(x), codegen


# -- from numbers to lanes and back ---------------------------------------------------------------


@intrinsic
def spread(typingctx, value, like):
    """``value``, a number or a single lane, in every lane of the type of ``like``, which may be a number."""

    def codegen(context, builder, sig, args):
        if isinstance(like, types.Float):
            return context.cast(builder, args[0], sig.args[0], like)
        result = _llvm_type(like)
        if sig.args[0] == like:
            return args[0]
        if isinstance(sig.args[0], Lanes):
            single = _only(builder, args[0])
        else:
            single = context.cast(builder, args[0], sig.args[0], like.dtype)
        return _each(builder, result, lambda: single)

    return like(value, like), codegen


@intrinsic
def constant(typingctx, values, like):
    """The one of the two constants (for float32, for float64) that belongs to the dtype of ``like``."""
    precision = {types.float32: 0, types.float64: 1}[like.dtype]

    def codegen(context, builder, sig, args):
        return _constant(builder, builder.extract_value(args[0], precision), _llvm_type(like))

    return like(values, like), codegen


@intrinsic
def as_number(typingctx, x):
    """The number that is a single lane; a number stands for itself."""
    if not isinstance(x, Lanes):
        return x(x), lambda context, builder, sig, args: args[0]
    return x.dtype(x), lambda context, builder, sig, args: _only(builder, args[0])


@overload(float)
def _float(x):
    return (lambda x: as_number(x)) if isinstance(x, Lanes) else None


@overload(int)
def _int(x):
    return (lambda x: int(as_number(x))) if isinstance(x, Lanes) else None


def _half(upper):
    @intrinsic
    def half(typingctx, lanes):
        count = lanes.count // 2
        start = count if upper else 0

        def codegen(context, builder, sig, args):
            result = ir.Constant(ir.VectorType(args[0].type.element, count), ir.Undefined)
            for i in range(count):
                value = builder.extract_element(args[0], _I32(start + i))
                result = builder.insert_element(result, value, _I32(i))
            return result

        return Lanes(lanes.dtype, count)(lanes), codegen

    return half


lower_half = _half(upper=False)
upper_half = _half(upper=True)


# -- tuples of lanes ------------------------------------------------------------------------------


def lane_count(lanes) -> int:
    """Number of lanes, which is known when code is traced."""
    kind: Any = kind_of(lanes)
    return kind.count


@intrinsic
def singles(typingctx, state):
    """The lanes of all fields, as a tuple of single lanes."""
    count = len(state) * state[0].count
    result = types.UniTuple(Lanes(state[0].dtype, 1), count)

    def codegen(context, builder, sig, args):
        values = []
        for i in range(len(state)):
            vector = builder.extract_value(args[0], i)
            values += [
                _vector(builder, [builder.extract_element(vector, _I32(j))]) for j in range(state[0].count)
            ]
        return context.make_tuple(builder, result, values)

    return result(state), codegen


@intrinsic
def together(typingctx, values, like):
    """What `singles` was given, from its result."""

    def codegen(context, builder, sig, args):
        count = like[0].count
        lanes = [_only(builder, builder.extract_value(args[0], i)) for i in range(len(like) * count)]
        fields = [_vector(builder, lanes[i : i + count]) for i in range(0, len(lanes), count)]
        return context.make_tuple(builder, like, fields)

    return like(values, like), codegen


@intrinsic
def everywhere(typingctx, flags):
    """Whether a condition holds in all lanes."""

    def codegen(context, builder, sig, args):
        result = _I1(1)
        if not isinstance(args[0].type, ir.VectorType):
            return args[0]
        for i in range(args[0].type.count):
            result = builder.and_(result, builder.extract_element(args[0], _I32(i)))
        return result

    return types.boolean(flags), codegen


@intrinsic
def small(typingctx, i):
    """A number in 32 bits, which take half the instructions."""
    return types.int32(types.int64), lambda context, builder, sig, args: builder.trunc(args[0], _I32)


@intrinsic
def further(typingctx, i, step):
    """``i + step`` in 32 bits."""

    def codegen(context, builder, sig, args):
        return builder.add(args[0], builder.trunc(args[1], _I32))

    return types.int32(types.int32, types.int64), codegen


# -- types of arguments ---------------------------------------------------------------------------

INTEGER = types.int64


def pointer(dtype):
    """Type of a pointer to entries, or to the bytes of a mask."""
    return types.CPointer(types.uint8 if dtype == "bool" else STORAGE[dtype])


def work_name(dtype):
    """Name of the dtype in which entries are computed."""
    return "float64" if dtype == "float64" else "float32"


def board_pointer():
    """Type of a pointer to what blocks tell each other."""
    return types.CPointer(types.int64)


def law_type(dtype):
    """Type of a law that comes with the launch."""
    return types.UniTuple(STORAGE[work_name(dtype)], LAW_WORDS)


def integers(count):
    """Type of a tuple of integers."""
    return types.UniTuple(INTEGER, count)


def tuples(entry):
    """Type of (sizes, strides of x, of out, of the mask)."""
    return types.UniTuple(entry, 4)


# -- entries in memory ----------------------------------------------------------------------------


def _work_dtype(storage):
    return types.float64 if storage == types.float64 else types.float32


def _address(builder, pointer, index, llvm_type):
    """Address of entry ``index`` as a pointer to ``llvm_type``."""
    address = builder.gep(pointer, [index])
    if address.type.addrspace not in (_GLOBAL, _SHARED):
        address = builder.addrspacecast(address, ir.PointerType(address.type.pointee, _GLOBAL))
    return builder.bitcast(address, ir.PointerType(llvm_type, address.type.addrspace))


def _read(builder, storage, pointer, index, count):
    """``count`` entries from one access, as a list of floats."""
    if storage.bitwidth > 16:
        vector = ir.VectorType(_SCALAR[storage], count)
        value = builder.load(_address(builder, pointer, index, vector), align=count * storage.bitwidth // 8)
        return [builder.extract_element(value, _I32(i)) for i in range(count)]
    if count == 1:
        bits = [builder.load(_address(builder, pointer, index, _I16), align=2)]
    else:
        # Words of two entries, as an access of more than 4 numbers is split.
        vector = ir.VectorType(_I32, count // 2)
        value = builder.load(_address(builder, pointer, index, vector), align=2 * count)
        words = [builder.extract_element(value, _I32(i)) for i in range(count // 2)]
        if storage == types.uint16:
            halves = [
                half
                for word in words
                for half in (builder.shl(word, _I32(16)), builder.and_(word, _I32(0xFFFF0000)))
            ]
            return [builder.bitcast(half, ir.FloatType()) for half in halves]
        bits = [builder.trunc(half, _I16) for word in words for half in (word, builder.lshr(word, _I32(16)))]
    if storage == types.uint16:
        return [
            builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), ir.FloatType())
            for value in bits
        ]
    return [builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType()) for value in bits]


def _write(builder, storage, pointer, index, values):
    """Entries by one access, each rounded to nearest, ties to even."""
    count = len(values)
    if storage.bitwidth > 16:
        vector = ir.Constant(ir.VectorType(_SCALAR[storage], count), ir.Undefined)
        for i, value in enumerate(values):
            vector = builder.insert_element(vector, value, _I32(i))
        align = count * storage.bitwidth // 8
        builder.store(vector, _address(builder, pointer, index, vector.type), align=align)
        return
    name = "bf16" if storage == types.uint16 else "f16"
    if count == 1:
        bits = _asm(builder, _I16, f"cvt.rn.{name}.f32 $0, $1;", "=h,f", values[0])
        builder.store(bits, _address(builder, pointer, index, _I16), align=2)
        return
    vector = ir.Constant(ir.VectorType(_I32, count // 2), ir.Undefined)
    for i in range(count // 2):
        pair = values[2 * i + 1], values[2 * i]
        word = _asm(builder, _I32, f"cvt.rn.{name}x2.f32 $0, $1, $2;", "=r,f,f", *pair)
        vector = builder.insert_element(vector, word, _I32(i))
    builder.store(vector, _address(builder, pointer, index, vector.type), align=2 * count)


def _named(*arguments) -> Any:
    """What stands for a primitive that is made for each kernel, until it is."""
    raise NotImplementedError(arguments)


load = store = peek = keep = slots = slots_of_cluster = _named


def loader(lanes, access, whole=False):
    """Make the `load` of a kernel: so many lanes by accesses of so many entries; -inf from stop on.

    If only ``whole`` pieces are read, others, which may begin before entry 0, become -inf.
    """

    @intrinsic
    def load(typingctx, pointer, base, stride, first, step, stop):
        storage = pointer.dtype
        dtype = _work_dtype(storage)

        def codegen(context, builder, sig, args):
            pointer, base, stride, first, step, stop = args
            lowest = ir.Constant(_SCALAR[dtype], float("-inf"))
            vector = ir.Constant(ir.VectorType(_SCALAR[dtype], lanes), [float("-inf")] * lanes)
            if whole:
                before = builder.basic_block
                with builder.if_then(_is_whole(builder, first, stop, lanes)):
                    index = builder.add(base, first)
                    found = _vector(builder, _read(builder, storage, pointer, index, lanes))
                    inside = builder.basic_block
                result = builder.phi(vector.type)
                result.add_incoming(vector, before)
                result.add_incoming(found, inside)
                return result
            last = builder.sub(stop, _I64(access))
            values = []
            for _ in range(lanes // access):
                inside = builder.icmp_signed("<", first, stop)
                index = builder.select(inside, first, last)
                index = builder.add(base, builder.mul(index, stride))
                entries = _read(builder, storage, pointer, index, access)
                values += [builder.select(inside, entry, lowest) for entry in entries]
                first = builder.add(first, step)
            return _vector(builder, values)

        return Lanes(dtype, lanes)(pointer, *(types.int64,) * 5), codegen

    return load


def _vector(builder, values):
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        vector = builder.insert_element(vector, value, _I32(i))
    return vector


def _is_whole(builder, first, stop, lanes):
    """Whether all entries of a piece are of the row."""
    first, stop = builder.trunc(first, _I32), builder.trunc(stop, _I32)
    return builder.and_(
        builder.icmp_signed(">=", first, _I32(0)),
        builder.icmp_signed("<=", builder.add(first, _I32(lanes)), stop),
    )


def storer(lanes, access, whole=False):
    """Make the `store` of a kernel: so many lanes by accesses of so many entries, before stop.

    If only ``whole`` pieces are written, others are left out.
    """

    @intrinsic
    def store(typingctx, pointer, base, stride, first, step, stop, value):
        def codegen(context, builder, sig, args):
            pointer, base, stride, first, step, stop, vector = args
            for at in range(0, lanes, access):
                inside = builder.icmp_signed("<", first, stop)
                if whole:
                    inside = _is_whole(builder, first, stop, lanes)
                with builder.if_then(inside):
                    index = builder.add(base, builder.mul(first, stride))
                    values = [builder.extract_element(vector, _I32(at + i)) for i in range(access)]
                    _write(builder, sig.args[0].dtype, pointer, index, values)
                first = builder.add(first, step)
            return context.get_dummy_value()

        return types.none(pointer, *(types.int64,) * 5, value), codegen

    return store


def _part(builder, first, stop, lanes):
    """Which entries of a piece lie between 0 and stop, and whether some do and others do not."""
    first, stop = builder.trunc(first, _I32), builder.trunc(stop, _I32)
    places = [builder.add(first, _I32(i)) for i in range(lanes)]
    inside = [builder.icmp_unsigned("<", place, stop) for place in places]
    some = builder.and_(
        builder.icmp_signed("<", first, stop),
        builder.icmp_signed(">", builder.add(first, _I32(lanes)), _I32(0)),
    )
    return inside, builder.and_(some, builder.not_(builder.and_(inside[0], inside[-1])))


@intrinsic
def load_part(typingctx, pointer, base, first, stop, value):
    """Lanes, of which those between entries 0 and stop are read anew if others are not."""

    def codegen(context, builder, sig, args):
        pointer, base, first, stop, vector = args
        lanes = vector.type.count
        inside, is_part = _part(builder, first, stop, lanes)
        before = builder.basic_block
        with builder.if_then(is_part):
            values = []
            for i in range(lanes):
                at = builder.select(inside[i], builder.add(first, _I64(i)), _I64(0))
                (own,) = _read(builder, sig.args[0].dtype, pointer, builder.add(base, at), 1)
                values.append(builder.select(inside[i], own, builder.extract_element(vector, _I32(i))))
            found = _vector(builder, values)
            within = builder.basic_block
        result = builder.phi(vector.type)
        result.add_incoming(vector, before)
        result.add_incoming(found, within)
        return result

    return value(pointer, types.int64, types.int64, types.int64, value), codegen


@intrinsic
def store_part(typingctx, pointer, base, first, stop, value):
    """Write the lanes between entries 0 and stop, if others are not."""

    def codegen(context, builder, sig, args):
        pointer, base, first, stop, vector = args
        lanes = vector.type.count
        inside, is_part = _part(builder, first, stop, lanes)
        with builder.if_then(is_part):
            for i in range(lanes):
                with builder.if_then(inside[i]):
                    own = builder.extract_element(vector, _I32(i))
                    index = builder.add(base, builder.add(first, _I64(i)))
                    _write(builder, sig.args[0].dtype, pointer, index, [own])
        return context.get_dummy_value()

    return types.none(pointer, types.int64, types.int64, types.int64, value), codegen


@intrinsic
def load_one(typingctx, pointer, index):
    """Entry ``index`` as a single lane."""
    dtype = _work_dtype(pointer.dtype)

    def codegen(context, builder, sig, args):
        pointer, index = args
        (value,) = _read(builder, sig.args[0].dtype, pointer, index, 1)
        return _each(builder, ir.VectorType(value.type, 1), lambda: value)

    return Lanes(dtype, 1)(pointer, types.int64), codegen


@intrinsic
def store_one(typingctx, pointer, index, value):
    """Write entry ``index`` from a single lane."""

    def codegen(context, builder, sig, args):
        pointer, index, value = args
        _write(builder, sig.args[0].dtype, pointer, index, [_only(builder, value)])
        return context.get_dummy_value()

    return types.none(pointer, types.int64, value), codegen


@intrinsic
def store_lanes(typingctx, pointer, index, value):
    """Write 128 bits, from entry ``index`` on, which is aligned."""

    def codegen(context, builder, sig, args):
        pointer, index, vector = args
        values = [builder.extract_element(vector, _I32(i)) for i in range(vector.type.count)]
        _write(builder, sig.args[0].dtype, pointer, index, values)
        return context.get_dummy_value()

    return types.none(pointer, types.int64, value), codegen


@intrinsic
def byte(typingctx, pointer, index):
    """Byte ``index`` of a mask."""

    def codegen(context, builder, sig, args):
        value = builder.load(_address(builder, args[0], args[1], ir.IntType(8)), align=1)
        return builder.zext(value, _I64)

    return types.int64(pointer, types.int64), codegen


@intrinsic
def number(typingctx, pointer, index):
    """Entry ``index``, a temperature, as a float64."""

    def codegen(context, builder, sig, args):
        pointer, index = args
        (value,) = _read(builder, sig.args[0].dtype, pointer, index, 1)
        return value if value.type == ir.DoubleType() else builder.fpext(value, ir.DoubleType())

    return types.float64(pointer, types.int64), codegen


@intrinsic
def as_lanes(typingctx, values):
    """Numbers of a tuple as a tuple of single lanes."""
    lanes = Lanes(values.dtype, 1)
    result = types.UniTuple(lanes, len(values))

    def codegen(context, builder, sig, args):
        numbers = [builder.extract_value(args[0], i) for i in range(len(values))]
        vector = ir.VectorType(_SCALAR[values.dtype], 1)
        return context.make_tuple(
            builder, result, [_each(builder, vector, lambda number=number: number) for number in numbers]
        )

    return result(values), codegen


# -- threads and what they exchange ---------------------------------------------------------------


def _register(name):
    """A special register as an int64."""

    @intrinsic
    def read(typingctx):
        def codegen(context, builder, sig, args):
            return builder.zext(_asm(builder, _I32, f"mov.u32 $0, %{name};", "=r"), _I64)

        return types.int64(), codegen

    return read


thread = _register("tid.x")
block = part = _register("ctaid.x")
block_y = _register("ctaid.y")
blocks_of_grid = _register("nctaid.x")


@intrinsic
def barrier(typingctx):
    """Wait for all threads of the block."""

    def codegen(context, builder, sig, args):
        _call(builder, "llvm.nvvm.barrier0", ir.VoidType())
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def anyone_in_block(typingctx, flag):
    """Whether the flag of any thread of the block is set; a barrier."""

    def codegen(context, builder, sig, args):
        result = _call(builder, "llvm.nvvm.barrier0.or", _I32, builder.zext(args[0], _I32))
        return builder.icmp_signed("!=", result, _I32(0))

    return types.boolean(types.boolean), codegen


def _words(builder, value):
    """A float as 32-bit integers."""
    if isinstance(value.type, ir.FloatType):
        return [builder.bitcast(value, _I32)]
    bits = builder.bitcast(value, _I64)
    return [builder.trunc(bits, _I32), builder.trunc(builder.lshr(bits, _I64(32)), _I32)]


def _from_words(builder, words, llvm_type):
    if len(words) == 1:
        return builder.bitcast(words[0], llvm_type)
    low, high = (builder.zext(word, _I64) for word in words)
    return builder.bitcast(builder.or_(low, builder.shl(high, _I64(32))), llvm_type)


def _shuffle(mode, describe):
    @intrinsic
    def shuffle(typingctx, state, mask, number):
        def codegen(context, builder, sig, args):
            state, mask, number = args
            mask, number = builder.trunc(mask, _I32), builder.trunc(number, _I32)
            result = []
            for i in range(len(sig.return_type)):
                vector = builder.extract_value(state, i)
                words = []
                for word in _words(builder, _only(builder, vector)):
                    pair = _call(
                        builder,
                        "llvm.nvvm.shfl.sync.i32",
                        ir.LiteralStructType([_I32, _I1]),
                        *(mask, _I32(mode), word, number, _I32(31)),
                    )
                    words.append(builder.extract_value(pair, 0))
                value = _from_words(builder, words, vector.type.element)
                result.append(_each(builder, vector.type, lambda value=value: value))
            return context.make_tuple(builder, sig.return_type, result)

        return state(state, types.int64, types.int64), codegen

    shuffle.__doc__ = describe
    return shuffle


shuffle = _shuffle(3, "The state, a tuple of single lanes, of the lane whose number differs by a bit.")
shuffle_from = _shuffle(0, "The state of the lane of a number.")


def slots_for(count):
    """Make the `slots` of a kernel: room for so many states in shared memory, each call with its own."""

    @intrinsic
    def slots(typingctx, state):
        def codegen(context, builder, sig, args):
            fields = _fields(state)
            element = _SCALAR[fields[0].dtype]
            array = ir.ArrayType(element, count * len(fields))
            name = builder.module.get_unique_name(f"{builder.function.name}.slots")
            memory: Any = ir.GlobalVariable(builder.module, array, name, _SHARED)
            memory.linkage = "internal"
            memory.initializer = ir.Constant(array, ir.Undefined)
            memory.align = 16
            return builder.bitcast(memory, ir.PointerType(element, _SHARED))

        return Slots(state)(state), codegen

    return slots


@intrinsic
def put(typingctx, slots, index, state):
    """Write state ``index``, a tuple of single lanes."""

    def codegen(context, builder, sig, args):
        slots, index, state = args
        count = len(sig.args[2])
        for i in range(count):
            at = builder.add(builder.mul(index, _I64(count)), _I64(i))
            builder.store(_only(builder, builder.extract_value(state, i)), builder.gep(slots, [at]))
        return context.get_dummy_value()

    return types.none(slots, types.int64, state), codegen


@intrinsic
def get(typingctx, slots, index):
    """Read state ``index``."""
    state = slots.value

    def codegen(context, builder, sig, args):
        slots, index = args
        count = len(state)
        values = []
        for i in range(count):
            at = builder.add(builder.mul(index, _I64(count)), _I64(i))
            value = builder.load(builder.gep(slots, [at]))
            values.append(_each(builder, ir.VectorType(value.type, 1), lambda value=value: value))
        return context.make_tuple(builder, state, values)

    return state(slots, types.int64), codegen


@intrinsic
def put_in(typingctx, slots, index, state, other):
    """Write state ``index`` in the shared memory of another block of the cluster."""

    def codegen(context, builder, sig, args):
        slots, index, state, other = args
        count = len(sig.args[2])
        first = builder.ptrtoint(builder.gep(slots, [builder.mul(index, _I64(count))]), _I32)
        code = "mapa.shared::cluster.u32 $0, $1, $2;"
        there = _asm(builder, _I32, code, "=r,r,r", first, builder.trunc(other, _I32))
        for i in range(count):
            value = _only(builder, builder.extract_value(state, i))
            is_single = isinstance(value.type, ir.FloatType)
            size, kind = (4, "f") if is_single else (8, "d")
            code = f"st.shared::cluster.f{8 * size} [$0], $1;"
            at = builder.add(there, _I32(size * i))
            _asm(builder, ir.VoidType(), code, f"r,{kind},~{{memory}}", at, value, effect=True)
        return context.get_dummy_value()

    return types.none(slots, types.int64, state, types.int64), codegen


# -- what blocks that share a slice tell each other, by way of global memory ---------------------------
# All of them run at once, as the launch is cooperative. With each 32 bits, 32 others say to which exchange
# they belong, so what is read is known to be there, and no counter or fence takes its time.


def _told(builder, state, pointer, index):
    """Addresses of the 64 bits for each word of a state."""
    words = sum(field.dtype.bitwidth // 32 for field in state)
    first = builder.ptrtoint(builder.gep(pointer, [index]), _I64)
    return [builder.add(first, _I64(8 * i)) for i in range(words)]


@intrinsic
def tell(typingctx, board, index, number, state):
    """Leave a tuple of single lanes, from word ``index`` on, for the exchange of a number, which is not 0."""

    def codegen(context, builder, sig, args):
        board, index, number, state = args
        fields = [_only(builder, builder.extract_value(state, i)) for i in range(len(sig.args[3]))]
        words = [word for field in fields for word in _words(builder, field)]
        for word, at in zip(words, _told(builder, sig.args[3], board, index), strict=True):
            both = builder.or_(builder.zext(word, _I64), builder.shl(number, _I64(32)))
            code = "st.relaxed.gpu.global.u64 [$0], $1;"
            _asm(builder, ir.VoidType(), code, "l,l,~{memory}", at, both, effect=True)
        return context.get_dummy_value()

    return types.none(board, types.int64, types.int64, state), codegen


@intrinsic
def hear(typingctx, board, index, number, like):
    """State from word ``index`` on of the exchange of a number, as soon as it is there."""

    def codegen(context, builder, sig, args):
        board, index, number, _ = args
        places = _told(builder, sig.return_type, board, index)
        number = builder.trunc(number, _I32)
        loop, done = builder.append_basic_block("hear"), builder.append_basic_block("heard")
        builder.branch(loop)
        builder.position_at_end(loop)
        code = "ld.relaxed.gpu.global.u64 $0, [$1];"
        found = [_asm(builder, _I64, code, "=l,l,~{memory}", at, effect=True) for at in places]
        known = _I1(1)
        for both in found:
            own = builder.trunc(builder.lshr(both, _I64(32)), _I32)
            known = builder.and_(known, builder.icmp_signed("==", own, number))
        builder.cbranch(known, done, loop)
        builder.position_at_end(done)
        words = [builder.trunc(both, _I32) for both in found]
        values = []
        for field in sig.return_type:
            own = [words.pop(0) for _ in range(field.dtype.bitwidth // 32)]
            value = _from_words(builder, own, _SCALAR[field.dtype])
            values.append(_each(builder, _llvm_type(field), lambda value=value: value))
        return context.make_tuple(builder, sig.return_type, values)

    return like(board, types.int64, types.int64, like), codegen


# -- entries in shared memory as they are stored: `load`, `store`, `load_one`, `store_one` take them too -----


@intrinsic
def tile_for(typingctx, pointer):
    """Shared memory for entries like those of a pointer; the launch gives its size."""

    def codegen(context, builder, sig, args):
        name = "fastmax_tile"
        memory: Any = builder.module.globals.get(name)
        if memory is None:
            memory = ir.GlobalVariable(builder.module, ir.ArrayType(ir.IntType(8), 0), name, _SHARED)
            memory.linkage = "external"
            memory.align = 16
        return builder.bitcast(memory, context.get_value_type(sig.return_type))

    return Tile(pointer.dtype)(pointer), codegen


def _copier(in_background, hint=""):
    @intrinsic
    def copy_in(typingctx, tile, at, pointer, index, count):
        """Begin to copy 128 bits, or those of the first ``count`` entries, if any; both are aligned."""
        size = pointer.dtype.bitwidth // 8

        def codegen(context, builder, sig, args):
            tile, at, pointer, index, count = args
            at, count = builder.trunc(at, _I32), builder.trunc(count, _I32)
            words = ir.VectorType(_I32, 4)
            most = _I32(16 // size)
            if in_background:
                with builder.if_then(builder.icmp_signed(">", count, _I32(0))):
                    count = builder.select(builder.icmp_signed("<", count, most), count, most)
                    to = builder.ptrtoint(_address(builder, tile, at, words), _I32)
                    source = builder.ptrtoint(_address(builder, pointer, index, words), _I64)
                    code = f"cp.async.cg.shared.global{hint} [$0], [$1], 16, $2;"
                    there = builder.mul(count, _I32(size))
                    _asm(builder, ir.VoidType(), code, "r,l,r,~{memory}", to, source, there, effect=True)
                return context.get_dummy_value()
            _copy_part(builder, size, (tile, _I32, at), (pointer, _I64, index), lambda i: [(_I32(i), count)])
            return context.get_dummy_value()

        return types.none(tile, types.int64, pointer, types.int64, types.int64), codegen

    return copy_in


def _copy_part(builder, size, to, source, there):
    """Copy 128 bits, or those entries of them for which the first of all pairs ``there`` are smaller."""

    def move(offset, kind, align):
        pointer, integer, at = source
        value = builder.load(_address(builder, pointer, builder.add(at, integer(offset)), kind), align=align)
        pointer, integer, at = to
        builder.store(value, _address(builder, pointer, builder.add(at, integer(offset)), kind), align=align)

    def holds(i):
        result = _I1(1)
        for low, high in there(i):
            result = builder.and_(result, builder.icmp_signed("<", low, high))
        return result

    count = 16 // size
    with builder.if_else(builder.and_(holds(0), holds(count - 1))) as (then, otherwise):
        with then:
            move(0, ir.VectorType(_I32, 4), 16)
        with otherwise:
            for i in range(count):
                with builder.if_then(holds(i)):
                    move(i, ir.IntType(8 * size), size)


copy_in, copy_in_at_once = _copier(True), _copier(False)
# For lines of which others will soon want the neighbours, which are read from memory along with them.
copy_in_with_neighbours = _copier(True, ".L2::256B")
COPIES_FROM = (8, 0)  # compute capability that copies to shared memory in the background


@intrinsic
def copy_out(typingctx, tile, at, pointer, base, first, stop):
    """Copy 128 bits of a tile to ``base + at`` on, or those of the entries first to stop."""
    size = pointer.dtype.bitwidth // 8

    def codegen(context, builder, sig, args):
        tile, at, pointer, base, first, stop = args
        index = builder.add(base, at)
        at, first, stop = (builder.trunc(value, _I32) for value in (at, first, stop))

        def there(i):
            own = builder.add(at, _I32(i))
            return (builder.sub(first, _I32(1)), own), (own, stop)

        _copy_part(builder, size, (pointer, _I64, index), (tile, _I32, at), there)
        return context.get_dummy_value()

    return types.none(tile, types.int64, pointer, *(types.int64,) * 3), codegen


def _effect(code):
    """An instruction that orders memory."""

    @intrinsic
    def run(typingctx):
        def codegen(context, builder, sig, args):
            _asm(builder, ir.VoidType(), code, "~{memory}", effect=True)
            return context.get_dummy_value()

        return types.none(), codegen

    return run


# What a thread has written before it arrives is there for all of its cluster that have waited for all.
arrive = _effect("barrier.cluster.arrive.release;")
await_all = _effect("barrier.cluster.wait.acquire;")
# Wait until what this thread began to copy is there, for this thread.
copies_done = _effect("cp.async.wait_all;")
# What it has begun since the last time is a group; wait until only so many groups are on their way.
commit = _effect("cp.async.commit_group;")
three_left, two_left, one_left = (_effect(f"cp.async.wait_group {count};") for count in (3, 2, 1))
nothing_to_wait_for = _effect("")  # where copies are done at once


def peeker(lanes, stride):
    """Make the `peek` of a kernel: lanes that lie so far apart in a tile, from an entry on."""

    @intrinsic
    def peek(typingctx, tile, at):
        dtype = _work_dtype(tile.dtype)

        def codegen(context, builder, sig, args):
            tile, at = args
            at = builder.trunc(at, _I32)
            if stride == 1:
                values = _read(builder, sig.args[0].dtype, tile, at, lanes)
            else:
                places = [builder.add(at, _I32(i * stride)) for i in range(lanes)]
                values = [_read(builder, sig.args[0].dtype, tile, place, 1)[0] for place in places]
            return _vector(builder, values)

        return Lanes(dtype, lanes)(tile, types.int64), codegen

    return peek


def keeper(lanes, stride):
    """Make the `keep` of a kernel: write lanes to where `peek` found them."""

    @intrinsic
    def keep(typingctx, tile, at, value):
        def codegen(context, builder, sig, args):
            tile, at, vector = args
            at = builder.trunc(at, _I32)
            values = [builder.extract_element(vector, _I32(i)) for i in range(lanes)]
            if stride == 1:
                _write(builder, sig.args[0].dtype, tile, at, values)
            else:
                for i, own in enumerate(values):
                    _write(builder, sig.args[0].dtype, tile, builder.add(at, _I32(i * stride)), [own])
            return context.get_dummy_value()

        return types.none(tile, types.int64, value), codegen

    return keep


# -- compilation ----------------------------------------------------------------------------------


def rebuilt(function, replaced, wrap, trace) -> Any:
    """Copy a function, and all that it calls, with other values for some of the names that they use.

    What ``replaced`` does not name keeps its value, but for functions: plain ones, and those that are jitted
    or traced for a CPU, are copied as well. ``wrap`` and, for those that are traced, ``trace`` make of a copy
    what its callers shall call.
    """
    copies = {}

    def copy(function):
        source = getattr(function, "py_func", function)
        if source not in copies:
            names = dict(source.__globals__)
            result = python_types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
            copies[source] = (trace if is_traced(function) else wrap)(result)
            for name in _names(source.__code__):
                if name in replaced or name in names:
                    value = replaced.get(name, names.get(name))
                    names[name] = copy(value) if _is_ours(value) else value
        return copies[source]

    return copy(function)


PRIMITIVES = {
    **WITHOUT_TABLE,
    "LIMITS_APART": False,
    "as_float64": as_number,
    "constant": constant,
    "exp2": exp2,
    "first_inverse": first_inverse,
    "fma": fma,
    "larger": larger,
    "log1p": log1p,
    "lower_half": lower_half,
    "polynomial": polynomial,
    "power_of_two": power_of_two,
    "select": select,
    "spread": spread,
    "upper_half": upper_half,
}


def _names(code):
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, python_types.CodeType):
            yield from _names(inner)


def _is_ours(value):
    """Whether a value is a function whose source can serve any target."""
    function = getattr(value, "py_func", value)
    return isinstance(function, python_types.FunctionType) and function.__module__ in (
        "fastmax._math",
        "fastmax._cuda_kernels",
    )


@contextlib.contextmanager
def _compiling_for(capability):
    """Let device functions be compiled for a given GPU instead of the one at hand, as kernels are."""
    usual = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = usual


def compile_kernel(name, function, replaced, arguments, capability, bounds):
    """PTX of a kernel under a short name, from the types of its arguments; no GPU is needed.

    ``bounds`` = (threads of a block, blocks that a multiprocessor shall hold).
    """
    if capability >= MAXIMUM_WITH_NAN_FROM:
        replaced = {**replaced, "at_least": at_least}
    if capability < COPIES_FROM:
        replaced = {**replaced, "copy_in": copy_in_at_once, "copies_done": nothing_to_wait_for}

    def wrap(copy):
        return copy if copy.__code__ is function.__code__ else Jitted(device(copy))

    device = cuda.jit(device=True, forceinline=True)
    with _compiling_for(capability):
        ptx, _ = cuda.compile(
            rebuilt(function, replaced, wrap, traced),
            types.void(*arguments),
            device=False,
            abi="numba",
            cc=capability,
            launch_bounds=bounds,
        )
    (entry,) = re.findall(r"\.visible \.entry (\w+)\(", ptx)
    ptx = re.sub(r"\.common \.global [^;]*_ZN08NumbaEnv[^;]*;\n", "", ptx)
    return ptx.replace(entry, name)


def assemble(ptx, capability):
    """Machine code (a cubin) from PTX, and the assembler's report.

    ImportError without nvJitLink; RuntimeError where it refuses, as one does that is older than the GPU or
    than libNVVM.
    """
    nvjitlink: Any = importlib.import_module("cuda.bindings.nvjitlink")
    try:
        linker = nvjitlink.create(2, [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose"])
    except (RuntimeError, OSError) as error:  # the bindings are there, the library is not
        raise ImportError("nvJitLink was not found") from error
    except nvjitlink.nvJitLinkError as error:
        raise RuntimeError(f"nvJitLink says: {error}") from error
    try:
        code = ptx.encode()
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(linker)
        report = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, report)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
    except nvjitlink.nvJitLinkError as error:
        raise RuntimeError(f"nvJitLink says: {error}") from error
    finally:
        nvjitlink.destroy(linker)
    return bytes(cubin), report.decode()
