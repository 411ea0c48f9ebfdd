"""Views: which crops of a map, of what size, and in which order."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, overload

import torch

from .errors import InputTypeError, ViewsError

__all__ = ["View", "Views", "d4", "five_crop", "grid", "hflip", "ten_crop"]

Number = int | float | Fraction

FIVE_SIXTHS = Fraction(5, 6)
#: The (h, w) of every view, and the (top, left) of each.
Geometry = tuple[tuple[int, int], tuple[tuple[int, int], ...]]
MOST_GEOMETRIES = 64
CENTRE = (Fraction(1, 2), Fraction(1, 2))
FIVE = ((0, 0), (0, 1), (1, 0), (1, 1), CENTRE)


class View(NamedTuple):
    """One view: a crop, mirrored or not.

    The map is mirrored (left-right) first, then turned, then cropped.

    Fields:
        top: the crop's vertical position, as a fraction of the free margin (0 top, 1 bottom).
        left: its horizontal position, in the same way (0 left, 1 right).
        mirror: whether the map is mirrored left-right first.
        turns: quarter turns counter-clockwise, as in :func:`torch.rot90`.

    Example:
        >>> from cropvote import ten_crop
        >>> ten_crop()[4]
        View(top=Fraction(1, 2), left=Fraction(1, 2), mirror=False, turns=0)
    """

    top: Fraction
    left: Fraction
    mirror: bool = False
    turns: int = 0


class Views(Sequence[View]):
    """An ordered set of views of one size: the order of a sample's rows everywhere in cropvote.

    A view's side is ``scale`` times the map's side, rounded half up in integer
    arithmetic; its offset is the floor of its position times the free margin.
    With a ``stride``, the free margin is then rounded to the nearest multiple of
    it, a tie to the smaller one, but to at least one stride (see :meth:`aligned`).

    Args:
        positions: one ``(vertical, horizontal)`` pair of fractions of the free margin per view,
            0 to 1, or :class:`View` objects.
        scale: the share of the map's sides that a view keeps, above 0 and at most 1; one number, or a
            ``(height, width)`` pair. A float becomes the nearest fraction with a denominator up to 1000.
        mirror: append the same crops of the mirrored map.
        stride: the free margin is a multiple of this; 1 leaves it as it is.

    Raises:
        ViewsError: no position, or a scale, position or stride out of its range or not finite.
        InputTypeError: a scale or position that is not a number.

    Example:
        >>> from cropvote import Views
        >>> thirds = Views([(0, 0.5), (1, 0.5)], scale=(2 / 3, 1), mirror=True)
        >>> len(thirds), thirds.crop_size(48, 48)
        (4, (32, 48))

    Reference:
        Five crops and their mirror images as one set: Krizhevsky, Sutskever and Hinton, "ImageNet
        classification with deep convolutional neural networks", 2012.
    """

    def __init__(
        self,
        positions: Iterable[tuple[Number, Number] | View],
        *,
        scale: Number | tuple[Number, Number] = FIVE_SIXTHS,
        mirror: bool = False,
        stride: int = 1,
    ) -> None:
        if not isinstance(positions, Iterable):
            raise InputTypeError(
                "CV201", f"positions must be (vertical, horizontal) pairs or Views, got {positions!r}."
            )
        entries = tuple(_view(position) for position in positions)
        if not entries:
            raise ViewsError("CV202", "Views needs at least one position, got none.")
        if mirror:
            if any(view.mirror for view in entries):
                raise ViewsError(
                    "CV203", "mirror=True mirrors every view, but some are mirrored already: leave mirror out."
                )
            entries += tuple(view._replace(mirror=True) for view in entries)
        pair = scale if isinstance(scale, tuple) and len(scale) == 2 else (scale, scale)
        if type(stride) is not int or stride < 1:
            raise ViewsError("CV213", f"stride must be a whole number above 0, got {stride!r}.")
        self.entries = entries
        self.stride = stride
        self._scale = (_scale(pair[0]), _scale(pair[1]))
        self._several = tuple(len({view[axis] for view in entries}) > 1 for axis in (0, 1))
        self._geometries: dict[tuple[int, int], Geometry] = {}

    @property
    def scale(self) -> tuple[Fraction, Fraction]:
        """Return the share of the map's (height, width) that a view keeps."""
        return self._scale

    def crop_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (h, w) of every view of a map of ``height`` × ``width``.

        Raises:
            ViewsError: the map is too small for these views, or not square under quarter turns.

        Example:
            >>> ten_crop().crop_size(48, 24)
            (40, 20)
        """
        if any(view.turns % 2 for view in self.entries) and height != width:
            raise ViewsError("CV204", f"quarter turns need a square map, got {height} x {width} (height x width).")
        return self._side(height, 0), self._side(width, 1)

    def offsets(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Each view's (top, left) in the map as mirrored and turned for that view.

        Raises:
            ViewsError: as :meth:`crop_size`.

        Example:
            >>> ten_crop().offsets(48, 48)[:5]
            ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))
        """
        h, w = self.crop_size(height, width)
        return tuple((_offset(view.top, height - h), _offset(view.left, width - w)) for view in self.entries)

    def geometry(self, height: int, width: int) -> Geometry:
        """Return the size of every view and the offset of each, remembered for the sizes that are asked for often."""
        if type(height) is not int or type(width) is not int or torch.compiler.is_compiling():
            return self.crop_size(height, width), self.offsets(height, width)
        found = self._geometries.get((height, width))
        if found is None:
            found = self.crop_size(height, width), self.offsets(height, width)
            if len(self._geometries) < MOST_GEOMETRIES:
                self._geometries[height, width] = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.to_dict(),)

    def distinct(self, height: int, width: int) -> int:
        """Return how many different views a map of ``height`` × ``width`` gives: on small maps some coincide.

        Raises:
            ViewsError: as :meth:`crop_size`.

        Example:
            >>> ten_crop().distinct(12, 12), ten_crop().distinct(6, 6)
            (10, 8)
        """
        places = zip(self.offsets(height, width), self.entries, strict=True)
        return len({(offset, view.mirror, view.turns % 4) for offset, view in places})

    def take(self, indices: Iterable[int]) -> Views:
        """Some of the views, in the order of ``indices``, of the same size.

        Raises:
            ViewsError: no index.

        Example:
            >>> [view.mirror for view in ten_crop().take([4, 9])]
            [False, True]
        """
        return Views([self.entries[i] for i in indices], scale=self._scale, stride=self.stride)

    def aligned(self, stride: int) -> Views:
        """Return the same views with a free margin that is a multiple of ``stride``.

        Layers with stride 2 sample every second pixel from a crop's first one. If the margin is a multiple of the
        total stride of the network behind the site, crops in the corners see the pixels on the same grid as the whole
        map does. ``inject_crop_vote(model, after, align=True)`` finds the stride.

        Raises:
            ViewsError: not a whole number above 0.

        Example:
            >>> ten_crop().crop_size(16, 16), ten_crop().aligned(2).crop_size(16, 16)
            ((13, 13), (14, 14))
            >>> ten_crop().crop_size(48, 48), ten_crop().aligned(8).crop_size(48, 48)
            ((40, 40), (40, 40))
        """
        return (
            self if all(share == 1 for share in self._scale) else Views(self.entries, scale=self._scale, stride=stride)
        )

    def _side(self, side: int, axis: int) -> int:
        share = self._scale[axis]
        crop = (share.numerator * side + share.denominator // 2) // share.denominator
        margin = side - crop
        if self.stride > 1 and margin > 0 and side > self.stride:
            margin = max(1, (2 * margin + self.stride - 1) // (2 * self.stride)) * self.stride
            crop = side - (margin if margin < side else margin - self.stride)
        name = ("height", "width")[axis]
        if crop < 1:
            raise ViewsError("CV205", f"{share} of the map's {name} of {side} leaves nothing: choose a larger scale.")
        if crop == side and self._several[axis]:
            raise ViewsError(
                "CV206",
                f"{share} of the map's {name} of {side} is {crop}, the whole side, so views at different "
                f"positions would be the same: split a larger map (an earlier site), or choose a smaller scale.",
            )
        return crop

    def to_dict(self) -> dict[str, Any]:
        """Return the views as plain lists and strings, for JSON; :meth:`from_dict` reads them.

        Example:
            >>> hflip().to_dict()
            {'scale': ['1', '1'], 'stride': 1, 'views': [['1/2', '1/2', False, 0], ['1/2', '1/2', True, 0]]}
        """
        views = [[str(view.top), str(view.left), view.mirror, view.turns] for view in self.entries]
        return {"scale": [str(share) for share in self._scale], "stride": self.stride, "views": views}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Views:
        """Return the views that :meth:`to_dict` wrote.

        Raises:
            InputTypeError: something else.
            ViewsError: a scale or a position out of its range.

        Example:
            >>> Views.from_dict(hflip().to_dict())
            hflip()
        """
        message = f"stored views are a dict of scale, stride and views, as Views.to_dict writes them, got {data!r}."
        if not isinstance(data, Mapping) or set(data) != {"scale", "stride", "views"}:
            raise InputTypeError("CV212", message)
        try:
            height, width = map(_stored, _list(data["scale"]))
            entries = [
                View(_stored(top), _stored(left), mirror, turns)
                for top, left, mirror, turns in map(_list, _list(data["views"]))
            ]
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputTypeError("CV212", message) from error
        return cls(entries, scale=(height, width), stride=data["stride"])

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[View, ...]: ...
    def __getitem__(self, index: int | slice) -> View | tuple[View, ...]:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[View]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Views) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.entries, self._scale, self.stride

    def __repr__(self) -> str:
        height, width = map(_number, self._scale)
        scale = "" if self._scale == (FIVE_SIXTHS,) * 2 else height if height == width else f"({height}, {width})"
        named = {"hflip()": hflip(), "d4()": d4(), f"ten_crop({scale})": ten_crop(self._scale)}
        for call, views in {**named, f"five_crop({scale})": five_crop(self._scale)}.items():
            if self == views.aligned(self.stride):
                return call + (f".aligned({self.stride})" if self.stride > 1 else "")
        half = len(self) // 2
        mirror = self.entries == (*self.entries[:half], *(v._replace(mirror=True) for v in self.entries[:half]))
        positions = ", ".join(map(_position, self.entries[:half] if mirror else self.entries))
        options = {"scale": scale, "mirror": mirror and "True", "stride": self.stride > 1 and self.stride}
        return f"Views([{positions}]{''.join(f', {name}={value}' for name, value in options.items() if value)})"


def _restore(data: dict[str, Any]) -> Views:
    """Return pickled views. ``torch.load(weights_only=True)`` may call this."""
    return Views.from_dict(data)


torch.serialization.add_safe_globals([_restore])


def _position(view: View) -> str:
    """Return a view as Python reads it."""
    top, left = map(_number, view[:2])
    return f"View({top}, {left}, {view.mirror}, {view.turns})" if view.mirror or view.turns else f"({top}, {left})"


def _number(value: Fraction) -> str:
    """Return a fraction as Python reads it; Views turns the float 2/3 into Fraction(2, 3) again."""
    return str(value) if value.denominator <= 1000 else repr(value)


def _fraction(value: Number, what: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputTypeError("CV207", f"{what} must be a number (int, float or Fraction), got {value!r}.")
    if isinstance(value, numbers.Rational):
        return Fraction(value)
    if not math.isfinite(value):
        raise ViewsError("CV207", f"{what} must be finite, got {value}.")
    return Fraction(float(value)).limit_denominator(1000)


def _stored(value: Any) -> Fraction:
    """Return a stored number; a float is rounded as the constructor rounds it."""
    return Fraction(value) if isinstance(value, str) else _fraction(value, "a stored number")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InputTypeError("CV212", f"stored views hold lists, got {value!r}.")
    return list(value)


def _scale(value: Number | tuple[Number, Number]) -> Fraction:
    share = _fraction(value, "scale")  # type: ignore[arg-type]  # a longer tuple is refused there
    if not 0 < share <= 1:
        raise ViewsError(
            "CV208",
            f"scale must be above 0 and at most 1, got {value}: it is the share of the map's side that a view "
            f"keeps, 5/6 by default.",
        )
    return share


def _view(position: tuple[Number, Number] | View) -> View:
    if not isinstance(position, tuple) or (len(position) != 2 and not isinstance(position, View)):
        raise InputTypeError(
            "CV201", f"a position is a (vertical, horizontal) pair of numbers or a View, got {position!r}."
        )
    if isinstance(position, View) and (type(position.turns) is not int or type(position.mirror) is not bool):
        raise InputTypeError(
            "CV201", f"a View's turns must be a whole number and its mirror True or False, got {position!r}."
        )
    top, left = (_fraction(value, "position") for value in position[:2])
    if not (0 <= top <= 1 and 0 <= left <= 1):
        raise ViewsError(
            "CV201",
            f"a position is a fraction of the free margin, 0 (top or left) to 1 (bottom or right), got {position[:2]}.",
        )
    return position._replace(top=top, left=left) if isinstance(position, View) else View(top, left)


def _offset(position: Fraction, margin: int) -> int:
    return (position.numerator * margin) // position.denominator


def ten_crop(scale: Number | tuple[Number, Number] = FIVE_SIXTHS) -> Views:
    """Four corners and the centre, then the same five crops of the mirrored map (torchvision's TenCrop order).

    Args:
        scale: the share of the map's sides that a view keeps.

    Returns:
        Ten views: top-left, top-right, bottom-left, bottom-right, centre; then the same of the mirrored map.

    Raises:
        ViewsError: a scale outside (0, 1].

    Example:
        >>> from cropvote import ten_crop
        >>> len(ten_crop())
        10

    Reference:
        Gómez-Sirvent et al., "Facial Expression Recognition in the Wild for Low-Resolution Images Using
        Voting Residual Network", Electronics 2023, 12(18), 3837: these ten views, 5/6 of the side, inside the network.
    """
    return Views(FIVE, scale=scale, mirror=True)


def five_crop(scale: Number | tuple[Number, Number] = FIVE_SIXTHS) -> Views:
    """Four corners and the centre, without mirror images.

    Args:
        scale: the share of the map's sides that a view keeps.

    Returns:
        Five views: top-left, top-right, bottom-left, bottom-right, centre.

    Raises:
        ViewsError: a scale outside (0, 1].

    Example:
        >>> from cropvote import five_crop, ten_crop
        >>> list(five_crop()) == list(ten_crop())[:5]
        True
    """
    return Views(FIVE, scale=scale)


def hflip() -> Views:
    """Return the whole map and its mirror image.

    Returns:
        Two views.

    Example:
        >>> from cropvote import hflip
        >>> hflip().crop_size(7, 7)
        (7, 7)
    """
    return Views([CENTRE], scale=1, mirror=True)


def d4() -> Views:
    """Return the whole map in its eight orientations: four quarter turns, then four of the mirrored map.

    For pictures without an up, such as those from microscopes and satellites. The map must be square.

    Returns:
        Eight views.

    Example:
        >>> from cropvote.views import d4
        >>> [view.turns for view in d4()]
        [0, 1, 2, 3, 0, 1, 2, 3]

    Reference:
        The dihedral group of the square, as in the D4 test-time augmentation of ttach.
    """
    return Views([View(*CENTRE, turns=turns) for turns in range(4)], scale=1, mirror=True)


def grid(
    rows: int, columns: int, *, scale: Number | tuple[Number, Number] = FIVE_SIXTHS, mirror: bool = False
) -> Views:
    """Return evenly spread crops, row by row from the top left.

    Args:
        rows: crops from top to bottom; a single one is centred.
        columns: crops from left to right; a single one is centred.
        scale: the share of the map's sides that a view keeps.
        mirror: append the same crops of the mirrored map.

    Returns:
        rows · columns views, twice as many with ``mirror``.

    Raises:
        ViewsError: fewer than one row or column, or a scale outside (0, 1].
        InputTypeError: rows or columns that are not whole numbers.

    Example:
        >>> from cropvote.views import grid
        >>> grid(1, 3, scale=(1, 0.5)).offsets(8, 8)
        ((0, 0), (0, 2), (0, 4))
    """
    for name, count in (("rows", rows), ("columns", columns)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise InputTypeError("CV209", f"{name} must be a whole number, got {count!r}.")
        if count < 1:
            raise ViewsError("CV209", f"{name} must be at least 1, got {count}.")
    spread = [[Fraction(i, n - 1) for i in range(n)] if n > 1 else [CENTRE[0]] for n in (rows, columns)]
    return Views([(top, left) for top in spread[0] for left in spread[1]], scale=scale, mirror=mirror)
