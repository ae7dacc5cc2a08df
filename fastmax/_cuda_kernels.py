"""Schedules for an NVIDIA GPU: which thread takes which entries, and what threads tell each other.

All schedules are one: a *group* of threads takes a slice, and each of them holds `PIECES` pieces of it in
registers, a piece being the lanes of one 128-bit access. Entries are read once and written once. What differs
is the group: a thread, some lanes of a warp, a block, the blocks of a cluster, or a column of a block, and
how it finds the maximum and the sum. A slice that is too long for a group is split: one kernel leaves the
maximum and the sum of each part in memory, others merge them and write, and so entries are read twice, the
second time from the L2 cache. The kernels for any strides take what has no such form.

The functions here are plain Python over the primitives of `_cuda_target`. The names in capitals, and those in
the tables at the end, get their values when a kernel is built (see `_cuda_plan.names`); so do `load`,
`store`, `stage`, `unstage` and `slots`.
"""

from fastmax._cuda_target import (
    across,
    anyone_in_block,
    as_lanes,
    barrier,
    block,
    byte,
    cluster_arrive,
    cluster_rank,
    cluster_wait,
    get,
    load,
    load_one,
    number,
    offset,
    part,
    put,
    put_remote,
    scanned,
    select,
    shuffle,
    shuffle_from,
    slots,
    spread,
    stage,
    store,
    store_one,
    thread,
    unstage,
)
from fastmax._math import (
    LAW_WORDS,
    Guard,
    Rate,
    add,
    add_smaller,
    bounded_gap,
    bounded_scale,
    is_plain,
    larger,
    law_of,
    log_terms,
    merge,
    own_entropy_value,
    own_faint_value,
    own_log_of_sum,
    own_logsumexp_value,
    own_misses_faint_terms,
    plain_gap,
    plain_scale,
    reciprocal,
    rescaled,
    rescaled_moment,
    rescaled_split,
    term_of,
    terms,
    times_pair,
    top_term,
)

# Set when a kernel is built; these values are for the reader.
PIECES = (0,)  # one entry for each piece of a thread
LANES = 4  # in a piece
ACCESS = 4  # entries read at a time
THREADS = 128  # in a block
GROUP = 32  # threads of a block that share a slice
BLOCKS = 1  # blocks of a cluster that share a slice
SLICES = 4  # in a block
MEMBERS = GROUP * BLOCKS
CAPACITY = LANES * MEMBERS  # entries that a group holds
FIELDS = 3  # numbers that a part of a slice leaves in memory
MASKED = False
ABSENT = 0.0  # what an entry, or a slice, comes out as where the mask is False

INFINITY = float("inf")


# -- laws: from the launch, the same for all slices, or from memory ---------------------------------


def laws(temperatures, out, count, sizes, strides):
    """Write the law of each slice: 8 bytes read and 20 words written, once for all that use them."""
    index = block() * THREADS + thread()
    if index < count:
        law = law_of(number(temperatures, offset(index, sizes, strides)), load_one(out, 0))
        scanned(write_field, (out, index * LAW_WORDS), law)


def write_field(state, value):
    out, at = state
    store_one(out, at, value)
    return (out, at + 1), at


def law_in_launch(laws, law, index):
    return as_lanes(law)


def rate_in_launch(law):
    return Rate(law[18], law[0], law[1], law[10], law[2], law[3])


def guard_in_launch(law):
    return law[4], law[5], Guard(law[6], law[8], law[9], law[7], None), law[18]


def gap_in_launch(law):
    return law[11], law[12], law[13], law[14]


def scaled_in_launch(law):
    return law[16], law[17], law[15]


def law_in_memory(laws, law, index):
    """Where a law is: the launch says how far apart those of neighbouring slices are, 0 if all share one."""
    return laws, index * int(law[0])


def rate_in_memory(law):
    laws, at = law
    high, low = load_one(laws, at), load_one(laws, at + 1)
    depth, limit = load_one(laws, at + 2), load_one(laws, at + 3)
    return Rate(limit, high, low, load_one(laws, at + 10), depth, limit)


def guard_in_memory(law):
    laws, at = law
    prescale, cutoff = load_one(laws, at + 6), load_one(laws, at + 7)
    guard = Guard(prescale, load_one(laws, at + 8), load_one(laws, at + 9), cutoff, None)
    return load_one(laws, at + 4), load_one(laws, at + 5), guard, load_one(laws, at + 18)


