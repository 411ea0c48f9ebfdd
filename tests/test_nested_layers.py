"""CropVote layers inside each other: the votes of all are one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import networks
import oracle
from cropvote import (
    CropVote,
    CropVoteError,
    five_crop,
    hflip,
    per_view,
    settings,
)

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def layered(**options: object) -> nn.Module:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    inner = CropVote(tail, views=five_crop())
    middle = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), inner)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CropVote(middle, views=hflip(), **options)).eval()


def rows_of_layers() -> torch.Tensor:
    net = layered()
    with torch.no_grad():
        tail = net[1].tail[1].tail
        views = [v for flip in oracle.flip_views(net[0](IMAGES)) for v in oracle.five_views(net[1].tail[0](flip))]
        return torch.stack([tail(view) for view in views], 1)


@pytest.mark.parametrize("how", ["soft", "hard"])
def test_layers_nest(how):
    net, wanted = layered(vote=how), rows_of_layers()
    assert torch.allclose(per_view(net, IMAGES), wanted, atol=1e-6)
    assert torch.allclose(net(IMAGES), oracle.vote(wanted, how).float(), atol=1e-5)
    assert torch.allclose(net.train()(IMAGES), wanted.flatten(0, 1), atol=1e-6)
    assert settings(net[1].tail[1]) is settings(net[1])
    assert len(settings(net[1]).views) == 10


def test_nested_layers_have_the_knobs():
    wanted = rows_of_layers()
    net = layered(eval_views="centre+mirror", train_views=3)
    inner = networks.counted(net[1].tail[0])
    assert torch.allclose(net(IMAGES), wanted[:, [4, 9]].mean(1), atol=1e-6)
    settings(net[1]).eval_views = [6]
    assert torch.allclose(net(IMAGES), wanted[:, 6], atol=1e-6)
    assert inner == [6, 3]
    settings(net[1]).eval_views = None
    settings(net[1]).views_per_pass = 4
    assert torch.allclose(net(IMAGES), wanted.mean(1), atol=1e-6)
    assert inner[2:] == [6, 2, 2]
    settings(net[1]).views_per_pass = None
    net.train()
    net[1].tail.eval()  # a frozen part: the outer layer's mode decides
    drawn = [oracle.whose(net(IMAGES), wanted) for _ in range(8)]
    assert all(views == samples[0] and len(set(views)) == 3 for samples in drawn for views in samples)
    assert len({tuple(samples[0]) for samples in drawn}) > 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_nested_layers(duplicate):
    net = layered()
    twin = duplicate(net)
    settings(net[1]).eval_views = "centre"
    assert torch.allclose(twin(IMAGES), rows_of_layers().mean(1), atol=1e-6)
    assert settings(twin[1].tail[1]) is settings(twin[1])


def test_nested_layers_compiled():
    wanted = rows_of_layers()
    compiled = torch.compile(layered(), fullgraph=True, dynamic=True, backend="eager")
    assert torch.allclose(compiled(IMAGES), wanted.mean(1), atol=1e-6)
    some = torch.compile(layered(eval_views=[0, 7, 9]), fullgraph=True, backend="eager")
    assert torch.allclose(some(IMAGES), wanted[:, [0, 7, 9]].mean(1), atol=1e-6)
    with pytest.raises(Exception, match="views_per_pass of layers in one another cannot be compiled"):
        torch.compile(layered(views_per_pass=3), fullgraph=True, backend="eager")(IMAGES)


def test_layers_that_cannot_nest():
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(CropVoteError, match="2 CropVote layers side by side"):
        CropVote(nn.ModuleList([CropVote(tail), CropVote(tail)]))
    with pytest.raises(CropVoteError, match=r"says vote='hard', which is for the outer layer"):
        CropVote(CropVote(tail, vote="hard"))
