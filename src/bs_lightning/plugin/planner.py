"""Planner: a pool's dataset indices -> its batches, composed from embeddings by the processes of a Trainer."""

import copy
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning._checks import check_length
from bs_lightning._description import Means, describe, describe_composed
from bs_lightning._embeddings import similar_to_nothing
from bs_lightning._nndescent import shared_cores
from bs_lightning._types import Indices, Neighbors, Pairs
from bs_lightning.compose import Composer, RWRComposer, call_composer
from bs_lightning.layout import BatchLayout
from bs_lightning.mask import mutual_nearest
from bs_lightning.permutation import permutation
from bs_lightning.plan import NO_PAIRS, PlannedPool
from bs_lightning.plugin.datamodule import BatchSamplerDataModule
from bs_lightning.plugin.graph import TrainerGraph
from bs_lightning.plugin.processes import failing_together, gather, own_share
from bs_lightning.plugin.progress import progress
from bs_lightning.plugin.sources import EmbeddingSource, RecycledEmbeddings
from bs_lightning.pools import AdaptivePools, Cut, Pools
from bs_lightning.rules import AbovePositive, MoreSimilar, Rule, either_way

_MOST_REHEARSED = 4096  # instances; in larger pools NNDescentGraph compiles, which a rehearsal must not wait for
_MOST_POOLS = 1_000_000  # of an epoch that are looked at for the largest one; takes a second
_QUICKLY_COMPOSED = 4096  # instances; such pools are composed before one could read a progress bar
_MarkEdges = Callable[[Neighbors], tuple[NDArray[np.bool_], NDArray[np.bool_]]]
"""A pool's graph -> which edges are likely false negatives, from each row's node and towards it."""


class _Composed(NamedTuple):
    """A pool's batches, the values to log for them, and the seconds that each step took."""

    pool: PlannedPool
    log: dict[str, float]
    seconds: dict[str, float]


