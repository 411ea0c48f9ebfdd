"""Other code on an injected model: scripting, custom copies, classes that restrict subclassing or attributes."""

from __future__ import annotations

import copy
import pickle
import typing
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import networks
import oracle
from cropvote import inject_crop_vote, remove_crop_vote, settings, sites
from cropvote.errors import OptionError, PlainModelError, SiteError, SurgeryError
from networks import IMAGES


def test_scripting_a_voting_model_raises():
    """Scripting would compile the plain forward, without the vote."""
    model = inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (model, model.layer1[-1], nn.Sequential(model)):
            with pytest.raises(SurgeryError, match="CV507"):
                torch.jit.script(module)
        remove_crop_vote(model)
        assert torch.allclose(torch.jit.script(model.eval())(IMAGES), model(IMAGES), atol=1e-6)


def test_a_failed_removal_removes_nothing():
    model = inject_crop_vote(networks.Net().eval(), after="front", input_size=48)
    expected = model(IMAGES)
    nn.utils.parametrizations.weight_norm(model.front)
    with pytest.raises(SurgeryError, match="CV424"):
        remove_crop_vote(model)
    assert torch.allclose(model(IMAGES), expected, atol=1e-6)
    nn.utils.parametrize.remove_parametrizations(model.front, "weight")
    assert type(remove_crop_vote(model)) is networks.Net
    assert type(model.front) is nn.Conv2d


def test_a_forward_wrapped_later_stops_the_removal():
    model = inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    plain = model.forward
    model.forward = lambda x: plain(x)
    with pytest.raises(SurgeryError, match="CV424"):
        remove_crop_vote(model)
    del model.forward
    remove_crop_vote(model)


class OwnCopy(networks.Net):
    def __deepcopy__(self, memo):
        twin = networks.Net.__new__(OwnCopy)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


class OwnReduce(networks.Net):
    def __reduce__(self):
        return (OwnReduce, ())


def test_copies_made_by_the_models_own_code_vote():
    model = inject_crop_vote(OwnCopy().eval(), after="front", input_size=48)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IMAGES), model(IMAGES))
    settings(twin).vote = "hard"
    assert settings(model).vote == "soft"
    model = inject_crop_vote(OwnReduce().eval(), after="input", input_size=48)
    twin = pickle.loads(pickle.dumps(model)).eval()
    assert twin(IMAGES).shape == (3, 7)
    assert settings(twin).views == settings(model).views


def test_new_instances_of_the_swapped_class_are_plain():
    model = inject_crop_vote(networks.plain(), after="0", input_size=48)
    assert type(model)(nn.Flatten())(IMAGES).shape == (3, 3 * 48 * 48)
    assert model[:2](IMAGES).shape == (30, 8, 40, 40)  # the views made by the split


def test_a_graph_module_is_refused():
    with pytest.raises(SurgeryError, match="CV405"):
        inject_crop_vote(torch.fx.symbolic_trace(networks.plain()), after="0")


def test_a_module_that_carries_a_split_is_not_a_root():
    outer = networks.fer()
    inject_crop_vote(outer, after="layer1.0", input_size=48)
    with pytest.raises(SurgeryError, match="CV407"):
        inject_crop_vote(outer.layer1[0], after="conv1")


def test_many_classes_do_not_share_a_recompile_limit():
    known = hasattr(torch._dynamo.config, "recompile_limit")
    name = "recompile_limit" if known else "cache_size_limit"  # PyTorch 2.6
    with torch._dynamo.config.patch(**{name: 2}):
        for i in range(4):
            kind = type(f"Net{i}", (networks.Net,), {})
            model = inject_crop_vote(kind().eval(), after="site", input_size=48)
            assert torch.compile(model, fullgraph=True, backend="eager")(IMAGES).shape == (3, 7)


class Registered(nn.Module):
    """A class that keeps its subclasses by name, and asks them for a key."""

    known: typing.ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.known[cls.__name__] = cls


class RegisteredSite(Registered, key=1):
    def forward(self, x):
        return 2 * x


def test_a_registry_of_subclasses_is_left_alone():
    model = networks.Net().eval()
    model.site = RegisteredSite()
    sites(model, 48)
    inject_crop_vote(model, after="site", input_size=48)
    assert Registered.known == {"RegisteredSite": RegisteredSite}
    votes = model(IMAGES)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), votes)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(IMAGES), votes, atol=1e-6)
    remove_crop_vote(model)
    assert type(model.site) is RegisteredSite


class Final(type):
    def __new__(cls, name, bases, namespace):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(cls, name, bases, namespace)


class FinalSite(nn.Module, metaclass=Final):
    def forward(self, x):
        return 2 * x


def test_a_class_that_cannot_be_subclassed_leaves_the_model_unchanged():
    model = networks.Net().eval()
    model.site = FinalSite()
    before = networks.snapshot(model)
    with pytest.raises(SurgeryError, match="CV423"):
        inject_crop_vote(model, after="site")
    assert networks.same(networks.snapshot(model), before)


class Frozen(networks.Net):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("frozen")
        super().__setattr__(name, value)


def test_a_class_with_read_only_attributes_votes():
    model = inject_crop_vote(Frozen().eval(), after="site", input_size=48)
    assert model(IMAGES).shape == (3, 7)
    assert type(remove_crop_vote(model)) is Frozen


def test_a_part_called_before_the_check_says_so():
    model = inject_crop_vote(networks.fer(), after="layer1")
    with pytest.raises(SurgeryError, match="CV420"):
        model.layer1(torch.zeros(1, 8, 12, 12))


def test_settings_cannot_be_deleted():
    with pytest.raises(OptionError, match="CV812"):
        del settings(inject_crop_vote(networks.fer(), after="layer1")).vote


class Extractor(nn.Module):
    """A torchvision feature extractor, a graph module whose deep copies are in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = create_feature_extractor(torchvision.models.resnet18(), {"layer2": "map"})
        self.fc = nn.Linear(128, 7)

    def forward(self, x):
        return self.fc(self.body(x)["map"].mean((2, 3)))


class VmapHead(networks.Net):
    def head(self, x):
        return torch.func.vmap(lambda one: self.fc(one.mean((1, 2))))(x)


class MaskedEncoder(networks.Net):
    """An encoder that would use nested tensors with a mask and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def head(self, x):
        x = x.flatten(2).transpose(1, 2)[:, :20]
        return self.fc(self.encoder(x, src_key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool)).mean(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "site"), [(Extractor, "body.maxpool"), (VmapHead, "site"), (MaskedEncoder, "site")])
def test_common_parts_of_models_are_supported(make, site):
    model = make().eval()
    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(model, site, IMAGES), "soft")
        inject_crop_vote(model, after=site, input_size=48)
        assert torch.allclose(model(IMAGES).double(), wanted, atol=1e-5)


def test_an_operation_counter_does_not_count_the_check():
    model = inject_crop_vote(networks.fer(), after="layer2")
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(IMAGES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_refusal_in_training_keeps_earlier_checks():
    model = inject_crop_vote(networks.LateGate().eval(), after="site", input_size=48)
    before = model(IMAGES)
    with pytest.raises(SiteError, match="CV101"):
        model.train()(IMAGES)
    assert torch.equal(model.eval()(IMAGES), before)


def test_a_value_read_in_python_is_named():
    class Scaled(networks.Net):
        def forward(self, x):
            return super().forward(x) * float(self.fc.bias.sum())

    with pytest.raises(PlainModelError, match="CV414"):
        inject_crop_vote(Scaled().eval(), after="site", input_size=48)
