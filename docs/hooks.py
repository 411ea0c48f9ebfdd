"""The site's home page, which is README, and the links between the API's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

README = Path(__file__).resolve().parents[1] / "README.md"
#: README's links, as they are from the site.
LINKS = {"](docs/": "](", "](examples/fer48/README.md)": "](guides/fer48.md)"}


def home_page() -> str:
    text = README.read_text()
    for here, there in LINKS.items():
        text = text.replace(here, there)
    return text


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    return home_page() if page.file.src_uri == "index.md" else markdown


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """The docstrings' references to other names become links."""
    if page.file.src_uri != "api.md":
        return html
    html = html.replace(":meth:<code>crop_size</code>", ":meth:<code>Views.crop_size</code>")
    return re.sub(r":(?:func|class|meth|mod):<code>([\w.]+)</code>", _link, html)


def _link(found: re.Match[str]) -> str:
    name = found[1]
    target = f"https://docs.pytorch.org/docs/stable/generated/{name}.html" if name.startswith("torch.") else ""
    return f'<a href="{target or f"#cropvote.{name}"}"><code>{name}</code></a>'


def on_config(config: Any) -> Any:
    config.watch.append(str(README))
    return config


class Sections(griffe.Extension):
    """The sections of our docstrings, by the names that the parser knows."""

    names = {"Example:": "Examples:", "Fields:": "Attributes:"}  # noqa: RUF012

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            lines = obj.docstring.value.split("\n")
            obj.docstring.value = "\n".join(self.names.get(line, line) for line in lines)
