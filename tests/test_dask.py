"""Dask arrays: lazy, chunk by chunk, with the values of one call in memory."""

import os
import signal
import time
from typing import Any

import numpy as np
import oracle
import pytest
from conformance import cases
from marks import nightly

import fastmax

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")

every = pytest.mark.parametrize("name", oracle.FUNCTIONS)
X = np.random.default_rng(0).normal(scale=5.0, size=(60, 70))
CHUNKS = (20, 30)


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads", num_workers=4):
        yield


def draw(*shape, scale=1.0):
    """Entries that are the same whatever tests ran before."""
    return np.random.default_rng(shape).normal(scale=scale, size=shape)


def ulps(a, b, least=0.0):
    """Return the largest distance of two arrays, in ulp of the larger of two entries, or of ``least``."""
    a, b = np.asarray(a), np.asarray(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        distance = np.abs(a.astype(float) - b) / np.spacing(
            np.maximum(np.maximum(np.abs(a), np.abs(b)), a.dtype.type(least))
        )
    return np.where(same, 0.0, distance).max(initial=0.0)


def check(name, x, chunks, temperature: Any = 1.0, relaid=None, **keywords):
    """Compare with the call in memory, of which dask's arguments are as good as NumPy's.

    A function may lay the entries of each chunk in memory as they shall be found: dask copies x.
    """
    function = getattr(fastmax, name)
    lazy = da.from_array(x, chunks=chunks)
    if relaid is not None:
        lazy = lazy.map_blocks(relaid, dtype=x.dtype, meta=np.empty((0,) * x.ndim, x.dtype))
    result = function(lazy, temperature, **keywords)
    assert isinstance(result, da.Array)
    computed = np.asarray(result.compute())
    plain = {key: np.asarray(value) if key == "where" else value for key, value in keywords.items()}
    expected = np.asarray(function(x, np.asarray(temperature), **plain))
    assert result.shape == computed.shape == expected.shape
    assert result.dtype == computed.dtype == expected.dtype
    least: Any = 0.0
    if name == "entropy":  # its errors are relative to the largest there is
        least = np.log(max(x.size / max(expected.size, 1), 1))
    elif name == "logsumexp":  # and these to the maximum, where that and T log(sum) cancel
        least = np.abs(function(x, np.zeros_like(temperature, float), **plain))
    assert ulps(computed, expected, least) <= 2


@every
@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float64, 7), *nightly((np.float64, 1), (np.float32, 1), (np.float32, 7))]
)
def test_chunked_slices_have_the_exact_values(name, dtype, size):
    """Every case of the conformance suite, in chunks of one and of some entries."""
    found = []
    for description, x, temperature, expected in cases(dtype):
        if size < len(x) <= (45 if size == 1 else 1000):  # longer ones are cut alike for both
            chunks = size if len(x) <= 45 else len(x) // 7
            result = getattr(fastmax, name)(da.from_array(x, chunks=chunks), temperature)
            fault = oracle.fault(name, result.compute(scheduler="sync"), expected)
            if fault:
                found.append(f"{description}: {fault}")
    assert found == []


@every
@pytest.mark.parametrize("axis", [0, 1, -1, -2, None, (0, 1), (-1, 0)])
def test_axes(name, axis):
    check(name, X, CHUNKS, 0.7, axis=axis)


@every
def test_axes_of_three(name):
    x = draw(6, 7, 8)
    for axis in (0, 1, 2, (0, 2), (-1, -2), ()):
        check(name, x, (3, 4, 3), 0.7, axis=axis)


LAYOUTS = {
    "cut out": lambda x: np.pad(x, 1)[1:-1, 1:-1, 1:-1],
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "axes of memory in another order": lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(
        2, 0, 1
    ),
    "cut out of other axes": lambda x: np.pad(x.transpose(0, 2, 1), 1)[1:-1, 1:-1, 1:-1].transpose(0, 2, 1),
    "backwards": lambda x: np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=2)[..., ::2],
    "repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "not aligned": lambda x: np.frombuffer(b"0" + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape),
}


