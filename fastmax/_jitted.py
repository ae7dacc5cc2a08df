"""The functions of `_api` for jitted callers: any strides, any axes, temperatures that broadcast.

A slice goes to the kernel of `_slice` for one vector, on the thread of the caller, whose ``prange`` decides
about threads. Slices that lie in memory as such are taken where they lie; others, of several axes or of
integers, are copied to working memory first.
"""

import functools
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload
from numba.np.unsafe import ndarray
from numpy.exceptions import AxisError

from fastmax import _slice
from fastmax._jit import jit
from fastmax._lanes import as_contiguous, slice_at

# What it makes is called with other arguments than its source says.
to_fixed_tuple: Any = ndarray.to_fixed_tuple


# -- arguments ------------------------------------------------------------------------------------


@jit(raises=True)
def normalized(axis, ndim):
    """Axis as a non-negative number."""
    if not -ndim <= axis < ndim:
        raise AxisError(axis, ndim, "axis")
    return axis + ndim if axis < 0 else axis


@jit(raises=True)
def checked(temperature):
    """Temperature as a float64 in [0, inf]."""
    value = np.float64(temperature)
    if not value >= 0.0:
        raise ValueError("temperature must be in [0, inf], got", value)
    return value


def given_axes(axis, ndim) -> Any:
    """Axes as they were given, in an array."""
    raise NotImplementedError("given_axes is for jitted code only")


@overload(given_axes)
def _given_axes(axis, ndim):
    if isinstance(axis, types.NoneType) or getattr(axis, "value", 0) is None:
        return lambda axis, ndim: np.arange(ndim)
    if isinstance(axis, types.BaseTuple) and len(axis) == 0:
        return lambda axis, ndim: np.empty(0, np.intp)
    if isinstance(axis, types.BaseTuple):
        return lambda axis, ndim: np.array(axis).astype(np.intp)
    return lambda axis, ndim: np.array([axis]).astype(np.intp)


@jit(raises=True)
def sorted_axes(axis, ndim, full):
    """Return the reduced axes in ascending order, and their places among the ``full`` axes of the result."""
    given = given_axes(axis, ndim)
    axes = np.empty(len(given), np.intp)
    for i in range(len(given)):
        axes[i] = normalized(given[i], ndim)
    order = np.argsort(axes)
    axes = axes[order]
    places = given[order] % full
    for i in range(1, len(axes)):
        if axes[i] == axes[i - 1]:
            raise ValueError("axis must not name an axis twice, got", axis)
    for i in range(len(places)):
        for j in range(i):
            if places[i] == places[j]:
                return axes, axes
    return axes, places


# -- plans ----------------------------------------------------------------------------------------
# Shapes and steps (strides in bytes) as arrays, of the batch: one entry for each of its axes.


@jit
def plan(shape, strides, axes, temperatures, ndim):
    """Shape of the batch, of ``ndim`` axes, and the steps of x and of the temperatures along them."""
    temperature_shape, temperature_strides = as_array(temperatures.shape), as_array(temperatures.strides)
    batch, steps = np.ones(ndim, np.intp), np.zeros(ndim, np.intp)
    temperature_steps = np.zeros(ndim, np.intp)
    at = ndim - (len(shape) - len(axes))
    for i in range(len(shape)):
        if not np.any(axes == i):
            batch[at], steps[at] = shape[i], strides[i]
            at += 1
    first = max(0, len(temperature_shape) - ndim)  # a number among temperatures has one axis
    at = ndim - len(temperature_shape)
    for i in range(first, len(temperature_shape)):
        size = temperature_shape[i]
        if size != 1:
            if batch[at + i] == 1:
                batch[at + i], steps[at + i] = size, 0
            elif batch[at + i] != size:
                raise ValueError(
                    "temperature does not broadcast against the shape of x without its reduced axes"
                )
            temperature_steps[at + i] = temperature_strides[i]
    return batch, steps, temperature_steps


@jit
def with_axes(batch, places, sizes):
    """`batch` with axes of the given sizes put in at the given places."""
    result = np.empty(len(batch) + len(places), np.intp)
    taken = 0
    for i in range(len(result)):
        here = -1
        for j in range(len(places)):
            if places[j] == i:
                here = j
        if here < 0:
            result[i] = batch[taken]
            taken += 1
        else:
            result[i] = sizes[here]
    return result


@jit
def without_axes(values, places):
    """`values` except those at the given places."""
    result = np.empty(len(values) - len(places), np.intp)
    taken = 0
    for i in range(len(values)):
        if not np.any(places == i):
            result[taken] = values[i]
            taken += 1
    return result


@jit
def product(sizes):
    """Product of sizes."""
    result = 1
    for size in sizes:
        result *= size
    return result


