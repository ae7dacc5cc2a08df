"""One slice on one thread: the passes over its entries that the schedules put together.

A pass takes entries ``start`` to ``stop`` of a 1-d array, many lanes at a time if the array's type is
C-contiguous, else one by one. They are summed in the lanes of one register, to which those of a vector are
added in turn: what sums do not take of the registers keeps terms out of memory. A slice of fewer entries than
a vector has is summed in 128 bits, as short ones spend more on merging than on adding. Lanes are merged by
halves, and chunks of `CHUNK` vectors in order, so a sum does not depend on who computes which chunk.

Where the last vector would not be full, it is the last that is, and overlaps the one before: what is written
twice is the same, and what would be summed twice is dropped from its first lanes. To read and write a part of
a vector, as is done where there are fewer entries than lanes, takes 12 cycles a register on AMD's processors
without AVX-512: 140 ns a row, as much as 100 entries.
"""

import math
from collections import namedtuple

import numpy as np
from numba import types

from fastmax._jit import jit, plain_kernel
from fastmax._lanes import (
    REGISTERS,
    abreast,
    as_float64,
    drop_first,
    fma,
    fold,
    get,
    lane_count,
    load,
    load_first,
    lower_half,
    max_lanes,
    piece_zeros,
    prefetch,
    prefetch_to_write,
    present,
    read,
    register_zeros,
    select,
    settle,
    spread,
    store,
    store_first,
    stream,
    to_stream,
    touch,
    upper_half,
    write,
)
from fastmax._math import (
    add,
    add_smaller,
    entropy_value,
    guarded_gap,
    guarded_scale,
    is_plain,
    larger,
    log_of_sum,
    log_terms,
    logsumexp_value,
    merge,
    misses_faint_terms,
    normalizer,
    plain_gap,
    plain_scale,
    probability,
    rate_of,
    ratio_scale,
    ratio_terms,
    settled,
    start_of_sum,
    term_of,
    terms,
    top_term,
)
from fastmax._tracing import kind_of, traced

# Vectors whose sum is one link of the chain, enough to make a task for a thread.
CHUNK = 512
# Terms in a lane of a sum whose errors are summed plainly, before the total takes what it can: many terms
# that are each below half an ulp of it would otherwise be rounded one way, by 22 ulp of their sum for 2**20.
SETTLING = 16


Soon = namedtuple("Soon", "x at out to step")
Soon.__doc__ = """What will be needed next: x from ``at`` and out from ``to`` on, by steps of so many entries.

The out may be None. To fetch it while terms are computed makes slices in memory take 0.6 to 0.8 of the time.
Nothing is asked for further than a vector past the end of an array: each prefetch from a page that is not
there takes 160 cycles on Zen 1.
"""


# -- passes: each lane for itself -----------------------------------------------------------------


@jit
def lane_maxima(x, start, stop):
    """Largest entry in each lane, NaN left out; -inf if there is none."""
    lanes = lane_count(x)
    lowest = spread(-math.inf, x)
    a = b = lowest
    i = start
    while i <= stop - 4 * lanes:
        a = larger(larger(load(x, i), load(x, i + lanes)), a)
        b = larger(larger(load(x, i + 2 * lanes), load(x, i + 3 * lanes)), b)
        i += 4 * lanes
    while i <= stop - lanes:
        a = larger(load(x, i), a)
        i += lanes
    if i < stop:
        a = larger(last_lanes(x, start, stop), a)
    return larger(a, b)


@jit
def last_lanes(x, start, stop):
    """The last entries, one for each lane; if there are fewer, they come first, and then -inf."""
    lanes = lane_count(x)
    if stop - start >= lanes:
        return load(x, stop - lanes)
    return load_first(x, start, stop - start, spread(-math.inf, x))


