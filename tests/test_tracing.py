"""Straight-line code that is traced: the same results as compiled, and errors for what it cannot do."""

from collections import namedtuple

import numba
import numpy as np
import pytest

from fastmax import _lanes, _math
from fastmax._jit import jit
from fastmax._tracing import kind_of, traced

Pair = namedtuple("Pair", "first second")


@traced
def swapped(pair, third):
    """A tuple of tuples, with what is absent, and constants."""
    first = pair.first if third is None else third
    return Pair(pair.second, 2.0 * first), (None, 1, True, first - 1)


@numba.njit(error_model="numpy")
def swap(x, third):
    pair, (absent, one, yes, less) = swapped(Pair(x[0], x[1]), third)
    return pair.first, pair.second, absent is None, one, yes, less


def test_tuples_constants_and_none_come_back():
    x = np.array([3.0, 5.0])
    assert swap(x, None) == (5.0, 6.0, True, 1, True, 2.0)
    assert swap(x, 7.0) == (5.0, 14.0, True, 1, True, 6.0)


@jit
def counted(x, n):
    """Jitted: it has a loop."""
    total = x
    for _ in range(n):
        total += x
    return total


@traced
def twice_counted(x, n):
    if isinstance(kind_of(n), numba.types.Integer):
        return counted(counted(x, n), n % 3)
    return x


@numba.njit(error_model="numpy")
def count(x, n):
    return twice_counted(x, n)


def test_traced_code_calls_jitted_code_and_branches_on_types():
    assert count(1.5, 4) == 1.5 * 5 * 2
    assert count(1.5, 4.0) == 1.5


@traced
def branching(x):
    return x if x > 0.0 else -x


@traced
def returning_an_array(x):
    return x


@traced
def dividing_by_none(x):
    return x / None


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (branching, 1.0, "cannot branch"),
        (returning_an_array, np.ones(2), "returns an array"),
        (dividing_by_none, 1.0, r"truediv\(float64, none\)"),
    ],
)
def test_what_cannot_be_traced_is_an_error(function, argument, message):
    def caller(x):
        return function(x)

    with pytest.raises(Exception, match=message):
        numba.njit(caller)(argument)


def test_python_calls_neither_intrinsics_nor_traced_functions():
    for function, arguments in ((_lanes.fma, (1.0, 1.0, 1.0)), (_math.merge, (1.0, 0.0, 1.0, 0.0))):
        with pytest.raises(NotImplementedError, match="jitted code only"):
            function(*arguments)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", [_math.multiplier, _math.reciprocal, _math.settled])
def test_traced_functions_give_the_bits_of_compiled_ones(function, dtype):
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(size=1000) * 20).astype(np.float64 if function is _math.multiplier else dtype)
    y = (x * 2.0 ** -rng.integers(10, 30, 1000)).astype(dtype)

    def results(call):
        @numba.njit(error_model="numpy")
        def run(x, y, first, second):
            for i in range(len(x)):
                first[i], second[i] = call(x[i], y[i])

        first, second = np.empty((2, 1000), dtype)
        run(x, y, first, second)
        return first, second

    for traced_bits, compiled_bits in zip(results(function), results(jit(function.py_func)), strict=True):
        np.testing.assert_array_equal(traced_bits.view(np.uint8), compiled_bits.view(np.uint8))
