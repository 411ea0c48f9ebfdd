"""The data, networks and runs that worth.py compares."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cropvote import Views, five_crop, hflip, profile, split_views, ten_crop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "fer48"))

import cifar
from batches import augment, to_input
from config import recipe
from model import fer_resnet18

#: The share of a run's work in which the learning rate falls to 0.
FALL = 0.25
NAMED: dict[str, Callable[[], Views]] = {
    "ten": ten_crop,
    "five": five_crop,
    "hflip": hflip,
    "five 7/8": lambda: five_crop(scale=7 / 8),
    "five 2/3": lambda: five_crop(scale=2 / 3).aligned(8),
}


@dataclass(frozen=True)
class Network:
    """Where a network splits in training ("none" or "layer1=hflip,layer3=five", for example), and into how many views.

    ``teach`` weights an extra loss: the divergence of each view from the mean of its sample's views. ``erase`` is the
    probability that a view loses a rectangle. ``distil`` is the share of the targets that comes from the task's
    teachers.
    """

    after: str = "none"
    train_views: int | None = None
    batch: int = 128
    teach: float = 0.0
    erase: float = 0.0
    distil: float = 0.0

    @property
    def sites(self) -> dict[str, Views]:
        if self.after == "none":
            return {}
        return {site: NAMED[views]() for site, views in (part.split("=") for part in self.after.split(","))}

    @property
    def name(self) -> str:
        name = self.after if self.train_views is None else f"{self.after}:{self.train_views}"
        options = {"teach": self.teach, "erase": self.erase, "distil": self.distil}
        return " ".join([name, *(f"{option} {value:g}" for option, value in options.items() if value)])


PLAIN = Network()


@dataclass(frozen=True)
class Arm:
    """A way to train: the first network, and the last one, which takes over after a share of the work.

    The arms of a family have the same first network and the same share.
    """

    first: Network
    last: Network
    share: float = 1 - FALL  # at most: the last network trains while the learning rate falls

    @property
    def name(self) -> str:
        if self.first == self.last:
            return self.first.name
        return f"late {self.last.name}" if self.share == 1 - FALL else f"{self.last.name} after {self.share:.2f}"


def always(after: str, train_views: int | None = None, batch: int = 128, **more: float) -> Arm:
    network = Network(after, train_views, batch, **more)
    return Arm(network, network)


@dataclass
class Task:
    """Data and network: how to build the network, its stages by the sites after them, and how to train it."""

    name: str
    size: int
    make: Callable[[], nn.Module]
    stages: Callable[[nn.Module], dict[str, Callable[[Tensor], Tensor]]]
    alter: Callable[[Tensor], Tensor]
    plainly: Callable[[Tensor], Tensor]
    splits: dict[str, tuple[Tensor, Tensor]]
    families: list[list[Arm]]  # runs that share a first network, most important first
    sgd: bool
    rate: float
    decay: float
    smoothing: float
    mixup: float = 0.0  # both parameters of mixup's Beta distribution
    average: float = 0.0  # decay of the averaged weights, which are then scored
    teachers: list[Path] = field(default_factory=list)  # the weights of networks of this task, without views
    told: dict[str, Any] = field(default_factory=dict)


def fer2013(data: str, width: int, limit: int | None) -> Task:
    """Return FER2013: train on Training, choose by PublicTest, score PrivateTest."""
    with np.load(data, allow_pickle=False) as arrays:
        images, labels, usage = (arrays[name] for name in ("images", "labels", "usage"))
    splits = {}
    for split, name in (("train", "Training"), ("val", "PublicTest"), ("test", "PrivateTest")):
        chosen = np.flatnonzero(usage == name)[:limit]
        splits[split] = (torch.from_numpy(images[chosen]).unsqueeze(1), torch.from_numpy(labels[chosen]))
    how = recipe("fer2013", data=data)

    def stages(model: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        first = nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1)
        last = nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc)
        return {"layer1": first, "layer2": model.layer2, "layer3": model.layer3, "": last}

    late = [Arm(PLAIN, Network("layer1=ten", None, 32)), Arm(PLAIN, Network("layer1=ten", 2)),
            Arm(PLAIN, Network("input=hflip,layer3=five", None, 64))]  # fmt: skip
    families = [
        [always("none"), *late],
        [always("layer1=ten", 2)],
        [always("layer1=ten", None, 32)],
        [always("layer1=hflip,layer3=five", None, 48)],
        [always("layer1=ten", 3)],
        [always("layer1=ten", 1)],
        [always("layer1=ten", 2, teach=1.0)],
    ]
    return Task(
        "fer2013", 48, lambda: fer_resnet18(num_classes=7, width=width), stages, lambda x: augment(x, how), to_input,
        splits, families, sgd=False, rate=1.5e-3, decay=0.05, smoothing=0.1, told={"width": width, "limit": limit},
    )  # fmt: skip


def longest(data: str, width: int, limit: int | None) -> Task:
    """Return FER2013 with a recipe like those above 73 %: SGD, stronger augmentation, mixup, averaged weights."""
    task = fer2013(data, width, limit)
    how = dataclasses.replace(recipe("fer2013", data=data), shift=0.1, erase=0.5, erased=0.2)
    families = [
        [always("layer1=ten", 2)],
        [always("none")],
        [always("layer1=ten", 2, erase=0.5)],
        [always("layer1=ten", 2, distil=0.5)],
    ]
    return dataclasses.replace(
        task, name="longest", alter=lambda x: augment(x, how), families=families,
        sgd=True, rate=0.1, decay=5e-4, mixup=0.2, average=0.999,
    )  # fmt: skip


def mobilenet(data: str, width: int, limit: int | None) -> Task:
    """Return FER2013 at 96x96 with timm's mobilenetv3_small_100."""
    import timm

    task = fer2013(data, width, limit)
    enlarge = lambda x: F.interpolate(x, size=96, mode="bilinear", align_corners=False)  # noqa: E731

    def stages(model: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        first = nn.Sequential(model.conv_stem, model.bn1, model.blocks[0])
        return {"blocks.0": first, "": lambda x: model.forward_head(model.blocks[1:](x))}

    families = [
        [always("none"), Arm(PLAIN, Network("input=hflip,blocks.0=five 2/3", None, 64))],
        [always("blocks.0=ten", 2)],
        [always("input=hflip,blocks.0=five 2/3", 2, 64)],
    ]
    return dataclasses.replace(
        task, name="mobilenet", size=96, make=lambda: timm.create_model("mobilenetv3_small_100", num_classes=7),
        stages=stages, alter=lambda x: enlarge(task.alter(x)), plainly=lambda x: enlarge(task.plainly(x)),
        families=families, told={"limit": limit},
    )  # fmt: skip


def cifar10(data: str, width: int, limit: int | None) -> Task:
    """Return CIFAR-10 with ResNet-20; 5,000 random training images are held out for validation."""
    images, labels = cifar.read_pictures(data, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the file is sorted by class
    images, labels = images[order], labels[order]
    splits = {"train": (images[:45000][:limit], labels[:45000][:limit]), "val": (images[45000:], labels[45000:])}
    splits["test"] = cifar.read_pictures(data, "test")

    def stages(model: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        first = lambda x: model.layer1(model.stem(x))  # noqa: E731
        return {"layer1": first, "layer2": model.layer2, "layer3": model.layer3, "": model.head}

    sites = "input=hflip,layer2=five 7/8"
    families = [
        [always("none"), Arm(PLAIN, Network(sites, None, 64)), Arm(PLAIN, Network("layer1=ten", None, 32))],
        [always("layer1=ten", 2)],
        [always(sites, None, 64)],
        [always("layer1=ten", None, 32)],
        [always("layer2=five 7/8", 2, 64)],  # aligned with the stride after the site ...
        [always("layer2=five", 2, 64)],  # ... and not
        [always("layer1=ten", 2, teach=1.0)],
    ]
    return Task(
        "cifar10", 32, cifar.CifarResNet, stages, cifar.augment, cifar.to_input, splits, families,
        sgd=True, rate=0.1, decay=5e-4, smoothing=0.0, told={"blocks": 3, "limit": limit},
    )  # fmt: skip


def finetune(data: str, width: int, limit: int | None, blocks: int = 3) -> Task:
    """Return fine-tuning of a published ResNet-20, trained on the original images, on JPEGs, which are new to it."""
    task = cifar10(data, width, limit or 10000)
    weights = Path(data).with_name(f"resnet{6 * blocks + 2}.safetensors")

    def make() -> nn.Module:
        model = cifar.CifarResNet(blocks)
        model.load_state_dict(load_file(weights))
        return model

    outside = "input=hflip,layer2=five 7/8"
    families = [
        [always("none"), Arm(PLAIN, Network(outside, None, 64)), Arm(PLAIN, Network(outside, 2, 64))],
        [always(outside, 2, 64)],
        [always("layer1=ten", None, 32)],
        [always(outside, None, 64)],
        [always("layer1=ten", 2)],
        [always("input=hflip,layer2=five", 2, 64)],  # not aligned with the stride after the site
        [always("input=hflip,layer1=five 7/8", 2, 64)],
        [always("input=hflip,layer3=five 7/8", 2, 64)],
        [Arm(PLAIN, Network(outside, 2, 64), 1 / 6)],  # of 6 epochs of work, plain for the first one ...
        [Arm(PLAIN, Network(outside, 2, 64), 2 / 6)],  # ... or two
    ]
    told = {"blocks": blocks, "limit": limit or 10000}
    return dataclasses.replace(task, name="finetune", make=make, families=families, rate=0.02, told=told)


TASKS = {
    "fer2013": fer2013,
    "longest": longest,
    "mobilenet": mobilenet,
    "cifar10": cifar10,
    "finetune": finetune,
    "finetune56": lambda data, width, limit: finetune(data, width, limit, blocks=9),
}


def rows_of(
    stages: dict[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    sites: dict[str, Views],
    alter: Callable[[Tensor], Tensor] = lambda views: views,
) -> Tensor:
    """Return the network's predictions for every view, (n, ...) -> (n v, k); ``alter`` changes the views."""
    if "input" in sites:
        x = alter(split_views(x, sites["input"]))
    for name, stage in stages.items():
        x = stage(x)
        if name in sites:
            x = alter(split_views(x, sites[name]))
    return x


def costs_of(task: Task) -> Callable[[Network], float]:
    """Return a function that gives a network's training work per image, relative to the plain network."""
    model = task.make()
    known: dict[str, Any] = {}

    def cost(network: Network) -> float:
        if not network.sites:
            return 1.0
        if network.after not in known:
            known[network.after] = list(profile(model, task.size, sites=[network.sites]))
        plain, row = known[network.after][0].gmacs, known[network.after][-1].gmacs_by_views
        everything = max(row)
        count = network.train_views or everything
        if count in row:
            return row[count] / plain
        return (row[1] + (count - 1) * (row[everything] - row[1]) / (everything - 1)) / plain  # a single site

    return cost
