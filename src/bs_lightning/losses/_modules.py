"""The losses as modules, which hold the options."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bs_lightning.losses._functions import debiased, hard, hardness_weighted, info_nce, nt_xent, weighted
from bs_lightning.losses._rows import (
    Negatives,
    check_class_prior,
    check_factor,
    check_negatives,
    check_temperature,
)


class _PairLoss(nn.Module):
    """Holds a loss function's options. An ``nn.Parameter`` as temperature is one of the module's parameters."""

    temperature: float | Tensor

    def __init__(self, function: Callable[..., Tensor], temperature: float | Tensor, **options: Any) -> None:
        super().__init__()
        self.function = function
        self.temperature = check_temperature(temperature)
        if isinstance(temperature, Tensor) and temperature.grad_fn is not None:
            raise ValueError(
                "temperature was computed from another tensor, and this module would never compute it again. Give an "
                f"nn.Parameter, or call {function.__name__}(..., temperature=...) in each step."
            )
        self.options = options

    def forward(self, first: Tensor, second: Tensor, masked: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch; see the function."""
        return self.function(first, second, temperature=self.temperature, masked=masked, **self.options)

    def extra_repr(self) -> str:
        """Show the options."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach() if temperature.is_meta else temperature.item()
        shown = {"temperature": temperature, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class NTXentLoss(_PairLoss):
    """Compute :func:`nt_xent`: ``loss(first, second, masked=None)``, with two views of shape ``[B, d]``.

    Args:
        temperature: What similarities are divided by: a float, or an ``nn.Parameter`` of one float, which is learned.
        gather: Whether negatives come from all processes.

    Raises:
        TypeError: If ``temperature`` is neither a number nor a tensor of one float.
        ValueError: If ``temperature`` is not finite and above 0.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import NTXentLoss
        >>> NTXentLoss(temperature=0.5)(torch.eye(3), torch.eye(3))
        tensor(0.4327)

    Source: Chen et al., ICML 2020, arXiv 2002.05709, equation 1.
    """

    def __init__(self, *, temperature: float | Tensor, gather: bool = False) -> None:
        super().__init__(nt_xent, temperature, gather=gather)


class InfoNCELoss(_PairLoss):
    """Compute :func:`info_nce`: ``loss(first, second, masked=None)``, with queries and documents of shape ``[B, d]``.

    Args:
        temperature: What similarities are divided by: a float, or an ``nn.Parameter`` of one float, which is learned.
        symmetric: ``False`` takes queries as anchors only.
        gather: Whether negatives come from all processes.

    Raises:
        TypeError: If ``temperature`` is neither a number nor a tensor of one float.
        ValueError: If ``temperature`` is not finite and above 0.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import InfoNCELoss
        >>> InfoNCELoss(temperature=0.5)(torch.eye(3), torch.eye(3))
        tensor(0.2395)

    Source: van den Oord et al., arXiv 1807.03748, equation 4; Radford et al., ICML 2021, arXiv 2103.00020, figure 3.
    """

    def __init__(self, *, temperature: float | Tensor, symmetric: bool = True, gather: bool = False) -> None:
        super().__init__(info_nce, temperature, symmetric=symmetric, gather=gather)


class DebiasedLoss(_PairLoss):
    """Compute :func:`debiased`: ``loss(first, second, masked=None)``, with sides of shape ``[B, d]``.

    Args:
        temperature: What similarities are divided by: a float, or an ``nn.Parameter`` of one float, which is learned.
        class_prior: Probability that a negative has the anchor's hidden class, in ``[0, 1)``.
        negatives: ``"views"``, ``"other_side"`` or ``"second"``; see :func:`debiased`.
        gather: Whether negatives come from all processes.

    Raises:
        TypeError: If ``temperature`` or ``class_prior`` is of the wrong kind.
        ValueError: If a value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import DebiasedLoss
        >>> DebiasedLoss(temperature=0.5, class_prior=0.1)(torch.eye(3), torch.eye(3))
        tensor(0.1459)

    Source: Chuang et al., NeurIPS 2020, arXiv 2007.00224, the loss L_Debiased^{N,M} with M = 1.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor,
        class_prior: float,
        negatives: Negatives = "views",
        gather: bool = False,
    ) -> None:
        class_prior = check_class_prior(class_prior)
        check_negatives(negatives)
        super().__init__(debiased, temperature, class_prior=class_prior, negatives=negatives, gather=gather)


