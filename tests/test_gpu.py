"""What a GPU adds: encoding never waits for it, and it gives the graphs, losses and batches that a CPU gives."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, Returns, fit, walker
from torch import nn

from bs_lightning import (
    BatchFetcher,
    BatchSamplerCallback,
    ExactGraph,
    NNDescentGraph,
    RandomCandidateGraph,
    RWRComposer,
    encode,
    losses,
    metrics,
)
from bs_lightning.bank import EmbeddingBank
from bs_lightning.isolation import no_trace
from bs_lightning.plugin import encoder
from bs_lightning.presets import public_code
from bs_lightning.recipes.images import ImageData
from bs_lightning.recipes.simclr import SimCLR
from bs_lightning.rules import AbovePositive, MoreSimilar

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
CALLBACKS = {
    "fresh": lambda: walker(),
    "kept": lambda: walker("all", encode_every=2),
    "recycled": lambda: walker(recycle=True),
    "masked": lambda: walker(mask_nearest=2),
    "own rule": lambda: walker(own_rule=AbovePositive(), embed=two_sides),
    "the public code's": lambda: public_code(),
}


def two_sides(module, batch):
    return module(batch), module((None, batch[1] + 0.1))


class Still(Returns):
    """Trains without randomness of its own, which no checkpoint would hold."""

    def training_step(self, batch, batch_idx):
        torch.manual_seed(batch_idx)
        return super().training_step(batch, batch_idx)


def close(on_gpu, on_cpu, atol=1e-5):
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=atol, rtol=0)


# Encoding


def test_the_loop_never_waits_for_the_gpu():
    images = torch.randn(64, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16)).cuda()
    network.eval()(images[:8].cuda())  # libraries start

    def load(chunks):
        torch.cuda.set_sync_debug_mode("error")
        yield from (images[chunk].pin_memory() for chunk in chunks)
        torch.cuda.set_sync_debug_mode("default")

    try:
        z = encode(range(64), load, lambda batch: network(batch.to("cuda", non_blocking=True)), batch_size=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert z.is_cuda
    with torch.no_grad():
        close(z, nn.functional.normalize(network(images.cuda()), dim=1).cpu(), atol=1e-3)  # TF32


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_callback_never_waits_while_it_encodes(monkeypatch, precision, num_workers):
    checked = encoder.checked_unit_rows_
    seen = []

    class Watched(Model):
        def embed(self, batch):
            torch.cuda.set_sync_debug_mode("error")
            assert batch[1].is_cuda
            z = self(batch)
            seen.append(z.dtype)
            return z

    def after_the_loop(*args):
        torch.cuda.set_sync_debug_mode("default")
        return checked(*args)

    monkeypatch.setattr(encoder, "checked_unit_rows_", after_the_loop)
    try:
        data = Data(n=128, num_workers=num_workers)
        fit(Watched(), data, walker(64, encode_batch_size=8), precision=precision, **GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) >= 2 * 16
    assert set(seen) == {torch.float32 if precision == "32-true" else torch.bfloat16}


def test_the_bank_and_masks_do_not_wait_for_the_gpu():
    bank, rows = EmbeddingBank(4096), torch.randn(256, 512, device="cuda")
    rule, batch = MoreSimilar(torch.randn(64, 2, 16), AbovePositive()), np.arange(64)
    try:
        for _ in range(2):  # libraries start in the first round
            for start in range(0, 4096, 256):
                bank.write(torch.arange(start, start + 256), rows)
            rule.in_batch(batch, rows.device)
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_channels_last_is_kept():
    network = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda().to(memory_format=torch.channels_last)
    )
    seen = []

    def embed(batch):
        features = network(batch.cuda())
        seen.append(features.is_contiguous(memory_format=torch.channels_last))
        return features.flatten(1)

    with no_trace(network):
        encode(range(8), BatchFetcher(torch.randn(8, 3, 8, 8)), embed, batch_size=4)
    assert seen == [True, True]
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_no_trace_is_left_on_the_gpu():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).cuda()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.cuda.get_rng_state()
    with no_trace(network):
        network.train()(torch.randn(8, 4, device="cuda"))
        torch.randn(3, device="cuda")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state(), state)


# Graphs, losses, metrics and the bank


@pytest.mark.parametrize("graph", [ExactGraph(15), NNDescentGraph(15), RandomCandidateGraph(200, 15)])
@pytest.mark.parametrize("shape", [(3000, 16), (3000, 2, 16), (20, 16), (9000, 16)])
def test_graphs_are_those_of_a_cpu(graph, shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z[7] = 0
    on_cpu = (ExactGraph(15) if isinstance(graph, NNDescentGraph) else graph)(z)  # a pool of 9,000 is small on a GPU
    on_gpu = graph(z.cuda())
    assert on_gpu.dtype == np.int32
    same = [len(set(a) & set(b)) / len(set(a)) for a, b in zip(on_cpu, on_gpu, strict=True)]
    assert np.mean(same) > 0.999  # the last of 15 may be a tie


@pytest.mark.parametrize("name", losses.__all__[-6:])
def test_losses_are_those_of_a_cpu(name):
    first, second = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    masked = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) > 0.8
    options = {"class_prior": 0.1} if name in ("debiased", "hard") else {}
    loss = partial(getattr(losses, name), temperature=0.5, **options)
    on_cpu = loss(first, second, masked=masked)
    close(loss(first.cuda(), second.cuda(), masked=masked.cuda()), on_cpu, atol=1e-4)


def test_metrics_are_those_of_a_cpu():
    z = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(128).reshape(4, 32) % 5
    close(metrics.in_batch_hardness(z.cuda(), labels.cuda()), metrics.in_batch_hardness(z, labels))
    sides = z.unflatten(1, (16, 2))
    for metric in (metrics.in_batch_accuracy, metrics.negatives_above_positive):
        close(metric(sides.cuda()), metric(sides))


def test_the_bank_keeps_embeddings_on_the_gpu():
    bank, expected = EmbeddingBank(30), torch.zeros(30, 8)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        indices, rows = torch.randperm(30, generator=generator)[:8], torch.randn(8, 8, generator=generator)
        bank.write(indices, rows.cuda())
        expected[indices] = nn.functional.normalize(rows, dim=1)
    assert bank.read(torch.arange(30)).is_cuda
    close(bank.read(torch.arange(30)), expected, atol=1e-3)


# Training


@pytest.mark.parametrize("kind", CALLBACKS)
def test_serves_each_instance_once_and_the_same_twice(kind):
    runs = []
    for _ in range(2):
        seed_everything(0, verbose=False)
        model = Returns()
        fit(model, Data(n=96), CALLBACKS[kind](), max_epochs=3, **GPU)
        runs.append(model.epochs)
    assert runs[0] == runs[1]
    assert len(runs[0]) == 3
    if kind != "the public code's":  # it draws with replacement
        assert all(sorted(sum(batches, [])) == list(range(96)) for batches in runs[0].values())


@pytest.mark.parametrize("kind", ["fresh", "kept", "recycled"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_exactly(kind, num_workers, tmp_path):
    def train(*callbacks, **kwargs):
        seed_everything(0, verbose=False)
        model = Still()
        data = Data(n=96, num_workers=num_workers)
        fit(model, data, CALLBACKS[kind](), *callbacks, max_epochs=3, **kwargs, **GPU)
        return model.batches

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=17, save_top_k=-1)
    whole = train(saves, enable_checkpointing=True)
    assert train(ckpt_path=tmp_path / "step=17.ckpt") == whole[17:]


def test_the_recipe_trains_with_a_mask_and_workers():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageData(images, batch_size=32, num_workers=2, persistent_workers=True)
    callback = BatchSamplerCallback(composer=RWRComposer(), mask_nearest=2)
    trainer = fit(SimCLR(masked=True), data, callback, max_epochs=3, precision="bf16-mixed", **GPU)
    assert np.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert float(trainer.callback_metrics["batch_sampler/pool_size"]) == 256
