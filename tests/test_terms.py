"""Terms with the tables of all processors, of which this is but one: `_math` in plain Python."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("greenlet", reason="the simulator needs greenlet")

import simulator

from fastmax import _cuda_target, _math

FORMATS = {np.float32: (0, 23, 127), np.float64: (1, 52, 1023)}  # bits of the fraction, bias


def in_python(function, dtype, entries):
    """Copy a function of `_math` for a table of that many entries; with one there is none."""
    precision, bits, bias = FORMATS[dtype]
    both = tuple(entries if entries in own else 2 for own in _math.EXP2)
    form, (heads, lows) = _math.form_of(both), _math.table_of(both)
    of_ratios = _math.ratio_coefficients(both)
    slope, curvature = _math.first_and_others(of_ratios)

    def whole_steps(x):
        return dtype(math.floor(float(x) * entries) / entries)

    def fma_down(a, b, c):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        value = dtype(float(exact))
        return value if Fraction(float(value)) <= exact else np.nextafter(value, dtype(-np.inf))

    def power_in(step):
        def table_power(exponent, shift):
            multiple = float(exponent) - 1.5 * 2.0**bits / step - bias
            n, j = divmod(round(multiple * entries), entries)
            low = dtype(lows[precision][j])
            return dtype(math.ldexp(heads[precision][j], n)), low if shift is None else low + shift

        return table_power

    def polynomial_by_pairs(x, square, coefficients):
        own = coefficients[precision]
        if len(own) <= 3:
            return simulator.polynomial(x, coefficients)
        parts = [simulator.polynomial(x, (own[i : i + 2],) * 2) for i in range(0, len(own), 2)]
        return simulator.polynomial(square, (parts, parts))

    primitives = simulator._Target.PRIMITIVES
    if entries > 1:
        primitives = {
            **{name: value for name, value in primitives.items() if name not in _math.WITHOUT_TABLE},
            "ROUNDS_DOWN": entries == 16,
            "RATIO_ZERO": _math.zero_of(both),
            "RATIO_COEFFICIENTS": of_ratios,
            "RATIO_SLOPE": slope,
            "RATIO_CURVATURE": curvature,
            "takes_ratios": lambda like: entries > 2,
            "ZERO": form.zero,
            "MIDDLE": form.middle,
            "ROUNDER": form.zero,
            "SLOPE": form.slope,
            "CURVATURE": form.curvature,
            "abreast": lambda x: x,
            "polynomial_by_pairs": polynomial_by_pairs,
            "whole_steps": whole_steps,
            "table_power": power_in(_math.STEPS[entries][precision]),
            "ratio_power": power_in(entries),
            "fma_down": fma_down,
        }
    return _cuda_target.rebuilt(function, primitives, lambda copy: copy, lambda copy: copy)


def draws(dtype, rng):
    """Yield temperatures, maxima, and entries: anywhere, and where the fraction of an exponent is large."""
    for i in range(1000):
        temperature = float(2 ** rng.uniform(-3, 3))
        row_max = dtype(rng.normal() * 10 ** rng.uniform(-3, 3) * (i % 2))
        octaves = rng.uniform(0.4, 0.6) if i % 4 == 0 else abs(rng.normal()) * 10 ** rng.uniform(-3, 1.5)
        yield temperature, row_max, dtype(row_max - octaves * math.log(2) * temperature)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "entries", "limit"),
    [
        (np.float32, 1, 0.9),
        (np.float32, 2, 0.75),
        (np.float32, 4, 0.75),
        (np.float32, 16, 0.62),
        (np.float64, 1, 0.9),
        (np.float64, 2, 0.75),
        (np.float64, 16, 0.62),
    ],
)
def test_terms_are_within_an_ulp(dtype, entries, limit, guarded):
    rate_of, plain_scale, guarded_scale, terms = (
        in_python(getattr(_math, name), dtype, entries)
        for name in ("rate_of", "plain_scale", "guarded_scale", "terms")
    )
    top = 2.0 ** _math.BIAS[FORMATS[dtype][0]]
    errors = []
    for temperature, row_max, x in draws(dtype, np.random.default_rng(0)):
        if guarded:
            scale, guard = guarded_scale(row_max, temperature)
        else:
            scale, guard = plain_scale(row_max, rate_of(temperature, row_max)), None
        power, excess, _ = terms(row_max, scale, guard)
        assert simulator.fma(excess, power, power) == top
        power, excess, _ = terms(x, scale, guard)
        with mpmath.workprec(200):
            exact = top * mpmath.exp((mpmath.mpf(float(x)) - float(row_max)) / temperature)
            error = abs(float(simulator.fma(excess, power, power)) - exact)
            errors.append(float(error) / float(np.spacing(dtype(float(exact)))))
    assert max(errors) < limit


@pytest.mark.parametrize(
    ("dtype", "entries", "limit"),
    [
        (np.float32, 4, 0.67),
        (np.float32, 16, 0.62),
        (np.float64, 16, 0.62),
    ],
)
def test_terms_of_softmax_are_within_an_ulp_times_their_unit(dtype, entries, limit):
    rate_of, ratio_scale, ratio_terms, unit_of = (
        in_python(getattr(_math, name), dtype, entries)
        for name in ("rate_of", "ratio_scale", "ratio_terms", "unit_of")
    )
    precision, _, _ = FORMATS[dtype]
    errors, units = [], []
    for temperature, row_max, x in draws(dtype, np.random.default_rng(0)):
        rate = rate_of(temperature, row_max)
        scale = ratio_scale(row_max, rate)
        unit = float(unit_of(row_max, rate))
        power, excess = ratio_terms(row_max, scale, None)
        assert power == 2.0 ** _math.BIAS[precision]
        power, excess = ratio_terms(x, scale, None)
        with mpmath.workprec(200):
            exact = unit * mpmath.exp((mpmath.mpf(float(x)) - float(row_max)) / temperature)
            exact *= 2.0 ** _math.BIAS[precision]
            error = abs(float(simulator.fma(excess, power, power)) - exact)
            errors.append(float(error) / float(np.spacing(dtype(float(exact)))))
        units.append(unit)
    assert max(errors) < limit
    lowest, highest = (0.0, 1 / 16) if entries == 16 else (-0.5 / entries, 0.5 / entries)
    assert 2.0**lowest - 2.0**-9 <= min(units) < 2.0**lowest + 0.01
    assert 2.0**highest - 0.01 < max(units) <= 2.0**highest + 2.0**-9


@pytest.mark.parametrize(
    ("dtype", "entries"),
    [(np.float32, 2), (np.float32, 4), (np.float32, 16), (np.float64, 2), (np.float64, 16)],
)
def test_the_term_of_a_maximum_leaves_nothing_over(dtype, entries):
    """It is its unit times 2**BIAS, and the sum of that and what sums start from is a float."""
    names = "rate_of", "ratio_scale", "exact_ratio_terms", "unit_of", "exact_terms", "plain_scale"
    rate_of, ratio_scale, exact_ratio_terms, unit_of, exact_terms, plain_scale = (
        in_python(getattr(_math, name), dtype, entries) for name in names
    )
    rng = np.random.default_rng(1)
    top = 2.0 ** _math.BIAS[FORMATS[dtype][0]]
    maxima = rng.choice([-1.0, 1.0], 3000) * 2.0 ** rng.uniform(-60, 12, 3000)
    for row_max in [dtype(0.0), *maxima.astype(dtype)]:
        rate = rate_of(float(2 ** rng.uniform(-2, 2)), row_max)
        unit = Fraction(float(unit_of(row_max, rate)))
        power, excess = exact_ratio_terms(row_max, ratio_scale(row_max, rate), None)
        assert (power, 1 + Fraction(float(excess))) == (top, unit)
        assert Fraction(float(dtype(2) + dtype(unit))) == 2 + unit
        assert exact_terms(row_max, plain_scale(row_max, rate), None) == (top, 0.0, 0.0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_probability_is_not_subnormal_before_the_last_step(dtype):
    """Not even that of the lowest term, beside 2**24 of the highest."""
    precision, bits, _ = FORMATS[dtype]
    bias, depth = _math.BIAS[precision], _math.DEPTH[precision]
    raised = 2.0 ** -(bias + 24) * _math.RAISE[precision]
    assert 2.0 ** (bias - depth) * raised * 2.0**-bits >= np.finfo(dtype).tiny
    assert _math.RAISE[precision] * _math.LOWER[precision] == 1.0
    assert _math.RAISE[precision] < np.finfo(dtype).max / 2
