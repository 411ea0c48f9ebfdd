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

    PyTorch's own copy handles every kind of tensor, which takes long; plain ones are made here. A parameter shares its
    memory with the tensors that share it in the live model, although a real deep copy would part them: a forward may
    write through one and read through another.
    """
    copying = CopyMode(mode)
    memo: dict[int, Any] = {}
    for parameter in nn.Module.parameters(model):
        if type(parameter) is nn.Parameter and is_plain(parameter.data):
            fake = copying.fake(parameter)
            fake._is_param = True  # so isinstance(fake, nn.Parameter)
            memo[id(parameter)] = fake
    with copying:
        return copy.deepcopy(model, memo)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is no more than numbers in memory: of no subclass, not sparse and not lazy."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and tensor.device.type in ("cpu", "cuda", "mps", "xpu")
    )


class CopyMode(FakeCopyMode):
    """PyTorch's mode in which a deep copy of a tensor has no data, but plain tensors are copied here."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__(mode)
        self.storages: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or not is_plain(args[0]):
            return super().__torch_function__(func, types, args, kwargs)
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.fake(tensor)
        return memo[id(tensor)]

    def fake(self, tensor: Tensor) -> Any:
        """Return a plain tensor without its data, in the same memory as the copies of tensors that share its memory."""
        storage, key = storage_key(tensor)
        if key not in self.storages:
            self.storages[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(self.storages[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        return fake_tensor(self.fake_mode, meta, tensor.device).requires_grad_(tensor.requires_grad)
