"""The data side of the example: every layout, the splits, the cache, and what is damaged."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import check_data
from data import DataError, Faces, Split, load, pictures, published, sources
from data import cache as caching
from data.toy import toy_faces

ROOT = Path(__file__).parent.parent
FER2013 = ROOT.parent / "shared" / "data" / "fer2013"
NAMES = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "angry", "contempt")
RAFDB = ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral")
FER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def colour(name: str) -> tuple[int, int, int]:
    """A colour that says which class a picture shows, and that differs when red and blue are exchanged."""
    place = NAMES.index(name)
    return 20 + 16 * place, 100, 250 - 16 * place


def paint(path: Path, name: str, size: tuple[int, int] = (60, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(name)).save(path, **({"quality": 98} if path.suffix == ".jpg" else {}))


def class_folders(root: Path, splits: dict[str, int], folders: dict[str, str], suffix: str = ".png") -> Path:
    """``folders`` says which class each folder shows."""
    for split, count in splits.items():
        for folder, name in folders.items():
            for number in range(count):
                paint(root / split / folder / f"{split}-{number}{suffix}", name)
    return root


def shown(split: Split) -> list[str]:
    """The class of every picture, by its colour; fails where the colour is none."""
    middle = split.images[:, :, 24, 24].long()
    assert split.images.shape[1:] == (3, 48, 48)
    assert split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64
    assert len(split.names) == len(split)
    places = ((middle[:, 0] - 20) / 16).round().long()
    expected = torch.tensor([colour(NAMES[place]) for place in places])
    assert (middle - expected).abs().max() <= 4
    return [NAMES[place] for place in places]


def check(faces: Faces) -> None:
    """Every face has the label of the class that it shows."""
    for split in faces.splits.values():
        assert shown(split) == [faces.classes[label] for label in split.labels]
        assert set(split.labels.tolist()) == set(range(len(faces.classes)))


@pytest.fixture
def read(tmp_path):
    """``load`` with a cache of the test's own."""
    return lambda path, **options: load(str(path), **{"cache": tmp_path / "cache", "validation": 1, **options})


def rafdb(root: Path, suffix: str = "_aligned.jpg") -> Path:
    lines = []
    for part, count in (("train", 21), ("test", 14)):
        for number in range(1, count + 1):
            label = number % 7 + 1
            paint(root / f"Image/aligned/{part}_{number:05d}{suffix}", RAFDB[label - 1], (100, 100))
            lines.append(f"{part}_{number:05d}.jpg {label}")
    (root / "EmoLabel").mkdir()
    (root / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines) + "\n")
    return root


