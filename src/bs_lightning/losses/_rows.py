"""Two sides of a batch -> each anchor's positive and negatives, over the processes too."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bs_lightning._checks import check_number, kind_of
from bs_lightning._embeddings import are_floats, to_device, unit_rows_with_gradient

Negatives = Literal["views", "other_side", "second"]
"""Which rows an anchor's negatives are; see :func:`anchor_rows`."""
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # smaller ones are 0 to most devices, and all losses NaN
_NEGATIVES = get_args(Negatives)  # not within a function: torch before 2.9 does not compile the call


@dataclass(frozen=True)
class AnchorRows:
    """Cosine similarity / temperature of this process's anchors: a row an anchor, a column a candidate.

    Args:
        positive: Floats ``[R]``, of each anchor and its positive.
        logits: Floats ``[R, C]``, of each anchor and all candidates.
        is_negative: bool ``[R, C]``: which candidates are the anchor's negatives.
        temperature: A float, or a scalar tensor that may have a gradient.
        share: What a row's loss counts in the sum. The mean of all processes' sums is then the mean over all rows.
    """

    positive: Tensor
    logits: Tensor
    is_negative: Tensor
    temperature: float | Tensor
    share: float

    def log_sum(self, values: Tensor) -> Tensor:
        """Return log(sum(exp(values))) over each anchor's negatives, ``[R]``.

        An anchor without negatives gets the sum over all its candidates, because infinities have no finite gradient.
        :meth:`mean_loss` leaves its loss out.
        """
        counts = self.is_negative | ~self.is_negative.any(dim=1, keepdim=True)
        return values.masked_fill(~counts, -torch.inf).logsumexp(dim=1)

    def log_count(self) -> Tensor:
        """Return the logarithm of the number of each anchor's negatives, ``[R]``; 0 where there are none."""
        return self.is_negative.sum(dim=1).clamp_min(1).to(self.logits.dtype).log()

    def mean_loss(self, log_negatives: Tensor) -> Tensor:
        """Return the mean over anchors of ``-log(exp(positive) / (exp(positive) + exp(log_negatives)))``."""
        return self.mean(torch.nn.functional.softplus(log_negatives - self.positive))

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean of the anchors' losses ``[R]``. An anchor without negatives counts as 0.

        Multiplied, not filled: an anchor that is not finite makes the mean NaN, with or without negatives.
        """
        return (losses * self.is_negative.any(dim=1)).sum() * self.share


def anchor_rows(
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    masked: Tensor | None,
    negatives: Negatives,
    gather: bool,
    names: tuple[str, str] = ("first", "second"),
) -> AnchorRows:
    """Compare the two sides of a batch in float32, or in float64 where a side is float64.

    Args:
        first: Floats ``[B, d]``.
        second: Floats ``[B, d]``.
        temperature: What cosine similarities are divided by.
        masked: bool ``[B, B]``: the pairs that are not negatives, of all processes if ``gather``.
        negatives: ``"views"``: each row of both sides is an anchor, and the rows of both sides of the other instances
            are its negatives. ``"other_side"``: each row of both sides is an anchor, and its negatives are on the other
            side only. ``"second"``: the rows of ``first`` are the anchors, and their negatives are in ``second``.
        gather: Whether the candidates come from all processes.
        names: What the caller calls the two sides, for errors.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a shape or a value is wrong.
    """
    check_negatives(negatives)
    temperature = check_temperature(temperature)
    _check_sides(first, second, names)
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(())
    with torch.autocast(first.device.type, enabled=False):
        own = torch.stack([unit_rows_with_gradient(first.to(dtype)), unit_rows_with_gradient(second.to(dtype))])
        everyone, start, n_processes = _gathered(own) if gather else (own, 0, 1)
        size = everyone.shape[1]
        if size < 2:
            raise ValueError(f"{names[0]} has {size} row. An instance's negatives are the others: give 2 or more.")
        differs = ~torch.eye(size, dtype=torch.bool, device=own.device)
        if masked is not None:
            _check_mask(masked, size, gather)
            differs = differs & ~to_device(masked, own.device)  # not in place, which `vmap` over masks does not allow
        mine = slice(start, start + own.shape[1])
        positive = (own[0] * own[1]).sum(dim=1)
        if negatives == "views":
            similarity = own.flatten(0, 1) @ everyone.flatten(0, 1).T
            positive, is_negative = positive.repeat(2), differs[mine].repeat(2, 2)
        elif negatives == "other_side":
            similarity = torch.cat([own[0] @ everyone[1].T, own[1] @ everyone[0].T])
            positive, is_negative = positive.repeat(2), torch.cat([differs[mine], differs.T[mine]])
        else:
            similarity = own[0] @ everyone[1].T
            is_negative = differs[mine]
    n_rows = size if negatives == "second" else 2 * size
    share = n_processes / n_rows
    return AnchorRows(positive / temperature, similarity / temperature, is_negative, temperature, share)


# Several processes


def _gathered(own: Tensor) -> tuple[Tensor, int, int]:
    """Return the sides ``[2, B, d]`` of all processes, where the own rows start, and how many processes there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return own, 0, 1
    rank, n_processes = dist.get_rank(), dist.get_world_size()
    shape = torch.tensor(own.shape[1:], device=own.device)
    shapes = [torch.empty_like(shape) for _ in range(n_processes)]
    dist.all_gather(shapes, shape)
    sizes, widths = torch.stack(shapes).T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"gather=True needs embeddings of one width, got widths {widths} from the processes.")
    everyone: Tensor = _GatherRows.apply(own.transpose(0, 1), sizes, rank)  # type: ignore[no-untyped-call]
    return everyone.transpose(0, 1), sum(sizes[:rank]), n_processes


