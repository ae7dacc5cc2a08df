"""The same four functions for arrays on an NVIDIA GPU: CuPy, PyTorch and Numba arrays.

``fastmax.softmax`` and the others come here when they are given such an array. The result is an array of the
caller's kind on the same device, computed on its current stream. Nothing is copied to the host, and for
arrays of CuPy and PyTorch nothing waits; for those of Numba the driver allocates memory, which may, and
results of slices without entries are written on the default stream.
"""

import functools
import math
import sys
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastmax import _api, _cuda_plan
from fastmax import _cuda_launch as driver
from fastmax._jit import kernel
from fastmax._math import LAW_WORDS, law_of

ABSENT = {"softmax": 0.0, "log_softmax": -math.inf, "logsumexp": -math.inf, "entropy": 0.0}


def is_available() -> bool:
    """Return whether there are a CUDA driver and a GPU.

    Returns
    -------
    bool
        Whether the driver was found, is that of CUDA 12.0 or above, and counts at least one device.

    Examples
    --------
    >>> from fastmax import cuda
    >>> isinstance(cuda.is_available(), bool)
    True
    """
    return driver.is_available()


def softmax(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, out=None):
    r"""Softmax with temperature of an array on a GPU.

    .. math:: \sigma_T(x)_i = \frac{\exp(x_i / T)}{\sum_j \exp(x_j / T)}

    Parameters
    ----------
    x : array on a GPU
        CuPy or Numba array or PyTorch tensor of float16, bfloat16, float32 or float64, of any shape and
        strides.
    temperature : array_like or array on a GPU, optional
        Real values in [0, inf]: one for all slices, or an array that broadcasts against the shape of `x` with
        `axis` removed. One on the GPU is not read back: where it is negative or NaN, the slice becomes NaN.
    axis : int, tuple of int, or None, optional
        Axis or axes whose entries form a slice; None stands for all of them.
    where : array of bool on a GPU, optional
        Entries to take into account, broadcast to the shape of `x`; the others count as absent.
    out : array on a GPU, optional
        Array for the result, of its shape and dtype, each of whose entries has a place of its own. It may be
        `x` itself. PyTorch's autograd is told that it has changed.

    Returns
    -------
    array on a GPU
        Probabilities, as an array of the kind of `x` and in its dtype.

    Raises
    ------
    TypeError
        If a dtype is not supported, `where` or `out` is not on a GPU, or a tensor has no memory of its own.
    ValueError
        If a temperature on the host is negative or NaN, a shape does not fit, or `out` is read-only, overlaps
        itself, or overlaps `x` in part.
    RuntimeError
        If the GPU is too old for 16-bit types (compute capability below 8.0), the driver is too old or
        reports an error, or temperatures on the host would be copied while a CUDA graph is captured.
    numpy.exceptions.AxisError
        If `axis` is out of bounds.

    Notes
    -----
    The limits and special values are those of `fastmax.softmax`, and so is the accuracy of float64. Results
    of float32 are within 3 ulp, those of 16 bits are the exact ones rounded, but for 0.01 ulp. A tensor that
    requires gradients is taken as it is; the result knows nothing of them.

    Work is queued on the stream of `x`; whoever writes `where`, `out` or temperatures on another stream must
    let that of `x` wait for it. In a CUDA graph, temperatures that differ between slices must be on the GPU.

    The bits of a slice depend on its values, temperature, length, dtype and strides, and on how far from a
    multiple of 16 bytes it and its result begin, as this decides which entries a thread reads. They do not
    depend on what other slices hold. A slice that has no others beside it, so that there is no stride to
    them, may be taken by another kernel, and so may a temperature that comes alone instead of in an array
    with one for each slice; the last bit may differ then.

    Examples
    --------
    >>> from fastmax import cuda
    >>> if cuda.is_available():
    ...     import cupy
    ...     p = cuda.softmax(cupy.array([1.0, 3.0, 3.0]), temperature=0)
    """
    return evaluate("softmax", x, temperature, axis, where, out)


