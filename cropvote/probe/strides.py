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

    It is read from how much the maps grow with images of twice the size: if a map grows by 28, and those behind it by
    14 and by 7, the stride is 2 times 2; their sides alone would not do, which a kernel without padding makes smaller.
    Maps that do not grow with the images (pooled to a fixed size) do not count.
    """
    return max(_stride_along(trace, site, axis) for axis in (2, 3))


def _stride_along(trace: Trace, site: str, image_axis: int) -> int:
    growth = _growth_behind(trace, site, image_axis)
    strides = {next(growth, 0): 1}
    for pixels in growth:
        larger = [known for known in strides if known >= pixels]
        if larger:  # else it was made larger again
            nearest = min(larger)
            strides.setdefault(pixels, strides[nearest] * round(nearest / pixels))
    return max(strides.values())


def _growth_behind(trace: Trace, site: str, image_axis: int) -> Iterator[int]:
    """Yield by how much the site's map grows, then those behind it that do, for images of twice the size on an axis."""
    grown = grow(trace, image_axis)
    if site == INPUT:
        yield trace.shape(INPUT)[image_axis - 1]
    for module, record in trace.returns.items():
        is_site = site != INPUT and module is trace.carriers[site]
        larger = grown.get(module, ())
        if isinstance(record.output, Tensor) and (is_site or record.group > trace.turn(site)):
            shape = tuple(record.output.shape[1:])
            pairs = zip(shape, larger, strict=False)
            growth = [n - m for m, n in pairs if n > m] if len(larger) == len(shape) == 3 else []
            if len(growth) == 1:
                yield growth[0]
            elif is_site:
                return
