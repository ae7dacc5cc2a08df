"""Public functions: arguments are checked here, and the kernels that suit them chosen."""

import contextlib
import functools
import itertools
import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastmax._layout import has_rows, layout_of, step_of
from fastmax._process import imported, uninterrupted

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
_ARRAY = np.ndarray

# Entries up to which a vector goes straight to its kernel, on one thread (see PARALLEL_SLICE in `_threads`).
_SMALL = 2**17

# Entries up to which arrays that do not lie as kernels take them are copied without more ado.
_FEW_APART = 2**14

# Entries, and those of a slice, up to which slices whose entries lie apart are packed side by side first: of
# 32 x 20 every other column takes 0.7 of the time for it, and of 4 x 600 it would take 1.5 times as long.
_FEW_COPIED = 2**12, 100

# Entries up to which a slice at several temperatures is summed one after the other if they lie apart.
_FEW_STRIDED = 2**10

# Bytes of the slices that are copied at a time where they do not lie as kernels take them: half of a second
# cache, as results may be copied, too.
_BLOCK = 2**20

# Entries up to which rows and columns do, and bytes of a row below which: 32 rows of 64 float32 take 7.4 us,
# and 12.9 by way of the schedule. So many bytes are five vectors of the smallest kind; narrow rows of fewer,
# and only these, are summed as others are.
_FEW = 2**13, 320

# Entries below which columns do with any number of neighbours, and bytes of neighbours from which others do:
# 10 x 32 float32 take 2.1 us, and 5.6 by way of the schedule, which has better ways for fewer neighbours.
_FEW_COLUMNS = 2**10, 64


class _Kernels:
    """Kernels of an operation, which are imported when they are first called, by the end of their names.

    A `functools.cached_property` has a lock in Python 3.11, which a fork in another thread would leave locked
    for good.
    """

    def __init__(self, module, end=""):
        self._module = module
        self._end = end

    def __set_name__(self, owner, name):
        self._kind = name

    def __get__(self, operation, owner) -> Any:
        kernels = getattr(_imported(self._module), operation.name + self._end)
        setattr(operation, self._kind, kernels)  # which then come before this
        return kernels


class Operation:
    """One of the four functions, and its kernels.

    ``elementwise`` says whether the result has the shape of x, else it is one value per slice; ``absent`` is
    the value of an entry where ``where`` is False, or of a slice of which nothing is left. The kernels:

    - ``vector``: one vector, on one thread, by dtype;
    - ``few_rows``, ``few_columns``: a few narrow rows, or columns, on one thread, by dtype;
    - ``schedule``: packed slices, on all threads;
    - ``apart``: slices whose entries lie apart, on all threads;
    - ``broadcast``: slices of any stride, against temperatures of any shape.
    """

    vector = _Kernels("_slice", "_vector")
    few_rows = _Kernels("_rows", "_few_rows")
    few_columns = _Kernels("_columns", "_few_columns")
    schedule = _Kernels("_cpu")
    apart = _Kernels("_apart")
    broadcast = _Kernels("_gufunc")

    def __init__(self, name, elementwise, absent):
        self.name = name
        self.elementwise = elementwise
        self.absent = absent


@functools.cache
def _imported(name) -> Any:
    """A module of kernels; to be interrupted in the middle would leave it, and Numba, half imported."""
    return uninterrupted(imported, f"fastmax.{name}")


_SOFTMAX = Operation("softmax", True, 0.0)
_LOG_SOFTMAX = Operation("log_softmax", True, -math.inf)
_LOGSUMEXP = Operation("logsumexp", False, -math.inf)
_ENTROPY = Operation("entropy", False, 0.0)


def softmax(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, out=None):
    r"""Softmax with temperature.

    .. math:: \sigma_T(x)_i = \frac{\exp(x_i / T)}{\sum_j \exp(x_j / T)}

    with its limits at both ends: at T = 0 the mass is split evenly among the entries equal to the maximum,
    at T = inf evenly among all entries.

    Parameters
    ----------
    x : array_like
        Real values of any shape: float16, bfloat16 (``ml_dtypes``), float32, float64, or bool and integers,
        which are taken as float64. In the unit of the temperature.
    temperature : array_like, optional
        Real values in [0, inf], in the unit of `x`: one for all slices, or an array that broadcasts against
        the shape of `x` with `axis` removed, as in a generalised ufunc ``(n),()->(n)``. It is used in
        float64 and leaves the dtype of the result alone.
    axis : int, tuple of int, or None, optional
        Axis or axes whose entries form a slice, that is, sum to 1; None stands for all of them.
    where : array_like of bool, optional
        Entries to take into account, broadcast to the shape of `x`; the others count as absent.
    out : ndarray, optional
        Array for the result, of its shape and dtype. It may be `x` itself.

    Returns
    -------
    ndarray or scalar
        Probabilities in the dtype of `x` (float64 for bool and integers). The shape is that of `x`,
        broadcast with the temperature.

    Raises
    ------
    TypeError
        If `x` is complex, longdouble, object or a string, or a masked array (use `where`); if a temperature
        is not real, an axis no integer, `where` not boolean, or `out` no ndarray.
    ValueError
        If a temperature is negative or NaN, or a shape does not fit, or `out` shares some of the memory
        that is read from `x`.
    numpy.exceptions.AxisError
        If `axis` is out of bounds.

    Notes
    -----
    The error is below 2 ulp in float32 and float64, for every length, temperature and offset of `x`; a search
    for the worst of three entries came to 1.6. float16 and bfloat16 are computed in float32 and rounded once.
    A slice has the same bits whatever the number of threads and whatever stands beside it.

    An entry -inf has the mass 0 at every temperature. Entries +inf share the mass evenly. A slice that has a
    NaN in it, or that is -inf throughout, is NaN. Entries where `where` is False are 0.

    The products of x and of its maximum with log2(e) / T, and the sum, are held as pairs of numbers, by
    the error-free transformations of [1]_; the exponential is a minimax polynomial for 2**f.

    References
    ----------
    .. [1] T. Ogita, S. M. Rump, S. Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005),
       :doi:`10.1137/030601818`.

    Examples
    --------
    >>> from fastmax import softmax
    >>> softmax([1, 2, 3])
    array([0.09003057, 0.24472847, 0.66524096])
    >>> softmax([1, 3, 3], temperature=0)
    array([0. , 0.5, 0.5])

    A sweep of temperatures, one row each:

    >>> softmax([1, 2, 3], [0, 0.5, float("inf")], axis=-1)
    array([[0.        , 0.        , 1.        ],
           [0.01587624, 0.11731043, 0.86681333],
           [0.33333333, 0.33333333, 0.33333333]])
    """
    return _transformed(_SOFTMAX, x, temperature, axis, where, out)


