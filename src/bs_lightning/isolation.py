"""Isolation: run code and leave no trace of it in training."""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import LibController, ThreadpoolController
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchmetrics import Metric


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore it bit for bit on exit.

    Restores what the code inside and ``eval()`` change of the module: modes; parameters, buffers and all other tensors
    that it holds in attributes, also in lists, tuples and dictionaries; ``requires_grad``; attributes that are set;
    the states of ``torchmetrics`` metrics; and the random states of Python, NumPy, torch, the current CUDA device and
    the device of the first parameter. A list, dictionary or set that is changed in place stays changed, but for the
    tensors in it. Errors inside change nothing in this. A module whose ``train()`` is overridden gets its mode
    back by a call of it.

    Needs memory for a second copy of the module's tensors, on their devices, until it exits. No other thread may use
    the module meanwhile.

    Args:
        module: The module that encodes inside.

    Raises:
        RuntimeError: On exit, if gradients or sparse tensors of the module were written to: no copies of them exist.

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
    modes = [(part, part.training) for part in module.modules()]
    restore = _snapshot(module)
    with isolated_rng(next((parameter.device for parameter in module.parameters()), None)):
        try:
            module.eval()
            yield
        finally:
            try:
                # An overridden train() may also have changed what is not a tensor. A parent passes its mode on to its
                # submodules, so it comes first.
                for part, training in modes:
                    if part.training != training:
                        part.train(training)
            finally:
                written = restore()
    if written:
        more = f" and to {len(written) - 1} more" if len(written) > 1 else ""
        raise RuntimeError(
            f"While {type(module).__name__} encoded, it wrote to {written[0]}{more}. This cannot be undone: no copies "
            "of gradients and sparse tensors are kept. Give it a method embed(batch) that does not write to them."
        )


def _snapshot(module: nn.Module) -> Callable[[], list[str]]:
    """Return a function that restores a module to its current state, and returns names of what it cannot restore."""
    parts, tensors = _held(module)
    plain = [tensor for _, tensor in tensors if _has_bytes(tensor)]
    restores = [_bytes(plain)]
    restores += [_names(part) for part in parts]
    restores += [_place(tensor) for tensor in plain]
    restores += [_gradient(tensor) for _, tensor in tensors if tensor.is_leaf]
    watched = [
        *((f"the gradient of {name}", leaf.grad) for name, leaf in tensors if leaf.is_leaf and leaf.grad is not None),
        *((name, tensor) for name, tensor in tensors if tensor.layout in _SPARSE and not tensor.is_inference()),
    ]
    versions = [(name, tensor, tensor._version) for name, tensor in watched]

    def restore() -> list[str]:
        with torch.no_grad():
            for restore_one in restores:
                restore_one()
        return [name for name, tensor, version in versions if tensor._version != version]

    return restore


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_HOLDERS = (nn.Module, Tensor, dict, list, tuple, set, deque)
_CONTAINERS = {dict, OrderedDict, list, tuple, set, deque}
_PLAIN = {bool, int, float, str}
_SMALL = 2**20  # bytes of memory that is copied together with others: for all of a large model there may be no room


def _held(module: nn.Module) -> tuple[list[nn.Module], list[tuple[str, Tensor]]]:
    """Return the modules that a module holds, itself included, and the tensors that they hold, with names.

    Looks into attributes, and into lists, tuples, sets and dictionaries. Some tensors, sharded or quantised, are made
    of inner tensors. The inner tensors are returned, too.
    """
    parts: list[nn.Module] = []
    tensors: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    found: list[tuple[str, Any]] = [("", module)]
    for name, value in found:  # grows in the loop
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, nn.Module):
            parts.append(value)
            registries = (value._parameters, value._buffers, value._modules)
            inner = [pair for names in (*registries, vars(value)) for pair in names.items()]
            seen.update(map(id, registries))  # they are attributes, too
        elif isinstance(value, Tensor):
            if not is_lazy(value) and not value.is_meta:
                tensors.append((name, value))
                if is_traceable_wrapper_subclass(value):
                    inner = ((attribute, getattr(value, attribute)) for attribute in value.__tensor_flatten__()[0])
        elif isinstance(value, dict):
            inner = value.items()
        else:
            inner = enumerate(value)
        for key, each in inner:
            # Most attributes hold nothing, and among them are a dozen empty dictionaries in each module.
            if each is None or each.__class__ in _PLAIN or (each.__class__ in _CONTAINERS and not each):
                continue
            if isinstance(each, _HOLDERS):
                found.append((f"{name}.{key}" if name else str(key), each))
    return parts, tensors


def _registries(part: nn.Module) -> list[dict[str, Any]]:
    """Return where a module keeps its parameters, buffers and submodules, by name."""
    return [part._parameters, part._buffers, part._modules]


def _registered(part: nn.Module) -> list[dict[str, Any]]:
    """Return a module's parameters, buffers and submodules, by name, as they are now."""
    return [dict(registry.items()) for registry in _registries(part)]


