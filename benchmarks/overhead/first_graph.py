"""How long the first graph of pynndescent takes in a process, and what compiling it ahead costs training.

Each row is a new process that trains a small network and builds two graphs of 5,120 instances:

- compiled: numba finds nothing on disk, so the first graph compiles pynndescent's kernels.
- on disk: the kernels are those that the process before has left.
- compiled ahead: numba finds nothing on disk. The kernels are compiled in a process of their own while steps train, and
  the first graph comes after it has ended. "Step ratio" is a step's median seconds meanwhile, by those afterwards.

Training runs on the CPU, whatever the device.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from bs_lightning import NNDescentGraph, _nndescent

from ..csv_files import Row
from ..processes import in_new_process


def step(network: nn.Module) -> float:
    """Train one step, and return its seconds."""
    start = time.perf_counter()
    network(torch.rand(64, 3, 32, 32)).square().mean().backward()
    return time.perf_counter() - start


def measure(kernels: str, threads: int) -> Row:
    """Build two graphs, and return a row."""
    torch.set_num_threads(threads)
    channels = (3, 64, 64, 64, 64)
    layers = [nn.Conv2d(before, after, 3) for before, after in pairwise(channels)]
    network = nn.Sequential(*layers)
    embeddings = torch.randn(5120, 128)
    graph = NNDescentGraph()
    meanwhile = []
    if kernels == "compiled ahead":
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
    return {
        "kernels": kernels,
        "threads": threads,
        "first graph, seconds": seconds[0],
        "second graph, seconds": seconds[1],
        "seconds compiled ahead": sum(meanwhile) if meanwhile else "",
        "step ratio": statistics.median(meanwhile) / statistics.median(afterwards) if meanwhile else "",
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: this command has none of its own."""


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure each row in a process of its own."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for kernels, folder in (("compiled", first), ("on disk", first), ("compiled ahead", second)):
            os.environ["NUMBA_CACHE_DIR"] = folder  # a new process reads it before it imports numba
            yield in_new_process(measure, kernels, args.threads)
