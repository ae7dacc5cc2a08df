"""Dask arrays: the same functions, lazy, chunk by chunk.

Where slices lie within chunks, a chunk is a call of the function itself. Where they are split, each chunk of
a slice becomes a state of a few numbers, states are merged in a tree, and a second pass over the array writes
the results (for logsumexp and entropy there is none). The array is then computed twice rather than kept in
memory; see `_evaluate_split`.

A state is (max, reference, rest, error, moment, moment_error, temperature): of all entries but one maximum
the sum of exp((x - reference) / T) and of these times (x - reference) log2(e) / T, as pairs in units of
2**-BIAS. The reference is the maximum itself, unless terms would be lost beside it that show in a logsumexp.
"""

import functools
import math
from typing import Any

import dask.array as da
import numpy as np
from dask.graph_manipulation import bind

from fastmax import _api, _columns, _rows, _slice, _tiles
from fastmax._jit import jit, kernel
from fastmax._lanes import as_float64, entries_of, fma, get, pointer, spread, workspace
from fastmax._math import (
    BIAS,
    FAINT_REST,
    entropy_value,
    guarded_scale,
    is_plain,
    logsumexp_value,
    merge,
    misses_faint_terms,
    plain_scale,
    rate_of,
    settled,
    terms,
    top_term,
    unit_of,
)
from fastmax._slice import QUANTITIES, sums_apart
from fastmax._tracing import traced

_FIELDS = 7

# Stands for a size that dask does not know where shapes are broadcast.
_UNKNOWN = 2**31 + 11


def evaluate(operation, x, temperature, axis, where, out, keepdims):
    """Return the result of an operation as a dask array; any of x, temperature and where may be one."""
    if out is not None:
        raise TypeError("out must be None where an argument is a dask array")
    x = _as_dask(x, "x", "; pass da.ma.getdata(x) with where=~da.ma.getmaskarray(x)")
    _, dtype = _api._as_array(x._meta)
    if not isinstance(temperature, da.Array):
        temperature = _api._as_temperature(temperature)
    elif temperature.dtype.kind not in "biuf":
        raise TypeError(f"temperature must be real, got dtype {temperature.dtype}")
    temperature = _as_dask(temperature, "temperature")
    given, axes = _api._as_axes(axis, x.ndim)
    batch = _batch_shape(x, temperature, axes)
    places = _api._places(given, axes, len(batch) + len(axes))
    mask = None if where is None else _as_mask(where, x)
    last = range(-len(axes), 0)
    entries: Any = da.moveaxis(x, axes, last)
    mask = None if mask is None else da.moveaxis(mask, axes, last)
    if 0 in (x.shape[i] for i in axes):
        sizes = [x.shape[i] for i in axes] if operation.elementwise else []
        result = da.full((*batch, *sizes), operation.absent, dtype=dtype)
    elif all(n == 1 for n in entries.numblocks[x.ndim - len(axes) :]):
        result = _evaluate_whole(operation, entries, mask, temperature, len(axes), len(batch), dtype)
    else:
        result = _evaluate_split(operation, entries, mask, temperature, len(axes), len(batch), dtype)
    if operation.elementwise:
        return da.moveaxis(result, last, places)
    if keepdims:
        return result[_api._with_axes([slice(None)] * len(batch), places, [None] * len(axes))]
    return result


def _as_dask(array, name, advice=""):
    if not isinstance(array, da.Array):
        array = _api._asarray(array, name, advice)
        if array.dtype.hasobject:
            raise TypeError(f"{name} must be of numbers, got dtype {array.dtype}")
        return da.from_array(array, chunks="auto")
    if _api._is_masked(array._meta):
        raise TypeError(f"{name} must not be a masked array{advice}")
    # An axis of one entry with empty chunks, as a filter leaves it, `blockwise` would take for one to repeat.
    chunks: Any = {i: -1 for i, n in enumerate(array.shape) if n == 1 and array.numblocks[i] > 1}
    return array.rechunk(chunks) if chunks else array


