"""How kernels are launched and kept, with a driver that only takes notes."""

import contextlib
import ctypes
import functools
import importlib
import runpy
import sys
import types
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from fastmax import _cuda_launch, _cuda_plan, _cuda_target, _jit, cuda

HOPPER = _cuda_plan.Gpu((9, 0), 132, 227 * 2**10)
CLUSTERED = HOPPER._replace(cluster=16)


def planned(operation, dtype, n, *, columns=False, packed=True, alignment="aligned", gpu=HOPPER):
    return _cuda_plan.plan(operation, dtype, n, 64 * columns, packed, alignment, False, gpu)


(SPEC,) = planned("softmax", "float32", 100_000)


class Driver:
    """The driver's functions that a launch calls, and what they were given."""

    def __init__(self, current=1234):
        self.launches, self.contexts, self.copies, self.current = [], [], [], current
        self.capturing = False
        self.most_in_cluster = 16
        self.granted = {}  # bytes of shared memory, by kernel

    def cuCtxGetCurrent(self, found):
        found._obj.value = self.current
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, found):
        self.contexts.append(None)
        return 0

    def cuStreamIsCapturing(self, stream, found):
        found._obj.value = self.capturing
        return 0

    def cuMemcpyHtoDAsync_v2(self, to, address, size, stream):
        self.copies.append((to, size, stream.value))
        return 0

    def cuLaunchKernelEx(self, configuration, kernel, pointers, extra):
        own = _cuda_launch._Configuration.from_address(configuration)
        values = [ctypes.c_int64.from_address(pointer).value for pointer in pointers]
        self.launches.append((list(own.grid), list(own.block), own.stream, kernel.value, values))
        self.shared = own.shared
        if own.shared > self.granted.get(kernel.value, 47 * 2**10):  # 48 kB less what a kernel has of itself
            return 1
        own_attribute = own.attributes[0] if own.attribute_count else None
        self.attribute = own_attribute and (own_attribute.id, own.attribute_count, own_attribute.value[:3])
        return 0

    def cuDeviceGet(self, found, device):
        return 0

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.allowed = attribute, value
        if attribute == 8:
            self.granted[kernel.value] = value
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"invalid argument"
        return 0

    def cuKernelGetFunction(self, function, kernel):
        return 0

    def cuOccupancyMaxActiveClusters(self, found, function, configuration):
        blocks = configuration._obj.attributes[0].value[0]
        found._obj.value = 8 if blocks <= self.most_in_cluster else 0
        return 0 if blocks <= 8 or self.most_in_cluster >= blocks else 912

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, found, function, threads, shared):
        found._obj.value = 2
        return 0

    def cuMemsetD32Async(self, address, value, count, stream):
        self.cleared = address.value, value, count.value
        return 0


@pytest.fixture
def notes(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(_cuda_launch, "_library", lambda: driver)
    monkeypatch.setattr(_cuda_launch, "_context", lambda device: ctypes.c_void_p(1234))
    monkeypatch.setattr(_cuda_launch, "_load", lambda spec, capability: ctypes.c_void_p(9))
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: HOPPER)
    _cuda_launch.most_blocks.cache_clear()
    _cuda_launch.most_clusters.cache_clear()
    return driver


def test_launch_hands_over_grid_stream_and_arguments(notes):
    law = cuda._law_of(0.5, "float32")
    steps = 2, 100_000, 25_000, 4, 0, 100_000, 100_000
    launch = _cuda_launch.Launch(SPEC, 0, (8, 1), (10, 20, 0, 0, law, *steps), shared=100_000)
    launch(77, 30, 40)
    ((grid, threads, stream, kernel, values),) = notes.launches
    assert (grid, threads, stream, kernel) == ([8, 1, 1], [SPEC.threads, 1, 1], 77, 9)
    assert notes.attribute == (2, 1, [1, 0, 0])  # cooperative: all blocks of a team run at once
    assert notes.shared == 100_000
    assert notes.allowed == (8, SPEC.tile)
    assert values[:4] == [30, 40, 0, 0]
    assert tuple(values[-7:]) == steps
    words = np.array(values[4:-7], np.int64).view(np.float32)[::2]
    assert np.array_equal(words, law)
    assert notes.contexts == []


