"""Hugging Face: composed batches in ``transformers.Trainer`` and its subclasses."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from bs_lightning._checks import check_integer
from bs_lightning._description import Means, describe_composed
from bs_lightning._types import Batches, Indices
from bs_lightning.compose import ComposeFunction, Composer, RWRComposer, as_composer, call_composer
from bs_lightning.encoding import encode
from bs_lightning.isolation import no_trace
from bs_lightning.loader import SETTINGS, BatchFetcher, PoolLoader, check_map_style
from bs_lightning.plan import PlannedPool, Planning
from bs_lightning.pools import Pools
from bs_lightning.sampler import PoolBatchSampler


class ComposedBatchesTrainer(Trainer):
    """A Hugging Face Trainer that composes its training batches. Subclass it as you would subclass ``Trainer``.

    Each pool is embedded with the weights of the moment, when its first batch is about to be trained, for any number of
    workers. Evaluation is unchanged. Checkpoints hold the position in the epoch, and resuming goes on there.

    Where the Trainer logs the loss, it also logs what the batches composed since then are like, as
    :class:`~bs_lightning.BatchSamplerCallback` does: ``batch_sampler/hardness`` beside ``uniform_hardness``; with two
    sides also ``accuracy`` beside ``uniform_accuracy``, and ``negatives_above_positive``.

    Override :meth:`embed`, beside ``compute_loss``. To compose batches in a different subclass of ``Trainer``, name it
    as the second base: ``class Mine(ComposedBatchesTrainer, ThatTrainer)``.

    Args:
        *args: Arguments of the Trainer.
        pool_size: Instances planned together; ``None`` is ten global batches.
        composer: Composes batches from a pool's embeddings; ``None`` is ``RWRComposer()``.
        gather: Whether the loss gathers negatives of all processes. If so, global batches are composed. If not, each
            process trains on composed batches of its own.
        encode_batch_size: Instances embedded at a time. ``None`` takes ``per_device_eval_batch_size``, or the training
            batch if that is larger; on a GPU, four training batches.
        **kwargs: Arguments of the Trainer.

    Raises:
        TypeError: If ``composer`` is not callable, or ``pool_size`` or ``encode_batch_size`` is not an integer.
        ValueError: If ``encode_batch_size`` is below 1.

    Example::

        from bs_lightning.adapters.hugging_face import ComposedBatchesTrainer
        from bs_lightning.losses import info_nce


        class SimCSETrainer(ComposedBatchesTrainer):
            def embed(self, inputs):
                return self.model(**inputs).last_hidden_state[:, 0]

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                first, second = (model(**inputs).last_hidden_state[:, 0] for _ in range(2))  # two dropouts
                return info_nce(first, second, temperature=0.05)


        SimCSETrainer(model=model, args=args, train_dataset=tokens, pool_size=6400).train()
    """

    def __init__(
        self,
        *args: Any,
        pool_size: int | None = None,
        composer: Composer | ComposeFunction | None = None,
        gather: bool = False,
        encode_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if encode_batch_size is not None:
            check_integer("encode_batch_size", encode_batch_size, 1)
        self.pool_size = None if pool_size is None else Pools(pool_size).size
        self.composer = RWRComposer() if composer is None else as_composer(composer)
        self.gather = gather
        self.encode_batch_size = encode_batch_size
        self._load: BatchFetcher | None = None
        self._described = Means()  # over the pools since the last log, in the main process
        super().__init__(*args, **kwargs)
        self.add_callback(PositionCallback())

    def embed(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """Embed a batch as the loss compares it.

        Args:
            inputs: A batch of the training data, on the device.

        Returns:
            Floats of shape ``[b, d]``. For two sides: a pair of such tensors.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override embed(self, inputs): return what the loss compares, of shape [b, d], "
            "or two such tensors."
        )

    def get_train_dataloader(self) -> PoolLoader:  # type: ignore[override]
        """Return a loader of composed batches. It has the workers and the collator of the Trainer's own loader.

        Returns:
            The loader.

        Raises:
            TypeError: If ``train_dataset`` is iterable-style.
            ValueError: If ``pool_size`` is smaller than a global batch, ``split_batches`` is set, or the arguments ask
                for an order that composed batches replace.
        """
        if self.accelerator.split_batches:
            raise ValueError(
                "split_batches=True is not supported: per_device_train_batch_size is each process's share."
            )
        for name, usual in (("train_sampling_strategy", "random"), ("group_by_length", False)):  # transformers 5, and 4
            asked = getattr(self.args, name, usual)
            if asked != usual:
                raise ValueError(
                    f"{name}={asked!r} cannot be combined with composed batches, which replace it. Leave it at "
                    f"{usual!r}."
                )
        own = super().get_train_dataloader()
        dataset: Any = own.dataset
        check_map_style(dataset, "train_dataset")
        settings = {name: getattr(own, name) for name in SETTINGS}
        n_processes = self.accelerator.num_processes
        pool_size = 10 * self._train_batch_size * n_processes if self.pool_size is None else self.pool_size
        try:
            sampler = ResumableSampler(
                len(dataset),
                self._train_batch_size,
                planning=Planning(self._plan_pool, Pools(pool_size), self.composer.replacement),
                drop_last=self.args.dataloader_drop_last,
                seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
                rank=self.accelerator.process_index,
                world_size=n_processes,
            )
        except ValueError as error:
            error.add_note("Here batch_size is per_device_train_batch_size, and drop_last is dataloader_drop_last.")
            raise
        self._load = BatchFetcher(dataset, **settings)
        return PoolLoader(dataset, sampler, **settings)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and end all workers, also if training fails.

        Args:
            *args: As in the Trainer.
            **kwargs: As in the Trainer.

        Returns:
            What the Trainer returns.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._load is not None:
                self._load.close()
            loader = self.callback_handler.train_dataloader
            if loader is not None:
                loader.persistent_workers = False  # an error may still hold the iterator, whose workers end with it
                loader.close()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values, and beside the loss what composed batches are like.

        Args:
            logs: The values.
            *args: As in the Trainer.
            **kwargs: As in the Trainer.
        """
        if "loss" in logs:
            logs = logs | self._described.read()
            self._described = Means()
        super().log(logs, *args, **kwargs)

    def compose(self, embeddings: Tensor, indices: Indices, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose a pool's batches, in the main process.

        Args:
            embeddings: Floats of shape ``[P, d]``, or ``[P, 2, d]`` for two sides.
            indices: Dataset indices of the pool, int64 ``[P]``.
            batch_size: Instances that are each other's negatives.
            seed: The pool's seed.
            epoch: The epoch's number.

        Returns:
            Positions in the pool, int64 ``[P // batch_size, batch_size]``.
        """
        return call_composer(self.composer, embeddings, batch_size, seed=seed, epoch=epoch, indices=indices)

    def _plan_pool(self, indices: Indices, *, seed: int, epoch: int) -> PlannedPool:
        """Embed a pool, each process its share, and let the main process compose it for all."""
        n_processes = self.accelerator.num_processes
        share = np.array_split(indices, n_processes)[self.accelerator.process_index]
        with _failing_together():
            embeddings = self._encode(share)
        if n_processes > 1:
            shares = gather_object([embeddings.cpu()])
            embeddings = torch.cat(shares).to(embeddings.device)
        size = self._train_batch_size * (n_processes if self.gather else 1)
        composed: Any = None
        with _failing_together():
            if self.accelerator.is_main_process:
                composed = self.compose(embeddings, indices, size, seed=seed, epoch=epoch)
                self._described.note(describe_composed(embeddings, composed))
        batches: Batches = broadcast_object_list([composed])[0]
        # Without `gather`, a global batch is one composed batch for each process, side by side.
        return PlannedPool(batches.reshape(-1, self._train_batch_size * n_processes))

    def _encode(self, indices: Indices) -> Tensor:
        assert self._load is not None
        assert self.model is not None

        def embed(inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
            with self.compute_loss_context_manager():
                return self.embed(self._prepare_inputs(inputs))

        size = self._default_encode_batch_size() if self.encode_batch_size is None else self.encode_batch_size
        with no_trace(self.model):
            return encode(indices, self._load, embed, batch_size=size)

    def _default_encode_batch_size(self) -> int:
        """Return how many instances are embedded at a time. ``eval_batch_size`` is 8, which keeps no GPU busy."""
        training = self._train_batch_size * (4 if self.args.device.type == "cuda" else 1)
        return max(self.args.eval_batch_size, training)


class ResumableSampler(PoolBatchSampler):
    """Serves what a resuming Trainer draws and drops as empty batches, so that nothing is planned for it.

    To resume within an epoch, the Trainer iterates over a batch sampler, drops as many batches as were trained, and
    trains on the rest. A loaded state has planned the rest only.
    """

    def __iter__(self) -> Iterator[list[int]]:
        if not self.has_planned:
            yield from ([] for _ in range(self.served))
        yield from super().__iter__()


class PositionCallback(TrainerCallback, ExportableState):
    """Keeps the position in the epoch in the Trainer's checkpoints.

    The Trainer stores what :meth:`state` returns in ``trainer_state.json``.
    """

    position: str | None = None
    loader: PoolLoader | None = None
    workers: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint was saved."""
        # A checkpoint of a trainer without the adapter has no entry, and the Trainer saves into entries that exist.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.loader = kwargs["train_dataloader"]
        assert self.loader is not None
        # With `ignore_data_skip` the Trainer counts on a whole epoch, which it begins anew.
        if state.global_step == 0 or saved["attributes"]["position"] is None or args.ignore_data_skip:
            return
        content = base64.b64decode(saved["attributes"]["position"])
        sampler = self.loader.batch_sampler
        sampler.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
        self._check_skipped(args, state.global_step)
        if 0 < sampler.served < len(sampler):
            # The Trainer loads the rest of the epoch with torch's DataLoader. With workers, that would ask for batches,
            # and so plan pools, ahead of training.
            without = {
                "num_workers": 0,
                "prefetch_factor": None,
                "persistent_workers": False,
                "multiprocessing_context": None,
            }
            self.workers = {name: getattr(self.loader, name) for name in without}
            vars(self.loader).update(without)

    def _check_skipped(self, args: Any, n_steps: int) -> None:
        """Refuse to resume where the Trainer would skip more or fewer batches than were trained."""
        assert self.loader is not None
        n_batches, n_together = len(self.loader), args.gradient_accumulation_steps
        position = self.loader.batch_sampler.state()
        trained = position.served if position.mid_epoch else 0
        skipped = n_steps % max(-(-n_batches // n_together), 1) * n_together
        if skipped != trained:
            raise ValueError(
                f"The checkpoint was saved after {trained} batches of its epoch, but the Trainer would skip {skipped}. "
                "Resume with the gradient_accumulation_steps and dataloader_drop_last of the checkpoint, not with "
                f"{n_together} and {args.dataloader_drop_last}, and with the same data."
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the next epochs have their workers again."""
        if self.workers is not None:
            vars(self.loader).update(self.workers)
            self.workers = None

    def state(self) -> dict[str, Any]:
        """Return the position.

        Returns:
            Values that JSON can hold.
        """
        position = None
        if self.loader is not None:
            content = io.BytesIO()
            torch.save(self.loader.batch_sampler.state_dict(), content)
            position = base64.b64encode(content.getvalue()).decode()
        return {"args": {}, "attributes": {"position": position}}


@contextmanager
def _failing_together() -> Iterator[None]:
    """Stop all processes if one of them fails, so that no process waits for it forever."""
    error: Exception | None = None
    try:
        yield
    except Exception as exception:
        error = exception
    texts = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"The process of rank {rank} failed to plan a pool. {text}")
