"""Kernels and schedules for learning with temperature: losses, gradients, fitting and solving for T.

Arrays come as in `_cpu`: C-contiguous (outer, n) or (outer, n, inner), reduced over n, one sample for each
of the outer * inner slices; temperatures are one float64 or one for each sample. Labels are the classes, one
integer for each sample, or probabilities, an array like the logits; then there are no classes, and else the
probabilities are None. Every loss is a float64, and results are summed over samples afterwards, so the number
of threads changes no bit.

The terms beside those of the maximum are summed by themselves: with R for their share of the mass, a sure
prediction has the loss log(1 + R / (1 - R)) and the gradient -R / T at its label, where log(p) and p - 1
would cancel.
"""

import math
from collections import namedtuple

import numpy as np

from fastmax import _slice
from fastmax._columns import TILE_BYTES, Tiles, next_tile, shares_of, touch_rows
from fastmax._jit import jit
from fastmax._lanes import (
    LANE_BYTES,
    as_float64,
    constant,
    fma,
    get,
    lane_count,
    load,
    load_as,
    no_lanes,
    piece_size,
    pointer,
    put,
    read,
    read_wide,
    select,
    spread,
    store,
    store_first,
    workspace,
    write,
)
from fastmax._math import (
    LARGEST,
    LARGEST_MULTIPLIER,
    LOG_2,
    Rate,
    add,
    guarded_scale,
    is_plain,
    larger,
    log_one_plus,
    merge,
    plain_scale,
    rate_of,
    reciprocal,
    term_of,
    terms,
    times_pair,
    top_term,
)
from fastmax._rows import STORED_BYTES, pack_rows, soon_for_row, unpack_rows
from fastmax._slice import CHUNK, Soon, fetch, is_new, lane_maxima, later, sum_lanes, touch_new
from fastmax._threads import PARALLEL_ROWS, Kernel, each_span, each_task, parts_for
from fastmax._tiles import (
    NORMALIZER,
    are_plain,
    lane_rates,
    mixed_scales,
    no_guard,
    padded_size,
    part_of,
    put_scale,
    rate_at,
    read_guard,
    read_scale,
    temperature_at,
    workspaces,
)
from fastmax._tracing import traced

# Rows up to so many entries are taken many at a time, transposed, one in each lane.
SHORT = 96

# Bytes of a vector of columns up to which it is copied into a tile; longer ones are read where they lie.
COLUMN_BYTES = 2**20

# Below this temperature 1 / T may show terms that plain slices raise to the lowest of a scale.
LEAST_PLAIN_TEMPERATURE = 1.0 / 64.0

# Exponents of 1 / T that a gradient takes before it is rounded, and after.
LARGEST_BEFORE = (60.0, 400.0)
LARGEST_AFTER = (120.0, 1000.0)

# Factor of probabilities, and of distances, whose sums overflow without it.
SMALL_UNIT = (2.0**-82, 2.0**-540)

Mass = namedtuple("Mass", "high low tie tie_low before after last")
Mass.__doc__ = """How the gradient follows from the terms; see `write_gradient`."""

Labels = namedtuple("Labels", "x at step")
Labels.__doc__ = """Probabilities: the first index, and the step from one vector of them to the next."""


@traced
def pointer_to(array):
    """Pointer to the first entry of an array, None for None."""
    return None if array is None else pointer(array)


@traced
def unless_none(array, value):
    """``value``, or None if the array is None."""
    return None if array is None else value


@traced
def labels_at(x, at, step):
    """`Labels`, or None if x is None."""
    return None if x is None else Labels(x, at, step)


