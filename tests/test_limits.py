"""The values at the ends: temperature 0 and inf, huge and subnormal, infinities, NaN, empties."""

import itertools

import ml_dtypes
import numpy as np
import oracle
import pytest
from marks import FLOATS, nightly

import fastmax

TEMPERATURES = [0.0, 5e-324, 0.1, 1.0, 10.0, 1e308, np.inf]
FINITE = TEMPERATURES[1:-1]

every = pytest.mark.parametrize("name", oracle.FUNCTIONS)
elementwise = pytest.mark.parametrize("name", oracle.ELEMENTWISE)
at_all_temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)
of_all_floats = pytest.mark.parametrize("dtype", FLOATS)


def log(p):
    with np.errstate(divide="ignore"):
        return np.log(p)


def check(x, temperature, dtype, softmax, logsumexp, entropy):
    """Compare all four functions with the values that a rule states for them."""
    x = np.asarray(x).astype(dtype)
    expected = {
        "softmax": np.asarray(softmax, float),
        "log_softmax": log(np.asarray(softmax, float)),
        "logsumexp": np.asarray(logsumexp, float),
        "entropy": np.asarray(entropy, float),
    }
    rtol = 4 * float(ml_dtypes.finfo(dtype).eps)
    for name, value in expected.items():
        result = np.asarray(getattr(fastmax, name)(x, temperature), float)
        with np.errstate(over="ignore"):
            value = value.astype(dtype).astype(float)
        np.testing.assert_allclose(result, value, rtol=rtol, err_msg=name)


# --- temperature 0 and inf ------------------------------------------------------------------------


@of_all_floats
@pytest.mark.parametrize("ties", [1, 2, 3, 7])
def test_temperature_0_splits_the_mass_among_the_maxima(dtype, ties):
    x = [-1.5, *ties * [2.0], 1.0]
    p = [0, *ties * [1 / ties], 0]
    check(x, 0, dtype, softmax=p, logsumexp=2.0, entropy=np.log(ties))


@of_all_floats
@pytest.mark.parametrize("k", [2, 3, 7, 100])
def test_temperature_inf_is_uniform(dtype, k):
    x = np.linspace(-3, 5, k)
    check(x, np.inf, dtype, softmax=k * [1 / k], logsumexp=np.inf, entropy=np.log(k))


@elementwise
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, *nightly(np.float16, np.float64)])
@pytest.mark.parametrize("shape", [(300, 64), (3, 50, 130), (2, 2**17 + 5)])
def test_a_fill_at_temperature_inf_has_the_bits_of_a_slice_of_many_temperatures(name, dtype, shape):
    """And is none where an entry is not finite."""
    function = getattr(fastmax, name)
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for axis in range(1, len(shape)):
        batch = shape[:axis] + shape[axis + 1 :]
        expected = function(x, np.full(batch, np.inf), axis=axis)
        assert function(x, np.inf, axis=axis).tobytes() == expected.tobytes()
        buffer = np.full(x.size + 40, 9, dtype)
        out = buffer[3 : 3 + x.size].reshape(shape)
        assert function(x, np.inf, axis=axis, out=out).tobytes() == expected.tobytes()
        assert (buffer[:3] == 9).all()
        assert (buffer[3 + x.size :] == 9).all()
        in_place = x.copy()
        assert function(in_place, np.inf, axis=axis, out=in_place).tobytes() == expected.tobytes()
        for value in -np.inf, np.inf, np.nan:
            for place in 0, x.size // 2 + 1, -1:
                other = x.copy()
                other.reshape(-1)[place] = value
                expected = function(other, np.full(batch, np.inf), axis=axis)
                assert function(other, np.inf, axis=axis).tobytes() == expected.tobytes()


@elementwise
def test_a_fill_past_the_caches(name):
    """Of more entries than float32 counts: with the bits that they have beside another temperature."""
    function, n = getattr(fastmax, name), 2**24 + 16
    x = np.zeros(n, np.float32)
    buffer = np.full(n + 40, 9, np.float32)
    share = function(x[None], [np.inf, 1.0], axis=1)[0, 0]
    exact = 1.0 / n if name == "softmax" else -np.log(n)
    assert abs(share - exact) <= np.spacing(np.float32(abs(exact)))
    for offset in 0, 1, 17:
        out = buffer[offset : offset + n]
        function(x, np.inf, out=out)
        assert (out == share).all()
        assert (buffer[:offset] == 9).all()
        assert (buffer[offset + n :] == 9).all()
        buffer[:] = 9


@of_all_floats
@at_all_temperatures
@pytest.mark.parametrize("value", [0.0, -2.5, 1000.0])
def test_one_entry_has_all_the_mass(dtype, temperature, value):
    check([value], temperature, dtype, softmax=[1], logsumexp=value, entropy=0)


