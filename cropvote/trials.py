"""One look at a model: a walk that sees every module at once, and a trial split at a site.

A site is valid where every path from the input to the output passes through it: the network is then front, site and
tail, and nothing of a sample reaches its prediction around the views. The walk follows the data through every
operation. Each tensor carries one bit per module, set while a path from the input leads to it that avoids that module;
the module clears its own bit in what it returns; a bit still set in the model's output is a path around that module.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import PlainModelError, RowsError, ViewsError
from .fakes import (
    BATCH,
    Example,
    Paths,
    Spec,
    first_line,
    map_first_tensor,
)
from .layouts import LAYOUTS, Layout, Tokens, resized, sides, stated_layout, stated_tokens
from .outputs import describe, named_tensors, prediction_names
from .splitting import split_views
from .swapping import restore_forward, swap_forward
from .views import Views

__all__ = ["Site"]

INPUT = "input"
SPATIAL: dict[tuple[int, ...], Layout] = {(1, 2): "NCHW", (0, 1): "NHWC"}
#: What cut points were given while a site was tried: a tensor's shape, strides and type.
Looks = list[tuple[nn.Module, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]]


class Site(NamedTuple):
    """One module as a place to split.

    Fields:
        name: its name in ``model.named_modules()``, or ``"input"``.
        shape: its output's (C, H, W), (H, W, C) or (L, C), as the layout says; empty where it returns no tensor.
        layout: "NCHW", "NHWC" or :class:`Tokens`.
        distinct: how many of the views differ there.
        reason: why it is no valid site; empty where it is one.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    distinct: int
    reason: str = ""


def holder_of(model: nn.Module, name: str) -> nn.Module:
    """The module that carries the split of a site.

    It is the site itself, or in an ``nn.Sequential`` its last child: gradient checkpointing may run the children and
    never the Sequential. A child that also stands elsewhere in the model cannot carry it.
    """
    return _carrier(model.get_submodule(name), _standings(model))


def _standings(model: nn.Module) -> Counter[nn.Module]:
    """In how many places of the model each module stands."""
    return Counter(module for _, module in model.named_modules(remove_duplicate=False))


def _carrier(module: nn.Module, standings: Counter[nn.Module]) -> nn.Module:
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        last = module[-1]
        if standings[last] != standings[module]:
            break
        module = last
    return module


class _Seen(NamedTuple):
    """What the walk saw of a module's last call."""

    output: Any
    group: int


