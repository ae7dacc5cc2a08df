"""Schedules for rows: slices whose entries are neighbours in memory.

Arrays come as (outer, n), see `_cpu`. Schedules:

- narrow rows: a thread takes as many as there are lanes, and gives each lane one;
- rows: a thread takes whole slices of at most a chunk, several short ones at a time;
- wide rows: a thread takes whole slices of more than a chunk; one row may meet many temperatures;
- long rows: too long for a core's cache, or too few to keep the threads busy; all threads share each row.
"""

import functools
import math

from fastmax import _slice
from fastmax._jit import jit, kernel, plain_kernel
from fastmax._lanes import (
    LANE_BYTES,
    REGISTER_BYTES,
    REGISTERS,
    SECOND_CACHE_BYTES,
    entries_of,
    get,
    is_as_wide,
    lane_count,
    load,
    piece_size,
    piece_zeros,
    pointer,
    prefetch_to_write,
    put,
    read,
    read_pieces,
    register_zeros,
    spread,
    store,
    touch,
    workspace,
    write,
    write_pieces,
)
from fastmax._math import (
    Gap,
    Scale,
    guarded_gap,
    guarded_scale,
    log_of_sum,
    log_terms,
    merge_sums,
    normalizer,
    plain_gap,
    probability,
    rate_of,
    ratio_scale,
)
from fastmax._slice import (
    AHEAD,
    CHUNK,
    QUANTITIES,
    Soon,
    add_terms,
    end_of_sums,
    fetch,
    further_on,
    get_sums,
    is_new,
    kept_terms,
    lane_maxima,
    lane_sums,
    load_all,
    maxima_of,
    register_maxima,
    scale_of,
    start_of_sums,
    store_all,
    sums_apart,
    sums_of,
    touch_new,
)
from fastmax._threads import Kernel, each_span, each_task
from fastmax._tiles import (
    FIELDS,
    are_plain,
    first_rate,
    is_far,
    lane_rates,
    merge_chunks,
    merge_tiles,
    mixed_scales,
    padded_size,
    part_of,
    plain_value,
    put_sums,
    rate_at,
    read_gap,
    read_guard,
    row_step,
    shows_all,
    temperature_at,
    value_beside,
    workspaces,
    write_beside,
    write_ends,
)
from fastmax._tracing import traced

# Bytes of the rows that a thread takes at a time: they, their terms and their results fit the second cache.
# What is done for a group at once takes 800 cycles on a Zen 3, and 1500 for logarithms, for two rows as for
# eight: with a quarter of this 8192 x 1000 float32 takes 1.06 times as long, log_softmax 1.19 and logsumexp
# 1.26; with twice as many bytes float64 takes 1.05.
GROUP_BYTES = 2**15

# Bytes of a row up to which a thread keeps its terms, in the second or third cache, until they are scaled:
# where the results will be, if those have as many bits.
STORED_BYTES = 2**21


# -- rows -----------------------------------------------------------------------------------------
# Rows of at most one chunk are taken in groups, at most one row for each lane. What the lanes of a register
# have found and summed up is kept side by side for each row and quantity, and merged for all rows of a group
# at once, in a fifth of the instructions.

# Vectors in the working memory beside those of the sums, with one row in each lane: maxima, normalizers as
# high and low (or inverse and summand of a gap), the largest maximum of a plain row, and the fields of a
# scale, which all rows of a group get at once.
_MAXIMA, _HIGH, _LOW, _LIMIT, _SCALE = range(5)
_VECTORS = _SCALE + len(Scale._fields) - 1


