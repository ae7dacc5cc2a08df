"""What the measuring scripts share: tables as CSV, with the machine in their header, and as text."""

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

import fastmax

SIMD = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE"}


def processor() -> str:
    """Return the name of the CPU that the system gives, its kind, and its widest SIMD instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    features = get_host_cpu_features()
    widest = next((title for feature, title in SIMD.items() if features.get(feature)), "SIMD of 128 bits")
    return f"{name} ({get_host_cpu_name()}, {widest})"


def header(packages: Sequence[str]) -> list[str]:
    """Return the date, the machine, and the versions of fastmax, Python and some packages."""
    versions = [f"fastmax {fastmax.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return [
        f"date: {datetime.datetime.now(tz=datetime.UTC).date().isoformat()}",
        f"machine: {processor()}, {os.cpu_count()} logical cores, {platform.system()}",
        f"versions: {', '.join(versions)}",
    ]


def write_table(path: Path, comments: Sequence[str], rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as CSV below comment lines; floats with 4 digits."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {comment}\n" for comment in comments)
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            )
    return path


def show_table(title: str, rows: Sequence[dict[str, Any]], show: Callable[[float], str]) -> None:
    """Print the rows in columns: floats to the right, as `show` writes them, and text to the left."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([show(value) if isinstance(value, float) else str(value) for value in row.values()])
    numeric = [any(isinstance(row[name], float) for row in rows) for name in rows[0]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}\n")
    for line in cells:
        columns = zip(line, widths, numeric, strict=True)
        print("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in columns).rstrip())
