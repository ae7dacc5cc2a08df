"""Exact values of the four functions on one slice, from mpmath, and the error of a result.

The inputs are floats and convert exactly; the values are computed with 200 bits. Equal entries
have equal values, so only the distinct entries are computed: a slice of 10^7 entries drawn from a
pool of 1000 values costs 1000 exponentials, and still every entry of a result is compared.
"""

from typing import Any, NamedTuple

import ml_dtypes
import mpmath
import numpy as np
from numpy.typing import ArrayLike

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "entropy")
ELEMENTWISE = ("softmax", "log_softmax")
ABSENT = {
    "softmax": 0.0,
    "log_softmax": -np.inf,
}  # what entries come out as where the mask is False

# The largest error allowed. float16 and bfloat16 results are float32 results rounded once: half
# a unit in their last place is taken off before the error is held against the float32 column.
TOLERANCE = {
    # in ulp of the exact value; below the normal range the ulp is the smallest subnormal
    "softmax": {"float32": 2.0, "float64": 2.0},
    "log_softmax": {"float32": 4.0, "float64": 4.0},
    # in ulp of the largest of |max(x)|, |T log(sum)| and |result|
    "logsumexp": {"float32": 4.0, "float64": 4.0},
    # in multiples of log(number of entries)
    "entropy": {"float32": 1e-6, "float64": 1e-14},
}

BITS = 200
NEGLIGIBLE = -5000  # exp(-5000) is 0 in every dtype and far below the last bit of every sum

Real = Any  # an mpmath.mpf; mpmath has no types to name


class Exact(NamedTuple):
    """The exact values for one slice, given its distinct entries in ascending order."""

    softmax: list[Real]  # of each distinct entry
    log_softmax: list[Real]
    logsumexp: Real
    entropy: Real
    magnitude: Real  # the largest of |max(x)|, |T log(sum)| and |logsumexp|


class Grid(NamedTuple):
    """Exact values as (whole + fraction) * 2**exponent, in the unit in which errors count."""

    whole: np.ndarray
    fraction: np.ndarray
    exponent: np.ndarray
    rounding: np.ndarray  # half an ulp of a 16-bit result, else 0
    factor: float  # from that unit to the unit of TOLERANCE


class Expected(NamedTuple):
    """What the four functions are to return for one slice."""

    dtype: np.dtype
    present: np.ndarray  # where the mask is True
    inverse: np.ndarray  # which distinct entry each present entry is
    exact: Exact
    grids: dict[str, Grid]


def expect(x, temperature=1.0, where: ArrayLike = True):
    """Return the exact values for the 1-d slice x, with what it takes to compare with them."""
    x = np.asarray(x)
    dtype = np.dtype(np.float64) if x.dtype.kind in "biu" else x.dtype.newbyteorder("=")
    present = np.broadcast_to(np.asarray(where), x.shape)
    distinct, inverse, counts = np.unique(
        x[present].astype(np.float64), return_inverse=True, return_counts=True
    )
    with mpmath.workprec(BITS):
        exact = _exact([mpmath.mpf(float(v)) for v in distinct], counts.tolist(), temperature)
        log_count = float(mpmath.log(max(inverse.size, 1)))
        entropy = _grid([exact.entropy], dtype, exact.entropy)
        # one entry has entropy log(1) = 0 and no tolerance: any error counts
        unit = np.ldexp(1.0, entropy.exponent[0]) / log_count if log_count else np.inf
        grids = {
            "softmax": _grid(exact.softmax, dtype),
            "log_softmax": _grid(exact.log_softmax, dtype),
            "logsumexp": _grid([exact.logsumexp], dtype, exact.magnitude),
            "entropy": entropy._replace(factor=unit),
        }
    return Expected(dtype, present, inverse, exact, grids)


def _exact(distinct, counts, temperature):
    nan, inf, zero = mpmath.nan, mpmath.inf, mpmath.mpf(0)
    if not distinct:
        return Exact([], [], -inf, zero, zero)
    if any(mpmath.isnan(value) for value in distinct):
        return Exact(len(distinct) * [nan], len(distinct) * [nan], nan, nan, nan)
    largest = distinct[-1]
    if largest == -inf:
        return Exact([nan], [nan], -inf, nan, zero)

    gaps = [_gap(value, largest, mpmath.mpf(float(temperature))) for value in distinct]
    weights = [mpmath.exp(gap) if gap > NEGLIGIBLE else zero for gap in gaps]
    # all but one maximal entry, so that log1p keeps every digit of the logarithm of a sum near 1
    ties = sum(count for count, gap in zip(counts, gaps, strict=True) if gap == 0)
    others = [c * w for c, w, gap in zip(counts, weights, gaps, strict=True) if gap < 0]
    rest = mpmath.fsum(others) + (ties - 1)
    log_sum = mpmath.log1p(rest)
    softmax = [weight / (1 + rest) for weight in weights]
    entropy = log_sum - mpmath.fsum(c * p * gap for c, p, gap in zip(counts, softmax, gaps, strict=True) if p)
    growth = temperature * log_sum if log_sum else zero  # 0 at T = inf if one entry has all mass
    logsumexp = largest + growth
    magnitude = max(abs(largest), abs(growth), abs(logsumexp))
    return Exact(softmax, [gap - log_sum for gap in gaps], logsumexp, entropy, magnitude)


