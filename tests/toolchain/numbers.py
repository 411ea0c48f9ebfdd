"""Copies, files and dtypes."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import networks
import oracle
from cropvote import inject_crop_vote, remove_crop_vote, settings
from toolchain.table import SIDE, Split, agree, expected, images, tool, voting


@tool("copy.deepcopy and pickle", "the copy votes and has its own settings")
def _(_path: Path, split: Split) -> None:
    model, stream = voting(split), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        assert {training for training, _ in twin._cropvote.checked} == {True, False}
        agree(twin(images()), expected(split))
        settings(twin).enabled = False
        agree(model(images()), expected(split))
        agree(twin(images()), networks.fer()(images()))
        assert type(remove_crop_vote(twin)) is type(networks.fer())


@tool("state_dict", "the plain model's keys, loaded with `weights_only=True`, both ways")
def _(path: Path, split: Split) -> None:
    torch.save(voting(split).state_dict(), path / "voting.pt")
    torch.save(networks.fer().state_dict(), path / "plain.pt")
    torch.manual_seed(9)
    other = voting(split, make=lambda: networks.FerResNet18(width=8).eval())
    other.load_state_dict(torch.load(path / "plain.pt", weights_only=True))
    agree(other(images()), expected(split))
    plain = networks.fer()
    plain.load_state_dict(torch.load(path / "voting.pt", weights_only=True))
    agree(plain(images()), networks.fer()(images()))


@tool("meta device", "shapes without data, `to_empty`, weights loaded after the injection")
def _(_path: Path, split: Split) -> None:
    with torch.device("meta"):
        model = networks.FerResNet18(width=8).eval()
    inject_crop_vote(model, after=split.after, input_size=SIDE)
    assert model(images().to("meta")).shape == (3, 7)
    model.to_empty(device="cpu").load_state_dict(networks.fer().state_dict())
    agree(model(images()), expected(split))


@tool("autocast", "bfloat16 and float16; the vote is float32")
def _(_path: Path, split: Split) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = voting(split)(images())
            assert voting(split).train()(images()).shape == (30, 7)
        assert found.dtype == torch.float32
        agree(found, expected(split), 0.05)


@tool("float64, bfloat16, float16", "the vote is float64 for float64, else float32")
def _(_path: Path, split: Split) -> None:
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)):
        found = voting(split).to(dtype)(images(3, dtype))
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        agree(found, expected(split), tolerance)


@tool("channels_last", "stays channels_last after the split")
def _(_path: Path, split: Split) -> None:
    model, seen = voting(split).to(memory_format=torch.channels_last), []
    model.layer4.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    agree(model(images().to(memory_format=torch.channels_last)), expected(split))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@tool("torchao", "int8 weight-only quantisation of a voting model")
def _(_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = inject_crop_vote(networks.tokens(), after="blocks.0", input_size=SIDE)
    exact = model(images())
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.head.weight).__name__ != "Parameter"
    assert not torch.equal(model(images()), exact)
    agree(model(images()), exact, 0.05)


@tool("torch.nn.utils.prune", "before and after the injection, also at the site")
def _(_path: Path) -> None:
    from torch.nn.utils import prune

    def pruned(model: nn.Module) -> nn.Module:
        prune.l1_unstructured(model.site, "weight", amount=0.5)
        return model

    make = functools.partial(_seeded, networks.Net)
    wanted = oracle.vote(oracle.tail_rows(pruned(make()), "site", images()), "soft")
    agree(inject_crop_vote(pruned(make()), after="site", input_size=SIDE)(images()), wanted)
    agree(pruned(inject_crop_vote(make(), after="site", input_size=SIDE))(images()), wanted)


@tool("parametrisations", "before and after the injection, also at the site; remove the later one first")
def _(_path: Path) -> None:
    from torch.nn.utils import parametrizations

    make = functools.partial(_seeded, networks.Net)
    wanted = oracle.vote(oracle.tail_rows(make(), "site", images()), "soft")
    for early in (True, False):
        model = make()
        if early:
            parametrizations.weight_norm(model.site)
        inject_crop_vote(model, after="site", input_size=SIDE)
        if not early:
            parametrizations.weight_norm(model.site)
        agree(model(images()), wanted)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()
