"""The vote as a layer, for a network of one's own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .calling.calls import Plan, conclude, following, has_run, in_passes, note, plan_of, split_by, watched
from .calling.options import EvalViews, Output, Settings
from .errors import InputTypeError, OptionError, SurgeryError
from .layouts import Layout, check_layout
from .plans import joined, parts_of
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

    Layers nest: a layer in ``tail`` cuts every view of this one into views of its own, and the outer one alone votes,
    over all of them (its own views outermost). They share the outer one's settings, so that what is not ``views`` or
    ``layout`` is said to the outer one.

    Shape:
        n c H W -> (n v) k in training, n k in eval

    Raises:
        InputTypeError: ``tail`` is no module, ``views`` no :class:`Views`.
        OptionError: an unknown vote, output or layout, or an option of a layer in ``tail`` that the outer one decides.
        SurgeryError: ``tail`` holds several layers side by side.
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
        self.place = 0  # of the layers in one another, the outermost first
        inner: list[CropVote] = _layers_in(tail)
        (self.views,) = parts_of(Settings(views=views).views)
        self.settings: Settings = Settings(
            views=joined([self.views, *(layer.views for layer in inner)]),
            vote=vote,
            train_output=train_output,
            eval_output=eval_output,
            train_views=train_views,
            eval_views=eval_views,
            views_per_pass=views_per_pass,
        )
        self.depth = 1 + len(inner)
        for place, layer in enumerate(inner, start=1):
            layer.place, layer.settings = place, self.settings

    def forward(self, x: Tensor) -> Any:
        if not self.settings.enabled:
            return self.tail(x)
        if self.place:
            return self._forward_inside(x)
        plan = plan_of(self.settings, self.training)
        if self.depth > 1 and torch.compiler.is_compiling():
            self._check_recorded(plan)
        if plan.passes:
            return in_passes(plan, self.settings, x.shape[0], lambda i, part: self._rows(part, x[:1] if i else x))
        return conclude(plan, self._rows(plan, x), x.shape[0], self.settings)

    def _rows(self, plan: Plan, x: Tensor) -> Any:
        """The rows of every view that a plan cuts; the layers inside follow it."""

        def run() -> Any:
            maps = self._cut(plan, x)
            if self.depth == 1 or torch.compiler.is_compiling():
                return self.tail(maps)
            with following({(self.settings, "inside"): plan}):
                return self.tail(maps)

        return watched(run, self.settings, self.depth, self)

    def _cut(self, plan: Plan, x: Tensor) -> Tensor:
        note(self.settings, self.place)
        if plan.front is not None and plan.front_at == self.place:
            if not plan.front:
                plan.front.append(x)
            x = plan.front[0]
        return split_by(plan.cuts[self.place], x, self.layout)

    def _check_recorded(self, plan: Plan) -> None:
        """What layers in one another cannot do under a compiler, where those inside follow their own mode."""
        if plan.passes:
            raise SurgeryError("views_per_pass of layers in one another cannot be compiled: set it to None.")
        if any(module.training != self.training for module in self.tail.modules() if isinstance(module, CropVote)):
            raise SurgeryError("layers in one another that are in different modes, train and eval, cannot be compiled.")

    def _forward_inside(self, x: Tensor) -> Any:
        """Cut what the layer around this one makes; the vote is its affair."""
        if not has_run(self.settings, 0):
            raise SurgeryError(
                "this CropVote stands inside another one, which votes for both: call the outer one; or make this one "
                "anew, if the other is no longer used."
            )
        plan = plan_of(self.settings, self.training, split=(self.settings, "inside"))
        return self.tail(self._cut(plan, x))

    def extra_repr(self) -> str:
        return repr(self.settings)


def _layers_in(tail: nn.Module) -> list[CropVote]:
    """The layers in ``tail``, the outermost first, each in the tail of the one before it.

    Raises:
        SurgeryError: several side by side.
        OptionError: one with an option that the layer around it decides.
    """
    found = [module for module in tail.modules() if isinstance(module, CropVote)]
    if not found:
        return []
    for outer, layer in itertools.pairwise(found):
        if layer not in set(outer.tail.modules()):
            raise SurgeryError(
                f"the tail holds {len(found)} CropVote layers side by side; they can only stand in one another."
            )
    first, plain = found[0], Settings()
    for name, value in first.settings._fields().items():
        if name != "views" and value != getattr(plain, name):
            raise OptionError(
                f"the layer in the tail says {name}={value!r}, which is for the outer layer to say: a layer inside has "
                f"its views and layout, no more. (So does one that stood inside a layer made before: make it anew.)"
            )
    return found
