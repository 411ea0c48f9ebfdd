"""A progress bar, if it is wanted and tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TypeVar

__all__: list[str] = []

Item = TypeVar("Item")


def shown(items: Iterable[Item], title: str, unit: str, progress: bool) -> Iterable[Item]:
    """Return the items, with a bar on a terminal or in a notebook once they take longer than a second."""
    if progress:
        with suppress(ImportError):
            from tqdm.auto import tqdm

            return tqdm(items, desc=title, unit=unit, delay=1, leave=False, disable=None)
    return items
