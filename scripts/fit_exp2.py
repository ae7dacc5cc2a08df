"""Derive the polynomials for 2**f that the kernels use, in float32 and float64, and measure them.

The kernels reduce an exponential to 2**n * 2**f with an integer n and |f| <= 1/2, up to rounding, or, where
a processor can hold a table in registers, to 2**n * 2**(j/16) * 2**f with 0 <= j < 16 and |f| <= 1/32.
This script fits 2**f by 1 + c1*f + ... + cd*f**d in two steps:

1. Remez exchange with mpmath gives the real coefficients of least maximal relative error.
2. The coefficients are rounded to the working type one at a time, c1 first. After each rounding
   those that remain are fitted again around it and absorb most of its error.

Then the evaluation of the kernels, `value` or `table_value`, is measured: in float32 without a table at
every f, else at random f, with every entry of the table. It does not decrease: for f >= 0 each step keeps
the order of the one before, and between neighbours of f < 0, an ulp apart, rounding changes
f**2 * (c2 + ...) by less than 0.4 ulp of f while 2**f - 1 increases by more than 0.48; adding c1*f and then
1 keeps that order. The script counts the decreases all the same, and fails if it finds one.

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

ENTRIES = 16  # of the table
DIGITS = 60  # decimal digits of the Remez exchange
GRID_POINTS = 400  # of the Remez exchange
TABLE_BITS = 13  # the reference looks up 2**a for a in multiples of 2**-13
TINY = 2.0**-26  # for |f| below it, 2**f rounds to 1 in float32
CHUNK = 1 << 18  # values of f measured at a time
SEAM = 1000  # neighbours of 1/2 on either side where the seam is measured


class Form(NamedTuple):
    """A working type, its precision in bits, a degree, the largest f, and whether there is a table."""

    dtype: type
    precision: int
    degree: int
    high: float  # f can lie a little outside [-1/2, 1/2] or [-1/32, 1/32]
    tabulated: bool


FORMS = (
    Form(np.float32, 24, 6, 0.5 + 2.0**-8, False),
    Form(np.float64, 53, 11, 0.5 + 2.0**-12, False),
    Form(np.float32, 24, 3, 0.5 / ENTRIES + 2.0**-8, True),
    Form(np.float64, 53, 6, 0.5 / ENTRIES + 2.0**-12, True),
)


# --------------------------------------------------------------------------------- minimax fit


def chebyshev_grid(high):
    """Return Chebyshev points of [-high, high], ascending; their even number leaves out f = 0."""
    angles = [mpmath.pi * (i + mpf(0.5)) / GRID_POINTS for i in range(GRID_POINTS)]
    return [-high * mpmath.cos(angle) for angle in angles]


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


def fit(form, grid):
    """Return the coefficients of least error, and numbers of the working type in their place."""
    exact = remaining = minimax([mpf(1)], form.degree, grid)
    rounded = [mpf(1)]
    while True:
        rounded.append(mpf(nearest(remaining[len(rounded)], form)))
        if len(rounded) > form.degree:
            return exact, [float(c) for c in rounded]
        remaining = minimax(rounded, form.degree, grid)


def nearest(number, form):
    """Return the number of the working type that is nearest to a real one."""
    with mp.workprec(form.precision):
        return float(+number)


def table_entries(form):
    """Return 2**(j/16) as heads * (1 + lows)."""
    exact = [mpf(2) ** (mpf(j) / ENTRIES) for j in range(ENTRIES)]
    heads = [nearest(v, form) for v in exact]
    return heads, [nearest(v / h - 1, form) for v, h in zip(exact, heads, strict=True)]


# --------------------------------------------------------------------------------- measurement


def exp2_table():
    """Return 2**a as float64 heads and tails, for the multiples a of 2**-13 from -1 to 2."""
    exact = [mpf(2) ** mpf(step / 2**TABLE_BITS) for step in range(-(2**TABLE_BITS), 2 ** (TABLE_BITS + 1))]
    heads = [float(v) for v in exact]
    return np.array(heads), np.array([float(v - h) for v, h in zip(exact, heads, strict=True)])


@numba.njit
def exp2(f, j, table):
    """Return 2**(j/16 + f) as head + tail, to about 2**-65.

    f = a + b with a in the table and |b| <= 2**-14, so 2**f = 2**a + 2**a * (2**b - 1).
    """
    step = np.rint(f * 2.0**TABLE_BITS)
    row = int(step) + (1 + j / ENTRIES) * 2**TABLE_BITS
    head, tail = table[0][int(row)], table[1][int(row)]
    return head, tail + head * np.expm1((f - step * 2.0**-TABLE_BITS) * np.log(2.0))


def check_exp2(table, count, rng):
    """Return the largest relative error of `exp2` at random f, from mpmath."""
    points = zip(
        rng.uniform(-0.5, 0.5, count).tolist(), rng.integers(ENTRIES, size=count).tolist(), strict=True
    )
    return float(
        max(abs(sum(map(mpf, exp2(f, j, table))) / mpf(2) ** (mpf(j) / ENTRIES + f) - 1) for f, j in points)
    )


@numba.njit
def value(f, coefficients):
    """Return the polynomial at f as the kernels evaluate it (they scale it by a power of two)."""
    tail = coefficients[-1]
    for j in range(len(coefficients) - 2, 1, -1):
        tail = fma(tail, f, coefficients[j])
    return coefficients[0] + fma(f, coefficients[1], (f * f) * tail)


@numba.njit
def table_value(f, coefficients, head, low):
    """Return head * (1 + low) times the polynomial at f, as the kernels evaluate it."""
    tail = coefficients[-1]
    for j in range(len(coefficients) - 2, 1, -1):
        tail = fma(tail, f, coefficients[j])
    return fma(fma(f, coefficients[1], fma(f * f, tail, low)), head, head)


@numba.njit
def measure(points, coefficients, heads, lows, precision, table):
    """Measure the polynomial at ascending f, with each entry of the table, if there are any.

    Returns how often the value decreases from one f to the next, and the largest errors, each with
    its f: in ulp, and relative in units of 2**-precision.
    """
    decreases, ulp, relative = 0, (0.0, 0.0), (0.0, 0.0)
    for j in range(max(1, len(heads))):
        previous = 0.0
        for f in points:
            this = table_value(f, coefficients, heads[j], lows[j]) if len(heads) else value(f, coefficients)
            head, tail = exp2(np.float64(f), j, table)
            error = abs((this - head) - tail) * 2.0**precision
            in_ulp = error if head < 1.0 else 0.5 * error
            if in_ulp > ulp[0]:
                ulp = in_ulp, np.float64(f)
            if error / head > relative[0]:
                relative = error / head, np.float64(f)
            decreases += this < previous
            previous = this
    return decreases, ulp, relative


def every_float32(high):
    """Yield all float32 of [-high, high] but the tiny ones; arrays ascend and share their end points."""
    first, last = np.array([TINY, high], np.float32).view(np.int32).tolist()
    for start in range(first, last, CHUNK):
        f = np.arange(start, min(start + CHUNK, last) + 1, dtype=np.int32).view(np.float32)
        yield f
        yield -f[::-1]


def random_points(form, count, rng):
    """Yield arrays of random numbers of the working type, each followed by the next larger one, ascending."""
    for start in range(0, count, CHUNK):
        f = np.unique(rng.uniform(-form.high, form.high, min(CHUNK, count - start)).astype(form.dtype))
        yield np.column_stack([f, np.nextafter(f, form.dtype(np.inf))]).ravel()


def count_seam(form, coefficients):
    """Return at how many f around 1/2 the value is more than twice that at f - 1."""
    f = 0.5 + np.arange(-SEAM, SEAM + 1) * 2.0**-form.precision
    pairs = zip(f.astype(form.dtype), (f - 1.0).astype(form.dtype), strict=True)
    return sum(value(high, coefficients) > 2.0 * value(low, coefficients) for high, low in pairs)


# -------------------------------------------------------------------------------------- report


def log2_error(coefficients, grid):
    """Return the base-2 logarithm of the largest relative error of a polynomial on a grid."""
    return float(mpmath.log(max(abs(e) for e in relative_errors(coefficients, grid)), 2))


def source(number):
    """Return the source text of a float, hexadecimal without trailing zeros."""
    if number == 0.0:
        return "0.0"
    mantissa, exponent = number.hex().split("p")
    return f'float.fromhex("{mantissa.rstrip("0").rstrip(".")}p{exponent}")'


def report(form, samples, rng, table):
    """Fit and measure one form; print the numbers, return a comment and the coefficients."""
    grid = chebyshev_grid(form.high)
    exact, rounded = fit(form, grid)
    bits, bits_exact = log2_error(rounded, grid), log2_error(exact, grid)
    coefficients = np.array(rounded, form.dtype)
    heads, lows = np.array(table_entries(form) if form.tabulated else ([], []), form.dtype)
    if form.dtype is np.float32 and not form.tabulated:
        arrays, points = every_float32(form.high), "every f"
    else:
        arrays, points = random_points(form, samples, rng), f"{samples:.0e} random f"
    decreases, ulp, relative = 0, (0.0, 0.0), (0.0, 0.0)
    for f in arrays:
        found = measure(f, coefficients, heads, lows, form.precision, table)
        decreases, ulp, relative = decreases + found[0], max(ulp, found[1]), max(relative, found[2])
    name, unit = form.dtype.__name__, f"2**-{form.precision}"
    beside = f" with a table of {ENTRIES}" if form.tabulated else ""
    print(f"{name}{beside}: degree {form.degree}, |f| <= {form.high}")
    print(f"  relative error 2**{bits_exact:.2f}, with rounded coefficients 2**{bits:.2f}")
    print(f"  {points}: {decreases} decreases between neighbours; worst errors")
    print(f"    {ulp[0]:.4f} ulp at f = {ulp[1].hex()}")
    print(f"    {relative[0]:.4f} * {unit} relative at f = {relative[1].hex()}")
    if not form.tabulated:
        larger = count_seam(form, coefficients)
        print(f"  value at f above twice that at f - 1: {larger} of {2 * SEAM + 1} f around 1/2")
    if decreases:
        raise SystemExit(f"{name}{beside}: the value decreases")
    comment = (
        f"# {name}: relative error 2**{bits:.2f}; worst measured errors ({points})\n"
        f"# {ulp[0]:.4f} ulp and {relative[0]:.4f} * {unit} relative, no decrease between neighbours.\n"
    )
    return comment, rounded


def print_constants(name, pair):
    """Print the numbers of float32 and of float64 as they stand in the source."""
    print(f"{name} = (")
    for numbers in pair:
        print("    (", *(f"        {source(number)}," for number in numbers), "    ),", sep="\n")
    print(")")


def print_polynomials(name, pair):
    """Print the coefficients of a polynomial of float32 and one of float64."""
    print(f"{name}_SLOPE = ({source(pair[0][1])}, {source(pair[1][1])})")
    print_constants(f"{name}_CURVATURE", [coefficients[2:] for coefficients in pair])


def main():
    """Fit and measure all forms and print their constants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000_000, help="random f measured (%(default)s)")
    parser.add_argument("--checks", type=int, default=20_000, help="f checked by mpmath (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random f (%(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with mp.workdps(DIGITS):
        table = exp2_table()
        deviation = check_exp2(table, args.checks, rng)
        print(f"reference: relative error {deviation:.1e} ({args.checks} random f, from mpmath)")
        comments, polynomials = zip(*(report(form, args.samples, rng, table) for form in FORMS), strict=True)
        entries = [table_entries(form) for form in FORMS[2:]]
    print("\nfastmax/_math.py:\n")
    print("# 2**f for |f| <= 1/2 + 2**-8 or 2**-12, by scripts/fit_exp2.py.")
    print(comments[0] + comments[1], end="")
    print_polynomials("EXP2", polynomials[:2])
    print("\n# The same for |f| <= 1/32 + 2**-8 or 2**-12, and 2**(j / 16) as heads * (1 + lows).")
    print(comments[2] + comments[3], end="")
    print_polynomials("SIXTEENTH", polynomials[2:])
    print_constants("SIXTEENTH_HEADS", [heads for heads, _ in entries])
    print_constants("SIXTEENTH_LOWS", [lows for _, lows in entries])


if __name__ == "__main__":
    main()
