"""Train the paper's facial expression network, plain or voting, and write its results.

python examples/fer48/train.py                                              toy faces, in minutes on a CPU
python examples/fer48/train.py --recipe fer2013 --data fer2013.csv --fast   FER2013 on a GPU
python examples/fer48/train.py --recipe affectnet --data AffectNet --retrain --final-test
torchrun --nproc-per-node 4 examples/fer48/train.py --recipe affectnet --data AffectNet --batch 136
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropvote
from batches import augment, epoch_rows
from config import VALENCE_AROUSAL, Config, add_options, from_options
from data import DataError, Faces, Split, load
from keeping import RETRAINED, KeptError
from learner import Learner, read
from machines import Machine, MachineError, machine
from progress import Progress
from results import RESULT, WRITTEN, figures, scores, write
from resuming import keep_run, open_run
from scoring import MOOD, aims, chosen_by, per_class_table, score


class TrainError(Exception):
    """Training cannot continue; the message says what to change."""


#: Errors that end a run with one line and exit code 1; any other is a bug and shows its traceback.
EXPECTED = (DataError, KeptError, MachineError, TrainError, cropvote.CropVoteError, OSError)


def main(argv: list[str] | None = None) -> None:
    config, resume, overwrite = parse(argv)
    try:
        with machine(config.device, config.precision, config.fast) as here:
            train_and_retrain(config, here, resume, overwrite)
    except EXPECTED as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("train.py: stopped; --resume goes on after the last complete epoch.", file=sys.stderr)
        sys.exit(130)


def train_and_retrain(config: Config, here: Machine, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train; with ``retrain``, train again on training and validation faces for the best number of epochs."""
    if not config.retrain:
        return train(config, here, resume, overwrite)
    found = train(dataclasses.replace(config, final_test=False), here, resume, overwrite)
    out, epochs = str(Path(found["out"]) / RETRAINED), found["epochs"]["best_epoch"]
    again = dataclasses.replace(config, retrain=False, learn="train+val", epochs=epochs, out=out)
    return train(again, here, resume, overwrite)


