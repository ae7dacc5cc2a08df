"""Straight-line code that kernels call: run in Python, on values whose operations emit instructions.

To compile a function takes Numba some 50 ms, whatever stands in it. Most of ours are a few operations on
lanes, without a branch: `traced`, such a function takes 1 ms a call, and a first call of `softmax` of a
vector 0.6 of the time. Of what type the result of an operation is, and what instructions it takes, Numba
says as if it had compiled the function.
"""

import contextvars
import functools
import operator
from typing import Any

from numba import extending, types
from numba.core.typing import templates

# The trace of this thread. What compiles for a GPU has a lock of its own, so others may trace meanwhile.
_under_way: Any = contextvars.ContextVar("trace", default=None)


class Traced:
    """A value in a trace: its Numba type and, where code is emitted, its LLVM value."""

    def __init__(self, kind, value):
        self.kind, self.value = kind, value

    def __bool__(self):
        raise TypeError("traced code cannot branch on a value that is known only when it runs")


def _define(name, function):
    """Give traced values an operator; that of two operands takes a constant on either side."""

    def method(*operands):
        return apply(function, operands)

    def reflected(self, other):
        return apply(function, (other, self))

    setattr(Traced, f"__{name}__", method)
    if name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and"):
        setattr(Traced, f"__r{name}__", reflected)


for _name in "add", "sub", "mul", "truediv", "floordiv", "mod", "eq", "ne", "lt", "gt", "le", "neg":
    _define(_name, getattr(operator, _name))
_define("and", operator.and_)
_define("abs", abs)


class Jitted:
    """A jitted function that traced code can call."""

    def __init__(self, dispatcher):
        self._numba_type_ = dispatcher._numba_type_
        self._dispatcher = dispatcher  # which its type does not keep alive

    def __call__(self, *arguments):
        return apply(self._numba_type_, arguments)


class _Trace:
    """One run of a function: with a target and a builder, which gets instructions, or for types alone."""

    def __init__(self, typing, target: Any = None, builder: Any = None):
        self.typing, self.target, self.builder = typing, target, builder

    def run(self, function, kinds, values):
        """Call a function with values of Numba types; return the type and value of its result."""
        outer = _under_way.set(self)
        try:
            result = function(*map(self._unpacked, kinds, values))
            return kind_of(result), self.builder and self._packed(result)
        finally:
            _under_way.reset(outer)

    def emit(self, signature, arguments, implementation):
        """Result of an operation, which ``implementation`` emits, given a builder and LLVM values."""
        value = None
        if self.builder is not None:
            values = [
                self.target.cast(self.builder, self._packed(argument), kind_of(argument), kind)
                for argument, kind in zip(arguments, signature.args, strict=True)
            ]
            value = implementation(self.builder, values)
        return self._unpacked(signature.return_type, value)

    def _unpacked(self, kind, value):
        """Python's value: None, a function, a tuple, or one that is traced."""
        if isinstance(kind, types.NoneType):
            return None
        if isinstance(kind, types.Optional | types.Omitted):
            raise TypeError(f"traced code takes no {kind}")
        if isinstance(kind, types.Function):
            return kind.typing_key
        if isinstance(kind, types.Dispatcher):
            return Jitted(kind.dispatcher)
        if not isinstance(kind, types.BaseTuple):
            return Traced(kind, value)
        fields: Any = kind
        values = [self.builder and self.builder.extract_value(value, i) for i in range(len(fields))]
        items = map(self._unpacked, fields, values)
        named = getattr(kind, "instance_class", None)
        return named(*items) if named else tuple(items)

    def _packed(self, value):
        """LLVM's value, of a constant, too."""
        if isinstance(value, Traced):
            return value.value
        if value is None or callable(value):
            return self.target.get_dummy_value()
        if _is_constant(value):
            return self.target.get_constant_generic(self.builder, kind_of(value), value)
        return self.target.make_tuple(self.builder, kind_of(value), [self._packed(item) for item in value])


def _is_constant(value):
    return all(map(_is_constant, value)) if isinstance(value, tuple) else isinstance(value, int | float)


