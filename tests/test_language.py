"""The recipes of texts: SimCSE, the dual encoder, and CLIP, on tiny models and data."""

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import language_parts
import numpy as np
import pytest
import torch
import yaml
from language_parts import IMAGES, PAIRS, RECIPES, SENTENCES, Losses, bert, build, tokenizer, train, vit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import assert_equal, trainer, walker
from PIL import Image
from processes import finish
from scipy.stats import spearmanr
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, ViTModel

from bs_lightning.losses import info_nce
from bs_lightning.recipes.__main__ import main
from bs_lightning.recipes.clip import CLIP, ImageTextData
from bs_lightning.recipes.dual_encoder import DualEncoder, PairData
from bs_lightning.recipes.simcse import SentenceData, SimCSE
from bs_lightning.recipes.text_encoder import TextEncoder, Tokenize
from bs_lightning.recipes.text_evaluation import retrieval, spearman
from bs_lightning.recipes.text_files import pair_groups, read_evaluation, read_pairs, read_sentences, text_groups

EXAMPLES = Path(__file__).parents[1] / "examples"
recipes = pytest.mark.parametrize("recipe", RECIPES)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging


# Training


@pytest.mark.slow
@recipes
def test_training_learns(recipe, tmp_path):
    model, data = build(recipe, tmp_path)
    noted = Losses()
    made = trainer(noted, walker(32), max_epochs=10)
    (before, *_) = made.validate(model, data, verbose=False)
    made.fit(model, datamodule=data)
    after = made.callback_metrics
    if recipe != "simcse":  # which knows nothing of pairs
        name = "text_to_image/mrr" if recipe == "clip" else "pairs/mrr"
        assert after[name] > before[name] + 0.04
    assert np.mean(noted.losses[-10:]) < 0.8 * np.mean(noted.losses[:3])
    assert "batch_sampler/walk_seconds" in after


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The losses gather, masks fit, each parameter gets a gradient, and each process validates on all pairs."""
    done = finish([sys.executable, language_parts.__file__, tmp_path])
    assert done.returncode == 0, done.error[-3000:]
    for recipe in RECIPES:
        two = json.loads((tmp_path / recipe / "logged.json").read_text())
        one = train(recipe, tmp_path / recipe)
        assert len(one["losses"]) == 24
        assert np.allclose(one["losses"], two["losses"], rtol=2e-3)
        for name in one:
            if name.endswith(("mrr", "r1", "scale", "hardness")):
                assert np.isclose(one[name], two[name], atol=0.03), (recipe, name)


@recipes
def test_a_run_that_is_resumed_in_mid_epoch_ends_as_the_uninterrupted_run(recipe, tmp_path):
    def run(ckpt_path=None, **kwargs):
        model, data = build(recipe, tmp_path)
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        made = trainer(saved, walker(32), enable_checkpointing=True, **kwargs)
        made.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return {name: value.clone() for name, value in model.state_dict().items()}

    expected = run()
    assert_equal(run(tmp_path / "step=5.ckpt"), expected)
    if recipe == "simcse":  # as the docs say
        loaded = SimCSE.load_from_checkpoint(tmp_path / "step=24.ckpt", model=bert())
        assert loaded.state_dict().keys() == expected.keys()


@recipes
def test_a_run_resumed_with_more_epochs_has_the_learning_rates_of_the_new_length(recipe, tmp_path):
    class Rates(Losses):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.losses.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, *args):
            pass

    def rates(max_epochs, ckpt_path=None):
        model, data = build(recipe, tmp_path)
        made = trainer(noted := Rates(), max_epochs=max_epochs, limit_val_batches=0, num_sanity_val_steps=0)
        made.fit(model, datamodule=data, ckpt_path=ckpt_path)
        made.save_checkpoint(tmp_path / "end.ckpt")
        return noted.losses

    whole = rates(3)
    assert len(whole) == 36
    rates(1)
    resumed = rates(3, tmp_path / "end.ckpt")
    assert resumed[1:] == pytest.approx(whole[13:])  # the first step has the rate at which the old run ended
    assert 0 < whole[-1] < whole[12] < whole[0] == 3e-3


@recipes
def test_the_learning_rate_stays_where_the_number_of_steps_is_not_known(recipe, tmp_path):
    """Lightning estimates -1 steps for a stream of unknown length, and none if ``max_steps`` is 0."""
    for steps in (-1, 0, math.inf):
        model, _ = build(recipe, tmp_path)
        model._trainer = SimpleNamespace(estimated_stepping_batches=steps)
        made = model.configure_optimizers()
        made["optimizer"].step()
        for _ in range(3):
            made["lr_scheduler"]["scheduler"].step()
        assert made["optimizer"].param_groups[0]["lr"] == 3e-3


@recipes
@pytest.mark.parametrize(("precision", "weights"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_bf16(recipe, precision, weights, tmp_path):
    model, data = build(recipe, tmp_path, dropout=0.1)
    noted = Losses()
    made = trainer(noted, walker(32), precision=precision)
    made.fit(model, datamodule=data)
    assert np.isfinite(noted.losses).all()
    assert {parameter.dtype for parameter in model.parameters()} == {weights}
    assert "batch_sampler/walk_seconds" in made.callback_metrics


@recipes
def test_equal_instances_are_no_negatives(recipe, tmp_path):
    model, data = build(recipe, tmp_path, dropout=0.1, repeats=16)
    noted = Losses()
    trainer(noted, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(model, datamodule=data)
    assert noted.losses == [0, 0]


@recipes
def test_training_may_have_no_end_and_no_validation(recipe, tmp_path):
    model, data = build(recipe, tmp_path)
    data.evaluate_on = ()
    data.validation_pairs = None

    class Stop(Losses):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    made = trainer(Stop(), max_epochs=-1)
    made.fit(model, datamodule=data)
    assert made.optimizers[0].param_groups[0]["lr"] == model.learning_rate


@recipes
def test_lightning_cli(recipe, tmp_path, monkeypatch):
    """The example's config trains, on the test's data and models, with pools of its own size."""
    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("text")
    tokenizer().save_pretrained("text")
    language_parts.vit().save_pretrained("image")
    Path("sentences.txt").write_text("\n".join(SENTENCES))
    Path("pairs.tsv").write_text("\n".join("\t".join(pair) for pair in [("anchor", "positive"), *PAIRS]))
    for number, image in enumerate(IMAGES):
        image.save(f"{number}.png")
    lines = [f"{number}.png\t{text}" for number, text in enumerate(SENTENCES)]
    Path("captions.tsv").write_text("\n".join(["image\ttext", *lines]))

    config = yaml.safe_load((EXAMPLES / f"{recipe}.yaml").read_text())
    model, data = config["model"], config["data"]
    data["tokenizer"] = model["text_model" if recipe == "clip" else "model"] = "text"
    if recipe == "clip":
        model["image_model"] = "image"
        data |= {"pairs": "captions.tsv", "validation_pairs": "captions.tsv", "image_size": 8}
    else:
        data["sentences" if recipe == "simcse" else "pairs"] = "sentences.txt" if recipe == "simcse" else "pairs.tsv"
        data["evaluate_on"] = ["pairs.tsv"]
    data |= {"batch_size": 8, "max_length": 16}
    config["trainer"] |= {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 20}
    # Lightning 2.6.0's progress bar fails with validation between steps.
    config["trainer"] |= {"max_epochs": 2, "precision": "32-true", "enable_progress_bar": False}
    (callback,) = config["trainer"]["callbacks"]
    graph = {"class_path": "bs_lightning.ExactGraph", "init_args": {"n_neighbors": 5}}  # nothing to compile
    composer = {"class_path": "bs_lightning.RWRComposer", "init_args": {"graph": graph}}
    callback["init_args"] = callback.get("init_args", {}) | {"composer": composer, "pool_size": 32}
    Path("small.yaml").write_text(yaml.safe_dump(config))

    made = main([recipe, "fit", "--config", "small.yaml"]).trainer
    assert made.global_step == 20
    assert {"train/loss", "batch_sampler/walk_seconds"} <= made.callback_metrics.keys()
    assert {"clip": "image_to_text/r1"}.get(recipe, "val/mrr") in made.callback_metrics


# Models


def tokens(*texts):
    return Tokenize(tokenizer(), 16)(texts)


def test_max_length_must_be_at_least_one():
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Tokenize(tokenizer(), 0)


def test_simcse_trains_with_the_dropout_of_a_loaded_model(tmp_path):
    bert(dropout=0.5).save_pretrained(tmp_path)
    model = SimCSE(str(tmp_path))
    first, second = model(tokens("r0 g1", "r0 g1"))
    assert not torch.allclose(first, second)


def test_frozen_towers_keep_their_mode():
    frozen = bert(dropout=0.5).eval().requires_grad_(False)
    assert not TextEncoder(frozen, "mean").transformer.training
    images = torch.nn.Sequential(torch.nn.BatchNorm2d(3).eval(), torch.nn.Flatten(), torch.nn.Linear(192, 16))
    assert not CLIP(images, frozen, width=16).images.model[0].training


@recipes
def test_a_step_returns_what_recycle_keeps(recipe, tmp_path):
    model, data = build(recipe, tmp_path)
    made = trainer(walker(32, recycle=True), max_epochs=2)
    made.fit(model, datamodule=data)
    assert made.callback_metrics["batch_sampler/hardness"] > made.callback_metrics["batch_sampler/uniform_hardness"]


@recipes
def test_a_step_returns_the_embeddings_that_were_compared(recipe, tmp_path):
    class Compares(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                sides = module.embed(batch)
            self.sides = sides if isinstance(sides, tuple) else (sides, sides)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            torch.testing.assert_close(outputs["embeddings"], self.sides)

    model, data = build(recipe, tmp_path)
    trainer(Compares(), max_steps=2).fit(model, datamodule=data)


@recipes
def test_a_step_returns_the_loss_of_its_embeddings(recipe, tmp_path):
    class Compares(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            temperature, symmetric = (0.07 if recipe == "clip" else 0.05), recipe != "simcse"
            expected = info_nce(*outputs["embeddings"], temperature=temperature, symmetric=symmetric)
            torch.testing.assert_close(outputs["loss"], expected)

    model, data = build(recipe, tmp_path, dropout=0.1)
    trainer(Compares(), max_steps=1).fit(model, datamodule=data)


def test_simcse_has_no_weight_decay(tmp_path):
    model, data = build("simcse", tmp_path)
    made = trainer(max_steps=1)
    made.fit(model, datamodule=data)
    assert [group["weight_decay"] for group in made.optimizers[0].param_groups] == [0]


@recipes
def test_checkpoints_hold_the_settings(recipe, tmp_path):
    model, data = build(recipe, tmp_path)
    settings, models = dict(model.hparams), {"model": bert()} if recipe != "clip" else {"image_model": vit()}
    models |= {"text_model": bert()} if recipe == "clip" else {}
    settings |= {"pooling": "mean", "learning_rate": 0.125}
    made = trainer(max_steps=1)
    made.fit(type(model)(**models, **settings), datamodule=data)
    made.save_checkpoint(tmp_path / "one.ckpt")
    assert dict(type(model).load_from_checkpoint(tmp_path / "one.ckpt", **models).hparams) == settings


def test_a_model_is_trained_in_float32(tmp_path):
    bert().half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in SimCSE(str(tmp_path)).parameters()} == {torch.float32}


def test_simcse_has_its_head_in_training_only():
    model = SimCSE(bert(), pooling="cls")
    batch = tokens("r0 g1", "b3")
    states = model.encoder.transformer(**batch).last_hidden_state
    assert torch.allclose(model(batch), states[:, 0], atol=1e-6)
    assert torch.allclose(model.embed(batch), model.head(states[:, 0]), atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pooling, side):
    encoder = TextEncoder(bert(), pooling)
    alone, beside = (
        Tokenize(tokenizer(), 16)(["r0 g1"]),
        Tokenize(tokenizer(padding_side=side), 16)(["r0 g1", "b " * 9]),
    )
    # Positions would tell a shifted text from the text itself.
    torch.nn.init.zeros_(encoder.transformer.embeddings.position_embeddings.weight)
    assert torch.allclose(encoder(alone)[0], encoder(beside)[0], atol=1e-5)


def test_mean_pooling_is_the_mean_over_a_texts_own_tokens():
    encoder, batch = TextEncoder(bert(), "mean"), tokens("r0 g1", "b3")
    states, n_tokens = encoder.transformer(**batch).last_hidden_state, batch["attention_mask"].sum(dim=1)
    assert n_tokens.tolist() == [4, 3]
    expected = torch.stack([row[:n].mean(dim=0) for row, n in zip(states, n_tokens, strict=True)])
    torch.testing.assert_close(encoder(batch), expected)


def test_the_dual_encoder_may_have_two_encoders():
    batch = tokens("r0"), tokens("r0")
    queries, documents = DualEncoder(bert()).embed(batch)
    assert torch.equal(queries, documents)
    queries, documents = DualEncoder(bert(), bert()).embed(batch)
    assert not torch.allclose(queries, documents)


def test_clip_learns_its_scale_up_to_a_limit(tmp_path):
    model, data = build("clip", tmp_path)
    torch.nn.init.constant_(model.log_scale, 9)
    trainer(max_epochs=1).fit(model, datamodule=data)
    scale = model.log_scale.exp()
    assert abs(scale - 100) > 0.01
    assert 90 < scale < 110


def test_clip_takes_a_module_that_gives_embeddings():
    tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
    model = CLIP(tower, bert(), width=16)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.embed((images, tokens("r0", "g1")))[0], tower(images))


def test_clip_takes_the_mean_over_patches_of_a_model_without_a_pooler():
    tower = ViTModel(vit().config, add_pooling_layer=False)
    model = CLIP(tower, bert(), width=16)
    images = torch.randn(2, 3, 8, 8)
    expected = model.images.projection(tower(images).last_hidden_state.mean(dim=1))
    torch.testing.assert_close(model.embed((images, tokens("r0", "g1")))[0], expected)


def test_clip_is_validated_in_both_directions(tmp_path):
    model, data = build("clip", tmp_path)
    (found,) = trainer().validate(model, data, verbose=False)
    model.eval()
    embedded = [model.embed(batch) for batch in data.val_dataloader()]
    images, texts = (torch.cat(side).detach() for side in zip(*embedded, strict=True))
    pairs = data.validation_dataset.names()
    assert found["image_to_text/mrr"] == pytest.approx(retrieval(images, texts, pairs)["mrr"])
    swapped = [(text, image) for image, text in pairs]
    assert found["text_to_image/mrr"] == pytest.approx(retrieval(texts, images, swapped)["mrr"])
    assert found["image_to_text/mrr"] != found["text_to_image/mrr"]


def test_only_matrices_of_clip_have_weight_decay(tmp_path):
    model, data = build("clip", tmp_path)
    made = trainer(max_steps=1)
    made.fit(model, datamodule=data)
    decayed, others = made.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0)
    assert any(parameter is model.log_scale for parameter in others["params"])
    assert min(parameter.ndim for parameter in decayed["params"]) == 2


# Images


def image_data(pairs, **kwargs):
    data = ImageTextData(pairs, tokenizer(), 4, image_size=8, **kwargs)
    data.setup()
    return data


def test_what_tells_images_apart():
    """A path, or an object of a list. A table, or another sequence, may make its images anew each time."""
    twice = [(IMAGES[0], "r0"), (IMAGES[0], "r1"), ("0.png", "r2"), (Path("0.png"), "r3"), (IMAGES[1], "r4")]
    assert image_data(twice).train_groups()[:, 0].tolist() == [0, 0, 3, 3, 6]

    class MadeAnew:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 3:
                raise IndexError
            return Image.new("L", (8, 8)), f"r{index}"

    assert image_data(MadeAnew()).train_groups()[:, 0].tolist() == [0, 2, 4]


def test_images_of_mixed_size_and_mode(tmp_path):
    images = [Image.new("L", (9, 30), 255), Image.new("RGBA", (8, 8), "white"), Image.new("P", (1, 1)), IMAGES[0]]
    images[0].save(tmp_path / "grey.png")
    data = image_data([(image, "r0") for image in (*images, tmp_path / "grey.png")], mean=(1, 1, 1), std=(1, 1, 1))
    pixels = [data.pool_dataset()[index][0] for index in range(5)]
    assert {each.shape for each in pixels} == {(3, 8, 8)}
    assert torch.equal(pixels[0], torch.zeros(3, 8, 8))
    assert torch.equal(pixels[0], pixels[4])


def test_by_default_images_have_the_size_that_clips_models_take():
    data = ImageTextData([(IMAGES[0], "r0")], tokenizer(), 4)
    data.setup()
    assert data.pool_dataset()[0][0].shape == (3, 224, 224)


def test_images_are_cut_at_random_in_training_only():
    stripes = Image.fromarray(np.arange(8 * 64, dtype=np.uint32).astype(np.uint8).reshape(8, 64))
    data = image_data([(stripes, "r0")] * 2)
    train, pool = data.train_dataset(), data.pool_dataset()
    assert torch.equal(pool[0][0], pool[1][0])
    assert not torch.equal(train[0][0], train[1][0])


def test_images_to_embed_are_cut_in_the_middle():
    bright = Image.new("L", (32, 8))
    bright.paste(255, (10, 0, 22, 8))
    data = image_data([(bright, "r0")], mean=(0, 0, 0), std=(1, 1, 1))
    assert data.pool_dataset()[0][0].min() > 0.9


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    (tmp_path / "captions.tsv").write_text("image\ttext\nbroken.png\tr0\nmissing.png\tg1\n")
    pairs = image_data(str(tmp_path / "captions.tsv")).train_dataset()
    with pytest.raises(ValueError, match=r"Image 0 \(.*broken.png\)"):
        pairs[0]
    with pytest.raises(ValueError, match=r"Image 1 \(.*missing.png\)"):
        pairs[1]
    with pytest.raises(ValueError, match=r"Image 0 \(int\)"):
        image_data([(3, "r0")]).train_dataset()[0]
    with pytest.raises(ValueError, match="caption of image 1"):
        image_data([(IMAGES[0], "r0"), (IMAGES[0], " ")])
    deep = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"Image 0 \(Image\) .* its mode 'I;16' has more than 8 bits\. Scale it"):
        image_data([(deep, "r0")]).train_dataset()[0]


def test_a_model_of_two_sides_is_refused():
    texts, images = (kind(hidden_size=16, num_attention_heads=2) for kind in (CLIPTextConfig, CLIPVisionConfig))
    both = CLIPModel(CLIPConfig(text_config=texts.to_dict(), vision_config=images.to_dict()))
    with pytest.raises(TypeError, match=r"CLIPModel has no config.hidden_size. .* transformers.CLIPVisionModel"):
        CLIP(both, bert())
    with pytest.raises(TypeError, match=r"such as transformers\.CLIPTextModel with pooling="):
        CLIP(vit(), both)


def test_captions_of_one_image_and_images_of_one_caption_are_groups(tmp_path):
    pairs = [("a.png", "r0"), ("b.png", "g1"), ("a.png", "b2"), ("c.png", "g1"), ("d.png", "a.png")]
    assert image_data(pairs).train_groups().tolist() == [[0, 1], [2, 3], [0, 4], [5, 3], [6, 7]]
    of_list = image_data([(IMAGES[0], "r0"), (IMAGES[1], "g0"), (IMAGES[2], "r0")])
    assert of_list.train_groups().tolist() == [[0, 1], [2, 3], [4, 1]]


# Files


class Table:
    """What the recipes use of a `datasets.Dataset`."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: all_[key] for name, all_ in self.columns.items()}


