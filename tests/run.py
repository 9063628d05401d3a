"""A training run in processes of its own, as a user starts it: ``python run.py FOLDER '{"strategy": "ddp", ...}'``.

It goes on from ``FOLDER/last.ckpt`` if that is there. Each rank notes its batches in ``FOLDER/rank0.txt`` and so on, a
line ``step:[indices]`` each, and what it saw in ``FOLDER/rank0.json`` when training is done. ``FOLDER/rank0.batches``
has a line ``[epoch, number of the batch, [indices]]`` for each batch.

With several pairs of a folder and settings, one process runs them one after the other.
"""

import faulthandler
import hashlib
import json
import os
import pickle
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from parts import Data, Model, Points, TooFewRows, fit, pool_order, walker
from stream_parts import StreamData

from bs_lightning import ExactGraph, NNDescentGraph, RWRComposer, _nndescent, graphs
from bs_lightning.baselines import uniform_batches
from bs_lightning.rules import AbovePositive


class LooksAlone(Callback):
    """Rank 0 alone iterates a training loader of its own, as to evaluate nearest neighbours."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.is_global_zero:
            for _ in trainer.datamodule.train_dataloader():
                pass


class Writes(Callback):
    """Writes what a rank has seen, in the process that has seen it."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, module):
        weights = [p.full_tensor() if module.sharded else p for p in module.parameters()]
        optimizer = trainer.optimizers[0].state_dict()["state"]
        states = [module.state_dict(), optimizer, random.getstate(), np.random.get_state(), torch.get_rng_state()]
        seen = {
            "epochs": module.epochs,
            "encoded": module.encoded,
            "masks": module.masks,
            "shared": module.walk.shared,
            "cores": NotesCores.cores,
            "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
            "weights": float(sum(p.sum() for p in weights)),
            "digest": None if module.sharded else hashlib.sha256(pickle.dumps(as_lists(states))).hexdigest(),
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))

    def on_exception(self, trainer, module, exception):
        # Not read from the error output: Lightning may kill rank 0 before Python writes there, once rank 1 has ended.
        words = f"{type(exception).__name__}: {exception}"
        (self.folder / f"rank{trainer.global_rank}.error").write_text(words)


