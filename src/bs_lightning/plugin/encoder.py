"""Encoder: a pool's embeddings by the module of a Trainer, with its current weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from bs_lightning._types import Indices
from bs_lightning.encoding import Embed, checked_unit_rows_, embed_in_batches, has_embed
from bs_lightning.isolation import no_trace
from bs_lightning.layout import BatchLayout
from bs_lightning.loader import BatchFetcher, check_map_style
from bs_lightning.plugin.advice import advice
from bs_lightning.plugin.datamodule import BatchSamplerDataModule
from bs_lightning.plugin.processes import failing_together, gather_rows, own_share
from bs_lightning.plugin.progress import progress
from bs_lightning.plugin.sources import EmbeddingSource

_MOST_ON_CPU = 64  # instances embedded at a time, by `benchmarks/overhead encoding`

# Returns a tensor or a pair. `Any`, because jsonargparse refuses functions that are annotated with such a union.
ModuleEmbed = Callable[[LightningModule, Any], Any]


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
        elif has_embed(module):
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
        before_transfer = _batch_hook(trainer, "on_before_batch_transfer")
        transfer = _batch_hook(trainer, "transfer_batch_to_device")

        def embed(batch: Any) -> Tensor | tuple[Tensor, Tensor]:
            try:
                batch = before_transfer(trainer.precision_plugin.convert_input(batch), 0)
                batch = transfer(batch, module.device, 0)
            except Exception as error:
                error.add_note(
                    "BatchSamplerCallback was moving a batch to embed. Your on_before_batch_transfer and "
                    "transfer_batch_to_device get such batches, too: one clean view of each instance."
                )
                raise
            try:
                with trainer.precision_plugin.forward_context():
                    return self._embed(batch)
            except Exception as error:
                error.add_note(advice(batch, data, module, self._is_own_function))
                raise

        with ExitStack() as stack:
            with failing_together(trainer):  # otherwise the others would wait below, in the broadcast
                ahead, self._ahead = self._ahead, None
                loading = ahead[1] if ahead and np.array_equal(ahead[0], indices) else self._loading(indices)
                stack.enter_context(no_trace(module))
                advance = stack.enter_context(progress(trainer, "Encoding", -(-len(indices) // self._size)))
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
        return min(4 * training, _MOST_ON_CPU)  # whatever the workers, so that the last digits are the same
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


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _batch_hook(trainer: Trainer, name: str) -> Callable[..., Any]:
    """Return the DataModule's hook if the DataModule overrides it, else the module's. Lightning chooses so, too."""
    owner = trainer.datamodule if is_overridden(name, trainer.datamodule) else trainer.lightning_module
    return getattr(owner, name)  # type: ignore[no-any-return]
