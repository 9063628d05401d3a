"""Adaptive pools: a pool size that follows the training loss, so that batches are as hard as the model can use."""

import math
from typing import Any

import torch
from torch import Tensor

from bs_lightning._checks import check_positive
from bs_lightning.layout import BatchLayout

_WINDOW = 20  # batches over which the loss is averaged
_MOST = 4.0  # times that a pool may be as large or as small as the last one
_UNIFORM_STRETCH = 10  # batches between two looks at the loss, where batches are uniform


class AdaptivePools:
    """Cuts an epoch into pools, larger ones while the training loss is below a target, smaller ones while it is above.

    It starts with uniform batches, and returns to them if the loss stays above the target. A batch from a larger pool
    is harder, so its loss is higher. The next pool has ``(target_loss / loss) ** 2`` times as many batches as the last
    one, but at least a quarter and at most four times as many.

    Args:
        target_loss: The training loss to hold, above 0.

    Attributes:
        n_batches: Batches in a pool, from 1 for uniform batches; not rounded.

    Raises:
        TypeError: If ``target_loss`` is not a number.
        ValueError: If it is not above 0, or not finite.

    Example:
        >>> import torch
        >>> from bs_lightning.adaptive import AdaptivePools
        >>> from bs_lightning.layout import BatchLayout
        >>> pools, layout = AdaptivePools(target_loss=0.1), BatchLayout(4000, batch_size=4)
        >>> pools.observe(torch.tensor(0.06))
        >>> pools.next_pool(0, 1000, layout), pools.composes
        ((slice(0, 3, None), 3), True)
    """

    def __init__(self, target_loss: float) -> None:
        self.target_loss = check_positive("target_loss", target_loss, "Try 0.05.")
        self.n_batches = 1.0
        self._loss = torch.tensor(torch.nan)
        self._n_observed = 0
        self._n_served = 0

    @property
    def composes(self) -> bool:
        """Whether pools are large enough to compose; if not, batches are uniform."""
        return self.n_batches >= 2

    @property
    def loss(self) -> float:
        """The running mean of the loss; NaN before the first batch. To read it waits for a GPU."""
        return float(self._loss)

    def observe(self, loss: Tensor) -> None:
        """Note the loss of a batch. A loss that is not finite counts for nothing.

        Args:
            loss: A scalar, the mean over all processes. It may be on any device, which is not waited for.
        """
        self._n_observed += 1
        share = 1 / min(self._n_observed, _WINDOW)
        loss = loss.detach().float()
        before = self._loss.to(loss.device)
        before = torch.where(before.isfinite(), before, loss)
        self._loss = torch.where(loss.isfinite(), before + share * (loss - before), before)

    def check(self, layout: BatchLayout) -> None:
        """Accept every layout.

        Args:
            layout: The epoch's sizes.
        """

    def next_pool(self, start: int, stop: int, layout: BatchLayout) -> tuple[slice, int]:
        """Choose the next pool's size from the loss, and return the pool.

        Args:
            start: The number of the next batch to serve.
            stop: The number of the batch before which the epoch ends.
            layout: The epoch's sizes.

        Returns:
            The numbers of the batches to plan together, and the number of the batch before which the next plan begins.
        """
        # A pool that the epoch's end made much smaller says nothing of the pools of this size.
        if self._n_observed and (not self.composes or self._n_served > self.n_batches / 2):
            loss = self.loss
            if math.isfinite(loss):
                factor = min(max((self.target_loss / max(loss, 1e-12)) ** 2, 1 / _MOST), _MOST)
                self.n_batches = min(max(self.n_batches * factor, 1.0), float(stop))
        self._n_observed = 0
        size = round(self.n_batches) if self.composes else _UNIFORM_STRETCH
        end = min(start + size, stop)
        if stop - end < size / 2:  # no small pool at the epoch's end: its batches would be easier
            end = stop
        self._n_served = end - start
        return slice(start, end), end

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint.

        Returns:
            Tensors and plain Python values.
        """
        return {
            "n_batches": self.n_batches,
            "loss": self._loss.cpu(),
            "n_observed": self._n_observed,
            "n_served": self._n_served,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        self.n_batches = float(state_dict["n_batches"])
        self._loss = state_dict["loss"]
        self._n_observed = int(state_dict["n_observed"])
        self._n_served = int(state_dict["n_served"])
