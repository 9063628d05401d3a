"""Layout: how many batches an epoch has, and which part of each batch a process serves."""

from dataclasses import dataclass

from bs_lightning._checks import check_integer
from bs_lightning._types import Order


@dataclass(frozen=True)
class BatchLayout:
    """Says how many batches an epoch has, and which part of each batch a process serves.

    Args:
        n_instances: Instances in the dataset (the paper's N).
        batch_size: Instances per batch and process, at least 2.
        world_size: Number of processes. Each serves its own slice of every global batch.
        drop_last: ``False`` serves the remainder of the epoch as one smaller, uniform batch at the end.

    Raises:
        TypeError: If ``n_instances``, ``batch_size`` or ``world_size`` is not an integer.
        ValueError: If ``batch_size`` is below 2, the dataset is smaller than a global batch, or a smaller last batch
            would leave a process with fewer than two instances.

    Example:
        >>> from bs_lightning.layout import BatchLayout
        >>> layout = BatchLayout(n_instances=100, batch_size=8, world_size=2, drop_last=False)
        >>> layout.global_batch_size, layout.n_full, layout.n_last, layout.n_batches
        (16, 6, 4, 7)
    """

    n_instances: int
    batch_size: int
    world_size: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        no_negatives = "In a batch of one there are no negatives."
        for name, least, advice in (("n_instances", 0, ""), ("batch_size", 2, no_negatives), ("world_size", 1, "")):
            # Plain integers: products of NumPy's small integers overflow.
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least, advice))
        if self.n_instances < self.global_batch_size:
            raise ValueError(
                f"The dataset has {self.n_instances} instances, fewer than one global batch of "
                f"batch_size {self.batch_size} x {self.world_size} processes. Lower batch_size."
            )
        if 0 < self.n_last < 2 * self.world_size:
            raise ValueError(
                f"drop_last=False would leave a last batch of {self.n_last} instances for {self.world_size} "
                "processes, fewer than two for each. Use drop_last=True or a different batch_size."
            )

    @property
    def global_batch_size(self) -> int:
        """Instances that all processes together train on in one step."""
        return self.batch_size * self.world_size

    @property
    def n_full(self) -> int:
        """Number of full global batches in an epoch."""
        return self.n_instances // self.global_batch_size

    @property
    def n_last(self) -> int:
        """Instances in the smaller batch at the epoch's end, 0 if there is none."""
        return 0 if self.drop_last else self.n_instances % self.global_batch_size

    @property
    def n_batches(self) -> int:
        """Number of batches in an epoch, with the smaller batch at its end."""
        return self.n_full + (self.n_last > 0)

    def check_rank(self, rank: int) -> int:
        """Return the number of a process as an int.

        Args:
            rank: What should be an integer in ``[0, world_size)``.

        Raises:
            TypeError: If it is not an integer.
            ValueError: If it is out of range.
        """
        number = check_integer("rank", rank)
        if not 0 <= number < self.world_size:
            raise ValueError(f"rank must lie in [0, world_size={self.world_size}), got {rank}.")
        return number

    def slice(self, batch: Order, rank: int) -> Order:
        """Return the contiguous part of a global batch that one process serves.

        Args:
            batch: Dataset indices of the global batch, integers ``[B]``.
            rank: The process's number.

        Returns:
            Dataset indices, integers ``[b]``.
        """
        size, n_larger = divmod(len(batch), self.world_size)  # `np.array_split` takes 40 times as long
        start = rank * size + min(rank, n_larger)
        return batch[start : start + size + (rank < n_larger)]
