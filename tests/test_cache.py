"""Compiled kernels on disk: never those of older code, never other bits, never in the way."""

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numba
import numpy as np
import pytest
from marks import nightly
from numba import float32, intp
from numba.core import config
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher

import fastmax
from fastmax import _jit

PACKAGE = Path(fastmax.__file__).parent
MODULES = sorted(path.name for path in PACKAGE.glob("*.py"))

# Programs print results bit for bit: one of the smallest, and one of each kind of kernel.
SMALL = """
import numpy as np
import fastmax

assert fastmax.__file__.startswith({package!r})
print(fastmax.softmax(np.array([1.0, 2.0, 3.0])).tobytes().hex())
"""
EVERY_KIND = """
import numpy as np
import fastmax

assert fastmax.__file__.startswith({package!r})
x = np.random.default_rng(0).normal(size=(301, 309))
results = [
    fastmax.softmax(x.astype(np.float32), 0.3),  # columns in parallel
    fastmax.entropy(x, 0.3, axis=None),  # one long vector in parallel
    fastmax.log_softmax(x[:, ::2], np.linspace(0, 2, 301), axis=1),  # any strides
]
print([result.tobytes().hex() for result in results])
"""
# Leaves at the first kernel that is not in the cache.
LOAD = """
import sys
from numba.core import event

class Leave(event.Listener):
    def on_start(self, event):
        sys.exit("a kernel was compiled")

    def on_end(self, event):
        pass

event.register("numba:compile", Leave())
"""

# Prints what is turned into machine code.
EMITTED = """
import numpy as np
from numba.core.codegen import JITCodeLibrary

emitted, emit = [], JITCodeLibrary._finalize_specific

def record(library):
    emitted.append(library.name)
    emit(library)

JITCodeLibrary._finalize_specific = record
import fastmax

assert fastmax.__file__.startswith({package!r})
fastmax.softmax(np.ones((10, 100)), axis=1)
print(*emitted, "alone")
for _ in range(2):
    fastmax.softmax(np.ones((1000, 100)), axis=1)
print(*emitted)
"""


def copy(package, destination):
    ignored = shutil.ignore_patterns("*.pyc")
    return Path(shutil.copytree(package, destination / "fastmax", ignore=ignored))


@pytest.fixture
def package(tmp_path):
    """A copy of the package, without compiled kernels."""
    copied = copy(PACKAGE, tmp_path / "site")
    shutil.rmtree(copied / "__pycache__", ignore_errors=True)
    return copied


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A copy of the package, with the kernels of the smallest program."""
    copied = copy(PACKAGE, tmp_path_factory.mktemp("compiled"))
    shutil.rmtree(copied / "__pycache__", ignore_errors=True)
    run(SMALL, copied)
    return copied


def run(program, package, **environment):
    """Run a program on a package, in a new process, and return what it printed."""
    finished = start(program, package, **environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def start(program, package, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program.format(package=str(package))],
        env=inherited | {"PYTHONPATH": str(package.parent)} | environment,
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def kernels(directory):
    """Return the files of compiled kernels below a directory, with the time each was written."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.nb[ci]")}


def test_nothing_is_kept_of_a_package_that_has_changed_in_a_running_process(package):
    """What is imported later is new code, and a process of the old package would find its kernels."""
    program = """
import fastmax
from pathlib import Path

print(fastmax.softmax([1.0, 3.0, 3.0], 0))
with Path(fastmax.__file__).with_name("_columns.py").open("a") as file:
    file.write("# changed")
print(fastmax.softmax([[1.0, 3.0], [3.0, 3.0]], 0))
"""
    printed = run(program, package)
    assert printed.split() == "[0. 0.5 0.5] [[0. 0.5] [1. 0.5]]".split()
    assert [path.name.split("-")[0] for path in kernels(package)] == ["_slice.softmax_vector"]


def test_kernels_from_the_cache_give_the_same_bits(package):
    compiled = run(EVERY_KIND, package)
    written = kernels(package)
    assert written
    assert run(EVERY_KIND, package) == compiled
    assert run(EVERY_KIND, package) == compiled
    assert kernels(package) == written


