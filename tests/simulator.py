"""A GPU in plain Python: runs the kernels of `_cuda_kernels` thread by thread, on host memory.

Numba's own simulator knows no shuffles, clusters, bfloat16 or raw pointers. Here the threads are greenlets,
lanes are NumPy arrays, and the primitives of `_cuda_target` are these functions. What a GPU would let pass is
an error: memory that was not allocated, an access that is not aligned, threads that do not meet at a barrier
or shuffle. Threads run in a random order between two meetings, so that a result that depends on the order
shows.
"""

import ctypes
import functools
import itertools
import random
import sys
from typing import Any, ClassVar

import greenlet
import ml_dtypes
import numba
import numpy as np

from fastmax import _cuda_plan, _cuda_target, _lanes
from fastmax._math import WITHOUT_TABLES

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bool": np.dtype(np.uint8),
}
CAPABILITY = (9, 0)


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
    """Address of entries of a dtype, in one allocation."""

    def __init__(self, address, dtype):
        self.address, self.dtype = address, dtype

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


# -- threads ----------------------------------------------------------------------------------------


class Thread(greenlet.greenlet):
    """One thread, with where it is and the slots it has asked for."""

    number: int
    count: int  # threads of the block
    block: tuple[int, int]
    rank: int  # of the block in its cluster
    blocks: int  # of the cluster
    shared: dict[str, np.ndarray]
    peers: list[dict[str, np.ndarray]]  # shared memory of all blocks of the cluster
    remote: bool  # whether those blocks are known to have begun


def _current() -> Any:
    return greenlet.getcurrent()


def _meet(key, count, payload=None):
    """Wait until so many threads have come to a meeting, and return what they brought, by thread."""
    return _current().parent.switch((key, count, payload))


def _run_cluster(threads):
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
            key, count, payload = request
            came = waiting.setdefault((key, count), {})
            came[thread] = payload
            if len(came) == count:
                del waiting[key, count]
                brought = {(thread.rank, thread.number): payload for thread, payload in came.items()}
                ready += [(thread, brought) for thread in came]
    if waiting:
        raise RuntimeError(f"threads wait for others that do not come: {list(waiting)}")


def launch(spec, grid, arguments):
    """Run a kernel on a grid (x, y) of blocks; pointers are given as addresses."""
    function, replaced = _cuda_plan.names(spec, _Target)
    kernel = _cuda_target.rebuilt(function, replaced, lambda copy: copy)
    arguments = [_argument(value, kind) for value, kind in zip(arguments, kinds(spec), strict=True)]

    def body(_):
        with np.errstate(all="ignore"):
            kernel(*arguments)

    for y in range(grid[1]):
        for first in range(0, grid[0], spec.blocks):
            threads = []
            peers = [{} for _ in range(spec.blocks)]
            for rank, number in itertools.product(range(spec.blocks), range(spec.threads)):
                thread = Thread(body)
                thread.number, thread.block, thread.rank = number, (first + rank, y), rank
                thread.shared, thread.peers, thread.remote = peers[rank], peers, False
                thread.count, thread.blocks = spec.threads, spec.blocks
                threads.append(thread)
            _run_cluster(threads)


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
    return entries, entries, work, None, *(None,) * 5


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


def cluster_rank():
    return _current().rank


def barrier():
    me = _current()
    _meet(("barrier", me.rank), me.count)


def anyone_in_block(flag):
    me = _current()
    return any(_meet(("anyone", me.rank), me.count, bool(flag)).values())


def cluster_arrive():
    """Arrive; the waiting does both."""


def cluster_wait():
    me = _current()
    _meet("cluster", me.blocks * me.count)
    me.remote = True


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
        name = f"{len(fields)} of {count} {id(_caller())}"
        shared = _current().shared
        if name not in shared:
            shared[name] = np.full((count, len(fields)), np.nan, np.asarray(fields[0]).dtype)
        return name

    return slots


def _caller():
    """Code of the kernel's function that asks for slots: each has its own."""
    return sys._getframe(2).f_code


def put(slots, index, state):
    _current().shared[slots][index] = state


def get(slots, index):
    return tuple(_current().shared[slots][index])


def put_remote(slots, rank, index, state):
    me = _current()
    assert me.remote, "the other blocks of the cluster may not have begun"
    mine = me.shared[slots]
    me.peers[rank].setdefault(slots, np.full_like(mine, np.nan))[index] = state


# -- lanes: arrays, or scalars for a single one or for the same number in all ---------------------------


@numba.vectorize(["f4(f4, f4, f4)", "f8(f8, f8, f8)"])
def fma(a, b, c):
    return _lanes.fma(a, b, c)


def _dtype(like):
    return np.asarray(like).dtype


def spread(value, like):
    return value if np.ndim(value) else _dtype(like).type(value)


