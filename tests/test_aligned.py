"""Views aligned with the strides after a site."""

from __future__ import annotations

from fractions import Fraction

import pytest
import timm
import torch
import torchvision
from torch import nn

import networks
import oracle
from cropvote import Views, five_crop, hflip, inject_crop_vote, per_view, settings, sites, ten_crop
from cropvote.errors import InputTypeError, OptionError, ViewsError
from cropvote.images import example_of
from cropvote.probe.fakes import on_fake_copy
from cropvote.probe.strides import tail_stride
from cropvote.probe.trace import record_trace
from networks import IMAGES


@pytest.mark.parametrize("scale", [Fraction(5, 6), Fraction(7, 8), Fraction(1, 2), Fraction(1, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
def test_the_margin_is_the_nearest_multiple(scale, stride):
    """Compare with a search over all multiples: the nearest above 0, the smaller in a tie."""
    for side in range(8, 70):
        plain = side - five_crop(scale).crop_size(side, side)[0]
        margin = side - five_crop(scale).aligned(stride).crop_size(side, side)[0]
        multiples = list(range(stride, side, stride))
        wanted = min(multiples, key=lambda m: (abs(m - plain), m)) if multiples else plain
        assert margin == wanted, (side, stride, plain)


def test_one_stride_and_whole_maps_change_nothing():
    assert ten_crop().aligned(1) == ten_crop()
    assert hflip().aligned(4) == hflip()
    assert five_crop().aligned(2) != five_crop()
    assert hash(five_crop().aligned(2)) == hash(five_crop().aligned(2))
    assert five_crop().aligned(2).take([4]).stride == 2
    assert repr(ten_crop().aligned(2)) == "ten_crop().aligned(2)"
    with pytest.raises(ViewsError, match="CV213"):
        five_crop().aligned(0)


def unpadded(kernel: int, **options: int) -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, kernel, **options), pool, nn.Flatten(), nn.Linear(4, 5))


def strides(model: nn.Module, size: int) -> dict[str, int]:
    names = [site.name for site in sites(model, size, views=hflip())]
    example = example_of(model, size)
    return on_fake_copy(
        model, lambda fake: (lambda t: {n: tail_stride(t, n) for n in names})(record_trace(fake, example))
    )


@pytest.mark.parametrize(
    ("make", "size", "known"),
    [
        (networks.fer, 48, {"input": 8, "layer1": 8, "layer2": 4, "layer3": 2, "layer4": 1}),
        (torchvision.models.resnet18, 64, {"input": 32, "relu": 16, "layer1": 8, "layer2": 4, "layer4": 1}),
        (torchvision.models.resnet18, 75, {"input": 32, "layer1": 8, "layer3": 2}),
        (lambda: timm.create_model("convnext_atto"), 64, {"input": 32, "stages.0": 8, "stages.2": 2}),
        (networks.tokens, 48, {"blocks.0": 1}),
        (lambda: unpadded(5, stride=2), 8, {"0": 2}),
        (lambda: unpadded(5, stride=2), 9, {"0": 2}),
        (lambda: unpadded(7, dilation=2), 16, {"0": 1}),
    ],
)
def test_strides_of_known_networks(make, size, known):
    found = strides(make().eval(), size)
    assert {name: found[name] for name in known} == known


@pytest.mark.parametrize("site", ["layer1", "layer2", "layer3"])
def test_the_papers_sizes_are_aligned(site):
    model = inject_crop_vote(networks.fer(), after=site, input_size=48, align=True)
    plain = inject_crop_vote(networks.fer(), after=site, input_size=48)
    assert torch.equal(model(IMAGES), plain(IMAGES))


def test_an_aligned_injection_votes_over_those_crops():
    """A 15 x 15 map before a stride of 2: scale 0.7 gives crops of 11, with a margin of 4."""
    torch.manual_seed(0)
    tail = [nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)]
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *tail).eval()
    images = torch.randn(2, 3, 15, 15)

    def crops(x: torch.Tensor) -> list[torch.Tensor]:
        return [x[..., t : t + 11, u : u + 11] for t, u in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]

    wanted = oracle.nested_rows(plain, [("0", crops)], images)
    model = inject_crop_vote(plain, after="0", views=five_crop(0.7), input_size=15, align=True)
    assert settings(model).views.stride == 2
    with torch.no_grad():
        assert torch.allclose(per_view(model, images), wanted.float(), atol=1e-5)


def test_aligning_needs_a_size():
    with pytest.raises(OptionError, match="CV853"):
        inject_crop_vote(networks.fer(), after="layer1", align=True)
    with pytest.raises(OptionError, match="CV853"):
        inject_crop_vote(networks.fer(), after="layer1", input_size=48, align=True, check=False)
    with pytest.raises(InputTypeError, match="CV814"):
        inject_crop_vote(networks.fer(), after="layer1", input_size=48, align=1)


def test_aligned_views_of_several_sites():
    model = inject_crop_vote(
        networks.fer(), after={"layer2": five_crop(0.7), "input": hflip()}, input_size=48, align=True
    )
    assert settings(model).views.parts == (hflip(), five_crop(0.7).aligned(4))


def test_stored_views_keep_their_stride():
    views = Views([(0, 0), (1, 1)], scale=(0.5, 1), stride=3)
    assert Views.from_dict(views.to_dict()) == views


def test_a_map_too_small_for_aligned_crops_is_refused():
    """With a stride of 4 behind a map of 4×4, a crop of 3×3 would be off the grid."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=4, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(ViewsError, match="CV214"):
        inject_crop_vote(net, after="0", views="five", input_size=4, align=True)
    inject_crop_vote(net, after="0", views="five", input_size=16, align=True)
