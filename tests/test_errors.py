"""Bad input is refused at once. The error names the argument, the value and the fix."""

import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from parts import Data, Model, Points, fit, pool_order, trainer, walker

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, Composer, ExactGraph, RWRComposer


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"pool_size": 1}, ValueError, "pool_size must be at least one global batch, got 1"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be at least 0, got -1"),
        ({"composer": 3}, TypeError, "composer must be callable, such as RWRComposer.., got 3"),
        ({"embed": 3}, TypeError, "embed must be a function of .pl_module, batch., got 3"),
        ({"encode_batch_size": 0}, ValueError, "encode_batch_size must be at least 1, got 0"),
        (
            {"composer": lambda embeddings, batch_size: 0},
            TypeError,
            r"composer must take \(embeddings, batch_size, \*, seed, epoch\), got .*lambda.*'seed'",
        ),
        (
            {"composer": RWRComposer},
            TypeError,
            r"composer must be an object, such as RWRComposer\(\), got the class",
        ),
        ({"pool_size": "100"}, ValueError, r"pool_size must be an integer, a float in \(0, 1\].*got '100'"),
        (
            {"pool_size": RWRComposer()},
            TypeError,
            r"pool_size must be .*, got RWRComposer.* Name a composer: composer=",
        ),
        ({"warmup_epochs": None}, TypeError, "warmup_epochs must be an integer, got None"),
        ({"encode_batch_size": 2.5}, TypeError, "encode_batch_size must be an integer, got 2.5"),
        ({"refresh_every": True}, TypeError, "refresh_every must be an integer, got True"),
    ],
)
def test_callback_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        BatchSamplerCallback(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"shuffle": True}, ValueError, "shuffle=True is no argument .* a new random permutation every epoch"),
        ({"sampler": []}, ValueError, "^sampler=.* the order is chosen already"),
        ({"batch_sampler": []}, ValueError, "^batch_sampler=.* the batches are chosen already"),
        ({"in_order": False}, ValueError, "in_order=False would train batches in a different order"),
    ],
)
def test_datamodule_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        Data(8, **kwargs)


def test_an_overridden_train_dataloader_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match=r"Mine must not override train_dataloader.*Return the dataset from train_data"):

        class Mine(BatchSamplerDataModule):
            def train_dataloader(self):
                return None


@pytest.mark.parametrize(
    ("batch_size", "n", "pool_size", "words"),
    [
        (1, 100, 32, "batch_size must be at least 2, got 1"),
        (0, 100, 32, "batch_size must be at least 2, got 0"),
        (8, 100, 7, "pool_size must be at least one global batch, 8 = batch_size 8 x 1 processes, got 7"),
        (101, 100, 200, "dataset has 100 instances, fewer than one global batch of batch_size 101 x 1"),
    ],
)
def test_sizes_before_training_starts(batch_size, n, pool_size, words):
    model = Model()
    with pytest.raises(ValueError, match=words):
        fit(model, Data(batch_size, n), walker(pool_size, warmup_epochs=1))
    assert not model.epochs


def test_batch_size_must_be_an_integer():
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 8\.0"):
        fit(Model(), Data(8.0), walker())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Points())


class Generates(Data):
    def train_dataset(self):
        return (point for point in Points())


class PoolStreams(Data):
    def pool_dataset(self):
        return Stream()


class GivesLoader(Data):
    def train_dataset(self):
        return torch.utils.data.DataLoader(Points(), batch_size=8)


class GivesNothing(Data):
    def train_dataset(self):
        self.points = Points()


class GivesSplits(Data):
    def train_dataset(self):
        return {split: Points() for split in ("train", "test")}


class ShortPool(Data):
    def pool_dataset(self):
        return Points(self.n - 1)


class ShortLabels(Data):
    def train_labels(self):
        return [0] * 7


