"""Count processes that hang because they were forked while a thread began to run Python.

    python -m benchmarks.forks

CPython before 3.11.8 does not free a lock of the interpreter in a forked process. Threads of gloo hold it for a moment
after each collective. Here 24 native threads do so in the milliseconds around each fork. One process forks as CPython
does. A second one, at the same time, forks after a pause as with ``bs_lightning``: such threads get through in it.

The script prints a table row for each of them. A forked process that has not ended after 2 seconds counts as hanging.
"""

import ctypes
import os
import subprocess
import sys
import time
from random import random
from typing import NoReturn

from .command_line import make_parser

N_THREADS = 24
SPREAD = 300e-6  # seconds within which the threads begin
PATIENCE = 2.0  # seconds after which a forked process counts as hanging


def fork(seconds: float, pauses: bool) -> NoReturn:
    """Fork for some time in this process, and print the table row."""
    if pauses:
        import bs_lightning  # noqa: F401  mends forks
    else:
        import lightning.pytorch  # noqa: F401  as large a process
    libc = ctypes.CDLL(None, use_errno=True)
    begin = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: None)
    forks = hangs = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(N_THREADS):
            thread = ctypes.c_ulong()
            libc.pthread_create(ctypes.byref(thread), None, begin, None)
            libc.pthread_detach(thread)
        wait = time.perf_counter() + random() * SPREAD
        while time.perf_counter() < wait:
            pass
        child = os.fork()
        if child == 0:
            os._exit(0)
        forks += 1
        hangs += not ends(child)
    how = "after a pause" if pauses else "as CPython does"
    print(f"| {how} | {forks} | {hangs} |", flush=True)
    os._exit(0)  # threads may still begin


def ends(child: int) -> bool:
    """Wait for a forked process; kill it if it hangs."""
    late = time.monotonic() + PATIENCE
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > late:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return False
        time.sleep(0.0005)
    return True


def main() -> None:
    """Fork in two processes at the same time."""
    parser = make_parser("forks", __doc__)
    parser.add_argument("--seconds", type=float, default=300, help="how long both processes fork")
    parser.add_argument("--how", choices=["cpython", "library"], help="fork in this process")
    arguments = parser.parse_args()
    if arguments.how is not None:
        fork(arguments.seconds, arguments.how == "library")
    print("| forks | of them | hang |\n|---|---|---|", flush=True)
    command = [sys.executable, "-m", "benchmarks.forks", "--seconds", str(arguments.seconds), "--how"]
    for process in [subprocess.Popen([*command, how]) for how in ("cpython", "library")]:
        process.wait()


if __name__ == "__main__":
    main()
