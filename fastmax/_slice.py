"""One slice on one thread: the passes over its entries that the schedules put together.

A pass takes entries ``start`` to ``stop`` of a 1-d array, many lanes at a time if the array's type is
C-contiguous, else one by one. Entry i is summed in lane i mod lanes, and chunks of `CHUNK` entries are
merged in order, so a sum does not depend on who computes which chunk.
"""

import math

import numpy as np

from fastmax._jit import jit
from fastmax._lanes import (
    fma,
    lane_count,
    load,
    load_first,
    max_lanes,
    select,
    spread,
    store,
    store_first,
)
from fastmax._math import (
    add,
    add_smaller,
    entropy_value,
    gap_of,
    larger,
    log_of_sum,
    log_terms,
    logsumexp_value,
    merge,
    misses_faint_terms,
    reciprocal,
    scale_of,
    sum_lanes,
    terms,
    times_pair,
    top_term,
)

# Entries whose sum is one link of the chain: few enough that the errors of a chunk, summed plainly, stay
# exact to a thousandth of an ulp in float32, and enough to make a task for a thread.
CHUNK = 16384

# Bytes of a slice up to which its terms stay in the cache of a core until they are scaled: they are stored
# and read again. Longer slices compute them twice, which spares a trip to memory.
STORED_BYTES = 2**19


@jit
def maximum(x, start, stop):
    """Largest entry, NaN left out; -inf if there is none."""
    lanes = lane_count(x)
    lowest = spread(-math.inf, x)
    a = b = c = d = lowest
    i = start
    while i <= stop - 4 * lanes:  # four chains, for one would wait for itself
        a = larger(load(x, i), a)
        b = larger(load(x, i + lanes), b)
        c = larger(load(x, i + 2 * lanes), c)
        d = larger(load(x, i + 3 * lanes), d)
        i += 4 * lanes
    while i <= stop - lanes:
        a = larger(load(x, i), a)
        i += lanes
    if i < stop:
        b = larger(load_first(x, i, stop - i, lowest), b)
    return max_lanes(larger(larger(a, b), larger(c, d)))


@jit
def sum_terms(x, start, stop, scale, out, stored):
    """Sum of the terms as a pair; the terms are written to ``out`` if they are to be stored.

    The sum starts from a number that no term exceeds, for which `add_smaller` does.
    """
    lanes = lane_count(x)
    total = top_term(x)
    error = spread(0.0, x)
    i = start
    while i <= stop - lanes:
        term, lost = terms(load(x, i), scale)
        if stored:
            store(out, i, term)
        total, error = add_smaller(total, error + lost, term)
        i += lanes
    if i < stop:
        term, lost = terms(load_first(x, i, stop - i, spread(-math.inf, x)), scale)
        if stored:
            store_first(out, i, stop - i, term)
        total, error = add_smaller(total, error + lost, term)
    return sum_lanes(total - top_term(x), error)


@jit
def scale_stored(out, start, stop, high, low):
    """Multiply the stored terms by high + low."""
    lanes = lane_count(out)
    i = start
    while i <= stop - lanes:
        store(out, i, times_pair(load(out, i), spread(high, out), spread(low, out)))
        i += lanes
    if i < stop:
        term = load_first(out, i, stop - i, spread(0.0, out))
        store_first(out, i, stop - i, times_pair(term, spread(high, out), spread(low, out)))


@jit
def write_terms(x, start, stop, scale, high, low, out):
    """Write the terms times high + low."""
    lanes = lane_count(x)
    i = start
    while i <= stop - lanes:
        term, _ = terms(load(x, i), scale)
        store(out, i, times_pair(term, spread(high, x), spread(low, x)))
        i += lanes
    if i < stop:
        term, _ = terms(load_first(x, i, stop - i, spread(0.0, x)), scale)
        store_first(out, i, stop - i, times_pair(term, spread(high, x), spread(low, x)))


@jit
def write_log_terms(x, start, stop, gap, out):
    """Write (x - max) / T - log_sum."""
    lanes = lane_count(x)
    i = start
    while i <= stop - lanes:
        store(out, i, log_terms(load(x, i), gap))
        i += lanes
    if i < stop:
        value = log_terms(load_first(x, i, stop - i, spread(0.0, x)), gap)
        store_first(out, i, stop - i, value)


@jit
def split_terms(x, row_max, scale):
    """1 for each entry equal to the maximum, and the terms (and what was lost of them) of the others."""
    zero = spread(0.0, x)
    top = x == spread(row_max, x)
    term, lost = terms(x, scale)
    return select(top, spread(1.0, x), zero), select(top, zero, term), select(top, zero, lost)


@jit
def weighted_term(x, term, gap):
    """Term * (x - max) / T, 0 where the term is."""
    zero = spread(0.0, x)
    return select(term > zero, term * log_terms(x, gap), zero)