class NoData(BatchSamplerDataModule):
    pass


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (Generates(), TypeError, r"train_dataset\(\) must be a map-style dataset .*, got generator"),
        (PoolStreams(), TypeError, r"pool_dataset\(\) must be a map-style dataset .*, got Stream"),
        (GivesLoader(), TypeError, r"train_dataset\(\) must .*, got DataLoader. Give the loader's dataset"),
        (GivesNothing(), TypeError, r"train_dataset\(\) must .*, got NoneType. Is a return statement missing"),
        (GivesSplits(), TypeError, r"train_dataset\(\) must .*, got dict. .* 'train', 'test'. Give one of them"),
        (ShortPool(), ValueError, r"pool_dataset\(\) must have the length and order of .* 100, got length 99"),
        (ShortLabels(), ValueError, r"train_labels\(\) must have the length and order of .* 100, got length 7"),
        (NoData(8), NotImplementedError, r"NoData must override train_dataset\(\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_before_training_starts(data, error, words):
    model = Model()
    with pytest.raises(error, match=words):
        fit(model, data, walker(warmup_epochs=1))
    assert not model.epochs


class ForgetsSuper(BatchSamplerCallback):
    def __init__(self):
        self.pool_size = 32


def test_a_callback_whose_own_init_is_incomplete():
    with pytest.raises(TypeError, match=r"^ForgetsSuper.__init__ must call super\(\).__init__\(\)\.$"):
        fit(Model(), Data(8, 96), ForgetsSuper())


class OtherData(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(Points(), batch_size=8)


class Serves:
    def train_dataloader(self):
        return [torch.zeros(8, 8)]


def test_a_train_dataloader_from_elsewhere():
    with pytest.raises(
        TypeError, match=r"Mixed takes train_dataloader from Serves.*BatchSamplerDataModule before Serves"
    ):

        class Mixed(Serves, Data):
            pass

    made = Data.from_datasets(train_dataset=Points(100), batch_size=8)
    with pytest.raises(TypeError, match="a train_dataloader that is not BatchSamplerDataModule's, so none would be"):
        fit(Model(), made, walker())


class NoSetup(BatchSamplerCallback):
    def setup(self, trainer, pl_module, stage):
        pass


def test_a_callback_whose_setup_is_overridden():
    with pytest.raises(RuntimeError, match=r"NoSetup.setup must call super\(\).setup\(trainer, pl_module, stage\)"):
        fit(Model(), Data(), NoSetup())


@pytest.mark.parametrize("name", ["train_dataset", "pool_dataset", "train_labels", "planning"])
def test_attributes_where_methods_should_be(name):
    class Assigns(Data):
        def setup(self, stage):
            setattr(self, name, Points(100))

    with pytest.raises(TypeError, match=f"{name} must be a method that returns what it names, got Points"):
        fit(Model(), Assigns(), walker())


def test_what_cannot_be_embedded_fails_before_the_warmup():
    class Pairs(Data):
        def pool_dataset(self):
            return [(i, torch.zeros(3)) for i in range(self.n)]

    model = Model()
    with pytest.raises(RuntimeError) as error:
        fit(model, Pairs(), walker(warmup_epochs=1))
    assert model.batches == []
    assert "embedding a batch of pool_dataset(), a list" in error.value.__notes__[0]


def test_a_callback_whose_setup_forgets_ours_is_told_so():
    class Forgets(BatchSamplerCallback):
        def setup(self, trainer, pl_module, stage):
            pass

    with pytest.raises(RuntimeError, match=r"Forgets.setup must call super\(\)\.setup"):
        fit(Model(), Data(), Forgets(32))


def test_a_function_that_cannot_embed_is_named():
    def embed(module, batch):
        return module.encoder(batch)  # of indices and points

    with pytest.raises(TypeError) as error:
        fit(Model(), Data(), walker(embed=embed))
    assert "let the function that you gave as embed take batch[0]" in error.value.__notes__[0]


class Embeds(Model):
    def embed(self, batch):
        return self.encoder(batch)


class ForwardOfTwo(Model):
    def forward(self, first, second):
        return self.encoder(first)


class Rows(Data):
    def train_dataset(self):
        return torch.utils.data.TensorDataset(torch.zeros(self.n, 8))


class TwoViews(Data):
    def train_dataset(self):
        return [([torch.zeros(8), torch.zeros(8)], 0)] * self.n


class Clean(Data):
    def pool_dataset(self):
        return [{"x": torch.zeros(8)}] * self.n


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Embeds, Data, "of 2 parts. If the first part is the input, let your embed take batch[0]. Otherwise override"),
        (Embeds, Rows, "of 1 part. If the first part is the input, let your embed take batch[0]."),
        (Embeds, Clean, "a dict. Let your embed take such a batch."),
        (Embeds, TwoViews, "Its first part holds 2 parts itself. If those are views, override pool_dataset()"),
        (ForwardOfTwo, Data, "forward needs other arguments than a batch, so define `def embed(self, batch)`"),
        (ForwardOfTwo, Clean, "forward needs other arguments than a batch, so define `def embed(self, batch)`"),
    ],
)
def test_advice_where_a_batch_cannot_be_embedded(model, data, words):
    with pytest.raises(TypeError) as error:
        fit(model(), data(), walker())
    assert words in error.value.__notes__[0]


