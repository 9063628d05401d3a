"""Nearest neighbour descent by pynndescent, without side effects on the process."""

import atexit
import functools
import logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bs_lightning._types import Neighbors
from bs_lightning.isolation import isolated_threads, numba_threading_layer

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_compiled = False
_forked_from_gnu_openmp = False


def descend(data: NDArray[np.float32], n_neighbors: int, seed: int) -> Neighbors:
    """Find approximate nearest neighbours by cosine similarity, or by the similarity of two sides.

    Calls from several threads wait for each other: numba's ``workqueue`` layer aborts a process in which two threads
    run parallel code at the same time.

    Args:
        data: float32 of shape ``[P, d]``, or ``[P, 2, d]`` with rows of length 1.
        n_neighbors: Columns of the result. pynndescent counts each row as its own neighbour.
        seed: The same seed gives the same result on the same number of threads.

    Returns:
        int32 of shape ``[P, n_neighbors]``, nearest first, with -1 where pynndescent found too few.

    Raises:
        RuntimeError: If this process was forked from one that ran GNU OpenMP through numba, or if numba finds no
            folder, not even a temporary one, for the compiled code of pynndescent.
    """
    global _compiled
    with _lock, isolated_threads(), warnings.catch_warnings():
        _start_numba_threads()
        nndescent = _import_nndescent()
        if not _compiled:
            _log.info("NNDescentGraph: pynndescent compiles its kernels, about half a minute, once per process.")
        # The caller replaces the -1 that this warning is about.
        warnings.filterwarnings("ignore", message="Failed to correctly find n_neighbors")
        metric: Any = "cosine" if data.ndim == 2 else _two_sides_distance()
        rows = data.reshape(len(data), -1)
        index = nndescent(rows, metric=metric, n_neighbors=n_neighbors, random_state=seed % 2**32)
        _compiled = True
        return index.neighbor_graph[0]  # type: ignore[no-any-return]


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
    if config.THREADING_LAYER == "default":
        config.THREADING_LAYER = "forksafe"
    numba.get_num_threads()  # starts them
    if _runs_gnu_openmp():
        warnings.warn(
            "numba starts GNU OpenMP, as NUMBA_THREADING_LAYER or numba.config.THREADING_LAYER says. Processes that "
            "are forked from now on (data-loading workers, ddp_fork) are killed when they run parallel numba code. If "
            "yours do, choose 'workqueue', or use ExactGraph.",
            stacklevel=2,
        )


def _import_nndescent() -> Any:
    try:
        from pynndescent import NNDescent
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
            from pynndescent import NNDescent
        finally:
            config.CACHE_DIR = chosen
    return NNDescent


def _temporary_folder() -> str:
    """Return a new temporary folder. It is removed when this process ends, not when a forked process ends."""
    folder, owner = tempfile.mkdtemp(prefix="bs_lightning_"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _runs_gnu_openmp() -> bool:
    """Whether numba has started GNU OpenMP in this process."""
    omppool = sys.modules.get("numba.np.ufunc.omppool")
    return numba_threading_layer() == "omp" and getattr(omppool, "openmp_vendor", None) == "GNU"


def _after_fork_in_child() -> None:
    """Note whether OpenMP is broken in this process, and free a lock whose thread was not forked."""
    global _lock, _forked_from_gnu_openmp
    _lock = threading.Lock()
    _forked_from_gnu_openmp = _forked_from_gnu_openmp or _runs_gnu_openmp()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)
