"""What a split costs at each site: work, memory and, on request, time, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cuts import After, ViewsOrName
from ..errors import InputTypeError, OptionError, SiteError
from ..images import INPUT
from ..layouts import Layout
from ..probe.fakes import on_fake_copy
from ..probe.reasons import why_not_votable
from ..probe.sites import check_aligned, checked_splits, judge_sites, views_and_example
from ..probe.strides import tail_stride
from ..probe.trace import record_trace
from ..probe.verdicts import Site
from ..progress import shown
from ..surgery.arguments import check_name, sites_after
from ..views import Views
from .meters import BASELINE, Meter, SiteCost, image_size
from .stages import LEAST_TAIL, list_every_site, list_stages
from .timing import measure_times

__all__ = ["Profile", "profile"]


class Profile:
    """The table that :func:`profile` makes: ``print`` it, or take its ``rows``.

    Fields:
        model: the class name of the model.
        input_size: the image's (C, H, W).
        views: the views.
        align: whether they were aligned to the stride behind each site.
        rows: one :class:`SiteCost` each: the baseline, the input, then the sites in forward order.

    Example:
        >>> import torchvision
        >>> from cropvote import profile
        >>> table = profile(torchvision.models.resnet18(), (3, 64, 64), sites=["layer1", "layer3"])
        >>> table["layer3"].ratio < table["layer1"].ratio
        True
    """

    def __init__(
        self, model: str, input_size: tuple[int, ...], views: Views, rows: list[SiteCost], align: bool = False
    ) -> None:
        self.model, self.input_size, self.views, self.rows = model, tuple(input_size), views, rows
        self.align = align

    def __getitem__(self, site: str) -> SiteCost:
        """Return the row of a site.

        Raises:
            OptionError: no such row.
        """
        for row in self.rows:
            if row.site == site:
                return row
        raise OptionError("CV822", f"the table has no row {site!r}; it has {', '.join(row.site for row in self.rows)}.")

    def __iter__(self) -> Iterator[SiteCost]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for line in cells:
            name, shape, *figures = line
            parts = [name.ljust(widths[0]), shape.ljust(widths[1])]
            parts += [figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True)]
            lines.append("  ".join(parts).rstrip())
        return "\n".join([self.title(), "", *lines, "", *self._notes()])

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        head, *cells = self._cells()
        ruler = ["---", "---", *["---:"] * (len(head) - 2)]
        lines = [f"| {' | '.join(line)} |" for line in (head, ruler, *cells)]
        return "\n".join([f"{self.title()}.", "", *lines, "", *self._notes()])

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain lists, numbers and strings, for JSON."""
        rows = [row_of(row) for row in self.rows]
        size = list(self.input_size)
        return {"model": self.model, "input_size": size, "views": len(self.views), "align": self.align, "rows": rows}

    def plot(self, path: str | Path) -> None:
        """Draw cost against training memory, a point per site, into a file (.png, .svg, .pdf).

        Raises:
            MissingExtraError: matplotlib is not installed.
            OptionError: a path where no picture can be written.
        """
        from ..plots import plot_profile

        plot_profile(self, path)

    def title(self) -> str:
        """Return the model, the images and the views as text."""
        size = "×".join(map(str, self.input_size))
        aligned = " aligned to the stride behind each site" * self.align
        return f"{self.model}, images {size}, {len(self.views)} views{aligned}, per image"

    def _notes(self) -> list[str]:
        """Return what the columns mean, and at which sites views have no effect or coincide."""
        notes, rows = [UNITS], [row for row in self.rows if row.site != BASELINE]
        if late := [row.site for row in rows if row.tail_share < LEAST_TAIL]:
            notes.append(
                f"Less than 1 % of the work is behind {', '.join(late)}: views change little there, and before a "
                f"global pooling a mirror image (hflip) changes nothing."
            )
        if alike := [row.site for row in rows if row.distinct < max(row.gmacs_by_views, default=0)]:
            notes.append(f"Some views are the same crop (see distinct) on the small map of {', '.join(alike)}.")
        tokens = [row.site for row in rows if len(row.shape) == 2]
        if tokens and any(view.mirror for view in self.views.entries):
            notes.append(
                f"{tokens[0] if len(tokens) == 1 else f'{tokens[0]} to {tokens[-1]}'}: attention that does not see the "
                f"order of tokens makes the same of mirror images; five_crop() then does for half the work."
            )
        return notes

    def _cells(self) -> list[list[str]]:
        counts = sorted({count for row in self.rows for count in row.gmacs_by_views} - {len(self.views)})
        timed = any(row.milliseconds is not None for row in self.rows)
        few = [f"{count} view{'s' * (count > 1)}" for count in counts]
        head = ["site", "shape", "GMACs", "ratio", *few, "train MiB", "peak MiB", "parameters", "tail", "distinct"]
        cells = [head + ["ms"] * timed]
        for row in self.rows:
            by_views = [f"{row.gmacs_by_views[n]:.3f}" if n in row.gmacs_by_views else "" for n in counts]
            cells.append(
                [
                    row.site,
                    "×".join(map(str, row.shape)),
                    f"{row.gmacs:.3f}",
                    f"{row.ratio:.2f}",
                    *by_views,
                    f"{row.train_memory_mib:.2f}",
                    f"{row.inference_peak_mib:.2f}",
                    f"{row.parameters:,}",
                    f"{row.tail_share:.0%}",
                    "" if row.site == BASELINE else str(row.distinct),
                    *([f"{row.milliseconds:.2f}"] if timed and row.milliseconds is not None else [""] * timed),
                ]
            )
        return cells


