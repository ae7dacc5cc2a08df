"""Derive the polynomials for 2**f that the kernels use, in float32 and float64, and measure them.

The kernels reduce an exponential to 2**n * 2**f with an integer n and |f| <= 1/2, up to rounding.
This script fits 2**f by 1 + c1*f + ... + cd*f**d in two steps:

1. Remez exchange with mpmath gives the real coefficients of least maximal relative error.
2. The coefficients are rounded to the working type one at a time, c1 first. After each rounding
   those that remain are fitted again around it and absorb most of its error.

Then the evaluation of the kernels, `value`, is measured: in float32 at every f, in float64 at random
f. It does not decrease: for f >= 0 each step keeps the order of the one before, and between
neighbours of f < 0, an ulp apart, rounding changes f**2 * (c2 + ...) by less than 0.4 ulp of f while
2**f - 1 increases by more than 0.48; adding c1*f and then 1 keeps that order. The script counts the
decreases all the same, and fails if it finds one.

At the seam, where n changes, f and f - 1 both stand for 2**(1/2) or nearly, and rounding can make the
value at f the larger one by an ulp; the script says how often.

It prints the constants for fastmax/_math.py and writes no file.
"""

import argparse
import bisect
from typing import NamedTuple

import mpmath
import numba
import numpy as np
from mpmath import mp, mpf

from fastmax._lanes import fma

HIGH = 0.5 + 2.0**-12  # f can lie a little outside [-1/2, 1/2]
LOW = -HIGH
DIGITS = 60  # decimal digits of the Remez exchange
GRID_POINTS = 400  # of the Remez exchange
TABLE_BITS = 13  # the reference looks up 2**a for a in multiples of 2**-13
TINY = 2.0**-26  # for |f| below it, 2**f rounds to 1 in float32
CHUNK = 1 << 18  # values of f measured at a time
SEAM = 1000  # neighbours of 1/2 on either side where the seam is measured


class Format(NamedTuple):
    """A working type, its precision in bits and the degree of its polynomial."""

    dtype: type
    precision: int
    degree: int


FLOAT32 = Format(np.float32, 24, 6)
FLOAT64 = Format(np.float64, 53, 11)


# --------------------------------------------------------------------------------- minimax fit


def chebyshev_grid():
    """Return Chebyshev points of the interval, ascending; their even number leaves out f = 0."""
    angles = [mpmath.pi * (i + mpf(0.5)) / GRID_POINTS for i in range(GRID_POINTS)]
    return [-HIGH * mpmath.cos(angle) for angle in angles]


def relative_errors(coefficients, grid):
    """Return the relative errors of a polynomial, lowest order first."""
    return [mpmath.polyval(coefficients[::-1], f) / mpf(2) ** f - 1 for f in grid]


def minimax(fixed, degree, grid):
    """Fit the coefficients after the fixed ones for the least maximal relative error on a grid.

    With k fixed coefficients the rest carries the factor f**k. Where k is odd that factor changes
    its sign at f = 0, and so does the alternation of the optimal error.
    """
    k, free = len(fixed), degree + 1 - len(fixed)
    signs = [-1 if f < 0 and k % 2 else 1 for f in grid]
    nodes = [round(i * (len(grid) - 1) / free) for i in range(free + 1)]
    while True:
        coefficients, level = solve_alternation(fixed, degree, grid, signs, nodes)
        errors = relative_errors(coefficients, grid)
        if max(abs(e) for e in errors) <= abs(level) * (1 + mpf(10) ** -9):
            return coefficients
        nodes = exchange([s * e for s, e in zip(signs, errors, strict=True)], nodes)


def solve_alternation(fixed, degree, grid, signs, nodes):
    """Return the coefficients whose errors at the nodes alternate around 0, and their level."""
    k = len(fixed)
    matrix, rhs = mpmath.matrix(len(nodes)), mpmath.matrix(len(nodes), 1)
    for row, node in enumerate(nodes):
        f = grid[node]
        weight = mpf(2) ** -f
        for j in range(k, degree + 1):
            matrix[row, j - k] = f**j * weight
        matrix[row, len(nodes) - 1] = -signs[node] * (-1) ** row
        rhs[row] = 1 - mpmath.polyval(fixed[::-1], f) * weight
    *free, level = mpmath.lu_solve(matrix, rhs)
    return fixed + free, level


