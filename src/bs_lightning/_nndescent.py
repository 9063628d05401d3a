"""Nearest neighbour descent by pynndescent: without side effects on the process, and compiled once per machine."""

import atexit
import contextlib
import functools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from bs_lightning._types import Neighbors
from bs_lightning.isolation import isolated_threads, numba_threading_layer

_MOST_COMPILING = 1800.0  # seconds to wait for another process that compiles, beside a busy training
_cores_of_process: ContextVar[int | None] = ContextVar("cores of this process", default=None)

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_import_lock = threading.RLock()  # held while a thread imports pynndescent: no process is forked in the middle of it
_compiled = False
_compiler: subprocess.Popen[bytes] | None = None  # compiles ahead of the first call
_importer: threading.Thread | None = None  # imports pynndescent when `_compiler` is done
_spare_folder: str | None = None  # where numba keeps compiled code, if it can be kept nowhere else
_forked_from_gnu_openmp = False


def descend(data: NDArray[np.float32], n_neighbors: int, seed: int, n_shares: int = 1) -> Neighbors:
    """Find approximate nearest neighbours by cosine similarity, or by the similarity of two sides.

    Calls from several threads wait for each other: numba's ``workqueue`` layer aborts a process in which two threads
    run parallel code at the same time.

    Args:
        data: float32 of shape ``[P, d]``, or ``[P, 2, d]`` with rows of length 1.
        n_neighbors: Columns of the result. pynndescent counts each row as its own neighbour.
        seed: The same seed gives the same result on the same number of threads.
        n_shares: Number of processes that leave their cores to this one, itself included, where :func:`shared_cores`
            says how many cores a process has.

    Returns:
        int32 of shape ``[P, n_neighbors]``, nearest first, with -1 where pynndescent found too few.

    Raises:
        RuntimeError: If this process was forked from one that ran GNU OpenMP through numba, or if numba finds no
            folder, not even a temporary one, for the compiled code of pynndescent.
    """
    import numba

    global _compiled
    with _lock, isolated_threads(), warnings.catch_warnings():
        _wait_for_compiler()
        _start_numba_threads()
        nndescent = _import_nndescent()
        if not _compiled:
            _log.info("NNDescentGraph: pynndescent loads its kernels, or compiles them for one to two minutes.")
        # The caller replaces the -1 that this warning is about.
        warnings.filterwarnings("ignore", message="Failed to correctly find n_neighbors")
        metric: Any = "cosine" if data.ndim == 2 else _two_sides_distance()
        rows = data.reshape(len(data), -1)
        cores = _cores_of_process.get()
        n_jobs = None if cores is None else min(cores * n_shares, numba.get_num_threads())
        with _outermost_in_python():
            index = nndescent(rows, metric=metric, n_neighbors=n_neighbors, random_state=seed % 2**32, n_jobs=n_jobs)
        _compiled = True
        return index.neighbor_graph[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def shared_cores(n_cores: int | None) -> Iterator[None]:
    """Let pynndescent use no more threads than the cores that this process has for itself.

    Args:
        n_cores: Number of cores, at least 1; ``None`` for as many threads as numba has.
    """
    token = _cores_of_process.set(n_cores)
    try:
        yield
    finally:
        _cores_of_process.reset(token)


def compile_ahead(n_sides: int) -> None:
    """Start to compile pynndescent's kernels in a process of its own, unless they are compiled or being compiled.

    That process leaves them on disk. A thread of this process then imports pynndescent, which loads many of them.
    :func:`descend` waits for both.

    Args:
        n_sides: 1 for embeddings ``[P, d]``, 2 for ``[P, 2, d]``.

    Raises:
        RuntimeError: If numba finds no folder, not even a temporary one, for the compiled code of pynndescent.
    """
    global _compiler, _importer
    with _lock:
        if _compiled or _compiler is not None:
            return
        _start_numba_threads()
        try:
            spare = _temporary_folder()
        except OSError:
            _import_nndescent()  # refuses now if pynndescent's folder cannot be written either
            spare = None
        code = f"from bs_lightning import _nndescent; _nndescent.compile_now({n_sides}, {spare!r})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(_import_path())}
        environment |= {"NUMBA_THREADING_LAYER": str(numba_threading_layer())}
        quiet = subprocess.DEVNULL
        _compiler = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=quiet, stdout=quiet, stderr=quiet
        )
        _importer = threading.Thread(target=_import_after, args=(_compiler,), daemon=True)
        _importer.start()
        atexit.register(_stop_compiler, os.getpid())


