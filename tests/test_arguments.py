"""What every function accepts, refuses and returns: axis, temperature, dtype, out, where."""

import inspect
import re
import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pandas as pd
import pytest
from marks import FLOATS, nightly
from numpy.exceptions import AxisError
from numpy.typing import ArrayLike

import fastmax
from fastmax import _apart, _columns, _cpu, _interleaved, _rows
from fastmax._threads import Kernel

ALL = [getattr(fastmax, name) for name in oracle.FUNCTIONS]
ELEMENTWISE = [fastmax.softmax, fastmax.log_softmax]
REDUCTIONS = [fastmax.logsumexp, fastmax.entropy]
RNG = np.random.default_rng(3)
CUBE = RNG.normal(size=(3, 4, 5))

every = pytest.mark.parametrize("function", ALL, ids=oracle.FUNCTIONS)
elementwise = pytest.mark.parametrize("function", ELEMENTWISE, ids=lambda f: f.__name__)
reductions = pytest.mark.parametrize("function", REDUCTIONS, ids=lambda f: f.__name__)


def by_slice(function, x, temperature, axis, where: ArrayLike = True):
    """Apply a function to each slice along one axis, as 1-d calls."""
    x, where = np.asarray(x), np.broadcast_to(where, np.shape(x))
    lines, masks = np.moveaxis(x, axis, -1), np.moveaxis(where, axis, -1)
    temperatures = np.broadcast_to(temperature, lines.shape[:-1])
    results = [
        function(lines[i].copy(), temperatures[i], where=masks[i].copy())
        for i in np.ndindex(lines.shape[:-1])
    ]
    if function in REDUCTIONS:
        return np.reshape(results, lines.shape[:-1])
    return np.moveaxis(np.reshape(results, lines.shape), -1, axis)


# --- signatures ---------------------------------------------------------------------------------


ELEMENTWISE_SIGNATURE = "(x, /, temperature=1.0, *, axis=0, where=None, out=None)"
REDUCTION_SIGNATURE = "(x, /, temperature=1.0, *, axis=0, where=None, keepdims=False, out=None)"


@every
def test_signature(function):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    expected = ELEMENTWISE_SIGNATURE if function in ELEMENTWISE else REDUCTION_SIGNATURE
    assert str(inspect.Signature(bare)) == expected


@every
def test_axis_is_keyword_only(function):
    with pytest.raises(TypeError):
        function(CUBE, 1.0, 1)


@every
def test_temperature_by_keyword(function):
    assert_same(function(CUBE, temperature=0.5), function(CUBE, 0.5))


def assert_same(result, expected):
    """Assert equal shape, dtype and bits."""
    np.testing.assert_array_equal(result, expected, strict=True)


# --- axis ---------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", [int, np.int64])
def test_axis_counts_from_either_end(function, axis, kind):
    expected = by_slice(function, CUBE, 1.0, axis)
    np.testing.assert_allclose(function(CUBE, axis=kind(axis)), expected, rtol=1e-15)
    assert_same(function(CUBE, axis=kind(axis - 3)), function(CUBE, axis=axis))


@every
def test_default_axis_is_the_first(function):
    assert_same(function(CUBE), function(CUBE, axis=0))


@elementwise
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (0, 2), (-1, 0), (1, -1), (2,), (0, 1, 2)])
def test_tuple_of_axes_is_one_slice(function, axes):
    front = np.moveaxis(CUBE, axes, range(len(axes)))
    flat = function(front.reshape(-1, *front.shape[len(axes) :]))
    expected = np.moveaxis(flat.reshape(front.shape), range(len(axes)), axes)
    np.testing.assert_allclose(function(CUBE, axis=axes), expected, rtol=1e-14)


@reductions
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (0, 2), (-1, 0), (1, -1), (2,), (0, 1, 2)])
def test_reduction_over_tuple_of_axes(function, axes):
    front = np.moveaxis(CUBE, axes, range(len(axes)))
    expected = function(front.reshape(-1, *front.shape[len(axes) :]))
    np.testing.assert_allclose(function(CUBE, axis=axes), expected, rtol=1e-14)


@elementwise
def test_axis_none_is_all_entries(function):
    expected = function(CUBE.ravel()).reshape(CUBE.shape)
    np.testing.assert_allclose(function(CUBE, axis=None), expected, rtol=1e-14)


@reductions
def test_reduction_over_all_entries(function):
    result = function(CUBE, axis=None)
    assert np.shape(result) == ()
    np.testing.assert_allclose(result, function(CUBE.ravel()), rtol=1e-14)


