"""A module that encodes under `no_trace` is afterwards, bit for bit, what it was."""

import copy
import random
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from parts import Data, Model, assert_equal, fit, pool_order, walker
from torch import nn
from torchmetrics import CatMetric

from bs_lightning.isolation import isolated_rng, no_trace

DATA = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * 3


class Encoder(nn.Module):
    """Everything that an encoder's forward pass may change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4)).eval()
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("assigned", torch.zeros(3))
        self.register_buffer("shared", self.queue)

    def forward(self, x):
        random.random(), np.random.rand(), torch.rand(1)
        self.queue += 1
        self.assigned = self.assigned + 1
        self.norm.train()
        return self.frozen(self.norm(x))


def everything(module):
    """Modes, buffers by value and by identity, and random states."""
    modes = [part.training for part in module.modules()]
    values = {name: value.tolist() for name, value in module.state_dict().items()}
    identities = [id(buffer) for buffer in module.buffers()]
    numpy_state = np.random.get_state()
    states = random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()
    return modes, values, identities, states


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_leaves_everything_as_it_was(error):
    module = Encoder()
    before = everything(module)

    def inside():
        with no_trace(module):
            assert not any(part.training for part in module.modules())
            module(DATA)
            assert module.queue.sum() > 0
            assert module.norm.running_mean.any()
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        inside()
    assert everything(module) == before
    assert module.shared is module.queue


@pytest.mark.parametrize("names", [("whole", "head"), ("head", "whole")])
def test_arrays_that_begin_at_one_address(names):
    array = np.zeros(8, dtype=np.float32)
    tensors = {"whole": torch.from_numpy(array), "head": torch.from_numpy(array[:2])}
    module = torch.nn.Linear(1, 1)
    for name in names:
        setattr(module, name, tensors[name])
    with no_trace(module):
        module.whole += 1
    assert not array.any()


def test_buffers_that_cannot_be_written_to():
    module = torch.nn.BatchNorm1d(3)
    module.register_buffer("view", torch.ones(1).expand(4))
    with torch.inference_mode():
        module.register_buffer("inferred", torch.ones(2))
    with no_trace(module):
        module.running_mean += 1
    assert module.running_mean.tolist() == [0, 0, 0]


def test_a_list_of_a_metric_is_as_long_as_before():
    module = nn.Module()
    module.seen = CatMetric()
    module.seen.update(1.0)
    with no_trace(module):
        module.seen.update(2.0)
    assert len(module.seen.value) == 1


def test_parameters_keep_their_order():
    module = nn.Linear(2, 2)
    with no_trace(module):
        weight = module.weight
        del module.weight
        module.weight = weight
        assert list(module.state_dict()) == ["bias", "weight"]
    assert list(module.state_dict()) == ["weight", "bias"]


def test_buffers_filled_within_are_empty_again():
    module = nn.Module()
    module.register_buffer("mask", None)
    with no_trace(module):
        module.mask = torch.ones(2)
    assert module.mask is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_isolated_rng_restores_random_states(error):
    @isolated_rng()
    def inside():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        raise error

    before = everything(nn.Module())
    with pytest.raises(error):
        inside()
    assert everything(nn.Module()) == before


def test_random_states_are_restored_without_starting_cuda(monkeypatch):
    """A run on a CPU must not take memory of a GPU, and forked workers could not use CUDA afterwards."""

    def start():
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", start)
    with no_trace(nn.Linear(2, 2)), isolated_rng():
        pass


def test_random_states_of_the_modules_gpu_are_restored(monkeypatch):
    class OnSecondGPU(nn.Module):
        def parameters(self, recurse=True):
            yield SimpleNamespace(device=torch.device("cuda:1"))

    forked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(set(devices)) or nullcontext())
    with no_trace(OnSecondGPU()):
        assert forked == [{1}]


# Weights


class LoRALinear(nn.Linear):
    """Merges a product of two small matrices into its weight for eval mode, as microsoft/LoRA's layers do."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in) * 0.1), nn.Parameter(torch.randn(n_out, 2) * 0.1)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.b @ self.a
        return F.linear(x, weight, self.bias)


class LoRA(Model):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Sequential(LoRALinear(8, 16), nn.ReLU()), nn.Linear(16, 4))


class MoCo(Model):
    """Moves its key encoder and its queue in ``forward``."""

    def __init__(self):
        super().__init__()
        self.key = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.randn(32, 4))
        self.register_buffer("end", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def move(self, batch):
        for query, key in zip(self.encoder.parameters(), self.key.parameters(), strict=True):
            key.mul_(0.9).add_(query, alpha=0.1)
        self.queue[self.end : self.end + 8] = F.normalize(self.key(batch[1]), dim=1)[:8]
        self.end.copy_((self.end + 8) % 32)

    def forward(self, batch):
        self.move(batch)
        return self.encoder(batch[1])

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self(batch) @ self.queue.T.clone()).pow(2).mean()


