"""Faults that were found once, each with the smallest input that showed it."""

import os
import sys

import ml_dtypes
import mpmath
import numpy as np
import oracle
import pytest
from marks import nightly

import fastmax

FUNCTIONS = [getattr(fastmax, name) for name in oracle.FUNCTIONS]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axis", [(1, 0), (-1, -2), (-1, 0)])
def test_order_of_axes_does_not_matter(function, axis):
    x = np.arange(6.0).reshape(2, 3)
    temperature = [1.0, 2.0]
    got = function(x, temperature, axis=axis)
    flat = function(x.reshape(-1), temperature, axis=-1)
    if got.ndim > 1:
        first = (0, 1) if axis == (1, 0) else (-2, -1) if axis == (-1, -2) else (0, -1)
        assert np.array_equal(got, function(x, temperature, axis=first))
        got = np.moveaxis(got, first, (-2, -1)).reshape(2, 6)
    assert np.array_equal(got, flat)


@pytest.mark.parametrize("function", FUNCTIONS[:2])
def test_out_in_another_order_with_axes_unsorted(function):
    x = np.random.default_rng(0).normal(size=(2, 3))
    out = np.empty((2, 3), order="F")
    function(x, axis=(1, 0), out=out)
    assert np.array_equal(out, function(x, axis=None))


@pytest.mark.parametrize(
    ("x", "temperature"), [([1.5e31, -3.4028235e38], 1e27), ([2.0**113, -3.4028235e38], 2.0**99)]
)
def test_a_gap_near_the_largest_float_does_not_overflow(x, temperature):
    """The logarithm of the lesser probability was -inf."""
    x = np.array(x, np.float32)
    exact = (x.astype(np.float64) - x.max()) / temperature
    for layout in (x, np.tile(x, (40, 1)).T):
        found = fastmax.log_softmax(layout, temperature)
        np.testing.assert_allclose(found, np.broadcast_to(exact, found.T.shape).T, rtol=4e-7)


def test_sign_of_a_zero_maximum_does_not_depend_on_its_place():
    x = np.full(70_000, -0.0)
    x[:16384] = 0.0
    assert not np.signbit(fastmax.logsumexp(x, 0.0))
    assert not np.signbit(fastmax.logsumexp(x[::-1], 0.0))


