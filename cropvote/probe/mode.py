"""The mode in which a check runs: tensors have shapes and no data, and every operation is seen."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torch import FakeTensorMode, _disable_current_modes, is_fake, unavailable, written_arguments
from .memo import key_of, recall, remember

if TYPE_CHECKING:
    from .taint import Taint

__all__: list[str] = []

_RUNNING: ContextVar[CheckMode] = ContextVar("cropvote_check_mode")


class CheckMode(FakeTensorMode):
    """Fake tensors, with a memo of operations, and with taints that follow the data through them.

    One mode sees what three would, in a third of the time: PyTorch spends most of it on its way to a mode.

    Fields:
        taints: those that follow the operations now.
        made: every tensor that operations made, without holding it.
        changed: the real tensors that were written, and what they held before.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.taints: list[Taint] = []
        self.made: list[weakref.ref[Tensor]] = []
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_inside = True  # in PyTorch's own code: a copy of a model, or an operation made of others

    def __deepcopy__(self, memo: Any) -> CheckMode:
        return self  # a copy of a tensor is of the same mode

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a part of a check in this mode."""
        token = _RUNNING.set(self)
        self.is_inside = False
        try:
            with self:
                yield
        finally:
            self.is_inside = True
            _RUNNING.reset(token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_inside:
            return self._run(func, types, args, kwargs)
        if func is _DEVICE and is_fake(args[0]):  # asked four times by a norm
            return args[0].fake_device
        written = tensors_in(written_arguments(func, args, kwargs))
        for taint in self.taints:
            taint.before(func, args)
        for tensor in written:
            if not is_fake(tensor) and id(tensor) not in self.changed:
                with _disable_current_modes():
                    self.changed[id(tensor)] = tensor, tensor.detach().clone()
        self.is_inside = True
        try:
            output = self._run(func, types, args, kwargs)
        finally:
            self.is_inside = False
        made = tensors_in(output)
        self.made.extend(map(weakref.ref, made))
        for taint in self.taints:
            taint.after(func, args, kwargs, made, written)
        return output

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        key = ours(key_of, self, func, args, kwargs)
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        output = ours(recall, self, key, args)
        if output is None:
            output = super().__torch_dispatch__(func, types, args, kwargs)
            ours(remember, self, key, args, kwargs, output)
        return output

    def put_back(self) -> None:
        """Undo the changes of tensors outside the model, such as a global counter."""
        for tensor, before in reversed(self.changed.values()):  # of two that share memory, the first copy is the oldest
            tensor.detach().copy_(before)


_DEVICE = torch.ops.prim.device.default


def running_mode() -> CheckMode:
    """Return the mode of the check that runs now."""
    return _RUNNING.get()


def ours(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this library inside the model's forward, whose errors are not the model's."""
    try:
        return function(*args)
    except Exception as error:
        raise unavailable(f"{type(error).__name__}: {error}") from error


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in a tree of tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return [tensor for branch in tree for tensor in tensors_in(branch)]
    return []
