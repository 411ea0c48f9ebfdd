"""Markdown for the pages that the benchmarks write."""

from __future__ import annotations

import textwrap


def line(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return a paragraph as lines of at most 118 characters, the later ones indented."""
    words = " ".join(text.split())
    return textwrap.wrap(words, 118, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)


def folded(title: str, lines: list[str]) -> list[str]:
    """Return lines that a reader opens by their title, here and on GitHub."""
    return [f'<details markdown="1"><summary>{title}</summary>', "", *lines, "", "</details>", ""]