def test_teams_that_a_device_has_no_room_for_are_split(notes, cupy):
    """As where processes share it: blocks of a team would wait for those that cannot begin."""

    def one_at_a_time(found, function, threads, shared):
        found._obj.value = 1
        return 0

    x = aligned((1, 2 * HOPPER.multiprocessors * 18_000))
    cuda.softmax(x, 1.0, axis=1)
    assert len(notes.launches) == 1
    notes.cuOccupancyMaxActiveBlocksPerMultiprocessor = one_at_a_time
    _cuda_launch.most_blocks.cache_clear()
    cuda.softmax(x, 2.0, axis=1)
    assert len(notes.launches) == 4


def test_teams_are_as_large_as_all_multiprocessors_can_be_kept_busy(notes, cupy):
    cuda.softmax(aligned((300, 100_000)), axis=1)
    ((grid, _, _, _, values),) = notes.launches
    count, n, share, blocks = values[-7:-3]
    running = 2 * HOPPER.multiprocessors
    least = _cuda_plan.blocks_needed(SPEC, 100_000)
    assert (count, n) == (300, 100_000)
    assert least <= blocks <= running // (running // least)
    assert grid == [running // blocks * blocks, 1, 1]
    assert share * blocks >= n + 3
    assert share % 4 == 0
    assert 4 * share <= notes.shared <= SPEC.tile
    address, value, words = notes.cleared
    assert address == values[2]
    assert value == 0
    assert words == 2 * _cuda_plan.board_words(SPEC) * grid[0]


@pytest.mark.parametrize(("n", "blocks", "large"), [(100_000, 6, False), (262_144, 15, True)])
def test_clusters_are_as_small_as_they_hold_a_row(notes, cupy, monkeypatch, n, blocks, large):
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: CLUSTERED)
    cuda.softmax(aligned((300, n)), axis=1)
    ((grid, _, _, _, values),) = notes.launches
    assert notes.attribute == (4, 1, [blocks, 1, 1])
    assert grid == [300 * blocks, 1, 1]
    assert values[-4] == blocks
    assert (notes.allowed == (14, 1)) == large  # more blocks than every kernel may have
    assert not hasattr(notes, "cleared")  # nothing in the grid's memory


@pytest.mark.parametrize(("most", "kinds"), [(7, [4, 2]), (1, [2, 2])])
def test_a_gpu_without_room_for_a_cluster_takes_a_team_of_the_grid(notes, cupy, monkeypatch, most, kinds):
    """Rows of 6 blocks and of 11, where a cluster has so many at most."""
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: CLUSTERED)
    notes.most_in_cluster = most
    for n, kind in zip((100_000, 200_000), kinds, strict=True):
        cuda.softmax(aligned((300, n)), axis=1)
        assert notes.attribute[0] == kind
    assert len(notes.launches) == 2


def test_a_gpu_without_clusters_is_asked_for_none(notes, cupy, monkeypatch):
    """Not even where it has no room for a team of the grid, either."""
    loaded, older = set(), HOPPER._replace(capability=(8, 0), multiprocessors=108)
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: older)
    monkeypatch.setattr(_cuda_launch, "_load", lambda spec, _: loaded.add(spec.team) or ctypes.c_void_p(9))
    monkeypatch.setattr(notes, "cuOccupancyMaxActiveBlocksPerMultiprocessor", lambda *_: 0)
    cuda.softmax(aligned((3, 100_000)), axis=1)
    assert loaded == {"grid", ""}
    assert len(notes.launches) == 3


