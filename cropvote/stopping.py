"""Votes that stop when sure: a few views for every sample, all of them for the samples that need it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cuts import make_cuts
from .errors import InputTypeError, OptionError, RowsError, SurgeryError
from .options import EvalViews, Settings, checked_indices, eval_indices
from .outputs import describe, prediction_paths, tensors_of
from .reading import run_with_cuts, settings_in
from .splitting import unflatten_views
from .surgery.arguments import unwrap
from .surgery.checking import is_traced
from .voting import How, vote

__all__ = ["SureVotes", "choose_confidence", "vote_until_sure"]


class SureVotes(NamedTuple):
    """What :func:`vote_until_sure` returns.

    Fields:
        votes: (N, K), as the model's own vote.
        used: (N,), how many views each sample voted with.
    """

    votes: Tensor
    used: Tensor


def vote_until_sure(
    model: nn.Module,
    x: Tensor,
    *,
    first: EvalViews = "centre+mirror",
    confidence: float | None = 0.7,
    how: How | None = None,
) -> SureVotes:
    """Vote with a few views of every sample, and with all views of those samples for which these were not sure.

    A sample is sure where the probability of its winner (the softmax of the vote) is above ``confidence``; with 1
    every sample goes on to all views. With ``how="sigmoid"``, for several labels an image, it is sure where each label
    is: where the probability of the label, or of its absence, is above ``confidence``. With ``how="hard"`` and
    ``confidence=None`` it is sure where the views that are left cannot change the winner: the vote's class is then the
    one of all views, always. The network in front of the split runs a second time for the samples that go on.

    Args:
        model: an injected model in eval mode, a :class:`CropVote` layer, or a network that holds one at its end.
        x: the images (of a layer, the maps); one tensor.
        first: the views of the first vote: their indices, ``"centre"``, or ``"centre+mirror"``.
        confidence: the probability above which a sample stops; None for the exact stop of a hard vote.
        how: the rule of both votes, by default that of the model's settings.

    Shape:
        n c H W -> n k and n

    Returns:
        The votes, and the number of views behind each.

    Raises:
        SurgeryError: the model does not vote, is in training mode, or is compiled or traced around this call.
        OptionError: unknown views or rule, a confidence outside 0 to 1, or None for a rule other than "hard".
        RowsError: the model returns more than its predictions.
        InputTypeError: ``x`` is not a tensor.

    Example:
        >>> import torch, torchvision
        >>> from cropvote import inject_crop_vote, vote_until_sure
        >>> model = inject_crop_vote(torchvision.models.resnet18(num_classes=7), after="layer1", input_size=64).eval()
        >>> with torch.no_grad():
        ...     votes, used = vote_until_sure(model, torch.zeros(2, 3, 64, 64), confidence=1.0)
        >>> votes.shape, used
        (torch.Size([2, 7]), tensor([10, 10]))
    """
    options = settings_in(model)
    rule = options.vote if how is None else how
    model = unwrap(model)
    _check(model, options, x, rule, confidence)
    chosen, total = eval_indices(options.views, first, "first"), len(options.views)
    rows = _rows(model, options, x, chosen)
    if rows.shape[2] == 1 and rule != "sigmoid":
        raise RowsError("CV604", "vote_until_sure compares classes, and the model has one output: vote over all views.")
    votes = vote(rows.flatten(0, 1), len(chosen), rule)
    used = torch.full((len(x),), len(chosen), device=votes.device)
    unsure = torch.nonzero(~_sure(rows, votes, total, confidence, rule)).flatten()
    if len(chosen) == total or len(unsure) == 0:
        return SureVotes(votes, used)
    others = tuple(i for i in range(total) if i not in chosen)
    more = _rows(model, options, x.index_select(0, unsure.to(x.device)), others)
    both = torch.cat([rows.index_select(0, unsure.to(rows.device)), more], dim=1)
    order = torch.tensor([*chosen, *others], device=both.device).argsort()
    voted = vote(both.index_select(1, order).flatten(0, 1), total, rule)
    return SureVotes(votes.index_copy(0, unsure, voted), used.index_fill(0, unsure, total))


def choose_confidence(
    per_view_logits: Tensor,
    targets: Tensor,
    *,
    first: Sequence[int] | None = None,
    max_loss: float = 0.001,
    how: How = "soft",
) -> float:
    """Return the least confidence at which stopping loses at most ``max_loss`` of accuracy against all views.

    For validation data: what is chosen on the test data flatters.

    Args:
        per_view_logits: (N, V, K), as :func:`per_view` gives them.
        targets: the classes, (N,).
        first: the indices of the views of the first vote. By default, for ten views, 4 and 9: the centre and its mirror
            image in the order of :func:`ten_crop`. With five crops at the first site and a mirror at the second, they
            are 8 and 9.
        max_loss: how much accuracy may be lost, as a share of the samples.
        how: the rule.

    Returns:
        A confidence for :func:`vote_until_sure`; 1.0 where nothing less keeps the accuracy.

    Raises:
        RowsError: the logits are not (N, V, K), or there are none.
        InputTypeError: ``targets`` are not one class per sample.
        OptionError: views that are not there, a negative loss, or a rule that elects no class.

    Example:
        >>> import torch
        >>> from cropvote.stopping import choose_confidence
        >>> logits = torch.tensor([[[4.0, 0]] * 10, [[0.2, 0]] * 4 + [[0.1, 0]] + [[0, 9.0]] * 5])
        >>> choose_confidence(logits, torch.tensor([0, 1]), first=[4]) < 0.98
        True
    """
    if not isinstance(per_view_logits, Tensor):
        raise InputTypeError(
            "CV844", f"per_view_logits must be a tensor (N, V, K), got {type(per_view_logits).__name__}."
        )
    if per_view_logits.dim() != 3 or len(per_view_logits) == 0 or per_view_logits.shape[2] < 2:
        raise RowsError(
            "CV844",
            f"per_view_logits must be (N, V, K), with two classes at least, got {tuple(per_view_logits.shape)}.",
        )
    samples, total, _ = per_view_logits.shape
    if not isinstance(targets, Tensor) or targets.shape != (samples,) or targets.is_floating_point():
        raise InputTypeError("CV841", f"targets must be a tensor of {samples} classes, one per sample.")
    if not _is_number(max_loss) or not max_loss >= 0:
        raise OptionError("CV845", f"max_loss must be a share of the samples, 0 or more, got {max_loss!r}.")
    if first is None and total != 10:
        raise OptionError(
            "CV845", f"first is centre and mirror of ten views; of {total}, name the indices of the first vote."
        )
    if how in ("sigmoid", "mean", "median"):
        raise OptionError("CV606", f"choose_confidence is for one class per sample, and the rule is {how!r}.")
    chosen = checked_indices(total, (4, 9) if first is None else first, "first")
    whole = vote(per_view_logits.flatten(0, 1), total, how).argmax(1) == targets
    early = vote(per_view_logits[:, chosen].flatten(0, 1), len(chosen), how)
    winner, order = early.softmax(1).max(1).values.sort(descending=True)
    lost = (whole.long() - (early.argmax(1) == targets).long())[order].cumsum(0)
    # lost[n - 1]: samples lost if the n most confident ones stop; those of equal confidence stop together
    counts = [0, *(n + 1 for n in range(samples) if n + 1 == samples or winner[n] > winner[n + 1])]
    count = max(n for n in counts if n == 0 or int(lost[n - 1]) / samples <= max_loss)
    return 1.0 if count == 0 else 0.0 if count == samples else float(winner[count])


def _check(model: nn.Module, options: Settings, x: Any, rule: How, confidence: float | None) -> None:
    if is_traced():
        raise SurgeryError(
            "CV502",
            "vote_until_sure runs a model twice, the second time for as many samples as need it, which cannot be "
            "recorded: call it outside of torch.compile, export and vmap.",
        )
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise InputTypeError("CV846", f"vote_until_sure takes the images, one tensor, got {type(x).__name__}.")
    if model.training:
        raise SurgeryError(
            "CV601", "vote_until_sure is for eval mode, and this model is in training mode: model.eval() first."
        )
    if not options.enabled:
        raise OptionError("CV602", "vote_until_sure needs a model that votes; this one's settings say enabled=False.")
    if confidence is None and rule != "hard":
        raise OptionError("CV605", f'confidence=None stops a hard vote exactly, how="hard"; the rule here is {rule!r}.')
    if confidence is not None and rule in ("mean", "median"):
        raise OptionError(
            "CV606", f'vote={rule!r} is a regression rule and gives no confidence; use "soft", "probs" or "hard".'
        )
    if confidence is not None and not (_is_number(confidence) and 0 <= confidence <= 1):
        raise OptionError("CV845", f"confidence must be a probability, 0 to 1, or None, got {confidence!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _rows(model: nn.Module, options: Settings, x: Tensor, indices: tuple[int, ...]) -> Tensor:
    """Return the logits of some views, (N, len(indices), K)."""
    output = run_with_cuts(model, options, make_cuts(options.views, indices), x)
    tensors = dict(tensors_of(output))
    rows = tensors.get(prediction_paths(output)[0])
    if rows is None or len(tensors) != 1 or rows.dim() != 2 or rows.shape[0] != len(x) * len(indices):
        raise RowsError(
            "CV603",
            f"the model returned {describe(output)}; vote_until_sure needs one tensor with a row for each of "
            f"{len(indices)} views of {len(x)} samples.",
        )
    return unflatten_views(rows, len(indices))


def _sure(rows: Tensor, votes: Tensor, total: int, confidence: float | None, rule: How) -> Tensor:
    """(N,) bool: whose vote stands."""
    if confidence is not None and rule == "sigmoid":
        return votes.abs().sigmoid().min(1).values > confidence
    if confidence is not None:
        return votes.softmax(1).max(1).values > confidence
    counts = torch.nn.functional.one_hot(rows.argmax(2), rows.shape[2]).sum(1)
    first, second = counts.topk(2, dim=1).values.unbind(1)
    return first - second > total - rows.shape[1]
