"""Read what every view of an image says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._torch import call_eagerly
from .call import requested
from .cuts import Cuts, make_cuts
from .errors import OptionError, RowsError, SurgeryError
from .images import first_tensor
from .layer import CropVote
from .options import Settings
from .outputs import describe, prediction_paths, tensors_of
from .splitting import unflatten_views
from .surgery import settings
from .surgery.arguments import injection_of, unwrap

__all__ = ["per_view"]


def per_view(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Every view's logits, from one pass, in eval mode.

    All the model's views are computed, whatever its ``eval_views`` and ``eval_output``; its settings stay as they are.
    A compiled model runs without its compiler. (If a part of it that holds a site is compiled by itself, that is an
    error: compile the whole model.)

    Args:
        model: an injected model, a :class:`CropVote` layer, or a network that holds one such layer at its end.
        args: the arguments of the model, such as the images.
        kwargs: its keyword arguments.

    Shape:
        n c H W -> n v k

    Returns:
        The logits (N, V, K), views in the order of ``settings(model).views``; ``vote(logits.flatten(0, 1), V)`` is the
        model's vote.

    Raises:
        SurgeryError: the model does not vote, holds several layers that do, or is in training mode.
        OptionError: its settings say ``enabled=False``.
        SurgeryError: what follows the layer changes its rows, which would not be the ones it votes over.
        RowsError: there is not one row of logits per view.

    Example:
        >>> import torch, torchvision
        >>> from cropvote import inject_crop_vote, per_view
        >>> from cropvote.uncertainty import agreement
        >>> model = inject_crop_vote(torchvision.models.resnet18(num_classes=7), after="layer1", input_size=64).eval()
        >>> logits = per_view(model, torch.zeros(2, 3, 64, 64))
        >>> logits.shape, agreement(logits).shape
        (torch.Size([2, 10, 7]), torch.Size([2]))
    """
    options = settings_in(model)
    model = unwrap(model)
    if model.training:
        raise SurgeryError(
            "CV601", "per_view reads a model in eval mode, and this one is in training mode: model.eval() first."
        )
    if not options.enabled:
        raise OptionError("CV602", "per_view reads a model that votes; this one's settings say enabled=False.")
    injection = injection_of(model)
    kwargs = kwargs if injection is None else injection.in_order(kwargs)
    output = run_with_cuts(model, options, make_cuts(options.views), *args, **kwargs)
    rows = dict(tensors_of(output)).get(prediction_paths(output)[0])
    samples = first_tensor(args, kwargs).shape[0]
    if rows is None or rows.dim() != 2 or rows.shape[0] != samples * len(options.views):
        raise RowsError(
            "CV603", f"the model returned {describe(output)}, not one row of logits for each view, (N*V, K)."
        )
    return unflatten_views(rows, len(options.views))


def run_with_cuts(model: nn.Module, options: Settings, cuts: Cuts, *args: Any, **kwargs: Any) -> Any:
    """Return the rows of the views that are cut; a layer inside a network must have the last word.

    Raises:
        SurgeryError: the network makes something else of what its layer returns.
    """
    layers = [m for m in model.modules() if isinstance(m, CropVote) and m.settings is options]
    returned: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        returned.extend(x for _, x in tensors_of(output))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with requested(options, cuts):
            output = call_eagerly(model, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = dict(tensors_of(output)).get(prediction_paths(output)[0])
    if layers and not any(rows is x for x in returned):
        raise SurgeryError(
            "CV431",
            f"this {type(model).__name__} makes something else of what its CropVote layer returns, so the views' rows "
            f"would not be those of its vote: put what follows into the layer's tail, or pass the layer itself.",
        )
    return output


def settings_in(model: nn.Module) -> Settings:
    """Return the settings of an injected model or a layer, or of the one layer inside a network."""
    inner = unwrap(model) if isinstance(model, nn.Module) else None
    if inner is not None and injection_of(inner) is None:
        layers = [module for module in inner.modules() if isinstance(module, CropVote)]
        if len(layers) > 1:
            raise SurgeryError(
                "CV432", f"this {type(inner).__name__} holds {len(layers)} CropVote layers: pass one of them."
            )
        if layers:
            return layers[0].settings
    return settings(model)
