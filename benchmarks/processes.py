"""New processes, and what they take: seconds and memory. Memory is read from /proc, so on Linux only."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a new process, so that what an earlier call has left there does not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def measured(function: Callable[[], Result]) -> tuple[Result, float, int]:
    """Call a function, and return its result, its seconds, and the bytes by which memory grew at its peak."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start, memory("VmHWM") - before


def memory(field: str) -> int:
    """Return the process's memory in bytes: now ("VmRSS") or at its peak ("VmHWM")."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].removesuffix("kB")) * 1024
