"""Generalised ufuncs: slices of any stride, temperatures that broadcast against them.

NumPy walks the batch, one slice at a time on one thread. A contiguous slice takes the same passes as in the
schedules of `_cpu`; any other is read entry by entry and summed in the order of a column, so that a slice
has the same bits alone and beside others.
"""

import functools

import numba
import numpy as np
from numba import guvectorize

from fastmax import _slice
from fastmax._jit import CACHED
from fastmax._lanes import as_contiguous


def _built_on_use(layout):
    """Gufunc of a layout; one for each dtype, built when it is first called, for that takes a while."""

    def decorate(kernel):
        @functools.cache
        def build(dtype):
            values = numba.from_dtype(dtype)
            signature = (values[:], numba.float64, values[:])
            return guvectorize([signature], layout, cache=CACHED)(kernel)

        @functools.wraps(kernel)
        def call(x, temperature, out=None):
            # The lanes of dropped entries may overflow or be NaN on the way, which NumPy would report.
            with np.errstate(all="ignore"):
                return build(x.dtype)(x, temperature, out=out)

        return call

    return decorate


@_built_on_use("(n),()->(n)")
def softmax(x, temperature, out):
    """Softmax over the last axis."""
    if x.strides[0] != x.itemsize:
        _slice.softmax(x, temperature, out)
    elif out.strides[0] == out.itemsize:
        _slice.softmax(as_contiguous(x), temperature, as_contiguous(out))
    else:
        contiguous = np.empty(len(x), x.dtype)
        _slice.softmax(as_contiguous(x), temperature, contiguous)
        out[:] = contiguous


@_built_on_use("(n),()->(n)")
def log_softmax(x, temperature, out):
    """Logarithm of the softmax over the last axis."""
    if x.strides[0] != x.itemsize:
        _slice.log_softmax(x, temperature, out)
    elif out.strides[0] == out.itemsize:
        _slice.log_softmax(as_contiguous(x), temperature, as_contiguous(out))
    else:
        contiguous = np.empty(len(x), x.dtype)
        _slice.log_softmax(as_contiguous(x), temperature, contiguous)
        out[:] = contiguous


@_built_on_use("(n),()->()")
def logsumexp(x, temperature, out):
    """Logsumexp over the last axis."""
    if x.strides[0] != x.itemsize:
        out[0] = _slice.logsumexp(x, temperature)
    else:
        out[0] = _slice.logsumexp(as_contiguous(x), temperature)


@_built_on_use("(n),()->()")
def entropy(x, temperature, out):
    """Entropy of the softmax over the last axis."""
    if x.strides[0] != x.itemsize:
        out[0] = _slice.entropy(x, temperature)
    else:
        out[0] = _slice.entropy(as_contiguous(x), temperature)