def _batch_shape(x, temperature, axes):
    """`_api._batch_shape` where sizes may be unknown, which are then taken to be the same."""
    kept = tuple(_UNKNOWN if math.isnan(x.shape[i]) else x.shape[i] for i in _api._kept(axes, range(x.ndim)))
    given = tuple(_UNKNOWN if math.isnan(n) else n for n in temperature.shape)
    try:
        batch = _api._broadcast(kept, given)
    except ValueError:
        raise ValueError(
            f"temperature of shape {temperature.shape} does not broadcast against the shape {x.shape} of x "
            f"without its reduced axes{_advice(x, temperature)}"
        ) from None
    return tuple(math.nan if n == _UNKNOWN else n for n in batch)


def _advice(*arrays):
    """What to do if it is sizes that dask does not know that do not fit."""
    known = not any(math.isnan(n) for array in arrays for n in array.shape)
    return "" if known else "; compute_chunk_sizes() makes the unknown sizes (nan) known"


def _as_mask(where, x):
    where = _as_dask(where, "where")
    if where.dtype != np.bool_:
        raise TypeError(f"where must be boolean, got dtype {where.dtype}")
    if where.numblocks == x.numblocks and str(where.chunks) == str(x.chunks):  # nan, too
        return where
    try:
        return da.broadcast_to(where, x.shape).rechunk(x.chunks)
    except ValueError:
        raise ValueError(
            f"where of shape {where.shape} does not broadcast to the shape {x.shape} of x{_advice(where, x)}"
        ) from None


def _labels(ndim, reduced, batch_ndim):
    """Indices for `blockwise`: of the batch, of the reduced axes, and of x with its reduced axes last."""
    batch = tuple(range(batch_ndim))
    along = tuple(range(batch_ndim, batch_ndim + reduced))
    return batch, along, (*batch[batch_ndim - (ndim - reduced) :], *along)


def _blocks(function, labels, arrays, dtype, **options):
    """Apply a function to blocks of arrays, each given with its labels; None stays None."""
    arguments = [part for array, own in arrays for part in (array, None if array is None else own)]
    meta = np.empty((0,) * len(labels), dtype)
    return da.blockwise(function, labels, *arguments, dtype=dtype, meta=meta, concatenate=True, **options)


# -- slices within chunks -------------------------------------------------------------------------


def _evaluate_whole(operation, x, mask, temperature, reduced, batch_ndim, dtype):
    batch, along, own = _labels(x.ndim, reduced, batch_ndim)
    labels = (*batch, *along) if operation.elementwise else batch
    arrays = [(x, own), (temperature, batch[batch_ndim - temperature.ndim :]), (mask, own)]
    return _blocks(
        _call,
        labels,
        arrays,
        dtype,
        token=f"fastmax-{operation.name}",
        operation=operation.name,
        reduced=reduced,
    )


def _call(x, temperature, mask, operation, reduced):
    """One chunk."""
    function = getattr(_api, operation)
    return np.asarray(function(x, temperature, axis=tuple(range(-reduced, 0)), where=mask))


# -- slices split over chunks ---------------------------------------------------------------------


def _evaluate_split(operation, x, mask, temperature, reduced, batch_ndim, dtype):
    batch, along, own = _labels(x.ndim, reduced, batch_ndim)
    last = batch_ndim + reduced
    arrays = [(x, own), (temperature, batch[batch_ndim - temperature.ndim :]), (mask, own)]
    states = _blocks(
        _states,
        (*batch, *along, last),
        arrays,
        np.float64,
        new_axes={last: _FIELDS},
        adjust_chunks=dict.fromkeys(along, 1),
        reduced=reduced,
        operation=operation.name,
    )
    states = da.reduction(
        states,
        _one,
        _merge_blocks,
        axis=along,
        combine=_merge_blocks,
        dtype=np.float64,
        concatenate=True,
        meta=np.empty((0,) * (batch_ndim + 1)),
    )
    if operation.elementwise:
        # Chunks kept for the second pass would fill the memory with the array: they are computed again,
        # and not before the states are there.
        x, mask = (None if array is None else bind(array, states, seed=states.name) for array in (x, mask))
        arrays = [(x, own), (states, (*batch, last)), (mask, own)]
        return _blocks(_write, (*batch, *along), arrays, dtype, reduced=reduced, operation=operation.name)
    values = _blocks(
        _values, batch, [(states, (*batch, last))], dtype, operation=operation.name, result_dtype=dtype
    )
    if mask is None and any(math.isnan(n) for n in x.shape[x.ndim - reduced :]):
        mask = da.ones_like(x, dtype=bool)  # there may be no entry at all
    if mask is not None:
        present = mask.any(axis=tuple(range(-reduced, 0)))
        values = da.where(present, values, np.asarray(operation.absent, dtype))
    return values


