"""Train a small face-expression network, plain or voting, and write what it reached.

    python examples/fer48/train.py --after layer1                        toy faces, on this machine, in minutes
    python examples/fer48/train.py --after layer1 --data fer2013.csv     the real thing

Writes result.json, confusion_matrix.png and model.pt into --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import sklearn
import torch
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import cropvote
from cropvote import CropVoteLoss, inject_crop_vote, settings, ten_crop, vote

from data import DataError, Faces, Split, augment, load, to_input
from model import FerResNet18, fer_resnet18

VIEWS = ten_crop()


@dataclass(frozen=True)
class Config:
    """A run: everything that decides its figures."""

    data: str = "toy"
    after: str = "layer1"
    vote: Literal["soft", "hard"] = "soft"
    width: int = 16
    epochs: int = 8
    batch: int = 64
    rate: float = 2e-3
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    final_test: bool = False
    out: str = ""


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    try:
        result = train(config)
    except (DataError, OSError, cropvote.CropVoteError) as error:
        sys.exit(f"train.py: {error}")
    print(f"\n{report(result)}\n{Path(result['out']).resolve()}: result.json, confusion_matrix.png, model.pt")


def train(config: Config) -> dict[str, Any]:
    """The whole run. Returns what result.json holds."""
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    faces = load(config.data, config.limit, config.seed)
    splits = {name: split.to(device) for name, split in faces.splits.items()}
    print(f"{faces.name}: {', '.join(f'{len(s)} {s.name}' for s in splits.values())} faces; {faces.note}.")

    model = fer_resnet18(len(faces.classes), config.width).to(device)
    gmacs, parameters = count(model, config.after)
    if config.after != "none":
        inject_crop_vote(model, after=config.after, views=VIEWS, vote=config.vote, input_size=48)
    loss_of = CropVoteLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam(model.parameters(), lr=config.rate)
    batches = len(splits["train"]) // config.batch
    if batches == 0:
        raise DataError(f"{len(splits['train'])} training faces are less than one batch of {config.batch}.")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.rate, total_steps=config.epochs * batches)

    best, best_state, curve, start = -1.0, {}, [], time.monotonic()
    for epoch in range(config.epochs):
        model.train()
        total = torch.zeros((), device=device)
        order = torch.randperm(len(splits["train"])).to(device)
        title = f"epoch {epoch + 1}/{config.epochs}"
        for step in (bar := tqdm(range(batches), desc=title, leave=False, disable=None)):  # None: not in a log file
            rows = order[step * config.batch : (step + 1) * config.batch]
            x, y = augment(splits["train"].images[rows]), splits["train"].labels[rows]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss = loss_of(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            if step % 10 == 9:
                bar.set_postfix(loss=f"{total.item() / (step + 1):.3f}")
        score = evaluate(model, splits["val"], config)
        curve.append({"epoch": epoch + 1, "loss": total.item() / batches, "accuracy": score[config.vote]["accuracy"]})
        print("epoch {epoch}: loss {loss:.3f}, {split} {accuracy:.1%}".format(**curve[-1], split=splits["val"].name))
        if curve[-1]["accuracy"] > best:
            best = curve[-1]["accuracy"]
            best_state = {key: value.clone() for key, value in model.state_dict().items()}
    seconds = time.monotonic() - start

    model.load_state_dict(best_state)
    scored = splits["test" if config.final_test else "val"]
    votes = evaluate(model, scored, config, faces.classes)
    measured = {"parameters": parameters, "gmacs": gmacs, "seconds": round(seconds, 1), "curve": curve, "votes": votes}
    return write(measured, model, faces, scored, config)


@torch.no_grad()
def evaluate(
    model: FerResNet18, split: Split, config: Config, classes: tuple[str, ...] = (), batch: int = 128
) -> dict[str, dict[str, Any]]:
    """Accuracy by soft and hard vote, from the same rows; a plain network's prediction stands under both.

    With ``classes``, the accuracy of each and the predictions too.
    """
    model.eval()
    voting = config.after != "none"
    if voting:
        settings(model).eval_output = "views"
    rows = []
    for images in split.images.split(batch):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp):
            rows.append(model(to_input(images)).float())
    if voting:
        settings(model).eval_output = "vote"
    views = len(VIEWS) if voting else 1
    return {how: _score(vote(torch.cat(rows), views, how), split, classes) for how in ("soft", "hard")}


def _score(outputs: Tensor, split: Split, classes: tuple[str, ...]) -> dict[str, Any]:
    predicted = outputs.argmax(1)
    right = predicted == split.labels
    score: dict[str, Any] = {"accuracy": right.float().mean().item()}
    if classes:
        per_class = {name: right[split.labels == i] for i, name in enumerate(classes)}
        score["per_class"] = {name: r.float().mean().item() if len(r) else None for name, r in per_class.items()}
        score["predicted"] = predicted.tolist()
    return score


def count(model: FerResNet18, after: str) -> tuple[float, int]:
    """Multiply-adds of one image in 1e9 (half of what PyTorch counts), and parameters; the model stays as it is."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    if after != "none":
        inject_crop_vote(model, after=after, views=VIEWS, input_size=48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 48, 48, device=device))
    if after != "none":
        cropvote.remove_crop_vote(model)
    model.train(was)
    return counter.get_total_flops() / 2e9, sum(p.numel() for p in model.parameters())


