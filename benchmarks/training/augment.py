"""Random augmentations of batches of images, floats ``[n, c, h, w]``; each image has its own random numbers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def affine(images: Tensor, *, angle: float, zoom: float, shift: float, shear: float = 0.0) -> Tensor:
    """Turn by up to ``angle`` radians, scale by ``1 +- zoom``, shear, and shift by up to ``shift`` of the size."""
    n = len(images)
    turn, slant = _uniform(n, -angle, angle), _uniform(n, -shear, shear)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).reshape(n, 2, 2)
    stretch = torch.diag_embed(_uniform((n, 2), 1 - zoom, 1 + zoom))
    stretch[:, 0, 1] = slant
    offset = _uniform((n, 2, 1), -2 * shift, 2 * shift)
    return _resample(images, torch.cat([rotation @ stretch, offset], dim=2))


def crop_and_flip(images: Tensor, *, smallest: float = 0.2) -> Tensor:
    """Crop to a share ``smallest`` to 1 of the area, aspect 3/4 to 4/3, and resize; mirror half of the images."""
    n = len(images)
    area, aspect = _uniform(n, smallest, 1), _uniform(n, math.log(3 / 4), math.log(4 / 3)).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp_max(1)  # width, height
    center = _uniform((n, 2), -1, 1) * (1 - size)
    mirrored = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    matrix = torch.diag_embed(size * torch.stack([mirrored, torch.ones(n)], dim=1))
    return _resample(images, torch.cat([matrix, center[:, :, None]], dim=2))


def jitter_colors(images: Tensor, *, strength: float = 0.5, chance: float = 0.8, gray_chance: float = 0.2) -> Tensor:
    """Change brightness, contrast, saturation and hue of RGB images in ``[0, 1]``, then turn some gray (SimCLR)."""
    n = len(images)
    low, high = 1 - 0.8 * strength, 1 + 0.8 * strength
    jittered = images * _uniform((n, 1, 1, 1), low, high)
    mean = _gray(jittered).mean(dim=(1, 2, 3), keepdim=True)
    jittered = mean + (jittered - mean) * _uniform((n, 1, 1, 1), low, high)
    gray = _gray(jittered)
    jittered = gray + (jittered - gray) * _uniform((n, 1, 1, 1), low, high)
    jittered = torch.einsum("nij,njhw->nihw", _hue_rotation(_uniform(n, -0.2, 0.2) * strength * 2 * math.pi), jittered)
    images = torch.where(torch.rand(n, 1, 1, 1) < chance, jittered.clamp(0, 1), images)
    return torch.where(torch.rand(n, 1, 1, 1) < gray_chance, _gray(images), images)


def _resample(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _gray(images: Tensor) -> Tensor:
    return (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Return matrices ``[n, 3, 3]`` that rotate RGB about the gray axis."""
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return cosine * torch.eye(3) + (1 - cosine) / 3 + sine * cross


def _uniform(shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(low, high)
