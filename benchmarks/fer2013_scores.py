"""Compute figures from the logits of finished runs: benchmarks/results/fer2013.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from compare import mcnemar
from cropvote.stopping import choose_confidence
from cropvote.uncertainty import agreement
from results import RESULT
from scoring import HOWS, predictions, score

STORED = Path(__file__).parent / "results" / "fer2013.json"
TUNING = "tuning"
BINS = 10
#: Subsets of the ten views, as indices into ten_crop().
FEW = {"centre": [4], "centre + mirror": [4, 9], "five crops": [0, 1, 2, 3, 4]}
ALL, SURE = "ten views", "until sure"
PLAIN, MIRRORED, CROPPED = "plain", "averaged with the mirror image", "ten crops of the input"


class Run:
    """The file of a finished run: ``told``, its metadata, and its arrays."""

    def __init__(self, file: Path) -> None:
        self.name = file.stem
        with np.load(file, allow_pickle=False) as arrays:
            self.told: dict[str, Any] = json.loads(str(arrays["told"]))
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "told"}
        self.site: str = self.told["config"]["after"]
        self.labels, self.copies = self.arrays["test_labels"], self.arrays["copies"]

    def logits(self, split: str, way: str = "views") -> Tensor:
        """Return the logits in float32, (n, v, k)."""
        return self.arrays[f"{split}_{way}"].float()

    def ways(self) -> dict[str, tuple[float, dict[str, Tensor]]]:
        """Return, for each way to predict, the GMACs per face and each vote's classes of the test faces."""
        cost, rows = self.told["gmacs"], self.logits("test")
        if self.site == "none":
            twice, cropped = self.logits("test", "mirrored"), self.logits("test", "cropped")
            return {
                PLAIN: (cost["plain"], {"soft": predictions(rows, "soft")}),
                MIRRORED: (2 * cost["plain"], {"soft": predictions(twice, "soft")}),
                CROPPED: (cost["10"], _votes(cropped)),
            }
        found = {name: (cost[str(len(views))], _votes(rows[:, views])) for name, views in FEW.items()}
        return {**found, SURE: self._until_sure(rows), ALL: (cost["10"], _votes(rows))}

    def _until_sure(self, rows: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Use all views only if centre + mirror are unsure; the confidence is chosen on the validation faces."""
        cost, first = self.told["gmacs"], FEW["centre + mirror"]
        confidence = choose_confidence(self.logits("val"), self.arrays["val_labels"], first=first)
        sure = rows[:, first].mean(1).softmax(1).max(1).values > confidence
        votes = torch.where(sure, predictions(rows[:, first], "soft"), predictions(rows, "soft"))
        return work_until_sure(float(sure.double().mean()), cost["2"], cost["10"]), {"soft": votes}


def work_until_sure(stopped: float, two: float, ten: float) -> float:
    """Return the multiply-adds of a face: two views, and for those that go on, the front again and eight views."""
    tail = (ten - two) / 8
    return two + (1 - stopped) * (ten - 2 * tail)


def store(name: str, runs: list[Run]) -> None:
    """Store the figures of the runs, replacing older ones of the same runs."""
    plain = {(run.told["config"]["recipe"], run.told["config"]["seed"]): run for run in runs if run.site == "none"}
    fresh = [{"command": f"python benchmarks/fer2013.py train {name}", **figures(run, plain)} for run in runs]
    names = {run.name for run in runs}
    put(name, [*(old for old in stored().get(name, []) if old["run"] not in names), *fresh])


def put(name: str, found: list[dict[str, Any]]) -> None:
    STORED.write_text(json.dumps({**stored(), name: found}, indent=1, ensure_ascii=False) + "\n")


def stored() -> dict[str, list[dict[str, Any]]]:
    """Return the stored figures, by list."""
    return dict(json.loads(STORED.read_text())) if STORED.exists() else {}


def store_tuning(variants: dict[str, str], folder: Path) -> None:
    """Store the validation accuracy of each recipe variant that has run."""
    found = []
    for place, (name, options) in enumerate(variants.items()):
        file = folder / str(place) / RESULT
        if file.exists():
            result = json.loads(file.read_text())
            kept = {key: result[key] for key in ("epochs", "versions", "parameters")}
            told = {"variant": name, "options": options, "learnt_epochs": result["config"]["epochs"]}
            found.append({"command": "python benchmarks/fer2013.py tune", **told, **kept})
    put(TUNING, found)


def figures(run: Run, plain: dict[tuple[str, int], Run]) -> dict[str, Any]:
    """Return all figures of one run; ``plain`` holds the plain runs by recipe and seed."""
    config = run.told["config"]
    beside = plain.get((config["recipe"], config["seed"]))
    others = {name: classes["soft"] for name, (_, classes) in beside.ways().items()} if beside else {}
    rows = []
    for way, (cost, votes) in run.ways().items():
        for how, classes in votes.items():
            right = (classes == run.labels).double()
            row = {"way": way, "vote": how, "gmacs": cost, "accuracy": float(right.mean())}
            row["without_copies"] = float(right[~run.copies].mean())
            row["against"] = {
                other: mcnemar(classes, theirs, run.labels)
                for other, theirs in others.items()
                if not (run is beside and other == way)
            }
            rows.append(row)
    told = {key: value for key, value in run.told.items() if key not in ("curve", "command")}
    told["config"] = {**config, "data": Path(config["data"]).name, "out": "", "cache": ""}  # no local paths
    rates = [row["faces_per_second"] for row in run.told["curve"]]
    found = {"run": run.name, **told, "faces_per_second": float(np.median(rates)), "rows": rows,
             "faces": len(run.labels), "copies": int(run.copies.sum()), **calibration(run)}  # fmt: skip
    whole = score(run.logits("test"), run.labels, tuple(run.told["outputs"]))["soft"]
    found["recall"] = {name: row["recall"] for name, row in whole["per_class"].items()}
    return found if run.site == "none" else {**found, **which_views(run)}


def which_views(run: Run) -> dict[str, Any]:
    """Add views greedily by validation accuracy, and measure how far the views agree."""
    val, test = run.logits("val"), run.logits("test")
    taken: list[int] = []
    while len(taken) < val.shape[1]:
        left = [view for view in range(val.shape[1]) if view not in taken]
        taken.append(max(left, key=lambda view: _accuracy(val[:, [*taken, view]], run.arrays["val_labels"])))
    grown = [_accuracy(test[:, taken[: size + 1]], run.labels) for size in range(len(taken))]
    each = [_accuracy(test[:, [view]], run.labels) for view in range(test.shape[1])]
    shares = (agreement(test) * test.shape[1]).round().long()
    right = predictions(test, "soft") == run.labels
    agreeing = []
    for count in sorted(set(shares.tolist())):
        some = right[shares == count]
        agreeing.append({"views": count, "faces": len(some), "accuracy": float(some.double().mean())})
    return {"greedy": {"order": taken, "accuracy": grown}, "each_view": each, "agreement": agreeing}


def calibration(run: Run) -> dict[str, Any]:
    """Return the expected calibration error and the reliability diagram's bins, of one view and of the vote."""
    rows = run.logits("test")
    asked = {"one view": rows[:, FEW["centre"][0] if rows.shape[1] > 1 else 0]}
    if rows.shape[1] > 1:
        asked["soft vote"] = rows.mean(1)
    found = {}
    for name, logits in asked.items():
        sure, classes = logits.softmax(1).max(1)
        right, place = (classes == run.labels).double(), (sure * BINS).long().clamp(max=BINS - 1)
        error = multiclass_calibration_error(logits.softmax(1), run.labels, logits.shape[1], n_bins=BINS)
        bins = [
            {"confidence": float(sure[place == i].mean()), "accuracy": float(right[place == i].mean()), "faces": int(n)}
            for i in range(BINS)
            if (n := (place == i).sum())
        ]
        found[name] = {"ece": float(error), "bins": bins}
    return {"calibration": found}


def _votes(rows: Tensor) -> dict[str, Tensor]:
    """Return the classes by every vote for ten views, by the soft vote only for fewer."""
    return {how: predictions(rows, how) for how in (HOWS if rows.shape[1] == 10 else HOWS[:1])}


def _accuracy(rows: Tensor, labels: Tensor) -> float:
    return float((predictions(rows, "soft") == labels).double().mean())
