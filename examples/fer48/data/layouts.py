"""Recognise a folder's layout and read it: RAF-DB, AffectNet, class folders, in their common variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import class_folders
from .cache import DataError, fingerprint, kept
from .fer_csv import FER2013_FILES, FERPLUS_FILES, header, is_ferplus, one_of, read_fer2013, read_ferplus, tables
from .sources import ORDERS, Asked, Faces, Listing, order_asked, read_split

ANY_FOLDERS = "class folders of RAF-DB (1..7), AffectNet (0..7), FER2013 or others (names)"
CSV_COLUMNS = (
    "subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks", "expression",
    "valence", "arousal",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A layout: its description, and functions that return what a folder lacks (or None) and read it."""

    words: str
    missing: Callable[[Path], Path | None]
    read: Callable[[Path, Asked], Faces]


def find(path: Path, asked: Asked) -> Faces:
    """Read the data set at ``path``, a csv or a folder, with its complete published splits.

    Raises:
        DataError: If no layout fits, or two do, or the data are damaged.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    if path.is_file():
        return told(read_ferplus(path, asked) if is_ferplus(path) else read_fer2013(path, asked), asked)
    roots = [path, *sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))]
    found: list[tuple[Path, Layout]] = []
    for depth in (roots[:1], roots[1:]):
        found = found or [(root, layout) for root in depth for layout in LAYOUTS if layout.missing(root) is None]
    if len(found) > 1:
        places = "; ".join(f"{layout.words} in {root}" for root, layout in found)
        raise DataError(f"{path}: {len(found)} sets in one folder; name the file, or the set's own folder: {places}.")
    if not found:
        tried = "\n".join(f"  {layout.words}: no {layout.missing(path)}" for layout in LAYOUTS)
        raise DataError(f"{path}: no layout fits, here or one folder below; tried\n{tried}")
    root, layout = found[0]
    return told(layout.read(root, asked), asked)


def told(faces: Faces, asked: Asked) -> Faces:
    """Return the faces unless --label-order contradicts them; only numbered folders may need it."""
    order = order_asked(asked.label_order)
    if order and order != faces.classes and order != (*faces.classes, "contempt"):
        raise DataError(
            f"--label-order {asked.label_order}: {faces.layout} has {', '.join(faces.classes)}; leave it out."
        )
    return faces


def first_missing(*paths: Path) -> Path | None:
    return next((path for path in paths if not path.exists()), None)


# RAF-DB, as distributed by its authors


def missing_rafdb(root: Path) -> Path | None:
    return first_missing(root / "EmoLabel" / "list_patition_label.txt", root / "Image" / "aligned")


def read_rafdb(root: Path, asked: Asked) -> Faces:
    path = root / "EmoLabel" / "list_patition_label.txt"
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, label = line.strip().partition(" ")
        part = name.partition("_")[0]
        if not name:
            continue
        if part not in rows or label.strip() not in set("1234567"):
            raise DataError(f"{path}: line {number} must be like 'train_00001.jpg 5', with a label in 1..7: {line!r}.")
        rows[part].append((f"Image/aligned/{Path(name).stem}_aligned.jpg", int(label) - 1))
    listings = {part: Listing(part, *columns(found)) for part, found in rows.items()}
    note = class_folders.NOTES["RAF-DB"]
    return read_all("RAF-DB", "original, EmoLabel and Image/aligned", ORDERS["RAF-DB"], root, listings, asked, note)


def columns(rows: Sequence[tuple[str, int]]) -> tuple[tuple[str, ...], np.ndarray]:
    """Turn pairs of file and label into the files, and the labels as int64 (n,)."""
    return tuple(file for file, _ in rows), np.array([label for _, label in rows], dtype=np.int64)


def read_all(
    name: str, layout: str, classes: tuple[str, ...], root: Path, listings: dict[str, Listing], asked: Asked, note: str
) -> Faces:
    """Decode every listing."""
    read = {key: read_split(root, listing, asked) for key, listing in listings.items()}
    skipped = tuple(line for _, lines in read.values() for line in lines)
    return Faces(name, layout, classes, {key: split for key, (split, _) in read.items()}, note, skipped)


# AffectNet, as distributed by its authors: csv files, and pictures from which faces are cropped


def csv_of(root: Path, name: str) -> Path:
    below = root / "Manually_Annotated_file_lists" / f"{name}.csv"
    return below if below.exists() else root / f"{name}.csv"


def missing_affectnet(root: Path) -> Path | None:
    pictures = root / "Manually_Annotated_Images"
    return first_missing(pictures, csv_of(root, "training"), csv_of(root, "validation"))


def read_affectnet(root: Path, asked: Asked) -> Faces:
    listings, notes = {}, [class_folders.NOTES["AffectNet"]]
    for key, name in (("train", "training"), ("test", "validation")):
        listings[key], out = affectnet_rows(csv_of(root, name), name)
        if out:
            notes.append(f"{out:,} rows of {name} left out: no usable face box")
    layout = "original, csv files and Manually_Annotated_Images"
    return read_all("AffectNet", layout, ORDERS["AffectNet"], root, listings, asked, "; ".join(notes))


def affectnet_rows(path: Path, name: str) -> tuple[Listing, int]:
    """Return the rows with one of the eight expressions and a face box, and how many lack only the box."""
    headed = "expression" in header(path)  # some copies of validation.csv have no header
    options = {} if headed else {"names": list(CSV_COLUMNS)}
    wanted = [column for column in CSV_COLUMNS if column != "facial_landmarks"]
    table = pd.concat(list(tables(path, usecols=lambda column: column in wanted, **options)))
    missing = set(wanted) - set(table.columns)
    if missing:
        raise DataError(f"{path}: no column {sorted(missing)}; AffectNet's csv has {', '.join(CSV_COLUMNS)}.")
    numbers = table[wanted[1:]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    left, top, width, height, expression, valence, arousal = numbers.T
    damaged = np.flatnonzero(~np.isin(expression, range(11)) | table[wanted[0]].isna().to_numpy())
    if len(damaged):
        raise DataError(
            f"{path}: row {damaged[0] + 1 + headed} has no expression in 0..10, or no file; is it truncated?"
        )
    boxed = (numbers[:, :4] >= 0).all(1)
    used = (expression < len(ORDERS["AffectNet"])) & boxed
    boxes = np.stack([left, top, left + width, top + height], 1)[used].astype(np.int64)
    mood = np.stack([valence, arousal], 1)[used].astype(np.float32)
    if not (np.abs(mood) <= 1).all():
        row = np.flatnonzero(used)[~(np.abs(mood) <= 1).all(1)][0] + 1 + headed
        raise DataError(f"{path}: row {row} has a valence or an arousal outside -1..1.")
    files = tuple(f"Manually_Annotated_Images/{file}" for file in table[wanted[0]][used])
    listing = Listing(name, files, expression[used].astype(np.int64), boxes, mood)
    return listing, int(((expression < len(ORDERS["AffectNet"])) & ~boxed).sum())


# AffectNet's later release: cropped faces, with each annotation in a small file


def missing_release(root: Path) -> Path | None:
    parts, kinds = ("train_set", "val_set"), ("images", "annotations")
    return first_missing(*(root / part / kind for part in parts for kind in kinds))


def read_release(root: Path, asked: Asked) -> Faces:
    listings = {key: release_rows(root, part, asked) for key, part in (("train", "train_set"), ("test", "val_set"))}
    layout, classes = "train_set and val_set with annotations", ORDERS["AffectNet"]
    return read_all("AffectNet", layout, classes, root, listings, asked, class_folders.NOTES["AffectNet"])


def release_rows(root: Path, part: str, asked: Asked) -> Listing:
    """Return a split; its annotations are cached, because every picture has three small files."""
    files = class_folders.pictures_in(root / part / "images")
    stems = [Path(file).stem for file in files]
    notes = root / part / "annotations"
    with_mood = bool(stems) and all((notes / f"{stems[0]}_{kind}.npy").exists() for kind in ("val", "aro"))
    kinds = ("exp", "val", "aro") if with_mood else ("exp",)
    paths = [f"{part}/annotations/{stem}_{kind}.npy" for stem in stems for kind in kinds]

    def build(folder: Path) -> None:
        values = [annotation(root / path) for path in paths]
        np.save(folder / "values.npy", np.array(values, dtype=np.float64).reshape(-1, len(kinds)))

    values = np.asarray(kept(asked.cache, fingerprint(root, paths), build)["values"]) if files else np.empty((0, 1))
    good = np.isin(values[:, 0], range(8)) & (np.abs(values[:, 1:]) <= 1).all(1)
    lost = tuple(f"{part}/images/{files[row]}: no usable annotations" for row in np.flatnonzero(~good))
    kept_files = tuple(f"{part}/images/{files[row]}" for row in np.flatnonzero(good))
    mood = values[good, 1:].astype(np.float32) if with_mood else None
    return Listing(part, kept_files, values[good, 0].astype(np.int64), None, mood, lost)


def annotation(path: Path) -> float:
    """Return the number in a .npy file, stored as a number or text, or NaN if there is none. Nothing is unpickled."""
    try:
        return float(str(np.load(path, allow_pickle=False).reshape(()).item()))
    except (OSError, ValueError, EOFError):
        return float("nan")


# FER2013 and FER+ in a folder


def missing_fer2013(root: Path) -> Path | None:
    return None if one_of(FER2013_FILES, root) else root / FER2013_FILES[0]


def missing_ferplus(root: Path) -> Path | None:
    return missing_fer2013(root) if one_of(FERPLUS_FILES, root) else root / FERPLUS_FILES[0]


def read_fer2013_in(root: Path, asked: Asked) -> Faces:
    return read_fer2013(one_of(FER2013_FILES, root) or root / FER2013_FILES[0], asked)


def read_ferplus_in(root: Path, asked: Asked) -> Faces:
    return read_ferplus(one_of(FERPLUS_FILES, root) or root / FERPLUS_FILES[0], asked)


LAYOUTS = (
    Layout("RAF-DB, original", missing_rafdb, read_rafdb),
    Layout("AffectNet, original", missing_affectnet, read_affectnet),
    Layout("AffectNet, train_set and val_set", missing_release, read_release),
    Layout("FER2013, csv", missing_fer2013, read_fer2013_in),
    Layout("FER+, csv", missing_ferplus, read_ferplus_in),
    Layout(ANY_FOLDERS, class_folders.missing, class_folders.read),
)
