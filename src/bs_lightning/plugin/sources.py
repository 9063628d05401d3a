"""Sources: a pool's embeddings, kept, recycled from training, or read from a reference; and what a source is.

The source that encodes each pool is in ``encoder``.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from bs_lightning._embeddings import read_rows
from bs_lightning._types import Embeddings, Indices
from bs_lightning.bank import EmbeddingBank, check_rows
from bs_lightning.encoding import checked_unit_rows_, warn_of_collapse
from bs_lightning.layout import BatchLayout
from bs_lightning.plugin.datamodule import BatchSamplerDataModule
from bs_lightning.plugin.processes import PerInstance, check_equal, failing_together, gather_rows, own_share


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

    def __init__(self, trainer: Trainer, encoder: EmbeddingSource, n_epochs: int, per_rank: bool) -> None:
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
            warn_of_collapse(embeddings)
            return embeddings

    def keep(self, outputs: Any) -> None:
        trainer = self._trainer
        if not outputs and trainer.lightning_module.automatic_optimization:
            return  # `training_step` skipped the batch
        if not isinstance(outputs, dict) or "embeddings" not in outputs:
            got = (sorted(outputs) or "nothing") if isinstance(outputs, dict) else type(outputs).__name__
            raise TypeError(
                "recycle=True needs training_step to return {'loss': ..., 'embeddings': tensor of shape [b, d], or "
                f"a pair of them}}, got {got}. With manual optimization it may leave out the loss."
            )
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
            own = self._composed_here(indices)
            rows = read_rows(self._embeddings, own).to(self._trainer.strategy.root_device)
            return checked_unit_rows_(rows, own)