def affectnet(root: Path, lists: str = "") -> Path:
    """Pictures whose face box alone shows the class, boxes that hang over the edge, and rows to leave out."""
    head = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
    (root / lists).mkdir(parents=True, exist_ok=True)
    for part, count in (("training", 24), ("validation", 8)):
        lines = [head]
        for number in range(count):
            name, path = NAMES[number % 8], root / "Manually_Annotated_Images" / f"{number % 3}" / f"{part}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (120, 90), (0, 255, 0))
            image.paste(colour(name), (70, 30, 120, 80))
            image.save(path)
            mood = f"{number / 100:.2f},{-number / 50:.2f}"
            lines.append(
                f"{path.parent.name}/{path.name},70,30,{60 if number % 2 else 50},50,1;2;3,{number % 8},{mood}"
            )
        lines += [f"0/{part}0.png,1,1,9,9,,{expression},-2,-2" for expression in (8, 9, 10)]
        lines.append(f"0/{part}0.png,-1,1,9,9,,1,0,0")
        (root / lists / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


def release(root: Path) -> Path:
    for part, count in (("train_set", 24), ("val_set", 8)):
        (root / part / "annotations").mkdir(parents=True)
        for number in range(count):
            paint(root / part / "images" / f"{number}.jpg", NAMES[number % 8])
            written = {"exp": str(number % 8) if number % 3 else number % 8, "val": "-0.5", "aro": number / 100}
            for kind, value in {**written, "lnd": np.zeros(136)}.items():
                np.save(root / part / "annotations" / f"{number}_{kind}.npy", np.array(value))
    return root


def fer2013_csv(path: Path, rows: int = 14, head: str = "emotion,pixels,Usage") -> Path:
    """Toy faces; the rows of the three splits follow each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head]
    for seed, usage in enumerate(("Training", "PublicTest", "PrivateTest")):
        for face, label in zip(*toy_faces(rows, seed), strict=True):
            row = {"emotion": str(label), "pixels": " ".join(map(str, face.flatten())), "Usage": usage}
            lines.append(",".join(row[column.strip()] for column in head.split(",")))
    path.write_text("\n".join(lines) + "\n")
    return path


# layouts


@pytest.mark.parametrize("below", ["", "basic"])
def test_rafdb(tmp_path, read, below):
    faces = read(rafdb(tmp_path / "set" / below).parent if below else rafdb(tmp_path / "set"))
    check(faces)
    assert (faces.name, faces.classes) == ("RAF-DB", RAFDB)
    assert {name: (split.name, len(split)) for name, split in faces.splits.items()} == {
        "train": ("train", 14),
        "val": ("1 a class of train", 7),
        "test": ("test", 14),
    }
    assert faces.splits["test"].names[0] == "Image/aligned/test_00001_aligned.jpg"


def test_rafdb_label_file_is_read_strictly(tmp_path, read):
    path = rafdb(tmp_path / "set") / "EmoLabel" / "list_patition_label.txt"
    path.write_text(path.read_text().replace("train_00003.jpg 4", "train_00003.jpg 8"))
    with pytest.raises(DataError, match=r"line 3 .*train_00003.jpg 8"):
        read(tmp_path / "set")


@pytest.mark.parametrize("below", ["", "DATASET"])
def test_rafdb_folders_1_to_7(tmp_path, read, below):
    folders = {str(place + 1): name for place, name in enumerate(RAFDB)}
    root = class_folders(tmp_path / "set" / below, {"train": 3, "test": 2}, folders, ".jpg")
    faces = read(tmp_path / "set")
    check(faces)
    assert (faces.name, faces.classes) == ("RAF-DB", RAFDB)
    assert [len(split) for split in faces.splits.values()] == [14, 7, 14]
    (root / "train_labels.csv").write_text("image,label\ntrain-0.jpg,1\n")
    with pytest.raises(DataError, match=r"train/2/train-0.jpg has the label 1 there, but lies in folder 2"):
        read(tmp_path / "set")


@pytest.mark.parametrize("order", [RAFDB, NAMES[:7]], ids=["rafdb", "affectnet"])
def test_folders_0_to_6_are_told_by_their_numbers_of_faces(tmp_path, read, monkeypatch, order):
    numbers = (2, 3, 4, 5, 6, 7, 8)
    monkeypatch.setitem(sources.PUBLISHED["RAF-DB"], "train", numbers)
    for place, name in enumerate(order):
        for number in range(numbers[RAFDB.index(name)]):
            paint(tmp_path / "set" / "train" / str(place) / f"{number}.png", name)
        paint(tmp_path / "set" / "test" / str(place) / "0.png", name)
    faces = read(tmp_path / "set")
    check(faces)
    assert (faces.name, faces.classes) == ("RAF-DB", order)


def test_folders_0_to_6_of_unknown_order_must_be_told(tmp_path, read):
    root = class_folders(tmp_path / "set", {"train": 2, "test": 1}, {str(k): name for k, name in enumerate(FER)})
    with pytest.raises(DataError, match=r"0: 2, .*do not tell .*--label-order: rafdb, affectnet, fer2013, or seven"):
        read(root)
    with pytest.raises(DataError, match=r"names 2 classes; train has 7: 0, 1"):
        read(root, label_order="happy,sad")
    with pytest.raises(DataError, match="each once"):
        read(root, label_order="happy,happiness")
    for order in (",".join(FER), "anger, Disgust,fear,happiness,sadness,surprised,neutral"):
        check(read(root, label_order=order))
    assert read(root, label_order="affectnet").classes == NAMES[:7]
    assert read(root, label_order="rafdb").classes == RAFDB


@pytest.mark.parametrize("lists", ["", "Manually_Annotated_file_lists"])
def test_affectnet(tmp_path, read, lists):
    root = affectnet(tmp_path / "set", lists)
    faces = read(root, contempt=True)
    check(faces)
    assert (faces.name, faces.classes) == ("AffectNet", NAMES)
    assert {name: (split.name, len(split)) for name, split in faces.splits.items()} == {
        "train": ("training", 16),
        "val": ("1 a class of training", 8),
        "test": ("validation", 8),
    }
    assert "1 rows of training left out: no usable face box" in faces.note
    for split in faces.splits.values():
        assert not (split.images[:, 1] > 200).any()  # nothing of what lies around the box
        numbers = torch.tensor([int(re.findall(r"\d+", name)[-1]) for name in split.names])
        assert split.mood.dtype == torch.float32
        assert torch.allclose(split.mood, torch.stack([numbers / 100, -numbers / 50], 1))
    seven = read(root)
    check(seven)
    assert seven.classes == NAMES[:7]
    assert "without contempt" in seven.note


def test_affectnet_csv_without_a_header(tmp_path, read):
    root = affectnet(tmp_path / "set")
    path = root / "validation.csv"
    path.write_text(path.read_text().partition("\n")[2])
    faces = read(root)
    check(faces)
    assert len(faces.splits["test"]) == 7
    path.write_text(path.read_text()[:-12])
    path.write_text(path.read_text().replace(",0,0.00,", ",12,0.00,", 1))
    with pytest.raises(DataError, match=r"validation.csv: row 1 has no expression in 0\.\.10"):
        read(root)


def test_affectnet_release(tmp_path, read):
    root = release(tmp_path / "set")
    faces = read(root, contempt=True)
    check(faces)
    assert (faces.name, faces.classes) == ("AffectNet", NAMES)
    assert [split.name for split in faces.splits.values()] == ["train_set", "1 a class of train_set", "val_set"]
    test = faces.splits["test"]
    assert test.names[2] == "val_set/images/2.jpg"
    assert torch.allclose(test.mood, torch.stack([torch.full((8,), -0.5), torch.arange(8) / 100], 1))
    np.save(root / "val_set" / "annotations" / "3_exp.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(
        DataError, match=r"1 of 8 images of val_set are unreadable; val_set/images/3.jpg: no usable ann"
    ):
        read(root)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
@pytest.mark.parametrize("named", [False, True])
def test_affectnet_folders(tmp_path, read, val, named):
    folders = {name.title() if named else str(place): name for place, name in enumerate(NAMES)}
    faces = read(class_folders(tmp_path / "set", {"train": 3, val: 1}, folders), contempt=True)
    check(faces)
    assert (faces.name, faces.classes) == ("AffectNet", NAMES)
    assert {name: (split.name, len(split)) for name, split in faces.splits.items()} == {
        "train": ("train", 16),
        "val": ("1 a class of train", 8),
        "test": (val, 8),
    }


def test_notes_say_what_the_splits_there_are(tmp_path, read):
    """Somebody's own test folder beside the official validation faces: these then choose the epoch, and it is said."""
    numbered = {str(place): name for place, name in enumerate(NAMES)}
    own = read(class_folders(tmp_path / "a", {"train": 3, "val": 1, "test": 1}, numbered), contempt=True)
    assert own.note == "splits of somebody's own; val chooses the epoch"
    rafdb = {str(place + 1): name for place, name in enumerate(RAFDB)}
    assert "no test faces" in read(class_folders(tmp_path / "b", {"train": 3, "val": 1}, rafdb)).note
    seven = {name: name for name in NAMES[:7]}
    root = class_folders(tmp_path / "c", {"train": 3, "val": 1}, seven)
    assert "--label-order affectnet makes its validation faces the test" in read(root).note
    told = read(root, label_order="affectnet")
    check(told)
    assert (told.name, told.splits["test"].name) == ("AffectNet", "val")
    assert "none of them chooses anything" in told.note


def test_fer2013_folders(tmp_path, read):
    for split, seed in (("train", 0), ("test", 1)):
        for number, (face, label) in enumerate(zip(*toy_faces(21, seed), strict=True)):
            path = tmp_path / "set" / split / FER[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(face).save(path)
    faces = read(tmp_path / "set")
    assert (faces.name, faces.classes) == ("FER2013", FER)
    images, labels = toy_faces(21, 1)
    numbers = [int(Path(name).stem) for name in faces.splits["test"].names]
    assert torch.equal(faces.splits["test"].images, torch.from_numpy(images[numbers])[:, None])
    assert torch.equal(faces.splits["test"].labels, torch.from_numpy(labels[numbers]))


def test_plain_class_folders(tmp_path, read):
    """Names that are no expressions: alphabetical; a validation folder is used as it is."""
    folders = {"dogs": "happy", "cats": "sad", "birds": "fear"}
    faces = read(class_folders(tmp_path / "set", {"train": 2, "val": 1, "test": 1}, folders))
    assert (faces.name, faces.classes) == ("folders", ("birds", "cats", "dogs"))
    for split, size in zip(faces.splits.values(), (6, 3, 3), strict=True):
        assert shown(split) == [folders[faces.classes[label]] for label in split.labels]
        assert len(split) == size


def test_synonyms_and_upper_case_name_the_same_classes(tmp_path, read):
    root = class_folders(tmp_path / "set", {"train": 2}, {"HAPPINESS": "happy", "Anger": "angry", "sadness": "sad"})
    class_folders(root, {"Test": 1}, {"happy": "happy", "angry": "angry", "Sad": "sad"})
    faces = read(root)
    check(faces)
    assert faces.classes == ("angry", "happy", "sad")
    with pytest.raises(DataError, match="it names happy, sad"):
        read(root, label_order="happy,sad")
    assert read(root, label_order="sad,angry,happy").classes == ("sad", "angry", "happy")
    (root / "train" / "happy").mkdir()
    with pytest.raises(DataError, match="a second folder of the class happy"):
        read(root)


def test_train_and_test_must_have_the_same_classes(tmp_path, read):
    root = class_folders(tmp_path / "set", {"train": 2}, {"happy": "happy", "sad": "sad"})
    class_folders(root, {"test": 1}, {"happy": "happy", "fear": "fear"})
    with pytest.raises(DataError, match="test has the classes fear, happy, but train has happy, sad"):
        read(root)


@pytest.mark.parametrize("head", ["emotion,pixels,Usage", "emotion, Usage, pixels"], ids=["fer2013", "icml_face_data"])
def test_fer2013_csv(tmp_path, read, head):
    path = fer2013_csv(tmp_path / "set" / ("fer2013.csv" if "s,U" in head else "icml_face_data.csv"), head=head)
    for where in (path, path.parent):
        faces = read(where)
        assert (faces.name, faces.classes) == ("FER2013", FER)
        assert [split.name for split in faces.splits.values()] == ["Training", "PublicTest", "PrivateTest"]
        for seed, split in enumerate(faces.splits.values()):
            images, labels = toy_faces(14, seed)
            assert torch.equal(split.images, torch.from_numpy(images)[:, None])
            assert torch.equal(split.labels, torch.from_numpy(labels))
        assert faces.splits["val"].names[0] == "row 16"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-50], r"row 43 has no Usage that FER2013 knows; is it truncated"),
        (lambda text: text.replace(",Training\n", " 7,Training\n", 1), r"row 2 does not hold 48x48"),
        (lambda text: text.replace(",Training\n", " 1000,Training\n", 1), r"row 2 does not hold 48x48"),
        (lambda text: text.replace(" ", ",", 1), r"cannot be read as a csv|row \d+ "),
        (lambda text: text.replace("emotion", "label", 1), r"no column \['emotion'\]"),
        (lambda text: "\n".join(text.split("\n")[:29]), r"no row with Usage PrivateTest"),
        (lambda text: text.replace("\n3,", "\n9,"), r"row \d+ has an emotion outside 0\.\.6"),
        (lambda text: text.replace("\n3,", "\nx,"), r"row \d+ has an emotion outside 0\.\.6"),
        (lambda text: "", r"cannot be read as a csv"),
        (lambda text: "\x89PNG\n\0\0\n", r"no column|cannot be read as a csv"),
        (lambda text: text.replace(" ", " x", 1), r"row 2 does not hold"),
        (lambda text: text.split("\n")[0] + "\n", r"no row with Usage Training"),
    ],
    ids=["truncated", "long", "large", "comma", "column", "split", "label", "word", "empty", "png", "letters", "head"],
)
def test_damaged_csv(tmp_path, read, damage, message):
    path = fer2013_csv(tmp_path / "fer2013.csv")
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        read(path)
    assert not list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else True


