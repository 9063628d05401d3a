"""ResNet-18 for small images, and the layers around an encoder."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn, tensor


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


class Standardize(nn.Module):
    """Bring the colours of images to about mean 0 and deviation 1, as is usual for ImageNet.

    It is the first layer of a model, so that views and clean images are treated alike. ``forward`` takes bytes, or
    floats in ``[0, 1]``, of shape ``[n, 3, h, w]``. It returns floats in the precision of the model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("deviation", tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the standardised images."""
        scaled = images if images.is_floating_point() else images / 255
        return (scaled.to(self.mean.dtype) - self.mean) / self.deviation


def feature_width(encoder: nn.Module) -> int:
    """Return the width of an encoder's features.

    Args:
        encoder: A module with an integer attribute ``num_features``.

    Returns:
        The attribute.

    Raises:
        TypeError: If there is no such attribute.
    """
    width = getattr(encoder, "num_features", None)
    if not isinstance(width, int):
        raise TypeError(
            f"encoder must have an integer attribute num_features, the width of its features, got "
            f"{type(encoder).__name__} with {width!r}. Set it, such as encoder.num_features = 512."
        )
    return width


def _stage(width: int, stage: int) -> Iterator[Residual]:
    """Yield the two blocks of a stage. Each stage but the first doubles the channels and halves the resolution."""
    n_out = width * 2**stage
    yield Residual(n_out // 2, n_out, 2) if stage else Residual(n_out, n_out, 1)
    yield Residual(n_out, n_out, 1)
