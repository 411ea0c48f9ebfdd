"""predict.py and export.py."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

import export
import predict
from batches import to_input
from data.toy import CLASSES, toy_faces
from keeping import load_model
from scripts import call, refused

# --- predict.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write eight toy faces as grey PNGs, in a folder and a subfolder."""
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    for number, face in enumerate(toy_faces(8, seed=9)[0]):
        Image.fromarray(face).save(folder / ("more" if number > 5 else "") / f"{number}.png")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("site", ["none", "layer3"])
@pytest.mark.slow
def test_a_folder_as_a_csv(compared, pictures, tmp_path, site):
    """Compare with the model's outputs for the same pixels, computed directly."""
    call(predict, "--model", compared / f"{site}-0", pictures, "--csv", tmp_path / "out.csv", "--device", "cpu")
    rows = table(tmp_path / "out.csv")
    assert [Path(row["image"]).name for row in rows] == [f"{k}.png" for k in range(8)]
    model, _ = load_model(compared / f"{site}-0")
    with torch.no_grad():
        expected = model(to_input(torch.from_numpy(toy_faces(8, seed=9)[0]).unsqueeze(1))).softmax(1)
    for row, shares in zip(rows, expected, strict=True):
        assert [float(row[name]) for name in CLASSES] == pytest.approx(shares.tolist(), abs=2e-4)
        assert row["class"] == CLASSES[int(shares.argmax())]
        assert float(row["probability"]) == pytest.approx(float(shares.max()), abs=2e-4)
        assert round(10 * float(row["agreement"]), 6) in range(1, 11)
        assert row["problem"] == ""


@pytest.mark.slow
def test_a_damaged_picture_is_named_and_the_others_are_read(compared, pictures, tmp_path, capsys):
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:200])
    options = ("--model", compared / "layer3-0", pictures, pictures / "none.jpg", "--device", "cpu")
    assert "2 of 9 without a prediction" in refused(predict, *options, "--csv", tmp_path / "out.csv")
    problems = {Path(row["image"]).name: row["problem"] for row in table(tmp_path / "out.csv") if row["problem"]}
    assert set(problems) == {"3.png", "none.jpg"}
    assert problems["none.jpg"] == "no such file"
    assert "3.png: " in capsys.readouterr().err
    assert sum(bool(row["class"]) for row in table(tmp_path / "out.csv")) == 7


@pytest.mark.slow
def test_lines_and_pictures_of_the_views(compared, pictures, tmp_path, capsys):
    call(
        predict, "--model", compared / "layer3-0", pictures / "0.png", "--views", tmp_path / "views", "--device", "cpu"
    )
    said = capsys.readouterr().out
    assert "0.png: " in said
    assert "of 10 views agree" in said
    (picture,) = (tmp_path / "views").iterdir()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    plain = ("--model", compared / "none-0", pictures / "0.png", "--device", "cpu")
    assert "does not vote" in refused(predict, *plain, "--views", tmp_path / "views")


def test_agreement_is_with_the_vote():
    """Six views choose a, four choose b with more confidence: the vote is b, and four views agree."""
    logits = torch.tensor([[[1.0, 0.0]] * 6 + [[0.0, 9.0]] * 4])
    card = {"outputs": ["a", "b"], "vote": "soft", "target": "expression"}
    (row,) = predict.read_rows(logits, card)
    assert (row["class"], row["agreement"]) == ("b", 0.4)


@pytest.mark.slow
def test_names_that_are_not_valid_text(compared, pictures, tmp_path, capsys):
    (pictures / "0.png").rename(os.fsdecode(os.fsencode(pictures) + b"/\xff.png"))
    (pictures / "._1.png").write_bytes(b"left by another system")
    call(predict, "--model", compared / "layer3-0", pictures, "--csv", tmp_path / "out.csv", "--device", "cpu")
    assert b"\xff.png" in (tmp_path / "out.csv").read_bytes()
    call(predict, "--model", compared / "layer3-0", pictures, "--device", "cpu")
    assert len(capsys.readouterr().out.splitlines()) == 8


