"""What FER data sets share: classes, label orders, published counts, faces and splits."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cache import DataError, fingerprint, kept
from .pictures import decode

#: Class names in the order of each set's labels.
ORDERS = {
    "RAF-DB": ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral"),
    "AffectNet": ("neutral", "happy", "sad", "surprise", "fear", "disgust", "angry", "contempt"),
    "FER2013": ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"),
    "FER+": ("neutral", "happy", "surprise", "sad", "angry", "disgust", "fear", "contempt"),
}
#: The names of three of them in --label-order.
ORDER_NAMES = {"rafdb": "RAF-DB", "affectnet": "AffectNet", "fer2013": "FER2013"}
#: Synonyms of the expressions.
SYNONYMS = {
    "natural": "neutral",
    "happiness": "happy",
    "joy": "happy",
    "sadness": "sad",
    "surprised": "surprise",
    "suprise": "surprise",
    "fearful": "fear",
    "disgusted": "disgust",
    "anger": "angry",
    "contemptuous": "contempt",
}
EXPRESSIONS = frozenset(ORDERS["AffectNet"])

_AFFECTNET_TRAIN = (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750)
_FER2013_TRAIN = (3995, 436, 4097, 7215, 4830, 3171, 4965)
#: Faces per class, in the set's order, by the set's own split names.
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "RAF-DB": {"train": (1290, 281, 717, 4772, 1982, 705, 2524), "test": (329, 74, 160, 1185, 478, 162, 680)},
    "AffectNet": {
        "train": _AFFECTNET_TRAIN,
        "train_set": _AFFECTNET_TRAIN,
        "training": (74874, 134416, *_AFFECTNET_TRAIN[2:]),  # the original csv has one more happy face
        **dict.fromkeys(("val", "valid", "validation", "val_set"), (500,) * 8),
    },
    "FER2013": {
        "Training": _FER2013_TRAIN,
        "PublicTest": (467, 56, 496, 895, 653, 415, 607),
        "PrivateTest": (491, 55, 528, 879, 594, 416, 626),
        "train": _FER2013_TRAIN,  # the folders merge PublicTest and PrivateTest
        "test": (958, 111, 1024, 1774, 1247, 831, 1233),
    },
}


@dataclass(frozen=True)
class Split:
    """Faces and their labels, one row each.

    Fields:
        name: the set's own name for the split, or for a random split, what it was drawn from.
        images: uint8 (n, c, 48, 48), with c = 1 if the set is grey, else 3 (RGB).
        labels: int64 (n,).
        names: each face's file, relative to the set's folder, or "row 17" of its csv.
        mood: float32 (n, 2), valence and arousal in -1..1, if the set has them.
    """

    name: str
    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    mood: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Split:
        """Return the faces of these rows, int64 (m,), in that order."""
        if torch.equal(rows, torch.arange(len(self))):
            return self  # a copy would load the mapped faces into memory
        names = tuple(self.names[row] for row in rows.tolist())
        mood = None if self.mood is None else self.mood[rows]
        return Split(self.name, self.images[rows], self.labels[rows], names, mood)

    def limit(self, count: int | None) -> Split:
        """Return at most ``count`` faces, drawn with a fixed seed, in their original order."""
        return self.select(some(torch.arange(len(self)), count))

    def join(self, other: Split) -> Split:
        """Append the faces of ``other``; valence and arousal are kept if both have them."""
        mood = None if self.mood is None or other.mood is None else torch.cat([self.mood, other.mood])
        images, labels = torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels])
        return Split(f"{self.name} + {other.name}", images, labels, self.names + other.names, mood)

    def fingerprint(self) -> str:
        """Return a hash of the faces, names, labels and moods, in order."""
        digest = hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape"))
        for tensor in (self.images, self.labels, self.mood):
            if tensor is not None:
                digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Split:
        mood = None if self.mood is None else self.mood.to(device)
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device), mood=mood)


@dataclass(frozen=True)
class Faces:
    """A data set.

    Fields:
        name: "toy", "FER2013", "FER+", "RAF-DB", "AffectNet", or "folders".
        layout: a description of the layout found.
        classes: names in the order of the labels.
        splits: "train", "val", and "test" if the set has one.
        note: what to know when reading the results, in one clause.
        skipped: unreadable images that were left out, as "path: reason".
    """

    name: str
    layout: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    note: str
    skipped: tuple[str, ...] = ()

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each split."""
        return {name: split.fingerprint() for name, split in self.splits.items()}


