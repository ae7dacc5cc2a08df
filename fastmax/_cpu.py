"""Schedules for a CPU: which thread takes which slices, and in what order memory is walked.

Arrays come as C-contiguous (outer, n, inner), reduced over n; temperatures as one float64, or one for each
of the outer * inner slices. Three schedules cover them:

- rows (inner = 1): a slice is contiguous, a thread takes whole slices;
- long rows: fewer rows than keep the threads busy, so that all threads share each row, chunk by chunk;
- columns (inner > 1): neighbouring slices lie side by side, a thread takes `BLOCK` of them at a time, one
  slice per lane, and walks memory in its own order.
"""

import math
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
    entropy_value,
    gap_of,
    is_plain,
    larger,
    log_of_sum,
    log_terms,
    logsumexp_value,
    merge,
    multiplier,
    plain_scale,
    reciprocal,
    scale_of,
    terms,
    times_pair,
)
from fastmax._slice import CHUNK, STORED_BYTES, merge_split, split_terms, weighted_term

# Entries from which waking the threads pays.
PARALLEL_SIZE = 2**16

# Columns that a thread takes at a time.
BLOCK = 128


# -- rows -----------------------------------------------------------------------------------------


def _softmax_rows(x, temperature, out):
    step = min(len(temperature) - 1, 1)
    for i in prange(len(x)):
        _slice.softmax(x[i], temperature[i * step], out[i])


def _log_softmax_rows(x, temperature, out):
    step = min(len(temperature) - 1, 1)
    for i in prange(len(x)):
        _slice.log_softmax(x[i], temperature[i * step], out[i])


def _logsumexp_rows(x, temperature, out):
    step = min(len(temperature) - 1, 1)
    for i in prange(len(x)):
        out[i] = _slice.logsumexp(x[i], temperature[i * step])


def _entropy_rows(x, temperature, out):
    step = min(len(temperature) - 1, 1)
    for i in prange(len(x)):
        out[i] = _slice.entropy(x[i], temperature[i * step])


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
        row_max = maxima[row]
        top_term = terms(row_max, scale_of(row_max, temperature[row * step]))
        log_sum = log_of_sum(row_max, top_term, sums_at(sums, row))
        gap = gap_of(row_max, temperature[row * step], log_sum)
        _slice.write_log_terms(x[row], start, stop, gap, out[row])


@jit
def long_values(temperature, maxima, sums, weighted, out):
    """Entropy (weighted) or logsumexp of each row, from its sums."""
    step = min(len(temperature) - 1, 1)
    for row in range(len(maxima)):
        row_max = maxima[row]
        top_term = terms(row_max, scale_of(row_max, temperature[row * step]))
        own = temperature[row * step]
        if weighted:
            out[row] = entropy_value(row_max, own, top_term, sums_at(sums, row))
        else:
            out[row] = logsumexp_value(row_max, own, top_term, sums_at(sums, row))


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
    long_values(temperature, maxima, sums, False, out)


def _entropy_long(x, temperature, out):
    maxima = long_maxima(x)
    sums = long_split_sums(x, temperature, maxima, True)
    long_values(temperature, maxima, sums, True, out)


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
    """Scale of each column, and whether one of them is shifted."""
    scales = np.empty((7, BLOCK), maxima.dtype)
    shifted = False
    lanes = lane_count(maxima)
    single = len(temperature) == 1
    common = scale_of(spread(0.0, maxima[0]), temperature[0])
    for j in range(0, width, lanes):
        column_max = load(maxima, j)
        high = spread(common.high, column_max)
        if single and not common.shifted and is_plain(column_max, high):
            set_scale(scales, j, plain_scale(column_max, high, spread(common.low, column_max)))
        else:
            for k in range(j, j + lanes):
                own = temperature[0] if single or k >= width else temperature[k]
                scale = scale_of(maxima[k], own)
                shifted |= scale.shifted
                scales[0, k], scales[1, k] = scale.high, scale.low
                scales[2, k], scales[3, k] = scale.rounder, scale.cutoff
                scales[4, k] = scale.shift
                scales[5, k], scales[6, k] = scale.factor, scale.factor2
    return scales, shifted


@jit(inline="always")
def set_scale(scales, j, scale):
    """Store the scales of the columns from j on, one per lane."""
    store(scales[0], j, scale.high)
    store(scales[1], j, scale.low)
    store(scales[2], j, scale.rounder)
    store(scales[3], j, scale.cutoff)
    store(scales[4], j, scale.shift)
    store(scales[5], j, scale.factor)
    store(scales[6], j, scale.factor2)


