"""Generalised ufuncs: slices of any stride, temperatures that broadcast against them.

NumPy walks the batch, one slice at a time on one thread. A contiguous slice takes the same passes as in the
schedules of `_rows`; any other is summed entry by entry in the order of a column, so that a slice has the
same bits alone and beside others.
"""

import functools

import numba
import numpy as np

from fastmax import _slice
from fastmax._jit import gufunc
from fastmax._lanes import as_contiguous


@functools.cache
def _built(kernel, layout, dtype):
    """Gufunc for a dtype, built when it is first called, for that takes a while."""
    values = numba.from_dtype(dtype)
    return gufunc(kernel, layout, (values[:], numba.float64, values[:]))


def _call(kernel, layout, x, temperature, out):
    # The lanes of dropped entries may overflow or be NaN on the way, which NumPy would report.
    with np.errstate(all="ignore"):
        return _built(kernel, layout, x.dtype)(x, temperature, out=out)


def _transform(contiguous, strided, x, temperature, out):
    """Run the kernel that suits the slices; a result that does not lie as they do is copied."""
    kernel = contiguous if x.strides[-1] == x.itemsize else strided
    if out is None or kernel is strided or out.strides[-1] == out.itemsize:
        return _call(kernel, "(n),()->(n)", x, temperature, out)
    out[...] = _call(kernel, "(n),()->(n)", x, temperature, None)
    return out


def _reduce(contiguous, strided, x, temperature, out):
    kernel = contiguous if x.strides[-1] == x.itemsize else strided
    return _call(kernel, "(n),()->()", x, temperature, out)


def _contiguous_softmax(x, temperature, out):
    _slice.softmax(as_contiguous(x), temperature, as_contiguous(out))


def _strided_softmax(x, temperature, out):
    _slice.softmax(x, temperature, out)


def _contiguous_log_softmax(x, temperature, out):
    _slice.log_softmax(as_contiguous(x), temperature, as_contiguous(out))


def _strided_log_softmax(x, temperature, out):
    _slice.log_softmax(x, temperature, out)


def _contiguous_logsumexp(x, temperature, out):
    out[0] = _slice.logsumexp(as_contiguous(x), temperature)


def _strided_logsumexp(x, temperature, out):
    out[0] = _slice.logsumexp(x, temperature)


def _contiguous_entropy(x, temperature, out):
    out[0] = _slice.entropy(as_contiguous(x), temperature)


def _strided_entropy(x, temperature, out):
    out[0] = _slice.entropy(x, temperature)


def softmax(x, temperature, out=None):
    """Softmax over the last axis."""
    return _transform(_contiguous_softmax, _strided_softmax, x, temperature, out)


def log_softmax(x, temperature, out=None):
    """Logarithm of the softmax over the last axis."""
    return _transform(_contiguous_log_softmax, _strided_log_softmax, x, temperature, out)


def logsumexp(x, temperature, out=None):
    """Logsumexp over the last axis."""
    return _reduce(_contiguous_logsumexp, _strided_logsumexp, x, temperature, out)


def entropy(x, temperature, out=None):
    """Entropy of the softmax over the last axis."""
    return _reduce(_contiguous_entropy, _strided_entropy, x, temperature, out)
