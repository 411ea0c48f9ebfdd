"""inject_crop_vote, remove_crop_vote and settings leave the model itself unchanged."""

from __future__ import annotations

import inspect
import threading

import pytest
import timm
import torch

import networks
from cropvote import (
    five_crop,
    hflip,
    inject_crop_vote,
    remove_crop_vote,
    settings,
    split_views,
    ten_crop,
    vote,
)
from networks import IMAGES


@pytest.mark.parametrize("make", [networks.resnet, networks.timm_resnet, networks.fer])
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
    first, votes, rest = str(model).split("\n", 2)
    assert f"{first}\n{rest}" == str(original)
    assert votes.strip() == "cropvote: after={'layer2': ten_crop()}"
    model.load_state_dict(original.state_dict(), strict=True)


@pytest.mark.parametrize("site", ["input", "layer1", "layer2.0", "relu", {"layer1": hflip(), "layer3": five_crop()}])
def test_undo_is_exact(site):
    model = networks.fer()
    before, expected = networks.snapshot(model), model(IMAGES)
    inject_crop_vote(model, after=site, input_size=48)
    assert not torch.equal(model(IMAGES), expected)
    assert remove_crop_vote(model) is model
    assert networks.same(networks.snapshot(model), before)
    assert torch.equal(model(IMAGES), expected)


def test_train_gives_views_and_eval_the_vote():
    model = inject_crop_vote(networks.fer(), after="layer1")
    assert model.train()(IMAGES).shape == (30, 7)
    assert model.eval()(IMAGES).shape == (3, 7)
    settings(model).train_output, settings(model).eval_output = "vote", "views"
    assert model.train()(IMAGES).shape == (3, 7)
    assert model.eval()(IMAGES).shape == (30, 7)


def test_only_the_roots_mode_decides():
    """A frozen front in eval mode does not stop the training output."""
    model = inject_crop_vote(networks.fer(), after="layer1").train()
    model.layer1.eval()
    assert model(IMAGES).shape == (30, 7)


def test_settings_are_live():
    model = inject_crop_vote(networks.fer(), after="layer1")
    plain = networks.fer()(IMAGES)
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


def test_input_site_is_test_time_augmentation():
    """after="input" equals running the model on the crops, also if the images are a keyword argument."""
    plain = networks.fer()
    model = inject_crop_vote(networks.fer(), after="input", input_size=48)
    expected = vote(plain(split_views(IMAGES, ten_crop())), 10)
    assert torch.equal(model(IMAGES), expected)
    assert torch.equal(model(x=IMAGES), expected)


def test_two_forwards_before_a_backward():
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    first, second = model(IMAGES), model(IMAGES.flip(0))
    assert torch.allclose(first.flip(0), second, atol=1e-5)
    (first + second).sum().backward()


def test_threads_do_not_interfere():
    """Each call has its own state: eight threads with different batches get the same results as one."""
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    batches = [torch.randn(1 + i, 3, 48, 48) for i in range(8)]
    expected, found = [model(batch) for batch in batches], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model(batches[i])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[i], expected[i], atol=1e-5) for i in range(8))


def test_a_timm_models_own_input_size_is_used():
    """This also holds if in_chans= changes it from the size in the configuration."""
    model = inject_crop_vote(timm.create_model("resnet18", in_chans=1, num_classes=7), after="layer1")
    assert {training for training, _ in model._cropvote.checked} == {True, False}


def test_empty_batch():
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    assert model(IMAGES[:0]).shape == (0, 7)
