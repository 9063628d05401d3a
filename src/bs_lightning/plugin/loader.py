"""Loaders of a Trainer: what they ask of the DataModule, and what Lightning asks of them."""

from collections.abc import Callable
from typing import Any, Protocol

from lightning.pytorch import Trainer

from bs_lightning.layout import BatchLayout
from bs_lightning.loader import PoolLoader
from bs_lightning.plan import Planning
from bs_lightning.state import SamplerState
from bs_lightning.stream_state import StreamState


class TrainingData(Protocol):
    """What the batch sampler and the loader of a stream ask of the DataModule."""

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer, or ``None`` outside a fit."""
        ...

    @property
    def train_sampler(self) -> object | None:
        """What serves the batches that the Trainer trains on, or ``None``."""
        ...

    def planning(self, layout: BatchLayout) -> Planning | None:
        """Return how the batches of the epoch are composed.

        Args:
            layout: The epoch's sizes.

        Returns:
            The planning; ``None`` for uniform batches.
        """
        ...

    def instances_per_pool(self, layout: BatchLayout) -> int | None:
        """Return the pool size in instances, also where batches are uniform; ``None`` without a callback."""
        ...

    def restored_state(self) -> SamplerState | None:
        """Return our state of the checkpoint from which this fit resumed, or ``None``."""
        ...

    def restored_stream_state(self) -> StreamState | None:
        """Return our state of a stream of the checkpoint from which this fit resumed, or ``None``."""
        ...


def trains_on(data: TrainingData, sampler: object) -> bool:
    """Return whether a Trainer is training on the batches of a sampler, and not only looking into them.

    Args:
        data: The DataModule.
        sampler: A batch sampler, or the loader of a stream.

    Returns:
        ``False`` also where there is no Trainer, and while it validates.
    """
    return data.trainer is not None and data.trainer.training and data.train_sampler is sampler


class LightningLoader:
    """Adds to a loader what Lightning asks of it.

    Under Lightning the state is part of the DataModule's: a module that reads ``trainer.estimated_stepping_batches`` in
    ``configure_optimizers`` gets its loader before Lightning restores loaders. The two methods for the state only tell
    Lightning that resuming in the middle of an epoch is taken care of.
    """

    close: Callable[[], None]  # the loader's, which ends its workers

    def state_dict(self) -> dict[str, Any]:
        """Return no state.

        Returns:
            An empty dictionary.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """

    @property
    def _iterator(self) -> None:
        """Lightning sets this attribute to ``None`` when a fit ends, to end the workers."""
        return None

    @_iterator.setter
    def _iterator(self, _: None) -> None:
        self.close()


class TrainerLoader(LightningLoader, PoolLoader):
    """The loader of a map-style dataset that a DataModule gives to a Trainer."""
