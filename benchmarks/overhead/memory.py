"""How much memory the batch sampler needs for a large dataset.

A row is the growth of a process's peak while it serves the batches of some pools, after everything is loaded.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bs_lightning import PlannedPool, Planning, PoolBatchSampler, Pools, rwr_batches

from ..csv_files import Row
from ..processes import in_new_process, measured

BATCH_SIZE = 256


def peak_growth(kind: str, n_instances: int, pool_size: int, n_pools: int) -> int:
    """Return the bytes by which the peak grows while the sampler serves the batches of some pools."""

    def plan_pool(indices: NDArray[np.int64], *, seed: int, epoch: int) -> PlannedPool:
        graph = np.random.default_rng(seed).integers(0, len(indices), (len(indices), 15), dtype=np.int32)
        return PlannedPool(rwr_batches(graph, BATCH_SIZE, seed=seed))

    def serve() -> None:
        planning = None if kind == "uniform" else Planning(plan_pool, Pools(pool_size))
        sampler = PoolBatchSampler(n_instances, BATCH_SIZE, planning=planning)
        for _, batch in zip(range(n_pools * pool_size // BATCH_SIZE), sampler, strict=False):
            assert len(set(batch)) == BATCH_SIZE

    plan_pool(np.arange(pool_size), seed=0, epoch=0)  # loads the kernel
    return measured(serve)[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--instances", type=int, default=10_000_000, help="size of the dataset")
    parser.add_argument("--pool-size", type=int, default=4096)
    parser.add_argument("--pools", type=int, default=50, help="how many pools to serve")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure walked and uniform batches, each in a new process."""
    for kind in ("pools", "uniform"):
        growth = in_new_process(peak_growth, kind, args.instances, args.pool_size, args.pools)
        yield {"batches": kind, "N": args.instances, "P": args.pool_size, "peak growth, MB": round(growth / 2**20, 1)}
