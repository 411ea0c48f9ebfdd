"""One call of a layer or an injected model: which views it cuts, in how many passes, and what it makes of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError, RowsError
from ..layouts import Layout
from ..plans import Cut, rows_of, total_of
from ..splitting import join_views, part_views, split_views
from ..voting import vote
from .options import Settings
from .outputs import Place, describe, map_tensors, prediction_places, tensors_of

__all__: list[str] = []


class Plan(NamedTuple):
    """What a call, or one pass of it, does."""

    cuts: tuple[Cut, ...]  # one for each site
    voted: bool
    passes: tuple[Cut, ...] = ()  # the tail runs on a few views at a time: the last site's cut in parts
    front: list[Tensor] | None = None  # the maps that the first pass leaves for the others ...
    front_at: int = 0  # ... at this site


def samples_of(plan: Plan, called: int) -> int:
    """The samples of a call with so many: those whose maps were kept, where another one stands in for them."""
    return plan.front[0].shape[0] // plan.cuts[plan.front_at].groups if plan.front else called


#: What calls that run just now do otherwise than their settings say, per thread: by the settings, what the next call of
#: their model does; by the carrier of a split, what this call's split does.
_PLANS: ContextVar[dict[object, Plan | None]] = ContextVar("plans", default={})  # noqa: B039  # never changed in place


def plan_of(settings: Settings, training: bool, split: object = None) -> Plan:
    """What a call, or its ``split``, does, by the settings and the mode of the model that votes."""
    plan = None if torch.compiler.is_compiling() else _PLANS.get().get(split or settings)
    if plan is not None:  # never under a compiler, which need not know of this: nothing here is compiled
        return plan
    if training:
        return Plan(settings._trained, settings.train_output == "vote")
    return Plan(settings._evaluated, settings.eval_output == "vote", settings._passes)


def is_steered(settings: Settings, split: object) -> bool:
    """Whether calls of these settings' model, in this thread, run inside :func:`following`."""
    return not torch.compiler.is_compiling() and not _PLANS.get().keys().isdisjoint((settings, split))


#: The places of the splits that ran so far in the calls of this thread, by the settings of the model that is called.
_RAN: ContextVar[dict[Settings, list[int]]] = ContextVar("ran", default={})  # noqa: B039  # never changed in place


def watched(run: Callable[[], Any], settings: Settings, places: int, model: nn.Module) -> Any:
    """What ``run`` returns, in which every split of ``model`` must run, once and in order.

    A missing one need not show in the number of rows: with few views, a site may take as many maps as it gives. Under
    a compiler nothing can be noted, so that a split of a compiled part of the model is not missed.

    Raises:
        RowsError: a split that did not run, or not in its turn.
    """
    if torch.compiler.is_compiling():
        return run()
    found: list[int] = []
    token = _RAN.set({**_RAN.get(), settings: found})  # a call of the same model inside this one has a list of its own
    try:
        output = run()
    finally:
        _RAN.reset(token)
    if found != list(range(places)) and not (found == sorted(set(found)) and _is_compiled_inside(model)):
        times = ", ".join(f"{found.count(place)} times" for place in range(places))
        raise RowsError(
            f"the split did not run exactly once in this call, but {times if places > 1 else f'{len(found)} times'}: "
            f"was the site replaced (by a copy, by a converter), skipped or called again since the model was checked?"
        )
    return output


def note(settings: Settings, place: int) -> None:
    """Say that this split ran."""
    if not torch.compiler.is_compiling() and settings in _RAN.get():
        _RAN.get()[settings].append(place)


def has_run(settings: Settings, place: int) -> bool:
    """Whether this split ran in the call of this thread; also where that is not known: compiled, or in a backward."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:  # checkpointing runs a part again
        return True
    return place in _RAN.get().get(settings, ())


def _is_compiled_inside(model: nn.Module) -> bool:
    """Whether a part of it is compiled by itself."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


@contextmanager
def following(plans: dict[object, Plan | None]) -> Iterator[None]:
    """Let the calls inside follow such plans, in this thread alone."""
    token = _PLANS.set({**_PLANS.get(), **plans})
    try:
        yield
    finally:
        _PLANS.reset(token)