def exchange(errors, nodes):
    """Put the point of largest error in place of the neighbouring node where it has the same sign.

    Where neither has, the point lies beyond the first or last node and the opposite end is dropped.
    """
    new = max(range(len(errors)), key=lambda i: abs(errors[i]))
    right = bisect.bisect(nodes, new)
    for i in (right - 1, right):
        if 0 <= i < len(nodes) and errors[nodes[i]] * errors[new] > 0:
            return [*nodes[:i], new, *nodes[i + 1 :]]
    return [new, *nodes[:-1]] if right == 0 else [*nodes[1:], new]


def fit(fmt, grid):
    """Return the coefficients of least error, and numbers of the working type in their place."""
    exact = remaining = minimax([mpf(1)], fmt.degree, grid)
    rounded = [mpf(1)]
    while True:
        with mp.workprec(fmt.precision):
            rounded.append(+remaining[len(rounded)])
        if len(rounded) > fmt.degree:
            return exact, [float(c) for c in rounded]
        remaining = minimax(rounded, fmt.degree, grid)


# --------------------------------------------------------------------------------- measurement


def exp2_table():
    """Return 2**a as float64 heads and tails, for the multiples a of 2**-13 in the interval."""
    steps = range(int(LOW * 2**TABLE_BITS), int(HIGH * 2**TABLE_BITS) + 1)
    exact = [mpf(2) ** mpf(step / 2**TABLE_BITS) for step in steps]
    heads = [float(v) for v in exact]
    return np.array(heads), np.array([float(v - h) for v, h in zip(exact, heads, strict=True)])


@numba.njit
def exp2(f, table):
    """Return 2**f as head + tail, to about 2**-65.

    f = a + b with a in the table and |b| <= 2**-14, so 2**f = 2**a + 2**a * (2**b - 1).
    """
    step = np.rint(f * 2.0**TABLE_BITS)
    row = int(step - LOW * 2.0**TABLE_BITS)
    head, tail = table[0][row], table[1][row]
    return head, tail + head * np.expm1((f - step * 2.0**-TABLE_BITS) * np.log(2.0))


def check_exp2(table, count, rng):
    """Return the largest relative error of `exp2` at random f, from mpmath."""
    points = rng.uniform(LOW, HIGH, count).tolist()
    return float(max(abs(sum(map(mpf, exp2(f, table))) / mpf(2) ** f - 1) for f in points))


@numba.njit
def value(f, coefficients):
    """Return the polynomial at f as the kernels evaluate it (they scale it by a power of two)."""
    tail = coefficients[-1]
    for j in range(len(coefficients) - 2, 1, -1):
        tail = fma(tail, f, coefficients[j])
    return coefficients[0] + fma(f, coefficients[1], (f * f) * tail)


@numba.njit
def measure(points, coefficients, precision, table):
    """Measure the polynomial at ascending f.

    Returns how often the value decreases from one f to the next, and the largest errors, each with
    its f: in ulp, and relative in units of 2**-precision.
    """
    decreases, ulp, relative, previous = 0, (0.0, 0.0), (0.0, 0.0), 0.0
    for f in points:
        this = value(f, coefficients)
        head, tail = exp2(np.float64(f), table)
        error = abs((this - head) - tail) * 2.0**precision
        in_ulp = error if f < 0.0 else 0.5 * error
        if in_ulp > ulp[0]:
            ulp = in_ulp, np.float64(f)
        if error / head > relative[0]:
            relative = error / head, np.float64(f)
        decreases += this < previous
        previous = this
    return decreases, ulp, relative


def every_float32():
    """Yield all float32 of the interval but the tiny ones; arrays ascend and share their end points."""
    first, last = np.array([TINY, HIGH], np.float32).view(np.int32).tolist()
    for start in range(first, last, CHUNK):
        f = np.arange(start, min(start + CHUNK, last) + 1, dtype=np.int32).view(np.float32)
        yield f
        yield -f[::-1]


