"""Lanes: a SIMD vector as a value in Numba code.

Arithmetic on lanes is written as arithmetic on a float is, and one source serves both: a contiguous slice
is read many lanes at a time, a strided one entry by entry as plain floats. What runs is what is written: no
loop waits for the auto-vectoriser, no sum for leave to change its order.

A value fills two registers of AVX-512, four of AVX2 or NEON: their instructions are interleaved, which a
processor, looking 20 to 100 instructions ahead, cannot do with the long chain that makes one term. On Zen 4
with AVX-512 a float32 term costs 0.24 ns from two registers and 0.41 ns from one; on Zen 1 a float64 term
cost 3.9 ns from four and 5.4 from two, before `abreast` and the rest made it 3.1.

The lane type of an array is fixed by its type: C-contiguous arrays, and pointers into them, give lanes,
arrays of layout ``A`` give floats. Pointers are what loops over short rows use: an array that is passed or
sliced is counted by reference, with an atomic instruction.
"""

import math
import operator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import config, types
from numba.core.cgutils import for_range_slice, get_or_insert_function
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, overload, register_model
from numba.np.arrayobj import make_array, populate_array

from fastmax._jit import jit
from fastmax._tracing import intrinsic, kind_of, traced


def _register_bytes():
    """Size of a SIMD register of the processor that Numba compiles for: of AVX-512, AVX2, NEON or SSE."""
    if config.CPU_NAME or config.CPU_FEATURES:  # pyright: ignore[reportAttributeAccessIssue]
        chosen: Any = config.CPU_FEATURES or ""  # pyright: ignore[reportAttributeAccessIssue]
        has = {feature: f"+{feature}" in chosen for feature in ("avx512f", "avx2")}
    else:
        has = get_host_cpu_features()
    return 64 if has.get("avx512f") else 32 if has.get("avx2") else 16


