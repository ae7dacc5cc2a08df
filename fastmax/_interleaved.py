"""Schedules for columns that have few neighbours, so that they would fill no vector, or one in part.

Arrays come as (outer, n, inner), see `_cpu`, and memory is walked as it lies, with the entries of neighbours
interleaved. For sums runs of memory are transposed into a tile, one to each lane, of which every ``inner``-th
vector belongs to the same column. Schedules:

- interleaved columns: a run is all that an outer index has; entries are read and written once;
- interleaved chunks: columns are long, and a run is a chunk of all neighbours; threads share these. Entries
  are read three times, for maxima, sums and results, and written once.
"""

import math

import numpy as np

from fastmax._columns import strip_value, tall_values, write_fields
from fastmax._jit import jit
from fastmax._lanes import (
    entries_of,
    get,
    lane_count,
    load,
    piece_size,
    pointer,
    present,
    put,
    read,
    spread,
    store,
    touch,
    workspace,
    write,
)
from fastmax._math import larger
from fastmax._rows import narrow_group_count, pack_rows, soon_for_group, unpack_rows
from fastmax._slice import (
    CHUNK,
    QUANTITIES,
    absent_value,
    chunk_tile,
    chunk_tile_count,
    get_sums,
    is_new,
    later,
    load_all,
    store_all,
    sums_of_tile,
)
from fastmax._threads import Kernel, each_task
from fastmax._tiles import (
    FIELDS,
    first_rate,
    lane_rates,
    merge_chunks,
    merge_tiles,
    part_of,
    pitch,
    place,
    put_sums,
    rate_at,
    temperature_at,
    value_beside,
    value_lanes,
    workspaces,
    write_lanes,
)
from fastmax._tracing import traced

# Entries of runs that are copied at a time to where they are neighbours, and transposed from there. Runs may
# lie a multiple of 4 KB apart, and a first cache does not keep as many lines of one set: to pack chunks of 4
# columns of float32 takes 0.3 of the time for it, of 3 0.6, and to unpack runs as long 0.2 and 0.3.
RUN = 128


@traced
def run_size(like):
    """Entries of working memory for what is copied of runs at a time."""
    return (RUN + piece_size(like)) * lane_count(like)


@jit
def pack_runs(x, start, step, n, count, work, at, staging):
    """Copy runs of n entries to a tile, one to each lane, as `pack_rows` does."""
    if n <= RUN:
        pack_rows(x, start, step, n, count, work, at)
        return
    lanes, zero = lane_count(work), spread(0.0, work)
    for first in range(0, n, RUN):
        size = min(RUN, n - first)
        for k in range(count):
            run, to = start + k * step + first, staging + k * size
            for i in range(0, size, lanes):
                store(work, to + i, read(x, run + i, size - i, zero))
        pack_rows(work, staging, size, size, count, work, at + first * lanes)


@jit
def unpack_runs(work, at, out, start, n, count, x, absent, staging):
    """Write a tile to runs, each next to the one before; entries that are masked in x become ``absent``."""
    if n <= RUN:
        unpack_rows(work, at, out, start, n, count, x, absent)
        return
    lanes, zero, absents = lane_count(work), spread(0.0, work), spread(absent, work)
    for first in range(0, n, RUN):
        size = min(RUN, n - first)
        unpack_rows(work, at + first * lanes, work, staging, size, count, work, absent)
        for k in range(count):
            run, source = start + k * n + first, staging + k * size
            for i in range(0, size, lanes):
                value = present(x, run + i, size - i, read(work, source + i, size - i, zero), absents)
                write(out, run + i, size - i, value)


@jit
def take_column(work, column, inner, n, at):
    """Copy a column of a tile to where its vectors are neighbours, and return its maxima."""
    lanes = lane_count(work)
    row_max = -spread(math.inf, work)
    for i in range(n):
        entries = load(work, column + i * inner * lanes)
        row_max = larger(entries, row_max)
        store(work, at + i * lanes, entries)
    return row_max


