"""Check fastmax's CUDA kernels against its CPU functions, then time them beside their rivals, on a GPU.

The rivals are a copy from device to device, torch.softmax, torch.compile of it, and the fused softmax that
one writes in Triton; one that is missing or fails is left out. Every call is captured in a CUDA graph several
times over, on as many arrays as the L2 cache cannot hold (512 at most), each with a result of its own, and
replayed between CUDA events, so that what is timed is the device. Writes benchmark_cuda.csv, with a row per
case and library, anew after each case, and benchmark_cuda.png and .svg: bytes read and written per second
against the length of the rows. Differences from the CPU's results are reported, and make it exit with 1.
"""

import argparse
import concurrent.futures
import importlib
import importlib.util
import itertools
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from drawing import add_output_options, make_output_folder, report, save, use_style
from matplotlib.figure import Figure
from options import positive_number
from tables import header, show_table, write_table

import fastmax
from fastmax import _cuda_launch, _cuda_plan, cuda

Row = dict[str, Any]

TRAFFIC = 2**30  # bytes read and written by a call that fills the GPU
LENGTHS = (3, 10, 32, 64, 128, 256, 1000, 1024, 1025, 2048, 4096, 8192, 16384, 32768, 50257, 65536, 128256)
LONG = (2**18, 10**6)
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # rows of 128256
INNER = (1, 8, 64, 1024, 8192)  # columns of COLUMN entries
MIDDLE_INNER = (1024, 8192)  # neighbours of such columns in as many groups as fill the traffic
LONG_INNER = (1, 1024, 8192)  # columns of as many entries as fill the traffic
COLUMN = 1000
SPREAD = 3  # entries between rows that are neither packed nor aligned
DTYPES = ("float32", "bfloat16", "float16", "float64")
COMPILED = (64, 1024, 8192, 65536)  # lengths for torch.compile, which takes seconds for each,
TRITON = (32, 64, 256, 1024, 4096, 8192, 32768, 65536)  # and for Triton's kernel, which holds no longer row
COMPILED_DTYPES = ("float32", "bfloat16")  # types for both
CACHE_BYTES = 128 * 2**20  # more than any L2 cache
MOST_ARRAYS = 512
LEAST_CALLS = 4  # in a graph, so that its launch, of some 80 us on a virtual machine, does not count,
SLOW_CALL = 0.01  # but for calls that take so many seconds
REPLAYS = 7
LONGEST_REPLAYS = 0.5  # seconds for the replays of one library on one shape, of which there is at least one
OPERATIONS = ("softmax", "log_softmax", "logsumexp", "entropy")
# Largest differences to the CPU function, in units in the last place of what the result is compared with.
TOLERANCE = {"float32": 4.0, "float64": 4.0, "float16": 1.0, "bfloat16": 1.0}
# What differs by more than this share from PyTorch's result, which is no judge of ulp, is no softmax.
RIVAL_TOLERANCE = 2.0**-6


# -- correctness ----------------------------------------------------------------------------------------


def lengths_to_check(operation: str, dtype: str) -> list[int]:
    """Return lengths for every class of kernels; for softmax of float32 both sides of every threshold."""
    if operation != "softmax":
        return [3, 33, 1025, 20000, 40000, 300000] if dtype == "float32" else [33, 1025]
    if dtype != "float32":
        return [3, 33, 129, 1025, 1153, 20000, 40000, 128256, 300000, 600000]
    thresholds = [32, 64, 128, 256, 768, *(2**i for i in range(10, 18)), *tile_limits()]
    above_48_kb = 12100  # which needs the driver's permission, with what exchanges take
    return [1, 3, 12, 16, 31, above_48_kb, *(m for n in thresholds for m in (n, n + 1)), 50257, 128256]


def tile_limits() -> list[int]:
    """Return the most entries of float32 that tiles for rows and for columns hold, but for those of grids."""
    lists = (0, _cuda_plan.AT_ONCE_TILES[4]), (_cuda_plan.LINE_BYTES, _cuda_plan.COLUMN_TILES[4])
    return sorted(
        tile.blocks * _cuda_plan.tile_entries(int(tile.kilobytes * 2**10), 4, tile.threads, line)
        for line, tiles in lists
        for tile in tiles
        if tile.team != "grid"
    )


