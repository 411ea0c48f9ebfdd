"""The options of train.py, and the recipes that set them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from batches import Strengths, option
from cropvote import Views, five_crop, hflip

#: Mirror at one site and crop at a later one: also ten views, for less work.
PLANS = ("layer1=hflip,layer3=five", "layer1=hflip,layer2=five", "layer2=hflip,layer3=five")
#: Where a network can be split: nowhere, at the input, at one of the paper's three sites, or at two sites.
PLACES = ("none", "input", "layer1", "layer2", "layer3", *PLANS)
VALENCE_AROUSAL = "valence-arousal"


@dataclass(frozen=True)
class Config(Strengths):
    """All settings of a run. Every field is an option of train.py."""

    recipe: str = option("toy", "sets every option that is not given", choices=("toy", "fer2013", "rafdb", "affectnet"))
    data: str = option("toy", "toy, or the path of a data set: see check_data.py", metavar="toy|PATH")
    label_order: str = option("", "the order of the labels 0..6, if the data do not say", metavar="SET|NAMES")
    contempt: bool = option(False, "keep AffectNet's and FER+'s eighth class")
    cache: str = option("", "where to cache decoded faces; default: the user's cache folder", metavar="FOLDER")
    strict: bool = option(False, "reject a data set with an unreadable picture, instead of leaving the picture out")
    limit: int | None = option(None, "use at most this many faces of every split", least=1)
    validation: float = option(
        0.1,
        "faces to hold out if a set has no validation split: a share of the training faces, or a number per class",
        least=0,
    )
    split_seed: int = option(0, "seed of that random split, independent of --seed", least=0)
    learn: str = option(
        "train", "faces to train on; without validation faces, the last epoch is kept", choices=("train", "train+val")
    )
    target: str = option("expression", "what to predict", choices=("expression", VALENCE_AROUSAL))

    after: str = option("layer1", "where to split; with two sites: mirror, then crop", choices=PLACES, metavar="SITE")
    train_views: int | None = option(
        None, "train through this many views per step, drawn anew each time; default: all ten", least=1, most=10
    )
    vote: str = option("soft", "the vote that chooses the epoch", choices=("soft", "probs", "hard"))
    width: int = option(64, "channels of the first stage; 64 in the paper", least=1)
    init: str = option("", "weights to start from: a run's folder or its model.safetensors", metavar="RUN")

    epochs: int = option(10, "passes over the training faces", least=1)
    batch: int = option(135, "batch size, over all processes", least=1)
    per_class: int = option(
        0, "faces per class and epoch: 0 uses every face once, -1 the size of the median class", least=-1
    )
    optimizer: str = option("adam", "the optimizer", choices=("adam", "adamw", "sgd"))
    rate: float = option(2e-4, "the highest learning rate of the schedule", least=1e-8, most=100)
    schedule: str = option("exponential", "the learning rate schedule", choices=("exponential", "onecycle"))
    decay: float = option(0.65, "exponential: the factor on the rate after every epoch", least=1e-4, most=1.0)
    warmup: float = option(0.3, "onecycle: the share of steps with a rising rate", least=0.0, most=1.0)
    weight_decay: float = option(0.0, "the optimizer's weight decay", least=0.0, most=1.0)
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy", least=0.0, most=0.9)
    mixup: float = option(
        0.0, "mix pairs of faces and their labels; the parameter of the Beta distribution", least=0.0, most=10.0
    )
    cutmix: float = option(
        0.0,
        "paste part of one face into another; with --mixup, each step uses one of the two",
        least=0.0,
        most=10.0,
    )
    ema: float = option(
        0.0,
        "score and keep a moving average of the weights with this decay per step; 0: none",
        least=0.0,
        most=0.99999,
    )
    retrain: bool = option(False, "then train again on training and validation faces, for the best number of epochs")
    final_test: bool = option(False, "score the test faces: once, at the very end")

    seed: int = option(0, "seed of weights, order and augmentation", least=0)
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    fast: bool = option(False, "bfloat16, channels_last, torch.compile and a fused optimizer")
    precision: str = option(
        "", "autocast precision; default bfloat16 with --fast, else float32", choices=("float32", "bfloat16", "float16")
    )
    out: str = option("", "the run's folder; default: runs/DATA-AFTER-SEED", metavar="FOLDER")

    def __post_init__(self) -> None:
        """Reject numbers out of range and options that contradict each other."""
        for one in dataclasses.fields(self):
            check(one, getattr(self, one.name))
        if self.train_views is not None and self.after == "none":
            raise ValueError("--train-views is for a voting network, and --after none is the plain one.")
        if self.target == VALENCE_AROUSAL and self.label_smoothing:
            raise ValueError("--label-smoothing is for --target expression.")
        if self.target == VALENCE_AROUSAL and (self.mixup or self.cutmix):
            raise ValueError("--mixup and --cutmix are for --target expression.")
        if self.retrain and self.learn == "train+val":
            raise ValueError("--retrain chooses the number of epochs on validation faces; --learn train+val has none.")


# The paper's training: Adam at 2e-4, batch size 135, a learning rate multiplied by 0.65 or 0.95 after each "iteration"
# (read as epoch: per batch, nothing would be left after 2,000 batches), 20 or 40 epochs, no mirroring. The paper leaves
# two things open, which we chose: the strengths of the augmentation (the defaults of Strengths), and the size of a
# balanced epoch (from every class, as many faces as the median class has).
_PAPER: dict[str, Any] = {"width": 64, "batch": 135, "optimizer": "adam", "rate": 2e-4, "schedule": "exponential"}
RECIPES: dict[str, dict[str, Any]] = {
    "affectnet": {**_PAPER, "epochs": 20, "decay": 0.65, "per_class": -1, "validation": 500},
    "rafdb": {**_PAPER, "epochs": 40, "decay": 0.95, "validation": 0.1},
    # Ours, because the paper has none for FER2013: its augmentations plus mirroring, and a one-cycle schedule.
    "fer2013": {
        "width": 64, "batch": 135, "epochs": 40, "optimizer": "adamw", "rate": 2e-3, "schedule": "onecycle",
        "weight_decay": 0.05, "label_smoothing": 0.1, "mirror": 0.5,
    },
    # Also ours, small enough for two CPU cores.
    "toy": {
        "data": "toy", "width": 16, "batch": 64, "epochs": 8, "rate": 2e-3, "schedule": "onecycle", "mirror": 0.5,
    },
}  # fmt: skip


def sites_of(after: str) -> str | dict[str, Views]:
    """Return ``after`` in the library's form: a site, or a dict of views by site."""
    if "=" not in after:
        return after
    known = {"hflip": hflip, "five": five_crop}
    parts = (part.split("=") for part in after.split(","))
    return {site: known[views]() for site, views in parts}


