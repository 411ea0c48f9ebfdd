"""Every private name of PyTorch that cropvote uses, each behind a function that says what it means.

A name that a later PyTorch drops breaks one function here, when it is called, and nothing at import.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckUnavailableError

__all__: list[str] = []

#: Private names, and public ones of private modules, by the module that has them; looked up when they are imported.
_NAMES = {
    "FakeCopyMode": "torch._subclasses.fake_tensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "FlopCounterMode": "torch.utils.flop_counter",
    "StorageWeakRef": "torch.multiprocessing.reductions",
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "_disable_current_modes": "torch.utils._python_dispatch",
    "flop_registry": "torch.utils.flop_counter",
    "sdpa_flop_count": "torch.utils.flop_counter",
    "tree_leaves": "torch.utils._pytree",
    "tree_map": "torch.utils._pytree",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_NAMES[name]), name)
    except (ImportError, AttributeError):
        return _stand_in(name)


def _stand_in(name: str) -> type:
    """Return a class in the place of a name that is gone, which says so when it is used."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise unavailable(f"{_NAMES[name]} has no {name}")

    return type(name, (), {"__init__": fail, "__contains__": fail})


def unavailable(why: str) -> CheckUnavailableError:
    """Return the error that a model cannot be checked, because PyTorch is another than this version knows."""
    return CheckUnavailableError(
        "CV490",
        f"checks are not available with PyTorch {torch.__version__} ({why}): use a version that this cropvote was "
        f"tested with, or pass check=False to inject_crop_vote. Splits, votes and layers work as ever.",
    )


def uncounted_attention() -> dict[Any, Any]:
    """Return how to count the operations of attention on a CPU, which PyTorch before 2.15 does not count by itself."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    count = __getattr__("sdpa_flop_count")
    return {} if operation in __getattr__("flop_registry") else {operation: lambda q, k, v, *_, **__: count(q, k, v)}


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace is recording operations."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]  # public, but not exported


def is_recorded() -> bool:
    """Return whether operations are being recorded into a graph: compiled, exported or traced by torch.jit."""
    return torch.compiler.is_compiling() or is_jit_tracing()


def is_captured() -> bool:
    """Return whether the current CUDA stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_vmapped() -> bool:
    """Return whether a transform of torch.func is active."""
    return torch._C._functorch.maybe_current_level() is not None


def is_in_backward() -> bool:
    """Return whether a backward pass is running in this thread, as when checkpointing runs a part again."""
    return torch._C._current_graph_task_id() != -1


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile wraps this module, or replaced its call."""
    instance = module.__dict__
    return instance.get("_compiled_call_impl") is not None or "_orig_mod" in instance.get("_modules", ())


def is_under_compiler() -> bool:
    """Return whether this code runs eagerly inside a compiled call, whose parts may be compiled one by one."""
    eval_frame = getattr(torch._C, "_dynamo", None) and torch._C._dynamo.eval_frame
    callback = getattr(eval_frame, "get_eval_frame_callback", None)
    return callback is not None and callback() not in (None, False)


def has_compiled_forward(module: nn.Module) -> bool:
    """Return whether the forward of the module's class was decorated with torch.compile."""
    return hasattr(type(module).forward, "_torchdynamo_orig_callable")


def original(module: nn.Module) -> nn.Module | None:
    """Return the module inside the wrapper that torch.compile returns, or None."""
    children = module.__dict__.get("_modules")  # not vars(), which the compiler of PyTorch 2.6 does not know
    return children.get("_orig_mod") if isinstance(children, dict) else None  # a scripted module has its own kind


def call_eagerly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module, with its hooks, past ``module.compile()``."""
    return module._call_impl(*args, **kwargs)


def without_subclasses() -> AbstractContextManager[Any]:
    """Return a context in which tensors of a subclass are treated as plain tensors."""
    return torch._C.DisableTorchFunctionSubclass()


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape but no data, like those that a check makes."""
    return isinstance(tensor, _fake_tensor_class())


@functools.cache
def _fake_tensor_class() -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


def is_simple_fake(value: Any, mode: Any) -> bool:
    """Return whether a value is a strided tensor of this mode without data, of no subclass, known number or flag."""
    return (
        type(value) is _fake_tensor_class()
        and value.constant is None
        and value.layout is torch.strided
        and value.fake_mode is mode
        and not value.is_conj()
        and not value.is_neg()
    )


def fake_tensor(mode: Any, meta: Tensor, device: torch.device) -> Tensor:
    """Return a meta tensor as one without data on a device."""
    return _fake_tensor_class()(mode, meta, device)


def storage_key(tensor: Tensor) -> tuple[Any, int]:
    """Return the storage of a tensor, also inside vmap or grad, and a number that is the same for its views."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    if tensor.layout != torch.strided:  # a sparse tensor has no storage of its own
        return tensor, id(tensor)
    storage = tensor.untyped_storage()
    return storage, storage._cdata


def written_arguments(operation: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operation writes, the running statistics of a norm among them."""
    names, written, running = _schema(operation)
    if not written and not running:
        return []
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    if running and (values.get("training") or values.get("train")):
        written = (*written, *running)
    return [values[name] for name in written if name in values]


@functools.cache
def _schema(operation: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the names of an operation's arguments, of those it writes, and of running statistics.

    A batch norm writes these in training mode, which its schema does not say.
    """
    arguments = operation._schema.arguments
    names = tuple(argument.name for argument in arguments)
    written = tuple(argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write)
    return names, written, tuple(name for name in names if name.startswith("running_"))


def name_of(operation: Any) -> str:
    """Return the name of an operation, without its overload."""
    return operation.overloadpacket.__name__
