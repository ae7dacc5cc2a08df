"""What a thread keeps in its working memory: slices side by side, their sums, and numbers for each.

A tile has a slice in each lane. Numbers of slices, their fields, stand before it, as many of each as there
are lanes or columns. Schedules for rows, columns and slices that lie apart share what is here.
"""

import math

from fastmax._jit import jit
from fastmax._lanes import (
    PAGE_BYTES,
    get,
    lane_count,
    load,
    load_as,
    no_lanes,
    pointer,
    put,
    read,
    select,
    spread,
    store,
    to_stream,
    workspace,
    write,
)
from fastmax._math import (
    Gap,
    Guard,
    Rate,
    Scale,
    add_sums,
    bounded_gap,
    bounded_scale,
    entropy_value,
    gap_of,
    guard_of,
    larger,
    log_of_sum,
    log_terms,
    misses_faint_terms,
    normalizer,
    plain_gap,
    plain_logsumexp,
    probability,
    rate_of,
)
from fastmax._slice import (
    CHUNK,
    QUANTITIES,
    get_sums,
    kept_terms,
    lane_sums,
    later,
    maximum,
    needs_no_mask,
    open_sums,
    quantities,
    scale_of,
    sums_apart,
    sums_of_all,
    value_of_sums,
)
from fastmax._tracing import traced

# Bytes of the results of long rows from which they are written past the caches.
FAR_BYTES = 2**24


