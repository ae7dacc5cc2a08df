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
    blocks: int = 1  # of a cluster that share a slice
    pieces: int = 1  # that a thread holds
    access: int = 1  # entries read at a time
    resident: int = 1  # blocks that a multiprocessor shall hold at once, by the registers of their threads
    per_slice: bool = False  # whether each slice has a law of its own
    masked: bool = False
    source: str = "float64"  # dtype of the temperatures that laws are worked out of
    ranks: tuple[int, int] = (1, 1)  # axes over slices and over entries of a slice, for any strides

    @property
    def lanes(self):
        """Entries of a piece: those of 128 bits."""
        return 1 if self.function.endswith("strided") else 16 // ITEMSIZE[self.dtype]

    @property
    def slices(self):
        """Slices that a block takes."""
        return max(1, self.threads // self.members) if self.blocks == 1 else 1

    @property
    def capacity(self):
        """Entries that a group holds."""
        return self.members * self.blocks * self.pieces * self.lanes


class Class(NamedTuple):
    """Groups of one kind, and how many words of 32 bits of a slice each of their threads may hold.

    With ``resident`` blocks at once on a multiprocessor, some load and store while others compute. It is
    asked of softmax of up to 32 bits alone, which does not spill then; the others have more sums to hold.
    """

    group: str
    threads: int
    members: int
    blocks: int
    words: int
    resident: int = 1


# Short rows: a thread has up to 32 words of its own row in registers (64 spill), and neighbouring threads
# read neighbouring entries by way of shared memory, 17 kB for each block.
SHORT = 32
SHORT_THREADS = 128

# Rows, by length. With 16 words, four 128-bit loads of each thread are on their way, and what a group does
# once is shared by many entries: softmax of float32 rows of 64, 128 and 256 takes 54 to 56 instructions per
# entry, by the machine code for an H100, and 70 to 72 with 8 words and twice the threads. Up to 512 threads,
# 64 registers each hold 16 words and what `terms` needs, and a multiprocessor has room for 1024 threads, in
# two blocks or more. A block of 1024 threads has it for itself, and nothing is loaded or stored while it
# computes. In 64 registers it holds 16 words too, softmax of float32, whose sums take two registers where
# those of others take three to five, 24. A cluster has at most 8 blocks on every GPU that has clusters. The
# choice never depends on the number of rows: the bits of a slice must not.
ROWS = (
    Class("warp", 128, 2, 1, 16, 8),  # up to 32 words, where all rows are aligned to 128 bits
    Class("warp", 128, 4, 1, 16, 8),  # to 64: whole sectors of 32 bytes for each row
    Class("warp", 128, 8, 1, 16, 8),  # to 128
    Class("warp", 128, 16, 1, 16, 8),  # to 256
    Class("warp", 128, 32, 1, 32, 5),  # to 1024: no barrier; 167 registers, or 96 for five blocks
    Class("block", 128, 128, 1, 16, 8),  # to 2048: from here on one row needs more threads than a warp
    Class("block", 256, 256, 1, 16, 4),
    Class("block", 512, 512, 1, 16, 2),  # to 8k
    Class("cluster", 512, 512, 2, 16, 2),
    Class("cluster", 512, 512, 4, 16, 2),
    Class("cluster", 512, 512, 8, 16, 2),  # to 64k
    Class("block", 1024, 1024, 1, 16),  # to 16k, softmax of float32 24k, on GPUs without clusters
    Class("cluster", 1024, 1024, 8, 16),  # to 128k
)
ALIGNED_FROM = 16  # words from which a packed row that is aligned need not go through shared memory

# Columns, by length. 16 neighbouring columns are 64 bytes of float32, two sectors of a cache line.
COLUMNS = (
    Class("column", 128, 1, 1, 32),  # up to 32 words: a column per thread, nothing to exchange
    Class("column", 256, 8, 1, 16, 4),  # to 128
    Class("column", 512, 16, 1, 16, 2),  # to 256
    Class("column", 512, 32, 1, 24),  # to 768
)

# Longer slices are split: small parts, so that one row of 10^6 has enough of them for all multiprocessors.
SPLIT_ROWS = Class("block", 256, 256, 1, 16, 4)
SPLIT_COLUMNS = Class("column", 512, 16, 1, 16, 2)

# Bytes of split slices that are summed and then read again before the next: half of the L2 cache of an H100,
# so that the second reading finds them there.
WAVE_BYTES = 24 * 2**20

# Any strides: one entry at a time, as neighbouring threads take neighbouring entries, or slices.
STRIDED_WARP = Class("warp", 128, 32, 1, 0)
STRIDED_BLOCK = Class("block", 256, 256, 1, 0)
STRIDED_COLUMN = Class("column", 256, 8, 1, 0)
STRIDED_LONG = 512  # entries, or parts of a split slice, from which a block shares a slice

CLUSTERS_FROM = (9, 0)  # compute capability
SMALL_TYPES_FROM = (8, 0)  # that rounds float32 to 16-bit types, two at a time
MOST_BLOCKS = 65535  # along the second axis of a grid

# Numbers that a part of a slice leaves in memory: its maximum and its sums.
FIELDS = {"softmax": 3, "log_softmax": 4, "logsumexp": 4, "entropy": 6}


def held_words(class_, operation, dtype):
    """Words that a thread of a class holds without spilling, by the compiler's report."""
    if class_.threads < 1024:
        return class_.words
    if operation == "softmax" and class_.group == "block":
        return 24 if dtype == "float32" else 16
    if dtype == "float64":
        return 4 if class_.group == "cluster" else 8
    return 16


def _fit(classes, operation, dtype, n, capability):
    """First class that holds n entries, and how many pieces each thread gets; None if there is none."""
    words = 2 if dtype == "float64" else 1
    lanes = 16 // ITEMSIZE[dtype]
    for class_ in classes:
        if class_.group == "cluster" and capability < CLUSTERS_FROM:
            continue
        pieces = -(-n // (class_.members * class_.blocks * lanes))
        if pieces * lanes * words <= max(held_words(class_, operation, dtype), lanes * words):
            return class_, pieces
    return None


def _spec(function, operation, dtype, class_, pieces, access, per_slice):
    group, threads, members, blocks, _, resident = class_
    if operation != "softmax" or dtype == "float64":
        resident = 1
    return Spec(
        function, operation, dtype, group, threads, members, blocks, pieces, access, resident, per_slice
    )


def elementwise(operation):
    """Whether the result of an operation has the shape of x."""
    return operation in ("softmax", "log_softmax")


@functools.lru_cache(maxsize=1024)
def plan(operation, dtype, n, is_columns, is_packed, access, per_slice, capability):
    """Return the one spec, or the two or three for a split slice, with which slices of n entries are taken.

    ``access`` is the number of entries that every row is aligned to; ``is_packed`` says that rows follow each
    other without gaps.
    """
    verb = "transform" if elementwise(operation) else "reduce"
    words = n * (2 if dtype == "float64" else 1)
    is_aligned = access * ITEMSIZE[dtype] == 16 and words >= ALIGNED_FROM
    if is_columns:
        access = 1
        found = _fit(COLUMNS, operation, dtype, n, capability)
    elif words <= SHORT and is_packed and not is_aligned:
        pieces = -(-n * ITEMSIZE[dtype] // 16)
        class_ = Class("thread", SHORT_THREADS, 1, 1, SHORT)
        return (_spec(f"{verb}_short", operation, dtype, class_, pieces, 1, per_slice),)
    else:
        found = _fit(ROWS, operation, dtype, n, capability)
    if found is not None:
        return (_spec(verb, operation, dtype, *found, access, per_slice),)
    class_ = SPLIT_COLUMNS if is_columns else SPLIT_ROWS
    pieces = class_.words * 4 // 16 if ITEMSIZE[dtype] > 2 else class_.words // 8
    first = _spec("summarise", operation, dtype, class_, pieces, access, per_slice)
    last = first._replace(function=f"{verb}_parts")
    if not elementwise(operation):
        return first, last
    merging = STRIDED_BLOCK if n >= STRIDED_LONG * first.capacity else STRIDED_WARP
    return first, _spec("merge_slices", operation, dtype, merging, 1, 1, per_slice), last


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

    longest = SHORT // 2 if spec.dtype == "float64" else SHORT
    room = {"thread": spec.threads * longest * 33 // 32, "column": spec.threads}.get(spec.group, 32)
    replaced = {
        **target.PRIMITIVES,
        **kernels.OPERATIONS[spec.operation],
        **kernels.GROUPS[spec.group],
        **kernels.LAWS[spec.per_slice],
        "PIECES": (0,) * spec.pieces,
        "LANES": spec.lanes,
        "ACCESS": spec.access,
        "THREADS": spec.threads,
        "GROUP": spec.members,
        "BLOCKS": spec.blocks,
        "SLICES": spec.slices,
        "MEMBERS": spec.members * spec.blocks,
        "CAPACITY": spec.capacity,
        "MASKED": spec.masked,
        "FIELDS": FIELDS[spec.operation],
        "ABSENT": 0.0 if spec.operation in ("softmax", "entropy") else -math.inf,
        "load": target.loader(spec.lanes, spec.access),
        "store": target.storer(spec.lanes, spec.access),
        "stage": target.stager(spec.lanes),
        "unstage": target.unstager(spec.lanes),
        "slots": target.slots_for(room),
    }
    if spec.members * spec.blocks == 1:
        replaced |= {"exchange": kernels.alone, "anyone": kernels.my_own}
    if spec.function.endswith("strided"):
        replaced["entry_of"] = kernels.strided_entry
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
    return entries, entries, *law, *(integer,) * 5
