import ast
import inspect
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import assert_equal, rng_states
from processes import finish
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

from bs_lightning import BatchFetcher, PlannedPool, Planning, PoolBatchSampler, PoolLoader, Pools
from bs_lightning.loader import check_dataloader_kwargs

LOADERS = [
    {"num_workers": 0},
    {"num_workers": 2},
    {"num_workers": 2, "prefetch_factor": 8},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True},
]
loaders = pytest.mark.parametrize("kwargs", LOADERS, ids=["no workers", "workers", "prefetch", "persistent"])


class Seeds(Dataset):
    """Item ``i`` is ``i``, the worker's process number and its seed."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        info = get_worker_info()
        return index, -1 if info is None else info.id, torch.initial_seed()


class Fetches(Dataset):
    """Fetches whole batches and has no ``__getitem__``."""

    def __len__(self):
        return 96

    def __getitems__(self, indices):
        return [10 * index for index in indices]


def planner(indices, *, seed, epoch):
    return PlannedPool(np.random.default_rng([seed, epoch]).permutation(len(indices)).reshape(-1, 8))


def make(plan_pool=planner, dataset=None, rank=0, **kwargs):
    """12 batches of 8, planned in pools of 4 batches."""
    world = {"rank": rank, "world_size": rank + 1}
    size = 8 // world["world_size"]
    sampler = PoolBatchSampler(96, size, planning=Planning(plan_pool, Pools(32)), seed=1, **world)
    return PoolLoader(torch.arange(96) if dataset is None else dataset, sampler, **kwargs)


def lists(batches):
    return [batch.tolist() for batch in batches]


EPOCH = list(make().batch_sampler)


@loaders
def test_serves_the_sampler_and_plans_each_pool_when_its_first_batch_is_due(kwargs):
    served, at = [], []

    def plan_pool(indices, **pool):
        at.append(len(served))
        return planner(indices, **pool)

    loader = make(plan_pool, **kwargs)
    batches = iter(loader)
    assert at == []
    for batch in batches:
        served.append(batch.tolist())
        assert loader.batch_sampler.served == len(served)
    assert at == [0, 4, 8]
    assert served == EPOCH
    assert len(loader) == len(served)


def test_a_plain_loader_plans_ahead():
    """What PoolLoader is for."""
    served, at = [], []

    def plan_pool(indices, **pool):
        at.append(len(served))
        return planner(indices, **pool)

    sampler = make(plan_pool).batch_sampler
    for batch in DataLoader(torch.arange(96), batch_sampler=sampler, num_workers=2):
        served.append(batch.tolist())
    assert at == [0, 0, 4]
    assert served == EPOCH


@loaders
@pytest.mark.parametrize("stop", [2, 4])
def test_breaking_out_serves_a_whole_epoch_next(kwargs, stop):
    loader = make(**kwargs)
    for epoch in (0, 0, 1):
        loader.batch_sampler.set_epoch(epoch)
        for number, _ in enumerate(loader, 1):
            if number == stop:
                break
    loader.batch_sampler.set_epoch(0)
    assert lists(loader) == EPOCH


@loaders
@pytest.mark.parametrize("served", [2, 4, 12])
def test_state_is_where_training_is_not_where_workers_are(kwargs, served):
    loader = make(**kwargs)
    batches = iter(loader)
    for _ in range(served):
        next(batches)
    resumed = make(**kwargs)
    resumed.batch_sampler.load_state_dict(loader.batch_sampler.state_dict())
    assert lists(resumed) == EPOCH[served:]


@loaders
def test_draws_nothing_from_the_global_random_states(kwargs):
    before = rng_states()
    loader = make(**kwargs)
    lists(loader), lists(loader)
    assert_equal(rng_states(), before)


@pytest.mark.parametrize("kwargs", LOADERS[:3])
def test_draws_once_per_iteration_from_the_users_generator(kwargs):
    generator, alike = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    loader = make(generator=generator, **kwargs)
    for _ in range(2):
        lists(loader)
        torch.empty((), dtype=torch.int64).random_(generator=alike)
        assert torch.equal(generator.get_state(), alike.get_state())


def worker_seeds(loader):
    """The workers' seeds in one epoch."""
    batches = list(loader)
    assert {worker for batch in batches for worker in batch[1].tolist()} == {0, 1}
    seeds = {seed for batch in batches for seed in batch[2].tolist()}
    assert len(seeds) == 2
    return seeds


