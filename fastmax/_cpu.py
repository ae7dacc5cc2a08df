"""Schedules for a CPU: which thread takes which slices, and in what order memory is walked.

Arrays come as C-contiguous (outer, n, inner), reduced over n; temperatures as one float64, or one for each
of the outer * inner slices. Three schedules cover them:

- rows (inner = 1): a slice is contiguous, a thread takes whole slices; one row may meet many temperatures;
- long rows: fewer rows than keep the threads busy, so that all threads share each row, chunk by chunk;
- columns (inner > 1): neighbouring slices lie side by side, a thread takes `BLOCK` of them at a time, one
  slice per lane, and walks memory in its own order.
"""

import math
import os
from collections import namedtuple

import numba
import numpy as np
from numba import prange

from fastmax import _slice
from fastmax._jit import jit, parallel_jit
from fastmax._lanes import lane_count, load, load_first, spread, store, store_first
from fastmax._math import (
    Gap,
    Scale,
    add,
    add_smaller,
    entropy_value,
    gap_of,
    larger,
    log_of_sum,
    log_terms,
    merge,
    reciprocal,
    scale_of,
    terms,
    times_pair,
    top_term,
)
from fastmax._slice import CHUNK, STORED_BYTES, merge_split, split_terms, weighted_term

# Entries from which waking the threads pays.
PARALLEL_SIZE = 2**16

# Columns that a thread takes at a time.
BLOCK = 128


# -- rows -----------------------------------------------------------------------------------------


def _softmax_rows(x, temperature, out):
    x_step, step = min(len(x) - 1, 1), min(len(temperature) - 1, 1)
    for i in prange(len(out)):
        _slice.softmax(x[i * x_step], temperature[i * step], out[i])


def _log_softmax_rows(x, temperature, out):
    x_step, step = min(len(x) - 1, 1), min(len(temperature) - 1, 1)
    for i in prange(len(out)):
        _slice.log_softmax(x[i * x_step], temperature[i * step], out[i])


def _logsumexp_rows(x, temperature, out):
    x_step, step = min(len(x) - 1, 1), min(len(temperature) - 1, 1)
    for i in prange(len(out)):
        out[i] = _slice.logsumexp(x[i * x_step], temperature[i * step])


def _entropy_rows(x, temperature, out):
    x_step, step = min(len(x) - 1, 1), min(len(temperature) - 1, 1)
    for i in prange(len(out)):
        out[i] = _slice.entropy(x[i * x_step], temperature[i * step])


# -- long rows ------------------------------------------------------------------------------------


