"""Draw softmax(r / T) against the temperature T, with its two limits, for one or more vectors r.

For every vector: a figure of each coordinate of sigma_T(r) = softmax(r / T) against T, from far
below to far above the gaps in r, and the curves as CSV, the limits T = 0 and T = inf included. For
the vectors of three coordinates also one figure of the paths that sigma_T(r) takes through the
simplex, from its centre at T = inf to a vertex, or to the middle of an edge for a tie, at T = 0.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from drawing import add_output_options, make_output_folder, report, save, use_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fastmax

DOCUMENT_VECTORS = [[1.0, 2.0, 3.0], [1.0, 3.0, 3.0]]
COUNT = 301
GREY = "0.35"
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
# The corners of the simplex as drawn: coordinates 1 and 2 at the foot, 3 at the top.
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])


def number(value: float) -> str:
    """Write a number as short as it can be read back."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(float(value))


def vector_name(vector: np.ndarray) -> str:
    """Write a vector as mathematics does."""
    return "(" + ", ".join(number(value) for value in vector) + ")"


def vector_equation(vector: np.ndarray) -> str:
    """Write "r = ..." as math text; the braces keep a minus sign close to its number."""
    return f"$r = {vector_name(vector).replace('-', '{-}')}$"


def temperature_range(vector: np.ndarray) -> tuple[float, float]:
    """Temperatures two decades below the least gap to the maximum and two above the largest."""
    gaps = vector.max() - vector
    gaps = gaps[gaps > 0]
    if not gaps.size:
        return 0.01, 100.0
    low = max(-300, math.floor(math.log10(gaps.min())) - 2)
    high = min(300, math.ceil(math.log10(gaps.max())) + 2)
    return 10.0 ** min(low, 296), 10.0 ** max(high, -296)


