"""Injected models, the layer and one training step against the oracle's hooks and slices."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from fractions import Fraction

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import oracle
from cropvote import (
    CropVote,
    CropVoteError,
    CropVoteLoss,
    Views,
    five_crop,
    hflip,
    inject_crop_vote,
    remove_crop_vote,
    settings,
)
from cropvote.views import grid
from model import FerResNet18

SIDES = {"torchvision": 64, "timm": 64, "fer": 48}
SITES = ["layer1", "layer2", "layer3"]
RULES = ["soft", "probs", "hard"]
nets = pytest.mark.parametrize("net", SIDES)
sites = pytest.mark.parametrize("site", SITES)
BatchNorm = nn.modules.batchnorm._BatchNorm

ODD = [(Fraction(1, 3), Fraction(1)), (Fraction(0), Fraction(2, 5)), (Fraction(1), Fraction(1, 2))]
OTHER_VIEWS = {
    "five_crop": (five_crop(), oracle.five_views),
    "hflip": (hflip(), oracle.flip_views),
    "grid": (
        grid(2, 3, scale=0.7),
        lambda x: oracle.free_views(x, oracle.grid_positions(2, 3), Fraction(7, 10), False),
    ),
    "mirrored grid": (
        grid(3, 2, mirror=True),
        lambda x: oracle.free_views(x, oracle.grid_positions(3, 2), Fraction(5, 6), True),
    ),
    "odd": (
        Views(ODD, scale=(Fraction(3, 5), Fraction(7, 9)), mirror=True),
        lambda x: oracle.free_views(x, ODD, (Fraction(3, 5), Fraction(7, 9)), True),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on two busy cores, two threads wait 8 ms for each other in every layer, 60 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- models


def fer_resnet18() -> nn.Module:
    """Return the example's network from its class, because timm's function would add the image size."""
    return FerResNet18(num_classes=7, width=16)


def lively(model: nn.Module) -> nn.Module:
    """Return the model in eval mode with random BatchNorm statistics and affine weights."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def undecided(model: nn.Module, x: Tensor) -> nn.Module:
    """Scale and centre the model's logits over x, so a sample's views do not all agree."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 10
        last.bias -= model(x).mean(dim=0)
    return model


@functools.cache
def network(net: str) -> nn.Module:
    """Return the plain network, which is only copied, never changed."""
    build = {
        "torchvision": lambda: torchvision.models.resnet18(num_classes=7),
        "timm": lambda: timm.create_model("resnet18", num_classes=7),
        "fer": fer_resnet18,
    }[net]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return undecided(lively(build()), images(SIDES[net], SIDES[net]))


def images(*size: int, count: int = 2) -> Tensor:
    """Return noise with a gradient, so no two views look alike."""
    x = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))
    return x + torch.linspace(-2, 2, size[0])[:, None] + torch.linspace(-1, 3, size[1])


@functools.cache
def expected_rows(net: str, site: str, *size: int) -> Tensor:
    """Return the oracle's (N, V, K) for the plain network."""
    with torch.no_grad():
        return oracle.tail_rows(network(net), site, images(*size))


def injected(net: str, site: str, **options) -> nn.Module:
    """Return a copy of the network, injected at the site."""
    options.setdefault("input_size", SIDES[net])
    return inject_crop_vote(copy.deepcopy(network(net)), after=site, **options)


def train_with_frozen_norm(model: nn.Module) -> nn.Module:
    """Set training mode, but let every BatchNorm use its running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return model


def assert_near(found: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Check that the absolute difference is within the tolerance, for any dtype."""
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=tolerance)


# ---------------------------------------------------------------- eval and training output


@nets
@sites
def test_the_oracles_views_differ(net: str, site: str) -> None:
    """Otherwise agreement would say nothing about the order of the views."""
    rows = expected_rows(net, site, SIDES[net], SIDES[net])
    tiny = net != "fer" and site != "layer1"  # maps of 8x8 and 4x4, where the centre crop equals the top-left one
    same = {(4, 0), (9, 5)} if tiny else set()
    for v in range(1, 10):
        for other in range(v):
            if (v, other) not in same:
                assert (rows[:, v] - rows[:, other]).abs().max() > 1e-3
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    assert any(len(set(sample.argmax(dim=1).tolist())) > 1 for sample in rows), "hard and soft would be too alike"


@nets
@sites
@pytest.mark.parametrize("how", RULES)
def test_eval_output_is_the_vote(net: str, site: str, how: str) -> None:
    side = SIDES[net]
    model = injected(net, site, vote=how).eval()
    with torch.no_grad():
        found = model(images(side, side))
    assert_near(found, oracle.vote(expected_rows(net, site, side, side), how))


