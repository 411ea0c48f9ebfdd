"""Find where the height and the width of a site's map are: stated, seen to grow with the images, or by trial."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..errors import Reason, ViewsError
from ..images import INPUT, map_first_tensor
from ..layouts import AXES, LAYOUTS, Layout, Tokens, sides, stated_layout, stated_tokens, token_count
from ..views import Views
from .taint import Taint
from .trace import Trace, fake_arguments
from .trial import Split, try_padded, try_splits

__all__: list[str] = []

Shape = tuple[int, ...]


def find_layout(
    trace: Trace, site: str, views: Views, stated: Layout | None, explain: bool = False
) -> tuple[Layout, Reason | None]:
    """Return the layout of a site's map, and why it is unknown or not the one stated (None otherwise).

    Height and width can shrink, channels cannot. For ``explain`` see :func:`try_splits`.
    """
    shape = trace.shape(site)
    if len(shape) == 2 or isinstance(stated, Tokens):
        return _find_tokens(trace, site, stated)
    if site == INPUT:
        return _find_image_layout(trace, stated)
    axes = _growing_axes(trace, site)
    if axes is not None:
        return _layout_of_axes(shape, axes, stated)
    said = stated_layout(trace.model)
    if stated is None and said and (_fit(trace, site, views, said) or _can_shrink(trace, site, views, said)):
        return said, None
    able = [layout for layout in LAYOUTS if _can_shrink(trace, site, views, layout)]
    if stated and (stated in able or not able):
        return stated, None
    if len(able) == 2:  # a side of 1 cannot shrink, so it proves nothing
        able = [layout for layout in able if 1 not in sides(shape, layout)] or able
    if stated:
        return stated, Reason(
            "CV113", f'its map of shape {shape} shrinks along the axes of "{able[0]}", not of "{stated}".'
        )
    if len(able) == 1:
        return able[0], None
    if not able and _are_smaller(views, shape, "NCHW"):
        return "NCHW", try_splits(trace, [Split(site, views, "NCHW")], explain)
    return "NCHW", Reason(
        "CV114",
        f"its map of shape {shape} can shrink along {'all' if able else 'none'} of its axes, so which of them are "
        f'height and width cannot be told: pass layout="NCHW" if they are the last two, layout="NHWC" if the '
        f"channels come last.",
    )


def _find_image_layout(trace: Trace, stated: Layout | None) -> tuple[Layout, Reason | None]:
    shape = trace.shape(INPUT)
    layout = _seen_image_layout(trace) or stated or ("NCHW" if trace.example.channels_first else None)
    if layout is None or isinstance(layout, Tokens):
        return "NCHW", Reason(
            "CV114",
            f'it cannot be told which axis of images of shape {shape} holds the channels: pass layout="NCHW" or '
            f'layout="NHWC".',
        )
    if stated not in (None, layout):
        return layout, Reason(
            "CV113", f'the images of shape {shape} have their height and width where "{layout}" has them.'
        )
    return layout, None


def _seen_image_layout(trace: Trace) -> Layout | None:
    """Return where the channels of the images are, if it shows.

    The model takes images of another height or width further than images of other channels, which its first
    convolution refuses; and only one end of the shape is as long as that convolution's channels. Channels that come
    last must show in both ways, if there is a convolution: a network of a fixed width looks the same in the first.
    """
    reached = [len(grow(trace, axis)) for axis in (1, 2, 3)]
    axes = tuple(i for i, count in enumerate(reached) if count > min(reached))
    by_growth = AXES.get((axes[:1], axes[1:])) if len(axes) == 2 else None
    first = next((module for module in trace.calls if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return by_growth
    ends = [trace.shape(INPUT)[i] == first.in_channels for i in (0, 2)]
    by_channels = LAYOUTS[ends.index(True)] if ends.count(True) == 1 else None
    if by_growth is None or by_growth == by_channels:
        return by_channels
    return "NCHW" if by_growth == "NCHW" and by_channels is None else None


def _layout_of_axes(shape: Shape, axes: tuple[Shape, Shape], stated: Layout | None) -> tuple[Layout, Reason | None]:
    """Return the layout of a map that grows with the images."""
    layout = AXES.get(axes)
    if layout is None:
        height, width = (" and ".join(str(i + 1) for i in grown) for grown in axes)
        return stated or "NCHW", Reason(
            "CV115",
            f"its shape is {shape}, whose axis {height} grows with the height of the images and axis {width} with "
            f"their width: that is not a map, (N, C, H, W) or (N, H, W, C).",
        )
    if stated not in (None, layout):
        return layout, Reason(
            "CV113", f'its map of shape {shape} has its height and width where "{layout}" has them, not "{stated}".'
        )
    return layout, None


def _growing_axes(trace: Trace, site: str) -> tuple[Shape, Shape] | None:
    """Return the axes of a module's output that grow with the images' height, and with their width, if both show."""
    shape, axes = trace.shape(site), []
    for image_axis in (1, 2) if _seen_image_layout(trace) == "NHWC" else (2, 3):
        grown = grow(trace, image_axis).get(trace.carriers[site], ())
        axes.append(tuple(i for i, (m, n) in enumerate(zip(shape, grown, strict=False)) if m != n))
        if len(grown) != len(shape) or not axes[-1]:
            return None
    return axes[0], axes[1]


def map_size(trace: Trace, site: str) -> Shape:
    """Return the sides of a module's map, as far as they show without a trial; of tokens, their number."""
    shape = trace.shape(site)
    if len(shape) == 2:
        return shape[:1]
    return sides(shape, AXES.get(_growing_axes(trace, site)) or stated_layout(trace.model) or "NCHW")


