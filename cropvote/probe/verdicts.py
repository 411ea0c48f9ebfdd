"""Verdicts: where the height and the width of a module's output are, and whether it is a valid site."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

from ..errors import ViewsError
from ..images import INPUT, Example
from ..layouts import AXES, LAYOUTS, Layout, Tokens, sides, stated_layout, stated_tokens, token_count
from ..views import Views
from .trial import Split, Trials, pad_to_prime

__all__ = ["Site"]


class Site(NamedTuple):
    """One module as a place to split.

    Fields:
        name: its name in ``model.named_modules()``, or ``"input"``.
        shape: its output's (C, H, W), (H, W, C) or (L, C), as the layout says; empty where it returns no tensor.
        layout: "NCHW", "NHWC" or :class:`Tokens`.
        distinct: how many of the views differ there.
        reason: why it is no valid site; empty where it is one.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    distinct: int
    reason: str = ""


class Probe(Trials):
    """A walk, then a trial split for each site asked for."""

    def __init__(self, model: nn.Module, example: Example, views: Views, layout: Layout | None) -> None:
        super().__init__(model, example)
        self.views, self.layout = views, layout
        self.judged: dict[nn.Module | None, tuple[Layout, str]] = {}

    def site(self, name: str) -> Site:
        key = self.holders.get(name)
        if key not in self.judged:
            self.judged[key] = self._judged(name)
        layout, reason = self.judged[key]
        shape = self.shape(name)
        is_map = len(shape) == (2 if isinstance(layout, Tokens) else 3)
        try:
            distinct = self.views.distinct(*sides(shape, layout)) if is_map else 0
        except ViewsError:
            distinct = 0
        return Site(name, shape, layout, distinct, reason)

    def _judged(self, name: str) -> tuple[Layout, str]:
        try:
            return self.verdict(name)
        except ViewsError as error:
            return self.layout or "NCHW", str(error)

    def verdict(self, name: str) -> tuple[Layout, str]:
        """The layout of a site's map, and why it is no valid site or nothing.

        Raises:
            ViewsError: only the map's size is at fault.
        """
        layout, reason = self._alone(name)
        return layout, reason or self._trial([Split(name, pad_to_prime(self.views), layout)])

    def verdict_of(
        self,
        plan: dict[str, Views],
        stated: dict[str, Layout | None],
        known: dict[str, tuple[Layout, Any]] | None = None,
    ) -> tuple[list[Split], str, str]:
        """Return the splits in forward order, the site that is at fault or nothing, and why.

        ``known`` holds the layout and the shape of each map in the other mode: of the same shape, it is the same.

        Raises:
            ViewsError: only the size of a map is at fault.
        """
        splits: list[Split] = []
        for name in sorted(plan, key=self._turn):
            if known is not None and known[name][1] == self.shape(name):
                layout, reason = known[name][0], self._why_not_here(name)
            else:
                layout, reason = self._found(name, plan[name], stated[name])
            if not reason and splits and self._turn(splits[-1].name) == self._turn(name):
                reason = f"it returns what {splits[-1].name!r} returns: that is one place."
            if not reason and isinstance(layout, Tokens):
                layout, reason = self._grid_behind(splits, name, layout)
            if reason:
                return [], name, reason
            splits.append(Split(name, plan[name], layout))
        reason = self._trial([Split(s.name, pad_to_prime(s.views), s.layout) for s in splits])
        return splits, splits[-1].name, reason

    def _found(self, name: str, views: Views, layout: Layout | None) -> tuple[Layout, str]:
        """The same as :meth:`_alone` for other views and another stated layout than the probe's."""
        usual = self.views, self.layout
        self.views, self.layout = views, layout
        try:
            return self._alone(name)
        finally:
            self.views, self.layout = usual

    def _alone(self, name: str) -> tuple[Layout, str]:
        """Return the site's layout, and the reason it is invalid regardless of the tail ("" if none)."""
        reason = self._why_not_here(name)
        return (self.layout or "NCHW", reason) if reason else self._find_layout(name)

    def _why_not_here(self, name: str) -> str:
        return self.why_not_votable() or (self.why_not_images() if name == INPUT else self.why_not_cut(name))

    def _turn(self, name: str) -> int:
        """When the forward reaches a site; the same for modules that return the same tensor."""
        if name == INPUT:
            return -1
        seen = self.seen.get(self.holders[name])
        return seen.group if seen else 1 << 60

    def _grid_behind(self, splits: list[Split], name: str, layout: Tokens) -> tuple[Layout, str]:
        """The grid of a site's tokens where sites before it cut the grid, and why it is unknown."""
        plain = grid = (layout.height, layout.width)
        for split in splits:
            size = sides(self.shape(split.name), split.layout)
            if split.views.crop_size(*size) == size:
                continue
            if size != plain:
                return layout, f"its tokens behind the views at {split.name!r} are of a grid that is not known."
            grid = split.views.crop_size(*grid)
        return layout._replace(height=grid[0], width=grid[1]), ""

    def why_not_swapped(self, names: list[str]) -> str:
        """Why the model cannot do with subclasses of its classes, which the split and the vote need, or nothing."""
        plain = self.operations()  # what the model caches for a size of map was made in the trace
        if self.operations([name for name in names if name != INPUT]) == plain:
            return ""
        return (
            "the model does not run the same operations once a module's class is a subclass of its own, which carries "
            "the split or the vote: somewhere it asks for the very class, as in `type(module) is Conv2d`, where "
            "isinstance would do."
        )

    def _find_layout(self, name: str) -> tuple[Layout, str]:
        """Where the channels are: height and width can shrink, channels cannot. The layout, or why it is unknown."""
        shape = self.shape(name)
        if len(shape) == 2 or isinstance(self.layout, Tokens):
            return self._tokens(name)
        if name == INPUT:
            return self._image_layout(shape)
        axes = self.axes(name)
        if axes is not None:
            return self._grown_layout(shape, axes)
        said = stated_layout(self.model)
        if self.layout is None and said and self._shrinks(name, said):
            return said, ""
        able = [layout for layout in LAYOUTS if self._shrinks(name, layout)]
        if self.layout and (self.layout in able or not able):
            return self.layout, ""
        if len(able) == 2:  # a side of 1 cannot shrink, so it proves nothing
            able = [layout for layout in able if 1 not in sides(shape, layout)] or able
        if self.layout:
            return (
                self.layout,
                f'its map of shape {shape} shrinks along the axes of "{able[0]}", not of "{self.layout}".',
            )
        if len(able) == 1:
            return able[0], ""
        if not able and self._crops(name):
            return "NCHW", self._trial([Split(name, self.views, "NCHW")])
        return "NCHW", (
            f"its map of shape {shape} can shrink along {'all' if able else 'none'} of its axes, so which of them are "
            f'height and width cannot be told: pass layout="NCHW" if they are the last two, layout="NHWC" if the '
            f"channels come last."
        )

    def _image_layout(self, shape: tuple[int, ...]) -> tuple[Layout, str]:
        """Where the channels of the images are."""
        found = self.image_layout() or ("NCHW" if self.example.channels_first else self.layout)
        if found is None or isinstance(found, Tokens):
            return "NCHW", (
                f'it cannot be told which axis of images of shape {shape} holds the channels: pass layout="NCHW" or '
                f'layout="NHWC".'
            )
        if self.layout not in (None, found):
            return found, f'the images of shape {shape} have their height and width where "{found}" has them.'
        return found, ""

    def _grown_layout(
        self, shape: tuple[int, ...], axes: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[Layout, str]:
        """The layout of a map that grows with the image, or why it is none."""
        found = AXES.get(axes)
        if found is None:
            height, width = (" and ".join(str(i + 1) for i in grown) for grown in axes)
            return self.layout or "NCHW", (
                f"its shape is {shape}, whose axis {height} grows with the height of the images and axis {width} with "
                f"their width: that is no map, (N, C, H, W) or (N, H, W, C)."
            )
        if self.layout not in (None, found):
            return found, f'its map of shape {shape} has its height and width where "{found}" has them, not as stated.'
        return found, ""

    def _tokens(self, name: str) -> tuple[Layout, str]:
        """The grid of a site's tokens, which only the model or the user can tell."""
        shape = self.shape(name)
        found = self.layout
        if found is None and len(shape) == 2:
            found = self._stated_tokens(name, shape[0])
        if isinstance(found, Tokens) and len(shape) == 2 and shape[0] == token_count(found):
            return found, ""
        if found is not None:
            return found, f"its shape is {shape}, not that of layout={found!r}."
        return "NCHW", (
            f"it returns {shape[0]} tokens of {shape[1]} channels, and the model does not say of which grid: pass "
            f"layout=cropvote.Tokens(height, width, prefix) if they are the prefix tokens and then the grid, row by "
            f"row."
        )

    def _stated_tokens(self, name: str, length: int) -> Tokens | None:
        """The grid of patches that was seen in the innermost transformer around the site that tells its prefix."""
        part = name
        while part:
            part = part.rpartition(".")[0]
            stated = stated_tokens(self.model.get_submodule(part))
            if stated is None:
                continue
            root = f"{part}.{stated[1]}".lstrip(".")
            made = [n for n, m in self.modules.items() if isinstance(m, nn.Conv2d) and f"{n}.".startswith(f"{root}.")]
            made = [n for n in made if self.calls.get(self.modules[n]) == 1 and not self._moved(n, name, part)]
            grids = {self.shape(n)[1:] for n in made}
            fitting = [Tokens(h, w, length - h * w) for h, w in grids if length - h * w in (0, stated[0])]
            return fitting[0] if len(fitting) == 1 else None
        return None

    def _moved(self, first: str, last: str, part: str) -> bool:
        """Whether tokens may have changed places between two modules; in its forward, ``part`` knows what it joins."""
        moves = self.moves[self.seen[self.modules[first]].moves : self.seen[self.holders[last]].moves]
        return any(
            move.operation != "cat" or not any(f"{name}.".startswith(f"{part}.") for name in ("", *move.inside))
            for move in moves
        )

    def _crops(self, name: str) -> bool:
        """Whether the views are smaller than the map, in both axes, where the channels come first."""
        size = sides(self.shape(name), "NCHW")
        return all(crop < side for crop, side in zip(self.views.crop_size(*size), size, strict=True))

    def _shrinks(self, name: str, layout: Layout) -> bool:
        """Whether the network behind the site takes a map of less height and width, in that layout."""
        size = sides(self.shape(name), layout)
        for smaller in [(side + 1) // 2 for side in size], [side - 1 for side in size]:
            if 0 in smaller:
                continue
            scale = (Fraction(smaller[0], size[0]), Fraction(smaller[1], size[1]))
            if not self._trial([Split(name, Views([(0, 0)], scale=scale), layout)]):
                return True
        try:
            return layout == "NCHW" and self._crops(name) and not self._trial([Split(name, self.views, layout)])
        except ViewsError:
            return False
