"""The training benchmark: its measures and intervals against literal versions, and studies that resume."""

import io
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks import csv_files
from benchmarks.training import cifar10, evaluate, report, study, text
from benchmarks.training.arms import ARMS
from bs_lightning.plan import check_batches


def test_mass_of_false_negatives():
    """The share of the negatives' scores that same-label views have, for each of the 2B views."""
    first, second = torch.randn(2, 5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 0])
    views = [view / view.norm() for view in [*first, *second]]
    shares = []
    for i, anchor in enumerate(views):
        scores = {j: math.exp(anchor @ other / 0.3) for j, other in enumerate(views) if j % 5 != i % 5}
        shares.append(sum(scores[j] for j in scores if labels[j % 5] == labels[i % 5]) / sum(scores.values()))
    assert study.false_negative_mass(first, second, labels, 0.3) == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("arm", ["uniform", "debiased", "hard", "weighted"])
def test_an_arm_trains_with_its_loss(arm, monkeypatch):
    """The debiased losses get the task's class prior, the others none."""
    trained_with = {}
    monkeypatch.setattr(study.Trainer, "fit", lambda self, model, datamodule: trained_with.update(loss=model.loss))
    task = object.__new__(study.TASKS["text-simcse"])
    task.class_prior, task.labels = 0.05, None
    monkeypatch.setattr(type(task), "size", 64, raising=False)
    monkeypatch.setattr(type(task), "networks", lambda self: (torch.nn.Identity(), torch.nn.Identity()))
    settings = {"batch_size": 8, "steps": 8, "temperature": 0.3, "learning_rate": 0.1}
    study.train(task, ARMS[arm], 0, settings, "cpu")
    first, second = torch.randn(2, 8, 4)
    function = study.LOSSES[ARMS[arm].loss]
    prior = {"class_prior": 0.05} if arm in ("debiased", "hard") else {}
    assert trained_with["loss"](first, second) == function(first, second, temperature=0.3, **prior)


def test_retrieval_and_recall():
    features, labels = torch.randn(40, 3), torch.arange(40) % 7
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    cosine = unit @ unit.T
    first_hits, precisions = [], []
    for i in range(40):
        ranking = sorted((j for j in range(40) if j != i), key=lambda j: -cosine[i, j])
        relevant = [int(labels[j] == labels[i]) for j in ranking]
        first_hits.append(relevant[0])
        precisions.append(np.mean([sum(relevant[: r + 1]) / (r + 1) for r, hit in enumerate(relevant) if hit]))
    expected = (np.mean(first_hits), np.mean(precisions))
    assert evaluate.retrieval(features, labels, rows_at_a_time=16) == pytest.approx(expected)
    assert evaluate.recall_at_1(features, labels) == pytest.approx(expected[0])
    assert evaluate.recall_at_1(features, labels, distractors=features) == 0  # each row is its own distractor


def test_paired_interval_is_that_of_scipy():
    values, baseline = np.random.default_rng(0).normal(size=(2, 6))
    expected = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    difference, half = report.paired_interval(values, baseline)
    assert (difference - half, difference + half) == pytest.approx((expected.low, expected.high))


def test_a_cell_pairs_by_seed(tmp_path):
    path = tmp_path / "results.csv"
    for arm, seed, value in (("uniform", 1, 0.5), ("uniform", 0, 0.1), ("walked", 0, 0.2), ("walked", 1, 0.8)):
        csv_files.append(path, {"task": "any", "arm": arm, "seed": seed, "steps": 3, "result/r1": value})
    difference, half = report.paired_interval([0.2, 0.8], [0.1, 0.5])
    printed = "\n".join(report.tables([path]))
    assert f"| walked | 2 | {difference:+.4f} ± {half:.4f} |" in printed
    assert "| uniform | 2 | 0.3 |" in printed
    turned = "\n".join(report.tables([path], other="walked"))
    assert f"| uniform | 2 | {-difference:+.4f} ± {half:.4f} |" in turned


def test_overview_and_plot_show_the_main_results(tmp_path):
    path, defaults = tmp_path / "results.csv", study.TASKS["omniglot-pairs"].defaults
    for settings in (defaults, defaults | {"steps": 9}):
        for arm, seed in (("pool10", 0), *(("uniform", seed) for seed in range(3)), ("pool10", 1), ("pool10", 2)):
            values = {"result/r1_held_back": 0.5 + 0.1 * (arm == "pool10"), "result/map_held_back": 0.25 * seed}
            csv_files.append(path, {"task": "omniglot-pairs", "arm": arm, "seed": seed, **settings, **values})
    assert "\n".join(report.overview([path])).count("| pool10 | 3 | +0.1000 ± ") == 2
    figure = report.plot([path])  # draws only rows with a task's default settings
    assert [axes.get_title() for axes in figure.axes] == ["omniglot-pairs"]
    (of_first, _) = figure.axes[0].containers
    assert of_first.lines[0].get_xdata() == pytest.approx([10])


