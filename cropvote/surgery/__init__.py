"""Surgery: give an existing model the splits and the vote, in place, and undo it."""

from .inject import inject_crop_vote, remove_crop_vote, settings

__all__ = ["inject_crop_vote", "remove_crop_vote", "settings"]