def gap_in_memory(law):
    laws, at = law
    inverse, prescale = load_one(laws, at + 11), load_one(laws, at + 12)
    return inverse, prescale, load_one(laws, at + 13), load_one(laws, at + 14)


def scaled_in_memory(law):
    laws, at = law
    return load_one(laws, at + 16), load_one(laws, at + 17), load_one(laws, at + 15)


law_at, rate_from, guard_from = law_in_launch, rate_in_launch, guard_in_launch
gap_from, scaled_from = gap_in_launch, scaled_in_launch


# -- groups: which slice and which place in it a thread has, and what its group tells it ----------------


def rows_place():
    """Neighbouring threads share a slice."""
    return block() * SLICES + thread() // GROUP, thread() % GROUP


def columns_place():
    """Neighbouring threads have neighbouring slices."""
    return block() * SLICES + thread() % SLICES, thread() // SLICES


def cluster_place():
    """The threads of all blocks of a cluster share a slice."""
    return block() // BLOCKS, cluster_rank() * THREADS + thread()


place = rows_place


def alone(combine, state, empty):
    """A thread has its slice for itself."""
    return state


def in_lanes(combine, state, width):
    """Butterfly over so many lanes of a warp; all take the result of the first, so that all agree."""
    lane = thread() % 32
    first = lane - lane % width
    mask = ((1 << width) - 1) << first
    step = width // 2
    while step > 0:
        state = combine(state, shuffle(state, mask, step))
        step = step // 2
    return shuffle_from(state, mask, first)


def in_warp(combine, state, empty):
    """A group is 8, 16 or 32 lanes of a warp."""
    return in_lanes(combine, state, GROUP)


