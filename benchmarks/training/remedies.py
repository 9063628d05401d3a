"""Remedies for false negatives that need nothing but what the sampler knows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import ExactGraph
from bs_lightning.compose import ComposeFunction


@dataclass(frozen=True)
class SkippingGraph:
    """A graph of exact nearest neighbours without the very nearest, which may be false negatives."""

    n_neighbors: int = 15
    n_skipped: int = 5

    def __call__(self, embeddings: Tensor, *, seed: int = 0) -> NDArray[np.int32]:
        """Return the neighbours after the first ``n_skipped``."""
        return ExactGraph(self.n_neighbors + self.n_skipped)(embeddings, seed=seed)[:, self.n_skipped :]


@dataclass(frozen=True)
class MixedComposer:
    """A composer whose batches are half composed and half uniform."""

    composer: ComposeFunction

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Compose half of the pool into half-batches, and fill these with the other half at random."""
        n_batches, n_composed = len(embeddings) // batch_size, batch_size // 2
        order = np.random.default_rng(seed).permutation(len(embeddings))
        chosen, others = np.split(order, [n_batches * n_composed])
        composed = chosen[self.composer(embeddings[chosen], n_composed, seed=seed, epoch=epoch)]
        return np.concatenate([composed, others.reshape(n_batches, -1)], axis=1)
