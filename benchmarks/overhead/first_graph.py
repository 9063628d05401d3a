"""How long the first graph of pynndescent takes in a process, and what compiling it ahead costs training.

Each row is a new process that trains a small network and builds two graphs of 5,120 instances:

- compiled: numba finds nothing on disk, so the first graph compiles pynndescent's kernels.
- on disk: the kernels are those that the process before has left.
- compiled ahead: numba finds nothing on disk, and the kernels are compiled in a process of their own. The first graph
  comes after it has ended. Before, steps train while that process goes on, and while it is paused, in turn. "Ratio" is
  the time of the former by the latter, pair by pair. "From" and "to" are a 95% interval of its median.

Training runs on the CPU, whatever the device.
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from bs_lightning import NNDescentGraph, _nndescent

from ..csv_files import Row
from ..processes import in_new_process
from .ratios import ratio_columns

PAIRS = 60


def train(network: nn.Module) -> float:
    """Train ten steps, and return their seconds."""
    start = time.perf_counter()
    for _ in range(10):
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
    slowed: Row = {"ratio": "", "from": "", "to": ""}
    if kernels == "compiled ahead":
        graph.prepare(len(embeddings), embeddings)
        compiler, importer = _nndescent._compiler, _nndescent._importer
        assert compiler is not None
        assert importer is not None
        pairs = []
        for _ in range(PAIRS):
            compiler.send_signal(signal.SIGCONT)
            meanwhile = train(network)
            compiler.send_signal(signal.SIGSTOP)
            pairs.append((meanwhile, train(network)))
        slowed = ratio_columns([meanwhile / alone for meanwhile, alone in pairs])
        compiler.send_signal(signal.SIGCONT)
        importer.join()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        graph(embeddings)
        seconds.append(time.perf_counter() - start)
    return {
        "kernels": kernels,
        "threads": threads,
        "first graph, seconds": seconds[0],
        "second graph, seconds": seconds[1],
        **slowed,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: this command has none of its own."""


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure each row in a process of its own."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for kernels, folder in (("compiled", first), ("on disk", first), ("compiled ahead", second)):
            os.environ["NUMBA_CACHE_DIR"] = folder  # a new process reads it before it imports numba
            yield in_new_process(measure, kernels, args.threads)
