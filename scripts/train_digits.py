"""Train a classifier of handwritten digits by its cross entropy, then choose T so that it is calibrated.

The data are the 1797 digits of 8 x 8 pixels that come with scikit-learn, in three parts: a network of two
layers is trained on the first with `fastmax.cross_entropy_and_grad`, `fastmax.fit_temperature` finds T on the
second, and what is reported and drawn is measured on the third. All this is done for several divisions of
the digits, whose results are pooled: a part has few images that a network is not sure of. Writes figures of
the losses while it trains, of the reliability before and after calibration, and of the entropy against T,
with their data as CSV.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from drawing import add_output_options, make_output_folder, report, save, use_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from options import seed, whole_number
from sklearn.datasets import load_digits
from tables import header, show_table, write_table
from tqdm import tqdm

import fastmax

SHARES = (0.5, 0.2)  # trained on and fitted on; the rest is held out
HIDDEN = 64
BATCH = 64
STEP = 0.1
MOMENTUM = 0.9
BINS = 10
GREY = "0.35"

Row = dict[str, Any]


class Part(NamedTuple):
    """Some of the images, as rows of pixels between 0 and 1, and their digits."""

    pixels: np.ndarray
    labels: np.ndarray


class Network(NamedTuple):
    """Two layers, with a rectifier between them."""

    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray


class Reliability(NamedTuple):
    """For each bin of the highest probability: how many images, its mean, and the share that is right."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of the two."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.counts))


def split(rng: np.random.Generator) -> list[Part]:
    """Load the digits and divide them at random."""
    digits: Any = load_digits()
    order = rng.permutation(len(digits.target))
    ends = (np.cumsum(SHARES) * len(order)).astype(int)
    return [Part(digits.data[part] / 16.0, digits.target[part]) for part in np.split(order, ends)]


def start(rng: np.random.Generator, pixels: int, classes: int) -> Network:
    """Draw the weights of a network."""
    first = rng.normal(scale=math.sqrt(2 / pixels), size=(pixels, HIDDEN))
    second = rng.normal(scale=math.sqrt(1 / HIDDEN), size=(HIDDEN, classes))
    return Network(first, np.zeros(HIDDEN), second, np.zeros(classes))


