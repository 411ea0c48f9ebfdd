"""Runs of the example: their files, resuming, and errors; in one process and in several."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

import cropvote
import train as training
from batches import to_input
from config import Config, recipe
from cropvote import vote
from data import load
from data.toy import CLASSES
from keeping import KeptError, load_model, save_model, start_from, write_whole
from learner import Learner, read
from machines import machine
from model import fer_resnet18
from results import costs
from runs import EXAMPLE, FER2013, HERE, SMALL, refused, run
from scripts import call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fer48") / "run"
    run(*SMALL, "--out", out)
    return out


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
    """Recompute them from model.safetensors, with the library's functions and scikit-learn."""
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
    """Resuming a finished run adds the test figures without training; they are never removed."""
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


@pytest.mark.slow
def test_a_plain_network(tmp_path):
    result = run(*SMALL, "--after", "none", "--out", tmp_path / "run")
    assert list(result["votes"]) == ["soft"]
    assert np.load(tmp_path / "run" / "logits.npz")["logits"].shape == (64, 1, 7)
    model, _ = load_model(tmp_path / "run")
    assert type(model).__name__ == "FerResNet18"
    assert not hasattr(model, "_cropvote")


@pytest.mark.slow
def test_a_plan_over_two_sites(tmp_path):
    """Mirroring after layer1 and cropping after layer3 is stored, loaded and read like any other run."""
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


@pytest.mark.slow
def test_retraining_uses_both_splits_for_the_best_number_of_epochs(tmp_path):
    out = tmp_path / "run"
    training.main([str(a) for a in (*SMALL, "--retrain", "--final-test", "--out", out)])
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (out, out / "retrained"))
    assert first["split"] == "val"
    assert second["split"] == "test"
    assert second["data"]["faces"] == {"train": 128, "test": 64}
    assert len(second["curve"]) == first["epochs"]["best_epoch"]
    assert second["epochs"] is None


@pytest.mark.slow
def test_training_on_all_faces_without_scoring(tmp_path, capsys):
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


def test_an_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
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
def test_another_run_is_not_resumed(finished, capsys, options, message):
    assert message in refused(capsys, *SMALL, *options, "--out", finished, "--resume")


@pytest.mark.slow
def test_other_classes_or_faces_are_refused(finished, tmp_path, capsys):
    """The stored run has the same options, but other classes, faces or processes."""
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


@pytest.mark.slow
def test_a_nan_loss_ends_the_run_and_keeps_the_last_good_state(finished, tmp_path, capsys, monkeypatch):
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


def test_weights_of_another_set_are_matched_by_class_name(tmp_path):
    """AffectNet's weights are reordered for RAF-DB; an unknown class or another width is an error."""
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


@pytest.mark.slow
def test_fast_and_averaged_weights(tmp_path):
    """bfloat16, channels_last and averaging change little; the averaged weights are saved."""
    averaged = run(*SMALL, "--ema", 0.5, "--precision", "bfloat16", "--out", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    kept = state["best"]["fc.weight"]
    assert averaged["epochs"]["best_epoch"] in (1, 2)
    if averaged["epochs"]["best_epoch"] == 2:
        assert torch.equal(kept, state["learner"]["averaged"]["module.fc.weight"])
    assert not torch.equal(kept, state["learner"]["model"]["fc.weight"])


# --- slow: other processes -------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLE / "train.py"), *map(str, arguments)]


@pytest.mark.slow
def test_killed_and_resumed_reaches_the_same_numbers(tmp_path):
    """After SIGKILL in the middle of an epoch, losses, scores and weights equal an uninterrupted run's, bit for bit."""
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
    """With torchrun and gloo, every face is scored exactly once, and steps and epochs continue after a resume."""
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


#: In a function, because a learner that outlives its process group leaves gloo threads that crash the exit.
LEARN_ONCE = f"""
import sys
import torch
sys.path.insert(0, {str(EXAMPLE)!r})
import cropvote
from config import recipe
from learner import Learner
from machines import machine

def learn(here):
    torch.manual_seed(0)
    learner = Learner(recipe("toy", width=2, after="layer3", optimizer="sgd"), ("a", "b"), 2, here)
    x, y = torch.randn(8, 3, 48, 48), torch.arange(8) % 2
    learner.model.eval()
    learner.model.train = lambda mode=True: learner.model
    cropvote.settings(learner.model).eval_output = "views"
    rows = here.mine(torch.arange(8))
    learner.learn(x[rows], y[rows])
    if here.first:
        torch.save(learner.model.state_dict(), sys.argv[1])

with machine("cpu") as here:
    learn(here)
"""


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    """With BatchNorm frozen, the mean of the processes' gradients is the gradient of the full batch."""
    script = tmp_path / "same.py"
    script.write_text(LEARN_ONCE)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path / "one.pt"], check=True, env=env)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, tmp_path / "two.pt"], check=True, env=env)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


@pytest.mark.slow
def test_compiled(tmp_path):
    """Run --fast on the CPU: bfloat16, channels_last and torch.compile."""
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


def test_training_through_a_few_views(tmp_path, capsys):
    """Two of the ten views of each face in a training step, all ten in the vote."""
    learner = Learner(recipe("toy", train_views=2, width=4, epochs=1), CLASSES, 1, HERE)
    faces = torch.randn(3, 3, 48, 48)
    assert learner.model.train()(faces).shape == (6, 7)
    assert learner.model.eval()(faces).shape == (3, 7)
    learner.model.train()
    assert learner.learn(faces, torch.arange(3)).isfinite()
    with pytest.raises(SystemExit):
        call(training, *SMALL, "--after", "none", "--train-views", 2, "--out", tmp_path / "no")
    assert "plain one" in capsys.readouterr().err
