"""Check an injected model with the shapes of a real call, when it is called in a way that was not yet checked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._torch import is_compiled, is_recorded, is_under_compiler, is_vmapped
from ..cuts import parts_of
from ..errors import CropVoteError, RowsError, SiteError, SurgeryError
from ..images import INPUT, example_from_call, first_tensor
from ..layouts import Tokens, token_count
from ..probe.sites import check_sites
from ..swapping import split_module

if TYPE_CHECKING:
    from .injection import Injection

__all__: list[str] = []

TENSOR = "a tensor"


def check_call(injection: Injection, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the sites with the shapes of a real call; copies keep the result.

    Raises:
        SiteError: a site is invalid for such a call.
        SurgeryError: the call runs under a compiler, or the map is another than the one checked before.
    """
    if injection.site_error:
        raise SiteError(*injection.site_error)
    if is_traced():
        mode = "training" if model.training else "eval"
        raise SurgeryError(
            "CV503",
            f"the site {injection.site} was not yet checked in {mode} mode with such arguments, and cannot be while "
            f"the model is compiled, exported, traced or vmapped: pass input_size= to inject_crop_vote, or call it "
            f"once as it is.",
        )
    key = injection.argument_key(args, kwargs)
    samples, *image = first_tensor(args, kwargs).shape
    tokens = [layout for layout in injection.user_layouts.values() if isinstance(layout, Tokens)]
    if tokens and injection.layouts_by_size and tuple(image) not in injection.layouts_by_size:
        raise SurgeryError(
            "CV415",
            f"{tokens[0]} was stated for images of another shape than {tuple(image)}: remove_crop_vote, and "
            f"inject again with the tokens of these.",
        )
    try:
        example = example_from_call(args, kwargs, samples)
        maps = [next((x for x in layouts if not isinstance(x, Tokens)), None) for layouts in injection.layouts]
        layouts = [injection.user_layouts[name] or found for name, found in zip(injection.sites, maps, strict=True)]
        names = _names_in(injection, model)
        sites = dict(zip(names, parts_of(injection.settings.views), strict=True))
        modes, splits = check_sites(model, sites, dict(zip(names, layouts, strict=True)), example)
    except SiteError as error:
        # of several arguments, another's first axis may have the batch's length by chance
        if len(key) == 1 and not injection.checked:
            injection.site_error = error.code, error.message
        raise
    order = tuple(split.site for split in splits)
    if order != names:
        raise SurgeryError(
            "CV416",
            f"the forward reaches {' before '.join(map(repr, order))}, which the model defines in another order: "
            f"remove_crop_vote, and inject again with input_size=, which tells it before.",
        )
    tensors = sum(kind == TENSOR for _, kind in key)
    # with one sample, an argument of length 1 may belong to the sample or to the model
    injection.add_checked(modes, key, tuple(image), splits, counted=tensors == 1 or samples > 1)


def _names_in(injection: Injection, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the sites; of one that was wrapped since, the name that its split has now."""
    modules, names = dict(model.named_modules()), list(injection.sites)
    for name, module in modules.items():
        if module.__dict__.get("_cropvote_split") is injection:
            i = module.__dict__["_cropvote_index"]
            if names[i] not in modules or split_module(model, names[i]) is not module:
                names[i] = name
    return tuple(names)


def explain_failure(
    injection: Injection, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: RuntimeError
) -> None:
    """Raise RowsError if the call failed because a site is no longer valid."""
    if not injection.check or is_traced() or isinstance(error, torch.OutOfMemoryError):
        return
    try:
        check_call(injection, model, args, kwargs)
    except SiteError as reason:
        raise RowsError("CV320", f"the call failed ({error}), because the model has changed: {reason}") from error
    except CropVoteError:
        return


def check_recorded(injection: Injection, model: nn.Module) -> None:
    """Check, while a compiler records and splits cannot be counted, that the modules that carry them are there.

    Raises:
        RowsError: one was replaced since.
        SurgeryError: two grids have equally many tokens.
    """
    there = [m for m in model.modules() if getattr(m, "_cropvote_split", None) is injection]
    if len(there) < len(injection.sites) - (injection.sites[0] == INPUT):
        raise RowsError(
            "CV305",
            f"of the modules that carry the splits after {injection.site}, {len(there)} are left: one was replaced "
            f"since the model was checked. remove_crop_vote, and inject again.",
        )
    for layouts in injection.layouts:
        if len({token_count(x) for x in layouts if isinstance(x, Tokens)}) < len(layouts) > 1:
            raise SurgeryError(
                "CV504",
                f"the model was checked with images whose tokens are {layouts}, which a compiled model cannot tell "
                f"by their number: inject a model of its own for each shape of image.",
            )


def has_compiled_parts(model: nn.Module) -> bool:
    """Return whether a part of the model may be compiled by itself."""
    if "torch._dynamo" not in sys.modules:
        return False
    if is_under_compiler():
        return True
    seen, waiting = {model}, [model]  # model.modules() would take three times as long, and this is every call's
    while waiting:
        module = waiting.pop()
        if is_compiled(module):
            return True
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def is_traced() -> bool:
    """Return whether the call is compiled, exported, traced or vmapped, so that no check can run."""
    return is_recorded() or is_vmapped()
