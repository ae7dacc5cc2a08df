"""Measure the worst error of fastmax, SciPy, PyTorch and the plain formula, and draw it.

Every entry of every result is compared with the exact value of softmax(x / T), log_softmax or
logsumexp at the given x and T, known to about 2**-98, in units in the last place (ulp) of the
result's type. The libraries without a temperature get x / T, as a user would write it. Writes
accuracy.csv (every case), accuracy.png and .svg (the errors of softmax), special_values.csv (limits,
infinities, opposite extremes) and why_not_scipy.csv (the comparison of the README, with timings).
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import double_double as dd
import matplotlib.pyplot as plt
import mpmath
import numpy as np
import scipy.special
from drawing import add_output_options, make_output_folder, report, save, use_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tables import header, show_table, write_table
from tqdm import tqdm

import fastmax

SEED = 20240611
TYPES = [np.float32, np.float64]
FUNCTIONS = ["softmax", "log_softmax", "logsumexp"]
SIZES = [1, 2, 3, 10, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000]
OFFSETS = [0.0, 1.0, 1e2, 1e4, 1e6]
TEMPERATURES = [1e-300, 1e-100, 1e-30, 1e-10, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e10, 1e30, 1e100, 1e300]
# Entries worked on at a time by the oracle, so that its temporaries stay in the cache.
BLOCK = 8192
# The sum of the exponentials is held times 2**SHIFT: what is subnormal beside 1 still counts.
SHIFT = 200
BITS = 300
# What softmax must keep to, in ulp.
BAR = 2.0
ABSENT = "not installed"
WRONG = " (!)"
PAIR = ["fastmax", "scipy"]
ROUNDS = 7
MARKERS = "os^D"
PANELS = [
    ("size", "k", "$T = 1$", "entries of the slice, $k$"),
    ("offset", "offset", "$T = 3/4$,  $k = 1000$", "offset added to $x$"),
    ("temperature", "temperature", "$x$ of scale $T$,  $k = 1000$", "temperature $T$"),
]
TIMED_SHAPE = (4096, 1000)


class Case(NamedTuple):
    """Slices of one kind: `rows` of them, each of `k` entries."""

    sweep: str
    dtype: type[np.floating]
    k: int
    rows: int
    offset: float = 0.0
    temperature: float = 1.0
    subnormal: bool = False

    def draw(self) -> np.ndarray:
        """Draw the entries: normal with standard deviation 3 T, as far as the type reaches."""
        rng = np.random.default_rng(SEED)
        shape = self.rows, self.k
        if self.subnormal:
            lowest = np.log(float(np.finfo(self.dtype).smallest_subnormal))
            x = rng.uniform(lowest, 0.0, shape)
        else:
            x = 3.0 * rng.standard_normal(shape)
        largest = 1e36 if self.dtype is np.float32 else 1e306
        x *= min(max(self.temperature, 1 / largest), largest)
        return (x + self.offset).astype(self.dtype)


class Exact(NamedTuple):
    """The exact values for the rows of a matrix."""

    logits: dd.DoubleDouble  # (x - max) / T
    mantissa: dd.DoubleDouble  # exp of it is mantissa * 2**exponent
    exponent: np.ndarray
    row_max: np.ndarray
    row_sum: dd.DoubleDouble
    log_sum: list[Any]  # mpmath numbers


class Library(NamedTuple):
    """The three functions as f(x, temperature), over the last axis."""

    softmax: Callable[[np.ndarray, float], np.ndarray]
    log_softmax: Callable[[np.ndarray, float], np.ndarray]
    logsumexp: Callable[[np.ndarray, float], np.ndarray]


def divided(x: np.ndarray, temperature: float) -> np.ndarray:
    """Return x / T in the type of x."""
    return x / np.asarray(temperature, dtype=x.dtype)


def naive_softmax(x: np.ndarray, temperature: float) -> np.ndarray:
    """Return the formula as it stands."""
    exps = np.exp(divided(x, temperature))
    return exps / exps.sum(axis=-1, keepdims=True)


def make_libraries() -> dict[str, Library | None]:
    """Return what is compared, by name; None for what is not installed."""
    libraries: dict[str, Library | None] = {
        "fastmax": Library(
            lambda x, t: fastmax.softmax(x, t, axis=-1),
            lambda x, t: fastmax.log_softmax(x, t, axis=-1),
            lambda x, t: fastmax.logsumexp(x, t, axis=-1),
        ),
        "scipy": Library(
            lambda x, t: scipy.special.softmax(divided(x, t), axis=-1),
            lambda x, t: scipy.special.log_softmax(divided(x, t), axis=-1),
            lambda x, t: t * scipy.special.logsumexp(divided(x, t), axis=-1),
        ),
        "torch": None,
        "naive": Library(
            naive_softmax,
            lambda x, t: np.log(naive_softmax(x, t)),
            lambda x, t: t * np.log(np.exp(divided(x, t)).sum(axis=-1)),
        ),
    }
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return libraries
    libraries["torch"] = Library(
        lambda x, t: torch.softmax(torch.from_numpy(x) / t, -1).numpy(),
        lambda x, t: torch.log_softmax(torch.from_numpy(x) / t, -1).numpy(),
        lambda x, t: (t * torch.logsumexp(torch.from_numpy(x) / t, -1)).numpy(),
    )
    return libraries


def make_cases(quick: bool) -> list[Case]:
    """Return the sweeps over the size, the offset, the temperature, and subnormal results."""
    cases = []
    for dtype in TYPES:
        for k in SIZES[:5] if quick else SIZES:
            cases.append(Case("size", dtype, k, max(1, min(300, 3000 // k))))
        for offset in OFFSETS:
            cases.append(Case("offset", dtype, 1000, 3, offset, 0.75))
        for temperature in TEMPERATURES:
            # Rounded to the type where it can be, so that dividing by it is all the others do.
            rounded = float(np.array(temperature).astype(dtype))
            exact = rounded if 0 < rounded < np.inf else temperature
            cases.append(Case("temperature", dtype, 1000, 3, 0.0, exact))
        for k in [10, 1000] if quick else [10, 1000, 100_000]:
            cases.append(Case("subnormal", dtype, k, max(1, 3000 // k), 0.0, 0.75, subnormal=True))
        for temperature in [1e-3, 0.75, 1e3, 1e6]:
            size = 1000 if quick else 100_000
            cases.append(Case("combined", dtype, size, 1, 1e6, temperature))
    return cases


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the columns of a matrix so that a block has about BLOCK entries."""
    width = max(1, BLOCK // shape[0])
    for start in range(0, shape[1], width):
        yield slice(start, start + width)


def take(x: dd.DoubleDouble, columns: slice) -> dd.DoubleDouble:
    """Return some columns."""
    return x[0][:, columns], x[1][:, columns]


def scaled_logits(x: np.ndarray, row_max: np.ndarray, temperature: float) -> dd.DoubleDouble:
    """Return (x - max) / T; powers of two keep the difference and the quotient from overflowing."""
    mantissa, exponent = np.frexp(temperature)
    largest = np.frexp(np.abs(row_max).max())[1] + 2
    largest = max(largest, np.frexp(np.abs(x).max())[1] + 2)
    difference = dd.two_sum(np.ldexp(x, -largest), -np.ldexp(row_max, -largest))
    high, low = dd.divide(difference, (mantissa, np.zeros(())))
    return np.ldexp(high, largest - exponent), np.ldexp(low, largest - exponent)


def solve(x: np.ndarray, temperature: float) -> Exact:
    """Return the exact exponentials and their sums, for the rows of a float64 matrix."""
    row_max = x.max(axis=-1, keepdims=True)
    first = x.argmax(axis=-1)[:, None]
    high, low, mantissa_high, mantissa_low = (np.empty_like(x) for _ in range(4))
    exponent = np.empty(x.shape, dtype=np.int32)
    sums = []
    for columns in blocks(x.shape):
        logits = scaled_logits(x[:, columns], row_max, temperature)
        mantissa, powers = dd.exp(logits)
        high[:, columns], low[:, columns] = logits
        mantissa_high[:, columns], mantissa_low[:, columns] = mantissa
        exponent[:, columns] = powers
        # The first maximal entry, whose exp is 1, is left out and log1p taken of the rest.
        others = np.arange(x.shape[1])[columns] != first
        sums.append(dd.total(tuple(np.ldexp(part, powers + SHIFT) * others for part in mantissa)))
    rest = dd.total((np.stack([s[0] for s in sums], -1), np.stack([s[1] for s in sums], -1)))
    with mpmath.workprec(BITS):
        sum_of_rest = [
            mpmath.ldexp(mpmath.mpf(a) + mpmath.mpf(b), -SHIFT)
            for a, b in zip(rest[0].tolist(), rest[1].tolist(), strict=True)
        ]
        row_sum = dd.from_mpmath([1 + rest for rest in sum_of_rest])
        log_sum = [mpmath.log1p(rest) for rest in sum_of_rest]
    return Exact(
        (high, low),
        (mantissa_high, mantissa_low),
        exponent,
        row_max,
        (row_sum[0][:, None], row_sum[1][:, None]),
        log_sum,
    )


def ulps(result: np.ndarray, exact: dd.DoubleDouble, exponent: np.ndarray, dtype: type[np.floating]) -> float:
    """Return the worst of abs(result - exact * 2**exponent), in ulp of the exact value."""
    info = np.finfo(dtype)
    magnitude = np.where(exact[0] == 0, info.minexp, np.frexp(exact[0])[1] - 1 + exponent)
    unit = np.ldexp(1.0, np.maximum(magnitude, info.minexp) - info.nmant - exponent)
    scaled = np.ldexp(result, -exponent)
    error = np.abs((scaled - exact[0]) - exact[1]) / unit
    overflow = (magnitude >= info.maxexp) & (result == np.copysign(np.inf, exact[0]))
    return float(np.max(np.where(overflow, 0.0, error)))


def softmax_error(result: np.ndarray, exact: Exact) -> float:
    """Return the worst error of the probabilities."""
    worst = []
    for columns in blocks(result.shape):
        probs = dd.divide(take(exact.mantissa, columns), exact.row_sum)
        # From here down everything is far below half the smallest subnormal.
        exponent = np.maximum(exact.exponent[:, columns], -1100)
        worst.append(ulps(result[:, columns].astype(np.float64), probs, exponent, result.dtype.type))
    return float(np.max(worst))


def log_softmax_error(result: np.ndarray, exact: Exact) -> float:
    """Return the worst error of the logarithms."""
    with mpmath.workprec(BITS):
        minus_log_sum = dd.from_mpmath([-value for value in exact.log_sum])
    minus_log_sum = minus_log_sum[0][:, None], minus_log_sum[1][:, None]
    worst = []
    for columns in blocks(result.shape):
        logs = dd.add(take(exact.logits, columns), minus_log_sum)
        exponent = np.zeros(logs[0].shape, dtype=np.int32)
        worst.append(ulps(result[:, columns].astype(np.float64), logs, exponent, result.dtype.type))
    return float(np.max(worst))


def logsumexp_error(result: np.ndarray, exact: Exact, temperature: float) -> float:
    """Return the worst error, in ulp of the largest of max(x), T log(sum) and their sum."""
    info = np.finfo(result.dtype)
    worst = []
    with mpmath.workprec(BITS):
        for value, row_max, log_sum in zip(
            result.tolist(), exact.row_max[:, 0].tolist(), exact.log_sum, strict=True
        ):
            term = temperature * log_sum
            total = row_max + term
            scale = max(abs(mpmath.mpf(row_max)), abs(term), abs(total))
            magnitude = max(int(mpmath.frexp(scale)[1]) - 1, int(info.minexp))
            if magnitude >= info.maxexp and np.isinf(value):
                worst.append(0.0)
            else:
                unit = mpmath.ldexp(1, magnitude - int(info.nmant))
                worst.append(float(abs(value - total) / unit) if np.isfinite(value) else np.nan)
    return float(np.max(worst))


def case_errors(case: Case, libraries: dict[str, Library | None]) -> list[dict[str, Any]]:
    """Return a row of the table per function: the worst error of every library."""
    x = case.draw()
    exact = solve(x.astype(np.float64), case.temperature)
    rows = []
    for function in FUNCTIONS:
        row: dict[str, Any] = {"function": function, "dtype": np.dtype(case.dtype).name}
        row |= {"sweep": case.sweep, "k": case.k, "offset": case.offset}
        row |= {"temperature": case.temperature, "rows": case.rows}
        for name, library in libraries.items():
            if library is None:
                row[name] = ABSENT
                continue
            result = getattr(library, function)(x, case.temperature)
            if function == "softmax":
                row[name] = softmax_error(result, exact)
            elif function == "log_softmax":
                row[name] = log_softmax_error(result, exact)
            else:
                row[name] = logsumexp_error(result, exact, case.temperature)
        rows.append(row)
    return rows


def check_oracle(cases: Sequence[Case]) -> float:
    """Return the worst relative error of the oracle's probabilities against mpmath.

    It is 2**-97 for subnormal results, whose logits near -745 take 10 bits, and 2**-102 elsewhere.
    """
    worst = 0.0
    for case in cases:
        if case.rows * case.k > 10_000:
            continue
        x = case.draw()[:1, :50].astype(np.float64)
        exact = solve(x, case.temperature)
        probs = dd.divide(exact.mantissa, exact.row_sum)
        with mpmath.workprec(BITS):
            exps = [mpmath.exp(mpmath.mpf(value) / case.temperature) for value in x[0].tolist()]
            total = mpmath.fsum(exps)
            for i in np.flatnonzero(exact.logits[0][0] > dd.EXP_LOWEST):
                ours = mpmath.mpf(float(probs[0][0, i])) + mpmath.mpf(float(probs[1][0, i]))
                ours = mpmath.ldexp(ours, int(exact.exponent[0, i]))
                worst = max(worst, float(abs(ours * total / exps[i] - 1)))
    if worst > 2.0**-90:
        raise ArithmeticError(f"the oracle differs from mpmath by {worst}")
    return worst


def measure(libraries: dict[str, Library | None], quick: bool) -> list[dict[str, Any]]:
    """Return the errors of every case, with a progress bar over the entries."""
    cases = make_cases(quick)
    print(f"oracle: within 2**{np.log2(check_oracle(cases)):.0f} of mpmath")
    table = []
    entries = sum(case.rows * case.k for case in cases)
    with tqdm(total=entries, unit="entry", unit_scale=True) as bar:
        for case in cases:
            bar.set_description(f"{case.sweep} {np.dtype(case.dtype).name} k={case.k}")
            table.extend(case_errors(case, libraries))
            bar.update(case.rows * case.k)
    return table


def worst_of(values: Sequence[Any]) -> Any:
    """Return the largest error; NaN is worse than any, and a word stays a word."""
    if any(isinstance(value, str) for value in values):
        return values[0]
    return float(np.max(values))


def summarise(table: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the worst errors by function, type and sweep."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in table:
        groups.setdefault((row["function"], row["dtype"], row["sweep"]), []).append(row)
    return [
        dict(zip(["function", "dtype", "sweep"], key, strict=True))
        | {name: worst_of([row[name] for row in rows]) for name in names}
        for key, rows in sorted(groups.items(), key=lambda item: FUNCTIONS.index(item[0][0]))
    ]


def special_cases() -> list[tuple[str, np.ndarray, float, list[float]]]:
    """Return (name, x, T, probabilities) where limits and ranges decide.

    The probabilities are the definition's, and for finite x and T those of mpmath at 50 digits.
    """
    inf, nan = np.inf, np.nan
    two = [0.8807970779778823, 0.11920292202211755]
    three = [0.09003057317038046, 0.24472847105479767, 0.6652409557748219]
    wide = [0.354343693522645, 0.645656306477355]
    cases = [
        ("T = 0", [1, 2, 3], 0.0, [0, 0, 1]),
        ("T = 0, tied maximum", [1, 3, 3], 0.0, [0, 1 / 2, 1 / 2]),
        ("T = inf", [1, 2, 3], inf, [1 / 3, 1 / 3, 1 / 3]),
        ("T = inf, an entry -inf", [-inf, 0, 0], inf, [0, 1 / 2, 1 / 2]),
        ("least T", [1, 3, 3], 5e-324, [0, 1 / 2, 1 / 2]),
        ("tiny T", [1, 2, 3], 1e-310, [0, 0, 1]),
        ("subnormal x and T", [5e-324, 1e-323, 1.5e-323], 5e-324, three),
        ("huge T", [1, 2, 3], 1e308, [1 / 3, 1 / 3, 1 / 3]),
        ("opposite extremes, huge T", [1e308, -1e308], 1e308, two),
        ("opposite extremes, T = 1", [1e308, -1e308], 1.0, [1, 0]),
        ("tied extremes, T = 1/2", [1e308, 1e308], 0.5, [1 / 2, 1 / 2]),
        ("entries near 1000", [1000, 1001, 1002], 1.0, three),
        ("two entries +inf", [inf, 0, inf], 1.0, [1 / 2, 0, 1 / 2]),
        ("an entry -inf", [-inf, 0], 1.0, [0, 1]),
        ("all -inf: undefined", [-inf, -inf], 1.0, [nan, nan]),
        ("float32, tiny T", [1, 2, 3], 1e-50, [0, 0, 1]),
        ("float32, huge T", [-3e38, 3e38], 1e39, wide),
    ]
    return [
        (name, np.array(x, dtype=np.float32 if "float32" in name else np.float64), t, probs)
        for name, x, t, probs in cases
    ]


def show_vector(values: Sequence[float] | np.ndarray) -> str:
    """Write a short vector with at most 4 digits."""
    return " ".join(min(f"{value:.4g}", str(value), key=len) for value in values)


def special_values(libraries: dict[str, Library | None]) -> list[dict[str, str]]:
    """Return a row per special case: what each library gives, marked where it is wrong."""
    table = []
    for name, x, temperature, probs in special_cases():
        row = {"case": name, "x": show_vector(x), "temperature": show_vector([temperature])}
        row["exact"] = show_vector(probs)
        for library_name, library in libraries.items():
            if library is None:
                row[library_name] = ABSENT
                continue
            with np.errstate(all="ignore"):
                result = library.softmax(x, temperature)
            right = np.allclose(result, probs, rtol=1e-6, atol=0, equal_nan=True)
            row[library_name] = show_vector(result) + ("" if right else WRONG)
        table.append(row)
    return table


def time_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], loops: int) -> float:
    """Return the median time of theirs over that of ours, measured in turns."""
    times: dict[Callable[[], Any], list[float]] = {ours: [], theirs: []}
    for _ in range(ROUNDS + 1):
        for function, measured in times.items():
            start = time.perf_counter()
            for _ in range(loops):
                function()
            measured.append(time.perf_counter() - start)
    # The first round compiles and warms up.
    return statistics.median(times[theirs][1:]) / statistics.median(times[ours][1:])


