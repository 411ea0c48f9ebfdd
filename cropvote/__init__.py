"""Make almost any image classifier vote over crops of its own feature map, at no extra parameter."""

from .calling.options import Settings
from .costs.meters import SiteCost
from .costs.suggesting import Suggestion, suggest_site
from .costs.tables import Profile, profile
from .errors import CropVoteError
from .layer import CropVote
from .layouts import Tokens
from .plots import plot_agreement, plot_views
from .probing.probe import sites
from .probing.verdicts import Site
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
