"""Write a finished run: result.json, pictures, the logits of every view, and the model with its card."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from torch import Tensor, nn

import cropvote
from config import Config, in_words, sites_of
from cropvote import profile
from data import Faces, Split
from keeping import CARD, WEIGHTS, save_model, write_whole
from machines import Machine
from model import fer_resnet18
from scoring import (
    CURVE,
    MATRIX,
    aims,
    of_epochs,
    per_class_table,
    plot_confusion,
    plot_curves,
    score,
    summary,
    with_interval,
)

RESULT, LOGITS, VALIDATION, README = "result.json", "logits.npz", "validation.txt", "MODEL_CARD.md"
#: All files that a finished run may write.
WRITTEN = (RESULT, LOGITS, VALIDATION, README, CURVE, MATRIX, WEIGHTS, CARD)


def figures(
    config: Config, faces: Faces, outputs: tuple[str, ...], curve: list[dict[str, Any]], here: Machine
) -> dict[str, Any]:
    """Return the part of result.json that does not depend on the scored faces."""
    cost = costs(config, len(outputs))
    return {
        "config": dataclasses.asdict(config),
        "versions": versions(here),
        "data": {
            "name": faces.name,
            "layout": faces.layout,
            "note": faces.note,
            "faces": {name: len(split) for name, split in faces.splits.items()},
            "names": {name: split.name for name, split in faces.splits.items()},
            "fingerprints": faces.fingerprints(),
            "skipped": len(faces.skipped),
        },
        "outputs": list(outputs),
        **cost,
        "seconds": round(sum(row["seconds"] for row in curve), 1),
        "curve": curve,
        "epochs": of_epochs(curve) if "score" in curve[0] else None,
    }


def scores(
    config: Config, split: Split | None, logits: Tensor | None, mood: bool, outputs: tuple[str, ...]
) -> dict[str, Any]:
    """Return the part of result.json on the scored faces, empty if there are none."""
    if split is None or logits is None:
        return {"split": None, "votes": {}, "summary": "not scored"}
    votes = score(logits, aims(split, mood), outputs)
    return {"split": split.name, "votes": votes, "summary": summary(votes, len(split), config.after == "none")}


def costs(config: Config, outputs: int) -> dict[str, Any]:
    """Return the parameters, and per face with all views, the GMACs and the MiB saved for the backward pass."""
    model = fer_resnet18(num_classes=outputs, width=config.width)
    site = "baseline" if config.after == "none" else config.after
    cost = profile(model, 48, sites=[] if config.after == "none" else [sites_of(config.after)])[site]
    return {"parameters": cost.parameters, "gmacs": cost.gmacs, "train_mib": cost.train_memory_mib}


def versions(here: Machine) -> dict[str, str]:
    return {
        "cropvote": cropvote.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "device": here.name(),
        "processes": str(here.size),
    }


def write(
    out: Path, model: nn.Module, result: dict[str, Any], logits: Tensor | None, faces: Faces, scored: Split | None
) -> None:
    """Write everything to the run's folder; result.json comes last and marks the run as complete."""
    config, title = result["config"], title_of(result)
    if scored is not None and logits is not None:
        stored = io.BytesIO()
        np.savez_compressed(stored, logits=logits.numpy(), labels=scored.labels.cpu().numpy(), names=list(scored.names))
        write_whole(out / LOGITS, lambda file: file.write(stored.getvalue()))
        if "soft" in result["votes"]:
            how = config["vote"] if config["vote"] in result["votes"] else "soft"
            plot_confusion(out / MATRIX, result["votes"][how]["confusion"], tuple(result["outputs"]), title)
    split = faces.splits.get("val")
    measure = "concordance" if "mean" in result["votes"] else f"accuracy, {config['vote']} vote"
    plot_curves(out / CURVE, result["curve"], title, measure, split.name if split else "")
    if split is not None:
        text = "\n".join(split.names) + "\n"
        write_whole(out / VALIDATION, lambda file: file.write(text.encode(errors="surrogateescape")))
    save_model(out, model, card(result))
    write_whole(out / README, lambda file: file.write(model_card(result, title).encode()))
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(out / RESULT, lambda file: file.write(text.encode()))


def title_of(result: dict[str, Any]) -> str:
    after, split = result["config"]["after"], result["split"] or "not scored"
    kind, reached = in_words(after), result["summary"]
    if "soft" in result["votes"]:
        how = result["config"]["vote"] if after != "none" else "soft"
        reached_by = "" if after == "none" else f"{how} vote: "
        one = result["votes"][how]
        reached = reached_by + with_interval(one["accuracy"], sum(row["faces"] for row in one["per_class"].values()))
    return f"{result['data']['name']} {split}, {kind}\n{reached}"


def card(result: dict[str, Any]) -> dict[str, Any]:
    """Return model.json: what a program needs to run the network."""
    config = result["config"]
    return {
        "architecture": "fer_resnet18",
        "width": config["width"],
        "target": config["target"],
        "outputs": result["outputs"],
        "after": config["after"],
        "vote": "mean" if config["target"] != "expression" else config["vote"],
        "preprocessing": {"size": 48, "channels": "RGB", "scale": "x / 127.5 - 1"},
        "data": result["data"]["name"],
        "split": result["split"],
        "summary": result["summary"],
        "versions": result["versions"],
    }


def model_card(result: dict[str, Any], title: str) -> str:
    """Return the model card: what the network is, its accuracy and data, and what it must not be used for."""
    config, data = result["config"], result["data"]
    title = title.replace("\n", " ")
    how = config["vote"] if config["vote"] in result["votes"] else "soft"
    table = [per_class_table(result["votes"][how]), ""] if "soft" in result["votes"] else []
    where = (
        "without a vote" if config["after"] == "none" else f"with a {config['vote']} vote ({in_words(config['after'])})"
    )
    sizes = ", ".join(f"{count:,} {data['names'][name]}" for name, count in data["faces"].items())
    chosen = f"The epoch was chosen on {data['names']['val']}" if "val" in data["names"] else "The last epoch was kept"
    lines = [
        f"# fer_resnet18, {data['name']}",
        "",
        f"A ResNet-18 for 48×48 faces (width {config['width']}, {result['parameters']:,} parameters, "
        f"{result['gmacs']:.3f} GMACs per face), {where}. Outputs: {', '.join(result['outputs'])}.",
        "",
        f"**{title}.** All votes: {result['summary']}. {chosen}; seed {config['seed']}; {data['note']}.",
        "",
        *table,
        f"Faces: {sizes} (layout: {data['layout']}). Recipe `{config['recipe']}`; all options are in result.json.",
        "",
        "Input: an RGB face, cropped, 48×48, `x / 127.5 - 1`. Run it with `predict.py`; `export.py` exports to ONNX.",
        "",
        "The labels are what annotators saw in a picture, not what the person felt; some ages, skin tones and cultures "
        "are over-represented, and the network inherits that. It is for research, not for decisions about people. The "
        "data set's terms decide who may use the weights, and for what.",
        "",
        "Method: Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, doi 10.3390/electronics12183837.",
        "",
    ]
    return "\n".join(lines)