class Probe:
    """One fake model in one mode: a walk that looks at every module at once, then a trial split per site."""

    def __init__(self, model: nn.Module, example: Example, views: Views, layout: Layout | None) -> None:
        self.model, self.example, self.views, self.layout = model, example, views, layout
        named = model.named_modules(remove_duplicate=False)
        self.modules = {name: m for name, m in named if name and not isinstance(m, torch.jit.ScriptModule)}
        standings = _standings(model)
        self.holders = {name: _carrier(module, standings) for name, module in self.modules.items()}
        self.calls: dict[nn.Module, int] = {}
        self.seen: dict[nn.Module, _Seen] = {}
        self.layouts: dict[nn.Module, Layout] = {}  # learnt while another site was tried
        self.taken: set[tuple[nn.Module, Any]] = set()  # (cut point, map) that the network behind it took
        self._walk()

    def _inputs(self, paths: Paths, bits: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call; what belongs to samples carries ``bits``."""

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Spec):
                return leaf
            tensor = leaf.fake()
            if leaf.shape[:1] == (-1,):
                paths.set(tensor, bits)
            return tensor

        return tree_map(fake, tuple(self.example))

    def _walk(self) -> None:
        """Run once, every module's output replaced by a clone that clears the module's bit."""
        bit = {module: 1 << i for i, module in enumerate(dict.fromkeys(self.modules.values()))}
        groups: dict[tuple[int, int], int] = {}
        keep: list[Tensor] = []
        paths = Paths()

        def look(module: nn.Module, args: Any, output: Any) -> Any:
            self.calls[module] = self.calls.get(module, 0) + 1
            self.seen[module] = _Seen(output, len(keep))
            if not isinstance(output, Tensor):
                return None
            group = groups.get((id(output), output._version), len(keep))
            clone = output.clone()
            paths.set(clone, paths.of(output) & ~bit[module])
            keep.append(clone)
            groups[id(clone), clone._version] = group
            self.seen[module] = _Seen(output, group)
            return clone

        hooks = []
        try:
            hooks = [module.register_forward_hook(look) for module in bit]
            with paths:
                args, kwargs = self._inputs(paths, (1 << len(bit)) - 1)
                self.output = self.model(*args, **kwargs)
        except Exception as error:
            raise PlainModelError(
                f"{type(self.model).__name__} itself, without any split, failed on {self._asked()}: {first_line(error)}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self.found = dict(named_tensors(self.output))
        self.numbers = [name for name, x in self.found.items() if x.dim() == 0 and paths.of(x)]
        try:
            self.predictions = prediction_names(self.output)
            around = paths.of(self.found[self.predictions[0]])
        except RowsError as error:
            self.predictions = []
            self.unclear = str(error)
            around = paths.of(list(self.found.values()))
        self.around = {module for module in bit if around & bit[module]}
        self.watched = {m: self._shape(name) for name, m in self.holders.items() if self.is_cut_point(name)}

    def _asked(self) -> str:
        shapes = [(BATCH, *leaf.shape[1:]) for leaf in tree_leaves(tuple(self.example)) if isinstance(leaf, Spec)]
        mode = "training" if self.model.training else "eval"
        return f"an input of shape {', '.join(map(str, shapes))} in {mode} mode"

    def site(self, name: str) -> Site:
        layout, reason = self._judged(name)
        shape = self._shape(name)
        is_map = len(shape) == (2 if isinstance(layout, Tokens) else 3)
        try:
            distinct = self.views.distinct(*sides(shape, layout)) if is_map else 0
        except ViewsError:
            distinct = 0
        return Site(name, shape, layout, distinct, reason)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name == INPUT:
            return next(leaf.shape[1:] for leaf in tree_leaves(tuple(self.example)) if isinstance(leaf, Spec))
        seen = self.seen.get(self.holders[name])
        return tuple(seen.output.shape[1:]) if seen and isinstance(seen.output, Tensor) else ()

    def _judged(self, name: str) -> tuple[Layout, str]:
        try:
            return self.verdict(name)
        except ViewsError as error:
            return self.layout or "NCHW", str(error)

    def verdict(self, name: str) -> tuple[Layout, str]:
        """The layout of a site's map, and why it is no valid site or nothing.

        Raises:
            ViewsError: only the map's size is at fault.
        """
        reason = (self._images() if name == INPUT else self._walked(name)) or self.unvotable()
        if reason:
            return self.layout or "NCHW", reason
        layout, reason = self._find_layout(name)
        if reason or self._is_taken(name, layout):
            return layout, reason
        reason = self._trial(name, self._one_view(), layout) or self._trial(name, self.views, layout)
        if not reason:
            self.taken.update(self.looks)
            self._learn_layouts(self.looks)
        return layout, reason

    def _one_view(self) -> Views:
        """The first view alone: a number of windows may divide the rows of all views by chance, but not these too."""
        return Views(self.views.entries[:1], scale=self.views.scale)

    def _is_taken(self, name: str, layout: Layout) -> bool:
        """Whether the network behind a cut point took just such views while an earlier site was tried.

        Nothing but the map reaches the network behind a cut point, so that what it takes from one split it takes from
        another.
        """
        if name == INPUT:
            return False
        holder = self.holders[name]
        try:
            views = split_views(self.seen[holder].output, self.views, layout=layout)
        except ViewsError:
            return False
        return (holder, _look(views)) in self.taken

    def is_cut_point(self, name: str) -> bool:
        """Whether every path passes through it, once, whatever the network behind it takes."""
        return not self._walked(name)

    def _images(self) -> str:
        shape = self._shape(INPUT)
        return "" if len(shape) == 3 else f"the first tensor of the call has {1 + len(shape)} axes; images have 4."

    def _walked(self, name: str) -> str:
        holder = self.holders[name]
        calls = self.calls.get(holder, 0)
        if calls == 0:
            return f"it is never called in the model's forward (on {self._asked()})."
        if calls > 1:
            return f"it is called {calls} times in one forward, so each call would split again."
        output = self.seen[holder].output
        if not isinstance(output, Tensor):
            return f"it returns {type(output).__name__}; a site returns one tensor, a map of features."
        if output.dim() not in (3, 4):
            return (
                f"it returns shape {tuple(output.shape)}; a site returns a map, (N, C, H, W), or the tokens of one, "
                f"(N, L, C)."
            )
        if output.shape[0] != BATCH:
            return (
                f"its first axis has length {output.shape[0]} for {BATCH} samples; a site returns one map per sample."
            )
        if holder in self.around:
            return (
                "the model's output also depends on the images by a path around it (a skip connection, a parallel "
                "branch or a gate), so a sample would reach its prediction past the views."
            )
        return ""

    def unvotable(self) -> str:
        """Why there is nothing to vote over."""
        if self.numbers:
            asked = "labels" in self.example.kwargs
            return (
                f"the model returns a number for the whole batch ({self.numbers[0] or 'its output'}), computed before "
                f"the vote. "
                + (
                    "Call it without labels=, and compute the loss from its logits with CropVoteLoss (in Hugging "
                    "Face's Trainer: compute_loss_func=)."
                    if asked
                    else "Let it return predictions, (N, K), and compute the rest from them."
                )
            )
        if not self.predictions and not isinstance(self.output, Tensor):
            return self.unclear
        for name in self.predictions or [""]:
            shape = tuple(self.found[name].shape)
            if len(shape) != 2 or shape[0] != BATCH:
                return (
                    f"the model returns shape {shape} for {BATCH} samples; cropvote votes over one row of K outputs "
                    f"per sample, (N, K)."
                )
        return ""

    def _find_layout(self, name: str) -> tuple[Layout, str]:
        """Where the channels are: height and width can shrink, channels cannot. The layout, or why it is unknown."""
        shape = self._shape(name)
        if len(shape) == 2 or isinstance(self.layout, Tokens):
            return self._tokens(name)
        if name != INPUT and self.layout is None and self.holders[name] in self.layouts:
            return self.layouts[self.holders[name]], ""
        shrunk = {layout: looks for layout in LAYOUTS if (looks := self._shrinks(name, layout)) is not None}
        able = list(shrunk)
        if self.layout and (self.layout in able or not able):
            return self.layout, ""
        if len(able) == 2:  # a side of 1 cannot shrink, so it proves nothing
            able = [layout for layout in able if 1 not in sides(shape, layout)] or able
        if self.layout:
            return (
                self.layout,
                f'its map of shape {shape} shrinks along the axes of "{able[0]}", not of "{self.layout}".',
            )
        if len(able) == 1:
            self._learn_layouts(shrunk[able[0]])
            return able[0], ""
        said = stated_layout(self.model)
        if able and said:
            return said, ""
        if name == INPUT:
            return "NCHW", ""
        if not able and self._crops(name):
            return "NCHW", self._trial(name, self.views, "NCHW")
        return "NCHW", (
            f"its map of shape {shape} can shrink along {'all' if able else 'none'} of its axes, so which of them are "
            f'height and width cannot be told: pass layout="NCHW" if they are the last two, layout="NHWC" if the '
            f"channels come last."
        )

    def _tokens(self, name: str) -> tuple[Layout, str]:
        """The grid of a site's tokens, which only the model or the user can tell."""
        shape = self._shape(name)
        found = self.layout
        if found is None and len(shape) == 2:
            found = stated_tokens(self.model, name, shape[0], self._shape(INPUT))
        if isinstance(found, Tokens) and len(shape) == 2 and shape[0] == found.prefix + found.height * found.width:
            return found, ""
        if found is not None:
            return found, f"its shape is {shape}, not that of layout={found!r}."
        return "NCHW", (
            f"it returns {shape[0]} tokens of {shape[1]} channels, and the model does not say of which grid: pass "
            f"layout=cropvote.Tokens(height, width, prefix) if they are the prefix tokens and then the grid, row by "
            f"row."
        )

    def _crops(self, name: str) -> bool:
        """Whether the views are smaller than the map, in both axes, where the channels come first."""
        size = sides(self._shape(name), "NCHW")
        return all(crop < side for crop, side in zip(self.views.crop_size(*size), size, strict=True))

    def _shrinks(self, name: str, layout: Layout) -> Looks | None:
        """What the cut points see of a map of less height and width, where the network behind the site takes one."""
        size = sides(self._shape(name), layout)
        for smaller in [(side + 1) // 2 for side in size], [max(1, side - 1) for side in size]:
            scale = (Fraction(smaller[0], size[0]), Fraction(smaller[1], size[1]))
            if not self._trial(name, Views([(0, 0)], scale=scale), layout):
                return self.looks
        try:
            if layout == "NCHW" and self._crops(name) and not self._trial(name, self.views, layout):
                return self.looks
        except ViewsError:
            pass
        return None

    def _trial(self, name: str, views: Views, layout: Layout) -> str:
        """Split for real, with the mechanism that the live model gets, and look at what comes out."""
        paths = Paths()
        splits: list[int] = []
        votes: list[nn.Module] = []

        def split(x: Tensor) -> Tensor:
            y = split_views(x, views, layout=layout)
            splits.append(y.shape[0])
            paths.set(y, 0)
            return y

        def root(module: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
            votes.append(module)
            return base.forward(module, *args, **kwargs)

        holder = None if name == INPUT else self.holders[name]
        looks: Looks = []
        hooks = [m.register_forward_hook(lambda m, _, out: looks.append((m, _look(out)))) for m in self.watched]
        try:
            with paths:
                args, kwargs = self._inputs(paths, 1)
                if holder is None:
                    args, kwargs = map_first_tensor(split, args, kwargs)
                else:
                    swap_forward(holder, lambda module, base, *a, **k: split(base.forward(module, *a, **k)))
                swap_forward(self.model, root)
                try:
                    output = self.model(*args, **kwargs)
                finally:
                    restore_forward(self.model)
        except ViewsError as error:
            raise ViewsError(f"after={name!r} on {self._asked()}: {error}") from error
        except Exception as error:
            return self._cannot_take(name, views, layout, error)
        finally:
            for hook in hooks:
                hook.remove()
            if holder is not None:
                restore_forward(holder)
        if len(votes) != 1:
            return f"the model's forward, where the vote would stand, ran {len(votes)} times in one call."
        if splits != [BATCH * len(views)]:
            return f"the split ran {len(splits)} times in one forward."
        reason = self._rows(dict(named_tensors(output)), output, splits[0], paths)
        self.looks = [look for look in looks if look[0] is not holder]
        return reason

    def _rows(self, found: dict[str, Tensor], output: Any, expected: int, paths: Paths) -> str:
        """Why the predictions after the split are not one row per view."""
        for name in self.predictions:
            rows = found.get(name)
            shape = (expected, self.found[name].shape[1])
            if name != self.predictions[0] and rows is not None and rows.shape == self.found[name].shape:
                continue  # a head in front of the site
            if rows is None or rows.shape != shape:
                return f"the model returns {describe(output)} after the split, not {shape}, one row per view."
            if paths.of(rows):
                return "the model's output also depends on the images by a path around it."
        return ""

    def _cannot_take(self, name: str, views: Views, layout: Layout, error: Exception) -> str:
        shape = self._shape(name)
        crop = resized(shape, layout, views.crop_size(*sides(shape, layout)))
        return (
            f"the network behind it cannot take the views of its map, of shape {crop} instead of {shape}: "
            f"{first_line(error)}."
            + (" A table of positions, or windows, may fix the grid." if isinstance(layout, Tokens) else "")
        )

    def _learn_layouts(self, looks: Looks) -> None:
        """Remember along which axes the maps behind a trial's site shrank with the site's own."""
        for module, (shape, *_) in looks:
            before = self.watched[module]
            shrunk = tuple(i for i, (m, n) in enumerate(zip(before, shape[1:], strict=False)) if m != n)
            if len(before) == 3 and shrunk in SPATIAL:
                self.layouts.setdefault(module, SPATIAL[shrunk])


def _look(output: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(output.shape), output.stride(), output.dtype
