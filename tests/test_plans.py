"""Views over several sites: order, computation, checks, costs, and the same guarantees as for a single site."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import networks
import oracle
from cropvote import (
    CropVoteError,
    CropVoteLoss,
    Views,
    five_crop,
    hflip,
    inject_crop_vote,
    per_view,
    settings,
    split_views,
    ten_crop,
)
from cropvote.call import cut_views, draw
from cropvote.cuts import Cut, ViewProduct, make_cuts, make_random_cuts, n_kept, n_total
from cropvote.errors import RowsError, SurgeryError
from cropvote.plots import plot_views
from cropvote.views import grid
from networks import IMAGES

CPU = torch.device("cpu")
TWO = {"layer1": hflip(), "layer3": five_crop()}
BY_HAND = [("layer1", oracle.flip_views), ("layer3", oracle.five_views)]


def voting(plan: dict[str, Views] | None = None, make=networks.fer, **options: object) -> nn.Module:
    return inject_crop_vote(make(), after=plan or TWO, **{"input_size": 48, **options})


def by_hand(sites=BY_HAND, make=networks.fer) -> torch.Tensor:
    with torch.no_grad():
        return oracle.nested_rows(make(), sites, IMAGES).float()


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "sites"),
    [
        (TWO, BY_HAND),
        ({"layer3": five_crop(), "layer1": hflip()}, BY_HAND),
        ({"layer2": five_crop(), "layer3": hflip()}, [("layer2", oracle.five_views), ("layer3", oracle.flip_views)]),
        (
            {"layer1": five_crop(), "layer2": five_crop()},
            [("layer1", oracle.five_views), ("layer2", oracle.five_views)],
        ),
        (
            {"conv1": hflip(), "layer1": five_crop(), "layer4": hflip()},
            [("conv1", oracle.flip_views), ("layer1", oracle.five_views), ("layer4", oracle.flip_views)],
        ),
    ],
    ids=["two", "any order of writing", "crops first", "crops of crops", "three sites"],
)
def test_the_rows_match_nested_replacements(plan, sites):
    model, wanted = voting(plan), by_hand(sites)
    assert torch.allclose(per_view(model, IMAGES), wanted, atol=1e-5)
    assert torch.allclose(model(IMAGES), wanted.mean(1), atol=1e-5)
    settings(model).vote = "hard"
    assert torch.allclose(model(IMAGES), oracle.vote(wanted, "hard").float(), atol=1e-5)
    settings(model).eval_output = "views"
    assert torch.allclose(model(IMAGES), oracle.sample_major(list(wanted.unbind(1))), atol=1e-5)


def test_images_as_the_first_site():
    model = voting({"input": hflip(), "layer2": five_crop()})
    wanted = [oracle.tail_rows(networks.fer(), "layer2", x, oracle.five_views) for x in oracle.flip_views(IMAGES)]
    assert torch.allclose(per_view(model, IMAGES), torch.cat(wanted, 1).float(), atol=1e-5)


def test_the_order_is_that_of_ten_crop():
    """With early mirroring and late cropping, each row shows the same part of the map as in ten_crop."""
    maps = x = torch.randn(2, 3, 6, 12)
    for cut in make_cuts(ViewProduct([hflip(), five_crop()])).at:
        maps = cut_views(cut, maps, "NCHW")
    assert torch.equal(maps, split_views(x, ten_crop()))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_cuts_give_exactly_the_requested_views(sizes, data):
    """Follow every subset through the groups of maps before and after each cut."""
    views = ViewProduct([grid(1, n, scale=(1, 0.5)) for n in sizes])
    every = list(itertools.product(*map(range, sizes)))
    wanted = sorted(data.draw(st.sets(st.integers(0, len(every) - 1), min_size=1)))
    maps: list[tuple[int, ...]] = [()]
    for cut, size in zip(make_cuts(views, wanted).at, sizes, strict=True):
        assert cut.n_maps == len(maps)
        made = [(*one, i) for one in maps for i in range(size)]
        assert n_total(cut) == len(made)
        maps = made if cut.indices is None else [made[i] for i in cut.indices]
        assert n_kept(cut) == len(maps)
    assert maps == [every[i] for i in wanted]
    assert len(views) == len(every)
    assert [views[i] for i in (0, -1)] == [tuple(p[0] for p in views.parts), tuple(p[-1] for p in views.parts)]


# --- fewer views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["centre", "centre+mirror", [4], [0, 5], [1, 2, 9], [7], list(range(10))])
def test_only_the_requested_views_are_computed_at_each_site(asked):
    columns = {"centre": [4], "centre+mirror": [4, 9]}.get(asked, asked) if isinstance(asked, str) else asked
    model = voting(eval_views=asked)
    front, middle, tail = networks.counted(model.bn1), networks.counted(model.layer2), networks.counted(model.layer4)
    assert torch.allclose(model(IMAGES), by_hand()[:, columns].mean(1), atol=1e-5)
    halves = len({column // 5 for column in columns})
    assert (front, middle, tail) == ([3], [3 * halves], [3 * len(columns)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views_that_differ_between_the_groups_keep_the_memory_format(layout):
    x = torch.randn(4, 3, 12, 12).to(memory_format=layout)  # two samples of two maps
    rows = cut_views(Cut(five_crop(), 2).keeping([0, 3, 9]), x, "NCHW")
    every = split_views(x, five_crop()).view(2, 10, 3, 10, 10)
    assert torch.equal(rows, every[:, [0, 3, 9]].flatten(0, 1))
    assert rows.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_a_few_views_are_drawn_and_spread_over_the_first_site(count):
    model, every = networks.still(voting(train_views=count)), by_hand()
    middle = networks.counted(model.layer2)
    drawn = [oracle.whose(model(IMAGES), every) for _ in range(12)]
    for samples in drawn:
        assert all(views == samples[0] for views in samples)
        assert samples[0] == sorted(set(samples[0]))
        assert len(samples[0]) == count
        halves = Counter(view // 5 for view in samples[0])
        assert max(halves.values()) - min([*halves.values(), *([0] if len(halves) < 2 and count > 1 else [])]) <= 1
    assert set(middle) == {3 * min(count, 2)}
    assert count == 10 or len({tuple(samples[0]) for samples in drawn}) > 3


@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_combination_is_drawn_equally_often(count):
    torch.manual_seed(0)
    seen = Counter()
    for _ in range(3000):
        maps: list[tuple[int, ...]] = [()]
        for cut in make_random_cuts(ViewProduct([hflip(), grid(1, 3, scale=(1, 0.5))]), count).at:
            made = [(*one, i) for one in maps for i in range(len(cut.views))]
            total = len(cut.views)
            chosen = draw(total, cut.n_random, CPU, cut.n_maps).tolist() if cut.n_random else range(n_total(cut))
            maps = [made[i] for i in chosen]
        seen.update(maps)
    assert len(seen) == 6
    share = count / 6
    for times in seen.values():
        assert abs(times - 3000 * share) < 4 * (3000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_parts_draw_the_same_again(reentrant):
    def gradient(checkpointed: bool) -> torch.Tensor:
        model = networks.still(voting(train_views=3))
        for stage in (model.layer1, model.layer3) if checkpointed else ():
            plain = stage.forward
            stage.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=reentrant)
        torch.manual_seed(3)
        images = IMAGES.clone().requires_grad_()
        CropVoteLoss(nn.CrossEntropyLoss())(model(images), torch.tensor([0, 1, 2])).backward()
        return images.grad

    assert torch.allclose(gradient(True), gradient(False), atol=1e-7)


# --- guarantees ------------------------------------------------------------------------------------------------------


def test_the_first_call_checks_if_no_size_is_known():
    plan = {"site": five_crop(), "front": hflip()}
    plain = networks.Net().eval()
    model = inject_crop_vote(copy.deepcopy(plain), after=plan)
    x = torch.randn(2, 3, 24, 24)
    wanted = oracle.nested_rows(plain, [("front", oracle.flip_views), ("site", oracle.five_views)], x)
    assert torch.allclose(model(x), wanted.mean(1), atol=1e-5)
    fresh = inject_crop_vote(copy.deepcopy(plain), after=plan)
    with pytest.raises(Exception, match="CV503"):
        torch.compile(fresh, backend="eager")(x)


class Reversed(nn.Module):
    """Its forward runs the second module first."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)))