@traced
def vectors_of(shape, like):
    """Number of vectors of columns."""
    outer, _, inner = shape
    return outer * -(-inner // lane_count(like))


@jit
def vector_of(task, shape, like):
    """First and stop of the entries of a vector of columns, how many columns it has, and its first slice."""
    _, n, inner = shape
    vectors = -(-inner // lane_count(like))
    i, first = task // vectors, task % vectors * lane_count(like)
    start = i * n * inner + first
    return start, start + n * inner, min(lane_count(like), inner - first), i * inner + first


# -- passes ---------------------------------------------------------------------------------------
# A pass reads ``width`` lanes at the indices start, start + step, ... below stop: the lanes of a row, of
# columns in a tile, or of columns where they lie.


@jit
def lane_tops(x, start, stop, step, width):
    """Largest entry in each lane, NaN left out; -inf if there is none."""
    lowest = spread(-math.inf, x)
    top = lowest
    i = start
    while i < stop:
        top = larger(read(x, i, min(stop - i, width), lowest), top)
        i += step
    return top


@jit
def lane_rests(x, start, stop, step, width, row_max, scale, guard, stored, at, soon):
    """Number of maximal entries, and the sum of the terms of the others as a pair.

    All terms are written to ``stored``, unless that is None.
    """
    lanes = lane_count(x)
    zero, one = spread(0.0, x), spread(1.0, x)
    ties = rest = error = zero
    top = spread(row_max, x)
    i = start
    while i < stop:
        fetch(soon, (i - start) // step)
        entries = read(x, i, min(stop - i, width), spread(-math.inf, x))
        power, excess, _ = terms(entries, scale, guard)
        if stored is not None:
            store(stored, at, term_of(power, excess))
            at += lanes
        ties = ties + select(entries == top, one, zero)
        rest, error = add(rest, error, select(entries == top, zero, power), excess)
        i += step
    return ties, rest, error


@jit
def sum_rests(x, start, stop, step, width, row_max, scale, guard, stored, at, soon):
    """`lane_rests` over all chunks, merged."""
    lanes = lane_count(x)
    ties = rest = error = spread(0.0, x)
    for first in range(start, stop, CHUNK * step):
        last, ahead = min(stop, first + CHUNK * step), (first - start) // step
        part = lane_rests(
            x,
            first,
            last,
            step,
            width,
            row_max,
            scale,
            guard,
            stored,
            at + ahead * lanes,
            later(soon, ahead),
        )
        ties = ties + part[0]
        rest, error = merge(rest, error, part[1], part[2])
    return ties, rest, error


@jit
def lane_targets(x, at, x_step, probs, start, stop, step, width, row_max, units, floor):
    """Sums of the probabilities q of labels and of q (max - x), as pairs; where that is infinite.

    It is so where an entry that is not above the floor, nor the maximum, has a label; where q is 0 it is 0.
    ``units`` are the factors of q and of max - x.
    """
    zero, one = spread(0.0, probs), spread(1.0, probs)
    weight = weight_error = moment = moment_error = lost = zero
    top, lowest = spread(row_max, probs), spread(floor, probs)
    unit, factor = spread(units[0], probs), spread(units[1], probs)
    i = start
    while i < stop:
        count = min(stop - i, width)
        entries, q = read(x, at, count, top), read(probs, i, count, zero) * unit
        weight, weight_error = merge(weight, weight_error, q, zero)
        scaled, scaled_top = entries * factor, top * factor
        distance = scaled_top - scaled
        virtual = scaled_top - distance
        distance_lost = (scaled_top - (distance + virtual)) + (virtual - scaled)
        distance = select(entries > lowest, distance, zero)
        distance = select(entries == top, zero, distance)
        distance_lost = select(distance == zero, zero, distance_lost)
        product = q * distance
        moment, moment_error = merge(
            moment, moment_error, product, fma(q, distance_lost, fma(q, distance, -product))
        )
        missed = select(q == zero, lost, one)
        lost = select(entries == top, lost, select(entries > lowest, lost, missed))
        i += step
        at += x_step
    return weight, weight_error, moment, moment_error, lost


@jit
def sum_targets(x, x_start, x_step, probs, start, stop, step, width, row_max, units, floor):
    """`lane_targets` over all chunks, merged."""
    zero = spread(0.0, probs)
    weight = weight_error = moment = moment_error = lost = zero
    for first in range(start, stop, CHUNK * step):
        last, at = min(stop, first + CHUNK * step), x_start + (first - start) // step * x_step
        part = lane_targets(x, at, x_step, probs, first, last, step, width, row_max, units, floor)
        weight, weight_error = merge(weight, weight_error, part[0], part[1])
        moment, moment_error = merge(moment, moment_error, part[2], part[3])
        lost = lost + part[4]
    return weight, weight_error, moment, moment_error, lost


@jit
def write_gradient(x, stored, at, probs, start, stop, step, width, scale, guard, mass, out, shift):
    """Write (p - q) / T for each entry, from its stored term, or by its scale; q is 0 where probs is None.

    ``mass`` has 1 / sum as a pair (high, low), the gradient of maximal entries where q is 0 as a pair (tie,
    tie_low; infinite where it is not to be used), and 1 / T as three factors: one before the result is
    rounded, two after. Where the label is a class, the result is 0 or infinite before the last would matter.
    """
    lanes = lane_count(x)
    zero = spread(0.0, x)
    high, low = spread(mass.high, x), spread(mass.low, x)
    before, after = spread(mass.before, x), spread(mass.after, x)
    term = zero
    i = start
    while i < stop:
        count = min(stop - i, width)
        if scale is not None:
            power, excess, _ = terms(read(x, i, count, zero), scale, guard)
            term = term_of(power, excess)
        if stored is not None:
            term = load(stored, at)
            at += lanes
        value = times_pair(term, high, low)
        if probs is not None:
            label = read(probs.x, probs.at + (i - start) // step * probs.step, count, zero) * before
            tie = (spread(mass.tie, x) - label) + spread(mass.tie_low, x)
            value = value - label
            tie = select(term == top_term(x), tie, value)
            value = select(spread(mass.tie, x) < spread(math.inf, x), tie, value)
        value = value * after
        if probs is not None:
            value = value * spread(mass.last, x)
        write(out, i + shift, count, value)
        i += step


# -- one sample: from sums to its loss and its gradient ------------------------------------------------


@traced
def label_distance(row_max, logit, temperature):
    """(max - logit) / T in float64."""
    top, entry = as_float64(row_max), as_float64(logit)
    zero, quarter, infinite = spread(0.0, top), spread(0.25, top), spread(math.inf, top)
    difference = top - entry
    # The difference of finite numbers may overflow.
    gap = (top * quarter - entry * quarter) / temperature * spread(4.0, top)
    gap = select(difference < infinite, difference / temperature, gap)
    gap = select(entry == -infinite, infinite, select(top == infinite, infinite, gap))
    return select(entry == top, zero, gap)


@traced
def others_of(row_max, ties, rest, error, factor):
    """Sum of all terms but that of one maximum, in units of it, times a factor; NaN if all is -inf."""
    top = as_float64(row_max)
    one, factor = spread(1.0, top), spread(factor, top)
    unit = factor / as_float64(top_term(row_max))
    others = (as_float64(ties) - one) * factor + (as_float64(rest) * unit + as_float64(error) * unit)
    return select(top == -spread(math.inf, top), spread(math.nan, top), others)


@traced
def share_of(x, row_max, scale, guard):
    """Term of an entry in float64, in units of that of the maximum."""
    power, excess, _ = terms(x, scale, guard)
    power = as_float64(power) / as_float64(top_term(power))
    return select(x == row_max, spread(1.0, power), fma(as_float64(excess), power, power))


@jit
def label_terms(row_max, temperature):
    """Units with which no difference of entries overflows, and the floor of `lane_targets`."""
    huge = abs(row_max) >= constant(LARGEST_MULTIPLIER, row_max)
    floor = row_max if temperature == 0.0 or row_max == math.inf else -spread(math.inf, row_max)
    return (spread(1.0, row_max), spread(0.25 if huge else 1.0, row_max)), floor


@traced
def units_after(units, weight, moment):
    """Units for sums that had these values: the small ones if they are not finite."""
    small = constant(SMALL_UNIT, units[0])
    finite = (weight - weight) + (moment - moment) == spread(0.0, weight)
    return select(finite, units[0], small), select(finite, units[1], small)


@jit
def target_weight(units, total):
    """Sum of probabilities from that in units."""
    unit = np.float64(units[0])
    return total / unit if unit < 1.0 else total


@jit
def target_loss(log_sum, temperature, units, total, moment, lost):
    """Loss of a sample whose labels are probabilities."""
    unit, prescale = np.float64(units[0]), np.float64(units[1])
    gap = 0.0
    if unit < 1.0:
        # The product of the units, or of one and T, may be beyond the range of exponents.
        if 0.0 < temperature < math.inf:
            fraction, exponent = math.frexp(temperature)
            shift = 2 - math.frexp(unit)[1] - math.frexp(prescale)[1]
            gap = math.ldexp(moment / fraction, shift - exponent)
    elif moment != 0.0:
        gap = moment / temperature / prescale
    loss = target_weight(units, total) * log_sum + gap
    return loss + math.inf if lost > 0.0 else loss


@jit
def gradient_factors(temperature, samples, like):
    """1 / (T samples) as a product: two powers of two, to be taken before rounding and last, and a number."""
    if temperature == math.inf:
        return 1.0, 0.0, 1.0
    fraction, exponent = math.frexp(temperature)
    fraction, more = math.frexp(fraction * samples)
    exponent = -exponent - more
    before = clipped(exponent, constant(LARGEST_BEFORE, like))
    after = clipped(exponent - before, constant(LARGEST_AFTER, like))
    last = clipped(exponent - before - after, constant(LARGEST_AFTER, like))
    return math.ldexp(1.0, before), math.ldexp(1.0 / fraction, after), math.ldexp(1.0, last)


@jit
def clipped(exponent, limit):
    """The integer that is nearest to an exponent, of those up to a limit."""
    return min(max(exponent, -int(limit)), int(limit))


@traced
def mass_of(row_max, ties, rest, error, weight, before, after, last):
    """Return the `Mass` of samples whose labels sum to a weight; the other factors are 1 / (T samples)."""
    top = as_float64(row_max)
    unit = spread(1.0, top) / as_float64(top_term(row_max))
    empty = top == -spread(math.inf, top)
    share = select(empty, spread(math.nan, top), as_float64(rest) * unit)
    share_error = as_float64(error) * unit
    total, total_error = merge(as_float64(ties), spread(0.0, top), share, share_error)
    inverse, inverse_low = reciprocal(total, total_error)
    high = inverse * weight
    low = fma(inverse, weight, -high) + inverse_low * weight
    # Where the maxima have less than half of the mass nothing cancels, and this would round more.
    sure = (share + share_error) * inverse < spread(0.5, top)
    tie = select(sure, weight / as_float64(ties), spread(math.inf, top))
    tie_low = -(share + share_error) * (inverse + inverse_low) * tie
    high, low = pair(high * (unit * before), low * (unit * before), row_max)
    tie, tie_low = pair(tie * before, tie_low * before, row_max)
    before, after, last = spread(before, row_max), spread(after, row_max), spread(last, row_max)
    return Mass(high, low, tie, tie_low, before, after, last)


@traced
def pair(high, low, like):
    """Numbers in float64 as pairs in the dtype of ``like``."""
    rounded = spread(high, like)
    return rounded, spread((high - as_float64(rounded)) + low, like)


@traced
def label_gradient(others, raised, share, before, after, like):
    """Gradient at labels: minus the mass of the other classes, over T; ``raised`` is others times before."""
    one = spread(1.0, others)
    missed = select(share == one, raised, ((others + one) - share) * before)
    return spread(missed / (others + one) * -after, like)


@traced
def gradient_rate(temperature, like):
    """`rate_of` for terms that are to be divided by T."""
    return never_plain_below(LEAST_PLAIN_TEMPERATURE, rate_of(temperature, like))


@traced
def never_plain_below(temperature, rate):
    """Rates, of which those at lower temperatures are without plain slices."""
    lower = rate.temperature < spread(temperature, rate.temperature)
    limit = select(lower, -spread(1.0, rate.limit), rate.limit)
    return Rate(rate.temperature, rate.high, rate.low, rate.inverse, rate.depth, limit)


@jit
def gradient_rate_at(rate, temperature, i, like):
    """Rate of sample i, given that of another."""
    own = temperature_at(temperature, i)
    return rate if own == rate.temperature else gradient_rate(own, like)


# -- rows -----------------------------------------------------------------------------------------
# A row is read once from memory: its maximum, its sums and, from terms kept in the first cache, its gradient
# follow while it is there; the next is fetched meanwhile. Short rows are taken in the tiles below.


@Kernel
def cross_entropy_rows(team, parts, x, classes, probs, temperature, samples, losses, out):
    """Losses and gradients of rows whose terms a thread keeps."""
    work = workspaces(parts, padded_size(x.shape[1], x), x)
    arguments = x, classes, probs, temperature, samples, losses, out, work
    each_span(kept_row_losses, team, parts, len(x), arguments)


@jit
def kept_row_losses(first, stop, part, x, classes, probs, temperature, samples, losses, out, work):
    """`row_losses` from stored terms."""
    stored = pointer(part_of(work, part))
    row_losses(first, stop, part, x, classes, probs, temperature, samples, losses, out, stored)


@Kernel
def cross_entropy_long_rows(team, parts, x, classes, probs, temperature, samples, losses, out):
    """Losses of rows and, unless out is None, gradients; for these, terms are computed twice."""
    arguments = x, classes, probs, temperature, samples, losses, out, None
    each_span(row_losses, team, parts, len(x), arguments)


@jit
def row_losses(first, stop, part, x, classes, probs, temperature, samples, losses, out, stored):
    """Losses and gradients of some rows, from stored terms, or, if ``stored`` is None, computed anew."""
    n = x.shape[1]
    entries = pointer(x)
    like = get(entries, 0)
    rate = gradient_rate(temperature_at(temperature, first), like)
    for i in range(first, stop):
        rate = gradient_rate_at(rate, temperature, i, like)
        own = rate.temperature
        row_max = _slice.maximum(entries, i * n, i * n + n)
        if is_plain(row_max, rate):
            scale = plain_scale(row_max, rate)
            loss = row_loss(x, classes, probs, samples, out, i, stored, row_max, own, scale, None)
        else:
            scale, guard = guarded_scale(row_max, own)
            loss = row_loss(x, classes, probs, samples, out, i, stored, row_max, own, scale, guard)
        losses[i] = loss


@jit
def row_loss(x, classes, probs, samples, out, i, stored, row_max, temperature, scale, guard):
    """Loss of row i; its gradient is written to out, unless that is None."""
    n = x.shape[1]
    entries, start, stop, lanes = pointer(x), i * n, i * n + n, lane_count(x)
    results, labels = pointer_to(out), labels_at(pointer_to(probs), start, lanes)
    soon = soon_for_row(entries, start, n, min(stop, x.size - n), results, start)
    touch_new(results, start, stop)
    sums = sum_rests(entries, start, stop, lanes, lanes, row_max, scale, guard, stored, 0, soon)
    ties, _ = sum_lanes(sums[0], spread(0.0, x))
    rest, error = sum_lanes(sums[1], sums[2])
    others = others_of(row_max, ties, rest, error, 1.0)
    log_sum = log_one_plus(others)
    weight, label = 1.0, start
    if probs is None:
        label = start + classes[i]
        loss = log_sum + label_distance(row_max, get(entries, label), temperature)
    else:
        units, floor = label_terms(row_max, temperature)
        total = moment = 0.0
        lost = spread(0.0, row_max)
        for _ in range(2):
            targets = sum_targets(
                entries, start, lanes, pointer(probs), start, stop, lanes, lanes, row_max, units, floor
            )
            total, total_error = sum_lanes(targets[0], targets[1])
            moment, moment_error = sum_lanes(targets[2], targets[3])
            lost, _ = sum_lanes(targets[4], spread(0.0, x))
            total = np.float64(total) + np.float64(total_error)
            moment = np.float64(moment) + np.float64(moment_error)
            following = units_after(units, total, moment)
            if following[0] == units[0]:
                break
            units = following
        loss = target_loss(log_sum, temperature, units, total, moment, lost)
        weight = target_weight(units, total)
    if out is not None:
        before, after, last = gradient_factors(temperature, samples, row_max)
        mass = mass_of(row_max, ties, rest, error, weight, before, after, last)
        if stored is not None:
            write_gradient(
                entries, stored, 0, labels, start, stop, lanes, lanes, None, None, mass, results, 0
            )
        else:
            write_gradient(
                entries, None, 0, labels, start, stop, lanes, lanes, scale, guard, mass, results, 0
            )
        if probs is None:
            share = share_of(get(entries, label), row_max, scale, guard)
            raised = others_of(row_max, ties, rest, error, before)
            put(results, label, label_gradient(others, raised, share, before, after, row_max))
    return loss


# -- columns, and short rows transposed --------------------------------------------------------------
# One sample in each lane, so that what a sample costs beside its entries is shared by all lanes. Entries are
# copied to working memory, where terms and then gradients take their place, and gradients back: one read and
# one write of memory. Columns too tall for that are read three times where they lie. Numbers for each sample,
# their fields, stand before the tile: those of Scale and Guard, then these.

_LABEL, _MAX, _TARGETS, _UNITS, _FLOOR, _FACTORS, _FIELDS = (NORMALIZER + i for i in (0, 1, 2, 7, 9, 10, 14))

Samples = namedtuple("Samples", "outer n inner class_step sample_step")
Samples.__doc__ = (
    """Where entries lie: entry i of sample (j, k) at (j n inner) + i class_step + k sample_step."""
)


@traced
def sizes_of(shape):
    """Shape of the array that `Samples` lie in."""
    return shape.outer, shape.n, shape.inner


@jit
def tile_size(n, samples, takers, arrays, like):
    """Samples of a tile: whole lanes of so many arrays that fit its bytes, and tiles for all takers."""
    lanes = lane_count(like)
    fit = TILE_BYTES // (n * arrays * lanes * like.itemsize)
    share = -(-samples // (lanes * takers))
    return lanes * max(1, min(fit, share, 32))


@jit
def pack(x, base, shape, count, work, at):
    """Copy the entries of ``count`` samples to working memory, a vector of samples after the other."""
    lanes, n, step = lane_count(work), shape.n, shape.sample_step
    if step == 1:
        zero = spread(0.0, work)
        for i in range(n):
            for j in range(0, count, lanes):
                store(work, at + j * n + i * lanes, read(x, base + i * shape.class_step + j, count - j, zero))
        return
    for j in range(0, count, lanes):
        # Lanes without a sample get the last one, so that they are as plain as others.
        pack_rows(x, base + j * step, step, n, min(lanes, count - j), work, at + j * n)


@jit
def unpack(work, at, shape, count, out, base):
    """Copy the entries of ``count`` samples back from working memory."""
    lanes, n, step = lane_count(work), shape.n, shape.sample_step
    if step == 1:
        for i in range(n):
            for j in range(0, count, lanes):
                write(out, base + i * shape.class_step + j, count - j, load(work, at + j * n + i * lanes))
        return
    for j in range(0, count, lanes):
        rows = min(lanes, count - j)
        unpack_rows(work, at + j * n, out, base + j * step, n, rows, out, spread(0.0, get(work, at)))


@Kernel
def cross_entropy_tiles(team, parts, x, classes, probs, shape, temperature, samples, losses, out):
    """Losses of samples and, unless out is None, gradients, tile by tile."""
    arrays = 1 if probs is None else 2
    lanes = lane_count(x)
    shares = shares_of(shape.outer, parts)
    takers = parts // shares
    width = tile_size(shape.n, shape.inner, takers, arrays, workspace(1, x))
    new = is_new(pointer_to(out), x.size)
    tiles = Tiles(width, -(-shape.inner // width), 0, False, new, shares, takers * width)
    work = workspaces(parts, (_FIELDS + piece_size(x)) * lanes + arrays * shape.n * width, x)
    arguments = tiles, x, classes, probs, shape, temperature, samples, losses, out, work
    each_task(tile_losses, team, parts, shape.outer * tiles.count, arguments, shares)


@jit
def tile_losses(task, part, tiles, x, classes, probs, shape, temperature, samples, losses, out, work):
    """Losses and gradients of a tile."""
    entries, w, lanes, n = pointer(x), pointer(part_of(work, part)), lane_count(work), shape.n
    i, first = task // tiles.count, task % tiles.count * tiles.width
    count = min(tiles.width, shape.inner - first)
    base = i * n * shape.inner + first * shape.sample_step
    tile = _FIELDS * lanes
    pack(entries, base, shape, count, w, tile)
    if probs is not None:
        pack(pointer(probs), base, shape, count, w, tile + tiles.width * n)
    across = shape.sample_step == 1
    if tiles.new:
        rows, columns = (n, count) if across else (1, count * n)
        touch_rows(pointer_to(out), base, shape.class_step, rows, columns)
    for j in range(0, count, lanes):
        at = tile + j * n
        place = base + (j if across else j * n)
        following = place + (next_tile(first, tiles.distance, shape.inner) - first) * shape.sample_step
        step = shape.class_step if across else lanes
        number, present = i * shape.inner + first + j, min(lanes, count - j)
        store(w, _MAX * lanes, lane_maxima(w, at, at + n * lanes))
        labels = labels_at(unless_none(probs, w), at + tiles.width * n, lanes)
        soon = Soon(entries, following, step, pointer_to(out), place, step)
        kept = unless_none(out, w)
        vector_losses(
            w, at, lanes, lanes, n, classes, labels, temperature, samples, losses, number, present,
            kept, kept, w, soon,
        )  # fmt: skip
    if out is not None:
        unpack(w, tile, shape, count, pointer(out), base)


@Kernel
def cross_entropy_tall(team, parts, x, classes, probs, shape, temperature, samples, losses, out):
    """Losses of columns and, unless out is None, gradients; each vector of columns is read where it lies."""
    work = workspaces(parts, _FIELDS * lane_count(x), x)
    arguments = x, classes, probs, shape, temperature, samples, losses, out, work
    each_task(tall_losses, team, parts, vectors_of(sizes_of(shape), x), arguments, 1)


@jit
def tall_losses(task, part, x, classes, probs, shape, temperature, samples, losses, out, work):
    """Losses and gradients of a vector of columns."""
    entries, w, lanes = pointer(x), pointer(part_of(work, part)), lane_count(work)
    n, inner = shape.n, shape.inner
    start, stop, present, number = vector_of(task, sizes_of(shape), x)
    top = lane_tops(entries, start, stop, inner, present)
    store(w, _MAX * lanes, top)
    for k in range(present, lanes):
        put(w, _MAX * lanes + k, get(w, _MAX * lanes))
    labels = labels_at(pointer_to(probs), start, inner)
    results = pointer_to(out)
    vector_losses(
        entries, start, inner, present, n, classes, labels, temperature, samples, losses, number, present,
        None, results, w, None,
    )  # fmt: skip


@jit
def vector_losses(
    x, start, step, width, n, classes, labels, temperature, samples, losses, number, count,
    stored, out, w, soon,
):  # fmt: skip
    """Losses of a vector of samples, of which ``count`` are there; gradients are written unless out is None.

    ``labels`` is None or the `Labels` of the first of them; maxima stand in a field. What a sample costs
    beside its entries is worked out in lanes: with 10 classes, float32, it takes 12 ns for 43 one by one.
    """
    lanes, stop = lane_count(w), start + n * step
    row_max = load(w, _MAX * lanes)
    rate = rate_at(temperature, number, get(w, 0))
    rates = lane_rates(temperature, number, count, rate, w)
    rates = never_plain_below(LEAST_PLAIN_TEMPERATURE, rates)
    if labels is None:
        for k in range(count):
            put(w, _LABEL * lanes + k, get(x, start + classes[number + k] * step + k))
    else:
        vector_targets(x, start, step, width, n, labels, temperature, number, row_max, w)
    plain, plain_scales = are_plain(row_max, rates), plain_scale(row_max, rates)
    if plain:
        sums = sum_rests(x, start, stop, step, width, row_max, plain_scales, None, stored, start, soon)
        share = share_of(load(w, _LABEL * lanes), row_max, plain_scales, None)
    else:
        scale, guard = mixed_scales(row_max, plain_scales, rates, temperature, number, w, 0, lanes)
        sums = sum_rests(x, start, stop, step, width, row_max, scale, guard, stored, start, soon)
        share = share_of(load(w, _LABEL * lanes), row_max, scale, guard)
    ties, rest, error = sums
    others = others_of(row_max, ties, rest, error, 1.0)
    log_sum = log_one_plus(others)
    if labels is None:
        value = log_sum + label_distance(row_max, load(w, _LABEL * lanes), rates.temperature)
        store_first(pointer(losses), number, count, value)
        weight = spread(1.0, others)
    else:
        weight = target_losses(log_sum, temperature, losses, number, count, w)
    if out is not None:
        before, after, last = lane_factors(temperature, samples, number, w)
        mass = mass_of(row_max, ties, rest, error, weight, before, after, last)
        if labels is None:
            raised = others_of(row_max, ties, rest, error, before)
            store(w, _LABEL * lanes, label_gradient(others, raised, share, before, after, row_max))
        if stored is not None:
            write_gradient(x, stored, start, labels, start, stop, step, width, None, None, mass, out, 0)
        elif plain:
            write_gradient(x, None, 0, labels, start, stop, step, width, plain_scales, None, mass, out, 0)
        else:
            scale, guard = read_scale(w, 0, lanes), read_guard(w, 0, lanes)
            write_gradient(x, None, 0, labels, start, stop, step, width, scale, guard, mass, out, 0)
        if labels is None:
            for k in range(count):
                put(out, start + classes[number + k] * step + k, get(w, _LABEL * lanes + k))


@jit
def vector_targets(x, start, step, width, n, labels, temperature, number, row_max, w):
    """Write the `sum_targets` of a vector of samples to their fields."""
    lanes = lane_count(w)
    for k in range(lanes):
        own = temperature_at(temperature, number + k)
        units, floor = label_terms(get(w, _MAX * lanes + k), own)
        put(w, _UNITS * lanes + k, units[0])
        put(w, (_UNITS + 1) * lanes + k, units[1])
        put(w, _FLOOR * lanes + k, floor)
    floor, stop = load(w, _FLOOR * lanes), labels.at + n * labels.step
    for _ in range(2):
        units = load(w, _UNITS * lanes), load(w, (_UNITS + 1) * lanes)
        targets = sum_targets(
            x, start, step, labels.x, labels.at, stop, labels.step, width, row_max, units, floor
        )
        store(w, _TARGETS * lanes, targets[0])
        store(w, (_TARGETS + 1) * lanes, targets[1])
        store(w, (_TARGETS + 2) * lanes, targets[2])
        store(w, (_TARGETS + 3) * lanes, targets[3])
        store(w, (_TARGETS + 4) * lanes, targets[4])
        following = units_after(units, targets[0] + targets[1], targets[2] + targets[3])
        if no_lanes(following[0] < units[0]):
            break
        store(w, _UNITS * lanes, following[0])
        store(w, (_UNITS + 1) * lanes, following[1])


@jit
def target_losses(log_sum, temperature, losses, number, count, w):
    """Losses of a vector of samples whose labels are probabilities; return the sums of these."""
    lanes = lane_count(w)
    for k in range(count):
        total, _, units = target_sums(w, k)
        losses[number + k] = target_weight(units, total)
    weight = load_as(losses, number, count, 1.0, w)
    store_first(pointer(losses), number, count, log_sum)
    for k in range(count):
        total, moment, units = target_sums(w, k)
        lost, own = get(w, (_TARGETS + 4) * lanes + k), temperature_at(temperature, number + k)
        losses[number + k] = target_loss(losses[number + k], own, units, total, moment, lost)
    return weight


@jit
def target_sums(w, k):
    """Sums of probabilities and of their products with distances, and the units of both, of one lane."""
    lanes = lane_count(w)
    total = np.float64(get(w, _TARGETS * lanes + k)) + np.float64(get(w, (_TARGETS + 1) * lanes + k))
    moment = np.float64(get(w, (_TARGETS + 2) * lanes + k)) + np.float64(get(w, (_TARGETS + 3) * lanes + k))
    return total, moment, (get(w, _UNITS * lanes + k), get(w, (_UNITS + 1) * lanes + k))


@jit
def lane_factors(temperature, samples, number, w):
    """The `gradient_factors` of a vector of samples."""
    lanes = lane_count(w)
    factors = gradient_factors(temperature_at(temperature, number), samples, get(w, 0))
    for k in range(lanes):
        if len(temperature) > 1:
            factors = gradient_factors(temperature_at(temperature, number + k), samples, get(w, 0))
        put(w, _FACTORS * lanes + k, spread(factors[0], get(w, 0)))
        put_pair(w, _FACTORS + 1, k, factors[1])
        put(w, (_FACTORS + 3) * lanes + k, spread(factors[2], get(w, 0)))
    before, last = load(w, _FACTORS * lanes), load(w, (_FACTORS + 3) * lanes)
    return as_float64(before), pair_at(w, _FACTORS + 1), as_float64(last)


@traced
def put_pair(w, number, k, value):
    """Write a float64 to lane k of two fields."""
    lanes = lane_count(w)
    high, low = pair(value, 0.0, get(w, 0))
    put(w, number * lanes + k, high)
    put(w, (number + 1) * lanes + k, low)


@traced
def pair_at(w, number):
    """Numbers in float64 from two fields."""
    lanes = lane_count(w)
    return as_float64(load(w, number * lanes)) + as_float64(load(w, (number + 1) * lanes))


# -- products with the Jacobian ------------------------------------------------------------------------
# Two passes: a sum over the slice, exact to a pair, and the result. The second reads from the cache what the
# first has read from memory. The sum is of p g for softmax and of g for log_softmax, where ``log`` is True.


@jit
def lane_products(probs, cotangent, start, stop, step, width, log):
    """Sum of the products, or of the cotangents unless ``log`` is None, as a pair in each lane."""
    zero = spread(0.0, probs)
    total = error = zero
    i = start
    while i < stop:
        count = min(stop - i, width)
        g = read(cotangent, i, count, zero)
        if log is None:
            p = read(probs, i, count, zero)
            product = p * g
            total, error = merge(total, error, product, fma(p, g, -product))
        else:
            total, error = merge(total, error, g, zero)
        i += step
    return total, error


@jit
def sum_products(probs, cotangent, start, stop, step, width, log):
    """`lane_products` over all chunks, merged."""
    total = error = spread(0.0, probs)
    for first in range(start, stop, CHUNK * step):
        last = min(stop, first + CHUNK * step)
        part, part_error = lane_products(probs, cotangent, first, last, step, width, log)
        total, error = merge(total, error, part, part_error)
    return total, error


@jit
def write_products(probs, cotangent, start, stop, step, width, total, error, factors, log, out):
    """Write p (g - total) / T, or (g - p total) / T unless ``log`` is None; 1 / T comes as three factors.

    Of the first, what is above 1 comes before all else: of a subnormal p nothing is lost, then.
    """
    zero, one = spread(0.0, probs), spread(1.0, probs)
    total, error = spread(total, probs), spread(error, probs)
    before, after, last = spread(factors[0], probs), spread(factors[1], probs), spread(factors[2], probs)
    first = larger(before, one)
    before = before / first
    i = start
    while i < stop:
        count = min(stop - i, width)
        p, g = read(probs, i, count, zero) * first, read(cotangent, i, count, zero)
        if log is None:
            value = p * ((g - total) - error)
        else:
            value = fma(-p, error, fma(-p, total, g * first))
        write(out, i, count, ((value * before) * after) * last)
        i += step


@Kernel
def vjp_rows(team, parts, probs, cotangent, temperature, out, log):
    """Product of the cotangent with the Jacobian of softmax, or log_softmax, in each row."""
    each_task(vjp_row, team, parts, len(probs), (probs, cotangent, temperature, out, log))


@jit
def vjp_row(i, part, probs, cotangent, temperature, out, log):
    """`vjp_rows` of row i."""
    n, lanes = probs.shape[1], lane_count(probs)
    p, g, results = pointer(probs), pointer(cotangent), pointer(out)
    start, stop = i * n, i * n + n
    total, error = sum_products(p, g, start, stop, lanes, lanes, log)
    total, error = sum_lanes(total, error)
    factors = gradient_factors(temperature_at(temperature, i), 1, get(p, 0))
    write_products(p, g, start, stop, lanes, lanes, total, error, factors, log, results)


@Kernel
def vjp_columns(team, parts, probs, cotangent, temperature, out, log):
    """Product of the cotangent with the Jacobian of softmax, or log_softmax, in each column."""
    work = workspaces(parts, 3 * lane_count(probs), probs)
    arguments = probs, cotangent, temperature, out, log, work
    each_task(vjp_vector, team, parts, vectors_of(probs.shape, probs), arguments)


@jit
def vjp_vector(task, part, probs, cotangent, temperature, out, log, work):
    """`vjp_columns` of a vector of columns."""
    inner, lanes, w = probs.shape[2], lane_count(probs), pointer(part_of(work, part))
    p, g, results = pointer(probs), pointer(cotangent), pointer(out)
    start, stop, width, number = vector_of(task, probs.shape, probs)
    total, error = sum_products(p, g, start, stop, inner, width, log)
    for j in range(lanes):
        before, after, last = gradient_factors(temperature_at(temperature, number + j), 1, get(w, 0))
        put(w, j, spread(before, get(w, 0)))
        put(w, lanes + j, spread(after, get(w, 0)))
        put(w, 2 * lanes + j, spread(last, get(w, 0)))
    factors = load(w, 0), load(w, lanes), load(w, 2 * lanes)
    write_products(p, g, start, stop, inner, width, total, error, factors, log, results)


def vjp(probs, cotangent, temperature, out, log):
    """Write the product for slices over axis 1 of arrays (outer, n) or (outer, n, inner)."""
    parts = parts_for(probs.size, PARALLEL_ROWS)
    run = vjp_rows if probs.ndim == 2 else vjp_columns
    run(parts, probs, cotangent, temperature, out, log)


# -- fitting a temperature -----------------------------------------------------------------------------
# With b = 1 / T and d = max - x, the loss of a sample is log(sum(exp(-b d))) + b d_label. Its derivatives in
# b are d_label - E[d] and the variance of d. One pass over the logits gives mean and variance of b d for each
# sample, all of it in float64, for float32 terms would leave 1e-9 of T unknown.

# Rows of the table of `fit_start`, with a column for each sample: the maximum, the weight and, of d times a
# factor, the sum, the label's, the mean and the variance; the logarithm of the number of entries above -inf.
_TOP, _WEIGHT, _WIDTH, _GAP, _MEAN, _VARIANCE, _LOG_COUNT, FIT_ROWS = 0, 1, 2, 3, 4, 5, 6, 7


@jit
def wide_tops(x, start, stop, step, width, like):
    """Largest entry in each lane of float64, NaN left out."""
    lowest = spread(-math.inf, like)
    top = lowest
    i = start
    while i < stop:
        top = larger(read_wide(x, i, min(stop - i, width), lowest), top)
        i += step
    return top


@jit
def lane_uniform(x, start, stop, step, width, top, factor, like):
    """Number of entries above -inf, and sums of d and d**2 over them, for d = (max - x) factor."""
    zero, one, lowest = spread(0.0, like), spread(1.0, like), spread(-math.inf, like)
    number = first = second = zero
    top, factor = spread(top, like), spread(factor, like)
    i = start
    while i < stop:
        entries = read_wide(x, i, min(stop - i, width), lowest)
        number = number + select(entries == lowest, zero, one)
        distance = select(entries == lowest, zero, top * factor - entries * factor)
        distance = select(entries == top, zero, distance)
        first = first + distance
        second = fma(distance, distance, second)
        i += step
    return number, first, second


@jit
def lane_label_gaps(x, probs, start, stop, step, width, top, factor, like):
    """Sums of the probabilities q of labels and of q d; where q is 0, so is q d."""
    zero = spread(0.0, like)
    weight = gap = zero
    top, factor = spread(top, like), spread(factor, like)
    i = start
    while i < stop:
        count = min(stop - i, width)
        entries, q = read_wide(x, i, count, zero), read_wide(probs, i, count, zero)
        distance = select(entries == top, zero, top * factor - entries * factor)
        weight = weight + q
        gap = gap + select(q == zero, zero, q * distance)
        i += step
    return weight, gap


@jit
def write_start(table, i, top, number, first, second, weight, gap):
    """Write what `fit_start` found for a sample; a maximum of +inf has all the mass at every T."""
    mean = first / number
    variance = second / number - mean * mean
    log_count = math.log(number)
    if top == math.inf and first == first:
        weight = first = mean = variance = log_count = 0.0
    table[_TOP, i] = top
    table[_WEIGHT, i] = weight
    table[_WIDTH, i] = first if weight != 0.0 else 0.0
    table[_GAP, i] = gap
    table[_MEAN, i] = mean * weight
    table[_VARIANCE, i] = variance * weight
    table[_LOG_COUNT, i] = log_count * weight


@Kernel
def fit_start_rows(team, parts, x, classes, probs, factor, table):
    """Find what a fit needs of each row."""
    each_task(fit_start_row, team, parts, len(x), (x, classes, probs, factor, table))


@jit
def fit_start_row(i, part, x, classes, probs, factor, table):
    """Find what a fit needs of row i."""
    n = x.shape[1]
    lanes = lane_count(table)
    entries, zero = pointer(x), spread(0.0, table)
    start, stop = i * n, i * n + n
    top = np.float64(_slice.maximum(entries, start, stop))
    sums = lane_uniform(entries, start, stop, lanes, lanes, top, factor, table)
    number, _ = sum_lanes(sums[0], zero)
    first, _ = sum_lanes(sums[1], zero)
    second, _ = sum_lanes(sums[2], zero)
    if probs is None:
        weight, gap = 1.0, label_gap(top, get(entries, start + classes[i]), factor)
    else:
        labels = lane_label_gaps(entries, pointer(probs), start, stop, lanes, lanes, top, factor, table)
        weight, _ = sum_lanes(labels[0], zero)
        gap, _ = sum_lanes(labels[1], zero)
    write_start(table, i, top, number, first, second, weight, gap)


@jit
def label_gap(top, logit, factor):
    """D at a label."""
    entry = np.float64(logit)
    return 0.0 if entry == top else top * factor - entry * factor


@Kernel
def fit_start_columns(team, parts, x, classes, probs, factor, table):
    """Find what a fit needs of each column."""
    work = workspaces(parts, 6 * lane_count(table), table)
    arguments = x, classes, probs, factor, table, work
    each_task(fit_start_vector, team, parts, vectors_of(x.shape, table), arguments)


@jit
def fit_start_vector(task, part, x, classes, probs, factor, table, work):
    """Find what a fit needs of a vector of columns."""
    inner = x.shape[2]
    lanes = lane_count(table)
    entries, w = pointer(x), pointer(part_of(work, part))
    start, stop, width, number = vector_of(task, x.shape, table)
    top = wide_tops(entries, start, stop, inner, width, table)
    sums = lane_uniform(entries, start, stop, inner, width, top, factor, table)
    store(w, 0, top)
    store(w, lanes, sums[0])
    store(w, 2 * lanes, sums[1])
    store(w, 3 * lanes, sums[2])
    if probs is not None:
        labels = lane_label_gaps(entries, pointer(probs), start, stop, inner, width, top, factor, table)
        store(w, 4 * lanes, labels[0])
        store(w, 5 * lanes, labels[1])
    for j in range(width):
        own = get(w, j)
        if probs is None:
            label = start + classes[number + j] * inner + j
            weight, gap = 1.0, label_gap(own, get(entries, label), factor)
        else:
            weight, gap = get(w, 4 * lanes + j), get(w, 5 * lanes + j)
        count, first = get(w, lanes + j), get(w, 2 * lanes + j)
        write_start(table, number + j, own, count, first, get(w, 3 * lanes + j), weight, gap)


@jit
def lane_moments(x, start, stop, step, width, scale, guard, like):
    """Sum of the terms, and of the terms times z and z**2, for z = (x - max) c; two pairs and a float64."""
    zero, lowest = spread(0.0, like), spread(-math.inf, like)
    total = error = first = first_error = second = zero
    i = start
    while i < stop:
        entries = read_wide(x, i, min(stop - i, width), lowest)
        power, excess, product = terms(entries, scale, guard)
        term = term_of(power, excess)
        total, error = add(total, error, power, excess)
        first, first_error = merge(first, first_error, term * product, zero)
        second = fma(term * product, product, second)
        i += step
    return total, error, first, first_error, second


@jit
def write_moments(moments, i, weight, total, error, first, first_error, second):
    """Write the mean and variance of b d, times the weight of a sample."""
    if weight == 0.0:
        moments[0, i] = moments[1, i] = 0.0
        return
    mean = -(first + first_error) / (total + error) * LOG_2
    moments[0, i] = weight * mean
    moments[1, i] = weight * (second / total * (LOG_2 * LOG_2) - mean * mean)


@Kernel
def fit_rows(team, parts, x, table, temperature, moments):
    """Mean and variance of b d in each row, at one temperature."""
    each_task(fit_row, team, parts, len(x), (x, table, rate_of(temperature, 0.0), moments))


@jit
def fit_row(i, part, x, table, rate, moments):
    """Mean and variance of b d in row i."""
    n = x.shape[1]
    lanes = lane_count(table)
    entries, zero = pointer(x), spread(0.0, table)
    start, stop = i * n, i * n + n
    top = table[_TOP, i]
    if is_plain(top, rate):
        scale = plain_scale(top, rate)
        sums = lane_moments(entries, start, stop, lanes, lanes, scale, None, table)
    else:
        scale, guard = guarded_scale(top, rate.temperature)
        sums = lane_moments(entries, start, stop, lanes, lanes, scale, guard, table)
    total, error = sum_lanes(sums[0], sums[1])
    first, first_error = sum_lanes(sums[2], sums[3])
    second, _ = sum_lanes(sums[4], zero)
    write_moments(moments, i, table[_WEIGHT, i], total, error, first, first_error, second)


@Kernel
def fit_columns(team, parts, x, table, temperature, moments):
    """Mean and variance of b d in each column, at one temperature."""
    work = workspaces(parts, NORMALIZER * lane_count(table), table)
    arguments = x, table, rate_of(temperature, 0.0), moments, work
    each_task(fit_vector, team, parts, vectors_of(x.shape, table), arguments)


@jit
def fit_vector(task, part, x, table, rate, moments, work):
    """Mean and variance of b d in a vector of columns."""
    inner = x.shape[2]
    lanes = lane_count(table)
    entries, w = pointer(x), pointer(part_of(work, part))
    start, stop, width, number = vector_of(task, x.shape, table)
    for j in range(lanes):
        top = table[_TOP, number + min(j, width - 1)]
        if is_plain(top, rate):
            put_scale(plain_scale(top, rate), no_guard(top), 1.0, w, j, lanes)
        else:
            scale, guard = guarded_scale(top, rate.temperature)
            put_scale(scale, guard, 0.0, w, j, lanes)
    scale, guard = read_scale(w, 0, lanes), read_guard(w, 0, lanes)
    sums = lane_moments(entries, start, stop, inner, width, scale, guard, table)
    store(w, 0, sums[0])
    store(w, lanes, sums[1])
    store(w, 2 * lanes, sums[2])
    store(w, 3 * lanes, sums[3])
    store(w, 4 * lanes, sums[4])
    for j in range(width):
        total, error, first = get(w, j), get(w, lanes + j), get(w, 2 * lanes + j)
        first_error, second = get(w, 3 * lanes + j), get(w, 4 * lanes + j)
        weight = table[_WEIGHT, number + j]
        write_moments(moments, number + j, weight, total, error, first, first_error, second)


# Sums of distances in this range need no factor, unless those to the labels are less: they may be subnormal.
# With the other factor, neither they nor squares of them overflow.
_LEAST_WIDTH, _MOST_WIDTH, _FACTOR_OF_HUGE = 2.0**-300, 2.0**300, 2.0**-560
_LEAST_GAP = 2.0**-960
_TINIEST = 2.0**-1074
# Mean and labels' d that are equal to this, relative, are equal but for rounding.
_EQUAL = 2.0**-48
# A relative step below this, of Newton's method, leaves an error of about its square.
_LAST_STEP = 1e-8
_MOST_PASSES = 200


def fit_start(parts, x, classes, probs, factor):
    """Table of what a fit needs of each sample, and the sums of its rows from that of gaps on."""
    table = np.empty((FIT_ROWS, x.size // x.shape[1]))
    run = fit_start_rows if x.ndim == 2 else fit_start_columns
    run(parts, x, classes, probs, factor, table)
    with np.errstate(all="ignore"):
        return table, table[_GAP:].sum(axis=1).tolist()


def fit(x, classes, probs):
    """Return the temperature of least loss for samples over axis 1, and the number of passes.

    It is None if the loss is NaN or infinite at every temperature; then the second is the first sample with
    which it is. With b = 1 / T, the slope is 0 where the mean of E[d] is that of the labels' d. Newton's
    method finds where the logarithm of their ratio is 0, whose slope in log(b) is -var(b d) / E[b d]: it is
    almost straight, as E[d] falls like a power of b or exponentially. A step beyond what is known of b is
    replaced: the loss is at least b times the labels' d, so b is at most the loss at b = 0 over that.
    """
    parts = parts_for(x.size, PARALLEL_ROWS)
    factor = 1.0
    table, (gap, mean, variance, log_count) = fit_start(parts, x, classes, probs, factor)
    # Without a factor no distance rounds to 0: these say whether a label, and an entry, is below its maximum.
    missed, width = gap != 0.0, table[_WIDTH].max()
    if not missed and probs is not None:  # their products with the distances may
        missed = bool(((probs > 0.0) & (x < x.max(axis=1, keepdims=True))).any())
    if not math.isfinite(gap + mean + variance):
        factor = _FACTOR_OF_HUGE
    elif width > 0.0 and (not _LEAST_WIDTH < width < _MOST_WIDTH or (missed and gap < _LEAST_GAP)):
        factor = 2.0 ** min(-math.frexp(width)[1], 1000)
    if factor != 1.0:
        table, (gap, mean, variance, log_count) = fit_start(parts, x, classes, probs, factor)
    if not math.isfinite(gap + mean + variance + log_count):
        with np.errstate(all="ignore"):
            bad = ~np.isfinite(table[_GAP:].cumsum(axis=1)).all(axis=0)
        return None, int(bad.argmax())
    if not missed:
        return (0.0 if width > 0.0 else math.inf), 1
    if mean <= gap * (1.0 + _EQUAL):
        return math.inf, 1
    gap = max(gap, _TINIEST)
    run = fit_rows if x.ndim == 2 else fit_columns
    moments = np.empty((2, table.shape[1]))
    # The least b is that of the largest T.
    least = 1.0 / LARGEST[1] / factor
    low, high = 0.0, min(log_count / gap, LARGEST[1])
    rate = min((mean - gap) / variance, high) if variance > 0.0 else high
    for passes in range(2, _MOST_PASSES):
        rate = max(rate, least)
        run(parts, x, table, 1.0 / rate / factor, moments)
        mean, variance = moments.sum(axis=1).tolist()
        low, high = (rate, high) if mean > rate * gap else (low, rate)
        if high == least:
            return math.inf, passes
        step = -math.inf
        if mean > 0.0 < variance:
            step = math.log(min(mean / rate / gap, LARGEST[1])) * mean / variance
        following = rate * (1.0 + step) if step > 0.0 else rate / (1.0 - step)
        if abs(step) <= _LAST_STEP:
            return 1.0 / following / factor, passes
        if not low < following < high:
            following = math.sqrt(low) * math.sqrt(high) if low > 0.0 else 0.25 * high
        rate = following
    return 1.0 / rate / factor, _MOST_PASSES


# -- solving for a temperature -------------------------------------------------------------------------
# The distances d from the maximum are written to working memory, and then walked some six times there. With
# u = log(b) and z = b d, the entropy is log(sum(exp(-z))) + E[z], and its slope in u is -var(z).

# What is found of a slice: a temperature, or why there is none.
_SOLVED, _BELOW, _ABOVE = 0, 1, 2
# Entries beyond this are taken by a quarter, lest their distances or the temperature overflow.
_HUGE_ENTRY = 2.0**900
# Newton steps in u: below this, the error of the entropy is that of rounding.
_LAST_ENTROPY_STEP = 1e-9


@jit
def solve_slice(x, start, step, n, target, at_limit, w):
    """Temperature at which the entropy of a slice is the target, and whether one was found.

    Targets within ``at_limit``, relative, of what the entropy is at T = 0 or T = inf are that limit.
    """
    top, largest = -math.inf, 0.0
    for i in range(n):
        entry = np.float64(get(x, start + i * step))
        if math.isnan(entry):
            return math.nan, _SOLVED
        top = max(top, entry)
        if entry != -math.inf:
            largest = max(largest, abs(entry))
    if math.isnan(target) or (top == -math.inf and (n > 0 or target == 0.0)):
        return math.nan, _SOLVED
    if n == 0:
        return math.nan, _BELOW if target < 0.0 else _ABOVE
    factor = 0.25 if largest > _HUGE_ENTRY else 1.0
    count = ties = 0
    widest, least = 0.0, math.inf
    for i in range(n):
        entry = np.float64(get(x, start + i * step))
        if entry == top:
            ties += 1
            put(w, count, 0.0)
            count += 1
        elif top != math.inf and entry != -math.inf:
            distance = max(top * factor - entry * factor, _TINIEST)
            put(w, count, -distance)
            count += 1
            widest, least = max(widest, distance), min(least, distance)
    bottom, ceiling = math.log(ties), math.log(count)
    if target < bottom - at_limit * bottom:
        return math.nan, _BELOW
    if target > ceiling + at_limit * ceiling:
        return math.nan, _ABOVE
    if target >= ceiling - at_limit * ceiling:
        return math.inf, _SOLVED
    if target <= bottom + at_limit * bottom:
        return 0.0, _SOLVED
    first = second = 0.0
    for i in range(count):
        share = get(w, i) / widest
        first += share
        second += share * share
    variance = second / count - (first / count) ** 2
    guess = math.sqrt(0.5 * variance / (ceiling - target)) * widest
    low, high = max(least * 2.0**-10, _TINIEST), min(widest * 2.0**30, LARGEST[1])
    return solve_distances(w, count, ties, low, high, guess, target - bottom) / factor, _SOLVED


@jit
def solve_distances(w, count, ties, low, high, temperature, goal):
    """Temperature between two bounds at which the entropy is so much above that of the maxima.

    Newton's method on the logarithm of this surplus, which is almost straight in b where it is small.
    """
    lanes = lane_count(w)
    zero = spread(0.0, w)
    for _ in range(_MOST_PASSES):
        if not low < temperature < high:
            temperature = min(max(math.sqrt(low) * math.sqrt(high), low), high)
        scale, guard = guarded_scale(0.0, temperature)
        sums = lane_moments(w, 0, count, lanes, lanes, scale, guard, w)
        total, error = sum_lanes(sums[0], sums[1])
        first, first_error = sum_lanes(sums[2], sums[3])
        second, _ = sum_lanes(sums[4], zero)
        mean = -(first + first_error) / (total + error) * LOG_2
        variance = second / total * (LOG_2 * LOG_2) - mean * mean
        maxima = ties * top_term(total)
        surplus = math.log1p(((total - maxima) + error) / maxima) + mean
        if surplus > goal:
            high = temperature
        else:
            low = temperature
        step = math.inf
        if surplus > 0.0 < variance:
            step = (math.log(goal) - math.log(surplus)) * surplus / variance
        following = temperature * (1.0 + step) if step > 0.0 else temperature / (1.0 - step)
        if abs(step) <= _LAST_ENTROPY_STEP or following == temperature:
            return following
        temperature = following
    return temperature


@Kernel
def solve_slices(team, parts, x, entropies, at_limit, temperatures, found):
    """Solve for the temperature of each slice over axis 1 of an array (outer, n, inner)."""
    work = workspaces(parts, x.shape[1], 0.0)
    arguments = x, entropies, at_limit, temperatures, found, work
    each_task(solve_one, team, parts, len(x) * x.shape[2], arguments)


@jit
def solve_one(i, part, x, entropies, at_limit, temperatures, found, work):
    """Solve for the temperature of slice i."""
    n, inner = x.shape[1:]
    start, w = i // inner * n * inner + i % inner, pointer(part_of(work, part))
    target = temperature_at(entropies, i)
    temperatures[i], found[i] = solve_slice(pointer(x), start, inner, n, target, at_limit, w)


def solve(x, entropies, at_limit, temperatures, found):
    """Write the temperature of each slice, and 0; or 1 or 2 if it has only greater or smaller entropies."""
    parts = parts_for(x.size, PARALLEL_ROWS)
    solve_slices(parts, x, entropies, at_limit, temperatures, found)


# -- the choice of a schedule ----------------------------------------------------------------------------


def cross_entropy(x, classes, probs, temperature, samples, losses, out):
    """Write the loss of each sample over axis 1 and, unless out is None, its gradient over ``samples``."""
    outer, n, *inner = x.shape
    parts = parts_for(x.size, PARALLEL_ROWS)
    flat = [None if array is None else array.reshape(-1) for array in (x, probs, out)]
    if inner or n <= SHORT:
        shape = Samples(outer, n, inner[0], inner[0], 1) if inner else Samples(1, n, outer, 1, n)
        run = cross_entropy_tall if inner and n * LANE_BYTES > COLUMN_BYTES else cross_entropy_tiles
        run(parts, flat[0], classes, flat[1], shape, temperature, samples, losses, flat[2])
        return
    keeps = out is not None and n * x.itemsize <= STORED_BYTES
    run = cross_entropy_rows if keeps else cross_entropy_long_rows
    run(parts, x, classes, probs, temperature, samples, losses, out)
