"""One call of a layer or an injected model: which views it cuts, in how many passes, and what it makes of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import OptionError, RowsError
from .layouts import Layout
from .options import Settings
from .outputs import Place, describe, map_tensors, prediction_places, tensors_of
from .splitting import join_views, part_views, split_views
from .views import Views
from .voting import vote

__all__: list[str] = []


class Plan(NamedTuple):
    """What a call, or one pass of it, does."""

    views: Views
    voted: bool
    drawn: int | None = None  # so many of the views, at random
    per_pass: int | None = None  # the tail runs on so many views at a time
    front: list[Tensor] | None = None  # the map that the first pass leaves for the others

    @property
    def rows(self) -> int:
        """The rows of a sample."""
        return len(self.views) if self.drawn is None else self.drawn


#: What calls that run just now do otherwise than their settings say, per thread: by the settings, what the next call of
#: their model does; by the carrier of a split, what this call's split does.
_PLANS: ContextVar[dict[object, Plan | None]] = ContextVar("plans", default={})  # noqa: B039  # never changed in place


def plan_of(settings: Settings, training: bool, split: object = None) -> Plan:
    """What a call, or its ``split``, does, by the settings and the mode of the model that votes."""
    plan = None if torch.compiler.is_compiling() else _PLANS.get().get(split or settings)
    if plan is not None:  # never under a compiler, which need not know of this: nothing here is compiled
        return plan
    if training:
        return Plan(settings.views, settings.train_output == "vote", settings.train_views)
    return Plan(settings._evaluated, settings.eval_output == "vote", None, settings.views_per_pass)


def is_steered(settings: Settings, split: object) -> bool:
    """Whether calls of these settings' model, in this thread, run inside :func:`following`."""
    return not torch.compiler.is_compiling() and not _PLANS.get().keys().isdisjoint((settings, split))


@contextmanager
def following(plans: dict[object, Plan | None]) -> Iterator[None]:
    """Let the calls inside follow such plans, in this thread alone."""
    token = _PLANS.set({**_PLANS.get(), **plans})
    try:
        yield
    finally:
        _PLANS.reset(token)


def split_by(plan: Plan, x: Tensor, layout: Layout) -> Tensor:
    """Cut the views of a call: all that its plan holds, or some of them drawn at random."""
    if plan.drawn is None:
        return split_views(x, plan.views, layout=layout)
    if torch._C._get_tracing_state() is not None:
        raise OptionError("train_views draws views at random, which torch.jit.trace would freeze: trace in eval mode.")
    recorded = torch.compiler.is_compiling()
    drawn = draw(len(plan.views), plan.drawn, x.device if recorded else torch.device("cpu"))
    if recorded or type(drawn) is not Tensor:  # numbers that are not known now
        every = part_views(split_views(x, plan.views, layout=layout), len(plan.views))
        return join_views(every.index_select(1, drawn.to(x.device)))
    return split_views(x, plan.views.take(drawn.tolist()), layout=layout)


def draw(total: int, count: int, device: torch.device) -> Tensor:
    """The ascending indices of ``count`` of ``total`` views, drawn from the global random numbers and the rank.

    Every process uses up as many random numbers, so that those which were in step stay so, and draws its own views.
    """
    rank, size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return torch.rand(size, total, device=device)[rank].argsort()[:count].sort().values


def in_passes(plan: Plan, settings: Settings, samples: int, run: Callable[[int, Plan], Any]) -> Any:
    """The output of a call whose tail runs on a few views at a time: ``run(i, plan)`` is pass ``i``.

    Raises:
        RowsError: the model returns more than its predictions, which would have to be put together as well.
    """
    total, step = len(plan.views), plan.per_pass or len(plan.views)
    parts = [plan.views.take(range(start, min(start + step, total))) for start in range(0, total, step)]
    front: list[Tensor] = []
    rows, output = [], None
    for i, views in enumerate(parts):
        part = Plan(views, voted=False, front=front)
        found = run(i, part)
        output = found if i == 0 else output
        tensors = dict(tensors_of(found))
        if len(tensors) != 1:
            raise RowsError(
                f"the model returns {describe(found)}; views_per_pass puts together the rows of one tensor of "
                f"predictions: set it to None."
            )
        (tensor,) = tensors.values()
        _check_rows(tensor, samples, len(views))
        rows.append(part_views(tensor, len(views)))
    joined = join_views(torch.cat(rows, dim=1))
    return map_tensors(lambda place, x: finish(plan, joined, settings), output)


def finish(plan: Plan, rows: Tensor, settings: Settings) -> Tensor:
    """The vote over the rows, or the rows."""
    return vote(rows, plan.rows, settings.vote) if plan.voted else rows


def conclude(plan: Plan, output: Any, samples: int, settings: Settings) -> Any:
    """The network's output with the vote in place of its predictions, after checking that they are one row per view.

    An output that stays one row per sample beside the main one (an auxiliary head in front of the site) is left alone,
    as is all that is no prediction.
    """
    places = prediction_places(output)

    def see(place: Place, rows: Tensor) -> Tensor:
        if place not in places or (place != places[0] and rows.shape[0] == samples and plan.rows > 1):
            return rows
        _check_rows(rows, samples, plan.rows)
        return finish(plan, rows, settings)

    return map_tensors(see, output)


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