@jit
def group_size(rows, n, parts, like):
    """Number of rows in a group: where threads share the rows, few enough for four groups in each part."""
    lanes = lane_count(like)
    fitting = GROUP_BYTES // LANE_BYTES // (padded_size(n, like) // lanes)
    share = rows if parts == 1 else -(-rows // (4 * parts))
    return min(lanes, share, max(1, fitting))


@traced
def group_count(rows, size):
    """Number of groups that so many rows make."""
    return -(-rows // size)


@traced
def row_work_size(n, size, like):
    """Entries of working memory for a group of rows: vectors, sums of each row, and terms."""
    lanes = lane_count(like)
    return (_VECTORS + QUANTITIES * lanes // REGISTERS) * lanes + size * padded_size(n, like)


@traced
def sums_at(work, quantity):
    """Where the sums of a quantity stand in working memory."""
    lanes = lane_count(work)
    return (_VECTORS + quantity * lanes // REGISTERS) * lanes


@traced
def sums_step(work):
    """Entries of working memory from the sums of one quantity to those of the next."""
    return sums_at(work, 1) - sums_at(work, 0)


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
    zero, terms = register_zeros(work), sums_at(work, QUANTITIES)
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
        store_all(work, sums_at(work, 0) + r * lanes // REGISTERS, sums_step(work), sums)
    sums_of(work, sums_at(work, 0), sums_step(work), count, exact)


@traced
def sums_of_group(work, exact):
    """Sums of all rows of a group, one in each lane."""
    return load_all(work, sums_at(work, 0), sums_step(work), exact)


@Kernel
def softmax_rows(team, parts, x, mask, temperature, out):
    """Softmax of rows of at most one chunk."""
    (rows, n), like = out.shape, pointer(x)
    size = group_size(rows, n, parts, like)
    work = workspaces(parts, row_work_size(n, size, like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, size, work
    each_span(softmax_groups, team, parts, group_count(rows, size), arguments)


@jit
def softmax_groups(first, stop, part, x, mask, temperature, rate, out, size, work):
    """Softmax of some groups of rows."""
    n, step = out.shape[1], row_step(x)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    lanes = lane_count(w)
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
        terms = sums_at(w, QUANTITIES)
        for r in range(count):
            row = (start + r) * step
            high, low = get(w, _HIGH * lanes + r), get(w, _LOW * lanes + r)
            shift = (start + r) * n - row
            if mask is None or not (is_plain_at(w, r) and high == high):
                _slice.scale_stored(w, terms, entries, row, row + n, high, low, results, shift)
            else:
                # What is masked has the term of -inf, which does not show: with AVX2 8192 x 1000 takes 0.82
                # (float32) or 0.87 of the time for it.
                _slice.scale_stored(w, terms, pointer(x), row, row + n, high, low, results, shift)
            terms += padded_size(n, w)


@Kernel
def log_softmax_rows(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of rows of at most one chunk."""
    (rows, n), like = out.shape, pointer(x)
    size = group_size(rows, n, parts, like)
    work = workspaces(parts, row_work_size(n, size, like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, size, work
    each_span(log_softmax_groups, team, parts, group_count(rows, size), arguments)


@jit
def log_softmax_groups(first, stop, part, x, mask, temperature, rate, out, size, work):
    """Logarithm of the softmax of some groups of rows."""
    n, step = out.shape[1], row_step(x)
    entries, results, w = entries_of(x, mask), pointer(out), pointer(part_of(work, part))
    lanes = lane_count(w)
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
        sums = sums_apart(sums_of_group(w, (None,)), row_max, rates, (None,))
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
    rows, n, like = len(out), x.shape[1], pointer(x)
    size = group_size(rows, n, parts, like)
    work = workspaces(parts, row_work_size(n, size, like), like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, weighted, size, work
    each_span(value_groups, team, parts, group_count(rows, size), arguments)


@jit
def value_groups(first, stop, part, x, mask, temperature, rate, out, weighted, size, work):
    """`value_rows` of some groups of rows."""
    n, step = x.shape[1], row_step(x)
    entries, w, exact = entries_of(x, mask), pointer(part_of(work, part)), (weighted,)
    lanes = lane_count(w)
    first, stop = first * size, min(stop * size, len(out))
    for start in range(first, stop, size):
        count = min(size, stop - start)
        group_maxima(entries, n, step, start, count, w)
        row_max, rates = maxima_at(w, count), lane_rates(temperature, start, count, rate, w)
        put_row_scales(scale_of(row_max, rates, exact), rates, w)
        further = min(size, stop - start - count)
        group_sums(entries, n, step, start, count, further, temperature, exact, w, None, None)
        sums = sums_apart(sums_of_group(w, exact), row_max, rates, exact)
        if are_plain(row_max, rates) and shows_all(row_max, rates.temperature, sums, weighted):
            write(pointer(out), start, count, plain_value(row_max, rates.temperature, sums, weighted))
            continue
        write_beside(row_max, sums, w, 0, lanes)
        for r in range(count):
            row, own = (start + r) * step, temperature_at(temperature, start + r)
            put(pointer(out), start + r, value_beside(entries, row, 1, n, own, weighted, w, r, lanes))


# -- narrow rows ----------------------------------------------------------------------------------
# As many rows as there are lanes are transposed, piece by piece, into a tile: a lane then has a whole row,
# no vector is filled in part, and nothing is merged across lanes. Ten float32 take 28 ns on Zen 1, of which
# the two transpositions are 5 and the sums 19, and 166 as a row of `softmax_rows`. Entries are summed in
# chains, which are the lanes there, and chains are merged by halves.

# Vectors of working memory beside the tile: fields of the rows, and for each chain `QUANTITIES`.


@traced
def narrow_work_size(n, like):
    """Entries of working memory for as many rows as there are lanes."""
    lanes = lane_count(like)
    return (FIELDS + QUANTITIES * chain_count(n, like) + n + piece_size(like)) * lanes


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

    Exact ones take three quarters of the registers of AVX2: log_softmax of 10**6 x 10 float32 takes 1.43
    times as long as softmax, and took 1.32 with two sums, which were off by 4.9 ulp.

    Terms take the place of the entries, unless ``stored`` is None: else it is the working memory.
    """
    lanes, zero = lane_count(work), spread(0.0, work)
    first, chains = chain_sums_at(n, work), chain_count(n, work)
    step = chains * lanes
    fetched = 0
    for chain in range(chains):
        sums, entry = start_of_sums(zero, exact), chain
        while entry < n:
            fetch(soon, fetched)
            fetched += 1
            i = at + entry * lanes
            sums, term = add_terms(sums, load(work, i), 0, scale, guard, exact)
            if stored is not None:
                store(stored, i, term)
            entry = next_entry(entry, chain, n, work)
        store_all(work, first + chain * lanes, step, end_of_sums(sums))
    merge_chains(work, first, step, n, exact)
    return load_all(work, first, step, exact)


@jit
def merge_chains(work, first, step, n, exact):
    """Merge the sums of the chains of n entries into those of the first, in the order of `sum_all_lanes`."""
    lanes, count = lane_count(work), chain_count(n, work)
    half = sum_lane_count(n, work) // 2
    while half > 0:
        for chain in range(half, count):
            at = first + chain * lanes
            sums = load_all(work, at - half * lanes, step, exact)
            sums = merge_sums(sums, load_all(work, at, step, exact))
            store_all(work, at - half * lanes, step, sums)
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
    write_ends(sums, row_max, rates, temperature, first, exact, w, 0, lanes)
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
        row, own = (first + k) * step, temperature_at(temperature, first + k)
        put(pointer(out), first + k, value_beside(entries, row, 1, n, own, weighted, w, k, lanes))


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
    merge_tiles(partial, chunks, maxima)
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
    partial = workspace(rows * chunks * QUANTITIES, like)
    arguments = x, mask, temperature, maxima, exact, partial
    each_task(chunk_sums, team, parts, rows * chunks, arguments)
    sums = workspace(rows * QUANTITIES, like)
    merge_chunks(partial, chunks, 1, exact, sums)
    return sums


@jit
def chunk_sums(task, part, x, mask, temperature, maxima, exact, partial):
    """Sums of a chunk."""
    entries = entries_of(x, mask)
    row, start, stop, soon = chunk_of(task, x, entries)
    rate = rate_at(temperature, row, maxima[row])
    sums = _slice.sums_of_slice(entries, start, stop, maxima[row], rate, exact, None, 0, soon)
    put_sums(partial, QUANTITIES * task, 1, sums)


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
    rate, far = rate_at(temperature, row, maxima[row]), is_far(x, out)
    own = get_sums(sums, QUANTITIES * row, 1, exact)
    shift = row * (x.shape[1] - row_step(x))
    _slice.write_slice(entries, start, stop, maxima[row], rate, own, exact, results, shift, far, soon)


@functools.partial(kernel, nogil=True)
def long_values(x, mask, temperature, maxima, sums, out, weighted):
    """Logsumexp of each row from its sums, or entropy unless ``weighted`` is None."""
    rows, n = x.shape
    for row in range(rows):
        own, entries = temperature_at(temperature, row), entries_of(x, mask)
        beside = get_sums(sums, QUANTITIES * row, 1, (weighted,))
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