def time_ratios(quick: bool) -> dict[str, float]:
    """Return how many times longer SciPy takes than fastmax, by what is computed."""
    rng = np.random.default_rng(SEED)
    shape = (64, 1000) if quick else TIMED_SHAPE
    x = rng.standard_normal(shape).astype(np.float32)
    temperatures = rng.uniform(0.5, 2.0, shape[0])
    column = temperatures[:, None].astype(np.float32)
    few = np.array([1.0, 2.0, 3.0])
    size = f"float32 {shape[0]} x {shape[1]}"
    return {
        f"time, {size}, one T per row": time_ratio(
            lambda: fastmax.softmax(x, temperatures, axis=-1),
            lambda: scipy.special.softmax(x / column, axis=-1),
            1,
        ),
        f"time, {size}, T = 1": time_ratio(
            lambda: fastmax.softmax(x, axis=-1), lambda: scipy.special.softmax(x, axis=-1), 1
        ),
        "time, float64 (3,), T = 1/2": time_ratio(
            lambda: fastmax.softmax(few, 0.5), lambda: scipy.special.softmax(few / 0.5), 1000
        ),
    }


def why_not_scipy(
    table: list[dict[str, Any]], special: list[dict[str, str]], quick: bool
) -> list[dict[str, str]]:
    """Return the comparison with scipy.special.softmax(x / T), a row per question."""
    softmax = [row for row in table if row["function"] == "softmax"]
    largest = max(row["k"] for row in softmax if row["sweep"] == "size")
    questions = {"T = 1, no offset": "size", "T = 3/4, offsets to 1e6": "offset"}
    questions |= {"T from 1e-300 to 1e300": "temperature", "results to subnormal": "subnormal"}
    answers = []

    def answer(question: str, rows: list[dict[str, Any]]) -> None:
        errors = {name: show_error(worst_of([row[name] for row in rows])) for name in PAIR}
        answers.append({"question": question} | errors)

    for dtype in ["float32", "float64"]:
        for label, sweep in questions.items():
            rows = [row for row in softmax if (row["dtype"], row["sweep"]) == (dtype, sweep)]
            answer(f"worst error in ulp, {dtype}, {label}", rows)
        rows = [row for row in softmax if (row["dtype"], row["k"]) == (dtype, largest)]
        answer(f"worst error in ulp, {dtype}, {largest:,} entries", rows)
    right = {name: sum(not row[name].endswith(WRONG) for row in special) for name in PAIR}
    answers.append(
        {"question": f"special values right, of {len(special)}"}
        | {name: str(count) for name, count in right.items()}
    )
    for question, ratio in time_ratios(quick).items():
        answers.append({"question": question, "fastmax": "1", "scipy": f"{ratio:.1f}"})
    return answers