def test_launches_that_are_kept_have_shared_memory_for_their_tiles(notes, cupy, monkeypatch):
    """Whatever was launched since with a smaller tile, and just above what needs no permission."""
    handles = {}

    def load(spec, capability):
        return ctypes.c_void_p(handles.setdefault(spec, 100 + len(handles)))

    monkeypatch.setattr(_cuda_launch, "_load", load)
    arrays = [aligned((3, n)) for n in (50_256, 20_000, 50_256, 12_100)]
    for x in arrays:
        cuda.softmax(x, axis=1)
    assert len(notes.launches) == 4
    assert len(handles) == 1


def test_launch_goes_to_the_device_of_its_arrays(notes):
    notes.current = 99  # the context of another device
    launch = _cuda_launch.Launch(SPEC, 0, (2, 1), (10, 20))
    notes.contexts.clear()
    launch(0)
    assert notes.contexts == [1234, None]
    assert len(notes.launches) == 1


def test_the_structures_are_those_of_the_driver():
    driver = pytest.importorskip("cuda.bindings.driver")
    theirs = driver.CUlaunchConfig()
    theirs.gridDimX, theirs.gridDimY, theirs.blockDimX, theirs.sharedMemBytes = 3, 4, 6, 9
    theirs.hStream = driver.CUstream(77)
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    attribute.value.cooperative = 1
    theirs.attrs, theirs.numAttrs = [attribute], 1
    ours = _cuda_launch._Configuration.from_address(int(theirs.getPtr()))
    assert (list(ours.grid), list(ours.block), ours.shared) == ([3, 4, 0], [6, 0, 0], 9)
    assert (ours.stream, ours.attribute_count) == (77, 1)
    assert ours.attributes[0].id == _cuda_launch._COOPERATIVE
    assert ours.attributes[0].value[0] == 1
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster = attribute.value.clusterDim
    cluster.x, cluster.y, cluster.z = 6, 1, 1
    attribute.value.clusterDim = cluster
    theirs.attrs = [attribute]
    ours = _cuda_launch._Configuration.from_address(int(theirs.getPtr()))
    assert ours.attributes[0].id == _cuda_launch._CLUSTER
    assert ours.attributes[0].value[:3] == [6, 1, 1]
    kinds = driver.CUfunction_attribute
    assert kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED == _cuda_launch._LARGE_CLUSTER


def test_errors_of_the_driver_are_told(monkeypatch):
    def describe(status, text):
        text._obj.value = b"out of memory"

    monkeypatch.setattr(_cuda_launch, "_library", lambda: types.SimpleNamespace(cuGetErrorString=describe))
    with pytest.raises(RuntimeError, match=r"the CUDA driver says: out of memory \(2\)"):
        _cuda_launch._check(2)


def test_code_is_kept_and_a_damaged_file_counts_as_absent(monkeypatch, tmp_path):
    built = []

    def compiled(spec, capability):
        built.append(spec)
        return b"code"

    monkeypatch.setattr(_jit, "_cache_directory", lambda: str(tmp_path))
    monkeypatch.setattr(_cuda_launch, "_compiled", compiled)
    assert [_cuda_launch.code_of(SPEC, (9, 0)) for _ in range(2)] == [b"code"] * 2
    assert len(built) == 1
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b"more")
    assert _cuda_launch.code_of(SPEC, (9, 0)) == b"code"
    assert len(built) == 2
    _cuda_launch.code_of(SPEC, (8, 0))
    assert len(built) == 3
    monkeypatch.setattr(_cuda_launch, "_compilers", lambda: "other")
    _cuda_launch.code_of(SPEC, (9, 0))
    assert len(built) == 4


def test_the_driver_gets_machine_code_for_it_may_be_older_than_the_compiler(monkeypatch):
    pytest.importorskip("cuda.bindings.nvjitlink").version()
    ptx = """.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel() { ret; }
"""
    monkeypatch.setattr(_cuda_plan, "build", lambda spec, capability: ptx)
    assert _cuda_launch._compiled(SPEC, (9, 0)).startswith(b"\x7fELF")
    # A GPU, and then PTX, that are newer than nvJitLink.
    assert _cuda_launch._compiled(SPEC, (99, 0)) == ptx.encode() + b"\0"
    newer = ptx.replace("8.0", "99.0")
    monkeypatch.setattr(_cuda_plan, "build", lambda spec, capability: newer)
    assert _cuda_launch._compiled(SPEC, (9, 0)) == newer.encode() + b"\0"
    monkeypatch.setattr(_cuda_plan, "build", lambda spec, capability: ptx)

    def missing(ptx, capability):
        raise ImportError

    monkeypatch.setattr(_cuda_target, "assemble", missing)
    assert _cuda_launch._compiled(SPEC, (9, 0)) == ptx.encode() + b"\0"


