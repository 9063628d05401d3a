"""Stream: instances that can only be read in order -> batches composed from a buffer of them."""

import copy
import itertools
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bs_lightning._checks import check_instance_callable, check_integer, check_seed
from bs_lightning._embeddings import to_device
from bs_lightning._stream_reader import Reader
from bs_lightning._types import Order
from bs_lightning.layout import BatchLayout
from bs_lightning.loader import SETTINGS, BatchFetcher, BatchIterator, check_dataloader_kwargs, workers_generator
from bs_lightning.mask import pair_mask
from bs_lightning.permutation import permutation
from bs_lightning.plan import PlannedPool, PoolPlanner, check_planned, pool_seed
from bs_lightning.pools import Pools
from bs_lightning.stream_state import StreamPool, StreamReading, StreamState

_WORKERS = 2**40  # in place of a pool's first batch, for the seed of workers


class StreamLoader:
    """Reads pools from a stream into a buffer, and serves batches of each pool.

    A stream is an ``IterableDataset`` of single instances. The loader reads a pool of ``pool_size`` instances, shuffles
    it, plans its batches, and serves them. Then it reads the next pool. In one pass over the stream each instance is
    served once, except the fewer than ``batch_size`` at the end that ``drop_last`` drops. A pool is planned when its
    first batch is asked for, whatever the number of workers. Workers may read raw instances ahead, but no further than
    ``prefetch_factor`` allows.

    If the stream has ``set_epoch``, it is called before each pass, and workers start anew for each pass. If it has
    ``state_dict`` and ``load_state_dict``, and there are no workers, a pass can be resumed exactly.

    Args:
        stream: The stream. Several workers, or several processes, must not read the same instances: the stream shards
            itself, by ``torch.utils.data.get_worker_info()`` and by the process's rank.
        batch_size: Instances per batch and process, at least 2.
        pool_size: Instances per pool, over all processes. ``None`` is ten global batches.
        plan_pool: Arranges a pool into batches. It gets the pool's positions in ``buffer``, int64 ``[P]``, a seed and
            the epoch, and returns a :class:`~bs_lightning.PlannedPool`. ``None`` serves random batches of the pool. You
            may set the attribute between two passes.
        drop_last: ``False`` serves the last instances as a smaller batch, but for a single one, which has no negatives.
            Needs one process.
        seed: The same seed gives the same batches of the same stream.
        rank: This process's number.
        world_size: Number of processes. Each reads its own part of the stream, and composes batches from that part.
        **dataloader_kwargs: Arguments of :class:`torch.utils.data.DataLoader` that do not choose instances.
            ``num_workers`` and the like are for reading. ``collate_fn`` makes a batch in the main process.

    Raises:
        TypeError: If ``stream`` is not an ``IterableDataset``, ``plan_pool`` is not callable, or a number is not an
            integer.
        ValueError: If an argument is out of range, or chooses or reorders instances, or ``drop_last=False`` would leave
            a last batch of one instance.

    Example:
        >>> from torch.utils.data import IterableDataset
        >>> from bs_lightning import StreamLoader
        >>> class Numbers(IterableDataset):
        ...     def __iter__(self):
        ...         return iter(range(10))
        >>> loader = StreamLoader(Numbers(), batch_size=4, pool_size=8)
        >>> [len(batch) for batch in loader]
        [4, 4]
    """

    num_workers: int
    collate_fn: Callable[[list[Any]], Any] | None
    pin_memory: bool
    generator: torch.Generator | None
    persistent_workers: bool

    def __init__(
        self,
        stream: IterableDataset[Any],
        batch_size: int,
        *,
        pool_size: int | None = None,
        plan_pool: PoolPlanner | None = None,
        drop_last: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        **dataloader_kwargs: Any,
    ) -> None:
        check_dataloader_kwargs(dataloader_kwargs)
        if not isinstance(stream, IterableDataset):
            raise TypeError(f"stream must be a torch.utils.data.IterableDataset, got {type(stream).__name__}.")
        if plan_pool is not None:
            check_instance_callable("plan_pool", plan_pool, "a function of (indices, *, seed, epoch)")
        size = check_integer("batch_size", batch_size)
        check_integer("world_size", world_size, 1)
        self.layout = BatchLayout(size * world_size, size, world_size)  # of one global batch: the rest is not known
        self.rank = self.layout.check_rank(rank)
        if not drop_last and world_size > 1:
            raise ValueError(
                "drop_last=False serves the last instances of a stream as a smaller batch, whose size would differ "
                f"between {world_size} processes. Use drop_last=True."
            )
        self.pool_size = 10 * self.layout.global_batch_size if pool_size is None else pool_size
        Pools(self.pool_size).check(self.layout)
        self.stream = stream
        self.batch_size = size
        self.plan_pool = plan_pool
        self.drop_last = drop_last
        self.seed = check_seed(seed)
        self.epoch = 0
        checked = DataLoader(stream, size, **dataloader_kwargs)
        for name in SETTINGS:  # read when workers start: Lightning sets a `worker_init_fn` that is None
            setattr(self, name, getattr(checked, name))
        self._n_instances = self._shortest(stream)
        self._reader: Reader | None = None
        self._pass: Pass | None = None
        self._loaded: StreamState | None = None

    def __len__(self) -> int:
        if self._n_instances is None:
            raise TypeError(f"The length of {type(self.stream).__name__} is not known: it has no __len__.")
        return self._n_instances // self.batch_size if self.drop_last else -(-self._n_instances // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return BatchIterator(self._iterate())

    @property
    def buffer(self) -> "Buffer":
        """The pool's instances, as a map-style dataset by their position in the pool."""
        return Buffer() if self._pass is None else self._pass.buffer

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass serves.

        Args:
            epoch: The epoch's number. Seeds of pools depend on it, and the stream is told of it.

        Raises:
            TypeError: If ``epoch`` is not an integer.
            ValueError: If it is negative.
        """
        epoch = check_integer("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch = epoch
            self._loaded = None

    def likely_false_negatives(self, device: torch.device | None = None) -> Tensor | None:
        """Return which pairs of this process's batch are likely false negatives, by the planner.

        Args:
            device: The mask's device; ``None`` is the CPU.

        Returns:
            bool ``[b, b]`` for the batch that was served last, row ``i`` for the anchor ``i``, ``False`` on the
            diagonal. ``None`` before the first batch.
        """
        number = self._trained_batch_number()
        pool = None if self._pass is None or number is None else self._pass.pool_of(number)
        if pool is None or number is None:
            return None
        row = number - pool.start
        if row == len(pool.batches):  # the smaller batch at the end
            return torch.zeros(pool.n_last, pool.n_last, dtype=torch.bool, device=device)
        return to_device(pair_mask(pool.pairs, self.layout.slice(pool.batches[row], self.rank)), device)

    def state(self) -> StreamState:
        """Return the position within the pass."""
        if self._loaded is not None:
            return self._loaded
        run = self._pass if self._pass is not None and self._pass.epoch == self.epoch else None
        served = 0 if run is None else run.served
        pool = None if run is None or not served else run.pool_to_save(served)
        return StreamState(self.seed, self.layout.global_batch_size, self.epoch, served, pool)

    def state_dict(self) -> dict[str, Any]:
        """Return the position within the pass for a checkpoint.

        Returns:
            Tensors and plain Python values, about as large as a pool's indices, with the stream's own state.
        """
        return self.state().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass go on where a state was taken.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is damaged, or was taken within a pass with a different global batch size.
            TypeError: If a value of the state has a wrong type.
        """
        state = StreamState.from_dict(state_dict)
        self._loaded, self.seed, self.epoch = state, state.seed, state.epoch

    def close(self) -> None:
        """End persistent workers."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _begin(self) -> "Pass":
        """Begin a pass, and say how it is planned."""
        state, self._loaded = self._loaded, None
        start = 0 if state is None else state.served
        self._pass = Pass(
            self.epoch,
            start,
            stop=None if self._n_instances is None else self._n_instances // self.batch_size,
            pool_size=self.pool_size,
            plan_pool=self.plan_pool,
            restored=None if state is None or not start else self._readable(state),
        )
        return self._pass

    def _readable(self, state: StreamState) -> StreamPool | None:
        """Return the pool from which a pass can go on, or ``None`` with a warning if the pass must start anew."""
        state.check_same_batches(self.layout)
        pool = state.pool
        if pool is not None and self._is_stateful and len(pool.readings) == self.layout.world_size:
            reading = pool.readings[self.rank]
            if reading.state is not None:
                return pool
        if self.rank == 0:
            warnings.warn(
                f"Resuming after {state.served} batches of epoch {state.epoch}, but the position in the stream is not "
                "known: the stream starts anew, and instances repeat. To resume exactly, give a stream with state_dict "
                "and load_state_dict, num_workers=0, and as many processes as before.",
                stacklevel=2,
            )
        return None

    @property
    def _is_stateful(self) -> bool:
        """Whether the stream's position can be saved: with workers, their copies of the stream know it."""
        has = (callable(getattr(self.stream, name, None)) for name in ("state_dict", "load_state_dict"))
        return not self.num_workers and all(has)

    def _trained_batch_number(self) -> int | None:
        """Return the number of the batch that was served last in its pass, or ``None`` before the first batch."""
        run = self._pass
        return None if run is None or run.served <= run.start else run.served - 1

    def _iterate(self) -> Generator[Any]:
        # All this runs at the first `next`, not at `iter`: Lightning calls `iter` before it knows the epoch.
        run = self._begin()
        stream: Any = self.stream
        if run.restored is not None or (self._is_stateful and not run.together):
            # A state holds for this pass: the next one reads from the start. A look into the loader moves no position.
            stream = self._copied(stream)
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(run.epoch)
        if run.restored is not None and run.restored.readings[self.rank].before:
            stream.load_state_dict(copy.deepcopy(run.restored.readings[self.rank].state))
        reader, self._reader = self._reader, None  # a second pass meanwhile gets workers of its own
        if reader is None or stream is not self.stream:
            reader = Reader(stream, self.batch_size, self._reading_settings(run.epoch))
        settings = {"collate_fn": self.collate_fn, "pin_memory": self.pin_memory, "generator": torch.Generator()}
        load = BatchFetcher(run.buffer, **settings)
        try:
            number = run.start
            for pool in self._pools(run, stream, iter(reader)):
                run.pools = (*run.pools, pool)[-2:]
                batches = [self.layout.slice(batch, self.rank).tolist() for batch in pool.batches]
                if pool.n_last:
                    batches.append(list(range(len(run.buffer) - pool.n_last, len(run.buffer))))
                for batch in load(batches[number - pool.start :]):
                    run.served = number = number + 1
                    yield batch
            run.exhausted = True
            self._check_length(number, run)
        finally:
            run.ended = True
            kept = self.persistent_workers and not hasattr(stream, "set_epoch") and stream is self.stream
            if kept and self._reader is None:
                self._reader = reader
            else:
                reader.close()

    @staticmethod
    def _copied(stream: Any) -> Any:
        """Return a copy of a stream that has a state."""
        try:
            return copy.deepcopy(stream)
        except Exception as error:
            error.add_note(
                f"{type(stream).__name__} has a state, so it is read from a copy where it is resumed, or looked into "
                "while it is trained from. Let it hold what can be copied: no running iterator and no open file."
            )
            raise

    def _pools(self, run: "Pass", stream: Any, instances: Iterator[Any]) -> Iterator[StreamPool]:
        """Read and plan one pool after the other. When one is yielded, the buffer holds its instances."""
        restored = run.restored
        start = run.start if restored is None else restored.start
        read = 0 if restored is None else restored.readings[self.rank].before
        while True:
            wanted = self._n_wanted(start, run) if restored is None else restored.readings[self.rank].taken
            reading = self._read(run, stream, instances, wanted, read)
            readings = self._exchanged(reading) if run.together else [reading]
            if restored is None:
                n_batches = min(each.taken for each in readings) // self.batch_size
                # Fewer than wanted were left, so the stream is at its end, here or in a different process.
                n_last = 0 if self.drop_last else reading.taken - n_batches * self.batch_size
                if n_last == 1:
                    n_last = 0
                    warnings.warn(
                        "The stream's last batch would hold one instance, which has no negatives, so it is left out.",
                        stacklevel=2,
                    )
            else:
                was, now = [each.taken for each in restored.readings], [each.taken for each in readings]
                if was != now:
                    raise ValueError(
                        f"The stream is not that of the checkpoint: of its pool, the processes read {was} instances "
                        f"then, and {now} now. Resume with the same stream, or from a checkpoint between two epochs."
                    )
                n_batches, n_last = len(restored.batches), restored.n_last
            if not n_batches and not n_last:
                return
            order = permutation(reading.taken, pool_seed(self.seed, run.epoch, start), 0)[:]
            run.buffer.take(order[: n_batches * self.batch_size + n_last])
            kept = restored or self._plan(n_batches, start, run)
            yield StreamPool(run.epoch, start, kept.batches, kept.pairs, n_last, tuple(readings))
            read += reading.taken
            start += n_batches + (n_last > 0)
            restored = None

    def _n_wanted(self, start: int, run: "Pass") -> int:
        """Return how many instances to read for the pool that begins at batch ``start``."""
        pools = Pools(run.pool_size)
        if run.stop is None or run.stop <= start:
            return pools.n_batches(self.layout) * self.batch_size
        _, end = pools.next_pool(start, run.stop, self.layout)
        return (end - start) * self.batch_size

    def _read(self, run: "Pass", stream: Any, instances: Iterator[Any], wanted: int, before: int) -> StreamReading:
        """Read up to ``wanted`` instances into the buffer. An error is told to all processes, so that all stop."""
        try:
            state = None
            if self._is_stateful:  # at the start, it is enough to know so
                state = copy.deepcopy(_state(stream, before)) if before else {}
            first = list(itertools.islice(instances, 1))
            if first:  # at the stream's end the buffer keeps the last pool, or holds what is left over
                run.buffer.instances = first  # frees the pool before
                run.buffer.instances += itertools.islice(instances, wanted - 1)
        except Exception as error:  # whatever a user's stream raises
            if run.together:
                self._gather(StreamReading(before, 0, None, f"{type(error).__name__}: {error}"))
            raise
        return StreamReading(before, len(run.buffer) if first else 0, state)

    def _exchanged(self, reading: StreamReading) -> list[StreamReading]:
        """Return what all processes have read. Stop if one of them failed."""
        readings = self._gather(reading)
        for rank, each in enumerate(readings):
            if each.error is not None:
                raise RuntimeError(f"The process of rank {rank} failed to read the stream. {each.error}")
        return readings

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        values = [value] * self.layout.world_size
        if self.layout.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def _plan(self, n_batches: int, start: int, run: "Pass") -> PlannedPool:
        """Arrange a pool into the batches of all processes, side by side."""
        ranks, size = self.layout.world_size, self.batch_size
        n_positions = n_batches * size * ranks
        if run.plan_pool is None or not n_batches:
            uniform = np.arange(n_positions).reshape(ranks, n_batches, size).transpose(1, 0, 2)
            return PlannedPool(uniform.reshape(n_batches, ranks * size))
        seed = pool_seed(self.seed, run.epoch, start)
        returned = run.plan_pool(np.arange(n_positions), seed=seed, epoch=run.epoch)
        planned = check_planned(returned, n_positions, size * ranks)
        owner = planned.batches.reshape(n_batches, ranks, size) // (n_batches * size)
        if (owner != np.arange(ranks)[:, None]).any():
            raise ValueError("plan_pool must give each process only instances that the process has read.")
        return planned

    def _check_length(self, number: int, run: "Pass") -> None:
        """Say so if a pass ended too early."""
        if not number:
            raise ValueError(
                f"The stream ended within its first batch of batch_size={self.batch_size}, in one process at least. "
                "Lower batch_size, or check that each process has a part of the stream, and that iter() starts it anew."
            )
        if self._n_instances is not None and run.stop is not None and number < run.stop and self.rank == 0:
            warnings.warn(
                f"The stream ended after {number} batches, but its len() promised {run.stop}. len() must count the "
                "instances that one process reads.",
                stacklevel=2,
            )

    def _shortest(self, stream: IterableDataset[Any]) -> int | None:
        """Return the number of instances of the shortest part of the stream, or ``None`` if one part does not know."""
        try:
            length: int | None = len(stream)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            length = None
        lengths = self._gather(length)
        shortest = None if None in lengths else min(lengths)
        if shortest is not None and shortest < self.batch_size:
            raise ValueError(f"The stream has {shortest} instances, fewer than batch_size={self.batch_size}.")
        if shortest is not None and not self.drop_last and shortest % self.batch_size == 1:
            raise ValueError(
                f"drop_last=False would leave a last batch of one of the stream's {shortest} instances, which has no "
                "negatives. Use drop_last=True or a different batch_size."
            )
        return shortest

    def _reading_settings(self, epoch: int) -> dict[str, Any]:
        """Return the arguments of the ``DataLoader`` that reads."""
        ours = ("collate_fn", "pin_memory", "pin_memory_device", "persistent_workers", "generator")
        settings = {name: getattr(self, name) for name in SETTINGS if name not in ours}
        seed = pool_seed(self.seed, epoch, _WORKERS + self.rank)
        return settings | {"generator": workers_generator(self.generator, seed)}


