"""A GPU in plain Python: runs the kernels of `_cuda_kernels` thread by thread, on host memory.

Numba's own simulator knows no shuffles, bfloat16 or raw pointers. Here the threads are greenlets, lanes are
NumPy arrays, and the primitives of `_cuda_target` are these functions. What a GPU would let pass is an error:
memory that was not allocated, an access that is not aligned, threads that do not meet at a barrier or
shuffle. Threads run in a random order between two meetings, so that a result that depends on the order shows.
"""

import contextlib
import ctypes
import functools
import operator
import random
import sys
from typing import Any, ClassVar

import greenlet
import ml_dtypes
import numba
import numpy as np

from fastmax import _cuda_plan, _cuda_target, _lanes
from fastmax._math import WITHOUT_TABLE

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bool": np.dtype(np.uint8),
}
GPU = _cuda_plan.Gpu((9, 0), 4, 227 * 2**10, 16)


# -- memory -----------------------------------------------------------------------------------------

_allocations: dict[int, np.ndarray] = {}


def allocate(size):
    """Return the address of so many bytes, aligned to 256, that hold no sensible numbers."""
    buffer = np.full(size + 256, 0xFF, np.uint8)
    start = -buffer.ctypes.data % 256
    memory = buffer[start : start + size]
    _allocations[memory.ctypes.data] = memory
    return memory.ctypes.data


def free(address):
    del _allocations[address]


class Pointer:
    """Address of entries of a dtype, in one allocation or in the shared memory of a block."""

    def __init__(self, address, dtype):
        self.address, self.dtype = address, dtype
        self.told = {}  # what blocks have left for each other

    def view(self, index, count):
        """Return ``count`` entries from an index on, which one access must be able to reach."""
        size = self.dtype.itemsize
        address = self.address + int(index) * size
        for start, memory in _allocations.items():
            if start <= address and address + count * size <= start + memory.size:
                break
        else:
            raise IndexError(f"{count} entries at {index} of {self.dtype} are not allocated")
        if address % (count * size):
            raise ValueError(f"{count} entries at {index} of {self.dtype} are not aligned")
        return memory[address - start :][: count * size].view(self.dtype)

    def read(self, index, count):
        """Return entries in the dtype in which they are computed."""
        return self.view(index, count).astype(np.float64 if self.dtype == np.float64 else np.float32)


class Tile(Pointer):
    """Entries of a dtype in the shared memory of a block."""

    def __init__(self, memory, dtype):
        self.memory, self.dtype = memory, dtype

    def view(self, index, count):
        """Return ``count`` entries from an index on, which one access must be able to reach."""
        size = self.dtype.itemsize
        start, stop = int(index) * size, (int(index) + count) * size
        if start < 0 or stop > self.memory.size:
            raise IndexError(f"{count} entries at {index} of {self.dtype} are not in shared memory")
        if start % (count * size):
            raise ValueError(f"{count} entries at {index} of {self.dtype} are not aligned")
        return self.memory[start:stop].view(self.dtype)


# -- threads ----------------------------------------------------------------------------------------


class Thread(greenlet.greenlet):
    """One thread, with where it is and the slots it has asked for."""

    number: int
    count: int  # threads of the block
    block: tuple[int, int]
    rank: int  # of the block in its team
    blocks: int  # of the grid
    shared: dict[Any, np.ndarray]
    team: "Team"
    arrivals: int  # of this thread, for its cluster
    tile: np.ndarray
    copies: list[tuple[np.ndarray, np.ndarray] | None]  # that have begun: to, from; None ends a group


class Team:
    """What blocks that run together know of each other."""

    def __init__(self, blocks, threads):
        self.shared = [{} for _ in range(blocks)]  # memory of each block
        self.threads = blocks * threads
        self.arrivals = 0  # of all threads together


def _current() -> Any:
    return greenlet.getcurrent()


def _meet(key, count, payload=None):
    """Wait until so many threads have come to a meeting, and return what they brought, by thread."""
    return _current().parent.switch((key, count, payload))


def _run_together(threads):
    """Run threads until all have finished; a meeting is held when all have come."""
    waiting: dict[Any, dict[Thread, Any]] = {}
    ready: list[Any] = [(thread, None) for thread in threads]
    while ready:
        random.shuffle(ready)
        requests = [(thread, thread.switch(value)) for thread, value in ready]
        ready = []
        for thread, request in requests:
            if thread.dead:
                continue
            if request is None:  # asks again
                ready.append((thread, None))
                continue
            key, count, payload = request
            came = waiting.setdefault((key, count), {})
            came[thread] = payload
            if len(came) == count:
                del waiting[key, count]
                brought = {(thread.rank, thread.number): payload for thread, payload in came.items()}
                ready += [(thread, brought) for thread in came]
    if waiting:
        raise RuntimeError(f"threads wait for others that do not come: {list(waiting)}")


