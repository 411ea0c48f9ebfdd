"""What a bug report needs to know of a machine."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__
from .errors import CheckUnavailableError
from .probe.taint import check_taint_is_followed

__all__: list[str] = []

PACKAGES = ("torchvision", "timm", "transformers", "lightning", "accelerate", "onnxruntime", "numpy")


def report() -> str:
    """Return the versions, the devices, and whether this PyTorch can be followed, as text."""
    lines = [f"cropvote {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    lines += [f"cuda {torch.version.cuda}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        lines.append("mps")
    versions = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    lines += [f"{name} {versions[name]}" for name in PACKAGES if name in versions]
    try:
        check_taint_is_followed()
        lines.append("checks: this PyTorch is followed")
    except CheckUnavailableError as error:
        lines.append(f"checks: {error}")
    return "\n".join(lines)
