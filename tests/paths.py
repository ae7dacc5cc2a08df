"""Ways to hand one slice to a function, each forcing a code path by shape, layout or argument.

A path takes one of the four functions, a 1-d slice and a temperature, and returns the function's
result for that slice: an array for softmax and log_softmax, a scalar for the others. The slices
beside it hold ordinary numbers, an infinity and a NaN; none of them may show in the result.
"""

from typing import Literal

import numpy as np

SPREAD = np.random.default_rng(0).normal(scale=3.0, size=4099)
PARALLEL = 70_000  # entries, enough for a schedule to use several threads


def _many(k):
    """Return how many slices of length k make an array large enough for several threads."""
    return max(3, PARALLEL // max(k, 1))


def _beside(x, before, after, order: Literal["C", "F"] = "C"):
    """Return an array with x along the axis len(before), and the index of x in it."""
    shape = (*before, len(x), *after)
    array = np.resize(SPREAD, shape).astype(x.dtype, order=order)
    lead, trail = tuple(n // 2 for n in before), tuple(n // 2 for n in after)
    if len(x):
        array[(*(0 for _ in before), len(x) // 2, *(0 for _ in after))] = np.nan
        array[(*(n - 1 for n in before), 0, *(n - 1 for n in after))] = np.inf
    array[(*lead, slice(None), *trail)] = x
    return array, lead, trail


def _pick(result, array, lead, trail):
    """Return the part of a result that belongs to the slice at an index of the array."""
    if np.ndim(result) == array.ndim:
        return result[(*lead, slice(None), *trail)]
    return result[(*lead, *trail)]


def _batch(before=(), after=(), order: Literal["C", "F"] = "C"):
    def path(function, x, temperature):
        sizes = [tuple(n(len(x)) if callable(n) else n for n in part) for part in (before, after)]
        array, lead, trail = _beside(x, *sizes, order=order)
        return _pick(function(array, temperature, axis=len(lead)), array, lead, trail)

    return path


def vector(function, x, temperature):
    return function(x, temperature)


def strided(function, x, temperature):
    buffer = np.resize(SPREAD, 2 * len(x)).astype(x.dtype)
    buffer[::2] = x
    return function(buffer[::2], temperature)


def reversed_vector(function, x, temperature):
    return function(x[::-1].copy()[::-1], temperature)


def reversed_rows(function, x, temperature):
    array, lead, trail = _beside(x[::-1], (3,), ())
    return _pick(function(array[:, ::-1], temperature, axis=-1), array, lead, trail)


def every_other_column(function, x, temperature):
    array, lead, trail = _beside(x, (), (5,))
    wide = np.repeat(array, 2, axis=1)[:, ::2]
    return _pick(function(wide, temperature), array, lead, trail)


def one_column(function, x, temperature):
    return _pick(function(x[:, np.newaxis], temperature), x[:, np.newaxis], (), (0,))


def negative_axis(function, x, temperature):
    array, lead, trail = _beside(x, (2,), (3, 2))
    return _pick(function(array, temperature, axis=-3), array, lead, trail)


def repeated_row(function, x, temperature):
    array = np.broadcast_to(x, (3, len(x)))
    return _pick(function(array, temperature, axis=1), array, (1,), ())


def two_axes(function, x, temperature):
    shape = (len(x) // 2, 2) if len(x) % 2 == 0 else (len(x), 1)
    array, lead, trail = _beside(x, (), (3,))
    result = function(array.reshape(*shape, 3), temperature, axis=(0, 1))
    return _pick(result.reshape(len(x), 3) if result.ndim == 3 else result, array, lead, trail)


def outer_axes(function, x, temperature):
    shape = (2, len(x) // 2) if len(x) % 2 == 0 else (1, len(x))
    array = np.zeros((shape[0], 3, shape[1]), x.dtype)
    array[:, 1] = x.reshape(shape)
    result = function(array, temperature, axis=(2, 0))
    return result[:, 1].ravel() if result.ndim == 3 else result[1]


def all_axes(function, x, temperature):
    shape = (2, 1, len(x) // 2) if len(x) % 2 == 0 else (1, len(x), 1)
    result = function(x.reshape(shape), temperature, axis=None)
    return result.ravel() if np.ndim(result) == 3 else result


def temperature_per_row(function, x, temperature):
    array, lead, trail = _beside(x, (5,), ())
    temperatures = np.array([0.0, 0.7, temperature, np.inf, temperature])
    return _pick(function(array, temperatures, axis=-1), array, lead, trail)


def temperature_per_column(function, x, temperature):
    array, lead, trail = _beside(x, (), (5,))
    temperatures = np.array([0.0, 0.7, temperature, np.inf, temperature])
    return _pick(function(array, temperatures), array, lead, trail)


def temperatures_of_one_vector(function, x, temperature):
    return function(x, np.array([0.0, temperature, np.inf, 1.0]), axis=-1)[1]


def temperatures_along_the_last_axis(function, x, temperature):
    return function(x, np.array([0.0, temperature, np.inf, 1.0]), axis=0)[..., 1]


def temperature_of_one_array(function, x, temperature):
    array, lead, trail = _beside(x, (3,), ())
    return _pick(function(array, np.array([temperature]), axis=-1), array, lead, trail)


def byte_swapped(function, x, temperature):
    return function(x.astype(x.dtype.newbyteorder("S")), temperature)


def unaligned(function, x, temperature):
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    shifted = buffer[1:].view(x.dtype)
    shifted[...] = x
    return function(shifted, temperature)


def field_of_records(function, x, temperature):
    records = np.zeros(len(x), [("tag", np.int8), ("value", x.dtype)])
    records["value"] = x
    return function(records["value"], temperature)


def masked(function, x, temperature):
    """Absent entries hold NaN."""
    mask = np.resize([True, False, False, True, True, False], 4 * len(x) + 4)
    mask[np.flatnonzero(mask)[len(x) :]] = False
    array = np.full(mask.shape, np.nan, x.dtype)
    array[mask] = x
    return _present(function(array, temperature, where=mask), mask)


def masked_columns(function, x, temperature):
    """Absent rows hold +inf; the mask is broadcast over the columns."""
    array, lead, trail = _beside(x, (), (5,))
    mask = np.resize([False, True], 2 * len(x))
    tall = np.full((2 * len(x), 5), np.inf, x.dtype)
    tall[mask] = array
    result = function(tall, temperature, where=mask[:, np.newaxis])
    return _pick(_present(result, mask), array, lead, trail)


def _present(result, mask):
    """Return the part of a result along axis 0 that is not masked, or the result of a reduction."""
    if np.shape(result)[:1] != mask.shape:
        return result
    absent = result[~mask]
    assert (absent == 0).all() or (absent == -np.inf).all(), f"absent entries are {absent}"
    return result[mask]


def _output(function, array, temperature, axis, out):
    result = function(array, temperature, axis=axis, out=out)
    assert result is out
    return result


def out_given(function, x, temperature):
    shape = np.shape(function(x, temperature))
    return _output(function, x, temperature, 0, np.full(shape, 7, x.dtype))


def out_rows_in_other_order(function, x, temperature):
    array, lead, trail = _beside(x, (3,), (2,))
    shape = np.shape(function(array, temperature, axis=1))
    out = np.full(shape, 7, x.dtype, order="F")
    return _pick(_output(function, array, temperature, 1, out), array, lead, trail)


def out_strided(function, x, temperature):
    array, lead, trail = _beside(x, (), (3,))
    shape = np.shape(function(array, temperature))
    out = np.full((*shape[:-1], 2 * shape[-1]), 7, x.dtype)[..., ::2]
    return _pick(_output(function, array, temperature, 0, out), array, lead, trail)


def in_place(function, x, temperature):
    array = x.copy()
    return _output(function, array, temperature, 0, array)


def in_place_rows(function, x, temperature):
    array, lead, trail = _beside(x, (_many(len(x)),), ())
    return _pick(_output(function, array, temperature, 1, array), array, lead, trail)


def in_place_columns(function, x, temperature):
    array, lead, trail = _beside(x, (), (_many(len(x)),))
    return _pick(_output(function, array, temperature, 0, array), array, lead, trail)


def in_place_strided(function, x, temperature):
    array = np.repeat(x, 3)[::3]
    return _output(function, array, temperature, 0, array)


PATHS = {
    "vector": vector,
    "strided": strided,
    "reversed": reversed_vector,
    "rows": _batch(before=(3,)),
    "many rows": _batch(before=(_many,)),
    "reversed rows": reversed_rows,
    "rows in Fortran order": _batch(before=(3,), order="F"),
    "columns": _batch(after=(5,)),
    "wide columns": _batch(after=(67,)),
    "many columns": _batch(after=(_many,)),
    "one column": one_column,
    "columns in Fortran order": _batch(after=(5,), order="F"),
    "every other column": every_other_column,
    "middle axis": _batch(before=(3,), after=(5,)),
    "middle axis of many": _batch(before=(2,), after=(_many,)),
    "negative axis": negative_axis,
    "repeated row": repeated_row,
    "two axes": two_axes,
    "outer axes": outer_axes,
    "all axes": all_axes,
    "temperature per row": temperature_per_row,
    "temperature per column": temperature_per_column,
    "temperatures of one vector": temperatures_of_one_vector,
    "temperatures along the last axis": temperatures_along_the_last_axis,
    "temperature of one array": temperature_of_one_array,
    "byte swapped": byte_swapped,
    "unaligned": unaligned,
    "field of records": field_of_records,
    "masked": masked,
    "masked columns": masked_columns,
    "out given": out_given,
    "out in other order": out_rows_in_other_order,
    "out strided": out_strided,
}

# out is x itself, which has the shape of the result for these two functions alone
IN_PLACE = {
    "in place": in_place,
    "in place rows": in_place_rows,
    "in place columns": in_place_columns,
    "in place strided": in_place_strided,
}
