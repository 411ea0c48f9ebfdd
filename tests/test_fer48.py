"""The flagship example: its network, its recipes, training, resuming, and what it writes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, recall_score
from torch import nn
from torchvision.models import resnet18

import cropvote
import train as training
from batches import to_input
from config import RECIPES, Config, add_options, from_options, recipe
from cropvote import inject_crop_vote, vote
from data import load
from data.toy import CLASSES, toy_faces
from keeping import KeptError, load_model, save_model, start_from, write_whole
from learner import Learner, read
from machines import Machine, machine
from model import fer_resnet18
from results import costs
from scoring import interval, score, with_interval

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fer48"
FER2013 = ROOT.parent / "shared" / "data" / "fer2013"
#: A run of seconds.
SMALL = ("--width", 4, "--epochs", 2, "--batch", 16, "--limit", 64, "--after", "layer3", "--device", "cpu")
HERE = Machine(torch.device("cpu"), torch.float32, fast=False)


def run(*arguments: object) -> dict[str, Any]:
    """Train in this process; what result.json holds."""
    training.main([str(a) for a in arguments])
    out = Path(str(arguments[arguments.index("--out") + 1]))
    return json.loads((out / "result.json").read_text())


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as caught:
        training.main([str(a) for a in arguments])
    assert caught.value.code not in (0, None)
    if isinstance(caught.value.code, str):
        return caught.value.code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fer48") / "run"
    run(*SMALL, "--out", out)
    return out


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_network_is_the_papers():
    """11,172,423 parameters, named as torchvision's, but for the stem."""
    network, reference = fer_resnet18(), resnet18(num_classes=7)
    assert sum(p.numel() for p in network.parameters()) == 11_172_423
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (network, reference))
    assert shapes.pop("conv1.weight") == (64, 3, 3, 3)
    assert expected.pop("conv1.weight") == (64, 3, 7, 7)
    assert shapes == expected
    assert network.eval()(torch.zeros(2, 3, 48, 48)).shape == (2, 7)


def test_the_network_computes_what_torchvisions_does_behind_the_stem():
    network, reference = fer_resnet18().eval(), resnet18(num_classes=7).eval()
    reference.conv1, reference.maxpool = network.conv1, nn.Identity()
    reference.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 48, 48)
    assert torch.allclose(network(x), reference(x), atol=1e-5)


def test_timm_makes_the_network_and_votes_without_being_told_a_size():
    network = timm.create_model("fer_resnet18", num_classes=3, in_chans=1, width=8)
    assert network(torch.zeros(2, 1, 48, 48)).shape == (2, 3)
    assert network.get_classifier() is network.fc
    network.reset_classifier(5)
    assert inject_crop_vote(network.eval(), after="layer2")(torch.zeros(2, 1, 48, 48)).shape == (2, 5)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("fer_resnet18", pretrained=True)


def test_toy_faces_are_the_same_for_the_same_seed_and_balanced():
    images, labels = toy_faces(70, seed=3)
    again, same = toy_faces(70, seed=3)
    other, _ = toy_faces(70, seed=4)
    assert images.dtype == np.uint8
    assert images.shape == (70, 48, 48)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, same)
    assert not np.array_equal(images, other)
    assert np.bincount(labels).tolist() == [10] * len(CLASSES)
    assert toy_faces(0, seed=0)[0].shape == (0, 48, 48)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decay", "epochs", "validation"), [("affectnet", 0.65, 20, 500), ("rafdb", 0.95, 40, 0.1)]
)
def test_the_papers_recipes(name, decay, epochs, validation):
    """Electronics 2023, 12(18), 3837, section 3.3: Adam, 2e-4, batch 135, the rate falls after every epoch."""
    config = recipe(name, data="somewhere")
    assert (config.optimizer, config.rate, config.batch, config.width) == ("adam", 2e-4, 135, 64)
    assert (config.schedule, config.decay, config.epochs, config.validation) == (
        "exponential",
        decay,
        epochs,
        validation,
    )
    assert (config.mirror, config.weight_decay, config.label_smoothing, config.ema) == (0, 0, 0, 0)
    assert config.per_class == (-1 if name == "affectnet" else 0)
    assert not config.fast
    assert config.precision == ""
    assert (config.after, config.vote) == ("layer1", "soft")