@pytest.mark.nightly
def test_what_a_kernel_calls_is_no_machine_code_by_itself(package):
    alone, _, together = run(EMITTED, package).partition("alone")
    assert alone.split().count("kernel") == 1
    assert together.split().count("kernel") == 1 + (numba.get_num_threads() > 1)  # the loop over threads
    assert set(together.split()) <= {"kernel", "nrt"}  # and Numba's own management of memory


def test_kernels_move_with_the_package(compiled, tmp_path):
    """The control of the next test: with no change, nothing is compiled."""
    assert run(LOAD + SMALL, copy(compiled, tmp_path)) == run(SMALL, compiled)


@pytest.mark.parametrize(
    "module", [*MODULES[::9], *nightly(*(name for i, name in enumerate(MODULES) if i % 9))]
)
def test_a_change_in_any_module_compiles_anew(compiled, tmp_path, module):
    package = copy(compiled, tmp_path)
    with (package / module).open("a") as file:
        file.write("# changed\n")
    assert "a kernel was compiled" in start(LOAD + SMALL, package).stderr


def test_a_change_in_a_helper_changes_the_kernels_that_use_it(compiled, tmp_path):
    package = copy(compiled, tmp_path)
    double_exponents(package)
    p = np.frombuffer(bytes.fromhex(run(SMALL, package)))
    np.testing.assert_allclose(p, fastmax.softmax([2.0, 4.0, 6.0]), rtol=1e-9)


def double_exponents(package):
    """Change a constant that kernels of other modules read when they are compiled."""
    with (package / "_math.py").open("a") as file:
        file.write("LOG2_E_HIGH *= 2\n")


def test_nothing_that_can_be_written_and_no_home(package, compiled, tmp_path):
    (package / "__pycache__").write_text("not a directory")
    (tmp_path / "file").write_text("not a directory")
    home = str(tmp_path / "file" / "home")
    result = run(SMALL, package, HOME=home, XDG_CACHE_HOME=home)
    assert result == run(SMALL, compiled)
    assert not kernels(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not ask HOME for the user's place")
def test_package_that_cannot_be_written_keeps_its_kernels_at_home(package, tmp_path):
    (package / "__pycache__").write_text("not a directory")
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    first = run(SMALL, package, **environment)
    assert kernels(home)
    assert run(LOAD + SMALL, package, **environment) == first


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not ask HOME for the user's place")
def test_a_place_that_is_not_absolute_is_none(package, tmp_path):
    (package / "__pycache__").write_text("not a directory")
    run(SMALL, package, XDG_CACHE_HOME="here")
    assert not kernels(tmp_path)


@pytest.mark.nightly
def test_relative_cache_directory_is_that_of_the_first_call(package, tmp_path):
    leave = "import os, fastmax._jit\nos.chdir('/')\n"
    first = run(leave + SMALL, package, NUMBA_CACHE_DIR="here")
    assert kernels(package.parent / "here")
    assert run(LOAD + leave + SMALL, package, NUMBA_CACHE_DIR="here") == first


@pytest.mark.nightly
def test_a_place_that_goes_away_is_not_in_the_way(package, compiled, tmp_path):
    place = tmp_path / "place"
    remove = (
        f"import shutil, fastmax._jit\nshutil.rmtree({str(place)!r})\nopen({str(place)!r}, 'w').close()\n"
    )
    assert run(remove + SMALL, package, NUMBA_CACHE_DIR=str(place)) == run(SMALL, compiled)


def test_package_without_sources_is_not_cached(package, compiled):
    compileall.compile_dir(package, quiet=1, legacy=True)
    for path in package.glob("*.py"):
        path.unlink()
    assert run(SMALL, package) == run(SMALL, compiled)
    assert not kernels(package.parent)


def test_kernels_that_can_only_be_read_are_used(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    find = _jit._cache_directory.__wrapped__
    directory = find()
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=PermissionError))
    assert find() == directory