@jit
def offset_of(number, sizes, steps):
    """Offset of an entry by its number in C order."""
    offset = 0
    for i in range(len(sizes) - 1, -1, -1):
        offset += number % sizes[i] * steps[i]
        number //= sizes[i]
    return offset


@jit
def at_offset(array, offset):
    """Entry that stands some bytes behind the first."""
    return slice_at(array, offset, 1, 0)[0]


def as_array(sizes) -> Any:
    """Tuple of sizes as an array."""
    raise NotImplementedError("as_array is for jitted code only")


@overload(as_array)
def _as_array(sizes):
    if len(sizes) == 0:
        return lambda sizes: np.empty(0, np.intp)
    return lambda sizes: np.array(sizes)


def entries_in(x) -> Any:
    """Numbers, sequences and arrays as an array; a number has one axis, and so has an array without any."""
    raise NotImplementedError("entries_in is for jitted code only")


@overload(entries_in)
def _entries_in(x):
    if isinstance(x, types.Array):
        return (lambda x: x) if x.ndim else (lambda x: x.reshape(1))
    if isinstance(x, types.Number | types.Boolean):
        return lambda x: np.array([x])
    return lambda x: np.asarray(x)


@jit
def temperatures_in(temperature):
    """Temperatures as a float64 array in [0, inf]."""
    given = entries_in(temperature)
    values = np.empty(given.shape, np.float64)
    for i in range(given.size):
        values.flat[i] = checked(given.flat[i])
    return values


# -- slices ---------------------------------------------------------------------------------------


# Each kernel takes seconds to compile, so where types tell of contiguous slices or of others, one will do.
# It is a name in these functions, not an argument: Numba caches no caller that holds its address.


@functools.cache
def filler(name, contiguous):
    """Function that writes the results for a slice which lies from the first byte of x on.

    Slices are ``contiguous`` or not, or the function takes both (None). Its ``work`` has room for n entries.
    """
    run, run_strided = getattr(_slice, name), getattr(_slice, f"strided_{name}")

    def fill_contiguous(x, n, stride, packed, temperature, out, to, out_stride, work):
        results = slice_at(out, to, n, out_stride)
        if out_stride == out.itemsize:
            run(as_contiguous(slice_at(x, 0, n, stride)), temperature, as_contiguous(results))
        else:
            run(as_contiguous(slice_at(x, 0, n, stride)), temperature, work)
            for i in range(n):
                results[i] = work[i]

    def fill_strided(x, n, stride, packed, temperature, out, to, out_stride, work):
        run_strided(slice_at(x, 0, n, stride), temperature, slice_at(out, to, n, out_stride))

    if contiguous is not None:
        return jit(fill_contiguous if contiguous else fill_strided)
    fill_packed, fill_spaced = filler(name, True), filler(name, False)

    @jit
    def fill(x, n, stride, packed, temperature, out, to, out_stride, work):
        if packed:
            fill_packed(x, n, stride, packed, temperature, out, to, out_stride, work)
        else:
            fill_spaced(x, n, stride, packed, temperature, out, to, out_stride, work)

    return fill


@functools.cache
def valuer(name, contiguous):
    """Function that returns the value of a slice; else as `filler`."""
    run, run_strided = getattr(_slice, name), getattr(_slice, f"strided_{name}")

    def value_contiguous(x, n, stride, packed, temperature):
        return run(as_contiguous(slice_at(x, 0, n, stride)), temperature)

    def value_strided(x, n, stride, packed, temperature):
        return run_strided(slice_at(x, 0, n, stride), temperature)

    if contiguous is not None:
        return jit(value_contiguous if contiguous else value_strided)
    value_packed, value_spaced = valuer(name, True), valuer(name, False)

    @jit
    def value(x, n, stride, packed, temperature):
        if packed:
            return value_packed(x, n, stride, packed, temperature)
        return value_spaced(x, n, stride, packed, temperature)

    return value


@jit
def gather(x, offset, sizes, steps, work):
    """Copy a slice to working memory."""
    for i in range(len(work)):
        work[i] = at_offset(x, offset + offset_of(i, sizes, steps))


# -- implementations, one for each kind of arguments --------------------------------------------------


def of_vector(name, dtype, absent, keep, contiguous, elementwise):
    """Implementation for a vector of floats, contiguous or not (None if either), and one temperature."""
    run = (filler if elementwise else valuer)(name, contiguous)

    def transform(x, temperature=1.0, axis=0, where=None, out=None):
        normalized(axis, 1)
        own, n, stride = checked(temperature), len(x), x.strides[0]
        result = np.empty(n, dtype)
        if n > 0:
            packed = stride == x.itemsize or n == 1
            run(x, n, stride, packed, own, result, 0, result.itemsize, result)
        return result

    def reduction(x, temperature=1.0, axis=0, where=None, keepdims=keep, out=None):
        normalized(axis, 1)
        own, n, stride = checked(temperature), len(x), x.strides[0]
        if n == 0:
            return dtype(absent)
        return run(x, n, stride, stride == x.itemsize or n == 1, own)

    return transform if elementwise else reduction


