"""The copy without data is the model, but for the numbers."""

from __future__ import annotations

from itertools import combinations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from cropvote._torch import FakeTensorMode, is_fake, storage_key
from cropvote.probe.copying import fake_copy


class Odd(nn.Module):
    """Tensors that share memory, that start behind its beginning, that are transposed, empty, tied or of a subclass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.tied = nn.Linear(3, 5)
        self.tied.weight = self.linear.weight
        self.frozen = nn.Parameter(torch.ones(4, 6).t(), requires_grad=False)
        self.part = nn.Parameter(self.linear.weight.data[1:])  # in the memory of another parameter
        self.seen = self.linear.weight.data.t()
        self.last = nn.Conv2d(3, 8, 3).to(torch.bfloat16, memory_format=torch.channels_last)
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("row", self.table[1])
        self.register_buffer("counter", torch.tensor(7))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("as_integers", self.table.view(torch.int32))
        self.register_buffer("none", None)
        self.loose = self.table.t()  # no buffer
        self.listed = [self.table[:, 1:3], torch.zeros(2, requires_grad=True)]

    def tensors(self):
        lists = {"loose": self.loose, "seen": self.seen, "listed 0": self.listed[0], "listed 1": self.listed[1]}
        return {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers()), **lists}


def described(tensor: Tensor) -> tuple[object, ...]:
    plain = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
    return *plain, tensor.requires_grad, tensor.is_leaf, isinstance(tensor, nn.Parameter)


@pytest.mark.parametrize(
    "make", [Odd, torchvision.models.resnet18, lambda: timm.create_model("vit_tiny_patch16_224")], ids=["odd", "r", "v"]
)
def test_the_copy_is_the_model(make):
    model = make()
    fake = fake_copy(model, FakeTensorMode())
    all_of = type(model).tensors if isinstance(model, Odd) else lambda m: m.state_dict(keep_vars=True)
    before, ours = all_of(model), all_of(fake)
    assert [*before] == [*ours]
    for name, tensor in ours.items():
        assert is_fake(tensor)
        assert described(tensor) == described(before[name]), name
    shared = [pair for pair in combinations(before, 2) if _share(before, pair)] if isinstance(model, Odd) else []
    for pair in combinations(ours, 2) if isinstance(model, Odd) else []:
        assert _share(ours, pair) == (pair in shared), pair
    for name, module in model.named_modules():
        assert [*vars(module)] == [*vars(fake.get_submodule(name))]
        assert fake.get_submodule(name) is not module


def _share(tensors, pair):
    one, other = (storage_key(tensors[name])[1] for name in pair)
    return one == other


def test_tied_parameters_stay_one():
    fake = fake_copy(Odd(), FakeTensorMode())
    assert fake.tied.weight is fake.linear.weight


def test_a_parameter_of_a_subclass_is_left_to_pytorch():
    model = nn.Sequential(nn.LazyLinear(3))
    assert isinstance(fake_copy(model, FakeTensorMode())[0].weight, nn.UninitializedParameter)
