"""Schedules for a CPU: which thread takes which slices, and in what order memory is walked.

Arrays come as C-contiguous (outer, n) or (outer, n, inner), reduced over n; the mask is None or an array of
bytes of that shape; temperatures are one float64, or one for each of the outer * inner slices. Without a mask
x may have steps, not below 0, between its rows and between its outer indices, as what is cut out of another
array has: only entries of a row, or the neighbours that columns have, are contiguous. Schedules:

- narrow rows: a thread takes as many as there are lanes, and gives each lane one;
- rows: a thread takes whole slices, several short ones at a time; one row may meet many
  temperatures;
- long rows: too long for a core's cache, or too few to keep the threads busy; all threads share each row;
- columns: neighbouring slices lie side by side, a thread takes a tile of them, one per lane;
- shallow columns: so few rows that softmax reads and writes one vector of columns after the other;
- long columns: too long for a tile; each is taken chunk by chunk, and threads share them.
"""

import functools
import math
from collections import namedtuple

from fastmax import _process, _slice
from fastmax._jit import jit, kernel, plain_kernel
from fastmax._lanes import (
    LANE_BYTES,
    LINE_BYTES,
    PAGE_BYTES,
    REGISTER_BYTES,
    REGISTERS,
    SECOND_CACHE_BYTES,
    entries_of,
    fma,
    get,
    is_as_wide,
    lane_count,
    load,
    load_as,
    no_lanes,
    piece_size,
    piece_zeros,
    pointer,
    prefetch_to_read,
    prefetch_to_write,
    present,
    put,
    read,
    read_pieces,
    register_zeros,
    select,
    settle,
    spread,
    store,
    stream,
    to_stream,
    touch,
    workspace,
    write,
    write_pieces,
)
from fastmax._math import (
    Gap,
    Guard,
    Rate,
    Scale,
    add_sums,
    apart,
    bounded_gap,
    bounded_scale,
    closed,
    entropy_value,
    first_of,
    gap_of,
    guard_of,
    guarded_gap,
    guarded_scale,
    larger,
    log_of_sum,
    log_terms,
    merge,
    misses_faint_terms,
    normalizer,
    plain_gap,
    plain_logsumexp,
    probability,
    rate_of,
    ratio_scale,
    ratio_terms,
    term_of,
    top_term,
)
from fastmax._slice import (
    AHEAD,
    BLOCK,
    CHUNK,
    EXACT_BLOCK,
    Soon,
    add_terms,
    before_far,
    end_of_sums,
    fetch,
    further_on,
    get_sums,
    has_moments,
    is_new,
    kept_terms,
    lane_maxima,
    lane_sums,
    later,
    maxima_of,
    next_block,
    no_sums,
    quantities,
    register_maxima,
    scale_of,
    start_of_sums,
    store_all,
    sum_lanes,
    sums_apart,
    sums_of,
    touch_new,
    write_whole,
)
from fastmax._threads import Kernel, each_span, each_task, parts_for
from fastmax._tracing import traced

# Entries from which all threads take no longer than one, on two cores: rows, columns, one slice (see
# figures/scaling_cpu.csv).
PARALLEL_ROWS = 2**14
PARALLEL_COLUMNS = 2**16
PARALLEL_SLICE = 2**17

# Terms of rows that a thread takes at a time: they and the rows themselves fit the first cache.
GROUP = 2**11

# Bytes of a row up to which a thread keeps its terms, in the second or third cache, until they are scaled:
# where the results will be, if those have as many bits.
STORED_BYTES = 2**21

# Bytes of the results of long rows from which they are written past the caches.
FAR_BYTES = 2**24

# Bytes of a tile of columns: it is walked three times, from the second cache of a core. Where that has 2 MB,
# 1000 x 8192 takes 0.9 of the time with twice as many, as longer pieces of rows are read and written.
TILE_BYTES = 2**20 if SECOND_CACHE_BYTES >= 2**21 else 2**19

# Bytes of a tile's rows that are fetched ahead, from pages that the processor would not foresee; where rows
# are more than half as long, the next tile is fetched instead, while terms are computed. Of many short rows a
# power of two apart a cache does not keep that: 1000 x 8192 float32 would take 1.2 times as long.
AHEAD_BYTES = 2**12

# Rows up to which columns are not written past the caches: 1000 x 8192 takes 0.8 to 0.9 of the time for it,
# 100 x 100000 0.8, 30 x 300000 0.9 to 1, and 10 x 10**6 1.3 times as long.
FEW_FAR_ROWS = 32

# Rows up to which columns are shallow: a sum is one block. 10 x 10**6 takes 0.83 of the time for it, 1000 of
# 10 x 50 0.8; log_softmax and logsumexp would take 0.95 to 1. Of 24 x 400000 each row and its results are a
# stream, too many for a processor to foresee: 1.3.
SHALLOW = BLOCK

# Outer indices for each thread from which threads do not take tiles in turn. They count in one place then,
# and 20000 x 10 x 50 took 3.3 times as long over its middle axis, twice as long as on one thread.
MANY = 8

# Entries of a column from which it is tall: a vector of such columns takes half a tile.
TALL = 2**11


# -- rows -----------------------------------------------------------------------------------------
# Rows of at most one chunk are taken in groups, at most one row for each lane. What the lanes of a register
# have found and summed up is kept side by side for each row and quantity, and merged for all rows of a group
# at once, in a fifth of the instructions.

# Vectors in the working memory beside those of the sums, with one row in each lane: maxima, normalizers as
# high and low (or inverse and summand of a gap), the largest maximum of a plain row, and the fields of a
# scale, which all rows of a group get at once.
_MAXIMA, _HIGH, _LOW, _LIMIT, _SCALE, _VECTORS = 0, 1, 2, 3, 4, 9
# Sums: total and error, moment and its error.
_SUMS = 4


