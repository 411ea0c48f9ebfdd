"""A fake copy of a model, whose tensors have shapes but no data, and which leaves no trace in the process."""

from __future__ import annotations

import functools
import gc
import logging
import os
import random
import sys
import threading
import traceback
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import _disable_current_modes
from ..errors import PlainModelError, SurgeryError
from ..swapping import is_swapped, restore_forward
from .copying import fake_copy
from .mode import CheckMode
from .taint import check_taint_is_followed

__all__: list[str] = []

Result = TypeVar("Result")
_LOCK = threading.RLock()  # for what a fake copy has to put back: a logger's state and the random numbers'


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):  # a process forked during a check would wait for a lock that nobody holds
    os.register_at_fork(after_in_child=_renew_lock)


def on_fake_copy(model: nn.Module, function: Callable[[nn.Module], Result]) -> Result:
    """Call ``function`` with a copy whose tensors hold no data, and leave no trace on the live model or the process.

    Raises:
        PlainModelError: the model cannot be copied, or not without sharing modules with its copy.
        SurgeryError: the model's forward kept a tensor outside the model, where the live model would find it; or this
            PyTorch does something that a check cannot follow.
    """
    with _LOCK, _disable_current_modes():  # a counter of operations around the call, say
        check_taint_is_followed()
        _check_nothing_is_left(type(model))
        with _putting_back(), ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            mode = CheckMode()
            fake = _copy(model, mode)
            if "_cropvote" in vars(fake):  # an injected model is looked at as it was; the settings are the copy's own
                vars(fake)["_cropvote"].settings.enabled = False
                for module in fake.modules():
                    if is_swapped(module):
                        restore_forward(module)
            _know_single_values(model, fake)
            stack.enter_context(mode.running())
            if any(isinstance(module, nn.MultiheadAttention) for module in fake.modules()):
                stack.enter_context(WithoutFastPaths())
            failed: BaseException | None = None
            try:
                result = function(fake)
            except BaseException as error:
                failed = error
            del fake
        mode.put_back()
        if failed is not None:  # out of its handler, in which Python 3.10 would hold the frames
            try:
                _drop_frames(failed)
                _empty_stores(mode.made, type(model))
                raise failed
            finally:
                del failed  # or its traceback, this frame and the model would hold each other
        _empty_stores(mode.made, type(model))
    return result


