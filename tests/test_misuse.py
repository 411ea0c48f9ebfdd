"""Misuse of inject_crop_vote, remove_crop_vote and settings is refused, and changes nothing."""

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
)

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_injecting_twice_is_refused():
    model = inject_crop_vote(networks.fer(), after="layer1")
    with pytest.raises(CropVoteError, match=r"votes already, after='layer1': remove_crop_vote"):
        inject_crop_vote(model, after="layer2")
    with pytest.raises(CropVoteError, match=r"submodule '0' .* injected model already"):
        inject_crop_vote(nn.Sequential(model), after="0.layer2")
    assert model(IMAGES).shape == (3, 7)


def test_removing_what_was_never_injected_is_refused():
    with pytest.raises(CropVoteError, match=r"FerResNet18 was never injected: there is nothing to remove"):
        remove_crop_vote(networks.fer())
    outer = nn.Sequential(inject_crop_vote(networks.fer(), after="layer1"))
    with pytest.raises(CropVoteError, match=r"but its submodule '0' was: pass that"):
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
    with pytest.raises(CropVoteError, match=r"wrapped in DistributedDataParallel: inject into model.module"):
        inject_crop_vote(wrapped, after="module.layer1")
    assert networks.same(networks.snapshot(model), before)
    voting = nn.parallel.DistributedDataParallel(inject_crop_vote(networks.fer(), after="layer1"))
    assert settings(voting) is settings(voting.module)
    assert voting.eval()(IMAGES).shape == (3, 7)
    with pytest.raises(CropVoteError, match=r"wraps the injected model: pass the model inside"):
        remove_crop_vote(voting)


def test_a_compiled_model_is_refused_and_a_voting_model_compiles():
    model = networks.fer()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(CropVoteError, match=r"compiled already: inject first, then compile"):
        inject_crop_vote(compiled, after="_orig_mod.layer1")
    in_place = networks.fer()
    in_place.compile(backend="eager")
    with pytest.raises(CropVoteError, match=r"compiled already: inject first, then compile"):
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
        warnings.simplefilter("ignore")  # torch.jit is deprecated, from some version on
        scripted = torch.jit.script(networks.plain())
    with pytest.raises(CropVoteError, match="TorchScript"):
        inject_crop_vote(scripted, after="2")


def test_a_forward_on_the_instance_is_refused():
    """Such a forward hides the class's, so a split there would have no effect."""
    model = networks.fer()
    block = model.layer1[-1].forward
    model.layer1[-1].forward = lambda x: block(x)
    with pytest.raises(CropVoteError, match=r"forward of 'layer1' was replaced on the instance"):
        inject_crop_vote(model, after="layer1", input_size=48)
    model = networks.fer()
    plain = model.forward
    model.forward = lambda x: plain(x)
    with pytest.raises(CropVoteError, match=r"forward of FerResNet18 was replaced on the instance"):
        inject_crop_vote(model, after="layer1", input_size=48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": "layer7"}, r"no module named 'layer7'; nearest: layer"),
        ({"after": "layer1.0.con1"}, r"nearest: layer1\.0\.conv1"),
        ({"after": "@@@"}, r"its children: conv1, bn1, relu, layer1"),
        ({"after": ""}, r"no module named ''"),
        ({"after": 3}, r"after must be a module's name.*got 3"),
        ({"after": "layer1", "vote": "softt"}, r"vote must be one of .*'soft'.*got 'softt'"),
        ({"after": "layer1", "views": 10}, r"views must be a Views, such as ten_crop\(\), got 10"),
        ({"after": "layer1", "train_output": "rows"}, r"train_output must be one of \('views', 'vote'\), got 'rows'"),
        ({"after": "layer1", "vote": "hard", "train_output": "vote"}, r"no useful gradient"),
        ({"after": "layer1", "input_size": (48,)}, r"input_size must be a side, \(H, W\), or \(C, H, W\).*got \(48,\)"),
        (
            {"after": "layer1", "input_size": (1, 48, 48)},
            r"without any split, failed on an input of shape \(31, 1, 48, 48\)",
        ),
        ({"after": "layer1", "layout": "CHW"}, r"layout must be one of .*, got 'CHW'"),
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
    with pytest.raises(CropVoteError, match="Sequential has no module named 'layer1'; it has no modules"):
        inject_crop_vote(nn.Sequential(), after="layer1")
    with pytest.raises(CropVoteError, match=r"model must be an nn.Module, got function"):
        inject_crop_vote(torchvision.models.resnet18, after="layer1")
    with pytest.raises(TypeError):
        settings("layer1")


def test_a_module_named_input_is_ambiguous():
    model = nn.Sequential()
    model.add_module("input", nn.Conv2d(3, 8, 1))
    with pytest.raises(CropVoteError, match=r"means the images, but this model has a module of that name"):
        inject_crop_vote(model, after="input")


def test_settings_are_checked_on_assignment():
    live = settings(inject_crop_vote(networks.fer(), after="layer1"))
    for name, value, message in [
        ("vote", "sotf", r"vote must be one of"),
        ("vote", 3, r"vote must be one of"),
        ("train_output", "rows", r"train_output must be one of"),
        ("enabled", 1, r"enabled must be True or False"),
        ("views", hflip(), r"views are fixed: remove_crop_vote"),
        ("evaloutput", "views", r"no setting 'evaloutput'.*Did you mean 'eval_output'"),
    ]:
        with pytest.raises(CropVoteError, match=message):
            setattr(live, name, value)
    live.train_output = "vote"
    with pytest.raises(CropVoteError, match="no useful gradient"):
        live.vote = "hard"
    assert (live.vote, live.train_output, live.enabled) == ("soft", "vote", True)


def test_settings_of_what_has_none():
    with pytest.raises(CropVoteError, match="neither injected nor a CropVote layer"):
        settings(networks.fer())
    net = nn.Sequential(nn.Conv2d(3, 8, 1), CropVote(nn.Flatten()))
    with pytest.raises(CropVoteError, match="but its submodule '1' is: pass that"):
        settings(net)


# ---- calls that would give a wrong number ----------------------------------------------------------------------------


def test_a_call_without_a_tensor():
    with pytest.raises(CropVoteError, match="called without a tensor"):
        inject_crop_vote(networks.fer(), after="layer1", input_size=48)([IMAGES])


def test_a_split_that_did_not_run_is_noticed_where_n_is_divisible_by_v():
    """Ten samples and ten views: without the check, the vote would mix ten different images into one."""
    model = inject_crop_vote(networks.Skipping().eval(), after="site", input_size=48)
    images = torch.randn(10, 3, 48, 48)
    assert model(images).shape == (10, 7)
    model.skip = True
    with pytest.raises(CropVoteError, match="the split did not run exactly once in this call, but 0 times"):
        model(images)


def test_a_replaced_site_is_noticed():
    model = inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    model.layer1 = networks.fer().layer1
    with pytest.raises(CropVoteError, match=r"split did not run exactly once.*replaced"):
        model(torch.randn(10, 3, 48, 48))
    assert type(remove_crop_vote(model)) is type(networks.fer())


def test_a_shared_module_that_would_split_twice_is_noticed():
    model = inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    model.other = model.site
    model.act = nn.Sequential(model.other)  # now runs twice
    with pytest.raises(CropVoteError, match="did not run exactly once in this call, but 2 times"):
        model(IMAGES)
