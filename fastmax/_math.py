"""The mathematics: terms 2**((x - max) c), their sums, and what each function makes of them.

With c = log2(e) / T, exp((x - max) / T) = 2**((x - max) c). Others round x - max, and a term of probability
p is then off by about log2(1 / p) ulp. Here every step keeps what it rounds away. With c = high + low, the
maximum is multiplied beforehand, max c = origin + rest, where the origin has so few digits that its sum with
any n is exact:

    n = round(x high - origin)
    f = (x high - (n + origin)) + (x low - rest)
    term = 2**f * 2**(n + BIAS)

Registers hold a table of 2**(j / m), and n is a multiple of 1/m. With AVX-512 m is 16, and the origin is such
a multiple, too: to round x high - origin takes one fma, as its sum with a number whose ulp is 1/m and from
which the origin has been subtracted. |f| is then up to 1/16. Elsewhere m is 2, or 4 for float32 with AVX2;
the origin is a multiple of 1/64 or 1/1024, as that sum is, in which what lies below 1/m is cleared, and |f|
is hardly above 1/(2m). A term takes 16 and 19 instructions (float32, float64) and is within 0.62 ulp; with
AVX2 18 and 24, elsewhere 20 and 25, within 0.75 or, with m = 2, 0.81.

All but the entropy need no more of terms than their ratios, and take them times a factor, with AVX-512 and,
for float32, with AVX2: n is x high rounded to a multiple of 1/m, and f = (x high - n) + x low: nothing of the
maximum is subtracted from it. With AVX-512 n is rounded down, and f is from 0 to 1/16, or hardly beyond; with
AVX2 it is rounded to the nearest. A term takes 13 and 17 instructions, with AVX2 15, and is within 0.62 or
0.67 ulp. With fewer constants for f as well as fewer steps softmax of 8192 x 1000 float32 takes 0.6 to 0.9 of
the time with AVX-512, and on one core of a Zen 3, with AVX2, 0.8. The term of the maximum is 2**BIAS times
that factor. Its excess is rounded to whole ulps of 2, and a single entry still has the probability 1; what
this adds, half such an ulp or rarely one, is added to all.

A GPU has no table: n is an integer and 3/4 <= 2**f <= 3/2, up to rounding. What rounds the difference is
added to the rest of f, in 22 and 27 instructions, and a term is within 0.9 ulp.

The term of the maximum is exactly 2**BIAS, so a single entry has the probability 1 and ties share evenly.
BIAS keeps the terms of the smallest results normal: only the last multiplication can round to a subnormal.

Sums start from 2 * 2**BIAS, and of the term of a maximum nothing is rounded away there: without it, and what
they started from, they are the sum of the others, however small, of which logarithms are made.

Entries so far below the maximum that no result can show their terms are raised to where this is just so.
All this holds for plain slices: T such that c is far from overflow, and |max c| at most 2**15 or 2**40. Any
other slice has a guard: x is scaled by powers of two on the way, and dropped below a cutoff, and the maximum
is subtracted, d + d' = x - max exactly (two-sum), f = (d high - n) + (d low + d' high). There the limits are
ordinary values: c = 0 with a cutoff at x - max = 0 is T = 0, c = 0 with a cutoff below every x is T = inf,
and where nothing passes the cutoff the sum is 0 and the results 0 / 0. NaN passes everything, for comparisons
with it are false.

Every function takes floats or lanes of float32 or float64, and every pair of constants is (float32's,
float64's).
"""

import math
from collections import namedtuple
from typing import Any

import numpy as np
from numba import types

from fastmax._jit import jit
from fastmax._lanes import (
    ROUNDS_DOWN,
    TABLE_ENTRIES,
    abreast,
    as_float64,
    constant,
    fma,
    fma_down,
    log1p,
    make_table,
    no_lanes,
    polynomial,
    polynomial_by_pairs,
    power_of_two,
    select,
    split_power,
    spread,
)
from fastmax._tracing import kind_of, traced

LOG2_E_HIGH = 1.4426950408889634
LOG2_E_LOW = 2.0355273740931033e-17
LOG_2 = 0.6931471805599453
# log(2) in two parts, of which the first times an exponent is exact.
LOG_2_HIGH = float.fromhex("0x1.62e42feep-1")
LOG_2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

# Coefficients of 2 atanh(s) / s - 2 in powers of s**2, from s**2 on.
TWICE_ATANH = tuple(2.0 / (2 * i + 3) for i in range(10))

# Terms lie between 2**(BIAS - DEPTH) and 2**BIAS, or 0.91 to 1.1 times that: DEPTH reaches below the smallest
# subnormal by so much that 2**24 dropped terms together stay under half of it, and 2**31 terms of 2**BIAS do
# not overflow.
BIAS = (56.0, 512.0)
DEPTH = (180.0, 1110.0)
TOP_TERM = (2.0 ** BIAS[0], 2.0 ** BIAS[1])

# By how much a normalizer is larger than 1 / sum: so much that what `probability` makes of the lowest terms,
# those of all that is left out, is not subnormal before the last step. Such a number takes a processor of
# Intel 150 cycles; with ``where`` 2000 x 1000 float32 took 9 times as long.
RAISE = (2.0**120, 2.0**960)
LOWER = (2.0**-120, 2.0**-960)

# Half an ulp of 1, in the direction of 0.
HALF_ULP = (2.0**-24, 2.0**-53)
ULP_OF_2 = (2.0**-22, 2.0**-51)

# Largest |max c| of a plain slice: x times the low part of c is then at most 2**-8 or 2**-12.
LARGEST_PRODUCT = (2.0**15, 2.0**40)

# Range of c in which high and low are far from the ends of the exponent range. LARGEST_PRODUCT times its
# largest reciprocal, the largest maximum of a plain slice, is less than half an ulp of the largest float, so
# that x - max does not overflow.
LARGEST_MULTIPLIER = (2.0**87, 2.0**900)
# A rest of the terms below this, beside a single maximum, may miss some that lie below DEPTH.
FAINT_REST = (2.0**-100, 2.0**-900)
HUGE_TEMPERATURE = 2.0**1000
LARGEST = (3.4028234663852886e38, 1.7976931348623157e308)

# Temperatures are scaled by a power of two within these exponents: beyond them all gaps are 0 or infinite.
LARGEST_EXPONENT = (250.0, 1074.0)
LARGEST_GAP_EXPONENT = (375.0, 1080.0)

