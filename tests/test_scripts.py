"""The scripts run, say what they write, write the same each time, and refuse bad arguments."""

import csv
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

import fastmax

PACKAGE = Path(fastmax.__file__).parent
SCRIPTS = Path(__file__).parents[1] / "scripts"
RUNNABLE = sorted(path.name for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text())


def start(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def ends_at_once(monkeypatch, capsys):
    """Run a script here, for it ends with its arguments; return the status and what it printed."""

    def end(script, *arguments):
        monkeypatch.syspath_prepend(SCRIPTS)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return end


def run(script, *arguments):
    """Run a script to its end and return what it printed."""
    finished = start(script, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_table(content):
    """Return the comment lines and the rows of a CSV file."""
    lines = content.decode().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return comments, list(csv.DictReader(lines[len(comments) :]))


@pytest.mark.parametrize("script", RUNNABLE)
def test_help(ends_at_once, script):
    status, printed, error = ends_at_once(script, "--help")
    assert (status, error) == (0, "")
    assert printed.startswith(f"usage: {script}")
    assert len(printed.splitlines()) > 5


# --- temperature_sweep.py -------------------------------------------------------------------------

SWEEP = ("temperature_sweep.py", "--temperatures", 0.1, 10, 5)


def test_sweep_draws_the_documents_vectors_and_the_simplex(tmp_path):
    printed = run(*SWEEP, "--output", tmp_path / "new" / "folder", "--format", "png", "svg")
    written = files(tmp_path / "new" / "folder")
    curves = [f"temperature_sweep_1_{r}_3.{suffix}" for r in (2, 3) for suffix in ("png", "svg")]
    tables = [f"temperature_sweep_1_{r}_3.csv" for r in (2, 3)]
    assert sorted(written) == sorted([*curves, *tables, "simplex.png", "simplex.svg"])
    assert all(name in printed for name in written)
    assert all(content.startswith(b"\x89PNG") for name, content in written.items() if "png" in name)


@pytest.mark.nightly
def test_sweep_writes_the_same_files_again(tmp_path):
    for folder in ("first", "second"):
        run(*SWEEP, "--vector", 1, 3, 3, "--output", tmp_path / folder)
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_sweep_tabulates_the_curves_and_both_limits(tmp_path):
    vector = [0.5, -1.0, 2.0, 2.0]
    run(*SWEEP, "--vector", *vector, "--output", tmp_path, "--format", "svg")
    (path,) = tmp_path.glob("*.csv")
    assert path.read_text().startswith("temperature,sigma_1,sigma_2,sigma_3,sigma_4\n")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    temperatures = [0, *np.geomspace(0.1, 10, 5), np.inf]
    np.testing.assert_allclose(table[:, 0], temperatures, rtol=1e-11)
    expected = fastmax.softmax(vector, temperatures, axis=-1)
    np.testing.assert_allclose(table[:, 1:], expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vector", "one"], "--vector"),
        (["--vector", "1", "nan"], "--vector"),
        (["--temperatures", "0", "1", "5"], "--temperatures"),
        (["--temperatures", "2", "1", "5"], "--temperatures"),
        (["--temperatures", "1", "2", "2.5"], "--temperatures"),
        (["--format", "bmp"], "--format"),
        (["--output", __file__], "--output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_sweep_refuses_bad_arguments(ends_at_once, tmp_path, arguments, named):
    output = [] if "--output" in arguments else ["--output", tmp_path]
    status, _, error = ends_at_once("temperature_sweep.py", *arguments, *output)
    assert status == 2
    assert named in error.splitlines()[-1]
    assert "Traceback" not in error
    assert files(tmp_path) == {}


def test_sweep_takes_numbers_with_exponents(tmp_path):
    run(*SWEEP, "--vector", "1e2", "-1e1", "-.5", "--output", tmp_path, "--format", "svg")
    (path,) = tmp_path.glob("*.csv")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    np.testing.assert_array_equal(table[0], [0, 1, 0, 0])


# --- accuracy.py ----------------------------------------------------------------------------------


def test_accuracy_is_measured_within_the_bars(tmp_path):
    finished = start("accuracy.py", "--quick", "--output", tmp_path, "--format", "png")
    assert finished.returncode == 0, finished.stderr
    written = files(tmp_path)
    assert {"accuracy.csv", "accuracy.png"} <= set(written)
    assert all(name in finished.stdout for name in written)
    _, rows = read_table(written["accuracy.csv"])
    assert {row["function"] for row in rows} == {"softmax", "log_softmax", "logsumexp"}
    for row in rows:
        bar = oracle.TOLERANCE[row["function"]][row["dtype"]]
        assert float(row["fastmax"]) <= bar, row


# --- benchmark_cpu.py and scaling_cpu.py ----------------------------------------------------------

BRIEFLY = ("--rounds", 1, "--duration", 0.001, "--format", "png")


def test_benchmark_compares_the_contenders(tmp_path):
    chosen = ("--shapes", "3", "32x10", "--contenders", "fastmax", "numpy")
    finished = start("benchmark_cpu.py", *chosen, *BRIEFLY, "--output", tmp_path)
    assert finished.returncode == 0, finished.stderr
    written = files(tmp_path)
    assert set(written) == {"benchmark_cpu.csv", "benchmark_cpu.png"}
    assert all(name in finished.stdout for name in written)
    comments, rows = read_table(written["benchmark_cpu.csv"])
    assert [line.split(":")[0] for line in comments] == ["# date", "# machine", "# versions", "# threads"]
    timed = {(row["shape"], row["dtype"], row["contender"]) for row in rows}
    names = ["fastmax", "numpy", "copy"]
    assert timed == {(s, d, n) for s in ["3", "32x10"] for d in ["float32", "float64"] for n in names}
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert {row["copy_ratio"] for row in rows if row["contender"] == "copy"} == {"1"}
    assert {row["fastmax_ratio"] for row in rows if row["contender"] == "fastmax"} == {"1"}


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp", "entropy"])
def test_benchmark_refuses_wrong_results(monkeypatch, function):
    monkeypatch.syspath_prepend(SCRIPTS)
    contenders = importlib.import_module("contenders")
    task = contenders.make_task(contenders.Case(function, (5, 5), 1, "float64"), 1)
    with pytest.raises(ArithmeticError, match="slice 0 is wrong by nan"):
        contenders.check(task, task.out)
    right = getattr(fastmax, function)(task.x, axis=1)
    contenders.check(task, right)
    for wrong in (getattr(fastmax, function)(task.x, axis=0), np.full_like(right, right.mean())):
        with pytest.raises(ArithmeticError, match="slice 0 is wrong by"):
            contenders.check(task, wrong)


def test_scaling_sweeps_lengths_threads_and_sizes(tmp_path):
    lengths = [1, 31, 32, 33]
    sweeps = ("--lengths", *lengths, "--total", 2048)
    finished = start("scaling_cpu.py", *sweeps, *BRIEFLY, "--output", tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "largest step" in finished.stdout
    written = files(tmp_path)
    assert set(written) == {"scaling_cpu.csv", "scaling_cpu.png"}
    assert all(name in finished.stdout for name in written)
    _, rows = read_table(written["scaling_cpu.csv"])
    assert {int(row["k"]) for row in rows if row["sweep"] == "length"} == set(lengths)
    assert {row["layout"] for row in rows if row["sweep"] == "threads"} == {"rows", "columns", "vector"}
    assert {int(row["size"]) for row in rows if row["sweep"] == "size"} == {1024, 2048}
    assert {row["speedup"] for row in rows if row["threads"] == "1"} == {"1"}
    assert all(float(row["copy_ratio"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("benchmark_cpu.py", ["--shapes", "3x3"]),
        ("benchmark_cpu.py", ["--shapes", "3", "--dtypes", "float16"]),
        ("benchmark_cpu.py", ["--contenders", "tensorflow"]),
        ("benchmark_cpu.py", ["--rounds", "0"]),
        ("benchmark_cpu.py", ["--learning", "fit_temperature", "--dtypes", "float64"]),
        ("scaling_cpu.py", ["--threads", "1000000"]),
        ("scaling_cpu.py", ["--duration", "0"]),
        ("scaling_cpu.py", ["--lengths", "1.5"]),
        ("scaling_cpu.py", ["--output", __file__]),
        ("train_digits.py", ["--seed", "-1"]),
        ("train_digits.py", ["--epochs", "0"]),
        ("benchmark_cuda.py", ["--seconds", "nan"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_scripts_refuse_bad_arguments(ends_at_once, tmp_path, script, arguments):
    output = [] if "--output" in arguments else ["--output", tmp_path]
    status, _, error = ends_at_once(script, *arguments, *output)
    assert status == 2
    last = error.splitlines()[-1]
    assert arguments[-2] in last
    assert arguments[-1] in last
    assert files(tmp_path) == {}


def test_no_more_threads_are_asked_for_than_numba_has(tmp_path):
    sweeps = ("--lengths", 3, "--total", 1024, *BRIEFLY, "--output", tmp_path)
    finished = start("scaling_cpu.py", *sweeps, NUMBA_NUM_THREADS="1")
    assert finished.returncode == 0, finished.stderr
    _, rows = read_table(files(tmp_path)["scaling_cpu.csv"])
    assert {row["threads"] for row in rows} == {"1"}


# --- outofcore_dask.py ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "temperature", "dtype"),
    [(0, 0.01, None), (-1, 0, None), (0, 1, np.float64), (1, "inf", np.int64)],
    ids=["random", "T = 0", "large", "integers"],
)
def test_softmax_from_disk_to_disk(tmp_path, axis, temperature, dtype):
    dask = pytest.importorskip("dask.array")
    source = ["--times", 0.001, "--chunk", "1MB"]
    if dtype is not None:
        x = np.random.default_rng(0).normal(scale=1000.0, size=(40, 60)).astype(dtype)
        dask.from_array(x, chunks=(20, 30)).to_zarr(str(tmp_path / "input"))
        source = ["--input", tmp_path / "input"]
    options = ["--threads", "--axis", axis, "--temperature", temperature, "--output", tmp_path / "output"]
    finished = start("outofcore_dask.py", *source, *options)
    assert finished.returncode == 0, finished.stderr
    result = dask.from_zarr(str(tmp_path / "output")).compute()
    np.testing.assert_allclose(result.sum(axis=axis, dtype=np.float64), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--axis", "2"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--times", "-1"],
        ["--workers", "0"],
    ],
    ids=" ".join,
)
def test_disk_to_disk_refuses_bad_arguments(ends_at_once, arguments):
    """Before anything is written."""
    status, _, error = ends_at_once("outofcore_dask.py", *arguments)
    assert status == 2
    assert arguments[0] in error.splitlines()[-1]
    assert arguments[1] in error.splitlines()[-1]


# --- learning ------------------------------------------------------------------------------------


def test_benchmark_of_learning_checks_and_times(tmp_path):
    finished = start("benchmark_cpu.py", "--learning", "solve_temperature", *BRIEFLY, "--output", tmp_path)
    assert finished.returncode == 0, finished.stderr
    written = files(tmp_path)
    assert set(written) == {"benchmark_learning.csv"}
    _, rows = read_table(written["benchmark_learning.csv"])
    own = next(row for row in rows if row["contender"] == "fastmax")
    assert own["fastmax_ratio"] == "1"
    assert float(own["error"]) <= 1e-12


def test_digits_are_learnt_and_calibrated(tmp_path):
    arguments = ("--splits", 2, "--epochs", 40, "--format", "png", "--output", tmp_path)
    finished = start("train_digits.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    written = files(tmp_path)
    names = [
        f"digits_{name}.{suffix}"
        for name in ("losses", "reliability", "entropy")
        for suffix in ("csv", "png")
    ]
    assert set(written) == set(names)
    assert all(name in finished.stdout for name in names)
    _, rows = read_table(written["digits_reliability.csv"])
    for part in ("as trained", "calibrated"):
        bins = [(int(row["images"]), float(row["accuracy"])) for row in rows if row["probabilities"] == part]
        assert sum(count for count, _ in bins) == 1080
        assert sum(count * share for count, share in bins) >= 0.95 * 1080


# --- fit_exp2.py ----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_fit_derives_the_coefficients_of_the_kernels():
    printed = run("fit_exp2.py", "--samples", 1000, "--checks", 20)
    coefficients = re.findall(r'fromhex\("([^"]+)"\)', printed)
    assert len(coefficients) >= 15
    source = (PACKAGE / "_math.py").read_text()
    assert [value for value in coefficients if value not in source] == []
