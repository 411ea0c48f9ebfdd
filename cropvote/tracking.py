"""Tensors that remember in a real call how many sites they have passed.

With one image or one view, data that takes a path around the site has as many rows as the views, or a single one that
PyTorch broadcasts: nothing fails, and the prediction is wrong. In such calls the images are :class:`Tracked`, and so is
everything that is computed from them; the split returns plain tensors. A prediction that is Tracked came around it.
"""

from __future__ import annotations

import copy
import weakref
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._torch import without_subclasses

__all__: list[str] = []

#: Operations whose first tensor gives a shape, a type or a device, and no data.
_FIRST_IS_TEMPLATE = {"new", "new_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
_FIRST_IS_TEMPLATE |= {f"{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")}
#: Those, and operations whose other tensor does.
_HAS_TEMPLATE = _FIRST_IS_TEMPLATE | {"to", "type_as", "view_as", "expand_as", "reshape_as"}


class Watch:
    """Watches a call: what it does that its tensors do not remember.

    At its end, tracked tensors that anything still holds become ordinary again.

    Fields:
        wrote: it wrote tracked data into an ordinary tensor.
        made: its tracked tensors.
    """

    __slots__ = ("made", "token", "wrote")

    def __init__(self) -> None:
        self.wrote = False
        self.made: list[weakref.ref[Tensor]] = []

    def __enter__(self) -> Watch:
        self.token = _WATCH.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _WATCH.reset(self.token)
        for reference in self.made:
            tensor = reference()
            if tensor is not None:
                vars(tensor).pop("passed", None)
                tensor.__class__ = Tensor


_WATCH: ContextVar[Watch | None] = ContextVar("cropvote_watch", default=None)


class Tracked(Tensor):
    """A tensor computed from the images that passed only the first ``passed`` sites on its way."""

    passed: int = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _OURS.issuperset(types):  # a tensor of another subclass has an override, too
            output = func(*map(_plain_inside, args), **{name: _plain_inside(value) for name, value in kwargs.items()})
        else:
            with without_subclasses():
                output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            name = getattr(func, "__name__", "")
            if name in _HAS_TEMPLATE:
                if name in _FIRST_IS_TEMPLATE:
                    args, kwargs = args[1:], {key: value for key, value in kwargs.items() if key != "input"}
                else:
                    args, kwargs = args[:1], {}
                return track(output, _least(args, kwargs)) if _tracked_in((*args, *kwargs.values())) else output
            if type(output) not in (Tensor, Tracked):
                return output
            passed = _least(args, kwargs)
            if type(output) is Tensor:
                if (args and output is args[0]) or output is kwargs.get("out"):
                    _note_write()
                return track(output, passed)
            cast(Tracked, output).passed = passed
            return output
        if output is None:
            if args and type(args[0]) in (Tensor, tuple, list):  # an item was set, or a list of tensors written
                _note_write()
            return None
        if kwargs.get("out") is not None:
            _note_write()
        if not isinstance(output, (tuple, list)) or type(output) is torch.Size:
            return output
        if args and type(args[0]) in (tuple, list) and any(x is y for x in output for y in args[0]):
            _note_write()  # a list of tensors was written
        passed = _least(args, kwargs)
        # a tuple, a list, or one of torch.return_types
        return type(output)([track(x, passed) if isinstance(x, Tensor) else x for x in output])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __copy__(self) -> Tensor:
        return track(copy.copy(plain(self)), self.passed)

    def __deepcopy__(self, memo: Any) -> Any:
        return track(plain(self).__deepcopy__(memo), self.passed)


_OURS = {Tracked, Tensor, nn.Parameter}


def _note_write() -> None:
    watch = _WATCH.get()
    if watch is not None:
        watch.wrote = True


def _plain_inside(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(_plain_inside, value))
    return plain(value)


def _least(args: Any, kwargs: Any) -> int:
    """Return the fewest sites that any tracked tensor among the arguments has passed; 0 if none is found."""
    return min([x.passed for x in _tracked_in((*args, *kwargs.values()) if kwargs else args)], default=0)


def _tracked_in(values: Any) -> list[Any]:
    found = []
    for value in values:
        kind = type(value)
        if kind is Tracked:
            found.append(value)
        elif kind is not Tensor and kind is not int and isinstance(value, (tuple, list)):
            found += _tracked_in(value)
    return found


def track(x: Tensor, passed: int) -> Tensor:
    """Return the same data as a tracked tensor; tensors of other subclasses are left alone."""
    if type(x) is Tensor:
        tracked = x.as_subclass(Tracked)
    elif type(x) is Tracked:
        with without_subclasses():
            tracked = x.as_subclass(Tracked)
    else:
        return x
    if passed:
        tracked.passed = passed
    watch = _WATCH.get()
    if watch is not None:
        watch.made.append(weakref.ref(tracked))
    return tracked


def plain(x: Tensor) -> Tensor:
    """Return the same data as an ordinary tensor."""
    if type(x) is not Tracked:
        return x
    with without_subclasses():
        return x.as_subclass(Tensor)


def came_around(x: Any, sites: int) -> bool:
    """Return whether a tensor holds data of the images that passed fewer than ``sites`` sites."""
    return type(x) is Tracked and x.passed < sites


def track_all(tree: Any, samples: int) -> Any:
    """Return the arguments of a call with every tensor that has a row for each sample tracked."""
    if isinstance(tree, Tensor):  # a single number, or a row of them, is not a batch of one
        is_batch = tree.dim() > 0 and tree.shape[0] == samples and (samples > 1 or tree.dim() > 1)
        return track(tree, 0) if is_batch else tree
    if type(tree) in (tuple, list):
        return type(tree)([track_all(value, samples) for value in tree])
    if type(tree) is dict:
        return {name: track_all(value, samples) for name, value in tree.items()}
    return tree