def test_a_place_that_cannot_even_be_asked_for_is_none(monkeypatch, tmp_path):
    """As that of a user whose home belongs to another one: here, its name is too long."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / ("x" * 300)))
    assert _jit._cache_directory.__wrapped__() is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a directory that a process is in")
def test_a_relative_place_in_a_directory_that_is_gone_is_none(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(config, "CACHE_DIR", "kernels")
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert _jit._cache_directory.__wrapped__() is None


def test_kernels_of_other_states_are_kept_for_a_day(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    own = Path(_jit._cache_directory.__wrapped__() or "")
    young, old = own.with_name("young"), own.with_name("old")
    young.mkdir()
    old.mkdir()
    os.utime(old, (0.0, 0.0))
    _jit._cache_directory.__wrapped__()
    assert own.is_dir()
    assert young.is_dir()
    assert not old.exists()


@pytest.mark.nightly
def test_packages_that_share_a_cache_directory(package, tmp_path):
    """As two versions do that are installed in two environments."""
    shared = tmp_path / "shared"
    first = run(SMALL, package, NUMBA_CACHE_DIR=str(shared))
    assert kernels(shared)
    assert not kernels(package)
    other = copy(package, tmp_path / "other")
    double_exponents(other)
    assert run(SMALL, other, NUMBA_CACHE_DIR=str(shared)) != first
    assert run(LOAD + SMALL, package, NUMBA_CACHE_DIR=str(shared)) == first


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], *nightly(lambda data: b"", lambda data: bytes(len(data)))]
)
def test_damaged_kernels_are_compiled_anew(compiled, tmp_path, damage):
    package = copy(compiled, tmp_path)
    for path in kernels(package):
        path.write_bytes(damage(path.read_bytes()))
    assert "a kernel was compiled" in start(LOAD + SMALL, package).stderr
    assert run(SMALL, package) == run(SMALL, compiled)
    assert run(LOAD + SMALL, package) == run(SMALL, compiled)


def test_two_processes_compile_into_one_empty_cache(package):
    """Different dtypes of one kernel: neither may be left under the name of the other."""
    programs = [SMALL, SMALL.replace("3.0]", "3.0], np.float32")]
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(lambda program: run(program, package), programs))
    assert [run(LOAD + program, package) for program in programs] == printed


@pytest.mark.nightly
def test_gufunc_beside_a_kernel_that_another_process_compiled(package, tmp_path):
    """Each numbers its kernels, and the wrapper in a gufunc finds its kernel by the number."""
    strided = SMALL.replace("np.array([1.0, 2.0, 3.0])", "np.arange(6.0)[::2], [0.5, 1.0], axis=-1")
    other = copy(package, tmp_path / "other")
    printed = run(strided, package)
    first = "import numpy as np, fastmax\nfastmax.softmax(np.ones(6, np.float32)[::2], [0.5, 1.0], axis=-1)\n"
    run(first + strided, other)
    exchanged = [path for path in kernels(package) if path.name.startswith("_gufunc.")]
    assert exchanged
    for path in exchanged:
        (theirs,) = other.rglob(path.name)
        shutil.copy(theirs, path)
    assert run(strided, package) == printed


# --- what kernels call ----------------------------------------------------------------------------


@_jit.jit
def shifted(x, by):
    return x + by


@_jit.jit
def left(x):
    return shifted(x, 1)


@_jit.jit
def right(x):
    return shifted(x, 2)


def product(x):
    return left(x) * right(x) * shifted(x, 3)


@pytest.mark.parametrize("compiler", [_jit._KernelCompiler, Compiler])
def test_code_that_is_called_along_several_ways_is_linked_once(compiler):
    """By kernels, and by functions that Numba compiles as it does."""
    function = _jit._njit(product, CPUDispatcher, compiler)
    assert function(2.0) == 60.0
    assert function(2) == 60


def test_callees_are_not_compiled_for_each_integer_in_a_call():
    function = _jit._njit(product, CPUDispatcher, _jit._KernelCompiler)
    assert function(np.float32(2.0)) == 60.0
    assert (float32, intp) in shifted.signatures
    assert not any("Literal" in str(types) for types in shifted.signatures)
