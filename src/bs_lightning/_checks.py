"""Checks of arguments that several modules share."""

import inspect
import math
import operator
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def check_integer(name: str, value: Any, least: int | None = None, advice: str = "") -> int:
    """Return ``value`` as an int. Accept NumPy integers; reject anything else, including bool.

    Args:
        name: The argument's name.
        value: What should be an integer.
        least: The lowest integer that is accepted; ``None`` accepts all.
        advice: A sentence that ends the message if ``value`` is lower.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below ``least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}. {advice}".rstrip())
    return number


def check_number(name: str, value: Any) -> float:
    """Return ``value`` as a float. Accept NumPy's real numbers; reject anything else, including bool.

    Raises:
        TypeError: Naming the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return float(value)


def check_positive(name: str, value: Any, advice: str = "") -> float:
    """Return ``value`` as a float that is finite and above 0.

    Args:
        name: The argument's name.
        value: What should be a number.
        advice: A sentence that ends the message if ``value`` is out of range.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}. {advice}".rstrip())
    return number


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an int, which a checkpoint can hold. Reject negative integers and anything else.

    Raises:
        TypeError: If ``seed`` is not an integer.
        ValueError: If ``seed`` is negative.
    """
    return check_integer("seed", seed, 0)


def check_instance_callable(name: str, value: Any, example: str) -> None:
    """Reject what cannot be called. Reject classes too: calling a class only makes an object.

    Raises:
        TypeError: Naming the argument, the value, and an example of a valid value.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} must be an object, such as {example}, got the class {value.__name__}.")
    if not callable(value):
        raise TypeError(f"{name} must be callable, such as {example}, got {value!r}.")


def check_signature(name: str, function: Any, form: str, *args: Any, **kwargs: Any) -> None:
    """Refuse a function that cannot be called with these arguments.

    Args:
        name: The argument's name.
        function: What is called.
        form: What it must take, for the message.
        *args: Positional arguments of such a call.
        **kwargs: Its keyword arguments.

    Raises:
        TypeError: Naming the argument, what it must take, and what it takes.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may add arguments
    except ValueError:  # some functions that are written in C do not say
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        called = getattr(function, "__qualname__", type(function).__qualname__)
        raise TypeError(f"{name} must take {form}, got {called}{signature}: {error}.") from None


def check_length(name: str, values: Any, n_instances: int) -> None:
    """Reject a dataset, labels or groups that differ in length from the training dataset.

    Raises:
        ValueError: Naming where the values came from, such as ``train_labels()``, and both lengths.
    """
    if len(values) != n_instances:
        raise ValueError(
            f"{name} must have the length and order of train_dataset(), {n_instances}, got length {len(values)}."
        )


def check_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` as a tensor. Accept dense real tensors and copy NumPy arrays of real numbers; reject the rest.

    Raises:
        TypeError: Naming the argument and what it is.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # A copy in native byte order: torch warns of read-only arrays, and refuses the other byte order.
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
        return value
    raise TypeError(f"{name} must be a dense tensor or NumPy array of real numbers, got {kind_of(value)}.")


def kind_of(value: Any) -> str:
    """Return what a value is, for an error: its type, and of a tensor or an array the dtype."""
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided
        return f"a tensor of dtype {value.dtype}{'' if dense else f' and layout {value.layout}'}"
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype}"
    return f"a {type(value).__name__}{f' of {len(value)}' if isinstance(value, (tuple, list)) else ''}"


def check_integer_array(name: str, value: ArrayLike) -> NDArray[np.integer[Any]]:
    """Return ``value`` as a NumPy array. Accept integers of any width, and an empty list; reject bool and the rest.

    Raises:
        TypeError: Naming the argument, and its dtype or why it is not an array.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # rows of unequal length, a tensor that is sparse or on a GPU
        raise TypeError(f"{name} must be an array of integers, or be convertible to one: {error}") from None
    if array.size == 0 and array.dtype == np.float64:  # NumPy's dtype for an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        how = "astype('int32')" if array.dtype.kind in "bf" else "numpy.unique(names, return_inverse=True)[1]"
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}. Convert it, e.g. {how}.")
    return array


def check_neighbors(neighbors: ArrayLike) -> NDArray[np.integer[Any]]:
    """Return a neighbour graph as a NumPy array. Reject an array that is not a graph.

    Raises:
        TypeError: If ``neighbors`` does not hold integers.
        ValueError: If ``neighbors`` does not have shape ``[P, K]`` with ``K >= 1`` and entries in ``[0, P)``.
    """
    graph = check_integer_array("neighbors", neighbors)
    if graph.ndim != 2 or graph.shape[1] < 1:
        raise ValueError(f"neighbors must have shape [P, K] with K >= 1, got shape {list(graph.shape)}.")
    size = len(graph)
    if size and (graph.min() < 0 or graph.max() >= size):
        bad = int(graph.min()) if graph.min() < 0 else int(graph.max())
        raise ValueError(
            f"neighbors must lie in [0, {size}), got {bad}. For 'no edge here' write the row's own number."
        )
    return graph
