"""A fake copy of a model, whose tensors have shapes but no data, and the paths that data takes through it."""

from __future__ import annotations

import copy
import gc
import logging
import random
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputTypeError, OptionError, PlainModelError, SurgeryError
from .swapping import is_swapped, restore_forward

__all__: list[str] = []

Result = TypeVar("Result")
#: The batch of every fake call: a prime, so that no window's or mask's length divides its rows by chance.
BATCH = 31
_LOCK = threading.RLock()  # for what a fake copy has to put back: a logger's state and the random numbers'
_VALUE_FREE = {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like"}
_VALUE_FREE |= {"full_like", "empty_like", "rand_like", "randn_like"}


class Example(NamedTuple):
    """The arguments of a call, every tensor replaced by a :class:`Spec`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    channels_first: bool = False  # known of the image, since an input size is (C, H, W)


class Spec:
    """Shape, dtype and device of a tensor of a call; a batch axis has length -1."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def fake(self) -> Tensor:
        return torch.zeros([BATCH if n == -1 else n for n in self.shape], dtype=self.dtype, device=self.device)


def example_of(model: nn.Module, input_size: int | tuple[int, ...] | None) -> Example | None:
    """The call that the probe makes: from ``input_size``, or from the size that timm models carry, or None."""
    size = _known_size(model) if input_size is None else _full_size(input_size, model)
    if size is None:
        return None
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return Example((Spec((-1, *size), tensor.dtype, tensor.device),), {}, channels_first=True)


def example_from_call(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Example:
    """The call that the probe makes, from a real one of ``batch`` samples."""

    def spec(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        batched = shape[:1] == (batch,) and (batch > 1 or len(shape) > 1)  # one number is no batch of one
        return Spec((-1, *shape[1:]) if batched else shape, value.dtype, value.device)

    return Example(*tree_map(spec, (args, kwargs)))


def _full_size(size: int | tuple[int, ...], model: nn.Module) -> tuple[int, int, int]:
    whole = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(whole) == 2:
        whole = (_channels(model, 3), *whole)
    if len(whole) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in whole):
        raise OptionError(f"input_size must be a side, (H, W), or (C, H, W), in pixels, got {size!r}.")
    return whole


def _known_size(model: nn.Module) -> tuple[int, int, int] | None:
    """The input size that a timm model carries; its channels may be others, since in_chans= does not change it."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    return (_channels(model, size[0]), size[1], size[2])


def _channels(model: nn.Module, otherwise: int) -> int:
    """An image's channels: those of the first convolution, unless they are too many for an image's."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels <= 16 else otherwise


def on_fake_copy(model: nn.Module, function: Callable[[nn.Module], Result]) -> Result:
    """Call ``function`` with a copy whose tensors hold no data, and leave no trace on the live model.

    Raises:
        PlainModelError: the model cannot be copied, or not without sharing modules with its copy.
        SurgeryError: the model's forward kept a tensor outside the model, where the live model would find it.
    """
    with _LOCK:
        made = Paths.made = []
        with _putting_back(), ExitStack() as stack:
            stack.enter_context(_disable_current_modes())  # a counter of operations around the call, say
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with FakeCopyMode(mode):
                fake = _copy(model)
            if "_cropvote" in vars(fake):  # an injected model is looked at as it was; the settings are the copy's own
                vars(fake)["_cropvote"].settings.enabled = False
                for module in fake.modules():
                    if is_swapped(module):
                        restore_forward(module)
            stack.enter_context(mode)
            failed: Exception | None = None
            try:
                result = function(fake)
            except Exception as error:
                failed = error
            del fake
            if failed is not None:  # out of its handler, in which Python 3.10 would hold the frames
                try:
                    _drop_frames(failed)
                    _check_nothing_kept(made, type(model).__name__)
                    raise failed
                finally:
                    del failed  # or its traceback, this frame and the model would hold each other
    _check_nothing_kept(made, type(model).__name__)
    return result


def _drop_frames(error: Exception) -> None:
    """Take from an error, and its causes, the frames, which hold the tensors that they worked on."""
    link: BaseException | None = error
    while link is not None:
        link = link.with_traceback(None).__cause__ or link.__context__


def _check_nothing_kept(made: list[weakref.ref[Tensor]], kind: str) -> None:
    """Raise SurgeryError where a tensor without data outlived the fake copy, for the live model to find."""
    for _ in range(3):  # what the first round frees may hold more
        if all(reference() is None for reference in made):
            return
        gc.collect()
    kept = next((tensor for tensor in (reference() for reference in made) if tensor is not None), None)
    if kept is not None:
        raise SurgeryError(
            f"while {kind} was checked on a copy without data, its forward or a hook kept a tensor of shape "
            f"{tuple(kept.shape)} outside the model: in a class attribute, a global, a cache or a list. Empty that "
            f"store, which now holds no numbers; remove such hooks, or fill such a cache by calling the model once, "
            f"and inject again."
        )


def _copy(model: nn.Module) -> nn.Module:
    kind = type(model).__name__
    try:
        fake = copy.deepcopy(model)
    except Exception as error:
        raise PlainModelError(f"{kind} cannot be checked, because copying it failed: {first_line(error)}") from error
    live = {module: name for name, module in model.named_modules()}
    shared = next((live[module] for module in fake.modules() if module in live), None)
    if shared is not None:
        raise PlainModelError(
            f"{kind} cannot be checked: its deep copy shares the module {shared!r} with it, so a check would touch the "
            f"live one."
        )
    return fake


@contextmanager
def _putting_back() -> Iterator[None]:
    """Put back the random numbers, and keep autocast's cache and PyTorch's log of failed calls out of it."""
    numbers = RandomState()
    states: list[tuple[Callable[[Any], Any], Any]] = []
    states.append((torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()))
    torch.set_autocast_cache_enabled(False)  # it would keep the fake weights, cast
    states.append((torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()))
    torch.backends.mha.set_fastpath_enabled(False)  # it makes nested tensors, whose data cannot be followed
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = silent
        for restore, state in states:
            restore(state)
        numbers.put_back()


class RandomState:
    """The state of every generator of random numbers, to be put back where a check changed it.

    Operations on fake tensors draw nothing, so PyTorch's generators change only if the model seeds them. They are left
    alone otherwise: putting them back would give other threads the same numbers twice. Python's and NumPy's change if
    the model draws from them.
    """

    def __init__(self) -> None:
        self.python, self.seed, self.cpu = random.getstate(), torch.initial_seed(), torch.get_rng_state()
        self.devices = {m: m.get_rng_state_all() for m in (torch.cuda, torch.xpu) if m.is_initialized()}
        self.numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def put_back(self) -> None:
        if random.getstate() != self.python:
            random.setstate(self.python)
        if self.numpy is not None:
            numpy_random = sys.modules["numpy"].random
            if any((one != other).any() if hasattr(one, "any") else one != other
                   for one, other in zip(numpy_random.get_state(), self.numpy, strict=True)):  # fmt: skip
                numpy_random.set_state(self.numpy)
        if torch.initial_seed() != self.seed:
            torch.set_rng_state(self.cpu)
            for module, states in self.devices.items():
                module.set_rng_state_all(states)


class Paths(TorchDispatchMode):
    """Follow through every operation, per storage, which modules the data may have come around (a bit each)."""

    made: ClassVar[list[weakref.ref[Tensor]]] = []  # every tensor of the present fake copy

    def __init__(self, watch: Callable[[str, Any, Paths], None] | None = None) -> None:
        super().__init__()
        self.watch = watch  # is told of every operation before it runs; a watch that holds these paths makes a cycle
        self.bits: dict[int, int] = {}
        self.alive: list[Any] = []  # a freed storage's address would be given out again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watch is not None:
            self.watch(func.overloadpacket.__name__, args, self)
        out = func(*args, **kwargs)
        self.made.extend(weakref.ref(tensor) for tensor in tensors_in(out))
        if func.overloadpacket.__name__ not in _VALUE_FREE:
            bits = self.of((args, kwargs))
            if bits:
                schema = func._schema.arguments
                written = [a for a, s in zip(args, schema, strict=False) if s.alias_info and s.alias_info.is_write]
                written += [kwargs[s.name] for s in schema if s.name in kwargs and s.alias_info]
                written += _running_statistics(schema, args, kwargs)
                for tensor in tensors_in((out, written)):
                    self.set(tensor, self.of(tensor) | bits)
        return out

    def of(self, tree: Any) -> int:
        bits = 0
        for tensor in tensors_in(tree):
            bits |= self.bits.get(_storage(tensor)._cdata, 0)
        return bits

    def set(self, tensor: Tensor, bits: int) -> None:
        storage = _storage(tensor)
        if storage._cdata not in self.bits:
            self.alive.append(storage)
        self.bits[storage._cdata] = bits


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap or grad
        tensor = functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def _running_statistics(schema: Any, args: Any, kwargs: Any) -> list[Any]:
    """What a batch norm in training mode writes although its schema does not say so."""
    values = {**{s.name: a for s, a in zip(schema, args, strict=False)}, **kwargs}
    if not (values.get("training") or values.get("train")):
        return []
    return [value for name, value in values.items() if name.startswith("running_")]


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
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return (
            f"it reads the values of a tensor in Python ({str(error).splitlines()[0]}: float(), .item(), nonzero(), if "
            f"or a mask of data), which cannot be followed without data{_place(error)}"
        )
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where the model's own code failed, which is not in the traceback: that would keep the tensors."""
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(entry.filename)
        if not {Path(torch.__file__).parent, Path(__file__).parent} & set(file.parents):
            return f" (in {entry.name}, {file.name}:{entry.lineno})"
    return ""
