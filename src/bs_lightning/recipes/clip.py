"""CLIP: a tower for images and a tower for texts, trained on images with captions.

Source: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021,
arXiv 2103.00020: figure 3 and section 2.5 for the loss, its learned scale, weight decay and random crops.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bs_lightning import BatchSamplerDataModule
from bs_lightning.losses import info_nce
from bs_lightning.recipes.schedules import cosine, with_decay
from bs_lightning.recipes.text_data import evaluation_loader
from bs_lightning.recipes.text_encoder import (
    Pooling,
    TextEncoder,
    Tokenize,
    Tokens,
    load_model,
    load_tokenizer,
    model_width,
)
from bs_lightning.recipes.text_evaluation import retrieval
from bs_lightning.recipes.text_files import check_columns, is_table, pair_groups, read_pairs, require

Batch = tuple[Tensor, Tokens]
"""Images, float32 ``[b, 3, height, width]``, and the tokens of their texts."""


class CLIP(LightningModule):
    """Train embeddings of images and texts, each image near its text.

    Args:
        image_model: A Hugging Face model of images, or its name or folder. Or a module that turns images, floats
            ``[b, 3, height, width]``, into embeddings ``[b, width]``, such as a ResNet with a last layer of that width.
        text_model: A Hugging Face model of texts, or its name or folder.
        width: Numbers in an embedding.
        pooling: ``"cls"`` or ``"mean"`` for texts; see :class:`~bs_lightning.recipes.text_encoder.TextEncoder`.
        learning_rate: AdamW's, at the start. It falls to zero as a cosine does. CLIP from scratch has 5e-4.
        weight_decay: AdamW's. Biases, factors of norms, and the scale of the logits have none.

    Raises:
        ImportError: If a model is a name and transformers is not installed.
        TypeError: If a Hugging Face model has two sides, such as a whole CLIP.
        ValueError: If ``pooling`` is neither of them.

    Example::

        from bs_lightning import BatchSamplerCallback
        from bs_lightning.recipes.clip import CLIP, ImageTextData
        from lightning import Trainer

        data = ImageTextData("captions.tsv", "bert-base-uncased", validation_pairs="test.tsv")
        trainer = Trainer(callbacks=BatchSamplerCallback(), max_epochs=10)
        trainer.fit(CLIP("google/vit-base-patch16-224-in21k", "bert-base-uncased"), datamodule=data)
    """

    def __init__(
        self,
        image_model: str | nn.Module,
        text_model: str | nn.Module,
        width: int = 512,
        pooling: Pooling = "cls",
        learning_rate: float = 5e-5,
        weight_decay: float = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_model", "text_model"])
        self.images = ImageEncoder(image_model, width)
        self.texts = TextEncoder(text_model, pooling)
        self.text_projection = nn.Linear(self.texts.width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the embeddings of images and of texts, floats ``[b, width]`` each."""
        images, texts = batch
        return self.images(images), self.text_projection(self.texts(texts))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compare images with texts in both directions, with a learned scale of at most 100.

        ``recycle=True`` keeps both sides.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))
        images, texts = self.embed(batch)
        loss = info_nce(
            images,
            texts,
            temperature=(-self.log_scale).exp(),
            masked=self.trainer.datamodule.likely_false_negatives(),
            gather=True,
        )
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(images))
        self.log("train/scale", self.log_scale.detach().exp())
        return {"loss": loss, "embeddings": (images.detach(), texts.detach())}

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self.embedded: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed images and texts."""
        self.embedded.append(self.embed(batch))

    def on_validation_epoch_end(self) -> None:
        """Log how well texts are found by images, and images by texts."""
        images, texts = (torch.cat(side) for side in zip(*self.embedded, strict=True))
        self.embedded.clear()
        pairs = self.trainer.datamodule.validation_dataset.names()[: len(images)]
        found = retrieval(images, texts, pairs)
        self.log_dict({f"image_to_text/{name}": value for name, value in found.items()}, sync_dist=True)
        found = retrieval(texts, images, [(text, image) for image, text in pairs])
        self.log_dict({f"text_to_image/{name}": value for name, value in found.items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW, and its decay to zero as a cosine."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0},
        ]
        optimizer = torch.optim.AdamW(groups, self.learning_rate, weight_decay=self.weight_decay)
        return with_decay(optimizer, self.trainer, cosine)


class ImageEncoder(nn.Module):
    """A Hugging Face model of images and a projection, or a module that gives embeddings itself.

    Args:
        model: The model, or its name or folder. A module that gives embeddings itself, and so has no ``config``, keeps
            its mode: parts of it may be frozen.
        width: Numbers in an embedding.
    """

    def __init__(self, model: str | nn.Module, width: int) -> None:
        super().__init__()
        gives_embeddings = isinstance(model, nn.Module) and getattr(model, "config", None) is None
        self.model: Any = model if gives_embeddings else load_model(model)
        self.projection: nn.Linear | None = None
        if not gives_embeddings:
            self.projection = nn.Linear(model_width(self.model, "transformers.CLIPVisionModel"), width, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of images, floats ``[b, width]``."""
        output: Any = self.model(images)
        if self.projection is None:
            embeddings: Tensor = output
        else:
            pooled = output.pooler_output
            features = output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)
            embeddings = self.projection(features)
        return embeddings


