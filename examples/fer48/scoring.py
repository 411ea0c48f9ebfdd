"""Score the votes: figures, tables and plots from the logits of every view."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torchmetrics.functional import concordance_corrcoef, mean_squared_error

from cropvote import vote
from data import DataError, Split

#: The votes to score; a plain network's prediction is the same under all of them.
HOWS = ("soft", "probs", "hard")
MOOD = ("valence", "arousal")
CURVE, MATRIX = "curves.png", "confusion_matrix.png"


def aims(split: Split, mood: bool) -> Tensor:
    """Return the targets: labels (n,), or valence and arousal (n, 2)."""
    if mood:
        if split.mood is None:
            raise DataError(f"{split.name} has no valence and arousal.")
        return split.mood
    return split.labels


def predictions(logits: Tensor, how: str) -> Tensor:
    """Return the voted classes, (n, v, k) logits -> (n,)."""
    return vote(logits.flatten(0, 1), logits.shape[1], how).argmax(1)  # type: ignore[arg-type]  # HOWS are votes


def score(logits: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Score every vote: logits (n, v, k) against labels (n,), or valence and arousal against (n, 2)."""
    if targets.dim() == 2:
        return {"mean": _score_mood(logits.mean(1), targets)}
    hows = HOWS if logits.shape[1] > 1 else HOWS[:1]
    return {how: _score_classes(predictions(logits, how), targets, outputs) for how in hows}


def chosen_by(scores: dict[str, dict[str, Any]], how: str) -> float:
    """Return the figure that chooses the epoch: the vote's accuracy, or the concordance."""
    if "mean" in scores:
        return float(scores["mean"]["concordance"])
    return float(scores.get(how, scores["soft"])["accuracy"])


def interval(right: int, faces: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of ``right / faces``."""
    low, high = binomtest(right, faces).proportion_ci(method="wilson")
    return float(low), float(high)


def with_interval(accuracy: float, faces: int) -> str:
    """Format as ``73.1 % (95 %: 71.6–74.5)``, with Wilson's interval, which need not be symmetric."""
    low, high = interval(round(accuracy * faces), faces)
    return f"{100 * accuracy:.1f} % (95 %: {100 * low:.1f}–{100 * high:.1f})"


def _score_classes(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    right, ids = int((predicted == labels).sum()), range(len(classes))
    precision, recall, f1, faces = precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=0)
    rows = zip(classes, precision, recall, f1, faces, strict=True)
    return {
        "accuracy": right / len(labels),
        "interval": interval(right, len(labels)),
        "mean_class_accuracy": float(mean(r for r, n in zip(recall, faces, strict=True) if n)),
        "per_class": {
            name: {"precision": float(p), "recall": float(r) if n else None, "f1": float(f), "faces": int(n)}
            for name, p, r, f, n in rows
        },
        "confusion": confusion_matrix(labels, predicted, labels=ids).tolist(),
    }


def _score_mood(predicted: Tensor, mood: Tensor) -> dict[str, Any]:
    """Return Lin's concordance correlation coefficient (AffectNet's measure) and the root mean squared error."""
    concordance = [_concordance(predicted[:, i], mood[:, i]) for i in range(2)]
    errors = [float(mean_squared_error(predicted[:, i].contiguous(), mood[:, i].contiguous()) ** 0.5) for i in range(2)]
    return {
        "concordance": mean(concordance),
        "concordance_each": dict(zip(MOOD, concordance, strict=True)),
        "rmse_each": dict(zip(MOOD, errors, strict=True)),
    }


def _concordance(predicted: Tensor, mood: Tensor) -> float:
    """Return Lin's coefficient; 0 if all predictions or all targets are equal, where torchmetrics gives NaN."""
    if (predicted == predicted[0]).all() or (mood == mood[0]).all():
        return 0.0
    return float(concordance_corrcoef(predicted, mood))


def summary(scores: dict[str, dict[str, Any]], faces: int, plain: bool) -> str:
    """Return one line: each vote's accuracy with its interval, or the concordance of valence and arousal."""
    if "mean" in scores:
        each = scores["mean"]["concordance_each"]
        return "concordance " + ", ".join(f"{name} {value:.3f}" for name, value in each.items())
    shown = {how: with_interval(one["accuracy"], faces) for how, one in scores.items()}
    return shown["soft"] if plain else ", ".join(f"{how} {text}" for how, text in shown.items())


def of_epochs(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best, the last and the mean of the last five epochs, to show the effect of choosing the epoch."""
    values = [row["score"] for row in curve]
    best = max(range(len(values)), key=values.__getitem__)
    return {
        "best": values[best],
        "best_epoch": curve[best]["epoch"],
        "last": values[-1],
        "last_five": mean(values[-5:]),
    }


def per_class_table(one: dict[str, Any]) -> str:
    """Return a Markdown table with a row per class, in %."""
    lines = ["| class | recall | precision | F1 | faces |", "|---|---|---|---|---|"]
    for name, row in one["per_class"].items():
        recall = "–" if row["recall"] is None else f"{100 * row['recall']:.1f}"
        figures = f"{100 * row['precision']:.1f} | {100 * row['f1']:.1f}"
        lines.append(f"| {name} | {recall} | {figures} | {row['faces']} |")
    return "\n".join(lines)


def normalised(confusion: list[list[int]]) -> np.ndarray:
    """Divide each row (a true class) by its sum; a class without faces gives a row of zeros."""
    counts = np.array(confusion, dtype=float)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def plot_confusion(path: Path, confusion: list[list[int]], classes: tuple[str, ...], title: str) -> None:
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(100 * normalised(confusion), display_labels=classes)
    display.plot(ax=axes, cmap="Blues", values_format=".0f", xticks_rotation=35, im_kw={"vmin": 0, "vmax": 100})
    axes.set_title(f"{title}\n% of the true class", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_curves(path: Path, curve: list[dict[str, Any]], title: str, measure: str, split: str) -> None:
    """Plot training loss, learning rate and validation figure by epoch."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in curve]
    marker = "o" if len(curve) < 30 else None
    losses = [row["loss"] for row in curve]
    left.plot(epochs, losses, marker=marker, ms=3, color="#c0504d")
    left.set(title="training loss, with augmentation", xlabel="epoch", ylim=(0, 1.1 * max(losses)))
    if "score" in curve[0]:
        scores = [row["score"] for row in curve]
        best = of_epochs(curve)
        right.plot(epochs, scores, marker=marker, ms=3, color="#2f6db0")
        right.plot(
            best["best_epoch"], best["best"], marker="*", ms=11, color="#e08a1e", label=f"best: {best['best']:.3f}"
        )
        right.set(title=f"{measure} on {split}", xlabel="epoch")
        right.legend(frameon=False, loc="lower right")
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no validation faces: all are used for training", ha="center", va="center")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
