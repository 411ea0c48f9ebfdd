"""The vote as a layer, for a network of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .calls import conclude, in_passes, plan_of, split_by
from .errors import InputTypeError
from .layouts import Layout, check_layout
from .options import EvalViews, Output, Settings
from .views import Views
from .voting import How

__all__ = ["CropVote"]


class CropVote(nn.Module):
    """Run ``tail`` on every view of its input and vote over the predictions. Adds no parameter.

    In training mode the output holds one row per view, for :class:`CropVoteLoss`; in eval mode one row per
    sample, the vote. Both are settings, see :func:`settings`.

    Args:
        tail: the network behind the split; its input is a map, its output one row of K predictions per map (or a
            tuple, dict or dataclass that holds such rows, named "logits" where it holds other 2-D tensors too).
        views: the views, :func:`ten_crop` by default.
        vote: the rule, see :func:`vote`.
        train_output: ``"views"`` or ``"vote"`` in training mode.
        eval_output: the same in eval mode.
        train_views: so many views, drawn anew for every batch in training mode; ``None`` for all.
        eval_views: the views of eval mode: indices, ``"centre"``, ``"centre+mirror"``, or ``None`` for all.
        views_per_pass: run the tail on so many views at a time in eval mode: the same vote in less memory.
        layout: where the map's height and width are: ``"NCHW"``, ``"NHWC"`` or :class:`Tokens`.

    Shape:
        n c H W -> (n v) k in training, n k in eval

    Raises:
        InputTypeError: ``tail`` is no module, ``views`` no :class:`Views`.
        OptionError: an unknown vote, output or layout.
        ViewsError: when called, a map that these views do not fit.
        RowsError: when called, a tail whose output is not one row per view.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cropvote import CropVote
        >>> front = nn.Conv2d(3, 8, 3, padding=1)
        >>> tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
        >>> net = nn.Sequential(front, CropVote(tail, vote="soft"))
        >>> net.train()(torch.zeros(2, 3, 48, 48)).shape, net.eval()(torch.zeros(2, 3, 48, 48)).shape
        (torch.Size([20, 7]), torch.Size([2, 7]))

    Reference:
        Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, section 3.
    """

    def __init__(
        self,
        tail: nn.Module,
        *,
        views: Views | None = None,
        vote: How = "soft",
        train_output: Output = "views",
        eval_output: Output = "vote",
        train_views: int | None = None,
        eval_views: EvalViews = None,
        views_per_pass: int | None = None,
        layout: Layout = "NCHW",
    ) -> None:
        super().__init__()
        if not isinstance(tail, nn.Module):
            raise InputTypeError(f"tail must be an nn.Module, got {type(tail).__name__}.")
        check_layout(layout)
        self.tail = tail
        self.layout = layout
        self.settings = Settings(
            views=views,
            vote=vote,
            train_output=train_output,
            eval_output=eval_output,
            train_views=train_views,
            eval_views=eval_views,
            views_per_pass=views_per_pass,
        )

    def forward(self, x: Tensor) -> Any:
        if not self.settings.enabled:
            return self.tail(x)
        plan = plan_of(self.settings, self.training)
        if plan.per_pass is not None:
            return in_passes(plan, self.settings, x.shape[0], lambda _, part: self.tail(split_by(part, x, self.layout)))
        rows = self.tail(split_by(plan, x, self.layout))
        return conclude(plan, rows, x.shape[0], self.settings)

    def extra_repr(self) -> str:
        return repr(self.settings)
