"""MoCo v3: queries with a predictor, keys of a momentum encoder, and a symmetric loss without a queue.

Run it as ``python -m bs_lightning.recipes moco_v3 fit --config examples/moco_v3.yaml``.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bs_lightning._checks import check_number
from bs_lightning.losses import InfoNCELoss
from bs_lightning.recipes.image_encoder import Standardize, feature_width
from bs_lightning.recipes.probes import ProbedModule
from bs_lightning.recipes.resnet import ResNet18
from bs_lightning.recipes.schedules import cosine, n_steps


class MoCoV3(ProbedModule):
    """MoCo v3 for small images. Train it with :class:`~bs_lightning.recipes.images.ImageData`.

    A query is compared with the keys of the other view of all images in the batch. With several processes, the keys
    come from all of them. Batches are composed from queries and keys, because the loss compares them: ``embed`` returns
    both sides.

    The momentum encoder follows the weights after each step of the optimizer, and at no other time. Encoding pools does
    not move it.

    Args:
        encoder: Images ``[n, 3, h, w]`` -> features ``[n, encoder.num_features]``. ``None`` is
            :class:`~bs_lightning.recipes.resnet.ResNet18`. A model of the library timm fits, if made with
            ``num_classes=0``.
        temperature: What similarities are divided by.
        momentum: The share of its weights that the momentum encoder keeps in a step, at the start of training. The
            share rises to 1 along a cosine. In training without a known end it stays the same.
        hidden_width: Width of the hidden layers of projector and predictor.
        embedding_width: Width of queries and keys.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
        masked: Whether the loss leaves out the pairs that ``datamodule.likely_false_negatives()`` marks. It needs a
            rule that marks them.

    Raises:
        TypeError: If ``encoder`` has no integer ``num_features``, or ``temperature`` or ``momentum`` is not a number.
        ValueError: If ``temperature`` is not finite and above 0, or ``momentum`` lies outside ``[0, 1]``.

    Example::

        from lightning import Trainer
        from bs_lightning import BatchSamplerCallback
        from bs_lightning.recipes.images import ImageData
        from bs_lightning.recipes.moco_v3 import MoCoV3

        data = ImageData("cifar10/train-00000-of-00001.parquet", test="cifar10/test-00000-of-00001.parquet")
        trainer = Trainer(max_epochs=200, callbacks=BatchSamplerCallback())
        trainer.fit(MoCoV3(), datamodule=data)
        trainer.test(datamodule=data)

    Source: Chen et al., "An empirical study of training self-supervised vision transformers", ICCV 2021,
    arXiv 2104.02057, algorithm 1. Widths are smaller, and the optimizer is AdamW with a constant learning rate, for
    small images.
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        *,
        temperature: float = 0.2,
        momentum: float = 0.99,
        hidden_width: int = 1024,
        embedding_width: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-6,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= check_number("momentum", momentum) <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}. 0.99 is usual.")
        self.save_hyperparameters(ignore="encoder")
        self.loss = InfoNCELoss(temperature=temperature, symmetric=False, gather=True)
        encoder = ResNet18() if encoder is None else encoder
        self.encoder = nn.Sequential(Standardize(), encoder)
        self.projector = nn.Sequential(
            *_perceptron(feature_width(encoder), hidden_width, embedding_width),
            nn.BatchNorm1d(embedding_width, affine=False),
        )
        self.predictor = _perceptron(embedding_width, hidden_width, embedding_width)
        self.momentum_encoder = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)

    def queries(self, images: Tensor) -> Tensor:
        """Return queries ``[b, embedding_width]``."""
        queries: Tensor = self.predictor(self.projector(self.encoder(images)))
        return queries

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Return keys ``[b, embedding_width]``, without a gradient."""
        keys: Tensor = self.momentum_encoder(images)
        return keys

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the loss compares, and what batches are composed from: queries and keys."""
        return self.queries(images), self.keys(images)

    def training_step(self, views: Tensor, batch_idx: int) -> dict[str, Any]:
        """Return the loss of two views of each image, and the embeddings that ``recycle=True`` keeps."""
        first, second = views  # one view at a time, so that each has batch norm's statistics to itself
        queries = self.queries(first), self.queries(second)
        keys = self.keys(first), self.keys(second)
        masked = self.trainer.datamodule.likely_false_negatives() if self.hparams.masked else None
        both = self.loss(queries[0], keys[1], masked) + self.loss(queries[1], keys[0], masked)
        loss = 2 * self.hparams.temperature * both  # so scaled, the gradient depends little on the temperature
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(first))
        return {"loss": loss, "embeddings": (queries[0].detach(), keys[0])}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the momentum encoder follow.

        ``on_train_batch_end`` would be too late for a checkpoint that a callback saves there, and too often where
        gradients are accumulated.
        """
        super().optimizer_step(*args, **kwargs)
        progress = self.trainer.global_step / n_steps(self.trainer)
        self.follow(1 - (1 - self.hparams.momentum) * cosine(progress))

    def on_fit_start(self) -> None:
        """Refuse weights in half precision."""
        if self.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"The momentum encoder's weights are {self.dtype}, which rounds most of its small steps away. Use "
                'Trainer(precision="bf16-mixed").'
            )

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the weights of the momentum encoder towards the encoder's.

        Args:
            momentum: The share of its weights that the momentum encoder keeps.
        """
        followed = [*self.encoder.parameters(), *self.projector.parameters()]
        for own, other in zip(self.momentum_encoder.parameters(), followed, strict=True):
            own.lerp_(other, 1 - momentum)

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)


def _perceptron(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    """Return a perceptron with one hidden layer and batch norm."""
    return nn.Sequential(
        nn.Linear(n_in, n_hidden, bias=False),
        nn.BatchNorm1d(n_hidden),
        nn.ReLU(),
        nn.Linear(n_hidden, n_out, bias=False),
    )
