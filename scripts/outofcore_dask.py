"""Softmax of an array that is larger than memory, from disk to disk, by dask.

Without an input, random numbers are written first, several times as large as the memory of all workers. Each
chunk is read, computed and written on its own; where the axis is split over chunks, the array is read twice.
Entries of the result are checked against the definition.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.diagnostics.progress import ProgressBar
from dask.distributed import Client, LocalCluster, progress
from dask.utils import format_bytes, parse_bytes
from options import non_negative_number, positive_number, whole_number

import fastmax
from fastmax.reference import softmax


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, metavar="ZARR", help="array to take (default: random numbers)")
    parser.add_argument(
        "--output", type=Path, metavar="ZARR", help="where to write (default: a folder that is removed again)"
    )
    parser.add_argument("--axis", type=int, default=0, help="axis along which results sum to 1 (default: 0)")
    parser.add_argument(
        "--temperature", type=non_negative_number, default=1.0, help="from 0 to inf (default: 1)"
    )
    parser.add_argument(
        "--workers", type=whole_number, default=2, help="processes on this machine (default: 2)"
    )
    parser.add_argument(
        "--memory-limit", type=parse_bytes, default="1GB", help="of each worker (default: 1GB)"
    )
    parser.add_argument(
        "--times",
        type=positive_number,
        default=4.0,
        help="size of the random array, in memories of all workers (default: 4)",
    )
    parser.add_argument(
        "--chunk",
        type=parse_bytes,
        default="32MB",
        help="bytes of a chunk of the random array (default: 32MB)",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="cluster to use, in place of this machine")
    parser.add_argument("--threads", action="store_true", help="use threads of this process, without limits")
    arguments = parser.parse_args()
    if arguments.scheduler and None in (arguments.input, arguments.output):
        parser.error("--scheduler needs an --input and an --output that all machines of the cluster see")
    if arguments.input is not None and not arguments.input.exists():
        parser.error(f"--input {arguments.input} does not exist")
    if arguments.output is not None and arguments.output.exists():
        parser.error(f"--output {arguments.output} is there already, and nothing is written over")
    ndim = 2 if arguments.input is None else da.from_zarr(str(arguments.input)).ndim
    if not -ndim <= arguments.axis < ndim:
        parser.error(f"--axis must be from {-ndim} to {ndim - 1}, got {arguments.axis}")
    return arguments


def write_random(path, size, chunk):
    """Write a float32 array of some bytes, with rows of 4096 entries, in chunks of whole and half rows."""
    rows = max(2, chunk // (4 * 2048))
    chunks: Any = (rows, 2048)
    x = da.random.default_rng(0).normal(scale=5.0, size=(max(rows, size // (4 * 4096)), 4096), chunks=chunks)
    x.astype(np.float32).to_zarr(str(path))


def worst_error(x, p, axis, temperature, slices=3):
    """Return the largest error of some slices of the result, relative to the largest entry of each."""
    worst = 0.0
    others = [n for i, n in enumerate(x.shape) if i != axis]
    for k in range(slices):
        index = [n * k // slices for n in others]
        index.insert(axis, slice(None))
        entries = np.asarray(x[tuple(index)].compute(), np.float64)
        exact = softmax(entries - entries.max(), temperature)  # the definition overflows
        found = np.asarray(p[tuple(index)].compute(), np.float64)
        worst = np.maximum(worst, np.abs(found - exact).max() / exact.max())  # NaN stays
    return worst


def run(arguments, client, folder):
    """Take the softmax from disk to disk and say how long it took."""
    source = arguments.input or folder / "input.zarr"
    if arguments.input is None:
        memory = arguments.workers * arguments.memory_limit
        write_random(source, int(arguments.times * memory), arguments.chunk)
    x = da.from_zarr(str(source))
    print(f"input: {x.shape} {x.dtype}, {format_bytes(x.nbytes)} in {x.npartitions} chunks")
    result: Any = fastmax.softmax(x, arguments.temperature, axis=arguments.axis)
    target = arguments.output or folder / "output.zarr"
    start = time.perf_counter()
    if client is None:
        with ProgressBar():
            result.to_zarr(str(target))
    else:
        future = client.compute(result.to_zarr(str(target), compute=False))
        progress(future, notebook=False)
        future.result()
        print()
    seconds = time.perf_counter() - start
    print(f"softmax: {seconds:.1f} s, {x.nbytes / seconds / 1e6:.0f} MB of input a second")
    worst = worst_error(x, da.from_zarr(str(target)), arguments.axis % x.ndim, arguments.temperature)
    print(f"largest error of three slices, as a part of their largest entry: {worst:.1e}")
    if not worst <= 4 * np.finfo(result.dtype).eps:
        raise SystemExit("the result is wrong")
    if arguments.output is not None:
        print(f"wrote {target}")


def main():
    """Run on threads, on workers of this machine, or on a cluster."""
    arguments = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="fastmax_"))
    try:
        if arguments.threads:
            run(arguments, None, folder)
        elif arguments.scheduler:
            with Client(arguments.scheduler) as client:
                run(arguments, client, folder)
        else:
            with (
                LocalCluster(
                    n_workers=arguments.workers,
                    threads_per_worker=1,
                    memory_limit=arguments.memory_limit,
                    dashboard_address="",
                    local_directory=str(folder),
                ) as cluster,
                Client(cluster) as client,
            ):
                run(arguments, client, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
