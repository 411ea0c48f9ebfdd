"""The table of docs/guides/fine-tuning.md, from the fine-tuning runs in results/worth.jsonl.

python benchmarks/finetune_page.py
"""

from __future__ import annotations

from functools import cache
from typing import Any

from scipy.stats import binomtest

from cropvote import profile
from worth import stored  # which puts examples/fer48 on the path

import cifar  # isort: skip
from compare import spread  # isort: skip
from worth_page import COUNTS, right  # isort: skip
from worth_tasks import Network  # isort: skip

Line = dict[str, Any]
PICTURES = 10000
#: The arm, the way of asking, the words for them.
ROWS = [
    ("none", "plain", "plain"),
    ("none", "mirrored input", "**plain, averaged with the mirrored input**"),
    ("input=hflip,layer2=five 7/8:2", "centre + mirror", "mirrored input, aligned crops, two views a step; two asked"),
    ("input=hflip,layer2=five 7/8:2", "ten views", "the same; asked for ten"),
    ("input=hflip,layer2=five:2", "ten views", "the same with crops that are not aligned; asked for ten"),
    ("late input=hflip,layer2=five 7/8:2", "ten views", "plain, and aligned crops in the last quarter; asked for ten"),
    ("layer1=ten", "ten views", "ten views after `layer1`, the mirror inside"),
]  # fmt: skip


@cache
def work_of(arm: str, way: str) -> float:
    """Return the multiply-adds of a prediction over the plain network's."""
    if arm == "none":
        return 2.0 if way == "mirrored input" else 1.0
    network = Network(arm.removeprefix("late ").partition(":")[0])
    table = list(profile(cifar.CifarResNet(3).eval(), 32, sites=[network.sites]))
    return table[-1].gmacs_by_views[COUNTS[way]] / table[0].gmacs


def lines() -> dict[tuple[str, int], Line]:
    return {(line["arm"], line["seed"]): line for line in stored() if line["task"] == "finetune"}


def compare(line: Line, way: str, other: Line) -> str:
    ours, theirs = right(line, way, faces=PICTURES), right(other, "mirrored input", faces=PICTURES)
    won, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    return f"{won} : {lost} ({binomtest(won, won + lost).pvalue:.2g})" if won + lost else "–"


def table() -> str:
    """Return the table, and what it is of."""
    found = lines()
    seeds = sorted({seed for _, seed in found})
    out = [
        "| fine-tuned, and asked | work of a picture | test, % | won : lost (p) against plain + mirror |",
        "|---|---:|---:|---|",
    ]
    for arm, way, words in ROWS:
        mine = [found[arm, seed] for seed in seeds if (arm, seed) in found]
        accuracy = spread([line["accuracy"]["test"][way] for line in mine])
        tests = [compare(line, way, found["none", line["seed"]]) for line in mine]
        shown = ", ".join(dict.fromkeys(tests))
        out.append(f"| {words} | {work_of(arm, way):.2f} | {accuracy} | {shown} |")
    one = found["none", seeds[0]]
    out += [
        "",
        f"ResNet-20, trained by others on CIFAR-10's original pictures, fine-tuned on 10,000 JPEGs of them for the "
        f"multiply-adds of {one['budget']:g} plain epochs, and scored on the 10,000 test pictures; mean ± sd of seeds "
        f"{', '.join(map(str, seeds))}; torch {one['versions']['torch']}, CPU. Made by `python benchmarks/worth.py "
        f"next --task finetune --budgets {one['budget']:g}`.",
    ]
    return "\n".join(out)


if __name__ == "__main__":
    print(table())
