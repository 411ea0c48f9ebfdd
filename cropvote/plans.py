"""Plans: the views of one site or of several, and which of them a call cuts at each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .views import View, Views, d4, five_crop, hflip, ten_crop

__all__: list[str] = []

#: Where to split: a site's name, or several sites and the views of each.
After = str | Mapping[str, Views]
#: What views are called in words.
NAMES: dict[str, Callable[[], Views]] = {"ten": ten_crop, "five": five_crop, "hflip": hflip, "d4": d4}


def in_words(plan: Mapping[str, Views]) -> str:
    """A plan's sites and views, such as ``layer1=hflip,layer3=five``."""
    known = {make(): name for name, make in NAMES.items()}
    sizes = {views: " x ".join(map(str, dict.fromkeys(views.scale))) for views in plan.values()}
    return ",".join(f"{s}={known.get(v, f'{len(v)} views of {sizes[v]}')}" for s, v in plan.items())


class ViewProduct(Sequence[tuple[View, ...]]):
    """The views of several sites: every combination of one view of each, the first site's outermost.

    Args:
        parts: the views of each site, in the order in which the forward reaches them.

    Example:
        >>> from cropvote import five_crop, hflip
        >>> from cropvote.plans import ViewProduct
        >>> product = ViewProduct([hflip(), five_crop()])
        >>> len(product), product[4][1] == five_crop()[4]
        (10, True)
    """

    def __init__(self, parts: Iterable[Views]) -> None:
        self.parts = tuple(parts)

    def __getitem__(self, index: Any) -> Any:
        return tuple(itertools.product(*self.parts))[index]

    def __len__(self) -> int:
        return math.prod(map(len, self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ViewProduct) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return " × ".join(map(repr, self.parts))


AnyViews = Views | ViewProduct


def joined(parts: Sequence[Views]) -> AnyViews:
    """The views of all sites together: those of the only one, or their product."""
    return parts[0] if len(parts) == 1 else ViewProduct(parts)


def parts_of(views: AnyViews) -> tuple[Views, ...]:
    """The views of each site."""
    return views.parts if isinstance(views, ViewProduct) else (views,)


class Cut(NamedTuple):
    """What a call cuts at one site, from every sample's maps there.

    Fields:
        views: the site's views.
        groups: how many maps of a sample come in: the views that the sites before it cut.
        kept: which of the ``groups * len(views)`` views it cuts, ascending; None for all.
        each: those of every group, None where it has none; a single entry where all groups have the same.
        drawn: instead, so many of them at random.
    """

    views: Views
    groups: int = 1
    kept: tuple[int, ...] | None = None
    each: tuple[Views | None, ...] = ()
    drawn: int | None = None

    def keeping(self, kept: Sequence[int]) -> Cut:
        """The same site, of whose views only these are cut."""
        count = len(self.views)
        of_group = [[i - group * count for i in kept if i // count == group] for group in range(self.groups)]
        each = tuple(self.views.take(indices) if indices else None for indices in of_group)
        return Cut(self.views, self.groups, tuple(kept), each[:1] if len(set(each)) == 1 else each)


def total_of(cut: Cut) -> int:
    """How many views of a sample there are to cut. No property: a compiler of PyTorch 2.6 knows none of tuples."""
    return cut.groups * len(cut.views)


def rows_of(cut: Cut) -> int:
    """How many maps of a sample go out."""
    return cut.drawn or (total_of(cut) if cut.kept is None else len(cut.kept))


def cuts_of(views: AnyViews, indices: Iterable[int] | None = None, *, whole: int = 0) -> tuple[Cut, ...]:
    """What to cut at each site so that the views of these ascending indices, by default all, come out and no other.

    The first ``whole`` sites cut all their views, whether they are needed or not.
    """
    parts = parts_of(views)
    places = list(itertools.product(*(range(len(part)) for part in parts)))
    wanted = places if indices is None else [places[i] for i in indices]
    cuts = []
    before: list[tuple[int, ...]] = [()]
    for depth, part in enumerate(parts, start=1):
        after = list(dict.fromkeys(place[:depth] for place in (places if depth <= whole else wanted)))
        kept = [before.index(place[:-1]) * len(part) + place[-1] for place in after]
        cut = Cut(part, len(before))
        cuts.append(cut if len(kept) == total_of(cut) else cut.keeping(kept))
        before = after
    return tuple(cuts)


def passes_of(cut: Cut, step: int | None) -> tuple[Cut, ...]:
    """The same cut, ``step`` views at a time; nothing where they are not to be parted."""
    if step is None:
        return ()
    kept = tuple(range(total_of(cut))) if cut.kept is None else cut.kept
    return tuple(cut.keeping(kept[start : start + step]) for start in range(0, len(kept), step))


def drawn_cuts(views: AnyViews, count: int) -> tuple[Cut, ...]:
    """What to cut at each site so that ``count`` random views come out, spread evenly over the first sites' views."""
    cuts: list[Cut] = []
    groups = 1
    for part in parts_of(views):
        rows = min(count, groups * len(part))
        cuts.append(Cut(part, groups, drawn=None if rows == groups * len(part) else rows))
        groups = rows
    return tuple(cuts)
