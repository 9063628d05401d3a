"""The losses against literal loops, under masks, in low precision, and over two processes."""

import copy
import inspect
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT
from torch import nn

from bs_lightning import losses

B, D, T = 5, 4, 0.3

# name: (function, module, options)
CASES = {
    "nt_xent": (losses.nt_xent, losses.NTXentLoss, {}),
    "info_nce": (losses.info_nce, losses.InfoNCELoss, {}),
    "info_nce, one direction": (losses.info_nce, losses.InfoNCELoss, {"symmetric": False}),
}
for _function, _module, _options in [
    (losses.debiased, losses.DebiasedLoss, {"class_prior": 0.05}),
    (losses.debiased, losses.DebiasedLoss, {"class_prior": 0.6}),  # some anchors reach the lower bound
    (losses.hard, losses.HardLoss, {"class_prior": 0.05}),
    (losses.hard, losses.HardLoss, {"class_prior": 0.6, "concentration": 0.5}),
    (losses.weighted, losses.WeightedLoss, {}),
    (losses.weighted, losses.WeightedLoss, {"concentration": 2.0}),
    (losses.hardness_weighted, losses.HardnessWeightedLoss, {}),
    (losses.hardness_weighted, losses.HardnessWeightedLoss, {"strength": 2.5}),
]:
    for _negatives in ("views", "other_side", "second"):
        _case = _options | {"negatives": _negatives}
        CASES[f"{_function.__name__}, {', '.join(map(str, _case.values()))}"] = (_function, _module, _case)

every_loss = pytest.mark.parametrize("case", list(CASES))
FUNCTIONS = [losses.nt_xent, losses.info_nce, losses.debiased, losses.hard, losses.weighted, losses.hardness_weighted]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)


def sides(size=B, dtype=torch.float64):
    return torch.randn(2, size, D, dtype=dtype, requires_grad=True)


def random_mask(size=B, share=0.4):
    return torch.rand(size, size) < share


def call(function, first, second, **options):
    if function in (losses.debiased, losses.hard):
        options = {"class_prior": 0.1} | options
    return function(first, second, **{"temperature": T} | options)


def literal_loss(
    function, first, second, masked=None, *, negatives=None, symmetric=True, class_prior=0.0, concentration=1.0,
    strength=9.0, temperature=T,
):  # fmt: skip
    """Compute a loss pair by pair, as the papers write it."""
    if function is losses.nt_xent:
        negatives = "views"
    if function is losses.info_nce:
        negatives = "other_side" if symmetric else "second"
    unit = [[row / row.norm() for row in side] for side in (first.detach().double(), second.detach().double())]
    n = len(first)
    per_anchor = []
    for side, other in [(0, 1)] if negatives == "second" else [(0, 1), (1, 0)]:
        for i in range(n):
            similarities = []
            for compared in (0, 1) if negatives == "views" else (other,):
                for j in range(n):
                    pair = (j, i) if negatives == "other_side" and side == 1 else (i, j)  # (query, document)
                    if j != i and (masked is None or not masked[pair]):
                        similarities.append(float(unit[side][i] @ unit[compared][j]))
            positive = math.exp(unit[side][i] @ unit[other][i] / temperature)
            scores = [math.exp(similarity / temperature) for similarity in similarities]
            count = len(scores)
            if count == 0:
                per_anchor.append(0.0)
                continue
            if function is losses.hardness_weighted:
                pushing = sum(
                    math.exp(strength * similarity) * score
                    for similarity, score in zip(similarities, scores, strict=True)
                )
            elif function in (losses.hard, losses.weighted, losses.debiased):
                weights = [1.0 if function is losses.debiased else score**concentration for score in scores]
                mean = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
                true = max((mean - class_prior * positive) / (1 - class_prior), math.exp(-1 / temperature))
                pushing = count * true
            else:
                pushing = sum(scores)
            per_anchor.append(-math.log(positive / (positive + pushing)))
    return sum(per_anchor) / len(per_anchor)


# The values


@every_loss
@pytest.mark.parametrize("share_masked", [None, 0.4, 0.9])
def test_equals_a_literal_loop(case, share_masked):
    function, _, options = CASES[case]
    first, second = sides()
    masked = None if share_masked is None else random_mask(share=share_masked)
    loss = function(first, second, temperature=T, masked=masked, **options)
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    assert loss.item() == pytest.approx(literal_loss(function, first, second, masked, **options), rel=1e-9)


