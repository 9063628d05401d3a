"""Encoders of images: the first layer, which standardises colours, and the width of the features."""

from torch import Tensor, nn, tensor


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