def _one(states, axis, keepdims):
    return states


class _Chunk:
    """A chunk of slices in the form that kernels take: blocks of x and mask, one thread.

    Contiguous slices may lie apart, as rows of a chunk of a larger array do.
    """

    def __init__(self, x, mask, reduced, batch):
        x, dtype = _api._as_array(x)
        sizes = x.shape[x.ndim - reduced :]
        if x.shape[: x.ndim - reduced] != batch:  # more temperatures than slices
            x = np.broadcast_to(x, batch + sizes)
            mask = None if mask is None else np.broadcast_to(mask, batch + sizes)
        self.axes = tuple(range(x.ndim - reduced, x.ndim))
        given, x = x, x.astype(dtype, copy=False)
        self.batch, self.shape = batch, x.shape
        self.order = _api._order_of(x, self.axes) or list(range(x.ndim))
        blocks = x.transpose(self.order).reshape(_api._blocks(x.shape, self.axes, self.order))
        if mask is not None or not _lie_in_rows(blocks):  # kernels take a mask's index for that of x
            blocks = np.require(blocks, requirements=["C", "A"])
        self.x = _api._as_stored(blocks)
        self.is_copy = not np.may_share_memory(x, given)
        self.mask = _api._mask_blocks(mask, self.order, self.x.shape)
        self.dtype = _api._kernel_dtype(dtype)
        self.result_dtype = dtype

    def per_slice(self, values):
        """Values of the batch's shape (more axes may follow) in the order in which kernels take slices."""
        kept = _api._kept(self.axes, self.order)
        rest = range(len(kept), values.ndim)
        moved = values.transpose([*(sorted(kept).index(i) for i in kept), *rest])
        return np.ascontiguousarray(moved).reshape(-1, *values.shape[len(kept) :])

    def temperatures(self, values):
        """One temperature if it is that of all slices, else one for each."""
        first = values.reshape(-1)[:1]
        is_one = values.size <= 1 or (values == first).all()
        return _api._flat(first if is_one else self.per_slice(np.broadcast_to(values, self.batch)))

    def states(self, temperature, exact):
        """States of the slices, in the order of the batch."""
        sums_of = sums_of_rows if self.x.ndim == 2 else functools.partial(_columns.tall_sums, 1)
        maxima, sums = sums_of(self.x, self.mask, temperature, exact)
        states = np.empty((len(maxima), _FIELDS))
        write_states(maxima, sums, _inner(self.x), temperature, exact, states)
        return _api._as_batch(states, self.shape, self.axes, self.order)


def _inner(blocks):
    """Number of slices that lie side by side."""
    return 1 if blocks.ndim == 2 else blocks.shape[2]


def _lie_in_rows(blocks):
    """Whether kernels can walk blocks as they lie, in whole rows which dask may have cut out of longer ones.

    20000 x 20000 float32 in 64 chunks took 1.7 s over axis 0 where each was copied first, and takes 0.29.
    """
    steps = [step for n, step in zip(blocks.shape, blocks.strides, strict=True) if n > 1]
    in_line = blocks.shape[-1] <= 1 or steps[-1] == blocks.itemsize
    return (
        in_line and blocks.flags.aligned and all(step > 0 and step % blocks.itemsize == 0 for step in steps)
    )


def _exact(operation):
    """How terms are summed for an operation, as `lane_sums` has it."""
    return {"softmax": None, "entropy": (True,)}.get(operation, (None,))