def test_the_rate_falls_as_the_recipe_says():
    from learner import Learner

    paper = replace(recipe("rafdb", data="x"), width=2, after="none")
    learner = Learner(paper, CLASSES, 3, HERE)
    rates = []
    for _ in range(3):
        learner.learn(torch.zeros(2, 3, 48, 48), torch.tensor([0, 1]))
        rates.append(learner.rate)
        learner.end_epoch()
    assert rates == pytest.approx([2e-4, 2e-4 * 0.95, 2e-4 * 0.95**2])


def test_every_recipe_is_complete_and_every_option_can_be_given():
    for name in RECIPES:
        assert recipe(name, data="toy").recipe == name
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args(["--recipe", "affectnet", "--data", "x", "--per-class", "10", "--fast"]))
    config = from_options(given)
    assert (config.per_class, config.fast, config.epochs) == (10, True, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.csv", "--recipe", "fer2013"), "nowhere.csv"),
        (("--limit", 8), "8 training faces are less than one batch of 64"),
        (("--width", 0), "--width 0: it is at least 1"),
        (("--crop", 0), "--crop 0.0: it is at least 0.1 and at most 1.0"),
        (("--after", "layer9"), "invalid choice: 'layer9'"),
        (("--recipe", "rafdb"), "--recipe rafdb needs --data PATH"),
        (("--data", "faces"), "--data faces needs a --recipe"),
        (("--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
        (("--target", "valence-arousal", "--limit", 64, "--batch", 16), "--target valence-arousal: toy"),
        (("--init", "nowhere", "--limit", 64, "--batch", 16), "nowhere: no finished model there"),
        (("--precision", "float16", "--device", "cpu"), "--precision float16 needs a GPU"),
        (("--schedule", "exponential", "--decay", -1), "--decay -1.0: it is at least 0.0001 and at most 1.0"),
        (("--weight-decay", -1), "--weight-decay -1.0: it is at least 0.0"),
        (("--ema", 1), "--ema 1.0: it is at least 0.0 and at most 0.99999"),
        (("--seed", -1), "--seed -1: it is at least 0"),
        (("--rate", "nan"), "--rate nan: it is a number"),
        (("--warmup", 2), "--warmup 2.0: it is at least 0.0 and at most 1.0"),
        (("--learn", "train+val", "--retrain"), "--retrain chooses the number of epochs on validation faces; --learn"),
        (("--label-order", "nonsense"), "--label-order nonsense"),
        (("--label-order", "rafdb"), "--label-order rafdb: drawn by code has angry"),
    ],
)
def test_misuse_is_one_line(arguments, message, capsys, tmp_path):
    assert message in refused(capsys, *arguments, "--out", tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_cuda_is_one_line(capsys):
    assert "PyTorch sees no CUDA device" in refused(capsys, "--device", "cuda")


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["split"] == result["data"]["names"]["val"] == "val"
    assert "synthetic" in result["data"]["note"]
    for picture in ("confusion_matrix.png", "curves.png"):
        assert (finished / picture).read_bytes()[:4] == b"\x89PNG"
    assert len((finished / "validation.txt").read_text().splitlines()) == 64
    card = (finished / "MODEL_CARD.md").read_text()
    assert result["summary"] in card
    assert "research" in card
    assert not list(finished.glob(".*part"))


def test_the_stored_weights_reach_the_stored_figures(finished):
    """Computed anew from model.safetensors, by the library's functions and by scikit-learn."""
    result = json.loads((finished / "result.json").read_text())
    model, card = load_model(finished)
    assert tuple(card["outputs"]) == CLASSES
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    val = load("toy", limit=64).splits["val"]
    cropvote.settings(model).eval_output = "views"
    with torch.no_grad():
        rows = model(to_input(val.images))
    stored = np.load(finished / "logits.npz")
    assert np.allclose(stored["logits"], rows.view(64, 10, 7), atol=1e-4)
    assert stored["labels"].tolist() == val.labels.tolist()
    for how in ("soft", "probs", "hard"):
        predicted = vote(rows, 10, how).argmax(1)
        found = result["votes"][how]
        assert found["accuracy"] == pytest.approx(accuracy_score(val.labels, predicted), abs=1 / 64)
        recalls = recall_score(val.labels, predicted, labels=range(7), average=None, zero_division=0)
        assert [row["recall"] or 0 for row in found["per_class"].values()] == pytest.approx(recalls.tolist(), abs=0.2)
    best = max(row["score"] for row in result["curve"])
    assert result["votes"]["soft"]["accuracy"] == best == result["epochs"]["best"]


@pytest.mark.slow
def test_the_test_split_is_scored_only_when_asked(finished, tmp_path, capsys):
    """Going on with a finished run adds the test's figures, and trains nothing; and nothing takes them away again."""
    before = json.loads((finished / "result.json").read_text())
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert run(*SMALL, "--out", out, "--resume") == before
    assert "is complete: left as it is" in capsys.readouterr().out
    result = run(*SMALL, "--out", out, "--resume", "--final-test")
    assert (before["split"], result["split"]) == ("val", "test")
    assert result["curve"] == before["curve"]
    assert "Going on after epoch 2" in capsys.readouterr().out
    assert run(*SMALL, "--out", out, "--resume") == result
    assert "with its test figures: left as it is" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*SMALL, "--out", out, "--resume", "--retrain", "--epochs", 3)
    retrained = run(*SMALL, "--out", out, "--resume", "--retrain", "--final-test")
    assert retrained == result
    assert json.loads((out / "retrained" / "result.json").read_text())["split"] == "test"


def test_a_plain_network(tmp_path):
    result = run(*SMALL, "--after", "none", "--out", tmp_path / "run")
    assert list(result["votes"]) == ["soft"]
    assert np.load(tmp_path / "run" / "logits.npz")["logits"].shape == (64, 1, 7)
    model, _ = load_model(tmp_path / "run")
    assert type(model).__name__ == "FerResNet18"
    assert not hasattr(model, "_cropvote")


@pytest.mark.slow
def test_a_plan_over_two_places(tmp_path):
    """Mirrored after layer1, cropped after layer3: stored, loaded and read like any other."""
    plan = "layer1=hflip,layer3=five"
    result = run(*SMALL, "--after", plan, "--out", tmp_path / "run")
    plain = Config(width=4)
    assert costs(replace(plain, after="none"), 7)["gmacs"] < result["gmacs"] < costs(plain, 7)["gmacs"]
    model, card = load_model(tmp_path / "run")
    assert card["after"] == plan
    val = load("toy", limit=64).splits["val"]
    stored = np.load(tmp_path / "run" / "logits.npz")["logits"]
    assert np.allclose(stored, read(model, val.images, HERE, True), atol=1e-4)
    title = "ten views, mirrored after layer1 and cropped after layer3"
    assert title in (tmp_path / "run" / "MODEL_CARD.md").read_text()


def test_retraining_learns_from_both_splits_for_as_long_as_was_best(tmp_path):
    out = tmp_path / "run"
    training.main([str(a) for a in (*SMALL, "--retrain", "--final-test", "--out", out)])
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (out, out / "retrained"))
    assert first["split"] == "val"
    assert second["split"] == "test"
    assert second["data"]["faces"] == {"train": 128, "test": 64}
    assert len(second["curve"]) == first["epochs"]["best_epoch"]
    assert second["epochs"] is None


