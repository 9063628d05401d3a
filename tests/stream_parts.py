"""Streams that the tests read: with and without a length and a state, sharded over processes and workers."""

import os
from typing import Any

import torch
from parts import Points
from torch.utils.data import IterableDataset, get_worker_info

from bs_lightning import BatchSamplerDataModule


class Stream(IterableDataset[Any]):
    """Yields ``(i, point i)``, in another order each epoch if ``shuffles``. Each worker reads every n-th instance."""

    def __init__(self, n: int = 100, start: int = 0, shuffles: bool = False) -> None:
        self.points = Points(start + n)
        self.order = list(range(start, start + n))
        self.epoch, self.shuffles = 0, shuffles

    def __iter__(self) -> Any:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(self.begin() + first, len(self.order), every):
            yield self.item(number)

    def begin(self) -> int:
        return 0

    def item(self, number: int) -> Any:
        order = self.order
        if self.shuffles:
            generator = torch.Generator().manual_seed(self.epoch)
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        return self.points[order[number]]


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.order)


class Shuffled(Stream):
    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.shuffles = epoch, True


class Stateful(Shuffled):
    """Knows how many instances it has yielded, as torchdata's and Hugging Face's streams do."""

    n_yielded = 0
    loaded = False

    def begin(self) -> int:
        self.n_yielded = self.n_yielded if self.loaded else 0
        self.loaded = False
        return self.n_yielded

    def item(self, number: int) -> Any:
        self.n_yielded = number + 1
        return super().item(number)

    def state_dict(self) -> dict[str, Any]:
        return {"n_yielded": self.n_yielded, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["epoch"] == self.epoch
        self.n_yielded, self.loaded = state["n_yielded"], True


class SizedStateful(Stateful, Sized):
    pass


class Broken(Stream):
    """Fails on rank 1."""

    def item(self, number: int) -> Any:
        if number == 20 and os.environ.get("LOCAL_RANK") == "1":
            raise OSError("no shard")
        return super().item(number)


STREAMS = {kind.__name__: kind for kind in (Stream, Sized, Shuffled, Stateful, SizedStateful, Broken)}


class StreamData(BatchSamplerDataModule):
    """Rank 0 reads ``n`` instances, and rank 1 the next ``n + more``."""

    def __init__(self, batch_size: int = 8, n: int = 100, kind: str = "Stream", more: int = 0, **kwargs: Any) -> None:
        super().__init__(batch_size, **kwargs)
        self.n, self.kind, self.more = n, kind, more

    def train_dataset(self) -> Stream:
        rank = int(os.environ.get("LOCAL_RANK", 0))  # Lightning sets it in the processes that it starts
        return STREAMS[self.kind](self.n + rank * self.more, start=rank * self.n)
