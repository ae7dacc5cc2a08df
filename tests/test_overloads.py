"""The four functions inside users' jitted code: same results, and errors that say what is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import oracle
import pytest
from marks import nightly
from numba import prange
from numba.core.errors import TypingError
from numba.extending import overload

import fastmax

every = pytest.mark.parametrize("name", oracle.FUNCTIONS)
SOFTMAX: Any = fastmax.softmax
jit: Any = numba.njit
X = np.random.default_rng(0).normal(scale=3.0, size=(3, 4, 5))


def same(result, expected):
    """Assert that results have the same type, shape and bits."""
    result, expected = np.asarray(result), np.asarray(expected)
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert result.tobytes() == np.ascontiguousarray(expected).tobytes()


@numba.njit
def softmax_along(x, temperature, axis):
    return fastmax.softmax(x, temperature, axis=axis)


@numba.njit
def logsumexp_along(x, temperature, axis):
    return fastmax.logsumexp(x, temperature=temperature, axis=axis)


ALONG = {fastmax.softmax: softmax_along, fastmax.logsumexp: logsumexp_along}


@pytest.mark.parametrize("dtype", [*nightly(np.float32), np.float64])
def test_vectors(dtype):
    @numba.njit
    def call(x):
        return (
            fastmax.softmax(x),
            fastmax.log_softmax(x, 0.5),
            fastmax.logsumexp(x, temperature=2),
            fastmax.entropy(x, axis=-1, temperature=np.inf),
        )

    for n in (1, 3, 100, 20_001):
        x = np.resize(X, n).astype(dtype)
        results = call(x)
        same(results[0], fastmax.softmax(x))
        same(results[1], fastmax.log_softmax(x, 0.5))
        same(dtype(results[2]), fastmax.logsumexp(x, 2))
        same(dtype(results[3]), fastmax.entropy(x, np.inf))
    empty = np.zeros(0, dtype)
    results = call(empty)
    assert results[0].shape == results[1].shape == (0,)
    assert results[2:] == (-np.inf, 0.0)


@pytest.mark.parametrize("function", [fastmax.softmax, *nightly(fastmax.logsumexp)])
@pytest.mark.parametrize("temperatures", [0, 1, *nightly(3)])
def test_axes_and_temperatures(function, temperatures):
    """One temperature, or an array with so many axes: each kind is compiled by itself, for each layout."""
    call = ALONG[function]
    for axis in (0, 1, 2, -1, -2, -3):
        rest = [n for i, n in enumerate(X.shape) if i != axis % 3]
        temperature = {0: 0.3, 1: np.linspace(0, 2, rest[-1]), 3: np.array([[[0.0]], [[np.inf]]])}[
            temperatures
        ]
        for x in (X,) if temperatures == 1 else (X, X.transpose(2, 0, 1)):
            same(call(x, temperature, axis), function(x, temperature, axis=axis))


@pytest.mark.parametrize("axis", nightly(((-1, 0),), None, ((0, 2),), ((),)))
def test_several_axes(axis):
    call = numba.njit(lambda x: fastmax.entropy(x, 0.7, axis=axis))
    np.testing.assert_allclose(call(X), fastmax.entropy(X, 0.7, axis=axis), rtol=1e-14)
    assert np.shape(call(X)) == np.shape(fastmax.entropy(X, 0.7, axis=axis))


def test_axes_that_are_kept():
    axes: Any = (-1, 0)
    call = numba.njit(lambda x: fastmax.entropy(x, 0.7, axis=axes, keepdims=True))
    expected = fastmax.entropy(X, 0.7, axis=axes, keepdims=True)
    np.testing.assert_allclose(call(X), expected, rtol=1e-14, strict=True)


@pytest.mark.parametrize(
    "x", [[1.0, 2.0, 3.0], (1, 2, 3), 4, np.array(4.0), np.arange(9), X[0] > 0, X[::-1, ::2]]
)
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPendingDeprecationWarning")
def test_lists_numbers_and_other_dtypes(x):
    same(numba.njit(lambda x: fastmax.softmax(x))(x), fastmax.softmax(x))


def test_special_values():
    inf, nan = np.inf, np.nan
    for values in ([-inf, 0, 1], [inf, 0, inf], [nan, 0, 1], [-inf, -inf]):
        for temperature in (0.0, 1.0, inf):
            x = np.array(values)
            same(softmax_along(x, temperature, 0), fastmax.softmax(x, temperature))
            same(logsumexp_along(x, temperature, 0), fastmax.logsumexp(x, temperature))


def test_fastmath_and_prange_of_the_caller_change_nothing():
    @numba.njit(parallel=True, fastmath=True)
    def rows(x):
        out = np.empty_like(x)
        for i in prange(len(x)):
            out[i] = fastmax.softmax(x[i], 0.5)
        return out

    x = np.resize(X, (50, 300))
    x[3, 7] = np.nan
    x[4, 7] = -np.inf
    same(rows(x), fastmax.softmax(x, 0.5, axis=1))


def test_reversed_and_read_only_vectors():
    for x in (X.ravel()[::-1], X.ravel()[::3]):
        same(softmax_along(x, 1.0, 0), fastmax.softmax(x))
    x = X.ravel().copy()
    x.flags.writeable = False
    same(softmax_along(x, 1.0, 0), fastmax.softmax(x))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [-1.0, np.nan, np.array([1.0, 1.0, 1.0, 1.0, -2.0])])
def test_temperatures_out_of_range(temperature):
    with pytest.raises(ValueError, match="temperature must be in"):
        softmax_along(X, temperature, 1)


def test_axes_out_of_range():
    with pytest.raises(np.exceptions.AxisError, match="axis 3 is out of bounds for array of dimension 3"):
        softmax_along(X, 1.0, 3)


def test_temperatures_of_another_shape():
    with pytest.raises(ValueError, match="temperature does not broadcast"):
        softmax_along(X, np.ones(3), 0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: SOFTMAX(x, 1.0, 0), "too many positional arguments"),
        (lambda x: fastmax.softmax(x, where=x > 0), "where is not available inside jitted code"),
        (lambda x: fastmax.softmax(x, out=x), "out is not available inside jitted code"),
        (lambda x: fastmax.softmax(x, "1"), "temperature must be a real number"),
        (lambda x: SOFTMAX(x, axis=1.0), "axis must be an integer, a tuple of integers or None"),
        (lambda x: SOFTMAX(x, axis=(0, 1, 2, 0)), "axis must name at most the 3 axes of x"),
        (lambda x: fastmax.entropy(x, keepdims=x.size > 0), "keepdims must be True or False written out"),
        (lambda x: fastmax.entropy(x * 1j), "x must be an array .* got array.complex128"),
        (lambda x: fastmax.entropy("x"), "x must be an array"),
    ],
)
def test_typing_errors_say_what_is_wrong(function, message):
    with pytest.raises(TypingError, match=message):
        jit(function)(X)


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "softmax(x[0], 0.3)",
        *nightly("log_softmax(x, t, axis=0)", "entropy(x[:, ::2], 0.3, axis=1)"),
    ],
)
def test_cached_callers(expression, tmp_path):
    """A function with cache=True gives the same bits in the process that compiles it and in those after."""
    script = tmp_path / "program.py"
    script.write_text(f"""