def grow(trace: Trace, axis: int) -> dict[nn.Module, Shape]:
    """Return what modules give for images of twice the length along an axis, as far as the model takes them."""
    if ("grown", axis) in trace.memo:
        return trace.memo["grown", axis]
    shapes: dict[nn.Module, Shape] = {}

    def record(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[module] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(record) for module in dict.fromkeys(trace.carriers.values())]
    try:
        arguments = fake_arguments(trace.example, Taint())
        args, kwargs = map_first_tensor(lambda x: torch.cat([x, x], axis), *arguments)
        with suppress(Exception):  # the network behind some module is made for one size: those before it were seen
            trace.model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    trace.memo["grown", axis] = shapes
    return shapes


def _are_smaller(views: Views, shape: Shape, layout: Layout) -> bool:
    """Return whether the views are smaller than a map in both axes."""
    size = sides(shape, layout)
    return all(crop < side for crop, side in zip(views.crop_size(*size), size, strict=True))


def _fit(trace: Trace, site: str, views: Views, layout: Layout) -> bool:
    """Return whether the views are smaller than a site's map, and the network behind the site takes them."""
    with suppress(ViewsError):
        smaller = _are_smaller(views, trace.shape(site), layout)
        return smaller and not try_padded(trace, [Split(site, views, layout)])
    return False


def _can_shrink(trace: Trace, site: str, views: Views, layout: Layout) -> bool:
    """Return whether the network behind the site takes a map of less height and width, in that layout."""
    shape = trace.shape(site)
    size = sides(shape, layout)
    for smaller in [(side + 1) // 2 for side in size], [side - 1 for side in size]:
        if 0 in smaller:
            continue
        scale = (Fraction(smaller[0], size[0]), Fraction(smaller[1], size[1]))
        if not try_splits(trace, [Split(site, Views([(0, 0)], scale=scale), layout)]):
            return True
    return layout == "NCHW" and _fit(trace, site, views, layout)


def _find_tokens(trace: Trace, site: str, stated: Layout | None) -> tuple[Layout, Reason | None]:
    """Return the grid of a site's tokens, which only the model or the user knows."""
    shape = trace.shape(site)
    layout = _known_tokens(trace, site, shape[0]) if stated is None and len(shape) == 2 else stated
    if isinstance(layout, Tokens) and len(shape) == 2 and shape[0] == token_count(layout):
        return layout, None
    if layout is not None:
        return layout, Reason("CV113", f"its shape is {shape}, not that of layout={layout!r}.")
    return "NCHW", Reason(
        "CV116",
        f"it returns {shape[0]} tokens of {shape[1]} channels, and the model does not say of which grid: pass "
        f"layout=cropvote.Tokens(height, width, prefix) if they are the prefix tokens and then the grid, row by "
        f"row.",
    )


def _known_tokens(trace: Trace, site: str, length: int) -> Tokens | None:
    """Return the grid of patches seen in the innermost transformer around the site whose prefix is known."""
    part = site
    while part:
        part = part.rpartition(".")[0]
        stated = stated_tokens(trace.model.get_submodule(part))
        if stated is None:
            continue
        prefix, root = stated[0], f"{part}.{stated[1]}".lstrip(".")
        grids = {
            trace.shape(name)[1:]
            for name, module in trace.modules.items()
            if isinstance(module, nn.Conv2d)
            and f"{name}.".startswith(f"{root}.")
            and trace.calls.get(module) == 1
            and not _were_moved(trace, name, site, part)
        }
        fitting = [Tokens(h, w, length - h * w) for h, w in grids if length - h * w in (0, prefix)]
        return fitting[0] if len(fitting) == 1 else None
    return None


def _were_moved(trace: Trace, first: str, last: str, part: str) -> bool:
    """Return whether tokens may have changed their order between two modules.

    What ``part`` joins in its own forward it knows: the prefix tokens.
    """
    start = trace.returns[trace.modules[first]].n_moves
    moves = trace.moves[start : trace.returns[trace.carriers[last]].n_moves]
    return any(
        move.operation != "cat" or not any(f"{name}.".startswith(f"{part}.") for name in ("", *move.inside))
        for move in moves
    )