def _import_path() -> list[str]:
    """Return the folders that Python imports from. It skips what is no string, such as a ``Path``."""
    return [path or os.getcwd() for path in sys.path if isinstance(path, str)]


def _import_after(compiler: "subprocess.Popen[bytes]") -> None:
    """Import pynndescent when its kernels are on disk. Then the first graph does not wait for the import."""
    global _spare_folder
    has_compiled = compiler.wait() == 0
    with _import_lock:
        if has_compiled:
            with contextlib.suppress(Exception):  # the first graph meets the same error, and raises it
                _import_nndescent()
        if _spare_folder is not None:
            # A process that is killed, or was forked, would leave the folder behind.
            with contextlib.suppress(OSError):  # it holds kernels
                os.rmdir(_spare_folder)
                _spare_folder = None


def _stop_compiler(owner: int) -> None:
    """End the process that compiles, and let the thread come to its end, before Python exits."""
    if os.getpid() == owner and _compiler is not None and _importer is not None:
        _compiler.kill()
        _importer.join(timeout=10)


def compile_now(n_sides: int, spare_folder: str | None) -> None:
    """Compile pynndescent's kernels with low priority, and leave them on disk.

    Where several processes of a machine call it at a time, one compiles, and the others wait for its end.

    Args:
        n_sides: 1 for embeddings ``[P, d]``, 2 for ``[P, 2, d]``.
        spare_folder: Where to leave them if numba finds no other folder.
    """
    global _spare_folder
    _spare_folder = spare_folder
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)
    path = _lock_file(n_sides)
    try:
        _compile_alone(n_sides, path)
    finally:
        # A file would stay for each folder that keeps kernels. Who comes after its removal finds them compiled.
        with contextlib.suppress(OSError):
            os.remove(path)


def _compile_alone(n_sides: int, lock_file: str) -> None:
    """Compile, or wait for the end of another process that does."""
    try:
        lock = FileLock(lock_file)
        lock.acquire(blocking=False)
    except Timeout:
        with contextlib.suppress(Timeout), lock.acquire(timeout=_MOST_COMPILING):
            return
    except OSError:
        pass  # no file can be locked here, so each process compiles
    # More than a megabyte: pynndescent splits so many rows with kernels of their own.
    shape = (5000, 128) if n_sides == 1 else (5000, 2, 64)
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    descend(data / np.linalg.norm(data, axis=-1, keepdims=True), n_neighbors=5, seed=0)


def _lock_file(n_sides: int) -> str:
    """Return the file that is locked while kernels are compiled: one for each user, and folder that keeps them."""
    user = os.getuid() if hasattr(os, "getuid") else ""  # on Windows the folder is the user's own
    digest = zlib.crc32(f"{n_sides} {user} {sys.prefix} {os.environ.get('NUMBA_CACHE_DIR')}".encode())
    return os.path.join(tempfile.gettempdir(), f"bs_lightning_{digest}.lock")


def _wait_for_compiler() -> None:
    """Let :func:`compile_ahead` come to its end."""
    global _compiler, _importer
    if _compiler is None or _importer is None:
        return
    if _compiler.poll() is None:
        _log.info("NNDescentGraph: waits for pynndescent's kernels, which are being compiled.")
    _importer.join()
    atexit.unregister(_stop_compiler)
    if _compiler.returncode != 0:
        _log.info("NNDescentGraph: the process that compiles pynndescent's kernels failed. They are compiled here.")
    _compiler = _importer = None


@contextlib.contextmanager
def _outermost_in_python() -> Iterator[None]:
    """Let Python run pynndescent's outermost functions, which do nothing but call compiled kernels.

    They hold pointers, so numba cannot keep them on disk as it keeps the kernels.
    """
    from pynndescent import pynndescent_

    outermost = {
        name: function
        for name, function in vars(pynndescent_).items()
        if name.startswith("nn_descent") and hasattr(function, "py_func")
    }
    for name, function in outermost.items():
        setattr(pynndescent_, name, function.py_func)
    try:
        yield
    finally:
        for name, function in outermost.items():
            setattr(pynndescent_, name, function)


def _import_keeping_kernels() -> Any:
    """Import pynndescent. numba then keeps its kernels on disk, beside the functions that pynndescent lets it keep.

    Kernels take the distance as an argument. numba gives each distance a new identity in each process, so it would not
    find the kernels again. Here a distance has the same identity in all processes.
    """
    from pynndescent import NNDescent, distances, pynndescent_

    for name in ("alternative_cosine", "alternative_dot"):
        _fix_identity(getattr(distances, name))
    for function in vars(pynndescent_).values():
        if hasattr(function, "enable_caching"):
            function.enable_caching()
    return NNDescent


