"""Which modules are valid sites, and why the others are not, found on a fake copy of the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction

from torch import nn

from ..cuts import ViewsOrName, as_views
from ..errors import InputTypeError, OptionError, Reason, SiteError, ViewsError
from ..images import INPUT, Example, example_of
from ..layouts import Layout, sides
from ..views import Views, hflip, ten_crop
from .fakes import on_fake_copy
from .reasons import why_not_cut, why_not_votable
from .strides import tail_stride
from .subclasses import why_not_swapped
from .trace import Trace, record_trace
from .trial import Split
from .verdicts import Site, judge, judge_site

__all__ = ["sites"]


def sites(
    model: nn.Module,
    input_size: int | tuple[int, ...] | None = None,
    *,
    views: ViewsOrName | None = None,
    all: bool = False,
) -> list[Site]:
    """Return the valid sites of a model, in the order in which its forward reaches them.

    Works on a fake copy: no weight is copied, nothing is computed, the model is left as it is. Modules that
    return the same tensor are one site, under its outermost name.

    Args:
        model: an image classifier that was not injected; looked at in its present mode.
        input_size: the image's size: a side, (H, W), or (C, H, W); needless for timm models, which carry one.
        views: the views to be used, or their name ("ten", "five", "hflip", "d4"); :func:`ten_crop` by default.
        all: also list the modules that are not valid sites, with the reason.

    Returns:
        One :class:`Site` per site.

    Raises:
        OptionError: no input size is known, or it is malformed.
        SurgeryError: the model does not run on images of that size.

    Example:
        >>> from torch import nn
        >>> from cropvote import sites
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
        >>> [(site.name, site.shape) for site in sites(net, 32)]
        [('input', (3, 32, 32)), ('0', (8, 30, 30)), ('1', (8, 30, 30))]
    """
    views, example = views_and_example(model, input_size, views)

    def look(fake: nn.Module) -> list[Site]:
        trace = record_trace(fake, example)
        return judge_sites(trace, candidates(trace, every=all), views)

    return [site for site in on_fake_copy(model, look) if all or not site.reason]


def views_and_example(
    model: nn.Module, input_size: int | tuple[int, ...] | None, views: ViewsOrName | None
) -> tuple[Views, Example]:
    """Return the views and the call meant by what a user asks about a model.

    Raises:
        InputTypeError: not a model, or not views.
        OptionError: no input size is known.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError("CV801", f"model must be an nn.Module, got {type(model).__name__}.")
    views = as_views(views)
    example = example_of(model, input_size)
    if example is None:
        raise OptionError(
            "CV802", "no input size is known for this model: pass input_size=, such as input_size=(3, 224, 224)."
        )
    return views, example


def judge_sites(trace: Trace, names: list[str], views: Views) -> list[Site]:
    """Return the sites of these names, each with the reason if it is invalid."""
    return judge_swaps(trace, [judge_site(trace, name, views) for name in names])


def judge_swaps(trace: Trace, rows: list[Site]) -> list[Site]:
    """Return the sites, those also with a reason whose classes the model does not let be swapped."""
    if not why_not_swapped(trace, [row.name for row in rows if not row.reason]):
        return rows
    return [row if row.reason else row._replace(reason=str(why_not_swapped(trace, [row.name]) or "")) for row in rows]


def refusal(trace: Trace, name: str, reason: Reason, views: Views) -> SiteError:
    """Return the error that a module is not a valid site, with valid ones."""
    nowhere = reason.code == "CV112" or why_not_votable(trace)
    advice = "" if nowhere else f" {_advice(trace, views)}"
    return SiteError(reason.code, f"after={name!r} cannot be a site: {reason.message}{advice}")


