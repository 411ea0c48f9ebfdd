"""Which modules are valid sites, and why the others are not, found on a fake copy of the model.

A site is valid where every path from the input to the output passes through it: the network is then front, site and
tail, and nothing of a sample reaches its prediction around the views. The probe follows the data through every
operation. Each tensor carries one bit per module, set while a path from the input leads to it that avoids that module;
the module clears its own bit in what it returns; a bit still set in the model's output is a path around that module.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import OptionError, PlainModelError, SiteError, ViewsError
from .fakes import (
    BATCH,
    Example,
    Paths,
    Spec,
    example_of,
    fake_copy,
    first_line,
    map_first_tensor,
)
from .splitting import LAYOUTS, Layout, split_views
from .swapping import restore_forward, swap_forward
from .views import Views, ten_crop

__all__ = ["Site", "sites"]

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


def sites(
    model: nn.Module,
    input_size: int | tuple[int, ...] | None = None,
    *,
    views: Views | None = None,
    all: bool = False,
) -> list[Site]:
    """The valid sites of a model, in the order in which its forward reaches them.

    Works on a fake copy: no weight is copied, nothing is computed, the model is left as it is. Modules that
    return the same tensor are one site, under its outermost name.

    Args:
        model: an image classifier that was not injected; looked at in its present mode.
        input_size: the image's size: a side, (H, W), or (C, H, W); needless for timm models, which carry one.
        views: the views to be used, :func:`ten_crop` by default.
        all: also list the modules that are no valid sites, with the reason.

    Returns:
        One :class:`Site` per site.

    Raises:
        OptionError: no input size is known, or it is malformed.
        SurgeryError: the model does not run on such an input.

    Example:
        >>> from torch import nn
        >>> from cropvote import sites
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
        >>> [(site.name, site.shape) for site in sites(net, 32)]
        [('input', (3, 32, 32)), ('0', (8, 30, 30)), ('1', (8, 30, 30))]
    """
    example = example_of(model, input_size)
    if example is None:
        raise OptionError("no input size is known for this model: pass input_size=, such as input_size=(3, 224, 224).")
    with fake_copy(model) as fake:
        probe = _Probe(fake, example, ten_crop() if views is None else views, layout_of(model))
        rows = [probe.site(name) for name in (INPUT, *probe.candidates(every=all))]
    return [row for row in rows if all or not row.reason]


def check_site(model: nn.Module, name: str, views: Views, layout: Layout | None, example: Example) -> frozenset[bool]:
    """Raise SiteError unless ``name`` is a valid site in the model's present mode.

    Returns:
        The modes (``training``) in which it is one. The other mode may take another path (auxiliary heads, say); it
        is checked again when it is first used.

    Raises:
        SiteError: with the reason, and the names of valid sites.
        ViewsError: the map at the site is too small for the views.
        PlainModelError: the model does not run on such an input.
    """
    checked = set()
    with fake_copy(model) as fake:
        for training in (model.training, not model.training):
            if fake.training != training:
                fake.train(training)
            try:
                probe = _Probe(fake, example, views, layout)
                reason = probe.reason(name)
            except (PlainModelError, ViewsError):
                if training == model.training:
                    raise
                continue
            if not reason:
                checked.add(training)
            elif training == model.training:
                raise SiteError(f"after={name!r} cannot be a site: {reason} {probe.advice()}")
    return frozenset(checked)


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


class _Probe:
    """One fake model in one mode: a walk that looks at every module at once, then a trial split per site."""

    def __init__(self, model: nn.Module, example: Example, views: Views, layout: Layout | None) -> None:
        self.model, self.example, self.views = model, example, views
        self.layout: Layout = layout or "NCHW"
        self.stated = layout is not None
        self.modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        self.calls: dict[nn.Module, int] = {}
        self.seen: dict[nn.Module, _Seen] = {}
        self._walk()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)

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

        hooks = [module.register_forward_hook(look) for module in bit]
        try:
            with paths:
                args, kwargs = self._inputs(paths, (1 << len(bit)) - 1)
                self.output = self._call(args, kwargs)
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
        reason = self._reason(name)
        shape = self._shape(name)
        size = shape[1:] if self.layout == "NCHW" or name == INPUT else shape[:2]
        try:
            distinct = self.views.distinct(*size) if len(shape) == 3 else 0
        except ViewsError:
            distinct = 0
        return Site(name, shape, "NCHW" if name == INPUT else self.layout, distinct, reason)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name == INPUT:
            return next(leaf.shape[1:] for leaf in tree_leaves(tuple(self.example)) if isinstance(leaf, Spec))
        seen = self.seen.get(holder_of(self.model, name))
        return tuple(seen.output.shape[1:]) if seen and isinstance(seen.output, Tensor) else ()

    def _reason(self, name: str) -> str:
        try:
            return self.reason(name)
        except ViewsError as error:
            return str(error)

    def reason(self, name: str) -> str:
        """Why ``name`` is no valid site, or nothing; ViewsError where only the map's size is at fault."""
        walked = "" if name == INPUT else self._walked(name)
        return walked or self._output() or self._trial(name, self.views) or self._axes(name)

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
                "the model's output also depends on its input by a path around it (a skip connection, a parallel "
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

    def _axes(self, name: str) -> str:
        """Whether the last two axes are height and width, where nobody says so: those can shrink, channels cannot."""
        if name == INPUT or self.stated:
            return ""
        _, height, width = self._shape(name)
        for smaller in ((height + 1) // 2, (width + 1) // 2), (max(1, height - 1), max(1, width - 1)):
            scale = (Fraction(smaller[0], height), Fraction(smaller[1], width))
            if not self._trial(name, Views([(0, 0)], scale=scale)):
                return ""
        return (
            f"its map of shape {self._shape(name)} cannot shrink along its last two axes, so they may not be height "
            f'and width: pass layout="NCHW" if they are, layout="NHWC" if the channels come last.'
        )

    def _trial(self, name: str, views: Views) -> str:
        """Split for real, with the mechanism that the live model gets, and look at what comes out."""
        paths = Paths()
        splits: list[int] = []

        def split(x: Tensor) -> Tensor:
            y = split_views(x, views, layout="NCHW" if name == INPUT else self.layout)
            splits.append(y.shape[0])
            paths.set(y, 0)
            return y

        holder = None if name == INPUT else holder_of(self.model, name)
        try:
            with paths:
                args, kwargs = self._inputs(paths, 1)
                if holder is None:
                    args, kwargs = map_first_tensor(split, args, kwargs)
                else:
                    swap_forward(holder, lambda module, base, *a, **k: split(base.forward(module, *a, **k)))
                output = self._call(args, kwargs)
        except ViewsError as error:
            raise ViewsError(f"after={name!r} on {self._asked()}: {error}") from error
        except Exception as error:
            return (
                f"the network behind it cannot take the views of its map, of shape {self._crop(name)}: "
                f"{first_line(error)}."
            )
        finally:
            if holder is not None:
                restore_forward(holder)
        expected = BATCH * len(views)
        if splits != [expected]:
            return f"the split ran {len(splits)} times in one forward."
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != expected:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            return f"the model returns {found} after the split, not {expected} rows, one per view."
        if paths.of(output):
            return "the model's output also depends on its input by a path around it."
        return ""

    def _crop(self, name: str) -> tuple[int, ...]:
        shape = self._shape(name)
        if name != INPUT and self.layout == "NHWC":
            return (*self.views.crop_size(*shape[:2]), shape[2])
        return (shape[0], *self.views.crop_size(*shape[1:]))

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
            if len(valid) < most and not self._reason(name):
                valid.append(name)
        if not valid:
            return f"No site of this {type(self.model).__name__} is valid for these views."
        valid.sort(key=[INPUT, *names].index)
        return f"Valid sites: {', '.join(valid)} (all of them: cropvote.sites(model, input_size))."
