"""How much memory the batch sampler needs for a large dataset: growth of the process's peak after the imports.

python -m benchmarks.memory
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bs_lightning import PlannedPool, Planning, PoolBatchSampler, Pools, rwr_batches

BATCH_SIZE = 256


def resident_mb() -> float:
    """Return the memory that the process holds now, in MB; on Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mb() -> float:
    """Return the most memory that the process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(kind: str, n_instances: int, pool_size: int, n_pools: int) -> None:
    """Print a table row: the growth of the peak while the sampler serves the batches of some pools."""

    def plan_pool(indices: NDArray[np.int64], *, seed: int, epoch: int) -> PlannedPool:
        graph = np.random.default_rng(seed).integers(0, len(indices), (len(indices), 15), dtype=np.int32)
        return PlannedPool(rwr_batches(graph, BATCH_SIZE, seed=seed))

    plan_pool(np.arange(pool_size), seed=0, epoch=0)  # loads the kernel
    before = resident_mb()
    planning = None if kind == "uniform" else Planning(plan_pool, Pools(pool_size))
    sampler = PoolBatchSampler(n_instances, BATCH_SIZE, planning=planning)
    for _, batch in zip(range(n_pools * pool_size // BATCH_SIZE), sampler, strict=False):
        assert len(set(batch)) == BATCH_SIZE
    print(f"| {kind} | {peak_mb() - before:.0f} |", flush=True)


def main() -> None:
    """Measure walked and uniform batches, each in a new process: a process's peak never falls."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--instances", type=int, default=10_000_000, help="size of the dataset")
    parser.add_argument("--pool-size", type=int, default=4096)
    parser.add_argument("--pools", type=int, default=50, help="how many pools to serve")
    parser.add_argument("--kind", choices=["pools", "uniform"], help="measure only this kind, in this process")
    args = parser.parse_args()
    if args.kind is not None:
        measure(args.kind, args.instances, args.pool_size, args.pools)
        return
    print("| batches | peak growth, MB |\n|---|---|", flush=True)
    for kind in ("pools", "uniform"):
        subprocess.run([sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--kind", kind], check=True)


if __name__ == "__main__":
    main()
