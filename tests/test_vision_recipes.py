"""SimCLR and MoCo v3: training, two processes, resuming, precision, the command line; images and their conversion."""

import importlib
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_parts
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Records, assert_equal, fit, pool_order, trainer, walker
from PIL import Image
from processes import finish, seen
from test_docs import printed
from torch.utils.data import TensorDataset
from vision_parts import RECIPES, Encoder

from bs_lightning.losses import info_nce
from bs_lightning.recipes import augment, probes
from bs_lightning.recipes import images as images_module
from bs_lightning.recipes.__main__ import main
from bs_lightning.recipes.augment import change_colors, crop_and_flip, random_view
from bs_lightning.recipes.image_encoder import Standardize
from bs_lightning.recipes.images import ImageData, ImageFolder, ParquetImages, Pixels, to_pixels
from bs_lightning.recipes.moco_v3 import MoCoV3
from bs_lightning.recipes.resnet import Residual, ResNet18
from bs_lightning.recipes.simclr import SimCLR

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_each_index_once(records, n=96):
    for batches in records.epochs.values():
        assert sorted(sum(batches, [])) == list(range(n))


# Training


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_training_learns(name):
    def noisy(images):
        return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)

    torch.manual_seed(1)
    quick = {"momentum": 0.9} if name == "moco_v3" else {}  # the default suits thousands of steps
    model, records = vision_parts.model(name, learning_rate=5e-3, temperature=0.2, **quick), Records()
    data = vision_parts.data(n=256, batch_size=32, augment=noisy)
    (before,) = trainer().test(model, datamodule=data, verbose=False)[:1]
    fit(model, data, walker(64), records, max_epochs=10)
    (after,) = trainer().test(model, datamodule=data, verbose=False)[:1]
    assert np.mean(records.losses[-8:]) < 0.9 * np.mean(records.losses[:8])
    assert after["test/linear_probe"] > before["test/linear_probe"] + 0.05


@pytest.mark.parametrize(
    ("name", "precision"), [("simclr", "bf16-mixed"), ("simclr", "bf16-true"), ("moco_v3", "bf16-mixed")]
)
def test_bf16(name, precision):
    records = Records()
    fit(vision_parts.model(name), vision_parts.data(), walker(32), records, precision=precision)
    assert np.isfinite(records.losses).all()
    assert_each_index_once(records)