def as_lists(value):
    if isinstance(value, dict):
        return [[key, as_lists(each)] for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [as_lists(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def no_graph(embeddings, batch_size, *, seed, epoch, per_rank=False):
    """Fails on one rank: on the only one that composes, or else on rank 1."""
    if per_rank and torch.distributed.get_rank() == 0:
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)
    raise ValueError("no graph")


class Kill:
    """Kills its process at a chosen arrival at a chosen place, and leaves the file ``FOLDER/killed``."""

    def __init__(self, folder, place=None, arrivals=0, rank=0):
        self.folder, self.place, self.left, self.rank = folder, place, arrivals, rank

    def is_due(self, place, rank):
        if (place, rank) != (self.place, self.rank):
            return False
        self.left -= 1
        return self.left == 0

    def arrive(self, place, rank):
        if self.is_due(place, rank):
            self.now()

    def now(self):
        (self.folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, file, data):
        """Writes a checkpoint as fsspec does, or only its first half."""
        if not self.is_due("save", 0):  # only rank 0 saves
            return file.f.write(data)
        file.f.write(data[: len(data) // 2])
        file.f.flush()
        self.now()


class NotesCores(ExactGraph):
    """Notes how many cores a graph may use when it is built."""

    cores: ClassVar = []

    def part(self, *args, **kwargs):
        self.cores.append(_nndescent._cores_of_process.get())
        return super().part(*args, **kwargs)


class Walk(RWRComposer):
    """Notes which graphs the processes built together. May kill its process in the middle of a call."""

    def __init__(self, graph, lacks_neighbors, **settings):
        super().__init__(graph, **settings)
        self.lacks_neighbors = lacks_neighbors
        self.shared = []

    def __call__(self, embeddings, batch_size, *, seed, epoch, neighbors=None):
        self.shared.append(neighbors is not None)
        if neighbors is not None and not self.lacks_neighbors:
            exact = ExactGraph(self.graph.n_neighbors)(embeddings, seed=seed)
            if isinstance(self.graph, NNDescentGraph):
                same = [len(set(row) & set(true)) for row, true in zip(neighbors, exact, strict=True)]
                assert sum(same) >= 0.9 * exact.size
            else:
                assert np.array_equal(neighbors, exact)
        batches = super().__call__(embeddings, batch_size, seed=seed, epoch=epoch, neighbors=neighbors)
        self.kill.arrive("compose", int(os.environ.get("LOCAL_RANK", 0)))
        return batches


class GroupedData(Data):
    """Three instances in a row are a group."""

    def train_groups(self):
        return np.arange(self.n) // 3


class ValidatedData(Data):
    def val_dataloader(self):
        return torch.utils.data.DataLoader(Points(12), 4)


class OrderedByRank(Data):
    """Its instances stand in a different order on each rank."""

    def train_labels(self):
        return np.roll(np.arange(self.n), int(os.environ.get("LOCAL_RANK", 0)))


class Run(Model):
    """Without randomness of its own; may be slow on one rank, fail, or kill its process in mid-training."""

    def __init__(self, folder, slow_rank, kill_at, sharded, fail):
        super().__init__()
        self.folder, self.fail, self.encoded, self.masks = folder, fail, [], None
        self.width, self.two_sides = 4, False
        self.slow_rank, self.kill_at, self.sharded = slow_rank, kill_at, sharded
        self.kill = Kill(folder)

    def embed(self, batch):
        if self.fail == "encode" and self.global_rank == 1:
            raise ValueError("no embedding on rank 1")
        self.kill.arrive("encode", self.global_rank)
        self.encoded.append(len(batch[0]))
        embeddings = self.encoder(batch[1])[:, : self.width]
        return (embeddings, embeddings.roll(1, dims=1)) if self.two_sides else embeddings

    def configure_model(self):
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.global_rank == self.slow_rank:
            time.sleep(0.05)
        self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
        with (self.folder / f"rank{self.global_rank}.txt").open("a") as file:
            file.write(f"{self.global_step}:{batch[0].tolist()}\n")
        with (self.folder / f"rank{self.global_rank}.batches").open("a") as file:
            file.write(f"{[self.current_epoch, batch_idx, batch[0].tolist()]}\n")
        if self.masks is not None:
            self.masks.append(self.trainer.datamodule.likely_false_negatives().nonzero().tolist())
        z = torch.nn.functional.normalize(self.encoder(batch[1]), dim=1)
        loss = torch.nn.functional.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))
        return {"loss": loss, "embeddings": z[:, : self.width]}

    def on_after_backward(self):
        self.kill.arrive("step", self.global_rank)

    def validation_step(self, batch, batch_idx):
        self.kill.arrive("validation", self.global_rank)


class NoEvalMode(Run):
    """Fails on rank 1 before the ranks exchange buffers, to embed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("statistics", torch.zeros(1))

    def train(self, mode=True):
        if not mode and self.global_rank == 1:
            raise ValueError("no eval mode on rank 1")
        return super().train(mode)


def main(folder, batch_size=4, n=203, pool_size=40, warmup_epochs=0, per_rank=False, recycle=False, refresh_every=None,
         encode_every=None, composer="walk", kill_at=None, slow_rank=None, fail=None, loader=None, save_every=None,
         drop_last=True, sharded=False, mask_nearest=None, differs=None, checkpoint=None, kill=None, validate=False,
         groups=False, two_sides=False, target_loss=None, stream=None, looks_alone=False, **trainer):  # fmt: skip
    seed_everything(0)
    rank = int(os.environ.get("LOCAL_RANK", 0))  # Lightning sets it in the processes that it starts
    n += 8 * rank * (differs == "n")
    # A kept graph may lead to the instances that the epoch drops.
    lacks_neighbors = bool(encode_every) and n % (batch_size * trainer["devices"]) > 0
    graph = NNDescentGraph(5) if composer == "descent" else NotesCores(5)
    NotesCores.cores.clear()
    walk = Walk(graph, lacks_neighbors, replacement=bool(refresh_every))
    if composer == "descent":
        graphs._SMALL_POOL = 1  # pynndescent builds the graphs
    how = {"per_rank": per_rank, "recycle": recycle, "refresh_every": refresh_every, "encode_every": encode_every}
    how |= {"mask_nearest": mask_nearest, "target_loss": target_loss}
    how["own_rule"] = AbovePositive() if two_sides else None
    callbacks = [Writes(folder), *([LooksAlone()] if looks_alone else [])]
    if composer != "none":
        used = {"walk": walk, "descent": walk, "pool order": pool_order, "uniform": uniform_batches}[composer]
        if differs == "composer" and rank == 1:
            used = pool_order
        if fail == "kept graph":
            walk.graph = TooFewRows(5)
        if fail == "graph":
            used = partial(no_graph, per_rank=per_rank)
        callbacks.append(walker(pool_size, composer=used, warmup_epochs=warmup_epochs, **how))
    last = folder / "last.ckpt"
    if save_every:
        checkpoint = {"every_n_train_steps": save_every}
    if checkpoint:
        callbacks.append(ModelCheckpoint(folder, save_last=True, **checkpoint))
    if sharded:
        trainer["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    model = (NoEvalMode if fail == "eval mode" else Run)(folder, slow_rank, kill_at, sharded, fail)
    model.masks = [] if mask_nearest or groups else None
    model.two_sides = two_sides
    model.walk = walk
    walk.kill = model.kill = Kill(folder, **kill or {})
    if rank == 0:
        LocalFileOpener.write = lambda file, data: model.kill.write(file, data)
    model.width = 4 - rank * (differs in ("width", "recycled width"))
    seed = rank if differs == "seed" else None
    if differs == "recycled num_workers":
        loader = {"num_workers": rank}
    make = GroupedData if groups else ValidatedData if validate else StreamData if stream else Data
    make = OrderedByRank if differs == "labels" else make
    fit(
        model,
        make(batch_size, n, drop_last=drop_last, seed=seed, separate_groups=groups, **loader or {}, **stream or {}),
        *callbacks,
        ckpt_path=last if last.exists() else None,
        enable_checkpointing=bool(checkpoint),
        default_root_dir=folder,
        **trainer,
    )


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # to ask a process that hangs where it is
    for folder, settings in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(Path(folder), **json.loads(settings))
    if torch.distributed.is_initialized():
        # Lightning does so for NCCL only. Without it gloo's threads may abort a process as Python exits, and so may
        # those of a process that leaves while the other is still there.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