def write(measured: dict[str, Any], model: FerResNet18, faces: Faces, scored: Split, config: Config) -> dict[str, Any]:
    """Put result.json, confusion_matrix.png and model.pt into the run's folder; return what result.json holds."""
    out = Path(config.out or f"runs/{faces.name}-{config.after}-{config.seed}")
    out.mkdir(parents=True, exist_ok=True)
    predicted = {how: score.pop("predicted") for how, score in measured["votes"].items()}
    classes = range(len(faces.classes))
    matrix = confusion_matrix(scored.labels.cpu(), predicted[config.vote], labels=classes, normalize="true")
    result = {
        "config": asdict(config),
        "versions": versions(scored.labels.device),
        "data": {"name": faces.name, "note": faces.note, "faces": {s.name: len(s) for s in faces.splits.values()}},
        "split": scored.name,
        "chosen_on": faces.splits["val"].name,
        **measured,
        "confusion_matrix": matrix.round(4).tolist(),
        "out": str(out),
    }
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(100 * matrix, display_labels=faces.classes)
    display.plot(ax=axes, cmap="Blues", values_format=".0f", xticks_rotation=35, im_kw={"vmin": 0, "vmax": 100})
    accuracy = result["votes"][config.vote]["accuracy"]
    title = "plain network" if config.after == "none" else f"ten views after {config.after}, {config.vote} vote"
    axes.set(title=f"{faces.name} {scored.name}, {title}: {accuracy:.1%}\n% of the true class")
    figure.savefig(out / "confusion_matrix.png", dpi=150)
    torch.save(model.state_dict(), out / "model.pt")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def report(result: dict[str, Any]) -> str:
    plain = result["config"]["after"] == "none"
    scores = [f"{'plain' if plain else how} {s['accuracy']:.1%}" for how, s in result["votes"].items()]
    note = "" if result["config"]["final_test"] else ", where the epoch was chosen"
    return f"{result['data']['name']} {result['split']}{note}: {', '.join(scores[: 1 if plain else 2])}"


def versions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "cropvote": cropvote.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}: {name}",
    }


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("train.py: --device cuda: PyTorch sees no CUDA device here; use --device auto or cpu.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def parse(argv: list[str] | None) -> Config:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default=Config.data, metavar="toy|CSV", help="toy faces (default), or the path of fer2013.csv")
    add("--after", default=Config.after, choices=["none", "input", "layer1", "layer2", "layer3"], help="where to split")
    add("--vote", default=Config.vote, choices=["soft", "hard"], help="the vote that chooses the epoch")
    add("--width", type=_positive, default=Config.width, help="channels of the first stage; the paper's is 64")
    add("--epochs", type=_positive, default=Config.epochs)
    add("--batch", type=_positive, default=Config.batch)
    add("--rate", type=float, default=Config.rate, help="highest learning rate of the one-cycle schedule")
    add("--limit", type=_positive, help="use at most this many faces of every split")
    add("--seed", type=int, default=Config.seed)
    add("--device", default=Config.device, choices=["auto", "cpu", "cuda"])
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--final-test", action="store_true", help="score the test split (FER2013's PrivateTest): once, at the very end")
    add("--out", default=Config.out, metavar="FOLDER", help="default: runs/DATA-AFTER-SEED")
    return Config(**vars(parser.parse_args(argv)))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


if __name__ == "__main__":
    main()
