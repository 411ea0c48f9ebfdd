"""The home page of the site is README's first screen: one text, two places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
#: Where the first screen ends.
END = "## Where to split"
#: README's links, as they are from the site.
LINKS = {"](docs/": "](", "](examples/fer48/README.md)": "](guides/fer48.md)"}


def first_screen() -> str:
    text, found, _ = README.read_text().partition(END)
    if not found:
        raise ValueError(f"README.md has no heading {END!r}, where the home page ends.")
    for here, there in LINKS.items():
        text = text.replace(here, there)
    return text


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    return first_screen() + markdown if page.file.src_uri == "index.md" else markdown


def on_config(config: Any) -> Any:
    config.watch.append(str(README))
    return config