class HardLoss(_PairLoss):
    """Compute :func:`hard`: ``loss(first, second, masked=None)``, with sides of shape ``[B, d]``.

    Args:
        temperature: What similarities are divided by: a float, or an ``nn.Parameter`` of one float, which is learned.
        class_prior: Probability that a negative has the anchor's hidden class, in ``[0, 1)``.
        concentration: How strongly similar negatives count, at least 0.
        negatives: ``"views"``, ``"other_side"`` or ``"second"``; see :func:`hard`.
        gather: Whether negatives come from all processes.

    Raises:
        TypeError: If ``temperature``, ``class_prior`` or ``concentration`` is of the wrong kind.
        ValueError: If a value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import HardLoss
        >>> first, second = torch.tensor([[[1.0, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [1, 0]]])
        >>> HardLoss(temperature=0.5, class_prior=0.1)(first, second)
        tensor(1.3253)

    Source: Robinson et al., ICLR 2021, arXiv 2010.04592, section 3.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor,
        class_prior: float,
        concentration: float = 1.0,
        negatives: Negatives = "views",
        gather: bool = False,
    ) -> None:
        class_prior = check_class_prior(class_prior)
        concentration = check_factor("concentration", concentration)
        check_negatives(negatives)
        super().__init__(
            hard,
            temperature,
            class_prior=class_prior,
            concentration=concentration,
            negatives=negatives,
            gather=gather,
        )


class WeightedLoss(_PairLoss):
    """Compute :func:`weighted`: ``loss(first, second, masked=None)``, with sides of shape ``[B, d]``.

    Args:
        temperature: What similarities are divided by: a float, or an ``nn.Parameter`` of one float, which is learned.
        concentration: How strongly similar negatives count, at least 0.
        negatives: ``"views"``, ``"other_side"`` or ``"second"``; see :func:`weighted`.
        gather: Whether negatives come from all processes.

    Raises:
        TypeError: If ``temperature`` or ``concentration`` is of the wrong kind.
        ValueError: If a value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import WeightedLoss
        >>> WeightedLoss(temperature=0.5)(torch.eye(3), torch.eye(3))
        tensor(0.4327)

    Source: Robinson et al., ICLR 2021, arXiv 2010.04592, section 3, with a class prior of 0.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor,
        concentration: float = 1.0,
        negatives: Negatives = "views",
        gather: bool = False,
    ) -> None:
        concentration = check_factor("concentration", concentration)
        check_negatives(negatives)
        super().__init__(weighted, temperature, concentration=concentration, negatives=negatives, gather=gather)


class HardnessWeightedLoss(_PairLoss):
    """Compute :func:`hardness_weighted`: ``loss(first, second, masked=None)``, with sides of shape ``[B, d]``.

    Args:
        temperature: What similarities are divided by: a float, or an ``nn.Parameter`` of one float, which is learned.
        strength: How strongly similar negatives count, at least 0.
        negatives: ``"views"``, ``"other_side"`` or ``"second"``; see :func:`hardness_weighted`.
        gather: Whether negatives come from all processes.

    Raises:
        TypeError: If ``temperature`` or ``strength`` is of the wrong kind.
        ValueError: If a value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import HardnessWeightedLoss
        >>> HardnessWeightedLoss(temperature=0.5, negatives="second")(torch.eye(3), torch.eye(3))
        tensor(0.2395)

    Source: Lan et al., Findings of EMNLP 2025, arXiv 2503.04812, equation 5.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor,
        strength: float = 9.0,
        negatives: Negatives = "views",
        gather: bool = False,
    ) -> None:
        strength = check_factor("strength", strength)
        check_negatives(negatives)
        super().__init__(hardness_weighted, temperature, strength=strength, negatives=negatives, gather=gather)
