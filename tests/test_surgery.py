"""inject_crop_vote, remove_crop_vote, settings: the model stays itself, and misuse is refused."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import warnings

import pytest
import timm
import torch
import torchvision
import zoo
from torch import nn

from cropvote import (
    CropVote,
    CropVoteError,
    CropVoteLoss,
    hflip,
    inject_crop_vote,
    remove_crop_vote,
    settings,
    split_views,
    ten_crop,
    vote,
)

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict:
    """All that an injection might have touched."""
    return {
        "types": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "keys": list(model.state_dict()),
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "tensors": [tensor.clone() for tensor in model.state_dict().values()],
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(a: dict, b: dict) -> bool:
    tensors = zip(a.pop("tensors"), b.pop("tensors"), strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and torch.equal(a.pop("random"), b.pop("random")) and a == b


@pytest.mark.parametrize("make", [zoo.resnet, zoo.timm_resnet, zoo.fer])
def test_the_model_stays_itself(make):
    """Contract 6: keys, parameters, class, signature, isinstance."""
    model, original = make(), make()
    kind, keys = type(model), list(model.state_dict())
    parameters = dict(model.named_parameters())
    assert inject_crop_vote(model, after="layer2", input_size=48) is model
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert isinstance(model, kind)
    assert isinstance(model.layer2[-1], type(original.layer2[-1]))
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(kind, name)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    assert str(model) == str(original)
    model.load_state_dict(original.state_dict(), strict=True)


@pytest.mark.parametrize("site", ["input", "layer1", "layer2.0", "relu"])
def test_undo_is_exact(site):
    model = zoo.fer()
    before, expected = snapshot(model), model(IMAGES)
    inject_crop_vote(model, after=site, input_size=48)
    assert not torch.equal(model(IMAGES), expected)
    assert remove_crop_vote(model) is model
    assert same(snapshot(model), before)
    assert torch.equal(model(IMAGES), expected)


def test_train_gives_views_and_eval_the_vote():
    model = inject_crop_vote(zoo.fer(), after="layer1")
    assert model.train()(IMAGES).shape == (30, 7)
    assert model.eval()(IMAGES).shape == (3, 7)
    settings(model).train_output, settings(model).eval_output = "vote", "views"
    assert model.train()(IMAGES).shape == (3, 7)
    assert model.eval()(IMAGES).shape == (30, 7)


def test_only_the_roots_mode_decides():
    """A frozen front in eval mode does not stop the training output."""
    model = inject_crop_vote(zoo.fer(), after="layer1").train()
    model.layer1.eval()
    assert model(IMAGES).shape == (30, 7)


def test_settings_are_live():
    model = inject_crop_vote(zoo.fer(), after="layer1")
    plain = zoo.fer()(IMAGES)
    soft = model(IMAGES)
    settings(model).vote = "hard"
    assert not torch.equal(model(IMAGES), soft)
    settings(model).enabled = False
    assert torch.equal(model(IMAGES), plain)
    settings(model).enabled, settings(model).vote = True, lambda ballots: ballots.amax(1)
    settings(model).eval_output = "views"
    rows = model(IMAGES)
    settings(model).eval_output = "vote"
    assert torch.equal(model(IMAGES), rows.view(3, 10, 7).amax(1))


@pytest.mark.parametrize("how", ["soft", "mean", "median"])
@pytest.mark.parametrize("site", ["input", "layer1", "layer3"])
def test_one_whole_view_is_the_plain_model_bit_for_bit(how, site):
    views = hflip()
    views = type(views)(views[:1], scale=1)
    model = inject_crop_vote(zoo.fer(), after=site, views=views, vote=how, input_size=48)
    assert torch.equal(model(IMAGES), zoo.fer()(IMAGES))


def test_input_site_is_test_time_augmentation():
    """after="input" equals running the model on the crops, also when the images come by name."""
    plain = zoo.fer()
    model = inject_crop_vote(zoo.fer(), after="input", input_size=48)
    expected = vote(plain(split_views(IMAGES, ten_crop())), 10)
    assert torch.equal(model(IMAGES), expected)
    assert torch.equal(model(x=IMAGES), expected)


def test_optimizer_made_before_still_trains():
    model = zoo.fer().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inject_crop_vote(model, after="layer2")
    before = model.conv1.weight.clone()
    CropVoteLoss(nn.CrossEntropyLoss())(model(IMAGES), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert not torch.equal(model.conv1.weight, before)


def test_two_forwards_before_a_backward():
    model = inject_crop_vote(zoo.fer(), after="layer2", input_size=48)
    first, second = model(IMAGES), model(IMAGES.flip(0))
    assert torch.allclose(first.flip(0), second, atol=1e-5)
    (first + second).sum().backward()


@pytest.mark.parametrize("site", ["input", "layer1"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m)],
    ids=["copy", "pickle", "save"],
)
def test_copies_vote_on_their_own(duplicate, site):
    """A deep copy and an unpickled model vote alike, are checked already, and share no settings."""
    model = inject_crop_vote(zoo.fer(), after=site, vote="probs", input_size=48)
    twin = duplicate(model)
    assert {training for training, _ in twin._cropvote.checked} == {True, False}
    assert torch.equal(twin(IMAGES), model(IMAGES))
    settings(twin).enabled = False
    assert settings(model).enabled
    assert torch.equal(twin(IMAGES), zoo.fer()(IMAGES))
    assert type(remove_crop_vote(twin)) is type(zoo.fer())
    assert model(IMAGES).shape == (3, 7)


def saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_threads_do_not_meet():
    """State of a call is per call: eight threads with other batches get what one thread gets."""
    model = inject_crop_vote(zoo.fer(), after="layer2", input_size=48)
    batches = [torch.randn(1 + i, 3, 48, 48) for i in range(8)]
    expected, found = [model(batch) for batch in batches], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model(batches[i])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[i], expected[i], atol=1e-5) for i in range(8))


def test_split_survives_a_checkpoint_that_runs_the_children():
    """timm's gradient checkpointing never calls the Sequential that is the site."""
    model = inject_crop_vote(zoo.timm_resnet(), after="layer2", input_size=64).train()
    images = torch.randn(2, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    plain = model(images)
    model.set_grad_checkpointing(True)
    again = model(images)
    assert torch.allclose(plain, again, atol=1e-5)
    again.sum().backward()


def test_a_timm_models_own_size_is_used():
    """Also where in_chans= makes it another than the one in its configuration."""
    model = inject_crop_vote(timm.create_model("resnet18", in_chans=1, num_classes=7), after="layer1")
    assert {training for training, _ in model._cropvote.checked} == {True, False}


def test_empty_batch():
    model = inject_crop_vote(zoo.fer(), after="layer2", input_size=48)
    assert model(IMAGES[:0]).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = inject_crop_vote(zoo.fer(), after="layer1", input_size=48).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert model(IMAGES.to(dtype)).dtype == expected


def test_votes_are_float32_under_autocast():
    model = inject_crop_vote(zoo.fer(), after="layer1", input_size=48)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IMAGES).dtype == torch.float32
        assert model.train()(IMAGES).dtype == torch.bfloat16