def constant(values, like):
    return _dtype(like).type(values[_dtype(like).itemsize // 4 - 1])


def polynomial(x, coefficients):
    own = coefficients[_dtype(x).itemsize // 4 - 1]
    result = _dtype(x).type(own[-1])
    for value in own[-2::-1]:
        result = fma(result, x, _dtype(x).type(value))
    return result


def power_of_two(exponent):
    integer, shift = {4: (np.uint32, 23), 8: (np.uint64, 52)}[_dtype(exponent).itemsize]
    return (exponent.view(integer) << integer(shift)).view(_dtype(exponent))


def select(condition, yes, no):
    return np.where(condition, yes, no) if np.ndim(condition) else yes if condition else no


def _half(start):
    def half(x):
        count = len(x) // 2
        part = x[start * count : (start + 1) * count]
        return part if count > 1 else part[0]

    return half


def scanned(step, state, pieces):
    results = []
    for piece in pieces:
        state, result = step(state, piece)
        results.append(result)
    return state, tuple(results)


def across(combine, state):
    lower, upper = _half(0), _half(1)
    while np.ndim(state[0]):
        state = combine(tuple(lower(x) for x in state), tuple(upper(x) for x in state))
    return state


def offset(index, sizes, strides):
    result = 0
    for size, stride in zip(sizes[:0:-1], strides[:0:-1], strict=True):
        result += index % size * stride
        index //= size
    return result + index * strides[0]


# -- entries ----------------------------------------------------------------------------------------


def _loader(lanes, access):
    def load(pointer, base, stride, first, step, stop):
        values = []
        for at in range(first, first + lanes // access * step, step):
            index = base + min(at, stop - access) * stride
            entries = pointer.read(index, access)
            values += list(entries if at < stop else np.full_like(entries, -np.inf))
        return np.array(values) if lanes > 1 else values[0]

    return load


def _storer(lanes, access):
    def store(pointer, base, stride, first, step, stop, value):
        value = np.broadcast_to(value, lanes)
        for i in range(0, lanes, access):
            at = first + i // access * step
            if at < stop:
                pointer.view(base + at * stride, access)[...] = value[i : i + access]

    return store


def load_one(pointer, index):
    return pointer.read(index, 1)[0]


def store_one(pointer, index, value):
    pointer.view(index, 1)[0] = value


def byte(pointer, index):
    return int(pointer.view(index, 1)[0])


def number(pointer, index):
    return float(pointer.view(index, 1)[0])


def _stager(lanes):
    def stage(slots, first, step, stop, shift, value):
        room = _current().shared[slots]
        for i in range(lanes):
            at = first + i * step
            if at < stop:
                room[at + (at >> shift), 0] = np.broadcast_to(value, lanes)[i]

    return stage


def _unstager(lanes):
    def unstage(slots, first, step, stop, shift):
        room = _current().shared[slots]
        indices = first + step * np.arange(lanes)
        inside = np.minimum(indices, stop - 1)
        return np.where(indices < stop, room[inside + (inside >> shift), 0], room.dtype.type(-np.inf))

    return unstage


def as_lanes(values):
    return values


class _Target:
    """What `_cuda_plan.names` asks of a target."""

    PRIMITIVES: ClassVar[dict[str, Any]] = {
        **WITHOUT_TABLES,
        "LIMITS_APART": False,
        "across": across,
        "anyone_in_block": anyone_in_block,
        "as_lanes": as_lanes,
        "barrier": barrier,
        "block": block,
        "byte": byte,
        "cluster_arrive": cluster_arrive,
        "cluster_rank": cluster_rank,
        "cluster_wait": cluster_wait,
        "constant": constant,
        "fma": fma,
        "get": get,
        "load_one": load_one,
        "as_float64": float,
        "log1p": np.log1p,
        "lower_half": _half(0),
        "number": number,
        "offset": offset,
        "part": block,
        "polynomial": polynomial,
        "power_of_two": power_of_two,
        "put": put,
        "put_remote": put_remote,
        "scanned": scanned,
        "select": select,
        "shuffle": shuffle,
        "shuffle_from": shuffle_from,
        "spread": spread,
        "store_one": store_one,
        "table_of": lambda x: None,
        "thread": thread,
        "upper_half": _half(1),
    }
    loader, storer = staticmethod(_loader), staticmethod(_storer)
    stager, unstager = staticmethod(_stager), staticmethod(_unstager)
    slots_for = staticmethod(_slots_for)
    block_y = staticmethod(block_y)


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
    def empty(cls, shape, dtype):
        dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
        address = allocate(max(int(np.prod(shape)) * dtype.itemsize, 1))
        return cls(_allocations[address][: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape))

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

    def transpose(self, order):
        return Array(self.memory.transpose(order))

    def copy_to_device(self, array):
        self.memory[...] = array


def run(spec, device, grid, stream, arguments):
    """What takes the place of `_cuda_launch.run`."""

    def again(stream, *leading):
        launch(spec, grid, (*leading, *arguments[len(leading) :]))

    again(stream)
    return again


def upload(array, address, device, stream):
    ctypes.memmove(address, array.ctypes.data, array.nbytes)


def install(monkeypatch, capability=CAPABILITY):
    """Let `fastmax.cuda` run here."""
    from fastmax import _cuda_launch, cuda

    # Blocks of one or two warps, as the other threads of larger ones would have no slices in most tests.
    small = {("warp", 128): 32, ("column", 128): 32, ("column", 256): 64}
    shrunk = {
        name: tuple(c._replace(threads=small.get(c[:2], c.threads)) for c in getattr(_cuda_plan, name))
        for name in ("ROWS", "COLUMNS")
    }
    for name, classes in shrunk.items():
        monkeypatch.setattr(_cuda_plan, name, classes)
    for name in ("STRIDED_WARP", "STRIDED_COLUMN"):
        class_ = getattr(_cuda_plan, name)
        monkeypatch.setattr(_cuda_plan, name, class_._replace(threads=small[class_[:2]]))
    monkeypatch.setattr(_cuda_plan, "SHORT_THREADS", 32)
    monkeypatch.setattr(_cuda_plan, "plan", functools.cache(_cuda_plan.plan.__wrapped__))
    monkeypatch.setattr(_cuda_launch, "run", run)
    monkeypatch.setattr(_cuda_launch, "upload", upload)
    monkeypatch.setattr(_cuda_launch, "capability", lambda device: capability)
    monkeypatch.setattr(
        cuda, "_empty_of_numba", lambda shape, dtype, device, stream: Array.empty(shape, dtype)
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
