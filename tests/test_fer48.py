"""The flagship example: its network, its data, a short training run from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from cropvote import inject_crop_vote, vote

from data import DataError, augment, load, to_input
from model import fer_resnet18
from toy import CLASSES, toy_faces

ROOT = Path(__file__).parent.parent
FER2013 = ROOT.parent / "shared" / "data" / "fer2013"


def write_csv(path: Path, rows_per_split: int = 14) -> Path:
    """A small file in the layout of fer2013.csv."""
    rng = np.random.default_rng(0)
    lines = ["emotion,pixels,Usage"]
    for usage in ("Training", "PublicTest", "PrivateTest"):
        faces = rng.integers(0, 256, (rows_per_split, 2304))
        lines += [f"{i % 7},{' '.join(map(str, face))},{usage}" for i, face in enumerate(faces)]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples/fer48/train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
    reference.conv1, reference.maxpool = network.conv1, torch.nn.Identity()
    reference.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 48, 48)
    assert torch.allclose(network(x), reference(x), atol=1e-5)


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


def test_toy_splits_share_no_face():
    splits = load("toy", None, seed=0).splits
    faces = [{image.numpy().tobytes() for image in split.images} for split in splits.values()]
    assert [len(s) for s in splits.values()] == [2800, 700, 700] == [len(f) for f in faces]
    assert len(set.union(*faces)) == 4200


def test_fer2013_is_read_as_it_stands(tmp_path):
    path = write_csv(tmp_path / "fer2013.csv")
    faces = load(str(path), None, seed=0)
    assert {name: split.name for name, split in faces.splits.items()} == {
        "train": "Training",
        "val": "PublicTest",
        "test": "PrivateTest",
    }
    line = path.read_text().splitlines()[15]  # the first PublicTest row
    label, pixels, _ = line.split(",")
    assert faces.splits["val"].labels[0] == int(label)
    assert faces.splits["val"].images[0].flatten().tolist() == [int(p) for p in pixels.split()]
    assert len(load(str(path), 5, seed=0).splits["test"]) == 5


def test_headers_with_leading_spaces_are_read(tmp_path):
    path = write_csv(tmp_path / "icml_face_data.csv")
    path.write_text(path.read_text().replace("emotion,pixels,Usage", "emotion, Usage, pixels", 1))
    rows = path.read_text().splitlines()
    swapped = [rows[0]] + [",".join([r.split(",")[0], r.split(",")[2], r.split(",")[1]]) for r in rows[1:]]
    path.write_text("\n".join(swapped))
    assert len(load(str(path), None, seed=0).splits["train"]) == 14


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-50], r"row 43 has no Usage that FER2013 knows; is it truncated"),
        (lambda text: text.replace(" 1", ",", 1), r"cannot be read as a csv|row \d+ "),
        (lambda text: text.replace("emotion", "label", 1), r"no column \['emotion'\]"),
        (lambda text: "\n".join(text.split("\n")[:29]), r"no row with Usage PrivateTest"),
        (lambda text: text.replace("\n3,", "\n9,"), r"an emotion outside 0\.\.6"),
        (lambda text: "", r"cannot be read as a csv"),
        (lambda text: text.replace(" ", " x", 1), r"row 2 "),
    ],
    ids=["truncated", "comma", "column", "split", "label", "empty", "letters"],
)
def test_damaged_csv(tmp_path, damage, message):
    path = write_csv(tmp_path / "fer2013.csv")
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        load(str(path), None, seed=0)


def test_augmentation_keeps_the_range_and_differs_per_face():
    images = torch.from_numpy(toy_faces(1, seed=0)[0]).expand(8, -1, -1)
    out = augment(images)
    assert out.shape == (8, 3, 48, 48)
    assert torch.equal(out[:, 0], out[:, 2])
    assert out.abs().max() < 1.5
    assert len({face.numpy().tobytes() for face in out}) == 8
    assert to_input(images).min() >= -1
    assert to_input(images).max() <= 1


def test_a_short_run_writes_what_it_says(tmp_path):
    """And the accuracy in result.json is that of the stored weights, computed here anew."""
    out = tmp_path / "run"
    done = train("--after", "layer3", "--width", 4, "--epochs", 2, "--batch", 16, "--limit", 64, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["split"] == result["chosen_on"] == "val"
    assert (out / "confusion_matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert result["gmacs"] > 0

    model = fer_resnet18(width=4)
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    inject_crop_vote(model.eval(), after="layer3", eval_output="views", input_size=48)
    val = load("toy", 64, seed=0).splits["val"]
    with torch.no_grad():
        rows = model(to_input(val.images))
    for how in ("soft", "hard"):
        predicted = vote(rows, 10, how).argmax(1)
        score = result["votes"][how]
        assert score["accuracy"] == pytest.approx((predicted == val.labels).double().mean().item(), abs=1 / 64 + 1e-6)
        assert set(score["per_class"]) == set(CLASSES)
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in result["confusion_matrix"])


def test_private_test_is_scored_only_when_asked(tmp_path):
    data = write_csv(tmp_path / "fer2013.csv")
    common = ("--data", data, "--after", "none", "--width", 4, "--epochs", 1, "--batch", 7, "--out", tmp_path / "run")
    for flag, split in (((), "PublicTest"), (("--final-test",), "PrivateTest")):
        done = train(*common, *flag)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (result["split"], result["chosen_on"]) == (split, "PublicTest")
        assert result["config"]["final_test"] == bool(flag)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.csv"), "train.py: --data nowhere.csv: cannot be read as a csv"),
        (("--limit", 8), "8 training faces are less than one batch of 64"),
        (("--width", 0), "'0' is no whole number above 0"),
        (("--after", "layer9"), "invalid choice: 'layer9'"),
    ],
)
def test_misuse_is_one_line(arguments, message):
    done = train(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_cuda_is_one_line():
    done = train("--device", "cuda")
    assert done.returncode != 0
    assert "PyTorch sees no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not FER2013.exists(), reason=f"FER2013 is not at {FER2013}")
def test_real_fer2013(tmp_path):
    """The csv made from the sheets has the published counts, and a short run on it finishes."""
    path = tmp_path / "fer2013.csv"
    subprocess.run([sys.executable, FER2013 / "unpack.py", "csv", path], check=True)
    splits = load(str(path), None, seed=0).splits
    assert [len(split) for split in splits.values()] == [28_709, 3_589, 3_589]
    assert torch.bincount(splits["train"].labels).tolist() == [3995, 436, 4097, 7215, 4830, 3171, 4965]
    done = train("--data", path, "--limit", 512, "--width", 4, "--epochs", 1, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["split"] == "PublicTest"


def test_the_readmes_table_is_that_of_the_stored_figures():
    script = ROOT / "benchmarks" / "toy.py"
    printed = subprocess.run([sys.executable, script, "table"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() in (ROOT / "README.md").read_text()
