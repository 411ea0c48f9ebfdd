"""A deep copy whose tensors hold no data: their shapes, strides and types stay, and who shares memory with whom."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import FakeCopyMode, FakeTensorMode, fake_tensor, storage_key

__all__: list[str] = []


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a deep copy of a model, its tensors without data.

    PyTorch's own copy describes each tensor at length, for every kind that there is. Plain ones are made here, in a
    tenth of the time.
    """
    memo: dict[int, Any] = {}
    for parameter in nn.Module.parameters(model):
        data = parameter.data
        if type(parameter) is nn.Parameter and is_plain(data) and data.is_contiguous():
            memo[id(parameter)] = _fake_parameter(parameter, mode)
    with CopyMode(mode):
        return copy.deepcopy(model, memo)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is no more than numbers in memory: no subclass, not sparse, lazy or in a graph."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not tensor.is_inference()
        and tensor.device.type in ("cpu", "cuda", "mps", "xpu")
    )


def _fake_parameter(parameter: nn.Parameter, mode: FakeTensorMode) -> Tensor:
    """Return a parameter's copy, which has memory of its own, as every deep copy of a parameter."""
    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    fake = fake_tensor(mode, meta, parameter.device)
    fake.requires_grad_(parameter.requires_grad)
    fake._is_param = True  # so isinstance(fake, nn.Parameter)
    return fake


class CopyMode(FakeCopyMode):
    """PyTorch's mode in which a deep copy of a tensor has no data, with a short way for plain tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__(mode)
        self.storages: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or not is_plain(args[0]):
            return super().__torch_function__(func, types, args, kwargs)
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._fake(tensor)
        return memo[id(tensor)]

    def _fake(self, tensor: Tensor) -> Tensor:
        storage, key = storage_key(tensor)
        if key not in self.storages:
            self.storages[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(self.storages[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        return fake_tensor(self.fake_mode, meta, tensor.device)
