"""The training benchmark: its measures and intervals against literal versions, and studies that resume."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from vision_parts import write_omniglot

from benchmarks import csv_files
from benchmarks.runs import run_missing, wanted
from benchmarks.training import cifar10, code, evaluate, functions, report, study, text, transformer
from benchmarks.training.arms import ARMS
from bs_lightning.losses import info_nce, nt_xent
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


@pytest.mark.parametrize("arm", ["uniform", "debiased", "hard", "weighted", "hardness-weighted"])
@pytest.mark.parametrize("name", ["text-simcse", "code-search"])
def test_an_arm_trains_with_its_loss(name, arm, monkeypatch):
    """The debiased losses get the task's class prior. Two towers have negatives on the other side only."""
    trained_with = {}
    monkeypatch.setattr(study.Trainer, "fit", lambda self, model, datamodule: trained_with.update(loss=model.loss))
    task = object.__new__(study.TASKS[name])
    task.class_prior, task.labels = 0.05, None
    monkeypatch.setattr(type(task), "size", 64, raising=False)
    monkeypatch.setattr(type(task), "networks", lambda self: (torch.nn.Identity(), torch.nn.Identity()))
    settings = {"batch_size": 8, "steps": 8, "temperature": 0.3, "learning_rate": 0.1}
    study.train(task, ARMS[arm], 0, settings, "cpu")
    first, second = torch.randn(2, 8, 4)
    towers = name == "code-search"
    if arm == "uniform":
        expected = (info_nce if towers else nt_xent)(first, second, temperature=0.3)
    else:
        prior = {"class_prior": 0.05} if arm in ("debiased", "hard") else {}
        negatives = "other_side" if towers else "views"
        expected = study.LOSSES[arm](first, second, temperature=0.3, negatives=negatives, **prior)
    assert trained_with["loss"](first, second) == expected


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


def test_reciprocal_rank():
    queries, candidates = torch.randn(30, 4), torch.randn(50, 4)
    positives = torch.randperm(50)[:30]
    unit, own = (rows / rows.norm(dim=1, keepdim=True) for rows in (candidates, queries))
    ranks = [(unit @ query).argsort(descending=True).tolist().index(k) for query, k in zip(own, positives, strict=True)]
    expected = np.mean([1 / (1 + rank) for rank in ranks])
    assert evaluate.mean_reciprocal_rank(queries, candidates, positives, rows_at_a_time=7) == pytest.approx(expected)
    same = torch.ones(4, 4)  # a model that maps all to one point finds nothing: rank (1 + 4) / 2
    assert evaluate.mean_reciprocal_rank(same, same, torch.arange(4)) == pytest.approx(0.4)


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
    assert [axes.get_title("left") for axes in figure.axes] == ["omniglot-pairs"]
    (of_first, _) = figure.axes[0].containers
    assert of_first.lines[0].get_xdata() == pytest.approx([10])


def test_what_arms_are_worth_in_larger_batches_and_longer_trainings(tmp_path):
    path, defaults = tmp_path / "results.csv", study.TASKS["text-simcse"].defaults
    larger, longer, wider = {"batch_size": 512}, {"steps": 1776}, {"width": 64}
    gains = [({}, 0.0), (larger, 0.03), (longer, 0.01), (larger | {"steps": 375}, 0.02), (wider, 0.5)]
    for changed, gain in gains:
        for arm, seed in (("all-near", 1), ("uniform", 0), ("uniform", 1)):
            values = {"result/sts": 0.5 + 0.1 * seed + gain + 0.04 * (arm == "all-near"), "seconds/all_cpu": 9.0}
            csv_files.append(path, {"task": "text-simcse", "arm": arm, "seed": seed, **defaults, **changed, **values})
    printed = [line.split(" | ")[:3] for line in "\n".join(report.worth([path])).splitlines() if line.startswith("| ")]
    assert printed[2:] == [
        ["| all-near", "1", "+0.0400"],
        ["| uniform", "2", "0.55"],
        ["| uniform, 4 x", "2", "+0.0300 ± 0.0000"],
        ["| uniform, 1776 steps", "2", "+0.0100 ± 0.0000"],
        ["| uniform, 4 x, 375 steps", "2", "+0.0200 ± 0.0000"],
    ]


def test_plot_of_uniformity(tmp_path):
    path, defaults = tmp_path / "results.csv", study.TASKS["omniglot-pairs"].defaults
    for arm in ("uniform", "pool10", "weighted"):
        for seed in range(3):
            row = {"task": "omniglot-pairs", "arm": arm, "seed": seed, **defaults}
            row["result/r1_held_back"] = 0.5 + 0.1 * (arm == "weighted")
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


SOURCE = '''
def count_items(values):
    """Return how many items
    there are.

    More words.
    """
    # A comment
    total = len(values)  # of all
    return total if values else count_items("""no docstring""")

class Box:
    async def open(self):
        "Open the box and look inside."
        return [self.open_lid(1), self.look_inside(), super().open()]

def without_docstring(values):
    return [value for value in values if value is not None]
'''


