"""How kernels are compiled, and where their machine code is kept.

Numba keeps one cache file per function and takes it for fresh while the file *of that function* is
unchanged; a kernel that inlines a helper from another module would outlive an edit of the helper. Here
every cached kernel carries the digest of the whole package instead. Where nothing can be written, Numba
refuses to import the module; here kernels are then compiled in each process. What a kernel calls becomes
machine code with it, and is not cached by itself.

No kernel is compiled with ``fastmath``: sums name their order and products their ``fma``, so that a
slice has the same bits however the optimiser inlines, vectorises or loads the code from the cache.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numba
from numba.core import config
from numba.core.caching import Cache, CacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager
from numba.core.registry import CPUDispatcher
from numba.core.runtime.nrt import rtsys
from numba.misc.appdirs import AppDirs
from numba.np.ufunc import wrappers

from fastmax._process import uninterrupted
from fastmax._tracing import apply

_PACKAGE = Path(__file__).parent
_DAY = 24 * 3600.0


@functools.cache
def _package_digest():
    """Hash of every source file of the package."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _writable(directory):
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True


@functools.cache
def _cache_directory():
    """First place that can be written: NUMBA_CACHE_DIR, the package's __pycache__, the user's cache.

    Where none can be, the first that has kernels already; else None. Each state of the package has a
    directory of its own there, and removes those that no process has started with for a day.
    """
    source = Path(_writable.__code__.co_filename)
    # In a zip archive, or without sources, there is nothing to stamp.
    if source != Path(__file__) or not os.path.isfile(source):
        return None
    own = f"{_PACKAGE.name}_{hashlib.sha256(os.fsencode(_PACKAGE)).hexdigest()[:16]}"
    chosen: Any = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    if chosen:
        places = []
        with contextlib.suppress(OSError):  # a relative one, of a directory that is gone
            places.append(Path(os.path.abspath(chosen), own))
    else:
        user = AppDirs(appname="numba", appauthor=False).user_cache_dir
        places = [_PACKAGE / "__pycache__" / "kernels"]
        if os.path.isabs(user):  # it begins with ~ where the user has no home
            places.append(Path(user, own))
    directories = [place / _package_digest()[:16] for place in places]
    for directory in directories:
        if _writable(directory):
            with contextlib.suppress(OSError):
                _remove_unused(directory)
            return os.fspath(directory)
    return next((os.fspath(directory) for directory in directories if os.path.isdir(directory)), None)


def _remove_unused(own):
    """Remove the directories beside our own that were not used for a day."""
    os.utime(own)
    for directory in own.parent.iterdir():
        if time.time() - directory.stat().st_mtime > _DAY:
            shutil.rmtree(directory, ignore_errors=True)


class _PackageLocator(_CacheLocator):
    """Places and stamps the cache of this package's functions, and of no others."""

    def __init__(self, py_func):
        self._line = py_func.__code__.co_firstlineno
        self._py_file = py_func.__code__.co_filename  # Numba's message names it where nothing can be cached

    @classmethod
    def from_function(cls, py_func, py_file):
        return cls(py_func) if Path(py_file).parent == _PACKAGE else None

    def get_cache_path(self) -> Any:
        return _cache_directory()

    def get_source_stamp(self) -> Any:
        return _package_digest()

    def get_disambiguator(self) -> Any:
        return str(self._line)


CacheImpl._locator_classes.insert(0, _PackageLocator)
CACHED = _cache_directory() is not None


class _KernelFiles(IndexDataCacheFile):
    """One file for each kernel and signature, named after them.

    Numba numbers them in an index, which two processes that write at once leave wrong. A damaged file counts
    as absent.
    """

    def _path(self, key):
        digest = hashlib.sha256(repr((numba.__version__, key)).encode()).hexdigest()
        return self._index_path.removesuffix("nbi") + f"{digest[:16]}.nbc"

    def save(self, key, data):
        data = self._dump(data)
        with self._open_for_write(self._path(key)) as file:
            file.write(hashlib.sha256(data).digest() + data)

    def load(self, key):
        try:
            content = Path(self._path(key)).read_bytes()
        except OSError:
            return None
        digest, data = content[:32], content[32:]
        return pickle.loads(data) if hashlib.sha256(data).digest() == digest else None