def log_softmax(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, out=None):
    r"""Logarithm of the softmax with temperature of an array on a GPU.

    .. math:: \log \sigma_T(x)_i = \frac{x_i - \max x}{T} - \log \sum_j \exp \frac{x_j - \max x}{T}

    Parameters
    ----------
    x, temperature, axis, where, out
        As `softmax` takes them.

    Returns
    -------
    array on a GPU
        Natural logarithms of the probabilities, as an array of the kind of `x` and in its dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError, numpy.exceptions.AxisError
        As `softmax` does.

    Notes
    -----
    The limits and special values are those of `fastmax.log_softmax`.

    Examples
    --------
    >>> from fastmax import cuda
    >>> if cuda.is_available():
    ...     import cupy
    ...     q = cuda.log_softmax(cupy.zeros((2, 3)), axis=1)
    """
    return evaluate("log_softmax", x, temperature, axis, where, out)


def logsumexp(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, keepdims=False, out=None):
    r"""Logarithm of a sum of exponentials with temperature, of an array on a GPU.

    .. math:: T \log \sum_j \exp(x_j / T)

    Parameters
    ----------
    x, temperature, axis, where, out
        As `softmax` takes them.
    keepdims : bool, optional
        Whether the reduced axes stay, with size 1.

    Returns
    -------
    array on a GPU
        One value per slice, as an array of the kind of `x` and in its dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError, numpy.exceptions.AxisError
        As `softmax` does.

    Notes
    -----
    The limits and special values are those of `fastmax.logsumexp`.

    Examples
    --------
    >>> from fastmax import cuda
    >>> if cuda.is_available():
    ...     import cupy
    ...     value = cuda.logsumexp(cupy.array([1000.0, 1000.0]))
    """
    return evaluate("logsumexp", x, temperature, axis, where, out, keepdims)


def entropy(x, /, temperature: ArrayLike = 1.0, *, axis=0, where=None, keepdims=False, out=None):
    r"""Entropy of the softmax with temperature of an array on a GPU, in nats.

    .. math:: H = -\sum_i \sigma_T(x)_i \log \sigma_T(x)_i

    Parameters
    ----------
    x, temperature, axis, where, out
        As `softmax` takes them.
    keepdims : bool, optional
        Whether the reduced axes stay, with size 1.

    Returns
    -------
    array on a GPU
        One value per slice, as an array of the kind of `x` and in its dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError, numpy.exceptions.AxisError
        As `softmax` does.

    Notes
    -----
    The limits and special values are those of `fastmax.entropy`.

    Examples
    --------
    >>> from fastmax import cuda
    >>> if cuda.is_available():
    ...     import cupy
    ...     h = cuda.entropy(cupy.array([1.0, 3.0, 3.0]), [0.0, 1.0, float("inf")])
    """
    return evaluate("entropy", x, temperature, axis, where, out, keepdims)


# -- arrays of the three kinds ------------------------------------------------------------------------


def _library_of(x):
    """Name of the package that an array comes from."""
    return _package_of(type(x))


@functools.cache
def _package_of(kind):
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]  # a user's own kind comes first
    return next((package for package in packages if package in ("torch", "cupy")), packages[0])


