"""Plan: which instances make the batches of one epoch, pool after pool.

An epoch is a random permutation of the dataset. Its batches are consecutive pieces of the permutation. A planner, if
there is one, rearranges each pool when the pool's first batch is asked for: when that batch is about to be trained, or
ahead of it where that changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from bs_lightning._checks import check_instance_callable, check_integer_array
from bs_lightning._types import Batches, Indices, Order, Pairs
from bs_lightning.layout import BatchLayout
from bs_lightning.permutation import KeyedPermutation, permutation
from bs_lightning.pools import Cut, Pools, WholeData
from bs_lightning.separate import separate, separate_order

_BATCHES_AT_ONCE = 256  # batches whose pairs are looked for together
_LOOKED_UP = 2**14  # instances of uniform batches that are looked up together
NO_PAIRS: Pairs = np.empty((0, 2), dtype=np.int64)


class PlannedPool(NamedTuple):
    """What a planner returns for a pool. All numbers are positions in the pool.

    Example:
        >>> import numpy as np
        >>> from bs_lightning import PlannedPool
        >>> planned = PlannedPool(batches=np.array([[2, 0], [1, 3]]))
        >>> len(planned.batches), len(planned.pairs)
        (2, 0)
    """

    batches: Batches
    """The pool's global batches, int64 ``[P // global_batch_size, global_batch_size]``."""
    pairs: Pairs = NO_PAIRS
    """Pairs that are likely false negatives, the anchor first, int64 ``[m, 2]``. The loss may leave them out."""


class PoolPlanner(Protocol):
    """Arranges a pool, given as dataset indices int64 ``[P]``, into batches."""

    def __call__(self, indices: Indices, *, seed: int, epoch: int) -> PlannedPool:
        """Arrange a pool into batches.

        Args:
            indices: Dataset indices of the pool, int64 ``[P]``.
            seed: The pool's seed.
            epoch: The epoch's number.

        Returns:
            The batches, as positions in the pool.
        """
        ...


@dataclass(frozen=True)
class Planning:
    """How an epoch's batches are composed.

    Args:
        plan_pool: Arranges a pool into batches. It gets the pool's dataset indices, int64 ``[P]``, a seed and the
            epoch, and returns a :class:`PlannedPool`.
        cut: Which instances are planned together: :class:`Pools`, :class:`WholeData`, or
            :class:`~bs_lightning.pools.AdaptivePools`.
        replacement: Whether different batches may share instances.
        expect: Gets the dataset indices of the pool after the one that is about to be served, int64 ``[P]``, so that
            they can be read ahead. It asks ``cut`` for that pool early, so ``cut.next_pool`` must have no side effect.
            ``None`` reads nothing ahead.
        ahead: Whether a pool may be planned while earlier pools are being trained, so that loading never stops at a
            pool's end. Say so if training on other pools does not change what ``plan_pool`` returns for a pool.

    Raises:
        TypeError: If ``plan_pool`` is not callable, or ``cut`` is not a :class:`~bs_lightning.pools.Cut`.
        ValueError: If ``cut`` is :class:`WholeData` and ``replacement`` is ``False``, or ``ahead`` is ``True`` and
            ``cut`` is not :class:`Pools`.

    Example:
        >>> import numpy as np
        >>> from bs_lightning import PlannedPool, Planning, PoolBatchSampler, Pools
        >>> def keep_order(indices, *, seed, epoch):
        ...     return PlannedPool(np.arange(len(indices)).reshape(-1, 4))
        >>> len(PoolBatchSampler(40, batch_size=4, planning=Planning(keep_order, Pools(16))))
        10
    """

    plan_pool: PoolPlanner
    cut: Cut
    replacement: bool = False
    expect: Callable[[Indices], None] | None = None
    ahead: bool = False

    def __post_init__(self) -> None:
        check_instance_callable("plan_pool", self.plan_pool, "a function of (indices, *, seed, epoch)")
        if not isinstance(self.cut, Cut):
            raise TypeError(f"cut must be Pools(size), WholeData(every) or AdaptivePools(...), got {self.cut!r}.")
        if isinstance(self.cut, WholeData) and not self.replacement:
            raise ValueError(
                f"refresh_every={self.cut.every} needs a composer whose batches may share instances, such as "
                "RWRComposer(..., replacement=True). To serve each instance once an epoch, use pools."
            )
        if self.ahead and not isinstance(self.cut, Pools):
            raise ValueError(
                f"ahead=True needs Pools, which share no instances and whose sizes are known, got {self.cut!r}. Leave "
                "ahead out."
            )