class WithoutFastPaths(TorchFunctionMode):
    """Keep this thread's attention off its fast path, which makes nested tensors, whose data cannot be followed.

    PyTorch takes that path only if no argument, and no mode, overrides its functions. Its switch for it,
    ``torch.backends.mha``, would also switch other threads.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _know_single_values(model: nn.Module, fake: nn.Module) -> None:
    """Let parameters and buffers of a single number keep it on the copy, so that a forward may read it."""
    for named, copies in (
        (model.named_parameters(), dict(fake.named_parameters())),
        (model.named_buffers(), dict(fake.named_buffers())),
    ):
        for name, real in named:
            copied = copies.get(name)  # a model may copy itself in its own way
            if copied is None:
                continue
            if real.numel() == 1 and real.device.type == "cpu" and type(real.data) is Tensor:
                copied.constant = real.detach().clone()  # type: ignore[attr-defined]


def _drop_frames(error: BaseException) -> None:
    """Take from an error, and its causes, the frames, which hold the tensors that they worked on."""
    links: list[BaseException | None] = [error]
    dropped: set[int] = set()
    while links:
        link = links.pop()
        if link is not None and id(link) not in dropped:  # an error may be its own cause
            dropped.add(id(link))
            links += [link.with_traceback(None).__cause__, link.__context__]


#: Tensors without data that a model's own code still keeps after a check, by the model's class.
_LEFT: WeakKeyDictionary[type, list[weakref.ref[Tensor]]] = WeakKeyDictionary()


def _empty_stores(made: list[weakref.ref[Tensor]], kind: type) -> None:
    """Take the tensors of a check out of the caches that the model's code keeps outside the model.

    Raises:
        SurgeryError: one is kept where it cannot be taken out.
    """
    for _ in range(3):  # what the first round frees may hold more
        if not any(reference() is not None for reference in made):
            return
        gc.collect()
    for reference in made:
        tensor = reference()
        if tensor is not None:
            _forget(tensor, depth=3)
        del tensor
    gc.collect()
    _LEFT[kind] = [reference for reference in made if reference() is not None]
    _check_nothing_is_left(kind)


def _forget(value: Any, depth: int) -> None:
    """Clear the function caches, and delete the entries of caches that hold a value: they are filled again.

    A dict is taken for a cache if the key is a size or another value; under a name it may hold a state, whose earlier
    value nobody knows any more.
    """
    for holder in gc.get_referrers(value):
        if isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif type(holder) in (dict, OrderedDict, defaultdict) and not _is_namespace(holder):
            for key in [key for key, held in list(holder.items()) if held is value and not isinstance(key, str)]:
                del holder[key]
        elif type(holder) is tuple and depth:
            _forget(holder, depth - 1)


def _is_namespace(holder: dict[Any, Any]) -> bool:
    """Return whether a dict holds the attributes of a module, a class or an object."""
    if "__name__" in holder or "__module__" in holder or "__dict__" in holder:
        return True
    return any(getattr(owner, "__dict__", None) is holder for owner in gc.get_referrers(holder))


def _check_nothing_is_left(kind: type) -> None:
    """Raise SurgeryError if a tensor of this or an earlier check of such a model is kept, for a live one to find."""
    kept = next((tensor for tensor in (reference() for reference in _LEFT.get(kind, ())) if tensor is not None), None)
    if kept is not None:
        raise SurgeryError(
            "CV412",
            f"while {kind.__name__} was checked on a copy without data, a forward or a hook kept a tensor of "
            f"shape {tuple(kept.shape)} outside the model: in a class attribute, a global or a list. It holds no "
            f"numbers: set that attribute back to what it was, or empty the list. Then keep such a tensor in a buffer "
            f"of the model, or inject with check=False.",
        )


def _copy(model: nn.Module, mode: CheckMode) -> nn.Module:
    kind = type(model).__name__
    try:
        fake = fake_copy(model, mode)
    except Exception as error:
        raise PlainModelError(
            "CV413", f"{kind} cannot be checked, because copying it failed: {first_line(error)}"
        ) from error
    live = {module: name for name, module in model.named_modules()}
    shared = next((live[module] for module in fake.modules() if module in live), None)
    if shared is not None:
        raise PlainModelError(
            "CV413",
            f"{kind} cannot be checked: its deep copy shares the module {shared!r} with it, so a check would touch the "
            f"live one.",
        )
    return fake


@contextmanager
def _putting_back() -> Iterator[None]:
    """Put back the random numbers, and keep autocast's cache and PyTorch's log of failed calls out of it."""
    numbers = RandomState()
    states: list[tuple[Callable[[Any], Any], Any]] = []
    states.append((torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()))
    torch.set_autocast_cache_enabled(False)  # it would keep the fake weights, cast
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

    Operations on fake tensors draw nothing, so PyTorch's generators change only if the model seeds them or sets their
    state, or if another thread draws: then putting them back would give that thread the same numbers twice. So with
    other threads they are put back only if the seed is another. Python's and NumPy's change if the model draws from
    them.
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
            if not _same(numpy_random.get_state(), self.numpy):
                numpy_random.set_state(self.numpy)
        is_alone = threading.active_count() == 1
        with _disable_current_modes():
            if torch.initial_seed() != self.seed or (is_alone and not torch.equal(torch.get_rng_state(), self.cpu)):
                torch.set_rng_state(self.cpu)
                for module, states in self.devices.items():
                    module.set_rng_state_all(states)


def _same(one: Any, other: Any) -> bool:
    """Return whether two states of NumPy's generator are the same: a tuple or a dict, of numbers and arrays."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple):
        return all(map(_same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


def first_line(error: BaseException) -> str:
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return (
            f"it reads the values of a tensor in Python ({str(error).splitlines()[0]}: float(), .item(), nonzero(), if "
            f"or a mask of data), which cannot be followed without data{_place(error)}"
        )
    try:
        lines = str(error).strip().splitlines() or [""]
    except Exception:  # of the model's own
        lines = ["(it has no text)"]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}{_place(error)}"


def _place(error: BaseException) -> str:
    """Return where the model's own code failed: the traceback is dropped, since it would keep the tensors."""
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(entry.filename)
        if not {Path(torch.__file__).parent, Path(__file__).parent} & set(file.parents):
            return f" (in {entry.name}, {file.name}:{entry.lineno})"
    return ""
