"""Adapters: composed batches in the trainers of Hugging Face and sentence-transformers."""

import contextlib
import json
import multiprocessing
import pickle
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from processes import finish

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import hf_parts
from datasets import DatasetDict, Features, Image, Sequence, Value
from hf_parts import POOL, B, N, RecordedSimCSE, Records, bert, bert_trainer, composer, pairs, sentence_trainer
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.losses import MatryoshkaLoss
from transformers import TrainerCallback, TrainingArguments

from bs_lightning import ExactGraph, PlannedPool, Planning, PoolBatchSampler, PoolLoader, Pools, RWRComposer
from bs_lightning.adapters.hugging_face import ComposedBatchesTrainer
from bs_lightning.adapters.sentence_transformers import ComposedSentenceTransformerTrainer, keep_apart
from bs_lightning.compose import FunctionComposer
from bs_lightning.metrics import in_batch_hardness

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Uniform(Records, SentenceTransformerTrainer):
    """Trains on uniform batches of the same seed, without the adapter."""

    def get_train_dataloader(self):
        own = super().get_train_dataloader()
        return PoolLoader(own.dataset, PoolBatchSampler(N, B, seed=self.args.seed), collate_fn=own.collate_fn)


def reference_batches(trainer, embed, n_epochs=2):
    """Plan by hand what a trainer has trained, with the weights that it had at the start of each pool."""
    batches = []

    def plan_pool(indices, *, seed, epoch):
        embeddings = torch.nn.functional.normalize(embed(trainer.weights[len(batches)], indices), dim=-1)
        return PlannedPool(composer()(embeddings, B, seed=seed, epoch=epoch))

    sampler = PoolBatchSampler(N, B, planning=Planning(plan_pool, Pools(POOL)), seed=trainer.args.seed)
    for epoch in range(n_epochs):
        sampler.set_epoch(epoch)
        for batch in sampler:
            batches.append(batch)
    return batches


def embed_pairs(weights, indices, prompt=None):
    model = hf_parts.sentence_model()
    model.load_state_dict(weights)
    rows = pairs()[indices.tolist()]
    sides = [model.encode(rows["anchor"], prompt=prompt), model.encode(rows["positive"])]
    return torch.stack([torch.as_tensor(side) for side in sides], dim=1)


@torch.no_grad()
def embed_tokens(weights, indices):
    model = bert().eval()
    model.load_state_dict(weights)
    return model(hf_parts.tokens()[indices.tolist()]["input_ids"]).last_hidden_state[:, 0]


