"""The example's network, its recipes, and the figures it computes from logits."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

from config import RECIPES, Config, add_options, from_options, recipe
from cropvote import inject_crop_vote
from data.toy import CLASSES, toy_faces
from learner import Learner, read
from model import fer_resnet18
from runs import HERE, ROOT, refused
from scoring import interval, score, with_interval

# --- the network -----------------------------------------------------------------------------------------------------


def test_the_network_is_the_papers():
    """11,172,423 parameters, named as in torchvision except for the stem."""
    network, reference = fer_resnet18(), resnet18(num_classes=7)
    assert sum(p.numel() for p in network.parameters()) == 11_172_423
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (network, reference))
    assert shapes.pop("conv1.weight") == (64, 3, 3, 3)
    assert expected.pop("conv1.weight") == (64, 3, 7, 7)
    assert shapes == expected
    assert network.eval()(torch.zeros(2, 3, 48, 48)).shape == (2, 7)


def test_the_network_equals_torchvisions_after_the_stem():
    network, reference = fer_resnet18().eval(), resnet18(num_classes=7).eval()
    reference.conv1, reference.maxpool = network.conv1, nn.Identity()
    reference.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 48, 48)
    assert torch.allclose(network(x), reference(x), atol=1e-5)


def test_timm_creates_the_network_and_votes_without_a_stated_size():
    network = timm.create_model("fer_resnet18", num_classes=3, in_chans=1, width=8)
    assert network(torch.zeros(2, 1, 48, 48)).shape == (2, 3)
    assert network.get_classifier() is network.fc
    network.reset_classifier(5)
    assert inject_crop_vote(network.eval(), after="layer2")(torch.zeros(2, 1, 48, 48)).shape == (2, 5)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_missing_cuda_is_one_line(capsys):
    assert "PyTorch sees no CUDA device" in refused(capsys, "--device", "cuda")


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
    """Compare with the formula (Wilson 1927), for 30 of 100."""
    z, n, p = 1.959964, 100, 0.3
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    assert interval(30, 100) == pytest.approx(((middle - half) / scale, (middle + half) / scale), abs=1e-6)


def test_concordance_is_lins():
    """Compare with the formula (Lin 1989); views are averaged first."""
    torch.manual_seed(0)
    logits, mood = torch.randn(50, 4, 2), torch.rand(50, 2) * 2 - 1
    found = score(logits, mood, ("valence", "arousal"))["mean"]
    for i, name in enumerate(("valence", "arousal")):
        x, y = logits[..., i].mean(1).double(), mood[:, i].double()
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        lin = 2 * covariance / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()) ** 2)
        assert found["concordance_each"][name] == pytest.approx(float(lin), abs=1e-2)  # torchmetrics divides by n - 1
        assert found["rmse_each"][name] == pytest.approx(float(((x - y) ** 2).mean() ** 0.5), abs=1e-5)


def test_concordance_of_constant_predictions_is_0():
    """Lin's covariance is 0 there; torchmetrics gives NaN, which cannot be stored in JSON or compared."""
    mood = torch.rand(20, 2)
    constant = torch.full((20, 1, 2), 0.3)
    for logits, aims in ((constant, mood), (torch.randn(20, 1, 2), constant[:, 0]), (constant, constant[:, 0])):
        assert score(logits, aims, ("valence", "arousal"))["mean"]["concordance"] == 0


def test_the_interval_as_text():
    assert with_interval(1.0, 8) == "100.0 % (95 %: 67.6–100.0)"
    assert with_interval(0.3, 100) == "30.0 % (95 %: 21.9–39.6)"


def test_reading_does_not_depend_on_the_batch():
    """A face's rows do not depend on its batch."""
    model = inject_crop_vote(fer_resnet18(width=4), after="layer2", input_size=48).eval()
    images = torch.from_numpy(toy_faces(10, seed=0)[0]).unsqueeze(1)
    whole, parts = read(model, images, HERE, True), read(model, images, HERE, True, batch=3)
    assert whole.shape == (10, 10, 7)
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_faces_and_labels_are_mixed_in_the_same_shares(options):
    """With one colour per class, a colour's share of a mixed face is its class's share; every step differs."""
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
    kinds = {one for one, _ in seen if one}  # a pasted face has two colours, a mixed one a blend of them
    assert kinds == ({1, 2} if len(options) == 2 else {1} if "mixup" in options else {1, 2} & kinds | {2})
    assert Learner(Config(after="none", width=4), CLASSES, 1, HERE).mix is None


def test_the_loss_of_mixed_faces_uses_mixed_labels():
    """Compare a voting network's loss, every view against the mixed labels, with the formula."""
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


def test_the_readmes_table_matches_the_stored_figures():
    script = ROOT / "benchmarks" / "toy.py"
    printed = subprocess.run([sys.executable, script, "table"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() in (ROOT / "examples" / "fer48" / "README.md").read_text()


def test_config_is_checked_wherever_it_comes_from():
    with pytest.raises(ValueError, match=r"--target smile: it is one of expression, valence-arousal"):
        Config(target="smile")
    with pytest.raises(ValueError, match="--label-smoothing is for"):
        Config(target="valence-arousal", label_smoothing=0.1)
    with pytest.raises(ValueError, match="--mixup and --cutmix are for"):
        Config(target="valence-arousal", cutmix=1.0)
