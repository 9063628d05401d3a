"""`paper`: `RandomCandidateGraph` against the graph as the paper's public code builds it."""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import RandomCandidateGraph, rwr_batches

from .. import csv_files
from ..csv_files import Row
from ..markdown import print_row, title
from . import measure


def gathered_graph(
    z: Tensor, *, seed: int, n_candidates: int = 1000, n_neighbors: int = 100, n_blocks: int = 20
) -> NDArray[np.int32]:
    """Gather the candidates of each instance, a block of rows at a time; the paper's public code uses 20 blocks."""
    generator = torch.Generator().manual_seed(seed)
    neighbors = torch.empty(len(z), n_neighbors, dtype=torch.int64)
    for own in torch.arange(len(z)).chunk(n_blocks):
        candidates = torch.randint(len(z) - 1, (len(own), n_candidates), generator=generator)
        candidates += candidates >= own[:, None]  # an instance is never its own candidate
        similarity = torch.bmm(z[candidates], z[own][:, :, None]).squeeze(2)
        neighbors[own] = candidates.gather(1, similarity.topk(n_neighbors, dim=1).indices)
    return neighbors.int().numpy()


def graph_row(neighbors: NDArray[np.int32], z: Tensor, y: Tensor | None, batch_size: int, seed: int) -> Row:
    """Describe a graph and an epoch of walks on it; the reach counts the distinct nodes that two edges lead to."""
    batches = rwr_batches(neighbors, batch_size, seed=seed, replacement=True)
    found = measure.describe(batches, z, y)
    in_degrees = np.bincount(neighbors.ravel(), minlength=len(z))
    nodes = np.random.default_rng(0).permutation(len(z))[:2000]
    return {
        "hardness": found["hardness"],
        "false_negative_rate": found["false_negative_rate"],
        "seen": len(np.unique(batches)) / len(z),
        "least_in_degree": int(in_degrees.min()),
        "greatest_in_degree": int(in_degrees.max()),
        "standard_deviation_of_in_degrees": float(in_degrees.std()),
        "instances_without_in_edge": int((in_degrees == 0).sum()),
        "two_step_reach": float(np.mean([len(np.unique(neighbors[neighbors[node]])) for node in nodes])),
    }


def run(args: argparse.Namespace) -> None:
    """Build each graph `--repeats` times, keep a row per graph and seed, and print the means."""
    z, y = measure.load(args)
    builders: dict[str, Callable[..., NDArray[np.int32]]] = {
        "RandomCandidateGraph": RandomCandidateGraph(1000, 100),
        "gathered": gathered_graph,
        "gathered, small blocks": partial(gathered_graph, n_blocks=len(z) // 32),  # the fastest size here
    }
    rows: dict[str, list[Row]] = {name: [] for name in builders}
    for build in builders.values():
        rwr_batches(build(z[:2048], seed=0), args.batch_size)  # compiles
    for seed in range(args.repeats):
        for name, build in builders.items():
            start = time.perf_counter()
            neighbors = build(z, seed=seed)
            seconds = time.perf_counter() - start
            rows[name].append({"seconds": seconds, **graph_row(neighbors, z, y, args.batch_size, seed)})
            settings = {"graph": name, "instances": len(z), "batch_size": args.batch_size, "seed": seed}
            csv_files.append(args.results / "paper.csv", settings | rows[name][-1])
    for measured, first in rows["gathered"][0].items():
        if first != "":
            row = {f"mean ± deviation of {args.repeats}": title(measured)}
            fast, *slow = ([each[measured] for each in of_graph] for of_graph in rows.values())
            row |= {name: spread(values) for name, values in zip(builders, (fast, *slow), strict=True)}
            row["ratios"] = ", ".join(spread(np.divide(values, fast)) for values in slow) if all(fast) else ""
            print_row(row, with_header=measured == "seconds")


def spread(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Return the mean and, of more than one value, the standard deviation."""
    return f"{np.mean(values):.4g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")