def launch(spec, grid, arguments, shared=0):
    """Run a kernel on a grid (x, y) of blocks; pointers are given as addresses."""
    function, replaced = _cuda_plan.names(spec, _Target)
    kernel = _cuda_target.rebuilt(function, replaced, lambda copy: copy, lambda copy: copy)
    team = arguments[BLOCKS_OF_TEAM] if spec.team else 1
    arguments = [_argument(value, kind) for value, kind in zip(arguments, kinds(spec), strict=True)]

    def body(_):
        with np.errstate(all="ignore"):
            kernel(*arguments)

    for y in range(grid[1]):
        for first in range(0, grid[0], team):
            threads, together = [], Team(team, spec.threads)
            for rank in range(team):
                tile = np.full(shared, 0xFF, np.uint8)
                for number in range(spec.threads):
                    thread = Thread(body)
                    thread.number, thread.block, thread.rank = number, (first + rank, y), rank
                    thread.team, thread.shared, thread.arrivals = together, together.shared[rank], 0
                    thread.tile, thread.copies = tile, []
                    thread.count, thread.blocks = spec.threads, grid[0]
                    threads.append(thread)
            _run_together(threads)


BLOCKS_OF_TEAM = 8  # place among the arguments


def kinds(spec):
    """What the arguments of a kernel are: dtypes of pointers, or None for numbers and tuples."""
    work = DTYPES["float64" if spec.dtype == "float64" else "float32"]
    entries = DTYPES[spec.dtype]
    if spec.function == "laws":
        return DTYPES[spec.source], work, None, None, None
    if spec.function == "summarise":
        return None, None, entries, work, work, None, *(None,) * 4
    if spec.function == "merge_slices":
        return None, None, work, work, work, None, None
    if spec.function.endswith("parts"):
        steps = 4 if spec.function == "transform_parts" else 5
        return None, None, entries, entries, work, work, None, *(None,) * steps
    if spec.function.endswith("strided"):
        return entries, entries, DTYPES["bool"], work, None, *(None,) * 4
    if spec.function.endswith(_cuda_plan.TILED):
        return entries, entries, np.dtype(np.int64), work, None, *(None,) * 7
    return entries, entries, work, None, *(None,) * 6


def _argument(value, kind):
    if kind is not None:
        return Pointer(value, kind)
    return value


def thread():
    return _current().number


def block():
    return _current().block[0]


def block_y():
    return _current().block[1]


def blocks_of_grid():
    return _current().blocks


def barrier():
    me = _current()
    _meet(("barrier", me.rank), me.count)


def anyone_in_block(flag):
    me = _current()
    return any(_meet(("anyone", me.rank), me.count, bool(flag)).values())


def tell(board, index, number, state):
    for i, value in enumerate(state):
        board.told[index, i] = number, value


def hear(board, index, number, like):
    """Wait until all of a state is there."""
    while any(board.told.get((index, i), (0,))[0] != number for i in range(len(like))):
        _current().parent.switch(None)
    return tuple(board.told[index, i][1] for i in range(len(like)))


def _exchange(kind, state, mask, number_of):
    me = _current()
    warp, lane = divmod(me.number, 32)
    assert mask >> lane & 1, "a thread is not in its own mask"
    brought = _meet((kind, me.rank, warp, mask), mask.bit_count(), state)
    return brought[me.rank, 32 * warp + number_of(lane)]


def shuffle(state, mask, step):
    return _exchange("shuffle", state, mask, lambda lane: lane ^ step)


def shuffle_from(state, mask, number):
    return _exchange("shuffle from", state, mask, lambda lane: number)


def _slots_for(count):
    def slots(state):
        fields = state if isinstance(state, tuple) else (state,)
        name = len(fields), count, _caller()
        shared = _current().shared
        if name not in shared:  # another block may have written there
            shared[name] = np.full((count, len(fields)), np.nan, np.asarray(fields[0]).dtype)
        return name

    return slots


def _caller():
    """What asks for slots: each function of a kernel has its own for each way to combine states."""
    frame = sys._getframe(2)
    return frame.f_code, frame.f_locals.get("combine")


