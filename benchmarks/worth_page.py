"""Make the tables and picture of docs/results.md, docs/guides/fine-tuning.md and README from results/worth.jsonl."""

from __future__ import annotations

import base64
import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import nn

from cropvote import profile
from pages import folded, wrapped
from worth import stored  # also adds examples/fer48 to sys.path

import cifar  # isort: skip
from compare import mean_and_sd, spread  # isort: skip
from model import fer_resnet18  # isort: skip
from worth_tasks import Network  # isort: skip

Line = dict[str, Any]
UNTIL_SURE = Path(__file__).parent / "results" / "until_sure_shipped.json"
MIRRORED = ("none", "mirrored input")
#: How many views each way to predict computes.
COUNTS = {"centre": 1, "centre + mirror": 2, "five crops": 5, "ten views": 10}
WIDTH = 32


@dataclass(frozen=True, eq=False)
class Study:
    """A comparison of runs: one task, one budget of work."""

    task: str
    budget: float
    pictures: int  # the number scored
    size: int
    make: Callable[[], nn.Module]
    rows: list[tuple[str, str, str]]  # the arm, the way to predict, the label
    blocks: int | None = None  # of a CIFAR ResNet's stage
    width: int = WIDTH  # of the face network

    def lines(self, budget: float | None = None) -> dict[tuple[str, int], Line]:
        """Return the runs of a budget by arm and seed; repeats of a seed are left to :func:`noise`."""
        return {(line["arm"], line["seed"]): line for line in self.all() if line["budget"] == (budget or self.budget)}

    def all(self) -> list[Line]:
        mine = [line for line in stored() if line["task"] == self.task and "again" not in line]
        return [
            line for line in mine if line.get("width", self.width) == self.width and line.get("blocks") == self.blocks
        ]

    def seeds(self, arm: str, budget: float | None = None) -> list[int]:
        return sorted(seed for name, seed in self.lines(budget) if name == arm)


FACES = Study(
    "fer2013", 60, 3589, 48, lambda: fer_resnet18(width=WIDTH),
    [
        ("none", "plain", "plain"),
        ("none", "mirrored input", "**plain, averaged with the mirrored input**"),
        ("layer1=ten:2", "centre", "after `layer1`, two of ten views per step; predicts with the centre"),
        ("layer1=ten:2", "centre + mirror", "the same; predicts with centre + mirror"),
        ("layer1=ten:2", "ten views", "the same; predicts with ten views"),
        ("layer1=ten", "ten views", "after `layer1`, ten views per step; predicts with ten views"),
        ("late layer1=ten:2", "ten views", "plain, then two views per step in the last quarter; predicts with ten"),
        ("late input=hflip,layer3=five", "ten views", "plain, then mirrored input and crops after `layer3`"),
    ],
)  # fmt: skip
FEWER = dataclasses.replace(
    FACES, budget=8, make=lambda: fer_resnet18(width=16), width=16,
    rows=[
        ("none", "plain", "plain"),
        ("none", "mirrored input", "**plain, averaged with the mirrored input**"),
        ("layer1=ten:1", "centre", "after `layer1`, one of ten views per step; predicts with the centre"),
        ("layer1=ten:1", "centre + mirror", "the same; predicts with centre + mirror"),
        ("layer1=ten:1", "ten views", "the same; predicts with ten views"),
        ("layer1=ten:2", "ten views", "two views per step; predicts with ten views"),
        ("layer1=ten:3", "ten views", "three views per step; predicts with ten views"),
        ("layer1=ten", "ten views", "ten views per step; predicts with ten views"),
        ("layer1=hflip,layer3=five", "ten views", "mirrored after `layer1`, cropped after `layer3`; ten views a step"),
    ],
)  # fmt: skip
OUTSIDE, UNALIGNED = "input=hflip,layer2=five 7/8", "input=hflip,layer2=five:2"
OTHER = "input=hflip,layer{}=five 7/8"
PICTURES = Study(
    "cifar10", 30, 10000, 32, cifar.CifarResNet,
    [
        ("none", "plain", "plain"),
        ("none", "mirrored input", "**plain, averaged with the mirrored input**"),
        ("layer1=ten:2", "centre", "after `layer1`, two of ten views per step; predicts with the centre"),
        ("layer1=ten:2", "ten views", "the same; predicts with ten views"),
        ("layer1=ten", "ten views", "after `layer1`, ten views per step; predicts with ten views"),
        (OUTSIDE, "ten views", "mirrored input and crops after `layer2`, ten views a step"),
        (f"late {OUTSIDE}", "ten views", "plain, then the same for the last quarter"),
    ],
    blocks=3,
)  # fmt: skip
TUNED = Study(
    "finetune", 6, 10000, 32, cifar.CifarResNet,
    [
        ("none", "plain", "plain"),
        ("none", "mirrored input", "**plain, averaged with the mirrored input**"),
        (f"{OUTSIDE}:2", "centre + mirror", "mirrored input, aligned crops, two views a step; predicts with two"),
        (f"{OUTSIDE}:2", "ten views", "the same; predicts with ten"),
        (UNALIGNED, "ten views", "the same with crops that are not aligned; predicts with ten"),
        (f"late {OUTSIDE}", "ten views", "plain, then aligned crops for the last quarter of training"),
        (f"{OUTSIDE}:2 after 0.17", "ten views", "plain for one epoch, then two views a step; predicts with ten"),
        (f"{OUTSIDE}:2 after 0.33", "ten views", "plain for two, then two views a step; predicts with ten"),
        (f"{OTHER.format(1)}:2", "ten views", "aligned crops after `layer1` instead of `layer2`; predicts with ten"),
        (f"{OTHER.format(3)}:2", "ten views", "crops after `layer3` instead; predicts with ten"),
        ("layer1=ten", "ten views", "ten views after `layer1`, the mirror inside"),
    ],
    blocks=3,
)  # fmt: skip
DEEPER_ARMS = ("none", f"{OUTSIDE}:2", f"late {OUTSIDE}", "layer1=ten")  # the runs made
DEEPER = dataclasses.replace(
    TUNED, make=lambda: cifar.CifarResNet(9), rows=[row for row in TUNED.rows if row[0] in DEEPER_ARMS], blocks=9
)
LINES = {
    MIRRORED: ("plain, averaged with the mirrored input", "#444444"),
    ("layer1=ten:2", "ten views"): ("two of ten views a step, predicts with ten", "#2f6db0"),
    ("layer1=ten", "ten views"): ("ten views a step", "#c0392b"),
    ("late layer1=ten:2", "ten views"): ("plain, two views a step in the last quarter", "#2e8b57"),
    ("late input=hflip,layer3=five", "ten views"): ("plain, then mirrored input and late crops", "#e08a1e"),
}