def _states(x, temperature, mask, reduced, operation):
    """States of the slices of a chunk, with an axis of one for each reduced axis."""
    temperature = _api._as_temperature(temperature)
    batch = _api._broadcast(x.shape[: x.ndim - reduced], temperature.shape)
    if x.size and 0 not in batch:
        chunk = _Chunk(x, mask, reduced, batch)
        states = chunk.states(chunk.temperatures(temperature), _exact(operation))
        if operation == "logsumexp" and (temperature > 1.0).any():
            _keep_faint_terms(states, x, mask, reduced)
    else:
        states = np.zeros((*batch, _FIELDS))
        states[..., 0] = states[..., 1] = -math.inf
        states[..., 6] = temperature
    return states.reshape(*batch, *[1] * reduced, _FIELDS)


def _keep_faint_terms(states, x, mask, reduced):
    """Where the rest is too small beside the maximum, refer it to the largest entry below that."""
    largest, temperature = states[..., 0], states[..., 6]
    rest = states[..., 2] + states[..., 3]
    with np.errstate(all="ignore"):
        faint = (temperature > 1.0) & (temperature < math.inf)
        faint &= (rest < FAINT_REST[0] * 2.0 ** BIAS[1]) & (
            np.abs(largest) < temperature * (FAINT_REST[0] * 2.0**60)
        )
    for index in zip(*np.nonzero(faint), strict=True) if faint.ndim else [()] * bool(faint):
        where = index[len(index) - (x.ndim - reduced) :]
        own = tuple(0 if n == 1 else i for i, n in zip(where, x.shape, strict=False))
        entries = np.asarray(x[own], np.float64)
        present = entries < largest[index]
        if mask is not None:
            present &= mask[own]
        if (below := entries[present]).size and below.max() > -math.inf:
            alone = _states(below, temperature[index], None, 1, "log_softmax").reshape(_FIELDS)
            top = 2.0 ** BIAS[1]
            total = top + alone[2]
            states[index][1:4] = alone[0], total, (top - total) + alone[2] + alone[3]
        else:  # terms of -inf are raised to the least of a scale
            states[index][2:4] = 0.0


def _merge_blocks(states, axis, keepdims):
    """Merge states along some axes."""
    moved = np.moveaxis(states, axis, range(-1 - len(axis), -1))
    shape = moved.shape[: moved.ndim - 1 - len(axis)]
    merged = np.empty((math.prod(shape), _FIELDS))
    count = math.prod(moved.shape[len(shape) : -1])
    merge_states(np.ascontiguousarray(moved).reshape(len(merged), count, _FIELDS), merged)
    merged = merged.reshape(*shape, _FIELDS)
    return np.expand_dims(merged, axis) if keepdims else merged


def _write(x, states, mask, reduced, operation):
    """Results of a chunk from the states of its slices."""
    chunk = _Chunk(x, mask, reduced, states.shape[:-1])
    out = chunk.x if chunk.is_copy else np.empty(chunk.x.shape, chunk.x.dtype)
    if out.size:
        own = chunk.temperatures(states[..., 6])
        ordered = chunk.per_slice(states)
        maxima = ordered[:, 0].astype(chunk.dtype)
        sums = np.zeros((len(ordered), QUANTITIES), chunk.dtype)
        sums_of_kernels(ordered, maxima, own, sums)
        sums = sums.reshape(-1, _inner(chunk.x), QUANTITIES).transpose(0, 2, 1).reshape(-1)
        write = write_rows if chunk.x.ndim == 2 else functools.partial(_columns.tall_write, 1)
        write(chunk.x, chunk.mask, own, maxima, sums, _exact(operation), out)
    out = out.view(chunk.result_dtype).reshape([chunk.shape[i] for i in chunk.order])
    return out.transpose(np.argsort(chunk.order))


def _values(states, operation, result_dtype):
    """Logsumexp or entropy from states."""
    values = np.empty(states.shape[:-1])
    flat = np.ascontiguousarray(states).reshape(-1, _FIELDS)
    write_values(flat, True if operation == "entropy" else None, values.reshape(-1))
    with np.errstate(all="ignore"):
        return values.astype(result_dtype)


# -- rows -----------------------------------------------------------------------------------------
# On one thread, for dask has taken the others. A row that fits a cache is read from memory once in each pass,
# and where rows lie apart they are not copied first: 1.5 times the bytes of a call in memory, not 4.


def _serial(function):
    return kernel(function, nogil=True)


