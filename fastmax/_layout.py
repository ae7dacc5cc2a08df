"""How slices lie in memory.

A layout is an array of integers: a row for each axis of the slices, and at the end one for the entries of a
slice, of its size, and of the steps of x, of the results and of the mask along it. Steps count entries.
"""

import functools
import math

import numpy as np

# Columns of a layout.
SIZE, OF_X, OF_OUT, OF_MASK = range(4)


def layout_of(x, mask, axes, out):
    """Layout of the slices of x along some axes, and the order of the other axes in it: that of memory.

    None if entries of a slice are not at equal distances.
    """
    return _layout(x.shape, x.strides, None if mask is None else mask.strides, axes, out.strides, x.itemsize)


def has_rows(layout):
    """Whether entries of a slice are neighbours."""
    return layout[-1, OF_X] == 1 and layout[-1, SIZE] > 1


@functools.lru_cache(maxsize=256)
def _layout(shape, strides, mask_strides, axes, out_strides, itemsize):
    """`layout_of` arrays of such shapes and strides: to find it anew takes 10 us."""
    kept, no_steps = [i for i in range(len(shape)) if i not in axes], (0,) * len(shape)
    if len(out_strides) < len(shape):  # one value for each slice
        of_slices = dict(zip(kept, out_strides, strict=True))
        out_strides = tuple(of_slices.get(i, 0) for i in range(len(shape)))
    all_strides = strides, out_strides, mask_strides or no_steps
    n, steps = math.prod(shape[i] for i in axes), [step_of(shape, own, axes) for own in all_strides]
    kept = tuple(sorted(kept, key=lambda i: -abs(strides[i])))
    if None in steps:
        return None, kept
    rows = [(shape[i], *(own[i] for own in all_strides)) for i in kept if shape[i] > 1]
    layout = np.array([(1, 0, 0, 0), *rows, (n, *steps)], np.intp)
    of_entries = layout[:, [OF_X, OF_OUT]]
    if (of_entries % itemsize).any():
        return None, kept
    layout[:, [OF_X, OF_OUT]] = of_entries // itemsize
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