@cache
def work_of(study: Study, arm: str, way: str) -> float:
    """Return the multiply-adds of a prediction relative to the plain network."""
    if arm == "none":
        return 2.0 if way == "mirrored input" else 1.0
    network = Network(arm.removeprefix("late ").partition(":")[0])  # without "late", views a step and share of work
    table = list(profile(study.make().eval(), study.size, sites=[network.sites]))
    return table[-1].gmacs_by_views[COUNTS[way]] / table[0].gmacs


def accuracies(study: Study, arm: str, way: str, budget: float | None = None) -> list[float]:
    lines = study.lines(budget)
    return [lines[arm, seed]["accuracy"]["test"][way] for seed in study.seeds(arm, budget)]


def p_values(study: Study, arm: str, way: str, budget: float | None = None, than: tuple[str, str] = MIRRORED) -> str:
    """Return each seed's p of McNemar's exact test against another way to predict, at the same seed and work."""
    lines, found = study.lines(budget), []
    for seed in study.seeds(arm, budget):
        ours, theirs = (right(lines[a, seed], w, study.pictures) for a, w in ((arm, way), than))
        won, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        found.append(f"{p:.1g}" if p >= 0.001 else "<0.001")
    return ", ".join(found)


def ahead(study: Study, arm: str, way: str, budget: float | None = None, than: tuple[str, str] = MIRRORED) -> str:
    """Return the points ahead of another way to predict, at the same seed and work, such as ``−0.4 ± 0.4``."""
    lines = study.lines(budget)
    gains = [lines[arm, seed]["accuracy"]["test"][way] - lines[than[0], seed]["accuracy"]["test"][than[1]]
             for seed in study.seeds(arm, budget)]  # fmt: skip
    mean, sd = mean_and_sd(gains)
    text = f"{mean:+.1f}" if len(gains) == 1 else f"{mean:+.1f} ± {sd:.1f}"
    return text.replace("-", "−")


def right(line: Line, way: str, pictures: int) -> np.ndarray:
    """Return which images the run got right, (n,) bool."""
    packed = np.frombuffer(base64.b64decode(line["right"]["test"][way]), np.uint8)
    return np.unpackbits(packed, count=pictures).astype(bool)


