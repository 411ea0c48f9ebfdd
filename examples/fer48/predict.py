"""Predict with a finished network: each face's class, its probability, and how many of the ten views agree.

    python examples/fer48/predict.py --detect photo.jpg --views pictures/
    python examples/fer48/predict.py face.jpg faces/ --csv faces.csv
    python examples/fer48/predict.py --webcam
    python examples/fer48/predict.py --model runs/RAF-DB-layer1-0 face.jpg

The default model is in examples/fer48/weights, trained on FER2013. Each picture should be a cropped face; --detect
finds the faces first (pip install cropvote[detect]).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import cropvote
from batches import to_input
from cropvote import vote
from cropvote.plots import plot_views
from data.class_folders import SUFFIXES, is_picture
from data.pictures import MAX_PIXELS, ReadError, read_picture, shrink
from detecting import DetectError, Detector, best_detector, watch
from keeping import KeptError, load_model
from learner import look
from machines import Machine, MachineError, machine

#: The network that comes with this example.
WEIGHTS = Path(__file__).parent / "weights"
#: The batch size.
BATCH = 256
#: From this many faces on, warn if all get the same class.
MANY = 5
#: The problem of a picture that can be read but shows no face.
NO_FACE = "no face found"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Face:
    """A face, RGB uint8 (3, 48, 48), with its source, or the reason why there is none."""

    source: str
    pixels: np.ndarray | None
    box: tuple[int, int, int, int] | None = None
    problem: str = ""


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        with machine(options.device) as here:
            model, card = load_model(options.model)
            model = model.to(here.device)
            print(describe(card), file=sys.stderr)
            detector = best_detector() if options.detect or options.webcam is not None else None
            if options.webcam is not None and detector is not None:
                return show(model, card, here, detector, options.webcam)
            failed, found = write(model, card, here, detector, options)
    except (KeptError, MachineError, DetectError, cropvote.CropVoteError, OSError) as error:
        sys.exit(f"predict.py: {error}")
    if options.csv:
        print(f"{options.csv}: {found} of {failed + found}", file=sys.stderr)
    if failed:
        sys.exit(f"predict.py: {failed} of {failed + found} without a prediction, each named above.")
    return None


def write(
    model: nn.Module, card: dict[str, Any], here: Machine, detector: Detector | None, options: argparse.Namespace
) -> tuple[int, int]:
    """Write a line or csv row, and a picture if asked, for every face; return the counts of failed and predicted."""
    paths = pictures_in(options.images)
    if options.views:
        if card["after"] == "none":
            raise KeptError(f"--views: the network in {card['folder']} does not vote.")
        Path(options.views).mkdir(parents=True, exist_ok=True)
    columns = ["image", "box", *answers(card), "problem"]
    failed = found = 0
    answered: set[str] = set()
    with ExitStack() as stack:
        table = None
        if options.csv:
            table = csv.DictWriter(
                stack.enter_context(
                    Path(options.csv).open("w", newline="", encoding="utf-8", errors="surrogateescape")
                ),
                columns,
            )
            table.writeheader()
        bar = stack.enter_context(tqdm(total=len(paths), unit=" pictures", disable=None if len(paths) > 1 else True))
        for faces in batched(faces_in(paths, detector, bar), BATCH):
            for face, row in zip(faces, predict(model, card, faces, here), strict=True):
                failed, found = failed + bool(face.problem), found + (not face.problem)
                answered.update([row["class"]] if "class" in row else [])
                where = ",".join(map(str, face.box)) if face.box else ""
                if table is not None:
                    table.writerow({"image": face.source, "box": where, **row, "problem": face.problem})
                if table is None or face.problem:
                    bar.write(in_words(face, row, card), file=sys.stderr if face.problem else sys.stdout)
                if options.views and face.pixels is not None:
                    draw(model, card, face, here, Path(options.views), found)
    if found >= MANY and len(answered) == 1:
        print(
            f"all {found} faces are {answered.pop()}: a network that gives every face the same answer says nothing, "
            f"and neither do ten views that agree on it.",
            file=sys.stderr,
        )
    return failed, found


def describe(card: dict[str, Any]) -> str:
    """Describe what a network was trained on and how accurate it is."""
    data = "toy faces, drawn by code: it knows nothing of real ones" if card["data"] == "toy" else card["data"]
    return f"network: {card['folder']}, trained on {data}; {card['summary']}"


def predict(model: nn.Module, card: dict[str, Any], faces: list[Face], here: Machine) -> list[dict[str, Any]]:
    """Return each face's prediction as a dict with the keys of ``answers``, empty if it could not be read."""
    pixels = [face.pixels for face in faces if face.pixels is not None]
    if not pixels:
        return [{} for _ in faces]
    x = to_input(torch.from_numpy(np.stack(pixels)).to(here.device))
    rows = iter(read_rows(look(model, x, here, card["after"] != "none").cpu(), card))
    return [next(rows) if face.pixels is not None else {} for face in faces]