def test_without_numba_cuda_the_extra_is_named(monkeypatch):
    """Numba itself has a package of that name, with some of its modules."""
    source, usual = str(_cuda_target.__file__), importlib.import_module

    def found(name):
        if name.startswith("numba.cuda."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return usual(name)

    monkeypatch.setattr(importlib, "import_module", found)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastmax\[cuda13\]'"):
        runpy.run_path(source)


def test_temperatures_on_the_host_are_not_captured_in_a_graph(notes):
    temperatures = np.ones(3)
    _cuda_launch.upload(temperatures, 64, 0, 77)
    assert notes.copies == [(64, 24, 77)]
    notes.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured in a graph; pass a GPU array"):
        _cuda_launch.upload(temperatures, 64, 0, 77)
    assert len(notes.copies) == 1


def test_nothing_is_available_without_a_driver(monkeypatch):
    def missing():
        raise OSError

    monkeypatch.setattr(_cuda_launch, "_library", missing)
    assert not cuda.is_available()


@pytest.mark.parametrize("missing", ["cuLaunchKernelEx", "cuLibraryLoadData"])
def test_a_driver_that_is_too_old_is_named(monkeypatch, missing):
    def function(*arguments):
        return 0

    names = {"cuInit", "cuMemcpyHtoDAsync_v2", *_cuda_launch._LATEST} - {missing}
    old = types.SimpleNamespace(**dict.fromkeys(names, function))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: old)
    monkeypatch.setattr(_cuda_launch, "_library", functools.cache(_cuda_launch._library.__wrapped__))
    assert not cuda.is_available()
    with pytest.raises(RuntimeError, match=f"the CUDA driver is too old, it has no {missing}"):
        _cuda_launch.gpu.__wrapped__(0)


# --- which launches are kept, with arrays that look like CuPy's ---------------------------------------


class ndarray(np.ndarray):
    """An array on the host that looks as if it were CuPy's."""

    __module__ = "cupy"
    device: Any = types.SimpleNamespace(id=0)

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        return {**self.__array_interface__, "data": (self.ctypes.data, False), "strides": self.strides}


