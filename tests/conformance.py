"""The cases every code path of every backend must get right, and the list of those it does not."""

import functools

import ml_dtypes
import numpy as np
import oracle

TEMPERATURES = (0.0, 5e-324, 1e-310, 0.1, 1.0, 10.0, 1e308, np.inf)

_NORMAL = np.random.default_rng(1).normal(scale=3.0, size=1000)
_POOL = np.random.default_rng(2).choice(_NORMAL[:100], size=16385)


def slices(dtype):
    """Return the slices by name, in a dtype."""
    info = ml_dtypes.finfo(dtype)
    largest, smallest = float(info.max), float(info.smallest_subnormal)
    inf, nan = np.inf, np.nan
    values = {
        "empty": [],
        "one entry": [0.3],
        "the document's": [1, 2, 3],
        "tied maximum": [1, 3, 3],
        "all equal": [-2.5] * 8,
        **{f"{k} normal": _NORMAL[:k] for k in (7, 15, 16, 17, 33, 100, 1000)},
        "16385 normal": _POOL,
        "large offset": 1e4 + _NORMAL[:40] / 4,
        "large gaps": _NORMAL[:40] * 300,
        "down to subnormal results": np.linspace(0, 1.02 * np.log(smallest), 45),
        "opposite extremes": [largest, -largest, largest / 2, 0],
        "subnormal entries": np.array([3, 0, -1, 2, 1, 3, -3]) * smallest,
        "-inf": [-inf, 0, 0, 1],
        "-inf but one": [-inf, 2, -inf],
        "all -inf": [-inf] * 3,
        "+inf": [inf, 0, inf, 1],
        "one +inf": [0, inf],
        "both infinities": [-inf, 0, inf, inf, inf],
        "NaN": [0, nan, 1],
        "NaN and infinities": [nan, inf, -inf],
    }
    return {name: np.asarray(x).astype(dtype) for name, x in values.items()}


@functools.cache
def cases(dtype):
    """Return (description, slice, temperature, expected) for every case of a dtype."""
    return [
        (f"{name}, T = {temperature}", x, temperature, oracle.expect(x, temperature))
        for name, x in slices(dtype).items()
        for temperature in TEMPERATURES
    ]


def failures(function, name, path, dtype):
    """Return what a function, called through a path, gets wrong, one line a case."""
    found = []
    for description, x, temperature, expected in cases(dtype):
        fault = oracle.fault(name, path(function, x, temperature), expected)
        if fault:
            found.append(f"{description}: {fault}")
    return found
