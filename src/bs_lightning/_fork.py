"""Fork: let threads that begin to run Python get through before this process is forked.

A thread that begins to run Python holds a lock of the interpreter for a moment. Before 3.11.8, CPython does not free it
in a process that is forked in that moment, and the new process waits for it forever
(https://github.com/python/cpython/issues/112275). gloo's threads begin so after each collective, to free its tensors,
and that is when the workers of a data loader are forked.
"""

import gc
import os
import sys
import time


def let_threads_through() -> None:
    """Wait until no thread holds that lock, and none is likely to take it in the next moment."""
    time.sleep(0.002)  # seconds; meanwhile the threads that need this process's interpreter have it
    collects = gc.isenabled()
    gc.disable()  # a finalizer that ran under the lock could wait for a thread that waits for the lock
    try:
        sys._current_frames()  # takes the lock, so it waits for a thread that holds it
    finally:
        if collects:
            gc.enable()


if sys.version_info < (3, 11, 8) and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=let_threads_through)