@every
@pytest.mark.parametrize("axis", [0, -1, (), None])
@pytest.mark.parametrize("temperature", [0, 0.5, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_0d_is_one_entry(function, axis, temperature, dtype):
    result = function(np.array(2.5, dtype), temperature, axis=axis)
    expected = {"softmax": 1, "log_softmax": 0, "logsumexp": 2.5, "entropy": 0}
    assert np.shape(result) == ()
    assert result.dtype == dtype
    assert result == expected[function.__name__]


@every
@pytest.mark.parametrize("axis", [1, -2])
def test_0d_has_one_axis_at_most(function, axis):
    with pytest.raises(AxisError):
        function(2.5, axis=axis)


@every
@pytest.mark.parametrize("axis", [3, -4, (0, 3), (0, -4), 10**30, (0, -(10**30))])
def test_axis_out_of_range(function, axis):
    with pytest.raises(AxisError):
        function(CUBE, axis=axis)


@every
def test_axis_given_twice(function):
    with pytest.raises(ValueError, match=r"axis must not have an axis twice, got \(0, -3\)"):
        function(CUBE, axis=(0, -3))


@every
@pytest.mark.parametrize("axis", [1.0, "0", (0, 1.5), np.array([0, 1]), True, (0, True)])
def test_axis_that_is_no_integer(function, axis):
    with pytest.raises(
        TypeError, match=re.escape(f"axis must be an integer, a tuple of integers or None, got {axis!r}")
    ):
        function(CUBE, axis=axis)


@every
@pytest.mark.parametrize("axis", [np.int64(-2), np.array(1), (1,), [1]])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_axis_of_any_kind_of_integer(function, axis, dtype):
    x = (4.0 * CUBE).astype(dtype)
    assert function(x, 0.7, axis=axis).tobytes() == function(x, 0.7, axis=1).tobytes()


@reductions
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(0, (1, 4, 5)), (1, (3, 1, 5)), (-1, (3, 4, 1)), ((0, -1), (1, 4, 1)), (None, (1, 1, 1))],
)
def test_keepdims(function, axis, shape):
    result = function(CUBE, axis=axis, keepdims=True)
    assert result.shape == shape
    assert_same(result.ravel(), np.ravel(function(CUBE, axis=axis)))


@reductions
@pytest.mark.parametrize("keepdims", ["no", None, [], 1.5, np.ones(2)])
def test_keepdims_that_is_no_bool(function, keepdims):
    with pytest.raises(TypeError, match="keepdims must be a bool, got"):
        function(CUBE, keepdims=keepdims)


@reductions
@pytest.mark.parametrize("keepdims", [np.True_, np.False_, 1, 0])
def test_keepdims_of_any_kind_of_bool(function, keepdims):
    assert function(CUBE, keepdims=keepdims).shape == ((1, 4, 5) if keepdims else (4, 5))


@reductions
def test_keepdims_of_0d(function):
    assert np.shape(function(2.5, axis=None, keepdims=True)) == ()


# --- temperature --------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "temperature",
    [2, np.int8(2), np.uint64(2), np.float32(2), np.float16(2), np.array(2), np.array(2.0, ">f8")],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_temperature_of_any_type_never_changes_the_dtype(function, temperature, dtype):
    x = CUBE.astype(dtype)
    assert_same(function(x, temperature), function(x, 2.0))
    assert function(x, temperature).dtype == dtype


# (shape of x, shape of the temperature, axis, shape of softmax, shape of a reduction), by NumPy's
# rule for a gufunc of signature (n),()->(n) or (n),()->() called with this axis
BROADCASTS = [
    ((7,), (), 0, (7,), ()),
    ((7,), (4,), -1, (4, 7), (4,)),
    ((7,), (4,), 0, (7, 4), (4,)),
    ((7,), (4, 2), -1, (4, 2, 7), (4, 2)),
    ((7,), (4, 2), 0, (7, 4, 2), (4, 2)),
    ((7,), (1,), -1, (1, 7), (1,)),
    ((3, 7), (3,), -1, (3, 7), (3,)),
    ((7, 3), (3,), 0, (7, 3), (3,)),
    ((3, 7), (4, 1), -1, (4, 3, 7), (4, 3)),
    ((3, 7), (4, 1), 1, (4, 7, 3), (4, 3)),
    ((7, 3), (4, 1), 0, (7, 4, 3), (4, 3)),
    ((2, 7, 3), (2, 1), 1, (2, 7, 3), (2, 3)),
    ((2, 7, 3), (3,), -2, (2, 7, 3), (2, 3)),
    ((1, 7), (4,), -1, (4, 7), (4,)),
    ((7,), (0,), -1, (0, 7), (0,)),
]


@every
@pytest.mark.parametrize(("shape", "of_temperature", "axis", "elements", "reduced"), BROADCASTS)
def test_one_temperature_per_slice(function, shape, of_temperature, axis, elements, reduced):
    x = RNG.normal(size=shape)
    temperature = np.resize([0.0, 0.3, np.inf, 2.0, 1e-310], of_temperature)
    result = function(x, temperature, axis=axis)
    assert result.shape == (elements if function in ELEMENTWISE else reduced)

    lines = np.moveaxis(x, axis, -1)
    lines = np.broadcast_to(lines, (*reduced, 7))
    result = np.moveaxis(result, axis, -1) if function in ELEMENTWISE else result
    for i in np.ndindex(reduced):
        expected = function(lines[i].copy(), np.broadcast_to(temperature, reduced)[i])
        np.testing.assert_allclose(result[i], expected, rtol=1e-14)


@elementwise
def test_temperature_per_slice_of_two_axes(function):
    temperature = np.array([0.0, 0.3, np.inf, 2.0])
    result = function(CUBE, temperature, axis=(0, 2))
    assert result.shape == CUBE.shape
    for j, value in enumerate(temperature):
        expected = function(CUBE[:, j], value, axis=None)
        np.testing.assert_allclose(result[:, j], expected, rtol=1e-14)


