"""Follow data through the operations of a fake call: which modules it may have bypassed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import name_of, storage_key, unavailable
from .mode import CheckMode, ours, running_mode, tensors_in

__all__: list[str] = []

_NO_DATA = {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like"}
_NO_DATA |= {"full_like", "empty_like", "rand_like", "randn_like"}


class Taint:
    """Taint tracking for each storage, in a check: one bit for each module that the data may have bypassed.

    Args:
        watch: called before each operation, with its name, its arguments and this taint; it must not reference the
            taint, or it creates a reference cycle.
        wrote: called with the arguments that an operation writes.
    """

    def __init__(
        self,
        watch: Callable[[str, Any, Taint], None] | None = None,
        wrote: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        self.watch, self.wrote = watch, wrote
        self.bits: dict[int, int] = {}
        self.alive: list[Any] = []  # the address of a freed storage would be given out again

    def __enter__(self) -> Taint:
        running_mode().taints.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        running_mode().taints.remove(self)

    def before(self, operation: Any, args: Any) -> None:
        """See an operation that is about to run."""
        if self.watch is not None:
            ours(self.watch, ours(name_of, operation), args, self)

    def after(self, operation: Any, args: Any, kwargs: Any, made: list[Tensor], written: list[Tensor]) -> None:
        """Follow the data through an operation that ran."""
        ours(self._follow, operation, args, kwargs, made, written)

    def _follow(self, operation: Any, args: Any, kwargs: Any, made: list[Tensor], written: list[Tensor]) -> None:
        if self.wrote is not None and written:
            self.wrote(written)
        bits = 0 if name_of(operation) in _NO_DATA else self.of((args, kwargs))
        if bits:
            for tensor in (*made, *written):
                self.set(tensor, self.of(tensor) | bits)

    def of(self, tree: Any) -> int:
        """Return the bits of all tensors in a tree."""
        bits = 0
        for tensor in tensors_in(tree):
            bits |= self.bits.get(storage_key(tensor)[1], 0)
        return bits

    def set(self, tensor: Tensor, bits: int) -> None:
        """Give the storage of a tensor these bits."""
        storage, key = storage_key(tensor)
        if key not in self.bits:
            self.alive.append(storage)
        self.bits[key] = bits


@functools.cache
def check_taint_is_followed() -> None:
    """Raise SurgeryError if this PyTorch does something that the taint cannot follow; once in a process.

    Taint must flow through an operation, a write through a view, a running statistic and a ``_foreach_`` operation, and
    not through ``zeros_like``.
    """
    try:
        with CheckMode().running(), Taint() as taint, torch.no_grad():
            x = torch.ones(4, 3, 2)
            view, mean, listed = torch.zeros(4, 3, 2), torch.zeros(3), torch.zeros(4, 3, 2)
            taint.set(x, 1)
            view[1:].add_(x[1:])
            torch.nn.functional.batch_norm(x, mean, torch.ones(3), training=True)
            torch._foreach_add_([listed], [x])
            followed = [taint.of(tensor) for tensor in (x * 2, view, mean, listed, torch.zeros_like(x))]
    except Exception as error:
        raise unavailable(f"{type(error).__name__}: {error}") from error
    if followed != [1, 1, 1, 1, 0]:
        raise unavailable(f"data is not followed through its operations: {followed}")