def sweep(vector: np.ndarray, low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the temperatures 0, `low` ... `high`, inf and the probabilities, a row for each."""
    temperatures = np.concatenate([[0.0], np.geomspace(low, high, count), [np.inf]])
    return temperatures, fastmax.softmax(vector, temperatures, axis=-1)


def write_curves(path: Path, temperatures: np.ndarray, probs: np.ndarray) -> Path:
    """Write one row per temperature: 12 digits, so that no machine's last bit shows."""
    header = ",".join(["temperature", *(f"sigma_{i + 1}" for i in range(probs.shape[1]))])
    table = np.column_stack([temperatures, probs])
    np.savetxt(path, table, fmt="%.12g", delimiter=",", header=header, comments="")
    return path


def coordinate_label(indices: Sequence[int], value: float) -> str:
    """Name the coordinates that share a value, as math text."""
    sigmas = " = ".join(rf"\sigma_T(r)_{i + 1}" for i in indices)
    entries = " = ".join(f"r_{i + 1}" for i in indices)
    return rf"${sigmas}$   (${entries} = {number(value)}$)"


def draw_limits(ax: Axes, positions: np.ndarray, vector: np.ndarray) -> None:
    """Draw the two limits as lines across the figure, each with its value.

    The text of a T = 0 line stands at the right, that of the T = inf line at the left: there the
    curves are at the other limit.
    """
    ties, size = int((vector == vector.max()).sum()), vector.size
    lines = [("0", 1 / ties, f"1/{ties}", "right"), (r"\infty", 1 / size, f"1/{size}", "left")]
    if ties < size:
        lines.append(("0", 0.0, "0", "right"))
    for temperature, level, value, side in lines:
        ax.axhline(level, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        text = rf"limit $T={temperature}$:  ${value if value != '1/1' else '1'}$"
        at = positions[-2] if side == "right" else positions[1]
        ax.annotate(text, (at, level), (0, 3), textcoords="offset points", ha=side, va="bottom", color=GREY)


def draw_curves(ax: Axes, positions: np.ndarray, probs: np.ndarray, vector: np.ndarray) -> None:
    """Draw a line per coordinate and a marker at each limit.

    Of those that coincide the earlier are wider, so that each is seen.
    """
    for i, value in enumerate(vector):
        later = probs[:, i + 1 :] == probs[:, [i]]
        (line,) = ax.plot(
            positions[1:-1],
            probs[1:-1, i],
            linewidth=2 + 3.5 * later.all(axis=0).sum(),
            label=coordinate_label([i], value),
            zorder=3,
        )
        for end, fill in [(0, line.get_color()), (-1, "white")]:
            ax.plot(
                positions[end],
                probs[end, i],
                "o",
                color=line.get_color(),
                markerfacecolor=fill,
                markersize=8 + 5 * later[end].sum(),
                clip_on=False,
                zorder=4,
            )


def label_curves(ax: Axes, positions: np.ndarray, probs: np.ndarray, vector: np.ndarray) -> None:
    """Label each curve where it is on its way from one limit to the other.

    The highest is labelled above, the lowest below, one between them to its left: always on the
    side where no other curve runs. Where there are more, or T does not range that far, a legend is
    drawn instead.
    """
    values = np.unique(vector)
    curves = [probs[1:-1, np.argmax(vector == value)] for value in values]
    halfway = (probs[0].max() + probs[-1].max()) / 2
    levels = np.append(np.full(values.size - 1, 0.45 * probs[-1].max()), halfway)
    crossed = [c.min() < level < c.max() for c, level in zip(curves, levels, strict=True)]
    if values.size > 3 or not all(crossed):
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return
    places = [((10, -6), "left", "top"), ((-9, 3), "right", "bottom"), ((9, 5), "left", "bottom")]
    if values.size == 2:
        del places[1]
    for i, (offset, side, height) in enumerate(places):
        nearest = int(np.argmin(np.abs(curves[i] - levels[i])))
        ax.annotate(
            coordinate_label(np.flatnonzero(vector == values[i]).tolist(), values[i]),
            (positions[1 + nearest], curves[i][nearest]),
            offset,
            textcoords="offset points",
            ha=side,
            va=height,
        )


def axis_positions(temperatures: np.ndarray) -> np.ndarray:
    """Return log10(T), with places for T = 0 and T = inf a little beyond the others."""
    positions = np.log10(temperatures[1:-1])
    beyond = 0.07 * (positions[-1] - positions[0])
    return np.concatenate([[positions[0] - beyond], positions, [positions[-1] + beyond]])


def draw_temperature_axis(ax: Axes, positions: np.ndarray) -> None:
    """Label the decades of T, and beyond a break in the axis T = 0 and T = inf."""
    decades = np.arange(math.ceil(positions[1] - 1e-9), math.floor(positions[-2] + 1e-9) + 1)
    decades = decades[:: max(1, math.ceil(decades.size / 8))]
    names = ["$0$", *(f"$10^{{{decade}}}$" for decade in decades), r"$\infty$"]
    ax.set_xticks([positions[0], *decades, positions[-1]], names)
    margin = 0.35 * (positions[1] - positions[0])
    ax.set_xlim(positions[0] - margin, positions[-1] + margin)
    for middle in (positions[:2].mean(), positions[-2:].mean()):
        ax.text(
            middle,
            0,
            "//",
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="center",
            bbox=HALO,
        )


def draw_sweep(temperatures: np.ndarray, probs: np.ndarray, vector: np.ndarray) -> Figure:
    """Draw every coordinate of sigma_T(r) against T."""
    positions = axis_positions(temperatures)
    figure, ax = plt.subplots(figsize=(8, 4.6))
    draw_temperature_axis(ax, positions)
    draw_limits(ax, positions, vector)
    draw_curves(ax, positions, probs, vector)
    label_curves(ax, positions, probs, vector)
    top = probs.max()
    ax.set(ylim=(-0.06 * top, 1.1 * top), xlabel="temperature  $T$", ylabel=r"$\sigma_T(r)_i$")
    ax.set_title(rf"$\sigma_T(r) = \mathrm{{softmax}}(r/T)$  for  {vector_equation(vector)}", y=1.02)
    return figure


def annotate(ax: Axes, text: str, point: np.ndarray, offset: np.ndarray | Sequence[float], side: str) -> None:
    """Write a text that begins, ends or is centred at an offset in points from a place."""
    x, y = point
    ax.annotate(
        text,
        (x, y),
        (offset[0], offset[1]),
        textcoords="offset points",
        ha=side,
        va="center",
        bbox=HALO,
        zorder=2.5,
    )


def draw_triangle(ax: Axes) -> None:
    """Draw the simplex, its labelled corners, and the lines on which two coordinates are equal."""
    ax.plot(*CORNERS[[0, 1, 2, 0]].T, color="black", linestyle="-", linewidth=1.2, zorder=2)
    for i, name in enumerate(["(1, 0, 0)", "(0, 1, 0)", "(0, 0, 1)"]):
        middle = np.delete(CORNERS, i, axis=0).mean(axis=0)
        ax.plot(
            *np.stack([CORNERS[i], middle]).T,
            color="0.6",
            linestyle=(0, (1, 2)),
            linewidth=1,
            label="two coordinates equal" if i == 2 else None,
        )
        annotate(ax, name, CORNERS[i], (0, 14 if i == 2 else -14), "center")
    ax.set_aspect("equal")
    ax.axis("off")


def path_temperatures(vector: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the temperatures 1, 2, 5, 10, ... whose points on the path are well apart."""
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    candidates = np.outer(decades, [1, 2, 5]).ravel()
    candidates = candidates[(low <= candidates) & (candidates <= high)]
    points = fastmax.softmax(vector, np.append(candidates, [0.0, np.inf]), axis=-1) @ CORNERS
    chosen: list[int] = []
    for i, point in enumerate(points[:-2]):
        taken = np.vstack([points[chosen], points[-2:]])
        if np.hypot(*(taken - point).T).min() > 0.05:
            chosen.append(i)
    return candidates[chosen]


def draw_path(ax: Axes, vector: np.ndarray, probs: np.ndarray, ticks: np.ndarray) -> None:
    """Draw the path of one vector, with numbered ticks at some temperatures."""
    path = probs @ CORNERS
    (line,) = ax.plot(*path.T, linewidth=2.5, zorder=3, label=vector_equation(vector))
    ax.plot(*path[0], "o", color=line.get_color(), markersize=10, zorder=5, clip_on=False)
    # The numbers stand on the inner side of a bent path, at the right of a straight one.
    (ahead_x, ahead_y), (bend_x, bend_y) = path[0] - path[-1], (path - path[-1]).mean(axis=0)
    turn = 1.0 if ahead_x * bend_y - ahead_y * bend_x < -1e-9 else -1.0
    for temperature, at in zip(ticks, fastmax.softmax(vector, ticks, axis=-1), strict=True):
        # The derivative of sigma_T(r) with respect to 1 / T is sigma (r - sigma'r).
        along = (at * (vector - at @ vector)) @ CORNERS
        across = turn * np.array([-along[1], along[0]]) / np.hypot(*along)
        point = at @ CORNERS
        tick = np.stack([point - 0.012 * across, point + 0.012 * across]).T
        ax.plot(*tick, color=line.get_color(), linestyle="-", linewidth=1.5, zorder=4)
        side = "left" if across[0] > 0 else "right"
        annotate(ax, number(temperature), point, 11 * across, side)
    if np.count_nonzero(probs[0]) == 2:
        name = ", ".join(r"\frac{1}{2}" if prob else "0" for prob in probs[0])
        outward = path[0] - CORNERS.mean(axis=0)
        side = "left" if outward[0] > 0.01 else "right" if outward[0] < -0.01 else "center"
        annotate(ax, f"$({name})$", path[0], 70 * outward, side)


def draw_simplex(sweeps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """Draw the path of every (vector, temperatures, probs) through the simplex."""
    figure, ax = plt.subplots(figsize=(8, 6.4))
    draw_triangle(ax)
    for vector, temperatures, probs in sweeps:
        draw_path(ax, vector, probs, path_temperatures(vector, temperatures[1], temperatures[-2]))
    centre = CORNERS.mean(axis=0)
    end = {"linestyle": "none", "marker": "o", "markersize": 10, "color": "black"}
    tick = {**end, "marker": "|", "markersize": 12, "markeredgewidth": 1.5}
    ax.plot([], [], **tick, label="$T$ as numbered")
    ax.plot([], [], **end, label="$T = 0$")
    ax.plot(*centre, **end, markerfacecolor="white", zorder=6, label=r"$T = \infty$")
    annotate(ax, r"$(\frac{1}{3}, \frac{1}{3}, \frac{1}{3})$", centre, (-12, -2), "right")
    ax.legend(loc="upper left", bbox_to_anchor=(-0.12, 1.0))
    ax.set_title(r"$\sigma_T(r) = \mathrm{softmax}(r/T)$ in the simplex", loc="center")
    return figure


def make_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    # argparse takes -1e3 for an option: it knows no exponents.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.add_argument(
        "--vector",
        nargs="+",
        type=float,
        action="append",
        metavar="R",
        help="entries of r, as in --vector 1 2 3; give it again for another vector "
        "(default: 1 2 3 and 1 3 3)",
    )
    parser.add_argument(
        "--temperatures",
        nargs=3,
        type=float,
        metavar=("LOW", "HIGH", "COUNT"),
        help="COUNT temperatures from LOW to HIGH in equal ratios, 0 and inf always added "
        f"(default: {COUNT}, from far below to far above the gaps between the entries)",
    )
    add_output_options(parser)
    return parser


def check_vectors(parser: argparse.ArgumentParser, vectors: list[list[float]]) -> list[np.ndarray]:
    """Stop with a message where a vector cannot be drawn."""
    most = len(mpl.rcParams["axes.prop_cycle"])
    for vector in vectors:
        shown = " ".join(number(value) if math.isfinite(value) else str(value) for value in vector)
        if not math.isfinite(max(vector) - min(vector)) or math.isnan(sum(vector)):
            parser.error(f"argument --vector: entries and their gaps must be finite, got {shown}")
        if len(vector) > most:
            parser.error(f"argument --vector: at most {most} entries, got {len(vector)}")
        if vectors.count(vector) > 1:
            parser.error(f"argument --vector: {shown} is given twice")
    return [np.array(vector) for vector in vectors]


def check_temperatures(parser: argparse.ArgumentParser, values: Sequence[float]) -> None:
    """Stop with a message where LOW, HIGH and COUNT make no sweep."""
    low, high, count = values
    if not 0 < low < math.inf:
        parser.error(f"argument --temperatures: LOW must be positive and finite, got {low}")
    if not low < high < math.inf:
        parser.error(f"argument --temperatures: HIGH must be finite and above LOW = {low}, got {high}")
    if not (count >= 2 and count.is_integer()):
        parser.error(f"argument --temperatures: COUNT must be an integer from 2, got {count:g}")


def main() -> None:
    """Draw the figures and say which files were written."""
    parser = make_parser()
    arguments = parser.parse_args()
    use_style()
    vectors = check_vectors(parser, arguments.vector or DOCUMENT_VECTORS)
    if arguments.temperatures:
        check_temperatures(parser, arguments.temperatures)
    make_output_folder(parser, arguments.output)

    sweeps = []
    for vector in vectors:
        low, high, count = arguments.temperatures or (*temperature_range(vector), COUNT)
        temperatures, probs = sweep(vector, low, high, int(count))
        name = "_".join(["temperature_sweep", *(number(value) for value in vector)])
        report([write_curves(arguments.output / f"{name}.csv", temperatures, probs)])
        figure = draw_sweep(temperatures, probs, vector)
        report(save(figure, arguments.output / name, arguments.format))
        plt.close(figure)
        if vector.size == 3:
            sweeps.append((vector, temperatures, probs))
        else:
            print(f"no simplex for {vector_name(vector)}: it is drawn for three coordinates only")
    if sweeps:
        report(save(draw_simplex(sweeps), arguments.output / "simplex", arguments.format))


if __name__ == "__main__":
    main()
