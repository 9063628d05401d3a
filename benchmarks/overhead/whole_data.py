"""Encode, graph and walk for pools as large as a dataset, and how fast other libraries find the same neighbours.

Datasets larger than the embeddings file are made from it: each row lies between a row of the file and one of its 15
nearest. So neighbours are found as in the file, and no two rows are equal. Recall@15 is counted on 1,000 rows. The
product's seconds are those of 1,000 rows, times N / 1,000. faiss and hnswlib are measured if they are installed: at the
first of a few settings whose recall is at most 0.005 below pynndescent's, or at the last. A library is measured in a
process of its own, after the kernels are loaded. Bytes are the growth of that process's peak, by N. The embeddings are
not counted in them where they come from the file. "shared" is the default graph, built by several processes with one
thread each; "processor s" is what the slowest of them takes for its part.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bs_lightning import BatchFetcher, NNDescentGraph, encode, rwr_batches

from ..csv_files import Row
from ..processes import in_new_process, measured
from .model import Images, SimCLR, as_loaded
from .sharing import build_together

K = 15
SAMPLED = 1000
Rows = NDArray[np.int64]


def grown(file: str, size: int) -> Tensor:
    """Return embeddings of as many instances, float32 ``[size, d]``, rows of length 1."""
    z = nn.functional.normalize(torch.from_numpy(np.load(file)["z"].astype(np.float32)), dim=1)
    if size <= len(z):
        return z[:size]
    rng = torch.Generator().manual_seed(0)
    neighbors = torch.from_numpy(NNDescentGraph(K)(z).astype(np.int64))
    large = torch.empty(size, z.shape[1])
    for part in large.split(100_000):  # a view of each part
        base = torch.randint(len(z), (len(part),), generator=rng)
        other = neighbors[base, torch.randint(K, (len(part),), generator=rng)]
        part[:] = torch.lerp(z[base], z[other], torch.rand(len(part), 1, generator=rng))
    return nn.functional.normalize(large, dim=1, out=large)


def nearest(z: Tensor, rows: Rows) -> Rows:
    """Return the exact nearest neighbours of some rows, int64 ``[len(rows), K]``."""
    found = []
    for some in torch.from_numpy(rows).split(100):
        similarity = z[some] @ z.T
        similarity[torch.arange(len(some)), some] = -torch.inf
        found.append(similarity.topk(K, dim=1).indices)
    return torch.cat(found).numpy()


def recall(found: NDArray[Any], rows: Rows, true: Rows) -> float:
    """Return the mean share of true neighbours that were found, the row itself left out."""
    hits = [len(set(found[row]) & set(neighbors)) for row, neighbors in zip(rows, true, strict=True)]
    return float(np.mean(hits)) / K


def by_pynndescent(z: Tensor) -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
    """Yield the default graph."""
    yield "", lambda: NNDescentGraph(K)(z)


def by_faiss(z: Tensor) -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
    """Yield faiss's inverted file with more and more of its lists probed, and its graph."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = z.numpy()

    def inverted_file(n_probed: int) -> NDArray[Any]:
        n_lists = int(4 * len(rows) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(z.shape[1]), z.shape[1], n_lists, faiss.METRIC_INNER_PRODUCT)
        index.train(rows[:: max(len(rows) // (40 * n_lists), 1)])
        index.add(rows)
        index.nprobe = n_probed
        found: NDArray[Any] = index.search(rows, K + 1)[1]
        return found

    for n_probed in (4, 8, 16, 32):
        yield f"IVF, nprobe {n_probed}", lambda n_probed=n_probed: inverted_file(n_probed)  # type: ignore[misc]


def by_hnswlib(z: Tensor) -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
    """Yield hnswlib's graph with longer and longer candidate lists."""
    import hnswlib

    def hnsw(ef: int) -> NDArray[Any]:
        index = hnswlib.Index("ip", z.shape[1])
        index.init_index(len(z), M=16, ef_construction=2 * ef)
        index.set_num_threads(torch.get_num_threads())
        index.add_items(z.numpy())
        index.set_ef(ef)
        found: NDArray[Any] = index.knn_query(z.numpy(), K + 1)[0]
        return found

    for ef in (24, 48, 96):
        yield f"M 16, ef {ef}", lambda ef=ef: hnsw(ef)  # type: ignore[misc]


LIBRARIES = {"pynndescent": by_pynndescent, "faiss": by_faiss, "hnswlib": by_hnswlib}


def measure(library: str, size: int, args: argparse.Namespace, goal: float) -> list[Row]:
    """Return a row for each setting that is tried, until one reaches the goal."""

    def row(seconds: float, growth: int | None, setting: str = "", share: float | str = "") -> Row:
        return {
            "N": size,
            "what": library,
            "setting": setting,
            "threads": args.threads,
            "seconds": seconds,
            "recall@15": share,
            "bytes per instance": "" if growth is None else round(growth / size),
            "processor s": "",
        }

    torch.set_num_threads(args.threads)
    if library == "encode":
        size_of_file = 8192
        images: Any = BatchFetcher(Images(size_of_file), collate_fn=as_loaded)
        network = SimCLR().eval()
        network(torch.rand(256, 3, 32, 32))  # chooses kernels
        indices = (np.arange(size) % size_of_file).tolist()
        _, seconds, growth = measured(lambda: encode(indices, images, network, batch_size=256))
        return [row(seconds, growth)]
    NNDescentGraph(K)(torch.randn(5000, 128))  # loads kernels, and starts numba's threads
    numba.set_num_threads(args.threads)
    z = grown(args.embeddings, size)
    if library == "walk":
        n = size // 256 * 256
        neighbors = NNDescentGraph(K)(z)[:n] % n
        rwr_batches(neighbors[:2560] % 2560, 256)  # loads the kernel
        _, seconds, growth = measured(lambda: rwr_batches(neighbors, 256))
        return [row(seconds, growth)]
    sampled = np.random.default_rng(0).choice(size, SAMPLED, replace=False)
    if library == "product":
        _, seconds, _ = measured(lambda: nearest(z, sampled))
        return [row(seconds * size / SAMPLED, None, "extrapolated", 1.0)]
    rows = []
    if library == "shared":
        true = nearest(z, sampled)
        for n_processes in (1, 2, 4):
            seconds, processor, found = build_together(z, n_processes, n_graphs=1)
            rows.append(row(seconds, None, f"{n_processes} processes", recall(found, sampled, true)))
            rows[-1] |= {"threads": 1, "processor s": round(processor, 2)}
        return rows
    exact: Rows | None = None
    for setting, build in LIBRARIES[library](z):
        found, seconds, growth = measured(build)
        exact = nearest(z, sampled) if exact is None else exact
        rows.append(row(seconds, growth, setting, recall(found, sampled, exact)))
        if rows[-1]["recall@15"] >= goal - 0.005:
            break
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 500_000, 1_280_000])
    parser.add_argument("--only", nargs="+", default=["encode", "walk", "product", "shared", *LIBRARIES])


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure every library at every size, and yield a row for each setting that was tried."""
    for size in args.sizes:
        goal = 0.0
        for library in args.only:
            if library in ("faiss", "hnswlib") and importlib.util.find_spec(library) is None:
                continue
            for row in in_new_process(measure, library, size, args, goal):
                if library == "pynndescent":
                    goal = row["recall@15"]
                yield row
