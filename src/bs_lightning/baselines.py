"""Baselines: other ways to compose batches, on the interface of :class:`~bs_lightning.RWRComposer`.

Each is a composer (see :mod:`bs_lightning.compose`) that uses every instance once; give it to
``BatchSamplerCallback(composer=...)`` or call it on embeddings of your own. What they cost and how hard their batches
are stands in ``docs/composers.md``.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning.compose import Batches, Graph
from bs_lightning.graphs import _BLOCK_ENTRIES, ExactGraph, _check_embeddings


def uniform_batches(embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
    """Uniform batches: a random permutation, cut.

    Args:
        embeddings: Floats of shape ``[P, d]``, ``P`` a multiple of ``batch_size``; only ``P`` counts.
        batch_size: Instances in a batch.
        seed: The same seed gives the same batches.
        epoch: Not used.

    Returns:
        int64 of shape ``[P // batch_size, batch_size]``.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import uniform_batches
        >>> uniform_batches(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)
    """
    return np.random.default_rng(seed).permutation(len(embeddings)).reshape(-1, batch_size)


@torch.no_grad()
def knn_batches(embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
    """The paper's "kNN sampler": a random instance and its nearest, among those that no earlier batch took.

    The work grows with ``P^2 d / batch_size``.

    Args:
        embeddings: Floats of shape ``[P, d]``, ``P`` a multiple of ``batch_size``, on any device.
        batch_size: Instances in a batch.
        seed: The same seed gives the same batches.
        epoch: Not used.

    Returns:
        int64 of shape ``[P // batch_size, batch_size]``, each batch's first instance followed by its nearest.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import knn_batches
        >>> knn_batches(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]]), 2, seed=0, epoch=0).tolist()
        [[2, 0], [1, 3]]

    Source: arXiv 2306.03355, section 4.4.
    """
    _check_embeddings(embeddings)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    order = np.random.default_rng(seed).permutation(len(unit))
    used = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    batches = np.empty((len(unit) // batch_size, batch_size), dtype=np.int64)
    position = 0
    for batch in batches:
        taken = used.cpu().numpy()
        while taken[order[position]]:
            position += 1
        root = order[position]
        similarity = (unit @ unit[root]).masked_fill_(used, -torch.inf)
        similarity[root] = torch.inf
        nearest = similarity.topk(batch_size).indices
        used[nearest] = True
        batch[:] = nearest.cpu().numpy()
    return batches


@dataclass(frozen=True)
class GCBSComposer:
    """Global contrastive batch sampling: the most similar pairs are brought together by reordering.

    The pairs above a quantile of all similarities make a sparse graph; reverse Cuthill-McKee orders it so that its
    edges are short; the order is cut into batches. Needs scipy (``pip install bs-lightning[baselines]``).

    Args:
        n_neighbors: Pairs kept, as a mean per instance; it sets the quantile, which is estimated from a sample.

    Raises:
        ImportError: If scipy is not installed.
        ValueError: If ``n_neighbors`` is below 1.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import GCBSComposer
        >>> GCBSComposer(n_neighbors=10)(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)

    Source: Sachidananda et al., "Global selection of contrastive batches via optimization on sample permutations",
    ICML 2023, arXiv 2210.12874.
    """

    n_neighbors: int = 100

    def __post_init__(self) -> None:
        _require("scipy")
        if self.n_neighbors < 1:
            raise ValueError(f"n_neighbors must be at least 1, got {self.n_neighbors}.")

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose batches, as a composer does; ``epoch`` is not used."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        _check_embeddings(embeddings)
        size = len(embeddings)
        unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
        threshold = self._threshold(unit, seed)
        rows_per_block = max(1, _BLOCK_ENTRIES // size)
        pieces = []
        for start in range(0, size, rows_per_block):
            kept = (unit[start : start + rows_per_block] @ unit.T > threshold).nonzero().int().cpu().numpy()
            pieces.append(kept + np.array([start, 0], dtype=np.int32))
        rows, columns = np.concatenate(pieces).T
        graph = csr_array((np.ones(len(rows), dtype=np.bool_), (rows, columns)), shape=(size, size))
        order = reverse_cuthill_mckee(graph, symmetric_mode=True)
        return np.asarray(order, dtype=np.int64).reshape(-1, batch_size)

    def _threshold(self, unit: Tensor, seed: int) -> float:
        """The similarity that ``n_neighbors`` others exceed, on average over instances."""
        size = len(unit)
        if self.n_neighbors >= size - 1:
            return -torch.inf
        some = torch.from_numpy(np.random.default_rng(seed).permutation(size)[: max(2, 2**21 // size)]).to(unit.device)
        similarity = (unit[some] @ unit.T).flatten()
        above = round(len(similarity) * (self.n_neighbors + 1) / size)  # and each with itself
        return float(similarity.kthvalue(len(similarity) - above).values)


@dataclass(frozen=True)
class B3Composer:
    """B3: communities of a graph that leaves out the very nearest, several of them in a batch.

    The graph joins each instance with those of rank ``n_skipped`` to ``n_skipped + n_neighbors`` in similarity, as the
    nearest are taken for false negatives; METIS cuts it into communities; batches are filled with communities in random
    order. B3 ranks by a fixed teacher; here the model itself is the teacher. Needs pymetis
    (``pip install bs-lightning[baselines]``).

    Args:
        n_skipped: Nearest left out (B3's p).
        n_neighbors: Neighbours kept after them (B3's m).
        community_size: Instances in a community, about.
        graph: Ranks the neighbours; ``None`` is ``ExactGraph(n_skipped + n_neighbors)``.

    Raises:
        ImportError: If scipy or pymetis is not installed.
        ValueError: If an argument is out of range, or the embeddings are too few for ``n_skipped``.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import B3Composer
        >>> composer = B3Composer(n_skipped=2, n_neighbors=10, community_size=8)
        >>> composer(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)

    Source: Thirukovalluru et al., "Breaking the batch barrier (B3) of contrastive learning via smart batch mining",
    NeurIPS 2025, arXiv 2505.11293; the defaults are in the names of its public models.
    """

    n_skipped: int = 30
    n_neighbors: int = 100
    community_size: int = 32
    graph: Graph | None = None

    def __post_init__(self) -> None:
        _require("scipy", "pymetis")
        for name, least in (("n_skipped", 0), ("n_neighbors", 1), ("community_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose batches, as a composer does; ``epoch`` is not used."""
        graph = ExactGraph(self.n_skipped + self.n_neighbors) if self.graph is None else self.graph
        ranked = graph(embeddings, seed=seed)
        neighbors = ranked[:, self.n_skipped : self.n_skipped + self.n_neighbors]
        if neighbors.shape[1] == 0:
            raise ValueError(
                f"n_skipped={self.n_skipped} leaves nothing of the graph's {ranked.shape[1]} neighbours for each of "
                f"{len(embeddings)} embeddings. Lower it, or give larger pools or a graph with more neighbours."
            )
        community = self._communities(neighbors, seed)
        rng = np.random.default_rng(seed)
        shuffled = rng.permutation(community.max() + 1)[community]
        # Random within a community too, as a batch's end may cut it.
        return np.lexsort((rng.random(len(community)), shuffled)).reshape(-1, batch_size)

    def _communities(self, neighbors: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
        """Each instance's community, by METIS on the graph with both directions of every edge."""
        import pymetis
        from scipy.sparse import csr_array

        size, k = neighbors.shape
        n_communities = max(1, round(size / self.community_size))
        if n_communities == 1:
            return np.zeros(size, dtype=np.int64)
        starts = np.arange(0, size * k + 1, k)
        directed = csr_array((np.ones(size * k, dtype=np.int32), neighbors.ravel(), starts), shape=(size, size))
        both = (directed + directed.T).tocsr()
        options = pymetis.Options()
        options.seed = seed % 2**31
        adjacency = pymetis.CSRAdjacency(both.indptr, both.indices)
        partition = pymetis.part_graph(n_communities, adjacency, options=options)
        return np.asarray(partition.vertex_part, dtype=np.int64)


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"This composer needs {package}: pip install bs-lightning[baselines]")