@dataclass(frozen=True)
class Asked:
    """The user's options for reading: the label order, whether to reject unreadable images, where to cache."""

    label_order: str = ""
    strict: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class Listing:
    """A split whose pictures have not been read yet.

    Fields:
        name: the set's own name for it.
        files: n paths relative to the set's folder.
        labels: int64 (n,).
        boxes: int64 (n, 4), left, top, right, bottom in pixels, if faces must be cropped.
        mood: float32 (n, 2), if the set has it.
        lost: images already known to be unusable, as "path: reason".
    """

    name: str
    files: tuple[str, ...]
    labels: np.ndarray
    boxes: np.ndarray | None = None
    mood: np.ndarray | None = None
    lost: tuple[str, ...] = ()


def read_split(root: Path, listing: Listing, asked: Asked, grey: bool = False) -> tuple[Split, tuple[str, ...]]:
    """Return the faces of a listing, from the cache or decoded into it, and the images left out.

    Raises:
        DataError: If there are no faces, too many unreadable images, or the cache cannot be written.
    """
    if not listing.files:
        raise DataError(f"{root}: the split {listing.name} is empty.")
    key = fingerprint(root, listing.files, listing.labels, listing.boxes, grey)
    arrays = kept(asked.cache, key, lambda part: decode(root, listing.files, listing.boxes, grey, part))
    rows = arrays["rows"]
    unread = zip(arrays["lost"].tolist(), arrays["reasons"].tolist(), strict=True)
    skipped = (*listing.lost, *(f"{listing.files[row]}: {reason}" for row, reason in unread))
    total = len(listing.files) + len(listing.lost)
    if skipped and (asked.strict or len(skipped) > 0.01 * total):
        raise DataError(f"{root}: {len(skipped)} of {total} images of {listing.name} are unreadable; {skipped[0]}.")
    names = tuple(listing.files[row] for row in rows.tolist())
    mood = None if listing.mood is None else torch.from_numpy(listing.mood[rows])
    labels = torch.from_numpy(listing.labels[rows])
    return Split(listing.name, torch.from_numpy(arrays["faces"]), labels, names, mood), skipped


def some(rows: Tensor, count: int | None) -> Tensor:
    """Return at most ``count`` of the rows, drawn with a fixed seed, in their original order, (n,) -> (m,)."""
    if count is None or count >= len(rows):
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return rows[drawn.sort().values]


def canonical(name: str) -> str:
    """Return the usual name of an expression; other names are only stripped of spaces."""
    plain = name.strip().casefold()
    plain = SYNONYMS.get(plain, plain)
    return plain if plain in EXPRESSIONS else name.strip()


def order_asked(label_order: str) -> tuple[str, ...]:
    """Return the classes of --label-order: those of a set, or those listed; empty if it was not given.

    Raises:
        DataError: If a name occurs twice, or a single name is not a set's.
    """
    if label_order.strip().lower() in ORDER_NAMES:
        return ORDERS[ORDER_NAMES[label_order.strip().lower()]]
    names = tuple(canonical(name) for name in label_order.split(",") if name.strip())
    if len(set(names)) != len(names) or len(names) == 1:
        sets = ", ".join(ORDER_NAMES)
        raise DataError(f"--label-order {label_order}: it must be {sets}, or the class names, each once, with commas.")
    return names
