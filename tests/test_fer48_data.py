"""The data side of the example: pictures, splits, and check_data.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import check_data
from data import DataError, Split, load, pictures, published, sources
from data.toy import toy_faces
from faces import (
    FER,
    RAFDB,
    check,
    class_folders,
    rafdb,
    release,
)

FER2013 = Path(__file__).parents[2] / "shared" / "data" / "fer2013"


# pictures


def test_modes_and_exif(tmp_path):
    red = (200, 40, 10)
    plain = Image.new("RGB", (60, 50), red)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    turned = plain.copy()
    turned.paste((10, 40, 200), (0, 0, 30, 50))  # the left half becomes the upper one
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=98)
    image = pictures.read_picture(tmp_path / "turned.jpg")
    assert image.size == (50, 60)
    face = np.asarray(pictures.shrink(image))
    assert np.abs(face[5, 24].astype(int) - (10, 40, 200)).max() < 8
    assert np.abs(face[42, 24].astype(int) - red).max() < 8

    for name, picture in {
        "p.png": plain.quantize(4),
        "rgba.png": plain.convert("RGBA"),
        "cmyk.jpg": plain.convert("CMYK"),
        "p.gif": plain.quantize(4),
    }.items():
        picture.save(tmp_path / name)
        face = pictures.read_face(tmp_path / name, None, False)
        assert np.abs(face[:, 20, 20].astype(int) - red).max() < 8, name
    Image.new("LA", (60, 50), (90, 255)).save(tmp_path / "la.png")
    Image.fromarray(np.full((50, 60), 90 * 257, np.uint16)).save(tmp_path / "wide.png")
    Image.new("L", (60, 50), 90).save(tmp_path / "grey.png")
    for name in ("la.png", "wide.png", "grey.png"):
        assert (pictures.read_face(tmp_path / name, None, False) == 90).all(), name
        assert (pictures.read_face(tmp_path / name, None, True) == 90).all(), name
    Image.new("RGBA", (60, 50), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (pictures.read_face(tmp_path / "clear.png", None, False) == 255).all()
    assert features.check("jpg")


def test_a_face_is_averaged_not_picked(tmp_path):
    """Stripes of one pixel shrink to their mean; a face of the right size is unchanged."""
    stripes = np.zeros((480, 480, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(np.asarray(pictures.shrink(stripes)).astype(int) - 100).max() < 12
    face = toy_faces(1, 0)[0][0]
    assert np.array_equal(np.asarray(pictures.shrink(np.stack([face] * 3, 2)))[..., 1], face)


def test_boxes_are_cut_off_at_the_edges():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[30:, 50:] = 255
    assert (np.asarray(pictures.shrink(picture, (50, 30, 90, 90))) == 255).all()
    for box in ((60, 0, 80, 20), (10, 10, 10, 30), (-20, -20, 0, 0)):
        with pytest.raises(pictures.ReadError, match="covers nothing"):
            pictures.shrink(picture, box)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
        (lambda path: path.write_bytes(b"no picture"), "cannot identify"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: Image.new("1", (12000, 10000)).save(path), "pixels|DecompressionBomb"),
    ],
    ids=["truncated", "text", "empty", "missing", "bomb"],
)
def test_unreadable_pictures(tmp_path, read, monkeypatch, spoil, reason):
    """One of few is an error; one of many is left out and named, and all other labels stay correct."""
    root = rafdb(tmp_path / "set", "_aligned.png")
    text = root / "EmoLabel" / "list_patition_label.txt"
    text.write_text(text.read_text().replace(".jpg", ".png"))
    for path in (root / "Image" / "aligned").iterdir():
        noise = np.random.default_rng(0).integers(0, 8, (100, 100, 3))
        image = np.clip(np.asarray(Image.open(path)) + noise - 4, 0, 255).astype(np.uint8)
        Image.fromarray(image).resize((300, 300)).save(path.with_name(path.stem + ".jpg"))
    spoil(root / "Image" / "aligned" / "train_00003_aligned.jpg")
    with pytest.raises(
        DataError, match=rf"1 of 21 images of train are unreadable; .*train_00003_aligned.jpg: .*{reason}"
    ):
        read(root)
    lines = text.read_text().splitlines()
    often = [line for number, line in enumerate(lines[:21] * 5) if "train_00003" not in line or number == 2]
    text.write_text("\n".join([*often, *lines[21:]]))
    faces = read(root)
    check(faces)
    assert len(faces.skipped) == 1
    assert faces.skipped[0].startswith("Image/aligned/train_00003_aligned.jpg: ")
    assert len(faces.splits["train"]) + len(faces.splits["val"]) == 100
    with pytest.raises(DataError, match="1 of 101 images"):
        read(root, strict=True)


# splits


def test_drawn_validation_faces(tmp_path, read):
    root = class_folders(tmp_path / "set", {"train": 20, "test": 2}, {str(k + 1): name for k, name in enumerate(RAFDB)})
    faces = read(root, validation=0.1)
    check(faces)
    train, val = faces.splits["train"], faces.splits["val"]
    assert (train.name, val.name) == ("train", "10 % of train")
    assert torch.bincount(val.labels).tolist() == [2] * 7
    assert torch.bincount(train.labels).tolist() == [18] * 7
    assert not set(train.names) & set(val.names)
    assert all(name.startswith("train/") for name in val.names)
    assert len({*train.names, *val.names}) == 140
    assert read(root, validation=0.1, seed=5).splits["val"].names == val.names
    assert read(root, validation=0.1, split_seed=1).splits["val"].names != val.names
    assert torch.bincount(read(root, validation=5).splits["val"].labels).tolist() == [5] * 7
    few = read(root, validation=0.1, limit=9).splits
    assert [len(split) for split in few.values()] == [9, 9, 9]
    assert set(few["val"].names) < set(val.names)
    assert set(few["train"].names) < set(train.names)
    for share in (0.01, 20, 30, 0, -1, 1.5, 0.99):
        with pytest.raises(DataError, match=r"--validation"):
            read(root, validation=share)
    with pytest.raises(DataError, match="the class surprise has 20 training faces, and 20 of them"):
        read(root, validation=20)


def test_limit_is_a_random_part_in_order(tmp_path, read):
    """Class folders are sorted by class, so their first faces would all have one class."""
    root = class_folders(tmp_path / "set", {"train": 20, "val": 1}, {"happy": "happy", "sad": "sad", "fear": "fear"})
    train = read(root, limit=15).splits["train"]
    assert len(set(train.labels.tolist())) == 3
    assert train.names == tuple(sorted(train.names))
    assert train.names == read(root, limit=15, seed=3).splits["train"].names
    whole = read(root).splits["train"]
    assert whole.limit(None) is whole
    assert whole.limit(99) is whole
    assert whole.limit(15).names == train.names


def test_select_join_and_to():
    images, labels = toy_faces(6, 0)
    mood = torch.arange(12.0).view(6, 2)
    split = Split("a", torch.from_numpy(images)[:, None], torch.from_numpy(labels), tuple("abcdef"), mood)
    part = split.select(torch.tensor([4, 1]))
    assert part.names == ("e", "b")
    assert torch.equal(part.images, split.images[[4, 1]])
    assert torch.equal(part.labels, split.labels[[4, 1]])
    assert torch.equal(part.mood, mood[[4, 1]])
    both = split.join(part)
    assert both.names == tuple("abcdefeb")
    assert torch.equal(both.mood[6:], part.mood)
    assert torch.equal(both.labels, torch.cat([split.labels, part.labels]))
    assert both.to("meta").images.device.type == both.to("meta").mood.device.type == "meta"


def test_toy():
    faces = load("toy", seed=2, limit=50)
    assert (faces.name, faces.classes) == ("toy", FER)
    assert [len(split) for split in faces.splits.values()] == [50] * 3
    whole = load("toy", seed=2).splits["val"]
    images, labels = toy_faces(700, seed=7)
    assert torch.equal(whole.images, torch.from_numpy(images)[:, None])
    assert torch.equal(whole.labels, torch.from_numpy(labels))
    assert len(set(whole.names)) == 700


def test_an_empty_split(tmp_path, read):
    root = class_folders(tmp_path / "set", {"train": 2, "test": 0}, {"happy": "happy", "sad": "sad"})
    for name in ("happy", "sad"):
        (root / "test" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="the split test is empty"):
        read(root)


# check_data.py


def run_check(tmp_path: Path, *arguments: object) -> None:
    options = ["--cache", tmp_path / "cache", "--sheet", tmp_path / "sheet.png"]
    check_data.main([str(argument) for argument in (*arguments, *options)])


@pytest.mark.slow
def test_check_data_passes_published_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.PUBLISHED["RAF-DB"], "train", (3,) * 7)
    monkeypatch.setitem(sources.PUBLISHED["RAF-DB"], "test", (2,) * 7)
    root = rafdb(tmp_path / "set")
    run_check(tmp_path, root)
    said = capsys.readouterr().out
    assert "RAF-DB (original, EmoLabel and Image/aligned)" in said
    assert "14 images of test are copies of one in train" in said
    assert "Constant images: 35" in said
    assert [line.split() for line in said.splitlines() if line.startswith("all")] == [["all", "21", "14"]]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500


def test_check_data_names_what_differs(tmp_path, capsys):
    root = rafdb(tmp_path / "set")
    with pytest.raises(SystemExit, match=r"not as published: train surprise 3, published 1,290; .*test neutral 2, pub"):
        run_check(tmp_path, root)
    assert "3 / 1,290" in capsys.readouterr().out
    for sheet in ("sheet.txt", "sheet"):
        with pytest.raises(SystemExit):
            check_data.main([str(root), "--sheet", sheet])
        assert "ends in .png" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"(?s)no layout fits.*EmoLabel"):
        run_check(tmp_path, root / "Image" / "aligned")


def test_check_data_counts_the_seven_classes_and_the_published_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.PUBLISHED["AffectNet"], "train_set", (3,) * 8)
    monkeypatch.setitem(sources.PUBLISHED["AffectNet"], "val_set", (1,) * 8)
    release(tmp_path / "set")
    run_check(tmp_path, tmp_path / "set")
    assert "contempt " not in capsys.readouterr().out.replace("without contempt", "")
    run_check(tmp_path, tmp_path / "set", "--contempt")
    assert "contempt " in capsys.readouterr().out


def test_published_numbers_add_up():
    totals = {
        name: {split: sum(numbers) for split, numbers in sets.items()} for name, sets in sources.PUBLISHED.items()
    }
    assert totals["RAF-DB"] == {"train": 12271, "test": 3068}
    assert totals["AffectNet"]["train_set"] == 283901 + 3750
    assert totals["AffectNet"]["training"] == 283902 + 3750
    assert totals["FER2013"] == {
        "Training": 28709, "PublicTest": 3589, "PrivateTest": 3589, "train": 28709, "test": 7178,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not FER2013.exists(), reason="FER2013 is not next to the checkout")
def test_real_fer2013(tmp_path, capsys):
    path = tmp_path / "fer2013.csv"
    subprocess.run([sys.executable, str(FER2013 / "unpack.py"), "csv", str(path)], check=True)
    run_check(tmp_path, path)
    said = capsys.readouterr().out
    for line in (
        "280 images of PublicTest are copies of one in Training",
        "288 images of PrivateTest are copies of one in Training",
        "44 images of PrivateTest are copies of one in PublicTest",
        "Constant images: 12",
    ):
        assert line in said
    shutil.copy(FER2013 / "ferplus.csv", tmp_path)
    plus = published(str(tmp_path / "ferplus.csv"), cache=tmp_path / "cache")
    assert "173 without an image name" in plus.note