def _second_cache_bytes():
    """Size of a core's second cache, as Linux tells it; elsewhere that of an older processor."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return 1024 * int(size.strip().removesuffix("K"))
    except (OSError, ValueError):
        return 2**19


REGISTER_BYTES = _register_bytes()
SECOND_CACHE_BYTES = _second_cache_bytes()
REGISTERS = 2 if REGISTER_BYTES == 64 else 4
LANE_BYTES = REGISTERS * REGISTER_BYTES

# Bytes of the smallest pages of memory, and of the lines of caches.
PAGE_BYTES = 4096
LINE_BYTES = 64

# Entries of the tables from which `make_table` picks, of float32 and of float64: as many as registers of
# AVX-512 hold and an instruction finds, as many as AVX2 finds within half a register, in one operation where
# a whole one takes two on AMD's processors, or two, which a mask tells apart.
TABLE_ENTRIES = {64: (16, 16), 32: (4, 2), 16: (2, 2)}[REGISTER_BYTES]
# Whether there is `fma_down`.
ROUNDS_DOWN = REGISTER_BYTES == 64

_COUNT = {types.float32: LANE_BYTES // 4, types.float64: LANE_BYTES // 8}
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


def _is_pair(array_type):
    """Whether entries come with a mask."""
    return isinstance(array_type, types.BaseTuple)


def _lanes_of(like: Any) -> Any:
    """The lane type of an array or pointer(s); a lane type or a float stands for itself."""
    if _is_pair(like):
        return _lanes_of(like[0])
    if not isinstance(like, types.CPointer | types.Array):
        return like
    dtype = types.float32 if like.dtype in (types.int16, types.uint16) else like.dtype
    one_by_one = isinstance(like, types.Array) and like.layout != "C"
    return _lanes(dtype, 1 if one_by_one else _COUNT[dtype])


def _register_count(dtype):
    """Number of lanes of a register."""
    return 8 * REGISTER_BYTES // dtype.bitwidth


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
    """Address of entry ``index`` of a 1-d array, or from a pointer, as a pointer to ``llvm_type``."""
    if isinstance(array_type, types.CPointer):
        return builder.bitcast(builder.gep(array, [index]), llvm_type.as_pointer())
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
        metadata: ClassVar = {"target": "cpu"}  # to be tried before all of Numba's own

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

_define_operator(operator.and_, lambda builder, a, b: builder.and_(a, b), result=lambda lanes: lanes)

# As in IEEE 754, a comparison with NaN is False, unless it is whether two numbers differ.
for _function, _name in {operator.lt: "<", operator.gt: ">", operator.eq: "==", operator.ne: "!="}.items():
    _define_operator(
        _function,
        lambda builder, a, b, _name=_name: (
            builder.fcmp_unordered(_name, a, b) if _name == "!=" else builder.fcmp_ordered(_name, a, b)
        ),
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
def fma_down(typingctx, a, b, c):
    """``a * b + c``, rounded down, which AVX-512 alone does in one instruction."""
    dtype = _dtype(a)

    def codegen(context, builder, sig, args):
        name = {types.float32: "ps", types.float64: "pd"}[dtype]
        register = ir.VectorType(_SCALAR[dtype], _register_count(dtype))
        function_type = ir.FunctionType(register, [register, register, register, _INDEX])
        function = get_or_insert_function(builder.module, function_type, f"llvm.x86.avx512.vfmadd.{name}.512")

        def downward(*factors):
            return builder.call(function, [*factors, _INDEX(_DOWNWARD)])

        return _by_registers(builder, downward, args, register.count)

    return a(a, a, a), codegen


# Rounding toward -inf, exceptions suppressed, as instructions of AVX-512 encode it.
_DOWNWARD = 9


@jit
def log1p(x):
    """log(1 + x) of a float."""
    return math.log1p(x)


@intrinsic
def power_of_two(typingctx, exponent):
    """Power of two whose exponent field stands in the low bits of a float."""
    dtype = _dtype(exponent)

    def codegen(context, builder, sig, args):
        bits = _as_integers(builder, args[0])
        bits = builder.shl(bits, _constant(bits.type, _EXPONENT_SHIFT[dtype]))
        return builder.bitcast(bits, args[0].type)

    return exponent(exponent), codegen


@intrinsic
def abreast(typingctx, x):
    """The same lanes, all there before any is used.

    LLVM may put all instructions of one register after those of another. The scheduler of Zen 1, which holds
    18 instructions on AVX2's registers, then has nothing else to do while a result is on its way: a float64
    term takes 1.2 times as long.
    """

    def codegen(context, builder, sig, args):
        (x,) = args
        count = _register_count(_dtype(sig.args[0]))
        if REGISTER_BYTES != 32 or not isinstance(x.type, ir.VectorType) or x.type.count <= count:
            return x
        parts = _parted(builder, x, count)
        constraints = ["=x" for _ in parts] + [str(i) for i in range(len(parts))]
        together = ir.LiteralStructType([part.type for part in parts])
        function_type = ir.FunctionType(together, [part.type for part in parts])
        same = builder.asm(function_type, "", ",".join(constraints), parts, False)
        return _joined(builder, [builder.extract_value(same, i) for i in range(len(parts))])

    return x(x), codegen


def make_table(heads, lows, steps):
    """Make two functions of a sum of lanes with a number so large that its ulp is 1/steps.

    The first clears what is below 1/m. The second takes that, n + j/m, biased, and returns 2**n heads[j] and
    lows[j] plus a shift, which may be None; heads[0] is 1. Each argument is (float32's, float64's), ``heads``
    and ``lows`` m constants.
    """

    @intrinsic
    def whole_steps(typingctx, x):
        precision = {types.float32: 0, types.float64: 1}[_dtype(x)]
        below = steps[precision] // len(heads[precision])

        def codegen(context, builder, sig, args):
            bits = _as_integers(builder, args[0])
            bits = builder.and_(bits, _constant(bits.type, -below)) if below > 1 else bits
            return builder.bitcast(bits, args[0].type)

        return x(x), codegen

    @intrinsic
    def table_power(typingctx, exponent, shift):
        dtype = _dtype(exponent)
        precision = {types.float32: 0, types.float64: 1}[dtype]
        entries, position = len(heads[precision]), _log2(steps[precision] // len(heads[precision]))
        to_exponent = _EXPONENT_SHIFT[dtype] - _log2(steps[precision])
        step = 1 << (_EXPONENT_SHIFT[dtype] - _log2(entries))

        def codegen(context, builder, sig, args):
            exponent, shift = args[0], None if isinstance(sig.args[1], types.NoneType) else args[1]
            bits = _as_integers(builder, exponent)
            # The shift leaves j at the top of the fraction, from where adding takes it away again, and
            # with it the exponent of 1.
            one, *fields = _bits((1.0, *heads[precision]), dtype)
            fields = [field - one - j * step for j, field in enumerate(fields)]
            index = _index(builder, bits, position, entries, dtype)
            power = builder.shl(bits, _constant(bits.type, to_exponent))
            power = builder.add(power, _looked_up(builder, index, _table(fields, dtype), entries, dtype))
            table = _table(_bits(lows[precision], dtype), dtype)
            shared = isinstance(exponent.type, ir.VectorType) and not isinstance(sig.args[1], Lanes)
            if shift is not None and shared:  # added once, where the table is outside of a loop
                table = [_added(builder, register, shift) for register in table]
            low = builder.bitcast(_looked_up(builder, index, table, entries, dtype), exponent.type)
            if shift is not None and not shared:
                low = builder.fadd(low, shift)
            return context.make_tuple(builder, sig.return_type, [builder.bitcast(power, exponent.type), low])

        return types.UniTuple(exponent, 2)(exponent, shift), codegen

    return whole_steps, table_power


def _log2(power):
    return power.bit_length() - 1


def _as_integers(builder, x):
    """The bits of floats."""
    element = getattr(x.type, "element", x.type)
    integer = ir.IntType({"float": 32, "double": 64}[str(element)])
    if isinstance(x.type, ir.VectorType):
        integer = ir.VectorType(integer, x.type.count)
    return builder.bitcast(x, integer)


def _bits(numbers, dtype):
    """Floats as integers."""
    floats = np.array(numbers, str(dtype))
    return floats.view(f"int{dtype.bitwidth}").tolist()


def _table(entries, dtype):
    """Registers that hold a table of integers, or the second of two of which a mask leaves it or 0."""
    integer, count = ir.IntType(dtype.bitwidth), _register_count(dtype)
    if (len(entries), dtype) not in _LOOKUPS:
        return [ir.Constant(integer, entries[1])]
    entries = entries * max(1, count // len(entries))
    starts = range(0, len(entries), count)
    return [ir.Constant(ir.VectorType(integer, count), entries[start : start + count]) for start in starts]


def _added(builder, register, shift):
    """Bits of floats in a register, to which another is added."""
    floats = ir.VectorType(shift.type, register.type.count)
    shifted = builder.fadd(builder.bitcast(register, floats), _splat(builder, shift, floats))
    return builder.bitcast(shifted, register.type)


# Instructions that look entries up in registers, by their number; those of AVX2 do it in each half.
_LOOKUPS = {
    64: {
        (16, types.float32): "avx512.permvar.si.512",
        (16, types.float64): "avx512.vpermi2var.q.512",
    },
    32: {
        (4, types.float32): "avx.vpermilvar.ps.256",
        (2, types.float64): "avx.vpermilvar.pd.256",
    },
    16: {},
}[REGISTER_BYTES]


def _index(builder, bits, position, entries, dtype):
    """Where a lookup finds j, which stands in the bits from a position on: vpermilpd in the second."""
    if (entries, dtype) not in _LOOKUPS:
        return builder.and_(bits, _constant(bits.type, 1 << position))
    if (entries, dtype) == (2, types.float64):
        position -= 1
    return builder.lshr(bits, _constant(bits.type, position)) if position else bits


def _looked_up(builder, index, table, entries, dtype):
    """Entries of a `_table` at an `_index`; the first of two, which is 0, where a mask is 0."""
    if (entries, dtype) not in _LOOKUPS:
        second = builder.sext(builder.icmp_unsigned("!=", index, _constant(index.type, 0)), index.type)
        return builder.and_(second, _splat(builder, table[0], index.type))
    name, integers = _LOOKUPS[entries, dtype], table[0].type
    held = integers if REGISTER_BYTES == 64 else ir.VectorType(_SCALAR[dtype], integers.count)
    function_type = ir.FunctionType(held, [held, integers, *(held for _ in table[1:])])
    function = get_or_insert_function(builder.module, function_type, f"llvm.x86.{name}")
    table = [builder.bitcast(register, held) for register in table]

    def permuted(index):
        return builder.bitcast(builder.call(function, [table[0], index, *table[1:]]), integers)

    return _by_registers(builder, permuted, [index], integers.count)


def _by_registers(builder, function, values, count):
    """What a function makes of registers of so many lanes, for lanes of several registers or for floats."""
    if isinstance(values[0].type, ir.VectorType):
        parts = zip(*(_parted(builder, value, count) for value in values), strict=True)
        return _joined(builder, [function(*own) for own in parts])
    undefined = ir.Constant(ir.VectorType(values[0].type, count), ir.Undefined)
    registers = [builder.insert_element(undefined, value, _INDEX(0)) for value in values]
    return builder.extract_element(function(*registers), _INDEX(0))


def _parted(builder, x, count):
    """Vectors of so many lanes, which `_joined` makes one again."""
    return [_picked(builder, x, x, range(i, i + count)) for i in range(0, x.type.count, count)]


def _joined(builder, parts):
    """A power of two of vectors, one after the other, as one."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [_picked(builder, a, b, range(2 * a.type.count)) for a, b in pairs]
    return parts[0]


