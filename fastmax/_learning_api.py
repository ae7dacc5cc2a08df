"""Public functions for learning with temperature: arguments are checked here, as in `_api`."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastmax._api import (
    _as_array,
    _as_axes,
    _as_batch,
    _as_integer,
    _as_stored,
    _as_temperature,
    _asarray,
    _blocks,
    _broadcast,
    _check_out,
    _converted,
    _imported,
    _is_masked,
    _is_packed,
    _kept,
    _kernel_dtype,
    _memory_order,
    _one_per_slice,
    _unless_shared,
)

_REDUCTIONS = ("none", "sum", "mean")


def cross_entropy(
    logits, labels, temperature: ArrayLike = 1.0, *, axis: int = 0, reduction: str = "mean"
) -> Any:
    r"""Cross entropy of labels and the softmax with temperature.

    .. math:: L = -\log \sigma_T(x)_y \quad \text{or} \quad L = -\sum_j q_j \log \sigma_T(x)_j

    for a sample with the logits x, and as its label the class y or the probabilities q.

    Parameters
    ----------
    logits : array_like
        Real values of any shape and of the dtypes that `softmax` takes; slices along `axis` are samples.
    labels : array_like
        Classes: integers from 0 on, below the length of `axis`, in the shape of `logits` without `axis`. Or
        probabilities: real floats in the shape of `logits`, rounded to their precision (16-bit logits: to
        float32). They need not sum to 1; whether they are negative is not checked.
    temperature : array_like, optional
        Real values in [0, inf]: one for all samples, or an array that broadcasts to the shape of `logits`
        without `axis`.
    axis : int, optional
        Axis of the classes.
    reduction : {"mean", "sum", "none"}, optional
        What to return: the mean of the losses, their sum, or the loss of each sample.

    Returns
    -------
    ndarray or scalar
        Loss in nats, in the dtype of `logits` (float64 for bool and integers).

    Raises
    ------
    IndexError
        If a label is out of range.
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax` does; also for labels or a temperature whose shape does not fit, and another reduction.

    Notes
    -----
    A label whose logit is -inf has the loss +inf, at T = 0 also one whose logit is below the maximum; there
    the loss of m tied maxima is log(m). Where a probability is 0 it counts as 0, whatever the logit.
    A sample with NaN, or with nothing but -inf, has the loss NaN. The mean over no sample is NaN.

    The loss is within 4 ulp, float16 and bfloat16 rounded once: also the tiny one of a sure prediction, for
    nothing is subtracted from 1. Sums are taken in float64, but products of probabilities and distances to
    the maximum in the dtype of the logits: where one of these is subnormal, that can show at a small T.

    Examples
    --------
    >>> from fastmax import cross_entropy
    >>> logits = [[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]]
    >>> cross_entropy(logits, [0, 1])
    np.float64(0.288725992000333)
    >>> cross_entropy(logits, [0, 1], [0, float("inf")], reduction="none")
    array([0.        , 1.09861229])
    """
    losses, _ = _cross_entropy(logits, labels, temperature, axis, reduction, gradient=False)
    return losses


def cross_entropy_and_grad(
    logits, labels, temperature: ArrayLike = 1.0, *, axis: int = 0, reduction: str = "mean"
) -> Any:
    r"""Cross entropy and its gradient with respect to the logits.

    .. math:: \frac{\partial L}{\partial x_i} = \frac{\sigma_T(x)_i - q_i}{T}

    with q = 1 at the class of the label and 0 elsewhere, or the probabilities that are the label (then
    :math:`\sigma_T(x)_i` is multiplied by their sum).

    Parameters
    ----------
    logits, labels, axis, reduction
        As in `cross_entropy`.
    temperature : array_like, optional
        As in `cross_entropy`, but not 0, where the loss has no gradient.

    Returns
    -------
    loss : ndarray or scalar
        As `cross_entropy` returns it.
    gradient : ndarray
        Derivatives in the shape and dtype of `logits` (float64 for bool and integers): of the mean, or of the
        sum, or for "none" of each sample's loss with respect to its own logits.

    Raises
    ------
    IndexError, TypeError, ValueError, numpy.exceptions.AxisError
        As `cross_entropy` does; also for a temperature of 0.

    Notes
    -----
    At T = inf the gradient is 0. The logits are read once from memory where a sample fits in a cache. Nothing
    of their size is allocated but the gradient, unless they have to be copied into packed, native floats.
    For classes it is within 4 ulp of the exact one, in ulp of the largest entry of a sample; for
    probabilities within 4.5, in ulp of the largest of both terms (a search came to 4.1).
    Probabilities that `softmax` rounds to 0 count as 0.

    The derivative with respect to the temperature follows from the gradient, for the loss depends on
    x / T alone: it is minus the sum of x times the gradient, over T.

    Examples
    --------
    >>> import numpy as np
    >>> from fastmax import cross_entropy, cross_entropy_and_grad
    >>> logits, labels = np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]]), [0, 1]
    >>> loss, gradient = cross_entropy_and_grad(logits, labels, 2.0)
    >>> gradient.round(4)
    array([[-0.1234,  0.0351],
           [ 0.0768, -0.0929],
           [ 0.0466,  0.0578]])

    The derivative with respect to the temperature, and a difference quotient:

    >>> round(-(logits * gradient).sum() / 2.0, 6)
    np.float64(0.195378)
    >>> h = 1e-4
    >>> difference = cross_entropy(logits, labels, 2 + h) - cross_entropy(logits, labels, 2 - h)
    >>> round(difference / (2 * h), 6)
    np.float64(0.195378)
    """
    return _cross_entropy(logits, labels, temperature, axis, reduction, gradient=True)


def softmax_vjp(probs, cotangent, temperature: ArrayLike = 1.0, *, axis=0, out=None) -> Any:
    r"""Gradient through softmax with temperature: product of a cotangent with the Jacobian.

    .. math:: \frac{p_i}{T} \Bigl( g_i - \sum_j p_j g_j \Bigr)

    Parameters
    ----------
    probs : array_like
        Result p of `softmax` at that temperature.
    cotangent : array_like
        Gradient g with respect to p, in its shape.
    temperature : array_like, optional
        Real values in (0, inf]: one for all slices, or an array that broadcasts to the shape of `probs`
        without `axis`.
    axis : int, tuple of int, or None, optional
        As in `softmax`.
    out : ndarray, optional
        Array for the result, of its shape and dtype. It may be `probs` or `cotangent`.

    Returns
    -------
    ndarray or scalar
        Gradient with respect to the entries that softmax was taken of, in the shape of `probs` and the common
        dtype of both.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax` does; also for a temperature of 0, and for shapes that differ.

    Examples
    --------
    >>> from fastmax import softmax, softmax_vjp
    >>> softmax_vjp(softmax([1.0, 2.0, 3.0], 2.0), [1.0, 0.0, 0.0], 2.0).round(4)
    array([ 0.0758, -0.0286, -0.0472])
    """
    return _vjp(probs, cotangent, temperature, axis, out, log=None)


def log_softmax_vjp(probs, cotangent, temperature: ArrayLike = 1.0, *, axis=0, out=None) -> Any:
    r"""Gradient through log_softmax with temperature: product of a cotangent with the Jacobian.

    .. math:: \frac{1}{T} \Bigl( g_i - p_i \sum_j g_j \Bigr)

    Parameters
    ----------
    probs : array_like
        Result p of `softmax` (not its logarithm) at that temperature.
    cotangent : array_like
        Gradient g with respect to log(p), in its shape.
    temperature, axis, out
        As in `softmax_vjp`.

    Returns
    -------
    ndarray or scalar
        Gradient with respect to the entries that log_softmax was taken of, in the shape of `probs` and the
        common dtype of both.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax_vjp` does.

    Notes
    -----
    The sum of g is taken in the precision of the result: where it overflows, the result is NaN or infinite.

    Examples
    --------
    >>> from fastmax import log_softmax_vjp, softmax
    >>> log_softmax_vjp(softmax([1.0, 2.0, 3.0], 2.0), [1.0, 0.0, 0.0], 2.0).round(4)
    array([ 0.4068, -0.1536, -0.2532])
    """
    return _vjp(probs, cotangent, temperature, axis, out, log=True)


def fit_temperature(logits, labels, *, axis: int = 0) -> float:
    r"""Temperature at which the cross entropy of labels is least: temperature scaling [1]_.

    .. math:: \arg\min_{T \in [0, \infty]} \sum_i L_i(T)

    with L as in `cross_entropy`: it makes the probabilities of a trained classifier as true as T can.

    Parameters
    ----------
    logits : array_like
        Real values of any shape and of the dtypes that `softmax` takes; slices along `axis` are samples.
    labels : array_like
        Classes or probabilities, as in `cross_entropy`; negative ones are refused, and probabilities that do
        not have the dtype of `logits` are taken in float64.
    axis : int, optional
        Axis of the classes.

    Returns
    -------
    float
        Temperature in [0, inf]. It is inf if no finite one is better than equal probabilities, to rounding,
        and 0 if the label of every sample is a maximum (unless all its logits are equal, for all samples).

    Raises
    ------
    IndexError, TypeError, numpy.exceptions.AxisError
        As `cross_entropy` does.
    ValueError
        As `cross_entropy` does; also if a probability is negative or not finite, and if there is no sample,
        or one whose loss is NaN or infinite at every temperature: one with NaN, with nothing but -inf, or
        with the label at -inf.

    Notes
    -----
    The loss is convex in 1 / T. A Newton method in 1 / T, kept between bounds, takes first and second
    derivatives from one pass over the logits a step, in float64. It converges to 1e-12, relative, in at most
    12 passes, unless the distances of logits from their maxima differ by many orders of magnitude: where the
    loss shows no difference between temperatures, any of them is returned.

    References
    ----------
    .. [1] C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017,
       :doi:`10.48550/arXiv.1706.04599`.

    Examples
    --------
    >>> from fastmax import fit_temperature
    >>> logits = [[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]
    >>> round(fit_temperature(logits, [0, 0, 0, 1]), 12)  # 4 / log(3)
    3.640956906507
    >>> fit_temperature(logits, [0, 0, 0, 0])
    0.0
    >>> fit_temperature(logits, [0, 0, 1, 1])
    inf
    """
    _learning = _imported("_learning")
    x, dtype, position, blocks, order, shape = _as_samples(logits, axis)
    classes, probs = _as_labels(labels, x, dtype, np.float64, position, blocks, order, shape)
    if probs is not None:
        array = np.asarray(labels)
        invalid = ~((array >= 0) & (array < np.inf))
        if invalid.any():
            index = tuple(int(i) for i in np.argwhere(invalid)[0])
            raise ValueError(f"labels must be finite and not negative, got {array[index]} at {index}")
    if math.prod(shape) == 0:
        raise ValueError(f"logits must have at least one sample, got shape {x.shape}")
    if x.size == 0:
        raise ValueError(f"logits must have at least one class, got shape {x.shape}")
    temperature, sample = _learning.fit(_block(x, order, blocks), classes, probs)
    if temperature is None:
        index = _position(sample, shape, position, order)
        raise ValueError(
            "logits and labels must give a finite loss at some temperature, got NaN or inf at all "
            f"for sample {index}"
        )
    return temperature


def solve_temperature(x, *, entropy: ArrayLike, axis=0) -> Any:
    r"""Temperature at which the entropy of the softmax is a given one.

    .. math:: H(\sigma_T(x)) = h

    The entropy grows with T, from the logarithm of the number of maxima to that of the number of entries. The
    exponential of an entropy is a perplexity.

    Parameters
    ----------
    x : array_like
        Real values of any shape and of the dtypes that `softmax` takes.
    entropy : array_like
        Real values, in nats: one for all slices, or an array that broadcasts to the shape of `x` without
        `axis`.
    axis : int, tuple of int, or None, optional
        Axis or axes whose entries form a slice; None stands for all of them.

    Returns
    -------
    ndarray or scalar
        Temperatures in [0, inf], one per slice, in float64. A slice that has a NaN in it, or nothing above
        -inf, gives NaN; so does an entropy that is NaN.

    Raises
    ------
    TypeError, numpy.exceptions.AxisError
        As `softmax` does.
    ValueError
        If a shape does not fit, or no temperature has the entropy; it names the first such.

    Notes
    -----
    The entropy at the result is within 1e-12 of the given one, in float64, unless the result is subnormal;
    where it would be beyond the largest float64 it is inf. Where the given one is the logarithm of the number
    of entries above -inf, to the rounding of its own dtype, the result is inf; at that of the number of
    maxima it is 0. Newton's method, kept between bounds, takes some six passes over a slice, in the cache;
    two or three times as many where distances from the maximum differ by orders of magnitude.

    Examples
    --------
    >>> import numpy as np
    >>> from fastmax import entropy, solve_temperature
    >>> x = np.array([[0.0, 1.0, 2.0, 4.0], [0.0, 10.0, 30.0, 30.0]])
    >>> t = solve_temperature(x, entropy=1.0, axis=1)
    >>> t.round(4)
    array([ 1.6515, 10.6474])
    >>> entropy(x, t, axis=1).round(12)
    array([1., 1.])
    """
    _learning = _imported("_learning")
    x, dtype = _as_array(x)
    targets, at_limit = _as_entropies(entropy)
    _, axes = _as_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in _kept(axes, range(x.ndim)))
    _check_broadcast(targets, shape, "entropy")
    if math.prod(shape) == 0:
        return np.empty(shape)
    x, order = _as_packed(x, dtype, axes)
    blocks = _blocks(x.shape, axes, order)
    blocks = blocks if len(blocks) == 3 else (*blocks, 1)
    count = blocks[0] * blocks[2]
    temperatures, found = np.empty(count), np.empty(count, np.int8)
    entropies = _one_per_slice(targets, x.shape, axes, order)
    _learning.solve(_block(x, order, blocks), entropies, at_limit, temperatures, found)
    temperatures, found = (_as_batch(values, x.shape, axes, order) for values in (temperatures, found))
    if found.any():
        index = tuple(int(i) for i in np.unravel_index(int((found != 0).argmax()), shape))
        value = np.broadcast_to(targets, shape)[index]
        side = "below" if found[index] == _learning._BELOW else "above"
        raise ValueError(
            f"entropy must be one that a temperature has; {value} of slice {index} is {side} all of them"
        )
    return temperatures[()]


# -- cross entropy ----------------------------------------------------------------------------------------


def _cross_entropy(logits, labels, temperature, axis, reduction, gradient):
    _learning = _imported("_learning")
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    x, dtype, position, blocks, order, shape = _as_samples(logits, axis)
    temperature = _as_temperature(temperature)
    if gradient and not temperature.all():
        raise ValueError("temperature must not be 0, where the cross entropy has no gradient, got 0.0")
    _check_broadcast(temperature, shape, "temperature")
    classes, probs = _as_labels(labels, x, dtype, _kernel_dtype(dtype), position, blocks, order, shape)
    samples = math.prod(shape)
    losses = np.full(samples, 0.0 if probs is not None else np.nan)
    out = np.empty_like(x) if gradient else None
    axes = () if position is None else (position,)
    if x.size:
        _learning.cross_entropy(
            _block(x, order, blocks),
            classes,
            probs,
            _one_per_slice(temperature, x.shape, axes, order),
            samples if reduction == "mean" else 1,
            losses,
            None if out is None else _block(out, order, blocks),
        )
    if reduction == "none":
        losses = _as_batch(losses, x.shape, axes, order)
    else:
        with np.errstate(all="ignore"):
            total = losses.sum()
            if reduction == "mean":  # NaN over no sample; the sum alone may overflow
                total = total / samples if abs(total) < math.inf else (losses / samples).sum()
        losses = total
    with np.errstate(all="ignore"):
        losses = np.asarray(losses).astype(dtype, copy=False)[()]
    return losses, out


def _as_samples(logits, axis):
    """Return the logits, packed in some order of axes; what else says where a sample lies; samples' shape."""
    x, dtype = _as_array(logits, "logits", "")
    try:
        axis = _as_integer(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    _, axes = _as_axes(axis, x.ndim)
    x, order = _as_packed(x, dtype, axes)
    blocks = _blocks(x.shape, axes, order)
    position = axes[0] if axes else None
    return x, dtype, position, blocks, order, tuple(n for i, n in enumerate(x.shape) if i != position)


def _as_packed(x, dtype, axes):
    """Return x in a dtype, as it is or as a copy, and the order of axes in which it is packed."""
    x = _converted(x, dtype)
    order = _memory_order(x, axes)
    if order is None:
        x = x.copy(order="C")
        order = _memory_order(x, axes)
    if order is None:  # the reduced axes are no neighbours
        kept = _kept(axes, range(x.ndim))
        order = [*kept, *axes]
        x = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    return x, order


def _block(array, order, blocks):
    """The array as kernels take it."""
    return _as_stored(array).transpose(order).reshape(blocks)


def _as_labels(labels, x, dtype, other, position, blocks, order, shape):
    """Return classes in the order of samples, or none and the probabilities as kernels take them.

    Probabilities of another dtype than that of x, the first one given, come as the second.
    """
    array = _asarray(labels, "labels")
    if array.dtype.kind in "iu" or (array.dtype.kind == "f" and array.size == 0 and array.shape == shape):
        if array.shape != shape:
            raise ValueError(
                f"labels that are classes must have the shape {shape} of logits without the axis of classes, "
                f"got shape {array.shape}"
            )
        count = x.shape[position] if position is not None else 1
        # Kernels use them as indices: what is checked is a copy that no other thread can write to.
        classes = array.astype(np.int64)
        invalid = (classes < 0) | (classes >= count)
        if invalid.any():
            index = tuple(int(i) for i in np.argwhere(invalid)[0])
            raise IndexError(f"labels must be in [0, {count}), got {array[index]} at {index}")
        kept = _sample_axes(position, order)
        return np.ascontiguousarray(classes.transpose(kept).reshape(-1), np.intp), None
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"labels must be integers or floats, got dtype {array.dtype}")
    if array.shape != x.shape:
        raise ValueError(
            f"labels that are probabilities must have the shape {x.shape} of logits, got shape {array.shape}"
        )
    if array.dtype != dtype:
        with np.errstate(all="ignore"):
            array = array.astype(other)
    packed = np.ascontiguousarray(_as_stored(array).transpose(order)).reshape(blocks)
    return np.empty(0, np.intp), packed


def _sample_axes(position, order):
    """Axes of samples in the order of memory, as numbered without the axis of classes."""
    return [i if position is None or i < position else i - 1 for i in order if i != position]


def _position(sample, shape, position, order):
    """Index of a sample, from its number in the order of memory."""
    kept = _sample_axes(position, order)
    place = np.unravel_index(sample, [shape[i] for i in kept])
    return tuple(int(place[kept.index(i)]) for i in range(len(shape)))


def _check_broadcast(array, shape, name):
    """Raise an error if an array does not broadcast to the shape of samples."""
    try:
        fits = _broadcast(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to the shape {shape} of samples")


def _as_entropies(entropy):
    """Return entropies as a float64 array, and by how much, relative, a limit may be off in their dtype."""
    array = _asarray(entropy, "entropy")
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    if _is_masked(entropy) or not (is_float or array.dtype.kind in "biu"):
        raise TypeError(f"entropy must be real, got {entropy!r}")
    values = _converted(array, np.float64)
    if not is_float or array.dtype.itemsize >= 8:
        return values, 4.0 * 2.0**-52
    # In 16 bits a float32 is rounded once.
    return values, max(4.0 * 2.0**-23, float(np.spacing(np.ones((), array.dtype))))


# -- products with the Jacobian ------------------------------------------------------------------------


def _vjp(probs, cotangent, temperature, axis, out, log):
    _learning = _imported("_learning")
    probs, dtype = _as_array(probs, "probs", "")
    cotangent, other = _as_array(cotangent, "cotangent", "")
    try:
        dtype = np.promote_types(dtype, other)
    except TypeError:
        raise TypeError(
            f"cotangent must have a dtype that goes with that of probs, {dtype}, got {other}"
        ) from None
    temperature = _as_temperature(temperature)
    if not temperature.all():
        raise ValueError("temperature must not be 0, where softmax has no derivative, got 0.0")
    if cotangent.shape != probs.shape:
        raise ValueError(f"cotangent must have the shape {probs.shape} of probs, got shape {cotangent.shape}")
    _, axes = _as_axes(axis, probs.ndim)
    _check_broadcast(
        temperature, tuple(probs.shape[i] for i in _kept(axes, range(probs.ndim))), "temperature"
    )
    target = None
    if out is not None:
        target = _check_out(out, probs.shape, dtype, probs, "probs")
        _check_out(out, probs.shape, dtype, cotangent, "cotangent")
        temperature = _unless_shared(temperature, target)
    probs, order = _as_packed(probs, dtype, axes)
    blocks = _blocks(probs.shape, axes, order)
    cotangent = _converted(cotangent, dtype)
    if not _is_packed(cotangent, order):
        cotangent = np.ascontiguousarray(cotangent.transpose(order)).transpose(np.argsort(order))
    result = target if target is not None and _is_packed(target, order) else np.empty_like(probs)
    if probs.size:
        _learning.vjp(
            _block(probs, order, blocks),
            _block(cotangent, order, blocks),
            _one_per_slice(temperature, probs.shape, axes, order),
            _block(result, order, blocks),
            log,
        )
    if target is None:
        return result[()]
    if result is not target:
        np.copyto(target, result)
    return out
