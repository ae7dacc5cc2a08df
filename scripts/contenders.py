"""What the benchmarks time: the cases, and the call by which each library computes one.

All get the same entries, and write into an array made beforehand where they can: the formula in
NumPy, SciPy and JAX return a new one. Every result is checked before it is timed.
"""

import argparse
import importlib
import math
import os
import signal
import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np
from numba.core import config
from options import positive_number, whole_number

import fastmax
from fastmax import reference

SEED = 20240611
OPSET = 13
FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "entropy")
PLAIN = "T = 1"
PER_ROW = "T per row"
MASKED = "where"
LIMITS = {"T = 0": 0.0, "T = inf": math.inf}
# Columns of a wider array: all but its last 64, and every other one.
ROWS_APART, ENTRIES_APART = APART = ("rows apart", "entries apart")
VARIANTS = (PLAIN, PER_ROW, MASKED, *LIMITS, *APART)
# Relative for probabilities, absolute for logarithms: PyTorch is off by 1e-3 on 10**7 float32 entries.
TOLERANCE = {"float32": 5e-3, "float64": 1e-10, "float16": 5e-3, "bfloat16": 2e-2}
WIDE = ("float32", "float64")
# At most so many entries and slices are checked, so that the check takes no longer than the timing.
CHECKED_ENTRIES = 1_000_000
CHECKED_SLICES = 100
RATIOS = ("copy_ratio", "copy_ratio_q1", "copy_ratio_q3")
COPIES = ("parallel-copy", "copy")

Call = Callable[[], Any]


class Case(NamedTuple):
    """One function of one array; `variant` says with which temperature or mask, or how the array lies."""

    function: str
    shape: tuple[int, ...]
    axis: int
    dtype: str
    variant: str = PLAIN


class Task(NamedTuple):
    """A case with its arrays: the entries, the result, and the temperature or the mask."""

    case: Case
    x: np.ndarray
    out: np.ndarray
    options: dict[str, Any]
    threads: int

    @property
    def divisor(self) -> np.ndarray | None:
        """The temperatures as a column in the dtype of x, if there is one per row."""
        per_row = self.case.variant == PER_ROW
        return self.options["temperature"][:, None].astype(self.x.dtype) if per_row else None


class Contender(NamedTuple):
    """A library: its title, what it needs installed, how it is called, and what it takes part in."""

    title: str
    packages: tuple[str, ...]
    make_call: Callable[..., Call]  # of a Task, or of what `learners` has
    functions: tuple[str, ...] = FUNCTIONS
    dtypes: tuple[str, ...] = WIDE
    variants: tuple[str, ...] = (PLAIN, PER_ROW)
    has_out: bool = True

    def takes_part(self, case: Case) -> bool:
        """Whether it is timed for a case."""
        return case.function in self.functions and case.dtype in self.dtypes and case.variant in self.variants


def show_shape(shape: tuple[int, ...]) -> str:
    """Write a shape as in 8192x1000."""
    return "x".join(map(str, shape))


def show_case(case: Case) -> str:
    """Write what a case is, in a line."""
    variant = "" if case.variant == PLAIN else f", {case.variant}"
    return f"{case.function} {case.dtype} {show_shape(case.shape)} axis {case.axis}{variant}"


def make_task(case: Case, threads: int) -> Task:
    """Draw the entries, normal with standard deviation 3, and make the array for the result."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal(case.shape, np.float64 if case.dtype == "float64" else np.float32)
    x *= 3.0
    x = x.astype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype, copy=False)
    options: dict[str, Any] = {}
    if case.variant == PER_ROW:
        options["temperature"] = rng.uniform(0.5, 2.0, case.shape[0])
    elif case.variant == MASKED:
        options["where"] = rng.random(case.shape) < 0.5
    elif case.variant in LIMITS:
        options["temperature"] = LIMITS[case.variant]
    elif case.variant == ROWS_APART:
        x = cut_out(x, slice(case.shape[-1]), case.shape[-1] + 64)
    elif case.variant == ENTRIES_APART:
        x = cut_out(x, slice(None, None, 2), 2 * case.shape[-1])
    reduced = case.function in ("logsumexp", "entropy")
    shape = tuple(np.delete(case.shape, case.axis)) if reduced else case.shape
    return Task(case, x, np.full(shape, np.nan, x.dtype), options, threads)


def cut_out(x: np.ndarray, columns: slice, width: int) -> np.ndarray:
    """Return x as some columns of an array that is so wide."""
    array = np.zeros((*x.shape[:-1], width), x.dtype)
    array[..., columns] = x
    return array[..., columns]


# --- Checks ---------------------------------------------------------------------------------------


def define(function: str, logits: np.ndarray, temperature: float) -> Any:
    """Return a function of one slice as it is defined, those beside softmax at T = 1."""
    probs = reference.softmax(logits, temperature)
    if function == "log_softmax":
        return np.log(probs)
    if function == "logsumexp":
        return np.log(np.exp(logits).sum())
    if function == "entropy":
        return -(probs * np.log(probs)).sum()
    return probs


def smallest_subnormal(dtype: np.dtype) -> float:
    """Return the smallest positive number of a type."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


