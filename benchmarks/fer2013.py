"""Measure what voting inside the network gains on FER2013: docs/results.md.

    python benchmarks/fer2013.py tune --data fer2013.csv      on a GPU: compare recipes on PublicTest, plain network
    python benchmarks/fer2013.py train full --data fer2013.csv --minutes 9    on a GPU: speed, then the missing runs
    python benchmarks/fer2013.py train small --data fer2013.csv               narrow networks, on two CPU cores
    python benchmarks/fer2013.py train full --data fer2013.csv --missing      skip runs stored in benchmarks/results
    python benchmarks/fer2013.py score full      write benchmarks/results/fer2013.json from the logits, then the page
    python benchmarks/fer2013.py page            write docs/results.md and its pictures from that file

PublicTest decides everything (epoch, confidence, which views); PrivateTest is only scored. A finished run leaves one
small file in runs/fer2013/LIST with the logits of every view; the figures need nothing else. The same command can be
started several times in parallel; the processes share the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cropvote import hflip, inject_crop_vote, profile, remove_crop_vote, ten_crop

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "fer2013"
sys.path.insert(0, str(ROOT / "examples" / "fer48"))

import compare  # noqa: E402
import fer2013_page as page  # noqa: E402
import fer2013_scores as results  # noqa: E402
import throughput  # noqa: E402
from config import PLANS, from_dict, sites_of  # noqa: E402
from data.sources import Split  # noqa: E402
from keeping import load_model, write_whole  # noqa: E402
from learner import read  # noqa: E402
from machines import Machine, machine  # noqa: E402
from model import fer_resnet18  # noqa: E402
from timing import commit  # noqa: E402
from train import EXPECTED, parse, read_faces  # noqa: E402
from train import train as one_training  # noqa: E402

#: The runs of each list, as options of compare.py, most important first; run seed by seed.
LISTS = {
    "full": [
        f"--recipe fer2013 --fast --sites none layer1 {PLANS[0]} --seeds 0 1 2",
        "--recipe rafdb --fast --sites none layer1 --seeds 0",  # the paper's recipe, unchanged
        f"--recipe fer2013 --fast --sites layer3 input layer2 {' '.join(PLANS[1:])} --seeds 0 1 2",
    ],
    "small": [
        f"--recipe toy --width 8 --batch 32 --limit 8000 --epochs 10 --sites none {PLANS[0]} layer1 --seeds 0 1 2",
    ],
}


#: Recipes tried on the plain network; the best is then used for all networks. They add to the paper's augmentations.
TUNED = "--recipe fer2013 --fast --after none --epochs 15"
VARIANTS = {
    "AdamW, rate 0.002, decay 0.05": "",
    "the same, averaged weights (0.998)": "--ema 0.998",
    "the same, mixup 0.2": "--ema 0.998 --mixup 0.2",
    "the same, cutmix 1": "--ema 0.998 --cutmix 1",
    "the same, moved and erased more": "--ema 0.998 --crop 0.7 --shift 0.12 --tilt 20 --erased 0.25",
    "AdamW, rate 0.001, decay 0.2": "--rate 0.001 --weight-decay 0.2 --ema 0.998",
    "SGD, rate 0.1, decay 0.0005": "--optimizer sgd --rate 0.1 --weight-decay 0.0005 --ema 0.998",
    "SGD, rate 0.05, decay 0.002": "--optimizer sgd --rate 0.05 --weight-decay 0.002 --ema 0.998",
}


def tune(data: str, out: Path) -> None:
    """Train every variant that has no result yet."""
    for place, more in enumerate(VARIANTS.values()):
        folder = out / str(place)
        with lock(out / f"{place}.lock") as mine:
            if mine:
                config, _, _ = parse([*shlex.split(f"{TUNED} {more}"), "--data", data, "--out", str(folder)])
                with machine(config.device, config.precision, config.fast) as here:
                    one_training(config, here, resume=True)
    results.store_tuning(VARIANTS, out)


def train(name: str, data: str, minutes: float, out: Path, known: frozenset[str] = frozenset()) -> None:
    """Train the runs of a list that have no file yet, until another one is unlikely to fit into the time.

    Runs in ``known`` are skipped. The full list first measures training speed, for four minutes at most.
    """
    started, taken = time.monotonic(), dict[str, float]()
    speed = out / "throughput.json"
    if name == "full":
        with lock(out / "speed.lock", wait=True):
            if not speed.exists():
                throughput.main(["--minutes", str(min(4.0, minutes)), "--out", str(speed)])
    for line in LISTS[name]:
        config, sites, seeds = compare.parse([*shlex.split(line), "--data", data, "--out", str(out)])
        for seed, site in [(seed, site) for seed in seeds for site in sites]:
            file = out / f"{config.recipe}-{site}-{seed}.npz"
            begun = time.monotonic()
            with lock(file.with_suffix(".lock")) as mine:
                if not mine or file.exists() or file.stem in known:
                    continue
                if begun - started + taken.get(site, 0) > 60 * minutes:
                    spent = (begun - started) / 60
                    print(f"{spent:.1f} minutes: {file.stem} and what follows are left for the next call.")
                    return
                asked = dataclasses.replace(config, out=str(out / config.recipe), final_test=True)
                with machine(config.device, config.precision, config.fast) as here:
                    keep(file, compare.one_run(asked, site, seed, here), here)
            taken[site] = time.monotonic() - begun


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Yield whether this process got the file's lock, which is released at the end or when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def keep(file: Path, result: dict[str, Any], here: Machine) -> None:
    """Store a finished run: the float16 logits of every view on both splits, and the run's settings."""
    model, card = load_model(result["out"])
    splits = read_faces(from_dict(result["config"])).splits
    val, test = splits["val"], splits["test"]
    arrays: dict[str, Any] = {"val_labels": val.labels.numpy(), "test_labels": test.labels.numpy()}
    arrays["copies"] = copied(test, [splits["train"], val])
    ways = {"views": None}
    if card["after"] == "none":  # also the plain network's logits for mirrored and cropped inputs
        ways |= {"mirrored": hflip(), "cropped": ten_crop()}
    for way, views in ways.items():
        if views is not None:
            inject_crop_vote(model, after="input", views=views, input_size=48)
        for split, faces in (("val", val), ("test", test)):
            rows = read(model.to(here.device), faces.images, here, voting=way != "views" or card["after"] != "none")
            arrays[f"{split}_{way}"] = rows.numpy().astype(np.float16)
        if views is not None:
            remove_crop_vote(model)
    told = {key: value for key, value in result.items() if key not in ("votes", "summary", "split", "out")}
    told |= {"gmacs": gmacs(card), "commit": commit()}
    stored = io.BytesIO()
    np.savez_compressed(stored, **arrays, told=json.dumps(told))
    write_whole(file, lambda handle: handle.write(stored.getvalue()))


