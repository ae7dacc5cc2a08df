"""Which kernel takes which slices, and how a kernel is built: the table of thresholds.

A kernel is named by a `Spec`. To choose one needs no GPU, and neither does to compile it (`build`).
"""

import functools
import math
from typing import NamedTuple

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Spec(NamedTuple):
    """What distinguishes one kernel from others."""

    function: str  # in `_cuda_kernels`
    operation: str
    dtype: str
    group: str = "thread"  # who shares a slice, in `_cuda_kernels.GROUPS`
    threads: int = 128  # in a block
    members: int = 1  # threads of a block that share a slice
    team: str = ""  # what blocks that share a slice tell each other by way of, in `_cuda_kernels.TEAMS`
    pieces: int = 1  # that a thread holds
    access: int = 1  # entries read at a time
    shifted: bool = False  # whether a row is read from the multiple of 128 bits before it on
    resident: int = 1  # blocks that a multiprocessor shall hold at once, by the registers of their threads
    per_slice: bool = False  # whether each slice has a law of its own
    masked: bool = False
    tile: int = 0  # bytes of shared memory for entries, at most, of which the kernel itself knows nothing
    source: str = "float64"  # dtype of the temperatures that laws are worked out of
    ranks: tuple[int, int] = (1, 1)  # axes over slices and over entries of a slice, for any strides

    @property
    def lanes(self):
        """Entries of a piece."""
        return 1 if self.function.endswith(("strided", "short")) else 16 // ITEMSIZE[self.dtype]

    @property
    def slices(self):
        """Slices that a block takes at a time."""
        return max(1, self.threads // self.members)

    @property
    def each(self):
        """Short rows of a thread: so many that enough bytes are on their way."""
        return -(-SHORT_BYTES // (self.pieces * ITEMSIZE[self.dtype])) if self.group == "thread" else 1

    @property
    def capacity(self):
        """Entries that a group holds."""
        return self.members * self.pieces * self.lanes


class Class(NamedTuple):
    """Groups of one kind, and how many words of 32 bits of a slice each of their threads may hold.

    With ``resident`` blocks at once on a multiprocessor, some load and store while others compute. It is
    asked of softmax alone, of float64 in short rows; the others have more to hold, and would spill. So would
    columns, some rows that are not aligned, and some with a law each: fewer blocks are asked of them.
    """

    group: str
    threads: int
    members: int
    words: int
    resident: int = 1


class Tile(NamedTuple):
    """Memory of a block for slices, and how many blocks of a team have one each."""

    team: str
    kilobytes: float
    blocks: int
    threads: int
    resident: int = 1


class Gpu(NamedTuple):
    """What the choice of a kernel depends on."""

    capability: tuple[int, int]
    multiprocessors: int
    shared: int = 99 * 2**10  # bytes of shared memory that a block may ask for
    cluster: int = 1  # most blocks of a cluster


# Short rows that are not aligned to 128 bits: a thread has up to 32 words of its own row in registers (64
# spill), and a block reads and writes its rows as they lie, by way of shared memory.
SHORT = 32
SHORT_THREADS = 128
SHORT_BYTES = 24  # for a thread, at least

# Rows, by length. With 16 words, four 128-bit loads of each thread are on their way, and what a group does
# once is shared by many entries. The choice never depends on the number of rows, as the bits of a slice must
# not.
SHORT_ROWS = (
    Class("warp", 128, 1, 4, 8),
    Class("warp", 128, 2, 16, 8),
    Class("warp", 128, 4, 16, 8),  # up to 64 words: whole sectors of 32 bytes for each row
    Class("warp", 128, 8, 16, 8),
    Class("warp", 128, 16, 16, 8),
)
ROWS = {  # by the size of entries; a warp needs no barrier
    2: (
        *SHORT_ROWS,
        Class("warp", 128, 32, 32, 5),
        # To 1152, as a warp leaves more places empty: 0.96 of a copy's speed on an H100 at 1025, else 0.89.
        Class("warp", 128, 16, 72, 4),
        Class("warp", 128, 32, 64, 4),  # to 2048
    ),
    4: (
        *SHORT_ROWS[:2],
        # With registers for four blocks, no slower than PyTorch's on an H100, where for eight it was by 2 %.
        *(class_._replace(resident=4) for class_ in SHORT_ROWS[2:]),
        Class("warp", 128, 32, 32, 5),
        Class("warp", 128, 32, 40, 4),  # to 1280
    ),
    8: (
        *SHORT_ROWS,
        Class("warp", 128, 32, 16, 8),
        Class("warp", 128, 32, 40),  # to 640
    ),
}
# From here on one row needs more threads than a warp: as many warps as leave the fewest entries idle. Entries
# that a thread holds, and threads, at most, by the size of entries.
BLOCK_ENTRIES = {2: 32, 4: 16, 8: 8}
BLOCK_THREADS = {2: 256, 4: 384, 8: 384}

# Columns, by length, where they are not aligned to 128 bits, or so short that a thread holds one.
COLUMNS = (
    Class("column", 128, 1, 32),  # up to 32 words: a column per thread, nothing to exchange
    Class("column", 256, 8, 16, 4),  # to 128
    Class("column", 512, 16, 16, 2),  # to 256
    Class("column", 512, 32, 24),  # to 768
)

# Longer slices lie in shared memory, in tiles: a row, or as many columns as fill a line of so many bytes. The
# first tile of a list that has room takes a slice, in one block or in as few blocks of a team as hold it.
# What follows are shares of a copy's speed on an H100, with 1 GB to read and write.
# Softmax of rows, summed at once: float32 0.96 with 50257 entries, 0.96 with 65536 in a cluster of six, 0.94
# with 128256 in one of seven; bfloat16 0.96 and 0.94 with 128256 and 262144. A cluster is as slow as the
# slowest of its multiprocessors, which are neighbours, a team of the grid as the slowest of all: 0.84 with a
# million of bfloat16, where clusters, of 16 blocks with a multiprocessor for each, have 0.71.
LINE_BYTES = 64
AT_ONCE_TILES = {
    2: (
        Tile("", 220, 1, 256, 3),
        Tile("cluster", 54, 16, 256, 4),
        Tile("cluster", 72, 16, 256, 3),
        Tile("grid", 72, 1000, 256, 3),
    ),
    4: (
        # Three blocks of 256 threads have 0.93 with 8192 entries, so five are smaller here: not timed yet.
        Tile("", 43.5, 1, 128, 5),
        Tile("", 220, 1, 256, 3),
        Tile("cluster", 43.5, 6, 128, 5),
        Tile("cluster", 72, 16, 256, 3),
        Tile("grid", 108, 1000, 256, 2),
    ),
}
# Other rows have more to compute. Of float64: 0.85, 0.80 and 0.75 with 16384, 32768 and 128256.
ROW_TILES = (
    Tile("", 110, 1, 256),
    Tile("", 220, 1, 512),
    Tile("cluster", 108, 16, 256),
    Tile("grid", 108, 1000, 256),
)
# Columns tell each other more, so a grid of many blocks is no use (0.06 with 228): 0.92, 0.80 and 0.71 with
# 1000, 2000 and 16384 entries, and 0.38 with 131072 in the grid.


def _column_tiles(alone, in_cluster):
    """Tiles for columns, with so many blocks on a multiprocessor."""
    return (
        Tile("", 72, 1, 256, alone),
        Tile("cluster", 72, 16, 128, in_cluster),
        Tile("cluster", 200, 16, 512),
        Tile("", 220, 1, 256, alone),  # without clusters
        Tile("grid", 216, 40, 512),
    )


COLUMN_TILES = {2: _column_tiles(2, 4), 4: _column_tiles(3, 5), 8: _column_tiles(3, 5)}
SLACK_BYTES = 256  # for the alignment of what lies beside a tile
TILES_FROM = (8, 0)  # compute capability that copies to shared memory in the background
MOST_IN_CLUSTER = {9: 16, 10: 16, 12: 8}  # blocks, by the first number of the compute capability
LARGEST_CLUSTER, CLUSTER_AT_ANY_RATE = 16, 8

# What is longer still is split into small parts, as are slices on older GPUs.
SPLIT_ROWS = Class("block", 256, 256, 16, 4)
SPLIT_COLUMNS = Class("column", 512, 16, 16, 2)

# Bytes of split slices that are summed and then read again before the next: half of the L2 cache of an H100,
# so that the second reading finds them there.
WAVE_BYTES = 24 * 2**20

# Any strides: one entry at a time, as neighbouring threads take neighbouring entries, or slices.
STRIDED_WARP = Class("warp", 128, 32, 0)
STRIDED_BLOCK = Class("block", 256, 256, 0)
STRIDED_COLUMN = Class("column", 256, 8, 0)
STRIDED_LONG = 512  # entries, or parts of a split slice, from which a block shares a slice

SMALL_TYPES_FROM = (8, 0)  # compute capability that rounds float32 to 16-bit types, two at a time
MOST_BLOCKS = 65535  # along the second axis of a grid

TILED = ("_rows", "_columns", "_lines")
# Kernels that have the whole slice at once, and so need not know what the terms of parts have in common.
BRIEF = ("transform", "transform_short", "transform_rows", "transform_columns", "transform_lines")

# Exchanges of which the blocks of a team keep the states: of maxima and of sums, and two more for rare ones.
AREAS = 4

# Numbers that a part of a slice leaves in memory: its maximum and its sums.
FIELDS = {"softmax": 3, "log_softmax": 4, "logsumexp": 4, "entropy": 6}


def _fit(classes, dtype, n):
    """First class that holds n entries, and how many pieces each thread gets; None if there is none."""
    words = 2 if dtype == "float64" else 1
    lanes = 16 // ITEMSIZE[dtype]
    for class_ in classes:
        pieces = -(-n // (class_.members * lanes))
        if pieces * lanes * words <= max(class_.words, lanes * words):
            return class_, pieces
    return None


def _fit_block(dtype, n):
    """Block that holds n entries with the fewest left over, and how many pieces each thread gets."""
    size = ITEMSIZE[dtype]
    lanes = 16 // size
    found = []
    for pieces in range(BLOCK_ENTRIES[size] // lanes, 0, -1):
        threads = -(-n // (32 * pieces * lanes)) * 32
        if threads <= BLOCK_THREADS[size]:
            found.append((threads * pieces, threads, pieces))
    if not found:
        return None
    _, threads, pieces = min(found)
    # 64 registers for each thread that holds 16 entries, 96 for more.
    resident = max(1, (1024 if pieces * lanes <= 16 else 640) // threads)
    return Class("block", threads, threads, 0, resident), pieces


def _share_of_residents(dtype, group, access, per_slice, shifted):
    """Share of the blocks of a class for kernels that hold more beside their entries, and would spill."""
    if group == "column":
        return 0.75
    if ITEMSIZE[dtype] == 2 and access == 1:
        return 0.5
    return 0.75 if per_slice and shifted and dtype != "float32" else 1.0


def _spec(function, operation, dtype, class_, pieces, access, per_slice, shifted=False):
    group, threads, members, _, resident = class_
    if operation != "softmax" or (dtype == "float64" and (function != "transform" or group == "column")):
        resident = 1
    elif function == "transform":
        resident = max(1, int(resident * _share_of_residents(dtype, group, access, per_slice, shifted)))
    return Spec(
        *(function, operation, dtype, group, threads, members, "", pieces, access, shifted),
        *(resident, per_slice),
    )


def elementwise(operation):
    """Whether the result of an operation has the shape of x."""
    return operation in ("softmax", "log_softmax")


def tile_spec(verb, operation, dtype, n, line, access, alignment, per_slice, gpu):
    """Spec of the kernel that keeps slices in shared memory; None if they do not fit there."""
    if gpu.capability < TILES_FROM or (line and alignment != "aligned"):
        return None
    size = ITEMSIZE[dtype]
    name, group, lines = f"{verb}_rows", "block", 1
    tiles = AT_ONCE_TILES[size] if is_at_once(name, operation, dtype, access) else ROW_TILES
    if line:
        group, lines, tiles = "column", line // size, COLUMN_TILES[size]
        is_simple = operation == "softmax" and not per_slice
        name = "transform_lines" if is_simple else f"{verb}_columns"
        access = 16 // size if is_simple else 1
    for tile in tiles:
        class_ = Class(group, tile.threads, tile.threads // lines, 0, tile.resident)
        spec = _spec(name, operation, dtype, class_, 1, access, per_slice)
        spec = spec._replace(team=tile.team)
        spec = spec._replace(
            tile=int(min(tile.kilobytes * 2**10, gpu.shared - static_bytes(spec))) // 16 * 16
        )
        most = tile.blocks
        if tile.team == "cluster":
            most = min(most, gpu.cluster) if gpu.cluster > 1 else 0
        elif tile.team == "grid":
            most = min(most, gpu.multiprocessors * min(spec.resident, gpu.shared // spec.tile))
        if blocks_needed(spec, n) <= most:
            return spec
    return None


def is_at_once(function, operation, dtype, access):
    """Whether a kernel sums portions of rows as they arrive, and blocks of a team have one exchange.

    Terms that take the place of float32s must be written by those who made them, 128 bits at a time.
    """
    size = ITEMSIZE[dtype]
    return (
        function == "transform_rows" and operation == "softmax" and (size == 2 or 4 == size == 16 // access)
    )


def blocks_needed(spec, n):
    """How many tiles hold slices of n entries."""
    line = spec.slices * ITEMSIZE[spec.dtype] if spec.group == "column" else 0
    return -(-n // max(1, tile_entries(spec.tile, ITEMSIZE[spec.dtype], spec.threads, line)))


def tile_entries(tile, itemsize, threads, line):
    """Entries of a slice in a tile of so many bytes: of columns with a line, or of a row, if that is 0."""
    if line:
        whole = 16 * threads  # a column is filled up to a multiple of what its threads take at a time
        return tile // whole * whole // line
    return (tile - 16) // itemsize  # a row may begin anywhere in its first piece


def line_of(dtype, inner):
    """Bytes of neighbouring columns that a tile holds: all of them if they are few; 0 for rows."""
    if inner == 1:
        return 0
    return min(LINE_BYTES, max(16, 1 << (inner * ITEMSIZE[dtype] - 1).bit_length()))


def alignment_of(dtype, x, out, n, inner, x_pitch, out_pitch):
    """How slices lie, and those of the result (None if there is one number per slice), for `plan`."""
    size = ITEMSIZE[dtype]
    lanes = 16 // size
    skew = x // size % lanes
    if inner > 1:
        return "apart" if skew or inner % lanes or (out is not None and out // size % lanes) else "aligned"
    if out is not None and ((out // size - skew) % lanes or (out_pitch - x_pitch) % lanes):
        return "apart"
    return "shifted" if skew or n % lanes or x_pitch % lanes else "aligned"


@functools.lru_cache(maxsize=1024)
def plan(operation, dtype, n, line, is_packed, alignment, per_slice, gpu) -> tuple[Spec, ...]:
    """Return the one spec, or the two or three for a split slice, with which slices of n entries are taken.

    The ``line`` is that of columns (see `line_of`). ``is_packed`` says that rows follow each other without
    gaps. The ``alignment`` is that of all slices to 128 bits: "aligned", "shifted" (rows begin anywhere, and
    those of the result at the same places), "apart".
    """
    verb = "transform" if elementwise(operation) else "reduce"
    words = n * (2 if dtype == "float64" else 1)
    lanes = 16 // ITEMSIZE[dtype]
    access = 1 if alignment == "apart" or line else lanes
    shifted = alignment == "shifted"
    found = None
    if line:
        if alignment != "aligned" or words <= COLUMNS[0].words or gpu.capability < TILES_FROM:
            found = _fit(COLUMNS, dtype, n)
    elif words <= SHORT and is_packed and alignment != "aligned":
        class_ = Class("thread", SHORT_THREADS, 1, SHORT)
        return (_spec(f"{verb}_short", operation, dtype, class_, n, access, per_slice),)
    else:
        places = n + (lanes - 1 if shifted else 0)
        found = _fit(ROWS[ITEMSIZE[dtype]], dtype, places) or _fit_block(dtype, places)
    if found is not None:
        return (_spec(verb, operation, dtype, *found, access, per_slice, shifted),)
    tile = tile_spec(verb, operation, dtype, n, line, access, alignment, per_slice, gpu)
    if tile is not None:
        return (tile,)
    class_ = SPLIT_COLUMNS if line else SPLIT_ROWS
    pieces = class_.words * 4 // 16 if ITEMSIZE[dtype] > 2 else class_.words // 8
    first = _spec(
        "summarise", operation, dtype, class_, pieces, access if alignment == "aligned" else 1, per_slice
    )
    last = first._replace(function=f"{verb}_parts")
    if not elementwise(operation):
        return first, last
    merging = STRIDED_BLOCK if n >= STRIDED_LONG * first.capacity else STRIDED_WARP
    return first, _spec("merge_slices", operation, dtype, merging, 1, 1, per_slice), last


def states(spec):
    """States that a block of a team tells the others; that of a line has those of its lanes."""
    return spec.slices // spec.lanes if spec.function.endswith("_lines") else spec.slices


def room(spec):
    """Words of 64 bits, of which half is told, for one state."""
    lanes = spec.slices // states(spec)
    return (FIELDS[spec.operation] + 1) * (2 if spec.dtype == "float64" else 1) * lanes  # and an origin


def board_words(spec):
    """Words of 64 bits that a block of a team leaves for the others, by way of the grid's memory."""
    return AREAS * states(spec) * room(spec)


def slots_needed(spec):
    """States that a block exchanges by way of shared memory."""
    if spec.function.endswith("_lines"):
        return spec.threads // 32 * states(spec)
    return spec.threads if spec.group == "column" else 32


def slots_of_cluster(spec):
    """States that the blocks of a cluster leave for each of them; rare ones have room of their own."""
    return (2 if spec.operation == "logsumexp" else 1) * LARGEST_CLUSTER * states(spec)


def static_bytes(spec):
    """Shared memory, at most, that a kernel needs beside its tile: the states of each of its exchanges."""
    lanes = spec.slices // states(spec)
    fields = FIELDS[spec.operation]
    if spec.operation == "logsumexp":
        fields += 3  # the second maximum, and sums of faint terms
    if is_at_once(spec.function, spec.operation, spec.dtype, spec.access):
        fields += FIELDS[spec.operation] + 1
    rooms = slots_needed(spec) + (slots_of_cluster(spec) if spec.team == "cluster" else 0)
    return fields * lanes * rooms * (8 if spec.dtype == "float64" else 4) + SLACK_BYTES


def shares(spec, n, blocks):
    """How many of n entries each of some blocks has at most, and the size of its tile in bytes."""
    size = ITEMSIZE[spec.dtype]
    lanes = 16 // size
    share = -(-n // blocks)
    if spec.group == "column":
        whole = lanes * spec.members
        return share, -(-share // whole) * whole * spec.slices * size
    share = -(-(share + lanes - 1) // lanes) * lanes
    return share, share * size


def strided_plan(operation, dtype, n, is_across, per_slice, masked, ranks):
    """Spec for any strides; ``is_across`` says that slices are nearer to each other than entries."""
    verb = "transform" if elementwise(operation) else "reduce"
    class_ = STRIDED_COLUMN if is_across else STRIDED_BLOCK if n >= STRIDED_LONG else STRIDED_WARP
    spec = _spec(f"{verb}_strided", operation, dtype, class_, 1, 1, per_slice)
    return spec._replace(masked=masked, ranks=ranks)


def laws_plan(dtype, source, rank):
    """Spec of the kernel that works out a law for each slice, from temperatures of a dtype."""
    return Spec("laws", "softmax", dtype, source=source, ranks=(rank, 1))


def build(spec, capability):
    """PTX of a kernel, whose entry is called like its function, for a compute capability."""
    from fastmax import _cuda_target as target

    return target.compile_kernel(
        spec.function, *names(spec, target), argument_types(spec), capability, (spec.threads, spec.resident)
    )


def names(spec, target):
    """Return the function of a spec, and what stands for the names in it; primitives are the target's."""
    from fastmax import _cuda_kernels as kernels

    wide = 16 // ITEMSIZE[spec.dtype]
    chunks = -(-(spec.threads * spec.each * spec.pieces + wide - 1) // (wide * spec.threads))
    tiled = spec.function.endswith(TILED)
    lines = spec.function.endswith("_lines")
    apart = spec.threads if spec.function.endswith("_columns") else 1
    replaced = {
        **target.PRIMITIVES,
        **kernels.OPERATIONS[spec.operation],
        **kernels.GROUPS[spec.group],
        **kernels.LAWS[spec.per_slice],
        "PIECES": (0,) * spec.pieces,
        "LANES": spec.lanes,
        "WIDE": wide,
        "EACH": spec.each,
        "CHUNKS": (0,) * chunks,
        "across_tile": target.PRIMITIVES.get("across", kernels.across),
        "PARTS": max(1, spec.slices // spec.lanes),
        "ACCESS": spec.access,
        "SHIFTED": spec.shifted,
        "THREADS": spec.threads,
        "GROUP": spec.members,
        "SLICES": spec.slices,
        "CAPACITY": spec.capacity,
        "MASKED": spec.masked,
        "FIELDS": FIELDS[spec.operation],
        "AREAS": AREAS,
        "RARE_AREA": AREAS // 2 if spec.team == "grid" else int(spec.operation == "logsumexp"),
        "STATES": states(spec),
        "LARGEST_CLUSTER": LARGEST_CLUSTER,
        "ROOM": room(spec),
        "KEPT": spec.operation == "softmax" and ITEMSIZE[spec.dtype] > 2,
        "ABSENT": 0.0 if spec.operation in ("softmax", "entropy") else -math.inf,
        "load": target.loader(spec.lanes, min(spec.lanes, spec.access), spec.shifted),
        "store": target.storer(spec.lanes, min(spec.lanes, spec.access), spec.shifted),
        "peek": target.peeker(spec.lanes, apart),
        "keep": target.keeper(spec.lanes, apart),
        "slots": target.slots_for(slots_needed(spec)),
        "slots_of_cluster": target.slots_for(slots_of_cluster(spec)),
    }
    strided = spec.function.endswith("strided")
    if ITEMSIZE[spec.dtype] == 2:
        replaced |= kernels.COARSE
        if not strided:
            replaced |= kernels.COARSE_SUMS
            if spec.operation == "softmax":
                replaced |= kernels.COARSE_SOFTMAX
    if spec.operation == "softmax" and spec.dtype == "float32" and spec.function in BRIEF:
        replaced |= kernels.BRIEFLY
    if spec.members == 1:
        replaced |= {"exchange": kernels.alone, "exchange_top": kernels.alone, "anyone": kernels.my_own}
    if tiled:
        replaced |= {"entry_of": kernels.tile_entry, "among": replaced["exchange"]}
        replaced["exchange_parts"] = replaced["exchange"]
        if spec.group == "column":
            replaced["first_in_tile"] = kernels.first_in_columns
    if lines:
        replaced["copy_in"] = target.copy_in_with_neighbours
        replaced |= {
            "across_tile": kernels.lanes_apart,
            "first_in_tile": kernels.first_in_row,
            "among": kernels.among_lines,
            "exchange": kernels.among_lines,
            "exchange_top": kernels.among_lines,
        }
    replaced |= kernels.TEAMS[spec.team]
    if is_at_once(spec.function, spec.operation, spec.dtype, spec.access):
        replaced |= kernels.AT_ONCE[ITEMSIZE[spec.dtype]]
    if strided:
        replaced["entry_of"] = kernels.strided_entry
        if spec.operation == "softmax":
            replaced |= kernels.FROM_NOTHING
    if spec.function.endswith("parts") or spec.function == "summarise":
        replaced["block"] = target.block_y
    return getattr(kernels, spec.function), replaced


def argument_types(spec):
    """Numba types of the arguments of a kernel."""
    from fastmax import _cuda_target as target

    entries = target.pointer(spec.dtype)
    work = target.pointer(target.work_name(spec.dtype))
    integer = target.INTEGER
    outer, inner = (target.integers(rank) for rank in spec.ranks)
    law = (work, target.law_type(spec.dtype))
    if spec.function == "laws":
        return target.pointer(spec.source), work, integer, outer, outer
    if spec.function == "summarise":
        return integer, integer, entries, work, *law, *(integer,) * 4
    if spec.function == "merge_slices":
        return integer, integer, work, work, *law, integer
    if spec.function.endswith("parts"):
        steps = 4 if spec.function == "transform_parts" else 5
        return integer, integer, entries, entries, work, *law, *(integer,) * steps
    if spec.function.endswith("strided"):
        strides = (target.tuples(outer), target.tuples(inner))
        return entries, entries, target.pointer("bool"), *law, integer, integer, *strides
    if spec.function.endswith(TILED):
        return entries, entries, target.board_pointer(), *law, *(integer,) * 7
    return entries, entries, *law, *(integer,) * 6