def aligned(shape: Any, dtype: Any = np.float32):
    """Return an array that begins at a multiple of 256 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size].view(dtype).reshape(shape).view(ndarray)


@pytest.fixture
def cupy(notes, monkeypatch):
    """Take the place of CuPy; its ``current`` device can be set."""
    module: Any = types.ModuleType("cupy")
    module.current = 0
    module.empty = aligned
    stream = types.SimpleNamespace(ptr=5)
    module.cuda = types.SimpleNamespace(
        Device=lambda device: contextlib.nullcontext(),
        get_current_stream=lambda: stream,
        runtime=types.SimpleNamespace(getDevice=lambda: module.current),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(cuda, "_ready", cuda._Ready())
    kept = []
    monkeypatch.setattr(cuda, "_keep_ready", functools.partial(note_kept, kept, cuda._keep_ready))
    module.kept = kept
    return module


def note_kept(kept, keep, *arguments):
    kept.append(arguments)
    keep(*arguments)


def layout(launch):
    """Count, n, inner, skew and the two pitches of a launch."""
    return launch[-1][-6:]


def test_a_launch_for_one_layout_does_not_serve_another(notes, cupy):
    x = aligned((20, 20))
    for view in (x.T, x, np.asfortranarray(x).view(ndarray)):
        cuda.softmax(view, 1.0, axis=1)
    assert [layout(launch)[2] for launch in notes.launches] == [20, 1, 20]
    assert len(cupy.kept) == 1


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "entropy"])
def test_equal_calls_share_a_launch(notes, cupy, name):
    function, x = getattr(cuda, name), aligned((4, 8))
    shape = (4, 8) if cuda._cuda_plan.elementwise(name) else (4,)
    for temperature in (1.0, 1, np.float32(1.0), np.float64(1.0)):
        result = function(x, temperature, axis=1)
        assert (result.shape, result.dtype) == (shape, np.float32)
    for out in (aligned(shape), aligned(shape)):
        assert function(x, 1.0, axis=1, out=out) is out
        assert notes.launches[-1][-1][:2] == [x.ctypes.data, out.ctypes.data]
    assert len(notes.launches) == 6
    assert len(cupy.kept) == 1
    assert len({tuple(layout(launch)) for launch in notes.launches}) == 1


def test_a_launch_is_not_shared_between_what_it_does_not_fit(notes, cupy):
    x = aligned((4, 8))
    cuda.softmax(x, 1.0, axis=1)
    cuda.softmax(x, 2.0, axis=1)
    cuda.softmax(x, 1.0, axis=0)
    cuda.softmax(x.reshape(8, 4), 1.0, axis=1)
    cuda.softmax(x.astype(np.float64).view(ndarray), 1.0, axis=1)
    cuda.softmax(aligned(33)[1:].reshape(4, 8), 1.0, axis=1)
    cuda.softmax(x, 1.0, axis=1, out=aligned(33)[1:].reshape(4, 8))
    cuda.logsumexp(x, 1.0, axis=1)
    assert cuda.logsumexp(x, 1.0, axis=1, keepdims=True).shape == (4, 1)
    assert len(cupy.kept) == 9
    before = len(cupy.kept)
    cuda.softmax(x, 1.0, axis=1, out=aligned((8, 4)).T)  # another layout
    assert len(cupy.kept) == before
    with pytest.raises(ValueError, match="out must have the shape"):
        cuda.softmax(x, 1.0, axis=1, out=aligned((8, 4)))
    with pytest.raises(ValueError, match="out must have the shape"):
        cuda.softmax(x, 1.0, axis=1, out=aligned((4, 8), np.float64))
    both = aligned((5, 8))
    with pytest.raises(ValueError, match="overlaps x in part"):
        cuda.softmax(both[:4], 1.0, axis=1, out=both[1:])


def test_a_launch_for_another_device_is_prepared_anew(notes, cupy):
    """CuPy's new arrays are on its current device, which is not that of x."""
    x = aligned((4, 8))
    cuda.softmax(x, 1.0, axis=1)
    cupy.current = 1
    assert cuda._evaluate_ready("softmax", x, 1.0, 1, False, None) is None


def test_one_temperature_on_the_gpu_has_one_law(notes, cupy):
    x = aligned((64, 8))
    for temperatures, count, step in [(aligned(1), 1, 0), (aligned((64,)), 64, 20)]:
        notes.launches.clear()
        cuda.softmax(x, temperatures, axis=1)
        (*_, laws), (*_, softmax) = notes.launches
        assert laws[2] == count
        assert np.array([softmax[3]], np.int64).view(np.float32)[0] == step


def test_slices_that_the_cache_cannot_hold_together_come_in_waves(notes, cupy, monkeypatch):
    n = 200_000
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: HOPPER._replace(capability=(7, 5)))
    monkeypatch.setattr(_cuda_plan, "WAVE_BYTES", 3 * 4 * n)
    x = aligned((10, n))
    cuda.softmax(x, 1.0, axis=1)
    assert [launch[-1][:2] for launch in notes.launches[::3]] == [[0, 3], [3, 6], [6, 9], [9, 10]]
    assert [launch[0][:2] for launch in notes.launches[:3]] == [[49, 3], [1, 1], [49, 3]]