def check(task: Task, result: np.ndarray) -> None:
    """Raise an error where slices of a result, some spread over all, are not as they are defined."""
    case = task.case
    rows = np.moveaxis(task.x, case.axis, -1)
    where = np.moveaxis(np.broadcast_to(task.options.get("where", True), task.x.shape), case.axis, -1)
    results = np.moveaxis(result, case.axis, -1) if result.ndim == task.x.ndim else result
    temperatures = np.broadcast_to(task.options.get("temperature", 1.0), rows.shape[:-1])
    slices = temperatures.size
    count = min(slices, CHECKED_SLICES, max(1, CHECKED_ENTRIES // rows.shape[-1]))
    # The first and the last are among them.
    for position in np.linspace(0, slices - 1, count).astype(int):
        index = np.unravel_index(position, temperatures.shape)
        logits, got, kept = rows[index], results[index], where[index]
        if not kept.all():
            if got[~kept].any():
                raise ArithmeticError(f"an entry of slice {position} that is masked has a probability")
            logits, got = logits[kept], got[kept]
        expected = define(case.function, logits.astype(np.float64, copy=False), float(temperatures[index]))
        error = np.abs(got - expected)
        limit = TOLERANCE[case.dtype] * np.abs(expected)
        # What a probability below the normal range is rounded by, and what a logarithm near 0 may be off.
        limit += smallest_subnormal(result.dtype) if case.function == "softmax" else TOLERANCE[case.dtype]
        if not (error <= limit).all():
            raise ArithmeticError(f"slice {position} is wrong by {np.max(error):.3g}")


def check_copy(task: Task) -> None:
    """Raise an error where a copy is not the original."""
    if task.out.tobytes() != task.x.tobytes():
        raise ArithmeticError("the copy is not the original")


# --- Calls ----------------------------------------------------------------------------------------


def of_quotient(function: Callable[[Any], Any], x: Any, divisor: Any) -> Call:
    """Return the call of function(x / divisor), or of function(x) where there is no divisor."""
    return partial(function, x) if divisor is None else lambda: function(x / divisor)


def call_fastmax(task: Task) -> Call:
    """Return the call of fastmax."""
    numba.set_num_threads(task.threads)
    function = getattr(fastmax, task.case.function)
    return partial(function, task.x, axis=task.case.axis, out=task.out, **task.options)


def call_numpy(task: Task) -> Call:
    """Return the call of the formula as it stands."""

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x)
        return e / e.sum(axis=task.case.axis, keepdims=True)

    return of_quotient(softmax, task.x, task.divisor)


def call_scipy(task: Task) -> Call:
    """Return the call of SciPy."""
    special = importlib.import_module("scipy.special")
    function = partial(getattr(special, task.case.function), axis=task.case.axis)
    return of_quotient(function, task.x, task.divisor)


def call_torch(task: Task) -> Call:
    """Return the call of PyTorch, on tensors that share the memory of the arrays."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(task.threads)

    def tensor(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    function = partial(getattr(torch, task.case.function), dim=task.case.axis, out=tensor(task.out))
    divisor = task.divisor
    return of_quotient(function, tensor(task.x), None if divisor is None else tensor(divisor))


def call_onnxruntime(task: Task) -> Call:
    """Return the run of a model of one node, or of two with the division, bound to the arrays."""
    helper, runtime = importlib.import_module("onnx.helper"), importlib.import_module("onnxruntime")
    inputs, nodes = {"x": task.x}, []
    if task.divisor is not None:
        inputs["divisor"] = task.divisor
        nodes.append(helper.make_node("Div", ["x", "divisor"], ["quotient"]))
    logits = "quotient" if nodes else "x"
    nodes.append(helper.make_node("Softmax", [logits], ["probs"], axis=task.case.axis))

    def describe(name: str, array: np.ndarray) -> Any:
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, element, array.shape)

    described = [describe(name, array) for name, array in inputs.items()]
    graph = helper.make_graph(nodes, "softmax", described, [describe("probs", task.out)])
    model = helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = task.threads
    session = runtime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array))
    binding.bind_ortvalue_output("probs", runtime.OrtValue.ortvalue_from_numpy(task.out))
    return partial(session.run_with_iobinding, binding)


def call_jax(task: Task) -> Call:
    """Return the call of a function that JAX has compiled, the division included."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    function = partial(getattr(jax.nn, task.case.function), axis=task.case.axis)
    arrays = [jax.device_put(array) for array in (task.x, task.divisor) if array is not None]
    compiled = jax.jit(lambda x, divisor=None: function(x if divisor is None else x / divisor))
    return lambda: compiled(*arrays).block_until_ready()


def call_copy(task: Task) -> Call:
    """Return the call of a copy by one thread."""
    return partial(np.copyto, task.out, task.x)


@numba.njit(parallel=True)
def copy_parts(target, source, parts):
    """Copy an array, each part by a thread of its own: faster than np.copyto in Python's threads."""
    n = source.size
    for i in numba.prange(parts):
        start, stop = n * i // parts, n * (i + 1) // parts
        target[start:stop] = source[start:stop]


def call_parallel_copy(task: Task) -> Call:
    """Return the call of a copy by all threads."""
    numba.set_num_threads(task.threads)
    target, source = (array.reshape(-1).view(np.uint8) for array in (task.out, task.x))
    return partial(copy_parts, target, source, task.threads)


# What fastmax and the copies are timed for, and the functions and variants that the others have; some would
# be given a copy of what is cut out.
ALL = FUNCTIONS, tuple(TOLERANCE), VARIANTS
PACKED = tuple(variant for variant in VARIANTS if variant not in APART)
SHARED = FUNCTIONS[:3]
ANY_LAYOUT = (PLAIN, PER_ROW, *APART)
# In the order of the tables and figures.
CONTENDERS = {
    "fastmax": Contender("fastmax", ("numba",), call_fastmax, *ALL),
    "numpy": Contender("NumPy", ("numpy",), call_numpy, FUNCTIONS[:1], WIDE, ANY_LAYOUT, has_out=False),
    "scipy": Contender("SciPy", ("scipy",), call_scipy, SHARED, WIDE, ANY_LAYOUT, has_out=False),
    "torch": Contender("PyTorch", ("torch",), call_torch, SHARED, tuple(TOLERANCE), ANY_LAYOUT),
    "onnxruntime": Contender("ONNX Runtime", ("onnxruntime", "onnx"), call_onnxruntime, FUNCTIONS[:1]),
    "jax": Contender("JAX", ("jax",), call_jax, SHARED, has_out=False),
    "parallel-copy": Contender("copy, all threads", ("numba",), call_parallel_copy, *ALL[:2], PACKED),
    "copy": Contender("copy, one thread", ("numpy",), call_copy, *ALL),
}


# --- Timing ---------------------------------------------------------------------------------------


def count_threads() -> int:
    """Return the number of cores that this process may use, or of Numba's threads if they are fewer."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]


def number_of_threads(text: str) -> int:
    """Read a number of threads, at most one per core."""
    value, most = whole_number(text), count_threads()
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, as many as there are cores, got {text}")
    return value


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, ``--rounds`` and ``--duration`` to a script's options."""
    parser.add_argument(
        "--threads",
        type=number_of_threads,
        default=count_threads(),
        metavar="N",
        help="how many threads each library gets (default: one per core)",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number,
        default=9,
        metavar="N",
        help="how often each time is measured (default: 9)",
    )
    parser.add_argument(
        "--duration",
        type=positive_number,
        default=0.05,
        metavar="SECONDS",
        help="how long the calls of one measurement last together, at least one call (default: 0.05)",
    )


def prepare(name: str, case: Case, threads: int) -> tuple[Call, None]:
    """Return the call of a contender for a case, after a first call whose result is right; and no answer."""
    contender = CONTENDERS[name]
    task = make_task(case, threads)
    if name in COPIES:
        task = task._replace(out=np.empty_like(task.x))
    call = contender.make_call(task)
    returned = call()
    if name in COPIES:
        check_copy(task)
    else:
        check(task, task.out if contender.has_out else np.asarray(returned))
    return call, None


def count_calls(call: Call, duration: float) -> int:
    """Return how many calls last about `duration` seconds, at least 1."""
    timer = timeit.Timer(call)
    calls = 1
    while (seconds := timer.timeit(calls)) < duration / 4:
        calls *= 2
    return max(1, round(calls * duration / seconds))


def seconds_per_call(call: Call, calls: int) -> float:
    """Return the mean time of some calls, if they are several after one to warm up the caches."""
    if calls > 1:
        call()
    return timeit.Timer(call).timeit(calls) / calls


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios formed within the rounds."""
    return float(np.median(np.divide(numerators, denominators)))


def compare_with_copy(seconds: Sequence[float], copies: Sequence[float]) -> dict[str, float]:
    """Return the median time, and the median and the quartiles of its ratio to a copy in the same round."""
    quartiles = np.percentile(np.divide(seconds, copies), [50, 25, 75]).tolist()
    return {"seconds": float(np.median(seconds))} | dict(zip(RATIOS, quartiles, strict=True))


def idle() -> None:
    """Hold no arrays: what a process calls before its first case and between two."""


def serve(
    connection: Connection,
    name: str,
    threads: int,
    duration: float,
    prepare: Callable[[str, Case, int], tuple[Call, Any]] = prepare,
) -> None:
    """Answer for one contender, until the process is ended.

    A case that is not yet its turn is prepared, and answered with what comes with its call; its turn is
    answered with the seconds per call, and what goes wrong with an error.
    """
    # Ctrl-C is for the process that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call, calls = idle, 0
    while True:
        case, turn = connection.recv()
        try:
            if turn:
                answer = seconds_per_call(call, calls)
            else:
                # The arrays of the last case go before those of the next come.
                call = idle
                call, answer = prepare(name, case, threads)
                calls = count_calls(call, duration)
        except Exception as error:
            answer = RuntimeError(f"{name}, {show_case(case)}: {error!r}")
        connection.send(answer)
