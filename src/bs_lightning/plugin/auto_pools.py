"""Auto pools: the pools of ``pool_size="auto"``, whose size follows the loss of a Trainer's steps."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bs_lightning.pools import AdaptivePools

# The loss to hold. Where likely false negatives are left out, batches may be harder.
_TARGET_LOSS, _TARGET_LOSS_WITH_RULE = 0.05, 0.3


class AutoPools(AdaptivePools):
    """Adaptive pools that take the loss from a Trainer's steps, and tell the log with which batches they go on.

    Args:
        target_loss: The training loss to hold, above 0. ``None`` lets :meth:`choose_target` choose it.

    Raises:
        TypeError: If ``target_loss`` is not a number.
        ValueError: If it is not above 0, or not finite.
    """

    def __init__(self, target_loss: float | None) -> None:
        super().__init__(_TARGET_LOSS if target_loss is None else target_loss)
        self._is_given = target_loss is not None
        self._said_to_compose = False  # what the log said last

    def choose_target(self, has_rule: bool) -> None:
        """Choose the target loss, if none was given.

        Args:
            has_rule: Whether a rule says which pairs are likely false negatives.
        """
        if not self._is_given:
            self.target_loss = _TARGET_LOSS_WITH_RULE if has_rule else _TARGET_LOSS

    def observe_step(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """Note the loss of a step, the mean over all processes. Each process must call it.

        Args:
            trainer: The Trainer.
            module: The module.
            outputs: What ``training_step`` returned. A step that was skipped, and so returned nothing, is not noted.

        Raises:
            TypeError: If the step did not return the loss.
        """
        if not outputs and module.automatic_optimization:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            got = (sorted(outputs) or "nothing") if isinstance(outputs, dict) else type(outputs).__name__
            raise TypeError(
                'pool_size="auto" needs each training_step to return the loss, also with manual optimization, got '
                f"{got}."
            )
        # Lightning has divided the loss by the number of batches whose gradients it accumulates. The mean is taken at
        # each step, so that the state of one process is the state of all.
        times = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        self.observe(trainer.strategy.reduce(loss.detach() * times, reduce_op="mean"))

    def say_what_changes(self) -> None:
        """Tell the log if pools begin to be composed, or cease to be."""
        if self.composes != self._said_to_compose:
            self._say("goes on", "is")
            self._said_to_compose = self.composes

    def say_how_it_ended(self) -> None:
        """Tell the log if the last batches were uniform."""
        if not self.composes:
            self._say("ended", "was")

    def _say(self, goes_on: str, is_: str) -> None:
        what = f"pools of {round(self.n_batches)} batches" if self.composes else "uniform batches"
        advice = ""
        if not self.composes:
            advice = (
                " Batches are composed once the loss is well below target_loss. At a temperature above 0.1 the least "
                'possible loss may be above it: see target_loss in "Choosing settings".'
            )
        rank_zero_info(
            f'BatchSamplerCallback: pool_size="auto" {goes_on} with {what}. The loss {is_} {self.loss:.2g}, and '
            f"target_loss is {self.target_loss:.2g}.{advice}"
        )