@pytest.mark.parametrize("name", ["logsumexp", "entropy"])
def test_values_may_not_replace_the_entries(notes, cupy, name):
    """Nor when a launch for such calls is ready."""
    function, x = getattr(cuda, name), aligned((4, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="out must have the shape"):
            function(x, 1.0, axis=1, out=x)
        function(x, 1.0, axis=1)


# --- arrays of other libraries ----------------------------------------------------------------------


def test_a_kind_of_array_derived_from_a_librarys_is_taken_as_that():
    class Tensor:
        __module__ = "torch"

    class Mine(Tensor):
        pass

    assert cuda._package_of(Mine) == "torch"
    assert cuda._package_of(np.ndarray) == "numpy"


def test_arrays_that_begin_between_entries_are_refused(notes, cupy):
    x = np.zeros(36, np.uint8)[1:33].view(np.float32).reshape(2, 4).view(ndarray)
    with pytest.raises(ValueError, match="x must begin at a multiple of its itemsize"):
        cuda.softmax(x, 1.0, axis=1)


@pytest.fixture
def torch(notes, monkeypatch):
    """PyTorch, with a kind of tensor on the host, ``OnGpu``, that looks as if it were on a GPU."""
    module: Any = pytest.importorskip("torch")

    class OnGpu(module.Tensor):
        is_cuda, device = True, module.device("cpu", 0)

        def get_device(self):
            return 0

    monkeypatch.setattr(cuda, "_ready", cuda._Ready())
    monkeypatch.setattr(cuda, "_stream", lambda x, device: 5)
    return types.SimpleNamespace(**vars(module), OnGpu=OnGpu)


def test_tensors_without_memory_are_refused(notes, torch):
    """Such as those that stand for several on other devices, or for zeros."""
    ordinary = torch.ones(8, 100).as_subclass(torch.OnGpu)
    without = torch._efficientzerotensor((8, 100)).as_subclass(torch.OnGpu)
    assert without.data_ptr() == 0
    mask = torch._efficientzerotensor((8, 100), dtype=torch.bool).as_subclass(torch.OnGpu)
    cuda.softmax(ordinary, 0.7, axis=1, out=ordinary)  # which leaves a launch for such arrays
    assert len(notes.launches) == 1
    for name, x, arguments in [
        ("x", without, {"out": ordinary}),
        ("x", without, {"out": without}),
        ("out", ordinary, {"out": without}),
        ("where", ordinary, {"out": ordinary, "where": mask}),
        ("temperature", ordinary, {"out": ordinary, "temperature": without[:, 0]}),
    ]:
        options: Any = {"temperature": 0.7, **arguments}
        with pytest.raises(TypeError, match=f"{name} must have memory of its own, got OnGpu without any"):
            cuda.softmax(x, axis=1, **options)
    assert len(notes.launches) == 1
    nothing = torch.ones(0, 3).as_subclass(torch.OnGpu)
    assert cuda.softmax(nothing, axis=1, out=nothing) is nothing


@pytest.mark.parametrize("name", ["softmax", "entropy"])
def test_results_of_a_derived_kind_of_tensor_are_of_that_kind(notes, torch, name):
    """From a launch that is prepared, from one that is ready, and of slices without entries."""
    x = torch.ones(64, 64).as_subclass(torch.OnGpu)
    for count in range(1, 3):
        assert type(getattr(cuda, name)(x, axis=1)) is torch.OnGpu
        assert len(notes.launches) == count
    assert type(getattr(cuda, name)(x[:, :0], axis=1)) is torch.OnGpu


def test_autograd_learns_that_a_tensor_has_changed(notes, torch):
    """By a launch that is prepared, and by one that is ready."""
    kept = torch.ones(4, 8, requires_grad=True)
    out = torch.ones(4, 8).as_subclass(torch.OnGpu)
    product = (kept * out).sum()
    for count in range(1, 3):
        cuda.softmax(torch.ones(4, 8).as_subclass(torch.OnGpu), axis=1, out=out)
        assert (len(notes.launches), out._version) == (count, count)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_numba_arrays_are_made_on_the_device_and_the_stream_of_x(monkeypatch):
    made, devices = [], []

    class Gpus:
        def __getitem__(self, device):
            devices.append(device)
            return contextlib.nullcontext()

    stand_in = types.SimpleNamespace(
        gpus=Gpus(),
        external_stream=lambda pointer: f"stream {pointer}",
        per_thread_default_stream=lambda: "thread's stream",
        device_array=lambda shape, dtype, strides, stream: made.append((shape, strides, stream)),
    )
    monkeypatch.setattr("numba.cuda", stand_in, raising=False)
    for stream in (0, 1, 2, 77):
        cuda._empty_of_numba((3,), "float32", 1, stream)
    cuda._empty_of_numba((3, 2), "float32", 1, 0, (4, 12))
    assert made == [
        ((3,), None, 0),
        ((3,), None, 0),
        ((3,), None, "thread's stream"),
        ((3,), None, "stream 77"),
        ((3, 2), (4, 12), 0),
    ]
    assert devices == [1] * 5


def test_temperatures_are_copied_before_they_are_sent(notes, cupy, monkeypatch):
    """Pinned memory would be read after the call has returned."""
    sent = []
    monkeypatch.setattr(_cuda_launch, "upload", lambda array, *rest: sent.append(array))
    temperatures = np.ones(4)
    cuda.softmax(aligned((4, 8)), temperatures, axis=1)
    assert np.array_equal(sent[0], temperatures)
    assert not np.shares_memory(sent[0], temperatures)


def test_types_of_16_bits_need_a_gpu_that_has_them(notes, cupy, monkeypatch):
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: HOPPER._replace(capability=(7, 5)))
    cuda.softmax(aligned(3), axis=0)
    with pytest.raises(RuntimeError, match=r"float16 needs a GPU of compute capability 8\.0 or above"):
        cuda.softmax(aligned(3, np.float16), axis=0)


