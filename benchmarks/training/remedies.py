"""Remedies for false negatives that follow from what the sampler alone knows, each a few lines on the callback."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import BatchSamplerCallback, Composer, ExactGraph
from bs_lightning.baselines import uniform_batches
from bs_lightning.compose import ComposeFunction, Graph


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

    composer: ComposeFunction

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        n_batches, n_composed = len(embeddings) // batch_size, batch_size // 2
        order = np.random.default_rng(seed).permutation(len(embeddings))
        chosen, others = np.split(order, [n_batches * n_composed])
        composed = chosen[self.composer(embeddings[chosen], n_composed, seed=seed, epoch=epoch)]
        return np.concatenate([composed, others.reshape(n_batches, -1)], axis=1)


class UniformComposer(Composer):
    """Uniform batches, and a graph for masks."""

    finds_nearest = True

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        self.neighbors = self.graph(embeddings, seed=seed)
        return uniform_batches(embeddings, batch_size, seed=seed, epoch=epoch)


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
