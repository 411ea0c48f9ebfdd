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

    Fields:
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
PREFIXES = ("cls_token", "distillation_token", "register_tokens")
LAYOUTS: tuple[Literal["NCHW"], Literal["NHWC"]] = ("NCHW", "NHWC")
#: The layout by the axes, the batch left out, that are the height and the width.
AXES: dict[Any, Layout] = {((1,), (2,)): "NCHW", ((0,), (1,)): "NHWC"}


def check_layout(layout: object) -> None:
    """Raise OptionError unless ``layout`` is one of the two names, or sensible Tokens."""
    if isinstance(layout, Tokens):
        if not all(type(n) is int for n in layout) or layout.height < 1 or layout.width < 1 or layout.prefix < 0:
            raise OptionError(
                "CV805", f"Tokens takes a height and a width above 0 and a prefix of 0 or more, got {layout!r}."
            )
    elif layout not in LAYOUTS:
        raise OptionError("CV805", f"layout must be one of {LAYOUTS} or Tokens(height, width, prefix), got {layout!r}.")


def token_count(tokens: Tokens) -> int:
    """Return the number of tokens, with the prefix; not a property, which older compilers trip over."""
    return tokens.prefix + tokens.height * tokens.width


def sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return the (height, width) of a map, from its shape without the batch."""
    if isinstance(layout, Tokens):
        return layout[:2]
    return tuple(shape[1:]) if layout == "NCHW" else tuple(shape[:2])


def resized(shape: tuple[int, ...], layout: Layout, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape, without the batch, of the same map with another (height, width)."""
    if isinstance(layout, Tokens):
        return (layout.prefix + size[0] * size[1], shape[1])
    return (shape[0], *size) if layout == "NCHW" else (*size, shape[2])


def stated_layout(model: nn.Module) -> Layout | None:
    """Return the layout of 4-D maps that the model itself states (timm's ``output_fmt``), or None."""
    stated = getattr(model, "output_fmt", None)
    stated = getattr(stated, "value", stated)
    return stated if isinstance(stated, str) and stated in LAYOUTS else None


def stated_tokens(part: nn.Module) -> tuple[int, str] | None:
    """Return what a transformer of a known library says of its tokens, or None.

    Returns:
        The number of prefix tokens, and the name of the module inside whose convolution makes the grid of patches. In
        these libraries the prefix tokens stand first, and the grid follows row by row; elsewhere they need not.
    """
    library = type(part).__module__.partition(".")[0]
    children = dict(part.named_children())  # not getattr, which may run a property
    if library == "timm" and hasattr(children.get("patch_embed"), "grid_size"):
        prefix = getattr(part, "num_prefix_tokens", 0)
        return (prefix if type(prefix) is int else 0), "patch_embed"
    if library == "torchvision" and "conv_proj" in children and hasattr(part, "class_token"):
        return 1, "conv_proj"
    embeddings = children.get("embeddings")
    if library == "transformers" and hasattr(embeddings, "patch_embeddings"):
        named = [getattr(embeddings, name, None) for name in PREFIXES]
        return sum(x.shape[1] for x in named if isinstance(x, Tensor) and x.dim() == 3), "embeddings.patch_embeddings"
    return None