def test_views_that_are_marked_as_negated_are_negated():
    torch = pytest.importorskip("torch")
    x = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    assert x.is_neg()
    resolved = cuda._resolved(x)
    assert not resolved.is_neg()
    assert resolved.tolist() == [-2.0, -4.0]
    assert cuda._packed(x) is None
    with pytest.raises(ValueError, match="negative bit"):
        cuda.evaluate("softmax", resolved, 1.0, 0, None, x)


# --- what is chosen ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "group", "threads", "members"),
    [
        (4, "warp", 128, 1),
        (8, "warp", 128, 2),
        (32, "warp", 128, 2),
        (36, "warp", 128, 4),
        (64, "warp", 128, 4),
        (68, "warp", 128, 8),
        (128, "warp", 128, 8),
        (132, "warp", 128, 16),
        (256, "warp", 128, 16),
        (260, "warp", 128, 32),
        (1280, "warp", 128, 32),
        (1284, "block", 352, 352),
        (2048, "block", 128, 128),
        (4096, "block", 256, 256),
        (6144, "block", 384, 384),
    ],
)
def test_class_of_a_length(n, group, threads, members):
    (spec,) = planned("softmax", "float32", n)
    assert spec.function == "transform"
    assert (spec.group, spec.threads, spec.members) == (group, threads, members)
    assert spec.capacity >= n
    assert not spec.shifted


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_blocks_leave_few_entries_idle(dtype):
    lanes = 16 // _cuda_plan.ITEMSIZE[dtype]
    for n in range(2049, 3072, 37):
        (spec,) = planned("softmax", dtype, n, alignment="shifted")
        assert n + lanes - 1 <= spec.capacity <= 1.2 * n


