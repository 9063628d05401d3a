"""Encode, graph and walk for pools as large as a dataset, and how fast other libraries find the same neighbours.

    python -m benchmarks.whole_data --embeddings embeddings.npz --sizes 50000 500000 1280000

The file holds `z`, floats [N, d]. Larger datasets are made from it: each row lies between a row of the file and one of
its 15 nearest. So neighbours are found as in the file, and no two rows are equal. Recall@15 is counted on 1,000 rows.
The product's seconds are those of 1,000 rows, times N / 1,000. faiss and hnswlib are measured if they are installed:
at the first of a few settings whose recall is that of pynndescent, or at the last. Each row is measured in a process of
its own, after the kernels are loaded. Bytes are the growth of that process's peak, by N, at a library's first setting.
"""

import argparse
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bs_lightning import BatchFetcher, NNDescentGraph, encode, rwr_batches

from .markdown import print_row
from .memory import peak_mb, resident_mb
from .overhead import Images, SimCLR

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


def measured(library: str, size: int, args: argparse.Namespace, goal: float) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each setting that is tried, until one reaches the goal."""
    torch.set_num_threads(args.threads)
    NNDescentGraph(K)(torch.randn(5000, 128))  # loads kernels, and numba's threads
    if library == "encode":
        size_of_file = 8192
        images: Any = BatchFetcher(Images(size_of_file), collate_fn=lambda batch: batch)
        network = SimCLR().eval()
        before, start = resident_mb(), time.perf_counter()
        embeddings = encode((np.arange(size) % size_of_file).tolist(), images, network, batch_size=256)
        yield {"library": "encode", "seconds": time.perf_counter() - start, "bytes": peak_mb() - before}
        assert len(embeddings) == size
        return
    z = grown(args.embeddings, size)
    rows = np.random.default_rng(0).choice(size, SAMPLED, replace=False)
    if library == "product":
        start = time.perf_counter()
        nearest(z, rows)
        spent = (time.perf_counter() - start) * size / SAMPLED
        yield {"library": "product, extrapolated", "seconds": spent, "recall": 1.0}
        return
    if library == "walk":
        neighbors = NNDescentGraph(K)(z)
        start = time.perf_counter()
        rwr_batches(neighbors[: size // 256 * 256] % (size // 256 * 256), 256)
        yield {"library": "walk", "seconds": time.perf_counter() - start}
        return
    true: Rows | None = None
    for setting, build in LIBRARIES[library](z):
        before, start = resident_mb(), time.perf_counter()
        found = build()
        row: dict[str, Any] = {"library": library, "setting": setting, "seconds": time.perf_counter() - start}
        if true is None:  # not earlier: the true neighbours take memory, too
            row["bytes"] = peak_mb() - before
            true = nearest(z, rows)
        row["recall"] = recall(found, rows, true)
        yield row
        if row["recall"] >= goal:
            break


def measure(library: str, size: int, args: argparse.Namespace, goal: float, connection: Any) -> None:
    """Send the rows from a process of its own, and `None` after the last."""
    for row in measured(library, size, args, goal):
        connection.send(row)
    connection.send(None)


def main() -> None:
    """Measure every library at every size, and print a row for each setting that was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, help="an .npz file with z [N, d]")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 500_000, 1_280_000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=["encode", "walk", "product", *LIBRARIES])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with_header = True
    for size in args.sizes:
        goal = 0.0
        for library in args.only:
            if library in ("faiss", "hnswlib") and importlib.util.find_spec(library) is None:
                continue
            ours, theirs = context.Pipe()
            child = context.Process(target=measure, args=(library, size, args, goal, theirs))
            child.start()
            while (row := ours.recv()) is not None:
                if library == "pynndescent":
                    goal = row["recall"]
                growth = row.get("bytes")
                print_row(
                    {
                        "N": size,
                        "what": row["library"],
                        "setting": row.get("setting", ""),
                        "seconds": row["seconds"],
                        "recall@15": row.get("recall", ""),
                        "bytes per instance": "" if growth is None else round(growth * 2**20 / size),
                    },
                    with_header=with_header,
                )
                with_header = False
            child.join()


if __name__ == "__main__":
    main()
