"""The callback and the DataModule in real training, in one process."""

import copy
import random
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from parts import Data, Model, Points, assert_equal, fit, pool_order, rng_states, same_cluster_share, trainer, walker
from stream_parts import StreamData

from bs_lightning import BatchSamplerCallback, ExactGraph, Pools, RWRComposer
from bs_lightning.baselines import uniform_batches
from bs_lightning.layout import BatchLayout
from bs_lightning.plugin import planner

# Batches


@pytest.mark.parametrize("n", [96, 100, 103])
@pytest.mark.parametrize("pool_size", [8, 20, 32, 33, 1000])
def test_each_epoch_serves_each_instance_once(n, pool_size):
    model = Model()
    fit(model, Data(8, n), walker(pool_size), max_epochs=2)
    assert set(model.epochs) == {0, 1}
    for batches in model.epochs.values():
        indices = sum(batches, [])
        assert len(batches) == n // 8
        assert len(set(indices)) == len(indices) == n // 8 * 8
        assert all(0 <= index < n for index in indices)
    assert model.epochs[0] != model.epochs[1]


def test_keeps_the_last_batch_if_asked():
    model = Model()
    fit(model, Data(8, 103, drop_last=False), walker())
    for batches in model.epochs.values():
        assert [len(batch) for batch in batches] == [8] * 12 + [7]
        assert sorted(sum(batches, [])) == list(range(103))


def test_walked_batches_are_hard_and_warmup_is_uniform():
    model = Model()
    made = fit(model, Data(8, 1000), walker(200, warmup_epochs=1), max_epochs=3)
    shares = {epoch: same_cluster_share(batches) for epoch, batches in model.epochs.items()}
    assert shares[0] < 0.12
    assert shares[1] > 0.3
    assert shares[2] > 0.3
    logged = made.callback_metrics
    assert logged["batch_sampler/false_negative_rate"] == pytest.approx(shares[2], abs=1e-4)
    assert {"encode", "graph", "walk"} == {k.split("/")[1][:-8] for k in logged if k.endswith("_seconds")}
    assert 0 < logged["batch_sampler/time_share"] < 1


def test_uniform_batches_are_the_same_with_and_without_the_callback():
    plain, warm = Model(), Model()
    fit(plain, Data(seed=3))
    fit(warm, Data(seed=3), walker(warmup_epochs=1), max_epochs=2)
    assert plain.epochs[0] == warm.epochs[0]
    assert plain.epochs[1] != warm.epochs[1]
    assert sorted(sum(plain.epochs[1], [])) == sorted(sum(warm.epochs[1], []))


def noting(seen):
    """Return a composer that records each pool's embeddings and keeps the pool's order."""

    def composer(embeddings, batch_size, *, seed, epoch):
        seen.append(embeddings)
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    return composer


def test_hardness_is_that_of_the_embeddings_the_batches_were_made_from():
    seen = []

    class NoLabels(Data):
        def train_labels(self):
            return None

    made = fit(Model(), NoLabels(8, 64), walker(64, composer=noting(seen)), max_epochs=1)
    batches = seen[0].reshape(8, 8, -1)
    pairs = (batches @ batches.transpose(1, 2))[:, ~torch.eye(8, dtype=torch.bool)]
    assert made.callback_metrics["batch_sampler/hardness"] == pytest.approx(pairs.mean().item(), abs=1e-5)
    assert "batch_sampler/false_negative_rate" not in made.callback_metrics


def test_hardness_is_that_of_true_negatives_where_labels_are_known():
    """Pools of one and of three batches: every batch has the same weight."""
    seen = []

    class Unequal(Model):
        def on_train_batch_start(self, batch, batch_idx):
            plan = self.trainer.train_dataloader.batch_sampler._plan  # the first pool has one batch
            plan.planning = replace(plan.planning, cut=Pools(24))

    model = Unequal()
    made = fit(model, Data(8, 32), walker(8, composer=noting(seen)), max_epochs=1)
    assert [len(z) for z in seen] == [8, 24]
    similarities = []
    for batch, z in zip(model.batches, torch.cat(seen).reshape(4, 8, -1), strict=True):
        labels = torch.tensor(batch) % 10
        similarities.append((z @ z.T)[labels[:, None] != labels].mean())
    # The first pool has a weight of a quarter. Within the second pool, all pairs have the same weight.
    counts = [int(sum(a % 10 != b % 10 for a in batch for b in batch)) for batch in model.batches]
    second = np.average([s.item() for s in similarities[1:]], weights=counts[1:])
    expected = (similarities[0].item() + 3 * second) / 4
    assert made.callback_metrics["batch_sampler/hardness"] == pytest.approx(expected, abs=1e-5)