@pytest.mark.parametrize("name", ["softmax", *nightly("log_softmax", "logsumexp", "entropy")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_chunks(name, layout):
    relaid = LAYOUTS[layout]
    x = relaid(draw(6, 7, 40, scale=3.0)).copy()
    for axis in 0, 1, 2, (0, 1), (0, 2):
        check(name, x, (3, 4, 20), 0.7, relaid, axis=axis)
    check(name, x, (3, 4, 20), np.abs(draw(6, 40)), relaid, axis=1, where=x < 3.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_cut_out_of_an_array_is_not_copied(axis):
    from fastmax import _dask

    x = np.moveaxis(X[5:40, 10:50], axis, -1)
    chunk = _dask._Chunk(x, None, 1, x.shape[:1])
    assert np.shares_memory(chunk.x, X)
    assert not chunk.is_copy


def test_no_term_of_minus_inf_is_multiplied_by_a_large_temperature():
    x = np.full(8, -np.inf, np.float32)
    x[1] = 0.0
    for chunks in 2, 4, 8:
        assert fastmax.logsumexp(da.from_array(x, chunks=chunks), 1e30).compute() == 0.0


@every
def test_temperatures(name):
    per_column, sweep = np.abs(draw(70)), np.array([[0.0], [0.5], [np.inf]])
    check(name, X, CHUNKS, per_column)
    check(name, X, CHUNKS, da.from_array(per_column, chunks=25))
    check(name, X, CHUNKS, sweep, axis=1)
    check(name, X, CHUNKS, sweep, axis=-2)
    check(name, X, (60, 70), da.from_array(sweep, chunks=1), axis=-1)
    x = np.asfortranarray(X)  # columns are contiguous, and in chunks, too
    result = getattr(fastmax, name)(x, da.from_array(per_column, chunks=25))
    assert isinstance(result, da.Array)
    assert ulps(result.compute(), getattr(fastmax, name)(x, per_column)) == 0


@every
def test_masks(name):
    mask = X > 0
    mask[:, 3] = mask[4] = False
    mask[20:40, 5] = False  # a chunk in which nothing is left
    check(name, X, CHUNKS, where=mask)
    check(name, X, CHUNKS, where=da.from_array(mask, chunks=(9, 70)))
    check(name, X, CHUNKS, where=mask[:1])


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.float32, ">f8", *nightly(np.float16)])
def test_dtypes(dtype):
    check("softmax", X.astype(dtype), CHUNKS)


@every
def test_empty_arrays_and_chunks(name):
    check(name, np.zeros((0, 3)), (1, 2))
    check(name, np.zeros((3, 0)), (2, 1))
    check(name, X[:5], ((2, 0, 3), (70,)))
    for chunks in ((0, 2, 3), (70,)), ((5,), (0, 70, 0)), ((2, 3, 0), (0, 40, 30)):
        for axis in (0, 1, None):
            check(name, X[:5], chunks, axis=axis)
    lazy = da.from_array(X[0], chunks=7)
    least = np.sort(X[0])[-5]
    chosen: Any = getattr(fastmax, name)(lazy[lazy >= least])  # most chunks have none
    assert ulps(chosen.compute(), getattr(fastmax, name)(X[0][X[0] >= least])) <= 2


@every
@pytest.mark.parametrize("axis", [0, 1, None])
def test_one_slice_beside_empty_chunks(name, axis):
    """As a filter leaves it: axes of one entry were taken for such as are repeated."""
    function: Any = getattr(fastmax, name)
    lazy = da.from_array(X[:4], chunks=(1, 40))
    chosen = lazy[:, 0] == X[2, 0]
    lazy, mask = (array[chosen].compute_chunk_sizes() for array in (lazy, lazy > 0.0))
    assert lazy.numblocks[0] == 4
    for where in (None, mask):
        result = function(lazy, axis=axis, where=where).compute()
        expected = function(X[2:3], axis=axis, where=None if where is None else X[2:3] > 0.0)
        assert result.shape == expected.shape
        assert ulps(result, expected) <= 2


@pytest.mark.parametrize("name", ["logsumexp", "entropy"])
def test_axes_that_are_kept(name):
    check(name, X, CHUNKS, axis=1, keepdims=True)
    check(name, X, CHUNKS, axis=None, keepdims=True)


def test_terms_that_vanish_beside_the_maximum():
    """T log(1 + exp(-800)) + 0 in three chunks, at T = 1e300."""
    x = np.array([0.0, -8e302, -8.1e302])
    for chunks in (1, 2):
        check("logsumexp", x, chunks, 1e300)


def test_nothing_is_computed_early_and_the_batch_keeps_its_chunks():
    computed = []

    def note(block):
        computed.append(block.shape)
        return block

    x = da.from_array(X, chunks=CHUNKS).map_blocks(note, dtype=X.dtype, meta=np.empty((0, 0)))
    results: Any = [fastmax.softmax(x, axis=axis) for axis in (0, 1)]
    values: Any = fastmax.entropy(x)
    assert computed == []
    assert [result.chunks for result in results] == [x.chunks, x.chunks]
    assert values.chunks == x.chunks[1:]


def test_many_chunks_are_merged_in_a_tree():
    x = da.ones(256, chunks=1)
    value: Any = fastmax.logsumexp(x)
    (optimized,) = dask.optimize(value)
    assert max(len(task.dependencies) for task in dict(optimized.dask).values()) <= 64
    assert value.compute() == pytest.approx(1 + np.log(256))


def test_errors():
    x = da.from_array(X, chunks=CHUNKS)
    with pytest.raises(TypeError, match="out must be None"):
        fastmax.softmax(x, out=np.empty_like(X))
    with pytest.raises(ValueError, match=r"temperature must be in \[0, inf\], got -1.0"):
        fastmax.softmax(x, -1.0)
    with pytest.raises(ValueError, match=r"temperature must be in \[0, inf\], got -1.0"):
        np.asarray(fastmax.softmax(x, da.from_array(np.full(70, -1.0))))
    with pytest.raises(TypeError, match="got dtype complex128"):
        fastmax.softmax(x * 1j)
    with pytest.raises(TypeError, match="where must be boolean"):
        fastmax.softmax(x, where=da.ones(70))
    with pytest.raises(ValueError, match="does not broadcast"):
        fastmax.softmax(x, np.ones(3))
    with pytest.raises(np.exceptions.AxisError):
        fastmax.softmax(x, axis=2)


def slow(block):
    time.sleep(0.05)
    return block


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing kills so hard here")
def test_a_worker_is_killed_in_the_middle():
    distributed = pytest.importorskip("distributed")
    x = draw(40, 3000)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "60s"}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        lazy = da.from_array(x, chunks=(10, 300)).map_blocks(slow, dtype=x.dtype, meta=np.empty((0, 0)))
        futures = [client.compute(getattr(fastmax, name)(lazy, 0.7, axis=1)) for name in oracle.FUNCTIONS]
        victim = next(iter(client.run(os.getpid).values()))
        time.sleep(0.5)
        assert not all(future.done() for future in futures)
        os.kill(victim, signal.SIGKILL)
        for name, future in zip(oracle.FUNCTIONS, futures, strict=True):
            assert ulps(future.result(timeout=300), getattr(fastmax, name)(x, 0.7, axis=1)) <= 2