def ferplus(folder: Path) -> Path:
    """Votes for toy faces: happy everywhere, but for the rows that tell the rules apart."""
    fer2013_csv(folder / "fer2013.csv")
    lines = ["Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"]
    special = {
        0: "a,0,0,8,2,0,0,0,0,0,0",  # surprise
        1: ",0,10,0,0,0,0,0,0,0,0",  # blank
        2: "a,5,5,0,0,0,0,0,0,0,0",  # shared
        3: "a,1,2,0,0,0,0,0,0,7,0",  # unknown
        4: "a,1,2,0,0,0,0,0,0,0,7",  # no face
        5: "a,0,0,0,0,0,0,0,9,1,0",  # contempt
        6: "a,0,0,0,0,0,0,9,0,1,0",  # fear
    }
    for row in range(42):
        usage = ("Training", "PublicTest", "PrivateTest")[row // 14]
        lines.append(f"{usage},{special.get(row % 14, 'a,0,9,0,1,0,0,0,0,0,0')}")
    (folder / "fer2013new.csv").write_text("\n".join(lines) + "\n")
    return folder / "fer2013new.csv"


def test_ferplus(tmp_path, read):
    path = ferplus(tmp_path / "set")
    faces = read(path, contempt=True)
    assert (faces.name, faces.classes) == ("FER+", sources.ORDERS["FER+"])
    for seed, split in enumerate(faces.splits.values()):
        rows = [0, 5, 6, 7, 8, 9, 10, 11, 12, 13]
        assert torch.equal(split.images, torch.from_numpy(toy_faces(14, seed)[0][rows])[:, None])
        assert [faces.classes[label] for label in split.labels] == ["surprise", "contempt", "fear", *["happy"] * 7]
        assert split.names == tuple(f"row {14 * seed + row + 2}" for row in rows)
    assert "3 without an image name, 3 with a shared first place, 6 unknown or no face" in faces.note
    seven = read(path)
    assert seven.classes == faces.classes[:7]
    assert len(seven.splits["train"]) == 9


def test_ferplus_must_stand_beside_the_same_rows(tmp_path, read):
    path = ferplus(tmp_path / "set")
    with pytest.raises(DataError, match=r"(?s)2 sets in one folder; name the file.*FER2013, csv.*FER\+, csv"):
        read(path.parent)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"41 rows, but fer2013.csv has 42"):
        read(path)
    path.write_text("\n".join([lines[0], *lines[2:16], lines[1], *lines[16:]]))
    with pytest.raises(DataError, match="row 15 has another Usage"):
        read(path)
    path.write_text("\n".join(lines).replace(",9,", ",x,"))
    with pytest.raises(DataError, match=r"row \d+ has votes that are no numbers"):
        read(path)
    (path.parent / "fer2013.csv").unlink()
    with pytest.raises(DataError, match=r"put fer2013.csv beside it"):
        read(path)