def log_softmax(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, out=None):
    r"""Logarithm of the softmax with temperature.

    .. math:: \log \sigma_T(x)_i = \frac{x_i - \max x}{T} - \log \sum_j \exp \frac{x_j - \max x}{T}

    Parameters
    ----------
    x : array_like
        Real values of any shape and of the dtypes that `softmax` takes.
    temperature : array_like, optional
        Real values in [0, inf]: one for all slices, or an array that broadcasts against the shape of `x`
        with `axis` removed.
    axis : int, tuple of int, or None, optional
        Axis or axes whose entries form a slice; None stands for all of them.
    where : array_like of bool, optional
        Entries to take into account, broadcast to the shape of `x`; the others count as absent.
    out : ndarray, optional
        Array for the result, of its shape and dtype. It may be `x` itself.

    Returns
    -------
    ndarray or scalar
        Natural logarithms of the probabilities, in the dtype of `x` (float64 for bool and integers) and its
        shape, broadcast with the temperature.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax` does.

    Notes
    -----
    The error is at most 4 ulp in float32 and float64; a search for the worst came to 3.1. At T = 0 the
    entries below the maximum are -inf, and the others minus the logarithm of their number. An entry -inf
    stays -inf. Slices with NaN, or that are -inf throughout, are NaN. Entries where `where` is False are
    -inf.

    Examples
    --------
    >>> from fastmax import log_softmax
    >>> log_softmax([0.0, -100.0])
    array([-3.72007598e-44, -1.00000000e+02])
    >>> log_softmax([1, 3, 3], temperature=0)
    array([       -inf, -0.69314718, -0.69314718])
    """
    return _transformed(_LOG_SOFTMAX, x, temperature, axis, where, out)


def logsumexp(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, keepdims=False, out=None):
    r"""Logarithm of a sum of exponentials with temperature, a smooth maximum.

    .. math:: T \log \sum_j \exp(x_j / T)

    Parameters
    ----------
    x : array_like
        Real values of any shape and of the dtypes that `softmax` takes.
    temperature : array_like, optional
        Real values in [0, inf]: one for all slices, or an array that broadcasts against the shape of `x`
        with `axis` removed.
    axis : int, tuple of int, or None, optional
        Axis or axes whose entries form a slice; None stands for all of them.
    where : array_like of bool, optional
        Entries to take into account, broadcast to the shape of `x`; the others count as absent.
    keepdims : bool, optional
        Whether the reduced axes stay, with size 1.
    out : ndarray, optional
        Array for the result, of its shape and dtype.

    Returns
    -------
    ndarray or scalar
        One value per slice, in the unit and dtype of `x` (float64 for bool and integers).

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax` does.

    Notes
    -----
    The error is at most 4 ulp of the largest of abs(max(x)), abs(T log(sum)) and the result, but for 4.01,
    which a search for the worst came to in float64 where the maximum is 0 and the terms of all other entries
    are below 2**-53 together. The value at T = 0 is the maximum; at T = inf it is +inf, or the entry itself
    if only one is not -inf. With an entry +inf it is +inf, with NaN it is NaN, with nothing but -inf, or with
    nothing at all, it is -inf.

    Examples
    --------
    >>> from fastmax import logsumexp
    >>> logsumexp([1000.0, 1000.0])
    np.float64(1000.6931471805599)
    >>> logsumexp([[1, 2], [3, 4]], [0.0, 1.0], axis=1)
    array([2.        , 4.31326169])
    """
    return _reduced(_LOGSUMEXP, x, temperature, axis, where, out, keepdims)


def entropy(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, keepdims=False, out=None):
    r"""Entropy of the softmax with temperature, in nats.

    .. math:: H = -\sum_i \sigma_T(x)_i \log \sigma_T(x)_i

    Parameters
    ----------
    x : array_like
        Real values of any shape and of the dtypes that `softmax` takes.
    temperature : array_like, optional
        Real values in [0, inf]: one for all slices, or an array that broadcasts against the shape of `x`
        with `axis` removed.
    axis : int, tuple of int, or None, optional
        Axis or axes whose entries form a slice; None stands for all of them.
    where : array_like of bool, optional
        Entries to take into account, broadcast to the shape of `x`; the others count as absent.
    keepdims : bool, optional
        Whether the reduced axes stay, with size 1.
    out : ndarray, optional
        Array for the result, of its shape and dtype.

    Returns
    -------
    ndarray or scalar
        One value per slice, from 0 to log(k) for k entries, in the dtype of `x` (float64 for bool and
        integers).

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax` does.

    Notes
    -----
    The error is at most 1e-14 (float64) or 1e-6 (float32) of log(k). The value at T = 0 is the logarithm of
    the number of entries equal to the maximum, at T = inf of those that are not -inf. With NaN, or with
    nothing but -inf, it is NaN; with no entry at all it is 0.

    Examples
    --------
    >>> from fastmax import entropy
    >>> entropy([1, 3, 3], [0.0, 1.0, float("inf")])
    array([0.69314718, 0.88538155, 1.09861229])
    """
    return _reduced(_ENTROPY, x, temperature, axis, where, out, keepdims)


# -- the short way: plain arrays, one temperature, one axis --------------------------------------------


def _as_float(temperature):
    """Return a number as a float, anything else as it is."""
    if type(temperature) in (int, np.float64, np.float32):
        with contextlib.suppress(OverflowError):
            return float(temperature)
    return temperature


def _is_plain(x, axis):
    """Whether x is an array that kernels take as it is, and the axis one of its own."""
    if type(x) is not _ARRAY or type(axis) is not int:
        return False
    ndim = x.ndim
    return -ndim <= axis < ndim and x.size > 0 and x.flags.carray


