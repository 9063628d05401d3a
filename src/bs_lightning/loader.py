"""Loader: a plan's batches -> collated batches of data, prefetched across a pool's end only where it may be."""

import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import bs_lightning._fork  # noqa: F401  workers are forked safely
from bs_lightning.sampler import PoolBatchSampler

Load = Callable[[Iterable[list[int]]], Iterator[Any]]

# Arguments that choose indices, torch's and our `pool_size`, and what to do instead.
_OURS = {
    "dataset": "Override train_dataset()",
    "batch_size": "Leave it out, or give it where the batches are planned",
    "shuffle": "Leave it out: the order is chosen already, in training a new random permutation every epoch",
    "sampler": "Leave it out: the order is chosen already",
    "batch_sampler": "Leave it out: the batches are chosen already",
    "drop_last": "Leave it out, or give it where the batches are planned",
    "pool_size": "Give it to BatchSamplerCallback, or to Pools",
}
# All other arguments of torch's `DataLoader`, such as `num_workers`.
SETTINGS = [name for name in inspect.signature(DataLoader).parameters if name not in _OURS]


class BatchFetcher:
    """Loads batches of dataset indices, with worker processes that it keeps from call to call.

    Args:
        dataset: A map-style dataset.
        **dataloader_kwargs: Arguments of :class:`torch.utils.data.DataLoader` that do not choose indices.

    Raises:
        TypeError: If ``DataLoader`` has no such argument.
        ValueError: If an argument chooses or reorders indices.

    Example:
        >>> import torch
        >>> from bs_lightning import BatchFetcher
        >>> load = BatchFetcher(torch.arange(10) * 10)
        >>> [batch.tolist() for batch in load([[1, 2], [5]])]
        [[10, 20], [50]]
    """

    def __init__(self, dataset: Dataset[Any], **dataloader_kwargs: Any) -> None:
        check_dataloader_kwargs(dataloader_kwargs)
        self._batches = _Batches()
        if dataloader_kwargs.get("num_workers", 0) > 0:
            dataloader_kwargs["persistent_workers"] = True
        self._kwargs = dataloader_kwargs
        self._loader = DataLoader(dataset, batch_sampler=self._batches, **dataloader_kwargs)

    def __call__(self, batches: Iterable[list[int]]) -> Iterator[Any]:
        """Load batches. Use up an iterator, or drop it, before the next call: all take from the same workers.

        Args:
            batches: Dataset indices of each batch.

        Returns:
            An iterator over the collated batches.
        """
        self._batches.current = batches
        return BatchIterator(iter(self._loader))

    def close(self) -> None:
        """End the workers.

        Without this call they end with the last reference. If the garbage collector finds that reference in a cycle,
        torch waits ten seconds for the workers in vain.
        """
        end_workers(self._loader)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy without the workers and the generator.

        torch sends the generator's state as a temporary tensor, which a spawned process cannot open.
        """
        kwargs = {name: value for name, value in self._kwargs.items() if name != "generator"}
        return functools.partial(BatchFetcher, **kwargs), (self._loader.dataset,)


class _Batches:
    """What a ``DataLoader`` takes for its batch sampler: whatever is current."""

    current: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.current)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Batches, ()  # `current` may be a generator, which cannot be copied


class BatchIterator(Iterator[Any]):
    """An iterator over another's values, of which a copy in a different process is at its end.

    Lightning, and the callback that reads ahead, hold the iterator while workers start. Under ``spawn`` and
    ``forkserver`` it is pickled with whatever knows the Trainer, as ``collate_fn=self.collate`` of a DataModule does.
    Neither a generator nor torch's own iterator can be pickled.
    """

    def __init__(self, values: Iterator[Any]) -> None:
        self._values = values

    def __next__(self) -> Any:
        return next(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return iter, ((),)


class PoolLoader:
    """A data loader that asks for each pool's plan when the pool's first batch is about to be trained.

    A plain ``DataLoader`` with workers asks its batch sampler for batches ahead of training. The more workers there
    are, the older are the weights with which a pool is planned. This loader loads pool by pool with one set of workers,
    and prefetches within a pool only, unless ``Planning(ahead=True)`` says that this changes nothing. Iterate it like a
    ``DataLoader``, and read the same attributes; call :meth:`set_epoch` before each iteration. ``batch_size`` and
    ``drop_last`` are the batch sampler's. It is not a subclass of ``DataLoader``: Lightning makes such loaders again,
    with a sampler of its own, and the plan would be lost.

    Workers live for one iteration, or until :meth:`close` with ``persistent_workers=True``. Nothing is drawn from the
    global random state. The workers' seeds come from the sampler's seed, or from ``generator``, one draw each time that
    workers start. Persistent workers keep their random states from one iteration to the next.

    Args:
        dataset: A map-style dataset.
        batch_sampler: Serves the plan.
        **dataloader_kwargs: Arguments of :class:`torch.utils.data.DataLoader` that do not choose indices:
            ``num_workers``, ``collate_fn``, ``pin_memory``, ``persistent_workers``, ``worker_init_fn`` and so on.

    Raises:
        ValueError: If ``dataloader_kwargs`` has an argument that chooses indices, ``in_order=False``, or a value that
            ``DataLoader`` refuses; or if the dataset has a different length than the sampler.
        TypeError: If the dataset is iterable-style, or ``batch_sampler`` is of a different kind.

    Example:
        >>> import torch
        >>> from bs_lightning import PoolBatchSampler, PoolLoader
        >>> loader = PoolLoader(torch.arange(8), PoolBatchSampler(8, batch_size=4))
        >>> [len(batch) for batch in loader]
        [4, 4]
        >>> loader.batch_size, loader.num_workers
        (4, 0)
    """

    num_workers: int
    collate_fn: Callable[[list[Any]], Any]
    pin_memory: bool
    timeout: float
    worker_init_fn: Callable[[int], None] | None
    multiprocessing_context: Any
    generator: torch.Generator | None
    prefetch_factor: int | None
    persistent_workers: bool
    pin_memory_device: str
    in_order: bool

    def __init__(self, dataset: Dataset[Any], batch_sampler: PoolBatchSampler, **dataloader_kwargs: Any) -> None:
        check_dataloader_kwargs(dataloader_kwargs)
        check_map_style(dataset, "dataset")
        if not isinstance(batch_sampler, PoolBatchSampler):
            raise TypeError(f"batch_sampler must be a PoolBatchSampler, got {type(batch_sampler).__name__}.")
        length, served = len(dataset), batch_sampler.layout.n_instances  # type: ignore[arg-type]
        if length != served:
            raise ValueError(
                f"dataset must hold the {served} instances that batch_sampler serves, got {length}. Give "
                "PoolBatchSampler(len(dataset), ...)."
            )
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        self.batch_size = batch_sampler.batch_size
        self.drop_last = batch_sampler.drop_last
        checked = DataLoader(dataset, batch_sampler=batch_sampler, **dataloader_kwargs)
        self.sampler = checked.sampler
        # Read when workers start, so that they may be set later: Lightning sets a `worker_init_fn` that is None, to
        # seed workers differently on every rank.
        for name in SETTINGS:
            setattr(self, name, getattr(checked, name))
        self._load: BatchFetcher | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        return BatchIterator(self._iterate())

    def _iterate(self) -> Generator[Any]:
        # All this runs at the first `next`, not at `iter`: Lightning calls `iter` before it knows the epoch.
        sampler = self.batch_sampler
        load, self._load = self._load, None  # a second iteration meanwhile gets workers of its own
        try:
            plan = sampler.plan()
            pools: Iterator[Iterable[list[int]]] = sampler.pools(plan)
            if plan.planning is not None and plan.planning.ahead:
                pools = _in_one(pools)  # workers ask for batches, and so plan pools, ahead of training
            for batches in pools:
                if load is None:
                    settings = {name: getattr(self, name) for name in SETTINGS}
                    generator = workers_generator(self.generator, sampler.worker_seed())
                    load = BatchFetcher(self.dataset, **settings | {"generator": generator})
                for batch in load(batches):
                    plan.served += 1
                    yield batch
        finally:
            if load is not None and self.persistent_workers and self._load is None:
                self._load = load
            elif load is not None:
                load.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration serves. The Trainer of Hugging Face calls it.

        Args:
            epoch: The epoch's number.
        """
        self.batch_sampler.set_epoch(epoch)

    def close(self) -> None:
        """End persistent workers."""
        if self._load is not None:
            self._load.close()
            self._load = None


