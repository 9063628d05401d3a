"""How hard the batches of pools of several sizes are, and how long the graph and the walk take.

    python -m benchmarks.pools --embeddings embeddings.npz

The file holds `z`, floats [N, d], and `y`, integers [N]. Hardness is the mean cosine similarity of true negatives. The
false-negative rate is the share of in-batch pairs with the same label. The seconds are for one epoch of `--instances`,
as medians over the repeats, without compilation.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning import ExactGraph, NNDescentGraph, _walk_kernel, rwr_batches
from bs_lightning.metrics import in_batch_false_negative_rate, in_batch_hardness
from tests import naive

from .command_line import make_parser
from .markdown import print_row

Result = TypeVar("Result")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("pools", __doc__)
    parser.add_argument("--embeddings", required=True, help="an .npz file with z [N, d] and y [N]")
    parser.add_argument("--pool-sizes", type=int, nargs="+", default=[1024, 2560, 5120, 25600])
    parser.add_argument("--exact-up-to", type=int, default=5120, help="largest pool for ExactGraph")
    parser.add_argument("--instances", type=int, default=25600, help="most instances in an epoch")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-neighbors", type=int, default=15)
    parser.add_argument("--restart-probability", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--patience", type=int, default=_walk_kernel.PATIENCE, help="steps without a new node, before a new root"
    )
    return parser.parse_args()


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """Return a function's result and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def describe(z: Tensor, y: Tensor, batches: NDArray[np.int64]) -> tuple[float, float]:
    """Return the hardness and the false-negative rate of batches ``[n, B]``."""
    return in_batch_hardness(z[batches], y[batches]).item(), in_batch_false_negative_rate(y[batches]).item()


def row(
    graph: str, pool_size: int | str, hardness: float, false_negative_rate: float, seconds: Sequence[float] = ()
) -> dict[str, Any]:
    """Return a row of the table; uniform batches take no seconds."""
    built, walked, walked_in_python = seconds or ("", "", "")
    return {
        "graph": graph,
        "pool size": pool_size,
        "hardness": hardness,
        "false-negative rate": false_negative_rate,
        "graph seconds": built,
        "walk seconds": walked,
        "seconds of walk in Python": walked_in_python,
        "ratio": f"{seconds[2] / seconds[1]:.0f}x" if seconds else "",
    }


def epoch(
    z: Tensor,
    y: Tensor,
    order: NDArray[np.int64],
    pool_size: int,
    graph: Callable[..., NDArray[np.int32]],
    args: argparse.Namespace,
) -> tuple[float, ...]:
    """Return an epoch's hardness, false-negative rate, and seconds of graphs, walks and walks in Python."""
    pools = order[: len(order) // pool_size * pool_size].reshape(-1, pool_size)
    graphs, graph_seconds = timed(lambda: [graph(z[pool], seed=number) for number, pool in enumerate(pools)])
    alpha = args.restart_probability
    walked, walk_seconds = timed(
        lambda: [
            rwr_batches(each, args.batch_size, restart_probability=alpha, seed=number)
            for number, each in enumerate(graphs)
        ]
    )
    as_lists = [each.tolist() for each in graphs]
    slow, python_seconds = timed(
        lambda: [
            naive.rwr_batches(each, args.batch_size, restart_probability=alpha, seed=number, patience=args.patience)
            for number, each in enumerate(as_lists)
        ]
    )
    assert [batches.tolist() for batches in walked] == slow
    batches = np.concatenate([pool[batches] for pool, batches in zip(pools, walked, strict=True)])
    return *describe(z, y, batches), graph_seconds, walk_seconds, python_seconds


def main() -> None:
    """Measure uniform batches, then each graph at each pool size."""
    args = arguments()
    # numba compiles this global as a constant, and its cache holds code with the default value.
    _walk_kernel.PATIENCE = args.patience
    _walk_kernel.walk_batches = numba.njit(_walk_kernel.walk_batches.py_func)  # type: ignore[attr-defined]

    data = np.load(args.embeddings)
    z = torch.nn.functional.normalize(torch.from_numpy(data["z"].astype(np.float32)), dim=1)
    y = torch.from_numpy(data["y"].astype(np.int64))
    orders = [np.random.default_rng(seed).permutation(len(z))[: args.instances] for seed in range(args.repeats)]
    graphs = (NNDescentGraph(args.n_neighbors), ExactGraph(args.n_neighbors))

    for graph in graphs:  # compiles
        rwr_batches(graph(z[: 4 * args.batch_size]), args.batch_size)

    whole = len(orders[0]) // args.batch_size * args.batch_size
    uniform = describe(z, y, orders[0][:whole].reshape(-1, args.batch_size))
    print_row(row("uniform batches", "", *uniform), with_header=True)
    for pool_size in (size for size in args.pool_sizes if size <= whole):
        for graph in graphs:
            if isinstance(graph, ExactGraph) and pool_size > args.exact_up_to:
                continue
            results = [epoch(z, y, order, pool_size, graph, args) for order in orders]
            hardness, false_negative_rate, *seconds = (statistics.median(each) for each in zip(*results, strict=True))
            print_row(row(type(graph).__name__, pool_size, hardness, false_negative_rate, seconds))


if __name__ == "__main__":
    main()
