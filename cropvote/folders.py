"""Load a trained model and a folder of pictures for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MissingExtraError, OptionError

__all__: list[str] = []

#: What most networks of ImageNet were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights from a .safetensors file or a file of torch.save, of tensors only.

    Raises:
        OptionError: the file does not hold this model's weights.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "model_state_dict"):
            state = state[key] if isinstance(state.get(key), Mapping) else state
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    except OSError:
        raise
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise OptionError("CV908", f"{path} cannot be loaded: {type(error).__name__}: {line}") from error


def read_folder(
    model: nn.Module,
    folder: Path,
    size: tuple[int, ...],
    batch: int,
    limit: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Any, str]:
    """Return a loader of the pictures in folders named after their classes, and how they are prepared, as text.

    A timm model says how; for other models they get their input's size and ImageNet's mean and standard deviation,
    or 0.5 and 0.5 if they are grey. ``mean`` and ``std`` are used instead.

    Raises:
        OptionError: no such folder, no pictures in it, or not a mean and a standard deviation for each channel.
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision import datasets, transforms
    except ImportError as error:
        raise MissingExtraError("CV701", '--data needs torchvision: pip install "cropvote[timm]".') from error
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and (len(values) != size[0] or not all(map(math.isfinite, values))):
            raise OptionError("CV911", f"{name} must be a number for each of {size[0]} channels, got {values}.")
    if std is not None and min(std) <= 0:
        raise OptionError("CV911", f"--std must be above 0, got {std}.")
    if hasattr(model, "pretrained_cfg"):
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        config = resolve_data_config({"input_size": size}, model=model)
        config.update({name: tuple(values) for name, values in (("mean", mean), ("std", std)) if values is not None})
        transform, mean, std = create_transform(**config), config["mean"], config["std"]
    else:
        grey = [transforms.Grayscale()] if size[0] == 1 else []
        mean, std = mean or (MEAN if size[0] == 3 else (0.5,)), std or (STD if size[0] == 3 else (0.5,))
        transform = transforms.Compose(
            [*grey, transforms.Resize(max(size[1:])), transforms.CenterCrop(size[1:]), transforms.ToTensor(),
             transforms.Normalize(mean, std)]
        )  # fmt: skip
    try:
        pictures: Any = datasets.ImageFolder(folder, transform)
    except FileNotFoundError as error:
        raise OptionError("CV909", f"--data {folder}: {str(error).splitlines()[0]}") from error
    if limit is not None and limit < len(pictures):
        chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:limit]
        pictures = torch.utils.data.Subset(pictures, chosen.tolist())
    numbers = [", ".join(f"{value:g}" for value in values) for values in (mean, std)]
    words = f"{len(pictures)} pictures of {folder}, {size[1]}×{size[2]}, less mean {numbers[0]}, over std {numbers[1]}"
    return torch.utils.data.DataLoader(pictures, batch_size=batch, num_workers=0), words


def count_classes(folder: Path) -> int:
    """Return the number of folders in a folder."""
    return sum(path.is_dir() for path in folder.iterdir()) if folder.is_dir() else 0


def check_outputs(model: nn.Module, images: Tensor, classes: int) -> None:
    """Raise OptionError unless the model has an output for each class."""
    with torch.no_grad():
        outputs = model(images[:1])
    if outputs.shape[-1] != classes:
        raise OptionError("CV910", f"the model has {outputs.shape[-1]} outputs, and --data has {classes} classes.")
