"""README and docs: their code runs as printed, their links lead somewhere, and the tests they name exist."""

import importlib
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from parts import Model
from torch.utils.data import Dataset

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, ExactGraph, NNDescentGraph, RWRComposer
from bs_lightning.losses import info_nce

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]


class Pairs(Dataset):
    """Item ``i`` is a pair of two sides of instance ``i``."""

    def __init__(self, n):
        points = torch.randn(n, 8)
        self.sides = torch.stack([points, points + 0.3 * torch.randn(n, 8)], dim=1)

    def __len__(self):
        return len(self.sides)

    def __getitem__(self, index):
        return list(self.sides[index])


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = Model().encoder

    def forward(self, batch):
        return self.encoder(batch)

    def training_step(self, batch, batch_idx):
        a, b = (torch.nn.functional.normalize(self(view), dim=1) for view in batch)
        return torch.nn.functional.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class LabelledSimCLR(SimCLR):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)


class CLIP(SimCLR):
    def __init__(self):
        super().__init__()
        self.image_tower, self.text_tower = Model().encoder, Model().encoder

    def training_step(self, batch, batch_idx):
        return info_nce(*self.embed(batch), temperature=0.1)


def printed(page, language="python"):
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [textwrap.dedent(code) for code in found]


@pytest.mark.filterwarnings("ignore")
def test_the_readmes_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning logs and saves here
    code, of_loss = printed("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names = {"pairs": Pairs(300), "CLIP": CLIP}
    exec(code, names)
    logged = names["trainer"].callback_metrics
    assert names["trainer"].current_epoch == 20
    assert {"batch_sampler/hardness", "batch_sampler/graph_seconds"} <= logged.keys()
    assert "batch_sampler/accuracy" in logged  # of two sides
    names |= dict(zip(("query", "document"), torch.randn(2, 8, 4), strict=True))
    exec(of_loss, names)
    assert torch.isfinite(names["loss"])


@pytest.mark.filterwarnings("ignore")
def test_the_usage_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning logs and saves here
    examples = printed("docs/usage.md")
    data, port, _, mask, recycle, composer = names = [{} for _ in examples]
    pictures = [(picture, 0) for picture in torch.randn(150, 8)]
    views = [([picture, picture + 0.1], label) for picture, label in pictures]
    port |= {"two_views": views, "images": pictures, "val_loader": [], "SimCLR": LabelledSimCLR}
    for code, namespace in zip(examples, names, strict=True):
        exec(code, namespace)
    trials = [
        (mask["training_step"], {"mask_nearest": 5, "composer": RWRComposer(ExactGraph())}),
        (recycle["training_step"], {"recycle": True, "composer": composer["sorted_by_first_dimension"]}),
    ]
    for training_step, options in trials:
        model = type("Model", (SimCLR,), {"training_step": training_step})()
        callback = BatchSamplerCallback(**options)
        trainer = Trainer(max_epochs=2, callbacks=callback, logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=data["Data"](batch_size=32))
        assert {"batch_sampler/hardness", "batch_sampler/false_negative_rate"} <= trainer.callback_metrics.keys()
    assert "batch_sampler/uniform_hardness" in port["trainer"].callback_metrics  # of composed epochs


def test_the_config_of_the_callback():
    (config,) = printed("docs/usage.md", "yaml")
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    (callback,) = parser.instantiate(parser.parse_string(config)).callbacks
    assert (callback.pool_size, callback.encode_every) == ("all", 4)
    assert callback.composer.restart_probability == 0.5
    assert repr(callback.composer.graph) == repr(NNDescentGraph(n_neighbors=5))


def test_the_hand_written_loop():
    names = {}
    for code in printed("docs/plain_pytorch.md"):
        exec(code, names)
    assert names["epoch"] == 2
    assert torch.isfinite(names["loss"])


def fit(model, data, callback):
    trainer = Trainer(
        max_epochs=2, callbacks=callback, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=data)
    return trainer


class OneView(SimCLR):
    """Trains on one view, and makes two of it."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), *batch[:, 0].tolist()]
        return super().training_step([batch, batch + 0.1 * torch.randn_like(batch)], batch_idx)


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_streams():
    names = [{}, {}]
    for code, namespace in zip([printed("docs/streams.md")[0], printed("docs/streams.md")[-1]], names, strict=True):
        exec(code, namespace)
    trainer = fit(SimCLR(), names[0]["data"], names[0]["callback"])
    assert trainer.global_step == 2 * 31
    assert "batch_sampler/walk_seconds" in trainer.callback_metrics
    assert len(names[1]["batch"]) == 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("library", ["webdataset", "litdata"])
def test_streams_of_other_libraries(library, workers, tmp_path):
    """Each instance comes once an epoch. Skipped where the library is not installed."""
    module = pytest.importorskip(library)
    (code,) = [code for code in printed("docs/streams.md") if library in code]
    exec(code, names := {})
    points = torch.randn(96, 8).numpy()
    if library == "webdataset":
        files = [str(tmp_path / f"{shard}.tar") for shard in range(4)]
        for shard, file in enumerate(files):
            with module.TarWriter(file) as writer:
                for i in range(24 * shard, 24 * shard + 24):
                    writer.write({"__key__": str(i), "x.npy": points[i]})
        data = names["WebData"](files, batch_size=8, num_workers=workers)
    else:
        writer = importlib.import_module("litdata.streaming.cache").Cache(str(tmp_path), chunk_size=24)
        for i, point in enumerate(points):
            writer[i] = {"x": point}
        writer.done()
        writer.merge()
        data = names["LitData"](str(tmp_path), batch_size=8, num_workers=workers)
    model = OneView()
    fit(model, data, BatchSamplerCallback(32, composer=RWRComposer(ExactGraph(5)), warmup_epochs=0))
    for epoch in (model.seen[:96], model.seen[96:]):
        assert sorted(epoch) == sorted(points[:, 0].tolist())
    assert model.seen[:96] != model.seen[96:]


def without_code(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_guarantees_name_tests_that_exist():
    tests = {path.name: set(re.findall(r"def (test_\w+)", path.read_text())) for path in ROOT.glob("tests/test_*.py")}
    named = re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 20
    for file, name in named:
        assert not file or file in tests, file
        assert not name or name in (tests[file] if file else set().union(*tests.values())), name


def choices():
    text = (ROOT / "docs/choosing.md").read_text()
    return dict(re.findall(r"### ([^\n]*)\n(?:(?!###).)*?```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", choices())
def test_what_to_write_for_each_kind_of_data(kind, tmp_path):
    names = {}
    exec(choices()[kind], names)
    of_data = {name: names[name] for name in ("train_groups", "reference_embeddings") if name in names}
    argument = 8
    if "make_reference" in names:
        embed = torch.nn.Module()
        embed.forward = lambda batch: (batch[0], batch[1])
        argument = tmp_path / "reference.npy"
        names["make_reference"](embed, Pairs(96), argument)
    elif "Data" in names:
        argument = torch.arange(96) // 2
    of_data["train_dataset"] = lambda self: torch.randn(96, 8) if kind.startswith("Sentences") else Pairs(96)
    if kind.startswith(("Unlabelled", "Labelled", "Graphs")):
        of_data["pool_dataset"] = lambda self: torch.randn(96, 8)
    of_data |= {"clicks": np.array([[f"query {i // 2}", f"document {i // 3}"] for i in range(96)])}
    of_data |= {"captions": [str(i // 3) for i in range(96)]}
    data = type("Data", (names.get("Data", BatchSamplerDataModule),), of_data)(argument)

    class Networks(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = self.query_tower = self.document_tower = torch.nn.Linear(8, 4)
            self.image_tower = self.text_tower = self.backbone
            self.projector = torch.nn.Linear(4, 4)
            self.log_temperature = torch.nn.Parameter(torch.tensor(-1.0))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    methods = {name: names[name] for name in ("embed", "training_step") if name in names}
    model = type("Model", (Networks,), methods)()
    trainer = Trainer(max_epochs=3, callbacks=names["callback"], logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    assert trainer.current_epoch == 3
    assert "batch_sampler/pool_size" in trainer.callback_metrics


@pytest.mark.parametrize("source", sorted(ROOT.glob("notebooks/*.py")), ids=lambda path: path.stem)
def test_a_notebook_is_its_source_and_what_came_out(source):
    jupytext = pytest.importorskip("jupytext")
    written = jupytext.read(source).cells
    cells = jupytext.read(source.with_suffix(".ipynb")).cells
    assert [cell.source for cell in cells] == [cell.source for cell in written], "run `make notebooks`"
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
