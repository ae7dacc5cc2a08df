"""Schedules for an NVIDIA GPU: which thread takes which entries, and what threads tell each other.

All schedules are one: a *group* of threads takes a slice, and each of them holds `PIECES` pieces of it in
registers, a piece being the lanes of one 128-bit access. Entries are read once and written once, but in rare
slices (`faint_value`, `finish_kept`). What differs is the group: a thread, some lanes of a warp, a block, or
a column of a block, and how it finds the maximum and the sum. Longer slices lie in shared memory, that of a
block or of a team of blocks, which are a cluster or any blocks of the grid. A slice that is too long for a
team is split: one kernel leaves the maximum and the sum of each part in memory, others merge them and write,
and so entries are read twice, the second time from the L2 cache. The kernels for any strides take what has no
such form, with one group for each slice.

The functions here are plain Python over the primitives of `_cuda_target`. The names in capitals, and those in
the tables at the end, get their values when a kernel is built (see `_cuda_plan.names`); so do `load`,
`store`, `peek`, `keep` and `slots`.
"""

from fastmax._cuda_target import (
    anyone_in_block,
    arrive,
    as_lanes,
    await_all,
    barrier,
    block,
    blocks_of_grid,
    byte,
    commit,
    copies_done,
    copy_in,
    copy_out,
    everywhere,
    exp2,
    first_inverse,
    further,
    get,
    hear,
    keep,
    lane_count,
    load,
    load_one,
    load_part,
    lower_half,
    number,
    one_left,
    part,
    peek,
    put,
    put_in,
    select,
    shuffle,
    shuffle_from,
    singles,
    slots,
    slots_of_cluster,
    small,
    spread,
    store,
    store_lanes,
    store_one,
    store_part,
    tell,
    thread,
    three_left,
    tile_for,
    together,
    two_left,
    upper_half,
)
from fastmax._math import (
    BIAS,
    DEPTH,
    EXP2_OF_HALVES,
    LAW_WORDS,
    Guard,
    Rate,
    Scale,
    add,
    add_smaller,
    at_least,
    bounded_gap,
    bounded_scale,
    constant,
    fma,
    guarded,
    guarded_terms,
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
    polynomial,
    power_of_two,
    reciprocal,
    rescaled,
    rescaled_moment,
    rescaled_split,
    term_of,
    terms,
    times_pair,
    top_term,
)
from fastmax._tracing import traced

# Set when a kernel is built; these values are for the reader.
PIECES = (0,)  # one entry for each piece of a thread
EACH = 1  # short rows of a thread
CHUNKS = (0,)  # one entry for each piece of 128 bits that a thread copies of a block's short rows
LANES = 4  # in a piece
WIDE = 4  # entries of 128 bits
PARTS = 4  # accesses of 128 bits to a line
ACCESS = 4  # entries read at a time
THREADS = 128  # in a block
GROUP = 32  # threads of a block that share a slice
SLICES = 4  # in a block
CAPACITY = LANES * GROUP  # entries that a group holds
FIELDS = 3  # numbers that a part of a slice leaves in memory
STATES = 1  # that a block tells others
AREAS, RARE_AREA, ROOM = 4, 2, 3  # exchanges whose states are kept, where rare ones begin, words of a state
LARGEST_CLUSTER = 16  # blocks
KEPT = True  # whether terms take the place of entries in a tile
SHIFTED = False  # whether a row is read from the multiple of 128 bits before it on
MASKED = False
ABSENT = 0.0  # what an entry, or a slice, comes out as where the mask is False

INFINITY = float("inf")


# -- tuples: of pieces, of lanes, of sizes; the compiler sees their entries one by one -------------------


@traced
def scanned(step, state, pieces):
    """Fold ``state, result = step(state, piece)`` over a tuple; return the state and the results."""
    results = []
    for piece in pieces:
        state, result = step(state, piece)
        results.append(result)
    return state, tuple(results)


@traced
def across(combine, state):
    """Combine the lanes of a tuple of lanes by halves, to single lanes."""
    while lane_count(state[0]) > 1:
        state = combine(tuple(map(lower_half, state)), tuple(map(upper_half, state)))
    return state


