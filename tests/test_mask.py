"""Masks of likely false negatives: the functions against literal versions, and masks in training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, Points, fit, pool_order, same_cluster_share, walker

from bs_lightning import BatchSamplerCallback, ExactGraph, RandomCandidateGraph, RWRComposer
from bs_lightning.baselines import UniformComposer
from bs_lightning.mask import mutual_nearest, pair_mask


def literal_mutual(neighbors, k):
    rows = [list(row[:k]) for row in neighbors]
    return [[i, j] for i in range(len(rows)) for j in range(len(rows)) if i != j and j in rows[i] and i in rows[j]]


@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_mutual_nearest(size, n_neighbors, n_nearest, seed):
    neighbors = ExactGraph(n_neighbors)(torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)))
    pairs = mutual_nearest(neighbors, n_nearest)
    assert sorted(pairs.tolist()) == literal_mutual(neighbors, n_nearest)


@given(st.data())
def test_pair_mask(data):
    batch = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
    pair = st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda pair: pair[0] != pair[1])
    pairs = data.draw(st.lists(pair, max_size=30, unique=True))
    mask = pair_mask(np.array(pairs, dtype=np.int64).reshape(-1, 2), batch)
    expected = [[(a, b) in pairs for b in batch] for a in batch]
    assert mask.tolist() == expected


def test_mutual_nearest_returns_a_pair_once_where_rows_repeat_neighbours():
    assert mutual_nearest([[1, 1], [0, 0]], 2).tolist() == [[0, 1], [1, 0]]
    graph = np.random.default_rng(0).integers(0, 12, (12, 8))
    assert mutual_nearest(graph, 8).tolist() == literal_mutual(graph, 8)


def test_mutual_nearest_of_no_nodes_and_of_rows_without_edges():
    assert mutual_nearest(np.empty((0, 3), dtype=np.int32), 2).shape == (0, 2)
    assert mutual_nearest([[0, 1], [1, 1]], 2).shape == (0, 2)  # node 1 has no edge


def test_pair_mask_of_an_empty_batch_and_of_no_pairs():
    assert pair_mask([[1, 2]], []).shape == (0, 0)
    assert not pair_mask(np.empty((0, 2), dtype=np.int64), [1, 2]).any()


def test_pair_mask_accepts_tensors_and_leaves_the_diagonal():
    pairs, batch = torch.tensor([[3, 8], [8, 3], [3, 3]]), torch.tensor([8, 4, 3])
    assert pair_mask(pairs, batch).int().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("neighbors", "n_nearest", "error", "words"),
    [
        ([[1], [0]], 0, ValueError, "n_nearest must be at least 1, got 0"),
        ([[1], [0]], 1.5, TypeError, "n_nearest must be an integer, got 1.5"),
        ([1, 0], 1, ValueError, r"neighbors must have shape \[P, K\] with K >= 1, got shape \[2\]"),
        ([[1, 5], [0, 0]], 2, ValueError, r"neighbors must lie in \[0, 2\), got 5"),
        ([[1, -1], [0, 0]], 2, ValueError, r"neighbors must lie in \[0, 2\), got -1"),
        ([[1.0], [0.5]], 1, TypeError, "neighbors must hold integers, got dtype float64"),
        ([[1], [0, 1]], 1, TypeError, "neighbors must be an array of integers, or be convertible to one: .*inhomog"),
        ([[1], [0]], True, TypeError, "n_nearest must be an integer, got True"),
    ],
)
def test_mutual_nearest_refuses(neighbors, n_nearest, error, words):
    with pytest.raises(error, match=words):
        mutual_nearest(neighbors, n_nearest)


@pytest.mark.parametrize(
    ("pairs", "batch", "error", "words"),
    [
        ([1, 2], [1, 2], ValueError, r"pairs must have shape \[m, 2\], got shape \[2\]"),
        ([[1, 2, 3]], [1, 2], ValueError, r"pairs must have shape \[m, 2\], got shape \[1, 3\]"),
        ([[1, 2]], [[1, 2]], ValueError, r"batch must have shape \[B\], got shape \[1, 2\]"),
        ([[1, 2]], [1, 2, 2], ValueError, r"batch must hold distinct integers, got \[1 2 2\]"),
        ([[1, 2]], [1.0, 2.5], TypeError, "batch must hold integers, got dtype float64"),
        ([[True, False]], [0, 1], TypeError, "pairs must hold integers, got dtype bool"),
        ([[1, 2], [3]], [1, 2], TypeError, "pairs must be an array of integers, or be convertible to one: .*inhomog"),
        (None, [1, 2], TypeError, "pairs must hold integers, got dtype object"),
        ([], [1, 2], ValueError, r"pairs must have shape \[m, 2\], got shape \[0\]"),
    ],
)
def test_pair_mask_refuses(pairs, batch, error, words):
    with pytest.raises(error, match=words):
        pair_mask(pairs, batch)


class Asks(Model):
    """Records each step's mask. It trains without randomness of its own."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
        self.masks.append(self.trainer.datamodule.likely_false_negatives())
        z = torch.nn.functional.normalize(self.encoder(batch[1]), dim=1)
        logits = (z @ z.T / 0.5).masked_fill(self.masks[-1], -torch.inf)
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)))


