"""Batch sampler: an epoch's plan as a ``torch.utils.data.BatchSampler``."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler

from bs_lightning._checks import check_integer, check_seed
from bs_lightning._types import Indices
from bs_lightning.layout import BatchLayout
from bs_lightning.mask import pair_mask
from bs_lightning.plan import EpochPlan, Planning, pool_seed
from bs_lightning.state import SamplerState


class PoolBatchSampler(BatchSampler):
    """Serves an epoch pool after pool, each planned when its first batch is asked for.

    With :class:`~bs_lightning.PoolLoader` that is when the batch is about to be trained. A plain ``DataLoader`` works
    too. With workers it asks for batches ``num_workers * prefetch_factor`` ahead.

    Args:
        n_instances: Length of the dataset.
        batch_size: Instances per batch and process.
        planning: How batches are composed: a planner, and what it plans together. ``None`` serves uniform batches.
            You may set the attribute between two epochs.
        drop_last: ``False`` serves the remainder as a smaller, uniform batch at the end.
        seed: The same seed gives the same pools.
        rank: This process's number.
        world_size: Processes that serve a slice each of every global batch.

    Raises:
        TypeError: If a number is not an integer, or ``planning`` is not a :class:`~bs_lightning.Planning`.
        ValueError: If a size does not fit; the message names both.

    Example:
        >>> from bs_lightning import PoolBatchSampler
        >>> sampler = PoolBatchSampler(10, batch_size=4, seed=1)
        >>> len(sampler), sorted(len(set(batch)) for batch in sampler)
        (2, [4, 4])
    """

    def __init__(
        self,
        n_instances: int,
        batch_size: int,
        *,
        planning: Planning | None = None,
        drop_last: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # Plain integers: products of NumPy's small integers overflow.
        n_instances = check_integer("n_instances", n_instances)
        batch_size, world_size = check_integer("batch_size", batch_size), check_integer("world_size", world_size)
        self.layout = BatchLayout(n_instances, batch_size, world_size, drop_last)
        super().__init__(range(n_instances), batch_size, drop_last)
        if planning is not None:
            if not isinstance(planning, Planning):
                raise TypeError(f"planning must be Planning(plan_pool, Pools(size)) or None, got {planning!r}.")
            planning.cut.check(self.layout)
        if not 0 <= check_integer("rank", rank) < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}.")
        self.planning = planning
        self.seed = check_seed(seed)
        self.rank = rank
        self.epoch = 0
        self._plan: EpochPlan | None = None
        self._loaded: SamplerState | None = None

    def __len__(self) -> int:
        return self.layout.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan()
        for pool in self.pools(plan):
            for batch in pool:
                plan.served += 1
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration serves. Call it before each, as with a ``DistributedSampler``.

        Raises:
            TypeError: If ``epoch`` is not an integer.
            ValueError: If it is negative.
        """
        epoch = check_integer("epoch", epoch)
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}.")
        if epoch != self.epoch:
            self.epoch = epoch
            self._loaded = None

    @property
    def served(self) -> int:
        """Batches of the epoch served so far."""
        if self._loaded is not None:
            return self._loaded.served
        return self._plan.served if self._plan is not None and self._plan.epoch == self.epoch else 0

    def pools(self, plan: EpochPlan) -> Iterator[Iterator[list[int]]]:
        """This process's part of each pool's batches, planned when asked for. The caller counts ``plan.served``."""
        for pool in plan:
            # Lists of Python integers are ten times as large as arrays: one batch at a time.
            yield (self.layout.slice(batch, self.rank).tolist() for batch in pool)

    @property
    def has_planned(self) -> bool:
        """Whether an iteration has begun, so that the state is not that of a checkpoint any more."""
        return self._plan is not None

    def plan(self) -> EpochPlan:
        """The plan of one iteration: the whole epoch, or after ``load_state_dict`` what was left of it."""
        state, self._loaded = self._loaded, None
        start = 0
        if state is not None:
            start = state.served if state.served < state.n_batches else len(self)
        self._plan = EpochPlan(
            self.layout,
            seed=self.seed,
            epoch=self.epoch,
            start=start,
            planning=self.planning,
            pool=None if state is None else state.pool,
        )
        return self._plan

    def trained_batch(self) -> Indices | None:
        """The dataset indices of the global batch that was served last, int64 ``[B]``; ``None`` before the first.

        It is the batch being trained where :class:`~bs_lightning.PoolLoader` loads. The workers of a plain
        ``DataLoader`` are served ahead of training.
        """
        batch = self._trained_batch_number()
        return None if batch is None or self._plan is None else self._plan.global_batch(batch).astype(np.int64)

    def likely_false_negatives(self) -> Tensor | None:
        """Which pairs of :meth:`trained_batch` the planner called likely false negatives.

        Returns:
            bool ``[B, B]``, symmetric, false on the diagonal and throughout uniform batches; ``None`` before the first
            batch.
        """
        batch = self._trained_batch_number()
        if batch is None or self._plan is None:
            return None
        return pair_mask(self._plan.pairs(batch), self._plan.global_batch(batch))

    def _trained_batch_number(self) -> int | None:
        """The number in its epoch of the batch that was served last."""
        return None if self._plan is None or self.served <= self._plan.start else self.served - 1

    def worker_seed(self) -> int:
        """Seed for the data loader's workers in this epoch, another on every rank."""
        return pool_seed(self.seed, self.epoch, len(self) + self.rank)  # no pool starts there

    def state_dict(self) -> dict[str, Any]:
        """Where training is: tensors and plain Python, as large as a pool."""
        return self.state().to_dict()

    def state(self) -> SamplerState:
        """Where training is."""
        if self._loaded is not None:  # nothing was served since
            return self._loaded
        plan = self._plan
        return SamplerState(
            seed=self.seed,
            n_instances=self.layout.n_instances,
            global_batch_size=self.layout.global_batch_size,
            n_batches=len(self),
            epoch=self.epoch,
            served=self.served,
            composed=plan is not None and plan.epoch == self.epoch and plan.planning is not None,
            pool=None if plan is None else plan.pool,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on where ``state_dict`` was taken.

        Raises:
            ValueError: If the state is damaged, or was taken within an epoch over different data or with a different
                global batch size.
            TypeError: If a value of the state has a wrong type.
        """
        state = SamplerState.from_dict(state_dict)
        if state.mid_epoch:
            state.check_same_batches(self.layout)
            state.check_position(state.epoch, state.served)
        self._loaded = state
        self.seed = state.seed
        self.epoch = state.epoch
