"""The paper's baseline: ResNet-18 for 48x48 faces, with a 3x3 stride-1 stem and no max-pool.

Importing this file registers it with timm: ``timm.create_model("fer_resnet18", pretrained=True)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

WEIGHTS, PRETRAINED_WIDTH = Path(__file__).parent / "weights" / "model.safetensors", 32


class FerResNet18(nn.Module):
    """ResNet-18 for small images; ``layer1`` to ``layer4`` and ``fc`` are named as in torchvision.

    Shape:
        n in_chans H W -> n num_classes
    """

    def __init__(self, num_classes: int = 7, width: int = 64, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8 * width
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, n in_chans H W -> n (8 width) H/8 W/8."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.fc = num_classes, nn.Linear(self.num_features, num_classes)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs))


# There is no url: the weights are next to this file. timm reads the size, the mean and the names from here.
_CFG = {"input_size": (3, 48, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({"fer_resnet18.untrained": {"num_classes": 7, "pool_size": (6, 6), **_CFG}})


@register_model
def fer_resnet18(pretrained: bool = False, **options: Any) -> FerResNet18:
    """Build the paper's network: 11,172,423 parameters with 7 classes at width 64; use less on small machines.

    With ``pretrained=True`` it has width 32 and the weights of ``examples/fer48/weights``, trained on FER2013.

    Raises:
        FileNotFoundError: If the weights are missing; they come with a checkout, not with the package.
        ValueError: If the width is not that of the weights.
    """
    if pretrained:
        if not WEIGHTS.exists():
            raise FileNotFoundError(f"{WEIGHTS}: the weights of fer_resnet18 come with a checkout of the repository.")
        if options.setdefault("width", PRETRAINED_WIDTH) != PRETRAINED_WIDTH:
            raise ValueError(f"the weights of fer_resnet18 have width {PRETRAINED_WIDTH}, not {options['width']}.")
        options["pretrained_cfg_overlay"] = {"file": str(WEIGHTS), **(options.get("pretrained_cfg_overlay") or {})}
    return build_model_with_cfg(FerResNet18, "fer_resnet18", pretrained, **options)