def test_channels_last_stays():
    model = inject_crop_vote(zoo.fer(), after="layer1", input_size=48).to(memory_format=torch.channels_last)
    seen = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output))
    model(IMAGES.to(memory_format=torch.channels_last))
    assert seen[0].shape == (30, 8, 40, 40)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_injecting_twice_is_refused():
    model = inject_crop_vote(zoo.fer(), after="layer1")
    with pytest.raises(CropVoteError, match=r"votes already, after='layer1': remove_crop_vote"):
        inject_crop_vote(model, after="layer2")
    with pytest.raises(CropVoteError, match=r"submodule '0' .* injected model already"):
        inject_crop_vote(nn.Sequential(model), after="0.layer2")
    assert model(IMAGES).shape == (3, 7)


def test_removing_what_was_never_injected_is_refused():
    with pytest.raises(CropVoteError, match=r"FerResNet18 was never injected: there is nothing to remove"):
        remove_crop_vote(zoo.fer())
    outer = nn.Sequential(inject_crop_vote(zoo.fer(), after="layer1"))
    with pytest.raises(CropVoteError, match=r"but its submodule '0' was: pass that"):
        remove_crop_vote(outer)


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_a_model_in_ddp_is_refused_and_a_voting_model_goes_into_ddp():
    model = zoo.fer()
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = snapshot(model)
    with pytest.raises(CropVoteError, match=r"wrapped in DistributedDataParallel: inject into model.module"):
        inject_crop_vote(wrapped, after="module.layer1")
    assert same(snapshot(model), before)
    voting = nn.parallel.DistributedDataParallel(inject_crop_vote(zoo.fer(), after="layer1"))
    assert settings(voting) is settings(voting.module)
    assert voting.eval()(IMAGES).shape == (3, 7)
    with pytest.raises(CropVoteError, match=r"wraps the injected model: pass the model inside"):
        remove_crop_vote(voting)