def check_sites(
    model: nn.Module,
    sites: Mapping[str, Views],
    stated: Mapping[str, Layout | None],
    example: Example,
    align: bool = False,
) -> tuple[frozenset[bool], list[Split]]:
    """Raise SiteError unless the sites are valid together in the model's present mode.

    With ``align``, the views are first aligned to the total stride of the network behind each site.

    Returns:
        The modes (``training``) in which they are, and the splits in forward order with the layouts of their maps. The
        other mode may take another path (auxiliary heads, say); it is checked again when it is first used.

    Raises:
        SiteError: with the reason, and the names of valid sites.
        ViewsError: the map at the site is too small for the views.
        PlainModelError: the model does not run on images of that size.
    """

    def check(fake: nn.Module) -> tuple[list[bool], list[Split]]:
        trace = record_trace(fake, example)
        chosen = {name: views.aligned(tail_stride(trace, name)) for name, views in sites.items()} if align else sites
        splits = checked_splits(trace, chosen, stated, explain=True)
        if align:
            check_aligned(trace, splits)
        modes = [model.training]
        with suppress(Exception):  # whatever it is, the other mode is not checked, and will be when it is used
            known = {split.site: (split.layout, trace.shape(split.site)) for split in splits}
            fake.train(not model.training)
            traced = record_trace(fake, example)
            other = judge(traced, chosen, stated, known)
            if not other.reason and other.splits == splits and not why_not_swapped(traced, list(chosen)):
                modes.append(not model.training)
        return modes, splits

    modes, splits = on_fake_copy(model, check)
    return frozenset(modes), splits


def check_aligned(trace: Trace, splits: list[Split]) -> None:
    """Raise ViewsError if a map is too small for crops on the grid of the network behind it."""
    for site, views, layout in splits:
        size = sides(trace.shape(site), layout)
        margins = [side - crop for side, crop in zip(size, views.crop_size(*size), strict=True)]
        if any(margin % views.stride for margin in margins):
            raise ViewsError(
                "CV214",
                f"align=True: the map at {site!r} is {size[0]}×{size[1]}, and the network behind it has a total stride "
                f"of {views.stride}, so no smaller crop lies on its grid: choose a later site or larger images, or "
                f"leave align out.",
            )


def checked_splits(
    trace: Trace, sites: Mapping[str, Views], stated: Mapping[str, Layout | None] | None = None, explain: bool = False
) -> list[Split]:
    """Return the splits at these sites in forward order.

    Raises:
        SiteError: with the reason, and the names of valid sites.
        ViewsError: the map at a site is too small for its views.
    """
    try:
        splits, reason = judge(trace, sites, stated, explain=explain)
    except ViewsError as error:
        where = f"after={' and '.join(map(repr, sites))} on {trace.describe_call()}"
        raise ViewsError(error.code, f"{where}: {error.message}") from error
    reason = reason or why_not_swapped(trace, list(sites))
    if reason:
        raise refusal(trace, splits[-1].site, reason, splits[-1].views)
    return splits


def candidates(trace: Trace, every: bool = False) -> list[str]:
    """Return the names worth a trial, in forward order: the input, and each tensor under its outermost name."""
    order = {module: i for i, module in enumerate(trace.returns)}
    names: dict[object, str] = {}
    for name in sorted(trace.modules, key=lambda n: (n.count("."), order.get(trace.modules[n], 0))):
        carrier = trace.carriers[name]
        if every:
            names[name] = name
        elif carrier in trace.returns and not why_not_cut(trace, name):
            names.setdefault(trace.returns[carrier].group, name)
    last = len(order)
    first = [] if INPUT in trace.modules else [INPUT]
    return first + sorted(names.values(), key=lambda n: order.get(trace.carriers[n], last))


def _advice(trace: Trace, views: Views, most: int = 8, tried: int = 40) -> str:
    """Return the outermost valid sites as text, for an error's end; a look at every module would take its time."""
    kind = type(trace.model).__name__
    names = candidates(trace)
    outermost = sorted(names, key=lambda n: n.count("."))
    valid: list[str] = []
    for name in outermost[:tried]:
        if len(valid) <= most and not judge_site(trace, name, views).reason:
            valid.append(name)
    if valid:
        more = ", ..." if len(valid) > most or len(outermost) > tried else ""
        shown = sorted(valid[:most], key=names.index)
        return f"Valid sites: {', '.join(shown)}{more} (all of them: cropvote.sites(model, input_size))."
    if len(outermost) > tried:
        return f"None of the {tried} outermost modules of this {kind} is valid: see cropvote.sites(model, all=True)."
    for other, text in ((hflip(), "views=hflip()"), (ten_crop(scale=Fraction(1, 2)), "views=ten_crop(scale=1/2)")):
        fitting = [name for name in outermost if not judge_site(trace, name, other).reason][:most]
        if fitting:
            return f"No site of this {kind} is valid for these views; {text} are valid at {', '.join(fitting)}."
    return f"No site of this {kind} is valid for these views, nor for views=hflip()."
