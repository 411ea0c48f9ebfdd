"""Faces for training, with a validation split: toy faces, or a data set on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cache import DataError
from .layouts import find, told
from .sources import Asked, Faces, Split, some
from .toy import CLASSES, toy_faces

__all__ = ["TOY_SIZES", "DataError", "Faces", "Split", "load", "published"]

TOY_SIZES = {"train": 2800, "val": 700, "test": 700}
DROPPED = "contempt"


def load(
    data: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    validation: float = 0.1,
    split_seed: int = 0,
    label_order: str = "",
    contempt: bool = False,
    strict: bool = False,
    cache: Path | None = None,
) -> Faces:
    """Load the faces of ``data``, with splits "train", "val" and, if the set has one, "test".

    Args:
        data: "toy", or the path of a csv or a folder; see check_data.py.
        limit: at most this many faces per split, drawn after the validation split.
        seed: the seed of the toy faces, used for nothing else.
        validation: how many faces of each class to move from "train" to "val" if the set has no "val": a share, or,
            from 1 on, a number.
        split_seed: the seed of that validation split.
        label_order: the classes of numbered folders: rafdb, affectnet, fer2013, or names separated by commas.
        contempt: keep that class, if the set has it.
        strict: reject a set with any unreadable image, instead of one with more than 1 % in a split.
        cache: where to cache decoded faces; by default the user's cache folder.

    Raises:
        DataError: If the data cannot be used.
    """
    faces, rows = _read(data, seed, contempt, Asked(label_order, strict, cache))
    if "val" not in faces.splits:
        faces, rows = _with_validation(faces, rows, validation, split_seed)
    chosen = {name: split.select(some(rows[name], limit)) for name, split in faces.splits.items()}
    return dataclasses.replace(faces, splits=chosen)


def published(
    data: str,
    *,
    seed: int = 0,
    label_order: str = "",
    contempt: bool = False,
    strict: bool = False,
    cache: Path | None = None,
) -> Faces:
    """Return the set with its published splits, complete; see ``load`` for the arguments.

    Raises:
        DataError: If the data cannot be used.
    """
    faces, rows = _read(data, seed, contempt, Asked(label_order, strict, cache))
    splits = {name: split.select(rows[name]) for name, split in faces.splits.items()}
    return dataclasses.replace(faces, splits=splits)


def _read(data: str, seed: int, contempt: bool, asked: Asked) -> tuple[Faces, dict[str, Tensor]]:
    """Return the complete set and the rows of each split to use; selecting faces would copy them into memory."""
    faces = told(_toy(seed), asked) if data == "toy" else find(Path(data).expanduser(), asked)
    rows = {name: torch.arange(len(split)) for name, split in faces.splits.items()}
    if not contempt and DROPPED in faces.classes:
        rows = {name: rows[name][split.labels != faces.classes.index(DROPPED)] for name, split in faces.splits.items()}
        faces = _without(faces, DROPPED)
    for name, split in faces.splits.items():
        if len(rows[name]) == 0:
            raise DataError(f"{data}: the split {split.name} is empty.")
    return faces, rows


def _without(faces: Faces, dropped: str) -> Faces:
    """Remove a class and renumber the labels; the labels of its own faces become meaningless."""
    place = faces.classes.index(dropped)
    splits = {
        name: dataclasses.replace(split, labels=split.labels - (split.labels > place).long())
        for name, split in faces.splits.items()
    }
    classes = tuple(name for name in faces.classes if name != dropped)
    return dataclasses.replace(faces, classes=classes, splits=splits, note=f"{faces.note}; without {dropped}")


def _with_validation(
    faces: Faces, rows: dict[str, Tensor], validation: float, split_seed: int
) -> tuple[Faces, dict[str, Tensor]]:
    """Add a split "val" on the same faces as "train", and return the rows of each."""
    train, test = faces.splits["train"], {key: split for key, split in faces.splits.items() if key == "test"}
    left, taken = draw(train.labels[rows["train"]], faces.classes, validation, split_seed)
    amount = f"{100 * validation:g} %" if validation < 1 else f"{validation:g} a class"
    splits = {"train": train, "val": dataclasses.replace(train, name=f"{amount} of {train.name}"), **test}
    note = f"{faces.note}; validation faces drawn from {train.name} by --split-seed {split_seed}"
    rows = {**rows, "train": rows["train"][left], "val": rows["train"][taken]}
    return dataclasses.replace(faces, splits=splits, note=note), rows


def draw(labels: Tensor, classes: tuple[str, ...], validation: float, split_seed: int) -> tuple[Tensor, Tensor]:
    """Split labels (n,) into the rows that stay in train and the validation rows, each in order.

    Raises:
        DataError: If ``validation`` is not valid, or would leave a class without a face on either side.
    """
    if validation <= 0 or (validation >= 1 and validation != int(validation)):
        raise DataError(
            f"--validation {validation:g}: it must be a share between 0 and 1, or a whole number of faces per class."
        )
    taken = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels.numpy() == label)
        count = int(validation) if validation >= 1 else round(validation * len(members))
        if not 0 < count < len(members):
            raise DataError(
                f"--validation {validation:g}: the class {name} has {len(members)} training faces, and {count} of them "
                "would become validation faces; both sides need at least one."
            )
        taken.append(np.random.default_rng([split_seed, label]).permutation(members)[:count])
    chosen = np.sort(np.concatenate(taken))
    return torch.from_numpy(np.setdiff1d(np.arange(len(labels)), chosen)), torch.from_numpy(chosen)


def _toy(seed: int) -> Faces:
    splits = {name: _toy_split(name, size, seed) for name, size in TOY_SIZES.items()}
    note = "synthetic faces drawn by code: the figures say nothing about real faces"
    return Faces("toy", "drawn by code", CLASSES, splits, note)


def _toy_split(name: str, size: int, seed: int) -> Split:
    images, labels = toy_faces(size, seed=3 * seed + list(TOY_SIZES).index(name))
    names = tuple(f"{name} {number}" for number in range(size))
    return Split(name, torch.from_numpy(images)[:, None], torch.from_numpy(labels), names)