@pytest.mark.parametrize("name", RECIPES)
def test_recycling(name):
    records = Records()
    made = fit(vision_parts.model(name), vision_parts.data(), walker(32, recycle=True), records)
    assert "batch_sampler/hardness" in made.callback_metrics
    assert "train/loss" in made.progress_bar_metrics
    assert_each_index_once(records)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_returns_the_embeddings_that_were_compared(name):
    class Compares(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                self.expected = module.embed(batch[0])
                if name == "simclr":  # whose batch norm sees both views at once
                    self.expected = torch.cat(module.embed(batch.flatten(0, 1)).chunk(2), dim=1)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            torch.testing.assert_close(outputs["embeddings"], self.expected)

    fit(vision_parts.model(name), vision_parts.data(), Compares(), max_steps=2)


@pytest.mark.parametrize("name", RECIPES)
def test_encoding_leaves_no_trace(name):
    """Random views, batch norm and the momentum encoder are as without the callback."""
    states = []
    for callbacks in [], [walker(32, composer=pool_order)]:
        seed_everything(0)
        model = vision_parts.model(name)
        fit(model, vision_parts.data(), *callbacks)
        states.append(model.state_dict())
    assert_equal(*states)


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_in_mid_epoch(name, tmp_path):
    """A resumed run has the batches and the weights of the run that went on."""
    seed_everything(0)
    whole, batches = vision_parts.model(name), Records()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    fit(whole, vision_parts.data(), walker(48), batches, save, enable_checkpointing=True)

    resumed, later = vision_parts.model(name), Records()
    path = tmp_path / "step=14.ckpt"  # after two of twelve batches of the second epoch, within its first pool
    seed_everything(1)  # the views must not depend on it
    fit(resumed, vision_parts.data(seed=0), walker(48), later, ckpt_path=path)
    assert later.epochs == {1: batches.epochs[1][2:]}
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_views_depend_on_seed_and_step_and_take_no_random_numbers():
    def drawn(seed, before):
        def noting(images):
            numbers.append(float(torch.rand(())))
            return images

        numbers = []
        model = vision_parts.model("simclr")
        torch.manual_seed(before)
        state = torch.get_rng_state()
        fit(model, vision_parts.data(seed=seed, augment=noting), max_epochs=2)
        assert torch.equal(torch.get_rng_state(), state)
        return numbers

    numbers = drawn(0, before=1)
    assert len(set(numbers)) == 24
    assert numbers == drawn(0, before=2)
    assert not set(numbers) & set(drawn(1, before=1))


@pytest.mark.slow
def test_two_processes(tmp_path):
    done = finish([sys.executable, vision_parts.__file__, tmp_path])
    assert done.returncode == 0, done.error[-4000:]
    # At this temperature all pairs are equally similar. So the loss says how many negatives there are: those of both.
    for name, expected in {"simclr": math.log(2 * 8 - 1), "moco_v3": 2 * 1e4 * 2 * math.log(8)}.items():
        first, second = seen(tmp_path / name, 2)
        assert first["weights"] == second["weights"]
        for batches in first["epochs"]:
            assert sorted(sum(batches, [])) == list(range(96))
            assert {len(batch) for batch in batches} == {8}
        assert first["losses"] == pytest.approx([expected] * 12, rel=1e-3)
        assert first["losses"][-1] != second["losses"][-1]  # each has its own anchors
        assert first["logged"] == second["logged"]
        drawn = first["drawn"] + second["drawn"]
        assert len(drawn) == len(set(drawn)) == 2 * 12  # each process has views of its own


@pytest.mark.parametrize("name", RECIPES)
def test_masked_pairs_are_left_out(name):
    class OneGroup(ImageData):
        def train_groups(self):
            return torch.zeros(96, dtype=torch.int64)

    records = Records()
    data = OneGroup(vision_parts.digits(0, 96), 8, image_size=8)
    fit(vision_parts.model(name, masked=True), data, records, max_epochs=1)
    assert records.losses == [0] * 12  # no negative is left
    with pytest.raises(RuntimeError, match="needs a rule"):
        fit(vision_parts.model(name, masked=True), vision_parts.data(), walker(32))


@pytest.mark.parametrize("name", RECIPES)
def test_loads_from_a_checkpoint(name, tmp_path):
    model = vision_parts.model(name, temperature=0.25)
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(model, vision_parts.data(), save, enable_checkpointing=True, max_epochs=1)
    loaded = type(model).load_from_checkpoint(tmp_path / "last.ckpt", encoder=Encoder())
    assert loaded.hparams.temperature == 0.25
    assert_equal(loaded.state_dict(), model.state_dict())


def test_embedding_sees_clean_images_and_training_sees_views():
    class Sees(SimCLR):
        def embed(self, images):
            (self.views if self.training else self.clean).append(images)
            return super().embed(images)

    model, data = Sees(Encoder(), embedding_width=8), vision_parts.data()
    model.views, model.clean = [], []
    fit(model, data, walker(96), max_epochs=1)
    pixels = torch.stack([data.pool_dataset()[index] for index in range(96)])
    clean = torch.cat(model.clean)
    assert clean.dtype == torch.uint8
    assert_equal(sorted(clean.flatten(1).tolist()), sorted(pixels.flatten(1).tolist()))
    first, second = model.views[0].chunk(2)
    assert first.shape == (8, 3, 8, 8)
    assert not torch.equal(first, second)


def test_both_views_are_of_the_same_images():
    class Sees(SimCLR):
        def training_step(self, views, batch_idx):
            pixels = torch.stack([data.pool_dataset()[index] for index in data.trained_batch()])
            assert_equal(list(views), 2 * [pixels / 255])
            return super().training_step(views, batch_idx)

    data = vision_parts.data(augment=lambda images: images)
    fit(Sees(Encoder(), embedding_width=8), data, max_epochs=1)


@pytest.mark.parametrize("augment", [lambda images: images[::2], lambda images: images.repeat(2, 1, 1, 1)])
def test_augment_must_return_a_view_of_each_image(augment):
    with pytest.raises(ValueError, match=r"augment must return one view of each of the (\d+) images .* \[\1, 3, "):
        fit(vision_parts.model("simclr"), vision_parts.data(augment=augment), max_epochs=1)
    with pytest.raises(TypeError, match="augment must be callable, such as random_view, got None"):
        vision_parts.data(augment=None)


# MoCo v3


def weights(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


class Stops(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


def moved_share(momentum, *callbacks, **kwargs):
    """Train; return which part of the way from its start to the encoder the momentum encoder has gone."""
    model = vision_parts.model("moco_v3", momentum=momentum)
    before = weights(model.momentum_encoder)
    fit(model, vision_parts.data(), walker(32), *callbacks, **kwargs)
    after, target = weights(model.momentum_encoder), weights(model.encoder, model.projector)
    start, there, goal = (torch.cat([each.flatten() for each in group]) for group in (before, after, target))
    return float((there - start).norm() / (goal - start).norm())


def test_the_momentum_encoder_follows():
    # In training without an end the momentum stays the same.
    assert moved_share(0.9, Stops(), max_epochs=-1) == pytest.approx(0.1, rel=1e-4)
    assert moved_share(1.0) == 0
    # Two steps, or one step with the gradients of two batches. The momentum is 0 in the first step.
    assert 0.5 < moved_share(0.0, max_epochs=1, limit_train_batches=2) < 1
    accumulated = moved_share(0.0, max_epochs=1, limit_train_batches=2, accumulate_grad_batches=2)
    assert accumulated == pytest.approx(1, rel=1e-4)


def test_the_momentum_stays_where_the_number_of_steps_is_not_known(monkeypatch):
    momenta = []
    monkeypatch.setattr(MoCoV3, "follow", lambda self, momentum: momenta.append(momentum))
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", -1)
    fit(vision_parts.model("moco_v3", momentum=0.9), vision_parts.data(), max_epochs=1, limit_train_batches=3)
    assert momenta == pytest.approx([0.9, 0.9, 0.9])


def test_queries_of_each_view_are_compared_with_keys_of_the_other(monkeypatch):
    model = vision_parts.model("moco_v3")
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    first, second = views = torch.rand(2, 8, 3, 8, 8)
    temperature = model.hparams.temperature
    expected = 0
    for one, other in ((first, second), (second, first)):
        expected += info_nce(model.queries(one), model.keys(other), temperature=temperature, symmetric=False)
    torch.testing.assert_close(model.training_step(views, 0)["loss"], 2 * temperature * expected)


def test_the_momentum_encoder_gets_no_gradient():
    model = vision_parts.model("moco_v3")
    fit(model, vision_parts.data(), max_epochs=1)
    assert all(parameter.grad is None for parameter in model.momentum_encoder.parameters())
    assert len(model.optimizers().param_groups[0]["params"]) == len(weights(model.encoder, model.projector)) + 4


@pytest.mark.parametrize("name", RECIPES)
def test_the_optimizer_has_the_settings_and_all_weights_that_have_a_gradient(name):
    model = vision_parts.model(name, learning_rate=0.125, weight_decay=0.25)
    fit(model, vision_parts.data(), max_steps=1)
    (group,) = model.optimizers().param_groups
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)
    assert set(group["params"]) == {parameter for parameter in model.parameters() if parameter.grad is not None}


def test_a_momentum_encoder_in_half_precision_is_refused():
    with pytest.raises(ValueError, match=r'are torch.bfloat16, .* Use Trainer.precision="bf16-mixed"'):
        fit(vision_parts.model("moco_v3"), vision_parts.data(), max_epochs=1, precision="bf16-true")
    fit(vision_parts.model("moco_v3"), vision_parts.data(), max_epochs=1, precision="bf16-mixed", limit_train_batches=1)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_a_wrong_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match=f"momentum must be in .*, got {momentum}"):
        MoCoV3(ResNet18(4), momentum=momentum)


@pytest.mark.parametrize("recipe", [SimCLR, MoCoV3])
@pytest.mark.parametrize(("temperature", "error"), [(0, ValueError), (math.nan, ValueError), ("x", TypeError)])
def test_a_wrong_temperature_is_refused(recipe, temperature, error):
    with pytest.raises(error, match="temperature must be"):
        recipe(ResNet18(4), temperature=temperature)


# The command line


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line(name, tmp_path, capsys):
    folder = tmp_path / "digits"
    pixels, labels = vision_parts.digits(0, 64).tensors
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (folder / str(int(label))).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).byte().numpy()).save(folder / str(int(label)) / f"{index}.png")
    options = {
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path,
        "model.encoder": "bs_lightning.recipes.resnet.ResNet18",
        "model.encoder.init_args.width": 4,
        "data.train": folder,
        "data.test": folder,
        "data.batch_size": 8,
        "data.image_size": 8,
        "data.num_workers": 0,
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    config = ["--config", str(ROOT / f"examples/{name}.yaml")]
    done = finish([sys.executable, "-m", "bs_lightning.recipes", name, "fit", *config, *arguments])
    assert done.returncode == 0, done.error[-4000:]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint)["global_step"] == 16
    main([name, "test", *config, *arguments, f"--ckpt_path={checkpoint}"])
    assert "test/linear_probe" in capsys.readouterr().out


