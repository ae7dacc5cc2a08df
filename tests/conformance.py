"""The cases every code path of every backend must get right, and the list of those it does not."""

import functools
import math

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


def failures(function, name, path, dtype, allowed=0.0):
    """Return what a function gets wrong, called through a path, one line a case.

    Errors in the unit of `oracle.errors` are allowed beyond the usual ones.
    """
    found = []
    for description, x, temperature, expected in cases(dtype):
        result = path(function, x, temperature)
        fault = oracle.fault(name, result, expected)
        if fault and not (allowed and oracle.errors(name, result, expected).max(initial=0.0) <= allowed):
            found.append(f"{description}: {fault}")
    return found


# Errors on a GPU in ulp of float32: 3, and 0.01 of an ulp of the types of 16 bits.
ALLOWED_ON_GPU = {"float32": 3.0, "float16": 0.01 * 2**13, "bfloat16": 0.01 * 2**16}


def wrong_beside_unlike_parts(softmax, n, dtype):
    """Return (case, T, error) of what softmax on a GPU gets wrong on the rows of `unlike_parts`."""
    own = unlike_parts(n)
    x = np.stack([entries.astype(dtype) for entries, _ in own.values()])
    temperatures = np.array([temperature for _, temperature in own.values()])
    result = softmax(x, temperatures, axis=1)
    wrong = []
    for i, case in enumerate(own):
        error = oracle.errors("softmax", result[i], oracle.expect(x[i], temperatures[i])).max()
        if not error <= ALLOWED_ON_GPU[np.dtype(dtype).name]:
            wrong.append((case, temperatures[i], error))
    return wrong


def unlike_parts(n):
    """Return slices whose parts, in the blocks of a team, are unlike each other: by name, (entries, T)."""
    rng = np.random.default_rng(n)
    x = rng.choice(rng.normal(scale=3.0, size=60), size=n).astype(np.float32)
    first, last = slice(0, n // 3), slice(-(n // 3), None)
    border = np.float32(2.0**15 * math.log(2))  # |max c| of plain slices is at most 2**15

    def with_part(part, value):
        result = x.copy()
        result[part] = value
        return result

    return {
        "nothing in the first": (with_part(first, -np.inf), 1.0),
        "nothing in the last": (with_part(last, -np.inf), 1.0),
        "nothing at all": (np.full_like(x, -np.inf), 1.0),
        "masked by the lowest number": (with_part(last, np.finfo(np.float32).min), 1.0),
        "masked by -1e9": (with_part(first, -1e9), 0.5),
        "far below": (with_part(first, x[first] - 100), 1.0),
        "below what shows": (with_part(last, x[last] - 300), 1.0),
        "infinite in one": (with_part(slice(n - 5, n - 3), np.inf), 1.0),
        "NaN in one": (with_part(slice(3, 4), np.nan), 1.0),
        "NaN where nothing counts": (with_part(first, np.where(np.arange(n // 3) == 7, np.nan, -1e9)), 1.0),
        "ties in all": (np.where(np.arange(n) % 97 == 3, np.float32(11.5), x), 1.0),
        "too high": (x + np.float32(2 * border), 1.0),
        "too low": (x - np.float32(2 * border), 1.0),
        "on both sides of the border": (np.where(np.arange(n) < n // 2, 0, np.float32(0.3)) - border, 1.0),
        "just below it": (np.where(np.arange(n) < n // 2, 60, 0).astype(np.float32) - border - 61, 1.0),
        "T = 0": (np.where(np.arange(n) % 97 == 3, np.float32(11.5), x), 0.0),
        "T = inf": (x, np.inf),
        "tiny T": (x, 1e-30),
        "huge T": (x, 1e30),
    }
