"""The arms of a study, by name: each makes batches in one way and trains with one loss.

To add one, add a line to :data:`ARMS`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from bs_lightning import BatchSamplerCallback, ExactGraph, NNDescentGraph, RWRComposer
from bs_lightning.baselines import B3Composer, GCBSComposer, UniformComposer, knn_batches
from bs_lightning.compose import ComposeFunction
from bs_lightning.graphs import Graph
from bs_lightning.plugin.encoder import ModuleEmbed
from bs_lightning.presets import public_code
from bs_lightning.rules import AbovePositive

from .remedies import MixedComposer, SkippingGraph


def walk(graph: Graph | None = None, restart_probability: float = 0.2, n_roots: int = 1) -> RWRComposer:
    """Return a composer of random walks with restart; ``None`` is an exact graph of 15 neighbours."""
    return RWRComposer(ExactGraph(15) if graph is None else graph, restart_probability, n_roots=n_roots)


def near() -> RWRComposer:
    """Return a composer whose walks stay close to their start."""
    return RWRComposer(NNDescentGraph(5), restart_probability=0.5)


@dataclass(frozen=True)
class Arm:
    """How an arm makes its batches, and which loss it trains with.

    Args:
        composer: ``None`` for uniform batches.
        pool: Pool size in batches; ``"all"`` is the whole dataset, and ``"auto"`` follows the loss. ``None`` is the
            whole dataset, refreshed every 100 steps.
        uniform_part: Share of training that starts with uniform batches; they last for at least one epoch.
        loss: A key of ``LOSSES``; ``None`` is the task's InfoNCE.
        encode_every: Epochs for which the dataset's embeddings and their graph are kept; ``None`` embeds each pool.
        recycle: Whether batches are composed from the embeddings that training computed.
        masked: Pairs that the loss leaves out: ``None``; ``"nearest"``, mutual nearest neighbours in the pool;
            ``"own"``, pairs that the model in training calls more alike than the positive pair; ``"reference"``, pairs
            that a fixed model calls so; ``"groups"``, what users know to belong together; or ``"labels"``, all false
            negatives, which users cannot know.
        own_edges: Whether walks avoid the pairs of ``"own"``, also if the loss does not leave them out.
        from_reference: Whether batches are composed from the fixed model's embeddings.
        target_loss: The loss that ``pool="auto"`` holds; ``None`` is the callback's default.
    """

    composer: ComposeFunction | None = field(default_factory=walk)
    pool: int | Literal["all", "auto"] | None = 10
    uniform_part: float = 0.0
    loss: str | None = None
    encode_every: int | None = None
    recycle: bool = False
    masked: str | None = None
    own_edges: bool = False
    from_reference: bool = False
    target_loss: float | None = None

    def callback(
        self, batch_size: int, n_epochs: int, embed: ModuleEmbed | None = None, every_side: bool = False
    ) -> BatchSamplerCallback | None:
        """Return the callback to add to the Trainer; ``None`` trains with uniform batches.

        Args:
            batch_size: Instances in a batch.
            n_epochs: Epochs of the training.
            embed: Embeds both sides of a pair; ``None`` where an instance has one side.
            every_side: Whether the loss compares both sides of a pair with both sides of the others.
        """
        if self.composer is None:
            return None
        warmup_epochs = max(1, round(self.uniform_part * n_epochs))
        if self.pool is None:
            return BatchSamplerCallback(None, self.composer, warmup_epochs, refresh_every=100, recycle=self.recycle)
        return BatchSamplerCallback(
            self.pool * batch_size if isinstance(self.pool, int) else self.pool,
            self.composer,
            warmup_epochs,
            target_loss=self.target_loss if self.pool == "auto" else None,
            encode_every=self.encode_every,
            recycle=self.recycle,
            mask_nearest=5 if self.masked == "nearest" else None,
            own_rule=AbovePositive(every_side=every_side) if self.masked == "own" or self.own_edges else None,
            from_reference=self.from_reference,
            embed=None if self.recycle or self.from_reference else embed,
        )


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
    # Composed batches only late in training
    "late-half": Arm(uniform_part=0.5),
    "late-quarter": Arm(uniform_part=0.75),
    # Remedies for false negatives; the oracle masks by labels, so it bounds what a mask can gain
    "skip": Arm(walk(SkippingGraph())),
    "masked": Arm(masked="nearest"),
    "masked-uniform": Arm(UniformComposer(ExactGraph(5)), masked="nearest"),
    "masked-pool20": Arm(pool=20, masked="nearest"),
    "oracle": Arm(masked="labels"),
    "oracle-uniform": uniform(masked="labels"),
    # Composed from the embeddings that training computes; "paper" has the settings of the paper's public code
    "recycle": Arm(recycle=True),
    "pool10-kept": Arm(encode_every=4),
    "paper": Arm(public_code().composer, pool=None, recycle=True),
    # Pools of the whole dataset: walks as by default, walks that stay close, and nearest neighbours
    "all": Arm(pool="all"),
    "all-near": Arm(near(), pool="all"),
    "all-near-kept": Arm(near(), pool="all", encode_every=4),
    "all-knn": Arm(knn_batches, pool="all"),
    "auto": Arm(near(), pool="auto"),
    "auto0.3": Arm(near(), pool="auto", target_loss=0.3),
    # A fixed model's opinion on what is a false negative, and batches from that model's embeddings
    "reference-uniform": uniform(masked="reference"),
    "reference-pool10": Arm(masked="reference"),
    "reference": Arm(near(), pool="all", from_reference=True),
    "reference-all": Arm(near(), pool="all", masked="reference"),
    "reference-auto": Arm(near(), pool="auto", masked="reference"),
    "own-uniform": Arm(UniformComposer(ExactGraph(15)), masked="own"),
    "own-all": Arm(near(), pool="all", masked="own"),
    "own-all-kept": Arm(near(), pool="all", masked="own", encode_every=4),
    "own-edges-all": Arm(near(), pool="all", own_edges=True),
    "own-auto": Arm(near(), pool="auto", masked="own"),
    "groups-uniform": uniform(masked="groups"),
    "groups-all": Arm(near(), pool="all", masked="groups"),
    "groups-auto": Arm(near(), pool="auto", masked="groups"),
    # Baselines from the literature, in pools of ten batches
    "knn": Arm(knn_batches),
    "gcbs": Arm(GCBSComposer(n_neighbors=15)),
    # Not B3 as published, which ranks the whole dataset by a fixed, finished teacher
    "b3": Arm(B3Composer(n_skipped=5, n_neighbors=15, community_size=8)),
    # Other losses
    "debiased": uniform(loss="debiased"),
    "debiased-pool10": Arm(loss="debiased"),
    "hard": uniform(loss="hard"),
    "hard-pool10": Arm(loss="hard"),
    "weighted": uniform(loss="weighted"),
    "weighted-pool10": Arm(loss="weighted"),
    "weighted-pool20": Arm(pool=20, loss="weighted"),
    "weighted-all": Arm(near(), pool="all", loss="weighted"),
    "weighted-auto": Arm(near(), pool="auto", loss="weighted"),
    "hardness-weighted": uniform(loss="hardness-weighted"),
}
