"""SimCLR: two views of each image, an encoder and a projector, and the NT-Xent loss.

Run it as ``python -m bs_lightning.recipes simclr fit --config examples/simclr.yaml``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bs_lightning.losses import NTXentLoss
from bs_lightning.recipes.image_encoder import Standardize, feature_width
from bs_lightning.recipes.probes import ProbedModule
from bs_lightning.recipes.resnet import ResNet18


class SimCLR(ProbedModule):
    """SimCLR for small images. Train it with :class:`~bs_lightning.recipes.images.ImageData`.

    Batches are composed from the projections, because the loss compares them. With several processes, the negatives
    come from all of them.

    Args:
        encoder: Images ``[n, 3, h, w]`` -> features ``[n, encoder.num_features]``. ``None`` is
            :class:`~bs_lightning.recipes.resnet.ResNet18`. A model of the library timm fits, if made with
            ``num_classes=0``.
        temperature: What similarities are divided by.
        embedding_width: Width of the projections.
        learning_rate: Adam's learning rate.
        weight_decay: Adam's weight decay.
        masked: Whether the loss leaves out the pairs that ``datamodule.likely_false_negatives()`` marks. It needs a
            rule that marks them.

    Raises:
        TypeError: If ``encoder`` has no integer ``num_features``, or ``temperature`` is not a number.
        ValueError: If ``temperature`` is not finite and above 0.

    Example::

        from lightning import Trainer
        from bs_lightning import BatchSamplerCallback
        from bs_lightning.recipes.images import ImageData
        from bs_lightning.recipes.simclr import SimCLR

        data = ImageData("cifar10/train-00000-of-00001.parquet", test="cifar10/test-00000-of-00001.parquet")
        trainer = Trainer(max_epochs=200, callbacks=BatchSamplerCallback())
        trainer.fit(SimCLR(), datamodule=data)
        trainer.test(datamodule=data)

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020,
    arXiv 2002.05709. The optimizer is BatchSampler's, arXiv 2306.03355: Adam with a constant learning rate.
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        *,
        temperature: float = 0.5,
        embedding_width: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-6,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="encoder")
        self.loss = NTXentLoss(temperature=temperature, gather=True)
        encoder = ResNet18() if encoder is None else encoder
        width = feature_width(encoder)
        self.encoder = nn.Sequential(Standardize(), encoder)
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, embedding_width)
        )

    def embed(self, images: Tensor) -> Tensor:
        """Return what the loss compares, and what batches are composed from: projections ``[b, embedding_width]``."""
        projections: Tensor = self.projector(self.encoder(images))
        return projections

    def training_step(self, views: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of two views of each image, and the embeddings that ``recycle=True`` keeps."""
        first, second = self.embed(views.flatten(0, 1)).chunk(2)
        masked = self.trainer.datamodule.likely_false_negatives() if self.hparams.masked else None
        loss = self.loss(first, second, masked)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(first))
        return {"loss": loss, "embeddings": torch.cat([first, second], dim=1).detach()}

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        rates = {"lr": self.hparams.learning_rate, "weight_decay": self.hparams.weight_decay}
        return torch.optim.Adam(self.parameters(), **rates)