def put(slots, index, state):
    _current().shared[slots][index] = state


def put_in(slots, index, state, other):
    team = _current().team
    assert team.arrivals >= team.threads, "a block may not have begun yet"
    values = team.shared[other].setdefault(slots, np.full_like(_current().shared[slots], np.nan))
    values[index] = state


def arrive():
    me = _current()
    me.arrivals += 1
    me.team.arrivals += 1


def await_all():
    """Wait until all have arrived as often as this thread."""
    me = _current()
    while me.team.arrivals < me.arrivals * me.team.threads:
        me.parent.switch(None)


def get(slots, index):
    return tuple(_current().shared[slots][index])


# -- lanes: arrays, or scalars for a single one or for the same number in all ---------------------------


@numba.vectorize(["f4(f4, f4, f4)", "f8(f8, f8, f8)"])
def _fma(a, b, c):
    return _lanes.fma(a, b, c)


fma: Any = getattr(_fma, "ufunc")  # noqa: B009


def _dtype(like):
    return getattr(like, "dtype", DTYPES["float64"])


def spread(value, like):
    kind = type(like)
    if kind is not np.ndarray:
        kind = kind if issubclass(kind, np.generic) else np.float64
        return value if type(value) is kind else kind(value)
    if type(value) is np.ndarray and value.shape == like.shape:
        return np.asarray(value, like.dtype)
    result = np.empty_like(like)  # and filled, in half of the time of `np.broadcast_to`
    result.fill(value)
    return result


