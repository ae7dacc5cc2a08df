"""Wrong functions and wrong results, every one of which the conformance suite must refuse."""

import ml_dtypes
import mpmath
import numpy as np
import oracle
import pytest
from conformance import failures
from paths import PATHS

import fastmax

CHECKED = ("vector", "rows", "columns", "masked", "masked columns")


def constant(x, /, temperature=1.0, *, axis=0, where=None):
    """The constant 1/n."""
    return fastmax.softmax(x, np.inf, axis=axis, where=where)


def wrong_axis(x, /, temperature=1.0, *, axis=0, where=None):
    return fastmax.softmax(x, temperature, axis=x.ndim - 1 - axis % x.ndim, where=where)


def temperature_ignored(x, /, temperature=1.0, *, axis=0, where=None):
    return fastmax.softmax(x, axis=axis, where=where)


def temperature_multiplied(x, /, temperature=1.0, *, axis=0, where=None):
    with np.errstate(divide="ignore", over="ignore"):
        return fastmax.softmax(x, np.float64(1) / temperature, axis=axis, where=where)


def temperature_of_the_dtype(x, /, temperature=1.0, *, axis=0, where=None):
    with np.errstate(over="ignore"):
        rounded = np.asarray(temperature).astype(np.float32)
    return fastmax.softmax(x, rounded, axis=axis, where=where)


def mask_ignored(x, /, temperature=1.0, *, axis=0, where=None):
    return fastmax.softmax(x, temperature, axis=axis)


def masked_entries_left_over(x, /, temperature=1.0, *, axis=0, where=None):
    p = fastmax.softmax(x, temperature, axis=axis, where=where)
    return p if where is None else np.where(where, p, x)


def no_max_shift(x, /, temperature=1.0, *, axis=0, where=None):
    with np.errstate(all="ignore"):
        e = np.exp(x.astype(float) / temperature)
        if where is not None:
            e = np.where(where, e, 0)
        return (e / e.sum(axis=axis, keepdims=True)).astype(x.dtype)


def rounded_on_the_way(x, /, temperature=1.0, *, axis=0, where=None):
    """SciPy's and PyTorch's way: x / T, the gaps, their exponentials and the sum in x's dtype."""
    with np.errstate(all="ignore"):
        x = x if where is None else np.where(where, x, x.dtype.type(-np.inf))
        scaled = x / x.dtype.type(temperature)
        e = np.exp(scaled - scaled.max(axis=axis, keepdims=True, initial=-np.inf))
        return e / e.sum(axis=axis, keepdims=True)


def float32_accumulation(x, /, temperature=1.0, *, axis=0, where=None):
    """The right terms, added up one by one in float32."""
    p = fastmax.softmax(x, temperature, axis=axis, where=where)
    sums = np.moveaxis(np.cumsum(p, axis=axis, dtype=np.float32), axis, -1)
    with np.errstate(all="ignore"):
        return p / np.moveaxis(sums[..., -1:], -1, axis).astype(x.dtype)


def subnormals_flushed(x, /, temperature=1.0, *, axis=0, where=None):
    p = fastmax.softmax(x, temperature, axis=axis, where=where)
    return np.where(p < np.finfo(x.dtype).smallest_normal, p.dtype.type(0), p)


def nan_passed_over(x, /, temperature=1.0, *, axis=0, where=None):
    present = ~np.isnan(x) if where is None else where & ~np.isnan(x)
    return fastmax.softmax(x, temperature, axis=axis, where=present)


def neighbours_change_the_result(x, /, temperature=1.0, *, axis=0, where=None):
    """One NaN anywhere spoils the batch."""
    p = fastmax.softmax(x, temperature, axis=axis, where=where)
    return p * p.dtype.type(0) + p if not np.isnan(p).any() else np.full_like(p, np.nan)


def float64_results(x, /, temperature=1.0, *, axis=0, where=None):
    return fastmax.softmax(x, temperature, axis=axis, where=where).astype(np.float64)


CONTROLS = [
    (constant, np.float32),
    (constant, np.float64),
    (wrong_axis, np.float32),
    (wrong_axis, np.float64),
    (temperature_ignored, np.float32),
    (temperature_ignored, np.float64),
    (temperature_multiplied, np.float32),
    (temperature_of_the_dtype, np.float32),
    (temperature_of_the_dtype, np.float64),
    (no_max_shift, np.float32),
    (no_max_shift, np.float64),
    (rounded_on_the_way, np.float32),
    (rounded_on_the_way, np.float64),
    (float32_accumulation, np.float32),
    (float32_accumulation, np.float64),
    (subnormals_flushed, np.float32),
    (subnormals_flushed, np.float64),
    (nan_passed_over, np.float32),
    (neighbours_change_the_result, np.float64),
    (float64_results, np.float32),
]


