"""Which sites a cost table lists: the stages of a network, or every valid site."""

from __future__ import annotations

from contextlib import suppress

from ..errors import ViewsError
from ..images import INPUT
from ..layouts import sides
from ..probe.layout import map_size
from ..probe.sites import candidates, check_aligned, judge_swaps
from ..probe.trial import Split
from ..probe.verdicts import Site, judge_site
from ..progress import shown
from .meters import Meter, SiteCost

__all__: list[str] = []

#: Behind a site with less of the network's work (a pooling and a linear layer) the vote is another way of pooling.
LEAST_TAIL = 0.01
#: A module whose maps have at least this many sizes holds several stages.
SEVERAL = 3

Row = tuple[Site, SiteCost]


def list_stages(meter: Meter, progress: bool = False) -> list[Row]:
    """Return the stages of the network and their costs in forward order, the images first.

    A valid site hides the sites inside it, unless maps of three or more sizes are inside (``blocks`` of a MobileNet is
    several stages). If the sites that remain have fewer than three map sizes (a transformer), none is hidden. Of sites
    that follow each other at equal work and shape (a convolution, its norm, its activation; a map and the tokens made
    of it) the last is listed: crops commute with what works element by element, and less memory is kept there.
    """
    rows = _outermost(meter, progress)
    if len({sides(site.shape, site.layout) for site, _ in rows if site.name != INPUT}) < SEVERAL:
        rows = list_every_site(meter, progress)
    return last_of_equals(rows)


def list_every_site(meter: Meter, progress: bool = False) -> list[Row]:
    """Return all valid sites and their costs in forward order, the images first."""
    names = shown(candidates(meter.trace), "sites", "site", progress)
    return _swappable(meter, [row for name in names for row in _cost(meter, name)])


def last_of_equals(rows: list[Row]) -> list[Row]:
    """Return the rows without those whose next row is of equal work and shape."""
    return [row for i, row in enumerate(rows) if i == len(rows) - 1 or _key(row) != _key(rows[i + 1])]


def _key(row: Row) -> tuple[float, tuple[int, ...], int]:
    """Return the work, the sides and the channels."""
    site, cost = row
    return cost.ratio, sides(site.shape, site.layout), site.shape[0 if site.layout == "NCHW" else -1]


def _outermost(meter: Meter, progress: bool) -> list[Row]:
    """Return the valid sites that no other valid site hides."""
    names = candidates(meter.trace)
    sizes = {name: map_size(meter.trace, name) for name in names if name != INPUT}

    def hides(ancestor: str) -> bool:
        inside = {size for name, size in sizes.items() if f"{name}.".startswith(f"{ancestor}.")}
        return len(inside - {(1, 1)}) < SEVERAL and bool(_cost(meter, ancestor))

    def is_hidden(name: str) -> bool:
        parts = name.split(".")
        return any(hides(".".join(parts[:depth])) for depth in range(1, len(parts)))

    visible = (name for name in shown(names, "sites", "site", progress) if not is_hidden(name))
    return _swappable(meter, [row for name in visible for row in _cost(meter, name)])


def _swappable(meter: Meter, rows: list[Row]) -> list[Row]:
    sites = judge_swaps(meter.trace, [site for site, _ in rows])
    return [row for row, site in zip(rows, sites, strict=True) if not site.reason]


def _cost(meter: Meter, name: str) -> list[Row]:
    """Return the site and its cost, in a list; an empty list if it is not valid for the views there."""
    views = meter.views_at(name)
    site = judge_site(meter.trace, name, views)
    if not site.reason:
        with suppress(ViewsError):
            if meter.align:
                check_aligned(meter.trace, [Split(name, views, site.layout)])
            return [(site, meter.cost(site))]
    return []
