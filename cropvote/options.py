"""The settings that the layer and the surgery share, and what they make of the tail's rows."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

from torch import Tensor

from .errors import InputTypeError, OptionError, RowsError
from .outputs import Place, map_tensors, prediction_places
from .views import Views, ten_crop
from .voting import How, check_rule, vote

__all__ = ["Settings"]

Output = Literal["views", "vote"]


class Settings:
    """How a :class:`CropVote` layer or an injected model behaves; checked whenever a field is assigned.

    Fields:
        views: the views, fixed once made (the sites that accept them were checked with these).
        vote: the rule of the vote, see :func:`vote`.
        train_output: ``"views"`` (a row per view) or ``"vote"`` (a row per sample) in training mode.
        eval_output: the same in eval mode.
        enabled: ``False`` runs the plain network: no split, no vote.

    Raises:
        OptionError: an unknown field or value, or a hard vote as the output of training, which has no useful gradient.
        InputTypeError: ``views`` that are no :class:`Views`, or ``enabled`` that is no bool.

    Example:
        >>> import torch
        >>> from cropvote import CropVote, settings
        >>> layer = CropVote(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
        >>> settings(layer).vote = "hard"
        >>> settings(layer)
        Settings(views=<Views: 10 of 5/6 of the side, 5 mirrored>, vote='hard', train_output='views', ...)
    """

    views: Views
    vote: How
    train_output: Output
    eval_output: Output
    enabled: bool

    def __init__(
        self,
        *,
        views: Views | None = None,
        vote: How = "soft",
        train_output: Output = "views",
        eval_output: Output = "vote",
        enabled: bool = True,
    ) -> None:
        fields = {
            "views": ten_crop() if views is None else views,
            "vote": vote,
            "train_output": train_output,
            "eval_output": eval_output,
            "enabled": enabled,
        }
        _check(fields)
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__:
            near = difflib.get_close_matches(name, self.__dict__, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"there is no setting {name!r}; there are {', '.join(self.__dict__)}.{hint}")
        if name == "views":
            raise OptionError(
                "views are fixed: remove_crop_vote(model) and inject_crop_vote(model, ..., views=...) again, or make a "
                "new CropVote(tail, views=...), so that they are checked."
            )
        _check({**self.__dict__, name: value})
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise OptionError(f"settings cannot be deleted ({name!r}): assign another value.")

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def _check(fields: dict[str, Any]) -> None:
    if not isinstance(fields["views"], Views):
        raise InputTypeError(f"views must be a Views, such as ten_crop(), got {fields['views']!r}.")
    check_rule(fields["vote"])
    for name in ("train_output", "eval_output"):
        if not isinstance(fields[name], str) or fields[name] not in get_args(Output):
            raise OptionError(f"{name} must be one of {get_args(Output)}, got {fields[name]!r}.")
    if not isinstance(fields["enabled"], bool):
        raise InputTypeError(f"enabled must be True or False, got {fields['enabled']!r}.")
    if fields["vote"] == "hard" and fields["train_output"] == "vote":
        raise OptionError(
            'vote="hard" with train_output="vote": a loss on a hard vote has no useful gradient. Train on every view '
            '(train_output="views" with CropVoteLoss), or vote "soft" or "probs".'
        )


def conclude(output: Any, samples: int, settings: Settings, training: bool) -> Any:
    """The network's output with the vote in place of its predictions, after checking that they are one row per view.

    An output that stays one row per sample beside the main one (an auxiliary head in front of the site) is left alone,
    as is all that is no prediction.
    """
    places = prediction_places(output)
    voted = (settings.train_output if training else settings.eval_output) == "vote"

    def finish(place: Place, rows: Tensor) -> Tensor:
        if place not in places or (place != places[0] and rows.shape[0] == samples and len(settings.views) > 1):
            return rows
        _check_rows(rows, samples, len(settings.views))
        return vote(rows, len(settings.views), settings.vote) if voted else rows

    return map_tensors(finish, output)


def _check_rows(rows: Tensor, samples: int, count: int) -> None:
    if rows.dim() != 2:
        raise RowsError(
            f"the network returned shape {tuple(rows.shape)} for {samples} samples of {count} views; "
            f"cropvote votes over one row of K outputs per view, ({samples * count}, K)."
        )
    if rows.shape[0] != samples * count:
        raise RowsError(
            f"the network returned {rows.shape[0]} rows for {samples} samples of {count} views: expected "
            f"{samples * count}, a sample's views adjacent. The split did not run exactly once in this call: was the "
            f"site replaced, skipped or called again since the model was checked?"
        )
