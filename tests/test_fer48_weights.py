"""The network in examples/fer48/weights loads and votes, and its model card matches its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import skimage.data
import skimage.io
import timm
import torch
from safetensors.torch import load_file

import demo
import predict
from cropvote import per_view, settings
from cropvote.uncertainty import agreement
from keeping import load_model

WEIGHTS = Path(__file__).parent.parent / "examples" / "fer48" / "weights"


def test_it_is_small_and_votes():
    model, card = load_model(WEIGHTS)
    assert (WEIGHTS / "model.safetensors").stat().st_size < 6e6
    assert {x.dtype for x in load_file(WEIGHTS / "model.safetensors").values()} == {torch.float16, torch.int64}
    assert sum(p.numel() for p in model.parameters()) == 2_796_839
    assert len(settings(model).views) == 10
    assert card["outputs"] == ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]


def test_the_astronaut_is_happy():
    """NASA's public-domain portrait; the face box is given, so no detector is needed."""
    model, card = load_model(WEIGHTS)
    face = torch.from_numpy(skimage.data.astronaut()[65:161, 176:272].copy()).permute(2, 0, 1)[None].float()
    grey = (face * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = torch.nn.functional.interpolate(grey, (48, 48), mode="area").expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        logits = per_view(model, x)
    assert card["outputs"][int(logits.mean(1).argmax())] == "happy"
    assert float(agreement(logits)) >= 0.8


def test_the_card_holds_the_stored_figures():
    card, text = json.loads((WEIGHTS / "model.json").read_text()), (WEIGHTS / "MODEL_CARD.md").read_text()
    (head,) = re.findall(r"\| faces \| number \| (.*) \|\n", text)
    (all_faces,) = re.findall(r"\| all \| 3,589 \| (.*) \|\n", text)
    assert head.split(" | ") == list(card["accuracy"])
    shown = [float(cell.split()[0]) for cell in all_faces.split(" | ")]
    assert shown == [round(100 * accuracy, 1) for accuracy in card["accuracy"].values()]
    assert all(
        re.search(rf"\n\| {name} \| \d+ \|( [\d.]+ \([\d.]+ – [\d.]+\) \|){{3}}", text) for name in card["outputs"]
    )
    assert card["accuracy"]["ten views"] == pytest.approx(0.709, abs=0.001)
    assert "without a clear grant of rights" in text


def test_the_demo_shows_a_real_face(tmp_path, capsys):
    pytest.importorskip("cv2")
    demo.main(["--out", str(tmp_path / "demo")])
    told = capsys.readouterr().out
    assert "trained on FER2013; 70.9 % of PrivateTest" in told
    assert re.search(r"astronaut \[.*\]: happy \d+ %, (9|10) of 10 views agree", told)
    assert (tmp_path / "demo" / "00001-astronaut.png").stat().st_size > 50_000


def test_predictions_without_a_model_take_the_shipped_one(tmp_path, capsys):
    skimage.io.imsave(tmp_path / "photo.png", skimage.data.astronaut()[65:161, 176:272])
    predict.main([str(tmp_path / "photo.png"), "--device", "cpu"])
    told = capsys.readouterr()
    assert ": happy" in told.out
    assert "trained on FER2013" in told.err
    for i in range(5):
        skimage.io.imsave(tmp_path / f"{i}.png", skimage.data.astronaut()[65:161, 176:272])
    predict.main([str(tmp_path), "--device", "cpu"])
    assert "all 6 faces are happy: a network that gives every face the same answer" in capsys.readouterr().err


def test_timm_makes_it_with_its_weights(monkeypatch, tmp_path):
    model = timm.create_model("fer_resnet18", pretrained=True).eval()
    kept = load_file(WEIGHTS / "model.safetensors")
    assert all(torch.equal(value, kept[name].to(value.dtype)) for name, value in model.state_dict().items())
    other = timm.create_model("fer_resnet18", pretrained=True, num_classes=3)
    assert other.fc.out_features == 3
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    with pytest.raises(ValueError, match="width 32, not 64"):
        timm.create_model("fer_resnet18", pretrained=True, width=64)
    monkeypatch.setattr("model.WEIGHTS", tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="come with a checkout"):
        timm.create_model("fer_resnet18", pretrained=True)
