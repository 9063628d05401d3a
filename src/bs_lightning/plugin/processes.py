"""Processes: the messages between a Trainer's processes."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from bs_lightning._types import Indices

_T = TypeVar("_T")
PerInstance = TypeVar("PerInstance", Indices, Tensor)


def own_share(trainer: Trainer, pool: PerInstance) -> PerInstance:
    """Return this process's contiguous part of a pool, which holds whole global batches.

    Args:
        trainer: The Trainer.
        pool: An array or a tensor with an entry for each of the ``P`` instances.

    Returns:
        The entries of ``P / world_size`` instances.
    """
    size = len(pool) // trainer.world_size
    return pool[trainer.global_rank * size :][:size]


def gather(trainer: Trainer, value: _T) -> list[_T]:
    """Return the values of all processes. Each process must call it.

    Args:
        trainer: The Trainer.
        value: This process's value, which must be picklable.

    Returns:
        The values, in the order of the ranks.
    """
    if trainer.world_size == 1:
        return [value]
    values: list[_T | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def gather_rows(trainer: Trainer, rows: Tensor) -> Tensor:
    """Return the rows of all processes, as many of each. Each process must call it.

    Args:
        trainer: The Trainer.
        rows: This process's rows, ``[n, ...]``.

    Returns:
        The rows in the order of the ranks, on the device of training, as NCCL needs them.
    """
    own = rows.to(trainer.strategy.root_device).contiguous()
    everyone = [torch.empty_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(everyone, own)
    return torch.cat(everyone)


def cores_of_one_process(trainer: Trainer) -> int:
    """Return this process's share of its cores. Each process must call it.

    Processes of a machine that may run on the same cores divide them.

    Args:
        trainer: The Trainer.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    machine = platform.node()
    everywhere = gather(trainer, (machine, cores))
    n_sharing = sum(other == machine and not cores.isdisjoint(theirs) for other, theirs in everywhere)
    return max(len(cores) // n_sharing, 1)


def check_equal(trainer: Trainer, **values: Any) -> None:
    """Refuse to go on if the processes differ. Each process must call it.

    Args:
        trainer: The Trainer.
        **values: Values that must be equal in all processes, by name.

    Raises:
        ValueError: In all processes, if a value differs. The message gives its name and each process's value.
    """
    everywhere = gather(trainer, values)
    for name in values:
        seen = [each[name] for each in everywhere]
        if any(value != seen[0] for value in seen):
            listed = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(seen))
            raise ValueError(
                f"All processes must have the same {name}, got {listed}. Give every process the whole dataset, in "
                "the same order, and the same settings: each serves its own slice of every batch."
            )


@contextmanager
def failing_together(trainer: Trainer) -> Iterator[None]:
    """Stop all processes if one of them fails, so that no process waits for it forever.

    Args:
        trainer: The Trainer.

    Raises:
        RuntimeError: In the processes that did not fail, with the error of a process that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as exception:
        if isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
            raise  # the others wait inside the sharded forward pass, and do not reach the exchange below
        error = exception
    if trainer.strategy.reduce_boolean_decision(error is None):
        return
    texts = gather(trainer, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    raise RuntimeError(f"The process of rank {rank} failed to plan a pool. {text}")
