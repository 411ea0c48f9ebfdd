"""compare.py and robustness.py, other targets, and the help of every script."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import app
import check_data
import compare
import demo
import export
import predict
import predict_onnx
import robustness
import train as training
from batches import to_input
from data import load, toy
from data.toy import CLASSES, toy_faces
from keeping import load_model
from scripts import EXAMPLE, SMALL, call, logits, refused

# --- compare.py ------------------------------------------------------------------------------------------------------


def test_the_plain_network_of_a_comparison_has_no_views_to_draw(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(compare, "train", lambda config, here, resume: trained.append(config) or {})
    monkeypatch.setattr(compare, "compare", lambda runs, config, here: [])
    monkeypatch.setattr(compare, "write", lambda *_: None)
    call(compare, *SMALL, "--sites", "none", "layer1", "--seeds", 0, "--train-views", 2, "--out", tmp_path)
    assert [(config.after, config.train_views) for config in trained] == [("none", None), ("layer1", 2)]


@pytest.mark.slow
def test_the_comparison_holds_the_runs_figures(compared):
    """Recompute accuracy, cost and McNemar's counts from each run's files."""
    stored = json.loads((compared / "compare.json").read_text())
    rows = {(row["site"], row["vote"]): row for row in stored["rows"]}
    assert set(rows) == {("none", "soft"), ("layer3", "soft"), ("layer3", "hard"), (compare.MIRRORED, "soft")}
    for seed in (0, 1):
        (plain, labels), (views, _) = logits(compared / f"none-{seed}"), logits(compared / f"layer3-{seed}")
        ours, theirs = views.mean(1).argmax(1) == labels, plain[:, 0].argmax(1) == labels
        assert rows["layer3", "soft"]["accuracy"][seed] == pytest.approx(float(ours.double().mean()))
        assert rows["none", "soft"]["accuracy"][seed] == pytest.approx(float(theirs.double().mean()))
        test = rows["layer3", "soft"]["mcnemar"][seed]
        assert (test["won"], test["lost"]) == (int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))
        counts = torch.stack([(views.argmax(2) == k).sum(1) for k in range(7)], 1)
        winners = counts == counts.max(1, keepdim=True).values
        probability = torch.where(winners, views.softmax(2).mean(1), -1.0)  # ties go to the likelier class
        hard = (probability.argmax(1) == labels).double().mean()
        assert rows["layer3", "hard"]["accuracy"][seed] == pytest.approx(float(hard))
    result = json.loads((compared / "layer3-0" / "result.json").read_text())
    for key in ("gmacs", "train_mib", "parameters"):
        assert rows["layer3", "hard"][key] == result[key]
    assert rows[compare.MIRRORED, "soft"]["gmacs"] == pytest.approx(2 * rows["none", "soft"]["gmacs"])
    assert rows["none", "soft"]["parameters"] == rows["layer3", "soft"]["parameters"]


@pytest.mark.slow
def test_the_mirror_row_is_the_plain_network_on_both_images(compared):
    stored = json.loads((compared / "compare.json").read_text())
    row = next(row for row in stored["rows"] if row["site"] == compare.MIRRORED)
    for seed in (0, 1):
        model, _ = load_model(compared / f"none-{seed}")
        val = load("toy", seed=seed, limit=64).splits["val"]
        x = to_input(val.images)
        with torch.no_grad():
            both = model(x) + model(x.flip(-1))
        assert row["accuracy"][seed] == pytest.approx(float((both.argmax(1) == val.labels).double().mean()))


@pytest.mark.parametrize(("won", "lost"), [(10, 2), (3, 3), (0, 5), (0, 0)])
def test_mcnemar_is_a_binomial_test(won, lost):
    """The two-sided p is twice the tail of the binomial distribution."""
    labels = torch.zeros(won + lost + 4, dtype=torch.long)
    ours, plain = labels.clone(), labels.clone()
    plain[:won], ours[won : won + lost] = 1, 1
    found = compare.mcnemar(ours, plain, labels)
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    assert found == {"won": won, "lost": lost, "p": pytest.approx(min(1.0, 2 * tail))}


@pytest.mark.slow
def test_complete_runs_are_not_repeated_and_others_go_on(compared, monkeypatch, capsys):
    genuine, asked = compare.train, []

    def counted(config, here, resume):
        asked.append(Path(config.out).name)
        return genuine(config, here, resume)

    monkeypatch.setattr(compare, "train", counted)
    options = (*SMALL, "--sites", "none", "layer3", "--seeds", 0, 1, "--out", compared)
    before = (compared / "compare.json").read_text()
    call(compare, *options)
    assert asked == []
    (compared / "layer3-1" / "result.json").unlink()
    call(compare, *options)
    assert asked == ["layer3-1"]
    assert "Going on after epoch 1" in capsys.readouterr().out
    assert (compared / "compare.json").read_text() == before
    assert "was started with epochs 1, now 2: name another --out" in refused(compare, *options, "--epochs", 2)


@pytest.mark.slow
def test_other_data_are_not_compared_with_the_stored_runs(compared, monkeypatch, tmp_path):
    """The same options with other faces give an error, not the old figures."""
    import shutil

    import data

    out = tmp_path / "compare"
    shutil.copytree(compared, out)
    drawn = data.toy_faces
    monkeypatch.setattr(data, "toy_faces", lambda size, seed: drawn(size, seed + 1000))
    options = (*SMALL, "--sites", "none", "layer3", "--seeds", 0, 1, "--out", out)
    assert "the faces, their labels or their split have changed" in refused(compare, *options)
    assert "have changed since it was trained" in refused(robustness, out / "none-0", "--device", "cpu")


def test_comparing_unscored_runs_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        call(compare, *SMALL, "--learn", "train+val")
    assert caught.value.code == 2
    assert "--final-test compares on the test faces" in capsys.readouterr().err


@pytest.mark.slow
def test_the_comparison_on_two_processes(tmp_path):
    """Every process waits for the first one's files."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = map(str, (*SMALL, "--sites", "none", "layer3", "--seeds", 0, "--out", tmp_path / "out"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, str(EXAMPLE / "compare.py"), *options], check=True, env=env)
    assert (tmp_path / "out" / "compare.md").read_text().count("| ten views after layer3 |") == 2


