"""How hard the batches of pools of several sizes are, and what graph and walk cost.

    python benchmarks/pools.py --embeddings embeddings.npz

The file holds `z`, floats [N, d], and `y`, integers [N]. FN is the in-batch false-negative rate, TN the mean cosine
similarity of true negatives. Seconds are for one epoch of `--instances`, medians over the repeats; compiling is left
out.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numba
import numpy as np
import torch

from bs_lightning import ExactGraph, NNDescentGraph, _walk_kernel, rwr_batches
from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, help="an .npz file with z [N, d] and y [N]")
    parser.add_argument("--pool-sizes", type=int, nargs="+", default=[1024, 2560, 5120, 25600])
    parser.add_argument("--exact-up-to", type=int, default=5120, help="largest pool for ExactGraph")
    parser.add_argument("--instances", type=int, default=25600)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-neighbors", type=int, default=15)
    parser.add_argument("--restart-probability", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=int, default=_walk_kernel.PATIENCE, help="idle steps before a new root")
    return parser.parse_args()


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def row(name, pool_size, fn, tn, seconds=()):
    graph, walk, python = ([f"{value:.3f}" for value in seconds] + [""] * 3)[:3]
    ratio = f"{seconds[2] / seconds[1]:.0f}x" if seconds else ""
    print(f"| {name} | {pool_size} | {fn:.3f} | {tn:.3f} | {graph} | {walk} | {python} | {ratio} |", flush=True)


def epoch(z, y, order, pool_size, graph, args):
    """One epoch's FN, TN, and seconds for the graphs, the walks and the plain Python walks."""
    pools = order[: len(order) // pool_size * pool_size].reshape(-1, pool_size)
    graphs, graph_seconds = timed(lambda: [graph(z[pool], seed=number) for number, pool in enumerate(pools)])
    alpha = {"restart_probability": args.restart_probability}
    walked, walk_seconds = timed(
        lambda: [rwr_batches(each, args.batch_size, seed=number, **alpha) for number, each in enumerate(graphs)]
    )
    alpha["patience"] = args.patience
    as_lists = [each.tolist() for each in graphs]
    slow, python_seconds = timed(
        lambda: [reference.rwr_batches(each, args.batch_size, seed=i, **alpha) for i, each in enumerate(as_lists)]
    )
    assert [batches.tolist() for batches in walked] == slow
    fn, tn = InBatchFalseNegativeRate(), InBatchHardness()
    for pool, batches in zip(pools, walked, strict=True):
        for batch in pool[batches]:
            fn.update(y[batch])
            tn.update(z[batch], y[batch])
    return fn.compute().item(), tn.compute().item(), graph_seconds, walk_seconds, python_seconds


def main():
    args = arguments()
    # numba compiles globals in as constants, and what it has cached knows the old one.
    _walk_kernel.PATIENCE = args.patience
    _walk_kernel.walk_batches = numba.njit(_walk_kernel.walk_batches.py_func)

    data = np.load(args.embeddings)
    z = torch.nn.functional.normalize(torch.from_numpy(data["z"].astype(np.float32)), dim=1)
    y = torch.from_numpy(data["y"].astype(np.int64))
    orders = [np.random.default_rng(seed).permutation(len(z))[: args.instances] for seed in range(args.repeats)]

    for graph in (NNDescentGraph(args.n_neighbors), ExactGraph(args.n_neighbors)):  # compiles
        rwr_batches(graph(z[: 4 * args.batch_size]), args.batch_size)

    print("| graph | pool | FN | TN | graph, s | walk, s | walk in Python, s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    fn, tn = InBatchFalseNegativeRate(), InBatchHardness()
    for batch in orders[0][: args.instances // args.batch_size * args.batch_size].reshape(-1, args.batch_size):
        fn.update(y[batch])
        tn.update(z[batch], y[batch])
    row("uniform batches", "", fn.compute().item(), tn.compute().item())
    for pool_size in args.pool_sizes:
        for graph in (NNDescentGraph(args.n_neighbors), ExactGraph(args.n_neighbors)):
            if isinstance(graph, ExactGraph) and pool_size > args.exact_up_to:
                continue
            results = [epoch(z, y, order, pool_size, graph, args) for order in orders]
            fn, tn, *seconds = (statistics.median(values) for values in zip(*results, strict=True))
            row(type(graph).__name__, pool_size, fn, tn, seconds)


if __name__ == "__main__":
    main()