@pytest.mark.parametrize("kind", [{}, {"pool_size": None, "refresh_every": 5}], ids=str)
def test_masks_the_mutual_nearest_of_the_pool_being_trained(kind):
    pools = []

    class Notes(RWRComposer):
        def __call__(self, embeddings, *args, **kwargs):
            batches = super().__call__(embeddings, *args, **kwargs)
            pools.append((literal_mutual(self.neighbors.tolist(), 2), batches))
            return batches

    composer = Notes(ExactGraph(5), replacement="refresh_every" in kind)
    model = Asks()
    fit(model, Data(), walker(composer=composer, warmup_epochs=1, mask_nearest=2, **kind))
    assert not torch.stack(model.masks[:12]).any()
    masks = iter(model.masks[12:])
    for pairs, batches in pools[1:]:  # the first pool is of the rehearsal before the warm-up
        for batch in batches[: kind.get("refresh_every")]:
            mask = next(masks, None)
            if mask is not None:
                assert mask.tolist() == [[[min(a, b), max(a, b)] in pairs for b in batch] for a in batch]
    assert next(masks, None) is None
    assert torch.stack(model.masks[12:]).any(dim=(1, 2)).float().mean() > 0.5


@pytest.mark.parametrize(
    ("model", "data", "rule", "warns"),
    [
        (Model, {}, {"mask_nearest": 2}, True),
        (Model, {"groups": True}, {}, True),
        (Model, {"groups": True, "separate_groups": True}, {}, False),  # no batch holds a pair of a group
        (Model, {}, {}, False),
        (Asks, {}, {"mask_nearest": 2}, False),
        (Asks, {"groups": True}, {}, False),
    ],
)
def test_a_mask_that_nobody_asks_for_warns_once(model, data, rule, warns, recwarn):
    class Grouped(Data):
        def __init__(self, groups=False, **kwargs):
            super().__init__(**kwargs)
            self.groups = np.arange(100) // 2 if groups else None

        def train_groups(self):
            return self.groups

    fit(model(), Grouped(**data), walker(warmup_epochs=1, **rule), max_epochs=3)
    assert sum("training_step has not asked for them" in str(each.message) for each in recwarn) == warns


def test_a_fit_that_asks_does_not_keep_the_next_from_warning(recwarn):
    data = Data()
    for model in (Asks(), Model()):
        fit(model, data, walker(mask_nearest=2))
    assert sum("training_step has not asked for them" in str(each.message) for each in recwarn) == 1