def assert_each_once(batches, n_epochs=2):
    assert len(batches) == n_epochs * (N // B)
    for epoch in np.array_split(np.array(batches), n_epochs):
        assert len(np.unique(epoch)) == epoch.size


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_are_composed_with_the_weights_of_the_moment(tmp_path, workers):
    trainer = sentence_trainer(tmp_path, prompts={"anchor": "search "}, dataloader_num_workers=workers)
    trainer.train()
    assert_each_once(trainer.batches)
    assert trainer.batches == reference_batches(trainer, lambda *pool: embed_pairs(*pool, prompt="search "))


class FailsInStep(Records, ComposedSentenceTransformerTrainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 15:
            raise ValueError("it fails")
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("kind", [hf_parts.SentenceTrainer, FailsInStep])
def test_persistent_workers_end_with_training(tmp_path, kind):
    before = set(multiprocessing.active_children())
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = sentence_trainer(tmp_path, kind, **workers)
    with contextlib.suppress(ValueError):
        trainer.train()
    assert len(trainer.batches) == (15 if kind is FailsInStep else 24)
    assert set(multiprocessing.active_children()) <= before


def test_simcse_is_composed_with_the_weights_of_the_moment(tmp_path):
    trainer = bert_trainer(tmp_path)
    trainer.train()
    assert_each_once(trainer.batches)
    assert trainer.batches == reference_batches(trainer, embed_tokens)


def test_composed_batches_are_harder(tmp_path):
    composed, uniform = sentence_trainer(tmp_path), sentence_trainer(tmp_path, Uniform)
    hardness = []
    for trainer in (composed, uniform):
        trainer.train()
        embeddings = embed_pairs(composed.weights[0], np.arange(N))
        hardness.append(float(in_batch_hardness(embeddings[torch.tensor(trainer.batches[: N // B])])))
    assert hardness[0] > 2 * hardness[1]


@pytest.mark.parametrize("n_pools", [1, 3])
def test_the_log_says_how_hard_batches_are(tmp_path, n_pools):
    trainer = sentence_trainer(tmp_path, logging_steps=4 * n_pools)  # a pool has four batches
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 6 / n_pools
    assert all(log["batch_sampler/hardness"] > log["batch_sampler/uniform_hardness"] for log in logs)
    assert all(0 < log[f"batch_sampler/{name}accuracy"] <= 1 for name in ("", "uniform_") for log in logs)
    of_pools = []
    for start in range(0, len(trainer.batches), 4):
        embeddings = embed_pairs(trainer.weights[start], np.arange(N))
        of_pools.append(float(in_batch_hardness(embeddings[torch.tensor(trainer.batches[start : start + 4])])))
    since_the_last_log = np.reshape(of_pools, (-1, n_pools)).mean(axis=1)
    assert [log["batch_sampler/hardness"] for log in logs] == pytest.approx(since_the_last_log, abs=1e-4)


def test_values_to_log_do_not_gather_where_nothing_is_logged(tmp_path):
    sizes = []
    for n_epochs in (1, 3):
        trainer = sentence_trainer(tmp_path, logging_strategy="no", num_train_epochs=n_epochs)
        trainer.train()
        sizes.append(len(pickle.dumps(trainer._described)))
    assert sizes[0] == sizes[1]


def test_composers_get_what_they_ask_for(tmp_path):
    asked = []

    def compose(embeddings, batch_size, *, seed, epoch, indices, labels):
        asked.append((indices.tolist(), labels))
        return hf_parts.in_order(embeddings, batch_size, seed=seed, epoch=epoch)

    trainer = sentence_trainer(tmp_path, composer=compose, num_train_epochs=1)
    trainer.train()
    assert sum((indices for indices, _ in asked), []) == sum(trainer.batches, [])
    assert {labels for _, labels in asked} == {None}


def test_composing_leaves_no_trace(tmp_path):
    """With a composer that keeps the order of the pool, training is bit for bit as without the adapter."""
    same_order = sentence_trainer(tmp_path, composer=hf_parts.in_order)
    same_order.train()
    without = sentence_trainer(tmp_path, Uniform)  # a new trainer sets the seed
    without.train()
    assert same_order.batches == without.batches
    assert all(torch.equal(same_order.weights[-1][name], weight) for name, weight in without.weights[-1].items())
    assert not torch.equal(*(without.weights[step]["0.embedding.weight"] for step in (0, -1)))


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ({"gradient_accumulation_steps": 2}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
        ({}, {"dataloader_drop_last": False}),
    ],
    ids=str,
)
def test_resuming_where_the_trainer_would_skip_other_batches_is_refused(tmp_path, saved, resumed):
    sentence_trainer(tmp_path, save_strategy="steps", save_steps=1, **saved).train()
    step = 16 if "dataloader_drop_last" in resumed else 3
    with pytest.raises(
        ValueError, match=r"the Trainer would skip \d+. Resume with the gradient_accumulation_steps and"
    ):
        sentence_trainer(tmp_path, **resumed).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def test_resuming_at_an_epochs_end_with_other_data(tmp_path):
    """Steps 12 and 24 end an epoch of 100 pairs, and step 24 one of 70."""
    sentence_trainer(tmp_path, save_strategy="epoch").train()
    resumed = sentence_trainer(tmp_path, data=hf_parts.pairs(70), num_train_epochs=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert [len(batch) for batch in resumed.batches] == [8] * 8


@pytest.mark.skipif(not hasattr(TrainingArguments, "dataloader_multiprocessing_context"), reason="needs transformers 5")
def test_resuming_with_workers_of_a_named_start_method(tmp_path):
    more = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
    whole = hf_parts.bert_trainer(tmp_path, save_strategy="steps", save_steps=3, **more)
    whole.train()
    resumed = hf_parts.bert_trainer(tmp_path, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.batches == whole.batches[3:]


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}], ids=str)
def test_resuming_within_a_pool(tmp_path, more):
    whole = sentence_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3, **more)
    whole.train()
    resumed = sentence_trainer(tmp_path / "resumed", save_strategy="steps", save_steps=3, **more)
    planned = []
    compose = resumed.compose
    resumed.compose = lambda *args, **kwargs: planned.append(1) or compose(*args, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    trained = 3 * more.get("gradient_accumulation_steps", 1)
    assert resumed.batches == whole.batches[trained:]
    assert resumed.callback_handler.train_dataloader.num_workers == more.get("dataloader_num_workers", 0)
    assert len(planned) == 6 - 1 - (trained > 4)  # pools of 4 batches: those that were trained are not planned again
    assert all(torch.equal(whole.weights[-1][name], weight) for name, weight in resumed.weights[-1].items())
    again = sentence_trainer(tmp_path / "again", **more)
    again.train(resume_from_checkpoint=str(tmp_path / "resumed/checkpoint-6"))  # saved within the resumed epoch
    assert again.batches == whole.batches[2 * trained :]


@pytest.mark.parametrize(("step", "more"), [(12, {}), (3, {"ignore_data_skip": True})], ids=str)
def test_a_run_that_skips_no_data_resumes_with_its_workers(tmp_path, step, more):
    class Sees(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            workers.append(kwargs["train_dataloader"].num_workers)

    workers = []
    more |= {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": 1}
    sentence_trainer(tmp_path, **more).train()
    resumed = sentence_trainer(tmp_path, **more)
    resumed.add_callback(Sees())
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert workers == (24 - step) * [1]


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_skips_no_data_begins_its_epoch_anew(tmp_path, step):
    more = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 5}
    whole, resumed = (sentence_trainer(tmp_path, **more, ignore_data_skip=True) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    epoch = resumed.batches[:12]
    assert len({pair for batch in epoch for pair in batch}) == B * len(epoch)
    assert resumed.state.global_step == whole.state.global_step == 6


def test_a_second_training_starts_anew(tmp_path):
    trainer = sentence_trainer(tmp_path, num_train_epochs=1, composer=hf_parts.in_order)
    for _ in range(2):
        trainer.train()
    assert trainer.batches == 2 * trainer.batches[: N // B]


@pytest.mark.parametrize(("seeds", "used"), [({}, 42), ({"seed": 5}, 5), ({"seed": 5, "data_seed": 7}, 7)])
def test_the_seed_of_batches(tmp_path, seeds, used):
    batches = list(sentence_trainer(tmp_path, composer=hf_parts.in_order, **seeds).get_train_dataloader().batch_sampler)
    assert batches == list(PoolBatchSampler(N, B, seed=used))


def test_an_epoch_that_is_served_again_begins_with_its_first_batch(tmp_path):
    sampler = sentence_trainer(tmp_path, composer=hf_parts.in_order).get_train_dataloader().batch_sampler
    assert list(sampler) == list(sampler)


def test_by_default_a_pool_is_ten_batches(tmp_path):
    sizes = []

    def compose(embeddings, batch_size, *, seed, epoch):
        sizes.append(len(embeddings))
        return hf_parts.in_order(embeddings, batch_size, seed=seed, epoch=epoch)

    trainer = sentence_trainer(tmp_path, data=pairs(240), pool_size=None, composer=compose)
    list(trainer.get_train_dataloader().batch_sampler)
    assert sizes == 3 * [10 * B]


def test_pools_are_embedded_in_the_context_of_the_loss(tmp_path):
    class Halved(RecordedSimCSE):
        def compute_loss_context_manager(self):
            return torch.autocast("cpu", dtype=torch.bfloat16)

        def embed(self, inputs):
            enabled.append(torch.is_autocast_enabled("cpu"))
            return super().embed(inputs)

    enabled = []
    next(iter(bert_trainer(tmp_path, Halved).get_train_dataloader().batch_sampler))
    assert set(enabled) == {True}


def test_the_first_side_is_the_first_column(tmp_path):
    def compose(embeddings, batch_size, *, seed, epoch, indices):
        pools.append((embeddings, indices))
        return hf_parts.in_order(embeddings, batch_size, seed=seed, epoch=epoch)

    pools = []
    trainer = sentence_trainer(tmp_path, composer=compose)
    next(iter(trainer.get_train_dataloader().batch_sampler))
    embeddings, indices = pools[0]
    expected = torch.nn.functional.normalize(embed_pairs(trainer.model.state_dict(), indices), dim=-1)
    torch.testing.assert_close(embeddings, expected)


def test_a_single_column_of_texts_has_one_side(tmp_path):
    def compose(embeddings, batch_size, *, seed, epoch):
        shapes.append(embeddings.shape)
        return hf_parts.in_order(embeddings, batch_size, seed=seed, epoch=epoch)

    shapes = []
    data = pairs().remove_columns("positive")  # for losses of texts and labels
    next(iter(sentence_trainer(tmp_path, data=data, composer=compose).get_train_dataloader().batch_sampler))
    assert shapes == [(POOL, 16)]


def test_a_composer_with_replacement(tmp_path):
    near = RWRComposer(ExactGraph(n_neighbors=5), replacement=True)
    batches = list(sentence_trainer(tmp_path, composer=near).get_train_dataloader().batch_sampler)
    assert [len(set(batch)) for batch in batches] == N // B * [B]
    assert len(set(sum(batches, []))) < N // B * B


def test_equal_texts_are_kept_apart(tmp_path):
    rows = pairs()[:50]
    rows = {name: 2 * rows[name] for name in ("anchor", "positive")} | {"label": 100 * [1]}
    rows["positive"][50:] = [f"{text} word0" for text in rows["positive"][50:]]
    rows["positive"][60] = rows["anchor"][0]  # in a different column
    trainer = sentence_trainer(tmp_path, data=hf_parts.Dataset.from_dict(rows))
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert len(batches) == N // B
    for batch in batches:
        texts = [{rows["anchor"][index], rows["positive"][index]} for index in batch]
        assert len(set().union(*texts)) == sum(map(len, texts))


def test_a_text_that_is_too_frequent_is_named(tmp_path):
    rows = pairs().to_dict() | {"anchor": N * ["word0"]}
    trainer = sentence_trainer(tmp_path, data=hf_parts.Dataset.from_dict(rows))
    with pytest.warns(UserWarning, match="28 texts of a pool occur twice in a batch"):
        next(iter(trainer.get_train_dataloader()))


@example(3, 6, 1, 21)  # a text that is too frequent may move
@given(st.integers(1, 6), st.integers(2, 6), st.integers(1, 12), st.integers(0, 100))
def test_keep_apart(n_batches, size, n_texts, seed):
    rng = np.random.default_rng(seed)
    texts = [set(map(str, rng.integers(n_texts * size, size=2))) for _ in range(n_batches * size)]
    batches = rng.permutation(n_batches * size).reshape(n_batches, size)

    def repetitions(batches, texts):
        return sum(
            sum(len(texts[p]) for p in batch) - len(set().union(*(texts[p] for p in batch)))
            for batch in batches.tolist()
        )

    apart, left = keep_apart(batches, texts, seed)
    assert sorted(apart.ravel()) == list(range(n_batches * size))
    assert left == repetitions(apart, texts)
    frequency = Counter(text for each in texts for text in each)
    separable = [{text for text in each if frequency[text] <= n_batches} for each in texts]
    assert repetitions(apart, separable) <= repetitions(batches, separable)
    if not repetitions(batches, texts):
        np.testing.assert_array_equal(apart, batches)


def test_no_exchange_brings_a_new_repetition():
    texts = [{str(i // 2), f"other{i * 7 % 24 // 3}"} for i in range(24)]
    for seed in range(10):
        assert keep_apart(np.arange(24).reshape(4, 6), texts, seed)[1] == 0


def test_a_text_of_all_instances_does_not_keep_others_together():
    texts = [{"label", "twin" if i < 2 else str(i)} for i in range(8)]
    apart, left = keep_apart(np.arange(8).reshape(2, 4), texts, seed=0)
    assert sorted((apart < 2).sum(axis=1)) == [1, 1]
    assert left == 6  # the label, of four instances in each batch


def test_evaluation_keeps_its_own_batches(tmp_path):
    trainer = sentence_trainer(tmp_path)
    assert not isinstance(trainer.get_eval_dataloader(pairs()).batch_sampler, PoolBatchSampler)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": DatasetDict({"a": pairs()})}, "train_dataset must be one datasets.Dataset, got DatasetDict"),
        ({"batch_sampler": "group_by_label"}, "batch_sampler=.*Leave it out"),
        ({"pool_size": 7}, "pool_size must be at least one global batch"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True is not supported"),
        ({"encode_batch_size": 0}, "encode_batch_size must be at least 1, got 0"),
        ({"composer": lambda pool, size, **_: np.arange(len(pool)).reshape(size, -1)}, "batches of shape"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_what_cannot_be_composed_is_refused(tmp_path, change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        sentence_trainer(tmp_path, **change).train()


@pytest.mark.parametrize(
    ("name", "asked", "usual"),
    [("train_sampling_strategy", "group_by_length", "random"), ("group_by_length", True, False)],
)
def test_an_order_that_composed_batches_replace_is_refused(tmp_path, name, asked, usual):
    trainer = bert_trainer(tmp_path)
    setattr(trainer.args, name, asked)
    with pytest.raises(ValueError, match=f"{name}={asked!r} cannot be combined .* Leave it at {usual!r}"):
        trainer.train()


def test_a_last_batch_of_one_is_refused_in_the_words_of_the_arguments(tmp_path):
    trainer = sentence_trainer(tmp_path, data=pairs(97), dataloader_drop_last=False)
    with pytest.raises(ValueError, match="a last batch of 1 instances") as caught:
        trainer.train()
    assert "drop_last is dataloader_drop_last" in caught.value.__notes__[0]


def test_a_trainer_without_embed_is_told_so(tmp_path):
    kind = type("Plain", (RecordedSimCSE,), {"embed": ComposedBatchesTrainer.embed})
    with pytest.raises(NotImplementedError, match="Plain must override embed"):
        bert_trainer(tmp_path, kind).train()


def in_two_processes(folder, **settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return finish([*command, hf_parts.__file__, folder, json.dumps(settings)])


@pytest.mark.slow
@pytest.mark.parametrize("gather", [False, True])
def test_two_processes(tmp_path, gather):
    done = in_two_processes(tmp_path, gather=gather, per_device_train_batch_size=4, pool_size=32)
    assert done.returncode == 0, done.error[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    batches = [first + second for first, second in zip(*ranks, strict=True)]
    assert_each_once(batches)
    # The first pool was planned with the first weights.
    pool = np.sort(np.array(batches[:4]).ravel())
    sampler = PoolBatchSampler(N, B, seed=42)
    planned = []

    def plan_pool(indices, *, seed, epoch):
        assert sorted(indices) == pool.tolist()
        embeddings = torch.nn.functional.normalize(embed_pairs(hf_parts.sentence_model().state_dict(), indices), dim=-1)
        size = B if gather else B // 2
        planned.append(composer()(embeddings, size, seed=seed, epoch=epoch).reshape(-1, B))
        return PlannedPool(planned[0])

    sampler.planning = Planning(plan_pool, Pools(32))
    served = iter(sampler)
    assert [next(served) for _ in range(4)] == batches[:4]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other(tmp_path):
    done = in_two_processes(tmp_path, fails=True, per_device_train_batch_size=4)
    assert done.returncode != 0
    assert "The process of rank 1 failed to plan a pool. ZeroDivisionError: division by zero" in done.error


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    page = Path(__file__).parents[1] / "docs/other_trainers.md"
    pairs_code, tokens_code, loop = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names = {"model": hf_parts.sentence_model(), "pairs": pairs(700), "encoder": bert()}
    names["tokens"] = hf_parts.tokens(700).remove_columns("labels")
    for code in (pairs_code, tokens_code):
        code = code.replace('"checkpoints"', f'"checkpoints", **{hf_parts.QUIET | {"max_steps": 3}}')
        exec(code.replace("pool_size=6400", "pool_size=640"), names)
        assert names["trainer"].state.global_step == 3
    exec(loop, names)
    assert (names["epoch"], names["sampler"].served) == (2, 2000 // 64)


def test_pools_are_embedded_in_batches_as_large_as_those_of_training(tmp_path):
    class Noting(RecordedSimCSE):
        def embed(self, inputs):
            sizes.append(len(inputs["input_ids"]))
            return super().embed(inputs)

    sizes = []
    bert_trainer(tmp_path, Noting, per_device_eval_batch_size=2, num_train_epochs=1).train()
    assert set(sizes) == {B}
    sizes.clear()
    trainer = bert_trainer(tmp_path, Noting, num_train_epochs=1)
    trainer.encode_batch_size = 16
    trainer.train()
    assert set(sizes) == {16}


@pytest.mark.parametrize("wrap", [lambda loss, model: loss, lambda loss, model: MatryoshkaLoss(model, loss, [16, 8])])
def test_a_cached_loss_is_embedded_in_its_mini_batches(tmp_path, wrap):
    trainer = sentence_trainer(tmp_path, num_train_epochs=1)
    trainer.loss.mini_batch_size = 4  # as of a cached loss, which takes no model of word vectors
    trainer.loss = wrap(trainer.loss, trainer.model)
    sizes, embed = [], trainer.embed
    trainer.embed = lambda inputs: sizes.append(len(inputs["label"])) or embed(inputs)
    next(iter(trainer.get_train_dataloader()))
    assert set(sizes) == {4}


def test_images_beside_the_texts_are_not_decoded(tmp_path):
    rows = pairs().add_column("picture", N * [{"bytes": b"no image", "path": None}])
    trainer = sentence_trainer(tmp_path)
    trainer.train_dataset = rows.cast_column("picture", Image())
    batches = trainer.compose(torch.randn(8, 2, 4), np.arange(8), 4, seed=0, epoch=0)
    assert sorted(batches.ravel()) == list(range(8))


@pytest.mark.parametrize("kind", [Value("large_string"), Sequence(Value("string"))], ids=["large", "lists"])
def test_texts_of_any_type_in_any_column_are_kept_apart(tmp_path, kind):
    texts = [f"text {number // 2}" for number in range(8)]
    different = {name: [f"{name} {number}" for number in range(8)] for name in ("anchor", "positive")}
    rows = different | {"negative": texts if isinstance(kind, Value) else [[text] for text in texts]}
    features = Features(anchor=Value("string"), positive=Value("string"), negative=kind)
    trainer = sentence_trainer(tmp_path, composer=hf_parts.in_order)
    trainer.train_dataset = hf_parts.Dataset.from_dict(rows, features=features)
    batches = trainer.compose(torch.randn(8, 4), np.arange(8), 4, seed=0, epoch=0)
    assert all(len({texts[position] for position in batch}) == 4 for batch in batches)


def test_texts_that_a_transform_makes_are_kept_apart(tmp_path):
    trainer = sentence_trainer(tmp_path)
    numbers = hf_parts.Dataset.from_dict({"number": list(range(8)), "label": 8 * [1]})
    trainer.train_dataset = numbers.with_transform(
        lambda rows: {"anchor": [f"text {number % 4}" for number in rows["number"]], "label": rows["label"]}
    )
    trainer.composer = FunctionComposer(hf_parts.in_order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a label is no text
        batches = trainer.compose(torch.randn(8, 4), np.array([0, 4, 1, 5, 2, 6, 3, 7]), 4, seed=0, epoch=0)
    texts = np.array([0, 0, 1, 1, 2, 2, 3, 3])[batches]
    assert all(len(set(batch)) == 4 for batch in texts)


def test_a_checkpoint_of_a_trainer_without_the_adapter(tmp_path):
    every_epoch = {"save_strategy": "epoch"}
    sentence_trainer(tmp_path, SentenceTransformerTrainer, **every_epoch, num_train_epochs=1).train()
    composed = sentence_trainer(tmp_path, **every_epoch, num_train_epochs=2)
    composed.train(resume_from_checkpoint=True)
    assert_each_once(composed.batches, n_epochs=1)
    again = sentence_trainer(tmp_path, **every_epoch, num_train_epochs=3)
    again.train(resume_from_checkpoint=True)
    assert_each_once(again.batches, n_epochs=1)
