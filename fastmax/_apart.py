"""Schedules for slices whose entries lie apart, at equal distances, in arrays that need not be packed.

As many slices as there are lanes are copied into a tile, one to each, summed as columns are, and copied back;
few long ones are taken one by one, with as many chunks in lanes (`_slice`). So a slice has the bits of a
column of a packed array, and beside x and its results there is a tile for each thread.

How arrays lie is told by a layout (`_layout`). Of x and of the results a kernel gets the first entry, in an
array of one: so there is one kernel for any number of axes.
"""

import math
from collections import namedtuple

import numpy as np

from fastmax import _slice
from fastmax._jit import jit
from fastmax._lanes import (
    LANE_BYTES,
    get,
    lane_count,
    load,
    pointer,
    prefetch_to_read,
    prefetch_to_write,
    put,
    read,
    slice_at,
    spread,
    store,
    unless_masked,
    with_mask,
    workspace,
    write,
)
from fastmax._layout import OF_MASK, OF_OUT, OF_X, SIZE, first_entry
from fastmax._math import rate_of
from fastmax._slice import (
    CHUNK,
    KEPT,
    PIECE,
    QUANTITIES,
    absent_value,
    chunk_tile,
    chunk_tile_count,
    chunk_work_size,
    get_sums,
    lane_maxima,
    pack_chunks,
    store_all,
    sums_apart,
    sums_of_tile,
    unpack_chunks,
)
from fastmax._threads import PARALLEL_COLUMNS, Kernel, each_task, parts_for
from fastmax._tiles import (
    FIELDS,
    first_rate,
    merge_chunks,
    merge_tiles,
    part_of,
    put_sums,
    rate_at,
    temperature_at,
    value_beside,
    value_lanes,
    workspaces,
    write_lanes,
)
from fastmax._tracing import traced

# Entries, where slices are nearer to one another than these, or slices by which memory is fetched ahead: each
# is in another page, and a processor does not foresee them. Every other column of 1000 x 16384 float32 takes
# 0.3 of the time over axis 0 for it, with 32 entries 0.4, and of 8192 x 2000 over axis 1 0.7.
AHEAD_ENTRIES, AHEAD_SLICES = 8, 4


@jit
def slice_count(layout):
    """Number of slices."""
    count = 1
    for axis in range(len(layout) - 1):
        count *= layout[axis, SIZE]
    return count


@jit
def place_of(layout, number, column):
    """Where a slice of x begins, or its result."""
    place = 0
    for axis in range(len(layout) - 2, -1, -1):
        place += number % layout[axis, SIZE] * layout[axis, column]
        number //= layout[axis, SIZE]
    return place


@jit
def places_of(layout, first, count, column, places):
    """Write where so many slices begin; return the distance between them, or 0 if that is not the same."""
    size, step = layout[-2, SIZE], layout[-2, column]
    if first % size + count <= size:
        places[0] = place_of(layout, first, column)
        for k in range(1, count):
            places[k] = places[k - 1] + step
        return step
    for k in range(count):
        places[k] = place_of(layout, first + k, column)
    return 0


@jit
def view_of(array, layout, number, column):
    """View of a slice of x, of its result, or of its mask."""
    place, step = place_of(layout, number, column), layout[-1, column]
    return slice_at(array, place * array.itemsize, layout[-1, SIZE], step * array.itemsize)


@jit
def mask_view(mask, layout, number):
    """View of the mask of a slice, if there is one."""
    return slice_at(mask, place_of(layout, number, OF_MASK), layout[-1, SIZE], layout[-1, OF_MASK])


@traced
def mask_of(mask):
    """Pointer to the first byte of a mask, if there is one."""
    return None if mask is None else pointer(mask)


# -- a slice in each lane -------------------------------------------------------------------------
# Slices that are nearer to one another than their entries are copied entry by entry, others piece by piece,
# so that what is read and what is written stay in the first cache.

# Where the slices of the lanes begin: in x, in the result, and in the mask. The columns of a layout, but one.
_PLACES = 3


