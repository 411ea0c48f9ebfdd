"""Is voting worth its work? Networks that learn for the same multiply-adds, plain and through views.

    python benchmarks/worth.py next --data fer2013.npz --device cuda --minutes 9     the runs that are still missing
    python benchmarks/worth.py next --data fer2013.npz --width 16 --budgets 6.5 13 26
    python benchmarks/worth.py next --task cifar10 --data cifar10_jpeg.npz --device cuda
    python benchmarks/worth.py next --task finetune --data cifar10_jpeg.npz --budgets 6 12
    python benchmarks/worth.py list                                                  what is done and what is missing

Work is counted in epochs of the plain network: a budget of 40 is the multiply-adds of 40 plain epochs, whatever the
network. Each run warms up, learns at a constant rate and lets the rate fall to 0 over the last quarter of its work; its
last weights are scored. Runs of one network and seed share their constant part: a run of 20 goes on, at 15, where the
one of 10 left it at 7.5. So a network can also learn plainly first and through views in the last quarter ("late").

Every finished run adds a line to benchmarks/results/worth.jsonl: what it was, and for every way of asking it which
pictures it got right (a bit each, base64), so that any two runs can be compared later. Weights and logits stay in
--runs. Several processes of the same command share the runs. Nothing is chosen by the test pictures.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cropvote import CropVoteLoss, Views, five_crop, hflip, profile, split_views, ten_crop, vote

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "worth.jsonl"
sys.path.insert(0, str(ROOT / "examples" / "fer48"))

import cifar  # noqa: E402
from batches import augment, to_input  # noqa: E402
from config import recipe  # noqa: E402
from model import fer_resnet18  # noqa: E402
from timing import commit  # noqa: E402
from timing import machine as name_of  # noqa: E402

#: The share of a run's work in which the rate falls, and the plain epochs of work in which it rises.
FALL, RISE = 0.25, 0.5
NAMED: dict[str, Callable[[], Views]] = {
    "ten": ten_crop,
    "five": five_crop,
    "hflip": hflip,
    "five 7/8": lambda: five_crop(scale=7 / 8),
}
#: Views of ten that stand in the order of ten_crop().
FEW = {"centre": [4], "centre + mirror": [4, 9], "five crops": [0, 1, 2, 3, 4]}


@dataclass(frozen=True)
class Network:
    """Where a network splits in training, "none" or as in "layer1=hflip,layer3=five", and into how many views."""

    after: str = "none"
    train_views: int | None = None
    batch: int = 128

    @property
    def sites(self) -> dict[str, Views]:
        if self.after == "none":
            return {}
        return {site: NAMED[views]() for site, views in (part.split("=") for part in self.after.split(","))}

    @property
    def name(self) -> str:
        return self.after if self.train_views is None else f"{self.after}:{self.train_views}"


PLAIN = Network()


@dataclass(frozen=True)
class Arm:
    """How a run learns: the network of its constant part, and the one of its last quarter."""

    first: Network
    last: Network

    @property
    def name(self) -> str:
        return self.first.name if self.first == self.last else f"late {self.last.name}"


def always(after: str, train_views: int | None = None, batch: int = 128) -> Arm:
    network = Network(after, train_views, batch)
    return Arm(network, network)


@dataclass
class Task:
    """Pictures and networks: how to make one, its stages by the sites behind them, and how it learns."""

    name: str
    size: int
    make: Callable[[], nn.Module]
    stages: Callable[[nn.Module], dict[str, Callable[[Tensor], Tensor]]]
    alter: Callable[[Tensor], Tensor]
    plainly: Callable[[Tensor], Tensor]
    splits: dict[str, tuple[Tensor, Tensor]]
    families: list[list[Arm]]  # runs that share a first network, most valuable first
    sgd: bool
    rate: float
    decay: float
    smoothing: float
    told: dict[str, Any] = field(default_factory=dict)


def fer2013(data: str, width: int, limit: int | None) -> Task:
    """Training to learn from, PublicTest to choose by, PrivateTest to score."""
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
    ]
    return Task(
        "fer2013", 48, lambda: fer_resnet18(num_classes=7, width=width), stages, lambda x: augment(x, how), to_input,
        splits, families, sgd=False, rate=1.5e-3, decay=0.05, smoothing=0.1, told={"width": width, "limit": limit},
    )  # fmt: skip


def cifar10(data: str, width: int, limit: int | None) -> Task:
    """ResNet-20; 5,000 training pictures, drawn once, are for choosing, the test pictures are scored."""
    images, labels = cifar.read_pictures(data, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the file has class by class
    images, labels = images[order], labels[order]
    splits = {"train": (images[:45000][:limit], labels[:45000][:limit]), "val": (images[45000:], labels[45000:])}
    splits["test"] = cifar.read_pictures(data, "test")

    def stages(model: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        first = lambda x: model.layer1(model.stem(x))  # noqa: E731
        return {"layer1": first, "layer2": model.layer2, "": lambda x: model.head(model.layer3(x))}

    sites = "input=hflip,layer2=five 7/8"
    families = [
        [always("none"), Arm(PLAIN, Network(sites, None, 64)), Arm(PLAIN, Network("layer1=ten", None, 32))],
        [always("layer1=ten", 2)],
        [always(sites, None, 64)],
        [always("layer1=ten", None, 32)],
    ]
    return Task(
        "cifar10", 32, cifar.CifarResNet, stages, cifar.augment, cifar.to_input, splits, families,
        sgd=True, rate=0.1, decay=5e-4, smoothing=0.0, told={"blocks": 3, "limit": limit},
    )  # fmt: skip


def finetune(data: str, width: int, limit: int | None) -> Task:
    """ResNet-20 as others trained it on the original pictures, fine-tuned on JPEGs, which it has never seen."""
    task = cifar10(data, width, limit or 10000)
    weights = Path(data).with_name("resnet20.safetensors")

    def make() -> nn.Module:
        model = cifar.CifarResNet()
        model.load_state_dict(load_file(weights))
        return model

    outside = "input=hflip,layer2=five 7/8"
    families = [
        [always("none"), Arm(PLAIN, Network(outside, None, 64)), Arm(PLAIN, Network(outside, 2, 64))],
        [always(outside, 2, 64)],
        [always("layer1=ten", None, 32)],
        [always(outside, None, 64)],
        [always("layer1=ten", 2)],
    ]
    told = {"blocks": 3, "limit": limit or 10000}
    return dataclasses.replace(task, name="finetune", make=make, families=families, rate=0.02, told=told)


TASKS = {"fer2013": fer2013, "cifar10": cifar10, "finetune": finetune}


def rows_of(stages: dict[str, Callable[[Tensor], Tensor]], x: Tensor, sites: dict[str, Views]) -> Tensor:
    """The network's predictions of every view, (n, ...) -> (n v, k)."""
    if "input" in sites:
        x = split_views(x, sites["input"])
    for name, stage in stages.items():
        x = stage(x)
        if name in sites:
            x = split_views(x, sites[name])
    return x


