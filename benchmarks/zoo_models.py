"""The models of the zoo's sweep, and how to build them."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import nn

from networks import randomise_norms

SIDE = 128
BIGGEST = 50_000_000  # parameters
SMALL = {"embed_dim": 96, "depth": 4, "num_heads": 3}


def families() -> list[str]:
    """Return all families: "timm/<module>", "torchvision/<module>", "transformers/<class>"."""
    names = [f"timm/{module}" for module in timm.list_modules()]
    torchvision_modules = {builder(name).__module__ for name in torchvision.models.list_models(torchvision.models)}
    names += sorted(f"torchvision/{module.rpartition('.')[2]}" for module in torchvision_modules)
    return names + [f"transformers/{name}" for name in TRANSFORMERS]


def builder(name: str) -> Callable[..., nn.Module]:
    return torchvision.models.get_model_builder(name)


def make(family: str, name: str, small: bool = False) -> nn.Module:
    """Build a model with seven classes and random weights."""
    library, _, module = family.partition("/")
    if library == "transformers":
        return transformer(name)
    if library == "torchvision":
        options = {"init_weights": False} if module in ("googlenet", "inception") else {}
        return builder(name)(weights=None, num_classes=7, **options)
    return timm.create_model(name, num_classes=7, **(SMALL if small else {}))


def models(family: str) -> list[tuple[str, bool]]:
    """Return the family's models to try, smallest first (two from timm, else all), and whether to shrink each."""
    library, _, module = family.partition("/")
    if library == "transformers":
        return [(module, False)]
    if library == "torchvision":
        names = torchvision.models.list_models(torchvision.models)
        chosen = [name for name in names if builder(name).__module__ == f"torchvision.models.{module}"]
        return [(name, False) for name in sorted(chosen, key=lambda name: size_of(family, name))]
    sized = sorted((size_of(family, name), name) for name in timm.list_models(module=module))
    able = [(name, False) for size, name in sized if size < BIGGEST]
    if not able:  # all too large: a transformer with fewer, smaller blocks
        name = sized[0][1]
        able = [(name, size_of(family, name, small=True) < BIGGEST)]
    return able[:1] + able[len(able) // 2 : len(able) // 2 + 1] * (len(able) > 1)


def size_of(family: str, name: str, small: bool = False) -> int:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make(family, name, small).parameters())
    except Exception:  # some constructors need values, which meta tensors do not have
        return BIGGEST


TRANSFORMERS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "groups_width": 8},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "ViT": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 128, "patch_size": 16},
    "DeiT": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 128, "patch_size": 16},
}


def transformer(name: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=7, **TRANSFORMERS[name])
    return getattr(transformers, f"{name}ForImageClassification")(config)


def randomise(model: nn.Module) -> nn.Module:
    """Randomise constant parameters: a layer scale of 1e-5 or a zero head would hide any error."""
    with torch.no_grad():
        for parameter in randomise_norms(model).parameters():
            if parameter.numel() > 1 and parameter.is_floating_point() and parameter.max() == parameter.min():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def calibrate(model: nn.Module, size: tuple[int, ...]) -> None:
    """Set every BatchNorm's statistics from data; otherwise the image would hardly affect the output of deep models."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(torch.randn(4, *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def image_of(model: nn.Module) -> tuple[int, int, int]:
    """Return the image size (C, H, W): small if the model accepts it, else the model's own."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *own = config.get("input_size", (3, 224, 224))
    if config.get("fixed_input_size"):
        return (channels, *own)
    for tried in (SIDE, own[0], 299):
        try:
            with torch.no_grad():
                model(torch.zeros(2, channels, tried, tried))
        except Exception:  # noqa: S112
            continue
        return (channels, tried, tried)
    return (channels, *own)


def feature_sites(model: nn.Module, listed: list[str], most: int = 1000) -> list[str]:
    """Return the names in timm's ``feature_info``; for other models, the listed sites and some outer modules."""
    info = getattr(model, "feature_info", None)
    if info is None:
        outer = [name for name, _ in model.named_modules() if name and name.count(".") < 2]
        some = outer[:: -(-len(outer) // most)]
        return list(dict.fromkeys([*(site for site in listed if site != "input"), *some]))
    entries = info if isinstance(info, list) else info.info
    return [entry["module"] for entry in entries if entry.get("module")]