def test_all_faces_learnt_and_none_scored(tmp_path, capsys):
    result = run(*SMALL, "--learn", "train+val", "--out", tmp_path / "run")
    assert (result["split"], result["votes"], result["epochs"]) == (None, {}, None)
    said = capsys.readouterr().out
    assert "no split: not scored" in said
    assert "logits" not in said.splitlines()[-1]
    assert not (tmp_path / "run" / "logits.npz").exists()


@pytest.mark.slow
def test_overwriting_leaves_nothing_of_the_old_run(tmp_path):
    out = tmp_path / "run"
    run(*SMALL, "--retrain", "--out", out)
    assert (out / "retrained" / "model.safetensors").exists()
    (out / "mine.txt").write_text("kept")
    run(*SMALL, "--learn", "train+val", "--overwrite", "--out", out)
    assert not (out / "retrained").exists()
    assert not (out / "logits.npz").exists()
    assert not (out / "validation.txt").exists()
    assert (out / "mine.txt").read_text() == "kept"


def test_stopping_by_hand_is_one_line(tmp_path, capsys, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Learner, "learn", stopped)
    assert "stopped; --resume goes on" in refused(capsys, *SMALL, "--out", tmp_path / "run")


@pytest.mark.slow
def test_other_pixels_are_other_faces(tmp_path, capsys, monkeypatch):
    run(*SMALL, "--out", tmp_path / "run")
    import data

    drawn = data.toy_faces
    monkeypatch.setattr(data, "toy_faces", lambda *a, **k: (255 - drawn(*a, **k)[0], drawn(*a, **k)[1]))
    said = refused(capsys, *SMALL, "--out", tmp_path / "run", "--resume")
    assert "the faces, their labels or their split have changed" in said


