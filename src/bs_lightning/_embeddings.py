"""Checks, scaling and similarities of embeddings that several modules share."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_lightning._checks import kind_of
from bs_lightning._types import Embeddings, Indices

# Similarities that `similarity_blocks` holds at a time. On a CPU, 4 MB stay in the cache: in pools of 4,096, graphs
# take two thirds of the time. On a GPU, 256 MB at a time take half the time of 64 MB.
_BLOCK_ENTRIES_ON_CPU, _BLOCK_ENTRIES_ON_GPU = 2**20, 2**26

BELOW_ANY_COSINE = -2.0
"""Stands in for the similarity to an all-zero row, so that such a row is chosen last."""

TIE = 1e-6
"""Cosines that differ by less are equal: float32 rounds the cosines of equal directions differently."""


def as_embeddings(embeddings: Embeddings) -> Tensor:
    """Return embeddings as a tensor of floats, ``[P, d]`` or ``[P, 2, d]``, on the device that they are on.

    Raises:
        TypeError: If they are not a dense tensor or a NumPy array of real floats.
        ValueError: If they are not of shape ``[P, d]`` or ``[P, 2, d]`` with ``P >= 2`` and ``d >= 1``, or a row is
            not finite in float32; naming the shape or the first such row.
    """
    if not are_floats(embeddings):
        raise TypeError(
            f"embeddings must be a dense tensor or a NumPy array of floats, got {kind_of(embeddings)}. Convert them to "
            "a float32 tensor of shape [P, d], or [P, 2, d] for two sides."
        )
    if isinstance(embeddings, np.ndarray):
        with np.errstate(over="ignore"):  # refused below
            # A copy, as torch cannot share arrays that are read-only, reversed or of foreign byte order.
            embeddings = torch.from_numpy(embeddings.astype(np.float32))
    if not have_sides(embeddings) or len(embeddings) < 2:
        raise ValueError(
            "embeddings must have shape [P, d], or [P, 2, d] for two sides, with P >= 2 and d >= 1, got "
            f"{list(embeddings.shape)}. Give one row, or one row a side, for each instance."
        )
    row = first_not_finite(embeddings.float())
    if row is not None:
        raise ValueError(f"embeddings must be finite, but row {row} is not. Check that instance and the model.")
    return embeddings


def are_floats(embeddings: Any) -> bool:
    """Whether these are a dense tensor or a NumPy array of real floats."""
    if isinstance(embeddings, Tensor):
        return embeddings.is_floating_point() and embeddings.layout is torch.strided
    return isinstance(embeddings, np.ndarray) and embeddings.dtype.kind == "f"


def have_sides(embeddings: Embeddings) -> bool:
    """Whether the shape is ``[P, d]``, or ``[P, 2, d]`` for two sides, with ``d >= 1``."""
    shape = embeddings.shape
    return (len(shape) == 2 or (len(shape) == 3 and shape[1] == 2)) and shape[-1] >= 1


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return a tensor on a device; ``None`` leaves it where it is.

    A copy to a CUDA device need not wait for earlier work. Copies to other devices wait: what is read on a CPU must be
    there, and on MPS the memory may be freed too early.
    """
    return tensor.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


def read_rows(embeddings: Embeddings, indices: Indices) -> Tensor:
    """Return some rows of embeddings that may lie in a file.

    Args:
        embeddings: Floats of shape ``[N, d]`` or ``[N, 2, d]``.
        indices: The rows to read, int64 ``[n]``.

    Returns:
        A copy, float32 of shape ``[n, d]`` or ``[n, 2, d]``, on the device of the tensor; of an array, on the CPU.
    """
    if isinstance(embeddings, Tensor):
        return embeddings[to_device(torch.from_numpy(indices), embeddings.device)].detach().float()
    return torch.from_numpy(np.asarray(embeddings[indices], dtype=np.float32))


def as_sides(value: Any, what: str) -> Tensor:
    """Return the embeddings of a batch as one tensor, ``[b, d]`` or ``[b, 2, d]``.

    Args:
        value: A float tensor ``[b, d]`` or ``[b, 2, d]``, or a pair of float tensors ``[b, d]``.
        what: How an error begins, such as ``"embed must return"``.

    Raises:
        TypeError: If the value is not one or two dense tensors of floats.
        ValueError: If a shape is different, or two sides differ in shape. The message gives the shapes.
    """
    sides = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
    for side in sides:
        if not isinstance(side, Tensor) or not are_floats(side):
            raise TypeError(
                f"{what} a float tensor of shape [b, d], or two sides: a pair of such tensors, or [b, 2, d]. Got "
                f"{kind_of(side)}."
            )
    if len(sides) == 2:
        if sides[0].shape != sides[1].shape or sides[0].ndim != 2:
            raise ValueError(
                f"{what} two sides of one shape [b, d], got {list(sides[0].shape)} and {list(sides[1].shape)}. Project "
                "both sides to one width."
            )
        dtype = torch.promote_types(sides[0].dtype, sides[1].dtype)
        value = torch.stack([side.to(dtype) for side in sides], dim=1)
    embeddings: Tensor = value
    if not have_sides(embeddings):
        raise ValueError(
            f"{what} shape [b, d], or [b, 2, d] for two sides, got {list(embeddings.shape)}. Pool or flatten first."
        )
    return embeddings


