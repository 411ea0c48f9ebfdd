"""Trials: split a fake model with the real mechanism, and see whether the network behind the site takes the views."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import CheckUnavailableError, Reason, RowsError, ViewsError
from ..images import BATCH, INPUT, map_first_tensor
from ..layouts import Layout, Tokens, resized, sides
from ..outputs import describe, format_path, map_tensors, tensors_of
from ..splitting import split_views
from ..swapping import restore_forward, swap_forward
from ..views import Views
from .fakes import first_line
from .taint import Taint
from .trace import Trace, fake_arguments

__all__: list[str] = []

#: The bits of a trial: data of the images, and of the views of the first site; later sites have the bits above.
IMAGES, VIEWS = 1, 2


class Split(NamedTuple):
    """A split at one site: into which views, of a map of which layout."""

    site: str
    views: Views
    layout: Layout


def run_split(
    trace: Trace,
    sites: list[str],
    cut: Callable[[int, Tensor], Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    root: Callable[..., Any] | None = None,
) -> Any:
    """Call a fake model while ``cut(i, map)`` replaces the map of the i-th site, with the class swap of an injection.

    Args:
        trace: of the model.
        sites: in forward order.
        cut: what takes the place of the split.
        args: of the call, the images among them.
        kwargs: of the call.
        root: the forward that the model itself gets, if any.
    """

    def carry(i: int) -> Callable[..., Any]:
        return lambda module, base, *a, **k: cut(i, base.forward(module, *a, **k))

    if sites and sites[0] == INPUT:
        args, kwargs = map_first_tensor(lambda x: cut(0, x), args, kwargs)
    swapped: list[nn.Module] = []
    try:
        for i, site in enumerate(sites):
            if site != INPUT:
                swap_forward(trace.carriers[site], carry(i))
                swapped.append(trace.carriers[site])
        if root is not None:
            swap_forward(trace.model, root)
            swapped.append(trace.model)
        return trace.model(*args, **kwargs)
    finally:
        for module in reversed(swapped):
            restore_forward(module)


def pad_to_prime(views: Views) -> Views:
    """Return the views, the first of them repeated until their number is a large prime.

    A tail's number of windows or masks may divide the rows of ten views by chance, whatever the views' size.
    """
    count = max(len(views), 23)
    while any(count % n == 0 for n in range(2, count)):
        count += 1
    entries = views.entries
    return Views(entries + entries[:1] * (count - len(entries)), scale=views.scale, stride=views.stride)


def try_padded(trace: Trace, splits: list[Split], explain: bool = False) -> Reason | None:
    """Return why the model cannot be split so, if it cannot, asked with a prime number of views; a yes is kept."""
    key = "splits", tuple(splits)
    if key in trace.memo:
        return None
    reason = try_splits(trace, [Split(name, pad_to_prime(views), layout) for name, views, layout in splits], explain)
    if reason is None:
        trace.memo[key] = True
    return reason


def try_splits(trace: Trace, splits: list[Split], explain: bool = False) -> Reason | None:
    """Return why the model cannot be split so, if it cannot.

    Args:
        trace: of the model.
        splits: in forward order.
        explain: whether to look into a failure with one more trial: for an error, not for a list of all modules.

    Raises:
        ViewsError: only the size of a map is at fault.
    """
    taint = Taint()
    ran: list[tuple[int, int]] = []
    root_calls = 0

    def cut(i: int, x: Tensor) -> Tensor:
        site, views, layout = splits[i]
        try:
            y = split_views(x, views, layout=layout)
        except ViewsError as error:
            at = f"at {site!r}: " if len(splits) > 1 else ""
            raise ViewsError(error.code, at + error.message) from error
        ran.append((i, y.shape[0]))
        taint.set(y, VIEWS << i)
        return y

    def root(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal root_calls
        root_calls += 1
        return base.forward(module, *args, **kwargs)

    failure = ""
    try:
        with taint:
            args, kwargs = fake_arguments(trace.example, taint, IMAGES)
            output = run_split(trace, [split.site for split in splits], cut, args, kwargs, root)
    except (CheckUnavailableError, ViewsError):
        raise
    except Exception as error:
        failure = first_line(error)
    if failure:  # out of its handler, whose traceback holds tensors
        return _why_it_failed(trace, splits, failure, explain)
    if root_calls != 1:
        return Reason("CV117", f"the model's forward, where the vote would stand, ran {root_calls} times in one call.")
    counts = itertools.accumulate((len(split.views) for split in splits), operator.mul, initial=BATCH)
    if ran != list(enumerate(list(counts)[1:])):
        if len(splits) == 1:
            return Reason("CV118", f"the split ran {len(ran)} times in one forward.")
        order = ", ".join(splits[i].site for i, _ in ran)
        return Reason(
            "CV119", f"the splits did not run once each, one behind the other, in one forward, but: {order or 'none'}."
        )
    return _why_not_these_rows(trace, output, ran[-1][1], taint, VIEWS << len(splits) - 1)


def _why_not_these_rows(trace: Trace, output: Any, expected: int, taint: Taint, last: int) -> Reason | None:
    """Return why the predictions after the splits are not one row per view."""
    tensors = dict(tensors_of(output))
    for path in trace.predictions:
        rows, plain = tensors.get(path), trace.tensors[path]
        bits = 0 if rows is None else taint.of(rows)
        if path != trace.predictions[0] and rows is not None and rows.shape == plain.shape and not bits & ~IMAGES:
            continue  # a head in front of the site
        if rows is None or rows.shape != (expected, plain.shape[1]):
            wanted = f"{format_path(path)} {(expected, plain.shape[1])}".strip()
            return Reason(
                "CV122", f"the model returns {describe(output)} after the split, not {wanted}, one row per view."
            )
        if bits & (last - 1):
            return Reason("CV101", "the model's output also depends on the images by a path around it.")
    try:
        map_tensors(lambda path, x: x.clone(), output)
    except RowsError as error:
        return Reason(error.code, error.message)
    return None


def _why_it_failed(trace: Trace, splits: list[Split], failure: str, explain: bool) -> Reason:
    *before, (site, views, layout) = splits
    tokens = " A table of positions, or windows, may fix the grid." if isinstance(layout, Tokens) else ""
    if before:
        tail = f"the network behind it, or between it and {before[-1].site!r},"
        return Reason("CV121", f"{tail} cannot take the views: {failure}.{tokens}")
    whole = Views([(0, 0)] * len(views), scale=1)
    if explain and views.scale != whole.scale and try_splits(trace, [Split(site, whole, layout)]):
        return Reason(
            "CV120",
            f"the network behind it cannot take more rows than there are images: {failure}. It probably "
            f"reads the batch size from the images, as in `b = x.size(0)` and later `.view(b, -1)`: write "
            f".flatten(1) there, or read the size from the tensor that is reshaped.",
        )
    shape = trace.shape(site)
    crop = resized(shape, layout, views.crop_size(*sides(shape, layout)))
    return Reason(
        "CV121",
        f"the network behind it cannot take the views of its map, of shape {crop} instead of {shape}: "
        f"{failure}.{tokens}",
    )