def show_error(value: float | str) -> str:
    """Write an error with the digits that matter."""
    if isinstance(value, str):
        return value
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "inf"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"


def draw_panel(ax: Axes, rows: list[dict[str, Any]], variable: str, names: Sequence[str], top: float) -> None:
    """Draw every library's error at each value of a variable; failures in a row at the top."""
    ticks = np.arange(len(rows))
    bar = {"linewidth": 0.9, "linestyle": (0, (1, 2)), "zorder": 1}
    ax.axhline(BAR, color="0.35", label=f"{BAR:g} ulp", **bar)
    for i, name in enumerate(names):
        errors = np.array([row[name] for row in rows])
        fails = ~np.isfinite(errors)
        # Side by side, so that one marker does not hide another.
        places = ticks + 0.16 * (i - (len(names) - 1) / 2)
        (line,) = ax.plot(
            places, np.where(fails, np.nan, errors), marker=MARKERS[i], label=name, zorder=4 - i / 9
        )
        for place in places[fails]:
            ax.plot(place, top, MARKERS[i], color=line.get_color(), clip_on=False)
    step = 1 if len(rows) <= 10 else 2
    ax.set_xticks(ticks[::step], [show_power(row[variable]) for row in rows[::step]])
    ax.set_xlim(-0.6, len(rows) - 0.4)


