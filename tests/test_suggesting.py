"""suggest_site: compared with a search over all sites, and its errors."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

import networks
from cropvote import (
    five_crop,
    hflip,
    inject_crop_vote,
    profile,
    settings,
    sites,
    suggest_site,
    ten_crop,
)
from cropvote.errors import OptionError, SiteError


@pytest.mark.parametrize(
    "budget",
    [
        {"max_macs_ratio": 4},
        {"max_memory_mib": 3},
        {"max_macs_ratio": 6, "max_memory_mib": 2.5},
        {"max_macs_ratio": 99},
    ],
)
@pytest.mark.parametrize("every_site", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_earliest_site_within_the_budget(budget, every_site):
    model = networks.fer()
    inside = [row for row in profile(model, 48, every_site=every_site) if row.site not in ("baseline", "input")]
    limits = (budget.get("max_macs_ratio", 1e9), budget.get("max_memory_mib", 1e9))
    fitting = [row for row in inside if row.ratio <= limits[0] and row.train_memory_mib <= limits[1]]
    first = next(row for row in fitting if row.tail_share >= 0.01)
    *_, wanted = (row for row in fitting if (row.ratio, row.shape) == (first.ratio, first.shape))  # bn1, relu
    found = suggest_site(model, 48, **budget, every_site=every_site)
    assert (found.site, found.cost) == (wanted.site, wanted)
    kind = "site" if every_site else "stage"
    assert found.reason.startswith(f"{found.site!r} is the earliest {kind} that costs at most")
    coincide = f"only {found.cost.distinct} of the 10 views differ"
    assert (coincide in found.reason) == (found.cost.distinct < 10)


def test_no_site_is_suggested_if_the_views_agree_after_it():
    """Sites after the last attention or convolution are not suggested."""
    vit = networks.tokens(img_size=96)  # a grid on which all ten views differ
    with pytest.raises(SiteError, match=r"CV151.*blocks\.1"):
        suggest_site(vit, 96, max_macs_ratio=2.4)
    assert suggest_site(vit, 96, max_macs_ratio=3.5).site == "blocks.1"


def test_views_that_coincide_are_named():
    assert "only 8 of the 10 views differ" in suggest_site(networks.tokens(), 48, max_macs_ratio=99).reason


def test_a_map_and_its_tokens_count_as_one_place():
    """In a ViT for any image size, the map before the position embedding is a site, but after it is better."""
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, dynamic_img_size=True)
    assert {"patch_embed.proj", "pos_drop"} < {site.name for site in sites(model)}
    assert suggest_site(model, max_macs_ratio=12).site == "pos_drop"
    found = suggest_site(model, max_macs_ratio=4)
    assert found.site == "blocks.0"
    assert "'pos_drop', before it, has" in found.reason
    assert "mirror images say the same: see five_crop()" in found.reason
    assert "five_crop" not in suggest_site(model, max_macs_ratio=4, views=five_crop()).reason


def test_the_error_proposes_fewer_views():
    for views, hint in ((ten_crop(), r"views=five_crop\(\) or views=hflip\(\)\."), (five_crop(), r"views=hflip\(\)\.")):
        with pytest.raises(SiteError, match=rf"CV151.*: {hint}$"):
            suggest_site(networks.fer(), 48, max_macs_ratio=0.1, views=views)
    with pytest.raises(SiteError, match="CV151"):
        suggest_site(networks.fer(), 48, max_macs_ratio=0.1, views=hflip())


def test_no_site_within_the_budget():
    with pytest.raises(SiteError, match=r"CV151.*layer3'"):
        suggest_site(networks.fer(), 48, max_macs_ratio=0.5)
    with pytest.raises(SiteError, match=r"CV151.*layer4\.0'"):
        suggest_site(networks.fer(), 48, max_macs_ratio=0.5, every_site=True)
    with pytest.raises(OptionError, match="CV820"):
        suggest_site(networks.fer(), 48)
    for limit in (0, -1, "2", float("nan"), True):
        with pytest.raises(OptionError, match="CV821"):
            suggest_site(networks.fer(), 48, max_memory_mib=limit)
    with pytest.raises(SiteError, match="CV151"):
        suggest_site(Flat(), 48, max_macs_ratio=2)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 48 * 48, 7)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_the_suggestion_is_a_site_that_votes():
    model = torchvision.models.resnet18(num_classes=7).eval()
    found = suggest_site(model, 64, max_macs_ratio=4)
    assert inject_crop_vote(model, after=found.site, input_size=64)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert len(settings(model).views) == 10
