"""Columns with few neighbours, which are taken as interleaved ones, as slices that lie apart, or as columns.

Each column has the bits that it has among so many neighbours that those fill vectors.
"""

import functools

import numpy as np
import pytest
from marks import nightly
from test_apart import peak_of

import fastmax
from fastmax import _cpu, _interleaved
from fastmax._lanes import LANE_BYTES
from fastmax._slice import CHUNK

ENTRIES = np.random.default_rng(28).normal(scale=3.0, size=400_000)
FUNCTIONS = [fastmax.softmax, fastmax.log_softmax, fastmax.logsumexp, fastmax.entropy]
LANES = {dtype: LANE_BYTES // max(np.dtype(dtype).itemsize, 4) for dtype in ("float16", "float32", "float64")}
MOST = {dtype: 3 * lanes // 4 for dtype, lanes in LANES.items()}


def shapes_of(dtype):
    """Return shapes, those next to each other on both sides of a threshold."""
    lanes, most = LANES[dtype], MOST[dtype]
    n = _cpu.TILE_BYTES // LANE_BYTES // 8
    most_of_chunks = min(most, 2 * _cpu.TILE_BYTES // LANE_BYTES // CHUNK)
    return {
        "fewer entries than a piece has": (lanes, 1, 2),
        "one entry": (2 * lanes + 1, 1, 3),
        "outer indices for half the lanes": (lanes // 2, 40, 3),
        "for more": (lanes // 2 + 1, 40, 3),
        "for all": (lanes, 40, 3),
        "for one more": (lanes + 1, 40, 3),
        "on several threads": (20 * lanes + 5, 41, 3),
        "a run that is copied at once": (lanes, _interleaved.RUN // 2, 2),
        "one that is not": (lanes, _interleaved.RUN // 2 + 1, 2),
        "a chunk and one": (lanes, CHUNK + 1, 2),
        "most neighbours": (lanes, 9, most),
        "one more neighbour": (lanes, 9, most + 1),
        "a tile": (lanes + 3, n, 8),
        "more than a tile": (lanes + 3, n + 1, 8),
        "fewer chunks than lanes": (1, CHUNK * lanes - 1, 3),
        "as many chunks": (1, CHUNK * lanes, 3),
        "an entry more": (2, CHUNK * lanes + 1, 3),
        "several tiles": (1, 5 * CHUNK * lanes + 100, 2),
        "most neighbours of chunks": (1, CHUNK * lanes + 200, most_of_chunks),
        "one more neighbour of chunks": (1, CHUNK * lanes + 200, most_of_chunks + 1),
    }


BY_DAY = list(shapes_of("float32"))
SHAPE = pytest.mark.parametrize("shape", BY_DAY)
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
    x = np.resize(ENTRIES.astype(dtype), shapes_of(dtype)[shape])
    check(function, x, 0.7)
    x[0, 0, 0], x[-1, -1, -1], x[-1, 0, 1] = np.inf, np.nan, -np.inf
    check(function, x, 0.7)


@DTYPE
@SHAPE
@pytest.mark.parametrize("function", [FUNCTIONS[0], *nightly(*FUNCTIONS[1:])])
def test_masked_ones_have_too(function, shape, dtype):
    x = np.resize(ENTRIES.astype(dtype), shapes_of(dtype)[shape])
    where = np.resize([True, False, True, True, True], x.shape)
    x[~where] = np.nan
    where[-1, :, -1] = False
    check(function, x, 0.7, where)


@DTYPE
@SHAPE
@pytest.mark.parametrize("function", [FUNCTIONS[0], *nightly(*FUNCTIONS[1:])])
def test_each_has_its_own_temperature(function, shape, dtype):
    x = np.resize(ENTRIES.astype(dtype), shapes_of(dtype)[shape])
    outer, _, inner = x.shape
    check(function, x, np.resize([0.5, 0.0, np.inf, 2.0, 1e-300, 1.0, 1e300], (outer, inner)))


def test_temperatures_are_those_of_slices():
    x = np.resize(ENTRIES, (40, 30, 3))
    temperature = np.resize([0.5, 0.0, np.inf, 2.0, 1e-300], (40, 3))
    result = fastmax.softmax(x, temperature, axis=1)
    for i, j in (0, 0), (0, 2), (13, 1), (39, 2):
        expected = fastmax.softmax(x[i, :, j], temperature[i, j])
        np.testing.assert_array_equal(result[i, :, j], expected)


@SHAPE
@pytest.mark.parametrize("function", [FUNCTIONS[0], *nightly(FUNCTIONS[1])])
def test_results_in_place_are_the_same(function, shape):
    x = np.resize(ENTRIES.astype(np.float32), shapes_of("float32")[shape])
    expected = function(x, 0.7, axis=1)
    assert function(x, 0.7, axis=1, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_columns_that_are_cut_out_have_the_same_bits():
    """Their entries and those of neighbours are no runs."""
    x = np.resize(ENTRIES, (50, 40, 8))
    for cut in x[..., :3], x[:, ::2, :3], x[::2], x[:, ::-1]:
        expected = fastmax.softmax(cut.copy(), 0.7, axis=1)
        np.testing.assert_array_equal(fastmax.softmax(cut, 0.7, axis=1), expected)


def test_each_schedule_is_taken(monkeypatch):
    """Or the shapes above would show nothing about it."""
    seen = set()

    def spy(name):
        schedule = getattr(_cpu._SOFTMAX, name)

        def call(*arguments):
            seen.add(name)
            return schedule(*arguments)

        return call

    spies = _cpu.Schedules(*map(spy, _cpu.Schedules._fields))
    monkeypatch.setattr(_cpu, "_SOFTMAX", spies)
    taken = {}
    for name, shape in shapes_of("float32").items():
        seen.clear()
        fastmax.softmax(np.zeros(shape, np.float32), axis=1)
        (taken[name],) = seen
    assert taken["for more"] == taken["one entry"] == taken["a tile"] == "interleaved"
    assert taken["most neighbours"] == "interleaved"
    assert taken["one more neighbour"] == "shallow_columns"
    assert taken["outer indices for half the lanes"] == taken["fewer chunks than lanes"] == "few_columns"
    assert taken["as many chunks"] == taken["most neighbours of chunks"] == "interleaved_chunks"
    assert taken["one more neighbour of chunks"] == "tall_columns"


@pytest.mark.parametrize("shape", [(2_000_000, 3), (100_000, 30, 3)])
def test_memory_beside_the_result(shape):
    x = np.resize(ENTRIES.astype(np.float32), shape)
    out = np.empty_like(x)
    assert peak_of(lambda: fastmax.softmax(x, axis=-2, out=out)) < 0.1 * x.nbytes
