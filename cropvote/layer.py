"""The vote as a layer, for a network of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .call import Call, call_by, cut_views, running, vote_output
from .cuts import ViewsOrName
from .errors import InputTypeError, SurgeryError
from .layouts import Layout, check_layout
from .options import EvalViews, Output, Settings
from .voting import How

__all__ = ["CropVote"]


class CropVote(nn.Module):
    """Run ``tail`` on every view of its input and vote over the predictions. Adds no parameter.

    In training mode the output holds one row per view, for :class:`CropVoteLoss`; in eval mode one row per
    sample, the vote. Both are settings, see :func:`settings`.

    Args:
        tail: the network behind the split; its input is a map, its output one row of K predictions per map (or a
            tuple, dict or dataclass that holds such rows, named "logits" where it holds other 2-D tensors too).
        views: the views or their name ("ten", "five", "hflip", "d4"), :func:`ten_crop` by default.
        vote: the rule, see :func:`vote`.
        train_output: ``"views"`` or ``"vote"`` in training mode.
        eval_output: the same in eval mode.
        train_views: this many views, drawn again for every batch in training mode; ``None`` for all.
        eval_views: the views of eval mode: indices, ``"centre"``, ``"centre+mirror"``, or ``None`` for all.
        layout: where the map's height and width are: ``"NCHW"``, ``"NHWC"`` or :class:`Tokens`.

    Layers do not nest. To split a network at several sites, build it without layers and inject it:
    ``inject_crop_vote(net, {"layer1": hflip(), "layer3": five_crop()})``.

    Shape:
        n c H W -> (n v) k in training, n k in eval

    Raises:
        InputTypeError: ``tail`` is not a module, or ``views`` not a :class:`Views`.
        OptionError: an unknown vote, output or layout.
        SurgeryError: ``tail`` holds a CropVote layer.
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
        views: ViewsOrName | None = None,
        vote: How = "soft",
        train_output: Output = "views",
        eval_output: Output = "vote",
        train_views: int | None = None,
        eval_views: EvalViews = None,
        layout: Layout = "NCHW",
    ) -> None:
        super().__init__()
        if not isinstance(tail, nn.Module):
            raise InputTypeError("CV801", f"tail must be an nn.Module, got {type(tail).__name__}.")
        check_layout(layout)
        inner = next((name for name, module in tail.named_modules() if isinstance(module, CropVote)), None)
        if inner is not None:
            where = f"tail.{inner}" if inner else "tail"
            raise SurgeryError(
                "CV430",
                f"{where} is a CropVote layer, and layers do not nest: to split a network at several sites, build it "
                f'without layers and call inject_crop_vote(net, {{"layer1": hflip(), "layer3": five_crop()}}).',
            )
        self.tail = tail
        self.layout = layout
        self.settings: Settings = Settings(
            views=views,
            vote=vote,
            train_output=train_output,
            eval_output=eval_output,
            train_views=train_views,
            eval_views=eval_views,
        )

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self._run(call_by(self.settings, self.training), x)
        with running(self.settings, self.training) as call:
            return self._run(call, x)

    def _run(self, call: Call, x: Tensor) -> Any:
        if not call.cuts.at:
            return self.tail(x)
        return vote_output(call, self.tail(cut_views(call.cuts.at[0], x, self.layout)), x)

    def extra_repr(self) -> str:
        return repr(self.settings)
