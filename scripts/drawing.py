"""What the figure scripts share: the style, the options for the output, and saving."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parent / "figures"
STYLE = HERE / "figures.mplstyle"

# Nothing in a file may change from one run to the next: no dates, no versions.
METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def use_style() -> None:
    """Draw without a screen, in the style of ``figures.mplstyle``."""
    mpl.use("agg")
    matplotlib.style.use(STYLE)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--output`` and ``--format`` to a script's options."""
    parser.add_argument(
        "--output",
        type=Path,
        default=FIGURES,
        metavar="DIR",
        help="folder to write into, made if it is missing (default: the repository's figures)",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=["png", "svg"],
        choices=list(METADATA),
        help="formats of the figures (default: png svg)",
    )


def make_output_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Make the folder, or stop with a message that names it and says why it cannot be used."""
    if folder.is_file():
        parser.error(f"argument --output: {folder} is a file, not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make the folder {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        parser.error(f"argument --output: cannot write into {folder}")


def save(figure: Figure, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure in every format, under the name of ``stem``, and return the paths."""
    paths = []
    for suffix in dict.fromkeys(formats):
        paths.append(stem.with_name(f"{stem.name}.{suffix}"))
        figure.savefig(paths[-1], format=suffix, metadata=METADATA[suffix])
    return paths


def report(paths: Sequence[Path]) -> None:
    """Say which files were written, relative to the working directory where they lie below it."""
    for path in paths:
        absolute = path.resolve()
        inside = absolute.is_relative_to(Path.cwd())
        print("wrote", absolute.relative_to(Path.cwd()) if inside else path)
