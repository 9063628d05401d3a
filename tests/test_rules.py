"""Rules of false negatives: each against a literal version, and in the graph, the loss and a resumed run."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, fit, walker

from bs_lightning import BatchSamplerCallback, ExactGraph, PoolBatchSampler, RWRComposer
from bs_lightning.baselines import UniformComposer
from bs_lightning.edges import restricted, without_edges
from bs_lightning.rules import (
    AbovePositive,
    AboveSimilarity,
    MoreSimilar,
    SameGroup,
    check_reference,
    either_way,
)


def sides(n, dim=6, seed=0):
    return torch.randn(n, 2, dim, generator=torch.Generator().manual_seed(seed))


def literal_above_positive(embeddings, i, j, margin=0.0, factor=1.0, every_side=False):
    unit = embeddings.double() / embeddings.double().norm(dim=2, keepdim=True)
    compared = [(0, 1), (1, 0), (0, 0), (1, 1)] if every_side else [(0, 1)]
    limit = factor * (unit[i, 0] @ unit[i, 1]) + margin
    return any(bool(unit[i, own] @ unit[j, other] > limit) for own, other in compared)


@pytest.mark.parametrize("limit", [{}, {"margin": 0.1}, {"margin": -0.2}, {"factor": 0.9}, {"every_side": True}])
def test_above_positive(limit):
    embeddings = sides(12) * torch.logspace(-3, 3, 12)[:, None, None]
    rule = MoreSimilar(embeddings, AbovePositive(**limit))
    batch = np.array([3, 11, 0, 7, 5])
    mask = rule.in_batch(batch)
    assert 0 < mask.sum() < 25
    for row, i in enumerate(batch):
        for column, j in enumerate(batch):
            if i != j:
                assert mask[row, column] == literal_above_positive(embeddings, i, j, **limit)
    forward, backward = rule.along(batch, np.tile(batch, (5, 1)))
    different = ~np.eye(5, dtype=bool)
    assert np.array_equal(forward[different], mask.numpy()[different])
    assert np.array_equal(backward[different], mask.numpy().T[different])
    assert not torch.equal(mask, mask.T)  # the rule has a direction


def test_above_similarity_of_one_side():
    embeddings = sides(12)[:, 0]
    rule = MoreSimilar(embeddings.numpy(), AboveSimilarity(0.2))
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    assert torch.equal(rule.in_batch(np.arange(12)), unit @ unit.T > 0.2)
    forward, backward = rule.along(np.array([1, 2]), np.array([[4], [9]]))
    assert forward.tolist() == backward.tolist() == [[bool(unit[1] @ unit[4] > 0.2)], [bool(unit[2] @ unit[9] > 0.2)]]


@pytest.mark.parametrize("every_side", [False, True])
def test_edges_are_read_in_parts(monkeypatch, every_side):
    embeddings = sides(40)
    rule = MoreSimilar(embeddings, AbovePositive(every_side=every_side))
    nodes, neighbors = np.arange(40), np.random.default_rng(0).integers(0, 40, (40, 7))
    expected = rule.along(nodes, neighbors)
    monkeypatch.setattr("bs_lightning.rules._CHUNK_ENTRIES", 300)
    assert all(np.array_equal(one, other) for one, other in zip(rule.along(nodes, neighbors), expected, strict=True))
    assert rule.along(nodes[:0], neighbors[:0])[0].shape == (0, 7)


def test_a_tie_is_marked_neither_in_a_batch_nor_along_an_edge():
    """Where a document occurs twice, rounding would decide."""
    first, document = sides(200, dim=64)[:, 0], sides(200, dim=64, seed=1)[:, 1]
    embeddings = torch.stack([first.repeat(2, 1), document.repeat(2, 1)], dim=1)
    embeddings[200:, 0] = sides(200, dim=64, seed=2)[:, 0]
    rule = MoreSimilar(embeddings)
    twins = np.arange(400).reshape(2, 200).T
    assert not rule.in_batch(twins.ravel())[torch.arange(0, 400, 2), torch.arange(1, 400, 2)].any()
    assert not rule.along(twins[:, 0], twins[:, 1:])[0].any()


def test_rounding_makes_no_similarity_exceed_one():
    embeddings, everything = sides(400, dim=64)[:, 0].repeat(2, 1), np.arange(800)
    rule = MoreSimilar(embeddings, AboveSimilarity(1.0))
    assert not rule.in_batch(everything).any()
    assert not np.any(rule.along(everything, np.roll(everything, 400)[:, None]))


def test_a_mask_is_the_same_under_autocast():
    for limit in (AbovePositive(), AbovePositive(every_side=True)):
        rule, everything = MoreSimilar(sides(200, dim=64), limit), np.arange(200)
        edges = np.stack([np.roll(everything, -shift) for shift in range(1, 100)], axis=1)
        expected, along = rule.in_batch(everything), rule.along(everything, edges)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(rule.in_batch(everything), expected)
            np.testing.assert_array_equal(rule.along(everything, edges), along)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_same_group(groups):
    rule, size = SameGroup(groups), len(groups)
    everything = np.arange(size)
    assert rule.in_batch(everything).tolist() == [[a == b for b in groups] for a in groups]
    forward, backward = rule.along(everything, np.tile(everything, (size, 1)))
    assert forward.tolist() == backward.tolist() == rule.in_batch(everything).tolist()


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=12))
def test_instances_with_several_groups_are_marked_if_they_have_one_in_common(groups):
    rule, everything = SameGroup(groups), np.arange(len(groups))
    expected = [[not set(a).isdisjoint(b) for b in groups] for a in groups]
    assert rule.in_batch(everything).tolist() == expected
    forward, backward = rule.along(everything[::-1], np.tile(everything, (len(groups), 1)))
    assert forward.tolist() == backward.tolist() == expected[::-1]


def test_an_edge_is_marked_if_a_rule_marks_one_of_its_directions():
    embeddings, indices = sides(30), np.random.default_rng(0).permutation(30)[:20]
    neighbors = ExactGraph(4)(embeddings[indices])
    groups = np.arange(30) // 3
    marked = either_way([MoreSimilar(embeddings), SameGroup(groups)], indices, neighbors)
    for i, row in enumerate(neighbors):
        for column, j in enumerate(row):
            a, b = indices[i], indices[j]
            expected = (
                literal_above_positive(embeddings, a, b)
                or literal_above_positive(embeddings, b, a)
                or groups[a] == groups[b]
            )
            assert marked[i, column] == expected
    assert 0 < marked.sum() < marked.size


@given(st.data())
def test_without_edges(data):
    size, k = data.draw(st.integers(2, 10)), data.draw(st.integers(1, 5))
    neighbors = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=size * k, max_size=size * k)))
    marked = np.array(data.draw(st.lists(st.booleans(), min_size=size * k, max_size=size * k)))
    neighbors, marked = neighbors.reshape(size, k).astype(np.int32), marked.reshape(size, k)
    result = without_edges(neighbors, marked)
    assert result.shape == neighbors.shape
    assert result.dtype == np.int32
    for row, (old, gone, new) in enumerate(zip(neighbors.tolist(), marked.tolist(), result.tolist(), strict=True)):
        kept = [node for node, lost in zip(old, gone, strict=True) if not lost]
        expected = [kept[column % len(kept)] for column in range(k)] if kept else [row] * k
        assert new == expected


def test_a_graph_may_be_nested_lists():
    def ring(embeddings, *, seed=0):
        return [[(row + 1) % len(embeddings), (row + 2) % len(embeddings)] for row in range(len(embeddings))]

    asked = []

    def none_marked(neighbors):
        asked.append(neighbors)
        return np.zeros(neighbors.shape, dtype=bool)

    composer = RWRComposer(ring)
    batches = composer(torch.randn(12, 4), 4, seed=0, epoch=0, likely_false_negatives=none_marked)
    assert sorted(batches.ravel().tolist()) == list(range(12))
    assert asked[0].dtype == np.int32


def test_a_datasets_graph_is_restricted_to_a_pool():
    neighbors = np.array([[1, 2, 3], [0, 2, 4], [4, 3, 0], [1, 4, 2], [0, 1, 2]], dtype=np.int32)
    pool = np.array([4, 1, 2])
    assert restricted(neighbors, pool).tolist() == [[1, 2, 1], [2, 0, 2], [0, 0, 0]]


def test_walks_take_no_edge_that_a_rule_marks():
    groups = np.arange(320) % 40
    embeddings = torch.nn.functional.one_hot(torch.from_numpy(groups)).float()
    embeddings += 0.3 * torch.randn(320, 40, generator=torch.Generator().manual_seed(0))

    def same_pairs(**more):
        batches = RWRComposer(ExactGraph(15))(embeddings, 8, seed=0, epoch=0, **more)
        own = groups[batches]
        return (own[:, :, None] == own[:, None]).sum() - batches.size

    rule = SameGroup(groups)

    def mark(neighbors):
        return either_way([rule], np.arange(320), neighbors)

    # Uniform batches hold about 49 such pairs. In this graph walks still meet a group by way of others.
    assert same_pairs(likely_false_negatives=mark) < 49 < 80 < same_pairs()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: AbovePositive(margin="0"), TypeError, "margin must be a number, got '0'"),
        (lambda: AbovePositive(margin=3), ValueError, "margin must lie in [-2, 2]"),
        (lambda: AbovePositive(factor=0), ValueError, "factor must be finite and above 0, got 0"),
        (lambda: AboveSimilarity(1.5), ValueError, "threshold must lie in [-1, 1], as cosine similarities do, got 1.5"),
        (lambda: MoreSimilar(sides(4)[:, 0]), ValueError, "needs embeddings with two sides, [N, 2, d], got [4, 6]"),
        (lambda: MoreSimilar([[1.0]]), TypeError, "embeddings must be a dense tensor or a NumPy array of floats, got"),
        (lambda: MoreSimilar(torch.ones(4)), ValueError, "embeddings must have shape [N, d] or [N, 2, d], got [4]"),
        (lambda: MoreSimilar(torch.ones(4, 3, 2)), ValueError, "[N, d] or [N, 2, d], got [4, 3, 2]"),
        (lambda: MoreSimilar(sides(4), 0.5), TypeError, "limit must be callable, such as AboveSimilarity(0.9), got 0."),
        (lambda: SameGroup([0.5, 1.0]), TypeError, "groups must hold integers, got dtype float64"),
        (lambda: SameGroup([[[0]]]), ValueError, "one integer for each instance, or [N, G] with G >= 1, got shape [1"),
        (lambda: SameGroup(np.ones((3, 0), dtype=int)), ValueError, "[N, G] with G >= 1, got shape [3, 0]"),
    ],
)
def test_refuses(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()


def with_nan(array, row):
    array[row, ..., 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        (np.ones((9, 4)), ValueError, "with N = 10, the length of train_dataset(), got [9, 4]"),
        (np.ones(10), ValueError, "must have shape [N, d] or [N, 2, d] with N = 10"),
        (np.ones((10, 3, 4)), ValueError, "got [10, 3, 4]"),
        (np.ones((10, 0)), ValueError, "got [10, 0]"),
        (np.ones((10, 4), dtype=int), TypeError, "[N, d] or [N, 2, d], got an array of dtype int64"),
        ([[1.0]] * 10, TypeError, "got a list of 10"),
        (with_nan(np.ones((10, 2, 4), dtype=np.float16), 7), ValueError, "the row of dataset index 7 is not"),
        (torch.ones(10, 4).to_sparse(), TypeError, "got a tensor of dtype torch.float32 and layout torch.sparse"),
    ],
)
def test_refuses_a_reference(reference, error, words, monkeypatch):
    monkeypatch.setattr("bs_lightning.rules._CHUNK_ENTRIES", 24)  # reads three rows at a time
    with pytest.raises(error, match=re.escape(words)):
        check_reference(reference, 10)


def test_refuses_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "reference.npy"
    np.save(path, np.ones((10, 4), dtype=np.float32))
    reference = np.load(path, mmap_mode="r")
    check_reference(reference, 10)
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"a memmap of \d+ bytes, but .*reference.npy has only 200"):
        check_reference(reference, 10)


# In training


class Grouped(Data):
    """Instances ``2 i`` and ``2 i + 1`` are a group."""

    def train_groups(self):
        return np.arange(self.n) // 2


class Guided(Data):
    def reference_embeddings(self):
        return sides(self.n).numpy()


class Asks(Model):
    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)  # a resumed run draws the same noise
        data = self.trainer.datamodule
        self.seen = [*getattr(self, "seen", []), (data.trained_batch(), data.likely_false_negatives())]
        return super().training_step(batch, batch_idx)


class TwoSides(Asks):
    def embed(self, batch):
        return self(batch), self((batch[0], batch[1].roll(1, dims=1)))


@pytest.mark.parametrize("callbacks", [[], [walker(warmup_epochs=1)], [walker(recycle=False, per_rank=True)]])
def test_groups_are_masked_with_and_without_the_callback(callbacks):
    model = Asks()
    fit(model, Grouped(), *callbacks)
    for batch, mask in model.seen:
        groups = torch.from_numpy(batch // 2)
        expected = (groups[:, None] == groups).fill_diagonal_(False)
        assert torch.equal(mask, expected)
    assert any(mask.any() for _, mask in model.seen)


@pytest.mark.parametrize(("rule", "margin"), [(None, 0), (AbovePositive(margin=0.1), 0.1)])
def test_the_reference_masks_pairs_in_all_batches(rule, margin):
    model, reference = Asks(), sides(100)
    fit(model, Guided(reference_rule=rule), walker(warmup_epochs=1))
    for batch, mask in model.seen:
        for row, i in enumerate(batch):
            for column, j in enumerate(batch):
                assert mask[row, column] == (i != j and literal_above_positive(reference, i, j, margin=margin))


# With 31 neighbours, all others of a pool are. With 5, one of two may be the other's neighbour.
@pytest.mark.parametrize(("kind", "n_neighbors"), [(RWRComposer, 31), (UniformComposer, 5)])
def test_own_rule_masks_the_nearest_that_exceed_the_positive(kind, n_neighbors):
    model, pools = TwoSides(), []

    class Keeps(kind):
        def __call__(self, embeddings, batch_size, *, indices, **kwargs):
            batches = super().__call__(embeddings, batch_size, **kwargs)
            pools.append((indices, embeddings.clone(), [set(row) for row in self.neighbors.tolist()]))
            return batches

    composer = Keeps(ExactGraph(n_neighbors))
    fit(model, Data(n=96), walker(composer=composer, own_rule=AbovePositive(), warmup_epochs=1))
    pools = [pool for pool in pools if len(set(pool[0].tolist())) == 32][-3:]
    served = model.seen[-12:]
    marked = 0
    for indices, embeddings, near in pools:
        where = {int(index): position for position, index in enumerate(indices)}
        for batch, mask in served:
            if int(batch[0]) not in where:
                continue
            for row, i in enumerate(batch.tolist()):
                for column, j in enumerate(batch.tolist()):
                    a, b = where[i], where[j]
                    is_edge = b in near[a] or a in near[b]
                    expected = i != j and is_edge and literal_above_positive(embeddings, a, b)
                    assert mask[row, column] == expected
                    marked += expected
    assert marked > 10
    assert not any(mask.any() for _, mask in model.seen[:12])  # the uniform epoch


def test_walks_avoid_the_edges_of_all_rules():
    pools = []

    class Keeps(RWRComposer):
        def __call__(self, embeddings, batch_size, *, indices, likely_false_negatives, **kwargs):
            everything = np.tile(np.arange(len(indices), dtype=np.int32), (len(indices), 1))
            pools.append((indices, likely_false_negatives(everything)))
            return super().__call__(embeddings, batch_size, **kwargs)

    fit(TwoSides(), Grouped(), walker(composer=Keeps(ExactGraph(5)), own_rule=AbovePositive()), max_epochs=1)
    for indices, marked in pools:
        same_group = indices[:, None] // 2 == indices // 2
        assert marked[same_group].all()
        assert same_group.sum() < marked.sum() < marked.size


@pytest.mark.parametrize("data", [Grouped(), Guided()], ids=["groups", "reference"])
def test_masks_come_back_when_a_run_is_resumed(tmp_path, data):
    def run(**kwargs):
        torch.manual_seed(0)
        model = TwoSides()
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        rule = {"own_rule": AbovePositive()}
        fit(model, type(data)(seed=1), walker(**rule), saves, enable_checkpointing=True, **kwargs)
        return model.seen

    whole = run()
    resumed = run(ckpt_path=tmp_path / "step=5.ckpt")
    assert len(resumed) == len(whole) - 5
    for (batch, mask), (other_batch, other_mask) in zip(whole[5:], resumed, strict=True):
        assert np.array_equal(batch, other_batch)
        assert torch.equal(mask, other_mask)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"own_rule": 0.1}, TypeError, r"own_rule must be AbovePositive\(...\) or None, got 0.1"),
        (
            {"own_rule": AbovePositive(), "composer": lambda *args, **kwargs: None},
            TypeError,
            "own_rule=AbovePositive.* needs a composer that finds each instance's nearest neighbours",
        ),
    ],
)
def test_the_callback_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        BatchSamplerCallback(**kwargs)


def test_own_rule_marks_no_all_zero_embeddings():
    """With a negative margin their similarity, 0, would be above the limit."""

    class Zeros(TwoSides):
        def embed(self, batch):
            first, second = super().embed(batch)
            return first * 0, second * 0

    model = Zeros()
    fit(model, Data(), walker(own_rule=AbovePositive(margin=-0.1)), max_epochs=1)
    assert not any(mask.any() for _, mask in model.seen)


def test_own_rule_of_recycled_sides():
    """Before the first rows are there, nobody knows how many sides they will have."""

    class Returns(TwoSides):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "embeddings": self.embed(batch)}

    for warmup_epochs in (0, 1):
        model = Returns()
        fit(model, Data(), walker(own_rule=AbovePositive(), recycle=True, warmup_epochs=warmup_epochs), max_epochs=3)
        assert not any(mask.any() for _, mask in model.seen[:12])
        assert any(mask.any() for _, mask in model.seen[24:])


@pytest.mark.parametrize("kind", [{"pool_size": 32}, {"pool_size": None, "refresh_every": 5}], ids=str)
def test_pairs_of_batches_that_share_instances_come_back(tmp_path, kind):
    def run(**kwargs):
        torch.manual_seed(0)
        model = TwoSides()
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        composer = RWRComposer(ExactGraph(5), replacement=True)
        callback = walker(composer=composer, own_rule=AbovePositive(), mask_nearest=3, **kind)
        fit(model, Data(seed=1), callback, saves, enable_checkpointing=True, max_epochs=1, **kwargs)
        return model.seen

    whole, resumed = run(), run(ckpt_path=tmp_path / "step=2.ckpt")
    assert any(mask.any() for _, mask in whole)
    for (batch, mask), (other_batch, other_mask) in zip(whole[2:], resumed, strict=True):
        assert np.array_equal(batch, other_batch)
        assert torch.equal(mask, other_mask)


def test_own_rule_needs_two_sides():
    with pytest.raises(ValueError, match=r"AbovePositive\(.*\) needs embeddings with two sides"):
        fit(Model(), Data(), walker(own_rule=AbovePositive(), warmup_epochs=1))


def test_a_reference_of_one_side_needs_a_threshold():
    class OneSided(Data):
        def reference_embeddings(self):
            return sides(self.n)[:, 0]

    with pytest.raises(RuntimeError, match=r"give reference_rule=AboveSimilarity\(threshold\)"):
        fit(Asks(), OneSided(), walker())


class ShortGroups(Data):
    def train_groups(self):
        return [0] * 99


class ShortReference(Data):
    def reference_embeddings(self):
        return np.ones((99, 4))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            ShortGroups,
            ValueError,
            r"train_groups\(\) must have the length and order of train_dataset\(\), 100, got length 99",
        ),
        (ShortReference, ValueError, r"with N = 100, the length of train_dataset\(\), got \[99, 4\]"),
        (lambda: Data(reference_rule=AbovePositive()), TypeError, "to override reference_embeddings"),
        (lambda: Data(reference_rule=0.3), TypeError, "reference_rule must be AbovePositive"),
        (
            lambda: Data(separate_groups=True),
            TypeError,
            r"separate_groups=True needs Data to override train_groups\(\)",
        ),
    ],
)
def test_the_data_module_refuses(make, error, words):
    with pytest.raises(error, match=words):
        fit(Model(), make(), walker())


_NUMBERS = np.arange(100)


@pytest.mark.parametrize(
    ("groups", "settings", "words"),
    [
        ([-7] * 100, {}, "100 of the 100 instances share a group.* marks up to 100% of all negatives"),
        (np.stack([_NUMBERS, np.full(100, 200)], axis=1), {}, "100 of the 100 instances .* up to 100%"),
        (np.maximum(_NUMBERS - 39, 0), {}, "40 of the 100 instances .* up to 16%"),
        (np.stack([np.maximum(_NUMBERS - 39, 0)] * 2, axis=1), {}, "40 of the 100 instances .* up to 16%"),
        (np.maximum(_NUMBERS - 29, 0), {}, None),
        (np.stack([_NUMBERS // 2, 200 + _NUMBERS % 13], axis=1), {}, None),
        (_NUMBERS % 9, {}, "12 of the 100 instances .* up to 10%"),
        (_NUMBERS % 9, {"separate_groups": True, "batch_size": 4}, None),
    ],
    ids=["one", "one-shared", "large", "large-named-twice", "small", "pairs", "several", "apart"],
)
def test_large_groups_warn(groups, settings, words, recwarn):
    class Given(Data):
        def train_groups(self):
            return groups

    Given(**settings).train_dataloader()
    shown = [str(each.message) for each in recwarn if "share a group" in str(each.message)]
    assert len(shown) == (words is not None)
    assert not shown or re.search(words, shown[0])


def test_rules_of_a_hand_written_loop():
    sampler = PoolBatchSampler(20, 5, rules=[SameGroup(np.arange(20) // 5)])
    for batch in sampler:
        groups = torch.tensor(batch) // 5
        assert torch.equal(sampler.likely_false_negatives(), (groups[:, None] == groups).fill_diagonal_(False))