@reductions
def test_temperature_per_reduction_of_two_axes(function):
    temperature = np.array([0.0, 0.3, np.inf, 2.0])
    result = function(CUBE, temperature, axis=(0, 2))
    expected = [function(CUBE[:, j], t, axis=None) for j, t in enumerate(temperature)]
    np.testing.assert_allclose(result, expected, rtol=1e-14)


@reductions
def test_temperatures_of_all_entries(function):
    temperature = np.array([0.0, 0.3, np.inf, 2.0])
    expected = [function(CUBE.ravel(), t) for t in temperature]
    np.testing.assert_allclose(function(CUBE, temperature, axis=None), expected, rtol=1e-14)


@every
def test_temperatures_that_do_not_fit(function):
    with pytest.raises(ValueError, match="temperature"):
        function(CUBE, [1.0, 2.0], axis=-1)


@every
@pytest.mark.parametrize("value", [-1.0, -1e-300, -np.inf, np.nan, -3])
@pytest.mark.parametrize("kind", [float, np.float64, np.array, lambda v: np.array([1.0, v, 2.0])])
def test_temperature_below_0_or_nan(function, value, kind):
    with pytest.raises(ValueError, match=re.escape(str(float(value)))):
        function([1.0, 2.0, 3.0], kind(value), axis=-1)


@every
def test_signalling_nan_temperature_gives_no_warning(function):
    signalling = np.array([0x7FA00001], np.uint32).view(np.float32)
    with pytest.raises(ValueError, match="temperature must be in"):
        function([1.0, 2.0, 3.0], signalling)


@every
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_temperature_is_checked_when_there_is_nothing_to_do(function, shape):
    with pytest.raises(ValueError, match=r"-1\.0"):
        function(np.zeros(shape), -1.0)


@every
@pytest.mark.parametrize(
    "temperature", ["1", 1j, None, [1.0, "a"], [1.0, None], np.array(["1"], object), np.array([b"1"], object)]
)
def test_temperature_that_is_no_number(function, temperature):
    with pytest.raises(TypeError, match="temperature must be real, got"):
        function([1.0, 2.0], temperature)


@every
def test_minus_zero_temperature_is_zero(function):
    assert_same(function(CUBE, -0.0), function(CUBE, 0.0))


# --- dtypes -------------------------------------------------------------------------------------

INTEGERS = [np.bool_, *(np.dtype(code).type for code in "bBhHiIlLqQ")]


@every
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_keep_their_dtype(function, dtype):
    assert function(np.ones((3, 2), dtype)).dtype == dtype


@every
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_become_float64(function, dtype):
    x = np.array([0, 1, 1]).astype(dtype)
    assert_same(function(x), function([0.0, 1.0, 1.0]))


@every
@pytest.mark.parametrize(
    "x",
    [
        np.array([2**64 - 1, 2**63, 0, 2**64 - 4096], np.uint64),
        np.array([-(2**63), 2**63 - 1, 0], np.int64),
        np.array([-128, 127], np.int8),
        np.array([0, 1], np.uint8),
    ],
    ids=lambda x: x.dtype.name,
)
@pytest.mark.parametrize("temperature", [1.0, 1e18])
def test_integers_convert_before_anything_is_subtracted(function, x, temperature):
    oracle.assert_close(function.__name__, function(x, temperature), x, temperature)


@every
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f2", "<f4", "<f8", ">i4", ">u8"])
def test_any_byte_order_gives_native_results(function, dtype):
    x = np.array([[1, 2], [3, 5]], dtype)
    result = function(x)
    assert result.dtype.isnative
    assert_same(result, function(x.astype(x.dtype.newbyteorder("="))))