@every_loss
def test_has_the_gradient_of_its_value(case):
    function, _, options = CASES[case]
    masked = random_mask()
    masked[0] = True
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    first, second = sides()
    if function is losses.hardness_weighted:
        # The weights have no gradient, so the value's own slope is not the gradient.
        options = options | {"strength": 0.0}

    def value(first, second, temperature):
        return function(first, second, temperature=temperature, masked=masked, **options)

    assert torch.autograd.gradcheck(value, (first, second, temperature))


def test_hardness_weights_have_no_gradient():
    first, second = sides()
    loss = losses.hardness_weighted(first, second, temperature=T, strength=3.0, negatives="second")
    unit = [torch.nn.functional.normalize(side, dim=1) for side in (first, second)]
    cosine = unit[0] @ unit[1].T
    weights = (3.0 * cosine.detach()).exp().fill_diagonal_(1)
    scores = (cosine / T).exp()
    expected = -(scores.diagonal() / (weights * scores).sum(dim=1)).log().mean()
    for ours, theirs in zip(*(torch.autograd.grad(each, (first, second)) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_losses_that_are_each_other():
    first, second = sides()
    for negatives, plain in [
        ("views", losses.nt_xent(first, second, temperature=T)),
        ("other_side", losses.info_nce(first, second, temperature=T)),
        ("second", losses.info_nce(first, second, temperature=T, symmetric=False)),
    ]:
        same = {"temperature": T, "negatives": negatives}
        assert torch.isclose(losses.debiased(first, second, class_prior=0.0, **same), plain)
        assert torch.isclose(losses.weighted(first, second, concentration=0.0, **same), plain)
        assert torch.isclose(losses.hardness_weighted(first, second, strength=0.0, **same), plain)


def test_a_masked_pair_of_query_and_document_is_left_out_in_both_directions():
    queries, documents = sides()
    masked = torch.zeros(B, B, dtype=torch.bool)
    masked[1, 3] = True
    cosine = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(documents, dim=1).T
    logits = (cosine / T).masked_fill(masked, -torch.inf)
    target = torch.arange(B)
    rows, columns = (torch.nn.functional.cross_entropy(each, target) for each in (logits, logits.T))
    assert torch.isclose(losses.info_nce(queries, documents, temperature=T, masked=masked), (rows + columns) / 2)
    assert torch.isclose(losses.info_nce(queries, documents, temperature=T, masked=masked, symmetric=False), rows)


@every_loss
def test_masked_pairs_are_no_negatives(case):
    """Masked into two groups, a batch has the loss of the two groups as batches of their own."""
    function, _, options = CASES[case]
    first, second = sides()
    masked = torch.zeros(B, B, dtype=torch.bool)
    masked[:2, 2:] = masked[2:, :2] = masked[0, 0] = True
    of_parts = [
        function(first[part], second[part], temperature=T, **options) * len(first[part])
        for part in (slice(0, 2), slice(2, B))
    ]
    assert torch.isclose(function(first, second, temperature=T, masked=masked, **options), sum(of_parts) / B)


@every_function
def test_the_diagonal_of_the_mask_has_no_meaning(function):
    first, second = sides()
    masked = random_mask().fill_diagonal_(False)
    with_diagonal = masked | torch.eye(B, dtype=torch.bool)
    assert torch.equal(
        call(function, first, second, masked=masked), call(function, first, second, masked=with_diagonal)
    )


@every_loss
def test_an_anchor_without_negatives_adds_nothing(case):
    function, _, options = CASES[case]
    first, second = sides()
    loss = function(first, second, temperature=T, masked=torch.ones(B, B, dtype=torch.bool), **options)
    gradients = torch.autograd.grad(loss, (first, second))
    assert loss == 0
    assert all(torch.equal(each, torch.zeros(B, D, dtype=torch.float64)) for each in gradients)
    # Instance 0 is no anchor and nobody's negative, so the others' mean is the loss without it.
    masked = torch.zeros(B, B, dtype=torch.bool)
    masked[0] = masked[:, 0] = True
    loss = function(first, second, temperature=T, masked=masked, **options)
    others = function(first[1:], second[1:], temperature=T, **options)
    assert torch.isclose(loss, others * (B - 1) / B)
    for gradient in torch.autograd.grad(loss, (first, second)):
        assert torch.isfinite(gradient).all()
        assert not gradient[0].any()


# The temperature


@every_function
def test_a_temperature_can_be_learned(function):
    first, second = sides()
    log_scale = torch.tensor(1.2, requires_grad=True)
    loss = call(function, first, second, temperature=(-log_scale).exp())
    assert torch.isclose(loss, call(function, first, second, temperature=math.exp(-1.2)))
    loss.backward()
    step = 1e-5
    first, second = first.detach(), second.detach()
    up, down = (call(function, first, second, temperature=math.exp(-1.2 - d)) for d in (step, -step))
    assert float(log_scale.grad) == pytest.approx(float(up - down) / (2 * step), rel=1e-4)


def test_a_learned_temperature_is_compiled_in_one_graph():
    loss = losses.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.5)))
    first, second = sides()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.isclose(compiled(first, second), loss(first, second))