def make_rows(n: int, dtype: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return rows with infinities and NaN among ordinary ones, exact in the dtype, and their temperatures."""
    x = rng.normal(scale=3.0, size=(7, n))
    x[1] += 300.0
    x[2, n // 2] = -np.inf
    x[3, n // 3] = np.inf
    x[4, n - 1] = np.nan
    x[5] = -np.inf
    temperatures = np.array([1.0, 0.3, np.inf, 1.0, 2.0, 1.0, 0.0])
    return x, temperatures


def difference(operation: str, found: np.ndarray, expected: np.ndarray, dtype: str) -> float:
    """Return the largest difference in ulp of the dtype, infinite where only one is NaN or infinite."""
    info = {"float32": (24, -149), "float64": (53, -1074), "float16": (11, -24), "bfloat16": (8, -133)}[dtype]
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(all="ignore"):
        size = (
            np.abs(expected) if operation in ("softmax", "log_softmax") else np.maximum(np.abs(expected), 1.0)
        )
        ulp = np.exp2(np.maximum(np.floor(np.log2(size)) + 1 - info[0], info[1]))
        distance = np.where(
            np.isfinite(expected) & np.isfinite(found), np.abs(found - expected) / ulp, np.inf
        )
    return float(np.where(same, 0.0, distance).max(initial=0.0))


def check_case(torch: Any, operation: str, dtype: str, x: np.ndarray, temperatures: np.ndarray) -> float:
    """Return the largest difference between GPU and CPU over layouts and ways to give the temperature."""
    tensor = torch.tensor(x, device="cuda").to(getattr(torch, dtype))
    exact = tensor.double().cpu().numpy()
    work = exact if dtype == "float64" else exact.astype(np.float32)
    function = getattr(fastmax, operation)
    expected = function(work, temperatures, axis=1)
    on_device = torch.tensor(temperatures, device="cuda")
    # A view whose rows are a little apart, so that they are neither packed nor aligned.
    wide = torch.empty(x.shape[0], x.shape[1] + SPREAD, dtype=tensor.dtype, device="cuda")[:, 1:-2]
    wide.copy_(tensor)
    found = [
        function(tensor, temperatures, axis=1),
        function(tensor, on_device, axis=1),
        function(wide, on_device, axis=1),
        function(tensor.t().contiguous(), on_device, axis=0),
        # Columns of which 16 bytes or more lie side by side.
        function(
            torch.cat([tensor, tensor[:1]]).t().contiguous(), torch.cat([on_device, on_device[:1]]), axis=0
        ),
    ]
    if operation in ("softmax", "log_softmax"):
        found[3:] = found[3].t(), found[4].t()[:-1]
        in_place = tensor.clone()
        found.append(function(in_place, on_device, axis=1, out=in_place))
    else:
        found[4] = found[4][:-1]
    worst = max(difference(operation, value.double().cpu().numpy(), expected, dtype) for value in found)
    if operation != "softmax":
        return worst
    alone = function(tensor, 0.7, axis=1).double().cpu().numpy()
    return max(worst, difference(operation, alone, function(work, 0.7, axis=1), dtype))


def check_everything(torch: Any, dtypes: Sequence[str]) -> tuple[int, list[str]]:
    """Compare all kinds of kernels with the CPU functions; return how many cases, and what differs."""
    rng = np.random.default_rng(0)
    count, faults = 0, []
    for operation, dtype in itertools.product(OPERATIONS, dtypes):
        for n in lengths_to_check(operation, dtype):
            count += 1
            name = f"{operation} of {dtype} rows of {n}"
            try:
                worst = check_case(torch, operation, dtype, *make_rows(n, dtype, rng))
            except Exception as error:
                faults.append(f"{name}: {error!r}")
                continue
            if not worst <= TOLERANCE[dtype]:
                faults.append(f"{name}: {worst:.3g} ulp from the CPU's result")
    return count, faults


# -- rivals ---------------------------------------------------------------------------------------------


def triton_softmax() -> Callable[[Any], Any]:
    """Return the softmax that one writes in Triton: a program per row, which holds all of it."""
    from fused_triton import softmax

    return softmax


def contenders(torch: Any, dtype: str, n: int, axis: int) -> dict[str, Callable[[], Callable[[Any], Any]]]:
    """Return what makes the functions that are timed, by name."""
    found: dict[str, Callable[[], Callable[[Any], Any]]] = {
        # A kernel that reads and writes each entry: in a graph, the driver's own copies reach 2.4 TB/s only.
        "copy": lambda: lambda x: x * 1,
        "fastmax": lambda: lambda x: fastmax.softmax(x, 1.0, axis=axis),
        "torch": lambda: lambda x: torch.softmax(x, axis),
    }
    if axis == 1 and n in TRITON and dtype in COMPILED_DTYPES:
        found["triton"] = triton_softmax
    if axis == 1 and n in COMPILED and dtype in COMPILED_DTYPES:
        found["torch.compile"] = lambda: compiled_softmax(torch, axis)
    return found


def compiled_softmax(torch: Any, axis: int) -> Callable[[Any], Any]:
    """Return PyTorch's softmax compiled anew, as it is run as it stands after 8 shapes of one function."""
    torch._dynamo.reset()
    return torch.compile(lambda x: torch.softmax(x, axis), dynamic=False)


# -- timing ---------------------------------------------------------------------------------------------


def device_seconds(torch: Any, function: Callable[[Any], Any], arrays: Sequence[Any]) -> list[float]:
    """Return the time of one call in each of several replays of calls on all arrays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(arrays[0])
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function(arrays[0])
        torch.cuda.synchronize()
    least = LEAST_CALLS if time.perf_counter() - begun < SLOW_CALL else 1
    graph = torch.cuda.CUDAGraph()
    calls = -(-least // len(arrays)) * list(arrays)
    with torch.cuda.graph(graph, stream=stream):
        results = [function(x) for x in calls]  # kept, so that each has memory of its own
    seconds: list[float] = []
    replay_seconds(torch, graph)  # the first replay uploads the graph
    while len(seconds) < REPLAYS and sum(seconds) <= LONGEST_REPLAYS:
        seconds.append(replay_seconds(torch, graph))
    del results
    return [value / len(calls) for value in seconds]


def replay_seconds(torch: Any, graph: Any) -> float:
    """Return the device's time for a graph."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()  # so that the device is busy until the next one is there
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def host_seconds(torch: Any, function: Callable[[Any], Any], calls: int = 2000) -> float:
    """Return the host's time for a call on a small array, which the device does not hold up."""
    x = torch.randn(32, 10, device="cuda")
    function(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    seconds = (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    return seconds


def cases(dtypes: Sequence[str]) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Return (group, dtype, shape, axis) of everything that is timed."""
    groups: dict[str, list[tuple[str, tuple[int, ...], int]]] = {}
    for dtype in dtypes:
        size = {"float64": 8, "float32": 4}.get(dtype, 2)
        entries = TRAFFIC // (2 * size)
        shapes: dict[str, list[tuple[tuple[int, ...], int]]] = {
            "rows": [((max(1, entries // n), n), 1) for n in (*LENGTHS, *LONG)],
            "one row": [((1, 10**6), 1)],
            "columns": [((COLUMN, inner), 0) for inner in INNER],
            "middle axis": [((entries // (COLUMN * inner), COLUMN, inner), 1) for inner in MIDDLE_INNER],
            "batch": [((count, 128256), 1) for count in BATCHES],
            "long columns": [((max(1, entries // inner), inner), 0) for inner in LONG_INNER],
        }
        for group, own in shapes.items():
            groups.setdefault(group, []).extend((dtype, *shape) for shape in own)
    return [(group, *case) for group, own in groups.items() for case in own]


def time_case(
    torch: Any, group: str, dtype: str, shape: tuple[int, ...], axis: int, absent: dict[str, str]
) -> list[Row]:
    """Time all contenders on one shape; those that fail are noted as absent there."""
    size = getattr(torch, dtype).itemsize
    bytes_moved = 2 * size * math.prod(shape)
    count = min(MOST_ARRAYS, -(-CACHE_BYTES // (bytes_moved // 2)))
    arrays = [
        torch.randn(shape, device="cuda", dtype=torch.float32).to(getattr(torch, dtype)) for _ in range(count)
    ]
    title = f"{dtype} {'x'.join(map(str, shape))}"
    expected = torch.softmax(arrays[0], axis)
    rows: list[Row] = []
    copy_speed = math.nan  # if the copy fails
    for name, make in contenders(torch, dtype, shape[axis], axis).items():
        try:
            function = make()
            found = function(arrays[0])
            if name != "copy" and not is_near(torch, found, expected):
                raise ArithmeticError("its result is not PyTorch's")
            del found
            seconds = device_seconds(torch, function, arrays)
        except Exception as error:
            absent[f"{name} on {title}"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        middle = statistics.median(seconds)
        speed = bytes_moved / middle / 1e12
        if name == "copy":
            copy_speed = speed
        rows.append(
            {
                "group": group,
                "dtype": dtype,
                "shape": "x".join(map(str, shape)),
                "axis": axis,
                "n": shape[axis],
                "library": name,
                "microseconds": 1e6 * middle,
                "fastest": 1e6 * min(seconds),
                "slowest": 1e6 * max(seconds),
                "TB/s": speed,
                "of copy": speed / copy_speed,
            }
        )
    return rows


def is_near(torch: Any, found: Any, expected: Any) -> bool:
    """Whether a result is a softmax, up to what PyTorch's sums lose on long rows and to subnormals."""
    info = torch.finfo(found.dtype)
    return torch.allclose(found, expected, rtol=RIVAL_TOLERANCE, atol=4 * info.eps * info.smallest_normal)


# -- compiling beforehand -----------------------------------------------------------------------------------


def build(job: tuple[Any, tuple[int, int]]) -> str | None:
    """Compile a kernel into the cache, in a process of its own; return what went wrong."""
    try:
        _cuda_launch.code_of(*job)
    except Exception as error:
        return f"{job[0]}: {error!r}"
    return None


def specs_needed(dtypes: Sequence[str], gpu: Any) -> list[Any]:
    """Return the kernels that checks and timings ask for."""
    found: dict[Any, None] = {}

    def add(operation: str, dtype: str, n: int, inner: int, pitch: int, base: int, per_slice: bool) -> None:
        size = _cuda_plan.ITEMSIZE[dtype]
        out = 0 if _cuda_plan.elementwise(operation) else None
        alignment = _cuda_plan.alignment_of(dtype, base * size, out, n, inner, pitch, n * inner)
        is_packed = pitch == n * inner
        line = _cuda_plan.line_of(dtype, inner)
        own = _cuda_plan.plan(operation, dtype, n, line, is_packed, alignment, per_slice, gpu)
        found.update(dict.fromkeys(own))

    for operation, dtype in itertools.product(OPERATIONS, dtypes):
        work = "float64" if dtype == "float64" else "float32"
        found[_cuda_plan.laws_plan(work, "float64", 1)] = None
        for n in lengths_to_check(operation, dtype):
            add(operation, dtype, n, 1, n, 0, True)
            add(operation, dtype, n, 1, n + SPREAD, 1, True)
            add(operation, dtype, n, 7, 7 * n, 0, True)
            add(operation, dtype, n, 8, 8 * n, 0, True)
            if operation == "softmax":
                add(operation, dtype, n, 1, n, 0, False)
    for _, dtype, shape, axis in cases(dtypes):
        inner = math.prod(shape[axis:][1:])
        add("softmax", dtype, shape[axis], inner, shape[axis] * inner, 0, False)
    return [(spec, gpu.capability) for spec in found]


def compile_all(jobs: Sequence[Any]) -> list[str]:
    """Compile kernels on all cores; return what went wrong."""
    context = multiprocessing.get_context("spawn")  # whose processes know nothing of this one's GPU
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        return [fault for fault in pool.map(build, jobs) if fault]


# -- figure ---------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> Figure:
    """Draw TB/s against the length of the rows, a panel per dtype."""
    own = [row for row in rows if row["group"] == "rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in own))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(1 + 4 * len(dtypes), 4), sharey=True, squeeze=False)
    names = list(dict.fromkeys(row["library"] for row in own))
    for ax, dtype in zip(axes.flat, dtypes, strict=True):
        for i, name in enumerate(names):
            points = [
                (row["n"], row["TB/s"]) for row in own if (row["dtype"], row["library"]) == (dtype, name)
            ]
            if points:
                lengths, speeds = zip(*sorted(points), strict=True)
                ax.plot(lengths, speeds, color=f"C{i}", marker="." if name != "copy" else "", label=name)
        ax.set_xscale("log")
        ax.set_title(dtype)
        ax.set_xlabel("entries in a row")
    axes[0, 0].set_ylabel("TB/s read and written")
    axes[0, 0].set_ylim(bottom=0)
    handles, titles = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside upper center", ncols=len(names))
    return figure


def driver_version() -> str:
    """Return the version of the NVIDIA driver, as its own tool says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def main() -> None:
    """Read the options, check, time, and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_output_options(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=list(DTYPES),
        choices=DTYPES,
        help="types to check and to time (default: all)",
    )
    parser.add_argument("--check-only", action="store_true", help="compare with the CPU, time nothing")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=270.0,
        help="time after which no further case is begun (default: 270)",
    )
    options = parser.parse_args()
    if not cuda.is_available():
        parser.exit(
            1, "There is no NVIDIA GPU here, or no driver for it: nothing was checked and nothing timed.\n"
        )
    if importlib.util.find_spec("torch") is None:
        parser.exit(1, "PyTorch is needed to time fastmax beside it: pip install torch\n")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        parser.exit(1, f"PyTorch {torch.__version__} cannot use the GPU: it needs one built for CUDA.\n")
    make_output_folder(parser, options.output)
    start = time.perf_counter()

    def tell(text: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s: {text}", flush=True)

    jobs = specs_needed(options.dtypes, _cuda_launch.gpu(torch.cuda.current_device()))
    faults = compile_all(jobs)
    tell(f"compiled {len(jobs)} kernels")
    count, differences = check_everything(torch, options.dtypes)
    faults += differences
    tell(f"compared {count} cases with the CPU, {len(differences)} differ")
    print(*faults, sep="\n", flush=True)
    if options.check_only:
        sys.exit(bool(faults))
    overhead = {
        "fastmax": host_seconds(torch, lambda x: fastmax.softmax(x, 1.0, axis=1)),
        "torch": host_seconds(torch, lambda x: torch.softmax(x, 1)),
    }
    comments = header(["numba", "numba-cuda", "torch", "numpy"])
    comments += [
        f"GPU: {torch.cuda.get_device_name()}, driver {driver_version()}, CUDA {torch.version.cuda}",
        "host's time for a call on 32 x 10: "
        + ", ".join(f"{k} {1e6 * v:.1f} us" for k, v in overhead.items()),
        "TB/s: bytes of x and of the result, over the median time of a call; of copy: over that of the copy",
        f"cases compared with the CPU: {count}, of which differ: {len(differences)}",
    ]
    rows: list[Row] = []
    absent: dict[str, str] = {}
    table = options.output / "benchmark_cuda.csv"
    todo = cases(options.dtypes)
    for i, case in enumerate(todo):
        if time.perf_counter() - start > options.seconds:
            comments.append(f"cases left out for want of time: {len(todo) - i} of {len(todo)}")
            tell(comments[-1])
            break
        rows += time_case(torch, *case, absent)
        if rows:
            write_table(table, comments, rows)
        torch.cuda.empty_cache()
    if not rows:
        parser.exit(1, "Nothing could be timed:\n" + "\n".join(map(": ".join, absent.items())) + "\n")
    write_table(table, comments, rows)
    show_table("softmax on a GPU", rows, lambda value: f"{value:.3g}")
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    use_style()
    figures = save(draw(rows), options.output / "benchmark_cuda", options.format)
    tell("done")
    report([table, *figures])
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