class _Place(NamedTuple):
    """Where the entries of an array are: strides are in bytes, dtype is a name."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    writeable: bool = True

    def as_numpy(self):
        """An ndarray of the same shape, strides and address, whose entries must not be touched."""
        size = {"bool": 1, **_cuda_plan.ITEMSIZE}[self.dtype]
        stand_in = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8"}[size]
        return np.asarray(_Interface(self.address or 256, self.shape, self.strides, stand_in))


class _Interface:
    """What NumPy asks of an array."""

    def __init__(self, address, shape, strides, typestr):
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }


_TYPESTR = {"<f2": "float16", "<f4": "float32", "<f8": "float64", "|b1": "bool"}


def _place(x, name):
    """Where the entries of an array on a GPU are; ``name`` is that of the argument."""
    if not _api._is_on_gpu(x):
        raise TypeError(f"{name} must be an array on the GPU, got {type(x).__name__}")
    if _library_of(x) == "torch":
        dtype = str(x.dtype).rpartition(".")[2]
        strides = tuple(stride * x.element_size() for stride in x.stride())
        place = _Place(x.data_ptr(), tuple(x.shape), strides, dtype, x.device.index)
    else:
        interface = x.__cuda_array_interface__
        typestr, shape = interface["typestr"], tuple(interface["shape"])
        dtype = _TYPESTR.get(typestr) or getattr(getattr(x, "dtype", None), "name", typestr)
        if typestr.startswith(">"):
            dtype = typestr
        if interface.get("mask") is not None:
            raise TypeError(f"{name} must not be masked")
        strides = interface.get("strides")
        if strides is None:
            size = int(typestr[2:])
            strides = tuple(size * math.prod(shape[i + 1 :]) for i in range(len(shape)))
        address = interface["data"][0]
        device = getattr(getattr(x, "device", None), "id", None)
        if device is None:
            device = driver.device_of(address) if address else 0
        place = _Place(address, shape, tuple(strides), dtype, device, not interface["data"][1])
    if not place.address and 0 not in place.shape:  # as of PyTorch's tensors that stand for others
        raise TypeError(f"{name} must have memory of its own, got {type(x).__name__} without any")
    if place.address % _cuda_plan.ITEMSIZE.get(place.dtype, 1):
        raise ValueError(f"{name} must begin at a multiple of its itemsize, got address {place.address:#x}")
    return place


def _stream(x, device):
    """Stream on which the owner of an array works."""
    library = _library_of(x)
    if library == "torch":
        torch = sys.modules[library]
        # What PyTorch's own compiler calls: 0.3 us, where an object for the stream takes 3.6.
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        return torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device)
    if library == "cupy":
        cupy = sys.modules[library]
        if cupy.cuda.runtime.getDevice() == device:
            return cupy.cuda.get_current_stream().ptr
        with cupy.cuda.Device(device):
            return cupy.cuda.get_current_stream().ptr
    return x.__cuda_array_interface__.get("stream") or 0


def _resolved(x):
    """Return x, or a copy in which what a PyTorch view only marks as negated is negated."""
    return x.resolve_neg() if _library_of(x) == "torch" and x.is_neg() else x


def _empty(x, shape, dtype, device):
    """New array of the kind of x, C-contiguous, on its device and stream; of PyTorch, of x's very class."""
    library = _library_of(x)
    if library == "torch":
        return x.new_empty(shape, dtype=getattr(sys.modules[library], dtype))
    if library == "cupy":
        cupy = sys.modules[library]
        with cupy.cuda.Device(device):
            return cupy.empty(shape, x.dtype if dtype == _place(x, "x").dtype else dtype)
    return _empty_of_numba(shape, dtype, device, _stream(x, device))


def _empty_of_numba(shape, dtype, device, stream, strides=None):
    from numba import cuda

    kind: Any = np.dtype(dtype)
    gpus: Any = cuda.gpus
    with gpus[device]:
        return cuda.device_array(shape, kind, strides, stream=_stream_of_numba(cuda, stream))


def _stream_of_numba(cuda, stream):
    """Numba's object for a stream, of which 0, 1 and 2 are CUDA's names for default streams."""
    if stream == 2:
        return cuda.per_thread_default_stream()
    return cuda.external_stream(stream) if stream > 2 else 0


# -- temperatures -------------------------------------------------------------------------------------


@kernel
def _law(temperature, like):
    return law_of(temperature, like)


@functools.lru_cache(maxsize=256)
def _law_of(temperature, dtype):
    """Law of one temperature on the host, in the dtype in which entries are computed."""
    work = np.float64 if dtype == "float64" else np.float32
    with np.errstate(all="ignore"):
        return tuple(work(value) for value in _law(temperature, work(0.0)))


def _no_law(dtype, step):
    """What stands for the law in a launch where laws are in memory: how far apart those of two slices are."""
    work = np.float64 if dtype == "float64" else np.float32
    return work(step), *(work(0),) * (LAW_WORDS - 1)


# -- the short way: packed arrays of PyTorch or CuPy, one temperature on the host ---------------------------


class _Ready(threading.local):
    """Launches of this thread and the shapes of their results, by what they depend on."""

    def __init__(self):
        self.launches = {}


_ready = _Ready()
_MOST_READY = 256
_NUMBERS = (float, int, np.float64, np.float32, np.float16)  # equal ones have the same hash


