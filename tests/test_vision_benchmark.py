"""The benchmark of the recipes of images: its datasets, arms, presets and measures, and resuming."""

from functools import partial

import numpy as np
import pytest
import torch
from vision_parts import write_cifar10, write_omniglot

from benchmarks import csv_files
from benchmarks.recipes import last_epoch, vision
from benchmarks.runs import run_missing, wanted
from benchmarks.training import cifar10, omniglot
from bs_lightning.recipes.moco_v3 import MoCoV3
from bs_lightning.recipes.simclr import SimCLR

SETTINGS = {"encoder": "small", "instances": 48, "batch_size": 8, "epochs": 2, "temperature": 0.5}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    write_omniglot(tmp_path)
    cifar10.images.cache_clear()
    omniglot.drawings.cache_clear()
    monkeypatch.setattr(vision, "SMALL_WIDTH", 4)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "dataset", "arms"),
    [
        ("simclr", "cifar10", ["untrained", "public-code"]),
        ("moco_v3", "omniglot", ["batchsampler", "knn"]),
    ],
)
def test_a_whole_run(model, dataset, arms, data_dir, tmp_path):
    """Runs that the file holds are not repeated."""
    path = tmp_path / "results.csv"

    def go_on():
        runs = wanted({"model": model, "dataset": dataset}, arms, [0], SETTINGS)
        return list(run_missing(runs, partial(vision.run, data_dir, "cpu"), path))

    assert [row["arm"] for row in go_on()] == arms
    assert go_on() == []
    for row in csv_files.read(path):
        results = {name: float(value) for name, value in row.items() if name.startswith("result/")}
        assert ("result/r1_held_back" in results) == (dataset == "omniglot")
        assert all(0 <= value <= 1 for value in results.values())
        if dataset == "cifar10":
            assert results["result/linear_probe"] > 0.5  # even untrained features tell brightnesses apart
        if row["arm"] != "untrained":
            assert 0 < float(row["last_epoch/false_negative_rate"]) < 1


def test_omniglots_split(data_dir):
    """Views are of training characters. The tests are other drawings of them, and other alphabets."""
    images = vision.read_omniglot(data_dir, 1)
    assert images.train.shape == (10 * 15, 3, 28, 28)
    assert images.test.shape == (10 * 5, 3, 28, 28)
    assert images.held_back.shape == (10, 20, 3, 28, 28)
    assert images.labels.bincount().tolist() == 10 * [15]
    seen, _ = omniglot.split(data_dir, 1)
    for image, label in zip(images.train[:20], images.labels, strict=False):
        drawings = (255 * seen[label, :15]).round().byte()
        assert (drawings == image).flatten(1).all(dim=1).any()
    assert not torch.equal(images.labels, images.labels.sort().values)  # some are a random choice


def test_presets_for_a_gpu_have_the_papers_settings(data_dir):
    for name, epochs in (("gpu-200", 200), ("gpu-800", 800)):
        expected = {"encoder": "resnet18", "instances": 50_000, "batch_size": 256, "epochs": epochs}
        assert vision.PRESETS[name] == expected
    assert vision.make_encoder("resnet18").num_features == 512


def test_too_many_instances_are_refused(data_dir):
    row = next(wanted({"model": "simclr", "dataset": "cifar10"}, ["uniform"], [0], SETTINGS | {"instances": 61}))
    with pytest.raises(SystemExit, match="cifar10 has 60 images to train on, got 61"):
        vision.run(data_dir, "cpu", row)


def test_sides_are_what_the_losses_compare():
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)

    def augment(views):
        return views * torch.linspace(0, 1, len(views))[:, None, None, None]

    views = augment(images[[4, 1]].repeat(2, 1, 1, 1) / 255)
    model = SimCLR(vision.make_encoder("small")).eval()
    for side, expected in zip(vision.sides(model, augment, images, torch.tensor([4, 1])), views.split(2), strict=True):
        assert torch.allclose(side, model.embed(expected), atol=1e-5)
    moco = MoCoV3(vision.make_encoder("small")).eval()
    queries, keys = vision.sides(moco, augment, images, torch.tensor([4, 1]))
    assert torch.allclose(queries, moco.queries(views[:2]), atol=1e-5)
    assert torch.allclose(keys, moco.keys(views[2:]), atol=1e-5)


def test_what_batches_are_like():
    """Accuracy, hardness of true negatives, and false negatives, by loops over pairs."""
    first, second = torch.nn.functional.normalize(torch.randn(2, 12, 4), dim=-1)
    groups = torch.arange(12) % 3
    last = last_epoch.LastBatches()
    last.batches = list(torch.randperm(12).reshape(3, 4))
    last.losses = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(6.0)]
    hits, cosines, same = [], [], []
    for batch in last.batches:
        for i in batch.tolist():
            others = [j for j in batch.tolist() if j != i]
            hits.append(all(first[i] @ second[i] > first[i] @ second[j] for j in others))
            same += [groups[i] == groups[j] for j in others]
            cosines += [float(first[i] @ second[j]) for j in others if groups[i] != groups[j]]
    described = last_epoch.describe(last, lambda batch: (first[batch], second[batch]), groups)
    assert described == {
        "last_epoch/loss": 3.0,
        "last_epoch/accuracy": pytest.approx(np.mean(hits)),
        "last_epoch/hardness": pytest.approx(np.mean(cosines), abs=1e-5),
        "last_epoch/false_negative_rate": pytest.approx(np.mean(same)),
    }
