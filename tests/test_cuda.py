"""The CUDA kernels without a GPU: their logic in a simulator, every class against the exact values."""

import ml_dtypes
import numpy as np
import oracle
import pytest
from conformance import TEMPERATURES, cases, slices, wrong_beside_unlike_parts
from marks import nightly
from paths import IN_PLACE, PATHS

import fastmax

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("greenlet", reason="the simulator needs greenlet")

import simulator
from simulator import Array, on_gpu

from fastmax import _cuda_launch, _cuda_plan, cuda

# What a GPU cannot hold, and shapes with so many slices that each takes the simulator minutes.
NOT_HERE = (
    *("byte swapped", "unaligned", "field of records"),
    *("many rows", "many columns", "middle axis of many", "in place rows", "in place columns"),
)
ROUTES = [
    (path, name)
    for path in PATHS | IN_PLACE
    for name in (oracle.FUNCTIONS if path in PATHS else oracle.ELEMENTWISE)
    if path not in NOT_HERE
]
SMALL = 40  # entries of the slices that go through every path


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    simulator.install(monkeypatch)


def faults(name, function, dtype, longest, batch):
    """Return what a function gets wrong on the conformance slices, at all temperatures in one call."""
    found = []
    for description, x in slices(dtype).items():
        if 0 < len(x) <= longest:
            results = batch(function, x, np.array(TEMPERATURES))
            for i, temperature in enumerate(TEMPERATURES):
                fault = oracle.fault(name, results(i), oracle.expect(x, temperature))
                if fault:
                    found.append(f"{description}, T = {temperature}: {fault}")
    return found


def rows(function, x, temperatures):
    result = function(np.tile(x, (len(temperatures), 1)), temperatures, axis=1)
    return lambda i: result[i]


def columns(function, x, temperatures):
    result = function(np.tile(x[:, np.newaxis], len(temperatures)), temperatures, axis=0)
    return lambda i: result[..., i]


def spaced(function, x, temperatures):
    """Any strides, with a mask."""
    wide = np.full((len(temperatures), 2 * len(x)), np.nan, x.dtype)
    wide[:, ::2] = x
    mask = np.resize([True, False], wide.shape)
    result = function(wide, temperatures, axis=1, where=mask)
    return lambda i: result[i, ::2] if result.ndim == 2 else result[i]


LAYOUTS = {"rows": rows, "columns": columns, "spaced": spaced}
# The longest slices for each layout and dtype; 16 bits differ in how they are read and written alone.
LONGEST = [
    *(("rows", dtype, 100) for dtype in (np.float32, np.float64)),
    *(("columns", dtype, 45) for dtype in (np.float32, np.float64)),
    *(("rows", dtype, 17) for dtype in (np.float16, ml_dtypes.bfloat16)),
    ("spaced", np.float32, 45),
    ("columns", ml_dtypes.bfloat16, 17),
]


@pytest.mark.parametrize(
    ("layout", "dtype", "longest", "name"),
    [
        *((*kind, name) for kind in LONGEST[::2] for name in ("softmax", "entropy")),
        *((*kind, name) for kind in LONGEST[1::2] for name in ("log_softmax", "logsumexp")),
        *nightly(*((*kind, name) for kind in LONGEST[::2] for name in ("log_softmax", "logsumexp"))),
        *nightly(*((*kind, name) for kind in LONGEST[1::2] for name in ("softmax", "entropy"))),
    ],
)
def test_slices_conform(layout, dtype, longest, name):
    batch = LAYOUTS[layout]
    assert faults(name, on_gpu(getattr(fastmax, name)), dtype, longest, batch) == []


@pytest.mark.parametrize(("path", "name"), ROUTES)
def test_paths_conform(path, name):
    """Every layout and argument, on a few slices each."""
    function, found = on_gpu(getattr(fastmax, name)), []
    chosen = [case for case in cases(np.float32) if len(case[1]) <= SMALL]
    for description, x, temperature, expected in chosen[sum(map(ord, path + name)) % 41 :: 41]:
        fault = oracle.fault(name, (PATHS | IN_PLACE)[path](function, x, temperature), expected)
        if fault:
            found.append(f"{description}: {fault}")
    assert found == []


