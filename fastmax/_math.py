"""The mathematics: terms 2**(x c - N), their sums, and what each function makes of them.

With c = log2(e) / T, exp(x / T) = 2**(x c). Rounding x - max or x / T first, as is usual, costs a term of
probability p about log2(1 / p) ulp; so c is held as high + low, N is the integer nearest to max c, and

    n = round(x c),    f = (x high - n) + x low in [-1/2, 1/2],    term = 2**f * 2**(n - N + BIAS).

The bias keeps the terms of the smallest results normal, so that only the last multiplication can round to
a subnormal. The limits are ordinary values here: c = 0 with a cutoff at the maximum is T = 0, c = 0 with a
cutoff at the lowest finite number is T = inf, and a slice in which nothing passes the cutoff has the sum 0
and the results 0 / 0. NaN passes every cutoff (comparisons with it are false) and so reaches the sum.

Every function takes floats or lanes of float32 or float64, and every pair of constants is (float32's,
float64's).
"""

import math
from collections import namedtuple

from fastmax._jit import jit
from fastmax._lanes import (
    constant,
    every,
    fma,
    horner,
    lower_half,
    select,
    spread,
    times_power_of_two,
    upper_half,
)

LOG2_E_HIGH = 1.4426950408889634
LOG2_E_LOW = 2.0355273740931033e-17

# Terms lie between 2**(BIAS - DEPTH) and 2**BIAS: DEPTH reaches below the smallest subnormal by so much that
# 2**24 dropped terms together stay under half of it, and 2**31 terms of 2**BIAS do not overflow.
BIAS = (56.0, 512.0)
DEPTH = (180.0, 1110.0)

# Adding ROUNDER rounds to an integer, which is left in the low bits. For terms these bits are to be an
# exponent field, so the rounder also brings BIAS and the format's own bias (127, 1023).
ROUNDER = (1.5 * 2.0**23, 1.5 * 2.0**52)
TERM_ROUNDER = (ROUNDER[0] + BIAS[0] + 127.0, ROUNDER[1] + BIAS[1] + 1023.0)

# |max c| up to which x c needs no shift of x: high is off by 2**-25 (2**-54) of itself, so f leaves
# [-1/2, 1/2] by at most 2**-9 (2**-14), which the polynomial covers and low then corrects.
REACH = (2.0**16, 2.0**40)
# Range of c in which high and low are far from the ends of the exponent range.
LARGEST_MULTIPLIER = (2.0**100, 2.0**900)
LARGEST = (3.4028234663852886e38, 1.7976931348623157e308)
# Temperatures are scaled by a power of two within these exponents: beyond them all gaps are 0 or infinite.
LARGEST_EXPONENT = (250.0, 1074.0)
LARGEST_GAP_EXPONENT = (375.0, 1080.0)

EXP2 = (
    (
        1.0,
        float.fromhex("0x1.62e4300000000p-1"),
        float.fromhex("0x1.ebfbdc0000000p-3"),
        float.fromhex("0x1.c6af740000000p-5"),
        float.fromhex("0x1.3b2dda0000000p-7"),
        float.fromhex("0x1.5f0df20000000p-10"),
        float.fromhex("0x1.4177fe0000000p-13"),
    ),
    (
        1.0,
        float.fromhex("0x1.62e42fefa39efp-1"),
        float.fromhex("0x1.ebfbdff82c59ep-3"),
        float.fromhex("0x1.c6b08d704a0c9p-5"),
        float.fromhex("0x1.3b2ab6fba0c38p-7"),
        float.fromhex("0x1.5d87fe78b5c5ep-10"),
        float.fromhex("0x1.4309130d3f1bfp-13"),
        float.fromhex("0x1.ffcbfbf13b48dp-17"),
        float.fromhex("0x1.62bfca8ac46dcp-20"),
        float.fromhex("0x1.b52617221deb2p-24"),
        float.fromhex("0x1.e617af044bf66p-28"),
        float.fromhex("0x1.e80a9955adc56p-32"),
    ),
)

Scale = namedtuple("Scale", "high low rounder cutoff shifted shift factor factor2")
Scale.__doc__ = """How the terms of a slice follow from its entries; see `terms`."""

Gap = namedtuple("Gap", "row_max prescale factor inverse cutoff log_sum")
Gap.__doc__ = """How (x - max) / T - log_sum follows from x; see `log_terms`."""