@at_all_temperatures
@pytest.mark.parametrize("value", [0.0, -5e-324, 1e300])
def test_equal_entries_share_evenly(temperature, value):
    p = fastmax.softmax(np.full(5, value), temperature)
    np.testing.assert_array_equal(p, np.full(5, 0.2))


@pytest.mark.parametrize("gap", [5e-324, 1e-300, 1.0, 1e300])
def test_temperature_0_sees_the_smallest_gap(gap):
    np.testing.assert_array_equal(fastmax.softmax([gap, 0.0], 0), [1, 0])


def test_temperature_0_holds_neighbouring_floats_apart():
    np.testing.assert_array_equal(fastmax.softmax([1.0, np.nextafter(1, 2)], 0), [0, 1])


def test_zeros_of_either_sign_tie():
    np.testing.assert_array_equal(fastmax.softmax([0.0, -0.0], 0), [0.5, 0.5])


# --- temperatures that overflow or vanish when one divides ----------------------------------------

LARGE = [
    ([1e308, -1e308], 1e308, np.float64),
    ([1.7e308, -1.7e308, 0], 1.7e308, np.float64),
    ([3e38, -3e38], 1e39, np.float32),
    ([-3e38, 3e38, 1e38], 3e38, np.float32),
    ([-3e38, 3e38], 1e300, np.float32),
    ([6e4, -6e4], 1e5, np.float16),
    ([3e38, -3e38], 1e39, ml_dtypes.bfloat16),
    ([5e-324, 0], 5e-324, np.float64),
    ([1e-323, 0, 5e-324], 1e-323, np.float64),
    ([1e-310, 3e-310, -1e-310], 1e-310, np.float64),
    ([1e-45, 0, 4e-45], 1e-45, np.float32),
    ([1e-45, 0, 4e-45], 5e-324, np.float32),
    ([1, 2, 3], 5e-324, np.float64),
    ([1e308, 1e308, 0], 5e-324, np.float64),
    ([1, 2, 3], 1e308, np.float32),
]


@every
@pytest.mark.parametrize(("x", "temperature", "dtype"), LARGE)
def test_temperature_is_exact_in_float64(name, x, temperature, dtype):
    with np.errstate(over="ignore"):
        x = np.asarray(x).astype(dtype)
    oracle.assert_close(name, getattr(fastmax, name)(x, temperature), x, temperature)


def test_large_temperature_of_large_entries():
    # mpmath: 1 / (1 + exp(-2)) and 1 / (1 + exp(2))
    expected = [0.88079707797788243, 0.11920292202211755]
    np.testing.assert_allclose(fastmax.softmax([1e308, -1e308], 1e308), expected, rtol=1e-15)


@every
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_temperature_is_not_rounded_to_the_dtype_of_x(name, dtype):
    x = np.array([100.0, 99.0, 90.0]).astype(dtype)
    oracle.assert_close(name, getattr(fastmax, name)(x, 0.1), x, 0.1)


# --- infinities and NaN ---------------------------------------------------------------------------


@of_all_floats
@at_all_temperatures
def test_minus_inf_has_no_mass(dtype, temperature):
    x = [-np.inf, 0.0, 0.0]
    logsumexp = temperature * np.log(2)
    check(x, temperature, dtype, softmax=[0, 0.5, 0.5], logsumexp=logsumexp, entropy=np.log(2))


@of_all_floats
@at_all_temperatures
def test_single_entry_above_minus_inf(dtype, temperature):
    x = [-np.inf, 2.5, -np.inf]
    check(x, temperature, dtype, softmax=[0, 1, 0], logsumexp=2.5, entropy=0)


@of_all_floats
@at_all_temperatures
@pytest.mark.parametrize("ties", [1, 2, 3])
@pytest.mark.parametrize("others", [[0.0, 1.0], [-np.inf, 5.0], []], ids=str)
def test_plus_inf_entries_share_the_mass(dtype, temperature, ties, others):
    x = others + ties * [np.inf]
    p = len(others) * [0] + ties * [1 / ties]
    check(x, temperature, dtype, softmax=p, logsumexp=np.inf, entropy=np.log(ties))


@of_all_floats
@at_all_temperatures
@pytest.mark.parametrize("others", [[], [1.0, 2.0], [np.inf, 1.0], [-np.inf], [np.inf, -np.inf]])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_nan_makes_the_slice_nan(dtype, temperature, others, position, nan):
    x = [nan, *others] if position == 0 else [*others, nan]
    check(x, temperature, dtype, softmax=len(x) * [np.nan], logsumexp=np.nan, entropy=np.nan)


