"""The bits of a slice depend on the slice alone: not on threads, neighbours, position or layout."""

import json
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from bits import LENGTHS
from marks import FLOATS, nightly
from paths import IN_PLACE, PATHS

import fastmax
from fastmax import _columns, _process, _tiles
from fastmax._jit import jit
from fastmax._slice import CHUNK
from fastmax._threads import Kernel, each_span, each_task

every = pytest.mark.parametrize("name", oracle.FUNCTIONS)
float_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# By day one function stands for how results of 16 bits are written.
one_of_16_bits = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("softmax", dtype) for dtype in (ml_dtypes.bfloat16, np.float32)),
        ("log_softmax", np.float32),
        *nightly(
            ("log_softmax", ml_dtypes.bfloat16),
            *((name, dtype) for name in oracle.ELEMENTWISE for dtype in (np.float16, np.float64)),
        ),
    ],
)

CONTIGUOUS = (
    "rows",
    "many rows",
    "columns in Fortran order",
    "one column",
    "repeated row",
    "all axes",
    "temperature per row",
    "temperatures of one vector",
    "temperatures along the last axis",
    "temperature of one array",
    "byte swapped",
    "out given",
)
STRIDED = (
    "reversed",
    "reversed rows",
    "rows in Fortran order",
    "columns",
    "wide columns",
    "many columns",
    "every other column",
    "middle axis",
    "middle axis of many",
    "negative axis",
    "temperature per column",
    "out strided",
)
LONGEST = 20_000  # beyond it, paths that make many slices are left out


def bits(result):
    """Return a result as integers: NaN and the sign of 0 count."""
    result = np.asarray(result)
    return result.view(np.dtype(f"i{result.dtype.itemsize}"))


def draw(k, dtype):
    x = np.random.default_rng(k).normal(scale=5.0, size=k).astype(dtype)
    x[: k // 20] *= dtype(40)  # subnormal results, and results of 0
    return x


# --- threads --------------------------------------------------------------------------------------


def digests(**environment):
    """Return digests of the results with 1, 2 and 4 threads, from a process that has 4."""
    root = str(Path(fastmax.__file__).parents[1])
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "PYTHONPATH": root} | environment
    script = str(Path(__file__).with_name("bits.py"))
    command = [sys.executable, script, "1", "2", "4"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_number_of_threads_changes_no_bit():
    one, two, four = digests()
    assert len(one) >= 200
    assert [case for case in one if not one[case] == two[case] == four[case]] == []


@pytest.mark.nightly
def test_kernels_that_are_loaded_give_the_bits_of_those_just_compiled(tmp_path):
    compiled = digests(NUMBA_CACHE_DIR=str(tmp_path))
    assert digests(NUMBA_CACHE_DIR=str(tmp_path)) == compiled


@jit
def take(task, part, counts, owners, burnt, steps):
    """Count a task, which takes part 0 some steps."""
    counts[task] += 1
    owners[task] = part
    if part == 0:
        for i in range(steps):
            burnt[0] = burnt[0] * 0.5 + i


@jit
def take_some(first, stop, part, counts, owners, burnt, steps):
    """Count some tasks."""
    for task in range(first, stop):
        take(task, part, counts, owners, burnt, steps)


@Kernel
def take_shares(team, parts, counts, owners, burnt, steps):
    each_task(take, team, parts, len(counts), (counts, owners, burnt, steps))


@Kernel
def take_spans(team, parts, counts, owners, burnt, steps):
    each_span(take_some, team, parts, len(counts), (counts, owners, burnt, steps))


@Kernel
def take_turns(team, parts, counts, owners, burnt, steps):
    each_task(take, team, parts, len(counts), (counts, owners, burnt, steps), 1)


@pytest.mark.parametrize("kernel", [take_shares, take_spans, take_turns])
@pytest.mark.parametrize("tasks", [0, 1, 15, 16, 17, 100])
def test_each_task_is_done_once_and_a_slow_thread_holds_up_no_other(kernel, tasks):
    threads = _process.usable_threads()
    for parts in (1, 2, 3):
        counts, owners = np.zeros(tasks, np.int64), np.zeros(tasks, np.int64)
        is_slow = parts == 2 <= threads and tasks == 100
        kernel(parts, counts, owners, np.zeros(1), 10**7 if is_slow else 0)  # 10 to 40 ms a task
        assert (counts == 1).all()
        if is_slow:
            assert (owners == 1).sum() > 75


@every
def test_calls_from_several_python_threads_at_once(name):
    function = getattr(fastmax, name)
    x = np.random.default_rng(17).normal(size=(300, 1000))
    expected = [bits(function(x, axis=axis)) for axis in (0, 1)]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(function, x, axis=axis) for axis in 10 * (0, 1)]
    for i, call in enumerate(calls):
        np.testing.assert_array_equal(bits(call.result()), expected[i % 2])


