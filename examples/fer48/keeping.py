"""Save and load a run: its state after every epoch, and the finished model with its card."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from config import sites_of
from cropvote import inject_crop_vote
from model import FerResNet18, fer_resnet18

STATE, WEIGHTS, CARD = "last.pt", "model.safetensors", "model.json"
RETRAINED = "retrained"
FORMAT = 1


class KeptError(Exception):
    """A checkpoint cannot be used; the message says why and what to do."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: readers see the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise KeptError(f"{path}: cannot be written ({error.strerror}); what was there before is untouched.") from error
    finally:
        part.unlink(missing_ok=True)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the training state: tensors, numbers, strings, and lists and dicts of them."""
    write_whole(folder / STATE, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the stored training state, or None. Only tensors and plain values are unpickled."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged files, torch raises many kinds of errors
        raise KeptError(f"{path}: cannot be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise KeptError(f"{path}: not a training state of this version; --overwrite starts a new run.")
    return state


def build(classes: int, width: int, after: str, how: Any, train_views: int | None = None) -> FerResNet18:
    """Build the network, voting after the site ``after`` unless it is "none", and check it for 48x48 faces."""
    model = fer_resnet18(num_classes=classes, width=width)
    if after != "none":
        inject_crop_vote(model, after=sites_of(after), vote=how, input_size=48, train_views=train_views)
    return model


def save_model(folder: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Write model.safetensors, and model.json with what ``load_model`` needs and a reader wants to know."""
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_whole(folder / WEIGHTS, lambda file: file.write(save(weights, metadata={"format": "pt"})))
    text = json.dumps({"format": FORMAT, **card}, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / CARD, lambda file: file.write(text.encode()))


def read_card(run: str | Path) -> dict[str, Any]:
    """Read model.json from a run's folder, or next to a model.safetensors."""
    folder = Path(run).parent if Path(run).name == WEIGHTS else Path(run)
    path = folder / CARD
    try:
        card = json.loads(path.read_text())
    except OSError as error:
        raise KeptError(f"{run}: no finished model there, as {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise KeptError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT or card.get("architecture") != "fer_resnet18":
        raise KeptError(f"{path}: does not describe a fer_resnet18 of this version.")
    return {**card, "folder": str(folder)}


def read_weights(card: dict[str, Any]) -> dict[str, Tensor]:
    path = Path(card["folder"]) / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise KeptError(f"{path}: cannot be read ({error}).") from error


def load_model(run: str | Path) -> tuple[FerResNet18, dict[str, Any]]:
    """Return a finished model in eval mode, voting as in training, and its card."""
    card = read_card(run)
    model = build(len(card["outputs"]), card["width"], card["after"], card["vote"])
    try:
        model.load_state_dict(read_weights(card))
    except RuntimeError as error:
        raise KeptError(f"{run}: the weights do not match its model.json ({error}).") from error
    return model.eval(), card


def start_from(model: nn.Module, run: str, outputs: tuple[str, ...]) -> None:
    """Copy a finished model's weights, matching the rows of the last layer by output name.

    Raises:
        KeptError: If the width differs, or the other model lacks an output.
    """
    card = read_card(run)
    weights, theirs = read_weights(card), list(card["outputs"])
    unknown = [name for name in outputs if name not in theirs]
    if unknown:
        raise KeptError(f"--init {run}: it knows {', '.join(theirs)}, not {', '.join(unknown)}.")
    rows = [theirs.index(name) for name in outputs]
    for key in ("fc.weight", "fc.bias"):
        weights[key] = weights[key][rows]
    wanted, found = (tuple(w["conv1.weight"].shape) for w in (model.state_dict(), weights))
    if wanted != found:
        raise KeptError(f"--init {run}: its width is {found[0]}, and this run's {wanted[0]}; give --width {found[0]}.")
    model.load_state_dict(weights)