def test_logs_the_seconds_that_each_step_took():
    class Slow(RWRComposer):
        def __call__(self, *args, **kwargs):
            batches = super().__call__(*args, **kwargs)
            self.seconds = {"graph": 100.0, "walk": 10.0}
            return batches

    def embed(module, batch):
        time.sleep(0.05)
        return module(batch)

    start = time.perf_counter()
    made = fit(Model(), Data(8, 96), walker(32, composer=Slow(ExactGraph(5)), embed=embed), max_epochs=1)
    logged = made.callback_metrics
    assert logged["batch_sampler/graph_seconds"] == 300
    assert logged["batch_sampler/walk_seconds"] == 30
    assert 0.15 <= logged["batch_sampler/encode_seconds"] < time.perf_counter() - start


@pytest.mark.parametrize(("pool_size", "instances"), [(None, 190), ("all", 100), (0.57, 57), (0.01, 19), (40, 40)])
def test_pool_sizes_in_instances(pool_size, instances):
    assert BatchSamplerCallback(pool_size).resolve_pool_size(None, BatchLayout(100, 19)) == instances


def test_by_default_a_pool_is_ten_global_batches_and_the_first_epoch_is_uniform():
    model, sizes = Model(), []

    def composer(embeddings, batch_size, *, seed, epoch):
        sizes.append((epoch, len(embeddings)))
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(model, Data(8, 320), BatchSamplerCallback(composer=composer), max_epochs=2)
    tried, *planned = sizes
    assert tried == (1, 80)  # the rehearsal before the warm-up, as in the first composed epoch
    assert planned == [(1, 80)] * 4


def test_a_model_that_logs_and_counts_in_forward():
    """Encoding calls the same `forward`, but the model must not count these calls."""

    class Logs(Model):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.lengths = torchmetrics.CatMetric()
            self.cache = None

        def forward(self, batch):
            self.cache = batch[0]
            self.mean.update(batch[1])
            self.lengths.update(batch[1].norm(dim=1))
            self.log("forward/rows", float(len(batch[0])))
            self.log_dict({"forward/first": float(batch[0][0])})
            return super().forward(batch)

        def training_step(self, batch, batch_idx):
            assert self.cache is None or len(self.cache) == 8
            self(batch)
            return super().training_step(batch, batch_idx)

    logged, states = [], []
    for callbacks in ([], [walker(composer=pool_order)]):
        torch.manual_seed(0)
        model = Logs()
        made = fit(model, Data(seed=1), *callbacks, max_epochs=1)
        logged.append({name: value for name, value in made.callback_metrics.items() if name.startswith("forward")})
        states.append([float(model.mean.compute()), len(model.lengths.compute()), model.mean._update_count])
    assert logged[0] == logged[1]
    assert states[0] == states[1]


def test_a_lazy_module_becomes_a_real_one_while_encoding():
    class Lazy(Model):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.LazyBatchNorm1d())

    model = Lazy()
    fit(model, Data(), walker(warmup_epochs=1))
    assert [type(part).__name__ for part in model.encoder] == ["Linear", "BatchNorm1d"]


def test_pools_smaller_than_the_graphs_neighbors():
    model = Model()
    fit(model, Data(4, 50), walker(4, composer=RWRComposer(ExactGraph(15))), max_epochs=1)
    assert len(set(sum(model.batches, []))) == 48


def test_the_batch_size_is_that_of_the_loader_being_served():
    """A change during a fit takes effect when the next loader is made, as in Lightning."""

    class Grows(Callback):
        def on_train_epoch_start(self, trainer, module):
            trainer.datamodule.batch_size = 16

    model = Model()
    fit(model, Data(8, 96), walker(32), Grows(), max_epochs=2)
    assert [len(batch) for batch in model.batches] == [8] * 24


