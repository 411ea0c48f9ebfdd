"""What a split costs, counted before anything is trained."""

from .meters import SiteCost
from .suggesting import Suggestion, suggest_site
from .tables import Profile, profile

__all__ = ["Profile", "SiteCost", "Suggestion", "profile", "suggest_site"]
