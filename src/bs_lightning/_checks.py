"""Checks of arguments that several modules share."""

import operator
from typing import Any


def check_integer(name: str, value: Any) -> int:
    """Refuse what is no integer; numpy's integers are.

    Raises:
        TypeError: Naming the argument and the value.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None


def check_instance_callable(name: str, value: Any, example: str) -> None:
    """Refuse what cannot be called, and classes, which would be called to make an object.

    Raises:
        TypeError: Naming the argument, the value, and an example of what is meant.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be callable, such as {example}, got {value!r}.")