# Images


def picture(mode, size=(8, 8)):
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("size", [(8, 8), (20, 11)])
def test_images_of_mixed_mode_and_size_are_converted(mode, size):
    pixels = to_pixels(picture(mode, size), 8)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.uint8)
    if mode == "RGB" and size == (8, 8):
        assert np.array_equal(pixels.permute(1, 2, 0), picture(mode))


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (3, 12, 9)])
def test_tensors_are_converted(shape):
    image = torch.rand(shape)
    pixels = to_pixels(image, 8)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.uint8)
    assert torch.equal(pixels, to_pixels((image * 255).round().byte(), 8))
    if shape[-2:] == (8, 8):
        assert (pixels - image.expand(3, -1, -1) * 255).abs().max() <= 0.5


def test_an_image_is_cropped_at_its_centre():
    image = torch.zeros(3, 8, 16)
    image[:, :, 4:12] = 1
    assert to_pixels(image, 4).min() > 200  # resizing mixes in a little of what is beside the crop


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("I;16", (8, 8)), "mode 'I;16' has more than 8 bits"),
        (Image.new("F", (8, 8)), "mode 'F' has more than 8 bits"),
        (np.zeros((8, 8, 3), np.uint8), "is a ndarray. Give a PIL image"),
        (torch.zeros(8, 8, 3), r"shape is \[8, 8, 3\]. It must be"),
        (torch.randn(3, 8, 8), r"floats outside \[0, 1\]"),
        (torch.full((3, 8, 8), torch.nan), r"floats outside \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "dtype is torch.int64"),
        ({"picture": 0}, "no key img or image"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_index(image, words):
    with pytest.raises(ValueError, match=f"Image 1 of the dataset cannot be used: .*{words}"):
        Pixels([picture("RGB"), image], 8)[1]


@pytest.fixture
def folder(tmp_path):
    for name, image in {
        "cat/1.png": picture("L"),
        "cat/2.jpg": picture("RGB", (20, 11)),
        "dog/0.PNG": picture("RGBA", (9, 9)),
        "dog/more/3.gif": picture("P"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / "cat/about.txt").write_text("not an image")
    (tmp_path / "cat/._1.png").write_text("what macOS keeps of a file")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    picture("L").save(tmp_path / ".ipynb_checkpoints/0.png")
    return tmp_path


def test_a_folder(folder):
    dataset = ImageFolder(folder)
    assert [path.name for path in dataset.paths] == ["1.png", "2.jpg", "0.PNG", "3.gif"]
    assert (dataset.classes, dataset.targets) == (["cat", "dog"], [0, 0, 1, 1])
    assert dataset[1][0].size == (20, 11)
    data = ImageData(folder, 2, test=str(folder), image_size=8)
    assert [len(loader) for loader in data.test_dataloader()] == [2, 2]
    images, labels = next(iter(data.test_dataloader()[1]))
    assert (images.shape, labels.tolist()) == ((2, 3, 8, 8), [0, 0])


def test_class_folders_may_be_links(folder, tmp_path_factory):
    links = tmp_path_factory.mktemp("links")
    for name in ("cat", "dog"):
        (links / name).symlink_to(folder / name)
    (folder / "dog/back").symlink_to(folder)
    assert ImageFolder(links).targets == [0, 0, 1, 1]
    assert len(ImageFolder(folder).paths) == 4


def test_folders_of_different_classes_are_refused(folder, tmp_path_factory):
    test = tmp_path_factory.mktemp("test")
    (test / "dog").mkdir()
    picture("L").save(test / "dog" / "1.png")
    with pytest.raises(ValueError, match=r"train and test must have the same classes, .* but \['cat'\] differs"):
        ImageData(folder, 2, test=test)


def test_a_folder_without_classes(folder):
    picture("L").save(folder / "bird.png")
    dataset = ImageFolder(folder)
    assert (dataset.classes, dataset.targets) == ([], None)
    data = ImageData(folder, 2, test=folder, image_size=8)
    with pytest.raises(ValueError, match=r"Image 0 has no label, .* one subfolder for each class"):
        next(iter(data.test_dataloader()[0]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_broken_image_is_named(folder, damage, workers):
    path = folder / "cat/2.jpg"
    path.write_bytes(path.read_bytes()[:400] if damage == "cut" else b"not an image")
    with pytest.raises(ValueError, match=r"Image 1 of the dataset cannot be used: .*2.jpg"):
        fit(SimCLR(ResNet18(4)), ImageData(folder, 2, image_size=8, num_workers=workers))


@pytest.mark.parametrize("source", ["", "missing", "missing.parquet", "cat/about.txt"])
def test_a_path_without_images_is_refused(tmp_path, source):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/about.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"holds no image|neither a folder of images nor a parquet file"):
        ImageData(tmp_path / source)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        ImageData(torch.rand(4, 3, 8, 8), image_size=0)


def write_parquet(path, **columns):
    pyarrow = importlib.import_module("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(columns), path)


def files(*images):
    written = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        written.append({"bytes": file.getvalue(), "path": None})
    return written


@pytest.mark.parametrize("column", ["img", "image"])
def test_a_parquet_file(tmp_path, column):
    path = tmp_path / "train.parquet"
    write_parquet(path, **{column: files(picture("RGB"), picture("L", (9, 7)))}, label=[3, 1], other=["a", "b"])
    dataset = ParquetImages(path)
    assert (len(dataset), dataset.targets.tolist(), dataset[1][1]) == (2, [3, 1], 1)
    assert dataset[1][0].size == (9, 7)
    data = ImageData(str(path), 2, image_size=8)
    assert np.array_equal(data.train_dataset()[0].permute(1, 2, 0), picture("RGB"))
    data.train_dataloader()
    assert data.train_labels().tolist() == [3, 1]


def test_a_broken_row_of_a_parquet_file_is_named(tmp_path):
    rows = [*files(picture("RGB")), {"bytes": b"not an image", "path": None}, {"bytes": None, "path": "x.png"}]
    write_parquet(tmp_path / "train.parquet", img=rows)
    dataset = Pixels(ParquetImages(tmp_path / "train.parquet"), 8)
    assert dataset.targets is None
    assert dataset[0].shape == (3, 8, 8)
    for index in (1, 2):
        with pytest.raises(ValueError, match=f"Image {index} of the dataset cannot be used"):
            dataset[index]


def test_a_parquet_file_without_images_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", text=["a"])
    with pytest.raises(ValueError, match=r"must have a column img or image, got columns \['text'\]"):
        ParquetImages(tmp_path / "train.parquet")


def test_items_that_are_dictionaries():
    items = [{"image": picture("RGB"), "label": 2}, {"img": picture("L"), "label": 1}]
    data = ImageData(items, 2, test=items, image_size=8)
    assert next(iter(data.test_dataloader()[0]))[1].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ((torch.tensor([3, 1]),), [3, 1]),
        ((torch.tensor([0.5, 1.5]),), None),
        ((torch.rand(2, 3, 8, 8),), None),
        ((), None),
    ],
    ids=["labels", "floats", "second images", "images alone"],
)
def test_labels_of_a_tensor_dataset(columns, expected):
    data = ImageData(TensorDataset(torch.rand(2, 3, 8, 8), *columns), 2, image_size=8)
    data.train_dataloader()
    labels = data.train_labels()
    assert (None if labels is None else labels.tolist()) == expected


@pytest.mark.parametrize(("labels", "expected"), [([3, 1], [3, 1]), (["cat", "dog"], None)], ids=["integers", "words"])
def test_labels_of_a_hugging_face_dataset(labels, expected):
    datasets = pytest.importorskip("datasets")
    images = [np.asarray(picture("RGB")), np.asarray(picture("L"))]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64" if expected else "string")})
    data = ImageData(datasets.Dataset.from_dict({"img": images, "label": labels}, features=features), 2, image_size=8)
    data.train_dataloader()
    assert data.train_labels() == expected
    assert data.train_dataset()[1].shape == (3, 8, 8)


def test_evaluation_needs_test_images():
    with pytest.raises(ValueError, match="give ImageData"):
        ImageData(torch.rand(4, 3, 8, 8)).test_dataloader()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install \"bs-lightning\[vision\]\""):
        ParquetImages("train.parquet")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install \"bs-lightning\[vision\]\""):
        probes.linear_probe(*[torch.zeros(2, 2), torch.arange(2)] * 2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install \"bs-lightning\[vision\]\""):
        importlib.reload(images_module)


# Views


def test_views_differ_by_image_and_stay_in_range():
    images = torch.rand(1, 3, 16, 16).expand(64, -1, -1, -1)
    views = random_view(images)
    assert (views.min() >= 0, views.max() <= 1, views.shape) == (True, True, images.shape)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 64


def test_crops_are_parts_of_the_image_and_half_are_mirrored():
    ramp = torch.arange(16.0).expand(400, 1, 16, 16)  # each pixel is its column
    rows = crop_and_flip(ramp)[:, 0, 0]
    rises = rows[:, -1] > rows[:, 0]
    assert 0.4 < rises.float().mean() < 0.6
    widths = (rows[:, -1] - rows[:, 0]).abs() + 1
    assert (rows >= 0).all()
    assert (rows <= 15).all()
    assert widths.min() < 8
    assert widths.max() > 14
    assert crop_and_flip(torch.ones(100, 3, 16, 16)).min() > 0.999  # no dark frame


def test_the_chances_of_colours():
    images = torch.rand(500, 3, 4, 4)
    assert torch.equal(change_colors(images, chance=0, gray_chance=0), images)
    unchanged = (change_colors(images, gray_chance=0) == images).flatten(1).all(dim=1)
    assert 0.15 < unchanged.float().mean() < 0.25
    views = change_colors(images)
    assert 0.15 < (views[:, 0] == views[:, 2]).flatten(1).all(dim=1).float().mean() < 0.25
    changed = change_colors(images, chance=1, gray_chance=0)
    for measure in (
        lambda x: x.mean(dim=(1, 2, 3)),  # brightness
        lambda x: x.mean(dim=1).std(dim=(1, 2)),  # contrast
        lambda x: x.std(dim=1).mean(dim=(1, 2)),  # saturation
    ):
        ratio = measure(changed) / measure(images)
        assert ratio.min() < 0.75
        assert ratio.max() > 1.15
    gray = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1) / 2
    no_hue = change_colors(gray, chance=1, gray_chance=0)
    assert torch.allclose(no_hue, no_hue[:, :1].expand_as(no_hue), atol=1e-5)  # gray has no hue to change


