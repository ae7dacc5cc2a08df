"""The CUDA kernels on a GPU: the conformance suite through PyTorch and CuPy; skipped where there is none."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from conformance import ALLOWED_ON_GPU, failures, wrong_beside_unlike_parts
from paths import IN_PLACE, PATHS

import fastmax

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from fastmax import cuda

pytestmark = pytest.mark.skipif(not cuda.is_available(), reason="no GPU")

# What neither library can hold: other byte orders, and entries at odd addresses.
NOT_HERE = ("byte swapped", "unaligned", "field of records")
# PyTorch has no negative strides.
NOT_IN_TORCH = (*NOT_HERE, "reversed", "reversed rows")


def to_torch(array):
    """Copy an array to a tensor of the same strides."""
    torch = pytest.importorskip("torch")
    name = array.dtype.name
    steps = [stride // array.itemsize for stride in array.strides]
    tensor = torch.empty_strided(array.shape, steps, dtype=getattr(torch, name), device="cuda")
    wide = np.ascontiguousarray(array).astype(np.float64 if name != "bool" else bool).reshape(array.shape)
    repeated = [step == 0 and n > 1 for step, n in zip(steps, array.shape, strict=True)]
    if array.size == 0 or not any(repeated):
        return tensor.copy_(torch.from_numpy(wide))
    single = array[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
    return to_torch(single.copy()).expand(array.shape)


def from_torch(tensor, dtype):
    wide = tensor if tensor.element_size() > 2 else tensor.float()
    return wide.cpu().numpy().astype(dtype)


def to_cupy(array):
    cupy = pytest.importorskip("cupy")
    low = sum(min(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
    if array.size == 0:
        return cupy.empty(array.shape, array.dtype)
    memory = cupy.empty((high - low) // array.itemsize + 1, array.dtype)
    view = cupy.ndarray(array.shape, array.dtype, memory.data + -low, strides=array.strides)
    if 0 in array.strides:
        for index in np.ndindex(array.shape):
            view[index] = array[index]
    else:
        view[...] = cupy.asarray(np.ascontiguousarray(array))
    return view


def from_cupy(array, dtype):
    return array.get().astype(dtype)


LIBRARIES = {"torch": (to_torch, from_torch), "cupy": (to_cupy, from_cupy)}


def visiting(function, library):
    """Let a function take and return NumPy arrays that visit the GPU."""
    inside, outside = LIBRARIES[library]

    def visit(x, /, temperature: Any = 1.0, *, axis=0, where=None, out=None):
        own = inside(x)
        options: dict[str, Any] = {"axis": axis}
        if where is not None:
            options["where"] = inside(np.asarray(where, bool))
        if out is None:
            return outside(function(own, temperature, **options), x.dtype)[()]
        target = own if out is x else inside(out)
        assert function(own, temperature, **options, out=target) is target
        out[...] = outside(target, out.dtype)
        return out

    return visit


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
@pytest.mark.parametrize("path", [path for path in PATHS if path not in NOT_IN_TORCH])
def test_path_conforms(path, name, dtype):
    assert failures(visiting(getattr(fastmax, name), "torch"), name, PATHS[path], dtype) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", oracle.ELEMENTWISE)
@pytest.mark.parametrize("path", IN_PLACE)
def test_path_in_place_conforms(path, name, dtype):
    assert failures(visiting(getattr(fastmax, name), "torch"), name, IN_PLACE[path], dtype) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
@pytest.mark.parametrize("path", ["vector", "rows", "columns", "strided", "masked", "out given"])
def test_16_bits_conform(path, name, dtype):
    function = visiting(getattr(fastmax, name), "torch")
    assert failures(function, name, PATHS[path], dtype, ALLOWED_ON_GPU[np.dtype(dtype).name]) == []


@pytest.mark.parametrize("name", oracle.FUNCTIONS)
@pytest.mark.parametrize("path", ["vector", "reversed", "reversed rows", "strided", "columns", "masked"])
def test_cupy_conforms(path, name):
    assert failures(visiting(getattr(fastmax, name), "cupy"), name, PATHS[path], np.float32) == []


@pytest.mark.parametrize("n", [6145, 12_100, 28161, 56316, 56317, 66793, 131073, 294849, 10**6, 8 * 10**6])
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
def test_long_rows_in_tiles_teams_and_parts(name, n):
    rng = np.random.default_rng(n)
    x = rng.choice(rng.normal(scale=3.0, size=500), size=(2, n)).astype(np.float32)
    result = visiting(getattr(fastmax, name), "torch")(x, np.array([0.7, np.inf]), axis=1)
    for i, temperature in enumerate((0.7, np.inf)):
        oracle.assert_close(name, result[i], x[i], temperature)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", [7000, 70_000, 150_000, 700_000])
def test_parts_of_a_team_may_be_unlike_each_other(n, dtype):
    """In a tile of one block, in clusters and in blocks of the grid, from rows that begin anywhere."""
    assert not wrong_beside_unlike_parts(visiting(fastmax.softmax, "torch"), n, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("n", [40, 1000, 5000, 30_000, 60_000])
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
def test_columns_in_tiles_and_teams(name, n, dtype):
    """Those of one temperature and those of one each, which are taken apart."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(n)
    x = torch.tensor(rng.normal(scale=3.0, size=(n, 72)), device="cuda").to(getattr(torch, dtype))
    exact = x.double().cpu().numpy()
    work = exact if dtype == "float64" else exact.astype(np.float32)
    for temperature in (0.7, np.resize([0.7, 0.0, np.inf, 2.0], 72)):
        found = getattr(fastmax, name)(x, temperature, axis=0).double().cpu().numpy()
        expected = getattr(fastmax, name)(work, temperature, axis=0)
        unit = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8}[dtype]
        scale = np.abs(expected) if name in oracle.ELEMENTWISE else np.maximum(np.abs(expected), 1.0)
        with np.errstate(invalid="ignore"):
            near = np.abs(found - expected) <= 5 * unit * scale + np.finfo(np.float32).tiny
        assert np.all(near | (found == expected))