def read_rows(logits: Tensor, card: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn logits (n, v, k) into n rows: class, probability, agreement, all probabilities; or valence and arousal."""
    outputs, views = card["outputs"], logits.shape[1]
    voted = vote(logits.flatten(0, 1), views, card["vote"])
    if card["target"] != "expression":
        return [{name: round(float(value), 4) for name, value in zip(outputs, row, strict=True)} for row in voted]
    shares = (voted / card.get("temperature", 1.0)).softmax(1)  # calibrated, if the card has a temperature
    agreed = (logits.argmax(2) == voted.argmax(1, keepdim=True)).double().mean(1)  # with the vote
    return [
        {
            "class": outputs[int(share.argmax())],
            "probability": round(float(share.max()), 4),
            "agreement": round(float(same), 4),
            **{name: round(float(value), 4) for name, value in zip(outputs, share, strict=True)},
        }
        for share, same in zip(shares, agreed, strict=True)
    ]


def answers(card: dict[str, Any]) -> list[str]:
    """Return the columns of a prediction."""
    return [*(["class", "probability", "agreement"] if card["target"] == "expression" else []), *card["outputs"]]


def in_words(face: Face, row: dict[str, Any], card: dict[str, Any]) -> str:
    name = face.source.encode(errors="surrogateescape").decode(errors="replace")
    where = name + (f" [{','.join(map(str, face.box))}]" if face.box else "")
    if face.problem:
        return f"{where}: {face.problem}"
    if "class" not in row:
        return f"{where}: " + ", ".join(f"{name} {row[name]:+.2f}" for name in card["outputs"])
    views = "" if card["after"] == "none" else f", {round(10 * row['agreement'])} of 10 views agree"
    return f"{where}: {row['class']} {100 * row['probability']:.0f} %{views}"


def pictures_in(images: list[str]) -> list[Path]:
    """Return the given files, and all pictures in the given folders, in alphabetical order."""
    paths: list[Path] = []
    for image in map(Path, images):
        if image.is_dir():
            inside = sorted(path for path in image.rglob("*") if is_picture(path))
            if not inside:
                raise DetectError(f"{image}: no picture in this folder ({', '.join(sorted(SUFFIXES))}).")
            paths += inside
        else:
            paths.append(image)
    return paths


def faces_in(paths: Iterable[Path], detector: Detector | None, bar: Any) -> Iterator[Face]:
    """Yield every picture's faces."""
    for path in paths:
        yield from read_faces(path, detector, source=str(path))
        bar.update()


def read_faces(
    picture: Path | IO[bytes], detector: Detector | None, *, source: str, max_pixels: int = MAX_PIXELS
) -> list[Face]:
    """Return a picture's faces; an unreadable picture, or one without a face, gives a Face with a problem."""
    try:
        image = read_picture(picture, max_pixels=max_pixels)
    except ReadError as error:
        return [Face(source, None, problem=str(error))]
    boxes = [None] if detector is None else detector.boxes(np.asarray(image))
    faces = [Face(source, np.asarray(shrink(image, box)).transpose(2, 0, 1), box) for box in boxes]
    return faces or [Face(source, None, problem=NO_FACE)]


def batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while some := list(islice(items, size)):
        yield some


def draw(model: nn.Module, card: dict[str, Any], face: Face, here: Machine, folder: Path, number: int) -> None:
    """Draw the ten views of a face with their predictions."""
    x = to_input(torch.from_numpy(np.array(face.pixels)[None]).to(here.device))
    path = folder / f"{number:05d}-{Path(face.source).stem}.png"
    plot_views(model, x[0], path, classes=card["outputs"], denormalise=lambda image: (image + 1) / 2)


def show(model: nn.Module, card: dict[str, Any], here: Machine, detector: Detector, source: str) -> None:
    """Print one terminal line, rewritten with every frame, until Ctrl+C or the end of a video."""
    live = sys.stdout.isatty()
    for number, frame in enumerate(watch(source)):
        boxes = detector.boxes(frame)
        cut = [np.asarray(shrink(frame, box)).transpose(2, 0, 1) for box in boxes]
        faces = [Face(f"frame {number}", pixels, box) for pixels, box in zip(cut, boxes, strict=True)]
        said = [in_words(face, row, card) for face, row in zip(faces, predict(model, card, faces, here), strict=True)]
        line = "; ".join(said) or f"frame {number}: no face found"
        print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", flush=True)
    if live:
        print()


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER", help="pictures, or folders of them")
    add("--model", default=str(WEIGHTS), metavar="RUN", help="a finished run's folder, or its model.safetensors")
    add("--csv", metavar="FILE", help="write a row per face to this file, instead of printing lines")
    add("--views", metavar="FOLDER", help="draw each face's ten views with their predictions")
    add("--detect", action="store_true", help="detect faces in the pictures first")
    add(
        "--webcam", nargs="?", const="0", metavar="NUMBER|FILM", help="a camera (0 is the first) or video; Ctrl+C stops"
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = parser.parse_args(argv)
    if bool(options.images) == (options.webcam is not None):
        parser.error("give either pictures or folders, or --webcam")
    if options.webcam is not None and (options.csv or options.views):
        parser.error("--webcam only prints; it does not work with --csv or --views")
    return options


if __name__ == "__main__":
    main()
