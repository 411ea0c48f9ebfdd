"""The part of docs/results.md on equal work, its picture, and README's first table, from results/worth.jsonl."""

from __future__ import annotations

import base64
import statistics
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

from compare import mean_and_sd, spread
from config import sites_of
from cropvote import profile
from model import fer_resnet18
from worth import stored

WIDTH = 32
Line = dict[str, Any]
#: The rows of the short table: arm, way of asking, the words for them.
ROWS = [
    ("none", "plain", "plain"),
    ("none", "mirrored input", "plain, averaged with the mirrored input"),
    ("layer1=ten:2", "centre", "two of ten views a step after `layer1`; asked for the centre"),
    ("layer1=ten:2", "centre + mirror", "the same, asked for centre + mirror"),
    ("layer1=ten:2", "ten views", "the same, asked for ten views"),
    ("layer1=ten", "ten views", "ten views a step after `layer1`"),
    ("late layer1=ten:2", "ten views", "plain, then two views a step for the last quarter"),
    ("late input=hflip,layer3=five", "ten views", "plain, then mirrored input and crops after `layer3`"),
]
#: What a way of asking computes: how many views.
COUNTS = {"centre": 1, "centre + mirror": 2, "five crops": 5, "ten views": 10, "ten views, hard": 10}
LINES = {
    ("none", "mirrored input"): ("plain, averaged with the mirrored input", "#444444"),
    ("layer1=ten:2", "ten views"): ("two of ten views a step, asked for ten", "#2f6db0"),
    ("layer1=ten", "ten views"): ("ten views a step", "#c0392b"),
    ("late layer1=ten:2", "ten views"): ("plain, two views a step in the last quarter", "#2e8b57"),
    ("late input=hflip,layer3=five", "ten views"): (
        "plain, mirrored input and late crops in the last quarter",
        "#e08a1e",
    ),
}


def runs() -> list[Line]:
    """The runs of FER2013 at one width, each once: the same seed again is for :func:`noise`."""
    return [line for line in stored() if line["task"] == "fer2013" and line["width"] == WIDTH and "again" not in line]


@cache
def inference(after: str) -> dict[int, float]:
    """Return the multiply-adds of 1, 2, 5 and 10 views, relative to the plain network."""
    site = {"layer1=ten": "layer1"}.get(after, after)
    table = profile(fer_resnet18(width=WIDTH), 48, sites=[sites_of(site)])
    plain = table["baseline"].gmacs
    return {count: gmacs / plain for count, gmacs in list(table)[-1].gmacs_by_views.items()}


def work_of(after: str, way: str) -> float:
    if after == "none":
        return 2.0 if way == "mirrored input" else 1.0
    return inference(after)[COUNTS[way]]


def right(line: Line, way: str, split: str = "test", faces: int = 3589) -> np.ndarray:
    """(n,) bool: which faces the run got right."""
    packed = np.frombuffer(base64.b64decode(line["right"][split][way]), np.uint8)
    return np.unpackbits(packed, count=faces).astype(bool)


def against(line: Line, way: str, plain: Line) -> tuple[int, int, float]:
    """Won, lost and McNemar's p against the plain network with its mirrored input, of the same seed and work."""
    ours, theirs = right(line, way), right(plain, "mirrored input")
    won, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    return won, lost, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def rows(budget: float) -> list[list[str]]:
    """The cells of the short table at one budget."""
    found = {(line["arm"], line["seed"]): line for line in runs() if line["budget"] == budget}
    seeds = sorted({seed for _, seed in found})
    cells = []
    for arm, way, text in ROWS:
        lines = [found[arm, seed] for seed in seeds if (arm, seed) in found]
        tests = [against(line, way, found["none", line["seed"]]) for line in lines]
        compared = ", ".join(f"{won} : {lost} ({p:.2g})" for won, lost, p in tests)
        accuracy = [spread([line["accuracy"][split][way] for line in lines]) for split in ("val", "test")]
        work = f"{work_of(lines[0]['after'] if arm != 'none' else 'none', way):.2f}"
        cells.append([text, work, *accuracy, "–" if (arm, way) == ("none", "mirrored input") else compared])
    return cells


