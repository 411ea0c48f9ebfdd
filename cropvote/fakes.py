"""A fake copy of a model, whose tensors have shapes but no data, and the paths that data takes through it."""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .errors import InputTypeError, OptionError, PlainModelError

__all__: list[str] = []

#: The batch of every fake call. Above 1, so that nothing broadcasts.
BATCH = 3
_LOCK = threading.RLock()  # for what a fake copy has to put back: a logger's state and the random numbers'
_VALUE_FREE = {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like"}
_VALUE_FREE |= {"full_like", "empty_like", "rand_like", "randn_like"}


class Example(NamedTuple):
    """The arguments of a call, every tensor replaced by a :class:`Spec`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Spec:
    """Shape, dtype and device of a tensor of a call; a batch axis has length -1."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def fake(self) -> Tensor:
        return torch.zeros([BATCH if n == -1 else n for n in self.shape], dtype=self.dtype, device=self.device)


def example_of(model: nn.Module, input_size: int | tuple[int, ...] | None) -> Example | None:
    """The call that the probe makes: from ``input_size``, or from the size that timm models carry, or None."""
    size = _known_size(model) if input_size is None else _full_size(input_size)
    if size is None:
        return None
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return Example((Spec((-1, *size), tensor.dtype, tensor.device),), {})


def example_from_call(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Example:
    """The call that the probe makes, from a real one of ``batch`` samples."""

    def spec(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        batched = shape[:1] == (batch,) and (batch > 1 or len(shape) > 1)  # one number is no batch of one
        return Spec((-1, *shape[1:]) if batched else shape, value.dtype, value.device)

    return Example(*tree_map(spec, (args, kwargs)))


def _full_size(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    whole = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(whole) == 2:
        whole = (3, *whole)
    if len(whole) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in whole):
        raise OptionError(f"input_size must be a side, (H, W), or (C, H, W), in pixels, got {size!r}.")
    return whole


def _known_size(model: nn.Module) -> tuple[int, int, int] | None:
    """The input size of a timm model; the channels are those of its first convolution, which in_chans= changes."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None and first.in_channels <= 16 else size[0]
    return (channels, size[1], size[2])


@contextmanager
def fake_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A copy whose tensors hold no data, and a context in which to run it without a trace on the live model."""
    with _LOCK:
        yield from _fake_copy(model)


def _fake_copy(model: nn.Module) -> Iterator[nn.Module]:
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a traceback for every trial that fails
    silent, log.disabled = log.disabled, True
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            with FakeCopyMode(mode):
                try:
                    fake = copy.deepcopy(model)
                except Exception as error:
                    raise PlainModelError(
                        f"{type(model).__name__} cannot be checked, because copying it failed: {first_line(error)}"
                    ) from error
            if "_cropvote" in vars(fake):  # an injected model is looked at as it was; the settings are the copy's own
                vars(fake)["_cropvote"].settings.enabled = False
            stack.enter_context(mode)
            yield fake
    finally:
        log.disabled = silent
        random.setstate(python_state)
        torch.set_rng_state(torch_state)


class Paths(TorchDispatchMode):
    """Follow through every operation, per storage, which modules the data may have come around (a bit each)."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: dict[int, int] = {}
        self.alive: list[Any] = []  # a freed storage's address would be given out again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket.__name__ not in _VALUE_FREE:
            bits = self.of((args, kwargs))
            if bits:
                schema = func._schema.arguments
                written = [a for a, s in zip(args, schema, strict=False) if s.alias_info and s.alias_info.is_write]
                written += [kwargs[s.name] for s in schema if s.name in kwargs and s.alias_info]
                for tensor in tensors_in((out, written)):
                    self.set(tensor, self.of(tensor) | bits)
        return out

    def of(self, tree: Any) -> int:
        bits = 0
        for tensor in tensors_in(tree):
            bits |= self.bits.get(tensor.untyped_storage()._cdata, 0)
        return bits

    def set(self, tensor: Tensor, bits: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.bits:
            self.alive.append(storage)
        self.bits[storage._cdata] = bits


def map_first_tensor(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``function`` to the first tensor of a call: the batch of images."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], function(value), *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: function(value)}
    raise InputTypeError("the model was called without a tensor; cropvote reads the batch from the first one.")


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}"