def _packed(x):
    """Device and address of a C-contiguous array of PyTorch, or of CuPy on its current device; else None.

    None, too, if it has no memory.
    """
    library = _library_of(x)
    if library == "torch" and x.is_contiguous() and not x.is_neg():
        address = x.data_ptr()
        return (x.get_device(), address) if address else None
    if library == "cupy" and x.flags.c_contiguous:
        device = x.device.id
        if sys.modules[library].cuda.runtime.getDevice() == device:
            return device, x.data.ptr
    return None


def _evaluate_ready(operation, x, temperature, axis, keepdims, out):
    """Result by a launch that an earlier call has prepared; None if there is none."""
    own = _packed(x)
    target = own if out is None or out is x else _packed(out)
    if own is None or target is None:
        return None
    device, address = own
    to = 0 if out is None else target[1]  # new arrays begin at multiples of 256 bytes
    key = (operation, x.shape, x.dtype, device, temperature, axis, keepdims, address % 16, to % 16)
    launch, shape, words = _ready.launches.get(key, (None, None, 0))
    if launch is None:
        return None
    result = out
    if out is None:
        if _library_of(x) == "torch":
            # The former takes 3.7 us, the latter 5.1.
            result = sys.modules["torch"].empty_like(x) if shape == x.shape else x.new_empty(shape)
            to = result.data_ptr()
        else:
            result = sys.modules["cupy"].empty(shape, x.dtype)
            to = result.data.ptr
    else:
        apart = out is x or to + out.nbytes <= address or address + x.nbytes <= to
        if not apart or target[0] != device or tuple(out.shape) != shape or out.dtype != x.dtype:
            return None
    stream = _stream(x, device)
    if words:
        memory, told = _board(x, words, device, stream)
        launch(stream, address, to, told)
        del memory
    else:
        launch(stream, address, to)
    if out is not None:
        _mark_as_changed(out)
    return result


def _mark_as_changed(out):
    """Let PyTorch's autograd know, which then refuses to use what it has kept of a tensor."""
    if _library_of(out) == "torch":
        mark = getattr(sys.modules["torch"].autograd.graph, "increment_version", None)  # since PyTorch 2.1
        if mark is not None:
            mark(out)


def _board(like, words, device, stream):
    """Memory for what blocks of a team tell each other, with nothing in it, and its address."""
    memory = _empty(like, (words,), "float64", device)
    told = _place(memory, "memory").address
    driver.clear(told, 2 * words, device, stream)
    return memory, told


def _keep_ready(operation, x, place, temperature, axis, keepdims, address, shape, launch, words):
    """Keep a launch on packed arrays for calls with the same shape, dtype, temperature and alignment."""
    if _library_of(x) in ("torch", "cupy"):
        if len(_ready.launches) >= _MOST_READY:
            _ready.launches.clear()
        key = (operation, x.shape, x.dtype, place.device, temperature, axis, keepdims)
        _ready.launches[*key, place.address % 16, address % 16] = launch, shape, words


# -- the long way: every argument -----------------------------------------------------------------------


class _Task(NamedTuple):
    """What all launches of a call share."""

    operation: str
    dtype: str
    device: int
    stream: int
    like: Any  # the array of the caller, of whose kind working memory shall be

    @property
    def itemsize(self):
        return _cuda_plan.ITEMSIZE[self.dtype]

    @property
    def work(self):
        """Dtype in which entries are computed."""
        return "float64" if self.dtype == "float64" else "float32"

    def memory(self, size, dtype):
        """Working memory, and its address."""
        array = _empty(self.like, (size,), dtype, self.device)
        return array, _place(array, "memory").address

    def launch(self, spec, grid, *arguments, shared=0, cluster=1):
        return driver.run(spec, self.device, grid, self.stream, arguments, shared, cluster)


class _Laws(NamedTuple):
    """Laws of a call: one that comes with the launch, or those in an array, one or one per slice."""

    per_slice: bool
    address: int
    law: tuple
    memory: Any = None


