"""State: where training is within an epoch, as tensors and plain Python values, and the checks of a restored state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bs_lightning._types import Indices
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
        if _value(state, "format", int) != FORMAT:
            raise ValueError(
                f"The checkpoint's sampler state has format {state['format']}, but this version of bs-lightning reads "
                f"format {FORMAT}. Resume with the version that wrote it."
            )
        counts = {name: _value(state, name, int) for name in _COUNTS}
        for name, count in counts.items():
            if count < 0:
                raise _damaged(name, count, "at least 0")
        whole = counts["n_instances"] // max(counts["global_batch_size"], 1)
        if not whole <= counts["n_batches"] <= whole + 1:
            raise _damaged("n_batches", counts["n_batches"], f"{whole}, or one more")
        for name, most in (("served", "stop"), ("stop", "n_batches")):
            if counts[name] > counts[most]:
                raise _damaged(name, counts[name], f"at most {most}, {counts[most]}")
        pool = None if _value(state, "pool", dict, type(None)) is None else _pool_from_dict(state["pool"])
        return cls(**counts, in_pool=_value(state, "in_pool", bool), pool=pool)

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
        if epoch != self.epoch and self.served < self.stop:
            return  # `max_steps` ended the epoch early, and the Trainer begins the next one in its middle
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
            raise _damaged("pool", got, f"the pool that serves batch {start} of epoch {epoch}")


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
        _value(state, "epoch", int, where="pool."),
        _value(state, "start", int, where="pool."),
        _table(state, "batches"),
        _table(state, "pairs"),
        _value(state, "replacement", bool, where="pool."),
    )


def _value(state: Mapping[str, Any], name: str, *types: type, where: str = "") -> Any:
    """Return a value of the state. Refuse it unless it has one of the given types; ``bool`` is not an ``int`` here."""
    if name not in state:
        raise ValueError(f"The checkpoint's sampler state lacks {where}{name!r}. {_ADVICE}")
    if type(state[name]) not in types:
        kinds = " or ".join(kind.__name__ for kind in types)
        raise TypeError(
            f"The checkpoint's sampler state must hold {kinds} as {where}{name}, got {state[name]!r}. {_ADVICE}"
        )
    return state[name]


def _table(state: Mapping[str, Any], name: str) -> Indices:
    """Return a two-dimensional int64 tensor of the state as an array."""
    value = _value(state, name, torch.Tensor, where="pool.")
    if value.ndim != 2 or value.dtype != torch.int64:
        raise _damaged(f"pool.{name}", f"{value.dtype} of shape {list(value.shape)}", "int64 of two dimensions")
    array: Indices = value.cpu().numpy().astype(np.int64, copy=False)
    return array


_ADVICE = "It is damaged, or older than version 0.1.0: resume from a different checkpoint."


def _damaged(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"The checkpoint's sampler state holds {name}={value}, but it must be {expected}. {_ADVICE}")
