"""Which views pay on a trained network: try candidates on validation data, and compare each with the plain network."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .costs import profile
from .costs.meters import Meter
from .costs.stages import LEAST_TAIL, list_stages
from .cuts import After, format_sites, parts_of
from .errors import InputTypeError, OptionError, SiteError, ViewsError
from .images import INPUT
from .layouts import sides
from .outputs import prediction_paths, tensors_of
from .probe.fakes import on_fake_copy
from .probe.sites import views_and_example
from .probe.trace import record_trace
from .progress import shown
from .reading import per_view
from .surgery import inject_crop_vote
from .surgery.arguments import sites_after
from .surgery.inject import settings
from .views import Views, five_crop, hflip
from .voting import vote

__all__ = ["RankedSites", "Ranking", "rank_sites"]

PLAIN = "plain"
#: A candidate is recommended only if the p-value of its McNemar test is below this, over the number of candidates.
SIGNIFICANT = 0.05

Metric = Callable[[Tensor, Tensor], float]
#: The name, the sites, the network, and the work over the plain network's.
Candidate = tuple[str, dict[str, Views], nn.Module, float]


class RankedSites(NamedTuple):
    """How one candidate did.

    Fields:
        name: the sites and their views as text, such as "layer2=five"; "plain" for the network without views.
        sites: the views at each site, for ``inject_crop_vote(model, after=...)``; empty for the plain network.
        score: the metric, by default the accuracy.
        won: samples that it got right and the plain network wrong.
        lost: samples that it got wrong and the plain network right.
        p: McNemar's exact p-value for won against lost: how likely a result at least this uneven is by chance alone.
        work: multiply-adds per image over the plain network's.
    """

    name: str
    sites: dict[str, Views]
    score: float
    won: int
    lost: int
    p: float
    work: float


class Ranking:
    """The table that :func:`rank_sites` makes: ``print`` it, or take its ``rows``.

    Fields:
        rows: one :class:`RankedSites` each; the plain network first, then the best.
        samples: how many samples were scored.
        metric: the metric's name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cropvote.ranking import rank_sites
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
        >>> ranking = rank_sites(net.eval(), [(torch.rand(4, 3, 32, 32), torch.arange(4))], progress=False)
        >>> ranking.rows[0].name, ranking.samples
        ('plain', 4)
    """

    def __init__(self, rows: list[RankedSites], right: dict[str, Tensor], samples: int, metric: str) -> None:
        plain, *others = rows
        self.rows = [plain, *sorted(others, key=lambda row: -row.score)]
        self.samples, self.metric = samples, metric
        self._right = right

    def __getitem__(self, name: str) -> RankedSites:
        """Return the row of a name.

        Raises:
            OptionError: no row has it.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise OptionError("CV822", f"the table has no row {name!r}; it has {', '.join(row.name for row in self.rows)}.")

    def compare(self, name: str, other: str) -> tuple[int, int, float]:
        """Return how many samples one row won and lost against another, and the p of McNemar's exact test.

        Raises:
            OptionError: no row has such a name.
        """
        one, two = self._right[self[name].name], self._right[self[other].name]
        won, lost = int((one & ~two).sum()), int((~one & two).sum())
        return won, lost, mcnemar(won, lost)

    @property
    def best(self) -> dict[str, Any] | None:
        """Return the arguments of :func:`inject_crop_vote` for the candidate that pays; None if none does.

        Among the candidates that beat the plain network by McNemar's test, it starts with the cheapest, and moves to a
        costlier one only if that one beats the current choice by the same test. The p of 0.05 that this takes is
        divided by the number of candidates, of which the best would otherwise be the luckiest.
        """
        row = self._best_row()
        return None if row is None else {"after": row.sites}

    def _best_row(self) -> RankedSites | None:
        pay = [row for row in self.rows[1:] if self._beats(row, self.rows[0])]
        chosen = None
        for row in sorted(pay, key=lambda row: row.work):
            if chosen is None or self._beats(row, chosen):
                chosen = row
        return chosen

    def _beats(self, row: RankedSites, other: RankedSites) -> bool:
        _, _, p = self.compare(row.name, other.name)
        return row.score > other.score and p < SIGNIFICANT / (len(self.rows) - 1)  # Bonferroni: many are tried

    def advice(self) -> str:
        """Return the recommendation in a sentence."""
        row = self._best_row()
        if row is None:
            return "No candidate clearly beats the plain network: leave it as it is, or train it with views."
        won, lost, p = self.compare(row.name, PLAIN)
        return (
            f"Use {row.name}: {won} won and {lost} lost against the plain network (p {p:.2g}), at {row.work:.2f} times "
            f"its work; no costlier candidate clearly beats it.\n    inject_crop_vote(model, after={row.sites!r})"
        )

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in cells
        ]
        return "\n".join([f"{self.samples} samples", "", *lines, "", self.advice()])

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        head, *cells = self._cells()
        ruler = ["---", *["---:"] * (len(head) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *cells))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain lists, numbers and strings, for JSON."""
        rows = [
            {
                **row._asdict(),
                "sites": {name: views.to_dict() for name, views in row.sites.items()},
                "score": row.score if math.isfinite(row.score) else None,
            }
            for row in self.rows
        ]
        return {"samples": self.samples, "metric": self.metric, "rows": rows, "advice": self.advice()}

    def plot(self, path: Any) -> None:
        """Draw the metric over the work, a point for each candidate, into a file (.png, .svg, .pdf).

        Raises:
            MissingExtraError: matplotlib is not installed.
            OptionError: a path where no picture can be written.
        """
        from .plots import plot_ranking

        plot_ranking(self, path)

    def _cells(self) -> list[list[str]]:
        percent = self.metric == "accuracy"
        cells = [["views", self.metric + ", %" * percent, "won", "lost", "p", "work"]]
        for row in self.rows:
            score = f"{100 * row.score:.2f}" if percent else f"{row.score:.4g}"
            against = ["", "", ""] if row.name == PLAIN else [str(row.won), str(row.lost), f"{row.p:.2g}"]
            cells.append([row.name, score, *against, f"{row.work:.2f}"])
        return cells


@torch.no_grad()
def rank_sites(
    model: nn.Module,
    data: Iterable[Any],
    candidates: Sequence[After] | None = None,
    *,
    metric: Metric | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Ranking:
    """Try views on a trained network and validation data, and compare each with the plain network.

    Every candidate votes with the same weights, batch by batch; the model itself is left as it is. By default the
    candidates are the mirrored input, and after the last stage of each map size, five crops aligned to the strides
    behind it (see :meth:`Views.aligned`), by themselves and with the mirrored input.

    Choose on validation data and report on other data: the best of many candidates is best by luck in part.

    Args:
        model: a trained image classifier that was not injected, in eval mode during the comparison.
        data: batches (images, targets, ...), such as a DataLoader; read once.
        candidates: what to try, each as ``after`` of :func:`inject_crop_vote` takes it.
        metric: a function (outputs, targets) -> float of all samples together, higher being better: outputs (N, K) are
            the votes, on the CPU in float32. By default the accuracy of integer targets, (N,). Won, lost and p compare
            the most likely classes in any case; for targets that are not classes they are 0, 0 and 1, and there is no
            best.
        device: where to run; where the model is by default.
        progress: show a progress bar, if tqdm is installed.

    Returns:
        A :class:`Ranking`: print it, or inject its ``best``.

    Raises:
        SiteError: a candidate names an invalid site.
        OptionError: no data, or targets that are not classes without a ``metric``.
        InputTypeError: batches that are not (images, targets).

    Example:
        >>> import torch, torchvision
        >>> from cropvote import hflip
        >>> from cropvote.ranking import rank_sites
        >>> model = torchvision.models.resnet18(num_classes=7).eval()
        >>> data = [(torch.rand(4, 3, 64, 64), torch.arange(4))]
        >>> print(rank_sites(model, data, [{"input": hflip()}], progress=False))
        4 samples
        ...
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError("CV801", f"model must be an nn.Module, got {type(model).__name__}.")
    outputs: list[list[Tensor]] = []
    targets: list[Tensor] = []
    networks: list[Candidate] = []
    if metric is not None and not callable(metric):
        raise InputTypeError("CV863", f"metric must be a function (outputs, targets) -> float, got {metric!r}.")
    for images, wanted in _batches(data, progress):
        are_classes = wanted.dim() == 1 and not wanted.is_floating_point()
        if metric is None and not are_classes:
            raise OptionError("CV861", f"targets of shape {tuple(wanted.shape)}, {wanted.dtype} need a metric=.")
        if not networks:
            networks = _networks(model, tuple(images.shape[1:]), candidates, device, progress)
            outputs = [[] for _ in networks]
        place = next(networks[0][2].parameters(), images).device
        for rows, logits in zip(outputs, _votes(networks, images.to(place)), strict=True):
            rows.append(logits.float().cpu())
        targets.append(wanted.cpu())
        are_classes &= outputs[0][0].dim() > 1 and outputs[0][0].shape[1] > 1
        if metric is None and not are_classes:
            raise OptionError("CV861", f"outputs of shape {tuple(outputs[0][0].shape)} need a metric=.")
    if not networks:
        raise OptionError("CV860", "data gave no batch.")
    truth = torch.cat(targets)
    votes = [torch.cat(rows) for rows in outputs]
    right = [
        (rows.argmax(1) == truth) & ~rows.isnan().any(1) if are_classes else torch.zeros(len(truth), dtype=torch.bool)
        for rows in votes
    ]
    table: list[RankedSites] = []
    for (name, chosen, _, work), vote_rows, hits in zip(networks, votes, right, strict=True):
        score = float(hits.double().mean()) if metric is None else float(metric(vote_rows, truth))
        won, lost = int((hits & ~right[0]).sum()), int((~hits & right[0]).sum())
        table.append(RankedSites(name, chosen, score, won, lost, mcnemar(won, lost), work))
    named = {row.name: hits for row, hits in zip(table, right, strict=True)}
    return Ranking(table, named, len(truth), "accuracy" if metric is None else getattr(metric, "__name__", "metric"))


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test: of won against lost, if both were equally likely.

    Example:
        >>> mcnemar(9, 1)
        0.021484375
    """
    total, fewer = won + lost, min(won, lost)
    if won == lost:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(fewer + 1)]
    return min(1.0, float(f"{2 * math.fsum(math.exp(x - total * math.log(2)) for x in logs):.12g}"))


def _batches(data: Iterable[Any], progress: bool) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in shown(data, "rank_sites", "batch", progress):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(x, Tensor) for x in batch[:2]):
            raise InputTypeError("CV862", f"data must give batches (images, targets), got {type(batch).__name__}.")
        if len(batch[0]) != len(batch[1]):
            raise InputTypeError("CV862", f"a batch has {len(batch[0])} images and {len(batch[1])} targets.")
        yield batch[0], batch[1]


def _votes(networks: list[Candidate], images: Tensor) -> list[Tensor]:
    """Return the outputs (N, K) of each network.

    Views that are also tried with the mirrored input are not run for themselves: they are the first half of those.
    """
    votes: dict[int, Tensor] = {}
    tried = [sites for _, sites, _, _ in networks]
    for i, (_, sites, network, _) in enumerate(networks):
        mirrored = {INPUT: hflip(), **sites}
        if sites and INPUT not in sites and mirrored in tried:
            rows = per_view(networks[tried.index(mirrored)][2], images)
            half = rows.shape[1] // 2
            votes[i] = vote(rows[:, :half].flatten(0, 1), half)
            votes[tried.index(mirrored)] = vote(rows.flatten(0, 1), 2 * half)
        elif i not in votes:
            output = network(images)
            votes[i] = dict(tensors_of(output))[prediction_paths(output)[0]]
    return [votes[i] for i in range(len(networks))]


def _networks(
    model: nn.Module,
    size: tuple[int, ...],
    candidates: Sequence[After] | None,
    device: str | torch.device | None,
    progress: bool,
) -> list[Candidate]:
    """Return the plain network, and each candidate as a network of the same weights."""
    plain = copy.deepcopy(model).eval()
    if device is not None:
        plain = plain.to(device)
    tried: list[Any] = _default_candidates(plain, size, progress) if candidates is None else list(candidates)
    weights = {id(parameter): parameter for parameter in plain.parameters()}
    networks: dict[str, tuple[dict[str, Views], nn.Module]] = {}
    for after in shown(tried, "checking", "candidate", progress):
        if isinstance(after, Mapping) and set(after) == {"after"} and isinstance(after["after"], Mapping):
            after = after["after"]  # as Ranking.best has it
        chosen = sites_after(plain, after)
        try:
            network = copy.deepcopy(plain, dict(weights))
            inject_crop_vote(network, after=chosen, input_size=size, align=candidates is None)
        except (SiteError, ViewsError):
            if candidates is None:
                continue
            raise
        if candidates is None:
            chosen = dict(zip(chosen, parts_of(settings(network).views), strict=True))
        settings(network).eval_output = "vote"
        name, copies = format_sites(chosen), itertools.count(2)
        unique = name
        while unique in networks or unique == PLAIN:  # other views may read the same: as many, of the same size
            unique = f"{name} ({next(copies)})"
        networks[unique] = chosen, network
    costs = (
        list(profile(plain, size, sites=[chosen for chosen, _ in networks.values()], progress=False))
        if networks
        else []
    )
    work = [row.ratio for row in costs[len(costs) - len(networks) :]]  # the plans stand last, in this order
    rows = [(name, *network, ratio) for (name, network), ratio in zip(networks.items(), work, strict=True)]
    return [(PLAIN, {}, plain, 1.0), *rows]


def _default_candidates(model: nn.Module, size: tuple[int, ...], progress: bool) -> list[After]:
    """Return the mirrored input, and aligned crops after the last stage of each map size, with it and without."""
    views, example = views_and_example(model, size, five_crop())
    stages = on_fake_copy(model, lambda fake: list_stages(Meter(record_trace(fake, example), views, True), progress))
    last = {
        sides(site.shape, site.layout): site.name
        for site, cost in stages
        if site.name != INPUT and cost.tail_share >= LEAST_TAIL
    }
    plans = [plan for name in last.values() for plan in ({name: five_crop()}, {INPUT: hflip(), name: five_crop()})]
    return [{INPUT: hflip()}, *plans]
