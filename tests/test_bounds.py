"""No byte beside an array is read or written: here memory that must not be touched lies beside them."""

import ctypes
import mmap
import subprocess
import sys

import ml_dtypes  # noqa: F401  whose type NumPy then knows by name
import numpy as np
import pytest
from marks import nightly

import fastmax

LENGTHS = 1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 15, 16, 17, 20, 31, 33, 40, 63, 64, 65, 100, 159
SHAPES = [
    *((rows, n) for rows in (1, 2, 9, 33) for n in LENGTHS),
    *((70, 3), (2000, 5), (2000, 10), (300, 100), (1, 700), (40, 700), (3, 40_000), (1, 300_000), (3000, 40)),
    (16_500, 3),  # columns with few neighbours, by chunks
    *((20_001, 1), (9_001, 2), (7_001, 3)),  # short rows of two threads
]


def guarded(shape, dtype, at_end):
    """Array that ends, or begins, at the border of its pages, and what keeps them; others are beside them."""
    size, page = int(np.prod(shape)) * np.dtype(dtype).itemsize, mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for border in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(border), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    return np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)


def check_gradients(x, own, axis, at_end):
    """Compare gradients of entries, at labels that are classes and probabilities, and of a cotangent."""
    labels = np.arange(x.shape[1 - axis]) % x.shape[axis]
    probs = guarded(x.shape, x.dtype, at_end)
    probs[...] = fastmax.softmax(x, axis=axis)
    for target in labels, probs:
        expected = fastmax.cross_entropy_and_grad(x, target.copy(), axis=axis)
        for array, other in zip(
            fastmax.cross_entropy_and_grad(own, target, axis=axis), expected, strict=True
        ):
            np.testing.assert_array_equal(array, other, f"gradient {x.shape} {axis}")
    out = guarded(x.shape, x.dtype, at_end)
    fastmax.softmax_vjp(probs, own, axis=axis, out=out)
    expected = fastmax.softmax_vjp(probs.copy(), x, axis=axis)
    np.testing.assert_array_equal(out, expected, f"cotangent {x.shape} {axis}")


def check(dtype):
    """Compare results in such arrays with those in others."""
    functions = [fastmax.softmax, fastmax.log_softmax, fastmax.logsumexp, fastmax.entropy]
    for shape in SHAPES:
        x = np.random.default_rng(shape).normal(scale=4.0, size=shape).astype(dtype)
        mask = np.random.default_rng(shape).random(shape) < 0.7
        for at_end in (False, True):
            own, own_mask = guarded(shape, dtype, at_end), guarded(shape, bool, at_end)
            own[...], own_mask[...] = x, mask
            for axis in (0, 1):
                for function in functions:
                    expected = function(x, 0.9, axis=axis)
                    out = guarded(expected.shape, dtype, at_end)
                    function(own, 0.9, axis=axis, out=out)
                    np.testing.assert_array_equal(out, expected, f"{function.__name__} {shape} {axis}")
                expected = fastmax.softmax(x, 0.9, axis=axis, where=mask)
                out = guarded(shape, dtype, at_end)
                fastmax.softmax(own, 0.9, axis=axis, where=own_mask, out=out)
                np.testing.assert_array_equal(out, expected, f"where {shape} {axis}")
                if dtype == "float32":
                    check_gradients(x, own, axis, at_end)
            temperatures = np.linspace(0.3, 2.0, 41)
            expected = fastmax.softmax(x[0], temperatures, axis=-1)
            out = guarded(expected.shape, dtype, at_end)
            fastmax.softmax(own[0], temperatures, axis=-1, out=out)
            np.testing.assert_array_equal(out, expected, f"temperatures {shape}")
            fastmax.softmax(own, 0.9, axis=1, out=own)
            np.testing.assert_array_equal(own, fastmax.softmax(x, 0.9, axis=1), f"in place {shape}")


def check_interleaved(dtype):
    """Compare results of columns with few neighbours in such arrays, at an axis in the middle."""
    for shape in (33, 1, 2), (35, 43, 3), (17, 70, 2), (33, 9, 12), (60, 30, 3):
        x = np.random.default_rng(shape).normal(scale=4.0, size=shape).astype(dtype)
        mask = np.random.default_rng(shape).random(shape) < 0.7
        for at_end in (False, True):
            own, own_mask = guarded(shape, dtype, at_end), guarded(shape, bool, at_end)
            own[...], own_mask[...] = x, mask
            for function, where, other in (
                (fastmax.softmax, None, None),
                (fastmax.logsumexp, None, None),
                (fastmax.softmax, own_mask, mask),
            ):
                expected = function(x, 0.9, axis=1, where=other)
                out = guarded(expected.shape, dtype, at_end)
                function(own, 0.9, axis=1, where=where, out=out)
                np.testing.assert_array_equal(out, expected, f"{function.__name__} {shape}")
            expected = fastmax.softmax(x, 0.9, axis=1)
            fastmax.softmax(own, 0.9, axis=1, out=own)
            np.testing.assert_array_equal(own, expected, f"in place {shape}")


def check_apart():
    """Compare results of what is cut out of such arrays, up to the border, with those of others."""
    for shape in (5000, 10), (3000, 13), (2000, 20), (300, 104), (40, 703), (20, 17_004), (33, 43):
        x = np.random.default_rng(shape).normal(scale=4.0, size=shape).astype(np.float32)
        for at_end in (False, True):
            own = guarded(shape, x.dtype, at_end)
            own[...] = x
            columns = slice(3, None) if at_end else slice(-3)
            every_other = slice(1 - shape[1] % 2, None, 2) if at_end else slice(None, None, 2)
            for index in (
                (slice(None), columns),
                (slice(None, None, -1), columns),
                (slice(None), every_other),
                (slice(1 - shape[0] % 2, None, 2) if at_end else slice(None, None, 2),),
            ):
                for axis in (0, 1):
                    for function in fastmax.softmax, fastmax.logsumexp:
                        result = function(own[index], 0.9, axis=axis)
                        expected = function(x[index], 0.9, axis=axis)
                        np.testing.assert_array_equal(result, expected, f"{shape} {index} {axis}")


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect")
@pytest.mark.parametrize("what", ["float32", *nightly("bfloat16", "float16", "float64", "apart")])
def test_nothing_beside_an_array_is_touched(what):
    run = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr}"


if __name__ == "__main__":
    if sys.argv[1] == "apart":
        check_apart()
    else:
        check(sys.argv[1])
        check_interleaved(sys.argv[1])