def test_a_learned_temperature_may_be_on_the_meta_device():
    with torch.device("meta"):
        assert losses.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.5))).temperature.is_meta


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e19, 1e37])
@every_function
def test_rows_of_any_length_have_the_same_loss(function, scale):
    first, second = (side.float() for side in sides())
    assert torch.isclose(call(function, scale * first, scale * second), call(function, first, second))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
@every_function
def test_rows_of_any_length_in_float64(function, scale):
    first, second = sides()
    assert torch.isclose(call(function, scale * first, scale * second), call(function, first, second))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@every_loss
def test_a_row_that_is_not_finite_shows_even_where_it_is_masked(case, side, value):
    function, _, options = CASES[case]
    both = sides()
    both[side].data[0, 1] = value
    masked = torch.zeros(B, B, dtype=torch.bool)
    masked[0] = masked[:, 0] = True
    for mask in (None, masked, torch.ones_like(masked)):
        assert not function(*both, temperature=T, masked=mask, **options).isfinite()


def test_a_module_refuses_a_temperature_that_it_would_not_compute_again():
    log_scale = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match=r"Give an nn.Parameter, or call info_nce\(.*\) in each step"):
        losses.InfoNCELoss(temperature=(-log_scale).exp())


def test_a_modules_temperature_is_a_parameter():
    loss = losses.InfoNCELoss(temperature=nn.Parameter(torch.tensor([0.5])))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(*sides()).backward()
    assert loss.temperature.grad.shape == (1,)
    assert list(losses.InfoNCELoss(temperature=0.5).parameters()) == []


# Precision


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_loses_nothing(case, dtype):
    """At a low temperature bfloat16's similarities would be off by whole units of the loss."""
    function, _, options = CASES[case]
    first, second = sides(size=40, dtype=dtype)
    masked = random_mask(40, share=0.1)
    exact = literal_loss(function, first, second, masked, temperature=0.02, **options)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = function(first, second, temperature=0.02, masked=masked, **options)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=1e-4)
        for gradient in torch.autograd.grad(loss, (first, second)):
            assert gradient.dtype == dtype
            assert torch.isfinite(gradient).all()


@every_loss
def test_losses_stay_finite_at_low_temperatures(case):
    function, _, options = CASES[case]
    first, second = sides(dtype=torch.float32)
    loss = function(first, second, temperature=0.01, **options)
    assert 0 <= loss < 400
    assert all(torch.isfinite(each).all() for each in torch.autograd.grad(loss, (first, second)))


@every_loss
def test_extreme_similarities_stay_finite(case):
    function, _, options = CASES[case]
    row = torch.tensor([1.0, 0, 0, 0])
    first = torch.stack([row, -row, row, -row, 0 * row]).requires_grad_()
    second = torch.stack([row, row, -row, -row, row]).requires_grad_()
    loss = function(first, second, temperature=0.005, **options)
    assert 0 < loss < 1000 * options.get("concentration", 1) + 10 * options.get("strength", 1)
    for gradient in torch.autograd.grad(loss, (first, second)):
        assert gradient.abs().max() < 1e4  # `normalize` gives an all-zero row a gradient of 1e12


def test_a_small_class_prior_is_subtracted_in_full():
    """At a low temperature the positive's score is so high that even a rare class weighs."""
    rows, score = torch.eye(3, dtype=torch.float64), math.exp(1 / 0.1)
    loss = losses.debiased(rows, rows, temperature=0.1, class_prior=1e-5, negatives="second")
    assert loss.item() == pytest.approx(math.log1p(2 * (1 - 1e-5 * score) / (1 - 1e-5) / score))


