"""Small models: normal ones that can vote, and unusual ones that must be refused."""

from __future__ import annotations

import random

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from model import FerResNet18

#: Three images, shared by all tests.
IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def randomise_norms(model: nn.Module) -> nn.Module:
    """Randomise the statistics and weights of every BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            module.running_var.mul_(1 + torch.rand(module.running_var.shape, generator=generator))
    return model


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(torchvision.models.resnet18(num_classes=7)).eval()


def timm_resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(timm.create_model("resnet18", num_classes=7)).eval()


def tokens(**options: object) -> nn.Module:
    """Return a vision transformer with 6 x 6 patches, a class token and two registers."""
    torch.manual_seed(0)
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "reg_tokens": 2, **options}
    return timm.models.vision_transformer.VisionTransformer(num_classes=7, **options).eval()


def hf_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic", num_labels=7
    )
    return randomise_norms(transformers.ResNetForImageClassification(config)).eval()


def fer(width: int = 8) -> nn.Module:
    """Return the network from its class, because timm's function would add the image size."""
    torch.manual_seed(0)
    return randomise_norms(FerResNet18(width=width)).eval()


def plain() -> nn.Module:
    """Return a network without named modules: a single nn.Sequential."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)]
    return nn.Sequential(*layers).eval()


class Net(nn.Module):
    """A front, a tail and, in subclasses, something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 8, 3, padding=1)
        self.site = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(8, 7)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.site(self.front(x))))


class Gate(Net):
    """The front's mean scales the tail; for one sample it broadcasts over the views without an error."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.head(self.site(x) * x.mean((2, 3), keepdim=True).sigmoid())


class LogitSkip(Net):
    """A second path that joins only at the logits."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.head(self.site(x)) + self.fc(x.mean((2, 3))).mean(0)


class Inplace(Net):
    """The site changes its input in place, and the input is used again: two names for the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        y = self.act(x)
        return self.head(self.other(y)) * x.mean()


class Alias(Net):
    """The site returns its input itself, which is also used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.head(self.other(self.site(x))) * x.mean().sigmoid()


class Buffered(Net):
    """The front writes to a buffer that the tail reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("note", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        self.note.copy_(x.mean())
        return self.head(self.site(x)) + self.note


class LateAlias(Net):
    """Data from the front is written into the site's output through an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        y = self.site(x)
        self.idle(y).mul_(x.mean())
        return self.head(self.act(y))


class Foreach(Net):
    """Data from the front is written by an operation that returns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        y = self.site(x)
        torch._foreach_mul_([y], [x.mean()])
        return self.head(y)


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.site(self.site(self.front(x))))


class Branches(Net):
    """An inception block: two parallel branches, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.head(torch.cat([self.site(x), self.other(x)], 1))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class TupleSite(Net):
    def __init__(self) -> None:
        super().__init__()
        self.site = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.site(self.front(x))[0])


class Unused(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(x))


class Dense(Net):
    """A segmentation network."""

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.site(self.front(x)))


class Squeezed(Net):
    """A regression network without an axis for K."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class Features(Net):
    """A dict in which the predictions cannot be identified."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.site(self.front(x))).mean((2, 3))
        return {"features": x, "scores": self.fc(x)}


class OwnLoss(Net):
    """Computes its own loss on the views' rows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = super().forward(x)
        return {"logits": x, "loss": x.square().mean()}


class FixedTail(Net):
    """A tail for one map size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 12 * 12, 7)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class FixedBothEnds(FixedTail):
    """Also a front for one image size, as in Swin."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (12, 12):
            raise ValueError("images must be 12 x 12")
        return super().forward(x)


class ChannelsLast(Net):
    """(N, H, W, C) after the front, visible only in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.site(self.front(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Slanted(ChannelsLast):
    """The same, but left and right differ."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x).permute(0, 2, 3, 1))
        x = nn.functional.conv2d(
            x.permute(0, 3, 1, 2), self.other.weight.expand(-1, -1, 1, 2) * torch.tensor([1.0, 3.0])
        )
        return self.fc(x.relu().mean((2, 3)))


class Skipping(Net):
    """Skips the site on every second call, as some stochastic-depth code does."""

    skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.head(x if self.skip else self.site(x))


class LateGate(Gate):
    """A gate that exists only in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else Net.forward(self, x)


class Seeding(Net):
    """Sets the seed and draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        random.random()
        return super().forward(x)


class Noisy(Net):
    """Uses PyTorch's and Python's random numbers, and writes to a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last_shape = tuple(x.shape)
        return super().forward(nn.functional.dropout(x, 0.1, training=True))


def snapshot(model: nn.Module) -> dict:
    """Return everything that an injection might change."""
    return {
        "types": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "keys": list(model.state_dict()),
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "tensors": [tensor.clone() for tensor in model.state_dict().values()],
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(a: dict, b: dict) -> bool:
    tensors = zip(a.pop("tensors"), b.pop("tensors"), strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and torch.equal(a.pop("random"), b.pop("random")) and a == b


def counted(module: nn.Module) -> list[int]:
    """Return a list that records the number of rows of each call of a module."""
    found: list[int] = []
    module.register_forward_hook(lambda module, args, output: found.append(output.shape[0]))
    return found


def still(model: nn.Module) -> nn.Module:
    """Set training mode, but BatchNorm to eval mode, so rows do not depend on each other."""
    model.eval()
    model.training = True
    return model
