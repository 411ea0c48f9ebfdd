"""What decides a run: the options of train.py, and the recipes that set them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from batches import Strengths, option
from cropvote import Views, five_crop, hflip

#: Mirrored at one place and cropped at a later one: the same ten views for less work.
PLANS = ("layer1=hflip,layer3=five", "layer1=hflip,layer2=five", "layer2=hflip,layer3=five")
#: Where a network can be split: nowhere, the images themselves, the paper's three places, or two of them.
PLACES = ("none", "input", "layer1", "layer2", "layer3", *PLANS)
VALENCE_AROUSAL = "valence-arousal"


@dataclass(frozen=True)
class Config(Strengths):
    """A run: everything that decides its figures. Every field is an option of train.py."""

    recipe: str = option("toy", "sets every option that is not given", choices=("toy", "fer2013", "rafdb", "affectnet"))
    data: str = option("toy", "toy faces, or the path of a data set: see check_data.py", metavar="toy|PATH")
    label_order: str = option("", "the order of the labels 0..6, where the data cannot tell", metavar="SET|NAMES")
    contempt: bool = option(False, "keep AffectNet's and FER+'s eighth class")
    cache: str = option("", "where decoded faces are kept; default: the user's cache folder", metavar="FOLDER")
    strict: bool = option(False, "refuse a data set with an unreadable picture, rather than leave the picture out")
    limit: int | None = option(None, "use at most this many faces of every split", least=1)
    validation: float = option(
        0.1,
        "taken from the training faces where a set has no validation faces: a share, or a number a class",
        least=0,
    )
    split_seed: int = option(0, "draws that validation set; the same for every --seed", least=0)
    learn: str = option(
        "train", "which faces to learn from; without validation the last epoch is kept", choices=("train", "train+val")
    )
    target: str = option("expression", "what to learn", choices=("expression", VALENCE_AROUSAL))

    after: str = option(
        "layer1", "where to split; at two places: mirrored, then cropped", choices=PLACES, metavar="SITE"
    )
    vote: str = option("soft", "the vote that chooses the epoch", choices=("soft", "probs", "hard"))
    width: int = option(64, "channels of the first stage; the paper's is 64", least=1)
    init: str = option("", "weights to start from: a run's folder or its model.safetensors", metavar="RUN")

    epochs: int = option(10, "times through the training faces", least=1)
    batch: int = option(135, "faces a step, all processes together", least=1)
    per_class: int = option(
        0, "faces of each class an epoch: 0 takes every face once, -1 the median class's number", least=-1
    )
    optimizer: str = option("adam", "the optimizer", choices=("adam", "adamw", "sgd"))
    rate: float = option(2e-4, "the learning rate, the highest one where it changes", least=1e-8, most=100)
    schedule: str = option("exponential", "how the rate falls", choices=("exponential", "onecycle"))
    decay: float = option(0.65, "exponential: the rate is multiplied by it after every epoch", least=1e-4, most=1.0)
    warmup: float = option(0.3, "onecycle: the share of the steps in which the rate rises", least=0.0, most=1.0)
    weight_decay: float = option(0.0, "of the optimizer", least=0.0, most=1.0)
    label_smoothing: float = option(0.0, "of the cross-entropy", least=0.0, most=0.9)
    mixup: float = option(
        0.0, "mix pairs of faces and their labels; the parameter of the share's Beta law", least=0.0, most=10.0
    )
    cutmix: float = option(
        0.0,
        "paste a part of one face into another; with --mixup, one of the two a step",
        least=0.0,
        most=10.0,
    )
    ema: float = option(
        0.0,
        "score and keep an average of the weights, of this decay a step; 0: themselves",
        least=0.0,
        most=0.99999,
    )
    retrain: bool = option(False, "then train anew on training and validation faces, for as many epochs as were best")
    final_test: bool = option(False, "score the test faces: once, at the very end")

    seed: int = option(0, "of the weights, the order and the augmentation", least=0)
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    fast: bool = option(False, "bfloat16, channels_last, torch.compile and a fused optimizer")
    precision: str = option(
        "", "of autocast; by default bfloat16 with --fast, else float32", choices=("float32", "bfloat16", "float16")
    )
    out: str = option("", "the run's folder; default: runs/DATA-AFTER-SEED", metavar="FOLDER")

    def __post_init__(self) -> None:
        """Refuse what would be silently wrong: a number out of its range, options that contradict each other."""
        for one in dataclasses.fields(self):
            check(one, getattr(self, one.name))
        if self.target == VALENCE_AROUSAL and self.label_smoothing:
            raise ValueError("--label-smoothing is for --target expression.")
        if self.target == VALENCE_AROUSAL and (self.mixup or self.cutmix):
            raise ValueError("--mixup and --cutmix are for --target expression.")
        if self.retrain and self.learn == "train+val":
            raise ValueError("--retrain chooses the number of epochs on validation faces; --learn train+val has none.")


# What the paper says of its training, word for word in numbers: Adam at 2e-4, batch 135, the rate times 0.65 or 0.95
# after each "iteration" (read as epoch: after 2,000 batches of 0.65 nothing would be left), 20 or 40 epochs; no
# mirroring among its augmentations. What it leaves open is ours: the strengths (Strengths' defaults), and that a
# balanced epoch takes of every class as many faces as the median class has.
_PAPER: dict[str, Any] = {"width": 64, "batch": 135, "optimizer": "adam", "rate": 2e-4, "schedule": "exponential"}
RECIPES: dict[str, dict[str, Any]] = {
    "affectnet": {**_PAPER, "epochs": 20, "decay": 0.65, "per_class": -1, "validation": 500},
    "rafdb": {**_PAPER, "epochs": 40, "decay": 0.95, "validation": 0.1},
    # Ours, as the paper has none for FER2013: its augmentations and mirroring, one cycle instead of 0.65 an epoch.
    "fer2013": {
        "width": 64, "batch": 135, "epochs": 40, "optimizer": "adamw", "rate": 2e-3, "schedule": "onecycle",
        "weight_decay": 0.05, "label_smoothing": 0.1, "mirror": 0.5,
    },
    # Ours too, small enough for two CPU cores.
    "toy": {
        "data": "toy", "width": 16, "batch": 64, "epochs": 8, "rate": 2e-3, "schedule": "onecycle", "mirror": 0.5,
    },
}  # fmt: skip


def sites_of(after: str) -> str | dict[str, Views]:
    """``after`` as the library takes it: a place, or the views at each of several."""
    if "=" not in after:
        return after
    known = {"hflip": hflip, "five": five_crop}
    parts = (part.split("=") for part in after.split(","))
    return {site: known[views]() for site, views in parts}


def in_words(after: str) -> str:
    """What a network does, in tables and titles."""
    places = [part.partition("=")[0] for part in after.split(",")]
    if len(places) == 2:
        return f"ten views, mirrored after {places[0]} and cropped after {places[1]}"
    return {"none": "plain", "input": "ten views of the input"}.get(after, f"ten views after {after}")


def check(one: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that is none of the choices or outside the range of its option."""
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
    """The recipe's options, but for those given."""
    return Config(**{"recipe": name, **RECIPES[name], **given})


