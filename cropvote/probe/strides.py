"""Find the total stride of the network behind a site: how many pixels of its map make one of the coarsest map."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..images import INPUT
from .layout import grow
from .trace import Trace

__all__: list[str] = []


def tail_stride(trace: Trace, site: str) -> int:
    """Return the total stride behind a site, 1 if nothing shows one.

    It is read from the sides of the maps, for images of twice the size: behind a map of 28 come 14 and 7, so the stride
    is 2 times 2. Maps that do not grow with the images (pooled to a fixed size) do not count.
    """
    return max(_stride_along(trace, site, axis) for axis in (2, 3))


def _stride_along(trace: Trace, site: str, image_axis: int) -> int:
    sides = _sides_behind(trace, site, image_axis)
    strides = {next(sides, 0): 1}
    for side in sides:
        larger = [known for known in strides if known >= side]
        if larger:  # else it was made larger again
            nearest = min(larger)
            strides.setdefault(side, strides[nearest] * round(nearest / side))
    return max(strides.values())


def _sides_behind(trace: Trace, site: str, image_axis: int) -> Iterator[int]:
    """Yield the side of the site's map, then of those behind it that grow, for images of twice the size on an axis."""
    grown = grow(trace, image_axis)
    if site == INPUT:
        yield 2 * trace.shape(INPUT)[image_axis - 1]
    for module, record in trace.returns.items():
        is_site = site != INPUT and module is trace.carriers[site]
        larger = grown.get(module, ())
        if isinstance(record.output, Tensor) and (is_site or record.group > trace.turn(site)):
            shape = tuple(record.output.shape[1:])
            sides = [n for m, n in zip(shape, larger, strict=False) if n > m] if len(larger) == len(shape) == 3 else []
            if len(sides) == 1:
                yield sides[0]
            elif is_site:
                return
