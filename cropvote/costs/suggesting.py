"""The earliest site, or plan over two sites, whose cost is within a budget."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import NamedTuple

from torch import nn

from ..errors import OptionError, SiteError, ViewsError
from ..layouts import Tokens, sides
from ..plans import After
from ..probing.fakes import on_fake_copy
from ..probing.probe import asked_of, candidates, checked_plan
from ..probing.trials import Split
from ..probing.verdicts import Probe, Site
from ..probing.walk import INPUT
from ..views import Views, hflip
from .meters import Meter, SiteCost

__all__ = ["Suggestion", "suggest_site"]

#: Behind a site with less of the network's work (a pooling and a linear layer) the vote is another way of pooling.
LEAST_TAIL = 0.01


class Suggestion(NamedTuple):
    """What :func:`suggest_site` advises.

    Fields:
        site: the site's name, or a plan over two sites, for ``inject_crop_vote(model, after=...)``.
        reason: why, in a sentence.
        cost: its row of the table.
    """

    site: After
    reason: str
    cost: SiteCost


def suggest_site(
    model: nn.Module,
    input_size: int | tuple[int, ...] | None = None,
    *,
    max_macs_ratio: float | None = None,
    max_memory_mib: float | None = None,
    views: Views | None = None,
    max_sites: int = 1,
) -> Suggestion:
    """The earliest valid site inside the network whose cost is within a budget.

    The earlier the split, the more accurate and the dearer, in the paper's experiments. The images themselves are no
    suggestion: ``after="input"`` is test-time augmentation, at the price of every view. Nor is a site with less than
    1 % of the work behind it, where the views have hardly a way to differ. Of sites that follow each other at the same
    work and shape (a convolution, its norm, its activation; a map and the tokens made of it) it is the last.

    Args:
        model: an image classifier that was not injected.
        input_size: the image's size: a side, (H, W), or (C, H, W); needless for timm models, which carry one.
        max_macs_ratio: at most so many times the plain network's multiply-adds.
        max_memory_mib: at most so many MiB kept per image for the backward pass.
        views: the views, :func:`ten_crop` by default.
        max_sites: with 2, also plans that mirror the map at the site and cut the crops at a later one, where the budget
            does not allow all views at once; views that are not crops and their mirror images have no such plan, nor
            has a site of tokens.

    Returns:
        A :class:`Suggestion`: the site or plan, the reason, and its cost.

    Raises:
        SiteError: no site fits; the message names the cheapest.
        OptionError: no budget, or no input size is known.
        SurgeryError: the model does not run on such an input.

    Example:
        >>> import torchvision
        >>> from cropvote import suggest_site
        >>> suggest_site(torchvision.models.resnet18(), 64, max_macs_ratio=4).site
        'layer3.0'
    """
    budget = _budget(max_macs_ratio, max_memory_mib)
    views, example = asked_of(model, input_size, views)
    if max_sites not in (1, 2) or isinstance(max_sites, bool):
        raise OptionError(f"max_sites must be 1 or 2, got {max_sites!r}.")
    halves = _mirrored_halves(views) if max_sites == 2 else None
    found, dearer = on_fake_copy(model, lambda fake: _search(Meter(Probe(fake, example, views, None)), budget, halves))
    asked = " and ".join(f"{limit:g} {UNIT[field]}" for field, limit in budget.items())
    if found is None:
        raise SiteError(_none_fits(type(model).__name__, asked, budget, dearer, len(views)))
    after, cost = found
    before = f"; {dearer[-1].site!r}, {'before it' if isinstance(after, str) else 'alone'}, has " if dearer else ""
    what = "the earliest site that costs" if isinstance(after, str) else "the earliest plan over two sites that costs"
    reason = f"{what} at most {asked}: it has {_in_words(cost)}{before + _in_words(dearer[-1]) if dearer else ''}"
    if len(cost.shape) == 2 and any(view.mirror for view in views.entries):
        reason += (
            "; where attention does not see the order of tokens, their mirror images say the same: see five_crop()"
        )
    return Suggestion(after, reason, cost)


def _budget(max_macs_ratio: float | None, max_memory_mib: float | None) -> dict[str, float]:
    """The limits that are set, by the field of :class:`SiteCost` that they limit."""
    limits = {"ratio": max_macs_ratio, "train_memory_mib": max_memory_mib}
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    if not budget:
        raise OptionError("suggest_site needs a budget: max_macs_ratio=, max_memory_mib=, or both.")
    for name, limit in budget.items():
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            asked = "max_macs_ratio" if name == "ratio" else "max_memory_mib"
            raise OptionError(f"{asked} must be a number above 0, got {limit!r}.")
    return budget


def _search(
    meter: Meter, budget: dict[str, float], halves: tuple[Views, Views] | None
) -> tuple[tuple[After, SiteCost] | None, list[SiteCost]]:
    """The first site or plan within the budget, and the costs of the dearer sites before it."""
    names = [name for name in candidates(meter.probe) if name != INPUT]
    dearer: list[SiteCost] = []
    for place, name in enumerate(names):
        site = meter.probe.site(name)
        if site.reason or meter.cost(site).tail_share < LEAST_TAIL:
            continue
        cost = meter.cost(site)
        if _fits(cost, budget):
            for equal in reversed(_of_equal_work(meter, names[place:])):
                cost = meter.cost(meter.probe.site(equal))
                if _fits(cost, budget) and not meter.probe.why_not_swapped([equal]):
                    return (equal, cost), dearer
            continue
        dearer.append(cost)
        found = halves and _cut_later(meter, names[place:], halves, budget)
        if found:
            return found, dearer
    return None, dearer


def _none_fits(kind: str, asked: str, budget: dict[str, float], dearer: list[SiteCost], total: int) -> str:
    """The message that no site is within the budget."""
    if not dearer:
        return (
            f"no site inside this {kind} is valid for these views and has work behind it: see cropvote.sites(model, "
            f"all=True)."
        )
    cheapest = min(dearer, key=lambda cost: tuple(getattr(cost, field) for field in budget))
    fewer = " or ".join(f"views={name}" for name, count in {"five_crop()": 5, "hflip()": 2}.items() if count < total)
    advice = f" Fewer views cost less: {fewer}." if fewer else ""
    return (
        f"no site of this {kind} costs at most {asked}; the cheapest is {cheapest.site!r}, with "
        f"{_in_words(cheapest)}.{advice}"
    )


def _of_equal_work(meter: Meter, names: list[str]) -> list[str]:
    """The first site and those that follow with its work and shape, such as a convolution's norm and activation.

    Crops commute with what works element by element, so the views are the same there, and less memory is kept. A map's
    tokens are of its shape: behind their positions every view has those of its place, before them of a whole image.
    """
    start = meter.probe.site(names[0])
    first, found = meter.cost(start), list[str]()
    for name in names:
        site = meter.probe.site(name)
        if site.reason:
            continue
        cost = meter.cost(site)
        if cost.ratio != first.ratio or _extent(site) != _extent(start):
            break
        found.append(name)
    return found


def _extent(site: Site) -> tuple[tuple[int, ...], int]:
    """The sides of a site's map and its channels, whatever its layout."""
    return sides(site.shape, site.layout), site.shape[0 if site.layout == "NCHW" else -1]