# -- terms ----------------------------------------------------------------------------------------


@jit
def multiplier(temperature, like):
    """log2(e) / T as a pair high + low in the dtype of ``like``."""
    high = LOG2_E_HIGH / temperature
    low = (fma(-high, temperature, LOG2_E_HIGH) + LOG2_E_LOW) / temperature
    rounded = spread(high, like)
    return rounded, spread((high - rounded) + low, like)


@jit(inline="always")
def is_plain(row_max, high):
    """Whether the terms can be had from x itself, with no shift and no power of two."""
    octaves = row_max * high
    size = select(octaves < spread(0.0, octaves), -octaves, octaves)
    return every(size < constant(REACH, octaves))


@jit(inline="always")
def plain_scale(row_max, high, low):
    """Scale of a slice (or of one slice per lane) for which `is_plain` holds."""
    one = spread(1.0, row_max)
    zero = spread(0.0, row_max)
    rounder = constant(ROUNDER, row_max)
    octave = fma(row_max, high, rounder) - rounder
    return Scale(
        high,
        low,
        constant(TERM_ROUNDER, row_max) - octave,
        (octave - constant(DEPTH, row_max)) / high,
        False,
        zero,
        one,
        one,
    )


@jit
def scale_of(row_max, temperature):
    """Scale of a slice from its maximum (NaN left out; -inf if there is none) and T in [0, inf]."""
    zero = spread(0.0, row_max)
    one = spread(1.0, row_max)
    largest = constant(LARGEST, row_max)
    rounder = constant(ROUNDER, row_max)
    high, low, octave, shift, factor, factor2 = zero, zero, zero, zero, one, one
    if row_max == math.inf:
        # The entries +inf, and they alone, are above the largest number after halving.
        factor = spread(0.5, row_max)
        cutoff = largest
    elif row_max == -math.inf:
        cutoff = spread(math.inf, row_max)
    elif temperature == 0.0:
        cutoff = row_max
    elif temperature == math.inf:
        cutoff = -largest
    else:
        high, low = multiplier(temperature, row_max)
        extreme = constant(LARGEST_MULTIPLIER, row_max)
        if high < extreme and high * extreme > one and is_plain(row_max, high):
            return plain_scale(row_max, high, low)
        # T = fraction * 2**exponent, and dividing by the power of two takes two exact steps.
        fraction, exponent = math.frexp(temperature)
        high, low = multiplier(fraction, row_max)
        limit = int(constant(LARGEST_EXPONENT, row_max))
        exponent = min(max(-exponent, -limit), limit)
        factor = spread(math.ldexp(1.0, exponent // 2), row_max)
        factor2 = spread(math.ldexp(1.0, exponent - exponent // 2), row_max)
        scaled = (row_max * factor) * factor2
        if is_plain(scaled, high):
            octave = fma(scaled, high, rounder) - rounder
        else:
            # x - max is exact for every entry that matters: they lie within a factor 2 of the maximum.
            shift = row_max
        cutoff = (octave - constant(DEPTH, row_max)) / high
    biased = constant(TERM_ROUNDER, row_max) - octave
    return Scale(high, low, biased, cutoff, True, shift, factor, factor2)


@jit(inline="always")
def terms(x, scale):
    """2**(x c - N + BIAS), or 0 below the cutoff."""
    if scale.shifted:
        x = ((x - spread(scale.shift, x)) * spread(scale.factor, x)) * spread(scale.factor2, x)
        largest = constant(LARGEST, x)
        x = select(x > largest, largest, x)
    high = spread(scale.high, x)
    rounder = spread(scale.rounder, x)
    rounded = fma(x, high, rounder)
    integer = rounded - rounder
    fraction = fma(x, spread(scale.low, x), fma(x, high, -integer))
    term = times_power_of_two(horner(fraction, EXP2), rounded)
    return select(x < spread(scale.cutoff, x), spread(0.0, x), term)


# -- sums: a pair total + error, as in Ogita, Rump & Oishi (2005) -------------------------------------


@jit(inline="always")
def add(total, error, term):
    """Add a term; what the addition rounds away (two-sum) goes to the error."""
    result = total + term
    part = result - total
    return result, error + ((total - (result - part)) + (term - part))


@jit(inline="always")
def merge(total, error, total2, error2):
    """Add one pair to another."""
    total, error = add(total, error, total2)
    return total, error + error2


@jit(inline="always")
def halve(total, error):
    """Merge the pairs of the upper half of the lanes into those of the lower half."""
    return merge(lower_half(total), lower_half(error), upper_half(total), upper_half(error))


@jit
def sum_lanes(total, error):
    """Merge the pairs of all lanes into one; there are at most 16."""
    total, error = halve(total, error)
    total, error = halve(total, error)
    total, error = halve(total, error)
    return halve(total, error)


@jit(inline="always")
def larger(x, y):
    """Return the larger of two; ``y`` if ``x`` is NaN."""
    return select(x > y, x, y)


# -- results --------------------------------------------------------------------------------------


@jit(inline="always")
def reciprocal(total, error):
    """1 / (total + error) as a pair high + low."""
    one = spread(1.0, total)
    high = one / total
    return high, high * (fma(-high, total, one) - high * error)


@jit(inline="always")
def times_pair(term, high, low):
    """term * (high + low), rounded once but for the last bits of low."""
    return fma(term, high, term * low)


@jit
def log_of_sum(row_max, top_term, sums):
    """Logarithm of sum(exp((x - max) / T)), from the entries equal to the maximum and the rest apart.

    ``sums`` = (ties, rest, error, moment, moment_error): the number of entries equal to the maximum, whose
    term is ``top_term``, the sum of the other terms, and the sum of these times (x - max) / T. With log1p
    nothing is lost when the rest is tiny.
    """
    if row_max == -math.inf:
        return math.nan
    others = (float(sums[1]) + float(sums[2])) / float(top_term)
    return math.log1p((float(sums[0]) - 1.0) + others)


@jit
def gap_of(row_max, temperature, log_sum):
    """Coefficients of `log_terms`."""
    inverse = 0.0
    exponent = 0
    prescale = 1.0
    cutoff = spread(-math.inf, row_max)
    if math.isnan(log_sum):
        pass
    elif temperature == 0.0 or row_max == math.inf:
        cutoff = row_max
    elif temperature == math.inf:
        cutoff = -constant(LARGEST, row_max)
    else:
        if temperature >= 1.0:
            # x - max of opposite extremes overflows, its quarter does not.
            prescale = 0.25
        fraction, exponent = math.frexp(temperature * prescale)
        limit = int(constant(LARGEST_GAP_EXPONENT, row_max))
        exponent = min(max(-exponent, -limit), limit)
        inverse = 1.0 / fraction
    third = exponent // 3
    return Gap(
        row_max,
        spread(prescale, row_max),
        spread(math.ldexp(1.0, third), row_max),
        spread(math.ldexp(inverse, exponent - 2 * third), row_max),
        cutoff,
        spread(log_sum, row_max),
    )


@jit(inline="always")
def log_terms(x, gap):
    """(x - max) / T - log_sum, or -inf below the cutoff."""
    zero = spread(0.0, x)
    row_max = spread(gap.row_max, x)
    prescale = spread(gap.prescale, x)
    factor = spread(gap.factor, x)
    distance = select(x == row_max, zero, fma(x, prescale, -(row_max * prescale)))
    value = fma((distance * factor) * factor, spread(gap.inverse, x), -spread(gap.log_sum, x))
    return select(x < spread(gap.cutoff, x), spread(-math.inf, x), value)


@jit
def logsumexp_value(row_max, temperature, top_term, sums):
    """max + T log_sum."""
    log_sum = log_of_sum(row_max, top_term, sums)
    top = float(row_max)
    if math.isnan(sums[1]):
        value = math.nan
    elif math.isinf(top) or temperature == 0.0:
        value = top
    elif temperature == math.inf:
        value = math.inf if log_sum > 0.0 else top
    elif temperature < 1.0:
        value = fma(temperature, log_sum, top)
    else:
        # T log_sum alone may overflow where the result does not.
        value = fma(temperature * 0.015625, log_sum, top * 0.015625) * 64.0
    return spread(value, row_max)


@jit
def entropy_value(row_max, temperature, top_term, sums):
    """log_sum - sum(p (x - max) / T): both parts are positive, so nothing cancels."""
    total = float(sums[0]) * float(top_term) + (float(sums[1]) + float(sums[2]))
    moment = float(sums[3]) + float(sums[4])
    return spread(log_of_sum(row_max, top_term, sums) - moment / total, row_max)
