"""The known ways to a silent wrong number, each with its guard and a way to disable the guard."""

from hazards import layouts, models, runs  # noqa: F401  # they fill the table
from hazards.table import HAZARDS

__all__ = ["HAZARDS"]
