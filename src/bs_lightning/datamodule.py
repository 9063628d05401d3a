"""The DataModule: Lightning's side of the data, which serves the plan."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import Dataset

from bs_lightning._checks import check_seed
from bs_lightning._types import Indices
from bs_lightning.loader import PoolLoader, check_dataloader_kwargs, check_map_style
from bs_lightning.plan import EpochPlan, Pool
from bs_lightning.sampler import PoolBatchSampler, check_same_batches, pool_from_state

if TYPE_CHECKING:
    from bs_lightning.callback import BatchSamplerCallback


class BatchSamplerDataModule(LightningDataModule):
    """A DataModule whose training batches a :class:`~bs_lightning.BatchSamplerCallback` composes.

    Subclass it and override :meth:`train_dataset`. Where what is trained on is not what should be encoded, say two
    augmented views, override :meth:`pool_dataset` too. Everything else (``setup``, ``prepare_data``,
    ``val_dataloader`` and so on) is as in any ``LightningDataModule``.

    Without the callback, and in its warm-up epochs, the batches are uniform: consecutive pieces of a random
    permutation, another each epoch.

    Args:
        batch_size: Instances per batch and process. Read when training data is asked for, so that
            ``Tuner.scale_batch_size`` can change it.
        drop_last: ``True`` drops the remainder of less than one global batch, a random one each epoch. ``False``
            serves it as a smaller, uniform batch at the epoch's end.
        seed: The same seed gives the same permutations and walks. ``None`` takes the global seed that
            ``seed_everything`` set, rank 0's on all ranks.
        **dataloader_kwargs: For training and pool loader alike, those of :class:`torch.utils.data.DataLoader` that do
            not choose indices: ``num_workers``, ``collate_fn``, ``pin_memory``, ``persistent_workers`` and so on.

    Raises:
        TypeError: If a subclass overrides ``train_dataloader``, or ``seed`` is no integer.
        ValueError: If ``dataloader_kwargs`` has an argument that chooses indices, or ``seed`` is negative.

    Example:
        >>> import torch
        >>> from bs_lightning import BatchSamplerDataModule
        >>> class Data(BatchSamplerDataModule):
        ...     def train_dataset(self):
        ...         return torch.arange(100.0).reshape(50, 2)
        >>> len(Data(batch_size=16, num_workers=0).train_dataloader())
        3
    """

    def __init__(
        self, batch_size: int, *, drop_last: bool = True, seed: int | None = None, **dataloader_kwargs: Any
    ) -> None:
        super().__init__()
        check_dataloader_kwargs(dataloader_kwargs)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = None if seed is None else check_seed(seed)
        self.dataloader_kwargs = dataloader_kwargs
        self._train_dataset: Dataset[Any] | None = None
        self._checkpoint: tuple[Any, dict[str, Any]] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.train_dataloader is not BatchSamplerDataModule.train_dataloader:
            raise TypeError(
                f"{cls.__name__} must not override train_dataloader: the batches that BatchSamplerCallback composes "
                "would be bypassed. Return the data set from train_dataset() and give DataLoader's arguments to "
                "super().__init__(batch_size, num_workers=..., ...)."
            )

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer, once ``fit`` has attached it."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        check_trainer(trainer)
        self._trainer = trainer

    def train_dataset(self) -> Dataset[Any]:
        """The map-style data set to train on. Must be overridden; called once per ``train_dataloader``.

        Raises:
            NotImplementedError: If it is not overridden.
        """
        raise NotImplementedError(f"{type(self).__name__} must override train_dataset().")

    def pool_dataset(self) -> Dataset[Any]:
        """The data set to encode: of the same length and order, one clean view. The training data by default."""
        return self.train_dataset() if self._train_dataset is None else self._train_dataset

    def train_labels(self) -> Tensor | Sequence[int] | None:
        """Labels, integers of shape ``[N]``, for the false-negative metric alone; ``dataset.targets`` by default.

        ``None`` where there are none: the metric is not logged then. Labels that mean "unknown" count as a class.
        """
        return getattr(self._train_dataset, "targets", None)

    def train_dataloader(self) -> PoolLoader:
        """The loader that serves the plan. Not to be overridden.

        Raises:
            TypeError: If the data set is iterable-style, ``batch_size`` no integer, or ``training_step`` takes
                ``dataloader_iter``.
            ValueError: If ``batch_size`` is below 2 or the data set is smaller than a global batch.
        """
        for name in ("train_dataset", "pool_dataset", "train_labels"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be a method that returns what it names, got {type(getattr(self, name)).__name__}. "
                    "Keep yours under another name, and return it there."
                )
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None and is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise TypeError(
                f"{type(module).__name__}.training_step must take (batch, batch_idx): one that takes dataloader_iter "
                "fetches batches itself, and which of them is being trained cannot be known."
            )
        dataset = self.train_dataset()
        check_map_style(dataset, "train_dataset()")
        self._train_dataset = dataset
        ranks = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        sampler = TrainerBatchSampler(
            self,
            len(dataset),  # type: ignore[arg-type]
            rank=ranks["rank"] if ranks else 0,
            world_size=ranks["num_replicas"] if ranks else 1,
        )
        callback = None if self.trainer is None else find_callback(self.trainer)
        if callback is not None:
            callback.check_data(self, sampler.layout)
        return _TrainLoader(dataset, sampler, **self.dataloader_kwargs)

    def trained_batch(self) -> Indices:
        """The dataset indices of the global batch that is being trained, int64; a process's slice of it is contiguous.

        For callbacks and losses that want to know them, in ``training_step`` and the hooks around it.

        Raises:
            RuntimeError: If no batch is being trained: in validation, between two batches, before and after an epoch.
        """
        return self._trained_batch("trained_batch")

    def likely_false_negatives(self) -> Tensor:
        """Which pairs of the global batch that is being trained are mutual nearest neighbours in its pool.

        For losses that leave such pairs out of the negatives; asked for in ``training_step``, with
        ``BatchSamplerCallback(mask_nearest=...)``.

        Returns:
            bool of shape ``[B, B]`` on the module's device, in the order of :meth:`trained_batch`, which is that of
            embeddings gathered from all processes; false on the diagonal, and throughout uniform batches.

        Raises:
            RuntimeError: If no batch is being trained, as in validation, or no callback has ``mask_nearest``.

        Example::

            def training_step(self, batch, batch_idx):
                a, b = (F.normalize(self(view), dim=1) for view in batch)
                logits = a @ b.T / 0.1
                logits = logits.masked_fill(self.trainer.datamodule.likely_false_negatives(), -torch.inf)
                return F.cross_entropy(logits, torch.arange(len(a), device=a.device))
        """
        batch = self._trained_batch("likely_false_negatives")
        assert self.trainer is not None
        callback = find_callback(self.trainer)
        if callback is None or callback.mask_nearest is None:
            raise RuntimeError("likely_false_negatives() needs BatchSamplerCallback(mask_nearest=...), such as 5.")
        return callback.mask(batch).to(self.trainer.lightning_module.device)

    def state_dict(self) -> dict[str, Any]:
        """Seed, sizes and the pool being served: tensors and plain Python. Call it where you override it."""
        sampler = self.train_sampler
        if sampler is None or not sampler.has_planned:
            return self.restored_state() or ({} if sampler is None else sampler.state_dict())
        return sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the pool that was being served. Call it where you override it."""
        self._checkpoint = (None if self.trainer is None else self.trainer.ckpt_path, state_dict)

    def restored_state(self) -> dict[str, Any] | None:
        """Our state in the checkpoint that the current fit was resumed from, if it was and has it."""
        if self._checkpoint is None or self.trainer is None or self.trainer.ckpt_path is None:
            return None
        path, state = self._checkpoint
        return state if path == self.trainer.ckpt_path and "n_batches" in state else None

    @property
    def train_sampler(self) -> "TrainerBatchSampler | None":
        """That of the loader that is being trained from; others of :meth:`train_dataloader` do not matter."""
        loader = None if self.trainer is None else self.trainer.train_dataloader
        return loader.batch_sampler if isinstance(loader, _TrainLoader) else None  # type: ignore[return-value]

    def _trained_batch(self, asked: str) -> Indices:
        sampler = self.train_sampler
        batch = None if sampler is None else sampler.trained_batch()
        if batch is None:
            stage = None if self.trainer is None else self.trainer.state.stage
            raise RuntimeError(
                f"{asked}() was called while no batch is being trained (trainer.state.stage is "
                f"{stage and stage.value!r}). Call it in training_step or in hooks from on_train_batch_start to "
                "on_train_batch_end; in a step that validation shares, only `if self.trainer.training`."
            )
        return batch