def _picked(builder, a, b, indices):
    """Lanes of two vectors, one after the other, at some indices."""
    mask = ir.Constant(ir.VectorType(_INDEX, len(indices)), [_INDEX(i) for i in indices])
    return builder.shuffle_vector(a, b, mask)


@intrinsic
def split_power(typingctx, x):
    """Return k and x / 2**k, which is in [sqrt(1/2), sqrt(2)), for float64s from 1 on."""

    def codegen(context, builder, sig, args):
        (x,) = args
        bits = _as_integers(builder, x)
        integer = bits.type
        shift = _constant(integer, 52)
        # To the exponent field 1 is added where the fraction is that of sqrt(2) or more.
        biased = builder.lshr(builder.add(bits, _constant(integer, 0x3FF0000000000000 - _SQRT_HALF)), shift)
        power = builder.sub(biased, _constant(integer, 1023))
        fraction = builder.bitcast(builder.sub(bits, builder.shl(power, shift)), x.type)
        number = builder.bitcast(builder.or_(biased, _constant(integer, 0x4330000000000000)), x.type)
        number = builder.fsub(number, _constant(x.type, 2.0**52 + 1023.0))
        return context.make_tuple(builder, sig.return_type, [number, fraction])

    return types.UniTuple(x, 2)(x), codegen


# Bits of sqrt(1/2).
_SQRT_HALF = 0x3FE6A09E667F3BCD


@intrinsic
def polynomial(typingctx, x, coefficients):
    """Polynomial in ``x`` by Horner's rule; ``coefficients`` = (float32's, float64's), lowest first."""

    def codegen(context, builder, sig, args):
        x, pairs = args
        return _horner(builder, x, _coefficients(builder, x.type, sig.args[0], sig.args[1], pairs))

    return x(x, coefficients), codegen


@intrinsic
def polynomial_by_pairs(typingctx, x, square, coefficients):
    """`polynomial` by Horner's rule in x**2, once pairs of coefficients are one (Estrin): in half the steps.

    The sums of 8 x 1024 float64 take 0.92 of the time for it. Of three coefficients, as float32 has, there
    are no fewer steps, and Horner's rule takes 0.97 of the time.
    """

    def codegen(context, builder, sig, args):
        x, square, pairs = args
        values = _coefficients(builder, x.type, sig.args[0], sig.args[2], pairs)
        if len(values) <= 3:
            return _horner(builder, x, values)
        parts = [_horner(builder, x, values[i : i + 2]) for i in range(0, len(values), 2)]
        return _horner(builder, square, parts)

    return x(x, square, coefficients), codegen


def _coefficients(builder, llvm_type, lanes, kind: Any, pairs):
    """Those of the precision of some lanes, spread over them."""
    precision = {types.float32: 0, types.float64: 1}[_dtype(lanes)]
    own = builder.extract_value(pairs, precision)
    return [_convert(builder, builder.extract_value(own, i), llvm_type) for i in range(len(kind[precision]))]


def _horner(builder, x, values):
    """Polynomial in x with these coefficients."""
    result = values[-1]
    for value in values[-2::-1]:
        result = _call(builder, "fma", x.type, [result, x, value])
    return result


def _convert(builder, value, llvm_type):
    """Round a float64 to the element type and spread it over the lanes."""
    element = getattr(llvm_type, "element", llvm_type)
    if value.type != element:
        value = builder.fptrunc(value, element)
    return _splat(builder, value, llvm_type)


# -- from scalars to lanes and back ---------------------------------------------------------------


@intrinsic
def spread(typingctx, value, like):
    """``value`` in every lane, in the lane type of ``like``; as many lanes are converted one by one."""
    lanes = _lanes_of(like)

    def codegen(context, builder, sig, args):
        if sig.args[0] == lanes:
            return args[0]
        if isinstance(value, Lanes):
            return _resized(builder, args[0], _llvm_type(lanes))
        scalar = context.cast(builder, args[0], sig.args[0], _dtype(lanes))
        return _splat(builder, scalar, _llvm_type(lanes))

    return lanes(value, like), codegen


