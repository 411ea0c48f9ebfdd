"""Training runs of a few seconds, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train as training
from machines import Machine

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fer48"
FER2013 = ROOT.parent / "shared" / "data" / "fer2013"
#: Options for a run of a few seconds.
SMALL = ("--width", 4, "--epochs", 2, "--batch", 16, "--limit", 64, "--after", "layer3", "--device", "cpu")
HERE = Machine(torch.device("cpu"), torch.float32, fast=False)


def run(*arguments: object) -> dict[str, Any]:
    """Train in this process, and return the contents of result.json."""
    training.main([str(a) for a in arguments])
    out = Path(str(arguments[arguments.index("--out") + 1]))
    return json.loads((out / "result.json").read_text())


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Return the single line with which a run ends."""
    with pytest.raises(SystemExit) as caught:
        training.main([str(a) for a in arguments])
    assert caught.value.code not in (0, None)
    if isinstance(caught.value.code, str):
        return caught.value.code
    return capsys.readouterr().err.strip().splitlines()[-1]
