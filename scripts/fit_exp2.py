"""Derive the polynomials for 2**f that the kernels use, in float32 and float64, and measure them.

The kernels reduce an exponential to 2**n * 2**(j/m) * 2**f with 0 <= j < m, where m is the number of powers
in a table that registers hold: 16, 4, 2, or 1, which is none. With 2 or 4 powers |f| is hardly above 1/4 or
1/8, with 16 it is up to 1/16, as the exponent is rounded to a multiple of 1/16 before that of the maximum is
subtracted. Where no more is needed of terms than their ratios, it is so with 4 powers, too, and with 16
0 <= f < 1/16, or hardly below and above, by Horner's rule. Without a table it is 3/4 <= 2**f <= 3/2, as with
|f| <= 1/2 errors are largest below log2(3/4): there what rounds 2**f - 1 doubles while 2**f is small.

This script fits 2**f by 1 + c1*f + ... + cd*f**d in two steps:

1. Remez exchange with mpmath gives the real coefficients of least maximal relative error.
2. The coefficients are rounded to the working type one at a time, c1 first. After each rounding
   those that remain are fitted again around it and absorb most of its error.

Then the evaluation of the kernels, `value`, is measured at random f, with every entry of the table (without
one the kernels keep a small part of f apart, which is 0 here). It does not decrease in f: for f >= 0 each
step keeps the order of the one before, and between neighbours of f < 0, an ulp apart, rounding changes
f**2 * (c2 + ...) by less than 0.4 ulp of f while 2**f - 1 increases by more than 0.48; adding c1*f and then 1
keeps that order. By Horner's rule it does not decrease for f >= 0; where f is below, x c is so large that the
f of two entries are far from neighbours. The script counts the decreases all the same, by Horner's rule those
above 0, and fails if it finds one.

At a seam, where j changes, f and f - 1/m both stand for the same power or nearly, and rounding can make the
value at f the larger one by an ulp; the script says how often where that f is 1/(2m), though it depends on
the maximum.

It prints the constants for fastmax/_math.py and writes no file.
"""

import argparse
import bisect
from typing import NamedTuple

import mpmath
import numba
import numpy as np
from mpmath import mp, mpf
from options import seed, whole_number

from fastmax._lanes import fma

SLOTS = 16  # all tables are made of the powers 2**(j/16)
DIGITS = 60  # decimal digits of the Remez exchange
GRID_POINTS = 400  # of the Remez exchange
TABLE_BITS = 13  # the reference looks up 2**a for a in multiples of 2**-13
CHUNK = 1 << 18  # values of f measured at a time
SEAM = np.log2(1.5)  # largest f without a table, up to rounding
NEIGHBOURS = 1000  # of a seam on either side, where it is measured


class Form(NamedTuple):
    """A working type, its precision in bits, the entries of its table, a degree, the range of f, the rule."""

    dtype: type
    precision: int
    entries: int
    degree: int
    low: float
    high: float
    horner: bool = False


def form(dtype, precision, entries, degree, margin):
    """Form of which |f| can be larger than half the step of its table by a margin."""
    middle = SEAM - 0.5 if entries == 1 else 0.0
    radius = 0.5 / entries + margin
    return Form(dtype, precision, entries, degree, middle - radius, middle + radius)


FORMS = (
    form(np.float32, 24, 1, 6, 2.0**-8),
    form(np.float32, 24, 2, 5, 2.0**-6 + 2.0**-8),
    form(np.float32, 24, 4, 4, 2.0**-6 + 2.0**-8),
    form(np.float32, 24, 16, 4, 2.0**-5 + 2.0**-8),
    form(np.float64, 53, 1, 11, 2.0**-12),
    form(np.float64, 53, 2, 10, 2.0**-9),
    form(np.float64, 53, 16, 7, 2.0**-5 + 2.0**-12),
)
# For terms of which no more is needed than their ratios: with 16 powers the exponent is rounded down.
FORMS_OF_RATIOS = (
    form(np.float32, 24, 4, 4, 2.0**-8),
    Form(np.float32, 24, 16, 3, -(2.0**-8), 2.0**-4 + 2.0**-8, horner=True),
    Form(np.float64, 53, 16, 7, -(2.0**-12), 2.0**-4 + 2.0**-12, horner=True),
)
# For float32 on a GPU, where n is the nearest integer.
HALVES = Form(np.float32, 24, 1, 6, -0.5 - 2.0**-8, 0.5 + 2.0**-8)


# --------------------------------------------------------------------------------- minimax fit


def chebyshev_grid(low, high):
    """Return Chebyshev points of [low, high], ascending; f = 0 is none of them."""
    middle, radius = (mpf(high) + low) / 2, (mpf(high) - low) / 2
    angles = [mpmath.pi * (i + mpf(0.5)) / GRID_POINTS for i in range(GRID_POINTS)]
    return [middle - radius * mpmath.cos(angle) for angle in angles]


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
    """Return 2**(j/m) as heads * (1 + lows)."""
    exact = [mpf(2) ** (mpf(j) / form.entries) for j in range(form.entries)]
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
    row = int(step) + (1 + j / SLOTS) * 2**TABLE_BITS
    head, tail = table[0][int(row)], table[1][int(row)]
    return head, tail + head * np.expm1((f - step * 2.0**-TABLE_BITS) * np.log(2.0))