def table(study: Study, test: str, rows: int | None = None, tests: bool = True) -> str:
    """Return a row for each way to train and predict; ``tests`` adds each seed's p of McNemar's test."""
    head = ["network", "work of a prediction", test, "points ahead of plain + mirror"] + ["p of each seed"] * tests
    out = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|" + "---|" * tests]
    for arm, way, words in study.rows[:rows]:
        cells = [words, f"{work_of(study, arm, way):.2f}", spread(accuracies(study, arm, way))]
        same = (arm, way) == MIRRORED
        cells += ["–" if same else ahead(study, arm, way)] + ["–" if same else p_values(study, arm, way)] * tests
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def short_table() -> str:
    """Return the README's first table."""
    return table(FACES, "PrivateTest, %", rows=6, tests=False)


def tuned(study: Study = TUNED) -> str:
    """Return a table of docs/guides/fine-tuning.md, with its caption."""
    one = study.lines()["none", 0]
    task = "finetune" if study.blocks == 3 else "finetune56"
    return (
        f"{table(study, 'test, %')}\n\n"
        f"ResNet-{6 * (study.blocks or 0) + 2}, pretrained by others on CIFAR-10's original pictures, fine-tuned "
        f"on 10,000 of them stored as JPEG with the work of {study.budget:g} plain epochs, and scored on the 10,000 "
        f"test pictures; mean ± sd of seeds {', '.join(map(str, study.seeds('none')))}; p of McNemar's exact test; "
        f"torch {one['versions']['torch']}, CPU. Made by `python benchmarks/worth.py next --task {task} --budgets "
        f"{study.budget:g}`."
    )


def noise() -> float:
    """Return the largest difference on PrivateTest, in points, between two ten-view runs with the same seed."""
    found: dict[str, list[float]] = {}
    for line in stored():
        if line["task"] == FACES.task:
            ways = line["accuracy"]["test"]
            found.setdefault(line["run"], []).append(100 * ways.get("ten views", ways.get("plain")))
    return max(max(values) - min(values) for values in found.values() if len(values) > 1)


def facts() -> str:
    one = FACES.lines()["none", 0]
    size = sum(parameter.numel() for parameter in fer_resnet18(num_classes=7, width=WIDTH).parameters())
    return (
        f"FER2013 at 48×48, width {WIDTH} ({size:,} parameters), from scratch, seeds "
        f"{', '.join(map(str, FACES.seeds('none')))}; torch {one['versions']['torch']}, one {one['device']}"
    )


def section(figures: Path) -> list[str]:
    draw(figures / "worth.svg")
    return [
        "## Equal work", "",
        "![Left: accuracy against training work, one line per way to train. Right: accuracy against the work of a "
        "prediction.](figures/worth.svg)", "",
        *table(FACES, "PrivateTest, %").splitlines(), "", *wrapped(advice()), "",
        *folded("How it was measured", wrapped(conditions())),
        *folded("One, two, three or ten views a step, and two sites: a short training run", fewer()),
        "### Beyond faces", "",
        *table(PICTURES, "test, %").splitlines(), "", *wrapped(not_faces()), "",
        *folded("What did not help: the vote as a teacher, and a longer recipe", did_not_help()),
    ]  # fmt: skip


def advice() -> str:
    two = ("layer1=ten:2", "ten views")
    first = lambda arm, way, budget: f"{100 * accuracies(FACES, arm, way, budget)[0]:.1f}"  # noqa: E731
    centre = ahead(FACES, "layer1=ten:2", "centre", than=("none", "plain")).removeprefix("−")
    return f"""
        **What to do: train the plain network and average it with its mirrored input. At equal training work, no way of
        training on views beats that, and ten views a step are far behind.** Two views a step come close at
        {FACES.budget:g} epochs of work, and so does plain training with views in the last quarter. With twice that work
        (one seed, 0) the plain network averaged with its mirrored input goes from {first(*MIRRORED, 60)} to
        {first(*MIRRORED, 120)} on PrivateTest, two views a step from {first(*two, 60)} to {first(*two, 120)} (p =
        {p_values(FACES, *two, 120)} between the two): if the lines cross, they cross there. If a prediction must cost
        less than the plain network's, the centre view alone is {centre} points behind it at 0.78 of its work; centre
        and mirror, at 1.28, lie between plain and plain averaged with its mirrored input, at 2. {until_sure()}"""


