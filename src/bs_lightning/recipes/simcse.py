"""SimCSE, unsupervised: a sentence is its own positive pair, under two dropout masks.

Source: Gao et al., "SimCSE: Simple contrastive learning of sentence embeddings", EMNLP 2021, arXiv 2104.08821. The
settings are those of its public code, https://github.com/princeton-nlp/SimCSE, for BERT base. In addition, equal
sentences are not each other's negatives here.
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
from bs_lightning.recipes.text_files import read_sentences, text_groups


class SimCSE(EvaluatedModule):
    """Train sentence embeddings with dropout as the only augmentation.

    ``model(tokens)`` gives embeddings to use and to evaluate. The loss compares these after a head, which is used in
    training only, as in the public code. ``embed``, from which batches are composed, gives what the loss compares.

    Args:
        model: A Hugging Face model of texts, or its name or folder. It needs dropout.
        pooling: ``"cls"`` or ``"mean"``; see :class:`~bs_lightning.recipes.text_encoder.TextEncoder`.
        temperature: What cosine similarities are divided by.
        learning_rate: AdamW's, at the start. It falls linearly to zero.

    Raises:
        ImportError: If ``model`` is a name and transformers is not installed.
        TypeError: If ``temperature`` is not a number.
        ValueError: If ``pooling`` is neither of them, or ``temperature`` is not finite and above 0.

    Example::

        from bs_lightning import BatchSamplerCallback
        from bs_lightning.recipes.simcse import SentenceData, SimCSE
        from lightning import Trainer

        name = "bert-base-uncased"
        data = SentenceData("sentences.txt", name, evaluate_on=["STS12.tsv"])
        trainer = Trainer(callbacks=BatchSamplerCallback(pool_size=6400, warmup_epochs=0), max_epochs=1)
        trainer.fit(SimCSE(name), datamodule=data)
    """

    def __init__(
        self,
        model: str | nn.Module,
        pooling: Pooling = "cls",
        temperature: float = 0.05,
        learning_rate: float = 3e-5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.encoder = TextEncoder(model, pooling)
        self.head = nn.Sequential(nn.Linear(self.encoder.width, self.encoder.width), nn.Tanh())
        self.loss = InfoNCELoss(temperature=temperature, symmetric=False, gather=True)
        self.learning_rate = learning_rate

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the embeddings of sentences, floats ``[b, d]``."""
        embeddings: Tensor = self.encoder(tokens)
        return embeddings

    def embed(self, tokens: Tokens) -> Tensor:
        """Return what the loss compares, floats ``[b, d]``."""
        embeddings: Tensor = self.head(self(tokens))
        return embeddings

    def training_step(self, tokens: Tokens, batch_idx: int) -> dict[str, Any]:
        """Embed each sentence twice, and compare the first embeddings with the second; ``recycle=True`` keeps both."""
        twice = {name: torch.cat([values, values]) for name, values in tokens.items()}
        first, second = self.embed(twice).chunk(2)
        loss: Tensor = self.loss(first, second, self.trainer.datamodule.likely_false_negatives())
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(first))
        return {"loss": loss, "embeddings": (first.detach(), second.detach())}

    def embed_pairs(self, batch: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both sentences of pairs, without the head."""
        first, second = batch
        return self(first), self(second)

    def configure_optimizers(self) -> Any:
        """Return AdamW without weight decay, and its linear decay to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0)
        return with_decay(optimizer, self.trainer, lambda done: 1 - done)


class SentenceData(TextDataModule):
    """Sentences to train on, and pairs to evaluate on.

    Args:
        sentences: The path of a text file with a sentence a line, a ``datasets.Dataset``, or strings. Blank lines are
            dropped.
        tokenizer: A Hugging Face tokenizer, or its name or folder.
        batch_size: Sentences per batch and process.
        column: The column of a ``datasets.Dataset``.
        evaluate_on: Paths of tab-separated files, such as STS; see
            :func:`~bs_lightning.recipes.text_files.read_evaluation`.
        max_length: Tokens that are kept of each sentence.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tokenizer has no pad token.

    Example::

        SentenceData("sentences.txt", "bert-base-uncased", evaluate_on=["STS12.tsv", "SICK-R.tsv"], num_workers=4)
    """

    def __init__(
        self,
        sentences: Any,
        tokenizer: Any,
        batch_size: int = 64,
        *,
        column: str = "text",
        evaluate_on: Sequence[str] = (),
        max_length: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, batch_size, evaluate_on=evaluate_on, max_length=max_length, **kwargs)
        self.source = sentences
        self.column = column

    def setup(self, stage: str | None = None) -> None:
        """Read the sentences, and the files of ``evaluate_on``."""
        super().setup(stage)
        self.sentences = read_sentences(self.source, self.column)

    def train_dataset(self) -> Any:
        """Return the sentences."""
        return self.sentences

    def train_groups(self) -> Tensor:
        """Return the same number for equal sentences."""
        return text_groups(self.sentences)
