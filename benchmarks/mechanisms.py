"""Four ways to add a split to an existing model, and which of PyTorch's tools work with each.

    python benchmarks/mechanisms.py

Each mechanism splits timm's resnet18 after ``layer2``. A cell says whether the tool then returns the views' rows
("yes"), silently returns something else ("silent"), or fails ("raises").
"""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cropvote import inject_crop_vote, split_views, ten_crop

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
VIEWS = ten_crop()


class Split(nn.Module):
    """Split as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return split_views(x, VIEWS)


def split_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return split_views(output, VIEWS)


def by_hook(model: nn.Module) -> nn.Module:
    model.layer2.register_forward_hook(split_output)
    return model


def by_sequential(model: nn.Module) -> nn.Module:
    model.layer2 = nn.Sequential(model.layer2, Split())
    return model


def by_patched_forward(model: nn.Module) -> nn.Module:
    plain = model.layer2.forward
    model.layer2.forward = lambda x: split_views(plain(x), VIEWS)
    return model


def by_class(model: nn.Module) -> nn.Module:
    return inject_crop_vote(model, after="layer2", eval_output="views", input_size=64)


MECHANISMS = {
    "forward hook": by_hook,
    "`Sequential(stage, split)`": by_sequential,
    "patched `.forward`": by_patched_forward,
    "class swapped (cropvote)": by_class,
}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=7).eval()


@functools.cache
def rows() -> Tensor:
    """Return the expected rows of the views, computed from the parts of a plain model."""
    model = plain()
    x = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(IMAGES))))))
    return model.forward_head(model.layer4(model.layer3(split_views(x, VIEWS)))).detach()


def right(output: Tensor, wanted: Tensor | None = None) -> bool:
    wanted = rows() if wanted is None else wanted
    return output.shape == wanted.shape and torch.allclose(output, wanted, atol=1e-4)


def keys(install: Callable) -> bool:
    return list(install(plain()).state_dict()) == list(plain().state_dict())


def deepcopy(install: Callable) -> bool:
    """Check that the copy uses its own weights."""
    model = install(plain())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return right(twin(IMAGES))


def pickled(install: Callable) -> bool:
    return right(pickle.loads(pickle.dumps(install(plain())))(IMAGES))  # noqa: S301


def earlier_compile(install: Callable) -> bool:
    model = plain()
    compiled = torch.compile(model, backend="eager")
    compiled(IMAGES)
    install(model)
    return right(compiled(IMAGES))


def fx(install: Callable) -> bool:
    return right(torch.fx.symbolic_trace(install(plain()))(IMAGES))


def checkpointing(install: Callable) -> bool:
    model = install(plain())
    model.set_grad_checkpointing(True)
    return right(model(IMAGES.clone().requires_grad_()))


def script(install: Callable) -> bool:
    return right(torch.jit.script(install(plain()))(IMAGES))


TOOLS = {
    "keys": keys,
    "deepcopy": deepcopy,
    "pickle": pickled,
    "an earlier compile": earlier_compile,
    "fx": fx,
    "timm's checkpointing": checkpointing,
    "jit.script": script,
}


def verdict(tool: Callable, install: Callable) -> str:
    torch._dynamo.reset()
    try:
        return "yes" if tool(install) else "no" if tool is keys else "silent"
    except Exception:
        return "raises"


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, timm {timm.__version__}\n")
    print("| mechanism |", " | ".join(TOOLS), "|")
    print("|" + "---|" * (len(TOOLS) + 1))
    for name, install in MECHANISMS.items():
        print("|", name, "|", " | ".join(verdict(tool, install) for tool in TOOLS.values()), "|")


if __name__ == "__main__":
    main()
