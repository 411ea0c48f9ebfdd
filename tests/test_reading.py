"""per_view: the output of every view."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import networks
import oracle
from calls import expected_rows, layered, voting
from cropvote import (
    inject_crop_vote,
    per_view,
    settings,
)
from cropvote.errors import InputTypeError, OptionError, SurgeryError
from networks import IMAGES


@pytest.mark.parametrize("wrap", ["none", "compile", "compiled in place", "DataParallel"])
def test_per_view_looks_inside_wrappers_and_leaves_the_settings(wrap):
    model = voting(eval_views="centre", eval_output="vote", vote="hard")
    wrapped = model
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
        wrapped(IMAGES)
    elif wrap == "compiled in place":
        model.compile(backend="eager")
        model(IMAGES)
    elif wrap == "DataParallel":
        wrapped = nn.DataParallel(model)
    before = repr(settings(model))
    assert torch.allclose(per_view(wrapped, IMAGES), expected_rows().float(), atol=1e-5)
    assert repr(settings(model)) == before
    assert torch.allclose(wrapped(IMAGES), oracle.vote(expected_rows()[:, [4]], "hard").float(), atol=1e-5)


def test_per_view_of_a_dataclass():
    model = inject_crop_vote(networks.hf_resnet(), after="resnet.encoder.stages.0", input_size=48)
    logits = per_view(model, pixel_values=IMAGES)
    assert logits.shape == (3, 10, 7)
    assert torch.allclose(logits.mean(1), model(IMAGES).logits, atol=1e-6)


def test_invalid_uses_of_per_view():
    model = voting()
    with pytest.raises(SurgeryError, match="CV601"):
        per_view(model.train(), IMAGES)
    settings(model.eval()).enabled = False
    with pytest.raises(OptionError, match="CV602"):
        per_view(model, IMAGES)
    with pytest.raises(SurgeryError, match="CV418"):
        per_view(networks.fer(), IMAGES)
    with pytest.raises(SurgeryError, match="CV432"):
        per_view(nn.ModuleList([layered(), layered()]).eval(), IMAGES)
    with pytest.raises(InputTypeError, match="CV801"):
        per_view(3, IMAGES)
    after = nn.Sequential(layered(), nn.Flatten(0)).eval()
    with pytest.raises(SurgeryError, match="CV431"):
        per_view(after, IMAGES)


def test_per_view_of_a_checkpointed_timm_model():
    model = timm.create_model("resnet18", num_classes=7).eval()
    inject_crop_vote(model, after="layer2", input_size=48)
    wanted = per_view(model, IMAGES)
    model.set_grad_checkpointing(True)
    assert torch.allclose(per_view(model, IMAGES), wanted, atol=1e-6)


def test_per_view_takes_arguments_in_any_order():
    class Scaled(networks.Net):
        def forward(self, pixel_values, scale):
            return super().forward(pixel_values) * scale

    model = inject_crop_vote(Scaled().eval(), after="site")
    scale = torch.rand(1, 7)
    wanted = per_view(model, IMAGES, scale)
    assert torch.equal(per_view(model, scale=scale, pixel_values=IMAGES), wanted)
    assert torch.allclose(wanted.mean(1), model(scale=scale, pixel_values=IMAGES), atol=1e-6)