@every
@at_all_temperatures
@pytest.mark.parametrize("k", [3, 16, 17, 100, 1000, 70000])
def test_nan_anywhere_is_seen(name, temperature, k):
    for position in {0, 1, k // 2, k - 2, k - 1}:
        x = np.linspace(-1, 1, k)
        x[position] = np.nan
        assert np.isnan(getattr(fastmax, name)(x, temperature)).all(), position


@every
@at_all_temperatures
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(9, 40), (300, 301)])
def test_other_slices_are_untouched(name, temperature, axis, shape):
    function = getattr(fastmax, name)
    x = np.random.default_rng(6).normal(size=shape)
    clean = function(x, temperature, axis=axis)
    slices = np.moveaxis(x, axis, -1)
    slices[1, 3], slices[4, 0], slices[5], slices[7, 1] = np.nan, np.inf, -np.inf, -np.inf
    result = function(x, temperature, axis=axis)
    if name in oracle.ELEMENTWISE:
        clean, result = np.moveaxis(clean, axis, -1), np.moveaxis(result, axis, -1)
    untouched = np.setdiff1d(np.arange(len(slices)), [1, 4, 5, 7])
    np.testing.assert_array_equal(result[untouched], clean[untouched])
    assert np.isnan(result[1]).all()


@of_all_floats
@at_all_temperatures
@pytest.mark.parametrize("k", [1, 3, 50])
def test_nothing_but_minus_inf(dtype, temperature, k):
    nan = k * [np.nan]
    check(k * [-np.inf], temperature, dtype, softmax=nan, logsumexp=-np.inf, entropy=np.nan)


@every
@at_all_temperatures
def test_infinities_and_nan_beside_each_other(name, temperature):
    function = getattr(fastmax, name)
    x = np.array(list(itertools.product([-np.inf, 0.0, 1.0, np.inf, np.nan], repeat=3)))
    rows = function(x, temperature, axis=1)
    columns = function(x.T, temperature)
    np.testing.assert_array_equal(columns.T, rows)
    for row, of_row in zip(x, rows, strict=True):
        oracle.assert_close(name, of_row, row, temperature)


