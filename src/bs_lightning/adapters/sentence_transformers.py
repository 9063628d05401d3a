"""sentence-transformers: composed batches in the ``SentenceTransformerTrainer``."""

import warnings
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor

from bs_lightning._types import Batches, Indices
from bs_lightning.adapters.hugging_face import ComposedBatchesTrainer
from bs_lightning.loader import PoolLoader

_SUPPORTED = ("batch_sampler", "no_duplicates", "no_duplicates_hashed")


class ComposedSentenceTransformerTrainer(ComposedBatchesTrainer, SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` that composes its training batches, for losses with in-batch negatives.

    The first two columns of the dataset, such as anchor and positive, are embedded as the loss embeds them, with the
    prompts and the ``router_mapping`` of the arguments. Batches are composed by the similarity of one column with the
    other.

    No composed batch holds a text twice, in any column, as with ``BatchSamplers.NO_DUPLICATES``. A warning says where
    this was not reached: where a text is in nearly as many instances of a pool as the pool has batches, or more. With
    ``dataloader_drop_last=False``, the smaller last batch of an epoch is uniform, and is not rearranged.

    Args:
        *args: Arguments of ``SentenceTransformerTrainer``.
        pool_size: Instances planned together; ``None`` is ten global batches.
        composer: Composes batches from a pool's embeddings; ``None`` is ``RWRComposer()``.
        gather: Set it if the loss has ``gather_across_devices=True``: global batches are composed then.
        encode_batch_size: Pairs embedded at a time. ``None`` takes the ``mini_batch_size`` of a cached loss, and of
            other losses what :class:`~bs_lightning.adapters.hugging_face.ComposedBatchesTrainer` takes.
        **kwargs: Arguments of ``SentenceTransformerTrainer``.

    Raises:
        TypeError: If ``composer`` is not callable, or ``pool_size`` or ``encode_batch_size`` is not an integer.
        ValueError: If ``encode_batch_size`` is below 1.

    Example::

        from bs_lightning.adapters.sentence_transformers import ComposedSentenceTransformerTrainer
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        loss = MultipleNegativesRankingLoss(model)
        trainer = ComposedSentenceTransformerTrainer(
            model=model, args=args, train_dataset=pairs, loss=loss, pool_size=640
        )
        trainer.train()
    """

    def embed(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """Embed the first two columns as the loss does, floats ``[b, d]`` each.

        Args:
            inputs: A batch as the Trainer collates it.
        """
        features, _ = self.collect_features(inputs)
        sides = [self.model(column)["sentence_embedding"] for column in features[:2]]
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])

    def get_train_dataloader(self) -> PoolLoader:  # type: ignore[override]
        """Return a loader of composed batches.

        Returns:
            The loader.

        Raises:
            TypeError: If ``train_dataset`` is not one ``Dataset``.
            ValueError: If the arguments ask for a batch sampler that composes differently.
        """
        if not isinstance(self.train_dataset, Dataset):
            raise TypeError(
                f"train_dataset must be one datasets.Dataset, got {type(self.train_dataset).__name__}. Batches are "
                "chosen by index, and all of a batch are compared by one loss."
            )
        asked = self.args.batch_sampler
        if getattr(asked, "value", None) not in _SUPPORTED:
            raise ValueError(
                f"batch_sampler={asked!r} cannot be combined with composed batches, which replace it. Leave it out."
            )
        return super().get_train_dataloader()

    def compose(self, embeddings: Tensor, indices: Indices, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose a pool's batches, and keep equal texts apart.

        Args:
            embeddings: Floats of shape ``[P, d]``, or ``[P, 2, d]`` for two sides.
            indices: Dataset indices of the pool, int64 ``[P]``.
            batch_size: Instances that are each other's negatives.
            seed: The pool's seed.
            epoch: The epoch's number.

        Returns:
            Positions in the pool, int64 ``[P // batch_size, batch_size]``.
        """
        batches = super().compose(embeddings, indices, batch_size, seed=seed, epoch=epoch)
        no_texts = {*self.data_collator.valid_label_columns, "dataset_name"}
        dataset: Any = self.train_dataset
        if dataset.format["type"] == "custom":  # a transform makes the texts, and may need all columns
            columns = {name: column for name, column in dataset[indices.tolist()].items() if name not in no_texts}
        else:
            # Other columns, such as images, would be decoded.
            names = [name for name, kind in dataset.features.items() if name not in no_texts and _holds_texts(kind)]
            columns = dataset.select_columns(names)[indices.tolist()] if names else {}
        if not columns:
            return batches
        rows = zip(*columns.values(), strict=True)
        batches, left = keep_apart(batches, [{str(text) for text in row} for row in rows], seed)
        if left:
            warnings.warn(
                f"{left} texts of a pool occur twice in a batch: they are too frequent to be kept apart. Remove "
                "repeated texts, or raise pool_size.",
                stacklevel=2,
            )
        return batches

    def _default_encode_batch_size(self) -> int:
        # A cached loss computes a part of the batch at a time, as all of it does not fit into memory.
        cached = getattr(self.loss, "loss", self.loss)  # another loss may wrap it
        size: int | None = getattr(cached, "mini_batch_size", None)
        return super()._default_encode_batch_size() if size is None else size


def _holds_texts(kind: Any) -> bool:
    """Return whether a column holds strings, or lists of strings."""
    return getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string")


def keep_apart(batches: Batches, texts: list[set[str]], seed: int) -> tuple[Batches, int]:
    """Exchange instances between batches so that no two instances of a batch share a text.

    An instance that shares a text is exchanged with one of a different batch, if both then share none. So no exchange
    brings a new repetition. Texts of more instances than there are batches do not count in this. Texts of nearly as
    many instances may be left together, as each instance is moved once.

    Args:
        batches: Positions in the pool, int64 ``[n, B]``.
        texts: The texts of each of the ``P`` instances.
        seed: The same seed makes the same exchanges.

    Returns:
        The batches, and how many repetitions are left. They are left if a text is too frequent.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.adapters.sentence_transformers import keep_apart
        >>> texts = [{"how are you", "fine"}, {"how are you", "well"}, {"hi", "hello"}, {"bye"}]
        >>> batches, left = keep_apart(np.array([[0, 1], [2, 3]]), texts, seed=0)
        >>> sorted(int((batch < 2).sum()) for batch in batches), left
        ([1, 1], 0)
    """
    batches = batches.copy()
    n_batches, size = batches.shape
    frequency = Counter(text for position in batches.flat for text in texts[position])
    too_frequent = {text for text, count in frequency.items() if count > n_batches}
    all_texts, texts = texts, [each - too_frequent for each in texts]
    held = [Counter(text for position in batch for text in texts[position]) for batch in batches.tolist()]
    rng = np.random.default_rng(seed)
    for batch, column in np.ndindex(n_batches, size):
        mine = texts[batches[batch, column]]
        if all(held[batch][text] == 1 for text in mine):
            continue
        start = int(rng.integers(batches.size))
        for step in range(batches.size):
            other, place = divmod((start + step) % batches.size, size)
            theirs = texts[batches[other, place]]
            if other == batch or not (_fits(mine, theirs, held[other]) and _fits(theirs, mine, held[batch])):
                continue
            batches[batch, column], batches[other, place] = batches[other, place], batches[batch, column]
            held[batch].subtract(mine)
            held[batch].update(theirs)
            held[other].subtract(theirs)
            held[other].update(mine)
            break
    in_batches = [Counter(text for position in batch for text in all_texts[position]) for batch in batches.tolist()]
    return batches, sum(count - 1 for counter in in_batches for count in counter.values())


def _fits(incoming: set[str], outgoing: set[str], held: Counter[str]) -> bool:
    """Return whether a batch that holds these texts shares none with an instance that takes another's place."""
    return all(held[text] == (text in outgoing) for text in incoming)