def test_sentences_are_read(tmp_path, caplog):
    file = tmp_path / "sentences.txt"
    file.write_bytes("\ufeffr0 g1\r\n\r\n g2\u2028g3 \n  \n".encode())
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        assert read_sentences(file) == ["r0 g1", "g2\u2028g3"]
    assert "2 blank lines dropped" in caplog.text
    assert read_sentences(Table(text=["r0", ""])) == ["r0"]
    assert read_sentences(Table(sentence=["r0"]), "sentence") == ["r0"]


def test_pairs_are_read(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text('anchor\tpositive\n"r0\tg1 "\n\nb0\tb1')
    assert read_pairs(file) == [('"r0', 'g1 "'), ("b0", "b1")]
    assert len(read_pairs(file, header=False)) == 3
    assert read_pairs(Table(query=["r0"], answer=["r1"]), ("query", "answer")) == [("r0", "r1")]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("a\tb\nr0\tr1\nr0\tr1\tr2", "line 3 must hold two texts with a tab between them, got 3 fields"),
        ("a\tb\n\nr0", "line 3 must hold two texts with a tab between them, got 1 fields"),
        ("a\tb\nr0\t ", "line 2 must hold two texts that are not blank"),
        ("a\tb\n", "holds no pair"),
        ("subset\tscore\tsentence1\tsentence2\nx\t1\tr0\tr1\nx\t1\tr0", "line 3 must hold 4 fields"),
        ("score\tsentence1\tsentence2\n", "holds no pair"),
        ("score\tsentence1\tsentence2\nhigh\tr0\tr1", "line 2: score must be a finite number, got 'high'"),
        ("score\tsentence1\tsentence2\nnan\tr0\tr1", "line 2: score must be a finite number, got 'nan'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, lines, error):
    (tmp_path / "pairs.tsv").write_text(lines)
    with pytest.raises(ValueError, match=error):
        read_evaluation(tmp_path / "pairs.tsv")


def test_a_carriage_return_within_a_text_ends_no_line(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"one\rtext\r\nsecond\n")
    assert read_sentences(tmp_path / "texts.txt") == ["one\rtext", "second"]


def test_wrong_data_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no sentence"):
        read_sentences(tmp_path / "empty.txt")
    with pytest.raises(TypeError, match="Row 1 of the data must hold a string, got NoneType"):
        read_sentences(["r0", None])
    with pytest.raises(ValueError, match="Row 1 of the data must hold two texts, got 3 fields"):
        read_pairs([("r0", "r1"), ("r0", "r1", "r2")])
    with pytest.raises(ValueError, match=r"no column 'text', but \['sentence'\]"):
        read_sentences(Table(sentence=["r0"]))
    for name, kind in {"a.jsonl": "json", "a.csv": "csv", "a.parquet": "parquet"}.items():
        for read in (read_sentences, read_pairs):
            with pytest.raises(ValueError, match=rf"{name} holds no plain lines of text. .*load_dataset\('{kind}'"):
                read(tmp_path / name)
    with pytest.raises(TypeError, match="streamed"):
        read_sentences(type("IterableDataset", (), {"column_names": ["text"]})())


def test_a_tokenizer_without_a_pad_token_is_refused():
    for data in (SentenceData, PairData, ImageTextData):
        with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
            data([("r0", "r1")], tokenizer(pad_token=None))


@pytest.mark.parametrize("missing", ["transformers", "PIL"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"need {missing}.*pip install 'bs-lightning\[language\]'"):
        ImageTextData([(IMAGES[0], "r0")], "a name")


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match='pooling must be "cls" or "mean", got \'max\''):
        SimCSE(bert(), pooling="max")


# Groups and evaluation


def test_groups():
    assert text_groups(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert pair_groups([("a", "x"), ("b", "y"), ("c", "x"), ("x", "a"), ("d", "d")]).tolist() == [
        [0, 1],
        [2, 3],
        [4, 1],
        [1, 0],
        [5, 5],
    ]


def test_pairs_are_no_negatives_of_pairs_that_share_a_text():
    """In a click log nearly all pairs are joined by others, so what joins them must not make a group."""
    data = PairData([("q0", "d0"), ("q0", "d1"), ("q1", "d1"), ("q2", "d2")], tokenizer(), 2)
    data.setup()
    data.train_dataloader()
    masked = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert data.false_negative_rules[0].in_batch(np.arange(4)).int().tolist() == masked


def test_spearman():
    first, second = torch.randn(2, 30, 4)
    scores = torch.randint(5, (30,)).tolist()
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(first, second, strict=True)]
    assert spearman(first, second, scores) == pytest.approx(spearmanr(cosines, scores).statistic)


def test_retrieval():
    """A document is right for the queries that a pair names with it, ranked once, and never a rival of itself."""
    queries, documents = torch.randn(2, 1500, 3)
    documents = documents[:700].repeat(3, 1)[:1500]
    pairs = [(row % 1000, row % 700 + 500) for row in range(1500)]  # 500 to 999 are both queries and documents
    found = retrieval(queries, documents, pairs)
    cosines = torch.cosine_similarity(queries[:, None], documents[None, :700], dim=2)
    ranks = []
    for row, (query, _) in zip(cosines, pairs, strict=True):
        right = {document for other, document in pairs if other == query}
        nearest_first = [500 + document for document in row.argsort(descending=True).tolist()]
        ranked = [document for document in nearest_first if document != query or query in right]
        ranks.append(1 + [document in right for document in ranked].index(True))
    assert found["r1"] == pytest.approx(np.mean(np.array(ranks) == 1))
    assert found["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)), rel=1e-3)


def test_a_text_is_no_rival_of_itself():
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    pairs = [("a", "b"), ("b", "a"), ("a", "c")]
    found = retrieval(texts[[0, 1, 0]], texts[[1, 0, 2]], pairs)
    assert found == {"r1": 1, "mrr": 1}


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_model_that_has_collapsed_retrieves_nothing(value):
    embeddings = torch.full((10, 4), value)
    pairs = [(row, 10 + row) for row in range(10)]
    assert retrieval(embeddings, embeddings, pairs) == {"r1": 0, "mrr": pytest.approx(0.1)}


def test_all_files_are_evaluated(tmp_path):
    model, _ = build("simcse", tmp_path)
    lines = [f"{score}\t{first}\t{second}" for score, (first, second) in enumerate(PAIRS[:40])]
    (tmp_path / "scored.tsv").write_text("\n".join(["score\tsentence1\tsentence2", *lines]))
    files = [str(tmp_path / name) for name in ("scored.tsv", "pairs.tsv")]
    data = SentenceData(SENTENCES, tokenizer(), 8, evaluate_on=files)
    (found, *_) = trainer().validate(model, data, verbose=False)
    model.eval()
    first, second = (model(tokens(*side)) for side in zip(*PAIRS[:40], strict=True))
    assert found["val/spearman"] == found["scored/spearman"] == pytest.approx(spearman(first, second, range(40)))
    assert found["val/mrr"] == found["pairs/mrr"]
    data.evaluate_on = ["a/pairs.tsv", "b/pairs.tsv"]
    with pytest.raises(ValueError, match="different names"):
        data.setup()
    data.evaluate_on = ["val.tsv", "test.tsv"]
    with pytest.raises(ValueError, match="a file named val, and means over files are logged as val"):
        data.setup()
    data.evaluate_on = "pairs.tsv"
    with pytest.raises(TypeError, match=r"evaluate_on must be a list of paths, got 'pairs\.tsv'"):
        data.setup()
