"""How slices lie in memory.

A layout is an array of integers: a row for each axis of the slices, and at the end one for the entries of a
slice, of its size, and of the steps of x and of the results along it. Steps count entries.
"""

import functools
import math

import numpy as np

# Columns of a layout.
SIZE, OF_X, OF_OUT = range(3)


def layout_of(x, axes, out):
    """Layout of the slices of x along some axes, and the order of the other axes in it: that of memory.

    None if entries of a slice are neighbours, as those of a row, or not at equal distances.
    """
    return _layout(x.shape, x.strides, axes, out.strides, x.itemsize)


@functools.lru_cache(maxsize=256)
def _layout(shape, strides, axes, out_strides, itemsize):
    """`layout_of` arrays of such shapes and strides: to find it anew takes 10 us."""
    values = len(out_strides) < len(shape)  # one for each slice
    n = math.prod(shape[i] for i in axes)
    step, out_step = step_of(shape, strides, axes), 0 if values else step_of(shape, out_strides, axes)
    kept = [i for i in range(len(shape)) if i not in axes]
    of_out = dict(zip(kept, out_strides, strict=True)) if values else out_strides
    kept.sort(key=lambda i: -abs(strides[i]))
    if step is None or out_step is None or (step == itemsize and n > 1):
        return None, kept
    rows = [(shape[i], strides[i], of_out[i]) for i in kept if shape[i] > 1]
    layout = np.array([(1, 0, 0), *rows, (n, step, out_step)], np.intp)
    if (layout[:, OF_X:] % itemsize).any():
        return None, kept
    layout[:, OF_X:] //= itemsize
    return layout, kept


def step_of(shape, strides, axes):
    """Bytes from one neighbour to the next along some axes, taken as one; None if they are not as many."""
    step, size = 0, 1
    for i in reversed(axes):
        if shape[i] > 1:
            if size > 1 and strides[i] != step * size:
                return None
            step = step if size > 1 else strides[i]
            size *= shape[i]
    return step


def first_entry(array):
    """The first entry, in an array of one."""
    return array[(..., *(slice(1),) * array.ndim)].reshape(1)