# --- both sides of every threshold ------------------------------------------------------------------


def small_classes(monkeypatch):
    """Let groups be so small that every class, and the split, have slices that the simulator can run."""
    class_ = _cuda_plan.Class
    rows = (class_("warp", 64, 8, 8), class_("warp", 64, 32, 8))
    monkeypatch.setattr(_cuda_plan, "ROWS", dict.fromkeys((2, 4, 8), rows))
    monkeypatch.setattr(_cuda_plan, "BLOCK_ENTRIES", {2: 16, 4: 8, 8: 4})
    monkeypatch.setattr(_cuda_plan, "BLOCK_THREADS", {2: 64, 4: 64, 8: 64})
    monkeypatch.setattr(_cuda_plan, "COLUMNS", (class_("column", 64, 1, 8), class_("column", 64, 4, 8)))
    monkeypatch.setattr(_cuda_plan, "SPLIT_ROWS", class_("block", 64, 64, 8))
    monkeypatch.setattr(_cuda_plan, "SPLIT_COLUMNS", class_("column", 64, 4, 8))
    tiles = (
        _cuda_plan.Tile("", 3, 1, 64),
        _cuda_plan.Tile("", 4, 1, 32),
        _cuda_plan.Tile("cluster", 2, 4, 64),
        _cuda_plan.Tile("grid", 4, 1000, 64),
    )
    for name in ("AT_ONCE_TILES", "COLUMN_TILES"):
        monkeypatch.setattr(_cuda_plan, name, dict.fromkeys((2, 4, 8), tiles))
    monkeypatch.setattr(_cuda_plan, "ROW_TILES", tiles)
    small = simulator.GPU._replace(shared=4096, cluster=4)
    monkeypatch.setattr(_cuda_launch, "gpu", lambda device: small)
    monkeypatch.setattr(_cuda_plan, "WAVE_BYTES", 4 * 4096)


@pytest.fixture
def _small(monkeypatch):
    small_classes(monkeypatch)


SHORT = (32, 64, 256, 512, 1020)
LONG = (2032, 2033, 4080, 4081)
LONG_BY_DAY = (  # a case for each kernel that only long rows have
    *(("softmax", n) for n in LONG),
    *[("log_softmax", 2033), ("logsumexp", 4081), ("entropy", 2033), ("entropy", 4081)],
)


def check(name, n, axis, dtype=np.float32, count=3, temperature=0.7):
    """Assert that slices of a length are right, each at a temperature of its own, and one with NaN."""
    rng = np.random.default_rng(n)
    x = rng.choice(rng.normal(scale=3.0, size=60), size=(count, n)).astype(dtype)
    x[0, n // 2] = -np.inf
    temperatures = np.resize([temperature, np.inf, 0.0], count)
    result = on_gpu(getattr(fastmax, name))(x if axis else x.T.copy(), temperatures, axis=axis)
    for i in {0, 1, 2, count - 1}:
        own = result[i] if axis or result.ndim == 1 else result[:, i]
        oracle.assert_close(name, own, x[i], temperatures[i])


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("name", "n"),
    [
        *(("softmax", n) for n in (*SHORT, *(n + 1 for n in SHORT))),
        *((name, n + 1) for name in oracle.FUNCTIONS[1:] for n in SHORT),
        *LONG_BY_DAY,
        *nightly(*((name, n) for name in oracle.FUNCTIONS[1:] for n in SHORT)),
        *nightly(*((f, n) for f in oracle.FUNCTIONS for n in LONG if (f, n) not in LONG_BY_DAY)),
    ],
)
def test_rows_on_both_sides_of_thresholds(name, n):
    check(name, n, 1)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("count", [3, 8, 20])
