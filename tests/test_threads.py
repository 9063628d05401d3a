"""A graph leaves no trace in its process: numbers of threads, settings and the ability to fork stay."""

import atexit
import importlib.util
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numba
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from numba.core import caching, event
from processes import LIMIT
from threadpoolctl import ThreadpoolController

from bs_lightning import NNDescentGraph, _nndescent, _walk_kernel, graphs, rwr_batches
from bs_lightning.isolation import isolated_threads
from bs_lightning.plugin import processes

LINUX = sys.platform == "linux"


@pytest.fixture(autouse=True)
def small_pools_go_to_pynndescent(monkeypatch):
    monkeypatch.setattr(graphs, "_SMALL_POOL", 0)


# Isolation


@pytest.mark.parametrize("error", [False, True])
def test_isolated_threads_restores_what_changed(error):
    libraries = ThreadpoolController().lib_controllers

    def state():
        return torch.get_num_threads(), numba.config.THREADING_LAYER, [library.num_threads for library in libraries]

    before = state()
    try:
        with isolated_threads():
            for library in libraries:
                library.set_num_threads(library.num_threads % 2 + 1)
            torch.set_num_threads(before[0] + 1)
            numba.config.THREADING_LAYER = "workqueue"
            assert all(now != then for now, then in zip(state(), before, strict=True))
            if error:
                raise KeyError
    except KeyError:
        assert error
    assert state() == before


def test_starting_numbas_threads_leaves_its_setting(monkeypatch):
    monkeypatch.setattr(numba.config, "THREADING_LAYER", "default")
    monkeypatch.setattr(_nndescent, "numba_threading_layer", lambda: None)
    within = []
    monkeypatch.setattr(numba, "get_num_threads", lambda: within.append(numba.config.THREADING_LAYER))
    _nndescent._start_numba_threads()
    assert within == ["forksafe"]
    assert numba.config.THREADING_LAYER == "default"


