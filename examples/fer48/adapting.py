"""Adapt the number of views to the load: fewer while requests wait, all of them again once the queue is short."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cropvote import settings


@dataclass
class Pressure:
    """Decides whether a batch gets all views or few.

    It takes few from ``high`` waiting requests on, and all again at ``low`` or fewer. In between it stays as it is, so
    that a queue of about one length doesn't switch with every batch.
    """

    high: int
    low: int
    few: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"few views from {self.high} requests on and all at {self.low}: 0 < low < high is needed.")

    def update(self, waiting: int) -> bool:
        """Return whether the next batch gets few views, given how many requests have no answer yet."""
        if waiting >= self.high:
            self.few = True
        elif waiting <= self.low:
            self.few = False
        return self.few


def read_views(model: nn.Module, x: Tensor, few: bool) -> Tensor:
    """Return the logits of the centre and its mirror image, or of all views, (n, 3, H, W) -> (n, v, k)."""
    options = settings(model)
    options.eval_output = "views"
    options.eval_views = "centre+mirror" if few else None
    with torch.inference_mode():
        return model(x).unflatten(0, (len(x), -1))
