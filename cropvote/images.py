"""The arguments of a call: which of them are the images, and what they are without their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._torch import tree_map
from .errors import InputTypeError, OptionError

__all__: list[str] = []

#: The name of the site in front of the whole network.
INPUT = "input"
#: The batch of every fake call: a prime, so that no window's or mask's length divides its rows by chance.
BATCH = 31


def is_images(value: Any) -> bool:
    """Return whether an argument can be the batch of images."""
    return isinstance(value, Tensor) and value.dim() > 0


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the batch of images."""
    for value in (*args, *kwargs.values()):
        if is_images(value):
            return value
    raise InputTypeError("CV803", "the model was called without a tensor; cropvote reads the batch from the first one.")


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
    raise InputTypeError("CV803", "the model was called without a tensor; cropvote reads the batch from the first one.")


class Example(NamedTuple):
    """The arguments of a call, every tensor replaced by a :class:`Spec`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    channels_first: bool = False  # known of the image, since an input size is (C, H, W)


class Spec:
    """Shape, dtype and device of a tensor of a call; a batch axis has length -1."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def fake(self) -> Tensor:
        return torch.zeros([BATCH if n == -1 else n for n in self.shape], dtype=self.dtype, device=self.device)


def example_of(model: nn.Module, input_size: int | tuple[int, ...] | None) -> Example | None:
    """Return the call to check with: from ``input_size``, from the size that timm models carry, or None."""
    size = _known_size(model) if input_size is None else _full_size(input_size, model)
    if size is None:
        return None
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return Example((Spec((-1, *size), tensor.dtype, tensor.device),), {}, channels_first=True)


def example_from_call(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Example:
    """Return the call to check with, from a real one of ``batch`` samples."""

    def spec(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        batched = shape[:1] == (batch,) and (batch > 1 or len(shape) > 1)  # one number is not a batch of one
        return Spec((-1, *shape[1:]) if batched else shape, value.dtype, value.device)

    return Example(*tree_map(spec, (args, kwargs)))


def _full_size(size: int | tuple[int, ...], model: nn.Module) -> tuple[int, int, int]:
    whole = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(whole) == 2:
        whole = (_channels(model, 3), *whole)
    if len(whole) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in whole):
        raise OptionError("CV804", f"input_size must be a side, (H, W), or (C, H, W), in pixels, got {size!r}.")
    return whole


def _known_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return the input size that a timm model carries, with the channels that in_chans= may have changed."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    return (_channels(model, size[0]), size[1], size[2])


def _channels(model: nn.Module, otherwise: int) -> int:
    """Return an image's channels: those of the first convolution, unless they are too many for an image."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None and 0 < first.in_channels <= 16 else otherwise
