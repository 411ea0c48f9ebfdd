"""What takes one guard out of the library each, so that a test can show what the guard is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cropvote import layer, layouts, splitting, surgery
from cropvote.calling import calls, options
from cropvote.probing import checks, fakes, trials, verdicts, walk


def no_probe(patch: pytest.MonkeyPatch) -> None:
    def trusted(probe: verdicts.Probe, plan: dict, stated: dict) -> tuple[list[trials.Split], str, str]:
        splits = [trials.Split(name, views, stated[name] or "NCHW") for name, views in plan.items()]
        return splits, splits[-1].name, ""

    patch.setattr(verdicts.Probe, "verdict_of", trusted)


def no_paths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fakes.Paths, "of", lambda paths, tree: 0)


def batch_of_one(patch: pytest.MonkeyPatch) -> None:
    for module in (fakes, walk, trials):
        patch.setattr(module, "BATCH", 1)


def no_rows(patch: pytest.MonkeyPatch) -> None:
    """Neither the splits that ran nor the rows that came out are counted."""
    patch.setattr(calls, "_check_rows", lambda *_: None)
    no_watch(patch)


def no_watch(patch: pytest.MonkeyPatch) -> None:
    for module in (surgery, layer):
        patch.setattr(module, "watched", lambda run, *_: run())


def no_carrier(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(walk, "_carrier", lambda module, standings: module)


def views_outermost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splitting, "join_views", lambda x: x.transpose(0, 1).flatten(0, 1))
    patch.setattr(splitting, "part_views", lambda x, count: x.unflatten(0, (count, -1)).transpose(0, 1))


def all_views_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdicts, "many_views", lambda views: views)


def channels_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdicts.Probe, "_find_layout", lambda probe, name: ("NCHW", ""))


def guessed_grid(patch: pytest.MonkeyPatch) -> None:
    """Square, with whatever is left over in front."""

    def guess(probe: verdicts.Probe, name: str, length: int) -> layouts.Tokens:
        side = int(length**0.5)
        return layouts.Tokens(side, side, length - side * side)

    patch.setattr(verdicts.Probe, "_stated_tokens", guess)


def by_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks.Injection, "is_checked", lambda *_: True)


def by_hooks(patch: pytest.MonkeyPatch) -> None:
    """Forward hooks in place of the classes."""

    def hook(module: nn.Module, forward: Callable) -> None:
        class Base:
            forward = staticmethod(lambda module, *args: args[-1])

        def run(module: nn.Module, args: tuple, output: object) -> object:
            if forward is surgery._split_forward:
                return forward(module, Base, output)
            injection = module._cropvote
            plan = calls.plan_of(injection.settings, module.training)
            return calls.conclude(plan, output, args[0].shape[0], injection.settings)

        module.register_forward_hook(run)

    patch.setattr(surgery, "swap_forward", hook)


def plain_wraps(patch: pytest.MonkeyPatch) -> None:
    """No look at what torch.fx passes."""
    patch.setattr(torch.fx, "Proxy", type("Proxy", (), {}))


def shared_settings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(options.Settings, "__deepcopy__", lambda self, memo: self, raising=False)


def rows_in_an_attribute(patch: pytest.MonkeyPatch) -> None:
    """The number of samples kept in the model instead of in the call."""

    def forward(module: nn.Module, base: type, *args: object, **kwargs: object) -> object:
        injection = module._cropvote
        injection.samples = args[0].shape[0]
        output = base.forward(module, *args, **kwargs)
        plan = calls.plan_of(injection.settings, module.training)
        return calls.conclude(plan, output, injection.samples, injection.settings)

    patch.setattr(surgery, "_vote_forward", forward)


def one_plan_for_all(patch: pytest.MonkeyPatch) -> None:
    """What a call was asked to do holds for the calls inside it as well."""
    following = calls.following
    patch.setattr(surgery, "following", lambda plans: following({key: plan for key, plan in plans.items() if plan}))
    patch.setattr(surgery, "is_steered", lambda *_: False)
