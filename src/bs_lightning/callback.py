"""The callback: Lightning's side of the model, which plans pools."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import Dataset

from bs_lightning._checks import check_instance_callable, check_integer
from bs_lightning._types import Indices, Pairs
from bs_lightning.bank import EmbeddingBank, check_rows
from bs_lightning.compose import Composer, RWRComposer, check_batches
from bs_lightning.datamodule import BatchSamplerDataModule, check_trainer
from bs_lightning.encoding import encode
from bs_lightning.graphs import RandomCandidateGraph
from bs_lightning.isolation import isolated_rng, no_trace
from bs_lightning.loader import BatchFetcher, check_map_style
from bs_lightning.mask import mutual_nearest, pair_mask
from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness
from bs_lightning.plan import BatchLayout, check_pool_size

# A pool's batches as positions in it, what to log of them, the seconds that each step took, and pairs to mask.
_Composed = tuple[Indices, dict[str, float], dict[str, float], Pairs]
_NO_PAIRS: Pairs = np.empty((0, 2), dtype=np.int64)


class BatchSamplerCallback(Callback):
    """Composes hard batches for in-batch contrastive learning with the model as it is being trained.

    Add it to the Trainer, and give ``fit`` a :class:`~bs_lightning.BatchSamplerDataModule`; nothing else changes. The
    first epochs have uniform batches. Then each epoch's random permutation is cut into pools; when a pool's first
    batch is about to be trained, the pool is embedded with the current weights, and the composer arranges it into
    batches: by default a neighbour graph walked by random walk with restart. Every instance is still seen once an
    epoch.

    A pool batch is loaded from ``pool_dataset()``, passed through ``on_before_batch_transfer`` and
    ``transfer_batch_to_device`` and embedded by ``embed``, else ``pl_module.embed(batch)``, else
    ``pl_module(batch)``, under the Trainer's precision, in eval mode and without gradients. Not run is
    ``on_after_batch_transfer``, where augmentations on the GPU live. Encoding leaves no trace in training.

    With ``recycle=True`` nothing is encoded: ``training_step`` returns ``{"loss": ..., "embeddings": [b, d]}``, one row
    for each instance of the process's batch, and pools are composed from each instance's last ones, kept in float16
    (``2 N d`` bytes). They are up to an epoch old. An instance that has none yet is similar to nothing, so with
    ``warmup_epochs=0`` the first epoch is uniform all the same. Checkpoints hold them, so that a resumed run goes on
    exactly; put callbacks that save in ``on_train_batch_end`` behind this one.

    Logged by the module at each epoch's end: ``batch_sampler/hardness`` (mean cosine similarity of the negatives in
    a batch, in the embeddings the batches were made from; where labels are known, of the true negatives),
    ``batch_sampler/false_negative_rate`` (where labels are known), ``batch_sampler/encode_seconds`` and the composer's
    own, as ``batch_sampler/graph_seconds`` and ``batch_sampler/walk_seconds``, and ``batch_sampler/time_share``, the
    part of the epoch that all these took.

    Args:
        pool_size: Instances planned together, about: the main knob. Larger pools make harder batches with more false
            negatives. At least one global batch; ``None`` is ten.
        composer: Arranges a pool into batches; :class:`~bs_lightning.RWRComposer` by default. See
            :mod:`bs_lightning.compose` for what a composer is.
        warmup_epochs: Epochs of uniform batches first.
        refresh_every: Instead of pools: compose the whole data set at the start of an epoch, and anew after every so
            many steps of it (the paper's t). Needs a composer with ``replacement=True``.
        recycle: Compose from the embeddings that training computes, instead of encoding.
        mask_nearest: Let ``datamodule.likely_false_negatives()`` tell the loss which pairs of a batch are among each
            other's so many nearest in the pool. Needs a composer with a graph of the nearest, not
            :class:`~bs_lightning.RandomCandidateGraph`. For data where look-alikes mostly belong together, as
            paraphrases do; elsewhere it takes off the hardest of the true negatives.
        per_rank: ``False`` composes global batches, for losses that gather the negatives of all processes. ``True``
            lets every process compose batches of its own from its share of the pool, for losses that do not.
        embed: ``embed(pl_module, batch)`` -> floats of shape ``[b, d]``, instead of the module's own.
        encode_batch_size: Instances embedded at a time; ``None`` is four times the DataModule's ``batch_size``, which
            fits where training fits.

    Raises:
        ValueError: If ``pool_size``, ``warmup_epochs``, ``refresh_every`` or ``encode_batch_size`` is out of range, or
            arguments exclude each other.
        TypeError: If ``composer`` or ``embed`` is not callable, or an argument is of another type.

    Example::

        from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule
        from lightning import Trainer

        class Data(BatchSamplerDataModule):
            def train_dataset(self):
                return TwoViews(self.images)    # item i: two augmentations of image i

            def pool_dataset(self):
                return Plain(self.images)       # item i: image i as it is

        trainer = Trainer(callbacks=[BatchSamplerCallback()], max_epochs=100)
        trainer.fit(SimCLR(), datamodule=Data(batch_size=256, num_workers=8))

    Source: "BatchSampler: Sampling Mini-Batches for Contrastive Learning in Vision, Language, and Graphs", KDD 2023,
    arXiv 2306.03355; pools are this library's.
    """

    def __init__(
        self,
        pool_size: int | None = None,
        composer: Composer | None = None,
        warmup_epochs: int = 1,
        *,
        refresh_every: int | None = None,
        recycle: bool = False,
        mask_nearest: int | None = None,
        per_rank: bool = False,
        embed: Callable[[LightningModule, Any], Tensor] | None = None,
        encode_batch_size: int | None = None,
    ) -> None:
        if pool_size is not None and check_integer("pool_size", pool_size) < 2:
            raise ValueError(f"pool_size must be at least one global batch, got {pool_size}.")
        if composer is not None:
            check_instance_callable("composer", composer, "RWRComposer()")
        if check_integer("warmup_epochs", warmup_epochs) < 0:
            raise ValueError(f"warmup_epochs must not be negative, got {warmup_epochs}. 0 walks from the start.")
        if embed is not None and not callable(embed):
            raise TypeError(f"embed must be a function of (pl_module, batch), got {embed!r}.")
        if encode_batch_size is not None and check_integer("encode_batch_size", encode_batch_size) < 1:
            raise ValueError(f"encode_batch_size must be at least 1, got {encode_batch_size}.")
        if refresh_every is not None:
            if check_integer("refresh_every", refresh_every) < 1:
                raise ValueError(f"refresh_every must be at least 1 step, got {refresh_every}. The paper's is 100.")
            if pool_size is not None:
                raise ValueError(
                    f"refresh_every={refresh_every} composes the whole data set, so pool_size must be left out, got "
                    f"{pool_size}. Pools are refreshed at each one's start anyway."
                )
            if not getattr(composer, "replacement", False):
                raise ValueError(
                    f"refresh_every={refresh_every} needs a composer whose batches may share instances, such as "
                    "RWRComposer(..., replacement=True). To see each instance once an epoch use pools."
                )
        if mask_nearest is not None:
            if check_integer("mask_nearest", mask_nearest) < 1:
                raise ValueError(f"mask_nearest must be at least 1, got {mask_nearest}. 5 suits pools of ten batches.")
            if per_rank:
                raise ValueError("mask_nearest needs per_rank=False: checkpoints hold the pairs of one process alone.")
            if composer is not None and not hasattr(composer, "neighbors"):
                raise TypeError(
                    f"mask_nearest={mask_nearest} needs a composer that keeps its graph as `neighbors`, such as "
                    f"RWRComposer(), got {composer!r}."
                )
            graph = getattr(composer, "graph", None)
            if isinstance(graph, RandomCandidateGraph):
                raise ValueError(
                    f"mask_nearest={mask_nearest} needs a graph that holds the nearest of the whole pool, such as "
                    f"NNDescentGraph() or ExactGraph(), got {graph!r}: hardly any two draw each other as candidates."
                )
        if recycle and (embed is not None or encode_batch_size is not None):
            raise ValueError("recycle=True encodes nothing: leave out embed and encode_batch_size.")
        self.pool_size = pool_size
        self.refresh_every = refresh_every
        self.recycle = recycle
        self.composer = RWRComposer() if composer is None else composer
        self.warmup_epochs = warmup_epochs
        self.mask_nearest = mask_nearest
        self.per_rank = per_rank
        self.embed = embed
        self.encode_batch_size = encode_batch_size
        self._pool_dataset: Dataset[Any] | None = None
        self._labels: Tensor | None = None
        self._load: BatchFetcher | None = None
        self._bank: EmbeddingBank | None = None
        self._restored: dict[str, Any] | None = None
        self._near_pairs = _NO_PAIRS
        self._n_batches = 0
        self._pool_log: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._epoch_start = 0.0

    # What the DataModule asks

    def should_plan(self, trainer: Trainer) -> bool:
        """Whether the current epoch's batches are composed: after warm-up, and not with ``overfit_batches``."""
        return trainer.current_epoch >= self.warmup_epochs and not trainer.overfit_batches

    def resolve_pool_size(self, layout: BatchLayout) -> int:
        """The pool size, ten global batches by default.

        Raises:
            ValueError: If it is smaller than a global batch.
        """
        if self.pool_size is None:
            return 10 * layout.global_batch_size
        check_pool_size(self.pool_size, layout)
        return self.pool_size

    def plan_pool(self, trainer: Trainer, indices: Indices, *, seed: int, epoch: int) -> Indices:
        """Embed a pool with the current weights and compose its batches.

        Args:
            trainer: In training.
            indices: Dataset indices of the pool, int64 ``[P]``.
            seed: The pool's seed.
            epoch: The epoch's number.

        Returns:
            int64 ``[P // global batch, global batch]``, positions in the pool.
        """
        start = time.perf_counter()
        share = np.split(indices, trainer.world_size)[trainer.global_rank]
        with _failing_together(trainer):
            if self._bank is not None:
                embeddings = self._bank.read(torch.from_numpy(share if self.per_rank else indices))
            elif self.recycle:
                embeddings = torch.empty(0)  # another process composes
            else:
                embeddings = self._encode(trainer, share)
        if not self.recycle and not self.per_rank:
            embeddings = trainer.strategy.all_gather(embeddings).flatten(0, -2)
        if embeddings.is_cuda:
            torch.cuda.synchronize(embeddings.device)
        seconds = {"encode": time.perf_counter() - start}

        compose = self._compose_per_rank if self.per_rank else self._compose_once
        batches, self._pool_log, spent, self._near_pairs = compose(trainer, embeddings, indices, seed, epoch)
        self._n_batches = len(batches)
        for step, value in (seconds | spent).items():
            self._seconds[step] = self._seconds.get(step, 0.0) + value
        return batches

    def mask(self, batch: Indices) -> Tensor:
        """Which pairs of a batch of dataset indices are mutual nearest neighbours in the pool being served.

        Args:
            batch: int64 ``[B]``.

        Returns:
            bool ``[B, B]``.
        """
        return pair_mask(self._near_pairs, batch)

    def check_data(self, datamodule: BatchSamplerDataModule, layout: BatchLayout) -> None:
        """Look at the data before training starts, and take what encoding needs of it.

        Raises:
            TypeError: If ``pool_dataset()`` is iterable-style.
            ValueError: If ``pool_size`` is smaller than a global batch, or ``pool_dataset()`` or ``train_labels()``
                differs in length from ``train_dataset()``.
        """
        self.resolve_pool_size(layout)
        batch_size = layout.batch_size if self.per_rank else layout.global_batch_size
        n_roots = getattr(self.composer, "n_roots", 1)
        if n_roots > batch_size:
            raise ValueError(f"n_roots must be at most the {batch_size} instances of a batch, got {n_roots}.")
        if self.recycle:
            self._start_bank(datamodule, layout)
        dataset = None if self.recycle else datamodule.pool_dataset()
        if dataset is not None:
            check_map_style(dataset, "pool_dataset()")
        labels = datamodule.train_labels()
        labels = None if labels is None else _as_labels(labels)
        for name, values in (("pool_dataset()", dataset), ("train_labels()", labels)):
            if values is not None and len(values) != layout.n_instances:  # type: ignore[arg-type]
                raise ValueError(
                    f"{name} must have the length and order of train_dataset(), {layout.n_instances}, "
                    f"got length {len(values)}."  # type: ignore[arg-type]
                )
        self._pool_dataset = dataset
        self._close()
        self._labels = labels

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer)
        if not isinstance(trainer.datamodule, BatchSamplerDataModule):
            got = "none" if trainer.datamodule is None else type(trainer.datamodule).__name__
            raise TypeError(
                f"BatchSamplerCallback needs a BatchSamplerDataModule, got {got}. Subclass it and pass it as "
                "trainer.fit(model, datamodule=...)."
            )
        self._bank = self._restored = None
        self._near_pairs = _NO_PAIRS
        can_embed = self.embed is not None or _has_embed(pl_module) or is_overridden("forward", pl_module)
        if not self.recycle and not can_embed:
            raise TypeError(
                f"{type(pl_module).__name__} has neither embed(batch) nor forward(batch). Define one that returns "
                "embeddings [b, d], or give BatchSamplerCallback(embed=...)."
            )
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        if replicas != trainer.world_size:
            raise ValueError(
                f"{type(trainer.strategy).__name__} trains {replicas} replicas on {trainer.world_size} processes. "
                "BatchSamplerCallback needs a whole replica in each process (no tensor parallelism)."
            )
        if trainer.overfit_batches:
            rank_zero_info("BatchSamplerCallback: with overfit_batches the same uniform batches come every epoch.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.datamodule.train_sampler is None:
            raise TypeError(
                f"The batches of {type(trainer.datamodule).__name__} are served by a train_dataloader that is not "
                "BatchSamplerDataModule's, so none would be composed. Override train_dataset() instead."
            )
        last = trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
        if last <= self.warmup_epochs and not trainer.fast_dev_run:
            rank_zero_warn(
                f"BatchSamplerCallback composes no batch: all of max_epochs={trainer.max_epochs} are within "
                f"warmup_epochs={self.warmup_epochs}."
            )
        elif trainer.current_epoch < self.warmup_epochs and not self.recycle:
            self._try_encoding(trainer)
        self._start_epoch()  # resumed in mid-epoch, there is no `on_train_epoch_start`

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A pool is planned between two batches, where Lightning allows no logging.
        if self._pool_log:
            pl_module.log_dict(self._pool_log, on_step=False, on_epoch=True, batch_size=self._n_batches, sync_dist=True)
            self._pool_log = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.recycle and outputs:  # none: `training_step` has skipped the batch
            self._keep(trainer, outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seconds:
            share = sum(self._seconds.values()) / (time.perf_counter() - self._epoch_start)
            seconds = {f"batch_sampler/{step}_seconds": spent for step, spent in self._seconds.items()}
            pl_module.log_dict(seconds | {"batch_sampler/time_share": share}, sync_dist=True)
        if not trainer.datamodule.dataloader_kwargs.get("persistent_workers"):
            self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        state = {} if self._bank is None else self._bank.state_dict()
        return state if self.mask_nearest is None else state | {"near_pairs": torch.from_numpy(self._near_pairs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict if "rows" in state_dict else None
        if "near_pairs" in state_dict:
            self._near_pairs = state_dict["near_pairs"].numpy()

    # How a pool is planned

    def _close(self) -> None:
        if self._load is not None:
            self._load.close()
            self._load = None

    def _start_epoch(self) -> None:
        self._epoch_start = time.perf_counter()
        self._seconds = {}
        self._pool_log = {}

    def _try_encoding(self, trainer: Trainer) -> None:
        """Embed two instances, so that what cannot work fails now and not after the warm-up."""
        with _failing_together(trainer):
            self._encode(trainer, np.arange(2))
        if not trainer.datamodule.dataloader_kwargs.get("persistent_workers"):
            self._close()

    def _encode(self, trainer: Trainer, indices: Indices) -> Tensor:
        module, datamodule = trainer.lightning_module, trainer.datamodule
        if self._load is None:
            assert self._pool_dataset is not None
            kwargs = {"pin_memory": module.device.type == "cuda"} | datamodule.dataloader_kwargs
            kwargs["generator"] = torch.Generator().manual_seed(trainer.global_rank)  # spares the global one
            self._load = BatchFetcher(self._pool_dataset, **kwargs)
        size = min(self.encode_batch_size or 4 * datamodule.batch_size, len(indices))
        forward = self._forward(module)
        before_transfer = _batch_hook(trainer, "on_before_batch_transfer")
        transfer = _batch_hook(trainer, "transfer_batch_to_device")

        def embed(batch: Any) -> Any:
            batch = before_transfer(trainer.precision_plugin.convert_input(batch), 0)
            batch = transfer(batch, module.device, 0)
            try:
                with trainer.precision_plugin.forward_context():
                    return forward(batch)
            except Exception as error:
                error.add_note(
                    f"BatchSamplerCallback was embedding a batch of pool_dataset(), a {type(batch).__name__}. Give the "
                    "module a method embed(batch) that takes what pool_dataset() gives."
                )
                raise

        with no_trace(module), _progress(trainer, -(-len(indices) // size)) as advance:
            # What a model logs in `forward` is of training, and Lightning allows no logging here. `no_trace` ends it.
            module.__dict__["log"] = module.__dict__["log_dict"] = _ignore
            if trainer.world_size > 1:
                # Batch norm's statistics differ between ranks until DDP's next forward pass, and only rank 0's are in
                # a checkpoint: one pool is embedded by one model.
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)
            return encode(indices.tolist(), self._load, embed, batch_size=size, advance=advance)

    def _start_bank(self, datamodule: BatchSamplerDataModule, layout: BatchLayout) -> None:
        """Make a place for recycled embeddings, in the processes that compose."""
        composes = self.per_rank or datamodule.trainer is None or datamodule.trainer.is_global_zero
        if composes and (self._bank is None or self._bank.n_instances != layout.n_instances):
            self._bank = EmbeddingBank(layout.n_instances)
        if self._bank is not None and self._restored is not None:
            self._bank.load_state_dict(self._restored)
        self._restored = None

    def _keep(self, trainer: Trainer, outputs: Any) -> None:
        """Keep what training has embedded."""
        embeddings = outputs.get("embeddings") if isinstance(outputs, dict) else None
        if not isinstance(embeddings, Tensor):
            raise TypeError(
                "recycle=True needs training_step to return {'loss': ..., 'embeddings': tensor of shape [b, d]}, got "
                f"{sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__}."
            )
        batch = trainer.datamodule.trained_batch()
        check_rows(embeddings, np.array_split(batch, trainer.world_size)[trainer.global_rank])
        if len(batch) % trainer.world_size:
            return  # the epoch's last, smaller batch, of which processes have unequal parts
        if trainer.world_size > 1:
            embeddings = trainer.strategy.all_gather(embeddings.detach()).flatten(0, 1)
        if self._bank is not None:
            self._bank.write(torch.from_numpy(batch), embeddings)

    def _forward(self, module: LightningModule) -> Any:
        if self.embed is not None:
            return partial(self.embed, module)
        return module.embed if _has_embed(module) else module

    def _compose_once(self, trainer: Trainer, embeddings: Tensor, indices: Indices, seed: int, epoch: int) -> _Composed:
        """One process composes global batches of the whole pool and tells the others their positions."""
        composed: _Composed | None = None
        with _failing_together(trainer):
            if trainer.is_global_zero:
                composed = self._compose(trainer, embeddings, indices, seed, epoch)
        return trainer.strategy.broadcast(composed)  # type: ignore[return-value]

    def _compose_per_rank(
        self, trainer: Trainer, embeddings: Tensor, indices: Indices, seed: int, epoch: int
    ) -> _Composed:
        """Each process composes batches of its share; side by side they are the global batches."""
        rank, size = trainer.global_rank, len(embeddings)
        with _failing_together(trainer):
            share = indices[rank * size : (rank + 1) * size]
            batches, log, seconds, _ = self._compose(trainer, embeddings, share, seed + rank, epoch)
        positions = torch.from_numpy(batches + rank * size).to(embeddings.device)
        gathered = trainer.strategy.all_gather(positions).reshape(-1, *batches.shape)
        return gathered.transpose(0, 1).flatten(1).cpu().numpy(), log, seconds, _NO_PAIRS

    def _compose(self, trainer: Trainer, embeddings: Tensor, indices: Indices, seed: int, epoch: int) -> _Composed:
        layout = trainer.datamodule.train_sampler.layout
        batch_size = layout.batch_size if self.per_rank else layout.global_batch_size
        start = time.perf_counter()
        with isolated_rng():
            returned = self.composer(embeddings, batch_size, seed=seed, epoch=epoch)
        seconds = getattr(self.composer, "seconds", None) or {"compose": time.perf_counter() - start}
        replacement = getattr(self.composer, "replacement", False)
        batches = check_batches(returned, len(indices), batch_size, replacement=replacement)

        positions = torch.from_numpy(batches)
        labels = None if self._labels is None else self._labels[torch.from_numpy(indices)[positions]]
        similarity = InBatchHardness(sync_on_compute=False).to(embeddings.device)
        similarity.update(embeddings[positions.to(embeddings.device)], labels)
        log = {"batch_sampler/hardness": float(similarity.compute())}
        if labels is not None:
            false_negatives = InBatchFalseNegativeRate(sync_on_compute=False)
            false_negatives.update(labels)
            log["batch_sampler/false_negative_rate"] = float(false_negatives.compute())
        pairs = _NO_PAIRS
        if self.mask_nearest is not None:
            near = mutual_nearest(self.composer.neighbors, self.mask_nearest)
            known = embeddings.any(dim=1).cpu().numpy()  # the neighbours of an all-zero row are random
            pairs = indices[near[known[near].all(axis=1)]]
        return batches, log, dict(seconds), pairs


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _has_embed(module: LightningModule) -> bool:
    """Whether it has a method of that name; a layer of that name is no such thing."""
    return callable(getattr(type(module), "embed", None))


def _as_labels(labels: Any) -> Tensor:
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(
            f"train_labels() must be integers of shape [N], got {array.dtype} of shape {list(array.shape)}. Override "
            "it to return class numbers, or None: they only serve the false-negative metric."
        )
    return torch.from_numpy(array.astype(np.int64))


@contextmanager
def _failing_together(trainer: Trainer) -> Iterator[None]:
    """Let all processes stop where one fails, so that none waits for it forever."""
    error = None
    try:
        yield
    except Exception as exception:
        if isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
            raise  # the others wait within the sharded forward pass that this process has left, not below
        error = exception
    if not trainer.strategy.reduce_boolean_decision(error is None):
        raise error or RuntimeError("Another process failed to plan a pool; its own error says why.")


def _batch_hook(trainer: Trainer, name: str) -> Callable[..., Any]:
    """The DataModule's hook if it overrides it, else the module's: Lightning's rule."""
    owner = trainer.datamodule if is_overridden(name, trainer.datamodule) else trainer.lightning_module
    return getattr(owner, name)  # type: ignore[no-any-return]


@contextmanager
def _progress(trainer: Trainer, total: int) -> Iterator[Callable[[], None]]:
    """A bar for encoding below the Trainer's, where it has one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        progress = bar.progress
        task = progress.add_task("Encoding", total=total)
        try:
            yield lambda: progress.advance(task)
        finally:
            progress.remove_task(task)
    elif isinstance(bar, TQDMProgressBar):
        with bar.init_validation_tqdm() as tqdm:
            tqdm.set_description("Encoding")
            tqdm.reset(total)
            yield lambda: tqdm.update() and None
    else:
        yield lambda: None