@every
@pytest.mark.parametrize(
    ("x", "names"),
    [
        (np.zeros(2, np.longdouble), np.dtype(np.longdouble).name),
        (np.zeros(2, np.complex64), "complex64"),
        (np.zeros(2, np.complex128), "complex128"),
        (np.array([1.0, 2.0], object), "object"),
        (np.array(["1", "2"]), "<U1"),
        (np.array([b"1", b"2"]), "S1"),
        (np.array([1, 2], "M8[s]"), r"datetime64\[s\]"),
        (np.array([1, 2], "m8[s]"), r"timedelta64\[s\]"),
        (np.zeros(2, [("a", float)]), "'a'"),
        (np.zeros(2, "V8"), "V8|void"),
        (np.zeros(2, ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
        (np.zeros(2, ml_dtypes.float8_e5m2), "float8_e5m2"),
        (["a", "b"], "U1"),
        ([1j], "complex128"),
        ([None], "object"),
        (1j, "complex128"),
    ],
    ids=str,
)
def test_other_dtypes_are_named_in_a_type_error(function, x, names):
    with pytest.raises(TypeError, match=names):
        function(x)


@every
@pytest.mark.parametrize("dtype", [np.longdouble, complex, object, str])
def test_other_dtypes_are_refused_when_empty(function, dtype):
    with pytest.raises(TypeError):
        function(np.zeros(0, dtype))


@every
@pytest.mark.parametrize("mask", [False, [False, True, False]])
def test_masked_arrays_are_pointed_to_where(function, mask):
    with pytest.raises(TypeError, match="where="):
        function(np.ma.masked_array([1.0, 2.0, 3.0], mask=mask))


@every
def test_masked_arrays_in_a_sequence_are_no_less_masked(function):
    masked = np.ma.masked_array([1.0, 2.0], mask=[False, True])
    for x in (
        [masked, masked],
        [[1.0, 2.0], (masked, [3.0, 4.0])],
        [1.0, np.ma.masked],
        deque([[1.0], masked]),
    ):
        with pytest.raises(TypeError, match="x must not be a masked array"):
            function(x)
    with pytest.raises(TypeError, match="temperature must not be a masked array"):
        function([1.0, 2.0], [np.ma.masked])


@every
def test_a_mask_that_comes_from_an_array_protocol_is_not_dropped(function):
    class Duck:
        def __array__(self, dtype=None, copy=None):
            return np.ma.masked_array([1.0, 2.0], mask=[False, True])

    with pytest.raises(TypeError, match="x must not be a masked array"):
        function(Duck())


@every
@pytest.mark.parametrize("ndim", [33, 64])
def test_as_many_axes_as_arrays_have(function, ndim):
    """NumPy broadcasts no more than 32 shapes' axes by name."""
    x = np.array([0.5, 2.0]).reshape((1,) * (ndim - 1) + (2,))
    found = function(x, np.array([0.7]), axis=-1)
    assert found.tobytes() == function(x, 0.7, axis=-1).tobytes()


@every
def test_ragged_sequences_are_named(function):
    ragged = [[1.0, 2.0], [3.0]]
    with pytest.raises(ValueError, match=r"x must make an array: .*inhomogeneous"):
        function(ragged)
    with pytest.raises(ValueError, match="temperature must make an array: "):
        function([1.0, 2.0], ragged)
    with pytest.raises(ValueError, match="where must make an array: "):
        function([1.0, 2.0], where=[[True, False], [True]])


# --- what counts as an array --------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "kind",
    [
        list,
        lambda x: tuple(map(tuple, x.tolist())),
        pd.DataFrame,
        lambda x: x.data,
        lambda x: SimpleNamespace(__array_interface__=x.__array_interface__, keep=x),
        lambda x: SimpleArray(x),
    ],
    ids=["list", "tuples", "DataFrame", "buffer", "array interface", "__array__"],
)
def test_array_likes(function, kind):
    x = CUBE[0].copy()
    assert_same(np.asarray(function(kind(x), 0.5, axis=1)), function(x, 0.5, axis=1))


class SimpleArray:
    """Nothing but NumPy's __array__ protocol."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype, copy=bool(copy))


@every
def test_pandas_series(function):
    x = CUBE[0, 0]
    assert_same(np.asarray(function(pd.Series(x, index=list("abcde")))), function(x.copy()))


@every
def test_memmap(function, tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4, 5))
    x[:] = CUBE[0]
    x.flush()
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(4, 5))
    assert_same(np.asarray(function(mapped)), function(np.array(x)))


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def negative_strides(x):
    flipped = (slice(None, None, -1),) * x.ndim
    return x[flipped].copy()[flipped]


LAYOUTS = {
    "C order": lambda x: x,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "transposed": lambda x: x.T.copy().T,
    "axes rolled": lambda x: np.moveaxis(np.moveaxis(x, 0, 1).copy(), 1, 0),
    "steps": lambda x: x.repeat(2, axis=0).repeat(3, axis=2)[::2, :, ::3],
    "negative strides": negative_strides,
    "repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "constant": lambda x: np.broadcast_to(x[0, 0, 0], x.shape),
    "subclass": lambda x: x.view(type("Sub", (np.ndarray,), {})),
}


@every
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_values_and_are_not_written(function, layout, axis):
    x = LAYOUTS[layout](CUBE)
    before = x.copy()
    result = function(x, axis=axis)
    expected = function(np.ascontiguousarray(x), axis=axis)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-14)
    np.testing.assert_array_equal(x, before)
    assert not np.shares_memory(result, x)


@every
def test_read_only_arrays_have_no_kernels_of_their_own(function):
    def compiled():
        rooms = _rows, _columns, _apart, _interleaved, _cpu
        names = [value for room in rooms for value in vars(room).values()]
        return [len(kernel._kernel.overloads) for kernel in names if isinstance(kernel, Kernel)]

    mask = CUBE > 0
    for axis in (0, 2):
        one, each = np.array(0.7), np.full(np.delete(CUBE.shape, axis), 0.7)
        for temperature, where in [(one, None), (one, mask), (each, None), (each, mask)]:
            expected = function(CUBE, temperature, axis=axis, where=where)
            before = compiled()
            for x in CUBE, read_only(CUBE):
                other = None if where is None else read_only(where)
                assert_same(function(x, read_only(temperature), axis=axis, where=other), expected)
            assert compiled() == before


# --- ways of few steps ----------------------------------------------------------------------------


SHORT = {
    "vector": (CUBE[0, 0], 0.7, {}),
    "sweep": (CUBE[0, 0], np.array([0.0, 0.7, np.inf]), {}),
    "sweep along the last axis": (CUBE[0, 0], np.array([0.0, 0.7, np.inf]), {"axis": -1}),
    "sweep of two axes": (CUBE[0, 0], np.array([[0.0, 0.7, np.inf], [3.0, 1e-300, 1.0]]), {"axis": 0}),
    "sweep of no temperature": (CUBE[0, 0], np.ones((2, 0)), {}),
    "all axes": (CUBE, 0.7, {"axis": None}),
    "no axis": (np.array(3.0), 0.7, {"axis": None}),
    "temperature per slice": (CUBE, CUBE[0] ** 2, {}),
    "temperature per row": (CUBE, CUBE[..., 0] ** 2, {"axis": -1}),
    "mask": (CUBE, 0.7, {"where": CUBE > 0, "axis": 1}),
    "Fortran order": (CUBE.T, 0.7, {"axis": 0}),
    "Fortran order, axis in the middle": (CUBE.T, 0.7, {"axis": -2}),
}


@every
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in SHORT for dtype in (np.float32, np.float64, np.int64)),
        *((case, ml_dtypes.bfloat16) for case in SHORT if case != "mask"),
        *nightly(("mask", ml_dtypes.bfloat16), *((case, np.float16) for case in SHORT)),
    ],
)
def test_ways_of_few_steps_have_the_results_of_the_long_one(function, case, dtype):
    x, temperature, keywords = SHORT[case]
    x = x.astype(dtype, order="K")
    found = function(x, temperature, **keywords)
    if function in ELEMENTWISE:
        dtype = np.dtype(np.float64) if x.dtype.kind == "i" else x.dtype
        out = np.full((*found.shape, 2), 7, dtype)[..., 0]  # for which there is no short way
        expected = function(x, temperature, out=out, **keywords)
    else:
        expected = function(x, temperature, keepdims=True, **keywords)
        expected = expected.squeeze(keywords.get("axis", 0))[()]
    assert type(found) is (np.ndarray if np.ndim(expected) else expected.dtype.type)
    assert_same(np.asarray(found), np.asarray(expected))
    assert found.tobytes() == expected.tobytes()
    assert_same(function(read_only(x), temperature, **keywords), found)


# On both sides of the numbers of entries and neighbours up to which columns are a few, and of entries up to
# which rows are; with more axes than two, these are made two.
FEW = [
    ((2, 5), 0),
    ((10, 32), 0),
    ((341, 3), 0),
    ((342, 3), 0),
    ((64, 15), 0),
    ((128, 16), 0),
    ((512, 16), 0),
    ((513, 16), 0),
    ((4, 8, 16), 0),
    ((4, 8, 16), 1),
    ((4, 8, 16), 2),
    ((60, 9, 2), -2),
    ((60, 9, 2), -3),
    ((2, 3, 37, 36), -1),
    ((2, 3, 38, 36), -1),
    ((3, 4, 79), -1),
    ((3, 4, 80), -1),
]


@every
@pytest.mark.parametrize(("shape", "axis"), FEW)
@pytest.mark.parametrize("dtype", [np.float32, *nightly(np.float64)])
@pytest.mark.parametrize("temperature", [0.7, 1e-300, *nightly(0.0, np.inf)])
def test_few_slices_have_the_bits_of_many(function, shape, axis, dtype, temperature):
    x = np.random.default_rng(shape).normal(scale=4.0, size=shape).astype(dtype)
    x.reshape(-1)[1] = np.inf
    found = function(x, temperature, axis=axis)
    last = axis % len(shape) == len(shape) - 1
    copies = [1 for _ in shape]
    copies[0 if last else -1] = 70
    expected = function(np.tile(x, copies), temperature, axis=axis)
    expected = expected[: shape[0]] if last else expected[..., : shape[-1]]
    np.testing.assert_array_equal(found, expected)
    if function in ELEMENTWISE:
        memory = np.concatenate([x.reshape(-1), x.reshape(-1)[:3]])
        with pytest.raises(ValueError, match="overlaps x in part"):
            function(memory[: x.size].reshape(shape), axis=axis, out=memory[3:].reshape(shape))
        assert function(x, temperature, axis=axis, out=x) is x
        np.testing.assert_array_equal(x, expected)
        swapped = shape[1], shape[0], *shape[2:]
        with pytest.raises(ValueError, match="out must have the shape"):
            function(x, temperature, axis=axis, out=np.empty(swapped, dtype))


# --- out ----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_out_is_filled_and_returned(function, axis, dtype):
    x = CUBE.astype(dtype)
    expected = np.asarray(function(x, 0.5, axis=axis))
    out = np.full_like(expected, 7)
    assert function(x, 0.5, axis=axis, out=out) is out
    assert_same(out, expected)


@every
@pytest.mark.parametrize(
    "layout",
    [
        np.asfortranarray,
        negative_strides,
        lambda x: x.repeat(2, axis=-1)[..., ::2],
        lambda x: x.repeat(2, axis=0)[::2],
    ],
    ids=["Fortran order", "negative strides", "columns apart", "rows apart"],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_out_of_any_layout(function, layout, axis):
    expected = function(CUBE, axis=axis)
    out = layout(np.full_like(expected, 7))
    assert function(CUBE, axis=axis, out=out) is out
    assert_same(out, expected)


@elementwise
@pytest.mark.parametrize("shape", [(40, 3), (2000, 3), (3, 40)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("temperature", [0.7, "of each"])
def test_out_that_is_a_matrix(function, shape, axis, temperature):
    """It keeps two axes, however it is reshaped."""
    x = np.random.default_rng(shape).normal(size=shape)
    if temperature == "of each":
        temperature = np.linspace(0.0, 2.0, shape[1 - axis])
    expected = function(x, temperature, axis=axis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        out, given = np.asmatrix(np.full(shape, 7.0)), np.asmatrix(x)
    assert function(x, temperature, axis=axis, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), expected)
    assert function(given, temperature, axis=axis, out=given) is given
    np.testing.assert_array_equal(np.asarray(given), expected)


@every
def test_out_leaves_its_surroundings_alone(function):
    expected = function(CUBE)
    around = np.full([n + 2 for n in expected.shape], 7.0)
    inside = (slice(1, -1),) * expected.ndim
    function(CUBE, out=around[inside])
    assert_same(around[inside], expected)
    around[inside] = 7.0
    assert (around == 7.0).all()


@every
def test_out_with_temperature_per_slice(function):
    expected = function(CUBE[0, 0], [0.0, 1.0, np.inf], axis=-1)
    out = np.full_like(expected, 7)
    assert function(CUBE[0, 0], [0.0, 1.0, np.inf], axis=-1, out=out) is out
    assert_same(out, expected)


@every
def test_out_with_where(function):
    mask = CUBE > 0
    expected = function(CUBE, where=mask)
    out = np.full_like(expected, 7)
    assert function(CUBE, where=mask, out=out) is out
    assert_same(out, expected)


@reductions
def test_out_with_keepdims(function):
    out = np.full((3, 1, 5), 7.0)
    assert function(CUBE, axis=1, keepdims=True, out=out) is out
    assert_same(out[:, 0], function(CUBE, axis=1))
    with pytest.raises(ValueError, match="out"):
        function(CUBE, axis=1, keepdims=True, out=np.zeros((3, 5)))


@reductions
@pytest.mark.parametrize("shape", [(5,), (4, 6), (300, 100), (3, 4, 5)])
@pytest.mark.parametrize("keepdims", [False, True, np.True_, 2])
def test_out_of_reductions_of_plain_arrays(function, shape, keepdims):
    """Vectors, few rows, rows and columns, each by the axes of either sign."""
    x = RNG.normal(size=shape)
    for axis in range(-x.ndim, x.ndim):
        expected = function(x.tolist(), 0.5, axis=axis)
        kept = np.expand_dims(expected, axis) if keepdims else expected
        out = np.full(np.shape(kept), 7.0)
        assert function(x, 0.5, axis=axis, keepdims=keepdims, out=out) is out
        assert_same(out, kept)
        assert_same(function(x, 0.5, axis=axis, keepdims=keepdims), kept)
        assert type(function(x, 0.5, axis=axis)) is type(expected)


@reductions
def test_out_of_reductions_may_not_be_a_part_of_x(function):
    x = RNG.normal(size=(4, 6))
    with pytest.raises(ValueError, match="out"):
        function(x, axis=1, out=x[:, 0])
    with pytest.raises(ValueError, match="out"):
        function(x, axis=0, out=x[0])


@every
def test_a_temperature_with_fields(function):
    with pytest.raises(TypeError, match="temperature must be real, got dtype"):
        function(CUBE, np.array([(1.0,)], [("T", "f8")]))


@every
def test_what_does_not_become_an_array_is_named(function):
    class Tensor:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("it requires a gradient")

    with pytest.raises(ValueError, match="x must make an array: it requires a gradient"):
        function(Tensor())
    with pytest.raises(ValueError, match="temperature must make an array: it requires a gradient"):
        function(CUBE, Tensor())


@every
def test_a_temperature_beyond_the_floats_is_named(function):
    with pytest.raises(ValueError, match="temperature"):
        function(CUBE, 10**400)
    with pytest.raises(ValueError, match="temperature must fit a float64"):
        function(CUBE, [1.0, 10**5000])  # more digits than Python shows
    with pytest.raises(ValueError, match="-1"):
        function(CUBE, -1)


@elementwise
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), None])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [np.array, np.asfortranarray, negative_strides])
def test_in_place(function, axis, dtype, layout):
    x = layout(CUBE.astype(dtype))
    expected = function(x, 0.5, axis=axis)
    assert function(x, 0.5, axis=axis, out=x) is x
    assert_same(x, expected)


@elementwise
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_in_place_with_temperature_per_slice(function, axis):
    x = CUBE.copy()
    temperature = np.resize([0.0, 0.5, np.inf, 2.0], np.delete(x.shape, axis))
    expected = function(x, temperature, axis=axis)
    assert function(x, temperature, axis=axis, out=x) is x
    assert_same(x, expected)


@elementwise
def test_in_place_with_where(function):
    x, mask = CUBE.copy(), CUBE > 0
    expected = function(x, where=mask)
    assert function(x, where=mask, out=x) is x
    assert_same(x, expected)


@every
@pytest.mark.parametrize("extra", [(1,), (2,)])
def test_out_of_another_shape(function, extra):
    shape = function(CUBE).shape
    out = np.zeros((*extra, *shape))
    with pytest.raises(ValueError, match="out"):
        function(CUBE, out=out)


@every
def test_out_is_not_broadcast_nor_reshaped(function):
    shape = function(CUBE).shape
    for wrong in [shape[::-1], (1, *shape[1:]), (*shape[:-1], shape[-1] + 1), ()]:
        with pytest.raises(ValueError, match="out"):
            function(CUBE, out=np.zeros(wrong))


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, int, complex, ">f8", object])
def test_out_of_another_dtype(function, dtype):
    with pytest.raises(ValueError, match="out"):
        function(CUBE, out=np.zeros(function(CUBE).shape, dtype))


@every
def test_out_for_float32_is_float32(function):
    x = CUBE.astype(np.float32)
    with pytest.raises(ValueError, match="out"):
        function(x, out=np.zeros(function(x).shape))


@every
def test_out_for_integers_is_float64(function):
    x = np.arange(12).reshape(3, 4)
    out = np.zeros(function(x).shape)
    assert function(x, out=out) is out
    with pytest.raises(ValueError, match="out"):
        function(x, out=np.zeros(out.shape, int))


@elementwise
@pytest.mark.parametrize("step", [slice(1, 6), slice(5, None, -1), slice(4, None, -1)])
def test_out_that_overlaps_x(function, step):
    buffer = RNG.normal(size=9)
    x = buffer[:5] if step.start != 5 else buffer[:6]
    out = buffer[step]
    before = buffer.copy()
    with pytest.raises(ValueError, match="out"):
        function(x, out=out)
    assert_same(buffer, before)


@elementwise
@pytest.mark.parametrize("axis", [0, (0,)])
def test_out_that_overlaps_integers(function, axis):
    """They are converted first, but are the caller's, and not to be written to."""
    for dtype, size, first in ((np.int64, 6, 1), (np.int8, 8, 0)):
        buffer = np.arange(7 if first else 64).astype(dtype)
        before = buffer.copy()
        with pytest.raises(ValueError, match="overlaps x in part"):
            function(buffer[:size], axis=axis, out=buffer[first:].view(np.float64))
        assert_same(buffer, before)
    whole = np.arange(6)
    expected = function(whole.copy())
    assert_same(function(whole, axis=axis, out=whole.view(np.float64)), expected)


@elementwise
@pytest.mark.parametrize("size", [3, 2**17 + 1])
@pytest.mark.parametrize("width", [1, 5, 40])
@pytest.mark.parametrize("is_behind", [False, True])
def test_out_that_overlaps_rows(function, size, width, is_behind):
    rows = -(-size // width)
    buffer = RNG.normal(size=(rows + 1) * width)
    before = buffer.copy()
    x, out = buffer[:-width], buffer[1 : 1 + rows * width]
    if is_behind:
        x, out = out, x
    with pytest.raises(ValueError, match="overlaps x in part"):
        function(x.reshape(rows, width), axis=1, out=out.reshape(rows, width))
    assert_same(buffer, before)


@every
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("columns", [6, 40])
def test_masks_and_temperatures_in_the_memory_of_out(function, columns, axis):
    """They count as they were before the call."""
    x = RNG.normal(size=(40, columns))
    out = np.empty_like(function(x, axis=axis))
    buffer = np.zeros(max(out.nbytes, x.size), np.uint8)
    out = buffer[: out.nbytes].view(x.dtype).reshape(out.shape)
    mask = buffer[: x.size].view(bool).reshape(x.shape)
    mask[...] = RNG.random(x.shape) < 0.7
    expected = function(x, where=mask.copy(), axis=axis)
    assert_same(function(x, where=mask, axis=axis, out=out), expected)
    temperature = out.reshape(-1)[: x.shape[1 - axis]]
    temperature[...] = RNG.random(temperature.shape)
    expected = function(x, temperature.copy(), axis=axis)
    assert_same(function(x, temperature, axis=axis, out=out), expected)


@elementwise
@pytest.mark.parametrize("shape", [(5,), (6, 5), (6, 40), (2**17 + 1,), (2, 3, 4)], ids=str)
def test_out_over_the_same_memory(function, shape):
    x = RNG.normal(size=shape)
    expected = function(x, axis=-1)
    out = x[:]
    assert function(x, axis=-1, out=out) is out
    assert_same(x, expected)


@elementwise
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 4), (2, 80), (1, 6), (2, 2, 3)], ids=str)
def test_out_of_nearly_the_same_shape(function, shape):
    x = RNG.normal(size=shape)
    for other in {shape[::-1], (x.size,), (x.size, 1), (*shape[:-1], shape[-1] + 1)} - {shape}:
        out = np.zeros(other)
        with pytest.raises(ValueError, match="out must have the shape"):
            function(x, axis=-1, out=out)
        assert not out.any()


