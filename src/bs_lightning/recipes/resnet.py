"""ResNet-18 for small images."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet18(nn.Sequential):
    """ResNet-18 whose first layer suits images of 32 to 64 pixels: a 3x3 convolution of stride 1, and no pooling.

    ``forward`` takes floats of shape ``[n, 3, h, w]`` and returns floats ``[n, num_features]``.

    Args:
        width: Channels of the first layer. The features have eight times as many.

    Attributes:
        num_features: Width of the features. The models of the library timm have this attribute, too.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.resnet import ResNet18
        >>> ResNet18(width=4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 32])

    Source: He et al., CVPR 2016, arXiv 1512.03385; the first layer as in SimCLR, arXiv 2002.05709, appendix B.9.
    """

    def __init__(self, width: int = 64) -> None:
        blocks = [block for stage in range(4) for block in _stage(width, stage)]
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.num_features = 8 * width


class Residual(nn.Module):
    """Two 3x3 convolutions, and a shortcut around them.

    Args:
        n_in: Channels of the input.
        n_out: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches after ReLU."""
        return F.relu(self.inner(x) + self.shortcut(x))


def _stage(width: int, stage: int) -> Iterator[Residual]:
    """Yield the two blocks of a stage. Each stage but the first doubles the channels and halves the resolution."""
    n_out = width * 2**stage
    yield Residual(n_out // 2, n_out, 2) if stage else Residual(n_out, n_out, 1)
    yield Residual(n_out, n_out, 1)
