"""Surgery: give an existing model the splits and the vote, in place, undo it, and store what was injected."""

from .config import to_config
from .inject import inject_crop_vote, remove_crop_vote, settings

__all__ = ["inject_crop_vote", "remove_crop_vote", "settings", "to_config"]
