"""What the views say together: votes over a sample's rows, and the loss on every view."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import InputTypeError, OptionError, RowsError
from .splitting import flatten_views, unflatten_views
from .views import Views

__all__ = ["CropVoteLoss", "repeat_targets", "vote"]

Rule = Literal["soft", "probs", "hard", "sigmoid", "mean", "median"]
How = Rule | Callable[[Tensor], Tensor]


def vote(logits: Tensor, views: int | Views, how: How = "soft") -> Tensor:
    """Vote over each sample's views.

    | ``how``    | formula                                             | what the numbers are                        |
    |------------|-----------------------------------------------------|---------------------------------------------|
    | "soft"     | mean of the logits                                  | logits (the paper's average of FC outputs)  |
    | "probs"    | log of the mean softmax                             | log-probabilities                           |
    | "hard"     | log((counts + mean softmax) / (V + 1))              | log-probabilities: majority, ties by mean   |
    | "sigmoid"  | logit of the mean sigmoid                           | logits of independent labels                |
    | "mean"     | mean                                                | a regression's outputs                      |
    | "median"   | median; the mean of the middle two where V is even  | a regression's outputs                      |
    | a callable | (N, V, K) -> (N, K)                                 | its own                                     |

    "probs" and "hard" take the outputs for the classes of one label. Where an image may have several labels, as with
    ``BCEWithLogitsLoss``, vote "soft" or "sigmoid". A view whose highest logits are equal counts for the first of them.
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
        RowsError: ``logits`` is not 2-D, its rows are not a multiple of V, a callable's output is not (N, K), or K is 1
            and the rule compares classes.
        InputTypeError: ``logits`` is not a floating-point tensor.
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
        raise InputTypeError("CV831", f"vote takes a floating-point tensor (N*V, K), got {kind}.")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RowsError(
            "CV306",
            f"vote takes one row of K outputs per view, (N*V, K), got shape {tuple(logits.shape)}"
            + ("; give a single output its own axis: (N*V, 1)." if logits.dim() == 1 else "."),
        )
    if logits.shape[1] == 1 and how in ("probs", "hard"):
        raise RowsError(
            "CV607",
            f"vote={how!r} weighs the classes of an image against each other, and there is one output: use "
            f'"soft" or "sigmoid" for a logit, "mean" or "median" for a regression.',
        )
    numbers = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    ballots = unflatten_views(numbers, count)
    if not callable(how):
        return _RULES[how](ballots)
    with torch.autocast(ballots.device.type, enabled=False):  # a matrix product would go back to half precision
        result = how(ballots)
    expected = (ballots.shape[0], ballots.shape[2])
    if not isinstance(result, Tensor) or tuple(result.shape) != expected:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RowsError(
            "CV307",
            f"a callable vote maps (N, V, K) = {tuple(ballots.shape)} to (N, K) = {expected}; "
            f"{_name(how)} returned {found}.",
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


def _sigmoid(ballots: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the mean probability p, from sums of p and of 1 - p that do not round to 0."""
    return logsigmoid(ballots).logsumexp(dim=1) - logsigmoid(-ballots).logsumexp(dim=1)


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
    "sigmoid": _sigmoid,
    "mean": _mean,
    "median": _median,
}


def check_rule(how: object) -> None:
    """Raise OptionError unless ``how`` is a rule's name or a callable."""
    if not callable(how) and not (isinstance(how, str) and how in _RULES):
        raise OptionError(
            "CV808", f"vote must be one of {get_args(Rule)} or a callable (N, V, K) -> (N, K), got {how!r}."
        )


def count_views(views: int | Views) -> int:
    """V from a number or from the views themselves."""
    count = len(views) if isinstance(views, Views) else views
    if isinstance(count, bool) or not isinstance(count, int):
        raise InputTypeError("CV809", f"views must be the number of views, or the views themselves, got {views!r}.")
    if count < 1:
        raise OptionError("CV809", f"the number of views must be at least 1, got {count}.")
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
        InputTypeError: ``targets`` is not a tensor.
        RowsError: ``targets`` is a scalar.
        OptionError: fewer than one view.

    Example:
        >>> import torch
        >>> from cropvote import repeat_targets
        >>> repeat_targets(torch.tensor([4, 7]), 3)
        tensor([4, 4, 4, 7, 7, 7])
    """
    if not isinstance(targets, Tensor):
        raise InputTypeError("CV832", f"targets must be a tensor, got {type(targets).__name__}.")
    if targets.dim() == 0:
        raise RowsError("CV832", "targets must hold one target per sample, got a scalar.")
    return flatten_views(targets.unsqueeze(1).expand(-1, count_views(views), *targets.shape[1:]))


class CropVoteLoss(nn.Module):
    """A loss on every view: the criterion between each view's row and its sample's target.

    The number of rows per target is read from the shapes, so the same loss serves training (a row for each view),
    evaluation (the vote) and a model that was never split. Without ``views`` any whole number of rows per target is
    accepted; with ``views`` only that number, or 1. Targets and rows are never broadcast against each other: after the
    first axis their shapes must be equal, or the targets must be class indices.

    Args:
        criterion: any loss ``(rows, targets) -> loss``, such as ``nn.CrossEntropyLoss()``.
        views: V, the number of rows per target that is expected, or the views themselves.

    Shape:
        outputs ``(n v) k``; targets ``n`` (class indices) or ``n k``, or ``n`` numbers for a single output, ``k = 1``;
        weights ``n``. Returns what the criterion returns: ``()`` for reduction "mean" and "sum", one loss for each row
        for "none"; with weights ``()``.

    Raises:
        RowsError: the number of rows is not a multiple of the targets, or not ``views`` times as many; or the shapes
            after the first axis do not match; or a loss of independent labels gets a vote of "probs" or "hard".
        InputTypeError: outputs, targets or weights that are not tensors, or a criterion that is not callable.
        RowsError: in ``backward()``, if the outputs are the votes of a model in eval mode: it would learn from its
            votes, with its norms frozen. Call ``model.train()`` first.

    Example:
        >>> import torch
        >>> from cropvote import CropVoteLoss
        >>> loss = CropVoteLoss(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> loss(torch.zeros(20, 7), torch.tensor([0, 6])).item()  # 2 samples, 10 views: log(7)
        1.9459...
        >>> regression = CropVoteLoss(torch.nn.MSELoss())
        >>> regression(torch.zeros(20, 1), torch.tensor([1.0, 3.0])).item()
        5.0
        >>> weighted = CropVoteLoss(torch.nn.CrossEntropyLoss(reduction="none"))
        >>> weighted(torch.zeros(20, 7), torch.tensor([0, 6]), torch.tensor([1.0, 2.0])).item()
        1.9459...

    Reference:
        The loss on every view's output: Gómez-Sirvent et al., Electronics 2023, 12(18), 3837, section 3.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], views: int | Views | None = None) -> None:
        super().__init__()
        if not callable(criterion):
            raise InputTypeError("CV833", f"criterion must be callable (rows, targets) -> loss, got {criterion!r}.")
        if isinstance(criterion, type):
            raise InputTypeError(
                "CV833", f"criterion is the class {criterion.__name__}: give an instance, {criterion.__name__}()."
            )
        self.criterion = criterion
        self.views = None if views is None else count_views(views)

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        for name, value in (("outputs", outputs), ("targets", targets)):
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise InputTypeError(
                    "CV834", f"{name} must be a tensor with one row per sample or view, got {_describe(value)}."
                )
        rows, samples = outputs.shape[0], targets.shape[0]
        if rows != samples and (samples == 0 or rows % samples or self.views not in (None, rows // samples)):
            expected = f"{samples} or {samples * self.views}" if self.views else f"a multiple of {samples}"
            raise RowsError(
                "CV308",
                f"{rows} rows of outputs for {samples} targets: expected {expected} rows, one per sample or one per "
                f"view. Give one target per sample; CropVoteLoss repeats them.",
            )
        targets = _with_axes_of(outputs, targets, isinstance(self.criterion, ELEMENTWISE))
        per_target = 1 if rows == samples else rows // samples
        if not torch.compiler.is_compiling():
            self._check_vote(outputs)
        targets = targets if per_target == 1 else repeat_targets(targets, per_target)
        loss = self.criterion(outputs, targets)
        if weights is None:
            return loss
        of_classes = _class_weights(self.criterion, targets)
        return _weighted_mean(loss, weights, samples, per_target, of_classes)

    def _check_vote(self, outputs: Tensor) -> None:
        """Refuse a model's vote that this loss cannot be meant for."""
        how, learns_from_rows = _MARKS.get(outputs, ("", False))
        if how in ("probs", "hard") and isinstance(self.criterion, MULTI_LABEL):
            raise RowsError(
                "CV316",
                f"the outputs are a vote of {how!r}, log-probabilities of classes that exclude each other, and "
                f'{type(self.criterion).__name__} takes independent labels: vote="sigmoid" or "soft".',
            )
        if learns_from_rows and outputs.requires_grad:
            outputs.register_hook(_refuse_eval_mode)

    def extra_repr(self) -> str:
        return "" if self.views is None else f"views={self.views}"


#: The rule of each vote that a model returned, and whether the model learns from rows of views instead.
_MARKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # an attribute would be saved with the tensor


def mark_vote(votes: Tensor, how: How, learns_from_rows: bool) -> None:
    """Remember of a model's vote what :class:`CropVoteLoss` has to know."""
    _MARKS[votes] = how, learns_from_rows


#: Losses of labels that do not exclude each other.
MULTI_LABEL = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss)


def _refuse_eval_mode(gradient: Tensor) -> None:
    raise RowsError(
        "CV315",
        "the model is in eval mode, so it would learn from its votes, with its norms frozen and its dropout off: call "
        "model.train() before training (from_pretrained and Lightning leave a loaded model in eval mode). To keep the "
        "norms frozen on purpose, call .eval() on them after model.train(); for gradients of the images in eval mode, "
        "use the criterion without CropVoteLoss.",
    )


#: Losses that compare outputs and targets one by one; class indices are nothing to them.
ELEMENTWISE = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss),
    *(nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss, nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss),
    *(nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
)


def _with_axes_of(outputs: Tensor, targets: Tensor, elementwise: bool) -> Tensor:
    """Return the targets with the outputs' axes after the first, or class indices as they are.

    Raises:
        RowsError: neither fits; PyTorch would broadcast the rows against the targets.
    """
    theirs, ours = outputs.shape[1:], targets.shape[1:]
    if theirs == ours:
        return targets
    is_index = not elementwise and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )
    if is_index and outputs.dim() > 1 and outputs.shape[1] > 1 and outputs.shape[2:] == ours:
        return targets
    if theirs == (1,) and ours == ():
        return targets.unsqueeze(1)
    wanted = f"({targets.shape[0]}, {', '.join(map(str, theirs))})" if theirs else f"({targets.shape[0]},)"
    raise RowsError(
        "CV309",
        f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}, {targets.dtype}, do not "
        f"match: give targets of shape {wanted}"
        + (
            f", or class indices of shape ({targets.shape[0]},), torch.int64."
            if len(theirs) == 1 and theirs[0] > 1
            else "."
        ),
    )


def _class_weights(criterion: Callable[..., Any], targets: Tensor) -> Tensor | None:
    """Return the weight of each row's class, by which PyTorch divides: 0 for an ignored one; None if all count 1."""
    if not isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) or targets.dim() > 1 or targets.is_floating_point():
        return None
    kept = targets != criterion.ignore_index
    return kept if criterion.weight is None else criterion.weight[targets * kept] * kept


def _weighted_mean(
    loss: Tensor, weights: Tensor, samples: int, per_target: int, of_classes: Tensor | None = None
) -> Tensor:
    """Return the mean of the rows' losses, each with its sample's weight, over the weights of samples and classes."""
    if not isinstance(weights, Tensor) or weights.shape != (samples,):
        raise RowsError("CV313", f"weights must be one number per target, ({samples},), got {_describe(weights)}.")
    if loss.dim() == 0 or loss.shape[0] != samples * per_target:
        raise RowsError(
            "CV314",
            f"with weights the criterion must return one loss for each of {samples * per_target} rows, and it returned "
            f'shape {tuple(loss.shape)}: give it reduction="none".',
        )
    of_rows = repeat_targets(weights, per_target).to(loss.dtype)
    total = of_rows.sum() if of_classes is None else (of_rows * of_classes).sum()
    return (loss.flatten(1).mean(1) if loss.dim() > 1 else loss).mul(of_rows).sum() / total


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return "a scalar" if value.dim() == 0 else f"shape {tuple(value.shape)}"
    return type(value).__name__
