"""The memo of operations gives what PyTorch gives."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from cropvote import inject_crop_vote, sites
from cropvote._torch import FakeTensorMode, storage_key
from cropvote.probe import memo, mode


def metadata(tensor, args):
    is_view = bool(args) and isinstance(args[0], Tensor) and storage_key(tensor)[1] == storage_key(args[0])[1]
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, is_view


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("vit_tiny_patch16_224", "blocks.2"),
        pytest.param("efficientnet_b0", "blocks.1", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", "layers.0", marks=pytest.mark.slow),
    ],
)
def test_every_answer_is_pytorchs(name, site, monkeypatch):
    """All operations of a check that the memo answers are run by PyTorch, too."""
    compared: Counter[str] = Counter()

    def run_both(self, func, types, args, kwargs):
        key = memo.key_of(self, func, args, kwargs)
        known = None if key is None else memo.recall(self, key, args)
        output = FakeTensorMode.__torch_dispatch__(self, func, types, args, kwargs)
        if known is not None:
            pairs = zip(mode.tensors_in(known), mode.tensors_in(output), strict=True)
            assert all(metadata(ours, args) == metadata(theirs, args) for ours, theirs in pairs), func
            assert isinstance(known, tuple) == isinstance(output, tuple)
            assert not args or (known is args[0]) == (output is args[0])
            compared[memo._kind(func)] += 1
        elif key is not None:
            memo.remember(self, key, args, kwargs, output)
        return output

    monkeypatch.setattr(memo, "_MEMO", {})
    monkeypatch.setattr(mode.CheckMode, "_run", run_both)
    model = timm.create_model(name, num_classes=7, img_size=224) if "vit" in name else timm.create_model(name)
    inject_crop_vote(model, after=site, views="five", input_size=224)
    expected = {"new", "norm", "write"} if name == "efficientnet_b0" else {"new", "view"}
    assert all(compared[kind] > 100 for kind in expected), compared


def test_conjugated_tensors_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(memo, "_MEMO", {})

    def flags(x):
        return [t.is_conj() or t.is_neg() for t in (x.view(2, 3), x.expand(4, 6), x.imag, torch.dot(x, x))]

    plain = torch.zeros(6, dtype=torch.complex64)
    with FakeTensorMode() as pytorch:
        expected = flags(pytorch.from_tensor(plain).conj())
    with mode.CheckMode() as checked:
        x = checked.from_tensor(plain)
        assert [flags(x), flags(x)] == [[False] * 4] * 2
        assert [flags(x.conj()), flags(x.conj())] == [expected, expected]
    assert any(expected)


def norm(x, training=False, width=4):
    return functional.batch_norm(x, torch.zeros(width), torch.ones(width), training=training)


OPERATIONS = {
    "add": lambda x: x + 1,
    "add a channel each": lambda x: x + torch.zeros(4, 1, 1),
    "relu in place": lambda x: (x + 0).relu_(),
    "flatten": lambda x: x.flatten(1),
    "slice": lambda x: x[:, :, 1:],
    "slice a slice": lambda x: x[:, :, 1:][:, :, 1:],
    "transpose": lambda x: x.transpose(1, 2),
    "mean": lambda x: x.mean((2, 3)),
    "to double": lambda x: x.double(),
    "concatenate": lambda x: torch.cat([x, x.flip(3)]),
    "an operation without output": lambda x: torch._assert_async(x.sum() == 0) or x,
    "norm": norm,
    "norm in training": lambda x: norm(x, training=True),
}
INPUTS = {
    "contiguous": lambda: torch.zeros(2, 4, 6, 8),
    "another size": lambda: torch.zeros(3, 4, 5, 5),
    "channels_last": lambda: torch.zeros(2, 4, 6, 8).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.zeros(2, 6, 4, 8).transpose(1, 2),
    "double": lambda: torch.zeros(2, 4, 6, 8, dtype=torch.double),
    "a part": lambda: torch.zeros(2, 4, 9, 9)[:, :, 1:7, :8],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_and_strides_are_those_of_real_tensors(name, monkeypatch):
    """Twice, the second time by the memo, and in both orders."""
    monkeypatch.setattr(memo, "_MEMO", {})
    unlike = ("double", "transposed") if "norm" in name else ()  # weights of another type; PyTorch's own fake errs
    inputs = [make for kind, make in INPUTS.items() if kind not in unlike]
    for make in (*inputs, *inputs, *reversed(inputs)):
        expected = OPERATIONS[name](make())
        with mode.CheckMode().running(), torch.no_grad():
            output = OPERATIONS[name](make())
        assert metadata(output, ()) == metadata(expected, ())


def test_a_norm_of_another_width_fails(monkeypatch):
    """The memo knows batch norms by their width, whatever the size of their maps."""
    monkeypatch.setattr(memo, "_MEMO", {})
    with mode.CheckMode().running(), torch.no_grad():
        of_four = [torch.ones(4)] * 4
        for side in (4, 5, 6):
            torch.ops.aten.native_batch_norm(torch.zeros(2, 4, side, side), *of_four, False, 0.1, 1e-5)
            with pytest.raises(RuntimeError):
                torch.ops.aten.native_batch_norm(torch.zeros(2, 5, side, side), *of_four, False, 0.1, 1e-5)


def test_a_number_that_is_known_is_not_forgotten():
    """The memo keeps no values, so it does not answer for tensors that have one."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.site, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(nn.init.ones_(Tensor([0.0])))

        def forward(self, x):
            x = self.site(x).mean((2, 3))
            return x * 2 if (self.scale + 1).item() > 1.5 else x

    for _ in range(2):
        assert [site.name for site in sites(Scaled().eval(), 32)] == ["input", "site"]
