"""Docstring to code: find a function by the first paragraph of its docstring."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .evaluate import mean_reciprocal_rank
from .functions import functions, hold_out, same_words, words
from .task import Encode, Task

MAX_TOKENS = 256
N_HELD_OUT = 4000


def wheel_folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"This task needs the files of {package}: pip install {package}")
    return Path(spec.origin).parent


@lru_cache(maxsize=1)
def word_vectors() -> tuple[Any, Tensor]:
    """Return the tokenizer and the word vectors, float32 ``[32000, 256]``, that the wheel of WordLlama holds."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder = wheel_folder("wordllama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    (table,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
    return tokenizer, table.float()


def tokens(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Return 1 + the tokens of the texts' words, int32 ``[n, MAX_TOKENS]``, padded with 0."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    rows = np.zeros((len(texts), MAX_TOKENS), dtype=np.int32)
    encoded = tokenizer.encode_batch([" ".join(words(text)) for text in texts], add_special_tokens=False)
    for row, encoding in zip(rows, encoded, strict=True):
        row[: len(encoding.ids)] = np.array(encoding.ids) + 1
    return torch.from_numpy(rows)


@lru_cache(maxsize=1)
def data() -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Return tokens of docstrings and code ``[2, n, MAX_TOKENS]``, folders, groups, and the vectors that occur.

    The tokens are numbered by the rows of the vectors; row 0 is for padding.
    """
    found = functions()
    tokenizer, table = word_vectors()
    pairs = torch.stack([tokens([getattr(each, part) for each in found], tokenizer) for part in ("docstring", "code")])
    occurring, numbered = torch.cat([torch.zeros(1), pairs.flatten()]).int().unique(return_inverse=True)
    vectors = torch.cat([torch.zeros(1, table.shape[1]), table])[occurring]
    groups = torch.from_numpy(same_words(found))
    return numbered[1:].int().reshape(pairs.shape), [each.folder for each in found], groups, vectors


class MeanVector(nn.Module):
    """The mean of word vectors, which training changes."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag.from_pretrained(vectors.clone(), freeze=False, mode="mean", padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean of the vectors of tokens ``[n, MAX_TOKENS]``."""
        return self.bag(tokens)


class CodeSearch(Task):
    """Supervised, of two kinds: an instance is a function, its docstring and its code are the positive pair.

    The data are some 41,500 documented functions of installed Python packages (see ``functions.py``), without trivial
    functions, tests and vendored code. A docstring is its first paragraph. Code is the body without the docstring, the
    line with ``def``, and the function's name. No two functions have the same words in their docstrings or in their
    code. Whole folders are held out. About one function in a hundred has a near copy in a different folder: a cosine
    similarity above 0.9 of the code's words, weighted by TF-IDF.

    The encoder of both sides is the mean of word vectors from the wheel of WordLlama. Words are lower-case parts of
    identifiers. ``mrr_4000`` is the mean reciprocal rank of the code of 4,000 held-out docstrings among these
    functions; ``mrr_all`` is that among all functions, those of training included.
    """

    name = "code-search"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 3500,
        "batch_size": 32,
        "temperature": 0.05,
        "learning_rate": 1e-2,
    }
    main = ("mrr_4000", "mrr_all")
    class_prior = 0.0
    two_towers = True
    has_sides = True

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        self.pairs, folders, groups, self.vectors = data()
        train, held_out = hold_out(folders, N_HELD_OUT, seed)
        self.train, self.held_out = torch.from_numpy(train), torch.from_numpy(held_out)
        self.size = len(train)
        self.groups = groups[self.train]
        self.labels = self.groups

    def views(self, indices: Tensor) -> Tensor:
        return self.pairs[:, self.train[indices]]

    def clean(self, indices: Tensor) -> Tensor:
        return self.pairs[0, self.train[indices]]

    def sides(self, indices: Tensor) -> Tensor:
        return self.views(indices)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return MeanVector(self.vectors), nn.Identity()

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Return ``mrr_4000`` and ``mrr_all``."""
        queries, candidates = encode(self.pairs[0, self.held_out]), encode(self.pairs[1])
        return {
            "mrr_4000": mean_reciprocal_rank(queries, candidates[self.held_out], torch.arange(len(queries))),
            "mrr_all": mean_reciprocal_rank(queries, candidates, self.held_out),
        }