# --- subnormal and extreme results ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_probabilities_are_not_flushed(dtype):
    info = ml_dtypes.finfo(dtype)
    tiny, smallest = np.log(float(info.smallest_normal)), np.log(float(info.smallest_subnormal))
    x = np.append(0.0, np.linspace(tiny, smallest, 20)).astype(dtype)
    p = fastmax.softmax(x)
    assert (p > 0).all()
    oracle.assert_close("softmax", p, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gap", [1.0, 30.0, 80.0, 100.0, 700.0, 740.0])
def test_log_softmax_of_the_maximum_is_not_rounded_to_0(dtype, gap):
    x = np.array([gap, 0.0]).astype(dtype)
    oracle.assert_close("log_softmax", fastmax.log_softmax(x), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_beyond_the_range_are_infinite(dtype):
    largest = np.finfo(dtype).max
    assert fastmax.logsumexp(np.array([largest, largest], dtype), float(largest)) == np.inf
    low = fastmax.log_softmax(np.array([largest, -largest], dtype), 0.5)
    np.testing.assert_array_equal(low, np.array([0, -np.inf], dtype))


# --- empties --------------------------------------------------------------------------------------


@at_all_temperatures
@of_all_floats
def test_empty_slice(temperature, dtype):
    for x in [np.zeros(0, dtype), np.zeros((0, 3), dtype)]:
        for name in oracle.ELEMENTWISE:
            result = getattr(fastmax, name)(x, temperature)
            assert (result.shape, result.dtype) == (x.shape, dtype)
        empty = {"logsumexp": -np.inf, "entropy": 0.0}
        for name, value in empty.items():
            result = getattr(fastmax, name)(x, temperature)
            assert (np.shape(result), result.dtype) == (x.shape[1:], dtype)
            assert (np.asarray(result) == value).all()


@every
@pytest.mark.parametrize(
    ("shape", "axis", "reduced"),
    [
        ((3, 0), 0, (0,)),
        ((3, 0), 1, (3,)),
        ((0, 3), 1, (0,)),
        ((0, 0), 0, (0,)),
        ((2, 0, 3), 0, (0, 3)),
        ((2, 0, 3), 1, (2, 3)),
        ((2, 0, 3), -1, (2, 0)),
        ((2, 0, 3), (0, 2), (0,)),
        ((2, 0, 3), (0, 1), (3,)),
        ((2, 0, 3), None, ()),
    ],
)
def test_zero_sizes(name, shape, axis, reduced):
    result = getattr(fastmax, name)(np.zeros(shape, np.float32), axis=axis)
    assert np.shape(result) == (shape if name in oracle.ELEMENTWISE else reduced)
    assert result.dtype == np.float32
    expected = {"logsumexp": -np.inf, "entropy": 0.0}.get(name, 0.0)
    assert (np.asarray(result) == expected).all()


@every
def test_empty_slice_with_where_out_and_temperatures(name):
    function, shape = getattr(fastmax, name), (0, 3)
    expected = function(np.zeros(shape))
    out = np.full_like(expected, 7)
    where = np.zeros(shape, bool)
    assert function(np.zeros(shape), [0.0, 1.0, np.inf], where=where, out=out) is out
    np.testing.assert_array_equal(out, expected)


@every
def test_empty_list_is_float64(name):
    assert getattr(fastmax, name)([]).dtype == np.float64


# --- the limits of logsumexp and entropy ----------------------------------------------------------


@of_all_floats
def test_logsumexp_at_0_is_the_maximum(dtype):
    x = np.random.default_rng(7).normal(size=50).astype(dtype)
    assert fastmax.logsumexp(x, 0) == x.max()


@pytest.mark.parametrize("temperature", FINITE)
def test_logsumexp_of_equal_entries(temperature):
    x = np.zeros(4)
    oracle.assert_close("logsumexp", fastmax.logsumexp(x, temperature), x, temperature)


@of_all_floats
@at_all_temperatures
def test_entropy_of_equal_entries_is_log_k(dtype, temperature):
    x = np.full(12, 3.0).astype(dtype)
    oracle.assert_close("entropy", fastmax.entropy(x, temperature), x, temperature)


@at_all_temperatures
def test_entropy_is_within_0_and_log_k(temperature):
    x = np.random.default_rng(8).normal(size=(200, 30))
    h = fastmax.entropy(x, temperature, axis=1)
    assert (h >= 0).all()
    assert (h <= np.log(30) * (1 + 1e-14)).all()


# --- masks ----------------------------------------------------------------------------------------

# Each is written in another way: rows, narrow rows, wide and long ones; columns that are shallow, fit a tile
# or are tall; interleaved ones. What goes together has slices beside the three in each, and others without.
MASKED = [((19, 300), 1), ((19, 11), 1), ((200, 9001), 1), ((6, 70_001), 1)]
MASKED += [((5, 2100), 0), ((70, 1100), 0), ((3000, 300), 0), ((70, 9, 3), 1), ((2, 17_000, 3), 1)]


@pytest.mark.parametrize("name", ["softmax", *nightly("log_softmax")])
@pytest.mark.parametrize("temperature", [0.7, 0.0, np.inf])
@pytest.mark.parametrize(("shape", "axis"), MASKED)
@pytest.mark.parametrize("dtype", [np.float32, *nightly(ml_dtypes.bfloat16, np.float16, np.float64)])
def test_what_is_masked_counts_for_nothing_whatever_stands_beside_it(name, dtype, shape, axis, temperature):
    """Of three slices one has a NaN that counts, one infinity, one nothing; all have such that do not."""
    function, rng = getattr(fastmax, name), np.random.default_rng(11)
    x, where = rng.normal(size=shape).astype(dtype), rng.random(shape) < 0.6
    where = np.where(where, 2, 0).astype(np.uint8).view(bool)  # True is what is not 0
    entries, counts = np.moveaxis(x, axis, -1), np.moveaxis(where, axis, -1)
    entries[~counts] = np.resize([np.nan, np.inf, -np.inf, 1e4], np.count_nonzero(~counts)).astype(dtype)
    first, second, third = list(np.ndindex(entries.shape[:-1]))[:3]
    for of_slice, value in (first, np.nan), (second, np.inf):
        entries[of_slice][np.flatnonzero(counts[of_slice])[-1]] = value
    counts[third] = False
    result = np.moveaxis(function(x, temperature, axis=axis, where=where), axis, -1).astype(float)
    absent = result[~counts]
    assert (absent == (0.0 if name == "softmax" else -np.inf)).all()
    assert (np.signbit(absent) == (name == "log_softmax")).all()
    rtol = 4 * float(ml_dtypes.finfo(dtype).eps)
    every_seventh = list(np.ndindex(entries.shape[:-1]))[::7]
    for of_slice in first, second, *every_seventh:
        expected = function(entries[of_slice][counts[of_slice]], temperature).astype(float)
        np.testing.assert_allclose(result[of_slice][counts[of_slice]], expected, rtol)


# --- warnings -------------------------------------------------------------------------------------


@every
@at_all_temperatures
@of_all_floats
@pytest.mark.parametrize("axis", [0, 1])
def test_no_floating_point_warnings(name, temperature, dtype, axis):
    values = [0, 1, -1, 6e4, -6e4, np.inf, -np.inf, np.nan]
    x = np.array(list(itertools.product(values, repeat=2))).astype(dtype)
    function = getattr(fastmax, name)
    with np.errstate(all="raise", under="ignore"):
        result = function(x, temperature, axis=axis)
        function(x[::2, ::-1], temperature, axis=axis)
    assert result.dtype == dtype
