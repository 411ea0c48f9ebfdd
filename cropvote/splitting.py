"""The split: a batch of maps becomes a batch of views, and where a sample's rows stand."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch import is_recorded
from .errors import InputTypeError, RowsError, ViewsError
from .layouts import LAYOUTS, Layout, Tokens, check_layout, token_count
from .views import Views

__all__ = ["split_views"]


def flatten_views(x: Tensor) -> Tensor:
    """(N, V, ...) -> (N*V, ...). This and :func:`unflatten_views` alone know that a sample's views are adjacent."""
    return x.flatten(0, 1)


def unflatten_views(x: Tensor, count: int) -> Tensor:
    """(N*V, ...) -> (N, V, ...), the inverse of :func:`flatten_views`."""
    if x.shape[0] % count:
        raise RowsError(
            "CV304",
            f"{x.shape[0]} rows cannot be parted into {count} views each: the rows must be samples times views, "
            f"a sample's views adjacent.",
        )
    return x.unflatten(0, (x.shape[0] // count, count))


def split_views(x: Tensor, views: Views, *, layout: Layout = "NCHW") -> Tensor:
    """Cut every map of a batch into its views, a sample's views adjacent.

    The output is new memory, of the same dtype and device; a channels_last map gives channels_last views.
    The gradient of a map is the sum of its views' gradients, each at its place.

    Args:
        x: the maps, any dtype.
        views: the views and their order.
        layout: where height and width are: ``"NCHW"``, ``"NHWC"``, or :class:`Tokens` for a transformer's tokens. (A
            channels_last *memory format* is still "NCHW".)

    Shape:
        n c H W -> (n v) c h w, or n H W c -> (n v) h w c, or n (p + H W) c -> (n v) (p + h w) c; h and w from
        :meth:`Views.crop_size`.

    Returns:
        The views, n · len(views) of them.

    Raises:
        InputTypeError: ``x`` is not a tensor, or ``views`` not a :class:`Views`.
        ViewsError: ``x`` has not the layout's shape, or is too small for these views.
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
        raise InputTypeError("CV830", f"split_views takes a tensor (N, C, H, W), got {type(x).__name__}.")
    if not isinstance(views, Views):
        raise InputTypeError("CV806", f"views must be a Views, such as ten_crop(), got {views!r}.")
    if layout not in LAYOUTS:
        check_layout(layout)
    if isinstance(layout, Tokens):
        return _split_tokens(x, views, layout)
    if x.dim() != 4:
        raise ViewsError(
            "CV210", f"split_views takes a 4-D map, (N, C, H, W) or (N, H, W, C), got shape {tuple(x.shape)}."
        )
    # while operations are recorded, the graph must be the same with and without gradients
    if x.requires_grad and torch.is_grad_enabled() and not is_recorded():
        return _Split.apply(x, views, layout)
    x, first, permuted = _in_memory_order(x, layout)
    y = flatten_views(torch.stack(_crops(x, views, first), dim=1))
    return y.permute(0, 3, 1, 2) if permuted else y


def _split_tokens(x: Tensor, views: Views, tokens: Tokens) -> Tensor:
    """Return the views of the grid, each behind a copy of the prefix tokens."""
    height, width, prefix = tokens
    if x.dim() != 3 or x.shape[1] != token_count(tokens):
        raise ViewsError(
            "CV211",
            f"{tokens} stands for the shape (N, {token_count(tokens)}, C), got {tuple(x.shape)}: the grid of the "
            f"tokens is another one for this size of image.",
        )
    grid = split_views(x[:, prefix:].unflatten(1, (height, width)), views, layout="NHWC").flatten(1, 2)
    if not prefix:
        return grid
    kept = x[:, :prefix].unsqueeze(1).expand(-1, len(views), -1, -1)
    return torch.cat([flatten_views(kept), grid], dim=1)


def _in_memory_order(x: Tensor, layout: Layout) -> tuple[Tensor, int, bool]:
    """Return a map, permuted if it is channels_last, the axis of its height, and whether it was permuted."""
    if layout == "NHWC":
        return x, 1, False
    if x.stride(1) == 1 and x.stride(3) != 1:  # vmap knows no is_contiguous(channels_last)
        return x.permute(0, 2, 3, 1), 1, True
    return x, 2, False


def _crops(x: Tensor, views: Views, first: int) -> list[Tensor]:
    """Every view, as slices of the map in its few orientations; height at axis ``first``, width behind it."""
    (h, w), offsets = views.geometry(x.shape[first], x.shape[first + 1])
    oriented: dict[tuple[bool, int], Tensor] = {}
    crops: dict[tuple[bool, int, int, int], Tensor] = {}
    keys = [(view.mirror, view.turns % 4, *offset) for view, offset in zip(views.entries, offsets, strict=True)]
    for key in keys:
        if key not in crops:
            mirror, turns, top, left = key
            if (mirror, turns) not in oriented:
                oriented[mirror, turns] = _orient(x, mirror, turns, first)
            whole, rows, columns = oriented[mirror, turns], slice(top, top + h), slice(left, left + w)
            crops[key] = whole[:, rows, columns] if first == 1 else whole[:, :, rows, columns]
    return [crops[key] for key in keys]


def _merge(y: Tensor, views: Views, layout: Layout, height: int, width: int) -> Tensor:
    """Return the adjoint of the split: every view added where it was cut, into one map per orientation."""
    y, first, permuted = _in_memory_order(y, layout)
    y = unflatten_views(y, len(views))
    h, w = views.crop_size(height, width)
    offsets = views.offsets(height, width)
    orientations = sorted({(view.mirror, view.turns % 4) for view in views}, reverse=True)
    shape = list(y.shape[:1] + y.shape[2:])
    shape[first], shape[first + 1] = height, width
    total: Tensor | None = None
    for key in orientations:  # the untouched orientation comes last: views add straight into the total
        upright = key == (False, 0)
        into = total if upright and total is not None else y.new_zeros(shape)
        for i, (view, (top, left)) in enumerate(zip(views.entries, offsets, strict=True)):
            if (view.mirror, view.turns % 4) == key:
                into.narrow(first, top, h).narrow(first + 1, left, w).add_(y[:, i])
        if not upright:
            into = _orient_back(into, *key, first)
        total = into if total is None or upright else total.add_(into)
    assert total is not None  # Views are never empty
    return total.permute(0, 3, 1, 2) if permuted else total


def _orient(x: Tensor, mirror: bool, turns: int, first: int) -> Tensor:
    x = x.flip(first + 1) if mirror else x
    return torch.rot90(x, turns, (first, first + 1)) if turns else x


def _orient_back(x: Tensor, mirror: bool, turns: int, first: int) -> Tensor:
    x = torch.rot90(x, -turns, (first, first + 1)) if turns else x
    return x.flip(first + 1) if mirror else x


class _Split(torch.autograd.Function):
    """The split, with a backward that adds into one buffer where autograd would build a zero map per view."""

    @staticmethod
    def forward(x: Tensor, views: Views, layout: Layout) -> Tensor:
        x, first, permuted = _in_memory_order(x, layout)
        crops = _crops(x, views, first)
        n, a, b, c = crops[0].shape
        # Written into memory of its own: a view of it would forbid the in-place ReLU that may come next.
        size, stride = ((c, a, b), (a * b * c, 1, b * c, c)) if permuted else ((a, b, c), (a * b * c, b * c, c, 1))
        y = x.new_empty_strided((n * len(views), *size), stride)
        rows = unflatten_views(y.permute(0, 2, 3, 1) if permuted else y, len(views))
        for i, crop in enumerate(crops):
            rows[:, i].copy_(crop)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, ctx.views, ctx.layout = inputs
        ctx.size = x.shape[2:] if ctx.layout == "NCHW" else x.shape[1:3]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Merge.apply(grad, ctx.views, ctx.layout, *ctx.size), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        return _Split.apply(tangent, ctx.views, ctx.layout)

    @staticmethod
    def vmap(info, in_dims, x, views, layout):  # type: ignore[no-untyped-def]
        return _fold_vmap(_Split, info.batch_size, in_dims[0], x, views, layout)


class _Merge(torch.autograd.Function):
    """The adjoint of :class:`_Split`, and it of this one."""

    @staticmethod
    def forward(y: Tensor, views: Views, layout: Layout, height: int, width: int) -> Tensor:
        return _merge(y, views, layout, height, width)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, ctx.views, ctx.layout, *ctx.size = inputs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Split.apply(grad, ctx.views, ctx.layout), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        return _Merge.apply(tangent, ctx.views, ctx.layout, *ctx.size)

    @staticmethod
    def vmap(info, in_dims, y, *args):  # type: ignore[no-untyped-def]
        return _fold_vmap(_Merge, info.batch_size, in_dims[0], y, *args)


def _fold_vmap(function, size, in_dim, x, *args):  # type: ignore[no-untyped-def]
    """Samples are independent: a vmapped axis folds into the batch."""
    x = x.movedim(in_dim, 0)
    return function.apply(x.flatten(0, 1), *args).unflatten(0, (size, -1)), 0