def apply(network: Network, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the hidden layer gives, and the logits, a row per image."""
    hidden = np.maximum(pixels @ network.first + network.first_bias, 0.0)
    return hidden, hidden @ network.second + network.second_bias


def gradient(network: Network, part: Part) -> tuple[float, Network]:
    """Return the mean loss, and its derivatives by the weights."""
    hidden, logits = apply(network, part.pixels)
    loss, by_logits = fastmax.cross_entropy_and_grad(logits, part.labels, axis=1)
    by_hidden = (by_logits @ network.second.T) * (hidden > 0)
    return float(loss), Network(
        part.pixels.T @ by_hidden, by_hidden.sum(axis=0), hidden.T @ by_logits, by_logits.sum(axis=0)
    )


def train(
    network: Network, part: Part, held_out: Part, epochs: int, rng: np.random.Generator, bar: tqdm
) -> tuple[Network, list[Row]]:
    """Descend along the gradient with momentum; return the network and the losses of each epoch."""
    speed = Network(*(np.zeros_like(weights) for weights in network))
    history = []
    for epoch in range(1, epochs + 1):
        losses = []
        order = rng.permutation(len(part.labels))
        for chosen in np.split(order, range(BATCH, len(order), BATCH)):
            loss, slope = gradient(network, Part(part.pixels[chosen], part.labels[chosen]))
            losses.append(loss * len(chosen))
            speed = Network(*(MOMENTUM * v - STEP * g for v, g in zip(speed, slope, strict=True)))
            network = Network(*(w + v for w, v in zip(network, speed, strict=True)))
        _, logits = apply(network, held_out.pixels)
        loss = float(fastmax.cross_entropy(logits, held_out.labels, axis=1))
        history.append({"epoch": epoch, "training": sum(losses) / len(order), "held out": loss})
        bar.update()
    return network, history


def measure(logits: np.ndarray, labels: np.ndarray, temperature: np.ndarray) -> Reliability:
    """Compare the highest probabilities with how often they are right, in bins of equal width."""
    probs = fastmax.softmax(logits, temperature, axis=1)
    confidence = probs.max(axis=1)
    right = probs.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    some = counts > 0
    means = [np.bincount(bins, values, BINS)[some] / counts[some] for values in (confidence, right)]
    return Reliability(counts[some], *means)


def draw_losses(history: Sequence[Row]) -> Figure:
    """Draw the loss of the parts against the epoch."""
    figure, ax = plt.subplots(figsize=(8, 4.2))
    epochs = [row["epoch"] for row in history]
    for name in ("training", "held out"):
        losses = [row[name] for row in history]
        (line,) = ax.plot(epochs, losses)
        ax.annotate(
            name,
            (epochs[-1], losses[-1]),
            (6, 0),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
        )
    ax.set(yscale="log", xlabel="epoch", ylabel="cross entropy, nats")
    ax.set_title("Training on handwritten digits")
    return figure


def draw_panel(ax: Axes, reliability: Reliability, title: str) -> None:
    """Draw the share that is right against the probability; a larger marker stands for more images."""
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    ax.vlines(reliability.confidence, reliability.confidence, reliability.accuracy, color="C3", linewidth=1.5)
    sizes = 25 + 300 * reliability.counts / reliability.counts.sum()
    ax.scatter(
        reliability.confidence, reliability.accuracy, sizes, color="C0", zorder=3, clip_on=False, alpha=0.85
    )
    for x, y, count in zip(reliability.confidence, reliability.accuracy, reliability.counts, strict=True):
        above = y >= x
        ax.annotate(
            str(count),
            (x, y),
            (7, 6 if above else -6),
            textcoords="offset points",
            ha="left",
            va="bottom" if above else "top",
            fontsize=10,
            color=GREY,
        )
    ax.set(xlim=(0, 1.02), ylim=(0, 1.1), xlabel="highest probability, mean of a bin")
    ax.set_title(f"{title}\ncalibration error {100 * reliability.error:.2f} %")


def draw_reliability(before: Reliability, after: Reliability, temperatures: np.ndarray) -> Figure:
    """Draw the reliability at T = 1 and at the fitted T, side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 5), sharey=True)
    draw_panel(axes[0], before, "$T = 1$, as trained")
    draw_panel(axes[1], after, f"${show_range(temperatures)}$, fitted")
    axes[0].set_ylabel("share of images that is right")
    return figure


def show_range(temperatures: np.ndarray) -> str:
    """Write the fitted temperatures as math text."""
    low, high = (f"{value:.2f}" for value in (temperatures.min(), temperatures.max()))
    return f"T = {low}" if low == high else f"T = {low}$ to ${high}"


