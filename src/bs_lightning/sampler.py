"""Batch sampler: an epoch's plan as a ``torch.utils.data.BatchSampler``."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler

from bs_lightning._checks import check_integer, check_seed
from bs_lightning.plan import BatchLayout, EpochPlan, Pool, PoolPlanner, check_pool_size, pool_seed


class PoolBatchSampler(BatchSampler):
    """Serves an epoch pool after pool, each planned when its first batch is asked for.

    With :class:`~bs_lightning.PoolLoader` that is when the batch is about to be trained. A plain ``DataLoader`` works
    too; with workers it asks ``num_workers * prefetch_factor`` batches ahead.

    Args:
        n_instances: Length of the data set.
        batch_size: Instances per batch and process.
        pool_size: Instances per pool, about; at least one global batch.
        plan_pool: ``plan_pool(indices, seed=..., epoch=...)`` gets a pool's dataset indices, int64 ``[P]``, and
            returns its batches as positions in it, int64 ``[P // global batch, global batch]``. ``None`` serves
            uniform batches.
        drop_last: ``False`` serves the remainder as a smaller, uniform batch at the end.
        replacement: Whether the planned batches may share instances.
        seed: The same seed gives the same pools.
        rank: This process's number.
        world_size: Processes that serve a slice each of every global batch.

    Attributes:
        served: Batches of the epoch served so far.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is no integer.
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
        pool_size: int | None = None,
        plan_pool: PoolPlanner | None = None,
        drop_last: bool = True,
        replacement: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        batch_size = check_integer("batch_size", batch_size)
        self.layout = BatchLayout(n_instances, batch_size, world_size, drop_last)
        super().__init__(range(n_instances), batch_size, drop_last)
        if plan_pool is not None and pool_size is None:
            raise ValueError("pool_size must be given with plan_pool: how many instances to plan together.")
        if plan_pool is not None and pool_size is not None:
            check_pool_size(pool_size, self.layout)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}.")
        self.pool_size = pool_size
        self.plan_pool = plan_pool
        self.replacement = replacement
        self.seed = check_seed(seed)
        self.rank = rank
        self.epoch = 0
        self.served = 0
        self._plan: EpochPlan | None = None
        self._loaded: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.layout.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        for pool in self.pools():
            for batch in pool:
                self.served += 1
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration serves. Call it before each, as with a ``DistributedSampler``."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.served = 0
            self._loaded = None

    def pools(self) -> Iterator[Iterator[list[int]]]:
        """This process's part of each pool's batches, planned when asked for."""
        plan = self.plan()
        self.served = plan.start
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
            ended = state["served"] >= state["n_batches"]
            start = len(self) if ended else state["served"]
        self._plan = EpochPlan(
            self.layout,
            seed=self.seed,
            epoch=self.epoch,
            start=start,
            pool_size=self.pool_size,
            plan_pool=self.plan_pool,
            replacement=self.replacement,
            pool=None if state is None else pool_from_state(state),
        )
        return self._plan

    def worker_seed(self) -> int:
        """Seed for the data loader's workers in this epoch, another on every rank."""
        return pool_seed(self.seed, self.epoch, len(self) + self.rank)  # no pool starts there

    def state_dict(self) -> dict[str, Any]:
        """Where training is: tensors and plain Python, as large as a pool."""
        if self._loaded is not None:  # nothing was served since
            pool = pool_from_state(self._loaded)
        else:
            pool = None if self._plan is None else self._plan.pool
        return {
            "seed": self.seed,
            "n_instances": self.layout.n_instances,
            "global_batch_size": self.layout.global_batch_size,
            "n_batches": len(self),
            "epoch": self.epoch,
            "served": self.served,
            "pool": None
            if pool is None
            else {"epoch": pool.epoch, "start": pool.start, "batches": torch.from_numpy(pool.batches)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on where ``state_dict`` was taken.

        Raises:
            ValueError: If it was taken within an epoch over other data or with another global batch size.
        """
        if 0 < state_dict["served"] < state_dict["n_batches"]:
            check_same_batches(state_dict, self.layout)
        self._loaded = state_dict
        self.seed = state_dict["seed"]
        self.epoch = state_dict["epoch"]
        self.served = state_dict["served"]


def pool_from_state(state: dict[str, Any]) -> Pool | None:
    """The pool that was being served when a state was taken."""
    pool = state["pool"]
    return None if pool is None else Pool(pool["epoch"], pool["start"], pool["batches"].cpu().numpy())


def check_same_batches(state: dict[str, Any], layout: BatchLayout) -> None:
    """Refuse to go on within an epoch whose batches were cut from other data or in another size.

    Raises:
        ValueError: Naming what differs, was and is.
    """
    for name in ("n_instances", "global_batch_size"):
        was, now = state[name], getattr(layout, name)
        if was != now:
            raise ValueError(
                f"The checkpoint was taken in the middle of an epoch with {name}={was}, now it is {now}: instances "
                f"would be lost or repeated. Resume with {was}, or from a checkpoint that was taken between two epochs "
                "(as with ModelCheckpoint(save_on_train_epoch_end=True), not after an epoch's last batch)."
            )