@every
@float_types
@pytest.mark.parametrize("axis", [0, 1])
def test_position_in_a_batch_changes_no_bit(name, dtype, axis):
    """Equal slices, as many as no block of columns or rows divides."""
    for n in (1, 16, 17, 1000):
        x = draw(n, dtype)
        batch = np.stack([x] * 309, axis=1 - axis)
        result = getattr(fastmax, name)(batch, 0.7, axis=axis)
        if name in oracle.ELEMENTWISE:
            result = np.moveaxis(result, axis, -1)
        assert (bits(result) == bits(result[:1])).all()


@every
@float_types
def test_rows_of_each_length_have_the_bits_of_the_vector(name, dtype):
    """On both sides of all that narrow rows choose by, up to five of the widest vectors; in groups of few."""
    function = getattr(fastmax, name)
    temperatures = np.resize([1.0, 0.37, 0.0, 12.0, np.inf, 1e-320], 41)
    for n in (*range(1, 130), 159, 160, 161, 255, 256, 257, 1000, 2049, 4097, 8193):
        x = draw(41 * n, dtype).reshape(41, n)
        x[3, n // 2], x[5, 0], x[7] = np.nan, np.inf, -np.inf
        few = function(x, 0.7, axis=1)
        mixed = function(x, temperatures, axis=1)
        for i, row in enumerate(x):
            np.testing.assert_array_equal(bits(few[i]), bits(function(row, 0.7)), f"row {i} of {n}")
            alone = function(row, temperatures[i])
            np.testing.assert_array_equal(
                bits(mixed[i]), bits(alone), f"row {i} of {n}, T = {temperatures[i]}"
            )


@every
@float_types
def test_columns_of_each_depth_have_the_same_bits_in_any_company(name, dtype):
    """On both sides of 16 entries, up to which softmax takes columns vector by vector."""
    function = getattr(fastmax, name)
    temperatures = np.resize([1.0, 0.37, 0.0, 12.0, np.inf, 1e-320], 71)
    for n in (1, 2, 3, 10, 15, 16, 17, 33):
        x = draw(71 * n, dtype).reshape(n, 71)
        x[n // 2, 3], x[0, 5], x[:, 7] = np.nan, np.inf, -np.inf
        alike = bits(function(x, 0.7))
        mixed = bits(function(x, temperatures))
        for j in range(71):
            pair = [j, 70 - j]
            two = np.ascontiguousarray(x[:, pair])  # which has them one after the other
            np.testing.assert_array_equal(bits(function(two, 0.7)), alike[..., pair], f"{j} of {n}")
            own = bits(function(two, temperatures[pair]))
            np.testing.assert_array_equal(own, mixed[..., pair], f"{j} of {n}, T = {temperatures[pair]}")


@float_types
@pytest.mark.parametrize("name", oracle.ELEMENTWISE)
def test_rows_of_each_length_have_the_same_bits_in_place(name, dtype):
    """A last vector that overlaps the one before is read before either is written."""
    function = getattr(fastmax, name)
    for n in (*range(1, 130), 159, 160, 161, 255, 256, 257):
        x = draw(41 * n, dtype).reshape(41, n)
        for axis, entries in ((1, x), (0, x[0])):
            for temperature in (0.7, 1e-320):
                in_place = entries.copy()
                function(in_place, temperature, axis=axis, out=in_place)
                apart = function(entries, temperature, axis=axis)
                np.testing.assert_array_equal(bits(in_place), bits(apart), f"{n} entries, T = {temperature}")


@every
@pytest.mark.parametrize("dtype", [np.float32, *nightly(np.float64)])
def test_masked_rows_of_each_length_have_the_bits_of_the_vector(name, dtype):
    function = getattr(fastmax, name)
    for n in (1, 10, 15, 16, 17, 31, 32, 33, 64, 95, 97):
        x = draw(41 * n, dtype).reshape(41, n)
        mask = np.random.default_rng(n).random(x.shape) < 0.6
        mask[4] = False
        result = function(x, 0.7, axis=1, where=mask)
        for i, row in enumerate(x):
            alone = function(row, 0.7, where=mask[i])
            np.testing.assert_array_equal(bits(result[i]), bits(alone), f"row {i} of {n}")


@one_of_16_bits
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("n", [0, 40, _columns.FEW_FAR_ROWS])
def test_results_written_past_the_caches_have_the_bits_of_those_in_place(name, dtype, is_masked, n):
    """Results in place are never written past the caches; the others begin at each kind of address."""
    function = getattr(fastmax, name)
    k = _tiles.FAR_BYTES // np.dtype(dtype).itemsize
    shape = (2, n, -(-k // n // 128) * 64) if n else (k + 3,)
    x = draw(math.prod(shape), dtype).reshape(shape)
    where = {"where": (np.arange(x.size) % 7 > 0).reshape(shape)} if is_masked else {}
    in_place, axis = x.copy(), len(shape) // 2
    function(in_place, 0.7, axis=axis, out=in_place, **where)
    for offset in (0, 1, 5, 17):
        buffer = np.full(x.size + 40, 9, dtype)
        out = buffer[offset : offset + x.size].reshape(shape)
        function(x, 0.7, axis=axis, out=out, **where)
        np.testing.assert_array_equal(bits(out), bits(in_place))
        assert (buffer[:offset] == 9).all()
        assert (buffer[offset + x.size :] == 9).all()


@one_of_16_bits
@pytest.mark.parametrize("beyond", [-1, 0, 1, 31])
@pytest.mark.parametrize("is_masked", [False, True])
def test_wide_rows_have_the_bits_of_the_vector_wherever_their_last_chunk_ends(name, dtype, beyond, is_masked):
    function, n = getattr(fastmax, name), 2 * CHUNK * 32 + beyond
    x = draw(24 * n, dtype).reshape(24, n)
    mask = np.arange(x.size).reshape(x.shape) % 7 > 0 if is_masked else None
    buffer = np.full(x.size + 64, 9, dtype)
    out = buffer[: x.size].reshape(x.shape)
    function(x, 0.7, axis=1, where=mask, out=out)
    assert (buffer[x.size :] == 9).all()
    in_place = x.copy()
    function(in_place, 0.7, axis=1, where=mask, out=in_place)
    np.testing.assert_array_equal(bits(in_place), bits(out))
    for i in (0, 11, 12, 23):
        alone = function(x[i], 0.7, where=None if mask is None else mask[i])
        np.testing.assert_array_equal(bits(out[i]), bits(alone))
    temperatures = np.linspace(0.5, 1.0, 24)
    swept = function(x[0], temperatures, axis=-1)
    for temperature, row in zip(temperatures, swept, strict=True):
        np.testing.assert_array_equal(bits(row), bits(function(x[0], temperature)))


@pytest.mark.nightly
def test_narrow_registers():
    """Where lanes of 16-bit results are half a line, each entry is written all the same, past the caches.

    Rows have the bits of vectors, though registers have no room for wide pieces.
    """
    program = """
import numpy as np, fastmax
x = np.random.default_rng(0).normal(size=(33, 10)).astype("f4")
for row, result in zip(x, fastmax.softmax(x, axis=1)):
    assert (result == fastmax.softmax(row)).all()
for shape, axis in (((2**23 + 64,), 0), ((4096, 64, 32), 1)):
    x = np.random.default_rng(0).normal(size=shape).astype("f2")
    in_place = x.copy()
    fastmax.log_softmax(in_place, axis=axis, out=in_place)
    for offset in range(0, 32, 4):
        buffer = np.full(x.size + 64, 9, "f2")
        out = buffer[offset:][: x.size].reshape(shape)
        fastmax.log_softmax(x, axis=axis, out=out)
        assert (out == in_place).all(), (shape, offset)
        assert (buffer[:offset] == 9).all() and (buffer[offset + x.size :] == 9).all()
"""
    narrow = {"x86_64": "ivybridge", "AMD64": "ivybridge"}.get(platform.machine())
    chosen = {"NUMBA_CPU_NAME": narrow, "NUMBA_CPU_FEATURES": "+avx"} if narrow else {}
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | chosen, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", oracle.ELEMENTWISE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((999, 10), 1), ((300, 700), 1), ((40, 21001), 1), ((5, 9001), 0)]
)
def test_results_in_new_memory_have_the_bits_of_those_elsewhere(name, dtype, shape, axis):
    """Memory that ends with a 0 counts as new, and zeros are written to its zeros beforehand."""
    function = getattr(fastmax, name)
    x = draw(np.prod(shape), dtype).reshape(shape)
    x[:, ::3] = 0.0
    x[-1, -1] = 0.0
    elsewhere = np.full(shape, 9, dtype)
    function(x, 0.7, axis=axis, out=elsewhere)
    new = np.zeros(shape, dtype)
    function(x, 0.7, axis=axis, out=new)
    np.testing.assert_array_equal(bits(new), bits(elsewhere))
    function(x, 0.7, axis=axis, out=x)
    np.testing.assert_array_equal(bits(x), bits(elsewhere))


# --- layouts --------------------------------------------------------------------------------------


def changes(name, dtype, path, alone):
    """Return the lengths and temperatures at which a path gives other bits than the slice alone."""
    function, found = getattr(fastmax, name), []
    for n in LENGTHS:
        if n > LONGEST and any(word in path for word in ("many", "wide", "middle", "negative")):
            continue
        x = draw(n, dtype)
        for temperature in (1.0, 0.37):
            result = (PATHS | IN_PLACE)[path](function, x, temperature)
            if (bits(result) != bits(PATHS[alone](function, x, temperature))).any():
                found.append((n, temperature))
    return found


@every
@float_types
@pytest.mark.parametrize("path", CONTIGUOUS)
def test_contiguous_slices_have_the_bits_of_the_vector(name, dtype, path):
    assert changes(name, dtype, path, alone="vector") == []


@pytest.mark.parametrize("name", ["softmax", "logsumexp", *nightly("log_softmax", "entropy")])
@float_types
@pytest.mark.parametrize("path", STRIDED)
def test_strided_slices_have_the_bits_of_the_strided_vector(name, dtype, path):
    assert changes(name, dtype, path, alone="strided") == []


@float_types
@pytest.mark.parametrize("name", oracle.ELEMENTWISE)
@pytest.mark.parametrize(
    ("path", "alone"),
    [
        ("in place", "vector"),
        ("in place rows", "vector"),
        ("in place columns", "strided"),
        ("in place strided", "strided"),
    ],
)
def test_results_in_place_have_the_same_bits(name, dtype, path, alone):
    assert changes(name, dtype, path, alone) == []