@pytest.mark.parametrize(
    ("name", "n"),
    [
        *((name, n) for name in oracle.FUNCTIONS for n in (8, 9, 32, 33)),
        *[("softmax", 128), ("softmax", 129), ("log_softmax", 128), ("logsumexp", 128), ("entropy", 128)],
        *nightly(*((name, 129) for name in oracle.FUNCTIONS[1:])),
    ],
)
def test_columns_on_both_sides_of_thresholds(name, n, count):
    """Of 3 columns, which are not aligned, of 8, which fill a short line, and of 20: one and a part."""
    check(name, n, 0, count=count)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        *((n, dtype) for n in (200, 519) for dtype in (np.float64, np.float16, ml_dtypes.bfloat16)),
        *[(1500, np.float16), (3000, ml_dtypes.bfloat16), (9001, np.float16)],
        *nightly((1500, np.float64), (1500, ml_dtypes.bfloat16), (3000, np.float64), (3000, np.float16)),
        *nightly((9001, np.float64), (9001, ml_dtypes.bfloat16)),
    ],
)
def test_other_dtypes_in_blocks_teams_and_parts(n, dtype):
    check("softmax", n, 1, dtype)
    check("log_softmax", n, 1, dtype)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("n", "bytes_of_line"), [(40, 64), (150, 16), (150, 80), (300, 16), (600, 32)])
def test_columns_at_one_temperature_in_tiles_clusters_and_the_grid(n, bytes_of_line, dtype):
    rng = np.random.default_rng(n)
    count = bytes_of_line // np.dtype(dtype).itemsize
    x = rng.choice(rng.normal(scale=3.0, size=60), size=(n, count)).astype(dtype)
    result = on_gpu(fastmax.softmax)(x, 0.7, axis=0)
    for i in {0, 1, count - 1}:
        oracle.assert_close("softmax", result[:, i], x[:, i], 0.7)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", [40, 100])
def test_columns_of_other_dtypes_in_tiles(n, dtype):
    check("softmax", n, 0, dtype, count=40)
    check("entropy", n, 0, dtype, count=40)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("out_start", [None, 0, 1])
@pytest.mark.parametrize("n", [5, 21, 67, 515, *nightly(700, 1100)])
def test_rows_that_begin_anywhere(n, out_start, start):
    """Entries before and behind x are no part of it, and those around the result stay as they are."""
    x = np.random.default_rng(n).normal(scale=3.0, size=(3, n)).astype(np.float32)
    memory = np.full(start + x.size + 2, np.nan, np.float32)
    memory[start : start + x.size] = x.ravel()
    inside = Array.like(memory)
    view = Array(inside.memory[start : start + x.size].reshape(x.shape))
    if out_start is None:
        result = cuda.softmax(view, 0.7, axis=1).memory
    else:
        around = Array.like(np.full(out_start + x.size + 3, 7.0, np.float32))
        result = around.memory[out_start : out_start + x.size].reshape(x.shape)
        cuda.softmax(view, 0.7, axis=1, out=Array(result))
        assert (around.memory[:out_start] == 7.0).all()
        assert (around.memory[out_start + x.size :] == 7.0).all()
    for i in range(3):
        oracle.assert_close("softmax", result[i], x[i], 0.7)
    assert np.array_equal(inside.memory, memory, equal_nan=True)


@pytest.mark.parametrize("n", [511, 512, 513])
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
def test_strided_slices_for_warps_and_blocks(name, n):
    x = np.random.default_rng(n).normal(size=(2, n, 2)).astype(np.float32)
    result = on_gpu(getattr(fastmax, name))(x[:, :, 0], axis=1)
    for i in range(2):
        oracle.assert_close(name, result[i], x[i, :, 0])