def test_a_run_is_not_overwritten_by_accident(finished, capsys):
    assert "holds a run: --resume goes on with it" in refused(capsys, *SMALL, "--out", finished)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", 0.1), "started with rate 0.002, now 0.1: name another --out"),
        (("--limit", 60), r"started with limit 64, now 60"),
        (("--split-seed", 3), r"started with split_seed 0, now 3"),
    ],
)
def test_another_run_is_not_gone_on_with(finished, capsys, options, message):
    assert message in refused(capsys, *SMALL, *options, "--out", finished, "--resume")


@pytest.mark.slow
def test_other_classes_or_faces_are_refused(finished, tmp_path, capsys):
    """The stored state of a run with the same options, but of other classes, faces or processes."""
    for key, value, message in (
        ("outputs", ["a", "b"], "its classes are a, b; this run's are angry, disgust"),
        ("faces", "0", "the faces, their labels or their split have changed"),
        ("processes", 2, "it ran on 2 processes, this is 1"),
    ):
        out = tmp_path / key
        shutil.copytree(finished, out)
        state = torch.load(out / "last.pt", weights_only=True)
        torch.save({**state, key: value}, out / "last.pt")
        assert message in refused(capsys, *SMALL, "--out", out, "--resume")
    (out / "last.pt").write_bytes(b"PK nonsense")
    assert "last.pt: cannot be read" in refused(capsys, *SMALL, "--out", out, "--resume")