def copied(test: Split, learned: list[Split]) -> np.ndarray:
    """Return which test faces are pixel-identical to a training or validation face, (n,) bool."""
    known = {image.tobytes() for split in learned for image in split.images.numpy()}
    return np.array([image.tobytes() in known for image in test.images.numpy()])


def gmacs(card: dict[str, Any]) -> dict[str, float]:
    """Return the GMACs per face by number of views, and those of the plain network."""
    site = sites_of(card["after"]) if card["after"] != "none" else "input"
    table = profile(fer_resnet18(num_classes=len(card["outputs"]), width=card["width"]), 48, sites=[site])
    by_views = {str(count): cost for count, cost in list(table)[-1].gmacs_by_views.items()}
    # Five unmirrored crops run four tails more than one view; ten views run eight more than centre + mirror.
    by_views["5"] = by_views["1"] + (by_views["10"] - by_views["2"]) / 2
    return {**by_views, "plain": table["baseline"].gmacs}


def main() -> None:
    summary, _, commands = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("tune", "train", "score", "page"))
    parser.add_argument("list", choices=tuple(LISTS), nargs="?", help="the list of runs; see LISTS")
    parser.add_argument("--data", default="", metavar="PATH", help="FER2013, in any layout that check_data.py knows")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run that is likely to end later")
    parser.add_argument("--missing", action="store_true", help="skip runs whose figures are in benchmarks/results")
    parser.add_argument("--runs", default=str(RUNS), metavar="FOLDER", help="default: runs/fer2013")
    options = parser.parse_args()
    if options.step in ("train", "score") and not options.list:
        parser.error(f"name a list: {', '.join(LISTS)}")
    if options.step in ("tune", "train") and not options.data:
        parser.error(f"{options.step} needs --data PATH")
    folder = Path(options.runs) / (options.list or results.TUNING)
    try:
        if options.step in ("tune", "train"):
            folder.mkdir(parents=True, exist_ok=True)
        if options.step == "tune":
            tune(options.data, folder)
        elif options.step == "train":
            known = frozenset(run["run"] for run in results.stored().get(options.list, []) if options.missing)
            train(options.list, options.data, options.minutes, folder, known)
        elif options.step == "score":
            results.store(options.list, [results.Run(file) for file in sorted(folder.glob("*.npz"))])
    except EXPECTED as error:
        sys.exit(f"fer2013.py: {error}")
    if options.step != "train":
        page.write()


if __name__ == "__main__":
    main()