@jit
def lane_sums(x, start, stop, scale, guard, stored, at, soon, zero):
    """Sum of the terms as a pair; the terms are written to ``stored`` from ``at`` on, unless that is None.

    It has the lanes of ``zero``. It starts from a number that no term exceeds, for which `add_smaller` does.
    ``soon`` is None or what to fetch from memory meanwhile.
    """
    lanes = lane_count(x)
    total, error = start_of_sum(zero), zero
    # Read before ``stored`` is written, which may be x.
    last, first = last_lanes(x, start, stop), max(start, stop - lanes)
    at -= start
    i = start
    while i <= stop - lanes:
        # Never for a narrow row, whose bits `narrow_sums` shall have.
        total, error = settled(total, error)
        pause = min(stop - lanes, i + SETTLING * lane_count(zero) - lanes)
        while i <= pause:
            fetch(soon, (i - start) // lanes)
            term, total, error = add_terms(load(x, i), 0, scale, guard, total, error)
            if stored is not None:
                store(stored, at + i, term)
            i += lanes
    if i < stop:
        fetch(soon, (i - start) // lanes)
        term, total, error = add_terms(last, i - first, scale, guard, total, error)
        if stored is not None:
            write(stored, at + first, stop - first, term)
    return total - start_of_sum(zero), error


@traced
def add_terms(x, counted, scale, guard, total, error):
    """Terms, and the sum to which those after the first ``counted`` are added."""
    power, excess = ratio_terms(x, scale, guard)
    term = abreast(term_of(power, excess))
    total, error = add_in_turn(total, error, drop_first(power, counted, spread(0.0, x)), excess)
    return term, total, error


@traced
def add_in_turn(total, error, power, excess):
    """`add_smaller`, where sums of fewer lanes take the terms part by part."""
    if kind_of(total) == kind_of(power):
        return add_smaller(total, error, power, excess)
    total, error = add_in_turn(total, error, lower_half(power), lower_half(excess))
    return add_in_turn(total, error, upper_half(power), upper_half(excess))


@traced
def is_new(out, stop):
    """Whether the entries of ``out``, if any, before ``stop`` may lie in new memory, which reads as 0.

    Pages are given to a process when it writes to them. To fetch from them before is as slow as past the
    end: touched first, new results of 20000 x 1000 float32 take 39 ms and not 81, in pages of 4 KB, and
    those of 64 x 128256 float64 29 and not 38, in pages of 2 MB.
    """
    if out is None:
        return False
    touch(out, stop - 1, stop)  # to read it first would have the page given twice
    return get(out, stop - 1) == 0.0


@jit
def touch_new(out, start, stop):
    """`touch` results, if any, that `is_new` takes to lie in new memory."""
    if is_new(out, stop):
        touch(out, start, stop)


@traced
def fetch(soon, step):
    """Ask for what will be needed after so many steps."""
    if soon is not None:
        prefetch(soon.x, soon.at + step * soon.step)
        prefetch_to_write(soon.out, soon.to + step * soon.step)


@jit
def scale_stored(stored, at, x, start, stop, high, low, out, shift):
    """Write stored terms of entries of x times a normalizer to ``out``, at an index shifted by so much."""
    lanes = lane_count(x)
    high, low, zero = spread(high, x), spread(low, x), spread(0.0, x)
    at -= start
    i, first = start, max(start, stop - lanes)
    last = read(stored, at + first, stop - first, zero)  # before ``out``, which ``stored`` may be
    while i <= stop - lanes:
        value = probability(load(stored, at + i), high, low)
        store(out, i + shift, present(x, i, lanes, value, zero))
        i += lanes
    if i < stop:
        value = present(x, first, stop - first, probability(last, high, low), zero)
        write(out, first + shift, stop - first, value)


# What is far larger than the caches is written past them, or each line would first be read: softmax of
# 8 * 10**6 entries takes 3.1 ms for 4.3 (float32) or 6.7 for 7.7 (float64).


@jit(inline="always")
def before_far(start, stop, out, shift, far):
    """Number of entries before the first whose result can be streamed."""
    return min(to_stream(out, start + shift), stop - start) if far else 0


@jit(inline="always")
def write_whole(out, i, value, far):
    """Write as many results as there are lanes, past the caches if they are far larger than these."""
    if far:
        stream(out, i, value)
    else:
        store(out, i, value)


@jit
def write_terms(x, start, stop, scale, guard, high, low, out, shift, far):
    """Write the terms times a normalizer to ``out``, at an index shifted by so much."""
    lanes = lane_count(x)
    high, low, zero = spread(high, x), spread(low, x), spread(0.0, x)
    # Read before ``out`` is written, which may be x.
    last, first = last_lanes(x, start, stop), max(start, stop - lanes)
    i = start + before_far(start, stop, out, shift, far)
    if i > start:
        value = scaled_terms(load_first(x, start, i - start, zero), scale, guard, high, low)
        store_first(out, start + shift, i - start, present(x, start, i - start, value, zero))
    while i <= stop - lanes:
        value = scaled_terms(load(x, i), scale, guard, high, low)
        write_whole(out, i + shift, present(x, i, lanes, value, zero), far)
        i += lanes
    if i < stop:
        value = scaled_terms(last, scale, guard, high, low)
        write(out, first + shift, stop - first, present(x, first, stop - first, value, zero))
    if far:
        settle()


@traced
def scaled_terms(x, scale, guard, high, low):
    """Terms times a normalizer."""
    power, excess = ratio_terms(x, scale, guard)
    return probability(term_of(power, excess), high, low)


@jit
def write_log_terms(x, start, stop, gap, guard, out, shift, far):
    """Write (x - max) / T - log_sum to ``out``, at an index shifted by so much."""
    lanes, lowest = lane_count(x), spread(-math.inf, x)
    # Read before ``out`` is written, which may be x.
    last, first = last_lanes(x, start, stop), max(start, stop - lanes)
    i = start + before_far(start, stop, out, shift, far)
    if i > start:
        value = log_terms(load_first(x, start, i - start, lowest), gap, guard)
        store_first(out, start + shift, i - start, present(x, start, i - start, value, lowest))
    while i <= stop - lanes:
        value = log_terms(load(x, i), gap, guard)
        write_whole(out, i + shift, present(x, i, lanes, value, lowest), far)
        i += lanes
    if i < stop:
        value = present(x, first, stop - first, log_terms(last, gap, guard), lowest)
        write(out, first + shift, stop - first, value)
    if far:
        settle()


@jit
def lane_split_sums(x, start, stop, row_max, scale, guard, weighted, soon, zero):
    """Return ties, sum of the other terms (a pair), their sum times (x - max) c (a pair).

    The last is 0 if ``weighted`` is None; ``soon`` and ``zero`` are as in `lane_sums`.
    """
    lanes = lane_count(x)
    sums = zero, zero, zero, zero, zero
    i = start
    while i <= stop - lanes:
        fetch(soon, (i - start) // lanes)
        sums = add_split(sums, load(x, i), row_max, scale, guard, weighted)
        i += lanes
    if i < stop:
        fetch(soon, (i - start) // lanes)
        counted = i - max(start, stop - lanes)
        entries = drop_first(last_lanes(x, start, stop), counted, spread(-math.inf, x))
        sums = add_split(sums, entries, row_max, scale, guard, weighted)
    return sums


@traced
def add_split(sums, x, row_max, scale, guard, weighted):
    """Add entries to the five sums of `lane_split_sums`."""
    zero, one, top = spread(0.0, x), spread(1.0, x), spread(row_max, x)
    power, excess, product = terms(x, scale, guard)
    # Where nothing is read, -inf is no tie, unless all are, and then nobody asks for ties.
    tie = select(x == top, one, zero)
    power = select(x == top, zero, power)
    if weighted is None:
        return add_split_in_turn(sums, tie, power, excess, None)
    return add_split_in_turn(sums, tie, power, excess, term_of(power, excess) * product)


@traced
def add_split_in_turn(sums, tie, power, excess, moment):
    """Add to the five sums part by part, as `add_in_turn` does; the moment may be None."""
    if kind_of(sums[0]) == kind_of(tie):
        rest, error = add(sums[1], sums[2], power, excess)
        if moment is None:
            return sums[0] + tie, rest, error, sums[3], sums[4]
        total, total_error = merge(sums[3], sums[4], moment, spread(0.0, moment))
        return sums[0] + tie, rest, error, total, total_error
    for half in lower_half, upper_half:
        part = None if moment is None else half(moment)
        sums = add_split_in_turn(sums, half(tie), half(power), half(excess), part)
    return sums


# -- merging --------------------------------------------------------------------------------------


@traced
def sum_lanes(total, error):
    """Merge the pairs of all lanes into one, by halves."""
    if isinstance(kind_of(total), types.Float):
        return total, error
    upper, upper_error = upper_half(total), upper_half(error)
    return sum_lanes(*merge(lower_half(total), lower_half(error), upper, upper_error))


@traced
def maximum(x, start, stop):
    """Largest entry, NaN left out; -inf if there is none."""
    return max_lanes(lane_maxima(x, start, stop))


@traced
def later(soon, steps):
    """What will be needed so many steps later."""
    if soon is None:
        return None
    ahead = steps * soon.step
    return Soon(soon.x, soon.at + ahead, soon.out, soon.to + ahead, soon.step)


@jit
def sum_terms(x, start, stop, scale, guard, stored, at, soon):
    """`lane_sums` over all chunks of a slice, merged."""
    chunk = CHUNK * lane_count(x)
    total = error = spread(0.0, scale.row_max)
    for first in range(start, stop, chunk):
        last = min(stop, first + chunk)
        ahead = later(soon, (first - start) // lane_count(x))
        to = at + first - start
        part, part_error = lane_sums(x, first, last, scale, guard, stored, to, ahead, register_zeros(x))
        part, part_error = sum_lanes(part, part_error)
        total, error = merge(total, error, part, part_error)
    return total, error


@jit
def sum_split_terms(x, start, stop, row_max, scale, guard, weighted, soon):
    """`lane_split_sums` over all chunks of a slice, merged."""
    chunk = CHUNK * lane_count(x)
    zero = spread(0.0, row_max)
    sums = zero, zero, zero, zero, zero
    for first in range(start, stop, chunk):
        last = min(stop, first + chunk)
        if last - first < lane_count(x):
            few = piece_zeros(x)
            entries = last_lanes(x, first, last)
            own = add_split((few, few, few, few, few), entries, row_max, scale, guard, weighted)
            part = sum_split_lanes(own)
        else:
            ahead = later(soon, (first - start) // lane_count(x))
            none = register_zeros(x)
            many = lane_split_sums(x, first, last, row_max, scale, guard, weighted, ahead, none)
            part = sum_split_lanes(many)
        sums = merge_split(sums, part)
    return sums


@traced
def sum_split_lanes(sums):
    """`lane_split_sums` of all lanes as one."""
    ties, _ = sum_lanes(sums[0], spread(0.0, sums[0]))
    rest, error = sum_lanes(sums[1], sums[2])
    moment, moment_error = sum_lanes(sums[3], sums[4])
    return ties, rest, error, moment, moment_error


@traced
def merge_split(a, b):
    """Merge two results of `sum_split_terms`."""
    rest, error = merge(a[1], a[2], b[1], b[2])
    moment, moment_error = merge(a[3], a[4], b[3], b[4])
    return a[0] + b[0], rest, error, moment, moment_error


@traced
def larger_half(x):
    """The larger of each lane of the lower half and that of the upper one."""
    return larger(lower_half(x), upper_half(x))


@traced
def quarter_maxima(x):
    """`larger_half` twice."""
    return larger_half(larger_half(x))


# What lanes of several registers have found, in those of one.
register_maxima = {2: larger_half, 4: quarter_maxima}[REGISTERS]


@jit
def maxima_of(work, at, count):
    """Maxima of up to as many slices as there are lanes, from the `register_maxima` of each; one per lane."""
    lanes = lane_count(work)
    group, count = lanes // REGISTERS, -(-count // REGISTERS)
    while group > 1:
        for i in range(0, count * lanes, 2 * lanes):
            lower, upper = fold(load(work, at + i), load(work, at + i + lanes), group)
            store(work, at + i // 2, larger(lower, upper))
        group, count = group // 2, (count + 1) // 2


@jit
def sums_of(work, totals, errors, count):
    """Sums of up to as many slices as there are lanes, from one register of each; one per lane.

    Pairs are merged in the order of `sum_lanes`, which takes one slice and many more instructions.
    """
    lanes = lane_count(work)
    group, count = lanes // REGISTERS, -(-count // REGISTERS)
    while group > 1:
        for i in range(0, count * lanes, 2 * lanes):
            at, to = totals + i, errors + i
            lower, upper = fold(load(work, at), load(work, at + lanes), group)
            lower_error, upper_error = fold(load(work, to), load(work, to + lanes), group)
            total, error = merge(lower, lower_error, upper, upper_error)
            store(work, totals + i // 2, total)
            store(work, errors + i // 2, error)
        group, count = group // 2, (count + 1) // 2


# -- a whole slice: entries start to stop, or a 1-d array ----------------------------------------------


@jit
def softmax_of_few(x, start, count, rate, out, shift):
    """`softmax_of` fewer entries than there are lanes, which stay in registers: 0.1 us less on Zen 1."""
    zero, lowest = spread(0.0, x), spread(-math.inf, x)
    entries = load_first(x, start, count, lowest)
    row_max = max_lanes(larger(entries, lowest))
    none = piece_zeros(x)
    most = start_of_sum(none)
    if is_plain(row_max, rate):
        term, total, error = add_terms(entries, 0, ratio_scale(row_max, rate), None, most, none)
    else:
        scale, guard = guarded_scale(row_max, rate.temperature)
        term, total, error = add_terms(entries, 0, scale, guard, most, none)
    total, error = sum_lanes(total - most, error)
    high, low = normalizer(total, error)
    value = probability(term, spread(high, x), spread(low, x))
    store_first(out, start + shift, count, present(x, start, count, value, zero))


@jit
def softmax_of(x, start, stop, rate, stored, at, out, shift, soon):
    """Write the softmax of a slice to ``out``, at an index shifted by so much, by way of ``stored``."""
    if stop - start < lane_count(x):
        softmax_of_few(x, start, stop - start, rate, out, shift)
        return
    total, error = ratio_sums(x, start, stop, maximum(x, start, stop), rate, stored, at, soon)
    high, low = normalizer(total, error)
    scale_stored(stored, at, x, start, stop, high, low, out, shift)


@jit
def ratio_sums(x, start, stop, row_max, rate, stored, at, soon):
    """`sum_terms` at the temperature of a rate."""
    if is_plain(row_max, rate):
        return sum_terms(x, start, stop, ratio_scale(row_max, rate), None, stored, at, soon)
    scale, guard = guarded_scale(row_max, rate.temperature)
    return sum_terms(x, start, stop, scale, guard, stored, at, soon)


@jit
def write_softmax(x, start, stop, row_max, rate, high, low, out, shift, far):
    """`write_terms` at the temperature of a rate."""
    if is_plain(row_max, rate):
        write_terms(x, start, stop, ratio_scale(row_max, rate), None, high, low, out, shift, far)
    else:
        scale, guard = guarded_scale(row_max, rate.temperature)
        write_terms(x, start, stop, scale, guard, high, low, out, shift, far)


@jit
def split_sums(x, start, stop, row_max, rate, weighted, soon):
    """`sum_split_terms` at the temperature of a rate."""
    if is_plain(row_max, rate):
        scale = plain_scale(row_max, rate)
        return sum_split_terms(x, start, stop, row_max, scale, None, weighted, soon)
    scale, guard = guarded_scale(row_max, rate.temperature)
    return sum_split_terms(x, start, stop, row_max, scale, guard, weighted, soon)


@jit
def write_log_softmax(x, start, stop, row_max, rate, log_sum, out, shift, far):
    """`write_log_terms` at the temperature of a rate."""
    if is_plain(row_max, rate):
        write_log_terms(x, start, stop, plain_gap(row_max, rate, log_sum), None, out, shift, far)
    else:
        gap, guard = guarded_gap(row_max, rate.temperature, log_sum)
        write_log_terms(x, start, stop, gap, guard, out, shift, far)


@traced
def log_softmax_of(x, start, stop, rate, out, shift, soon):
    """Write the logarithm of the softmax of a slice to ``out``, at an index shifted by so much."""
    row_max = maximum(x, start, stop)
    log_sum = log_of_sum(row_max, split_sums(x, start, stop, row_max, rate, None, soon))
    write_log_softmax(x, start, stop, row_max, rate, log_sum, out, shift, False)


@traced
def value_of(x, start, stop, rate, weighted, soon):
    """Logsumexp of a slice or, unless ``weighted`` is None, the entropy of its softmax."""
    row_max = maximum(x, start, stop)
    sums = split_sums(x, start, stop, row_max, rate, weighted, soon)
    return value_of_sums(x, start, 1, stop - start, row_max, rate.temperature, sums, weighted)


@jit
def value_of_sums(x, start, step, count, row_max, temperature, sums, weighted):
    """`value_of` the entries start, start + step, ... from their sums."""
    if weighted is not None:
        value = entropy_value(row_max, sums)
    elif misses_faint_terms(row_max, temperature, sums):
        value = logsumexp_of_faint(x, start, step, count, row_max, temperature)
    else:
        value = logsumexp_value(row_max, temperature, sums)
    return value


@jit
def logsumexp_of_faint(x, start, step, count, row_max, temperature):
    """Max + T rest, where the terms of the rest are too small beside that of a single maximum.

    They are summed beside the second largest entry, and that one's own term, exp((second - max) / T), is
    the square of its term at the temperature 2 T.
    """
    second = -spread(math.inf, row_max)
    for i in range(count):
        entry = get(x, start + i * step)
        if second < entry < row_max:
            second = entry
    if second == -math.inf:
        return row_max
    scale, guard = guarded_scale(second, temperature)
    total = error = spread(0.0, row_max)
    for i in range(count):
        entry = get(x, start + i * step)
        if entry < row_max:
            power, excess, _ = terms(entry, scale, guard)
            total, error = add(total, error, power, excess)
    return value_beside_faint(row_max, temperature, second, total, error)


@traced
def value_beside_faint(row_max, temperature, second, total, error):
    """Max + T rest, from the sum of the terms of the rest beside the largest of them."""
    scale, guard = guarded_scale(row_max, 2.0 * temperature)
    power, excess, _ = terms(second, scale, guard)
    top = as_float64(top_term(row_max))
    rest = (as_float64(total) + as_float64(error)) / top
    # The square alone may be subnormal where T times it is not.
    root = as_float64(power) / top * (1.0 + as_float64(excess))
    return spread(fma(root * rest, root * temperature, as_float64(row_max)), row_max)


# -- for the public functions, and for gufuncs ---------------------------------------------------------


@jit
def fits(x, out):
    """Whether ``out`` has the shape of x, and is x or apart from it: both contiguous, of one dtype."""
    apart = abs(np.intp(x.ctypes.data) - np.intp(out.ctypes.data))
    return x.shape == out.shape and (apart == 0 or apart >= x.size * x.itemsize)


@jit
def softmax(x, temperature, out):
    """Softmax of a 1-d array."""
    softmax_of(x, 0, len(x), rate_of(temperature, get(x, 0)), out, 0, out, 0, None)


@jit
def log_softmax(x, temperature, out):
    """Logarithm of the softmax of a 1-d array."""
    log_softmax_of(x, 0, len(x), rate_of(temperature, get(x, 0)), out, 0, None)


@jit
def logsumexp(x, temperature):
    """T log(sum(exp(x / T))) of a 1-d array."""
    return value_of(x, 0, len(x), rate_of(temperature, get(x, 0)), None, None)


@jit
def entropy(x, temperature):
    """Entropy of the softmax of a 1-d array."""
    return value_of(x, 0, len(x), rate_of(temperature, get(x, 0)), True, None)


@plain_kernel(1, 1)
def softmax_vector(x, temperature, out):
    """Softmax of a contiguous vector. Return whether ``out`` fits: if not, nothing is written."""
    if not fits(x, out):
        return False
    softmax(x, temperature, out)
    return True


@plain_kernel(1, 1)
def log_softmax_vector(x, temperature, out):
    """Logarithm of the softmax of a contiguous vector. Return as `softmax_vector` does."""
    if not fits(x, out):
        return False
    log_softmax(x, temperature, out)
    return True


@plain_kernel(1)
def logsumexp_vector(x, temperature):
    """T log(sum(exp(x / T))) of a contiguous vector."""
    return logsumexp(x, temperature)


@plain_kernel(1)
def entropy_vector(x, temperature):
    """Entropy of the softmax of a contiguous vector."""
    return entropy(x, temperature)