@jit(inline="always")
def get_scale(scales, shifted, j):
    """Load the scales of the columns from j on, one per lane."""
    return Scale(
        load(scales[0], j),
        load(scales[1], j),
        load(scales[2], j),
        load(scales[3], j),
        shifted,
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
        gaps[3, k], gaps[4, k], gaps[5, k] = gap.inverse, gap.cutoff, gap.log_sum
    return gaps


@jit
def block_sums(x, first, width, scales, shifted, out, stored):
    """Sum of the terms of each column, a pair; terms are written to ``out`` if they are to be stored."""
    lanes = lane_count(x)
    sums = np.zeros((2, BLOCK), x.dtype)
    for start in range(0, len(x), CHUNK):
        part = np.zeros((2, BLOCK), x.dtype)
        for i in range(start, min(len(x), start + CHUNK)):
            for j in range(0, width, lanes):
                entries = read(x[i], first + j, width - j)
                term = terms(entries, get_scale(scales, shifted, j))
                if stored:
                    write(out[i], first + j, width - j, term)
                total, error = add(load(part[0], j), load(part[1], j), term)
                store(part[0], j, total)
                store(part[1], j, error)
        for j in range(0, width, lanes):
            total, error = merge(
                load(sums[0], j), load(sums[1], j), load(part[0], j), load(part[1], j)
            )
            store(sums[0], j, total)
            store(sums[1], j, error)
    return sums


@jit
def softmax_block(x, first, width, temperature, out):
    """Softmax of the columns of a block."""
    lanes = lane_count(x)
    scales, shifted = block_scales(block_maxima(x, first, width), temperature, width)
    stored = len(x) * BLOCK * x.itemsize <= STORED_BYTES
    sums = block_sums(x, first, width, scales, shifted, out, stored)
    for j in range(0, width, lanes):
        high, low = reciprocal(load(sums[0], j), load(sums[1], j))
        store(sums[0], j, high)
        store(sums[1], j, low)
    for i in range(len(x)):
        for j in range(0, width, lanes):
            if stored:
                term = read(out[i], first + j, width - j)
            else:
                term = terms(read(x[i], first + j, width - j), get_scale(scales, shifted, j))
            value = times_pair(term, load(sums[0], j), load(sums[1], j))
            write(out[i], first + j, width - j, value)


@jit
def block_split_sums(x, first, width, temperature, maxima, weighted):
    """`sum_split_terms` of each column, and the term of its maximum."""
    lanes = lane_count(x)
    scales, shifted = block_scales(maxima, temperature, width)
    gaps = block_gaps(maxima, temperature, np.zeros(width), width)
    sums = np.zeros((5, BLOCK), x.dtype)
    for start in range(0, len(x), CHUNK):
        part = np.zeros((5, BLOCK), x.dtype)
        for i in range(start, min(len(x), start + CHUNK)):
            for j in range(0, width, lanes):
                entries = read(x[i], first + j, width - j)
                top, term = split_terms(entries, load(maxima, j), get_scale(scales, shifted, j))
                store(part[0], j, load(part[0], j) + top)
                rest, error = add(load(part[1], j), load(part[2], j), term)
                store(part[1], j, rest)
                store(part[2], j, error)
                if weighted:
                    moment, error = add(
                        load(part[3], j),
                        load(part[4], j),
                        weighted_term(entries, term, get_gap(gaps, j)),
                    )
                    store(part[3], j, moment)
                    store(part[4], j, error)
        for k in range(width):
            merged = merge_split(sums_at(sums.T, k), sums_at(part.T, k))
            for m in range(5):
                sums[m, k] = merged[m]
    top_terms = np.empty(BLOCK, x.dtype)
    for j in range(0, width, lanes):
        store(top_terms, j, terms(load(maxima, j), get_scale(scales, shifted, j)))
    return sums, top_terms


@jit
def log_softmax_block(x, first, width, temperature, out):
    """Logarithm of the softmax of the columns of a block."""
    maxima = block_maxima(x, first, width)
    sums, top_terms = block_split_sums(x, first, width, temperature, maxima, False)
    log_sums = np.empty(width)
    for k in range(width):
        log_sums[k] = log_of_sum(maxima[k], top_terms[k], sums_at(sums.T, k))
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
    sums, top_terms = block_split_sums(x, first, width, temperature, maxima, False)
    for k in range(width):
        own = sums_at(sums.T, k)
        out[first + k] = logsumexp_value(maxima[k], temperature[k * step], top_terms[k], own)


@jit
def entropy_block(x, first, width, temperature, out):
    """Entropy of the softmax of the columns of a block."""
    step = min(len(temperature) - 1, 1)
    maxima = block_maxima(x, first, width)
    sums, top_terms = block_split_sums(x, first, width, temperature, maxima, True)
    for k in range(width):
        own = sums_at(sums.T, k)
        out[first + k] = entropy_value(maxima[k], temperature[k * step], top_terms[k], own)


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


def _run(schedules, x, temperature, out):
    outer, n, inner = x.shape
    threads = numba.get_num_threads() if x.size >= PARALLEL_SIZE else 1
    if inner > 1:
        schedule = schedules.columns_parallel if threads > 1 else schedules.columns
        schedule(x, temperature, out)
        return
    if threads == 1:
        schedule = schedules.rows
    elif outer < 4 * threads and n > 2 * CHUNK:
        schedule = schedules.long
    else:
        schedule = schedules.rows_parallel
    schedule(x.reshape(outer, n), temperature, out.reshape(out.shape[:-1]))
