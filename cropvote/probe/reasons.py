"""Why a module cannot be a site, as far as the trace alone shows it; None if it shows nothing against it."""

from __future__ import annotations

import inspect

from torch import Tensor

from .._torch import tree_leaves
from ..errors import Reason
from ..images import BATCH, INPUT
from .trace import Trace, is_batch

__all__: list[str] = []


def why_not_here(trace: Trace, site: str) -> Reason | None:
    """Return why a site is invalid whatever the views and the network behind it."""
    return why_not_votable(trace) or (why_not_images(trace) if site == INPUT else why_not_cut(trace, site))


def why_not_images(trace: Trace) -> Reason | None:
    """Return why the model's input is not a batch of images."""
    shape = trace.shape(INPUT)
    if len(shape) == 3:
        return None
    return Reason("CV125", f"the first tensor of the call has {1 + len(shape)} axes; images have 4.")


def why_not_cut(trace: Trace, site: str) -> Reason | None:
    """Return why a module is not a cut point that stands once on every path."""
    carrier = trace.carriers[site]
    calls = trace.calls.get(carrier, 0)
    if calls == 0:
        return Reason("CV104", f"it is never called in the model's forward (on {trace.describe_call()}).")
    if calls > 1:
        return Reason("CV103", f"it is called {calls} times in one forward, so each call would split again.")
    output = trace.returns[carrier].output
    if not isinstance(output, Tensor):
        return Reason("CV105", f"it returns {type(output).__name__}; a site returns one tensor, a map of features.")
    if output.dim() not in (3, 4):
        return Reason(
            "CV106",
            f"it returns shape {tuple(output.shape)}; a site returns a map, (N, C, H, W), or the tokens of one, "
            f"(N, L, C).",
        )
    if output.shape[0] != BATCH:
        return Reason(
            "CV107",
            f"its first axis has length {output.shape[0]} for {BATCH} samples; a site returns one map per sample.",
        )
    if not output.numel():
        return Reason("CV108", f"its shape is {tuple(output.shape)}, which holds no values.")
    if carrier in trace.changed_later:
        return Reason(
            "CV109",
            "the model later changes what it returns in place, under another name (that of its input, if it returns "
            "that itself), and the views would miss the change.",
        )
    around = trace.around.get(carrier)
    several = sum(map(is_batch, tree_leaves(trace.example[:2]))) > 1
    if around and several and (around[0] > 0 or why_not_images(trace)):
        return Reason(
            "CV102",
            f"the model's output also depends on the argument {_argument(trace, around[0])!r} by a path around it, "
            f"and only what passes the site is cut into views. In the model's own forward, split_views the map, "
            f"repeat_interleave the other tensor to one row per view, and vote.",
        )
    if around:
        return Reason(
            "CV101",
            "the model's output also depends on the images by a path around it (a skip connection, a parallel "
            "branch or a gate), so a sample would reach its prediction past the views.",
        )
    return None


def why_not_votable(trace: Trace) -> Reason | None:
    """Return why there is nothing to vote over."""
    if trace.scalars:
        return Reason(
            "CV123",
            f"the model returns a number for the whole batch ({trace.scalars[0] or 'its output'}), computed before "
            f"the vote. "
            + (
                "Call it without labels=, and compute the loss from its logits with CropVoteLoss (in Hugging "
                "Face's Trainer: compute_loss_func=)."
                if "labels" in trace.example.kwargs
                else "Let it return predictions, (N, K), and compute the rest from them."
            ),
        )
    if not trace.predictions:
        return trace.no_predictions
    for path in trace.predictions:
        shape = tuple(trace.tensors[path].shape)
        if len(shape) != 2 or shape[0] != BATCH:
            return Reason(
                "CV124",
                f"the model returns shape {shape} for {BATCH} samples; cropvote votes over one row of K outputs "
                f"per sample, (N, K){': for one output, (N, 1)' if shape == (BATCH,) else ''}.",
            )
    return None


def _argument(trace: Trace, index: int) -> str:
    """Return the name of one of the arguments that have a row per sample, the images being number 0."""
    args, kwargs = trace.example[:2]
    values = inspect.signature(trace.model.forward).bind(*args, **kwargs).arguments
    return [name for name, value in values.items() for leaf in tree_leaves(value) if is_batch(leaf)][index]
