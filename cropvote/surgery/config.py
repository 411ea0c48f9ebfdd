"""An injection as plain data: stored beside the weights, and made again on another model of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..cuts import parts_of
from ..errors import InputTypeError, OptionError, SurgeryError
from ..layouts import Tokens
from ..views import Views
from .arguments import injected_inside, injection_of, unwrap

__all__ = ["to_config"]


def to_config(model: nn.Module) -> dict[str, Any]:
    """Return what was injected into a model, as plain data for JSON.

    ``inject_crop_vote(model, **config)`` applies the same injection to another model. Weights are not included.

    Args:
        model: an injected model, also inside DataParallel, DistributedDataParallel or a compiled wrapper.

    Returns:
        The arguments of :func:`inject_crop_vote`, as dicts, lists, strings, numbers and None.

    Raises:
        SurgeryError: the model was never injected.
        OptionError: the vote is a callable, which cannot be stored.
        InputTypeError: not a module.

    Example:
        >>> import json, torchvision
        >>> from cropvote import inject_crop_vote, to_config
        >>> model = inject_crop_vote(torchvision.models.resnet18(), after="layer1", eval_views="centre")
        >>> text = json.dumps(to_config(model))
        >>> again = inject_crop_vote(torchvision.models.resnet18(), **json.loads(text))
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError("CV801", f"model must be an nn.Module, got {type(model).__name__}.")
    injection = injection_of(unwrap(model))
    if injection is None:
        inner = injected_inside(unwrap(model))
        hint = f", but its submodule {inner!r} was: pass that." if inner else ": there is nothing to store."
        raise SurgeryError("CV418", f"this {type(model).__name__} was never injected{hint}")
    settings = injection.settings
    if not isinstance(settings.vote, str):
        raise OptionError("CV851", f"the vote is a callable, {settings.vote!r}, which cannot be stored.")
    views = settings.eval_views
    size = injection.input_size
    layouts = {name: layout for name, layout in injection.user_layouts.items() if layout is not None}
    return {
        "after": {name: part.to_dict() for name, part in zip(injection.sites, parts_of(settings.views), strict=True)},
        "vote": settings.vote,
        "input_size": size if size is None or isinstance(size, int) else list(size),
        "train_output": settings.train_output,
        "eval_output": settings.eval_output,
        "train_views": settings.train_views,
        "eval_views": views if views is None or isinstance(views, str) else list(views),
        "enabled": settings.enabled,
        "layout": {name: list(x) if isinstance(x, Tokens) else x for name, x in layouts.items()} or None,
        "check": injection.check,
    }


def read_views(value: Any) -> Any:
    """Return views that are stored as plain data, in ``after`` or by themselves, as Views; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if {"scale", "views"} <= set(value) and not any(isinstance(part, (Mapping, Views)) for part in value.values()):
        return Views.from_dict(value)
    return {name: Views.from_dict(views) if isinstance(views, Mapping) else views for name, views in value.items()}


def read_layout(value: Any) -> Any:
    """Return layouts that are stored as plain data; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: read_layout(layout) for name, layout in value.items()}
    if isinstance(value, list) and len(value) == len(Tokens._fields):
        return Tokens(*value)
    return value
