"""Terms with the tables of all processors, of which this is but one: `_math` in plain Python."""

import math

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
    form, (heads, lows) = _math.form_of(entries), _math.table_of(entries)
    step = _math.STEPS[entries][precision]

    def whole_steps(x):
        return dtype(math.floor(float(x) * entries) / entries)

    def table_power(exponent):
        multiple = float(exponent) - 1.5 * 2.0**bits / step - bias
        n, j = divmod(round(multiple * entries), entries)
        return dtype(math.ldexp(heads[precision][j], n)), dtype(lows[precision][j])

    primitives = simulator._Target.PRIMITIVES
    if entries > 1:
        primitives = {
            **{name: value for name, value in primitives.items() if name not in _math.WITHOUT_TABLE},
            "ZERO": form.zero,
            "MIDDLE": form.middle,
            "ROUNDER": form.zero,
            "SLOPE": form.slope,
            "CURVATURE": form.curvature,
            "abreast": lambda x: x,
            "whole_steps": whole_steps,
            "table_power": table_power,
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
