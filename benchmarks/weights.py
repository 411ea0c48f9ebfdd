"""Make examples/fer48/weights from a run of benchmarks/worth.py: the network in float16, and its card.

    python benchmarks/weights.py RUN --weights FILE.safetensors --data fer2013.npz

RUN is the run's name in benchmarks/results/worth.jsonl, chosen by its accuracy on PublicTest. The stored network is
loaded again and scored on PrivateTest, which takes minutes on the CPU. --logits FILE stores every view's logits, or
reads them if the file exists.
"""

# ruff: noqa: E501  # the card's sentences

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from cropvote import inject_crop_vote, per_view
from worth import ROOT, stored
from worth_tasks import Task, fer2013

from data.sources import ORDERS  # isort: skip  # in examples/fer48, which worth_tasks adds to sys.path
from keeping import save_model  # isort: skip
from model import fer_resnet18  # isort: skip
from scoring import interval  # isort: skip

OUT = ROOT / "examples" / "fer48" / "weights"
VIEWS = {"centre": [4], "centre + mirror": [4, 9], "ten views": list(range(10))}


@torch.no_grad()
def read(task: Task, weights: Path, width: int) -> dict[str, np.ndarray]:
    """Return the logits of every view on PublicTest and PrivateTest, (n, 10, 7)."""
    model = inject_crop_vote(fer_resnet18(num_classes=7, width=width), after="layer1", input_size=48).eval()
    model.load_state_dict(load_file(weights))
    found = {}
    for split in ("val", "test"):
        images, labels = task.splits[split]
        found[split] = torch.cat([per_view(model, task.plainly(some)) for some in images.split(64)]).numpy()
        found[f"{split}_labels"] = labels.numpy()
    return found


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that minimises the loss of the vote's logits on PublicTest."""
    candidates = torch.arange(0.5, 2.01, 0.01)
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in candidates]
    return round(float(candidates[int(torch.stack(losses).argmin())]), 2)


def percent(right: np.ndarray) -> str:
    low, high = interval(int(right.sum()), len(right))
    return f"{100 * right.mean():.1f} ({100 * low:.1f} – {100 * high:.1f})"


def read_or_load(task: Task, options: argparse.Namespace, width: int) -> dict[str, np.ndarray]:
    """Return the logits of :func:`read`, from the file of an earlier run if there is one."""
    kept = Path(options.logits) if options.logits else None
    if kept and kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    logits = read(task, Path(options.weights), width)
    if kept:
        np.savez(kept, **logits)
    return logits


def find_copies(task: Task) -> np.ndarray:
    """Return which PrivateTest faces are pixel-identical to one in Training or PublicTest."""
    known = {image.numpy().tobytes() for split in ("train", "val") for image in task.splits[split][0]}
    return np.array([image.numpy().tobytes() in known for image in task.splits["test"][0]])


def half_network(weights: str, width: int) -> nn.Module:
    """Return the network with its weights in float16."""
    model = fer_resnet18(num_classes=7, width=width)
    model.load_state_dict(load_file(weights))
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.half()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("run")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--logits", metavar="FILE")
    options = parser.parse_args()
    line: dict[str, Any] = next(line for line in stored() if line["run"] == options.run)
    task = fer2013(options.data, line["width"], None)
    logits = read_or_load(task, options, line["width"])
    names, labels = ORDERS["FER2013"], logits["test_labels"]
    right = {way: logits["test"][:, views].mean(1).argmax(1) == labels for way, views in VIEWS.items()}
    votes = {split: torch.from_numpy(logits[split]).mean(1) for split in ("val", "test")}
    heat = temperature(votes["val"], torch.from_numpy(logits["val_labels"]))
    errors = [
        100 * float(multiclass_calibration_error((votes["test"] / t).softmax(1), torch.from_numpy(labels), 7, n_bins=10))
        for t in (1.0, heat)
    ]  # fmt: skip
    facts = {
        "architecture": "fer_resnet18", "width": line["width"], "after": "layer1", "vote": "soft",
        "outputs": list(names), "target": "expression", "data": "FER2013", "run": line["run"],
        "commit": line["commit"], "temperature": heat, "split": "PrivateTest", "versions": line["versions"],
        "preprocessing": {"size": 48, "channels": "RGB", "scale": "x / 127.5 - 1"},
        "summary": f"{100 * right['ten views'].mean():.1f} % of PrivateTest",
        "accuracy": {way: round(float(hits.mean()), 4) for way, hits in right.items()},
    }  # fmt: skip
    model = half_network(options.weights, line["width"])
    OUT.mkdir(parents=True, exist_ok=True)
    save_model(OUT, model, facts)
    parameters = sum(p.numel() for p in model.parameters())
    text = card(line, names, labels, right, find_copies(task), errors, heat, parameters)
    (OUT / "MODEL_CARD.md").write_text(text)
    print(json.dumps(facts, indent=1), text, sep="\n")


def card(
    line: dict[str, Any], names: tuple[str, ...], labels: np.ndarray, right: dict[str, np.ndarray],
    copies: np.ndarray, errors: list[float], heat: float, parameters: int,
) -> str:  # fmt: skip
    """Return the model card in Markdown."""
    groups = {"all": np.ones_like(copies), "without copies": ~copies}
    groups |= {name: labels == i for i, name in enumerate(names)}
    lines = [
        "# A facial-expression network, trained on FER2013 by this project", "",
        f"`fer_resnet18` with width {line['width']} ({parameters:,} parameters, float16), "
        "voting over ten views after `layer1`. Seven classes: " + ", ".join(names) + ".", "",
        "**Data.** The Training split of FER2013: 28,709 greyscale images of 48×48 pixels, collected with a search engine "
        "in 2013 and labelled by people. The data set was released for a public challenge without a clear grant of "
        "rights: use the network for research and to try out the library, and ask a lawyer before using it for anything "
        "else. This repository contains none of its images.", "",
        f"**Training.** `python benchmarks/worth.py`, run `{line['run']}`: as much compute as {line['budget']:g} epochs of "
        "the plain network (the same network without the vote), the last quarter of it on two of the ten views per step; "
        f"AdamW; {line['device']}, torch {line['versions']['torch']}, commit {line['commit']}. Of the voting runs of that "
        f"script, this one was selected on PublicTest accuracy ({100 * line['accuracy']['val']['ten views']:.1f} %).", "",
        "**Accuracy** on the 3,589 faces of PrivateTest, in %, with 95 % Wilson intervals:", "",
        "| faces | number | " + " | ".join(right) + " |",
        "|---|---:|" + "---|" * len(right),
        *(f"| {name} | {chosen.sum():,} | " + " | ".join(percent(hits[chosen]) for hits in right.values()) + " |"
          for name, chosen in groups.items()),
        "",
        "Without copies: excluding the faces that also appear, pixel for pixel, in Training or PublicTest. For a single "
        "class, the accuracy is the recall of that class. The labels are noisy: people get about 65 % of them right.", "",
        f"**Calibration.** The vote's expected calibration error is {errors[0]:.1f} points (ten bins); with its logits "
        f"divided by the temperature {heat:g} (chosen on PublicTest; in model.json) it is {errors[1]:.1f}.", "",
        "**Do not use it** to make decisions about people. A label records what annotators thought a face showed, not what "
        "the person felt. The data set is skewed towards some ages, skin tones and cultures, and so is the network. It was "
        "trained on small grey images only.", "",
        f"Scored with torch {torch.__version__}, Python {platform.python_version()}, on a CPU, by "
        "`python benchmarks/weights.py`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