@pytest.mark.parametrize(
    ("name", "n", "x"),
    [("softmax", 3900, -10.7578125), ("logsumexp", 3570, -10.953125)],
)
def test_long_sums_of_a_thread_show_nothing_in_16_bits(monkeypatch, name, n, x):
    """Where a thread has all entries of a strided column: they lost 0.4 and 0.09 ulp."""
    class_ = _cuda_plan.STRIDED_COLUMN._replace(threads=1, members=1)
    monkeypatch.setattr(_cuda_plan, "STRIDED_COLUMN", class_)
    wide = np.full((n, 3), x, np.float16)
    wide[0] = 0.0
    found = getattr(cuda, name)(Array(Array.like(wide).memory[:, :2]), axis=0).memory
    found = found[..., 0]
    errors = oracle.errors(name, found, oracle.expect(wide[:, 0]))
    assert errors.max() <= 0.01 * 2**13  # ulp of float32


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(("shape", "name"), [((3, 1100), "softmax"), ((10, 100), "entropy")])
def test_one_temperature_on_the_gpu_serves_all_slices(shape, name):
    x = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    found = getattr(cuda, name)(Array.like(x), Array.like(np.array([0.7])), axis=1).memory
    for i in (0, shape[0] - 1):
        oracle.assert_close(name, found[i], x[i], 0.7)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("n", "dtype"),
    [(700, np.float32), *nightly((3000, ml_dtypes.bfloat16), (1500, np.float32), (3000, np.float32))],
)
def test_parts_of_a_team_may_be_unlike_each_other(n, dtype):
    """In a tile of one block, in a cluster and in blocks of the grid."""
    assert not wrong_beside_unlike_parts(on_gpu(fastmax.softmax), n, dtype)


def test_faint_terms_beside_a_maximum_of_zero():
    """T log(sum) shows though the sum is 1 to float32."""
    x = np.array([0.0, -1e35, -1.2e35], np.float32)
    for layout in (rows, columns):
        result = layout(on_gpu(fastmax.logsumexp), x, np.array([1e33]))(0)
        oracle.assert_close("logsumexp", result, x, 1e33)


def test_the_bits_of_a_slice_do_not_depend_on_the_batch():
    x = np.random.default_rng(3).normal(size=(40, 70)).astype(np.float32)
    many, one = (on_gpu(fastmax.softmax)(part, 0.3, axis=1) for part in (x, x[:1].copy()))
    assert np.array_equal(many[:1], one)


# --- arguments -------------------------------------------------------------------------------------


def test_temperatures_on_the_gpu_are_not_read_back():
    x = np.tile(np.array([1.0, 2.0, 4.0], np.float32), (6, 1))
    temperatures = np.array([-1.0, np.nan, 0.0, 1.0, np.inf, -0.0])
    for name in oracle.FUNCTIONS:
        for dtype in (np.float64, np.float32):
            found = getattr(cuda, name)(Array.like(x), Array.like(temperatures.astype(dtype)), axis=1).memory
            assert np.isnan(found[:2]).all()
            for i in range(2, 6):
                oracle.assert_close(name, found[i], x[i], abs(temperatures[i]))


def test_invalid_temperatures_spoil_single_entries_and_infinities_as_well():
    for x in ([3.0], [np.inf, 0.0], [-np.inf, -np.inf]):
        for name in oracle.FUNCTIONS:
            found = getattr(cuda, name)(
                Array.like(np.array([x], np.float32)), Array.like(np.array([-1.0])), axis=1
            )
            assert np.isnan(found.memory).all()


def test_results_are_of_the_kind_of_x_and_keep_its_layout():
    x = Array.like(np.ones((3, 4), np.float32, order="F"))
    result = cuda.softmax(x, axis=0)
    assert isinstance(result, Array)
    assert result.memory.flags.f_contiguous
    turned = Array.like(np.ones((3, 4, 2), np.float32).transpose(2, 0, 1))
    assert cuda.softmax(turned, axis=1).memory.strides == turned.memory.strides
    assert cuda.logsumexp(x, axis=0, keepdims=True).memory.shape == (1, 4)
    assert cuda.evaluate("entropy", x, 1.0, None, None, None).memory.shape == ()


