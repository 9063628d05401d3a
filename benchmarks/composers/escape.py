"""`escape`: how much of a walk leaves the set it starts in, against the bound that the paper cites."""

import argparse

import numpy as np
from scipy.sparse import csr_matrix

from bs_lightning import RandomCandidateGraph, rwr_batches

from .. import csv_files
from ..markdown import print_row
from . import measure


def run(args: argparse.Namespace, n_sets: int = 20, n_steps: int = 500) -> None:
    """Compare walks on the paper's graph with the bound of Andersen, Chung and Lang (FOCS 2006).

    A set holds the instances most similar to a random instance, `--share` of all. A walk starts at a uniformly random
    member of a set. The bound says: the expected probability that one of its steps is outside the set is at most
    conductance * (1 - alpha) / alpha; lazy walks have half of it. The bound holds for the steps of a single walk on a
    graph of equal degrees. Batches differ in two ways: their instances are distinct, so more of them are far away, and
    the graph's in-degrees are not equal.
    """
    z, _ = measure.load(args)
    neighbors = RandomCandidateGraph(1000, 100)(z, seed=0)
    n, k = neighbors.shape
    step = csr_matrix((np.full(n * k, 1 / k), neighbors.ravel(), np.arange(0, n * k + 1, k)), (n, n)).T.tocsr()
    centres = np.random.default_rng(0).choice(n, n_sets, replace=False)
    inside = np.zeros((n, n_sets))
    for column, centre in enumerate(centres):
        inside[(z @ z[centre]).topk(round(args.share * n)).indices, column] = 1
    where, outside = inside / inside.sum(axis=0), []
    for _ in range(n_steps):
        outside.append(float((where * (1 - inside)).sum(axis=0).mean()))
        where = step @ where
    for alpha in (0.05, 0.1, 0.2, 0.5, 0.8):
        weights = alpha * (1 - alpha) ** np.arange(n_steps)  # of the number of steps since the last restart
        batches = rwr_batches(neighbors, args.batch_size, restart_probability=alpha, seed=0, replacement=True)
        from_inside = inside[batches[:, 0]]  # [number of batches, n_sets]
        left = 1 - inside[batches].mean(axis=1)
        row = {
            "alpha": alpha,
            "conductance": outside[1],
            "bound": outside[1] * (1 - alpha) / alpha,
            "steps_outside": float(weights @ outside),
            "batch_instances_outside": float((left * from_inside).sum() / from_inside.sum()),
        }
        print_row(row, with_header=alpha == 0.05)
        settings = {"instances": n, "batch_size": args.batch_size, "share": args.share}
        csv_files.append(args.results / "escape.csv", settings | row)