def train(config: Config, here: Machine, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train once, or resume after the last epoch, and return the contents of result.json."""
    with here.in_turn():  # the first process decodes; the others read its cache
        faces = read_faces(config)
    mood = config.target == VALENCE_AROUSAL
    outputs = MOOD if mood else faces.classes
    learned, val = faces.splits["train"].to(here.device), faces.splits.get("val")
    scored = None if config.learn == "train+val" and not config.final_test else scored_split(config, faces)
    labels, targets = learned.labels.cpu(), aims(learned, mood)
    steps = count_steps(config, labels, here)
    torch.manual_seed(config.seed)
    learner = Learner(config, outputs, steps, here)
    order = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed + here.rank)  # processes augment differently
    out, run = open_run(config, faces, outputs, learner, order, here, resume, overwrite)
    curve = run["curve"]
    done = finished(out, config, curve, here)
    if done is not None:
        return done
    announce(config, faces, steps, len(curve), here)

    with Progress(out, config.epochs, steps * config.batch, len(curve), shown=here.first) as progress:
        for epoch in range(len(curve), config.epochs):
            learner.model.train()
            started, rate, total = time.monotonic(), learner.rate, torch.zeros((), device=here.device)
            drawn = epoch_rows(labels, config.per_class, order)[: steps * config.batch]
            batches = here.mine(drawn).to(here.device).split(config.batch // here.size)
            for step, batch in enumerate(batches):
                total += learner.learn(augment(learned.images[batch], config), targets[batch])
                progress.step(config.batch, epoch, total, step + 1, learner.rate)
            learner.end_epoch()
            progress.scoring(epoch)

            loss, seconds = here.mean(total).item() / steps, time.monotonic() - started
            if not math.isfinite(loss):
                kept = f" {out} keeps the {epoch} before it." if epoch else ""
                raise TrainError(f"epoch {epoch + 1}: the loss is {loss}; a lower --rate?{kept}")
            curve.append({"epoch": epoch + 1, "loss": loss, "rate": rate, "seconds": round(seconds, 2)})
            curve[-1]["faces_per_second"] = round(steps * config.batch / seconds, 1)
            if val is not None:
                logits = read(learner.kept, val.images, here, config.after != "none")
                curve[-1]["score"] = chosen_by(score(logits, aims(val, mood), outputs), config.vote)
            if val is None or all(curve[-1]["score"] > row["score"] for row in curve[:-1]):
                run["best"] = {key: value.cpu().clone() for key, value in learner.kept.state_dict().items()}
            keep_run(out, run, learner, order, here)
            progress.epoch(curve[-1], "concordance" if mood else f"{config.vote} accuracy")

    learner.model.load_state_dict(run["best"])
    rows = None if scored is None else read(learner.model, scored.images, here, config.after != "none")
    result = {**figures(config, faces, outputs, curve, here), **scores(config, scored, rows, mood, outputs)}
    result["out"] = str(out)
    if here.first:
        write(out, learner.model, result, rows, faces, scored)
        print(f"\n{report(result)}")
    here.wait()  # no process reads before the files are written
    return result


def finished(out: Path, config: Config, curve: list[dict[str, Any]], here: Machine) -> dict[str, Any] | None:
    """Return the result of a complete run that fits the config or has test figures, which are never replaced."""
    if len(curve) < config.epochs or not (out / RESULT).exists():
        return None
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    scored = result["config"]["final_test"]
    if config.final_test and not scored:
        return None
    if here.first:
        kept = ", with its test figures" if scored and not config.final_test else ""
        print(f"{out} is complete{kept}: left as it is.\n\n{report({**result, 'out': str(out)})}")
    return {**result, "out": str(out)}


def read_faces(config: Config) -> Faces:
    """Load the faces for the config, and check that it can be trained and scored on them."""
    faces = load(
        config.data, limit=config.limit, seed=config.seed, validation=config.validation, split_seed=config.split_seed,
        label_order=config.label_order, contempt=config.contempt, strict=config.strict,
        cache=Path(config.cache) if config.cache else None,
    )  # fmt: skip
    splits = dict(faces.splits)
    if config.final_test and "test" not in splits:
        raise DataError(f"--final-test: {config.data} has no test faces; it has {', '.join(splits)}.")
    if config.target == VALENCE_AROUSAL and any(split.mood is None for split in splits.values()):
        raise DataError(f"--target {VALENCE_AROUSAL}: {faces.name} ({faces.layout}) has none.")
    if config.learn == "train+val":
        splits["train"] = splits["train"].join(splits.pop("val"))
    return dataclasses.replace(faces, splits=splits)


def scored_split(config: Config, faces: Faces) -> Split:
    """Return the split to score: validation, or the test split with ``final_test``."""
    if config.learn == "train+val" and not config.final_test:
        raise DataError("the network was trained on the validation faces; --final-test scores the test faces.")
    return faces.splits["test" if config.final_test else "val"]


def count_steps(config: Config, labels: Tensor, here: Machine) -> int:
    """Count the full batches of an epoch; a different few faces are left over each time."""
    steps = len(epoch_rows(labels, config.per_class, torch.Generator())) // config.batch
    if steps == 0:
        raise TrainError(f"{len(labels)} training faces are less than one batch of {config.batch}.")
    if config.batch % here.size:
        raise TrainError(f"--batch {config.batch} is shared by {here.size} processes: give a multiple of {here.size}.")
    return steps


def announce(config: Config, faces: Faces, steps: int, done: int, here: Machine) -> None:
    if not here.first:
        return
    drawn = f"validation ({faces.splits['val'].name})" if "val" in faces.splits else ""  # "10 % of train", say
    names = {key: drawn if key == "val" and " of " in drawn else split.name for key, split in faces.splits.items()}
    sizes = ", ".join(f"{len(split):,} {names[key]}" for key, split in faces.splits.items())
    print(f"{faces.name} ({faces.layout}): {sizes} faces; {faces.note}.")
    if faces.skipped:
        print(f"Left out as unreadable: {len(faces.skipped)} ({'; '.join(faces.skipped[:3])} ...).")
    shares = f", {config.batch // here.size} in each of {here.size} processes" if here.size > 1 else ""
    print(f"{here.name()}: {steps} steps an epoch of {config.batch} faces{shares}; learning rate {config.rate:g}.")
    if done:
        print(f"Going on after epoch {done}.")


def report(result: dict[str, Any]) -> str:
    """Return the results, overall and per class, and the files written."""
    where = result["split"] or "no split"
    chosen = " (which chose the epoch)" if where == result["data"]["names"].get("val") else ""
    lines = [f"{result['data']['name']} {where}{chosen}: {result['summary']}"]
    if result.get("epochs"):
        shown = "best {best:.3f} (epoch {best_epoch}), last {last:.3f}"
        if result["config"]["epochs"] >= 5:
            shown += ", mean of the last five {last_five:.3f}"
        lines.append(f"epochs on validation: {shown.format(**result['epochs'])}")
    if "soft" in result["votes"]:
        lines += ["", per_class_table(result["votes"].get(result["config"]["vote"], result["votes"]["soft"])), ""]
    out = Path(result["out"])
    return "\n".join([*lines, f"{out.resolve()}: {', '.join(name for name in WRITTEN if (out / name).exists())}"])


def parse(argv: list[str] | None) -> tuple[Config, bool, bool]:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    options = vars(parser.parse_args(argv))
    again = options.pop("resume"), options.pop("overwrite")
    if all(again):
        parser.error("--resume and --overwrite exclude each other")
    try:
        return (from_options(options), *again)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
