"""A memo of what operations make of fake tensors: a check runs the same ones again and again.

PyTorch keeps one, too, which serves every kind of tensor; asking it took most of a check's time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import FakeTensorMode, fake_tensor, is_simple_fake, name_of, storage_key, tree_leaves

__all__: list[str] = []


class Made(NamedTuple):
    """A tensor that an operation made: in memory of its own, or a view of its first argument at an offset."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None = None


#: In the place of a :class:`Made`: the first argument itself, or a new tensor of the same shape and strides.
FIRST, LIKE_FIRST = "first", "like first"
#: What operations made, by the key of the operation and its arguments.
_MEMO: dict[Any, Any] = {}
_MOST = 20_000
#: Arguments that decide by their values; tensors decide by their shapes and strides.
_VALUES = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_UNPREDICTABLE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
    torch.Tag.nondeterministic_seeded,
}


def key_of(mode: FakeTensorMode, operation: Any, args: Any, kwargs: Any) -> Any:
    """Return what decides the shapes of an operation's output, or None if something else may."""
    kind = _kind(operation)
    if not kind:
        return None
    key: list[Any] = [operation, torch.get_default_dtype()]
    if kind == "view":
        key.append(args[0].storage_offset() if isinstance(args[0], Tensor) else None)
    elif kind == "norm" and is_simple_fake(args[0], mode) and args[0].is_contiguous() and args[0].numel():
        x, *args = args  # its length and its sides do not matter, and PyTorch takes long over each shape
        key.append((x.dim(), x.shape[1], x.dtype, x.fake_device))
    return tuple(key) if _add(key, args, mode) and _add(key, kwargs.items(), mode) else None


def _add(key: list[Any], values: Any, mode: FakeTensorMode) -> bool:
    """Add arguments to a key; return False if one of them may decide by more than its shape or its value."""
    for value in values:
        kind = type(value)
        if isinstance(value, Tensor):
            if not is_simple_fake(value, mode):
                return False
            key.append((value.shape, value.stride(), value.dtype, value.fake_device))  # type: ignore[attr-defined]
        elif kind in _VALUES:
            key.append((kind, value))
        elif kind is tuple or kind is list:
            key.append(len(value))
            if not _add(key, value, mode):
                return False
        else:
            return False
    return True


@functools.cache
def _kind(operation: Any) -> str:
    """Return "new", "view", "write" or "norm", or "" for an operation that may do more than its first tensor shows."""
    schema = getattr(operation, "_schema", None)
    if schema is None or operation.namespace != "aten" or _UNPREDICTABLE & set(operation.tags):
        return ""
    if not schema.returns or any(str(result.type) != "Tensor" for result in schema.returns):
        return ""
    aliased = [i for i, argument in enumerate(schema.arguments) if argument.alias_info]
    if not aliased and not any(result.alias_info for result in schema.returns):
        if name_of(operation) == "_unsafe_view":  # its schema does not say that it is one
            return "view"
        return "norm" if "batch_norm" in name_of(operation) else "new"
    if aliased != [0] or len(schema.returns) != 1 or not schema.returns[0].alias_info:
        return ""
    return "write" if schema.is_mutable else "view"


def recall(mode: FakeTensorMode, key: Any, args: Any) -> Any:
    """Return the output of an operation of this key, or None if none was remembered."""
    made = _MEMO.get(key)
    if made is None or made is FIRST:
        return made and args[0]
    return tuple([_make(mode, one, args) for one in made]) if type(made) is tuple else _make(mode, made, args)


def _make(mode: FakeTensorMode, made: Any, args: Any) -> Tensor:
    if made is LIKE_FIRST:
        made = _describe(args[0])
    if made.offset is None:
        meta = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
    else:
        meta = torch.empty(0, dtype=made.dtype, device="meta")
        meta.set_(args[0].untyped_storage(), made.offset, made.shape, made.stride)
    return fake_tensor(mode, meta, made.device)


def remember(mode: FakeTensorMode, key: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Remember an operation's output, unless there is more to it than its shape."""
    if args and output is args[0]:
        made: Any = FIRST if key_of(mode, key[0], args, kwargs) == key else None
    elif isinstance(output, Tensor):
        made = _made(mode, key[0], output, args)
    else:
        made = tuple([_made(mode, key[0], tensor, args) for tensor in output])
        made = None if None in made else made
    if made is not None:
        if len(_MEMO) >= _MOST:
            _MEMO.clear()
        _MEMO[key] = made


def _made(mode: FakeTensorMode, operation: Any, tensor: Any, args: Any) -> Any:
    kind = _kind(operation)
    if kind == "write" or not is_simple_fake(tensor, mode) or tensor.requires_grad:
        return None
    storages = [storage_key(x)[1] for x in tree_leaves(args) if isinstance(x, Tensor)]
    if kind == "view" and storage_key(tensor)[1] == storages[0]:
        is_plain = tensor.dtype == args[0].dtype and not tensor.is_conj() and not tensor.is_neg()
        return _describe(tensor)._replace(offset=tensor.storage_offset()) if is_plain else None
    if tensor.storage_offset() or storage_key(tensor)[1] in storages:
        return None
    made = _describe(tensor)
    return LIKE_FIRST if kind == "norm" and made == _describe(args[0]) else made


def _describe(tensor: Any) -> Made:
    return Made(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.fake_device)
