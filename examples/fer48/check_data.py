"""Check a data set before training: its layout, faces per class against the published counts, copies, some faces.

    python examples/fer48/check_data.py fer2013.csv
    python examples/fer48/check_data.py RAF-DB --label-order rafdb --sheet faces.png

Exit code 1: the counts differ from the published ones, or the data cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from data import DataError, Faces, published
from data.sources import ORDERS, PUBLISHED

COLUMNS = 10


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        faces = published(
            options.path, label_order=options.label_order, contempt=options.contempt, strict=options.strict,
            cache=Path(options.cache) if options.cache else None,
        )  # fmt: skip
        differences = report(faces)
        draw_sheet(faces, Path(options.sheet))
    except (DataError, OSError) as error:
        sys.exit(f"check_data.py: {error}")
    print(f"\n{Path(options.sheet).resolve()}: up to {COLUMNS} training faces of each class")
    if differences:
        sys.exit("check_data.py: not as published: " + "; ".join(differences))


def report(faces: Faces) -> list[str]:
    """Print the report; return a description of each count that differs from the published one."""
    print(f"{faces.name} ({faces.layout}); {faces.note}.\n")
    differences = print_counts(faces)
    print(f"\nLeft out as unreadable: {len(faces.skipped)}")
    for line in faces.skipped[:20]:
        print(f"  {line}")
    if len(faces.skipped) > 20:
        print(f"  and {len(faces.skipped) - 20} more")
    print_copies(faces)
    return differences


def print_counts(faces: Faces) -> list[str]:
    """Print a row per class and a column per split, each cell the count found and, if different, / the published."""
    differences: list[str] = []
    table = [["", *(split.name for split in faces.splits.values())]]
    table += [[name] for name in [*faces.classes, "all"]]
    for split in faces.splits.values():
        found = np.bincount(split.labels.numpy(), minlength=len(faces.classes)).tolist()
        expected = expected_counts(faces, split.name)
        wanted = [None] * (len(found) + 1) if expected is None else [*expected, sum(expected)]
        for row, count, right in zip(table[1:], [*found, sum(found)], wanted, strict=True):
            same = right is None or count == right
            row.append(f"{count:,}" if same else f"{count:,} / {right:,}")
            if not same and row[0] != "all":
                differences.append(f"{split.name} {row[0]} {count:,}, published {right:,}")
        table[0][len(table[1]) - 1] += " (nothing published)" if expected is None else ""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        print("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))
    return differences


def expected_counts(faces: Faces, split: str) -> list[int] | None:
    """Return the published counts of a split in the order of the classes, or None if unknown."""
    numbers = PUBLISHED.get(faces.name, {}).get(split)
    if numbers is None:
        return None
    by_class = dict(zip(ORDERS[faces.name], numbers, strict=True))
    return [by_class[name] for name in faces.classes]


def print_copies(faces: Faces) -> None:
    """Print how many faces are pixel-identical to one in an earlier split, and how many have a single colour."""
    hashes = {split.name: [hashlib.sha256(image.tobytes()).digest() for image in split.images.numpy()]
              for split in faces.splits.values()}  # fmt: skip
    print("\nExact copies across splits:")
    for earlier, later in itertools.combinations(hashes, 2):
        known = set(hashes[earlier])
        print(f"  {sum(image in known for image in hashes[later]):,} images of {later} are copies of one in {earlier}")
    print(f"Constant images: {sum(constant(split.images) for split in faces.splits.values()):,}")


def constant(images: Tensor) -> int:
    """Count the images (n, c, H, W) of a single colour."""
    return sum(int((part == part[:, :, :1, :1]).flatten(1).all(1).sum()) for part in images.split(4096))


def draw_sheet(faces: Faces, path: Path) -> None:
    """Draw a picture of random training faces, a row per class, with a fixed seed."""
    train, rng = faces.splits["train"], np.random.default_rng(0)
    figure = Figure(figsize=(COLUMNS * 0.9 + 1.2, len(faces.classes) * 0.9 + 0.5), layout="compressed")
    axes = figure.subplots(len(faces.classes), COLUMNS, squeeze=False)
    for label, (name, row) in enumerate(zip(faces.classes, axes, strict=True)):
        members = np.flatnonzero(train.labels.numpy() == label)
        for place in row:
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        for place, chosen in zip(row, rng.permutation(members)[:COLUMNS], strict=False):
            image = train.images[int(chosen)].permute(1, 2, 0).numpy()
            place.imshow(image, cmap="gray", vmin=0, vmax=255)
        row[0].set_ylabel(f"{label} {name}", rotation=0, ha="right", va="center")
    figure.suptitle(f"{faces.name}, {train.name}")
    figure.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="toy, a csv, or a folder")
    add(
        "--label-order",
        default="",
        metavar="SET|NAMES",
        help="classes of folders 0..6: rafdb, affectnet, fer2013, names",
    )
    add("--contempt", action="store_true", help="keep that class, if the set has it")
    add("--strict", action="store_true", help="reject a set with any unreadable image")
    add("--cache", default="", metavar="FOLDER", help="where to cache decoded faces; default: the user's cache folder")
    add("--sheet", default="check_data.png", metavar="FILE", help="where to draw sample faces")
    options = parser.parse_args(argv)
    if Path(options.sheet).suffix.lower() not in (".png", ".jpg", ".pdf"):
        parser.error(f"--sheet {options.sheet}: a picture's name ends in .png, .jpg or .pdf")
    return options


if __name__ == "__main__":
    main()
