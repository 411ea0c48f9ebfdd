"""What a model returns: one tensor of predictions, or several in a tuple, a dict or a dataclass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .errors import RowsError

__all__: list[str] = []

PREDICTION = "logits"
HUGGING_FACE = "transformers.modeling_outputs"
#: The keys that lead to a tensor in an output: () for the output itself, ("logits",), ("hidden_states", 0), ...
KeyPath = tuple[Any, ...]


def tensors_of(output: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    """Every tensor of an output, with its path."""
    if isinstance(output, Tensor):
        yield path, output
    for key, value in _items(output):
        yield from tensors_of(value, (*path, key))


def map_tensors(function: Callable[[KeyPath, Tensor], Tensor], output: Any, path: KeyPath = ()) -> Any:
    """Return a copy of an output with ``function(path, tensor)`` in place of every tensor.

    Raises:
        RowsError: a container that cannot be copied with other values.
    """
    if isinstance(output, Tensor):
        return function(path, output)
    items = _items(output)
    values = {key: map_tensors(function, value, (*path, key)) for key, value in items}
    if all(values[key] is value for key, value in items):
        return output
    kind = type(output)
    if kind in (tuple, list):
        return kind(values.values())
    if kind is dict:
        return values
    if kind.__module__ == HUGGING_FACE and dataclasses.is_dataclass(output):
        fields = {field.name for field in dataclasses.fields(output)}
        if fields.issuperset(values):  # Dynamo traces the constructor, not the copy
            return kind(**values)
    try:
        return _replaced(output, {key: values[key] for key, value in items if values[key] is not value})
    except Exception as error:
        raise RowsError(
            "CV310",
            f"the model returns its predictions in a {kind.__name__}, which cannot be copied with other values "
            f"({type(error).__name__}: {error}): return a tuple, a dict or a dataclass.",
        ) from error


def _replaced(output: Any, changed: dict[Any, Any]) -> Any:
    """Return a copy of a container with some values replaced, made without its constructor, which may compute."""
    if isinstance(output, tuple):
        return output._replace(**changed)  # type: ignore[attr-defined]
    twin = copy.copy(output)
    for key, value in changed.items():
        if isinstance(output, (Mapping, list)):
            twin[key] = value
        else:
            object.__setattr__(twin, key, value)
    return twin


def _items(output: Any) -> list[tuple[Any, Any]]:
    """Return what a container holds; nothing for anything else."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if output is None or not hasattr(type(output), "__dataclass_fields__"):  # is_dataclass is more than Dynamo knows
        return []
    return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]


def prediction_paths(output: Any) -> list[KeyPath]:
    """Return the paths of the predictions in an output, the main one first.

    They are floating-point tensors, (N, K). Where a tensor is named "logits", it is the main one, and the others are
    those with "logits" in their names (GoogLeNet's ``aux_logits1``). Where none is, all 2-D tensors must have the same
    K, since features cannot be told from predictions otherwise.

    Raises:
        RowsError: which tensors are the predictions cannot be told, or there are none.
    """
    if isinstance(output, Tensor):
        return [()]
    found = dict(tensors_of(output))
    rows = {path: x for path, x in found.items() if x.dim() == 2 and x.is_floating_point()}
    main = [path for path in found if path[-1:] == (PREDICTION,)]
    for path in main:
        if path not in rows:
            raise RowsError(
                "CV311",
                f"the model returns {describe(output)}; cropvote votes over {PREDICTION} of one row of K outputs per "
                f"sample, (N, K).",
            )
    if main:
        return main + [path for path in rows if PREDICTION in str(path[-1]) and path not in main]
    if not rows:
        raise RowsError(
            "CV311", f"the model returns {describe(output)}; cropvote votes over rows of K outputs, (N, K)."
        )
    if len({int(x.shape[1]) for x in rows.values()}) > 1:
        raise RowsError(
            "CV312",
            f"the model returns {describe(output)}, and which of them are predictions cannot be told: return the "
            f'predictions alone, or in a dict under "{PREDICTION}".',
        )
    return list(rows)


def format_path(path: KeyPath) -> str:
    """Return a key path as dotted text."""
    return ".".join(map(str, path))


def describe(output: Any) -> str:
    """Return an output in words: its shape, or its type and the shapes inside."""
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    found = ", ".join(f"{format_path(path)} {tuple(tensor.shape)}" for path, tensor in tensors_of(output))
    return f"{type(output).__name__} with {found}" if found else type(output).__name__
