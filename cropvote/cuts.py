"""The views of one site or of several, and which of them a call cuts at each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .errors import InputTypeError
from .views import View, Views, d4, five_crop, hflip, ten_crop

__all__: list[str] = []

#: Views, or the name of some.
ViewsOrName = Views | Literal["ten", "five", "hflip", "d4"]
NAMES: dict[str, Callable[[], Views]] = {"ten": ten_crop, "five": five_crop, "hflip": hflip, "d4": d4}
#: Where to split: a site's name, or several sites and the views of each.
After = str | Mapping[str, ViewsOrName]


def as_views(value: object) -> Views:
    """Return views as they are, views by name, or ten crops for None.

    Raises:
        InputTypeError: it is neither views nor a name.
    """
    if isinstance(value, Views):
        return value
    if value is None:
        return ten_crop()
    if isinstance(value, str) and value in NAMES:
        return NAMES[value]()
    called = f" Did you mean {getattr(value, '__name__', 'it')}()?" if callable(value) else ""
    raise InputTypeError(
        "CV806",
        f"views must be a Views, such as ten_crop(), or one of {', '.join(map(repr, NAMES))}, got {value!r}.{called}",
    )


def format_sites(sites: Mapping[str, Views]) -> str:
    """Return sites and their views as text, such as ``layer1=hflip,layer3=five``."""
    return ",".join(f"{site}={_format_views(views)}" for site, views in sites.items())


def _format_views(views: Views) -> str:
    known = {make(): name for name, make in NAMES.items()}
    sizes = " x ".join(map(str, dict.fromkeys(views.scale)))
    name = known.get(views.aligned(1), f"{len(views)} views of {sizes}")
    return name if views.stride == 1 else f"{name} aligned to {views.stride}"


class ViewProduct(Sequence[tuple[View, ...]]):
    """The views of several sites: every combination of one view of each, the first site's outermost.

    Args:
        parts: the views of each site, in the order in which the forward reaches them.

    Example:
        >>> from cropvote import five_crop, hflip
        >>> from cropvote.cuts import ViewProduct
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


def join_parts(parts: Sequence[Views]) -> AnyViews:
    """Return the views of a single site, or the product of the views of several."""
    return parts[0] if len(parts) == 1 else ViewProduct(parts)


def parts_of(views: AnyViews) -> tuple[Views, ...]:
    """Return the views of each site."""
    return views.parts if isinstance(views, ViewProduct) else (views,)


class Cut(NamedTuple):
    """What a call cuts at one site, from every sample's maps there.

    Fields:
        views: the site's views.
        n_maps: how many maps of a sample come in: the views that the sites before it cut.
        indices: which of the ``n_maps * len(views)`` views it cuts, ascending; None for all.
        by_map: those of each map, None for a map that has none; a single entry if all maps have the same.
        n_random: cut this many at random instead.
    """

    views: Views
    n_maps: int = 1
    indices: tuple[int, ...] | None = None
    by_map: tuple[Views | None, ...] = ()
    n_random: int | None = None

    def keeping(self, indices: Sequence[int]) -> Cut:
        """Return the same cut with only these views."""
        count = len(self.views)
        of_map = [
            [i - first for i in indices if first <= i < first + count] for first in range(0, n_total(self), count)
        ]
        by_map = tuple(self.views.take(some) if some else None for some in of_map)
        return Cut(self.views, self.n_maps, tuple(indices), by_map[:1] if len(set(by_map)) == 1 else by_map)


class Cuts(NamedTuple):
    """What a call cuts at all its sites, and what follows from it.

    Fields:
        at: the cut at each site; none if the network runs as the plain one.
        n_views: how many rows each sample has in the output.
        keep_number: whether some site gives out as many maps as come in, so that rows from in front of it could be
            joined with rows behind it without an error.
    """

    at: tuple[Cut, ...] = ()
    n_views: int = 1
    keep_number: bool = False


def n_total(cut: Cut) -> int:
    """Return how many views of a sample there are. Not a property, which a compiler of PyTorch 2.6 does not know."""
    return cut.n_maps * len(cut.views)


def n_kept(cut: Cut) -> int:
    """Return how many maps of a sample go out."""
    return cut.n_random or (n_total(cut) if cut.indices is None else len(cut.indices))


def _together(cuts: list[Cut]) -> Cuts:
    return Cuts(tuple(cuts), n_kept(cuts[-1]), any(n_kept(cut) == cut.n_maps for cut in cuts))


def make_cuts(views: AnyViews, indices: Iterable[int] | None = None) -> Cuts:
    """Return what to cut at each site so that the views of these ascending indices come out, by default all."""
    parts = parts_of(views)
    every = list(itertools.product(*(range(len(part)) for part in parts)))
    wanted = every if indices is None else [every[i] for i in indices]
    cuts = []
    before: list[tuple[int, ...]] = [()]
    for depth, part in enumerate(parts, start=1):
        after = list(dict.fromkeys(combination[:depth] for combination in wanted))
        kept = [before.index(combination[:-1]) * len(part) + combination[-1] for combination in after]
        cut = Cut(part, len(before))
        cuts.append(cut if len(kept) == n_total(cut) else cut.keeping(kept))
        before = after
    return _together(cuts)


def make_random_cuts(views: AnyViews, count: int) -> Cuts:
    """Return what to cut at each site so that ``count`` random views come out, spread evenly over the first sites'."""
    cuts: list[Cut] = []
    n_maps = 1
    for part in parts_of(views):
        kept = min(count, n_maps * len(part))
        cuts.append(Cut(part, n_maps, n_random=None if kept == n_maps * len(part) else kept))
        n_maps = kept
    return _together(cuts)
