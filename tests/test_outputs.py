"""Models that return several tensors: which are voted over, and which are left unchanged."""

from __future__ import annotations

import types
from collections import OrderedDict, namedtuple
from dataclasses import InitVar, dataclass
from typing import ClassVar

import pytest
import torch
import torchvision
from torch import Tensor, nn

import networks
from cropvote import CropVote, CropVoteLoss, hflip, inject_crop_vote, settings, ten_crop
from cropvote.errors import SiteError
from networks import IMAGES

Pair = namedtuple("Pair", ["logits", "aux_logits"])


@dataclass
class Answer:
    logits: Tensor
    maps: Tensor
    note: str = "a note"


@dataclass
class Scores:
    scores: Tensor
    scale: InitVar[int] = 1  # not a field ...
    classes: ClassVar[Tensor] = torch.eye(7)  # ... and neither is this, although it looks like predictions


class Several(networks.Net):
    """Two heads after the site, one before it, the maps of both sides, and something else."""

    def __init__(self, pack) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x):
        front = self.front(x)
        early = self.fc(front.mean((2, 3)))
        x = self.act(self.site(front))
        rows = self.fc(x.mean((2, 3)))
        return self.pack(rows, 2 * rows, early, front, x)


PACKS = {
    "tensor": lambda rows, twice, early, front, behind: rows,
    "tuple": lambda rows, twice, early, front, behind: (rows, twice, early, front),
    "list": lambda rows, twice, early, front, behind: [rows, behind, None],
    "namedtuple": lambda rows, twice, early, front, behind: Pair(rows, twice),
    "dict": lambda rows, twice, early, front, behind: {"features": behind.mean((2, 3)), "logits": rows, "n": 3},
    "nested": lambda rows, twice, early, front, behind: OrderedDict(
        scores=rows, more={"other": twice, "maps": [front]}
    ),
    "dataclass": lambda rows, twice, early, front, behind: Answer(rows, front),
    "early head": lambda rows, twice, early, front, behind: Pair(rows, early),
}