def _in_one(pools: Iterator[Iterable[list[int]]]) -> Iterator[Iterable[list[int]]]:
    """Yield the batches of all pools as those of one. The first pool is planned before any worker starts."""
    for first in pools:
        yield itertools.chain(first, itertools.chain.from_iterable(pools))


def workers_generator(given: torch.Generator | None, seed: int) -> torch.Generator:
    """Return the source of the workers' seeds: from one draw of the given generator, or else from ``seed``.

    Args:
        given: The user's generator, if there is one.
        seed: A seed.

    Returns:
        A new generator.
    """
    if given is not None:
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=given))
    return torch.Generator().manual_seed(seed)


def end_workers(loader: DataLoader[Any]) -> None:
    """End the workers that a data loader keeps.

    Args:
        loader: The data loader.
    """
    workers, loader._iterator = loader._iterator, None
    if workers is not None:
        workers._shutdown_workers()  # type: ignore[attr-defined]


def check_dataloader_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse ``DataLoader`` arguments that choose or reorder indices, or do not exist.

    Args:
        kwargs: Arguments for :class:`torch.utils.data.DataLoader` by name.

    Raises:
        TypeError: Naming the argument that does not exist.
        ValueError: Naming the argument and what to do instead.
    """
    for name, value in kwargs.items():
        if name in _OURS and value is not None:  # LightningCLI gives the default of each
            raise ValueError(f"{name}={value!r} is no argument for the data loader here. {_OURS[name]}.")
        if name not in SETTINGS and name not in _OURS:
            raise TypeError(f"torch's DataLoader has no argument {name}={value!r}.")
    if kwargs.get("in_order") is False:
        raise ValueError("in_order=False would train batches in a different order than planned. Leave it True.")


def check_map_style(dataset: object, name: str) -> None:
    """Refuse datasets that cannot be indexed.

    Args:
        dataset: The dataset.
        name: Where the dataset came from, for the message.

    Raises:
        TypeError: If the dataset is not map-style. The message names where it came from.
    """
    # The names of columns, or of the splits of a DatasetDict.
    names = list(itertools.islice(dataset, 5)) if isinstance(dataset, dict) and 0 not in dataset else []
    if (
        names
        or isinstance(dataset, IterableDataset)
        or not (hasattr(dataset, "__len__") and (hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")))
    ):
        if names:
            advice = f"Its items have names: {', '.join(map(repr, names))}. Give one of them, or a list of instances."
        elif isinstance(dataset, DataLoader):
            advice = "Give the loader's dataset."
        elif dataset is None:
            advice = "Is a return statement missing?"
        elif isinstance(dataset, nn.Module):
            advice = "That is a model: are the arguments swapped?"
        else:
            advice = "Batches are chosen by index, which data that can only be iterated do not have."
        raise TypeError(
            f"{name} must be a map-style dataset with __len__ and __getitem__, got {type(dataset).__name__}. {advice}"
        )
