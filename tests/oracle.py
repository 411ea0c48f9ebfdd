"""A simple, independent reference: plain loops and explicit slices, nothing from cropvote.

Maps are (N, C, H, W) unless stated otherwise; a list of views holds one (N, C, h, w) tensor per view.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

Position = tuple[Fraction, Fraction]
Scale = Fraction | tuple[Fraction, Fraction]
Cutter = Callable[[Tensor], list[Tensor]]


# ---------------------------------------------------------------- geometry


def crop(x: Tensor, top: int, left: int, h: int, w: int) -> Tensor:
    """Return the h×w window of an NCHW map with its top-left pixel at (top, left)."""
    return x[:, :, top : top + h, left : left + w]


def mirrored(x: Tensor) -> Tensor:
    """Return the NCHW map with its columns reversed, one by one."""
    return torch.stack([x[:, :, :, column] for column in reversed(range(x.shape[3]))], dim=3)


def five_views(x: Tensor) -> list[Tensor]:
    """Return the crops top-left, top-right, bottom-left, bottom-right and centre, at 5/6 of the side."""
    high, wide = x.shape[2], x.shape[3]
    h, w = (5 * high + 3) // 6, (5 * wide + 3) // 6
    below, right = high - h, wide - w
    return [
        x[:, :, 0:h, 0:w],
        x[:, :, 0:h, right:wide],
        x[:, :, below:high, 0:w],
        x[:, :, below:high, right:wide],
        x[:, :, below // 2 : below // 2 + h, right // 2 : right // 2 + w],
    ]


def ten_views(x: Tensor) -> list[Tensor]:
    """Return five crops of the map, then the same five of the mirrored map (TenCrop's order)."""
    m = mirrored(x)
    high, wide = x.shape[2], x.shape[3]
    h, w = (5 * high + 3) // 6, (5 * wide + 3) // 6
    below, right = high - h, wide - w
    middle, centre = below // 2, right // 2
    return [
        x[:, :, 0:h, 0:w],
        x[:, :, 0:h, right:wide],
        x[:, :, below:high, 0:w],
        x[:, :, below:high, right:wide],
        x[:, :, middle : middle + h, centre : centre + w],
        m[:, :, 0:h, 0:w],
        m[:, :, 0:h, right:wide],
        m[:, :, below:high, 0:w],
        m[:, :, below:high, right:wide],
        m[:, :, middle : middle + h, centre : centre + w],
    ]


def flip_views(x: Tensor) -> list[Tensor]:
    """Return the full map and its mirror image."""
    return [x, mirrored(x)]


def side_of(size: int, scale: Fraction) -> int:
    """Return the crop's side: scale * size, rounded half up in integers."""
    num, den = scale.numerator, scale.denominator
    return (num * size + den // 2) // den


def crop_size(high: int, wide: int, scale: Scale) -> tuple[int, int]:
    """Return the (h, w) of every view."""
    vertical, horizontal = scale if isinstance(scale, tuple) else (scale, scale)
    return side_of(high, vertical), side_of(wide, horizontal)


def offsets(high: int, wide: int, positions: Sequence[Position], scale: Scale, mirror: bool) -> list[tuple[int, int]]:
    """Return the (top, left) of every view, in the mirrored map for mirrored views."""
    h, w = crop_size(high, wide, scale)
    found = []
    for vertical, horizontal in positions:
        found.append((math.floor(vertical * (high - h)), math.floor(horizontal * (wide - w))))
    return found + found if mirror else found


def is_error(high: int, wide: int, positions: Sequence[Position], scale: Scale) -> bool:
    """Return whether the geometry is an error: an empty crop, or a full side on an axis with several positions."""
    h, w = crop_size(high, wide, scale)
    rows_differ = any(position[0] != positions[0][0] for position in positions)
    columns_differ = any(position[1] != positions[0][1] for position in positions)
    return h == 0 or w == 0 or (h == high and rows_differ) or (w == wide and columns_differ)


def free_views(x: Tensor, positions: Sequence[Position], scale: Scale, mirror: bool) -> list[Tensor]:
    """Return the views at any positions and scale: those of the map, then (with mirror) of the mirrored map."""
    high, wide = x.shape[2], x.shape[3]
    h, w = crop_size(high, wide, scale)
    places = offsets(high, wide, positions, scale, False)
    found = [crop(x, top, left, h, w) for top, left in places]
    if mirror:
        m = mirrored(x)
        found += [crop(m, top, left, h, w) for top, left in places]
    return found


def grid_positions(rows: int, columns: int) -> list[Position]:
    """Return evenly spaced positions from edge to edge, row by row (at least two rows and two columns)."""
    return [(Fraction(r, rows - 1), Fraction(c, columns - 1)) for r in range(rows) for c in range(columns)]


def sample_major(views: Sequence[Tensor]) -> Tensor:
    """Return the batch (n v): all views of sample 0, then all views of sample 1, ..."""
    return torch.stack([view[n] for n in range(views[0].shape[0]) for view in views])


# ---------------------------------------------------------------- votes, in float64, on rows (N, V, K)


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _soft(views: list[list[float]]) -> list[float]:
    return [sum(view[k] for view in views) / len(views) for k in range(len(views[0]))]


def _mean_prob(views: list[list[float]]) -> list[float]:
    return _soft([_softmax(view) for view in views])


def _probs(views: list[list[float]]) -> list[float]:
    return [_log(prob) for prob in _mean_prob(views)]


def _hard(views: list[list[float]]) -> list[float]:
    counts = [0] * len(views[0])
    for view in views:
        counts[view.index(max(view))] += 1
    return [_log((count + prob) / (len(views) + 1)) for count, prob in zip(counts, _mean_prob(views), strict=True)]


def _median(views: list[list[float]]) -> list[float]:
    return [statistics.median(view[k] for view in views) for k in range(len(views[0]))]


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _sigmoid(views: list[list[float]]) -> list[float]:
    yes = _soft([[_logistic(value) for value in view] for view in views])
    no = _soft([[_logistic(-value) for value in view] for view in views])
    return [_log(p) - _log(q) for p, q in zip(yes, no, strict=True)]


RULES = {"soft": _soft, "probs": _probs, "hard": _hard, "sigmoid": _sigmoid, "mean": _soft, "median": _median}


def vote(rows: Tensor, how: str) -> Tensor:
    """Vote over (N, V, K) -> (N, K) in float64, one sample at a time."""
    return torch.tensor([RULES[how](sample) for sample in rows.detach().double().tolist()], dtype=torch.float64)


def majority(views: list[list[float]]) -> int | None:
    """Return the class that most views choose; ties go to the higher mean probability, or to None if that ties too."""
    choices = [view.index(max(view)) for view in views]
    most = max(choices.count(k) for k in choices)
    tied = [k for k in range(len(views[0])) if choices.count(k) == most]
    prob = _mean_prob(views)
    best = max(prob[k] for k in tied)
    winners = [k for k in tied if prob[k] > best - 1e-4]
    return winners[0] if len(winners) == 1 else None


# ---------------------------------------------------------------- models


def tail_rows(model: nn.Module, site: str, x: Tensor, cut: Cutter = ten_views) -> Tensor:
    """Return (N, V, K): a plain model's output for each view of the site's output, one view at a time."""
    return nested_rows(model, [(site, cut)], x)


def nested_rows(model: nn.Module, sites: Sequence[tuple[str, Cutter]], x: Tensor) -> Tensor:
    """Return (N, V, K) for several sites in forward order: each site's output is replaced view by view."""
    (site, cut), *later = sites
    module = model.get_submodule(site)
    caught: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: caught.append(output.clone()))
    model(x)
    handle.remove()
    rows = []
    for view in cut(caught[0]):
        handle = module.register_forward_hook(lambda _module, _args, _output, view=view: view.clone())
        rows.append(nested_rows(model, later, x) if later else model(x).unsqueeze(1))
        handle.remove()
    return torch.cat(rows, dim=1)


def loss_on_views(rows: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the differentiable mean cross-entropy (with label smoothing) over all samples and views."""
    count, views, classes = rows.shape
    total = rows.new_zeros(())
    for n in range(count):
        for v in range(views):
            log_prob = rows[n, v] - torch.logsumexp(rows[n, v], dim=0)
            for k in range(classes):
                weight = smoothing / classes + (1 - smoothing) * (k == int(targets[n]))
                total = total - weight * log_prob[k]
    return total / (count * views)


def whose(rows: Tensor, every: Tensor) -> list[list[int]]:
    """Return, for each sample, the indices of the views whose logits these rows are."""
    parts = rows.unflatten(0, (len(every), -1))
    near = (parts.unsqueeze(2) - every.unsqueeze(1)).abs().amax(3)
    assert near.amin(2).max() < 1e-5
    return near.argmin(2).tolist()