class ImageTextData(BatchSamplerDataModule):
    """Images with captions, to train on and to validate on.

    Two pairs with the same image or caption are not each other's negatives. Images are the same if they have one path,
    or are one object of a list. The images of a ``datasets.Dataset`` all count as different: where one has several
    captions, override :meth:`train_groups`.
    Images are cut to squares: at random along the longer side in training, in the middle for encoding and validation.

    Args:
        pairs: The path of a file with the path of an image and a caption a line and a tab between them; relative paths
            start at that file's folder. Or a ``datasets.Dataset``, or pairs of a Pillow image or a path, and a string.
        tokenizer: A Hugging Face tokenizer, or its name or folder.
        batch_size: Pairs per batch and process.
        validation_pairs: The same as ``pairs``, to validate on.
        columns: The two columns of a ``datasets.Dataset``: Pillow images, as its feature ``Image`` gives, and strings.
        header: Whether the first line of the files holds names of columns.
        image_size: Height and width of the images that the model gets, in pixels.
        mean: What is subtracted from red, green and blue, on a scale from 0 to 1. CLIP's by default.
        std: What the differences are divided by.
        max_length: Tokens that are kept of each caption.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`.

    Raises:
        ImportError: If transformers or Pillow is not installed.
        ValueError: If the tokenizer has no pad token.

    Example::

        ImageTextData("captions.tsv", "bert-base-uncased", batch_size=256, num_workers=8)
    """

    def __init__(
        self,
        pairs: Any,
        tokenizer: Any,
        batch_size: int = 64,
        *,
        validation_pairs: Any = None,
        columns: Sequence[str] = ("image", "text"),
        header: bool = True,
        image_size: int = 224,
        mean: Sequence[float] = (0.4815, 0.4578, 0.4082),
        std: Sequence[float] = (0.2686, 0.2613, 0.2758),
        max_length: int = 77,
        **kwargs: Any,
    ) -> None:
        require("PIL")
        collate = Collate(Tokenize(load_tokenizer(tokenizer), max_length))
        super().__init__(batch_size, collate_fn=collate, **kwargs)
        self.pairs = pairs
        self.validation_pairs = validation_pairs
        self.columns = columns
        self.header = header
        self.to_pixels = ToPixels(image_size, mean, std)

    def setup(self, stage: str | None = None) -> None:
        """Read the captions. Images are read when they are needed."""
        self.images_with_texts = self._read(self.pairs)
        if self.validation_pairs is not None:
            self.validation_dataset = self._read(self.validation_pairs)

    def train_dataset(self) -> "ImageTexts":
        """Return images, cut at random, and captions."""
        return self.images_with_texts.cut_at_random()

    def pool_dataset(self) -> "ImageTexts":
        """Return images, cut in the middle, and captions."""
        return self.images_with_texts

    def train_groups(self) -> Tensor:
        """Return the numbers of each pair's image and caption: pairs with one in common are of one group."""
        return self.images_with_texts.groups()

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the pairs to validate on, all of them in every process."""
        return [] if self.validation_pairs is None else evaluation_loader(self, self.validation_dataset)

    def _read(self, source: Any) -> "ImageTexts":
        """Return the pairs of a source, with images cut in the middle."""
        if is_table(source):
            check_columns(source, self.columns)
            image, text = self.columns
            return ImageTexts(source, image, list(source[text]), self.to_pixels)
        if isinstance(source, str | Path):
            folder = Path(source).parent
            source = [(str(folder / image), text) for image, text in read_pairs(source, header=self.header)]
        return ImageTexts(source, 0, [text for _, text in source], self.to_pixels)


class ImageTexts(Dataset[tuple[Tensor, str]]):
    """Images and their texts; item ``i`` is the pixels of image ``i`` and text ``i``.

    Args:
        rows: ``rows[i][key]`` is image ``i``, a Pillow image or a path.
        key: The name or the number of the column of images.
        texts: The texts.
        to_pixels: Turns an image into pixels.
        at_random: Whether images are cut at random.

    Raises:
        ValueError: If a text is not a string or is blank. The message names its index. Also if there is no pair.
    """

    def __init__(
        self, rows: Any, key: str | int, texts: Sequence[str], to_pixels: "ToPixels", at_random: bool = False
    ) -> None:
        if not texts:
            raise ValueError("pairs holds no image with a caption.")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"The caption of image {index} must be a string that is not blank, got {text!r}.")
        self.rows, self.key, self.texts = rows, key, texts
        self.to_pixels, self.at_random = to_pixels, at_random

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return the pixels of an image and its text.

        Raises:
            ValueError: If the image cannot be read or has more than 8 bits. The message names its index.
        """
        image = self.rows[index][self.key]
        try:
            return self.to_pixels(image, self.at_random), self.texts[index]
        except (OSError, SyntaxError, AttributeError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
            shown = image if isinstance(image, str | Path) else type(image).__name__
            raise ValueError(f"Image {index} ({shown}) cannot be read as a Pillow image: {error}.") from error

    def cut_at_random(self) -> "ImageTexts":
        """Return the same pairs with images cut at random."""
        return ImageTexts(self.rows, self.key, self.texts, self.to_pixels, at_random=True)

    def names(self) -> list[tuple[Any, str]]:
        """Return what tells pairs apart: the image, by its path or as an object, and the text."""
        images: list[Any] = list(range(len(self)))  # a table would decode its images
        if self.key == 0:
            # A sequence that is no list may make each image anew, and so give the same `id` twice.
            lasts = isinstance(self.rows, list | tuple)
            for number, (image, _) in enumerate(self.rows):
                if isinstance(image, str | Path):
                    images[number] = str(image)
                elif lasts:
                    images[number] = id(image)
        return [(("image", image), text) for image, text in zip(images, self.texts, strict=True)]

    def groups(self) -> Tensor:
        """Return the numbers of each pair's image and text, int64 ``[N, 2]``."""
        return pair_groups(self.names())


class ToPixels:
    """Turn an image of any size and mode into a square of normalised pixels.

    Args:
        size: Height and width in pixels.
        mean: What is subtracted from red, green and blue, on a scale from 0 to 1.
        std: What the differences are divided by.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = size
        self.mean, self.std = (torch.tensor(list(each)).reshape(3, 1, 1) for each in (mean, std))

    def __call__(self, image: Any, at_random: bool) -> Tensor:
        """Return the pixels, float32 ``[3, size, size]``.

        Args:
            image: A Pillow image, or a path.
            at_random: Whether the square is cut at random along the longer side, or in the middle.

        Raises:
            ValueError: If the image has more than 8 bits.
        """
        if isinstance(image, str | Path):
            with require("PIL.Image").open(image) as opened:
                return self(opened, at_random)
        if image.mode.startswith(("I", "F")):  # Pillow would turn what is above 255 white
            raise ValueError(f"its mode {image.mode!r} has more than 8 bits. Scale it to 8 bits, mode 'L'")
        where = torch.rand(2).tolist() if at_random else (0.5, 0.5)
        bicubic = require("PIL.Image").Resampling.BICUBIC
        square = require("PIL.ImageOps").fit(image.convert("RGB"), (self.size, self.size), bicubic, centering=where)
        pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std


class Collate:
    """Collate images and texts.

    Args:
        tokenize: Turns texts into tokens.
    """

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize

    def __call__(self, items: Sequence[tuple[Tensor, str]]) -> Batch:
        """Return images, float32 ``[b, 3, height, width]``, and the tokens of their texts."""
        images, texts = zip(*items, strict=True)
        return torch.stack(images), self.tokenize.tokens(texts)
