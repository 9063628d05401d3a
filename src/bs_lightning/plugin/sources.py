"""Sources: a pool's embeddings, encoded by the model, kept, recycled from training, or read from a reference."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import Dataset

from bs_lightning._checks import check_length
from bs_lightning._embeddings import read_rows, similar_to_nothing, unit_rows_
from bs_lightning._types import Embeddings, Indices
from bs_lightning.bank import EmbeddingBank, check_rows
from bs_lightning.encoding import Embed, checked_unit_rows_, embed_in_batches, warn_of_collapse, warn_of_zeros
from bs_lightning.isolation import no_trace
from bs_lightning.layout import BatchLayout
from bs_lightning.loader import BatchFetcher, check_map_style
from bs_lightning.plugin.datamodule import BatchSamplerDataModule
from bs_lightning.plugin.processes import PerInstance, check_equal, failing_together, gather_rows, own_share
from bs_lightning.plugin.progress import progress

_MOST_ON_CPU = 128  # instances embedded at a time, by `benchmarks/overhead encoding`

# Returns a tensor or a pair. `Any`, because jsonargparse refuses functions that are annotated with such a union.
ModuleEmbed = Callable[[LightningModule, Any], Any]


class EmbeddingSource:
    """Gives a pool's embeddings to the process or processes that compose it. Most methods do nothing by default.

    Args:
        trainer: The Trainer, in its ``setup``.
        per_rank: Whether each process composes its own share of a pool. If not, rank 0 composes all.

    Attributes:
        in_all_processes: Whether :meth:`read` returns the whole pool's embeddings in every process, if one process
            composes.
        foreseen: Whether :meth:`read` returns the same for a pool while other pools of the epoch are trained.
        version: A number that changes when the dataset's embeddings change; ``None`` if they change all the time. A
            loaded state may bring other embeddings under the same number.
    """

    in_all_processes: ClassVar[bool]
    foreseen: ClassVar[bool]
    version: int | None = None

    def __init__(self, trainer: Trainer, per_rank: bool) -> None:
        self._trainer = trainer
        self._per_rank = per_rank
        self._shapes_are_equal = False

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        """Check the data before training starts, and keep the parts that embedding needs.

        Args:
            data: The DataModule.
            layout: The epoch's sizes.
        """
        raise NotImplementedError

    def read(self, indices: Indices) -> Tensor:
        """Return a pool's embeddings. Every process calls it with the whole pool.

        Args:
            indices: Dataset indices, int64 ``[P]``.

        Returns:
            Floats of shape ``[P, d]`` or ``[P, 2, d]``, in the processes that compose. If each process composes its own
            share of the pool, only the rows of that share.
        """
        raise NotImplementedError

    def sample(self, indices: Indices) -> Tensor:
        """Return the embeddings of a few instances, as :meth:`read` does, without embedding any other instance.

        Args:
            indices: Dataset indices, int64 ``[P]``.
        """
        return self.read(indices)

    def expect(self, indices: Indices) -> None:
        """Let worker processes begin to read the next pool. Every process calls it with the whole pool.

        Args:
            indices: Dataset indices, int64 ``[P]``.
        """

    def keep(self, outputs: Any) -> None:
        """Receive the output of a training step.

        Args:
            outputs: What ``training_step`` returned.
        """

    def end_epoch(self) -> None:
        """Free resources that need not outlive an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold.

        Returns:
            Tensors and plain Python values.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """

    def close(self) -> None:
        """End worker processes."""

    def _composed_here(self, pool: PerInstance) -> PerInstance:
        """Return the entries of a pool that this process composes batches from, if it composes any."""
        return own_share(self._trainer, pool) if self._per_rank else pool

    def _compare_shapes(self, embeddings: Tensor) -> None:
        """Refuse embeddings of other shapes in other processes. The first call alone waits for all processes."""
        if not self._shapes_are_equal:
            check_equal(self._trainer, shape_of_an_embedding=list(embeddings.shape[1:]))
            self._shapes_are_equal = True


class EncodedEmbeddings(EmbeddingSource):
    """Embeds each pool with the current weights: one forward pass, divided among the processes.

    Args:
        trainer: The Trainer, in its ``setup``.
        embed: ``embed(pl_module, batch)`` -> floats of shape ``[b, d]``, or two sides: a pair of such tensors, or
            ``[b, 2, d]``. ``None`` takes ``pl_module.embed(batch)``, else ``pl_module(batch)``.
        batch_size: Instances embedded at a time; ``None`` chooses by the device and the DataModule's ``batch_size``.
        per_rank: Whether each process composes its own share, so that embeddings are not gathered.

    Raises:
        TypeError: If ``embed`` is ``None`` and the module has neither ``embed`` nor ``forward``.
    """

    in_all_processes: ClassVar[bool] = True
    foreseen: ClassVar[bool] = False

    def __init__(self, trainer: Trainer, embed: ModuleEmbed | None, batch_size: int | None, per_rank: bool) -> None:
        super().__init__(trainer, per_rank)
        module = trainer.lightning_module
        self._is_own_function = embed is not None
        if embed is not None:
            self._embed: Embed = partial(embed, module)
        # Ask the class: a layer of the module may be named `embed`, too.
        elif callable(getattr(type(module), "embed", None)):
            self._embed = module.embed  # type: ignore[assignment]
        elif is_overridden("forward", module):
            self._embed = module
            rank_zero_info(
                f"BatchSamplerCallback: {type(module).__name__} has no embed(batch), so its forward(batch) tells which "
                "instances are alike. If your loss compares something else, such as a projection, define embed."
            )
        else:
            raise TypeError(
                f"{type(module).__name__} has neither embed(batch) nor forward(batch). Define one that returns "
                "embeddings [b, d], or give BatchSamplerCallback(embed=...)."
            )
        self._batch_size = batch_size
        self._dataset: Dataset[Any] | None = None
        self._settings: dict[str, Any] = {}
        self._fetch: BatchFetcher | None = None
        self._ahead: tuple[Indices, Iterator[Any]] | None = None

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        dataset, self._settings = data.pool_loading()
        if not data.streams:
            check_map_style(dataset, "pool_dataset()")
            check_length("pool_dataset()", dataset, layout.n_instances)
        self.close()
        self._dataset = dataset

    def read(self, indices: Indices) -> Tensor:
        with failing_together(self._trainer):
            embeddings = self._encode(own_share(self._trainer, indices))
        self._compare_shapes(embeddings)
        if self._per_rank or self._trainer.world_size == 1:
            return embeddings
        return gather_rows(self._trainer, embeddings)

    def expect(self, indices: Indices) -> None:
        # Workers read up to `prefetch_factor` batches each, and wait.
        if self._trainer.datamodule.dataloader_kwargs.get("num_workers", 0):
            share = own_share(self._trainer, indices)
            self._ahead = share, self._loading(share)

    def end_epoch(self) -> None:
        if not self._trainer.datamodule.dataloader_kwargs.get("persistent_workers"):
            self.close()

    def close(self) -> None:
        self._ahead = None
        if self._fetch is not None:
            self._fetch.close()
            self._fetch = None

    @property
    def _size(self) -> int:
        """Instances embedded at a time."""
        if self._batch_size is not None:
            return self._batch_size
        device, n_workers = self._trainer.lightning_module.device, self._settings.get("num_workers", 0)
        return default_batch_size(self._trainer.datamodule.batch_size, device, n_workers)

    def _loading(self, indices: Indices) -> Iterator[Any]:
        """Return an iterator over a pool's batches. Worker processes, if there are any, begin at once."""
        if self._fetch is None:
            assert self._dataset is not None
            kwargs = {"pin_memory": self._trainer.lightning_module.device.type == "cuda"} | self._settings
            # A generator of its own spares the global random state.
            kwargs["generator"] = torch.Generator().manual_seed(self._trainer.global_rank)
            self._fetch = BatchFetcher(self._dataset, **kwargs)
        size = self._size
        return self._fetch(indices[start : start + size].tolist() for start in range(0, len(indices), size))

    def _encode(self, indices: Indices) -> Tensor:
        trainer = self._trainer
        module, data = trainer.lightning_module, trainer.datamodule
        ahead, self._ahead = self._ahead, None
        loading = ahead[1] if ahead and np.array_equal(ahead[0], indices) else self._loading(indices)
        before_transfer = _batch_hook(trainer, "on_before_batch_transfer")
        transfer = _batch_hook(trainer, "transfer_batch_to_device")

        def embed(batch: Any) -> Tensor | tuple[Tensor, Tensor]:
            batch = before_transfer(trainer.precision_plugin.convert_input(batch), 0)
            batch = transfer(batch, module.device, 0)
            try:
                with trainer.precision_plugin.forward_context():
                    return self._embed(batch)
            except Exception as error:
                how = "give pool_collate_fn a function for" if data.streams else "override pool_dataset() to return"
                is_training_data = type(data).pool_dataset is BatchSamplerDataModule.pool_dataset
                error.add_note(_advice(batch, is_training_data, how, self._is_own_function))
                raise

        with no_trace(module), progress(trainer, "Encoding", -(-len(indices) // self._size)) as advance:
            # A model may log in `forward`, but Lightning allows no logging here. `no_trace` removes both overrides.
            module.__dict__["log"] = module.__dict__["log_dict"] = _ignore
            if trainer.world_size > 1:
                # Batch norm's statistics differ between ranks until DDP's next forward pass, but one model must embed
                # the whole pool. It is rank 0's, because only rank 0's statistics are in a checkpoint.
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)
            embeddings = embed_in_batches(
                indices, lambda _: _noting(loading), embed, batch_size=self._size, advance=advance
            )
        return checked_unit_rows_(embeddings, indices)  # waits for the GPU, which `no_trace` need not do


class BankedEmbeddings(EmbeddingSource):
    """Keeps an embedding of each instance, and saves them in checkpoints."""

    def __init__(self, trainer: Trainer, per_rank: bool) -> None:
        super().__init__(trainer, per_rank)
        self._bank: EmbeddingBank | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def _has_bank(self) -> bool:
        """Whether this process keeps embeddings."""
        return self.in_all_processes or self._per_rank or self._trainer.is_global_zero

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        if self._has_bank and (self._bank is None or self._bank.n_instances != layout.n_instances):
            self._bank = EmbeddingBank(layout.n_instances)
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        if self._restored:  # loaded, but the data are not attached yet
            return self._restored
        return {} if self._bank is None else self._bank.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._has_bank:
            self._restored = state_dict
            self._restore()

    def _restore(self) -> None:
        """Fill the bank from a checkpoint, as soon as both exist."""
        if self._bank is None or not self._restored:
            return
        if self._restored["n_instances"] == self._bank.n_instances:
            # On the device of training, where the run that was left had scaled them.
            rows = self._restored["rows"]
            rows = None if rows is None else rows.to(self._trainer.strategy.root_device)
            self._bank.load_state_dict(self._restored | {"rows": rows})
        else:
            self.version = None  # the rows of a dataset of another length may belong to other instances
        self._restored = None


class KeptEmbeddings(BankedEmbeddings):
    """Embeds the whole dataset when the first pool of an epoch is read, and keeps the embeddings for some epochs.

    Args:
        trainer: The Trainer, in its ``setup``.
        encoder: Embeds the dataset. It must return all rows in every process.
        n_epochs: Epochs for which embeddings are kept.
        per_rank: Whether each process composes its own share.
    """

    in_all_processes: ClassVar[bool] = True
    foreseen: ClassVar[bool] = True

    def __init__(self, trainer: Trainer, encoder: EncodedEmbeddings, n_epochs: int, per_rank: bool) -> None:
        super().__init__(trainer, per_rank)
        self._encoder = encoder
        self._n_epochs = n_epochs
        self._last_read: int | None = None  # the epoch; `None` in a new fit, and after a state is loaded
        self._data_changed = False

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        before = self._bank
        self._encoder.attach(data, layout)
        super().attach(data, layout)
        is_reload = self._trainer.reload_dataloaders_every_n_epochs and self._last_read is not None
        self._data_changed |= before is not None and (before is not self._bank or bool(is_reload))

    def read(self, indices: Indices) -> Tensor:
        assert self._bank is not None
        trainer, epoch, everything = self._trainer, self._trainer.current_epoch, None
        if epoch != self._last_read:
            is_kept = self.version is not None and epoch < self.version + self._n_epochs and not self._data_changed
            # All processes embed if one of them must: it may have attached the data again.
            if not trainer.strategy.reduce_boolean_decision(is_kept):
                everything = self._encode(self._bank.n_instances)
                self.version, self._data_changed = epoch, False
            self._last_read = epoch
        with failing_together(trainer):
            if everything is not None:
                self._bank.fill(everything)
            return self._bank.read(torch.from_numpy(self._composed_here(indices)))

    def sample(self, indices: Indices) -> Tensor:
        return self._composed_here(self._encoder.read(indices))

    def end_epoch(self) -> None:
        self._encoder.end_epoch()

    def close(self) -> None:
        self._encoder.close()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"version": self.version}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.version, self._last_read = state_dict.get("version"), None
        if self.version is not None:  # else nothing was embedded yet, or not by this source
            super().load_state_dict(state_dict)

    def _encode(self, n_instances: int) -> Tensor:
        """Embed the whole dataset. Processes embed equal parts, so the first instances may come twice."""
        n_each = -(-n_instances // self._trainer.world_size)
        return self._encoder.read(np.resize(np.arange(n_instances), n_each * self._trainer.world_size))[:n_instances]


class RecycledEmbeddings(BankedEmbeddings):
    """Keeps each instance's last embedding, as ``training_step`` returned it, and encodes nothing.

    Args:
        trainer: The Trainer, in its ``setup``.
        per_rank: Whether each process composes its own share. If not, only rank 0 keeps embeddings.
        needs_two_sides: Whether embeddings of one side are refused.
    """

    in_all_processes: ClassVar[bool] = False
    foreseen: ClassVar[bool] = True

    def __init__(self, trainer: Trainer, per_rank: bool, needs_two_sides: bool) -> None:
        super().__init__(trainer, per_rank)
        self._needs_two_sides = needs_two_sides

    def read(self, indices: Indices) -> Tensor:
        with failing_together(self._trainer):
            if self._bank is None:
                return torch.empty(0)  # a different process composes
            rows = self._bank.read(torch.from_numpy(self._composed_here(indices)))
            embeddings = rows.to(self._trainer.strategy.root_device)  # the zeros of an empty bank are on the CPU
            warn_of_collapse(embeddings[~similar_to_nothing(embeddings)])  # training has not computed the others yet
            return embeddings

    def keep(self, outputs: Any) -> None:
        if not outputs:
            return  # `training_step` skipped the batch
        if not isinstance(outputs, dict) or "embeddings" not in outputs:
            raise TypeError(
                "recycle=True needs training_step to return {'loss': ..., 'embeddings': tensor of shape [b, d]}, got "
                f"{sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__}."
            )
        trainer = self._trainer
        batch = trainer.datamodule.trained_batch()
        layout = trainer.datamodule.train_sampler.layout
        embeddings = check_rows(outputs["embeddings"], layout.slice(batch, trainer.global_rank))
        if self._needs_two_sides and embeddings.ndim != 3:
            raise ValueError(
                f"own_rule needs embeddings with two sides, but training_step returned {list(embeddings.shape)}: one "
                "side has no positive to compare with. Return a pair of sides, or use mask_nearest=5 instead."
            )
        if len(batch) % trainer.world_size:
            return  # the epoch's last batch is smaller, and its parts differ in size between processes
        if trainer.world_size > 1:
            self._compare_shapes(embeddings)
            embeddings = gather_rows(trainer, embeddings.detach())
        if self._bank is not None:
            self._bank.write(torch.from_numpy(batch), embeddings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "version" not in state_dict:  # else its rows are those of `KeptEmbeddings`
            super().load_state_dict(state_dict)


class ReferenceEmbeddings(EmbeddingSource):
    """Reads the DataModule's ``reference_embeddings()``, which stay the same, and encodes nothing.

    Unless each process composes its own share, only rank 0 reads them.
    """

    in_all_processes: ClassVar[bool] = False
    foreseen: ClassVar[bool] = True
    version = 0
    _embeddings: Embeddings

    def attach(self, data: BatchSamplerDataModule, layout: BatchLayout) -> None:
        if data.checked_reference is None:
            raise TypeError(
                f"from_reference=True needs {type(data).__name__} to override reference_embeddings(). "
                "bs_lightning.encode_dataset makes them."
            )
        self._embeddings = data.checked_reference

    def read(self, indices: Indices) -> Tensor:
        with failing_together(self._trainer):
            if not self._per_rank and not self._trainer.is_global_zero:
                return torch.empty(0)  # a different process composes
            rows = unit_rows_(read_rows(self._embeddings, self._composed_here(indices)))
            embeddings = rows.to(self._trainer.strategy.root_device)
            warn_of_zeros(embeddings)
            warn_of_collapse(embeddings)
            return embeddings


def default_batch_size(training: int, device: torch.device, n_workers: int) -> int:
    """Return how many instances are embedded at a time, where nothing else was asked for.

    Args:
        training: Instances in a training batch.
        device: The module's device.
        n_workers: Number of workers that read what is embedded.

    Returns:
        Instances, at least 1.
    """
    if device.type == "cpu":
        return min(4 * training, _MOST_ON_CPU)
    # Each worker reads one batch at a time, so small batches keep more workers busy.
    return training if n_workers else 4 * training


def _noting(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches, and say in an error that they are those of ``pool_dataset()``."""
    try:
        yield from batches
    except Exception as error:
        error.add_note(
            "BatchSamplerCallback was loading a batch of pool_dataset(). If its items cannot be collated as training "
            "items are, give the DataModule pool_collate_fn."
        )
        raise


def _advice(batch: Any, is_training_data: bool, how: str, is_own_function: bool) -> str:
    """Return what to do after embedding a batch has failed, the likeliest fix first."""
    what = f"BatchSamplerCallback was embedding a batch of pool_dataset(), a {type(batch).__name__}."
    if is_training_data and isinstance(batch, (list, tuple)):
        first = (
            "let the function that you gave as embed take batch[0]"
            if is_own_function
            else "define `def embed(self, batch): return self(batch[0])` in your module"
        )
        return (
            f"{what} Your DataModule does not override pool_dataset(), so this is a training batch of {len(batch)} "
            f"parts. If the first part is the input, {first}. Otherwise {how} one clean view of each instance."
        )
    if is_own_function:
        return f"{what} Give BatchSamplerCallback(embed=...) a function that takes such a batch."
    return f"{what} Give the module a method embed(batch) that takes a batch of pool_dataset()."


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _batch_hook(trainer: Trainer, name: str) -> Callable[..., Any]:
    """Return the DataModule's hook if the DataModule overrides it, else the module's. Lightning chooses so, too."""
    owner = trainer.datamodule if is_overridden(name, trainer.datamodule) else trainer.lightning_module
    return getattr(owner, name)  # type: ignore[no-any-return]
