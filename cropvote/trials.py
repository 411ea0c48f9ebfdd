"""One look at a model: a walk that sees every module at once, and a trial split at a site.

A site is valid where every path from the input to the output passes through it: the network is then front, site and
tail, and nothing of a sample reaches its prediction around the views. The walk follows the data through every
operation. Each tensor carries one bit per module, set while a path from the input leads to it that avoids that module;
the module clears its own bit in what it returns; a bit still set in the model's output is a path around that module.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import PlainModelError, ViewsError
from .fakes import (
    BATCH,
    Example,
    Paths,
    Spec,
    first_line,
    map_first_tensor,
)
from .splitting import LAYOUTS, Layout, split_views
from .swapping import restore_forward, swap_forward
from .views import Views

__all__ = ["Site"]

INPUT = "input"


class Site(NamedTuple):
    """One module as a place to split.

    Fields:
        name: its name in ``model.named_modules()``, or ``"input"``.
        shape: its output's (C, H, W), or (H, W, C) where the layout is "NHWC"; empty where it is no map.
        layout: "NCHW" or "NHWC".
        distinct: how many of the views differ there.
        reason: why it is no valid site; empty where it is one.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    distinct: int
    reason: str = ""


def layout_of(model: nn.Module) -> Layout | None:
    """Where the channels are, as the model itself says it (timm's ``output_fmt``), or None."""
    stated = getattr(model, "output_fmt", None)
    stated = getattr(stated, "value", stated)
    return stated if stated in LAYOUTS else None


def holder_of(model: nn.Module, name: str) -> nn.Module:
    """The module that carries the split of a site.

    It is the site itself, or in an ``nn.Sequential`` its last child: gradient checkpointing may run the children and
    never the Sequential. A child that also stands elsewhere in the model cannot carry it.
    """
    module = model.get_submodule(name)
    standing = [id(m) for _, m in model.named_modules(remove_duplicate=False)]
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        last = module[-1]
        if standing.count(id(last)) != standing.count(id(module)):
            break
        module = last
    return module


class _Seen(NamedTuple):
    """What the walk saw of a module's last call."""

    output: Any
    group: int


def _sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The (height, width) of a map's shape without the batch."""
    return shape[1:] if layout == "NCHW" else shape[:2]


