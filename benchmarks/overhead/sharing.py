"""Several processes build a graph together, over gloo, with one thread each."""

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, multiprocessing

from bs_lightning import NNDescentGraph
from bs_lightning._nndescent import shared_cores
from bs_lightning.graphs import SharedGraph

WARMUPS = 2  # graphs that are not counted


def build(rank: int, world_size: int, address: str, z: Tensor, n_graphs: int, neighbors: Tensor, results: Any) -> None:
    """Build graphs together with other processes, and put each one's median seconds and processor seconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    graph: SharedGraph = NNDescentGraph()
    small = z[: 5000 * world_size]  # loads pynndescent's kernels, if they are needed
    seconds, processor = [], []
    for seed, embeddings in enumerate([small] * WARMUPS + [z] * n_graphs):
        torch.distributed.barrier()
        start, spent = time.perf_counter(), time.process_time()
        with shared_cores(1):
            part = graph.part(embeddings, rank, world_size, seed=seed)
        spent = time.process_time() - spent  # a process that waits for the others takes time, too
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, part)
        if rank == 0:
            found = graph.join(parts, embeddings, seed=seed)
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - start)
        processor.append(spent)
    if rank == 0:
        neighbors[:] = torch.from_numpy(found)
    results.put((rank, statistics.median(seconds[WARMUPS:]), statistics.median(processor[WARMUPS:])))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def build_together(z: Tensor, world_size: int, n_graphs: int) -> tuple[float, float, NDArray[np.int32]]:
    """Return the seconds of all, the most processor seconds of one process's part, and a graph, int32 ``[N, 15]``."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    neighbors = torch.empty(len(z), NNDescentGraph().n_neighbors, dtype=torch.int32).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        given = (world_size, f"file://{folder}/store", z.share_memory_(), n_graphs, neighbors, results)
        multiprocessing.spawn(build, given, nprocs=world_size)  # type: ignore[attr-defined,no-untyped-call]
    measured = [results.get() for _ in range(world_size)]
    wall = next(wall for rank, wall, _ in measured if rank == 0)
    return wall, max(spent for _, _, spent in measured), neighbors.numpy()