@pytest.mark.parametrize(
    ("x", "temperature"),
    [
        ([-0.40489602, -3.3557775, -87.0287], 1.0),
        ([-0.7611824, -87.41787], 1.0),
        (["0x1.4cf2fap+4", "0x1.cc9e76p+0", "-0x1.f7559cp+6"], 1.6921969762665947),
    ],
)
def test_smallest_normal_results_are_rounded_once(x, temperature):
    """They were off by 1.93 to 2.06 ulp: a part of them was rounded as a subnormal number."""
    x = np.array([entry if isinstance(entry, float) else float.fromhex(entry) for entry in x], np.float32)
    exact = np.exp((x.astype(np.float64) - x.max()) / temperature)
    exact /= exact.sum()
    error = np.abs(fastmax.softmax(x, temperature) - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() <= 1.7


def test_equal_terms_that_share_the_mass():
    a, b = float.fromhex("-0x1.3d285ep+1"), float.fromhex("-0x1.595af4p-2")
    x = np.array([0, a, b, b, a, a, b, b, b, b], np.float32)
    exact = np.exp(x.astype(np.float64))
    exact /= exact.sum()
    error = np.abs(fastmax.softmax(x) - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() <= 2.0


@pytest.mark.parametrize(
    ("x", "temperature"),
    [
        (np.array([62.85108947753906, 61.60132598876953, 25.34601402282715], np.float32), 1.4428899364052266),
        (
            np.array([-0.01002720557153225, -0.18854375183582306, -7.2728705406188965], np.float32),
            0.2034576071457893,
        ),
        (
            np.array([194394749.7157669, 194394744.7530068, 194394424.20507106], np.float64),
            5.9837489699887225,
        ),
    ],
)
def test_terms_half_way_between_powers_of_two(x, temperature):
    """They were off by 2.1 to 2.2 ulp where the fraction of the exponent was rounded once more."""
    oracle.assert_close("softmax", fastmax.softmax(x, temperature), x, temperature)


def test_underflow_in_float16_is_silent():
    with np.errstate(all="raise"):
        assert fastmax.softmax(np.array([0, -12, -30], np.float16))[2] == 0


@pytest.mark.parametrize("k", [12, 24, 150])
def test_converted_slices_have_the_same_bits_alone_and_in_a_batch(k):
    x = np.random.default_rng(1).normal(size=(k, 3000)).astype(np.float32) * 5
    where = np.ones(x.shape, bool)
    where[0] = False
    for array, mask in [(x, where), (x.astype(">f4"), None), ((100 * x).astype(np.int32), None)]:
        batch = fastmax.softmax(array, 9.0, where=mask)
        for j in range(0, 3000, 7):
            alone = fastmax.softmax(array[:, j], 9.0, where=None if mask is None else mask[:, j])
            assert np.array_equal(alone, batch[:, j])


def test_a_narrow_row_has_the_same_bits_alone_and_in_a_batch():
    # fmt: off
    x = np.array([
        -0.6260652, -0.27663696, -0.56794024, -0.10004708, -0.46018118, -0.15957637, -0.21813466, -0.47586685,
        -0.5344806, -0.59623796, -0.2881562, -0.11081152, -0.23281942, -0.54480743, -0.31122634, -0.04370748,
        -0.10488898, -0.5441281, -0.5007863, -0.24895565, -0.4649864, -0.5049004, -0.43679592, -0.63156945,
        -0.25645283, -0.36596373, -0.44642478, -0.63969004, -0.5401571, -0.29269025, -0.4628082, -0.49755606,
        -0.13867666, -0.3661588, -0.6263342, -0.26642004,
    ], np.float32)
    # fmt: on
    batch = fastmax.softmax(np.stack([x, x]), axis=1)
    assert np.array_equal(batch[0], fastmax.softmax(x))


def test_nan_has_the_same_bits_alone_and_in_a_batch():
    x = np.array([[1.0, 1.0], [np.nan, 2.0], [3.0, 4.0]])
    alone = fastmax.log_softmax(x[:, 0])
    assert alone.tobytes() == fastmax.log_softmax(x)[:, 0].tobytes()


def test_a_masked_array_as_where_is_refused():
    with pytest.raises(TypeError, match="where must not be a masked array"):
        fastmax.softmax([1.0, 2.0], where=np.ma.array([True, True], mask=[False, True]))


def test_strings_of_variable_length_are_refused_by_name():
    with pytest.raises(TypeError, match="StringDType"):
        fastmax.softmax(np.array(["1"], np.dtypes.StringDType()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_of_a_parent_with_threads_computes():
    x = np.random.default_rng(2).normal(size=(300, 400))
    expected = fastmax.softmax(x)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(fastmax.softmax(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [3, 31, 33, 40, 64, 100, 257, 1000, 4000, 40_000])
def test_logarithms_of_many_equal_terms_far_below_the_maximum(dtype, n):
    """All that is left of their sum is an error of the maximum: summed plainly, it is off by 5.3 ulp."""
    rng = np.random.default_rng(n)
    gaps = rng.uniform(15, 90, 100) if dtype is np.float32 else rng.uniform(34, 700, 100)
    gaps = gaps[: max(4, 20_000 // n)].astype(dtype)
    rows = np.repeat(-gaps[:, None], n, axis=1)
    rows[:, n // 3] = 0.0
    exact = [-mpmath.log1p((n - 1) * mpmath.exp(-mpmath.mpf(float(gap)))) for gap in gaps]
    for x, axis in ((rows, 1), (np.ascontiguousarray(rows.T), 0), (np.repeat(rows, 2, axis=1)[:, ::2], 1)):
        found = fastmax.log_softmax(x, axis=axis).max(axis=axis)
        for value, expected in zip(found, exact, strict=True):
            assert abs(mpmath.mpf(float(value)) - expected) <= 3.0 * np.spacing(dtype(float(-expected)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *nightly(np.float16, ml_dtypes.bfloat16)])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((40, 5), 1),  # narrow rows
        ((40, 70), 1),
        ((40, 40_000), 1),  # wide ones
        ((3, 200_000), 1),  # long ones
        ((70, 40), 0),
        ((2500, 40), 0),  # tall columns
    ],
)
def test_nan_of_either_sign_makes_every_result_nan(dtype, shape, axis):
    """A shorter logarithm took it for a number."""
    for sign in 1.0, -1.0:
        x = np.zeros(shape, dtype)
        x[tuple(n // 3 for n in shape)] = np.copysign(dtype(np.nan), sign)
        own = shape[1 - axis] // 3
        for function in FUNCTIONS:
            result = function(x, axis=axis)
            slices = result if result.ndim == 1 else np.moveaxis(result, axis, -1)
            assert np.isnan(slices[own]).all()
            assert not np.isnan(np.delete(slices, own, axis=0)).any()


def test_logsumexp_of_minus_zero_alone():
    for temperature in 0.5, 1.0, 2.0, 1e30, np.inf:
        for x in [-0.0], [-0.0, -np.inf], [0.0]:
            assert np.copysign(1.0, fastmax.logsumexp(x, temperature)) == 1.0


def test_strided_entries_by_the_ten_millions():
    """Each of as many equal entries gets its share: float32 ones were off by 4 ulp."""
    n = 4 * 10**7
    share = fastmax.softmax(np.ones(n, np.float32)[::-1])[:3]
    assert np.all(abs(share.astype(float) * n - 1.0) <= 2.0**-24)


@pytest.mark.parametrize("n", [20_000, 2**20])
@pytest.mark.parametrize("layout", ["row", "columns", "strided", "masked", "vector"])
@pytest.mark.parametrize("gap", [16.7, 19.0])
def test_many_terms_below_half_an_ulp_of_the_largest_count(layout, n, gap):
    """Their sum is lost to no rounding: the results of these were up to 60,000 ulp too small."""
    x = np.full(n, -gap, np.float32)
    x[n // 3] = 0.0
    match layout:
        case "row":
            result = fastmax.softmax(np.stack([x, x]), axis=1)[1]
        case "columns":
            result = fastmax.softmax(np.stack([x] * 3, axis=1), axis=0)[:, 1]
        case "strided":
            result = fastmax.softmax(np.repeat(x, 2)[::2])
        case "masked":
            result = fastmax.softmax(np.append(x, 5.0).astype(np.float32), where=np.arange(n + 1) < n)[:n]
        case _:
            result = fastmax.softmax(x)
    small = np.exp(np.float64(x[0]))
    expected = np.array([small, 1.0]) / (1.0 + (n - 1) * small)
    found = np.array([result[0], result[n // 3]])
    assert np.all(np.abs(found - expected) <= 1.0 * np.spacing(expected.astype(np.float32)))
    assert np.all(result[np.arange(n) != n // 3] == result[0])
