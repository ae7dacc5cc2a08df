"""Arrays that do not lie as kernels take them: rows that lie apart, entries that do, and any other strides.

Contiguous slices have the bits of rows of a packed array, all others those of its columns, whichever way a
call goes: read where they lie, side by side or one by one, or copied block by block.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from marks import nightly
from memory import peak_of

import fastmax
from fastmax import _api

ENTRIES = np.random.default_rng(27).normal(scale=3.0, size=400_000)
EVERY, OTHER, BACK = slice(None), slice(None, None, 2), slice(None, None, -1)
TEMPERATURES = [0.7, 0.0, np.inf]

# Shapes, what is cut out of them, and axes; small ones first.
LAYOUTS = {
    "rows": ((9, 40), (EVERY, slice(33)), 1),
    "every other row": ((20, 33), (OTHER,), 1),
    "rows from the last on": ((20, 33), (BACK,), 1),
    "columns": ((33, 40), (EVERY, slice(9)), 0),
    "every other column": ((33, 40), (EVERY, OTHER), 0),
    "entries apart": ((33, 40), (EVERY, OTHER), 1),
    "entries from the last on": ((9, 40), (EVERY, BACK), 1),
    "a middle axis": ((3, 7, 12), (EVERY, EVERY, slice(5)), 1),
    "one vector": ((66,), (OTHER,), 0),
    "one vector of two chunks": ((2048,), (OTHER,), 0),
    "one vector of three": ((3100,), (OTHER,), 0),
    "two tiles of a vector": ((2 * 2**14 + 6,), (OTHER,), 0),
    "more tiles than are kept": ((2 * 2**17 + 2,), (OTHER,), 0),
    "a few vectors": ((3, 40000), (EVERY, OTHER), 1),
    "rows of many": ((300, 120), (EVERY, slice(101)), 1),
    "columns of many": ((100, 330), (EVERY, slice(305)), 0),
    "entries apart of many": ((300, 220), (EVERY, OTHER), 1),
    "every other column of many": ((100, 610), (EVERY, OTHER), 0),
    "narrow rows of many": ((4000, 12), (EVERY, slice(10)), 1),
    "wide rows": ((20, 18000), (EVERY, slice(17001)), 1),
    "long rows": ((3, 70000), (EVERY, slice(66001)), 1),
    "every other row of many": ((600, 101), (OTHER,), 1),
    "rows of many from the last on": ((300, 101), (BACK,), 1),
    "shallow columns": ((9, 2100), (EVERY, slice(2050)), 0),
    "long columns": ((2100, 40), (EVERY, slice(33)), 0),
    "columns of many from the last on": ((100, 330), (BACK, slice(305)), 0),
    "a middle axis of many": ((40, 33, 40), (EVERY, EVERY, slice(33)), 1),
}
# Kernels that read rows where they lie are compiled for that: two are enough by day.
BY_DAY = list(LAYOUTS)[:16]
LAYOUT = pytest.mark.parametrize("layout", BY_DAY + nightly(*list(LAYOUTS)[16:]))
FUNCTION = pytest.mark.parametrize(
    "function", [fastmax.softmax, fastmax.logsumexp, *nightly(fastmax.log_softmax, fastmax.entropy)]
)


def cut(layout, dtype=np.float32):
    """Return an array that does not lie packed, and an axis."""
    shape, index, axis = LAYOUTS[layout]
    return np.resize(ENTRIES.astype(dtype), shape)[index], axis


def are_rows(x, axis):
    """Whether slices are contiguous."""
    return x.strides[axis] == x.itemsize


def pack(x, axis, as_rows):
    """Return a packed copy with slices as its rows, or twice as its columns."""
    if as_rows:
        return np.ascontiguousarray(np.moveaxis(x, axis, -1))
    columns = np.moveaxis(x, axis, 0)
    return np.stack([columns, columns], axis=-1)


def expect(function, x, temperature, axis, where=None):
    """Return the result of a packed array, with the axes of x."""
    as_rows = are_rows(x, axis)
    packed = pack(x, axis, as_rows)
    mask = None if where is None else pack(where, axis, as_rows)
    if as_rows:
        result = function(packed, temperature, axis=-1, where=mask)
    else:
        temperature = np.stack([temperature, temperature], axis=-1) if np.ndim(temperature) else temperature
        result = function(packed, temperature, axis=0, where=mask)[..., 0]
    return np.moveaxis(result, -1 if as_rows else 0, axis) if result.ndim == x.ndim else result


@FUNCTION
@LAYOUT
def test_bits_are_those_of_packed_slices(function, layout):
    x, axis = cut(layout)
    for temperature in TEMPERATURES:
        result = function(x, temperature, axis=axis)
        np.testing.assert_array_equal(result, expect(function, x, temperature, axis), strict=True)


@pytest.mark.parametrize("layout", BY_DAY)
def test_contiguous_slices_are_rows_and_others_columns(layout, monkeypatch):
    """Or are taken where they lie; compensated sums would hardly show another order."""
    x, axis = cut(layout)
    seen = []

    def spy(kernels):
        def call(entries, *arguments):
            apart = kernels.__module__ == "fastmax._apart"
            seen.append("apart" if apart else "rows" if entries.ndim == 2 else "columns")
            kernels(entries, *arguments)

        return call

    for kind in "schedule", "apart":
        monkeypatch.setattr(_api._SOFTMAX, kind, spy(getattr(_api._SOFTMAX, kind)))
    fastmax.softmax(x, axis=axis)
    fastmax.softmax(x, axis=axis, where=np.ones(x.shape, bool))
    assert seen
    assert set(seen) <= ({"rows"} if are_rows(x, axis) else {"columns", "apart"})


@pytest.mark.parametrize(
    "layout",
    ["entries apart", "rows", "one vector", *nightly("one vector of three", "entries apart of many")],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, *nightly(np.float16, np.float64)])
def test_other_dtypes(dtype, layout):
    x, axis = cut(layout, dtype)
    for function in fastmax.softmax, fastmax.logsumexp:
        np.testing.assert_array_equal(
            function(x, 0.7, axis=axis), expect(function, x, 0.7, axis), strict=True
        )


@pytest.mark.parametrize(
    "layout", ["rows", "entries apart", "rows of many", "entries apart of many", *nightly("a few vectors")]
)
def test_temperature_per_slice_and_mask(layout):
    x, axis = cut(layout)
    temperature = np.resize([0.5, 0.0, np.inf, 2.0], len(x))
    where = np.resize([True, False, True, True, False], x.shape)
    where[1] = False
    for function in fastmax.softmax, fastmax.logsumexp:
        for mask in None, where:
            result = function(x, temperature, axis=axis, where=mask)
            expected = expect(function, x, temperature, axis, mask)
            np.testing.assert_array_equal(result, expected, strict=True)


@pytest.mark.parametrize("layout", BY_DAY[:-2] + nightly(*BY_DAY[-2:]))
def test_in_place_changes_nothing_beside(layout):
    shape, index, axis = LAYOUTS[layout]
    array = np.resize(ENTRIES.astype(np.float32), shape)
    expected = array.copy()
    expected[index] = fastmax.softmax(array[index], axis=axis)
    x = array[index]
    assert fastmax.softmax(x, axis=axis, out=x) is x
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("function", [fastmax.softmax, *nightly(fastmax.logsumexp)])
@pytest.mark.parametrize(
    "layout",
    ["entries apart", "every other column", "columns", "one vector of three", *nightly("columns of many")],
)
def test_mask_that_lies_another_way(function, layout):
    x, axis = cut(layout)
    where = np.resize([True, False, True, True, False, True, True], x.shape)
    expected = function(x, 0.7, axis=axis, where=where)
    apart = np.zeros([3 * n for n in x.shape], bool)[(slice(None, None, -3),) * x.ndim]
    apart[...] = where
    np.testing.assert_array_equal(function(x, 0.7, axis=axis, where=apart), expected)
    same = np.broadcast_to(where[:1], x.shape)
    expected = function(x, 0.7, axis=axis, where=same.copy())
    np.testing.assert_array_equal(function(x, 0.7, axis=axis, where=same), expected)


@pytest.mark.parametrize("layout", ["rows", "entries apart", "one vector", "rows of many", "columns of many"])
def test_out_that_lies_apart(layout):
    x, axis = cut(layout)
    around = np.full([2 * n for n in x.shape], 7, x.dtype)
    expected, place = around.copy(), (OTHER,) * x.ndim
    expected[place] = fastmax.softmax(x, axis=axis)
    out = around[place]
    assert fastmax.softmax(x, axis=axis, out=out) is out
    np.testing.assert_array_equal(around, expected)


def test_rows_that_do_not_lie_at_multiples_of_their_entries():
    records = np.zeros(400, [("tag", np.int8), ("value", np.float32, 101)])
    records["value"] = np.resize(ENTRIES.astype(np.float32), (400, 101))
    x = records["value"]
    np.testing.assert_array_equal(fastmax.softmax(x, axis=1), fastmax.softmax(x.copy(), axis=1))
    aligned = np.zeros(400, [("value", np.float32, 101), ("tag", np.int16)]).view(np.recarray)["value"]
    aligned[...] = x
    np.testing.assert_array_equal(fastmax.softmax(aligned, axis=1), fastmax.softmax(x.copy(), axis=1))


def test_what_kernels_do_not_read_where_it_lies():
    """Rows in the other order, for which they would read beyond the array, and slices that overlap."""
    rows = np.zeros((2503, 9), np.float32)[::-1, :8]
    windows = np.lib.stride_tricks.sliding_window_view(np.zeros(3000, np.float32), 40)
    for x, axis in (rows, 1), (rows.T, 0), (rows, 0), (windows, 0):
        assert _api._as_kernels_take_it(x, None, (axis,)) == (None, ())
    x = np.lib.stride_tricks.sliding_window_view(ENTRIES[:3000].astype(np.float32), 40)
    np.testing.assert_array_equal(fastmax.softmax(x, axis=0), fastmax.softmax(x.T.copy(), axis=1).T)


def test_array_without_axes_that_is_not_aligned():
    x = np.zeros(1, [("tag", np.int8), ("value", np.float32)])["value"].reshape(())
    axes: list[Any] = [(), None, 0]
    for axis in axes:
        assert fastmax.softmax(x, axis=axis) == 1.0
        assert fastmax.logsumexp(x, axis=axis) == 0.0


@pytest.mark.parametrize("shape", [(40, 3), (40, 30), (2**15, 2)])
def test_read_only_and_in_fortran_order(shape):
    x = np.resize(ENTRIES.astype(np.float32), shape)
    for axis in 0, 1:
        expected = fastmax.softmax(x, axis=axis)
        lent = x.copy()
        lent.flags.writeable = False
        np.testing.assert_array_equal(fastmax.softmax(lent, axis=axis), expected)
        fortran = fastmax.softmax(x.T.copy().T, axis=axis)  # of which rows are columns
        np.testing.assert_allclose(fortran, expected, rtol=1e-6)


def test_repeated_rows_and_entries():
    row = ENTRIES[:101].astype(np.float32)
    rows = np.broadcast_to(row, (300, 101))
    expected = np.broadcast_to(fastmax.softmax(row), rows.shape)
    np.testing.assert_array_equal(fastmax.softmax(rows, axis=1), expected)
    columns = np.broadcast_to(row[:, np.newaxis], (101, 300))
    np.testing.assert_array_equal(fastmax.softmax(columns, axis=1), np.full_like(columns, 1 / 300))


@pytest.mark.parametrize("as_rows", [True, False])
def test_blocks_have_every_slice_once(as_rows):
    x = np.lib.stride_tricks.as_strided(ENTRIES, (5, 3, 4, 7), (3200, 800, 160, 16))
    axes = (3,) if as_rows else (0,)
    kept = [i for i in range(4) if i not in axes]
    for count in 1, 2, 3, 5, 8, 13, 1000:
        times = np.zeros(x.shape, int)
        for block in _api._index_blocks(x, kept, count):
            times[block] += 1
            assert times[block].size <= count * x.shape[axes[0]]
        assert (times == 1).all()


@pytest.mark.parametrize("layout", [(4000, 4000), (2, 8_000_000), (8_000_000, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_memory_beside_an_array_in_place(layout, axis):
    """At most a tenth of the array."""
    x = np.resize(ENTRIES, layout)[:, OTHER]
    if x.shape[axis] == 1:
        pytest.skip("slices of one entry")
    assert peak_of(lambda: fastmax.softmax(x, axis=axis, out=x)) < 0.1 * x.nbytes
    where = np.resize([True, False, True], x.shape)
    assert peak_of(lambda: fastmax.softmax(x, axis=axis, out=x, where=where)) < 0.1 * x.nbytes


def test_memory_beside_the_result_of_an_array_that_is_not_aligned():
    x = np.zeros((2000, 4000), [("tag", np.int8), ("value", np.float32)])["value"]
    out = np.empty(x.shape, x.dtype)
    assert peak_of(lambda: fastmax.softmax(x, axis=0, out=out)) < 0.1 * x.nbytes


@pytest.mark.parametrize("axis", [0, 1])
def test_memory_beside_the_result(axis):
    """At most a tenth of the array, whether slices are read where they lie or copied."""
    x = np.resize(ENTRIES, (4000, 4000))[:, OTHER]
    out = np.empty(x.shape)
    assert peak_of(lambda: fastmax.softmax(x, axis=axis, out=out)) < 0.1 * x.nbytes