@reductions
def test_out_of_a_reduction_inside_x(function):
    x = CUBE.copy()
    with pytest.raises(ValueError, match="out"):
        function(x, axis=0, out=x[1])
    assert_same(x, CUBE)


@elementwise
@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_a_read_only_view_of_out(function, axis):
    x = CUBE[0].copy()
    view = x.view()
    view.flags.writeable = False
    expected = function(CUBE[0], axis=axis)
    assert function(view, axis=axis, out=x) is x
    assert_same(x, expected)


@every
def test_read_only_out(function):
    out = read_only(function(CUBE))
    with pytest.raises(ValueError, match="out"):
        function(CUBE, out=out)


@every
@pytest.mark.parametrize("out", [[0.0] * 3, 0.0, "out"])
def test_out_that_is_no_array(function, out):
    with pytest.raises((TypeError, ValueError)):
        function([1.0, 2.0, 3.0], out=out)


# --- where --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5), (5,), (3, 1, 1), (1, 4, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_where_is_broadcast_to_x(function, shape, axis):
    mask = np.random.default_rng(4).random(shape) < 0.6
    result = function(CUBE, 0.5, axis=axis, where=mask)
    expected = by_slice(function, CUBE, 0.5, axis, where=mask)
    np.testing.assert_allclose(result, expected, rtol=1e-14)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *nightly(np.float16, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("temperature", [0.0, 0.5, np.inf])
def test_where_false_is_absent(function, dtype, temperature):
    x = np.array([9, 1, np.nan, 2, np.inf, 2, -np.inf]).astype(dtype)
    mask = np.array([False, True, False, True, False, True, False])
    result = function(x, temperature, where=mask)
    oracle.assert_close(function.__name__, result, x, temperature, mask)
    present = result[mask] if function in ELEMENTWISE else result
    assert_same(np.asarray(present), np.asarray(function(x[mask], temperature)))


@every
@pytest.mark.parametrize("axis", [(0, 2), None])
def test_where_over_several_axes(function, axis):
    mask = CUBE > 0.2
    x = np.where(mask, CUBE, np.nan)
    filled = np.where(mask, CUBE, -np.inf)  # no mass either, but for the result 0 of entropy's 0 log 0
    np.testing.assert_allclose(
        function(x, 0.5, axis=axis, where=mask), function(filled, 0.5, axis=axis), rtol=1e-14
    )


@every
@pytest.mark.parametrize("where", [True, np.True_, [True], np.ones((3, 4, 5), bool)])
def test_where_true_everywhere(function, where):
    np.testing.assert_allclose(function(CUBE, where=where), function(CUBE), rtol=1e-15)


@every
@pytest.mark.parametrize("temperature", [0.0, 0.5, np.inf])
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [False, [False, False]])
def test_no_true_entry(function, temperature, value, where):
    expected = {"softmax": [0, 0], "log_softmax": [-np.inf] * 2, "logsumexp": -np.inf, "entropy": 0}
    result = function([value, value], temperature, where=where)
    np.testing.assert_array_equal(result, expected[function.__name__])


