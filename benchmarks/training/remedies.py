"""Remedies for false negatives that follow from what the sampler alone knows, each a few lines on the callback."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import BatchSamplerCallback, ExactGraph
from bs_lightning.compose import Composer


@dataclass(frozen=True)
class SkippingGraph:
    """Exact nearest neighbours but for the very nearest, which may be false negatives."""

    n_neighbors: int = 15
    n_skipped: int = 5

    def __call__(self, embeddings: Tensor, *, seed: int = 0) -> NDArray[np.int32]:
        return ExactGraph(self.n_neighbors + self.n_skipped)(embeddings, seed=seed)[:, self.n_skipped :]


@dataclass(frozen=True)
class MixedComposer:
    """Each batch is half composed and half uniform."""

    composer: Composer

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        n_batches, n_composed = len(embeddings) // batch_size, batch_size // 2
        order = np.random.default_rng(seed).permutation(len(embeddings))
        chosen, others = np.split(order, [n_batches * n_composed])
        composed = chosen[self.composer(embeddings[chosen], n_composed, seed=seed, epoch=epoch)]
        return np.concatenate([composed, others.reshape(n_batches, -1)], axis=1)


class MaskingCallback(BatchSamplerCallback):
    """Knows which instances of a pool are among each other's nearest, so that the loss can leave out these pairs."""

    def __init__(self, *args: Any, n_nearest: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.composer = _Remembering(self.composer, n_nearest)
        self._position: dict[int, int] = {}

    def plan_pool(self, trainer, indices, *, seed: int, epoch: int):
        self._position = {index: position for position, index in enumerate(indices.tolist())}
        return super().plan_pool(trainer, indices, seed=seed, epoch=epoch)

    def mask(self, batch: NDArray[np.int64]) -> Tensor | None:
        """Mutual nearest neighbours, bool ``[B, B]``; ``None`` while batches are uniform."""
        if not self._position:
            return None
        positions = np.array([self._position[index] for index in batch.tolist()])
        near = (self.composer.nearest[positions][:, :, None] == positions).any(axis=1)
        return torch.from_numpy(near & near.T)


@dataclass
class _Remembering:
    composer: Composer
    n_nearest: int
    nearest: NDArray[np.int32] = field(init=False)

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        self.nearest = ExactGraph(self.n_nearest)(embeddings, seed=seed)
        return self.composer(embeddings, batch_size, seed=seed, epoch=epoch)


class SteadyCallback(BatchSamplerCallback):
    """Adapts the pool size from epoch to epoch, so that hardness stays at a target: two to twenty batches."""

    def __init__(self, target: float, pool_size: int, batch_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(pool_size, *args, **kwargs)
        self.target = target
        self.bounds = 2 * batch_size, 20 * batch_size

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        hardness = trainer.callback_metrics.get("batch_sampler/hardness")  # the last epoch's
        if hardness is not None:
            # A pool e times as large is harder by about 0.07 (docs/composers.md); half of what lacks at a time.
            self.pool_size = round(self.pool_size * math.exp((self.target - float(hardness)) / 0.14))
            self.pool_size = int(np.clip(self.pool_size, *self.bounds))