def two_views(instances):
    points = torch.stack([instance[1] for instance in instances])
    return [points, points], torch.tensor([instance[0] for instance in instances])


@pytest.mark.parametrize(
    ("data", "words", "is_advised"),
    [
        (Data(collate_fn=two_views), "Its first part holds 2 parts itself", True),
        (Clean(collate_fn=lambda instances: [instances]), "Let your embed take such a batch.", True),
        (Data(collate_fn=two_views, pool_collate_fn=two_views), "Let your embed take such a batch.", False),
        (TwoViews(), "Its first part holds 2 parts itself", False),
    ],
)
def test_advice_where_collate_fn_may_make_the_views(data, words, is_advised):
    with pytest.raises(TypeError) as error:
        fit(Embeds(), data, walker())
    note = error.value.__notes__[0]
    assert words in note
    assert ("If your collate_fn makes the views, give the DataModule a pool_collate_fn" in note) == is_advised


def test_a_function_that_takes_no_module_is_told_its_arguments():
    class Clean(Data):
        def pool_dataset(self):
            return torch.zeros(self.n, 8)

    with pytest.raises(TypeError) as error:
        fit(Model(), Clean(), walker(embed=torch.nn.Linear(8, 4)))
    assert "a function of (pl_module, batch)" in error.value.__notes__[0]


def test_items_that_cannot_be_collated_are_said_to_be_those_of_pool_dataset():
    class Uneven(Data):
        def pool_dataset(self):
            return [torch.zeros(i + 1) for i in range(self.n)]

    with pytest.raises(RuntimeError, match="equal size") as error:
        fit(Model(), Uneven(), walker())
    assert "loading a batch of pool_dataset()" in error.value.__notes__[0]


@pytest.mark.parametrize("name", ["on_before_batch_transfer", "transfer_batch_to_device"])
def test_a_transfer_hook_that_takes_training_batches_only_gets_advice(name):
    def hook(self, batch, *more):
        assert isinstance(batch, list)
        return batch

    class Clean(Data):
        def pool_dataset(self):
            return Points(self.n).points

    data = type("Hooked", (Clean,), {name: hook})(8)
    with pytest.raises(AssertionError) as error:
        fit(Model(), data, walker(embed=lambda module, batch: module.encoder(batch)))
    assert "moving a batch to embed" in error.value.__notes__[0]
    assert "one clean view of each instance" in error.value.__notes__[0]


def test_more_roots_than_instances_before_the_warmup():
    with pytest.raises(ValueError, match="n_roots must be at most the 8 instances of a batch, got 9"):
        fit(Model(), Data(8), walker(composer=RWRComposer(ExactGraph(5), n_roots=9), warmup_epochs=1))