def show_power(value: float) -> str:
    """Write powers of ten as such, other numbers with 2 digits."""
    exponent = round(np.log10(value)) if value > 0 else 0
    if abs(exponent) < 2 or not np.isclose(value, 10.0**exponent, rtol=1e-4):
        return f"{value:.2g}"
    return f"$10^{{{exponent}}}$"


def draw_errors(table: list[dict[str, Any]], names: Sequence[str]) -> Figure:
    """Draw the worst errors of softmax against the size, the offset and the temperature."""
    softmax = [row for row in table if row["function"] == "softmax"]
    drawn = [row for row in softmax if row["sweep"] in {panel[0] for panel in PANELS}]
    finite = [row[name] for row in drawn for name in names if np.isfinite(row[name])]
    decades = int(np.ceil(np.log10(max(finite))))
    top = 10.0 ** (decades + 1)
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7), sharey=True, sharex="col")
    for ax_row, dtype in zip(axes, ["float32", "float64"], strict=True):
        for ax, (sweep, variable, title, xlabel) in zip(ax_row, PANELS, strict=True):
            rows = [r for r in softmax if (r["dtype"], r["sweep"]) == (dtype, sweep)]
            draw_panel(ax, rows, variable, names, top)
            ax.set_title(f"{dtype},  {title}")
            if dtype == "float64":
                ax.set_xlabel(xlabel)
        ax_row[0].set_ylabel("worst error of softmax, ulp")
    ax = axes[0, 0]
    ax.set_yscale("symlog", linthresh=1.0)
    powers = range(1, decades + 1, 1 + decades // 8)
    ticks = [0.0, BAR, *(10.0**i for i in powers), top]
    ax.set_yticks(ticks, ["0", f"{BAR:g}", *(f"$10^{{{i}}}$" for i in powers), "NaN, inf"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(-0.1, top)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(names) + 1)
    return figure


def make_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="at most 1000 entries a slice: seconds, not minutes"
    )
    add_output_options(parser)
    return parser


def main() -> None:
    """Print the tables, write them and the figure, and say which files were written."""
    parser = make_parser()
    arguments = parser.parse_args()
    make_output_folder(parser, arguments.output)
    use_style()
    libraries = make_libraries()
    with np.errstate(all="ignore"):
        table = measure(libraries, arguments.quick)
    special = special_values(libraries)
    why = why_not_scipy(table, special, arguments.quick)

    show_table("Worst error in ulp", summarise(table, list(libraries)), show_error)
    show_table(f"softmax(x / T) at special values ({WRONG.strip()} = wrong)", special, show_error)
    show_table("Why not scipy.special.softmax(x / T)? Times: multiples of fastmax's", why, show_error)
    comments = header(["numpy", "numba", "scipy", *(["torch"] if libraries["torch"] else [])])
    names = {"accuracy": table, "special_values": special, "why_not_scipy": why}
    report([write_table(arguments.output / f"{name}.csv", comments, t) for name, t in names.items()])
    installed = [name for name, library in libraries.items() if library]
    figure = draw_errors(table, installed)
    report(save(figure, arguments.output / "accuracy", arguments.format))


if __name__ == "__main__":
    main()
