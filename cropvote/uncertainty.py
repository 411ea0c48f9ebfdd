"""What the views say one by one: how far they agree, and how unsure they are. Pure functions of (N, V, K) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputTypeError, RowsError

__all__ = ["agreement", "mutual_information", "predictive_entropy"]


def agreement(logits: Tensor, *, multilabel: bool = False) -> Tensor:
    """Return the share of a sample's views that chose its most-chosen class.

    Args:
        logits: every view's logits, as :func:`per_view` gives them. A view whose highest logits are equal counts for
            the first of them; one that holds NaN, for the first NaN.
        multilabel: whether the labels are independent; then the result is for each label: the share of the views on
            the side, above or below a logit of 0, where most of them are; NaN if a view gives NaN.

    Shape:
        n v k -> n; n v k -> n k if ``multilabel``

    Returns:
        From 1 / min(V, K) or more to 1, all views of one opinion.

    Raises:
        RowsError: ``logits`` is not (N, V, K), or V is 0, or K is below 2 for classes.
        InputTypeError: ``logits`` is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from cropvote.uncertainty import agreement
        >>> agreement(torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]]))
        tensor([0.7500])

    Reference:
        One minus Freeman's variation ratio: L. C. Freeman, Elementary Applied Statistics, 1965.
    """
    logits = _checked(logits, multilabel)
    if multilabel:
        share = (logits > 0).to(logits.dtype).mean(dim=1)
        return torch.maximum(share, 1 - share).masked_fill(logits.isnan().any(dim=1), torch.nan)
    chosen = logits.argmax(dim=2, keepdim=True)
    return torch.zeros_like(logits).scatter(2, chosen, 1.0).mean(dim=1).amax(dim=1)


def predictive_entropy(logits: Tensor, *, multilabel: bool = False) -> Tensor:
    """Return the entropy, in nats, of the mean of the views' probabilities: all of a sample's uncertainty.

    Args:
        logits: every view's logits, as :func:`per_view` gives them.
        multilabel: whether the labels are independent; then the result is for each label.

    Shape:
        n v k -> n; n v k -> n k if ``multilabel``

    Returns:
        From 0 to log K.

    Raises:
        RowsError: ``logits`` is not (N, V, K), or V is 0, or K is below 2 for classes.
        InputTypeError: ``logits`` is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from cropvote.uncertainty import predictive_entropy
        >>> predictive_entropy(torch.zeros(1, 10, 7)).exp()
        tensor([7.0000])

    Reference:
        H[E p] in Gal, Islam and Ghahramani, "Deep Bayesian active learning with image data", 2017, section 4.
    """
    return _entropy(_probabilities(logits, multilabel).mean(dim=1))


def mutual_information(logits: Tensor, *, multilabel: bool = False) -> Tensor:
    """Return how much of a sample's uncertainty is disagreement among its views, in nats (BALD).

    The predictive entropy less the mean entropy of the views: 0 where every view says the same, however unsure.

    Args:
        logits: every view's logits, as :func:`per_view` gives them.
        multilabel: whether the labels are independent; then the result is for each label.

    Shape:
        n v k -> n; n v k -> n k if ``multilabel``

    Returns:
        From 0 to log min(V, K).

    Raises:
        RowsError: ``logits`` is not (N, V, K), or V is 0, or K is below 2 for classes.
        InputTypeError: ``logits`` is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from cropvote.uncertainty import mutual_information
        >>> opposite = torch.tensor([[[50.0, -50.0], [-50.0, 50.0]]])
        >>> mutual_information(opposite).exp()
        tensor([2.])

    Reference:
        Houlsby, Huszár, Ghahramani and Lengyel, "Bayesian active learning for classification and preference learning",
        2011, equation 2, with the views in place of draws of the parameters.
    """
    probabilities = _probabilities(logits, multilabel)
    return (_entropy(probabilities.mean(dim=1)) - _entropy(probabilities).mean(dim=1)).clamp(min=0)


def _probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """Return (N, V, K), or (N, V, K, 2) for labels that are there or not."""
    logits = _checked(logits, multilabel)
    return torch.stack([logits.sigmoid(), (-logits).sigmoid()], dim=-1) if multilabel else logits.softmax(dim=2)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


def _checked(logits: Tensor, multilabel: bool) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputTypeError("CV844", f"expected a floating-point tensor of logits (N, V, K), got {kind}.")
    if logits.dim() != 3 or 0 in logits.shape[1:]:
        raise RowsError(
            "CV844", f"expected the logits of every view, (N, V, K), as per_view gives, got {tuple(logits.shape)}."
        )
    if logits.shape[2] == 1 and not multilabel:
        raise RowsError(
            "CV604", "a single output has no classes that views could agree on: take its spread, logits.std(1)."
        )
    return logits if logits.dtype == torch.float64 else logits.float()