# Properties


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.sampled_from(list(CASES)), st.integers(0, 2**31))
def test_the_order_of_the_batch_is_of_no_account(size, case, seed):
    function, _, options = CASES[case]
    torch.manual_seed(seed)
    first, second = sides(size)
    masked, order = random_mask(size), torch.randperm(size)
    loss = function(first, second, temperature=T, masked=masked, **options)
    permuted = function(first[order], second[order], temperature=T, masked=masked[order][:, order], **options)
    assert torch.isclose(loss, permuted, rtol=1e-9)
    unmasked = function(first, second, temperature=T, masked=torch.zeros(size, size, dtype=torch.bool), **options)
    assert torch.equal(unmasked, function(first, second, temperature=T, **options))
    assert torch.isclose(unmasked, function(3 * first, second / 7, temperature=T, **options))
    assert loss <= unmasked + 1e-12 or function not in (losses.nt_xent, losses.info_nce, losses.hardness_weighted)


# Modules


@every_loss
def test_a_module_is_its_function(case):
    function, module, options = CASES[case]
    first, second = sides()
    masked = random_mask()
    loss = module(temperature=T, **options)
    for again in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(again(first, second), function(first, second, temperature=T, **options))
        assert torch.equal(
            again(first, second, masked), function(first, second, temperature=T, masked=masked, **options)
        )
    assert f"temperature={T}" in repr(loss)
    assert all(f"{name}={value!r}" in repr(loss) for name, value in options.items())
    of_numpy = {name: np.float64(value) if isinstance(value, float) else value for name, value in options.items()}
    assert repr(module(temperature=np.float64(T), **of_numpy)) == repr(loss)


@every_loss
def test_vmap_over_batches(case):
    function, _, options = CASES[case]
    firsts, seconds = torch.stack([sides().detach() for _ in range(3)], dim=1)
    losses_of_batches = torch.func.vmap(lambda first, second: function(first, second, temperature=T, **options))
    each = [function(first, second, temperature=T, **options) for first, second in zip(firsts, seconds, strict=True)]
    assert torch.allclose(losses_of_batches(firsts, seconds), torch.stack(each))


@every_loss
def test_vmap_over_masks(case):
    function, _, options = CASES[case]
    first, second = sides()
    masks = torch.stack([random_mask() for _ in range(3)])
    losses_of_masks = torch.func.vmap(lambda masked: function(first, second, temperature=T, masked=masked, **options))
    each = [function(first, second, temperature=T, masked=masked, **options) for masked in masks]
    assert torch.allclose(losses_of_masks(masks), torch.stack(each))


@every_loss
def test_a_module_hands_on_whether_to_gather(case):
    _, module, options = CASES[case]
    for gather in (False, True):
        loss = module(temperature=T, gather=gather, **options)
        loss.function = lambda *sides, **given: given
        assert loss(*sides())["gather"] is gather


def test_every_loss_is_there_twice():
    functions = {each for each in losses.__all__ if each[0].islower()}
    modules = {each.removesuffix("Loss").lower() for each in losses.__all__ if each[0].isupper()}
    assert modules == {name.replace("_", "") for name in functions}
    assert {case[0].__name__ for case in CASES.values()} == functions


def test_a_module_has_the_defaults_of_its_function():
    for function, module, _ in CASES.values():
        of_function, of_module = (inspect.signature(each).parameters for each in (function, module))
        assert {name: of_function[name].default for name in of_module} == {
            name: parameter.default for name, parameter in of_module.items()
        }


# Bad input

X = torch.ones(4, 2)


