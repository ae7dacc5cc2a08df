"""Devices, and the short way to a kernel on them: the driver's own functions, called through ctypes.

A launch that is prepared once, with its arguments in place, costs some assignments and two calls of the
driver afterwards: 2.3 us on a host, with a driver that does nothing. Kernels are compiled for the device at
hand when they are first used, and their machine code is kept beside that of the CPU's (see `_jit`).
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import struct
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from fastmax import _cuda_plan, _jit

_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76  # of a device
_ATTRIBUTE_DEVICE = 9  # of a pointer
_ATTRIBUTE_MULTIPROCESSORS, _ATTRIBUTE_SHARED = 16, 97
_COOPERATIVE, _CLUSTER = 2, 4  # attributes of a launch
_MOST_SHARED, _LARGE_CLUSTER = 8, 14  # attributes of a kernel
_LATEST = ("cuLaunchKernelEx", "cuLibraryLoadData")  # of the driver's functions, of CUDA 11.8 and 12.0
_INVALID = (1, 912)  # values, cluster sizes: errors where a device never has room for so many blocks
# What may hold the compilers, by the version of CUDA.
_COMPILERS = ("nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint),
        ("pad", ctypes.c_uint),
        ("value", ctypes.c_uint * 16),
    )


class _Configuration(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@functools.cache
def _library():
    """The driver; OSError if there is none, RuntimeError if it is too old."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    for name in _LATEST:
        if not hasattr(library, name):
            raise RuntimeError(
                f"the CUDA driver is too old, it has no {name}: fastmax needs that of CUDA 12.0"
            )
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuMemcpyHtoDAsync_v2.argtypes = [
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    return library


def _check(status):
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"the CUDA driver says: {(text.value or b'unknown error').decode()} ({status})")


def is_available():
    """Whether there are a driver, not too old, and a GPU."""
    try:
        count = ctypes.c_int()
        return (
            _library().cuInit(0) == 0
            and _library().cuDeviceGetCount(ctypes.byref(count)) == 0
            and count.value > 0
        )
    except (OSError, RuntimeError):
        return False


@functools.cache
def _context(device):
    """The primary context of a device, which all libraries share."""
    _check(_library().cuInit(0))
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_library().cuDeviceGet(ctypes.byref(handle), device))
    _check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    return context


@functools.cache
def gpu(device):
    """What a device is."""
    _check(_library().cuInit(0))
    handle, value = ctypes.c_int(), ctypes.c_int()
    _check(_library().cuDeviceGet(ctypes.byref(handle), device))
    numbers = []
    for attribute in (_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR, _ATTRIBUTE_MULTIPROCESSORS, _ATTRIBUTE_SHARED):
        _check(_library().cuDeviceGetAttribute(ctypes.byref(value), attribute, handle))
        numbers.append(value.value)
    capability = numbers[0], numbers[1]
    cluster = _cuda_plan.MOST_IN_CLUSTER.get(capability[0], 1)
    return _cuda_plan.Gpu(capability, numbers[2], numbers[3], cluster)


def device_of(address):
    """Number of the device that an address belongs to."""
    _check(_library().cuInit(0))
    value = ctypes.c_int()
    status = _library().cuPointerGetAttribute(
        ctypes.byref(value), _ATTRIBUTE_DEVICE, ctypes.c_uint64(address)
    )
    _check(status)
    return value.value


@contextlib.contextmanager
def _current(device):
    """Make the primary context of a device current, unless it is."""
    context, found = _context(device), ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(found)))
    if found.value == context.value:
        yield
        return
    _check(_library().cuCtxPushCurrent_v2(context))
    try:
        yield
    finally:
        _check(_library().cuCtxPopCurrent_v2(ctypes.byref(found)))


def upload(array, address, device, stream):
    """Copy a NumPy array in pageable memory to a device, on a stream; it is not needed after this returns."""
    capturing = ctypes.c_int()
    with _current(device):
        _check(_library().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(capturing)))
        if capturing.value:
            raise RuntimeError("temperatures on the host cannot be captured in a graph; pass a GPU array")
        _check(
            _library().cuMemcpyHtoDAsync_v2(address, array.ctypes.data, array.nbytes, ctypes.c_void_p(stream))
        )


# -- kernels ----------------------------------------------------------------------------------------


@functools.cache
def _compilers():
    """Versions of what compiles kernels, as far as they are installed as packages."""
    versions = {}
    for name in ("numba-cuda", *_COMPILERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions, os.environ.get("CUDA_HOME")


def code_of(spec, capability):
    """Machine code of a kernel, from the cache or compiled."""
    directory = _jit._cache_directory()
    if directory is None:
        return _compiled(spec, capability)
    key = repr((tuple(spec._replace(tile=0)), capability, _compilers()))
    path = Path(directory, f"{spec.function}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin")
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        digest, code = content[:32], content[32:]
        if digest == hashlib.sha256(code).digest():
            return code
    code = _compiled(spec, capability)
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=directory)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, path)
    return code


def _compiled(spec, capability):
    """Machine code of a kernel; PTX where nvJitLink is missing or refuses.

    PTX has the version of the compiler, and a driver refuses one that is newer than itself.
    """
    from fastmax import _cuda_target

    ptx = _cuda_plan.build(spec, capability)
    try:
        return _cuda_target.assemble(ptx, capability)[0]
    except (ImportError, RuntimeError):
        return ptx.encode() + b"\0"


