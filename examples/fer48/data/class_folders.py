"""Class folders, ``{train,val,test}/CLASS/*``: recognise the data set and its classes, and read the faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .cache import DataError
from .fer_csv import header, tables
from .sources import EXPRESSIONS, ORDERS, PUBLISHED, Asked, Faces, Listing, Split, canonical, order_asked, read_split
from .toy import SIDE

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
#: Possible names of the split folders.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
NOTES = {
    "RAF-DB": "the test split is the official one",
    "AffectNet": "the official validation faces are the test; none of them chooses anything",
    "FER2013": "the folders merge PublicTest and PrivateTest, so the test split is not PrivateTest",
}
#: Files relative to the set's folder, by split and class folder (its number or canonical name).
Found = dict[str, dict[str, list[str]]]


def missing(root: Path) -> Path | None:
    """Return what is missing for this layout: the folder ``train``, or None."""
    return root / "train" if split_folder(root, SPLITS["train"]) is None else None


def split_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    inside = sorted(root.iterdir()) if root.is_dir() else []
    return next((child for child in inside if child.name.lower() in names and child.is_dir()), None)


def read(root: Path, asked: Asked) -> Faces:
    """Read the faces of the class folders.

    Raises:
        DataError: If splits have different classes, two folders have one class, or the labels' order is unknown.
    """
    folders = {key: folder for key, names in SPLITS.items() if (folder := split_folder(root, names))}
    found = {key: classes_in(folder) for key, folder in folders.items()}
    for key, inside in found.items():
        if set(inside) != set(found["train"]):
            theirs, ours = ", ".join(inside) or "none", ", ".join(found["train"]) or "none"
            raise DataError(f"{root}: {folders[key].name} has the classes {theirs}, but train has {ours}.")
    name, keys, classes = recognise(root, found, asked)
    names = {key: folder.name for key, folder in folders.items()}
    if name == "AffectNet" and "test" not in found and "val" in found:
        found["test"], names["test"] = found.pop("val"), names.pop("val")
    splits: dict[str, Split] = {}
    skipped: list[str] = []
    firsts = [file for of_class in found.values() for folder in keys for file in of_class[folder][:1]]
    grey = name == "FER2013" and all(small_and_grey(root / file) for file in firsts)
    for key, of_class in found.items():
        files = tuple(file for folder in keys for file in of_class[folder])
        labels = np.repeat(np.arange(len(keys)), [len(of_class[folder]) for folder in keys])
        if keys == tuple("1234567"):
            check_labels_csv(root, key, files, labels)
        splits[key], lost = read_split(root, Listing(names[key], files, labels), asked, grey)
        skipped += lost
    layout = f"class folders {keys[0]} to {keys[-1]} in {', '.join(names.values())}"
    return Faces(name, layout, classes, splits, note_of(name, classes, splits), tuple(skipped))


def note_of(name: str, classes: tuple[str, ...], splits: dict[str, Split]) -> str:
    """Return the note to print with the results, which depends on the splits."""
    if name in NOTES and set(splits) == {"train", "test"}:
        return NOTES[name]
    parts = ["class folders of an unknown set"] if name == "folders" else ["splits of somebody's own"]
    parts += [f"{splits['val'].name} chooses the epoch"] if "val" in splits else []
    parts += [] if "test" in splits else ["no test faces"]
    if name == "folders" and set(splits) == {"train", "val"} and set(classes) <= EXPRESSIONS:
        parts.append("if this is AffectNet, --label-order affectnet makes its validation faces the test")
    return "; ".join(parts)


def classes_in(folder: Path) -> dict[str, list[str]]:
    """Return the files of a split by class folder, its number or canonical name."""
    found: dict[str, list[str]] = {}
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        name = canonical(child.name)
        if name in found:
            raise DataError(f"{child}: a second folder of the class {name}.")
        found[name] = [f"{folder.name}/{child.name}/{file}" for file in pictures_in(child)]
    return found


def pictures_in(folder: Path) -> list[str]:
    """Return the sorted names of the pictures in a folder."""
    return sorted(path.name for path in folder.iterdir() if is_picture(path))


def is_picture(path: Path) -> bool:
    """Return whether the file is a picture; names that begin with a dot are files of the operating system."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def recognise(root: Path, found: Found, asked: Asked) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return the data set's name, its folders in label order, and their classes.

    Raises:
        DataError: If there is no class folder, or the label order is needed, or the one given does not fit.
    """
    sizes = {folder: len(files) for folder, files in found["train"].items()}
    if not sizes:
        raise DataError(f"{root / 'train'}: no class folder in it.")
    told = order_asked(asked.label_order)
    keys = tuple(sorted(sizes))
    if keys in (tuple("1234567"), tuple("01234567"), tuple("0123456")):
        name, classes = numbered(root, keys, found, told)
        return name, keys, classes
    name = named(root, found)
    if name == "folders" and set(sizes) <= EXPRESSIONS:  # named folders need no order, but it identifies the set
        sets = (one for one in PUBLISHED if told and told in (ORDERS[one], ORDERS[one][: len(sizes)]))
        name = next((one for one in sets if fits(one, found)), name)
    known = ORDERS.get(name, ())
    classes = told[: len(keys)] if told else tuple(c for c in known if c in sizes) if known else keys
    if set(classes) != set(keys):
        raise DataError(f"--label-order {asked.label_order}: it names {', '.join(told)}; train has {', '.join(keys)}.")
    return name, classes, classes


def numbered(root: Path, keys: tuple[str, ...], found: Found, told: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the set and classes of numbered folders: 1..7 is RAF-DB, 0..7 AffectNet; 0..6 depends on the counts."""
    sizes = [len(found["train"][folder]) for folder in keys]
    by_count = [
        (name, ORDERS[order][: len(keys)])
        for name in PUBLISHED
        for order in PUBLISHED
        if sizes == [published(name).get(expression) for expression in ORDERS[order][: len(keys)]]
    ]
    if told:
        if len(told) != len(keys) and told != ORDERS["AffectNet"]:
            raise DataError(
                f"{root}: --label-order names {len(told)} classes; train has {len(keys)}: {', '.join(keys)}."
            )
        classes = told[: len(keys)]
        names = [name for name, _ in by_count] or [name for name in PUBLISHED if ORDERS[name][: len(keys)] == classes]
        return next((name for name in names if fits(name, found)), "folders"), classes
    if keys[0] == "1":
        return "RAF-DB", ORDERS["RAF-DB"]
    if len(keys) == 8:
        return "AffectNet", ORDERS["AffectNet"]
    if len(by_count) != 1:
        shown = ", ".join(f"{folder}: {size:,}" for folder, size in zip(keys, sizes, strict=True))
        raise DataError(
            f"{root}: the numbers of faces ({shown}) do not tell which classes the folders 0..6 are; give "
            "--label-order: rafdb, affectnet, fer2013, or seven names with commas."
        )
    return by_count[0]