def until_sure() -> str:
    """Return what votes that stop when sure give, on the network of examples/fer48/weights."""
    (run,) = json.loads(UNTIL_SURE.read_text())["runs"]
    few, sure, whole = (run["rows"][name] for name in ("centre and mirror alone", "until sure", "all views, soft"))
    shown = lambda row: f"{100 * row['accuracy']:.1f} % at {row['gmacs'] / run['plain']:.2f}"  # noqa: E731
    mirrored = 100 * accuracies(FACES, *MIRRORED, 60)[run["config"]["seed"]]
    return f"""`vote_until_sure`, on the network in examples/fer48/weights, keeps the accuracy of ten views for less
        work, {shown(sure)} times the plain network's (two views {shown(few)}, ten {shown(whole)}), but is not the
        better choice either: the plain network of the same seed, averaged with its mirrored input, has {mirrored:.1f} %
        at 2."""


def conditions() -> str:
    smaller = sorted({line["budget"] for line in FACES.all()} - {FACES.budget})
    return f"""
        {facts()}. Every network is trained for the multiply-adds of {FACES.budget:g} plain epochs (in the picture also
        {", ".join(f"{budget:g}" for budget in smaller)}); the number of views per step decides how many epochs that is.
        *Work of a prediction*: its multiply-adds relative to the plain network's. The last weights are scored; nothing
        was chosen by PrivateTest. AdamW, a constant rate that falls to 0 over the last quarter of the work; batches of
        128 faces, 64 or 32 with ten views. Mean ± standard deviation of the seeds; p: McNemar's exact test against the
        plain network with its mirrored input, of the same seed. Sums on a GPU are not reproducible: two runs with the
        same seed differ by up to {noise():.1f} points. Not run at this width: one or three views a step, two sites
        throughout training, more seeds at 120 epochs. Made by `python benchmarks/worth.py next`."""


def fewer() -> list[str]:
    """Return the comparison of all numbers of views a step, on fewer faces."""
    one = FEWER.lines()["none", 0]
    seeds = {arm: FEWER.seeds(arm) for arm, *_ in FEWER.rows}
    most = max(seeds.values(), key=len)
    short = [f"`{arm}`" for arm, some in seeds.items() if some != most]
    rest = f" ({', '.join(short)}: {', '.join(map(str, min(seeds.values(), key=len)))})" if short else ""
    told = f"""
        Width {FEWER.width}, {one["limit"]:,} faces, the work of {FEWER.budget:g} plain epochs on them, seeds
        {", ".join(map(str, most))}{rest}; torch {one["versions"]["torch"]}, CPU. Made by `python benchmarks/worth.py
        next --width {FEWER.width} --limit {one["limit"]} --budgets {FEWER.budget:g}`."""
    advice = """
        **In so short a run, every additional view per step costs accuracy.** With one view, a step costs 0.78 of a
        plain one, so there are more of them; then ten views predict about as well as the plain network averaged with
        its mirrored input, or slightly worse, for 2.6 times its work. Two sites are not the best choice here either."""
    return [*table(FEWER, "PrivateTest, %").splitlines(), "", *wrapped(advice), "", *wrapped(told)]


def not_faces() -> str:
    short = PICTURES.lines(10)
    one = short["none", 0]
    aligned, not_aligned = "layer2=five 7/8:2", "layer2=five:2"
    both = [seed for seed in PICTURES.seeds(aligned, 10) if (not_aligned, seed) in short]
    means = [100 * statistics.mean(short[arm, seed]["accuracy"]["test"]["five crops"] for seed in both)
             for arm in (aligned, not_aligned)]  # fmt: skip
    behind = ahead(PICTURES, "layer1=ten:2", "ten views", 10).removeprefix("−")
    other = {line["arm"]: line["accuracy"]["test"] for line in stored() if line["task"] == "mobilenet"}
    mobile = [100 * other[arm][way] for arm, way in (("none", "plain"), MIRRORED, ("blocks.0=ten:2", "ten views"),
                                                     ("late input=hflip,blocks.0=five 2/3", "ten views"))]  # fmt: skip
    return f"""
        The same from scratch on CIFAR-10 (as JPEG; ResNet-20, SGD): {PICTURES.budget:g} plain epochs of work on 45,000
        pictures, {PICTURES.pictures:,} scored, seeds {", ".join(map(str, PICTURES.seeds("none")))} (ten views a step:
        {len(PICTURES.seeds("layer1=ten"))}); {one["device"]}. **The advice is the same.** With a third of the work, two
        views a step are {behind} points behind plain with its mirrored input. Crops aligned with the stride behind
        `layer2`, two of five a step, reach {means[0]:.1f} %, unaligned crops {means[1]:.1f} % (10 epochs of work, seeds
        {", ".join(map(str, both))}). **Another architecture:** timm's
        `mobilenetv3_small_100`, FER2013 at 96×96, 6 plain epochs of work on a CPU, one seed, PrivateTest: plain
        {mobile[0]:.1f}, with its mirrored input {mobile[1]:.1f}; two of ten views a step after `blocks.0`, predicting
        with ten, {mobile[2]:.1f}; plain, then mirrored input and crops of 2/3 for the last quarter,
        {mobile[3]:.1f}. Such a short training run says little about a long one. Pretrained networks are the subject of
        [fine-tuning](guides/fine-tuning.md) and [test time only](guides/test-time-only.md)."""