class _QuickLoad(Cache):
    """Loads a kernel without loading all that Numba can compile: 0.1 s for the first call, not 0.4 s.

    Of what Numba would set up, machine code that is ready needs the runtime (memory, exceptions) alone.
    """

    def __init__(self, py_func):
        super().__init__(py_func)
        locator = self._impl.locator
        self._cache_file = _KernelFiles(
            self._cache_path, self._impl.filename_base, locator.get_source_stamp()
        )

    def load_overload(self, sig, target_context):
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

    def save_overload(self, sig, data):
        with contextlib.suppress(OSError):  # a full disk, or a place that is gone
            # Modules that were imported after an upgrade are not those of the state that this process has.
            if _package_digest.__wrapped__() == _package_digest():
                super().save_overload(sig, data)


class _KernelCache(_QuickLoad, FunctionCache):
    pass


class _WrapperCache(_QuickLoad, wrappers.GufWrapperCache):
    """Keeps the wrapper of a gufunc beside the kernel that it wraps.

    The name of a kernel has a number of the process that compiled it, by which its wrapper is found: that of
    another process, which compiled both at the same time, would be none.
    """

    def __init__(self, py_func, kernel_name):
        super().__init__(py_func)
        self._kernel_name = kernel_name

    def _index_key(self, sig, codegen) -> Any:
        return *super()._index_key(sig, codegen), self._kernel_name

    def load_overload(self, sig, target_context):
        library = super().load_overload(sig, target_context)
        if (
            library is None
        ):  # a wrapper is built, around a kernel that may have been loaded without all of Numba
            target_context.refresh()
        return library


@contextlib.contextmanager
def _enabled():
    """Let Numba compile even where NUMBA_DISABLE_JIT is set: kernels have intrinsics that Python cannot run.

    With it, what Numba itself calls inside kernels would be left as plain functions, too.
    """
    with global_compiler_lock:
        usual: Any = config.DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]
        if not usual:
            yield
            return
        config.DISABLE_JIT = 0  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            config.DISABLE_JIT = usual  # pyright: ignore[reportAttributeAccessIssue]


class _Linked(JITCodeLibrary):
    """Code that is linked to other code, and with it optimised and turned into machine code.

    Numba does that for each function by itself, too. It also links all that a function calls, and what that
    calls, into each function; here only into those that a kernel itself calls.
    """

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name, environment):
        """Leave out what the interpreter would need to call the code, and errors to take values along."""

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0  # what stands for a symbol that is not there

    def _optimize_functions(self, ll_module):
        pass

    def finalize(self):
        for function in self._final_module.functions:
            if not function.is_declaration:
                function.linkage = "linkonce_odr"
        self._finalize_dynamic_globals()
        self._finalized = True

    def _get_module_for_linking(self):
        if self._shared_module is None:
            self._ensure_finalized()
            callees = {}
            self._visit(callees)
            # What is linked before it is called would be dropped.
            for library in reversed(callees):
                linked = isinstance(library, _Linked)
                module = library._final_module if linked else library._get_module_for_linking()
                self._final_module.link_in(module, preserve=True)
            self._shared_module = self._final_module
        return self._shared_module

    def _visit(self, callees):
        """Add what this code calls, and what that calls, each after all that it calls itself."""
        for library in self._linking_libraries:
            if library not in callees:
                if isinstance(library, _Linked):
                    library._visit(callees)
                callees[library] = None


# What Numba looks for, and does not find in functions without closures, `with` and expressions of arrays:
# without these passes a first call takes 0.95 of the time.
_NEEDLESS_PASSES = {
    "WithLifting",
    "InlineClosureLikes",
    "MakeFunctionToJitFunction",
    "FindLiterallyCalls",
    "LiteralUnroll",
    "LiteralPropagationSubPipelinePass",
    "InlineOverloads",
    "NopythonRewrites",
}


class _LinkedCompiler(Compiler):
    """Compiles what kernels call."""

    def __init__(self, typingctx, targetctx, library, *arguments):
        super().__init__(typingctx, targetctx, _Linked(targetctx.codegen(), "linked"), *arguments)

    def define_pipelines(self):
        (usual,) = super().define_pipelines()
        lean = PassManager(usual.pipeline_name)
        lean.passes = [step for step in usual.passes if step[0].__name__ not in _NEEDLESS_PASSES]
        lean.finalize()
        return [lean]