@dataclass
class Pass:
    """One pass over a stream: how it is planned, and how far it was served.

    Args:
        epoch: The epoch's number.
        start: The number of the first batch to serve.
        stop: The number of the batch before which the pass ends; ``None`` if it is not known.
        pool_size: Instances per pool, over all processes.
        plan_pool: Arranges a pool into batches; ``None`` for random batches.
        restored: The pool to read again, from a checkpoint.
        together: Whether all processes make this pass.

    Attributes:
        served: The number of the batch that is served next.
        ended: Whether the pass has ended, or was left.
        exhausted: Whether all of its batches were fetched. The last one may still be trained.
        pools: The pool being served and the one before: Lightning may ask for a batch while the one before is trained.
        buffer: The instances of the pool being served.
    """

    epoch: int
    start: int
    stop: int | None
    pool_size: int
    plan_pool: PoolPlanner | None = None
    restored: StreamPool | None = None
    together: bool = True
    served: int = field(init=False)
    ended: bool = field(default=False, init=False)
    exhausted: bool = field(default=False, init=False)
    pools: tuple[StreamPool, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.served = self.start
        self.buffer = Buffer()

    def pool_of(self, number: int) -> StreamPool | None:
        """Return the pool that holds a batch, if it is one of the last two.

        Args:
            number: The batch's number in the pass.

        Returns:
            The pool or ``None``.
        """
        return next((pool for pool in self.pools if pool.holds(number)), None)

    def pool_to_save(self, served: int) -> StreamPool | None:
        """Return the pool of the next batch, or else of the last one, or else the one that could not be read again.

        Args:
            served: Number of the pass's batches that were served.

        Returns:
            The pool or ``None``.
        """
        return self.pool_of(served) or self.pool_of(served - 1) or self.restored


class Buffer(Dataset[Any]):
    """A pool's instances, by their position in the pool.

    With several processes a pool's positions count the instances of all processes, rank by rank. Each process holds its
    own instances.
    """

    def __init__(self) -> None:
        self.instances: list[Any] = []

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, position: int) -> Any:
        return self.instances[position % len(self.instances)]

    def take(self, positions: Order) -> None:
        """Keep the instances at these positions, in this order.

        Args:
            positions: Positions in the pool.
        """
        self.instances = [self.instances[position] for position in positions]

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffer, ()  # a copy in a worker needs no instances


def _state(stream: Any, read: int) -> Any:
    """Return a stream's own state after ``read`` instances."""
    if "num_samples_yielded" in signature(stream.state_dict).parameters:  # litdata's, which does not count itself
        return stream.state_dict(num_samples_yielded=read, num_workers=0, batch_size=1)
    return stream.state_dict()
