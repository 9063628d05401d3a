"""Masks of likely false negatives: the functions against literal ones, and in training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, fit, pool_order, walker

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer
from bs_lightning.mask import mutual_nearest, pair_mask


def literal_mutual(neighbors, k):
    rows = [list(row[:k]) for row in neighbors]
    return [[i, j] for i in range(len(rows)) for j in range(i + 1, len(rows)) if j in rows[i] and i in rows[j]]


@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_mutual_nearest(size, n_neighbors, n_nearest, seed):
    neighbors = ExactGraph(n_neighbors)(torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)))
    pairs = mutual_nearest(neighbors, n_nearest)
    assert sorted(pairs.tolist()) == literal_mutual(neighbors, n_nearest)


@given(st.data())
def test_pair_mask(data):
    batch = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
    pair = st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda pair: pair[0] < pair[1])
    pairs = data.draw(st.lists(pair, max_size=30, unique=True))
    mask = pair_mask(np.array(pairs, dtype=np.int64).reshape(-1, 2), batch)
    expected = [[(min(a, b), max(a, b)) in pairs for b in batch] for a in batch]
    assert mask.tolist() == expected


def test_refuses():
    with pytest.raises(ValueError, match="n_nearest must be at least 1, got 0"):
        mutual_nearest([[1], [0]], 0)
    with pytest.raises(ValueError, match=r"neighbors must have shape \[P, K\], got shape \[2\]"):
        mutual_nearest([1, 0], 1)


class Asks(Model):
    """Notes each step's mask; trains without randomness of its own."""

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
    for pairs, batches in pools:
        for batch in batches[: kind.get("refresh_every")]:
            mask = next(masks, None)
            if mask is not None:
                assert mask.tolist() == [[[min(a, b), max(a, b)] in pairs for b in batch] for a in batch]
    assert next(masks, None) is None
    assert torch.stack(model.masks[12:]).any(dim=(1, 2)).float().mean() > 0.5


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


def test_asked_for_in_vain():
    with pytest.raises(RuntimeError, match=r"needs BatchSamplerCallback\(mask_nearest=...\)"):
        fit(Asks(), Data(), walker())
    with pytest.raises(RuntimeError, match="can be asked during training only"):
        Data().likely_false_negatives()


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"mask_nearest": 0}, ValueError, "mask_nearest must be at least 1, got 0"),
        ({"mask_nearest": 2.5}, TypeError, "mask_nearest must be an integer, got 2.5"),
        ({"mask_nearest": 5, "per_rank": True}, ValueError, "mask_nearest needs per_rank=False"),
        (
            {"mask_nearest": 5, "composer": pool_order},
            TypeError,
            "needs a composer that keeps its graph as `neighbors`",
        ),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        BatchSamplerCallback(**kwargs)
