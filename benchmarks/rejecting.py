"""Which measure of certainty finds the wrong predictions? On FER2013 and CIFAR-10, by the share that is kept.

    python benchmarks/rejecting.py --faces fer2013.npz --pictures cifar10_jpeg.npz

The shipped network with ten views after layer1 on PrivateTest, and a published ResNet-20 with its mirrored input and
five aligned crops after layer2 on CIFAR-10's test pictures. Of the predictions of the vote, the most certain ones are
kept; "one view" uses the predictions and softmax of the centre view alone. Where predictions are equally certain, as
agreement often has it, the accuracy is the mean over every order of them. The results go into
benchmarks/results/rejecting.json, and from there into docs/guides/reading-the-votes.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cropvote import five_crop, hflip, inject_crop_vote, per_view
from cropvote.uncertainty import agreement, mutual_information, predictive_entropy
from pages import line
from timing import commit
from worth import ROOT  # which puts examples/fer48 on the path
from worth_tasks import finetune

from batches import to_input  # isort: skip
from keeping import load_model  # isort: skip
from predict import WEIGHTS  # isort: skip

STORED = ROOT / "benchmarks" / "results" / "rejecting.json"
KEPT = (1.0, 0.9, 0.8, 0.7, 0.5)


def certainties(logits: Tensor, centre: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by measure each sample's predicted class and certainty, from (N, V, K)."""
    voted, alone = logits.mean(1), logits[:, centre]
    classes, chance = voted.argmax(1), voted.softmax(1).amax(1)
    return {
        "softmax of the vote": (classes, chance),
        "mean softmax of the views": (classes, logits.softmax(2).mean(1).amax(1)),
        "entropy of the mean softmax": (classes, -predictive_entropy(logits)),
        "agreement, ties broken by the softmax of the vote": (classes, agreement(logits) + 1e-3 * chance),
        "agreement": (classes, agreement(logits)),
        "mutual information": (classes, -mutual_information(logits)),
        "softmax of one view": (alone.argmax(1), alone.softmax(1).amax(1)),
    }


def kept_accuracy(right: np.ndarray, certain: np.ndarray, share: float) -> float:
    """Return the accuracy of the most certain share; of those with equal certainty, each is as likely to be kept."""
    count = round(share * len(right))
    least = np.sort(certain)[::-1][count - 1]
    sure, tied = certain > least, certain == least
    return float((right[sure].sum() + right[tied].mean() * (count - sure.sum())) / count)


def measure(logits: Tensor, labels: Tensor, centre: int) -> dict[str, list[float]]:
    rows = {}
    for name, (classes, certain) in certainties(logits.double(), centre).items():
        right, order = (classes == labels).numpy(), certain.numpy().round(9)
        rows[name] = [kept_accuracy(right, order, share) for share in KEPT]
    return rows


@torch.no_grad()
def faces(path: str) -> tuple[Tensor, Tensor]:
    model, _ = load_model(WEIGHTS)
    with np.load(path, allow_pickle=False) as arrays:
        chosen = np.flatnonzero(arrays["usage"] == "PrivateTest")
        images, labels = torch.from_numpy(arrays["images"][chosen]), torch.from_numpy(arrays["labels"][chosen])
    rows = [per_view(model.eval(), to_input(some.unsqueeze(1))) for some in images.split(64)]
    return torch.cat(rows), labels


@torch.no_grad()
def pictures(path: str) -> tuple[Tensor, Tensor]:
    task = finetune(path, 0, None)
    plan = {"input": hflip(), "layer2": five_crop(scale=7 / 8)}
    model = inject_crop_vote(task.make().eval(), after=plan, input_size=32)
    images, labels = task.splits["test"]
    return torch.cat([per_view(model, task.plainly(some)) for some in images.split(250)]), labels


def table(found: dict[str, Any]) -> str:
    """Return the table of docs/guides/reading-the-votes.md."""
    lines = [line("certainty", *(f"{data}, {share:.0%} kept" for data in found["rows"] for share in KEPT[1::2]))]
    lines.append("|---|" + "---:|" * (len(found["rows"]) * len(KEPT[1::2])))
    for name in next(iter(found["rows"].values())):
        cells = [f"{100 * rows[name][i]:.1f}" for rows in found["rows"].values() for i in (1, 3)]
        lines.append(line(name, *cells))
    return "\n".join(lines)


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faces", required=True, metavar="FILE", help="FER2013, .npz")
    parser.add_argument("--pictures", required=True, metavar="FILE", help="CIFAR-10, .npz")
    options = parser.parse_args()
    rows = {"FER2013": measure(*faces(options.faces), 4), "CIFAR-10": measure(*pictures(options.pictures), 4)}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    found = {"kept": KEPT, "rows": rows, "versions": versions, "commit": commit()}
    Path(STORED).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
