"""SimCLR's random changes of images, on the device of the images. Each image of a batch has its own random numbers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_view(images: Tensor) -> Tensor:
    """Crop and mirror each image at random, then change its colours: SimCLR's augmentation without blur.

    Args:
        images: Floats in ``[0, 1]`` of shape ``[n, 3, h, w]``.

    Returns:
        Floats in ``[0, 1]`` of the same shape.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.augment import random_view
        >>> random_view(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020,
    arXiv 2002.05709, appendix A, with the colours for CIFAR-10. Crops have at least 0.2 of the area, SimCLR's 0.08. The
    hue turns about the gray axis of RGB.
    """
    return change_colors(crop_and_flip(images))


def crop_and_flip(images: Tensor, *, smallest: float = 0.2) -> Tensor:
    """Crop each image and resize the crop to the image's size; mirror half of the images.

    Args:
        images: Floats of shape ``[n, c, h, w]``.
        smallest: A crop's smallest share of the area. Its aspect ratio is between 3/4 and 4/3 of the image's.

    Returns:
        Floats of the same shape.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.augment import crop_and_flip
        >>> crop_and_flip(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """
    n, device = len(images), images.device
    area = _uniform(n, smallest, 1, device)
    aspect = _uniform(n, math.log(3 / 4), math.log(4 / 3), device).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp_max(1)  # width, height
    center = _uniform((n, 2), -1, 1, device) * (1 - size)
    size[:, 0] *= torch.where(torch.rand(n, device=device) < 0.5, -1, 1)  # a negative width mirrors the crop
    matrices = torch.cat([torch.diag_embed(size), center[:, :, None]], dim=2)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    # The rim of a crop along the image's border may fall half a pixel outside. Zeros would draw a dark frame there.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def change_colors(images: Tensor, *, strength: float = 0.5, chance: float = 0.8, gray_chance: float = 0.2) -> Tensor:
    """Change brightness, contrast, saturation and hue of some images; then turn some images gray.

    Args:
        images: Floats in ``[0, 1]`` of shape ``[n, 3, h, w]``.
        strength: SimCLR's strength of the changes. At 0.5, brightness, contrast and saturation change by up to 40%.
        chance: Probability that an image's colours change.
        gray_chance: Probability that an image turns gray.

    Returns:
        Floats in ``[0, 1]`` of the same shape.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.augment import change_colors
        >>> gray = change_colors(torch.rand(4, 3, 32, 32), gray_chance=1)
        >>> torch.equal(gray[:, 0], gray[:, 2])
        True
    """
    n, device = len(images), images.device
    factors = _uniform((3, n, 1, 1, 1), 1 - 0.8 * strength, 1 + 0.8 * strength, device)
    changed = images * factors[0]
    mean = _gray(changed).mean(dim=(1, 2, 3), keepdim=True)
    changed = mean + (changed - mean) * factors[1]
    gray = _gray(changed)
    changed = gray + (changed - gray) * factors[2]
    turns = _hue_turns(_uniform(n, -0.2, 0.2, device) * strength * 2 * math.pi)
    changed = torch.einsum("nij,njhw->nihw", turns, changed).clamp(0, 1)
    images = torch.where(torch.rand(n, 1, 1, 1, device=device) < chance, changed, images)
    return torch.where(torch.rand(n, 1, 1, 1, device=device) < gray_chance, _gray(images), images)


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    gray: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return gray


def _hue_turns(angles: Tensor) -> Tensor:
    """Return matrices ``[n, 3, 3]`` that turn RGB about the gray axis."""
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    identity = torch.eye(3, device=angles.device)
    axis = (identity.roll(1, dims=0) - identity.roll(1, dims=1)) / math.sqrt(3)  # made without waiting for a GPU
    return cosine * identity + (1 - cosine) / 3 + sine * axis


def _uniform(shape: int | tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(shape, device=device).uniform_(low, high)
