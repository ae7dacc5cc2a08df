"""How kernels are launched and kept, with a driver that only takes notes."""

import ctypes
import types

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from fastmax import _cuda_launch, _cuda_plan, _jit, cuda

SPEC = _cuda_plan.plan("softmax", "float32", 30000, False, True, 4, False, (9, 0))[0]


class Driver:
    """The driver's functions that a launch calls, and what they were given."""

    def __init__(self, current=1234):
        self.launches, self.contexts, self.current = [], [], current

    def cuCtxGetCurrent(self, found):
        found._obj.value = self.current
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, found):
        self.contexts.append(None)
        return 0

    def cuLaunchKernelEx(self, configuration, kernel, pointers, extra):
        own = _cuda_launch._Configuration.from_address(configuration)
        values = [ctypes.c_int64.from_address(pointer).value for pointer in pointers]
        self.launches.append((list(own.grid), list(own.block), own.stream, kernel.value, values))
        self.cluster = list(own.attributes[0].cluster) if own.attribute_count else None
        return 0


@pytest.fixture
def notes(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(_cuda_launch, "_library", lambda: driver)
    monkeypatch.setattr(_cuda_launch, "_context", lambda device: ctypes.c_void_p(1234))
    monkeypatch.setattr(_cuda_launch, "_load", lambda spec, capability: ctypes.c_void_p(9))
    monkeypatch.setattr(_cuda_launch, "capability", lambda device: (9, 0))
    return driver


def test_launch_hands_over_grid_cluster_stream_and_arguments(notes):
    law = cuda._law_of(0.5, "float32")
    launch = _cuda_launch.Launch(SPEC, 0, (4, 1), (10, 20, 0, law, 2, 30000, 1, 30000, 30000))
    launch(77, 30, 40)
    ((grid, threads, stream, kernel, values),) = notes.launches
    assert (grid, threads, stream, kernel) == ([4, 1, 1], [1024, 1, 1], 77, 9)
    assert notes.cluster == [2, 1, 1]
    assert values[:3] == [30, 40, 0]
    assert values[-5:] == [2, 30000, 1, 30000, 30000]
    words = np.array(values[3:-5], np.int64).view(np.float32)[::2]
    assert np.array_equal(words, law)
    assert notes.contexts == []


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
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x = 8
    theirs.attrs, theirs.numAttrs = [attribute], 1
    ours = _cuda_launch._Configuration.from_address(int(theirs.getPtr()))
    assert (list(ours.grid), list(ours.block), ours.shared) == ([3, 4, 0], [6, 0, 0], 9)
    assert (ours.stream, ours.attribute_count) == (77, 1)
    assert ours.attributes[0].id == _cuda_launch._CLUSTER_DIMENSION
    assert list(ours.attributes[0].cluster) == [8, 0, 0]


def test_errors_of_the_driver_are_told(monkeypatch):
    def describe(status, text):
        text._obj.value = b"out of memory"

    monkeypatch.setattr(_cuda_launch, "_library", lambda: types.SimpleNamespace(cuGetErrorString=describe))
    with pytest.raises(RuntimeError, match=r"the CUDA driver says: out of memory \(2\)"):
        _cuda_launch._check(2)


def test_ptx_is_kept_and_a_damaged_file_counts_as_absent(monkeypatch, tmp_path):
    built = []

    def build(spec, capability):
        built.append(spec)
        return "// text"

    monkeypatch.setattr(_jit, "_cache_directory", lambda: str(tmp_path))
    monkeypatch.setattr(_cuda_plan, "build", build)
    assert [_cuda_launch.ptx_of(SPEC, (9, 0)) for _ in range(2)] == ["// text"] * 2
    assert len(built) == 1
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text() + "more")
    assert _cuda_launch.ptx_of(SPEC, (9, 0)) == "// text"
    assert len(built) == 2
    _cuda_launch.ptx_of(SPEC, (8, 0))
    assert len(built) == 3


def test_nothing_is_available_without_a_driver(monkeypatch):
    def missing():
        raise OSError

    monkeypatch.setattr(_cuda_launch, "_library", missing)
    assert not cuda.is_available()


# --- what is chosen ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "group", "threads", "members", "blocks"),
    [
        (32, "thread", 128, 1, 1),
        (33, "warp", 128, 8, 1),
        (64, "warp", 128, 8, 1),
        (65, "warp", 128, 16, 1),
        (128, "warp", 128, 16, 1),
        (129, "warp", 128, 32, 1),
        (1024, "warp", 128, 32, 1),
        (1025, "block", 128, 128, 1),
        (2049, "block", 256, 256, 1),
        (4097, "block", 512, 512, 1),
        (8193, "block", 1024, 1024, 1),
        (24576, "block", 1024, 1024, 1),
        (24577, "cluster", 1024, 1024, 2),
        (32769, "cluster", 1024, 1024, 4),
        (65537, "cluster", 1024, 1024, 8),
        (131072, "cluster", 1024, 1024, 8),
    ],
)
def test_class_of_a_length(n, group, threads, members, blocks):
    spec, *others = _cuda_plan.plan("softmax", "float32", n, False, True, 1, False, (9, 0))
    assert others == []
    assert (spec.group, spec.threads, spec.members, spec.blocks) == (group, threads, members, blocks)
    assert spec.capacity >= n or group == "thread"


def test_short_rows_of_float64_are_half_as_long():
    groups = [
        _cuda_plan.plan("entropy", "float64", n, False, True, 1, False, (9, 0))[0].group for n in (16, 17)
    ]
    assert groups == ["thread", "warp"]


def test_longer_rows_are_split_and_without_clusters_so_are_shorter_ones():
    for n, capability in [(131073, (9, 0)), (24577, (8, 0))]:
        specs = _cuda_plan.plan("softmax", "float32", n, False, True, 1, False, capability)
        assert [spec.function for spec in specs] == ["summarise", "transform_parts"]
