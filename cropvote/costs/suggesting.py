"""The earliest stage whose cost is within a budget."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..cuts import ViewsOrName
from ..errors import OptionError, SiteError
from ..images import INPUT
from ..probe.fakes import on_fake_copy
from ..probe.sites import views_and_example
from ..probe.trace import record_trace
from .meters import Meter, SiteCost
from .stages import LEAST_TAIL, last_of_equals, list_every_site, list_stages

__all__ = ["Suggestion", "suggest_site"]


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
    every_site: bool = False,
    align: bool = False,
    progress: bool = True,
) -> Suggestion:
    """Return the earliest stage of the network whose cost is within a budget.

    In the paper's experiments, an earlier split is more accurate and more expensive. The images themselves are not
    suggested: ``after="input"`` is test-time augmentation, at the price of every view. Nor is a site with less than
    1 % of the work behind it: views hardly differ there, and before a global pooling mirror images do not differ at
    all.

    Args:
        model: an image classifier that was not injected.
        input_size: the image's size: a side, (H, W), or (C, H, W); needless for timm models, which carry one.
        max_macs_ratio: at most this many times the plain network's multiply-adds.
        max_memory_mib: at most this many MiB kept per image for the backward pass.
        views: the views or their name, :func:`ten_crop` by default.
        every_site: consider every valid site instead of the stages, see :func:`profile`.
        align: for views that are aligned, as ``inject_crop_vote(align=True)`` does.
        progress: show a progress bar once it takes longer than a second, if tqdm is installed.

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
        'layer3'
    """
    budget = _budget(max_macs_ratio, max_memory_mib)
    views, example = views_and_example(model, input_size, views)

    def list_costs(fake: nn.Module) -> list[SiteCost]:
        meter = Meter(record_trace(fake, example), views, align)
        rows = last_of_equals(list_every_site(meter, progress)) if every_site else list_stages(meter, progress)
        return [cost for site, cost in rows if site.name != INPUT and cost.tail_share >= LEAST_TAIL]

    costs = on_fake_copy(model, list_costs)
    fitting = [i for i, cost in enumerate(costs) if all(getattr(cost, field) <= budget[field] for field in budget)]
    limits = " and ".join(f"{limit:g} {UNIT[field]}" for field, limit in budget.items())
    if not fitting:
        raise SiteError("CV151", _none_fits(type(model).__name__, limits, budget, costs, len(views)))
    cost, costlier = costs[fitting[0]], costs[: fitting[0]]
    site = cost.site
    before = f"; {costlier[-1].site!r}, before it, has {_format_cost(costlier[-1])}" if costlier else ""
    kind = "site" if every_site else "stage"
    reason = f"{site!r} is the earliest {kind} that costs at most {limits}: it has {_format_cost(cost)}{before}"
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


def _none_fits(kind: str, limits: str, budget: dict[str, float], costlier: list[SiteCost], total: int) -> str:
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
        f"no site of this {kind} costs at most {limits}; the cheapest is {cheapest.site!r}, with "
        f"{_format_cost(cheapest)}.{advice}"
    )


UNIT = {"ratio": "times the plain multiply-adds", "train_memory_mib": "MiB per image in training"}


def _format_cost(cost: SiteCost) -> str:
    return f"{cost.ratio:.4g} times the plain multiply-adds and {cost.train_memory_mib:.2f} MiB per image in training"