def test_no_layout_fits(tmp_path, read):
    """The message lists all layouts, and the path that each of them lacks."""
    root = tmp_path / "set"
    (root / "Manually_Annotated_Images").mkdir(parents=True)
    with pytest.raises(DataError) as raised:
        read(root)
    for path in ("EmoLabel/list_patition_label.txt", "training.csv", "train_set/images", "fer2013.csv", "train\n"):
        assert f"{root}/{path}" in f"{raised.value}\n"
    assert "fer2013new.csv" in str(raised.value)
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    (root / "train").mkdir()
    with pytest.raises(DataError, match="no class folder"):
        read(root)


def test_a_layout_one_folder_below_is_found_once_only(tmp_path, read):
    rafdb(tmp_path / "sets" / "a")
    assert read(tmp_path / "sets").name == "RAF-DB"
    release(tmp_path / "sets" / "b")
    with pytest.raises(DataError, match="2 sets in one folder"):
        read(tmp_path / "sets")


def test_label_order_that_contradicts_the_set(tmp_path, read):
    path = fer2013_csv(tmp_path / "fer2013.csv")
    assert len(read(path, label_order="fer2013").splits["train"]) == 14
    with pytest.raises(DataError, match="--label-order rafdb"):
        read(path, label_order="rafdb")