@nets
@sites
def test_training_output_is_every_view_in_order(net: str, site: str) -> None:
    """(N*V, K), row n*V + v; switching modes back and forth, or the vote off and on, changes nothing else."""
    side = SIDES[net]
    x, want = images(side, side), expected_rows(net, site, side, side)
    model = train_with_frozen_norm(injected(net, site))
    with torch.no_grad():
        assert_near(model(x), want.flatten(0, 1))
        settings(model).train_output = "vote"
        assert_near(model(x), oracle.vote(want, "soft"))
        model.eval()
        settings(model).vote = "probs"
        assert_near(model(x), oracle.vote(want, "probs"))
        settings(model).eval_output = "views"
        assert_near(model(x), want.flatten(0, 1))
        settings(model).enabled = False
        assert torch.equal(model(x), network(net)(x))


@pytest.mark.parametrize(
    ("net", "site", "size"),
    [
        ("torchvision", "layer1", (64, 48)),
        ("torchvision", "layer2", (48, 64)),
        ("timm", "layer1", (48, 64)),
        ("timm", "layer2", (64, 48)),
        ("fer", "layer1", (48, 36)),
        ("fer", "layer2", (36, 48)),
        ("fer", "layer3", (48, 36)),
    ],
)
def test_images_that_are_not_square(net: str, site: str, size: tuple[int, int]) -> None:
    want = expected_rows(net, site, *size)
    model = injected(net, site, input_size=size)
    with torch.no_grad():
        assert_near(model(images(*size)), oracle.vote(want, "soft"))
        assert_near(train_with_frozen_norm(model)(images(*size)), want.flatten(0, 1))


@pytest.mark.parametrize("net", ["torchvision", "timm"])
def test_a_map_too_small_for_ten_crops_is_refused(net: str) -> None:
    """At layer3, 64x48 images give a 4x3 map, and 5/6 of 3 rounds to 3."""
    model = copy.deepcopy(network(net))
    with pytest.raises(CropVoteError), torch.no_grad():
        inject_crop_vote(model, after="layer3", input_size=(64, 48))(images(64, 48))


@nets
def test_without_an_input_size_and_with_a_single_image(net: str) -> None:
    """The first call has a batch of one, the second a batch of two."""
    side = SIDES[net]
    want = oracle.vote(expected_rows(net, "layer2", side, side), "soft")
    model = inject_crop_vote(copy.deepcopy(network(net)), after="layer2")
    with torch.no_grad():
        assert_near(model(images(side, side)[:1]), want[:1])
        assert_near(model(images(side, side)), want)


@nets
@pytest.mark.parametrize("kind", OTHER_VIEWS)
def test_other_views(net: str, kind: str) -> None:
    """five_crop, hflip, grids, and unusual positions with a scale per axis, at layer2."""
    side, (views, cut) = SIDES[net], OTHER_VIEWS[kind]
    x = images(side, side)
    with torch.no_grad():
        want = oracle.tail_rows(network(net), "layer2", x, cut)
        model = injected(net, "layer2", views=views)
        assert_near(model(x), oracle.vote(want, "soft"))
        assert_near(train_with_frozen_norm(model)(x), want.flatten(0, 1))


@nets
def test_the_input_as_site_is_test_time_augmentation(net: str) -> None:
    """after="input" runs the plain model on each crop of the image."""
    side = SIDES[net]
    x = images(side, side)
    with torch.no_grad():
        want = torch.stack([network(net)(view) for view in oracle.ten_views(x)], dim=1)
        model = injected(net, "input")
        assert_near(model(x), oracle.vote(want, "soft"))
        assert_near(train_with_frozen_norm(model)(x), want.flatten(0, 1))


@nets
@pytest.mark.parametrize("how", ["soft", "mean", "median"])
def test_one_view_of_the_whole_map_is_the_plain_model_bit_for_bit(net: str, how: str) -> None:
    side = SIDES[net]
    model = injected(net, "layer2", views=Views([(0, 0)], scale=1), vote=how)
    with torch.no_grad():
        assert torch.equal(model(images(side, side)), network(net)(images(side, side)))


@nets
def test_a_removed_model_is_the_plain_model(net: str) -> None:
    side = SIDES[net]
    model = injected(net, "layer1")
    with torch.no_grad():
        assert torch.equal(remove_crop_vote(model)(images(side, side)), network(net)(images(side, side)))


# ---------------------------------------------------------------- one training step


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's gradient by name; none may be missing."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found