def test_a_compiled_model_is_refused_and_a_voting_model_compiles():
    model = zoo.fer()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(CropVoteError, match=r"compiled already: inject first, then compile"):
        inject_crop_vote(compiled, after="_orig_mod.layer1")
    in_place = zoo.fer()
    in_place.compile(backend="eager")
    with pytest.raises(CropVoteError, match=r"compiled already: inject first, then compile"):
        inject_crop_vote(in_place, after="layer1")
    voting = inject_crop_vote(zoo.fer(), after="layer2", input_size=48)
    whole = torch.compile(voting, backend="eager", fullgraph=True, dynamic=True)
    assert settings(whole) is settings(voting)
    for n in (2, 3, 5):
        images = torch.randn(n, 3, 48, 48)
        assert torch.allclose(whole(images), voting(images), atol=1e-5)
    settings(voting).vote = "hard"  # seen by the compiled model
    assert torch.allclose(whole(IMAGES), voting(IMAGES), atol=1e-5)


def test_injecting_under_an_earlier_compile_is_seen():
    model = zoo.fer()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IMAGES)
    inject_crop_vote(model, after="layer2", input_size=48)
    assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-5)
    remove_crop_vote(model)
    assert torch.allclose(compiled(IMAGES), zoo.fer()(IMAGES), atol=1e-5)


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, from some version on
        scripted = torch.jit.script(zoo.plain())
    with pytest.raises(CropVoteError, match="TorchScript"):
        inject_crop_vote(scripted, after="2")


def test_a_forward_on_the_instance_is_refused():
    """Such a forward hides the class's, so a split there would have no effect."""
    model = zoo.fer()
    model.layer1[-1].forward = model.layer1[-1].forward
    with pytest.raises(CropVoteError, match=r"forward of 'layer1' was replaced on the instance"):
        inject_crop_vote(model, after="layer1", input_size=48)
    model = zoo.fer()
    model.forward = model.forward
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
    model = zoo.fer()
    before, output = snapshot(model), model(IMAGES)
    with pytest.raises(CropVoteError, match=message):
        inject_crop_vote(model, **arguments)
    assert same(snapshot(model), before)
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
    live = settings(inject_crop_vote(zoo.fer(), after="layer1"))
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
        settings(zoo.fer())
    net = nn.Sequential(nn.Conv2d(3, 8, 1), CropVote(nn.Flatten()))
    with pytest.raises(CropVoteError, match="but its submodule '1' is: pass that"):
        settings(net)


# ---- calls that would give a wrong number ----------------------------------------------------------------------------


def test_a_call_without_a_tensor():
    with pytest.raises(CropVoteError, match="called without a tensor"):
        inject_crop_vote(zoo.fer(), after="layer1", input_size=48)([IMAGES])


def test_a_split_that_did_not_run_is_noticed_where_n_is_divisible_by_v():
    """Ten samples and ten views: without the check, the vote would mix ten different images into one."""
    model = inject_crop_vote(zoo.Skipping().eval(), after="site", input_size=48)
    images = torch.randn(10, 3, 48, 48)
    assert model(images).shape == (10, 7)
    model.skip = True
    with pytest.raises(CropVoteError, match=r"10 rows for 10 samples of 10 views: expected 100"):
        model(images)


def test_a_replaced_site_is_noticed():
    model = inject_crop_vote(zoo.fer(), after="layer1", input_size=48)
    model.layer1 = zoo.fer().layer1
    with pytest.raises(CropVoteError, match=r"split did not run exactly once.*replaced"):
        model(torch.randn(10, 3, 48, 48))
    assert type(remove_crop_vote(model)) is type(zoo.fer())


def test_a_shared_module_that_would_split_twice_is_noticed():
    model = inject_crop_vote(zoo.Net().eval(), after="site", input_size=48)
    model.other = model.site
    model.act = nn.Sequential(model.other)  # now runs twice
    with pytest.raises(CropVoteError, match=r"300 rows for 3 samples of 10 views: expected 30"):
        model(IMAGES)