@elementwise
@pytest.mark.parametrize("temperature", [0.0, 0.5, np.inf])
@pytest.mark.parametrize("poison", [np.nan, -np.inf], ids=["NaN", "all -inf"])
def test_where_false_is_0_even_in_a_nan_slice(function, temperature, poison):
    result = function([poison, 1.0, poison], temperature, where=[True, False, True])
    np.testing.assert_array_equal(result, [np.nan, oracle.ABSENT[function.__name__], np.nan])


@every
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), (5, 4), (0,)])
def test_where_that_does_not_fit(function, shape):
    with pytest.raises(ValueError, match="where"):
        function(CUBE, where=np.ones(shape, bool))


@every
def test_where_that_is_not_boolean(function):
    with pytest.raises((TypeError, ValueError), match="where"):
        function(CUBE, where=np.ones(5))


@every
@pytest.mark.parametrize("axis", [0, -1])
def test_where_with_temperature_per_slice(function, axis):
    x, mask = CUBE[0], np.random.default_rng(5).random((4, 5)) < 0.6
    temperature = np.array([0.0, 0.3, np.inf, 2.0, 0.1])[: x.shape[1 + axis] if axis else 5]
    result = function(x, temperature, axis=axis, where=mask)
    expected = by_slice(function, x, temperature, axis, where=mask)
    np.testing.assert_allclose(result, expected, rtol=1e-14)


@every
def test_where_of_one_vector_at_many_temperatures(function):
    x, mask = CUBE[0, 0], np.array([True, False, True, True, False])
    temperatures = [0.0, 0.5, np.inf]
    result = function(x, temperatures, axis=-1, where=mask)
    expected = [function(x, t, where=mask) for t in temperatures]
    np.testing.assert_allclose(result, expected, rtol=1e-14)


def test_jax_arrays_on_the_host_are_taken_as_any_other():
    """Their class has the interface of arrays on a GPU; asking one on the host for it is an error."""

    class Host:
        @property
        def __cuda_array_interface__(self):
            raise AttributeError("only on a GPU")

        def __array__(self, dtype=None, copy=None):
            return np.array([1.0, 1.0], dtype)

    host: Any = Host()
    assert fastmax.softmax(host).tolist() == [0.5, 0.5]
