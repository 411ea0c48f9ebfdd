"""Read FER2013 from its csv, whose rows hold the pixels, and FER+, which relabels the same rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .cache import DataError, fingerprint, kept
from .sources import ORDERS, Asked, Faces, Split
from .toy import SIDE

#: FER2013's own names for train, validation and test.
USAGE = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
FER2013_FILES = ("fer2013.csv", "icml_face_data.csv")
FERPLUS_FILES = ("fer2013new.csv", "ferplus.csv")
VOTES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
#: Rows parsed at once.
CHUNK = 2048


def is_ferplus(path: Path) -> bool:
    """Return whether a csv has the columns of FER+ instead of FER2013."""
    columns = header(path)
    return "NF" in columns and "pixels" not in columns


def read_fer2013(path: Path, asked: Asked) -> Faces:
    """Read FER2013 from its csv.

    Raises:
        DataError: If the columns are not FER2013's, a row is damaged, or a split is empty.
    """
    faces, labels, usage = rows_of(path, asked)
    splits = {}
    for number, (key, name) in enumerate(USAGE.items()):
        splits[key] = split_of(name, faces, labels, np.flatnonzero(usage == number))
    note = "chosen on PublicTest; PrivateTest is scored with --final-test only"
    return Faces("FER2013", f"csv with pixels, {path.name}", ORDERS["FER2013"], splits, note)


def read_ferplus(path: Path, asked: Asked) -> Faces:
    """Read FER+: the faces of the fer2013.csv next to ``path``, each with the class that most people chose.

    Raises:
        DataError: If fer2013.csv is missing, its rows differ in number or order, or votes are damaged.
    """
    beside = one_of(FER2013_FILES, path.parent)
    if beside is None:
        raise DataError(f"{path}: FER+ holds labels only; put {FER2013_FILES[0]} beside it ({path.parent}).")
    faces, _, usage = rows_of(beside, asked)
    table = pd.concat(list(tables(path)))
    missing = {"Usage", "Image name", *VOTES} - set(table.columns)
    if missing:
        raise DataError(f"{path}: no column {sorted(missing)}; FER+ has Usage, Image name and {', '.join(VOTES)}.")
    if len(table) != len(faces):
        raise DataError(f"{path}: {len(table)} rows, but {beside.name} has {len(faces)}; they must be the same faces.")
    other = np.flatnonzero(table["Usage"].to_numpy() != np.array(list(USAGE.values()))[usage])
    if len(other):
        raise DataError(
            f"{path}: row {other[0] + 2} has another Usage than {beside.name}; they must be the same faces."
        )
    votes = table[list(VOTES)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    if not (votes >= 0).all():
        raise DataError(f"{path}: row {np.flatnonzero(~(votes >= 0).all(1))[0] + 2} has votes that are no numbers.")
    labels, out = majority(votes, table["Image name"].isna().to_numpy())
    splits = {}
    for number, (key, name) in enumerate(USAGE.items()):
        splits[key] = split_of(name, faces, labels, np.flatnonzero((usage == number) & (labels >= 0)))
    left = ", ".join(f"{count:,} {reason}" for reason, count in out.items())
    note = f"FER+ labels, the class with most votes; left out: {left}; chosen on PublicTest"
    return Faces("FER+", f"votes in {path.name}, pixels in {beside.name}", ORDERS["FER+"], splits, note)


def majority(votes: np.ndarray, blank: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Turn votes (n, 10) into int64 labels (n,), -1 for rows left out, and count those by reason."""
    labels = votes.argmax(1)
    shared = (votes == votes.max(1, keepdims=True)).sum(1) > 1
    unknown = labels >= VOTES.index("unknown")
    reasons = {"without an image name": blank}
    reasons["with a shared first place"] = shared & ~blank
    reasons["unknown or no face"] = unknown & ~shared & ~blank
    return np.where(blank | shared | unknown, -1, labels), {name: int(rows.sum()) for name, rows in reasons.items()}


def split_of(name: str, faces: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Split:
    """Select the rows of a split; consecutive rows stay memory-mapped."""
    images = torch.from_numpy(faces)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        images = images[int(rows[0]) : int(rows[-1]) + 1]
    else:
        images = images[torch.from_numpy(rows)]
    return Split(name, images, torch.from_numpy(labels[rows]), tuple(f"row {row + 2}" for row in rows.tolist()))


def one_of(names: tuple[str, ...], folder: Path) -> Path | None:
    """Return the first of these files that the folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def rows_of(path: Path, asked: Asked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all rows: faces uint8 (n, 1, 48, 48), labels int64 (n,), and usage, the index in USAGE, int64 (n,)."""

    def build(part: Path) -> None:
        for name, array in zip(("faces", "labels", "usage"), parse(path), strict=True):
            np.save(part / f"{name}.npy", array)

    arrays = kept(asked.cache, fingerprint(path.parent, [path.name], "fer2013"), build)
    return arrays["faces"], arrays["labels"], arrays["usage"]


def parse(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parse what ``rows_of`` returns from the text.

    Raises:
        DataError: If the file is damaged; the message says in which row.
    """
    faces, labels, usage, first = [], [], [], 2
    for table in tables(path):
        missing = {"emotion", "pixels", "Usage"} - set(table.columns)
        if missing:
            raise DataError(f"{path}: no column {sorted(missing)}; fer2013.csv has emotion, pixels and Usage.")
        places = table["Usage"].map({name: place for place, name in enumerate(USAGE.values())}).to_numpy(np.float64)
        emotions = pd.to_numeric(table["emotion"], errors="coerce").to_numpy(dtype=np.float64)
        unknown, outside = np.isnan(places), ~np.isin(emotions, range(len(ORDERS["FER2013"])))
        if unknown.any():
            row = first + int(unknown.argmax())
            raise DataError(f"{path}: row {row} has no Usage that FER2013 knows; is it truncated?")
        if outside.any():
            raise DataError(f"{path}: row {first + int(outside.argmax())} has an emotion outside 0..6.")
        faces += [face(text, path, first + place) for place, text in enumerate(table["pixels"])]
        labels.append(emotions.astype(np.int64))
        usage.append(places.astype(np.int64))
        first += len(table)
    used = np.concatenate(usage) if usage else np.empty(0, np.int64)
    for number, name in enumerate(USAGE.values()):
        if not (used == number).any():
            raise DataError(f"{path}: no row with Usage {name}.")
    return np.stack(faces)[:, None], np.concatenate(labels), used


def tables(path: Path, **options: Any) -> Iterator[pd.DataFrame]:
    """Yield a csv in chunks of ``CHUNK`` rows, with all values as strings without leading spaces."""
    try:
        with pd.read_csv(path, skipinitialspace=True, dtype=str, chunksize=CHUNK, **options) as reader:
            yield from reader
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as a csv ({error}).") from error


def header(path: Path) -> set[str]:
    """Return the column names of a csv."""
    try:
        return set(pd.read_csv(path, skipinitialspace=True, nrows=0).columns)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a csv ({error}).") from error


def face(text: object, path: Path, row: int) -> np.ndarray:
    """Parse a row's pixels, uint8 (48, 48)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy's warning for text that is not a number
            grey = np.fromstring(str(text), dtype=np.int64, sep=" ")
    except (DeprecationWarning, ValueError):
        grey = np.empty(0, np.int64)
    if grey.size != SIDE * SIDE or grey.min() < 0 or grey.max() > 255:
        raise DataError(f"{path}: row {row} does not hold {SIDE}x{SIDE} grey values; is it truncated?")
    return grey.astype(np.uint8).reshape(SIDE, SIDE)
