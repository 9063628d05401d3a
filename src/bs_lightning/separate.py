"""Separate: batches in which no two instances share a group."""

import numpy as np

from bs_lightning._types import Indices, Order

_INSTEAD = (
    "Or leave out separate_groups=True, or the groups of PoolBatchSampler, and mask the pairs of a group in the loss."
)


def check_separable(groups: Indices, n_batches: int) -> None:
    """Refuse several groups for an instance, and a group with more instances than there are batches.

    Args:
        groups: Each instance's group, int64 ``[N]``.
        n_batches: Full batches in an epoch.

    Raises:
        ValueError: If an instance has several groups, or a group is too large. The message names the group and both
            numbers.
    """
    if groups.ndim != 1:
        raise ValueError(
            f"To keep groups apart, give each instance one group, [N], got groups of shape {list(groups.shape)}. "
            f"{_INSTEAD}"
        )
    numbers, counts = np.unique(groups, return_counts=True)
    largest = int(counts.argmax())
    if counts[largest] > n_batches:
        raise ValueError(
            f"Cannot keep the {counts[largest]} instances of group {numbers[largest]} apart: an epoch has {n_batches} "
            f"full batches. Lower batch_size. {_INSTEAD}"
        )


def separate(batches: Order, groups: Indices, seed: int) -> Order:
    """Exchange instances between batches until no batch holds two instances of a group.

    Each exchange takes an instance whose group occurs twice in its batch to a batch that lacks the group. In return
    comes an instance whose group the first batch lacks, or whose group occurs twice in the other batch. So each
    exchange leaves fewer repetitions, and the search always ends.

    Args:
        batches: Positions, integers ``[n, B]``, each at most once.
        groups: Each position's group, int64 ``[P]``. No group has more than ``n`` positions.
        seed: The same seed makes the same exchanges.

    Returns:
        Integers of shape ``[n, B]``. The same array, if no batch held two instances of a group.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.separate import separate
        >>> batches = separate(np.array([[0, 1], [2, 3]]), np.array([5, 5, 6, 7]), seed=0)
        >>> sorted(len(set(np.array([5, 5, 6, 7])[batch])) for batch in batches)
        [2, 2]
    """
    numbers = np.unique(groups, return_inverse=True)[1].reshape(-1)
    repeated = _repeated(numbers[batches])
    if not repeated:
        return batches
    batches = batches.copy()
    rng = np.random.default_rng(seed)
    n_batches, size = batches.shape
    held = _batches_of(numbers, batches, {int(numbers[batches[place]]) for place in repeated})
    for batch, column in repeated:
        here = numbers[batches[batch]]
        group = here[column]
        if (here == group).sum() < 2:
            continue  # an earlier exchange took the other instance away
        other = int(rng.integers(n_batches))
        while other in held[int(group)]:
            other = (other + 1) % n_batches
        there = numbers[batches[other]]
        _, which, counts = np.unique(there, return_inverse=True, return_counts=True)
        helps = ~np.isin(there, here) | (counts[which.reshape(-1)] > 1)
        start = rng.integers(size)
        taken = (start + int(np.roll(helps, -start).argmax())) % size
        brought = int(there[taken])
        batches[batch, column], batches[other, taken] = batches[other, taken], batches[batch, column]
        held[int(group)].add(other)
        if brought in held:
            held[brought].add(batch)
            if (there == brought).sum() == 1:
                held[brought].discard(other)
    return separate(batches, groups, seed + 1)  # what came in exchange may repeat a group of its own


def separate_order(order: Order, groups: Indices, batch_size: int, seed: int) -> Order:
    """Rearrange an epoch's permutation, so that none of its batches holds two instances of a group.

    Args:
        order: A permutation of the dataset indices, integers ``[N]``.
        groups: Each instance's group, int64 ``[N]``. No group has more instances than there are full batches.
        batch_size: Instances in a batch. The remainder of less than a batch is rearranged, too.
        seed: The same seed makes the same exchanges.

    Returns:
        Integers of shape ``[N]``.
    """
    n_full = len(order) // batch_size
    order = order.copy()
    full = separate(order[: n_full * batch_size].reshape(n_full, batch_size), groups, seed)
    rest = order[n_full * batch_size :]
    for column in _later_occurrences(groups[rest]):
        group = groups[rest[column]]
        batch = next(batch for batch in full if group not in groups[batch])
        taken = int((~np.isin(groups[batch], groups[rest])).argmax())
        rest[column], batch[taken] = batch[taken], rest[column]
    return np.concatenate([full.ravel(), rest])


def _batches_of(numbers: Indices, batches: Order, groups: set[int]) -> dict[int, set[int]]:
    """Return the batches that hold each of some groups."""
    held: dict[int, set[int]] = {group: set() for group in groups}
    of_batches = numbers[batches]
    wanted = np.isin(of_batches, list(groups))
    for batch, column in zip(*np.nonzero(wanted), strict=True):
        held[int(of_batches[batch, column])].add(int(batch))
    return held


def _repeated(groups: Indices) -> list[tuple[int, int]]:
    """Return batch and column of each instance whose group occurs earlier in its batch."""
    ordered = np.sort(groups, axis=1)
    suspects = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    return [(int(batch), column) for batch in suspects for column in _later_occurrences(groups[batch])]


def _later_occurrences(groups: Indices) -> list[int]:
    """Return the positions whose group occurs earlier."""
    first = np.unique(groups, return_index=True)[1]
    return sorted(set(range(len(groups))) - set(first.tolist()))
