"""Functions that each disable one of the library's guards, so tests can show why the guard is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cropvote import call, images, layouts, options, splitting, swapping
from cropvote.probe import layout, reasons, sites, taint, trace, trial, verdicts
from cropvote.surgery import inject, injection


def no_probe(patch: pytest.MonkeyPatch) -> None:
    def trust(trace: object, sites: dict, stated: dict, *_: object, **__: object) -> verdicts.Verdict:
        splits = [trial.Split(name, views, stated[name] or "NCHW") for name, views in sites.items()]
        return verdicts.Verdict(splits, "")

    patch.setattr(sites, "judge", trust)


def no_paths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(taint.Taint, "of", lambda paths, tree: 0)


def batch_of_one(patch: pytest.MonkeyPatch) -> None:
    for module in (images, reasons, trace, trial):
        patch.setattr(module, "BATCH", 1)


def no_rows(patch: pytest.MonkeyPatch) -> None:
    """Count neither the splits that ran nor the output rows."""
    patch.setattr(call, "check_rows", lambda *_: None)
    no_watch(patch)


def no_watch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(injection, "check_splits_ran", lambda *_: None)


def no_tracking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(injection, "track_all", lambda tree, samples: tree)


def no_carrier(patch: pytest.MonkeyPatch) -> None:
    for module in (swapping, trace):
        patch.setattr(module, "carrier_of", lambda module, counts: module)


def views_outermost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splitting, "flatten_views", lambda x: x.transpose(0, 1).flatten(0, 1))
    patch.setattr(splitting, "unflatten_views", lambda x, count: x.unflatten(0, (count, -1)).transpose(0, 1))


def all_views_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trial, "pad_to_prime", lambda views: views)


def channels_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdicts, "find_layout", lambda *_: ("NCHW", ""))


def guessed_grid(patch: pytest.MonkeyPatch) -> None:
    """Guess a square grid, with the remaining tokens as prefix."""

    def guess(trace: object, name: str, length: int) -> layouts.Tokens:
        side = int(length**0.5)
        return layouts.Tokens(side, side, length - side * side)

    patch.setattr(layout, "_known_tokens", guess)


def no_check_of_calls(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(injection.Injection, "ensure_checked", lambda *_: None)


def grids_by_length(patch: pytest.MonkeyPatch) -> None:
    """Take equal numbers of tokens for the same grid, whatever the image's shape."""
    patch.setattr(
        injection.Injection, "_layouts_for", lambda own, image: next(iter(own.layouts_by_size.values()), None)
    )


def by_hooks(patch: pytest.MonkeyPatch) -> None:
    """Use forward hooks instead of swapped classes."""

    def hook(module: nn.Module, forward: Callable) -> None:
        class Base:
            forward = staticmethod(lambda module, *args: args[-1])

        def run(module: nn.Module, args: tuple, output: object) -> object:
            if forward is injection.split_forward:
                return forward(module, Base, output)
            own = module._cropvote
            return call.vote_output(call.call_by(own.settings, module.training), output, args[0])

        module.register_forward_hook(run)

    patch.setattr(inject, "swap_forward", hook)


def plain_wraps(patch: pytest.MonkeyPatch) -> None:
    """Do not recognise the proxies of torch.fx."""
    patch.setattr(torch.fx, "Proxy", type("Proxy", (), {}))


def shared_settings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(options.Settings, "__deepcopy__", lambda self, memo: self, raising=False)


def rows_in_an_attribute(patch: pytest.MonkeyPatch) -> None:
    """Keep the images in the model instead of in the call."""

    def forward(module: nn.Module, base: type, *args: object, **kwargs: object) -> object:
        own = module._cropvote
        own.images = args[0]
        output = base.forward(module, *args, **kwargs)
        return call.vote_output(call.call_by(own.settings, module.training), output, own.images)

    patch.setattr(inject, "vote_forward", forward)


def one_call_for_all(patch: pytest.MonkeyPatch) -> None:
    """Apply the outer call's request to the calls inside it."""

    def begin(self: call.running, settings: options.Settings, training: bool) -> None:
        asked = [one for one in call._STACK.get() if one.requested]
        self.call = asked[0] if asked else call.call_by(settings, training)
        self.call.started = True

    patch.setattr(call.running, "__init__", begin)


def own_modes(patch: pytest.MonkeyPatch) -> None:
    """Let each split follow its own module's mode."""
    patch.setattr(injection, "current", lambda settings: None)
    patch.setattr(injection.Injection, "training", lambda own, module: module.training)
    no_rows(patch)
