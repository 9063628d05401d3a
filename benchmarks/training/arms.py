"""The arms of a study: ways to make batches (and losses), by name.

To add one, add a line to :data:`ARMS`.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer
from bs_lightning.baselines import B3Composer, GCBSComposer, knn_batches
from bs_lightning.compose import Composer, Graph


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


def walk(graph: Graph | None = None, restart_probability: float = 0.2, n_roots: int = 1) -> RWRComposer:
    """Random walks with restart, on an exact graph unless another is given."""
    return RWRComposer(ExactGraph(15) if graph is None else graph, restart_probability, n_roots=n_roots)


@dataclass(frozen=True)
class Arm:
    """How an arm makes its batches, and its loss.

    Args:
        composer: ``None`` for uniform batches.
        pool: Pool size in batches.
        uniform_part: Part of training that has uniform batches first; at least one epoch has.
        loss: A key of ``LOSSES``.
    """

    composer: Composer | None = field(default_factory=walk)
    pool: int = 10
    uniform_part: float = 0.0
    loss: str = "nt-xent"

    def callbacks(self, batch_size: int, n_epochs: int) -> list[BatchSamplerCallback]:
        """What to add to the Trainer."""
        if self.composer is None:
            return []
        warmup_epochs = max(1, round(self.uniform_part * n_epochs))
        return [BatchSamplerCallback(self.pool * batch_size, self.composer, warmup_epochs)]


uniform = partial(Arm, composer=None)

ARMS = {
    "uniform": uniform(),
    # Hardness
    "pool4": Arm(pool=4),
    "pool10": Arm(),
    "pool20": Arm(pool=20),
    "alpha0.05": Arm(walk(restart_probability=0.05)),
    "alpha0.5": Arm(walk(restart_probability=0.5)),
    # A few very hard negatives among easy ones, instead of moderately hard ones throughout
    "roots4": Arm(walk(n_roots=4)),
    "roots8": Arm(walk(n_roots=8)),
    "mixed": Arm(MixedComposer(walk())),
    # Later
    "late-half": Arm(uniform_part=0.5),
    "late-quarter": Arm(uniform_part=0.75),
    # Not the nearest
    "skip": Arm(walk(SkippingGraph())),
    # Other ways to compose
    "knn": Arm(knn_batches),
    "gcbs": Arm(GCBSComposer(n_neighbors=15)),
    "b3": Arm(B3Composer(n_skipped=5, n_neighbors=15, community_size=8)),
    # Other losses
    "debiased": uniform(loss="debiased"),
    "debiased-pool10": Arm(loss="debiased"),
    "hard": uniform(loss="hard"),
    "hard-pool10": Arm(loss="hard"),
}
