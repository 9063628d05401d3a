"""Tiny models and data that the tests of the recipes of texts share.

``python language_parts.py FOLDER`` trains each recipe in two processes. It writes what they logged to
``FOLDER/simcse/logged.json`` and so on.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from parts import trainer, walker
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

from bs_lightning.recipes.clip import CLIP, ImageTextData
from bs_lightning.recipes.dual_encoder import DualEncoder, PairData
from bs_lightning.recipes.simcse import SentenceData, SimCSE

RECIPES = ("simcse", "dual_encoder", "clip")
COLOURS = [(red, green, blue) for red in range(5) for green in range(5) for blue in range(5)][:103]
SENTENCES = [f"r{red} g{green} b{blue}" for red, green, blue in COLOURS]
PAIRS = [(f"r{red} g{green} b{blue}", f"B{blue} and G{green} and R{red}") for red, green, blue in COLOURS]
IMAGES = [Image.new("RGB", (8, 8), tuple(60 * level for level in colour)) for colour in COLOURS]
WORDS = ["and", *(f"{name}{level}" for name in "rgbRGB" for level in range(5))]
VOCABULARY = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}


def tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"pad_token": "[PAD]", "eos_token": "[SEP]"} | kwargs)


def bert(dropout: float = 0.0) -> BertModel:
    """Return a BERT of one layer."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=16, **small, **rates))


def vit() -> ViTModel:
    """Return a vision transformer of one layer for images of 8 x 8 pixels."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **small))


def build(recipe: str, folder: Path, batch_size: int = 8, dropout: float = 0.0, repeats: int = 0) -> tuple[Any, Any]:
    """Return the model of a recipe and its data, which is the first instance ``repeats`` times if that is not 0."""
    seed_everything(0, verbose=False)
    some = slice(None) if not repeats else slice(1)
    chosen = max(repeats, 1)
    file = folder / "pairs.tsv"
    file.write_text("\n".join("\t".join(pair) for pair in [("anchor", "positive"), *PAIRS[:50]]))
    if recipe == "clip":
        pairs = list(zip(IMAGES, SENTENCES, strict=True))
        model: Any = CLIP(vit(), bert(dropout), width=16, learning_rate=3e-3)
        return model, ImageTextData(
            pairs[some] * chosen, tokenizer(), batch_size, validation_pairs=pairs[:50], image_size=8
        )
    if recipe == "dual_encoder":
        model = DualEncoder(bert(dropout), learning_rate=3e-3)
        return model, PairData(PAIRS[some] * chosen, tokenizer(), batch_size, evaluate_on=[str(file)])
    model = SimCSE(bert(dropout), pooling="mean", learning_rate=3e-3)
    return model, SentenceData(SENTENCES[some] * chosen, tokenizer(), batch_size, evaluate_on=[str(file)])


class Losses(Callback):
    """Notes the loss of each step, as it was logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def train(recipe: str, folder: Path, batch_size: int = 8, **kwargs: Any) -> dict[str, Any]:
    """Train a recipe for two epochs of walked batches of 8 instances, and return what was logged."""
    model, data = build(recipe, folder, batch_size)
    noted = Losses()
    made = trainer(noted, walker(32), **kwargs)
    made.fit(model, datamodule=data)
    return {"losses": noted.losses} | {name: value.item() for name, value in made.callback_metrics.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for recipe in RECIPES:
        folder = Path(sys.argv[1]) / recipe
        folder.mkdir(exist_ok=True)
        logged = train(recipe, folder, batch_size=4, strategy="ddp", devices=2)
        if torch.distributed.get_rank() == 0:
            (folder / "logged.json").write_text(json.dumps(logged))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