def test_a_resumed_run_masks_the_same(tmp_path):
    def run(*callbacks, **kwargs):
        model = Asks()
        fit(model, Data(seed=1), walker(mask_nearest=3), *callbacks, enable_checkpointing=True, **kwargs)
        return model.masks

    torch.manual_seed(0)
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(saves, default_root_dir=tmp_path)
    for step in (2, 4, 11, 14):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt", default_root_dir=tmp_path)
        assert torch.equal(torch.stack(resumed), torch.stack(whole[step:]))


def test_masks_are_the_same_where_pools_are_planned_ahead():
    class Returns(Asks):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "embeddings": self(batch).detach()}

    def masks(**loader):
        torch.manual_seed(0)
        model = Returns()
        fit(model, Data(seed=1, **loader), walker(mask_nearest=3, recycle=True))
        return torch.stack(model.masks)

    assert masks().any()
    assert torch.equal(masks(), masks(num_workers=2, prefetch_factor=3))


def test_asked_for_in_vain():
    failed = Data()
    with pytest.raises(
        RuntimeError, match=r"needs a rule: override train_groups\(\).*BatchSamplerCallback\(mask_nearest=...\)"
    ):
        fit(Asks(), failed, walker())
    for data in (failed, Data()):
        with pytest.raises(RuntimeError, match=r"likely_false_negatives\(\) was called while no batch .*stage is None"):
            data.likely_false_negatives()


class Everything(Data):
    def others(self):
        return torch.utils.data.DataLoader(Points(24), batch_size=12)

    val_dataloader = test_dataloader = predict_dataloader = others


class Evaluates(Model):
    def validation_step(self, batch, batch_idx):
        pass

    test_step = predict_step = validation_step

    def on_after_batch_transfer(self, batch, dataloader_idx):
        with pytest.raises(RuntimeError, match="while no batch is being trained"):
            self.trainer.datamodule.trained_batch()  # must not return the previous batch
        return batch

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if getattr(self, "ends_early", False) and batch_idx == 4 else None


class ByHand(Evaluates):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
        self.optimizers().zero_grad()


class EndsEarly(Evaluates):
    ends_early = True


IN_TURN = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
OUT_OF_TURN = {
    "train": ("on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_end"),
    "sanity_check": ("on_sanity_check_start", "on_validation_batch_start"),
    "validate": ("on_validation_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_end"),
    "test": ("on_test_start", "on_test_batch_start", "on_test_epoch_end"),
    "predict": ("on_predict_start", "on_predict_batch_start", "on_predict_epoch_end"),
}


class AsksEverywhere(Callback):
    """Asks for the batch and its mask in every hook. Only hooks within a training step get an answer."""

    def __init__(self):
        self.refused, self.answered = set(), set()


def asks(hook):
    def ask(self, trainer, module, *args):
        data, stage = trainer.datamodule, trainer.state.stage.value
        if hook in IN_TURN:
            served = args[-2][0].tolist() if hook.startswith("on_train_batch") else module.batches[-1]
            for _ in range(2):
                assert data.trained_batch().tolist() == served
                assert data.likely_false_negatives().shape == (8, 8)
            self.answered.add(hook)
        else:
            for name in ("trained_batch", "likely_false_negatives"):
                words = rf"^{name}\(\) was called while no batch .*stage is '{stage}'\)\. Call it in training_step"
                with pytest.raises(RuntimeError, match=words):
                    getattr(data, name)()
            self.refused.add((stage, hook))

    return ask