# Coefficients of f, f**2, ... in 2**f, for float32 and for float64 and by the number of entries of a table,
# as scripts/fit_exp2.py derives and measures them.
# float32 without a table: relative error 2**-28.35; worst measured errors
# 0.8693 ulp and 1.1567 * 2**-24 relative (1e+07 random f).
# float32 with 2 entries: relative error 2**-28.57; worst measured errors
# 0.6826 ulp and 1.0860 * 2**-24 relative (1e+07 random f).
# float32 with 4 entries: relative error 2**-27.47; worst measured errors
# 0.6520 ulp and 1.1446 * 2**-24 relative (1e+07 random f).
# float32 with 16 entries: relative error 2**-31.82; worst measured errors
# 0.5728 ulp and 1.0651 * 2**-24 relative (1e+07 random f).
# float64 without a table: relative error 2**-57.89; worst measured errors
# 0.8372 ulp and 1.1162 * 2**-53 relative (1e+07 random f).
# float64 with 2 entries: relative error 2**-60.29; worst measured errors
# 0.6838 ulp and 1.1273 * 2**-53 relative (1e+07 random f).
# float64 with 16 entries: relative error 2**-58.19; worst measured errors
# 0.5773 ulp and 1.0864 * 2**-53 relative (1e+07 random f).
EXP2 = (
    {
        1: (
            float.fromhex("0x1.62e43p-1"),
            float.fromhex("0x1.ebfbeep-3"),
            float.fromhex("0x1.c6afdap-5"),
            float.fromhex("0x1.3b196ep-7"),
            float.fromhex("0x1.5ead5cp-10"),
            float.fromhex("0x1.551dc6p-13"),
        ),
        2: (
            float.fromhex("0x1.62e43p-1"),
            float.fromhex("0x1.ebfbb4p-3"),
            float.fromhex("0x1.c6b0a4p-5"),
            float.fromhex("0x1.3baa8ep-7"),
            float.fromhex("0x1.5d816ep-10"),
        ),
        4: (
            float.fromhex("0x1.62e42ap-1"),
            float.fromhex("0x1.ebfbecp-3"),
            float.fromhex("0x1.c6f8fep-5"),
            float.fromhex("0x1.3b17eap-7"),
        ),
        16: (
            float.fromhex("0x1.62e43p-1"),
            float.fromhex("0x1.ebfbe2p-3"),
            float.fromhex("0x1.c6ba18p-5"),
            float.fromhex("0x1.3b0e62p-7"),
        ),
    },
    {
        1: (
            float.fromhex("0x1.62e42fefa39efp-1"),
            float.fromhex("0x1.ebfbdff82c58bp-3"),
            float.fromhex("0x1.c6b08d704a36fp-5"),
            float.fromhex("0x1.3b2ab6fba5b93p-7"),
            float.fromhex("0x1.5d87fe77ec096p-10"),
            float.fromhex("0x1.430912f680e7ep-13"),
            float.fromhex("0x1.ffcc011b587eap-17"),
            float.fromhex("0x1.62c018a651d77p-20"),
            float.fromhex("0x1.b517cb8a18387p-24"),
            float.fromhex("0x1.e5633dfc968fdp-28"),
            float.fromhex("0x1.0261d03c14bc7p-31"),
        ),
        2: (
            float.fromhex("0x1.62e42fefa39efp-1"),
            float.fromhex("0x1.ebfbdff82c58ep-3"),
            float.fromhex("0x1.c6b08d704a308p-5"),
            float.fromhex("0x1.3b2ab6fba56f4p-7"),
            float.fromhex("0x1.5d87fe77e5fbfp-10"),
            float.fromhex("0x1.430912f10d46cp-13"),
            float.fromhex("0x1.ffcbff68fd5cbp-17"),
            float.fromhex("0x1.62c06d2b7515p-20"),
            float.fromhex("0x1.b54ab9dfa1761p-24"),
            float.fromhex("0x1.e2f092c6cd42ap-28"),
        ),
        16: (
            float.fromhex("0x1.62e42fefa39efp-1"),
            float.fromhex("0x1.ebfbdff82c785p-3"),
            float.fromhex("0x1.c6b08d704a94bp-5"),
            float.fromhex("0x1.3b2ab6ef706c1p-7"),
            float.fromhex("0x1.5d87fe6e01845p-10"),
            float.fromhex("0x1.430e629ac3e1ep-13"),
            float.fromhex("0x1.ffcf43b0ce78p-17"),
        ),
    },
)

# The same with |f| <= 1/2, for kernels of a GPU that round x c to the nearest n.
# float32 rounded to n: relative error 2**-28.23; worst measured errors
# 0.8079 ulp and 1.1448 * 2**-24 relative (1e+07 random f).
EXP2_OF_HALVES = (
    float.fromhex("0x1.62e43p-1"),
    float.fromhex("0x1.ebfbdcp-3"),
    float.fromhex("0x1.c6af74p-5"),
    float.fromhex("0x1.3b2ddap-7"),
    float.fromhex("0x1.5f0df2p-10"),
    float.fromhex("0x1.4177fep-13"),
)

# The same for `ratio_terms`, with 16 entries for 0 <= f < 1/16, or hardly below or above, by Horner's rule.
# float32 with 4 entries: relative error 2**-28.26; worst measured errors
# 0.6152 ulp and 1.0844 * 2**-24 relative (1e+07 random f).
# float32 with 16 entries from 0: relative error 2**-28.78; worst measured errors
# 0.5892 ulp and 1.0933 * 2**-24 relative (1e+07 random f).
# float64 with 16 entries from 0: relative error 2**-64.77; worst measured errors
# 0.5779 ulp and 1.0736 * 2**-53 relative (1e+07 random f).
EXP2_OF_RATIOS = (
    {
        4: (
            float.fromhex("0x1.62e42cp-1"),
            float.fromhex("0x1.ebfbdep-3"),
            float.fromhex("0x1.c6eb02p-5"),
            float.fromhex("0x1.3b468ep-7"),
        ),
        16: (
            float.fromhex("0x1.62e43cp-1"),
            float.fromhex("0x1.ebe674p-3"),
            float.fromhex("0x1.d04784p-5"),
        ),
    },
    {
        16: (
            float.fromhex("0x1.62e42fefa39efp-1"),
            float.fromhex("0x1.ebfbdff82c643p-3"),
            float.fromhex("0x1.c6b08d7040b5bp-5"),
            float.fromhex("0x1.3b2ab6f9ef709p-7"),
            float.fromhex("0x1.5d8809c4f909bp-10"),
            float.fromhex("0x1.42fdd17e08221p-13"),
            float.fromhex("0x1.04849a2122e73p-16"),
        ),
    },
)

