"""Face detectors whose weights come in a package: how many faces they find, and what the network makes of their crops.

    pip download --no-deps --dest peers facenet-pytorch==2.6.0 && unzip -d peers/mtcnn peers/facenet_pytorch*.whl
    python benchmarks/detectors.py --mtcnn peers/mtcnn --data fer2013.npz --backgrounds cifar10_jpeg.npz

Each scene is a FER2013 face of PrivateTest, enlarged to 144 pixels and pasted into a CIFAR-10 picture of 288 pixels,
upright or tilted by 20 degrees. A face is found if a box overlaps it by at least 0.4 (intersection over union). The
shipped network then predicts, with ten views, from the box that overlaps most. Results: results/detectors.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pages import line
from timing import commit, machine
from worth import ROOT  # which puts examples/fer48 on the path

import cifar  # isort: skip
from batches import to_input  # isort: skip
from data.pictures import shrink  # isort: skip
from detecting import Cascade, Mtcnn  # isort: skip
from keeping import load_model  # isort: skip
from predict import WEIGHTS  # isort: skip

STORED = ROOT / "benchmarks" / "results" / "detectors.json"
FACE, SCENE, TILTS, OVERLAP = 144, 288, (0, 20), 0.4
Box = tuple[int, int, int, int]
Find = Callable[[np.ndarray], list[Box]]


def scene(face: np.ndarray, background: np.ndarray, tilt: float, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
    """Return an RGB picture, uint8 (288, 288, 3), and the box of its face."""
    picture = Image.fromarray(background).resize((SCENE, SCENE), Image.Resampling.BICUBIC)
    pasted = Image.fromarray(face).resize((FACE, FACE), Image.Resampling.BICUBIC).convert("RGB").convert("RGBA")
    pasted = pasted.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
    left, top = rng.integers(0, SCENE - pasted.width, 2)
    picture.paste(pasted, (int(left), int(top)), pasted)
    margin = (pasted.width - FACE) // 2
    left, top = int(left) + margin, int(top) + margin
    return np.asarray(picture), (left, top, left + FACE, top + FACE)


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over the union of two boxes."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(0, width) * max(0, height)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (area - shared)


def measure(find: Find, scenes: list[tuple[np.ndarray, Box]], labels: np.ndarray, model: Any) -> dict[str, float]:
    found, extra, times, crops = 0, 0, [], []
    for picture, box in scenes:
        start = time.perf_counter()
        boxes = find(picture)
        times.append(1e3 * (time.perf_counter() - start))
        best = max(boxes, key=lambda other: overlap(other, box), default=(0, 0, 1, 1))
        hit = overlap(best, box) >= OVERLAP
        found, extra = found + hit, extra + len(boxes) - hit
        crops.append(np.asarray(shrink(picture, best)).transpose(2, 0, 1) if hit else None)
    kept = [i for i, crop in enumerate(crops) if crop is not None]
    with torch.no_grad():
        votes = [
            model(to_input(torch.from_numpy(np.stack([crops[i] for i in some])))) for some in np.array_split(kept, 8)
        ]
    right = int((torch.cat(votes).argmax(1).numpy() == labels[kept]).sum())
    return {
        "found": found / len(scenes), "extra": extra / len(scenes), "accuracy": right / len(scenes),
        "accuracy_found": right / max(1, found), "ms": statistics.median(times),
    }  # fmt: skip


def table(stored: dict[str, Any]) -> str:
    """Return the table of docs/comparison.md."""
    head = (
        "detector",
        "tilt",
        "faces found, %",
        "false boxes per picture",
        "accuracy on the faces found, %",
        "ms per picture",
    )
    lines = [line(*head), "|---|" + 5 * "---:|"]
    for row in stored["rows"]:
        cells = f"{100 * row['found']:.1f}", f"{row['extra']:.2f}", f"{100 * row['accuracy_found']:.1f}"
        lines.append(line(row["name"], f"{row['tilt']}°", *cells, f"{row['ms']:.1f}"))
    return "\n".join(lines)


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mtcnn", required=True, type=Path, metavar="FOLDER", help="the unpacked package")
    parser.add_argument("--data", required=True, metavar="FILE", help="FER2013, .npz")
    parser.add_argument("--backgrounds", required=True, metavar="FILE", help="CIFAR-10, .npz of JPEGs")
    parser.add_argument("--faces", type=int, default=700)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.data, allow_pickle=False) as arrays:
        test = np.flatnonzero(arrays["usage"] == "PrivateTest")
        rng = np.random.default_rng(0)
        chosen = rng.choice(test, options.faces, replace=False)
        faces, labels = arrays["images"][chosen], arrays["labels"][chosen]
    backgrounds = cifar.read_pictures(options.backgrounds, "test")[0].permute(0, 2, 3, 1).numpy()
    model = load_model(WEIGHTS)[0]
    import cv2

    cv2.setNumThreads(1)
    sys.path.insert(0, str(options.mtcnn))
    finders = {"OpenCV's Haar cascade": Cascade().boxes, "facenet-pytorch's MTCNN": Mtcnn().boxes}
    rows = []
    for tilt in TILTS:
        scenes = [scene(face, backgrounds[rng.integers(len(backgrounds))], tilt, rng) for face in faces]
        boxes = iter([box for _, box in scenes])
        whole = lambda picture, boxes=boxes: [next(boxes)]  # noqa: E731
        for name, find in {"the true box": whole, **finders}.items():
            rows.append({"name": name, "tilt": tilt, **measure(find, scenes, labels, model)})
            print(rows[-1], flush=True)
    versions = {"torch": torch.__version__, "opencv": cv2.__version__, "python": platform.python_version()}
    here = {"machine": machine(torch.device("cpu")), "versions": versions, "commit": commit(), "faces": options.faces}
    STORED.write_text(json.dumps({"rows": rows, **here}, indent=1) + "\n")
    print(table({"rows": rows}))


if __name__ == "__main__":
    main()
