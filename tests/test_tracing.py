"""Straight-line code that is traced: the same results as compiled, and errors for what it cannot do."""

import builtins
from collections import namedtuple
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from fastmax import (
    _apart,
    _columns,
    _cpu,
    _interleaved,
    _lanes,
    _learning,
    _math,
    _rows,
    _slice,
    _tiles,
    _tracing,
)
from fastmax._jit import jit
from fastmax._tracing import is_traced, kind_of, traced

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


@jit
def ones(n):
    return np.ones(n)


@jit
def total(x):
    return x.sum()


@traced
def branching(x):
    return x if x > 0.0 else -x


@traced
def returning_an_array(x):
    return x


@traced
def taking_an_array(n):
    return total(ones(n))


@traced
def dividing_by_none(x):
    return x / None


@traced
def calling_a_stub(x):
    return _lanes.workspace(3, x)


@traced
def with_a_large_number(n):
    return n + 2**63


@traced
def with_a_scalar_of_numpy(x):
    return x + np.float32(1.0)


@traced
def called_with_none_or_not(x):
    return 1.0 if x is None else 2.0


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (branching, 1.0, "cannot branch"),
        (returning_an_array, np.ones(2), "returning_an_array returns an array"),
        (taking_an_array, 3, "ones.* returns an array"),
        (dividing_by_none, 1.0, r"truediv\(float64, none\)"),
        (calling_a_stub, 1.0, "workspace is for jitted code only"),
        (with_a_large_number, 1, "9223372036854775808 has more than 64 bits"),
        (with_a_scalar_of_numpy, 1.0, "takes no float32"),
    ],
)
def test_what_cannot_be_traced_is_an_error(function, argument, message):
    def caller(x):
        return function(x)

    with pytest.raises(Exception, match=message):
        numba.njit(caller)(argument)


def test_optional_values_are_an_error():
    def caller(x):
        return called_with_none_or_not(x if x > 0.0 else None)

    with pytest.raises(Exception, match="takes no OptionalType"):
        numba.njit(caller)(1.0)


def test_an_interrupt_while_code_is_registered_leaves_the_next_call_working(monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    @_tracing.traced
    def doubled(x):
        return x + x

    def caller(x):
        return doubled(x)

    with monkeypatch.context() as patch:
        patch.setattr(_tracing._OF_A_CPU, "_extending", SimpleNamespace(lower_builtin=interrupted))
        with pytest.raises(KeyboardInterrupt):
            numba.njit(caller)(1.5)
    assert len(calls) == 1
    assert numba.njit(caller)(1.5) == 3.0


def names_of(code):
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from names_of(constant)


def test_traced_code_calls_nothing_that_would_run_in_python_alone():
    """What is called is traced, an intrinsic or jitted, or works on values in a trace."""
    works = {_tracing.kind_of, tuple, map, abs, isinstance, len, range, enumerate, zip}
    checked = 0
    for module in (_math, _lanes, _slice, _tiles, _rows, _columns, _apart, _interleaved, _cpu, _learning):
        for function in vars(module).values():
            if not (hasattr(function, "_numba_type_") and is_traced(function)):
                continue
            source = function.py_func
            assert source.__defaults__ is None
            for name in names_of(source.__code__):
                value = source.__globals__.get(name, getattr(builtins, name, None))
                if callable(value) and value not in works and not hasattr(value, "_fields"):
                    assert hasattr(value, "_numba_type_"), f"{function.__name__} calls {name}"
            checked += 1
    assert checked > 90


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
