"""State: where training is within an epoch, as tensors and plain Python values, and the checks of a restored state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bs_lightning._saved import damaged, saved_counts, saved_table, saved_value
from bs_lightning.layout import BatchLayout
from bs_lightning.plan import Pool

FORMAT = 2
_COUNTS = ("seed", "n_instances", "global_batch_size", "n_batches", "epoch", "served", "stop", "groups")


@dataclass(frozen=True)
class SamplerState:
    """Holds the position of training within an epoch.

    Args:
        seed: The sampler's seed.
        n_instances: Length of the dataset.
        global_batch_size: Instances in a global batch.
        n_batches: Batches in an epoch.
        epoch: The epoch being served.
        served: Number of that epoch's batches that were served.
        stop: Number of batches after which that epoch ends, at most ``n_batches``.
        in_pool: Whether a pool is being served. ``False`` in uniform epochs.
        pool: The pool being served, or the last one; ``None`` if no pool was planned yet.
        groups: A digest of the groups that are kept apart, 0 if none are.

    Example:
        >>> from bs_lightning import PoolBatchSampler
        >>> from bs_lightning.state import SamplerState
        >>> sampler = PoolBatchSampler(10, batch_size=4)
        >>> first_batch = next(iter(sampler))
        >>> state = SamplerState.from_dict(sampler.state_dict())
        >>> state.served, state.n_batches, state.mid_epoch
        (1, 2, True)
    """

    seed: int
    n_instances: int
    global_batch_size: int
    n_batches: int
    epoch: int
    served: int
    stop: int
    in_pool: bool
    pool: Pool | None
    groups: int = 0

    @property
    def mid_epoch(self) -> bool:
        """Whether some, but not all, of the epoch's batches were served."""
        return 0 < self.served < self.stop

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it.

        Returns:
            Tensors and plain Python values, about as large as a pool.
        """
        return {
            "format": FORMAT,
            **{name: int(getattr(self, name)) for name in _COUNTS},
            "in_pool": bool(self.in_pool),
            "pool": None if self.pool is None else _pool_to_dict(self.pool),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "SamplerState":
        """Return the state that a dictionary holds.

        Args:
            state: What :meth:`to_dict` returned.

        Returns:
            The state.

        Raises:
            ValueError: If a key is missing, a value is out of range, or the state has a different format.
            TypeError: If a value has a wrong type.
        """
        if saved_value(state, "format", int) != FORMAT:
            raise ValueError(
                f"The checkpoint's sampler state has format {state['format']}, but this version of bs-lightning reads "
                f"format {FORMAT}. Resume with the version that wrote it."
            )
        counts = saved_counts(state, _COUNTS)
        whole = counts["n_instances"] // max(counts["global_batch_size"], 1)
        if not whole <= counts["n_batches"] <= whole + 1:
            raise damaged("n_batches", counts["n_batches"], f"{whole}, or one more")
        for name, most in (("served", "stop"), ("stop", "n_batches")):
            if counts[name] > counts[most]:
                raise damaged(name, counts[name], f"at most {most}, {counts[most]}")
        pool = None if saved_value(state, "pool", dict, type(None)) is None else _pool_from_dict(state["pool"])
        return cls(**counts, in_pool=saved_value(state, "in_pool", bool), pool=pool)

    def check_same_batches(self, layout: BatchLayout, groups: int) -> None:
        """Refuse to go on within an epoch if its batches had a different size or were cut from different data.

        Args:
            layout: The current epoch's sizes.
            groups: The current digest of the groups that are kept apart.

        Raises:
            ValueError: If a size differs. The message names the size, its old and its new value. Or if different groups
                were kept apart.
        """
        if self.groups != groups:
            raise ValueError(
                "The checkpoint was taken in the middle of an epoch with different groups, or with a different "
                "separate_groups: instances would be lost or repeated. Resume with the same, or from a checkpoint that "
                "was taken between two epochs."
            )
        for name in ("n_instances", "global_batch_size"):
            was, now = getattr(self, name), getattr(layout, name)
            if was != now:
                raise ValueError(
                    f"The checkpoint was taken in the middle of an epoch with {name}={was}, now it is {now}: instances "
                    f"would be lost or repeated. Resume with {was}, or from a checkpoint that was taken between two "
                    "epochs (with Lightning: ModelCheckpoint(save_on_train_epoch_end=True), not after the last batch)."
                )

    def check_position(self, epoch: int, start: int) -> None:
        """Refuse to go on at batch ``start`` of ``epoch`` if this state does not lead there.

        Args:
            epoch: The number of the epoch to go on in.
            start: The number of the next batch to serve.

        Raises:
            ValueError: If the state was taken after all batches of a different epoch, or lacks the pool that serves
                batch ``start``.
        """
        if epoch != self.epoch:
            raise ValueError(
                f"The checkpoint was taken after all {self.served} batches of epoch {self.epoch}, but training would "
                f"go on in epoch {epoch} at batch {start}, and lose the batches before it. drop_last, "
                "limit_train_batches or overfit_batches has changed since. Resume with the old values, or from a "
                "checkpoint that was taken between two epochs (as with ModelCheckpoint(save_on_train_epoch_end=True), "
                "not after an epoch's last batch)."
            )
        pool = self.pool
        there = pool is not None and pool.epoch == epoch and pool.start <= start <= pool.stop
        if self.in_pool and not there:
            got = None if pool is None else f"a pool that begins at batch {pool.start} of epoch {pool.epoch}"
            raise damaged("pool", got, f"the pool that serves batch {start} of epoch {epoch}")


def holds_state(state: Mapping[str, Any]) -> bool:
    """Return whether a dictionary holds a sampler's state, perhaps a damaged one.

    Args:
        state: A dictionary that may also hold keys of the user's own.

    Returns:
        ``True`` if it holds at least two of the state's keys that nobody else is likely to use.
    """
    return len({"n_instances", "global_batch_size", "n_batches", "served"} & state.keys()) >= 2


def _pool_to_dict(pool: Pool) -> dict[str, Any]:
    return {
        "epoch": int(pool.epoch),
        "start": int(pool.start),
        "replacement": bool(pool.replacement),
        "batches": torch.from_numpy(pool.batches),
        "pairs": torch.from_numpy(pool.pairs),
    }


def _pool_from_dict(state: Mapping[str, Any]) -> Pool:
    return Pool(
        saved_value(state, "epoch", int, where="pool."),
        saved_value(state, "start", int, where="pool."),
        saved_table(state, "batches"),
        saved_table(state, "pairs"),
        saved_value(state, "replacement", bool, where="pool."),
    )
