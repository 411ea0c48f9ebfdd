"""Give one instance of a module another forward, and nothing else: same class name, keys, attributes, pickle.

The instance's class becomes a subclass of its own class, as ``torch.nn.utils.parametrize`` does it. ``deepcopy``
and pickle make the subclass again from the base class, which their stream names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import new_class
from typing import Any, cast
from weakref import WeakValueDictionary

from torch import nn

from .errors import SurgeryError

__all__: list[str] = []

#: (module, the class whose forward is the plain one, *args, **kwargs) -> output; pickle finds it by its name.
Forward = Callable[..., Any]

_classes: WeakValueDictionary[tuple[type, Forward], type] = WeakValueDictionary()


def swap_forward(module: nn.Module, forward: Forward) -> None:
    """Let ``forward(module, base, *args, **kwargs)`` run in place of the module's own forward, ``base.forward``."""
    module.__class__ = _subclass(type(module), forward)


def restore_forward(module: nn.Module) -> None:
    """Undo :func:`swap_forward`."""
    kind = type(module)
    if "_cropvote_base" not in vars(kind):
        raise SurgeryError(
            f"{kind.__name__} got another class on top of cropvote's (a parametrization, say): undo that first, "
            f"then remove_crop_vote."
        )
    module.__class__ = kind._cropvote_base  # type: ignore[attr-defined]


def _subclass(base: type, forward: Forward) -> type:
    known = _classes.get((base, forward))
    if known is not None:
        return known

    @functools.wraps(base.forward)  # type: ignore[attr-defined]  # keeps inspect.signature, which trainers read
    def swapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, base, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        function, args, *rest = cast(Any, base).__reduce_ex__(self, protocol)
        args = tuple(base if arg is cls else arg for arg in args)
        return (_rebuild, (forward, function, args), *rest)

    body = {
        "forward": swapped,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_cropvote_base": base,
    }
    cls = new_class(base.__name__, (base,), {}, lambda namespace: namespace.update(body))
    _classes[base, forward] = cls
    return cls


def _rebuild(forward: Forward, function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = function(*args)
    swap_forward(module, forward)
    return module


def own_forward(module: nn.Module) -> str | None:
    """Where a forward set on the instance comes from; such a forward would hide any class's."""
    forward = vars(module).get("forward")
    if forward is None:
        return None
    found = inspect.unwrap(forward)
    return f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"
