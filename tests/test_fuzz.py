"""Random arguments of every kind against the exact values: layouts, axes, temperatures, masks, outputs."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmax

FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
INTEGERS = (np.bool_, np.int8, np.uint8, np.int16, np.int32, np.uint64)
TEMPERATURES = (0.0, 5e-324, 1e-3, 0.37, 1.0, 10.0, 1e6, 1e308, np.inf)
SPECIAL = (0.0, -0.0, 1.0, -np.inf, np.inf, np.nan, 1e30, -1e30, 60000.0)


@st.composite
def arrays(draw):
    """Return an array of up to 4 axes: reversed, spaced, transposed, repeated, overlapping, byte swapped."""
    dtype = np.dtype(draw(st.sampled_from(FLOATS + INTEGERS)))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), max_size=4).map(tuple))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    buffer = draw_values(draw, rng, 4 * math.prod(max(1, n) for n in shape) + 64, dtype)
    if dtype.kind == "f" and dtype.itemsize > 2 and draw(st.booleans()):
        buffer = buffer.astype(dtype.newbyteorder("S"))
    layout = draw(st.sampled_from(["packed", "packed", "spaced", "repeated", "overlapping"]))
    if layout == "overlapping":
        strides = [draw(st.sampled_from([1, 2])) * dtype.itemsize for _ in shape]
        x = np.lib.stride_tricks.as_strided(buffer, shape, strides, writeable=False)
    elif layout == "repeated" and shape:
        axis = draw(st.integers(0, len(shape) - 1))
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        x = np.broadcast_to(buffer[: int(np.prod(one))].reshape(one), shape)
    else:
        step = 2 if layout == "spaced" and shape else 1
        size = int(np.prod(shape))
        x = (
            buffer[: size * step].reshape(*shape[:-1], -1 if size else 0)[..., ::step]
            if shape
            else buffer[0:1].reshape(())
        )
        x = x.reshape(shape) if x.size == 0 else x
    x = x.transpose(draw(st.permutations(range(x.ndim))))
    return x[tuple(slice(None, None, draw(st.sampled_from([1, 1, -1]))) for _ in x.shape)]


def draw_values(draw, rng, size, dtype):
    """Return values of a kind: ordinary, with ties, far apart, or with special ones among them."""
    if dtype.kind in "biu":
        low = -100 if dtype.kind == "i" else 0
        return rng.integers(low, 100, size).astype(dtype)
    kind = draw(st.sampled_from(["normal", "ties", "far", "special"]))
    if kind == "ties":
        return rng.integers(-3, 3, size).astype(dtype)
    values = rng.normal(size=size) * {"far": 300.0}.get(kind, 3.0)
    if kind == "special":
        chosen = rng.random(size) < 0.2
        values[chosen] = rng.choice(SPECIAL, chosen.sum())
    with np.errstate(over="ignore"):
        return values.astype(dtype)


@st.composite
def calls(draw):
    """Return a function's name, an array and keywords for the call."""
    name = draw(st.sampled_from(oracle.FUNCTIONS))
    x = draw(arrays())
    axes = st.integers(-x.ndim, x.ndim - 1) if x.ndim else st.sampled_from([0, -1])
    choices: list[Any] = [axes, axes, st.none()]
    if x.ndim:
        picked = st.permutations(range(x.ndim)).flatmap(lambda p: st.integers(0, len(p)).map(lambda n: p[:n]))
        choices.append(picked.map(tuple))
    keywords: dict[str, Any] = {"axis": draw(st.one_of(choices))}
    reduced = reduced_axes(x, keywords["axis"])
    kept = tuple(n for i, n in enumerate(x.shape) if i not in reduced)
    shape = draw(
        st.sampled_from([(), (), kept, tuple(1 if i % 2 else n for i, n in enumerate(kept)), (2, *kept)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keywords["temperature"] = rng.choice(TEMPERATURES, shape)
    if draw(st.integers(0, 3)) == 0:
        keywords["where"] = rng.random(draw(st.sampled_from([x.shape, x.shape[-1:]]))) < 0.7
    if name not in oracle.ELEMENTWISE:
        keywords["keepdims"] = draw(st.booleans())
    return name, x, keywords, draw(st.sampled_from(["none", "none", "packed", "spaced"]))


def reduced_axes(x, axis):
    if axis is None:
        return tuple(range(x.ndim))
    if x.ndim == 0:
        return ()
    return tuple(i % x.ndim for i in (axis if isinstance(axis, tuple) else (axis,)))


def check(call):
    name, x, keywords, output = call
    function, before = getattr(fastmax, name), x.tobytes()
    result = function(x, **keywords)
    assert x.tobytes() == before
    compare(name, np.asarray(result), x, **keywords)
    if output != "none" and np.ndim(result):
        shape = np.shape(result)
        spaced = (*shape[:-1], 2 * shape[-1])
        out = (
            np.empty(shape, result.dtype) if output == "packed" else np.empty(spaced, result.dtype)[..., ::2]
        )
        assert function(x, **keywords, out=out) is out
        compare(name, out, x, **keywords)


def compare(name, result, x, axis, temperature, where=None, keepdims=False):
    """Compare each slice of a result with the exact values."""
    reduced = sorted(reduced_axes(x, axis))
    kept = [i for i in range(x.ndim) if i not in reduced]
    slices = x.transpose(kept + reduced).reshape(
        [x.shape[i] for i in kept] + [-1 if x.size else int(np.prod([x.shape[i] for i in reduced]))]
    )
    mask = (
        np.broadcast_to(True if where is None else where, x.shape)
        .transpose(kept + reduced)
        .reshape(slices.shape)
    )
    batch = np.broadcast_shapes(slices.shape[:-1], np.shape(temperature))
    places = reduced
    if x.ndim and axis is not None:
        full = len(batch) + len(reduced)
        own = [i % full for i in (axis if isinstance(axis, tuple) else (axis,))]
        given = dict(zip(reduced_axes(x, axis), own, strict=True))
        places = [given[i] for i in reduced] if len(set(own)) == len(own) else reduced
    if name in oracle.ELEMENTWISE:
        result = np.moveaxis(result, places, range(-len(places), 0)) if places else result
        result = result.reshape(*batch, slices.shape[-1])
    else:
        result = result.reshape(batch)
    slices = np.broadcast_to(slices, batch + slices.shape[-1:])
    mask = np.broadcast_to(mask, slices.shape)
    temperature = np.broadcast_to(temperature, batch)
    indices = list(np.ndindex(batch))
    for i in indices[:: max(1, len(indices) // 3)]:
        expected = oracle.expect(slices[i], float(temperature[i]), mask[i])
        found = result[i]
        if not mask[i].any():
            absent = {"softmax": 0.0, "log_softmax": -np.inf, "logsumexp": -np.inf, "entropy": 0.0}[name]
            assert (np.asarray(found) == absent).all()
        else:
            assert oracle.fault(name, found, expected) == "", (i, slices[i], temperature[i], mask[i])


CHECKS: Any = list(HealthCheck)


@settings(max_examples=500, derandomize=True, deadline=None, database=None, suppress_health_check=CHECKS)
@given(calls())
def test_random_calls(call):
    check(call)


@pytest.mark.nightly
@settings(max_examples=10_000, derandomize=False, deadline=None, database=None, suppress_health_check=CHECKS)
@given(calls())
def test_many_random_calls(call):
    check(call)


@pytest.mark.huge
@pytest.mark.parametrize("name", oracle.FUNCTIONS)
def test_more_entries_than_32_bits_count(name):
    """In one slice, in columns, and in rows: each entry is one of two values, so results are known."""
    n = 2**31 + 7
    x = np.zeros(n, np.float16)
    x[-1] = x[n // 2] = 3.0
    function = getattr(fastmax, name)
    few = np.array([0.0, 3.0], np.float64)
    counts = np.array([n - 2, 2.0])
    total = (counts * np.exp(few - 3.0)).sum()
    if name in oracle.ELEMENTWISE:
        result = function(x)
        expected = np.exp(few - 3.0) / total if name == "softmax" else few - 3.0 - np.log(total)
        np.testing.assert_allclose(
            result[[0, n // 2, n // 2 + 1, -2, -1]].astype(float),
            expected[[0, 1, 0, 0, 1]],
            rtol=2e-3,
            atol=6e-8,
        )
    elif name == "logsumexp":
        np.testing.assert_allclose(float(function(x)), 3.0 + np.log(total), rtol=2e-3)
    else:
        p = counts * np.exp(few - 3.0) / total
        np.testing.assert_allclose(float(function(x)), np.log(total) - (p * (few - 3.0)).sum(), rtol=2e-3)
    rows = x[: 2**31].reshape(2**20, 2**11)
    for axis in (0, 1):
        whole, part = function(rows, axis=axis), function(rows[:, -1:] if axis == 0 else rows[-1:], axis=axis)
        last = whole[:, -1:] if axis == 0 and whole.ndim == 2 else whole[-1:]
        np.testing.assert_allclose(last.astype(float), part.astype(float), rtol=2e-3, atol=6e-8)
