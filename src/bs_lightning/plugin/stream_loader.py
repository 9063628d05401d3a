"""Stream loader of a Trainer: serves a stream at the epoch and position at which the Trainer is."""

from types import SimpleNamespace
from typing import Any

from torch.utils.data import IterableDataset

from bs_lightning.plugin.loader import LightningLoader, TrainingData
from bs_lightning.plugin.loops import (
    batch_in_training,
    epochs_processed,
    in_epoch,
    mend_counters,
    position,
    restarting,
)
from bs_lightning.stream import Pass, StreamLoader
from bs_lightning.stream_state import StreamState


class TrainerStreamLoader(LightningLoader, StreamLoader):
    """The loader of a stream that a DataModule gives to a Trainer.

    Args:
        data: The DataModule.
        stream: The stream.
        batch_size: Instances per batch and process.
        **kwargs: All other arguments of :class:`~bs_lightning.StreamLoader` but ``pool_size`` and ``plan_pool``.
    """

    groups_digest = 0  # a stream has no groups

    def __init__(self, data: TrainingData, stream: IterableDataset[Any], batch_size: int, **kwargs: Any) -> None:
        super().__init__(stream, batch_size, **kwargs)
        self._data = data
        self._n_epochs_processed: int | None = None  # before the first pass
        self.batch_sampler: Any = SimpleNamespace(sampler=self)  # Lightning calls `set_epoch` of this sampler

    def set_epoch(self, epoch: int) -> None:
        """Note that an epoch begins. Lightning calls this before each epoch, but after it has fetched a batch ahead.

        Args:
            epoch: The epoch to serve, where there is no Trainer. A Trainer knows more of its position.
        """
        trainer = self._data.trainer
        if trainer is None:
            super().set_epoch(epoch)
        elif trainer.training and self._data.train_sampler is self:
            mend_counters(trainer)

    @property
    def has_planned(self) -> bool:
        """Whether a pass has begun. Until then, the state is as a checkpoint had it."""
        return self._pass is not None

    def trained_batch(self) -> None:
        """Refuse to name the instances of a batch.

        Raises:
            TypeError: Always.
        """
        raise TypeError("trained_batch() gives dataset indices, which a stream has not. Put a key into each instance.")

    def state(self) -> StreamState:
        """Return the position of training within the pass."""
        trainer, state = self._data.trainer, super().state()
        if trainer is None or self._pass is None:
            return state
        _, served = position(trainer)
        pool = self._pass.pool_of(served) or self._pass.pool_of(served - 1)
        return StreamState(state.seed, state.global_batch_size, self._pass.epoch, 0 if pool is None else served, pool)

    def _begin(self) -> Pass:
        """Begin the pass of the epoch being trained, or a throwaway uniform pass for anyone else who iterates."""
        trainer = self._data.trainer
        if trainer is None:
            return super()._begin()
        # With `overfit_batches` every epoch has the same batches.
        stop = None if self._n_instances is None else len(self)
        size = self._data.instances_per_pool(self.layout) or self.pool_size
        if not trainer.training or self._data.train_sampler is not self:
            return Pass(0, 0, stop, size, together=False)
        epoch, processed = position(trainer)
        if trainer.overfit_batches:
            epoch = 0
        is_trained = self._pass is not None and self._pass.served > self._pass.start and not self._pass.ended
        # From a loader of unknown length that is new, Lightning fetches a batch before the epoch begins.
        is_fetched = self._n_instances is None and self._pass is None
        if is_trained or not (in_epoch(trainer) or is_fetched):
            return Pass(epoch, 0, stop, size, together=False)  # a hook looks into the loader
        restored, start = None, 0
        state = self._data.restored_stream_state()
        if state is not None:
            self.seed = state.seed
        if restarting(trainer) and processed:
            start = processed
            if self._pass is not None and self._pass.epoch == epoch:
                restored = self._pass.restored  # Lightning asks for an iterator of this epoch a second time
            else:
                unknown = StreamState(self.seed, self.layout.global_batch_size, epoch, processed, None)
                restored = self._readable(state or unknown)
        if trainer.num_training_batches != float("inf"):
            stop = int(trainer.num_training_batches)
        planning = self._data.planning(self.layout)
        plan_pool = None if planning is None else planning.plan_pool
        self._pass = Pass(epoch, start, stop, size, plan_pool, restored)
        self._n_epochs_processed = epochs_processed(trainer)
        return self._pass

    def _trained_batch_number(self) -> int | None:
        """The number in its epoch of the batch being trained."""
        return batch_in_training(self._data.trainer, self._n_epochs_processed)
