"""Advice: what helps where a batch of a pool could not be embedded."""

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from bs_lightning.encoding import has_embed
from bs_lightning.plugin.datamodule import BatchSamplerDataModule


def advice(batch: Any, data: BatchSamplerDataModule, module: LightningModule, is_own_function: bool) -> str:
    """Return what to do after embedding a batch has failed, the likeliest fix first.

    Args:
        batch: What could not be embedded.
        data: The DataModule that the batch comes from.
        module: The module that embeds.
        is_own_function: Whether the user gave the callback a function that embeds.

    Returns:
        A note for the error, in full sentences.
    """
    what = f"BatchSamplerCallback was embedding a batch of pool_dataset(), a {type(batch).__name__}."
    if_first, otherwise = _fixes(module, is_own_function)
    is_collated_alike = data.pool_collate_fn is None
    is_training_data = type(data).pool_dataset is BatchSamplerDataModule.pool_dataset and is_collated_alike
    if if_first is not None and is_training_data and isinstance(batch, (list, tuple)) and batch:
        how = "give pool_collate_fn a function for" if data.streams else "override pool_dataset() to return"
        what += " Your DataModule does not override pool_dataset(), so this is a training batch"
        if isinstance(batch[0], (list, tuple)):
            fix = f". Its first part holds {len(batch[0])} parts itself. If those are views, {how}"
        else:
            parts = "1 part" if len(batch) == 1 else f"{len(batch)} parts"
            fix = f" of {parts}. If the first part is the input, {if_first}. Otherwise {how}"
        note = f"{what}{fix} one clean view of each instance."
    else:
        note = f"{what} {otherwise}"
    if is_collated_alike and not data.streams and data.dataloader_kwargs.get("collate_fn") is not None:
        note += " If your collate_fn makes the views, give the DataModule a pool_collate_fn without them."
    return note


def _fixes(module: LightningModule, is_own_function: bool) -> tuple[str | None, str]:
    """Return what helps if the first part of a training batch is the input, where that may be, and what helps else."""
    if is_own_function:
        return (
            "let the function that you gave as embed take batch[0]",
            "Give BatchSamplerCallback(embed=...) a function of (pl_module, batch) that takes such a batch.",
        )
    if has_embed(module):
        return "let your embed take batch[0]", "Let your embed take such a batch."
    if _takes_one_argument(module.forward):
        return (
            "define `def embed(self, batch): return self(batch[0])` in your module",
            "Give the module a method embed(batch) that takes a batch of pool_dataset().",
        )
    return (
        None,
        "The module's forward needs other arguments than a batch, so define `def embed(self, batch)`. It returns what "
        "your loss compares: one vector for each instance, or a pair for two sides.",
    )


def _takes_one_argument(forward: Callable[..., Any]) -> bool:
    """Return whether a batch is enough to call ``forward``, as far as its signature says."""
    try:
        inspect.signature(forward).bind(None)
    except TypeError:
        return False
    except ValueError:  # no signature
        pass
    return True
