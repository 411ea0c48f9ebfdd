"""Make almost any image classifier vote over crops of its own feature map, at no extra parameter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .costs import profile, suggest_site
    from .errors import CropVoteError
    from .layer import CropVote
    from .layouts import Tokens
    from .probe.sites import sites
    from .reading import per_view
    from .splitting import split_views
    from .stopping import vote_until_sure
    from .surgery import inject_crop_vote, remove_crop_vote, settings, to_config
    from .views import Views, five_crop, hflip, ten_crop
    from .voting import CropVoteLoss, repeat_targets, vote

__version__ = "0.2.0"

__all__ = [
    "CropVote",
    "CropVoteError",
    "CropVoteLoss",
    "Tokens",
    "Views",
    "five_crop",
    "hflip",
    "inject_crop_vote",
    "per_view",
    "profile",
    "remove_crop_vote",
    "repeat_targets",
    "settings",
    "sites",
    "split_views",
    "suggest_site",
    "ten_crop",
    "to_config",
    "vote",
    "vote_until_sure",
]

#: The module of each public name, which is loaded when the name is first asked for.
_MODULES = {
    "costs": "profile suggest_site",
    "errors": "CropVoteError",
    "layer": "CropVote",
    "layouts": "Tokens",
    "probe.sites": "sites",
    "reading": "per_view",
    "splitting": "split_views",
    "stopping": "vote_until_sure",
    "surgery": "inject_crop_vote remove_crop_vote settings to_config",
    "views": "Views five_crop hflip ten_crop",
    "voting": "CropVoteLoss repeat_targets vote",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
