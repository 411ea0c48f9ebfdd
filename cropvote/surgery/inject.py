"""Make an existing model vote, in place, and undo it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import nn

from ..cuts import After, ViewsOrName, join_parts
from ..errors import InputTypeError, OptionError, PlainModelError, SurgeryError
from ..images import INPUT, example_of
from ..layer import CropVote
from ..layouts import Layout
from ..options import EvalViews, Output, Settings
from ..probe.sites import check_sites
from ..swapping import check_restorable, restore_forward, split_module, swap_forward
from ..voting import How
from .arguments import MARKS, check_model, injected_inside, injection_of, sites_after, unwrap, user_layouts_of
from .config import read_layout, read_views
from .injection import Injection, parameters_of, split_forward, vote_forward

__all__ = ["inject_crop_vote", "remove_crop_vote", "settings"]

Model = TypeVar("Model", bound=nn.Module)


def inject_crop_vote(
    model: Model,
    after: After,
    *,
    views: ViewsOrName | None = None,
    vote: How = "soft",
    input_size: int | tuple[int, ...] | None = None,
    train_output: Output = "views",
    eval_output: Output = "vote",
    train_views: int | None = None,
    eval_views: EvalViews = None,
    enabled: bool = True,
    align: bool = False,
    layout: Layout | Mapping[str, Layout] | None = None,
    check: bool = True,
    **unknown: NoReturn,
) -> Model:
    """Split the map behind a module of ``model`` into views, and vote over the views' predictions. In place.

    With several sites, ``after={"layer1": hflip(), "layer3": five_crop()}``, the views multiply, and the vote is one:
    every view of the first site is cut into the views of the next. A sample's rows have the first site's views
    outermost, so that this example gives ten views in the order of :func:`ten_crop`.

    The model keeps its parameters, keys, class name, attributes and methods; an optimizer made before still works.
    In training mode it returns a row per view, (N·V, K), for :class:`CropVoteLoss`; in eval mode the vote, (N, K).
    Methods that run a part of it (timm's ``forward_features``) return a row per view, in either mode, and a forward
    hook of the site sees the views. A batch is taken for independent samples: layers that mix them beyond BatchNorm
    (a mean over the batch, say) mix the views too. A model may return several tensors, in a tuple, a dict or a
    dataclass: the predictions are voted over (those with "logits" in their names, or else all 2-D tensors, which must
    have the same K), and the rest is returned as it is, with a row per view where it was computed behind the site.
    For transformers, the views are cut from the grid of tokens, and the prefix tokens are kept in every view. Plain
    attention ignores the order of its tokens, so mirrored views repeat the others (:func:`five_crop` is enough);
    behind the last attention all views are alike.

    Whether the site is valid (every path from the input to the output passes through it, once, and the network behind
    it takes the smaller maps) is checked on a fake copy before anything is changed, if an input size is known: timm
    models carry one, ``input_size`` gives one. Otherwise it is checked at the first call, before its result is seen.

    Args:
        model: an image classifier that maps a batch of images to (N, K).
        after: the site's name in ``model.named_modules()``, or ``"input"`` to split the images themselves; or a dict of
            such names, in any order, and the views at each.
        views: the views at a single site or their name ("ten", "five", "hflip", "d4"), :func:`ten_crop` by default.
        vote: the rule, see :func:`vote`.
        input_size: the images' size: a side, (H, W), or (C, H, W).
        train_output: ``"views"`` or ``"vote"`` in training mode.
        eval_output: the same in eval mode.
        train_views: this many views, drawn again for every batch in training mode, see :class:`Settings`. For the same
            training work, two were far better than all ten (docs/results.md); all of them is the paper's way.
        eval_views: the views of eval mode, which alone are computed, see :class:`Settings`.
        enabled: False runs the plain network, until ``settings(model).enabled = True``.
        align: round the margin of the views at each site to the total stride of the network behind it (see
            :meth:`Views.aligned`): for a trained network, which has only seen whole maps. Needs a known input size.
        layout: where the height and width of the site's map are, "NCHW", "NHWC" or :class:`Tokens`, or a dict of them
            by site; by default what the check finds, or for tokens what the model says of them.
        check: False skips every check on a fake copy, here and at calls, for a sound model that the check cannot follow
            (its forward reads values of its data, say). The layout is then the stated one, or "NCHW", and several sites
            must be in the order in which the model defines them; that each split runs once, and that there is one row
            for each view, is still checked at every call.
        **unknown: nothing else; a name from a later version's :func:`to_config`, say, is an error.

    Returns:
        The model.

    Raises:
        UnknownSiteError: no module of that name; the message holds the nearest names.
        SiteError: the module is not a valid site; the message holds the reason and valid ones.
        ViewsError: the map there is too small for the views.
        SurgeryError: the model is injected already, wrapped or compiled, or does not run on ``input_size``.
        OptionError: an unknown option.
        InputTypeError: an argument of the wrong type.

    Example:
        >>> import torch, torchvision
        >>> from cropvote import inject_crop_vote
        >>> model = torchvision.models.resnet18(num_classes=7)
        >>> model = inject_crop_vote(model, after="layer1", input_size=64)
        >>> model.train()(torch.zeros(2, 3, 64, 64)).shape, model.eval()(torch.zeros(2, 3, 64, 64)).shape
        (torch.Size([20, 7]), torch.Size([2, 7]))

    Reference:
        Gómez-Sirvent et al., Electronics 2023, 12(18), 3837.
    """
    if unknown:
        raise InputTypeError("CV852", f"inject_crop_vote has no argument {', '.join(map(repr, unknown))}.")
    check_model(model)
    sites = sites_after(model, read_views(after), read_views(views))
    stated = user_layouts_of(sites, read_layout(layout))
    for name, flag in (("check", check), ("align", align)):
        if not isinstance(flag, bool):
            raise InputTypeError("CV814", f"{name} must be True or False, got {flag!r}.")

    def make_injection(names: Sequence[str]) -> Injection:
        options = Settings(
            views=join_parts([sites[name] for name in names]),
            vote=vote,
            train_output=train_output,
            eval_output=eval_output,
            train_views=train_views,
            eval_views=eval_views,
            enabled=enabled,
        )
        layouts = {name: stated[name] for name in names}
        return Injection(layouts, options, parameters_of(model), check, input_size)

    injection = make_injection(list(sites))
    example = example_of(model, input_size) if check else None
    if align and example is None:
        raise OptionError("CV853", "align=True reads the strides while it checks the sites: pass input_size=.")
    if example is not None:
        try:
            modes, splits = check_sites(model, sites, stated, example, align)
            sites = {split.site: split.views for split in splits}
            injection = make_injection([split.site for split in splits])
            key = injection.argument_key((torch.empty(0),), {})
            injection.add_checked(modes, key, example.args[0].shape[1:], splits)
        except PlainModelError:
            if input_size is not None or align:
                raise  # the size that a timm model carries may be another than the one it was built for: check later
    _swap(model, injection)
    return model


def _swap(model: nn.Module, injection: Injection) -> None:
    """Give the model and the modules that carry the splits their forwards, or change nothing."""
    carriers = {i: split_module(model, name) for i, name in enumerate(injection.sites) if name != INPUT}
    swapped: list[nn.Module] = []
    try:
        for module, forward in ((model, vote_forward), *((carrier, split_forward) for carrier in carriers.values())):
            swap_forward(module, forward)
            swapped.append(module)
    except SurgeryError:
        for module in swapped:
            restore_forward(module)
        raise
    for i, carrier in carriers.items():
        vars(carrier).update(_cropvote_split=injection, _cropvote_index=i)
    vars(model)["_cropvote"] = injection
    injection.set_root(model)
    if any(isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) for module in model.modules()):
        injection.tracking = False  # they take another path for tensors of another class, with other padded positions


def remove_crop_vote(model: Model) -> Model:
    """Undo :func:`inject_crop_vote`: the model is exactly what it was.

    Args:
        model: the injected model itself, not a wrapper around it.

    Returns:
        The model.

    Raises:
        SurgeryError: the model was never injected.
        InputTypeError: not a module.

    Example:
        >>> import torchvision
        >>> from cropvote import inject_crop_vote, remove_crop_vote
        >>> model = torchvision.models.resnet18()
        >>> type(remove_crop_vote(inject_crop_vote(model, after="layer1"))) is torchvision.models.ResNet
        True
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError("CV801", f"model must be an nn.Module, got {type(model).__name__}.")
    injection = injection_of(model)
    if injection is None:
        wrapped = unwrap(model)
        if wrapped is not model and injection_of(wrapped) is not None:
            raise SurgeryError("CV417", f"{type(model).__name__} wraps the injected model: pass the model inside it.")
        inner = injected_inside(model)
        raise SurgeryError(
            "CV418",
            f"this {type(model).__name__} was never injected"
            + (f", but its submodule {inner!r} was: pass that." if inner else ": there is nothing to remove."),
        )
    carried = [(m, mark, vars(m).get(mark)) for m in model.modules() for mark in MARKS]
    # and what a copy of a stage, put in the place of the stage, brought along: its injection has no model of its own
    marked = [(m, mark) for m, mark, one in carried if one is injection or (one is not None and one.is_orphan)]
    for module, _ in marked:
        check_restorable(module)
    for module, mark in marked:
        restore_forward(module)
        del vars(module)[mark]
        vars(module).pop("_cropvote_index", None)
    return model


def settings(model: nn.Module) -> Settings:
    """Return the live settings of an injected model or a :class:`CropVote` layer: read them, assign to them.

    Args:
        model: an injected model, also inside DataParallel, DistributedDataParallel or a compiled wrapper; or a layer.

    Returns:
        The :class:`Settings` object that the model uses; a deep copy of the model has its own.

    Raises:
        SurgeryError: the model was never injected.
        InputTypeError: not a module.

    Example:
        >>> import torchvision
        >>> from cropvote import inject_crop_vote, settings
        >>> model = inject_crop_vote(torchvision.models.resnet18(), after="layer1")
        >>> settings(model).vote = "probs"
        >>> settings(model).enabled = False  # the plain network, for a while
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            "CV801", f"settings takes an injected model or a CropVote layer, got {type(model).__name__}."
        )
    found = unwrap(model)
    if isinstance(found, CropVote):
        return found.settings
    injection = injection_of(found)
    if injection is None:
        layers = [name for name, module in found.named_modules() if isinstance(module, CropVote)]
        inner = layers[0] if layers else injected_inside(found)
        raise SurgeryError(
            "CV418",
            f"this {type(found).__name__} is neither injected nor a CropVote layer"
            + (f", but its submodule {inner!r} is: pass that." if inner else "."),
        )
    return injection.settings