def test_the_view_of_an_image_does_not_depend_on_its_batch():
    images = torch.rand(20, 3, 8, 8)
    views = []
    for others in (1, 0):
        torch.manual_seed(0)
        images[1:] *= others
        views.append(random_view(images)[0])
    assert torch.equal(*views)


def test_a_crop_is_not_larger_than_the_image():
    ramp = torch.arange(16.0).expand(400, 1, 16, 16)  # each pixel is its column
    assert crop_and_flip(ramp, smallest=1).diff(dim=3).abs().min() > 0.8
    assert crop_and_flip(ramp.mT, smallest=1).diff(dim=2).abs().min() > 0.8


def test_the_hue_turns_about_gray_by_up_to_a_tenth():
    def hue(images):
        red, green, blue = images.flatten(1).T
        return torch.complex(red - (green + blue) / 2, (green - blue) * 0.75**0.5)

    images = 0.5 + 0.05 * torch.rand(500, 3, 1, 1)
    turns = (hue(change_colors(images, chance=1, gray_chance=0)) / hue(images)).angle() / (2 * math.pi)
    assert turns.abs().max() < 0.101
    assert turns.min() < -0.09
    assert turns.max() > 0.09
    matrices = augment._hue_turns(torch.linspace(-1, 1, 9))
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(9, 3, 3))
    torch.testing.assert_close(matrices.sum(dim=2), torch.ones(9, 3))