def add_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """One option for every field of Config; what is not given on the command line is left to the recipe."""
    altering = {one.name for one in dataclasses.fields(Strengths)}
    group = parser.add_argument_group("augmentation", "how far faces are altered in training")
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
    """What the option is for and, where all recipes but Config's default differ, what each of them sets."""
    text = str(one.metadata["help"])
    if "metavar" in one.metadata and "choices" in one.metadata:
        text += f"; one of {' '.join(one.metadata['choices'])}"
    theirs = {name: options[one.name] for name, options in RECIPES.items() if one.name in options}
    shown = [f"{name} {value}" for name, value in theirs.items() if name != "toy" or one.name != "data"]
    if one.default not in ("", None, False):
        shown.append(f"else {one.default}" if shown else f"{one.default}")
    return (text + (f" ({', '.join(shown)})" if shown else "")).replace("%", "%%")


def from_options(options: dict[str, Any]) -> Config:
    """The config of parsed options: the recipe named among them, overruled by the others."""
    name = options.pop("recipe", None)
    if name not in (None, "toy") and "data" not in options:
        raise ValueError(f"--recipe {name} needs --data PATH.")
    if name is None and options.get("data", "toy") != "toy":
        raise ValueError(f"--data {options['data']} needs a --recipe: {', '.join(RECIPES)} (toy: what a CPU can do).")
    return recipe(name or "toy", **options)


def from_dict(stored: dict[str, Any]) -> Config:
    """The config of a stored run, from its JSON."""
    known = {one.name for one in dataclasses.fields(Config)}
    return Config(**{key: value for key, value in stored.items() if key in known})


def differences(one: Config, other: dict[str, Any]) -> list[str]:
    """The options in which a stored run differs from this one, in words; where the run lies does not count."""
    mine = json.loads(json.dumps(dataclasses.asdict(one)))
    free = {"out", "device", "final_test", "retrain", "data", "cache", "strict"}  # the faces themselves are compared
    keys = sorted((mine.keys() | other.keys()) - free)
    return [f"{key} {other.get(key)!r}, now {mine.get(key)!r}" for key in keys if mine.get(key) != other.get(key)]