def test_warns_where_no_batch_would_be_composed():
    with pytest.warns(UserWarning, match="composes no batch: all of max_epochs=1 are within warmup_epochs=1"):
        fit(Model(), Data(), walker(warmup_epochs=1), max_epochs=1)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"warmup_epochs": 1}, True),
        ({"warmup_epochs": 0}, False),
        ({"warmup_epochs": 1, "limit_train_batches": 3}, False),
    ],
)
def test_warns_where_a_stream_may_not_end_before_training(settings, warns, recwarn):
    fit(
        Model(),
        StreamData(8, 200, "Stream"),
        walker(warmup_epochs=settings.pop("warmup_epochs")),
        max_epochs=-1,
        max_steps=6,
        **settings,
    )
    found = [
        str(each.message) for each in recwarn if "composes no batch in the first warmup_epochs=1" in str(each.message)
    ]
    assert len(found) == warns


@pytest.mark.parametrize("settings", [{"max_steps": 12}, {"max_steps": 6, "accumulate_grad_batches": 2}], ids=str)
def test_warns_where_steps_end_within_the_warm_up(settings):
    with pytest.warns(UserWarning, match=r"composes no batch: all of max_steps=\d+, with \d+ an epoch, are within"):
        fit(Model(), Data(), walker(warmup_epochs=1), max_epochs=-1, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BatchSamplerCallback composes no batch")
        fit(Model(), Data(), walker(warmup_epochs=1), max_epochs=-1, **settings | {"max_steps": 13})


@pytest.mark.parametrize(
    ("pool_size", "n"), [(8, 100), (0.05, 100), ("all", 15)], ids=["instances", "share", "small dataset"]
)
def test_warns_where_a_pool_holds_one_batch(pool_size, n):
    with pytest.warns(UserWarning, match=rf"one batch of 8 of the dataset's {n} instances, so composing changes noth"):
        fit(Model(), Data(8, n), walker(pool_size), max_epochs=1)


def test_uniform_batches_of_the_same_model_are_described_beside_composed_ones():
    logged = fit(Model(), Data(8, 400), walker(160), max_epochs=2).callback_metrics
    assert logged["batch_sampler/hardness"] > logged["batch_sampler/uniform_hardness"] + 0.1
    logged = fit(Model(), Data(8, 400), walker(160, composer=uniform_batches), max_epochs=2).callback_metrics
    assert logged["batch_sampler/hardness"] == pytest.approx(float(logged["batch_sampler/uniform_hardness"]), abs=0.05)


def test_values_are_logged_where_lightning_cannot_tell_the_size_of_a_batch():
    class Batch:
        def __init__(self, points):
            self.points = points

        def to(self, *args, **kwargs):
            return self

    class Ends(Model):
        """Ends each epoch early. Lightning then never counts the instances of its last batch."""

        def forward(self, batch):
            return self.encoder(batch.points)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 5 else None

    data = Data(collate_fn=lambda items: Batch(torch.stack([point for _, point in items])))
    assert "batch_sampler/hardness" in fit(Ends(), data, walker()).callback_metrics


def test_seed_none_takes_the_global_seed():
    def run(global_seed, **kwargs):
        seed_everything(global_seed, verbose=False)
        model = Model()
        fit(model, Data(**kwargs), walker(), max_epochs=1)
        return model.batches

    assert run(1) == run(1)
    assert run(1) != run(2)
    seed_everything(1, verbose=False)
    data = Data()
    orders = []
    for global_seed in (1, 2):  # a second fit of the same DataModule reads the global seed again
        seed_everything(global_seed, verbose=False)
        model = Model()
        fit(model, data, max_epochs=1)
        orders.append(model.batches)
    assert orders[0] != orders[1]


def test_all_processes_take_the_global_seed_of_rank_0(monkeypatch):
    seed_everything(123, verbose=False)
    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", lambda self, value, src=0: 1 if value == 123 else value)
    with_seed, without = Model(), Model()
    fit(with_seed, Data(seed=1), max_epochs=1)
    fit(without, Data(), max_epochs=1)
    assert without.batches == with_seed.batches


def test_a_loader_without_a_trainer_serves_the_epoch_that_is_set():
    loader = Data(8, 96, seed=1).train_dataloader()
    epochs = []
    for epoch in (0, 1, 1):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append(list(loader.batch_sampler))
    assert epochs[0] != epochs[1] == epochs[2]


def test_labels_come_from_targets_or_the_hook():
    class Labelled(Data):
        def train_labels(self):
            return [0] * self.n

    made = fit(Model(), Labelled(), walker(), max_epochs=1)
    assert made.callback_metrics["batch_sampler/false_negative_rate"] == 1


@pytest.mark.parametrize(
    "targets",
    [[0.5] * 96, torch.ones(96, dtype=torch.bfloat16), [{"boxes": []}] * 96, ["cat"] * 96, [[1], [1, 2]] * 48],
    ids=str,
)
def test_targets_that_are_no_classes_are_no_labels(targets):
    class Detection(Data):
        def train_dataset(self):
            dataset = super().train_dataset()
            dataset.targets = targets
            return dataset

    made = fit(Model(), Detection(8, 96), walker(), max_epochs=1)
    assert "batch_sampler/false_negative_rate" not in made.callback_metrics
    assert "batch_sampler/hardness" in made.callback_metrics


# Freshness


class Notes(Callback):
    """Records the number of trained steps, and the weights, at each call of a composer."""

    def __init__(self):
        self.trained = 0
        self.plans = []

    def on_train_batch_end(self, *_):
        self.trained += 1

    def watch(self, module, encoded):
        self.plans.append((self.trained, module.encoder[0].weight.detach().clone(), encoded))


LOADERS = [
    {"num_workers": 0},
    {"num_workers": 2, "prefetch_factor": 8},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True},
]