@jit
def pack_slices(x, mask, layout, first, count, work, at, places):
    """Copy slices to a tile, one to each lane; lanes without one get the first, or zeros."""
    n, step, mask_step = layout[-1, SIZE], layout[-1, OF_X], layout[-1, OF_MASK]
    lanes, own, own_mask = lane_count(work), places[OF_X - 1], places[OF_MASK - 1]
    distance, absent = places_of(layout, first, count, OF_X, own), -spread(math.inf, get(x, 0))
    if mask is None and distance == 1:
        for i in range(n):
            store(work, at + i * lanes, read(x, own[0] + i * step, count, spread(0.0, work)))
        return
    places_of(layout, first, count, OF_MASK, own_mask)
    if count < lanes:
        for i in range(n):
            entry = get(x, own[0] + i * step)
            entry = unless_masked(mask, own_mask[0] + i * mask_step, entry, absent)
            store(work, at + i * lanes, spread(entry, work))
    fetch, move = prefetch_to_read, pack_entry
    move_slices(x, OF_X, mask, absent, layout, distance, count, work, at, places, fetch, move)


@jit
def unpack_slices(work, at, mask, absent, layout, first, count, out, places):
    """Copy slices back to where their results are; entries that the mask leaves out become ``absent``.

    The mask's places are those that `pack_slices` has written.
    """
    lanes, own, step = lane_count(work), places[OF_OUT - 1], layout[-1, OF_OUT]
    distance = places_of(layout, first, count, OF_OUT, own)
    if mask is None and distance == 1:
        for i in range(layout[-1, SIZE]):
            write(out, own[0] + i * step, count, load(work, at + i * lanes))
        return
    fetch, move = prefetch_to_write, unpack_entry
    move_slices(out, OF_OUT, mask, absent, layout, distance, count, work, at, places, fetch, move)


@jit
def move_slices(array, column, mask, absent, layout, distance, count, work, at, places, fetch, move):
    """Copy slices to or from a tile, entry by entry, as ``move`` does, and fetch what comes later."""
    n, step, mask_step = layout[-1, SIZE], layout[-1, column], layout[-1, OF_MASK]
    lanes, own, own_mask = lane_count(work), places[column - 1], places[OF_MASK - 1]
    if 0 < abs(distance) < abs(step):
        lines = in_lines(distance, work)
        for i in range(n):
            ahead = min(i + AHEAD_ENTRIES, n - 1) * step
            for k in range(0, count, lines):
                fetch(array, min(own[k], own[min(k + lines, count) - 1]) + ahead)
            for k in range(count):
                masked = own_mask[k] + i * mask_step
                move(array, own[k] + i * step, mask, masked, absent, work, at + i * lanes + k)
        return
    lines = in_lines(step, work)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        for k in range(count):
            ahead = own[min(k + AHEAD_SLICES, count - 1)]
            for i in range(start, stop, lines):
                fetch(array, ahead + i * step)
            place, masked = own[k], own_mask[k]
            for i in range(start, stop):
                to = at + i * lanes + k
                move(array, place + i * step, mask, masked + i * mask_step, absent, work, to)


@traced
def pack_entry(x, place, mask, masked, absent, work, at):
    """Copy an entry to a tile, or ``absent`` if it is masked."""
    put(work, at, unless_masked(mask, masked, get(x, place), absent))


@traced
def unpack_entry(out, place, mask, masked, absent, work, at):
    """Copy an entry of a tile to where its result is, or ``absent`` if it is masked."""
    put(out, place, unless_masked(mask, masked, get(work, at), absent))


