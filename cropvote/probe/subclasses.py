"""Whether a model still does the same when the classes of its modules are subclasses, as an injection makes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import Reason, SurgeryError
from ..images import INPUT
from ..swapping import is_swapped, restore_forward, swap_forward
from .fakes import first_line
from .taint import Taint
from .trace import Trace, fake_arguments

__all__: list[str] = []


def why_not_swapped(trace: Trace, sites: list[str]) -> Reason | None:
    """Return why the model cannot do with subclasses of its classes, which carry the splits and the vote."""
    carriers = [trace.carriers[site] for site in sites if site != INPUT]
    plain = _operations(trace, [])
    swapped = _operations(trace, [trace.model, *dict.fromkeys(carriers)])
    if swapped == plain:
        return None
    again = _operations(trace, [])  # the first run may have filled a cache for this size
    if swapped == again or again != _operations(trace, []):  # or no two runs are alike
        return None
    return Reason(
        "CV112",
        "the model does not run the same operations once a module's class is a subclass of its own, which carries "
        "the split or the vote: somewhere it asks for the very class, as in `type(module) is Conv2d`, where "
        "isinstance would do.",
    )


def _forward(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
    return base.forward(module, *args, **kwargs)


def _describe(value: Any) -> str:
    """Return what of an operation's argument another class could change: a shape, or a number."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def _operations(trace: Trace, swapped: list[nn.Module]) -> list[str]:
    """Return the operations of a plain call, some of whose modules are of a subclass."""
    operations: list[str] = []
    trace.numbers.put_back()  # a model may draw in Python which operations it runs
    try:
        for module in swapped:
            swap_forward(module, _forward)
        with Taint(lambda name, args, taint: operations.append(f"{name} {_describe(args)}")):
            args, kwargs = fake_arguments(trace.example, Taint())
            trace.model(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception as error:
        return [*operations, first_line(error)]
    finally:
        for module in swapped:
            if is_swapped(module):
                restore_forward(module)
    return operations