@pytest.mark.parametrize("loader", LOADERS, ids=str)
def test_each_pool_is_encoded_once_with_the_weights_of_its_first_step(loader):
    notes = Notes()
    weights = {}

    class Watched(Model):
        def training_step(self, batch, batch_idx):
            weights[notes.trained] = self.encoder[0].weight.detach().clone()
            return super().training_step(batch, batch_idx)

    model = Watched()
    rows = []

    def embed(module, batch):
        if notes.trained:  # the rehearsal before training does not count
            rows.extend(batch[0].tolist())
        return module(batch)

    def composer(embeddings, batch_size, *, seed, epoch):
        notes.watch(model, list(rows))
        rows.clear()
        return RWRComposer(ExactGraph(5))(embeddings, batch_size, seed=seed, epoch=epoch)

    data = Data(8, 100, **loader)
    fit(model, data, notes, walker(32, composer=composer, embed=embed, warmup_epochs=1), max_epochs=3)

    (tried, _, _), *plans = notes.plans
    assert tried == 0  # the rehearsal before the warm-up
    assert [trained for trained, _, _ in plans] == [12, 16, 20, 24, 28, 32]  # an epoch has 12 batches, a pool 4
    for trained, weight, encoded in plans:
        assert torch.equal(weight, weights[trained])
        pool = sum(model.batches[trained : trained + 4], [])
        assert sorted(encoded) == sorted(pool)


def test_the_same_seed_gives_the_same_batches_for_every_loader_setting():
    def run(**loader):
        seed_everything(0, verbose=False)
        model = Model()
        fit(model, Data(8, 100, seed=5, **loader), walker(warmup_epochs=1), max_epochs=3)
        return model.epochs

    first, *others = [run(**loader) for loader in LOADERS]
    for other in others:
        assert other == first


# No trace


class Recorder(Callback):
    """Records everything that encoding must not change, after every step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append(
            {
                "weights": copy.deepcopy(module.state_dict()),
                "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
                "modes": [part.training for part in module.modules()],
                "random": rng_states(),
                "grad": torch.is_grad_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
            }
        )


class Caching(Model):
    """Keeps tensors of its forward pass and a queue, as momentum encoders do, and has a frozen part."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.register_buffer("queue", torch.zeros(4, 4))
        self.frozen = torch.nn.BatchNorm1d(4).eval()

    def forward(self, batch):
        z = self.frozen(self.encoder(batch[1]))
        self.last = z
        self.queue.copy_(torch.cat([self.queue[1:], z[:1].detach()]))
        random.random(), np.random.rand(), torch.rand(1)
        return z

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.queue.sum() + self.frozen(self(batch)).pow(2).mean()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("make", [lambda: Model(dropout=0.3), Caching])
@pytest.mark.parametrize("loader", LOADERS[:2], ids=str)
def test_encoding_leaves_no_trace(make, loader, precision):
    def run(*callbacks):
        seed_everything(7, verbose=False)
        recorder = Recorder()
        fit(make(), Data(8, 100, **loader), recorder, *callbacks, max_epochs=2, precision=precision)
        return recorder.states

    encoded = []

    def composer(embeddings, batch_size, *, seed, epoch):
        encoded.append(len(embeddings))
        np.random.rand()
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    assert_equal(run(walker(32, composer=composer, warmup_epochs=1)), run())
    assert encoded == [32, 32, 32, 32]  # the first pool is of the rehearsal before the warm-up


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_encode_leaves_the_model_as_it_was_and_fits_again(error):
    model, data = Model(dropout=0.3), Data(8, 100, num_workers=2)
    model.encoder[3].eval()
    modes = [part.training for part in model.modules()]
    before = {}
    failing = True

    def embed(module, batch):
        if failing:
            before["states"] = rng_states()
            torch.rand(1), np.random.rand(), random.random()
            raise error("stop")
        return module(batch)

    callback = walker(embed=embed)
    made = trainer(callback)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        made.fit(model, datamodule=data)
    assert [part.training for part in model.modules()] == modes
    assert_equal(before["states"], rng_states())
    failing = False
    model.epochs.clear()
    fit(model, data, callback, max_epochs=1)
    assert len(model.batches) == 12


