"""Where the height and the width of a map are in a tensor, and what a model says of it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from .errors import OptionError

__all__ = ["Tokens"]


class Tokens(NamedTuple):
    """The layout of a transformer's tokens: (N, prefix + height * width, C), the grid row by row.

    The views are cut from the grid, whose columns a mirrored view reverses; the prefix tokens (class, distillation,
    registers) stand first and are kept whole in every view.

    Args:
        height: the grid's rows.
        width: the grid's columns.
        prefix: the number of tokens before the grid.

    Example:
        >>> import torch
        >>> from cropvote import Tokens, split_views, ten_crop
        >>> split_views(torch.zeros(2, 197, 64), ten_crop(), layout=Tokens(14, 14, prefix=1)).shape
        torch.Size([20, 145, 64])
    """

    height: int
    width: int
    prefix: int = 0


Layout = Literal["NCHW", "NHWC"] | Tokens
PREFIXES = ("class_token", "cls_token", "distillation_token", "register_tokens")
LAYOUTS: tuple[Literal["NCHW"], Literal["NHWC"]] = ("NCHW", "NHWC")


def check_layout(layout: object) -> None:
    """Raise OptionError unless ``layout`` is one of the two names, or sensible Tokens."""
    if isinstance(layout, Tokens):
        if not all(type(n) is int for n in layout) or layout.height < 1 or layout.width < 1 or layout.prefix < 0:
            raise OptionError(f"Tokens takes a height and a width above 0 and a prefix of 0 or more, got {layout!r}.")
    elif layout not in LAYOUTS:
        raise OptionError(f"layout must be one of {LAYOUTS} or Tokens(height, width, prefix), got {layout!r}.")


def sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The (height, width) of a map, from its shape without the batch."""
    if isinstance(layout, Tokens):
        return layout[:2]
    return tuple(shape[1:]) if layout == "NCHW" else tuple(shape[:2])


def resized(shape: tuple[int, ...], layout: Layout, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape, without the batch, of the same map with another (height, width)."""
    if isinstance(layout, Tokens):
        return (layout.prefix + size[0] * size[1], shape[1])
    return (shape[0], *size) if layout == "NCHW" else (*size, shape[2])


def stated_layout(model: nn.Module) -> Layout | None:
    """Where the channels of 4-D maps are, as the model itself says it (timm's ``output_fmt``), or None."""
    stated = getattr(model, "output_fmt", None)
    stated = getattr(stated, "value", stated)
    return stated if isinstance(stated, str) and stated in LAYOUTS else None


def stated_tokens(model: nn.Module, site: str, length: int, image: tuple[int, ...]) -> Tokens | None:
    """The tokens' grid, as the innermost part of the model around the site says it, or None.

    timm's transformers have a ``patch_embed`` that knows its grid, and ``num_prefix_tokens``; torchvision's a
    ``patch_size`` and a ``class_token``; Hugging Face's ``embeddings`` hold the patches' and the prefix tokens. A grid
    that does not give the length found is no answer.
    """
    while site:
        site = site.rpartition(".")[0]
        part = model.get_submodule(site)
        grid, prefix = _grid(part, image)
        if grid is not None:
            extra = length - grid[0] * grid[1]
            return Tokens(*grid, prefix=extra) if extra in (0, prefix) else None
    return None


def _grid(part: nn.Module, image: tuple[int, ...]) -> tuple[tuple[int, int] | None, int]:
    """The grid that a part of a model states for such an image, if any, and its number of prefix tokens."""
    embed = getattr(part, "patch_embed", None)
    if hasattr(embed, "grid_size"):  # timm
        dynamic = getattr(embed, "dynamic_feat_size", None)
        grid = dynamic(image[-2:]) if callable(dynamic) else embed.grid_size  # type: ignore[union-attr]
        prefix = getattr(part, "num_prefix_tokens", 0)
        return _ints(grid), prefix if type(prefix) is int else 0
    holder: Any = getattr(part, "embeddings", part)  # Hugging Face's, or torchvision's
    patches = getattr(holder, "patch_embeddings", holder)
    patch = _ints(getattr(patches, "patch_size", None))
    named = [getattr(holder, name, None) for name in PREFIXES]
    prefix = sum(tokens.shape[1] for tokens in named if isinstance(tokens, Tensor) and tokens.dim() == 3)
    if patch is None or not prefix:
        return None, 0
    return (image[-2] // patch[0], image[-1] // patch[1]), prefix


def _ints(value: Any) -> tuple[int, int] | None:
    """A (height, width) pair, from a pair or from one number."""
    pair = (value, value) if type(value) is int else tuple(value) if isinstance(value, (tuple, list)) else ()
    return pair if len(pair) == 2 and all(type(n) is int and n > 0 for n in pair) else None
