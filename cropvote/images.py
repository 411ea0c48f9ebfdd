"""The images of a call: the first tensor that has axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import InputTypeError

__all__: list[str] = []

#: The name of the site in front of the whole network.
INPUT = "input"


def is_images(value: Any) -> bool:
    """Return whether an argument can be the batch of images."""
    return isinstance(value, Tensor) and value.dim() > 0


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the batch of images."""
    for value in (*args, *kwargs.values()):
        if is_images(value):
            return value
    raise InputTypeError("the model was called without a tensor; cropvote reads the batch from the first one.")


def map_first_tensor(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``function`` to the batch of images."""
    for i, value in enumerate(args):
        if is_images(value):
            return (*args[:i], function(value), *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if is_images(value):
            return args, {**kwargs, name: function(value)}
    raise InputTypeError("the model was called without a tensor; cropvote reads the batch from the first one.")