def test_another_datamodule_or_none():
    with pytest.raises(TypeError, match="needs a BatchSamplerDataModule, got OtherData"):
        fit(Model(), OtherData(), walker())
    with pytest.raises(TypeError, match="needs a BatchSamplerDataModule, got none"):
        trainer(walker()).fit(Model(), torch.utils.data.DataLoader(Points(), batch_size=8))


def test_two_callbacks():
    """Lightning itself refuses two stateful callbacks of the same class."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `BatchSamplerCallback`"):
        fit(Model(), Data(), walker(), walker())


def test_a_module_that_cannot_embed():
    class Mute(LightningModule):
        training_step = Model.training_step
        configure_optimizers = Model.configure_optimizers

    with pytest.raises(TypeError, match=r"Mute has neither embed\(batch\) nor forward\(batch\)"):
        fit(Mute(), Data(), walker())


def test_a_trainer_of_pytorch_lightning():
    class Theirs(pytorch_lightning.LightningModule):
        forward = Model.forward
        training_step = Model.training_step
        configure_optimizers = Model.configure_optimizers

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for data in ({"datamodule": Data()}, {"train_dataloaders": torch.utils.data.DataLoader(Points(), batch_size=8)}):
        theirs = pytorch_lightning.Trainer(callbacks=[walker()], max_epochs=1, **quiet)
        with pytest.raises(TypeError, match=r"uses the package lightning: write `import lightning\.pytorch as pl` or"):
            theirs.fit(Theirs(), **data)


def test_a_datamodule_of_pytorch_lightning():
    class Theirs(pytorch_lightning.LightningDataModule):
        pass

    with pytest.raises(TypeError, match=r"Mine has a base of pytorch_lightning\..* uses the package lightning"):

        class Mine(BatchSamplerDataModule, Theirs):
            pass


# What a module or composer returns


def returning(make):
    return walker(embed=lambda module, batch: make(module(batch), batch))


def one_not_finite(z, batch):
    return torch.where((batch[0] == 42)[:, None], torch.nan, z)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda z, batch: z[:, None], ValueError, r"embed must return shape \[b, d\], or .*, got \[32, 1, 4\]"),
        (lambda z, batch: z[:, 0], ValueError, r"embed must return shape \[b, d\], or .*, got \[32\]"),
        (lambda z, batch: z[1:], ValueError, "embed returned 31 rows for 32 instances"),
        (lambda z, batch: torch.cat([z, z]), ValueError, "embed returned 64 rows for 32 instances"),
        (
            lambda z, batch: z.long(),
            TypeError,
            r"embed must return a float tensor .* Got a tensor of dtype torch.int64",
        ),
        (lambda z, batch: None, TypeError, "embed must return a float tensor .* Got a NoneType"),
        (lambda z, batch: z[:, :0], ValueError, r"embed must return shape \[b, d\], or .*, got \[32, 0\]"),
        (one_not_finite, ValueError, "embedding of dataset index 42 is not finite"),
    ],
)
def test_embeddings(make, error, words):
    with pytest.raises(error, match=words):
        fit(Model(), Data(8, 96), returning(make))


def test_a_collate_fn_that_drops_rows():
    def drop(items):
        return torch.utils.data.default_collate(items[1:])

    with pytest.raises(ValueError, match=r"31 rows for 32 instances.*collate_fn must neither add nor drop any"):
        fit(Model(), Data(8, 96, collate_fn=drop), walker())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda b: b[1:], ValueError, r"batches of shape \[4, 8\] for a pool of 32 .*, got \[3, 8\]"),
        (lambda b: b.ravel(), ValueError, r"batches of shape \[4, 8\] for a pool of 32 .*, got \[32\]"),
        (lambda b: b * 1.0, TypeError, "must return integer positions in the pool, got dtype float64"),
        (lambda b: b + 1, ValueError, r"must return positions in \[0, 32\), got 32"),
        (lambda b: b - 1, ValueError, r"must return positions in \[0, 32\), got -1"),
        (lambda b: np.where(b == 3, 9, b), ValueError, "returned position 9 twice. If batches may share"),
        (lambda b: None, TypeError, "must return integer positions in the pool, got dtype object"),
        (lambda b: [[0, 1], [2]], ValueError, "The composer must return an array of positions in the pool: .*inhomog"),
    ],
)
def test_composers(make, error, words):
    def composer(embeddings, batch_size, *, seed, epoch):
        return make(pool_order(embeddings, batch_size, seed=seed, epoch=epoch))

    with pytest.raises(error, match=words):
        fit(Model(), Data(8, 96), walker(composer=composer))


def test_composers_with_replacement_may_repeat_but_not_within_a_batch():
    class Repeats(Composer):
        replacement = True

        def __init__(self, batches):
            self.batches = batches

        def __call__(self, embeddings, batch_size, *, seed, epoch):
            return np.tile(self.batches, (len(embeddings) // batch_size, 1))

    model = Model()
    fit(model, Data(8, 96), walker(composer=Repeats(np.arange(8))), max_epochs=1)
    assert [len(set(batch)) for batch in model.batches] == [8] * 12
    with pytest.raises(ValueError, match="returned position 0 twice within one batch"):
        fit(Model(), Data(8, 96), walker(composer=Repeats(np.zeros(8, dtype=int))))


def test_a_graph_with_too_few_or_too_many_rows():
    for graph in (lambda z, *, seed=0: ExactGraph(3)(z[1:]), lambda z, *, seed=0: ExactGraph(3)(torch.cat([z, z[:1]]))):
        with pytest.raises(ValueError, match="graph must return a row of neighbours for each of 32 embeddings, got 3"):
            fit(Model(), Data(8, 96), walker(composer=RWRComposer(graph)))


def test_a_training_step_that_fetches_for_itself():
    """Such a step would lose every epoch's first batch: Lightning counts the batch before asking for it."""

    class Fetches(Model):
        def training_step(self, dataloader_iter):
            raise AssertionError

    with pytest.raises(TypeError, match=r"Fetches.training_step must take \(batch, batch_idx\)"):
        fit(Fetches(), Data())


