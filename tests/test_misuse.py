"""Misuse of inject_crop_vote, remove_crop_vote and settings raises an error and changes nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import nn

import networks
from cropvote import (
    CropVote,
    CropVoteError,
    hflip,
    inject_crop_vote,
    remove_crop_vote,
    settings,
    vote_until_sure,
)
from cropvote.errors import (
    InputTypeError,
    OptionError,
    RowsError,
    SiteError,
    SurgeryError,
    UnknownSiteError,
    ViewsError,
)
from networks import IMAGES


def test_injecting_twice_is_refused():
    model = inject_crop_vote(networks.fer(), after="layer1")
    with pytest.raises(SurgeryError, match="CV401"):
        inject_crop_vote(model, after="layer2")
    with pytest.raises(SurgeryError, match="CV408"):
        inject_crop_vote(nn.Sequential(model), after="0.layer2")
    assert model(IMAGES).shape == (3, 7)


def test_removing_what_was_never_injected_is_refused():
    with pytest.raises(SurgeryError, match="CV418"):
        remove_crop_vote(networks.fer())
    outer = nn.Sequential(inject_crop_vote(networks.fer(), after="layer1"))
    with pytest.raises(SurgeryError, match="CV418"):
        remove_crop_vote(outer)


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_a_model_in_ddp_is_refused_and_a_voting_model_goes_into_ddp():
    model = networks.fer()
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = networks.snapshot(model)
    with pytest.raises(SurgeryError, match="CV402"):
        inject_crop_vote(wrapped, after="module.layer1")
    assert networks.same(networks.snapshot(model), before)
    voting = nn.parallel.DistributedDataParallel(inject_crop_vote(networks.fer(), after="layer1"))
    assert settings(voting) is settings(voting.module)
    assert voting.eval()(IMAGES).shape == (3, 7)
    with pytest.raises(SurgeryError, match="CV417"):
        remove_crop_vote(voting)


@pytest.mark.slow
def test_a_compiled_model_is_refused_and_a_voting_model_compiles():
    model = networks.fer()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(SurgeryError, match="CV403"):
        inject_crop_vote(compiled, after="_orig_mod.layer1")
    in_place = networks.fer()
    in_place.compile(backend="eager")
    with pytest.raises(SurgeryError, match="CV403"):
        inject_crop_vote(in_place, after="layer1")
    voting = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    whole = torch.compile(voting, backend="eager", fullgraph=True, dynamic=True)
    assert settings(whole) is settings(voting)
    for n in (2, 3, 5):
        images = torch.randn(n, 3, 48, 48)
        assert torch.allclose(whole(images), voting(images), atol=1e-5)
    settings(voting).vote = "hard"  # seen by the compiled model
    assert torch.allclose(whole(IMAGES), voting(IMAGES), atol=1e-5)


def test_injecting_under_an_earlier_compile_is_seen():
    model = networks.fer()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IMAGES)
    inject_crop_vote(model, after="layer2", input_size=48)
    assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-5)
    remove_crop_vote(model)
    assert torch.allclose(compiled(IMAGES), networks.fer()(IMAGES), atol=1e-5)


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in newer versions
        scripted = torch.jit.script(networks.plain())
    with pytest.raises(SurgeryError, match="CV404"):
        inject_crop_vote(scripted, after="2")


def test_a_forward_on_the_instance_is_refused():
    """It hides the class's forward, so a split there would have no effect."""
    model = networks.fer()
    block = model.layer1[-1].forward
    model.layer1[-1].forward = lambda x: block(x)
    with pytest.raises(SurgeryError, match="CV422"):
        inject_crop_vote(model, after="layer1", input_size=48)
    model = networks.fer()
    plain = model.forward
    model.forward = lambda x: plain(x)
    with pytest.raises(SurgeryError, match="CV422"):
        inject_crop_vote(model, after="layer1", input_size=48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": "layer7"}, "CV153.*layer1"),
        ({"after": "layer1.0.con1"}, r"CV153.*layer1\.0\.conv1"),
        ({"after": "@@@"}, "CV153"),
        ({"after": ""}, "CV153"),
        ({"after": 3}, "CV850"),
        ({"after": "layer1", "vote": "softt"}, "CV808"),
        ({"after": "layer1", "views": 10}, "CV806"),
        ({"after": "layer1", "train_output": "rows"}, "CV813"),
        ({"after": "layer1", "vote": "hard", "train_output": "vote"}, "CV816"),
        ({"after": "layer1", "input_size": (48,)}, "CV804"),
        (
            {"after": "layer1", "input_size": (1, 48, 48)},
            "CV414",
        ),
        ({"after": "layer1", "layout": "CHW"}, "CV805"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = networks.fer()
    before, output = networks.snapshot(model), model(IMAGES)
    with pytest.raises(CropVoteError, match=message):
        inject_crop_vote(model, **arguments)
    assert networks.same(networks.snapshot(model), before)
    assert torch.equal(model(IMAGES), output)


def test_an_empty_model_and_no_model():
    with pytest.raises(UnknownSiteError, match="CV153"):
        inject_crop_vote(nn.Sequential(), after="layer1")
    with pytest.raises(InputTypeError, match="CV801"):
        inject_crop_vote(torchvision.models.resnet18, after="layer1")
    with pytest.raises(TypeError):
        settings("layer1")


def test_a_module_named_input_is_ambiguous():
    model = nn.Sequential()
    model.add_module("input", nn.Conv2d(3, 8, 1))
    with pytest.raises(SiteError, match="CV152"):
        inject_crop_vote(model, after="input")


def test_settings_are_checked_on_assignment():
    live = settings(inject_crop_vote(networks.fer(), after="layer1"))
    for name, value, message in [
        ("vote", "sotf", "CV808"),
        ("vote", 3, "CV808"),
        ("train_output", "rows", "CV813"),
        ("enabled", 1, "CV814"),
        ("views", hflip(), "CV811"),
        ("evaloutput", "views", "CV810"),
    ]:
        with pytest.raises(CropVoteError, match=message):
            setattr(live, name, value)
    live.train_output = "vote"
    with pytest.raises(OptionError, match="CV816"):
        live.vote = "hard"
    assert (live.vote, live.train_output, live.enabled) == ("soft", "vote", True)


def test_settings_of_a_plain_model():
    with pytest.raises(SurgeryError, match="CV418"):
        settings(networks.fer())
    net = nn.Sequential(nn.Conv2d(3, 8, 1), CropVote(nn.Flatten()))
    with pytest.raises(SurgeryError, match="CV418"):
        settings(net)


# ---- calls that would give a wrong number ----------------------------------------------------------------------------


def test_a_call_without_a_tensor():
    with pytest.raises(InputTypeError, match="CV803"):
        inject_crop_vote(networks.fer(), after="layer1", input_size=48)([IMAGES])


def test_a_split_that_did_not_run_is_detected_if_v_divides_n():
    """With ten samples and ten views and no check, the vote would mix ten different images."""
    model = inject_crop_vote(networks.Skipping().eval(), after="site", input_size=48)
    images = torch.randn(10, 3, 48, 48)
    assert model(images).shape == (10, 7)
    model.skip = True
    with pytest.raises(RowsError, match="CV303"):
        model(images)


def test_a_replaced_site_is_noticed():
    model = inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    model.layer1 = networks.fer().layer1
    with pytest.raises(RowsError, match="CV303"):
        model(torch.randn(10, 3, 48, 48))
    assert type(remove_crop_vote(model)) is type(networks.fer())


def test_a_shared_module_that_would_split_twice_is_noticed():
    model = inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    model.other = model.site
    model.act = nn.Sequential(model.other)  # now runs twice
    with pytest.raises(RowsError, match="CV303"):
        model(IMAGES)


def test_a_single_image_is_told_to_become_a_batch():
    model = inject_crop_vote(networks.fer(), after={"input": "hflip", "layer2": "five"}, input_size=48)
    for call in (model, lambda image: vote_until_sure(model, image)):
        with pytest.raises(ViewsError, match=r"CV210.*image\[None\]"):
            call(IMAGES[0])
