"""The functions of `_api` inside jitted code: Numba is told of them here, and compiles what is used.

This module is imported with the package, so it imports no kernel. What a function does with its arguments
stands in `_jitted`; here their types are checked.
"""

from typing import Any

import numpy as np
from numba.core import types
from numba.core.errors import TypingError
from numba.extending import overload

from fastmax import _api
from fastmax._process import imported, uninterrupted

# Options that a function would inherit from the one that calls it, were they not given.
_OPTIONS: Any = {"fastmath": False, "error_model": "numpy", "forceinline": False}


def _define(operation):
    """Tell Numba of one of the four functions; it takes what the function itself takes, or says why not."""
    function = getattr(_api, operation.name)
    if operation.elementwise:

        @overload(function, jit_options=_OPTIONS, strict=False, prefer_literal=True)
        def typed_transform(x, /, temperature=1.0, *, axis=0, where=None, out=None):
            return _implementation(operation, x, temperature, axis, where, out)
    else:

        @overload(function, jit_options=_OPTIONS, strict=False, prefer_literal=True)
        def typed_reduction(x, /, temperature=1.0, *, axis=0, where=None, keepdims=False, out=None):
            return _implementation(operation, x, temperature, axis, where, out, keepdims)


def _implementation(operation, x, temperature, axis, where, out, keepdims=False):
    """Function for arguments of some types; defaults come as values, not as types."""
    for name, argument in (("where", where), ("out", out)):
        if _value(argument) is not None:
            raise TypingError(f"{name} is not available inside jitted code, got {argument}")
    if not isinstance(_value(keepdims), bool):
        raise TypingError(f"keepdims must be True or False written out, got {keepdims}")
    x, ndim, dtype = _as_array(x)
    temperature_ndim = _count_temperature_axes(temperature)
    reduced = _count_axes(_value(axis), ndim)
    jitted = uninterrupted(imported, "fastmax._jitted")
    batch_ndim = max(ndim - reduced, temperature_ndim)
    direct = reduced == 1 and isinstance(x, types.Array) and x.aligned and isinstance(x.dtype, types.Float)
    arguments = operation.name, dtype, operation.absent
    if ndim == 0:
        return jitted.of_scalar(*arguments, temperature_ndim, operation.elementwise)
    arguments += _value(keepdims), _is_contiguous(x, ndim, _value(axis))
    if direct and ndim == 1 and batch_ndim == 0 and not _value(keepdims) and _is_integer(_value(axis)):
        return jitted.of_vector(*arguments, operation.elementwise)
    return jitted.of_array(*arguments, ndim, reduced, batch_ndim, direct, operation.elementwise)


def _is_contiguous(x, ndim, axis):
    """Whether slices are contiguous as `_jitted` has it; None if only the call can tell."""
    if getattr(x, "layout", "C") != "C":
        return None
    if ndim == 1 or axis is None or axis in (-1, ndim - 1):
        return True
    return None


def _value(argument):
    """Value of an argument if it is known, else its type."""
    if isinstance(argument, types.NoneType):
        return None
    if isinstance(argument, types.Omitted):
        return argument.value
    return getattr(argument, "literal_value", argument)


def _is_integer(argument):
    """Whether an argument, or its type, is an integer."""
    return isinstance(argument, types.Integer) or (
        isinstance(argument, int | np.integer) and not isinstance(argument, bool)
    )


def _elements(argument):
    """Type of the entries of an array or sequence, or of a number."""
    if isinstance(argument, types.Array | types.UniTuple | types.List | types.ListType):
        return argument.dtype
    return argument


def _as_array(x):
    """Type of x, its number of axes, and the dtype of its result."""
    entry = types.unliteral(_elements(x))
    ndim = getattr(x, "ndim", 0 if entry is x or isinstance(x, types.Literal) else 1)
    if isinstance(entry, types.Boolean | types.Integer) or entry == types.float64:
        return x, ndim, np.dtype(np.float64).type
    if entry == types.float32:
        return x, ndim, np.dtype(np.float32).type
    raise TypingError(f"x must be an array or a sequence of float32, float64, bool or integers, got {x}")


def _count_temperature_axes(temperature):
    """Number of axes of a temperature."""
    if isinstance(temperature := _value(temperature), int | float):
        return 0
    entry = types.unliteral(_elements(temperature))
    if not isinstance(entry, types.Boolean | types.Integer | types.Float):
        raise TypingError(f"temperature must be a real number or an array of them, got {temperature}")
    return getattr(temperature, "ndim", 0 if entry is temperature else 1)


def _types_in(sequence: Any):
    return sequence.types


def _count_axes(axis, ndim):
    """Number of axes that are reduced."""
    if axis is None:
        return ndim
    if _is_integer(axis):
        return min(ndim, 1)
    if isinstance(axis, types.BaseTuple) and all(isinstance(i, types.Integer) for i in _types_in(axis)):
        if len(axis) <= ndim:
            return len(axis)
        raise TypingError(f"axis must name at most the {ndim} axes of x, got {len(axis)}")
    raise TypingError(f"axis must be an integer, a tuple of integers or None, got {axis}")


for _operation in (_api._SOFTMAX, _api._LOG_SOFTMAX, _api._LOGSUMEXP, _api._ENTROPY):
    _define(_operation)