def split_by(cut: Cut, x: Tensor, layout: Layout) -> Tensor:
    """Cut the views of a call at one site: all of them, those that are wanted, or some drawn at random."""
    if cut.drawn is not None:
        if torch._C._get_tracing_state() is not None:
            raise OptionError(
                "train_views draws views at random, which torch.jit.trace would freeze: trace in eval mode."
            )
        recorded = torch.compiler.is_compiling()
        drawn = draw(len(cut.views), cut.drawn, x.device if recorded else torch.device("cpu"), cut.groups)
        if recorded or type(drawn) is not Tensor:  # numbers that are not known now
            every = part_views(split_views(x, cut.views, layout=layout), total_of(cut))
            return join_views(every.index_select(1, drawn.to(x.device)))
        cut = cut.keeping(drawn.tolist())
    if cut.kept is None:
        return split_views(x, cut.views, layout=layout)
    if len(cut.each) == 1 and cut.each[0] is not None:
        return split_views(x, cut.each[0], layout=layout)
    maps = part_views(x, cut.groups)
    found = [
        part_views(split_views(maps[:, group], views, layout=layout), len(views))
        for group, views in enumerate(cut.each)
        if views is not None
    ]
    rows = join_views(torch.cat(found, dim=1))
    if x.dim() == 4 and x.stride(1) == 1 and x.stride(3) != 1:
        return rows.contiguous(memory_format=torch.channels_last)
    return rows


def draw(total: int, count: int, device: torch.device, groups: int = 1) -> Tensor:
    """The ascending indices of ``count`` views, drawn from the global random numbers and the rank.

    There are ``total`` views of each group, one group after the other; each group gives as many, or one more. Every
    process uses up as many random numbers, so that those which were in step stay so, and draws its own views.
    """
    rank, size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scores = torch.rand(size, groups * total, device=device)[rank].view(groups, total)
    turns = scores.argsort(dim=1).argsort(dim=1) + scores  # first every group's first, then every group's second, ...
    return turns.flatten().argsort()[:count].sort().values


def in_passes(plan: Plan, settings: Settings, samples: int, run: Callable[[int, Plan], Any]) -> Any:
    """The output of a call whose tail runs on a few views at a time: ``run(i, plan)`` is pass ``i``.

    Raises:
        RowsError: the model returns more than its predictions, which would have to be put together as well.
    """
    *before, _ = plan.cuts
    front: list[Tensor] = []
    rows, output = [], None
    for i, cut in enumerate(plan.passes):
        part = Plan((*before, cut), voted=False, front=front, front_at=len(before))
        found = run(i, part)
        output = found if i == 0 else output
        tensors = dict(tensors_of(found))
        if len(tensors) != 1:
            raise RowsError(
                f"the model returns {describe(found)}; views_per_pass puts together the rows of one tensor of "
                f"predictions: set it to None."
            )
        (tensor,) = tensors.values()
        _check_rows(tensor, samples, rows_of(cut))
        rows.append(part_views(tensor, rows_of(cut)))
    joined = join_views(torch.cat(rows, dim=1))
    return map_tensors(lambda place, x: finish(plan, joined, settings), output)


def finish(plan: Plan, rows: Tensor, settings: Settings) -> Tensor:
    """The vote over the rows, or the rows."""
    return vote(rows, rows_of(plan.cuts[-1]), settings.vote) if plan.voted else rows


def conclude(plan: Plan, output: Any, samples: int, settings: Settings) -> Any:
    """The network's output with the vote in place of its predictions, after checking that they are one row per view.

    An output that stays one row per sample beside the main one (an auxiliary head in front of the site) is left alone,
    as is all that is no prediction.
    """
    places = prediction_places(output)
    samples, count = samples_of(plan, samples), rows_of(plan.cuts[-1])

    def see(place: Place, rows: Tensor) -> Tensor:
        if place not in places or (place != places[0] and rows.shape[0] == samples and count > 1):
            return rows
        _check_rows(rows, samples, count)
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
            f"{samples * count}, a sample's views adjacent. Was a part of the network replaced, skipped or compiled "
            f"by itself since the model was checked?"
        )
