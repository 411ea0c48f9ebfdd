"""The data side of the example: all supported layouts, and their errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, sources
from data.toy import toy_faces
from faces import (
    FER,
    NAMES,
    RAFDB,
    affectnet,
    check,
    class_folders,
    fer2013_csv,
    ferplus,
    paint,
    rafdb,
    release,
    shown,
)


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
def test_folders_0_to_6_are_recognised_by_their_counts(tmp_path, read, monkeypatch, order):
    numbers = (2, 3, 4, 5, 6, 7, 8)
    monkeypatch.setitem(sources.PUBLISHED["RAF-DB"], "train", numbers)
    for place, name in enumerate(order):
        for number in range(numbers[RAFDB.index(name)]):
            paint(tmp_path / "set" / "train" / str(place) / f"{number}.png", name)
        paint(tmp_path / "set" / "test" / str(place) / "0.png", name)
    faces = read(tmp_path / "set")
    check(faces)
    assert (faces.name, faces.classes) == ("RAF-DB", order)


def test_folders_0_to_6_of_unknown_order_need_a_label_order(tmp_path, read):
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
        assert not (split.images[:, 1] > 200).any()  # nothing from outside the box
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


def test_notes_describe_the_splits(tmp_path, read):
    """With a custom test folder, the official validation faces choose the epoch, and the note says so."""
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
    """Other names than expressions are sorted alphabetically; a validation folder is used unchanged."""
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


def test_ferplus_needs_fer2013_with_the_same_rows(tmp_path, read):
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
    """The message lists all layouts, each with its missing path."""
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
