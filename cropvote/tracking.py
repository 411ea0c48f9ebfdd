"""Tensors that remember in a real call how many sites they have passed.

With one image or one view, data that takes a path around the site has as many rows as the views, or a single one that
PyTorch broadcasts: nothing fails, and the prediction is wrong. In such calls the images are :class:`Tracked`, and so is
everything that is computed from them; the split returns plain tensors. A prediction that is Tracked came around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._torch import without_subclasses

__all__: list[str] = []

_NO_DATA = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
_NO_DATA |= {"rand_like", "randn_like", "new_tensor"}


class Tracked(Tensor):
    """A tensor computed from the images that passed only the first ``passed`` sites on its way."""

    passed: int = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_subclasses():
            output = func(*args, **kwargs) if kwargs else func(*args)
            if isinstance(output, Tensor):
                if func.__name__ in _NO_DATA or type(output) not in (Tensor, Tracked):
                    return output
                tracked = output if type(output) is Tracked else output.as_subclass(Tracked)
                passed = _least(args, kwargs)
                if tracked.passed != passed:
                    tracked.passed = passed
                return tracked
            if not isinstance(output, (tuple, list)) or type(output) is torch.Size:
                return output
            passed = _least(args, kwargs)
            # a tuple, a list, or one of torch.return_types
            return type(output)([track(x, passed) if isinstance(x, Tensor) else x for x in output])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return plain(self).__deepcopy__(memo)


def _least(values: Any, more: Any = None) -> int:
    """Return the fewest sites that any tracked tensor among the arguments has passed."""
    least = 1 << 30
    for value in values if not more else (*values, *more.values()):
        if type(value) is Tracked:
            if not value.passed:
                return 0
            least = min(least, value.passed)
        elif type(value) in (tuple, list):
            least = min(least, _least(value))
    return least


def track(x: Tensor, passed: int) -> Tensor:
    """Return the same data as a tracked tensor; tensors of other subclasses are left alone."""
    if type(x) is not Tensor and type(x) is not Tracked:
        return x
    with without_subclasses():
        tracked = x.as_subclass(Tracked)
    if passed:
        tracked.passed = passed
    return tracked


def plain(x: Tensor) -> Tensor:
    """Return the same data as an ordinary tensor."""
    if type(x) is not Tracked:
        return x
    with without_subclasses():
        return x.as_subclass(Tensor)


def came_around(x: Any, sites: int) -> bool:
    """Return whether a tensor holds data of the images that passed fewer than so many sites."""
    return type(x) is Tracked and x.passed < sites


def track_all(tree: Any) -> Any:
    """Return the arguments of a call with every tensor in them tracked."""
    if isinstance(tree, Tensor):
        return track(tree, 0)
    if type(tree) is tuple and len(tree) == 1:
        return (track_all(tree[0]),)
    if type(tree) in (tuple, list):
        return type(tree)(track_all(value) for value in tree)
    if type(tree) is dict:
        return {name: track_all(value) for name, value in tree.items()}
    return tree
