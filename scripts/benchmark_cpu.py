"""Time fastmax, NumPy, SciPy, PyTorch, ONNX Runtime and JAX on a CPU, beside a copy of the array.

Every library works in a process of its own and in turns with the others, one at a time, so that what
slows the machine down slows all of them; ratios are formed within a round of turns. A result is
checked against the definition in float64 before it is timed. Writes benchmark_cpu.csv, with a row
per case and library, and benchmark_cpu.png and .svg: times as multiples of a copy by one thread. With
--learning it times losses with gradients, and temperatures fitted and solved for, beside PyTorch, Optax and
scikit-learn instead, and writes benchmark_learning.csv.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from contenders import (
    APART,
    CONTENDERS,
    COPIES,
    ENTRIES_APART,
    FUNCTIONS,
    LIMITS,
    MASKED,
    PER_ROW,
    PLAIN,
    RATIOS,
    SEED,
    TOLERANCE,
    WIDE,
    Case,
    Contender,
    add_timing_options,
    compare_with_copy,
    median_ratio,
    prepare,
    serve,
    show_case,
    show_shape,
)
from drawing import add_output_options, make_output_folder, report, save, use_style
from learners import CASES as LEARNING_CASES
from learners import ERRORS, LEARNERS
from learners import prepare as prepare_learning
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import header, show_table, write_table
from tqdm import tqdm

SHAPES = [
    ((3,), 0),
    ((32, 10), 1),
    ((1024, 64), 1),
    ((8192, 1000), 1),
    ((1000, 8192), 0),
    ((10, 10**6), 0),
    ((10**6, 3), 0),
    ((10**6, 10), 1),
    ((512, 32000), 1),
    ((64, 128256), 1),
    ((10**7,), 0),
]
# What else softmax is timed with: temperatures, a mask, arrays cut out of others, and the narrow types.
VARIANTS = {
    (32, 10): [ENTRIES_APART],
    (8192, 1000): [*LIMITS, PER_ROW, MASKED, *APART],
    (1000, 8192): [MASKED],
    (64, 128256): [PER_ROW],
}
NARROW_SHAPE = (8192, 1000)
# What ratios are formed with, so these always take part.
ALWAYS = ("fastmax", "copy")
# Seconds between two turns. After the last call the threads of OpenMP spin for 8 ms, those of ONNX
# Runtime for 45 ms, and would take a core from whoever comes next.
PAUSE = 0.06
# What sets the number of threads of Numba, OpenMP, MKL, OpenBLAS and XLA when they are loaded.
VARIABLES = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
# In the order of the contenders.
MARKERS = "os^DvP|"
SIZES = [9, 6, 7, 6, 7, 8, 9]
VARIANT_LABELS = {"T = 0": "$T = 0$", "T = inf": r"$T = \infty$", PER_ROW: "$T$ per row"}

Row = dict[str, Any]


def make_cases() -> list[Case]:
    """Return all cases in the order of the table."""
    cases = []
    for function in FUNCTIONS:
        for shape, axis in SHAPES:
            varied = VARIANTS.get(shape, []) if function == "softmax" else []
            for variant in [PLAIN, *varied]:
                narrow = varied and (shape, variant) == (NARROW_SHAPE, PLAIN)
                cases += [Case(function, shape, axis, d, variant) for d in (TOLERANCE if narrow else WIDE)]
    return cases


def is_installed(contender: Contender) -> bool:
    """Whether a contender has what it needs."""
    return all(importlib.util.find_spec(package) for package in contender.packages)


@contextlib.contextmanager
def workers(
    names: Sequence[str], threads: int, duration: float, prepare: Callable[..., Any] = prepare
) -> Iterator[dict[str, Connection]]:
    """Start a process per contender, and end them all when the work is done."""
    os.environ.update(dict.fromkeys(VARIABLES, str(threads)))
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for name in names:
            connections[name], theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, name, threads, duration, prepare), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
        yield connections
    finally:
        for process in processes:
            process.terminate()
            process.join()


def ask(name: str, connection: Connection, case: Case, turn: bool) -> Any:
    """Return the answer of a contender, or raise the error that it met."""
    try:
        connection.send((case, turn))
        answer = connection.recv()
    except (EOFError, OSError):
        raise RuntimeError(f"{name}, {show_case(case)}: its process has died") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def measure(
    cases: Sequence[Case], connections: dict[str, Connection], rounds: int
) -> Iterator[tuple[Case, dict[str, list[float]]]]:
    """Yield every case with the seconds per call of its contenders, a value per round."""
    rng = np.random.default_rng(SEED)
    with tqdm(total=len(cases) * rounds, unit="round") as bar:
        for case in cases:
            bar.set_description(show_case(case))
            times = {name: [] for name in connections if CONTENDERS[name].takes_part(case)}
            for name in times:
                ask(name, connections[name], case, turn=False)
            for _ in range(rounds):
                # Another order in every round, so that none always has the same one before it.
                for name in rng.permutation(list(times)):
                    time.sleep(PAUSE)
                    times[name].append(ask(name, connections[name], case, turn=True))
                bar.update()
            yield case, times


def summarise(case: Case, times: dict[str, list[float]]) -> list[Row]:
    """Return a row per contender."""
    rows = []
    for name, seconds in times.items():
        row = case._asdict() | {"shape": show_shape(case.shape), "contender": name}
        row |= compare_with_copy(seconds, times["copy"])
        rows.append(row | {"fastmax_ratio": median_ratio(times["fastmax"], seconds)})
    return rows


def compare(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """Return the line of the printed table for the rows of one case."""
    first = rows[0]
    line: Row = {"case": f"{first['function']} {first['shape']}", "axis": str(first["axis"])}
    line |= {"dtype": first["dtype"], "variant": first["variant"]}
    by_name = {row["contender"]: row for row in rows}
    line |= {name: by_name[name]["copy_ratio"] if name in by_name else "" for name in names if name != "copy"}
    line["copy, s"] = by_name["copy"]["seconds"]
    peers = [row for row in rows if row["contender"] not in (*ALWAYS, *COPIES)]
    best = min(peers, key=lambda row: row["seconds"], default=None)
    line["fastmax / best peer"] = best["fastmax_ratio"] if best else ""
    return line | {"best peer": best["contender"] if best else ""}


def show_number(value: float) -> str:
    """Write a number with 3 digits."""
    return f"{value:.3g}"


def show_count(count: str) -> str:
    """Write a size as math text, large powers of ten as such."""
    power = len(count) - 1
    return f"10^{{{power}}}" if power > 4 and int(count) == 10**power else count


def label(row: Row) -> str:
    """Name a case in a figure; softmax at T = 1 goes without saying."""
    parts = ["$" + r" \times ".join(map(show_count, row["shape"].split("x"))) + "$", f"axis {row['axis']}"]
    if row["function"] != "softmax":
        parts.insert(0, row["function"])
    if row["variant"] != PLAIN:
        parts.append(VARIANT_LABELS.get(row["variant"], str(row["variant"])))
    return ", ".join(parts)


def draw_panel(ax: Axes, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Draw the times of one dtype, a line per case, with their quartiles; return the cases' labels."""
    labels = list(dict.fromkeys(map(label, rows)))
    for i in range(0, len(labels), 2):
        ax.axhspan(i - 0.5, i + 0.5, color="0.95", linewidth=0, zorder=0)
    ax.axvline(1.0, color="black", linewidth=0.9, zorder=1, label=CONTENDERS["copy"].title)
    for i, name in enumerate(names):
        own = [row for row in rows if row["contender"] == name]
        # Below one another, so that one marker does not hide another.
        shift = 0.75 * ((i + 0.5) / len(names) - 0.5)
        places = [labels.index(label(row)) + shift for row in own]
        middle, low, high = ([row[key] for row in own] for key in RATIOS)
        style = list(CONTENDERS).index(name)
        ax.hlines(places, low, high, color=f"C{style}", linewidth=1, zorder=2)
        ax.plot(
            middle,
            places,
            color=f"C{style}",
            linestyle="none",
            marker=MARKERS[style],
            markersize=SIZES[style],
            markeredgewidth=2 if name in COPIES else 0,
            label=CONTENDERS[name].title,
            zorder=3,
        )
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    return labels