# --- sizes that dask does not know -------------------------------------------------------------------


def unknown():
    """Rows of an array that only the computation can choose, and the same rows in memory."""
    x = np.random.default_rng(0).normal(size=(100, 70))
    lazy = da.from_array(x, chunks=(30, 35))
    return lazy[lazy[:, 0] > 0], x[x[:, 0] > 0]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "entropy"])
def test_unknown_number_of_slices(name):
    function = getattr(fastmax, name)
    lazy, x = unknown()
    for temperature, lazy_temperature in [
        (0.5, 0.5),
        (abs(x[:, 1]), abs(lazy[:, 1])),
        (np.array([0.5]), np.array([0.5])),
        (np.array([[0.5], [2.0]]), np.array([[0.5], [2.0]])),
    ]:
        found = function(lazy, lazy_temperature, axis=-1).compute()
        np.testing.assert_allclose(found, function(x, temperature, axis=-1), rtol=1e-14)
    found = function(lazy, axis=-1, where=lazy > 0).compute()
    np.testing.assert_allclose(found, function(x, axis=-1, where=x > 0), rtol=1e-14)


def test_unknown_sizes_beside_known_ones_are_refused():
    lazy, x = unknown()
    with pytest.raises(ValueError, match=r"where of shape .* compute_chunk_sizes"):
        fastmax.softmax(lazy, axis=-1, where=x > 0)
    with pytest.raises(ValueError, match=r"temperature of shape .* compute_chunk_sizes"):
        fastmax.softmax(lazy, abs(x[:, 0]), axis=-1)


