"""The table of hazards, and helpers for its checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import oracle
from cropvote import (
    CropVoteError,
    inject_crop_vote,
)
from toolchain.table import agree, images

IMAGES = images(10)  # ten images and ten views: the worst case for a check by divisibility


class Hazard(NamedTuple):
    name: str
    guard: str
    check: Callable[[], None]
    without: Callable[[pytest.MonkeyPatch], None]


HAZARDS: list[Hazard] = []


def hazard(name: str, guard: str, *without: Callable[[pytest.MonkeyPatch], None]) -> Callable:
    def enter(check: Callable[[], None]) -> Callable[[], None]:
        HAZARDS.append(Hazard(name, guard, check, lambda patch: [take(patch) for take in without]))
        return check

    return enter


def refused(model: nn.Module, site: str, images: Tensor = IMAGES, **options: object) -> None:
    """Check that the site is refused, both with a size and at the first call."""
    with pytest.raises(CropVoteError):
        inject_crop_vote(model, after=site, input_size=tuple(images.shape[1:]), **options)
    inject_crop_vote(model, after=site, **options)
    with pytest.raises(CropVoteError):
        model(images)


def right(
    model: nn.Module, site: str, images: Tensor = IMAGES, cut: oracle.Cutter = oracle.ten_views, **options
) -> None:
    """Check the output against the oracle's vote."""
    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(copy.deepcopy(model), site, images, cut), "soft")
    inject_crop_vote(model, after=site, input_size=tuple(images.shape[1:]), **options)
    agree(model(images), wanted)