class TrainerPlanner:
    """Plans pools for a Trainer, and keeps the values to log for them.

    Args:
        trainer: The Trainer.
        source: Gives the pools' embeddings.
        composer: Arranges a pool into batches.
        per_rank: Whether each process composes batches from its own share of a pool.
        mask_nearest: Treat two instances as a likely false negative if each is among the other's ``mask_nearest``
            nearest neighbours in the pool. ``None`` finds none in this way.
        own_rule: Treat a pair as a likely false negative if it is more similar than this rule allows, in the pool's
            embeddings. ``None`` finds none in this way.

    Attributes:
        trainer: The Trainer.
        source: Gives the pools' embeddings.
        graph: Builds the pools' graphs that the composer does not build by itself.
        layout: The epoch's sizes, once :meth:`attach` was called.
        seconds: Seconds that each step took in this epoch, by the step's name.
    """

    def __init__(
        self,
        trainer: Trainer,
        source: EmbeddingSource,
        composer: Composer,
        *,
        per_rank: bool,
        mask_nearest: int | None,
        own_rule: AbovePositive | None,
    ) -> None:
        self.trainer = trainer
        self.source = source
        self.graph = TrainerGraph(trainer, source, composer, per_rank)
        self.seconds: dict[str, float] = {}
        self._composer = composer
        self._per_rank = per_rank
        self._mask_nearest = mask_nearest
        self._own_rule = own_rule
        self._rules: Sequence[Rule] = ()
        self.layout: BatchLayout
        self._batch_size: int
        self._labels: Tensor | None = None
        self._must_look_for_copies = False
        # Lightning could take the means, but a call for each pool and value takes longer than the values themselves.
        self._described = Means()

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        """Check the data before training starts, and keep the parts that planning needs.

        Args:
            data: The DataModule.
            layout: The epoch's sizes.
        """
        self.layout = layout
        self._batch_size = layout.batch_size if self._per_rank else layout.global_batch_size
        self._composer.check_batch_size(self._batch_size)
        self.source.attach(data, layout)
        self._rules = data.false_negative_rules
        self._must_look_for_copies = data.streams and data.dataloader_kwargs.get("num_workers", 0) > 1
        if self.trainer.reload_dataloaders_every_n_epochs:  # the data may be different
            self.graph.forget()
        labels = data.train_labels()
        self._labels = None if labels is None else _as_labels(labels)
        if labels is not None:
            check_length("train_labels()", labels, layout.n_instances)

    @property
    def labels_checksum(self) -> int | None:
        """A number that differs where processes have their labels in a different order; ``None`` without labels."""
        return None if self._labels is None else zlib.crc32(self._labels.numpy().data)

    def rehearse(self, cut: Cut, epoch: int) -> None:
        """Try every step before the first uniform batch, so that what cannot work fails now and not after it.

        Embeds two uniform batches, and composes random embeddings: as many as a pool has, or two batches if its size
        follows the loss. A copy of the composer composes them, so that a composer with state keeps its state. A
        composer that cannot be copied is not tried. Of pools of more than 4096 instances, walks are tried in a part,
        and other composers not at all. For such pools the composer prepares itself.

        Args:
            cut: What is planned together.
            epoch: The first epoch that may be composed.
        """
        trainer = self.trainer
        embeddings = self.source.sample(self._two_batches(epoch))
        pool_size = self.largest_pool(cut) // (trainer.world_size if self._per_rank else 1)
        shares_graph = self.graph.shared is not None
        with failing_together(trainer):
            composes = self._per_rank or trainer.is_global_zero
            if composes or shares_graph:
                n_sharing = trainer.world_size if shares_graph else 1
                self._composer.prepare(-(-pool_size // n_sharing), embeddings)
            if composes:
                size = min(pool_size, 2 * self._batch_size) if isinstance(cut, AdaptivePools) else pool_size
                if size > _MOST_REHEARSED:
                    if not isinstance(self._composer, RWRComposer):
                        return  # it may need the whole pool, and much time
                    size = max(_MOST_REHEARSED // self._batch_size, 1) * self._batch_size
                random = torch.randn(size, *embeddings.shape[1:], generator=torch.Generator().manual_seed(0))
                try:
                    composer = copy.deepcopy(self._composer)
                except Exception:  # whatever a user's object raises
                    return
                random = random.to(embeddings.device)
                # The sides of recycled embeddings are not known yet.
                own_rule = self._own_rule if embeddings.any() else None
                self._compose(random, np.arange(size), 0, epoch, composer=composer, own_rule=own_rule)

    def largest_pool(self, cut: Cut) -> int:
        """Return the most instances that a pool of an epoch may have. Later pools may be larger than the first.

        Of epochs of many pools, the first pools alone are looked at.

        Args:
            cut: What is planned together.
        """
        layout, n_trained = self.layout, self.trainer.num_training_batches
        if not isinstance(cut, Pools):
            return layout.n_full * layout.global_batch_size
        if n_trained == float("inf"):  # a stream whose length is not known
            return cut.n_batches(layout) * layout.global_batch_size
        # The layout of a stream holds one batch.
        stop = int(n_trained) if self.trainer.datamodule.streams else min(int(n_trained), layout.n_full)
        start = largest = 0
        for _ in range(_MOST_POOLS):
            end = cut.next_pool(start, stop, layout)[1]
            start, largest = end, max(largest, end - start)
            if start >= stop:
                break
        return largest * layout.global_batch_size

    def describe_uniform(self, epoch: int) -> None:
        """Note for the log what two uniform batches are like, with the model as it is.

        Args:
            epoch: The epoch that begins.
        """
        indices = self._two_batches(epoch)
        embeddings = self.source.sample(indices)
        if self._per_rank:
            indices = own_share(self.trainer, indices)
        log = {"pool_size": float(self.layout.global_batch_size)}
        known = bool(len(embeddings) and embeddings.any())
        if self._per_rank:  # all processes must log the same values, or they would wait for each other
            known = all(gather(self.trainer, known))
        with failing_together(self.trainer):
            if known:
                batches = np.arange(len(indices)).reshape(-1, self._batch_size)
                log |= describe(embeddings, batches, self._labels_of(indices))
        self._described.note(log if self._per_rank else self.trainer.strategy.broadcast(log), 2)
        self.source.end_epoch()

    def _two_batches(self, epoch: int) -> Indices:
        """Draw two global batches of the dataset, or one if there are no more."""
        n_instances = min(2, self.layout.n_full) * self.layout.global_batch_size
        return permutation(self.layout.n_instances, seed=0, epoch=epoch)[:n_instances].astype(np.int64)

    def end_epoch(self) -> None:
        """Forget what was noted of the epoch, and free resources that need not outlive it."""
        self._described = Means()
        self.seconds = {}
        self.source.end_epoch()

    def description(self) -> dict[str, float]:
        """Return what this epoch's batches are like so far: values to log, by name, each a mean over batches."""
        return self._described.read()

    def plan_pool(self, indices: Indices, *, seed: int, epoch: int) -> PlannedPool:
        """Embed a pool with the current weights and compose its batches. Every process calls it.

        Args:
            indices: Dataset indices of the pool, int64 ``[P]``.
            seed: The pool's seed.
            epoch: The epoch's number.

        Returns:
            The pool's global batches and likely false negatives, the same in every process.
        """
        start = time.perf_counter()
        embeddings = self.source.read(indices)
        if embeddings.is_cuda:
            torch.cuda.synchronize(embeddings.device)
        encode_seconds = time.perf_counter() - start
        compose = self._compose_per_rank if self._per_rank else self._compose_once
        with nullcontext() if len(indices) <= _QUICKLY_COMPOSED else progress(self.trainer, "Composing", total=1):
            pool, log, seconds = compose(embeddings, indices, seed, epoch)
        self._described.note(log | {"pool_size": float(len(indices))}, len(pool.batches))
        for step, spent in {"encode": encode_seconds, **seconds}.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + spent
        return pool

    def plan_uniform(self, indices: Indices) -> PlannedPool:
        """Leave a pool in its random order, without embedding it.

        Args:
            indices: Dataset indices of the pool, int64 ``[P]``.

        Returns:
            The pool's global batches.
        """
        size = self.layout.global_batch_size
        self._described.note({"pool_size": float(size)}, len(indices) // size)
        return PlannedPool(np.arange(len(indices)).reshape(-1, size))

    def _compose_once(self, embeddings: Tensor, indices: Indices, seed: int, epoch: int) -> _Composed:
        """Compose the whole pool's global batches in one process, and send them to the others."""
        start = time.perf_counter()
        neighbors = self.graph.neighbors(embeddings, indices, self.layout, seed=seed)
        graph_seconds = time.perf_counter() - start
        composed: Any = None
        with failing_together(self.trainer):
            if self.trainer.is_global_zero:
                composed = self._plan_share(embeddings, indices, seed, epoch, neighbors)
                if neighbors is not None:
                    composed.seconds["graph"] = composed.seconds.get("graph", 0.0) + graph_seconds
        return self.trainer.strategy.broadcast(composed)  # type: ignore[no-any-return]

    def _compose_per_rank(self, embeddings: Tensor, indices: Indices, seed: int, epoch: int) -> _Composed:
        """Compose this process's share, and join the batches of all processes side by side into global batches."""
        trainer = self.trainer
        with shared_cores(self.graph.n_cores), failing_together(trainer):
            share = own_share(trainer, indices)
            composed = self._plan_share(embeddings, share, (seed + trainer.global_rank) % 2**32, epoch)
        pools = gather(trainer, composed.pool)
        starts = range(0, len(indices), len(share))
        batches = np.concatenate([pool.batches + start for pool, start in zip(pools, starts, strict=True)], axis=1)
        pairs = np.concatenate([pool.pairs + start for pool, start in zip(pools, starts, strict=True)])
        return composed._replace(pool=PlannedPool(batches, pairs))

    def _plan_share(
        self, embeddings: Tensor, indices: Indices, seed: int, epoch: int, neighbors: Neighbors | None = None
    ) -> _Composed:
        """Compose batches in this process alone, with the callback's own composer and rule."""
        known = not isinstance(self.source, RecycledEmbeddings) or bool(embeddings.any())
        if not known and epoch > 0:
            rank_zero_warn(
                "BatchSamplerCallback(recycle=True) has no embedding of a pool yet, as after a checkpoint without them "
                "or in a second fit. Its batches are random until training has computed embeddings."
            )
        if self._must_look_for_copies:
            self._must_look_for_copies = False
            _warn_of_copies(embeddings)
        own_rule = self._own_rule if known else None  # a bank without rows does not know how many sides
        return self._compose(
            embeddings, indices, seed, epoch, composer=self._composer, own_rule=own_rule, neighbors=neighbors
        )

    def _compose(
        self,
        embeddings: Tensor,
        indices: Indices,
        seed: int,
        epoch: int,
        *,
        composer: Composer,
        own_rule: AbovePositive | None,
        neighbors: Neighbors | None = None,
    ) -> _Composed:
        """Compose batches in this process alone."""
        own = None if own_rule is None else _once_per_graph(MoreSimilar(embeddings, own_rule))
        offered = self._offered(indices, own) | {"neighbors": neighbors}
        start = time.perf_counter()
        batches = call_composer(composer, embeddings, self._batch_size, seed=seed, epoch=epoch, **offered)
        seconds = dict(composer.seconds) or {"compose": time.perf_counter() - start}
        pairs = NO_PAIRS
        if composer.neighbors is not None:
            pairs = self._likely_false_negatives(composer.neighbors, embeddings, own)
        log = describe_composed(embeddings, batches, self._labels_of(indices))
        return _Composed(PlannedPool(batches, pairs), log, seconds)

    def _offered(self, indices: Indices, own: _MarkEdges | None) -> dict[str, Any]:
        """Return what composers may ask for beside embeddings and a graph."""

        def mark(neighbors: Neighbors) -> NDArray[np.bool_]:
            marked = either_way(self._rules, indices, neighbors)
            return marked if own is None else marked | np.logical_or(*own(neighbors))

        return {
            "indices": indices,
            "labels": self._labels_of(indices),
            "likely_false_negatives": mark if self._rules or own is not None else None,
        }

    def _labels_of(self, indices: Indices) -> Tensor | None:
        """Return the labels of a pool, if there are any."""
        return None if self._labels is None else self._labels[torch.from_numpy(indices)]

    def _likely_false_negatives(self, neighbors: Neighbors, embeddings: Tensor, own: _MarkEdges | None) -> Pairs:
        """Return the pairs of a pool's graph that the callback's own rules mark."""
        found = [NO_PAIRS]
        if self._mask_nearest is not None:
            found.append(mutual_nearest(neighbors, self._mask_nearest))
        if own is not None:
            anchors = np.broadcast_to(np.arange(len(neighbors))[:, None], neighbors.shape)
            forward, backward = own(neighbors)
            for first, second, marked in ((anchors, neighbors, forward), (neighbors, anchors, backward)):
                marked = marked & (first != second)
                found.append(np.stack([first[marked], second[marked]], axis=1))
        pairs = np.unique(np.concatenate(found), axis=0)
        if len(pairs):
            known = ~similar_to_nothing(embeddings).cpu().numpy()  # the neighbours of an all-zero row are random
            pairs = pairs[known[pairs].all(axis=1)]
        return pairs


def _once_per_graph(rule: Rule) -> _MarkEdges:
    """Let a rule that knows positions in the pool mark a graph's edges. The composer and the mask ask for the same."""
    last: tuple[Neighbors, tuple[NDArray[np.bool_], NDArray[np.bool_]]] | None = None

    def mark(neighbors: Neighbors) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        nonlocal last
        if last is None or last[0] is not neighbors:
            last = neighbors, rule.along(np.arange(len(neighbors)), neighbors.astype(np.int64))
        return last[1]

    return mark


def _warn_of_copies(unit: Tensor) -> None:
    """Warn if many instances of a stream's pool have equal embeddings. Composing puts copies into one batch.

    Args:
        unit: float32 ``[P, d]`` or ``[P, 2, d]``, rows of length 1.
    """
    n_distinct = len(torch.unique(unit.flatten(1).mul(1e4).round(), dim=0))  # the last digits may differ
    if n_distinct < 0.75 * len(unit):
        rank_zero_warn(
            f"A pool of {len(unit)} instances of the stream holds {n_distinct} different embeddings. Does each worker "
            "read a part of its own, by torch.utils.data.get_worker_info()?"
        )


def _as_labels(labels: Any) -> Tensor:
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(
            f"train_labels() must be integers of shape [N], got {array.dtype} of shape {list(array.shape)}. Override "
            "it to return class numbers, such as numpy.unique(names, return_inverse=True)[1], or None: labels are "
            "optional."
        )
    return torch.from_numpy(array.astype(np.int64))
