"""How fast a matrix product and pynndescent build the graph of a pool, by the pool's size.

Both build the graph of the same random instances in turn. The product is computed on the device, pynndescent runs on
the CPU, and its seconds include the copy to it. The ratio is pynndescent's seconds by the product's, pair by pair.
"From" and "to" are a 95% interval of its median. Where the ratio is above 1, the product is faster. Pools larger than
the embeddings file are made from it as for ``whole-data``.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from bs_lightning import ExactGraph
from bs_lightning._embeddings import unit_rows
from bs_lightning._nndescent import descend

from ..csv_files import Row
from .ratios import ratio_columns
from .whole_data import SAMPLED, K, grown, recall


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 5120, 6144, 8192, 16_384])
    parser.add_argument("--rounds", type=int, default=11, help="pairs at each size")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Compare at each size."""
    descend(np.random.default_rng(0).standard_normal((5000, 128), dtype=np.float32), K + 1, 0)  # loads kernels
    every = grown(args.embeddings, max(50_000, *args.sizes)).to(args.device)
    for size in args.sizes:
        pairs = []
        for seed in range(args.rounds + 1):
            chosen = np.random.default_rng(seed).permutation(len(every))[:size]
            pool = every[torch.from_numpy(chosen).to(args.device)]
            if pool.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            exact = ExactGraph(K)(pool)
            between = time.perf_counter()
            found = descend(unit_rows(pool.cpu()).numpy(), K + 1, seed)
            pairs.append((between - start, time.perf_counter() - between))
        product, pynndescent = zip(*pairs[1:], strict=True)  # in the first one libraries start
        sampled = np.random.default_rng(0).choice(size, min(SAMPLED, size), replace=False)
        yield {
            "P": size,
            "threads": args.threads,
            "product seconds": statistics.median(product),
            "pynndescent seconds": statistics.median(pynndescent),
            **ratio_columns([slow / fast for fast, slow in pairs[1:]]),
            "recall@15": recall(found, sampled, exact[sampled].astype(np.int64)),
        }