class Pool(NamedTuple):
    """A planned pool: its place in the epoch, its batches, and its likely false negatives."""

    epoch: int
    start: int
    """The number of the pool's first batch in the epoch."""
    batches: Indices
    """Dataset indices, int64 ``[n, global_batch_size]``."""
    pairs: Pairs
    """Pairs of dataset indices, int64 ``[m, 2]``, that are likely false negatives, the anchor first."""
    replacement: bool = False
    """Whether different batches may share instances."""

    @property
    def stop(self) -> int:
        """The number of the batch before which the pool ends."""
        return self.start + len(self.batches)

    def serves(self, epoch: int, batch: int) -> bool:
        """Return whether a batch belongs to this pool.

        Args:
            epoch: The epoch's number.
            batch: The batch's number in the epoch.

        Returns:
            ``True`` if the pool holds that batch.
        """
        return self.epoch == epoch and self.start <= batch < self.stop


class EpochPlan:
    """Serves one epoch's global batches, and plans each pool when its first batch is asked for.

    Who iterates may ask for batches ahead of training. The plan then keeps all pools that are not served yet, by the
    count in ``served``.

    Args:
        layout: The epoch's sizes.
        seed: Seed of the permutation and of every pool's planner.
        epoch: The epoch's number.
        start: The first batch to serve.
        stop: The batch before which the epoch ends; ``None`` serves all.
        planning: How batches are composed; ``None`` serves uniform batches, in the order of the permutation.
        pool: A pool that was planned earlier, from a checkpoint. It is served if it holds batch ``start``.
        groups: Each instance's group, int64 ``[N]``: no batch holds two instances of a group. ``None`` separates none.

    Attributes:
        served: The number of the batch to serve next. The caller who iterates must count it.

    Raises:
        ValueError: If ``planning`` cuts pools that are smaller than a global batch, its batches may share instances and
            there are groups, or ``pool`` is not a pool of this epoch's permutation.

    Example:
        >>> from bs_lightning.layout import BatchLayout
        >>> from bs_lightning.plan import EpochPlan
        >>> plan = EpochPlan(BatchLayout(10, batch_size=4), seed=0, epoch=0)
        >>> [len(batch) for pool in plan for batch in pool]
        [4, 4]
    """

    def __init__(
        self,
        layout: BatchLayout,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        stop: int | None = None,
        planning: Planning | None = None,
        pool: Pool | None = None,
        groups: Indices | None = None,
    ) -> None:
        if planning is not None:
            planning.cut.check(layout)
            if planning.replacement and groups is not None:
                raise ValueError("groups need batches that share no instances, but planning has replacement=True.")
        self.layout = layout
        self.seed = seed
        self.epoch = epoch
        self.start = self.served = start
        self.stop = layout.n_batches if stop is None else min(stop, layout.n_batches)
        self.planning = planning
        self.groups = groups
        self._pools = [] if pool is None else [pool]
        self._sorted: tuple[Pool, Pairs, Indices] | None = None
        self._order = permutation(layout.n_instances, seed, epoch)
        if groups is not None:
            self._order = separate_order(self._order[:], groups, layout.global_batch_size, pool_seed(seed, epoch, 0))
        if pool is not None and pool.epoch == epoch:
            check_pool(pool, self._order, layout)

    @property
    def pool(self) -> Pool | None:
        """The pool of the batch that was served last, else of the next batch; ``None`` where batches are uniform."""
        begun = [pool for pool in self._pools if pool.epoch != self.epoch or pool.start < self.served]
        return begun[-1] if begun else self._pool_of(self.served)

    def _pool_of(self, batch: int) -> Pool | None:
        """Return the planned pool that holds a batch, or ``None`` if there is none."""
        return next((pool for pool in self._pools if pool.serves(self.epoch, batch)), None)

    def global_batch(self, batch: int) -> Order:
        """Return the dataset indices of a global batch.

        Args:
            batch: The batch's number in the epoch. Its pool must have been planned.

        Returns:
            Dataset indices, integers ``[B]``.
        """
        pool = self._pool_of(batch)
        if pool is not None:
            planned: Indices = pool.batches[batch - pool.start]
            return planned
        size = self.layout.global_batch_size
        return self._order[batch * size : (batch + 1) * size]

    def pairs(self, batch: int) -> Pairs:
        """Return the likely false negatives of a batch, by the planner.

        Args:
            batch: The batch's number in the epoch.

        Returns:
            Pairs of dataset indices, int64 ``[m, 2]``. Where batches may share instances, pairs of other batches of the
            pool are among them.
        """
        pool = self._pool_of(batch)
        if pool is None:
            return NO_PAIRS
        if pool.replacement:
            return pool.pairs
        if self._sorted is None or self._sorted[0] is not pool:
            self._sorted = pool, *_by_batch(pool)
        _, pairs, starts = self._sorted
        return pairs[starts[batch - pool.start] : starts[batch - pool.start + 1]]

    def __iter__(self) -> Iterator[Iterable[Order]]:
        """Plan each pool and yield its batches that are still to be served."""
        size = self.layout.global_batch_size
        full_stop = min(self.stop, self.layout.n_full)
        batch = self.start
        if self._pool_of(batch) is None:
            self._pools = []  # a later pool, from a checkpoint, is planned anew when its time comes
        while batch < full_stop:
            pool = self._pool_of(batch)
            if pool is None:
                self._pools = [each for each in self._pools if each.epoch == self.epoch and each.stop > self.served]
                if self.planning is None:
                    yield self._uniform(batch, full_stop)
                    batch = full_stop
                    continue
                pool = self._plan_pool(self.planning, batch, full_stop)
                self._pools.append(pool)
            end = min(pool.stop, full_stop)
            if end < full_stop and self.planning is not None and self.planning.expect is not None:
                self.planning.expect(self._indices(self.planning.cut.next_pool(end, full_stop, self.layout)[0]))
            yield pool.batches[batch - pool.start : end - pool.start]
            batch = end
        if batch < self.stop:
            yield [self._order[self.layout.n_full * size :]]

    def _uniform(self, start: int, stop: int) -> Iterator[Order]:
        """Yield uniform batches. Some are looked up together: a keyed permutation is slow in small parts."""
        size = self.layout.global_batch_size
        together = max(_LOOKED_UP // size, 1)
        for first in range(start, stop, together):
            yield from self._order[first * size : min(first + together, stop) * size].reshape(-1, size)

    def _indices(self, batches: slice) -> Indices:
        """Return the instances of batches with these numbers, in the order of the permutation."""
        size = self.layout.global_batch_size
        return self._order[batches.start * size : batches.stop * size].astype(np.int64)

    def _plan_pool(self, planning: Planning, start: int, stop: int) -> Pool:
        """Plan the pool that begins at batch ``start``."""
        size = self.layout.global_batch_size
        planned_together, end = planning.cut.next_pool(start, stop, self.layout)
        indices, seed = self._indices(planned_together), pool_seed(self.seed, self.epoch, start)
        returned = planning.plan_pool(indices, seed=seed, epoch=self.epoch)
        planned = check_planned(returned, len(indices), size, replacement=planning.replacement)
        positions: Order = planned.batches
        if self.groups is not None:
            positions = separate(positions, self.groups[indices], seed)
        positions = positions[: end - start]
        pairs = _meeting(planned.pairs, positions, len(indices), planning.replacement)
        return Pool(self.epoch, start, indices[positions], indices[pairs], planning.replacement)


def check_planned(planned: object, pool_size: int, batch_size: int, *, replacement: bool = False) -> PlannedPool:
    """Refuse what is no plan of a pool.

    Args:
        planned: What a planner returned.
        pool_size: Instances in the pool, a multiple of ``batch_size``.
        batch_size: Instances in a batch.
        replacement: Whether different batches may share instances.

    Returns:
        The plan, with batches and pairs as int64.

    Raises:
        TypeError: If it is no :class:`PlannedPool`, or does not hold integers.
        ValueError: If a shape is different, or a position is wrong.
    """
    if not isinstance(planned, PlannedPool):
        raise TypeError(f"plan_pool must return a PlannedPool(batches), got {type(planned).__name__}.")
    batches = check_batches(planned.batches, pool_size, batch_size, replacement=replacement)
    return PlannedPool(batches, _check_pairs(planned.pairs, pool_size))


def check_batches(batches: object, pool_size: int, batch_size: int, *, replacement: bool = False) -> Batches:
    """Refuse batches that a pool cannot be arranged into.

    Args:
        batches: What a composer returned.
        pool_size: Instances in the pool, a multiple of ``batch_size``.
        batch_size: Instances in a batch.
        replacement: Whether different batches may share instances.

    Returns:
        The batches as int64 of shape ``[pool_size // batch_size, batch_size]``.

    Raises:
        TypeError: If the batches do not hold integers.
        ValueError: If the batches have a different shape, lie outside ``[0, pool_size)``, or repeat a position.

    Example:
        >>> from bs_lightning.plan import check_batches
        >>> check_batches([[2, 0], [1, 3]], pool_size=4, batch_size=2).tolist()
        [[2, 0], [1, 3]]
    """
    try:
        array = np.asarray(batches)
    except (TypeError, ValueError) as error:  # a tensor that is sparse or on a GPU, rows of unequal length
        raise ValueError(f"The composer must return an array of positions in the pool: {error}") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"The composer must return integer positions in the pool, got dtype {array.dtype}.")
    shape = (pool_size // batch_size, batch_size)
    if array.shape != shape:
        raise ValueError(
            f"The composer must return batches of shape {list(shape)} for a pool of {pool_size} and batches of "
            f"{batch_size}, got {list(array.shape)}."
        )
    if array.min() < 0 or array.max() >= pool_size:
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise ValueError(f"The composer must return positions in [0, {pool_size}), got {bad}.")
    rows = np.sort(array if replacement else array.reshape(1, -1), axis=1)
    repeated = rows[:, 1:] == rows[:, :-1]
    if repeated.any():
        raise ValueError(
            f"The composer returned position {int(rows[:, 1:][repeated][0])} twice"
            + (
                " within one batch."
                if replacement
                else ". If batches may share instances, subclass bs_lightning.Composer and set `replacement = True`."
            )
        )
    return array.astype(np.int64, copy=False)


def _check_pairs(pairs: ArrayLike, pool_size: int) -> Pairs:
    """Return a planner's pairs as int64. Reject an array that does not hold pairs of positions in the pool."""
    array = check_integer_array("pairs", pairs)
    if array.ndim != 2 or array.shape[1] != 2 or (array.size and (array.min() < 0 or array.max() >= pool_size)):
        raise ValueError(
            f"plan_pool must return pairs of shape [m, 2] with positions in [0, {pool_size}), got shape "
            f"{list(array.shape)}{f' with {array.min()} to {array.max()}' if array.size else ''}."
        )
    return array.astype(np.int64, copy=False)


def _meeting(pairs: Pairs, batches: Order, pool_size: int, replacement: bool) -> Pairs:
    """Return the pairs whose two instances meet in a batch. Only these are served, and saved."""
    if not len(pairs):
        return pairs
    if not replacement:
        batch_of = np.full(pool_size, -1)
        batch_of[batches] = np.arange(len(batches))[:, None]
        first, second = batch_of[pairs].T
        kept: Pairs = pairs[(first == second) & (first >= 0)]
        return kept
    found = np.zeros(len(pairs), dtype=np.bool_)
    for start in range(0, len(batches), _BATCHES_AT_ONCE):
        some = batches[start : start + _BATCHES_AT_ONCE]
        holds = np.zeros((pool_size, len(some)), dtype=np.bool_)
        holds[some, np.arange(len(some))[:, None]] = True
        bits = np.packbits(holds, axis=1)
        found |= (bits[pairs[:, 0]] & bits[pairs[:, 1]]).any(axis=1)
    kept = pairs[found]
    return kept


def _by_batch(pool: Pool) -> tuple[Pairs, Indices]:
    """Return a pool's pairs in the order of the batches that hold them, and where each batch's pairs start."""
    instances = pool.batches.ravel()
    order = np.argsort(instances)
    batch = order[np.searchsorted(instances, pool.pairs[:, 0], sorter=order)] // pool.batches.shape[1]
    by_batch = np.argsort(batch, kind="stable")
    return pool.pairs[by_batch], np.searchsorted(batch[by_batch], np.arange(len(pool.batches) + 1))


def check_pool(pool: Pool, order: Order | KeyedPermutation, layout: BatchLayout) -> None:
    """Refuse a pool from a checkpoint whose instances do not belong to its place in the epoch.

    Args:
        pool: A pool of the epoch.
        order: The epoch's permutation.
        layout: The epoch's sizes.

    Raises:
        ValueError: If the checkpoint is damaged, or was taken with different data or a different seed.
    """
    size, stop = layout.global_batch_size, pool.stop
    fits = 0 <= pool.start < stop <= layout.n_full and pool.batches.shape[1] == size and pool.pairs.shape[1] == 2
    if fits and pool.replacement:
        rows = np.sort(pool.batches, axis=1)
        fits = rows[:, 0].min() >= 0 and rows[:, -1].max() < len(order) and bool((rows[:, 1:] > rows[:, :-1]).all())
    elif fits:
        fits = np.array_equal(np.sort(pool.batches, axis=None), np.sort(order[pool.start * size : stop * size]))
    if not fits or not np.isin(pool.pairs, pool.batches).all():
        raise ValueError(
            f"The checkpoint's pool, batches {pool.start} to {stop} of epoch {pool.epoch}, does not hold the instances "
            "that the seed puts there. The checkpoint is damaged, or was taken with a different dataset: resume from a "
            "different checkpoint."
        )


def pool_seed(seed: int, epoch: int, batch: int) -> int:
    """Return the seed of a pool: different for every pool, and below 2**32.

    Args:
        seed: The sampler's seed.
        epoch: The epoch's number.
        batch: The number of the pool's first batch in the epoch.

    Returns:
        The pool's seed.

    Example:
        >>> from bs_lightning.plan import pool_seed
        >>> pool_seed(0, epoch=0, batch=0) == pool_seed(0, epoch=0, batch=10)
        False
    """
    return int(np.random.SeedSequence([seed, epoch, batch]).generate_state(1)[0])
