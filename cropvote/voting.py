"""What the views say together: votes over a sample's rows, and the loss on every view."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .errors import InputTypeError, OptionError, RowsError
from .splitting import join_views, part_views
from .views import Views

__all__ = ["CropVoteLoss", "repeat_targets", "vote"]

Rule = Literal["soft", "probs", "hard", "mean", "median"]
How = Rule | Callable[[Tensor], Tensor]


def vote(logits: Tensor, views: int | Views, how: How = "soft") -> Tensor:
    """Vote over each sample's views.

    | ``how``    | formula                                             | what the numbers are                        |
    |------------|-----------------------------------------------------|---------------------------------------------|
    | "soft"     | mean of the logits                                  | logits (the paper's average of FC outputs)  |
    | "probs"    | log of the mean softmax                             | log-probabilities                           |
    | "hard"     | log((counts + mean softmax) / (V + 1))              | log-probabilities: majority, ties by mean   |
    | "mean"     | mean                                                | a regression's outputs                      |
    | "median"   | median; the mean of the middle two where V is even  | a regression's outputs                      |
    | a callable | (N, V, K) -> (N, K)                                 | its own                                     |

    "probs" and "hard" take each row for the classes of one label; where an image may have several, as for
    ``BCEWithLogitsLoss``, vote "soft". A view whose highest logits are equal counts for the first of them.
    Half-precision rows are voted on, and returned, in float32: ties would be decided by rounding otherwise. NaN in a
    row gives NaN. "hard" resolves ties of the counts as finely as the precision of its output does.

    Args:
        logits: one row per view, a sample's views adjacent, floating point.
        views: V, the views of a sample: their number, or the views themselves.
        how: the rule.

    Shape:
        (n v) k -> n k

    Returns:
        One row per sample, float64 for float64 and float32 otherwise.

    Raises:
        RowsError: ``logits`` is not 2-D, or its rows are no multiple of V, or a callable's output is not (N, K), or K
            is 1 and the rule is one for classes.
        InputTypeError: ``logits`` is no floating-point tensor.
        OptionError: an unknown ``how``, or fewer than one view.

    Example:
        >>> import torch
        >>> from cropvote import vote
        >>> one_sample = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> vote(one_sample, 3, how="soft").argmax().item(), vote(one_sample, 3, how="hard").argmax().item()
        (0, 1)

    Reference:
        Soft and hard voting over views: Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, section 3.
        The tie rule of "hard" is ours.
    """
    check_rule(how)
    count = count_views(views)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputTypeError(f"vote takes a floating-point tensor (N*V, K), got {kind}.")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RowsError(
            f"vote takes one row of K outputs per view, (N*V, K), got shape {tuple(logits.shape)}"
            + ("; give a single output its own axis: (N*V, 1)." if logits.dim() == 1 else ".")
        )
    if logits.shape[1] == 1 and how in ("probs", "hard"):
        raise RowsError(
            f"vote={how!r} weighs the classes of an image against each other, and there is one output: use "
            f'"soft" for a logit, "mean" or "median" for a regression.'
        )
    ballots = part_views(logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32), count)
    if not callable(how):
        return _RULES[how](ballots)
    with torch.autocast(ballots.device.type, enabled=False):  # a matrix product would go back to half precision
        result = how(ballots)
    expected = (ballots.shape[0], ballots.shape[2])
    if not isinstance(result, Tensor) or tuple(result.shape) != expected:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RowsError(
            f"a callable vote maps (N, V, K) = {tuple(ballots.shape)} to (N, K) = {expected}; "
            f"{_name(how)} returned {found}."
        )
    return result


def _mean(ballots: Tensor) -> Tensor:
    return ballots.mean(dim=1)


def _probs(ballots: Tensor) -> Tensor:
    logs = ballots.log_softmax(dim=2)
    dead = (logs == -math.inf).all(dim=1)  # a class that every view masks; logsumexp has no gradient there
    mean = logs.masked_fill(dead.unsqueeze(1), 0).logsumexp(dim=1) - math.log(ballots.shape[1])
    return mean.masked_fill(dead, -math.inf)


def _hard(ballots: Tensor) -> Tensor:
    count = ballots.shape[1]
    chosen = ballots.argmax(dim=2, keepdim=True)
    counts = torch.zeros_like(ballots).scatter(2, chosen, 1.0).sum(dim=1)
    log_mean = _probs(ballots)  # where nobody voted for a class, its mean probability may be too small for a float
    return torch.where(counts > 0, (counts + log_mean.exp()).log(), log_mean) - math.log(count + 1)


def _median(ballots: Tensor) -> Tensor:
    count = ballots.shape[1]
    ordered = ballots.sort(dim=1).values
    middle, last = ordered[:, count // 2], ordered[:, -1]
    if count % 2 == 0:
        middle = ordered[:, count // 2 - 1] / 2 + middle / 2
    return torch.where(last.isnan(), last, middle)  # NaN is sorted last


_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "soft": _mean,
    "probs": _probs,
    "hard": _hard,
    "mean": _mean,
    "median": _median,
}


def check_rule(how: object) -> None:
    """Raise OptionError unless ``how`` is a rule's name or a callable."""
    if not callable(how) and not (isinstance(how, str) and how in _RULES):
        raise OptionError(f"vote must be one of {get_args(Rule)} or a callable (N, V, K) -> (N, K), got {how!r}.")


def count_views(views: int | Views) -> int:
    """V from a number or from the views themselves."""
    count = len(views) if isinstance(views, Views) else views
    if isinstance(count, bool) or not isinstance(count, int):
        raise InputTypeError(f"views must be the number of views, or the views themselves, got {views!r}.")
    if count < 1:
        raise OptionError(f"the number of views must be at least 1, got {count}.")
    return count


def _name(how: object) -> str:
    return getattr(how, "__name__", type(how).__name__)


def repeat_targets(targets: Tensor, views: int | Views) -> Tensor:
    """Repeat every sample's target once per view, in the order of the views' rows.

    Args:
        targets: one target per sample: class indices, soft targets, or numbers.
        views: V, the views of a sample: their number, or the views themselves.

    Shape:
        n ... -> (n v) ...

    Returns:
        One target per row.

    Raises:
        InputTypeError: ``targets`` is no tensor.
        RowsError: ``targets`` is a scalar.
        OptionError: fewer than one view.

    Example:
        >>> import torch
        >>> from cropvote import repeat_targets
        >>> repeat_targets(torch.tensor([4, 7]), 3)
        tensor([4, 4, 4, 7, 7, 7])
    """
    if not isinstance(targets, Tensor):
        raise InputTypeError(f"targets must be a tensor, got {type(targets).__name__}.")
    if targets.dim() == 0:
        raise RowsError("targets must hold one target per sample, got a scalar.")
    return join_views(targets.unsqueeze(1).expand(-1, count_views(views), *targets.shape[1:]))


class CropVoteLoss(nn.Module):
    """A loss on every view: the criterion between each view's row and its sample's target.

    How many rows a sample has is read from the shapes, so the same loss serves training (every view),
    evaluation (the vote) and a model that was never split, where it is exactly the criterion.

    Args:
        criterion: any loss ``(rows, targets) -> loss``, such as ``nn.CrossEntropyLoss()``.
        views: if given, rows / targets must be this number, or 1 where the output is the vote.

    Shape:
        (n v) k, n ... -> () for reduction "mean" and "sum", (n v) for "none"

    Raises:
        RowsError: rows that are no multiple of the targets, or not ``views`` times as many.
        InputTypeError: outputs or targets that are no tensors, or a criterion that is not callable.

    Example:
        >>> import torch
        >>> from cropvote import CropVoteLoss
        >>> loss = CropVoteLoss(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> loss(torch.zeros(20, 7), torch.tensor([0, 6])).item()  # 2 samples, 10 views: log(7)
        1.9459...

    Reference:
        The loss on every view's output: Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, section 3.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], views: int | Views | None = None) -> None:
        super().__init__()
        if not callable(criterion):
            raise InputTypeError(f"criterion must be callable (rows, targets) -> loss, got {criterion!r}.")
        if isinstance(criterion, type):
            raise InputTypeError(
                f"criterion is the class {criterion.__name__}: give an instance, {criterion.__name__}()."
            )
        self.criterion = criterion
        self.views = None if views is None else count_views(views)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        for name, value in (("outputs", outputs), ("targets", targets)):
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise InputTypeError(f"{name} must be a tensor with one row per sample or view, got {_found(value)}.")
        rows, samples = outputs.shape[0], targets.shape[0]
        if rows == samples:
            return self.criterion(outputs, targets)
        if samples == 0 or rows % samples or self.views not in (None, rows // samples):
            expected = f"{samples} or {samples * self.views}" if self.views else f"a multiple of {samples}"
            raise RowsError(
                f"{rows} rows of outputs for {samples} targets: expected {expected} rows, one per sample or one per "
                f"view. Give one target per sample; CropVoteLoss repeats them."
            )
        return self.criterion(outputs, repeat_targets(targets, rows // samples))

    def extra_repr(self) -> str:
        return "" if self.views is None else f"views={self.views}"


def _found(value: object) -> str:
    return "a scalar" if isinstance(value, Tensor) else type(value).__name__