@every_function
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"first": X[:3]}, ValueError, r"must have the same shape.*\[3, 2\] and \[4, 2\]"),
        ({"second": X[:, :1]}, ValueError, r"must have the same shape.*\[4, 2\] and \[4, 1\]"),
        ({"first": X[0], "second": X[0]}, ValueError, r"must have shape \[B, d\] with d >= 1, got shape \[2\]"),
        ({"first": X[:, :0], "second": X[:, :0]}, ValueError, r"with d >= 1, got shape \[4, 0\]"),
        ({"second": X.to_sparse()}, TypeError, "must be a dense tensor of floats, got .* layout torch.sparse_coo"),
        ({"temperature": 1e-300}, ValueError, "temperature must be finite and above 0, got 1e-300"),
        ({"first": X[:1], "second": X[:1]}, ValueError, "has 1 row"),
        ({"first": X.int()}, TypeError, "must be a dense tensor of floats, got a tensor of dtype torch.int32"),
        ({"second": X.numpy()}, TypeError, "must be a dense tensor of floats, got an array of dtype float32"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": -torch.ones(())}, ValueError, "temperature must be finite and above 0, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and above 0, got nan"),
        (
            {"temperature": torch.ones(2)},
            TypeError,
            r"temperature must be a number or a tensor of one float, got.*\[2\]",
        ),
        ({"temperature": "0.1"}, TypeError, "temperature must be a number, got '0.1'"),
        ({"masked": torch.zeros(4, 3, dtype=torch.bool)}, ValueError, r"masked must have shape \[4, 4\], got \[4, 3\]"),
        ({"masked": torch.zeros(8, 8, dtype=torch.bool)}, ValueError, "gather=True takes all processes' mask"),
        ({"masked": torch.zeros(4, 4)}, TypeError, "masked must be a bool tensor, got a tensor of dtype torch.float32"),
        ({"masked": [[True]]}, TypeError, "masked must be a bool tensor, got a list of 1"),
    ],
    ids=str,
)
def test_refuses_bad_input(function, wrong, error, message):
    given = {"first": X, "second": X} | wrong
    with pytest.raises(error, match=message):
        call(function, given.pop("first"), given.pop("second"), **given)


PRIOR = {"class_prior": 0}


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("debiased", {"class_prior": 1}, ValueError, "class_prior must be at least 0 and below 1, got 1"),
        ("debiased", {"class_prior": math.nan}, ValueError, "class_prior must be at least 0 and below 1, got nan"),
        ("hard", {"class_prior": -0.1}, ValueError, "class_prior must be at least 0 and below 1, got -0.1"),
        ("hard", {"class_prior": None}, TypeError, "class_prior must be a number, got None"),
        ("hard", PRIOR | {"concentration": math.inf}, ValueError, "concentration must be finite and at least 0"),
        ("weighted", {"concentration": -1}, ValueError, "concentration must be finite and at least 0, got -1"),
        ("hardness_weighted", {"strength": -1}, ValueError, "strength must be finite and at least 0, got -1"),
        ("nt_xent", {"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ("info_nce", {"temperature": "a"}, TypeError, "temperature must be a number, got 'a'"),
        ("debiased", PRIOR | {"negatives": "towers"}, ValueError, "negatives must be one of .*got 'towers'"),
        ("hard", PRIOR | {"negatives": "towers"}, ValueError, "negatives must be one of .*got 'towers'"),
        ("weighted", {"negatives": "towers"}, ValueError, "negatives must be one of .*got 'towers'"),
        ("hardness_weighted", {"negatives": None}, ValueError, "negatives must be one of .*got None"),
    ],
)
def test_functions_and_modules_refuse_bad_options(name, wrong, error, message):
    function, module, _ = next(case for case in CASES.values() if case[0].__name__ == name)
    with pytest.raises(error, match=message):
        function(X, X, **{"temperature": T} | wrong)
    with pytest.raises(error, match=message):
        module(**{"temperature": T} | wrong)


def test_errors_name_the_sides_as_the_function_does():
    with pytest.raises(ValueError, match="queries and documents must have the same shape"):
        losses.info_nce(X, X[:3], temperature=T)


# Several processes


class Scaled(nn.Module):
    """A model and the temperature that it learns, for DDP."""

    def __init__(self, function, options):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(D, D).double()
        self.log_temperature = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.function, self.options = function, options

    def forward(self, both, masked):
        first, second = self.layer(both)
        temperature = self.log_temperature.exp()
        return self.function(first, second, temperature=temperature, masked=masked, gather=True, **self.options)