@pytest.mark.slow
def test_the_comparison_as_text(compared):
    text = (compared / "compare.md").read_text()
    assert text.startswith("| network | vote | accuracy, % |")
    for words in (
        "| plain |",
        "| ten views after layer3 | soft |",
        "toy val, 64 faces",
        "seeds 0, 1, mean ± sd",
        "(95 %: ",
    ):
        assert words in text
    assert "chosen on these same faces" in text
    assert (compared / "compare.png").read_bytes()[:4] == b"\x89PNG"


# --- robustness.py ---------------------------------------------------------------------------------------------------


def test_shifts_repeat_the_edge():
    images = torch.from_numpy(toy_faces(2, seed=0)[0]).unsqueeze(1)
    assert torch.equal(robustness.shifted(images, 0)[0], images)
    right, left, down, up = robustness.shifted(images, 3)
    for y in range(48):
        for x in range(48):
            assert right[0, 0, y, x] == images[0, 0, y, max(x - 3, 0)]
            assert left[0, 0, y, x] == images[0, 0, y, min(x + 3, 47)]
            assert down[1, 0, y, x] == images[1, 0, max(y - 3, 0), x]
            assert up[1, 0, y, x] == images[1, 0, min(y + 3, 47), x]


@pytest.mark.parametrize("side", [0, 8, 48])
def test_a_whole_square_is_covered_at_the_same_place_for_every_network(side):
    images = torch.zeros(20, 3, 48, 48, dtype=torch.uint8)
    (covered,) = robustness.erased(images, side)
    hit = covered == 128
    assert (hit.sum((1, 2, 3)) == 3 * side * side).all()
    assert torch.equal(hit[:, 0].any(2).sum(1), torch.full((20,), side))
    assert torch.equal(covered, robustness.erased(images, side)[0])
    assert side in (0, 48) or len({place.numpy().tobytes() for place in hit}) > 10


