"""Graph: a pool's graph, where all processes of a Trainer build it together, or where it is kept for later pools."""

from functools import cached_property

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor

from bs_lightning._nndescent import shared_cores
from bs_lightning._types import Indices, Neighbors
from bs_lightning.compose import Composer, RWRComposer, asked_for
from bs_lightning.edges import check_graph, restricted
from bs_lightning.graphs import Graph, SharedGraph, can_share
from bs_lightning.isolation import isolated
from bs_lightning.layout import BatchLayout
from bs_lightning.plan import pool_seed
from bs_lightning.plugin.processes import cores_of_one_process, failing_together, gather
from bs_lightning.plugin.sources import EmbeddingSource


class TrainerGraph:
    """Builds the graphs of a composer where a composer alone could not: with all processes, or for several pools.

    Args:
        trainer: The Trainer.
        source: Gives the pools' embeddings.
        composer: The composer that takes the graphs.
        per_rank: Whether each process composes batches from its own share of a pool, and so shares no graph.
    """

    def __init__(self, trainer: Trainer, source: EmbeddingSource, composer: Composer, per_rank: bool) -> None:
        self._trainer = trainer
        self._source = source
        self._composer = composer
        self._per_rank = per_rank
        self._kept: Neighbors | None = None
        self._version: int | None = None  # of the embeddings that the kept graph was built from

    @cached_property
    def n_cores(self) -> int:
        """This process's share of its cores, for pynndescent. All processes must ask for it at the same place."""
        return cores_of_one_process(self._trainer)

    @cached_property
    def shared(self) -> SharedGraph | None:
        """The graph that all processes build together, or ``None``. All processes must ask for it at the same place.

        All processes must hold the pool's embeddings, and have the same graph.
        """
        if self._trainer.world_size == 1 or self._per_rank or not self._source.in_all_processes:
            return None
        graph = self._graph if can_share(self._graph) else None
        # All processes decide alike, or they would wait for each other.
        everywhere = set(gather(self._trainer, None if graph is None else repr(graph)))
        return graph if len(everywhere) == 1 else None

    def forget(self) -> None:
        """Build the graph that is kept anew when it is needed next."""
        self._kept = self._version = None

    def neighbors(self, embeddings: Tensor, indices: Indices, layout: BatchLayout, *, seed: int) -> Neighbors | None:
        """Return a pool's graph, if it is kept for later pools or shared by all processes. Every process calls it.

        A graph is kept if the pool is the whole dataset, and its embeddings stay the same for a while.

        Args:
            embeddings: The pool's, as :meth:`EmbeddingSource.read` returned them.
            indices: Dataset indices of the pool, int64 ``[P]``.
            layout: The epoch's sizes.
            seed: The pool's seed.

        Returns:
            int32 ``[P, K]`` in rank 0; ``None`` in the others, and where the composer builds its own.
        """
        graph, version = self._graph, self._source.version
        is_whole = len(indices) == layout.n_full * layout.global_batch_size
        if graph is None or version is None or not is_whole:
            return self._built_together(embeddings, seed)
        self._keep(graph, version, layout.n_instances)
        with failing_together(self._trainer):
            return None if self._kept is None else restricted(self._kept, indices)

    @property
    def _graph(self) -> Graph | None:
        """What builds the composer's graph, or ``None`` if the composer takes no graph that was built for it."""
        composer = self._composer
        return composer.graph if isinstance(composer, RWRComposer) and "neighbors" in asked_for(composer) else None

    def _built_together(self, embeddings: Tensor, seed: int) -> Neighbors | None:
        """Return the graph that all processes build, in rank 0; ``None`` in the others, and if they share no graph."""
        trainer, graph = self._trainer, self.shared
        if graph is None:
            return None
        with shared_cores(self.n_cores), failing_together(trainer), isolated():
            part = graph.part(embeddings, trainer.global_rank, trainer.world_size, seed=seed)
        parts = gather(trainer, part)
        with failing_together(trainer), isolated():
            return graph.join(parts, embeddings, seed=seed) if trainer.is_global_zero else None

    def _keep(self, graph: Graph, version: int, n_instances: int) -> None:
        """Build the graph of the whole dataset in rank 0, if the embeddings have changed. Every process calls it.

        Its seed does not depend on the pool, so a resumed run builds the same graph.
        """
        trainer = self._trainer
        # All processes build if one of them must: it may have attached the data again.
        if trainer.strategy.reduce_boolean_decision(self._version == version):
            return
        self._kept = self._composer.neighbors = None  # two more graphs may not fit into memory
        embeddings = self._source.read(np.arange(n_instances))
        seed = pool_seed(trainer.datamodule.train_sampler.seed, version, 0)
        neighbors = self._built_together(embeddings, seed)
        with failing_together(trainer), isolated():
            if trainer.is_global_zero:
                if neighbors is None:
                    neighbors = graph(embeddings, seed=seed)
                neighbors = check_graph(neighbors, n_instances)
        self._kept, self._version = neighbors, version
