"""The table of tools, and helpers for its checks.

A check raises an AssertionError if the tool's result differs from the oracle. ``RAISES`` holds the tools that must
raise, with the message; ``LIMITS`` holds those that should work but do not, with the reason.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import networks
import oracle
from cropvote import CropVoteLoss, five_crop, hflip, inject_crop_vote

SIDE = 48
TARGETS = torch.tensor([0, 4, 6, 1])


@dataclass(frozen=True, eq=False)
class Split:
    """Where a network is split, into ten views, for the library and the oracle."""

    name: str
    after: Any
    by_hand: tuple[tuple[str, oracle.Cutter], ...]


ONE = Split("one site", "layer2", (("layer2", oracle.ten_views),))
TWO = Split(
    "two sites", {"layer1": hflip(), "layer2": five_crop()},
    (("layer1", oracle.flip_views), ("layer2", oracle.five_views)),
)  # fmt: skip


class Tool(NamedTuple):
    name: str
    note: str
    check: Callable[..., None]
    slow: bool = False

    @property
    def splits(self) -> tuple[Split, ...]:
        """Return the splits to run the check with; checks without a split use their own network."""
        return (ONE, TWO) if "split" in inspect.signature(self.check).parameters else ()


TOOLS: list[Tool] = []
RAISES: dict[str, str] = {}
LIMITS: dict[str, str] = {}


def tool(name: str, note: str = "", *, raises: str = "", limit: str = "", slow: bool = False) -> Callable:
    """Add a check to the table."""

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        TOOLS.append(Tool(name, note, check, slow))
        if raises:
            RAISES[name] = raises
        if limit:
            LIMITS[name] = limit
        return check

    return enter


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count)).to(dtype)


def voting(split: Split = ONE, make: Callable[[], nn.Module] = networks.fer, **options: object) -> nn.Module:
    return inject_crop_vote(make(), after=split.after, input_size=SIDE, **options)


def rows(model: nn.Module, split: Split, count: int = 3) -> Tensor:
    """Return the oracle's rows (N, V, K), from hooks and loops on a plain model."""
    return oracle.nested_rows(model, split.by_hand, images(count))


@functools.cache
def expected(split: Split, count: int = 3, make: Callable[[], nn.Module] = networks.fer) -> Tensor:
    """Return the soft vote of those rows."""
    with torch.no_grad():
        return oracle.vote(rows(make(), split, count), "soft").float()


def agree(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert (found.float() - wanted.float()).abs().max() <= tolerance, (found - wanted).abs().max()


def gradients(model: nn.Module, count: int = 4) -> dict[str, Tensor]:
    model.zero_grad()
    CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(images(count)), TARGETS[:count]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def still(model: nn.Module) -> nn.Module:
    """Set training mode except for BatchNorm, whose statistics would depend on how the batch is divided."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def agree_all(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        agree(tensor, wanted[name], tolerance)


@functools.cache
def oracle_gradients(split: Split) -> dict[str, Tensor]:
    model = still(networks.fer())
    oracle.loss_on_views(rows(model, split, 4), TARGETS).backward()
    return {name: p.grad for name, p in model.named_parameters()}