def test_out_is_returned():
    x = Array.like(np.ones((3, 4), np.float32))
    out = Array.like(np.zeros((3, 1), np.float32))
    assert cuda.logsumexp(x, axis=1, keepdims=True, out=out) is out
    oracle.assert_close("logsumexp", out.memory[2, 0], x.memory[2])


@pytest.mark.parametrize("name", oracle.FUNCTIONS)
def test_slices_without_entries(name):
    x = Array.like(np.ones((2, 0), np.float32))
    expected = getattr(fastmax, name)(np.ones((2, 0), np.float32), axis=1)
    assert np.array_equal(getattr(cuda, name)(x, axis=1).memory, expected)


class ReadOnly(Array):
    @property
    def __cuda_array_interface__(self):
        return {**super().__cuda_array_interface__, "data": (self.address, True)}


@pytest.mark.parametrize(
    "make", [lambda m: m[::-1, ::2], lambda m: m.T[:3, :4], lambda m: m.diagonal()[:, None]]
)
def test_out_may_be_any_view_without_overlap(make):
    memory = Array.like(np.ones((12, 12), np.float32)).memory
    out = make(memory)[:3, :4]
    x = np.random.default_rng(2).normal(size=out.shape).astype(np.float32)
    cuda.softmax(ReadOnly(Array.like(x).memory), axis=1, out=Array(out))
    oracle.assert_close("softmax", out[1], x[1])


def test_wrong_arguments_are_refused():
    x = Array.like(np.ones((3, 4), np.float32))
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64, got dtype int64"):
        fastmax.softmax(Array.like(np.ones(3, np.int64)))
    with pytest.raises(TypeError, match="x must be an array on the GPU, got ndarray"):
        cuda.softmax(np.ones(3))
    with pytest.raises(TypeError, match="where must be an array on the GPU, got ndarray"):
        fastmax.softmax(x, where=np.ones((3, 4), bool))
    with pytest.raises(TypeError, match="where must be boolean, got dtype float32"):
        fastmax.softmax(x, where=x)
    with pytest.raises(ValueError, match=r"where of shape \(5,\) does not broadcast"):
        fastmax.softmax(x, where=Array.like(np.ones(5, bool)))
    with pytest.raises(ValueError, match=r"temperature must be in \[0, inf\], got -1.0"):
        fastmax.softmax(x, -1.0)
    with pytest.raises(ValueError, match="out must have the shape"):
        fastmax.softmax(x, out=Array.like(np.ones((4, 3), np.float32)))
    with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
        fastmax.softmax(x, out=ReadOnly(np.copy(x.memory)))
    row = Array.like(np.ones((3, 6), np.float32)).memory
    windows = np.lib.stride_tricks.sliding_window_view(row[0], 4)
    for out in (np.broadcast_to(row[:1, :4], (3, 4)), windows):
        with pytest.raises(ValueError, match="out must have each entry in a place of its own, got strides"):
            fastmax.softmax(x, out=Array(out))
    with pytest.raises(ValueError, match="overlaps x in part"):
        fastmax.softmax(Array(x.memory[:2]), out=Array(x.memory[1:]))
    with pytest.raises(ValueError, match="where must not share memory with out"):
        fastmax.softmax(x, where=Array(x.memory.view(bool).reshape(-1)[:12].reshape(3, 4)), out=x)
    with pytest.raises(np.exceptions.AxisError):
        fastmax.softmax(x, axis=2)


# --- the simulator itself -----------------------------------------------------------------------------


def test_simulator_refuses_what_a_gpu_would_let_pass():
    pointer = simulator.Pointer(simulator.allocate(64), np.dtype(np.float32))
    with pytest.raises(IndexError, match="not allocated"):
        pointer.read(16, 1)
    with pytest.raises(ValueError, match="not aligned"):
        pointer.read(1, 4)
