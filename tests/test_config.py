"""An injection as plain data: stored with the weights, and restored in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import networks
from cropvote import CropVoteError, Tokens, five_crop, hflip, inject_crop_vote, settings, ten_crop, to_config
from cropvote.errors import InputTypeError, OptionError, SurgeryError, ViewsError
from cropvote.views import Views, d4, grid

HERE = Path(__file__).parent
TWO_SITES = {"layer2": five_crop(scale=0.7), "layer1": hflip()}
OPTIONS = [
    {"after": "layer1", "input_size": 48},
    {"after": "input", "views": d4()},
    {"after": "layer2", "views": grid(2, 3, mirror=True), "vote": "probs", "eval_views": [0, 3]},
    {"after": "layer2", "eval_views": "centre", "train_views": 2, "train_output": "vote", "layout": "NCHW"},
    {"after": TWO_SITES, "input_size": (3, 48, 48), "eval_output": "views", "enabled": False},
    {"after": TWO_SITES, "check": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_stored_injection_gives_the_same_outputs(options):
    model = inject_crop_vote(networks.fer(), **options).eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        expected = model(images)
    config = json.loads(json.dumps(to_config(model)))
    other = networks.fer()
    other.load_state_dict(model.state_dict())
    again = inject_crop_vote(other, **config).eval()
    with torch.no_grad():
        assert torch.equal(again(images), expected)
    assert to_config(again) == to_config(model)
    assert repr(settings(again)) == repr(settings(model))


def test_a_checkpoint_of_another_process(tmp_path):
    """Store weights and injection in one safetensors file."""
    model = inject_crop_vote(networks.fer(), after={"layer1": hflip(), "layer3": five_crop()}, input_size=48).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        save_file({"images": images, "expected": model(images)}, tmp_path / "images.safetensors")
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"cropvote": json.dumps(to_config(model))})
    code = f"""
import json, sys
sys.path[:0] = {[str(HERE), str(HERE.parent), str(HERE.parent / "examples" / "fer48")]!r}
import networks, torch
from safetensors import safe_open
from safetensors.torch import load_file
from cropvote import inject_crop_vote
with safe_open("model.safetensors", "pt") as file:
    config = json.loads(file.metadata()["cropvote"])
model = networks.fer()
model.load_state_dict(load_file("model.safetensors"))
inject_crop_vote(model, **config).eval()
stored = load_file("images.safetensors")
with torch.no_grad():
    assert torch.equal(model(stored["images"]), stored["expected"])
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_tokens_are_stored():
    stated = Tokens(6, 6, prefix=3)
    model = inject_crop_vote(networks.tokens(), after="blocks.0", views=five_crop(), layout=stated, input_size=48)
    config = json.loads(json.dumps(to_config(model)))
    assert config["layout"] == {"blocks.0": [6, 6, 3]}
    again = inject_crop_vote(networks.tokens(), **config)
    assert to_config(again) == config


@pytest.mark.parametrize("views", [ten_crop(), d4(), grid(2, 3, scale=(1, 0.3), mirror=True), Views([(1 / 3, 0.7)])])
def test_views_survive_json(views):
    assert Views.from_dict(json.loads(json.dumps(views.to_dict()))) == views


HALF = {"scale": ["1/2", "1/2"], "stride": 1, "views": [["0", "0", False, 0]]}
MALFORMED = [
    ({"after": {"layer1": {}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "scale": "1/2"}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "scale": ["1/0", "1"]}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "more": 1}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "views": [["0", "0"]]}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "views": [["0", "0", "no", 0]]}}}, InputTypeError, "CV201"),
    ({"after": {"layer1": {**HALF, "scale": ["2", "2"]}}}, ViewsError, "CV208"),
    ({"after": {"layer1": {**HALF, "scale": "11"}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "scale": [True, True]}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "scale": [float("inf"), 1]}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": {**HALF, "views": {(0, 0, False, 0): 1}}}}, InputTypeError, "CV212"),
    ({"after": {"layer1": None}}, InputTypeError, "CV850"),
    ({"after": {"layer1": HALF}, "vote": "loud"}, OptionError, "CV808"),
    ({"after": {"layer1": HALF}, "enabled": "yes"}, InputTypeError, "CV814"),
    ({"after": {"layer1": HALF}, "layout": {"layer1": [4, 4]}}, OptionError, "CV805"),
    ({"after": {"layer1": HALF}, "temperature": 2}, InputTypeError, "CV852"),
]


@pytest.mark.parametrize(("config", "kind", "code"), MALFORMED)
def test_a_malformed_config_is_an_error(config, kind, code):
    model = networks.fer()
    with pytest.raises(kind, match=code) as caught:
        inject_crop_vote(model, **config)
    assert isinstance(caught.value, CropVoteError)
    assert not hasattr(model, "_cropvote")


def test_what_cannot_be_stored():
    with pytest.raises(SurgeryError, match="CV418"):
        to_config(networks.fer())
    model = inject_crop_vote(networks.fer(), after="layer1", vote=lambda views: views.amax(1))
    with pytest.raises(OptionError, match="CV851"):
        to_config(model)


def test_sites_with_the_names_of_fields():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.views = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

        def forward(self, x):
            return self.head(self.views(self.scale(x)))

    model = inject_crop_vote(Named(), after={"scale": hflip(), "views": five_crop()}, input_size=24)
    assert to_config(inject_crop_vote(Named(), **to_config(model))) == to_config(model)


def test_stored_floats_are_rounded_like_given_ones():
    data = {"scale": [2 / 3, 2 / 3], "stride": 1, "views": [[1 / 3, 1 / 3, False, 0]]}
    assert Views.from_dict(data) == Views([(1 / 3, 1 / 3)], scale=2 / 3)