@jit
def soon_in_chunk(x, row, rows, n, pitch):
    """What to fetch while a row of a chunk is read: to write softmax takes 0.7 of the time for it."""
    return _rows.soon_for_row(x, row * pitch, n, min(row + 1, rows - 1) * pitch, None, 0)


@_serial
def sums_of_rows(x, mask, temperature, exact):
    """Maxima of rows, and their sums, `QUANTITIES` for each."""
    rows, n = x.shape
    entries, pitch = entries_of(x, mask), _tiles.pitch(x, 0)
    maxima, sums = workspace(rows, pointer(x)), workspace(rows * QUANTITIES, pointer(x))
    rate = _tiles.first_rate(temperature, pointer(x))
    for row in range(rows):
        start, stop = row * pitch, row * pitch + n
        maxima[row] = _slice.maximum(entries, start, stop)
        if len(temperature) > 1:
            rate = _tiles.rate_at(temperature, row, maxima[row])
        soon = soon_in_chunk(entries, row, rows, n, pitch)
        own = _slice.sums_of_slice(entries, start, stop, maxima[row], rate, exact, None, 0, soon)
        _tiles.put_sums(sums, QUANTITIES * row, 1, own)
    return maxima, sums


@_serial
def write_rows(x, mask, temperature, maxima, sums, exact, out):
    """Write the softmax of rows, or its logarithm if the sums are exact."""
    rows, n = x.shape
    entries, pitch, results = entries_of(x, mask), _tiles.pitch(x, 0), pointer(out)
    for row in range(rows):
        start, stop, shift = row * pitch, row * pitch + n, row * (n - pitch)
        top, own = maxima[row], _slice.get_sums(sums, QUANTITIES * row, 1, exact)
        rate, soon = _tiles.rate_at(temperature, row, top), soon_in_chunk(entries, row, rows, n, pitch)
        _slice.write_slice(entries, start, stop, top, rate, own, exact, results, shift, False, soon)


# -- states ---------------------------------------------------------------------------------------


