"""Batch sampler: an epoch's plan as a ``torch.utils.data.BatchSampler``."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import BatchSampler

from bs_lightning._checks import check_integer, check_seed
from bs_lightning._embeddings import to_device
from bs_lightning._types import Indices
from bs_lightning.layout import BatchLayout
from bs_lightning.mask import pair_mask
from bs_lightning.plan import EpochPlan, Planning, pool_seed
from bs_lightning.rules import Rule, check_groups
from bs_lightning.separate import check_separable
from bs_lightning.state import SamplerState


class PoolBatchSampler(BatchSampler):
    """Serves an epoch pool after pool, and plans each pool when its first batch is asked for.

    :class:`~bs_lightning.PoolLoader` asks for that batch when it is about to be trained. A plain ``DataLoader`` works
    too. With workers, it asks for batches ``num_workers * prefetch_factor`` ahead.

    Args:
        n_instances: Length of the dataset.
        batch_size: Instances per batch and process.
        planning: How batches are composed: a planner, and which instances it plans together. ``None`` serves uniform
            batches. You may set the attribute between two epochs.
        drop_last: ``False`` serves the remainder as a smaller, uniform batch at the end.
        seed: The same seed gives the same pools.
        rules: Which pairs of a batch are likely false negatives, beside those that the planner finds.
        groups: Each instance's group, integers ``[N]``: one each. No batch holds two instances of a group.
        rank: This process's number.
        world_size: Number of processes. Each serves its own slice of every global batch.

    Raises:
        TypeError: If a number is not an integer, or ``planning`` is not a :class:`~bs_lightning.Planning`.
        ValueError: If an argument is out of range, or two sizes do not fit. The message names both sizes.

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
        rules: Sequence[Rule] = (),
        groups: ArrayLike | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.layout = BatchLayout(n_instances, batch_size, world_size, drop_last)
        super().__init__(range(n_instances), self.layout.batch_size, drop_last)
        if planning is not None:
            if not isinstance(planning, Planning):
                raise TypeError(f"planning must be Planning(plan_pool, Pools(size)) or None, got {planning!r}.")
            planning.cut.check(self.layout)
        self.rank = self.layout.check_rank(rank)
        self.rules = tuple(rules)
        self.groups = None if groups is None else check_groups(groups)
        self.groups_digest = 0
        if self.groups is not None:
            if len(self.groups) != n_instances:
                raise ValueError(f"groups must have length {n_instances}, got {len(self.groups)}.")
            check_separable(self.groups, self.layout.n_full)
            self.groups_digest = zlib.crc32(self.groups.tobytes()) + 1
        self.planning = planning
        self.seed = check_seed(seed)
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
        """Choose the epoch that the next iteration serves.

        Call it before each iteration, as with a ``DistributedSampler``.

        Args:
            epoch: The epoch's number.

        Raises:
            TypeError: If ``epoch`` is not an integer.
            ValueError: If it is negative.
        """
        epoch = check_integer("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch = epoch
            self._loaded = None

    @property
    def served(self) -> int:
        """Number of batches of the epoch that were served so far."""
        if self._loaded is not None:
            return self._loaded.served
        return self._plan.served if self._plan is not None and self._plan.epoch == self.epoch else 0

    def pools(self, plan: EpochPlan) -> Iterator[Iterator[list[int]]]:
        """Yield each pool's batches, as this process serves them.

        A pool is planned when it is asked for. The caller must count ``plan.served``.

        Args:
            plan: The plan of the iteration.

        Yields:
            For each pool, an iterator over its batches: lists of dataset indices.
        """
        for pool in plan:
            # Convert one batch at a time: lists of Python integers are ten times as large as arrays.
            yield (self.layout.slice(batch, self.rank).tolist() for batch in pool)

    @property
    def has_planned(self) -> bool:
        """Whether an iteration has begun. Until then, the state is as a checkpoint had it."""
        return self._plan is not None

    def plan(self) -> EpochPlan:
        """Begin an iteration, and return its plan.

        Returns:
            The plan of the whole epoch, or after :meth:`load_state_dict`, of the rest of the epoch.
        """
        state, self._loaded = self._loaded, None
        start = 0
        if state is not None:
            start = state.served if state.served < state.stop else len(self)
        self._plan = EpochPlan(
            self.layout,
            seed=self.seed,
            epoch=self.epoch,
            start=start,
            planning=self.planning,
            pool=None if state is None else state.pool,
            groups=self.groups,
        )
        return self._plan

    def trained_batch(self) -> Indices | None:
        """Return the dataset indices of the global batch that was served last.

        With :class:`~bs_lightning.PoolLoader`, this is the batch being trained. A plain ``DataLoader`` with workers is
        served ahead of training.

        Returns:
            int64 ``[B]``; ``None`` before the first batch.
        """
        batch = self._trained_batch_number()
        return None if batch is None or self._plan is None else self._plan.global_batch(batch).astype(np.int64)

    def likely_false_negatives(self, device: torch.device | None = None) -> Tensor | None:
        """Return which pairs of :meth:`trained_batch` are likely false negatives, by the planner or by a rule.

        Args:
            device: The mask's device; ``None`` is the CPU.

        Returns:
            bool ``[B, B]``, row ``i`` for the anchor ``i``, ``False`` on the diagonal; ``None`` before the first batch.
            The planner finds pairs only in composed batches.
        """
        number = self._trained_batch_number()
        if number is None or self._plan is None:
            return None
        batch = self._plan.global_batch(number).astype(np.int64)
        mask = to_device(pair_mask(self._plan.pairs(number), batch), device)
        for rule in self.rules:
            mask |= rule.in_batch(batch, device)
        return mask.fill_diagonal_(False)

    def _trained_batch_number(self) -> int | None:
        """Return the number of the batch that was served last in its epoch, or ``None`` before the first batch."""
        return None if self._plan is None or self.served <= self._plan.start else self.served - 1

    def worker_seed(self) -> int:
        """Return the seed for the data loader's workers in this epoch.

        Returns:
            A seed that is different on every rank.
        """
        return pool_seed(self.seed, self.epoch, len(self) + self.rank)  # no pool starts at such a batch number

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training for a checkpoint.

        Returns:
            Tensors and plain Python values, about as large as a pool.
        """
        return self.state().to_dict()

    def state(self) -> SamplerState:
        """Return the position of training within the epoch.

        Returns:
            The loaded state until an iteration begins, then the current state.
        """
        if self._loaded is not None:  # nothing was served since it was loaded
            return self._loaded
        plan = self._plan
        return SamplerState(
            seed=self.seed,
            n_instances=self.layout.n_instances,
            global_batch_size=self.layout.global_batch_size,
            n_batches=len(self),
            epoch=self.epoch,
            served=self.served,
            stop=len(self) if plan is None or plan.epoch != self.epoch else plan.stop,
            in_pool=plan is not None and plan.pool is not None and plan.pool.epoch == self.epoch,
            pool=None if plan is None else plan.pool,
            groups=self.groups_digest,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on where a state was taken.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is damaged, or was taken within an epoch over different data or with a different
                global batch size.
            TypeError: If a value of the state has a wrong type.
        """
        state = SamplerState.from_dict(state_dict)
        if state.mid_epoch:
            state.check_same_batches(self.layout, self.groups_digest)
            state.check_position(state.epoch, state.served)
        self._loaded, self._plan = state, None
        self.seed = state.seed
        self.epoch = state.epoch