def test_plot_of_uniformity(tmp_path):
    path, defaults = tmp_path / "results.csv", study.TASKS["omniglot-pairs"].defaults
    for arm in ("uniform", "pool10", "weighted"):
        for seed in range(3):
            row = {"task": "omniglot-pairs", "arm": arm, "seed": seed, **defaults}
            row["result/map_held_back"] = 0.5 + 0.1 * (arm == "weighted")
            row["batch/uniformity_mixed"] = -3.0 - 0.5 * (arm == "weighted") + 0.25 * (arm == "pool10")
            csv_files.append(path, row)
    (axes,) = report.plot_uniformity([path]).axes
    assert axes.collections[0].get_offsets().tolist() == [[0, 0], [0.25, 0], pytest.approx([-0.5, 10])]


def test_says_that_there_is_nothing_to_draw_yet(tmp_path):
    path, defaults = tmp_path / "results.csv", study.TASKS["omniglot-pairs"].defaults
    for arm, seed in (("uniform", 0), ("uniform", 1), ("uniform", 2), ("pool10", 0), ("pool10", 1), ("pool10", 7)):
        csv_files.append(
            path, {"task": "omniglot-pairs", "arm": arm, "seed": seed, **defaults, "result/r1_held_back": 0.5}
        )
    with pytest.raises(SystemExit, match="no arm but uniform has 3 seeds yet"):
        report.plot([path])


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.composer is not None])
def test_every_arm_composes_a_pool(arm):
    if arm == "b3":
        pytest.importorskip("pymetis")
    composer = ARMS[arm].composer
    batches = composer(torch.randn(160, 8), 16, seed=1, epoch=0)
    check_batches(batches, 160, 16, replacement=getattr(composer, "replacement", False))


def test_resnet18_has_as_many_parameters_as_the_papers():
    """The network is torchvision's, with a first convolution of 3 x 3 and without the classifier."""
    task = object.__new__(cifar10.CIFAR10ResNet18)
    task.width = 64
    encoder, projector = task.networks()
    assert sum(each.numel() for each in encoder.parameters()) == 11_168_832
    assert projector(encoder(torch.zeros(2, 3, 32, 32))).shape == (2, 64)


def test_sentences_that_pairs_join_mean_the_same():
    groups = text.same_meaning(["a", "b", "d"], ["b", "c", "e"])
    assert groups["a"] == groups["b"] == groups["c"] != groups["d"] == groups["e"]


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    runs = []

    def run(task, arm, seed, data_dir, settings, accelerator):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append((arm, seed))
        return {**study.identity(task, arm, seed, settings), "result/r1": 0.5, f"batch/{arm}": 1.0}

    monkeypatch.setattr(study, "run", run)

    def go_on(**settings):
        given = ("omniglot-pairs", ["uniform", "pool10"], [0, 1], tmp_path, settings, tmp_path / "results.csv")
        return list(study.run_missing(*given))

    with pytest.raises(KeyboardInterrupt):
        go_on(temperature=0.1, steps=9)
    runs_before, runs[:] = list(runs), []
    go_on(temperature=0.1, steps=9)
    assert runs_before + runs == [("uniform", 0), ("pool10", 0), ("uniform", 1), ("pool10", 1)]
    runs.clear()
    assert go_on(temperature=0.1, steps=9) == []
    with pytest.raises(KeyboardInterrupt):  # different settings make a different study
        go_on(temperature=0.2, steps=9)
    assert len(csv_files.read(tmp_path / "results.csv")) == 7


@pytest.mark.parametrize("arm", ["pool4", "masked", "oracle-uniform", "steady0.1", "paper"])
def test_a_whole_run(tmp_path, arm):
    (tmp_path / "omniglot").mkdir()
    with zipfile.ZipFile(tmp_path / "omniglot" / "images_background_small1.zip", "w") as archive:
        for number in range(4 * 5 * 20):
            file = io.BytesIO()
            Image.effect_noise((105, 105), 50).save(file, "png")
            alphabet, character, drawing = number // 100, number // 20 % 5, number % 20
            archive.writestr(f"images/alphabet{alphabet}/character{character}/{drawing}.png", file.getvalue())
    settings = study.TASKS["omniglot-pairs"].defaults | {"steps": 15, "batch_size": 8, "width": 4}
    (row,) = study.run_missing("omniglot-pairs", [arm], [0], tmp_path, settings, tmp_path / "results.csv")
    assert 0 <= row["result/r1_held_back"] <= 1
    assert ARMS[arm].composer is None or -1 <= row["last_epoch/hardness"] <= 1
    assert set(csv_files.read(tmp_path / "results.csv")[0]) == set(row)
