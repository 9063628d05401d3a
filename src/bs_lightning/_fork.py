"""Fork: pause before this process is forked, so that threads that begin to run Python get through.

A thread that begins to run Python holds a lock of the interpreter for a moment. Before 3.11.8, CPython does not free it
in a process that is forked in that moment, and the new process waits for it forever
(https://github.com/python/cpython/issues/112275). gloo's threads begin so after each collective, to free its tensors,
and that is when the workers of a data loader are forked.
"""

import os
import sys
import time
from functools import partial

_PAUSE = 0.002  # seconds

if sys.version_info < (3, 11, 8) and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=partial(time.sleep, _PAUSE))
