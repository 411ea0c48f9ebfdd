"""Which modules are valid sites, and why the others are not, found on a fake copy of the model."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction

from torch import nn

from ..errors import InputTypeError, OptionError, SiteError, ViewsError
from ..images import INPUT, Example, example_of
from ..layouts import Layout
from ..views import Views, hflip, ten_crop
from .fakes import on_fake_copy
from .trial import Split
from .verdicts import Probe, Site

__all__ = ["sites"]


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
    views, example = asked_of(model, input_size, views)

    def look(fake: nn.Module) -> list[Site]:
        probe = Probe(fake, example, views, None)
        return judged(probe, candidates(probe, every=all))

    return [row for row in on_fake_copy(model, look) if all or not row.reason]


def asked_of(model: nn.Module, input_size: int | tuple[int, ...] | None, views: Views | None) -> tuple[Views, Example]:
    """The views and the images meant by what a user asks of a model that need not be injected."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    views = ten_crop() if views is None else views
    if not isinstance(views, Views):
        raise InputTypeError(f"views must be a Views, such as ten_crop(), got {views!r}.")
    example = example_of(model, input_size)
    if example is None:
        raise OptionError("no input size is known for this model: pass input_size=, such as input_size=(3, 224, 224).")
    return views, example


def judged(probe: Probe, names: list[str]) -> list[Site]:
    """The sites of these names, each with its reason where it is no valid one."""
    rows = [probe.site(name) for name in names]
    if not probe.why_not_swapped([row.name for row in rows if not row.reason]):
        return rows
    return [row if row.reason else row._replace(reason=probe.why_not_swapped([row.name])) for row in rows]


def refusal(probe: Probe, name: str, reason: str) -> str:
    """The message that a module is no valid site."""
    advice = "" if probe.why_not_votable() else f" {_advice(probe)}"
    return f"after={name!r} cannot be a site: {reason}{advice}"


def check_sites(
    model: nn.Module, plan: dict[str, Views], stated: dict[str, Layout | None], example: Example
) -> tuple[frozenset[bool], list[Split]]:
    """Raise SiteError unless the names of ``plan`` are valid sites together in the model's present mode.

    Returns:
        The modes (``training``) in which they are, and the splits in forward order with the layouts of their maps. The
        other mode may take another path (auxiliary heads, say); it is checked again when it is first used.

    Raises:
        SiteError: with the reason, and the names of valid sites.
        ViewsError: the map at the site is too small for the views.
        PlainModelError: the model does not run on such an input.
    """
    first = next(iter(plan.values()))

    def check(fake: nn.Module) -> tuple[list[bool], list[Split]]:
        probe = Probe(fake, example, first, None)
        probe.explains = True
        found = checked_plan(probe, plan, stated)
        modes = [model.training]
        with suppress(Exception):  # whatever it is, the other mode is not checked, and will be when it is used
            known = {split.name: (split.layout, probe.shape(split.name)) for split in found}
            fake.train(not model.training)
            again, _, reason = Probe(fake, example, first, None).verdict_of(plan, stated, known)
            if not reason and again == found:
                modes.append(not model.training)
        return modes, found

    modes, found = on_fake_copy(model, check)
    return frozenset(modes), found


def checked_plan(probe: Probe, plan: dict[str, Views], stated: dict[str, Layout | None] | None = None) -> list[Split]:
    """The splits of a plan in forward order.

    Raises:
        SiteError: with the reason, and the names of valid sites.
        ViewsError: the map at a site is too small for its views.
    """
    try:
        found, name, reason = probe.verdict_of(plan, stated or dict.fromkeys(plan))
    except ViewsError as error:
        raise ViewsError(f"after={' and '.join(map(repr, plan))} on {probe.asked()}: {error}") from error
    reason = reason or probe.why_not_swapped(list(plan))
    if reason:
        raise SiteError(refusal(probe, name, reason))
    return found


def candidates(probe: Probe, every: bool = False) -> list[str]:
    """The names worth a trial, in forward order: the input, and cut points, each tensor under its outermost name."""
    order = {module: i for i, module in enumerate(probe.seen)}
    names: dict[object, str] = {}
    for name in sorted(probe.modules, key=lambda n: (n.count("."), order.get(probe.modules[n], 0))):
        holder = probe.holders[name]
        if every:
            names[name] = name
        elif holder in probe.seen and not probe.why_not_cut(name):
            names.setdefault(probe.seen[holder].group, name)
    last = len(order)
    first = [] if INPUT in probe.modules else [INPUT]
    return first + sorted(names.values(), key=lambda n: order.get(probe.holders[n], last))


def _advice(probe: Probe, most: int = 8, tried: int = 40) -> str:
    """The outermost valid sites, for an error's end; a look at every module would take its time."""
    names = candidates(probe)
    outermost = sorted(names, key=lambda n: n.count("."))
    valid: list[str] = []
    for name in outermost[:tried]:
        if len(valid) <= most and not probe.site(name).reason:
            valid.append(name)
    if not valid:
        kind = type(probe.model).__name__
        if len(outermost) > tried:
            return (
                f"None of the {tried} outermost modules of this {kind} is valid: see cropvote.sites(model, all=True)."
            )
        for other, text in ((hflip(), "views=hflip()"), (ten_crop(scale=Fraction(1, 2)), "views=ten_crop(scale=1/2)")):
            probe = Probe(probe.model, probe.example, other, None)
            fitting = [name for name in outermost if not probe.site(name).reason][:most]
            if fitting:
                return f"No site of this {kind} is valid for these views; {text} are valid at {', '.join(fitting)}."
        return f"No site of this {kind} is valid for these views, nor for views=hflip()."
    more = ", ..." if len(valid) > most or len(outermost) > tried else ""
    shown = sorted(valid[:most], key=names.index)
    return f"Valid sites: {', '.join(shown)}{more} (all of them: cropvote.sites(model, input_size))."
