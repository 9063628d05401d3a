"""Tables of the graph recipes: accuracies, differences to uniform batches, and the paper's figures."""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import csv_files
from ..training.report import paired_interval

Rows = list[dict[str, str]]

# Accuracies in percent, in the tables of arXiv 2306.03355: uniform batches, BatchSampler, and the kNN sampler.
PAPER = {
    ("graphcl", "infonce"): {
        "IMDB-BINARY": (70.90, 71.90, 70.72),
        "IMDB-MULTI": (48.48, 48.93, 47.97),
        "PROTEINS": (74.39, 75.04, 74.17),
        "MUTAG": (86.80, 87.78, 86.46),
        "NCI1": (77.87, 78.93, 77.27),
    },
    ("graphcl", "debiased"): {
        "IMDB-BINARY": (71.07, 71.32, 70.94),
        "IMDB-MULTI": (48.93, 48.96, 48.47),
        "PROTEINS": (74.64, 75.02, 74.28),
        "MUTAG": (88.09, 89.47, 87.13),
        "NCI1": (78.49, 79.03, 78.13),
    },
    ("graphcl", "hard"): {
        "IMDB-BINARY": (71.24, 71.20, 71.14),
        "IMDB-MULTI": (48.54, 48.76, 48.36),
        "PROTEINS": (74.69, 75.11, 74.06),
        "MUTAG": (87.79, 88.31, 87.53),
        "NCI1": (78.83, 79.17, 78.66),
    },
    ("mvgrl", "jsd"): {
        "IMDB-BINARY": (74.20, 76.70, 73.30),
        "IMDB-MULTI": (51.20, 52.40, 50.70),
        "MUTAG": (89.70, 91.13, 85.08),
    },
}
PAPERS_ARM = {"fixed": 0, "batchsampler": 1, "batchsampler-replacement": 1, "knn": 2, "knn-replacement": 2}


def tables(paths: list[Path]) -> Iterator[str]:
    """Yield markdown: a table for each model, dataset and settings."""
    found: dict[tuple[tuple[str, str], ...], Rows] = defaultdict(list)
    for path in paths:
        for row in csv_files.read(path):
            key = tuple((k, v) for k, v in row.items() if "/" not in k and k not in ("arm", "seed") and v)
            found[key].append(row)
    for key, rows in found.items():
        settings = dict(key)
        yield heading(settings)
        yield table(rows, PAPER[settings["model"], settings["loss"]].get(settings["dataset"]))


def heading(settings: dict[str, str]) -> str:
    """Return a heading with the model and the dataset, and a line with the other settings."""
    others = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("model", "dataset"))
    return f"### {settings['model']}, {settings['dataset']}\n\n{others.replace('_', ' ')}\n"


def table(rows: Rows, paper: tuple[float, ...] | None) -> str:
    """Return a table of arms. Accuracies are percents, and differences are points.

    Args:
        rows: The runs of one model, dataset and settings.
        paper: The paper's accuracies with uniform batches, BatchSampler and the kNN sampler.
    """
    lines = [["arm", "seeds", "accuracy", "- uniform", "- fixed", "paper", "loss", "false-negative rate", "hardness"]]
    lines.append(["---"] * len(lines[0]))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        accuracies = [100 * float(row["result/accuracy"]) for row in own]
        deviation = f" ± {np.std(accuracies, ddof=1):.2f}" if len(own) > 1 else ""
        described = [mean(own, f"last_epoch/{name}") for name in ("loss", "false_negative_rate", "hardness")]
        stated = f"{paper[PAPERS_ARM[arm]]:.2f}" if paper and arm in PAPERS_ARM else ""
        differences = [difference(rows, arm, other) for other in ("uniform", "fixed")]
        lines.append([arm, str(len(own)), f"{np.mean(accuracies):.2f}{deviation}", *differences, stated, *described])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean(rows: Rows, measure: str) -> str:
    """Return the mean of a measure, or nothing where no row has it."""
    values = [float(row[measure]) for row in rows if row.get(measure)]
    return f"{np.mean(values):.3f}" if values else ""


def difference(rows: Rows, arm: str, other: str) -> str:
    """Return an arm's mean difference in accuracy to another arm, in points, with a 95% interval.

    Accuracies are paired fold by fold, as both arms of a seed have the same folds. The interval is over seeds, because
    a seed's folds share a model and are not independent.
    """
    values, others = folds(rows, arm), folds(rows, other)
    shared = [seed for seed in values if seed in others]
    if arm == other or not shared:
        return ""
    by_seed = [float(100 * np.mean(np.subtract(values[seed], others[seed]))) for seed in shared]
    middle, half = paired_interval(by_seed, [0.0] * len(by_seed))
    return f"{middle:+.2f} ± {half:.2f}" if len(shared) > 1 else f"{middle:+.2f}"


def folds(rows: Rows, arm: str) -> dict[str, list[float]]:
    """Return an arm's accuracies in each fold, by seed."""
    return {row["seed"]: [float(row[f"fold/{fold}"]) for fold in range(10)] for row in rows if row["arm"] == arm}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the tables."""
    parser.add_argument("--results", required=True, type=Path, nargs="+")


def main(args: argparse.Namespace) -> None:
    """Print the tables."""
    print(
        "Accuracy: mean ± standard deviation over seeds, percent. Differences: points, paired by seed and folds, "
        "± 95% t-interval over seeds.\nLoss, false-negative rate and hardness: of the last epoch's batches, with the "
        "trained model. Paper: of arXiv 2306.03355.\n"
    )
    print("\n".join(tables(args.results)))