class _GatherRows(torch.autograd.Function):
    """Concatenates the rows of all processes. A row's gradient is the sum of its gradients in all processes.

    ``torch.distributed.nn.functional.all_gather`` is deprecated, and wants equally many rows from each process. The
    last batch of an epoch may be shared out unevenly.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.sizes)[ctx.rank], None, None


# Checks


def check_negatives(negatives: Any) -> None:
    """Reject what is not one of :data:`Negatives`.

    Raises:
        ValueError: Naming the value and the choices.
    """
    if negatives not in _NEGATIVES:
        raise ValueError(f"negatives must be one of {list(_NEGATIVES)}, got {negatives!r}.")


def check_temperature(temperature: Any) -> float | Tensor:
    """Return a temperature as a float or a tensor. Reject what is not finite and above 0 in float32.

    A tensor's value is not read on a GPU, which would have to be waited for. Nor is it read on the meta device, nor
    while ``torch.compile`` traces the loss.

    Raises:
        TypeError: If it is neither a number nor a tensor of one float.
        ValueError: Naming the value.
    """
    if not isinstance(temperature, Tensor):
        value = check_number("temperature", temperature)
    elif temperature.numel() == 1 and temperature.is_floating_point():
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return temperature
        value = temperature.item()
    else:
        shape, dtype = list(temperature.shape), temperature.dtype
        raise TypeError(f"temperature must be a number or a tensor of one float, got shape {shape} and {dtype}.")
    if not _LEAST_TEMPERATURE <= value < math.inf:
        raise ValueError(
            f"temperature must be finite and above 0, got {value}. To learn it, learn its logarithm and give exp()."
        )
    return temperature if isinstance(temperature, Tensor) else value


def check_class_prior(class_prior: Any) -> float:
    """Return a class prior as a float. Reject what is not a number in [0, 1).

    Raises:
        TypeError: If it is not a number.
        ValueError: Naming the value.
    """
    number = check_number("class_prior", class_prior)
    if not 0 <= number < 1:
        raise ValueError(
            f"class_prior must be at least 0 and below 1, got {class_prior}. With C classes of equal size give 1 / C."
        )
    return number


def check_factor(name: str, factor: Any) -> float:
    """Return a factor as a float. Reject what is not a finite number of at least 0.

    Raises:
        TypeError: If it is not a number.
        ValueError: Naming the argument and the value.
    """
    number = check_number(name, factor)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {factor}. 0 gives all negatives equal weight.")
    return number


def _check_sides(first: Any, second: Any, names: tuple[str, str]) -> None:
    for name, side in zip(names, (first, second), strict=True):
        if not isinstance(side, Tensor) or not are_floats(side):
            raise TypeError(f"{name} must be a dense tensor of floats, got {kind_of(side)}.")
        if side.ndim != 2 or side.shape[1] < 1:
            raise ValueError(f"{name} must have shape [B, d] with d >= 1, got shape {list(side.shape)}.")
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, since row i of both is one instance; "
            f"got shapes {list(first.shape)} and {list(second.shape)}."
        )


def _check_mask(masked: Any, size: int, gather: bool) -> None:
    if not isinstance(masked, Tensor) or masked.dtype != torch.bool:
        convert = "Convert it: torch.as_tensor(masked, dtype=torch.bool)."
        raise TypeError(f"masked must be a bool tensor, got {kind_of(masked)}. {convert}")
    if masked.shape != (size, size):
        whose = "all processes" if gather else "this process; gather=True takes all processes' mask"
        raise ValueError(
            f"masked must have shape [{size}, {size}], got {list(masked.shape)}: a row and a column for each instance "
            f"of {whose}."
        )