def loss_and_gradients(model, both, masked):
    loss = model(both, masked)
    loss.backward()
    return loss.detach(), [each.grad for each in model.parameters()]


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    both, masked = torch.load(f"{folder}/data.pt")
    results = {}
    for split in (4, 5):  # equal parts, and parts of 5 and 3
        own = slice(0, split) if rank == 0 else slice(split, None)
        for case, (function, _, options) in CASES.items():
            for mask in (None, masked):
                model = nn.parallel.DistributedDataParallel(Scaled(function, options))
                results[split, case, mask is None] = loss_and_gradients(model, both[:, own], mask)
    own_part = both[:, :4] if rank == 0 else both[:, 4:]
    refused = {}
    for name, side, mask in (
        ("width", own_part[0, :, : D - rank], None),
        ("mask", own_part[0], masked[:4, :4]),
    ):
        try:
            losses.nt_xent(side, side, temperature=T, masked=mask, gather=True)
        except ValueError as error:
            refused[name] = str(error)
    side = own_part[0].clone().requires_grad_()
    loss = losses.nt_xent(side, own_part[1], temperature=T, gather=True)
    (gradient,) = torch.autograd.grad(loss, side, create_graph=True)
    try:
        gradient.square().sum().backward()
    except RuntimeError as error:
        refused["second derivative"] = str(error)
    with torch.no_grad():
        one_row = losses.info_nce(both[0, rank : rank + 1], both[1, rank : rank + 1], temperature=T, gather=True)
    alone = losses.nt_xent(*own_part, temperature=T)  # without gather
    torch.save((results, refused, one_row, alone), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The mean of the losses, and DDP's gradients, are those of one process with the global batch."""
    both, masked = torch.randn(2, 8, D, dtype=torch.float64), random_mask(8, 0.3)
    masked[1] = True
    torch.save((both, masked), tmp_path / "data.pt")
    processes = mp.spawn(_on_rank, (str(tmp_path),), nprocs=2, join=False)
    try:
        assert any(processes.join(timeout=LIMIT) for _ in range(2))  # each call returns when a process ends
    finally:
        for process in processes.processes:
            process.kill()
    (results, refused, one_row, alone), (others, *rest) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for (split, case, is_unmasked), (loss, gradients) in results.items():
        function, _, options = CASES[case]
        mask = None if is_unmasked else masked
        expected, expected_gradients = loss_and_gradients(Scaled(function, options), both, mask)
        other_loss, other_gradients = others[split, case, is_unmasked]
        torch.testing.assert_close((loss + other_loss) / 2, expected)
        torch.testing.assert_close(gradients, expected_gradients)
        torch.testing.assert_close(other_gradients, expected_gradients)
    for each in (refused, rest[0]):
        assert "one width, got widths [4, 3]" in each["width"]
        assert "masked must have shape [8, 8], got [4, 4]" in each["mask"]
        assert "differentiate twice" in each["second derivative"]
    torch.testing.assert_close((one_row + rest[1]) / 2, losses.info_nce(*both[:, :2], temperature=T))
    torch.testing.assert_close(alone, losses.nt_xent(*both[:, :4], temperature=T))


@every_function
def test_three_processes_with_unequal_parts_have_the_loss_of_one(function, monkeypatch):
    both, sizes = torch.randn(2, 7, D, dtype=torch.float64), [3, 2, 2]
    unit = nn.functional.normalize(both, dim=2).transpose(0, 1)

    def all_gather(received, own):
        for each, part in zip(received, unit.split(sizes), strict=True):
            if own.is_floating_point():
                each[: len(part)] = part
            else:
                each.copy_(torch.tensor([len(part), D]))

    for name, value in (("is_initialized", True), ("get_world_size", 3)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    of_ranks = []
    for rank, part in enumerate(both.split(sizes, dim=1)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        of_ranks.append(call(function, *part, gather=True))
    torch.testing.assert_close(sum(of_ranks) / 3, call(function, *both))


def test_gather_changes_nothing_in_one_process():
    first, second = sides()
    assert torch.equal(
        losses.nt_xent(first, second, temperature=T, gather=True), losses.nt_xent(first, second, temperature=T)
    )


def test_a_learned_temperature_is_shown(recwarn):
    loss = losses.NTXentLoss(temperature=torch.nn.Parameter(torch.tensor(0.5)))
    assert repr(loss) == "NTXentLoss(temperature=0.5, gather=False)"
    assert "device='meta'" in repr(loss.to("meta"))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("nt_xent", []),
        ("debiased", ["class_prior"]),
        ("hard", ["class_prior", "concentration"]),
        ("hardness_weighted", ["strength"]),
    ],
)
def test_takes_any_real_number(name, numbers):
    one, other = torch.randn(2, 6, 3)
    function = getattr(losses, name)
    expected = function(one, other, **dict.fromkeys(["temperature", *numbers], 0.25))
    for kind in (Fraction, np.float32):
        assert torch.equal(function(one, other, **dict.fromkeys(["temperature", *numbers], kind(0.25))), expected)
