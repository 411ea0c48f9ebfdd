"""The settings that the layer and the surgery share."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

from .cuts import AnyViews, Cuts, ViewProduct, ViewsOrName, as_views, make_cuts, make_random_cuts, parts_of
from .errors import InputTypeError, OptionError, SurgeryError
from .views import CENTRE
from .voting import How, check_rule

__all__ = ["Settings"]

Output = Literal["views", "vote"]
EvalViews = Sequence[int] | Literal["centre", "centre+mirror"] | None


class Settings:
    """How a :class:`CropVote` layer or an injected model behaves; checked whenever a field is assigned.

    Fields:
        views: the views, fixed once made (the sites that accept them were checked with these). With several sites,
            every combination of their views, the first site's outermost: ``views.parts`` holds those of each.
        vote: the rule of the vote, see :func:`vote`.
        train_output: ``"views"`` (a row per view) or ``"vote"`` (a row per sample) in training mode.
        eval_output: the same in eval mode.
        train_views: this many of the views, drawn again for every batch in training mode; ``None`` for all. They are
            drawn from PyTorch's global random state and the process's rank, so activation checkpointing redraws
            the same views on recomputation, and each process draws its own. With several sites they are spread evenly
            over the views of the first.
        eval_views: in eval mode only these views are cut, run and voted over: their indices, ``"centre"``,
            ``"centre+mirror"``, or ``None`` for all. A model trained with all its views may vote with a few.
        enabled: ``False`` runs the plain network: no split, no vote.

    Raises:
        OptionError: an unknown field or value, or a hard vote as the output of training, which has no useful gradient.
        InputTypeError: ``views`` that are not a :class:`Views`, or ``enabled`` that is not a bool.

    Example:
        >>> import torch
        >>> from cropvote import CropVote, settings
        >>> layer = CropVote(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
        >>> settings(layer).vote = "hard"
        >>> settings(layer)
        Settings(views=ten_crop(), vote='hard', train_output='views', ...)
    """

    views: AnyViews
    vote: How
    train_output: Output
    eval_output: Output
    train_views: int | None
    eval_views: EvalViews
    enabled: bool
    _trained: Cuts  # what is cut in training mode
    _evaluated: Cuts  # and in eval mode

    def __init__(
        self,
        *,
        views: AnyViews | ViewsOrName | None = None,
        vote: How = "soft",
        train_output: Output = "views",
        eval_output: Output = "vote",
        train_views: int | None = None,
        eval_views: EvalViews = None,
        enabled: bool = True,
    ) -> None:
        fields = {
            "views": views if isinstance(views, ViewProduct) else as_views(views),
            "vote": vote,
            "train_output": train_output,
            "eval_output": eval_output,
            "train_views": train_views,
            "eval_views": eval_views,
            "enabled": enabled,
        }
        self._take(fields)

    def _take(self, fields: dict[str, Any]) -> None:
        _check(fields)
        indices = eval_indices(fields["views"], fields["eval_views"])
        if not isinstance(fields["eval_views"], (str, type(None))):
            fields["eval_views"] = indices
        self.__dict__.update(fields)
        self.__dict__["_trained"] = make_random_cuts(fields["views"], fields["train_views"] or len(fields["views"]))
        self.__dict__["_evaluated"] = make_cuts(fields["views"], indices)

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self._fields()
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError("CV810", f"there is no setting {name!r}; there are {', '.join(fields)}.{hint}")
        if name == "views":
            raise OptionError(
                "CV811",
                "views are fixed: remove_crop_vote(model) and inject_crop_vote(model, ..., views=...) again, or make a "
                "new CropVote(tail, views=...), so that they are checked.",
            )
        self._take({**fields, name: value})

    def __delattr__(self, name: str) -> None:
        raise OptionError("CV812", f"settings cannot be deleted ({name!r}): assign another value.")

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self._fields().items())})"

    def n_views(self, training: bool) -> int:
        """Return how many views of a sample a call computes."""
        return (self._trained if training else self._evaluated).n_views

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = {name: value for name, value in state.items() if not name.startswith("_")}
        if set(fields) != set(Settings()._fields()):
            raise SurgeryError(
                "CV411",
                "this model was pickled by another version of cropvote, whose settings differ: load its state_dict "
                "into a newly injected model.",
            )
        self._take(fields)

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


def _check(fields: dict[str, Any]) -> None:
    check_rule(fields["vote"])
    for name in ("train_output", "eval_output"):
        if not isinstance(fields[name], str) or fields[name] not in get_args(Output):
            raise OptionError("CV813", f"{name} must be one of {get_args(Output)}, got {fields[name]!r}.")
    if not isinstance(fields["enabled"], bool):
        raise InputTypeError("CV814", f"enabled must be True or False, got {fields['enabled']!r}.")
    count, most = fields["train_views"], len(fields["views"])
    if count is not None and type(count) is not int:
        raise InputTypeError("CV815", f"train_views must be a whole number of views or None, got {count!r}.")
    if count is not None and not 1 <= count <= most:
        raise OptionError("CV815", f"train_views must be at least 1 and at most {most}, got {count}.")
    if fields["vote"] == "hard" and fields["train_output"] == "vote":
        raise OptionError(
            "CV816",
            'vote="hard" with train_output="vote": a loss on a hard vote has no useful gradient. Train on every view '
            '(train_output="views" with CropVoteLoss), or vote "soft" or "probs".',
        )


def eval_indices(views: AnyViews, asked: EvalViews, name: str = "eval_views") -> tuple[int, ...]:
    """Return the ascending indices of the views that ``eval_views``, or an option of another name, selects.

    Raises:
        OptionError: an index outside the views, one given twice, none at all, or a name without such a view.
        InputTypeError: neither a name nor whole numbers.
    """
    if asked is None:
        return tuple(range(len(views)))
    if isinstance(asked, str):  # str is a Sequence, too
        if asked not in NAMED:
            raise OptionError("CV817", f"{name} must be indices, one of {tuple(NAMED)}, or None, got {asked!r}.")
        centred: dict[bool, int] = {}
        for i, combined in enumerate(itertools.product(*parts_of(views))):
            if all(view[:2] == CENTRE and view.turns % 4 == 0 for view in combined):
                centred.setdefault(sum(view.mirror for view in combined) % 2 == 1, i)  # mirrored twice comes later
        missing = [what for mirror, what in NAMED[asked] if mirror not in centred]
        if missing:
            raise OptionError("CV818", f"{name}={asked!r}, but {views!r} holds no {missing[0]}: give indices.")
        return tuple(sorted(centred[mirror] for mirror, _ in NAMED[asked]))
    return checked_indices(len(views), asked, name, f"whole numbers, one of {tuple(NAMED)}, or None")


def checked_indices(total: int, asked: object, name: str, kind: str = "whole numbers") -> tuple[int, ...]:
    """Some of ``total`` views, ascending; the errors are those of :func:`eval_indices`."""
    able = isinstance(asked, Sequence) and not isinstance(asked, str)
    if not able or not all(type(i) is int for i in asked):  # type: ignore[attr-defined]
        raise InputTypeError("CV817", f"{name} must be {kind}, got {asked!r}.")
    indices: tuple[int, ...] = tuple(asked)  # type: ignore[arg-type]
    if not indices or len(set(indices)) < len(indices) or min(indices) < 0 or max(indices) >= total:
        raise OptionError(
            "CV817", f"{name} must be different indices from 0 to {total - 1}, at least one, got {list(indices)}."
        )
    return tuple(sorted(indices))


NAMED = {
    "centre": [(False, "centred view")],
    "centre+mirror": [(False, "centred view"), (True, "mirrored centred view")],
}