# 2**(j / 16) as heads * (1 + lows), for float32 and for float64.
HEADS = (
    (
        float.fromhex("0x1p+0"),
        float.fromhex("0x1.0b5586p+0"),
        float.fromhex("0x1.172b84p+0"),
        float.fromhex("0x1.2387a6p+0"),
        float.fromhex("0x1.306fep+0"),
        float.fromhex("0x1.3dea64p+0"),
        float.fromhex("0x1.4bfdaep+0"),
        float.fromhex("0x1.5ab07ep+0"),
        float.fromhex("0x1.6a09e6p+0"),
        float.fromhex("0x1.7a1148p+0"),
        float.fromhex("0x1.8ace54p+0"),
        float.fromhex("0x1.9c4918p+0"),
        float.fromhex("0x1.ae89fap+0"),
        float.fromhex("0x1.c199bep+0"),
        float.fromhex("0x1.d5818ep+0"),
        float.fromhex("0x1.ea4afap+0"),
    ),
    (
        float.fromhex("0x1p+0"),
        float.fromhex("0x1.0b5586cf9890fp+0"),
        float.fromhex("0x1.172b83c7d517bp+0"),
        float.fromhex("0x1.2387a6e756238p+0"),
        float.fromhex("0x1.306fe0a31b715p+0"),
        float.fromhex("0x1.3dea64c123422p+0"),
        float.fromhex("0x1.4bfdad5362a27p+0"),
        float.fromhex("0x1.5ab07dd485429p+0"),
        float.fromhex("0x1.6a09e667f3bcdp+0"),
        float.fromhex("0x1.7a11473eb0187p+0"),
        float.fromhex("0x1.8ace5422aa0dbp+0"),
        float.fromhex("0x1.9c49182a3f09p+0"),
        float.fromhex("0x1.ae89f995ad3adp+0"),
        float.fromhex("0x1.c199bdd85529cp+0"),
        float.fromhex("0x1.d5818dcfba487p+0"),
        float.fromhex("0x1.ea4afa2a490dap+0"),
    ),
)
LOWS = (
    (
        0.0,
        float.fromhex("0x1.8d96d4p-25"),
        float.fromhex("-0x1.9c0c22p-27"),
        float.fromhex("0x1.964904p-25"),
        float.fromhex("0x1.125002p-25"),
        float.fromhex("0x1.370be4p-25"),
        float.fromhex("-0x1.0a355p-25"),
        float.fromhex("-0x1.00d8acp-27"),
        float.fromhex("0x1.26055cp-26"),
        float.fromhex("-0x1.05cb44p-25"),
        float.fromhex("0x1.67a1cap-28"),
        float.fromhex("0x1.a3b5e4p-28"),
        float.fromhex("-0x1.f9c304p-27"),
        float.fromhex("-0x1.6961b4p-28"),
        float.fromhex("-0x1.a5217cp-28"),
        float.fromhex("0x1.61428ep-28"),
    ),
    (
        0.0,
        float.fromhex("0x1.79aa65d837b6dp-54"),
        float.fromhex("-0x1.01b15eaa59348p-55"),
        float.fromhex("0x1.68efde3a8a894p-54"),
        float.fromhex("0x1.34d754db0abb6p-55"),
        float.fromhex("0x1.59f48a72a4c6dp-55"),
        float.fromhex("0x1.690cebb7aafbp-56"),
        float.fromhex("0x1.063e1e21c5409p-54"),
        float.fromhex("-0x1.3b3efbf5e2228p-54"),
        float.fromhex("-0x1.b32dcb94da51dp-56"),
        float.fromhex("0x1.db72fc1f0eab4p-55"),
        float.fromhex("0x1.1affc2b91ce27p-56"),
        float.fromhex("0x1.c1a7792cb3387p-55"),
        float.fromhex("0x1.36eae30af0cb3p-56"),
        float.fromhex("0x1.4a385a63d07a7p-56"),
        float.fromhex("-0x1.ff7128fd391fp-55"),
    ),
)

# Multiples of 1/steps, to which `terms` round x c: with 16 entries of a table those are its steps, with fewer
# they are so fine that what the maximum is off such a multiple hardly shows.
STEPS = {1: (1, 1), 2: (64, 1024), 4: (64, 1024), 16: (16, 16)}

Form = namedtuple("Form", "zero middle slope curvature")
Form.__doc__ = """How 2**x is computed with a table of m entries, as pairs of (float32's, float64's).

``zero`` is `zero_of` the steps; ``middle`` is added where what lies below 1/m will be cleared there.
"""


def zero_of(steps):
    """What a multiple of 1/steps is added to, so that it stands in the low bits of the sum.

    With it stands BIAS and the format's own bias (127, 1023).
    """
    return 1.5 * 2.0**23 / steps[0] + 127.0 + BIAS[0], 1.5 * 2.0**52 / steps[1] + 1023.0 + BIAS[1]


def steps_of(entries):
    """Steps for tables of so many entries."""
    return tuple(STEPS[count][precision] for precision, count in enumerate(entries))


def first_and_others(coefficients):
    """First coefficients of two polynomials, and the others of each."""
    return tuple(own[0] for own in coefficients), tuple(own[1:] for own in coefficients)


def form_of(entries):
    """Form of tables of so many entries."""
    steps = steps_of(entries)
    slope, curvature = first_and_others([own[m] for own, m in zip(EXP2, entries, strict=True)])
    return Form(
        zero=zero_of(steps),
        middle=tuple(0.0 if m == step else 0.5 / m for m, step in zip(entries, steps, strict=True)),
        slope=slope,
        curvature=curvature,
    )


def ratio_coefficients(entries):
    """Coefficients for `ratio_terms`, where there are any, with tables of so many entries."""
    return tuple((EXP2[i] | EXP2_OF_RATIOS[i])[m] for i, m in enumerate(entries))


