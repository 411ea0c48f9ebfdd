"""One forward of a voting model: which views it cuts at each site, whether it votes, and which splits ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ._torch import is_captured, is_fake, is_jit_tracing, is_recorded
from .cuts import Cut, Cuts, n_total
from .errors import OptionError, RowsError, SurgeryError
from .layouts import Layout
from .options import Settings
from .outputs import KeyPath, map_tensors, prediction_paths
from .splitting import flatten_views, split_views, unflatten_views
from .tracking import Tracked, plain
from .voting import mark_vote, vote

__all__: list[str] = []


class Call:
    """What one forward does. It is read from the settings once, so a change while it runs has no effect on it.

    Fields:
        settings: the settings of the model or layer that is called.
        cuts: what is cut; ``cuts.at`` is empty if the model runs as the plain network.
        voted: whether the output is the vote, or a row for each view.
        how: the rule of the vote.
        started: whether the forward has begun; a call that :func:`requested` put on the stack waits for it.
        ran: the indices of the splits that ran so far.
        layouts: the layout of the map at each site, if it depends on the size of the images.
        leaked: whether data of the images reached a split or the output by a path around a site.
        requested: whether a function such as ``per_view`` asked for these cuts, whatever the settings say.
    """

    __slots__ = ("cuts", "how", "layouts", "leaked", "ran", "requested", "settings", "started", "voted")

    def __init__(self, settings: Settings, cuts: Cuts, voted: bool, requested: bool = False) -> None:
        self.settings, self.cuts, self.voted, self.how = settings, cuts, voted, settings.vote
        self.requested, self.started = requested, not requested
        self.ran: list[int] = []
        self.layouts: tuple[Layout, ...] | None = None
        self.leaked = False


#: The network without a split or a vote.
PLAIN = Cuts()
#: The calls that are running in this thread, the innermost last.
_STACK: ContextVar[tuple[Call, ...]] = ContextVar("cropvote_calls", default=())


def call_by(settings: Settings, training: bool) -> Call:
    """Return the call that the settings ask for in a mode."""
    if not settings.enabled:
        return Call(settings, PLAIN, voted=False)
    if training:
        return Call(settings, settings._trained, settings.train_output == "vote")
    return Call(settings, settings._evaluated, settings.eval_output == "vote")


@contextmanager
def requested(settings: Settings, cuts: Cuts) -> Iterator[None]:
    """Let the next call with these settings, in this thread, give the rows of these cuts."""
    token = _STACK.set((*_STACK.get(), Call(settings, cuts, voted=False, requested=True)))
    try:
        yield
    finally:
        _STACK.reset(token)


class running:  # noqa: N801  # used as a function; a generator would be slower
    """Put a call on the stack: the one requested, or the one that the settings ask for."""

    __slots__ = ("call", "token")

    def __init__(self, settings: Settings, training: bool) -> None:
        stack = _STACK.get()
        top = stack[-1] if stack else None
        if top is not None and not top.started and top.settings is settings:
            top.started, self.call = True, top
        else:
            self.call = call_by(settings, training)

    def __enter__(self) -> Call:
        self.token = _STACK.set((*_STACK.get(), self.call))
        return self.call

    def __exit__(self, *error: object) -> None:
        _STACK.reset(self.token)


def current(settings: Settings) -> Call | None:
    """Return the innermost running call with these settings."""
    for call in reversed(_STACK.get()):
        if call.started and call.settings is settings:
            return call
    return None


def cut_views(cut: Cut, x: Tensor, layout: Layout) -> Tensor:
    """Cut the views of a call at one site: all of them, the chosen ones, or some drawn at random."""
    if cut.n_random is not None:
        if is_jit_tracing():
            raise OptionError(
                "CV501", "train_views draws views at random, which torch.jit.trace would freeze: trace in eval mode."
            )
        on_device = is_recorded() or is_captured()  # the numbers must be drawn again whenever the graph runs
        drawn = draw(len(cut.views), cut.n_random, x.device if on_device else torch.device("cpu"), cut.n_maps)
        if on_device or type(drawn) is not Tensor:  # numbers that are not known now
            every = unflatten_views(split_views(x, cut.views, layout=layout), n_total(cut))
            return flatten_views(every.index_select(1, drawn.to(x.device)))
        cut = cut.keeping(drawn.tolist())
    if cut.indices is None:
        return split_views(x, cut.views, layout=layout)
    if len(cut.by_map) == 1 and cut.by_map[0] is not None:
        return split_views(x, cut.by_map[0], layout=layout)
    maps = unflatten_views(x, cut.n_maps)
    parts = [
        unflatten_views(split_views(maps[:, i], views, layout=layout), len(views))
        for i, views in enumerate(cut.by_map)
        if views is not None
    ]
    rows = flatten_views(torch.cat(parts, dim=1))
    if x.dim() == 4 and x.stride(1) == 1 and x.stride(3) != 1:
        return rows.contiguous(memory_format=torch.channels_last)
    return rows


def draw(total: int, count: int, device: torch.device, n_maps: int = 1) -> Tensor:
    """Draw ``count`` ascending indices of views from the global random numbers and the rank.

    There are ``total`` views of each map, one map after the other; the maps give equally many, or one more. Every
    process uses the same number of random numbers, so processes that were in step stay so, and draws its own views.
    """
    rank, size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scores = torch.rand(size, n_maps * total, device=device)[rank].view(n_maps, total)
    turns = scores.argsort(dim=1).argsort(dim=1) + scores  # first every map's first, then every map's second, ...
    return turns.flatten().argsort()[:count].sort().values


def vote_output(call: Call, output: Any, images: Tensor) -> Any:
    """Return the network's output with the vote, or the checked rows, in place of its predictions.

    An output with one row for each sample beside the main one (an auxiliary head in front of the site) is left alone,
    and so is everything that is not a prediction.

    Raises:
        RowsError: the predictions are not one row for each view.
        SurgeryError: a prediction without data, which an earlier check left behind.
    """
    samples, count = images.shape[0], call.cuts.n_views
    paths: list[KeyPath] = [()] if isinstance(output, Tensor) else prediction_paths(output)

    def replace(path: KeyPath, rows: Tensor) -> Tensor:
        is_aside = path != paths[0] and rows.shape[0] == samples  # the output of a head in front of the site
        if count == 1:  # as many rows as behind the site: in a tracked call, the data tells
            is_aside &= type(rows) is Tracked and rows.passed < len(call.cuts.at)
        if path not in paths or is_aside:
            return plain(rows)
        check_rows(rows, samples, count)
        if type(rows) is Tracked:
            call.leaked |= rows.passed < len(call.cuts.at)
            rows = plain(rows)
        elif type(rows) is not Tensor and is_fake(rows) and not is_fake(images):
            raise SurgeryError(
                "CV410",
                "the network returned a tensor without data, which a check left in a cache or an attribute outside the "
                "model: empty that store, and call the model again.",
            )
        if not call.voted:
            return rows
        votes = vote(rows, count, call.how)
        if not torch.compiler.is_compiling():  # for CropVoteLoss: by which rule, and whether training gives rows
            mark_vote(votes, call.how, call.settings.train_output != "vote")
        return votes

    return replace((), output) if isinstance(output, Tensor) else map_tensors(replace, output)


def check_rows(rows: Tensor, samples: int, count: int) -> None:
    """Raise RowsError unless there is one row for each view."""
    if rows.dim() != 2:
        raise RowsError(
            "CV301",
            f"the network returned shape {tuple(rows.shape)} for {samples} samples of {count} views; "
            f"cropvote votes over one row of K outputs per view, ({samples * count}, K).",
        )
    if rows.shape[0] != samples * count:
        raise RowsError(
            "CV302",
            f"the network returned {rows.shape[0]} rows for {samples} samples of {count} views: expected "
            f"{samples * count}, a sample's views adjacent. Was a part of the network replaced, skipped or compiled "
            f"by itself since the model was checked?",
        )


def check_splits_ran(call: Call, may_be_compiled: bool) -> None:
    """Raise RowsError unless every split ran once and in order.

    A missing split need not show in the number of rows: with few views, a site may take as many maps as it gives.

    Args:
        call: the call, at its end.
        may_be_compiled: whether a part of the model is compiled by itself, whose splits are not noted.
    """
    if call.ran == list(range(len(call.cuts.at))) or (may_be_compiled and call.ran == sorted(set(call.ran))):
        return
    times = ", ".join(f"{call.ran.count(i)} times" for i in range(len(call.cuts.at)))
    raise RowsError(
        "CV303",
        f"the split did not run exactly once in this call, but {times}: was the site replaced (by a copy, by a "
        f"converter), skipped, compiled by itself or called again since the model was checked?",
    )