# bn1 is followed by an in-place ReLU, which must neither fail nor change another view
@pytest.mark.parametrize(
    ("net", "site"), [*itertools.product(SIDES, SITES), ("torchvision", "bn1"), ("timm", "bn1"), ("fer", "bn1")]
)
def test_one_training_step_equals_the_oracles(net: str, site: str) -> None:
    """Loss and all gradients, BatchNorm in eval, to 1e-4 in float32, or 1e-8 in float64 for the smallest network."""
    dtype, tolerance = (torch.float64, 1e-8) if net == "fer" else (torch.float32, 1e-4)
    x, targets = images(SIDES[net], SIDES[net]).to(dtype), torch.tensor([5, 2])
    plain = train_with_frozen_norm(copy.deepcopy(network(net)).to(dtype))
    model = train_with_frozen_norm(injected(net, site).to(dtype))

    want = oracle.loss_on_views(oracle.tail_rows(plain, site, x), targets, smoothing=0.1)
    want.backward()
    loss = CropVoteLoss(nn.CrossEntropyLoss(label_smoothing=0.1))(model(x), targets)
    loss.backward()

    assert_near(loss, want, tolerance)
    expected, found = gradients(plain), gradients(model)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert_near(found[name], gradient, tolerance)
    assert expected["conv1.weight"].abs().max() > 1e-3


def test_one_float32_step_on_the_vote_equals_autograd_through_the_mean() -> None:
    """train_output="vote" gives the loss of the views' average, within 1e-4."""
    x, targets = images(48, 48), torch.tensor([5, 2])
    plain = train_with_frozen_norm(copy.deepcopy(network("fer")))
    model = train_with_frozen_norm(injected("fer", "layer2", train_output="vote"))
    rows = oracle.tail_rows(plain, "layer2", x)
    want = oracle.loss_on_views((sum(rows[:, v] for v in range(10)) / 10)[:, None], targets)
    want.backward()
    loss = CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(x), targets)
    loss.backward()
    assert_near(loss, want, 1e-4)
    for name, gradient in gradients(plain).items():
        assert_near(gradients(model)[name], gradient, 1e-4)


# ---------------------------------------------------------------- the layer


def halves() -> tuple[nn.Module, nn.Module]:
    """Return the front and tail of a custom network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        front = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        pool = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        tail = nn.Sequential(pool, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5))
        return lively(front), lively(tail)


@pytest.mark.parametrize("how", [*RULES, "mean", "median"])
@pytest.mark.parametrize("size", [(24, 24), (24, 17)])
def test_the_layer_equals_the_oracle(how: str, size: tuple[int, int]) -> None:
    """nn.Sequential(front, CropVote(tail)) votes in eval and gives every view in training."""
    front, tail = halves()
    x = images(*size, count=3)
    with torch.no_grad():
        want = torch.stack([tail(view) for view in oracle.ten_views(front(x))], dim=1)
        model = nn.Sequential(front, CropVote(tail, vote=how)).eval()
        assert_near(model(x), oracle.vote(want, how))
        assert_near(train_with_frozen_norm(model)(x), want.flatten(0, 1))


@pytest.mark.parametrize("kind", OTHER_VIEWS)
def test_the_layer_with_other_views(kind: str) -> None:
    front, tail = halves()
    views, cut = OTHER_VIEWS[kind]
    x = images(24, 18, count=3)
    with torch.no_grad():
        want = torch.stack([tail(view) for view in cut(front(x))], dim=1)
        model = nn.Sequential(front, CropVote(tail, views=views)).eval()
        assert_near(model(x), oracle.vote(want, "soft"))
        assert_near(train_with_frozen_norm(model)(x), want.flatten(0, 1))


def test_one_training_step_of_the_layer_equals_the_oracles() -> None:
    front, tail = halves()
    x, targets = images(24, 18, count=3).double(), torch.tensor([4, 0, 3])
    plain = nn.Sequential(front, tail).double()
    model = nn.Sequential(*copy.deepcopy([front, CropVote(tail)]))
    train_with_frozen_norm(plain), train_with_frozen_norm(model)
    want = oracle.loss_on_views(oracle.tail_rows(plain, "0", x), targets, smoothing=0.1)
    want.backward()
    loss = CropVoteLoss(nn.CrossEntropyLoss(label_smoothing=0.1), views=10)(model(x), targets)
    loss.backward()
    assert_near(loss, want, 1e-8)
    for expected, found in zip(gradients(plain).values(), gradients(model).values(), strict=True):
        assert_near(found, expected, 1e-8)
