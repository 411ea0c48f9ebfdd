"""What a model returns: one tensor of predictions, or several in a tuple, a dict or a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .errors import RowsError

__all__: list[str] = []

PREDICTION = "logits"


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output with its name there: "" for the output itself, "logits", "hidden_states.0", ..."""
    if isinstance(output, Tensor):
        yield name, output
    for key, value in _items(output):
        yield from named_tensors(value, f"{name}.{key}" if name else key)


def map_tensors(function: Callable[[str, Tensor], Tensor], output: Any, name: str = "") -> Any:
    """The same output with ``function(name, tensor)`` in place of every tensor."""
    if isinstance(output, Tensor):
        return function(name, output)
    items = _items(output)
    if not items:
        return output
    values = {key: map_tensors(function, value, f"{name}.{key}" if name else key) for key, value in items}
    kind: Any = type(output)
    if dataclasses.is_dataclass(output):
        return kind(**values)
    if isinstance(output, Mapping):
        return kind(zip(output, values.values(), strict=True))
    return kind(*values.values()) if hasattr(output, "_fields") else kind(values.values())


def _items(output: Any) -> list[tuple[str, Any]]:
    """What a container holds; nothing for all else."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]
    if isinstance(output, (tuple, list)):
        return list(zip(getattr(output, "_fields", map(str, range(len(output)))), output, strict=True))
    return []


def prediction_names(output: Any) -> list[str]:
    """The names of the predictions in an output, the main one first.

    They are the 2-D tensors, (N, K). Where a tensor is named "logits", it is the main one, and the others are those
    with "logits" in their names (GoogLeNet's ``aux_logits1``). Where none is, all 2-D tensors must have the same K,
    since features cannot be told from predictions otherwise.

    Raises:
        RowsError: which tensors are the predictions cannot be told, or there are none.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(output) if tensor.dim() == 2}
    named = [name for name in shapes if PREDICTION in name.rpartition(".")[2]]
    if PREDICTION in shapes:
        return [PREDICTION, *(name for name in named if name != PREDICTION)]
    if not shapes:
        raise RowsError(f"the model returns {describe(output)}; cropvote votes over rows of K outputs, (N, K).")
    if len({shape[1] for shape in shapes.values()}) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise RowsError(
            f"the model returns {type(output).__name__} with {found}, and which of them are predictions cannot be "
            f'told: return the predictions alone, or in a dict under "{PREDICTION}".'
        )
    return list(shapes)


def describe(output: Any) -> str:
    """An output in words: its shape, or its type and the shapes inside."""
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named_tensors(output))
    return f"{type(output).__name__} with {found}" if found else type(output).__name__