def test_masked_arguments_are_refused():
    x = da.ones((4, 6), chunks=2)
    masked = da.ma.masked_array(x > 0, x > 2)
    with pytest.raises(TypeError, match=r"x must not be a masked array; pass .* with where="):
        fastmax.softmax(da.ma.masked_array(x, x > 2))
    with pytest.raises(TypeError, match="where must not be a masked array"):
        fastmax.softmax(x, where=masked)
    with pytest.raises(TypeError, match="temperature must not be a masked array"):
        fastmax.softmax(x, da.ma.masked_array(x[0], x[0] > 2))


@every
@pytest.mark.parametrize("chunks", [(4, 3), (2, 3)], ids=["whole", "split"])
def test_nothing_is_left_along_an_axis_of_unknown_size(name, chunks):
    function, x = getattr(fastmax, name), da.from_array(np.zeros((4, 3)), chunks=chunks)
    found = function(x[x[:, 0] > 1], axis=0).compute()
    np.testing.assert_array_equal(found, function(np.empty((0, 3)), axis=0))


def test_arguments_of_objects_are_named():
    with pytest.raises(TypeError, match="x must be of numbers, got dtype object"):
        fastmax.softmax([None, 1.0], da.ones(()))
    with pytest.raises(TypeError, match="where must be of numbers, got dtype object"):
        fastmax.softmax(da.ones(3), where=[None, True, False])
    with pytest.raises(ValueError, match="where must make an array"):
        fastmax.softmax(da.ones(3), where=[[True], [True, False]])


@pytest.mark.parametrize("name", ["softmax", "logsumexp"])
def test_same_work_has_the_same_name(name):
    x = da.ones((4, 6), chunks=2)
    assert getattr(fastmax, name)(x).name == getattr(fastmax, name)(x).name


@every
@pytest.mark.parametrize("chunks", [(2, 6), (2, 2)], ids=["whole", "split"])
def test_other_work_has_another_name(name, chunks):
    """All in one graph: were a name shared, one result would stand for others."""
    function = getattr(fastmax, name)
    first, second = np.random.default_rng(3).normal(size=(2, 4, 6))
    mask = first > 0
    calls = [
        (first, {}),
        (second, {}),
        (first, {"temperature": 0.5}),
        (first, {"temperature": np.array([0.0, 1.0, 2.0, np.inf])}),
        (first, {"where": mask}),
        (first, {"where": ~mask}),
        (first, {"axis": 0}),
    ]
    results = [function(da.from_array(x, chunks=chunks), **{"axis": 1, **keywords}) for x, keywords in calls]
    assert len({result.name for result in results}) == len(calls)
    for result, (x, keywords) in zip(dask.compute(*results), calls, strict=True):
        np.testing.assert_allclose(result, function(x, **{"axis": 1, **keywords}), rtol=1e-14)


@pytest.mark.parametrize("chunks", [(2, 6), (2, 2)], ids=["whole", "split"])
def test_results_may_be_used_again(chunks):
    x = np.random.default_rng(4).normal(size=(4, 6))
    lazy = fastmax.softmax(fastmax.softmax(da.from_array(x, chunks=chunks), axis=1), axis=1)
    np.testing.assert_allclose(lazy, fastmax.softmax(fastmax.softmax(x, axis=1), axis=1), rtol=1e-14)