@jit
def sum_split_terms(x, start, stop, row_max, scale, gap, weighted):
    """Return ties, sum of the other terms (a pair), their sum times (x - max) / T (a pair).

    The last is left 0 unless it is asked for.
    """
    lanes = lane_count(x)
    ties = rest = error = moment = moment_error = spread(0.0, x)
    i = start
    while i < stop:
        if i <= stop - lanes:
            entries = load(x, i)
        else:
            # NaN equals nothing, so the filler cannot be a tie; it is no term either.
            entries = load_first(x, i, stop - i, spread(-math.inf, x))
        top, term, lost = split_terms(entries, row_max, scale)
        ties = ties + top
        rest, error = add(rest, error + lost, term)
        if weighted:
            moment, moment_error = add(moment, moment_error, weighted_term(entries, term, gap))
        i += lanes
    ties, _ = sum_lanes(ties, spread(0.0, x))
    rest, error = sum_lanes(rest, error)
    moment, moment_error = sum_lanes(moment, moment_error)
    return ties, rest, error, moment, moment_error


@jit
def merge_split(a, b):
    """Merge two results of `sum_split_terms`."""
    rest, error = merge(a[1], a[2], b[1], b[2])
    moment, moment_error = merge(a[3], a[4], b[3], b[4])
    return a[0] + b[0], rest, error, moment, moment_error


# -- a whole slice --------------------------------------------------------------------------------


@jit
def sum_slice(x, scale, out, stored):
    """`sum_terms` over all chunks of a slice."""
    n = len(x)
    total = error = spread(0.0, scale.row_max)
    for start in range(0, n, CHUNK):
        part, part_error = sum_terms(x, start, min(n, start + CHUNK), scale, out, stored)
        total, error = merge(total, error, part, part_error)
    return total, error


@jit
def sum_split_slice(x, row_max, scale, gap, weighted):
    """`sum_split_terms` over all chunks of a slice."""
    n = len(x)
    zero = spread(0.0, row_max)
    sums = zero, zero, zero, zero, zero
    for start in range(0, n, CHUNK):
        stop = min(n, start + CHUNK)
        sums = merge_split(sums, sum_split_terms(x, start, stop, row_max, scale, gap, weighted))
    return sums


@jit
def softmax(x, temperature, out):
    """Softmax of a slice: three reads of memory and a write, or one of each if it fits a cache."""
    n = len(x)
    scale = scale_of(maximum(x, 0, n), temperature)
    stored = n * x.itemsize <= STORED_BYTES
    total, error = sum_slice(x, scale, out, stored)
    high, low = reciprocal(total, error)
    if stored:
        scale_stored(out, 0, n, high, low)
    else:
        write_terms(x, 0, n, scale, high, low, out)


@jit
def log_softmax(x, temperature, out):
    """Logarithm of the softmax of a slice: three reads and a write, or one of each from a cache."""
    row_max = maximum(x, 0, len(x))
    scale = scale_of(row_max, temperature)
    gap = gap_of(row_max, temperature, 0.0)
    sums = sum_split_slice(x, row_max, scale, gap, False)
    log_sum = log_of_sum(row_max, sums)
    write_log_terms(x, 0, len(x), gap_of(row_max, temperature, log_sum), out)


@jit
def logsumexp(x, temperature):
    """T log(sum(exp(x / T))) of a slice."""
    row_max = maximum(x, 0, len(x))
    scale = scale_of(row_max, temperature)
    gap = gap_of(row_max, temperature, 0.0)
    sums = sum_split_slice(x, row_max, scale, gap, False)
    return logsumexp_of_sums(x, row_max, temperature, sums)


@jit
def logsumexp_of_sums(x, row_max, temperature, sums):
    """Logsumexp of a slice from its `sum_split_terms`."""
    if misses_faint_terms(row_max, temperature, sums):
        return logsumexp_of_faint(x, row_max, temperature)
    return logsumexp_value(row_max, temperature, sums)


@jit
def logsumexp_of_faint(x, row_max, temperature):
    """Max + T rest, where the terms of the rest are too small beside that of a single maximum.

    They are summed beside the second largest entry, and that one's own term, exp((second - max) / T), is
    the square of its term at the temperature 2 T.
    """
    second = -spread(math.inf, row_max)
    for entry in x:
        if second < entry < row_max:
            second = entry
    if second == -math.inf:
        return row_max
    scale = scale_of(second, temperature)
    total = error = spread(0.0, row_max)
    for entry in x:
        if entry < row_max:
            term, lost = terms(entry, scale)
            total, error = add(total, error + lost, term)
    root, root_lost = terms(second, scale_of(row_max, 2.0 * temperature))
    top = np.float64(top_term(row_max))
    rest = (np.float64(total) + np.float64(error)) / top
    # The square alone may be subnormal where T times it is not.
    scaled_root = (np.float64(root) + 2.0 * np.float64(root_lost)) / top * temperature
    return spread(fma(np.float64(root) / top * rest, scaled_root, np.float64(row_max)), row_max)


@jit
def entropy(x, temperature):
    """Entropy of the softmax of a slice."""
    row_max = maximum(x, 0, len(x))
    scale = scale_of(row_max, temperature)
    gap = gap_of(row_max, temperature, 0.0)
    sums = sum_split_slice(x, row_max, scale, gap, True)
    return entropy_value(row_max, sums)