import numba
import numpy as np
import fastmax

@numba.njit(cache=True)
def call(x, t):
    return fastmax.{expression}

x = np.random.default_rng(0).normal(size=(30, 40))
t = np.linspace(0.1, 2.0, 40)
assert (call(x, t) == fastmax.{expression}).all()
print(call(x, t).tobytes().hex(), sum(call.stats.cache_hits.values()))
""")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    environment = {"PYTHONPATH": str(Path(fastmax.__file__).parents[1])}
    printed = [
        subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env=inherited | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert printed[0][0] == printed[1][0]
    assert [hits for _, hits in printed] == ["0", "1"]


@pytest.mark.parametrize(
    ("written_out", "function"),
    [
        (lambda x: fastmax.logsumexp(x, where=None, keepdims=False, out=None), fastmax.logsumexp),
        *nightly((lambda x: fastmax.softmax(x, where=None, out=None), fastmax.softmax)),
    ],
)
def test_defaults_written_out(written_out, function):
    assert (jit(written_out)(X) == function(X)).all()


def test_a_call_while_the_caller_is_compiled():
    """As an overload may do that computes a constant; the compiler is then locked by this thread."""

    def constant(x):
        return 0.0

    @overload(constant)
    def typed(x):
        value = float(fastmax.logsumexp(np.arange(3.0)))
        return lambda x: value

    assert jit(lambda x: constant(x))(1.0) == fastmax.logsumexp(np.arange(3.0))