def _fits(cost: SiteCost, budget: dict[str, float]) -> bool:
    return all(getattr(cost, field) <= limit for field, limit in budget.items())


def _mirrored_halves(views: Views) -> tuple[Views, Views] | None:
    """The mirroring and the crops, where the views are some crops and then the same ones of the mirrored map."""
    half = views.entries[: len(views) // 2]
    if any(view.mirror for view in half) or (*half, *(view._replace(mirror=True) for view in half)) != views.entries:
        return None
    return hflip(), Views(half, scale=views.scale)


def _cut_later(
    meter: Meter, names: list[str], halves: tuple[Views, Views], budget: dict[str, float]
) -> tuple[After, SiteCost] | None:
    """The plan that mirrors at the first of the names and crops as early behind it as the budget allows.

    None on tokens, whose order plain attention does not see, so that their mirror images would say the same; nor on the
    map that they are made of, in front of their positions. The earlier the crops, the dearer: the place is found by
    bisection, once the last one is within the budget.
    """
    first, later = meter.probe.site(names[0]), names[1:]

    def cost(crops: str) -> SiteCost:
        site = meter.probe.site(crops)
        return meter.cost_of([Split(first.name, halves[0], first.layout), Split(crops, halves[1], site.layout)])

    mirrors = _of_equal_work(meter, names)
    if any(_on_tokens(meter, name) for name in mirrors):
        return None
    last = next((place for place in reversed(range(len(later))) if _has_a_tail(meter, later[place])), None)
    if last is None or not _fits(cost(later[last]), budget):
        return None
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        usable = next((place for place in range(middle, high) if _all_differ(meter, later[place])), None)
        if usable is None or _fits(cost(later[usable]), budget):
            high = middle
        else:
            low = usable + 1
    for place in range(high, last + 1):
        if not _all_differ(meter, later[place]):
            continue
        crops, before = _of_equal_work(meter, later[place:]), [name for name in mirrors if name not in later[place:]]
        for pair in itertools.product(reversed(before), reversed(crops)):
            plan = dict(zip(pair, halves, strict=True))
            with suppress(SiteError, ViewsError):
                found = meter.cost_of(checked_plan(meter.probe, plan))
                if _fits(found, budget):
                    return plan, found
    return None


def _has_a_tail(meter: Meter, name: str) -> bool:
    """Whether all views differ there, and work enough follows."""
    return _all_differ(meter, name) and meter.cost(meter.probe.site(name)).tail_share >= LEAST_TAIL


def _on_tokens(meter: Meter, name: str) -> bool:
    return isinstance(meter.probe.site(name).layout, Tokens)


def _all_differ(meter: Meter, name: str) -> bool:
    """Whether it is a valid site, with a map large enough that no two of the views are the same."""
    site = meter.probe.site(name)
    return not site.reason and site.distinct == len(meter.views)


UNIT = {"ratio": "times the plain multiply-adds", "train_memory_mib": "MiB per image in training"}


def _in_words(cost: SiteCost) -> str:
    return f"{cost.ratio:.4g} times the plain multiply-adds and {cost.train_memory_mib:.2f} MiB per image in training"