@_serial
def write_states(maxima, sums, inner, temperature, exact, states):
    """Write the state of each slice."""
    # Terms of float32 kernels are in smaller units.
    units = top_term(0.0) / as_float64(top_term(get(maxima, 0)))
    rate = _tiles.first_rate(temperature, maxima)
    for i in range(len(maxima)):
        if len(temperature) > 1:
            rate = _tiles.rate_at(temperature, i, maxima[i])
        own = _slice.get_sums(sums, i // inner * QUANTITIES * inner + i % inner, inner, exact)
        own = sums_apart(own, maxima[i], rate, exact)
        rest, error, moment, moment_error = in_units(own, units)
        states[i, 0] = states[i, 1] = maxima[i]
        states[i, 2], states[i, 3], states[i, 4], states[i, 5] = rest, error, moment, moment_error
        states[i, 6] = rate.temperature


@traced
def in_units(sums, units):
    """Four sums in other units; where the rest is tiny, the error may have all of it."""
    rest, error, *moments = (as_float64(value) * units for value in sums)
    rest, error = settled(rest, error)
    return (rest, error, *moments) if moments else (rest, error, spread(0.0, rest), spread(0.0, rest))


@jit
def weight(entry, reference, rate):
    """exp((entry - reference) / T) as power * (1 + excess), and the exponent in units of log(2)."""
    if is_plain(reference, rate):
        scale = plain_scale(reference, rate)
        power, excess, product = terms(entry, scale, None)
        if entry < scale.lowest:  # as guarded terms below their cutoff
            power = excess = product = 0.0
    else:
        scale, guard = guarded_scale(reference, rate.temperature)
        power, excess, product = terms(entry, scale, guard)
    return power / top_term(reference), excess, product


@jit
def referred(sums, reference, rate):
    """Sums (reference, rest, error, moment, moment_error) with another reference."""
    if sums[0] == reference:
        return sums
    power, excess, product = weight(sums[0], reference, rate)
    rest, error = times_weight(sums[1], sums[2], power, excess)
    moment = sums[3] + product * (sums[1] + sums[2])
    moment, moment_error = times_weight(moment, sums[4], power, excess)
    return reference, rest, error, moment, moment_error


@jit
def times_weight(total, error, power, excess):
    """(total + error) * power * (1 + excess), of which the power is one of two."""
    more = total * excess
    result = total + more
    lost = ((total - result) + more) + fma(total, excess, -more)
    return result * power, (lost + error * (1.0 + excess)) * power


@jit
def merged_sums(a, b, rate):
    """Sum of two sums, as in `referred`; beside nothing, one that would be faint keeps its reference."""
    reference, faint = max(a[0], b[0]), FAINT_REST[1] * top_term(a[1])
    own_a, own_b = referred(a, reference, rate), referred(b, reference, rate)
    if a[1] == 0.0 and own_b[1] < faint:
        return b
    if b[1] == 0.0 and own_a[1] < faint:
        return a
    rest, error = merge(own_a[1], own_a[2], own_b[1], own_b[2])
    moment, moment_error = merge(own_a[3], own_a[4], own_b[3], own_b[4])
    return reference, rest, error, moment, moment_error


@jit
def sums_of(states, i, k):
    """Sums of a state, as in `referred`."""
    return states[i, k, 1], states[i, k, 2], states[i, k, 3], states[i, k, 4], states[i, k, 5]


@kernel
def merge_states(states, merged):
    """Merge states (slices, count, fields) into (slices, fields).

    Where all entries are -inf, the rest is that of none but one maximum, -2**BIAS, and makes up for it.
    """
    rate = rate_of(1.0, 1.0)
    for i in range(len(states)):
        if states[i, 0, 6] != rate.temperature:  # it takes divisions, and most slices share one
            rate = rate_of(states[i, 0, 6], 1.0)
        largest, sums = states[i, 0, 0], sums_of(states, i, 0)
        for k in range(1, states.shape[1]):
            own, own_sums = states[i, k, 0], sums_of(states, i, k)
            if own > largest:
                largest, own, sums, own_sums = own, largest, own_sums, sums
            maximum = own, top_term(own), 0.0, 0.0, 0.0
            sums = merged_sums(sums, merged_sums(maximum, own_sums, rate), rate)
        merged[i, 0], merged[i, 6] = largest, rate.temperature
        for quantity in range(5):
            merged[i, 1 + quantity] = sums[quantity]


@jit
def beside_maximum(states, i):
    """(rest, error, moment, moment_error) of a slice, in which the reference is the maximum."""
    sums = states[i, 1], states[i, 2], states[i, 3], states[i, 4], states[i, 5]
    _, rest, error, moment, moment_error = referred(sums, states[i, 0], rate_of(states[i, 6], 1.0))
    return rest, error, moment, moment_error


@kernel
def sums_of_kernels(states, maxima, temperature, sums):
    """Write the sums of the `ratio_terms` of each slice, in the dtype of the maxima."""
    for i in range(len(maxima)):
        if maxima[i] == -math.inf:
            sums[i, 0] = math.nan
        else:
            rest = beside_maximum(states, i)
            top, rate = top_term(rest[0]), _tiles.rate_at(temperature, i, maxima[i])
            total, error = merge(top, 0.0, rest[0], rest[1])
            unit = as_float64(top_term(maxima[i]) * unit_of(maxima[i], rate)) / top
            product = total * unit
            error = fma(total, unit, -product) + error * unit
            rounded = spread(product, maxima[i])
            sums[i, 0], sums[i, 1] = rounded, spread((product - rounded) + error, maxima[i])


@kernel
def write_values(states, weighted, values):
    """Write the logsumexp of each state or, unless ``weighted`` is None, the entropy."""
    for i in range(len(states)):
        largest, temperature = states[i, 0], states[i, 6]
        sums = beside_maximum(states, i)
        if weighted is not None:
            values[i] = entropy_value(largest, sums)
        elif states[i, 1] < largest and misses_faint_terms(largest, temperature, sums):
            # As in `_slice.logsumexp_of_faint`: the weight is the square of that at twice the temperature.
            power, excess, _ = weight(states[i, 1], largest, rate_of(2.0 * temperature, 1.0))
            root = power * (1.0 + excess)
            rest = (states[i, 2] + states[i, 3]) / top_term(largest)
            values[i] = fma(root * rest, root * temperature, largest)
        else:
            values[i] = logsumexp_value(largest, temperature, sums)
