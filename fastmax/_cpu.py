"""Schedules for a CPU: which thread takes which slices, and in what order memory is walked.

Arrays come as C-contiguous (outer, n) or (outer, n, inner), reduced over n; the mask is None or an array of
bytes of that shape; temperatures are one float64, or one for each of the outer * inner slices. Without a mask
x may have steps, not below 0, between its rows and between its outer indices, as what is cut out of another
array has: only entries of a row, or the neighbours that columns have, are contiguous.

Here the schedule is chosen that suits the shape: for rows (`_rows`), for columns (`_columns`), or for columns
with few neighbours (`_interleaved`; if there is too little for all lanes, or rows do not follow one another,
`_apart`).
"""

import functools
import math
from collections import namedtuple

from fastmax import _apart, _process
from fastmax._columns import (
    TILE_BYTES,
    log_softmax_columns,
    softmax_columns,
    softmax_shallow_columns,
    tall_log_softmax,
    tall_softmax,
    value_columns,
    value_tall_columns,
)
from fastmax._interleaved import (
    log_softmax_interleaved,
    log_softmax_interleaved_chunks,
    softmax_interleaved,
    softmax_interleaved_chunks,
    value_interleaved,
    value_interleaved_chunks,
)
from fastmax._jit import jit
from fastmax._lanes import (
    LANE_BYTES,
    REGISTER_BYTES,
    fma,
    get,
    lane_count,
    load,
    pointer,
    put,
    read,
    settle,
    spread,
    workspace,
    write,
)
from fastmax._layout import layout_of
from fastmax._math import apart, log_of_sum, normalizer, probability, top_term
from fastmax._rows import (
    STORED_BYTES,
    log_softmax_long_rows,
    log_softmax_narrow_rows,
    log_softmax_rows,
    log_softmax_wide_rows,
    softmax_long_rows,
    softmax_narrow_rows,
    softmax_rows,
    softmax_wide_rows,
    value_long_rows,
    value_narrow_rows,
    value_rows,
    value_wide_rows,
)
from fastmax._slice import BLOCK, CHUNK, before_far, sum_lanes, write_whole
from fastmax._threads import PARALLEL_COLUMNS, PARALLEL_ROWS, PARALLEL_SLICE, Kernel, each_task, parts_for
from fastmax._tiles import is_far
from fastmax._tracing import traced

# Rows up to which columns are shallow: a sum is one block. 10 x 10**6 takes 0.83 of the time for it, 1000 of
# 10 x 50 0.8; log_softmax and logsumexp would take 0.95 to 1. Of 24 x 400000 each row and its results are a
# stream, too many for a processor to foresee: 1.3.
SHALLOW = BLOCK

# Entries of a column above which it is tall: a vector of such columns takes half a tile, or a quarter where a
# second cache has 2 MB.
TALL = 2**11


# -- T = inf: every entry has the same share, unless some are infinite or NaN -------------------------

# Entries of a task.
_FILL = 2**14