def test_workers_live_for_an_epoch_and_are_seeded_by_seed_epoch_and_rank():
    loader = make(dataset=Seeds(), num_workers=2)
    first = worker_seeds(loader)
    assert worker_seeds(make(dataset=Seeds(), num_workers=2)) == first
    assert not worker_seeds(make(dataset=Seeds(), num_workers=2, rank=1)) & first
    loader.batch_sampler.set_epoch(1)
    assert not worker_seeds(loader) & first
    assert not worker_seeds(make(dataset=Seeds(), num_workers=2, generator=torch.Generator())) & first


def test_persistent_workers_live_on():
    loader = make(dataset=Seeds(), num_workers=2, persistent_workers=True)
    first = worker_seeds(loader)
    loader.batch_sampler.set_epoch(1)
    assert worker_seeds(loader) == first


class Draws(Dataset):
    """Item ``i`` is a random number."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        return torch.rand(())


def test_persistent_workers_go_on_with_their_random_numbers():
    draws = []
    for _ in range(2):
        loader = make(dataset=Draws(), num_workers=1, persistent_workers=True)
        draws.append([lists(loader), lists(loader)])
        loader.close()
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


def add_100(worker_id):
    get_worker_info().dataset.add_(100)


def test_worker_init_fn_may_be_set_later():
    """As Lightning does."""
    loader = make(num_workers=1)
    loader.worker_init_fn = add_100
    assert lists(loader) == [[index + 100 for index in batch] for batch in EPOCH]


@pytest.mark.parametrize("start_method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_other_start_methods(start_method):
    assert lists(make(num_workers=1, multiprocessing_context=start_method)) == EPOCH


@loaders
def test_a_copy_taken_while_batches_are_loaded_serves_alone(kwargs):
    """Workers that are not forked get such a copy of whatever the dataset and ``collate_fn`` know."""
    loader = make(**kwargs)
    batches = iter(loader)
    begun = [next(batches).tolist() for _ in range(2)]
    loader.epoch_before, loader.batches = make(**kwargs), batches
    lists(loader.epoch_before)
    copied = pickle.loads(pickle.dumps(loader))
    assert lists(copied.batches) == []
    assert lists(copied) == lists(copied.epoch_before) == EPOCH
    assert begun + lists(batches) == EPOCH
    for each in (loader, loader.epoch_before, copied, copied.epoch_before):
        each.close()


def test_a_fetcher_is_copied_without_its_workers():
    load = BatchFetcher(torch.arange(96), num_workers=1, generator=torch.Generator().manual_seed(1))
    batches = load(batch for batch in [[1, 2], [3]])
    next(batches)
    copied = pickle.loads(pickle.dumps(load))
    assert lists(copied([[5], [6]])) == [[5], [6]]
    assert lists(batches) == [[3]]
    copied.close()
    load.close()


CHOSEN = [
    {},
    {
        "num_workers": 2,
        "collate_fn": tuple,
        "pin_memory": False,
        "timeout": 9,
        "worker_init_fn": print,
        "multiprocessing_context": torch.multiprocessing.get_context("spawn"),
        "generator": torch.Generator(),
        "prefetch_factor": 3,
        "persistent_workers": True,
        "in_order": True,
    },
]


@pytest.mark.parametrize("kwargs", CHOSEN, ids=["defaults", "chosen"])
def test_has_the_attributes_of_a_data_loader(kwargs):
    """Those of one that makes the same batches: not with ``batch_sampler=``, which has no ``batch_size``."""
    loader = make(**kwargs)
    torchs = DataLoader(loader.dataset, batch_size=8, drop_last=True, **kwargs)
    for name in inspect.signature(DataLoader).parameters.keys() - {"shuffle", "sampler", "batch_sampler"}:
        assert getattr(loader, name) is getattr(torchs, name), name
    assert type(loader.sampler) is type(torchs.sampler)
    assert loader.batch_sampler.batch_size == 8


def test_attributes_may_be_set_before_workers_start():
    loader = make()
    loader.num_workers, loader.prefetch_factor, loader.collate_fn = 1, 2, sum
    assert [int(total) for total in loader] == [sum(batch) for batch in EPOCH]


@pytest.mark.parametrize("kwargs", [{"num_workers": -1}, {"prefetch_factor": 2}, {"persistent_workers": True}], ids=str)
def test_refuses_at_once_what_a_data_loader_refuses(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        make(**kwargs)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_collate_fn_and_batched_fetching(num_workers):
    batches = list(make(dataset=Fetches(), collate_fn=tuple, num_workers=num_workers))
    assert batches == [tuple(10 * index for index in batch) for batch in EPOCH]


def test_uniform_batches():
    sampler = PoolBatchSampler(30, 8, drop_last=False)
    assert lists(PoolLoader(torch.arange(30), sampler, num_workers=2)) == list(sampler)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_loader_serves_call_after_call_with_the_same_workers(num_workers):
    load = BatchFetcher(Seeds(), num_workers=num_workers, generator=torch.Generator())
    seeds = set()
    for batches in ([[1, 2], [3]], [[5], [4], [6]], []):
        loaded = list(load(batches))
        assert [index.tolist() for index, _, _ in loaded] == batches
        seeds |= {int(seed) for _, _, each in loaded for seed in each}
    assert len(seeds) == max(num_workers, 1)
    next(load([[1], [2], [3]]))  # left before its end
    assert [index.tolist() for index, _, _ in load([[7]])] == [[7]]


ARGUMENTS = ["dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refuses_arguments_that_choose_indices(name):
    with pytest.raises(ValueError, match=f"^{name}=True is no argument for the data loader here\\. [LO]"):
        check_dataloader_kwargs({"num_workers": 1, name: True})
    if name not in ("dataset", "batch_sampler"):
        with pytest.raises(ValueError, match=f"^{name}=False is no argument"):
            make(**{name: False})


def test_refuses_arguments_that_do_not_exist():
    for make in (make_loader_with, lambda **kwargs: BatchFetcher(torch.arange(4), **kwargs)):
        with pytest.raises(TypeError, match="DataLoader has no argument num_worker=2"):
            make(num_worker=2)


def make_loader_with(**kwargs):
    return make(**kwargs)


def test_a_second_iteration_does_not_disturb_persistent_workers():
    loader = make(num_workers=1, persistent_workers=True)
    first = iter(loader)
    begun = [next(first)]
    assert lists(loader) == EPOCH
    assert [batch.tolist() for batch in begun + list(first)] == EPOCH
    loader.close()


def test_refuses_another_order():
    with pytest.raises(ValueError, match="in_order=False would train batches in a different order"):
        make(in_order=False)
    assert lists(make(in_order=True)) == EPOCH


class Stream(IterableDataset):
    def __len__(self):
        return 96

    def __iter__(self):
        return iter(range(96))


@pytest.mark.parametrize("dataset", [Stream(), Dataset(), iter([]), {1, 2}], ids=lambda dataset: type(dataset).__name__)
def test_refuses_data_without_indices(dataset):
    with pytest.raises(TypeError, match=f"dataset must be a map-style.*got {type(dataset).__name__}"):
        make(dataset=dataset)


@pytest.mark.parametrize("length", [39, 100])
def test_refuses_data_of_another_length_than_the_samplers(length):
    with pytest.raises(ValueError, match=f"dataset must hold the 40 instances that batch_sampler serves, got {length}"):
        PoolLoader(torch.arange(length), PoolBatchSampler(40, 4))


def test_refuses_another_sampler():
    with pytest.raises(TypeError, match="batch_sampler must be a PoolBatchSampler, got BatchSampler"):
        PoolLoader(torch.arange(40), BatchSampler(range(40), 4, drop_last=True))


ROOT = Path(__file__).parents[1]
NOTE = """
from pathlib import Path

sampler.set_epoch(7)
Path(f"rank{fabric.global_rank}.txt").write_text(repr((list(sampler), float(encoder[1].weight.sum()))))
del model
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_fabric_loop_on_two_processes(tmp_path):
    first, *_, last = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plain_pytorch.md").read_text(), flags=re.DOTALL)
    one, two = 'Fabric(accelerator="cpu", devices=1)', 'Fabric(accelerator="cpu", devices=2, strategy="ddp")'
    assert one in last
    (tmp_path / "loop.py").write_text(first + last.replace(one, two) + NOTE)
    done = finish([sys.executable, "loop.py"], cwd=tmp_path)
    assert done.returncode == 0, done.error[-4000:]
    batches, weights = zip(
        *(ast.literal_eval((tmp_path / f"rank{rank}.txt").read_text()) for rank in (0, 1)), strict=True
    )
    assert [len(batch) for rank in batches for batch in rank] == [64] * 15 * 2
    served = [index for rank in batches for batch in rank for index in batch]
    assert len(set(served)) == len(served)
    assert weights[0] == weights[1]