def _transformed(operation, x, temperature, axis, where, out) -> Any:
    """Result of the shape of x, by the short way if that is open.

    Three entries take 0.85 us. They took 1.4 us with `_is_plain` called, Numba looking up types, and shape
    and place of ``out`` compared here and not in the kernels.
    """
    if type(temperature) is not float:
        temperature = _as_float(temperature)
    if where is None and type(x) is _ARRAY and type(temperature) is float and type(axis) is int:
        dtype, ndim, size = x.dtype, x.ndim, x.size
        if (
            (dtype is _FLOAT64 or dtype is _FLOAT32)
            and -ndim <= axis < ndim
            and temperature >= 0.0
            and size > 0
            and x.flags.carray
            and (
                out is None
                or (type(out) is _ARRAY and out.dtype is dtype and out.ndim == ndim and out.flags.carray)
            )
        ):
            result = np.empty_like(x) if out is None else out
            if ndim == 1 and size <= _SMALL:
                fits = operation.vector[dtype](x, temperature, result)
            else:
                shape = x.shape
                kernel, blocks = _way(operation, shape, axis, dtype)
                if kernel is not None and shape == blocks:
                    fits = kernel(x, temperature, result)
                elif fits := out is None or (out.shape == shape and not _overlaps_in_part(out, x)):
                    entries, results = x, result
                    if shape != blocks:
                        entries, results = x.reshape(blocks), result.reshape(blocks)
                    if kernel is not None:
                        kernel(entries, temperature, results)
                    else:
                        operation.schedule(entries, None, _as_array_of_one(temperature), results)
            if fits:
                return result
        elif _is_short_apart(x, temperature, axis) and (out is None or _can_take(out, x)):
            return _transform_apart(operation, x, temperature, axis, out)
    elif _is_short_masked(x, temperature, axis, where, out):
        return _run_plain(operation, x, _as_array_of_one(temperature), axis, where, out)
    return _evaluate(operation, x, temperature, axis, where, out)


@functools.lru_cache(maxsize=256)
def _way(operation, shape, axis, dtype):
    """Kernel for a few rows or columns, None where the schedule has them, and the shape that either takes."""
    outer, n, *inner = blocks = _around(shape, axis)
    size, (least, enough) = math.prod(shape), _FEW_COLUMNS
    if size <= _FEW[0] and not inner and n * dtype.itemsize < _FEW[1]:
        return operation.few_rows[dtype], blocks
    if size <= _FEW[0] and inner and outer == 1 and (size < least or inner[0] * dtype.itemsize >= enough):
        return operation.few_columns[dtype], blocks[1:]
    return None, blocks


def _is_short_masked(x, temperature, axis, where, out):
    """Whether an array, its mask and ``out`` lie as kernels take them: 9 us for 32 x 10, the long way 20."""
    return (
        type(where) is _ARRAY
        and type(temperature) is float
        and _is_plain(x, axis)
        and (x.dtype is _FLOAT64 or x.dtype is _FLOAT32)
        and temperature >= 0.0
        and _fit(x, where, out)
    )


def _is_short_apart(x, temperature, axis):
    """Whether an array that is not C-contiguous, or read-only, is small or has no neighbours in memory."""
    return (
        not x.flags.carray
        and (x.dtype is _FLOAT64 or x.dtype is _FLOAT32)
        and -x.ndim <= axis < x.ndim
        and temperature >= 0.0
        and x.size > 0
        and (x.size <= _FEW_APART or (x.itemsize not in x.strides and x.flags.aligned))
    )


def _can_take(out, x):
    """Whether the result of x can be copied to ``out``."""
    return (
        type(out) is _ARRAY
        and out.dtype is x.dtype
        and out.shape == x.shape
        and out.flags.writeable
        and not _overlaps_in_part(out, x)
    )


def _transform_apart(operation, x, temperature, axis, out):
    """Result of the shape of x: every other column of 64 x 64 float64 takes 10 us, by the long way 60."""
    result = np.empty_like(x) if out is None else out
    one = _as_array_of_one(temperature)
    if _is_copied(x, axis) or not _run_apart(operation, x, None, one, (axis % x.ndim,), result):
        entries, shape, order = _copied(x, axis)
        values = np.empty_like(entries)
        operation.schedule(entries.reshape(shape), None, one, values.reshape(shape))
        result.transpose(order)[...] = values
    return result


def _reduce_apart(operation, x, temperature, axis, shape):
    """One value per slice, in an array of a shape."""
    values = np.empty(shape, x.dtype)
    one = _as_array_of_one(temperature)
    slices = values.reshape(x.shape[:axis] + x.shape[axis:][1:])
    if _is_copied(x, axis) or not _run_apart(operation, x, None, one, (axis % x.ndim,), slices):
        entries, blocks, _ = _copied(x, axis)
        operation.schedule(entries.reshape(blocks), None, one, values.reshape(blocks[::2]))
    return values[()]


def _is_copied(x, axis):
    """Whether an array is packed in another order, or so small that it had better be packed at once."""
    return x.flags.forc or (x.size <= _FEW_COPIED[0] and x.shape[axis] <= _FEW_COPIED[1])


def _run_apart(operation, x, mask, temperature, axes, result):
    """Whether entries of slices lie apart at equal distances, and the result has been written."""
    if not (x.flags.aligned and result.flags.aligned) or (mask is not None and _has_neighbours(x, axes)):
        return False
    layout, kept = layout_of(x, mask, axes, result)
    if layout is None or has_rows(layout):
        return False
    temperatures = _one_per_slice(temperature, x.shape, axes, kept)
    bytes_of_mask = None if mask is None else _writeable(mask.view(np.uint8))
    operation.apart(_as_stored(x), bytes_of_mask, layout, temperatures, _as_stored(result))
    return True


def _has_neighbours(x, axes):
    """Whether many slices are neighbours in memory: masked, they are copied as lanes, not entry by entry."""
    return any(x.strides[i] == x.itemsize and x.shape[i] >= 16 for i in _kept(axes, range(x.ndim)))