def draw_times(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Draw the times as multiples of a copy by one thread, a panel per dtype."""
    by_dtype = {d: [row for row in rows if row["dtype"] == d] for d in TOLERANCE}
    panels = {dtype: drawn for dtype, drawn in by_dtype.items() if drawn}
    columns = min(2, len(panels))
    counts = [len(set(map(label, drawn))) for drawn in panels.values()]
    heights = [max(counts[i : i + columns]) for i in range(0, len(counts), columns)]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(2.5 + 5 * columns, 1.5 + 0.6 * len(heights) + 0.42 * sum(heights)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    before: list[str] = []
    for i, (ax, (dtype, drawn)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        labels = draw_panel(ax, drawn, [name for name in names if name != "copy"])
        ax.set_title(dtype)
        ax.tick_params(labelleft=i % columns == 0 or labels != before)
        before = labels
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    axes[0, 0].set_xscale("log")
    axes[0, 0].xaxis.set_major_formatter("{x:g}")
    xlabel = "time / time of a copy by one thread (medians and quartiles)"
    figure.supxlabel(xlabel, fontsize=plt.rcParams["axes.labelsize"])
    handles, titles = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside upper center", ncols=4)
    return figure


def add_choices(
    parser: argparse.ArgumentParser,
    option: str,
    choices: Sequence[str],
    default: Sequence[str],
    note: str = "",
) -> None:
    """Add an option of which some values can be chosen."""
    preset = "all" if len(default) == len(choices) else " ".join(default)
    parser.add_argument(
        option,
        nargs="+",
        choices=choices,
        default=default,
        metavar=option.removeprefix("--").removesuffix("s").upper(),
        help=f"some of {' '.join(choices)} (default: {preset}{note})",
    )


def make_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    shapes = [show_shape(shape) for shape, _ in SHAPES]
    add_choices(parser, "--functions", FUNCTIONS, ["softmax"])
    add_choices(parser, "--shapes", shapes, shapes)
    add_choices(parser, "--dtypes", list(TOLERANCE), list(TOLERANCE))
    add_choices(
        parser, "--contenders", list(CONTENDERS), list(CONTENDERS), "; fastmax and copy are always timed"
    )
    parser.add_argument(
        "--learning",
        nargs="*",
        choices=list(ERRORS),
        metavar="FUNCTION",
        help=f"time these instead, of {' '.join(ERRORS)} (all if none is named)",
    )
    add_timing_options(parser)
    add_output_options(parser)
    return parser


def measure_learning(cases: Sequence[Case], connections: dict[str, Connection], rounds: int) -> list[Row]:
    """Return a row for every case and library: times, their ratio to those of fastmax, and the error."""
    rows = []
    rng = np.random.default_rng(SEED)
    for case in tqdm(cases, unit="case"):
        names = [name for name in connections if case.function in LEARNERS[name].functions]
        errors = {name: ask(name, connections[name], case, turn=False) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in rng.permutation(names):
                time.sleep(PAUSE)
                times[name].append(ask(name, connections[name], case, turn=True))
        for name in names:
            seconds = np.array(times[name])
            low, high = np.percentile(seconds, [25, 75]).tolist()
            row = {"function": case.function, "shape": show_shape(case.shape), "axis": case.axis}
            row |= {"dtype": case.dtype, "contender": name, "seconds": float(np.median(seconds))}
            row |= {"seconds_q1": low, "seconds_q3": high}
            row |= {"fastmax_ratio": median_ratio(times["fastmax"], times[name])}
            rows.append(row | {"error": float(errors[name]), "unit of error": ERRORS[case.function]})
    return rows


def run_learning(arguments: argparse.Namespace) -> None:
    """Time what `learners` lists, print the table and write it."""
    functions = arguments.learning or list(ERRORS)
    cases = [case for case in LEARNING_CASES if case.function in functions]
    names = [name for name in LEARNERS if is_installed(LEARNERS[name])]
    with workers(names, arguments.threads, arguments.duration, prepare_learning) as connections:
        rows = measure_learning(cases, connections, arguments.rounds)
    show_table("Times in seconds, and fastmax's as a share of them (medians)", rows, show_number)
    packages = sorted({package for name in names for package in LEARNERS[name].packages})
    comments = header([package.replace("sklearn", "scikit-learn") for package in packages])
    comments.append(f"threads: {arguments.threads}, rounds: {arguments.rounds}")
    path = arguments.output / "benchmark_learning.csv"
    report([write_table(path, comments, rows)])


def main() -> None:
    """Print the table, write it and the figure, and say which files were written."""
    parser = make_parser()
    arguments = parser.parse_args()
    make_output_folder(parser, arguments.output)
    if arguments.learning is not None:
        for option in ("functions", "shapes", "dtypes", "contenders"):
            if (given := getattr(arguments, option)) != parser.get_default(option):
                parser.error(f"argument --{option}: {' '.join(given)} has no part in --learning")
        run_learning(arguments)
        return
    use_style()
    cases = [
        case
        for case in make_cases()
        if case.function in arguments.functions
        and show_shape(case.shape) in arguments.shapes
        and case.dtype in arguments.dtypes
    ]
    if not cases:
        shapes, dtypes = " ".join(arguments.shapes), " ".join(arguments.dtypes)
        parser.error(f"argument --dtypes: nothing is timed with {dtypes} on the shapes {shapes}")
    chosen = [name for name in CONTENDERS if name in (*arguments.contenders, *ALWAYS)]
    names = [name for name in chosen if is_installed(CONTENDERS[name])]
    if names != chosen:
        print("not installed, so left out:", *(name for name in chosen if name not in names))

    with workers(names, arguments.threads, arguments.duration) as connections:
        measured = [summarise(case, times) for case, times in measure(cases, connections, arguments.rounds)]
    rows = [row for of_case in measured for row in of_case]
    title = "Times as multiples of a copy by one thread (medians)"
    show_table(title, [compare(of_case, names) for of_case in measured], show_number)
    packages = sorted({package for name in names for package in CONTENDERS[name].packages})
    comments = header(packages)
    comments.append(f"threads: {arguments.threads}, rounds: {arguments.rounds}")
    report([write_table(arguments.output / "benchmark_cpu.csv", comments, rows)])
    figure = draw_times(rows, names)
    report(save(figure, arguments.output / "benchmark_cpu", arguments.format))


if __name__ == "__main__":
    main()
