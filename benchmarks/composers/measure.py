"""The data, and what is measured of batches: hardness, false negatives, time and memory."""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness

Batches = NDArray[np.int64]
Result = TypeVar("Result")


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


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a new process, so that its memory peak is not an earlier call's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def compose(composer: Any, z: Tensor, batch_size: int) -> tuple[Batches, float, int]:
    """Return the batches of an epoch, the seconds they took, and the growth of memory in bytes.

    The kernels are compiled first, on a small slice.
    """
    z = z[: len(z) // batch_size * batch_size]
    inner = getattr(composer, "composer", composer)  # a pool may be larger than the slice
    few = max(4, 1024 // batch_size) * batch_size
    inner(z[: min(few, getattr(composer, "pool_size", few))], batch_size, seed=0, epoch=0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start = time.perf_counter()
    batches = composer(z, batch_size, seed=0, epoch=0)
    return batches, time.perf_counter() - start, memory("VmHWM") - before


def memory(field: str) -> int:
    """Return the process's memory in bytes: now ("VmRSS") or at its peak ("VmHWM"). On Linux only."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].removesuffix("kB")) * 1024


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
