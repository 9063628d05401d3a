"""Plan: which instances make the batches of one epoch, pool after pool.

An epoch is a random permutation of the data. Its batches are consecutive pieces of it, unless pools are planned: then
each pool's piece is handed, when its first batch is about to be trained, to a planner that rearranges it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bs_lightning._checks import check_integer
from bs_lightning._types import Indices
from bs_lightning.compose import check_batches


class PoolPlanner(Protocol):
    """A pool's dataset indices ``[P]`` -> its batches, int64 ``[P // global_batch_size, global_batch_size]`` of
    positions in the pool."""

    def __call__(self, indices: Indices, *, seed: int, epoch: int) -> Indices: ...


@dataclass(frozen=True)
class BatchLayout:
    """How many batches an epoch has, and which part of each a process serves.

    Args:
        n_instances: Instances in the data set (the paper's N).
        batch_size: Instances per batch and process, at least 2.
        world_size: Processes that serve a slice each of every global batch.
        drop_last: ``False`` serves what the global batches leave over as one smaller, uniform batch at the end.

    Raises:
        TypeError: If ``batch_size`` is no integer.
        ValueError: If ``batch_size`` is below 2, the data set is smaller than a global batch, or a last batch would
            leave a process with fewer than two instances.
    """

    n_instances: int
    batch_size: int
    world_size: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        if check_integer("batch_size", self.batch_size) < 2:
            raise ValueError(
                f"batch_size must be at least 2, got {self.batch_size}: in a batch of one there are no negatives."
            )
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}.")
        if self.n_instances < self.global_batch_size:
            raise ValueError(
                f"The data set has {self.n_instances} instances, fewer than one global batch of "
                f"batch_size {self.batch_size} x {self.world_size} processes. Lower batch_size."
            )
        if 0 < self.n_last < 2 * self.world_size:
            raise ValueError(
                f"drop_last=False would leave a last batch of {self.n_last} instances for {self.world_size} "
                "processes, fewer than two for each. Use drop_last=True or another batch_size."
            )

    @property
    def global_batch_size(self) -> int:
        """Instances that all processes together train on in one step."""
        return self.batch_size * self.world_size

    @property
    def n_full(self) -> int:
        """Full global batches in an epoch."""
        return self.n_instances // self.global_batch_size

    @property
    def n_last(self) -> int:
        """Instances in the smaller batch at the epoch's end, 0 if there is none."""
        return 0 if self.drop_last else self.n_instances % self.global_batch_size

    @property
    def n_batches(self) -> int:
        """Batches in an epoch."""
        return self.n_full + (self.n_last > 0)

    def slice(self, batch: NDArray[np.integer[Any]], rank: int) -> NDArray[np.integer[Any]]:
        """The contiguous part of a global batch that process ``rank`` serves."""
        part: NDArray[np.integer[Any]] = np.array_split(batch, self.world_size)[rank]
        return part


class Pool(NamedTuple):
    """A planned pool: its place in the epoch and the dataset indices of its global batches."""

    epoch: int
    start: int  # the first batch's number in the epoch
    batches: Indices  # [n, global_batch_size]

    def serves(self, epoch: int, batch: int) -> bool:
        return self.epoch == epoch and self.start <= batch < self.start + len(self.batches)


class EpochPlan:
    """One epoch's global batches; iterating plans each pool when its first batch is asked for.

    Args:
        layout: The epoch's sizes.
        seed: Seed of the permutation and of every pool's planner.
        epoch: The epoch's number.
        start: The first batch to serve.
        stop: The batch before which the epoch ends; ``None`` is all.
        pool_size: Instances per pool, about: pools are near-equal multiples of the global batch.
        refresh_every: Instead of pools: plan the whole data set, and anew after this many batches. For planners whose
            batches may share instances.
        plan_pool: Rearranges a pool. ``None`` serves the permutation as it is: uniform batches.
        replacement: Whether the planner's batches may share instances.
        pool: A pool planned before, as a checkpoint had it; served if ``start`` falls into it.

    Attributes:
        pool: The pool being served, ``None`` in an epoch of uniform batches.
    """

    def __init__(
        self,
        layout: BatchLayout,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        stop: int | None = None,
        pool_size: int | None = None,
        refresh_every: int | None = None,
        plan_pool: PoolPlanner | None = None,
        replacement: bool = False,
        pool: Pool | None = None,
    ) -> None:
        if pool_size is not None:
            check_pool_size(pool_size, layout)
        self.layout = layout
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.stop = layout.n_batches if stop is None else min(stop, layout.n_batches)
        self.pool_size = pool_size
        self.refresh_every = refresh_every
        self.plan_pool = plan_pool
        self.replacement = replacement
        self.pool = pool
        self._order = permutation(layout.n_instances, seed, epoch)

    def global_batch(self, batch: int) -> NDArray[np.integer[Any]]:
        """The dataset indices of batch number ``batch``, which must have been planned."""
        if self.pool is not None and self.pool.serves(self.epoch, batch):
            planned: Indices = self.pool.batches[batch - self.pool.start]
            return planned
        size = self.layout.global_batch_size
        return self._order[batch * size : (batch + 1) * size]

    def __iter__(self) -> Iterator[list[NDArray[np.integer[Any]]]]:
        """Each pool's batches that are still to be served, planned at this moment."""
        size = self.layout.global_batch_size
        order = self._order
        full_stop = min(self.stop, self.layout.n_full)
        batch = self.start
        while batch < full_stop:
            if self.pool is None or not self.pool.serves(self.epoch, batch):
                self.pool = None
                end = batch + self._next_pool_length(full_stop - batch)
                piece = order[batch * size : end * size]
                if self.plan_pool is None:
                    yield list(piece.reshape(-1, size))
                    batch = end
                    continue
                if self.refresh_every is not None:
                    piece = order[: self.layout.n_full * size]
                indices = piece.astype(np.int64)
                planned = self.plan_pool(indices, seed=pool_seed(self.seed, self.epoch, batch), epoch=self.epoch)
                positions = check_batches(planned, len(indices), size, replacement=self.replacement)
                self.pool = Pool(self.epoch, batch, indices[positions[: end - batch]])
            end = min(self.pool.start + len(self.pool.batches), full_stop)
            yield list(self.pool.batches[batch - self.pool.start : end - self.pool.start])
            batch = end
        if batch < self.stop:
            yield [order[self.layout.n_full * size :]]

    def _next_pool_length(self, remaining: int) -> int:
        """Batches in the next pool. It depends on what remains alone, so that a resumed epoch cuts the same pools."""
        if self.refresh_every is not None:
            return min(self.refresh_every, remaining)
        if self.pool_size is None or self.plan_pool is None:
            return remaining
        n_pools = max(1, int(remaining * self.layout.global_batch_size / self.pool_size + 0.5))
        return -(-remaining // n_pools)


def check_pool_size(pool_size: int, layout: BatchLayout) -> None:
    """Refuse a pool that cannot hold one global batch.

    Raises:
        TypeError: If it is no integer.
        ValueError: Naming both sizes.
    """
    if check_integer("pool_size", pool_size) < layout.global_batch_size:
        raise ValueError(
            f"pool_size must be at least one global batch, {layout.global_batch_size} = batch_size "
            f"{layout.batch_size} x {layout.world_size} processes, got {pool_size}. Ten global batches suit most."
        )


def permutation(n_instances: int, seed: int, epoch: int) -> NDArray[np.integer[Any]]:
    """The random order of the data in one epoch, in the smallest integers that hold it."""
    dtype = np.int32 if n_instances <= np.iinfo(np.int32).max else np.int64
    order: NDArray[np.integer[Any]] = np.arange(n_instances, dtype=dtype)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def pool_seed(seed: int, epoch: int, batch: int) -> int:
    """The seed of the pool that begins at ``batch``: different for every pool, below 2**32."""
    return int(np.random.SeedSequence([seed, epoch, batch]).generate_state(1)[0])
