"""A dual encoder of pairs: queries and documents, questions and answers, or paraphrases.

Source: Karpukhin et al., "Dense passage retrieval for open-domain question answering", EMNLP 2020, arXiv 2004.04906,
for in-batch negatives and separate encoders; Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, arXiv 1908.10084, for
one encoder of both sides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bs_lightning.losses import InfoNCELoss
from bs_lightning.recipes.schedules import with_decay
from bs_lightning.recipes.text_data import TextDataModule
from bs_lightning.recipes.text_encoder import Pooling, TextEncoder, Tokens
from bs_lightning.recipes.text_evaluation import EvaluatedModule
from bs_lightning.recipes.text_files import pair_groups, read_pairs


class DualEncoder(EvaluatedModule):
    """Train embeddings of queries and documents, each query near its document.

    Args:
        model: A Hugging Face model of texts, or its name or folder.
        document_model: The same for documents. ``None`` embeds both sides with ``model``.
        pooling: ``"cls"`` or ``"mean"``; see :class:`~bs_lightning.recipes.text_encoder.TextEncoder`.
        temperature: What cosine similarities are divided by.
        learning_rate: AdamW's, at the start. It falls linearly to zero.

    Raises:
        ImportError: If a model is a name and transformers is not installed.
        TypeError: If ``temperature`` is not a number.
        ValueError: If ``pooling`` is neither of them, or ``temperature`` is not finite and above 0.

    Example::

        from bs_lightning import BatchSamplerCallback
        from bs_lightning.recipes.dual_encoder import DualEncoder, PairData
        from lightning import Trainer

        name = "bert-base-uncased"
        data = PairData("train.tsv", name, evaluate_on=["test.tsv"])
        trainer = Trainer(callbacks=BatchSamplerCallback(), max_epochs=3)
        trainer.fit(DualEncoder(name), datamodule=data)
    """

    def __init__(
        self,
        model: str | nn.Module,
        document_model: str | nn.Module | None = None,
        pooling: Pooling = "mean",
        temperature: float = 0.05,
        learning_rate: float = 2e-5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model", "document_model"])
        self.queries = TextEncoder(model, pooling)
        self.documents = self.queries if document_model is None else TextEncoder(document_model, pooling)
        self.loss = InfoNCELoss(temperature=temperature, gather=True)
        self.learning_rate = learning_rate

    def embed(self, batch: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of queries and of documents, floats ``[b, d]`` each."""
        queries, documents = batch
        return self.queries(queries), self.documents(documents)

    def training_step(self, batch: tuple[Tokens, Tokens], batch_idx: int) -> dict[str, Any]:
        """Compare queries with documents in both directions; ``recycle=True`` keeps both sides."""
        queries, documents = self.embed(batch)
        loss: Tensor = self.loss(queries, documents, self.trainer.datamodule.likely_false_negatives())
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(queries))
        return {"loss": loss, "embeddings": (queries.detach(), documents.detach())}

    def embed_pairs(self, batch: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both sides, as in training."""
        return self.embed(batch)

    def configure_optimizers(self) -> Any:
        """Return AdamW, and its linear decay to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        return with_decay(optimizer, self.trainer, lambda done: 1 - done)


class PairData(TextDataModule):
    """Pairs of a query and its document to train on, and pairs to evaluate on.

    Two pairs with a common text are not each other's negatives.

    Args:
        pairs: The path of a file with two fields a line and a tab between them, a ``datasets.Dataset``, or pairs of
            strings. Blank lines are dropped.
        tokenizer: A Hugging Face tokenizer, or its name or folder.
        batch_size: Pairs per batch and process.
        columns: The two columns of a ``datasets.Dataset``.
        header: Whether the first line of the file holds names of columns.
        evaluate_on: Paths of tab-separated files with a header: pairs to retrieve, or scored pairs such as STS; see
            :func:`~bs_lightning.recipes.text_files.read_evaluation`.
        max_length: Tokens that are kept of each text.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tokenizer has no pad token.

    Example::

        PairData("train.tsv", "bert-base-uncased", evaluate_on=["test.tsv"], num_workers=4)
    """

    def __init__(
        self,
        pairs: Any,
        tokenizer: Any,
        batch_size: int = 64,
        *,
        columns: Sequence[str] = ("anchor", "positive"),
        header: bool = True,
        evaluate_on: Sequence[str] = (),
        max_length: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, batch_size, evaluate_on=evaluate_on, max_length=max_length, **kwargs)
        self.source = pairs
        self.columns = columns
        self.header = header

    def setup(self, stage: str | None = None) -> None:
        """Read the pairs, and the files of ``evaluate_on``."""
        super().setup(stage)
        self.pairs = read_pairs(self.source, self.columns, self.header)

    def train_dataset(self) -> Any:
        """Return the pairs."""
        return self.pairs

    def train_groups(self) -> Tensor:
        """Return the numbers of each pair's texts: pairs with one in common are of one group."""
        return pair_groups(self.pairs)