@traced
def padded_size(n, work):
    """Entries that a row takes in working memory: whole lanes."""
    lanes = lane_count(work)
    return -(-n // lanes) * lanes


@jit
def workspaces(parts, size, like):
    """Working memory of so many entries for each part, allocated by the caller, which keeps its pages.

    The shares are almost a page apart, beyond which prefetchers do not go: 1024 x 64 float32 takes 0.93 of
    the time.
    """
    size += PAGE_BYTES // 4
    return workspace(parts * size, like).reshape(parts, size)


@jit
def part_of(work, part):
    """Share of one part in its `workspaces`, from where a line begins: rows take 0.97 of the time for it."""
    own = work[part]
    return own[to_stream(own, 0) :]


@jit
def temperature_at(temperature, i):
    """Temperature of slice i: its own, or the one of all."""
    if len(temperature) == 1:
        return temperature[0]
    return temperature[min(i, len(temperature) - 1)]


@traced
def rate_at(temperature, i, like):
    """Rate of slice i."""
    return rate_of(temperature_at(temperature, i), like)


@traced
def first_rate(temperature, x):
    """Rate of the first slice: that of all where there is one temperature, and else of no use."""
    return rate_at(temperature, 0, get(x, 0))


@jit
def pitch(x, axis):
    """Entries of memory from one index along an axis to the next."""
    return x.strides[axis] // x.itemsize


@jit
def place(x, i, row, column):
    """Where an entry lies in memory, counted in entries, of which those of a row are neighbours."""
    return i * pitch(x, 0) + row * pitch(x, 1) + column


@jit
def row_step(x):
    """Distance from one row to the next: 0 if there is one for all temperatures."""
    return pitch(x, 0) if len(x) > 1 else 0


# Sums of slices are kept in arrays (outer, QUANTITIES, inner), those of rows in (rows, QUANTITIES): flat, as
# kernels take them.


@traced
def write_sums(array, at, inner, count, sums):
    """Write the sums of so many slices, of which those of the first stand at an index."""
    for quantity, value in enumerate(sums):
        write(pointer(array), at + quantity * inner, count, value)


@traced
def read_sums(array, at, inner, exact):
    """Sums of as many slices as there are lanes, or are left before inner, from that at an index on."""
    zero, count = spread(0.0, array), inner - at % inner
    return tuple(read(pointer(array), at + quantity * inner, count, zero) for quantity in quantities(exact))


@traced
def put_sums(array, at, inner, sums):
    """Write the sums of the slice whose first stands at an index."""
    for quantity, value in enumerate(sums):
        put(array, at + quantity * inner, value)


@jit
def merged_sums(partial, number, chunks, exact):
    """Sums of a slice, merged from those of its chunks, which stand as `put_sums` writes them, by slices."""
    merged = open_sums(partial[0], exact)
    for chunk in range(number * chunks, (number + 1) * chunks):
        merged = add_sums(merged, get_sums(partial, QUANTITIES * chunk, 1, exact))
    return sums_of_all(merged, exact)


@jit
def merge_tiles(partial, tiles, maxima):
    """Merge the maxima of each slice's tiles."""
    for number in range(len(maxima)):
        maxima[number] = maximum(partial, number * tiles, (number + 1) * tiles)


@jit
def merge_chunks(partial, chunks, inner, exact, sums):
    """Merge the sums of each slice's chunks, of so many neighbours in an array of sums."""
    for number in range(len(sums) // QUANTITIES):
        to = number // inner * QUANTITIES * inner + number % inner
        put_sums(sums, to, inner, merged_sums(partial, number, chunks, exact))


@jit
def is_far(x, out):
    """Whether a result is too long for the caches, and not in place: what was just read they have."""
    return out.size * out.itemsize >= FAR_BYTES and out.ctypes.data != x.ctypes.data


# Fields of a slice: those of Scale and Guard, or of Gap and Guard, and a normalizer.
GUARD = len(Scale._fields)
NORMALIZER = GUARD + len(Guard._fields)
FIELDS = NORMALIZER + 2


@traced
def field(quantity, j, width):
    """Where a field of the columns from j on stands."""
    return quantity * width + j


@jit
def lane_rates(temperature, first, count, rate, like):
    """Rates of so many slices, one in each lane; they are ``rate`` if there is one for all."""
    if len(temperature) > 1:
        return rate_of(load_as(temperature, first, count, 1.0, like), like)
    return Rate(
        load_as(temperature, 0, 0, rate.temperature, like),
        spread(rate.high, like),
        spread(rate.low, like),
        spread(rate.inverse, like),
        spread(rate.depth, like),
        spread(rate.limit, like),
    )


@traced
def are_plain(row_max, rates):
    """Whether all lanes are plain slices."""
    return no_lanes(rates.limit < larger(row_max, -row_max))


# Fields that depend on the temperature alone: multiplier, prescale, factors, cutoff; or inverse, prescale,
# factor, cutoff.
_OF_SCALES = 1, 2, GUARD, GUARD + 1, GUARD + 2, GUARD + 3
_OF_GAPS = 1, GUARD, GUARD + 1, GUARD + 3


@jit
def temperature_count(temperature, like):
    """Number of temperatures that a vector of slices has: one for each, or one for all."""
    return lane_count(like) if len(temperature) > 1 else 1


@traced
def put_fields(values, places, work, j, width):
    """Write fields of slice j."""
    for i, value in enumerate(values):
        put(work, field(places[i], j, width), value)


@traced
def spread_fields(values, places, work, j, width):
    """Write fields of a vector of slices that have the same.

    With these written one by one 10 x 10**5 float32 over axis 0 took 1.3 times as long at T = 0.
    """
    for i, value in enumerate(values):
        store(work, field(places[i], j, width), spread(value, work))


@jit
def write_scales(row_max, plain, rates, temperature, first, work, j, width):
    """Write a scale and guard for each lane: of a plain slice, whose guard changes nothing, or of any."""
    for k in range(temperature_count(temperature, work)):
        high, low, guard = guard_of(temperature_at(temperature, first + k), get(work, 0))
        fields = high, low, guard.prescale, guard.factor, guard.factor2, guard.cutoff
        put_fields(fields, _OF_SCALES, work, j + k, width)
        if len(temperature) == 1:
            spread_fields(fields, _OF_SCALES, work, j, width)
    own_high, own_low = load(work, field(1, j, width)), load(work, field(2, j, width))
    scale, own_guard = bounded_scale(row_max, own_high, own_low, read_guard(work, j, width))
    other = rates.limit < larger(row_max, -row_max)
    write_selected(other, scale, plain, 0, work, j, width)
    write_guards(own_guard, other, work, j, width)


@traced
def write_selected(other, own, plain, first, work, j, width):
    """Write fields from a first one on: their own of slices that are not plain, and those of plain ones."""
    for i, (value, plain_value) in enumerate(zip(own, plain, strict=True)):
        store(work, field(first + i, j, width), select(other, value, plain_value))


@traced
def write_guards(guard, other, work, j, width):
    """Write the guards of slices that are not plain, and those that change nothing of the others."""
    none = no_guard(guard.prescale)
    write_selected(other, guard._replace(plain=spread(0.0, none.plain)), none, GUARD, work, j, width)


@traced
def put_scale(scale, guard, plain, work, j, width):
    """Write the scale and guard of slice j, which is plain or not: 1 or 0."""
    fields = (*scale, *guard._replace(plain=spread(plain, guard.cutoff)))
    put_fields(fields, range(len(fields)), work, j, width)


@traced
def no_guard(like):
    """Guard that changes nothing."""
    one = spread(1.0, like)
    return Guard(one, one, one, -spread(math.inf, like), one)


@traced
def read_scale(work, j, width):
    """Scales of the columns from j on."""
    return Scale(*(load(work, field(i, j, width)) for i in range(len(Scale._fields))))


@traced
def read_guard(work, j, width):
    """Guards of the columns from j on."""
    return Guard(*(load(work, field(GUARD + i, j, width)) for i in range(len(Guard._fields))))


@traced
def mixed_scales(row_max, plain, rates, temperature, first, work, j, width):
    """Scales and guards of the columns from j on where not all are plain; their fields keep them."""
    write_scales(row_max, plain, rates, temperature, first, work, j, width)
    return read_scale(work, j, width), read_guard(work, j, width)


@jit
def write_gaps(row_max, rates, log_sum, temperature, first, work, j, width):
    """Write a gap and guard for each lane; the guard of a plain slice changes nothing."""
    plain, other = plain_gap(row_max, rates, log_sum), rates.limit < larger(row_max, -row_max)
    store(work, field(0, j, width), row_max)
    if no_lanes(other):
        store(work, field(1, j, width), plain.inverse)
        store(work, field(2, j, width), plain.summand)
        write_guards(no_guard(row_max), other, work, j, width)
        return
    for k in range(temperature_count(temperature, work)):
        fields = gap_of(temperature_at(temperature, first + k), get(work, 0))
        put_fields(fields, _OF_GAPS, work, j + k, width)
        if len(temperature) == 1:
            spread_fields(fields, _OF_GAPS, work, j, width)
    own_inverse, own_prescale = load(work, field(1, j, width)), load(work, field(GUARD, j, width))
    own_factor, own_cutoff = load(work, field(GUARD + 1, j, width)), load(work, field(GUARD + 3, j, width))
    gap, guard = bounded_gap(row_max, own_inverse, own_prescale, own_factor, own_cutoff, log_sum)
    write_selected(other, gap, plain, 0, work, j, width)
    write_guards(guard, other, work, j, width)


@traced
def read_gap(work, j, width):
    """Gaps of the columns from j on."""
    return Gap(*(load(work, field(i, j, width)) for i in range(len(Gap._fields))))


@traced
def write_ends(sums, row_max, rates, temperature, first, exact, work, j, width):
    """Write what turns terms into results: normalizers, or gaps if the sums are exact.

    Return whether slices are plain, and whether results need no mask.
    """
    plain = are_plain(row_max, rates)
    if exact is None:
        high, low = normalizer(*sums)
        store(work, field(NORMALIZER, j, width), high)
        store(work, field(NORMALIZER + 1, j, width), low)
        return plain, needs_no_mask(plain, high)
    log_sum = spread(log_of_sum(row_max, sums_apart(sums, row_max, rates, exact)), row_max)
    write_gaps(row_max, rates, log_sum, temperature, first, work, j, width)
    return plain, needs_no_mask(plain, log_sum)


@traced
def normalized(term, work, j, width):
    """Probabilities of the columns from j on."""
    high, low = field(NORMALIZER, j, width), field(NORMALIZER + 1, j, width)
    return probability(term, load(work, high), load(work, low))


@jit
def column_sums(work, at, n, scale, guard, exact, stored, soon):
    """Sums of the terms of columns.

    Terms take the place of the entries, unless ``stored`` is None: else it is the working memory.
    """
    lanes = lane_count(work)
    zero = spread(0.0, work)
    sums = open_sums(zero, exact)
    for start in range(0, n, CHUNK):
        first, last = at + start * lanes, at + min(n, start + CHUNK) * lanes
        ahead = later(soon, start)
        part = lane_sums(work, first, last, scale, guard, exact, stored, first, ahead, zero)
        sums = add_sums(sums, part)
    return sums_of_all(sums, exact)


@jit(forceinline=True)
def tile_sums(work, at, n, row_max, temperature, first, rates, exact, stored, j, width, soon):
    """`column_sums` at the temperatures of rates."""
    scale = scale_of(row_max, rates, exact)
    if are_plain(row_max, rates):
        return column_sums(work, at, n, scale, None, exact, stored, soon)
    scale, guard = mixed_scales(row_max, scale, rates, temperature, first, work, j, width)
    return column_sums(work, at, n, scale, guard, exact, stored, soon)


@jit
def log_value(x, work, j, width, plain):
    """Logarithms of the softmax of columns from j on, all of them plain or some not."""
    if plain:
        return log_terms(x, read_gap(work, j, width), None)
    return log_terms(x, read_gap(work, j, width), read_guard(work, j, width))


@traced
def write_beside(row_max, sums, work, j, width):
    """Write maxima, and what sums have beside them, to the first fields."""
    store(work, field(0, j, width), row_max)
    for quantity, value in enumerate(sums):
        store(work, field(1 + quantity, j, width), value)


@traced
def value_beside(x, start, step, n, temperature, weighted, work, j, width):
    """Logsumexp, or entropy unless ``weighted`` is None, of a slice of which `write_beside` was called."""
    values = tuple(get(work, field(i, j, width)) for i in range(3 if weighted is None else 5))
    return value_of_sums(x, start, step, n, values[0], temperature, values[1:], weighted)


@traced
def shows_all(row_max, temperature, sums, weighted):
    """Whether the sums of plain slices give their values: no term is too faint to be seen in them."""
    if weighted is not None:
        return True
    return no_lanes(misses_faint_terms(row_max, temperature, sums))


@traced
def plain_value(row_max, temperature, sums, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of plain slices."""
    if weighted is not None:
        return entropy_value(row_max, sums)
    return plain_logsumexp(row_max, temperature, sums)


@jit
def write_lanes(work, at, n, row_max, temperature, first, count, rate, exact, soon, to, step):
    """Write the softmax of a vector of slices, or its logarithm if the sums are to be exact.

    They are in working memory, as the results will be: from ``to`` on, by steps of so many entries.
    """
    lanes = lane_count(work)
    rates, stored = lane_rates(temperature, first, count, rate, work), kept_terms(work, exact)
    sums = tile_sums(work, at, n, row_max, temperature, first, rates, exact, stored, 0, lanes, soon)
    plain, _ = write_ends(sums, row_max, rates, temperature, first, exact, work, 0, lanes)
    for i in range(n):
        value = load(work, at + i * lanes)
        if exact is None:
            store(work, to + i * step, normalized(value, work, 0, lanes))
        else:
            store(work, to + i * step, log_value(value, work, 0, lanes, plain))


@jit
def value_lanes(work, at, n, row_max, temperature, first, count, rate, weighted, j, width, soon):
    """Write the logsumexp of a vector of slices, or their entropy unless ``weighted`` is None.

    Return whether they were written, to the first field; if not, `write_beside` was called.
    """
    exact, rates = (weighted,), lane_rates(temperature, first, count, rate, work)
    sums = tile_sums(work, at, n, row_max, temperature, first, rates, exact, None, j, width, soon)
    sums = sums_apart(sums, row_max, rates, exact)
    if are_plain(row_max, rates) and shows_all(row_max, rates.temperature, sums, weighted):
        store(work, field(0, j, width), plain_value(row_max, rates.temperature, sums, weighted))
        return True
    write_beside(row_max, sums, work, j, width)
    return False
