"""Columns with few neighbours, which are taken as interleaved ones, as slices that lie apart, or as columns.

Each column has the bits that it has among so many neighbours that those fill vectors.
"""

import functools

import numpy as np
import pytest
from marks import nightly
from memory import peak_of

import fastmax
from fastmax import _cpu, _interleaved
from fastmax._lanes import LANE_BYTES
from fastmax._slice import CHUNK

ENTRIES = np.random.default_rng(28).normal(scale=3.0, size=400_000)
FUNCTIONS = [fastmax.softmax, fastmax.log_softmax, fastmax.logsumexp, fastmax.entropy]
LANES = {dtype: LANE_BYTES // max(np.dtype(dtype).itemsize, 4) for dtype in ("float16", "float32", "float64")}
MOST = {dtype: 3 * lanes // 4 for dtype, lanes in LANES.items()}


def shapes_of(dtype):
    """Return shapes, on both sides of each threshold, and the schedules for them on one thread."""
    lanes, most = LANES[dtype], MOST[dtype]
    n, run = _cpu.TILE_BYTES // LANE_BYTES // 8, _interleaved.RUN // 2
    most_of_chunks = min(most, 2 * _cpu.TILE_BYTES // LANE_BYTES // CHUNK)
    return {
        "fewer entries than a piece has": ((lanes, 1, 2), "interleaved"),
        "one entry": ((2 * lanes + 1, 1, 3), "interleaved"),
        "outer indices for half the lanes": ((lanes // 2, 60, 3), "columns_apart"),
        "for more": ((lanes // 2 + 1, 60, 3), "interleaved"),
        "for all": ((lanes, 60, 3), "interleaved"),
        "for one more": ((lanes + 1, 60, 3), "interleaved"),
        "on several threads": ((325, 100, 3), "interleaved"),
        "a run that is copied at once": ((lanes, run, 2), "interleaved"),
        "one that is not": ((lanes, run + 1, 2), "interleaved"),
        "the last part of one is shorter than a piece": ((lanes, 43, 3), "interleaved"),
        "a chunk and one": ((lanes, CHUNK + 1, 2), "interleaved"),
        "a tile": ((2 * lanes - 3, n, 8), "interleaved"),
        "more than a tile": ((2 * lanes - 3, n + 1, 8), "columns_apart" if 32 <= lanes else "columns"),
        "most neighbours": ((lanes, 9, most), "interleaved"),
        "one more neighbour": ((lanes, 9, most + 1), "shallow_columns"),
        "most for three quarters of the lanes": ((3 * lanes // 4, 9, most), "shallow_columns"),
        "most for more": ((3 * lanes // 4 + 1, 9, most), "interleaved"),
        "few columns": ((1, 1100, lanes // 4), "columns_apart"),
        "of fewer than a thousand entries": ((1, 341, 3), "columns"),
        "one more few column": ((1, 1100, lanes // 4 + 1), "columns"),
        "fewer chunks than lanes": ((1, CHUNK * lanes - 1, 3), "columns_apart"),
        "as many chunks": ((1, CHUNK * lanes, 3), "interleaved_chunks"),
        "an entry more": ((2, CHUNK * lanes + 1, 3), "interleaved_chunks"),
        "several tiles": ((1, 5 * CHUNK * lanes + 100, 2), "interleaved_chunks"),
        "most neighbours of chunks": ((1, CHUNK * lanes + 200, most_of_chunks), "interleaved_chunks"),
        "one more neighbour of chunks": ((1, CHUNK * lanes + 200, most_of_chunks + 1), "tall_columns"),
    }


SHAPE = pytest.mark.parametrize("shape", list(shapes_of("float32")))
DTYPE = pytest.mark.parametrize("dtype", ["float32", *nightly("float16", "float64")])


def among_many(array, dtype):
    """Return copies of columns side by side, enough to fill vectors."""
    return np.tile(array, -(-4 * LANES[dtype] // array.shape[-1]))


def check(function, x, temperature, where=None):
    many = functools.partial(among_many, dtype=x.dtype.name)
    expected = function(
        many(x),
        many(temperature) if np.ndim(temperature) else temperature,
        axis=1,
        where=None if where is None else many(where),
    )
    result = function(x, temperature, axis=1, where=where)
    np.testing.assert_array_equal(result, expected[..., : x.shape[-1]], strict=True)


@DTYPE
@SHAPE
@pytest.mark.parametrize("function", [*FUNCTIONS[::2], *nightly(*FUNCTIONS[1::2])])
def test_few_columns_have_the_bits_of_many(function, shape, dtype):
    x = np.resize(ENTRIES.astype(dtype), shapes_of(dtype)[shape][0])
    check(function, x, 0.7)
    x[0, 0, 0], x[-1, -1, -1], x[-1, 0, 1] = np.inf, np.nan, -np.inf
    check(function, x, 0.7)


@DTYPE
@SHAPE
@pytest.mark.parametrize("function", [FUNCTIONS[0], *nightly(*FUNCTIONS[1:])])
def test_masked_ones_have_too(function, shape, dtype):
    x = np.resize(ENTRIES.astype(dtype), shapes_of(dtype)[shape][0])
    where = np.resize([True, False, True, True, True], x.shape)
    x[~where] = np.nan
    where[-1, :, -1] = False
    check(function, x, 0.7, where)


@DTYPE
@SHAPE
@pytest.mark.parametrize("function", [FUNCTIONS[0], *nightly(*FUNCTIONS[1:])])
def test_each_has_its_own_temperature(function, shape, dtype):
    x = np.resize(ENTRIES.astype(dtype), shapes_of(dtype)[shape][0])
    for temperatures in [0.5, 2.0, 0.7, 1.0, 3.0], [0.5, 0.0, np.inf, 2.0, 1e-300, 1.0, 1e300]:
        check(function, x, np.resize(temperatures, (x.shape[0], x.shape[2])))


def test_temperatures_are_those_of_slices():
    x = np.resize(ENTRIES, (40, 30, 3))
    temperature = np.resize([0.5, 0.0, np.inf, 2.0, 1e-300], (40, 3))
    result = fastmax.softmax(x, temperature, axis=1)
    for i, j in (0, 0), (0, 2), (13, 1), (39, 2):
        expected = fastmax.softmax(x[i, :, j], temperature[i, j])
        np.testing.assert_array_equal(result[i, :, j], expected)


@pytest.mark.parametrize("shape", ["for one more", "as many chunks", "outer indices for half the lanes"])
def test_terms_too_faint_for_the_sum_are_found_where_they_lie(shape):
    """The maximum is 0, others are so small that only T times their sum shows: each column has its own."""
    x = np.full(shapes_of("float32")[shape][0], -9e31, np.float32)
    outer, n, inner = x.shape
    for i, k in np.ndindex(outer, inner):
        x[i, (i + k) % n, k] = 0
        x[i, (i + k + 1) % n, k] = -8e31 - 1e29 * (i + 2 * k)
    exact = 1e30 * np.where(x < 0, np.exp(x.astype(float) / 1e30), 0).sum(axis=1)
    for mask in None, np.ones(x.shape, bool):
        result = fastmax.logsumexp(x, 1e30, axis=1, where=mask)
        np.testing.assert_allclose(result, exact, rtol=1e-6)


@SHAPE
@pytest.mark.parametrize("function", [FUNCTIONS[0], *nightly(FUNCTIONS[1])])
def test_results_in_place_are_the_same(function, shape):
    x = np.resize(ENTRIES.astype(np.float32), shapes_of("float32")[shape][0])
    where = np.resize([True, False, True, True, True], x.shape)
    for mask in None, where:
        own, expected = x.copy(), function(x, 0.7, axis=1, where=mask)
        assert function(own, 0.7, axis=1, out=own, where=mask) is own
        np.testing.assert_array_equal(own, expected)


def cut_out(case):
    """Return columns whose runs do not follow one another, or that have none, and their schedule."""
    if case == "every other outer index":
        return np.resize(ENTRIES, (200, 80, 8))[::2], "interleaved"
    if case == "every other outer index of few":
        return np.resize(ENTRIES, (8, CHUNK * LANES["float64"] + 7, 2))[::2], "interleaved_chunks"
    if case == "runs that overlap":
        windows = np.lib.stride_tricks.sliding_window_view(np.resize(ENTRIES, (2000, 3)), 40, axis=0)
        return windows.transpose(0, 2, 1), "interleaved"
    return np.resize(ENTRIES, (200, 80, 8))[..., :3], "columns_apart"


@pytest.mark.parametrize("function", FUNCTIONS[::2])
@pytest.mark.parametrize(
    "case",
    ["every other outer index", "every other outer index of few", "runs that overlap", "some neighbours"],
)
def test_columns_that_are_cut_out_have_the_same_bits(function, case, monkeypatch):
    x, schedule = cut_out(case)
    expected, seen = function(x.copy(), 0.7, axis=1), []

    def note(name, run, *arguments):
        seen.append(name)
        run(*arguments)

    for operation in "_SOFTMAX", "_VALUES":
        own = getattr(_cpu, operation)
        spies = [functools.partial(note, name, run) for name, run in own._asdict().items()]
        monkeypatch.setattr(_cpu, operation, _cpu.Schedules(*spies))
    np.testing.assert_array_equal(function(x, 0.7, axis=1), expected)
    assert set(seen) == {schedule}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@SHAPE
def test_each_schedule_is_taken(shape, dtype):
    """Or the shapes would show nothing."""
    size, schedule = shapes_of(dtype)[shape]
    taken, _, _ = _cpu._choice(size, True, np.dtype(dtype).itemsize, 1, 1)
    assert taken == schedule


def test_each_thread_has_work():
    """Else columns are cut into more tasks, or fewer threads take them."""
    lanes = LANES["float32"]
    few, more = (1, 4 * CHUNK * lanes, 3), (1, 4 * CHUNK * lanes, lanes // 4 + 1)
    assert _cpu._choice((lanes + 1, 2000, 2), True, 4, 1, 8)[::2] == ("interleaved", 2)
    assert _cpu._choice(few, True, 4, 1, 8)[0] == "interleaved_chunks"
    assert _cpu._choice(more, True, 4, 1, 4)[0] == "interleaved_chunks"
    assert _cpu._choice(more, True, 4, 1, 5)[0] == "tall_columns"


@pytest.mark.parametrize("shape", [(8_000_000, 3), (400_000, 30, 2)])
def test_memory_beside_the_result(shape):
    x = np.resize(ENTRIES.astype(np.float32), shape)
    out = np.empty_like(x)
    assert peak_of(lambda: fastmax.softmax(x, axis=-2, out=out)) < 0.1 * x.nbytes
