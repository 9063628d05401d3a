"""How the cost of planning grows with the dataset, the pool, the width of embeddings and the number of processes.

A trivial encoder looks embeddings up: rows of the embeddings file, again and again. A figure is the time of all
planning, graph and walk and what the sampler does with them, by the number of instances served. One value changes at a
time; the others are N = 200,000, P = 4,096, d = 128 and one process. Memory is the growth of the peak of a process of
its own. Several processes share the graph, over gloo, with one thread each.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_lightning import NNDescentGraph, PlannedPool, Planning, PoolBatchSampler, Pools, rwr_batches

from ..csv_files import Row
from ..processes import in_new_process, measured
from .sharing import build_together

N, P, D = 200_000, 4096, 128
BATCH_SIZE = 256
SERVED = 65_536  # instances that a measurement serves at least
SWEEPS: dict[str, tuple[int, ...]] = {
    "N": (12_288, 102_400, 1_024_000, 10_240_000),  # whole pools: near-equal ones may be larger than P
    "P": (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, N),
    "d": (64, 128, 256, 512, 1024),
    "d in pools of 16,384": (64, 128, 256, 512, 1024),
    "processes": (1, 2, 4),
}


def widened(z: Tensor, d: int) -> Tensor:
    """Return rows of width ``d``: the first columns, or random projections if there are not as many."""
    if d <= z.shape[1]:
        return z[:, :d].contiguous()
    return z @ torch.randn(z.shape[1], d, generator=torch.Generator().manual_seed(0))


class Planner:
    """Looks a pool's embeddings up and composes its batches."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def __call__(self, indices: np.ndarray[Any, np.dtype[np.int64]], *, seed: int, epoch: int) -> PlannedPool:
        neighbors = NNDescentGraph()(self.z[torch.from_numpy(indices % len(self.z))], seed=seed)
        return PlannedPool(rwr_batches(neighbors, BATCH_SIZE, seed=seed))


def serve(planner: Planner, n_instances: int, pool_size: int) -> float:
    """Serve whole pools, and return the seconds per instance."""
    pool_size = min(pool_size, n_instances) // BATCH_SIZE * BATCH_SIZE
    sampler = PoolBatchSampler(n_instances, BATCH_SIZE, planning=Planning(planner, Pools(pool_size)))
    n_pools = max(SERVED // pool_size, 1)
    served = 0
    start = time.perf_counter()
    while served < n_pools * pool_size:
        for batch in sampler:
            served += len(batch)
            if served == n_pools * pool_size:
                break
    return (time.perf_counter() - start) / served


def peak_growth(n_instances: int, z: Tensor) -> int:
    """Return the bytes by which a process's peak grows while it serves pools."""
    planner = Planner(z)
    serve(planner, 2 * P, P)  # loads kernels
    return measured(lambda: serve(planner, n_instances, P))[2]


def measure(sweep: str, value: int, z: Tensor) -> Row:
    """Return a row of the table."""
    row = {"what grows": sweep, "value": value, "µs per instance": 0.0, "peak growth, MB": "", "processor µs": ""}
    if sweep == "processes":
        wall, processor, _ = build_together(z[:P].clone(), value, n_graphs=6)
        return row | {"µs per instance": wall / P * 1e6, "processor µs": round(processor / P * 1e6, 2)}
    if sweep == "N":
        row["peak growth, MB"] = round(in_new_process(peak_growth, value, z) / 2**20, 1)
    n_instances = value if sweep == "N" else N
    pool_size = {"P": value, "d in pools of 16,384": 16_384}.get(sweep, P)
    planner = Planner(widened(z, value if sweep.startswith("d") else D))
    serve(planner, n_instances, pool_size)  # loads kernels
    return row | {"µs per instance": statistics.median(serve(planner, n_instances, pool_size) for _ in range(3)) * 1e6}


def plot(rows: list[Row], file: Path) -> None:
    """Draw a panel for each sweep."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for panel, sweep in zip(panels, ("N", "P", "d", "processes"), strict=True):
        for name in SWEEPS:
            if not name.startswith(sweep):
                continue
            drawn = [row for row in rows if row["what grows"] == name]
            label = {"d": "pools of 4,096", "processes": "time of all"}.get(name, name.removeprefix("d in "))
            panel.plot(*zip(*((row["value"], row["µs per instance"]) for row in drawn), strict=True), "o-", label=label)
        if sweep == "processes":
            spent = [(row["value"], row["processor µs"]) for row in rows if row["what grows"] == sweep]
            panel.plot(*zip(*spent, strict=True), "o--", label="processor time of each")
        if sweep in ("d", "processes"):
            panel.legend(frameon=False)
        panel.set(xlabel=sweep, ylim=(0, 1.1 * panel.dataLim.y1))
        if sweep == "processes":
            panel.set_xticks(SWEEPS[sweep])
        else:
            panel.set_xscale("log")
    panels[0].set_ylabel("µs per instance")
    figure.savefig(file, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--plot", type=Path, help="the picture to write")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure each sweep, and draw them all at the end."""
    z = torch.from_numpy(np.load(args.embeddings)["z"].astype(np.float32))
    drawn = []
    for sweep, values in SWEEPS.items():
        for value in values:
            drawn.append(measure(sweep, value, z))
            yield drawn[-1]
    if args.plot:
        plot(drawn, args.plot)
