"""Batch sampler of a Trainer: it serves the epoch and position at which the Trainer is."""

from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from bs_lightning.plan import EpochPlan, Pool
from bs_lightning.plugin.loader import TrainingData, trains_on
from bs_lightning.plugin.loops import (
    batch_in_training,
    epochs_processed,
    first_position,
    in_epoch,
    mend_counters,
    next_batch,
)
from bs_lightning.sampler import PoolBatchSampler
from bs_lightning.state import SamplerState


class TrainerBatchSampler(PoolBatchSampler):
    """Serves the epoch and position at which a DataModule's Trainer is.

    Args:
        data: The DataModule.
        n_instances: Length of the dataset.
        batch_size: Instances per batch and process.
        **kwargs: All other arguments of :class:`~bs_lightning.PoolBatchSampler` but ``planning``.
    """

    def __init__(self, data: TrainingData, n_instances: int, batch_size: int, **kwargs: Any) -> None:
        super().__init__(n_instances, batch_size, **kwargs)
        self._data = data
        self._n_epochs_processed: int | None = None  # before the first plan
        self._has_begun = False  # before `on_train_start` has ended
        self.sampler: Any = self  # Lightning calls `set_epoch` of a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Note that training has begun. Lightning calls this before each epoch.

        Args:
            epoch: The epoch to serve, unless the DataModule's Trainer has this sampler. It knows more of its position.
        """
        self._has_begun = True
        trainer = self._data.trainer
        if trainer is None or self._data.train_sampler is not self:
            super().set_epoch(epoch)
        elif trains_on(self._data, self) and self._trained_batch_number() is None:
            mend_counters(trainer)

    def plan(self) -> EpochPlan:
        """Plan the rest of the epoch being trained.

        Returns:
            The plan. Anyone who iterates outside the training loop gets the plan of a uniform epoch.

        Raises:
            ValueError: If the fit resumed within an epoch, and its batches had a different size or came from different
                data.
        """
        trainer = self._data.trainer
        if trainer is None:
            return super().plan()
        if not (self._has_begun and trains_on(self._data, self) and in_epoch(trainer)):
            return self._uniform_plan()  # a hook looks into the loader, at the start or end of an epoch for example
        state = self._data.restored_state()
        if state is not None:
            self.seed = state.seed
        # With `overfit_batches` every epoch has the same batches.
        epoch = 0 if trainer.overfit_batches else trainer.current_epoch
        start = next_batch(trainer)
        if self._plan is not None and self._plan.epoch == epoch and self._plan.start < start:
            return self._uniform_plan()  # a hook or a callback looks into the loader while the epoch is being trained
        self.epoch = epoch
        self._plan = EpochPlan(
            self.layout,
            seed=self.seed,
            epoch=epoch,
            start=start,
            stop=int(trainer.num_training_batches),
            planning=self._data.planning(self.layout),
            pool=self._current_pool(start, state),
            groups=self.groups,
        )
        self._n_epochs_processed = epochs_processed(trainer)
        return self._plan

    def state(self) -> SamplerState:
        """Return the position of training: within the epoch, or before the first one, where Lightning will go on."""
        state, trainer = super().state(), self._data.trainer
        if trainer is None or self.has_planned:
            return state
        epoch, served = first_position(trainer)
        return replace(state, epoch=0 if trainer.overfit_batches else epoch, served=min(served, state.stop))

    def _trained_batch_number(self) -> int | None:
        """The number in its epoch of the batch being trained."""
        return batch_in_training(self._data.trainer, self._n_epochs_processed)

    def _uniform_plan(self) -> EpochPlan:
        """A throwaway uniform plan for anyone who iterates the loader outside the training loop."""
        return EpochPlan(self.layout, seed=self.seed, epoch=self.epoch, groups=self.groups)

    def _current_pool(self, start: int, state: SamplerState | None) -> Pool | None:
        """The pool that was being served when this epoch was last left, by this process or an earlier one."""
        if self._plan is not None:
            return self._plan.pool
        if state is not None:
            # With larger batches Lightning may take the epoch for ended, and would begin it again.
            if start > 0 or (state.epoch == self.epoch and state.mid_epoch):
                state.check_same_batches(self.layout, self.groups_digest)
            if start > 0:
                state.check_position(self.epoch, start)
            elif state.mid_epoch:
                self._warn_of_gap(state)
            return state.pool
        if start > 0:
            rank_zero_warn(
                "Resuming in the middle of an epoch from a checkpoint without the state of BatchSamplerDataModule: "
                "the rest of this epoch is planned again and may repeat instances. (Does your DataModule override "
                "state_dict() or load_state_dict() without calling super()?)"
            )
        return None

    def _warn_of_gap(self, state: SamplerState) -> None:
        """Warn if batches are lost or come twice, where an epoch begins though the state was taken within one."""
        trainer = self._data.trainer
        assert trainer is not None
        taken = f"The checkpoint was taken after {state.served} of {state.stop} batches of epoch {state.epoch}"
        if state.epoch != self.epoch:
            rank_zero_warn(
                f"{taken}, as max_steps or a hook ended the epoch there. Lightning goes on with epoch {self.epoch}: "
                "the other batches are not served."
            )
        # If fewer were served, none was trained: the state is of the epoch's first step.
        elif state.served >= trainer.num_training_batches and not trainer.overfit_batches:
            rank_zero_warn(
                f"{taken}. Epochs have {int(trainer.num_training_batches)} now, as drop_last or "
                "limit_train_batches has changed, so Lightning begins that epoch again: these batches come twice."
            )