@pytest.mark.parametrize(("count", "n"), [(300, 70_000), (300, 131_073), (20, 10**6)])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(count, n):
    torch = pytest.importorskip("torch")
    x = torch.randn(count, n, device="cuda")
    many = fastmax.softmax(x, 0.5, axis=1)
    for i in (0, count - 1):
        assert torch.equal(many[i : i + 1], fastmax.softmax(x[i : i + 1].clone(), 0.5, axis=1))


def test_a_call_that_was_prepared_gives_the_same():
    torch = pytest.importorskip("torch")
    x = torch.randn(32, 1000, device="cuda")
    first, second = fastmax.softmax(x, 0.5, axis=1), fastmax.softmax(x, 0.5, axis=1)
    assert torch.equal(first, second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        third = fastmax.softmax(x, 0.5, axis=1)
    torch.cuda.synchronize()
    assert torch.equal(first, third)


def test_launches_that_are_kept_go_on_after_shorter_ones():
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 50_256, device="cuda")
    first = fastmax.softmax(x, axis=1)
    fastmax.softmax(torch.randn(3, 12_100, device="cuda"), axis=1)
    assert torch.equal(first, fastmax.softmax(x, axis=1))


def test_tensors_that_require_gradients_and_numba_arrays():
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 40, device="cuda", requires_grad=True)
    found: Any = fastmax.softmax(x, axis=1)
    assert not found.requires_grad
    from numba import cuda as numba_cuda

    host = x.detach().cpu().numpy()
    own: Any = fastmax.softmax(numba_cuda.to_device(host), axis=1)
    assert np.array_equal(own.copy_to_host(), found.cpu().numpy())