def did_not_help() -> list[str]:
    taught, two = ("layer1=ten:2 teach 1", "ten views"), ("layer1=ten:2", "ten views")
    settings = ((FACES, "FER2013", 7.5), (FACES, "FER2013", 30), (PICTURES, "CIFAR-10", 10))
    gains = [f"{ahead(study, *taught, budget, two)} points ({name}, {budget} epochs of work)"
             for study, name, budget in settings]  # fmt: skip
    long = next(line for line in stored() if line["task"] == "longest")
    scores = {split: 100 * long["accuracy"][split]["ten views"] for split in ("val", "test")}
    first = f"""
        - **The vote as a teacher.** Each view also learns from the mean of its sample's views (KL divergence, weight 1;
        two views a step after `layer1`): {", ".join(gains)} against the same training without it, mean ± sd of three
        seeds. We did not make it an option."""
    second = f"""
        - **A longer recipe.** SGD at 0.1, weight decay 5e-4, stronger shifts and erasing, mixup 0.2, averaged weights
        (0.999), two views a step, at the paper's width for the work of {long["budget"]:g} plain epochs, one seed:
        {scores["val"]:.1f} on PublicTest, {scores["test"]:.1f} on PrivateTest with ten views. That is below the
        recipe under "Equal epochs". Erasing per view, self-distillation (`--teachers`) and recipes of 250 epochs
        and more have not been run: `python benchmarks/worth.py next --task longest --width 64 --budgets 320
        --device cuda`."""
    return [*wrapped(first, "  "), *wrapped(second, "  ")]


def draw(path: Path) -> None:
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right_ = figure.subplots(1, 2, sharey=False)
    over_training(left)
    over_prediction(right_)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def over_training(axes: Axes) -> None:
    everything: set[float] = set()
    for (arm, way), (label, colour) in LINES.items():
        budgets = sorted({line["budget"] for line in FACES.all() if line["arm"] == arm})
        everything.update(budgets)
        points = [mean_and_sd(accuracies(FACES, arm, way, budget)) for budget in budgets]
        means, sds = zip(*points, strict=True)
        axes.errorbar(budgets, means, sds, marker="o", ms=4, capsize=3, color=colour, label=label)
    axes.set(xscale="log", xlabel="training work, in epochs of the plain network (log)", ylabel="PrivateTest, %")
    axes.set_xticks(sorted(everything), [f"{budget:g}" for budget in sorted(everything)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def over_prediction(axes: Axes) -> None:
    """Draw every way to predict with the networks of one budget."""
    named = {"mirrored input": "plain + mirror"}
    for (arm, _), (_, colour) in LINES.items():
        if arm == "layer1=ten":
            continue  # far below: shown on the left
        ways = ["plain", "mirrored input"] if arm == "none" else ["centre", "centre + mirror", "ten views"]
        work = [work_of(FACES, arm, way) for way in ways]
        points = [mean_and_sd(accuracies(FACES, arm, way)) for way in ways]
        order = sorted(range(len(work)), key=work.__getitem__)
        axes.errorbar([work[i] for i in order], [points[i][0] for i in order], [points[i][1] for i in order],
                      marker="o", ms=4, capsize=3, color=colour)  # fmt: skip
        if arm in ("none", "layer1=ten:2"):
            for i in order:
                above = 6 if arm == "none" else -11
                axes.annotate(named.get(ways[i], ways[i]), (work[i], points[i][0]), (5, above),
                              textcoords="offset points", fontsize=7, color=colour)  # fmt: skip
    axes.set(xscale="log", xlim=(0.7, 8), xlabel="work of a prediction, over the plain network's (log)")
    axes.set_xticks([0.8, 1, 2, 3, 5], ["0.8", "1", "2", "3", "5"])
    axes.minorticks_off()
    axes.set_title(f"after {FACES.budget:g} epochs of work", fontsize=9)
    axes.grid(alpha=0.3)