def of_array(name, dtype, absent, keep, contiguous, ndim, reduced, batch_ndim, direct, elementwise):
    """Implementation for any array; ``direct`` if slices can be taken where they lie.

    Results that are one value for each slice keep the reduced axes if ``keep``; ``contiguous`` is as in
    `of_vector`.
    """
    run = (filler if elementwise else valuer)(name, contiguous)
    full = batch_ndim + reduced
    result_ndim = full if keep else batch_ndim

    def transform(x, temperature=1.0, axis=0, where=None, out=None):
        x, temperatures = entries_in(x), temperatures_in(temperature)
        axes, places = sorted_axes(axis, ndim, full)
        shape, strides = as_array(x.shape), as_array(x.strides)
        batch, steps, temperature_steps = plan(shape, strides, axes, temperatures, batch_ndim)
        sizes, strides = shape[axes], strides[axes]
        n, count = product(sizes), product(batch)
        result = np.empty(to_fixed_tuple(with_axes(batch, places, sizes), full), dtype)
        if n == 0 or count == 0:
            return result
        out_strides = as_array(result.strides)
        out_steps, out_strides = without_axes(out_strides, places), out_strides[places]
        packed = n == 1 or strides[-1] == x.itemsize
        work, results = np.empty(n, dtype), np.empty(n, dtype)
        for number in range(count):
            offset, to = offset_of(number, batch, steps), offset_of(number, batch, out_steps)
            own = at_offset(temperatures, offset_of(number, batch, temperature_steps))
            if direct:
                source = slice_at(x, offset, n, strides[0])
                run(source, n, strides[0], packed, own, result, to, out_strides[0], results)
            else:
                gather(x, offset, sizes, strides, work)
                run(work, n, work.itemsize, packed, own, results, 0, work.itemsize, results)
                for i in range(n):
                    slice_at(result, to + offset_of(i, sizes, out_strides), 1, 0)[0] = results[i]
        return result

    def reduction(x, temperature=1.0, axis=0, where=None, keepdims=keep, out=None):
        x, temperatures = entries_in(x), temperatures_in(temperature)
        axes, places = sorted_axes(axis, ndim, full)
        shape, strides = as_array(x.shape), as_array(x.strides)
        batch, steps, temperature_steps = plan(shape, strides, axes, temperatures, batch_ndim)
        sizes, strides = shape[axes], strides[axes]
        n, count = product(sizes), product(batch)
        values = np.full(count, dtype(absent), dtype)
        packed = n == 1 or (n > 0 and strides[-1] == x.itemsize)
        work = np.empty(n, dtype)
        for number in range(count if n > 0 else 0):
            offset = offset_of(number, batch, steps)
            own = at_offset(temperatures, offset_of(number, batch, temperature_steps))
            if direct:
                source = slice_at(x, offset, n, strides[0])
                values[number] = run(source, n, strides[0], packed, own)
            else:
                gather(x, offset, sizes, strides, work)
                values[number] = run(work, n, work.itemsize, packed, own)
        return shaped(values, batch, places)

    def scalar(values, batch, places):
        return values[0]

    def array(values, batch, places):
        return values.reshape(to_fixed_tuple(batch, result_ndim))

    def array_of_all_axes(values, batch, places):
        sizes = with_axes(batch, places, np.ones(len(places), np.intp))
        return values.reshape(to_fixed_tuple(sizes, result_ndim))

    shaped = jit(scalar if result_ndim == 0 else array_of_all_axes if keep else array)
    return transform if elementwise else reduction


def of_scalar(name, dtype, absent, temperature_ndim, elementwise):
    """Implementation for a number, or an array without axes: a slice of one entry."""
    run = jit(of_array(name, dtype, absent, False, True, 1, 1, temperature_ndim, False, elementwise))

    def transform(x, temperature=1.0, axis=0, where=None, out=None):
        check_of_scalar(axis)
        return run(entries_in(x), temperature, 0)[0]

    def reduction(x, temperature=1.0, axis=0, where=None, keepdims=False, out=None):
        check_of_scalar(axis)
        return run(entries_in(x), temperature, 0)

    return transform if elementwise else reduction


def check_of_scalar(axis) -> Any:
    """Refuse axes that a number does not have."""
    raise NotImplementedError("check_of_scalar is for jitted code only")


@overload(check_of_scalar)
def _check_of_scalar(axis):
    if not isinstance(axis, types.Integer):
        return lambda axis: None

    def check(axis):
        if axis != 0 and axis != -1:
            raise AxisError(axis, 0, "axis")

    return check