class _KernelCompiler(Compiler):
    """Compiles kernels; what Numba compiles on the way, as the body of a loop over threads, is linked.

    That goes for Numba's own functions, too, and for as long as the process lives: a kernel must call none
    that raises errors with values in them, or that Python calls as well; nor may it call a kernel.
    """

    def __init__(self, typingctx, targetctx, library, *arguments):
        library = JITCodeLibrary(targetctx.codegen(), "kernel")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, *arguments)

    def _compile_bytecode(self):
        codegen = self.state.targetctx.codegen()
        codegen._library_class = _Linked
        try:
            return super()._compile_bytecode()
        finally:
            del codegen._library_class


class _Callee(CPUDispatcher):
    """A function that kernels and traced code call; not compiled anew for each integer written in a call."""

    def __call__(self, *arguments):  # pyright: ignore[reportIncompatibleMethodOverride]
        return apply(self._numba_type_, arguments)

    def get_call_template(self, args, kws):
        integers = numba.types.IntegerLiteral
        args = [numba.types.unliteral(arg) if isinstance(arg, integers) else arg for arg in args]
        return super().get_call_template(args, kws)


def jit(function=None, raises=False, **options) -> Any:
    """``numba.njit`` for what kernels call, and Python never; division by zero follows IEEE 754.

    What raises errors with values of the call in them needs what `_Linked` code has not, and says so.
    """
    if function is None:
        return functools.partial(jit, raises=raises, **options)
    compiler = Compiler if raises else _LinkedCompiler
    return _njit(function, _Callee, compiler, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


def kernel(function, **options) -> Any:
    """``numba.njit`` for what Python calls, not C; its machine code is cached, with all that it calls."""
    dispatcher = _njit(function, CPUDispatcher, _KernelCompiler, no_cfunc_wrapper=True, **options)
    if CACHED:
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    dispatcher._compile_for_args = functools.partial(uninterrupted, _compile, dispatcher._compile_for_args)
    return dispatcher


def _compile(function, *arguments):
    with _enabled():
        return function(*arguments)


def compiled_address(dispatcher, signature):
    """Address of the machine code of a kernel for a signature, under Numba's own convention for calls."""
    code = _compiled(dispatcher, signature)
    return code.library.get_pointer_to_function(code.fndesc.llvm_func_name)


def _compiled(dispatcher, signature):
    """What Numba knows of a kernel for a signature, compiled or loaded if need be."""
    uninterrupted(_compile, dispatcher.compile, signature)
    return dispatcher.overloads[signature]


class plain_kernel(dict):
    """Machine code of a kernel by dtype: of C-contiguous arrays with so many axes, x and perhaps out.

    Called with x, a float and out as it is, it trusts their types, which a `kernel` looks up in 0.15 us.
    """

    def __init__(self, *ndims):
        super().__init__()
        self._ndims = ndims

    def __call__(self, function):
        self._kernel = kernel(function)
        return self

    def __missing__(self, dtype):
        values = numba.from_dtype(dtype)
        x, *out = (numba.types.Array(values, ndim, "C") for ndim in self._ndims)
        signature = x, numba.float64, *out
        code = self[dtype] = _compiled(self._kernel, signature).entry_point
        return code


def _njit(function, dispatcher, compiler, **options) -> Any:
    # What is not said is inherited from the user's function for which a kernel happens to be compiled first.
    options = {"fastmath": False, "forceinline": False, "boundscheck": None, **options}
    return dispatcher(
        function, targetoptions={"nopython": True, "error_model": "numpy", **options}, pipeline_class=compiler
    )


def gufunc(function, layout, signature):
    """``numba.guvectorize`` with this package's cache, which Numba has no option to choose."""
    return uninterrupted(_gufunc, function, layout, signature)


def _gufunc(function, layout, signature):
    with _enabled():
        if not CACHED:
            return numba.guvectorize([signature], layout)(function)
        result: Any = numba.guvectorize(layout, cache=True)(function)
        result.gufunc_builder.nb_func.cache = _KernelCache(function)
        result.add(signature)
        result.disable_compile()
        (compiled,) = result.gufunc_builder.nb_func.overloads.values()
        usual = wrappers.GufWrapperCache
        wrappers.GufWrapperCache = functools.partial(_WrapperCache, kernel_name=compiled.fndesc.mangled_name)
        try:
            return result.build_ufunc()
        finally:
            wrappers.GufWrapperCache = usual
