"""The ways to a wrong number without an error, each with its guard, and with the means to take the guard out."""

from hazards import layouts, models, runs  # noqa: F401  # they fill the table
from hazards.table import HAZARDS

__all__ = ["HAZARDS"]