# The encoder and the probes


def test_the_resnet_has_eighteen_layers():
    assert sum(parameter.numel() for parameter in ResNet18().parameters()) == 11_168_832  # torchvision's but for stem
    assert ResNet18(4)(torch.rand(2, 3, 32, 32)).shape == (2, 32)


def test_a_block_ends_with_the_relu_of_both_branches():
    block, x = Residual(4, 8, 2).eval(), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), (block.inner(x) + block.shortcut(x)).clamp_min(0))
    assert block(x).min() == 0


def test_bytes_and_floats_are_standardised_alike():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    standardize = Standardize()
    assert torch.allclose(standardize(pixels), standardize(pixels / 255))
    assert standardize.bfloat16()(pixels / 255).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", [SimCLR, MoCoV3])
def test_an_encoder_of_unknown_width_is_refused(recipe):
    with pytest.raises(TypeError, match="encoder must have an integer attribute num_features"):
        recipe(torch.nn.Flatten())


def test_the_nearest_vote_by_similarity():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.0, 1.1, 1.2])
    lengths = torch.tensor([1.0, 0.1, 0.1, 9.0, 9.0, 9.0, 9.0])  # which do not count
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1) * lengths[:, None]
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    for k, temperature, expected in ((3, 0.1, 1), (7, 0.01, 1), (7, 100, 0)):
        for dtype in (torch.int64, torch.uint8):
            of = labels.to(dtype)
            found = probes.knn_accuracy(gallery, of, 5 * gallery[:1], of[:1], k=k, temperature=temperature)
            assert found == expected


def test_images_without_a_label_cannot_vote():
    with pytest.raises(ValueError, match=r"labels must be at least 0, got -1\. Leave out"):
        probes.knn_accuracy(torch.eye(3), torch.tensor([0, -1, 1]), torch.eye(3), torch.zeros(3))


def test_the_probes_agree_with_the_data():
    features = torch.randn(200, 4)
    labels = (features[:, 0] > 0).long()
    features[:, 0] /= 1000  # its scale does not count
    data = features[:150], labels[:150], features[150:], labels[150:]
    assert probes.linear_probe(*data) > 0.9
    assert probes.linear_probe(*data[:3], 1 - labels[150:]) < 0.1


def test_datasets_without_labels_are_trained_on():
    made = fit(
        vision_parts.model("simclr"), ImageData(TensorDataset(torch.rand(32, 3, 8, 8)), 8, image_size=8), walker(16)
    )
    assert "batch_sampler/false_negative_rate" not in made.callback_metrics
    assert "batch_sampler/hardness" in made.callback_metrics


def test_the_page_of_the_recipes():
    (code,) = printed("docs/reference/recipes-vision.md")
    names = {}
    exec(code, names)
    assert names["trainer"].callback_metrics.keys() >= {"test/knn", "test/linear_probe"}