class MovesLate(MoCo):
    """Moves its key encoder from the third pool on."""

    encodes = 0

    def move(self, batch):
        if self.training or MovesLate.encodes >= 3:
            super().move(batch)


@pytest.mark.parametrize("make", [LoRA, MoCo, MovesLate])
def test_training_is_the_same_with_and_without_encoding(make):
    pools = []

    def composer(embeddings, batch_size, *, seed, epoch):
        pools.append(len(embeddings))
        MovesLate.encodes += 1
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    def run(*callbacks):
        seed_everything(3, verbose=False)
        model = make()
        fit(model, Data(8, 96, seed=1), *callbacks, max_epochs=2)
        return dict(model.state_dict())

    assert_equal(run(walker(composer=composer)), run())
    assert len(pools) == 6


class Holds(nn.Module):
    """Calls a function in ``forward``, and holds tensors of many kinds and in many places."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.layer = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layer.weight
        self.rnn = nn.LSTM(3, 3)
        self.odd = nn.Parameter(torch.tensor([0.0, 1.0, float("inf")]))
        self.register_buffer("truth", torch.tensor([True, False, True]))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("nothing", torch.ones(0))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("graph", torch.eye(3).to_sparse_csr())
        self.register_buffer("quantised", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(3))
        self.plain = torch.ones(3)
        self.hidden = [nn.BatchNorm1d(3)]
        self.nested = {0: (torch.ones(3), deque([torch.ones(3)])), "0": (torch.ones(3), set())}
        self.strided = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        self.meta = nn.Linear(3, 3, device="meta")
        self.me = (self,)

    def forward(self, x):
        self.write(self)
        return x * 2


def tensors(module):
    weights = {name: each for name, each in module.named_parameters(remove_duplicate=False) if not each.is_meta}
    return {
        **weights,
        **dict(module.named_buffers()),
        **{f"hidden.{name}": value for name, value in module.hidden[0].state_dict(keep_vars=True).items()},
        "plain": module.plain,
        "int": module.nested[0][0],
        "deque": module.nested[0][1][0],
        "str": module.nested["0"][0],
    }


def bits(tensor):
    if tensor.layout != torch.strided:
        return tensor.to_dense().tolist()
    return bytes(tensor.detach().clone().contiguous().untyped_storage())


def state(module):
    """All that must stay: which tensors there are, where they are, what is in them, and what is trained."""
    return {
        name: (id(value), bits(value), value.shape, value.dtype, value.requires_grad, id(value.grad))
        for name, value in tensors(module).items()
    }


def assign_weight(module):
    module.layer.weight = nn.Parameter(module.layer.weight * 2)


def assign_data(module):
    module.layer.weight.data = module.layer.weight.data.double() * 2


def make_it_a_plain_tensor(module):
    weight = module.layer.weight
    del module.layer.weight
    module.layer.weight = weight * 2


def write_an_lstm(module):
    module.rnn.weight_hh_l0 = nn.Parameter(module.rnn.weight_hh_l0 * 2)


def write_a_zeros_sign(module):
    module.odd.data[0] = -0.0


def swap_layers(module):
    module.layer, module.tied = module.tied, nn.Linear(3, 3)


def make_a_layer(module):
    module.late = nn.Linear(3, 3)
    module.layer.register_parameter("scale", nn.Parameter(torch.ones(3)))
    module.layer.register_buffer("count", torch.ones(3))


def write_hidden(module):
    module.hidden[0].weight.data.mul_(2)
    module.hidden[0].running_mean = torch.ones(3)
    module.hidden[0].num_batches_tracked += 1


def write_nested(module):
    for value in (module.nested[0][0], module.nested[0][1][0], module.nested["0"][0], module.plain):
        value.mul_(2)


def write_buffers(module):
    module.truth.logical_not_()
    module.expanded.data = torch.zeros(4)
    module.quantised.copy_(torch.zeros(3))
    module.plain.resize_(7).zero_()


def freeze(module):
    module.requires_grad_(False)
    module.plain.requires_grad_()


@torch.enable_grad()
def accumulate(module):
    module.layer(torch.ones(3)).sum().backward()


@torch.enable_grad()
def write_with_a_graph(module):
    module.plain.mul_(module.layer.weight.sum())


WRITES = [
    lambda module: module.layer.weight.mul_(2),
    lambda module: module.layer.weight.data.mul_(2),
    lambda module: module.tied.weight.data.mul_(2),
    lambda module: module.layer.weight.detach().numpy().fill(2),
    assign_weight,
    assign_data,
    make_it_a_plain_tensor,
    write_an_lstm,
    write_a_zeros_sign,
    swap_layers,
    make_a_layer,
    write_hidden,
    write_nested,
    write_buffers,
    freeze,
    accumulate,
    write_with_a_graph,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_tensors_are_bit_equal(write, error):
    module = Holds(write)
    before, output = state(module), module.rnn(torch.ones(2, 3))[0]
    names = list(module.state_dict())

    def inside():
        with no_trace(module), torch.no_grad():
            module(DATA)
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        inside()
    assert state(module) == before
    assert sorted(module.state_dict()) == sorted(names)
    assert torch.equal(module.rnn(torch.ones(2, 3))[0], output)


def test_the_writes_of_these_tests_are_writes():
    for write in WRITES:
        module = Holds(write)
        before = state(module), sorted(module.state_dict())
        with torch.no_grad():
            module(DATA)
        assert (state(module), sorted(module.state_dict())) != before, write


def test_weights_that_begin_to_change_at_the_third_pool():
    calls = []

    def write(module):
        calls.append(len(calls))
        if len(calls) >= 3:
            module.layer.weight.data.mul_(2)

    module = Holds(write)
    before = state(module)
    for _ in range(4):
        with no_trace(module), torch.no_grad():
            module(DATA)
        assert state(module) == before


def test_a_graph_that_was_built_before_can_be_differentiated_after():
    module = Holds(lambda module: module.layer.weight.data.mul_(2))
    loss = module.layer(module.layer(torch.ones(3))).sum()
    with no_trace(module), torch.no_grad():
        module(DATA)
    loss.backward()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_that_is_not_written_to_may_be_read_only(tmp_path):
    """A write to it would end the process."""
    np.zeros(1000).tofile(tmp_path / "table")
    module = nn.Module()
    module.register_buffer("table", torch.from_numpy(np.memmap(tmp_path / "table", np.float64, "r")))
    with no_trace(module):
        assert not module.table.any()


class Journal(nn.Module):
    """Notes in a list, which is no tensor, that its weight is merged."""

    def __init__(self, *parts):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))
        self.parts = nn.ModuleList(parts)
        self.merged = []

    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.merged:
            self.weight.data += 0.7
            self.merged.append("adapter")
        elif mode and self.merged:
            self.weight.data -= 0.7
            self.merged.remove("adapter")
        return self


def test_modes_are_put_back_by_the_modules_own_train():
    """Of a part that has been in eval mode before, too, in a part that has not, and the other way round."""
    module = nn.Sequential(Journal(Journal(), Journal(Journal())), Journal())
    module[0].parts[1].eval()
    module[0].parts[1].parts[0].train()
    journals = [part for part in module.modules() if isinstance(part, Journal)]

    def modes():
        return [(part.training, part.weight.item(), list(part.merged)) for part in journals]

    before = modes()
    with no_trace(module):
        assert all(part.merged for part in journals)
    assert modes() == before
    assert [len(part.merged) for part in journals] == [0, 0, 1, 0, 0]


def test_a_train_that_fails_leaves_the_weights_as_they_were():
    class Fails(nn.Linear):
        def train(self, mode=True):
            self.weight.data.add_(1)
            if mode:
                raise ValueError("no way back")
            return super().train(mode)

    module = Fails(2, 2)
    weight = module.weight.tolist()
    with pytest.raises(ValueError, match="no way back"), no_trace(module):
        pass
    assert module.weight.tolist() == weight
    assert module.training


def write_sparse(module):
    module.sparse.mul_(2)


@pytest.mark.parametrize(
    ("write", "name"), [(accumulate, "the gradient of layer.weight and to 1 more"), (write_sparse, "sparse")]
)
def test_names_what_cannot_be_restored(write, name):
    module = Holds(write)
    accumulate(module)

    def inside(error=None):
        with no_trace(module), torch.no_grad():
            module(DATA)
            if error is not None:
                raise error

    with pytest.raises(RuntimeError, match=f"^While Holds encoded, it wrote to {name}. .* Give it a method embed"):
        inside()
    with pytest.raises(ValueError, match="of the user"):  # which ours does not hide
        inside(ValueError("of the user"))


def test_sharded_parameters():
    """Each process restores its shard. What FSDP has gathered stays gathered."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        module(torch.ones(2, 3)).sum().backward()
        before = [parameter.to_local().tolist() for parameter in module.parameters()]
        with no_trace(module), torch.no_grad():
            for parameter in module.parameters():
                parameter.to_local().mul_(2)
        assert [parameter.to_local().tolist() for parameter in module.parameters()] == before
        with no_trace(module), torch.no_grad():
            module(torch.ones(2, 3))
        module(torch.ones(2, 3)).sum().backward()
        assert [parameter.to_local().tolist() for parameter in module.parameters()] == before
    finally:
        dist.destroy_process_group()