# pictures


def test_modes_and_exif(tmp_path):
    red = (200, 40, 10)
    plain = Image.new("RGB", (60, 50), red)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise, before it is shown
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
    """Stripes of one pixel shrink to their mean; a face of the right size stays as it is."""
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
    """One of few is an error; one of many is left out and named, with every other label in its place."""
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
    """Class folders are sorted by class: their first faces would be of one class."""
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


# the cache


@pytest.fixture
def small(tmp_path):
    return class_folders(tmp_path / "set", {"train": 8, "test": 1}, {str(k + 1): name for k, name in enumerate(RAFDB)})


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_a_second_load_decodes_nothing(small, read, monkeypatch):
    first = read(small)
    opened = []
    monkeypatch.setattr(pictures.Image, "open", lambda *a, **k: opened.append(a))
    again = read(small)
    assert not opened
    for name, split in first.splits.items():
        assert torch.equal(split.images, again.splits[name].images)
        assert split.names == again.splits[name].names
    again.splits["test"].images.zero_()  # a private copy: what is kept does not change
    check(read(small))


def test_the_csv_is_parsed_once(tmp_path, read, monkeypatch):
    path = fer2013_csv(tmp_path / "fer2013.csv")
    first = read(path)
    monkeypatch.setattr("data.fer_csv.parse", lambda path: pytest.fail("parsed again"))
    assert torch.equal(read(path).splits["test"].images, first.splits["test"].images)


