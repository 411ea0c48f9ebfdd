"""Small folders in the data sets' layouts, with pictures whose colour encodes the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Faces, Split
from data.toy import toy_faces

NAMES = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "angry", "contempt")
RAFDB = ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral")
FER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def colour(name: str) -> tuple[int, int, int]:
    """Return the colour that encodes a class; swapping red and blue changes it."""
    place = NAMES.index(name)
    return 20 + 16 * place, 100, 250 - 16 * place


def paint(path: Path, name: str, size: tuple[int, int] = (60, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(name)).save(path, **({"quality": 98} if path.suffix == ".jpg" else {}))


def class_folders(root: Path, splits: dict[str, int], folders: dict[str, str], suffix: str = ".png") -> Path:
    """Write class folders; ``folders`` maps a folder to the class it shows."""
    for split, count in splits.items():
        for folder, name in folders.items():
            for number in range(count):
                paint(root / split / folder / f"{split}-{number}{suffix}", name)
    return root


def shown(split: Split) -> list[str]:
    """Return the class of every picture by its colour; fail for an unknown colour."""
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
    """Check that every face has the label of the class it shows."""
    for split in faces.splits.values():
        assert shown(split) == [faces.classes[label] for label in split.labels]
        assert set(split.labels.tolist()) == set(range(len(faces.classes)))


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
    """Write pictures whose face box shows the class, boxes that cross the edge, and rows to leave out."""
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
    """Write toy faces; the three splits follow one another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head]
    for seed, usage in enumerate(("Training", "PublicTest", "PrivateTest")):
        for face, label in zip(*toy_faces(rows, seed), strict=True):
            row = {"emotion": str(label), "pixels": " ".join(map(str, face.flatten())), "Usage": usage}
            lines.append(",".join(row[column.strip()] for column in head.split(",")))
    path.write_text("\n".join(lines) + "\n")
    return path


def ferplus(folder: Path) -> Path:
    """Write votes for toy faces: all happy, except for rows that test the rules."""
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