def test_a_state_that_is_a_program_is_not_run(tmp_path, capsys):
    """weights_only: an object that would run code on unpickling is refused."""
    out = tmp_path / "run"
    out.mkdir()
    torch.save({"format": 1, "evil": machine}, out / "last.pt")
    assert "cannot be read" in refused(capsys, *SMALL, "--out", out, "--resume")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_state(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    learn, calls = training.Learner.learn, []

    def spoiled(self, x, targets):
        calls.append(1)
        return learn(self, x * (float("nan") if len(calls) > 4 else 1), targets)

    monkeypatch.setattr(training.Learner, "learn", spoiled)
    assert f"epoch 2: the loss is nan; a lower --rate? {out} keeps the 1 before it." in refused(
        capsys, *SMALL, "--out", out
    )
    monkeypatch.undo()
    result = run(*SMALL, "--out", out, "--resume")
    expected = json.loads((finished / "result.json").read_text())
    assert [row["loss"] for row in result["curve"]] == [row["loss"] for row in expected["curve"]]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "last.pt"
    write_whole(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(KeptError, match=r"last.pt: cannot be written \(No space left on device\)"):
        write_whole(path, full)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_set_go_to_the_classes_of_the_same_name(tmp_path):
    """RAF-DB's order from AffectNet's; a class that was not learnt, and another width, are refused."""
    affectnet = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "angry", "contempt")
    rafdb = ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral")
    source = fer_resnet18(num_classes=8, width=4)
    card = {"architecture": "fer_resnet18", "width": 4, "outputs": list(affectnet), "after": "none", "vote": "soft"}
    save_model(tmp_path, source, card)
    model = fer_resnet18(num_classes=7, width=4)
    start_from(model, str(tmp_path), rafdb)
    x = torch.randn(3, 3, 48, 48)
    expected = source.eval()(x)[:, [affectnet.index(name) for name in rafdb]]
    assert torch.allclose(model.eval()(x), expected, atol=1e-6)
    with pytest.raises(KeptError, match=r"it knows neutral.*, not cat"):
        start_from(model, str(tmp_path), ("cat", *rafdb[1:]))
    with pytest.raises(KeptError, match=r"its width is 4, and this run's 8; give --width 4"):
        start_from(fer_resnet18(num_classes=7, width=8), str(tmp_path / "model.safetensors"), rafdb)


def test_fast_and_averaged_weights(tmp_path):
    """bfloat16, channels_last and the average change little, and the average is what is kept."""
    averaged = run(*SMALL, "--ema", 0.5, "--precision", "bfloat16", "--out", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    kept = state["best"]["fc.weight"]
    assert averaged["epochs"]["best_epoch"] in (1, 2)
    if averaged["epochs"]["best_epoch"] == 2:
        assert torch.equal(kept, state["learner"]["averaged"]["module.fc.weight"])
    assert not torch.equal(kept, state["learner"]["model"]["fc.weight"])


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_of_known_logits():
    """Two views, three faces: right by both, right by one, wrong."""
    logits = torch.tensor([[[3.0, 0], [1, 0]], [[2.0, 0], [0, 1]], [[0.0, 1], [0, 1]]])
    votes = score(logits, torch.tensor([0, 0, 0]), ("a", "b"))
    assert votes["soft"]["accuracy"] == pytest.approx(2 / 3)
    assert votes["soft"]["confusion"] == [[2, 1], [0, 0]]
    assert votes["soft"]["per_class"]["b"]["recall"] is None
    assert votes["soft"]["mean_class_accuracy"] == pytest.approx(2 / 3)


def test_the_interval_is_wilsons():
    """By the formula (Wilson 1927), for 30 of 100."""
    z, n, p = 1.959964, 100, 0.3
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    assert interval(30, 100) == pytest.approx(((middle - half) / scale, (middle + half) / scale), abs=1e-6)


def test_concordance_is_lins():
    """By the formula (Lin 1989); views are averaged first."""
    torch.manual_seed(0)
    logits, mood = torch.randn(50, 4, 2), torch.rand(50, 2) * 2 - 1
    found = score(logits, mood, ("valence", "arousal"))["mean"]
    for i, name in enumerate(("valence", "arousal")):
        x, y = logits[..., i].mean(1).double(), mood[:, i].double()
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        lin = 2 * covariance / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()) ** 2)
        assert found["concordance_each"][name] == pytest.approx(float(lin), abs=1e-2)  # it divides by n - 1
        assert found["rmse_each"][name] == pytest.approx(float(((x - y) ** 2).mean() ** 0.5), abs=1e-5)


