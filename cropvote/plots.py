"""Pictures: cost against memory, the views of an image with what each says, and how far the views agree.

matplotlib is imported when a picture is drawn, and at no other time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cuts import parts_of
from .errors import InputTypeError, MissingExtraError, OptionError, RowsError
from .reading import per_view, settings_in
from .splitting import split_views
from .uncertainty import agreement
from .voting import vote

__all__ = ["plot_agreement", "plot_views"]

SUFFIXES = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY = "#3b7dd8", "#e8853d", "#8a8f98"


def plot_views(
    model: nn.Module, image: Tensor, path: str | Path, *, classes: Sequence[str] | None = None, denormalise: Any = None
) -> None:
    """Draw the views of one image, with the class that each of them chose, and the vote.

    The windows are drawn on the image, at the places that the views have on the map at the site.

    Args:
        model: an injected model in eval mode, see :func:`per_view`.
        image: one image, (C, H, W), as the model takes it.
        path: the file, .png, .svg or .pdf.
        classes: the names of the classes; their indices otherwise.
        denormalise: a function from such an image to one of values 0 to 1; by default its least and greatest values
            are taken for 0 and 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputTypeError: ``image`` is not one image, (C, H, W).
        OptionError: not as many names as classes, or a path where no picture can be written.

    Example:
        >>> import torch, torchvision
        >>> from cropvote import inject_crop_vote
        >>> from cropvote.plots import plot_views
        >>> model = inject_crop_vote(torchvision.models.resnet18(num_classes=7), after="layer1", input_size=64).eval()
        >>> plot_views(model, torch.rand(3, 64, 64), "views.png")
    """
    check_path(path)
    figure_of = _figures()
    if not isinstance(image, Tensor) or image.dim() != 3:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputTypeError("CV840", f"plot_views takes one image, a tensor (C, H, W), got {found}.")
    with torch.no_grad():
        logits = per_view(model, image[None])
    names = _names(classes, logits.shape[2])
    if logits.shape[2] == 1:
        raise RowsError("CV604", "plot_views shows the class that every view chose, and the model has one output.")
    rule, views = settings_in(model).vote, settings_in(model).views
    shown = _drawable(image, denormalise)[None]
    for part in parts_of(views):
        shown = split_views(shown, part)
    columns = min(len(views), 5)
    rows = -(-len(views) // columns)
    figure = figure_of((1.9 * columns, 2.25 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    chosen = int(vote(logits[0], len(views), rule).argmax())
    shares = logits[0].float().softmax(1)
    for axis in axes:
        axis.set_axis_off()
    for axis, view, share in zip(axes, shown, shares, strict=False):
        best = int(share.argmax())
        axis.imshow(view.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{names[best]} {share[best]:.0%}", fontsize=10, color=BLUE if best == chosen else ORANGE)
    agreeing = int((shares.argmax(1) == chosen).sum())
    figure.suptitle(f"vote: {names[chosen]}, the choice of {agreeing} of {len(views)} views", fontsize=11)
    figure.savefig(path, dpi=150)


def plot_agreement(logits: Tensor, path: str | Path, *, targets: Tensor | None = None) -> None:
    """Draw how many of a batch's samples have how many of their views agree.

    Args:
        logits: every view's logits, (N, V, K), as :func:`per_view` gives them.
        path: the file, .png, .svg or .pdf.
        targets: the classes, (N,), to tell the samples whose vote is right from the others.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputTypeError: ``targets`` are not one class per sample, or ``logits`` is not a floating-point tensor.
        RowsError: ``logits`` is not (N, V, K).
        OptionError: a path where no picture can be written.

    Example:
        >>> import torch
        >>> from cropvote.plots import plot_agreement
        >>> plot_agreement(torch.randn(50, 10, 7), "agreement.png", targets=torch.randint(7, (50,)))
    """
    check_path(path)
    figure_of = _figures()
    shares = agreement(logits)
    samples, count = logits.shape[:2]
    if targets is not None and (not isinstance(targets, Tensor) or targets.shape != (samples,)):
        raise InputTypeError("CV841", f"targets must be a tensor of {samples} classes, one per sample.")
    agreeing = (shares * count).round().long().cpu()
    figure = figure_of((5.6, 3.4))
    axes = figure.subplots()
    groups = [("samples", torch.ones(samples, dtype=torch.bool), BLUE)]
    if targets is not None:
        right = (vote(logits.flatten(0, 1), count).argmax(1) == targets).cpu()
        groups = [("vote right", right, BLUE), ("vote wrong", ~right, ORANGE)]
    base = torch.zeros(count)
    for name, mask, colour in groups:
        heights = torch.bincount(agreeing[mask], minlength=count + 1)[1:].float()
        axes.bar(range(1, count + 1), heights.tolist(), bottom=base.tolist(), color=colour, label=name)
        base = base + heights
    axes.set(xlabel=f"views that agree with the majority, of {count}", ylabel="samples")
    axes.set_xticks(range(1, count + 1))
    if targets is not None:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_profile(table: Any, path: str | Path) -> None:
    """Draw cost against memory, a point per site: what :meth:`Profile.plot` does."""
    check_path(path)
    figure = _figures()((6.4, 4.2))
    axes = figure.subplots()
    plain, *sites = table.rows
    xs, ys = [row.gmacs for row in sites], [row.train_memory_mib for row in sites]
    axes.plot(xs, ys, "-o", color=BLUE, linewidth=1, markersize=5)
    axes.plot([plain.gmacs], [plain.train_memory_mib], "s", color=ORANGE, markersize=7)
    shown: list[tuple[float, float]] = []
    width, height = max([*xs, plain.gmacs]), max([*ys, plain.train_memory_mib])
    for row in (plain, *sorted(sites, key=lambda row: row.site.count("."))):
        place = (row.gmacs / width, row.train_memory_mib / height)
        if all(abs(place[0] - x) > 0.12 or abs(place[1] - y) > 0.05 for x, y in shown):  # names that would overlap
            shown.append(place)
            axes.annotate(
                row.site, (row.gmacs, row.train_memory_mib), xytext=(6, -10), textcoords="offset points", fontsize=9
            )
    axes.set(xlabel="GMACs per image", ylabel="training memory, MiB per image", title=table.title())
    axes.title.set_fontsize(10)
    axes.set_xlim(0, 1.15 * width)
    axes.set_ylim(0, 1.08 * height)
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_ranking(ranking: Any, path: str | Path) -> None:
    """Draw the metric of every candidate over its work; see :meth:`cropvote.ranking.Ranking.plot`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: a path where no picture can be written.
    """
    check_path(path)
    figure = _figures()((6.4, 4.2))
    axes = figure.subplots()
    scale = 100 if ranking.metric == "accuracy" else 1
    for row in ranking.rows:
        plain = row.name == ranking.rows[0].name
        axes.plot(row.work, scale * row.score, "s" if plain else "o", color=GREY if plain else BLUE)
        axes.annotate(row.name, (row.work, scale * row.score), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(scale * ranking.rows[0].score, color=GREY, linewidth=0.8, alpha=0.6)
    axes.set_xlabel("multiply-adds over the plain network's")
    axes.set_ylabel(ranking.metric + (", %" if scale == 100 else ""))
    axes.set_title(f"{ranking.samples} samples", fontsize=10)
    axes.margins(x=0.25)
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def check_path(path: str | Path) -> None:
    """Raise OptionError unless a picture can be written there."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError("CV842", f"a picture's file ends in {', '.join(SUFFIXES)}, got {str(path)!r}.")
    if not path.absolute().parent.is_dir():
        raise OptionError("CV842", f"the folder of {str(path)!r} does not exist.")


def _figures() -> Any:
    """Return matplotlib's figure functions, with a white background whatever the page's colour."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("CV702", 'pictures need matplotlib: pip install "cropvote[plots]".') from error
    return lambda size: Figure(figsize=size, layout="constrained", facecolor="white")


def _names(classes: Sequence[str] | None, count: int) -> list[str]:
    if classes is None:
        return [str(i) for i in range(count)]
    if len(classes) != count:
        raise OptionError("CV843", f"classes holds {len(classes)} names; the model has {count} classes.")
    return [str(name) for name in classes]


def _drawable(image: Tensor, denormalise: Any) -> Tensor:
    """Return an image with values from 0 to 1 and one or three channels."""
    image = image.detach().float().cpu()
    if denormalise is not None:
        image = denormalise(image)
    else:
        low, high = image.min(), image.max()
        image = (image - low) / (high - low).clamp(min=1e-12)
    return (image[:3] if image.shape[0] >= 3 else image[:1]).clamp(0, 1)