@pytest.mark.parametrize(
    ("n", "team", "blocks"),
    [
        *[
            (6145, "", 1),
            (11_132, "", 1),
            (11_133, "", 1),
            (56_316, "", 1),
            (56_317, "cluster", 6),
            (66_792, "cluster", 6),
        ],
        *[(66_793, "cluster", 4), (294_848, "cluster", 16), (294_849, "grid", 11), (10**6, "grid", 37)],
    ],
)
def test_longer_rows_lie_in_tiles_of_one_block_or_of_a_team(n, team, blocks):
    (spec,) = planned("softmax", "float32", n, gpu=CLUSTERED)
    assert spec.function == "transform_rows"
    assert (spec.team, _cuda_plan.blocks_needed(spec, n)) == (team, blocks)


@pytest.mark.parametrize(
    ("dtype", "inner", "line"), [("float32", 1, 0), ("bfloat16", 8, 16), ("float32", 8, 32)]
)
def test_a_tile_is_no_wider_than_the_columns_of_a_group(dtype, inner, line):
    assert _cuda_plan.line_of(dtype, inner) == line
    assert _cuda_plan.line_of(dtype, 32 * inner) == _cuda_plan.LINE_BYTES
    if line:
        alignment = _cuda_plan.alignment_of(dtype, 0, 0, 1000, inner, 1000 * inner, 1000 * inner)
        (spec,) = _cuda_plan.plan("softmax", dtype, 1000, line, False, alignment, False, HOPPER)
        assert (spec.function, spec.slices) == ("transform_lines", inner)


def test_without_clusters_teams_are_of_the_grid():
    for n in (56_317, 262_144, 10**6):
        assert planned("softmax", "float32", n)[0].team == "grid"
    assert planned("softmax", "float32", 4000, columns=True)[0].team == "grid"
    assert planned("softmax", "float32", 4000, columns=True, gpu=CLUSTERED)[0].team == "cluster"


def test_columns_that_are_aligned_lie_in_tiles():
    functions = [
        planned(name, "float32", 1000, columns=True, alignment=alignment)[0].function
        for name, alignment in [("softmax", "aligned"), ("entropy", "aligned"), ("softmax", "apart")]
    ]
    assert functions == ["transform_lines", "reduce_columns", "summarise"]
    assert planned("softmax", "float32", 32, columns=True)[0].function == "transform"


@pytest.mark.parametrize(
    ("dtype", "n", "members"),
    [
        *(("float32", n, members) for n, members in [(4, 1), (16, 2), (32, 2)]),
        *(("float64", n, members) for n, members in [(2, 1), (8, 2)]),
        ("bfloat16", 24, 2),
    ],
)
def test_short_rows_that_are_aligned_need_no_shared_memory(dtype, n, members):
    (spec,) = planned("softmax", dtype, n)
    assert (spec.function, spec.members) == ("transform", members)


def test_short_rows_that_are_not_aligned_are_taken_together():
    for dtype, n, each in [("bfloat16", 3, 4), ("float32", 3, 2), ("float32", 10, 1)]:
        (spec,) = planned("softmax", dtype, n, alignment="shifted")
        assert (spec.function, spec.pieces, spec.lanes, spec.each) == ("transform_short", n, 1, each)
    groups = [planned("entropy", "float64", n, alignment="shifted")[0].group for n in (15, 17)]
    assert groups == ["thread", "warp"]


def test_the_longest_rows_are_split_and_on_older_gpus_so_are_shorter_ones():
    for n, gpu in [(10**8, HOPPER), (6145, HOPPER._replace(capability=(7, 5)))]:
        specs = planned("softmax", "float32", n, gpu=gpu)
        assert [spec.function for spec in specs] == ["summarise", "merge_slices", "transform_parts"]
    for n, group in [(10**5, "warp"), (10**6, "block")]:
        _, *others = planned("softmax", "float32", n, columns=True, alignment="apart")
        assert others[0].group == group


def test_a_gpu_with_less_shared_memory_has_smaller_tiles():
    small = HOPPER._replace(capability=(8, 6), shared=99 * 2**10)
    assert not planned("softmax", "float32", 25_000, gpu=small)[0].team
    (spec,) = planned("softmax", "float32", 26_000, gpu=small)
    assert spec.team == "grid"
    assert small.shared - 4096 < spec.tile < small.shared  # there are exchanges beside it