def test_functions_are_read_without_what_names_them(tmp_path):
    package = tmp_path / "some_package"
    for name, source in (("part/file.py", SOURCE), ("tests/test_file.py", SOURCE), ("broken.py", "def")):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert list(functions.extract(package)) == [
        functions.Function(
            "some_package/part",
            "Return how many items there are.",
            "total = len(values)\nreturn total if values else _('no docstring')",
        ),
        functions.Function(
            "some_package/part",
            "Open the box and look inside.",
            "return [self.open_lid(1), self.look_inside(), super()._()]",
        ),
    ]


def made_function(docstring, name, folder="p"):
    return functions.Function(folder, docstring, f"result_of_{name} = {name}(a)\nreturn result_of_{name} + 1")


def test_functions_with_equal_docstrings_or_code_are_left_out():
    kept = [made_function("Add two numbers.", "add"), made_function("Take one away.", "take")]
    copies = [made_function("add TWO numbers", "other"), made_function("Take none away.", "TAKE")]
    trivial = [made_function("Add.", "more"), functions.Function("p", "Do nothing at all.", "pass")]
    assert functions.distinct([*kept, *copies, *trivial]) == kept


def test_functions_that_differ_in_numbers_have_one_group():
    made = [("Pool in 2d.", "pool"), ("Pool in 3d.", "gather"), ("Gather it all.", "gather4"), ("Other one.", "other")]
    assert functions.same_words([made_function(*each) for each in made]).tolist() == [0, 0, 0, 3]


def test_no_folder_is_on_both_sides():
    folders = [f"p/{number % 20}" for number in range(200)]
    train, held_out = functions.hold_out(folders, 35, seed=1)
    assert len(held_out) == 35
    assert len(train) == 160  # four folders are held out, and five of their functions are left over
    assert not {folders[i] for i in train} & {folders[i] for i in held_out}
    assert not np.array_equal(held_out, functions.hold_out(folders, 35, seed=2)[1])


def test_functions_are_cached_by_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = functions.functions.__wrapped__(("packaging",))
    assert len(found) > 20
    monkeypatch.setattr(functions, "extract", None)  # a second read does not parse
    assert functions.functions.__wrapped__(("packaging",)) == found
    monkeypatch.setattr(functions, "versions", lambda _: {"packaging": "0"})
    with pytest.raises(TypeError):
        functions.functions.__wrapped__(("packaging",))


def test_missing_packages_are_named():
    with pytest.raises(ImportError, match=r"needs no_such_package: pip install"):
        functions.versions(("packaging", "no_such_package"))


def test_code_search_runs_on_a_few_functions(tmp_path, monkeypatch):
    """Both sides of an instance share a token, so its code is found more often than by chance, 0.05 at most."""
    shared = torch.arange(1, 121, dtype=torch.int32)[None, :, None]
    noise = torch.randint(121, 200, (2, 120, 2), dtype=torch.int32)
    pairs = torch.cat([shared.expand(2, -1, -1), noise], dim=2)
    folders = [f"p/{number % 12}" for number in range(120)]
    monkeypatch.setattr(code, "data", lambda: (pairs, folders, torch.arange(120), torch.randn(200, 16)))
    monkeypatch.setattr(code, "N_HELD_OUT", 20)
    task = code.CodeSearch(tmp_path, 0, {})
    assert task.size == 100
    assert len(task.groups) == 100
    assert torch.equal(task.sides(torch.tensor([3, 5])), pairs[:, task.train[[3, 5]]])
    settings = code.CodeSearch.defaults | {"steps": 24, "batch_size": 8}
    (row,) = run_study("code-search", ["pool4"], [0], settings, tmp_path)
    assert row["result/mrr_4000"] > row["result/mrr_all"] > 0.1


def run_study(task, arms, seeds, settings, folder):
    """Do the missing runs of a study in a folder, which holds the data, too."""
    runs = wanted({"task": task}, arms, seeds, settings)
    return list(run_missing(runs, partial(study.run, folder, "cpu"), folder / "results.csv"))


def test_padding_does_not_change_a_sentence():
    """Words after the end, and rows beside a sentence, leave its features as they are."""
    encoder = transformer.Transformer(16).eval()
    words = torch.zeros(2, text.MAX_WORDS, dtype=torch.int32)
    words[0, :3] = words[1, :5] = torch.tensor(7)
    torch.testing.assert_close(encoder(words)[:1], encoder(words[:1]))
    assert not torch.allclose(encoder(words)[0], encoder(words)[1])


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    runs = []

    def run(data_dir, accelerator, chosen):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append((chosen["arm"], chosen["seed"]))
        return {"result/r1": 0.5, f"batch/{chosen['arm']}": 1.0}

    monkeypatch.setattr(study, "run", run)

    def go_on(**settings):
        return run_study("omniglot-pairs", ["uniform", "pool10"], [0, 1], settings, tmp_path)

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


@pytest.mark.parametrize("arm", ["pool4", "masked", "oracle-uniform", "auto", "paper"])
def test_a_whole_run(tmp_path, arm):
    write_omniglot(tmp_path)
    settings = study.TASKS["omniglot-pairs"].defaults | {"steps": 15, "batch_size": 8, "width": 4}
    (row,) = run_study("omniglot-pairs", [arm], [0], settings, tmp_path)
    assert 0 <= row["result/r1_held_back"] <= 1
    assert ARMS[arm].composer is None or -1 <= row["last_epoch/hardness"] <= 1
    assert set(csv_files.read(tmp_path / "results.csv")[0]) == set(row)