def _resized(builder, value, llvm_type):
    """Floats in another precision."""
    if value.type == llvm_type:
        return value
    element = getattr(llvm_type, "element", llvm_type)
    return (builder.fpext if element == ir.DoubleType() else builder.fptrunc)(value, llvm_type)


@intrinsic
def as_float64(typingctx, x):
    """Floats or lanes in float64."""
    wide = _lanes(types.float64, x.count) if isinstance(x, Lanes) else types.float64

    def codegen(context, builder, sig, args):
        return _resized(builder, args[0], _llvm_type(wide))

    return wide(x), codegen


@intrinsic
def constant(typingctx, values, like):
    """The one of the two constants (for float32, for float64) that belongs to the dtype of ``like``."""
    lanes = _lanes_of(like)
    precision = {types.float32: 0, types.float64: 1}[_dtype(lanes)]

    def codegen(context, builder, sig, args):
        return _convert(builder, builder.extract_value(args[0], precision), _llvm_type(lanes))

    return lanes(values, like), codegen


def _zeros(size):
    @intrinsic
    def zeros(typingctx, like):
        lanes = _lanes_of(like)
        count = min(lanes.count, 8 * size // lanes.dtype.bitwidth) if isinstance(lanes, Lanes) else 1
        fewer = _lanes(_dtype(lanes), count)
        return fewer(like), lambda context, builder, sig, args: _constant(_llvm_type(fewer), 0.0)

    return zeros


# 0 in the lanes of one register, or of the smallest kind of register; in a float, where lanes are one.
register_zeros = _zeros(REGISTER_BYTES)
piece_zeros = _zeros(16)


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
def fold(typingctx, a, b, group):
    """Lower and upper halves of each group of lanes of a and b, side by side.

    Folding vectors by twos, by groups of all lanes, then of half of them, down to groups of 2, gives one
    vector with a lane for each.
    """

    def codegen(context, builder, sig, args):
        a, b, group = args
        count = a.type.count
        end = builder.append_basic_block("fold.end")
        pairs = []
        while count > 1:
            block = builder.append_basic_block(f"fold.{count}")
            pairs.append((count, block))
            count //= 2
        switch = builder.switch(group, pairs[0][1])
        for size, block in pairs[1:]:
            switch.add_case(group.type(size), block)
        halves = []
        for size, block in pairs:
            builder.position_at_end(block)
            halves.append([_halves(builder, a, b, size, start) for start in (0, size // 2)])
            builder.branch(end)
        builder.position_at_end(end)
        result = []
        for half in range(2):
            merged = builder.phi(a.type)
            for (_, block), values in zip(pairs, halves, strict=True):
                merged.add_incoming(values[half], block)
            result.append(merged)
        return context.make_tuple(builder, sig.return_type, result)

    return types.UniTuple(a, 2)(a, b, types.intp), codegen


def _halves(builder, a, b, size, start):
    """Of each group of ``size`` lanes, the half that begins at ``start``."""
    picked = [i for i in range(2 * a.type.count) if start <= i % size < start + size // 2]
    mask = ir.Constant(ir.VectorType(_INDEX, a.type.count), [_INDEX(i) for i in picked])
    return builder.shuffle_vector(a, b, mask)


@intrinsic
def no_lanes(typingctx, condition):
    """Whether a condition holds in no lane."""

    def codegen(context, builder, sig, args):
        (some,) = args
        if isinstance(some.type, ir.VectorType):
            some = _call(builder, "vector.reduce.or", some.type.element, args)
        return builder.not_(some)

    return types.boolean(condition), codegen


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
# Entries are read from an array, a pointer, or a pair of pointers (entries, mask), where those whose byte in
# the mask is 0 are read as -inf. int16 stands for float16 and uint16 for bfloat16: both become float32 lanes
# when they are read, and are rounded to nearest, ties to even, when they are written.


@intrinsic
def pointer(typingctx, array):
    """Pointer to the first entry of a C-contiguous array, which the caller keeps alive."""

    def codegen(context, builder, sig, args):
        return context.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def as_contiguous(typingctx, array):
    """The same 1-d array under the type of a C-contiguous one, for a caller who knows that it is."""
    return array.copy(layout="C")(array), lambda context, builder, sig, args: args[0]


@intrinsic
def slice_at(typingctx, array, offset, n, stride):
    """View of n entries of an array from a byte on, with a stride in bytes; its type is that of any stride.

    It does not count as a reference: the caller keeps the array alive. Of None it is None.
    """
    if isinstance(array, types.NoneType):
        return array(array, types.intp, types.intp, types.intp), lambda context, builder, sig, args: args[0]
    result = types.Array(array.dtype, 1, "A")

    def codegen(context, builder, sig, args):
        array, offset, n, stride = args
        source = make_array(sig.args[0])(context, builder, array)
        byte = ir.IntType(8).as_pointer()
        data = builder.bitcast(builder.gep(builder.bitcast(source.data, byte), [offset]), source.data.type)
        view = make_array(result)(context, builder)
        populate_array(
            view,
            data=data,
            shape=[n],
            strides=[stride],
            itemsize=source.itemsize,
            meminfo=None,
        )
        return view._getvalue()

    return result(array, types.intp, types.intp, types.intp), codegen


def workspace(size, like) -> Any:
    """Array of the dtype of the lanes of ``like``, not initialised; only for jitted code."""
    raise NotImplementedError("workspace is for jitted code only")


@overload(workspace)
def _workspace(size, like):
    dtype = np.float64 if _dtype(_lanes_of(like)) == types.float64 else np.float32
    return lambda size, like: np.empty(size, dtype)


@traced
def entries_of(x, mask):
    """Pointer to x, or the pair of pointers to x and its mask."""
    return pointer(x) if mask is None else (pointer(x), pointer(mask))


@intrinsic
def with_mask(typingctx, array, mask):
    """Array as it is, or its pair with a mask; the caller keeps both alive."""
    if isinstance(mask, types.NoneType):
        return array(array, mask), lambda context, builder, sig, args: args[0]

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, args)

    return types.Tuple((array, mask))(array, mask), codegen


@intrinsic
def get(typingctx, array, index):
    """Entry ``index``, as the one lane of a load."""
    dtype = _dtype(_lanes_of(array))

    def codegen(context, builder, sig, args):
        array, index = args
        one = ir.VectorType(_SCALAR[dtype], 1)
        return builder.extract_element(_read(context, builder, sig.args[0], array, index, one), _INDEX(0))

    return dtype(array, types.intp), codegen


@intrinsic
def put(typingctx, array, index, value):
    """Write entry ``index``, as the one lane of a store; ``value`` has the type that `get` returns."""
    dtype = _dtype(_lanes_of(array))

    def codegen(context, builder, sig, args):
        array, index, value = args
        one = ir.Constant(ir.VectorType(_SCALAR[dtype], 1), ir.Undefined)
        _write(context, builder, sig.args[0], array, index, builder.insert_element(one, value, _INDEX(0)))
        return context.get_dummy_value()

    return types.none(array, types.intp, dtype), codegen


def _prefetch(write, level):
    @intrinsic
    def prefetch(typingctx, array, index):
        def codegen(context, builder, sig, args):
            array_type: Any = sig.args[0]
            array, index = args
            if isinstance(array_type, types.NoneType):
                return context.get_dummy_value()
            if _is_pair(array_type):
                array_type, array = array_type[0], builder.extract_value(array, 0)
            byte = ir.IntType(8).as_pointer()
            address = _pointer(context, builder, array_type, array, index, ir.IntType(8))
            function_type = ir.FunctionType(ir.VoidType(), [byte, _INDEX, _INDEX, _INDEX])
            function = get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
            for line in range(0, _lanes_of(array_type).count * array_type.dtype.bitwidth // 8, LINE_BYTES):
                place = builder.gep(address, [_SIZE(line)])
                builder.call(function, [place, _INDEX(write), _INDEX(4 - level), _INDEX(1)])
            return context.get_dummy_value()

        return types.none(array, types.intp), codegen

    return prefetch


# Ask for the lanes from entry ``index`` of an array on to be in the second cache or, if they are soon to be
# read or written, in the first. Lines to be written that are asked for as others are have to be asked for
# again: on an Emerald Rapids 1024 x 64 float32 took 1.13 times as long, and columns 1.05 to 1.2 times.
# Nothing is asked for where the array is None. Beyond an array it costs time (see `_slice.Soon`), no more.
prefetch = _prefetch(write=0, level=2)
prefetch_to_read = _prefetch(write=0, level=1)
prefetch_to_write = _prefetch(write=1, level=1)


@intrinsic
def touch(typingctx, array, start, stop):
    """Have memory given to all pages of the entries from ``start`` to ``stop``, which stay as they are.

    A page is given when something is written: a zero, where there is one. There is at least one entry, or the
    array is None.
    """

    def codegen(context, builder, sig, args):
        array, start, stop = args
        if isinstance(sig.args[0], types.NoneType):
            return context.get_dummy_value()
        byte = ir.IntType(8)
        first = _pointer(context, builder, sig.args[0], array, start, byte)
        end = _pointer(context, builder, sig.args[0], array, stop, byte)
        size = builder.sub(builder.ptrtoint(end, _SIZE), builder.ptrtoint(first, _SIZE))

        def touch_byte(offset):
            place = builder.gep(first, [offset])
            builder.cmpxchg(place, byte(0), byte(0), "monotonic", "monotonic")

        with for_range_slice(builder, _SIZE(0), size, _SIZE(PAGE_BYTES), _SIZE) as (offset, _):
            touch_byte(offset)
        touch_byte(builder.sub(size, _SIZE(1)))
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), codegen


@intrinsic
def load(typingctx, array, index):
    """Entries ``index``, ``index + 1``, ..., one for each lane."""
    lanes = _lanes_of(array)

    def codegen(context, builder, sig, args):
        return _read(context, builder, sig.args[0], args[0], args[1], _llvm_type(lanes))

    return lanes(array, types.intp), codegen


@intrinsic
def load_first(typingctx, array, index, count, filler):
    """As `load`, but only the first ``count`` lanes, at least one; the others hold ``filler``."""
    lanes = _lanes_of(array)

    def codegen(context, builder, sig, args):
        array, index, count, filler = args
        llvm_type = _llvm_type(lanes)
        if not isinstance(lanes, Lanes):
            return _read(context, builder, sig.args[0], array, index, llvm_type)
        value = _read(context, builder, sig.args[0], array, index, llvm_type, count)
        return builder.select(_first_lanes(builder, count, llvm_type), value, filler)

    return lanes(array, types.intp, types.intp, lanes), codegen


@intrinsic
def drop_first(typingctx, value, count, filler):
    """``value``, but ``filler`` in the first ``count`` lanes."""

    def codegen(context, builder, sig, args):
        value, count, filler = args
        if not isinstance(sig.return_type, Lanes):
            return value
        return builder.select(_first_lanes(builder, count, value.type), filler, value)

    return value(value, types.intp, value), codegen


@intrinsic
def load_as(typingctx, array, index, count, filler, like):
    """As `load_first` from an array of float64, or a tuple of one; as many lanes as ``like`` has."""
    lanes = _lanes(types.float64, _lanes_of(like).count)

    def codegen(context, builder, sig, args):
        array, index, count, filler, _ = args
        llvm_type = _llvm_type(lanes)
        if isinstance(sig.args[0], types.BaseTuple):
            return _splat(builder, builder.extract_value(array, 0), llvm_type)
        value = _read(context, builder, sig.args[0], array, index, llvm_type, count)
        return builder.select(
            _first_lanes(builder, count, llvm_type), value, _splat(builder, filler, llvm_type)
        )

    return lanes(array, types.intp, types.intp, types.float64, like), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write the lanes to entries ``index``, ``index + 1``, ..."""

    def codegen(context, builder, sig, args):
        array, index, value = args
        _write(context, builder, sig.args[0], array, index, value)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def stream(typingctx, array, index, value):
    """As `store`, past the caches, where `to_stream` is 0; to be followed by `settle`."""

    def codegen(context, builder, sig, args):
        array, index, value = args
        _write(context, builder, sig.args[0], array, index, value, past_caches=True)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def to_stream(typingctx, array, index):
    """Number of entries, fewer than lanes, from an index to the next where a line, or lanes, begin."""

    def codegen(context, builder, sig, args):
        first, index = args
        itemsize = array.dtype.bitwidth // 8
        size = min(itemsize * getattr(_lanes_of(array), "count", 1), LINE_BYTES)
        pointer = _pointer(context, builder, sig.args[0], first, index, ir.IntType(8))
        bytes_left = builder.and_(builder.neg(builder.ptrtoint(pointer, _SIZE)), _SIZE(size - 1))
        return builder.udiv(bytes_left, _SIZE(itemsize))

    return types.intp(array, types.intp), codegen


@intrinsic
def settle(typingctx):
    """Let no thread see what this one does next before what it has streamed."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def store_first(typingctx, array, index, count, value):
    """As `store`, but only the first ``count`` lanes."""

    def codegen(context, builder, sig, args):
        array, index, count, value = args
        own = count if isinstance(sig.args[3], Lanes) else None
        _write(context, builder, sig.args[0], array, index, value, own)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, value), codegen


@jit
def read(x, i, count, filler):
    """Lanes from an index on, of which the first ``count`` are read; the others hold ``filler``."""
    if count >= lane_count(x):
        return load(x, i)
    return load_first(x, i, count, filler)


@jit
def write(x, i, count, value):
    """Write the lanes from an index on, or only the first ``count``."""
    if count >= lane_count(x):
        store(x, i, value)
    else:
        store_first(x, i, count, value)


@traced
def is_as_wide(array):
    """Whether entries have as many bits in memory as in lanes: float32 and float64, not the 16-bit types."""
    array_type: Any = kind_of(array)
    return array_type.dtype in _COUNT


@intrinsic
def present(typingctx, array, index, count, value, absent):
    """``value``, or ``absent`` in those of the first ``count`` lanes, one or more, that a mask leaves out."""

    def codegen(context, builder, sig, args):
        array, index, count, value, absent = args
        if not _is_pair(sig.args[0]):
            return value
        mask = _mask(context, builder, sig.args[0], array, index, value.type.count, count)
        return builder.select(mask, value, absent)

    return value(array, types.intp, types.intp, value, value), codegen


@intrinsic
def unless_masked(typingctx, mask, index, value, absent):
    """``value`` of one entry, or ``absent`` if there is a mask whose byte at an index is 0."""

    def codegen(context, builder, sig, args):
        mask, index, value, absent = args
        if isinstance(sig.args[0], types.NoneType):
            return value
        byte = ir.IntType(8)
        own = _load(context, builder, sig.args[0], mask, index, byte, None)
        # Between floats a choice is a branch, of which a random mask has half guessed wrong, and LLVM makes
        # one of any that it sees through: with this every other column of 2000 x 2000 takes 0.45 of the time.
        bits, other = _as_integers(builder, value), _as_integers(builder, absent)
        kept = builder.sext(builder.icmp_unsigned("!=", own, byte(0)), bits.type)
        kept = builder.asm(ir.FunctionType(kept.type, [kept.type]), "", "=r,0", [kept], False)
        chosen = builder.or_(builder.and_(bits, kept), builder.and_(other, builder.not_(kept)))
        return builder.bitcast(chosen, value.type)

    return value(mask, types.intp, value, value), codegen


# Rows are transposed in pieces of 128 bits, of as many rows as a register has lanes: the parts of a register
# are read and written where they lie, and lanes are shuffled within them only. With whole registers of AVX2,
# whose parts change places (vperm2f128), ten float32 columns of 32 rows took 2.8 times as long on Zen 1. With
# AVX-512 lanes go anywhere in one instruction, and pieces may be wide, of 256 bits; registers of 128 bits
# have no room for those.


def _piece(lanes, wide=types.none):
    """LLVM type of a piece of a row, of 128 bits, or of a wide one, of 256."""
    bits = 128 if wide == types.none else 256
    return ir.VectorType(_SCALAR[lanes.dtype], bits // lanes.dtype.bitwidth)


@intrinsic
def piece_size(typingctx, like):
    """Number of columns of a piece."""
    size = _piece(_lanes_of(like)).count
    return types.intp(like), lambda context, builder, sig, args: ir.Constant(_SIZE, size)


@intrinsic
def read_pieces(typingctx, x, start, step, rows, columns, work, to, wide):
    """Copy pieces of rows of x, ``step`` entries apart, transposed: one for each lane of a register.

    Unless ``wide`` is None they have twice as many columns as `piece_size` says.

    Column j becomes the part of a vector that begins at ``to`` + j * lanes in working memory. A lane without
    one of the ``rows``, which may be more, gets the last; what is beyond the ``columns`` may be anything.
    """
    lanes = _lanes_of(work)
    piece, count = _piece(lanes, wide), _register_count(lanes.dtype)

    def codegen(context, builder, sig, args):
        x, start, step, rows, columns, work, to, _ = args

        def copy(numbers, size):
            indices = [builder.add(start, builder.mul(number, step)) for number in numbers]
            pieces = [_read(context, builder, sig.args[0], x, index, piece, size) for index in indices]
            registers = [_joined(builder, pieces[i :: piece.count]) for i in range(piece.count)]
            for j, column in enumerate(_transposed(builder, registers)):
                at = builder.add(to, _SIZE(j * lanes.count))
                _write(context, builder, sig.args[5], work, at, column)

        with builder.if_else(_lie_within(builder, count, rows, columns, step, piece)) as (whole, part):
            with whole:
                copy([_SIZE(i) for i in range(count)], None)
            with part:
                last = builder.sub(rows, _SIZE(1))
                ahead = [builder.icmp_signed("<", _SIZE(i), last) for i in range(count)]
                numbers = [builder.select(ahead[i], _SIZE(i), last) for i in range(count)]
                copy(numbers, columns)
        return context.get_dummy_value()

    return types.none(x, start, step, rows, columns, work, to, wide), codegen


@intrinsic
def write_pieces(typingctx, work, at, out, start, step, rows, columns, x, absent, wide):
    """Copy pieces back, in order, to so many rows of ``out``, or to as many as a register has lanes.

    What is beyond the ``columns`` of a row is written, too, where it belongs to the rows that follow.
    Entries that the mask of x leaves out become ``absent``.
    """
    lanes = _lanes_of(work)
    piece, count = _piece(lanes, wide), _register_count(lanes.dtype)

    def codegen(context, builder, sig, args):
        work, at, out, start, step, rows, columns, x, absent, _ = args
        register = ir.VectorType(piece.element, count)
        indices = [builder.add(at, _SIZE(j * lanes.count)) for j in range(piece.count)]
        registers = [_read(context, builder, sig.args[0], work, index, register) for index in indices]
        parts = [_parted(builder, row, piece.count) for row in _transposed(builder, registers)]
        pieces = [parts[i % piece.count][i // piece.count] for i in range(count)]

        def copy(i, size):
            index, value = builder.add(start, builder.mul(_SIZE(i), step)), pieces[i]
            if _is_pair(sig.args[7]):
                mask = _mask(context, builder, sig.args[7], x, index, piece.count, size)
                value = builder.select(mask, value, _splat(builder, absent, piece))
            _write(context, builder, sig.args[2], out, index, value, size)

        with builder.if_else(_lie_within(builder, count, rows, columns, step, piece)) as (whole, part):
            with whole:
                for i in range(count):
                    copy(i, None)
            with part:
                for i in range(count):
                    with builder.if_then(builder.icmp_signed("<", _SIZE(i), rows)):
                        own = _lie_within(builder, i + 1, rows, columns, step, piece)
                        with builder.if_else(own) as (inside, edge):
                            with inside:
                                copy(i, None)
                            with edge:
                                copy(i, columns)
        return context.get_dummy_value()

    own = lanes.dtype
    return types.none(work, at, out, start, step, rows, columns, x, own, wide), codegen


def _lie_within(builder, count, rows, columns, step, piece):
    """Whether whole pieces of the first so many rows end no later than the columns of the last row do."""
    further = builder.mul(builder.sub(rows, _SIZE(count)), step)
    return builder.icmp_signed(">=", further, builder.sub(_SIZE(piece.count), columns))


def _transposed(builder, registers):
    """Transposed squares of so many registers, each part of which is a row of a square.

    Each of log2(n) rounds shuffles registers i and i + n / 2 into one another.
    """
    size, count = len(registers), registers[0].type.count
    lower = [part + i // 2 + i % 2 * count for part in range(0, count, size) for i in range(size)]
    picks = (lower, [i + size // 2 for i in lower])
    for _ in range(size.bit_length() - 1):
        pairs = zip(registers[: size // 2], registers[size // 2 :], strict=True)
        registers = [_picked(builder, a, b, pick) for a, b in pairs for pick in picks]
    return registers


def _first_lanes(builder, count, llvm_type):
    """Mask of the lanes below ``count``."""
    indices = ir.VectorType(_INDEX, llvm_type.count)
    numbers = ir.Constant(indices, [_INDEX(i) for i in range(llvm_type.count)])
    return builder.icmp_signed("<", numbers, _splat(builder, builder.trunc(count, _INDEX), indices))


def _stored_type(array_type, llvm_type):
    """LLVM type of lanes as they lie in memory."""
    if array_type.dtype in _SCALAR:
        return llvm_type
    return ir.VectorType(ir.IntType(array_type.dtype.bitwidth), llvm_type.count)


def _read(context, builder, array_type: Any, array, index, llvm_type, count=None):
    """Lanes from an index on; if ``count`` is given, only the first so many; others hold anything."""
    if _is_pair(array_type):
        mask = _mask(context, builder, array_type, array, index, llvm_type.count, count)
        entries = builder.extract_value(array, 0)
        value = _read(context, builder, array_type[0], entries, index, llvm_type, count)
        return builder.select(mask, value, _constant(llvm_type, -float("inf")))
    value = _load(context, builder, array_type, array, index, _stored_type(array_type, llvm_type), count)
    if array_type.dtype == types.int16:
        return builder.fpext(builder.bitcast(value, ir.VectorType(ir.HalfType(), llvm_type.count)), llvm_type)
    if array_type.dtype == types.uint16:
        bits = builder.zext(value, ir.VectorType(_INDEX, llvm_type.count))
        return builder.bitcast(builder.shl(bits, _constant(bits.type, 16)), llvm_type)
    return value


def _write(context, builder, array_type, array, index, value, count=None, past_caches=False):
    """Write lanes from an index on; if ``count`` is given, only the first so many."""
    stored = _stored_type(array_type, value.type)
    if array_type.dtype == types.int16:
        value = builder.bitcast(
            builder.fptrunc(value, ir.VectorType(ir.HalfType(), value.type.count)), stored
        )
    elif array_type.dtype == types.uint16:
        value = builder.trunc(_bfloat16_bits(builder, value), stored)
    pointer = _pointer(context, builder, array_type, array, index, stored)
    alignment = array_type.dtype.bitwidth // 8
    if past_caches:
        size = alignment * getattr(stored, "count", 1)
        written = builder.store(value, pointer, align=min(size, LINE_BYTES))
        written.set_metadata("nontemporal", builder.module.add_metadata([_INDEX(1)]))
    elif count is None:
        builder.store(value, pointer, align=alignment)
    else:
        first = _first_lanes(builder, count, stored)
        _masked(builder, "store", ir.VoidType(), stored, [value, pointer, _INDEX(alignment), first])


def _bfloat16_bits(builder, value):
    """Bits of float32 lanes rounded to bfloat16, in the low half."""
    bits = builder.bitcast(value, ir.VectorType(_INDEX, value.type.count))
    half = _constant(bits.type, 16)
    odd = builder.and_(builder.lshr(bits, half), _constant(bits.type, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(bits.type, 0x7FFF))), half)
    quiet = builder.or_(builder.lshr(bits, half), _constant(bits.type, 0x40))
    return builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)


def _mask(context, builder, pair_type: Any, pair, index, lanes, count):
    """So many lanes of the mask in a pair (entries, mask), or the first ``count``."""
    bytes_type = ir.VectorType(ir.IntType(8), lanes)
    mask = builder.extract_value(pair, 1)
    value = _load(context, builder, pair_type[1], mask, index, bytes_type, count)
    return builder.icmp_unsigned("!=", value, _constant(bytes_type, 0))


def _load(context, builder, array_type, array, index, stored, count):
    """Lanes as they lie in memory from an index on; if ``count`` is given, the first so many, 0 in others."""
    pointer = _pointer(context, builder, array_type, array, index, stored)
    alignment = array_type.dtype.bitwidth // 8
    if count is None:
        return builder.load(pointer, align=alignment)
    if alignment < 4 and stored.count >= 8 and REGISTER_BYTES < 64:
        return _load_short(builder, pointer, stored, count)
    first = _first_lanes(builder, count, stored)
    return _masked(
        builder, "load", stored, stored, [pointer, _INDEX(alignment), first, ir.Constant(stored, None)]
    )


def _load_short(builder, pointer, stored, count):
    """The first so many lanes of 8 or 16 bits, at least one, 0 in the others; all if there are more.

    Only AVX-512 loads some of them; for AVX2, LLVM would branch at each: with a mask 1000 x 8192 float32 took
    twice as long. Here those that fill words of 32 bits are loaded as such, the others, up to three, singly.
    """
    all_there = builder.icmp_signed(">=", count, _SIZE(stored.count))
    with builder.if_else(all_there) as (whole, part):
        with whole:
            loaded = builder.load(pointer, align=stored.element.width // 8)
            whole_block = builder.block
        with part:
            some = _load_words(builder, pointer, stored, count)
            part_block = builder.block
    result = builder.phi(stored)
    result.add_incoming(loaded, whole_block)
    result.add_incoming(some, part_block)
    return result


def _load_words(builder, pointer, stored, count):
    """`_load_short` of fewer than all."""
    bits = stored.element.width
    each, word = 32 // bits, ir.IntType(32)
    words = ir.VectorType(word, stored.count // each)
    filled = builder.udiv(count, _SIZE(each))
    arguments = [builder.bitcast(pointer, words.as_pointer()), _INDEX(bits // 8)]
    arguments += [_first_lanes(builder, filled, words), ir.Constant(words, None)]
    value = _masked(builder, "load", words, words, arguments)
    entries, last = builder.bitcast(pointer, stored.element.as_pointer()), word(0)
    for i in range(each - 1):
        at = builder.add(builder.mul(filled, _SIZE(each)), _SIZE(i))
        is_there = builder.icmp_signed("<", at, count)
        entry = builder.load(builder.gep(entries, [builder.select(is_there, at, _SIZE(0))]), align=bits // 8)
        shifted = builder.shl(builder.zext(entry, word), word(i * bits))
        last = builder.or_(last, builder.select(is_there, shifted, word(0)))
    numbers = ir.Constant(words, [word(i) for i in range(words.count)])
    is_last = builder.icmp_signed("==", numbers, _splat(builder, builder.trunc(filled, word), words))
    return builder.bitcast(builder.select(is_last, _splat(builder, last, words), value), stored)


def _masked(builder, name, return_type, stored, arguments):
    """Call llvm.masked.load(pointer, alignment, mask, filler) or .store(value, pointer, alignment, mask)."""
    element = {"float": "f32", "double": "f64"}.get(str(stored.element), str(stored.element))
    function = get_or_insert_function(
        builder.module,
        ir.FunctionType(return_type, [argument.type for argument in arguments]),
        f"llvm.masked.{name}.v{stored.count}{element}.p0",
    )
    return builder.call(function, arguments)


def _wide(masked):
    @intrinsic
    def load_wide(typingctx, array, index, count, filler):
        narrow = _dtype(_lanes_of(array))

        def codegen(context, builder, sig, args):
            array, index, count, filler = args
            wide = filler.type
            stored = ir.VectorType(_SCALAR[narrow], wide.count)
            value = _read(context, builder, sig.args[0], array, index, stored, count if masked else None)
            if narrow != types.float64:
                value = builder.fpext(value, wide)
            return builder.select(_first_lanes(builder, count, wide), value, filler) if masked else value

        return filler(array, types.intp, types.intp, filler), codegen

    return load_wide


_load_wide = _wide(masked=False)
_load_first_wide = _wide(masked=True)


@jit
def read_wide(x, i, count, filler):
    """As `read`, in lanes of float64 whatever the dtype of x."""
    if count >= lane_count(filler):
        return _load_wide(x, i, count, filler)
    return _load_first_wide(x, i, count, filler)