@pytest.mark.slow
def test_faces_are_detected(compared, tmp_path, capsys):
    """The astronaut's face (NASA, public domain) is found; a wall has none."""
    pytest.importorskip("cv2")
    Image.fromarray(astronaut()).save(tmp_path / "astronaut.png")
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "wall.png")
    options = ("--model", compared / "layer3-0", "--detect", "--device", "cpu", "--csv", tmp_path / "out.csv")
    call(predict, *options, tmp_path / "astronaut.png")
    rows = table(tmp_path / "out.csv")
    left, top, right, bottom = map(int, rows[0]["box"].split(","))
    assert left < 225 < right
    assert top < 110 < bottom
    assert right - left < 200
    assert "1 of 1 without a prediction" in refused(predict, *options, tmp_path / "wall.png")
    assert "wall.png: no face found" in capsys.readouterr().err


@pytest.mark.slow
def test_a_video_instead_of_a_camera(compared, tmp_path, capsys):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.avi"
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (512, 512))
    for frame in (astronaut(), np.zeros((512, 512, 3), np.uint8)):
        film.write(np.ascontiguousarray(frame[..., ::-1]))
    film.release()
    call(predict, "--model", compared / "layer3-0", "--webcam", path, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert "of 10 views agree" in lines[0]
    assert lines[1] == "frame 1: no face found"
    assert "no such camera or film" in refused(
        predict, "--model", compared / "layer3-0", "--webcam", tmp_path / "no.avi"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere", "a.png"), "nowhere: no finished model there"),
        (("--model", "{run}", "{empty}"), "no picture in this folder"),
    ],
)
@pytest.mark.slow
def test_prediction_misuse_is_one_line(compared, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"run": compared / "layer3-0", "empty": tmp_path / "empty"}
    assert message in refused(predict, *(argument.format(**places) for argument in arguments))


# --- export.py -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnx(compared, tmp_path, capsys):
    """Any batch size; the file holds classes and preprocessing, and gives the network's vote."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    call(export, "--model", compared / "layer3-0", "--out", path)
    assert "largest difference to PyTorch" in capsys.readouterr().out
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(str(path)).metadata_props}
    assert tuple(stored["outputs"]) == CLASSES
    assert stored["preprocessing"] == {"size": 48, "channels": "RGB", "scale": "x / 127.5 - 1"}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model, _ = load_model(compared / "layer3-0")
    for size in (1, 5):
        x = torch.randn(size, 3, 48, 48)
        with torch.no_grad():
            expected = model(x)
        assert np.allclose(session.run(None, {"faces": x.numpy()})[0], expected, atol=1e-4)
    other, _ = load_model(compared / "layer3-1")
    with pytest.raises(export.ExportError, match="differ from PyTorch's"):
        export.check(other, session)


@pytest.mark.slow
def test_the_file_predicts_where_neither_pytorch_nor_cropvote_is(tmp_path):
    """predict_onnx.py with the shipped network and a photograph, compared with predict.py."""
    pytest.importorskip("onnxruntime")
    call(export, "--out", tmp_path / "model.onnx")
    Image.fromarray(astronaut()[44:126, 178:260]).save(tmp_path / "face.png")
    script = Path(export.__file__).with_name("predict_onnx.py")
    without = "import sys, runpy; sys.modules.update(dict.fromkeys(('torch', 'cropvote', 'timm')))"
    start = f"{without}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", start, script, *arguments], capture_output=True, text=True)

    found = run(tmp_path / "model.onnx", tmp_path / "face.png")
    assert found.returncode == 0, found.stderr
    call(predict, tmp_path / "face.png", "--csv", tmp_path / "out.csv", "--device", "cpu")
    (row,) = table(tmp_path / "out.csv")
    assert found.stdout.strip().endswith(f"face.png: {row['class']} {float(row['probability']):.0%}")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    assert "cannot be read as ONNX" in run(broken, tmp_path / "face.png").stderr
