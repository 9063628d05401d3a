"""The page of results: a template with words, and a table for each model, dataset and settings of the results files."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..markdown import title
from ..training.report import UNIFORM, difference, mean, studies

HERE = Path(__file__).parent
TEMPLATE = HERE / "page.md"
RESULTS = HERE / "results"  # CSV files
OUT = HERE.parents[1] / "docs" / "results.md"

Rows = list[dict[str, str]]

# In percent, from the tables of arXiv 2306.03355: uniform batches, BatchSampler, and the kNN sampler.
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
    ("simcse", ""): {"": (75.60, 76.69, 72.31)},  # BERT base, the mean of seven tasks
}
PAPERS_ARM = {"batchsampler": 1, "batchsampler-replacement": 1, "knn": 2, "knn-replacement": 2}

# What a table shows of a dataset, or of a model without datasets: the first is the main measure.
MEASURES = {
    "simcse": {"STS": "spearman", "R@1": "r1", "MRR": "mrr"},
    "dual_encoder": {"R@1": "r1", "MRR": "mrr", "STS": "spearman"},
    "cifar10": {"linear probe": "linear_probe", "kNN": "knn"},
    "omniglot": {"R@1": "r1_held_back", "mAP": "map_held_back", "linear probe": "linear_probe"},
}
ACCURACY = {"accuracy": "accuracy"}
BASELINES = (UNIFORM, "fixed")  # what arms are compared with
SAME_MASK = {"own-batchsampler": "own-uniform", "own-auto": "own-uniform"}  # instead of uniform batches


def page(results: Path) -> str:
    """Return the template with a section for each results file that it names.

    Args:
        results: The folder of the CSV files.
    """

    def filled(named: re.Match[str]) -> str:
        return "\n".join(sections(results / f"{named[1]}.csv")) or "No run is finished yet.\n"

    return re.sub(r"<!-- (\w+)\.csv -->\n", filled, TEMPLATE.read_text())


def sections(path: Path) -> Iterator[str]:
    """Yield markdown: a heading, two tables, and what they say, for each model, dataset and settings."""
    for settings, rows in studies([path]):
        model, dataset = settings["model"], settings.get("dataset", "")
        paper = PAPER.get((model, settings.get("loss", "")), {}).get(dataset)
        yield heading(settings)
        measures = MEASURES.get(dataset or model, ACCURACY)
        yield results_table(rows, measures, paper)
        yield batches_table(rows)
        yield verdict(rows, *next(iter(measures.items())))


def heading(settings: dict[str, str]) -> str:
    """Return a heading with the model and the dataset, and a line with the other settings."""
    others = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("model", "dataset"))
    named = ", ".join(settings[name] for name in ("model", "dataset") if name in settings)
    return f"### {named}\n\n{others.replace('_', ' ')}\n"


def results_table(rows: Rows, measures: dict[str, str], paper: tuple[float, float, float] | None) -> str:
    """Return a table of results in percent, and of differences in points, by arm.

    Args:
        rows: The runs of one model, dataset and settings.
        measures: Names of columns in the table -> names of results.
        paper: The paper's figures with uniform batches, BatchSampler and the kNN sampler.
    """
    others = [other for other in BASELINES if any(row["arm"] == other for row in rows)]
    titles = ["arm", "seeds"]
    for name in measures:
        titles += [name, *(f"- {other}" for other in others)]
    lines = [[*titles, *(["paper"] if paper else [])]]
    for arm in arms(rows):
        line = [arm, str(sum(row["arm"] == arm for row in rows))]
        for measure in measures.values():
            line.append(f"{100 * float(mean(rows, arm, f'result/{measure}')):.2f}")
            line += [compared(rows, arm, f"result/{measure}", other) for other in others]
        lines.append([*line, *([stated(arm, paper, others)] if paper else [])])
    return as_markdown(lines)


def compared(rows: Rows, arm: str, measure: str, other: str) -> str:
    """Return an arm's mean difference to another arm in points, paired by seed, with a 95% t-interval.

    An arm whose loss leaves out pairs is not compared with uniform batches, but with such under the same loss.
    """
    instead = SAME_MASK.get(arm, other)
    found = difference(rows, arm, measure, instead)
    if found is None:
        return ""
    middle, half, _ = found
    interval = "" if np.isnan(half) else f" ± {100 * half:.2f}"
    return f"{100 * middle:+.2f}{interval}" + ("" if instead == other else f" to {instead}")


def stated(arm: str, paper: tuple[float, float, float], others: list[str]) -> str:
    """Return the paper's figure of an arm, and its difference to the paper's uniform batches."""
    baseline = "fixed" if "fixed" in others else UNIFORM  # GraphCL's public code has the same batches in all epochs
    position = 0 if arm == baseline else PAPERS_ARM.get(arm)
    if position is None:
        return ""
    return f"{paper[position]:.2f}" + (f" ({paper[position] - paper[0]:+.2f})" if position else "")


def batches_table(rows: Rows) -> str:
    """Return a table of what the last epoch's batches were like, by arm."""
    shown = [name for name in columns(rows) if name.startswith("last_epoch/")]
    lines = [["arm", *(title(name.removeprefix("last_epoch/")) for name in shown)]]
    for arm in arms(rows):
        values = [mean(rows, arm, name) for name in shown]
        if any(values):
            lines.append([arm, *values])
    return as_markdown(lines) if len(lines) > 1 else ""


def verdict(rows: Rows, name: str, measure: str) -> str:
    """Return which arms gain and lose in the main measure, and which differences the interval does not tell from 0."""
    said: dict[str, list[str]] = {"Gains": [], "Losses": [], "No difference shown": [], "Too few seeds": []}
    for arm in arms(rows):
        found = difference(rows, arm, f"result/{measure}", SAME_MASK.get(arm, UNIFORM))
        if found is None or arm == "untrained":
            continue
        middle, half, _ = found
        if np.isnan(half):
            said["Too few seeds"].append(arm)
        elif abs(middle) <= half:
            said["No difference shown"].append(arm)
        else:
            said["Gains" if middle > 0 else "Losses"].append(arm)
    parts = [f"{words}: {', '.join(f'`{arm}`' for arm in named)}." for words, named in said.items() if named]
    return f"**Against uniform batches, {name}.** {' '.join(parts)}\n" if parts else ""


def arms(rows: Rows) -> list[str]:
    """Return the arms in the order in which they were first run."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def columns(rows: Rows) -> list[str]:
    """Return the columns that hold a value in some row."""
    return [name for name in rows[0] if any(row[name] for row in rows)]


def as_markdown(lines: list[list[str]]) -> str:
    """Return a table whose first line is its head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the page."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=OUT, help="the page to write")


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    args.out.write_text(page(args.results))
