"""Layout: how many batches an epoch has, and which part of each batch a process serves."""

from dataclasses import dataclass

import numpy as np

from bs_lightning._checks import check_integer
from bs_lightning._types import Order


@dataclass(frozen=True)
class BatchLayout:
    """How many batches an epoch has, and which part of each a process serves.

    Args:
        n_instances: Instances in the dataset (the paper's N).
        batch_size: Instances per batch and process, at least 2.
        world_size: Processes that serve a slice each of every global batch.
        drop_last: ``False`` serves what the global batches leave over as one smaller, uniform batch at the end.

    Raises:
        TypeError: If ``n_instances``, ``batch_size`` or ``world_size`` is not an integer.
        ValueError: If ``batch_size`` is below 2, the data set is smaller than a global batch, or a last batch would
            leave a process with fewer than two instances.
    """

    n_instances: int
    batch_size: int
    world_size: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        check_integer("n_instances", self.n_instances)
        check_integer("world_size", self.world_size)
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

    def slice(self, batch: Order, rank: int) -> Order:
        """The contiguous part of a global batch that process ``rank`` serves."""
        part: Order = np.array_split(batch, self.world_size)[rank]
        return part
