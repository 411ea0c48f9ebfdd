"""The split: a batch of maps becomes a batch of views, and where a sample's rows stand."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from .errors import InputTypeError, OptionError, RowsError, ViewsError
from .views import Views

__all__ = ["split_views"]

Layout = Literal["NCHW", "NHWC"]


def join_views(x: Tensor) -> Tensor:
    """(N, V, ...) -> (N*V, ...): with :func:`part_views`, the one place that says a sample's views are adjacent."""
    return rearrange(x, "n v ... -> (n v) ...")


def part_views(x: Tensor, count: int) -> Tensor:
    """(N*V, ...) -> (N, V, ...), the inverse of :func:`join_views`."""
    if x.shape[0] % count:
        raise RowsError(
            f"{x.shape[0]} rows cannot be parted into {count} views each: the rows must be samples times views, "
            f"a sample's views adjacent."
        )
    return rearrange(x, "(n v) ... -> n v ...", v=count)


def split_views(x: Tensor, views: Views, *, layout: Layout = "NCHW") -> Tensor:
    """Cut every map of a batch into its views, a sample's views adjacent.

    The output is new memory, of the same dtype and device; a channels_last map gives channels_last views.
    The gradient of a map is the sum of its views' gradients, each at its place.

    Args:
        x: the maps, any dtype.
        views: the views and their order.
        layout: where the channels are: ``"NCHW"`` or ``"NHWC"``. (A channels_last *memory format* is still "NCHW".)

    Shape:
        n c H W -> (n v) c h w, or n H W c -> (n v) h w c; h and w from :meth:`Views.crop_size`.

    Returns:
        The views, n · len(views) of them.

    Raises:
        InputTypeError: ``x`` is no tensor, or ``views`` no :class:`Views`.
        ViewsError: ``x`` is not 4-D, or too small for these views.
        OptionError: an unknown layout.

    Example:
        >>> import torch
        >>> from cropvote import split_views, ten_crop
        >>> split_views(torch.zeros(2, 64, 48, 48), ten_crop()).shape
        torch.Size([20, 64, 40, 40])

    Reference:
        Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, section 3.
    """
    if not isinstance(x, Tensor):
        raise InputTypeError(f"split_views takes a tensor (N, C, H, W), got {type(x).__name__}.")
    if not isinstance(views, Views):
        raise InputTypeError(f"views must be a Views, such as ten_crop(), got {views!r}.")
    if layout not in get_args(Layout):
        raise OptionError(f"layout must be one of {get_args(Layout)}, got {layout!r}.")
    if x.dim() != 4:
        raise ViewsError(f"split_views takes a 4-D map, (N, C, H, W) or (N, H, W, C), got shape {tuple(x.shape)}.")
    # The work is done on axes in memory order, so that a channels_last map stays one. (Strides, since vmap knows no
    # is_contiguous(channels_last).)
    permute = layout == "NCHW" and x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1
    if permute:
        x = x.permute(0, 2, 3, 1)
    first = 1 if permute or layout == "NHWC" else 2
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y = _Split.apply(x, views, first)
    else:
        y = _split(x, views, first)
    return y.permute(0, 3, 1, 2) if permute else y


def _split(x: Tensor, views: Views, first: int) -> Tensor:
    """Split with the height at axis ``first`` and the width behind it; plain operations that every tracer knows."""
    h, w = views.crop_size(x.shape[first], x.shape[first + 1])
    oriented: dict[tuple[bool, int], Tensor] = {}
    crops = []
    for view, (top, left) in zip(views, views.offsets(x.shape[first], x.shape[first + 1]), strict=True):
        key = (view.mirror, view.turns % 4)
        if key not in oriented:
            oriented[key] = _orient(x, *key, first)
        crops.append(oriented[key].narrow(first, top, h).narrow(first + 1, left, w))
    return join_views(torch.stack(crops, dim=1))


def _merge(y: Tensor, views: Views, first: int, height: int, width: int) -> Tensor:
    """The adjoint of ``_split``: every view added at its place, into one map per orientation."""
    y = part_views(y, len(views))
    h, w = views.crop_size(height, width)
    offsets = views.offsets(height, width)
    orientations = sorted({(view.mirror, view.turns % 4) for view in views}, reverse=True)
    shape = list(y.shape[:1] + y.shape[2:])
    shape[first], shape[first + 1] = height, width
    total: Tensor | None = None
    for key in orientations:  # the untouched orientation comes last: views add straight into the total
        upright = key == (False, 0)
        into = total if upright and total is not None else y.new_zeros(shape)
        for i, (view, (top, left)) in enumerate(zip(views, offsets, strict=True)):
            if (view.mirror, view.turns % 4) == key:
                into.narrow(first, top, h).narrow(first + 1, left, w).add_(y[:, i])
        if not upright:
            into = _orient_back(into, *key, first)
        total = into if total is None or upright else total.add_(into)
    assert total is not None  # Views are never empty
    return total


def _orient(x: Tensor, mirror: bool, turns: int, first: int) -> Tensor:
    x = x.flip(first + 1) if mirror else x
    return torch.rot90(x, turns, (first, first + 1)) if turns else x


def _orient_back(x: Tensor, mirror: bool, turns: int, first: int) -> Tensor:
    x = torch.rot90(x, -turns, (first, first + 1)) if turns else x
    return x.flip(first + 1) if mirror else x


class _Split(torch.autograd.Function):
    """``_split`` whose backward adds into one buffer, where autograd would build a zero map per view."""

    @staticmethod
    def forward(x: Tensor, views: Views, first: int) -> Tensor:
        return _split(x, views, first)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, ctx.views, ctx.first = inputs
        ctx.size = (x.shape[ctx.first], x.shape[ctx.first + 1])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Merge.apply(grad, ctx.views, ctx.first, *ctx.size), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        return _Split.apply(tangent, ctx.views, ctx.first)

    @staticmethod
    def vmap(info, in_dims, x, views, first):  # type: ignore[no-untyped-def]
        return _fold_vmap(_Split, info.batch_size, in_dims[0], x, views, first)


class _Merge(torch.autograd.Function):
    """The adjoint of :class:`_Split`, and it of this one."""

    @staticmethod
    def forward(y: Tensor, views: Views, first: int, height: int, width: int) -> Tensor:
        return _merge(y, views, first, height, width)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, ctx.views, ctx.first, *ctx.size = inputs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Split.apply(grad, ctx.views, ctx.first), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        return _Merge.apply(tangent, ctx.views, ctx.first, *ctx.size)

    @staticmethod
    def vmap(info, in_dims, y, *args):  # type: ignore[no-untyped-def]
        return _fold_vmap(_Merge, info.batch_size, in_dims[0], y, *args)


def _fold_vmap(function, size, in_dim, x, *args):  # type: ignore[no-untyped-def]
    """Samples are independent: a vmapped axis folds into the batch."""
    x = x.movedim(in_dim, 0)
    return function.apply(x.flatten(0, 1), *args).unflatten(0, (size, -1)), 0