def test_coarse_faces_are_pillows():
    """Compare with shrinking by Pillow, which averages, and enlarging by torchvision."""
    images = torch.from_numpy(toy_faces(3, seed=0)[0]).unsqueeze(1)
    (found,) = robustness.coarse(images, 24)
    for face, mine in zip(images, found, strict=True):
        small = Image.fromarray(face[0].numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        large = tv.resize(tv.pil_to_tensor(small).float(), [48, 48], antialias=False)
        assert (mine.float() - large).abs().max() <= 2
    assert torch.equal(robustness.coarse(images, 48)[0], images)


@pytest.mark.slow
def test_robustness_of_finished_runs(compared, tmp_path):
    runs = [compared / f"{site}-{seed}" for site in ("none", "layer3") for seed in (0, 1)]
    call(robustness, *runs, "--device", "cpu", "--out", tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert [row["site"] for row in stored["rows"]] == ["none", "none", "layer3", "layer3"]
    for run, row in zip(runs, stored["rows"], strict=True):
        accuracy = json.loads((run / "result.json").read_text())["votes"]["soft"]["accuracy"]
        for harm, amount in (("shift", "0"), ("erase", "0"), ("resolution", "48")):
            assert row["accuracy"][harm][amount] == pytest.approx(accuracy)
        model, _ = load_model(run)
        val = load("toy", seed=int(run.name[-1]), limit=64).splits["val"]
        for harm, amount, makes in (("shift", 6, robustness.shifted), ("erase", 24, robustness.erased)):
            with torch.no_grad():
                right = [model(to_input(images)).argmax(1) == val.labels for images in makes(val.images, amount)]
            assert row["accuracy"][harm][str(amount)] == pytest.approx(float(torch.stack(right).double().mean()))
    text = (tmp_path / "out" / "robustness.md").read_text()
    assert text.count("| plain |") == text.count("| ten views after layer3, soft |") == 3
    assert (tmp_path / "out" / "robustness.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_robustness_refuses_networks_with_other_training(compared, tmp_path):
    call(training, *SMALL, "--after", "none", "--width", 2, "--out", tmp_path / "narrow")
    said = refused(robustness, compared / "none-0", tmp_path / "narrow", "--device", "cpu", "--out", tmp_path / "out")
    other = refused(
        robustness, compared / "none-0", compared / "layer3-1", "--device", "cpu", "--out", tmp_path / "out"
    )
    assert "trained or scored on different faces" in other
    call(training, *SMALL, "--after", "none", "--learn", "train+val", "--out", tmp_path / "all")
    assert "--final-test scores the test faces" in refused(robustness, tmp_path / "all", "--device", "cpu")
    assert "differ in more than after, vote, seed: width 4, now 2" in said


# --- valence and arousal; transfer between data sets -----------------------------------------------------------------


def release(root: Path, faces: int = 40) -> Path:
    """Write AffectNet's later layout with toy faces; valence is high for happy faces."""
    for part, seed in (("train_set", 0), ("val_set", 1)):
        (root / part / "annotations").mkdir(parents=True)
        (root / part / "images").mkdir()
        for number, (face, label) in enumerate(zip(*toy_faces(faces, seed), strict=True)):
            Image.fromarray(face).convert("RGB").resize((96, 96)).save(root / part / "images" / f"{number}.png")
            name = CLASSES[label]
            place = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "angry").index(name)
            said = {"exp": str(place), "val": "0.8" if name == "happy" else "-0.3", "aro": 0.1 * place - 0.3}
            for kind, value in said.items():
                np.save(root / part / "annotations" / f"{number}_{kind}.npy", np.array(value))
    return root


@pytest.fixture(scope="module")
def affectnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("affectnet"))


def options(data: Path, recipe: str) -> tuple[object, ...]:
    """Return the options of the paper's recipe at a small size."""
    small = ("--width", 4, "--epochs", 1, "--batch", 8, "--validation", 1, "--device", "cpu")
    return ("--recipe", recipe, "--data", data, "--cache", data.parent / "cache", *small)


@pytest.mark.slow
def test_valence_and_arousal(affectnet, tmp_path, capsys):
    out, target = tmp_path / "run", ("--target", "valence-arousal", "--after", "layer3")
    call(training, *options(affectnet, "affectnet"), *target, "--final-test", "--out", out)
    result = json.loads((out / "result.json").read_text())
    assert result["outputs"] == ["valence", "arousal"]
    assert set(result["votes"]) == {"mean"}
    assert result["data"]["names"]["test"] == result["split"] == "val_set"
    rows, _ = logits(out)
    assert rows.shape == (40, 10, 2)
    test = load(str(affectnet), cache=affectnet.parent / "cache", validation=1).splits["test"]
    said, mood = rows.mean(1)[:, 0].double().numpy(), test.mood[:, 0].double().numpy()
    lin = 2 * np.cov(said, mood)[0, 1] / (said.var(ddof=1) + mood.var(ddof=1) + (said.mean() - mood.mean()) ** 2)
    assert result["votes"]["mean"]["concordance_each"]["valence"] == pytest.approx(lin, abs=1e-3)
    assert "concordance valence" in capsys.readouterr().out
    face = next((affectnet / "val_set" / "images").iterdir())
    call(predict, "--model", out, face, "--device", "cpu")
    assert "valence " in capsys.readouterr().out
    assert "counts right classes" in refused(robustness, out, "--device", "cpu", "--out", tmp_path / "robustness")


@pytest.mark.slow
def test_from_affectnet_to_rafdb(affectnet, tmp_path, capsys):
    """As in the paper, with one command each: AffectNet's weights are matched to RAF-DB's classes by name."""
    call(training, *options(affectnet, "affectnet"), "--after", "layer3", "--out", tmp_path / "affectnet")
    out = capsys.readouterr().out
    assert "AffectNet (train_set and val_set with annotations)" in out
    order = ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral")
    for part, seed in (("train", 2), ("test", 3)):
        for number, (face, label) in enumerate(zip(*toy_faces(28, seed), strict=True)):
            folder = tmp_path / "set" / part / str(order.index(CLASSES[label]) + 1)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(face).convert("RGB").save(folder / f"{number}.jpg")
    init = ("--init", tmp_path / "affectnet", "--after", "layer3", "--final-test")
    call(training, *options(tmp_path / "set", "rafdb"), *init, "--out", tmp_path / "rafdb")
    result = json.loads((tmp_path / "rafdb" / "result.json").read_text())
    assert tuple(result["outputs"]) == order
    assert result["config"]["decay"] == 0.95


# --- user interface --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call(training, *SMALL, "--epochs", 2, "--after", "none", "--out", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    curve = json.loads((tmp_path / "run" / "result.json").read_text())["curve"]
    for name in ("loss", "score", "rate"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in curve])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    call(training, *SMALL, "--after", "none", "--out", tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_every_script_has_help_with_an_example(capsys):
    for script in (app, compare, robustness, predict, predict_onnx, export, check_data, training):
        with pytest.raises(SystemExit) as caught:
            call(script, "--help")
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert Path(script.__file__).name in said
        assert said.startswith("usage: ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's imports
def test_the_readmes_commands_are_commands():
    """Every command in the README is accepted by its script and uses only existing options."""
    scripts = {"train": training, "compare": compare, "robustness": robustness, "predict": predict, "export": export}
    scripts |= {"check_data": check_data, "demo": demo, "toy": toy, "app": app}
    if importlib.util.find_spec("ray"):
        scripts |= {name: importlib.import_module(name) for name in ("serve", "predict_many")}
    text = (EXAMPLE / "README.md").read_text()
    lines = [line.partition("#")[0].split() for line in text.splitlines() if "examples/fer48/" in line]
    commands = [line for line in lines if line[:1] in (["python"], ["torchrun"])]
    assert len(commands) > 10
    for command in commands:
        place = next(i for i, word in enumerate(command) if word.endswith(".py"))
        name = Path(command[place]).stem
        if name in scripts or importlib.util.find_spec("ray"):
            scripts[name].parse(command[place + 1 :])
