"""Arithmetic on double-doubles: unevaluated sums of two float64 arrays, good to about 2**-100.

This is what ``accuracy.py`` measures against. It is plain NumPy, so that ten million entries take
seconds where mpmath would take an hour, and it is itself checked against mpmath there.

References
----------
.. [1] T. J. Dekker, "A floating-point technique for extending the available precision", Numerische
   Mathematik 18, 224-242 (1971). doi:10.1007/BF01397083
"""

from typing import Any

import mpmath
import numpy as np

DoubleDouble = tuple[np.ndarray, np.ndarray]

SPLITTER = 2.0**27 + 1.0
# exp of a reduced argument, |r| <= log(2) / 2, as a Taylor polynomial: the first term left out is
# below 2**-108. From EXP_SWITCH on the terms are so small that float64 is enough for them.
EXP_DEGREE = 22
EXP_SWITCH = 13
# Below this, exp is far under half the smallest subnormal number.
EXP_LOWEST = -2000.0


def from_mpmath(values: list[Any]) -> DoubleDouble:
    """Round numbers of any precision."""
    high = np.array([float(value) for value in values])
    low = np.array([float(value - float(part)) for value, part in zip(values, high, strict=True)])
    return high, low


with mpmath.workprec(200):
    LN2_HEAD = float(mpmath.ldexp(mpmath.floor(mpmath.ldexp(mpmath.ln2, 32)), -32))
    LN2_TAIL = from_mpmath([mpmath.ln2 - LN2_HEAD])
    EXP_TERMS = from_mpmath([1 / mpmath.factorial(i) for i in range(EXP_DEGREE + 1)])


def two_sum(a: np.ndarray, b: np.ndarray) -> DoubleDouble:
    """Return a + b rounded, and the rounding error."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def two_product(a: np.ndarray, b: np.ndarray) -> DoubleDouble:
    """Return a * b rounded, and the rounding error, by splitting both into halves of 26 bits."""
    product = a * b
    a_scaled, b_scaled = SPLITTER * a, SPLITTER * b
    a_head = a_scaled - (a_scaled - a)
    b_head = b_scaled - (b_scaled - b)
    a_tail, b_tail = a - a_head, b - b_head
    error = ((a_head * b_head - product) + a_head * b_tail + a_tail * b_head) + a_tail * b_tail
    return product, error


def add(x: DoubleDouble, y: DoubleDouble) -> DoubleDouble:
    """Return x + y."""
    head, error = two_sum(x[0], y[0])
    tail, tail_error = two_sum(x[1], y[1])
    head, error = two_sum(head, error + tail)
    return two_sum(head, error + tail_error)


def multiply(x: DoubleDouble, y: DoubleDouble) -> DoubleDouble:
    """Return x * y."""
    product, error = two_product(x[0], y[0])
    return two_sum(product, error + (x[0] * y[1] + x[1] * y[0]))


def divide(x: DoubleDouble, y: DoubleDouble) -> DoubleDouble:
    """Return x / y by two steps of long division."""
    first = x[0] / y[0]
    product, error = two_product(first, y[0])
    rest = ((x[0] - product) - error) + x[1] - first * y[1]
    return two_sum(first, rest / y[0])


def total(x: DoubleDouble) -> DoubleDouble:
    """Sum over the last axis, in pairs."""
    while (size := x[0].shape[-1]) > 1:
        half = size // 2
        left = x[0][..., :half], x[1][..., :half]
        right = x[0][..., half : 2 * half], x[1][..., half : 2 * half]
        odd = x[0][..., 2 * half :], x[1][..., 2 * half :]
        high, low = add(left, right)
        x = np.concatenate([high, odd[0]], axis=-1), np.concatenate([low, odd[1]], axis=-1)
    return x[0][..., 0], x[1][..., 0]


def exp(y: DoubleDouble) -> tuple[DoubleDouble, np.ndarray]:
    """Return a mantissa near 1 and an exponent of two, so that nothing underflows; y <= 0."""
    low = np.where(y[0] < EXP_LOWEST, 0.0, y[1])
    high = np.maximum(y[0], EXP_LOWEST)
    exponent = np.rint(high / LN2_HEAD)
    tail, error = two_product(exponent, LN2_TAIL[0])
    reduced = add(two_sum(high, -exponent * LN2_HEAD), two_sum(low - exponent * LN2_TAIL[1] - error, -tail))
    short = np.full_like(high, EXP_TERMS[0][EXP_DEGREE])
    for i in range(EXP_DEGREE - 1, EXP_SWITCH - 1, -1):
        short = short * reduced[0] + EXP_TERMS[0][i]
    mantissa = short, np.zeros_like(short)
    for i in range(EXP_SWITCH - 1, -1, -1):
        mantissa = add(multiply(mantissa, reduced), (EXP_TERMS[0][i], EXP_TERMS[1][i]))
    return mantissa, exponent.astype(np.int32)