def kind_of(value):
    """Numba type of a value in a trace, on which traced code may branch."""
    if isinstance(value, Traced):
        return value.kind
    if isinstance(value, tuple):
        return types.BaseTuple.from_types(tuple(map(kind_of, value)), type(value))
    if hasattr(value, "_numba_type_"):
        return value._numba_type_
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise OverflowError(f"{value} has more than 64 bits")
    kinds = {type(None): types.none, bool: types.boolean, int: types.intp, float: types.float64}
    if type(value) not in kinds:
        raise TypeError(f"traced code takes no {type(value).__name__}, got {value!r}")
    return kinds[type(value)]


def _trace_under_way(name):
    trace = _under_way.get()
    if trace is None:
        raise NotImplementedError(f"{name} is for jitted code only")
    return trace


def apply(function, arguments):
    """Call what Numba knows in traced code: an operator, or the type of a jitted function."""
    trace, kinds = _trace_under_way(function), tuple(map(kind_of, arguments))
    if isinstance(function, types.Type):
        signature = trace.typing.resolve_function_type(function, kinds, {})
    else:
        signature = _signature_of(trace.typing, function, kinds)
    if trace.builder is None:
        return trace.emit(signature, arguments, None)
    _refuse_array(trace.target, signature.return_type, function)
    return trace.emit(signature, arguments, trace.target.get_function(function, signature))


def _refuse_array(target, kind, function):
    """Raise an error for what Numba counts references to."""
    if target.data_model_manager[kind].contains_nrt_meminfo():
        raise TypeError(f"{function} returns an array, which traced code cannot take")


@functools.cache
def _signature_of(typing, function, kinds):
    return typing.resolve_function_type(function, kinds, {})


class Language:
    """What of Numba's own makes functions known to jitted code: for a GPU it has other registries."""

    def __init__(self, templates, extending):
        self._templates: Any = templates
        self._extending: Any = extending

    def _register(self, function, definition):
        """Have jitted code take a call of a function for the signature and code that ``definition`` gives.

        Return what gives them for types of arguments.
        """
        signatures, codegens = {}, {}

        def typed(typing, kinds):
            if kinds not in signatures:
                signature, codegen = definition(typing, *kinds)
                codegens[signature.args] = codegen
                self._extending.lower_builtin(codegen, *signature.args)(codegen)
                signatures[kinds] = signature  # last: an interrupt may come at any time
            signature = signatures[kinds]
            return signature, codegens[signature.args]

        class _Template(self._templates.AbstractTemplate):
            key = function

            def generic(self, args, kws):
                return typed(self.context, args)[0]

            def get_impl_key(self, sig):
                return codegens[sig.args]

        function._numba_type_ = types.Function(_Template)
        return typed

    def intrinsic(self, definition) -> Any:
        """As Numba's ``intrinsic``, for jitted and traced code."""

        @functools.wraps(definition)
        def function(*arguments):
            trace = _trace_under_way(definition.__name__)
            signature, codegen = typed(trace.typing, tuple(map(kind_of, arguments)))

            def implementation(builder, values):
                return codegen(trace.target, builder, signature, values)

            return trace.emit(signature, arguments, implementation)

        typed = self._register(function, definition)
        return function

    def traced(self, function) -> Any:
        """Make a function of intrinsics, operators and other such functions one that jitted code can call.

        It may branch on what types tell, such as whether a value is None. It makes and returns no arrays:
        their references are not counted. Tuples are Python's, so of two with the same NaN each equals the
        other. How it divides by zero is up to the caller, as with Numba's own operators: `_jit` has it
        follow IEEE 754.
        """

        @functools.wraps(function)
        def called(*arguments):
            _trace_under_way(function.__name__)
            return function(*arguments)

        def definition(typing, *kinds):
            result, _ = _Trace(typing).run(function, kinds, kinds)

            def codegen(context, builder, signature, values):
                _refuse_array(context, result, function.__name__)
                return _Trace(context.typing_context, context, builder).run(function, kinds, values)[1]

            return result(*kinds), codegen  # pyright: ignore[reportOptionalCall]

        called.py_func = function  # pyright: ignore[reportAttributeAccessIssue]
        self._register(called, definition)
        return called


def is_traced(function):
    """Whether `traced` has made a function, whose source is then its ``py_func``."""
    return hasattr(function, "py_func") and isinstance(function._numba_type_, types.Function)


_OF_A_CPU = Language(templates, extending)
intrinsic, traced = _OF_A_CPU.intrinsic, _OF_A_CPU.traced