@traced
def padded_size(n, work):
    """Entries that a row takes in working memory: whole lanes."""
    lanes = lane_count(work)
    return -(-n // lanes) * lanes


@jit
def group_size(n, work):
    """Number of rows in a group."""
    lanes = lane_count(work)
    return min(lanes, max(1, GROUP // padded_size(n, work)))


@traced
def group_count(rows, n, work):
    """Number of groups that so many rows make."""
    return -(-rows // group_size(n, work))


@jit
def row_work_size(n, like):
    """Entries of working memory for a group of rows: vectors, sums of each row, and terms."""
    lanes = lane_count(like)
    return (_VECTORS + _SUMS * lanes // REGISTERS) * lanes + max(padded_size(n, like), GROUP)


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


@traced
def sums_at(work, quantity):
    """Where the sums of a quantity stand in working memory."""
    lanes = lane_count(work)
    return (_VECTORS + quantity * lanes // REGISTERS) * lanes


@jit
def group_maxima(x, n, step, first, count, work):
    """Write the maxima of rows, one per lane."""
    lanes = lane_count(work)
    at = sums_at(work, 0)
    for r in range(count):
        row = (first + r) * step
        store(work, at + r * lanes // REGISTERS, register_maxima(lane_maxima(x, row, row + n)))
    maxima_of(work, at, count)
    store(work, _MAXIMA * lanes, load(work, at))


@traced
def maxima_at(work, count):
    """Maxima of the rows of a group, one per lane."""
    return read(work, _MAXIMA * lane_count(work), count, spread(0.0, work))


@traced
def put_row_scales(scale, rates, work):
    """Write the scales of rows, which are right for those that are plain."""
    lanes = lane_count(work)
    store(work, _LIMIT * lanes, rates.limit)
    for i, value in enumerate(scale[1:]):
        store(work, (_SCALE + i) * lanes, value)


@traced
def is_plain_at(work, r):
    """Whether row r of a group is plain."""
    lanes = lane_count(work)
    return abs(get(work, _MAXIMA * lanes + r)) <= get(work, _LIMIT * lanes + r)


@traced
def row_scale_at(work, r):
    """Scale of row r of a group, if that is plain."""
    lanes = lane_count(work)
    fields = (get(work, (_SCALE + i) * lanes + r) for i in range(len(Scale._fields) - 1))
    return Scale(get(work, _MAXIMA * lanes + r), *fields)


@jit
def group_sums(x, n, step, first, count, further, temperature, exact, work, stored, results):
    """Write the sums of rows, one per lane; fetch the rows that come so many further on.

    Terms are written, too, unless ``stored`` is None: else it is the working memory.
    """
    lanes = lane_count(work)
    zero, terms = register_zeros(work), sums_at(work, _SUMS)
    for r in range(count):
        row = (first + r) * step
        soon = Soon(x, row + further * step, lanes, results, (first + r) * n, lanes)
        if is_plain_at(work, r):
            scale = row_scale_at(work, r)
            sums = lane_sums(x, row, row + n, scale, None, exact, stored, terms, soon, zero)
        else:
            own = temperature_at(temperature, first + r)
            scale, guard = guarded_scale(get(work, _MAXIMA * lanes + r), own)
            sums = lane_sums(x, row, row + n, scale, guard, exact, stored, terms, soon, zero)
        terms += padded_size(n, work)
        store_all(work, sums_at(work, 0) + r * lanes // REGISTERS, sums_at(work, 1) - sums_at(work, 0), sums)
    sums_of(work, sums_at(work, 0), sums_at(work, 1), count)
    if has_moments(exact):
        sums_of(work, sums_at(work, 2), sums_at(work, 3), count)


@traced
def load_all(work, at, step, exact):
    """Sums that `store_all` wrote."""
    return tuple(load(work, at + quantity * step) for quantity in quantities(exact))


@traced
def lane_sums_at(work, exact):
    """Sums of all rows of a group, one in each lane."""
    return load_all(work, sums_at(work, 0), sums_at(work, 1) - sums_at(work, 0), exact)


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


@Kernel
def softmax_rows(team, parts, x, mask, temperature, out):
    """Softmax of rows of at most one chunk."""
    n, like = out.shape[1], pointer(x)
    work = workspaces(parts, row_work_size(n, like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, work
    each_span(softmax_groups, team, parts, group_count(len(out), n, like), arguments)


@jit
def softmax_groups(first, stop, part, x, mask, temperature, rate, out, work):
    """Softmax of some groups of rows."""
    n, step = out.shape[1], row_step(x)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    size, lanes = group_size(n, w), lane_count(w)
    first, stop = first * size, min(stop * size, len(out))
    new = is_new(results, stop * n)
    for start in range(first, stop, size):
        count = min(size, stop - start)
        if new:
            touch(results, start * n, (start + count) * n)
        group_maxima(entries, n, step, start, count, w)
        rates = lane_rates(temperature, start, count, rate, w)
        put_row_scales(ratio_scale(maxima_at(w, count), rates), rates, w)
        further = min(size, stop - start - count)
        group_sums(entries, n, step, start, count, further, temperature, None, w, w, results)
        high, low = normalizer(load(w, sums_at(w, 0)), load(w, sums_at(w, 1)))
        store(w, _HIGH * lanes, high)
        store(w, _LOW * lanes, low)
        terms = sums_at(w, _SUMS)
        for r in range(count):
            row = (start + r) * step
            high, low = get(w, _HIGH * lanes + r), get(w, _LOW * lanes + r)
            shift = (start + r) * n - row
            _slice.scale_stored(w, terms, entries, row, row + n, high, low, results, shift)
            terms += padded_size(n, w)


@Kernel
def log_softmax_rows(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of rows of at most one chunk."""
    n, like = out.shape[1], pointer(x)
    work = workspaces(parts, row_work_size(n, like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, work
    each_span(log_softmax_groups, team, parts, group_count(len(out), n, like), arguments)


@jit
def log_softmax_groups(first, stop, part, x, mask, temperature, rate, out, work):
    """Logarithm of the softmax of some groups of rows."""
    n, step = out.shape[1], row_step(x)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    size, lanes = group_size(n, w), lane_count(w)
    first, stop = first * size, min(stop * size, len(out))
    new = is_new(results, stop * n)
    for start in range(first, stop, size):
        count = min(size, stop - start)
        if new:
            touch(results, start * n, (start + count) * n)
        group_maxima(entries, n, step, start, count, w)
        row_max, rates = maxima_at(w, count), lane_rates(temperature, start, count, rate, w)
        put_row_scales(ratio_scale(row_max, rates), rates, w)
        further = min(size, stop - start - count)
        group_sums(entries, n, step, start, count, further, temperature, (None,), w, None, results)
        sums = sums_apart(lane_sums_at(w, (None,)), row_max, rates, (None,))
        gaps = plain_gap(row_max, rates, log_of_sum(row_max, sums))
        store(w, _HIGH * lanes, gaps.inverse)
        store(w, _LOW * lanes, gaps.summand)
        for r in range(count):
            gap = Gap(get(w, _MAXIMA * lanes + r), get(w, _HIGH * lanes + r), get(w, _LOW * lanes + r))
            row = (start + r) * step
            shift = (start + r) * n - row
            if is_plain_at(w, r):
                _slice.write_log_terms(entries, row, row + n, gap, None, results, shift, False, None)
            else:
                log_sum = spread(0.0, gap.summand) - gap.summand
                gap, guard = guarded_gap(gap.row_max, temperature_at(temperature, start + r), log_sum)
                _slice.write_log_terms(entries, row, row + n, gap, guard, results, shift, False, None)


@Kernel
def value_rows(team, parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of rows of at most one chunk."""
    n, like = x.shape[1], pointer(x)
    work = workspaces(parts, row_work_size(n, like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, weighted, work
    each_span(value_groups, team, parts, group_count(len(out), n, like), arguments)


@jit
def value_groups(first, stop, part, x, mask, temperature, rate, out, weighted, work):
    """`value_rows` of some groups of rows."""
    n, step = x.shape[1], row_step(x)
    entries, w, exact = entries_of(x, mask), pointer(part_of(work, part)), (weighted,)
    size, lanes = group_size(n, w), lane_count(w)
    first, stop = first * size, min(stop * size, len(out))
    for start in range(first, stop, size):
        count = min(size, stop - start)
        group_maxima(entries, n, step, start, count, w)
        row_max, rates = maxima_at(w, count), lane_rates(temperature, start, count, rate, w)
        put_row_scales(scale_of(row_max, rates, exact), rates, w)
        further = min(size, stop - start - count)
        group_sums(entries, n, step, start, count, further, temperature, exact, w, None, None)
        sums = sums_apart(lane_sums_at(w, exact), row_max, rates, exact)
        if are_plain(row_max, rates) and shows_all(row_max, rates.temperature, sums, weighted):
            write(pointer(out), start, count, plain_value(row_max, rates.temperature, sums, weighted))
            continue
        write_beside(row_max, sums, w, 0, lanes)
        for r in range(count):
            top, own = get(w, field(0, r, lanes)), temperature_at(temperature, start + r)
            sums, row = get_sums(w, field(1, r, lanes), lanes, exact), (start + r) * step
            value = _slice.value_of_sums(entries, row, 1, n, top, own, sums, weighted)
            put(pointer(out), start + r, value)


# -- narrow rows ----------------------------------------------------------------------------------
# As many rows as there are lanes are transposed, piece by piece, into a tile: a lane then has a whole row,
# no vector is filled in part, and nothing is merged across lanes. Ten float32 take 28 ns on Zen 1, of which
# the two transpositions are 5 and the sums 19, and 166 as a row of `softmax_rows`. Entries are summed in
# chains, which are the lanes there, and chains are merged by halves.

# Vectors of working memory beside the tile: fields of the rows, and for each chain sums as `_SUMS` says.


@traced
def narrow_work_size(n, like):
    """Entries of working memory for as many rows as there are lanes."""
    lanes = lane_count(like)
    return (FIELDS + _SUMS * chain_count(n, like) + n + piece_size(like)) * lanes


@traced
def narrow_group_count(rows, like):
    """Number of groups that so many narrow rows make: as many in each as there are lanes."""
    return -(-rows // lane_count(like))


@traced
def chain_sums_at(n, work):
    """Where the sums of the chains stand in working memory; the tile comes before them."""
    return (FIELDS + n + piece_size(work)) * lane_count(work)


@jit
def pack_rows(x, row, step, n, count, work, at):
    """Write rows to a tile, one in each lane; lanes without one get the last, to be as plain as the others.

    The last piece of a row overlaps the one before. Where a row is shorter than a piece, columns that it does
    not have are written too. With AVX-512 pieces are wide as long as there are entries for that: to transpose
    those takes one instruction a register, as it does not with AVX2, and half the reads and writes. Rows of
    10 to 40 float32 take 0.9 of the time for it, of float64 as long.
    """
    start, size = 0, piece_size(work)
    if REGISTER_BYTES == 64:
        while start + 2 * size <= n:
            pack_pieces(x, row, step, start, 2 * size, count, work, at, True)
            start += 2 * size
    while start < n:
        pack_pieces(x, row, step, max(min(start, n - size), 0), min(size, n), count, work, at, None)
        start += size


@jit
def pack_pieces(x, row, step, first, columns, count, work, at, wide):
    """`pack_rows` of a piece of each row."""
    lanes, register = lane_count(work), lane_count(register_zeros(work))
    for i in range(0, lanes, register):
        entry = row + min(i, count - 1) * step + first
        read_pieces(x, entry, step, max(count - i, 1), columns, work, at + first * lanes + i, wide)


@jit
def unpack_rows(work, at, out, row, n, count, x, absent):
    """Write a tile to rows; entries that the mask of x leaves out become ``absent``."""
    start, size = 0, piece_size(work)
    if REGISTER_BYTES == 64:
        while start + 2 * size <= n:
            unpack_pieces(work, at, out, row, start, 2 * size, n, count, x, absent, True)
            start += 2 * size
    while start < n:
        first, columns = max(min(start, n - size), 0), min(size, n)
        unpack_pieces(work, at, out, row, first, columns, n, count, x, absent, None)
        start += size


@jit
def unpack_pieces(work, at, out, row, first, columns, n, count, x, absent, wide):
    """`unpack_rows` of a piece of each row."""
    lanes, register = lane_count(work), lane_count(register_zeros(work))
    for i in range(0, count, register):
        tile, entry = at + first * lanes + i, row + i * n + first
        write_pieces(work, tile, out, entry, n, count - i, columns, x, absent, wide)


@jit
def sum_lane_count(n, like):
    """Number of lanes in which n entries are summed."""
    return lane_count(register_zeros(like)) if n >= lane_count(like) else lane_count(piece_zeros(like))


@jit
def chain_count(n, like):
    """Number of chains: one for each lane that has entries."""
    return min(n, sum_lane_count(n, like))


@jit
def next_entry(entry, chain, n, like):
    """Entry that follows in a chain; ``n`` or more if there is none.

    Those are the entries that `lane_sums` of n sums in a lane: where a last vector would not be full, it is
    the last that is.
    """
    step, whole = sum_lane_count(n, like), n // lane_count(like) * lane_count(like)
    entry += step
    if entry == whole + chain:
        entry = whole + ((n + chain) & (step - 1))
    return entry


@jit
def soon_for_group(x, out, first, count, rows, n, step):
    """What to fetch while a group of narrow rows is worked on: the next one, and where its own results go.

    With each entry of a row a part of that is fetched: all at once would wait for one another, and
    250000 x 40 float32 took 1.3 times as long. Of rows that lie apart it is what lies next to the first.
    """
    following = min(first + count, rows - count) * step
    by = count if step > 0 else 0
    return Soon(x, following, by, out, first * n, by)


@jit
def narrow_sums(work, at, n, scale, guard, exact, stored, soon):
    """Sums of the terms of rows; ``soon`` is what to fetch meanwhile.

    Terms take the place of the entries, unless ``stored`` is None: else it is the working memory.
    """
    lanes, totals, zero = lane_count(work), chain_sums_at(n, work), spread(0.0, work)
    chains, whole = chain_count(n, work), n // lane_count(work) * lane_count(work)
    size = chains * lanes
    fetched = 0
    for chain in range(chains):
        sums, earlier, lost = start_of_sums(zero, exact), zero, zero
        entry, added = chain, 0
        while entry < n:
            fetch(soon, fetched)
            fetched += 1
            if exact is not None:
                if added == EXACT_BLOCK and entry < whole:
                    sums, earlier, lost = next_block(sums, earlier, lost, exact)
                    added = 0
                added += 1
            i = at + entry * lanes
            sums, term = add_terms(sums, load(work, i), 0, scale, guard, exact)
            if stored is not None:
                store(stored, i, term)
            entry = next_entry(entry, chain, n, work)
        store_all(work, totals + chain * lanes, size, end_of_sums(sums, earlier, lost, exact))
    merge_chains(work, totals, totals + size, n)
    if has_moments(exact):
        merge_chains(work, totals + 2 * size, totals + 3 * size, n)
    return load_all(work, totals, size, exact)


@jit
def merge_chains(work, totals, errors, n):
    """Merge the sums of the chains of n entries into those of the first."""
    lanes, count = lane_count(work), chain_count(n, work)
    half = sum_lane_count(n, work) // 2
    while half > 0:
        for chain in range(half, count):
            at, to = totals + chain * lanes, errors + chain * lanes
            total, error = load(work, at - half * lanes), load(work, to - half * lanes)
            total, error = merge(total, error, load(work, at), load(work, to))
            store(work, at - half * lanes, total)
            store(work, to - half * lanes, error)
        half, count = half // 2, min(half, count)


@Kernel
def softmax_narrow_rows(team, parts, x, mask, temperature, out):
    """Softmax of narrow rows."""
    like, new = pointer(x), is_new(pointer(out), out.size)
    work = workspaces(parts, narrow_work_size(out.shape[1], like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, new, work
    groups = narrow_group_count(len(out), like)
    each_task(softmax_narrow_group, team, parts, groups, arguments)


@plain_kernel(2, 2)
def softmax_few_rows(x, temperature, out):
    """Softmax of narrow rows on one thread, at one temperature, which is a float: the short way.

    Return whether ``out`` fits: if not, nothing is written.
    """
    if not _slice.fits(x, out):
        return False
    rows, n = out.shape
    work, rate = workspaces(1, narrow_work_size(n, x), x), first_rate((temperature,), x)
    for group in range(narrow_group_count(rows, x)):
        softmax_narrow_group(group, 0, x, None, (temperature,), rate, out, False, work)
    return True


@jit
def softmax_narrow_group(group, part, x, mask, temperature, rate, out, new, work):
    """Softmax of as many rows as there are lanes, or fewer.

    ``rate`` is the `first_rate`, and ``new`` says whether ``out`` may lie in new memory, as `is_new` does of
    its last entry.
    """
    n, step = out.shape[1], row_step(x)
    entries, w = entries_of(x, mask), pointer(part_of(work, part))
    lanes = lane_count(w)
    first, tile = group * lanes, FIELDS * lanes
    count = min(lanes, len(out) - first)
    if new:
        touch(pointer(out), first * n, (first + count) * n)
    soon = soon_for_group(entries, pointer(out), first, count, len(out), n, step)
    if step == 0:  # one row, which is at hand, at many temperatures
        for i in range(0, count * n, lanes):
            prefetch_to_write(pointer(out), first * n + i)
    _, sums, _, _ = pack_and_sum(entries, temperature, rate, first, n, step, count, None, w, soon)
    high, low = normalizer(sums[0], sums[1])
    for i in range(tile, tile + n * lanes, lanes):
        store(w, i, probability(load(w, i), high, low))
    unpack_rows(w, tile, pointer(out), first * n, n, count, entries, spread(0.0, get(w, tile)))


@jit(forceinline=True)
def pack_and_sum(x, temperature, rate, first, n, step, count, exact, work, soon):
    """Pack a group; return maxima, sums, rates, and whether all rows are plain.

    Inlined: softmax of 10000 x 10 float32 takes 1.08 times as long with a call, the logarithm 1.05.
    """
    lanes, stored = lane_count(work), kept_terms(work, exact)
    tile = FIELDS * lanes
    pack_rows(x, first * step, step, n, count, work, tile)
    row_max = lane_maxima(work, tile, tile + n * lanes)
    rates = lane_rates(temperature, first, count, rate, work)
    plain, scale = are_plain(row_max, rates), scale_of(row_max, rates, exact)
    if plain:
        sums = narrow_sums(work, tile, n, scale, None, exact, stored, soon)
    else:
        scale, guard = mixed_scales(row_max, scale, rates, temperature, first, work, 0, lanes)
        sums = narrow_sums(work, tile, n, scale, guard, exact, stored, soon)
    return row_max, sums, rates, plain


@Kernel
def log_softmax_narrow_rows(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of narrow rows."""
    like, new = pointer(x), is_new(pointer(out), out.size)
    work = workspaces(parts, narrow_work_size(out.shape[1], like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, new, work
    groups = narrow_group_count(len(out), like)
    each_task(log_softmax_narrow_group, team, parts, groups, arguments)


@plain_kernel(2, 2)
def log_softmax_few_rows(x, temperature, out):
    """Logarithm of the softmax of narrow rows, as `softmax_few_rows`."""
    if not _slice.fits(x, out):
        return False
    rows, n = out.shape
    work, rate = workspaces(1, narrow_work_size(n, x), x), first_rate((temperature,), x)
    for group in range(narrow_group_count(rows, x)):
        log_softmax_narrow_group(group, 0, x, None, (temperature,), rate, out, False, work)
    return True


@jit
def log_softmax_narrow_group(group, part, x, mask, temperature, rate, out, new, work):
    """Logarithm of the softmax of as many rows as there are lanes, or fewer, as `softmax_narrow_group`."""
    n, step = out.shape[1], row_step(x)
    entries, w = entries_of(x, mask), pointer(part_of(work, part))
    lanes = lane_count(w)
    first, tile = group * lanes, FIELDS * lanes
    count = min(lanes, len(out) - first)
    if new:
        touch(pointer(out), first * n, (first + count) * n)
    soon = soon_for_group(entries, pointer(out), first, count, len(out), n, step)
    exact = (None,)
    row_max, sums, rates, plain = pack_and_sum(
        entries, temperature, rate, first, n, step, count, exact, w, soon
    )
    log_sum = spread(log_of_sum(row_max, sums_apart(sums, row_max, rates, exact)), row_max)
    write_gaps(row_max, rates, log_sum, temperature, first, w, 0, lanes)
    gap, guard = read_gap(w, 0, lanes), read_guard(w, 0, lanes)
    for i in range(tile, tile + n * lanes, lanes):
        if plain:
            store(w, i, log_terms(load(w, i), gap, None))
        else:
            store(w, i, log_terms(load(w, i), gap, guard))
    unpack_rows(w, tile, pointer(out), first * n, n, count, entries, -spread(math.inf, get(w, tile)))


@Kernel
def value_narrow_rows(team, parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of narrow rows."""
    like = pointer(x)
    work = workspaces(parts, narrow_work_size(x.shape[1], like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, weighted, work
    groups = narrow_group_count(len(out), like)
    each_task(value_narrow_group, team, parts, groups, arguments)


@jit
def value_few_rows(x, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of narrow rows on one thread, at one temperature."""
    rows, n = x.shape
    work, rate = workspaces(1, narrow_work_size(n, x), x), first_rate((temperature,), x)
    for group in range(narrow_group_count(rows, x)):
        value_narrow_group(group, 0, x, None, (temperature,), rate, out, weighted, work)


@plain_kernel(2, 1)
def logsumexp_few_rows(x, temperature, out):
    """Logsumexp of narrow rows on one thread, at one temperature."""
    value_few_rows(x, temperature, out, None)


@plain_kernel(2, 1)
def entropy_few_rows(x, temperature, out):
    """Entropy of the softmax of narrow rows on one thread, at one temperature."""
    value_few_rows(x, temperature, out, True)


@jit
def value_narrow_group(group, part, x, mask, temperature, rate, out, weighted, work):
    """`value_narrow_rows` of as many rows as there are lanes, or fewer."""
    n, step = x.shape[1], row_step(x)
    entries, w, exact = entries_of(x, mask), pointer(part_of(work, part)), (weighted,)
    lanes = lane_count(w)
    first = group * lanes
    count = min(lanes, len(out) - first)
    soon = soon_for_group(entries, None, first, count, len(out), n, step)
    row_max, sums, rates, plain = pack_and_sum(
        entries, temperature, rate, first, n, step, count, exact, w, soon
    )
    sums = sums_apart(sums, row_max, rates, exact)
    if plain and shows_all(row_max, rates.temperature, sums, weighted):
        value = plain_value(row_max, rates.temperature, sums, weighted)
        write(pointer(out), first, count, value)
        return
    write_beside(row_max, sums, w, 0, lanes)
    for k in range(count):
        top, sums = get(w, field(0, k, lanes)), get_sums(w, field(1, k, lanes), lanes, exact)
        own = temperature_at(temperature, first + k)
        value = _slice.value_of_sums(entries, (first + k) * step, 1, n, top, own, sums, weighted)
        put(pointer(out), first + k, value)


# -- rows of more than a chunk --------------------------------------------------------------------


@jit
def soon_for_row(x, row, n, following, out, to):
    """What to fetch while a row is worked on: the next one, or, where the second cache is too small, its own.

    That has to hold the row, its results if any, and the next one, and is shared by code. In 2 MB rows of
    32000 float64 take 0.87 of the time with the next one fetched, of 128256 1.2 times as long, or 0.9 without
    results.
    """
    lanes, rows = lane_count(x), 2 if out is None else 4
    if n * LANE_BYTES > SECOND_CACHE_BYTES // rows * lanes:
        return Soon(x, row + AHEAD * lanes, lanes, out, to + AHEAD * lanes, lanes)
    return Soon(x, following, lanes, out, to, lanes)


@Kernel
def softmax_wide_rows(team, parts, x, mask, temperature, out):
    """Softmax of rows of more than a chunk, each by one thread."""
    like = pointer(x)
    work = workspaces(parts, 0 if is_as_wide(out) else padded_size(out.shape[1], like), like)
    each_task(softmax_wide_row, team, parts, len(out), (x, mask, temperature, out, work))


@traced
def place_of_terms(out, start, work):
    """Where terms of a row are kept until they are scaled: in its results, unless those have 16 bits.

    Working memory would take as much of the second cache again: on an Emerald Rapids rows of 32000 entries
    take 0.85 of the time without it, and of 128256 0.65.
    """
    return (pointer(out), start) if is_as_wide(out) else (pointer(work), 0)


@jit
def softmax_wide_row(i, part, x, mask, temperature, out, work):
    """Softmax of row i."""
    n = out.shape[1]
    row, step = i * row_step(x), row_step(x)
    entries, results = entries_of(x, mask), pointer(out)
    stored, at = place_of_terms(out, i * n, part_of(work, part))
    rate = rate_at(temperature, i, get(entries, 0))
    soon = soon_for_row(entries, row, n, min(i + 1, len(x) - 1) * step, results, i * n)
    touch_new(results, i * n, i * n + n)
    _slice.softmax_of(entries, row, row + n, rate, stored, at, results, i * n - row, soon)


@Kernel
def log_softmax_wide_rows(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of rows of more than a chunk, each by one thread."""
    each_task(log_softmax_wide_row, team, parts, len(out), (x, mask, temperature, out))


@jit
def log_softmax_wide_row(i, part, x, mask, temperature, out):
    """Logarithm of the softmax of row i."""
    n = out.shape[1]
    row, step = i * row_step(x), row_step(x)
    entries, results = entries_of(x, mask), pointer(out)
    rate = rate_at(temperature, i, get(entries, 0))
    soon = soon_for_row(entries, row, n, min(i + 1, len(x) - 1) * step, results, i * n)
    touch_new(results, i * n, i * n + n)
    _slice.log_softmax_of(entries, row, row + n, rate, results, i * n - row, soon)


@Kernel
def value_wide_rows(team, parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of rows of more than a chunk, each by one thread."""
    arguments = x, mask, temperature, out, weighted
    each_task(value_wide_row, team, parts, len(out), arguments)


@jit
def value_wide_row(i, part, x, mask, temperature, out, weighted):
    """`value_wide_rows` of row i."""
    n = x.shape[1]
    row, step = i * row_step(x), row_step(x)
    entries = entries_of(x, mask)
    rate = rate_at(temperature, i, get(entries, 0))
    soon = soon_for_row(entries, row, n, min(i + 1, len(x) - 1) * step, None, 0)
    value = _slice.value_of(entries, row, row + n, rate, weighted, soon)
    put(pointer(out), i, value)


# -- long rows ------------------------------------------------------------------------------------


@traced
def chunk_count(n, like):
    """Number of chunks of a row."""
    return -(-n // (CHUNK * lane_count(like)))


@jit
def chunk_of(task, x, like):
    """Row, start and stop of the chunk that a task stands for, and what to fetch while it is read."""
    n, size = x.shape[1], CHUNK * lane_count(like)
    row, number = divmod(task, chunk_count(n, like))
    first = row * row_step(x)
    start, stop = first + number * size, first + min(n, (number + 1) * size)
    return row, start, stop, further_on(like, start, stop, (len(x) - 1) * row_step(x) + n)


@Kernel
def long_maxima(team, parts, x, mask):
    """Maximum of each row."""
    like, rows = pointer(x), len(x)
    chunks = chunk_count(x.shape[1], like)
    partial, maxima = workspace(rows * chunks, like), workspace(rows, like)
    each_task(chunk_maximum, team, parts, rows * chunks, (x, mask, partial))
    for row in range(rows):
        maxima[row] = _slice.maximum(partial, row * chunks, (row + 1) * chunks)
    return maxima


@jit
def chunk_maximum(task, part, x, mask, partial):
    """Maximum of a chunk."""
    entries = entries_of(x, mask)
    _, start, stop, _ = chunk_of(task, x, entries)
    partial[task] = _slice.maximum(entries, start, stop)


@Kernel
def long_sums(team, parts, x, mask, temperature, maxima, exact):
    """Sums of each row."""
    like, rows = pointer(x), len(x)
    chunks = chunk_count(x.shape[1], like)
    partial = workspace(rows * chunks * 4, like)
    arguments = x, mask, temperature, maxima, exact, partial
    each_task(chunk_sums, team, parts, rows * chunks, arguments)
    sums = workspace(rows * 4, like)
    for row in range(rows):
        merged = first_of(no_sums(maxima[row], exact))
        for task in range(row * chunks, (row + 1) * chunks):
            merged = add_sums(merged, get_sums(partial, 4 * task, 1, exact))
        put_sums(sums, 4 * row, 1, closed(merged))
    return sums


@jit
def chunk_sums(task, part, x, mask, temperature, maxima, exact, partial):
    """Sums of a chunk."""
    entries = entries_of(x, mask)
    row, start, stop, soon = chunk_of(task, x, entries)
    rate = rate_at(temperature, row, maxima[row])
    sums = _slice.sums_of_slice(entries, start, stop, maxima[row], rate, exact, None, 0, soon)
    put_sums(partial, 4 * task, 1, sums)


# Sums of slices are kept in arrays (outer, 4, inner), those of rows in (rows, 4): flat, as kernels take them.


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


@Kernel
def long_write(team, parts, x, mask, temperature, maxima, sums, exact, out):
    """Write the softmax of each row, or its logarithm if the sums are exact."""
    chunks = len(x) * chunk_count(x.shape[1], pointer(x))
    each_task(write_chunk, team, parts, chunks, (x, mask, temperature, maxima, sums, exact, out))


@jit
def write_chunk(task, part, x, mask, temperature, maxima, sums, exact, out):
    """Write a chunk."""
    entries, results = entries_of(x, mask), pointer(out)
    row, start, stop, soon = chunk_of(task, x, entries)
    rate, far, own = rate_at(temperature, row, maxima[row]), is_far(x, out), get_sums(sums, 4 * row, 1, None)
    shift = row * (x.shape[1] - row_step(x))
    _slice.write_slice(entries, start, stop, maxima[row], rate, own, exact, results, shift, far, soon)


@jit
def is_far(x, out):
    """Whether a result is too long for the caches, and not in place: what was just read they have."""
    return out.size * out.itemsize >= FAR_BYTES and out.ctypes.data != x.ctypes.data


@kernel
def long_values(x, mask, temperature, maxima, sums, out, weighted):
    """Logsumexp of each row from its sums, or entropy unless ``weighted`` is None."""
    rows, n = x.shape
    for row in range(rows):
        own, entries = temperature_at(temperature, row), entries_of(x, mask)
        beside = get_sums(sums, 4 * row, 1, (weighted,))
        beside = sums_apart(beside, maxima[row], rate_of(own, maxima[row]), (weighted,))
        value = _slice.value_of_sums(entries, row * row_step(x), 1, n, maxima[row], own, beside, weighted)
        put(pointer(out), row, value)


def softmax_long_rows(parts, x, mask, temperature, out):
    """Softmax of rows that all threads share."""
    maxima = long_maxima(parts, x, mask)
    sums = long_sums(parts, x, mask, temperature, maxima, None)
    long_write(parts, x, mask, temperature, maxima, sums, None, out)


def log_softmax_long_rows(parts, x, mask, temperature, out):
    """Logarithm of the softmax of rows that all threads share."""
    maxima = long_maxima(parts, x, mask)
    sums = long_sums(parts, x, mask, temperature, maxima, (None,))
    long_write(parts, x, mask, temperature, maxima, sums, (None,), out)


def value_long_rows(parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of rows that all threads share."""
    maxima = long_maxima(parts, x, mask)
    sums = long_sums(parts, x, mask, temperature, maxima, (weighted,))
    long_values(x, mask, temperature, maxima, sums, out, weighted)


# -- columns --------------------------------------------------------------------------------------
# A tile of columns is copied into working memory, where each vector of columns is contiguous: the passes of
# a slice then take a column in each lane. Where it lies, lines of a tile are often a power of two apart, of
# which a cache keeps no more than eight. Numbers for each column, their fields, stand before the tile.
# Threads take turns in tiles of few outer indices: the lines of neighbours share pages of memory.

# Fields of a column: those of Scale and Guard, or of Gap and Guard, and a normalizer.
_GUARD = 6
_NORMALIZER = 11
FIELDS = 13


Tiles = namedtuple("Tiles", "width count lack far new shares distance")
Tiles.__doc__ = """How columns are cut into tiles.

So many columns wide, so many side by side; by how many columns the first is narrower; whether results are
written past the caches, and may lie in new memory; in how many shares the threads take tiles, and by how many
columns the next one that a thread may take is further on.
"""

Tile = namedtuple("Tile", "count source base number following further by")
Tile.__doc__ = """A tile of columns.

Its number of columns; where its first entry stands, and its first result; its first slice; where the next
tile that a thread may take begins; and the two `steps_ahead`.
"""


@traced
def field(quantity, j, width):
    """Where a field of the columns from j on stands."""
    return quantity * width + j


@jit
def tile_width(n, inner, takers, far, like):
    """Columns of a tile: whole lanes that fit the tile's bytes, and tiles for all takers of neighbours.

    The rows of a tile of few are long, and the next tile is fetched while terms are computed: the second
    cache has room for both and for results. In 2 MB 100 x 10000 float32 takes 0.7 of the time for it,
    300 x 30000 1.6 times as long.
    """
    lanes = lane_count(like)
    fit = TILE_BYTES // (n * lanes * like.itemsize)
    share = -(-inner // (lanes * takers))
    row = AHEAD_BYTES // LANE_BYTES
    if far or n > SECOND_CACHE_BYTES // (4 * AHEAD_BYTES):
        row //= 2
    return lanes * max(1, min(fit, share, row))


@jit
def rows_ahead(count, work):
    """How many rows of so many columns are fetched ahead."""
    return AHEAD_BYTES // (count * (LANE_BYTES // lane_count(work)))


@jit
def steps_ahead(count, work):
    """How many rows of a tile are fetched ahead, and whether rows of the next tile are instead: 1 or 0."""
    rows = rows_ahead(count, work)
    return (0, 1) if rows <= 1 else (rows, 0)


@jit
def next_tile(first, distance, inner):
    """First column of the tile so many columns further on; if there is none beside it, the tile itself."""
    return first + distance if first + distance < inner else max(first, 0)


@jit
def are_far_columns(x, out):
    """Whether columns are written past the caches, by lines: of more than a few rows that begin alike."""
    n, inner = out.shape[1:]
    return n > FEW_FAR_ROWS and inner * out.itemsize % LINE_BYTES == 0 and is_far(x, out)


@jit
def tiles_of(x, out, parts):
    """How columns are cut into tiles; out is None if no results of their shape are written.

    The first tile is narrower if columns are far, so that the others begin a line: it has those before the
    first line alone, which are fewer than lanes.
    """
    n, inner = x.shape[1:]
    like = pointer(x)
    far = new = False
    lead = 0
    if out is not None:
        far, new = are_far_columns(x, out), is_new(pointer(out), out.size)
        lead = to_stream(pointer(out), 0) if far else 0
    shares = shares_of(len(x), parts)
    takers = parts // shares
    width = tile_width(n, inner, takers, far, workspace(1, like))
    lack = width - lead if lead > 0 else 0
    return Tiles(width, -(-(inner + lack) // width), lack, far, new, shares, takers * width)


@jit
def shares_of(outer, parts):
    """Shares of tiles: one, of which threads take neighbours in turn, or of the outer axis one for each."""
    return 1 if outer < MANY * parts else parts


@jit
def begin_tile(task, tiles, x, mask, out, work):
    """Copy the tile of a task to working memory."""
    tile, at = tile_of(task, tiles, x, out, work), FIELDS * tiles.width
    pack(entries_of(x, mask), tile.source, pitch(x, 1), x.shape[1], tile.count, work, at, tile.further)
    return tile


@jit
def tile_of(task, tiles, x, out, work):
    """Tile of a task, whose results, if any, are touched where they lie in new memory."""
    n, inner = x.shape[1:]
    i, first = task // tiles.count, task % tiles.count * tiles.width - tiles.lack
    following = place(x, i, 0, next_tile(first, tiles.distance, inner))
    first, count = max(first, 0), min(first + tiles.width, inner) - max(first, 0)
    base = i * n * inner + first
    further, by = steps_ahead(count, work)
    if out is not None:
        if tiles.new:
            touch_rows(pointer(out), base, inner, n, count)
    return Tile(count, place(x, i, 0, first), base, i * inner + first, following, further, by)


@jit
def write_far_or_ahead(out, i, count, value, ahead, far):
    """Write lanes, or the first ``count``, past the caches if they are far; else fetch what comes later."""
    if far and count >= lane_count(out):
        stream(out, i, value)
    else:
        prefetch_to_write(out, ahead)
        write(out, i, count, value)


@jit
def pack(x, base, step, n, count, work, at, further):
    """Copy n rows of ``count`` columns to working memory, vector by vector of columns."""
    lanes = lane_count(work)
    zero = spread(0.0, work)
    for i in range(n):
        row, to = base + i * step, at + i * lanes
        ahead = row + min(further, n - 1 - i) * step
        for j in range(0, count, lanes):
            prefetch_to_read(x, ahead + j)
            store(work, to + j * n, read(x, row + j, count - j, zero))


@jit
def touch_rows(out, base, inner, n, count):
    """`touch` n rows of ``count`` columns, if any, unless many tiles share their pages."""
    if out is None:
        return
    if count // lane_count(out) * LANE_BYTES > PAGE_BYTES // 2:
        for i in range(n):
            touch(out, base + i * inner, base + i * inner + count)


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
_OF_SCALES = 1, 2, _GUARD, _GUARD + 1, _GUARD + 2, _GUARD + 3
_OF_GAPS = 1, _GUARD, _GUARD + 1, _GUARD + 3


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
    write_selected(other, guard._replace(plain=spread(0.0, none.plain)), none, _GUARD, work, j, width)


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
    return Guard(*(load(work, field(_GUARD + i, j, width)) for i in range(len(Guard._fields))))


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
    own_inverse, own_prescale = load(work, field(1, j, width)), load(work, field(_GUARD, j, width))
    own_factor, own_cutoff = load(work, field(_GUARD + 1, j, width)), load(work, field(_GUARD + 3, j, width))
    gap, guard = bounded_gap(row_max, own_inverse, own_prescale, own_factor, own_cutoff, log_sum)
    write_selected(other, gap, plain, 0, work, j, width)
    write_guards(guard, other, work, j, width)


@traced
def read_gap(work, j, width):
    """Gaps of the columns from j on."""
    return Gap(*(load(work, field(i, j, width)) for i in range(len(Gap._fields))))


@traced
def write_normalizers(sums, work, j, width):
    """Write the normalizers of columns."""
    high, low = normalizer(*sums)
    store(work, field(_NORMALIZER, j, width), high)
    store(work, field(_NORMALIZER + 1, j, width), low)


@traced
def normalized(term, work, j, width):
    """Probabilities of the columns from j on."""
    high, low = field(_NORMALIZER, j, width), field(_NORMALIZER + 1, j, width)
    return probability(term, load(work, high), load(work, low))


@jit
def column_sums(work, at, n, scale, guard, exact, stored, soon):
    """Sums of the terms of columns.

    Terms take the place of the entries, unless ``stored`` is None: else it is the working memory.
    """
    lanes = lane_count(work)
    zero = spread(0.0, work)
    sums = first_of(no_sums(zero, exact))
    for start in range(0, n, CHUNK):
        first, last = at + start * lanes, at + min(n, start + CHUNK) * lanes
        ahead = later(soon, start)
        part = lane_sums(work, first, last, scale, guard, exact, stored, first, ahead, zero)
        sums = add_sums(sums, part)
    return closed(sums)


@jit(forceinline=True)
def tile_sums(work, at, n, row_max, temperature, first, rates, exact, stored, j, width, soon):
    """`column_sums` at the temperatures of rates."""
    scale = scale_of(row_max, rates, exact)
    if are_plain(row_max, rates):
        return column_sums(work, at, n, scale, None, exact, stored, soon)
    scale, guard = mixed_scales(row_max, scale, rates, temperature, first, work, j, width)
    return column_sums(work, at, n, scale, guard, exact, stored, soon)


@jit(inline="always")
def write_columns(team, parts, x, mask, temperature, exact, out):
    """Write the softmax of columns that fit a tile, or its logarithm if the sums are to be exact."""
    tiles, like = tiles_of(x, out, parts), pointer(x)
    work = workspaces(parts, (FIELDS + x.shape[1]) * tiles.width, like)
    arguments = tiles, x, mask, temperature, first_rate(temperature, like), exact, out, work
    each_task(write_tile, team, parts, len(x) * tiles.count, arguments, tiles.shares)


@Kernel
def softmax_columns(team, parts, x, mask, temperature, out):
    """Softmax of columns that fit a tile."""
    write_columns(team, parts, x, mask, temperature, None, out)


@Kernel
def log_softmax_columns(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of columns that fit a tile."""
    write_columns(team, parts, x, mask, temperature, (None,), out)


@jit
def write_tile(task, part, tiles, x, mask, temperature, rate, exact, out, work):
    """Write the softmax of a tile, or its logarithm if the sums are to be exact."""
    (n, inner), step = x.shape[1:], pitch(x, 1)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    lanes, width = lane_count(w), tiles.width
    tile, at_first, plain = begin_tile(task, tiles, x, mask, out, w), FIELDS * width, True
    for j in range(0, tile.count, lanes):
        at, number = at_first + j * n, tile.number + j
        row_max = lane_maxima(w, at, at + n * lanes)
        soon = Soon(entries, tile.following + j, tile.by * step, results, tile.base + j, tile.by * inner)
        rates = lane_rates(temperature, number, tile.count - j, rate, w)
        stored = kept_terms(w, exact)
        sums = tile_sums(w, at, n, row_max, temperature, number, rates, exact, stored, j, width, soon)
        if exact is None:
            write_normalizers(sums, w, j, width)
        else:
            log_sum = log_of_sum(row_max, sums_apart(sums, row_max, rates, exact))
            write_gaps(row_max, rates, spread(log_sum, row_max), temperature, number, w, j, width)
            plain = plain and are_plain(row_max, rates)
    for k in range(n):
        row, at = tile.base + k * inner, at_first + k * lanes
        ahead = row + min(tile.further, n - 1 - k) * inner
        write_row(entries, results, row, w, at, n, tile.count, width, plain, exact, ahead, tiles.far)
    if tiles.far:
        settle()


@jit
def write_row(x, out, row, work, at, n, count, width, plain, exact, ahead, far):
    """Write a row of a tile, and fetch what is written later unless it is far."""
    lanes, zero = lane_count(work), spread(0.0, work)
    absent = zero if exact is None else spread(-math.inf, zero)
    for j in range(0, count, lanes):
        value = load(work, at + j * n)
        if exact is None:
            value = normalized(value, work, j, width)
        else:
            value = log_value(value, work, j, width, plain)
        value = present(x, row + j, count - j, value, absent)
        write_far_or_ahead(out, row + j, count - j, value, ahead + j, far)


@jit
def log_value(x, work, j, width, plain):
    """Logarithms of the softmax of columns from j on, all of them plain or some not."""
    if plain:
        return log_terms(x, read_gap(work, j, width), None)
    return log_terms(x, read_gap(work, j, width), read_guard(work, j, width))


@Kernel
def softmax_shallow_columns(team, parts, x, mask, temperature, out):
    """Softmax of shallow columns."""
    tiles, like = tiles_of(x, out, parts), pointer(x)
    work = workspaces(parts, (FIELDS + x.shape[1]) * lane_count(like), like)
    arguments = tiles, x, mask, temperature, first_rate(temperature, like), out, work
    each_task(softmax_shallow_tile, team, parts, len(x) * tiles.count, arguments, tiles.shares)


@jit
def softmax_shallow_tile(task, part, tiles, x, mask, temperature, rate, out, work):
    """Softmax of a tile of shallow columns, vector by vector: each is in the first cache until it is written.

    The sums of plain ones are written out here: a function for them makes it take 1.05 times as long.
    """
    (n, inner), step = x.shape[1:], pitch(x, 1)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    lanes, zero = lane_count(w), spread(0.0, w)
    tile, at = tile_of(task, tiles, x, out, w), FIELDS * lanes
    for j in range(0, tile.count, lanes):
        number, count = tile.number + j, tile.count - j
        row_max = pack_vector(entries, tile, j, n, step, w, at)
        soon = Soon(entries, tile.following + j, step, results, tile.base + j, inner)
        rates = lane_rates(temperature, number, count, rate, w)
        scale, sums = ratio_scale(row_max, rates), start_of_sums(zero, None)
        if are_plain(row_max, rates):
            for k in range(n):
                fetch(soon, k)
                sums, term = add_terms(sums, load(w, at + k * lanes), 0, scale, None, None)
                store(w, at + k * lanes, term)
            total, error = end_of_sums(sums, zero, zero, None)
        else:
            scale, guard = mixed_scales(row_max, scale, rates, temperature, number, w, 0, lanes)
            total, error = column_sums(w, at, n, scale, guard, None, w, soon)
        high, low = normalizer(total, error)
        for k in range(n):
            row, value = tile.base + k * inner + j, probability(load(w, at + k * lanes), high, low)
            write(results, row, count, present(entries, row, count, value, zero))


@jit
def pack_vector(x, tile, j, n, step, work, at):
    """Copy the columns of a tile from j on to working memory, return their maxima, and fetch the next."""
    lanes, zero = lane_count(work), spread(0.0, work)
    row_max, following = -spread(math.inf, work), min(j + lanes, tile.count - 1)
    for k in range(n):
        row = tile.source + k * step
        prefetch_to_read(x, row + following)
        entries = read(x, row + j, tile.count - j, zero)
        row_max = larger(entries, row_max)
        store(work, at + k * lanes, entries)
    return row_max


@traced
def write_beside(row_max, sums, work, j, width):
    """Write maxima, and what sums have beside them, to the first fields."""
    store(work, field(0, j, width), row_max)
    for quantity, value in enumerate(sums):
        store(work, field(1 + quantity, j, width), value)


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


@Kernel
def value_columns(team, parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of columns that fit a tile."""
    tiles, like = tiles_of(x, None, parts), pointer(x)
    work = workspaces(parts, (FIELDS + x.shape[1]) * tiles.width, like)
    arguments = tiles, x, mask, temperature, first_rate(temperature, like), out, weighted, work
    each_task(value_tile, team, parts, len(x) * tiles.count, arguments, tiles.shares)


@jit
def value_tile(task, part, tiles, x, mask, temperature, rate, out, weighted, work):
    """`value_columns` of a tile of columns."""
    n, step = x.shape[1], pitch(x, 1)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    lanes, width, exact = lane_count(w), tiles.width, (weighted,)
    tile, at_first = begin_tile(task, tiles, x, mask, None, w), FIELDS * width
    for j in range(0, tile.count, lanes):
        at, number = at_first + j * n, tile.number + j
        row_max = lane_maxima(w, at, at + n * lanes)
        soon = Soon(entries, tile.following + j, tile.by * step, None, 0, 0)
        rates = lane_rates(temperature, number, tile.count - j, rate, w)
        sums = tile_sums(w, at, n, row_max, temperature, number, rates, exact, None, j, width, soon)
        sums = sums_apart(sums, row_max, rates, exact)
        if are_plain(row_max, rates) and shows_all(row_max, rates.temperature, sums, weighted):
            value = plain_value(row_max, rates.temperature, sums, weighted)
            write(results, number, tile.count - j, value)
            continue
        write_beside(row_max, sums, w, j, width)
        for k in range(min(lanes, tile.count - j)):
            top, sums = get(w, field(0, j + k, width)), get_sums(w, field(1, j + k, width), width, exact)
            own, first = temperature_at(temperature, number + k), tile.source + j + k
            value = _slice.value_of_sums(entries, first, step, n, top, own, sums, weighted)
            put(results, number + k, value)


# -- long columns: chunks of rows, of which each thread takes some -----------------------------------
# Each row of a strip is in another page of memory: to fetch rows ahead in all three passes makes 20000 x 1000
# take 0.85 of the time, log_softmax 0.8. Strips of twice as many columns take as long.
#
# Numbers for each column are arrays (outer, chunks, inner), or (outer, inner) when the chunks are merged. The
# rows of x may lie apart, as those of an array that was cut out of another do, if there is no mask.


@jit
def strip_of(task, shape, width):
    """Outer index, chunk, its rows, and first column and number of columns of the strip of a task."""
    _, n, inner = shape
    chunks, strips = -(-n // CHUNK), -(-inner // width)
    chunk = task // strips % chunks
    first = task % strips * width
    rows = min(CHUNK, n - chunk * CHUNK)
    return task // strips // chunks, chunk, rows, first, min(width, inner - first)


@jit
def strip_width(inner, like):
    """Columns of a strip: at most eight vectors."""
    lanes = lane_count(like)
    return min(8 * lanes, -(-inner // lanes) * lanes)


@traced
def strip_count(shape, width):
    """Number of strips."""
    outer, n, inner = shape
    return outer * -(-n // CHUNK) * -(-inner // width)


@jit
def strip_maxima(task, x, mask, partial, width):
    """Maxima of each column over the rows of a strip."""
    i, chunk, rows, first, count = strip_of(task, x.shape, width)
    n, inner = x.shape[1:]
    to = (i * -(-n // CHUNK) + chunk) * inner + first
    start = place(x, i, chunk * CHUNK, first)
    column_maxima(entries_of(x, mask), start, pitch(x, 1), rows, count, partial, to)


@traced
def merge_maxima(partial, i, chunks, inner, maxima):
    """Merge the maxima of all chunks of some columns."""
    column_maxima(pointer(partial), i * chunks * inner, inner, chunks, inner, maxima, i * inner)


@jit
def column_maxima(entries, start, step, rows, count, out, to):
    """Maximum of each column over some rows, from one to the next so many entries apart."""
    further = rows_ahead(count, out)
    zero, lowest = spread(0.0, out), spread(-math.inf, out)
    results, lanes = pointer(out), lane_count(out)
    for j in range(0, count, lanes):
        write(results, to + j, count - j, lowest)
    for i in range(rows):
        row = start + i * step
        ahead = row + min(further, rows - 1 - i) * step
        for j in range(0, count, lanes):
            prefetch_to_read(entries, ahead + j)
            value = larger(read(entries, row + j, count - j, zero), read(results, to + j, count - j, zero))
            write(results, to + j, count - j, value)


@jit(inline="always")
def tall_passes(team, parts, x, mask, temperature, exact, out):
    """Maxima and sums of long columns, which are returned, and results unless ``out`` is None."""
    outer, n, inner = x.shape
    like, chunks = pointer(x), -(-n // CHUNK)
    width = strip_width(inner, like)
    partial = workspace(outer * chunks * 4 * inner, like)
    maxima, sums = workspace(outer * inner, like), workspace(outer * 4 * inner, like)
    work = workspaces(parts, (FIELDS + CHUNK) * width, like)
    rate, count = first_rate(temperature, like), strip_count(x.shape, width)
    numbers = maxima, sums, partial, width, work
    for step in range(2 if out is None else 3):
        arguments = step, x, mask, temperature, rate, exact, out, numbers
        each_task(pass_over_strip, team, parts, count, arguments)
        for i in range(outer):
            if step == 0:
                merge_maxima(partial, i, chunks, inner, maxima)
            elif step == 1:
                merge_strips(partial, i, chunks, inner, exact, sums)
    return maxima, sums


@Kernel
def tall_softmax(team, parts, x, mask, temperature, out):
    """Softmax of long columns, in three passes that are compiled as one."""
    tall_passes(team, parts, x, mask, temperature, None, out)


@Kernel
def tall_log_softmax(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of long columns."""
    tall_passes(team, parts, x, mask, temperature, (None,), out)


@Kernel
def tall_sums(team, parts, x, mask, temperature, exact):
    """Maxima, an array (outer, inner), and sums, (outer, 4, inner), of columns; both flat."""
    return tall_passes(team, parts, x, mask, temperature, exact, None)


@jit
def pass_over_strip(task, part, step, x, mask, temperature, rate, exact, out, numbers):
    """One pass over a strip."""
    maxima, sums, partial, width, work = numbers
    if step == 0:
        strip_maxima(task, x, mask, partial, width)
    elif step == 1:
        strip_sums(task, part, x, mask, temperature, rate, maxima, partial, exact, width, work)
    elif out is not None:
        write_strip(task, part, x, mask, temperature, rate, maxima, sums, exact, out, width, work)


@jit
def strip_sums(task, part, x, mask, temperature, rate, maxima, partial, exact, width, work):
    """Sums of each column over the rows of a strip."""
    zero = spread(0.0, maxima)
    i, chunk, rows, first, count = strip_of(task, x.shape, width)
    n, inner = x.shape[1:]
    w, lanes = pointer(part_of(work, part)), lane_count(work)
    tile = FIELDS * width
    start, step = place(x, i, chunk * CHUNK, first), pitch(x, 1)
    further, _ = steps_ahead(count, work)
    pack(entries_of(x, mask), start, step, rows, count, w, tile, further)
    for j in range(0, count, lanes):
        at, column = tile + j * rows, i * inner + first + j
        row_max = read(pointer(maxima), column, count - j, zero)
        rates = lane_rates(temperature, column, count - j, rate, w)
        sums = tile_sums(w, at, rows, row_max, temperature, column, rates, exact, None, j, width, None)
        to = (i * -(-n // CHUNK) + chunk) * 4 * inner + first + j
        write_sums(partial, to, inner, count - j, sums)


@jit
def merge_strips(partial, i, chunks, inner, exact, sums):
    """Merge the sums of all chunks of some columns."""
    for j in range(0, inner, lane_count(sums)):
        merged = first_of(no_sums(spread(0.0, sums), exact))
        for chunk in range(chunks):
            part = read_sums(partial, (i * chunks + chunk) * 4 * inner + j, inner, exact)
            merged = add_sums(merged, part)
        write_sums(sums, i * 4 * inner + j, inner, inner - j, closed(merged))


@Kernel
def tall_write(team, parts, x, mask, temperature, maxima, sums, exact, out):
    """Write the softmax of columns, or its logarithm if sums are exact: the last pass alone."""
    width = strip_width(x.shape[2], maxima)
    work = workspaces(parts, FIELDS * width, maxima)
    rate = first_rate(temperature, maxima)
    arguments = x, mask, temperature, rate, maxima, sums, exact, out, width, work
    each_task(write_strip, team, parts, strip_count(x.shape, width), arguments)


@jit
def write_strip(task, part, x, mask, temperature, rate, maxima, sums, exact, out, width, work):
    """Write the softmax of a strip, or its logarithm if sums are exact."""
    zero = spread(0.0, maxima)
    i, chunk, rows, first, count = strip_of(task, x.shape, width)
    n, inner = x.shape[1:]
    entries, results, lanes = entries_of(x, mask), pointer(out), lane_count(work)
    start, step = place(x, i, chunk * CHUNK, first), pitch(x, 1)
    w, base = pointer(part_of(work, part)), (i * n + chunk * CHUNK) * inner + first
    further, plain = rows_ahead(count, w), True
    for j in range(0, count, lanes):
        column = i * inner + first + j
        row_max = read(pointer(maxima), column, count - j, zero)
        rates = lane_rates(temperature, column, count - j, rate, w)
        plain = plain and are_plain(row_max, rates)
        own = read_sums(sums, i * 4 * inner + first + j, inner, None)
        if exact is None:
            write_scales(row_max, ratio_scale(row_max, rates), rates, temperature, column, w, j, width)
            write_normalizers(own, w, j, width)
        else:
            log_sum = spread(log_of_sum(row_max, sums_apart(own, row_max, rates, exact)), row_max)
            write_gaps(row_max, rates, log_sum, temperature, column, w, j, width)
    absent = zero if exact is None else spread(-math.inf, zero)
    for k in range(rows):
        row, to = start + k * step, base + k * inner
        ahead = min(further, rows - 1 - k)
        for j in range(0, count, lanes):
            prefetch_to_read(entries, row + ahead * step + j)
            prefetch_to_write(results, to + ahead * inner + j)
            value = strip_value(read(entries, row + j, count - j, zero), w, j, width, plain, exact)
            write(results, to + j, count - j, present(entries, row + j, count - j, value, absent))


@jit
def strip_value(x, work, j, width, plain, exact):
    """Probabilities of entries of the columns from j on, or their logarithms if the sums are exact."""
    if exact is not None:
        return log_value(x, work, j, width, plain)
    scale = read_scale(work, j, width)
    if plain:
        power, excess = ratio_terms(x, scale, None)
    else:
        power, excess = ratio_terms(x, scale, read_guard(work, j, width))
    return normalized(term_of(power, excess), work, j, width)


@kernel
def tall_values(x, mask, temperature, maxima, sums, out, weighted):
    """Logsumexp of each column from its sums, or entropy unless ``weighted`` is None."""
    outer, n, inner = x.shape
    entries = entries_of(x, mask)
    for column in range(outer * inner):
        i, k = column // inner, column % inner
        own, top = temperature_at(temperature, column), maxima[column]
        beside = get_sums(sums, i * 4 * inner + k, inner, (weighted,))
        beside = sums_apart(beside, top, rate_of(own, top), (weighted,))
        value = _slice.value_of_sums(entries, place(x, i, 0, k), pitch(x, 1), n, top, own, beside, weighted)
        put(pointer(out), column, value)


def value_tall_columns(parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of columns that all threads share."""
    maxima, sums = tall_sums(parts, x, mask, temperature, (weighted,))
    tall_values(x, mask, temperature, maxima, sums, out, weighted)


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

Schedules = namedtuple(
    "Schedules", "narrow_rows rows wide_rows long_rows shallow_columns columns tall_columns"
)

_SOFTMAX = Schedules(
    softmax_narrow_rows,
    softmax_rows,
    softmax_wide_rows,
    softmax_long_rows,
    softmax_shallow_columns,
    softmax_columns,
    tall_softmax,
)
_LOG_SOFTMAX = Schedules(
    log_softmax_narrow_rows,
    log_softmax_rows,
    log_softmax_wide_rows,
    log_softmax_long_rows,
    log_softmax_columns,
    log_softmax_columns,
    tall_log_softmax,
)
_VALUES = Schedules(
    value_narrow_rows,
    value_rows,
    value_wide_rows,
    value_long_rows,
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
    key = schedules, x.shape, x.itemsize, len(temperature)
    schedule, is_large, parts = _choice(*key, 1)
    if is_large and (usable := _process.usable_threads()) > 1:
        schedule, _, parts = _choice(*key, usable)
    schedule(parts, x, mask, temperature, out, *options)


@functools.lru_cache(maxsize=256)
def _choice(schedules, shape, itemsize, temperatures, threads):
    """Schedule for a shape, whether it is worth so many threads, and a part for each that has work.

    To choose anew takes 2 us.
    """
    outer, n = shape[:2]
    slices = max(outer, temperatures)
    if len(shape) == 3:
        is_large = max(math.prod(shape), slices * n) >= PARALLEL_COLUMNS
        if n > TALL:
            return schedules.tall_columns, is_large, threads
        if n <= SHALLOW:
            return schedules.shallow_columns, is_large, threads
        return schedules.columns, is_large, threads
    size, lanes = slices * n, LANE_BYTES // max(itemsize, 4)
    if n < lanes or (slices > 1 and n <= CHUNK * lanes):
        schedule = schedules.narrow_rows if _is_narrow(n, lanes) else schedules.rows
        return schedule, size >= PARALLEL_ROWS, min(threads, slices)
    if slices > outer or (n * itemsize <= STORED_BYTES and slices >= 10 * threads):
        return schedules.wide_rows, size >= PARALLEL_SLICE, min(threads, slices)
    return schedules.long_rows, size >= PARALLEL_SLICE, threads


def _is_narrow(n, lanes):
    """Whether rows take less time as narrow ones.

    A row takes as long as 0.65 vectors more than it fills, a narrow one 1.4 times its vectors. With AVX2 on
    Zen 1 63 float32 took 144 ns as a narrow row and 149 as a row, 64 as long, 65 149 and 200, 96 210 and 193,
    float64 alike. With AVX-512 on an Emerald Rapids softmax of 40 float32 takes 0.74 of the time as narrow
    rows, 56 0.97, 63 1.1, 65 0.85, 80 1.0 and 96 1.2, log_softmax and logsumexp alike; entropy takes 0.65 to
    1 up to 159, which would be a rule of its own for a tenth.

    Both give the same bits from one vector on, where `lane_sums` takes lanes of a register, too, and below
    five, where softmax has one block.
    """
    return n < lanes or 1.4 * n < (-(-n // lanes) + 0.65) * lanes
