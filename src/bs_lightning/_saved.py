"""Saved: the values of a state, read from a checkpoint, or an error in words."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from bs_lightning._types import Indices

_ADVICE = "It is damaged, or older than version 0.1.0: resume from a different checkpoint."


def saved_value(state: Mapping[str, Any], name: str, *types: type, where: str = "") -> Any:
    """Return a value of a state. Refuse it unless it has one of the given types; ``bool`` is not an ``int`` here.

    Args:
        state: The state, or a part of it.
        name: The value's name.
        *types: The types that the value may have.
        where: The name of the part, with a dot, for the message.

    Raises:
        ValueError: If there is no such value.
        TypeError: If it has a different type.
    """
    if name not in state:
        raise ValueError(f"The checkpoint's sampler state lacks {where}{name!r}. {_ADVICE}")
    if type(state[name]) not in types:
        kinds = " or ".join(kind.__name__ for kind in types)
        raise TypeError(
            f"The checkpoint's sampler state must hold {kinds} as {where}{name}, got {state[name]!r}. {_ADVICE}"
        )
    return state[name]


def saved_counts(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    """Return integers of a state. Refuse negative ones.

    Args:
        state: The state.
        names: Their names.

    Raises:
        ValueError: If one is missing or negative.
        TypeError: If one is not an integer.
    """
    counts: dict[str, int] = {name: saved_value(state, name, int) for name in names}
    for name, count in counts.items():
        if count < 0:
            raise damaged(name, count, "at least 0")
    return counts


def saved_table(pool: Mapping[str, Any], name: str) -> Indices:
    """Return a table of a saved pool as an array.

    Args:
        pool: The saved pool.
        name: The table's name.

    Returns:
        int64 of two dimensions.

    Raises:
        ValueError: If it is missing, or different from that.
        TypeError: If it is not a tensor.
    """
    value = saved_value(pool, name, torch.Tensor, where="pool.")
    if value.ndim != 2 or value.dtype != torch.int64:
        raise damaged(f"pool.{name}", f"{value.dtype} of shape {list(value.shape)}", "int64 of two dimensions")
    array: Indices = value.cpu().numpy().astype(np.int64, copy=False)
    return array


def damaged(name: str, value: object, expected: str) -> ValueError:
    """Return the error for a value that no state can have.

    Args:
        name: The value's name.
        value: What it is.
        expected: What it must be.
    """
    return ValueError(f"The checkpoint's sampler state holds {name}={value}, but it must be {expected}. {_ADVICE}")
