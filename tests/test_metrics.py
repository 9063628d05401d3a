import math
import re
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import LIMIT
from torchmetrics import MetricCollection

from bs_lightning.metrics import (
    Alignment,
    InBatchAccuracy,
    InBatchFalseNegativeRate,
    InBatchHardness,
    NegativesAbovePositive,
    Uniformity,
    _negatives,
    alignment,
    in_batch_accuracy,
    in_batch_false_negative_rate,
    in_batch_hardness,
    negatives_above_positive,
    uniformity,
)

N_BATCHES, SIZE, DIM = 6, 20, 5


def data():
    """Return embeddings [n, B, d] of any length, a second view of each, and labels [n, B]. Batches differ in both."""
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


def mean_of_negatives(value, batches):
    """Return the mean over ordered pairs: the first side of instance i, the second side of instance j."""
    values = [value(batch, i, j) for batch in batches for i, j in permutations(range(SIZE), 2)]
    values = [float(value) for value in values if value is not None]
    return sum(values) / len(values)


def positive_wins(sides, anchor):
    others = [cosine(sides[anchor, 0], sides[j, 1]) for j in range(SIZE) if j != anchor]
    return cosine(*sides[anchor]) > max(others)


def cosine(a, b):
    return torch.dot(a.double(), b.double()) / (a.double().norm() * b.double().norm())


def squared_distance(a, b):
    return 2 - 2 * cosine(a, b)


# Each case holds the metric, its functional twin, its inputs, and a naive reference over the inputs' batches.

