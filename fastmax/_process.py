"""What calls have to know of the process that they run in: its interrupts, its threads, its forks.

Numba's threads come from one of three layers. GNU OpenMP kills a forked child that uses what its parent has
started; workqueue aborts the process when two threads launch work at once. Where threads are not safe, or
would compete with others for the same cores, a call stays on its own thread; its result has the same bits.
"""

import contextlib
import functools
import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.np.ufunc import parallel
from numba.np.ufunc.parallel import threading_layer

# Held by the one call that runs on all threads; calls from other threads meanwhile keep to their own.
all_threads = threading.Lock()

# Bytes of stack below which no thread is trusted with the compiler, which takes more than 64 KB.
_ENOUGH_STACK = 2**19

_safe = True
_forked_in_peace = True
_held = []


def usable_threads():
    """Numba's number of threads where they are safe and the caller is not one of several at work, else 1."""
    others = threading.active_count() - 1
    caller = threading.current_thread()
    if others > 0:  # threads that Python did not start stay on its list when they have ended
        # Not the frames, of which this is one: they would keep what all callers have until it is collected.
        running = set(sys._current_frames())
        others = sum(thread.ident in running for thread in threading.enumerate()) - 1
    if caller is not threading.main_thread():
        # A thread beside further ones shares the cores with them; one that Python did not start may be
        # Numba's own.
        if others > 1 or isinstance(caller, threading._DummyThread):  # pyright: ignore[reportAttributeAccessIssue]
            return 1
    if not _safe:
        return 1
    try:
        threads = _number_of_threads()
    except ValueError:  # no threading layer can be loaded
        return 1
    return threads if others == 0 or threading_layer() != "workqueue" else 1


def _number_of_threads():
    """Number of Numba's threads; they are started first, under the lock that a fork waits for.

    Once they are, what lies below `numba.get_num_threads` takes 0.3 us and not 2.3.
    """
    if _launched() is None:
        with global_compiler_lock:
            return numba.get_num_threads()
    return parallel._get_num_threads()


def _launched():
    """Threading layer whose threads have been started, or None."""
    try:
        return threading_layer()
    except ValueError:
        return None


def _has_threads():
    """Whether the process has threads at all; right after a fork there are none."""
    tasks = Path("/proc/self/task")
    return not tasks.exists() or len(list(tasks.iterdir())) > 1


def _is_child():
    """Whether multiprocessing has made this process."""
    multiprocessing = sys.modules.get("multiprocessing")
    return multiprocessing is not None and multiprocessing.parent_process() is not None


def _has_gnu_openmp():
    """Whether any library of the process has brought GNU OpenMP, and may have started its threads."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libgomp" in maps.read_text(errors="replace")


def _before_fork():
    """Wait until no other thread imports or compiles kernels, or starts or uses all threads.

    A child would inherit them half done, and locked for good. Python forks even if this is interrupted, and
    only tells of that: locks come first.
    """
    global _forked_in_peace
    interrupts = []
    _insist(_await_set_up, interrupts)
    _insist(global_compiler_lock.acquire, interrupts)
    held = _insist(functools.partial(all_threads.acquire, timeout=1.0), interrupts)
    _forked_in_peace = held and threading.active_count() == 1
    if held:
        _held.append(all_threads)
    if interrupts:
        raise interrupts[0]


def _insist(function, interrupts):
    """Call a function until it is not interrupted."""
    while True:
        try:
            return function()
        except (RecursionError, MemoryError):  # which would come again
            raise
        except BaseException as interrupt:
            interrupts.append(interrupt)


def _await_set_up():
    """Wait for another thread that may be in `_set_up_compiler`; what fails there fails in a call, too."""
    if threading.active_count() > 1:
        with contextlib.suppress(Exception):
            uninterrupted(_set_up_compiler)


def _after_fork_in_parent():
    if _held:
        _held.pop().release()
    global_compiler_lock.release()


def _after_fork_in_child():
    global all_threads, _safe
    layer = _launched()
    if layer is None:
        _safe = _safe and not _has_gnu_openmp()
    elif layer == "omp":
        _safe = False
    elif layer == "tbb":  # it cannot end the part that another thread has in it
        _safe = _safe and _forked_in_peace
    _held.clear()
    all_threads = threading.Lock()
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )
    if _launched() == "omp":
        # Started before this module was there to see a fork: by the parent of this process, perhaps.
        _safe = _has_threads() and not _is_child()


def _set_up_compiler():
    """Have Numba set up what it compiles with.

    It has a lock of its own for that, and then takes the compiler's: a thread that holds the latter already
    would wait for one that makes its first jitted function, and that one for it.
    """
    cpu_target.target_context  # noqa: B018


def imported(name):
    """A module; a fork waits until it is there, and with it what Numba sets up when it is first called."""
    _set_up_compiler()
    with global_compiler_lock:
        importlib.import_module("numpy.ma")
        return importlib.import_module(name)


def uninterrupted(function, *arguments) -> Any:
    """Call a function where no KeyboardInterrupt reaches it.

    Interrupted in the middle, Numba's registries, dispatchers and imports stay half made for good. The main
    thread, the only one that is interrupted, has it done in another; if it is interrupted waiting, the other
    thread brings its work to an end.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Where the main thread itself compiles, another one would wait for it; none runs when the process ends.
    # What the program has set as the stack of new threads may be too small.
    has_room = not 0 < threading.stack_size() < _ENOUGH_STACK
    if not is_main or global_compiler_lock.is_locked() or sys.is_finalizing() or not has_room:
        return function(*arguments)
    outcome = []

    def run():
        try:
            outcome.append((function(*arguments), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=f"fastmax: {function.__name__}")
    try:
        thread.start()
    except RuntimeError:  # at the end of the process, or where there are no threads
        return function(*arguments)
    while thread.is_alive():
        thread.join(0.1)  # without a limit, Windows would not let it be interrupted
    result, error = outcome.pop()
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback has this frame, and those of all callers
    return result
