"""Call the example's scripts in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train as training
from machines import Machine

#: Enough training for a network to tell some faces apart.
SMALL = ("--width", 4, "--epochs", 1, "--batch", 8, "--limit", 64, "--rate", 0.02, "--device", "cpu")
HERE = Machine(torch.device("cpu"), torch.float32, fast=False)
EXAMPLE = Path(training.__file__).parent


def call(script: Any, *arguments: object) -> None:
    script.main([str(a) for a in arguments])


def refused(script: Any, *arguments: object) -> str:
    """Return the line with which a script fails, with an exit code other than 0."""
    with pytest.raises(SystemExit) as caught:
        call(script, *arguments)
    assert isinstance(caught.value.code, str)
    return caught.value.code


def logits(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(run / "logits.npz") as stored:
        return torch.from_numpy(stored["logits"]), torch.from_numpy(stored["labels"])