def row_of(cost: SiteCost) -> dict[str, Any]:
    """Return a row as plain lists, numbers and strings, for JSON."""
    row = cost._asdict()
    row["shape"] = list(row["shape"])
    row.update({name: None for name, value in row.items() if value != value})  # NaN, which JSON does not know
    row["gmacs_by_views"] = {str(count): gmacs for count, gmacs in row["gmacs_by_views"].items()}
    return row


UNITS = (
    "GMACs: 1e9 multiply-adds, for all views and for fewer (eval_views). train MiB: kept for the backward pass. "
    "peak MiB: largest sum of live activations at inference. tail: share of the plain network's work behind the site."
)


def profile(
    model: nn.Module,
    input_size: int | tuple[int, ...] | None = None,
    sites: Sequence[After] | None = None,
    views: ViewsOrName | None = None,
    *,
    every_site: bool = False,
    align: bool = False,
    measure: bool = False,
    device: str | torch.device | None = None,
    batch: int = 8,
    rounds: int = 7,
    progress: bool = True,
) -> Profile:
    """Count what a split costs after each stage, beside the plain network and a split of the images.

    Counted on a fake copy, without the weights' memory and without running anything; the model is left as it is. The
    work is PyTorch's own count of floating-point operations (``torch.utils.flop_counter``), halved; what it does not
    count (activations, norms, poolings) does not appear. It is counted for the device that the model is on, which
    decides what PyTorch's attention keeps for the backward pass (most of all on the meta device). With ``measure=True``
    the networks also run, on random images.

    Args:
        model: an image classifier that was not injected.
        input_size: the image's size: a side, (H, W), or (C, H, W); needless for timm models, which carry one.
        sites: only these sites, by name; by default the stages: the outermost valid sites, of those that follow each
            other at equal work and shape the last. Several sites together, as ``after`` of :func:`inject_crop_vote`
            takes them, are a row too.
        views: the views or their name, :func:`ten_crop` by default.
        every_site: list every valid site instead of the stages.
        align: align the views to the total stride behind each site, as ``inject_crop_vote(align=True)`` does; sites
            without an aligned crop are left out.
        measure: also measure milliseconds per image, in eval mode: the median of rounds that take turns.
        device: where to measure; where the model is by default.
        batch: how many images to measure with.
        rounds: how many rounds to measure.
        progress: show a progress bar once it takes longer than a second, if tqdm is installed.

    Returns:
        A :class:`Profile` with one row per site.

    Raises:
        SiteError: one of ``sites`` is not a valid site, with the reason; or no site is.
        ViewsError: the map at one of them is too small for the views.
        UnknownSiteError: the model has no module of that name.
        OptionError: no input size is known, or it is malformed.
        SurgeryError: the model does not run on images of that size.
        InputTypeError: an argument of the wrong type.

    Example:
        >>> from torch import nn
        >>> from cropvote import profile
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
        >>> [(row.site, round(row.ratio, 2)) for row in profile(net, 32)]
        [('baseline', 1.0), ('input', 6.95), ('1', 1.0)]

    Reference:
        Table 2 of Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, whose "forward pass" and "GFLOPs" are
        ``train_memory_mib`` and ``gmacs``.
    """
    views, example = views_and_example(model, input_size, views)
    if sites is not None and not isinstance(sites, (str, Mapping, Sequence)):
        raise InputTypeError("CV823", f"sites must be names or plans, in a list, got {sites!r}.")
    rows_wanted: list[After] = [] if sites is None else [sites] if isinstance(sites, (str, Mapping)) else list(sites)
    names = [after for after in rows_wanted if isinstance(after, str)]
    plans = [sites_after(model, after) for after in rows_wanted if not isinstance(after, str)]
    for name in names:
        check_name(model, name)

    def count(fake: nn.Module) -> list[tuple[SiteCost, After, Layout | None]]:
        trace = record_trace(fake, example)
        meter = Meter(trace, views, align)
        if sites is None:
            listed = list_every_site(meter, progress) if every_site else list_stages(meter, progress)
            if not listed:
                why = why_not_votable(trace) or "see cropvote.sites(model, all=True)."
                raise SiteError("CV150", f"no site of this {type(model).__name__} is valid: {why}")
        else:
            listed = [row for site in dict.fromkeys([INPUT, *names]) for row in _named(meter, site, site in names)]
        rows: list[tuple[SiteCost, After, Layout | None]] = [(cost, site.name, site.layout) for site, cost in listed]
        for plan in shown(plans, "plans", "plan", progress):
            chosen = {name: views.aligned(tail_stride(trace, name)) for name, views in plan.items()} if align else plan
            rows.append((meter.cost_of(checked_splits(trace, chosen)), chosen, None))
        return [(meter.baseline, "", None), *rows]

    rows = on_fake_copy(model, count)
    costs = [cost for cost, _, _ in rows]
    if measure:
        places = [(after, layout) for _, after, layout in rows[1:]]
        times = measure_times(model, example, views, align, places, device, batch, rounds)
        costs = [cost._replace(milliseconds=time) for cost, time in zip(costs, times, strict=True)]
    return Profile(type(model).__name__, image_size(example), views, costs, align)


def _named(meter: Meter, name: str, asked: bool) -> list[tuple[Site, SiteCost]]:
    """Return a site and its cost in a list, which is empty if it is not valid and was not ``asked`` for.

    Raises:
        SiteError: a site that was asked for is not valid.
        ViewsError: its map is too small for the views.
    """
    views = meter.views_at(name)
    [site] = judge_sites(meter.trace, [name], views)
    if not asked and site.reason:
        return []
    splits = checked_splits(meter.trace, {name: views})
    if asked and meter.align:
        check_aligned(meter.trace, splits)
    return [(site, meter.cost(site))]