X, Y, LABELS = data()
TWO_SIDES = torch.stack([X, Y], dim=2)
CASES = {
    "false-negative rate": (
        InBatchFalseNegativeRate,
        in_batch_false_negative_rate,
        (LABELS,),
        lambda batches: mean_of_pairs(lambda batch, i, j: batch[0][i] == batch[0][j], batches),
    ),
    "hardness": (
        InBatchHardness,
        in_batch_hardness,
        (X,),
        lambda batches: mean_of_pairs(lambda batch, i, j: cosine(batch[0][i], batch[0][j]), batches),
    ),
    "hardness of true negatives": (
        InBatchHardness,
        in_batch_hardness,
        (X, LABELS),
        lambda batches: mean_of_pairs(
            lambda batch, i, j: cosine(batch[0][i], batch[0][j]) if batch[1][i] != batch[1][j] else None, batches
        ),
    ),
    "hardness of two sides": (
        InBatchHardness,
        in_batch_hardness,
        (TWO_SIDES[:, None],),
        lambda batches: mean_of_negatives(lambda batch, i, j: cosine(batch[0][0, i, 0], batch[0][0, j, 1]), batches),
    ),
    "hardness of two sides' true negatives": (
        InBatchHardness,
        in_batch_hardness,
        (TWO_SIDES[:, None], LABELS[:, None]),
        lambda batches: mean_of_negatives(
            lambda batch, i, j: (
                cosine(batch[0][0, i, 0], batch[0][0, j, 1]) if batch[1][0, i] != batch[1][0, j] else None
            ),
            batches,
        ),
    ),
    "accuracy": (
        InBatchAccuracy,
        in_batch_accuracy,
        (TWO_SIDES,),
        lambda batches: (
            sum(float(positive_wins(batch[0], i)) for batch in batches for i in range(SIZE)) / (len(batches) * SIZE)
        ),
    ),
    "negatives above": (
        NegativesAbovePositive,
        negatives_above_positive,
        (TWO_SIDES,),
        lambda batches: mean_of_negatives(
            lambda batch, i, j: cosine(batch[0][i, 0], batch[0][j, 1]) > cosine(*batch[0][i]), batches
        ),
    ),
    "alignment": (
        lambda: Alignment(alpha=3),
        lambda x, y: alignment(x, y, alpha=3),
        (X, Y),
        lambda batches: (
            sum(float(squared_distance(a, b)) ** 1.5 for batch in batches for a, b in zip(*batch, strict=True))
            / (len(batches) * SIZE)
        ),
    ),
    "uniformity": (
        lambda: Uniformity(t=1.5),
        lambda x: uniformity(x, t=1.5),
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
    make, _, inputs, reference = CASES[case]
    metric = updated(make(), inputs)
    assert metric.compute().item() == pytest.approx(reference(list(zip(*inputs, strict=True))), abs=1e-5)
    metric.reset()
    metric.update(*(values[0] for values in inputs))
    assert metric.compute().item() == pytest.approx(reference([[values[0] for values in inputs]]), abs=1e-5)


@cases
def test_forward_returns_the_batchs_value_and_accumulates(case):
    make, _, inputs, _ = CASES[case]
    metric = make()
    for batch in zip(*inputs, strict=True):
        alone = updated(make(), [[each] for each in batch]).compute().item()
        assert metric(*batch).item() == pytest.approx(alone, nan_ok=True)
    assert metric.compute().item() == pytest.approx(updated(make(), inputs).compute().item())


@cases
def test_the_function_returns_what_the_class_does_for_a_batch(case):
    make, function, inputs, _ = CASES[case]
    for batch in zip(*inputs, strict=True):
        assert function(*batch).item() == pytest.approx(make()(*batch).item(), abs=0, rel=0, nan_ok=True)


def test_the_powers_default_to_2():
    assert alignment(X[0], Y[0]) == alignment(X[0], Y[0], alpha=2) == Alignment()(X[0], Y[0])
    assert uniformity(X[0]) == uniformity(X[0], t=2) == Uniformity()(X[0])


@pytest.mark.parametrize(
    "case", ["false-negative rate", "hardness", "hardness of true negatives", "accuracy", "negatives above"]
)
def test_many_batches_at_once_equal_one_batch_at_a_time(case):
    make, _, inputs, _ = CASES[case]
    together = make()
    together.update(*inputs)
    assert together.compute().item() == pytest.approx(updated(make(), inputs).compute().item())
    assert CASES[case][1](*inputs).item() == together.compute().item()


@pytest.mark.parametrize("labels", [(), (LABELS,)], ids=["all", "true negatives"])
def test_many_batches_of_two_sides_at_once(labels):
    together = in_batch_hardness(TWO_SIDES, *labels).item()
    one_by_one = [each[:, None] for each in (TWO_SIDES, *labels)]
    assert together == pytest.approx(updated(InBatchHardness(), one_by_one).compute().item())


def test_metrics_say_which_values_are_better_and_whether_they_have_a_gradient():
    """A ``MetricTracker`` asks which are better."""
    said = {
        metric: (metric.higher_is_better, metric.is_differentiable)
        for metric in (InBatchAccuracy, InBatchFalseNegativeRate, NegativesAbovePositive, Alignment, Uniformity)
    }
    assert said == {
        InBatchAccuracy: (True, False),
        InBatchFalseNegativeRate: (False, False),
        NegativesAbovePositive: (False, False),
        Alignment: (False, True),
        Uniformity: (False, True),
    }
    assert InBatchHardness.higher_is_better is None  # harder negatives teach more, up to a limit


def test_large_batches_are_compared_in_parts(monkeypatch):
    expected = in_batch_accuracy(TWO_SIDES), negatives_above_positive(TWO_SIDES)
    monkeypatch.setattr("bs_lightning.metrics._pairs.BLOCK_ENTRIES", 2 * SIZE**2)
    assert (in_batch_accuracy(TWO_SIDES), negatives_above_positive(TWO_SIDES)) == expected


def test_a_collection_keeps_metrics_of_other_options_apart():
    equal = torch.ones(4, 3)
    for make, inputs in ((Alignment, (X[0], Y[0])), (Uniformity, (X[0],))):
        alone = {"1": make(1.0), "2": make(2.0)}
        together = MetricCollection({name: metric.clone() for name, metric in alone.items()})
        for batch in ([equal] * len(inputs), inputs):  # the first is the same for all options
            together.update(*batch)
            for metric in alone.values():
                metric.update(*batch)
        assert together.compute() == {name: metric.compute() for name, metric in alone.items()}


def test_two_equal_sides_are_as_hard_as_one():
    twice = torch.stack([X, X], dim=2)
    assert in_batch_hardness(twice, LABELS).item() == pytest.approx(in_batch_hardness(X, LABELS).item(), abs=1e-6)


def test_three_dimensions_are_batches_with_one_side():
    torch.testing.assert_close(in_batch_hardness(TWO_SIDES[0]), updated(InBatchHardness(), [TWO_SIDES[0]]).compute())
    assert in_batch_hardness(TWO_SIDES[0]).item() != pytest.approx(in_batch_hardness(TWO_SIDES[:1]).item(), abs=0.01)


def test_anchors_are_the_first_sides():
    """Both queries are nearest to their own document. The first document is nearer to the other query."""
    angles = torch.tensor([[0, 30], [50, 60]]).deg2rad()
    sides = torch.stack([angles.cos(), angles.sin()], dim=2)
    assert (in_batch_accuracy(sides), negatives_above_positive(sides)) == (1, 0)
    assert (in_batch_accuracy(sides.flip(1)), negatives_above_positive(sides.flip(1))) == (0.5, 0.5)


def test_a_tie_does_not_win_and_is_not_above():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(300, 2, 1, generator=generator)  # the cosines of one direction differ by rounding
    collapsed = lengths * torch.randn(7, generator=generator)
    duplicates = lengths * torch.randn(20, 2, 5, generator=generator).repeat(15, 1, 1)
    twins = lengths * torch.randn(150, 2, 5, generator=generator).repeat(2, 1, 1)
    for sides in (collapsed, duplicates, twins):
        assert in_batch_accuracy(sides) == 0
    equal_sides = lengths * duplicates[:, :1]
    for sides in (collapsed, equal_sides):
        assert negatives_above_positive(sides) == 0


def test_a_zero_side_has_similarity_0():
    east, west, zero = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.zeros(2)
    no_query = torch.stack([torch.stack([zero, east]), torch.stack([east, east])])
    assert (in_batch_accuracy(no_query), negatives_above_positive(no_query)) == (0, 0)  # two ties
    no_document = torch.stack([torch.stack([east, zero]), torch.stack([east, west])])
    assert (in_batch_accuracy(no_document), negatives_above_positive(no_document)) == (0.5, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_make_nan(value):
    sides = TWO_SIDES.clone()
    sides[1, 2, 1, 3] = value
    for metric in (InBatchAccuracy(), NegativesAbovePositive(), InBatchHardness()):
        assert math.isnan(metric(sides))
        metric(TWO_SIDES)
        assert math.isnan(metric.compute())


def test_pairs_are_compared_in_float32_under_autocast():
    near = X[0] + 1e-3 * Y[0]
    sides = torch.stack([X[0], near], dim=1) + 10  # cosines that bfloat16 cannot tell apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = in_batch_accuracy(sides), negatives_above_positive(sides)
    assert rounded == (in_batch_accuracy(sides), negatives_above_positive(sides)) == (1, 0)


@cases
def test_is_nan_before_the_first_update(case):
    metric = CASES[case][0]()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert math.isnan(metric.compute())


def test_hardness_of_true_negatives_is_nan_where_there_are_none():
    assert math.isnan(InBatchHardness()(X[0], torch.zeros(SIZE, dtype=torch.int64)))


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_sums_as_exactly(case, dtype):
    make, _, inputs, _ = CASES[case]
    module = torch.nn.ModuleList([make()]).to(dtype)  # as Lightning does for precision="bf16-true"
    for _ in range(2):
        module[0].reset()
        for _ in range(30):
            updated(module[0], inputs)
        assert module[0].compute().item() == pytest.approx(updated(make(), inputs).compute().item(), abs=1e-5)


@pytest.mark.parametrize("make", [InBatchAccuracy, NegativesAbovePositive])
def test_counts_are_exact_however_large(make):
    metric = make()
    metric.update(TWO_SIDES[0])
    once = dict(metric.metric_state)
    for name in once.keys() - {"not_finite"}:
        setattr(metric, name, torch.tensor(2**25))  # float32 holds no odd numbers there
    metric.update(TWO_SIDES[0])
    assert all(metric.metric_state[name] == 2**25 + once[name] for name in once.keys() - {"not_finite"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_takes_any_floats(dtype):
    assert InBatchHardness()(X.to(dtype)).item() == pytest.approx(InBatchHardness()(X).item(), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_takes_any_integers_as_labels(dtype):
    labels = (LABELS == 2).to(dtype)
    expected = in_batch_false_negative_rate(labels.long()), in_batch_hardness(X, labels.long())
    assert (in_batch_false_negative_rate(labels), in_batch_hardness(X, labels)) == expected


@cases
@pytest.mark.filterwarnings("error")
def test_takes_numpy_arrays(case):
    make, function, inputs, _ = CASES[case]
    arrays = [values[0].numpy().copy() for values in inputs]
    for array in arrays:
        array.setflags(write=False)
    expected = function(*(values[0] for values in inputs)).item()
    assert function(*arrays).item() == make()(*arrays).item() == expected
    assert function(*(array[::-1] for array in arrays)).item() == pytest.approx(expected)  # a negative stride


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e25, 1e38])
def test_rows_of_any_length(scale):
    x, y = (torch.nn.functional.normalize(values[0], dim=1) for values in (X, Y))
    labels = LABELS[0]
    sides = torch.stack([x, y], dim=1)
    for function, inputs in [
        (in_batch_hardness, (x,)),
        (in_batch_accuracy, (sides,)),
        (negatives_above_positive, (sides,)),
        (alignment, (x, y)),
        (uniformity, (x,)),
    ]:
        expected = function(*inputs).item()
        assert function(*(values * scale for values in inputs)).item() == pytest.approx(expected, abs=0.01)
    expected = in_batch_hardness(x, labels).item()
    assert in_batch_hardness(x * scale, labels).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("scale", [1e-42, 0.37, 1e38])
def test_equal_rows(scale):
    rows, labels = torch.full((300, 7), scale), torch.arange(300) % 3
    assert 1 - 1e-5 < in_batch_hardness(rows) <= 1
    assert 1 - 1e-5 < in_batch_hardness(rows, labels) <= 1
    assert -1 <= in_batch_hardness(torch.cat([rows[:1], -rows[:1]])) < -1 + 1e-5
    assert alignment(rows, rows) == 0
    assert uniformity(rows) == pytest.approx(0, abs=1e-5)


def test_all_zero_rows_are_similar_to_nothing():
    assert in_batch_hardness(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])) == pytest.approx(1 / 3)


def test_a_few_true_negatives_among_many_false_ones():
    """One row is the opposite of the other 499 rows of its batch. All other pairs are false negatives."""
    rows = torch.full((200, 500, 8), 0.37)
    labels = torch.zeros(200, 500, dtype=torch.int64)
    rows[0, 0], labels[0, 0] = -0.37, 1
    assert in_batch_hardness(rows, labels).item() == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_alignment_and_uniformity_have_gradients(scale):
    x, y = (X[0] * scale).requires_grad_(), Y[0]
    (Alignment()(x, y) + Uniformity()(x)).backward()
    through_the_class = x.grad.clone()
    x.grad = None
    (alignment(x, y) + uniformity(x)).backward()
    assert torch.equal(x.grad, through_the_class)
    # Compute the gradients by hand, on the unit rows: torch.nn.functional.normalize of the unscaled rows.
    z = X[0].clone().requires_grad_()
    unit, other = torch.nn.functional.normalize(z, dim=1), torch.nn.functional.normalize(y, dim=1)
    pairs = torch.pdist(unit).square().mul(-2).exp()
    ((unit - other).square().sum(dim=1).mean() + pairs.mean().log()).backward()
    torch.testing.assert_close(x.grad * scale, z.grad)


def test_rows_without_a_length_or_a_distance_have_ordinary_gradients():
    zeros = torch.zeros(3, 4, requires_grad=True)
    (alignment(zeros, Y[0, :3, :4]) + uniformity(torch.cat([zeros, Y[0, :3, :4]]))).backward()
    assert zeros.grad.abs().max() < 10
    x = Y[0].clone().requires_grad_()
    for alpha in (0.5, 1.0, 2.0):
        assert alignment(x, Y[0], alpha=alpha) == 0
        (gradient,) = torch.autograd.grad(alignment(x, Y[0], alpha=alpha), x)
        assert not gradient.any()


def test_hardness_and_rate_have_no_gradient():
    assert not in_batch_hardness(X[0].clone().requires_grad_(), LABELS[0]).requires_grad
    sides = TWO_SIDES.clone().requires_grad_()
    for function in (in_batch_hardness, in_batch_accuracy, negatives_above_positive):
        assert not function(sides).requires_grad


INTEGERS = torch.zeros(2, 2, 2, dtype=torch.int64)
BAD_SHAPES = [
    (InBatchFalseNegativeRate, [INTEGERS[0, 0, :1]], "labels must have shape [B] or [n, B] with B >= 2, got [1]"),
    (InBatchFalseNegativeRate, [INTEGERS[0, :, :1]], "labels must have shape [B] or [n, B] with B >= 2, got [2, 1]"),
    (InBatchFalseNegativeRate, [INTEGERS], "with B >= 2, got [2, 2, 2]"),
    (
        InBatchHardness,
        [torch.zeros(1, 4)],
        "embeddings must have shape [B, d] or [n, B, d], or [n, B, 2, d] for two",
    ),
    (InBatchHardness, [torch.zeros(4)], "for two sides, with B >= 2 and d >= 1, got [4]"),
    (InBatchHardness, [torch.zeros(4, 0)], "with B >= 2 and d >= 1, got [4, 0]"),
    (InBatchHardness, [torch.zeros(2, 4, 3, 5)], "with B >= 2 and d >= 1, got [2, 4, 3, 5]"),
    (InBatchHardness, [torch.zeros(2, 1, 2, 5)], "with B >= 2 and d >= 1, got [2, 1, 2, 5]"),
    (InBatchHardness, [torch.zeros(2, 4, 2, 5), LABELS[:2, :2]], "labels must have shape [2, 4], got [2, 2]"),
    (InBatchHardness, [torch.zeros(4, 2), LABELS[0, :3]], "labels must have shape [1, 4], got [1, 3]"),
    (InBatchHardness, [torch.zeros(4, 2), LABELS[:2, :4]], "labels must have shape [1, 4], got [2, 4]"),
    *(
        (
            metric,
            [torch.zeros(shape)],
            f"two sides: shape [B, 2, d] or [n, B, 2, d] with B >= 2 and d >= 1, got {shape}",
        )
        for metric in (InBatchAccuracy, NegativesAbovePositive)
        for shape in ([4, 5], [2, 4, 5], [1, 2, 5], [4, 2, 0], [2, 4, 3, 5], [2, 1, 2, 5], [1, 2, 4, 2, 5])
    ),
    (InBatchAccuracy, [torch.zeros(4, 2)], "Join the sides: torch.stack([queries, documents], dim=-2)."),
    (Alignment, [torch.zeros(4, 2), torch.zeros(4, 3)], "the same shape [B, d] with B >= 1 and d >= 1, got [4, 2] and"),
    (Alignment, [torch.zeros(4), torch.zeros(4)], "same shape [B, d] with B >= 1 and d >= 1, got [4] and [4]"),
    (Alignment, [torch.zeros(4, 0), torch.zeros(4, 0)], "with B >= 1 and d >= 1, got [4, 0] and [4, 0]"),
    (Alignment, [torch.zeros(0, 4), torch.zeros(0, 4)], "with B >= 1 and d >= 1, got [0, 4] and [0, 4]"),
    (Uniformity, [torch.zeros(1, 4)], "x must have shape [B, d] with B >= 2 and d >= 1, got [1, 4]"),
    (Uniformity, [torch.zeros(4)], "x must have shape [B, d] with B >= 2 and d >= 1, got [4]"),
    (Uniformity, [torch.zeros(4, 0)], "x must have shape [B, d] with B >= 2 and d >= 1, got [4, 0]"),
]
FUNCTIONS = {
    InBatchFalseNegativeRate: in_batch_false_negative_rate,
    InBatchHardness: in_batch_hardness,
    InBatchAccuracy: in_batch_accuracy,
    NegativesAbovePositive: negatives_above_positive,
    Alignment: alignment,
    Uniformity: uniformity,
}


@pytest.mark.parametrize(("metric", "inputs", "words"), BAD_SHAPES)
def test_refuses_other_shapes(metric, inputs, words):
    for refuses in (metric().update, FUNCTIONS[metric]):
        with pytest.raises(ValueError, match=re.escape(words)):
            refuses(*inputs)


@pytest.mark.parametrize(
    ("metric", "inputs", "words"),
    [
        (InBatchFalseNegativeRate, [[0, 1]], "labels must be a dense tensor or NumPy array of real .*, got a list"),
        (InBatchFalseNegativeRate, [np.array(["a", "b"])], "labels must be .*, got an array of dtype <U1"),
        (InBatchFalseNegativeRate, [torch.tensor([0.0, math.nan])], "labels must hold integers, got dtype torch.float"),
        (InBatchHardness, [X[0], torch.zeros(SIZE)], "labels must hold integers, .* Convert them, e.g. labels.long()"),
        (InBatchHardness, [X[0].tolist()], "embeddings must be a dense tensor or NumPy array of real .*, got a list"),
        (InBatchHardness, [X[0].to_sparse()], "embeddings must be .*, got a tensor of .* layout torch.sparse_coo"),
        (InBatchAccuracy, [TWO_SIDES.tolist()], "embeddings must be a dense tensor or NumPy array of .*, got a list"),
        (Alignment, [X[0], X[0].tolist()], "y must be .*, got a list"),
        (Uniformity, [X[0] * 1j], "x must be .*, got a tensor of dtype torch.complex64"),
    ],
)
def test_refuses_other_types(metric, inputs, words):
    for refuses in (metric().update, FUNCTIONS[metric]):
        with pytest.raises(TypeError, match=words):
            refuses(*inputs)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_powers_must_be_finite_and_above_0(value):
    for refuses in (lambda: Alignment(value), lambda: alignment(X[0], Y[0], alpha=value)):
        with pytest.raises(ValueError, match=f"alpha must be finite and above 0, got {value}"):
            refuses()
    for refuses in (lambda: Uniformity(value), lambda: uniformity(X[0], t=value)):
        with pytest.raises(ValueError, match=f"t must be finite and above 0, got {value}"):
            refuses()
    with pytest.raises(TypeError, match="alpha must be a number, got '2'"):
        Alignment("2")


@pytest.mark.parametrize("t", [20.001, 1e10])
def test_uniformity_refuses_scales_at_which_potentials_vanish(t):
    for refuses in (lambda: Uniformity(t), lambda: uniformity(X[0], t=t)):
        with pytest.raises(ValueError, match=f"t must be at most 20, got {t}"):
            refuses()


def test_uniformity_of_opposite_rows_at_the_largest_scale():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(rows, t=20).item() == pytest.approx(-80)


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y, labels = torch.load(f"{folder}/data.pt")
    part = slice(0, 2) if rank == 0 else slice(2, None)  # the processes get unequal parts
    results = {}
    sides = torch.stack([x, y], dim=2)
    for name, values in {
        "hardness": (x,),
        "hardness of true negatives": (x, labels),
        "hardness of two sides": (sides[:, None],),
        "hardness of two sides' true negatives": (sides[:, None], labels[:, None]),
    }.items():
        results[name] = updated(InBatchHardness(), [value[part] for value in values])
    results["accuracy"] = updated(InBatchAccuracy(), [sides[part]])
    results["negatives above"] = updated(NegativesAbovePositive(), [sides[part]])
    results["false-negative rate"] = updated(InBatchFalseNegativeRate(), [labels[part]])
    results["alignment"] = updated(Alignment(alpha=3), [x[part], y[part]])
    results["uniformity"] = updated(Uniformity(t=1.5), [x[part]])
    torch.save({name: metric.compute().item() for name, metric in results.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does_over_all_data(tmp_path):
    torch.save((X, Y, LABELS), tmp_path / "data.pt")
    processes = mp.spawn(_on_rank, (str(tmp_path),), nprocs=2, join=False)
    try:
        assert any(processes.join(timeout=LIMIT) for _ in range(2))  # each call returns when a process ends
    finally:
        for process in processes.processes:
            process.kill()
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert results.keys() == CASES.keys()
        for case, (make, _, inputs, _) in CASES.items():
            assert results[case] == pytest.approx(updated(make(), inputs).compute().item(), rel=1e-4)


@pytest.mark.parametrize("labels", [(), (LABELS,)], ids=["all negatives", "true negatives"])
def test_hardness_of_many_batches_is_summed_in_parts(labels, monkeypatch):
    whole = in_batch_hardness(TWO_SIDES, *labels)
    monkeypatch.setattr(_negatives, "BLOCK_ENTRIES", TWO_SIDES[0].numel())
    sum_of, parts = _negatives._similarity_and_pairs, []
    monkeypatch.setattr(_negatives, "_similarity_and_pairs", lambda x, y: parts.append(len(x)) or sum_of(x, y))
    assert in_batch_hardness(TWO_SIDES, *labels).item() == pytest.approx(whole.item(), abs=1e-6)
    assert parts == [1] * len(TWO_SIDES)