def constant(values, like):
    return spread(values[_dtype(like).itemsize // 4 - 1], like)


def polynomial(x, coefficients):
    own = coefficients[_dtype(x).itemsize // 4 - 1]
    result = _dtype(x).type(own[-1])
    for value in own[-2::-1]:
        result = fma(result, x, _dtype(x).type(value))
    return result


def exp2(x):
    return np.where(x < -126, np.float32(0), np.exp2(x)).astype(np.float32)


def power_of_two(exponent):
    integer, shift = {4: (np.uint32, 23), 8: (np.uint64, 52)}[_dtype(exponent).itemsize]
    return (exponent.view(integer) << integer(shift)).view(_dtype(exponent))


def select(condition, yes, no):
    return np.where(condition, yes, no) if type(condition) is np.ndarray else yes if condition else no


def _half(start):
    def half(x):
        count = len(x) // 2
        part = x[start * count : (start + 1) * count]
        return part if count > 1 else part[0]

    return half


# -- entries ----------------------------------------------------------------------------------------


def _loader(lanes, access, whole=False):
    def load(pointer, base, stride, first, step, stop):
        if whole:
            inside = 0 <= first and first + lanes <= stop
            read = pointer.read(base + first, lanes) if inside else None
            empty = np.full(lanes, -np.inf, np.float64 if pointer.dtype == np.float64 else np.float32)
            return empty if read is None else read
        values = []
        for at in range(first, first + lanes // access * step, step):
            index = base + min(at, stop - access) * stride
            entries = pointer.read(index, access)
            values += list(entries if at < stop else np.full_like(entries, -np.inf))
        return np.array(values) if lanes > 1 else values[0]

    return load


def _storer(lanes, access, whole=False):
    def store(pointer, base, stride, first, step, stop, value):
        value = np.broadcast_to(value, lanes)
        for i in range(0, lanes, access):
            at = first + i // access * step
            if (0 <= at and at + lanes <= stop) if whole else at < stop:
                pointer.view(base + at * stride, access)[...] = value[i : i + access]

    return store


def _places_of_part(first, stop, lanes):
    """Lanes between entries 0 and stop, if others are not."""
    places = [i for i in range(lanes) if 0 <= first + i < stop]
    return places if len(places) < lanes else []


def load_part(pointer, base, first, stop, value):
    result = value.copy()
    for i in _places_of_part(first, stop, len(value)):
        result[i] = pointer.read(base + first + i, 1)[0]
    return result


def store_part(pointer, base, first, stop, value):
    for i in _places_of_part(first, stop, len(value)):
        pointer.view(base + first + i, 1)[0] = value[i]


def tile_for(pointer):
    return Tile(_current().tile, pointer.dtype)


def copy_in(tile, at, pointer, index, count):
    most = 16 // pointer.dtype.itemsize
    count = min(count, most)
    assert (pointer.address + index * pointer.dtype.itemsize) % 16 == 0
    entries = np.zeros(most, pointer.dtype)
    for i in range(count):  # what lies before a row need not be there
        with contextlib.suppress(IndexError):
            entries[i] = pointer.view(index + i, 1)[0]
    if count > 0:
        _current().copies.append((tile.view(at, most), entries))


def commit():
    _current().copies.append(None)


def _copies_left(count):
    """Make the primitive that waits until so many groups are on their way."""

    def wait():
        copies = _current().copies
        while copies and copies.count(None) + (copies[-1] is not None) > count:
            copy = copies.pop(0)
            if copy is not None:
                to, entries = copy
                to[...] = entries

    return wait


copies_done = _copies_left(0)


def copy_out(tile, at, pointer, base, first, stop):
    most = 16 // pointer.dtype.itemsize
    places = [i for i in range(at, at + most) if first <= i < stop]
    if len(places) == most:
        pointer.view(base + at, most)[...] = tile.view(at, most)
    else:
        for i in places:
            pointer.view(base + i, 1)[...] = tile.view(i, 1)


def _peeker(lanes, stride):
    def peek(tile, at):
        if stride == 1:
            return tile.read(at, lanes)
        return np.array([tile.read(at + i * stride, 1)[0] for i in range(lanes)])

    return peek


def _keeper(lanes, stride):
    def keep(tile, at, value):
        value = np.broadcast_to(value, lanes)
        for i in range(lanes):
            tile.view(at + i * stride, 1)[0] = value[i]

    return keep


def load_one(pointer, index):
    return pointer.read(index, 1)[0]


def store_one(pointer, index, value):
    pointer.view(index, 1)[0] = value


def store_lanes(pointer, index, value):
    pointer.view(index, len(value))[...] = value


def byte(pointer, index):
    return int(pointer.view(index, 1)[0])


def number(pointer, index):
    return float(pointer.view(index, 1)[0])


def singles(state):
    return tuple(lane for field in state for lane in np.ravel(field))


def together(values, like):
    count = np.size(like[0])
    if np.ndim(like[0]) == 0:
        return values
    return tuple(np.array(values[i : i + count]) for i in range(0, len(values), count))


def as_lanes(values):
    return values


class _Target:
    """What `_cuda_plan.names` asks of a target."""

    PRIMITIVES: ClassVar[dict[str, Any]] = {
        **WITHOUT_TABLE,
        "LIMITS_APART": False,
        "anyone_in_block": anyone_in_block,
        "arrive": arrive,
        "as_lanes": as_lanes,
        "await_all": await_all,
        "barrier": barrier,
        "block": block,
        "byte": byte,
        "blocks_of_grid": blocks_of_grid,
        "commit": commit,
        "copies_done": copies_done,
        "one_left": _copies_left(1),
        "two_left": _copies_left(2),
        "three_left": _copies_left(3),
        "copy_in": copy_in,
        "copy_out": copy_out,
        "constant": constant,
        "exp2": exp2,
        "first_inverse": lambda x: 1 / x,
        "fma": fma,
        "get": get,
        "hear": hear,
        "load_one": load_one,
        "load_part": load_part,
        "as_float64": float,
        "lane_count": np.size,
        "log1p": np.log1p,
        "lower_half": _half(0),
        "number": number,
        "part": block,
        "polynomial": polynomial,
        "power_of_two": power_of_two,
        "put": put,
        "put_in": put_in,
        "select": select,
        "shuffle": shuffle,
        "shuffle_from": shuffle_from,
        "spread": spread,
        "store_one": store_one,
        "store_part": store_part,
        "singles": singles,
        "together": together,
        "small": int,
        "further": operator.add,
        "everywhere": np.all,
        "store_lanes": store_lanes,
        "thread": thread,
        "tell": tell,
        "tile_for": tile_for,
        "upper_half": _half(1),
    }
    loader, storer = staticmethod(_loader), staticmethod(_storer)
    peeker, keeper = staticmethod(_peeker), staticmethod(_keeper)
    slots_for = staticmethod(_slots_for)
    block_y, copy_in_with_neighbours = staticmethod(block_y), staticmethod(copy_in)


def address_of(array):
    """Copy an array into allocated memory."""
    address = allocate(max(array.nbytes, 1))
    ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return address


# -- arrays, and the functions of the package on them ---------------------------------------------------


class Array:
    """An array on the simulated GPU; it speaks as Numba's arrays do."""

    def __init__(self, memory, address=None):
        """View host memory of a known layout at its address; ``memory`` has the entries."""
        self.memory = memory
        self.dtype = memory.dtype
        self.address = memory.ctypes.data if address is None else address

    @classmethod
    def empty(cls, shape, dtype, strides=None):
        dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
        address = allocate(max(int(np.prod(shape)) * dtype.itemsize, 1))
        return cls(np.ndarray(shape, dtype, _allocations[address], 0, strides))

    @classmethod
    def like(cls, array):
        """Copy an array with its strides."""
        low = sum(min(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
        high = sum(max(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
        if array.size == 0:
            return cls.empty(array.shape, array.dtype)
        address = allocate(high - low + array.itemsize)
        memory = np.ndarray(array.shape, array.dtype, _allocations[address], -low, array.strides)
        memory[...] = array
        return cls(memory)

    @property
    def __cuda_array_interface__(self):
        kind = {"bfloat16": "<V2"}.get(self.dtype.name, self.dtype.str)
        return {
            "data": (self.address, False),
            "shape": self.memory.shape,
            "strides": self.memory.strides,
            "typestr": kind,
            "version": 3,
        }

    class device:
        id = 0

    def copy_to_device(self, array):
        self.memory[...] = array


def run(spec, device, grid, stream, arguments, shared=0, cluster=1):
    """What takes the place of `_cuda_launch.run`."""

    def again(stream, *leading):
        launch(spec, grid, (*leading, *arguments[len(leading) :]), shared)

    again(stream)
    return again


def clear(address, count, device, stream):
    Pointer(address, np.dtype(np.uint32)).view(0, 1)  # is there
    ctypes.memset(address, 0, 4 * count)


def upload(array, address, device, stream):
    ctypes.memmove(address, array.ctypes.data, array.nbytes)


def install(monkeypatch, gpu=GPU):
    """Let `fastmax.cuda` run here."""
    from fastmax import _cuda_launch, cuda

    # Blocks of one or two warps, as the other threads of larger ones would have no slices in most tests.
    small = {("warp", 128): 32, ("column", 128): 32, ("column", 256): 64}

    def narrow(tiles):
        return tuple(tile._replace(threads=64) for tile in tiles)

    def shrunk(classes):
        return tuple(c._replace(threads=small.get(c[:2], c.threads)) for c in classes)

    monkeypatch.setattr(_cuda_plan, "COLUMNS", shrunk(_cuda_plan.COLUMNS))
    rows = {size: shrunk(classes) for size, classes in _cuda_plan.ROWS.items()}
    monkeypatch.setattr(_cuda_plan, "ROWS", rows)
    for name in ("STRIDED_WARP", "STRIDED_COLUMN"):
        class_ = getattr(_cuda_plan, name)
        monkeypatch.setattr(_cuda_plan, name, class_._replace(threads=small[class_[:2]]))
    monkeypatch.setattr(_cuda_plan, "SHORT_THREADS", 32)
    for name in ("AT_ONCE_TILES", "COLUMN_TILES"):
        tiles = {size: narrow(own) for size, own in getattr(_cuda_plan, name).items()}
        monkeypatch.setattr(_cuda_plan, name, tiles)
    monkeypatch.setattr(_cuda_plan, "ROW_TILES", narrow(_cuda_plan.ROW_TILES))
    monkeypatch.setattr(_cuda_plan, "plan", functools.cache(_cuda_plan.plan.__wrapped__))
    monkeypatch.setattr(_cuda_launch, "run", run)
    monkeypatch.setattr(_cuda_launch, "upload", upload)
    monkeypatch.setattr(_cuda_launch, "clear", clear)
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: gpu)
    monkeypatch.setattr(_cuda_launch, "most_blocks", lambda spec, device, shared: gpu.multiprocessors)
    monkeypatch.setattr(_cuda_launch, "most_clusters", lambda *_: 1)
    monkeypatch.setattr(
        cuda,
        "_empty_of_numba",
        lambda shape, dtype, device, stream, strides=None: Array.empty(shape, dtype, strides),
    )


def on_gpu(function):
    """Let a function of the package take and return NumPy arrays that visit the GPU."""

    def visit(x, /, temperature: Any = 1.0, *, axis=0, where=None, out=None):
        inside = Array.like(x)
        options: dict[str, Any] = {"axis": axis}
        if where is not None:
            options["where"] = Array.like(np.asarray(where, bool))
        if out is not None:
            options["out"] = inside if out is x else Array.like(out)
        result = function(inside, temperature, **options).memory
        if out is None:
            result = result.copy()[()]
        else:
            out[...] = result
            result = out
        _allocations.clear()
        return result

    return visit