def table(budget: float) -> list[str]:
    head = ["network", "work of a face", "PublicTest, %", "PrivateTest, %", "won : lost (p) against plain + mirror"]
    return [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---|", *(f"| {' | '.join(row)} |" for row in rows(budget))]


def noise() -> float:
    """The largest difference, in points of PrivateTest, between two runs of the same seed with ten views."""
    found: dict[str, list[float]] = {}
    for line in stored():
        ways = line["accuracy"]["test"]
        found.setdefault(line["run"], []).append(100 * ways.get("ten views", ways.get("plain")))
    return max(max(values) - min(values) for values in found.values() if len(values) > 1)


def facts() -> str:
    one = runs()[0]
    seeds = sorted({line["seed"] for line in runs()})
    size = sum(parameter.numel() for parameter in fer_resnet18(num_classes=7, width=WIDTH).parameters())
    return (
        f"FER2013 at 48×48, width {WIDTH} ({size:,} parameters), from scratch, seeds {', '.join(map(str, seeds))}; "
        f"torch {one['versions']['torch']}, one {one['device']}"
    )


def section(figures: Path) -> list[str]:
    budgets = [f"{budget:g}" for budget in sorted({line["budget"] for line in runs()})]
    draw(figures / "worth.svg")
    *smaller, largest = budgets
    advice = f"""
        **What to do: up to {largest} epochs of work, train the plain network and average it with its mirrored
        input. No way through views is significantly ahead of that at equal work, and ten views a step are far
        behind.** Two views a step come level at the largest budget, as do views in the last quarter of a plain
        training. One view alone, at 0.78 of the plain network's work, is level with the plain network."""
    conditions = f"""
        {facts()}. Every network learns for the multiply-adds of {largest} plain epochs (in the picture also of
        {", ".join(smaller)}): the views of a step decide how many epochs that is. *Work of a face*: the
        multiply-adds of one prediction over the plain network's. The last weights are scored; nothing was chosen
        by PrivateTest. AdamW, a constant rate that falls to 0 over the last quarter of the work; batches of 128
        faces, 64 or 32 with ten views. *won : lost (p)*: for each seed, the faces that only this network, or
        only the plain one with its mirrored input, gets right, and McNemar's exact test. The plain network has
        not stopped gaining at the largest budget. A GPU's sums are not repeatable: the same seed twice differs
        by up to {noise():.1f} points. Two seeds (one with ten views a step): more were not run. Made by
        `python benchmarks/worth.py next`."""
    lines = [
        "## Equal work",
        "",
        "![Accuracy over training work, a line for each way to train.](figures/worth.svg)",
        "",
    ]
    return [*lines, *table(float(largest)), "", *wrapped(advice), "", *wrapped(conditions), ""]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def draw(path: Path) -> None:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for (arm, way), (label, colour) in LINES.items():
        lines = [line for line in runs() if line["arm"] == arm]
        budgets = sorted({line["budget"] for line in lines})
        values = [[x["accuracy"]["test"][way] for x in lines if x["budget"] == budget] for budget in budgets]
        means = [100 * statistics.mean(v) for v in values]
        axes.errorbar(budgets, means, [mean_and_sd(v)[1] for v in values], marker="o", ms=4, capsize=3, color=colour,
                      label=label)  # fmt: skip
    axes.set(xscale="log", xlabel="training work, in epochs of the plain network (log)", ylabel="PrivateTest, %")
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def short_table() -> str:
    """README's first table."""
    shown = [row[:2] + row[3:] for row in rows(60)[:6]]
    head = ["network", "work of a face", "PrivateTest, %", "won : lost (p) against plain + mirror"]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---|", *(f"| {' | '.join(row)} |" for row in shown)]
    return "\n".join(lines)
