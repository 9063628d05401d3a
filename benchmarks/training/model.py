"""The model that all tasks train, and small networks for it."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from bs_lightning import BatchSamplerDataModule
from bs_lightning.recipes.schedules import cosine

Mask = Callable[[BatchSamplerDataModule], Tensor]


class Contrastive(LightningModule):
    """An encoder and a projector, trained to tell the two views of an instance from the others in the batch.

    Args:
        encoder: Inputs ``[n, ...]`` -> features ``[n, d]``.
        projector: Features -> embeddings, which the loss compares.
        loss: ``loss(first, second)`` -> scalar.
        mask: DataModule -> which pairs of the trained batch are not negatives, bool ``[B, B]``; the loss receives it as
            ``masked``.
        learning_rate: AdamW's learning rate at the start; it falls to zero along a cosine.
        steps: Training steps in total.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        loss: Callable[..., Tensor],
        learning_rate: float,
        steps: int,
        mask: Mask | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.loss = loss
        self.mask = mask
        self.learning_rate = learning_rate
        self.steps = steps

    def embed(self, batch: Tensor) -> Tensor:
        """Return what the loss compares, and what batches are composed from."""
        return self.projector(self.encoder(batch))

    def training_step(self, views: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of views ``[2, B, ...]``, and the embeddings for ``recycle=True``."""
        first, second = self.embed(views.flatten(0, 1)).chunk(2)
        masked = {} if self.mask is None else {"masked": self.mask(self.trainer.datamodule)}  # type: ignore[attr-defined]
        return {"loss": self.loss(first, second, **masked), "embeddings": torch.cat([first, second], dim=1).detach()}

    def configure_optimizers(self) -> Any:
        """Return AdamW with a learning rate that falls along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-6, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(min(step / max(self.steps, 1), 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def embed_sides(model: Any, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings of both sides ``[2, b, ...]``, each ``[b, d]``."""
    first, second = model.embed(sides.flatten(0, 1)).chunk(2)
    return first, second


@torch.no_grad()
def apply_in_chunks(module: nn.Module, inputs: Tensor, size: int = 1024) -> Tensor:
    """Return a module's outputs in eval mode; the module's mode is restored."""
    was_training = module.training
    module.eval()
    outputs = torch.cat([module(chunk) for chunk in inputs.split(size)])
    module.train(was_training)
    return outputs


def convolution(
    n_in: int, n_out: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Return a 3 x 3 convolution with norm and ReLU."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), norm(n_out), nn.ReLU())


def perceptron(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    """Return a perceptron with one hidden layer and batch norm."""
    return nn.Sequential(
        nn.Linear(n_in, n_hidden, bias=False), nn.BatchNorm1d(n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_out)
    )