def draw_entropies(rows: Sequence[Row], fitted: np.ndarray, classes: int) -> Figure:
    """Draw the mean entropy and the cross entropy of the held-out part against T."""
    figure, ax = plt.subplots(figsize=(8, 4.6))
    temperatures = [row["temperature"] for row in rows]
    for name, place, offset, side in (
        ("entropy", 0.55, (-8, 2), "right"),
        ("cross entropy", 0.05, (6, 8), "left"),
    ):
        values = [row[name] for row in rows]
        (line,) = ax.plot(temperatures, values)
        at = int(place * len(values))
        ax.annotate(
            f"mean {name}",
            (temperatures[at], values[at]),
            offset,
            textcoords="offset points",
            ha=side,
            color=line.get_color(),
        )
    top = math.log(classes)
    ax.axhline(top, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    ax.annotate(
        rf"limit $T = \infty$:  $\log {classes}$",
        (temperatures[0], top),
        (4, -4),
        textcoords="offset points",
        va="top",
        color=GREY,
    )
    ax.axvspan(fitted.min(), fitted.max(), color="0.88", linewidth=0, zorder=0)
    ax.annotate(
        f"fitted ${show_range(fitted)}$",
        (fitted.min(), 0.6 * top),
        (-6, 0),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    ax.set(xscale="log", xlabel="temperature  $T$", ylabel="nats", ylim=(0, 1.15 * top))
    ax.set_title("Held-out digits: entropy of the probabilities, and cross entropy of the labels")
    return figure


def sweep(logits: np.ndarray, labels: np.ndarray) -> list[Row]:
    """Return the mean entropy and the cross entropy at temperatures from 0.1 to 100."""
    temperatures = np.geomspace(0.1, 100, 121)
    entropies = fastmax.entropy(logits, temperatures[:, None], axis=-1).mean(axis=1)
    losses = [float(fastmax.cross_entropy(logits, labels, t, axis=1)) for t in temperatures]
    rows = zip(temperatures.tolist(), entropies.tolist(), losses, strict=True)
    return [{"temperature": t, "entropy": h, "cross entropy": loss} for t, h, loss in rows]


def mean_row(rows: Sequence[Row]) -> Row:
    """Return the mean of each value over the divisions."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def tabulate(name: str, temperature: float, reliability: Reliability) -> list[Row]:
    """Return a row per bin."""
    return [
        {"probabilities": name, "mean T": temperature, "images": int(count), "confidence": c, "accuracy": a}
        for count, c, a in zip(*(values.tolist() for values in reliability), strict=True)
    ]


def make_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--epochs", type=whole_number, default=200, metavar="N", help="how long to train (default: 200)"
    )
    parser.add_argument(
        "--splits", type=whole_number, default=4, metavar="N", help="how many divisions (default: 4)"
    )
    parser.add_argument(
        "--seed", type=seed, default=1, metavar="N", help="seed of the divisions and the weights (default: 1)"
    )
    add_output_options(parser)
    return parser


def main() -> None:
    """Train, calibrate, draw, and say which files were written."""
    parser = make_parser()
    arguments = parser.parse_args()
    make_output_folder(parser, arguments.output)
    use_style()
    rng = np.random.default_rng(arguments.seed)
    histories, temperatures, held_logits, held_labels = [], [], [], []
    parts: list[Part] = []
    with tqdm(total=arguments.splits * arguments.epochs, unit="epoch") as bar:
        for _ in range(arguments.splits):
            parts = split(rng)
            trained, fitted_on, held_out = parts
            network = start(rng, trained.pixels.shape[1], int(trained.labels.max()) + 1)
            network, history = train(network, trained, held_out, arguments.epochs, rng, bar)
            _, logits = apply(network, fitted_on.pixels)
            temperatures.append(fastmax.fit_temperature(logits, fitted_on.labels, axis=1))
            histories.append(history)
            held_logits.append(apply(network, held_out.pixels)[1])
            held_labels.append(held_out.labels)
    logits, labels = np.concatenate(held_logits), np.concatenate(held_labels)
    fitted = np.repeat(temperatures, [len(part) for part in held_labels])
    history = [mean_row(rows) for rows in zip(*histories, strict=True)]

    results, reliabilities = [], []
    for name, own in (("as trained", np.ones_like(fitted)), ("calibrated", fitted)):
        reliabilities.append(measure(logits, labels, own))
        loss = float(fastmax.cross_entropy(logits, labels, own, axis=1))
        accuracy = float((logits.argmax(axis=1) == labels).mean())
        error = reliabilities[-1].error
        results.append({"": name, "T": own.mean(), "accuracy": accuracy, "loss": loss, "ECE": error})
    sizes = ", ".join(str(len(part.labels)) for part in parts)
    title = f"Held-out images of {arguments.splits} divisions of the digits into {sizes}"
    show_table(title, results, lambda value: f"{value:.4g}")
    swept = sweep(logits, labels)
    comments = [
        *header(["scikit-learn"]),
        f"seed: {arguments.seed}, splits: {arguments.splits}, epochs: {arguments.epochs}",
    ]
    bins = [
        row
        for result, reliability in zip(results, reliabilities, strict=True)
        for row in tabulate(result[""], result["T"], reliability)
    ]
    folder: Path = arguments.output
    figures = {
        "losses": draw_losses(history),
        "reliability": draw_reliability(reliabilities[0], reliabilities[1], np.array(temperatures)),
        "entropy": draw_entropies(swept, np.array(temperatures), logits.shape[1]),
    }
    tables = {"losses": history, "reliability": bins, "entropy": swept}
    for name, figure in figures.items():
        report([write_table(folder / f"digits_{name}.csv", comments, tables[name])])
        report(save(figure, folder / f"digits_{name}", arguments.format))


if __name__ == "__main__":
    main()