for hook in {*IN_TURN, *sum(OUT_OF_TURN.values(), ())}:
    setattr(AsksEverywhere, hook, asks(hook))


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (Evaluates, {"val_check_interval": 5, "accumulate_grad_batches": 2}),
        (Evaluates, {"reload_dataloaders_every_n_epochs": 1}),
        (ByHand, {"val_check_interval": 5}),
        (EndsEarly, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_asked_for_out_of_turn(make, flags):
    everywhere = AsksEverywhere()
    made = fit(make(), Everything(), walker(mask_nearest=3), everywhere, **flags)
    for run in (made.validate, made.test, made.predict):
        run(made.lightning_module, datamodule=made.datamodule)
    assert everywhere.answered == set(IN_TURN)
    expected = {(stage, hook) for stage, hooks in OUT_OF_TURN.items() for hook in hooks}
    assert expected <= everywhere.refused
    with pytest.raises(RuntimeError, match=r"trained_batch\(\) was called while no batch .*stage is None"):
        made.datamodule.trained_batch()


def test_asked_for_before_a_resumed_run_trains(tmp_path):
    """Lightning has then restored the counters of a batch that was incomplete when the checkpoint was written."""
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Evaluates(), Everything(), walker(mask_nearest=3), saves, enable_checkpointing=True)
    everywhere = AsksEverywhere()
    fit(Evaluates(), Everything(), walker(mask_nearest=3), everywhere, ckpt_path=tmp_path / "step=5.ckpt")
    assert ("train", "on_train_start") in everywhere.refused
    assert everywhere.answered == set(IN_TURN)


class Recycles(Asks):
    """Records which instances of each step had an embedding before their pool was composed."""

    def __init__(self):
        super().__init__()
        self.known = []

    def training_step(self, batch, batch_idx):
        composed = 12 * self.current_epoch + self.trainer.datamodule.state_dict()["pool"]["start"]
        seen = set(sum(self.batches[:composed], []))
        self.known.append(torch.tensor([int(index) in seen for index in batch[0]]))
        return {"loss": super().training_step(batch, batch_idx), "embeddings": self.encoder(batch[1])}


@pytest.mark.parametrize("kind", [{}, {"pool_size": None, "refresh_every": 5}], ids=str)
def test_what_has_no_embedding_yet_has_no_pair(kind):
    model = Recycles()
    composer = RWRComposer(ExactGraph(15), replacement="refresh_every" in kind)
    fit(model, Data(), walker(composer=composer, mask_nearest=15, recycle=True, **kind))
    for mask, known in zip(model.masks, model.known, strict=True):
        assert not mask[~known].any()
    assert torch.stack(model.masks).any()
    assert not torch.cat(model.known).all()


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"mask_nearest": 0}, ValueError, "mask_nearest must be at least 1, got 0"),
        ({"mask_nearest": 2.5}, TypeError, "mask_nearest must be an integer, got 2.5"),
        (
            {"mask_nearest": 5, "composer": pool_order},
            TypeError,
            "mask_nearest=5 needs a composer that finds each instance's nearest neighbours in the whole pool",
        ),
        (
            {"mask_nearest": 5, "composer": RWRComposer(RandomCandidateGraph(100, 15))},
            TypeError,
            r"NNDescentGraph\(\) or ExactGraph\(\), got RWRComposer\(RandomCandidateGraph\(n_candidates=100",
        ),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        BatchSamplerCallback(**kwargs)


def test_uniform_batches_may_have_the_masks_of_composed_ones():
    class Masked(Model):
        def training_step(self, batch, batch_idx):
            marked.append(int(self.trainer.datamodule.likely_false_negatives().sum()))
            return super().training_step(batch, batch_idx)

    marked = []
    model = Masked()
    fit(model, Data(16, 320), walker(160, composer=UniformComposer(ExactGraph(9)), mask_nearest=9), max_epochs=1)
    assert sum(marked) > 20
    assert same_cluster_share(model.batches) == pytest.approx(0.1, abs=0.03)


def test_uniform_batches_need_a_graph_of_nearest_neighbours_for_a_mask():
    with pytest.raises(TypeError, match="mask_nearest=5 needs a composer that finds each instance's nearest"):
        BatchSamplerCallback(composer=UniformComposer(RandomCandidateGraph()), mask_nearest=5)
