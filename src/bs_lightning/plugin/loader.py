"""What Lightning asks of a training loader beside its batches."""

from collections.abc import Callable
from typing import Any


class LightningLoader:
    """Adds to a loader what Lightning asks of it.

    Under Lightning the state is part of the DataModule's: a module that reads ``trainer.estimated_stepping_batches`` in
    ``configure_optimizers`` gets its loader before Lightning restores loaders. The two methods for the state only tell
    Lightning that resuming in the middle of an epoch is taken care of.
    """

    close: Callable[[], None]  # the loader's, which ends its workers

    def state_dict(self) -> dict[str, Any]:
        """Return no state.

        Returns:
            An empty dictionary.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """

    @property
    def _iterator(self) -> None:
        """Lightning sets this attribute to ``None`` when a fit ends, to end the workers."""
        return None

    @_iterator.setter
    def _iterator(self, _: None) -> None:
        self.close()