_loading = threading.Lock()


@functools.cache
def _load(spec, capability):
    """Load a kernel into the driver, for all devices of a compute capability."""
    code = code_of(spec, capability)
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    status = _library().cuLibraryLoadData(
        ctypes.byref(library), ctypes.c_char_p(code), None, None, 0, None, None, 0
    )
    _check(status)
    _check(_library().cuLibraryGetKernel(ctypes.byref(kernel), library, spec.function.encode()))
    return kernel


def _flat(arguments):
    """Bytes of each scalar among the arguments, tuples taken apart, as the kernel takes them."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        elif isinstance(argument, int):
            yield struct.pack("<q", argument)
        else:
            yield argument.tobytes().ljust(8, b"\0")


@functools.cache
def most_blocks(spec, device, shared):
    """How many blocks of a kernel a device runs at once, with so many bytes of shared memory each."""
    blocks = ctypes.c_int()
    with _current(device):
        status = _library().cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(blocks), _function(spec, device), spec.threads, ctypes.c_size_t(shared)
        )
    _check(status)
    return blocks.value * gpu(device).multiprocessors


@functools.cache
def most_clusters(spec, device, shared, cluster):
    """How many clusters of so many blocks of a kernel a device runs at once."""
    clusters = ctypes.c_int()
    configuration = _configured(spec, (cluster, 1), shared, cluster)
    with _current(device):
        function = _function(spec, device, cluster)
        status = _library().cuOccupancyMaxActiveClusters(
            ctypes.byref(clusters), function, ctypes.byref(configuration)
        )
    if status in _INVALID:
        return 0
    _check(status)
    return clusters.value


def _function(spec, device, cluster=1):
    """A kernel as the driver's questions about occupancy take it."""
    function = ctypes.c_void_p()
    with _loading:
        kernel = _prepared(spec, device, cluster)
    _check(_library().cuKernelGetFunction(ctypes.byref(function), kernel))
    return function


def _prepared(spec, device, cluster):
    """A loaded kernel that may have the shared memory of its largest tile, and so many blocks in a cluster.

    What it may have is the kernel's, not the launch's, so it must do for those that are kept as well.
    """
    kernel = _load(spec, gpu(device).capability)
    handle = ctypes.c_int()
    _check(_library().cuDeviceGet(ctypes.byref(handle), device))
    if spec.tile:
        _check(_library().cuKernelSetAttribute(_MOST_SHARED, spec.tile, kernel, handle))
    if cluster > _cuda_plan.CLUSTER_AT_ANY_RATE:
        _check(_library().cuKernelSetAttribute(_LARGE_CLUSTER, 1, kernel, handle))
    return kernel


def _configured(spec, grid, shared, cluster):
    """What the driver is told of a launch."""
    result = _Configuration(grid=(*grid, 1), block=(spec.threads, 1, 1), shared=shared)
    if spec.team:
        kind, values = (_CLUSTER, (cluster, 1, 1)) if spec.team == "cluster" else (_COOPERATIVE, (1,))
        result.attributes = ctypes.pointer(_Attribute(id=kind, value=values))
        result.attribute_count = 1
    return result


def clear(address, count, device, stream):
    """Set so many words of 32 bits to 0, on a stream."""
    with _current(device):
        _check(
            _library().cuMemsetD32Async(
                ctypes.c_uint64(address), 0, ctypes.c_size_t(count), ctypes.c_void_p(stream)
            )
        )


class Launch:
    """A kernel with its grid and its arguments in place, of which the leading integers may change.

    A block gets so many bytes of ``shared`` memory, a cluster so many blocks. A thread must have its own
    launches, as arguments are written into them.
    """

    def __init__(self, spec, device, grid, arguments, shared=0, cluster=1):
        with _loading, _current(device):
            self._kernel = _prepared(spec, device, cluster)
        words = bytearray(b"".join(_flat(arguments)))
        count = len(words) // 8
        self._values = memoryview(words).cast("q")  # is written to in half the time of a ctypes array
        start = ctypes.addressof(ctypes.c_char.from_buffer(words))
        self._pointers: Any = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        self._configuration = _configured(spec, grid, shared, cluster)
        self._stream = None
        self._device = device
        self._context = _context(device).value
        self._found = ctypes.c_void_p()
        self._where = ctypes.byref(self._found)
        self._call = (ctypes.addressof(self._configuration), self._kernel, self._pointers, None)
        self._find, self._launch = _library().cuCtxGetCurrent, _library().cuLaunchKernelEx

    def __call__(self, stream, *leading):
        """Launch on a stream, with other pointers or integers in the first places."""
        for i, value in enumerate(leading):
            self._values[i] = value
        if stream != self._stream:
            self._configuration.stream = self._stream = stream
        self._find(self._where)
        if self._found.value == self._context:
            status = self._launch(*self._call)
        else:
            with _current(self._device):
                status = self._launch(*self._call)
        if status:
            _check(status)


def run(spec, device, grid, stream, arguments, shared=0, cluster=1):
    """Launch a kernel, and return the launch; pointers are addresses, as all integers are 64 bits wide."""
    launch = Launch(spec, device, grid, arguments, shared, cluster)
    launch(stream)
    return launch
