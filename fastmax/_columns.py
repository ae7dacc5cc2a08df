"""Schedules for columns: slices that are neighbours in memory, as their entries are not.

Arrays come as (outer, n, inner), see `_cpu`. Schedules:

- columns: neighbouring slices lie side by side, a thread takes a tile of them, one per lane;
- shallow columns: so few rows that softmax reads and writes one vector of columns after the other;
- a few columns: on one thread at one temperature, which is a shorter way;
- tall columns: too tall for a tile; each is taken chunk by chunk, and threads share them.
"""

import functools
import math
from collections import namedtuple

from fastmax import _slice
from fastmax._jit import jit, kernel, plain_kernel
from fastmax._lanes import (
    LANE_BYTES,
    LINE_BYTES,
    PAGE_BYTES,
    SECOND_CACHE_BYTES,
    entries_of,
    lane_count,
    load,
    pointer,
    prefetch_to_read,
    prefetch_to_write,
    present,
    put,
    read,
    settle,
    spread,
    store,
    stream,
    to_stream,
    touch,
    workspace,
    write,
)
from fastmax._math import (
    add_sums,
    larger,
    normalizer,
    probability,
    rate_of,
    ratio_scale,
    ratio_terms,
    term_of,
)
from fastmax._slice import (
    CHUNK,
    QUANTITIES,
    Soon,
    add_terms,
    end_of_sums,
    fetch,
    get_sums,
    is_new,
    kept_terms,
    lane_maxima,
    needs_no_mask,
    open_sums,
    start_of_sums,
    sums_apart,
    sums_of_all,
)
from fastmax._threads import Kernel, each_task
from fastmax._tiles import (
    FIELDS,
    are_plain,
    column_sums,
    field,
    first_rate,
    is_far,
    lane_rates,
    log_value,
    mixed_scales,
    normalized,
    part_of,
    pitch,
    place,
    read_guard,
    read_scale,
    read_sums,
    temperature_at,
    tile_sums,
    value_beside,
    value_lanes,
    workspaces,
    write_ends,
    write_scales,
    write_sums,
)
from fastmax._tracing import traced

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

# Outer indices for each thread from which threads do not take tiles in turn. They count in one place then,
# and 20000 x 10 x 50 took 3.3 times as long over its middle axis, twice as long as on one thread.
MANY = 8


# -- columns --------------------------------------------------------------------------------------
# A tile of columns is copied into working memory, where each vector of columns is contiguous: the passes of
# a slice then take a column in each lane. Where it lies, lines of a tile are often a power of two apart, of
# which a cache keeps no more than eight. Numbers for each column, their fields, stand before the tile.
# Threads take turns in tiles of few outer indices: the lines of neighbours share pages of memory.


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
    tile, at_first = begin_tile(task, tiles, x, mask, out, w), FIELDS * width
    plain = unmasked = True
    for j in range(0, tile.count, lanes):
        at, number = at_first + j * n, tile.number + j
        row_max = lane_maxima(w, at, at + n * lanes)
        soon = Soon(entries, tile.following + j, tile.by * step, results, tile.base + j, tile.by * inner)
        rates = lane_rates(temperature, number, tile.count - j, rate, w)
        stored = kept_terms(w, exact)
        sums = tile_sums(w, at, n, row_max, temperature, number, rates, exact, stored, j, width, soon)
        own = write_ends(sums, row_max, rates, temperature, number, exact, w, j, width)
        plain, unmasked = own[0] and plain, own[1] and unmasked
    kinds = plain, unmasked
    for k in range(n):
        row, at = tile.base + k * inner, at_first + k * lanes
        ahead = row + min(tile.further, n - 1 - k) * inner
        write_row(entries, results, row, w, at, n, tile.count, width, kinds, exact, ahead, tiles.far)
    if tiles.far:
        settle()


@jit
def write_row(x, out, row, work, at, n, count, width, kinds, exact, ahead, far):
    """Write a row of a tile, of whose columns `write_ends` tells the kinds; fetch what comes unless far."""
    lanes, zero, (plain, unmasked) = lane_count(work), spread(0.0, work), kinds
    absent = zero if exact is None else spread(-math.inf, zero)
    for j in range(0, count, lanes):
        value = load(work, at + j * n)
        if exact is None:
            value = normalized(value, work, j, width)
        else:
            value = log_value(value, work, j, width, plain)
        if not unmasked:
            value = present(x, row + j, count - j, value, absent)
        write_far_or_ahead(out, row + j, count - j, value, ahead + j, far)


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
            total, error = end_of_sums(sums)
        else:
            scale, guard = mixed_scales(row_max, scale, rates, temperature, number, w, 0, lanes)
            total, error = column_sums(w, at, n, scale, guard, None, w, soon)
        high, low = normalizer(total, error)
        unmasked = needs_no_mask(are_plain(row_max, rates), high)
        for k in range(n):
            row, value = tile.base + k * inner + j, probability(load(w, at + k * lanes), high, low)
            if not unmasked:
                value = present(entries, row, count, value, zero)
            write(results, row, count, value)


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
    lanes, width = lane_count(w), tiles.width
    tile, at_first = begin_tile(task, tiles, x, mask, None, w), FIELDS * width
    for j in range(0, tile.count, lanes):
        at, number, count = at_first + j * n, tile.number + j, tile.count - j
        row_max = lane_maxima(w, at, at + n * lanes)
        soon = Soon(entries, tile.following + j, tile.by * step, None, 0, 0)
        if value_lanes(w, at, n, row_max, temperature, number, count, rate, weighted, j, width, soon):
            write(results, number, count, load(w, field(0, j, width)))
            continue
        for k in range(min(lanes, count)):
            own, first = temperature_at(temperature, number + k), tile.source + j + k
            value = value_beside(entries, first, step, n, own, weighted, w, j + k, width)
            put(results, number + k, value)


