"""What `no_trace` costs beside the encoding of a pool, in seconds and in memory.

    python -m benchmarks.no_trace

The pool holds random images [3, 32, 32] and is encoded in batches of 256. `no_trace` copies the memory of the module
before, keeps the copy while the pool is encoded, and compares afterwards. The seconds are medians over the repeats.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from bs_lightning import encode
from bs_lightning.isolation import no_trace
from bs_lightning.recipes.resnet import ResNet18

from .command_line import make_parser
from .markdown import print_row
from .training.model import convolution


def small() -> nn.Sequential:
    """Return four convolutions."""
    layers = [convolution(3, 32), convolution(32, 64, 2), convolution(64, 128, 2), convolution(128, 128, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64))


def measure(name: str, module: nn.Module, images: Tensor, repeats: int) -> dict[str, Any]:
    """Return a table row."""
    module.to(images.device)
    encodings: list[float] = []
    own: list[float] = []
    for _ in range(repeats + 1):  # the first is not counted
        start = now(images)
        with no_trace(module):
            entered = now(images)
            encode(range(len(images)), lambda chunks: (images[chunk] for chunk in chunks), module, batch_size=256)
            encoded = now(images)
        end = now(images)
        encodings.append(encoded - entered)
        own.append(end - start - encodings[-1])
    encoding_seconds, own_seconds = statistics.median(encodings[1:]), statistics.median(own[1:])
    return {
        "module": name,
        "copy in MB": sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) / 2**20,
        "seconds to encode": encoding_seconds,
        "seconds of no_trace": f"{own_seconds:.4f}",
        "ratio": f"{own_seconds / encoding_seconds:.5f}",
    }


def now(images: Tensor) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def main() -> None:
    """Measure both modules in one run."""
    parser = make_parser("no_trace", __doc__)
    parser.add_argument("--pool-size", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(args.pool_size, 3, 32, 32, device=args.device)
    print_row(measure("four convolutions", small(), images, args.repeats), with_header=True)
    print_row(measure("ResNet-18", ResNet18(), images, args.repeats))


if __name__ == "__main__":
    main()
