"""Verdicts: whether a model can be split at a site, or at several one behind the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import Reason, ViewsError
from ..layouts import Layout, Tokens, sides
from ..views import Views
from .layout import find_layout
from .reasons import why_not_here
from .trace import Trace
from .trial import Split, try_padded

__all__ = ["Site"]


class Site(NamedTuple):
    """One module as a place to split.

    Fields:
        name: its name in ``model.named_modules()``, or ``"input"``.
        shape: its output's (C, H, W), (H, W, C) or (L, C), as the layout says; empty where it returns no tensor.
        layout: "NCHW", "NHWC" or :class:`Tokens`.
        distinct: how many of the views differ there.
        reason: why it is not a valid site, with the code of its entry in the troubleshooting page; "" if it is one.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    distinct: int
    reason: str = ""


class Verdict(NamedTuple):
    """Whether a model can be split.

    Fields:
        splits: in forward order; the last one is the one refused, if there is a reason.
        reason: why not, if it cannot.
    """

    splits: list[Split]
    reason: Reason | None


def judge(
    trace: Trace,
    sites: Mapping[str, Views],
    stated: Mapping[str, Layout | None] | None = None,
    known: Mapping[str, tuple[Layout, tuple[int, ...]]] | None = None,
    explain: bool = False,
) -> Verdict:
    """Return whether a model can be split at these sites together.

    Args:
        trace: of the model.
        sites: the views at each site.
        stated: the layout that the user stated for each.
        known: the layout and the shape of each map in the other mode: a map of the same shape has the same layout.
        explain: see :func:`~cropvote.probe.trial.try_splits`.

    Raises:
        ViewsError: only the size of a map is at fault.
    """
    splits: list[Split] = []
    for name in sorted(sites, key=trace.turn):
        views, layout_stated = sites[name], (stated or {}).get(name)
        layout, reason = layout_stated or "NCHW", why_not_here(trace, name)
        if not reason and known is not None and known[name][1] == trace.shape(name):
            layout = known[name][0]
        elif not reason:
            layout, reason = find_layout(trace, name, views, layout_stated, explain)
        if not reason and splits and trace.turn(splits[-1].site) == trace.turn(name):
            reason = Reason("CV110", f"it returns what {splits[-1].site!r} returns: that is one place.")
        if not reason and isinstance(layout, Tokens):
            layout, reason = _grid_behind(trace, splits, layout)
        splits.append(Split(name, views, layout))
        if reason:
            return Verdict(splits, reason)
    return Verdict(splits, try_padded(trace, splits, explain))


def judge_site(trace: Trace, name: str, views: Views) -> Site:
    """Return the verdict on a single site, which is reached once for modules that share a carrier."""
    key = "site", trace.carriers.get(name), views
    if key not in trace.memo:
        try:
            splits, reason = judge(trace, {name: views})
            trace.memo[key] = splits[0].layout, str(reason or "")
        except ViewsError as error:
            trace.memo[key] = "NCHW", str(error)
    layout, reason = trace.memo[key]
    shape = trace.shape(name)
    is_map = len(shape) == (2 if isinstance(layout, Tokens) else 3)
    try:
        distinct = views.distinct(*sides(shape, layout)) if is_map else 0
    except ViewsError:
        distinct = 0
    return Site(name, shape, layout, distinct, reason)


def _grid_behind(trace: Trace, splits: list[Split], layout: Tokens) -> tuple[Tokens, Reason | None]:
    """Return the grid of a site's tokens behind sites that cut the grid, and why it is unknown."""
    plain = grid = (layout.height, layout.width)
    for site, views, split_layout in splits:
        size = sides(trace.shape(site), split_layout)
        if views.crop_size(*size) == size:
            continue
        if size != plain:
            return layout, Reason("CV111", f"its tokens behind the views at {site!r} are of a grid that is not known.")
        grid = views.crop_size(*grid)
    return layout._replace(height=grid[0], width=grid[1]), None
