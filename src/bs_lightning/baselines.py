"""Baselines: composers to compare :class:`~bs_lightning.RWRComposer` with.

Each uses every instance once. Give it to ``BatchSamplerCallback(composer=...)``, or call it on your own embeddings (see
:mod:`bs_lightning.compose`). ``docs/composers.md`` says how long they take and how hard their batches are.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from bs_lightning._checks import check_instance_callable, check_integer, check_seed
from bs_lightning._embeddings import (
    BELOW_ANY_COSINE,
    as_embeddings,
    products,
    similar_to_nothing,
    similarity_blocks,
    similarity_factors,
    unit_rows,
)
from bs_lightning._types import Batches, Embeddings
from bs_lightning.compose import Composer, GraphComposer
from bs_lightning.edges import check_graph
from bs_lightning.graphs import ExactGraph, Graph


def uniform_batches(embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
    """Compose uniform batches: cut a random permutation.

    Args:
        embeddings: A tensor on any device or a NumPy array, floats of shape ``[P, d]`` or ``[P, 2, d]``, ``P`` a
            multiple of ``batch_size``. Only their number is used.
        batch_size: Instances in a batch.
        seed: The same seed gives the same batches.
        epoch: Not used.

    Returns:
        int64 of shape ``[P // batch_size, batch_size]``.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is not an integer, or the embeddings are not a dense tensor or an array
            of floats.
        ValueError: If ``seed`` is negative, ``batch_size`` does not divide ``P``, or the embeddings are not of shape
            ``[P, d]`` or ``[P, 2, d]`` or not finite.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import uniform_batches
        >>> uniform_batches(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)
    """
    embeddings, batch_size, seed = _checked(embeddings, batch_size, seed)
    return np.random.default_rng(seed).permutation(len(embeddings)).reshape(-1, batch_size)


class UniformComposer(GraphComposer):
    """Composes uniform batches, but builds the graph, so that ``own_rule`` and ``mask_nearest`` work.

    It shows what composing adds to a mask: compare it with :class:`~bs_lightning.RWRComposer` under the same loss.

    Args:
        graph: Builds the graph in which likely false negatives are looked for; ``None`` is ``NNDescentGraph()``.

    Attributes:
        neighbors: The last call's graph, int32 ``[P, K]``; ``None`` before the first call.

    Raises:
        TypeError: If ``graph`` is not callable.

    Example:
        >>> from bs_lightning import BatchSamplerCallback
        >>> from bs_lightning.baselines import UniformComposer
        >>> callback = BatchSamplerCallback(composer=UniformComposer(), mask_nearest=5)
    """

    def __call__(self, embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Build the graph, and compose a pool's batches as :func:`uniform_batches` does."""
        self.neighbors = check_graph(self.graph(embeddings, seed=seed), len(embeddings))
        return uniform_batches(embeddings, batch_size, seed=seed, epoch=epoch)


@torch.no_grad()
def knn_batches(embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
    """Compose batches as the paper's "kNN sampler": a random instance and its nearest neighbours.

    No batch takes instances that an earlier batch took. All-zero embeddings are similar to nothing, so they are taken
    last. The work grows with ``P^2 d / batch_size``.

    Args:
        embeddings: A tensor on any device or a NumPy array, floats of shape ``[P, d]`` or ``[P, 2, d]``, ``P`` a
            multiple of ``batch_size``.
        batch_size: Instances in a batch.
        seed: The same seed gives the same batches.
        epoch: Not used.

    Returns:
        int64 of shape ``[P // batch_size, batch_size]``, each batch's first instance followed by its nearest.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is not an integer, or the embeddings are not a dense tensor or an array
            of floats.
        ValueError: If ``seed`` is negative, ``batch_size`` does not divide ``P``, or the embeddings are not of shape
            ``[P, d]`` or ``[P, 2, d]`` or not finite.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import knn_batches
        >>> knn_batches(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]]), 2, seed=0, epoch=0).tolist()
        [[2, 0], [1, 3]]

    Source: arXiv 2306.03355, section 4.4.
    """
    embeddings, batch_size, seed = _checked(embeddings, batch_size, seed)
    unit = unit_rows(embeddings)
    left, right = similarity_factors(unit)
    isolated = similar_to_nothing(unit)
    order = np.random.default_rng(seed).permutation(len(unit))
    used = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    batches = np.empty((len(unit) // batch_size, batch_size), dtype=np.int64)
    position = 0
    for batch in batches:
        taken = used.cpu().numpy()
        while taken[order[position]]:
            position += 1
        root = order[position]
        similarity = products(left[root][None], right)[0]
        similarity.masked_fill_(isolated, BELOW_ANY_COSINE).masked_fill_(used, -torch.inf)
        similarity[root] = torch.inf
        nearest = similarity.topk(batch_size).indices
        used[nearest] = True
        batch[:] = nearest.cpu().numpy()
    return batches


@dataclass(frozen=True)
class GCBSComposer(Composer):
    """Global contrastive batch sampling (GCBS): order instances so that the most similar pairs stand close together.

    The pairs above a quantile of all similarities form a sparse graph. Reverse Cuthill-McKee orders the graph so that
    its edges are short. The order is cut into batches. Needs scipy (``pip install 'bs-lightning[baselines]'``).

    Args:
        n_neighbors: Pairs to keep per instance, on average. This sets the quantile, which is estimated from a sample.

    Raises:
        ImportError: If scipy is not installed.
        TypeError: If ``n_neighbors`` is not an integer.
        ValueError: If ``n_neighbors`` is below 1.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import GCBSComposer
        >>> GCBSComposer(n_neighbors=10)(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)

    Source: Sachidananda et al., "Global selection of contrastive batches via optimization on sample permutations",
    ICML 2023, arXiv 2210.12874.
    """

    n_neighbors: int = 15

    def __post_init__(self) -> None:
        _require("scipy")
        object.__setattr__(self, "n_neighbors", check_integer("n_neighbors", self.n_neighbors, 1))

    @torch.no_grad()
    def __call__(self, embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose batches.

        Args:
            embeddings: A tensor on any device or a NumPy array, floats of shape ``[P, d]`` or ``[P, 2, d]``, ``P`` a
                multiple of ``batch_size``.
            batch_size: Instances in a batch.
            seed: Seed of the sample from which the quantile is estimated.
            epoch: Not used.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``.

        Raises:
            TypeError: If ``batch_size`` or ``seed`` is not an integer, or the embeddings are not a dense tensor or an
                array of floats.
            ValueError: If ``seed`` is negative, ``batch_size`` does not divide ``P``, the embeddings are not of shape
                ``[P, d]`` or ``[P, 2, d]`` or not finite, or ``P`` is so small that the composer would keep all pairs.
        """
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        embeddings, batch_size, seed = _checked(embeddings, batch_size, seed)
        size = len(embeddings)
        if self.n_neighbors >= size - 1:
            raise ValueError(
                f"n_neighbors={self.n_neighbors} keeps all pairs of {size} embeddings, which orders nothing. Lower it, "
                "or give larger pools."
            )
        unit = unit_rows(embeddings)
        threshold = self._threshold(unit, seed)
        pieces = []
        for start, similarity in similarity_blocks(unit):
            kept = (similarity > threshold).nonzero().int().cpu().numpy()
            pieces.append(kept + np.array([start, 0], dtype=np.int32))
        rows, columns = np.concatenate(pieces).T
        graph = csr_array((np.ones(len(rows), dtype=np.bool_), (rows, columns)), shape=(size, size))
        order = reverse_cuthill_mckee(graph, symmetric_mode=True)
        return np.asarray(order, dtype=np.int64).reshape(-1, batch_size)

    def _threshold(self, unit: Tensor, seed: int) -> float:
        """Return the similarity that ``n_neighbors`` others exceed, on average over instances."""
        size = len(unit)
        some = torch.from_numpy(np.random.default_rng(seed).permutation(size)[: max(2, 2**21 // size)]).to(unit.device)
        left, right = similarity_factors(unit)
        similarity = products(left[some], right).flatten()
        above = round(len(similarity) * (self.n_neighbors + 1) / size)  # and each is similar to itself
        return float(similarity.kthvalue(len(similarity) - above).values)


@dataclass(frozen=True)
class B3Composer(Composer):
    """B3 ("breaking the batch barrier"): fill batches with communities of a graph that leaves out the nearest.

    Each instance ranks the others by similarity. It skips the first ``n_skipped``, which may be false negatives, and
    keeps the next ``n_neighbors``. The graph joins two instances if each keeps the other. METIS cuts the graph into
    communities, which are then evened out to ``community_size`` instances each. A batch consists of ``batch_size /
    community_size`` communities, drawn at random. If ``community_size`` does not divide ``batch_size``, batches cut
    communities.

    In the paper, a fixed and finished teacher model ranks the whole dataset. So compose from a teacher's embeddings of
    all data to reproduce it. In a random pool, neighbours have far higher ranks in the dataset than in the pool. Needs
    scipy and pymetis (``pip install 'bs-lightning[baselines]'``).

    Args:
        n_skipped: Nearest neighbours to skip per instance (B3's p).
        n_neighbors: Neighbours to keep per instance after the skipped ones (B3's m).
        community_size: Instances in a community (B3's K). Larger communities make harder batches, up to
            ``batch_size``.
        graph: Ranks the neighbours. ``None`` stands for ``ExactGraph(n_skipped + n_neighbors)``.

    Raises:
        ImportError: If scipy or pymetis is not installed.
        TypeError: If a number is not an integer, or ``graph`` is not callable.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import B3Composer
        >>> composer = B3Composer(n_skipped=2, n_neighbors=10, community_size=8)
        >>> composer(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)

    Source: Thirukovalluru et al., "Breaking the batch barrier (B3) of contrastive learning via smart batch mining",
    NeurIPS 2025, arXiv 2505.11293. As in its public code, an edge needs both directions, and communities that METIS
    made too large give instances to those that it made too small. The public code ranks documents by a query. Here both
    sides count, see ``bs_lightning.graphs``. The defaults are the numbers in the names of its public models.
    """

    n_skipped: int = 30
    n_neighbors: int = 100
    community_size: int = 32
    graph: Graph | None = None

    def __post_init__(self) -> None:
        _require("scipy", "pymetis")
        for name, least in (("n_skipped", 0), ("n_neighbors", 1), ("community_size", 1)):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least))
        if self.graph is not None:
            check_instance_callable("graph", self.graph, "ExactGraph(130)")

    def __call__(self, embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose batches.

        Args:
            embeddings: A tensor on any device or a NumPy array, floats of shape ``[P, d]`` or ``[P, 2, d]``, ``P`` a
                multiple of ``batch_size``.
            batch_size: Instances in a batch.
            seed: The same seed gives the same batches.
            epoch: Not used.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``.

        Raises:
            TypeError: If ``batch_size`` or ``seed`` is not an integer, or the embeddings are not a dense tensor or an
                array of floats.
            ValueError: If ``seed`` is negative, ``batch_size`` does not divide ``P``, the embeddings are not of shape
                ``[P, d]`` or ``[P, 2, d]`` or not finite, ``P`` is so small that each instance would keep all that it
                does not skip, there would be only one community, or the graph has no neighbours after the skipped ones.
        """
        embeddings, batch_size, seed = _checked(embeddings, batch_size, seed)
        if self.n_skipped + self.n_neighbors >= len(embeddings) - 1:
            raise ValueError(
                f"n_skipped={self.n_skipped} and n_neighbors={self.n_neighbors} take all neighbours of each of "
                f"{len(embeddings)} embeddings. Lower them, or give larger pools."
            )
        if len(embeddings) // self.community_size < 2:
            raise ValueError(
                f"community_size={self.community_size} makes one community of {len(embeddings)} embeddings. Lower it, "
                "or give larger pools."
            )
        graph = ExactGraph(self.n_skipped + self.n_neighbors) if self.graph is None else self.graph
        ranked = check_graph(graph(embeddings, seed=seed), len(embeddings))
        neighbors = ranked[:, self.n_skipped : self.n_skipped + self.n_neighbors]
        if neighbors.shape[1] == 0:
            raise ValueError(
                f"n_skipped={self.n_skipped} leaves nothing of the graph's {ranked.shape[1]} neighbours. Lower it, or "
                "give a graph with more neighbours."
            )
        rng = np.random.default_rng(seed)
        communities, rest = _even_out(self._communities(neighbors, seed), self.community_size, rng)
        return np.concatenate([rng.permutation(communities).ravel(), rest]).reshape(-1, batch_size)

    def _communities(self, neighbors: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
        """Number each instance's community, by METIS on the edges that the graph has in both directions: [P]."""
        import pymetis
        from scipy.sparse import csr_array

        size, k = neighbors.shape
        starts = np.arange(0, size * k + 1, k)
        is_edge = neighbors != np.arange(size)[:, None]  # a row's own number means "no edge"
        directed = csr_array((is_edge.ravel().astype(np.int32), neighbors.ravel(), starts), shape=(size, size))
        mutual = directed.multiply(directed.T).tocsr()
        mutual.eliminate_zeros()
        options = pymetis.Options()
        options.seed = seed % 2**31
        adjacency = pymetis.CSRAdjacency(mutual.indptr, mutual.indices)
        partition = pymetis.part_graph(size // self.community_size, adjacency, options=options)
        return np.asarray(partition.vertex_part, dtype=np.int64)


@dataclass(frozen=True)
class ClusterComposer(Composer):
    """Contextual batches (CDE): cut a sequence of k-means clusters into batches.

    Two sides are clustered as pairs. Each instance gives k-means two points: its first side followed by its second, and
    its second followed by its first. The cluster of the first point is the instance's. One side is clustered as it is.
    Clusters have different sizes, so they are packed: they follow each other in random or greedy order, and the
    sequence is cut into batches. Large clusters fill several batches, and small clusters share a batch.

    Needs scikit-learn (``pip install 'bs-lightning[baselines]'``).

    Args:
        cluster_size: Average number of instances in a cluster, about. ``None`` stands for the batch size. Clusters
            of a quarter of the batch size make batches less hard. Where the two sides lie in different places of the
            sphere, half of the clusters hold reversed pairs only, so that the average is twice as large.
        packing: The order of the clusters. ``"random"`` draws it. ``"greedy"`` starts at a random cluster and goes to
            the nearest of the clusters that are left, so that neighbouring clusters share a batch.

    Raises:
        ImportError: If scikit-learn is not installed.
        TypeError: If ``cluster_size`` is neither ``None`` nor an integer.
        ValueError: If ``cluster_size`` is below 1, or ``packing`` is neither ``"random"`` nor ``"greedy"``.

    Example:
        >>> import torch
        >>> from bs_lightning.baselines import ClusterComposer
        >>> ClusterComposer(cluster_size=8, packing="greedy")(torch.randn(64, 8), 16, seed=0, epoch=0).shape
        (4, 16)

    Source: Morris and Rush, "Contextual document embeddings", ICLR 2025, arXiv 2410.02525, section 4.1, equation 3
    and "Packing"; the order of clusters and batches is as in its public code. The paper clusters a fixed model's
    embeddings of the whole dataset, with FAISS: the best of three runs of 100 steps. scikit-learn's
    ``MiniBatchKMeans`` is used here, as its clusters do not depend on the number of threads.
    """

    cluster_size: int | None = None
    packing: Literal["random", "greedy"] = "random"

    def __post_init__(self) -> None:
        _require("sklearn")
        if self.cluster_size is not None:
            object.__setattr__(self, "cluster_size", check_integer("cluster_size", self.cluster_size, 1))
        if self.packing not in ("random", "greedy"):
            raise ValueError(f"packing must be 'random' or 'greedy', got {self.packing!r}.")

    def __call__(self, embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose batches.

        Args:
            embeddings: A tensor on any device or a NumPy array, floats of shape ``[P, d]`` or ``[P, 2, d]``, ``P`` a
                multiple of ``batch_size``. k-means runs on the CPU, on one thread.
            batch_size: Instances in a batch.
            seed: The same seed gives the same batches.
            epoch: Not used.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``, in random order.

        Raises:
            TypeError: If ``batch_size`` or ``seed`` is not an integer, or the embeddings are not a dense tensor or an
                array of floats.
            ValueError: If ``seed`` is negative, ``batch_size`` does not divide ``P``, the embeddings are not of shape
                ``[P, d]`` or ``[P, 2, d]`` or not finite, or several batches would come from one cluster.
        """
        embeddings, batch_size, seed = _checked(embeddings, batch_size, seed)
        n_clusters = -(-len(embeddings) // (batch_size if self.cluster_size is None else self.cluster_size))
        if n_clusters == 1 and len(embeddings) > batch_size:
            raise ValueError(
                f"cluster_size={self.cluster_size} makes one cluster of {len(embeddings)} embeddings. Lower it, or "
                "give larger pools."
            )
        cluster, centers = _k_means(unit_rows(embeddings).cpu(), n_clusters, seed)
        rng = np.random.default_rng(seed)
        if self.packing == "greedy":
            sequence = _nearest_next(centers, int(rng.integers(len(centers))))
        else:
            sequence = rng.permutation(len(centers))
        place = np.empty_like(sequence)
        place[sequence] = np.arange(len(sequence))
        # Instances of a cluster come in random order, as the end of a batch may cut the cluster.
        batches = np.lexsort((rng.random(len(cluster)), place[cluster])).reshape(-1, batch_size)
        return rng.permutation(batches)  # neighbouring batches are alike after greedy packing


def _even_out(
    community: NDArray[np.int64], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Move instances from communities of more than ``size`` to communities of fewer.

    Args:
        community: Each instance's community, int64 ``[P]``, fewer than ``P // size`` or as many.
        size: Instances in an even community.
        rng: Chooses who moves.

    Returns:
        The members of even communities, ``[P // size, size]``, and the ``P % size`` instances that are left.
    """
    members = np.lexsort((rng.random(len(community)), community))
    counts = np.bincount(community, minlength=len(community) // size)
    seat = np.arange(len(members)) - np.repeat(np.cumsum(counts) - counts, counts)
    seated = seat < size
    seats = np.full((len(counts), size), -1)
    seats[community[members[seated]], seat[seated]] = members[seated]
    free = seats < 0
    moved = members[~seated]
    n_free = np.count_nonzero(free)
    seats[free] = moved[:n_free]
    return seats, moved[n_free:]


def _k_means(unit: Tensor, n_clusters: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster instances.

    Args:
        unit: Rows of length 1, float32 ``[P, d]`` or ``[P, 2, d]``.
        n_clusters: Number of clusters. Some may stay empty.
        seed: Seed of the first centres and of the order of instances.

    Returns:
        Each instance's cluster, int64 ``[P]``, and the centres of the clusters that are not empty.
    """
    from sklearn.cluster import MiniBatchKMeans

    points = unit if unit.ndim == 2 else torch.cat([unit, unit.flip(1)]).flatten(1)
    # A fixed number of passes from one start: to stop or choose by a sum over threads would not be deterministic.
    k_means = MiniBatchKMeans(
        n_clusters,
        init="random",
        n_init=1,
        max_iter=20,
        max_no_improvement=None,
        batch_size=max(1024, 4 * n_clusters),
        random_state=seed % 2**32,
    )
    # On one thread, as scikit-learn's many short parallel loops are far slower where other processes use the cores.
    with threadpool_limits(1):
        labels = k_means.fit_predict(points.numpy())[: len(unit)]
    used, cluster = np.unique(labels, return_inverse=True)
    return cluster, k_means.cluster_centers_[used]


def _nearest_next(centers: NDArray[np.float32], start: int) -> NDArray[np.int64]:
    """Order centres so that each is followed by the nearest that is left."""
    squares = np.square(centers).sum(axis=1)
    sequence = np.empty(len(centers), dtype=np.int64)
    sequence[0] = start
    for number in range(1, len(centers)):
        distance = squares - 2 * centers @ centers[sequence[number - 1]]  # squared, but for a constant
        distance[sequence[:number]] = np.inf
        sequence[number] = distance.argmin()
    return sequence


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"This composer needs {package}: pip install 'bs-lightning[baselines]'")


def _checked(embeddings: Embeddings, batch_size: int, seed: int) -> tuple[Tensor, int, int]:
    """Check what every baseline is given. ``batch_size`` must divide the number of embeddings."""
    seed = check_seed(seed)
    embeddings = as_embeddings(embeddings)
    batch_size = check_integer("batch_size", batch_size)
    if batch_size < 1 or len(embeddings) % batch_size:
        raise ValueError(
            f"batch_size must divide the number of embeddings, {len(embeddings)}, got {batch_size}. "
            "Leave out the embeddings that do not fill a batch."
        )
    return embeddings, batch_size, seed
