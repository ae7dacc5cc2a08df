"""The definitions in plain NumPy, to be read beside the mathematics.

A definition, not an implementation to compute with: large arguments overflow, and infinities,
NaN, masks and the dtypes that `fastmax.softmax` knows have no rules here.
"""

import numpy as np


def softmax(r, temperature=1.0):
    r"""Tempered softmax along the first axis, as it is defined.

    .. math::
        \sigma(r)_i = e^{r_i} / \sum_j e^{r_j}, \qquad \sigma_T(r) = \sigma(r / T),

    .. math::
        \sigma_0(r) = \lim_{T \to 0} \sigma_T(r) = m / (e'm), \qquad
        \sigma_\infty(r) = \lim_{T \to \infty} \sigma_T(r) = e / k,

    where k is the length of r, e the vector of k ones, and m the vector that is 1 at the
    coordinates of r equal to its maximum and 0 elsewhere.

    Parameters
    ----------
    r : array_like, shape (k, ...)
        Real and finite.
    temperature : float
        T in [0, inf].

    Returns
    -------
    numpy.ndarray of float64, shape (k, ...)
        Every sum over the first axis is 1.

    Examples
    --------
    >>> softmax([1, 2, 3]).round(4)
    array([0.09  , 0.2447, 0.6652])
    >>> softmax([1, 3, 3], temperature=0)
    array([0. , 0.5, 0.5])
    >>> softmax([1, 2, 3, 4], temperature=np.inf)
    array([0.25, 0.25, 0.25, 0.25])
    """
    r = np.asarray(r, dtype=np.float64)
    if temperature == 0:
        m = r == r.max(axis=0)
        return m / m.sum(axis=0)
    if temperature == np.inf:
        return np.ones_like(r) / len(r)
    e = np.exp(r / temperature)
    return e / e.sum(axis=0)
