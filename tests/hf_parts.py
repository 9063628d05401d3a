"""Tiny models, data and trainers of Hugging Face. As a script under torchrun, it trains in several processes."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss  # deprecated, but also in version 5
from sentence_transformers.models import Dropout, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, TrainingArguments

from bs_lightning import ExactGraph, RWRComposer
from bs_lightning.adapters.hugging_face import ComposedBatchesTrainer
from bs_lightning.adapters.sentence_transformers import ComposedSentenceTransformerTrainer
from bs_lightning.losses import info_nce

gc.freeze()  # the Trainer collects garbage at each start, which takes seconds with so many modules

N, B, POOL = 100, 8, 32
WORDS = [f"topic{number}" for number in range(12)] + [f"word{number}" for number in range(100)] + ["search"]
QUIET = {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
USUAL: dict[str, Any] = {
    "per_device_train_batch_size": B,
    "num_train_epochs": 2,
    "learning_rate": 0.05,
    "dataloader_drop_last": True,
    "save_strategy": "no",
}


def pairs(n: int = N) -> Dataset:
    """Return pairs of sentences that share a topic and a word. The label is the index."""
    rng = np.random.default_rng(0)
    rows = {"anchor": [], "positive": [], "label": list(range(n))}
    for index in range(n):
        topic, other = f"topic{rng.integers(12)}", f"word{rng.integers(100)}"
        rows["anchor"].append(f"{topic} {topic} word{index % 100}")
        rows["positive"].append(f"{other} {topic} word{index % 100} word{index % 100}")
    return Dataset.from_dict(rows)


def sentence_model() -> SentenceTransformer:
    """Return word vectors with dropout."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=16), Dropout(0.1)], device="cpu")


def composer() -> RWRComposer:
    """Return a composer that compiles nothing slow."""
    return RWRComposer(ExactGraph(n_neighbors=5))


def in_order(embeddings: torch.Tensor, batch_size: int, *, seed: int, epoch: int) -> Any:
    """Keep the order of a pool."""
    return np.arange(len(embeddings)).reshape(-1, batch_size)


class Records:
    """Records the indices of each batch that is trained, and the weights before it."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.__dict__.setdefault("batches", []).append(inputs["label" if "label" in inputs else "labels"].tolist())
            weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            self.__dict__.setdefault("weights", []).append(weights)
        return super().compute_loss(model, inputs, *args, **kwargs)


class SentenceTrainer(Records, ComposedSentenceTransformerTrainer):
    pass


def sentence_trainer(folder: Path, kind: type = SentenceTrainer, data: Any = None, **kwargs: Any) -> Any:
    """Return a trainer of pairs. ``kwargs`` are training arguments, and the adapter's own."""
    names = ("pool_size", "composer", "gather", "encode_batch_size")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    if issubclass(kind, ComposedBatchesTrainer):
        own = {"pool_size": POOL, "composer": composer()} | own
    model = sentence_model()
    args = SentenceTransformerTrainingArguments(str(folder), **QUIET | USUAL | kwargs)
    data = pairs() if data is None else data
    return kind(model=model, args=args, train_dataset=data, loss=MultipleNegativesRankingLoss(model), **own)


class SimCSE(ComposedBatchesTrainer):
    def embed(self, inputs: dict[str, Any]) -> torch.Tensor:
        return self.model(inputs["input_ids"]).last_hidden_state[:, 0]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        first, second = (model(inputs["input_ids"]).last_hidden_state[:, 0] for _ in range(2))  # two dropouts
        return info_nce(first, second, temperature=0.05)


class RecordedSimCSE(Records, SimCSE):
    pass


def bert() -> BertModel:
    """Return a BERT of one layer, with dropout."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=8, **small))


def tokens(n: int = N) -> Dataset:
    """Return token ids of sentences that share words. The label is the index."""
    rng = np.random.default_rng(0)
    ids = [[1, 2 + index % 10, *rng.integers(12, 64, size=3).tolist()] for index in range(n)]
    return Dataset.from_dict({"input_ids": ids, "labels": list(range(n))}).with_format("torch")


def bert_trainer(folder: Path, kind: type = RecordedSimCSE, **kwargs: Any) -> Any:
    """Return a trainer of SimCSE. ``kwargs`` are training arguments."""
    args = TrainingArguments(
        str(folder), **QUIET | USUAL | {"learning_rate": 0.01, "remove_unused_columns": False} | kwargs
    )
    return kind(model=bert(), args=args, train_dataset=tokens(), pool_size=POOL, composer=composer())


def main(folder: Path, settings: dict[str, Any]) -> None:
    """Train, and write this process's batches to ``folder/rank*.json``."""
    fails = settings.pop("fails", False)
    trainer = sentence_trainer(folder, **settings)
    rank = trainer.accelerator.process_index
    if fails and rank == 1:
        trainer.embed = lambda inputs: 1 / 0
    trainer.train()
    (folder / f"rank{rank}.json").write_text(json.dumps(trainer.batches))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    # Gloo's threads may abort a process as Python exits, so end them. DistributedDataParallel keeps the group: free it
    # first. Were it freed last, it would wait for gloo's threads, and those for Python.
    gc.collect()
    torch.distributed.destroy_process_group()
