"""Voting models with settings, and the oracle's rows for them."""

from __future__ import annotations

import torch
from torch import nn

import networks
import oracle
from cropvote import CropVote, inject_crop_vote
from networks import IMAGES


def voting(site="layer2", make=networks.fer, **options: object) -> nn.Module:
    return inject_crop_vote(make(), after=site, input_size=48, **options)


def layered(**options: object) -> nn.Module:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CropVote(tail, **options)).eval()


def expected_rows(site="layer2", make=networks.fer) -> torch.Tensor:
    with torch.no_grad():
        return oracle.tail_rows(make(), site, IMAGES)