@pytest.mark.parametrize("what", ["content", "time", "size"])
def test_a_changed_file_is_seen(tmp_path, small, read, what):
    read(small)
    before = len(caches(tmp_path / "cache"))
    path = small / "test" / "1" / "test-0.png"
    stat = path.stat()
    if what == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        read(small)
        assert len(caches(tmp_path / "cache")) == before + 1
        return
    paint(path, "happy", (400, 300) if what == "size" else (60, 50))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (what == "content")))
    assert what == "content" or path.stat().st_size != stat.st_size
    assert shown(read(small).splits["test"])[0] == "happy"


def test_the_same_names_in_another_folder_are_other_pictures(tmp_path, read):
    """Same sizes, same times: a copy of an archive, say."""
    folders = {str(k + 1): name for k, name in enumerate(RAFDB)}
    for place, order in (("a", folders), ("b", dict(zip(folders, reversed(folders.values()), strict=True)))):
        root = class_folders(tmp_path / place, {"train": 2, "test": 1}, order, ".bmp")
        for path in root.rglob("*.bmp"):
            os.utime(path, ns=(0, 0))
    check(read(tmp_path / "a"))
    assert shown(read(tmp_path / "b").splits["test"]) == list(reversed(RAFDB))


@pytest.mark.parametrize("damage", ["truncated", "gone", "no seal", "seal", "empty"])
def test_a_damaged_cache_is_built_anew(tmp_path, small, read, damage):
    read(small)
    for folder in caches(tmp_path / "cache"):
        if damage == "truncated":
            with (folder / "faces.npy").open("r+b") as file:
                file.truncate(5000)
        elif damage == "gone":
            (folder / "rows.npy").unlink()
        elif damage == "no seal":
            (folder / caching.SEAL).unlink()
        elif damage == "seal":
            (folder / caching.SEAL).write_text("[]")
        else:
            shutil.rmtree(folder)
            folder.mkdir()
    check(read(small))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path, small, read, monkeypatch):
    genuine, calls = pictures.read_face, []

    def interrupted(path, box, grey):
        calls.append(path)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return genuine(path, box, grey)

    monkeypatch.setattr(pictures, "read_face", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(small)
    assert not list((tmp_path / "cache").iterdir())
    check(read(small))


def test_a_full_disk_is_one_clear_error(tmp_path, small, read):
    """A limit on the size of files fails a write in the middle of a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match=r"--cache .*cannot be kept there \(File too large\); name another"):
            read(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())
    check(read(small))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept there"):
        read(small, cache=tmp_path / "file" / "cache")


def test_two_builds_at_once_end_with_one_good_cache(tmp_path):
    barrier, results = threading.Barrier(2), []

    def build(part: Path) -> None:
        np.save(part / "faces.npy", np.arange(1000))
        barrier.wait(10)

    def work() -> None:
        results.append(caching.kept(tmp_path / "cache", "key", build)["faces"].sum())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [499_500] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]


def test_two_processes_at_once(tmp_path, small):
    program = (
        "import sys; from pathlib import Path; from data import load\n"
        "faces = load(sys.argv[1], validation=1, cache=Path(sys.argv[2]))\n"
        "print(int(faces.splits['train'].images.long().sum()))\n"
    )
    command = [sys.executable, "-c", program, str(small), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples" / "fer48")}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != ""
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_default_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(str(fer2013_csv(tmp_path / "fer2013.csv")))
    assert len(caches(tmp_path / "cropvote" / "fer48")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caching.cache_folder(None) == Path.home() / ".cache" / "cropvote" / "fer48"


# check_data.py


def run_check(tmp_path: Path, *arguments: object) -> None:
    options = ["--cache", tmp_path / "cache", "--sheet", tmp_path / "sheet.png"]
    check_data.main([str(argument) for argument in (*arguments, *options)])


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
@pytest.mark.skipif(not FER2013.exists(), reason="FER2013 is not beside the checkout")
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
