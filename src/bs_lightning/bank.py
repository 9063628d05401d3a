"""Bank: the last embedding of each instance, kept so that pools need not be encoded."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from bs_lightning._embeddings import as_sides, finite_unit_rows_, to_device, unit_rows_

_WRITTEN_TOGETHER = 2**18  # entries, 1 MB: of small batches, the many steps of a write take longer than their data


class EmbeddingBank:
    """Keeps each instance's last embedding, so that pools need not be encoded.

    Rows have length 1 and are kept in float16: ``2 N d`` bytes for each side, on the device of the embeddings that were
    written last. The last batches, up to a megabyte, are held as they came.

    Args:
        n_instances: Length of the dataset (the paper's N).

    Example:
        >>> import torch
        >>> from bs_lightning.bank import EmbeddingBank
        >>> bank = EmbeddingBank(3)
        >>> bank.write(torch.tensor([2]), torch.tensor([[0.0, 5.0]]))
        >>> bank.read(torch.tensor([2, 0])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]

    Source: the paper's public implementation, which builds its graph on the projections that training has computed.
    """

    def __init__(self, n_instances: int) -> None:
        self.n_instances = n_instances
        self._rows: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def write(self, indices: Tensor, embeddings: Tensor) -> None:
        """Keep the embeddings of some instances, in place of their earlier embeddings.

        Args:
            indices: Dataset indices, int64 ``[b]``.
            embeddings: Floats of shape ``[b, d]``, or ``[b, 2, d]`` for two sides.

        Raises:
            TypeError: If the embeddings are not floats.
            ValueError: If the embeddings have a different shape, or differ in width from earlier embeddings.
        """
        rows = check_rows(embeddings, indices)
        if self._rows is None:
            self._rows = rows.new_zeros(self.n_instances, *rows.shape[1:], dtype=torch.float16)
        if self._rows.shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"embeddings must keep their shape, {['b', *self._rows.shape[1:]]}, got {list(rows.shape)}."
            )
        self._waiting.append((indices.clone(), rows.detach().clone()))  # callers may go on to write to their tensors
        if sum(waiting.numel() for _, waiting in self._waiting) >= _WRITTEN_TOGETHER:
            self._write_waiting()

    def fill(self, embeddings: Tensor) -> None:
        """Keep the embeddings of all instances, in place of all earlier embeddings.

        Args:
            embeddings: Finite floats of shape ``[N, d]``, or ``[N, 2, d]`` for two sides, rows of length 1.
        """
        self._rows, self._waiting = embeddings.half(), []

    def read(self, indices: Tensor) -> Tensor:
        """Return the last embeddings of some instances.

        Args:
            indices: Dataset indices, int64 ``[P]``.

        Returns:
            float32 of shape ``[P, d]`` or ``[P, 2, d]``, rows of length 1. An instance without an embedding has zero
            rows, which are similar to nothing.

        Raises:
            ValueError: If an embedding is not finite; the message names the dataset index.
        """
        self._write_waiting()
        if self._rows is None:
            return torch.zeros(len(indices), 2)  # any width does as long as it is not known
        rows = self._rows[to_device(indices, self._rows.device)].float()
        finite_unit_rows_(rows, indices)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return all rows for a checkpoint.

        Returns:
            The number of instances, and the rows: ``2 N d`` bytes for each side.
        """
        self._write_waiting()
        return {"n_instances": self.n_instances, "rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows from a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state holds a different number of instances.
        """
        if state_dict["n_instances"] != self.n_instances:
            raise ValueError(
                f"The checkpoint holds embeddings of {state_dict['n_instances']} instances, but the dataset now has "
                f"{self.n_instances}. Resume with the same dataset."
            )
        self._rows, self._waiting = state_dict["rows"], []

    def _write_waiting(self) -> None:
        """Write the batches that wait, in order: a batch may hold instances of an earlier batch."""
        if not self._waiting:
            return
        assert self._rows is not None
        indices, rows = zip(*self._waiting, strict=True)
        unit = unit_rows_(torch.cat(rows).float()).half()
        self._rows = self._rows.to(unit.device)  # loaded rows may be on a different device
        places, sizes = to_device(torch.cat(indices), unit.device), [len(batch) for batch in indices]
        for batch, of_batch in zip(places.split(sizes), unit.split(sizes), strict=True):
            self._rows[batch] = of_batch
        self._waiting = []


def check_rows(embeddings: Any, indices: Sized) -> Tensor:
    """Return what training computed for a batch as one tensor. Refuse it if a batch's instance has no row.

    Args:
        embeddings: What should be floats of shape ``[b, d]``, or two sides: a pair of such tensors, or ``[b, 2, d]``.
        indices: The ``b`` dataset indices of the batch.

    Returns:
        Floats of shape ``[b, d]`` or ``[b, 2, d]``.

    Raises:
        TypeError: If the embeddings are not one or two tensors of floats.
        ValueError: If a shape is different. The message gives it.
    """
    rows = as_sides(embeddings, "embeddings must have")
    if len(rows) != len(indices):
        raise ValueError(
            f"embeddings must have one row for each of the batch's {len(indices)} instances, got shape "
            f"{list(rows.shape)}. Of two views, return one, or both as a pair."
        )
    return rows