# -- interleaved columns: the same column of as many outer indices as there are lanes -----------------


@traced
def group_size(n, inner, like):
    """Entries of working memory: fields and the entries of a column, a tile, and runs that are copied."""
    return (FIELDS + n) * lane_count(like) + tile_size(n, inner, like) + run_size(like)


@traced
def tile_size(n, inner, work):
    """Entries of a tile, and what `pack_rows` may write past its end."""
    return (n * inner + piece_size(work)) * lane_count(work)


@traced
def places_of(n, inner, work):
    """Where the entries of a column stand in working memory, the tile, and runs that are copied."""
    column, tile = FIELDS * lane_count(work), (FIELDS + n) * lane_count(work)
    return column, tile, tile + tile_size(n, inner, work)


@jit
def pack_group(group, x, mask, results, work):
    """Copy a group to a tile; return its first outer index, its number of those, and what is needed soon."""
    (outer, n, inner), step = x.shape, pitch(x, 0)
    lanes, entries, size = lane_count(work), entries_of(x, mask), n * inner
    first = group * lanes
    count = min(lanes, outer - first)
    _, tile, runs = places_of(n, inner, work)
    pack_runs(entries, first * step, step, size, count, work, tile, runs)
    return first, count, soon_for_group(entries, results, first, count, outer, size, step)


@jit
def group_temperatures(temperature, first, count, inner, column, own):
    """Temperatures of a column of a group, one for each lane, or the one of all."""
    if len(temperature) == 1:
        return temperature
    for lane in range(len(own)):
        own[lane] = temperature[(first + min(lane, count - 1)) * inner + column]
    return own


@jit(inline="always")
def write_groups(team, parts, x, mask, temperature, exact, out):
    """Write the softmax of interleaved columns, or its logarithm if the sums are to be exact."""
    (outer, n, inner), like = x.shape, pointer(x)
    work, own = workspaces(parts, group_size(n, inner, like), like), np.empty((parts, lane_count(like)))
    rate, new = first_rate(temperature, like), is_new(pointer(out), out.size)
    arguments = x, mask, temperature, rate, exact, out, new, work, own
    each_task(write_group, team, parts, narrow_group_count(outer, like), arguments)


@Kernel
def softmax_interleaved(team, parts, x, mask, temperature, out):
    """Softmax of interleaved columns."""
    write_groups(team, parts, x, mask, temperature, None, out)


