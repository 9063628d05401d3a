"""SimCSE with a small transformer from scratch instead of a bag of words."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .text import VOCABULARY, TextSimCSE

N_WORDS = 20  # the first words of a sentence
ONE_IN = 3  # sentences to train on: few enough for three epochs in a minute or two


class Transformer(nn.Module):
    """Hashed words with positions, transformer layers with norm first, and the mean over words; with dropout."""

    def __init__(self, width: int, n_layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.position = nn.Parameter(0.1 * torch.randn(N_WORDS, width))
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, n_layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        """Return the features of hashed words ``[n, MAX_WORDS]``."""
        words = words[:, :N_WORDS]
        is_word = words > 0
        inputs = self.dropout(self.embedding(words) + self.position)
        outputs = self.layers(inputs, src_key_padding_mask=~is_word) * is_word[:, :, None]
        return outputs.sum(dim=1) / is_word.sum(dim=1, keepdim=True).clamp_min(1)


class TransformerSimCSE(TextSimCSE):
    """SimCSE with a transformer: its positive pair is the sentence under two dropouts."""

    name = "transformer-simcse"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 888,
        "batch_size": 64,
        "temperature": 0.05,
        "learning_rate": 1e-3,
        "width": 64,
    }

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        super().__init__(data_dir, seed, settings)
        self.sentences = self.sentences[::ONE_IN]
        self.size = len(self.sentences)

    def reference(self) -> Tensor:
        return super().reference()[::ONE_IN]

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return Transformer(self.width), nn.Identity()
