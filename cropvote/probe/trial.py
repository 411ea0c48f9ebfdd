"""Trials: a split at a site of a fake model with the real mechanism, to see whether the network behind it takes it."""

from __future__ import annotations

import itertools
import operator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import CheckUnavailableError, RowsError, ViewsError
from ..images import BATCH, INPUT, map_first_tensor
from ..layouts import Layout, Tokens, resized, sides
from ..outputs import describe, format_path, map_tensors, tensors_of
from ..splitting import split_views
from ..swapping import restore_forward, swap_forward
from ..views import Views
from .fakes import first_line
from .taint import TaintMode
from .trace import Walk

__all__: list[str] = []

#: The bits of a trial: data of the images, and of the views of the first site; those of the next have the bits above.
IMAGES, VIEWS = 1, 2


class Split(NamedTuple):
    """One split of a plan: at a site, into its views, of a map of that layout."""

    name: str
    views: Views
    layout: Layout


def pad_to_prime(views: Views) -> Views:
    """The views, the first of them repeated until their number is a large prime.

    A tail's number of windows or masks may divide the rows of ten views by chance, whatever the views' size.
    """
    count = max(len(views), 23)
    while any(count % n == 0 for n in range(2, count)):
        count += 1
    entries = views.entries
    return Views(entries + entries[:1] * (count - len(entries)), scale=views.scale)


class Trials(Walk):
    """A walk, and splits of the same model by its side."""

    explains = False  # whether a failure is looked into by one more trial: for an error, not for a list of all modules

    def _trial(self, splits: list[Split]) -> str:
        """Split for real, with the mechanism that the live model gets, and look at what comes out."""
        taint = TaintMode()
        ran: list[tuple[int, int]] = []
        votes = 0

        def split(place: int, x: Tensor) -> Tensor:
            name, views, layout = splits[place]
            try:
                y = split_views(x, views, layout=layout)
            except ViewsError as error:
                raise ViewsError(f"at {name!r}: {error}" if len(splits) > 1 else str(error)) from error
            ran.append((place, y.shape[0]))
            taint.set(y, VIEWS << place)
            return y

        def at(place: int) -> Any:
            return lambda module, base, *a, **k: split(place, base.forward(module, *a, **k))

        def root(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal votes
            votes += 1
            return base.forward(module, *args, **kwargs)

        holders = [self.holders[s.name] for s in splits if s.name != INPUT]
        failure = ""
        try:
            with taint:
                args, kwargs = self.inputs(taint, IMAGES)
                for place, one in enumerate(splits):
                    if one.name == INPUT:
                        args, kwargs = map_first_tensor(lambda x: split(0, x), args, kwargs)
                    else:
                        swap_forward(self.holders[one.name], at(place))
                swap_forward(self.model, root)
                try:
                    output = self.model(*args, **kwargs)
                finally:
                    restore_forward(self.model)
        except (CheckUnavailableError, ViewsError):
            raise
        except Exception as error:
            failure = first_line(error)
        finally:
            for holder in holders:
                restore_forward(holder)
        if failure:
            return self._cannot_take(splits, failure)
        if votes != 1:
            return f"the model's forward, where the vote would stand, ran {votes} times in one call."
        counts = itertools.accumulate((len(s.views) for s in splits), operator.mul, initial=BATCH)
        if ran != list(enumerate(list(counts)[1:])):
            if len(splits) == 1:
                return f"the split ran {len(ran)} times in one forward."
            order = ", ".join(splits[place].name for place, _ in ran)
            return f"the splits did not run once each, one behind the other, in one forward, but: {order or 'none'}."
        return self._rows(output, ran[-1][1], taint, VIEWS << len(splits) - 1)

    def _rows(self, output: Any, expected: int, taint: TaintMode, last: int) -> str:
        """Why the predictions after the split are not one row per view."""
        found = dict(tensors_of(output))
        for place in self.predictions:
            rows, plain = found.get(place), self.found[place]
            bits = 0 if rows is None else taint.of(rows)
            if place != self.predictions[0] and rows is not None and rows.shape == plain.shape and not bits & ~IMAGES:
                continue  # a head in front of the site
            if rows is None or rows.shape != (expected, plain.shape[1]):
                wanted = f"{format_path(place)} {(expected, plain.shape[1])}".strip()
                return f"the model returns {describe(output)} after the split, not {wanted}, one row per view."
            if bits & (last - 1):
                return "the model's output also depends on the images by a path around it."
        try:
            map_tensors(lambda place, x: x.clone(), output)
        except RowsError as error:
            return str(error)
        return ""

    def _cannot_take(self, splits: list[Split], failure: str) -> str:
        *before, (name, views, layout) = splits
        tokens = " A table of positions, or windows, may fix the grid." if isinstance(layout, Tokens) else ""
        if before:
            place = f"the network behind it, or between it and {before[-1].name!r},"
            return f"{place} cannot take the views: {failure}.{tokens}"
        whole = Views([(0, 0)] * len(views), scale=1)
        if self.explains and views.scale != whole.scale and self._trial([Split(name, whole, layout)]):
            return (
                f"the network behind it cannot take more rows than there are images: {failure}. It probably "
                f"reads the batch size from the images, as in `b = x.size(0)` and later `.view(b, -1)`: write "
                f".flatten(1) there, or read the size from the tensor that is reshaped."
            )
        shape = self.shape(name)
        crop = resized(shape, layout, views.crop_size(*sides(shape, layout)))
        return (
            f"the network behind it cannot take the views of its map, of shape {crop} instead of {shape}: "
            f"{failure}.{tokens}"
        )