class Probe:
    """One fake model in one mode: a walk that looks at every module at once, then a trial split per site."""

    def __init__(self, model: nn.Module, example: Example, views: Views, layout: Layout | None) -> None:
        self.model, self.example, self.views, self.layout = model, example, views, layout
        named = model.named_modules(remove_duplicate=False)
        self.modules = {name: m for name, m in named if name and not isinstance(m, torch.jit.ScriptModule)}
        self.calls: dict[nn.Module, int] = {}
        self.seen: dict[nn.Module, _Seen] = {}
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
        around = paths.of(self.output)
        self.around = {module for module in bit if around & bit[module]}

    def _asked(self) -> str:
        shapes = [(BATCH, *leaf.shape[1:]) for leaf in tree_leaves(tuple(self.example)) if isinstance(leaf, Spec)]
        mode = "training" if self.model.training else "eval"
        return f"an input of shape {', '.join(map(str, shapes))} in {mode} mode"

    def site(self, name: str) -> Site:
        layout, reason = self._judged(name)
        shape = self._shape(name)
        try:
            distinct = self.views.distinct(*_sides(shape, layout)) if len(shape) == 3 else 0
        except ViewsError:
            distinct = 0
        return Site(name, shape, layout, distinct, reason)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name == INPUT:
            return next(leaf.shape[1:] for leaf in tree_leaves(tuple(self.example)) if isinstance(leaf, Spec))
        seen = self.seen.get(holder_of(self.model, name))
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
        reason = (self._images() if name == INPUT else self._walked(name)) or self._output()
        if reason:
            return self.layout or "NCHW", reason
        layout, reason = self._find_layout(name)
        return layout, reason or self._trial(name, self.views, layout)

    def _images(self) -> str:
        shape = self._shape(INPUT)
        return "" if len(shape) == 3 else f"the first tensor of the call has {1 + len(shape)} axes; images have 4."

    def _walked(self, name: str) -> str:
        holder = holder_of(self.model, name)
        calls = self.calls.get(holder, 0)
        if calls == 0:
            return f"it is never called in the model's forward (on {self._asked()})."
        if calls > 1:
            return f"it is called {calls} times in one forward, so each call would split again."
        output = self.seen[holder].output
        if not isinstance(output, Tensor):
            return f"it returns {type(output).__name__}; a site returns one tensor, a map of features."
        if output.dim() != 4:
            return f"it returns shape {tuple(output.shape)}; a site returns a 4-D map, (N, C, H, W)."
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

    def _output(self) -> str:
        if not isinstance(self.output, Tensor):
            return f"the model returns {type(self.output).__name__}; cropvote votes over one tensor, (N, K)."
        if self.output.dim() != 2 or self.output.shape[0] != BATCH:
            return (
                f"the model returns shape {tuple(self.output.shape)} for {BATCH} samples; cropvote votes over one "
                f"row of K outputs per sample, (N, K)."
            )
        return ""

    def _find_layout(self, name: str) -> tuple[Layout, str]:
        """Where the channels are: height and width can shrink, channels cannot. The layout, or why it is unknown."""
        able = [layout for layout in LAYOUTS if self._shrinks(name, layout)]
        if self.layout and (self.layout in able or not able):
            return self.layout, ""
        shape = self._shape(name)
        if len(able) == 2:  # a side of 1 cannot shrink, so it proves nothing
            able = [layout for layout in able if 1 not in _sides(shape, layout)] or able
        if self.layout:
            return (
                self.layout,
                f'its map of shape {shape} shrinks along the axes of "{able[0]}", not of "{self.layout}".',
            )
        if len(able) == 1:
            return able[0], ""
        said = layout_of(self.model)
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

    def _crops(self, name: str) -> bool:
        """Whether the views are smaller than the map, in both axes, where the channels come first."""
        size = self._shape(name)[1:]
        return all(crop < side for crop, side in zip(self.views.crop_size(*size), size, strict=True))

    def _shrinks(self, name: str, layout: Layout) -> bool:
        """Whether the network behind the site takes a map of less height and width, in that layout."""
        shape = self._shape(name)
        sides = _sides(shape, layout)
        for smaller in [(side + 1) // 2 for side in sides], [max(1, side - 1) for side in sides]:
            scale = (Fraction(smaller[0], sides[0]), Fraction(smaller[1], sides[1]))
            if not self._trial(name, Views([(0, 0)], scale=scale), layout):
                return True
        try:
            return layout == "NCHW" and self._crops(name) and not self._trial(name, self.views, layout)
        except ViewsError:
            return False

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

        holder = None if name == INPUT else holder_of(self.model, name)
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
            return (
                f"the network behind it cannot take the views of its map, of shape {self._crop(name, views, layout)}: "
                f"{first_line(error)}."
            )
        finally:
            if holder is not None:
                restore_forward(holder)
        if len(votes) != 1:
            return f"the model's forward, where the vote would stand, ran {len(votes)} times in one call."
        expected = BATCH * len(views)
        if splits != [expected]:
            return f"the split ran {len(splits)} times in one forward."
        rows = (expected, self.output.shape[1])
        if not isinstance(output, Tensor) or output.shape != rows:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            return f"the model returns {found} after the split, not {rows}, one row per view."
        if paths.of(output):
            return "the model's output also depends on the images by a path around it."
        return ""

    def _crop(self, name: str, views: Views, layout: Layout) -> tuple[int, ...]:
        shape = self._shape(name)
        if layout == "NHWC":
            return (*views.crop_size(*shape[:2]), shape[2])
        return (shape[0], *views.crop_size(*shape[1:]))

    def candidates(self, every: bool = False) -> list[str]:
        """The names worth a trial, in forward order: maps on every path, each tensor under its outermost name."""
        order = {module: i for i, module in enumerate(self.seen)}
        names: dict[Any, str] = {}
        for name in sorted(self.modules, key=lambda n: (n.count("."), order.get(self.modules[n], 0))):
            holder = holder_of(self.model, name)
            if every:
                names[name] = name
            elif holder in self.seen and not self._walked(name):
                names.setdefault(self.seen[holder].group, name)
        last = len(order)
        return sorted(names.values(), key=lambda n: order.get(holder_of(self.model, n), last))

    def advice(self, most: int = 8) -> str:
        """The outermost valid sites, for an error's end."""
        names = self.candidates()
        valid: list[str] = []
        for name in [INPUT, *sorted(names, key=lambda n: n.count("."))]:
            if len(valid) < most and not self._judged(name)[1]:
                valid.append(name)
        if not valid:
            return f"No site of this {type(self.model).__name__} is valid for these views."
        valid.sort(key=[INPUT, *names].index)
        return f"Valid sites: {', '.join(valid)} (all of them: cropvote.sites(model, input_size))."