# How a batch reaches the model


def test_the_modules_embed_goes_before_forward_and_the_functions_before_both():
    called = []

    class Embeds(Model):
        def forward(self, batch):
            called.append("forward")
            return super().forward(batch)

        def embed(self, batch):
            called.append("embed")
            return super().forward(batch)

    def function(module, batch):
        called.append("function")
        return module.encoder(batch[1])

    class HasALayer(Model):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(8, 3)

        def forward(self, batch):
            called.append("forward")
            return super().forward(batch)

    fit(HasALayer(), Data(), walker(), max_epochs=1)
    assert set(called) == {"forward"}
    called.clear()
    fit(Embeds(), Data(), walker(), max_epochs=1)
    assert set(called) == {"embed"}
    called.clear()
    fit(Embeds(), Data(), walker(embed=function), max_epochs=1)
    assert set(called) == {"function"}


def test_the_pool_dataset_is_encoded_and_transfer_hooks_run_but_no_augmentation():
    called = []

    class Views(Data):
        def pool_dataset(self):
            clean = Points(self.n)
            clean.points = clean.points + 100
            return clean

        def on_after_batch_transfer(self, batch, dataloader_idx):
            called.append("after")
            return batch

    class Hooks(Model):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            called.append("before")
            return batch

    def embed(module, batch):
        assert called[-1] == "before"
        assert batch[1].mean() > 50
        return module.encoder(batch[1])

    fit(Hooks(), Views(), walker(embed=embed), max_epochs=1)
    assert called.count("before") == 12 + 3
    assert called.count("after") == 12


def test_the_hooks_of_the_datamodule_go_before_those_of_the_module():
    """Lightning chooses so in training, too."""

    def hook(self, batch, dataloader_idx):
        called.add(type(self).__bases__[0])
        return batch

    called = set()
    model, data = (type("Hooked", (kind,), {"on_before_batch_transfer": hook}) for kind in (Model, Data))
    fit(model(), data(), walker(), max_epochs=1)
    assert called == {Data}