def in_block(combine, state, empty):
    """Each warp leaves its state in shared memory, and each combines all of them: one barrier."""
    state = in_lanes(combine, state, 32)
    lane = thread() % 32
    room = slots(state)
    if lane == 0:
        put(room, thread() // 32, state)
    barrier()
    state = empty
    if lane < THREADS // 32:
        state = get(room, lane)
    return in_lanes(combine, state, 32)


def in_cluster(combine, state, empty):
    """Each block leaves its state in the shared memory of every block of the cluster."""
    state = in_block(combine, state, empty)
    room = slots(state)
    if thread() < BLOCKS:
        put_remote(room, thread(), cluster_rank(), state)
    cluster_arrive()
    cluster_wait()
    result = get(room, 0)
    for i in range(1, BLOCKS):
        result = combine(result, get(room, i))
    return result


def in_column(combine, state, empty):
    """The threads of a column leave their states in shared memory, and each combines those of its column."""
    room = slots(state)
    put(room, thread(), state)
    barrier()
    result = get(room, thread() % SLICES)
    for i in range(1, GROUP):
        result = combine(result, get(room, thread() % SLICES + i * SLICES))
    return result


exchange = in_warp


def my_own(flag):
    """Whether a group goes a way that other groups of its block need not go."""
    return flag


def any_here(flag):
    """In a block whose groups go ways together, as they meet at its barriers."""
    return anyone_in_block(flag)


anyone = my_own


def no_cluster():
    return


def arrive():
    """Blocks may write to each other once all of them have arrived."""
    cluster_arrive()


def wait():
    cluster_wait()


arrive_first, wait_first = no_cluster, no_cluster


# -- what each function sums --------------------------------------------------------------------------
# Of softmax, the terms; of the others, ties, the rest and, for the entropy, the moment, as in `log_of_sum`.
# ``_add`` is a step of `scanned` that makes terms or leaves the entries as they are.


def largest(a, b):
    return (larger(a[0], b[0]),)


def max_piece(state, x):
    return (larger(x, state[0]),), 0


def softmax_zero(like):
    """Sums that no term exceeds, so that `add_smaller` does; `softmax_close` takes that number away."""
    return top_term(like), spread(0.0, like)


def softmax_add(state, x):
    sums, row_max, scale, guard = state
    power, excess, _ = terms(x, scale, guard)
    sums = add_smaller(sums[0], sums[1], power, excess)
    return (sums, row_max, scale, guard), term_of(power, excess)


def softmax_close(sums, spoil):
    return sums[0] - top_term(sums[0]) + spread(spoil, sums[0]), sums[1]


def softmax_merge(a, b):
    return merge(a[0], a[1], b[0], b[1])


def softmax_empty(like):
    return spread(0.0, like), spread(0.0, like)


def softmax_rescaled(part_max, sums, scale, guard, row_max):
    return rescaled(part_max, sums, scale, guard)


def split_zero(like):
    zero = spread(0.0, like)
    return zero, zero, zero


def split_add(state, x):
    sums, row_max, scale, guard = state
    zero, one = spread(0.0, x), spread(1.0, x)
    power, excess, _ = terms(x, scale, guard)
    tied = x == spread(row_max, x)
    power, excess = select(tied, zero, power), select(tied, zero, excess)
    rest, error = add(sums[1], sums[2], power, excess)
    return ((sums[0] + select(tied, one, zero), rest, error), row_max, scale, guard), x


def split_close(sums, spoil):
    return sums[0], sums[1] + spread(spoil, sums[1]), sums[2]


def split_merge(a, b):
    rest, error = merge(a[1], a[2], b[1], b[2])
    return a[0] + b[0], rest, error


def split_rescaled(part_max, sums, scale, guard, row_max):
    return rescaled_split(part_max, sums, scale, guard, row_max)


def moment_zero(like):
    zero = spread(0.0, like)
    return zero, zero, zero, zero, zero


def moment_add(state, x):
    sums, row_max, scale, guard = state
    zero, one = spread(0.0, x), spread(1.0, x)
    power, excess, product = terms(x, scale, guard)
    tied = x == spread(row_max, x)
    power, excess = select(tied, zero, power), select(tied, zero, excess)
    rest, error = add(sums[1], sums[2], power, excess)
    moment, lost = merge(sums[3], sums[4], term_of(power, excess) * product, zero)
    return ((sums[0] + select(tied, one, zero), rest, error, moment, lost), row_max, scale, guard), x


def moment_close(sums, spoil):
    return sums[0], sums[1] + spread(spoil, sums[1]), sums[2], sums[3], sums[4]


def moment_merge(a, b):
    rest, error = merge(a[1], a[2], b[1], b[2])
    moment, lost = merge(a[3], a[4], b[3], b[4])
    return a[0] + b[0], rest, error, moment, lost


def moment_rescaled(part_max, sums, scale, guard, row_max):
    ties, rest, error = rescaled_split(part_max, sums, scale, guard, row_max)
    moment, lost = rescaled_moment(part_max, sums, scale, guard)
    return ties, rest, error, moment, lost


zero_sums, add_piece, close_sums = softmax_zero, softmax_add, softmax_close
merge_sums, empty_sums, rescale_sums = softmax_merge, softmax_empty, softmax_rescaled


# -- what each function makes of them -------------------------------------------------------------------


def term_piece(state, x):
    scale, guard = state
    power, excess, _ = terms(x, scale, guard)
    return state, term_of(power, excess)


def softmax_entries(row, row_max, law):
    """Terms of entries that were read again."""
    rate = rate_from(law)
    if is_plain(row_max, rate):
        _, row = scanned(term_piece, (plain_scale(row_max, rate), None), row)
    else:
        high, low, guard, _ = guard_from(law)
        _, row = scanned(term_piece, bounded_scale(row_max, high, low, guard), row)
    return row


def entries_as_they_are(row, row_max, law):
    return row


def softmax_piece(state, term):
    high, low = state
    return state, times_pair(term, spread(high, term), spread(low, term))


def softmax_results(row, row_max, sums, law):
    """Terms times the reciprocal of their sum."""
    _, row = scanned(softmax_piece, reciprocal(sums[0], sums[1]), row)
    return row


def log_piece(state, x):
    gap, guard = state
    return state, log_terms(x, gap, guard)


def log_softmax_results(row, row_max, sums, law):
    """(x - max) / T - log_sum."""
    log_sum = own_log_of_sum(row_max, sums)
    rate = rate_from(law)
    if is_plain(row_max, rate):
        _, row = scanned(log_piece, (plain_gap(row_max, rate, log_sum), None), row)
    else:
        inverse, prescale, factor, cutoff = gap_from(law)
        _, row = scanned(log_piece, bounded_gap(row_max, inverse, prescale, factor, cutoff, log_sum), row)
    return row


results_of, entries_again = softmax_results, softmax_entries


def entropy_of(source, n, member, row_max, sums, law):
    return own_entropy_value(row_max, sums)


def logsumexp_of(source, n, member, row_max, sums, law):
    high, low, unit = scaled_from(law)
    value = own_logsumexp_value(row_max, high, low, unit, sums)
    faint = own_misses_faint_terms(row_max, high * unit, sums)
    if anyone(faint):
        other = faint_value(source, n, member, row_max, high * unit, law)
        value = select(faint, other, value)
    return value


def faint_value(source, n, member, row_max, temperature, law):
    """Max + T rest, where the terms of the rest are too small beside that of a single maximum.

    As `_slice.logsumexp_of_faint`, from entries that are read twice more.
    """
    lowest, zero, half = spread(-INFINITY, row_max), spread(0.0, row_max), spread(0.5, row_max)
    second = lowest
    for i in range(member, n, MEMBERS):
        entry = entry_of(source, i)
        if entry < row_max:
            second = larger(entry, second)
    (second,) = exchange(largest, (second,), (lowest,))
    high, low, guard, _ = guard_from(law)
    scale, own = bounded_scale(second, high, low, guard)
    sums = zero, zero
    for i in range(member, n, MEMBERS):
        entry = entry_of(source, i)
        if entry < row_max:
            power, excess, _ = terms(entry, scale, own)
            sums = add(sums[0], sums[1], power, excess)
    total, error = exchange(softmax_merge, sums, (zero, zero))
    # The term of the second at the temperature 2 T is that of its half at T.
    scale, own = bounded_scale(row_max * half, high, low, guard)
    power, excess, _ = terms(second * half, scale, own)
    value = own_faint_value(row_max, temperature, term_of(power, excess), total + error)
    return select(second == lowest, row_max, value)


value_of = logsumexp_of


def packed_entry(source, i):
    x, base, stride = source
    return load_one(x, base + i * stride)


entry_of = packed_entry


# -- one slice in the registers of a group ---------------------------------------------------------------


def load_piece(state, piece):
    x, base, stride, first, stop = state
    value = load(x, base, stride, first, ACCESS * MEMBERS, stop)
    return (x, base, stride, first + LANES * MEMBERS, stop), value


def store_piece(state, value):
    out, base, stride, first, stop = state
    store(out, base, stride, first, ACCESS * MEMBERS, stop, value)
    return (out, base, stride, first + LANES * MEMBERS, stop), 0


def load_row(x, base, stride, member, stop):
    _, row = scanned(load_piece, (x, base, stride, ACCESS * member, stop), PIECES)
    return row


def store_row(out, base, stride, member, stop, row):
    scanned(store_piece, (out, base, stride, ACCESS * member, stop), row)


def sum_row(row, row_max, scale, guard, spoil):
    state, row = scanned(add_piece, (zero_sums(row[0]), row_max, scale, guard), row)
    return close_sums(state[0], spoil), row


def reduce_row(row, law):
    """Maximum and sums of a slice, and what `add_piece` made of its entries."""
    (top,), _ = scanned(max_piece, (spread(-INFINITY, row[0]),), row)
    (top,) = across(largest, (top,))
    wait_first()
    (row_max,) = exchange(largest, (top,), (spread(-INFINITY, top),))
    rate = rate_from(law)
    if is_plain(row_max, rate):
        sums, row = sum_row(row, row_max, plain_scale(row_max, rate), None, spread(0.0, row_max))
    else:
        high, low, guard, spoil = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        sums, row = sum_row(row, row_max, scale, guard, spoil)
    sums = exchange(merge_sums, across(merge_sums, sums), empty_sums(row_max))
    return row_max, sums, row


def rows_base(index, n, inner, pitch):
    """Where a slice begins, and how far apart its entries are."""
    return index * pitch, 1


def columns_base(index, n, inner, pitch):
    return index // inner * pitch + index % inner, inner


base_of = rows_base


def transform(x, out, laws, law, count, n, inner, x_pitch, out_pitch):
    """Softmax or log_softmax: each entry is read once and written once."""
    arrive_first()
    index, member = place()
    last = min(index, count - 1)  # threads without a slice do what others do, and write nothing
    base, stride = base_of(last, n, inner, x_pitch)
    law = law_at(laws, law, last)
    row_max, sums, row = reduce_row(load_row(x, base, stride, member, n), law)
    row = results_of(row, row_max, sums, law)
    base, stride = base_of(last, n, inner, out_pitch)
    store_row(out, base, stride, member, n if index < count else 0, row)


def reduce(x, out, laws, law, count, n, inner, x_pitch, out_pitch):
    """Logsumexp or entropy: each entry is read once, one value per slice written."""
    arrive_first()
    index, member = place()
    last = min(index, count - 1)
    base, stride = base_of(last, n, inner, x_pitch)
    law = law_at(laws, law, last)
    row_max, sums, _ = reduce_row(load_row(x, base, stride, member, n), law)
    value = value_of((x, base, stride), n, member, row_max, sums, law)
    if index < count and member == 0:
        store_one(out, index, value)


# -- short rows: a thread has a row, and a block brings its rows in and out through shared memory ----------
# The block reads THREADS n neighbouring entries, neighbouring threads neighbouring entries, and each thread
# finds its own in shared memory. Rows of an odd number of words begin in 32 banks as they are; for the others
# a word in 33 is left free, so that rows of 8, 16 or 32 do not meet in one. With loads of 128 bits, the
# writes to shared memory would meet there instead.


def pad_shift(n):
    """After how many entries a word is left free, as a power of two; 2**31 is none."""
    return 31 if n % 2 == 1 else 5


def stage_piece(state, piece):
    x, room, base, first, stop, shift = state
    value = load(x, base, 1, first, THREADS, stop)
    stage(room, first, THREADS, stop, shift, value)
    return (x, room, base, first + LANES * THREADS, stop, shift), 0


def unstage_piece(state, piece):
    room, first, stop, shift = state
    return (room, first + LANES, stop, shift), unstage(room, first, 1, stop, shift)


def restage_piece(state, value):
    room, first, stop, shift = state
    stage(room, first, 1, stop, shift, value)
    return (room, first + LANES, stop, shift), 0


def drain_piece(state, piece):
    out, room, base, first, stop, shift = state
    store(out, base, 1, first, THREADS, stop, unstage(room, first, THREADS, stop, shift))
    return (out, room, base, first + LANES * THREADS, stop, shift), 0


def bring_rows(x, count, n):
    """Bring the rows of the block into shared memory; return it and the row of this thread."""
    first = block() * THREADS
    stop = min(THREADS, count - first) * n
    room = slots(load_one(x, 0))
    scanned(stage_piece, (x, room, first * n, thread(), stop, pad_shift(n)), PIECES)
    barrier()
    start = min(thread() * n, stop - n)
    _, row = scanned(unstage_piece, (room, start, start + n, pad_shift(n)), PIECES)
    return room, row, stop


def transform_short(x, out, laws, law, count, n, inner, x_pitch, out_pitch):
    """`transform` of rows of at most 32 words."""
    room, row, stop = bring_rows(x, count, n)
    index = block() * THREADS + thread()
    law = law_at(laws, law, min(index, count - 1))
    row_max, sums, row = reduce_row(row, law)
    row = results_of(row, row_max, sums, law)
    barrier()
    scanned(restage_piece, (room, thread() * n, min(thread() * n + n, stop), pad_shift(n)), row)
    barrier()
    scanned(drain_piece, (out, room, block() * THREADS * n, thread(), stop, pad_shift(n)), PIECES)


def reduce_short(x, out, laws, law, count, n, inner, x_pitch, out_pitch):
    """`reduce` of rows of at most 32 words."""
    _, row, _ = bring_rows(x, count, n)
    index = block() * THREADS + thread()
    last = min(index, count - 1)
    law = law_at(laws, law, last)
    row_max, sums, _ = reduce_row(row, law)
    value = value_of((x, last * n, 1), n, 0, row_max, sums, law)
    if index < count:
        store_one(out, index, value)


# -- split slices: a group takes a part, and leaves its maximum and sums for the others ------------------
# The slices from start on, of which those before count are there: what changes between launches comes first.


def summarise(start, count, x, work, laws, law, n, inner, x_pitch, parts):
    """Write the maximum and sums of part y of a slice: each entry is read once."""
    slot, member = place()
    index = min(start + slot, count - 1)
    base, stride = base_of(index, n, inner, x_pitch)
    first = part() * CAPACITY
    row = load_row(x, base + first * stride, stride, member, n - first)
    row_max, sums, _ = reduce_row(row, law_at(laws, law, index))
    if start + slot < count and member == 0:
        scanned(write_field, (work, (slot * parts + part()) * FIELDS), (row_max, *sums))


def read_field(state, field):
    work, at = state
    return (work, at + 1), load_one(work, at)


def sums_at(work, at, like):
    _, sums = scanned(read_field, (work, at), like)
    return sums


def merge_parts(work, first, parts, member, law, like):
    """Maximum and sums of a slice from those of its parts."""
    top = spread(-INFINITY, like)
    for i in range(member, parts, MEMBERS):
        top = larger(load_one(work, (first + i) * FIELDS), top)
    (row_max,) = exchange(largest, (top,), (spread(-INFINITY, like),))
    empty = empty_sums(like)
    sums = empty
    rate = rate_from(law)
    if is_plain(row_max, rate):
        scale = plain_scale(row_max, rate)
        for i in range(member, parts, MEMBERS):
            at = (first + i) * FIELDS
            part_sums = sums_at(work, at + 1, empty)
            sums = merge_sums(sums, rescale_sums(load_one(work, at), part_sums, scale, None, row_max))
    else:
        high, low, guard, _ = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        for i in range(member, parts, MEMBERS):
            at = (first + i) * FIELDS
            part_sums = sums_at(work, at + 1, empty)
            sums = merge_sums(sums, rescale_sums(load_one(work, at), part_sums, scale, guard, row_max))
    return row_max, exchange(merge_sums, sums, empty)


def merge_slices(start, count, work, totals, laws, law, parts):
    """Write the maximum and sums of a slice, once for all who write its parts."""
    slot, member = place()
    index = min(start + slot, count - 1)
    law = law_at(laws, law, index)
    row_max, sums = merge_parts(work, (index - start) * parts, parts, member, law, load_one(work, 0))
    if start + slot < count and member == 0:
        scanned(write_field, (totals, slot * FIELDS), (row_max, *sums))


def transform_parts(start, count, x, out, totals, laws, law, n, inner, x_pitch, out_pitch):
    """Write part y of a slice: each entry is read again, from the L2 cache, and written once."""
    slot, member = place()
    index = min(start + slot, count - 1)
    base, stride = base_of(index, n, inner, x_pitch)
    law = law_at(laws, law, index)
    first = part() * CAPACITY
    row = load_row(x, base + first * stride, stride, member, n - first)
    row_max = load_one(totals, (index - start) * FIELDS)
    sums = sums_at(totals, (index - start) * FIELDS + 1, empty_sums(row_max))
    row = results_of(entries_again(row, row_max, law), row_max, sums, law)
    base, stride = base_of(index, n, inner, out_pitch)
    stop = n - first if start + slot < count else 0
    store_row(out, base + first * stride, stride, member, stop, row)


def reduce_parts(start, count, x, out, work, laws, law, n, inner, x_pitch, out_pitch, parts):
    """Write the value of a slice from its parts."""
    slot, member = place()
    index = min(start + slot, count - 1)
    base, stride = base_of(index, n, inner, x_pitch)
    law = law_at(laws, law, index)
    row_max, sums = merge_parts(work, (index - start) * parts, parts, member, law, load_one(work, 0))
    value = value_of((x, base, stride), n, member, row_max, sums, law)
    if start + slot < count and member == 0:
        store_one(out, index, value)


# -- slices of any strides, with or without a mask --------------------------------------------------------
# Entries are read three times, or twice for one value per slice; the L2 cache serves all but the first.


def strided_entry(source, i):
    """An entry, or -inf where the mask is False."""
    x, base, mask, mask_base, sizes, strides, mask_strides = source
    value = load_one(x, base + offset(i, sizes, strides))
    if MASKED:
        seen = byte(mask, mask_base + offset(i, sizes, mask_strides)) != 0
        value = select(seen, value, spread(-INFINITY, value))
    return value


def is_seen(source, i):
    _, _, mask, mask_base, sizes, _, mask_strides = source
    return byte(mask, mask_base + offset(i, sizes, mask_strides)) != 0


def reduce_entries(source, n, member, law, like):
    """Maximum and sums of a slice whose entries are read as they are needed."""
    lowest = spread(-INFINITY, like)
    top = lowest
    for i in range(member, n, MEMBERS):
        top = larger(entry_of(source, i), top)
    (row_max,) = exchange(largest, (top,), (lowest,))
    rate = rate_from(law)
    if is_plain(row_max, rate):
        state = (zero_sums(like), row_max, plain_scale(row_max, rate), None)
        for i in range(member, n, MEMBERS):
            state, _ = add_piece(state, entry_of(source, i))
        sums = close_sums(state[0], spread(0.0, like))
    else:
        high, low, guard, spoil = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        guarded = (zero_sums(like), row_max, scale, guard)
        for i in range(member, n, MEMBERS):
            guarded, _ = add_piece(guarded, entry_of(source, i))
        sums = close_sums(guarded[0], spoil)
    return row_max, exchange(merge_sums, sums, empty_sums(like))


def transform_strided(x, out, mask, laws, law, count, n, outer, inner):
    """`transform` for any strides: outer and inner are (sizes, strides of x, of out, of the mask)."""
    index, member = place()
    last = min(index, count - 1)
    sizes, x_strides, out_strides, mask_strides = outer
    base, mask_base = offset(last, sizes, x_strides), offset(last, sizes, mask_strides)
    out_base = offset(last, sizes, out_strides)
    sizes, x_strides, out_strides, mask_strides = inner
    source = (x, base, mask, mask_base, sizes, x_strides, mask_strides)
    law = law_at(laws, law, last)
    like = load_one(x, base)
    row_max, sums = reduce_entries(source, n, member, law, like)
    if index < count:
        for i in range(member, n, MEMBERS):
            row = entries_again((entry_of(source, i),), row_max, law)
            (value,) = results_of(row, row_max, sums, law)
            if MASKED:
                value = select(is_seen(source, i), value, spread(ABSENT, value))
            store_one(out, out_base + offset(i, sizes, out_strides), value)


def reduce_strided(x, out, mask, laws, law, count, n, outer, inner):
    """`reduce` for any strides."""
    index, member = place()
    last = min(index, count - 1)
    sizes, x_strides, out_strides, mask_strides = outer
    base, mask_base = offset(last, sizes, x_strides), offset(last, sizes, mask_strides)
    out_base = offset(last, sizes, out_strides)
    sizes, x_strides, _, mask_strides = inner
    source = (x, base, mask, mask_base, sizes, x_strides, mask_strides)
    law = law_at(laws, law, last)
    like = load_one(x, base)
    row_max, sums = reduce_entries(source, n, member, law, like)
    value = value_of(source, n, member, row_max, sums, law)
    if MASKED:
        one, zero = spread(1.0, like), spread(0.0, like)
        seen = zero
        for i in range(member, n, MEMBERS):
            if is_seen(source, i):
                seen = one
        (seen,) = exchange(largest, (seen,), (zero,))
        value = select(seen > zero, value, spread(ABSENT, value))
    if index < count and member == 0:
        store_one(out, out_base, value)


# -- what the names stand for in a kernel ---------------------------------------------------------------

OPERATIONS = {
    "softmax": {
        "zero_sums": softmax_zero,
        "add_piece": softmax_add,
        "close_sums": softmax_close,
        "merge_sums": softmax_merge,
        "empty_sums": softmax_empty,
        "rescale_sums": softmax_rescaled,
        "results_of": softmax_results,
        "entries_again": softmax_entries,
    },
    "log_softmax": {
        "zero_sums": split_zero,
        "add_piece": split_add,
        "close_sums": split_close,
        "merge_sums": split_merge,
        "empty_sums": split_zero,
        "rescale_sums": split_rescaled,
        "results_of": log_softmax_results,
        "entries_again": entries_as_they_are,
    },
    "logsumexp": {
        "zero_sums": split_zero,
        "add_piece": split_add,
        "close_sums": split_close,
        "merge_sums": split_merge,
        "empty_sums": split_zero,
        "rescale_sums": split_rescaled,
        "value_of": logsumexp_of,
    },
    "entropy": {
        "zero_sums": moment_zero,
        "add_piece": moment_add,
        "close_sums": moment_close,
        "merge_sums": moment_merge,
        "empty_sums": moment_zero,
        "rescale_sums": moment_rescaled,
        "value_of": entropy_of,
    },
}

GROUPS = {
    "thread": {"place": rows_place, "exchange": alone},
    "warp": {"place": rows_place, "exchange": in_warp},
    "block": {"place": rows_place, "exchange": in_block},
    "cluster": {
        "place": cluster_place,
        "exchange": in_cluster,
        "arrive_first": arrive,
        "wait_first": wait,
    },
    "column": {
        "place": columns_place,
        "exchange": in_column,
        "anyone": any_here,
        "base_of": columns_base,
    },
}

LAWS = {
    False: {},
    True: {
        "law_at": law_in_memory,
        "rate_from": rate_in_memory,
        "guard_from": guard_in_memory,
        "gap_from": gap_in_memory,
        "scaled_from": scaled_in_memory,
    },
}