def table_of(entries):
    """Return 2**(j / m) as heads * (1 + lows)."""
    heads, lows = (
        tuple(own[:: 16 // m] for own, m in zip(both, entries, strict=True)) for both in (HEADS, LOWS)
    )
    return heads, lows


ZERO, MIDDLE, SLOPE, CURVATURE = form_of(TABLE_ENTRIES)
# To multiples of 1/m; and 2**(n + j / m) rounded, and what that leaves out, relative to it.
whole_steps, table_power = make_table(*table_of(TABLE_ENTRIES), steps_of(TABLE_ENTRIES))
# The same for `ratio_terms`, which round x c to multiples of 1/m.
RATIO_ZERO = zero_of(TABLE_ENTRIES)
_, ratio_power = make_table(*table_of(TABLE_ENTRIES), TABLE_ENTRIES)
RATIO_COEFFICIENTS = ratio_coefficients(TABLE_ENTRIES)
RATIO_SLOPE, RATIO_CURVATURE = first_and_others(RATIO_COEFFICIENTS)

# max c is rounded to what its sum with this number has room for.
ROUNDER = ZERO

# Whether slices at T = 0 and T = inf are spared the exponential: else they take 1.25 times as long as others
# on a CPU (8192 x 1000, float32). On a GPU some kernels would run out of registers.
LIMITS_APART = True

Rate = namedtuple("Rate", "temperature high low inverse depth limit")
Rate.__doc__ = """What the scales of slices at one temperature share; see `rate_of`."""

Scale = namedtuple("Scale", "row_max high low lowest origin rest slope")
Scale.__doc__ = """How the terms of a slice follow from its entries; see `terms`.

For the `ratio_terms` the ``rest`` is what is added to every excess, and ``slope`` the first coefficient of
2**f - 1 with what `ratio_scale` adds to that; with AVX-512 nothing is, and none is read.
"""

Guard = namedtuple("Guard", "prescale factor factor2 cutoff plain")
Guard.__doc__ = """What `terms` and `log_terms` take beside the scale or gap of a slice that is not plain.

Where a slice in each lane has a guard, ``plain`` is 1 in those that are plain; else it is None.
"""

Gap = namedtuple("Gap", "row_max inverse summand")
Gap.__doc__ = """How (x - max) / T - log_sum follows from x; see `log_terms`."""


# -- terms ----------------------------------------------------------------------------------------


@traced
def multiplier(temperature, like):
    """log2(e) / T as a pair high + low in the dtype of ``like``, by one division."""
    numerator, inverse = spread(LOG2_E_HIGH, temperature), spread(1.0, temperature) / temperature
    high = numerator * inverse
    high = fma(fma(-high, temperature, numerator), inverse, high)  # the quotient, rounded (Markstein)
    low = (fma(-high, temperature, numerator) + spread(LOG2_E_LOW, temperature)) * inverse
    # Rounded down: with no low below 0, neither x high nor x low decreases in x.
    rounded = spread(high - high * as_float64(constant(HALF_ULP, like)), like)
    return rounded, spread((high - as_float64(rounded)) + low, like)


@traced
def rate_of(temperature, like):
    """Return c for T in [0, inf], how far below the maximum terms are cut off, and which maxima are plain.

    A slice is plain if the absolute value of its maximum is at most the limit. At T = 0, T = inf, and where
    c or its reciprocal may overflow, no slice is.
    """
    zero, one = spread(0.0, like), spread(1.0, like)
    high, low = multiplier(temperature, like)
    extreme = constant(LARGEST_MULTIPLIER, like)
    fits = select(high < extreme, high * extreme, zero) > one
    inverse = select(fits, spread(spread(1.0, temperature) / temperature, like), zero)
    halving = spread(temperature * spread(LOG_2, temperature), like)  # a gap of which halves a term
    depth = select(fits, constant(DEPTH, like) * halving, zero)
    limit = select(fits, constant(LARGEST_PRODUCT, like) * halving, -one)
    return Rate(temperature, select(fits, high, zero), select(fits, low, zero), inverse, depth, limit)


@traced
def is_plain(row_max, rate):
    """Whether `plain_scale` does for a slice, from its maximum (NaN left out; -inf if there is none)."""
    return abs(row_max) <= spread(rate.limit, row_max)


@traced
def plain_scale(row_max, rate):
    """Scale of a plain slice."""
    high, low = spread(rate.high, row_max), spread(rate.low, row_max)
    rounder = constant(ROUNDER, row_max)
    rounder = select(row_max < spread(0.0, row_max), -rounder, rounder)
    origin = fma(row_max, high, rounder) - rounder
    rest = fma(row_max, low, fma(row_max, high, -origin))
    lowest = row_max - spread(rate.depth, row_max)
    return Scale(row_max, high, low, lowest, origin, rest, constant(SLOPE, row_max))


@jit
def guard_of(temperature, like):
    """Multiplier (high, low) and guard of any slice whose maximum is finite, for T in [0, inf]."""
    one = spread(1.0, like)
    high = low = cutoff = spread(0.0, like)
    prescale, factor, factor2 = one, one, one
    if 0.0 < temperature < math.inf:
        # T = fraction * 2**exponent, and dividing by the power of two takes two exact steps. At a large T
        # x - max could overflow, its quarter cannot, and what this rounds away is nothing to T.
        fraction, exponent = math.frexp(temperature)
        high, low = multiplier(fraction, like)
        if exponent > 0:
            prescale = spread(0.25, like)
            exponent -= 2
        limit = int(constant(LARGEST_EXPONENT, like))
        exponent = min(max(-exponent, -limit), limit)
        factor = spread(math.ldexp(1.0, exponent // 2), like)
        factor2 = spread(math.ldexp(1.0, exponent - exponent // 2), like)
        cutoff = -constant(DEPTH, like) / high
    elif temperature == math.inf:
        prescale = spread(0.25, like)
        cutoff = -constant(LARGEST, like)
    return high, low, Guard(prescale, factor, factor2, cutoff, None)


@traced
def bounded_scale(row_max, high, low, guard):
    """Scale and guard of a slice, from the multiplier and guard of its temperature."""
    zero, one = spread(0.0, row_max), spread(1.0, row_max)
    largest = constant(LARGEST, row_max)
    infinite = larger(row_max, -row_max) > largest
    high = select(infinite, zero, spread(high, row_max))
    low = select(infinite, zero, spread(low, row_max))
    # Halved and capped at the largest number, +inf is above all others and -inf stays below.
    guard = Guard(
        select(infinite, spread(0.5, row_max), spread(guard.prescale, row_max)),
        select(infinite, one, spread(guard.factor, row_max)),
        select(infinite, one, spread(guard.factor2, row_max)),
        select(infinite, zero, spread(guard.cutoff, row_max)),
        None,
    )
    row_max = select(row_max > largest, largest, row_max * guard.prescale)
    row_max = select(row_max < -largest, -largest, row_max)
    lowest = -spread(math.inf, row_max)
    return Scale(row_max, high, low, lowest, row_max, row_max, constant(SLOPE, row_max)), guard


@jit
def guarded_scale(row_max, temperature):
    """Scale and guard for any slice: any T in [0, inf], maxima that are infinite or large beside T."""
    high, low, guard = guard_of(temperature, row_max)
    return bounded_scale(row_max, high, low, guard)


@traced
def at_least(x, lowest):
    """Return the larger of two; NaN if x is."""
    return select(lowest > x, lowest, x)


@traced
def terms(x, scale, guard):
    """2**((x - max) c + BIAS) as power * (1 + excess), and (x - max) c; the guard of plain slices is None."""
    if guard is not None:
        return guarded_terms(x, scale, guard)
    exponent, fraction, small, product = split_product(x, scale)
    power, excess = exponential(exponent, fraction, small)
    return power, excess, product


@jit(forceinline=True)
def guarded_terms(x, scale, guard):
    """`terms` of any slice."""
    zero = spread(0.0, x)
    if LIMITS_APART:
        if no_lanes(scale.high > spread(0.0, scale.high)):
            return limit_terms(x, scale, guard), zero, zero
    exponent, fraction, small, product, distance = split_distance(x, scale, guard)
    exponent, fraction, small, product = or_plain(exponent, fraction, small, product, x, scale, guard.plain)
    power, excess = exponential(exponent, fraction, small)
    dropped = distance < spread(guard.cutoff, x)
    power, excess = select(dropped, zero, power), select(dropped, zero, excess)
    return power, excess, select(dropped, zero, product)


@traced
def limit_terms(x, scale, guard):
    """`terms` at c = 0: that of the maximum above the cutoff, 0 below, NaN for NaN."""
    distance = guarded(x, guard) - spread(scale.row_max, x)
    kept = fma(distance, spread(scale.high, x), top_term(x))
    return select(distance < spread(guard.cutoff, x), spread(0.0, x), kept)


@traced
def guarded(x, guard):
    """Entries as the guard scales them: finite but for those that are -inf or NaN."""
    largest = constant(LARGEST, x)
    return select(x > largest, largest, x * spread(guard.prescale, x))


@traced
def or_plain(exponent, fraction, small, product, x, scale, plain):
    """The same for lanes that are not plain, and what `split_product` gives for those that are."""
    if plain is None:
        return exponent, fraction, small, product
    is_plain = plain > spread(0.0, plain)
    own_exponent, own_fraction, own_small, own_product = split_product(x, scale)
    return (
        select(is_plain, own_exponent, exponent),
        select(is_plain, own_fraction, fraction),
        select(is_plain, own_small, small),
        select(is_plain, own_product, product),
    )


@traced
def split_product(x, scale):
    """Exponent, fraction in two parts, and the sum of all, (x - max) c, of a plain slice."""
    x = at_least(x, spread(scale.lowest, x))
    high, origin = spread(scale.high, x), spread(scale.origin, x)
    small = fma(x, spread(scale.low, x), -spread(scale.rest, x))
    exponent, whole, fraction, small = split(x, high, origin, small)
    return exponent, fraction, small, whole + (fraction + small)


@traced
def split(x, high, origin, small):
    """Exponent, its value, and the fraction of x high - origin, with its small part.

    The value, and what it is beside the origin, are multiples of 1/steps, and exact.
    """
    zero = constant(ZERO, x) - origin
    exponent = abreast(whole_steps(fma(x, high, zero + constant(MIDDLE, x))))
    near = exponent - zero
    return exponent, near - origin, fma(x, high, -near), small


@traced
def split_distance(x, scale, guard):
    """`split_product` of any slice, and x - max as its guard scales it."""
    x = at_least(guarded(x, guard), spread(scale.lowest, x))
    row_max = spread(scale.row_max, x)
    distance = x - row_max
    virtual = x - distance
    distance_lost = (x - (distance + virtual)) + (virtual - row_max)
    distance = (distance * spread(guard.factor, x)) * spread(guard.factor2, x)
    distance_lost = (distance_lost * spread(guard.factor, x)) * spread(guard.factor2, x)
    high = spread(scale.high, x)
    small = fma(distance, spread(scale.low, x), distance_lost * high)
    exponent, whole, fraction, small = split(distance, high, spread(0.0, x), small)
    return exponent, fraction, small, whole + (fraction + small), distance


@traced
def exponential(exponent, fraction, small):
    """2**exponent (1 + excess), where fraction + small is that part of an exponent which it does not show."""
    f = abreast(fraction + small)
    square, slope = f * f, constant(SLOPE, exponent)
    curvature = abreast(polynomial_by_pairs(f, square, CURVATURE))
    power, low = table_power(exponent, None)
    # 2**f - 1 = c1 f + f**2 r(f): adding the larger part last keeps it increasing in f.
    return power, abreast(fma(f, slope, fma(square, curvature, low)))


@traced
def term_of(power, excess):
    """Term that `terms` or `ratio_terms` gave in two parts, rounded."""
    return fma(excess, power, power)


@traced
def top_term(like):
    """Term of the maximum as `terms` has it, 2**BIAS; none of these is larger."""
    return constant(TOP_TERM, like)


@traced
def start_of_sum(like):
    """A number that none of the `ratio_terms` exceeds: sums start from it, as `sum_with_smaller` wants."""
    return spread(2.0, like) * top_term(like)


# -- terms of which no more is needed than their ratios -------------------------------------------------


@traced
def takes_ratios(like):
    """Whether terms are taken times a factor: with two entries of a table errors grow by 0.3 ulp for it."""
    kind: Any = kind_of(like)
    dtype = kind if isinstance(kind, types.Float) else kind.dtype
    return TABLE_ENTRIES[0 if dtype == types.float32 else 1] > 2


@traced
def ratio_scale(row_max, rate):
    """Scale of a plain slice for `ratio_terms`."""
    if not takes_ratios(row_max):
        return plain_scale(row_max, rate)
    scale, f, excess = scale_of_maximum(row_max, rate)
    whole = whole_excess(excess)
    if ROUNDS_DOWN:
        return scale._replace(rest=without_excess(f, whole, scale.slope))
    added = whole - excess
    # To all terms the same share is added, and so more to those of a larger excess: without this softmax of
    # three float32s could be off by 1.86 ulp and not 1.63.
    slope = fma(fma(-excess, added, added), scale.slope, scale.slope)
    return scale._replace(rest=without_excess(f, whole, slope), slope=slope)


@traced
def scale_of_maximum(row_max, rate):
    """Scale of a plain slice without a rest, and of its maximum f and the excess."""
    high, low = spread(rate.high, row_max), spread(rate.low, row_max)
    lowest, zero = row_max - spread(rate.depth, row_max), constant(RATIO_ZERO, row_max)
    origin = to_step(row_max, high, zero) - zero
    scale = Scale(row_max, high, low, lowest, origin, None, constant(RATIO_SLOPE, row_max))
    _, f = ratio_parts(row_max, scale)
    return scale, f, excess_of(f, spread(0.0, f), scale.slope)


@traced
def ratio_terms(x, scale, guard):
    """Terms as power * (1 + excess), times a factor that those of a slice share; see `unit_of`."""
    if not takes_ratios(x) or (guard is not None and guard.plain is None):
        power, excess, _ = terms(x, scale, guard)
        return power, excess
    own_power, own_excess = plain_ratio(x, scale)
    if guard is None:
        return own_power, own_excess
    is_plain = guard.plain > spread(0.0, guard.plain)
    power, excess, _ = guarded_terms(x, scale, guard._replace(plain=None))
    return select(is_plain, own_power, power), select(is_plain, own_excess, excess)


@traced
def plain_ratio(x, scale):
    """`ratio_terms` of a plain slice."""
    exponent, f = ratio_parts(x, scale)
    power, low = ratio_power(exponent, scale.rest)
    return power, excess_of(f, low, spread(scale.slope, f))


@traced
def ratio_parts(x, scale):
    """Exponent of a term, and f, which is what that leaves of the power of 2."""
    x = at_least(x, spread(scale.lowest, x))
    high, zero = spread(scale.high, x), constant(RATIO_ZERO, x) - spread(scale.origin, x)
    exponent = abreast(to_step(x, high, zero))
    return exponent, abreast(fma(x, spread(scale.low, x), fma(x, high, -(exponent - zero))))


@traced
def to_step(x, high, zero):
    """Round x high + zero to a multiple of 1/m: down, where one instruction does that."""
    return fma_down(x, high, zero) if ROUNDS_DOWN else fma(x, high, zero)


@traced
def excess_of(f, low, slope):
    """2**f - 1 + low."""
    if ROUNDS_DOWN:
        return fma(f, polynomial(f, RATIO_COEFFICIENTS), low)
    # As `exponential` has it: by Horner's rule it might decrease where f is below 0.
    return abreast(fma(f, slope, fma(f * f, abreast(polynomial(f, RATIO_CURVATURE)), low)))


@traced
def without_excess(f, whole, slope):
    """The low with which `excess_of` is ``whole``."""
    if ROUNDS_DOWN:
        return fma(-f, polynomial(f, RATIO_COEFFICIENTS), whole)
    return fma(-(f * f), polynomial(f, RATIO_CURVATURE), fma(-f, slope, whole))


@traced
def whole_excess(excess):
    """The excess that the maximum gets: whole ulps of 2, so that 2 + (1 + excess) is a float.

    It is 0 only where it is without that: what is added, rounded, would leave something over.
    """
    zero, three, ulp = spread(0.0, excess), spread(3.0, excess), constant(ULP_OF_2, excess)
    whole = (three + excess) - three
    least = select(excess < zero, -ulp, select(excess > zero, ulp, zero))
    return select(whole == zero, least, whole)


@traced
def unit_of(row_max, rate):
    """Factor of the `ratio_terms` of a slice: the term of its maximum in units of 2**BIAS."""
    one = spread(1.0, row_max)
    if not takes_ratios(row_max):
        return one
    _, _, excess = scale_of_maximum(row_max, rate)
    other = spread(rate.limit, row_max) < larger(row_max, -row_max)
    return select(other, one, one + whole_excess(excess))


@traced
def exact_terms(x, scale, guard):
    """`terms`, of which that of the maximum has neither an excess nor a product."""
    power, excess, product = terms(x, scale, guard)
    if guard is not None and guard.plain is None:
        return power, excess, product  # it has none: x - max is 0
    at_top, zero = x == spread(scale.row_max, x), spread(0.0, x)
    if guard is not None:
        at_top = at_top & (guard.plain > spread(0.0, guard.plain))
    return power, select(at_top, zero, excess), select(at_top, zero, product)


@traced
def exact_ratio_terms(x, scale, guard):
    """`ratio_terms`, of which that of the maximum is `unit_of` times 2**BIAS, and nothing more or less."""
    if takes_ratios(x):
        return ratio_terms(x, scale, guard)
    power, excess, _ = exact_terms(x, scale, guard)
    return power, excess


@traced
def over(total, error, divisor):
    """(total + error) / divisor as a pair."""
    inverse = spread(1.0, divisor) / divisor
    quotient = total * inverse
    return quotient, (fma(-quotient, divisor, total) + error) * inverse


# -- terms without a table, for a GPU ---------------------------------------------------------------

# n changes where 2**f is 3/4 or 3/2: with |f| <= 1/2 errors would be largest below log2(3/4), where what
# rounds 2**f - 1 doubles while 2**f is small.
SEAM = math.log2(1.5) - 0.5


@traced
def split_without_table(x, high, origin, small):
    """`split` where what rounds a fraction near 1/2 would cost 0.2 to 0.4 ulp: the small part takes it."""
    zero = constant(ZERO, x)
    rounded = x * high
    exponent = (rounded - (origin + spread(SEAM, x))) + zero
    whole = exponent - zero
    near = whole + origin
    fraction = rounded - near  # near + fraction is exact
    return exponent, whole, fraction, small + fma(x, high, -(fraction + near))


@traced
def exponential_without_table(exponent, fraction, small):
    """`exponential` where what rounds f would cost as much: the small part goes its own way."""
    f = fraction + small
    slope, curvature = constant(SLOPE, exponent), polynomial(f, CURVATURE)
    return power_of_two(exponent), fma(fraction, slope, fma(small, slope, (f * f) * curvature))


# What takes the place of names above. The rounder is above DEPTH, so the sum of an origin and an n is exact.
WITHOUT_TABLE = {
    "ZERO": form_of((1, 1)).zero,
    "SLOPE": form_of((1, 1)).slope,
    "CURVATURE": form_of((1, 1)).curvature,
    "ROUNDER": (256.0, 2048.0),
    "split": split_without_table,
    "exponential": exponential_without_table,
}


# -- sums: a pair total + error, as in Ogita, Rump & Oishi (2005) -------------------------------------
# What an addition of a term rounds away goes to the error, and with it what the rounding of the term itself
# took: where equal entries share most of the mass, their errors would not average out. With part for the
# share of the term in the new total, this is power - part, which is exact, + excess * power.


@traced
def two_sum(a, b):
    """Sum of two as a float, and what that leaves out (Knuth)."""
    result = a + b
    part = result - a
    return result, (a - (result - part)) + (b - part)


@traced
def add(total, error, power, excess):
    """Add a term (two-sum)."""
    result = total + term_of(power, excess)
    part = result - total
    return result, error + ((total - (result - part)) + fma(excess, power, power - part))


@traced
def sum_with_smaller(total, power, excess):
    """Sum of a total and a term that is not larger, and what that leaves out."""
    result = total + term_of(power, excess)
    return result, fma(excess, power, (total - result) + power)


@traced
def add_smaller(total, error, power, excess):
    """`add` for a term that is not larger than the total."""
    result, rounding = sum_with_smaller(total, power, excess)
    return result, error + rounding


@traced
def merge(total, error, total2, error2):
    """Add one pair to another."""
    result, lost = two_sum(total, total2)
    return result, error + lost + error2


# Beside a term of 2**BIAS the error may be all there is of the others. What its own roundings lose is kept,
# too, in open sums: (total, error, lost), or with a moment and its error after these. Those of softmax are
# open while its chunks are added up.


@traced
def closed(sums):
    """Open sums as a pair."""
    return sums[0], sums[1] + sums[2]


@traced
def add_faint(error, lost, part):
    """Add to an error, and to what that has lost, what a total leaves out of a term (fast two-sum, Dekker).

    Where the part is larger than the error, what is lost is off by up to half an ulp of the part, and no part
    is larger than its term. A two-sum takes three additions more, and log_softmax of 20000 float32 1.2 times
    as long.
    """
    result = error + part
    return result, lost + (part - (result - error))


@traced
def add_sums(sums, part):
    """Add sums, open or a pair, to open ones; the error may have 10**5 parts."""
    total, lost = two_sum(sums[0], part[0])
    error, lost = two_sum(sums[1], lost)
    error, more = two_sum(error, part[1])
    lost = sums[2] + (lost + more)
    if len(part) == 2:
        return total, error, lost
    lost = lost + part[2]
    if len(part) == 3:
        return total, error, lost
    return total, error, lost, *merge(sums[3], sums[4], part[3], part[4])


@traced
def merge_sums(sums, part):
    """Add sums to those of other lanes, both open or both pairs.

    As `add_sums`, but for the rounding of the total. Totals below that of two maxima are multiples of one
    ulp, and so is their sum: beside it, what the rounding of a larger one leaves out is small.
    """
    if len(sums) == 2:
        return merge(*sums, *part)
    total, rounding = two_sum(sums[0], part[0])
    error, lost = two_sum(sums[1], part[1])
    lost = (sums[2] + part[2]) + (lost + rounding)
    if len(sums) == 3:
        return total, error, lost
    return total, error, lost, *merge(sums[3], sums[4], part[3], part[4])


@traced
def settled(total, error):
    """The same sum with as much as possible in the total, which is the larger part."""
    result = total + error
    return result, (total - result) + error


@traced
def larger(x, y):
    """Return the larger of two; ``y`` if ``x`` is NaN."""
    return select(x > y, x, y)


# -- results --------------------------------------------------------------------------------------


@traced
def first_inverse(total):
    """1 / total, or nearly so: `reciprocal` corrects it."""
    return spread(1.0, total) / total


@traced
def reciprocal(total, error):
    """1 / (total + error) as a pair high + low.

    Where many terms are below half an ulp of the largest, the error has all of them.
    """
    total, error = settled(total, error)
    one, high = spread(1.0, total), first_inverse(total)
    return high, high * (fma(-high, total, one) - high * error)


@traced
def times_pair(term, high, low):
    """Term * (high + low), rounded once but for the last bits of low."""
    return fma(term, high, term * low)


@traced
def normalizer(total, error):
    """1 / (total + error) for `probability`, as a pair."""
    high, low = reciprocal(total, error)
    return high * constant(RAISE, total), low * constant(RAISE, total)


@traced
def probability(term, high, low):
    """Term times a `normalizer`.

    It is raised so far that term * low is not subnormal, which would cost half an ulp of the smallest normal
    results: they could be off by 2 ulp, and are by 1.6.
    """
    return times_pair(term, high, low) * constant(LOWER, term)


@traced
def apart(sums, unit):
    """Sums, open or a pair, without the term of one maximum, ``unit`` times 2**BIAS, in units of that.

    They are a pair (rest, error), or with a moment and its error. Where the rest is faint, all of it is in
    the error before: `over` would round that twice.
    """
    rest, lost = two_sum(sums[0], -(unit * top_term(unit)))
    rest, error = two_sum(rest, sums[1])
    if len(sums) > 2:
        lost = lost + sums[2]
    return *over(rest, error + lost, unit), *sums[3:]


@traced
def rest_of(sums):
    """Sum of the terms but one maximum in float64."""
    return as_float64(sums[0]) + as_float64(sums[1])


@traced
def log_of_sum(row_max, sums):
    """Logarithm of sum(exp((x - max) / T)), from the terms of all entries but one maximum.

    ``sums`` = (rest, error), or for the entropy (rest, error, moment, moment_error): the sum of these, and of
    them times (x - max) c, as pairs. With log1p nothing is lost when the rest is tiny.
    """
    top = as_float64(top_term(row_max))
    if kind_of(top) != kind_of(row_max):
        value = log_one_plus_for_float32(rest_of(sums) / top)
    else:
        rest, low = two_sum(sums[0], sums[1])
        value = log_one_plus_pair(rest / top, low / top)
    return select(row_max == -spread(math.inf, row_max), spread(math.nan, value), value)


@traced
def log_one_plus(x):
    """`log_one_plus_pair` without a low part."""
    return log_one_plus_pair(x, spread(0.0, x))


@traced
def log_one_plus_pair(x, low):
    """log(1 + x + low) for float64s from 0 on, of which ``low`` is less than an ulp of x.

    1 + x = 2**k (1 + f), up to an error that is divided by 1 + x. With s = f / (2 + f), log(1 + f) is
    2 atanh(s), and f - f**2 / 2 + s (f**2 / 2 + 2 s**2 (1/3 + s**2 / 5 + ...)) loses the least of f. The
    series to s**20 is off by less than 2**-60, the result by less than an ulp (0.80 was seen).
    """
    one = spread(1.0, x)
    total = one + x
    part = total - one
    error = ((x - part) + (one - (total - part))) + low
    k, fraction = split_power(total)
    f = fraction - one
    s = f / (f + spread(2.0, x))
    square = s * s
    half = (f * f) * spread(0.5, x)
    tail = square * polynomial(square, (TWICE_ATANH, TWICE_ATANH))
    correction = fma(k, spread(LOG_2_LOW, x), error / total)
    return fma(k, spread(LOG_2_HIGH, x), f - (half - fma(s, half + tail, correction)))


@traced
def log_one_plus_for_float32(x):
    """`log_one_plus` to 2**-33 of it, by one division: where the error of 1 + x counts, 1 + x is nearly 1.

    logsumexp of 10 x 10**5 float32 over axis 0 takes 0.93 of the time, of 25000 x 40 rows 0.97.
    """
    zero, one, two = spread(0.0, x), spread(1.0, x), spread(2.0, x)
    total = one + x
    error = select(total > two, zero, x - (total - one))  # NaN, too, is not above 2
    k, fraction = split_power(total)
    f = fraction - one
    s = f / (f + two)
    square = s * s
    half = (f * f) * spread(0.5, x)
    tail = square * polynomial(square, (TWICE_ATANH[:5], TWICE_ATANH[:5]))
    return fma(k, spread(LOG_2, x), f - (half - fma(s, half + tail, error)))


@traced
def plain_gap(row_max, rate, log_sum):
    """Gap of a plain slice."""
    summand = spread(0.0, row_max) - spread(
        log_sum, row_max
    )  # a negation would turn the sign of a NaN as well
    return Gap(row_max, spread(rate.inverse, row_max), summand)


@jit
def gap_of(temperature, like):
    """Inverse temperature, prescale, factor and cutoff of the gap of any slice whose maximum is finite.

    The cutoff is +inf for T = 0, which stands for the maximum. From T = 1 on the gap is that of a quarter of
    x, as x - max might overflow.
    """
    inverse = 0.0
    exponent = 0
    prescale = 1.0
    cutoff = spread(-math.inf, like)
    if temperature == 0.0:
        cutoff = spread(math.inf, like)
    elif temperature == math.inf:
        prescale = 0.25
        cutoff = -constant(LARGEST, like)
    else:
        if temperature >= 1.0:
            prescale = 0.25
        fraction, exponent = math.frexp(temperature * prescale)
        limit = int(constant(LARGEST_GAP_EXPONENT, like))
        exponent = min(max(-exponent, -limit), limit)
        inverse = 1.0 / fraction
    third = exponent // 3
    factor = spread(math.ldexp(1.0, third), like)
    inverse = spread(math.ldexp(inverse, exponent - 2 * third), like)
    return inverse, spread(prescale, like), factor, cutoff


@traced
def bounded_gap(row_max, inverse, prescale, factor, cutoff, log_sum):
    """Gap and guard of a slice, from what `gap_of` says of its temperature."""
    zero, one, lowest = spread(0.0, row_max), spread(1.0, row_max), -spread(math.inf, row_max)
    # With neither NaN nor +inf in the slice the constants of the temperature hold.
    known = log_sum == log_sum
    limit = select(known, row_max, lowest)
    usual = select(known, row_max, -lowest) < -lowest
    inverse = select(usual, spread(inverse, row_max), zero)
    prescale = select(usual, spread(prescale, row_max), one)
    factor = select(usual, spread(factor, row_max), one)
    cutoff = select(usual, spread(cutoff, row_max), limit)
    cutoff = select(cutoff > row_max, row_max, cutoff)
    gap = Gap(row_max, inverse, spread(0.0, row_max) - spread(log_sum, row_max))
    return gap, Guard(prescale, factor, factor, cutoff, None)


@jit
def guarded_gap(row_max, temperature, log_sum):
    """Gap and guard for any slice."""
    inverse, prescale, factor, cutoff = gap_of(temperature, row_max)
    return bounded_gap(row_max, inverse, prescale, factor, cutoff, log_sum)


@traced
def log_terms(x, gap, guard):
    """(x - max) / T - log_sum, or -inf below the cutoff; ``guard`` is None for plain slices."""
    row_max = spread(gap.row_max, x)
    inverse, summand = spread(gap.inverse, x), spread(gap.summand, x)
    if guard is None:
        value = fma(x - row_max, inverse, summand)
    else:
        zero = spread(0.0, x)
        prescale = spread(guard.prescale, x)
        distance = select(x == row_max, zero, fma(x, prescale, -(row_max * prescale)))
        distance = (distance * spread(guard.factor, x)) * spread(guard.factor2, x)
        value = fma(distance, inverse, summand)
        value = select(x < spread(guard.cutoff, x), spread(-math.inf, x), value)
    return value


@traced
def plain_logsumexp(row_max, temperature, sums):
    """Max + T log_sum, where the maximum is finite and T log_sum does not overflow."""
    # Which of several zeros is the maximum must not show.
    top = as_float64(row_max) + spread(0.0, temperature)
    return spread(fma(temperature, log_of_sum(row_max, sums), top), row_max)


@jit
def logsumexp_value(row_max, temperature, sums):
    """Max + T log_sum of one slice."""
    top = np.float64(row_max) + 0.0
    if math.isnan(sums[0]):
        value = spread(math.nan, row_max)
    elif math.isinf(top) or temperature == 0.0:
        value = spread(top, row_max)
    elif temperature == math.inf:
        value = spread(math.inf if log_of_sum(row_max, sums) > 0.0 else top, row_max)
    elif temperature < HUGE_TEMPERATURE:
        value = plain_logsumexp(row_max, temperature, sums)
    else:
        # T log_sum alone may overflow where the result does not.
        log_sum = log_of_sum(row_max, sums)
        value = spread(fma(temperature * 0.015625, log_sum, top * 0.015625) * 64.0, row_max)
    return value


@traced
def misses_faint_terms(row_max, temperature, sums):
    """Whether T times terms that were dropped, or are subnormal, may show beside a maximum near 0."""
    faint = as_float64(constant(FAINT_REST, row_max))
    near = larger(row_max, -row_max)
    return (
        (temperature > spread(1.0, temperature))
        & (temperature < spread(math.inf, temperature))
        & (rest_of(sums) < faint * as_float64(top_term(row_max)))
        & (as_float64(near) < temperature * (faint * spread(2.0**60, faint)))
    )


@traced
def entropy_value(row_max, sums):
    """log_sum - sum(p (x - max) / T): both parts are positive, so nothing cancels."""
    total = as_float64(top_term(row_max)) + rest_of(sums)
    moment = (as_float64(sums[2]) + as_float64(sums[3])) * spread(LOG_2, total)
    return spread(log_of_sum(row_max, sums) - moment / total, row_max)


# -- sums and results in the precision of the entries alone, for a GPU, where float64 may be slow -----------


@jit
def rescaled(row_max, sums, scale, guard):
    """Sum of terms, a pair, beside another maximum than its own."""
    power, excess, _ = terms(row_max, scale, guard)
    top = top_term(row_max)
    part = power * (sums[0] / top)
    term = term_of(part, excess)
    return term, fma(excess, part, part - term) + (sums[1] / top) * term_of(power, excess)


@jit
def rescaled_split(row_max, sums, scale, guard, shared_max):
    """(ties, rest, error) beside another maximum than its own, where ties are no ties."""
    if row_max == shared_max:
        return sums[0], sums[1], sums[2]
    zero = spread(0.0, row_max)
    total, error = merge(sums[0] * top_term(row_max), zero, sums[1], sums[2])
    rest, error = rescaled(row_max, (total, error), scale, guard)
    return zero, rest, error


@jit
def rescaled_moment(row_max, sums, scale, guard):
    """Sum of terms times (x - max) c, a pair, beside another maximum than its own."""
    power, excess, product = terms(row_max, scale, guard)
    share = term_of(power, excess) / top_term(row_max)
    total = (sums[0] * top_term(row_max) + (sums[1] + sums[2])) * share
    return merge(sums[3] * share, sums[4] * share, total * product, spread(0.0, row_max))


@jit
def own_log_of_sum(row_max, sums):
    """`log_of_sum` in the precision of the sums: what rounding takes from the argument of log1p is added.

    Here sums are (ties, rest, error, moment, moment_error): the number of entries equal to the maximum, and
    the others.
    """
    lowest = -spread(math.inf, row_max)
    if row_max == lowest:
        return spread(math.nan, row_max)
    one, zero, top = spread(1.0, row_max), spread(0.0, row_max), top_term(row_max)
    total, error = merge(sums[0] - one, zero, sums[1] / top, sums[2] / top)
    argument = total + error
    return log1p(argument) + ((total - argument) + error) / (one + argument)


@jit
def own_logsumexp_value(row_max, high, low, unit, sums):
    """`logsumexp_value` for T = (high + low) unit, where the unit is above 1 if T alone may overflow."""
    zero, infinite = spread(0.0, row_max), spread(math.inf, row_max)
    log_sum = own_log_of_sum(row_max, sums)
    top = row_max + zero  # which of several zeros is the maximum must not show
    if math.isnan(sums[1]) or math.isnan(high):
        value = spread(math.nan, row_max)
    elif abs(top) == infinite or high == zero or log_sum == zero:
        value = top
    elif high == infinite:
        value = infinite
    else:
        value = fma(high, log_sum, fma(low, log_sum, top / unit)) * unit
    return value


@jit
def own_misses_faint_terms(row_max, temperature, sums):
    """`misses_faint_terms` in the precision of the sums."""
    one, faint = spread(1.0, row_max), constant(FAINT_REST, row_max)
    return (
        temperature > one
        and temperature < spread(math.inf, row_max)
        and sums[0] == one
        and sums[1] + sums[2] < faint * top_term(row_max)
        and abs(row_max) < temperature * (faint * spread(2.0**60, row_max))
    )


@jit
def own_faint_value(row_max, temperature, root, total):
    """Max + T root**2 total, from terms with their `BIAS`: none of the factors is subnormal."""
    top = top_term(row_max)
    value = ((temperature / top) * root) * (root * (total / top))
    return fma(value, spread(1.0, row_max) / top, row_max)


@jit
def own_entropy_value(row_max, sums):
    """`entropy_value` in the precision of the sums."""
    total = sums[0] * top_term(row_max) + (sums[1] + sums[2])
    moment = (sums[3] + sums[4]) * spread(LOG_2, row_max)
    return own_log_of_sum(row_max, sums) - moment / total


# -- a law: all that the kernels of a GPU need of a temperature, worked out in float64 beforehand -----------

LAW_WORDS = 20


@jit
def law_of(temperature, like):
    """Law of a temperature, as a tuple; one that is not in [0, inf] makes every result NaN.

    high, low, depth, limit of `rate_of`; high, low, prescale, cutoff, factor, factor2 of `guard_of`; inverse
    of `rate_of`; inverse, prescale, factor, cutoff of `gap_of`; unit, high, low with
    T = (high + low) unit; what spoils the sums; and 0.
    """
    zero = spread(0.0, like)
    spoil = zero
    if not temperature >= 0.0:
        spoil = spread(math.nan, like)
        temperature = 1.0
    rate = rate_of(temperature, like)
    high, low, guard = guard_of(temperature, like)
    inverse, prescale, factor, cutoff = gap_of(temperature, like)
    unit = 64.0 if temperature > 2.0**100 else 1.0
    scaled = temperature / unit
    scaled_high, scaled_low = spread(scaled, like), zero
    if scaled_high < spread(math.inf, like):
        scaled_low = spread(scaled - float(scaled_high), like)
    return (
        *(rate.high, rate.low, rate.depth, rate.limit + spoil),
        *(high, low, guard.prescale, guard.cutoff, guard.factor, guard.factor2),
        *(rate.inverse, inverse, prescale, factor, cutoff),
        *(spread(unit, like), scaled_high + spoil, scaled_low, spoil, zero),
    )