@Kernel
def fill_uniform(team, parts, x, n, out, logarithm):
    """Fill results at T = inf of slices of n entries, if those are all finite; return whether they are.

    Unless ``logarithm`` is None, these are logarithms. Entries are read once, and no terms computed:
    8192 x 1000 float32 takes 0.65 of the time of another temperature, 10**6 x 10 0.46, 10**7 0.25.
    """
    tasks, high, low = -(-x.size // _FILL), spread(float(n), get(x, 0)), spread(0.0, get(x, 0))
    low = spread(float(n) - float(high), high)
    partial = workspace(tasks, x)
    each_task(scan_entries, team, parts, tasks, (x, partial))
    for task in range(tasks):
        if not partial[task] == 0.0:
            return False
    each_task(fill_entries, team, parts, tasks, (uniform_value(high, low, logarithm), x, out))
    return True


@jit
def scan_entries(task, part, x, partial):
    """Write 0 times the sum of some entries, which is NaN where one of them is not finite."""
    p, lanes, start, stop = pointer(x), lane_count(x), task * _FILL, min(x.size, (task + 1) * _FILL)
    zero = spread(0.0, x)
    a = b = zero
    i = start
    while i <= stop - 2 * lanes:
        a, b = fma(load(p, i), zero, a), fma(load(p, i + lanes), zero, b)
        i += 2 * lanes
    while i < stop:
        a = fma(read(p, i, stop - i, zero), zero, a)
        i += lanes
    total, _ = sum_lanes(a + b, zero)
    put(pointer(partial), task, total)


@jit
def fill_entries(task, part, value, x, out):
    """Write a value to some entries."""
    p, lanes, start, stop = pointer(out), lane_count(out), task * _FILL, min(out.size, (task + 1) * _FILL)
    far, values = is_far(x, out), spread(value, out)
    i = start + before_far(start, stop, p, 0, far)
    if i > start:
        write(p, start, i - start, values)
    while i <= stop - lanes:
        write_whole(p, i, values, far)
        i += lanes
    if i < stop:
        write(p, i, stop - i, values)
    if far:
        settle()


@traced
def uniform_value(high, low, logarithm):
    """Share of one of high + low entries that are equal, or its logarithm, as other kernels have it."""
    top = top_term(high)
    if logarithm is None:
        return probability(top, *normalizer(top * high, top * low))
    log_sum = log_of_sum(high, apart((top * high, top * low), spread(1.0, high)))
    return spread(0.0, high) - spread(log_sum, high)


# -- the choice -----------------------------------------------------------------------------------

# Entries below which columns with few neighbours are not taken as slices that lie apart: the way to those is
# longer.
_SMALL = 2**10

# Time of a narrow row by that of a row of as many whole vectors.
_NARROW_COST = 1.3 if REGISTER_BYTES == 32 else 1.4

Schedules = namedtuple(
    "Schedules",
    "narrow_rows rows wide_rows long_rows columns_apart interleaved interleaved_chunks shallow_columns "
    "columns tall_columns",
)


def _columns_apart(write):
    """Schedule for columns that are taken as slices which lie apart, by a function that chooses the parts."""

    def run(parts, x, mask, temperature, out, *options):
        layout, _ = layout_of(x, mask, (1,), out)
        write(x, mask, layout, temperature, out, *options)

    return run


_SOFTMAX = Schedules(
    softmax_narrow_rows,
    softmax_rows,
    softmax_wide_rows,
    softmax_long_rows,
    _columns_apart(_apart.softmax),
    softmax_interleaved,
    softmax_interleaved_chunks,
    softmax_shallow_columns,
    softmax_columns,
    tall_softmax,
)
_LOG_SOFTMAX = Schedules(
    log_softmax_narrow_rows,
    log_softmax_rows,
    log_softmax_wide_rows,
    log_softmax_long_rows,
    _columns_apart(_apart.log_softmax),
    log_softmax_interleaved,
    log_softmax_interleaved_chunks,
    log_softmax_columns,
    log_softmax_columns,
    tall_log_softmax,
)
_VALUES = Schedules(
    value_narrow_rows,
    value_rows,
    value_wide_rows,
    value_long_rows,
    _columns_apart(_apart.values),
    value_interleaved,
    value_interleaved_chunks,
    value_columns,
    value_columns,
    value_tall_columns,
)


def softmax(x, mask, temperature, out):
    """Write the softmax over axis 1 of ``x`` to ``out``, which has its shape and may be ``x``."""
    if not _is_filled(x, mask, temperature, out, None):
        _run(_SOFTMAX, x, mask, temperature, out)


def log_softmax(x, mask, temperature, out):
    """Write the logarithm of the softmax over axis 1 of ``x`` to ``out``."""
    if not _is_filled(x, mask, temperature, out, True):
        _run(_LOG_SOFTMAX, x, mask, temperature, out)


def logsumexp(x, mask, temperature, out):
    """Write the logsumexp over axis 1 of ``x`` to ``out``, which has the shape (outer, inner)."""
    _run(_VALUES, x, mask, temperature, out, None)


def entropy(x, mask, temperature, out):
    """Write the entropy of the softmax over axis 1 of ``x`` to ``out``, of shape (outer, inner)."""
    _run(_VALUES, x, mask, temperature, out, True)


def _is_filled(x, mask, temperature, out, logarithm):
    """Whether results are those of T = inf, and have been written."""
    if temperature[0] != math.inf or len(temperature) > 1 or mask is not None or not x.flags.c_contiguous:
        return False
    parts = parts_for(x.size, PARALLEL_SLICE)
    return fill_uniform(parts, x.reshape(-1), x.shape[1], out.reshape(-1), logarithm)


def _run(schedules, x, mask, temperature, out, *options):
    """Run the schedule that suits the shape: (outer, n), or (outer, n, inner)."""
    # Whether rows follow one another.
    is_packed = x.ndim < 3 or x.strides[1] == x.shape[2] * x.itemsize
    key = x.shape, is_packed, x.itemsize, len(temperature)
    schedule, is_large, parts = _choice(*key, 1)
    if is_large and (usable := _process.usable_threads()) > 1:
        schedule, _, parts = _choice(*key, usable)
    getattr(schedules, schedule)(parts, x, mask, temperature, out, *options)


@functools.lru_cache(maxsize=256)
def _choice(shape, is_packed, itemsize, temperatures, threads):
    """Name of the schedule for a shape, whether it is worth so many threads, and a part for each with work.

    To choose anew takes 2 us.
    """
    outer, n = shape[:2]
    slices, lanes = max(outer, temperatures), LANE_BYTES // max(itemsize, 4)
    if len(shape) == 3:
        is_large = max(math.prod(shape), slices * n) >= PARALLEL_COLUMNS
        if is_packed and _are_interleaved(shape, lanes):
            return "interleaved", is_large, min(threads, -(-outer // lanes))
        if is_packed and _are_interleaved_chunks(shape, lanes, threads):
            return "interleaved_chunks", is_large, threads
        if _have_few_neighbours(shape, lanes) and math.prod(shape) >= _SMALL:
            return "columns_apart", False, 1
        if n > TALL:
            return "tall_columns", is_large, threads
        if n <= SHALLOW:
            return "shallow_columns", is_large, threads
        return "columns", is_large, threads
    size = slices * n
    if n < lanes or (slices > 1 and n <= CHUNK * lanes):
        schedule = "narrow_rows" if _is_narrow(n, lanes) else "rows"
        return schedule, size >= PARALLEL_ROWS, min(threads, slices)
    if slices > outer or (n * itemsize <= STORED_BYTES and slices >= 10 * threads):
        return "wide_rows", size >= PARALLEL_SLICE, min(threads, slices)
    return "long_rows", size >= PARALLEL_SLICE, threads


def _are_interleaved(shape, lanes):
    """Whether columns take less time as interleaved ones: few neighbours, and outer indices for most lanes.

    On two cores of a Zen 3 1000 x 100 x 5 float32 takes 0.55 of the time of slices that lie apart, 30 x 40 x
    3 0.4, and 16 x 1000 x 4, which fills half the lanes, would 1; of columns 1000 x 20 x 16 takes 0.5 and
    1000 x 20 x 24 0.65, float64 with 12 neighbours 0.9, and with 16 it would 1.3.
    """
    outer, n, inner = shape
    filled = outer / (-(-outer // lanes) * lanes)
    fills = filled > 0.5 if _have_few_neighbours(shape, lanes) else filled > 0.75
    return fills and 4 * inner <= 3 * lanes and n * inner * LANE_BYTES <= TILE_BYTES


def _are_interleaved_chunks(shape, lanes, threads):
    """Whether columns take less time as interleaved chunks: few neighbours, and chunks for all lanes.

    On two cores of a Zen 3 10**6 x 3 float32 takes 0.4 of the time of slices that lie apart, 10**6 x 8 0.2,
    and 20000 x 3 0.75. With chunks for half the lanes 8192 x 3 would take 0.9, and 4096 x 3 float64 1.5; with
    chunks for all, 8192 x 3 float64 takes as long. Of columns, which are more tasks, 100000 x 16 float32
    takes 0.55 and 100000 x 12 float64 0.8.
    """
    outer, n, inner = shape
    tiles = outer * (n // (CHUNK * lanes))
    enough = tiles >= (1 if _have_few_neighbours(shape, lanes) else threads)
    return enough and 4 * inner <= 3 * lanes and CHUNK * inner * LANE_BYTES <= 2 * TILE_BYTES


def _have_few_neighbours(shape, lanes):
    """Whether columns have so few that they take less time as slices that lie apart, if they are large.

    As such 16 x 1000 x 4 float32 takes 0.3 of the time of columns, and 8 x 100 x 8 0.7; 12 neighbours would
    take 1 to 1.8, float64 as much with half as many.
    """
    return 4 * shape[2] <= lanes


def _is_narrow(n, lanes):
    """Whether rows take less time as narrow ones.

    A row takes as long as 0.65 vectors more than it fills, a narrow one 1.4 times its vectors, or with AVX2
    1.3. With AVX2 on a Zen 3 softmax of 56 float32 takes 0.80 of the time as narrow rows, 64 0.94, 72 0.79,
    96 1.06, 100 0.91 and 128 1.14, of 32 float64 0.93, 40 0.78, 48 1.02, 56 0.88 and 64 1.08. With AVX-512 on
    an Emerald Rapids softmax of 40 float32 takes 0.74 of the time as narrow rows, 56 0.97, 63 1.1, 65 0.85,
    80 1.0 and 96 1.2, log_softmax and logsumexp alike; entropy takes 0.65 to 1 up to 159, which would be a
    rule of its own for a tenth.

    Both give the same bits from one vector on, where `lane_sums` takes lanes of a register, too, and below
    five, where softmax has one block.
    """
    return n < lanes or _NARROW_COST * n < (-(-n // lanes) + 0.65) * lanes