@jit
def in_lines(step, work):
    """Number of entries, from one to the next so many apart, in as many bytes as lanes have; at least 1."""
    return max(lane_count(work) // max(abs(step), 1), 1)


@jit
def group_count(layout, like):
    """Number of groups that the slices make."""
    return -(-slice_count(layout) // lane_count(like))


@jit(inline="always")
def write_groups(team, parts, x, mask, layout, temperature, exact, out):
    """Write the softmax of slices side by side, or its logarithm if the sums are to be exact."""
    like = pointer(x)
    work = workspaces(parts, (FIELDS + layout[-1, SIZE]) * lane_count(like), like)
    places, rate = np.empty((parts, _PLACES, lane_count(like)), np.intp), first_rate(temperature, like)
    arguments = x, mask, layout, temperature, rate, exact, out, work, places
    each_task(write_group, team, parts, group_count(layout, like), arguments)


@Kernel
def softmax_side_by_side(team, parts, x, mask, layout, temperature, out):
    """Softmax of slices."""
    write_groups(team, parts, x, mask, layout, temperature, None, out)


@Kernel
def log_softmax_side_by_side(team, parts, x, mask, layout, temperature, out):
    """Logarithm of the softmax of slices."""
    write_groups(team, parts, x, mask, layout, temperature, (None,), out)


@jit
def write_group(group, part, x, mask, layout, temperature, rate, exact, out, work, places):
    """Write the softmax of as many slices as there are lanes, or fewer, or its logarithm."""
    n, w = layout[-1, SIZE], pointer(part_of(work, part))
    lanes = lane_count(w)
    first, tile = group * lanes, FIELDS * lanes
    count = min(lanes, slice_count(layout) - first)
    masked = mask_of(mask)
    pack_slices(pointer(x), masked, layout, first, count, w, tile, places[part])
    row_max = lane_maxima(w, tile, tile + n * lanes)
    write_lanes(w, tile, n, row_max, temperature, first, count, rate, exact, None, tile, lanes)
    absent = absent_value(get(w, tile), exact)
    unpack_slices(w, tile, masked, absent, layout, first, count, pointer(out), places[part])


@Kernel
def value_side_by_side(team, parts, x, mask, layout, temperature, out, weighted):
    """Logsumexp of slices, or entropy of their softmax unless ``weighted`` is None."""
    like = pointer(x)
    work = workspaces(parts, (FIELDS + layout[-1, SIZE]) * lane_count(like), like)
    places, rate = np.empty((parts, _PLACES, lane_count(like)), np.intp), first_rate(temperature, like)
    arguments = x, mask, layout, temperature, rate, weighted, out, work, places
    each_task(value_group, team, parts, group_count(layout, like), arguments)


@jit
def value_group(group, part, x, mask, layout, temperature, rate, weighted, out, work, places):
    """Logsumexp, or entropy unless ``weighted`` is None, of as many slices as there are lanes, or fewer."""
    n, w = layout[-1, SIZE], pointer(part_of(work, part))
    lanes = lane_count(w)
    first, tile = group * lanes, FIELDS * lanes
    count = min(lanes, slice_count(layout) - first)
    pack_slices(pointer(x), mask_of(mask), layout, first, count, w, tile, places[part])
    row_max = lane_maxima(w, tile, tile + n * lanes)
    shown = value_lanes(w, tile, n, row_max, temperature, first, count, rate, weighted, 0, lanes, None)
    for k in range(count):
        value = get(w, k)
        if not shown:
            own = temperature_at(temperature, first + k)
            entries = with_mask(view_of(x, layout, first + k, OF_X), mask_view(mask, layout, first + k))
            value = value_beside(entries, 0, 1, n, own, weighted, w, k, lanes)
        put(pointer(out), place_of(layout, first + k, OF_OUT), value)


# -- one slice after the other, entry by entry or with its chunks in lanes ---------------------------


@Kernel
def softmax_entry_by_entry(team, parts, x, mask, layout, temperature, out):
    """Softmax of a few short slices without a mask."""
    for number in range(slice_count(layout)):
        entries, results = view_of(x, layout, number, OF_X), view_of(out, layout, number, OF_OUT)
        _slice.softmax(entries, temperature_at(temperature, number), results)


@Kernel
def log_softmax_entry_by_entry(team, parts, x, mask, layout, temperature, out):
    """Logarithm of the softmax of a few short slices without a mask."""
    for number in range(slice_count(layout)):
        entries, results = view_of(x, layout, number, OF_X), view_of(out, layout, number, OF_OUT)
        _slice.log_softmax(entries, temperature_at(temperature, number), results)


@Kernel
def value_entry_by_entry(team, parts, x, mask, layout, temperature, out, weighted):
    """Logsumexp of a few short slices without a mask, or entropy unless ``weighted`` is None."""
    for number in range(slice_count(layout)):
        entries, own = view_of(x, layout, number, OF_X), temperature_at(temperature, number)
        rate = rate_of(own, get(entries, 0))
        value = _slice.value_of(entries, 0, len(entries), rate, weighted, None)
        put(pointer(out), place_of(layout, number, OF_OUT), value)


@jit(inline="always")
def write_each(team, parts, x, mask, layout, temperature, exact, out):
    """Write the softmax of one slice after the other, or its logarithm if the sums are to be exact."""
    work = workspaces(parts, chunk_work_size(layout[-1, SIZE], pointer(x)), pointer(x))
    each_task(write_one, team, parts, slice_count(layout), (x, mask, layout, temperature, exact, out, work))


@Kernel
def softmax_one_by_one(team, parts, x, mask, layout, temperature, out):
    """Softmax of slices."""
    write_each(team, parts, x, mask, layout, temperature, None, out)


@Kernel
def log_softmax_one_by_one(team, parts, x, mask, layout, temperature, out):
    """Logarithm of the softmax of slices."""
    write_each(team, parts, x, mask, layout, temperature, (None,), out)


@jit
def write_one(number, part, x, mask, layout, temperature, exact, out, work):
    """Write the softmax of a slice, or its logarithm."""
    entries, results = view_of(x, layout, number, OF_X), view_of(out, layout, number, OF_OUT)
    own, w = temperature_at(temperature, number), part_of(work, part)
    _slice.write_by_chunks(entries, mask_view(mask, layout, number), own, exact, results, w)


@Kernel
def value_one_by_one(team, parts, x, mask, layout, temperature, out, weighted):
    """Logsumexp of slices, or entropy of their softmax unless ``weighted`` is None."""
    work = workspaces(parts, chunk_work_size(layout[-1, SIZE], pointer(x)), pointer(x))
    arguments = x, mask, layout, temperature, weighted, out, work
    each_task(value_of_one, team, parts, slice_count(layout), arguments)


@jit
def value_of_one(number, part, x, mask, layout, temperature, weighted, out, work):
    """Logsumexp of a slice or, unless ``weighted`` is None, the entropy of its softmax."""
    own, w = temperature_at(temperature, number), part_of(work, part)
    entries, masked = view_of(x, layout, number, OF_X), mask_view(mask, layout, number)
    value = _slice.value_by_chunks(entries, masked, own, weighted, w)
    put(pointer(out), place_of(layout, number, OF_OUT), value)


# -- long slices: threads share the tiles of chunks of each ----------------------------------------


@jit(inline="always")
def long_passes(team, parts, x, mask, layout, temperature, exact, out):
    """Maxima and sums of long slices, which are returned, and results unless ``out`` is None."""
    n, count, like = layout[-1, SIZE], slice_count(layout), pointer(x)
    chunks, tiles = -(-n // CHUNK), chunk_tile_count(n, like)
    work = workspaces(parts, chunk_work_size(n, like), like)
    maxima, sums = workspace(count, like), workspace(count * QUANTITIES, like)
    partial = workspace(count * chunks * QUANTITIES, like)
    for step in range(2 if out is None else 3):
        arguments = step, x, mask, layout, temperature, maxima, sums, partial, exact, out, work
        each_task(pass_over_tile, team, parts, count * tiles, arguments)
        if step == 0:
            merge_tiles(partial, tiles, maxima)
        elif step == 1:
            merge_chunks(partial, chunks, 1, exact, sums)
    return maxima, sums


@jit
def pass_over_tile(task, part, step, x, mask, layout, temperature, maxima, sums, partial, exact, out, work):
    """One pass over a tile."""
    n, w = layout[-1, SIZE], pointer(part_of(work, part))
    number, tile = divmod(task, chunk_tile_count(n, w))
    masked = mask_view(mask, layout, number)
    start, stop = pack_chunks(view_of(x, layout, number, OF_X), masked, tile, w)
    if step == 0:
        partial[task] = _slice.maximum(w, start, stop)
        return
    row_max = maxima[number]
    rate = rate_at(temperature, number, row_max)
    if step == 1:
        first, _, count = chunk_tile(tile, n, w)
        beside, to = CHUNK * lane_count(w), number * -(-n // CHUNK) + first // CHUNK
        store_all(w, beside, lane_count(w), sums_of_tile(w, start, stop, row_max, rate, exact, None))
        for k in range(count):
            put_sums(partial, QUANTITIES * (to + k), 1, get_sums(w, beside + k, lane_count(w), exact))
    elif out is not None:
        own, absent = get_sums(sums, QUANTITIES * number, 1, exact), absent_value(row_max, exact)
        _slice.write_slice(w, start, stop, row_max, rate, own, exact, w, 0, False, None)
        unpack_chunks(w, start, tile, masked, absent, view_of(out, layout, number, OF_OUT))


@Kernel
def softmax_long(team, parts, x, mask, layout, temperature, out):
    """Softmax of slices, in three passes that are compiled as one."""
    long_passes(team, parts, x, mask, layout, temperature, None, out)


@Kernel
def log_softmax_long(team, parts, x, mask, layout, temperature, out):
    """Logarithm of the softmax of slices."""
    long_passes(team, parts, x, mask, layout, temperature, (None,), out)


@Kernel
def value_long(team, parts, x, mask, layout, temperature, out, weighted):
    """Logsumexp of slices, or entropy of their softmax unless ``weighted`` is None."""
    maxima, sums = long_passes(team, parts, x, mask, layout, temperature, (weighted,), None)
    n = layout[-1, SIZE]
    for number in range(slice_count(layout)):
        own, top = temperature_at(temperature, number), maxima[number]
        beside = get_sums(sums, QUANTITIES * number, 1, (weighted,))
        beside = sums_apart(beside, top, rate_of(own, top), (weighted,))
        entries = with_mask(view_of(x, layout, number, OF_X), mask_view(mask, layout, number))
        value = _slice.value_of_sums(entries, 0, 1, n, top, own, beside, weighted)
        put(pointer(out), place_of(layout, number, OF_OUT), value)


# -- the choice -----------------------------------------------------------------------------------

Schedules = namedtuple("Schedules", "entry_by_entry side_by_side one_by_one long")

# Short slices from which they are taken side by side, and chunks from which long ones are not any more.
MANY_SLICES, MANY_CHUNKS = 4, 15

_SOFTMAX = Schedules(softmax_entry_by_entry, softmax_side_by_side, softmax_one_by_one, softmax_long)
_LOG_SOFTMAX = Schedules(
    log_softmax_entry_by_entry, log_softmax_side_by_side, log_softmax_one_by_one, log_softmax_long
)
_VALUES = Schedules(value_entry_by_entry, value_side_by_side, value_one_by_one, value_long)


def softmax(x, mask, layout, temperature, out):
    """Write the softmax of slices."""
    _run(_SOFTMAX, x, mask, layout, temperature, out)


def log_softmax(x, mask, layout, temperature, out):
    """Write the logarithm of the softmax of slices."""
    _run(_LOG_SOFTMAX, x, mask, layout, temperature, out)


def logsumexp(x, mask, layout, temperature, out):
    """Write the logsumexp of slices."""
    values(x, mask, layout, temperature, out, None)


def entropy(x, mask, layout, temperature, out):
    """Write the entropy of the softmax of slices."""
    values(x, mask, layout, temperature, out, True)


def values(x, mask, layout, temperature, out, weighted):
    """Write the logsumexp of slices, or their entropy unless ``weighted`` is None."""
    _run(_VALUES, x, mask, layout, temperature, out, weighted)


def _run(schedules, x, mask, layout, temperature, out, *options):
    """Run the schedule that suits the slices.

    One by one 6 x 4000 take as long as side by side, 2 x 1100 too, 3 x 2000 1.1 to 1.2 times as long,
    64 x 8000 1.1 to 1.3, and 64 x 16000 0.95, float32 and float64 alike; one slice of 100 to 1000 takes
    a quarter of the time entry by entry.
    """
    *sizes, n = layout[:, SIZE].tolist()
    count = math.prod(sizes)
    if n > KEPT:
        schedule = schedules.long
    elif n > MANY_CHUNKS * CHUNK or (n > 2 * CHUNK and count < n // CHUNK):
        schedule = schedules.one_by_one
    elif n <= 2 * CHUNK and count < MANY_SLICES and mask is None and x.itemsize > 2:
        schedule = schedules.entry_by_entry  # which keeps terms in the result
    else:
        schedule = schedules.side_by_side
    at_once = LANE_BYTES // max(x.itemsize, 4) if schedule is schedules.side_by_side else 1
    is_shared = schedule is schedules.long or count > at_once
    parts = parts_for(count * n, PARALLEL_COLUMNS) if is_shared else 1
    mask = None if mask is None else first_entry(mask)
    schedule(parts, first_entry(x), mask, layout, temperature, first_entry(out), *options)