def test_the_order_is_that_of_the_forward_not_the_definition():
    plan = {"second": five_crop(), "first": hflip()}
    plain = Reversed().eval()
    model = inject_crop_vote(copy.deepcopy(plain), after=plan, input_size=(3, 24, 24))
    x = torch.randn(2, 3, 24, 24)
    wanted = oracle.nested_rows(plain, [("first", oracle.flip_views), ("second", oracle.five_views)], x)
    assert torch.allclose(per_view(model, x), wanted, atol=1e-5)
    with pytest.raises(SurgeryError, match="CV416"):
        inject_crop_vote(copy.deepcopy(plain), after=plan)(x)


def test_tokens_behind_tokens():
    """A transformer's 6x6 grid is cropped to 5x5 after one block, and mirrored after the next."""
    model = inject_crop_vote(networks.tokens(), after={"blocks.0": five_crop(), "blocks.1": hflip()}, input_size=48)

    def crops(x: torch.Tensor) -> list[torch.Tensor]:
        grid_, prefix = x[:, 3:].transpose(1, 2).unflatten(2, (6, 6)), x[:, :3]
        return [torch.cat([prefix, v.flatten(2).transpose(1, 2)], 1) for v in oracle.five_views(grid_)]

    def flips(x: torch.Tensor) -> list[torch.Tensor]:
        grid_, prefix = x[:, 3:].transpose(1, 2).unflatten(2, (5, 5)), x[:, :3]
        return [torch.cat([prefix, v.flatten(2).transpose(1, 2)], 1) for v in oracle.flip_views(grid_)]

    with torch.no_grad():
        wanted = oracle.nested_rows(networks.tokens(), [("blocks.0", crops), ("blocks.1", flips)], IMAGES)
        assert torch.allclose(per_view(model, IMAGES), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_s3_tiny_224"])
def test_channels_last_maps(name):
    model = timm.create_model(name, num_classes=7).eval()
    stages = ("stages.0", "stages.2") if name.startswith("convnext") else ("patch_embed", "layers.3")
    plan = dict(zip(stages, (hflip(), Views([(0, 0), (1, 1)], scale=5 / 6)), strict=True))
    assert inject_crop_vote(model, after=plan)(torch.zeros(2, 3, 224, 224)).shape == (2, 7)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ({}, {}, "CV850"),
        (TWO, {"views": ten_crop()}, "CV850"),
        ({"layer1": "half"}, {}, "CV806"),
        ({"layer1": None}, {}, "CV850"),
        ({"layer1": hflip(), "layer9": hflip()}, {}, "CV153"),
        (
            {"layer1": hflip(), "layer1.1": five_crop()},
            {},
            "CV110",
        ),
        (
            {"layer1": hflip(), "layer2.0.conv1": five_crop()},
            {},
            "CV101",
        ),
        ({"layer1": hflip(), "avgpool": five_crop()}, {}, "CV206"),
        (TWO, {"layout": {"layer2": "NCHW"}}, "CV807"),
        (TWO, {"layout": {"layer3": "NHWC"}}, "CV113"),
        (TWO, {"eval_views": [10]}, "CV817"),
        (TWO, {"train_views": 11}, "CV815"),
        ({"layer1": 3}, {}, "CV806"),
        (
            {"conv1": five_crop(), "layer4": Views([(0, 0), (1, 1)], scale=0.99)},
            {},
            "CV206",
        ),
    ],
)
def test_invalid_plans_are_refused(plan, options, message):
    model = networks.fer()
    before = model(IMAGES)
    with pytest.raises(CropVoteError, match=message):
        inject_crop_vote(model, after=plan, **{"input_size": 48, **options})
    assert type(model).__name__ == "FerResNet18"
    assert not any(key.startswith("_cropvote") for module in model.modules() for key in vars(module))
    assert torch.equal(model(IMAGES), before)


def test_a_split_that_did_not_run_is_seen():
    model = voting()
    model.layer3[-1].forward = lambda x: x.new_zeros(len(x), 32, 12, 12)
    with pytest.raises(RowsError, match="CV303"):
        model(IMAGES)


def test_injecting_twice_names_the_sites():
    with pytest.raises(SurgeryError, match="CV401"):
        inject_crop_vote(voting(), after="layer2")


def test_the_picture_of_the_views(tmp_path):
    plot_views(voting(), IMAGES[0], tmp_path / "views.png")
    assert (tmp_path / "views.png").stat().st_size > 10_000


def test_views_by_name():
    named = inject_crop_vote(networks.fer(), after={"input": "hflip", "layer2": "five"}, input_size=48)
    made = inject_crop_vote(networks.fer(), after={"input": hflip(), "layer2": five_crop()}, input_size=48)
    assert settings(named).views == settings(made).views
    assert torch.equal(named.eval()(IMAGES), made.eval()(IMAGES))
    one = inject_crop_vote(networks.fer(), after="layer1", views="five", input_size=48)
    assert settings(one).views == five_crop()