def check_exp2(table, count, rng):
    """Return the largest relative error of `exp2` at random f, from mpmath."""
    points = zip(
        rng.uniform(SEAM - 1.0, SEAM, count).tolist(), rng.integers(SLOTS, size=count).tolist(), strict=True
    )
    return float(
        max(abs(sum(map(mpf, exp2(f, j, table))) / mpf(2) ** (mpf(j) / SLOTS + f) - 1) for f, j in points)
    )


@numba.njit
def by_horners_rule(x, coefficients):
    """Return a polynomial at x."""
    result = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        result = fma(result, x, coefficient)
    return result


@numba.njit
def by_pairs(x, coefficients):
    """Return a polynomial at x by Horner's rule in x**2, of polynomials from pairs of coefficients."""
    start = (len(coefficients) - 1) // 2 * 2
    result = by_horners_rule(x, coefficients[start:])
    for j in range(start - 2, -1, -2):
        result = fma(result, x * x, by_horners_rule(x, coefficients[j : j + 2]))
    return result


@numba.njit
def value(f, coefficients, head, low, horner, table):
    """Return head * (1 + low) times the polynomial at f, as the kernels evaluate it."""
    if horner:
        return fma(fma(f, by_horners_rule(f, coefficients[1:]), low), head, head)
    curvature = coefficients[2:]
    if table and len(curvature) > 3:
        tail = by_pairs(f, curvature)
    else:
        tail = by_horners_rule(f, curvature)
    return fma(fma(f, coefficients[1], fma(f * f, tail, low)), head, head)


@numba.njit
def larger_errors(ulp, relative, this, f, j, precision, table):
    """Return the larger of two errors and those of a value at f, each with its f."""
    head, tail = exp2(np.float64(f), j, table)
    error = abs((this - head) - tail) * 2.0**precision
    in_ulp = error if head < 1.0 else 0.5 * error if head < 2.0 else 0.25 * error
    if in_ulp > ulp[0]:
        ulp = in_ulp, np.float64(f)
    if error / head > relative[0]:
        relative = error / head, np.float64(f)
    return ulp, relative


