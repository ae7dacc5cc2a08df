"""Time softmax on a CPU against the length of the slices, the threads and the size of the array.

Three sweeps, in float32 and float64: the length k of the rows of an array of about the same number of
entries, the number of threads, and the number of entries with one thread and with all. Each time is
taken in turns with that of numpy.copyto for the same array, and divided by it. Writes scaling_cpu.csv,
and the curves as scaling_cpu.png and .svg.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numba
from contenders import (
    WIDE,
    Case,
    add_timing_options,
    call_copy,
    call_fastmax,
    check,
    compare_with_copy,
    count_calls,
    make_task,
    median_ratio,
    seconds_per_call,
    show_case,
    show_shape,
)
from drawing import add_output_options, make_output_folder, report, save, use_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from options import whole_number
from tables import header, show_table, write_table
from tqdm import tqdm

TOTAL = 10**7
LARGEST = 10**8
# Lengths of the rows and columns in the sweeps over threads and sizes.
LENGTH = 1000
SIZES = [2**i for i in range(10, 23)]
# By which all threads must be faster than one to have been of use.
GAIN = 1.1
# The variable and the value of the curves of each sweep, and what its table is headed by.
SWEEPS = {"length": ("k", "copy_ratio"), "threads": ("threads", "speedup"), "size": ("size", "speedup")}
TITLES = {
    "length": "Rows of k entries: times as multiples of a copy by one thread",
    "threads": "Threads: how many times faster than one",
    "size": "Entries of the array: how many times faster all threads are than one",
}
LAYOUTS = ["rows", "columns", "vector"]
MARKERS = "os^"

Row = dict[str, Any]


class Measurement(NamedTuple):
    """One array, of about `size` entries, timed with each of some numbers of threads."""

    sweep: str
    layout: str
    size: int
    case: Case
    threads: list[int]


def lengths_up_to(largest: int) -> list[int]:
    """Return the powers of 10**(1/4), rounded."""
    powers = (round(10 ** (i / 4)) for i in itertools.count())
    return list(dict.fromkeys(itertools.takewhile(lambda k: k <= largest, powers)))


def lay_out(layout: str, size: int) -> tuple[tuple[int, ...], int]:
    """Return a shape of about `size` entries, and the axis of its slices."""
    slices = max(1, round(size / LENGTH))
    if layout == "vector":
        return (size,), 0
    return ((slices, LENGTH), 1) if layout == "rows" else ((LENGTH, slices), 0)


def make_plans(lengths: Sequence[int], total: int, threads: int) -> list[Measurement]:
    """Return what is measured: the three sweeps in turn."""
    ends = sorted({1, threads})
    sizes = [size for size in SIZES if size <= total]
    plans = []
    for dtype in WIDE:
        for k in lengths:
            case = Case("softmax", (max(1, total // k), k), 1, dtype)
            plans.append(Measurement("length", "rows", max(total, k), case, ends))
        for layout in LAYOUTS:
            case = Case("softmax", *lay_out(layout, total), dtype)
            plans.append(Measurement("threads", layout, total, case, list(range(1, threads + 1))))
        for layout, size in itertools.product(LAYOUTS, sizes):
            case = Case("softmax", *lay_out(layout, size), dtype)
            plans.append(Measurement("size", layout, size, case, ends))
    return plans


def measure(plans: Sequence[Measurement], rounds: int, duration: float) -> list[Row]:
    """Return a row per array and number of threads, with a progress bar over the entries."""
    rows = []
    with tqdm(total=sum(math.prod(plan.case.shape) for plan in plans), unit="entry", unit_scale=True) as bar:
        for plan in plans:
            bar.set_description(f"{plan.sweep}: {show_case(plan.case)}")
            times, copies = time_softmax(plan, rounds, duration)
            k = plan.case.shape[plan.case.axis]
            for threads, seconds in times.items():
                row = {"sweep": plan.sweep, "layout": plan.layout, "dtype": plan.case.dtype}
                row |= {"shape": show_shape(plan.case.shape), "k": k, "size": plan.size, "threads": threads}
                row |= compare_with_copy(seconds, copies)
                rows.append(row | {"speedup": median_ratio(times[1], seconds)})
            bar.update(math.prod(plan.case.shape))
    return rows


def time_softmax(
    plan: Measurement, rounds: int, duration: float
) -> tuple[dict[int, list[float]], list[float]]:
    """Return the seconds per call by number of threads, and those of a copy, a value per round."""
    task = make_task(plan.case, max(plan.threads))
    softmax, copy = call_fastmax(task), call_copy(task)
    calls = {}
    for threads in plan.threads:
        numba.set_num_threads(threads)
        check(task, softmax())
        calls[threads] = count_calls(softmax, duration)
    # From here on the copy and the results take turns in one array.
    copy_calls = count_calls(copy, duration)
    times, copies = {threads: [] for threads in plan.threads}, []
    for _ in range(rounds):
        copies.append(seconds_per_call(copy, copy_calls))
        for threads in plan.threads:
            numba.set_num_threads(threads)
            times[threads].append(seconds_per_call(softmax, calls[threads]))
    return times, copies


def curves(rows: Sequence[Row], sweep: str) -> dict[tuple[Any, str], list[Row]]:
    """Return the rows of a sweep by what tells them apart, beside the dtype: threads or layout."""
    most = max(row["threads"] for row in rows)
    apart = "threads" if sweep == "length" else "layout"
    groups: dict[tuple[Any, str], list[Row]] = {}
    for row in rows:
        if row["sweep"] == sweep and (sweep != "size" or row["threads"] == most):
            groups.setdefault((row[apart], row["dtype"]), []).append(row)
    return groups


def name_curve(key: tuple[Any, str]) -> str:
    """Return the name of a curve in tables and legends."""
    first, dtype = key
    if isinstance(first, int):
        first = "1 thread" if first == 1 else f"{first} threads"
    return f"{first}, {dtype}"


def show_sweep(title: str, groups: dict[tuple[Any, str], list[Row]], variable: str, value: str) -> None:
    """Print the curves of a sweep as columns."""
    table: dict[int, Row] = {}
    for key, rows in groups.items():
        for row in rows:
            table.setdefault(row[variable], {variable: str(row[variable])})[name_curve(key)] = row[value]
    if table:
        show_table(title, list(table.values()), "{:.2f}".format)


def largest_step(rows: Sequence[Row]) -> str:
    """Say between which neighbouring lengths the time per entry differs most."""
    steps = []
    for before, after in itertools.pairwise(sorted(rows, key=lambda row: row["k"])):
        factor = after["copy_ratio"] / before["copy_ratio"]
        steps.append((max(factor, 1 / factor), factor, before["k"], after["k"]))
    if not steps:
        return "only one length"
    _, factor, before, after = max(steps)
    return f"times {factor:.2f} from k = {before} to k = {after}"


def gains_from(rows: Sequence[Row]) -> str:
    """Say from what size on all threads are faster than one."""
    first = None
    for row in sorted(rows, key=lambda row: row["size"], reverse=True):
        if row["speedup"] < GAIN:
            break
        first = row["size"]
    return f"from {first} entries" if first else "at no size"


def draw_curves(ax: Axes, groups: dict[tuple[Any, str], list[Row]], variable: str, value: str) -> None:
    """Draw the curves of a sweep: float32 filled, float64 hollow."""
    apart = list(dict.fromkeys(first for first, _ in groups))
    for (first, dtype), rows in groups.items():
        i = apart.index(first)
        ax.plot(
            [row[variable] for row in rows],
            [row[value] for row in rows],
            color=f"C{i}",
            linestyle="-" if dtype == "float32" else "--",
            linewidth=1.2,
            marker=MARKERS[i],
            markersize=6,
            markerfacecolor=f"C{i}" if dtype == "float32" else "white",
            label=name_curve((first, dtype)),
        )


def draw_scaling(rows: Sequence[Row]) -> Figure:
    """Draw the three sweeps."""
    figure, axes = plt.subplot_mosaic([["length", "length"], ["threads", "size"]], figsize=(12.5, 9))
    for name, (variable, value) in SWEEPS.items():
        ax = axes[name]
        draw_curves(ax, curves(rows, name), variable, value)
        ax.axhline(1.0, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        if variable != "threads":
            ax.set_xscale("log")
    length, threads, size = (axes[name] for name in SWEEPS)
    length.set_yscale("log")
    length.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    length.yaxis.set_major_formatter("{x:g}")
    length.yaxis.set_minor_locator(NullLocator())
    length.set(xlabel="entries of a row, $k$", ylabel="time / time of a copy by one thread")
    length.legend(ncols=2)
    threads.xaxis.set_major_locator(MaxNLocator(integer=True))
    threads.set(xlabel="threads", ylabel="time of one thread / time")
    size.set(xlabel="entries of the array", ylabel="time of one thread / time of all")
    threads.legend(loc="lower right")
    for ax in (threads, size):
        ax.set_ylim(bottom=0.0)
    figure.align_ylabels([length, threads])
    return figure


def make_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=whole_number,
        metavar="K",
        help="lengths of the rows, as in --lengths 31 32 33 (default: powers of 10**(1/4), rounded)",
    )
    parser.add_argument(
        "--largest",
        type=whole_number,
        default=LARGEST,
        metavar="K",
        help=f"last of the lengths, if --lengths does not name them (default: {LARGEST})",
    )
    parser.add_argument(
        "--total",
        type=whole_number,
        default=TOTAL,
        metavar="N",
        help=f"entries of an array, unless one row has more (default: {TOTAL})",
    )
    add_timing_options(parser)
    add_output_options(parser)
    return parser


def main() -> None:
    """Print the curves, write them and the figure, and say which files were written."""
    parser = make_parser()
    arguments = parser.parse_args()
    make_output_folder(parser, arguments.output)
    use_style()
    lengths = sorted(set(arguments.lengths or lengths_up_to(arguments.largest)))
    plans = make_plans(lengths, arguments.total, arguments.threads)
    rows = measure(plans, arguments.rounds, arguments.duration)
    for sweep, (variable, value) in SWEEPS.items():
        show_sweep(TITLES[sweep], curves(rows, sweep), variable, value)
    print("\nlargest step of the time per entry between neighbouring lengths:")
    for key, own in curves(rows, "length").items():
        print(f"  {name_curve(key)}: {largest_step(own)}")
    print(f"\nall {arguments.threads} threads are {GAIN - 1:.0%} faster than one:")
    for key, own in curves(rows, "size").items():
        print(f"  {name_curve(key)}: {gains_from(own)}")

    comments = header(["numpy", "numba"])
    comments.append(f"threads: {arguments.threads}, rounds: {arguments.rounds}")
    report([write_table(arguments.output / "scaling_cpu.csv", comments, rows)])
    report(save(draw_scaling(rows), arguments.output / "scaling_cpu", arguments.format))


if __name__ == "__main__":
    main()
