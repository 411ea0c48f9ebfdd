"""Save a run's state after every epoch, and resume from it with identical results."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from config import Config, differences
from data import Faces
from keeping import RETRAINED, STATE, KeptError, load_state, save_state
from learner import Learner
from machines import Machine
from progress import BOARD
from results import WRITTEN


def open_run(
    config: Config, faces: Faces, outputs: tuple[str, ...], learner: Learner, order: torch.Generator, here: Machine,
    resume: bool, overwrite: bool,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Return the run's folder and record: a new one or, with ``resume``, the stored one, loaded into the learner.

    Raises:
        KeptError: If the folder holds a run and neither ``resume`` nor ``overwrite`` is set, or the stored run has
            other options, classes, faces or processes than this one.
    """
    out = Path(config.out or f"runs/{faces.name}-{config.after}-{config.seed}")
    run: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "outputs": list(outputs),
        "faces": faces.fingerprints(),
        "processes": here.size,
        "curve": [],
        "best": {},
    }
    if (out / STATE).exists() and not (resume or overwrite):
        raise KeptError(f"{out} holds a run: --resume goes on with it, --overwrite replaces it, --out names another.")
    here.wait()  # all processes have looked before one writes
    out.mkdir(parents=True, exist_ok=True)
    if overwrite and here.first:
        clear(out)
    stored = None if overwrite else load_state(out)
    if stored is None:
        return out, run
    check_same(out, config, run, stored)
    learner.load_state_dict(stored["learner"])
    order.set_state(stored["order"])
    torch.set_rng_state(stored["random"][here.rank]["cpu"])
    if here.device.type == "cuda" and "cuda" in stored["random"][here.rank]:
        torch.cuda.set_rng_state(stored["random"][here.rank]["cuda"], here.device)
    return out, {**run, "curve": stored["curve"], "best": stored["best"]}


def keep_run(out: Path, run: dict[str, Any], learner: Learner, order: torch.Generator, here: Machine) -> None:
    """Save the full state atomically: weights, optimizer, schedule, scaler, average, random state, record."""
    mine = {"cpu": torch.get_rng_state()}
    if here.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(here.device)
    random = here.gather(mine)
    if here.first:
        save_state(out, {**run, "learner": learner.state_dict(), "order": order.get_state(), "random": random})


def check_same(out: Path, config: Config, run: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raise if the stored run is not the one to resume."""
    if stored["outputs"] != run["outputs"]:
        theirs, ours = ", ".join(stored["outputs"]), ", ".join(run["outputs"])
        raise KeptError(f"--resume {out}: its classes are {theirs}; this run's are {ours}.")
    changed = differences(config, stored["config"])
    if changed:
        raise KeptError(
            f"{out} holds a run that was started with {'; '.join(changed)}: name another --out, or remove that folder."
        )
    if stored["faces"] != run["faces"]:
        raise KeptError(f"--resume {out}: the faces, their labels or their split have changed since the run started.")
    if stored["processes"] != run["processes"]:
        raise KeptError(f"--resume {out}: it ran on {stored['processes']} processes, this is {run['processes']}.")


def clear(out: Path) -> None:
    """Remove everything a run wrote, so the next run's files are not mixed with it."""
    for name in (STATE, *WRITTEN):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / BOARD, ignore_errors=True)
    if (out / RETRAINED).is_dir():
        clear(out / RETRAINED)
        with contextlib.suppress(OSError):  # keep a folder with other files
            (out / RETRAINED).rmdir()
