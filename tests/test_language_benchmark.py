"""The benchmark of the recipes of texts: its arms, what it trains on, its teacher, and resuming."""

from functools import partial

import pytest
import torch
from language_parts import PAIRS, SENTENCES

from benchmarks import csv_files
from benchmarks.recipes import language
from benchmarks.runs import run_missing, wanted
from benchmarks.training.text import STS
from bs_lightning.baselines import B3Composer
from bs_lightning.recipes.text_evaluation import spearman
from bs_lightning.recipes.text_files import read_evaluation

SMALL = {"batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "width": 8, "n_layers": 1}
SETTINGS = {"simcse": {"one_in": 2, **SMALL}, "dual_encoder": SMALL}
TESTED = PAIRS[3:6]  # in an STS set

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def data_dir(tmp_path):
    """Sentences of colours; STS12 has three pairs to train on."""
    for name in STS:
        rows = [f"s\t{i}\t{first}\t{second}" for i, (first, second) in enumerate(TESTED)]
        if name != "STS12":
            rows = [f"s\t{i % 3}\ta{i} {name}\tb{i} {i % 2}" for i in range(8)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["subset\tscore\tsentence1\tsentence2", *rows]))
    for name, pairs in (("train", PAIRS[:80]), ("test", PAIRS[80:])):
        lines = ["anchor\tpositive", *("\t".join(pair) for pair in pairs)]
        (tmp_path / f"paraphrase_{name}.tsv").write_text("\n".join(lines))
    (tmp_path / "unlabeled_sentences.txt").write_text("\n".join(SENTENCES))
    language.read.cache_clear()
    return tmp_path


def chosen(model, arm):
    return next(wanted({"model": model}, [arm], [0], SETTINGS[model]))


@pytest.mark.parametrize(
    ("model", "arms"),
    [
        ("simcse", ["untrained", "batchsampler", "auto"]),
        ("dual_encoder", ["own-uniform", "own-batchsampler", "knn"]),
    ],
)
def test_a_whole_run(model, arms, data_dir, tmp_path):
    """Runs that the file holds are not repeated."""
    path = tmp_path / "results.csv"

    def go_on():
        runs = wanted({"model": model}, arms, [0], SETTINGS[model])
        return list(run_missing(runs, partial(language.run, data_dir), path))

    assert [row["arm"] for row in go_on()] == arms
    assert go_on() == []
    for row in csv_files.read(path):
        of_sets = [float(row[f"result/{name}"]) for name in STS]
        assert float(row["result/spearman"]) == pytest.approx(sum(of_sets) / 6, abs=1e-4)
        assert 0 < float(row["result/r1"]) <= float(row["result/mrr"]) <= 1
        if row["arm"] != "untrained":
            assert float(row["last_epoch/loss"]) > 0
            assert 0 < float(row["last_epoch/accuracy"]) <= 1
            assert float(row["last_epoch/false_negative_rate"]) == 0


def test_scores_are_those_of_the_model(data_dir):
    row = language.run(data_dir, chosen("simcse", "untrained"))
    texts = language.read(data_dir)
    model, data, _ = language.train(texts, "untrained", 0, chosen("simcse", "untrained"))
    file = read_evaluation(data_dir / "STS13.tsv")
    with torch.no_grad():
        first, second = model.eval().embed_pairs(data.dataloader_kwargs["collate_fn"](file.pairs))
    assert row["result/STS13"] == pytest.approx(spearman(first, second, file.scores), abs=1e-5)


def test_pairs_with_a_tested_sentence_are_left_out(data_dir):
    assert language.read(data_dir).pairs == [pair for pair in PAIRS[:80] if pair not in TESTED]


def test_larger_batches_train_for_as_many_steps(data_dir, monkeypatch):
    steps, make_trainer = {}, language.make_trainer

    def kept(*given, **options):
        steps[arm] = made = make_trainer(*given, **options)
        return made

    monkeypatch.setattr(language, "make_trainer", kept)
    for arm in ("uniform", "large"):
        _, data, last = language.train(language.read(data_dir), arm, 0, chosen("dual_encoder", arm))
        assert {len(batch) for batch in last.batches} == {data.batch_size}
    assert data.batch_size == 4 * 8
    assert (steps["uniform"].global_step, steps["large"].global_step) == (2 * (77 // 8), 8 * (77 // 32))


def test_b3_composes_from_a_teacher_and_not_from_the_model(data_dir, monkeypatch):
    """The teacher has been trained, and has other weights than the student."""
    seen, compose = [], B3Composer.__call__

    def kept(self, embeddings, batch_size, **options):
        seen.append(torch.as_tensor(embeddings).clone())
        return compose(self, embeddings, batch_size, **options)

    monkeypatch.setattr(B3Composer, "__call__", kept)
    texts, row = language.read(data_dir), chosen("dual_encoder", "b3")
    taught = language.teach(texts, 0, row)
    assert taught.shape == (77, 2, 8)
    teacher, data, _ = language.train(texts, "uniform", language.TEACHERS_SEED, row)
    with torch.no_grad():
        sides = teacher.eval().embed(data.dataloader_kwargs["collate_fn"](texts.pairs))
    expected = torch.nn.functional.normalize(torch.stack(sides, dim=1), dim=-1)
    assert torch.allclose(taught, expected, atol=2e-3)  # the file has half precision
    language.train(texts, "b3", 0, row, taught)
    assert len(seen) == 2  # from the first epoch on
    for embeddings in seen:
        assert (torch.cdist(embeddings.flatten(1), taught.flatten(1)).amin(dim=1) < 1e-3).all()


def test_sentences_have_other_dropouts_on_their_second_side(data_dir):
    model, data, _ = language.train(language.read(data_dir), "untrained", 0, chosen("simcse", "untrained"))
    first, second = language.sides(model.train(), data, torch.tensor([3, 1]))
    assert first.shape == second.shape == (2, 8)
    assert not torch.equal(first, second)
    again, same = language.sides(model.eval(), data, torch.tensor([1, 3]))
    assert torch.equal(again, same)


@pytest.mark.parametrize(("more", "match"), [(["--arms", "b3"], "b3 need two sides"), (["--one-in", "2"], "--one-in")])
def test_arguments_that_do_not_fit_are_refused(more, match, data_dir, tmp_path, monkeypatch):
    from benchmarks.recipes.__main__ import main

    model = "simcse" if more[0] == "--arms" else "dual_encoder"
    given = ["language", "--data-dir", str(data_dir), "--model", model, "--results", str(tmp_path / "r.csv"), *more]
    monkeypatch.setattr("sys.argv", ["recipes", *given])
    with pytest.raises(SystemExit, match=match):
        main()
