"""Stream loader of a Trainer: serves a stream at the epoch and position at which the Trainer is."""

from functools import partial
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset

from bs_lightning.plugin.loader import LightningLoader, TrainingData, trains_on
from bs_lightning.plugin.loops import (
    batch_in_training,
    batches_processed,
    epoch_is_trained,
    epochs_processed,
    fetch_anew,
    first_position,
    in_epoch,
    mend_counters,
    position,
    restarting,
    step_is_done,
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
        self._n_epochs_processed: int | None = None  # before the first epoch
        # Lightning's counters when the pass began.
        self._n_batches_before = self._n_epochs_before = 0
        self._was_restarting = False

    @property
    def batch_sampler(self) -> Any:
        """What Lightning looks into for a ``sampler`` whose ``set_epoch`` it calls."""
        return SimpleNamespace(sampler=self)  # not an attribute: a cycle would keep workers from ending at once

    def set_epoch(self, epoch: int) -> None:
        """Note that an epoch begins. Lightning calls this before each epoch, but after it has fetched a batch ahead.

        Args:
            epoch: The epoch to serve, unless the DataModule's Trainer has this loader. It knows more of its position.
        """
        trainer = self._data.trainer
        if trainer is None or self._data.train_sampler is not self:
            super().set_epoch(epoch)
        elif trains_on(self._data, self) and self._trained_batch_number() is None:
            if self._is_premature(trainer):
                self._pass = None
                fetch_anew(trainer)
            mend_counters(trainer)
            self._n_epochs_processed = epochs_processed(trainer)

    @property
    def has_planned(self) -> bool:
        """Whether a pass has begun. Until then, the state is as a checkpoint had it."""
        return self._pass is not None and not self._is_premature(self._data.trainer)

    def trained_batch(self) -> None:
        """Refuse to name the instances of a batch.

        Raises:
            TypeError: Always.
        """
        raise TypeError("trained_batch() gives dataset indices, which a stream has not. Put a key into each instance.")

    def state(self) -> StreamState:
        """Return the position of training: within the pass, or before the first one, where Lightning will go on."""
        trainer, run = self._data.trainer, self._pass
        if trainer is None:
            return super().state()
        at = partial(StreamState, self.seed, self.layout.global_batch_size)
        if run is None or self._is_premature(trainer):
            return at(*first_position(trainer), None)
        served = self._n_served(run, trainer)
        if served > run.start and epoch_is_trained(trainer):
            return at(run.epoch + 1, 0, None)
        pool = run.pool_to_save(served)
        return at(run.epoch, 0 if pool is None else served, pool)

    def _n_served(self, run: Pass, trainer: Trainer) -> int:
        """The number of the pass's batches that have been trained. Lightning may have fetched one more."""
        # Lightning's number of the batch in its epoch goes on from the epoch before, after some resumes.
        return run.start + batches_processed(trainer) - self._n_batches_before

    def _begin(self) -> Pass:
        """Begin the pass of the epoch being trained, or a throwaway uniform pass for anyone else who iterates."""
        trainer = self._data.trainer
        if trainer is None:
            return super()._begin()
        # With `overfit_batches` every epoch has the same batches.
        stop = None if self._n_instances is None else len(self)
        size = self._data.instances_per_pool(self.layout) or self.pool_size
        if not trains_on(self._data, self):
            return Pass(self.epoch, 0, stop, size, together=False)
        state = self._data.restored_stream_state()
        epoch, start = epochs_processed(trainer), 0
        if restarting(trainer):
            if state is None:
                epoch, start = position(trainer)
            elif state.epoch >= epoch or trainer.overfit_batches:
                # Lightning's counters do not tell whether an epoch's last batch has been trained, or only fetched.
                epoch, start = state.epoch, state.served
            elif state.served:
                rank_zero_warn(
                    f"The checkpoint was taken after {state.served} batches of epoch {state.epoch}, as max_steps or a "
                    f"hook ended the epoch there. Lightning goes on with epoch {epoch}, which reads the stream anew: "
                    "the other batches are not served."
                )
        if trainer.overfit_batches:
            epoch = 0
        is_trained = self._is_trained(trainer)
        # From a loader of unknown length that is new, Lightning fetches a batch before the epoch begins.
        is_fetched = self._n_instances is None and self._pass is None
        if is_trained or not (in_epoch(trainer) or is_fetched):
            return Pass(epoch, 0, stop, size, together=False)  # a hook looks into the loader
        restored = None
        if state is not None:
            self.seed = state.seed
        if start:
            if self._pass is not None and self._pass.epoch == epoch:
                restored = self._pass.restored  # Lightning asks for an iterator of this epoch a second time
            else:
                unknown = StreamState(self.seed, self.layout.global_batch_size, epoch, start, None)
                restored = self._readable(state or unknown)
        if trainer.num_training_batches != float("inf"):
            stop = int(trainer.num_training_batches)
        planning = self._data.planning(self.layout)
        plan_pool = None if planning is None else planning.plan_pool
        self._pass = Pass(epoch, start, stop, size, plan_pool, restored)
        self._n_batches_before, self._n_epochs_before = batches_processed(trainer), epochs_processed(trainer)
        self._was_restarting = restarting(trainer)
        return self._pass

    def _is_premature(self, trainer: Trainer | None) -> bool:
        """Whether the current pass was begun before Lightning had restored its position.

        ``estimated_stepping_batches`` in ``configure_optimizers`` makes Lightning fetch the first batch of a stream of
        unknown length as early.
        """
        if trainer is None or self._pass is None or self._n_epochs_processed is not None or self._was_restarting:
            return False
        return restarting(trainer) or self._n_epochs_before != epochs_processed(trainer)

    def _is_trained(self, trainer: Trainer) -> bool:
        """Whether batches of the current pass are being trained."""
        run = self._pass
        if run is None or run.served <= run.start:
            return False
        if not run.ended:
            return True
        # To find an unknown end, Lightning fetches one ahead: all are fetched before the last one is trained.
        return run.exhausted and self._n_epochs_before == epochs_processed(trainer) and not trainer.overfit_batches

    def _trained_batch_number(self) -> int | None:
        """The number in its epoch of the batch being trained."""
        trainer, run = self._data.trainer, self._pass
        if trainer is None or run is None or batch_in_training(trainer, self._n_epochs_processed) is None:
            return None
        return self._n_served(run, trainer) - step_is_done(trainer)