class _TrainLoader(PoolLoader):
    """Under Lightning the state is in the DataModule's: a module that reads ``trainer.estimated_stepping_batches`` in
    ``configure_optimizers`` gets its loader before Lightning restores loaders. The two methods for it only tell
    Lightning that resuming in mid-epoch is taken care of. When a fit ends, Lightning sets a loader's ``_iterator`` to
    ``None`` to end its workers."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    @property
    def _iterator(self) -> None:
        return None

    @_iterator.setter
    def _iterator(self, _: None) -> None:
        self.close()


class TrainerBatchSampler(PoolBatchSampler):
    """Serves the epoch and position at which the DataModule's Trainer is.

    All that the library does with Lightning's loops stands here: what the loops count is right when the first batch of
    an iteration is asked for, which is when :meth:`plan` is called. (A counter of our own goes wrong: other callbacks
    may save a checkpoint before it is raised.)
    """

    def __init__(self, datamodule: BatchSamplerDataModule, n_instances: int, *, rank: int, world_size: int) -> None:
        super().__init__(
            n_instances,
            datamodule.batch_size,
            drop_last=datamodule.drop_last,
            seed=_resolve_seed(datamodule),
            rank=rank,
            world_size=world_size,
        )
        self._datamodule = datamodule
        self._n_epochs_processed = 0

    def plan(self) -> EpochPlan:
        """The rest of the epoch that is being trained; for anybody else a whole uniform epoch."""
        trainer = self._datamodule.trainer
        if trainer is None:
            return super().plan()
        if not trainer.training or self._datamodule.train_sampler is not self:
            return self._uniform_plan()

        _count_epoch(trainer)
        state = self._datamodule.restored_state()
        if state is not None:
            self.seed = int(state["seed"])
        # With `overfit_batches` every epoch has the same batches.
        epoch = 0 if trainer.overfit_batches else trainer.current_epoch
        start = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._plan is not None and self._plan.epoch == epoch and self._plan.start < start:
            return self._uniform_plan()  # a hook or a callback looks into the loader while the epoch is being trained
        self.epoch = epoch
        callback = find_callback(trainer)
        if callback is not None and callback.should_plan(trainer):
            self.pool_size = callback.resolve_pool_size(self.layout)
            refresh_every = callback.refresh_every
            self.plan_pool = partial(callback.plan_pool, trainer)
            self.replacement = getattr(callback.composer, "replacement", False)
        else:
            self.pool_size = refresh_every = self.plan_pool = None
        self._plan = EpochPlan(
            self.layout,
            seed=self.seed,
            epoch=self.epoch,
            start=start,
            stop=int(trainer.num_training_batches),
            pool_size=self.pool_size,
            refresh_every=refresh_every,
            plan_pool=self.plan_pool,
            replacement=self.replacement,
            pool=self._current_pool(start),
        )
        self._n_epochs_processed = trainer.fit_loop.epoch_progress.current.processed
        return self._plan

    def _uniform_plan(self) -> EpochPlan:
        """For whoever only looks: not the epoch that is being trained, so that looking changes nothing."""
        return EpochPlan(self.layout, seed=self.seed, epoch=0)

    def trained_batch(self) -> Indices | None:
        """The dataset indices of the global batch that is being trained; ``None`` if none is."""
        trainer = self._datamodule.trainer
        if self._plan is None or trainer is None or not trainer.training:
            return None
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        # The batch with which `on_train_batch_start` ends an epoch, by returning -1, is never counted as completed.
        epoch_ended = trainer.fit_loop.epoch_progress.current.processed != self._n_epochs_processed
        if batches.ready == batches.completed or epoch_ended:
            return None
        return self._plan.global_batch(batches.ready - 1).astype(np.int64)

    def _current_pool(self, start: int) -> Pool | None:
        """The pool that was being served when this epoch was last left, by this process or one before it."""
        if self._plan is not None:
            return self._plan.pool
        state = self._datamodule.restored_state()
        if state is not None:
            # With larger batches Lightning may take the epoch for ended, and would begin it anew.
            if start > 0 or (state["epoch"] == self.epoch and 0 < state["served"] < state["n_batches"]):
                check_same_batches(state, self.layout)
            return pool_from_state(state)
        if start > 0:
            rank_zero_warn(
                "Resuming in the middle of an epoch from a checkpoint without the state of BatchSamplerDataModule: "
                "the rest of this epoch is planned anew and may repeat instances. (Does your DataModule override "
                "state_dict() or load_state_dict() without calling super()?)"
            )
        return None


def check_trainer(trainer: object) -> None:
    """Refuse the Trainer of the package ``pytorch_lightning``, whose classes are not those of ``lightning``.

    Raises:
        TypeError: Saying what to import.
    """
    if trainer is not None and not isinstance(trainer, Trainer):
        raise TypeError(
            f"This Trainer is of {type(trainer).__module__}, but bs_lightning uses the package lightning: "
            "write `from lightning import Trainer, LightningModule`."
        )


def find_callback(trainer: Trainer) -> "BatchSamplerCallback | None":
    """The Trainer's :class:`~bs_lightning.BatchSamplerCallback`, if it has one."""
    from bs_lightning.callback import BatchSamplerCallback  # which needs this module

    return next((callback for callback in trainer.callbacks if isinstance(callback, BatchSamplerCallback)), None)


def _count_epoch(trainer: Trainer) -> None:
    """Count an epoch that Lightning has begun without counting it.

    Resumed from a checkpoint that was written in ``on_train_batch_end`` of an epoch's last batch, Lightning trains the
    next epoch uncounted: a checkpoint taken in that one looks to it as if between two epochs, and resumed from it would
    train the epoch's first batches again.
    """
    progress = trainer.fit_loop.epoch_progress
    if trainer.fit_loop.restarted_mid_epoch and progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


def _resolve_seed(datamodule: BatchSamplerDataModule) -> int:
    """The one given, else the global one: the same on all ranks."""
    if datamodule.seed is not None:
        return datamodule.seed
    seed = torch.initial_seed()
    trainer = datamodule.trainer
    return seed if trainer is None or not trainer.training else trainer.strategy.broadcast(seed)
