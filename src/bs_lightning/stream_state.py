"""Stream state: where a pass over a stream is, as tensors and plain Python values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from bs_lightning._saved import damaged, saved_counts, saved_table, saved_value
from bs_lightning._types import Indices, Pairs
from bs_lightning.layout import BatchLayout

FORMAT = 1


class StreamReading(NamedTuple):
    """What one process read of the stream for a pool."""

    before: int
    """Instances of the pass that were read before."""
    taken: int
    """Instances that were read for the pool."""
    state: dict[str, Any] | None = None
    """The stream's own state before the pool was read, empty if nothing was read before; ``None`` if it has none."""
    error: str | None = None
    """Why reading failed. Never saved."""


class StreamPool(NamedTuple):
    """A planned pool of a stream. All numbers are positions in the pool, which count all processes' instances."""

    epoch: int
    start: int
    """The number of the pool's first batch in the pass."""
    batches: Indices
    """Positions in the pool, each once, int64 ``[n, global_batch_size]``."""
    pairs: Pairs
    """Likely false negatives, the anchor first, int64 ``[m, 2]``."""
    n_last: int
    """Instances of the smaller batch at the stream's end, 0 if there is none."""
    readings: tuple[StreamReading, ...]
    """What each process read, in the order of the ranks."""

    @property
    def stop(self) -> int:
        """The number of the batch before which the pool ends."""
        return self.start + len(self.batches) + (self.n_last > 0)

    def holds(self, number: int) -> bool:
        """Return whether a batch belongs to this pool.

        Args:
            number: The batch's number in the pass.

        Returns:
            ``True`` if the pool holds that batch.
        """
        return self.start <= number < self.stop


@dataclass(frozen=True)
class StreamState:
    """Holds the position of training within a pass over a stream.

    Args:
        seed: The loader's seed.
        global_batch_size: Instances in a global batch.
        epoch: The epoch being served.
        served: Number of its batches that were served.
        pool: The pool that holds the next batch, or else the last one; ``None`` if no batch was served.
    """

    seed: int
    global_batch_size: int
    epoch: int
    served: int
    pool: StreamPool | None

    def check_same_batches(self, layout: BatchLayout) -> None:
        """Refuse to go on within a pass with a different global batch size.

        Args:
            layout: The current sizes.

        Raises:
            ValueError: If the size differs. The message names both.
        """
        if self.global_batch_size != layout.global_batch_size:
            raise ValueError(
                f"The checkpoint was taken within a pass over a stream with global_batch_size={self.global_batch_size},"
                f" now it is {layout.global_batch_size}: instances would be lost or repeated. Resume with "
                f"{self.global_batch_size}, or from a checkpoint that was taken between two epochs."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it.

        Returns:
            Tensors and plain Python values, about as large as a pool's indices, with the stream's own state.
        """
        return {
            "stream": FORMAT,
            "seed": int(self.seed),
            "global_batch_size": int(self.global_batch_size),
            "epoch": int(self.epoch),
            "served": int(self.served),
            "pool": None if self.pool is None else _pool_to_dict(self.pool),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "StreamState":
        """Return the state that a dictionary holds.

        Args:
            state: What :meth:`to_dict` returned.

        Returns:
            The state.

        Raises:
            ValueError: If a key is missing, a value is out of range, or the state has a different format.
            TypeError: If a value has a wrong type.
        """
        if saved_value(state, "stream", int) != FORMAT:
            raise damaged("stream", state["stream"], f"{FORMAT}, the format that this version reads")
        counts = saved_counts(state, ("seed", "global_batch_size", "epoch", "served"))
        saved = saved_value(state, "pool", dict, type(None))
        if saved is None:
            return cls(**counts, pool=None)
        pool = _pool_from_dict(saved)
        if not pool.start <= counts["served"] <= pool.stop or pool.epoch != counts["epoch"]:
            raise damaged("served", counts["served"], f"a batch of the saved pool, {pool.start} to {pool.stop}")
        return cls(**counts, pool=pool)


def _pool_to_dict(pool: StreamPool) -> dict[str, Any]:
    return {
        "epoch": int(pool.epoch),
        "start": int(pool.start),
        "batches": torch.from_numpy(pool.batches),
        "pairs": torch.from_numpy(pool.pairs),
        "n_last": int(pool.n_last),
        "readings": [[int(each.before), int(each.taken), each.state] for each in pool.readings],
    }


def _pool_from_dict(state: Mapping[str, Any]) -> StreamPool:
    batches, readings = saved_table(state, "batches"), saved_value(state, "readings", list, where="pool.")
    if not np.array_equal(np.sort(batches, axis=None), np.arange(batches.size)):
        raise damaged("pool.batches", batches, "each position of the pool once")
    for each in readings:
        if type(each) is not list or len(each) != 3 or any(type(n) is not int or n < 0 for n in each[:2]):
            raise damaged("pool.readings", readings, "two counts and a state for each process")
    return StreamPool(
        saved_value(state, "epoch", int, where="pool."),
        saved_value(state, "start", int, where="pool."),
        batches,
        saved_table(state, "pairs"),
        saved_value(state, "n_last", int, where="pool."),
        tuple(StreamReading(*each) for each in readings),
    )
