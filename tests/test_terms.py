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
    """Copy a function of `_math` for a table of that many entries."""
    precision, bits, bias = FORMATS[dtype]
    form = _math.form_of((entries, 1) if dtype == np.float32 else (1, entries))

    def table_power(exponent):
        multiple = float(exponent) - 1.5 * 2.0**bits / entries - bias
        n, j = divmod(round(multiple * entries), entries)
        return dtype(math.ldexp(form.heads[precision][j], n)), dtype(form.lows[precision][j])

    primitives = {
        **simulator._Target.PRIMITIVES,
        "ZERO": form.zero,
        "SLOPE": form.slope,
        "CURVATURE": form.curvature,
        "table_of": lambda x: None if entries == 1 else True,
        "table_power": table_power,
    }
    return _cuda_target.rebuilt(function, primitives, lambda copy: copy)


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
        (np.float32, 4, 0.7),
        (np.float32, 16, 0.62),
        (np.float64, 1, 0.9),
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
