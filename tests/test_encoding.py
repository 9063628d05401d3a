import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bs_lightning import BatchFetcher, encode
from bs_lightning._embeddings import _scales, as_sides, to_device

DATA = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * 3


def run(embed=lambda batch: batch, indices=(7, 0, 19, 3, 11), data=DATA, batch_size=2, **kwargs):
    return encode(indices, BatchFetcher(data), embed, batch_size=batch_size, **kwargs)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
def test_embeds_in_the_order_of_the_indices(container, batch_size):
    indices = [7, 0, 19, 3, 11]
    expected = nn.functional.normalize(DATA[indices], dim=1)
    assert torch.allclose(run(indices=container(indices), batch_size=batch_size), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_returns_float32_rows_of_length_one(dtype):
    embeddings = run(lambda batch: batch.to(dtype))
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(5))
    assert torch.allclose(embeddings, run(), atol=0.01)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_returns_rows_of_length_one_whatever_they_were(scale):
    assert torch.allclose(run(lambda batch: batch * scale).norm(dim=1), torch.ones(5))


def test_an_embed_may_write_all_its_results_to_one_place():
    """Compiled models do so with CUDA graphs."""
    place = torch.empty(2, 4)
    assert torch.equal(run(lambda batch: place.copy_(batch), indices=range(6)), run(indices=range(6)))


def test_keeps_no_gradients_and_loads_in_batches():
    layer, sizes, advanced = nn.Linear(4, 3), [], []

    def embed(batch):
        z = layer(batch)
        assert not z.requires_grad
        sizes.append(len(z))
        return z

    assert not run(embed, advance=lambda: advanced.append(len(sizes))).requires_grad
    assert sizes == [2, 2, 1]
    assert advanced == [1, 2, 3]
    assert torch.is_grad_enabled()


def with_rows(value, *rows):
    data = DATA.clone()
    data[list(rows)] = value
    return data


def test_zero_rows_stay_zero_and_are_warned_of():
    with pytest.warns(UserWarning, match="embeddings of a pool are all zero.*similar to nothing"):
        embeddings = run(data=with_rows(0, 19))
    assert embeddings.norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1, 1])


def test_a_collapsed_model_is_warned_of():
    with pytest.warns(UserWarning, match="are equal: the model has collapsed"):
        run(data=torch.ones(20, 4) * torch.arange(1, 21)[:, None])


def test_a_model_that_gives_zeros_is_warned_of():
    with pytest.warns(UserWarning, match="All embeddings are zero: the model has collapsed"):
        run(data=torch.zeros(20, 4))


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), (torch.device("cuda:1"), False), ("mps", True)])
def test_only_copies_to_cuda_need_not_wait(device, waits):
    """A copy that is not waited for may be read, or its source be freed, too early elsewhere."""
    copies = []
    to_device(SimpleNamespace(to=lambda device, non_blocking: copies.append((device, non_blocking))), device)
    assert copies == [(device, not waits)]
    assert to_device(DATA, None) is DATA


def test_zero_rows_do_not_hide_a_collapse():
    with pytest.warns(UserWarning, match="the model has collapsed"):
        run(data=torch.cat([torch.zeros(4, 4), torch.ones(16, 4)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_is_exact_for_numbers_of_any_size(dtype):
    """Against `torch.frexp`, which MPS lacks."""
    info = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(info.tiny), math.log2(info.max) - 1, 500, dtype=dtype)
    ends = torch.tensor([info.smallest_normal / 8, info.tiny, info.max, 1.0, 0.5], dtype=dtype)
    largest = torch.cat([torch.exp2(exponents), ends])[:, None]
    most = 1022 if dtype == torch.float64 else 126
    expected = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-most, most))
    assert torch.equal(_scales(largest), expected)


def test_warns_of_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
        run(indices=[3])  # a single instance is no sign of a collapsed model
        run(indices=range(130), data=torch.cat([torch.ones(110, 4), DATA]))  # only the first are equal


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_names_the_dataset_index_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="embedding of dataset index 19 is not finite"):
        run(data=with_rows(bad, 19, 3))