def test_numpys_integers_are_integers(tmp_path):
    data = Data(np.int64(8), seed=np.int64(3))
    made = fit(Model(), data, BatchSamplerCallback(np.int64(32), RWRComposer(ExactGraph(np.int32(5)))), max_epochs=1)
    made.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["Data"]
    assert (state["seed"], state["global_batch_size"]) == (3, 8)


def test_importing_loads_neither_numba_nor_pynndescent():
    code = "import sys, bs_lightning; print([m for m in ('numba', 'pynndescent') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("labels", [torch.zeros(100, 3, dtype=torch.long), [0.5] * 100, ["cat"] * 100, iter([1])])
def test_labels_that_are_no_class_numbers(labels):
    class Odd(Data):
        def train_labels(self):
            return labels

    with pytest.raises(ValueError, match=r"train_labels\(\) must be integers of shape \[N\], got .*or None"):
        fit(Model(), Odd(), walker())


def test_what_takes_the_place_of_something_else_is_named():
    class Names(Data):
        def train_groups(self):
            return ["a", "b"] * 50

    class Labels(Data):
        def train_labels(self):
            return ["a", "b"] * 50

    class NoSuper(BatchSamplerDataModule):
        def __init__(self):
            self.points = Points(100)

    with pytest.raises(TypeError, match=r"composer must be a composer, got the graph .* Give RWRComposer\(graph\)"):
        BatchSamplerCallback(composer=ExactGraph())
    with pytest.raises(TypeError, match=r"groups must hold integers, got dtype <U1\. Convert it, e\.g\. numpy\.unique"):
        fit(Model(), Names(), walker())
    with pytest.raises(ValueError, match=r"class numbers, such as numpy\.unique"):
        fit(Model(), Labels(), walker())
    with pytest.raises(TypeError, match=r"NoSuper.__init__ must call super\(\).__init__\(batch_size=...\)"):
        fit(Model(), NoSuper(), walker())
