"""Give one instance of a module another forward, and nothing else: same class name, keys, attributes, pickle.

The instance's class becomes a subclass of its own class, as ``torch.nn.utils.parametrize`` does it. ``deepcopy``
and pickle make the subclass again from the base class, which their stream names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import MethodType, new_class
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import nn

from .errors import SurgeryError

__all__: list[str] = []

#: (module, the class whose forward is the plain one, *args, **kwargs) -> output; pickle finds it by its name.
Forward = Callable[..., Any]

#: The mark of the model that votes; the other marks are those of modules inside it.
ROOT = "_cropvote"
#: The mark of a module whose own forward, bound, stood among its attributes.
BOUND = "_cropvote_bound_forward"

_classes: WeakValueDictionary[tuple[type, Forward], type] = WeakValueDictionary()


def swap_forward(module: nn.Module, forward: Forward) -> None:
    """Let ``forward(module, base, *args, **kwargs)`` run in place of the module's own forward, ``base.forward``."""
    bound = has_bound_forward(module)
    try:
        object.__setattr__(module, "__class__", _subclass(type(module), forward))
    except Exception as error:
        raise SurgeryError(
            "CV423",
            f"{type(module).__name__} takes no subclass, which cropvote has to make: {type(error).__name__}: {error}",
        ) from error
    if bound:  # it would hide the class's
        del vars(module)["forward"]
        vars(module)[BOUND] = True


def restore_forward(module: nn.Module) -> None:
    """Undo :func:`swap_forward`."""
    check_restorable(module)
    bound = vars(module).pop(BOUND, False) or has_bound_forward(module)
    object.__setattr__(module, "__class__", vars(type(module))["_cropvote_base"])
    if bound:
        vars(module)["forward"] = MethodType(type(module).forward, module)


def is_swapped(module: nn.Module) -> bool:
    """Return whether the module's forward is swapped, with nothing of another library on top."""
    kind = type(module)
    return "_cropvote_base" in vars(kind) and not set(vars(kind)) - vars(kind)["_cropvote_names"]


def check_restorable(module: nn.Module) -> None:
    """Raise SurgeryError if another library has built on the swapped class since."""
    kind = type(module)
    if not is_swapped(module):
        raise SurgeryError(
            "CV424",
            f"{kind.__name__} was changed on top of cropvote's class (by a parametrization, say): undo that first, "
            f"then remove_crop_vote.",
        )
    hidden = own_forward(module)
    if hidden is not None:
        raise SurgeryError(
            "CV424",
            f"the forward of {kind.__name__} was wrapped on the instance (by {hidden}) after the injection: undo that "
            f"first, then remove_crop_vote.",
        )


class _Unannounced:
    """Keep ``__init_subclass__`` of the model's class, which may register every subclass, from being called."""

    def __init_subclass__(cls) -> None:
        pass


def _subclass(base: type, forward: Forward) -> type:
    known = _classes.get((base, forward))
    if known is not None:
        return known

    plain: Any = base

    @functools.wraps(plain.forward)
    def swapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args, torch.fx.Proxy):  # torch.fx gives the whole of *args as one
            raise SurgeryError(
                "CV506", "torch.fx cannot trace an injected model, nor can a traced one be injected: use torch.export."
            )
        return forward(self, base, *args, **kwargs)

    swapped.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]  # which trainers read
    cast(Any, swapped).__code__ = swapped.__code__.replace()  # type: ignore[attr-defined]  # its own, or all classes would share torch.compile's recompile limit
    del swapped.__wrapped__  # torch.jit.script would compile the plain forward behind it

    def prepare_scriptable(self: nn.Module) -> nn.Module:  # torch.jit.script calls it first
        raise SurgeryError(
            "CV507", "torch.jit.script cannot script an injected model: use torch.export, or torch.jit.trace."
        )

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        function, args, *rest = plain.__reduce_ex__(self, protocol)
        args = tuple(base if arg is cls else arg for arg in args)
        return (_rebuild, (forward, function, args, _marks(self)), *rest)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        twin = plain.__deepcopy__(self, memo)
        if twin is not self:
            if vars(type(twin)).get("_cropvote_base") is None:
                swap_forward(twin, forward)
            _mark(twin, copy.deepcopy(_marks(self), memo))
        return twin

    def extra_repr(self: nn.Module) -> str:  # the second line of repr(model)
        lines = [str(vars(self)[ROOT])] if ROOT in vars(self) else []
        return "\n".join([*lines, *filter(None, [plain.extra_repr(self)])])

    body: dict[str, Any] = {
        "forward": swapped,
        "extra_repr": extra_repr,
        "__prepare_scriptable__": prepare_scriptable,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_cropvote_base": base,
    }
    if hasattr(base, "__deepcopy__"):
        body["__deepcopy__"] = deepcopy
    bases = (_Unannounced, base) if hasattr(base.__init_subclass__, "__func__") else (base,)
    cls = new_class(base.__name__, bases, {}, lambda namespace: namespace.update(body))
    cast(Any, cls)._cropvote_names = frozenset((*vars(cls), "_cropvote_names"))
    _classes[base, forward] = cls
    return cls


def _marks(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that cropvote put on the instance; copies keep them, whatever else they drop."""
    return {name: value for name, value in vars(module).items() if name.startswith("_cropvote")}


def _rebuild(
    forward: Forward, function: Callable[..., nn.Module], args: tuple[Any, ...], marks: dict[str, Any]
) -> nn.Module:
    module = function(*args)
    swap_forward(module, forward)
    _mark(module, marks)
    return module


def _mark(module: nn.Module, marks: dict[str, Any]) -> None:
    vars(module).update(marks)
    if ROOT in marks:
        marks[ROOT].set_root(module)


def has_bound_forward(module: nn.Module) -> bool:
    """Return whether the forward of the module's own class, bound to it, stands among its attributes.

    ``module.forward = module.forward`` leaves it there, and so do libraries that wrapped it and took the wrapper away.
    """
    forward = vars(module).get("forward")
    kinds = (type(module), vars(type(module)).get("_cropvote_base", type(module)))
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and any(forward.__func__ is kind.forward for kind in kinds)
    )


def own_forward(module: nn.Module) -> str | None:
    """Return where another forward set on the instance comes from; it would hide any class's."""
    forward = vars(module).get("forward")
    if forward is None or has_bound_forward(module):
        return None
    found = inspect.unwrap(forward)
    return f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"


def split_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module that carries the split of a site.

    It is the site itself, or in an ``nn.Sequential`` its last child: gradient checkpointing may run the children and
    never the Sequential. A child that also stands elsewhere in the model cannot carry it.
    """
    return carrier_of(model.get_submodule(name), use_counts(model))


def use_counts(model: nn.Module) -> Counter[nn.Module]:
    """Return how often each module occurs in the model."""
    return Counter(module for _, module in model.named_modules(remove_duplicate=False))


def carrier_of(module: nn.Module, standings: Counter[nn.Module]) -> nn.Module:
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        last = module[-1]
        if standings[last] != standings[module]:
            break
        module = last
    return module
