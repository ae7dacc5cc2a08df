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
    as_contiguous,
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
    no_lanes,
    piece_zeros,
    pointer,
    prefetch,
    prefetch_to_write,
    present,
    put,
    read,
    register_zeros,
    settle,
    spread,
    store,
    store_first,
    stream,
    to_stream,
    touch,
    unless_masked,
    upper_half,
    with_mask,
    workspace,
    write,
)
from fastmax._math import (
    add,
    add_faint,
    add_sums,
    apart,
    closed,
    entropy_value,
    exact_ratio_terms,
    exact_terms,
    guarded_gap,
    guarded_scale,
    is_plain,
    larger,
    log_of_sum,
    log_terms,
    logsumexp_value,
    merge,
    merge_sums,
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
    sum_with_smaller,
    term_of,
    terms,
    top_term,
    unit_of,
)
from fastmax._tracing import kind_of, traced

# Vectors whose sum is one link of the chain, enough to make a task for a thread.
CHUNK = 512
# Terms in a lane of a sum for softmax whose errors are summed plainly: many that are each below half an ulp
# of the total would otherwise be rounded one way, by 22 ulp of their sum for 2**20.
BLOCK = 16


Soon = namedtuple("Soon", "x at step out to out_step")
Soon.__doc__ = """What will be needed next: x from ``at`` and out from ``to`` on, by steps of so many entries.

The out may be None. To fetch it while terms are computed makes slices in memory take 0.6 to 0.8 of the time.
Little is asked for past the end of an array, for each prefetch from a page that is not there takes 160 cycles
on Zen 1: of most a vector, of the last row of a narrower tile a tile, of long rows `AHEAD`.
"""


# Vectors by which entries of a slice in memory are fetched ahead: terms take so long that a processor looks
# no further than a few. On one core of an Emerald Rapids 10**7 float64 take 0.65 of the time for it, with 16
# vectors 0.75.
AHEAD = 48