@pytest.mark.parametrize(
    ("precision", "inside"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_encodes_in_the_trainers_precision(precision, inside):
    class Casts(Model):
        def training_step(self, batch, batch_idx):
            self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
            return self.encoder(batch[1]).float().pow(2).mean()

    got = []

    def embed(module, batch):
        z = module.encoder(batch[1])
        got.append((z.dtype, z.requires_grad, module.training))
        return z

    def composer(embeddings, batch_size, *, seed, epoch):
        assert embeddings.dtype == torch.float32
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-3)
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(Casts(), Data(), walker(embed=embed, composer=composer), max_epochs=1, precision=precision)
    assert set(got) == {(inside, False, False)}


def test_encodes_in_its_own_batch_size():
    sizes = []

    def embed(module, batch):
        sizes.append(len(batch[0]))
        return module(batch)

    fit(Model(), Data(8, 96), walker(48, embed=embed), max_epochs=1)
    assert sizes == [32, 16] * 2  # four times the training batch size
    sizes.clear()
    fit(Model(), Data(8, 96), walker(48, embed=embed, encode_batch_size=20), max_epochs=1)
    assert sizes == [20, 20, 8] * 2


@pytest.mark.parametrize("make_bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize(("quickly_composed", "bars"), [(48, ["Encoding"]), (47, ["Encoding", "Composing"])])
def test_planning_shows_in_the_progress_bar(make_bar, quickly_composed, bars, monkeypatch, capfd):
    monkeypatch.setattr(planner, "_QUICKLY_COMPOSED", quickly_composed)
    bar = make_bar()
    shown = []
    if isinstance(bar, TQDMProgressBar):
        made = bar.init_validation_tqdm

        def init():
            inner = made()
            describe = inner.set_description
            inner.set_description = lambda text: (shown.append(text), describe(text))
            return inner

        monkeypatch.setattr(bar, "init_validation_tqdm", init)
    else:
        from rich.progress import Progress

        reset = Progress.reset

        def note(self, task, **kwargs):
            shown.append(self._tasks[task].description)
            return reset(self, task, **kwargs)

        monkeypatch.setattr(Progress, "reset", note)
    fit(Model(), Data(n=96), walker(48), bar, max_epochs=1, enable_progress_bar=True)
    assert [text for text in shown if text in ("Encoding", "Composing")] == bars * 2
    if isinstance(bar, RichProgressBar):
        tasks = [task for task in bar.progress.tasks if task.description in bars]
        assert len(tasks) == len(bars)
        assert not any(task.visible for task in tasks)
        assert all(task.finished for task in tasks if task.description == "Encoding")


def test_what_rich_keeps_of_tasks_does_not_grow():
    sizes = []
    for n_epochs in (1, 4):
        bar = RichProgressBar()
        fit(Model(), Data(n=96), walker(48), bar, max_epochs=n_epochs, enable_progress_bar=True)
        sizes.append([len(column._renderable_cache) for column in bar.progress.columns])
    assert sizes[0] == sizes[1]
    assert max(sizes[0]) == 2  # the epoch's, and "Encoding"


# Warnings


class ForgetsWarnings:
    """Makes Python forget which warnings it has shown, as pynndescent's graph does."""

    def __call__(self, embeddings, *, seed=0):
        with warnings.catch_warnings():
            return ExactGraph(5)(embeddings)


def test_a_collapsed_model_is_served_and_warned_of_once():
    model = Model()

    def embed(module, batch):
        return torch.ones(len(batch[0]), 4)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(model, Data(), walker(composer=RWRComposer(ForgetsWarnings()), embed=embed), max_epochs=2)
    assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
    assert all(len(set(sum(batches, []))) == 96 for batches in model.epochs.values())


@pytest.mark.parametrize("option", ["recycle", "from_reference"])
def test_embeddings_that_are_all_equal_are_warned_of(option):
    class Constant(Model):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "embeddings": torch.ones(len(batch[0]), 4)}

    class ConstantData(Data):
        def reference_embeddings(self):
            return torch.ones(self.n, 4)

    with pytest.warns(UserWarning, match="All embeddings are equal: the model has collapsed"):
        fit(Constant(), ConstantData(), walker(**{option: True}), max_epochs=2)


def test_reference_embeddings_that_are_zero_are_warned_of():
    class HoledData(Data):
        def reference_embeddings(self):
            return self.train_dataset().points * (torch.arange(self.n) % 2)[:, None]

    with pytest.warns(UserWarning, match="Some embeddings of a pool are all zero"):
        fit(Model(), HoledData(), walker(from_reference=True))


def test_zero_rows_are_served_and_warned_of_once():
    def embed(module, batch):
        return module(batch) * (batch[0] % 10 > 0)[:, None]

    model = Model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(model, Data(), walker(composer=RWRComposer(ForgetsWarnings()), embed=embed), max_epochs=2)
    assert len([w for w in caught if "all zero" in str(w.message)]) == 1
    assert all(len(set(sum(batches, []))) == 96 for batches in model.epochs.values())


def test_two_equal_instances_are_no_collapse():
    """The rehearsal before the warm-up may embed only two instances."""

    class Twins(Points):
        def __init__(self, n):
            super().__init__(n)
            self.points[1] = self.points[0]

    class TwinData(Data):
        def train_dataset(self):
            return Twins(self.n)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(Model(), TwinData(), walker(warmup_epochs=1), max_epochs=2)
    assert not [w for w in caught if "collapsed" in str(w.message)]