def test_float64_beyond_float32_is_not_finite():
    with pytest.raises(ValueError, match="embedding of dataset index 19 is not finite"):
        run(data=DATA.double().index_fill(0, torch.tensor([19]), 1e300))


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        ([0.0, 1.0], TypeError, "indices must hold integers, got dtype float64"),
        ([True, False], TypeError, "indices must hold integers, got dtype bool"),
        (["0"], TypeError, "indices must hold integers, got dtype <U1"),
        (None, TypeError, "indices must hold integers, got dtype object"),
        ([[0, 1], [2]], TypeError, "indices must be an array of integers, or be convertible to one: "),
        ([], ValueError, "indices must have shape [P] with P >= 1, got shape [0]"),
        ([[0, 1]], ValueError, "indices must have shape [P] with P >= 1, got shape [1, 2]"),
        (3, ValueError, "indices must have shape [P] with P >= 1, got shape []"),
    ],
)
def test_refuses_indices(indices, error, words):
    with pytest.raises(error, match=re.escape(words)):
        run(indices=indices)


@pytest.mark.parametrize(
    ("batch_size", "error", "words"),
    [
        (0, ValueError, "batch_size must be at least 1, got 0"),
        (-1, ValueError, "batch_size must be at least 1, got -1"),
        (True, TypeError, "batch_size must be an integer, got True"),
        (2.0, TypeError, r"batch_size must be an integer, got 2\.0"),
        (None, TypeError, "batch_size must be an integer, got None"),
    ],
)
def test_refuses_batch_sizes(batch_size, error, words):
    with pytest.raises(error, match=words):
        run(batch_size=batch_size)


@pytest.mark.parametrize(
    ("embed", "error", "words"),
    [
        (lambda batch: None, TypeError, "must return a float tensor of shape [b, d], or two sides"),
        (lambda batch: (batch, batch, batch), TypeError, "Got a tuple"),
        (lambda batch: (batch, None), TypeError, "Got a NoneType"),
        (lambda batch: batch.numpy(), TypeError, "Got an array of dtype float32"),
        (lambda batch: batch.long(), TypeError, "Got a tensor of dtype torch.int64"),
        (lambda batch: batch.to(torch.complex64), TypeError, "Got a tensor of dtype torch.complex64"),
        (lambda batch: batch.sum(1), ValueError, "for two sides, got [2]. Pool or flatten first."),
        (lambda batch: batch[:, :, None], ValueError, "for two sides, got [2, 4, 1]"),
        (lambda batch: (batch, batch[:, :3]), ValueError, "two sides of one shape [b, d], got [2, 4] and [2, 3]"),
        (lambda batch: (batch, batch[:1]), ValueError, "two sides of one shape [b, d], got [2, 4] and [1, 4]"),
        (lambda batch: batch[:1], ValueError, "embed returned 1 rows for 2 instances. One embedding per instance"),
        (lambda batch: torch.cat([batch, batch]), ValueError, "embed returned 4 rows for 2 instances"),
    ],
)
def test_refuses_what_is_no_embedding(embed, error, words):
    with pytest.raises(error, match=re.escape(words)):
        run(embed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: batch, "embed was given a tensor of shape [2, 4]."),
        (lambda batch: [batch, "text", batch], "embed was given a list of a tensor of shape [2, 4] and a str."),
        (lambda batch: {"x": batch}, "embed was given a dict."),
    ],
)
def test_a_wrong_embedding_is_told_with_the_batch(change, words):
    """One that takes `batch[0]` of a tensor has lost all instances but one."""

    def load(batches):
        return (change(torch.eye(4)[batch]) for batch in batches)

    with pytest.raises(ValueError, match="Pool or flatten first") as caught:
        encode([0, 1], load, lambda batch: torch.ones(4), batch_size=2)
    assert caught.value.__notes__ == [words]


@pytest.mark.parametrize("swap", [False, True])
def test_two_sides_of_different_precision_keep_the_higher_one(swap):
    low, high = torch.randn(3, 4).bfloat16(), torch.randn(3, 4)
    sides = as_sides((high, low) if swap else (low, high), "embed must return")
    assert torch.equal(sides[:, 0 if swap else 1], high)
    assert torch.equal(sides[:, 1 if swap else 0], low.float())
