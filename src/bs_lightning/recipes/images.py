"""Images as data: folders, parquet files and other datasets; two views to train on, one clean image to embed."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bs_lightning import BatchSamplerDataModule
from bs_lightning._checks import check_instance_callable, check_integer
from bs_lightning.plugin.loops import next_batch
from bs_lightning.recipes.augment import random_view

try:
    from PIL import Image, ImageOps
except ImportError:
    raise ImportError('Images need Pillow: pip install "bs-lightning[vision]"') from None

IMAGE_COLUMNS = ("img", "image")  # what datasets of the Hugging Face hub call the image


class ImageData(BatchSamplerDataModule):
    """Images for contrastive learning: two random views of each image to train on, one clean image to embed.

    A dataset's item is an image, or a tuple that begins with image and label, or a dictionary with ``"img"`` or
    ``"image"`` and ``"label"``. So torchvision's datasets, ``torch.utils.data.TensorDataset`` and Hugging Face's
    ``datasets.Dataset`` can be used as they are. An image is a PIL image or a tensor.

    All images become bytes of shape ``[3, image_size, image_size]``:

    - A PIL image of any mode of at most 8 bits is converted to RGB. Transparency is dropped.
    - A tensor has shape ``[h, w]``, ``[1, h, w]`` or ``[3, h, w]``. It is uint8, or floats in ``[0, 1]``.
    - An image of a different size is cropped at its centre to a square and resized.

    Loading ends there. The views are made from the whole batch in ``on_after_batch_transfer``, on the training device.
    Encoding does not run that hook, so the callback sees clean images.

    The random numbers of views depend on the seed, the step and the process. So processes make different views, and a
    resumed run makes those of the run that went on.

    A training batch is floats of shape ``[2, B, 3, image_size, image_size]``, one entry for each view. A batch to embed
    is uint8 ``[b, 3, image_size, image_size]``. Training never sees labels.

    Args:
        train: What is trained on: a folder of images (:class:`ImageFolder`), a parquet file (:class:`ParquetImages`),
            or a map-style dataset. Its ``targets``, the integers of a ``TensorDataset``, or the column ``label`` of a
            ``datasets.Dataset`` are the labels for the false-negative rate.
        batch_size: Instances per batch and process.
        test: Labelled images for ``trainer.test``, in the same forms. ``train`` must have labels, too, then.
        image_size: Height and width in pixels that all images get.
        augment: Makes views: floats in ``[0, 1]`` of shape ``[2 * B, 3, h, w]`` -> floats of the same shape.
        **kwargs: The other arguments of :class:`~bs_lightning.BatchSamplerDataModule`, such as ``num_workers``.

    Raises:
        ValueError: If a path is neither a folder nor a parquet file, or holds no image, or ``image_size`` is below 1,
            or the folders ``train`` and ``test`` have different classes.
            While loading: if an image is broken or cannot be converted. The message names the image's index.
        ImportError: If Pillow, or pyarrow for parquet files, is missing.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.images import ImageData
        >>> data = ImageData(torch.rand(100, 3, 32, 32), batch_size=16)
        >>> data.pool_dataset()[0].shape
        torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        train: str | Path | Dataset[Any],
        batch_size: int = 256,
        *,
        test: str | Path | Dataset[Any] | None = None,
        image_size: int = 32,
        augment: Callable[[Tensor], Tensor] = random_view,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self.image_size = check_integer("image_size", image_size, 1)
        check_instance_callable("augment", augment, "random_view")
        self.augment = augment
        self.train_images = open_images(train)
        self.test_images = None if test is None else open_images(test)
        classes = [set(each.classes) for each in (self.train_images, self.test_images) if isinstance(each, ImageFolder)]
        if len(classes) == 2 and all(classes) and classes[0] != classes[1]:
            raise ValueError(
                "The folders train and test must have the same classes, as labels are positions among them, but "
                f"{sorted(classes[0] ^ classes[1])} differs. Remove stray folders, or add the missing ones."
            )

    def train_dataset(self) -> "Pixels":
        """Return the clean images. The views are made later, from the whole batch."""
        return Pixels(self.train_images, self.image_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make two views of each image of a training batch, ``[2, B, 3, h, w]``, on the training device."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return batch
        # `seed_everything` seeds all processes alike, so torch's own numbers would be the same in each of them.
        place = (trainer.current_epoch, next_batch(trainer), trainer.global_rank)
        assert self.train_sampler is not None
        seed = np.random.SeedSequence([self.train_sampler.seed, *place]).generate_state(1)[0]
        with torch.random.fork_rng([batch.device] if batch.is_cuda else []):
            torch.manual_seed(int(seed))
            views = self.augment(batch.repeat(2, 1, 1, 1) / 255)
        if views.ndim != 4 or len(views) != 2 * len(batch):
            raise ValueError(
                f"augment must return one view of each of the {2 * len(batch)} images that it gets, "
                f"[{2 * len(batch)}, 3, h, w], got shape {list(views.shape)}. Each image comes twice."
            )
        return views.unflatten(0, (2, -1))

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return loaders of ``(images, labels)``: the training images, and the test images.

        Raises:
            ValueError: If there are no test images.
        """
        if self.test_images is None:
            raise ValueError("trainer.test needs labelled test images: give ImageData(test=...).")
        workers = self.dataloader_kwargs.get("num_workers", 0)
        return [
            DataLoader(LabelledPixels(images, self.image_size), self.batch_size, num_workers=workers)
            for images in (self.train_images, self.test_images)
        ]


class Pixels(Dataset[Any]):
    """The images of a dataset, as bytes of one size.

    Item ``i`` is image ``i``, uint8 of shape ``[3, size, size]``. :class:`ImageData` lists what can be converted.

    Args:
        dataset: A map-style dataset of images.
        size: Height and width in pixels.

    Attributes:
        targets: The dataset's labels, or ``None``.
    """

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset = dataset
        self.size = size
        self.targets = _labels(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Tensor, Any]:
        """Return the image and its label; the label is ``None`` where the dataset has none.

        Raises:
            ValueError: If the image is broken or cannot be converted.
        """
        try:
            image, label = _image_and_label(self.dataset[index])
            return to_pixels(image, self.size), label
        except (OSError, SyntaxError, TypeError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
            raise ValueError(f"Image {index} of the dataset cannot be used: {error} Mend or remove it.") from error


class LabelledPixels(Pixels):
    """As :class:`Pixels`, but item ``i`` is a tuple of image and label."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self._read(index)
        if label is None:
            raise ValueError(
                f"Image {index} has no label, but evaluation needs labels. Let the dataset's items be (image, label), "
                "or use a folder with one subfolder for each class."
            )
        return pixels, int(label)


class ImageFolder(Dataset[Any]):
    """The images in a folder and its subfolders, in the order of their paths.

    Item ``i`` is a tuple of PIL image and label. If all images lie in subfolders, each first-level subfolder is a
    class. Otherwise the labels are ``None``. Left out are hidden files and folders, whose names begin with a dot, and
    files whose names do not end as Pillow's formats do.

    Args:
        folder: The folder.

    Attributes:
        paths: The images' paths.
        classes: The classes' names, sorted; empty if there are none.
        targets: Labels, which are positions in ``classes``, or ``None``.

    Raises:
        ValueError: If the folder holds no image.

    Example::

        dataset = ImageFolder("pets")  # pets/cat/1.jpg, pets/cat/2.png, pets/dog/1.jpg
        image, label = dataset[2]
        dataset.classes[label]  # "dog"
    """

    def __init__(self, folder: str | Path) -> None:
        endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
        # Class folders may be links. Deeper links are not followed: one may lead back up.
        found = (
            Path(root, name) for top in (folder, *_links(folder)) for root, _, names in os.walk(top) for name in names
        )
        images = sorted(path for path in found if path.suffix.lower() in endings)
        parts_of = {path: path.relative_to(folder).parts for path in images}
        self.paths = [path for path in images if not any(part.startswith(".") for part in parts_of[path])]
        if not self.paths:
            raise ValueError(f"The folder {str(folder)!r} holds no image. Give a folder of files such as .jpg or .png.")
        inside = [parts_of[path] for path in self.paths]
        has_classes = all(len(parts) > 1 for parts in inside)
        self.classes = sorted({parts[0] for parts in inside}) if has_classes else []
        self.targets = [self.classes.index(parts[0]) for parts in inside] if has_classes else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            raise OSError(f"{path} cannot be read ({error}).") from error
        return image, None if self.targets is None else self.targets[index]


def _links(folder: str | Path) -> list[Path]:
    """Return the subfolders that are symbolic links."""
    return [path for path in Path(folder).glob("*") if path.is_symlink() and path.is_dir()]


class ParquetImages(Dataset[Any]):
    """The images of a parquet file, as the Hugging Face hub keeps ``cifar10``.

    The column ``img`` or ``image`` holds structures whose field ``bytes`` is a JPEG or PNG file. The column ``label``,
    if there is one, holds integers. Item ``i`` is a tuple of PIL image and label. The file is kept in memory.

    Args:
        path: The file.

    Attributes:
        targets: Labels, int64 of shape ``[N]``, or ``None``.

    Raises:
        ImportError: If pyarrow is missing.
        ValueError: If the file has no column of images.

    Example::

        dataset = ParquetImages("cifar10/train-00000-of-00001.parquet")
        image, label = dataset[0]
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from pyarrow import compute, parquet
        except ImportError:
            raise ImportError('Parquet files need pyarrow: pip install "bs-lightning[vision]"') from None
        names = parquet.read_schema(path).names
        found = [name for name in IMAGE_COLUMNS if name in names]
        if not found:
            raise ValueError(f"{path} must have a column {' or '.join(IMAGE_COLUMNS)}, got columns {names}.")
        table = parquet.read_table(path, columns=[found[0], *(name for name in names if name == "label")])
        self._files = compute.struct_field(table[found[0]], "bytes")
        self.targets = torch.tensor(table["label"].to_pylist()) if "label" in names else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        image = Image.open(io.BytesIO(self._files[index].as_py()))
        return image, None if self.targets is None else int(self.targets[index])


def open_images(source: Any) -> Any:
    """Return the dataset that a path stands for; return a dataset as it is.

    Args:
        source: A folder, a parquet file, or a map-style dataset.

    Returns:
        :class:`ImageFolder`, :class:`ParquetImages`, or the dataset.

    Raises:
        ValueError: If the path is neither a folder nor a parquet file.
    """
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file() and path.suffix == ".parquet":
        return ParquetImages(path)
    raise ValueError(f"{str(source)!r} is neither a folder of images nor a parquet file that exists.")


def to_pixels(image: Any, size: int) -> Tensor:
    """Return an image as uint8 of shape ``[3, size, size]``; :class:`ImageData` lists what can be converted.

    Args:
        image: A PIL image or a tensor.
        size: Height and width in pixels.

    Returns:
        The image. If its size was different, it was cropped at its centre and resized.

    Raises:
        TypeError: If it is neither a PIL image nor a tensor.
        ValueError: If the mode, the shape or the values cannot be converted.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.images import to_pixels
        >>> to_pixels(torch.rand(1, 40, 50), 32).shape
        torch.Size([3, 32, 32])
    """
    if isinstance(image, Tensor):
        pixels = _tensor_to_pixels(image)
        if pixels.shape[1:] == (size, size):
            return pixels
        image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"It is a {type(image).__name__}. Give a PIL image, such as Image.fromarray(array), or a tensor."
        )
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"Its mode {image.mode!r} has more than 8 bits. Scale it to 8 bits, mode 'L'.")
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _tensor_to_pixels(image: Tensor) -> Tensor:
    """Return a tensor as uint8 of shape ``[3, h, w]``."""
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"Its shape is {list(image.shape)}. It must be [h, w], [1, h, w] or [3, h, w].")
    if image.is_floating_point():
        if not ((image >= 0) & (image <= 1)).all():  # catches NaN, too
            raise ValueError("It has floats outside [0, 1]. Scale it, and do not standardise it: the model does so.")
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"Its dtype is {image.dtype}. It must be uint8, or floats in [0, 1].")
    return image.expand(3, -1, -1)


def _labels(dataset: Any) -> Any:
    """Return the label of each image, ``[N]``, or ``None`` where they cannot be had without reading the images."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        second = dataset.tensors[1]
        return second if second.ndim == 1 and not second.is_floating_point() else None
    if "label" in getattr(dataset, "column_names", ()):
        is_integer = "int" in getattr(dataset.features["label"], "dtype", "")
        return dataset["label"][:] if is_integer else None
    return getattr(dataset, "targets", None)


def _image_and_label(item: Any) -> tuple[Any, Any]:
    """Return the image and the label of a dataset's item; the label is ``None`` where there is none."""
    if isinstance(item, dict):
        found = [item[name] for name in IMAGE_COLUMNS if name in item]
        if not found:
            raise ValueError(f"The item has no key {' or '.join(IMAGE_COLUMNS)}, but {sorted(item)}.")
        return found[0], item.get("label")
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None
