"""The composers that are compared: each has a family and a label, the setting that varies within the family."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import ExactGraph, NNDescentGraph, RandomCandidateGraph, RWRComposer
from bs_lightning.baselines import B3Composer, ClusterComposer, GCBSComposer, knn_batches, uniform_batches

Key = tuple[str, str]  # family and label


class Pooled:
    """A composer for each pool of a random permutation; leaves out the instances that do not fill a pool."""

    def __init__(self, composer: RWRComposer, pool_size: int) -> None:
        self.composer = composer
        self.pool_size = pool_size

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Compose pool after pool, and add up the seconds of each step."""
        order = np.random.default_rng(seed).permutation(len(embeddings))
        pools = order[: len(order) // self.pool_size * self.pool_size].reshape(-1, self.pool_size)
        self.seconds = {"graph": 0.0, "walk": 0.0}
        batches = []
        for number, pool in enumerate(pools):
            batches.append(pool[self.composer(embeddings[pool], batch_size, seed=number, epoch=epoch)])
            for step, seconds in self.composer.seconds.items():
                self.seconds[step] += seconds
        return np.concatenate(batches)


def pools(size: int, n_roots: int = 1) -> Pooled:
    """Return this library's walks in pools, with its default graph."""
    return Pooled(RWRComposer(NNDescentGraph(15), n_roots=n_roots), size)


def paper_graph(m: int = 1000, k: int = 100, alpha: float = 0.2, replacement: bool = True) -> RWRComposer:
    """Return the paper's walks on the paper's graph, by the paper's letters."""
    return RWRComposer(RandomCandidateGraph(m, k), alpha, replacement)


def composers(batch_size: int) -> dict[Key, Any]:
    """Return every composer of `table`. Pool sizes are whole batches; this library's default is ten."""
    ten = 10 * batch_size
    quarter = max(1, batch_size // 4)
    return {
        ("uniform", ""): uniform_batches,
        ("kNN sampler", ""): knn_batches,
        **{("GCBS, pairs", str(k)): GCBSComposer(k) for k in (10, 100)},
        **{("B3, skipped", str(n)): B3Composer(n_skipped=n) for n in (30, 0)},
        ("B3, communities of a batch, skipped", "30"): B3Composer(community_size=batch_size),
        ("clusters, packing", "random"): ClusterComposer(),
        ("clusters, packing", "greedy"): ClusterComposer(packing="greedy"),
        ("clusters of a quarter batch, packing", "random"): ClusterComposer(quarter),
        ("clusters of a quarter batch, packing", "greedy"): ClusterComposer(quarter, "greedy"),
        **{("pools, P", str(size)): pools(size) for size in (4 * batch_size, ten, 2 * ten, 10 * ten)},
        **{("pools of ten batches, roots", str(n)): pools(ten, n) for n in (4, 16)},
        ("kNN graph, K", "100"): RWRComposer(ExactGraph(100), replacement=True),
        ("paper's graph", ""): paper_graph(),
        ("paper's graph, each once", ""): paper_graph(replacement=False),
        **{("paper's graph, M", str(m)): paper_graph(m=m) for m in (100, 300, 3000)},
        **{("paper's graph, K", str(k)): paper_graph(k=k) for k in (15, 30)},
        **{("paper's graph, alpha", str(alpha)): paper_graph(alpha=alpha) for alpha in (0.05, 0.1, 0.5, 0.8)},
    }


def scaled(batch_size: int) -> list[Key]:
    """Return the composers of `scale`."""
    whole = [
        ("uniform", ""),
        ("kNN sampler", ""),
        ("GCBS, pairs", "100"),
        ("B3, skipped", "30"),
        ("clusters, packing", "random"),
    ]
    return [*whole, ("pools, P", str(10 * batch_size)), ("paper's graph", ""), ("kNN graph, K", "100")]


FAMILIES = list(dict.fromkeys(family for family, _ in composers(256)))
SCALED = [family for family, _ in scaled(256)]


def name_of(key: Key, batch_size: int) -> str:
    """Return a composer's name as the tables print it."""
    return " ".join(key).strip().replace("ten batches", str(10 * batch_size))


def too_few(composer: Any, size: int) -> str:
    """Say why a composer is not worth measuring on so few instances, or return an empty text."""
    pool = getattr(composer, "pool_size", size)
    graph = getattr(getattr(composer, "composer", composer), "graph", None)
    if pool > size:
        return f"a pool is larger than the data's whole batches, {size}"
    if getattr(graph, "n_candidates", 0) >= size - 1:
        return f"its graph of {getattr(graph, 'n_candidates', 0)} candidates would be the exact one of {size} instances"
    if getattr(graph, "n_neighbors", 0) >= pool - 1:
        return f"its graph of {getattr(graph, 'n_neighbors', 0)} neighbours would join all of {pool} instances"
    return ""
