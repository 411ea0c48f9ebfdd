"""Argument validation that needs no probe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import nn

from .._torch import has_compiled_forward, is_compiled, original
from ..cuts import After, ViewsOrName, as_views
from ..errors import InputTypeError, OptionError, SiteError, SurgeryError, UnknownSiteError
from ..images import INPUT
from ..layouts import Layout, check_layout
from ..swapping import own_forward, split_module
from ..views import Views
from .injection import Injection

__all__: list[str] = []

MARKS = ("_cropvote", "_cropvote_split")
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def sites_after(model: nn.Module, after: After, views: ViewsOrName | None = None) -> dict[str, Views]:
    """Return the sites and their views, in the order in which the model defines them.

    Raises:
        UnknownSiteError: no module has that name.
        InputTypeError: names or views of another type.
        OptionError: no site, or views beside those of several sites.
    """
    if not isinstance(after, Mapping):
        check_name(model, after)
        return {after: as_views(views)}
    if not after:
        raise OptionError("CV850", 'after names no site: give {"layer1": hflip(), "layer3": five_crop()}, say.')
    if views is not None:
        raise OptionError("CV850", "views are those of a single site; with several, after holds the views of each.")
    chosen: dict[str, Views] = {}
    for name, of_site in after.items():
        check_name(model, name)
        if of_site is None:
            raise InputTypeError("CV850", f"after[{name!r}] must be a Views, such as five_crop(), got None.")
        chosen[name] = as_views(of_site)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return {name: chosen[name] for name in sorted(chosen, key=lambda name: -1 if name == INPUT else order[name])}


def user_layouts_of(sites: dict[str, Views], layout: Layout | Mapping[str, Layout] | None) -> dict[str, Layout | None]:
    """Return the layout that the user states for each site, or None."""
    stated = layout if isinstance(layout, Mapping) else dict.fromkeys(sites, layout)
    unknown = [name for name in stated if name not in sites]
    if unknown:
        raise OptionError(
            "CV807", f"layout names {unknown[0]!r}, which is not a site of this injection: {', '.join(sites)}."
        )
    for one in stated.values():
        if one is not None:
            check_layout(one)
    return {name: stated.get(name) for name in sites}


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError("CV801", f"model must be an nn.Module, got {type(model).__name__}.")
    kind = type(model).__name__
    injection = injection_of(model)
    if injection is not None:
        raise SurgeryError(
            "CV401", f"this {kind} votes already, after={injection.site}: remove_crop_vote(model) first."
        )
    if isinstance(model, WRAPPERS) or kind == "FullyShardedDataParallel":
        raise SurgeryError("CV402", f"the model is wrapped in {kind}: inject into model.module before it is wrapped.")
    if is_compiled(model):
        raise SurgeryError("CV403", "the model is compiled already: inject first, then compile it.")
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(
            "CV404", "the model is a TorchScript module, whose forward is fixed: inject first, then trace it."
        )
    if isinstance(model, torch.fx.GraphModule):
        raise SurgeryError(
            "CV405",
            "the model is a torch.fx.GraphModule, whose forward is generated: inject the model it was traced from.",
        )
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise SurgeryError(
            "CV406",
            f"this {kind} holds lazy modules whose parameters have no shape yet: call it once on a batch, then inject.",
        )
    if "_cropvote_split" in vars(model):
        raise SurgeryError(
            "CV407", f"this {kind} carries the split of another injected model: remove_crop_vote from that first."
        )
    inner = injected_inside(model)
    if inner:
        raise SurgeryError(
            "CV408",
            f"the submodule {inner!r} of this {kind} is part of an injected model already: remove_crop_vote first.",
        )
    _check_forward(model, kind)


def check_name(model: nn.Module, after: str) -> None:
    """Raise UnknownSiteError, or InputTypeError, unless the model has a module of that name."""
    if not isinstance(after, str):
        raise InputTypeError(
            "CV850",
            f'after must be a module\'s name, such as "layer1", or "input", or several with their views, '
            f'{{"layer1": hflip(), "layer3": five_crop()}}, got {after!r}.',
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    if after == INPUT and INPUT in modules:
        raise SiteError(
            "CV152", 'after="input" means the images, but this model has a module of that name: rename the module.'
        )
    if after == INPUT:
        return
    if not after or after not in modules:
        names = [name for name in modules if name]
        near = difflib.get_close_matches(after, names, n=5)
        top = [name for name, _ in model.named_children()]
        hint = (
            f"nearest: {', '.join(near)}" if near else f"its children: {', '.join(top)}" if top else "it has no modules"
        )
        if "=" in after:
            hint = 'several sites are a dict, {"layer1": hflip(), "layer3": five_crop()}'
        raise UnknownSiteError(
            "CV153", f"{type(model).__name__} has no module named {after!r}; {hint}. See cropvote.sites."
        )
    _check_forward(split_module(model, after), repr(after))


def _check_forward(module: nn.Module, what: str) -> None:
    if has_compiled_forward(module):
        raise SurgeryError(
            "CV421",
            f"the class of {what} decorates its forward with torch.compile, so that it would run past the split or "
            f"vote: take the decorator away, inject, then compile the model.",
        )
    hidden = own_forward(module)
    if hidden is not None:
        raise SurgeryError(
            "CV422",
            f"the forward of {what} was replaced on the instance (by {hidden}), so that a split or vote there would "
            f"have no effect: undo that, inject, then do it again.",
        )


def injection_of(module: nn.Module) -> Injection | None:
    return module.__dict__.get("_cropvote")  # not vars(), which a compiler of PyTorch 2.6 does not know


def injected_inside(model: nn.Module) -> str:
    """Return the name of the first submodule that votes or carries a split."""
    return next((name for name, m in model.named_modules() if name and any(mark in vars(m) for mark in MARKS)), "")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel or a compiled wrapper."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
            continue
        inner = original(model)
        if inner is None:
            return model
        model = inner
