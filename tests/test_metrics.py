import math
import re
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bs_lightning.metrics import Alignment, InBatchFalseNegativeRate, InBatchHardness, Uniformity

N_BATCHES, SIZE, DIM = 6, 20, 5


def data():
    """Embeddings [n, B, d] of any length, other views of them, and labels [n, B]; the batches differ in both."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, N_BATCHES + 1)
    x = torch.randn(N_BATCHES, SIZE, DIM, generator=generator) * scale[:, None, None] + 1
    y = x + torch.randn(x.shape, generator=generator)
    labels = torch.randint(0, 4, (N_BATCHES, SIZE), generator=generator)
    labels[1], labels[2] = 7, torch.arange(SIZE)
    return x, y, labels


def mean_of_pairs(value, batches):
    values = [value(batch, i, j) for batch in batches for i, j in combinations(range(SIZE), 2)]
    values = [float(value) for value in values if value is not None]
    return sum(values) / len(values)


def cosine(a, b):
    return torch.dot(a.double(), b.double()) / (a.double().norm() * b.double().norm())


def squared_distance(a, b):
    return 2 - 2 * cosine(a, b)


# Each: the metric, its inputs, and a naive reference over the batches of these.

X, Y, LABELS = data()
CASES = {
    "false negatives": (
        InBatchFalseNegativeRate,
        (LABELS,),
        lambda batches: mean_of_pairs(lambda batch, i, j: batch[0][i] == batch[0][j], batches),
    ),
    "similarity": (
        InBatchHardness,
        (X,),
        lambda batches: mean_of_pairs(lambda batch, i, j: cosine(batch[0][i], batch[0][j]), batches),
    ),
    "similarity of true negatives": (
        InBatchHardness,
        (X, LABELS),
        lambda batches: mean_of_pairs(
            lambda batch, i, j: cosine(batch[0][i], batch[0][j]) if batch[1][i] != batch[1][j] else None, batches
        ),
    ),
    "alignment": (
        lambda: Alignment(alpha=3),
        (X, Y),
        lambda batches: (
            sum(float(squared_distance(a, b)) ** 1.5 for batch in batches for a, b in zip(*batch, strict=True))
            / (len(batches) * SIZE)
        ),
    ),
    "uniformity": (
        lambda: Uniformity(t=1.5),
        (X,),
        lambda batches: math.log(
            mean_of_pairs(lambda batch, i, j: math.exp(-1.5 * squared_distance(batch[0][i], batch[0][j])), batches)
        ),
    ),
}
cases = pytest.mark.parametrize("case", CASES)


def updated(metric, inputs):
    for batch in zip(*inputs, strict=True):
        metric.update(*batch)
    return metric


@cases
def test_equals_a_naive_reference_over_several_batches(case):
    make, inputs, reference = CASES[case]
    metric = updated(make(), inputs)
    assert metric.compute().item() == pytest.approx(reference(list(zip(*inputs, strict=True))), abs=1e-5)
    metric.reset()
    metric.update(*(values[0] for values in inputs))
    assert metric.compute().item() == pytest.approx(reference([[values[0] for values in inputs]]), abs=1e-5)


@cases
def test_forward_returns_the_batchs_value_and_accumulates(case):
    make, inputs, _ = CASES[case]
    metric = make()
    for batch in zip(*inputs, strict=True):
        alone = updated(make(), [[each] for each in batch]).compute().item()
        assert metric(*batch).item() == pytest.approx(alone, nan_ok=True)
    assert metric.compute().item() == pytest.approx(updated(make(), inputs).compute().item())


@pytest.mark.parametrize("case", ["false negatives", "similarity", "similarity of true negatives"])
def test_many_batches_at_once_equal_one_after_another(case):
    make, inputs, _ = CASES[case]
    together = make()
    together.update(*inputs)
    assert together.compute().item() == pytest.approx(updated(make(), inputs).compute().item())


@cases
def test_is_nan_before_the_first_update(case):
    metric = CASES[case][0]()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert math.isnan(metric.compute())


def test_similarity_of_true_negatives_is_nan_where_there_are_none():
    assert math.isnan(InBatchHardness()(X[0], torch.zeros(SIZE)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_takes_any_floats(dtype):
    assert InBatchHardness()(X.to(dtype)).item() == pytest.approx(InBatchHardness()(X).item(), abs=0.01)


def test_alignment_and_uniformity_have_gradients():
    x, y = X[0].clone().requires_grad_(), Y[0]
    (Alignment()(x, y) + Uniformity()(x)).backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("metric", "inputs", "words"),
    [
        (InBatchFalseNegativeRate, [torch.zeros(1)], "labels must have shape [B] or [n, B] with B >= 2, got [1]"),
        (InBatchFalseNegativeRate, [torch.zeros(2, 1)], "labels must have shape [B] or [n, B] with B >= 2, got [2, 1]"),
        (InBatchFalseNegativeRate, [torch.zeros(2, 2, 2)], "with B >= 2, got [2, 2, 2]"),
        (InBatchHardness, [torch.zeros(1, 4)], "embeddings must have shape [B, d] or [n, B, d] with B >= 2, got [1"),
        (InBatchHardness, [torch.zeros(4)], "embeddings must have shape [B, d] or [n, B, d] with B >= 2, got [4]"),
        (InBatchHardness, [torch.zeros(4, 2), torch.zeros(3)], "labels must have shape [1, 4], got [1, 3]"),
        (InBatchHardness, [torch.zeros(4, 2), torch.zeros(2, 4)], "labels must have shape [1, 4], got [2, 4]"),
        (Alignment, [torch.zeros(4, 2), torch.zeros(4, 3)], "same shape [B, d], got [4, 2] and [4, 3]"),
        (Alignment, [torch.zeros(4), torch.zeros(4)], "same shape [B, d], got [4] and [4]"),
        (Uniformity, [torch.zeros(1, 4)], "x must have shape [B, d] with B >= 2, got [1, 4]"),
        (Uniformity, [torch.zeros(4)], "x must have shape [B, d] with B >= 2, got [4]"),
    ],
)
def test_refuses_other_shapes(metric, inputs, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        metric().update(*inputs)


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y, labels = torch.load(f"{folder}/data.pt")
    part = slice(0, 2) if rank == 0 else slice(2, None)  # unequal parts
    results = {}
    for name, values in {"similarity": (x,), "similarity of true negatives": (x, labels)}.items():
        results[name] = updated(InBatchHardness(), [value[part] for value in values])
    results["false negatives"] = updated(InBatchFalseNegativeRate(), [labels[part]])
    results["alignment"] = updated(Alignment(alpha=3), [x[part], y[part]])
    results["uniformity"] = updated(Uniformity(t=1.5), [x[part]])
    torch.save({name: metric.compute().item() for name, metric in results.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does_over_all_data(tmp_path):
    torch.save((X, Y, LABELS), tmp_path / "data.pt")
    processes = mp.spawn(_on_rank, (str(tmp_path),), nprocs=2, join=False)
    try:
        assert any(processes.join(timeout=60) for _ in range(2))  # each returns when a process ends
    finally:
        for process in processes.processes:
            process.kill()
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert results.keys() == CASES.keys()
        for case, (make, inputs, _) in CASES.items():
            assert results[case] == pytest.approx(updated(make(), inputs).compute().item(), rel=1e-4)
