"""Callback: decides when and how pools are planned, in Lightning's hooks."""

import math
import time
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bs_lightning._checks import check_integer
from bs_lightning._types import Indices
from bs_lightning.compose import ComposeFunction, Composer, FunctionComposer, RWRComposer, as_composer, asked_for
from bs_lightning.layout import BatchLayout
from bs_lightning.plan import PlannedPool, Planning
from bs_lightning.plugin.auto_pools import AutoPools
from bs_lightning.plugin.batch_sampler import TrainerBatchSampler
from bs_lightning.plugin.datamodule import BatchSamplerDataModule, check_trainer
from bs_lightning.plugin.encoder import EncodedEmbeddings, ModuleEmbed
from bs_lightning.plugin.planner import TrainerPlanner
from bs_lightning.plugin.processes import check_equal
from bs_lightning.plugin.sources import EmbeddingSource, KeptEmbeddings, RecycledEmbeddings, ReferenceEmbeddings
from bs_lightning.plugin.stream_loader import TrainerStreamLoader
from bs_lightning.pools import Cut, Pools, WholeData
from bs_lightning.rules import AbovePositive
from bs_lightning.state import holds_state


class BatchSamplerCallback(Callback):
    """Composes hard batches for in-batch contrastive learning, with the model's current weights.

    Add it to the Trainer, and give ``fit`` a :class:`~bs_lightning.BatchSamplerDataModule`. The first epoch has uniform
    batches. Later, each epoch's random permutation is cut into pools. When a pool's first batch is about to be trained,
    the pool is embedded with the current weights, and the composer arranges it into batches: by default, a random walk
    with restart on a neighbour graph. Every instance is still seen once an epoch, except for the remainder of less than
    one batch that ``drop_last`` drops.

    A pool batch is loaded from ``pool_dataset()`` and passed through ``on_before_batch_transfer`` and
    ``transfer_batch_to_device``. It is embedded by ``embed``, else ``pl_module.embed(batch)``, else
    ``pl_module(batch)``, under the Trainer's precision, in eval mode and without gradients. The hook
    ``on_after_batch_transfer``, where augmentations on the GPU live, is not run. Encoding leaves no trace in training.

    With ``encode_every=4`` the whole dataset is embedded when the first pool of an epoch is planned, and pools are
    composed from these embeddings for four epochs. Rows are kept in float16 (``2 N d`` bytes for each side, in each
    process), and checkpoints hold them.

    With ``recycle=True`` nothing is encoded. ``training_step`` returns ``{"loss": ..., "embeddings": [b, d]}``, one row
    for each instance of the process's batch. Pools are composed from each instance's last row, which is up to an epoch
    old. Rows are kept in float16 (``2 N d`` bytes for each side). An instance without a row is similar to nothing, so
    the first epoch is uniform even with ``warmup_epochs=0``. Checkpoints hold the rows, so a resumed run goes on
    exactly. With ``recycle=True`` or ``pool_size="auto"``, put callbacks that save in ``on_train_batch_end`` behind
    this one.

    The module logs in ``on_train_epoch_end``:

    - ``batch_sampler/hardness``: mean cosine similarity of the negatives in a batch, in the embeddings that the batches
      were composed from. If labels are known, only true negatives count.
    - ``batch_sampler/false_negative_rate``: share of a batch's pairs with equal labels, if labels are known.
    - ``batch_sampler/pool_size``: instances in a pool, one global batch where batches are uniform.
    - ``batch_sampler/accuracy`` and ``batch_sampler/negatives_above_positive``, where embeddings have two sides: share
      of anchors whose positive is more similar than all negatives in the batch, and share of negatives that are more
      similar than the anchor's positive.
    - ``batch_sampler/uniform_hardness``, and ``batch_sampler/uniform_accuracy`` where embeddings have two sides: the
      same for uniform batches, of the same model.
    - ``batch_sampler/encode_seconds`` and the composer's own steps, such as ``batch_sampler/graph_seconds`` and
      ``batch_sampler/walk_seconds``.
    - ``batch_sampler/time_share``: the part of the epoch that all these steps took.

    To choose which epochs are composed, or to change the pool size during training, subclass the callback. Override
    :meth:`should_plan` or :meth:`resolve_pool_size`.

    Args:
        pool_size: Approximate number of instances that are planned together. It is the main setting: larger pools make
            harder batches with more false negatives. At least one global batch. A float in ``(0, 1]`` is a share of the
            dataset, ``"all"`` is the whole dataset, and ``None`` is ten global batches. ``"auto"`` starts with uniform
            batches, and holds ``target_loss`` by the pool size: see :class:`~bs_lightning.pools.AdaptivePools`.
        composer: Arranges a pool into batches: a :class:`~bs_lightning.compose.Composer`, or a function
            ``(embeddings, batch_size, *, seed, epoch)``. ``None`` is :class:`~bs_lightning.RWRComposer`.
        warmup_epochs: Number of uniform epochs at the start.
        target_loss: The training loss that ``pool_size="auto"`` holds, in the units of what ``training_step`` returns.
            While the loss is lower, pools grow, and batches become harder. ``None`` is 0.3 if a rule says which pairs
            are likely false negatives (``own_rule``, or the DataModule's groups or reference embeddings), else 0.05:
            without a rule, batches become harder only when next to nothing is left to learn from easy ones.
        refresh_every: Compose the whole dataset instead of pools, at the start of an epoch and again after this number
            of steps (the paper's t). Needs a composer with ``replacement=True``.
        encode_every: Embed the whole dataset once in this number of epochs, and compose from the kept embeddings in
            between. With ``pool_size="all"`` and :class:`~bs_lightning.RWRComposer` the graph is kept, too, if one
            process composes and whole epochs are trained. ``None`` embeds each pool just before its first batch is
            trained.
        recycle: Compose from the embeddings that training computes, instead of encoding.
        mask_nearest: Treat two instances as a likely false negative if each is among the other's ``mask_nearest``
            nearest neighbours in the pool. ``datamodule.likely_false_negatives()`` then gives the loss a mask. Use it
            where look-alikes mostly belong together, as paraphrases do. Elsewhere it removes the hardest true
            negatives. Needs a composer that finds the nearest neighbours in the whole pool, which
            :class:`~bs_lightning.RandomCandidateGraph` does not.
        own_rule: Treat a pair as a likely false negative if it is more similar than this rule allows, in the embeddings
            that the pool is composed from, and one is among the other's nearest neighbours:
            :class:`~bs_lightning.rules.AbovePositive`. Needs two sides, and a composer that finds the nearest
            neighbours.
        from_reference: Compose from the DataModule's ``reference_embeddings()``, and encode nothing. With
            ``pool_size="all"`` and :class:`~bs_lightning.RWRComposer`, one graph of the whole dataset serves all
            epochs.
        per_rank: ``False`` composes global batches, for losses that gather the negatives of all processes. ``True``
            lets every process compose its own batches from its share of the pool, for losses that do not gather.
        embed: ``embed(pl_module, batch)`` -> floats of shape ``[b, d]``, instead of the module's own method. For two
            sides, such as query and document: a pair of such tensors, or ``[b, 2, d]``. Batches are then composed by
            the similarity of one side with the other, as the loss compares them.
        encode_batch_size: Instances embedded at a time. ``None`` is four times the DataModule's ``batch_size``, which
            fits into memory if training does. It is at most 64 on a CPU, which embeds larger batches more slowly. On a
            GPU with ``num_workers`` above 0 it is ``batch_size``, so that more workers read at the same time.

    Raises:
        ValueError: If ``pool_size``, ``warmup_epochs``, ``refresh_every``, ``encode_every`` or ``encode_batch_size`` is
            out of range, or arguments exclude each other.
        TypeError: If ``composer`` or ``embed`` is not callable, an argument has a wrong type, or ``mask_nearest`` or
            ``own_rule`` is given with a composer that does not find nearest neighbours.

    Example::

        from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, NNDescentGraph, RWRComposer
        from lightning import Trainer

        class Data(BatchSamplerDataModule):
            def train_dataset(self):
                return self.pairs  # item i: an image and its caption

        class MyCLIP(CLIP):
            def embed(self, batch):  # both sides, as the loss compares them
                return self.image_tower(batch[0]), self.text_tower(batch[1])

        near = RWRComposer(NNDescentGraph(n_neighbors=5), restart_probability=0.5)
        trainer = Trainer(callbacks=[BatchSamplerCallback("all", near, encode_every=4)], max_epochs=100)
        trainer.fit(MyCLIP(), datamodule=Data(batch_size=256, num_workers=8))

    Source: "BatchSampler: Sampling Mini-Batches for Contrastive Learning in Vision, Language, and Graphs", KDD 2023,
    arXiv 2306.03355; pools are this library's.
    """

    _planner_of_fit: TrainerPlanner | None = None

    def __init__(
        self,
        pool_size: int | float | Literal["all", "auto"] | None = None,
        composer: Composer | ComposeFunction | None = None,
        warmup_epochs: int = 1,
        *,
        target_loss: float | None = None,
        refresh_every: int | None = None,
        encode_every: int | None = None,
        recycle: bool = False,
        mask_nearest: int | None = None,
        own_rule: AbovePositive | None = None,
        from_reference: bool = False,
        per_rank: bool = False,
        embed: ModuleEmbed | None = None,
        encode_batch_size: int | None = None,
    ) -> None:
        self.pool_size = pool_size
        self.composer = RWRComposer() if composer is None else as_composer(composer)
        self.warmup_epochs = warmup_epochs
        self.target_loss = target_loss
        self.refresh_every = refresh_every
        self.encode_every = encode_every
        self.recycle = recycle
        self.mask_nearest = mask_nearest
        self.own_rule = own_rule
        self.from_reference = from_reference
        self.per_rank = per_rank
        self.embed = embed
        self.encode_batch_size = encode_batch_size
        self._check_arguments()
        self._adaptive: AutoPools | None = None
        self._epoch_start = 0.0
        self._must_rehearse = self._must_describe = self._must_check_mask = False

    # Methods that you may override

    def should_plan(self, trainer: Trainer) -> bool:
        """Return whether the current epoch's batches are composed: after warm-up, and not with ``overfit_batches``.

        Every process calls it, and several times an epoch. It must return the same value in all of these calls: decide
        by the Trainer's state.

        Args:
            trainer: The Trainer, at the start of an epoch or when it resumes in the middle of an epoch.

        Returns:
            ``True`` to compose the epoch's batches, ``False`` to serve uniform batches.
        """
        return trainer.current_epoch >= self.warmup_epochs and not trainer.overfit_batches

    def resolve_pool_size(self, trainer: Trainer, layout: BatchLayout) -> int:
        """Return the current epoch's pool size in instances.

        With ``pool_size="auto"`` nobody asks for it in training. Afterwards it is the last pool's size.

        Args:
            trainer: The Trainer, in its setup or at the start of an epoch.
            layout: The epoch's sizes, such as ``layout.global_batch_size``.

        Returns:
            Instances in a pool, at least one global batch.
        """
        if self.pool_size is None:
            return 10 * layout.global_batch_size
        if self.pool_size == "all":
            return layout.n_instances
        if self._adaptive is not None:
            return max(round(self._adaptive.n_batches), 1) * layout.global_batch_size
        if isinstance(self.pool_size, float):
            return max(round(self.pool_size * layout.n_instances), layout.global_batch_size)
        return int(self.pool_size)

    # Called by the DataModule

    @property
    def finds_false_negatives(self) -> bool:
        """Whether planned pools come with likely false negatives, which the loss may leave out."""
        return self.mask_nearest is not None or self.own_rule is not None

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        """Check the data before training starts, and keep the parts that planning needs.

        Args:
            data: The DataModule.
            layout: The epoch's sizes.

        Raises:
            TypeError: If ``pool_dataset()`` is iterable-style.
            ValueError: If ``pool_size`` is smaller than a global batch, ``pool_dataset()`` or ``train_labels()``
                differs in length from ``train_dataset()``, ``separate_groups`` meets ``replacement=True``, or a stream
                an option that needs indices.
        """
        if data.streams:
            self._check_stream(layout)
        self._planner.attach(data, layout)
        if data.separate_groups and self.composer.replacement:
            raise ValueError(
                "separate_groups=True needs batches that share no instances, but the composer has replacement=True: "
                f"{self.composer!r}."
            )
        if self._adaptive is not None:
            self._adaptive.choose_target(self.own_rule is not None or bool(data.false_negative_rules))
        self.cut(layout).check(layout)

    def planning(self, layout: BatchLayout) -> Planning | None:
        """Return how the batches of the epoch that begins are composed.

        Args:
            layout: The epoch's sizes.

        Returns:
            How batches are composed; ``None`` for uniform batches.
        """
        if not self.should_plan(self._planner.trainer):
            return None
        cut = self.cut(layout)
        expect = self._planner.source.expect if self._adaptive is None else None  # an adaptive pool is not known ahead
        return Planning(self._plan_pool, cut, self.composer.replacement, expect, self._plans_ahead(cut))

    def cut(self, layout: BatchLayout) -> Cut:
        """Return which instances are planned together.

        Args:
            layout: The epoch's sizes.

        Returns:
            Pools, or the whole dataset.
        """
        if self._adaptive is not None:
            return self._adaptive
        if self.refresh_every is not None:
            return WholeData(self.refresh_every)
        return Pools(self.resolve_pool_size(self._planner.trainer, layout))

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not hasattr(self, "_adaptive"):
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__().")
        check_trainer(trainer)
        data = trainer.datamodule
        if not isinstance(data, BatchSamplerDataModule):
            got = "none" if data is None else type(data).__name__
            raise TypeError(
                f"BatchSamplerCallback needs a BatchSamplerDataModule, got {got}. Subclass it and pass it as "
                "trainer.fit(model, datamodule=...)."
            )
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        if replicas != trainer.world_size:
            raise ValueError(
                f"{type(trainer.strategy).__name__} trains {replicas} replicas on {trainer.world_size} processes. "
                "BatchSamplerCallback needs a whole replica in each process (no tensor parallelism)."
            )
        if trainer.overfit_batches:
            rank_zero_info("BatchSamplerCallback: with overfit_batches, every epoch serves the same uniform batches.")
        if self.pool_size == "auto":
            self._adaptive = AutoPools(self.target_loss)
        self._planner_of_fit = TrainerPlanner(
            trainer,
            self._source(trainer),
            self.composer,
            per_rank=self.per_rank,
            mask_nearest=self.mask_nearest,
            own_rule=self.own_rule,
        )
        data.register_planner(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sampler = trainer.datamodule.train_sampler
        if sampler is None:
            raise TypeError(
                f"The batches of {type(trainer.datamodule).__name__} are served by a train_dataloader that is not "
                "BatchSamplerDataModule's, so none would be composed. Override train_dataset() instead."
            )
        self._check_processes(trainer, sampler)
        composes = self.should_plan(trainer) and (self._adaptive is None or self._adaptive.composes)
        self._must_rehearse = not trainer.overfit_batches and not composes
        self._must_check_mask = True
        self._warn_if_all_is_warm_up(trainer, pl_module.automatic_optimization)
        self._warn_of_single_batches(trainer, sampler.layout)
        self._start_epoch(trainer)  # a run that resumes in mid-epoch skips `on_train_epoch_start`

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._must_rehearse:  # not earlier: the module's start hooks may make what `embed` needs
            self._planner.rehearse(self.cut(self._planner.layout), epoch=max(self.warmup_epochs, trainer.current_epoch))
            self._must_rehearse = False
        if self._must_describe:
            self._planner.describe_uniform(trainer.current_epoch)
            self._must_describe = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._planner.source.keep(outputs)
        if self._adaptive is not None:
            self._adaptive.observe_step(trainer, pl_module, outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log, spent = self._planner.description(), self._planner.seconds
        if spent:
            log |= {f"batch_sampler/{step}_seconds": value for step, value in spent.items()}
            log["batch_sampler/time_share"] = sum(spent.values()) / (time.perf_counter() - self._epoch_start)
        if not trainer.barebones:  # it logs nothing, and warns of each value
            # Without a batch size, Lightning would look for one in the epoch's last batch, which may be of any kind.
            pl_module.log_dict(log, sync_dist=True, batch_size=1)
        if self._must_check_mask and self.should_plan(trainer):
            trainer.datamodule.warn_of_unread_mask()
            self._must_check_mask = False
        self._planner.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._adaptive is not None:
            self._adaptive.say_how_it_ended()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return  # a second Trainer may evaluate on the DataModule while a first one fits
        self._close()
        if isinstance(trainer.datamodule, BatchSamplerDataModule):
            trainer.datamodule.forget_planner()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data = trainer.datamodule
        if not isinstance(data, BatchSamplerDataModule) or data.train_sampler is None:
            return  # nothing has been trained, as where Lightning searches for a learning rate first
        kind = type(data)
        if not holds_state(checkpoint.get(kind.__qualname__, {})):
            rank_zero_warn(
                f"state_dict() of {kind.__name__} leaves out the state of BatchSamplerDataModule, so a run cannot "
                "resume exactly. Return `super().state_dict() | {...}`, and call super() in load_state_dict(), too. If "
                "you have nothing to save, delete both."
            )

    def state_dict(self) -> dict[str, Any]:
        state = {} if self._planner_of_fit is None else self._planner_of_fit.source.state_dict()
        return state if self._adaptive is None else state | {"adaptive": self._adaptive.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        of_source = {name: value for name, value in state_dict.items() if name != "adaptive"}
        if self._planner_of_fit is not None:
            self._planner_of_fit.source.load_state_dict(of_source)
            self._planner_of_fit.graph.forget()
        if self._adaptive is not None and "adaptive" in state_dict:
            self._adaptive.load_state_dict(state_dict["adaptive"])

    # Shared by the methods above

    @property
    def _planner(self) -> TrainerPlanner:
        """The planner, from ``setup`` on."""
        if self._planner_of_fit is None:
            raise RuntimeError(f"{type(self).__name__}.setup must call super().setup(trainer, pl_module, stage).")
        return self._planner_of_fit

    def _source(self, trainer: Trainer) -> EmbeddingSource:
        """Return where the embeddings of pools come from."""
        if self.recycle:
            return RecycledEmbeddings(trainer, self.per_rank, needs_two_sides=self.own_rule is not None)
        if self.from_reference:
            return ReferenceEmbeddings(trainer, self.per_rank)
        if self.encode_every is not None:
            encoder = EncodedEmbeddings(trainer, self.embed, self.encode_batch_size, per_rank=False)
            return KeptEmbeddings(trainer, encoder, self.encode_every, self.per_rank)
        return EncodedEmbeddings(trainer, self.embed, self.encode_batch_size, self.per_rank)

    def _plan_pool(self, indices: Indices, *, seed: int, epoch: int) -> PlannedPool:
        if self._adaptive is not None:
            self._adaptive.say_what_changes()
            if not self._adaptive.composes:
                return self._planner.plan_uniform(indices)
        return self._planner.plan_pool(indices, seed=seed, epoch=epoch)

    def _plans_ahead(self, cut: Cut) -> bool:
        """Return whether pools may be planned while earlier pools are trained."""
        return self._planner.source.foreseen and isinstance(cut, Pools)

    def _start_epoch(self, trainer: Trainer) -> None:
        self._must_describe = not trainer.overfit_batches and not self.should_plan(trainer)
        self._epoch_start = time.perf_counter()

    def _close(self) -> None:
        if self._planner_of_fit is not None:
            self._planner_of_fit.source.close()
            self._planner_of_fit.graph.forget()

    # What is refused and warned of before training

    def _check_arguments(self) -> None:
        """Refuse arguments that are out of range, or exclude each other."""
        _check_pool_size(self.pool_size)
        check_integer("warmup_epochs", self.warmup_epochs, 0)
        if self.embed is not None and not callable(self.embed):
            raise TypeError(f"embed must be a function of (pl_module, batch), got {self.embed!r}.")
        if self.encode_batch_size is not None:
            check_integer("encode_batch_size", self.encode_batch_size, 1)
        if self.encode_every is not None:
            check_integer("encode_every", self.encode_every, 1)
        if self.mask_nearest is not None:
            check_integer("mask_nearest", self.mask_nearest, 1, "5 suits pools of ten batches.")
        if self.own_rule is not None and not isinstance(self.own_rule, AbovePositive):
            raise TypeError(f"own_rule must be AbovePositive(...) or None, got {self.own_rule!r}.")
        AutoPools(self.target_loss)  # raises if it is out of range
        if self.target_loss is not None and self.pool_size != "auto":
            raise ValueError(
                f'target_loss={self.target_loss} is for pool_size="auto", got pool_size={self.pool_size!r}.'
            )
        if self.recycle and self.from_reference:
            raise ValueError("recycle=True and from_reference=True name two sources of embeddings. Give one of them.")
        encoding = (self.embed, self.encode_batch_size, self.encode_every)
        if (self.recycle or self.from_reference) and encoding != (None, None, None):
            source = "recycle" if self.recycle else "from_reference"
            raise ValueError(f"{source}=True encodes nothing: leave out embed, encode_batch_size and encode_every.")
        for name in ("mask_nearest", "own_rule"):
            if getattr(self, name) is not None and not self.composer.finds_nearest:
                raise TypeError(
                    f"{name}={getattr(self, name)} needs a composer that finds each instance's nearest neighbours in "
                    "the whole pool, such as RWRComposer() with NNDescentGraph() or ExactGraph(), got "
                    f"{self.composer!r}."
                )
        if self.refresh_every is None:
            return
        if self.encode_every is not None:
            raise ValueError(
                f"encode_every={self.encode_every} keeps embeddings for epochs, refresh_every={self.refresh_every} "
                "renews them every few steps. Give one of them."
            )
        if self.pool_size is not None:
            raise ValueError(
                f"refresh_every={self.refresh_every} composes the whole dataset, so pool_size must be left out, got "
                f"{self.pool_size}. Each pool is refreshed at its start anyway."
            )
        Planning(self._plan_pool, WholeData(self.refresh_every), self.composer.replacement)  # raises if they do not fit

    def _check_stream(self, layout: BatchLayout) -> None:
        """Refuse what cannot work on a stream, whose instances come once and have no index."""
        size, n_processes = self.pool_size, layout.world_size
        is_share = size in ("all", "auto") or isinstance(size, float)
        once = "serves instances more than once, but a stream's instances come once. Leave it out."
        by_index = "finds embeddings by the index of an instance, and a stream has none. Leave it out."
        refusals = [
            (is_share, f"pool_size={size!r} needs the length of the dataset. Give a number of instances."),
            (self.refresh_every is not None, f"refresh_every={self.refresh_every} {once}"),
            (self.composer.replacement, f"replacement=True {once}"),
            (self.recycle, f"recycle=True {by_index}"),
            (self.from_reference, f"from_reference=True {by_index}"),
            (self.encode_every is not None, f"encode_every={self.encode_every} {by_index}"),
            (
                n_processes > 1 and not self.per_rank,
                "each process reads its own part of the stream, so it can only compose batches from its part. Use "
                f"per_rank=True on {n_processes} processes.",
            ),
            (
                "indices" in asked_for(self.composer),
                f"{self.composer!r} asks for dataset indices, and a stream has none. Use a different composer.",
            ),
        ]
        for applies, words in refusals:
            if applies:
                raise ValueError(f"train_dataset() is a stream: {words}")

    def _check_processes(self, trainer: Trainer, sampler: TrainerBatchSampler | TrainerStreamLoader) -> None:
        """Refuse processes that would plan differently."""
        # They decide at which step pools are planned ahead, and all processes must plan a pool at the same step.
        names = ("num_workers", "prefetch_factor") if self._plans_ahead(self.cut(sampler.layout)) else ()
        settings_of_workers = {name: trainer.datamodule.dataloader_kwargs.get(name) for name in names}
        check_equal(
            trainer,
            n_instances=sampler.layout.n_instances,
            batch_size=sampler.layout.batch_size,
            drop_last=sampler.layout.drop_last,
            seed=sampler.seed,
            warmup_epochs=self.warmup_epochs,
            pool_size=self.pool_size,
            target_loss=self.target_loss,
            own_rule=self.own_rule,
            from_reference=self.from_reference,
            groups=sampler.groups_digest,
            checksum_of_labels=self._planner.labels_checksum,
            refresh_every=self.refresh_every,
            encode_every=self.encode_every,
            recycle=self.recycle,
            mask_nearest=self.mask_nearest,
            per_rank=self.per_rank,
            **settings_of_workers,
            composer=_name(self.composer),
            replacement=self.composer.replacement,
        )

    def _warn_if_all_is_warm_up(self, trainer: Trainer, steps_are_batches: bool) -> None:
        """Warn if training ends before the first composed epoch. There is nothing to rehearse for then."""
        if type(self).should_plan is not BatchSamplerCallback.should_plan or trainer.fast_dev_run:
            return
        last = trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
        n_steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)  # of an epoch
        if last <= self.warmup_epochs:
            what = f"max_epochs={trainer.max_epochs} are"
        elif math.isinf(trainer.num_training_batches):  # a stream of unknown length
            if trainer.current_epoch < self.warmup_epochs and trainer.max_steps > 0:
                rank_zero_warn(
                    f"BatchSamplerCallback composes no batch in the first warmup_epochs={self.warmup_epochs} passes "
                    f"over the stream, whose length is not known. If max_steps={trainer.max_steps} end training "
                    "before, none is composed. Give limit_train_batches, which makes epochs shorter, or "
                    "warmup_epochs=0."
                )
            return
        elif steps_are_batches and 0 < trainer.max_steps <= self.warmup_epochs * n_steps:
            what = f"max_steps={trainer.max_steps}, with {n_steps} an epoch, are"
        else:
            return
        self._must_rehearse &= trainer.max_steps != -1  # a few steps may be meant as a trial
        rank_zero_warn(
            f"BatchSamplerCallback composes no batch: all of {what} within warmup_epochs={self.warmup_epochs}."
        )

    def _warn_of_single_batches(self, trainer: Trainer, layout: BatchLayout) -> None:
        """Warn if pools hold one batch each, or the data hold no more."""
        cut = self.cut(layout)
        if not isinstance(cut, Pools) or trainer.datamodule.streams or trainer.fast_dev_run:
            return
        if cut.next_pool(0, layout.n_full, layout)[1] == 1:
            rank_zero_warn(
                f"A pool holds one batch of {layout.global_batch_size} of the dataset's {layout.n_instances} "
                "instances, so composing changes nothing. Raise pool_size or lower batch_size."
            )


def _check_pool_size(pool_size: Any) -> None:
    """Refuse a pool size that is neither instances, nor a share of the dataset, nor a name."""
    if pool_size is None or pool_size in ("all", "auto"):
        return
    if isinstance(pool_size, float):
        if not 0 < pool_size <= 1:
            raise ValueError(
                f"pool_size as a float is a share of the dataset and must lie in (0, 1], got {pool_size}. Give a "
                "number of instances as an integer."
            )
    elif isinstance(pool_size, str):
        raise ValueError(f'pool_size must be an integer, a float in (0, 1], "all", "auto" or None, got {pool_size!r}.')
    elif callable(pool_size):
        raise TypeError(f"pool_size must be an integer, got {pool_size!r}. Name a composer: composer=RWRComposer().")
    elif check_integer("pool_size", pool_size) < 2:
        raise ValueError(f"pool_size must be at least one global batch, got {pool_size}.")


def _name(composer: Composer) -> str:
    """Return what tells composers apart: a class that is defined in a function cannot be sent to other processes."""
    if isinstance(composer, FunctionComposer):
        return repr(composer)
    return f"{type(composer).__module__}.{type(composer).__qualname__}"