def test_isolated_threads_sets_nothing_that_did_not_change(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", pytest.fail)
    monkeypatch.setattr(numba, "set_num_threads", pytest.fail)
    with isolated_threads():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_graph_in_one_thread_does_not_block_the_children_of_another():
    with _nndescent._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if _nndescent._lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_waits_for_the_thread_that_imports():
    begun, done = threading.Event(), []

    def import_slowly():
        with _nndescent._import_lock:
            begun.set()
            time.sleep(0.2)
            done.append(True)

    importer = threading.Thread(target=import_slowly)
    importer.start()
    begun.wait()
    child = os.fork()
    if child == 0:
        with ThreadPoolExecutor() as other:  # the lock may be taken again by the thread that holds it
            is_free = other.submit(_nndescent._import_lock.acquire, blocking=False).result()
        os._exit(0 if done and is_free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    importer.join()


@pytest.mark.skipif(sys.version_info >= (3, 11, 8), reason="later versions of CPython need no help")
def test_a_fork_lets_threads_through_that_wait_to_run_python():
    """Else the new process may wait forever, as gloo's threads hold a lock of the interpreter while they wait."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # seconds: a thread runs only where the other one pauses
    try:
        assert any(another_thread_got_through() for _ in range(20))  # of 20: on busy cores a thread may come late
    finally:
        sys.setswitchinterval(interval)


def another_thread_got_through():
    """Wake up a thread and fork at once; return whether the new process sees that the thread ran before."""
    go, ran = threading.Lock(), []
    go.acquire()
    thread = threading.Thread(target=lambda: (go.acquire(), ran.append(True)))
    thread.start()
    go.release()
    child = os.fork()
    if child == 0:
        os._exit(bool(ran))
    thread.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_refuses_to_run_where_openmp_was_forked(monkeypatch):
    monkeypatch.setattr(_nndescent, "_forked_from_gnu_openmp", True)
    with pytest.raises(RuntimeError, match=r"forked from a process in which numba had started GNU OpenMP.*=workqueue"):
        NNDescentGraph(5)(torch.randn(20, 4))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], 8),
        ([("here", set(range(8)))], 4),
        ([("here", set(range(8)))] * 15, 1),
        ([("here", set(range(8, 16)))], 8),  # bound to other cores
        ([("elsewhere", set(range(8)))] * 3, 8),
    ],
)
@pytest.mark.skipif(not LINUX, reason="asks for the cores that a process may use")
def test_processes_on_the_same_cores_divide_them(others, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(platform, "node", lambda: "here")
    monkeypatch.setattr(processes, "gather", lambda trainer, own: [own, *others])
    assert processes.cores_of_one_process(None) == expected


# These tests run this file as a script in a new process, because only the first graph starts numba's threads.


def run(*arguments, **environment):
    source = str(Path(_nndescent.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_THREADING_LAYER"} | environment
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="forks")
def test_first_graph_leaves_no_trace_and_processes_may_fork_after_it():
    run("default", OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="GNU OpenMP")
def test_first_graph_on_a_chosen_layer():
    run("omp", OMP_NUM_THREADS="2", NUMBA_THREADING_LAYER="omp")


@pytest.mark.slow
@pytest.mark.parametrize("n_sides", [1, 2])
def test_kernels_compiled_ahead_are_on_disk_for_this_process_and_the_next(tmp_path, n_sides):
    for ahead in (True, False):
        compiled = run("kernels", str(n_sides), str(ahead), NUMBA_CACHE_DIR=str(tmp_path)).split()
        kept = {"process_candidates", "init_rp_tree", "init_random", "generate_leaf_updates", "deheap_sort"}
        kept |= {"_dense_planes", "_dense_sides", "_partition"}  # of more than a megabyte
        assert not kept & set(compiled), (
            "pynndescent or numba has changed: kernels are compiled again in each process. See _import_keeping_kernels."
        )


def print_what_a_graph_compiles(n_sides, ahead):
    graph = NNDescentGraph(5)
    embeddings = torch.randn(5000, 128) if n_sides == 1 else torch.randn(5000, 2, 64)
    if ahead:
        graph.prepare(5000, embeddings)
        assert "pynndescent" not in sys.modules  # its import compiles, too, the first time
        _nndescent._importer.join()
        assert "pynndescent" in sys.modules
    recorder = event.RecordingListener()
    with event.install_listener("numba:compile", recorder):
        graph(embeddings)
    assert _nndescent._compiler is None
    print(*(recorded.data["dispatcher"].py_func.__name__ for _, recorded in recorder.buffer))


def test_one_process_of_a_machine_compiles_and_the_others_wait(tmp_path, monkeypatch):
    def is_locked():
        try:
            FileLock(_nndescent._lock_file(1)).acquire(blocking=False).lock.release()
        except Timeout:
            return True
        return False

    compiled = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "nice", lambda _: None)
    monkeypatch.setattr(_nndescent, "_spare_folder", None)
    monkeypatch.setattr(_nndescent, "descend", lambda *_, **__: compiled.append(is_locked()))
    _nndescent.compile_now(1, None)
    assert compiled == [True]
    assert not any(tmp_path.iterdir())  # files would gather
    assert not is_locked()
    with FileLock(_nndescent._lock_file(1)):  # another process compiles
        waiting = threading.Thread(target=_nndescent.compile_now, args=(1, None))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
    waiting.join()
    assert compiled == [True]
    assert not any(tmp_path.iterdir())


def test_each_process_compiles_where_no_file_can_be_locked(monkeypatch):
    compiled = []
    monkeypatch.setattr(os, "nice", lambda _: None)
    monkeypatch.setattr(_nndescent, "_spare_folder", None)
    monkeypatch.setattr(_nndescent, "_lock_file", lambda n_sides: os.devnull + "/lock")
    monkeypatch.setattr(_nndescent, "descend", lambda *_, **__: compiled.append(True))
    _nndescent.compile_now(1, None)
    assert compiled == [True]


def test_an_ended_compiler_that_failed_stops_nothing(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("bs_lightning"), "propagate", True)  # so that caplog receives the message
    monkeypatch.setattr(_nndescent, "_compiled", False)
    monkeypatch.setattr(sys, "executable", "false")
    NNDescentGraph(5).prepare(100, torch.zeros(2, 8))
    assert _nndescent._compiler is not None
    assert NNDescentGraph(5)(torch.randn(100, 8)).shape == (100, 5)
    assert _nndescent._compiler is None
    assert "the process that compiles pynndescent's kernels failed. They are compiled here." in caplog.text


def test_the_process_that_compiles_ends_with_the_one_that_started_it(monkeypatch):
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    importer = threading.Thread(target=compiler.wait)
    importer.start()
    monkeypatch.setattr(_nndescent, "_compiler", compiler)
    monkeypatch.setattr(_nndescent, "_importer", importer)
    _nndescent._stop_compiler(-1)  # in a process that was forked
    assert importer.is_alive()
    _nndescent._stop_compiler(os.getpid())
    assert not importer.is_alive()


@pytest.mark.parametrize("size", [0, 100])
def test_small_pools_prepare_nothing(monkeypatch, size):
    monkeypatch.setattr(graphs, "_SMALL_POOL", 100)
    monkeypatch.setattr(_nndescent, "_compiled", False)
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    NNDescentGraph(5).prepare(size, torch.zeros(2, 8))


@numba.njit(parallel=True)
def doubled(x):
    result = np.empty_like(x)
    for i in numba.prange(len(x)):
        result[i] = 2 * x[i]
    return result


def build(size=100):
    return NNDescentGraph(5)(torch.randn(size, 8))


def build_and_double(queue):
    try:
        queue.put((build().shape, doubled(np.ones(3)).tolist()))
    except RuntimeError as error:
        queue.put(str(error))


def forked():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=build_and_double, args=(queue,))
    process.start()
    process.join(timeout=LIMIT)
    assert process.exitcode == 0
    return queue.get(timeout=1)


def process_state():
    # scikit-learn sets variables with this prefix.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    return torch.get_num_threads(), numba.config.THREADING_LAYER, environment, list(warnings.filters)


def main(layer):
    graphs._SMALL_POOL = 0  # pynndescent builds the graphs
    torch.set_num_threads(1)
    torch.randn(50, 50) @ torch.randn(50, 50)  # starts torch's threads, whose number can then be changed
    before = process_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build()
    assert process_state() == before
    warned = [str(warning.message) for warning in caught if "fork" in str(warning.message)]
    if layer == "omp":
        assert numba.threading_layer() == "omp"
        assert len(warned) == 1
        assert "choose 'workqueue', or use ExactGraph" in warned[0]
        assert "NNDescentGraph cannot run in this process: it was forked" in forked()
    else:
        assert numba.threading_layer() in ("tbb", "workqueue")
        assert not warned
        assert forked() == ((100, 5), [2, 2, 2])
    built = []
    threads = [threading.Thread(target=lambda: built.extend(build(500) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 20
    assert process_state() == before


# Machines where numba cannot write to any folder


def test_walks_where_no_folder_can_be_written(monkeypatch):
    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    spec = importlib.util.spec_from_file_location("kernel_without_cache", _walk_kernel.__file__)
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    neighbors = np.random.default_rng(0).integers(0, 60, (60, 5)).astype(np.int32)
    batches = kernel.walk_batches(neighbors, 6, 0.2, 1, False, np.random.default_rng(1))
    assert np.array_equal(batches, rwr_batches(neighbors, 6, seed=1))


@pytest.fixture
def pynndescent_without_a_folder(monkeypatch, tmp_path):
    """Replace pynndescent by a small package. Numba finds no folder for it, unless one is chosen."""
    package = tmp_path / "pynndescent"
    package.mkdir()
    compiled = "import numba\n@numba.njit(cache=True)\n"
    (package / "__init__.py").write_text(f"{compiled}def NNDescent():\n    return 3\n__version__ = '0'\n")
    (package / "pynndescent_.py").touch()
    (package / "distances.py").write_text("alternative_cosine = alternative_dot = None\n")
    monkeypatch.setattr(_nndescent, "_spare_folder", None)
    _nndescent._import_nndescent.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    places = caching.FunctionCache._impl_class._locator_classes
    named = [place for place in places if "UserProvided" in place.__name__]  # older versions of numba: with a _ before
    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", named)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "pynndescent"]:
            del sys.modules[name]
        yield
    _nndescent._import_nndescent.cache_clear()


@pytest.mark.usefixtures("pynndescent_without_a_folder")
def test_a_temporary_folder_serves_where_no_other_can_be_written(monkeypatch, caplog):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    with caplog.at_level("INFO", logger="bs_lightning"):
        nndescent = _nndescent._import_nndescent()
    assert nndescent() == 3
    assert numba.config.CACHE_DIR == ""
    kept = Path(nndescent.stats.cache_path)
    folder = kept.parent
    assert list(kept.glob("*.nbc"))
    (message,) = caplog.messages
    assert str(folder) in message
    assert "set NUMBA_CACHE_DIR" in message
    (remove,) = at_exit
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)  # as in a forked process
        remove()
    assert folder.exists()
    remove()
    assert not folder.exists()


@pytest.mark.parametrize("holds_kernels", [False, True])
def test_a_temporary_folder_stays_only_if_it_holds_kernels(holds_kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(atexit, "register", lambda _: None)  # a process that is killed removes nothing
    monkeypatch.setattr(_nndescent, "_spare_folder", None)
    folder = Path(_nndescent._temporary_folder())
    if holds_kernels:
        (folder / "kernel.nbc").touch()
    _nndescent._import_after(subprocess.Popen(["false"]))
    assert folder.exists() == holds_kernels
    assert Path(_nndescent._temporary_folder()).exists()  # if somebody still needs one


@pytest.mark.usefixtures("pynndescent_without_a_folder")
def test_says_what_pynndescent_needs_where_no_folder_can_be_written(monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", mock.Mock(side_effect=PermissionError))
    with pytest.raises(RuntimeError, match="Set the environment variable NUMBA_CACHE_DIR"):
        NNDescentGraph(5)(torch.randn(20, 4))
    assert numba.config.CACHE_DIR == ""


def test_the_compiler_imports_from_where_its_parent_does(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "/somewhere", Path("/skipped/by/import")])
    assert _nndescent._import_path() == [os.getcwd(), "/somewhere"]


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        graphs._SMALL_POOL = 0  # pynndescent builds the graphs
        print_what_a_graph_compiles(int(sys.argv[2]), sys.argv[3] == "True")
    else:
        main(*sys.argv[1:])