@pytest.mark.parametrize(("control", "dtype"), CONTROLS)
def test_wrong_functions_are_refused(control, dtype):
    assert any(failures(control, "softmax", PATHS[path], dtype) for path in CHECKED)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_checked_paths_accept_the_package(dtype):
    """What the controls are refused for is what they do wrong, not the paths they take."""
    found = [failures(fastmax.softmax, "softmax", PATHS[path], dtype) for path in CHECKED]
    assert found == [[]] * len(CHECKED)


@pytest.mark.parametrize("path", ["masked", "masked columns"])
@pytest.mark.parametrize("control", [mask_ignored, masked_entries_left_over])
def test_wrong_masks_are_refused(control, path):
    with pytest.raises(AssertionError, match="absent"):
        failures(control, "softmax", PATHS[path], np.float64)


# --- the oracle -----------------------------------------------------------------------------------

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def exact_results(name, x, temperature):
    """Return the correctly rounded results for a slice."""
    expected = oracle.expect(x, temperature)
    if name not in oracle.ELEMENTWISE:
        return oracle.rounded(getattr(expected.exact, name), expected.dtype)
    distinct = [oracle.rounded(value, expected.dtype) for value in getattr(expected.exact, name)]
    return np.array(distinct, expected.dtype)[expected.inverse]


def nudged(x, steps):
    """Return x moved by a number of floats of its dtype away from 0."""
    bits = x.view(np.dtype(f"i{x.dtype.itemsize}"))
    return (bits + np.asarray(steps, bits.dtype)).view(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 1e300, np.inf])
def test_rounded_exact_values_are_accepted(name, dtype, temperature):
    x = np.random.default_rng(13).normal(scale=3, size=30).astype(dtype)
    oracle.assert_close(name, exact_results(name, x, temperature), x, temperature)


@pytest.mark.parametrize(("name", "steps"), [("softmax", 3), ("log_softmax", 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_entry_a_few_floats_off_is_refused(name, steps, dtype):
    x = np.random.default_rng(14).normal(scale=30, size=30).astype(dtype)
    expected, right = oracle.expect(x), exact_results(name, x, 1.0)
    for position in range(len(x)):
        wrong = right.copy()
        wrong[position] = nudged(right, steps)[position]
        assert oracle.fault(name, wrong, expected).startswith(f"{name}: entry {position} ")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", oracle.ELEMENTWISE)
def test_one_float_off_in_16_bits_is_refused(name, dtype):
    x = np.random.default_rng(15).normal(size=30).astype(dtype)
    expected, right = oracle.expect(x), exact_results(name, x, 1.0)
    for step in (1, -1):
        assert oracle.fault(name, nudged(right, step), expected) != ""


def test_errors_in_the_subnormal_range_count_in_the_smallest_subnormal():
    x = np.array([0.0, -740.0])
    expected = oracle.expect(x)
    with mpmath.workprec(oracle.BITS):
        exact = expected.exact.softmax[0] / mpmath.ldexp(1, -1074)
        fraction = abs(float(exact - mpmath.nint(exact)))
    p = exact_results("softmax", x, 1.0)
    assert oracle.errors("softmax", p, expected)[1] == pytest.approx(fraction)
    p[1] += 4 * 5e-324
    assert oracle.fault("softmax", p, expected) != ""
    p[1] = 0.0
    assert oracle.fault("softmax", p, expected) != ""


@pytest.mark.parametrize(("name", "unit"), [("logsumexp", 5), ("entropy", 60)])
def test_scalars_a_few_floats_off_are_refused(name, unit):
    x = np.random.default_rng(16).normal(size=30)
    right = exact_results(name, x, 1.0)
    assert oracle.fault(name, right * (1 + unit * 2.0**-52), oracle.expect(x)) != ""
    assert oracle.fault(name, right * (1 - unit * 2.0**-51), oracle.expect(x)) != ""


@pytest.mark.parametrize("name", oracle.FUNCTIONS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_wild_results_are_refused(name, wrong):
    x = np.array([1.0, 2.0, 3.0])
    result = np.full(np.shape(exact_results(name, x, 1.0)), wrong)
    assert oracle.fault(name, result, oracle.expect(x)) != ""


@pytest.mark.parametrize("name", oracle.FUNCTIONS)
def test_results_of_another_shape_or_dtype_are_refused(name):
    x = np.array([1.0, 2.0, 3.0])
    right = exact_results(name, x, 1.0)
    assert oracle.fault(name, right.astype(np.float32), oracle.expect(x)) != ""
    assert oracle.fault(name, right[np.newaxis], oracle.expect(x)) != ""
