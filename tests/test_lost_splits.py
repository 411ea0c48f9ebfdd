"""Splits that are lost, copied or left behind after the check, without a change in the number of rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import networks
import oracle
from cropvote import (
    CropVote,
    Views,
    five_crop,
    hflip,
    inject_crop_vote,
    per_view,
    profile,
    remove_crop_vote,
    settings,
    ten_crop,
    vote_until_sure,
)
from cropvote.cuts import ViewProduct
from cropvote.errors import InputTypeError, OptionError, RowsError, SurgeryError
from cropvote.options import eval_indices
from cropvote.stopping import choose_confidence
from cropvote.views import d4
from networks import IMAGES

TWO = {"layer1": hflip(), "layer3": five_crop()}
LOST = "CV303"


def voting(after=TWO, **options: object) -> nn.Module:
    return inject_crop_vote(networks.fer(), after=after, input_size=48, **options)


@pytest.mark.parametrize(
    ("after", "options", "lost"),
    [
        (TWO, {"eval_views": "centre+mirror"}, "layer3"),  # two maps in, two maps out
        (TWO, {"eval_views": [5, 6, 7, 8, 9]}, "layer1"),  # one map in, one map out
        ({"layer1": hflip(), "layer3": five_crop()}, {}, "layer3"),
        ({"layer1": hflip(), "layer3": Views([(0.5, 0.5)])}, {}, "layer3"),
        ("layer1", {"eval_views": "centre"}, "layer1"),
        (TWO, {"train_views": 2}, "layer3"),
    ],
)
def test_a_replaced_stage_takes_its_split_along(after, options, lost):
    model = voting(after, **options).train("train_views" in options)
    model(IMAGES)
    setattr(model, lost, getattr(networks.fer(), lost))
    with pytest.raises(RowsError, match=LOST):
        model(IMAGES)


def test_a_first_vote_of_few_views_also_detects_a_lost_split():
    model = voting("layer1")
    model.layer1 = networks.fer().layer1
    with pytest.raises(RowsError, match=LOST):
        vote_until_sure(model, IMAGES, first="centre", confidence=0)
    model = voting()
    model.layer3 = networks.fer().layer3
    for confidence in (0, 1):
        with pytest.raises(RowsError, match=LOST):
            vote_until_sure(model, IMAGES, confidence=confidence)


class Dropping(nn.Module):
    """Skips a stage if a flag is set after the check."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.stage = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
        self.drop = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        return self.tail(x if self.drop else self.stage(x))


@pytest.mark.parametrize("training", [False, True])
def test_a_skipped_stage_is_detected(training):
    model = Dropping().train(training)
    inject_crop_vote(model, {"front": hflip(), "stage": five_crop()}, input_size=48, train_views=2, eval_views=[0, 5])
    model(IMAGES)
    model.drop = True
    with pytest.raises(RowsError, match="CV303"):
        model(IMAGES)


def test_a_separately_compiled_stage_is_not_reported():
    model, wanted = voting(), voting()(IMAGES)
    model.layer3.compile(backend="eager")
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), wanted, atol=1e-5)


@pytest.mark.slow
def test_a_replaced_stage_is_detected_in_a_compiled_model():
    """The splits that ran cannot be counted there, but the remaining ones can."""
    model = voting(eval_views="centre+mirror")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)
        model.layer3 = networks.fer().layer3
        with pytest.raises(Exception, match="CV305"):
            compiled(IMAGES)


def test_a_copy_of_a_stage_is_a_plain_stage():
    """Its split belongs to no model: a vote is an error, the disabled model is plain, and the undo is exact."""
    plain = networks.fer()(IMAGES)
    for after in (TWO, "layer3"):
        model = voting(after)
        model.layer3 = copy.deepcopy(model.layer3)
        with pytest.raises(RowsError, match=LOST):
            model(IMAGES)
        settings(model).enabled = False
        assert torch.equal(model(IMAGES), plain)
        assert torch.equal(remove_crop_vote(model)(IMAGES), plain)
        assert not any("_cropvote" in name for module in model.modules() for name in vars(module))
        inject_crop_vote(model, after, input_size=48)


