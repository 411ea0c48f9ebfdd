"""The earliest site whose cost is within a budget."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..cuts import ViewsOrName
from ..errors import OptionError, SiteError
from ..images import INPUT
from ..layouts import sides
from ..probe.fakes import on_fake_copy
from ..probe.sites import candidates, views_and_example
from ..probe.subclasses import why_not_swapped
from ..probe.trace import record_trace
from ..probe.verdicts import Site, judge_site
from .meters import Meter, SiteCost

__all__ = ["Suggestion", "suggest_site"]

#: Behind a site with less of the network's work (a pooling and a linear layer) the vote is another way of pooling.
LEAST_TAIL = 0.01


class Suggestion(NamedTuple):
    """What :func:`suggest_site` advises.

    Fields:
        site: the site's name, for ``inject_crop_vote(model, after=...)``.
        reason: why, in a sentence.
        cost: its row of the table.
    """

    site: str
    reason: str
    cost: SiteCost


def suggest_site(
    model: nn.Module,
    input_size: int | tuple[int, ...] | None = None,
    *,
    max_macs_ratio: float | None = None,
    max_memory_mib: float | None = None,
    views: ViewsOrName | None = None,
) -> Suggestion:
    """Return the earliest valid site inside the network whose cost is within a budget.

    In the paper's experiments, an earlier split is more accurate and more expensive. The images themselves are not
    suggested: ``after="input"`` is test-time augmentation, at the price of every view. Nor is a site with less than
    1 % of the work behind it, where the views have hardly a way to differ. Of sites that follow each other at the same
    work and shape (a convolution, its norm, its activation; a map and the tokens made of it) it is the last.

    Args:
        model: an image classifier that was not injected.
        input_size: the image's size: a side, (H, W), or (C, H, W); needless for timm models, which carry one.
        max_macs_ratio: at most this many times the plain network's multiply-adds.
        max_memory_mib: at most this many MiB kept per image for the backward pass.
        views: the views or their name, :func:`ten_crop` by default.

    Returns:
        A :class:`Suggestion`: the site, the reason, and its cost.

    Raises:
        SiteError: no site fits; the message names the cheapest.
        OptionError: no budget, or no input size is known.
        SurgeryError: the model does not run on images of that size.

    Example:
        >>> import torchvision
        >>> from cropvote import suggest_site
        >>> suggest_site(torchvision.models.resnet18(), 64, max_macs_ratio=4).site
        'layer3.0'
    """
    budget = _budget(max_macs_ratio, max_memory_mib)
    views, example = views_and_example(model, input_size, views)
    found, costlier = on_fake_copy(model, lambda fake: _search(Meter(record_trace(fake, example), views), budget))
    asked = " and ".join(f"{limit:g} {UNIT[field]}" for field, limit in budget.items())
    if found is None:
        raise SiteError("CV151", _none_fits(type(model).__name__, asked, budget, costlier, len(views)))
    site, cost = found
    before = f"; {costlier[-1].site!r}, before it, has {_format_cost(costlier[-1])}" if costlier else ""
    reason = f"{site!r} is the earliest site that costs at most {asked}: it has {_format_cost(cost)}{before}"
    if cost.distinct < len(views):
        reason += f"; on so small a map only {cost.distinct} of the {len(views)} views differ"
    if len(cost.shape) == 2 and any(view.mirror for view in views.entries):
        reason += (
            "; where attention does not see the order of tokens, their mirror images say the same: see five_crop()"
        )
    return Suggestion(site, reason, cost)


def _budget(max_macs_ratio: float | None, max_memory_mib: float | None) -> dict[str, float]:
    """Return the limits that were given, by the field of :class:`SiteCost` that they limit."""
    limits = {"ratio": max_macs_ratio, "train_memory_mib": max_memory_mib}
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    if not budget:
        raise OptionError("CV820", "suggest_site needs a budget: max_macs_ratio=, max_memory_mib=, or both.")
    for name, limit in budget.items():
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            asked = "max_macs_ratio" if name == "ratio" else "max_memory_mib"
            raise OptionError("CV821", f"{asked} must be a number above 0, got {limit!r}.")
    return budget


def _search(meter: Meter, budget: dict[str, float]) -> tuple[tuple[str, SiteCost] | None, list[SiteCost]]:
    """Return the first site within the budget, and the costs of the costlier sites before it."""
    names = [name for name in candidates(meter.trace) if name != INPUT]
    costlier: list[SiteCost] = []
    for i, name in enumerate(names):
        site = judge_site(meter.trace, name, meter.views)
        if site.reason or meter.cost(site).tail_share < LEAST_TAIL:
            continue
        cost = meter.cost(site)
        if _fits(cost, budget):
            for equal in reversed(_of_equal_work(meter, names[i:])):
                cost = meter.cost(judge_site(meter.trace, equal, meter.views))
                if _fits(cost, budget) and not why_not_swapped(meter.trace, [equal]):
                    return (equal, cost), costlier
            continue
        costlier.append(cost)
    return None, costlier


def _none_fits(kind: str, asked: str, budget: dict[str, float], costlier: list[SiteCost], total: int) -> str:
    """Return the message that no site is within the budget."""
    if not costlier:
        return (
            f"no site inside this {kind} is valid for these views and has work behind it: see cropvote.sites(model, "
            f"all=True)."
        )
    cheapest = min(costlier, key=lambda cost: tuple(getattr(cost, field) for field in budget))
    fewer = " or ".join(f"views={name}" for name, count in {"five_crop()": 5, "hflip()": 2}.items() if count < total)
    advice = f" Fewer views cost less: {fewer}." if fewer else ""
    return (
        f"no site of this {kind} costs at most {asked}; the cheapest is {cheapest.site!r}, with "
        f"{_format_cost(cheapest)}.{advice}"
    )


def _of_equal_work(meter: Meter, names: list[str]) -> list[str]:
    """Return the first site and the next ones of equal work and shape, such as a convolution's norm and activation.

    Crops commute with what works element by element, so the views are the same there, and less memory is kept. A map's
    tokens are of its shape: behind their positions every view has those of its place, before them of a whole image.
    """
    start = judge_site(meter.trace, names[0], meter.views)
    first, found = meter.cost(start), list[str]()
    for name in names:
        site = judge_site(meter.trace, name, meter.views)
        if site.reason:
            continue
        cost = meter.cost(site)
        if cost.ratio != first.ratio or _extent(site) != _extent(start):
            break
        found.append(name)
    return found


def _extent(site: Site) -> tuple[tuple[int, ...], int]:
    """Return the sides and the channels of a site's map."""
    return sides(site.shape, site.layout), site.shape[0 if site.layout == "NCHW" else -1]


def _fits(cost: SiteCost, budget: dict[str, float]) -> bool:
    return all(getattr(cost, field) <= limit for field, limit in budget.items())


UNIT = {"ratio": "times the plain multiply-adds", "train_memory_mib": "MiB per image in training"}


def _format_cost(cost: SiteCost) -> str:
    return f"{cost.ratio:.4g} times the plain multiply-adds and {cost.train_memory_mib:.2f} MiB per image in training"