@Kernel
def log_softmax_interleaved(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of interleaved columns."""
    write_groups(team, parts, x, mask, temperature, (None,), out)


@jit
def write_group(group, part, x, mask, temperature, rate, exact, out, new, work, own):
    """Write the softmax of the columns of a group, or its logarithm."""
    n, inner = x.shape[1:]
    w, size = pointer(part_of(work, part)), n * inner
    lanes, (at, tile, runs) = lane_count(w), places_of(n, inner, w)
    first, count, soon = pack_group(group, x, mask, pointer(out), w)
    if new:
        touch(pointer(out), first * size, (first + count) * size)
    for column in range(inner):
        to, step = tile + column * lanes, inner * lanes
        row_max = take_column(w, to, inner, n, at)
        temperatures = group_temperatures(temperature, first, count, inner, column, own[part])
        ahead = later(soon, column * n)
        write_lanes(w, at, n, row_max, temperatures, 0, lanes, rate, exact, ahead, to, step)
    absent = absent_value(get(w, at), exact)
    unpack_runs(w, tile, pointer(out), first * size, size, count, entries_of(x, mask), absent, runs)


@Kernel
def value_interleaved(team, parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of interleaved columns."""
    (outer, n, inner), like = x.shape, pointer(x)
    work, own = workspaces(parts, group_size(n, inner, like), like), np.empty((parts, lane_count(like)))
    arguments = x, mask, temperature, first_rate(temperature, like), out, weighted, work, own
    each_task(value_group, team, parts, narrow_group_count(outer, like), arguments)


@jit
def value_group(group, part, x, mask, temperature, rate, out, weighted, work, own):
    """`value_interleaved` of the columns of a group."""
    n, inner = x.shape[1:]
    w, entries = pointer(part_of(work, part)), entries_of(x, mask)
    lanes, (at, tile, _) = lane_count(w), places_of(n, inner, w)
    first, count, soon = pack_group(group, x, mask, None, w)
    for column in range(inner):
        row_max = take_column(w, tile + column * lanes, inner, n, at)
        temperatures = group_temperatures(temperature, first, count, inner, column, own[part])
        ahead = later(soon, column * n)
        shown = value_lanes(w, at, n, row_max, temperatures, 0, lanes, rate, weighted, 0, lanes, ahead)
        for lane in range(count):
            value = get(w, lane)
            if not shown:
                start, temp = place(x, first + lane, 0, column), temperature_at(temperatures, lane)
                value = value_beside(entries, start, inner, n, temp, weighted, w, lane, lanes)
            put(pointer(out), (first + lane) * inner + column, value)


# -- interleaved chunks: as many chunks of a column as there are lanes ---------------------------------
# Maxima and results need no order, and are taken as memory lies: in every ``inner``-th vector lanes belong to
# the same columns. Numbers for each column are arrays (outer, inner, tiles) or (outer, inner, chunks,
# QUANTITIES), and merged as in `_columns`.


@jit(inline="always")
def chunk_passes(team, parts, x, mask, temperature, exact, out):
    """Maxima and sums of columns, which are returned, and results unless ``out`` is None."""
    (outer, n, inner), like = x.shape, pointer(x)
    chunks, tiles = -(-n // CHUNK), chunk_tile_count(n, like)
    work = workspaces(parts, CHUNK * (inner + 1) * lane_count(like) + run_size(like), like)
    maxima, sums = workspace(outer * inner, like), workspace(outer * QUANTITIES * inner, like)
    partial, own = workspace(outer * inner * chunks * QUANTITIES, like), np.empty((parts, lane_count(like)))
    rate, numbers = first_rate(temperature, like), (maxima, sums, partial, work, own)
    for step in range(2 if out is None else 3):
        arguments = step, x, mask, temperature, rate, exact, out, numbers
        each_task(pass_over_tile, team, parts, outer * tiles, arguments)
        if step == 0:
            merge_tiles(partial, tiles, maxima)
        elif step == 1:
            merge_chunks(partial, chunks, inner, exact, sums)
    return maxima, sums


@jit
def pass_over_tile(task, part, step, x, mask, temperature, rate, exact, out, numbers):
    """One pass over as many chunks of all neighbours as there are lanes."""
    maxima, sums, partial, work, own = numbers
    n, inner = x.shape[1:]
    w, tiles = pointer(part_of(work, part)), chunk_tile_count(n, pointer(x))
    i, tile = divmod(task, tiles)
    first, rows, count = chunk_tile(tile, n, w)
    start, size = place(x, i, first, 0), count * rows * inner
    if step == 0:
        maxima_as_they_lie(
            entries_of(x, mask), start, size, inner, w, partial, i * inner * tiles + tile, tiles
        )
    elif step == 1:
        sum_chunks(x, mask, i, first, rows, count, temperature, maxima, exact, partial, w)
    elif out is not None:
        width, to = inner * lane_count(w), (i * n + first) * inner
        kinds = write_pattern(i, inner, temperature, rate, maxima, sums, exact, w, width, own[part])
        write_as_they_lie(entries_of(x, mask), start, size, pointer(out), to, w, width, kinds, exact)


@jit
def maxima_as_they_lie(x, start, size, inner, work, maxima, to, step):
    """Write the maximum of each column over some entries, from one to the next so many further on."""
    lanes, lowest = lane_count(work), -spread(math.inf, work)
    for k in range(inner):
        top = lowest
        for i in range(k * lanes, size, inner * lanes):
            top = larger(read(x, start + i, size - i, lowest), top)
        store(work, k * lanes, top)
    for column in range(inner):
        top = get(work, column)
        for i in range(column + inner, inner * lanes, inner):
            top = max(top, get(work, i))
        maxima[to + column * step] = top


@jit
def sum_chunks(x, mask, i, first, rows, count, temperature, maxima, exact, partial, work):
    """Write the sums of some chunks of all neighbours.

    What `pack_rows` may write past the tile is where a column will be copied to.
    """
    n, inner = x.shape[1:]
    lanes, chunks, size = lane_count(work), -(-n // CHUNK), rows * inner
    start, stop = size * lanes, (size + rows) * lanes
    pack_runs(entries_of(x, mask), place(x, i, first, 0), size, size, count, work, 0, stop)
    for column in range(inner):
        number = i * inner + column
        take_column(work, column * lanes, inner, rows, start)
        top, to = maxima[number], number * chunks + first // CHUNK
        rate = rate_at(temperature, number, top)
        store_all(work, stop, lanes, sums_of_tile(work, start, stop, top, rate, exact, None))
        for k in range(count):
            put_sums(partial, QUANTITIES * (to + k), 1, get_sums(work, stop + k, lanes, exact))


@jit
def write_pattern(i, inner, temperature, rate, maxima, sums, exact, work, width, own):
    """Write what `strip_value` needs of the columns of as many vectors as there are neighbours.

    Return their kinds, as `write_ends` does.
    """
    lanes = lane_count(work)
    plain = unmasked = True
    beside, to = i * QUANTITIES * inner, FIELDS * width + lanes
    for j in range(0, width, lanes):
        for lane in range(lanes):
            column = (j + lane) % inner
            put(work, FIELDS * width + lane, maxima[i * inner + column])
            put_sums(work, to + lane, lanes, get_sums(sums, beside + column, inner, exact))
            own[lane] = temperature_at(temperature, i * inner + column)
        row_max, own_sums = load(work, FIELDS * width), load_all(work, to, lanes, exact)
        temperatures = temperature if len(temperature) == 1 else own
        rates = lane_rates(temperatures, 0, lanes, rate, work)
        kinds = write_fields(row_max, own_sums, rates, temperatures, 0, exact, work, j, width)
        plain, unmasked = kinds[0] and plain, kinds[1] and unmasked
    return plain, unmasked


@jit
def write_as_they_lie(x, start, size, out, to, work, width, kinds, exact):
    """Write the results of some entries, from where the pattern of columns begins."""
    lanes, zero, (plain, unmasked) = lane_count(work), spread(0.0, work), kinds
    absent = absent_value(zero, exact)
    for i in range(0, size, width):
        for j in range(0, min(width, size - i), lanes):
            at, count = start + i + j, size - i - j
            value = strip_value(read(x, at, count, zero), work, j, width, plain, exact)
            if not unmasked:
                value = present(x, at, count, value, absent)
            write(out, to + i + j, count, value)


@Kernel
def softmax_interleaved_chunks(team, parts, x, mask, temperature, out):
    """Softmax of long interleaved columns, in three passes that are compiled as one."""
    chunk_passes(team, parts, x, mask, temperature, None, out)


@Kernel
def log_softmax_interleaved_chunks(team, parts, x, mask, temperature, out):
    """Logarithm of the softmax of long interleaved columns."""
    chunk_passes(team, parts, x, mask, temperature, (None,), out)


@Kernel
def interleaved_chunk_sums(team, parts, x, mask, temperature, exact):
    """Maxima, an array (outer, inner), and sums, (outer, QUANTITIES, inner), of columns; both flat."""
    return chunk_passes(team, parts, x, mask, temperature, exact, None)


def value_interleaved_chunks(parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of long interleaved columns."""
    maxima, sums = interleaved_chunk_sums(parts, x, mask, temperature, (weighted,))
    tall_values(x, mask, temperature, maxima, sums, out, weighted)