def _has_bytes(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own: not sparse, not made of inner tensors, not empty."""
    if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() > 0


def _names(part: nn.Module) -> Callable[[], None]:
    """Return a function that sets a module's attributes, parameters, buffers and submodules to the current objects."""
    kind, training, attributes = type(part), part.training, dict(vars(part))
    registered = _registered(part)
    states = list(part.metric_state.values()) if isinstance(part, Metric) else []
    lists = [(value, list(value)) for value in states if isinstance(value, list)]

    def restore() -> None:
        if part.training != training:
            part.training = training
        if type(part) is not kind:  # a lazy module has become a real one
            return
        for name in vars(part).keys() - attributes.keys():
            del part.__dict__[name]
        part.__dict__.update(attributes)
        for now, before in zip(_registered(part), registered, strict=True):
            for name in now.keys() - before.keys():
                delattr(part, name)
            for name, value in before.items():
                current = now.get(name)
                if current is value:
                    continue
                # FSDP swaps a parameter for its sharded or gathered form, and keeps account of it.
                if is_traceable_wrapper_subclass(current) == is_traceable_wrapper_subclass(value):
                    setattr(part, name, value)
        for registry, before in zip(_registries(part), registered, strict=True):
            if list(registry) != list(before) and registry.keys() == before.keys():
                for name in before:  # in the order of before: it is the order of `parameters()`
                    registry[name] = registry.pop(name)
        for values, earlier in lists:
            values[:] = earlier

    return restore


def _place(tensor: Tensor) -> Callable[[], None]:
    """Return a function that lets a tensor refer to its current memory again, if ``tensor.data`` has been assigned."""
    if tensor.is_nested:
        return lambda: None  # it has no one shape to compare

    def place() -> tuple[Any, ...]:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

    data, before = tensor.data, place()

    def restore() -> None:
        if place() != before:
            tensor.data = data

    return restore


def _gradient(leaf: Tensor) -> Callable[[], None]:
    """Return a function that sets a tensor's ``requires_grad`` and ``grad`` to what they are now."""
    requires_grad, grad = leaf.requires_grad, leaf.grad

    def restore() -> None:
        if leaf.requires_grad != requires_grad:
            leaf.detach_().requires_grad_(requires_grad)
        if leaf.grad is not grad:
            leaf.grad = grad

    return restore


def _bytes(tensors: list[Tensor]) -> Callable[[], None]:
    """Return a function that restores the memory of tensors, bit for bit. Memory that they share is copied once."""
    every = sorted((tensor.untyped_storage() for tensor in tensors), key=lambda storage: storage.nbytes())
    storages = {storage.data_ptr(): storage for storage in every}.values()  # of one address, the largest
    sizes = [storage.nbytes() for storage in storages]
    alike: dict[Any, list[Tensor]] = {}
    for memory in map(_integers, storages):
        alike.setdefault((memory.device, memory.dtype, memory.nbytes <= _SMALL), []).append(memory)
    copies = [(memories, _copied(memories)) for memories in alike.values()]

    def restore() -> None:
        for storage, size in zip(storages, sizes, strict=True):
            if storage.nbytes() != size:
                storage.resize_(size)
        for memories, before in copies:
            if memories[0].is_cuda:
                torch._foreach_copy_(memories, before)  # each comparison would wait for the GPU
                continue
            for memory, earlier in zip(memories, before, strict=True):
                # Unchanged memory is not written to: it may be read-only, or shared with forked workers.
                if not torch.equal(memory, earlier):
                    memory.copy_(earlier)

    return restore


def _copied(memories: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors of one dimension. On a GPU, one copy of small ones saves the start of many kernels."""
    if memories[0].is_cuda and memories[0].nbytes <= _SMALL:
        return list(torch.cat(memories).split([len(memory) for memory in memories]))
    return [memory.clone() for memory in memories]


def _integers(storage: torch.UntypedStorage) -> Tensor:
    """Return all of a storage as integers, without a copy. As integers, NaN equals NaN, and -0.0 differs from 0.0."""
    dtype = next(d for d in (torch.int64, torch.int32, torch.uint8) if storage.nbytes() % d.itemsize == 0)
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


@contextmanager
def isolated_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch, the current CUDA device and ``device``, after errors too."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Training on a CPU must not start CUDA: that takes memory of a GPU, and forked workers could not use it.
    devices = {torch.cuda.current_device()} if torch.cuda.is_initialized() else set()
    if device is not None and device.type == "cuda":
        devices.add(torch.cuda.current_device() if device.index is None else device.index)
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def isolated() -> Iterator[None]:
    """Restore random states and numbers of threads: composers and graphs of others may change both."""
    with isolated_rng(), isolated_threads():
        yield


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
    libraries = [(library, library.num_threads) for library in _libraries(len(sys.modules))]
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


@lru_cache(maxsize=1)
def _libraries(n_modules: int) -> list[LibController]:
    """Return the OpenMP and BLAS libraries that are loaded. To look for them takes longer than a small graph.

    Args:
        n_modules: Number of imported modules. Libraries are loaded by imports, so they are looked for once for each.
    """
    libraries: list[LibController] = ThreadpoolController().lib_controllers
    return libraries


def numba_threading_layer() -> str | None:
    """Return the threading layer on which numba has started its threads, or ``None`` if it has started none."""
    numba = sys.modules.get("numba")
    if numba is None:
        return None
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None
