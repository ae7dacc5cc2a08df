"""Schedules for columns that have few neighbours, so that they would fill no vector, or one in part.

Arrays come as (outer, n, inner), see `_cpu`. Memory is read as it lies, with the entries of neighbours
interleaved: runs of it are transposed into a tile, one to each lane, and of that every ``inner``-th vector
belongs to one column. So all lanes have work, and memory is read once in each pass. Schedules:

- interleaved columns: a run is all that an outer index has;
- interleaved chunks: columns are long, and a run is a chunk of all neighbours; threads share them.
"""

import math

import numpy as np

from fastmax import _slice
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
from fastmax._math import add_sums, closed, first_of, larger
from fastmax._rows import pack_rows, unpack_rows
from fastmax._slice import (
    CHUNK,
    Soon,
    absent_value,
    chunk_tile,
    chunk_tile_count,
    get_sums,
    is_new,
    no_sums,
    store_all,
    sums_of_tile,
)
from fastmax._threads import Kernel, each_task
from fastmax._tiles import (
    FIELDS,
    field,
    first_rate,
    lane_rates,
    part_of,
    pitch,
    place,
    put_sums,
    rate_at,
    temperature_at,
    value_lanes,
    workspaces,
    write_lanes,
)
from fastmax._tracing import traced

# Entries of runs that are copied at a time to where they are neighbours, and transposed from there. Chunks of
# 2, 4 or 8 columns lie a multiple of 4 KB apart, and a first cache does not keep as many lines of one set:
# 123000 x 4 float32 take 0.3 of the time to pack for it, and 0.2 to unpack, 123000 x 3 0.6 and 0.3.
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
def group_count(outer, like):
    """Number of groups of outer indices."""
    return -(-outer // lane_count(like))


@jit
def group_workspaces(parts, x, like):
    """Working memory for fields, a column, and a tile, and for the temperatures of a column."""
    _, n, inner = x.shape
    lanes = lane_count(like)
    size = (FIELDS + n + n * inner + piece_size(like)) * lanes + run_size(like)
    return workspaces(parts, size, like), np.empty((parts, lanes), np.float64)


@traced
def staging_of(tile, size, work):
    """Where runs are copied to: behind their tile, and what `pack_rows` may write past its end."""
    return tile + (size + piece_size(work)) * lane_count(work)


@jit
def pack_group(group, x, mask, results, work):
    """Copy a group to a tile; return its first outer index, its number of those, and what is needed soon."""
    (outer, n, inner), step = x.shape, pitch(x, 0)
    lanes, entries = lane_count(work), entries_of(x, mask)
    first = group * lanes
    count = min(lanes, outer - first)
    tile, size = (FIELDS + n) * lanes, n * inner
    pack_runs(entries, first * step, step, size, count, work, tile, staging_of(tile, size, work))
    following = min(first + count, outer - count) * step
    return first, count, Soon(entries, following, lanes, results, first * n * inner, lanes)


@jit
def group_temperatures(temperature, first, count, inner, column, own):
    """Temperatures of a column of a group, one for each lane, or the one of all."""
    own[0] = temperature[0]
    if len(temperature) == 1:
        return own[:1]
    for lane in range(len(own)):
        own[lane] = temperature[(first + min(lane, count - 1)) * inner + column]
    return own


@jit(inline="always")
def write_groups(team, parts, x, mask, temperature, exact, out):
    """Write the softmax of interleaved columns, or its logarithm if the sums are to be exact."""
    like = pointer(x)
    work, own = group_workspaces(parts, x, like)
    rate, new = first_rate(temperature, like), is_new(pointer(out), out.size)
    arguments = x, mask, temperature, rate, exact, out, new, work, own
    each_task(write_group, team, parts, group_count(len(x), like), arguments)


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
    w = pointer(part_of(work, part))
    lanes = lane_count(w)
    first, count, soon = pack_group(group, x, mask, pointer(out), w)
    at, tile = FIELDS * lanes, (FIELDS + n) * lanes
    base, size = first * n * inner, n * inner
    if new:
        touch(pointer(out), base, base + count * size)
    for column in range(inner):
        row_max = take_column(w, tile + column * lanes, inner, n, at)
        temperatures = group_temperatures(temperature, first, count, inner, column, own[part])
        ahead = _slice.later(soon, column * n)
        to, by = tile + column * lanes, inner * lanes
        write_lanes(w, at, n, row_max, temperatures, 0, lanes, rate, exact, ahead, to, by)
    absent = absent_value(get(w, at), exact)
    entries, staging = entries_of(x, mask), staging_of(tile, size, w)
    unpack_runs(w, tile, pointer(out), base, size, count, entries, absent, staging)


@Kernel
def value_interleaved(team, parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of interleaved columns."""
    like = pointer(x)
    work, own = group_workspaces(parts, x, like)
    arguments = x, mask, temperature, first_rate(temperature, like), out, weighted, work, own
    each_task(value_group, team, parts, group_count(len(x), like), arguments)


@jit
def value_group(group, part, x, mask, temperature, rate, out, weighted, work, own):
    """`value_interleaved` of the columns of a group."""
    n, inner = x.shape[1:]
    w, entries = pointer(part_of(work, part)), entries_of(x, mask)
    lanes, exact = lane_count(w), (weighted,)
    first, count, soon = pack_group(group, x, mask, None, w)
    at, tile = FIELDS * lanes, (FIELDS + n) * lanes
    for column in range(inner):
        row_max = take_column(w, tile + column * lanes, inner, n, at)
        temperatures = group_temperatures(temperature, first, count, inner, column, own[part])
        ahead = _slice.later(soon, column * n)
        shown = value_lanes(w, at, n, row_max, temperatures, 0, lanes, rate, weighted, ahead)
        for lane in range(count):
            value = get(w, lane)
            if not shown:
                top, sums = value, get_sums(w, field(1, lane, lanes), lanes, exact)
                start, temp = place(x, first + lane, 0, column), temperature_at(temperatures, lane)
                value = _slice.value_of_sums(entries, start, inner, n, top, temp, sums, weighted)
            put(pointer(out), (first + lane) * inner + column, value)


# -- interleaved chunks: as many chunks of a column as there are lanes ---------------------------------
# Numbers for each column are arrays (outer, inner, tiles) or (outer, inner, chunks, 4), when they are merged
# as those of `_columns`.


@jit(inline="always")
def chunk_passes(team, parts, x, mask, temperature, exact, out):
    """Maxima and sums of columns, which are returned, and results unless ``out`` is None."""
    (outer, n, inner), like = x.shape, pointer(x)
    chunks, tiles = -(-n // CHUNK), chunk_tile_count(n, like)
    work = workspaces(parts, CHUNK * (inner + 1) * lane_count(like) + run_size(like), like)
    maxima, sums = workspace(outer * inner, like), workspace(outer * 4 * inner, like)
    partial, own = workspace(outer * inner * chunks * 4, like), np.empty((parts, lane_count(like)))
    rate, numbers = first_rate(temperature, like), (maxima, sums, partial, work, own)
    for step in range(2 if out is None else 3):
        arguments = step, x, mask, temperature, rate, exact, out, numbers
        each_task(pass_over_tile, team, parts, outer * tiles, arguments)
        for number in range(outer * inner):
            if step == 0:
                maxima[number] = _slice.maximum(partial, number * tiles, (number + 1) * tiles)
            elif step == 1:
                merged = first_of(no_sums(maxima[number], exact))
                for chunk in range(number * chunks, (number + 1) * chunks):
                    merged = add_sums(merged, get_sums(partial, 4 * chunk, 1, exact))
                put_sums(sums, number // inner * 4 * inner + number % inner, inner, closed(merged))
    return maxima, sums


@jit
def pass_over_tile(task, part, step, x, mask, temperature, rate, exact, out, numbers):
    """One pass over as many chunks of all neighbours as there are lanes."""
    maxima, sums, partial, work, own = numbers
    n, inner = x.shape[1:]
    w = pointer(part_of(work, part))
    i, tile = divmod(task, chunk_tile_count(n, w))
    first, rows, count = chunk_tile(tile, n, w)
    size = rows * inner
    if step == 0:
        tiles = chunk_tile_count(n, w)
        source, to = place(x, i, first, 0), i * inner * tiles + tile
        column_maxima(entries_of(x, mask), source, count * size, inner, w, partial, to, tiles)
    elif step == 1:
        sum_chunks(x, mask, i, first, rows, count, temperature, maxima, exact, partial, w)
    elif out is not None:
        width = inner * lane_count(w)
        plain = write_patterns(i, inner, temperature, rate, maxima, sums, exact, w, width, own[part])
        start, to = place(x, i, first, 0), (i * n + first) * inner
        write_run(entries_of(x, mask), start, count * size, pointer(out), to, w, width, plain, exact)


@jit
def sum_chunks(x, mask, i, first, rows, count, temperature, maxima, exact, partial, work):
    """Write the sums of some chunks of all neighbours."""
    n, inner = x.shape[1:]
    lanes, chunks, size = lane_count(work), -(-n // CHUNK), rows * inner
    start, staging = size * lanes, (size + rows) * lanes
    pack_runs(entries_of(x, mask), place(x, i, first, 0), size, size, count, work, 0, staging)
    for column in range(inner):
        number = i * inner + column
        take_column(work, column * lanes, inner, rows, start)
        top, to = maxima[number], number * chunks + first // CHUNK
        rate = rate_at(temperature, number, top)
        store_all(work, staging, lanes, sums_of_tile(work, start, staging, top, rate, exact))
        for k in range(count):
            put_sums(partial, 4 * (to + k), 1, get_sums(work, staging + k, lanes, exact))


@jit
def write_patterns(i, inner, temperature, rate, maxima, sums, exact, work, width, own):
    """Write what entries need as they lie, for a vector of each neighbour; return whether they are plain."""
    lanes, plain = lane_count(work), True
    pattern, beside = FIELDS * width, i * 4 * inner
    for j in range(0, width, lanes):
        for lane in range(lanes):
            column = (j + lane) % inner
            put(work, pattern + lane, maxima[i * inner + column])
            put(work, pattern + lanes + lane, get(sums, beside + column))
            put(work, pattern + 2 * lanes + lane, get(sums, beside + inner + column))
            own[lane] = temperature_at(temperature, i * inner + column)
        row_max = load(work, pattern)
        total, error = load(work, pattern + lanes), load(work, pattern + 2 * lanes)
        temperatures = own[: len(temperature)] if len(temperature) == 1 else own
        rates = lane_rates(temperatures, 0, lanes, rate, work)
        fields = write_fields(row_max, (total, error), rates, temperatures, 0, exact, work, j, width)
        plain = fields and plain
    return plain


@jit
def write_run(x, start, size, out, to, work, width, plain, exact):
    """Write the results of entries as they lie."""
    lanes, zero = lane_count(work), spread(0.0, work)
    absent = zero if exact is None else -spread(math.inf, zero)
    for i in range(0, size, width):
        for j in range(0, min(width, size - i), lanes):
            at, count = start + i + j, size - i - j
            value = strip_value(read(x, at, count, zero), work, j, width, plain, exact)
            write(out, to + i + j, count, present(x, at, count, value, absent))


@jit
def column_maxima(x, start, size, inner, work, partial, to, tiles):
    """Maxima of columns over some entries as they lie: every ``inner``-th vector has the same of them."""
    lanes, lowest = lane_count(work), -spread(math.inf, work)
    for k in range(inner):
        top = lowest
        for i in range(k * lanes, size, inner * lanes):
            top = larger(read(x, start + i, size - i, lowest), top)
        store(work, k * lanes, top)
    for column in range(inner):
        partial[to + column * tiles] = get(work, column)
        for i in range(column + inner, inner * lanes, inner):
            partial[to + column * tiles] = max(partial[to + column * tiles], get(work, i))


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
    """Maxima, an array (outer, inner), and sums, (outer, 4, inner), of columns; both flat."""
    return chunk_passes(team, parts, x, mask, temperature, exact, None)


def value_interleaved_chunks(parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of long interleaved columns."""
    maxima, sums = interleaved_chunk_sums(parts, x, mask, temperature, (weighted,))
    tall_values(x, mask, temperature, maxima, sums, out, weighted)
