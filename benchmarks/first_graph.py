"""How long the first graph of pynndescent takes in a process, and what compiling it ahead costs training.

    python -m benchmarks.first_graph

Each row is a new process that trains a small network and builds two graphs of 5,120 instances:

- compiled: numba finds nothing on disk, so the first graph compiles pynndescent's kernels.
- on disk: the kernels are those that the process before has left.
- compiled ahead: numba finds nothing on disk. The kernels are compiled in a process of their own while steps train, and
  the first graph comes after it has ended. "Step ratio" is a step's median seconds meanwhile, by those afterwards.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise

import torch
from torch import nn

from bs_lightning import NNDescentGraph, _nndescent

from .markdown import print_row


def step(network: nn.Module) -> float:
    """Train one step, and return its seconds."""
    start = time.perf_counter()
    network(torch.rand(64, 3, 32, 32)).square().mean().backward()
    return time.perf_counter() - start


def measure(row: str, threads: int) -> None:
    """Build two graphs, and print a row."""
    torch.set_num_threads(threads)
    channels = (3, 64, 64, 64, 64)
    layers = [nn.Conv2d(before, after, 3) for before, after in pairwise(channels)]
    network = nn.Sequential(*layers)
    embeddings = torch.randn(5120, 128)
    graph = NNDescentGraph()
    meanwhile = []
    if row == "compiled ahead":
        graph.prepare(len(embeddings), embeddings)
        importer = _nndescent._importer
        assert importer is not None
        while importer.is_alive():
            meanwhile.append(step(network))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        graph(embeddings)
        seconds.append(time.perf_counter() - start)
    afterwards = [step(network) for _ in range(30)]
    values = {
        "kernels": row,
        "torch's threads": threads,
        "first graph, seconds": seconds[0],
        "second graph, seconds": seconds[1],
        "seconds compiled ahead": sum(meanwhile) if meanwhile else "",
        "step ratio": statistics.median(meanwhile) / statistics.median(afterwards) if meanwhile else "",
    }
    print_row(values, with_header=row == "compiled")


def main() -> None:
    """Measure each row in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        measure(args.row, args.threads)
        return
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for row, folder in (("compiled", first), ("on disk", first), ("compiled ahead", second)):
            command = [sys.executable, "-m", "benchmarks.first_graph", "--row", row, "--threads", str(args.threads)]
            subprocess.run(["env", f"NUMBA_CACHE_DIR={folder}", *command], check=True)


if __name__ == "__main__":
    main()