def costs_of(task: Task) -> Callable[[Network], float]:
    """Return a function: the training work of a network on a picture, relative to the plain network."""
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
        return (row[1] + (count - 1) * (row[everything] - row[1]) / (everything - 1)) / plain  # of a single site

    return cost


class Learner:
    """One model and optimizer; the steps of each network are CUDA graphs on a GPU, captured once."""

    def __init__(self, task: Task, device: torch.device, steps: int) -> None:
        self.task, self.device, self.cuda = task, device, device.type == "cuda"
        layout = torch.channels_last if self.cuda else torch.contiguous_format
        self.model = task.make().to(device).to(memory_format=layout)
        self.stages = task.stages(self.model)
        self.images, self.labels = (tensor.to(device) for tensor in task.splits["train"])
        self.loss = CropVoteLoss(nn.CrossEntropyLoss(label_smoothing=task.smoothing))
        self.rate = torch.zeros((), device=device)
        decayed, others = [], []
        for parameter in self.model.parameters():
            (decayed if parameter.dim() > 1 else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": task.decay}, {"params": others, "weight_decay": 0.0}]
        if task.sgd:
            self.optimizer: Any = torch.optim.SGD(groups, self.rate, momentum=0.9, nesterov=True, fused=self.cuda)
        else:
            self.optimizer = torch.optim.AdamW(groups, self.rate, fused=self.cuda, capturable=self.cuda)
        self.rates = torch.zeros(steps, device=device)  # of the steps of a phase ...
        self.order = torch.zeros(steps * 128, dtype=torch.long, device=device)  # ... and its pictures
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.total = torch.zeros((), device=device)
        self.steps: dict[Network, list[Callable[[], Any]]] = {}
        self.pool: Any = None

    def choices(self, network: Network) -> list[dict[str, Views]]:
        """The sites of every draw of views; all views where none are drawn.

        With two sites, all views of the first are kept, and the same view of the last is drawn for each of them.
        """
        if network.train_views is None:
            return [network.sites]
        *first, (site, views) = network.sites.items()
        count = network.train_views // math.prod(len(theirs) for _, theirs in first)
        drawn = itertools.combinations(range(len(views)), count)
        return [{**dict(first), site: views.take(some)} for some in drawn]

    def step(self, sites: dict[str, Views], batch: int) -> None:
        self.rate.copy_(self.rates.index_select(0, self.at).squeeze())  # nothing here may wait for the device
        rows = self.order.index_select(0, self.at * batch + torch.arange(batch, device=self.device))
        self.at += 1
        x = self.task.alter(self.images[rows])
        if self.cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=False):
            loss = self.loss(rows_of(self.stages, x, sites), self.labels[rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def prepare(self, network: Network) -> list[Callable[[], Any]]:
        """The steps of a network, one for each draw of its views."""
        if network in self.steps:
            return self.steps[network]
        choices = self.choices(network)
        if not self.cuda:
            self.steps[network] = [lambda s=s: self.step(s, network.batch) for s in choices]
            return self.steps[network]
        kept = self.state()
        stream, graphs = torch.cuda.Stream(), []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                self.step(choices[0], network.batch)
            for sites in choices:
                graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                graph.capture_begin(pool=self.pool)
                self.step(sites, network.batch)
                graph.capture_end()
                self.pool = self.pool or graph.pool()
                graphs.append(graph)
        torch.cuda.current_stream().wait_stream(stream)
        self.steps[network] = [graph.replay for graph in graphs]
        self.restore(kept)
        return self.steps[network]

    def run(self, network: Network, rates: Tensor, order: Tensor, seed: int, deadline: float) -> float:
        """Learn for as many steps as there are rates; the mean loss. The seed draws the alterations and the views.

        Raises:
            TimeoutError: the deadline has passed.
        """
        self.model.train()
        steps = self.prepare(network)
        torch.manual_seed(seed)
        draw = random.Random(seed)  # noqa: S311
        self.rates[: len(rates)] = rates.to(self.device)
        self.order[: len(order)] = order.to(self.device)
        self.at.zero_()
        self.total.zero_()
        for i in range(len(rates)):
            draw.choice(steps)()
            if i % 100 == 99:
                if self.cuda:
                    torch.cuda.synchronize()
                if time.monotonic() > deadline:
                    raise TimeoutError
        return float(self.total) / max(1, len(rates))

    def state(self) -> list[Tensor]:
        """A copy of all weights, statistics and moments."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, state: list[Tensor]) -> None:
        for tensor, value in itertools.zip_longest(self._tensors(), state):
            if value is None:  # moments that the optimizer made since: as new ones
                tensor.zero_()
            else:
                tensor.copy_(value)

    @torch.no_grad()
    def _tensors(self) -> list[Tensor]:
        moments = [value for p in self.model.parameters() for value in self.optimizer.state.get(p, {}).values()
                   if isinstance(value, Tensor)]  # fmt: skip
        return [*(t.detach() for t in self.model.state_dict().values()), *moments]

    def start(self, seed: int) -> None:
        """Fresh weights, and moments as if there had been no step."""
        torch.manual_seed(seed)
        self.model.load_state_dict(self.task.make().state_dict())
        self.restore([*self.model.state_dict().values()])


@torch.no_grad()
def ask(learner: Learner, network: Network, split: str, batch: int = 512) -> dict[str, Tensor]:
    """By each way of asking the network: (n, k), logits or votes."""
    learner.model.eval()
    images = learner.task.splits[split][0]
    sites = network.sites or {"input": hflip()}
    found = []
    for some in images.split(batch):
        x = learner.task.plainly(some.to(learner.device))
        rows = rows_of(learner.stages, x, sites)
        found.append(rows.unflatten(0, (len(some), -1)).float().cpu())
    rows = torch.cat(found)
    if not network.sites:
        return {"plain": rows[:, 0], "mirrored input": rows.mean(1)}
    ways = {name: rows[:, views].mean(1) for name, views in FEW.items()}
    ways["ten views"] = rows.mean(1)
    ways["ten views, hard"] = vote(rows.flatten(0, 1), rows.shape[1], "hard")
    return ways


def family(task: Task, arms: list[Arm], seed: int, options: argparse.Namespace, deadline: float) -> None:
    """All missing runs of one first network and seed."""
    device, cost = torch.device(options.device), costs_of(task)
    known = {line["run"] for line in stored(Path(options.results))}
    wanted = [(arm, budget) for budget in sorted(options.budgets) for arm in arms]
    wanted = [one for one in wanted if named(task, *one, seed) not in known]
    if not wanted:
        return
    faces = len(task.splits["train"][0])
    plain_step = lambda network: network.batch * cost(network) / faces  # noqa: E731  # plain epochs of work a step
    longest = max(max(FALL * b, b * (1 - FALL)) for b in options.budgets)
    most = max(math.ceil(longest / plain_step(n)) for arm in arms for n in (arm.first, arm.last)) + 1
    learner = Learner(task, device, most)
    for network in dict.fromkeys(n for arm in arms for n in (arm.first, arm.last)):
        learner.prepare(network)
    learner.start(seed)
    first, order = arms[0].first, torch.Generator().manual_seed(seed)
    done, started, spent = 0.0, time.monotonic(), 0.0
    for budget in sorted({budget for _, budget in wanted}):
        constant, fall = budget * (1 - FALL), budget * FALL
        steps = round((constant - done) / plain_step(first))
        peak = task.rate * math.sqrt(first.batch / 128)
        rates = torch.full((steps,), peak)
        if done == 0:
            rise = max(1, round(RISE / plain_step(first)))
            rates[:rise] *= torch.linspace(1 / rise, 1, rise)[: len(rates)]
        learner.run(first, rates, pictures(order, faces, steps * first.batch), 100 * seed + round(done), deadline)
        done, trunk = constant, learner.state()
        spent = time.monotonic() - started
        for arm in [arm for arm, one in wanted if one == budget]:
            begun, last = time.monotonic(), arm.last
            steps = round(fall / plain_step(last))
            peak = task.rate * math.sqrt(last.batch / 128)
            fresh = torch.Generator().manual_seed(seed + 1)
            rates = peak * torch.linspace(1, 0, steps + 1)[:-1]
            loss = learner.run(last, rates, pictures(fresh, faces, steps * last.batch), 1000 + seed, deadline)
            took = spent + time.monotonic() - begun
            keep(learner, task, arm, budget, seed, loss, took, cost(last), options)
            learner.restore(trunk)


def pictures(generator: torch.Generator, total: int, count: int) -> Tensor:
    """Return the indices of ``count`` pictures, reshuffled every epoch, (count,)."""
    turns = [torch.randperm(total, generator=generator) for _ in range(math.ceil(count / total))]
    return torch.cat(turns)[:count] if turns else torch.zeros(0, dtype=torch.long)


def named(task: Task, arm: Arm, budget: float, seed: int) -> str:
    told = "-".join(f"{name}{value}" for name, value in task.told.items() if value is not None)
    return f"{task.name}/{told}/{arm.name}/{budget:g}/{seed}"


def keep(
    learner: Learner, task: Task, arm: Arm, budget: float, seed: int, loss: float, seconds: float, cost: float,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Score a finished run, add its line, and keep its weights in float16."""
    right: dict[str, dict[str, str]] = {}
    accuracy: dict[str, dict[str, float]] = {}
    for split in ("val", "test"):
        labels = task.splits[split][1]
        hits = {way: rows.argmax(1) == labels for way, rows in ask(learner, arm.last, split).items()}
        right[split] = {way: base64.b64encode(np.packbits(hit.numpy()).tobytes()).decode() for way, hit in hits.items()}
        accuracy[split] = {way: round(float(hit.double().mean()), 6) for way, hit in hits.items()}
    name = named(task, arm, budget, seed)
    line = {
        "run": name, "task": task.name, **task.told, "arm": arm.name, "after": arm.last.after, "budget": budget,
        "seed": seed, "cost": round(cost, 4), "batch": arm.last.batch, "loss": round(loss, 4),
        "seconds": round(seconds, 1), "device": name_of(learner.device), "commit": options.commit or commit(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "accuracy": accuracy, "right": right,
    }  # fmt: skip
    out = Path(options.results)
    with out.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    runs = Path(options.runs)
    runs.mkdir(parents=True, exist_ok=True)
    weights = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous()
               for k, v in learner.model.state_dict().items()}  # fmt: skip
    save_file(weights, runs / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.safetensors")
    shown = ", ".join(f"{way} {100 * share:.2f}" for way, share in accuracy["val"].items())
    print(f"{name}  {seconds:.0f} s  loss {loss:.3f}  validation: {shown}", flush=True)


def stored(path: Path = STORED) -> list[dict[str, Any]]:
    """The lines of the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Whether this process is the one that holds the file; it lets go at the end, or when it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_next(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    torch.backends.cudnn.benchmark = True
    task = TASKS[options.task](options.data, options.width, options.limit)
    chosen = [task.families[i] for i in options.families] if options.families else task.families
    for seed, (place, arms) in itertools.product(options.seeds, enumerate(chosen)):
        with lock(Path(options.runs) / f"{task.name}-{options.width}-{arms[0].name}-{seed}-{place}.lock") as mine:
            if mine:
                try:
                    family(task, arms, seed, options, deadline)
                except TimeoutError:
                    print("the time is up", flush=True)
                    return


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("next", "list"))
    parser.add_argument("--task", choices=tuple(TASKS), default="fer2013")
    parser.add_argument("--data", default="", metavar="FILE", help="the pictures, .npz")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=16, help="of the network for faces (16)")
    parser.add_argument("--limit", type=int, help="use this many training pictures")
    parser.add_argument("--budgets", type=float, nargs="+", default=[10, 20, 40, 80], help="in plain epochs of work")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", type=int, nargs="+", help="which of the task's lists of runs, from 0 on")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then; an unfinished run is lost")
    parser.add_argument("--results", default=str(STORED), metavar="FILE")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "worth"), metavar="FOLDER")
    parser.add_argument("--commit", default="", help="what to call this version, where git does not know")
    options = parser.parse_args()
    if options.step == "list":
        for line in stored(Path(options.results)):
            print(line["run"], line["accuracy"]["val"])
        return
    run_next(options)


if __name__ == "__main__":
    main()