def _fix_identity(distance: Any) -> None:
    """Give a compiled distance an identity that is the same in all processes, unless it has an identity already."""
    from pynndescent import __version__

    if hasattr(distance, "_set_uuid"):
        digest = zlib.crc32(distance.py_func.__code__.co_code)
        with contextlib.suppress(AssertionError):
            distance._set_uuid(f"bs_lightning, pynndescent {__version__}, {distance.__name__}, {digest}")


@functools.cache
def _two_sides_distance() -> Any:
    """Return the distance of two instances that have two sides each, for pynndescent."""
    import numba

    @numba.njit(fastmath=True)
    def distance(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
        # Descent by the sum of the sides finds few of the neighbours: such a sum also compares equal sides.
        width = len(first) // 2
        similarity = 0.0
        for i in range(width):
            similarity += first[i] * second[width + i] + first[width + i] * second[i]
        return max(1.0 - similarity / 2, 0.0)

    _fix_identity(distance)
    return distance


def _start_numba_threads() -> None:
    """Start numba's threads on the layer that the user has chosen, or on one that survives a fork.

    This comes before pynndescent's import, which overrules the choice of ``omp``.
    """
    import numba

    if _forked_from_gnu_openmp:
        raise RuntimeError(
            "NNDescentGraph cannot run in this process: it was forked from a process in which numba had started GNU "
            "OpenMP, which does not survive a fork. Set the environment variable NUMBA_THREADING_LAYER=workqueue "
            "before the program starts, or start processes by 'spawn' or 'forkserver', or use ExactGraph."
        )
    if numba_threading_layer() is not None:
        return
    config: Any = numba.config
    chosen = config.THREADING_LAYER
    config.THREADING_LAYER = "forksafe" if chosen == "default" else chosen
    try:
        numba.get_num_threads()  # starts them
    finally:
        config.THREADING_LAYER = chosen
    if _runs_gnu_openmp():
        warnings.warn(
            "numba starts GNU OpenMP, as NUMBA_THREADING_LAYER or numba.config.THREADING_LAYER says. Processes that "
            "are forked from now on (data-loading workers, ddp_fork) are killed when they run parallel numba code. If "
            "yours do, choose 'workqueue', or use ExactGraph.",
            stacklevel=2,
        )


@functools.cache
def _import_nndescent() -> Any:
    try:
        return _import_keeping_kernels()
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        try:
            folder = _temporary_folder()
        except OSError:
            raise RuntimeError(
                "NNDescentGraph cannot import pynndescent: numba can write its compiled code neither beside "
                "pynndescent, nor in the home folder, nor in a temporary folder. Set the environment variable "
                "NUMBA_CACHE_DIR to a folder that can be written, before the program starts, or use ExactGraph."
            ) from error
        _log.info(
            "NNDescentGraph: numba can write its compiled code neither beside pynndescent nor in the home folder. "
            "Until this process ends, %s holds it. To keep it, set NUMBA_CACHE_DIR.",
            folder,
        )
        import numba

        config: Any = numba.config
        chosen, config.CACHE_DIR = config.CACHE_DIR, folder  # numba reads it for each function that is to be cached
        try:
            return _import_keeping_kernels()
        finally:
            config.CACHE_DIR = chosen


def _temporary_folder() -> str:
    """Return this process's temporary folder. It is removed when the process ends, not when a forked process ends."""
    global _spare_folder
    if _spare_folder is None:
        folder, owner = tempfile.mkdtemp(prefix="bs_lightning_"), os.getpid()

        def remove() -> None:
            if os.getpid() == owner:
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
        _spare_folder = folder
    return _spare_folder


def _runs_gnu_openmp() -> bool:
    """Whether numba has started GNU OpenMP in this process."""
    omppool = sys.modules.get("numba.np.ufunc.omppool")
    return numba_threading_layer() == "omp" and getattr(omppool, "openmp_vendor", None) == "GNU"


def _after_fork_in_child() -> None:
    """Note whether OpenMP is broken in this process, and free locks whose threads were not forked.

    A process that compiles is not this process's to wait for.
    """
    global _lock, _import_lock, _compiler, _importer, _forked_from_gnu_openmp
    _lock, _import_lock = threading.Lock(), threading.RLock()
    _compiler = _importer = None
    _forked_from_gnu_openmp = _forked_from_gnu_openmp or _runs_gnu_openmp()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=lambda: _import_lock.acquire(),
        after_in_parent=lambda: _import_lock.release(),
        after_in_child=_after_fork_in_child,
    )