@jit
def further_on(x, start, stop, end):
    """What will be needed while entries ``start`` to ``stop`` are read from memory, before an ``end``."""
    lanes = lane_count(x)
    return Soon(x, start + min(AHEAD * lanes, end - stop), lanes, None, 0, 0)


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
def lane_sums(x, start, stop, scale, guard, exact, stored, at, soon, zero):
    """Sums of the terms in each lane of ``zero``: (total, error), or open ones, see `closed`.

    For softmax ``exact`` is None. Else sums are exact beside the maximum, too, see `apart`, and it is a
    tuple: (None,), or (True,) for moments, which are sums of the terms times (x - max) c. Unless ``stored``
    is None, terms are written to it from ``at`` on; ``soon`` is None or what to fetch from memory meanwhile.
    Sums start from a number that no term exceeds, for which `sum_with_smaller` does.
    """
    lanes = lane_count(x)
    sums = start_of_sums(zero, exact)
    # Read before ``stored`` is written, which may be x.
    last, first = last_lanes(x, start, stop), max(start, stop - lanes)
    at -= start
    i, pause = start, start + BLOCK * lane_count(zero)
    while i <= stop - lanes:
        if exact is None and i == pause:
            sums = next_block(sums)
            pause += BLOCK * lane_count(zero)
        fetch(soon, (i - start) // lanes)
        sums, term = add_terms(sums, load(x, i), 0, scale, guard, exact)
        if stored is not None:
            store(stored, at + i, term)
        i += lanes
    if i < stop:
        fetch(soon, (i - start) // lanes)
        sums, term = add_terms(sums, last, i - first, scale, guard, exact)
        if stored is not None:
            write(stored, at + first, stop - first, term)
    return end_of_sums(sums)


@traced
def kept_terms(work, exact):
    """Where the terms of a tile are kept: in place of its entries, or nowhere for logarithms."""
    return work if exact is None else None


@traced
def has_moments(exact):
    """Whether sums have moments, too."""
    return exact is not None and exact[0] is not None


# As many quantities as sums may have: total, error, what that has lost, moment and its error.
QUANTITIES = 5


@traced
def quantities(exact):
    """Numbers of the quantities that sums have: (total, error) for softmax, or what is open."""
    return range(2 if exact is None else QUANTITIES if has_moments(exact) else 3)


@traced
def store_all(work, at, step, sums):
    """Write sums to working memory, from one to the next so many entries apart."""
    for quantity, value in enumerate(sums):
        store(work, at + quantity * step, value)


@traced
def load_all(work, at, step, exact):
    """Sums that `store_all` wrote."""
    return tuple(load(work, at + quantity * step) for quantity in quantities(exact))


@traced
def get_sums(array, at, inner, exact):
    """Sums of the slice whose first stands at an index."""
    return tuple(get(array, at + quantity * inner) for quantity in quantities(exact))


@traced
def start_of_sums(zero, exact):
    """Sums of nothing."""
    return start_of_sum(zero), *(zero for _ in quantities(exact)[1:])


@traced
def next_block(sums):
    """Sums for softmax whose total takes of the error what it can; others, as Numba types them, too."""
    return settled(*sums) if len(sums) == 2 else sums


@traced
def end_of_sums(sums):
    """Sums without what they started from."""
    return sums[0] - start_of_sum(sums[0]), *sums[1:]


@traced
def add_terms(sums, x, counted, scale, guard, exact):
    """Sums with the terms after the first ``counted``, and all terms."""
    moment, zero = None, spread(0.0, x)
    if exact is None:
        power, excess = ratio_terms(x, scale, guard)
    elif has_moments(exact):
        power, excess, product = exact_terms(x, scale, guard)
        moment = drop_first(term_of(power, excess) * product, counted, zero)
    else:
        power, excess = exact_ratio_terms(x, scale, guard)
    term = abreast(term_of(power, excess))
    return add_in_turn(sums, drop_first(power, counted, zero), excess, moment), term


@traced
def add_in_turn(sums, power, excess, moment):
    """Sums with terms, where sums of fewer lanes take the terms part by part."""
    if kind_of(sums[0]) != kind_of(power):
        for half in lower_half, upper_half:
            sums = add_in_turn(sums, half(power), half(excess), None if moment is None else half(moment))
        return sums
    total, rounding = sum_with_smaller(sums[0], power, excess)
    if len(sums) == 2:
        return total, sums[1] + rounding
    error, lost = add_faint(sums[1], sums[2], rounding)
    if moment is None:
        return total, error, lost
    return total, error, lost, *merge(sums[3], sums[4], moment, spread(0.0, moment))


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
        prefetch_to_write(soon.out, soon.to + step * soon.out_step)


@traced
def needs_no_mask(plain, end):
    """Whether what is masked comes out right by itself, as entries of -inf do: its mask need not be read.

    So it is where slices are plain and ``end``, a normalizer or a logarithm of sums, is a number: not NaN.
    1000 x 8192 float32 with half of it masked takes 0.9 of the time for it.
    """
    return plain & no_lanes(end != end)


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
def write_terms(x, start, stop, scale, guard, high, low, out, shift, far, soon):
    """Write the terms times a normalizer to ``out``, at an index shifted by so much; ``soon`` may be None."""
    lanes, unmasked = lane_count(x), needs_no_mask(guard is None, high)
    high, low, zero = spread(high, x), spread(low, x), spread(0.0, x)
    # Read before ``out`` is written, which may be x.
    last, first = last_lanes(x, start, stop), max(start, stop - lanes)
    i = start + before_far(start, stop, out, shift, far)
    if i > start:
        value = scaled_terms(load_first(x, start, i - start, zero), scale, guard, high, low)
        store_first(out, start + shift, i - start, present(x, start, i - start, value, zero))
    while i <= stop - lanes:
        fetch(soon, (i - start) // lanes)
        value = scaled_terms(load(x, i), scale, guard, high, low)
        if not unmasked:
            value = present(x, i, lanes, value, zero)
        write_whole(out, i + shift, value, far)
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
def write_log_terms(x, start, stop, gap, guard, out, shift, far, soon):
    """Write (x - max) / T - log_sum to ``out``, at an index shifted by so much; ``soon`` may be None."""
    lanes, lowest = lane_count(x), spread(-math.inf, x)
    # Read before ``out`` is written, which may be x.
    last, first = last_lanes(x, start, stop), max(start, stop - lanes)
    i = start + before_far(start, stop, out, shift, far)
    if i > start:
        value = log_terms(load_first(x, start, i - start, lowest), gap, guard)
        store_first(out, start + shift, i - start, present(x, start, i - start, value, lowest))
    while i <= stop - lanes:
        fetch(soon, (i - start) // lanes)
        value = log_terms(load(x, i), gap, guard)
        write_whole(out, i + shift, present(x, i, lanes, value, lowest), far)
        i += lanes
    if i < stop:
        value = present(x, first, stop - first, log_terms(last, gap, guard), lowest)
        write(out, first + shift, stop - first, value)
    if far:
        settle()


# -- merging --------------------------------------------------------------------------------------


@traced
def sum_lanes(total, error):
    """Merge the pairs of all lanes into one, by halves."""
    return sum_all_lanes((total, error))


@traced
def sum_all_lanes(sums):
    """`lane_sums` of all lanes as one."""
    if isinstance(kind_of(sums[0]), types.Float):
        return sums
    lower, upper = (tuple(half(value) for value in sums) for half in (lower_half, upper_half))
    return sum_all_lanes(merge_sums(lower, upper))


@traced
def maximum(x, start, stop):
    """Largest entry, NaN left out; -inf if there is none."""
    return max_lanes(lane_maxima(x, start, stop))


@traced
def later(soon, steps):
    """What will be needed so many steps later."""
    if soon is None:
        return None
    return soon._replace(at=soon.at + steps * soon.step, to=soon.to + steps * soon.out_step)


@jit
def sum_terms(x, start, stop, scale, guard, exact, stored, at, soon):
    """`lane_sums` over all chunks of a slice, merged."""
    chunk = CHUNK * lane_count(x)
    sums = open_sums(scale.row_max, exact)
    for first in range(start, stop, chunk):
        last = min(stop, first + chunk)
        to = at + first - start
        if last - first < lane_count(x):
            part = sum_all_lanes(few_sums(x, first, last, scale, guard, exact, stored, to))
        else:
            ahead, none = later(soon, (first - start) // lane_count(x)), register_zeros(x)
            own = lane_sums(x, first, last, scale, guard, exact, stored, to, ahead, none)
            part = sum_all_lanes(own)
        sums = add_sums(sums, part)
    return sums_of_all(sums, exact)


@traced
def open_sums(like, exact):
    """Open sums of nothing, to which those of chunks are added."""
    zero = spread(0.0, like)
    return tuple(zero for _ in range(3 if exact is None else len(quantities(exact))))


@traced
def sums_of_all(sums, exact):
    """Sums of all chunks: for softmax they are closed again."""
    return closed(sums) if exact is None else sums


@traced
def few_sums(x, start, stop, scale, guard, exact, stored, at):
    """`lane_sums` of fewer entries than there are lanes, in 128 bits."""
    zero = piece_zeros(x)
    entries, sums = last_lanes(x, start, stop), start_of_sums(zero, exact)
    sums, term = add_terms(sums, entries, 0, scale, guard, exact)
    if stored is not None:
        write(stored, at, stop - start, term)
    return end_of_sums(sums)


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
def sums_of(work, at, step, count, exact):
    """`lane_sums` of up to as many slices as there are lanes, from one register of each; one per lane.

    They are merged in the order of `sum_all_lanes`, which takes one slice and many more instructions.
    """
    lanes = lane_count(work)
    group, count = lanes // REGISTERS, -(-count // REGISTERS)
    while group > 1:
        for i in range(0, count * lanes, 2 * lanes):
            sums, others = load_all(work, at + i, step, exact), load_all(work, at + i + lanes, step, exact)
            store_all(work, at + i // 2, step, merge_folded(sums, others, group))
        group, count = group // 2, (count + 1) // 2


@traced
def merge_folded(sums, others, group):
    """Merge the halves of each group of lanes of two vectors, side by side."""
    folded = [fold(value, other, group) for value, other in zip(sums, others, strict=True)]
    return merge_sums(tuple(lower for lower, _ in folded), tuple(upper for _, upper in folded))


# -- a whole slice: entries start to stop, or a 1-d array ----------------------------------------------


@jit
def softmax_of_few(x, start, count, rate, out, shift):
    """`softmax_of` fewer entries than there are lanes, which stay in registers: 0.1 us less on Zen 1."""
    zero, lowest = spread(0.0, x), spread(-math.inf, x)
    entries = load_first(x, start, count, lowest)
    row_max = max_lanes(larger(entries, lowest))
    none = piece_zeros(x)
    sums = start_of_sums(none, None)
    if is_plain(row_max, rate):
        sums, term = add_terms(sums, entries, 0, ratio_scale(row_max, rate), None, None)
    else:
        scale, guard = guarded_scale(row_max, rate.temperature)
        sums, term = add_terms(sums, entries, 0, scale, guard, None)
    total, error = sum_all_lanes(end_of_sums(sums))
    high, low = normalizer(total, error)
    value = probability(term, spread(high, x), spread(low, x))
    store_first(out, start + shift, count, present(x, start, count, value, zero))


@jit
def softmax_of(x, start, stop, rate, stored, at, out, shift, soon):
    """Write the softmax of a slice to ``out``, at an index shifted by so much, by way of ``stored``."""
    if stop - start < lane_count(x):
        softmax_of_few(x, start, stop - start, rate, out, shift)
        return
    total, error = sums_of_slice(x, start, stop, maximum(x, start, stop), rate, None, stored, at, soon)
    high, low = normalizer(total, error)
    scale_stored(stored, at, x, start, stop, high, low, out, shift)


@jit
def sums_of_slice(x, start, stop, row_max, rate, exact, stored, at, soon):
    """`sum_terms` at the temperature of a rate."""
    if is_plain(row_max, rate):
        scale = scale_of(row_max, rate, exact)
        return sum_terms(x, start, stop, scale, None, exact, stored, at, soon)
    scale, guard = guarded_scale(row_max, rate.temperature)
    return sum_terms(x, start, stop, scale, guard, exact, stored, at, soon)


@traced
def scale_of(row_max, rate, exact):
    """Scale of a plain slice whose terms are summed."""
    return plain_scale(row_max, rate) if has_moments(exact) else ratio_scale(row_max, rate)


@traced
def sums_apart(sums, row_max, rate, exact):
    """What the sums of a slice have beside its maximum; see `apart`."""
    return apart(sums, spread(1.0, row_max) if has_moments(exact) else unit_of(row_max, rate))


@traced
def write_slice(x, start, stop, row_max, rate, sums, exact, out, shift, far, soon):
    """Write the softmax of entries of a slice, or its logarithm if the sums are exact.

    Results go to ``out``, at an index shifted by so much. Traced, as jitted code would compile both.
    """
    write = write_softmax if exact is None else write_log_softmax
    write(x, start, stop, row_max, rate, sums, out, shift, far, soon)


@jit
def write_softmax(x, start, stop, row_max, rate, sums, out, shift, far, soon):
    """`write_terms` at the temperature of a rate."""
    high, low = normalizer(*sums)
    if is_plain(row_max, rate):
        write_terms(x, start, stop, ratio_scale(row_max, rate), None, high, low, out, shift, far, soon)
    else:
        scale, guard = guarded_scale(row_max, rate.temperature)
        write_terms(x, start, stop, scale, guard, high, low, out, shift, far, soon)


@jit
def write_log_softmax(x, start, stop, row_max, rate, sums, out, shift, far, soon):
    """`write_log_terms` at the temperature of a rate."""
    log_sum = log_of_sum(row_max, sums_apart(sums, row_max, rate, (None,)))
    if is_plain(row_max, rate):
        write_log_terms(x, start, stop, plain_gap(row_max, rate, log_sum), None, out, shift, far, soon)
    else:
        gap, guard = guarded_gap(row_max, rate.temperature, log_sum)
        write_log_terms(x, start, stop, gap, guard, out, shift, far, soon)


@traced
def log_softmax_of(x, start, stop, rate, out, shift, soon):
    """Write the logarithm of the softmax of a slice to ``out``, at an index shifted by so much.

    Both passes fetch what is needed soon: if not the sums as well, 512 x 32000 takes 1.09 times as long.
    """
    row_max = maximum(x, start, stop)
    sums = sums_of_slice(x, start, stop, row_max, rate, (None,), None, 0, soon)
    write_log_softmax(x, start, stop, row_max, rate, sums, out, shift, False, soon)


@traced
def value_of(x, start, stop, rate, weighted, soon):
    """Logsumexp of a slice or, unless ``weighted`` is None, the entropy of its softmax."""
    row_max, exact = maximum(x, start, stop), (weighted,)
    sums = sums_of_slice(x, start, stop, row_max, rate, exact, None, 0, soon)
    sums = sums_apart(sums, row_max, rate, exact)
    return value_of_sums(x, start, 1, stop - start, row_max, rate.temperature, sums, weighted)


@jit
def value_of_sums(x, start, step, count, row_max, temperature, sums, weighted):
    """`value_of` the entries start, start + step, ... from their sums beside the maximum."""
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
        return row_max + spread(0.0, row_max)  # which of several zeros is the maximum must not show
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


# -- a slice whose entries lie apart -----------------------------------------------------------------
# Its sums are those of a column: chunks are summed one by one, each in one lane. Here as many chunks as there
# are lanes are copied into a tile, one to each: softmax of 50000 float32 takes 0.2 of the time, of 4000 0.6,
# of 512 1.5 times as long.


# Rows of a tile that are copied at a time, so that they stay in the first cache, and entries up to which all
# tiles are kept: of more they are copied in each pass.
PIECE = 64
KEPT = 2**17


@jit
def chunk_tile_count(n, like):
    """Number of tiles: of as many whole chunks as there are lanes, and of the entries that are left."""
    return -(-(n // CHUNK) // lane_count(like)) + min(n % CHUNK, 1)


@jit
def chunk_tile(tile, n, like):
    """First entry of a tile, the length of its chunks, and how many it has."""
    whole, first = n // CHUNK, tile * lane_count(like)
    if first >= whole:
        return whole * CHUNK, n % CHUNK, 1
    return first * CHUNK, CHUNK, min(lane_count(like), whole - first)


@jit
def chunk_work_size(n, like):
    """Entries of working memory for the tiles of a slice that are kept, and for the sums of one tile."""
    tiles = chunk_tile_count(n, like) if n <= KEPT else 1
    return (tiles * min(n, CHUNK) + QUANTITIES) * lane_count(like)


@jit
def chunk_work(x):
    """Working memory for the chunks of a slice."""
    return workspace(chunk_work_size(len(x), as_contiguous(x)), x)


@jit
def pack_chunks(x, mask, tile, work):
    """Copy the chunks of a tile, one to each lane, and return where it begins and ends.

    Lanes without a chunk get entries of the first. The mask is None or a 1-d array of bytes.
    """
    first, rows, count = chunk_tile(tile, len(x), work)
    lanes, absent = lane_count(work), -spread(math.inf, get(x, 0))
    at = place_of_tile(tile, x, work)
    for i in range(rows):
        entry = unless_masked(mask, first + i, get(x, first + i), absent)
        store(work, at + i * lanes, spread(entry, work))
    for start in range(0, rows, PIECE):
        stop = min(start + PIECE, rows)
        for k in range(1, count):
            chunk = first + k * CHUNK
            for i in range(start, stop):
                entry = unless_masked(mask, chunk + i, get(x, chunk + i), absent)
                put(work, at + i * lanes + k, entry)
    return at, at + rows * lanes


@jit
def place_of_tile(tile, x, work):
    """Where a tile begins in working memory."""
    return tile * CHUNK * lane_count(work) if len(x) <= KEPT else 0


@jit
def packed_chunks(x, mask, tile, work):
    """Where a tile begins and ends that has been packed before, or is now."""
    if len(x) > KEPT:
        return pack_chunks(x, mask, tile, work)
    _, rows, _ = chunk_tile(tile, len(x), work)
    at = place_of_tile(tile, x, work)
    return at, at + rows * lane_count(work)


@jit
def unpack_chunks(work, at, tile, mask, absent, out):
    """Copy the chunks of a tile back; entries that the mask leaves out become ``absent``."""
    first, rows, count = chunk_tile(tile, len(out), work)
    lanes = lane_count(work)
    for start in range(0, rows, PIECE):
        for k in range(count):
            chunk = first + k * CHUNK
            for i in range(start, min(start + PIECE, rows)):
                value = unless_masked(mask, chunk + i, get(work, at + i * lanes + k), absent)
                put(out, chunk + i, value)


@jit
def maximum_by_chunks(x, mask, work):
    """Largest entry, NaN left out; -inf if there is none."""
    w = pointer(work)
    top = -spread(math.inf, get(x, 0))
    for tile in range(chunk_tile_count(len(x), w)):
        top = max(top, maximum(w, *pack_chunks(x, mask, tile, w)))
    return top


@jit
def sums_of_tile(work, start, stop, row_max, rate, exact, stored):
    """`lane_sums` of the chunks of a tile.

    Terms take the place of the entries, unless ``stored`` is None: else it is the working memory.
    """
    zero = spread(0.0, work)
    if is_plain(row_max, rate):
        scale = scale_of(row_max, rate, exact)
        return lane_sums(work, start, stop, scale, None, exact, stored, start, None, zero)
    scale, guard = guarded_scale(row_max, rate.temperature)
    return lane_sums(work, start, stop, scale, guard, exact, stored, start, None, zero)


@jit
def sums_by_chunks(x, mask, work, row_max, rate, exact):
    """Sums of the terms of all chunks, merged in order."""
    w = pointer(work)
    lanes = lane_count(w)
    beside = len(work) - QUANTITIES * lanes
    sums = open_sums(row_max, exact)
    for tile in range(chunk_tile_count(len(x), w)):
        start, stop = packed_chunks(x, mask, tile, w)
        own = sums_of_tile(w, start, stop, row_max, rate, exact, kept_terms(w, exact))
        store_all(w, beside, lanes, own)
        _, _, count = chunk_tile(tile, len(x), w)
        for k in range(count):
            sums = add_sums(sums, get_sums(w, beside + k, lanes, exact))
    return sums_of_all(sums, exact)


@jit
def write_by_chunks(x, mask, temperature, exact, out, work):
    """Softmax of a 1-d array of any stride, or its logarithm if sums are to be exact."""
    w, rate = pointer(work), rate_of(temperature, get(x, 0))
    row_max = maximum_by_chunks(x, mask, work)
    sums, absent = sums_by_chunks(x, mask, work, row_max, rate, exact), absent_value(row_max, exact)
    for tile in range(chunk_tile_count(len(x), w)):
        start, stop = packed_chunks(x, mask, tile, w)
        if exact is None and len(x) <= KEPT:
            high, low = normalizer(sums[0], sums[1])
            scale_stored(w, start, w, start, stop, high, low, w, 0)
        else:
            write_slice(w, start, stop, row_max, rate, sums, exact, w, 0, False, None)
        unpack_chunks(w, start, tile, mask, absent, out)


@jit
def value_by_chunks(x, mask, temperature, weighted, work):
    """Logsumexp of a 1-d array of any stride or, unless ``weighted`` is None, the entropy of its softmax."""
    rate, exact = rate_of(temperature, get(x, 0)), (weighted,)
    row_max = maximum_by_chunks(x, mask, work)
    sums = sums_apart(sums_by_chunks(x, mask, work, row_max, rate, exact), row_max, rate, exact)
    return value_of_sums(with_mask(x, mask), 0, 1, len(x), row_max, temperature, sums, weighted)


@traced
def absent_value(like, exact):
    """What the softmax, or its logarithm if the sums are exact, is where a mask leaves entries out."""
    return spread(0.0, like) if exact is None else -spread(math.inf, like)


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


# For jitted callers, the same of an array of any stride. With chunks in lanes 20 float64 take 2.5 times as
# long as one after the other, 100 to 1000 take 4 times, and 3000 take 1.2.


@jit
def are_few(x):
    """Whether entries that lie apart are summed one by one."""
    return len(x) <= 2 * CHUNK


@jit
def strided_softmax(x, temperature, out):
    """Softmax of a 1-d array of any stride."""
    if are_few(x):
        softmax(x, temperature, out)
    else:
        write_by_chunks(x, None, temperature, None, out, chunk_work(x))


@jit
def strided_log_softmax(x, temperature, out):
    """Logarithm of the softmax of a 1-d array of any stride."""
    if are_few(x):
        log_softmax(x, temperature, out)
    else:
        write_by_chunks(x, None, temperature, (None,), out, chunk_work(x))


@jit
def strided_logsumexp(x, temperature):
    """T log(sum(exp(x / T))) of a 1-d array of any stride."""
    if are_few(x):
        return logsumexp(x, temperature)
    return value_by_chunks(x, None, temperature, None, chunk_work(x))


@jit
def strided_entropy(x, temperature):
    """Entropy of the softmax of a 1-d array of any stride."""
    if are_few(x):
        return entropy(x, temperature)
    return value_by_chunks(x, None, temperature, True, chunk_work(x))


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