@jit
def as_one_block(x):
    """View (1, n, inner) of an array (n, inner)."""
    return x.reshape((1, *x.shape))


@jit
def write_few_columns(x, temperature, exact, out):
    """Write the softmax of a few columns, or its logarithm if the sums are to be exact: the short way.

    Return whether ``out`` fits: if not, nothing is written.
    """
    if not _slice.fits(x, out):
        return False
    x, out = as_one_block(x), as_one_block(out)
    tiles, like, one = tiles_of(x, out, 1), pointer(x), (temperature,)
    work, rate = workspaces(1, (FIELDS + x.shape[1]) * tiles.width, like), first_rate(one, like)
    for task in range(tiles.count):
        write_tile(task, 0, tiles, x, None, one, rate, exact, out, work)
    return True


@plain_kernel(2, 2)
def softmax_few_columns(x, temperature, out):
    """Softmax of a few columns on one thread, at one temperature, which is a float."""
    return write_few_columns(x, temperature, None, out)


@plain_kernel(2, 2)
def log_softmax_few_columns(x, temperature, out):
    """Logarithm of the softmax of a few columns on one thread, at one temperature."""
    return write_few_columns(x, temperature, (None,), out)


@jit
def value_few_columns(x, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of a few columns."""
    x = as_one_block(x)
    tiles, like, one = tiles_of(x, None, 1), pointer(x), (temperature,)
    work, rate = workspaces(1, (FIELDS + x.shape[1]) * tiles.width, like), first_rate(one, like)
    for task in range(tiles.count):
        value_tile(task, 0, tiles, x, None, one, rate, out, weighted, work)


@plain_kernel(2, 1)
def logsumexp_few_columns(x, temperature, out):
    """Logsumexp of a few columns on one thread, at one temperature."""
    value_few_columns(x, temperature, out, None)


@plain_kernel(2, 1)
def entropy_few_columns(x, temperature, out):
    """Entropy of the softmax of a few columns on one thread, at one temperature."""
    value_few_columns(x, temperature, out, True)


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
    partial = workspace(outer * chunks * QUANTITIES * inner, like)
    maxima, sums = workspace(outer * inner, like), workspace(outer * QUANTITIES * inner, like)
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
    """Maxima, an array (outer, inner), and sums, (outer, QUANTITIES, inner), of columns; both flat."""
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
        to = (i * -(-n // CHUNK) + chunk) * QUANTITIES * inner + first + j
        write_sums(partial, to, inner, count - j, sums)


@jit
def merge_strips(partial, i, chunks, inner, exact, sums):
    """Merge the sums of all chunks of some columns."""
    for j in range(0, inner, lane_count(sums)):
        merged = open_sums(spread(0.0, sums), exact)
        for chunk in range(chunks):
            part = read_sums(partial, (i * chunks + chunk) * QUANTITIES * inner + j, inner, exact)
            merged = add_sums(merged, part)
        write_sums(sums, i * QUANTITIES * inner + j, inner, inner - j, sums_of_all(merged, exact))


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
    further = rows_ahead(count, w)
    plain = unmasked = True
    for j in range(0, count, lanes):
        column = i * inner + first + j
        row_max = read(pointer(maxima), column, count - j, zero)
        own = read_sums(sums, i * QUANTITIES * inner + first + j, inner, exact)
        rates = lane_rates(temperature, column, count - j, rate, w)
        kinds = write_fields(row_max, own, rates, temperature, column, exact, w, j, width)
        plain, unmasked = kinds[0] and plain, kinds[1] and unmasked
    absent = zero if exact is None else spread(-math.inf, zero)
    for k in range(rows):
        row, to = start + k * step, base + k * inner
        ahead = min(further, rows - 1 - k)
        for j in range(0, count, lanes):
            prefetch_to_read(entries, row + ahead * step + j)
            prefetch_to_write(results, to + ahead * inner + j)
            value = strip_value(read(entries, row + j, count - j, zero), w, j, width, plain, exact)
            if not unmasked:
                value = present(entries, row + j, count - j, value, absent)
            write(results, to + j, count - j, value)


@jit
def write_fields(row_max, sums, rates, temperature, column, exact, work, j, width):
    """Write what `strip_value` needs of the columns from j on; return their kinds, as `write_ends` does."""
    if exact is None:
        write_scales(row_max, ratio_scale(row_max, rates), rates, temperature, column, work, j, width)
    return write_ends(sums, row_max, rates, temperature, column, exact, work, j, width)


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


@functools.partial(kernel, nogil=True)
def tall_values(x, mask, temperature, maxima, sums, out, weighted):
    """Logsumexp of each column from its sums, or entropy unless ``weighted`` is None."""
    outer, n, inner = x.shape
    entries = entries_of(x, mask)
    for column in range(outer * inner):
        i, k = column // inner, column % inner
        own, top = temperature_at(temperature, column), maxima[column]
        beside = get_sums(sums, i * QUANTITIES * inner + k, inner, (weighted,))
        beside = sums_apart(beside, top, rate_of(own, top), (weighted,))
        value = _slice.value_of_sums(entries, place(x, i, 0, k), pitch(x, 1), n, top, own, beside, weighted)
        put(pointer(out), column, value)


def value_tall_columns(parts, x, mask, temperature, out, weighted):
    """Logsumexp, or entropy unless ``weighted`` is None, of columns that all threads share."""
    maxima, sums = tall_sums(parts, x, mask, temperature, (weighted,))
    tall_values(x, mask, temperature, maxima, sums, out, weighted)