def check_finite(rows: Tensor, indices: Sequence[int] | Indices | Tensor) -> None:
    """Refuse embeddings of a pool that hold a NaN or an infinity.

    Args:
        rows: Floats of shape ``[P, ...]``.
        indices: Their dataset indices, integers ``[P]``.

    Raises:
        ValueError: Naming the first such dataset index.
    """
    row = first_not_finite(rows)
    if row is not None:
        raise ValueError(
            f"The embedding of dataset index {int(indices[row])} is not finite. Check that instance, or whether "
            "training diverged. Lower precisions overflow sooner."
        )


def first_not_finite(rows: Tensor) -> int | None:
    """Return the number of the first instance that holds a NaN or an infinity, or ``None`` if there is none."""
    # `torch.isfinite` of all rows would hold them twice more. Their largest number says the same.
    finite = _largest(rows.flatten(1)).squeeze(1).isfinite()
    return None if finite.all() else int((~finite).nonzero()[0])


def unit_rows(embeddings: Tensor) -> Tensor:
    """Return a copy with rows of length 1, float32 ``[..., d]`` without gradient. All-zero rows stay zero."""
    return unit_rows_(embeddings.detach().to(torch.float32, copy=True))


def unit_rows_(rows: Tensor) -> Tensor:
    """Scale float32 rows to length 1 in place, as :func:`unit_rows` does in a copy.

    Returns:
        ``rows``.
    """
    scale_(rows)
    return rows


def scale_(rows: Tensor) -> Tensor:
    """Scale float32 rows to length 1 in place.

    Returns:
        A length of each row, ``[..., 1]``: 0 of all-zero rows, not finite of rows that are not, and else above 0.
    """
    rows *= _scales(_largest(rows))
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    rows /= lengths.clamp_min(1e-12)
    return lengths


def finite_unit_rows_(rows: Tensor, indices: Sequence[int] | Indices | Tensor) -> bool:
    """Scale float32 rows to length 1 in place, and raise as :func:`check_finite` does. Waits for a GPU once.

    Returns:
        Whether a row is all-zero.
    """
    if not len(rows):
        return False
    shortest, longest = torch.stack(scale_(rows).aminmax()).tolist()
    if not math.isfinite(longest):
        check_finite(rows, indices)
    return bool(shortest == 0)


def similar_to_nothing(embeddings: Tensor) -> Tensor:
    """Return which instances have an all-zero row, on either side: bool ``[P]``."""
    is_zero = ~embeddings.any(dim=-1)
    return is_zero if embeddings.ndim == 2 else is_zero.any(dim=1)


def similarity_factors(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product ``left @ right.T`` holds the similarities of all pairs of instances.

    With one side, the similarity is the cosine. With two sides, a loss compares the first side of an instance with the
    second side of another instance. The similarity is the mean of the two cosines that a pair has.

    Args:
        unit: Rows of length 1, float32 ``[P, d]`` or ``[P, 2, d]``.

    Returns:
        Two tensors ``[P, d]``, which are the same tensor; or ``[P, 2 d]`` for two sides.
    """
    if unit.ndim == 2:
        return unit, unit
    return unit.flatten(1), unit.flip(1).flatten(1) / 2


def similarity_blocks(unit: Tensor, rows: range | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield the similarities of instances to all instances, a block of rows at a time.

    Args:
        unit: Rows of length 1, float32 ``[P, d]`` or ``[P, 2, d]``.
        rows: The instances whose similarities are asked for; ``None`` asks for those of all instances.

    Yields:
        The block's first row, and its similarities, ``[rows in the block, P]``. The next block takes their memory.
    """
    left, right = similarity_factors(unit)
    rows = range(len(unit)) if rows is None else rows
    most = _BLOCK_ENTRIES_ON_CPU if unit.device.type == "cpu" else _BLOCK_ENTRIES_ON_GPU
    rows_per_block = max(1, min(most // len(unit), len(rows)))
    # With a new tensor for each block, what a caller keeps of a block would lie between blocks, and the memory of the
    # blocks could not be used again.
    block = unit.new_empty(rows_per_block, len(unit))
    for start in range(rows.start, rows.stop, rows_per_block):
        stop = min(start + rows_per_block, rows.stop)
        yield start, products(left[start:stop], right, out=block[: stop - start])


def products(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right.T`` in the precision of its rows. Under autocast bfloat16 would round differences away."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.mm(left, right.T, out=out)


def unit_rows_with_gradient(rows: Tensor) -> Tensor:
    """Scale float32 or float64 rows ``[B, d]`` to length 1, in a differentiable way.

    All-zero rows stay zero. Unlike ``torch.nn.functional.normalize``, it gives them an ordinary gradient, not 1e12.
    """
    largest = _largest(rows.detach())
    rows = rows * torch.where(largest > 0, _scales(largest), 1)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1)


def _scales(largest: Tensor) -> Tensor:
    """Return the power of two, ``[..., 1]``, that scales each row's largest number to between 0.5 and 1.

    Such a scaling is exact, and then the length of a row of very large or small numbers neither overflows nor vanishes.
    """
    most = 1022 if largest.dtype == torch.float64 else 126  # 2 to this power, and its inverse, are normal numbers
    return torch.exp2((-1 - largest.log2().floor()).clamp(-most, most))  # MPS lacks `torch.frexp`


def _largest(rows: Tensor) -> Tensor:
    """Return each row's largest absolute value, ``[..., 1]``, or NaN if a row holds one."""
    # `torch.linalg.vector_norm(ord=inf)` takes ten times as long on a CPU, and `rows.abs()` would be a second copy.
    return torch.maximum(rows.amax(dim=-1, keepdim=True), -rows.amin(dim=-1, keepdim=True))
