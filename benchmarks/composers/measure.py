"""The data, and what is measured of batches: hardness, false negatives, time and memory."""

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness

from ..processes import measured

Batches = NDArray[np.int64]


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """Return the embeddings, normalised, and the labels or None."""
    data = np.load(args.embeddings)
    z = torch.from_numpy(data["z"][: args.instances].astype(np.float32))
    n_candidates = 0 if args.command == "table" else 1000  # of the graph that `paper` and `escape` build
    least = max(2 * args.batch_size, n_candidates + 2)
    if len(z) < least:
        source = f"--embeddings {args.embeddings}" + (f" --instances {args.instances}" if args.instances else "")
        raise SystemExit(
            f"{source} has {len(z)} rows, but `{args.command}` needs {least}: two batches of "
            f"--batch-size {args.batch_size}{f' and more than {n_candidates} candidates' if n_candidates else ''}. "
            "Give more rows, or a smaller --batch-size."
        )
    y = torch.from_numpy(data["y"][: args.instances].astype(np.int64)) if "y" in data else None
    return torch.nn.functional.normalize(z, dim=1), y


def mixture(size: int, d: int = 128, n_components: int = 1000) -> Tensor:
    """Return normalised rows from a mixture of Gaussians."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(n_components, d, generator=generator)
    z = torch.randn(size, d, generator=generator)
    for block in z.split(10_000):
        block += means[torch.randint(n_components, (len(block),), generator=generator)]
        block /= block.norm(dim=1, keepdim=True)
    return z


def compose(composer: Any, z: Tensor, batch_size: int) -> tuple[Batches, float, int]:
    """Return the batches of an epoch, the seconds they took, and the growth of memory in bytes.

    The kernels are compiled first, on a small slice.
    """
    z = z[: len(z) // batch_size * batch_size]
    inner = getattr(composer, "composer", composer)  # a pool may be larger than the slice
    few = max(4, 1024 // batch_size) * batch_size
    inner(z[: min(few, getattr(composer, "pool_size", few))], batch_size, seed=0, epoch=0)
    return measured(lambda: composer(z, batch_size, seed=0, epoch=0))


def describe(batches: Batches, z: Tensor, y: Tensor | None, temperature: float = 0.5) -> dict[str, Any]:
    """Return the columns of hardness, false negatives and root similarity; without labels some are empty."""
    false_negative_rate, hardness = InBatchFalseNegativeRate(), InBatchHardness()
    masses, roots = [], []
    for batch in batches:
        hardness.update(z[batch], None if y is None else y[batch])
        similarity = z[batch] @ z[batch].T
        roots.append(similarity[0, 1:].mean().item())
        if y is not None:
            false_negative_rate.update(y[batch])
            mass = (similarity / temperature).fill_diagonal_(-torch.inf).softmax(dim=1)
            masses.append((mass * (y[batch][:, None] == y[batch])).sum(dim=1).mean().item())
    return {
        "hardness": hardness.compute().item(),
        "false_negative_rate": "" if y is None else false_negative_rate.compute().item(),
        "false_negative_mass": "" if y is None else float(np.mean(masses)),
        "root_similarity": float(np.mean(roots)),
    }