def evaluate(operation, x, temperature, axis, where, out, keepdims=False):
    """Check the arguments, run the operation, and return the result."""
    keepdims = _api._as_flag(keepdims)
    simple = where is None and type(axis) is int and type(temperature) in _NUMBERS
    if simple:
        result = _evaluate_ready(operation, x, temperature, axis, keepdims, out)
        if result is not None:
            return result
    elementwise = _cuda_plan.elementwise(operation)
    if out is not None and _resolved(out) is not out:
        raise ValueError("out must not be a view with the negative bit set, got one")
    x, temperature = _resolved(x), _resolved(temperature)
    place = _place(x, "x")
    if place.dtype not in _cuda_plan.ITEMSIZE:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got dtype {place.dtype}")
    _check_capability(place)
    ghost = place.as_numpy()
    degrees, on_device = _degrees_of(temperature, place)
    given, axes = _api._as_axes(axis, ghost.ndim)
    batch = _api._batch_shape(ghost, degrees, axes)
    places = _api._places(given, axes, len(batch) + len(axes))
    if elementwise:
        shape = _api._with_axes(batch, places, [ghost.shape[i] for i in axes])
    else:
        shape = _api._with_axes(batch, places, [1] * len(axes)) if keepdims else batch
    mask = None if where is None else _mask_of(where, ghost.shape, place)
    if out is not None:
        target = _place(out, "out")
        _check_out(target, shape, place)
        if mask is not None and np.may_share_memory(target.as_numpy(), mask):
            raise ValueError("where must not share memory with out, got a mask that does")
    if ghost.size == 0 or 0 in shape:
        return _filled(x, shape, place, ABSENT[operation], out)
    kept = _api._kept(axes, range(ghost.ndim))
    order = None
    if mask is None and batch == tuple(ghost.shape[i] for i in kept):
        order = _api._memory_order(ghost, axes)
    if order is not None and not elementwise and _api._kept(axes, order) != kept:
        order = None
    result = _empty_in(x, shape, place, order if elementwise else None) if out is None else out
    written = _place(result, "out").as_numpy()
    if keepdims and not elementwise:
        written = written[(*(0 if i in places else slice(None) for i in range(written.ndim)), ...)]
    if order is not None:
        packed = _api._is_packed(written, order) if elementwise else written.flags.c_contiguous
        order = order if packed else None
    task = _Task(operation, place.dtype, place.device, _stream(x, place.device), x)
    slices = kept if order is None else _api._kept(axes, order)
    laws = _laws_of(task, degrees, on_device, batch, [kept.index(i) for i in slices] if order else None)
    if order is None:
        _run_strided(task, ghost, written, mask, batch, axes, places, laws)
    else:
        count, n, *rest = _api._blocks(ghost.shape, axes, order)
        inner = rest[0] if rest else 1
        pitch = n * inner
        again = _run_packed(
            task, place.address, _address(written), count * inner, n, inner, pitch, pitch, laws
        )
        if simple and again is not None and ghost.flags.c_contiguous and written.flags.c_contiguous:
            _keep_ready(operation, x, place, temperature, axis, keepdims, _address(written), shape, *again)
    if out is not None:
        _mark_as_changed(out)
    return result


def _check_capability(place):
    least = _cuda_plan.SMALL_TYPES_FROM
    if _cuda_plan.ITEMSIZE[place.dtype] == 2 and (found := driver.gpu(place.device).capability) < least:
        raise RuntimeError(
            f"{place.dtype} needs a GPU of compute capability {least[0]}.{least[1]} or above, "
            f"got one of {found[0]}.{found[1]}"
        )


def _address(ghost):
    return ghost.__array_interface__["data"][0]


def _degrees_of(temperature, place):
    """Temperatures as float64 on the host, or a stand-in for those on the GPU, and what dtype these have."""
    if not _api._is_on_gpu(temperature):
        return _api._as_temperature(temperature), None
    warm = _place(temperature, "temperature")
    if warm.dtype not in _cuda_plan.ITEMSIZE:
        raise TypeError(f"temperature must be of floats, got dtype {warm.dtype}")
    _check_device("temperature", warm, place)
    return warm.as_numpy(), warm.dtype


def _check_device(name, other, place):
    if other.device != place.device:
        raise ValueError(f"{name} must be on the device of x, {place.device}, got device {other.device}")