@jit
def chunk_of(task, n):
    """Row, number, start and stop of the chunk that a task stands for."""
    chunks = -(-n // CHUNK)
    start = task % chunks * CHUNK
    return task // chunks, task % chunks, start, min(n, start + CHUNK)


@parallel_jit
def long_maxima(x):
    """Maximum of each row."""
    rows, n = x.shape
    chunks = -(-n // CHUNK)
    partial = np.empty((rows, chunks), x.dtype)
    for task in prange(rows * chunks):
        row, number, start, stop = chunk_of(task, n)
        partial[row, number] = _slice.maximum(x[row], start, stop)
    maxima = np.empty(rows, x.dtype)
    for row in range(rows):
        maxima[row] = _slice.maximum(partial[row], 0, chunks)
    return maxima


@parallel_jit
def long_reciprocals(x, temperature, maxima):
    """1 / sum of the terms of each row, as a pair."""
    rows, n = x.shape
    chunks = -(-n // CHUNK)
    step = min(len(temperature) - 1, 1)
    partial = np.empty((rows, chunks, 2), x.dtype)
    for task in prange(rows * chunks):
        row, number, start, stop = chunk_of(task, n)
        scale = scale_of(maxima[row], temperature[row * step])
        total, error = _slice.sum_terms(x[row], start, stop, scale, x[row], False)
        partial[row, number, 0] = total
        partial[row, number, 1] = error
    pairs = np.empty((rows, 2), x.dtype)
    for row in range(rows):
        total = error = spread(0.0, maxima[row])
        for number in range(chunks):
            part = partial[row, number]
            total, error = merge(total, error, part[0], part[1])
        pairs[row, 0], pairs[row, 1] = reciprocal(total, error)
    return pairs


@parallel_jit
def long_write(x, temperature, maxima, reciprocals, out):
    """Write the terms of each row times its reciprocal."""
    rows, n = x.shape
    step = min(len(temperature) - 1, 1)
    for task in prange(rows * -(-n // CHUNK)):
        row, _, start, stop = chunk_of(task, n)
        scale = scale_of(maxima[row], temperature[row * step])
        high, low = reciprocals[row, 0], reciprocals[row, 1]
        _slice.write_terms(x[row], start, stop, scale, high, low, out[row])


@parallel_jit
def long_split_sums(x, temperature, maxima, weighted):
    """`sum_split_terms` of each row."""
    rows, n = x.shape
    chunks = -(-n // CHUNK)
    step = min(len(temperature) - 1, 1)
    partial = np.empty((rows, chunks, 5), x.dtype)
    for task in prange(rows * chunks):
        row, number, start, stop = chunk_of(task, n)
        row_max = maxima[row]
        scale = scale_of(row_max, temperature[row * step])
        gap = gap_of(row_max, temperature[row * step], 0.0)
        part = _slice.sum_split_terms(x[row], start, stop, row_max, scale, gap, weighted)
        for k in range(5):
            partial[row, number, k] = part[k]
    sums = np.zeros((rows, 5), x.dtype)
    for row in range(rows):
        for number in range(chunks):
            merged = merge_split(sums_at(sums, row), sums_at(partial[row], number))
            for k in range(5):
                sums[row, k] = merged[k]
    return sums


@jit(inline="always")
def sums_at(sums, i):
    """Row of an array of sums as a tuple."""
    return sums[i, 0], sums[i, 1], sums[i, 2], sums[i, 3], sums[i, 4]


@parallel_jit
def long_write_log(x, temperature, maxima, sums, out):
    """Write the logarithms of each row."""
    rows, n = x.shape
    step = min(len(temperature) - 1, 1)
    for task in prange(rows * -(-n // CHUNK)):
        row, _, start, stop = chunk_of(task, n)
        log_sum = log_of_sum(maxima[row], sums_at(sums, row))
        gap = gap_of(maxima[row], temperature[row * step], log_sum)
        _slice.write_log_terms(x[row], start, stop, gap, out[row])


@jit
def long_logsumexps(x, temperature, maxima, sums, out):
    """Logsumexp of each row, from its sums."""
    step = min(len(temperature) - 1, 1)
    for row in range(len(maxima)):
        own = temperature[row * step]
        out[row] = _slice.logsumexp_of_sums(x[row], maxima[row], own, sums_at(sums, row))


@jit
def long_entropies(maxima, sums, out):
    """Entropy of each row, from its sums."""
    for row in range(len(maxima)):
        out[row] = entropy_value(maxima[row], sums_at(sums, row))


def _softmax_long(x, temperature, out):
    maxima = long_maxima(x)
    long_write(x, temperature, maxima, long_reciprocals(x, temperature, maxima), out)


def _log_softmax_long(x, temperature, out):
    maxima = long_maxima(x)
    sums = long_split_sums(x, temperature, maxima, False)
    long_write_log(x, temperature, maxima, sums, out)


def _logsumexp_long(x, temperature, out):
    maxima = long_maxima(x)
    sums = long_split_sums(x, temperature, maxima, False)
    long_logsumexps(x, temperature, maxima, sums, out)


def _entropy_long(x, temperature, out):
    maxima = long_maxima(x)
    sums = long_split_sums(x, temperature, maxima, True)
    long_entropies(maxima, sums, out)


# -- columns --------------------------------------------------------------------------------------
# A block is x[:, first : first + width] of an (n, inner) array. Its state, some numbers for each column,
# is kept in arrays of shape (numbers, BLOCK), which stay in the first cache.


@jit(inline="always")
def read(row, j, count):
    """Lanes from entry j on, 0 in those from ``count`` on."""
    if count >= lane_count(row):
        return load(row, j)
    return load_first(row, j, count, spread(0.0, row))


@jit(inline="always")
def write(row, j, count, value):
    """Write the first ``count`` lanes from entry j on."""
    if count >= lane_count(row):
        store(row, j, value)
    else:
        store_first(row, j, count, value)


@jit
def block_maxima(x, first, width):
    """Maximum of each column; 0 beyond the block's width."""
    maxima = np.zeros(BLOCK, x.dtype)
    maxima[:width] = -math.inf
    for i in range(len(x)):
        row = x[i]
        for j in range(0, width, lane_count(x)):
            store(maxima, j, larger(read(row, first + j, width - j), load(maxima, j)))
    return maxima


@jit
def block_scales(maxima, temperature, width):
    """Scale of each column: one for all but for the maximum, and where that will not do, one each.

    Returns the common scale, whether it will do, and an array of all fields of each.
    """
    common = scale_of(spread(0.0, maxima[0]), temperature[0])
    shared = len(temperature) == 1 and not common.scaled
    for k in range(width):
        shared = shared and not math.isinf(maxima[k])
    scales = np.empty((7, BLOCK), maxima.dtype)
    if not shared:
        step = min(len(temperature) - 1, 1)
        lanes = lane_count(maxima)
        for k in range(-(-width // lanes) * lanes):
            own = min(k, width - 1)
            scale = scale_of(maxima[own], temperature[own * step])
            scales[0, k], scales[1, k] = scale.row_max, scale.high
            scales[2, k], scales[3, k] = scale.low, scale.cutoff
            scales[4, k] = scale.prescale
            scales[5, k], scales[6, k] = scale.factor, scale.factor2
    return common, shared, scales


@jit(inline="always")
def get_scale(common, shared, scales, maxima, j):
    """Scales of the columns from j on, one per lane."""
    row_max = load(maxima, j)
    if shared:
        return Scale(
            row_max,
            spread(common.high, row_max),
            spread(common.low, row_max),
            spread(common.cutoff, row_max),
            False,
            row_max,
            row_max,
            row_max,
        )
    return Scale(
        load(scales[0], j),
        load(scales[1], j),
        load(scales[2], j),
        load(scales[3], j),
        True,
        load(scales[4], j),
        load(scales[5], j),
        load(scales[6], j),
    )


@jit(inline="always")
def get_gap(gaps, j):
    """Load the gaps of the columns from j on, one per lane."""
    return Gap(
        load(gaps[0], j),
        load(gaps[1], j),
        load(gaps[2], j),
        load(gaps[3], j),
        load(gaps[4], j),
        load(gaps[5], j),
    )


@jit
def block_gaps(maxima, temperature, log_sums, width):
    """Gap of each column."""
    gaps = np.zeros((6, BLOCK), maxima.dtype)
    step = min(len(temperature) - 1, 1)
    for k in range(width):
        gap = gap_of(maxima[k], temperature[k * step], log_sums[k])
        gaps[0, k], gaps[1, k], gaps[2, k] = gap.row_max, gap.prescale, gap.factor
        gaps[3, k], gaps[4, k], gaps[5, k] = gap.inverse, gap.cutoff, gap.summand
    return gaps


@jit
def softmax_block(x, first, width, temperature, out):
    """Softmax of the columns of a block."""
    n, lanes = len(x), lane_count(x)
    maxima = block_maxima(x, first, width)
    common, shared, scales = block_scales(maxima, temperature, width)
    stored = n * width * x.itemsize <= STORED_BYTES
    totals, errors = np.zeros(BLOCK, x.dtype), np.zeros(BLOCK, x.dtype)
    part, part_errors = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    for start in range(0, n, CHUNK):
        part[:] = top_term(maxima[0])
        part_errors[:] = 0.0
        for i in range(start, min(n, start + CHUNK)):
            for j in range(0, width, lanes):
                scale = get_scale(common, shared, scales, maxima, j)
                term, lost = terms(read(x[i], first + j, width - j), scale)
                if stored:
                    write(out[i], first + j, width - j, term)
                total, error = add_smaller(load(part, j), load(part_errors, j) + lost, term)
                store(part, j, total)
                store(part_errors, j, error)
        for j in range(0, width, lanes):
            part_sum = load(part, j) - top_term(x)
            total, error = merge(load(totals, j), load(errors, j), part_sum, load(part_errors, j))
            store(totals, j, total)
            store(errors, j, error)
    for j in range(0, width, lanes):
        high, low = reciprocal(load(totals, j), load(errors, j))
        store(totals, j, high)
        store(errors, j, low)
    for i in range(n):
        for j in range(0, width, lanes):
            if stored:
                term = read(out[i], first + j, width - j)
            else:
                scale = get_scale(common, shared, scales, maxima, j)
                term, _ = terms(read(x[i], first + j, width - j), scale)
            value = times_pair(term, load(totals, j), load(errors, j))
            write(out[i], first + j, width - j, value)


@jit
def block_split_sums(x, first, width, temperature, maxima, weighted):
    """`sum_split_terms` of each column."""
    n, lanes = len(x), lane_count(x)
    common, shared, scales = block_scales(maxima, temperature, width)
    gaps = block_gaps(maxima, temperature, np.zeros(width), width)
    sums = np.zeros((5, BLOCK), x.dtype)
    for start in range(0, n, CHUNK):
        part = np.zeros((5, BLOCK), x.dtype)
        for i in range(start, min(n, start + CHUNK)):
            for j in range(0, width, lanes):
                entries = read(x[i], first + j, width - j)
                scale = get_scale(common, shared, scales, maxima, j)
                top, term, lost = split_terms(entries, load(maxima, j), scale)
                store(part[0], j, load(part[0], j) + top)
                rest, error = add(load(part[1], j), load(part[2], j) + lost, term)
                store(part[1], j, rest)
                store(part[2], j, error)
                if weighted:
                    weighted_terms = weighted_term(entries, term, get_gap(gaps, j))
                    moment, error = add(load(part[3], j), load(part[4], j), weighted_terms)
                    store(part[3], j, moment)
                    store(part[4], j, error)
        for k in range(width):
            merged = merge_split(sums_at(sums.T, k), sums_at(part.T, k))
            for m in range(5):
                sums[m, k] = merged[m]
    return sums


@jit
def log_softmax_block(x, first, width, temperature, out):
    """Logarithm of the softmax of the columns of a block."""
    maxima = block_maxima(x, first, width)
    sums = block_split_sums(x, first, width, temperature, maxima, False)
    log_sums = np.empty(width)
    for k in range(width):
        log_sums[k] = log_of_sum(maxima[k], sums_at(sums.T, k))
    gaps = block_gaps(maxima, temperature, log_sums, width)
    for i in range(len(x)):
        for j in range(0, width, lane_count(x)):
            value = log_terms(read(x[i], first + j, width - j), get_gap(gaps, j))
            write(out[i], first + j, width - j, value)


@jit
def logsumexp_block(x, first, width, temperature, out):
    """Logsumexp of the columns of a block."""
    step = min(len(temperature) - 1, 1)
    maxima = block_maxima(x, first, width)
    sums = block_split_sums(x, first, width, temperature, maxima, False)
    for k in range(width):
        own = temperature[k * step]
        column = x[:, first + k]
        out[first + k] = _slice.logsumexp_of_sums(column, maxima[k], own, sums_at(sums.T, k))


@jit
def entropy_block(x, first, width, temperature, out):
    """Entropy of the softmax of the columns of a block."""
    maxima = block_maxima(x, first, width)
    sums = block_split_sums(x, first, width, temperature, maxima, True)
    for k in range(width):
        out[first + k] = entropy_value(maxima[k], sums_at(sums.T, k))


@jit
def temperatures_of(temperature, start, width):
    """Temperatures of the slices from ``start`` on, or the one of them all."""
    if len(temperature) == 1:
        return temperature
    return temperature[start : start + width]


@jit
def block_of(task, inner):
    """Outer index, first column and width of the block that a task stands for."""
    blocks = -(-inner // BLOCK)
    first = task % blocks * BLOCK
    return task // blocks, first, min(BLOCK, inner - first)


def _softmax_columns(x, temperature, out):
    outer, _, inner = x.shape
    for task in prange(outer * -(-inner // BLOCK)):
        i, first, width = block_of(task, inner)
        own = temperatures_of(temperature, i * inner + first, width)
        softmax_block(x[i], first, width, own, out[i])


def _log_softmax_columns(x, temperature, out):
    outer, _, inner = x.shape
    for task in prange(outer * -(-inner // BLOCK)):
        i, first, width = block_of(task, inner)
        own = temperatures_of(temperature, i * inner + first, width)
        log_softmax_block(x[i], first, width, own, out[i])


def _logsumexp_columns(x, temperature, out):
    outer, _, inner = x.shape
    for task in prange(outer * -(-inner // BLOCK)):
        i, first, width = block_of(task, inner)
        own = temperatures_of(temperature, i * inner + first, width)
        logsumexp_block(x[i], first, width, own, out[i])


def _entropy_columns(x, temperature, out):
    outer, _, inner = x.shape
    for task in prange(outer * -(-inner // BLOCK)):
        i, first, width = block_of(task, inner)
        own = temperatures_of(temperature, i * inner + first, width)
        entropy_block(x[i], first, width, own, out[i])


# -- the choice -----------------------------------------------------------------------------------

Schedules = namedtuple("Schedules", "rows rows_parallel long columns columns_parallel")


def _compile(rows, long, columns):
    return Schedules(jit(rows), parallel_jit(rows), long, jit(columns), parallel_jit(columns))


_SOFTMAX = _compile(_softmax_rows, _softmax_long, _softmax_columns)
_LOG_SOFTMAX = _compile(_log_softmax_rows, _log_softmax_long, _log_softmax_columns)
_LOGSUMEXP = _compile(_logsumexp_rows, _logsumexp_long, _logsumexp_columns)
_ENTROPY = _compile(_entropy_rows, _entropy_long, _entropy_columns)


def softmax(x, temperature, out):
    """Write the softmax over axis 1 of ``x`` to ``out``, which has its shape and may be ``x``."""
    _run(_SOFTMAX, x, temperature, out)


def log_softmax(x, temperature, out):
    """Write the logarithm of the softmax over axis 1 of ``x`` to ``out``."""
    _run(_LOG_SOFTMAX, x, temperature, out)


def logsumexp(x, temperature, out):
    """Write the logsumexp over axis 1 of ``x`` to ``out``, which has the shape (outer, inner)."""
    _run(_LOGSUMEXP, x, temperature, out)


def entropy(x, temperature, out):
    """Write the entropy of the softmax over axis 1 of ``x`` to ``out``, of shape (outer, inner)."""
    _run(_ENTROPY, x, temperature, out)


# GNU OpenMP kills a forked child that starts threads if its parent had any: such a child works on one.
_has_threads = False
_forked_from_threads = False


def _after_fork():
    global _forked_from_threads
    _forked_from_threads = _has_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(size):
    """Number of threads for an array of some size."""
    global _has_threads
    if size < PARALLEL_SIZE or _forked_from_threads:
        return 1
    threads = numba.get_num_threads()
    _has_threads = _has_threads or threads > 1
    return threads


def _run(schedules, x, temperature, out):
    outer, n, inner = x.shape
    rows = max(outer, len(temperature))
    threads = _threads(rows * n * inner)
    if inner > 1:
        schedule = schedules.columns_parallel if threads > 1 else schedules.columns
        schedule(x, temperature, out)
        return
    if threads == 1:
        schedule = schedules.rows
    elif rows == outer and rows < 4 * threads and n > 2 * CHUNK:
        schedule = schedules.long
    else:
        schedule = schedules.rows_parallel
    schedule(x.reshape(outer, n), temperature, out.reshape(out.shape[:-1]))
