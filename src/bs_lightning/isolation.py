"""Isolation: run code and leave no trace of it in training."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore it on exit.

    Restores the train or eval mode of each submodule, buffers (batch-norm statistics, queues of a momentum encoder),
    attributes that were set, the states of ``torchmetrics`` metrics, and the random states of Python, NumPy, torch and
    the current CUDA device. Errors inside change nothing in this.

    Args:
        module: The module that encodes inside.

    Example:
        >>> import torch
        >>> from bs_lightning.isolation import no_trace
        >>> norm = torch.nn.BatchNorm1d(3)
        >>> with no_trace(norm):
        ...     norm.training
        False
        >>> norm.training
        True
    """
    restore = [_snapshot(part) for part in module.modules()]
    with isolated_rng():
        try:
            module.eval()
            yield
        finally:
            with torch.no_grad():
                for restore_part in restore:
                    restore_part()


def _snapshot(part: nn.Module) -> Callable[[], None]:
    """Return a function that restores this module (not its submodules) to its current state."""
    kind, training = type(part), part.training
    attributes, buffers = dict(part.__dict__), dict(part._buffers.items())
    states = list(part.metric_state.values()) if isinstance(part, Metric) else []
    tensors = [value for value in (*buffers.values(), *states) if isinstance(value, Tensor)]
    copies = [(value, value.clone()) for value in tensors if not is_lazy(value)]
    lists = [(value, list(value)) for value in states if isinstance(value, list)]

    def restore() -> None:
        part.training = training
        if type(part) is not kind:  # a lazy module has become a real one
            return
        for name in part.__dict__.keys() - attributes.keys():
            del part.__dict__[name]
        for name, value in attributes.items():
            part.__dict__[name] = value
        for name, value in buffers.items():
            setattr(part, name, value)
        for value, before in copies:
            # Views and tensors made in inference mode cannot be written to: leave unchanged tensors alone.
            if not torch.equal(value, before):
                value.copy_(before)
        for values, earlier in lists:
            values[:] = earlier

    return restore


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch and the current CUDA device on exit, after errors too."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def isolated_threads() -> Iterator[None]:
    """Restore the numbers of threads and the choice of numba's threading layer on exit, after errors too.

    Covers the threads of torch, of numba, and of each OpenMP and BLAS library that is loaded on entry. Sets only
    numbers that have changed. The choice of layer is ``numba.config.THREADING_LAYER``. If numba starts its threads
    inside, they stay on their layer: numba cannot stop them.

    Example:
        >>> import torch
        >>> from bs_lightning.isolation import isolated_threads
        >>> before = torch.get_num_threads()
        >>> with isolated_threads():
        ...     torch.set_num_threads(before + 1)
        >>> torch.get_num_threads() == before
        True
    """
    import numba  # slow to import: not before the first graph or walk

    config: Any = numba.config
    torch_threads = torch.get_num_threads()
    numba_layer = config.THREADING_LAYER
    # To ask numba for its number of threads starts them. It starts with the number that its configuration says.
    numba_threads = config.NUMBA_NUM_THREADS if numba_threading_layer() is None else numba.get_num_threads()
    libraries = [(library, library.num_threads) for library in ThreadpoolController().lib_controllers]
    try:
        yield
    finally:
        for library, n_threads in libraries:
            if library.num_threads != n_threads:
                library.set_num_threads(n_threads)
        if torch.get_num_threads() != torch_threads:
            torch.set_num_threads(torch_threads)
        if numba_threading_layer() is not None and numba.get_num_threads() != numba_threads:
            numba.set_num_threads(numba_threads)
        config.THREADING_LAYER = numba_layer


def numba_threading_layer() -> str | None:
    """Return the threading layer on which numba has started its threads, or ``None`` if it has started none."""
    numba = sys.modules.get("numba")
    if numba is None:
        return None
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None
