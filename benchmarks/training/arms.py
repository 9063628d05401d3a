"""The arms of a study: ways to make batches (and losses), by name.

To add one, add a line to :data:`ARMS`.
"""

from dataclasses import dataclass, field
from functools import partial

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer
from bs_lightning.baselines import B3Composer, GCBSComposer, knn_batches
from bs_lightning.compose import ComposeFunction, Graph
from bs_lightning.presets import public_code

from .remedies import MixedComposer, SkippingGraph, SteadyCallback, UniformComposer


def walk(graph: Graph | None = None, restart_probability: float = 0.2, n_roots: int = 1) -> RWRComposer:
    """Random walks with restart, on an exact graph unless another is given."""
    return RWRComposer(ExactGraph(15) if graph is None else graph, restart_probability, n_roots=n_roots)


@dataclass(frozen=True)
class Arm:
    """How an arm makes its batches, and its loss.

    Args:
        composer: ``None`` for uniform batches.
        pool: Pool size in batches; ``None`` is the whole data set, refreshed every 100 steps.
        uniform_part: Part of training that has uniform batches first; at least one epoch has.
        loss: A key of ``LOSSES``.
        recycle: Whether batches are composed from the embeddings that training has computed.
        masked: Pairs that are left out of the loss: none, ``"nearest"`` (mutual nearest in the pool) or ``"labels"``
            (the true false negatives, which no user knows).
        steady: Hardness to hold by adapting the pool size; ``None`` keeps the pool size.
    """

    composer: ComposeFunction | None = field(default_factory=walk)
    pool: int | None = 10
    uniform_part: float = 0.0
    loss: str = "nt-xent"
    recycle: bool = False
    masked: str | None = None
    steady: float | None = None

    def callback(self, batch_size: int, n_epochs: int) -> BatchSamplerCallback | None:
        """What to add to the Trainer."""
        if self.composer is None:
            return None
        warmup_epochs = max(1, round(self.uniform_part * n_epochs))
        if self.pool is None:
            return BatchSamplerCallback(None, self.composer, warmup_epochs, refresh_every=100, recycle=self.recycle)
        pool_size = self.pool * batch_size
        if self.steady is not None:
            return SteadyCallback(self.steady, pool_size, batch_size, self.composer, warmup_epochs)
        mask_nearest = 5 if self.masked == "nearest" else None
        how = {"recycle": self.recycle, "mask_nearest": mask_nearest}
        return BatchSamplerCallback(pool_size, self.composer, warmup_epochs, **how)


uniform = partial(Arm, composer=None)

ARMS = {
    "uniform": uniform(),
    # Hardness
    "pool4": Arm(pool=4),
    "pool10": Arm(),
    "pool20": Arm(pool=20),
    "pool40": Arm(pool=40),
    "alpha0.05": Arm(walk(restart_probability=0.05)),
    "alpha0.5": Arm(walk(restart_probability=0.5)),
    # A few very hard negatives among easy ones, instead of moderately hard ones throughout
    "roots4": Arm(walk(n_roots=4)),
    "roots8": Arm(walk(n_roots=8)),
    "mixed": Arm(MixedComposer(walk())),
    # Later
    "late-half": Arm(uniform_part=0.5),
    "late-quarter": Arm(uniform_part=0.75),
    # Remedies for false negatives; the last is an oracle, which says what they do
    "skip": Arm(walk(SkippingGraph())),
    "masked": Arm(masked="nearest"),
    "masked-uniform": Arm(UniformComposer(ExactGraph(5)), masked="nearest"),
    "masked-pool20": Arm(pool=20, masked="nearest"),
    "steady0.1": Arm(steady=0.1),
    "oracle": Arm(masked="labels"),
    "oracle-uniform": uniform(masked="labels"),
    # From the embeddings that training computes; the second as in the paper
    "recycle": Arm(recycle=True),
    "paper": Arm(public_code().composer, pool=None, recycle=True),
    # Other ways to compose
    "knn": Arm(knn_batches),
    "gcbs": Arm(GCBSComposer(n_neighbors=15)),
    "b3": Arm(B3Composer(n_skipped=5, n_neighbors=15, community_size=8)),
    # Other losses
    "debiased": uniform(loss="debiased"),
    "debiased-pool10": Arm(loss="debiased"),
    "hard": uniform(loss="hard"),
    "hard-pool10": Arm(loss="hard"),
    "weighted": uniform(loss="weighted"),
    "weighted-pool10": Arm(loss="weighted"),
    "weighted-pool20": Arm(pool=20, loss="weighted"),
}