def random_float64(count, rng):
    """Yield arrays of random float64, each followed by the next larger one, ascending."""
    for start in range(0, count, CHUNK):
        f = np.unique(rng.uniform(LOW, HIGH, min(CHUNK, count - start)))
        yield np.column_stack([f, np.nextafter(f, np.inf)]).ravel()


def count_seam(fmt, coefficients):
    """Return at how many f around 1/2 the value is more than twice that at f - 1."""
    f = 0.5 + np.arange(-SEAM, SEAM + 1) * 2.0**-fmt.precision
    pairs = zip(f.astype(fmt.dtype), (f - 1.0).astype(fmt.dtype), strict=True)
    return sum(value(high, coefficients) > 2.0 * value(low, coefficients) for high, low in pairs)


# -------------------------------------------------------------------------------------- report


def log2_error(coefficients, grid):
    """Return the base-2 logarithm of the largest relative error of a polynomial on a grid."""
    return float(mpmath.log(max(abs(e) for e in relative_errors(coefficients, grid)), 2))


def source(number):
    """Return the source text of a float, hexadecimal without trailing zeros."""
    mantissa, exponent = number.hex().split("p")
    return f'float.fromhex("{mantissa.rstrip("0").rstrip(".")}p{exponent}")'


def report(fmt, arrays, points, grid, table):
    """Fit and measure in one working type; print the numbers, return a comment and the coefficients.

    `arrays` holds the f to measure at, and `points` says which these are.
    """
    exact, rounded = fit(fmt, grid)
    bits, bits_exact = log2_error(rounded, grid), log2_error(exact, grid)
    coefficients = np.array(rounded, fmt.dtype)
    decreases, ulp, relative = 0, (0.0, 0.0), (0.0, 0.0)
    for f in arrays:
        found = measure(f, coefficients, fmt.precision, table)
        decreases, ulp, relative = decreases + found[0], max(ulp, found[1]), max(relative, found[2])
    name, unit = fmt.dtype.__name__, f"2**-{fmt.precision}"
    print(f"{name}: degree {fmt.degree}, |f| <= {HIGH}")
    print(f"  relative error 2**{bits_exact:.2f}, with rounded coefficients 2**{bits:.2f}")
    print(f"  {points}: {decreases} decreases between neighbours; worst errors")
    print(f"    {ulp[0]:.4f} ulp at f = {ulp[1].hex()}")
    print(f"    {relative[0]:.4f} * {unit} relative at f = {relative[1].hex()}")
    larger = count_seam(fmt, coefficients)
    print(f"  value at f above twice that at f - 1: {larger} of {2 * SEAM + 1} f around 1/2")
    if decreases:
        raise SystemExit(f"{name}: the value decreases")
    comment = (
        f"# {name}: relative error 2**{bits:.2f}; worst measured errors ({points})\n"
        f"# {ulp[0]:.4f} ulp and {relative[0]:.4f} * {unit} relative, no decrease between neighbours.\n"
    )
    return comment, rounded


def main():
    """Fit and measure both polynomials and print their constants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=10_000_000, help="random float64 f measured (%(default)s)"
    )
    parser.add_argument("--checks", type=int, default=20_000, help="f checked by mpmath (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random f (%(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with mp.workdps(DIGITS):
        grid, table = chebyshev_grid(), exp2_table()
        deviation = check_exp2(table, args.checks, rng)
        print(f"reference: relative error {deviation:.1e} ({args.checks} random f, from mpmath)")
        random = random_float64(args.samples, rng)
        comment32, single = report(FLOAT32, every_float32(), "every f", grid, table)
        comment64, double = report(FLOAT64, random, f"{args.samples:.0e} random f", grid, table)
    print("\nfastmax/_math.py:\n")
    print(f"# 2**f for |f| <= 1/2 + 2**-12, by scripts/fit_exp2.py.\n{comment32}{comment64}", end="")
    print(f"EXP2_SLOPE = ({source(single[1])}, {source(double[1])})\nEXP2_CURVATURE = (")
    for coefficients in (single, double):
        print("    (", *(f"        {source(c)}," for c in coefficients[2:]), "    ),", sep="\n")
    print(")")


if __name__ == "__main__":
    main()
