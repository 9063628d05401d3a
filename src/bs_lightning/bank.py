"""Bank: the last embedding of each instance, as training computed it."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from bs_lightning._embeddings import unit_rows


class EmbeddingBank:
    """Keeps each instance's last embedding, so that pools need not be encoded.

    Memory is ``2 N d`` bytes: rows of length 1 in float16, on the device of the embeddings that are written first.

    Args:
        n_instances: Length of the data set (the paper's N).

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

    def write(self, indices: Tensor, embeddings: Tensor) -> None:
        """Keep the embeddings of some instances.

        Args:
            indices: Dataset indices, int64 ``[b]``.
            embeddings: Floats of shape ``[b, d]``.

        Raises:
            ValueError: If the embeddings are not of shape ``[b, d]``, or ``d`` is not that of earlier ones.
        """
        check_rows(embeddings, indices)
        unit = unit_rows(embeddings).half()
        if self._rows is None:
            self._rows = unit.new_zeros(self.n_instances, unit.shape[1])
        if self._rows.shape[1] != unit.shape[1]:
            raise ValueError(f"embeddings must keep their width, {self._rows.shape[1]}, got shape {list(unit.shape)}.")
        self._rows = self._rows.to(unit.device)  # restored ones are on the CPU
        self._rows[indices.to(unit.device)] = unit

    def read(self, indices: Tensor) -> Tensor:
        """The last embeddings of some instances.

        Args:
            indices: Dataset indices, int64 ``[P]``.

        Returns:
            float32 of shape ``[P, d]``, rows of length 1; zero, which is similar to nothing, where nothing was written.

        Raises:
            ValueError: If an embedding is not finite; the message names the dataset index.
        """
        if self._rows is None:
            return torch.zeros(len(indices), 2)
        rows = self._rows[indices.to(self._rows.device)].float()
        finite = torch.isfinite(rows).all(dim=1)
        if not finite.all():
            index = int(indices[int((~finite).nonzero()[0])])
            raise ValueError(
                f"The embedding of dataset index {index} is not finite. Check that instance, or whether training "
                "diverged."
            )
        return torch.nn.functional.normalize(rows, dim=1)

    def state_dict(self) -> dict[str, Any]:
        """All rows, ``2 N d`` bytes."""
        return {"n_instances": self.n_instances, "rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of a state.

        Raises:
            ValueError: If the state is of another number of instances.
        """
        if state_dict["n_instances"] != self.n_instances:
            raise ValueError(
                f"The checkpoint holds embeddings of {state_dict['n_instances']} instances, now there are "
                f"{self.n_instances}."
            )
        self._rows = state_dict["rows"]


def check_rows(embeddings: Tensor, indices: Sized) -> None:
    """Refuse embeddings that are not one row for each instance.

    Raises:
        ValueError: Naming both numbers.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(indices):
        raise ValueError(
            f"embeddings must have shape [b, d] with one row for each of the batch's {len(indices)} instances, got "
            f"{list(embeddings.shape)}. Of two views return one, or both side by side: torch.cat([a, b], dim=1)."
        )
