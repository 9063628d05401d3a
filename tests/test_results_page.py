"""The page of results: its tables pair seeds, and it holds what the results files say."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import csv_files
from benchmarks.recipes import page


def write(path, model, values, **settings):
    """Write a row for each arm and seed; the seeds of each arm in another order."""
    for number, (arm, of_seeds) in enumerate(values.items()):
        for seed in np.roll(range(len(of_seeds)), number):
            row = {"model": model, "arm": arm, "seed": seed, **settings}
            csv_files.append(path, row | {f"result/{name}": float(value) for name, value in of_seeds[seed].items()})


def interval(values, others):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values - others), stats.sem(values - others))
    return f"{100 * np.mean(values - others):+.2f} ± {50 * (high - low):.2f}"


def test_the_page_is_what_the_files_say():
    assert page.OUT.read_text() == page.page(page.RESULTS), "Run: python -m benchmarks.recipes results"


def test_differences_are_paired_by_seed(tmp_path):
    path, generator = tmp_path / "graphs.csv", np.random.default_rng(0)
    accuracies = {arm: generator.uniform(0.5, 1, size=3).round(6) for arm in ("uniform", "fixed", "knn")}
    values = {arm: [{"accuracy": value} for value in of_seeds] for arm, of_seeds in accuracies.items()}
    write(path, "graphcl", values, dataset="MUTAG", loss="infonce", batch_size=8)
    printed = "\n".join(page.sections(path))
    assert "### graphcl, MUTAG\n\nloss infonce, batch size 8\n" in printed
    uniform, fixed, knn = accuracies.values()
    expected = f"| knn | 3 | {100 * knn.mean():.2f} | {interval(knn, uniform)} | {interval(knn, fixed)} |"
    assert f"{expected} 86.46 (-0.34) |" in printed  # the paper's kNN sampler
    assert f"| fixed | 3 | {100 * fixed.mean():.2f} | {interval(fixed, uniform)} |  | 86.80 |" in printed


def test_arms_with_a_mask_are_compared_under_the_same_mask(tmp_path):
    path, generator = tmp_path / "language.csv", np.random.default_rng(0)
    found = {arm: generator.uniform(0.5, 1, size=2).round(6) for arm in ("uniform", "own-uniform", "own-auto")}
    measures = ("r1", "mrr", "spearman")
    write(path, "dual_encoder", {arm: [dict.fromkeys(measures, v) for v in found[arm]] for arm in found})
    printed = "\n".join(page.sections(path))
    cells = f"{100 * found['own-auto'].mean():.2f} | {interval(found['own-auto'], found['own-uniform'])} to own-uniform"
    assert f"| own-auto | 2 | {' | '.join(3 * [cells])} |" in printed
    assert f"| own-uniform | 2 | {100 * found['own-uniform'].mean():.2f} | " in printed
    assert f" | {interval(found['own-uniform'], found['uniform'])} |" in printed


def test_the_papers_figures_of_simcse(tmp_path):
    values = {arm: [dict.fromkeys(("spearman", "r1", "mrr"), 0.5)] for arm in ("uniform", "batchsampler", "auto")}
    write(tmp_path / "language.csv", "simcse", values)
    printed = "\n".join(page.sections(tmp_path / "language.csv"))
    assert "| uniform | 1 | 50.00 |  | 50.00 |  | 50.00 |  | 75.60 |" in printed
    assert "| batchsampler | 1 | 50.00 | +0.00 | 50.00 | +0.00 | 50.00 | +0.00 | 76.69 (+1.09) |" in printed
    assert "| auto | 1 | 50.00 | +0.00 | 50.00 | +0.00 | 50.00 | +0.00 |  |" in printed


def test_what_batches_were_like(tmp_path):
    """A table of the last epoch leaves out arms that were not trained."""
    for seed, (arm, loss) in enumerate([("untrained", ""), ("knn", 0.5), ("knn", 1.5)]):
        row = {"model": "simclr", "dataset": "cifar10", "arm": arm, "seed": seed}
        results = {"result/linear_probe": 0.5, "result/knn": 0.25}
        csv_files.append(tmp_path / "vision.csv", row | results | {"last_epoch/loss": loss})
    printed = "\n".join(page.sections(tmp_path / "vision.csv"))
    assert "| arm | loss |\n| --- | --- |\n| knn | 1 |\n" in printed
    assert "| untrained | 1 |" in printed


def test_a_file_without_rows(tmp_path, monkeypatch):
    template = tmp_path / "page.md"
    template.write_text("# Page\n\n<!-- vision.csv -->\n\nEnd.\n")
    monkeypatch.setattr(page, "TEMPLATE", template)
    assert page.page(tmp_path) == "# Page\n\nNo run is finished yet.\n\nEnd.\n"


def test_the_command_writes_the_page(tmp_path, monkeypatch):
    from benchmarks.recipes.__main__ import main

    write(tmp_path / "vision.csv", "simclr", {"uniform": [{"linear_probe": 0.25, "knn": 0.5}]}, dataset="cifar10")
    monkeypatch.setattr("sys.argv", ["", "results", "--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    main()
    assert "| uniform | 1 | 25.00 |  | 50.00 |  |\n" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("name", ["graphs", "language", "vision"])
def test_the_template_names_every_file(name):
    assert f"<!-- {name}.csv -->\n" in page.TEMPLATE.read_text()


def test_what_the_tables_say(tmp_path):
    """An arm gains or loses if its interval leaves out 0. Arms with a mask are compared under the same mask."""
    values = {
        "uniform": [0.5, 0.6],
        "knn": [0.71, 0.8],
        "batchsampler": [0.41, 0.5],
        "auto": [0.4, 0.8],
        "own-uniform": [0.8, 0.91],
        "own-auto": [0.7, 0.8],
        "b3": [0.9],
        "untrained": [0.1, 0.2],
    }
    measures = ("r1", "mrr", "spearman")
    made = {arm: [dict.fromkeys(measures, value) for value in of_seeds] for arm, of_seeds in values.items()}
    write(tmp_path / "language.csv", "dual_encoder", made)
    assert list(page.sections(tmp_path / "language.csv"))[-1] == (
        "**Against uniform batches, R@1.** Gains: `knn`, `own-uniform`. Losses: `batchsampler`, `own-auto`. "
        "No difference shown: `auto`. Too few seeds: `b3`.\n"
    )
