"""Data of recipes for texts: tokens to train on, and files of pairs to validate on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from bs_lightning import BatchSamplerDataModule
from bs_lightning.recipes.text_encoder import Tokenize, load_tokenizer
from bs_lightning.recipes.text_files import EvaluationPairs, read_evaluation


class TextDataModule(BatchSamplerDataModule):
    """Tokenizes texts or pairs of texts, and serves files of pairs for validation.

    Subclasses say what is trained on. Every process validates on all pairs: a process with a part of them could not
    tell the rank of a document.

    Args:
        tokenizer: A Hugging Face tokenizer, or its name or folder.
        batch_size: Instances per batch and process.
        evaluate_on: Paths of tab-separated files: scored pairs, or pairs to retrieve; see
            :func:`~bs_lightning.recipes.text_files.read_evaluation`.
        max_length: Tokens that are kept of each text.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tokenizer has no pad token.
    """

    def __init__(
        self, tokenizer: Any, batch_size: int, *, evaluate_on: Sequence[str] = (), max_length: int, **kwargs: Any
    ) -> None:
        tokenize = Tokenize(load_tokenizer(tokenizer), max_length)
        super().__init__(batch_size, collate_fn=tokenize, **kwargs)
        self.evaluate_on = evaluate_on
        self.evaluation: list[EvaluationPairs] = []

    def setup(self, stage: str | None = None) -> None:
        """Read the files of ``evaluate_on``.

        Raises:
            TypeError: If ``evaluate_on`` is one path.
            ValueError: If a file is not as :func:`read_evaluation` expects, two files have one name, or one of several
                is named ``val``.
        """
        if isinstance(self.evaluate_on, str | Path):
            raise TypeError(f"evaluate_on must be a list of paths, got {self.evaluate_on!r}. Give a list of one.")
        names = [Path(path).stem for path in self.evaluate_on]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate_on must hold files of different names, under which to log, got {names}.")
        if "val" in names and len(names) > 1:
            raise ValueError("evaluate_on holds a file named val, and means over files are logged as val. Rename it.")
        self.evaluation = [read_evaluation(path) for path in self.evaluate_on]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each file of ``evaluate_on``, in order."""
        return [evaluation_loader(self, each.pairs) for each in self.evaluation]


def evaluation_loader(data: BatchSamplerDataModule, pairs: Any) -> DataLoader[Any]:
    """Return a loader that gives every process all pairs, in order.

    Args:
        data: The DataModule, whose ``collate_fn`` and ``num_workers`` are used.
        pairs: A map-style dataset.
    """
    # Lightning would share the pairs out, and repeat some, if it did not find a distributed sampler here.
    sampler: DistributedSampler[Any] = DistributedSampler(pairs, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(
        pairs,
        4 * data.batch_size,
        sampler=sampler,
        collate_fn=data.dataloader_kwargs["collate_fn"],
        num_workers=data.dataloader_kwargs.get("num_workers", 0),
    )
