"""The DataModule: Lightning's side of the data, which serves the plan."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from bs_lightning._checks import check_length, check_seed
from bs_lightning._types import Embeddings, Indices
from bs_lightning.layout import BatchLayout
from bs_lightning.loader import PoolLoader, check_dataloader_kwargs, check_map_style
from bs_lightning.plan import Planning
from bs_lightning.plugin.batch_sampler import TrainerBatchSampler
from bs_lightning.plugin.loader import TrainerLoader
from bs_lightning.plugin.stream_loader import TrainerStreamLoader
from bs_lightning.pools import Cut, Pools
from bs_lightning.rules import AbovePositive, AboveSimilarity, MoreSimilar, Rule, SameGroup, check_reference
from bs_lightning.state import SamplerState, holds_state
from bs_lightning.stream import StreamLoader
from bs_lightning.stream_state import StreamState

_T = TypeVar("_T")


class BatchPlanner(Protocol):
    """What the DataModule asks of the callback that plans its batches."""

    @property
    def finds_false_negatives(self) -> bool:
        """Whether planned pools come with pairs that the loss may leave out."""
        ...

    def attach(self, data: "BatchSamplerDataModule", layout: BatchLayout) -> None:
        """Look at the data before training starts, and take what planning needs of it."""
        ...

    def planning(self, layout: BatchLayout) -> Planning | None:
        """How the batches of the epoch that begins are composed; ``None`` for uniform batches."""
        ...

    def cut(self, layout: BatchLayout) -> Cut:
        """Which instances are planned together."""
        ...


class BatchSamplerDataModule(LightningDataModule):
    """A DataModule whose training batches a :class:`~bs_lightning.BatchSamplerCallback` composes.

    Subclass it and override :meth:`train_dataset`. Where what is trained on is not what should be encoded, say two
    augmented views, override :meth:`pool_dataset` too. Everything else (``setup``, ``prepare_data``,
    ``val_dataloader`` and so on) is as in any ``LightningDataModule``.

    Without the callback, and in its warm-up epochs, the batches are uniform: consecutive pieces of a random
    permutation, another each epoch.

    With ``num_workers > 0`` the workers are kept until the fit ends, as with ``persistent_workers=True``. torch starts
    new ones each epoch. Here that would be twice an epoch, for training and for encoding. On Linux torch forks them
    while other threads run, and sometimes such a worker hangs for good. A kept worker has the dataset as it was when
    the worker started. If you change the dataset between epochs, give ``persistent_workers=False``.

    Args:
        batch_size: Instances per batch and process. Read when training data is asked for, so that
            ``Tuner.scale_batch_size`` can change it.
        drop_last: ``True`` drops the remainder of less than one global batch, a random one each epoch. ``False``
            serves it as a smaller, uniform batch at the epoch's end.
        seed: The same seed gives the same permutations and walks. ``None`` takes the global seed that
            ``seed_everything`` set, rank 0's on all ranks.
        reference_rule: Which pairs :meth:`reference_embeddings` call likely false negatives:
            :class:`~bs_lightning.rules.AbovePositive` or :class:`~bs_lightning.rules.AboveSimilarity`. ``None`` is
            ``AbovePositive()`` for two sides. For one side, ``None`` marks no pairs.
        separate_groups: Whether to keep the instances of a group of :meth:`train_groups` out of each other's batches,
            in uniform epochs too.
        pool_collate_fn: The ``collate_fn`` for batches of :meth:`pool_dataset`, where items of one view cannot be
            collated as the training items are. ``None`` takes ``collate_fn``.
        persistent_workers: Whether workers are kept until the fit ends; ``None`` keeps them if there are any.
        **dataloader_kwargs: For training and pool loader alike, those of :class:`torch.utils.data.DataLoader` that do
            not choose indices: ``num_workers``, ``collate_fn``, ``pin_memory`` and so on.

    Raises:
        TypeError: If a subclass overrides ``train_dataloader`` or has a base of ``pytorch_lightning``, ``seed`` is no
            integer, or ``reference_rule`` no rule.
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

    # Lightning sets `trainer` before our `__init__` runs.
    _trainer: Trainer | None = None
    _guest: Trainer | None = None
    _seed_of_fit: int | None = None

    def __init__(
        self,
        batch_size: int,
        *,
        drop_last: bool = True,
        seed: int | None = None,
        reference_rule: AbovePositive | AboveSimilarity | None = None,
        separate_groups: bool = False,
        pool_collate_fn: Callable[[list[Any]], Any] | None = None,
        persistent_workers: bool | None = None,
        **dataloader_kwargs: Any,
    ) -> None:
        LightningDataModule.__init__(self)  # a DataModule that comes second may need arguments
        # Not one of `dataloader_kwargs`: LightningCLI would give those torch's defaults.
        if persistent_workers is None:
            persistent_workers = bool(dataloader_kwargs.get("num_workers"))
        dataloader_kwargs["persistent_workers"] = persistent_workers
        check_dataloader_kwargs(dataloader_kwargs)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = None if seed is None else check_seed(seed)
        if reference_rule is not None and not isinstance(reference_rule, (AbovePositive, AboveSimilarity)):
            raise TypeError(
                f"reference_rule must be AbovePositive(...), AboveSimilarity(...) or None, got {reference_rule!r}."
            )
        self.reference_rule = reference_rule
        self.separate_groups = separate_groups
        self._reference: Embeddings | None = None
        self._rules: tuple[Rule, ...] = ()
        self.pool_collate_fn = pool_collate_fn
        self.dataloader_kwargs = dataloader_kwargs
        self._train_dataset: Dataset[Any] | None = None
        self._checkpoint: tuple[Any, dict[str, Any]] | None = None
        self._sampler_of_last_fit: TrainerBatchSampler | TrainerStreamLoader | None = None
        self._planner: BatchPlanner | None = None
        self._mask_was_read = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "pytorch_lightning"]
        if theirs:  # its methods would come after those of lightning's class, which do nothing
            raise TypeError(
                f"{cls.__name__} has a base of {theirs[0].__module__}, but bs_lightning uses the package lightning: "
                "write `import lightning.pytorch as pl` where that base is defined."
            )
        if cls.train_dataloader is not BatchSamplerDataModule.train_dataloader:
            owner = next(base for base in cls.__mro__ if "train_dataloader" in vars(base))
            if owner is not cls:
                raise TypeError(
                    f"{cls.__name__} takes train_dataloader from {owner.__name__}, so the batches that "
                    "BatchSamplerCallback composes would be bypassed. Name BatchSamplerDataModule before "
                    f"{owner.__name__} among the bases, and return the dataset from train_dataset()."
                )
            raise TypeError(
                f"{cls.__name__} must not override train_dataloader: the batches that BatchSamplerCallback composes "
                "would be bypassed. Return the dataset from train_dataset() and give DataLoader's arguments to "
                "super().__init__(batch_size, num_workers=..., ...)."
            )

    # Methods that you override

    def train_dataset(self) -> Dataset[Any]:
        """The dataset to train on: map-style, or a stream. Must be overridden; called once per ``train_dataloader``.

        A stream is an ``IterableDataset`` of single instances: see :class:`~bs_lightning.StreamLoader`.

        Raises:
            NotImplementedError: If it is not overridden.
        """
        raise NotImplementedError(f"{type(self).__name__} must override train_dataset().")

    def pool_dataset(self) -> Dataset[Any]:
        """The dataset to encode: of the same length and order, one clean view. The training data by default."""
        return self.train_dataset() if self._train_dataset is None else self._train_dataset

    def train_labels(self) -> Tensor | ArrayLike | None:
        """Labels, integers of shape ``[N]``, for the false-negative rate and for composers that ask for them.

        By default they are the dataset's ``targets``, or its ``y`` (as in ``torch_geometric``), if that holds an
        integer for each instance. Where there are none, return ``None``: the false-negative rate is not logged then.
        Labels that mean "unknown" count as a class.
        """
        dataset = self._train_dataset
        if self.streams:
            return None
        targets, y = getattr(dataset, "targets", None), getattr(dataset, "y", None)
        if _are_integers(targets):
            return targets
        return y if _are_integers(y) and len(y) == len(dataset) else None  # type: ignore[arg-type]

    def train_groups(self) -> Tensor | ArrayLike | None:
        """Return each instance's group: instances of a group are never each other's negatives.

        A group is one product, caption, sentence or document, or an instance that the dataset holds twice. Walks take
        no edge within a group. The loss leaves its pairs out if you pass it :meth:`likely_false_negatives`.

        Returns:
            Integers of shape ``[N]``, or ``[N, G]`` if an instance has several groups, such as its query and its
            document. Instances with a number in common, in any columns, are of one group. ``None``, the default, if
            there are no groups.
        """
        return None

    def reference_embeddings(self) -> Embeddings | None:
        """Return embeddings of the dataset by another model, or by this model after an earlier training.

        They are a second opinion on what is a false negative: see :meth:`likely_false_negatives`. With
        ``BatchSamplerCallback(from_reference=True)`` batches are composed from them, too.
        :func:`bs_lightning.encode_dataset` makes them.

        Returns:
            Floats of shape ``[N, d]``, or ``[N, 2, d]`` for two sides such as query and document; rows of any length. A
            :class:`numpy.memmap` is read a few rows at a time. ``None``, the default, if there are none.
        """
        return None

    # Asked in training

    def trained_batch(self) -> Indices:
        """The dataset indices of the global batch being trained, int64 ``[B]``. A process's slice of it is contiguous.

        Ask for them in ``training_step`` and the hooks around it.

        Raises:
            RuntimeError: If no batch is being trained: in validation, between two batches, before and after an epoch.
        """
        sampler = self.train_sampler
        return self._in_training("trained_batch", None if sampler is None else sampler.trained_batch())

    def likely_false_negatives(self) -> Tensor:
        """Return which pairs of the global batch being trained are likely false negatives.

        Ask for it in ``training_step``, and leave these pairs out of the loss's negatives. A pair is marked by any of:

        - :meth:`train_groups`, if the two are of one group;
        - :meth:`reference_embeddings` and ``reference_rule``;
        - ``BatchSamplerCallback(mask_nearest=...)`` and ``BatchSamplerCallback(own_rule=...)``, in composed batches.

        Returns:
            bool of shape ``[B, B]`` on the module's device, in the order of :meth:`trained_batch`. Row ``i`` is for the
            anchor ``i``. Embeddings that are gathered from all processes have the same order. False on the diagonal.

        Raises:
            RuntimeError: If no batch is being trained, as in validation, or nothing says which pairs are likely false
                negatives.

        Example::

            def training_step(self, batch, batch_idx):
                a, b = (F.normalize(self(view), dim=1) for view in batch)
                logits = a @ b.T / 0.1
                logits = logits.masked_fill(self.trainer.datamodule.likely_false_negatives(), -torch.inf)
                return F.cross_entropy(logits, torch.arange(len(a), device=a.device))
        """
        sampler = self.train_sampler
        module: LightningModule | None = None if self.trainer is None else self.trainer.lightning_module
        device = None if module is None else module.device
        mask = self._in_training(
            "likely_false_negatives", None if sampler is None else sampler.likely_false_negatives(device)
        )
        if not self._rules and (self._planner is None or not self._planner.finds_false_negatives):
            if self._reference is not None:
                raise RuntimeError(
                    "likely_false_negatives() needs a rule for reference_embeddings() of one side: give "
                    "reference_rule=AboveSimilarity(threshold), such as 0.9, to your DataModule's super().__init__()."
                )
            raise RuntimeError(
                "likely_false_negatives() needs a rule: override train_groups() or reference_embeddings(), or give "
                "BatchSamplerCallback(mask_nearest=...), such as 5, or BatchSamplerCallback(own_rule=AbovePositive()). "
                "For uniform batches under the callback's mask, keep it, with composer=UniformComposer()."
            )
        self._mask_was_read = True
        return mask

    def _in_training(self, asked: str, value: _T | None) -> _T:
        """Refuse to answer a question about the batch being trained while there is none."""
        if value is None:
            stage = None if self.trainer is None else self.trainer.state.stage
            raise RuntimeError(
                f"{asked}() was called while no batch is being trained (trainer.state.stage is "
                f"{stage and stage.value!r}). Call it in training_step or in hooks from on_train_batch_start to "
                "on_train_batch_end; in a step that validation shares, only `if self.trainer.training`."
            )
        return value

    # Lightning's

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer that uses the data, once it was attached.

        While a Trainer fits, a hook may evaluate with a second Trainer on the same DataModule. It is the second one
        until that is done, and then the first one again.
        """
        guest = self._guest
        return guest if guest is not None and guest.state.status is TrainerStatus.RUNNING else self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        check_trainer(trainer)
        fitting = self._trainer
        if trainer not in (None, fitting) and fitting is not None and _is_fitting(fitting):
            if _is_fitting(trainer):
                raise RuntimeError(
                    f"A second Trainer cannot fit on this {type(self).__name__} while a first one does: it would take "
                    "over the plan of batches. Give the second fit a DataModule of its own."
                )
            self._guest = trainer
            return
        self._trainer, self._guest = trainer, None
        self._planner = None  # the callback of this Trainer registers in its `setup`
        self._seed_of_fit = None

    def train_dataloader(self) -> PoolLoader | StreamLoader:
        """The loader that serves the plan. Not to be overridden.

        Raises:
            TypeError: If the dataset is neither map-style nor a stream, a stream comes with labels, groups, reference
                embeddings or a pool dataset, ``batch_size`` is not an integer, ``separate_groups`` or
                ``reference_rule`` lacks the method that it needs, or ``training_step`` takes ``dataloader_iter``.
            ValueError: If ``batch_size`` is below 2, the dataset is smaller than a global batch, ``drop_last=False``
                would leave fewer than two instances for a process, groups or reference embeddings have another length,
                or a stream comes with ``separate_groups`` or ``reference_rule``.
        """
        self._check_methods()
        dataset = self.train_dataset()
        self._train_dataset = dataset
        ranks = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        settings: dict[str, Any] = {
            "drop_last": self.drop_last,
            "seed": self._resolve_seed(),
            "rank": ranks["rank"] if ranks else 0,
            "world_size": ranks["num_replicas"] if ranks else 1,
        }
        before = self.train_sampler
        if before is not None and before is not self._sampler_of_last_fit and before.has_planned:
            # Each epoch has a new loader. The position in the checkpoint that the fit was resumed from has been left.
            self._checkpoint = None
            settings["seed"] = before.seed
        if self.streams:
            self._check_stream()
            # One dictionary, as LightningCLI would offer all arguments of a stream's loader for a DataModule otherwise.
            settings |= self.dataloader_kwargs
            stream = TrainerStreamLoader(self, dataset, self.batch_size, **settings)  # type: ignore[arg-type]
            if self._planner is not None:
                self._planner.attach(self, stream.layout)
            return stream
        check_map_style(dataset, "train_dataset()")
        groups = self._read_rules(len(dataset))  # type: ignore[arg-type]
        sampler = TrainerBatchSampler(
            self,
            len(dataset),  # type: ignore[arg-type]
            self.batch_size,
            rules=self._rules,
            groups=groups if self.separate_groups else None,
            **settings,
        )
        if groups is not None and not self.separate_groups:  # groups that are kept apart cost no negatives
            _warn_of_large_groups(groups)
        if self._planner is not None:
            self._planner.attach(self, sampler.layout)
        return TrainerLoader(dataset, sampler, **self.dataloader_kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Seed, sizes and the pool being served: tensors and plain Python. Call it where you override it."""
        sampler = self.train_sampler
        restored = self.restored_stream_state() if self.streams else self.restored_state()
        if restored is not None and (sampler is None or not sampler.has_planned):
            return restored.to_dict()
        return {} if sampler is None else sampler.state().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the pool that was being served. Call it where you override it."""
        if holds_state(state_dict) and self.trainer is self._trainer:  # a guest evaluates only
            self._checkpoint = (None if self.trainer is None else self.trainer.ckpt_path, state_dict)
            self._sampler_of_last_fit = self.train_sampler

    # Asked by the callback

    def register_planner(self, planner: BatchPlanner) -> None:
        """Let a planner plan the batches of the current Trainer. ``BatchSamplerCallback.setup`` calls this.

        Args:
            planner: The callback.

        Raises:
            TypeError: If the Trainer has a planner already.
        """
        if self._planner not in (None, planner):
            raise TypeError(
                f"The Trainer has two callbacks that compose batches, {type(self._planner).__name__} and "
                f"{type(planner).__name__}. Give it one."
            )
        self._planner, self._mask_was_read = planner, False
        # A `setup` of the DataModule that reads `trainer.estimated_stepping_batches` has made the loader already.
        if self.train_sampler is not None:
            planner.attach(self, self.train_sampler.layout)

    def forget_planner(self) -> None:
        """Serve uniform batches from now on. ``BatchSamplerCallback.teardown`` calls this."""
        self._planner = None

    @property
    def streams(self) -> bool:
        """Whether the training data is a stream, once it was asked for."""
        return isinstance(self._train_dataset, IterableDataset)

    @property
    def false_negative_rules(self) -> tuple[Rule, ...]:
        """The rules that the data gives: from groups, and from reference embeddings."""
        return self._rules

    @property
    def checked_reference(self) -> Embeddings | None:
        """The reference embeddings, once the training data was asked for."""
        return self._reference

    def pool_loading(self) -> tuple[Dataset[Any], dict[str, Any]]:
        """Return what to embed pools from, and the arguments for loading it. For the callback.

        Returns:
            The pool dataset and its ``DataLoader`` arguments. For a stream, the buffer that has been read.
        """
        kwargs = dict(self.dataloader_kwargs)
        if self.pool_collate_fn is not None:
            kwargs["collate_fn"] = self.pool_collate_fn
        if not self.streams:
            return self.pool_dataset(), kwargs
        return _TrainedBuffer(self), {name: kwargs[name] for name in ("collate_fn", "pin_memory") if name in kwargs}

    def warn_of_unread_mask(self) -> None:
        """Warn if pairs are marked as likely false negatives, but nobody has asked for them in this fit."""
        # Groups that are kept apart have no pair in a batch.
        marks = any(not (self.separate_groups and isinstance(rule, SameGroup)) for rule in self._rules)
        marks |= self._planner is not None and self._planner.finds_false_negatives
        if marks and not self._mask_was_read:
            rank_zero_warn(
                "Likely false negatives may be marked, but training_step has not asked for them, so the loss takes "
                "them as negatives. Give the loss self.trainer.datamodule.likely_false_negatives()."
            )

    # Asked by what serves the batches

    @property
    def train_sampler(self) -> TrainerBatchSampler | TrainerStreamLoader | None:
        """What serves the batches the Trainer is training on: a batch sampler, the loader of a stream, or ``None``."""
        loader = None if self.trainer is None else self.trainer.train_dataloader
        if isinstance(loader, TrainerStreamLoader):
            return loader
        return loader.batch_sampler if isinstance(loader, TrainerLoader) else None  # type: ignore[return-value]

    def planning(self, layout: BatchLayout) -> Planning | None:
        """How the batches of the epoch that begins are composed; ``None`` for uniform batches."""
        return None if self._planner is None else self._planner.planning(layout)

    def instances_per_pool(self, layout: BatchLayout) -> int | None:
        """The pool size in instances, also where batches are uniform; ``None`` without a callback."""
        cut = None if self._planner is None else self._planner.cut(layout)
        return cut.size if isinstance(cut, Pools) else None

    def restored_state(self) -> SamplerState | None:
        """Our state in the checkpoint that the current fit was resumed from, if it was and has it."""
        state = self._restored(of_stream=False)
        return None if state is None else SamplerState.from_dict(state)

    def restored_stream_state(self) -> StreamState | None:
        """Our state of a stream in the checkpoint that the current fit was resumed from, if it was and has it."""
        state = self._restored(of_stream=True)
        return None if state is None else StreamState.from_dict(state)

    def _restored(self, of_stream: bool) -> dict[str, Any] | None:
        """The dictionary in the checkpoint that the current fit was resumed from, if it is of the kind of the data."""
        if self._checkpoint is None or self.trainer is None or self.trainer.ckpt_path is None:
            return None
        path, state = self._checkpoint
        return state if path == self.trainer.ckpt_path and ("stream" in state) == of_stream else None

    # Parts of train_dataloader

    def _check_methods(self) -> None:
        """Refuse what a subclass has put in the place of a method, and a module that fetches batches itself."""
        if not hasattr(self, "dataloader_kwargs"):
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__(batch_size=...).")
        returned = ("train_dataset", "pool_dataset", "train_labels", "train_groups", "reference_embeddings")
        for name in (*returned, "pool_loading", "planning"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be a method that returns what it names, got {type(getattr(self, name)).__name__}. "
                    f"Keep yours under another name{', and return it there' if name in returned else ''}."
                )
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None and is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise TypeError(
                f"{type(module).__name__}.training_step must take (batch, batch_idx): one that takes dataloader_iter "
                "fetches batches itself, and which of them is being trained cannot be known."
            )

    def _check_stream(self) -> None:
        """Refuse what needs the index of each instance, which a stream does not have."""
        named = {name: getattr(self, name)() for name in ("train_labels", "train_groups", "reference_embeddings")}
        for name, value in named.items():
            if value is not None:
                raise TypeError(
                    f"{name}() gives one value for each index, but train_dataset() is a stream "
                    f"({type(self._train_dataset).__name__}), whose instances have no index. Return None there."
                )
        if self.separate_groups or self.reference_rule is not None:
            name = "separate_groups" if self.separate_groups else "reference_rule"
            raise ValueError(
                f"{name}={getattr(self, name)} needs a map-style dataset, but train_dataset() is a stream."
            )
        if type(self).pool_dataset is not BatchSamplerDataModule.pool_dataset:
            raise TypeError(
                "A stream is read once for training and encoding, so pool_dataset() must not be overridden. Let each "
                "instance hold its clean view, and give pool_collate_fn=... a function that picks it."
            )
        self._reference, self._rules = None, ()

    def _read_rules(self, n_instances: int) -> NDArray[np.int64] | None:
        """Check groups and reference embeddings, and make the rules from them. Return the groups."""
        rules: list[Rule] = []
        groups = self.train_groups()
        if groups is None:
            if self.separate_groups:
                raise TypeError(f"separate_groups=True needs {type(self).__name__} to override train_groups().")
            checked = None
        else:
            rule = SameGroup(groups.cpu() if isinstance(groups, Tensor) else groups)
            checked = rule.groups
            check_length("train_groups()", checked, n_instances)
            rules.append(rule)
        self._reference = self.reference_embeddings()
        if self._reference is not None:
            check_reference(self._reference, n_instances)
            if self.reference_rule is not None or self._reference.ndim == 3:
                rules.append(MoreSimilar(self._reference, self.reference_rule))
        elif self.reference_rule is not None:
            raise TypeError(
                f"reference_rule={self.reference_rule} needs {type(self).__name__} to override reference_embeddings()."
            )
        self._rules = tuple(rules)
        return checked

    def _resolve_seed(self) -> int:
        """The seed that was given, else the global seed of rank 0."""
        if self.seed is not None:
            return self.seed
        seed, trainer = torch.initial_seed(), self.trainer
        if trainer is None or not trainer.training:
            return seed
        if self._seed_of_fit is None:  # later calls may come from one process alone, in a hook
            self._seed_of_fit = int(trainer.strategy.broadcast(seed))
        return self._seed_of_fit


def check_trainer(trainer: object) -> None:
    """Refuse a Trainer of the package ``pytorch_lightning``, whose classes differ from those of ``lightning``.

    Args:
        trainer: The Trainer, or ``None`` where there is none yet.

    Raises:
        TypeError: If the Trainer is not of ``lightning``. The message says what to import.
    """
    if trainer is not None and not isinstance(trainer, Trainer):
        raise TypeError(
            f"This Trainer is of {type(trainer).__module__}, but bs_lightning uses the package lightning: "
            "write `import lightning.pytorch as pl` or `from lightning import Trainer, LightningModule`."
        )


def _is_fitting(trainer: Trainer) -> bool:
    return trainer.state.fn is TrainerFn.FITTING and trainer.state.status is TrainerStatus.RUNNING


def _are_integers(values: Any) -> bool:
    """Return whether these are integers ``[n]``, and not boxes, scores or names, for example."""
    try:
        array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError, RuntimeError):  # rows of different lengths, bfloat16, a gradient, a sparse layout
        return False
    return array.ndim == 1 and array.dtype.kind in "iub"


def _warn_of_large_groups(groups: NDArray[np.int64]) -> None:
    """Warn if groups mark more than a tenth of all negatives."""
    members = np.sort(groups.reshape(len(groups), -1), axis=1)
    is_first = np.diff(members, axis=1, prepend=members[:, :1] - 1) != 0  # an instance may name a group twice
    sizes = np.unique(members[is_first], return_counts=True)[1].astype(float)
    marked = min(float((sizes * (sizes - 1)).sum()) / (len(groups) * (len(groups) - 1)), 1)
    if marked > 0.1:
        rank_zero_warn(
            f"{int(sizes.max())} of the {len(groups)} instances share a group, such as a text or image, and so are not "
            f"each other's negatives. likely_false_negatives() marks up to {marked:.0%} of all negatives. Remove what "
            "many instances share, or return other groups from train_groups()."
        )


class _TrainedBuffer(Dataset[Any]):
    """The buffer of the stream that is being trained from."""

    def __init__(self, data: BatchSamplerDataModule) -> None:
        self._data = data

    def __getitem__(self, position: int) -> Any:
        loader = self._data.train_sampler
        assert isinstance(loader, TrainerStreamLoader)
        return loader.buffer[position]