def test_concordance_of_constant_predictions_is_0():
    """Lin's covariance is 0 there; torchmetrics gives NaN, which no JSON and no comparison of epochs can hold."""
    mood = torch.rand(20, 2)
    constant = torch.full((20, 1, 2), 0.3)
    for logits, aims in ((constant, mood), (torch.randn(20, 1, 2), constant[:, 0]), (constant, constant[:, 0])):
        assert score(logits, aims, ("valence", "arousal"))["mean"]["concordance"] == 0


def test_an_interval_as_a_person_reads_it():
    assert with_interval(1.0, 8) == "100.0 % (95 %: 67.6–100.0)"
    assert with_interval(0.3, 100) == "30.0 % (95 %: 21.9–39.6)"


def test_reading_leaves_a_batch_alone():
    """The rows of a face do not depend on the batch that it is read in."""
    model = inject_crop_vote(fer_resnet18(width=4), after="layer2", input_size=48).eval()
    images = torch.from_numpy(toy_faces(10, seed=0)[0]).unsqueeze(1)
    whole, parts = read(model, images, HERE, True), read(model, images, HERE, True, batch=3)
    assert whole.shape == (10, 10, 7)
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_faces_and_labels_are_mixed_in_the_same_shares(options):
    """Faces of one colour each, by class: what is seen of a colour is the share of its class; no two steps alike."""
    torch.manual_seed(0)
    mix = Learner(Config(after="none", width=4, **options), CLASSES, 1, HERE).mix
    labels = torch.arange(7)
    faces = labels.view(7, 1, 1, 1).expand(7, 3, 48, 48).float()
    seen = set()
    for _ in range(12):
        mixed, shares = mix(faces, labels)
        assert torch.allclose(shares.sum(1), torch.ones(7))
        assert torch.allclose(mixed.mean((1, 2, 3)), shares @ labels.float(), atol=1e-4)
        seen.add((len(mixed[1].unique()), round(float(shares.max()), 4)))
    assert len(seen) > 6
    kinds = {one for one, _ in seen if one}  # a pasted face has two colours, a mixed one a colour between them
    assert kinds == ({1, 2} if len(options) == 2 else {1} if "mixup" in options else {1, 2} & kinds | {2})
    assert Learner(Config(after="none", width=4), CLASSES, 1, HERE).mix is None


def test_a_step_on_mixed_faces_is_one_on_their_shares():
    """The loss of a voting network: every view against the shares, by the formula."""
    torch.manual_seed(0)
    learner = Learner(Config(after="layer3", width=4, batch=8, rate=1e-8, mixup=0.4), CLASSES, 1, HERE)
    faces, labels = torch.randn(8, 3, 48, 48), torch.arange(8) % 7
    learner.model.train()
    torch.manual_seed(3)
    found = learner.learn(faces, labels)
    torch.manual_seed(3)
    mixed, shares = learner.mix(faces, labels)
    rows = learner.model(mixed).detach().unflatten(0, (8, 10)).log_softmax(2)
    assert found == pytest.approx(float(-(rows * shares.unsqueeze(1)).sum(2).mean()), abs=1e-3)


# --- slow: other processes -------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLE / "train.py"), *map(str, arguments)]