def _check_out(target, shape, place):
    if target.shape != shape or target.dtype != place.dtype:
        raise ValueError(
            f"out must have the shape {shape} and dtype {place.dtype} of the result, "
            f"got shape {target.shape} and dtype {target.dtype}"
        )
    _check_device("out", target, place)
    if not target.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if _overlaps_itself(target):
        raise ValueError(f"out must have each entry in a place of its own, got strides {target.strides}")
    same = target[:3] == place[:3]
    a, b = target.as_numpy(), place.as_numpy()
    if not same and np.may_share_memory(a, b) and np.shares_memory(a, b):
        raise ValueError("out must be x itself or not overlap it, got an array that overlaps x in part")


def _overlaps_itself(place):
    """Whether entries may share memory: an axis has a step within what the axes of smaller steps reach."""
    if 0 in place.shape:
        return False
    reach = _cuda_plan.ITEMSIZE[place.dtype]
    for step, size in sorted(
        (abs(step), size) for step, size in zip(place.strides, place.shape, strict=True)
    ):
        if size > 1:
            if step < reach:
                return True
            reach += (size - 1) * step
    return False


def _mask_of(where, shape, place):
    """Stand-in for the mask, broadcast to the shape of x."""
    mask = _place(where, "where")
    if mask.dtype != "bool":
        raise TypeError(f"where must be boolean, got dtype {mask.dtype}")
    _check_device("where", mask, place)
    try:
        return np.broadcast_to(mask.as_numpy(), shape)
    except ValueError:
        raise ValueError(
            f"where of shape {mask.shape} does not broadcast to the shape {shape} of x"
        ) from None


def _empty_in(x, shape, place, order):
    """New array whose axes lie in memory in the given order, or in C order."""
    if order is None or order == sorted(order):
        return _empty(x, shape, place.dtype, place.device)
    if (library := _library_of(x)) not in ("torch", "cupy"):  # arrays of Numba's own have no view like that
        strides, step = {}, _cuda_plan.ITEMSIZE[place.dtype]
        for i in reversed(order):
            strides[i] = step
            step *= shape[i]
        strides = tuple(strides[i] for i in range(len(shape)))
        return _empty_of_numba(shape, place.dtype, place.device, _stream(x, place.device), strides)
    array = _empty(x, tuple(shape[i] for i in order), place.dtype, place.device)
    back = np.argsort(order).tolist()
    return array.permute(back) if library == "torch" else array.transpose(back)


def _filled(x, shape, place, value, out):
    """``out``, or a new array, full of a value: slices without entries."""
    result = _empty(x, shape, place.dtype, place.device) if out is None else out
    if math.prod(shape) == 0:
        return result
    if _library_of(x) == "torch":
        return result.fill_(value)
    if _library_of(x) == "cupy":
        result.fill(value)
        return result
    result.copy_to_device(np.full(shape, value, place.dtype))
    return result


# -- laws -----------------------------------------------------------------------------------------------


