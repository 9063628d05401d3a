"""Texts -> tokens -> embeddings, by models of Hugging Face."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bs_lightning._checks import check_integer
from bs_lightning.recipes.text_files import require

Pooling = Literal["cls", "mean"]
"""How token vectors become the vector of a text; see :class:`TextEncoder`."""

Tokens = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, int64 ``[b, L]``."""


def load_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer that can pad.

    Args:
        tokenizer: A Hugging Face tokenizer, or its name or folder.

    Raises:
        ValueError: If it has no pad token.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no pad token, which batches of texts need. Load it, set "
            "tokenizer.pad_token = tokenizer.eos_token, and give the tokenizer itself, or the folder that "
            "tokenizer.save_pretrained(folder) writes."
        )
    return tokenizer


@dataclass(frozen=True)
class Tokenize:
    """Collate texts, or pairs of texts, into tokens.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        max_length: Tokens that are kept of each text.

    Raises:
        TypeError: If ``max_length`` is not an integer.
        ValueError: If it is below 1.
    """

    tokenizer: Any
    max_length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_length", check_integer("max_length", self.max_length, 1))

    def __call__(self, items: Sequence[Any]) -> Any:
        """Return the tokens of texts, or two such batches for pairs.

        Args:
            items: Strings, or pairs of strings.

        Returns:
            :data:`Tokens`, or a pair of them.
        """
        if isinstance(items[0], str):
            return self.tokens(items)
        return tuple(self.tokens(side) for side in zip(*items, strict=True))

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of ``b`` texts, padded to the longest text."""
        return dict(
            self.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=True,
                return_token_type_ids=False,  # zeros, which not every model takes
                return_tensors="pt",
            )
        )


class TextEncoder(nn.Module):
    """A Hugging Face transformer and pooling: tokens -> one vector for each text.

    Args:
        model: A Hugging Face model of texts with ``last_hidden_state``, or its name or folder. Its dropout is switched
            on unless all of it is frozen, and its own pooler, which is not used, is frozen.
        pooling: ``"cls"`` takes the vector of the first token, ``"mean"`` the mean over tokens. Choose ``"mean"`` for a
            model whose first token cannot see the others, such as GPT-2.

    Raises:
        TypeError: While ``width`` is read, if the model has no ``config.hidden_size``.
        ValueError: If ``pooling`` is neither of them.
    """

    def __init__(self, model: str | nn.Module, pooling: Pooling) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f'pooling must be "cls" or "mean", got {pooling!r}.')
        self.transformer = load_model(model)
        self.pooling = pooling
        if getattr(self.transformer, "pooler", None) is not None:
            self.transformer.pooler.requires_grad_(False)  # else DDP waits for its gradient in vain

    @property
    def width(self) -> int:
        """Numbers in a text's vector."""
        return model_width(self.transformer, 'transformers.CLIPTextModel with pooling="mean"')

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the vectors of texts.

        Args:
            tokens: ``input_ids`` and ``attention_mask``, int64 ``[b, L]``.

        Returns:
            Floats of shape ``[b, width]``, in the precision of the model's weights.
        """
        output: Tensor = self.transformer(**tokens).last_hidden_state
        return self._pooled(output.float(), tokens["attention_mask"]).to(next(self.transformer.parameters()).dtype)

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return one vector ``[b, width]`` for the tokens' vectors ``[b, L, width]``."""
        if self.pooling == "cls":  # some tokenizers pad on the left
            return states[torch.arange(len(states), device=states.device), mask.argmax(dim=1)]
        weights = mask.unsqueeze(2).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def load_model(model: str | nn.Module) -> Any:
    """Return a model: itself, or loaded by its Hugging Face name or from its folder, in float32.

    It is in training mode, but a frozen model keeps the mode that it has.
    """
    if not isinstance(model, nn.Module):
        # Saved weights may be in half precision, in which optimizers lose small steps.
        return load_model(require("transformers").AutoModel.from_pretrained(model).float())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    return model.train()  # `from_pretrained` returns a model without dropout, and Lightning leaves it so


def model_width(model: Any, of_one_side: str) -> int:
    """Return how many numbers a Hugging Face model gives for each token or patch.

    Args:
        model: The model.
        of_one_side: A model to name in the error, if this one has two sides.

    Raises:
        TypeError: If the model's configuration does not say it.
    """
    config = model.config
    if hasattr(config, "hidden_size"):
        return int(config.hidden_size)
    if hasattr(config, "hidden_sizes"):
        return int(config.hidden_sizes[-1])
    raise TypeError(
        f"{type(model).__name__} has no config.hidden_size. Give a model of one side, such as {of_one_side}."
    )