@pytest.mark.slow
def test_killed_and_resumed_reaches_the_same_numbers(tmp_path):
    """SIGKILL in the middle of an epoch: losses, scores and weights are those of a run without it, bit for bit."""
    options = (*SMALL, "--epochs", 4, "--limit", 256, "--ema", 0.9, "--mixup", 0.2, "--cutmix", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(*options, "--out", tmp_path / "whole"), check=True, env=env)
    killed = subprocess.Popen(command(*options, "--out", tmp_path / "killed"), env=env)
    state = tmp_path / "killed" / "last.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    written = state.stat().st_mtime_ns
    time.sleep(0.05)  # some batches into the next epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert state.stat().st_mtime_ns == written
    assert not (tmp_path / "killed" / "result.json").exists()
    subprocess.run(command(*options, "--out", tmp_path / "killed", "--resume"), check=True, env=env)
    whole, resumed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    for one, other in zip(whole["curve"], resumed["curve"], strict=True):
        assert (one["loss"], one["score"], one["rate"]) == (other["loss"], other["score"], other["rate"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """torchrun with gloo: every face is scored exactly once, both steps and epochs go on after a resume."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE / "train.py")]
    options = [str(a) for a in (*SMALL, "--limit", 65, "--out", tmp_path / "run")]
    done = subprocess.run([*torchrun, *options], capture_output=True, text=True, check=True, env=env)
    assert "4 steps an epoch of 16 faces, 8 in each of 2 processes" in done.stdout
    assert done.stdout.count("epoch 2/2") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["versions"]["processes"] == "2"
    assert sum(row["faces"] for row in result["votes"]["soft"]["per_class"].values()) == 65
    model, _ = load_model(tmp_path / "run")
    val = load("toy", limit=65).splits["val"]
    assert np.allclose(
        np.load(tmp_path / "run" / "logits.npz")["logits"], read(model, val.images, HERE, True), atol=1e-4
    )
    odd = subprocess.run(
        [*torchrun, *options, "--batch", "15", "--overwrite"], capture_output=True, text=True, env=env, check=False
    )
    assert odd.returncode != 0
    assert "--batch 15 is shared by 2 processes: give a multiple of 2" in odd.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """Without BatchNorm's differences, the mean of the processes' gradients is the gradient of the whole batch."""
    script = tmp_path / "same.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "from config import recipe\nfrom learner import Learner\nfrom machines import machine\n"
        "with machine('cpu') as here:\n"
        "    torch.manual_seed(0)\n"
        "    learner = Learner(recipe('toy', width=2, after='layer3', optimizer='sgd'), ('a', 'b'), 2, here)\n"
        "    x, y = torch.randn(8, 3, 48, 48), torch.arange(8) % 2\n"
        "    learner.model.eval(); learner.model.train = lambda mode=True: learner.model\n"
        "    import cropvote; cropvote.settings(learner.model).eval_output = 'views'\n"
        "    rows = here.mine(torch.arange(8))\n"
        "    learner.learn(x[rows], y[rows])\n"
        "    if here.first: torch.save(learner.model.state_dict(), sys.argv[1])\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path / "one.pt"], check=True, env=env)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, tmp_path / "two.pt"], check=True, env=env)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


@pytest.mark.slow
def test_compiled(tmp_path):
    """--fast on the CPU: bfloat16, channels_last and torch.compile."""
    result = run(*SMALL, "--fast", "--out", tmp_path / "run")
    assert result["config"]["fast"]


@pytest.mark.slow
@pytest.mark.skipif(not FER2013.exists(), reason=f"FER2013 is not at {FER2013}")
def test_real_fer2013(tmp_path):
    """A short run on the csv made from the sheets finishes, and scores PublicTest."""
    path = tmp_path / "fer2013.csv"
    subprocess.run([sys.executable, FER2013 / "unpack.py", "csv", path], check=True)
    options = (
        "--recipe",
        "toy",
        "--data",
        path,
        "--cache",
        tmp_path / "cache",
        "--limit",
        512,
        "--width",
        4,
        "--epochs",
        1,
    )
    result = run(*options, "--out", tmp_path / "run")
    assert result["split"] == "PublicTest"


def test_the_readmes_table_is_that_of_the_stored_figures():
    script = ROOT / "benchmarks" / "toy.py"
    printed = subprocess.run([sys.executable, script, "table"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() in (ROOT / "README.md").read_text()


def test_config_is_checked_wherever_it_comes_from():
    with pytest.raises(ValueError, match=r"--target smile: it is one of expression, valence-arousal"):
        Config(target="smile")
    with pytest.raises(ValueError, match="--label-smoothing is for"):
        Config(target="valence-arousal", label_smoothing=0.1)
    with pytest.raises(ValueError, match="--mixup and --cutmix are for"):
        Config(target="valence-arousal", cutmix=1.0)