def _laws_of(task, degrees, dtype, batch, order):
    """Laws for the slices of a batch with its axes in an order; ``dtype`` is that of degrees on the GPU."""
    if dtype is None and degrees.size == 1:
        return _Laws(False, 0, _law_of(float(degrees.reshape(())), task.dtype))
    source = None
    if dtype is None:
        degrees = np.array(degrees, order="C")  # a copy, as pinned memory would be read after the call
        source, address = task.memory(degrees.size, "float64")
        driver.upload(degrees, address, task.device, task.stream)
        dtype = "float64"
    else:
        address = _address(degrees)
    if degrees.size == 1:
        full, step = degrees.reshape(()), 0
    else:
        full, step = np.broadcast_to(degrees, batch), LAW_WORDS
        full = full if order is None else full.transpose(order)
    count = full.size
    memory, laws = task.memory(count * LAW_WORDS, task.work)
    sizes, (strides,) = _collapsed(full.shape, [_in_entries(full)])
    spec = _cuda_plan.laws_plan(task.work, dtype, len(sizes))
    task.launch(spec, (-(-count // spec.threads), 1), address, laws, count, sizes, strides)
    return _Laws(True, laws, _no_law(task.dtype, step), (memory, source))


def _in_entries(ghost):
    """Strides in entries."""
    if any(stride % ghost.itemsize for stride in ghost.strides):
        raise ValueError(f"strides must be multiples of the itemsize {ghost.itemsize}, got {ghost.strides}")
    return [stride // ghost.itemsize for stride in ghost.strides]


def _collapsed(shape, strides):
    """Sizes and strides of an array, of which axes that one stride can walk have become one."""
    sizes: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(shape):
        if size == 1:
            continue
        own = [walk[i] for walk in strides]
        if sizes and all(walk[-1] == size * step for walk, step in zip(walks, own, strict=True)):
            sizes[-1] *= size
            for walk, step in zip(walks, own, strict=True):
                walk[-1] = step
        else:
            sizes.append(size)
            for walk, step in zip(walks, own, strict=True):
                walk.append(step)
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return tuple(sizes), [tuple(walk) for walk in walks]


# -- launches -------------------------------------------------------------------------------------------


def _run_packed(task, x, out, count, n, inner, x_pitch, out_pitch, laws):
    """Run slices of n entries that are ``inner`` apart.

    Return the launch, if it is a single one, and the words of the board that it needs.
    """
    elementwise = _cuda_plan.elementwise(task.operation)
    lanes = 16 // task.itemsize
    skew = x // task.itemsize % lanes
    place = x, out if elementwise else None, n, inner, x_pitch, out_pitch
    how = (
        *(task.operation, task.dtype, n, _cuda_plan.line_of(task.dtype, inner)),
        x_pitch == n and (out_pitch == n or not elementwise),
        *(_cuda_plan.alignment_of(task.dtype, *place), laws.per_slice),
    )
    gpu = driver.gpu(task.device)
    specs = _cuda_plan.plan(*how, gpu)
    for cluster, multiprocessors in (
        (min(gpu.cluster, _cuda_plan.CLUSTER_AT_ANY_RATE), gpu.multiprocessors),
        (1, gpu.multiprocessors),
        (1, 0),
    ):
        if _fits(task, specs[0], n):
            break
        specs = _cuda_plan.plan(*how, gpu._replace(cluster=cluster, multiprocessors=multiprocessors))
    spec, *others = specs
    if others:
        _run_split(task, specs, x, out, count, n, inner, x_pitch, out_pitch, laws)
        return None
    if spec.function.endswith(_cuda_plan.TILED):
        return _run_tiles(task, spec, x, out, count, n, inner, skew, x_pitch, out_pitch, laws)
    shared, at_a_time = 0, spec.slices * spec.each
    if spec.group == "thread":
        shared = (at_a_time * n + lanes) * task.itemsize
    arguments = (x, out, laws.address, laws.law, count, n, inner, skew, x_pitch, out_pitch)
    return task.launch(spec, (-(-count // at_a_time), 1), *arguments, shared=shared), 0


def _fits(task, spec, n):
    """Whether a device runs all blocks of a team at once; a part of one may have no room for many."""
    if spec.team not in ("cluster", "grid"):
        return True
    blocks = _cuda_plan.blocks_needed(spec, n)
    if spec.team == "grid":
        return driver.most_blocks(spec, task.device, spec.tile) >= blocks
    _, shared = _cuda_plan.shares(spec, n, blocks)
    return driver.most_clusters(spec, task.device, shared, blocks) > 0


def _run_tiles(task, spec, x, out, count, n, inner, skew, x_pitch, out_pitch, laws):
    """Run slices that lie in shared memory, each in that of one block or of a team of blocks."""
    is_columns = spec.group == "column"
    groups = count // inner * -(-inner // spec.slices)
    blocks, told, words, memory = _cuda_plan.blocks_needed(spec, n), 0, 0, None
    teams = groups
    if spec.team == "grid":
        # As many blocks for each as keep all multiprocessors busy, where there are enough slices.
        running = driver.most_blocks(spec, task.device, spec.tile)
        blocks = running // (running // blocks)
        teams = min(groups, running // blocks)
        words = _cuda_plan.board_words(spec) * blocks * teams
        memory, told = _board(task.like, words, task.device, task.stream)
    share, shared = _cuda_plan.shares(spec, n, blocks)
    steps = groups, n, share, blocks, inner if is_columns else skew, x_pitch, out_pitch
    launch = task.launch(
        *(spec, (teams * blocks, 1), x, out, told, laws.address, laws.law, *steps),
        shared=shared,
        cluster=blocks if spec.team == "cluster" else 1,
    )
    del memory
    return launch, words


def _run_split(task, specs, x, out, count, n, inner, x_pitch, out_pitch, laws):
    """Run slices in parts, as many slices at a time as the L2 cache holds for the second reading."""
    first, *others = specs
    parts = -(-n // first.capacity)
    most = max(1, _cuda_plan.WAVE_BYTES // (n * task.itemsize) // first.slices)
    groups = -(-count // first.slices)
    blocks = -(-groups // -(-groups // min(most, _cuda_plan.MOST_BLOCKS)))  # of waves of about one size
    wave = blocks * first.slices
    fields = _cuda_plan.FIELDS[task.operation]
    memory, work = task.memory(wave * (parts + 1) * fields, task.work)
    law = laws.address, laws.law
    kernels: list[tuple[Any, tuple[int, int], tuple]] = []
    kernels += [(first, (parts, blocks), (x, work, *law, n, inner, x_pitch, parts))]
    if _cuda_plan.elementwise(task.operation):
        merging, last = others
        totals = work + wave * parts * fields * _cuda_plan.ITEMSIZE[task.work]
        kernels += [
            (merging, (-(-wave // merging.slices), 1), (work, totals, *law, parts)),
            (last, (parts, blocks), (x, out, totals, *law, n, inner, x_pitch, out_pitch)),
        ]
    else:
        (last,) = others
        kernels.append((last, (1, blocks), (x, out, work, *law, n, inner, x_pitch, out_pitch, parts)))
    launches = [task.launch(spec, grid, 0, min(wave, count), *arguments) for spec, grid, arguments in kernels]
    for start in range(wave, count, wave):
        for launch in launches:
            launch(task.stream, start, min(start + wave, count))
    del memory


def _run_strided(task, ghost, written, mask, batch, axes, places, laws):
    """Run slices of any strides."""
    elementwise = _cuda_plan.elementwise(task.operation)
    views = [
        np.broadcast_to(_without(ghost, axes), batch),
        _without(written, places) if elementwise else written,
        np.broadcast_to(_without(ghost if mask is None else mask, axes), batch),
    ]
    sizes, outer = _collapsed(batch, [_in_entries(view) for view in views])
    x_inner = [_in_entries(ghost)[i] for i in axes]
    out_inner = [_in_entries(written)[i] for i in places] if elementwise else x_inner
    mask_inner = x_inner if mask is None else [_in_entries(mask)[i] for i in axes]
    lengths = [ghost.shape[i] for i in axes]
    inner_sizes, inner = _collapsed(lengths, [x_inner, out_inner, mask_inner])
    count, n = math.prod(batch), math.prod(lengths)
    x, out = _address(ghost), _address(written)
    rows = (
        mask is None
        and len(sizes) == len(inner_sizes) == 1
        and inner[0] == inner[1] == (1,)
        and (elementwise or outer[1] == (1,))
        and outer[0][0] >= 0 <= outer[1][0]
    )
    if rows:
        _run_packed(task, x, out, count, n, 1, outer[0][0], outer[1][0], laws)
        return
    nearest = min((abs(stride) for stride in outer[0] if stride), default=n)
    spec = _cuda_plan.strided_plan(
        task.operation,
        task.dtype,
        n,
        nearest < abs(inner[0][-1]),
        laws.per_slice,
        mask is not None,
        (len(sizes), len(inner_sizes)),
    )
    task.launch(
        spec,
        (-(-count // spec.slices), 1),
        *(x, out, 0 if mask is None else _address(mask), laws.address, laws.law, count, n),
        (sizes, *outer),
        (inner_sizes, *inner),
    )


def _without(ghost, axes):
    """First entries along some axes."""
    return ghost[(*(0 if i in axes else slice(None) for i in range(ghost.ndim)), ...)]
