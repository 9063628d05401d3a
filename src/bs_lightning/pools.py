"""Pools: which batches of an epoch are planned together. A rule for it is a cut."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bs_lightning._checks import check_integer, check_number, check_positive
from bs_lightning._saved import damaged, saved_counts, saved_value
from bs_lightning.layout import BatchLayout

_WINDOW = 20  # from this many batches of a pool on, the latest count most
_MOST = 4.0  # times that a pool may be as large or as small as the last one
_UNIFORM_STRETCH = 10  # batches between two looks at the loss, where batches are uniform


class Cut(ABC):
    """Decides which batches of an epoch are planned together."""

    def check(self, layout: BatchLayout) -> None:  # noqa: B027, most cuts fit every layout
        """Refuse a layout that cannot be cut. By default all can.

        Args:
            layout: The epoch's sizes.

        Raises:
            ValueError: If it cannot be cut.
        """

    @abstractmethod
    def next_pool(self, start: int, stop: int, layout: BatchLayout) -> tuple[slice, int]:
        """Return which batches to plan together, and how far to serve them.

        Args:
            start: The number of the next batch to serve.
            stop: The number of the batch before which the epoch ends.
            layout: The epoch's sizes.

        Returns:
            The numbers of the batches to plan together, and the number of the batch before which the next plan begins.
        """


@dataclass(frozen=True)
class Pools(Cut):
    """Cuts an epoch into pools and plans each pool when its first batch is due.

    Args:
        size: Instances per pool, at least one global batch. Pools are near-equal multiples of the global batch, so
            their size differs a little from this number.

    Raises:
        TypeError: If ``size`` is not an integer.

    Example:
        >>> from bs_lightning import Pools
        >>> from bs_lightning.layout import BatchLayout
        >>> Pools(size=16).next_pool(0, 10, BatchLayout(40, batch_size=4))
        (slice(0, 4, None), 4)
    """

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_integer("pool_size", self.size))

    def check(self, layout: BatchLayout) -> None:
        """Refuse pools that cannot hold one global batch."""
        if self.size < layout.global_batch_size:
            raise ValueError(
                f"pool_size must be at least one global batch, {layout.global_batch_size} = batch_size "
                f"{layout.batch_size} x {layout.world_size} processes, got {self.size}. Ten global batches suit most."
            )

    def n_batches(self, layout: BatchLayout) -> int:
        """Return the number of batches in a pool of a stream, whose length is not known. Half a batch is rounded up."""
        return max(1, int(self.size / layout.global_batch_size + 0.5))

    def next_pool(self, start: int, stop: int, layout: BatchLayout) -> tuple[slice, int]:
        """Cut off a pool, as :class:`Cut` says.

        The pool depends only on the batches that remain, so a resumed epoch cuts the same pools.
        """
        remaining = stop - start
        n_pools = max(1, int(remaining * layout.global_batch_size / self.size + 0.5))
        end = start - (-remaining // n_pools)
        return slice(start, end), end


@dataclass(frozen=True)
class WholeData(Cut):
    """Plans the whole dataset at the start of an epoch, and again after ``every`` batches.

    Args:
        every: Number of batches that are served from one plan, at least 1 (the paper's t).

    Raises:
        TypeError: If ``every`` is not an integer.
        ValueError: If ``every`` is below 1.

    Example:
        >>> from bs_lightning import WholeData
        >>> from bs_lightning.layout import BatchLayout
        >>> WholeData(every=3).next_pool(0, 10, BatchLayout(40, batch_size=4))
        (slice(0, 10, None), 3)

    Source: the refresh interval of arXiv 2306.03355.
    """

    every: int

    def __post_init__(self) -> None:
        every = check_integer("refresh_every", self.every, 1, "The paper's is 100.")
        object.__setattr__(self, "every", every)

    def next_pool(self, start: int, stop: int, layout: BatchLayout) -> tuple[slice, int]:
        """Return all full batches, as :class:`Cut` says."""
        return slice(0, layout.n_full), min(start + self.every, stop)


class AdaptivePools(Cut):
    """Cuts an epoch into pools, larger ones while the training loss is below a target, smaller ones while it is above.

    It starts with uniform batches, and returns to them if the loss stays above the target. A batch from a larger pool
    is harder, so its loss is higher. The next pool has ``(target_loss / loss) ** 2`` times as many batches as the last
    one, but at least a quarter and at most four times as many.

    In your own training loop, call :meth:`observe` after each step. While :attr:`composes` is ``False``, the planner
    must leave a pool in its order. Save :meth:`state_dict` beside the sampler's.

    Args:
        target_loss: The training loss to hold, above 0.

    Attributes:
        n_batches: Batches in a pool, from 1 for uniform batches; not rounded.

    Raises:
        TypeError: If ``target_loss`` is not a number.
        ValueError: If it is not above 0, or not finite.

    Example:
        >>> import torch
        >>> from bs_lightning.pools import AdaptivePools
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
        self._n_observed = torch.tensor(0)
        self._n_served = 0

    @property
    def composes(self) -> bool:
        """Whether pools are large enough to compose; if not, batches are uniform."""
        return self.n_batches >= 2

    @property
    def loss(self) -> float:
        """The mean loss of the last pool so far; NaN before the first batch. To read it waits for a GPU."""
        return float(self._loss)

    def observe(self, loss: Tensor | float) -> None:
        """Note the loss of a batch. A loss that is not finite counts for nothing.

        Args:
            loss: A number or a tensor of one number, the mean over all processes. A tensor may be on any device, which
                is not waited for.

        Raises:
            TypeError: If it is neither a number nor a tensor.
            ValueError: If the tensor holds several numbers.
        """
        loss = loss if isinstance(loss, Tensor) else torch.tensor(check_number("loss", loss))
        if loss.numel() != 1:
            raise ValueError(f"loss must be one number, got shape {list(loss.shape)}. Take the mean over the batch.")
        loss = loss.detach().float().squeeze()
        counts = loss.isfinite()
        self._n_observed = self._n_observed.to(loss.device) + counts
        share = 1 / self._n_observed.clamp(1, _WINDOW)
        before = self._loss.to(loss.device)
        before = torch.where(before.isfinite(), before, loss)
        self._loss = torch.where(counts, before + share * (loss - before), before)

    def next_pool(self, start: int, stop: int, layout: BatchLayout) -> tuple[slice, int]:
        """Choose the next pool's size from the loss, and cut it off, as :class:`Cut` says."""
        # A pool that the epoch's end made much smaller says nothing of the pools of this size. The epochs of a resumed
        # run may be shorter than such a pool, though.
        if self._n_observed and (not self.composes or self._n_served > min(self.n_batches, stop) / 2):
            loss = self.loss
            if math.isfinite(loss):
                factor = min(max((self.target_loss / max(loss, 1e-12)) ** 2, 1 / _MOST), _MOST)
                self.n_batches = min(max(self.n_batches * factor, 1.0), float(stop))
        self._n_observed = torch.zeros_like(self._n_observed)  # stays on the device
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
            "n_batches": float(self.n_batches),
            "loss": self._loss.cpu(),
            "n_observed": int(self._n_observed),
            "n_served": self._n_served,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state lacks a value, or holds one that is out of range.
            TypeError: If a value has a wrong type.
        """
        n_batches, loss = saved_value(state_dict, "n_batches", float), saved_value(state_dict, "loss", Tensor)
        if not 1 <= n_batches < math.inf:
            raise damaged("n_batches", n_batches, "finite and at least 1")
        if loss.numel() != 1:
            raise damaged("loss", loss, "one number")
        counts = saved_counts(state_dict, ("n_observed", "n_served"))
        self.n_batches, self._loss = n_batches, loss
        self._n_observed, self._n_served = torch.tensor(counts["n_observed"]), counts["n_served"]