def _run_broadcast(operation, slices, temperature, result):
    """Write the result of slices, which lie along the last axis, at temperatures that broadcast with them.

    One after the other, unless their entries lie apart, and are so many that they had better be in lanes.
    """
    n = slices.shape[-1]
    repeated = np.broadcast_to(slices, (*result.shape[: result.ndim - operation.elementwise], n))
    if n <= _FEW_STRIDED or not _run_apart(
        operation, repeated, None, temperature, (repeated.ndim - 1,), result
    ):
        operation.broadcast(slices, temperature, result)


def _copied(x, axis):
    """Entries of x, packed; the shape in which kernels take them; and the order of axes that they have.

    Contiguous slices are taken as rows and others as columns, see `_run_in_blocks`.
    """
    order = list(range(x.ndim))
    axis = order.pop(axis)
    n = x.shape[axis]
    if x.strides[axis] == x.itemsize:
        order, shape = [*order, axis], (-1, n)
    else:
        order, shape = [axis, *order], (1, n, x.size // n)
    entries = x.transpose(order)
    if not (entries.flags.c_contiguous and entries.flags.aligned):
        entries = entries.copy()
    return _writeable(entries), shape, order


def _reduced(operation, x, temperature, axis, where, out, keepdims) -> Any:
    """One value per slice, by the short way if that is open: 3 us for 4 x 64, else 60."""
    if keepdims is not False:
        keepdims = _as_flag(keepdims)
    temperature = _as_float(temperature)
    if where is None and type(x) is _ARRAY and type(temperature) is float and type(axis) is int:
        shape = x.shape[:axis] + ((1,) if keepdims else ()) + x.shape[axis:][1:]
        if (
            _is_plain(x, axis)
            and (x.dtype is _FLOAT64 or x.dtype is _FLOAT32)
            and temperature >= 0.0
            and (out is None or _can_take_values(out, x, shape))
        ):
            return _reduce_plain(operation, x, temperature, axis, shape, out)
        if out is None and _is_short_apart(x, temperature, axis):
            return _reduce_apart(operation, x, temperature, axis, shape)
    elif out is None and not keepdims and _is_short_masked(x, temperature, axis, where, out):
        return _run_plain(operation, x, _as_array_of_one(temperature), axis, where, out)
    return _evaluate(operation, x, temperature, axis, where, out, keepdims)


def _can_take_values(out, x, shape):
    """Whether kernels can write one value per slice of x to ``out``."""
    return (
        type(out) is _ARRAY
        and out.dtype is x.dtype
        and out.shape == shape
        and out.flags.carray
        and not np.may_share_memory(out, x)
    )


def _reduce_plain(operation, x, temperature, axis, shape, out) -> Any:
    """Values of the shape of the result, in ``out`` if there is one."""
    if x.ndim == 1 and x.size <= _SMALL:
        value = x.dtype.type(operation.vector[x.dtype](x, temperature))
        if out is None:
            return np.full(shape, value) if shape else value
        out[...] = value
        return out
    values = np.empty(shape, x.dtype) if out is None else out
    kernel, blocks = _way(operation, x.shape, axis, x.dtype)
    entries = x.reshape(blocks)
    if kernel is not None:
        kernel(entries, temperature, values.reshape(-1))
    else:
        operation.schedule(entries, None, _as_array_of_one(temperature), values.reshape(blocks[::2]))
    return values[()] if out is None else out


@functools.lru_cache(maxsize=64)
def _as_array_of_one(temperature):
    return np.array([temperature])


@functools.lru_cache(maxsize=256)
def _around(shape, axis):
    """Number of entries before, along and, unless that is 1, after an axis."""
    inner = math.prod(shape[axis:][1:])
    return (math.prod(shape[:axis]), shape[axis], inner)[: 2 if inner == 1 else 3]


def _fit(x, where, out):
    """Whether a mask and ``out`` are None or lie as x does."""
    if not (out is None or (_can_take(out, x) and out.flags.carray)):
        return False
    return where is None or (
        type(where) is _ARRAY
        and where.dtype == bool
        and where.shape == x.shape
        and where.flags.c_contiguous
        and (out is None or not np.may_share_memory(out, where))
    )


def _fit_slices(x, temperature, axis, out):
    """Whether temperatures are one or lie as slices of x do."""
    return temperature.ndim == 0 or (
        temperature.shape == x.shape[:axis] + x.shape[axis:][1:]
        and temperature.flags.c_contiguous
        and temperature.flags.aligned
        and (out is None or not np.may_share_memory(out, temperature))
    )


def _run_plain(operation, x, temperature, axis, where, out) -> Any:
    """As `_transformed` and `_reduced`, with a mask, a temperature for each slice, or 16 bits."""
    if where is None and temperature.ndim == 0 and x.itemsize > 2:
        if operation.elementwise:
            return _transformed(operation, x, float(temperature), axis, None, out)
        return _reduced(operation, x, float(temperature), axis, None, None, False)
    shape = _around(x.shape, axis)
    mask = None if where is None else _writeable(where.view(np.uint8).reshape(shape))
    entries, temperature = _as_stored(x).reshape(shape), _writeable(temperature.reshape(-1))
    if operation.elementwise:
        result = np.empty_like(x) if out is None else out
        operation.schedule(entries, mask, temperature, _as_stored(result).reshape(shape))
        return result
    values = np.empty(shape[::2], x.dtype)
    operation.schedule(entries, mask, temperature, _as_stored(values))
    values = values.reshape(x.shape[:axis] + x.shape[axis:][1:])
    if where is not None:
        np.copyto(values, operation.absent, where=~where.any(axis=axis))
    return values[()]


def _sweep(operation, x, temperature, axis) -> Any:
    """One vector at many temperatures: 13 us for 3 entries at 5 of them, and the long way 50."""
    rows = _at_each(operation, x, temperature)
    result = rows.reshape(*temperature.shape, *rows.shape[1:])
    return np.moveaxis(result, -1, 0) if operation.elementwise and axis == 0 else result


# -- the long way: every argument -----------------------------------------------------------------


def _evaluate(operation, x, temperature, axis, where, out, keepdims=False):
    """Check the arguments, run the operation, and give the result its shape and dtype."""
    if _is_on_gpu(x):
        return _imported("cuda").evaluate(operation.name, x, temperature, axis, where, out, keepdims)
    if _is_lazy(x) or _is_lazy(temperature) or _is_lazy(where):
        return _imported("_dask").evaluate(operation, x, temperature, axis, where, out, keepdims)
    x, result_dtype = _as_array(x)
    temperature, axis = _as_temperature(temperature), _as_axis(axis)
    alone = where is None and out is None
    if x.flags.fnc and alone and not keepdims and temperature.ndim == 0 and type(axis) is int:
        if -x.ndim <= axis < x.ndim:
            return _evaluate(operation, x.T, temperature, ~axis, None, None).T
    entries = x
    if not keepdims and (out is None or operation.elementwise) and x.flags.c_contiguous:
        entries, along = x.astype(result_dtype, copy=False), axis
        apart = entries is x or out is None or not np.may_share_memory(out, x)
        plain = _writeable(entries)
        if axis is None and alone and temperature.ndim == 0:
            plain, along = plain.reshape(-1), 0
        # NumPy has one float32 of its own and may make others: the short way knows that one alone.
        if apart and plain.dtype is result_dtype and _is_plain(plain, along):
            if _fit(plain, where, out) and _fit_slices(plain, temperature, along, out):
                result = _run_plain(operation, plain, temperature, along, where, out)
                return result.reshape(x.shape)[()] if axis is None and operation.elementwise else result
            if plain.ndim == 1 and alone and temperature.size > 0:
                return _sweep(operation, plain, temperature, along)
    given, axes = _as_axes(axis, x.ndim)
    batch = _batch_shape(x, temperature, axes)
    places = _places(given, axes, len(batch) + len(axes))
    if operation.elementwise:
        shape = _with_axes(batch, places, [x.shape[i] for i in axes])
    elif keepdims:
        shape = _with_axes(batch, places, [1] * len(axes))
    else:
        shape = batch
    target = None
    if out is not None:
        target = _check_out(out, shape, result_dtype, x)
        temperature = _unless_shared(temperature, target)
    mask = None if where is None else _unless_shared(_as_mask(where, x.shape), target)
    if x.size == 0 or 0 in shape:
        result = np.full(shape, operation.absent, result_dtype)
    else:
        x = _as_entries(entries, result_dtype, axes)
        if operation.elementwise:
            result = _transform(operation, x, mask, temperature, axes, places, shape, target)
        else:
            result = _reduce(operation, x, mask, temperature, axes, batch).reshape(shape)
    if target is None:
        with np.errstate(all="ignore"):  # float16 has subnormals and, for logarithms, -inf
            return result.astype(result_dtype, copy=False)[()]
    if result is not target:
        with np.errstate(all="ignore"):
            np.copyto(target, result, casting="same_kind")
    return out


# -- running --------------------------------------------------------------------------------------


class _Lent:
    """Memory of a read-only array that does not say so, as no view of it may."""

    def __init__(self, array):
        self._array = array  # which keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _writeable(array):
    """View of an array for kernels, which write to results alone; those have been found writeable before.

    A type that says read-only would have Numba compile each kernel once more, for some seconds.
    """
    return array if array.flags.writeable else np.asarray(_Lent(array))


def _as_stored(array):
    """View of a type that kernels know: int16 stands for float16, uint16 for bfloat16."""
    if array.dtype.itemsize > 2:
        return _writeable(array)
    return _writeable(array.view(np.int16 if array.dtype == np.float16 else np.uint16))


def _transform(operation, x, mask, temperature, axes, places, shape, out):
    """Result of the shape of x, or more if the temperature has more axes; in ``out`` if that is possible."""
    if shape == x.shape:
        result = np.empty_like(x) if out is None else out
        entries, order = _as_kernels_take_it(x, mask, axes)
        if entries is not None and _is_packed(result, order):
            operation.schedule(
                _as_stored(entries),
                _mask_blocks(mask, order, entries.shape),
                _one_per_slice(temperature, x.shape, axes, order),
                _as_stored(result).transpose(order).reshape(entries.shape),
            )
            return result
        if _run_strided(operation, x, mask, temperature, axes, result):
            return result
    x = _with_absent(_as_entries(x, _kernel_dtype(x.dtype), axes), mask)
    if _is_one_slice(x, axes):
        reduced = [x.shape[i] for i in axes]
        rows = _at_each(operation, x, temperature)
        rows = rows.reshape(*(n for i, n in enumerate(shape) if i not in places), *reduced)
        result = np.moveaxis(rows, range(-len(axes), 0), places)
    else:
        result = out if out is not None and out.dtype == x.dtype else np.empty(shape, x.dtype)
        entries = np.moveaxis(result, places, range(-len(axes), 0))
        slices = _slices_last(x, axes)
        if len(axes) == 1:
            _run_broadcast(operation, slices, temperature, entries)
        else:
            entries[...] = operation.broadcast(slices, temperature).reshape(entries.shape)
    if mask is not None:
        last = range(-len(axes), 0)
        absent = np.moveaxis(~mask, axes, last)
        np.copyto(np.moveaxis(result, places, last), operation.absent, where=absent)
    return result


def _reduce(operation, x, mask, temperature, axes, batch):
    """One value per slice, in the shape of the batch."""
    as_given = batch == tuple(x.shape[i] for i in _kept(axes, range(x.ndim)))
    entries, order = _as_kernels_take_it(x, mask, axes) if as_given else (None, ())
    if entries is not None:
        values = np.empty(entries.shape[::2], x.dtype)
        operation.schedule(
            _as_stored(entries),
            _mask_blocks(mask, order, entries.shape),
            _one_per_slice(temperature, x.shape, axes, order),
            _as_stored(values),
        )
        values = _as_batch(values.reshape(-1), x.shape, axes, order)
    else:
        values = np.empty(batch, x.dtype) if as_given else None
        if values is None or not _run_strided(operation, x, mask, temperature, axes, values):
            values = _reduce_broadcast(operation, x, mask, temperature, axes, batch)
    if mask is not None:
        np.copyto(values, operation.absent, where=~mask.any(axis=axes))
    return values


def _reduce_broadcast(operation, x, mask, temperature, axes, batch):
    """One value per slice at temperatures that broadcast with them, of 32 bits where x has 16."""
    x = _with_absent(_as_entries(x, _kernel_dtype(x.dtype), axes), mask)
    if _is_one_slice(x, axes):
        return _at_each(operation, x, temperature).reshape(batch)
    values = np.empty(batch, x.dtype)
    _run_broadcast(operation, _slices_last(x, axes), temperature, values)
    return values


def _run_strided(operation, x, mask, temperature, axes, result):
    """Whether the result has been written: of slices where they lie, or copied a block at a time."""
    if _run_apart(operation, x, mask, temperature, axes, result):
        return True
    count = _slices_in_a_block(x, axes)
    if count:
        _run_in_blocks(operation, x, mask, temperature, axes, count, result)
    return count > 0


def _as_kernels_take_it(x, mask, axes):
    """View (outer, n) or (outer, n, inner) of x, and the order of its axes; (None, ()) if there is none.

    An array that is not packed will do if only its rows, and what has outer indices, lie apart at equal
    distances, in the order of memory, and nothing is masked. It has kernels of its own, which a small one is
    not worth.
    """
    order = _order_of(x, axes)
    if order is None:
        return None, ()
    blocks = _blocks(x.shape, axes, order)
    if not _is_packed(x, order):
        if mask is not None or x.size <= _FEW_APART or not (axes and x.flags.aligned):
            return None, ()
        first = min(order.index(i) for i in axes)
        stop = first + len(axes)
        groups = order[:first], order[first:stop], order[stop:]
        *apart, step = (step_of(x.shape, x.strides, group) for group in groups)
        if len(blocks) == 2:
            step = apart.pop()
        if step != x.itemsize or any(step is None or step < 0 or step % x.itemsize for step in apart):
            return None, ()
        if len(blocks) == 3 and _have_contiguous_slices(x, axes):  # which overlap
            return None, ()
    return x.transpose(order).reshape(blocks), order


def _slices_in_a_block(x, axes):
    """How many slices are copied at a time where they do not lie as kernels take them; 0 if one is too large.

    Of slices that are taken side by side as columns it is a quarter, as each is in other pages of memory. A
    vector of them is worth more memory, and too few are not taken so.
    """
    n, as_rows = math.prod(x.shape[i] for i in axes), _have_contiguous_slices(x, axes)
    size = n * x.itemsize
    count = max((_BLOCK if as_rows else _BLOCK // 4) // size, min(64, x.nbytes // 16 // size))
    return count if as_rows or min(count, x.size // n) >= 12 else 0


def _run_in_blocks(operation, x, mask, temperature, axes, count, result):
    """Write the result for slices of any strides, so many of which are copied at a time.

    Contiguous ones are taken as rows and others as columns, so that a slice has the same bits as in an array
    that kernels take as it is.
    """
    kept = _kept(axes, range(x.ndim))
    as_rows = _have_contiguous_slices(x, axes)
    order = (*kept, *axes) if as_rows else (*axes, *kept)
    one = _flat(temperature) if temperature.size == 1 else None
    temperature = np.broadcast_to(temperature, [x.shape[i] for i in kept])
    buffer = np.empty(min(count * math.prod(x.shape[i] for i in axes), x.size), x.dtype)
    for block in _index_blocks(x, kept, count):
        of_slices = (*(block[i] for i in kept), ...)
        temperatures = _flat(temperature[of_slices]) if one is None else one
        entries = x[(*block, ...)].transpose(order)
        slices = temperature[of_slices].size
        shape = (slices, entries.size // slices) if as_rows else (1, entries.size // slices, slices)
        copied = buffer[: entries.size].reshape(entries.shape)
        if not _is_packed(entries, range(x.ndim)):
            _copy(copied, entries)
            entries = copied
        target = result[(*block, ...)].transpose(order) if operation.elementwise else result[of_slices]
        packed = _is_packed(target, range(target.ndim))
        if packed:
            values = target
        else:
            values = copied if operation.elementwise else np.empty(target.shape, target.dtype)
        stored = _as_stored(entries).reshape(shape)
        bytes_of_mask = None if mask is None else _mask_blocks(mask[block], order, shape)
        to = shape if operation.elementwise else shape[::2]
        operation.schedule(stored, bytes_of_mask, temperatures, _as_stored(values).reshape(to))
        if not packed:
            _copy(target, values)


def _copy(target, source):
    """Copy an array to one that may lie another way, of which a part at a time stays in the first cache."""
    target, source = np.atleast_1d(target), np.atleast_1d(source)
    step = max(1, len(source) * 2**15 // source.nbytes)
    for start in range(0, len(source), step):
        np.copyto(target[start : start + step], source[start : start + step])


def _index_blocks(x, kept, count):
    """Indices of blocks of up to so many slices, neighbours in memory, which make up the array."""
    kept = sorted(kept, key=lambda i: -abs(x.strides[i]))
    steps = dict.fromkeys(kept, 1)
    for i in reversed(kept):
        steps[i] = max(1, min(count, x.shape[i]))
        count //= x.shape[i]
    for starts in itertools.product(*(range(0, x.shape[i], steps[i]) for i in kept)):
        block = [slice(None)] * x.ndim
        for i, start in zip(kept, starts, strict=True):
            block[i] = slice(start, start + steps[i])
        yield tuple(block)


def _have_contiguous_slices(x, axes):
    """Whether entries of a slice are neighbours in memory, if need be in a copy that makes them one axis."""
    one = x[tuple(slice(None) if i in axes else slice(1) for i in range(x.ndim))]
    return one.reshape(-1).strides == (x.itemsize,)


def _at_each(operation, x, temperature):
    """Results of one contiguous slice at many temperatures, a row or a value for each."""
    result = np.empty((temperature.size, x.size) if operation.elementwise else temperature.size, x.dtype)
    operation.schedule(_as_stored(x).reshape(1, -1), None, _flat(temperature), _as_stored(result))
    return result


def _mask_blocks(mask, order, blocks):
    """The mask as the bytes that kernels read, in the blocks of x."""
    if mask is None:
        return None
    return _writeable(np.ascontiguousarray(mask.transpose(order)).reshape(blocks).view(np.uint8))


def _is_one_slice(x, axes):
    """Whether x is one contiguous slice, for which a sweep of temperatures is as many rows."""
    return x.size == math.prod(x.shape[i] for i in axes) and x.flags.c_contiguous and x.flags.aligned


def _is_packed(array, order):
    """Whether an array is aligned, and C-contiguous with its axes in the given order."""
    return array.flags.aligned and array.transpose(order).flags.c_contiguous


def _memory_order(x, axes):
    """`_order_of` x, if that is contiguous in it; else None."""
    order = _order_of(x, axes)
    return order if order is not None and _is_packed(x, order) else None


def _order_of(x, axes):
    """Axes in the order of memory, if the reduced axes are neighbours in it; else None."""
    order = list(range(x.ndim))
    if not x.flags.c_contiguous:
        order.sort(key=lambda i: -abs(x.strides[i]))
    positions = sorted(order.index(i) for i in axes)
    if positions and positions[-1] - positions[0] >= len(positions):
        return None
    return order


def _kept(axes, order):
    """Axes that are not reduced, in the given order."""
    return [i for i in order if i not in axes]


def _blocks(shape, axes, order):
    """Number of entries before, in and, unless that is 1, after the reduced axes, in the given order."""
    if not axes:
        return math.prod(shape), 1
    first = min(order.index(i) for i in axes)
    sizes = [shape[i] for i in order]
    stop = first + len(axes)
    inner = math.prod(sizes[stop:])
    return (math.prod(sizes[:first]), math.prod(sizes[first:stop]), inner)[: 2 if inner == 1 else 3]


def _one_per_slice(temperature, shape, axes, order):
    """One temperature, or one for each slice in the given order of axes."""
    if temperature.size == 1:
        return _flat(temperature)
    kept = sorted(axes_kept := _kept(axes, order))
    full = np.broadcast_to(temperature, [shape[i] for i in kept])
    return _flat(full.transpose([kept.index(i) for i in axes_kept]))


def _as_batch(values, shape, axes, order):
    """Values of slices that come in an order of axes, in the shape of the batch; more axes may follow."""
    kept = _kept(axes, order)
    values = values.reshape([shape[i] for i in kept] + list(values.shape[1:]))
    return values.transpose([*np.argsort(kept), *range(len(kept), values.ndim)])


def _flat(temperature):
    """Temperatures in a row, in an array of the one kind for which kernels are compiled."""
    if temperature.ndim == 1 and temperature.flags.carray:
        return temperature
    return np.require(temperature.reshape(-1), requirements=["C", "A", "W"])


def _slices_last(x, axes):
    """View (a copy if need be) of x in which a slice lies along the last axis."""
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)


def _is_lazy(argument):
    """Whether an argument is a dask array; if so, dask has been imported."""
    dask = sys.modules.get("dask.array")
    return dask is not None and isinstance(argument, dask.Array)


# -- arguments ------------------------------------------------------------------------------------


def _is_on_gpu(x):
    """Whether an object is an array on an NVIDIA GPU; those of PyTorch and JAX may also be on the host."""
    name = "__cuda_array_interface__"
    if not hasattr(type(x), name):
        return False
    on_gpu = getattr(x, "is_cuda", None)  # of PyTorch, whose interface refuses tensors that require gradients
    return hasattr(x, name) if on_gpu is None else on_gpu


def _is_masked(x):
    """Whether an object is a masked array or a sequence with one, whose mask NumPy would drop.

    Only where there is that module can there be one. To have it imported here, by looking it up in ``np``,
    would leave it locked for good in a process that is forked meanwhile.
    """
    kind = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    return kind is not None and (isinstance(x, kind) or (_is_sequence(type(x)) and _holds(x, kind)))


def _is_sequence(kind):
    """Whether NumPy makes an array of the items of such an object."""
    return issubclass(kind, list | tuple) or (
        issubclass(kind, Sequence) and not issubclass(kind, str | bytes | memoryview | range)
    )


def _holds(x, kind):
    """Whether an object of a kind is in a sequence, or in one in it; arrays have no more than 64 axes.

    Items of a depth are taken at once: one by one, 10**6 x 3 numbers in lists took 2.4 s, NumPy 0.3.
    """
    level = [x]
    for _ in range(64):
        kinds = set(map(type, itertools.chain.from_iterable(level)))
        if any(issubclass(own, kind) for own in kinds):
            return True
        nested = tuple(filter(_is_sequence, kinds))
        if not nested:
            return False
        level = [item for item in itertools.chain.from_iterable(level) if isinstance(item, nested)]
    return False


def _as_array(x, name="x", advice="; pass x.data with where=~np.ma.getmaskarray(x)"):
    """Return x as an array, and the dtype of its result."""
    array = _asarray(x, name, advice)
    dtype = array.dtype
    if dtype.kind in "biu":
        return array, _FLOAT64
    if dtype.kind == "f" and dtype.itemsize in (2, 4, 8):
        return array, np.dtype(dtype.type)
    if dtype.name == "bfloat16":
        return array, dtype
    raise TypeError(
        f"{name} must be float16, bfloat16, float32, float64, bool or integers, got dtype {dtype}"
    )


def _asarray(x, name, advice=""):
    """What NumPy makes of an argument that is not masked."""
    if _is_masked(x):
        raise TypeError(f"{name} must not be a masked array{advice}")
    try:
        array = np.asanyarray(x)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: tensors that require gradients
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must make an array: {error}") from None
    if type(array) is not _ARRAY and _is_masked(array):  # made by x itself
        raise TypeError(f"{name} must not be a masked array{advice}")
    return np.asarray(array)


def _kernel_dtype(dtype):
    """Dtype in which entries are computed."""
    return _FLOAT64 if dtype == _FLOAT64 else _FLOAT32


def _as_entries(array, dtype, axes):
    """Return the array in a dtype; a copy if need be.

    A copy is packed, which must not make contiguous slices of others: their sums have another order.
    """
    x = array.astype(dtype, copy=False)
    if x is not array and len(axes) == 1:
        (axis,) = axes
        if array.strides[axis] != array.itemsize and x.strides[axis] == x.itemsize:
            spaced = np.empty((*x.shape, 2), dtype)[..., 0]
            spaced[...] = x
            return spaced
    return x


def _with_absent(x, mask):
    """Return a copy of x with -inf where the mask is False."""
    if mask is None:
        return x
    copy = np.empty_like(x) if x.flags.forc else np.empty((*x.shape, 2), x.dtype)[..., 0]
    np.copyto(copy, x)
    np.copyto(copy, -math.inf, where=~mask)
    return copy


def _as_temperature(temperature):
    """Return the temperature as a float64 array in [0, inf]."""
    array = _asarray(temperature, "temperature")
    if array.dtype.kind in "cSUMmT" or array.dtype.names is not None:
        raise TypeError(f"temperature must be real, got dtype {array.dtype}")
    if array.dtype.kind == "O":
        for value in array.flat:
            if value is None or isinstance(value, str | bytes):  # which would become numbers
                raise TypeError(f"temperature must be real, got {value!r}")
    if array.dtype != np.float64:
        try:
            array = _converted(array, _FLOAT64)
        except OverflowError:  # of integers, of which Python may refuse to show all digits
            raise ValueError(
                "temperature must fit a float64, got an integer of 2**1024 or more, or -2**1024 or less"
            ) from None
        except (TypeError, ValueError):
            raise TypeError(f"temperature must be real, got {temperature!r}") from None
    valid = array >= 0.0
    if not valid.all():
        raise ValueError(f"temperature must be in [0, inf], got {array[~valid][0]}")
    return array


def _converted(array, dtype):
    """Return the array in a dtype, without a warning where a long double overflows or a NaN is signalling."""
    with np.errstate(all="ignore"):
        return array.astype(dtype, copy=False)


def _as_flag(keepdims):
    """Return whether reduced axes stay: a bool or, as in NumPy, an integer."""
    try:
        return bool(keepdims) if isinstance(keepdims, np.bool_) else bool(operator.index(keepdims))
    except TypeError:
        raise TypeError(f"keepdims must be a bool, got {keepdims!r}") from None


def _as_integer(i):
    """Return a number of an axis as an int; True is none."""
    if isinstance(i, bool):
        raise TypeError
    return operator.index(i)


def _as_axis(axis):
    """Return the axis as an int, a tuple of several or of none, or None."""
    if axis is None or type(axis) is int:
        return axis
    given = axis if isinstance(axis, tuple | list) else (axis,)
    try:
        axes = tuple(map(_as_integer, given))
    except TypeError:
        raise TypeError(f"axis must be an integer, a tuple of integers or None, got {axis!r}") from None
    return axes[0] if len(axes) == 1 else axes


def _as_axes(axis, ndim):
    """Return the axes as they were given, and as non-negative numbers, by which both are sorted."""
    axis = _as_axis(axis)
    if axis is None:
        given = tuple(range(ndim))
    else:
        given = axis if isinstance(axis, tuple) else (axis,)
    if ndim == 0 and given in ((0,), (-1,)):
        given = ()
    for i in given:
        if not -ndim <= i < ndim:
            raise np.exceptions.AxisError(i, ndim, "axis")
    axes = tuple(i % ndim for i in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must not have an axis twice, got {axis}")
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return tuple(given[i] for i in order), tuple(axes[i] for i in order)


def _broadcast(shape, other):
    """As `numpy.broadcast_shapes`, which knows no more than 32 axes."""
    sizes = []
    for n, m in itertools.zip_longest(reversed(shape), reversed(other), fillvalue=1):
        if n != m and 1 not in (n, m):
            raise ValueError(f"shapes {shape} and {other} do not broadcast")
        sizes.append(m if n == 1 else n)
    return tuple(reversed(sizes))


def _batch_shape(x, temperature, axes):
    """Shape of the slices: that of x without its reduced axes, broadcast with the temperature."""
    kept = tuple(x.shape[i] for i in _kept(axes, range(x.ndim)))
    if temperature.ndim == 0:
        return kept
    try:
        return _broadcast(kept, temperature.shape)
    except ValueError:
        raise ValueError(
            f"temperature of shape {temperature.shape} does not broadcast against "
            f"the shape {kept} of x without its reduced axes"
        ) from None


def _places(given, axes, ndim):
    """Where the reduced axes stand in the result: counted from the end that the caller counted from."""
    places = tuple(i % ndim for i in given)
    return places if len(set(places)) == len(places) else axes


def _with_axes(batch, places, sizes):
    """Shape of the batch with axes of the given sizes put in at the given places."""
    inserted = dict(zip(places, sizes, strict=True))
    rest = iter(batch)
    return tuple(inserted[i] if i in inserted else next(rest) for i in range(len(batch) + len(sizes)))


def _as_mask(where, shape):
    mask = _asarray(where, "where")
    if mask.dtype != np.bool_:
        raise TypeError(f"where must be boolean, got dtype {mask.dtype}")
    if mask.shape == shape:
        return mask
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"where of shape {mask.shape} does not broadcast to the shape {shape} of x"
        ) from None


def _check_out(out, shape, dtype, x, name="x"):
    """Return ``out`` as an array of NumPy's own kind: a matrix keeps its two axes when it is reshaped."""
    if not isinstance(out, np.ndarray) or _is_masked(out):
        raise TypeError(f"out must be an ndarray, got {type(out).__name__}")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(
            f"out must have the shape {shape} and dtype {dtype} of the result, "
            f"got shape {out.shape} and dtype {out.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if _overlaps_in_part(out, x):
        raise ValueError(
            f"out must be {name} itself or not overlap it, got an array that overlaps {name} in part"
        )
    return np.asarray(out)


def _unless_shared(array, out):
    """An array, or a copy where ``out`` may share its memory, which may be read when that is written."""
    return array.copy() if out is not None and np.may_share_memory(out, array) else array


def _overlaps_in_part(out, x):
    """Whether two arrays share memory, and are not the same one."""
    if out is x or not np.may_share_memory(out, x):
        return False
    same = (
        out.shape == x.shape
        and out.strides == x.strides
        and out.__array_interface__["data"][0] == x.__array_interface__["data"][0]
    )
    return not same and np.shares_memory(out, x)