def _gap(value, largest, temperature):
    """Return (value - largest) / T, with its limits."""
    if value == largest:
        return mpmath.mpf(0)
    if mpmath.isinf(value) or mpmath.isinf(largest) or temperature == 0:
        return -mpmath.inf
    return mpmath.mpf(0) if temperature == mpmath.inf else (value - largest) / temperature


def _grid(values, dtype, magnitude=None):
    """Return values on the grid of the dtype they are computed in, of ulp(magnitude or value)."""
    whole, fraction, exponent, rounding = np.zeros((4, len(values)))
    largest = int(ml_dtypes.finfo(dtype).maxexp)
    for i, value in enumerate(values):
        if not mpmath.isfinite(value) or abs(value) >= mpmath.ldexp(1, largest):
            whole[i] = np.copysign(np.inf, float(mpmath.sign(value))) if value == value else np.nan
            continue
        exponent[i] = _ulp_exponent(value if magnitude is None else magnitude, _computed_in(dtype))
        scaled = mpmath.ldexp(value, -int(exponent[i]))
        whole[i] = float(mpmath.nint(scaled))
        fraction[i] = float(scaled - mpmath.nint(scaled))
        if dtype.itemsize == 2:
            rounding[i] = np.ldexp(0.5, _ulp_exponent(value, dtype) - int(exponent[i]))
    return Grid(whole, fraction, exponent.astype(int), rounding, 1.0)


def _computed_in(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _ulp_exponent(value, dtype):
    """Return e where 2**e is the spacing of a dtype's floats at an exact value."""
    info = ml_dtypes.finfo(dtype)
    smallest = int(info.minexp) - int(info.nmant)
    exponent = int(mpmath.frexp(value)[1]) - 1 - int(info.nmant) if value else smallest
    return max(exponent, smallest)


def errors(name, result, expected):
    """Return the error of each entry of a result, in the unit of TOLERANCE."""
    result = np.asarray(result).astype(np.float64)
    grid, infinity = expected.grids[name], int(ml_dtypes.finfo(expected.dtype).maxexp)
    if name not in ELEMENTWISE:
        return _distance(result.reshape(1), grid, np.zeros(1, int), infinity)
    found = np.where(result == ABSENT[name], 0.0, np.inf)
    found[expected.present] = _distance(result[expected.present], grid, expected.inverse, infinity)
    return found


def _distance(result, grid, inverse, infinity):
    """Return |result - grid[inverse]|; an infinite result counts as 2**infinity."""
    whole, exponent = grid.whole[inverse], grid.exponent[inverse]
    infinite = np.isinf(result)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.ldexp(
            np.where(infinite, np.sign(result), result),
            np.where(infinite, infinity, 0) - exponent,
        )
        distance = np.abs((scaled - whole) - grid.fraction[inverse])
        distance = np.maximum(distance - grid.rounding[inverse], 0.0)
        # an infinite factor: the exact value is 0 and the result must be
        distance = np.where(distance == 0, 0.0, distance * grid.factor)
    same = (result == whole) | (np.isnan(result) & np.isnan(whole))
    finite = np.isfinite(whole) & ~np.isnan(result)
    return np.where(finite, distance, np.where(same, 0.0, np.inf))


def fault(name, result, expected):
    """Say in one line how a result breaks the rules; return "" if it does not."""
    result = np.asarray(result)
    shape = expected.present.shape if name in ELEMENTWISE else ()
    if result.shape != shape or result.dtype != expected.dtype:
        return f"{name}: {result.dtype} {result.shape}, not {expected.dtype} {shape}"
    found = errors(name, result, expected)
    tolerance = TOLERANCE[name][_computed_in(expected.dtype).name]
    if found.max(initial=0.0) <= tolerance:
        return ""
    worst = int(found.argmax())
    return (
        f"{name}: entry {worst} of {shape} is {result.flat[worst]!r}, exactly "
        f"{_exact_digits(name, expected, worst)}: an error of {found[worst]:.4g} > {tolerance}"
    )


def _exact_digits(name, expected, position):
    if name not in ELEMENTWISE:
        return mpmath.nstr(getattr(expected.exact, name), 20)
    if not expected.present[position]:
        return f"{ABSENT[name]} (masked)"
    index = expected.inverse[np.count_nonzero(expected.present[:position])]
    return mpmath.nstr(getattr(expected.exact, name)[index], 20)


def rounded(value, dtype):
    """Return an exact value correctly rounded to a dtype."""
    if not mpmath.isfinite(value):
        return np.dtype(dtype).type(float(value))
    exponent = _ulp_exponent(value, np.dtype(dtype))
    with mpmath.workprec(BITS):
        units = float(mpmath.mpf(mpmath.nint(mpmath.ldexp(value, -exponent))))
    with np.errstate(over="ignore"):
        return np.ldexp(units, exponent).astype(dtype)


def assert_close(name, result, x, temperature=1.0, where: ArrayLike = True):
    """Assert that the result of a function for the 1-d slice x obeys the rules."""
    assert fault(name, result, expect(x, temperature, where)) == ""