def in_words(after: str) -> str:
    """Return a network's name for tables and titles."""
    places = [part.partition("=")[0] for part in after.split(",")]
    if len(places) == 2:
        return f"ten views, mirrored after {places[0]} and cropped after {places[1]}"
    return {"none": "plain", "input": "ten views of the input"}.get(after, f"ten views after {after}")


def check(one: dataclasses.Field[Any], value: Any) -> None:
    """Reject a value that is not one of the choices, or out of range."""
    name, choices = "--" + one.name.replace("_", "-"), one.metadata.get("choices")
    least, most = one.metadata.get("least"), one.metadata.get("most")
    if choices and value and value not in choices:
        raise ValueError(f"{name} {value}: it is one of {', '.join(choices)}.")
    if value is None or isinstance(value, str):
        return
    if value != value:
        raise ValueError(f"{name} {value}: it is a number.")
    if (least is not None and value < least) or (most is not None and value > most):
        limits = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        raise ValueError(f"{name} {value}: it is {' and '.join(limits)}.")


def recipe(name: str, **given: Any) -> Config:
    """Return the recipe's config, overridden by the options given."""
    return Config(**{"recipe": name, **RECIPES[name], **given})


def add_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Add an option for every field of Config; options that are not given are left to the recipe."""
    altering = {one.name for one in dataclasses.fields(Strengths)}
    group = parser.add_argument_group("augmentation", "how strongly training faces are altered")
    for one in dataclasses.fields(Config):
        if one.name in without:
            continue
        place = group if one.name in altering else parser
        flag = "--" + one.name.replace("_", "-")
        asked: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(one)}
        if one.default is False:
            place.add_argument(flag, action="store_true", **asked)
        else:
            kind = {"int": int, "int | None": int, "float": float}.get(str(one.type), str)
            names = {key: one.metadata[key] for key in ("choices", "metavar") if key in one.metadata}
            place.add_argument(flag, type=kind, **names, **asked)


def _help(one: dataclasses.Field[Any]) -> str:
    """Return the option's help text, with its default and the values set by recipes."""
    text = str(one.metadata["help"])
    if "metavar" in one.metadata and "choices" in one.metadata:
        text += f"; one of {' '.join(one.metadata['choices'])}"
    theirs = {name: options[one.name] for name, options in RECIPES.items() if one.name in options}
    shown = [f"{name} {value}" for name, value in theirs.items() if name != "toy" or one.name != "data"]
    if one.default not in ("", None, False):
        shown.append(f"else {one.default}" if shown else f"{one.default}")
    return (text + (f" ({', '.join(shown)})" if shown else "")).replace("%", "%%")


def from_options(options: dict[str, Any]) -> Config:
    """Return the config for parsed options: the named recipe, overridden by the others."""
    name = options.pop("recipe", None)
    if name not in (None, "toy") and "data" not in options:
        raise ValueError(f"--recipe {name} needs --data PATH.")
    if name is None and options.get("data", "toy") != "toy":
        raise ValueError(f"--data {options['data']} needs a --recipe: {', '.join(RECIPES)} (toy: what a CPU can do).")
    return recipe(name or "toy", **options)


def from_dict(stored: dict[str, Any]) -> Config:
    """Return the config of a stored run, from its JSON."""
    known = {one.name for one in dataclasses.fields(Config)}
    return Config(**{key: value for key, value in stored.items() if key in known})


def differences(one: Config, other: dict[str, Any]) -> list[str]:
    """Describe the options that differ from a stored run's, except those that do not change its figures."""
    mine = json.loads(json.dumps(dataclasses.asdict(one)))
    free = {"out", "device", "final_test", "retrain", "data", "cache", "strict"}  # the faces are compared directly
    keys = sorted((mine.keys() | other.keys()) - free)
    return [f"{key} {other.get(key)!r}, now {mine.get(key)!r}" for key in keys if mine.get(key) != other.get(key)]