def test_copies_of_the_model_have_their_own_splits():
    model, wanted = voting(), voting()(IMAGES)
    twin = copy.deepcopy(model)
    del model
    assert torch.allclose(twin(IMAGES), wanted, atol=1e-5)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_do_not_nest():
    inner = CropVote(nn.Flatten())
    for tail in (inner, nn.Sequential(nn.Conv2d(3, 8, 3), inner)):
        with pytest.raises(SurgeryError, match="CV430"):
            CropVote(tail)


def test_a_site_inside_a_layer_is_not_reported():
    """With one vote inside another, each call counts its own splits."""
    torch.manual_seed(0)
    site = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    tail = nn.Sequential(site, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    inner = inject_crop_vote(tail, after="0", input_size=(8, 40, 40)).eval()
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CropVote(inner)).eval()
    with torch.no_grad():
        wanted = torch.stack([inner(view) for view in oracle.ten_views(net[0](IMAGES))]).mean(0)
        assert torch.allclose(net(IMAGES), wanted, atol=1e-6)


def test_reading_views_needs_the_layers_vote_as_output():
    """A head after the vote would give other results if run on each view."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CropVote(tail))
    model = nn.Sequential(nn.Identity(), net, nn.Softmax(1)).eval()
    for read in (per_view, vote_until_sure):
        with pytest.raises(SurgeryError, match="CV431"):
            read(model, IMAGES)
        assert len(read(nn.Sequential(nn.Identity(), net).eval(), IMAGES)[0])


# --- names and numbers -----------------------------------------------------------------------------------------------


def test_the_centre_is_not_mirrored_twice():
    assert eval_indices(ViewProduct([hflip(), ten_crop()]), "centre") == (4,)
    assert eval_indices(ViewProduct([d4(), d4()]), "centre") == (0,)


def test_a_confidence_is_chosen_for_views_that_are_named():
    logits, targets = torch.randn(20, 5, 3), torch.randint(3, (20,))
    assert 0 <= choose_confidence(logits, targets, first=[4]) <= 1
    for first in ([0, 0], [5], []):
        with pytest.raises(OptionError, match="CV817"):
            choose_confidence(logits, targets, first=first)
    for first in (4, "centre", [True]):
        with pytest.raises(InputTypeError, match="CV817"):
            choose_confidence(logits, targets, first=first)
    with pytest.raises(OptionError, match="CV845"):
        choose_confidence(logits, targets)
    with pytest.raises(InputTypeError, match="CV844"):
        choose_confidence([[1.0]], targets)
    with pytest.raises(OptionError, match="CV845"):
        choose_confidence(logits, targets, first=[4], max_loss="x")
    with pytest.raises(OptionError, match="CV845"):
        vote_until_sure(voting(), IMAGES, confidence="x")


class Pooling(nn.Module):
    """A learned query, expanded to the batch, that attends to the map, as in ViTs with attention pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.query = nn.Conv2d(3, 8, 3, 2, 1), nn.Parameter(torch.zeros(1, 1, 8))
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.front(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens)[0][:, 0])


def test_a_model_that_passes_a_parameter_on_is_profiled():
    model = Pooling()
    row = profile(model, 48, sites=["front"])["front"]
    front, tail = 24 * 24 * 27 * 8, 20 * 20 * 8 * 8 * 2 + 2 * 8 * 8 + 2 * 400 * 8 + 8 * 7
    assert row.gmacs == pytest.approx((front + 10 * tail) / 1e9, rel=1e-6)
    assert row.train_memory_mib > 0
    assert all(p.requires_grad for p in model.parameters())


def test_plans_with_the_same_name_are_timed_separately():
    small, large = ({"layer1": hflip(), "layer3": five_crop(scale)} for scale in (0.3, 0.9))
    _, _, one, other = profile(networks.fer(), 48, sites=[small, large], measure=True, batch=2, rounds=3)
    assert (one.site, other.site) == ("layer1=hflip,layer3=5 views of 3/10", "layer1=hflip,layer3=5 views of 9/10")
    assert one.milliseconds
    assert other.milliseconds


def test_a_missing_device_is_an_error():
    with pytest.raises(OptionError, match="CV825"):
        profile(
            networks.fer(), 48, sites=["layer1"], measure=True, device="mps" if torch.cuda.is_available() else "cuda"
        )
    with pytest.raises(InputTypeError, match="CV823"):
        profile(networks.fer(), 48, sites=5)
