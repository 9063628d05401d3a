"""Reference: embeddings of a whole dataset, in a file."""

import copy
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from bs_lightning._checks import check_integer
from bs_lightning._embeddings import to_device
from bs_lightning.encoding import check_piece, encode, has_embed
from bs_lightning.isolation import no_trace
from bs_lightning.loader import BatchFetcher, check_map_style

_BATCHES_PER_WRITE = 64


def encode_dataset(
    module: nn.Module,
    dataset: Dataset[Any],
    path: str | os.PathLike[str],
    *,
    embed: Callable[[Any], Tensor | tuple[Tensor, Tensor]] | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    **dataloader_kwargs: Any,
) -> NDArray[np.float16]:
    """Embed a whole dataset into a file, for ``reference_embeddings()`` of a DataModule.

    The module encodes in eval mode and without gradients, and is left as it was. A progress bar says how far it is. The
    file appears under its name when it is complete. Until then its name ends in ``.unfinished``. A process that is
    killed leaves that file behind.

    Args:
        module: Any model that embeds the dataset, on the device where it is to run.
        dataset: A map-style dataset, one clean view of each instance, in the order of ``train_dataset()``.
        path: The file to write, in NumPy's format: its name ends in ``.npy``.
        embed: A batch -> floats of shape ``[b, d]``, or two sides: a pair of such tensors, or ``[b, 2, d]``. ``None``
            takes ``module.embed(batch)`` if the module has it, else ``module(batch)``.
        batch_size: Instances embedded at a time.
        device: Where batches are moved to; ``None`` is the device of the module's parameters.
        progress: Whether to show a progress bar.
        **dataloader_kwargs: Arguments of :class:`torch.utils.data.DataLoader` that do not choose indices, such as
            ``num_workers`` and ``collate_fn``.

    Returns:
        The file as a read-only :class:`numpy.memmap`: float16 ``[N, d]`` or ``[N, 2, d]``, rows of length 1. That is
        ``2 N d`` bytes for each side.

    Raises:
        TypeError: If the dataset is iterable-style, or ``embed`` does not return floats.
        ValueError: If ``path`` does not end in ``.npy``, is a folder, or lies in none, ``batch_size`` is below 1, the
            dataset is empty, embeddings differ in shape, or one is not finite. The message then names the dataset
            index.
        OSError: If the file cannot be written, as on a full disk. Nothing of it is left then.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from bs_lightning import encode_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "reference.npy"
        ...     encode_dataset(torch.nn.Linear(3, 2), torch.eye(3), path, progress=False).shape
        (3, 2)
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"path must end in .npy, the format of numpy.save, got {path}.")
    batch_size = check_integer("batch_size", batch_size, 1)
    check_map_style(dataset, "dataset")
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("dataset must hold at least one instance, got an empty one.")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {path}. Create {path.parent} first.")
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}. Name a file in it: {path / 'reference.npy'}.")
    encoder: Callable[..., Any] = embed or (module.embed if has_embed(module) else module)  # type: ignore[assignment]
    if device is None:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    target = torch.device(device)
    load = BatchFetcher(dataset, **dataloader_kwargs)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    sides: torch.Size | None = None
    try:
        # Written, not mapped into memory: on a full disk, a write raises an error, and a mapping ends the process.
        with (
            open(unfinished, "wb") as file,
            no_trace(module),
            tqdm(total=size, desc="Encoding", unit="instances", disable=not progress) as bar,
        ):
            for start in range(0, size, _BATCHES_PER_WRITE * batch_size):
                indices = range(start, min(start + _BATCHES_PER_WRITE * batch_size, size))
                rows = encode(
                    indices,
                    load,
                    lambda batch: encoder(_moved(batch, target)),
                    batch_size=batch_size,
                    advance=lambda: bar.update(min(batch_size, size - bar.n)) and None,
                )
                if sides is None:
                    sides = rows.shape[1:]
                    header = {"descr": "<f2", "fortran_order": False, "shape": (size, *sides)}
                    np.lib.format.write_array_header_1_0(file, header)
                check_piece(rows, len(indices), sides)
                file.write(rows.half().cpu().numpy().astype("<f2", copy=False).tobytes())
        os.replace(unfinished, path)
    finally:
        load.close()
        unfinished.unlink(missing_ok=True)
    complete: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return complete


def _moved(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device: tensors, what has a method ``to``, and collections and dataclasses of these."""
    if isinstance(batch, torch.Tensor):
        return to_device(batch, device)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, dict):
        copied = copy.copy(batch)  # a subclass may have another constructor
        for name, value in batch.items():
            copied[name] = _moved(value, device)
        return copied
    if isinstance(batch, Mapping):
        return type(batch)({name: _moved(value, device) for name, value in batch.items()})  # type: ignore[call-arg]
    if is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(moved, field.name, _moved(getattr(batch, field.name), device))  # it may be frozen
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