def leaves(output):
    """Return the tensors of an output, in order, without the library."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Answer):
        return [output.logits, output.maps]
    if isinstance(output, dict):
        output = list(output.values())
    return [leaf for item in output for leaf in leaves(item)] if isinstance(output, (tuple, list)) else []


#: Which leaves of each pack are voted over.
VOTED = {
    "tensor": [True],
    "tuple": [True, True, False, False],
    "list": [True, False],
    "namedtuple": [True, True],
    "dict": [False, True],
    "nested": [True, True, False],
    "dataclass": [True, False],
    "early head": [True, False],
}


@pytest.mark.parametrize("kind", PACKS)
def test_the_predictions_are_voted_over_and_the_rest_is_left_alone(kind):
    torch.manual_seed(0)
    model = Several(PACKS[kind]).eval()
    plain = model(IMAGES)
    hook = model.site.register_forward_hook(lambda m, args, out: out.flip(3))
    mirrored_late = model(IMAGES)
    hook.remove()
    inject_crop_vote(model, after="site", views=hflip(), input_size=48)
    found = model(IMAGES)
    assert type(found) is type(plain)
    for ours, whole, mirrored, voted in zip(
        leaves(found), leaves(plain), leaves(mirrored_late), VOTED[kind], strict=True
    ):
        if voted:
            assert torch.allclose(ours, (whole + mirrored) / 2, atol=1e-6)
        elif ours.shape[0] == len(IMAGES):
            assert torch.equal(ours, whole)  # from before the site
        else:
            assert torch.allclose(
                ours, torch.stack([whole, mirrored], 1).flatten(0, 1), atol=1e-6
            )  # from after it: per view
    for row, voted in zip(leaves(model.train()(IMAGES)), VOTED[kind], strict=True):
        assert not voted or len(row) == 2 * len(IMAGES)


@pytest.mark.parametrize("kind", [kind for kind in PACKS if kind != "nested"])  # dynamo cannot copy an OrderedDict
def test_compiled(kind):
    model = inject_crop_vote(Several(PACKS[kind]).eval(), after="site", input_size=48)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(IMAGES)
    assert type(compiled) is type(model(IMAGES))
    for ours, theirs in zip(leaves(compiled), leaves(model(IMAGES)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_only_fields_of_a_dataclass_are_predictions():
    model = inject_crop_vote(Several(lambda rows, *_: Scores(rows)).eval(), after="site", input_size=48)
    assert model(IMAGES).scores.shape == (3, 7)
    assert model.train()(IMAGES).scores.shape == (30, 7)


@pytest.mark.slow
def test_compiled_hugging_face():
    model = inject_crop_vote(networks.hf_resnet(), after="resnet.encoder.stages.0", input_size=48)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for count in (3, 2):
        assert torch.allclose(compiled(IMAGES[:count]).logits, model(IMAGES[:count]).logits, atol=1e-6)


def test_a_container_that_cannot_be_copied_is_refused():
    model = Several(lambda rows, *_: types.MappingProxyType({"logits": rows})).eval()
    with pytest.raises(SiteError, match="CV310"):
        inject_crop_vote(model, after="site", input_size=48)


def test_names_are_told_apart():
    """Two tensors have the same dotted name."""

    def pack(rows, twice, early, front, behind):
        return {"a": {"b": rows + early.mean(0)}, "a.b": rows}

    with pytest.raises(SiteError, match="CV101"):
        inject_crop_vote(Several(pack).eval(), after="site", input_size=48)


def test_only_floating_point_rows_are_predictions():
    model = inject_crop_vote(Several(lambda rows, *_: (rows, rows > 0)).eval(), after="site", input_size=48)
    assert [len(rows) for rows in model(IMAGES)] == [3, 30]


def test_a_single_number_among_the_outputs_is_refused():
    class Chain(nn.Sequential):
        def forward(self, x):
            rows = super().forward(x)
            return {"logits": rows, "loss": rows.square().mean().view(1)}

    with pytest.raises(SiteError, match="CV123"):
        inject_crop_vote(Chain(*networks.plain()).eval(), after="0", input_size=48)


def test_other_values_than_tensors_are_kept():
    model = inject_crop_vote(Several(PACKS["dataclass"]).eval(), after="site", input_size=48)
    assert model(IMAGES).note == "a note"
    model = inject_crop_vote(Several(PACKS["dict"]).eval(), after="site", input_size=48)
    assert model(IMAGES)["n"] == 3


def test_a_second_head_that_mixes_both_sides_is_refused():
    model = Several(lambda rows, twice, early, front, behind: Pair(rows, twice + early.mean(0)))
    with pytest.raises(SiteError, match="CV101"):
        inject_crop_vote(model.eval(), after="site", input_size=48)


def test_a_main_head_before_the_site_is_refused():
    with pytest.raises(SiteError, match="CV101"):
        inject_crop_vote(Several(lambda r, t, early, f, b: Pair(early, r)).eval(), after="site", input_size=48)


def test_an_output_of_an_unknown_class_is_refused():
    class Box:
        def __init__(self, rows):
            self.rows = rows

    with pytest.raises(SiteError, match="CV311"):
        inject_crop_vote(Several(lambda rows, *_: Box(rows)).eval(), after="site", input_size=48)


def test_a_layer_whose_tail_returns_several():
    class Tail(nn.Module):
        def forward(self, x):
            return {"logits": x.mean((2, 3)), "features": x.amax((2, 3))}

    x = torch.randn(2, 8, 12, 12)
    layer = CropVote(Tail()).eval()
    found = layer(x)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"logits": (2, 8), "features": (20, 8)}
    settings(layer).eval_output = "views"
    assert torch.allclose(found["logits"], layer(x)["logits"].unflatten(0, (2, 10)).mean(1), atol=1e-6)


HEADS = [
    ("googlenet", 96, ten_crop(), "inception3a", {"logits": 20, "aux_logits2": 20, "aux_logits1": 20}),
    ("googlenet", 96, ten_crop(), "inception4b", {"logits": 20, "aux_logits2": 20, "aux_logits1": 2}),
    pytest.param("inception_v3", 299, hflip(), "Mixed_5d", {"logits": 4, "aux_logits": 4}, marks=pytest.mark.slow),
    pytest.param("inception_v3", 299, hflip(), "Mixed_7a", {"logits": 4, "aux_logits": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "size", "views", "site", "rows"), HEADS)
def test_auxiliary_heads_in_training(kind, size, views, site, rows):
    """Heads after the site give a row per view; heads before it are unchanged; the loss takes both."""
    images, targets = torch.randn(2, 3, size, size), torch.tensor([1, 3])
    model = getattr(torchvision.models, kind)(num_classes=7, init_weights=False).train()
    layout = "NCHW" if kind == "inception_v3" else None  # stated: its head's kernel does not fit smaller maps
    inject_crop_vote(model, after=site, views=views, input_size=size, layout=layout)
    output = model(images)
    assert {head: len(getattr(output, head)) for head in rows} == rows
    criterion = CropVoteLoss(nn.CrossEntropyLoss(), views=views)
    sum(criterion(getattr(output, head), targets) for head in rows).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images).shape == (2, 7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_tuple_is_traced():
    """While tracing, sizes are tensors, which never match as dict keys."""
    model = inject_crop_vote(Several(lambda rows, twice, *_: (rows, twice)).eval(), after="site", input_size=48)
    for ours, theirs in zip(torch.jit.trace(model, IMAGES)(IMAGES[:2]), model(IMAGES[:2]), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
