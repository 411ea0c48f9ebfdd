"""Faces for training: the toy ones, or FER2013 from its csv."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from toy import CLASSES, SIDE, toy_faces

TOY_SIZES = {"train": 2800, "val": 700, "test": 700}
#: FER2013's own names for train, validation and test.
FER2013_USAGE = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}


class DataError(Exception):
    """The data cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Split:
    """Grey faces as uint8 (n, 48, 48), their labels as int64 (n,), and the name that the set itself gives the split."""

    name: str
    images: Tensor
    labels: Tensor

    def limit(self, count: int | None) -> Split:
        return self if count is None else Split(self.name, self.images[:count], self.labels[:count])

    def to(self, device: torch.device) -> Split:
        return Split(self.name, self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Faces:
    """A data set: classes in label order, three splits, and what a reader of the results must know."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    note: str


def load(data: str, limit: int | None, seed: int) -> Faces:
    """The toy faces for ``"toy"``, else FER2013 from the csv of that path; ``limit`` caps every split.

    Raises:
        DataError: no such file, not FER2013's columns, a damaged row, or an empty split.
    """
    if data == "toy":
        splits = {name: _toy_split(name, size, seed) for name, size in TOY_SIZES.items()}
        faces = Faces("toy", CLASSES, splits, "synthetic faces drawn by code: the figures say nothing about real faces")
    else:
        splits = _fer2013(Path(data))
        faces = Faces("FER2013", CLASSES, splits, "chosen on PublicTest; PrivateTest is scored with --final-test only")
    return Faces(faces.name, faces.classes, {k: s.limit(limit) for k, s in splits.items()}, faces.note)


def _toy_split(name: str, size: int, seed: int) -> Split:
    images, labels = toy_faces(size, seed=3 * seed + list(TOY_SIZES).index(name))
    return Split(name, torch.from_numpy(images), torch.from_numpy(labels))


def _fer2013(path: Path) -> dict[str, Split]:
    try:
        table = pd.read_csv(path, skipinitialspace=True)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: cannot be read as a csv ({error}).") from error
    missing = {"emotion", "pixels", "Usage"} - set(table.columns)
    if missing:
        raise DataError(f"--data {path}: no column {sorted(missing)}; fer2013.csv has emotion, pixels and Usage.")
    unknown = ~table["Usage"].isin(list(FER2013_USAGE.values()))
    if unknown.any():
        raise DataError(f"--data {path}: row {unknown.idxmax() + 2} has no Usage that FER2013 knows; is it truncated?")
    splits = {}
    for name, usage in FER2013_USAGE.items():
        rows = table[table["Usage"] == usage]
        if rows.empty:
            raise DataError(f"--data {path}: no row with Usage {usage}.")
        if not rows["emotion"].isin(range(len(CLASSES))).all():
            raise DataError(f"--data {path}: an emotion outside 0..{len(CLASSES) - 1}.")
        images = [_face(text, path, row + 2) for row, text in rows["pixels"].items()]
        labels = torch.tensor(rows["emotion"].tolist(), dtype=torch.int64)
        splits[name] = Split(usage, torch.from_numpy(np.stack(images)), labels)
    return splits


def _face(text: object, path: Path, row: int) -> np.ndarray:
    try:
        face = np.array(str(text).split(), dtype=np.int64)
    except ValueError:
        face = np.empty(0, np.int64)
    if face.size != SIDE * SIDE or face.min() < 0 or face.max() > 255:
        raise DataError(f"--data {path}: row {row} does not hold {SIDE}x{SIDE} grey values; is it truncated?")
    return face.astype(np.uint8).reshape(SIDE, SIDE)


def to_input(images: Tensor) -> Tensor:
    """uint8 (n, 48, 48) -> float (n, 3, 48, 48) in -1..1, grey in all three channels."""
    return (images.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def augment(images: Tensor) -> Tensor:
    """A random place, tilt, size and mirror image, then light and a covered patch, of its own for every face.

    uint8 (n, 48, 48) -> float (n, 3, 48, 48). The kinds are the paper's, and mirroring; the strengths are ours.
    """
    x = to_input(images)
    n, device = len(x), x.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, device=device)

    tilt, size = uniform(-10, 10) * math.pi / 180, uniform(0.85, 1.1)
    mirror = 1 - 2 * (torch.rand(n, device=device) < 0.5).float()
    cos, sin = torch.cos(tilt) / size, torch.sin(tilt) / size
    rows = [mirror * cos, -sin, uniform(-0.1, 0.1), mirror * sin, cos, uniform(-0.1, 0.1)]
    where = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 1, SIDE, SIDE], align_corners=False)
    grey = F.grid_sample(x[:, :1], where, padding_mode="border", align_corners=False)
    grey = grey * uniform(0.75, 1.25).view(n, 1, 1, 1) + uniform(-0.2, 0.2).view(n, 1, 1, 1)
    place = torch.arange(SIDE, device=device)
    top, left, height, width = (uniform(a, b).view(n, 1) for a, b in ((0, 40), (0, 40), (4, 16), (4, 16)))
    covered = ((place >= top) & (place < top + height)).unsqueeze(2) & (
        (place >= left) & (place < left + width)
    ).unsqueeze(1)
    covered = covered & (torch.rand(n, 1, 1, device=device) < 0.5)
    return grey.masked_fill(covered.unsqueeze(1), 0.0).expand(-1, 3, -1, -1)
