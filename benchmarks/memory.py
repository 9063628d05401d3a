"""What the sampler itself holds in memory over a large data set: peak resident memory above that after the imports.

python benchmarks/memory.py
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from bs_lightning import PlannedPool, Planning, PoolBatchSampler, Pools, rwr_batches

BATCH_SIZE = 256


def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # Linux
    return pages * resource.getpagesize() / 2**20


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(kind, n_instances, pool_size, n_pools):
    def plan_pool(indices, *, seed, epoch):
        graph = np.random.default_rng(seed).integers(0, len(indices), (len(indices), 15), dtype=np.int32)
        return PlannedPool(rwr_batches(graph, BATCH_SIZE, seed=seed))

    plan_pool(range(pool_size), seed=0, epoch=0)  # loads the kernel
    before = resident_mb()
    planning = None if kind == "uniform" else Planning(plan_pool, Pools(pool_size))
    sampler = PoolBatchSampler(n_instances, BATCH_SIZE, planning=planning)
    for _, batch in zip(range(n_pools * pool_size // BATCH_SIZE), sampler, strict=False):
        assert len(set(batch)) == BATCH_SIZE
    print(f"| {kind} | {peak_mb() - before:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10_000_000)
    parser.add_argument("--pool-size", type=int, default=4096)
    parser.add_argument("--pools", type=int, default=50)
    parser.add_argument("--kind", choices=["pools", "uniform"])
    args = parser.parse_args()
    if args.kind is not None:
        measure(args.kind, args.instances, args.pool_size, args.pools)
        return
    print("| batches | peak growth, MB |\n|---|---|", flush=True)
    for kind in ("pools", "uniform"):  # each in a process of its own: a peak never falls
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--kind", kind], check=True)


if __name__ == "__main__":
    main()