@traced
def offset(index, sizes, strides):
    """Offset of the entry of a number in C order, for sizes and strides in entries."""
    *sizes, size = sizes
    *strides, stride = strides
    if not sizes:
        return index * stride
    return offset(index // size, sizes, strides) + index % size * stride


# -- laws: from the launch, the same for all slices, or from memory ---------------------------------


def laws(temperatures, out, count, sizes, strides):
    """Write the law of each slice: 8 bytes read and 20 words written, once for all that use them."""
    index = block() * THREADS + thread()
    if index < count:
        law = law_of(number(temperatures, offset(index, sizes, strides)), load_one(out, 0))
        scanned(write_field, (out, index * LAW_WORDS), law)


@traced
def write_field(state, value):
    out, at = state
    store_one(out, at, value)
    return (out, at + 1), at


@traced
def law_in_launch(laws, law, index):
    return as_lanes(law)


@traced
def rate_in_launch(law):
    return Rate(law[18], law[0], law[1], law[10], law[2], law[3])


@traced
def guard_in_launch(law):
    return law[4], law[5], Guard(law[6], law[8], law[9], law[7], None), law[18]


@traced
def gap_in_launch(law):
    return law[11], law[12], law[13], law[14]


@traced
def scaled_in_launch(law):
    return law[16], law[17], law[15]


def law_in_memory(laws, law, index):
    """Where a law is: the launch says how far apart those of neighbouring slices are, 0 if all share one."""
    return laws, index * int(law[0])


@traced
def rate_in_memory(law):
    laws, at = law
    high, low = load_one(laws, at), load_one(laws, at + 1)
    depth, limit = load_one(laws, at + 2), load_one(laws, at + 3)
    return Rate(limit, high, low, load_one(laws, at + 10), depth, limit)


@traced
def guard_in_memory(law):
    laws, at = law
    prescale, cutoff = load_one(laws, at + 6), load_one(laws, at + 7)
    guard = Guard(prescale, load_one(laws, at + 8), load_one(laws, at + 9), cutoff, None)
    return load_one(laws, at + 4), load_one(laws, at + 5), guard, load_one(laws, at + 18)


@traced
def gap_in_memory(law):
    laws, at = law
    inverse, prescale = load_one(laws, at + 11), load_one(laws, at + 12)
    return inverse, prescale, load_one(laws, at + 13), load_one(laws, at + 14)


@traced
def scaled_in_memory(law):
    laws, at = law
    return load_one(laws, at + 16), load_one(laws, at + 17), load_one(laws, at + 15)


law_at, rate_from, guard_from = law_in_launch, rate_in_launch, guard_in_launch
gap_from, scaled_from = gap_in_launch, scaled_in_launch


# -- groups: which slice and which place in it a thread has, and what its group tells it ----------------


@traced
def rows_place():
    """Neighbouring threads share a slice."""
    return block() * SLICES + thread() // GROUP, thread() % GROUP


@traced
def columns_place():
    """Neighbouring threads have neighbouring slices."""
    return block() * SLICES + thread() % SLICES, thread() // SLICES


place = rows_place


@traced
def alone(combine, state, empty, board):
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


@traced
def in_warp(combine, state, empty, board):
    """A group is 8, 16 or 32 lanes of a warp."""
    return in_lanes(combine, state, GROUP)


def in_block(combine, state, empty, board):
    """Each warp leaves its state in shared memory, and each combines all of them: one barrier."""
    state = in_lanes(combine, state, 32)
    room = slots(state)
    if thread() % 32 == 0:
        put(room, thread() // 32, state)
    barrier()
    return in_slots(combine, room, 0, THREADS // 32, empty)


def in_slots(combine, room, first, count, empty):
    """Each warp combines so many states, at most 32, in slots from the first on."""
    lane = thread() % 32
    state = empty
    if lane < count:
        state = get(room, first + lane)
    return in_lanes(combine, state, 32)


def in_column(combine, state, empty, board):
    """The threads of a column leave their states in shared memory, and each combines those of its column."""
    room = slots(state)
    put(room, thread(), state)
    barrier()
    result = get(room, thread() % SLICES)
    for i in range(1, GROUP):
        result = combine(result, get(room, thread() % SLICES + i * SLICES))
    return result


among = in_block


def in_grid(area, combine, state, empty, board):
    """The blocks of a team leave their states in memory, and each combines all of them.

    No area is written again before all have read it, as exchanges by way of different ones lie between.
    """
    told, number, first_area, team, rank, blocks = board
    state = among(combine, state, empty, None)
    own, member = thread() % STATES, thread() // STATES
    first = (team * AREAS + first_area + area) * blocks * STATES + own
    if member == 0:
        tell(told, (first + rank * STATES) * ROOM, number, singles(state))
    result = empty
    for i in range(member, blocks, THREADS // STATES):
        other = hear(told, (first + i * STATES) * ROOM, number, singles(empty))
        result = combine(result, together(other, empty))
    barrier()
    return among(combine, result, empty, None)


def in_cluster(combine, state, empty, board):
    """The blocks of a cluster leave their states in each other's shared memory."""
    _, _, first_area, _, rank, blocks = board
    state = singles(among(combine, state, empty, None))
    room = slots_of_cluster(state)
    own = first_area * LARGEST_CLUSTER * STATES + thread() % STATES
    for other in range(thread() // STATES, blocks, THREADS // STATES):
        put_in(room, own + rank * STATES, state, other)
    arrive()
    await_all()
    if SLICES == 1:
        return in_slots(combine, room, own, blocks, empty)
    result = together(get(room, own), empty)
    for i in range(1, blocks):
        result = combine(result, together(get(room, own + i * STATES), empty))
    return result


@traced
def other_board(board):
    """Other areas for the rare exchanges after the usual ones."""
    told, number, _, team, rank, blocks = board
    return told, number, RARE_AREA, team, rank, blocks


@traced
def nothing():
    """Blocks without a cluster wait for nobody."""


@traced
def same_board(board):
    return board


second_board = same_board


@traced
def top_in_grid(combine, state, empty, board):
    return in_grid(0, combine, state, empty, board)


@traced
def sums_in_grid(combine, state, empty, board):
    return in_grid(1, combine, state, empty, board)


@traced
def parts_in_grid(combine, state, empty, board):
    """The only exchange for most slices: a second one lies between those that use the same area."""
    return in_grid(board[1] % 2, combine, state, empty, board)


exchange = exchange_top = in_warp  # the second one for maxima
exchange_parts = in_cluster


@traced
def my_own(flag):
    """Whether a group goes a way that other groups of its block need not go."""
    return flag


@traced
def any_here(flag):
    """In a block whose groups go ways together, as they meet at its barriers."""
    return anyone_in_block(flag)


anyone = my_own


# -- what each function sums --------------------------------------------------------------------------
# Of softmax, the terms; of the others, ties, the rest and, for the entropy, the moment, as in `log_of_sum`.
# ``_add`` is a step of `scanned` that makes terms or leaves the entries as they are.


@traced
def largest(a, b):
    return (larger(a[0], b[0]),)


@traced
def max_piece(state, x):
    return (larger(x, state[0]),), 0


@traced
def softmax_zero(like):
    """Sums that no term exceeds, so that `add_smaller` does; `softmax_close` takes that number away."""
    return top_term(like), spread(0.0, like)


@traced
def softmax_add(state, x):
    sums, row_max, scale, guard = state
    power, excess, _ = terms(x, scale, guard)
    sums = add_smaller(sums[0], sums[1], power, excess)
    return (sums, row_max, scale, guard), term_of(power, excess)


@traced
def softmax_close(sums, spoil):
    return sums[0] - top_term(sums[0]) + spread(spoil, sums[0]), sums[1]


@traced
def pair_close(sums, spoil):
    return sums[0] + spread(spoil, sums[0]), sums[1]


@traced
def softmax_merge(a, b):
    return merge(a[0], a[1], b[0], b[1])


@traced
def softmax_empty(like):
    return spread(0.0, like), spread(0.0, like)


@traced
def softmax_rescaled(part_max, sums, scale, guard, row_max):
    return rescaled(part_max, sums, scale, guard)


@traced
def split_zero(like):
    zero = spread(0.0, like)
    return zero, zero, zero


@traced
def split_add(state, x):
    sums, row_max, scale, guard = state
    zero, one = spread(0.0, x), spread(1.0, x)
    power, excess, _ = terms(x, scale, guard)
    tied = x == spread(row_max, x)
    power, excess = select(tied, zero, power), select(tied, zero, excess)
    rest, error = add(sums[1], sums[2], power, excess)
    return ((sums[0] + select(tied, one, zero), rest, error), row_max, scale, guard), x


@traced
def split_close(sums, spoil):
    return sums[0], sums[1] + spread(spoil, sums[1]), sums[2]


@traced
def split_merge(a, b):
    rest, error = merge(a[1], a[2], b[1], b[2])
    return a[0] + b[0], rest, error


@traced
def split_rescaled(part_max, sums, scale, guard, row_max):
    return rescaled_split(part_max, sums, scale, guard, row_max)


@traced
def moment_zero(like):
    zero = spread(0.0, like)
    return zero, zero, zero, zero, zero


@traced
def moment_add(state, x):
    sums, row_max, scale, guard = state
    zero, one = spread(0.0, x), spread(1.0, x)
    power, excess, product = terms(x, scale, guard)
    tied = x == spread(row_max, x)
    power, excess = select(tied, zero, power), select(tied, zero, excess)
    rest, error = add(sums[1], sums[2], power, excess)
    moment, lost = merge(sums[3], sums[4], term_of(power, excess) * product, zero)
    return ((sums[0] + select(tied, one, zero), rest, error, moment, lost), row_max, scale, guard), x


@traced
def moment_close(sums, spoil):
    return sums[0], sums[1] + spread(spoil, sums[1]), sums[2], sums[3], sums[4]


@traced
def moment_merge(a, b):
    rest, error = merge(a[1], a[2], b[1], b[2])
    moment, lost = merge(a[3], a[4], b[3], b[4])
    return a[0] + b[0], rest, error, moment, lost


@traced
def moment_rescaled(part_max, sums, scale, guard, row_max):
    ties, rest, error = rescaled_split(part_max, sums, scale, guard, row_max)
    moment, lost = rescaled_moment(part_max, sums, scale, guard)
    return ties, rest, error, moment, lost


zero_sums, add_piece, close_sums = softmax_zero, softmax_add, softmax_close
merge_sums, empty_sums, rescale_sums = softmax_merge, softmax_empty, softmax_rescaled


# -- the same for results of 16 bits ---------------------------------------------------------------------
# These show nothing of what float32 rounds away: x - max is exact to 2**-24 of itself, its product with c is
# at most 160 in a term that shows, and so a term is within 2**-16. That is 4 instructions for `terms` and
# `add_smaller`, where float32 takes 28; two bytes in and two out leave room for 39 per entry on an H100.

LEAST_PRODUCT = (-2.0 * DEPTH[0], -2.0 * DEPTH[1])


@traced
def coarse_terms(x, scale, guard):
    """`terms` by the function unit for 2**x: the power alone, and no excess."""
    zero = spread(0.0, x)
    distance = x - spread(scale.row_max, x)
    if guard is not None:
        distance = guarded(x, guard) - spread(scale.row_max, x)
        distance = (distance * spread(guard.factor, x)) * spread(guard.factor2, x)
    high = spread(scale.high, x)
    power = exp2(fma(distance, high, constant(BIAS, x)))
    product = at_least(distance * high, constant(LEAST_PRODUCT, x))  # finite, as 0 times this is 0
    if guard is None:
        return power, zero, product
    dropped = distance < spread(guard.cutoff, x)
    return select(dropped, zero, power), zero, select(dropped, zero, product)


@traced
def coarse_term_of(power, excess):
    return power


@traced
def coarse_add(total, error, power, excess):
    return total + power, error


@traced
def coarse_merge(total, error, total2, error2):
    return total + total2, error


@traced
def coarse_zero(like):
    return (spread(0.0, like),)


@traced
def coarse_softmax_add(state, x):
    sums, row_max, scale, guard = state
    power, _, _ = terms(x, scale, guard)
    return ((sums[0] + power,), row_max, scale, guard), power


@traced
def coarse_close(sums, spoil):
    return (sums[0] + spread(spoil, sums[0]),)


@traced
def coarse_softmax_merge(a, b):
    return (a[0] + b[0],)


@traced
def coarse_rescaled(part_max, sums, scale, guard, row_max):
    power, _, _ = terms(part_max, scale, guard)
    return (power * (sums[0] / top_term(part_max)),)


@traced
def units_of_coarse(sums, rest):
    """Sums whose unit is 2**origin, from those beside the maximum."""
    return (sums[0] * exp2(rest),)


@traced
def lowered_coarse(sums, distance):
    return (sums[0] * two_to(distance),)


@traced
def coarse_factor(sums):
    return first_inverse(sums[0])


@traced
def times_coarse_factor(factor, term):
    return factor, term * spread(factor, term)


# -- softmax of float32, where a kernel has the whole slice at once -----------------------------------------
# The terms of a slice may share any factor, so they are 2**(x c - origin), with the integer nearest to max c
# as origin. Then n = round(x c - origin) is one fma, nothing of the maximum is left over, and a term is 13
# instructions where `terms` takes 22. Rounded to a float32, it is within 1.1 ulp, a probability within 2.2.

BRIEF = (1.0, *EXP2_OF_HALVES)
MAGIC = 1.5 * 2.0**23  # above which float32s are integers
BRIEF_ZERO = MAGIC + 127.0 + BIAS[0]


@traced
def origin_of(row_max, rate):
    """The integer nearest to max c, but for rounding, and what is left of that."""
    high, magic = spread(rate.high, row_max), spread(MAGIC, row_max)
    origin = (row_max * high + magic) - magic
    return origin, fma(row_max, spread(rate.low, row_max), fma(row_max, high, -origin))


@traced
def brief_scale(row_max, rate):
    """Scale of a plain slice; rest is what n plus the exponent's own zero is from the exponent."""
    high, low = spread(rate.high, row_max), spread(rate.low, row_max)
    origin, _ = origin_of(row_max, rate)
    lowest = row_max - spread(rate.depth, row_max)
    rest, slope = spread(BRIEF_ZERO, row_max) - origin, spread(BRIEF[1], row_max)
    return Scale(row_max, high, low, lowest, origin, rest, slope)


@traced
def brief_terms(x, scale, guard):
    """`terms` as one float32: the power, and no excess."""
    if guard is not None:
        power, excess, product = guarded_terms(x, scale, guard)
        return fma(excess, power, power), spread(0.0, x), product
    x = at_least(x, spread(scale.lowest, x))
    high, rest = spread(scale.high, x), spread(scale.rest, x)
    exponent = fma(x, high, rest)
    near = exponent - rest
    f = fma(x, spread(scale.low, x), fma(x, high, -near))
    return polynomial(f, (BRIEF, BRIEF)) * power_of_two(exponent), spread(0.0, x), f


@traced
def brief_add_smaller(total, error, power, excess):
    """A term has at most the exponent of the total, which is enough."""
    result = total + power
    return result, error + ((total - result) + power)


@traced
def units_of_brief(sums, rest):
    """Sums whose unit is 2**origin: those of brief terms."""
    return sums


@traced
def lowered_brief(sums, distance):
    factor = two_to(distance)
    return sums[0] * factor, sums[1] * factor


in_units, lowered = units_of_brief, lowered_brief


# -- what each function makes of them -------------------------------------------------------------------


@traced
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


@traced
def entries_as_they_are(row, row_max, law):
    return row


@traced
def pair_factor(sums):
    return reciprocal(sums[0], sums[1])


@traced
def times_pair_factor(factor, term):
    high, low = factor
    return factor, times_pair(term, spread(high, term), spread(low, term))


factor_of, times_factor = pair_factor, times_pair_factor


@traced
def softmax_results(row, row_max, sums, law):
    """Terms times the reciprocal of their sum."""
    _, row = scanned(times_factor, factor_of(sums), row)
    return row


@traced
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


@traced
def entropy_of(source, walk, board, row_max, sums, law):
    return own_entropy_value(row_max, sums)


def logsumexp_of(source, walk, board, row_max, sums, law):
    high, low, unit = scaled_from(law)
    value = own_logsumexp_value(row_max, high, low, unit, sums)
    faint = own_misses_faint_terms(row_max, high * unit, sums)
    if anyone(faint):
        other = faint_value(source, walk, board, row_max, high * unit, law)
        value = select(faint, other, value)
    return value


def faint_value(source, walk, board, row_max, temperature, law):
    """Max + T rest, where the terms of the rest are too small beside that of a single maximum.

    As `_slice.logsumexp_of_faint`, from entries that are read twice more. ``walk`` = (first, stop, step) of
    those of this thread.
    """
    start, stop, step = walk
    board = second_board(board)
    lowest, zero, half = spread(-INFINITY, row_max), spread(0.0, row_max), spread(0.5, row_max)
    second = lowest
    for i in range(start, stop, step):
        entry = entry_of(source, i)
        if entry < row_max:
            second = larger(entry, second)
    (second,) = exchange_top(largest, (second,), (lowest,), board)
    high, low, guard, _ = guard_from(law)
    scale, own = bounded_scale(second, high, low, guard)
    sums = zero, zero
    for i in range(start, stop, step):
        entry = entry_of(source, i)
        if entry < row_max:
            power, excess, _ = terms(entry, scale, own)
            sums = add(sums[0], sums[1], power, excess)
    total, error = exchange(softmax_merge, sums, (zero, zero), board)
    # The term of the second at the temperature 2 T is that of its half at T.
    scale, own = bounded_scale(row_max * half, high, low, guard)
    power, excess, _ = terms(second * half, scale, own)
    value = own_faint_value(row_max, temperature, term_of(power, excess), total + error)
    return select(second == lowest, row_max, value)


value_of = logsumexp_of


@traced
def packed_entry(source, i):
    x, base, stride = source
    return load_one(x, base + i * stride)


@traced
def tile_entry(tile, i):
    return load_one(tile, i)


entry_of = packed_entry


# -- one slice in the registers of a group ---------------------------------------------------------------


@traced
def load_piece(state, piece):
    x, base, stride, first, stop = state
    value = load(x, base, stride, first, ACCESS * GROUP, stop)
    return (x, base, stride, first + LANES * GROUP, stop), value


@traced
def store_piece(state, value):
    out, base, stride, first, stop = state
    store(out, base, stride, first, ACCESS * GROUP, stop, value)
    return (out, base, stride, first + LANES * GROUP, stop), 0


@traced
def load_edge(state, value):
    """A piece of which only a part is of the row."""
    x, base, first, stop = state
    return (x, base, first + LANES * GROUP, stop), load_part(x, base, first, stop, value)


@traced
def store_edge(state, value):
    out, base, first, stop = state
    store_part(out, base, first, stop, value)
    return (out, base, first + LANES * GROUP, stop), 0


@traced
def load_row(x, base, stride, shift, member, stop):
    _, row = scanned(load_piece, (x, base, stride, ACCESS * member - shift, stop), PIECES)
    if SHIFTED:
        _, row = scanned(load_edge, (x, base, LANES * member - shift, stop), row)
    return row


@traced
def store_row(out, base, stride, shift, member, stop, row):
    scanned(store_piece, (out, base, stride, ACCESS * member - shift, stop), row)
    if SHIFTED:
        scanned(store_edge, (out, base, LANES * member - shift, stop), row)


@traced
def shift_of(base, skew):
    """How far a row begins behind a multiple of 128 bits."""
    return (base + skew) % LANES if SHIFTED else 0


@traced
def sum_row(row, row_max, scale, guard, spoil):
    state, row = scanned(add_piece, (zero_sums(row[0]), row_max, scale, guard), row)
    return close_sums(state[0], spoil), row


def reduce_row(row, law):
    """Maximum and sums of a slice, and what `add_piece` made of its entries."""
    (top,), _ = scanned(max_piece, (spread(-INFINITY, row[0]),), row)
    (top,) = across(largest, (top,))
    (row_max,) = exchange_top(largest, (top,), (spread(-INFINITY, top),), None)
    rate = rate_from(law)
    if is_plain(row_max, rate):
        sums, row = sum_row(row, row_max, plain_scale(row_max, rate), None, spread(0.0, row_max))
    else:
        high, low, guard, spoil = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        sums, row = sum_row(row, row_max, scale, guard, spoil)
    sums = exchange(merge_sums, across(merge_sums, sums), empty_sums(row_max), None)
    return row_max, sums, row


@traced
def rows_base(index, n, inner, pitch):
    """Where a slice begins, and how far apart its entries are."""
    return index * pitch, 1


@traced
def columns_base(index, n, inner, pitch):
    return index // inner * pitch + index % inner, inner


base_of = rows_base


def transform(x, out, laws, law, count, n, inner, skew, x_pitch, out_pitch):
    """Softmax or log_softmax: each entry is read once and written once."""
    index, member = place()
    last = min(index, count - 1)  # threads without a slice do what others do, and write nothing
    base, stride = base_of(last, n, inner, x_pitch)
    shift = shift_of(base, skew)
    law = law_at(laws, law, last)
    row_max, sums, row = reduce_row(load_row(x, base, stride, shift, member, n), law)
    row = results_of(row, row_max, sums, law)
    base, stride = base_of(last, n, inner, out_pitch)
    if index < count:
        store_row(out, base, stride, shift, member, n, row)


def reduce(x, out, laws, law, count, n, inner, skew, x_pitch, out_pitch):
    """Logsumexp or entropy: each entry is read once (see `faint_value`), one value per slice written."""
    index, member = place()
    last = min(index, count - 1)
    base, stride = base_of(last, n, inner, x_pitch)
    law = law_at(laws, law, last)
    row_max, sums, _ = reduce_row(load_row(x, base, stride, shift_of(base, skew), member, n), law)
    value = value_of((x, base, stride), (member, n, GROUP), None, row_max, sums, law)
    if index < count and member == 0:
        store_one(out, index, value)


# -- short rows: a thread has a row, and a block brings its rows in and out through shared memory ----------
# The block copies its rows as they lie, from a multiple of 128 bits on, and each thread finds its own there,
# entry by entry (PIECES are n, and LANES 1). These rows are not multiples of 128 bits, so at most two meet in
# a bank. A thread has EACH rows, one after the other, so that enough bytes are on their way.


def bring_rows(x, count, n, skew):
    """Bring the rows of the block into shared memory; return the tile, its first row, and where they end."""
    first = block() * (THREADS * EACH)
    stop = skew + min(THREADS * EACH, count - first) * n
    tile = tile_for(x)
    scanned(bring_chunk, (tile, x, first * n - skew, WIDE * thread(), stop), CHUNKS)
    copies_done()
    barrier()
    return tile, first, stop


@traced
def bring_chunk(state, chunk):
    tile, x, base, at, stop = state
    copy_in(tile, at, x, base + at, stop - at)
    return (tile, x, base, at + WIDE * THREADS, stop), 0


@traced
def drain_chunk(state, chunk):
    tile, out, base, at, skew, stop = state
    copy_out(tile, at, out, base, skew, stop)
    return (tile, out, base, at + WIDE * THREADS, skew, stop), 0


@traced
def load_own(state, piece):
    tile, at = state
    return (tile, at + 1), load_one(tile, at)


@traced
def store_own(state, value):
    tile, at = state
    store_one(tile, at, value)
    return (tile, at + 1), 0


def transform_short(x, out, laws, law, count, n, inner, skew, x_pitch, out_pitch):
    """`transform` of rows of at most 32 words."""
    n = len(PIECES)
    tile, first, stop = bring_rows(x, count, n, skew)
    for i in range(thread(), min(THREADS * EACH, count - first), THREADS):
        start = skew + i * n
        _, row = scanned(load_own, (tile, start), PIECES)
        own = law_at(laws, law, first + i)
        row_max, sums, row = reduce_row(row, own)
        scanned(store_own, (tile, start), results_of(row, row_max, sums, own))
    barrier()
    base = first * n - skew
    if ACCESS == WIDE:
        scanned(drain_chunk, (tile, out, base, WIDE * thread(), skew, stop), CHUNKS)
    else:
        for i in range(skew + thread(), stop, THREADS):
            store_one(out, base + i, load_one(tile, i))


def reduce_short(x, out, laws, law, count, n, inner, skew, x_pitch, out_pitch):
    """`reduce` of rows of at most 32 words."""
    n = len(PIECES)
    tile, first, _ = bring_rows(x, count, n, skew)
    for i in range(thread(), min(THREADS * EACH, count - first), THREADS):
        _, row = scanned(load_own, (tile, skew + i * n), PIECES)
        index = first + i
        own = law_at(laws, law, index)
        row_max, sums, _ = reduce_row(row, own)
        store_one(out, index, value_of((x, index * n, 1), (0, n, 1), None, row_max, sums, own))


# -- long slices: a block, or a team of blocks, keeps a row or some neighbouring columns in shared memory ----
# Registers of a multiprocessor hold the rows of one or two blocks only, and while these compute nothing is
# loaded or stored. Shared memory holds two to five tiles of more, and registers only what is being computed.
# A row is taken from the multiple of 128 bits before it on (``shift`` entries), so all rows are read and
# written so; what a tile holds before and behind the row is -inf. A column takes one place in each line of
# its tile. Teams of the grid take one slice, or one group of columns, after the other, a cluster takes one.


def places_of(base, skew, n, share, rank):
    """How far apart places of a block's tile and of the row are, and where its share and its tile end."""
    shift = (base + skew) % LANES
    before = shift - rank * share
    stop = max(0, min(n + before, share))
    return before, stop, (stop + LANES - 1) // LANES * LANES


PORTIONS = 4  # of a tile, as `parts_of_tile` waits for each


def bring_row(tile, x, base, places):
    """Begin to bring a block's share of a row. A thread reads only what it has itself brought."""
    before, stop, size = places
    arrive()
    whole = stop // LANES * LANES
    if thread() == stop // LANES % THREADS:
        copy_in(tile, whole, x, base - before + whole, stop - whole)
    at, last = small(LANES * thread()), small(whole)
    step = portion_of(size)
    for i in range(1, PORTIONS + 1):
        end = last if i == PORTIONS else min(small(i * step), last)
        while at < end:
            copy_in(tile, at, x, base - before + at, LANES)
            at = further(at, LANES * THREADS)
        commit()


@traced
def portion_of(size):
    """Entries of a portion of a tile, of which computation begins when it is there."""
    return -(-size // (PORTIONS * LANES * THREADS)) * (LANES * THREADS)


def clear_around(tile, places):
    """Make -inf of what a tile holds before and behind a row, in the pieces of those who have its ends."""
    before, stop, size = places
    lowest = spread(-INFINITY, load_one(tile, 0))
    if thread() == 0:
        for i in range(before):
            store_one(tile, i, lowest)
    if thread() == stop // LANES % THREADS:
        for i in range(stop, size):
            store_one(tile, i, lowest)


def bring_columns(tile, x, base, inner, width, rows):
    """Bring so many rows of a group of columns, of which ``width`` are there; return the size of the tile."""
    lines = SLICES // LANES
    arrive()
    for i in range(thread(), rows * lines, THREADS):
        at = i % lines * LANES
        if at < width:
            copy_in(tile, i * LANES, x, base + i // lines * inner + at, LANES)
    lowest = spread(-INFINITY, load_one(x, base))
    size = -(-rows * SLICES // (LANES * THREADS)) * (LANES * THREADS)
    for i in range(rows * SLICES + thread(), size, THREADS):
        store_one(tile, i, lowest)
    copies_done()
    barrier()
    return size


def top_of_tile(tile, first, stop):
    """Maximum of what a thread has between two places of a tile."""
    top = spread(-INFINITY, peek(tile, 0))
    at, last = small(first + first_in_tile()), small(stop)
    while at < last:
        top = larger(peek(tile, at), top)
        at = further(at, LANES * THREADS)
    return across_tile(largest, (top,))


def sum_tile(tile, first, stop, row_max, scale, guard, spoil):
    """Sums of what a thread has there, where terms take the place of entries if KEPT."""
    state = (zero_sums(peek(tile, 0)), row_max, scale, guard)
    at, last = small(first + first_in_tile()), small(stop)
    while at < last:
        state, term = add_piece(state, peek(tile, at))
        if KEPT:
            keep(tile, at, term)
        at = further(at, LANES * THREADS)
    return across_tile(merge_sums, close_sums(state[0], spoil))


def sums_of_tile(tile, size, row_max, law):
    rate = rate_from(law)
    if everywhere(is_plain(row_max, rate)):
        return sum_tile(tile, 0, size, row_max, plain_scale(row_max, rate), None, spread(0.0, row_max))
    high, low, guard, spoil = guard_from(law)
    scale, own = bounded_scale(row_max, high, low, guard)
    return sum_tile(tile, 0, size, row_max, scale, own, spoil)


@traced
def reduce_tile(tile, places, board, law):
    """Maximum and sums of slices that are on their way to a tile."""
    size = places[2]
    copies_done()
    clear_around(tile, places)
    (top,) = top_of_tile(tile, 0, size)
    await_all()
    (row_max,) = exchange_top(largest, (top,), (spread(-INFINITY, top),), board)
    sums = sums_of_tile(tile, size, row_max, law)
    return row_max, exchange(merge_sums, sums, empty_sums(row_max), board)


# Blocks of a team wait for each other until the slowest has its entries, and while they wait nothing is
# loaded: on an H100 one exchange more costs rows of 128256 entries 4 % of their speed. So each thread sums
# each portion of its entries, as soon as it is there, beside a maximum of its own, in units of a power of
# two, and there is one exchange, of maxima and sums (see `_cuda_plan.is_at_once`). The rest of what
# is lost is that blocks wait for the slowest: without any exchange such rows have a copy's speed, and neither
# blocks that stay for the next row nor bringing that while this one is written gained.

# A slice is as usual if its origin is finite and not so low that parts that are not plain count beside it.
USUAL_ORIGINS = 128.0, 2.0**15 - 128.0  # middle and distance
LEAST_EXPONENT = -126.0


def parts_of_tile(tile, places, rate):
    """Parts, as `part_of_tile` has them, of what a thread has in a tile, by portions."""
    size = places[2]
    step = portion_of(size)
    three_left()
    clear_around(tile, places)
    first = part_of_tile(tile, 0, min(step, size), rate)
    two_left()
    second = part_of_tile(tile, step, min(2 * step, size), rate)
    one_left()
    third = part_of_tile(tile, 2 * step, min(3 * step, size), rate)
    copies_done()
    return first, second, third, part_of_tile(tile, 3 * step, size, rate)


@traced
def all_together(parts, board):
    """Maximum, origin and sums of a slice, and whether it is as usual, which all its threads agree on."""
    first, second, third, fourth = parts
    part = merge_beside(merge_beside(first, second), merge_beside(third, fourth))
    lowest = spread(-INFINITY, part[0])
    await_all()
    whole = exchange_parts(merge_beside, part, (lowest, lowest, *empty_sums(lowest)), board)
    middle, distance = USUAL_ORIGINS
    return whole, abs(whole[1] - spread(middle, lowest)) <= spread(distance, lowest)


def finish_again(tile, places, board, law, source, target):
    """`finish_row` of softmax of 16 bits: terms are worked out twice, as a tile has no room for them."""
    whole, is_usual = all_together(parts_of_tile(tile, places, rate_from(law)), board)
    row_max = whole[0]
    if is_usual:
        _, rest = origin_of(row_max, rate_from(law))
        write_again(write_row, target, row_max, in_units(whole[2:], -rest), law)
    else:
        sums = sums_of_tile(tile, places[2], row_max, law)
        sums = exchange(merge_sums, sums, empty_sums(row_max), second_board(board))
        write_again(write_row, target, row_max, sums, law)


def finish_kept(tile, places, board, law, source, target):
    """`finish_row` of softmax of float32: terms take the place of entries, in a unit for each portion.

    A slice that is not as usual is read again, as its entries are gone.
    """
    parts = parts_of_tile(tile, places, rate_from(law))
    whole, is_usual = all_together(parts, board)
    if is_usual:
        first, second, third, fourth = parts
        origins = first[1], second[1], third[1], fourth[1]
        write_portions(target, origins, whole[1], factor_of(whole[2:]))
    else:
        x, base = source
        bring_row(tile, x, base, places)
        finish_row(tile, places, second_board(board), law, source, target)


@traced
def part_of_tile(tile, first, stop, rate):
    """Maximum, origin and sums of what a thread has between two places of a tile.

    A part that is not plain counts for nothing (origin -inf), or the slice is not as usual (inf).
    """
    (top,) = top_of_tile(tile, first, stop)
    lowest, zero = spread(-INFINITY, top), spread(0.0, top)
    plain = is_plain(top, rate)
    inside = select(plain, top, zero)
    sums = sum_tile(tile, first, stop, inside, plain_scale(inside, rate), None, zero)
    origin, rest = origin_of(inside, rate)
    origin = select(plain, origin, select(top < zero, lowest, -lowest))
    return (top, origin, *in_units(sums, rest))


@traced
def merge_beside(a, b):
    """Maximum, origin and sums of two parts together."""
    origin = larger(a[1], b[1])
    sums = merge_sums(lowered(a[2:], a[1] - origin), lowered(b[2:], b[1] - origin))
    return (larger(a[0], b[0]), origin, *sums)


@traced
def two_to(distance):
    """Power of two for a distance of origins, at most 0; NaN if neither part has anything."""
    least = larger(distance, spread(LEAST_EXPONENT, distance))
    return power_of_two(least + spread(MAGIC + 127.0, distance))


@traced
def lanes_apart(combine, state):
    """Where lanes are slices."""
    return state


across_tile = across


@traced
def first_in_row():
    return LANES * thread()


@traced
def first_in_columns():
    return thread()


first_in_tile = first_in_row


def write_row(step, state, target):
    """Write what a step makes of the entries of a tile to a row, from ``base`` on."""
    tile, out, base, (before, stop, _) = target
    start, end = stop, stop
    if ACCESS == LANES:
        start = min(stop, max(0, (before + LANES - 1) // LANES * LANES))
        end = max(start, stop // LANES * LANES)
        at, last = small(start + LANES * thread()), small(end)
        while at < last:
            _, value = step(state, peek(tile, at))
            store_lanes(out, base - before + at, value)
            at = further(at, LANES * THREADS)
    # Entries of others, as all terms have been kept since the last exchange.
    for i in range(max(before, 0) + thread(), start, THREADS):
        _, single = step(state, load_one(tile, i))
        store_one(out, base - before + i, single)
    for i in range(end + thread(), stop, THREADS):
        _, single = step(state, load_one(tile, i))
        store_one(out, base - before + i, single)


@traced
def write_portions(target, origins, origin, factor):
    """Write terms to a row, each portion from its own origin; a thread writes those that it has made."""
    places = target[3]
    step = portion_of(places[2])
    first, second, third, fourth = origins
    write_portion(target, 0, step, moved(factor, first - origin))
    write_portion(target, step, 2 * step, moved(factor, second - origin))
    write_portion(target, 2 * step, 3 * step, moved(factor, third - origin))
    write_portion(target, 3 * step, places[2], moved(factor, fourth - origin))


@traced
def moved(factor, distance):
    """Two factors for terms whose origin is so far below: both are normal where a result is."""
    high, low = factor
    far = two_to(distance - larger(distance, spread(LEAST_EXPONENT, distance)))
    return two_to(distance), high * far, low * far


@traced
def moved_piece(factors, term):
    near, high, low = factors
    _, share = times_factor((high, low), term * spread(near, term))
    return share


def write_portion(target, first, stop, factors):
    tile, out, base, (before, end, _) = target
    begin = max(before, 0)
    at, last = small(first + LANES * thread()), small(min(stop, end // LANES * LANES))
    while at < last:
        share = moved_piece(factors, peek(tile, at))
        if at >= begin:
            store_lanes(out, base - before + at, share)
        else:
            store_part(out, base - before + begin, at - begin, end - begin, share)
        at = further(at, LANES * THREADS)
    if at < min(stop, end):
        share = moved_piece(factors, peek(tile, at))
        store_part(out, base - before + begin, at - begin, end - begin, share)


def write_columns(step, state, target):
    """Write what a step makes of the entries of a tile to columns; this thread's begins at ``base``."""
    tile, out, base, inner, width, size = target
    rows = THREADS // SLICES
    for i in range(thread(), size, LANES * THREADS):
        _, value = step(state, peek(tile, i))
        if thread() % SLICES < width:
            store(out, base, inner, i // SLICES, rows, size // SLICES, value)


@traced
def write_kept(write, target, row_max, sums, law):
    """Softmax, from terms in the tile."""
    write(times_factor, factor_of(sums), target)


def write_again(write, target, row_max, sums, law):
    """Softmax, from entries in the tile."""
    factor = factor_of(sums)
    rate = rate_from(law)
    if everywhere(is_plain(row_max, rate)):
        write(share_piece, (plain_scale(row_max, rate), None, factor), target)
    else:
        high, low, guard, _ = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        write(share_piece, (scale, guard, factor), target)


@traced
def share_piece(state, x):
    scale, guard, factor = state
    power, excess, _ = terms(x, scale, guard)
    _, share = times_factor(factor, term_of(power, excess))
    return state, share


def write_logs(write, target, row_max, sums, law):
    log_sum = own_log_of_sum(row_max, sums)
    rate = rate_from(law)
    if is_plain(row_max, rate):
        write(log_piece, (plain_gap(row_max, rate, log_sum), None), target)
    else:
        inverse, prescale, factor, cutoff = gap_from(law)
        write(log_piece, bounded_gap(row_max, inverse, prescale, factor, cutoff, log_sum), target)


write_results = write_kept


@traced
def finish_row(tile, places, board, law, source, target):
    """Write a row that is on its way to a tile; ``source`` is where it comes from."""
    row_max, sums = reduce_tile(tile, places, board, law)
    write_results(write_row, target, row_max, sums, law)


finish = finish_row


@traced
def board_of(told, number, blocks):
    """What `exchange` needs to know."""
    return told, number, 0, block() // blocks, block() % blocks, blocks


def transform_rows(x, out, told, laws, law, count, n, share, blocks, skew, x_pitch, out_pitch):
    """`transform` of long rows: each entry is read once, or twice in `finish_kept`, and written once."""
    tile = tile_for(x)
    teams = blocks_of_grid() // blocks
    for index in range(block() // blocks, count, teams):
        board = board_of(told, index // teams + 1, blocks)
        places = places_of(index * x_pitch, skew, n, share, block() % blocks)
        bring_row(tile, x, index * x_pitch, places)
        own = law_at(laws, law, index)
        target = tile, out, index * out_pitch, places
        finish(tile, places, board, own, (x, index * x_pitch), target)
        barrier()


def reduce_rows(x, out, told, laws, law, count, n, share, blocks, skew, x_pitch, out_pitch):
    """`reduce` of long rows."""
    tile = tile_for(x)
    teams = blocks_of_grid() // blocks
    for index in range(block() // blocks, count, teams):
        board = board_of(told, index // teams + 1, blocks)
        places = places_of(index * x_pitch, skew, n, share, block() % blocks)
        bring_row(tile, x, index * x_pitch, places)
        size = places[2]
        own = law_at(laws, law, index)
        row_max, sums = reduce_tile(tile, places, board, own)
        value = value_of(tile, (thread(), size, THREADS), board, row_max, sums, own)
        if thread() == 0 and block() % blocks == 0:
            store_one(out, index, value)
        barrier()


def columns_at(index, n, share, blocks, inner):
    """Which slices a group of columns has, and which rows of them a block."""
    groups = -(-inner // SLICES)
    first = index % groups * SLICES
    start = block() % blocks * share
    return index // groups, first, min(SLICES, inner - first), start, max(0, min(share, n - start))


def transform_columns(x, out, told, laws, law, count, n, share, blocks, inner, x_pitch, out_pitch):
    """`transform` of columns, SLICES at a time: each entry is read once and written once."""
    tile = tile_for(x)
    teams = blocks_of_grid() // blocks
    for index in range(block() // blocks, count, teams):
        board = board_of(told, index // teams + 1, blocks)
        outer, first, width, start, rows = columns_at(index, n, share, blocks, inner)
        base = start * inner + first
        size = bring_columns(tile, x, outer * x_pitch + base, inner, width, rows)
        slot = thread() % SLICES
        own = law_at(laws, law, outer * inner + first + min(slot, width - 1))
        row_max, sums = reduce_tile(tile, (0, size, size), board, own)
        base += outer * out_pitch + slot
        write_results(write_columns, (tile, out, base, inner, width, rows * SLICES), row_max, sums, own)
        barrier()


def reduce_columns(x, out, told, laws, law, count, n, share, blocks, inner, x_pitch, out_pitch):
    """`reduce` of columns."""
    tile = tile_for(x)
    teams = blocks_of_grid() // blocks
    for index in range(block() // blocks, count, teams):
        board = board_of(told, index // teams + 1, blocks)
        outer, first, width, start, rows = columns_at(index, n, share, blocks, inner)
        size = bring_columns(tile, x, outer * x_pitch + start * inner + first, inner, width, rows)
        slice_ = outer * inner + first + min(thread() % SLICES, width - 1)
        own = law_at(laws, law, slice_)
        row_max, sums = reduce_tile(tile, (0, size, size), board, own)
        value = value_of(tile, (thread(), size, THREADS), board, row_max, sums, own)
        if thread() < width and block() % blocks == 0:
            store_one(out, slice_, value)
        barrier()


# The same for softmax at one temperature: a thread has the LANES neighbouring columns of one access, in each
# THREADS / PARTS-th row, and so reads and writes 128 bits at a time.


def bring_lines(tile, x, base, inner, size):
    """Begin to bring some rows of SLICES columns; a thread reads only what it has itself brought."""
    arrive()
    at, last = small(LANES * thread()), small(size)
    from_ = base + thread() % PARTS * LANES + thread() // PARTS * inner
    while at < last:
        copy_in(tile, at, x, from_, LANES)
        from_ += THREADS // PARTS * inner
        at = further(at, LANES * THREADS)


def among_lines(combine, state, empty, board):
    """The threads of the same columns first tell each other in a warp, then by way of shared memory."""
    step = 16
    while step >= PARTS:
        state = combine(state, together(shuffle(singles(state), (1 << 32) - 1, step), state))
        step = step // 2
    own = singles(state)
    room = slots(own)
    if thread() % 32 < PARTS:
        put(room, thread() // 32 * PARTS + thread() % 32, own)
    barrier()
    result = together(get(room, thread() % PARTS), state)
    for i in range(1, THREADS // 32):
        result = combine(result, together(get(room, thread() % PARTS + i * PARTS), state))
    return result


def write_lines(step, state, target):
    tile, out, base, inner, size = target
    at, last = small(LANES * thread()), small(size)
    to = base + thread() // PARTS * inner
    while at < last:
        _, value = step(state, peek(tile, at))
        store_lanes(out, to, value)
        to += THREADS // PARTS * inner
        at = further(at, LANES * THREADS)


def transform_lines(x, out, told, laws, law, count, n, share, blocks, inner, x_pitch, out_pitch):
    """`transform_columns` of softmax at one temperature."""
    tile = tile_for(x)
    teams = blocks_of_grid() // blocks
    own = law_at(laws, law, 0)
    for index in range(block() // blocks, count, teams):
        board = board_of(told, index // teams + 1, blocks)
        outer, first, width, start, rows = columns_at(index, n, share, blocks, inner)
        size = rows * SLICES if thread() % PARTS * LANES < width else 0  # 0 for threads without columns
        base = start * inner + first
        bring_lines(tile, x, outer * x_pitch + base, inner, size)
        row_max, sums = reduce_tile(tile, (0, size, size), board, own)
        base += outer * out_pitch + thread() % PARTS * LANES
        write_results(write_lines, (tile, out, base, inner, size), row_max, sums, own)
        barrier()


# -- split slices: a group takes a part, and leaves its maximum and sums for the others ------------------
# The slices from start on, of which those before count are there: what changes between launches comes first.


def summarise(start, count, x, work, laws, law, n, inner, x_pitch, parts):
    """Write the maximum and sums of part y of a slice: each entry is read once."""
    slot, member = place()
    index = min(start + slot, count - 1)
    base, stride = base_of(index, n, inner, x_pitch)
    first = part() * CAPACITY
    row = load_row(x, base + first * stride, stride, 0, member, n - first)
    row_max, sums, _ = reduce_row(row, law_at(laws, law, index))
    if start + slot < count and member == 0:
        scanned(write_field, (work, (slot * parts + part()) * FIELDS), (row_max, *sums))


@traced
def read_field(state, field):
    work, at = state
    return (work, at + 1), load_one(work, at)


@traced
def sums_at(work, at, like):
    _, sums = scanned(read_field, (work, at), like)
    return sums


def merge_parts(work, first, parts, member, law, like):
    """Maximum and sums of a slice from those of its parts."""
    top = spread(-INFINITY, like)
    for i in range(member, parts, GROUP):
        top = larger(load_one(work, (first + i) * FIELDS), top)
    (row_max,) = exchange_top(largest, (top,), (spread(-INFINITY, like),), None)
    empty = empty_sums(like)
    sums = empty
    rate = rate_from(law)
    if is_plain(row_max, rate):
        scale = plain_scale(row_max, rate)
        for i in range(member, parts, GROUP):
            at = (first + i) * FIELDS
            part_sums = sums_at(work, at + 1, empty)
            sums = merge_sums(sums, rescale_sums(load_one(work, at), part_sums, scale, None, row_max))
    else:
        high, low, guard, _ = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        for i in range(member, parts, GROUP):
            at = (first + i) * FIELDS
            part_sums = sums_at(work, at + 1, empty)
            sums = merge_sums(sums, rescale_sums(load_one(work, at), part_sums, scale, guard, row_max))
    return row_max, exchange(merge_sums, sums, empty, None)


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
    row = load_row(x, base + first * stride, stride, 0, member, n - first)
    row_max = load_one(totals, (index - start) * FIELDS)
    sums = sums_at(totals, (index - start) * FIELDS + 1, empty_sums(row_max))
    row = results_of(entries_again(row, row_max, law), row_max, sums, law)
    base, stride = base_of(index, n, inner, out_pitch)
    stop = n - first if start + slot < count else 0
    store_row(out, base + first * stride, stride, 0, member, stop, row)


def reduce_parts(start, count, x, out, work, laws, law, n, inner, x_pitch, out_pitch, parts):
    """Write the value of a slice from its parts."""
    slot, member = place()
    index = min(start + slot, count - 1)
    base, stride = base_of(index, n, inner, x_pitch)
    law = law_at(laws, law, index)
    row_max, sums = merge_parts(work, (index - start) * parts, parts, member, law, load_one(work, 0))
    value = value_of((x, base, stride), (member, n, GROUP), None, row_max, sums, law)
    if start + slot < count and member == 0:
        store_one(out, index, value)


# -- slices of any strides, with or without a mask --------------------------------------------------------
# Entries are read three times, or twice for one value per slice; the L2 cache serves all but the first.


@traced
def strided_entry(source, i):
    """An entry, or -inf where the mask is False."""
    x, base, mask, mask_base, sizes, strides, mask_strides = source
    value = load_one(x, base + offset(i, sizes, strides))
    if MASKED:
        seen = byte(mask, mask_base + offset(i, sizes, mask_strides)) != 0
        value = select(seen, value, spread(-INFINITY, value))
    return value


@traced
def is_seen(source, i):
    _, _, mask, mask_base, sizes, _, mask_strides = source
    return byte(mask, mask_base + offset(i, sizes, mask_strides)) != 0


def reduce_entries(source, n, member, law, like):
    """Maximum and sums of a slice whose entries are read as they are needed."""
    lowest = spread(-INFINITY, like)
    top = lowest
    for i in range(member, n, GROUP):
        top = larger(entry_of(source, i), top)
    (row_max,) = exchange_top(largest, (top,), (lowest,), None)
    rate = rate_from(law)
    if is_plain(row_max, rate):
        state = (zero_sums(like), row_max, plain_scale(row_max, rate), None)
        for i in range(member, n, GROUP):
            state, _ = add_piece(state, entry_of(source, i))
        sums = close_sums(state[0], spread(0.0, like))
    else:
        high, low, guard, spoil = guard_from(law)
        scale, guard = bounded_scale(row_max, high, low, guard)
        guarded = (zero_sums(like), row_max, scale, guard)
        for i in range(member, n, GROUP):
            guarded, _ = add_piece(guarded, entry_of(source, i))
        sums = close_sums(guarded[0], spoil)
    return row_max, exchange(merge_sums, sums, empty_sums(like), None)


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
        for i in range(member, n, GROUP):
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
    value = value_of(source, (member, n, GROUP), None, row_max, sums, law)
    if MASKED:
        one, zero = spread(1.0, like), spread(0.0, like)
        seen = zero
        for i in range(member, n, GROUP):
            if is_seen(source, i):
                seen = one
        (seen,) = exchange_top(largest, (seen,), (zero,), None)
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
        "write_results": write_kept,
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
        "write_results": write_logs,
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

BRIEFLY = {
    "terms": brief_terms,
    "term_of": coarse_term_of,
    "add_smaller": brief_add_smaller,
    "plain_scale": brief_scale,
}

COARSE = {"terms": coarse_terms, "term_of": coarse_term_of}

# Not for any strides: a thread may sum so many terms there that float32 alone is off by 0.4 ulp of float16.
COARSE_SUMS = {"add": coarse_add, "merge": coarse_merge}

COARSE_SOFTMAX = {
    "zero_sums": coarse_zero,
    "add_piece": coarse_softmax_add,
    "close_sums": coarse_close,
    "merge_sums": coarse_softmax_merge,
    "empty_sums": coarse_zero,
    "rescale_sums": coarse_rescaled,
    "factor_of": coarse_factor,
    "times_factor": times_coarse_factor,
    "in_units": units_of_coarse,
    "lowered": lowered_coarse,
    "write_results": write_again,
}

# Softmax of long rows, by the bytes of their entries.
AT_ONCE = {2: {"finish": finish_again}, 4: {"finish": finish_kept}}

# A thread of a strided kernel may sum so many terms that the error of the pair cannot hold the small ones.
FROM_NOTHING = {"zero_sums": softmax_empty, "add_smaller": add, "close_sums": pair_close}

GROUPS = {
    "thread": {"place": rows_place, "exchange": alone, "exchange_top": alone},
    "warp": {"place": rows_place, "exchange": in_warp, "exchange_top": in_warp},
    "block": {"place": rows_place, "exchange": in_block, "exchange_top": in_block},
    "column": {
        "place": columns_place,
        "exchange": in_column,
        "exchange_top": in_column,
        "anyone": any_here,
        "base_of": columns_base,
    },
}

WITHOUT_CLUSTER = {"arrive": nothing, "await_all": nothing}
TEAMS = {
    "": WITHOUT_CLUSTER,
    "grid": WITHOUT_CLUSTER
    | {
        "exchange": sums_in_grid,
        "exchange_top": top_in_grid,
        "exchange_parts": parts_in_grid,
        "second_board": other_board,
    },
    "cluster": {
        "exchange": in_cluster,
        "exchange_top": in_cluster,
        "exchange_parts": in_cluster,
        "second_board": other_board,
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