@numba.njit
def measure(points, coefficients, heads, lows, precision, horner, table):
    """Measure the polynomial at ascending f, with each entry of the table.

    Returns how often the value decreases from one f to the next (by Horner's rule, to one above 0), and the
    largest errors, each with its f: in ulp, and relative in units of 2**-precision.
    """
    decreases, ulp, relative = 0, (0.0, 0.0), (0.0, 0.0)
    for j in range(len(heads)):
        previous = 0.0
        for f in points:
            this = value(f, coefficients, heads[j], lows[j], horner, len(heads) > 1)
            slot = j * (SLOTS // len(heads))
            ulp, relative = larger_errors(ulp, relative, this, f, slot, precision, table)
            decreases += this < previous and (f > 0.0 or not horner)
            previous = this
    return decreases, ulp, relative


@numba.njit
def measure_halves(points, coefficients, precision, table):
    """Return the largest errors of the polynomial by Horner's rule, as `measure` does."""
    ulp, relative = (0.0, 0.0), (0.0, 0.0)
    for f in points:
        this = by_horners_rule(f, coefficients)
        ulp, relative = larger_errors(ulp, relative, this, f, 0, precision, table)
    return ulp, relative


def random_points(form, count, rng):
    """Yield arrays of random numbers of the working type, each followed by the next larger one, ascending."""
    for start in range(0, count, CHUNK):
        f = np.unique(rng.uniform(form.low, form.high, min(CHUNK, count - start)).astype(form.dtype))
        yield np.column_stack([f, np.nextafter(f, form.dtype(np.inf))]).ravel()


def count_seams(form, coefficients, heads, lows):
    """Return at how many f around all seams the value is larger than that at f - 1/m with the next entry."""
    middle = (form.low + form.high) / 2
    f = (
        middle
        + 0.5 / form.entries
        + np.arange(-NEIGHBOURS, NEIGHBOURS + 1) * 2.0**-form.precision / form.entries
    )
    pairs = list(zip(f.astype(form.dtype), (f - 1.0 / form.entries).astype(form.dtype), strict=True))
    heads, lows = np.append(heads, heads[:1] * 2), np.append(lows, lows[:1])
    return sum(
        value(high, coefficients, heads[j], lows[j], form.horner, form.entries > 1)
        > value(low, coefficients, heads[j + 1], lows[j + 1], form.horner, form.entries > 1)
        for j in range(form.entries)
        for high, low in pairs
    )


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
    grid = chebyshev_grid(form.low, form.high)
    exact, rounded = fit(form, grid)
    bits, bits_exact = log2_error(rounded, grid), log2_error(exact, grid)
    coefficients = np.array(rounded, form.dtype)
    heads, lows = np.array(table_entries(form), form.dtype)
    decreases, ulp, relative = 0, (0.0, 0.0), (0.0, 0.0)
    for f in random_points(form, samples, rng):
        found = measure(f, coefficients, heads, lows, form.precision, form.horner, table)
        decreases, ulp, relative = decreases + found[0], max(ulp, found[1]), max(relative, found[2])
    beside = f"with {form.entries} entries" if form.entries > 1 else "without a table"
    beside += " from 0" if form.horner else ""
    name, unit = f"{form.dtype.__name__} {beside}", f"2**-{form.precision}"
    print(f"{name}: degree {form.degree}, {form.low:.4f} <= f <= {form.high:.4f}")
    print(f"  relative error 2**{bits_exact:.2f}, with rounded coefficients 2**{bits:.2f}")
    print(f"  {samples:.0e} random f: {decreases} decreases between neighbours; worst errors")
    print(f"    {ulp[0]:.4f} ulp at f = {ulp[1].hex()}")
    print(f"    {relative[0]:.4f} * {unit} relative at f = {relative[1].hex()}")
    larger, seams = count_seams(form, coefficients, heads, lows), form.entries * (2 * NEIGHBOURS + 1)
    print(f"  value at the end of the range above that at the start of the next: {larger} of {seams}")
    if decreases:
        raise SystemExit(f"{name}: the value decreases")
    comment = (
        f"# {name}: relative error 2**{bits:.2f}; worst measured errors\n"
        f"# {ulp[0]:.4f} ulp and {relative[0]:.4f} * {unit} relative ({samples:.0e} random f).\n"
    )
    return comment, rounded


def report_halves(samples, rng, table):
    """Do the same for the polynomial for nearest integers."""
    grid = chebyshev_grid(HALVES.low, HALVES.high)
    _, rounded = fit(HALVES, grid)
    coefficients, bits = np.array(rounded, HALVES.dtype), log2_error(rounded, grid)
    ulp, relative = (0.0, 0.0), (0.0, 0.0)
    for f in random_points(HALVES, samples, rng):
        found = measure_halves(f, coefficients, HALVES.precision, table)
        ulp, relative = max(ulp, found[0]), max(relative, found[1])
    print(f"float32 rounded to n: degree {HALVES.degree}, {HALVES.low:.4f} <= f <= {HALVES.high:.4f}")
    comment = (
        f"# float32 rounded to n: relative error 2**{bits:.2f}; worst measured errors\n"
        f"# {ulp[0]:.4f} ulp and {relative[0]:.4f} * 2**-24 relative ({samples:.0e} random f).\n"
    )
    print(comment, end="")
    return comment, rounded


def print_numbers(name, numbers, indent="    "):
    """Print the end of a tuple of numbers as it stands in the source."""
    print(
        f"{indent}{name}(", *(f"{indent}    {source(number)}," for number in numbers), f"{indent}),", sep="\n"
    )


def print_polynomials(name, results):
    """Print polynomials, by type and by the number of entries."""
    print(f"{name} = (")
    for dtype in (np.float32, np.float64):
        print("    {")
        for form, (_, coefficients) in results:
            if form.dtype is dtype:
                print_numbers(f"{form.entries}: ", coefficients[1:], indent="        ")
        print("    },")
    print(")")


def main():
    """Fit and measure all forms and print their constants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=whole_number, default=10_000_000, help="random f measured (%(default)s)"
    )
    parser.add_argument(
        "--checks", type=whole_number, default=20_000, help="f checked by mpmath (%(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random f (%(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with mp.workdps(DIGITS):
        table = exp2_table()
        deviation = check_exp2(table, args.checks, rng)
        print(f"reference: relative error {deviation:.1e} ({args.checks} random f, from mpmath)")
        results = [(form, report(form, args.samples, rng, table)) for form in FORMS]
        comment, halves = report_halves(args.samples, rng, table)
        of_ratios = [(form, report(form, args.samples, rng, table)) for form in FORMS_OF_RATIOS]
        tables = [table_entries(form) for form in FORMS if form.entries == SLOTS]
    print("\nfastmax/_math.py:\n")
    print(*(comment for _, (comment, _) in results), sep="", end="")
    print_polynomials("EXP2", results)
    print(comment, end="")
    print("EXP2_OF_HALVES = (", *(f"    {source(number)}," for number in halves[1:]), ")", sep="\n")
    print(*(own for _, (own, _) in of_ratios), sep="", end="")
    print_polynomials("EXP2_OF_RATIOS", of_ratios)
    for name, numbers in zip(("HEADS", "LOWS"), zip(*tables, strict=True), strict=True):
        print(f"{name} = (")
        for own in numbers:
            print_numbers("", own)
        print(")")


if __name__ == "__main__":
    main()