def fits(name: str, found: Found) -> bool:
    """Return whether the splits fit: AffectNet has no test folder, the others have one."""
    return ("test" not in found) == (name == "AffectNet")


def published(name: str) -> dict[str, int]:
    """Return a set's published number of training faces per class."""
    return dict(zip(ORDERS[name], PUBLISHED[name]["train"], strict=True))


def named(root: Path, found: Found) -> str:
    """Return the set of named folders, recognised by the counts, by contempt, or by the look of a face."""
    sizes = {folder: len(files) for folder, files in found["train"].items()}
    if not set(sizes) <= EXPRESSIONS:
        return "folders"
    for name in PUBLISHED:
        if all(published(name).get(expression) == size for expression, size in sizes.items()):
            return name
    if "contempt" in sizes and "val" in found and fits("AffectNet", found):
        return "AffectNet"
    first = next((file for files in found["train"].values() for file in files), "")
    return "FER2013" if set(sizes) == set(ORDERS["FER2013"]) and small_and_grey(root / first) else "folders"


def small_and_grey(path: Path) -> bool:
    """Return whether a picture is grey and 48x48, as in FER2013."""
    try:
        with Image.open(path) as picture:
            return picture.size == (SIDE, SIDE) and picture.mode == "L"
    except (OSError, ValueError):
        return False


def check_labels_csv(root: Path, key: str, files: tuple[str, ...], labels: np.ndarray) -> None:
    """Check RAF-DB's folders against the labels in its csv.

    Raises:
        DataError: If an image has another label there.
    """
    path = root / f"{key}_labels.csv"
    if not path.is_file():
        return
    if not {"image", "label"} <= header(path):
        raise DataError(f"{path}: no columns image and label.")
    said = {image: label for table in tables(path) for image, label in zip(table["image"], table["label"], strict=True)}
    for file, label in zip(files, labels.tolist(), strict=True):
        other = said.get(file.rpartition("/")[2], str(label + 1))
        if other != str(label + 1):
            raise DataError(f"{path}: {file} has the label {other} there, but lies in folder {label + 1}.")
