"""Make almost any image classifier vote over crops of its own feature map, at no extra parameter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .costs.meters import SiteCost
    from .costs.suggesting import Suggestion, suggest_site
    from .costs.tables import Profile, profile
    from .errors import CropVoteError
    from .layer import CropVote
    from .layouts import Tokens
    from .options import Settings
    from .plots import plot_agreement, plot_views
    from .probe.sites import sites
    from .probe.verdicts import Site
    from .reading import per_view
    from .splitting import split_views
    from .stopping import SureVotes, choose_confidence, vote_until_sure
    from .surgery import inject_crop_vote, remove_crop_vote, settings
    from .uncertainty import agreement, mutual_information, predictive_entropy
    from .views import View, Views, d4, five_crop, grid, hflip, ten_crop
    from .voting import CropVoteLoss, repeat_targets, vote

__version__ = "0.1.0"

__all__ = [
    "CropVote",
    "CropVoteError",
    "CropVoteLoss",
    "Profile",
    "Settings",
    "Site",
    "SiteCost",
    "Suggestion",
    "SureVotes",
    "Tokens",
    "View",
    "Views",
    "agreement",
    "choose_confidence",
    "d4",
    "five_crop",
    "grid",
    "hflip",
    "inject_crop_vote",
    "mutual_information",
    "per_view",
    "plot_agreement",
    "plot_views",
    "predictive_entropy",
    "profile",
    "remove_crop_vote",
    "repeat_targets",
    "settings",
    "sites",
    "split_views",
    "suggest_site",
    "ten_crop",
    "vote",
    "vote_until_sure",
]

#: The module of each public name, which is loaded when the name is first asked for.
_MODULES = {
    "costs.meters": "SiteCost",
    "costs.suggesting": "Suggestion suggest_site",
    "costs.tables": "Profile profile",
    "errors": "CropVoteError",
    "layer": "CropVote",
    "layouts": "Tokens",
    "options": "Settings",
    "plots": "plot_agreement plot_views",
    "probe.sites": "sites",
    "probe.verdicts": "Site",
    "reading": "per_view",
    "splitting": "split_views",
    "stopping": "SureVotes choose_confidence vote_until_sure",
    "surgery": "inject_crop_vote remove_crop_vote settings",
    "uncertainty": "agreement mutual_information predictive_entropy",
    "views": "View Views d4 five_crop grid hflip ten_crop",
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
